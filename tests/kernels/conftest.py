"""Where a kernel's tests run: natively on a GPU, or interpreted on the CPU, in a process of their own.

Triton reads TRITON_INTERPRET when a kernel is decorated, so one process either interprets or does not. A test that takes the
fixture `device` is run for both; `test_interpreter.py` starts the processes that interpret.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastskel.kernels._backend import INTERPRETED

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave to each process the tests that it can run: they are counted where they run."""
    other = [item for item in items if (item.get_closest_marker("interpreted") is not None) != INTERPRETED]
    if other:
        config.hook.pytest_deselected(items=other)
        items[:] = [item for item in items if item not in set(other)]


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.interpreted),
        pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU]),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where Triton kernels run in this process."""
    return torch.device(request.param)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Record the launches of kernels by name, to show that it was they that computed."""

    def record(*kernels: Any) -> list[str]:
        seen: list[str] = []
        for kernel in kernels:
            name = getattr(kernel, "__name__", None) or kernel.fn.__name__

            def run(*args: Any, _original: Any = kernel.run, _name: str = name, **options: Any) -> Any:
                seen.append(_name)
                return _original(*args, **options)

            monkeypatch.setattr(kernel, "run", run)
        return seen

    return record
