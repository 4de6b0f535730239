"""Skeleton embedding and positional encoding of the USDRL backbones."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PositionalEncoding", "SkeletonEmbedding"]


class SkeletonEmbedding(nn.Module):
    """Embed the two token sets, (N, T, M*V*C) and (N, M*V, T*C), to width D by two separate small networks.

    Source: specification of USDRL, `Skeleton_Emb`: Linear, LayerNorm, ReLU, Linear for each set.
    """

    def __init__(self, temporal_features: int, spatial_features: int, width: int) -> None:
        super().__init__()
        self.t_embedding = self._branch(temporal_features, width)
        self.s_embedding = self._branch(spatial_features, width)

    @staticmethod
    def _branch(features: int, width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(features, width), nn.LayerNorm(width), nn.ReLU(inplace=True), nn.Linear(width, width)
        )

    def forward(self, temporal: Tensor, spatial: Tensor) -> tuple[Tensor, Tensor]:
        """Embed tokens.

        Args:
            temporal: One token per frame, (N, T, M*V*C).
            spatial: One token per joint and body, (N, M*V, T*C); fewer frames than configured use the leading weights.
        Returns:
            Embedded tokens, (N, T, D) and (N, M*V, D).
        """
        first = self.s_embedding[0]
        assert isinstance(first, nn.Linear)
        # frames run slowest in a spatial token, so a shorter clip is the leading slice of the weight: absent frames are 0
        hidden = F.linear(spatial, first.weight[:, : spatial.shape[-1]], first.bias)
        return self.t_embedding(temporal), self.s_embedding[1:](hidden)


class PositionalEncoding(nn.Module):
    """Add fixed sine and cosine positions to tokens (N, S, D), S up to `length`."""

    pe: Tensor

    def __init__(self, width: int, length: int = 200) -> None:
        super().__init__()
        position = torch.arange(length, dtype=torch.float32)[:, None]
        rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(1e4) / width))
        table = torch.zeros(1, length, width)
        table[0, :, 0::2] = torch.sin(position * rate)
        table[0, :, 1::2] = torch.cos(position * rate)[:, : width // 2]
        # persistent, because the reference's checkpoints hold it
        self.register_buffer("pe", table)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens (N, S, D) with the first S positions added."""
        return tokens + self.pe[:, : tokens.shape[1]]
