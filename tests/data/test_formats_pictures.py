"""Readers of joints in pictures: Kinetics-skeleton, Penn Action and UAV-Human, on files made after their descriptions."""

import io
import json

import numpy as np
import pytest

from fastskel.data import pack
from fastskel.data.formats import SkipFile
from fastskel.data.formats.kinetics_skeleton import KineticsOptions
from fastskel.data.formats.kinetics_skeleton import read as read_kinetics
from fastskel.data.formats.penn_action import CLASSES
from fastskel.data.formats.penn_action import read as read_penn
from fastskel.data.formats.uav_human import UavOptions
from fastskel.data.formats.uav_human import read as read_uav
from fastskel.data.packed import open_dataset
from fastskel.data.protocols import split


def person(seed, score):
    rng = np.random.default_rng(seed)
    joints = rng.uniform(size=(18, 3)).round(3)
    joints[:, 2] = score
    return joints


def frame(number, *persons):
    skeletons = [{"pose": joints[:, :2].ravel().tolist(), "score": joints[:, 2].tolist()} for joints in persons]
    return {"frame_index": number, "skeleton": skeletons}


def kinetics(frames, label=17, name="jetskiing", **more):
    return json.dumps({"data": frames, "label": name, "label_index": label, **more}).encode()


def test_kinetics_bodies_are_in_order_of_their_scores():
    low, high, middle = person(0, 0.1), person(1, 0.9), person(2, 0.5)
    data = kinetics([frame(1, low, high, middle), frame(2), frame(4, middle)])
    clip = read_kinetics(data, "a/kinetics_train/xyz.json")
    assert (clip.name, clip.label, clip.class_name, clip.columns) == ("xyz", 17, "jetskiing", {"train": 1})
    expected = np.zeros((4, 3, 18, 3), np.float32)
    expected[0], expected[3, 0] = [high, middle, low], middle
    np.testing.assert_array_equal(clip.frames, expected)
    few = read_kinetics(data, "a/kinetics_val/xyz.json", KineticsOptions(bodies=2))
    np.testing.assert_array_equal(few.frames, expected[:, :2])
    assert few.columns == {"train": 0}


def test_kinetics_is_packed_with_its_class_names(tmp_path):
    clips = (("train", "b", 2, "wave"), ("train", "a", 0, "run"), ("val", "c", 2, "wave"), ("val", "d", 1, "-"))
    for part, name, label, text in clips:
        folder = tmp_path / "src" / f"kinetics_{part}"
        folder.mkdir(parents=True, exist_ok=True)
        persons = [] if name == "d" else [person(1, 0.5)] * (1 + label)
        (folder / f"{name}.json").write_bytes(kinetics([frame(0, *persons)], label, text))
    (tmp_path / "src" / "kinetics_train_label.json").write_text("{}")
    summary = pack.pack_source("kinetics-skeleton", tmp_path / "src", tmp_path / "out", progress=False)
    dataset = open_dataset(tmp_path / "out", verify=True)
    assert dataset.names.tolist() == ["a", "b", "c"] and dataset.labels.tolist() == [0, 2, 2]
    assert dataset.class_names == ["run", "class 1", "wave"] and dataset.num_bodies.tolist() == [1, 3, 3]
    assert summary.skipped == (("kinetics_val/d.json", "no body in any frame"),)
    assert split(dataset, "official").test.tolist() == [2]
    (tmp_path / "src" / "kinetics_val" / "e.json").write_bytes(kinetics([frame(0, person(1, 0.5))], 2, "walk"))
    with pytest.raises(ValueError, match=r"class 2 must be of one name, got 'wave' and, in kinetics_val/e.json, 'walk'"):
        pack.pack_source("kinetics-skeleton", tmp_path / "src", tmp_path / "other", progress=False)


