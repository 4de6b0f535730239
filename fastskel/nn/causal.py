r"""Temporal layers that see the past only: token t of the result is a function of tokens 0 .. t.

Attention is masked, and the dense shift mixes by the lower triangles of its two matrices:

    h = relu(tril(W1) x + b1),  shift(x)_t = x_t + (tril(W2) h + b2)_t, or x_t where gap divides t

Everything else in these layers, the convolution over single tokens included, looks at one token at a time. Plain torch,
differentiated by autograd: the fused layers know no masks. Weights are those of the ordinary layers, so a trained encoder can
be run this way, but was not trained for it: it wants fine-tuning.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastskel.nn.drop_path import (
    CA_ATTENTION,
    CA_MLP,
    PLAIN_ATTENTION,
    PLAIN_MLP,
    SHIFTED_ATTENTION,
    SHIFTED_MLP,
    LayerDrops,
)
from fastskel.nn.dst_layer import DenseShiftAttention, DSTLayer
from fastskel.nn.post_norm import PostNormLayer

__all__ = ["causal_attention", "causal_dst_layer", "causal_post_norm_layer", "causal_shift"]


def causal_attention(tokens: Tensor, attention: nn.MultiheadAttention) -> Tensor:
    """Attend from each token of (N, S, D) to itself and those before it; (N, S, D)."""
    n, s, d = tokens.shape
    heads = attention.num_heads
    qkv = F.linear(tokens, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = qkv.view(n, s, 3, heads, d // heads).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    out = attention.out_proj
    return F.linear(mixed.transpose(1, 2).flatten(2), out.weight, out.bias)


def causal_shift(tokens: Tensor, mixture: DenseShiftAttention, gap: int) -> Tensor:
    """Mix each token of (N, S, D) with those before it; every gap-th one passes unchanged."""
    s = tokens.shape[1]
    first, second = mixture.wt1, mixture.wt2
    hidden = torch.relu(torch.matmul(first.weight[:s, :s].tril(), tokens) + first.bias[:s, None])
    mixed = torch.matmul(second.weight[:s, :s].tril(), hidden) + second.bias[:s, None]
    live = torch.arange(s, device=tokens.device) % gap != 0
    return torch.where(live[:, None], tokens + mixed, tokens)


def _scaled(branch: Tensor, factor: float | Tensor) -> Tensor:
    return branch * (factor.to(branch.device, branch.dtype) if isinstance(factor, Tensor) else factor)


def causal_dst_layer(layer: DSTLayer, tokens: Tensor, drops: LayerDrops) -> Tensor:
    """Run a dense spatio-temporal layer over tokens (N, S, D) causally; what is dropped is masked, not skipped.

    Source: specification of USDRL, sections 1.6 to 1.8, and its remark that early prediction uses causal attention, of which no
    code was published.
    """
    ca, dsa, factors = layer.CA, layer.DSA, drops.factors
    assert all(rows is None for rows in drops.rows)
    conv = torch.relu(F.linear(tokens, ca.conv1.weight.flatten(1), ca.conv1.bias))
    u = tokens + _scaled(causal_attention(ca.norm1(tokens + conv), ca.attn), factors[CA_ATTENTION])
    y = layer.alpha * _scaled(ca.mlp(ca.norm2(u)), factors[CA_MLP])
    shifted = causal_shift(tokens, dsa, layer.gap)
    for base, attention, mlp in (
        (shifted, SHIFTED_ATTENTION, SHIFTED_MLP),
        (tokens, PLAIN_ATTENTION, PLAIN_MLP),
    ):
        r = base + _scaled(causal_attention(dsa.norm1(base), dsa.attn), factors[attention])
        y = y + 0.5 * (1.0 - layer.alpha) * (r + _scaled(dsa.mlp(dsa.norm2(r)), factors[mlp]))
    return y


def causal_post_norm_layer(layer: PostNormLayer, tokens: Tensor) -> Tensor:
    """Run a post-norm transformer layer over tokens (N, S, D) causally."""
    x = layer.norm1(tokens + causal_attention(tokens, layer.self_attn))
    out: Tensor = layer.norm2(x + layer.linear2(torch.relu(layer.linear1(x))))
    return out
