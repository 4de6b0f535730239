"""Archives of CTR-GCN and MAMP become the clips, labels and parts that they hold."""

from __future__ import annotations

import tracemalloc
import zipfile

import numpy as np
import pytest

LENGTHS = (5, 12, 1, 30)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_ctr_gcn(prepared, tmp_path, save):
    clips = prepared.random_clips(LENGTHS)
    clips[0][2] = 0
    clips[2][:] = 0
    path = tmp_path / "NTU60_CS.npz"
    prepared.write_ctr_gcn(path, {"train": (clips[:3], [0, 59, 2]), "test": (clips[3:], [1])}, save=save)
    dataset, _ = prepared.packed("ctr-gcn", path, tmp_path, dataset="ntu60")
    # zero frames inside of a clip stay, a clip of zeros keeps one
    prepared.same(dataset, clips)
    assert dataset.names.tolist() == ["train-000000", "train-000001", "train-000002", "test-000000"]
    assert dataset.labels.tolist() == [0, 59, 2, 1] and dataset.num_bodies.tolist() == [2, 1, 0, 1]
    assert {part: rows.tolist() for part, rows in dataset.splits["cs"].items()} == {"train": [0, 1, 2], "test": [3]}
    assert (dataset.meta["units"], dataset.meta["up_axis"], dataset.topology.name) == ("metres", "y", "ntu-25")


def test_ctr_gcn_is_read_as_a_stream(prepared, tmp_path):
    # 48 MB unpacked in two parts
    path = tmp_path / "big.npz"
    zeros = np.zeros((130, 300, 150), np.float32)
    zeros[:, 0] = 1
    np.savez_compressed(path, x_train=zeros, y_train=np.eye(130), x_test=zeros, y_test=np.arange(130))
    del zeros
    tracemalloc.start()
    try:
        dataset, _ = prepared.packed("ctr-gcn", path, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert dataset.labels.tolist() == [*range(130), *range(130)] and len(dataset.frames) == 260
    assert peak < 12 << 20


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path.read_bytes()


X, Y = np.ones((2, 5, 150), np.float32), np.eye(2)
CTR_FAULTS = {
    "no x": (dict(a=X), "an .npz file with x_train or x_test, got none"),
    "no y": (dict(x_train=X), "with y_train beside x_train, got none"),
    "width": (dict(x_train=X[..., :70], y_train=Y), r"x_train of shape \(N, T, bodies \* 75\), got \(2, 5, 70\)"),
    "rows": (dict(x_train=X, y_train=np.eye(3)), "y_train of 2 rows as x_train, got 3"),
    "two hot": (dict(x_train=X, y_train=np.ones((2, 2))), "y_train one-hot, .* in row 0"),
    "none hot": (dict(x_train=X, y_train=np.array([[1, 0], [0, 0]])), "y_train one-hot, .* in row 1"),
    "twos": (dict(x_train=X, y_train=2 * Y), "y_train one-hot, .* in row 0"),
    "floats": (dict(x_train=X, y_train=np.array([0.5, 1])), "whole numbers of at least -1, got 0.5"),
    "NaN": (dict(x_train=X * np.nan, y_train=Y), r"clip 0 \('train-000000'\) must be finite"),
    "objects": (dict(x_train=np.array([[["a", None]]]), y_train=Y), "made of arrays of numbers in C order, got object"),
    "fortran": (dict(x_train=np.asfortranarray(X), y_train=Y), "in Fortran order"),
    "wide rows": (dict(x_train=np.ones((1, 120_000, 150)), y_train=Y[:1, :1]), "of clips of at most 64 MiB, got 144000000"),
}


@pytest.mark.parametrize("case", CTR_FAULTS)
def test_ctr_gcn_faults(prepared, tmp_path, case):
    arrays, message = CTR_FAULTS[case]
    npz(tmp_path / "file.npz", **arrays)
    prepared.refused("ctr-gcn", tmp_path / "file.npz", tmp_path, message)


def test_ctr_gcn_damage(prepared, tmp_path):
    path = tmp_path / "file.npz"
    prepared.write_ctr_gcn(path, {"train": (prepared.random_clips((5, 6)), [0, 1])}, frames=6, classes=2)
    data = path.read_bytes()
    for length in [*range(0, len(data), 487), len(data) - 1]:
        path.write_bytes(data[:length])
        prepared.refused("ctr-gcn", path, tmp_path, "a complete .npz file without Python objects, got a damaged one")
    # one number changed: the archive's checksum tells
    at = data.index(b"x_train.npy") + 2000
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    prepared.refused("ctr-gcn", path, tmp_path, "a damaged one .*CRC")


def test_ctr_gcn_headers_are_not_believed(prepared, tmp_path):
    path = tmp_path / "file.npz"
    header = np.lib.format
    # one clip more than announced
    with zipfile.ZipFile(path, "w") as archive, archive.open("x_train.npy", "w") as x_file:
        header.write_array_header_1_0(x_file, {"descr": "<f4", "fortran_order": False, "shape": (1, 5, 150)})
        x_file.write(X.tobytes())
    with zipfile.ZipFile(path, "a") as archive, archive.open("y_train.npy", "w") as y_file:
        np.save(y_file, np.zeros(1, np.int64))
    prepared.refused("ctr-gcn", path, tmp_path, r"x_train of 6128 bytes for shape \(1, 5, 150\), not 3128")
    # a billion clips announced, one there
    with zipfile.ZipFile(path, "w") as archive:
        for name, shape, content in (
            ("x_train", (10**9, 5, 150), X[:1].tobytes()),
            ("y_train", (10**9,), np.zeros(1, np.int64).tobytes()),
        ):
            with archive.open(f"{name}.npy", "w") as file:
                descr = "<f4" if name == "x_train" else "<i8"
                header.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
                file.write(content)
    prepared.refused("ctr-gcn", path, tmp_path, r"x_train of 3128 bytes for shape \(1000000000, 5, 150\)")


def test_ctr_gcn_archives_are_not_believed(prepared, tmp_path):
    path = tmp_path / "file.npz"
    num_clips, header = 10**6, np.lib.format
    claimed = 128 + num_clips * 5 * 150 * 4
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("x_train.npy", "w") as file:
            header.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (num_clips, 5, 150)})
        with archive.open("y_train.npy", "w") as file:
            np.save(file, np.zeros(num_clips, np.int8))
    data = bytearray(path.read_bytes())
    # the directory says that the frames are there, and a million labels are a kilobyte
    at = data.index(b"PK\1\2") + 24
    data[at : at + 4] = claimed.to_bytes(4, "little")
    path.write_bytes(data)
    assert len(data) < 3000
    prepared.refused("ctr-gcn", path, tmp_path, f"x_train of {claimed} bytes, in ")
    x = np.ones((2, 3, 75), np.float32)
    for shape, message in (((), r"\(N, K\), got shape \(\)"), ((2, 2, 2), "one-hot"), ((3,), "of 2 rows as x_train, got 3")):
        np.savez(path, x_train=x, y_train=np.zeros(shape, int))
        prepared.refused("ctr-gcn", path, tmp_path, message)
