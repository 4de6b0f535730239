"""Readers of public data sets, on made-up files and on the real ones."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest

from fastskel.data import pack
from fastskel.data.formats import FORMATS
from fastskel.data.packed import open_dataset
from fastskel.skeleton import topology


def mat_bytes(values, name="d_skel"):
    from scipy.io import savemat

    buffer = io.BytesIO()
    savemat(buffer, {name: values})
    return buffer.getvalue()


def json_bytes(frames, label=1, **more):
    return json.dumps({"file_name": "x", "skeletons": np.asarray(frames).tolist(), "label": label, **more}).encode()


def utd_files():
    rng = np.random.default_rng(0)
    return {
        f"Skeleton/a{action}_s{subject}_t{trial}_skeleton.mat": mat_bytes(rng.normal(size=(20, 3, 4 + trial)))
        for action, subject, trial in ((1, 1, 1), (10, 1, 1), (2, 8, 4))
    }


def ucla_files():
    rng = np.random.default_rng(0)
    return {
        f"all/a{number:02}_s01_e00_v0{view}.json": json_bytes(rng.normal(size=(3, 20, 3)), label)
        for number, label, view in ((1, 1, 1), (8, 7, 2), (12, 10, 3))
    }


def write_folder(files, folder):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tar(files, path, mode="w:xz"):
    with tarfile.open(path, mode) as archive:
        for name, data in reversed(files.items()):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_zip(files, path):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in reversed(files.items()):
            archive.writestr(name, data)
    return path


def test_utd_mhad(tmp_path):
    values = np.random.default_rng(0).normal(size=(20, 3, 7))
    files = {"a27_s3_t2_skeleton.mat": mat_bytes(values), "Skeleton_joint_order.txt": b"1. head"}
    summary = pack.pack_source("utd-mhad", write_folder(files, tmp_path / "src"), tmp_path / "out", progress=False)
    dataset = open_dataset(tmp_path / "out", verify=True)
    np.testing.assert_array_equal(dataset.clip(0)[:, 0], values.transpose(2, 0, 1).astype(np.float32))
    assert dataset.names.tolist() == ["a27_s3_t2"] and dataset.labels.tolist() == [26]
    assert dataset.class_names[26] == "squat" and len(dataset.class_names) == 27
    assert {k: v.tolist() for k, v in dataset.columns.items()} == {"subject": [3], "repetition": [2]}
    assert (summary.clips, summary.frames, summary.bodies) == (1, 7, 1)
    assert summary.skipped == (("Skeleton_joint_order.txt", "not a .mat file"),)
    assert "packed 1 clips, 7 frames" in str(summary) and "not a .mat file" in str(summary)


def test_utd_mhad_of_one_frame():
    clip = FORMATS["utd-mhad"].read(mat_bytes(np.ones((20, 3))), "a1_s1_t1_skeleton.mat")
    assert clip.frames.shape == (1, 1, 20, 3)


def test_nw_ucla(tmp_path):
    values = np.random.default_rng(0).normal(size=(5, 20, 3))
    files = {"deep/er/a09_s10_e04_v03.json": json_bytes(values, 8)}
    pack.pack_source("nw-ucla", write_folder(files, tmp_path / "src"), tmp_path / "out", progress=False)
    dataset = open_dataset(tmp_path / "out", verify=True)
    np.testing.assert_array_equal(dataset.clip(0)[:, 0], values.astype(np.float32))
    assert dataset.names.tolist() == ["a09_s10_e04_v03"] and dataset.labels.tolist() == [7]
    assert dataset.class_names[7] == "doffing" and len(dataset.class_names) == 10
    assert {k: v.tolist() for k, v in dataset.columns.items()} == {"subject": [10], "repetition": [4], "camera": [3]}


@pytest.mark.parametrize(("name", "files"), [("utd-mhad", utd_files()), ("nw-ucla", ucla_files())], ids=["utd", "ucla"])
def test_folder_and_archives_give_the_same_bytes(tmp_path, name, files):
    sources = [
        write_folder(files, tmp_path / "src"),
        write_tar(files, tmp_path / "a.tar.xz"),
        write_tar(files, tmp_path / "a.tar", "w"),
        write_zip(files, tmp_path / "a.zip"),
    ]
    contents = []
    for number, source in enumerate(sources):
        out = tmp_path / f"out{number}"
        pack.pack_source(name, source, out, progress=False)
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert all(content == contents[0] for content in contents)
    assert open_dataset(tmp_path / "out0").names.tolist() == sorted(open_dataset(tmp_path / "out0").names)


def test_progress_goes_to_standard_error(tmp_path, capsys):
    pack.pack_source("nw-ucla", write_folder(ucla_files(), tmp_path / "src"), tmp_path / "out")
    captured = capsys.readouterr()
    assert captured.out == "" and "packing nw-ucla" in captured.err


def test_hidden_files_are_skipped(tmp_path):
    files = {**ucla_files(), "all/._a01_s01_e00_v01.json": b"resource fork"}
    summary = pack.pack_source("nw-ucla", write_folder(files, tmp_path / "src"), tmp_path / "out", progress=False)
    assert summary.clips == 3 and summary.skipped == (("all/._a01_s01_e00_v01.json", "hidden file"),)


FACTS = {
    "utd-mhad": ("utd_mhad/utd_mhad_skeleton_mat.tar.xz", 861, 58_299, 27),
    "nw-ucla": ("nw_ucla/nw_ucla_json.tar.xz", 1_484, 58_534, 10),
}


@pytest.fixture(scope="module", params=list(FACTS))
def real(request, data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / request.param
    summary = pack.pack_source(request.param, data_dir / FACTS[request.param][0], out, progress=False)
    return request.param, summary, open_dataset(out, verify=True)


def test_real_counts(real):
    name, summary, dataset = real
    _, clips, frames, classes = FACTS[name]
    assert (summary.clips, summary.frames, summary.bodies) == (clips, frames, 1)
    assert (len(dataset), len(dataset.frames)) == (clips, frames)
    assert sorted(set(dataset.labels.tolist())) == list(range(classes))
    assert all("joint_order" in path for path, _ in summary.skipped)


def test_real_joints_are_where_their_names_say(real):
    _, _, dataset = real
    layout, frames = dataset.topology, dataset.frames[:, 0].astype(np.float64)
    height = frames[:, :, 1].mean(axis=0)
    order = ["left_foot", "left_knee", "left_hip", "spine", "shoulder_center", "head"]
    assert sorted(order, key=lambda joint: height[layout.joint(joint)]) == order
    # the bones of a rigid body keep their length: each limb joint hangs on its parent more rigidly than on the other side
    for part in ("elbow", "wrist", "knee", "ankle"):
        child = layout.joint(f"left_{part}")
        parent = layout.parents()[child]

        def spread(other, child=child):
            return np.std(np.linalg.norm(frames[:, child] - frames[:, other], axis=-1))

        assert spread(parent) < spread(layout.mirror[parent])


def test_real_right_hands_act(real):
    # most people throw with the right hand: it moves more than the left one
    name, _, dataset = real
    action = {"utd-mhad": "throw", "nw-ucla": "throw"}[name]
    chosen = np.flatnonzero(dataset.labels == dataset.class_names.index(action))
    path = np.zeros(2)
    for index in chosen:
        clip = dataset.clip(int(index))[:, 0].astype(np.float64)
        for side, joint in enumerate(("left_hand", "right_hand")):
            path[side] += np.linalg.norm(np.diff(clip[:, dataset.topology.joint(joint)], axis=0), axis=-1).sum()
    assert path[1] > 1.2 * path[0]


def test_formats_are_complete():
    for name in FORMATS:
        entry = FORMATS[name]
        assert entry.suffix.startswith(".")
        # what the options say is not known beforehand
        assert entry.adapt is not None or topology(entry.topology).num_joints
    with pytest.raises(ValueError, match="utd-mhad"):
        FORMATS["utd"]
