"""Folders of 2s-AGCN and UmURL become the clips, labels and parts that they hold."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from fastskel.data.formats.ntu import CLASSES
from fastskel.data.protocols import protocols, split

LENGTHS = (5, 12, 1, 30)


@pytest.mark.parametrize("val", ["val", "test"])
@pytest.mark.parametrize("counts", ["num_frame", "num_of_frames", None])
def test_agcn(prepared, tmp_path, val, counts):
    folder, clips = tmp_path / "xsub", prepared.random_clips(LENGTHS)
    names = prepared.ntu_names(4)
    prepared.write_agcn(folder, "train", clips[:3], [f"{name}.skeleton" for name in names[:3]], [0, 59, 2], counts=counts)
    prepared.write_agcn(folder, val, clips[3:], names[3:], [1], counts=counts)
    dataset, summary = prepared.packed("agcn", folder, tmp_path, dataset="ntu60")
    prepared.same(dataset, clips)
    assert dataset.names.tolist() == names and dataset.labels.tolist() == [0, 59, 2, 1]
    assert dataset.num_bodies.tolist() == [2, 1, 2, 1] and summary.bodies == 2 and summary.skipped == ()
    assert dataset.splits["xsub"]["train"].tolist() == [0, 1, 2] and dataset.splits["xsub"]["test"].tolist() == [3]
    assert dataset.columns["camera"].tolist() == [1, 2, 3, 1] and dataset.columns["subject"].tolist() == [1, 1, 1, 2]
    assert dataset.class_names == list(CLASSES[:60]) and dataset.topology.name == "ntu-25"
    assert (dataset.source, dataset.meta["units"], dataset.meta["up_axis"]) == ("ntu60", "metres", "z")
    # names of NTU RGB+D bring its rules; the parts that the files make come first
    assert protocols(dataset) == ["xsub", "xview"] and split(dataset, "xview").train.tolist() == [1, 2]


def test_agcn_counts_are_the_valid_frames(prepared, tmp_path):
    folder, clips = tmp_path / "data", prepared.random_clips((30, 30, 30))
    clips[0][10:20] = 0
    clips[2][:] = 0
    prepared.write_agcn(folder, "train", clips, "abc", [0, 1, 2])
    # repeated padding behind the fifth frame; a count beyond the array, as of a clip that was cut; no valid frame
    np.save(folder / "train_num_frame.npy", np.array([25, 400, 0]))
    dataset, _ = prepared.packed("agcn", folder, tmp_path, protocol="official", up_axis="y")
    prepared.same(dataset, [clips[0][:25], clips[1], clips[2][:1]])
    assert list(dataset.splits) == ["official"] and list(dataset.splits["official"]) == ["train"]
    assert dataset.source == "custom" and dataset.class_names == [] and dataset.columns == {}
    assert dataset.meta["up_axis"] == "y"


def test_agcn_of_uav_human_and_of_kinetics(prepared, tmp_path):
    clips = prepared.random_clips((4, 6), joints=17)
    prepared.write_agcn(tmp_path / "v1", "train", clips, "ab", [0, 154], joint="", counts="num_of_frames")
    dataset, _ = prepared.packed("agcn", tmp_path / "v1", tmp_path, dataset="uav-human")
    prepared.same(dataset, clips)
    assert dataset.topology.name == "coco-17" and list(dataset.splits) == ["v1"] and dataset.source == "uav-human"
    assert dataset.meta["units"] == "pixels" and dataset.meta["channels"] == ["x", "y", "z"]
    clips = prepared.random_clips((4, 6), joints=18)
    prepared.write_agcn(tmp_path / "kinetics", "train", clips, "ab", [0, 1], joint="", counts=None)
    dataset, _ = prepared.packed("agcn", tmp_path / "kinetics", tmp_path / "k")
    assert (dataset.topology.name, dataset.meta["units"], dataset.meta["up_axis"]) == ("openpose-18", "pixels", "-y")
    assert dataset.meta["channels"] == ["x", "y", "score"]


def test_agcn_labels_may_be_an_array(prepared, tmp_path):
    prepared.write_agcn(tmp_path / "data", "train", prepared.random_clips((4, 6)), "ab", [0, 1])
    (tmp_path / "data" / "train_label.pkl").unlink()
    np.save(tmp_path / "data" / "train_label.npy", np.array([7, 8]))
    dataset, _ = prepared.packed("agcn", tmp_path / "data", tmp_path)
    assert dataset.names.tolist() == ["train-000000", "train-000001"] and dataset.labels.tolist() == [7, 8]


def spoil(folder, name, content):
    path = folder / name
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_bytes(pickle.dumps(content))


NAN = np.full((2, 3, 30, 25, 2), np.nan, np.float32)
AGCN_FAULTS = {
    "no labels": ("train_label.pkl", None, "with train_label.pkl or train_label.npy, got none"),
    "no data": ("train_data_joint.npy", None, "a folder with train_data_joint.npy.*got none"),
    "NaN": ("train_data_joint.npy", NAN, r"clip 0 \('a'\) must be finite numbers, got NaN or infinity in frame 0"),
    "axes": ("train_data_joint.npy", NAN[0], "an array of numbers with 5 axes, got float32 with 4 axes"),
    "objects": ("train_data_joint.npy", np.array([[None]]), "a complete .npy array without Python objects"),
    "joints": ("train_data_joint.npy", np.ones((2, 3, 4, 21, 2), "f4"), "of 25, 17, 18, 15 joints, got 21"),
    "no frames": ("train_data_joint.npy", np.ones((2, 3, 0, 25, 2), "f4"), "without a zero, got"),
    "cut": ("train_data_joint.npy", b"\x93NUMPY\x01\x00", "a complete .npy array"),
    "more names": ("train_label.pkl", (["a", "b", "c"], [0, 1]), "of 2 names, as train_data_joint.npy has clips, got 3"),
    "fewer labels": ("train_label.pkl", (["a", "b"], [0]), "of 2 labels, as train_data_joint.npy has clips, got 1"),
    "label": ("train_label.pkl", (["a", "b"], [0, "x"]), "labels that are whole numbers of at least -1, got 'x' for clip 1"),
    "low label": ("train_label.pkl", (["a", "b"], [0, -2]), "whole numbers of at least -1, got -2"),
    "high label": ("train_label.pkl", (["a", "b"], [0, 60]), r"one of the class names, got 60 for clip 1"),
    "same name": ("train_label.pkl", (["a", "a"], [0, 1]), "unique, got 'a' twice"),
    "no pair": ("train_label.pkl", {"a": 1}, "a pair of names and labels, got dict"),
    "three lists": ("train_label.pkl", ([], [], []), "a pair of names and labels, got 3 lists"),
    "names of numbers": ("train_label.pkl", ([1, 2], [0, 1]), "with names that are text"),
    "code": ("train_label.pkl", b"cos\nsystem\nX\x02\0\0\0ls\x85R.", "got the name os.system, not looked up"),
    "counts": ("train_num_frame.npy", np.array([1]), "of 2 whole numbers of at least 0, got 1 of type int64"),
    "negative counts": ("train_num_frame.npy", np.array([1, -1]), "of 2 whole numbers of at least 0"),
    "float counts": ("train_num_frame.npy", np.array([1.0, 1]), "of 2 whole numbers of at least 0, got 2 of type float64"),
    "other part": ("val_data_joint.npy", np.ones((2, 2, 4, 25, 2), "f4"), "with parts of the same channels and joints"),
}


@pytest.mark.parametrize("case", AGCN_FAULTS)
def test_agcn_faults(prepared, tmp_path, case):
    folder = tmp_path / "data"
    prepared.write_agcn(folder, "train", prepared.random_clips((4, 6)), "ab", [0, 1])
    name, content, message = AGCN_FAULTS[case]
    if case == "other part":
        prepared.write_agcn(folder, "val", prepared.random_clips((4, 6)), "cd", [0, 1])
    if content is None:
        (folder / name).unlink()
    else:
        spoil(folder, name, content)
    prepared.refused("agcn", folder, tmp_path, message, dataset="ntu60")
