"""Dense spatio-temporal layer: convolutional attention beside dense shift attention, sharing one attention.

Source: specification of USDRL, sections 1.6 to 1.8. Child names are the reference's, because its checkpoints hold them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastskel.nn.mlp import MLP

__all__ = ["NUM_DROP_PATHS", "ConvAttention", "DSTLayer", "DenseShiftAttention"]

# residual branches of one layer, in the order their DropPath draws are numbered:
# CA attention, CA MLP, then attention and MLP of the shifted branch, then of the plain branch
NUM_DROP_PATHS = 6


def _self_attention(attn: nn.MultiheadAttention, tokens: Tensor) -> Tensor:
    out, _ = attn(tokens, tokens, tokens, need_weights=False)
    return out  # type: ignore[no-any-return]


def _dropped(branch: Tensor, scale: Tensor | None) -> Tensor:
    return branch if scale is None else branch * scale.to(branch.dtype)[:, None, None]


class ConvAttention(nn.Module):
    """CA: per-token convolution, attention and MLP over (N, S, D); its last residual is left out, as published."""

    def __init__(self, width: int, attn: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attn = attn
        self.conv1 = nn.Conv1d(width, width, 1)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 2 * width)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return the branch's output.

        Args:
            x: Tokens, (N, S, D).
            scale: DropPath factors of attention and MLP, (N, 2).
        Returns:
            Tokens, (N, S, D); zero where the MLP is dropped.
        """
        # a convolution over one token is a linear map: no transposes
        convolved = x + F.relu(F.linear(x, self.conv1.weight[:, :, 0], self.conv1.bias))
        attended = _self_attention(self.attn, self.norm1(convolved))
        u = _dropped(attended, None if scale is None else scale[:, 0]) + x
        return _dropped(self.mlp(self.norm2(u)), None if scale is None else scale[:, 1])


class DenseShiftAttention(nn.Module):
    """DSA: the mean of one transformer block over the tokens and over a learned mixture of them, (N, S, D)."""

    keep: Tensor

    def __init__(self, num_tokens: int, width: int, gap: int, attn: nn.MultiheadAttention) -> None:
        super().__init__()
        self.wt1 = nn.Linear(num_tokens, num_tokens)
        self.wt2 = nn.Linear(num_tokens, num_tokens)
        self.attn = attn
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 2 * width)
        # every gap-th token stays itself; the rows of wt2 behind them get zero gradients
        self.register_buffer("keep", (torch.arange(num_tokens) % gap == 0)[:, None], persistent=False)

    def shift(self, x: Tensor) -> Tensor:
        """Mix tokens (N, S, D) along S; fewer tokens than configured use the leading block of the weights."""
        n = x.shape[1]
        hidden = F.relu(torch.matmul(self.wt1.weight[:n, :n], x) + self.wt1.bias[:n, None])
        mixed = torch.matmul(self.wt2.weight[:n, :n], hidden) + self.wt2.bias[:n, None] + x
        return torch.where(self.keep[:n], x.to(mixed.dtype), mixed)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return the branch's output.

        Args:
            x: Tokens, (N, S, D).
            scale: DropPath factors, attention and MLP of the shifted, then of the plain branch, (N, 4).
        Returns:
            Tokens, (N, S, D).
        """
        shifted = self.shift(x)
        p = torch.cat([shifted, x.to(shifted.dtype)])
        s_attn = None if scale is None else torch.cat([scale[:, 0], scale[:, 2]])
        s_mlp = None if scale is None else torch.cat([scale[:, 1], scale[:, 3]])
        p = _dropped(_self_attention(self.attn, self.norm1(p)), s_attn) + p
        p = p + _dropped(self.mlp(self.norm2(p)), s_mlp)
        first, second = p.chunk(2)
        return 0.5 * (first + second)


class DSTLayer(nn.Module):
    """`alpha * CA(x) + (1 - alpha) * DSA(x)` over tokens (N, S, D)."""

    def __init__(self, num_tokens: int, width: int, num_heads: int, alpha: float, gap: int) -> None:
        super().__init__()
        attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.alpha = alpha
        self.CA = ConvAttention(width, attn)
        self.DSA = DenseShiftAttention(num_tokens, width, gap, attn)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Transform tokens.

        Args:
            x: Tokens, (N, S, D).
            scale: DropPath factors, (N, 6), or None outside of training.
        Returns:
            Tokens, (N, S, D).
        """
        ca_scale, dsa_scale = (None, None) if scale is None else (scale[:, :2], scale[:, 2:])
        return self.alpha * self.CA(x, ca_scale) + (1.0 - self.alpha) * self.DSA(x, dsa_scale)  # type: ignore[no-any-return]
