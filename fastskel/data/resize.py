"""Temporal crop and linear resize of one clip: the native routine and its definition in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastskel import _native

__all__ = ["crop_resize", "crop_resize_numpy"]


def _check(clip: NDArray[np.float32], start: int, length: int, out_frames: int) -> None:
    if clip.ndim != 4 or clip.dtype != np.float32:
        raise ValueError(
            f"crop_resize: clip must be float32 (T, M, V, C), got {clip.dtype} {clip.shape}. Convert it when packing."
        )
    for argument, value in (("length", length), ("out_frames", out_frames)):
        if value < 1:
            raise ValueError(f"crop_resize: {argument} must be at least 1, got {value}. Keep at least one frame.")
    if start < 0 or start + length > clip.shape[0]:
        raise ValueError(
            f"crop_resize: crop must be inside the clip's {clip.shape[0]} frames, "
            f"got start {start} and length {length}. Move or shorten the crop."
        )


def crop_resize(clip: NDArray[np.float32], start: int, length: int, out_frames: int) -> NDArray[np.float32]:
    """Crop a clip in time and resize it to a fixed length.

    Args:
        clip: Joint positions, (T, M, V, C), metres.
        start: First frame of the crop.
        length: Frames in the crop, at least 1.
        out_frames: Frames of the result.
    Returns:
        Resized crop, (out_frames, M, V, C), metres.
    Raises:
        ValueError: If the crop leaves the clip.
    Source: temporal crop-resize of USDRL; half-pixel centres, as torch.nn.functional.interpolate(align_corners=False).
    """
    _check(clip, start, length, out_frames)
    return _native.crop_resize(np.ascontiguousarray(clip), start, length, out_frames)


def crop_resize_numpy(clip: NDArray[np.float32], start: int, length: int, out_frames: int) -> NDArray[np.float32]:
    """Crop and resize (T, M, V, C) to (out_frames, M, V, C) in NumPy: the definition of `crop_resize`.

    Raises:
        ValueError: If the crop leaves the clip.
    """
    _check(clip, start, length, out_frames)
    # whole numerators over 2 * out_frames: every implementation picks the same frames and weights
    numerator = np.maximum((2 * np.arange(out_frames, dtype=np.int64) + 1) * length - out_frames, 0)
    lower, rest = np.divmod(numerator, 2 * out_frames)
    upper = np.minimum(lower + 1, length - 1)
    weight = (rest / (2 * out_frames)).astype(np.float32)[:, None, None, None]
    crop = clip[start : start + length]
    result: NDArray[np.float32] = (np.float32(1) - weight) * crop[lower] + weight * crop[upper]
    return result
