"""Writes plain values as a pickle, array by array, that Python 3 loads with NumPy 1 and 2 alike.

`pickle.dump` keeps every array that it has written until the end, and NumPy 2 writes names that NumPy 1 does not know.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Items", "write_pickle"]

_RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
# opcodes of protocol 3: arrays of at most 4 GiB each
_PROTOCOL = b"\x80\x03"


@dataclass(frozen=True)
class Items:
    """A list whose items are made one at a time, while it is written.

    Attributes:
        items: The items.
    """

    items: Iterable[Any]


def write_pickle(file: IO[bytes], value: Any) -> None:
    """Write None, numbers, text, tuples, lists, dicts, arrays of numbers, (...,) each, and `Items` of them as a pickle."""
    file.write(_PROTOCOL)
    _write(file, value)
    file.write(b".")


def _write(file: IO[bytes], value: Any) -> None:
    if value is None:
        file.write(b"N")
    elif isinstance(value, (bool, np.bool_)):
        file.write(b"\x88" if value else b"\x89")
    elif isinstance(value, (int, np.integer)):
        number = int(value)
        small = -(1 << 31) <= number < 1 << 31
        file.write(struct.pack("<ci", b"J", number) if small else struct.pack("<cBq", b"\x8a", 8, number))
    elif isinstance(value, (float, np.floating)):
        file.write(struct.pack(">cd", b"G", float(value)))
    elif isinstance(value, str):
        text = value.encode("utf-8")
        file.write(struct.pack("<cI", b"X", len(text)) + text)
    elif isinstance(value, np.ndarray):
        _write_array(file, value)
    elif isinstance(value, Items):
        file.write(b"]")
        for item in value.items:
            _write(file, item)
            file.write(b"a")
    elif isinstance(value, dict):
        file.write(b"}(")
        for key, item in value.items():
            _write(file, key)
            _write(file, item)
        file.write(b"u")
    else:
        assert isinstance(value, (list, tuple))
        file.write(b"](" if isinstance(value, list) else b"(")
        for item in value:
            _write(file, item)
        file.write(b"e" if isinstance(value, list) else b"t")


def _write_array(file: IO[bytes], array: NDArray[Any]) -> None:
    assert array.dtype.kind in "biuf" and array.nbytes < 1 << 32
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    file.write(_RECONSTRUCT + b"(K\x01")
    _write(file, array.shape)
    file.write(b"cnumpy\ndtype\n")
    _write(file, f"{array.dtype.kind}{array.dtype.itemsize}")
    file.write(b"\x89\x88\x87R(K\x03")
    _write(file, "|" if array.dtype.itemsize == 1 else "<")
    file.write(b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89")
    file.write(struct.pack("<cI", b"B", array.nbytes))
    file.write(array.tobytes())
    file.write(b"tb")
