"""The packed format: what is written is what is read, and nothing else is accepted."""

import json
import pickle

import numpy as np
import pytest

from fastskel.data import pack
from fastskel.data.packed import open_dataset

JOINTS = 15


@pytest.fixture
def clips():
    rng = np.random.default_rng(0)
    return [
        rng.normal(size=(frames, bodies, JOINTS, 3)).astype(np.float32) for frames, bodies in ((4, 1), (1, 2), (6, 1))
    ]


@pytest.fixture
def packed(tmp_path, clips):
    pack.pack_arrays(
        clips,
        labels=[0, 1, -1],
        names=["a", "b", "c"],
        class_names=["walk", "run"],
        topology="sbu-15",
        out=tmp_path / "set",
        columns={"subject": [1, 2, 3], "phase": [np.arange(len(clip)) for clip in clips]},
        splits={"mine": {"train": ["a", 1], "test": ["c"]}},
        segments=[("c", 1, 2, 5, 0.5), (0, 0, 0, 4)],
    )
    return tmp_path / "set"


def test_reads_what_was_packed(packed, clips):
    dataset = open_dataset(packed, verify=True)
    assert len(dataset) == 3 and dataset.num_bodies_max == 2 and dataset.channels == 3
    assert dataset.frames.dtype == np.float32 and dataset.frames.shape == (11, 2, JOINTS, 3)
    assert dataset.num_frames.tolist() == [4, 1, 6] and dataset.num_bodies.tolist() == [1, 2, 1]
    for index, clip in enumerate(clips):
        np.testing.assert_array_equal(dataset.clip(index)[:, : clip.shape[1]], clip)
        assert not dataset.clip(index)[:, clip.shape[1] :].any()
        assert dataset.column("phase", index).tolist() == list(range(len(clip)))
    assert dataset.labels.tolist() == [0, 1, -1] and dataset.class_names == ["walk", "run"]
    assert dataset.names.tolist() == ["a", "b", "c"] and dataset.index_of("b") == 1
    assert dataset.column("subject", 2) == 3 and not dataset.per_frame("subject") and dataset.per_frame("phase")
    assert {k: v.tolist() for k, v in dataset.splits["mine"].items()} == {"train": [0, 1], "test": [2]}
    assert dataset.segments.tolist() == [[2, 1, 2, 5, 0.5], [0, 0, 0, 4, 1]]
    assert dataset.source == "custom" and dataset.topology.name == "sbu-15"


def test_clips_are_read_only_views(packed):
    dataset = open_dataset(packed)
    clip = dataset.clip(0)
    assert type(clip) is np.ndarray and np.shares_memory(clip, dataset.frames)
    with pytest.raises(ValueError, match="read-only"):
        clip[0] = 0


def test_plain_numpy_reads_every_array(packed):
    for path in packed.glob("*.npy"):
        array = np.load(path, allow_pickle=False)
        assert array.dtype.kind in "iufU" and array.flags.c_contiguous
    assert np.load(packed / "frames.npy").nbytes + 128 == (packed / "frames.npy").stat().st_size


@pytest.mark.parametrize("index", [-1, 3])
def test_index_out_of_range_names_the_folder(packed, index):
    with pytest.raises(ValueError, match=rf"range\(3\), got {index}, in .*set"):
        open_dataset(packed).clip(index)


def test_unknown_names_are_refused(packed):
    dataset = open_dataset(packed)
    with pytest.raises(ValueError, match="got 'd'"):
        dataset.index_of("d")
    with pytest.raises(ValueError, match="must be of phase, subject, got 'camera'"):
        dataset.column("camera")


def edit_meta(packed, **changes):
    meta = json.loads((packed / "meta.json").read_text())
    meta.update(changes)
    (packed / "meta.json").write_text(json.dumps(meta))


