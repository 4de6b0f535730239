"""Fast skeleton foundation models: accelerated self-supervised pretraining and evaluation on skeleton sequences.

Import what you need from the sub-packages: `fastskel.data` (packed data sets, loader), `fastskel.models`,
`fastskel.objectives`, `fastskel.train`, `fastskel.evaluate`, `fastskel.recipes`, and `fastskel.compat.usdrl` as a
drop-in for existing USDRL code. This module itself imports none of them, so that it costs nothing.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
