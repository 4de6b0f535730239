"""What benchmarks under pytest share: the device, and timing that waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

__all__ = ["device", "timed"]


@pytest.fixture
def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def timed(benchmark: Any, device: torch.device) -> Callable[..., None]:
    """Time a call in a group of providers, until the device is done; further keywords go into the results."""

    def time(group: str, call: Callable[[], object], **extra: Any) -> None:
        def done() -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.group = group
        benchmark.extra_info.update(extra)
        benchmark(done)

    return time
