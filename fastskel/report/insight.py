"""What the encoder looks at: features are computed again with a joint, or a stretch of frames, taken away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fastskel.data.batch import View
from fastskel.data.packed import PackedDataset
from fastskel.data.views import ViewSpec, make_view
from fastskel.evaluate.inference import extract
from fastskel.models.encoder import Encoder

__all__ = ["Occlusion", "evenly", "occlusion"]

STRETCHES = 8


@dataclass(frozen=True)
class Occlusion:
    """How much the features of clips change when a part of the clips is taken away: 1 - cosine, mean over clips.

    Attributes:
        joints: For each joint, (V,); NaN for one that no clip has.
        stretches: For each stretch of frames, (B,).
        bounds: First frames of the stretches and the end of the last, (B + 1,), in frames of the view.
        clips: Clips that were looked at, (N,).
    """

    joints: NDArray[np.float64]
    stretches: NDArray[np.float64]
    bounds: Sequence[int]
    clips: NDArray[np.int64]


def evenly(clips: NDArray[np.int64], labels: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Choose up to `count` of some clips, (N,), spread evenly over their classes, (N,), always the same ones."""
    order = clips[np.argsort(labels, kind="stable")]
    return np.sort(order[np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))])


def _change(whole: Tensor, part: Tensor, counted: Tensor) -> float:
    change = (1 - cosine_similarity(whole.double(), part.double(), dim=1))[counted]
    return float(change.mean()) if len(change) else float("nan")


def occlusion(
    encoder: Encoder, dataset: PackedDataset, view: ViewSpec, clips: NDArray[np.int64], *, device: str = "auto",
    progress: bool = True,
) -> Occlusion:  # fmt: skip
    """Measure what an encoder's features of some clips rest on.

    A joint that is taken away is zero in all frames, a frame that is taken away in all joints, as a sensor's gaps are in
    packed data. A clip that lacks a joint says nothing of it.

    Args:
        encoder: Any encoder.
        dataset: Packed clips (T, M, V, C).
        view: View to encode.
        clips: Clips to look at, (N,).
        device: Where the encoder runs.
        progress: Show a bar.
    Raises:
        ValueError: If the view cannot be made of the data, or a feature is not finite.
    """
    from tqdm import tqdm

    prepared = encoder.optimize_for_inference()
    whole = make_view(dataset, view, clips, seed=0, epoch=0, view=0)
    features = extract(prepared, whole, device=device, progress=False)
    frames, joints = whole.clips.shape[1], whole.clips.shape[3]
    bounds = np.linspace(0, frames, min(STRETCHES, frames) + 1).round().astype(int).tolist()
    bar = tqdm(total=joints + len(bounds) - 1, desc="occlusion", unit="part", disable=not progress, leave=False)

    def without(hide: slice | int, frame_wise: bool) -> float:
        bar.update()
        clipped, mask = whole.clips.clone(), whole.mask.clone()
        if frame_wise:
            clipped[:, hide], mask[:, hide] = 0, False
        else:
            clipped[:, :, :, hide] = 0
        counted = (clipped != whole.clips).flatten(1).any(1)
        hidden: View = replace(whole, clips=clipped, mask=mask)
        return _change(features, extract(prepared, hidden, device=device, progress=False), counted)

    with bar:
        by_joint = [without(joint, False) for joint in range(joints)]
        by_stretch = [without(slice(a, b), True) for a, b in pairwise(bounds)]
    return Occlusion(np.array(by_joint), np.array(by_stretch), bounds, torch.as_tensor(clips).numpy())
