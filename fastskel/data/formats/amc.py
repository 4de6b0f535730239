"""Acclaim motion capture: text files `07_01.amc` of the angles of every frame, beside the skeleton `07.asf` that they turn.

A skeleton belongs to the motions of its folder whose names begin with its own: 07.asf to 07_01.amc; the longest such name counts.
Without one there, the only skeleton of the folder is it, and then such a name anywhere in the source.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastskel.data.formats.asf import AsfSkeleton, read_skeleton
from fastskel.data.formats.format import FORMATS, Annotations, Format, SourceClip, unreadable
from fastskel.data.formats.motion_capture import (
    MotionOptions,
    adapted,
    checked_topology,
    every_frame,
    joint_positions,
    motion_clip,
    plain_numbers,
    positive,
    word_lines,
)
from fastskel.skeleton import Topology

__all__ = ["AmcOptions", "layout_of", "read", "read_skeletons"]

# answer to "How do I convert the lengths used in the asf/amc files into meters?" of mocap.cs.cmu.edu/faqs.php: divide by the
# length of :units, 0.45 there, which gives inches
_METRES_PER_INCH = 0.0254
_ANGLES = {b":degrees": math.pi / 180, b":radians": 1.0}
# where the skeleton was and which frames these are says nothing about this source
_UNUSED = (b":fully-specified", b":asf-file", b":asf-path", b":frame-range")


@dataclass(frozen=True)
class AmcOptions(MotionOptions):
    """What Acclaim files do not say about themselves.

    Attributes:
        topology: Skeleton whose joints are picked, and put in order, by their names: its name, or a JSON file with `name`,
            `joints` and `parents`; empty: root and bones, which must be those of the first file in all.
        scale: What coordinates are multiplied by; none: 0.0254 / length of :units, which makes metres of the CMU database's
            numbers (inches times 0.45).
        recorded_at: Frames per second of files that do not say it: 120 in most of the CMU database.
    """

    units: str = "metres"
    up_axis: Literal["x", "y", "z", "-x", "-y", "-z"] = "y"
    scale: float | None = None
    recorded_at: float = 120.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is not None:
            positive("scale", self.scale)
        positive("recorded_at", self.recorded_at)


def read_skeletons(files: Mapping[str, bytes]) -> dict[str, AsfSkeleton]:
    """Read the skeletons beside the motions, (V,) links each, by path."""
    return {path: read_skeleton(data, path) for path, data in files.items()}


def read(
    data: bytes,
    path: str,
    options: AmcOptions = AmcOptions(),
    annotations: Mapping[str, AsfSkeleton] | None = None,
    layout: Topology | None = None,
) -> SourceClip:
    """Read one file.

    Args:
        data: Text of a motion.
        path: Its path, for its skeleton, the name of the clip and for messages.
        options: What the file does not say.
        annotations: Skeleton files by path.
        layout: Skeleton of the first file, V joints; None: any.
    Returns:
        The clip; frames (T, 1, V, 3): the root and the end of each bone, in the order of the hierarchy unless a topology is
        named.
    Raises:
        ValueError: If it is no such file, naming the line, has no skeleton, or has other joints than the first.
    """
    skeleton = _skeleton_of(path, annotations or {})
    _, places = checked_topology(layout, skeleton.topology(), options, path)
    motion = _Motion(skeleton, options.recorded_at, path)
    values = motion.read(data)
    step = every_frame(motion.rate, options, path)
    scale = _METRES_PER_INCH / skeleton.length if options.scale is None else options.scale
    frames = joint_positions(skeleton.links, values, motion.angle, places, scale, path, step)
    notes = []
    if skeleton.links[0].after is not None:
        notes.append(f"the root is turned by the orientation in {skeleton.path} before a frame turns it: not all programs do so")
    return motion_clip(frames, path, options, notes)


def layout_of(
    data: bytes,
    path: str,
    options: AmcOptions = AmcOptions(),
    annotations: Mapping[str, AsfSkeleton] | None = None,
) -> Topology:
    """Return the skeleton of a motion, V joints, as the options have it.

    Raises:
        ValueError: If it has none.
    """
    return checked_topology(None, _skeleton_of(path, annotations or {}).topology(), options, path)[0]


def _skeleton_of(path: str, skeletons: Mapping[str, AsfSkeleton]) -> AsfSkeleton:
    place = PurePosixPath(path)
    near = [other for other in skeletons if PurePosixPath(other).parent == place.parent]
    found = _named_like(place.stem, near) or (near if len(near) == 1 else _named_like(place.stem, list(skeletons)))
    if len(found) != 1:
        actual = " and ".join(sorted(found or near)[:3]) or "none"
        contract = "beside one .asf skeleton whose name it begins with, or the only one of its folder"
        raise unreadable(contract, actual, path, "Put the skeleton beside it, 07.asf beside 07_01.amc")
    return skeletons[found[0]]


def _named_like(stem: str, skeletons: Sequence[str]) -> list[str]:
    """Skeletons, among their paths, whose name is the longest that a motion's begins with."""
    names = {path: PurePosixPath(path).stem for path in skeletons}
    fitting = {path: name for path, name in names.items() if stem == name or re.match(re.escape(name) + r"[^0-9A-Za-z]", stem)}
    longest = max(map(len, fitting.values()), default=0)
    return [path for path, name in fitting.items() if len(name) == longest]