# clip 0 has 4 frames, and there are two classes
SEGMENTS = {
    "segment of half a clip": [0.5, 0, 0, 1, 1],
    "segment of no class": [0, 2, 0, 1, 1],
    "segment of class -1": [0, -1, 0, 1, 1],
    "segment before its clip": [0, 0, -1, 1, 1],
    "segment beyond its clip": [0, 0, 0, 5, 1],
    "segment starts beyond its clip": [0, 0, 5, 3, 1],
    "segment ends before its clip": [0, 0, 2, -3, 1],
    "segment between frames": [0, 0, 0.5, 2, 1],
    "segment of infinite end": [0, 0, 0, np.inf, 1],
    "segment of confidence NaN": [0, 0, 0, 1, np.nan],
}


def damage(packed, case):
    if case == "frames shorter":
        data = (packed / "frames.npy").read_bytes()
        (packed / "frames.npy").write_bytes(data[:-100])
    elif case == "header cut":
        (packed / "frames.npy").write_bytes((packed / "frames.npy").read_bytes()[:50])
    elif case == "fewer frames":
        np.save(packed / "frames.npy", np.load(packed / "frames.npy")[:-1])
    elif case == "double frames":
        np.save(packed / "frames.npy", np.load(packed / "frames.npy").astype(np.float64))
    elif case == "other joints":
        np.save(packed / "frames.npy", np.load(packed / "frames.npy")[:, :, :-1])
    elif case == "offsets fall":
        np.save(packed / "offsets.npy", np.array([0, 5, 4, 11]))
    elif case == "offsets start late":
        np.save(packed / "offsets.npy", np.array([1, 4, 5, 11]))
    elif case == "no clips":
        np.save(packed / "offsets.npy", np.array([], dtype=np.int64))
    elif case == "names twice":
        np.save(packed / "names.npy", np.array(["a", "a", "c"]))
    elif case == "labels too high":
        np.save(packed / "labels.npy", np.array([0, 2, -1]))
    elif case == "labels too low":
        np.save(packed / "labels.npy", np.array([0, -2, -1]))
    elif case == "labels missing":
        (packed / "labels.npy").unlink()
    elif case == "column short":
        np.save(packed / "subject.npy", np.array([1, 2]))
    elif case == "segment of no clip":
        np.save(packed / "segments.npy", np.array([[3.0, 0, 0, 1, 1]]))
    elif case in SEGMENTS:
        np.save(packed / "segments.npy", np.array([[0, 0, 0, 1, 1], SEGMENTS[case]], dtype=float))
    elif case == "offsets overflow":
        np.save(packed / "offsets.npy", np.array([0, 2**63 - 1, -(2**63), 11]))
    elif case == "bodies negative":
        np.save(packed / "num_bodies.npy", np.array([1, -2, 1]))
    elif case == "bodies without room":
        np.save(packed / "num_bodies.npy", np.array([1, 3, 1]))
    elif case == "axis unknown":
        edit_meta(packed, up_axis="up")
    elif case == "channels of numbers":
        edit_meta(packed, channels=["x", "y", 3])
    elif case == "class names of numbers":
        edit_meta(packed, class_names=["a", 3])
    elif case == "split of no clip":
        (packed / "splits.json").write_text('{"mine": {"train": [3], "test": []}}')
    elif case == "split of no number":
        (packed / "splits.json").write_text('{"mine": {"train": ["a"], "test": []}}')
    elif case == "meta cut":
        (packed / "meta.json").write_text('{"format_version": 1')
    elif case == "meta no object":
        (packed / "meta.json").write_text("[]")
    elif case == "meta missing":
        (packed / "meta.json").unlink()
    elif case == "unknown version":
        edit_meta(packed, format_version=99)
    elif case == "unknown topology":
        edit_meta(packed, topology="octopus-8")
    elif case == "column outside":
        edit_meta(packed, columns={"../subject": "clip"})
    elif case == "checksum outside":
        edit_meta(packed, checksums={"../x": ""})
    elif case == "units missing":
        edit_meta(packed, units=None)


