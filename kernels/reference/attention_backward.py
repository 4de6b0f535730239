"""Backward pass of attention over short token sets with explicit scores, in float32 at least."""

from __future__ import annotations

import torch
from fastskel.kernels.reference.attention import read, scores
from torch import Tensor

__all__ = ["attention_backward"]


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    lse: Tensor,
    key_mask: Tensor | None,
    scale: float,
    *,
    want_out: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Differentiate `attention.attention_forward`.

    Args:
        grad: Gradient of the mixed values, (N, H, S, C).
        q: Queries, (N, H, S, C).
        k: Keys, (N, H, S, C).
        v: Values, (N, H, S, C); None: the keys.
        lse: What the forward pass returned, (N, H, S).
        key_mask: True where a key is present, (N, S); None: everywhere.
        scale: Factor of the scores.
        want_out: Whether the mixed values are made again.
    Returns:
        Gradients of queries, keys and values (None where they are the keys, which then have the sum), and the mixed values or
        None, each (N, H, S, C) in the type of `q`.
    """
    s, counted = scores(q, k, key_mask, scale)
    p = torch.where(counted, (s - lse[..., None]).exp(), 0.0)
    values, wide = read(k if v is None else v, key_mask), read(grad)
    dp = wide @ values.mT
    ds = torch.where(counted, p * (dp - (p * dp).sum(-1, keepdim=True)) * scale, 0.0)
    dq, dk, dv = ds @ read(k, key_mask), ds.mT @ read(q), p.mT @ wide
    out = (p @ values).to(q.dtype) if want_out else None
    if v is None:
        return dq.to(q.dtype), (dk + dv).to(q.dtype), None, out
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), out
