"""A small packed data set that lives in memory, for tests of what reads one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastskel.data.packed import PackedDataset
from fastskel.skeleton import topology


@pytest.fixture(scope="session")
def memory_dataset():
    """Make random clips (T, M, V, C) of the given lengths; columns as (name, values, "clip" or "frame")."""

    def build(num_frames, name="ntu-25", bodies=1, channels=3, columns=(), absent_body=False) -> PackedDataset:
        skeleton = topology(name)
        lengths = np.asarray(num_frames, np.int64)
        shape = (int(lengths.sum()), bodies, skeleton.num_joints, channels)
        frames = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        if absent_body:
            frames[:, 1:] = 0
        return PackedDataset(
            path=Path("in-memory"),
            meta={
                "source": "custom",
                "class_names": [],
                "columns": {key: kind for key, _, kind in columns},
                "normalisation": "none",
            },
            topology=skeleton,
            frames=frames,
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            names=np.array([f"clip{i}" for i in range(len(lengths))]),
            labels=np.arange(len(lengths)) % 7,
            num_bodies=np.ones(len(lengths), np.int64),
            columns={key: np.asarray(values) for key, values, _ in columns},
        )

    return build