def test_kinetics_parts_need_their_folders(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.json").write_bytes(kinetics([frame(0, person(1, 0.5))]))
    pack.pack_source("kinetics-skeleton", tmp_path / "src", tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="clip 'a' in neither part"):
        split(open_dataset(tmp_path / "out"), "official")


def broken(**changes):
    found = frame(3, person(0, 0.5))
    found["skeleton"][0].update(changes)
    return kinetics([found])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "complete JSON"),
        (kinetics([frame(1, person(0, 0.5))])[:-30], "complete JSON"),
        (b"[" * 100_000, "complete JSON"),
        (b"[]", "the list `data` of frames, got none"),
        (kinetics([1]), "the list `data` of frames"),
        (kinetics([frame(1, person(0, 0.5))], label=-1), "a label and a label_index"),
        (kinetics([frame(1, person(0, 0.5))], label=10**9), "a label and a label_index"),
        (kinetics([frame(1, person(0, 0.5))], label=True), "a label and a label_index"),
        (kinetics([frame(1, person(0, 0.5))], name=None), "a label and a label_index"),
        (kinetics([frame(2), frame(2)]), "rising frame_index, got 2 after 2"),
        (kinetics([frame("1")]), "rising frame_index, got '1' after -1"),
        (kinetics([frame(0, person(0, 0.5)), frame(10**9)]), "at most 10000 frames, got 1000000001"),
        (kinetics([{"frame_index": 1}]), "the list `skeleton`, got none in frame_index 1"),
        (broken(pose=[0.5] * 34), "36 numbers under `pose`, got others in frame_index 3"),
        (broken(score=[0.5] * 17), "18 numbers under `score`, got others in frame_index 3"),
        (broken(score=["0.5"] * 18), "18 numbers under `score`"),
        (broken(score=[10**400] * 18), "finite numbers, got others under `score` in frame_index 3"),
        (broken(pose=[float("nan")] * 36), "finite numbers, got NaN or infinity in frame 0"),
    ],
)
def test_bad_kinetics(data, message):
    with pytest.raises(ValueError, match=rf"file must be .*{message}.*in some/x.json"):
        read_kinetics(data, "some/x.json")


@pytest.mark.parametrize("options", [KineticsOptions, UavOptions])
@pytest.mark.parametrize("bodies", [0, True, 1.0])
def test_bad_number_of_bodies(options, bodies):
    with pytest.raises(ValueError, match="option bodies must be a whole number of at least 1"):
        options(bodies=bodies)


def penn(num_frames=3, **changes):
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    values = {
        "x": rng.uniform(1, 480, (num_frames, 13)),
        "y": rng.uniform(1, 270, (num_frames, 13)),
        "visibility": rng.integers(0, 2, (num_frames, 13)).astype(np.uint8),
        "action": "tennis_serve",
        "train": 1,
        "nframes": num_frames,
        **changes,
    }
    buffer = io.BytesIO()
    savemat(buffer, {name: value for name, value in values.items() if value is not None})
    return buffer.getvalue(), values


@pytest.mark.parametrize("num_frames", [1, 3])
def test_penn(num_frames):
    data, values = penn(num_frames)
    clip = read_penn(data, "labels/0042.mat")
    expected = np.stack([values["x"], values["y"], values["visibility"]], axis=-1).astype(np.float32)
    np.testing.assert_array_equal(clip.frames[:, 0], expected)
    assert (clip.name, CLASSES[clip.label], clip.columns) == ("0042", "tennis_serve", {"train": 1})


def test_penn_parts(tmp_path):
    (tmp_path / "src").mkdir()
    for number, train in enumerate((1, -1, 0, 1), 1):
        (tmp_path / "src" / f"000{number}.mat").write_bytes(penn(2, train=train)[0])
    pack.pack_source("penn-action", tmp_path / "src", tmp_path / "out", progress=False)
    dataset = open_dataset(tmp_path / "out", verify=True)
    assert dataset.topology.name == "penn-13" and dataset.meta["channels"] == ["x", "y", "score"]
    parts = split(dataset, "official")
    assert (parts.train.tolist(), parts.test.tolist()) == ([0, 3], [1, 2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": None}, "the variable x, got none of that name"),
        ({"x": np.ones((3, 14))}, r"x of shape \(T, 13\), got float64 of shape \(3, 14\)"),
        ({"y": np.ones((2, 13))}, r"as many frames, got \[3, 2, 3\]"),
        ({"visibility": np.full((3, 13), np.nan)}, "NaN or infinity in frame 0"),
        ({"action": "fly"}, "an action among baseball_pitch"),
        ({"action": 3}, "an action among baseball_pitch"),
        ({"train": 7}, "train 1, 0 or -1"),
        ({"train": "yes"}, "train 1, 0 or -1"),
        ({"x": np.array([["a"] * 13] * 3)}, "numbers or rows of text, got variable x of text"),
        ({"x": "a"}, r"x of shape \(T, 13\)"),
        ({name: np.ones((0, 13)) for name in ("x", "y", "visibility")}, "at least one frame|x of shape"),
    ],
)
def test_bad_penn(changes, message):
    with pytest.raises(ValueError, match=rf"file must be .*({message}).*0001.mat"):
        read_penn(penn(**changes)[0], "0001.mat")


