"""Pickles of PYSKL become the clips, labels and parts that they hold."""

from __future__ import annotations

import numpy as np
import pytest

LENGTHS = (5, 12, 1, 30)


def test_pyskl_3d(prepared, tmp_path):
    clips, names = prepared.random_clips(LENGTHS), prepared.ntu_names(4)
    rows = [prepared.annotation(name, clip, label) for label, (name, clip) in enumerate(zip(names, clips))]
    empty = prepared.annotation("S001C001P009R001A009", np.zeros((3, 1, 25, 3), "f4"), 8)
    rows.insert(1, {**empty, "keypoint": empty["keypoint"][:0]})
    path = prepared.write_pyskl(
        tmp_path,
        rows,
        xsub_train=[*names[:2], empty["frame_dir"], "S009C009P009R009A009"],
        xsub_val=names[2:],
        xview_train=names[::2],
        xview_val=names[1::2],
    )
    dataset, summary = prepared.packed("pyskl", path, tmp_path, dataset="ntu60")
    prepared.same(dataset, clips)
    assert dataset.names.tolist() == names and dataset.labels.tolist() == [0, 1, 2, 3]
    assert dict(summary.skipped) == {
        "S001C001P009R001A009": "no body",
        "S009C009P009R009A009": "in split xsub_train without an annotation",
    }
    assert dataset.splits["xsub"]["train"].tolist() == [0, 1] and dataset.splits["xsub"]["test"].tolist() == [2, 3]
    assert dataset.splits["xview"]["train"].tolist() == [0, 2] and "subject" in dataset.columns
    assert (dataset.meta["units"], dataset.meta["channels"], dataset.meta["up_axis"]) == ("metres", ["x", "y", "z"], "y")


def test_pyskl_2d(prepared, tmp_path):
    clips = [np.abs(clip) * [900, 500, 1] for clip in prepared.random_clips((4, 6), joints=17)]
    rows = [prepared.annotation(name, clip, 0) for name, clip in zip("ab", clips)]
    path = prepared.write_pyskl(tmp_path, rows, train=["a"], val=["b"])
    half = [clip.astype(np.float16).astype(np.float32) for clip in clips]
    dataset, _ = prepared.packed("pyskl", path, tmp_path, dataset="gym")
    prepared.same(dataset, half)
    assert dataset.meta["channels"] == ["x", "y", "score"] and dataset.topology.name == "coco-17"
    assert (dataset.meta["units"], dataset.meta["up_axis"]) == ("pixels", "-y") and list(dataset.splits) == ["default"]
    assert dataset.columns["image_height"].tolist() == [1080] * 2 and dataset.columns["image_width"].tolist() == [1920] * 2
    dataset, _ = prepared.packed("pyskl", path, tmp_path / "zero", third="zero")
    prepared.same(dataset, [clip * np.float32([1, 1, 0]) for clip in half])
    dataset, _ = prepared.packed("pyskl", path, tmp_path / "none", third="none")
    assert dataset.meta["channels"] == ["x", "y"]
    prepared.same(dataset, [clip[..., :2] for clip in half])


@pytest.mark.parametrize("third", ["score", "zero"])
def test_pyskl_with_the_scaling_of_usdrl(prepared, tmp_path, third):
    clip = np.abs(prepared.random_clips((4,), bodies=1, joints=17)[0]) * [900, 500, 1]
    row = prepared.annotation("a", clip, 0)
    dataset, _ = prepared.packed("pyskl", prepared.write_pyskl(tmp_path, [row]), tmp_path, usdrl_scaling=True, third=third)
    # the reference's two lines, on (M, T, V, 2): the third axis is the joint, not the coordinate
    keypoint = row["keypoint"].copy()
    keypoint[:, :, 0] /= 1080
    keypoint[:, :, 1] /= 1920
    score = row["keypoint_score"][..., None] if third == "score" else np.zeros((1, 4, 17, 1), np.float32)
    expected = np.concatenate([keypoint, score], axis=3).transpose(1, 0, 2, 3).astype(np.float32)
    prepared.same(dataset, [expected])
    assert expected[:, :, :2].max() < 2 < expected[:, :, 2:, :2].max() and dataset.meta["units"] == "mixed"


