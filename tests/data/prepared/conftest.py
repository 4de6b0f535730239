"""Writes prepared files as their authors' scripts do, with NumPy and pickle alone, and packs them."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fastskel.data.pack import pack_source
from fastskel.data.packed import open_dataset


def ntu_names(count: int, offset: int = 0) -> list[str]:
    return [f"S001C{1 + i % 3:03d}P{1 + i // 3:03d}R001A{1 + i % 60:03d}" for i in range(offset, offset + count)]


def random_clips(lengths, bodies=2, joints=25, channels=3, seed=0) -> list[np.ndarray]:
    """Clips (T, M, V, C), float32; every second one has one body."""
    draws = np.random.default_rng(seed)
    clips = [draws.normal(size=(t, bodies, joints, channels)).astype(np.float32) for t in lengths]
    for clip in clips[1::2]:
        clip[:, 1:] = 0
    return clips


def write_agcn(folder: Path, part: str, clips, names, labels, *, frames=30, counts="num_frame", joint="_joint") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    bodies, joints, channels = clips[0].shape[1:]
    data = np.zeros((len(clips), channels, frames, joints, bodies), np.float32)
    for row, clip in zip(data, clips, strict=True):
        row[:, : len(clip)] = clip.transpose(3, 0, 2, 1)
    np.save(folder / f"{part}_data{joint}.npy", data)
    if counts:
        np.save(folder / f"{part}_{counts}.npy", np.array([len(clip) for clip in clips]))
    (folder / f"{part}_label.pkl").write_bytes(pickle.dumps((list(names), list(labels))))


def write_ctr_gcn(path: Path, parts, *, frames=30, classes=60, save=np.savez) -> None:
    arrays = {}
    for part, (clips, labels) in parts.items():
        x = np.zeros((len(clips), frames, clips[0][0].size), np.float32)
        for row, clip in zip(x, clips, strict=True):
            row[: len(clip)] = clip.reshape(len(clip), -1)
        arrays |= {f"x_{part}": x, f"y_{part}": np.eye(classes)[labels]}
    save(path, **arrays)


def annotation(name: str, clip: np.ndarray, label: int, **more) -> dict:
    """An annotation of PYSKL for a clip (T, M, V, C); the third channel of 17 joints is the score."""
    keypoint = clip.transpose(1, 0, 2, 3)
    if keypoint.shape[2] == 17:
        more |= {"keypoint_score": keypoint[..., 2].astype(np.float16), "img_shape": (1080, 1920)}
        keypoint = keypoint[..., :2].astype(np.float16)
    return {"frame_dir": name, "label": label, "total_frames": len(clip), "keypoint": keypoint, **more}


def packed(name, source, tmp_path, **options):
    summary = pack_source(name, source, tmp_path / "packed", options=options, progress=False)
    dataset = open_dataset(tmp_path / "packed", verify=True)
    assert (summary.clips, summary.frames) == (len(dataset), len(dataset.frames))
    return dataset, summary


def same(dataset, clips) -> None:
    assert len(dataset) == len(clips)
    for number, clip in enumerate(clips):
        found = dataset.clip(number)
        assert found.shape[0] == len(clip) and np.array_equal(found[:, : clip.shape[1]], clip), number
        assert not found[:, clip.shape[1] :].any()


def refused(name, source, tmp_path, message, **options) -> None:
    with pytest.raises(ValueError, match=f"(?s)^pack_source: .*{message}.*{source.name}") as caught:
        pack_source(name, source, tmp_path / "packed", options=options, progress=False)
    assert not (tmp_path / "packed").exists() and "\n" not in str(caught.value)


def dump(path, content):
    path.write_bytes(pickle.dumps(content))
    return path


def write_pyskl(folder, annotations, **splits):
    return dump(folder / "file.pkl", {"split": splits, "annotations": annotations})


@pytest.fixture(scope="session")
def prepared() -> SimpleNamespace:
    """The functions of this file, for tests that importlib mode lets import nothing from here."""
    return SimpleNamespace(
        annotation=annotation,
        dump=dump,
        ntu_names=ntu_names,
        packed=packed,
        random_clips=random_clips,
        refused=refused,
        same=same,
        write_agcn=write_agcn,
        write_ctr_gcn=write_ctr_gcn,
        write_pyskl=write_pyskl,
    )
