"""What readers of motion capture share: options, the skeleton layout of a hierarchy, and clips of joint positions."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastskel.data.formats.clip_labels import LabelOptions, wrong_option
from fastskel.data.formats.format import Format, SourceClip, clip_name, finite_frames, unreadable
from fastskel.data.formats.kinematics import Link, world_positions
from fastskel.data.packed import UP_AXES, check_column_name
from fastskel.data.topology_file import named_or_read_topology
from fastskel.skeleton import PARTS, Topology

__all__ = [
    "MAX_JOINTS",
    "MAX_NAME",
    "MotionOptions",
    "adapted",
    "checked_topology",
    "clip_columns",
    "every_frame",
    "hierarchy_topology",
    "joint_positions",
    "motion_clip",
    "plain_numbers",
    "positive",
    "word_lines",
]

# bodies with fingers and faces have a few hundred
MAX_JOINTS = 1024
MAX_NAME = 100
# an hour of 50 joints at 120 frames a second: joints without numbers of their own must not multiply a short file
MAX_COORDINATES = 1 << 26
# frame times are written with few digits: 0.0333 is meant as 1/30
_RATE_TOLERANCE = 0.002
_SIDES = (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT"))
_LETTERS = (("l", "r"), ("L", "R"))
_LEG = re.compile("hip|leg|thigh|femur|knee|shin|tibia|ankle|foot|toe", re.IGNORECASE)
_HEAD = re.compile("head|neck|eye|jaw|nose", re.IGNORECASE)


@dataclass(frozen=True)
class MotionOptions(LabelOptions):
    """What files of motion capture do not say about themselves.

    Attributes:
        topology: Skeleton whose joints are picked, and put in order, by their names: its name, or a JSON file with `name`,
            `joints` and `parents`; empty: every joint of the files, which must all have those of the first.
        units: Unit of the coordinates after scaling.
        up_axis: Axis that points up in the world.
        frames_per_second: Frame rate to keep, of which that of the file must be a whole multiple; none: every frame.
        columns: Regular expression that is searched for in the file name; its named groups become text columns of the
            clip, and a group `label` its class.
    """

    topology: str = ""
    units: str = "unknown"
    up_axis: Literal["x", "y", "z", "-x", "-y", "-z"] = "y"
    frames_per_second: float | None = None
    columns: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.units or not self.units.isprintable():
            raise wrong_option("units", "a word", repr(self.units), "Name the unit")
        if self.up_axis not in UP_AXES:
            raise wrong_option("up_axis", ", ".join(UP_AXES), repr(self.up_axis), "Choose one")
        if self.frames_per_second is not None:
            positive("frames_per_second", self.frames_per_second)
        if "label" in self.pattern.groupindex and self.labels != "none":
            raise wrong_option("columns", "without a group label beside labels", repr(self.columns), "Leave one of them out")
        for name in self.column_names:
            check_column_name(name, "pack_source", "the option columns")
        # read now: a wrong path is an error of the call, not of a file
        _ = self.layout

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The regular expression `columns`."""
        try:
            return re.compile(self.columns)
        except re.error as error:
            raise wrong_option("columns", "a regular expression", f"{self.columns!r} ({error})", "Correct it") from error

    @property
    def column_names(self) -> tuple[str, ...]:
        """Names of the columns that the regular expression finds, (k,)."""
        return tuple(name for name in self.pattern.groupindex if name != "label")

    @cached_property
    def layout(self) -> Topology | None:
        """Skeleton of the V joints to pick, None for those of the files."""
        return named_or_read_topology(self.topology)[0] if self.topology else None


