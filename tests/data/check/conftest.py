"""Synthetic clips, packed and then damaged."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastskel.data import open_dataset, pack_arrays
from fastskel.data.synthetic import synthetic_motion

NUM, CLIP = 24, 5
MOTION = synthetic_motion(NUM, num_classes=4, num_subjects=6, seed=3)
NAMES = [f"clip{number:02}" for number in range(NUM)]


@pytest.fixture
def pack(tmp_path):
    """Pack clips with the columns of the synthetic motion, then edit the files that packing would refuse."""

    def build(clips=MOTION.clips, edit=None, clip=CLIP, segments=None, splits=None, **options):
        options = {
            "topology": "ntu-25",
            "labels": MOTION.labels[: len(clips)],
            "class_names": MOTION.class_names,
            "names": NAMES[: len(clips)],
            "columns": {"subject": MOTION.columns["subject"][: len(clips)]},
            **options,
        }
        folder = tmp_path / f"set{len(list(tmp_path.iterdir()))}"
        dataset = pack_arrays(clips, out=folder, **options)
        if edit is not None:
            frames = np.load(folder / "frames.npy", mmap_mode="r+")
            edit(frames[dataset.offsets[clip] : dataset.offsets[clip + 1]])
            frames.flush()
        if segments is not None:
            np.save(folder / "segments.npy", np.array([[*row, 1] for row in segments], dtype=np.float64))
        if splits is not None:
            (folder / "splits.json").write_text(json.dumps(splits))
        return open_dataset(folder)

    return build