@pytest.mark.parametrize("data", [b"", penn()[0][:300], b"MATLAB 7.3" + bytes(600)])
def test_damaged_penn(data):
    with pytest.raises(ValueError, match="file must be a complete MATLAB 5 file, got an unreadable one|the variable x"):
        read_penn(data, "0001.mat")
    with pytest.raises(ValueError, match=r"named 0001.mat, got x.mat"):
        read_penn(data, "x.mat")


NAME = "P003S00G10B10H20UC022000LC021000A083R1_08241716"


def pose(seed):
    return np.random.default_rng(seed).uniform(0, 900, (17, 3)).astype(np.float32)


def uav(frames, joints=17):
    lines = [str(len(frames))]
    for bodies in frames:
        lines.append(str(len(bodies)))
        for number, values in bodies:
            lines += [f"{number} 0 0 0 0 0 0 0 0 0", str(joints)]
            lines += [" ".join(map(str, joint.tolist())) + " 0 0 0 0 0 0 0 0 0" for joint in values[:joints]]
    return ("\n".join(lines) + "\n").encode()


def test_uav_bodies_keep_their_places():
    big, small = [pose(t) for t in range(3)], [pose(10 + t) / 10 for t in range(3)]
    frames = [[(1, small[0]), (0, big[0])], [(0, big[1])], [(0, big[2]), (1, small[2])]]
    clip = read_uav(uav(frames), f"Skeleton/{NAME}.txt")
    expected = np.zeros((3, 2, 17, 3), np.float32)
    expected[:, 0], expected[0, 1], expected[2, 1] = big, small[0], small[2]
    np.testing.assert_array_equal(clip.frames, expected)
    assert (clip.name, clip.label, clip.notes) == (NAME, 83, ())
    columns = {"subject": 3, "setup": 0, "gender": 10, "backpack": 10, "hat": 20, "repetition": 1}
    assert clip.columns == columns
    one = read_uav(uav(frames), f"Skeleton/{NAME}.txt", UavOptions(bodies=1))
    np.testing.assert_array_equal(one.frames, expected[:, :1])


def test_uav_bodies_of_one_number_are_told_apart_by_their_place():
    first, second = pose(1), pose(2) / 10
    clip = read_uav(uav([[(0, first)], [(0, first), (0, second)]]), f"{NAME}.txt")
    np.testing.assert_array_equal(clip.frames[1], [first, second])
    assert clip.notes == ("body 0 twice in frame 1: bodies are told apart by their place in the file",)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (NAME, b"", "line 1 must be"),
        (NAME, uav([[(0, pose(0))]])[:-30], "line .* must be"),
        (NAME, uav([[(0, pose(0))]], joints=16), "17"),
        (NAME, uav([[(0, pose(0) * np.nan)]]), "NaN or infinity in frame 0|number"),
        (NAME, b"1000000000\n1\n", "fit the rest of the file|line .* must be"),
        ("P003A001", uav([[(0, pose(0))]]), "named like P000S00"),
        (NAME.replace("A083", "A155"), uav([[(0, pose(0))]]), "actions 000 to 154"),
    ],
)
def test_bad_uav(name, data, message):
    with pytest.raises(ValueError, match=rf"({message}).*{name}"):
        read_uav(data, f"x/{name}.txt")


def test_uav_without_bodies():
    with pytest.raises(SkipFile, match="no body in any frame"):
        read_uav(uav([[], []]), f"{NAME}.txt")


def test_uav_parts(tmp_path):
    columns = {"subject": np.arange(119)}
    clips = [np.ones((1, 1, 17, 3))] * 119
    dataset = pack.pack_arrays(clips, topology="coco-17", out=tmp_path / "set", columns=columns, source="uav-human")
    first, second = split(dataset, "xsub-v1"), split(dataset, "xsub-v2")
    assert len(first.train) == len(second.train) == 89
    # P000 trains and P001 tests in both; P002 tests in the second one only
    assert {0, 2} <= set(first.train.tolist()) and 1 in first.test and {1, 2} <= set(second.test.tolist())
