"""Changes of cases: of bytes whatever they are, of text, and of what lies inside JSON, .npy, zip, MATLAB files and pickles.

Every mutator takes (data, random) and returns other data, or None where the data are not what it knows how to change.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from random import Random
from typing import Any

import numpy as np
from harness import BELL, Case

Mutator = Callable[[bytes, Random], "bytes | None"]

# inputs stay small: what a reader may take is measured by them
MOST_BYTES = 1 << 18
_INTEGERS = (
    0, 1, -1, 2, 3, 25, 127, 128, 255, 256, 32767, 65535, 10**9, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, -(2**31),
    -(2**63),
)  # fmt: skip
_NUMBERS = (
    "", "0", "-0", "1", "-1", "1.5", "nan", "NaN", "-nan", "inf", "-inf", "Infinity", "1e308", "1e999", "-1e999", "1e-400",
    "3.5e38", "0x10", "1_0", "+5", ".5", "5.", "1e", "--1", "1,5", "true", "None", "\u0663", "\uff11", "\u00b2", "1j",
    "99999999999", "2147483648", "4294967296", "9007199254740993", "9223372036854775808", "-9223372036854775809", "9" * 40,
    "9" * 5000, "1000000000",
)  # fmt: skip
_BREAKS = (
    b"\r\n", b"\r", b"\n\n", b"\x00", b"\x0b", b"\x0c", b"\x1c", b"\xc2\x85", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"\x1a",
    b"\xff", b"\t", b" ", b",", b";", b"#", b'"',
)  # fmt: skip
_NUMBER = re.compile(rb"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?|nan", re.IGNORECASE)
_TYPES = ("<f4", ">f8", "<f2", "|b1", "|i1", "<i8", "<u8", "<U4", "|S4", "|O", "<c16", "|V8", "<M8[ns]", "<f16", "<i4")
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 51, 1.5, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 1e308, float("nan"), float("inf"), "",
    "a", "0", "x" * 300, "\ud800", "\x1b[2J", "a\nb", "../a", [], {}, [[]], [0], {"a": 1}, [None], [1, "a"], (), (1, 2), "val",
    "train",
)  # fmt: skip


def flip(data: bytes, random: Random) -> bytes:
    changed = bytearray(data or b"\0")
    at = random.randrange(len(changed))
    changed[at] = random.choice((changed[at] ^ 1 << random.randrange(8), random.randrange(256), 0, 255))
    return bytes(changed)


def cut(data: bytes, random: Random) -> bytes:
    start, end = sorted(random.randrange(len(data) + 1) for _ in range(2))
    return random.choice((data[:start], data[end:], data[:start] + data[end:], data[: len(data) - 1]))


def repeat(data: bytes, random: Random) -> bytes:
    start, end = sorted(random.randrange(len(data) + 1) for _ in range(2))
    return data[:end] + data[start:end] * random.choice((1, 1, 2, 9)) + data[end:]


def insert(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + random.choice((random.randbytes(random.randrange(1, 9)), random.choice(_BREAKS))) + data[at:]


def whole_number(data: bytes, random: Random) -> bytes | None:
    form = random.choice(("<b", "<h", "<i", "<q", ">i", ">q"))
    size = struct.calcsize(form)
    if len(data) < size:
        return None
    at, bits = random.randrange(len(data) - size + 1), 8 * size
    number = (random.choice(_INTEGERS) + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)
    return data[:at] + struct.pack(form, number) + data[at + size :]


def number_of_text(data: bytes, random: Random) -> bytes | None:
    # a few places looked at are enough; to list all would take as long as reading the file
    found = next(_NUMBER.finditer(data, random.randrange(len(data) + 1)), None) or _NUMBER.search(data)
    return data[: found.start()] + random.choice(_NUMBERS).encode() + data[found.end() :] if found else None


def lines(data: bytes, random: Random) -> bytes:
    rows = data.split(b"\n")
    at, other = random.randrange(len(rows)), random.randrange(len(rows))
    match random.randrange(7):
        case 0:
            del rows[at]
        case 1:
            rows.insert(other, rows[at])
        case 2:
            rows[at], rows[other] = rows[other], rows[at]
        case 3:
            rows[at] = b""
        case 4:
            rows[at] += b" " + rows[other]
        case 5:
            words = rows[at].split()
            kept = words[: random.randrange(len(words) + 1)]
            rows[at] = b" ".join([*kept, *random.choices(words or [b"0"], k=random.randrange(3))])
        case _:
            return random.choice((b"\r\n", b"\r", b"\n\n", b" \n")).join(rows)
    return b"\n".join(rows)


def json_tree(data: bytes, random: Random) -> bytes | None:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if random.randrange(50) == 0:
        return random.choice((b"[" * 100_000, b'{"data":' * 30_000, b"[" * 900 + b"]" * 900))
    text = json.dumps(changed_tree(tree, random, _VALUES), default=str)
    return text.encode("utf-8", "surrogatepass")


def changed_tree(tree: Any, random: Random, values: Sequence[Any]) -> Any:
    """Change one node of nested lists, tuples and dicts, chosen on a random walk from the root."""
    if not isinstance(tree, (list, tuple, dict)) or not tree or random.randrange(8) == 0:
        return _changed_node(tree, random, values)
    if isinstance(tree, dict):
        key = random.choice(list(tree))
        if random.randrange(4) == 0:
            rest = {name: value for name, value in tree.items() if name != key}
            new = random.choice((None, "a", 0, -1, *tree))
            return rest if new is None else {**rest, new: tree[key]}
        return {**tree, key: changed_tree(tree[key], random, values)}
    items = list(tree)
    at = random.randrange(len(items))
    match random.randrange(6):
        case 0:
            del items[at]
        case 1:
            items.insert(at, random.choice(items))
        case 2:
            items = items[:at] if random.randrange(2) else items * random.choice((2, 3))
        case _:
            items[at] = changed_tree(items[at], random, values)
    return items if isinstance(tree, list) else tuple(items)


def _changed_node(node: Any, random: Random, values: Sequence[Any]) -> Any:
    if isinstance(node, np.ndarray) and random.randrange(5):
        return _changed_array(node, random)
    return random.choice((random.choice(values), random.choice(values), [node], [node, node], str(node)[:50]))


def _changed_array(array: np.ndarray, random: Random) -> np.ndarray:
    match random.randrange(7):
        case 0:
            return array[..., 0] if array.size and array.ndim else array
        case 1:
            return array[None]
        case 2:
            return array.T
        case 3:
            return array[:0] if array.ndim else array
        case 4:
            kinds = ("f2", "f4", "f8", "i1", "i8", "u8", "?", "U3", "S3", ">f4")
            with np.errstate(all="ignore"):
                return array.astype(random.choice(kinds)) if array.dtype.kind in "biuf" else array
        case 5:
            filled = array.copy()
            if filled.size and filled.dtype.kind == "f":
                filled.flat[random.randrange(filled.size)] = random.choice((np.nan, np.inf, -np.inf, 6e4, 0))
            return filled
        case _:
            return np.zeros_like(array)


def npy(data: bytes, random: Random) -> bytes | None:
    if data[:6] != b"\x93NUMPY" or len(data) < 12:
        return None
    long = data[6] > 1
    size = struct.unpack_from("<I" if long else "<H", data, 8)[0]
    begin = 12 if long else 10
    text, rest = data[begin : begin + size].decode("latin1"), data[begin + size :]
    match random.randrange(7):
        case 0:
            text = re.sub(r"'[<>|=][^']*'", f"'{random.choice(_TYPES)}'", text, count=1)
        case 1:
            shape = [random.choice(_INTEGERS) if random.randrange(2) else extent for extent in _shape(text)]
            text = re.sub(r"\([^)]*\)", str(tuple(shape)), text, count=1)
        case 2:
            shape = _shape(text)
            random.shuffle(shape)
            del shape[random.choice((0, 1, len(shape))) :]
            text = re.sub(r"\([^)]*\)", str(tuple(shape)), text, count=1)
        case 3:
            text = text.replace("False", random.choice(("True", "None", "0", "'a'", "[" * 99, "-" * 500 + "1")))
        case 4:
            at = random.randrange(len(text) + 1)
            text = text[:at] + random.choice(("(", ")", ",", "'", "{", "9" * 30, "\n", "\0", "L", ":", "0x", "\xe9")) + text[at:]
        case 5:
            text = text.replace("shape", random.choice(("Shape", "descr", "")), 1)
        case _:
            return data[:begin] + (number_of_text(data[begin : begin + size], random) or b"") + rest
    version = random.choice((data[6], data[6], data[6], 1, 2, 3, 9))
    header = text.encode("latin1")
    length = struct.pack("<H" if version == 1 else "<I", min(len(header), 0xFFFF))
    return b"\x93NUMPY" + bytes((version, 0)) + length + header + rest


def _shape(text: str) -> list[int]:
    return [int(extent) for extent in re.findall(r"\d{1,20}", text.partition("(")[2])]


def zipped(data: bytes, random: Random) -> bytes | None:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    # zipfile has an error of its own for every kind of damage
    except Exception:
        return None
    if members:
        at = random.randrange(len(members))
        name, content = members[at]
        match random.randrange(8):
            case 0:
                del members[at]
            case 1:
                members.append(members[at])
            case 2:
                members[at] = random.choice(members)[0], content
            case _:
                members[at] = name, mutated_file(name, content, random)
    stream = io.BytesIO()
    method = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2))
    with zipfile.ZipFile(stream, "w", method) as out:
        for name, content in dict(members).items() if random.randrange(8) else members[:1]:
            out.writestr(name, content)
    return stream.getvalue()


def compressed(data: bytes, random: Random) -> bytes | None:
    """Change the inside of a gzip stream, such as a .tar.gz."""
    try:
        content = gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return None
    return gzip.compress(random.choice((flip, cut, number_of_text, insert))(content, random) or content, 1)


def matlab(data: bytes, random: Random) -> bytes | None:
    """Change an element of a MATLAB 5 file, also inside a compressed one."""
    if len(data) < 136 or data[126:128] != b"IM":
        return None
    parts, at = [], 128
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, at)
        # what is not whole is one part
        end = at + 8 + size if kind < 32 and at + 8 + size <= len(data) else len(data)
        parts.append(data[at:end])
        at = end
    if not parts:
        return None
    chosen = random.randrange(len(parts))
    part = parts[chosen]
    match random.randrange(8):
        case 0:
            del parts[chosen]
        case 1:
            parts.append(part)
        case _:
            parts[chosen] = _changed_element(part, random)
    return data[:128] + b"".join(parts)


def _changed_element(part: bytes, random: Random) -> bytes:
    change = random.choice((_word, flip, cut, whole_number, _word))
    if part[:4] != b"\x0f\0\0\0":
        return change(part, random) or part
    try:
        inner = zlib.decompress(part[8:])
    except zlib.error:
        return flip(part, random)
    again = zlib.compress(change(inner, random) or inner, 1)
    return struct.pack("<II", 15, len(again) if random.randrange(8) else random.choice((0, 7, 1 << 30))) + again


def _word(data: bytes, random: Random) -> bytes:
    # tags and sizes lie at multiples of four, in front
    at = 4 * random.randrange(max(1, min(len(data), 80) // 4))
    number = random.choice((*range(18), 25, 0x800, 0x40001, 2**31 - 1, 2**31, 2**32 - 1, random.randrange(256)))
    return data[:at] + struct.pack("<I", number) + data[at + 4 :]


def opcodes(data: bytes, random: Random) -> bytes | None:
    """Change the program that a pickle is: leave out, repeat, move and replace opcodes, also by those that run code."""
    starts = []
    try:
        starts = [place or 0 for _, _, place in pickletools.genops(data)]
    # a damaged pickle is read up to where it is damaged
    except Exception:
        if len(starts) < 2:
            return None
    parts = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)])]
    if not parts:
        return None
    at, other = random.randrange(len(parts)), random.randrange(len(parts))
    match random.randrange(6):
        case 0:
            del parts[at]
        case 1:
            parts.insert(other, parts[at])
        case 2:
            parts[at], parts[other] = parts[other], parts[at]
        case 3:
            parts[at] = bytes((ord(random.choice(pickletools.opcodes).code),)) + parts[at][1:]
        case 4:
            parts.insert(at, random.choice(_OPERATIONS))
        case _:
            parts[at] = parts[at][:1] + (whole_number(parts[at][1:], random) or random.randbytes(random.randrange(9)))
    return b"".join(parts)


# shortest first: marks, ends and calls; then numbers, names of the memo, and values that are no plain data
_OPERATIONS = (
    *(bytes((code,)) for code in b"()]}012abdelorRstuQN.\x81\x85\x86\x87\x8f\x90\x91\x92\x93\x94\x97\x98"),
    b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\xff", b"L" + b"9" * 20 + b"L\n", b"I01\n", b"F1e999\n", b"h\x00", b"g0\n", b"q\x00",
    b"p1\n", b"\x8a\x08" + b"\xff" * 8, b"cos\nsystem\n", b"cnumpy\ndtype\n", b"c__builtin__\nset\n", b"c_codecs\nencode\n",
    b"V\\ud800\n", b"S'a\\x1b'\n", b"X\x01\0\0\0a", b"\x8c\x02\xc3\xa9", b"\x95" + b"\xff" * 8, b"\x80\x05",
    b"B\xff\xff\xff\x7f", b"C\x00", b"\x96" + b"\0" * 8, b"G\x7f\xf0\0\0\0\0\0\0",
)  # fmt: skip


def pickled(tree: Any, protocol: int = 4) -> bytes:
    """Return a value as a pickle, and remember the value: nothing in here unpickles what was mutated."""
    data = pickle.dumps(tree, protocol)
    if len(_TREES) >= _MOST_TREES:
        _TREES.pop(next(iter(_TREES)))
    _TREES[data] = tree
    return data


_TREES: dict[bytes, Any] = {}
_MOST_TREES = 2000


def pickled_tree(data: bytes, random: Random) -> bytes | None:
    """Change the value of a pickle that is known, and write it in another protocol."""
    if data not in _TREES:
        return None
    try:
        return pickled(changed_tree(_TREES[data], random, _VALUES), random.randrange(6))
    # a dict as key, a number that has no bytes
    except (ValueError, RecursionError, TypeError, OverflowError):
        return None


_BYTES: tuple[Mutator, ...] = (flip, cut, repeat, insert, whole_number)
_TEXT: tuple[Mutator, ...] = (number_of_text, number_of_text, number_of_text, lines, lines, insert, cut, flip, repeat)
_BY_SUFFIX: dict[str, tuple[Mutator, ...]] = {
    ".json": (json_tree, json_tree, json_tree, *_TEXT),
    ".npy": (npy, npy, npy, *_BYTES),
    ".npz": (zipped, zipped, zipped, *_BYTES),
    ".zip": (zipped, zipped, *_BYTES),
    ".gz": (compressed, compressed, *_BYTES),
    ".mat": (matlab, matlab, matlab, *_BYTES),
    ".pkl": (opcodes, pickled_tree, pickled_tree, *_BYTES),
    ".tar": (number_of_text, *_BYTES),
}


def mutated_file(name: str, data: bytes, random: Random) -> bytes:
    """Change the contents of one file once, after its suffix."""
    for mutator in random.choices(_BY_SUFFIX.get(PurePosixPath(name).suffix, _TEXT), k=3):
        changed = mutator(data, random)
        if changed is not None:
            return changed[:MOST_BYTES]
    return data


def mutated(case: Case, others: Sequence[Case], random: Random, renames: bool) -> Case:
    """Change a case a few times: contents of its files, which files there are, and, where they count, their names."""
    changed = dict(case)
    for _ in range(random.choice((1, 1, 1, 2, 3, 5))):
        name = random.choice(list(changed))
        data = changed[name]
        match random.randrange(24):
            case 0:
                other = random.choice(others)
                changed[name] = random.choice(list(other.values()))
            case 1:
                spliced = random.choice(list(random.choice(others).values()))
                at = random.randrange(len(data) + 1)
                changed[name] = (data[:at] + spliced[random.randrange(len(spliced) + 1) :])[:MOST_BYTES]
            case 2 if len(changed) > 1:
                del changed[name]
            case 3 if renames:
                new = renamed(name, random)
                if new not in changed:
                    changed[new] = changed.pop(name)
            case _:
                changed[name] = mutated_file(name, data, random)
    return changed


def renamed(name: str, random: Random) -> str:
    """Change one character of a path, so that it stays a path below its folder."""
    at = random.randrange(len(name))
    piece = random.choice(("", "0", "9", "-", "_", "a", "\u0663", " ", "label", ".", BELL))
    new = name[:at] + piece + name[at + random.randrange(2) :]
    parts = PurePosixPath(new).parts
    return new if parts and new == "/".join(parts) and not {"..", "."} & set(parts) and not new.startswith("/") else name
