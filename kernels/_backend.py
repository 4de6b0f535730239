"""What every kernel file shares: Triton where it is installed, launch options, cases of offline compilation."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton is published for Linux only: the CPU operators work without it
    triton = None
    tl = None

__all__ = [
    "INTERPRETED",
    "OPTIONS",
    "CompileCase",
    "Cost",
    "cpu_kernel",
    "device_of",
    "jit",
    "num_processors",
    "tl",
    "triton",
]

# Triton reads the variable when a kernel is decorated, so it cannot change later
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET", "0") == "1"

# options of every launch; fused multiply-add is named because Triton's default for it changes between releases
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


# what a processor count is taken to be where there is no GPU: few, so that programs loop over several items
HOST_PROCESSORS = 3


class Cost(NamedTuple):
    """What a call of a kernel costs at least.

    Attributes:
        flops: Operations of its matrix products, two for a multiplication with its addition.
        bytes: Bytes of device memory: every input read once, every output written once.
    """

    flops: int
    bytes: int


NO_COST = Cost(0, 0)


@dataclass(frozen=True)
class CompileCase:
    """One set of real shapes that a kernel must compile for without a GPU.

    Attributes:
        label: What the shapes belong to.
        kernel: Function decorated with `jit`.
        signature: Triton type of every argument that is not a constexpr, in order.
        constexprs: Value of every constexpr.
        num_warps: Warps of a program.
        num_stages: Stages of its software pipelines.
        cost: What a call at these shapes costs at least.
        hot: Whether it runs in every training step, so that it may not spill registers on sm_90.
    """

    label: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    cost: Cost = NO_COST
    hot: bool = False


# what pointers with such names lead to is read one number at a time, from slices that begin anywhere: a kernel would be compiled
# again for each alignment, and gain nothing
ANY_ALIGNMENT = ("slots", "factor", "mean", "rstd")


def jit(**options: Any) -> Callable[[Callable[..., None]], Any]:
    """Decorate a Triton kernel; without Triton, leave in its place something that says so when it is launched."""
    if triton is None:
        return _Missing

    def decorate(function: Callable[..., None]) -> Any:
        names = inspect.signature(function).parameters
        loose = [name for name in names if name.startswith("p_") and any(part in name for part in ANY_ALIGNMENT)]
        return triton.jit(do_not_specialize_on_alignment=loose, **options)(function)

    return decorate


def cpu_kernel(reference: Callable[..., Any], interpreted: Callable[..., Any]) -> Callable[..., Any]:
    """Choose an operator's CPU kernel: its reference, or its Triton host function under TRITON_INTERPRET=1."""
    return interpreted if INTERPRETED else reference


def device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make a tensor's GPU current while a kernel is launched: Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def num_processors(device: torch.device) -> int:
    """Count a GPU's multiprocessors, which bounds the programs of a persistent kernel; a few on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else HOST_PROCESSORS


class _Missing:
    def __init__(self, function: Callable[..., None]) -> None:
        self.name = getattr(function, "__name__", "kernel")

    def __getitem__(self, grid: object) -> Any:
        raise RuntimeError(
            f"{self.name}: Triton must be installed to run on a GPU, got none. Run `pip install triton`."
        )
