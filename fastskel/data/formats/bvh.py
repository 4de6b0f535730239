"""Biovision hierarchies: text files `*.bvh` of a skeleton and the angles of every frame, one person each.

The hierarchy is read line by line without recursion; forward kinematics turn it into positions. Files differ in what the position
channels of a joint with an offset mean: the description adds them (M. Meredith, S. Maddock, Motion Capture File Formats
Explained, 2001), many programs write both into the channels. Such a file is refused until one says which it is.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastskel.data.formats.clip_labels import wrong_option
from fastskel.data.formats.format import FORMATS, Format, SourceClip, unreadable
from fastskel.data.formats.kinematics import Link
from fastskel.data.formats.motion_capture import (
    MAX_JOINTS,
    MAX_NAME,
    MotionOptions,
    adapted,
    checked_topology,
    every_frame,
    hierarchy_topology,
    joint_positions,
    motion_clip,
    plain_numbers,
    positive,
    word_lines,
)
from fastskel.skeleton import Topology

__all__ = ["BvhOptions", "layout_of", "read"]

_CHANNELS = {f"{axis}{kind}": (kind == "ROTATION", "XYZ".index(axis)) for axis in "XYZ" for kind in ("POSITION", "ROTATION")}
_COUNTS = tuple(map(str, range(len(_CHANNELS) + 1)))
# seconds of a frame; the column in microseconds holds them
_SHORTEST, _LONGEST = 1e-6, 3600.0
_POSITIONS = ("refuse", "add", "replace")
Lines = Iterator[tuple[int, bytes]]


@dataclass(frozen=True)
class BvhOptions(MotionOptions):
    """What Biovision files do not say about themselves.

    Attributes:
        scale: What coordinates are multiplied by, 0.01 where they are centimetres and shall be metres.
        end_sites: Keep the End Sites of the hierarchy as joints, `<joint>_end`. They are left out otherwise.
        positions: What the position channels of a joint with an offset hold: add (its move from there), or replace (offset and
            move). refuse: stop at such a file.
    """

    scale: float = 1.0
    end_sites: bool = False
    positions: Literal["refuse", "add", "replace"] = "refuse"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("scale", self.scale)
        if self.positions not in _POSITIONS:
            raise wrong_option("positions", ", ".join(_POSITIONS), repr(self.positions), "Choose one")


@dataclass
class _Joint:
    name: str
    parent: int
    end: bool
    offset: tuple[float, float, float] | None = None
    # (is it a rotation, axis) in the order of the file; None before the line CHANNELS
    channels: list[tuple[bool, int]] | None = None


def read(data: bytes, path: str, options: BvhOptions = BvhOptions(), layout: Topology | None = None) -> SourceClip:
    """Read one file.

    Args:
        data: Text of a hierarchy and its motion.
        path: Its path, for the name of the clip and for messages.
        options: What the file does not say.
        layout: Skeleton of the first file, V joints; None: any.
    Returns:
        The clip; frames (T, 1, V, 3), in the order of the hierarchy unless a topology is named, and the column
        `frame_microseconds`, the time between two of its frames.
    Raises:
        ValueError: If it is no such file, naming the line, or has other joints than the first.
    """
    lines = word_lines(data)
    joints = _read_hierarchy(lines, path)
    _, places = _skeleton(joints, layout, options, path)
    links = _links(joints, options, path)
    values, seconds = _read_motion(lines, sum(len(joint.channels or ()) for joint in joints), path)
    step = every_frame(1 / seconds, options, path)
    frames = joint_positions(links, values, math.pi / 180, places, options.scale, path, step)
    return motion_clip(frames, path, options, (), frame_microseconds=round(seconds * step * 1e6))


def layout_of(data: bytes, path: str, options: BvhOptions = BvhOptions()) -> Topology:
    """Return the skeleton of a file, V joints, as the options have it.

    Raises:
        ValueError: If it has no readable hierarchy.
    """
    return _skeleton(_read_hierarchy(word_lines(data), path), None, options, path)[0]


def _skeleton(
    joints: list[_Joint], layout: Topology | None, options: BvhOptions, path: str
) -> tuple[Topology, tuple[int, ...]]:
    kept = [number for number, joint in enumerate(joints) if options.end_sites or not joint.end]
    names = [joints[number].name for number in kept]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise unreadable("of joints with distinct names", f"{twice!r} twice", path, "Rename one of them")
    # End Sites have no children, so what is kept hangs on what is kept
    found = hierarchy_topology("bvh", names, [joints[n].parent if n == 0 else kept.index(joints[n].parent) for n in kept])
    skeleton, places = checked_topology(
        layout, found, options, path, "" if options.end_sites else ", or keep end_sites for names like Head_end"
    )
    return skeleton, tuple(kept[place] for place in places)


class _Hierarchy:
    """A hierarchy as far as it is read: its joints, those whose brace is open, and whether a brace is due."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.joints: list[_Joint] = []
        self.open: list[int] = []
        self.due = False

    def take(self, words: list[str], line: int) -> list[str]:
        """Take in one statement and return the words behind it."""
        word = words[0].upper()
        if self.due != (word == "{"):
            raise self.refusal("with { after the name of a joint and nowhere else", repr(words[0]), line)
        if word == "{":
            self.open.append(len(self.joints) - 1)
            self.due = False
            return words[1:]
        if word in ("ROOT", "JOINT", "END"):
            return self.take_joint(word, words, line)
        if not self.open:
            raise self.refusal("of ROOT and, inside of it, joints", repr(words[0]), line)
        joint = self.joints[self.open[-1]]
        if word == "}":
            self.open.pop()
            if joint.offset is None:
                raise self.refusal(f"with an OFFSET of {joint.name!r}", "its end", line)
            return words[1:]
        if word == "OFFSET" and joint.offset is None:
            numbers = plain_numbers([word.encode() for word in words[1:4]], line, self.path)
            if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
                raise self.refusal("with three finite numbers as OFFSET", " ".join(words[1:4]), line)
            joint.offset = (numbers[0], numbers[1], numbers[2])
            return words[4:]
        if word == "CHANNELS" and joint.channels is None and not joint.end:
            return self.take_channels(joint, words, line)
        contract = "of ROOT, JOINT, End Site, OFFSET once, CHANNELS once and not in an End Site, and MOTION"
        raise self.refusal(contract, repr(words[0]), line)

    def take_joint(self, kind: str, words: list[str], line: int) -> list[str]:
        behind = words.index("{") if "{" in words else len(words)
        name = " ".join(words[1:behind])
        if (kind == "ROOT") == bool(self.joints) or (kind != "ROOT" and not self.open):
            raise self.refusal("of one ROOT with all joints inside of it", f"{words[0]} {name}", line)
        parent = self.open[-1] if self.open else -1
        if self.open and self.joints[parent].end:
            raise self.refusal("without joints in an End Site", f"{words[0]} {name}", line)
        if kind == "END":
            number = sum(joint.end and joint.parent == parent for joint in self.joints) + 1
            if name.lower().split()[:1] != ["site"]:
                raise self.refusal("with Site after End", f"{words[0]} {name}", line)
            name = f"{self.joints[parent].name}_end{number if number > 1 else ''}"
        if not name or len(name) > MAX_NAME or not name.isprintable():
            raise self.refusal(f"with names of joints of at most {MAX_NAME} characters", repr(name), line)
        if len(self.joints) == MAX_JOINTS:
            raise self.refusal(f"of at most {MAX_JOINTS} joints", "one more", line)
        self.joints.append(_Joint(name, parent, kind == "END"))
        self.due = True
        return words[behind:]

    def take_channels(self, joint: _Joint, words: list[str], line: int) -> list[str]:
        count = int(words[1]) if len(words) > 1 and words[1] in _COUNTS else -1
        found = [_CHANNELS.get(word.upper()) for word in words[2 : 2 + count]]
        channels = [channel for channel in found if channel is not None]
        if count < 0 or len(channels) != count or len(set(channels)) != count:
            contract = "with CHANNELS, their number and that many of Xposition to Zrotation, each once"
            raise self.refusal(contract, repr(" ".join(words[:8])), line)
        joint.channels = channels
        return words[2 + count :]

    def refusal(self, contract: str, actual: str, line: int) -> ValueError:
        return unreadable(contract, f"{actual:.160} in line {line}", self.path, "Correct it")


