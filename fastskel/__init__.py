"""Fast skeleton foundation models: accelerated self-supervised pretraining and evaluation on skeleton sequences.

Import what you need from the sub-packages: `fastskel.data` (packed data sets, loader), `fastskel.models`,
`fastskel.objectives`, `fastskel.train`, `fastskel.evaluate`, `fastskel.recipes`, and `fastskel.compat.usdrl` as a
drop-in for existing USDRL code. This module itself imports none of them, so that it costs nothing; `fastskel.extract`,
which turns clips into features, is fetched when it is first asked for.
"""

import importlib
from typing import Any

__all__ = ["__version__", "extract"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "extract":
        return importlib.import_module("fastskel.evaluate").extract
    raise AttributeError(f"module 'fastskel' has no attribute {name!r}")
