"""Who computes what lies between the matrix products of a layer: torch's own operators, or fused Triton kernels."""

from __future__ import annotations

from typing import Literal

import torch

from fastskel.kernels._backend import INTERPRETED, triton

__all__ = ["KERNEL_CHOICES", "KernelChoice", "Kernels", "Measured", "check_kernels", "choose_kernels"]

KernelChoice = Literal["auto", "torch", "triton"]
KERNEL_CHOICES: tuple[KernelChoice, ...] = ("auto", "torch", "triton")
Kernels = Literal["torch", "triton"]
Measured = frozenset[tuple[tuple[int, int], torch.dtype]]

TYPES = (torch.float32, torch.bfloat16, torch.float16)

# devices, by compute capability and type of the products, on which a row of bench/results shows the fused kernels to win at the
# published sizes; none is measured yet
_MEASURED: Measured = frozenset()


def check_kernels(kernels: str) -> None:
    """Refuse a name that is no way to compute over tokens (N, S, D).

    Raises:
        ValueError: Listing the ways there are.
    """
    if kernels not in KERNEL_CHOICES:
        raise ValueError(f"kernels: must be one of {KERNEL_CHOICES}, got {kernels!r}. Choose one.")


def choose_kernels(
    kernels: KernelChoice, device: torch.device, compute: torch.dtype, measured: Measured | None = None
) -> Kernels:
    """Decide who computes over tokens (N, S, D) on a device.

    Args:
        kernels: `"torch"`, `"triton"`, or `"auto"`, which takes Triton's where it was measured to win.
        device: Where the tokens are.
        compute: Type of the matrix products.
        measured: Where the kernels were measured to win, if they are not those of a layer.
    Raises:
        ValueError: On an unknown name, and on `"triton"` where its kernels cannot run: without Triton or a GPU, or in a type that
            they do not have.
    """
    check_kernels(kernels)
    if kernels == "auto":
        known = device.type == "cuda" and triton is not None
        won = _MEASURED if measured is None else measured
        return "triton" if known and (torch.cuda.get_device_capability(device), compute) in won else "torch"
    if kernels == "torch":
        return "torch"
    if triton is None:
        raise ValueError("kernels: 'triton' must find Triton installed, got none. Run `pip install triton`.")
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        raise ValueError(f"kernels: 'triton' must run on a GPU, got {device.type}. Choose 'torch', or set TRITON_INTERPRET=1.")
    if compute not in TYPES:
        raise ValueError(f"kernels: 'triton' must compute in one of {TYPES}, got {compute}. Choose 'torch'.")
    return "triton"
