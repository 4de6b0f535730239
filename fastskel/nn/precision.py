"""Which types a fused block computes in: the rules of autocast, decided once per block instead of once per operator."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Precision", "precision_of", "without_autocast"]


class Precision(NamedTuple):
    """Types of one pass.

    Attributes:
        compute: Operands of matrix products, and tensors kept for the backward pass.
        residual: Residual stream, normalisation and its gradients.
        wide: Softmax and sums over many rows: the residual's, float32 at least.
    """

    compute: torch.dtype
    residual: torch.dtype
    wide: torch.dtype

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
        return Precision(torch.get_autocast_dtype(kind), wide, wide)
    if x.dtype != weight.dtype:
        raise ValueError(
            f"{name}: input must have the weights' type {weight.dtype}, got {x.dtype}. Convert one, or use autocast."
        )
    return Precision(x.dtype, x.dtype, torch.promote_types(x.dtype, torch.float32))
