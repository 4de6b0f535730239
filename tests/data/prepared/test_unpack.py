"""What is written for other tools holds the packed clips bit for bit, and is what those tools load."""

from __future__ import annotations

import errno
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest

from fastskel.data.formats import PREPARED
from fastskel.data.pack import pack_arrays, pack_source
from fastskel.data.packed import open_dataset
from fastskel.data.protocols import split
from fastskel.data.unpack import UNPACKERS, FixedSize, PysklContent, unpack_agcn, unpack_ctr_gcn, unpack_pyskl

LENGTHS = (5, 12, 1, 30)
SPLITS = {"xsub": {"train": [0, 3], "test": [1, 2]}, "other": {"train": [1], "test": [0]}}


@pytest.fixture
def dataset(prepared, tmp_path):
    """Four clips of NTU RGB+D, every second one with a single body, a zero frame inside of one."""
    clips = prepared.random_clips(LENGTHS)
    clips[1][4] = 0
    # the smallest numbers and the sign of zero survive
    clips[0][0, 0, 0] = [np.float32(1e-45), -0.0, 3e38]
    names = [f"clip {number} é" for number in range(4)]
    path = tmp_path / "data"
    return pack_arrays(
        clips, out=path, topology="ntu-25", labels=[0, 5, 2, 1], names=names, splits=SPLITS, num_frames="all"
    )


def bits(frames) -> bytes:
    return np.ascontiguousarray(frames).tobytes()


@pytest.mark.parametrize("name", list(UNPACKERS))
def test_packed_again_it_is_the_same(tmp_path, dataset, name):
    target = tmp_path / {"agcn": "xsub", "ctr-gcn": "a_xsub.npz", "pyskl": "a.pkl"}[name]
    options = PysklContent() if name == "pyskl" else FixedSize(protocol="xsub")
    UNPACKERS[name].write(dataset, target, options)
    assert name in PREPARED and UNPACKERS[name].about
    pack_source(name, target, tmp_path / "again", progress=False)
    again = open_dataset(tmp_path / "again", verify=True)
    parts = split(dataset, "xsub")
    # PYSKL keeps the order, the others put the training part first
    order = range(4) if name == "pyskl" else [*parts.train, *parts.test]
    for number, index in enumerate(order):
        assert bits(again.clip(number)) == bits(dataset.clip(int(index)))
        assert again.labels[number] == dataset.labels[index] and again.num_bodies[number] == dataset.num_bodies[index]
        assert name == "ctr-gcn" or again.names[number] == dataset.names[index]
    found, expected = split(again, "xsub"), [list(order).index(index) for index in parts.train]
    assert found.train.tolist() == sorted(expected) and len(found.test) == 2
    assert list(again.splits) == (["other", "xsub"] if name == "pyskl" else ["xsub"])


def test_agcn_is_what_its_loaders_expect(tmp_path, dataset):
    unpack_agcn(dataset, tmp_path / "out", FixedSize("xsub", frames=40, bodies=3))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        f"{part}_{kind}" for part in ("train", "val") for kind in ("data_joint.npy", "label.pkl", "num_frame.npy")
    )
    data = np.load(tmp_path / "out" / "train_data_joint.npy", mmap_mode="r")
    assert data.shape == (2, 3, 40, 25, 3) and data.dtype == np.float32 and data.flags.c_contiguous
    assert np.array_equal(data[1, :, :30, :, :2].transpose(1, 3, 2, 0), dataset.clip(3))
    assert not data[1, :, 30:].any() and not data[..., 2].any()
    names, labels = pickle.loads((tmp_path / "out" / "val_label.pkl").read_bytes())
    assert names == ["clip 1 é", "clip 2 é"] and labels == [5, 2]
    assert np.load(tmp_path / "out" / "val_num_frame.npy").tolist() == [12, 1]


