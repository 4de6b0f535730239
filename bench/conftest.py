"""What benchmarks under pytest share: the device, and timing that waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastskel.bench.harness import Timed, waiting

__all__ = ["device", "timed"]


@pytest.fixture
def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def timed(benchmark: Any, device: torch.device) -> Timed:
    """Time a call in a group of providers, until the device is done; further keywords go into the results.

    Returns the median in seconds, or None where nothing is timed, as with --benchmark-disable.
    """

    def time(group: str, call: Callable[[], object], **extra: Any) -> float | None:
        benchmark.group = group
        benchmark.extra_info.update(extra)
        benchmark(waiting(call, device))
        return None if benchmark.stats is None else float(benchmark.stats.stats.median)

    return time
