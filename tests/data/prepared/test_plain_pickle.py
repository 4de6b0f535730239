"""Pickles are read as data: whatever they name, nothing is looked up, called or made larger than the file."""

from __future__ import annotations

import collections
import contextlib
import datetime
import io
import os
import pickle
import random
import re
import struct
import subprocess
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fastskel.data.formats import plain_pickle
from fastskel.data.formats.plain_pickle import load_pickle
from fastskel.data.pickle_writer import Items, write_pickle

START = "^pack_source: file must be a pickle of plain containers, numbers, text and arrays, got "
PLAIN = {
    "numbers": [0, 1, 255, 256, 65536, -1, -70000, 2**62, -(2**63), 2.5, float("inf"), True, False, None],
    "text": ["", "a", "é\n", "x" * 300, "\ud800"],
    "containers": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}, {1: [2], 0.5: 3}, {3, 4}, frozenset({"f"}), set()),
}
ARRAYS = {
    "float32": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "half": np.linspace(0, 1, 7, dtype=np.float16),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "strided": np.arange(20)[::3],
    "big endian": np.arange(3, dtype=">i4"),
    "bytes": np.arange(5, dtype=np.uint8),
    "bools": np.array([True, False]),
    "text": np.array(["ab", "c"]),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.float32(3.5),
    "whole": np.int64(7),
}


def load(data: bytes, tmp_path: Path):
    path = tmp_path / "file.pkl"
    path.write_bytes(data)
    return load_pickle(path)


def refuse(data: bytes, tmp_path: Path) -> str:
    with pytest.raises(ValueError, match=START) as caught:
        load(data, tmp_path)
    text = str(caught.value)
    assert f"in {tmp_path}" in text and text.count("\n") == 0
    return text


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_of_every_protocol(tmp_path, protocol):
    shared = ARRAYS["float32"]
    found = load(pickle.dumps({**PLAIN, "arrays": ARRAYS, "again": [shared, shared]}, protocol), tmp_path)
    assert {key: found[key] for key in PLAIN} == PLAIN
    assert [type(value) for value in found["numbers"]] == [type(value) for value in PLAIN["numbers"]]
    for name, array in ARRAYS.items():
        assert np.array_equal(found["arrays"][name], array) and found["arrays"][name].dtype == array.dtype, name
        assert found["arrays"][name].shape == array.shape
    assert found["again"][0] is found["again"][1] and not found["again"][0].flags.writeable


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_arrays_are_lists(tmp_path, protocol):
    ragged = np.empty(2, object)
    ragged[:] = [np.ones(3), np.zeros((2, 2))]
    found = load(pickle.dumps(ragged, protocol), tmp_path)
    assert isinstance(found, list) and [array.shape for array in found] == [(3,), (2, 2)]


def test_names_of_both_numpys(tmp_path):
    data = pickle.dumps([ARRAYS["float32"], np.float64(2)], 2)
    for core in (b"numpy.core.", b"numpy._core."):
        found = load(data.replace(b"numpy._core.", core).replace(b"numpy.core.", core), tmp_path)
        assert np.array_equal(found[0], ARRAYS["float32"]) and found[1] == 2


def test_python_2_arrays_are_strings(tmp_path):
    # as cPickle of Python 2 writes np.array([1, 2], "f4") in protocol 0, and text as byte strings
    dtype = b"cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
    start = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\nt"
    array = start + dtype + rb"I00" + b"\n" + rb"S'\x00\x00\x80?\x00\x00\x00@'" + b"\ntb"
    found = load(b"(" + array + b"S'S001.skeleton'\nU\x02abt.", tmp_path)
    assert found[0].tolist() == [1, 2] and found[1:] == ("S001.skeleton", "ab")


class Call:
    def __init__(self, function, *arguments):
        self.result = function, arguments

    def __reduce__(self):
        return self.result


class Stateful:
    pass


def test_nothing_is_called(tmp_path):
    marker = tmp_path / "marker"
    calls = {
        "system": Call(os.system, f"touch {marker}"),
        "eval": Call(eval, f"open({str(marker)!r}, 'w')"),
        "getattr": Call(getattr, marker, "touch"),
        "Popen": Call(subprocess.Popen, ["touch", str(marker)]),
        "load": Call(np.load, str(marker)),
        "test_plain_pickle.Stateful": Call(Stateful),
        "collections.OrderedDict": collections.OrderedDict(a=1),
        "datetime.date": datetime.date(2020, 1, 1),
        "bytearray": Call(bytearray, 1 << 40),
    }
    for name, call in calls.items():
        for protocol in range(6):
            text = refuse(pickle.dumps([ARRAYS["float32"], {"label": call}], protocol), tmp_path)
            assert f"{name}, not looked up" in text, text
    assert not marker.exists()