def positive(option: str, value: float) -> None:
    """Check a number (a scalar) that a user gave.

    Raises:
        ValueError: If it is not finite and above zero.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise wrong_option(option, "a finite number above 0", repr(value), "Pass one")


def adapted(fmt: Format, options: MotionOptions) -> Format:
    """Return a format of clips (T, 1, V, 3) with units, axis and columns as a user chose them."""
    columns = (*fmt.columns, *options.column_names)
    if len(set(columns)) < len(columns):
        raise wrong_option("columns", f"without the groups {', '.join(fmt.columns)}", repr(options.columns), "Rename them")
    return replace(fmt, units=options.units, up_axis=options.up_axis, columns=columns)


def clip_columns(options: MotionOptions, path: str) -> tuple[dict[str, int | str], str | None]:
    """Return the columns of the clip at a path (a scalar string) and its class.

    Raises:
        ValueError: If the regular expression does not find them, or the list of classes has no row for it.
    """
    name = PurePosixPath(path).name
    match = options.pattern.search(name)
    if match is None:
        contract = f"named as the option columns says ({options.columns})"
        raise unreadable(contract, repr(name), path, "Correct the option or rename the file")
    found = {group: text or "" for group, text in match.groupdict().items()}
    label = found.pop("label", None)
    if label == "":
        raise unreadable(f"named with a label ({options.columns})", repr(name), path, "Correct the option")
    return dict(found), options.class_of(path) if label is None else label


def word_lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Go through the lines of a text that are not blank, (L,), each with its number from 1, without a copy of them all."""
    start, number = (3 if data.startswith(b"\xef\xbb\xbf") else 0), 0
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        number += 1
        line = data[start:end].strip()
        if line:
            yield number, line
        start = end + 1


def plain_numbers(words: Sequence[bytes], line: int, path: str) -> list[float]:
    """Return numbers out of a line, (n,), infinity and NaN among them where it says so.

    Raises:
        ValueError: If a word is no number; names the line.
    """
    try:
        numbers = list(map(float, words))
    except ValueError as error:
        raise unreadable("made of numbers", f"{error} in line {line}", path, "Correct it") from error
    # Python allows 1_000, files do not
    if any(b"_" in word for word in words):
        raise unreadable("made of numbers", f"an underscore in line {line}", path, "Correct it")
    return numbers


def every_frame(rate: float, options: MotionOptions, path: str) -> int:
    """Return which frames to keep, a scalar: every how many'th of a file of `rate` frames per second.

    Raises:
        ValueError: If the rate that a user chose is no whole fraction of it.
    """
    if options.frames_per_second is None:
        return 1
    ratio = rate / options.frames_per_second
    # what overflows is no rate either
    step = round(ratio) if ratio < 1 << 31 else 0
    if step < 1 or abs(ratio - step) > _RATE_TOLERANCE * step:
        contract = f"of a whole multiple of {options.frames_per_second:g} frames per second"
        raise unreadable(contract, f"{rate:.6g}", path, "Choose another frames_per_second: frames are dropped, never made")
    return step


def hierarchy_topology(prefix: str, joints: Sequence[str], parents: Sequence[int]) -> Topology:
    """Make the skeleton layout of a hierarchy that brings nothing but names.

    Args:
        prefix: Beginning of the layout's name; a digest of joints and parents follows.
        joints: Names, (V,).
        parents: Parent of each joint, before it, (V,); -1 for the root.
    Returns:
        The layout. Left and right are joints whose names differ in that word, or in an l and r at their beginning or end,
        and hang on joints that correspond; arms, legs and head go by names, and what has no such name goes with its parent.
        It has no body axes: those need a layout file.
    """
    own = tuple(number if parent < 0 else parent for number, parent in enumerate(parents))
    mirror, left = _mirrored(joints, own)
    parts: dict[str, list[int]] = {part: [] for part in PARTS}
    part_of: list[str] = []
    for number, name in enumerate(joints):
        part = part_of[own[number]] if own[number] != number else "torso"
        if _HEAD.search(name):
            part = "head"
        elif mirror[number] != number and part not in ("head", *PARTS[2:]):
            part = f"{'left' if number in left else 'right'}_{'leg' if _LEG.search(name) else 'arm'}"
        part_of.append(part)
        parts[part].append(number)
    digest = hashlib.sha256(repr((list(joints), own)).encode()).hexdigest()[:8]
    layout = {part: tuple(members) for part, members in parts.items()}
    return Topology(f"{prefix}-{len(joints)}-{digest}", tuple(joints), 0, mirror, layout, {"plain": own})


