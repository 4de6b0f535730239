"""Variables of MATLAB 5 files: full arrays of numbers and rows of text, nothing else.

Read here and not by scipy, whose reader ends the process on some damaged files. Format: MAT-File Level 5 in "MAT-File Format" of
The MathWorks.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastskel.data.formats.format import unreadable

__all__ = ["matlab_variables"]

_HEADER_BYTES = 128
# what an element's data are
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {1: "ascii", 2: "ascii", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_INT8, _INT32, _UINT32, _MATRIX, _COMPRESSED = 1, 5, 6, 14, 15
# what an array is to MATLAB: numbers may be stored in a narrower type than their own
_TEXT_CLASS = 4
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_COMPLEX = 0x800
# a clip of an hour is some tens of megabytes
_MOST_BYTES = 256 << 20


class _NotPlainError(Exception):
    """A variable is sound and of no use."""


@dataclass(frozen=True)
class _Element:
    kind: int
    data: memoryview


def matlab_variables(data: bytes, path: str, names: Collection[str]) -> dict[str, NDArray[np.generic] | str]:
    """Read variables of a MATLAB 5 file.

    Args:
        data: Contents.
        path: Their path, for messages.
        names: Variables; all must be there.
    Returns:
        Arrays of at least two axes, (a, b, ...), in the type that MATLAB has them in, and rows of text as strings.
    Raises:
        ValueError: If the file is damaged, lacks a variable, or one is neither numbers nor text.
    """
    found: dict[str, NDArray[np.generic] | str] = {}
    try:
        for element in _top(data):
            name, value = _array(element, _order(data), names)
            if value is not None:
                found[name] = value
    except _NotPlainError as error:
        raise unreadable("made of numbers or rows of text", str(error), path) from error
    except (ValueError, zlib.error) as error:
        raise unreadable("a complete MATLAB 5 file", f"an unreadable one ({error})", path) from error
    for name in names:
        if name not in found:
            raise unreadable(f"a MATLAB file with the variable {name}", "none of that name", path)
    return found


def _order(data: bytes) -> str:
    order = {b"IM": "<", b"MI": ">"}.get(data[126:_HEADER_BYTES])
    if order is None or data[125 if order == "<" else 124] != 1:
        raise ValueError("no header of MATLAB 5")
    return order


def _top(data: bytes) -> Iterator[_Element]:
    order = _order(data)
    for element in _elements(memoryview(data)[_HEADER_BYTES:], order):
        if element.kind == _COMPRESSED:
            inflater = zlib.decompressobj()
            content = inflater.decompress(element.data, _MOST_BYTES)
            if not inflater.eof:
                raise ValueError(f"compressed data that are cut, or larger than {_MOST_BYTES >> 20} MiB")
            yield from _elements(memoryview(content), order)
        else:
            yield element


def _elements(view: memoryview, order: str) -> Iterator[_Element]:
    # (type, size) and data, padded to 8 bytes; up to 4 bytes of data share the 8 with their tag
    while len(view):
        if len(view) < 8:
            raise ValueError(f"{len(view)} bytes where an element begins")
        kind, size = (int(word) for word in np.frombuffer(view[:8], f"{order}u4"))
        begin = 8
        if kind >> 16:
            kind, size, begin = kind & 0xFFFF, kind >> 16, 4
        end = begin + size
        if end > (len(view) if begin == 8 else 8):
            raise ValueError(f"an element of {size} bytes, {len(view) - begin} are left")
        yield _Element(kind, view[begin:end])
        # compressed elements are not padded
        view = view[end if kind == _COMPRESSED else max(8, -(-end // 8) * 8) :]


def _array(element: _Element, order: str, names: Collection[str]) -> tuple[str, NDArray[np.generic] | str | None]:
    if element.kind != _MATRIX:
        raise ValueError(f"an element of type {element.kind} where a variable begins")
    parts = _elements(element.data, order)
    flags = _numbers(next(parts, None), order, _UINT32)
    shape = [int(size) for size in _numbers(next(parts, None), order, _INT32)]
    name = bytes(_numbers(next(parts, None), order, _INT8).astype(np.uint8)).decode("ascii", "replace")
    if name not in names:
        return name, None
    if len(flags) < 1 or len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"variable {name} of shape {shape}")
    kind = int(flags[0]) & 0xFF
    if int(flags[0]) & _COMPLEX or kind not in (_TEXT_CLASS, *_CLASSES):
        raise _NotPlainError(f"variable {name} of class {kind}")
    content = next(parts, None)
    if kind == _TEXT_CLASS:
        if content is None or content.kind not in _TEXTS or shape[:-1] != [1] * (len(shape) - 1):
            raise _NotPlainError(f"variable {name} of text of shape {shape}")
        encoding = _TEXTS[content.kind]
        if encoding.endswith(("16", "32")):
            encoding += "-le" if order == "<" else "-be"
        return name, bytes(content.data).decode(encoding)
    values = _numbers(content, order)
    if len(values) != math.prod(shape):
        raise ValueError(f"{len(values)} numbers for variable {name} of shape {shape}")
    with np.errstate(all="ignore"):
        return name, values.astype(_CLASSES[kind]).reshape(shape, order="F")


def _numbers(element: _Element | None, order: str, kind: int | None = None) -> NDArray[np.generic]:
    if element is None or element.kind not in _NUMBERS or kind not in (None, element.kind):
        raise ValueError("an array without its numbers")
    dtype = np.dtype(f"{order}{_NUMBERS[element.kind]}")
    if len(element.data) % dtype.itemsize:
        raise ValueError(f"{len(element.data)} bytes of numbers of {dtype.itemsize}")
    return np.frombuffer(element.data, dtype)
