"""Branches added to a residual stream, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Branch", "mlp_residual", "scaled", "spread"]


class Branch(NamedTuple):
    """One branch that is added to a residual stream.

    Attributes:
        value: What it computed, (n, S, D); for a backward pass where its gradient is written.
        slots: Row of each sample in `value`, (N,) int32, -1 where it is absent; every row belongs to one sample at most. None
            if all are there in order.
        scale: Factor of all samples.
        factor: Factor of each sample, (N,) float32.
        bias: Added to the value, (D,).
        bias_factor: Factor of the bias for each sample, absent or not, (N,) float32. None for the value's factors where the
            sample is there.
        bias_scale: Factor of the bias for all samples, beside `bias_factor`.
    """

    value: Tensor
    slots: Tensor | None = None
    scale: float = 1.0
    factor: Tensor | None = None
    bias: Tensor | None = None
    bias_factor: Tensor | None = None
    bias_scale: float = 1.0


def spread(compact: Tensor, slots: Tensor | None) -> Tensor:
    if slots is None:
        return compact
    # slot -1 is the last row: zeros
    return torch.cat([compact, compact.new_zeros(1, *compact.shape[1:])])[slots.long()]


def scaled(value: Tensor, scale: float, factor: Tensor | None) -> Tensor:
    value = value * scale
    return value if factor is None else value * factor.to(value.dtype)[:, None, None]


def mlp_residual(base: Tensor | None, branches: Sequence[Branch]) -> Tensor:
    """Add scaled branches to `base` (N, S, D), in its type; without base, to nothing, in the type of the first."""
    total = torch.zeros_like(spread(branches[0].value, branches[0].slots)) if base is None else base
    for branch in branches:
        value = branch.value.to(total.dtype)
        bias = None if branch.bias is None else branch.bias.to(total.dtype)
        if bias is not None and branch.bias_factor is None:
            value = value + bias
        total = total + scaled(spread(value, branch.slots), branch.scale, branch.factor)
        if bias is not None and branch.bias_factor is not None:
            total = total + scaled(bias.expand_as(total), branch.bias_scale, branch.bias_factor)
    return total
