"""Kinetics-400 of PYSKL: a list of clips, and files with the joints of everybody in them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from fastskel.data.formats import plain_pickle, pyskl_kinetics


def clip_of(seed, counts, joints=17):
    """An annotation without names and its keypoint (N, V, 3), `counts` persons in each frame of the video."""
    draws = np.random.default_rng(seed)
    number = int(np.sum(counts))
    keypoint = draws.uniform(0, 1, (number, joints, 3)).astype(np.float16) * np.float16([300, 200, 1])
    annotation = {
        "label": seed,
        "img_shape": (240, 320 + seed),
        "original_shape": (240, 320 + seed),
        "total_frames": len(counts),
        "frame_inds": np.repeat(np.arange(len(counts)), counts).astype(np.int16),
        "box_score": draws.uniform(0.5, 1, number).astype(np.float16),
        "valid": {0.5: int(np.count_nonzero(counts))},
    }
    return annotation, keypoint.astype(np.float16)


def write(folder, clips, splits=None, **changes):
    """Clips by name: (file of the joints, annotation, keypoint)."""
    files = {}
    rows = []
    for name, (file, annotation, keypoint) in clips.items():
        files.setdefault(file, {})[name] = {"keypoint": keypoint}
        rows.append({"frame_dir": name, "raw_file": f"data/k400/kpfiles/{file}", **annotation, **changes})
    (folder / "kpfiles").mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / "kpfiles" / file).write_bytes(pickle.dumps(content))
    (folder / "k400_hrnet.pkl").write_bytes(pickle.dumps({"split": splits or {}, "annotations": rows}))
    return folder


def bodies(annotation, keypoint, most, least=0.0):
    """Frames (T, M, V, 3) and their numbers in the video, one person at a time, as the tool's documentation has it."""
    frames = {}
    for number, score, person in zip(annotation["frame_inds"].tolist(), annotation["box_score"].tolist(), keypoint):
        if score >= least:
            frames.setdefault(number, []).append(person.astype(np.float32))
    if max(map(len, frames.values())) > most:
        frames = {number: sorted(them, key=lambda person: -float(person[:, 2].sum())) for number, them in frames.items()}
    clip = np.zeros((len(frames), min(most, max(map(len, frames.values()))), *keypoint.shape[1:]), np.float32)
    for row, them in zip(clip, frames.values()):
        for body, person in zip(row, them):
            body[:] = person
    return clip, list(frames)


COUNTS = {"a": [1, 2, 0, 1], "b": [5, 1, 3, 0, 0, 4], "c": [0, 0, 1], "d": [2, 2, 2]}


def clips(**more):
    made = {name: clip_of(seed, counts) for seed, (name, counts) in enumerate({**COUNTS, **more}.items())}
    # neighbours in the list lie in different files
    return {name: (f"{'xy'[seed % 2]}.pkl", *clip) for seed, (name, clip) in enumerate(made.items())}


@pytest.mark.parametrize("most", [1, 2, 3, 10])
@pytest.mark.parametrize("least", [0.0, 0.7])
def test_bodies(prepared, tmp_path, most, least):
    made = clips(empty=[0, 0])
    folder = write(tmp_path / "k400", made, {"train": ["a", "b", "empty"], "val": ["c", "d"]})
    dataset, summary = prepared.packed("pyskl-kinetics", folder, tmp_path, num_bodies=most, box_score=least)
    order = ["a", "c", "b", "d"]
    expected = {name: bodies(*made[name][1:], most, least) for name in order if (made[name][1]["box_score"] >= least).any()}
    assert dataset.names.tolist() == list(expected) and len(expected) >= 3
    prepared.same(dataset, [clip for clip, _ in expected.values()])
    assert dataset.columns["frame"].tolist() == [number for _, numbers in expected.values() for number in numbers]
    assert dataset.labels.tolist() == [list(COUNTS).index(name) for name in expected]
    assert dataset.columns["image_width"].tolist() == [320 + list(COUNTS).index(name) for name in expected]
    assert (dataset.meta["units"], dataset.meta["channels"], dataset.meta["up_axis"]) == ("pixels", ["x", "y", "score"], "-y")
    assert dataset.topology.name == "coco-17" and dataset.source == "kinetics-400"
    parts = {part: [dataset.names[row] for row in rows] for part, rows in dataset.splits["default"].items()}
    assert parts == {"train": [n for n in expected if n in "ab"], "test": [n for n in expected if n in "cd"]}
    assert ("empty", "no person") in summary.skipped


def test_where_the_joints_are(prepared, tmp_path):
    folder = write(tmp_path / "k400", clips())
    dataset, _ = prepared.packed("pyskl-kinetics", folder, tmp_path)
    (folder / "kpfiles").rename(tmp_path / "elsewhere")
    prepared.refused("pyskl-kinetics", folder, tmp_path / "1", r"files of joints, got no 'data/k400/kpfiles/x.pkl' from")
    list_file = folder / "k400_hrnet.pkl"
    again, _ = prepared.packed("pyskl-kinetics", list_file, tmp_path / "2", keypoint_files=tmp_path / "elsewhere")
    np.testing.assert_array_equal(again.frames, dataset.frames)


def test_a_list_does_not_lead_out_of_the_folder(prepared, tmp_path):
    write(tmp_path / "k400", clips(), raw_file=f"{tmp_path}/k400/../secret.pkl")
    (tmp_path / "secret.pkl").write_bytes(pickle.dumps({}))
    prepared.refused("pyskl-kinetics", tmp_path / "k400", tmp_path, "files of joints, got no '.*secret.pkl'")