def _read_hierarchy(lines: Lines, path: str) -> list[_Joint]:
    line, first = next(lines, (1, b""))
    if first.upper() != b"HIERARCHY":
        raise unreadable("a text that begins with HIERARCHY", f"{first[:40]!r} in line {line}", path)
    tree = _Hierarchy(path)
    for line, raw in lines:
        try:
            words = raw.decode("utf-8").replace("{", " { ").replace("}", " } ").split()
        except UnicodeDecodeError as error:
            raise tree.refusal("text in UTF-8", f"other bytes ({error.reason})", line) from error
        if words[:1] and words[0].upper() == "MOTION" and len(words) == 1:
            if tree.open or tree.due or not tree.joints:
                raise tree.refusal("with a ROOT whose braces are closed before MOTION", f"{len(tree.open)} open", line)
            return tree.joints
        while words:
            words = tree.take(words, line)
    raise unreadable("with MOTION after the hierarchy", "its end", path)


def _links(joints: list[_Joint], options: BvhOptions, path: str) -> list[Link]:
    links, column = [], 0
    for joint in joints:
        offset = list(joint.offset or (0.0, 0.0, 0.0))
        numbered = [(turns, axis, column + place) for place, (turns, axis) in enumerate(joint.channels or ())]
        column += len(numbered)
        moved = [axis for turns, axis, _ in numbered if not turns]
        if any(offset[axis] for axis in moved):
            if options.positions == "refuse":
                actual = f"{joint.name!r} with OFFSET {' '.join(map(str, offset))} and position channels"
                action = "Say with the option positions whether its channels add to the offset or replace it"
                raise unreadable("without position channels where a joint has an offset", actual, path, action)
            if options.positions == "replace":
                offset = [0.0 if axis in moved else value for axis, value in enumerate(offset)]
        links.append(
            Link(
                joint.name,
                joint.parent,
                (offset[0], offset[1], offset[2]),
                tuple((axis, place) for turns, axis, place in numbered if not turns),
                tuple((axis, place) for turns, axis, place in numbered if turns),
            )
        )
    return links