CASES = {
    "frames shorter": "frames.npy",
    "header cut": "frames.npy",
    "fewer frames": "11 as the offsets say, got 10, in .*frames.npy",
    "double frames": "float64 with 4 axes, in .*frames.npy",
    "other joints": "those of 'sbu-15', got 14, in .*frames.npy",
    "offsets fall": "increasing, got a step of -1 at clip 1, in .*offsets.npy",
    "offsets start late": "offsets.npy",
    "no clips": "offsets.npy",
    "names twice": "unique, got duplicates, in .*names.npy",
    "labels too high": "below the 2 class names, got 2, in .*labels.npy",
    "labels too low": "-1 or a class, got -2, in .*labels.npy",
    "labels missing": "no such file, in .*labels.npy",
    "column short": "length must be 3, got 2, in .*subject.npy",
    "segment of no clip": r"segment 0 must be of a clip in range\(3\), got \[3.0, .*segments.npy",
    "segment of half a clip": "segment 1 must be finite, its clip, class, start and end whole.*segments.npy",
    "segment of no class": r"segment 1 must be of a class in range\(2\), got \[0.0, 2.0.*segments.npy",
    "segment of class -1": r"segment 1 must be of a class in range\(2\)",
    "segment before its clip": "segment 1 must be of start and end within its clip, got .*segments.npy",
    "segment beyond its clip": "segment 1 must be of start and end within its clip",
    "segment starts beyond its clip": "segment 1 must be of start and end within its clip",
    "segment ends before its clip": "segment 1 must be of start and end within its clip",
    "segment between frames": "segment 1 must be finite, .* whole",
    "segment of infinite end": "segment 1 must be finite",
    "segment of confidence NaN": "segment 1 must be finite",
    "offsets overflow": "increasing, got a step of -18446744073709551615 at clip 1, in .*offsets.npy",
    "bodies negative": "num_bodies must be in 0 .. 2, got -2 .. 1, in .*num_bodies.npy",
    "bodies without room": "num_bodies must be in 0 .. 2, got 1 .. 3, in .*num_bodies.npy",
    "axis unknown": "up_axis must be one of x, y, z, -x, -y, -z, got 'up', in .*meta.json",
    "channels of numbers": r"channels must be a list of strings, got \['x', 'y', 3\], in .*meta.json",
    "class names of numbers": "class_names must be a list of strings, .* in .*meta.json",
    "split of no clip": "splits.json",
    "split of no number": "splits.json",
    "meta cut": "unreadable one .*meta.json",
    "meta no object": "a JSON object, got list, in .*meta.json",
    "meta missing": "no such file, in .*meta.json",
    "unknown version": "format_version must be 1, got 99, in .*meta.json",
    "unknown topology": "octopus-8, in .*meta.json",
    "column outside": "column name must be",
    "checksum outside": "plain file names",
    "units missing": "units must be a str",
}


@pytest.mark.parametrize("case", CASES)
def test_damage_is_named(packed, case):
    damage(packed, case)
    with pytest.raises(ValueError, match=f"open_dataset: .*{CASES[case]}"):
        open_dataset(packed)


@pytest.mark.parametrize("bounds", [(2, 2), (3, 1), (4, 0)], ids=str)
def test_a_reversed_segment_is_read(packed, bounds):
    np.save(packed / "segments.npy", np.array([[0, 1, *bounds, 1]], dtype=float))
    assert open_dataset(packed).segments[0, 2:4].tolist() == list(bounds)


def test_verify_finds_a_changed_byte(packed):
    data = bytearray((packed / "frames.npy").read_bytes())
    data[-1] ^= 1
    (packed / "frames.npy").write_bytes(bytes(data))
    open_dataset(packed)
    with pytest.raises(ValueError, match="checksum says, got other contents, in .*frames.npy"):
        open_dataset(packed, verify=True)


class Payload:
    """Unpickling it would create the marker file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("file", ["names.npy", "frames.npy", "subject.npy", "labels.npy"])
@pytest.mark.parametrize("form", ["object array", "bare pickle"])
def test_a_pickle_is_refused_unread(packed, tmp_path, file, form):
    marker = tmp_path / "executed"
    if form == "object array":
        np.save(packed / file, np.array([Payload(marker)] * 3, dtype=object), allow_pickle=True)
    else:
        (packed / file).write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(ValueError, match=rf"open_dataset: file must be .*{file}"):
        open_dataset(packed)
    assert not marker.exists()


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="no such folder, in .*nothing"):
        open_dataset(tmp_path / "nothing")