def _mirrored(joints: Sequence[str], parents: Sequence[int]) -> tuple[tuple[int, ...], set[int]]:
    index = {name: number for number, name in enumerate(joints)}
    mirror, left = list(range(len(joints))), set()
    for number, name in enumerate(joints):
        other = next((index[twin] for twin in _right_names(name) if twin in index), number)
        # parents come first, so theirs is settled: a lower back and a rower back are no pair
        if other != number and mirror[parents[number]] == parents[other] and mirror[other] == other:
            mirror[number], mirror[other] = other, number
            left.add(number)
    return tuple(mirror), left


def _right_names(name: str) -> Iterator[str]:
    for left, right in _SIDES:
        if left in name:
            yield name.replace(left, right, 1)
    for left, right in _LETTERS:
        if name.startswith(left):
            yield right + name[1:]
        if name.endswith(left):
            yield name[:-1] + right


def checked_topology(
    layout: Topology | None, found: Topology, options: MotionOptions, path: str, hint: str = ""
) -> tuple[Topology, tuple[int, ...]]:
    """Choose the skeleton of a file and where its joints are.

    Args:
        layout: Skeleton of the first file, V joints; None where this is it.
        found: Skeleton of this file, L joints.
        options: What a user chose.
        path: The file, for messages.
        hint: What to do about a missing joint, beside correcting the topology.
    Returns:
        The skeleton of the clip and the number of each of its joints among those found, (V,).
    Raises:
        ValueError: If joints are missing, or names or parents differ from those of the first file.
    """
    if options.layout is not None:
        missing = [joint for joint in options.layout.joints if joint not in found.joints]
        if missing:
            contract = f"with every joint of {options.layout.name}"
            actual = f"no {missing[0]!r} among {', '.join(found.joints):.800}"
            raise unreadable(contract, actual, path, f"Correct the topology{hint}")
        return options.layout, tuple(map(found.joints.index, options.layout.joints))
    if layout is None:
        layout = found
    if (found.joints, found.parents()) != (layout.joints, layout.parents()):
        contract = f"of the {layout.num_joints} joints of the first file and of their parents"
        raise unreadable(contract, _difference(found, layout), path, "Pack it apart, or name a topology of joints that all have")
    return layout, tuple(range(found.num_joints))


def _difference(found: Topology, layout: Topology) -> str:
    rows = [
        [(joint, skeleton.joints[parent]) for joint, parent in zip(skeleton.joints, skeleton.parents())]
        for skeleton in (found, layout)
    ]
    for number, (here, there) in enumerate(zip(*rows)):
        if here != there:
            return f"joint {number} {here[0]!r} on {here[1]!r}, not {there[0]!r} on {there[1]!r}"
    return f"{found.num_joints} joints"


def joint_positions(
    links: Sequence[Link], values: NDArray[np.float64], unit: float, wanted: Sequence[int], scale: float, path: str, step: int = 1
) -> NDArray[np.float32]:
    """Place the joints of a clip in the world.

    Args:
        links: The hierarchy, (L,), parents before children.
        values: Numbers of each frame, (T, n).
        unit: Radians of one unit of angles.
        wanted: Links that are joints of the clip, (V,).
        scale: What positions are multiplied by.
        path: The file, for messages.
        step: Which frames to keep: every how many'th.
    Returns:
        Frames, (T / step, 1, V, 3).
    Raises:
        ValueError: If there is no frame, a number is not finite, or there are too many joints and frames.
    """
    if len(values) == 0:
        raise unreadable("at least one frame", "none", path)
    kept = values[::step]
    if len(kept) * len(links) * 3 > MAX_COORDINATES:
        raise unreadable(f"of at most {MAX_COORDINATES} coordinates", f"{len(kept)} frames of {len(links)} joints", path)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise unreadable("finite numbers", f"NaN or infinity in frame {int(np.argmin(finite))}", path)
    return finite_frames(world_positions(links, kept, unit, scale, wanted), path)[:, None]


def motion_clip(
    frames: NDArray[np.float32], path: str, options: MotionOptions, notes: Sequence[str], **columns: int
) -> SourceClip:
    """Make a clip of frames (T, 1, V, 3) from a file at a path, with columns of its own and those of its name."""
    named, label = clip_columns(options, path)
    return SourceClip(clip_name(path), frames, -1, {**columns, **named}, class_name=label, notes=tuple(notes))