def _read_motion(lines: Lines, num_channels: int, path: str) -> tuple[NDArray[np.float64], float]:
    line, count = _headed(lines, "Frames", path)
    if not count.isdigit() or len(count) > 18:
        raise unreadable("with a whole number of Frames", f"{count[:40]!r} in line {line}", path, "Correct it")
    num_frames = int(count)
    line, time = _headed(lines, "Frame Time", path)
    seconds = plain_numbers([time], line, path)[0]
    if not _SHORTEST <= seconds <= _LONGEST:
        contract = "with a Frame Time from a microsecond to an hour"
        raise unreadable(contract, f"{seconds} in line {line}", path, "Correct it")
    if num_channels == 0:
        raise unreadable("with at least one channel", "none", path)
    values, rows = array("d"), 0
    for line, raw in lines:
        # one word more than there should be is enough to know
        words = raw.split(None, num_channels)
        rows += 1
        if len(words) != num_channels or rows > num_frames:
            contract = f"{num_frames} rows of {num_channels} numbers after Frame Time"
            raise unreadable(contract, f"row {rows} of {len(raw.split())} in line {line}", path)
        values.extend(plain_numbers(words, line, path))
    if rows != num_frames or rows == 0:
        raise unreadable(f"{num_frames} frames, at least one, as it says", f"{rows}", path)
    return np.frombuffer(values, np.float64).reshape(rows, num_channels), seconds


def _headed(lines: Lines, head: str, path: str) -> tuple[int, bytes]:
    line, raw = next(lines, (0, b""))
    before, _, value = raw.partition(b":")
    if before.upper().split() != head.upper().encode().split() or len(value.split()) != 1:
        actual = f"{raw[:40]!r} in line {line}" if line else "its end"
        raise unreadable(f"with {head}: and a number after MOTION", actual, path, "Correct it")
    return line, value.strip()


FORMATS.add(
    "bvh",
    Format(
        topology="",
        suffix=".bvh",
        channels=("x", "y", "z"),
        units="",
        up_axis="",
        class_names=(),
        columns=("frame_microseconds",),
        read=read,
        options=BvhOptions(),
        adapt=adapted,
        layout_of=layout_of,
        about=".bvh motion capture (Biovision hierarchy), as LAFAN1 of Ubisoft La Forge, the Bandai Namco Research motion "
        "dataset and conversions of the CMU database are published, and as animation programs export it",
    ),
)