STACK_SYSTEM = b"\x8c\x02os\x8c\x06system\x93"
NDARRAY = b"cnumpy\nndarray\n"
DTYPE = b"cnumpy\ndtype\n"
TRICKS = {
    "INST": (b"(S'touch marker'\nios\nsystem\n.", "an object of a class"),
    "OBJ": (b"(cos\nsystem\nS'touch marker'\no.", "os.system, not looked up"),
    "OBJ of a known name": (b"(c__builtin__\nset\no.", "an object of a class"),
    "NEWOBJ": (NDARRAY + b"J\xff\xff\xff\x7f\x85\x81.", "an object of a class"),
    "NEWOBJ_EX": (NDARRAY + b")}\x92.", "an object of a class"),
    "STACK_GLOBAL": (STACK_SYSTEM + b"X\x02\0\0\0ls\x85R.", "os.system, not looked up"),
    "dotted": (b"cnumpy\nndarray.__reduce__\n.", "numpy.ndarray.__reduce__, not looked up"),
    "persistent": (b"Pmarker\n.", "a reference to something outside of it"),
    "extension": (b"\x82\x01.", "a reference to something outside of it"),
    "next buffer": (b"\x97.", "a reference to something outside of it"),
    "huge ndarray": (NDARRAY + b"\x8a\x06\xff\xff\xff\xff\xff\x7f\x85\x85R.", "a call of ndarray"),
    "build on a name": (NDARRAY + b"}X\x03\0\0\0keyK\x01sb.", "_Name used as _Pending"),
    "build on a list": (b"])b.", "list used as _Pending"),
    "void": (DTYPE + b"X\x0c\0\0\0V99999999999\x89\x88\x87R.", "an array of type 'V99999999999'"),
    "records": (DTYPE + b"X\x05\0\0\0f4,f4\x89\x88\x87R.", "an array of type 'f4,f4'"),
    "unhashed key": (b"}]K\x01s.", "list as key"),
    "NaN as key": (b"}G\x7f\xf8\0\0\0\0\0\0K\x01s.", "float as key or member of a set"),
    "tuple in a set": (b"\x8f())\x90.".replace(b"()", b"("), "tuple as key or member of a set"),
    "digits": (b"I" + b"9" * 5000 + b"\n.", "a number of 5000 digits"),
    "long": (b"\x8b\xff\xff\xff\x7f.", "announced"),
    "long of many bytes": (b"\x8a\x20" + b"\xff" * 32 + b".", "a number of 32 bytes"),
    "bytes of an exabyte": (b"\x8e" + struct.pack("<Q", 1 << 60) + b".", "announced at byte 9"),
    "frame of an exabyte": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b".", "a frame of"),
    "string of negative size": (b"T\xff\xff\xff\xff.", "-1 bytes announced"),
    "protocol 9": (b"\x80\x09N.", "protocol 9"),
    "two pickles": (b"N.N.", "2 bytes after the end"),
    "unknown opcode": (b"\x05.", "no opcode 5"),
    "mark missing": (b"]e.", "a damaged one"),
    "memo missing": (b"h\x07.", "a damaged one"),
    "empty stack": (b".", "a damaged one"),
    "empty": (b"", "a damaged one"),
    "text": (b"hello world\n", "a damaged one"),
}


