"""Features of every frame of a recording of any length, from an encoder that takes clips of one length.

A recording is cut into overlapping windows of consecutive frames. Each window is a clip of its own, made into a view as in
training: normalised, resized to the T frames of the view, turned into its stream. The encoder's frame features (T', D) are
resized to the window's frames, and a frame's feature is the weighted mean over the windows that hold it. The last window ends
with the recording; a recording shorter than a window is one window, resized to T as any short clip is.

The triangular weight falls towards both ends of a window: there a frame has context on one side only, and motion lacks its
last frame. It also lets a window come and go without a step in the features.

Why windows and not mixing weights resized to the recording: a resized T x T matrix is not what was trained, its features
change with the length of the recording, its cost grows with the square of it, and it would exist for one encoder. Windows ask
of an encoder nothing but `temporal`, and a frame depends on its surroundings alone.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fastskel.data.batch import View
from fastskel.data.normalise import normalise
from fastskel.data.packed import PackedDataset
from fastskel.data.resize import crop_resize
from fastskel.data.views import CenterCrop, ViewSpec
from fastskel.evaluate.evaluation import Evaluation
from fastskel.evaluate.feature_cache import read_features, write_features
from fastskel.evaluate.features import checked_indices, feature_key
from fastskel.models.encoder import Features
from fastskel.skeleton import stream

__all__ = [
    "Windows", "check_window_view", "frame_features", "frames_of", "mean_over_windows", "window_cuts", "window_starts",
    "window_view",
]  # fmt: skip

# part of every key of a cached file: raise it when the meaning of one changes
CACHE_VERSION = 2


@dataclass(frozen=True)
class Windows:
    """How recordings are cut into windows, and what is kept of them.

    Attributes:
        window: Frames of a recording in one window; None: as many as a view has, so that nothing is resized.
        overlap: Share of a window that the next one repeats, in [0, 1).
        weighting: Weight of a window's frames in the mean of overlapping windows: triangular or flat.
        spatial: Add the window's spatial features, their maxima over tokens, to those of each of its frames.
    """

    window: int | None = None
    overlap: float = 0.5
    weighting: Literal["triangular", "flat"] = "triangular"
    spatial: bool = False

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"Windows: window must be at least 1, got {self.window}. Leave it out for the view's length.")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"Windows: overlap must lie in [0, 1), got {self.overlap}. Pass 0.5.")
        if self.weighting not in ("triangular", "flat"):
            raise ValueError(f"Windows: weighting must be triangular or flat, got {self.weighting!r}. Choose one.")

    def weights(self, length: int) -> Tensor:
        """Weights of a window's frames, (length,), all positive."""
        if self.weighting == "flat":
            return torch.ones(length)
        rising = torch.arange(1, length + 1)
        return torch.minimum(rising, rising.flip(0)).float()


def window_starts(num_frames: int, window: int, overlap: float) -> NDArray[np.int64]:
    """First frames of the windows, (W,), ascending, the last one aligned with the end of the recording.

    Args:
        num_frames: Frames of the recording.
        window: Frames of a window; a shorter recording has one window, from 0.
        overlap: Share of a window that the next one repeats.
    """
    last = max(num_frames - window, 0)
    starts = np.arange(0, last + 1, max(1, round(window * (1 - overlap))), dtype=np.int64)
    return starts if starts[-1] == last else np.append(starts, last)


def window_view(dataset: PackedDataset, spec: ViewSpec, recording: int, starts: NDArray[np.int64], length: int) -> View:
    """Make the windows of one recording into views.

    Args:
        dataset: Packed data set.
        spec: View of a window; without crop and transforms.
        recording: Number of the clip.
        starts: First frame of each window, (W,).
        length: Frames of a window.
    Returns:
        Views of the windows, (W, T, M, V, C).
    """
    frames = dataset.clip(recording)
    clips = np.empty((len(starts), spec.frames, *frames.shape[1:]), np.float32)
    for row, start in enumerate(starts.tolist()):
        cut = np.asarray(frames[start : start + length], np.float32)
        if spec.normalise != "none":
            cut = normalise(cut, spec.normalise, dataset.topology)
        clips[row] = crop_resize(cut, 0, length, spec.frames)
    mask = torch.from_numpy(clips.any(axis=(-2, -1)))
    values = stream(torch.from_numpy(clips), spec.stream, dataset.topology, spec.bone_variant)
    return View(values, mask, dataset.topology)


def frames_of(
    features: Features, length: int, *, spatial: bool, task: str, rows: slice | Sequence[int] = slice(None)
) -> Tensor:
    """Resize what an encoder says of windows to their frames; gradients reach the encoder.

    Args:
        features: Of windows, `temporal` (W, T', D).
        length: Frames of the recording in each window.
        spatial: Add the windows' spatial features, their maxima over tokens, to those of each frame.
        task: Named in the error.
        rows: Windows to take.
    Returns:
        Features of the windows' frames, (W', length, D), float32.
    Raises:
        ValueError: If the encoder has no such features.
    """
    frames = _resized(features.need("temporal", task)[rows].float(), length)
    if spatial:
        maxima = features.need("spatial", task)[rows].float().amax(1)
        frames = torch.cat([frames, maxima[:, None].expand(-1, length, -1)], 2)
    return frames


def _resized(frames: Tensor, length: int) -> Tensor:
    if frames.shape[1] == length:
        return frames
    return functional.interpolate(frames.mT, size=length, mode="linear", align_corners=False).mT


