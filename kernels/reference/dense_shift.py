"""Dense shift with the normalisation that follows, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["dense_shift", "dense_shift_backward"]


def _live(num_tokens: int, gap: int, device: torch.device) -> Tensor:
    return (torch.arange(num_tokens, device=device) % gap != 0)[:, None]


def _mix(x: Tensor, wt1: Tensor, b1: Tensor, wt2: Tensor, b2: Tensor, gap: int) -> tuple[Tensor, Tensor]:
    # what the mixture makes of tokens that pass unchanged, say NaN, reaches nothing
    live = _live(x.shape[1], gap, x.device)
    hidden = torch.relu(torch.matmul(wt1, x.to(wt1.dtype)) + b1[:, None])
    mixed = torch.matmul(wt2.where(live, 0), hidden) + b2[:, None]
    return torch.where(live, x + mixed.to(x.dtype), x), hidden


def dense_shift(
    x: Tensor, wt1: Tensor, b1: Tensor, wt2: Tensor, b2: Tensor, gap: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shift tokens x (N, S, D) by two mixtures (S, S) in the type of `wt1`, and normalise them.

    Returns:
        Shifted tokens (N, S, D) in the type of x; normalised (N, S, D) in that of `wt1`; means and reciprocal deviations (N, S).
    """
    shifted, _ = _mix(x, wt1, b1, wt2, b2, gap)
    wide = shifted.to(torch.promote_types(x.dtype, torch.float32))
    z = F.layer_norm(wide, wide.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps).to(wt1.dtype)
    variance, mean = torch.var_mean(wide, -1, correction=0)
    return shifted, z, mean, torch.rsqrt(variance + eps)


def dense_shift_backward(
    dz: Tensor, d_shifted: Tensor, xb: Tensor, wt1: Tensor, b1: Tensor, wt2: Tensor, b2: Tensor, gap: int, weight: Tensor,
    mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Differentiate for tokens xb (N, S, D) in the compute type; `d_shifted` (N, S, D) is in the residual type.

    Returns:
        Gradients of x (N, S, D) in the residual type, and of wt1, b1, wt2, b2, weight and bias, in float32 at least.
    """
    dtype, residual = wt1.dtype, d_shifted.dtype
    wide = torch.promote_types(residual, torch.float32)
    live = _live(xb.shape[1], gap, xb.device)
    shifted, hidden = _mix(xb.to(residual), wt1, b1, wt2, b2, gap)
    xhat = (shifted.to(wide) - mean[..., None]) * rstd[..., None]
    p = dz.to(wide) * weight.to(wide)
    normed = p - p.mean(-1, keepdim=True) - xhat * (p * xhat).mean(-1, keepdim=True)
    g = d_shifted.to(wide) + normed * rstd[..., None]
    gm = g.where(live, 0).to(dtype)
    dh = torch.matmul(wt2.where(live, 0).mT, gm)
    dh = dh.where(~(hidden <= 0), 0)
    dx = g + torch.matmul(wt1.mT, dh).to(wide)
    d_wt1, d_b1 = torch.bmm(dh, xb.mT).sum(0, dtype=wide), dh.sum((0, 2), dtype=wide)
    d_wt2, d_b2 = torch.bmm(gm, hidden.mT).sum(0, dtype=wide), gm.sum((0, 2), dtype=wide)
    d_weight, d_bias = (dz.to(wide) * xhat).sum((0, 1)), dz.to(wide).sum((0, 1))
    return dx.to(residual), d_wt1, d_b1, d_wt2, d_b2, d_weight, d_bias
