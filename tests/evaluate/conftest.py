"""A tiny packed data set in memory, one of untrimmed recordings, and a tiny encoder that counts its calls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastskel.data.batch import View
from fastskel.data.pack_clips import pack_arrays
from fastskel.data.packed import PackedDataset
from fastskel.models.encoder import Encoder, Features
from fastskel.skeleton import topology

NUM_CLASSES = 3


def make_dataset(
    labels: list[int], seed: int = 0, class_names: tuple[str, ...] = ("sit", "wave", "kick")
) -> PackedDataset:
    """Clips whose class moves one coordinate; clip i has 5 + i % 4 frames."""
    draw = np.random.default_rng(seed)
    skeleton = topology("ntu-25")
    lengths = [5 + number % 4 for number in range(len(labels))]
    frames = draw.normal(0, 0.05, (sum(lengths), 1, skeleton.num_joints, 3)).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    for number, label in enumerate(labels):
        frames[offsets[number] : offsets[number + 1], 0, 4 + 3 * max(label, 0), 1] += 1.0
    return PackedDataset(
        path=Path("in-memory"),
        meta={
            "source": "custom",
            "class_names": list(class_names),
            "columns": {},
            "checksums": {"frames.npy": f"{seed}"},
        },
        topology=skeleton,
        frames=frames,
        offsets=offsets,
        names=np.array([f"clip{number:03d}" for number in range(len(labels))]),
        labels=np.array(labels, dtype=np.int64),
        num_bodies=np.ones(len(labels), dtype=np.int64),
    )


def pack_recordings(folder: Path, num: int = 8) -> PackedDataset:
    """Still recordings in which a class lifts a joint of its own for a while; subjects are pairs of recordings."""
    draw = np.random.default_rng(0)
    clips, segments = [], []
    for number in range(num):
        frames = draw.normal(0, 0.05, (90 + 7 * number, 1, 25, 3)).astype(np.float32)
        start = 5
        for label in draw.permutation(3):
            end = start + int(draw.integers(12, 20))
            frames[start:end, 0, 5 + 4 * label, 1] += 1
            segments.append((number, label, start, end, 1.0))
            start = end + int(draw.integers(5, 12))
        clips.append(frames)
    return pack_arrays(
        clips, out=folder, topology="ntu-25", class_names=["lift", "wave", "kick"],
        columns={"subject": np.arange(num) // 2}, segments=np.array(segments),
    )  # fmt: skip


class CountingEncoder(Encoder):
    """Mean over frames, then a linear layer; `calls` says how often it ran, `scale` is a setting without weights."""

    def __init__(self, num_features: int = 8) -> None:
        super().__init__()
        self.num_features = num_features
        self.scale = 1.0
        self.linear = nn.Linear(75, num_features)
        self.dropout = nn.Dropout(0.5)
        self.calls = [0]
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(num_features, 75, generator=torch.Generator().manual_seed(1)))

    def forward(self, view: View, *, token_mask: Tensor | None = None, mode: str | None = None) -> Features:
        self.calls[0] += 1
        return Features(self.dropout(self.linear(view.clips.flatten(2).mean(1) * self.scale)))


@pytest.fixture(scope="session")
def untrimmed(tmp_path_factory) -> PackedDataset:
    return pack_recordings(tmp_path_factory.mktemp("untrimmed") / "packed")


@pytest.fixture
def dataset() -> PackedDataset:
    return make_dataset([number % NUM_CLASSES for number in range(17)])


@pytest.fixture
def encoder() -> CountingEncoder:
    return CountingEncoder()
