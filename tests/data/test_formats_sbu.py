"""The reader of SBU Kinect interaction, on made-up files and on the real ones."""

import tarfile

import numpy as np
import pytest

from fastskel.data import pack
from fastskel.data.formats import FORMATS
from fastskel.data.formats.sbu import CLASSES, read
from fastskel.data.packed import open_dataset
from fastskel.data.protocols import split

PATH = "x/s05s02/07/003/skeleton_pos.txt"


def text(frames, first=1):
    rows = np.asarray(frames).reshape(len(frames), -1)
    return "".join(f"{first + t}," + ",".join(repr(float(v)) for v in row) + "\n" for t, row in enumerate(rows)).encode()


def poses(num_frames, seed=0):
    return np.random.default_rng(seed).uniform(size=(num_frames, 2, 15, 3))


def test_a_file():
    values = poses(4)
    clip = read(text(values, first=180), PATH)
    np.testing.assert_array_equal(clip.frames, values.astype(np.float32))
    assert (clip.name, clip.label) == ("s05s02_07_003", CLASSES.index("exchanging objects"))
    assert clip.columns == {"actor": 5, "partner": 2, "repetition": 3}
    assert clip.frame_columns["frame_id"].tolist() == [180, 181, 182, 183]


def test_one_frame_and_windows_line_ends():
    assert read(text(poses(1)).replace(b"\n", b"\r\n"), PATH).frames.shape == (1, 2, 15, 3)


def row(*changes):
    values = ["1", *["0.5"] * 90]
    for place, value in changes:
        values[place] = value
    return ",".join(values)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "at least one frame, got none"),
        (b" \n\n", "at least one frame, got none"),
        (row().encode() + b"\n" + row().encode()[:40], r"91 numbers in every row, got \d+ in line 2"),
        (b"\n" + ",".join(row().split(",")[:-3]).encode(), "91 numbers in every row, got 88 in line 2"),
        (row((7, "zebra")).encode(), "made of numbers, got .*'zebra' in line 1"),
        (row((7, "")).encode(), "made of numbers, got .* in line 1"),
        ((row() + "\n" + row((9, "nan"))).encode(), "finite numbers, got NaN or infinity in frame 1"),
        (row((9, "1e39")).encode(), "finite numbers, got NaN or infinity in frame 0"),
        (row((0, "1.5")).encode(), "whole frame numbers, got 1.5 in row 0"),
        (row((0, "inf")).encode(), "whole frame numbers, got inf in row 0"),
        (b"\xff\xfe1,2", "text in UTF-8, got other bytes"),
    ],
)
def test_bad_contents(data, message):
    with pytest.raises(ValueError, match=rf"file must be .*{message}.*{PATH}"):
        read(data, PATH)


@pytest.mark.parametrize(
    "path", ["", "s01s02/00/001/", "s01s02/09/001/", "s1s2/01/001/", "s01s02/01/1/"], ids=lambda path: path or "none"
)
def test_bad_paths(path):
    with pytest.raises(ValueError, match="at s<actor>s<actor>/<class 01..08>"):
        read(text(poses(1)), f"{path}skeleton_pos.txt")


