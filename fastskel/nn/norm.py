"""Layer normalisation without its affine part, and the affine part folded into the linear behind it.

With `l = xhat * g + b` and a linear `W`, `W l = (W diag(g)) xhat + W b`: exact, and what is kept for the weight's gradient,
`xhat`, is what the normalisation's gradient needs. The gradients of `g` and `b` then come from D^2 products of weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastskel.nn.precision import Precision

__all__ = ["fold", "normalise", "normalise_grad", "unfold"]


def normalise(rows: Tensor, eps: float, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """Standardise each row of (N, S, D); return it in `compute`, and 1 / deviation (N, S, 1)."""
    out, _, rstd = torch.native_layer_norm(rows, rows.shape[-1:], None, None, eps)
    return out.to(compute), rstd


def normalise_grad(grad: Tensor, xhat: Tensor, rstd: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the rows (N, S, D) from that of the standardised ones, computed in `dtype`."""
    grad, xhat = grad.to(dtype), xhat.to(dtype)
    zero, one = torch.zeros_like(rstd, dtype=dtype), torch.ones_like(rstd, dtype=dtype)
    # xhat is normalised already: mean 0, deviation 1
    out: Tensor = torch.ops.aten.native_layer_norm_backward(
        grad, xhat, xhat.shape[-1:], zero, one, None, None, [True, False, False]
    )[0]
    return out.mul_(rstd)


def fold(weight: Tensor, bias: Tensor, norm: Tensor, norm_bias: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """Fold a normalisation's weight and bias (D,) into the linear (O, D), (O,) behind it; rounded once, to the compute type."""
    wide = weight.to(precision.wide)
    folded_bias = torch.addmv(bias.to(precision.wide), wide, norm_bias.to(precision.wide))
    folded = torch.empty_like(weight, dtype=precision.compute, memory_format=torch.contiguous_format)
    # rounded on the way out: no copy in the wide type
    torch.mul(wide, norm.to(precision.wide), out=folded)
    return folded, folded_bias.to(precision.compute)


def unfold(
    grad: Tensor, grad_bias: Tensor, weight: Tensor, norm: Tensor, norm_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of normalisation weight and bias (D,), linear (O, D) and bias (O,) from those of the folded linear.

    Writes to `grad`.
    """
    wide = grad.dtype
    weight = weight.to(wide)
    d_norm = (grad * weight).sum(0)
    return d_norm, weight.mT @ grad_bias, grad.mul_(norm).addr_(grad_bias, norm_bias.to(wide)), grad_bias
