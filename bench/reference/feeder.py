"""The plain feeder that the native loader is measured against: USDRL's multi-view items, one clip at a time, in NumPy and torch.

Written from the specification of the public code: the same operations in the same order, on a buffer of the same layout,
without its faults (it fails with current versions of NumPy).
"""

from __future__ import annotations

import random

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Feeder"]

LEAST_SHARE, MIN_FRAMES, CORRUPTED = 0.1, 64, 0.6


class Feeder(torch.utils.data.Dataset[list[NDArray[np.float32]]]):
    """Items of W views, (C, T, V, M) each, from clips (n, C, frames, V, M) and their valid frames (n,)."""

    def __init__(self, buffer: NDArray[np.float32], counts: NDArray[np.int64], frames: int = 64, num_views: int = 4) -> None:
        self.buffer, self.counts, self.frames, self.num_views = buffer, counts, frames, num_views
        self._draw = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, item: int) -> list[NDArray[np.float32]]:
        clip, count = np.asarray(self.buffer[item]), int(self.counts[item])
        return [self._augment(self._crop(clip, count)) for _ in range(self.num_views)]

    def _crop(self, clip: NDArray[np.float32], count: int) -> NDArray[np.float32]:
        share = self._draw.random() * (1 - LEAST_SHARE) + LEAST_SHARE
        length = min(max(int(np.floor(count * share)), MIN_FRAMES), count)
        start = int(self._draw.integers(0, count - length + 1))
        channels, _, joints, bodies = clip.shape
        crop = torch.from_numpy(clip[:, start : start + length]).permute(0, 2, 3, 1).reshape(1, 1, -1, length)
        resized = torch.nn.functional.interpolate(crop, size=(crop.shape[2], self.frames), mode="bilinear", align_corners=False)
        return resized.reshape(channels, joints, bodies, self.frames).permute(0, 3, 1, 2).contiguous().numpy()

    def _augment(self, clip: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._corrupt(clip) if random.random() < 0.5 else self._shear(clip)

    def _corrupt(self, clip: NDArray[np.float32]) -> NDArray[np.float32]:
        joints = clip.shape[2]
        out, chosen = clip.copy(), random.sample(range(joints), int(CORRUPTED * joints))
        if random.random() < 0.5:
            out[:, :, chosen] = 0
        else:
            mix = self._draw.uniform(-1, 1, (3, 3))
            out[:, :, chosen] = np.dot(clip[:, :, chosen].transpose(1, 2, 3, 0), mix).transpose(3, 0, 1, 2)
        return out

    def _shear(self, clip: NDArray[np.float32]) -> NDArray[np.float32]:
        a, b, c, d, e, f = (random.uniform(-1, 1) for _ in range(6))
        shear = np.array([[1, a, b], [c, 1, d], [e, f, 1]])
        sheared = np.dot(clip.transpose(1, 2, 3, 0), shear.T)
        # the published code leaves float64 here, which costs its consumer more
        single: NDArray[np.float32] = sheared.transpose(3, 0, 1, 2).astype(np.float32)
        return single