def test_files_of_one_name_are_told_apart_by_folders(tmp_path):
    for number, folder in enumerate(("s02s01/01/001", "s01s02/01/002", "s01s02/01/001")):
        (tmp_path / "src" / folder).mkdir(parents=True)
        (tmp_path / "src" / folder / "skeleton_pos.txt").write_bytes(text(poses(3, number)))
    with tarfile.open(tmp_path / "a.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "src", "data")
    pack.pack_source("sbu", tmp_path / "src", tmp_path / "out", progress=False)
    pack.pack_source("sbu", tmp_path / "a.tar.xz", tmp_path / "other", progress=False)
    dataset = open_dataset(tmp_path / "out", verify=True)
    assert dataset.names.tolist() == ["s01s02_01_001", "s01s02_01_002", "s02s01_01_001"]
    assert (tmp_path / "out" / "meta.json").read_bytes() == (tmp_path / "other" / "meta.json").read_bytes()
    # the same triple once more, somewhere else
    (tmp_path / "src" / "copy" / "s01s02" / "01" / "002").mkdir(parents=True)
    (tmp_path / "src" / "copy" / "s01s02" / "01" / "002" / "skeleton_pos.txt").write_bytes(text(poses(1)))
    with pytest.raises(ValueError, match=r"distinct names, got 's01s02_01_002' from copy/s01s02.* and s01s02"):
        pack.pack_source("sbu", tmp_path / "src", tmp_path / "third", progress=False)
    assert not (tmp_path / "third").exists()


@pytest.fixture(scope="module")
def real(data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("sbu") / "out"
    summary = pack.pack_source("sbu", data_dir / "sbu" / "sbu_txt.tar.xz", out, progress=False)
    return summary, open_dataset(out, verify=True)


def test_real_counts(real):
    summary, dataset = real
    assert (summary.clips, summary.frames, summary.bodies) == (282, 6_822, 2)
    assert summary.skipped == summary.notes == ()
    assert np.bincount(dataset.labels).tolist() == [42, 43, 40, 41, 18, 21, 39, 38]
    assert len(np.unique(dataset.names)) == 282


def test_real_numbers_are_those_of_the_text(real, data_dir):
    _, dataset = real
    with tarfile.open(data_dir / "sbu" / "sbu_txt.tar.xz") as archive:
        members = [member for member in archive if member.isfile()][::40]
        for member in members:
            pair, action, repetition = member.name.split("/")[-4:-1]
            lines = archive.extractfile(member).read().decode().split("\n")
            values = [[float(word) for word in line.split(",")] for line in lines if line.strip()]
            index = dataset.index_of(f"{pair}_{action}_{repetition}")
            expected = np.array([line[1:] for line in values], dtype=np.float32).reshape(-1, 2, 15, 3)
            np.testing.assert_array_equal(dataset.clip(index), expected)
            assert dataset.column("frame_id", index).tolist() == [line[0] for line in values]


def test_real_classes_are_what_their_names_say(real):
    _, dataset = real
    torso, feet = dataset.topology.joint("torso"), [dataset.topology.joint(f"{side}_foot") for side in ("left", "right")]
    start, end, nearest, kick = np.zeros((4, len(dataset)))
    for index in range(len(dataset)):
        clip = dataset.clip(index).astype(np.float64)
        apart = np.abs(clip[:, 0, torso, 0] - clip[:, 1, torso, 0])
        start[index], end[index], nearest[index] = apart[0], apart[-1], apart.min()
        kick[index] = np.ptp(clip[:, :, feet, 1], axis=0).max()
    mean = {name: dataset.labels == number for number, name in enumerate(CLASSES)}
    assert (end - start)[mean["approaching"]].mean() < -0.2 < 0.2 < (end - start)[mean["departing"]].mean()
    assert max(CLASSES, key=lambda name: kick[mean[name]].mean()) == "kicking"
    assert min(CLASSES, key=lambda name: nearest[mean[name]].mean()) == "hugging"
    # y points down
    height = dataset.frames[..., 1].mean(axis=(0, 1))
    order = ["head", "neck", "torso", "left_hip", "left_knee", "left_foot"]
    assert sorted(order, key=lambda joint: height[dataset.topology.joint(joint)]) == order


def test_real_folds(real):
    _, dataset = real
    tests = [split(dataset, f"fold{number}").test for number in range(1, 6)]
    assert [len(test) for test in tests] == [55, 52, 56, 54, 65]
    assert sorted(np.concatenate(tests).tolist()) == list(range(282))


def test_folds_are_pairs_of_actors(tmp_path):
    pairs = [(1, 2), (2, 1), (3, 4), (4, 3), (5, 2)]
    columns = {"actor": [a for a, _ in pairs], "partner": [b for _, b in pairs]}
    dataset = pack.pack_arrays(
        [np.ones((2, 2, 15, 3))] * 5, topology="sbu-15", out=tmp_path / "set", columns=columns, source="sbu"
    )
    assert split(dataset, "fold1").test.tolist() == [0, 2, 4]
    assert split(dataset, "fold5").test.tolist() == [3]
    with pytest.raises(ValueError, match="protocol must be one of"):
        split(dataset, "fold1:2")


def test_format():
    entry = FORMATS["sbu"]
    assert (entry.units, entry.up_axis) == ("normalised", "-y")
