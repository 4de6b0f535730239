"""Attention over short token sets with explicit scores, in float32 at least; forward differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention_forward", "read", "scores"]


def read(tensor: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Widen tokens (N, H, S, C); absent ones, by a mask (N, S), count as zeros whatever they hold."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return wide if key_mask is None else torch.where(key_mask[:, None, :, None], wide, 0.0)


def scores(q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Return scaled scores (N, H, S, S), -inf where a key is absent, and where they count, (N, 1, 1, S)."""
    present = q.new_ones((q.shape[0], q.shape[2]), dtype=torch.bool) if key_mask is None else key_mask
    counted = present[:, None, None, :]
    return torch.where(counted, (read(q) @ read(k, key_mask).mT) * scale, float("-inf")), counted


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor | None, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        q: Queries, (N, H, S, C).
        k: Keys, (N, H, S, C).
        v: Values, (N, H, S, C); None: the keys.
        key_mask: True where a key is present, (N, S); None: everywhere.
        scale: Factor of the scores.
    Returns:
        Mixed values (N, H, S, C) in the type of `q`, zeros without any key; logarithm of the sum of exponentials of scores
        (N, H, S), -inf without any key.
    """
    s, counted = scores(q, k, key_mask, scale)
    lse = s.logsumexp(-1)
    p = torch.where(counted, (s - lse[..., None]).exp(), 0.0)
    return (p @ read(k if v is None else v, key_mask)).to(q.dtype), lse