def window_cuts(dataset: PackedDataset, recording: int, windows: Windows, usual: int) -> tuple[NDArray[np.int64], int]:
    """First frames of a recording's windows, (W,), and their length, at most `usual` where the windows do not say."""
    num_frames = int(dataset.num_frames[recording])
    length = min(windows.window or usual, num_frames)
    return window_starts(num_frames, length, windows.overlap), length


def mean_over_windows(
    evaluation: Evaluation, recording: int, windows: Windows, encode: Callable[[View, int], Tensor]
) -> Tensor:
    """Weighted mean over the windows that hold a frame, in evaluation's precision and without gradients.

    Args:
        evaluation: Data, view, device, windows at a time.
        recording: Number of the clip.
        windows: How it is cut, and the weights.
        encode: Called with views of windows (W, T, M, V, C) and their length; returns values of their frames, (W, length, D).
    Returns:
        Values of the recording's frames, (T, D), float32, on the host.
    """
    spec, device = evaluation.view, torch.device(evaluation.device)
    num_frames = int(evaluation.dataset.num_frames[recording])
    starts, length = window_cuts(evaluation.dataset, recording, windows, spec.frames)
    weights = windows.weights(length)[:, None]
    total, weight = torch.zeros(0), torch.zeros(num_frames, 1)
    for rows in np.array_split(starts, -(-len(starts) // evaluation.batch_size)):
        view = window_view(evaluation.dataset, spec, recording, rows, length).to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=evaluation.precision == "bf16"):
            frames = encode(view, length).float().cpu()
        if not len(total):
            total = torch.zeros(num_frames, frames.shape[2])
        for start, values in zip(rows.tolist(), frames, strict=True):
            total[start : start + length] += weights * values
            weight[start : start + length] += weights
    return total / weight


def check_window_view(spec: ViewSpec, dataset: PackedDataset) -> None:
    """Raise ValueError if windows (W, T, M, V, C) of the data set cannot be made into such views."""
    spec.check(dataset)
    if spec.transforms or spec.crop != CenterCrop():
        raise ValueError(
            f"frame_features: view must have neither crop nor transforms, got {spec.crop!r} and {spec.transforms!r}. "
            "Pass eval_view(...)."
        )


def frame_features(
    evaluation: Evaluation, recordings: NDArray[np.int64], windows: Windows | None = None, *, task: str = "frame features"
) -> list[Tensor]:
    """Encode every frame of recordings once, in evaluation mode and without gradients.

    With a cache each recording is a file of its own, named by the digest of weights, settings, view, data, windows and
    recording: an interrupted evaluation goes on with the next recording, any split reuses them, and they are mapped, not
    held. Raw coordinates are not cached.

    Args:
        evaluation: Encoder, or None for the raw coordinates of a frame, (M*V*C,); data, view, cache.
        recordings: Clips to encode, (N,), labelled or not.
        windows: How they are cut; half overlapping windows of the view's length if None.
        task: Named in the error if the encoder has no frame features.
    Returns:
        Features of each recording, (T, D), float32, on the host.
    Raises:
        ValueError: On a view with crop or transforms, an encoder of another skeleton or without frame features, recordings
            that are not of the data set, or a feature that is not finite, naming recording and frame.
    """
    from tqdm import tqdm

    windows, dataset = windows or Windows(), evaluation.dataset
    chosen = checked_indices("frame_features", dataset, recordings)
    evaluation.check_fit()
    check_window_view(evaluation.view, dataset)
    if windows.spatial and evaluation.encoder is None:
        raise ValueError("frame_features: windows.spatial must be false for raw coordinates, got true. Leave it out.")
    encoder, base, cache = None, "", evaluation.cache
    if evaluation.encoder is not None:
        # a copy: the caller's may be in training
        encoder = copy.deepcopy(evaluation.encoder).to(evaluation.device).eval()
        if cache is not None:
            none = np.zeros(0, dtype=np.int64)
            base = feature_key(
                encoder, dataset, evaluation.view, none, device=evaluation.device, precision=evaluation.precision
            )

    def encode(view: View, length: int) -> Tensor:
        if encoder is None:
            return _resized(view.clips.flatten(2), length)
        return frames_of(encoder(view), length, spatial=windows.spatial, task=task)

    found = []
    for number in tqdm(chosen.tolist(), desc="frame features", unit="recording", disable=not evaluation.progress, leave=False):
        key = hashlib.sha256(f"v{CACHE_VERSION};{base};{windows!r};{number}".encode()).hexdigest()
        path = Path(cache) / f"frames-{key[:16]}.safetensors" if cache is not None and encoder is not None else None
        features = None if path is None else read_features("frame_features", path, key)
        if features is None:
            features = mean_over_windows(evaluation, number, windows, encode)
            bad = (~torch.isfinite(features)).any(1).nonzero()
            if bad.numel():
                raise ValueError(
                    f"frame_features: features must be finite, got nan or inf in frame {int(bad[0])} of recording {number} "
                    f"({dataset.names[number]}) of {dataset.path}. Check the encoder's weights and the coordinates."
                )
            if path is not None:
                write_features(path, key, features)
                # mapped from now on: recordings of a large set do not fit into memory together
                mapped = read_features("frame_features", path, key)
                features = features if mapped is None else mapped
        found.append(features)
    return found
