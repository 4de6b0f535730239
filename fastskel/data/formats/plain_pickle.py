"""Reads pickles as data: containers, numbers, text and NumPy arrays. No name in a file is ever looked up or called.

Python's own unpickler runs what a file names. This one knows the opcodes of protocols 0 to 5 and the few names with
which NumPy 1 and 2 write arrays; every other name is refused. Arrays are views of the mapped file, so what a file of
B bytes takes beside them is bounded by its number of opcodes.
"""

from __future__ import annotations

import codecs
import math
import mmap
import re
import reprlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastskel.data.formats.format import unreadable

__all__ = ["load_pickle"]

# NTU RGB+D 120 as one PYSKL pickle has some eight million
MAX_OPERATIONS = 1 << 25
_MAX_DIGITS = 24
_MAX_AXES = 32
_NAMES = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): "array" for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): "scalar" for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): "buffer" for core in ("core", "_core")},
    ("numpy", "dtype"): "dtype",
    ("numpy", "ndarray"): "ndarray",
    # how Python 3 writes bytes in protocols 0 to 2
    ("_codecs", "encode"): "encode",
    **{
        (module, name): name
        for module in ("builtins", "__builtin__")
        for name in ("set", "frozenset", "list", "tuple", "bytes")
    },
}
_DTYPE = re.compile(r"[<>=|]?([biuf][1248]|O8?|[US]\d{1,4}|\?)", re.ASCII)


class _Refused(Exception):
    """What a file holds that plain data does not."""


