"""Which types a fused block computes in: the rules of autocast, decided once per block instead of once per operator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from fastskel.nn.fp8 import fp8_asked, fp8_within

__all__ = ["Precision", "computing", "precision_of", "without_autocast"]


class Precision(NamedTuple):
    """Types of one pass.

    Attributes:
        compute: Operands of matrix products, and tensors kept for the backward pass.
        residual: Residual stream, normalisation and its gradients.
        wide: Softmax and sums over many rows: the residual's, float32 at least.
        fp8: Whether a layer rounds the operands of its linear maps further, to 8 bits.
    """

    compute: torch.dtype
    residual: torch.dtype
    wide: torch.dtype
    fp8: bool = False

    @classmethod
    def of(cls, compute: torch.dtype) -> Precision:
        """Choose the types of inference over (N, S, D): the residual stream in float32 at least."""
        wide = torch.promote_types(compute, torch.float32)
        return cls(compute, wide, wide)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off, where the device knows it, for tensors (N, S, D) whose types were chosen."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@contextmanager
def _fp8_without_autocast(device: torch.device) -> Iterator[None]:
    with without_autocast(device), fp8_within():
        yield


def computing(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Enter one pass of a layer over (N, S, D): autocast is off, as its types were chosen, and fp8 on where it was."""
    return _fp8_without_autocast(device) if precision.fp8 else without_autocast(device)


def precision_of(x: Tensor, weight: Tensor, name: str) -> Precision:
    """Choose the types for an input (N, S, D) under the autocast that is on, or for the model's own type.

    Args:
        x: Input of the block.
        weight: One of its parameters.
        name: Block, for the error.
    Raises:
        ValueError: If the input is not floating point, or differs in type from the weights without autocast.
    """
    if not x.is_floating_point():
        raise ValueError(f"{name}: input must be floating point, got {x.dtype}. Convert it.")
    kind = x.device.type
    # as torch's own rule: float64 is left alone
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        wide = torch.promote_types(x.dtype, torch.float32)
        compute = torch.get_autocast_dtype(kind)
        return Precision(compute, wide, wide, fp8=compute == torch.bfloat16 and fp8_asked())
    if x.dtype != weight.dtype:
        raise ValueError(
            f"{name}: input must have the weights' type {weight.dtype}, got {x.dtype}. Convert one, or use autocast."
        )
    return Precision(x.dtype, x.dtype, torch.promote_types(x.dtype, torch.float32))
