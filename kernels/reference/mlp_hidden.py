"""Hidden activations of an MLP, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fastskel.kernels.reference.mlp_residual import scaled, spread
from torch import Tensor

__all__ = ["Hidden", "activate", "activate_grad", "mlp_hidden"]


class Hidden(NamedTuple):
    """One term of a sum of hidden activations.

    Attributes:
        up: Before the activation, (n, S, F).
        slots: Row of each sample in `up`, (N,) int32, -1 where it is absent; every row belongs to one sample at most. None if
            all are there in order.
        scale: Factor of all samples.
        factor: Factor of each sample, (N,) float32.
    """

    up: Tensor
    slots: Tensor | None = None
    scale: float = 1.0
    factor: Tensor | None = None


def activate(up: Tensor, activation: str) -> Tensor:
    """Apply exact GELU or ReLU."""
    return F.gelu(up) if activation == "gelu" else F.relu(up)


def activate_grad(grad: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return the gradient of what was activated from that of the result, of one shape."""
    result: Tensor
    if activation == "gelu":
        result = torch.ops.aten.gelu_backward(grad, up)
    else:
        result = torch.ops.aten.threshold_backward(grad, up, 0)
    return result


def mlp_hidden(terms: Sequence[Hidden], activation: str, *, bias: Tensor | None = None, num_samples: int) -> Tensor:
    """Sum scaled activations of the terms, (N, S, F) in their type; `bias` (F,) is added before the activation."""
    total = terms[0].up.new_zeros(num_samples, *terms[0].up.shape[1:])
    for term in terms:
        hidden = activate(term.up if bias is None else term.up + bias, activation)
        total = total + scaled(spread(hidden, term.slots), term.scale, term.factor)
    return total
