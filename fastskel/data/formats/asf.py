"""Acclaim skeletons: text files `*.asf` of bones, their rest pose and the axes that they turn about.

After the Acclaim Skeleton File Definition V1.10 (M. Schafer, 1994): a bone lies at direction times length from the end of its
parent, in the axes of the world at rest. A frame turns it by G = G_parent C M C^-1, where C turns the world's axes into those of
the bone (`axis`) and M is what the frame says, rotations about fixed axes in the order of `dof`. The root is the only joint
that moves; its `orientation` turns the skeleton at rest, before the frame does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastskel.data.formats.format import unreadable
from fastskel.data.formats.kinematics import Link, rotation_product
from fastskel.data.formats.motion_capture import MAX_JOINTS, MAX_NAME, hierarchy_topology, plain_numbers, word_lines
from fastskel.skeleton import Topology

__all__ = ["AsfSkeleton", "read_skeleton"]

ROOT = "root"
# published skeletons have ten kilobytes
_MAX_BYTES = 4 << 20
_ANGLES = {"deg": math.pi / 180, "degrees": math.pi / 180, "rad": 1.0, "radians": 1.0}
_DEGREES_OF_FREEDOM = {f"{kind}{axis}": (kind == "r", "xyz".index(axis)) for kind in "tr" for axis in "xyz"}

# the definition has commas and parentheses as blanks
_BLANKS = str.maketrans("(),", "   ")

Row = tuple[int, list[str]]


@dataclass(frozen=True)
class AsfSkeleton:
    """One skeleton file.

    Attributes:
        path: Where it comes from, for messages.
        links: Root and bones, (V,), parents before children.
        slots: Name of the root or of a bone that a frame turns -> (first, behind the last) of its numbers in a frame.
        length: Its unit of length, as it says.
        angle: Radians of its unit of angles.
    """

    path: str
    links: tuple[Link, ...]
    slots: Mapping[str, tuple[int, int]]
    length: float
    angle: float

    @property
    def num_values(self) -> int:
        """Numbers of a frame, a scalar."""
        return max(behind for _, behind in self.slots.values())

    def topology(self) -> Topology:
        """Return the layout of the root and the end of each bone, (V,)."""
        return hierarchy_topology("amc", [link.name for link in self.links], [link.parent for link in self.links])


def read_skeleton(data: bytes, path: str) -> AsfSkeleton:
    """Read a skeleton file.

    Args:
        data: Its text.
        path: Its path, for messages.
    Returns:
        Root and bones, (V,), in the order of the hierarchy, branch by branch.
    Raises:
        ValueError: If something is missing, unknown or said twice; names the line.
    """
    return _Reader(data, path).skeleton()


class _Reader:
    def __init__(self, data: bytes, path: str) -> None:
        self.path = path
        if len(data) > _MAX_BYTES:
            raise unreadable(f"a skeleton of at most {_MAX_BYTES >> 20} MiB", f"{len(data)} bytes", path)
        self.sections: dict[str, list[Row]] = {}
        rows: list[Row] | None = None
        for line, raw in word_lines(data):
            # comments and notes may be in any encoding
            words = raw.decode("utf-8", "replace").partition("#")[0].translate(_BLANKS).split()
            if raw.startswith(b":"):
                keyword = words[0].lower()
                if keyword in self.sections:
                    raise self.refusal("with each section once", words[0], line)
                rows = self.sections[keyword] = [(line, words[1:])] if words[1:] else []
            elif words and rows is None:
                raise self.refusal("a text that begins with a section such as :version", repr(words[0]), line)
            elif words and rows is not None:
                rows.append((line, words))
        for keyword in (":units", ":root", ":bonedata", ":hierarchy"):
            if not self.sections.get(keyword):
                raise unreadable(f"a skeleton with a section {keyword}", "none", path)
        self.length, self.angle = self.units(self.sections[":units"])

    def refusal(self, contract: str, actual: str, line: int) -> ValueError:
        return unreadable(contract, f"{actual:.160} in line {line}", self.path, "Correct it")

    def skeleton(self) -> AsfSkeleton:
        links, slots = self.linked(self.bones(self.sections[":bonedata"]))
        return AsfSkeleton(self.path, links, slots, self.length, self.angle)

    def units(self, rows: Sequence[Row]) -> tuple[float, float]:
        entries = self.entries(rows)
        length = self.numbers(entries, "length", 1)[0] if "length" in entries else 1.0
        line, words = self.entry(entries, "angle", rows[0][0])
        if len(words) != 1 or words[0].lower() not in _ANGLES or length <= 0:
            raise self.refusal("with units of length above 0 and angle deg or rad", f"{length:g} and {' '.join(words)}", line)
        return length, _ANGLES[words[0].lower()]

    def entries(self, rows: Sequence[Row]) -> dict[str, Row]:
        """Rows of a name and its values."""
        found: dict[str, Row] = {}
        last = ""
        for line, words in rows:
            # limits of further degrees of freedom have lines of their own
            if last == "limits" and words[0][0] in "+-.0123456789":
                continue
            last = words[0].lower()
            if last in found:
                raise self.refusal("with each entry once", words[0], line)
            found[last] = line, words[1:]
        return found

    def entry(self, entries: Mapping[str, Row], name: str, line: int) -> Row:
        if name not in entries:
            raise self.refusal(f"with an entry {name}", "none", line)
        return entries[name]

    def numbers(self, entries: Mapping[str, Row], name: str, count: int, line: int = 0) -> list[float]:
        line, words = self.entry(entries, name, line)
        numbers = plain_numbers([word.encode() for word in words[:count]], line, self.path)
        if len(numbers) != count or not all(map(math.isfinite, numbers)):
            raise self.refusal(f"with {count} finite numbers as {name}", " ".join(words[:count]) or "none", line)
        return numbers

    def degrees_of_freedom(self, row: Row, allowed: str) -> list[tuple[bool, int]]:
        line, words = row
        found = [_DEGREES_OF_FREEDOM.get(word.lower()) for word in words]
        known = [freedom for freedom in found if freedom is not None and (freedom[0] or "t" in allowed)]
        if len(known) < len(words) or len(set(known)) < len(known):
            free = "RX, RY, RZ and, of the root, TX, TY, TZ"
            raise self.refusal(f"with degrees of freedom {free}, each once", " ".join(words[:8]), line)
        return known

    def turned(self, angles: Sequence[float], row: Row) -> NDArray[np.float64]:
        """The matrix of rotations about fixed axes in an order such as XYZ."""
        line, words = row
        order = ["xyz".find(letter) for letter in (words[-1].lower() if words else "")]
        if sorted(order) != [0, 1, 2]:
            raise self.refusal("with an order of axes such as XYZ", " ".join(words) or "none", line)
        # about fixed axes: what is done first stands right
        order.reverse()
        turns = np.array([[angles[axis] for axis in order]]) * self.angle
        return rotation_product(order, turns).reshape(3, 3)

    def bones(self, rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
        bones: dict[str, dict[str, Row]] = {}
        block: list[Row] | None = None
        for line, words in rows:
            word = words[0].lower()
            if word not in ("begin", "end"):
                if block is None:
                    raise self.refusal("of bones between begin and end", repr(words[0]), line)
                block.append((line, words))
                continue
            if (word == "begin") != (block is None):
                raise self.refusal("of begin and end in turn", repr(words[0]), line)
            if block is not None:
                entries = self.entries(block)
                name_line, name = self.entry(entries, "name", line)
                if len(name) != 1 or name[0] == ROOT or name[0] in bones or len(name[0]) > MAX_NAME:
                    contract = f"of bones with a name of their own of at most {MAX_NAME} characters"
                    raise self.refusal(contract, " ".join(name) or "none", name_line)
                if len(bones) + 1 == MAX_JOINTS:
                    raise self.refusal(f"of less than {MAX_JOINTS} bones", "one more", line)
                bones[name[0]] = entries
            block = [] if word == "begin" else None
        if block is not None:
            raise unreadable("with an end to each bone", "none to the last", self.path)
        return bones

    def linked(self, bones: Mapping[str, Mapping[str, Row]]) -> tuple[tuple[Link, ...], dict[str, tuple[int, int]]]:
        children = self.children(bones)
        links: list[Link] = []
        slots: dict[str, tuple[int, int]] = {}
        waiting = [(ROOT, -1)]
        while waiting:
            name, parent = waiting.pop()
            first = max((behind for _, behind in slots.values()), default=0)
            link, count = self.root(first) if name == ROOT else self.bone(name, bones[name], parent, first)
            if count:
                slots[name] = (first, first + count)
            waiting += [(child, len(links)) for child in reversed(children.get(name, []))]
            links.append(link)
        if len(links) <= len(bones):
            placed = {link.name for link in links}
            lost = next(name for name in bones if name not in placed)
            contract = "with a hierarchy of all bones, from the root on"
            raise unreadable(contract, f"{lost!r} apart from it", self.path, "Correct it")
        if not slots:
            raise unreadable("with a degree of freedom, of the root or of a bone", "none", self.path)
        return tuple(links), slots

    def children(self, bones: Mapping[str, object]) -> dict[str, list[str]]:
        rows = self.sections[":hierarchy"]
        if [rows[0][1][0].lower(), rows[-1][1][0].lower()] != ["begin", "end"]:
            raise self.refusal("with a hierarchy between begin and end", " ".join(rows[0][1]), rows[0][0])
        children: dict[str, list[str]] = {}
        seen: set[str] = set()
        for line, words in rows[1:-1]:
            for name in words[1:]:
                if name not in bones or name in seen:
                    contract = "with a hierarchy of bones, each under one parent"
                    raise self.refusal(contract, f"{name!r} {'twice' if name in seen else 'without data'}", line)
                seen.add(name)
            if words[0] != ROOT and words[0] not in bones:
                raise self.refusal("with a hierarchy of root and bones", repr(words[0]), line)
            children.setdefault(words[0], []).extend(words[1:])
        return children

    def root(self, first: int) -> tuple[Link, int]:
        rows = self.sections[":root"]
        entries, line = self.entries(rows), rows[0][0]
        order = self.degrees_of_freedom(self.entry(entries, "order", line), "tr")
        position = self.numbers(entries, "position", 3, line)
        orientation = self.numbers(entries, "orientation", 3, line)
        matrix = self.turned(orientation, self.entry(entries, "axis", line)) if any(orientation) else None
        turns = [(axis, first + place) for place, (turn, axis) in enumerate(order) if turn]
        moves = [(axis, first + place) for place, (turn, axis) in enumerate(order) if not turn]
        offset = (position[0], position[1], position[2])
        return Link(ROOT, -1, offset, tuple(moves), tuple(reversed(turns)), after=matrix), len(order)

    def bone(self, name: str, entries: Mapping[str, Row], parent: int, first: int) -> tuple[Link, int]:
        line = entries["name"][0]
        x, y, z = self.numbers(entries, "direction", 3, line)
        length = self.numbers(entries, "length", 1, line)[0]
        axes = self.turned(self.numbers(entries, "axis", 3, line), entries["axis"])
        freedom = self.degrees_of_freedom(entries.get("dof", (line, [])), "r")
        turns = tuple((axis, first + place) for place, (_, axis) in enumerate(freedom))
        offset = (x * length, y * length, z * length)
        return Link(name, parent, offset, (), turns[::-1], before=axes, after=axes.T, swings=True), len(freedom)
