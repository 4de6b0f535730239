"""Where to compute, and in which types."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from fastskel.nn.fp8 import fp8_products

__all__ = ["choose_device", "mixed_precision"]

# what trains and is tested; torch has more kinds, without autocast or storage
DEVICES = ("cpu", "cuda")


def choose_device(name: str) -> torch.device:
    """Turn a device's name into a device that works.

    Args:
        name: As torch names it, or `"auto"` for a GPU where there is one.
    Raises:
        ValueError: If this machine, or this torch, has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type not in DEVICES:
            raise RuntimeError(f"not one of {', '.join(DEVICES)}")
    except (RuntimeError, AssertionError) as error:
        # a torch built without a backend asserts, one without its hardware or of an unknown name raises
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"choose_device: device must be one this machine has, got {name!r} ({reason}). Use cpu or auto."
        ) from error
    return device


@contextlib.contextmanager
def mixed_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Enter forward passes over (N, T, M, V, C).

    Args:
        precision: "fp32", "bf16", or "fp8", which is bf16 with layers that multiply 8-bit floats.
        device: Where they are computed.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32"))
        if precision == "fp8":
            stack.enter_context(fp8_products())
        yield