class _Name:
    """A name of the table, on its way to the opcode that uses it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


class _Pending:
    """An array or type whose contents a later opcode brings."""

    def __init__(self, value: Any = None) -> None:
        self.value = value


def load_pickle(path: Path) -> Any:
    """Read a pickle of containers, numbers, text and arrays, (...,) each.

    Args:
        path: File. It stays mapped into memory as long as its arrays live.
    Returns:
        What it holds; arrays are read-only, arrays of objects are lists.
    Raises:
        ValueError: If it is damaged, or names anything that is not plain data.
    """
    contract, action = "a pickle of plain containers, numbers, text and arrays", "Do not load it with other tools"
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _Machine(content).run()
    except _Refused as error:
        raise unreadable(contract, str(error), str(path), action) from error
    except OSError as error:
        raise unreadable("a readable file", error.strerror, str(path), "Correct the path") from error
    except (ArithmeticError, LookupError, TypeError, ValueError, struct.error, MemoryError) as error:
        # opcodes on a stack that they do not fit: the file is cut or no pickle
        raise unreadable(contract, f"a damaged one ({error})", str(path)) from error


class _Machine:
    def __init__(self, content: mmap.mmap) -> None:
        self.content = content
        self.view = memoryview(content)
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        # copies that short opcodes can ask for again and again
        self.copies_left = 4 * len(content) + (1 << 16)

    def run(self) -> Any:
        handlers, content = _HANDLERS, self.content
        for _ in range(MAX_OPERATIONS):
            code = content[self.at]
            self.at += 1
            if code == _STOP:
                if self.at != len(content):
                    raise ValueError(f"{len(content) - self.at} bytes after the end")
                return self.stack.pop()
            if code not in handlers:
                refused = _REFUSED.get(code)
                raise _Refused(refused) if refused else ValueError(f"no opcode {code} at byte {self.at - 1}")
            handlers[code](self)
        raise _Refused(f"more than {MAX_OPERATIONS} operations")

    def take(self, size: int) -> memoryview:
        start = self.at
        if not 0 <= size <= len(self.content) - start:
            raise ValueError(f"{size} bytes announced at byte {start}, {len(self.content) - start} left")
        self.at = start + size
        return self.view[start : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> bytes:
        end = self.content.find(b"\n", self.at)
        if end < 0:
            raise ValueError(f"a line without end at byte {self.at}")
        text = bytes(self.take(end - self.at))
        self.at += 1
        return text

    def digits(self) -> str:
        text = self.line().decode("ascii").removesuffix("L")
        if len(text) > _MAX_DIGITS:
            raise _Refused(f"a number of {len(text)} digits")
        return text

    def marked(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise _Refused(f"{type(self.stack[-1]).__name__} used as {kind.__name__}")
        return self.stack[-1]

    def copy(self, size: int) -> None:
        self.copies_left -= size
        if self.copies_left < 0:
            raise _Refused("more data than its size allows")

    def get(self, key: int) -> None:
        value = self.memo[key]
        finished = type(value) is _Pending and value.value is not None
        self.stack.append(value.value if finished else value)

    def put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def append(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        self.top(dict).update(self.pairs(items))

    def pairs(self, items: list[Any]) -> dict[Any, Any]:
        if len(items) % 2:
            raise ValueError("a key without value")
        return dict(zip(self.keys(items[::2]), items[1::2]))

    def keys(self, items: list[Any]) -> list[Any]:
        for item in items:
            # other keys could be made to collide, or have no fixed hash, as NaN
            if type(item) not in (str, int) and not (type(item) is float and math.isfinite(item)):
                raise _Refused(f"{type(item).__name__} as key or member of a set")
        return items

    def name(self, module: str, name: str) -> None:
        if (module, name) not in _NAMES:
            raise _Refused(f"the name {module[:80]}.{name[:80]}, not looked up")
        self.stack.append(_Name(_NAMES[module, name]))

    def stack_name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("a name that is no text")
        self.name(module, name)

    def reduce(self) -> None:
        arguments = self.stack.pop()
        name = self.top(_Name)
        if type(arguments) is not tuple:
            raise ValueError("arguments that are no tuple")
        self.stack[-1] = self.made(name.kind, arguments)

    def made(self, kind: str, arguments: tuple[Any, ...]) -> Any:
        if kind == "array":
            return _Pending()
        if kind == "dtype":
            text = arguments[0]
            if type(text) is not str or not _DTYPE.fullmatch(text):
                raise _Refused(f"an array of type {reprlib.repr(text)}")
            return _Pending(np.dtype(text))
        if kind == "scalar":
            dtype, raw = arguments
            return self.array(dtype, (), raw, False)[()]
        if kind == "buffer":
            raw, dtype, shape, order = arguments
            return self.array(dtype, shape, raw, order == "F")
        if kind == "encode":
            text, encoding = arguments
            if type(text) is not str or encoding not in ("latin1", "latin-1"):
                raise _Refused("an unusual encoding")
            self.copy(len(text))
            return memoryview(text.encode("latin1"))
        if kind == "bytes" and not arguments:
            return memoryview(b"")
        if kind in ("set", "frozenset", "list", "tuple"):
            items = arguments[0] if arguments else []
            if type(items) not in (list, tuple):
                raise _Refused(f"a {kind} of {type(items).__name__}")
            self.copy(8 * len(items))
            if kind in ("set", "frozenset"):
                self.keys(items)
            return {"set": set, "frozenset": frozenset, "list": list, "tuple": tuple}[kind](items)
        raise _Refused(f"a call of {kind}")

    def build(self) -> None:
        state = self.stack.pop()
        pending = self.top(_Pending)
        if type(state) is not tuple:
            raise ValueError("a state that is no tuple")
        if isinstance(pending.value, np.dtype):
            _, order, *parts = state
            if order not in ("<", ">", "|", "=") or any(part is not None for part in parts[:3]):
                raise _Refused("an array of records")
            pending.value = pending.value.newbyteorder(order)
        elif pending.value is None:
            _, shape, dtype, fortran, raw = state
            pending.value = self.array(dtype, shape, raw, bool(fortran))
        else:
            raise ValueError("an array with two contents")
        self.stack[-1] = pending.value

    def array(self, dtype: Any, shape: Any, raw: Any, fortran: bool) -> Any:
        # of many axes even the product would take long
        shaped = type(shape) is tuple and len(shape) <= _MAX_AXES and all(type(extent) is int for extent in shape)
        if not isinstance(dtype, np.dtype) or not shaped:
            raise ValueError("an array without type or shape")
        size = math.prod(shape)
        if dtype.kind == "O":
            if type(raw) is not list or shape != (len(raw),):
                raise _Refused(f"an array of objects of shape {reprlib.repr(shape)}")
            return raw
        if type(raw) is str:
            # Python 2 wrote the bytes of an array as a string
            self.copy(len(raw))
            raw = raw.encode("latin1")
        if type(raw) not in (memoryview, bytes) or size < 0 or len(raw) != size * dtype.itemsize:
            raise ValueError(f"an array of shape {reprlib.repr(shape)} whose bytes do not fill it")
        values = np.frombuffer(raw, dtype) if size else np.zeros(0, dtype)
        return values.reshape(shape, order="F" if fortran else "C")


def _sized(form: str, decode: Callable[[memoryview], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(decode(machine.take(machine.number(form))))


def _text(raw: memoryview) -> str:
    # pickles may hold lone surrogates
    return str(raw, "utf-8", "surrogatepass")


def _latin(raw: memoryview) -> str:
    return str(raw, "latin1")


def _long(raw: memoryview) -> int:
    if len(raw) > 9:
        raise _Refused(f"a number of {len(raw)} bytes")
    return int.from_bytes(raw, "little", signed=True)


def _quoted(machine: _Machine) -> str:
    line = machine.line().strip()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"'\"":
        raise ValueError("a string without quotes")
    return str(codecs.escape_decode(line[1:-1])[0], "latin1")


def _int(machine: _Machine) -> int | bool:
    text = machine.digits()
    return text == "01" if text in ("00", "01") else int(text)


def _frame(machine: _Machine) -> None:
    size = machine.number("<Q")
    if size > len(machine.content) - machine.at:
        raise ValueError(f"a frame of {size} bytes announced, {len(machine.content) - machine.at} left")


def _tuple(count: int) -> Callable[[_Machine], None]:
    def make(machine: _Machine) -> None:
        if len(machine.stack) < count:
            raise ValueError("a tuple of more than there is")
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return make


def _proto(machine: _Machine) -> None:
    if (version := machine.number("<B")) > 5:
        raise ValueError(f"protocol {version}")


def _pair(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


def _members(machine: _Machine) -> None:
    items = machine.keys(machine.marked())
    machine.top(set).update(items)


def _one(machine: _Machine) -> None:
    item = machine.stack.pop()
    machine.append([item])


# an opcode whose effect is one value to push: its code, and how the value comes about
_PUSHES: dict[bytes, Callable[[_Machine], Any]] = {
    b"N": lambda machine: None,
    b"\x88": lambda machine: True,
    b"\x89": lambda machine: False,
    b"K": lambda machine: machine.number("<B"),
    b"M": lambda machine: machine.number("<H"),
    b"J": lambda machine: machine.number("<i"),
    b"G": lambda machine: machine.number(">d"),
    b"I": _int,
    b"L": lambda machine: int(machine.digits()),
    b"F": lambda machine: float(machine.line()),
    b"S": _quoted,
    b"V": lambda machine: str(machine.line(), "raw-unicode-escape"),
    b"]": lambda machine: [],
    b")": lambda machine: (),
    b"}": lambda machine: {},
    b"\x8f": lambda machine: set(),
    b"l": lambda machine: machine.marked(),
    b"t": lambda machine: tuple(machine.marked()),
    b"d": lambda machine: machine.pairs(machine.marked()),
    b"\x91": lambda machine: frozenset(machine.keys(machine.marked())),
    b"2": lambda machine: machine.stack[-1],
}
_EFFECTS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": _proto,
    b"\x95": _frame,
    b"(": lambda machine: machine.marks.append(len(machine.stack)),
    b"0": lambda machine: machine.stack.pop(),
    b"1": lambda machine: machine.marked(),
    b"T": _sized("<i", _latin),
    b"U": _sized("<B", _latin),
    b"X": _sized("<I", _text),
    b"\x8c": _sized("<B", _text),
    b"\x8d": _sized("<Q", _text),
    b"B": _sized("<I", memoryview),
    b"C": _sized("<B", memoryview),
    b"\x8e": _sized("<Q", memoryview),
    b"\x96": _sized("<Q", memoryview),
    b"\x8a": _sized("<B", _long),
    b"\x8b": _sized("<i", _long),
    b"a": _one,
    b"e": lambda machine: machine.append(machine.marked()),
    b"s": _pair,
    b"u": lambda machine: machine.set_items(machine.marked()),
    b"\x90": _members,
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"p": lambda machine: machine.put(int(machine.digits())),
    b"q": lambda machine: machine.put(machine.number("<B")),
    b"r": lambda machine: machine.put(machine.number("<I")),
    b"\x94": lambda machine: machine.put(len(machine.memo)),
    b"g": lambda machine: machine.get(int(machine.digits())),
    b"h": lambda machine: machine.get(machine.number("<B")),
    b"j": lambda machine: machine.get(machine.number("<I")),
    b"c": lambda machine: machine.name(machine.line().decode(), machine.line().decode()),
    b"\x93": _Machine.stack_name,
    b"R": _Machine.reduce,
    b"b": _Machine.build,
}
_STOP = ord(".")
_REFUSED = {
    **dict.fromkeys(b"io\x81\x92", "an object of a class"),
    **dict.fromkeys(b"PQ\x82\x83\x84\x97\x98", "a reference to something outside of it"),
}


def _push(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value(machine))


_HANDLERS: dict[int, Callable[[_Machine], Any]] = {
    **{code[0]: _push(value) for code, value in _PUSHES.items()},
    **{code[0]: effect for code, effect in _EFFECTS.items()},
}
