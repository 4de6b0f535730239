"""USDRL's pickles of PKU-MMD become clips or windows; and what holds of all prepared files."""

from __future__ import annotations

import numpy as np
import pytest

from fastskel.data.formats import FORMATS, PREPARED
from fastskel.data.pack import pack_source
from fastskel.data.protocols import split


def test_pku_clips(prepared, tmp_path):
    clips = prepared.random_clips((5, 12, 7))
    padded = [np.concatenate([clip, np.zeros_like(clip[:2])]) for clip in clips]
    for part, rows in (("train", [0, 1]), ("val", [2])):
        content = {
            "data": [padded[row].transpose(3, 0, 2, 1) for row in rows],
            "label": [1, 51] if part == "train" else np.array([7]),
            "num_frames": [len(clips[row]) for row in rows],
        }
        prepared.dump(tmp_path / f"PKUv2_xsub_{part}.pkl", content)
    dataset, _ = prepared.packed("pku-mmd-pkl", tmp_path, tmp_path)
    prepared.same(dataset, clips)
    assert dataset.labels.tolist() == [0, 50, 6] and dataset.source == "pku-mmd" and dataset.segments is None
    assert dataset.names.tolist() == ["train-000000", "train-000001", "val-000000"]
    assert split(dataset, "xsub").train.tolist() == [0, 1] and split(dataset, "xsub").test.tolist() == [2]


@pytest.mark.parametrize("container", [list, lambda rows: dict(enumerate(rows))])
def test_pku_windows(prepared, tmp_path, container):
    clips = prepared.random_clips((64,) * 3)
    labels = np.zeros((3, 64), np.int64)
    labels[0, 10:20], labels[0, 20:30], labels[1, 60:], labels[2] = 3, 51, 7, 1
    videos = ("0002-L.txt", "0002-L.txt", "0003-M.txt")
    rows = [
        {"name": video, "data": clip.transpose(3, 0, 2, 1), "label": label}
        for video, clip, label in zip(videos, clips, labels)
    ]
    prepared.dump(tmp_path / "PKUv1_xsub_train.pkl", container(rows[:2]))
    prepared.dump(tmp_path / "PKUv1_xsub_val.pkl", container(rows[2:]))
    dataset, _ = prepared.packed("pku-mmd-pkl", tmp_path, tmp_path)
    prepared.same(dataset, clips)
    assert dataset.names.tolist() == ["0002-L-0000", "0002-L-0001", "0003-M-0000"]
    assert dataset.columns["video"].tolist() == ["0002-L", "0002-L", "0003-M"]
    assert dataset.columns["window"].tolist() == [0, 1, 0] and dataset.labels.tolist() == [-1] * 3
    assert dataset.columns["camera"].tolist() == ["L", "L", "M"] and split(dataset, "xview").train.tolist() == [2]
    assert np.array_equal(dataset.columns["action"], labels.ravel() - 1)
    assert dataset.segments[:, :4].tolist() == [[0, 2, 10, 20], [0, 50, 20, 30], [1, 6, 60, 64], [2, 0, 0, 64]]
    assert split(dataset, "xsub").test.tolist() == [2]


def test_pku_prefix_is_asked_for(prepared, tmp_path):
    content = {"data": [np.ones((3, 4, 25, 2), "f4")], "label": [1]}
    for prefix in ("PKUv2_xsub", "PKUv2_xview"):
        prepared.dump(tmp_path / f"{prefix}_train.pkl", content)
    prepared.refused("pku-mmd-pkl", tmp_path, tmp_path, "of one prefix, got those of PKUv2_xsub, PKUv2_xview")
    dataset, _ = prepared.packed("pku-mmd-pkl", tmp_path, tmp_path, prefix="PKUv2_xview")
    assert list(dataset.splits) == ["xview"]
    dataset, _ = prepared.packed("pku-mmd-pkl", tmp_path / "PKUv2_xsub_train.pkl", tmp_path / "one")
    assert list(dataset.splits) == ["xsub"]


DATA, WINDOW = np.ones((3, 4, 25, 2), np.float32), {"name": "a", "data": np.ones((3, 2, 25, 2)), "label": [0, 1]}
PKU_FAULTS = {
    "label": ({"data": [DATA], "label": [0]}, "labels in 1 .. 51, got 0 .. 0"),
    "high label": ({"data": [DATA], "label": [52]}, "labels in 1 .. 51, got 52 .. 52"),
    "no label": ({"data": [DATA]}, "a list of labels, got NoneType"),
    "labels": ({"data": [DATA], "label": [1, 2]}, "a label for each of 1 clips, got 2"),
    "counts": ({"data": [DATA], "label": [1], "num_frames": []}, "a num_frames for each of 1 clips, got 0"),
    "shape": ({"data": [DATA[0]], "label": [1]}, r"arrays \(3, T, V, M\), got \(4, 25, 2\) in clip 0"),
    "no list": ({"data": 3, "label": [1]}, "a list of arrays as data, got int"),
    "keys": ({"a": WINDOW}, "`data`, or windows by number, got a dict of other keys"),
    "no name": ([{**WINDOW, "name": None}], "windows that have a name, got none in window 0"),
    "frames": ([{**WINDOW, "label": [0]}], "a label for each of 2 frames, got 1 in window 0"),
    "window label": ([{**WINDOW, "label": [0, 52]}], "labels in 0 .. 51"),
    "nothing": ([], "with at least one clip, got none"),
    "text": ("abc", "a list of windows, got str"),
}


@pytest.mark.parametrize("case", PKU_FAULTS)
def test_pku_faults(prepared, tmp_path, case):
    content, message = PKU_FAULTS[case]
    prepared.refused("pku-mmd-pkl", prepared.dump(tmp_path / "P_xsub_train.pkl", content), tmp_path, message)


def test_sources_and_options(tmp_path):
    for name in PREPARED:
        entry = PREPARED[name]
        with pytest.raises(ValueError, match="pack_source: source must be a folder or a file, got nothing, in .*nowhere"):
            pack_source(name, tmp_path / "nowhere", tmp_path / "out", progress=False)
        with pytest.raises(ValueError, match=r"options must be among those of the format \(dataset, .*got 'tempo'"):
            pack_source(name, tmp_path, tmp_path / "out", options={"tempo": 1}, progress=False)
        (tmp_path / "folder").mkdir(exist_ok=True)
        reason = "a readable file, got Is a directory" if name in ("ctr-gcn", "pyskl") else "got none"
        with pytest.raises(ValueError, match=f"^pack_source: .*{reason}, in .*folder"):
            pack_source(name, tmp_path / "folder", tmp_path / "out", progress=False)
        assert entry.about and not entry.about.endswith(".")
    assert set(PREPARED) == {"agcn", "ctr-gcn", "pku-mmd-pkl", "pyskl", "pyskl-kinetics"} and not set(PREPARED) & set(FORMATS)
    assert all(FORMATS[name].about for name in FORMATS)


def test_the_same_files_give_the_same_bytes(prepared, tmp_path):
    rows = [prepared.annotation(name, clip, 0) for name, clip in zip("ab", prepared.random_clips((2, 3)))]
    path = prepared.write_pyskl(tmp_path, rows, train=["a"])
    for out in ("one", "two"):
        pack_source("pyskl", path, tmp_path / out, progress=False)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    with pytest.raises(ValueError, match="destination must be new"):
        pack_source("pyskl", path, tmp_path / "one", progress=False)
