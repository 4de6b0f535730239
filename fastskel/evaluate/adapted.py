"""An encoder made to read clips of another number of bodies, or of other coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastskel.data.batch import DrawAddress, View
from fastskel.models.encoder import Encoder, Features
from fastskel.nn.precision import without_autocast

__all__ = ["AdaptedEncoder", "adapted_encoder"]


class AdaptedEncoder(Encoder):
    """An encoder of M bodies in front of clips with another number of them.

    Clips with fewer bodies are filled up with absent ones, zeros, as data sets hold them. If there are more, an encoder of one
    body reads each by itself, and the features are their mean and their maximum over the bodies that are present in the clip,
    (N, 2F): the mean knows all of them, the maximum who does most, and neither the order in which a sensor numbered them. A clip
    of one present body has the same features twice. Features by frame and by joint are made so too, each frame by itself.

    Args:
        encoder: The encoder.
        num_bodies: Bodies M of the clips.
        matrix: What each coordinate that the encoder reads is made of, (C', C) rows of factors: a plane, a turned or a scaled
            space. Absent joints stay zero. None reads coordinates as they are.
    Raises:
        ValueError: If the encoder does not say what clips it takes, or reads several bodies but fewer than there are.
    """

    def __init__(
        self, encoder: Encoder, num_bodies: int, matrix: Sequence[Sequence[float]] | None = None
    ) -> None:
        super().__init__()
        if encoder.shape is None:
            raise ValueError(f"AdaptedEncoder: encoder must say its shape, got {type(encoder).__name__} without one. Set it.")
        frames, bodies, joints, width = encoder.shape
        if num_bodies > bodies > 1:
            raise ValueError(
                f"AdaptedEncoder: encoder must read 1 body or at least {num_bodies}, got one of {bodies}. Choose another encoder."
            )
        rows = None if matrix is None else tuple(tuple(float(factor) for factor in row) for row in matrix)
        if rows is not None and (len(rows) != width or len({len(row) for row in rows}) != 1 or not rows[0]):
            raise ValueError(
                f"AdaptedEncoder: matrix must be ({width}, C) for an encoder of {width} channels, got {rows}. Give a row each."
            )
        self.encoder, self.num_bodies = encoder, num_bodies
        self.matrix = rows
        self.folds = num_bodies > bodies
        self.num_features = encoder.num_features * (2 if self.folds else 1)
        self.num_token_features = encoder.num_token_features * (2 if self.folds else 1)
        self.shape = (frames, num_bodies, joints, width if rows is None else len(rows[0]))
        # of the adaptation alone: what is adapted is described by itself
        self.config = {"num_bodies": num_bodies, "matrix": rows}

    def depth_groups(self) -> list[list[nn.Parameter]]:
        """List the parameters of the encoder of (N, T, M, V, C) by depth."""
        return self.encoder.depth_groups()

    def _filled(self, view: View) -> View:
        assert self.encoder.shape is not None
        absent = self.encoder.shape[1] - view.clips.shape[2]
        return replace(view, clips=F.pad(view.clips, (0, 0, 0, 0, 0, absent)), mask=F.pad(view.mask, (0, absent)))

    def _folded(self, view: View) -> View:
        """Bodies as rows of their own, (N*M, T, 1, V, C), each with draws of its own."""
        m = self.num_bodies
        address = view.address
        if address is not None:
            body = torch.arange(m).repeat(len(address.index))
            address = DrawAddress(
                address.seed, address.step, address.index.repeat_interleave(m), address.view.repeat_interleave(m) * m + body
            )
        clips, mask = view.clips.transpose(1, 2).flatten(0, 1)[:, :, None], view.mask.transpose(1, 2).flatten(0, 1)[:, :, None]
        return View(clips, mask, view.topology, address)

    def forward(self, view: View, *, token_mask: Tensor | None = None, mode: str | None = None) -> Features:
        """Encode one view of clips (N, T, M, V, C).

        Args:
            view: The clips.
            token_mask: For the encoder; refused where bodies are read one by one.
            mode: For the encoder; refused where bodies are read one by one.
        Returns:
            The encoder's features, `pooled` (N, F); or where bodies are read one by one `pooled` (N, 2F), and `temporal`
            (N, T', 2D) and `spatial` (N, S, 2D) where the encoder has them.
        Raises:
            ValueError: On clips of another number of bodies, or what the encoder refuses.
        """
        assert self.shape is not None
        if view.clips.dim() != 5 or (view.clips.shape[2], view.clips.shape[4]) != (self.num_bodies, self.shape[3]):
            raise ValueError(
                f"AdaptedEncoder: clips must be (N, T, {self.num_bodies}, V, {self.shape[3]}), got {tuple(view.clips.shape)}. "
                "Adapt the encoder to them."
            )
        if self.matrix is not None:
            # coordinates are not to be rounded before the encoder rounds them
            with without_autocast(view.clips.device):
                view = replace(view, clips=view.clips @ view.clips.new_tensor(self.matrix).mT)
        if not self.folds:
            features: Features = self.encoder(self._filled(view), token_mask=token_mask, mode=mode)
            return features
        if token_mask is not None or mode is not None:
            raise ValueError(
                f"AdaptedEncoder: token_mask and mode must be None where bodies are read one by one, got {mode!r}. Leave out."
            )
        apart: Features = self.encoder(self._folded(view))
        present = view.mask.any(1)
        # a clip without anybody counts as its first body
        present = present | (~present.any(1, keepdim=True) & (torch.arange(self.num_bodies, device=present.device) == 0))
        temporal, spatial = (None if rows is None else _over_bodies(rows, present) for rows in (apart.temporal, apart.spatial))
        return Features(_over_bodies(apart.pooled, present), temporal=temporal, spatial=spatial)


def _over_bodies(rows: Tensor, present: Tensor) -> Tensor:
    """Mean and maximum of features (N*M, .., D) over the bodies that are present, (N, M): (N, .., 2D)."""
    rows = rows.view(*present.shape, *rows.shape[1:])
    there = present.view(*present.shape, *[1] * (rows.dim() - 2))
    mean = torch.where(there, rows, 0).sum(1) / there.sum(1)
    return torch.cat([mean, torch.where(there, rows, -torch.inf).amax(1)], -1)


def adapted_encoder(encoder: Encoder, num_bodies: int, matrix: Sequence[Sequence[float]] | None = None) -> AdaptedEncoder:
    """Adapt an encoder of views (N, T, M, V, C); one that was adapted before gets one adaptation that does both.

    Args:
        encoder: The encoder.
        num_bodies: Bodies M of the clips.
        matrix: What each coordinate that the encoder, as it is, reads is made of, (C', C); None: nothing is changed.
    Raises:
        ValueError: As `AdaptedEncoder`.
    """
    if not isinstance(encoder, AdaptedEncoder):
        return AdaptedEncoder(encoder, num_bodies, matrix)
    both = encoder.matrix if matrix is None else matrix
    if encoder.matrix is not None and matrix is not None:
        both = (np.array(encoder.matrix) @ np.array(matrix)).tolist()
    return AdaptedEncoder(encoder.encoder, num_bodies, both)
