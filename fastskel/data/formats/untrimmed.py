"""What untrimmed recordings share: the class of each frame, from segments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["frame_classes"]


def frame_classes(segments: Sequence[tuple[int, int, int, float]], num_frames: int) -> NDArray[np.int64]:
    """Return the class of each frame, (T,), -1 where there is none.

    Args:
        segments: Rows (class, start, end, confidence), end exclusive; where two overlap, the one that begins later counts.
        num_frames: T.
    """
    classes = np.full(num_frames, -1, dtype=np.int64)
    for label, start, end, _ in sorted(segments, key=lambda row: row[1]):
        classes[start:end] = label
    return classes
