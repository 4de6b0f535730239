r"""Views: how a clip becomes what an encoder sees.

A view is made in a fixed order: normalise the clip, crop it in time, resize the crop to T frames, apply the
transforms, derive the stream. The mask says which frames and bodies of the resized crop are present, before the
transforms. A view is a pure function of (clip, spec, seed, sample index, epoch, view number): equal in any
batch, thread, rank or restart.

Draws. Every draw is a Philox word (`fastskel.philox`) with key = seed and counter = (global sample index, epoch, view
| use << 16, word / 4):

    CROP word 0, 1    RandomCrop: scale and start
    SPATIAL, JOINTS   the transforms, 64 words each: `fastskel.data.transforms`, `fastskel.data.distort`
    NOISE, FRAMES     noise and masks of frames, 2^24 and 2^16 words for each transform: `fastskel.data.distort`

A random crop of a clip of n frames is integer arithmetic, / rounding down:

    low_q, high_q = round(low 2^24), round(high 2^24)
    scale_q = low_q + (high_q - low_q) (word0 / 2^8) / 2^24
    length  = min(max(n scale_q / 2^24, min_frames), n)
    start   = below(word1, n - length + 1)

and a centre crop has start = n (2^24 - round(ratio 2^24)) / 2^25 and length = n - 2 start.

Source: temporal_cropresize and crop_subsequence of USDRL.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastskel.data.batch import View
from fastskel.data.normalise import NORMALISATIONS
from fastskel.data.normalise import normalise as normalise_clip
from fastskel.data.packed import PackedDataset
from fastskel.data.resize import crop_resize
from fastskel.data.transforms import (
    ClipAddress,
    ClipTransform,
    JointCorruption,
    OneOf,
    Shear,
    SpatialTransform,
    Transform,
    apply_transforms,
)
from fastskel.philox import Use, below, words
from fastskel.skeleton import STREAMS, stream

__all__ = [
    "CenterCrop",
    "RandomCrop",
    "ViewSpec",
    "crop_bounds",
    "crop_shares",
    "eval_view",
    "make_view",
    "usdrl_views",
]

# shares of a clip are integers in units of 2^-24: exact in float64 and float32, and what a Philox word resolves
ONE = 1 << 24
# so that words of use NOISE, 2^24 for each transform, have numbers of 32 bits
MAX_TRANSFORMS = 256


def _real(value: object) -> bool:
    return isinstance(value, (int, float, np.floating))


@dataclass(frozen=True)
class RandomCrop:
    """A random part of the clip, from `low` to `high` of its n frames, at least min(n, `min_frames`)."""

    low: float = 0.1
    high: float = 1.0
    min_frames: int = 64

    def __post_init__(self) -> None:
        if not (_real(self.low) and _real(self.high) and 0 <= self.low <= self.high <= 1):
            shares = f"{self.low!r}, {self.high!r}"
            raise ValueError(f"RandomCrop: low and high must be 0 <= low <= high <= 1, got {shares}. Give shares.")
        if not isinstance(self.min_frames, (int, np.integer)):
            raise ValueError(f"RandomCrop: min_frames must be a whole number, got {self.min_frames!r}. Give a number.")
        if self.min_frames < 1:
            raise ValueError(f"RandomCrop: min_frames must be at least 1, got {self.min_frames}. Give a number.")


@dataclass(frozen=True)
class CenterCrop:
    """The middle part of the clip, `ratio` of its frames; 1.0 is the whole clip."""

    ratio: float = 1.0

    def __post_init__(self) -> None:
        if not (_real(self.ratio) and 1 / ONE <= self.ratio <= 1):
            raise ValueError(f"CenterCrop: ratio must be in (0, 1], got {self.ratio!r}. Give the share to keep.")


@dataclass(frozen=True)
class ViewSpec:
    """The pipeline of one view.

    Attributes:
        stream: joint, bone or motion; motion is that of the resized clip.
        bone_variant: Named bone list of the topology; None for its default.
        frames: T of the view.
        crop: Part of the clip in time.
        transforms: Applied in their order, at most 256; their draws depend on their numbers in it.
        normalise: A name in `fastskel.data.normalise.NORMALISATIONS`, done before everything else.
        topology: Name of the skeleton the view expects; None takes the data set's.
    """

    stream: str = "joint"
    bone_variant: str | None = None
    frames: int = 64
    crop: RandomCrop | CenterCrop = CenterCrop()
    transforms: tuple[Transform, ...] = ()
    normalise: str = "none"
    topology: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.frames, (int, np.integer)):
            raise ValueError(
                f"ViewSpec: frames must be a whole number, got {self.frames!r}. Give the length of the view."
            )
        if self.frames < 1:
            raise ValueError(f"ViewSpec: frames must be at least 1, got {self.frames}. Give the length of the view.")
        if not isinstance(self.crop, (RandomCrop, CenterCrop)):
            raise ValueError(f"ViewSpec: crop must be a RandomCrop or a CenterCrop, got {self.crop!r}. Give one.")
        if self.stream not in STREAMS:
            raise ValueError(f"ViewSpec: stream must be one of {', '.join(STREAMS)}, got {self.stream!r}. Choose one.")
        if self.normalise not in NORMALISATIONS:
            raise ValueError(
                f"ViewSpec: normalise must be one of {', '.join(NORMALISATIONS)}, got {self.normalise!r}. Choose one."
            )
        kinds = (SpatialTransform, ClipTransform)
        if not isinstance(self.transforms, tuple) or not all(isinstance(entry, kinds) for entry in self.transforms):
            raise ValueError(
                f"ViewSpec: transforms must be a tuple of transforms, got {self.transforms!r}. "
                "Put even a single one into a tuple."
            )
        if len(self.transforms) > MAX_TRANSFORMS:
            raise ValueError(
                f"ViewSpec: transforms must be at most {MAX_TRANSFORMS}, got {len(self.transforms)}. Remove some."
            )

    def check(self, dataset: PackedDataset) -> None:
        """Raise ValueError if the view cannot be made of the data set's clips (T, M, V, C)."""
        if self.topology is not None and self.topology != dataset.topology.name:
            raise ValueError(
                f"ViewSpec: topology must be that of the data set {dataset.path}, {dataset.topology.name!r}, "
                f"got {self.topology!r}. Change the spec or pack the data with that skeleton."
            )
        # a zero counts as absent, so normalised clips lack their pelvis and aligning would leave every one as it is
        if self.normalise in ("align", "align-yaw") and dataset.meta["normalisation"] != "none":
            raise ValueError(
                f"ViewSpec: normalise must be 'none' or a kind of centring for data packed as "
                f"{dataset.meta['normalisation']!r}, got {self.normalise!r} for {dataset.path}. "
                "Pack the data with normalisation='none' to align it."
            )
        linear = [entry for entry in self.transforms if isinstance(entry, SpatialTransform)]
        if linear and dataset.channels not in (2, 3):
            raise ValueError(
                f"ViewSpec: {type(linear[0]).__name__} must have 2 or 3 channels, got {dataset.channels} in "
                f"{dataset.path}. Remove the transform."
            )
        bodies, joints, channels = dataset.frames.shape[1:]
        for entry in self.transforms:
            entry.check((self.frames, bodies, joints, channels))


