"""`.npy` files of others are mapped if they are whole, and refused with a ValueError whatever their headers claim."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest

from fastskel.data.formats import FORMATS
from fastskel.data.npy_file import map_npy, read_npy_header


def with_header(text: str, data: bytes = b"", version: int = 1) -> bytes:
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes((version, 0)) + length + text.encode("latin1") + data


def header(descr: object, shape: object, fortran: object = False) -> str:
    return repr({"descr": descr, "fortran_order": fortran, "shape": shape}) + "\n"


@pytest.mark.parametrize(
    "array",
    [np.arange(24, dtype="f4").reshape(2, 3, 4), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.zeros((0, 3)),
     np.arange(3, dtype=">i2"), np.array(["a", "bc"]), np.array(7)],
    ids=["plain", "fortran", "empty", "big endian", "text", "scalar"],
)  # fmt: skip
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_what_numpy_writes_is_mapped(tmp_path, array, version):
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array(file, array, version)
    found = map_npy(tmp_path / "a.npy")
    assert found.dtype == array.dtype and found.shape == array.shape and np.array_equal(found, array)
    assert isinstance(found, np.memmap) == (array.size > 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "magic"),
        (b"\x93NUMPY\x01\x00", "EOF"),
        (b"\x93NUMPY\x02\x00w\x00\x06\xbe" + bytes(2000), "a header of 3188064375 bytes"),
        (with_header(header("<f4", (3,)), bytes(12), version=3), r"version 3.0 of the .npy format"),
        (with_header("{'descr': '<f4', 'shape': (", bytes(12)), "a damaged header, TokenError"),
        (with_header("-" * 9000 + "1", bytes(12)), "header"),
        (with_header(header("<f4", (10**9, 10**9, 10**9)), bytes(12)), "12 bytes for shape"),
        (with_header(header("<f4", (3,)), bytes(11)), r"11 bytes for shape \(3,\), not 12"),
        (with_header(header("<f4", (3,)), bytes(13)), r"13 bytes for shape \(3,\), not 12"),
        (with_header(header("<f4", (-3, -1)), bytes(12)), r"a header of shape \(-3, -1\)"),
        (with_header(header("<U0", (10**9,))), "values of type <U0"),
        (with_header(header("|V0", (10**9,))), "values of type"),
        (with_header(header("|O", (1,)), bytes(8)), "values of type object"),
        (with_header(header("<f4", (True,)), bytes(4)), "shape"),
    ],
    ids=[
        "empty", "cut", "length", "version", "expression", "nested", "claim", "short", "long", "negative", "text of nothing",
        "nothing", "objects", "bool",
    ],
)  # fmt: skip
def test_damaged_files_are_refused_and_not_believed(tmp_path, data, message):
    path = tmp_path / "a.npy"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            map_npy(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000


def test_a_stream_stands_at_the_numbers():
    stream = io.BytesIO(with_header(header("<i4", (2,)), b"12345678"))
    assert read_npy_header(stream) == ((2,), False, np.dtype("<i4")) and stream.read() == b"12345678"


@pytest.mark.parametrize(("name", "data"), [("csv", b"1,2,3\n" * 2), ("json", b"[[[1, 2, 3]]]")])
@pytest.mark.parametrize("stem", ["a\x07b", " ", "a\u2028"])
def test_names_of_clips_are_printable(tmp_path, name, data, stem):
    layout = tmp_path / "one.json"
    layout.write_text('{"name": "one", "joints": ["hip"], "parents": [0]}')
    read = FORMATS[name].reader({"topology": str(layout)})
    assert read(data, f"a b.{name}").name == "a b"
    with pytest.raises(ValueError, match="must be named in printable characters"):
        read(data, f"{stem}.{name}")