def test_pyskl_splits_of_every_name(prepared, tmp_path):
    rows = [prepared.annotation(name, clip, 0) for name, clip in zip("abc", prepared.random_clips((2, 3, 4)))]
    splits = {"train1": ["a"], "test1": ["b"], "train2": ["b"], "test2": ["a"]}
    splits |= {"half_train": ["a"], "half_val": ["b"], "half_test": ("c",), "one_train": np.array(["a", "c", "a"])}
    dataset, _ = prepared.packed("pyskl", prepared.write_pyskl(tmp_path, rows, **splits), tmp_path)
    found = {name: {part: rows.tolist() for part, rows in parts.items()} for name, parts in dataset.splits.items()}
    assert found == {
        "1": {"train": [0], "test": [1]},
        "2": {"train": [1], "test": [0]},
        "half": {"train": [0], "val": [1], "test": [2]},
        "one": {"train": [0, 2]},
    }
    dataset, _ = prepared.packed("pyskl", prepared.dump(tmp_path / "list.pkl", rows), tmp_path / "list")
    assert dataset.splits == {} and dataset.names.tolist() == ["a", "b", "c"]


ROW = {"frame_dir": "a", "label": 0, "total_frames": 3, "keypoint": np.ones((1, 3, 25, 3), np.float32)}
FLAT = {**ROW, "keypoint": np.ones((1, 3, 17, 2), np.float16), "keypoint_score": np.ones((1, 3, 17)), "img_shape": (9, 9)}
PYSKL_FAULTS = {
    "no annotations": ({"split": {}}, {}, "with a list of annotations, got NoneType"),
    "empty": ([], {}, "with at least one clip, got none"),
    "no dict": ([1], {}, "annotations that are dicts, got int 0"),
    "no name": ([{**ROW, "frame_dir": 3}], {}, "annotations that have a frame_dir, got none in annotation 0"),
    "no keypoint": ([{**ROW, "keypoint": None}], {}, r"keypoint arrays of floats, \(M, T, V, 2 or 3\), got NoneType in 'a'"),
    "axes": ([{**ROW, "keypoint": np.ones((3, 25, 3))}], {}, r"got \(3, 25, 3\) in 'a'"),
    "text": ([{**ROW, "keypoint": np.full((1, 3, 25, 3), "a")}], {}, r"of floats, .*got \(1, 3, 25, 3\) in 'a'"),
    "score": ([{**ROW, "keypoint_score": np.ones(3)}], {}, r"keypoint_score of shape \(1, 3, 25\), got \(3,\) in 'a'"),
    "no score": ([{**FLAT, "frame_dir": "b", "keypoint_score": None}], {}, "keypoint_score in all annotations"),
    "frames": ([{**ROW, "total_frames": "x"}], {}, "whole total_frames, got 'x' in 'a'"),
    "image": ([{**FLAT, "img_shape": (0, 5)}], {}, r"img_shape \(height, width\), got \(0, 5\) in 'a'"),
    "label": ([{**ROW, "label": 1.5}], {}, "whole numbers of at least -1, got 1.5"),
    "joints": ([{**ROW, "keypoint": np.ones((1, 3, 21, 3))}], {}, "of 25, 17, 18, 15 joints, got 21"),
    "topology": ([ROW], {"topology": "coco-17"}, "of 17 joints as coco-17, got 25"),
    "mixed": ([ROW, {**FLAT, "frame_dir": "b"}], {}, r"clip 1 \('b'\) must be \(T, M, 25, C\)"),
    "split name": ({"annotations": [ROW], "split": {"all": ["a"]}}, {}, "splits called .*, got 'all'"),
    "split list": ({"annotations": [ROW], "split": {"train": 5}}, {}, "list of clips in split 'train', got int"),
    "split dict": ({"annotations": [ROW], "split": [1]}, {}, "with a dict of splits, got list"),
    "split names": ({"annotations": [ROW], "split": {"train": [1]}}, {}, "with names in split 'train'"),
    "both parts": ({"annotations": [ROW], "split": {"train": ["a"], "val": ["a"]}}, {}, "apart from the other parts"),
    "scaling": ([ROW], {"usdrl_scaling": True}, "of 2-D joints for usdrl_scaling, got 3-D joints"),
    "NaN": ([{**ROW, "keypoint": ROW["keypoint"] * np.nan}], {}, r"clip 0 \('a'\) must be finite"),
    "twice": ([ROW, ROW], {}, "unique, got 'a' twice"),
}


@pytest.mark.parametrize("case", PYSKL_FAULTS)
def test_pyskl_faults(prepared, tmp_path, case):
    content, options, message = PYSKL_FAULTS[case]
    prepared.refused("pyskl", prepared.dump(tmp_path / "file.pkl", content), tmp_path, message, **options)