def test_ctr_gcn_is_what_its_feeder_expects(tmp_path, dataset):
    unpack_ctr_gcn(dataset, tmp_path / "out.npz", FixedSize("xsub"))
    with np.load(tmp_path / "out.npz") as archive:
        assert sorted(archive) == ["x_test", "x_train", "y_test", "y_train"]
        x, y = archive["x_train"], archive["y_train"]
    assert x.shape == (2, 300, 150) and x.dtype == np.float32 and y.shape == (2, 6)
    assert np.where(y > 0)[1].tolist() == [0, 1] and y.sum() == 2
    # as its feeder reshapes: (N, C, T, V, M)
    feeder = x.reshape(2, 300, 2, 25, 3).transpose(0, 4, 1, 3, 2)
    assert np.array_equal(feeder[1, :, :30].transpose(1, 3, 2, 0), dataset.clip(3))
    unpack_ctr_gcn(dataset, tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as archive:
        assert sorted(archive) == ["x_train", "y_train"] and len(archive["x_train"]) == 4


def test_pyskl_is_what_its_loaders_expect(tmp_path, dataset):
    unpack_pyskl(dataset, tmp_path / "out.pkl", PysklContent(("xsub",)))
    content = pickle.loads((tmp_path / "out.pkl").read_bytes())
    assert content["split"] == {"xsub_train": ["clip 0 é", "clip 3 é"], "xsub_val": ["clip 1 é", "clip 2 é"]}
    rows = content["annotations"]
    assert [row["keypoint"].shape for row in rows] == [(2, 5, 25, 3), (1, 12, 25, 3), (2, 1, 25, 3), (1, 30, 25, 3)]
    assert [(row["label"], row["total_frames"]) for row in rows] == [(0, 5), (5, 12), (2, 1), (1, 30)]
    assert all(type(row["label"]) is int and row["keypoint"].flags.writeable for row in rows)
    assert set(rows[0]) == {"frame_dir", "label", "total_frames", "keypoint"}


def test_pyskl_in_2d(prepared, tmp_path):
    rows = [prepared.annotation(name, clip, 3) for name, clip in zip("ab", prepared.random_clips((4, 6), joints=17))]
    path = prepared.write_pyskl(tmp_path, rows, train=["a"], val=["b"])
    dataset, _ = prepared.packed("pyskl", path, tmp_path)
    unpack_pyskl(dataset, tmp_path / "out.pkl")
    for found, row in zip(pickle.loads((tmp_path / "out.pkl").read_bytes())["annotations"], rows, strict=True):
        seen = 2 if row["frame_dir"] == "a" else 1
        assert np.array_equal(found["keypoint"], row["keypoint"][:seen]) and found["img_shape"] == (1080, 1920)
        assert np.array_equal(found["keypoint_score"], row["keypoint_score"][:seen])
    again, _ = prepared.packed("pyskl", tmp_path / "out.pkl", tmp_path / "again")
    assert bits(again.frames) == bits(dataset.frames) and again.splits.keys() == {"default"}


def test_nothing_is_gathered_in_memory(prepared, tmp_path):
    draws = np.random.default_rng(0)
    clips = (draws.normal(size=(200, 2, 25, 3)).astype("f4") for _ in range(150))
    dataset = pack_arrays(clips, out=tmp_path / "data", topology="ntu-25", labels=[0] * 150)
    assert dataset.frames.nbytes > 17 << 20
    for name in UNPACKERS:
        tracemalloc.start()
        try:
            UNPACKERS[name].write(dataset, tmp_path / f"{name}.out", UNPACKERS[name].options)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 3 << 20, name


def test_the_same_data_give_the_same_bytes(tmp_path, dataset):
    for name in UNPACKERS:
        for out in ("one", "two"):
            UNPACKERS[name].write(dataset, tmp_path / f"{name}-{out}", UNPACKERS[name].options)
        one, two = tmp_path / f"{name}-one", tmp_path / f"{name}-two"
        pairs = [(one, two)] if one.is_file() else [(path, two / path.name) for path in one.iterdir()]
        assert pairs and all(a.read_bytes() == b.read_bytes() for a, b in pairs)
    # also in another minute
    with zipfile.ZipFile(tmp_path / "ctr-gcn-one") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize("name", list(UNPACKERS))
def test_destinations(tmp_path, monkeypatch, dataset, name):
    write, options = UNPACKERS[name].write, UNPACKERS[name].options
    (tmp_path / "taken").touch()
    with pytest.raises(ValueError, match="^unpack_.*: destination must be new, got the existing .*taken"):
        write(dataset, tmp_path / "taken", options)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="^unpack_.*: destination must be writable, got .*, in .*out"):
        write(dataset, tmp_path / "file" / "out", options)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(tmp_path.iterdir())
    for writer in ("_write_header", "write_pickle"):
        monkeypatch.setattr(f"fastskel.data.unpack.{writer}", full)
    with pytest.raises(ValueError, match="^unpack_.*: destination must be writable, got No space left on device, in .*out"):
        write(dataset, tmp_path / "out", options)
    assert sorted(tmp_path.iterdir()) == before


def test_what_does_not_fit(tmp_path, dataset, prepared):
    for write in (unpack_agcn, unpack_ctr_gcn):
        for options, message in (
            (FixedSize(frames=29), "frames must be at least 30, as the data set has, got 29"),
            (FixedSize(bodies=1), "bodies must be at least 2, as the data set has, got 1"),
            (FixedSize(protocol="xview"), "protocol must be one of .*other, xsub.*got 'xview'"),
        ):
            with pytest.raises(ValueError, match=f"{message}.*{dataset.path.name}"):
                write(dataset, tmp_path / "out", options)
    with pytest.raises(ValueError, match="protocol must be one of .*got 'xview'"):
        unpack_pyskl(dataset, tmp_path / "out", PysklContent(("xview",)))
    clips = prepared.random_clips((4,), channels=2)
    flat = pack_arrays(clips, out=tmp_path / "flat", topology="ntu-25", channels=["x", "z"], labels=[1])
    with pytest.raises(ValueError, match="unpack_ctr_gcn: data set must be of three channels, got 2, in .*flat"):
        unpack_ctr_gcn(flat, tmp_path / "out")
    with pytest.raises(ValueError, match="unpack_pyskl: data set must be of channels .*, got x z, in .*flat"):
        unpack_pyskl(flat, tmp_path / "out")
    unknown = pack_arrays(prepared.random_clips((4, 4)), out=tmp_path / "unknown", topology="ntu-25", labels=[1, -1])
    with pytest.raises(ValueError, match="labelled throughout, got none for clip-000001, in .*unknown"):
        unpack_ctr_gcn(unknown, tmp_path / "out")
    assert not (tmp_path / "out").exists()
