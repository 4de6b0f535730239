"""What a loader yields and an encoder reads: `Batch`, `View`, and where a model's random draws are addressed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastskel.skeleton import Topology

__all__ = ["Batch", "DrawAddress", "View", "concat_views"]


@dataclass(frozen=True)
class DrawAddress:
    """Philox address of a model's draws for the samples of one view.

    Attributes:
        seed: 64-bit key; or a tensor () of its bits, int64.
        step: Optimiser step, one counter word; or a tensor (), int64.
        index: Global sample index of each row, (N,), int64 on the host.
        view: View number of each row, (N,), int64 on the host.

    Tensors may lie on the device where what is dropped is masked: a captured graph repeats numbers and reads tensors again.
    """

    seed: int | Tensor
    step: int | Tensor
    index: Tensor
    view: Tensor


@dataclass(frozen=True)
class View:
    """One view of every sample of a batch.

    Attributes:
        clips: Stream values, (N, T, M, V, C).
        mask: Frames and bodies that are present, (N, T, M), bool.
        topology: Skeleton the V joints follow.
        address: Where the model's random draws for these rows come from; None outside of training.
    """

    clips: Tensor
    mask: Tensor
    topology: Topology
    address: DrawAddress | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> View:
        """Move clips and mask, (N, T, M, V, C) and (N, T, M); the address stays on the host."""
        return replace(
            self,
            clips=self.clips.to(device, non_blocking=non_blocking),
            mask=self.mask.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True)
class Batch:
    """Views of the same N samples, with what is known of each sample.

    Attributes:
        views: One entry per view; they may differ in topology and length.
        labels: Class of each sample, (N,), int64, -1 where unknown.
        index: Global sample index, (N,), int64.
        extras: Named columns, (N,) each, or (N, T) where they are per frame.
    """

    views: list[View]
    labels: Tensor
    index: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.index.shape[0])

    def stack(self) -> Tensor:
        """Stack the views' clips to (W, N, T, M, V, C).

        Raises:
            ValueError: If the views differ in shape.
        """
        shapes = [tuple(view.clips.shape) for view in self.views]
        if len(set(shapes)) != 1:
            raise ValueError(f"Batch.stack: views must agree in shape, got {shapes}. Use batch.views instead.")
        return torch.stack([view.clips for view in self.views])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Move clips, masks, labels and extras of the N samples; `index` stays on the host, where draws are addressed."""
        moved: dict[str, Any] = {k: v.to(device, non_blocking=non_blocking) for k, v in self.extras.items()}
        views = [view.to(device, non_blocking=non_blocking) for view in self.views]
        return replace(self, views=views, labels=self.labels.to(device, non_blocking=non_blocking), extras=moved)

    def at(self, seed: int | Tensor, step: int | Tensor) -> Batch:
        """Address the model's draws of all N samples and every view by (seed, step); numbers, or tensors ()."""
        views = [
            replace(view, address=DrawAddress(seed, step, self.index, torch.full_like(self.index, number)))
            for number, view in enumerate(self.views)
        ]
        return replace(self, views=views)


def concat_views(views: list[View]) -> View:
    """Join W views of N samples into one of W*N rows, so that an encoder without batch statistics runs once.

    Args:
        views: Views that agree in shape, (N, T, M, V, C) each, and topology.
    Returns:
        One view, (W*N, T, M, V, C), view by view, its draws still addressed as the parts' were.
    Raises:
        ValueError: If there is no view, or the views differ in shape, topology or seed and step.
    """
    kinds = {(tuple(view.clips.shape), view.topology.name) for view in views}
    if len(kinds) != 1:
        raise ValueError(
            f"concat_views: views must agree in shape and topology, got {sorted(kinds)}. Encode them singly."
        )
    parts = [view.address for view in views if view.address is not None]
    keys = {(part.seed, part.step) for part in parts}
    if len(parts) not in (0, len(views)) or len(keys) > 1:
        raise ValueError(
            f"concat_views: views must share seed and step, got {sorted(keys)} for {len(parts)} of {len(views)} views. "
            "Use Batch.at once per step."
        )
    address = None
    if parts:
        index, number = torch.cat([part.index for part in parts]), torch.cat([part.view for part in parts])
        address = DrawAddress(parts[0].seed, parts[0].step, index, number)
    clips, mask = torch.cat([view.clips for view in views]), torch.cat([view.mask for view in views])
    return View(clips, mask, views[0].topology, address)