def test_one_file_of_joints_at_a_time(prepared, tmp_path, monkeypatch):
    opened = []

    def load(path):
        opened.append(path.name)
        return plain_pickle.load_pickle(path)

    monkeypatch.setattr(pyskl_kinetics, "load_pickle", load)
    prepared.packed("pyskl-kinetics", write(tmp_path / "k400", clips(e=[1], f=[1], g=[2])), tmp_path)
    # the first file once more, for the number of joints
    assert opened == ["k400_hrnet.pkl", "x.pkl", "x.pkl", "y.pkl"]


def test_only_plain_pickles(prepared, tmp_path):
    folder = write(tmp_path / "k400", clips())
    (folder / "kpfiles" / "y.pkl").write_bytes(b"cos\nsystem\nX\x02\0\0\0ls\x85R.")
    with pytest.raises(ValueError, match=r"the name os.system, not looked up, in .*y\.pkl"):
        prepared.packed("pyskl-kinetics", folder, tmp_path)
    assert not (tmp_path / "packed").exists()


ROW, JOINTS = clip_of(0, [1, 2, 0, 1])
FAULTS = {
    "name": ({"frame_dir": 3}, {}, "annotations that have a frame_dir, got 3 in annotation 0"),
    "file": ({"raw_file": None}, {}, "annotations that have a raw_file, got None in annotation 0"),
    "total": ({"total_frames": None}, {}, "whole total_frames, got None in 'a'"),
    "no frames": ({"frame_inds": None}, {}, "frame_inds that are an array of whole numbers, .*got NoneType in 'a'"),
    "floats": ({"frame_inds": np.zeros(4)}, {}, "frame_inds that are an array of whole numbers, .*got float64 in 'a'"),
    "beyond": ({"total_frames": 3}, {}, r"frame_inds from 0 to total_frames that never fall, got .* of 3 in 'a'"),
    "below": ({"frame_inds": np.array([-1, 0, 1, 2])}, {}, "frame_inds from 0 .*got .* of 4 in 'a'"),
    "falling": ({"frame_inds": np.array([0, 2, 1, 3])}, {}, "frame_inds from 0 .*that never fall, got .* of 4 in 'a'"),
    "scores": ({"box_score": np.ones(3)}, {}, r"box_score of shape \(4,\), got \(3,\) in 'a'"),
    "no scores": ({"box_score": None}, {"box_score": 0.5}, r"box_score of shape \(4,\), got NoneType in 'a'"),
    "nobody": ({}, {"box_score": 1.0}, "with at least one clip, got none"),
    "label": ({"label": "x"}, {}, "whole numbers of at least -1, got 'x'"),
    "image": ({"img_shape": 5}, {}, "img_shape .*got 5 in 'a'"),
    "topology": ({}, {"topology": "ntu-25"}, "of 25 joints as ntu-25, got 17"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_the_list(prepared, tmp_path, case):
    changes, options, message = FAULTS[case]
    folder = write(tmp_path / "k400", {"a": ("x.pkl", ROW, JOINTS)}, **changes)
    prepared.refused("pyskl-kinetics", folder, tmp_path, message, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "with the keypoint of its clips, got none of 'a'"),
        ({"b": {"keypoint": JOINTS}}, "with the keypoint of its clips, got none of 'a'"),
        ({"a": JOINTS}, "with the keypoint of its clips, got none of 'a'"),
        ({"a": {"keypoint": [1]}}, r"keypoint arrays of floats, \(N, V, 3\), got list in 'a'"),
        ({"a": {"keypoint": JOINTS[None]}}, r"keypoint arrays of floats, \(N, V, 3\), got \(1, 4, 17, 3\) in 'a'"),
        ({"a": {"keypoint": JOINTS.astype(int)}}, r"keypoint arrays of floats, \(N, V, 3\), got \(4, 17, 3\) in 'a'"),
        ({"a": {"keypoint": JOINTS[1:]}}, r"keypoint of shape \(4, V, 3\), got \(3, 17, 3\) in 'a'"),
        ({"a": {"keypoint": JOINTS[..., :2]}}, r"keypoint of shape \(4, V, 3\), got \(4, 17, 2\) in 'a'"),
        ({"a": {"keypoint": JOINTS * np.float16(np.nan)}}, r"clip 0 \('a'\) must be finite"),
    ],
    ids=range(9),
)
def test_faults_of_the_joints(prepared, tmp_path, content, message):
    folder = write(tmp_path / "k400", {"a": ("x.pkl", ROW, JOINTS)})
    prepared.dump(folder / "kpfiles" / "x.pkl", content)
    prepared.refused("pyskl-kinetics", folder, tmp_path, message)


def test_a_clip_of_other_joints(prepared, tmp_path):
    made = {"a": ("x.pkl", ROW, JOINTS), "b": ("x.pkl", *clip_of(1, [1, 1], joints=18))}
    prepared.refused("pyskl-kinetics", write(tmp_path / "k400", made), tmp_path, r"clip 1 \('b'\) must be \(T, M, 17, C\)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_bodies": 0}, "option num_bodies must be a whole number of at least 1, got 0"),
        ({"num_bodies": True}, "option num_bodies must be a whole number of at least 1, got True"),
        ({"box_score": 1.5}, "option box_score must be a number from 0 to 1, got 1.5"),
        ({"box_score": "a"}, "option box_score must be a number from 0 to 1, got 'a'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        pyskl_kinetics.PysklKineticsOptions(**options)
