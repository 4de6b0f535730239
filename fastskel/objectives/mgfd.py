"""The USDRL objective: three projectors and multi-grained feature decorrelation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fastskel.data.batch import Batch, View, concat_views
from fastskel.data.views import ViewSpec
from fastskel.models.encoder import Encoder, Features
from fastskel.nn.grouped_norm import grouped_projector, uses_batch_statistics
from fastskel.nn.init import Init, initialise
from fastskel.nn.pool import token_max
from fastskel.objectives.across import mgfd_across
from fastskel.objectives.functional import mgfd_loss
from fastskel.objectives.objective import OBJECTIVES, Objective, Terms

if TYPE_CHECKING:
    # builds of torch without it train in one process
    from torch.distributed import ProcessGroup

__all__ = ["MGFD", "projector"]

# weight of the cross-correlation term in the two published versions of the code
XCORR_WEIGHTS = {"aaai": 1e-3, "journal": 0.0}


def projector(width_in: int, width: int, width_out: int) -> nn.Sequential:
    """Build a three-layer projector with BatchNorm, (N, width_in) to (N, width_out)."""
    return nn.Sequential(
        nn.Linear(width_in, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True),
        nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True),
        nn.Linear(width, width_out),
    )  # fmt: skip


class MGFD(Objective):
    """Multi-grained feature decorrelation over views of the same clip.

    Args:
        encoder: Encoder with temporal (N, T, D) and spatial (N, S, D) features.
        views: One specification per view, at least two; the last view is the anchor.
        weighting: `"aaai"` weighs cross-correlation by 1e-3, `"journal"` leaves it out.
        init: `"usdrl"` or `"torch"`, as the encoders'.
    Raises:
        ValueError: On fewer than two views, or an unknown weighting.
    Source: specification of USDRL, sections 1.11 and 2.
    """

    def __init__(
        self,
        encoder: Encoder,
        views: tuple[ViewSpec, ...],
        *,
        weighting: Literal["aaai", "journal"] = "aaai",
        init: Init = "usdrl",
    ) -> None:
        super().__init__()
        if len(views) < 2:
            raise ValueError(
                f"MGFD: views must be at least 2, got {len(views)}. Consistency needs two views of a clip."
            )
        if weighting not in XCORR_WEIGHTS:
            raise ValueError(f"MGFD: weighting must be one of {sorted(XCORR_WEIGHTS)}, got {weighting!r}. Choose one.")
        self.views = tuple(views)
        self.xcorr_weight = XCORR_WEIGHTS[weighting]
        d = encoder.num_token_features
        self.i_proj = projector(2 * d, 2 * d, 4 * d)
        self.s_proj = projector(d, 2 * d, 2 * d)
        self.t_proj = projector(d, 2 * d, 2 * d)
        self.group: ProcessGroup | None = None
        self.synchronised_norms = False
        initialise(self, init)

    def share(self, group: ProcessGroup | None, *, synchronise_norms: bool = False) -> None:
        """Take the loss over the batches (W, N, ...) of all processes of a group, under DistributedDataParallel.

        Args:
            group: Processes, e.g. `torch.distributed.group.WORLD`; None takes this process's batch alone.
            synchronise_norms: Whether the projectors' BatchNorm sees the batches of all processes too; the reference's sees
                those of one device.
        """
        self.group, self.synchronised_norms = group, synchronise_norms

    def __deepcopy__(self, memo: dict[int, Any]) -> MGFD:
        # processes cannot be copied: a copy shares its loss with the same ones
        memo[id(self.group)] = self.group
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def project(self, y_t: Tensor, y_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project the views' pooled streams, (W, N, D) each, to z_t and z_s (W, N, 2D) and z_i (W, N, 4D).

        BatchNorm sees one view at a time, in order, as separate forward passes would.
        """
        group = self.group if self.synchronised_norms else None
        return (
            grouped_projector(self.t_proj, y_t, group),
            grouped_projector(self.s_proj, y_s, group),
            grouped_projector(self.i_proj, torch.cat([y_t, y_s], -1), group),
        )

    def encode(self, encoder: Encoder, view: View, numbers: Sequence[int]) -> Features:
        """Encode views of these numbers, joined to one of clips (n*N, T, M, V, C)."""
        return encoder(view)  # type: ignore[no-any-return]

    def embed(self, encoder: Encoder, batch: Batch) -> dict[str, Tensor]:
        """Embed all views.

        Returns:
            `z_t` and `z_s` (W, N, 2D), `z_i` (W, N, 4D). Views of one shape share a pass of the encoder, and all share
            one of each projector.
        """
        if self.training and len(batch) < 2 and not self.synchronised_norms:
            raise ValueError(
                "MGFD.embed: batch must have at least 2 samples in training, got 1. Statistics need two of them."
            )
        shapes = {(view.clips.shape[1:], view.topology.name) for view in batch.views}
        together = len(shapes) == 1 and not uses_batch_statistics(encoder)
        count = len(batch.views)
        groups = [range(count)] if together else [range(number, number + 1) for number in range(count)]
        pooled: list[tuple[Tensor, Tensor]] = []
        for numbers in groups:
            group = [batch.views[number] for number in numbers]
            features = self.encode(encoder, concat_views(group), numbers)
            streams = (features.need("temporal", "MGFD"), features.temporal_pooled), (
                features.need("spatial", "MGFD"), features.spatial_pooled,
            )  # fmt: skip
            maxima = (token_max(tokens) if ready is None else ready for tokens, ready in streams)
            y_t, y_s = (y.view(len(group), len(group[0].clips), y.shape[-1]) for y in maxima)
            pooled.append((y_t, y_s))
        z_t, z_s, z_i = self.project(*(torch.cat(parts) for parts in zip(*pooled, strict=True)))
        return {"z_t": z_t, "z_s": z_s, "z_i": z_i}

    def loss(self, embeddings: dict[str, Tensor], batch: Batch, progress: float) -> Terms:
        """Return the MG-FD loss of embeddings with leading (W, N) and its named terms, () each."""
        stacks = embeddings["z_t"], embeddings["z_s"], embeddings["z_i"]
        if self.group is not None:
            return Terms(*mgfd_across(*stacks, self.group, xcorr_weight=self.xcorr_weight))
        return Terms(*mgfd_loss(*stacks, xcorr_weight=self.xcorr_weight))


OBJECTIVES.add("mgfd", MGFD)
