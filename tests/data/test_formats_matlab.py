"""The reader of MATLAB 5 files, beside that of scipy."""

import contextlib
import io
import struct
import tarfile
import zlib

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from fastskel.data.formats.matlab import matlab_variables

VALUES = {
    "doubles": np.random.default_rng(0).normal(size=(3, 4, 5)),
    "singles": np.float32([[1.5, -2]]),
    "bytes": np.arange(6, dtype=np.uint8).reshape(2, 3),
    "words": np.int16([[-3], [300]]),
    "long": np.int64([[2**40]]),
    "flag": np.bool_([[True, False]]),
    "one": 7,
    "none": np.zeros((0, 13)),
    "text": "clean_and_jerk",
    "a_name_that_is_longer_than_a_tag": np.ones((1, 1)),
}


def mat(values, **options):
    buffer = io.BytesIO()
    savemat(buffer, values, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
def test_variables(compressed):
    data = mat(VALUES, do_compression=compressed)
    found, expected = matlab_variables(data, "x.mat", list(VALUES)), loadmat(io.BytesIO(data))
    for name in VALUES:
        if name == "text":
            assert found[name] == VALUES[name]
        else:
            np.testing.assert_array_equal(found[name], expected[name])
            assert found[name].dtype == expected[name].dtype and found[name].ndim >= 2
    assert list(matlab_variables(data, "x.mat", ["one"])) == ["one"]


def element(kind, content, order):
    return struct.pack(f"{order}II", kind, len(content)) + content + bytes(-len(content) % 8)


def array(order, kind, shape, content, flags=0):
    parts = [element(6, struct.pack(f"{order}II", kind | flags << 8, 0), order)]
    parts += [element(5, struct.pack(f"{order}{len(shape)}i", *shape), order), element(1, b"x", order), content]
    return element(14, b"".join(parts), order)


def file(order, *elements):
    return bytes(124) + (b"\x00\x01IM" if order == "<" else b"\x01\x00MI") + b"".join(elements)


@pytest.mark.parametrize("order", ["<", ">"])
def test_orders_of_bytes_and_narrow_numbers(order):
    # doubles stored as 16-bit numbers, which MATLAB does where they fit
    content = element(3, struct.pack(f"{order}6h", *range(-2, 4)), order)
    data = file(order, array(order, 6, (2, 3), content))
    found = matlab_variables(data, "x.mat", ["x"])["x"]
    assert found.dtype == np.float64 and found.tolist() == [[-2, 0, 2], [-1, 1, 3]]
    text = "bowl".encode("utf-16-le" if order == "<" else "utf-16-be")
    data = file(order, array(order, 4, (1, 4), element(4, text, order)))
    assert matlab_variables(data, "x.mat", ["x"]) == {"x": "bowl"}


DOUBLES = element(9, bytes(16), "<")
BOMB = zlib.compress(bytes(300 << 20), 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "complete MATLAB 5 file, got an unreadable one .no header"),
        (b"MATLAB 7.3" + bytes(500), "no header of MATLAB 5"),
        (file("<", b"1234"), "4 bytes where an element begins"),
        (file("<", struct.pack("<II", 14, 10**9)), "an element of 1000000000 bytes, 0 are left"),
        (file("<", struct.pack("<HH", 1, 9)), "4 bytes where an element begins"),
        (file("<", struct.pack("<HHI", 1, 9, 0)), "an element of 9 bytes, 4 are left"),
        (file("<", element(9, bytes(8), "<")), "an element of type 9 where a variable begins"),
        (file("<", element(14, b"", "<")), "an array without its numbers"),
        (file("<", array("<", 6, (10**9, 10**9), DOUBLES)), r"2 numbers for variable x of shape \[10{9}, 10{9}\]"),
        (file("<", array("<", 6, (-1, -2), DOUBLES)), r"variable x of shape \[-1, -2\]"),
        (file("<", array("<", 6, (2,), DOUBLES)), r"variable x of shape \[2\]"),
        (file("<", array("<", 6, (1, 2), element(9, bytes(15), "<"))), "15 bytes of numbers of 8"),
        (file("<", array("<", 6, (1, 2), b"")), "an array without its numbers"),
        (file("<", array("<", 6, (1, 2), DOUBLES, flags=8)), "made of numbers or rows of text, got variable x of class 6"),
        (file("<", array("<", 1, (1, 2), DOUBLES)), "made of numbers or rows of text, got variable x of class 1"),
        (file("<", array("<", 4, (2, 2), element(16, b"abcd", "<"))), r"variable x of text of shape \[2, 2\]"),
        (file("<", array("<", 4, (1, 1), element(16, b"\xff", "<"))), "complete MATLAB 5 file"),
        (file("<", element(15, b"zebra", "<")), "complete MATLAB 5 file"),
        (file("<", element(15, zlib.compress(array("<", 6, (1, 2), DOUBLES))[:-4], "<")), "compressed data that are cut"),
        (file("<", element(15, BOMB, "<")), "larger than 256 MiB"),
        (file("<"), "the variable x, got none of that name"),
    ],
)
def test_bad_files(data, message):
    with pytest.raises(ValueError, match=rf"pack_source: file must be .*{message}.*in a/x.mat"):
        matlab_variables(data, "a/x.mat", ["x"])


def test_any_wrong_byte_is_an_error_or_harmless():
    # one of them ends the process in scipy 1.17
    data = mat({"x": np.ones((3, 13)), "action": "bowl"})
    for place in range(len(data)):
        for value in (0, 1, 0x7F, 0xFF):
            damaged = data[:place] + bytes([value]) + data[place + 1 :]
            with contextlib.suppress(ValueError):
                found = matlab_variables(damaged, "x.mat", ["x", "action"])
                assert {type(value) for value in found.values()} <= {np.ndarray, str}


def test_genuine_files_against_scipy(data_dir):
    with tarfile.open(data_dir / "utd_mhad" / "utd_mhad_skeleton_mat.tar.xz") as archive:
        for number, member in enumerate(member for member in archive if member.name.endswith(".mat")):
            if number % 20 == 0:
                data = archive.extractfile(member).read()
                found = matlab_variables(data, member.name, ["d_skel"])["d_skel"]
                expected = loadmat(io.BytesIO(data))["d_skel"]
                np.testing.assert_array_equal(found, expected)
                assert found.dtype == expected.dtype
    assert number == 860