class _Motion:
    """The frames of a motion as far as they are read, and what their head says."""

    def __init__(self, skeleton: AsfSkeleton, rate: float, path: str) -> None:
        self.skeleton = skeleton
        self.angle = skeleton.angle
        self.rate = rate
        self.path = path
        self.values = array("d")
        self.row = [0.0] * skeleton.num_values
        self.waiting: set[str] = set()
        self.number: int | None = None

    def read(self, data: bytes) -> NDArray[np.float64]:
        line = 0
        for line, raw in word_lines(data):
            words = raw.split()
            if words[0].startswith(b"#"):
                continue
            if words[0].startswith(b":"):
                self.take_head(words, line)
            elif len(words) == 1 and words[0].isdigit():
                self.finish_frame(line)
                self.begin_frame(words[0], line)
            else:
                self.take_bone(words, line)
        if self.number is None:
            raise unreadable("at least one frame", "none", self.path)
        self.finish_frame(line)
        return np.frombuffer(self.values, np.float64).reshape(-1, self.skeleton.num_values)

    def take_head(self, words: list[bytes], line: int) -> None:
        key = words[0].lower()
        if self.number is None and key == b":samples-per-second" and len(words) == 2:
            self.rate = plain_numbers(words[1:], line, self.path)[0]
            if not 0 < self.rate < math.inf:
                raise self.refusal("of samples per second above 0", f"{self.rate}", line)
        elif self.number is None and key in _ANGLES:
            self.angle = _ANGLES[key]
        elif self.number is not None or key not in _UNUSED:
            contract = "with :FULLY-SPECIFIED, :DEGREES or :RADIANS before its first frame, and :SAMPLES-PER-SECOND"
            raise self.refusal(contract, f"{b' '.join(words)[:40]!r}", line)

    def begin_frame(self, word: bytes, line: int) -> None:
        if len(word) > 9 or (self.number is not None and int(word) != self.number + 1):
            raise self.refusal("of frames in a row", f"frame {word[:20].decode()} after {self.number}", line)
        self.number = int(word)
        self.waiting = set(self.skeleton.slots)

    def finish_frame(self, line: int) -> None:
        if self.waiting:
            raise self.refusal("with every bone in every frame", f"none of {min(self.waiting)!r} in frame {self.number}", line)
        if self.number is not None:
            self.values.extend(self.row)

    def take_bone(self, words: list[bytes], line: int) -> None:
        name = words[0].decode("utf-8", "replace")
        first, behind = self.skeleton.slots.get(name, (0, 0))
        if name in self.waiting and len(words) - 1 == behind - first:
            self.waiting.remove(name)
            self.row[first:behind] = plain_numbers(words[1:], line, self.path)
            return
        if self.number is None:
            raise self.refusal("of frames, each after its number", f"{name[:40]!r}", line)
        if name not in self.skeleton.slots:
            raise self.refusal(f"of the root and the bones with dof in {self.skeleton.path}", f"{name[:40]!r}", line)
        contract = "with each bone once in a frame, and as many numbers as it has dof"
        raise self.refusal(contract, f"{name!r} with {len(words) - 1} of {behind - first} in frame {self.number}", line)

    def refusal(self, contract: str, actual: str, line: int) -> ValueError:
        return unreadable(contract, f"{actual:.160} in line {line}", self.path, "Correct it")


FORMATS.add(
    "amc",
    Format(
        topology="",
        suffix=".amc",
        channels=("x", "y", "z"),
        units="",
        up_axis="",
        class_names=(),
        columns=(),
        read=read,
        options=AmcOptions(),
        annotations=Annotations(re.compile(r"\.asf$", re.IGNORECASE), read_skeletons),
        adapt=adapted,
        layout_of=layout_of,
        about=".amc motion capture with its .asf skeletons (Acclaim), as the CMU Graphics Lab database (mocap.cs.cmu.edu) and "
        "HDM05 of the University of Bonn are published",
    ),
)
