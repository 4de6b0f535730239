"""What the USDRL backbones share: tokens, embedding, positions, pooling."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from fastskel.data.batch import View
from fastskel.models.encoder import Encoder, Features
from fastskel.nn.embed import PositionalEncoding, SkeletonEmbedding

__all__ = ["USDRLBackbone", "tokens"]

# frames that the fixed sine table covers; the reference's checkpoints hold all of it
MAX_POSITIONS = 200


def tokens(clips: Tensor) -> tuple[Tensor, Tensor]:
    """Lay clips (N, T, M, V, C) out as temporal tokens (N, T, M*V*C) and spatial tokens (N, M*V, T*C)."""
    n, t, m, v, c = clips.shape
    return clips.reshape(n, t, m * v * c), clips.permute(0, 2, 3, 1, 4).reshape(n, m * v, t * c)


class USDRLBackbone(Encoder):
    """Two streams over temporal and spatial tokens; subclasses say what a stream is made of.

    Args:
        num_joints: Joints V.
        num_bodies: Bodies M.
        num_frames: Longest clip in frames; shorter clips use the leading weights, as if absent frames were zero.
        num_channels: Channels C.
        width: Width D of both streams.
    Raises:
        ValueError: On sizes below 1, or more frames than the positional table has.
    """

    def __init__(self, num_joints: int, num_bodies: int, num_frames: int, num_channels: int, width: int) -> None:
        super().__init__()
        sizes = dict(num_joints=num_joints, num_bodies=num_bodies, num_channels=num_channels, width=width)
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 1, got {size}. Give a positive size.")
        if not 1 <= num_frames <= MAX_POSITIONS:
            raise ValueError(
                f"{type(self).__name__}: num_frames must be in 1..{MAX_POSITIONS}, got {num_frames}. Resize the clips."
            )
        self.shape = (num_frames, num_bodies, num_joints, num_channels)
        self.num_features = 2 * width
        self.num_token_features = width
        num_spatial = num_bodies * num_joints
        self.spe = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_spatial, width), std=0.02))
        self.ske_emb = SkeletonEmbedding(num_spatial * num_channels, num_frames * num_channels, width)
        self.tpe = PositionalEncoding(width, MAX_POSITIONS)

    def streams(self, temporal: Tensor, spatial: Tensor, view: View | None = None) -> tuple[Tensor, Tensor]:
        """Encode raw tokens.

        Args:
            temporal: (N, T, M*V*C).
            spatial: (N, M*V, T*C).
            view: Where random draws are addressed; None draws a fresh key from torch's generator.
        Returns:
            Temporal and spatial features, (N, T, D) and (N, M*V, D).
        Raises:
            ValueError: If the two token sets do not fit the encoder and each other.
        """
        frames, bodies, joints, channels = self.shape
        n, t = temporal.shape[:2]
        expected = ((n, t, bodies * joints * channels), (n, bodies * joints, t * channels))
        if (temporal.shape, spatial.shape) != expected or not 1 <= t <= frames:
            raise ValueError(
                f"{type(self).__name__}: tokens must be (N, T, {expected[0][2]}) and (N, {expected[1][1]}, T*{channels}) "
                f"with T in 1..{frames}, got {tuple(temporal.shape)} and {tuple(spatial.shape)}. Cut both from the same clips."
            )
        temporal, spatial = self.ske_emb(temporal, spatial)
        return self.transform(temporal, spatial, view)

    @abc.abstractmethod
    def transform(self, temporal: Tensor, spatial: Tensor, view: View | None) -> tuple[Tensor, Tensor]:
        """Transform embedded tokens (N, T, D) and (N, M*V, D) to features of the same shapes."""

    def check(self, clips: Tensor) -> None:
        """Refuse clips that are not (N, T, M, V, C) of the configured sizes.

        Raises:
            ValueError: Naming the configured and the actual shape.
        """
        frames, *rest = self.shape
        if clips.dim() != 5 or list(clips.shape[2:]) != rest or not 1 <= clips.shape[1] <= frames:
            raise ValueError(
                f"{type(self).__name__}: clips must be (N, 1..{frames}, {', '.join(map(str, rest))}), "
                f"got {tuple(clips.shape)}. Build the encoder for this topology, bodies and length."
            )

    def forward(self, view: View, *, token_mask: Tensor | None = None, mode: str | None = None) -> Features:
        """Encode one view of clips (N, T, M, V, C); `token_mask` and `mode` are refused.

        Returns:
            `pooled` (N, 2*D): maxima over temporal, then spatial tokens; `temporal` (N, T, D); `spatial` (N, M*V, D).
        """
        if token_mask is not None or mode is not None:
            raise ValueError(
                f"{type(self).__name__}: token_mask and mode must be None, got {type(token_mask).__name__} and {mode!r}. "
                "This encoder neither masks tokens nor has variants."
            )
        self.check(view.clips)
        temporal, spatial = self.streams(*tokens(view.clips), view)
        # amax splits the gradient evenly among ties, as the reference's does
        return Features(torch.cat([temporal.amax(1), spatial.amax(1)], -1), temporal=temporal, spatial=spatial)