def crop_shares(crop: RandomCrop | CenterCrop) -> tuple[str, int, int, int] | tuple[str, int]:
    """A crop in whole numbers: ("random", low, high, min_frames) or ("center", ratio), shares in units of 2^-24."""
    if isinstance(crop, CenterCrop):
        return "center", round(crop.ratio * ONE)
    return "random", round(crop.low * ONE), round(crop.high * ONE), int(crop.min_frames)


def crop_bounds(
    crop: RandomCrop | CenterCrop,
    num_frames: NDArray[np.int64],
    *,
    seed: int,
    index: NDArray[np.int64],
    epoch: int,
    view: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw the crop of every sample.

    Args:
        crop: Kind of crop.
        num_frames: Frames of each clip, (N,), at least 1.
        seed: 64-bit key of the draws.
        index: Global sample index of each row, (N,).
        epoch: Epoch of the draws.
        view: View number of the draws.
    Returns:
        First frame and length of each crop, (N,) and (N,).
    """
    count = np.asarray(num_frames, np.int64)
    if isinstance(crop, CenterCrop):
        start = (count * (ONE - round(crop.ratio * ONE))) // (2 * ONE)
        return start, count - 2 * start
    low, high = round(crop.low * ONE), round(crop.high * ONE)
    drawn = words(seed, index, epoch, view, Use.CROP, 2)
    scale = low + ((high - low) * (drawn[:, 0].astype(np.int64) >> 8) >> 24)
    length = np.minimum(np.maximum(count * scale >> 24, crop.min_frames), count)
    return below(drawn[:, 1], count - length + 1), length


def _clip(dataset: PackedDataset, number: int, kind: str) -> NDArray[np.float32]:
    try:
        clip = np.asarray(dataset.clip(number), np.float32)
        return clip if kind == "none" else normalise_clip(clip, kind, dataset.topology)
    # whatever goes wrong in a worker thread reaches the caller with the clip's name
    except Exception as error:
        raise ValueError(
            f"make_view: clip must be readable and normalisable ({kind}), got {error!r} at clip {number} "
            f"({dataset.names[number]}) of {dataset.path}. Pack the data set again without it."
        ) from error


def make_view(dataset: PackedDataset, spec: ViewSpec, index: ArrayLike, seed: int, epoch: int, view: int) -> View:
    """Make one view of some samples: a pure function of its arguments, the same for a sample in any batch.

    Args:
        dataset: Packed clips (T, M, V, C).
        spec: Pipeline.
        index: Sample numbers in the data set, (N,).
        seed: 64-bit key of the draws.
        epoch: Epoch of the draws, below 2^32.
        view: View number of the draws, below 2^16.
    Returns:
        View of clips (N, T, M, V, C), float32, and mask (N, T, M).
    Raises:
        ValueError: If the view cannot be made of this data set, an index is outside of it, or a clip fails, naming
            the clip.
    """
    spec.check(dataset)
    rows = np.asarray(index, np.int64).reshape(-1)
    if len(rows) and (rows.min() < 0 or rows.max() >= len(dataset)):
        bounds = f"{rows.min()} .. {rows.max()}"
        raise ValueError(
            f"make_view: index must be in 0 .. {len(dataset) - 1}, got {bounds} for {dataset.path}. "
            "Give sample numbers of the data set."
        )
    num_frames = dataset.offsets[rows + 1] - dataset.offsets[rows]
    if len(rows) and num_frames.min() < 1:
        empty = int(rows[num_frames.argmin()])
        place = f"clip {empty} ({dataset.names[empty]}) of {dataset.path}"
        raise ValueError(
            f"make_view: clip must have at least one frame, got none at {place}. Pack the data set again without it."
        )
    start, length = crop_bounds(spec.crop, num_frames, seed=seed, index=rows, epoch=epoch, view=view)
    shape = (len(rows), spec.frames, *dataset.frames.shape[1:])
    clips = np.empty(shape, np.float32)
    for row, (number, begin, count) in enumerate(zip(rows.tolist(), start.tolist(), length.tolist(), strict=True)):
        clips[row] = crop_resize(_clip(dataset, number, spec.normalise), begin, count, spec.frames)
    mask = clips.any(axis=(-2, -1))
    clips = apply_transforms(clips, spec.transforms, ClipAddress(seed, rows, epoch, view), dataset.topology)
    values = stream(torch.from_numpy(clips), spec.stream, dataset.topology, spec.bone_variant)
    return View(values, torch.from_numpy(mask), dataset.topology)


def usdrl_views(
    frames: int = 64,
    stream: str = "joint",
    num_views: int = 4,
    normalise: str = "none",
    min_frames: int = 64,
    *,
    low: float = 0.1,
    fraction: float = 0.6,
    amplitude: float = 1.0,
    bone_variant: str | None = None,
) -> tuple[ViewSpec, ...]:
    """The multi-view augmentation of USDRL: random crop, then joint corruption or shear with equal odds.

    Args:
        frames: T of every view.
        stream: joint, bone or motion.
        num_views: W, equal specs with draws of their own.
        normalise: Kind of normalisation, as in `ViewSpec`; `eval_view` must get the same.
        min_frames: Crops are at least this long, or the whole clip where it is shorter.
        low: Least share of the clip in a crop.
        fraction: Share of the joints that corruption chooses.
        amplitude: Largest shear factor.
        bone_variant: Named bone list, for the bone stream.
    Returns:
        W specs of views (N, T, M, V, C).
    """
    corruption_or_shear = OneOf((JointCorruption(fraction), Shear(amplitude)))
    crop = RandomCrop(low, 1.0, min_frames)
    return (ViewSpec(stream, bone_variant, frames, crop, (corruption_or_shear,), normalise),) * num_views


def eval_view(
    frames: int = 64, stream: str = "joint", normalise: str = "none", *, bone_variant: str | None = None
) -> ViewSpec:
    """The view for evaluation: the whole clip resized to T frames, (N, T, M, V, C), nothing drawn."""
    return ViewSpec(stream, bone_variant, frames, CenterCrop(), (), normalise)