@pytest.mark.parametrize("case", TRICKS)
def test_tricks(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    data, reason = TRICKS[case]
    assert reason in refuse(data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file.pkl"]


def array_of(shape: bytes, raw: bytes, dtype: bytes = b"f4") -> bytes:
    head = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\x01b\x87R(K\x01"
    kind = DTYPE + b"U" + bytes([len(dtype)]) + dtype + b"\x89\x88\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    return head + shape + kind + b"\x89" + raw + b"tb."


def test_array_sizes_are_those_of_their_bytes(tmp_path):
    assert load(array_of(b"K\x01\x85", b"C\x04\0\0\x80?"), tmp_path).tolist() == [1]
    huge = b"\x8a\x06\xff\xff\xff\xff\xff\x7f\x85"
    for shape in (b"K\x02\x85", b"K\0\x85", huge, b"J\xff\xff\xff\xff\x85", b"K\xff" * 200 + b"\x85"):
        assert "a damaged one" in refuse(array_of(shape, b"C\x04\0\0\x80?"), tmp_path)
    assert "an array of objects of shape" in refuse(array_of(b"K\x01K\x01\x86", b"(K\x07l", b"O8"), tmp_path)
    # an array is complete or there is none
    pending = array_of(b"K\x01\x85", b"C\x04\0\0\x80?").partition(b"(K\x01")[0]
    assert type(load(pending + b".", tmp_path)).__name__ == "_Pending"


def bombs() -> dict[str, bytes]:
    many = 20_000
    big = b"(" + b"K\x01" * many + b"l" + b"q\0"
    text = b"X" + struct.pack("<I", many) + b"a" * many + b"q\0"
    laughs = b"]q\0" + b"".join(b"](" + (b"h" + bytes([i])) * 10 + b"eq" + bytes([i + 1]) for i in range(200))
    return {
        "memo": b"Nr\xff\xff\xff\x7f.",
        "sets": big + b"(" + b"c__builtin__\nset\nh\0\x85R0" * 3000 + b"t.",
        "tuples": big + b"(" + b"c__builtin__\ntuple\nh\0\x85R" * 3000 + b"t.",
        "encode": text + b"(" + b"c_codecs\nencode\nh\0X\x06\0\0\0latin1\x86R" * 3000 + b"t.",
        "laughs": laughs + b".",
        "depth": b"]" * 200_000 + b"a" * 199_999 + b".",
        "tuple depth": b")" + b"\x85" * 200_000 + b".",
        "itself": b"]q\0h\0a.",
        "laughs in a message": laughs + DTYPE + b"h\xc8\x85R.",
        "depth in a message": b"]" * 200_000 + b"a" * 199_999 + b"q\0" + DTYPE + b"h\0\x85R.",
    }


@pytest.mark.parametrize("bomb", bombs())
def test_memory_is_bounded_by_the_file(tmp_path, bomb):
    data = bombs()[bomb]
    path = tmp_path / "file.pkl"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        refused = {"laughs in a message": "type", "depth in a message": "type"}
        refused |= dict.fromkeys(("sets", "tuples", "encode"), "more data than its size allows")
        with pytest.raises(ValueError, match=refused[bomb]) if bomb in refused else contextlib.nullcontext():
            load_pickle(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # an empty list or dict takes 64 bytes for its opcode
    assert peak < 100 * len(data) + (1 << 20)


def test_operations_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_pickle, "MAX_OPERATIONS", 100)
    assert load(b"N" + b"N0" * 49 + b".", tmp_path) is None
    assert "more than 100 operations" in refuse(b"N" + b"N0" * 50 + b".", tmp_path)


@pytest.mark.parametrize("protocol", range(6))
def test_truncated_everywhere(tmp_path, protocol):
    data = pickle.dumps((["S001C001P001R001A001.skeleton", "b"], [0, 300], {"x": np.ones((2, 3), np.float32)}), protocol)
    for length in range(len(data)):
        assert "a damaged one" in refuse(data[:length], tmp_path), length


def test_damaged_bytes_give_one_kind_of_error(tmp_path):
    draws = random.Random(0)
    path = tmp_path / "file.pkl"
    read, outcomes = 0, {True: 0, False: 0}
    seeds = [pickle.dumps({**PLAIN, "arrays": ARRAYS}, protocol) for protocol in range(6)]
    for _ in range(3000):
        data = bytearray(draws.choice(seeds))
        for _ in range(draws.randint(1, 4)):
            data[draws.randrange(len(data))] = draws.choice(b".()}]{bRcaesut0123\x80\x81\x93\x94\xff\x00")
        path.write_bytes(data)
        try:
            load_pickle(path)
        except ValueError as error:
            outcomes[bool(re.match(START, str(error)))] += 1
        else:
            read += 1
    assert outcomes[True] > 100 and read > 100 and not outcomes[False]


def test_arrays_are_views_of_the_file(tmp_path):
    array = np.zeros(4 << 20, np.float32)
    path = tmp_path / "file.pkl"
    path.write_bytes(pickle.dumps([array, array[::-1]]))
    tracemalloc.start()
    try:
        found = load_pickle(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found[0].nbytes == 16 << 20 and peak < 1 << 20


def test_what_is_written_any_tool_can_load(tmp_path):
    value = {
        "split": {"a": ["é", "b"]},
        "numbers": (0, -1, 2**40, -(2**40), 2.5, True, None, np.int64(3), np.float32(0.5), np.bool_(False)),
        "arrays": [ARRAYS["float32"], ARRAYS["float32"].T, ARRAYS["big endian"], ARRAYS["bytes"], ARRAYS["empty"]],
        "empty": [[], (), {}],
    }
    stream = io.BytesIO()
    write_pickle(stream, {**value, "items": Items({"n": number} for number in range(3))})
    data = stream.getvalue()
    for found in (pickle.loads(data), load(data, tmp_path)):
        assert found["split"] == value["split"] and found["numbers"] == value["numbers"]
        assert found["empty"] == value["empty"] and found["items"] == [{"n": 0}, {"n": 1}, {"n": 2}]
        for array, expected in zip(found["arrays"], value["arrays"], strict=True):
            assert np.array_equal(array, expected) and array.shape == expected.shape
    # NumPy 1 knows no other name
    assert b"numpy._core" not in data and b"numpy.core.multiarray\n_reconstruct" in data
