"""Features of each view brought to mean zero and variance one over the batch, and the gradient, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["standardize", "standardize_backward", "standardize_forward", "statistics"]


def _wide(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def statistics(z: Tensor, eps: float, correction: int) -> Tensor:
    """Return mean, centred second moment (a sum) and reciprocal deviation over N of z (W, N, D): (3, W, D)."""
    z = _wide(z)
    mean = z.mean(1)
    moment = (z - mean[:, None]).square().sum(1)
    return torch.stack([mean, moment, 1 / torch.sqrt(moment / (z.shape[1] - correction) + eps)])


def standardize(z: Tensor, eps: float = 0.0, correction: int = 1) -> Tensor:
    """Return (z - mean) / sqrt(moment / (N - correction) + eps) for z (W, N, D), in the type of z."""
    return standardize_forward(z, eps, correction)[0]


def standardize_forward(z: Tensor, eps: float, correction: int) -> tuple[Tensor, Tensor]:
    """Return what `standardize` does, contiguous as a kernel's result, and the statistics (3, W, D) that its gradient needs."""
    stats = statistics(z, eps, correction)
    mean, _, rstd = stats[:, :, None]
    return ((_wide(z) - mean) * rstd).to(z.dtype).contiguous(), stats


def standardize_backward(grad: Tensor, z: Tensor, stats: Tensor, correction: int) -> Tensor:
    """Return the gradient (W, N, D) of z, contiguous in its type, from that of the standardised features."""
    mean, _, rstd = stats[:, :, None]
    g, u = _wide(grad), (_wide(z) - mean) * rstd
    projection = (g * u).sum(1, keepdim=True) / (z.shape[1] - correction)
    return (rstd * (g - g.mean(1, keepdim=True) - u * projection)).to(z.dtype).contiguous()
