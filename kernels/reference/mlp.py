"""The MLP with its gradient, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from fastskel.kernels.reference.mlp_hidden import activate, activate_grad
from fastskel.kernels.reference.mlp_residual import Branch, mlp_residual, scaled
from torch import Tensor

__all__ = ["mlp", "mlp_backward", "mlp_forward"]


def mlp(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    *,
    activation: str = "gelu",
    residual: Tensor | None = None,
    scale: float = 1.0,
    factor: Tensor | None = None,
) -> Tensor:
    """Return `residual + scale * factor * (act(x up_weight' + up_bias) down_weight' + down_bias)` for x (N, S, D)."""
    return mlp_forward(x, up_weight, up_bias, down_weight, down_bias, residual, factor, activation, scale)[0]


def mlp_forward(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    residual: Tensor | None,
    factor: Tensor | None,
    activation: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As `mlp`; returns what is before the activation, (N, S, F), too."""
    with torch.autocast(x.device.type, enabled=False):
        up = F.linear(x, up_weight, up_bias)
        value = F.linear(activate(up, activation), down_weight, down_bias)
        # as the kernel writes it, whatever the residual's strides are
        return mlp_residual(residual, [Branch(value, None, scale, factor)]).contiguous(), up


def mlp_backward(
    grad: Tensor,
    x: Tensor,
    up: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    factor: Tensor | None,
    activation: str,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Differentiate `mlp` for the gradient (N, S, D) of its result.

    Returns:
        Gradients of x, up_weight, up_bias, down_weight, down_bias, in the type of x; empty where `needs` says so.
    """
    need_x, need_up, need_up_bias, need_down, need_down_bias = needs
    with torch.autocast(x.device.type, enabled=False):
        weighted = scaled(grad, scale, factor)
        d_value = weighted.to(x.dtype)
        flat = d_value.flatten(0, 1)
        d_up = activate_grad(torch.matmul(d_value, down_weight), up, activation)
        return (
            torch.matmul(d_up, up_weight) if need_x else x.new_empty(0),
            d_up.flatten(0, 1).mT @ x.flatten(0, 1) if need_up else x.new_empty(0),
            d_up.sum((0, 1)) if need_up_bias else x.new_empty(0),
            flat.mT @ activate(up, activation).flatten(0, 1) if need_down else x.new_empty(0),
            weighted.sum((0, 1)).to(x.dtype) if need_down_bias else x.new_empty(0),
        )
