"""Random views of any shape, on a skeleton made for the occasion."""

from __future__ import annotations

import pytest
import torch

from fastskel.data.batch import View
from fastskel.skeleton import PARTS, Topology


@pytest.fixture(scope="session")
def make_view():
    """Make a view of random clips of the given shape (N, T, M, V, C)."""

    def build(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> View:
        joints = tuple(f"joint{number}" for number in range(shape[3]))
        itself = tuple(range(shape[3]))
        parts = {part: itself if part == "torso" else () for part in PARTS}
        skeleton = Topology(f"chain-{shape[3]}", joints, 0, itself, parts, {"none": itself})
        clips = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        return View(clips, torch.ones(shape[:3], dtype=torch.bool), skeleton)

    return build
