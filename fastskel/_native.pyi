"""Native routines (csrc/bindings.cpp). Arguments are checked and never converted; the GIL is released."""

import numpy as np
from numpy.typing import NDArray

def philox_words(
    seed: int, index: NDArray[np.uint32], step: int, view: NDArray[np.uint32], use: int, num: int
) -> NDArray[np.uint32]:
    """Draw words (N, num) for samples `index` (N,) and their view numbers `view` (N,), both contiguous."""

def crop_resize(clip: NDArray[np.float32], start: int, length: int, out_frames: int) -> NDArray[np.float32]:
    """Crop a contiguous clip (T, M, V, C) in time and resize it to (out_frames, M, V, C)."""
