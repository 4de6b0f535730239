"""A user's own files, one clip each: `.npy` arrays, `.json` lists or `.csv` rows, with a skeleton given by name or file."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastskel.data.formats.clip_labels import LabelOptions, wrong_option
from fastskel.data.formats.format import FORMATS, Format, SourceClip, clip_name, finite_frames, unreadable
from fastskel.data.formats.text_rows import number_rows, text_lines
from fastskel.data.npy_file import read_npy_header
from fastskel.data.topology_file import named_or_read_topology
from fastskel.skeleton import Topology

__all__ = ["PlainOptions", "read_csv", "read_json", "read_npy"]

_SEPARATORS = ";\t,"


@dataclass(frozen=True)
class PlainOptions(LabelOptions):
    """What plain files do not say about themselves.

    Attributes:
        topology: Skeleton of the V joints: its name, or a JSON file with `name`, `joints` (names) and `parents`.
        channels: Names of the C numbers of a joint.
        units: Unit of the coordinates: metres, pixels or your own.
        up_axis: Axis that points up in the world, -y where y points down as in images.
        labels: Where classes come from: none, folder (the folder that a file lies in) or a CSV file of clip name and class.
    """

    topology: str = ""
    channels: tuple[str, ...] = ("x", "y", "z")
    units: str = "metres"
    up_axis: Literal["x", "y", "z", "-x", "-y", "-z"] = "y"

    def __post_init__(self) -> None:
        names = self.channels
        if not isinstance(names, tuple) or not names or len(set(names)) != len(names) or not all(map(_is_name, names)):
            raise wrong_option("channels", "distinct names", repr(names), "Name each channel once")
        if not _is_name(self.units):
            raise wrong_option("units", "a word", repr(self.units), "Name the unit")
        if self.up_axis not in ("x", "y", "z", "-x", "-y", "-z"):
            raise wrong_option("up_axis", "x, y, z, -x, -y or -z", repr(self.up_axis), "Choose one")
        super().__post_init__()

    @cached_property
    def layout(self) -> tuple[Topology, bool]:
        """Skeleton of the V joints, and whether it comes from a file."""
        return named_or_read_topology(self.topology)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value) and value.isprintable()


def read_npy(data: bytes, path: str, options: PlainOptions = PlainOptions()) -> SourceClip:
    """Read a NumPy file of an array (T, V, C) or (T, M, V, C), without Python objects.

    Args:
        data: Its contents.
        path: Its path, for the name of the clip and for messages.
        options: Skeleton, channels and labels.
    Returns:
        The clip; frames (T, M, V, C).
    Raises:
        ValueError: If it is damaged or of another shape.
    """
    stream = io.BytesIO(data)
    contract = "a complete .npy array without Python objects"
    try:
        shape, by_columns, dtype = read_npy_header(stream)
    except ValueError as error:
        raise unreadable(contract, f"an unreadable one ({error})", path) from error
    if dtype.kind not in "fiu":
        raise unreadable("made of numbers", f"values of type {dtype}", path)
    # the size is compared before anything is allocated: a header can claim any number of frames
    expected, found = math.prod(shape) * dtype.itemsize, len(data) - stream.tell()
    if found != expected:
        raise unreadable(contract, f"{found} bytes for shape {shape}, not {expected}", path)
    values = np.frombuffer(data, dtype, offset=stream.tell())
    return _clip(values.reshape(shape, order="F" if by_columns else "C"), path, options)


def read_json(data: bytes, path: str, options: PlainOptions = PlainOptions()) -> SourceClip:
    """Read a JSON file of nested lists (T, V, C) or (T, M, V, C), alone or under `frames` of an object.

    Args:
        data: Its contents.
        path: Its path, for the name of the clip and for messages.
        options: Skeleton, channels and labels.
    Returns:
        The clip; frames (T, M, V, C).
    Raises:
        ValueError: If it is damaged or of another shape.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise unreadable("complete JSON", f"an unreadable one ({error})", path) from error
    nested = content.get("frames") if isinstance(content, dict) else content
    if not isinstance(nested, list):
        raise unreadable("a list of frames, or an object with the list `frames`", type(nested).__name__, path)
    try:
        values = np.array(nested)
    except ValueError as error:
        raise unreadable("frames of as many joints and channels", "others", path) from error
    return _clip(values, path, options)


def read_csv(data: bytes, path: str, options: PlainOptions = PlainOptions()) -> SourceClip:
    """Read a CSV file: a row for each frame of M x V x C numbers, after a line of column names or none.

    Args:
        data: Its contents; comma, semicolon or tab between numbers, else blanks.
        path: Its path, for the name of the clip and for messages.
        options: Skeleton, channels and labels.
    Returns:
        The clip; frames (T, M, V, C).
    Raises:
        ValueError: If a row has no whole number of bodies, or a value is no number.
    """
    lines = text_lines(data, path)
    separator = next((mark for mark in _SEPARATORS if mark in lines[0][1]), None)
    if not any(map(_is_number, lines[0][1].split(separator))):
        lines = lines[1:]
    if not lines:
        raise unreadable("at least one frame", "none", path)
    rows = number_rows(lines, path, None, separator)
    shape = (options.layout[0].num_joints, len(options.channels))
    bodies, rest = divmod(rows.shape[1], shape[0] * shape[1])
    if rest:
        raise unreadable(f"rows of M x {shape[0]} joints x {shape[1]} numbers", f"{rows.shape[1]} numbers a row", path)
    return _clip(rows.reshape(-1, bodies, *shape), path, options)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _clip(values: NDArray[Any], path: str, options: PlainOptions) -> SourceClip:
    if values.size == 0:
        raise unreadable("at least one frame", f"shape {values.shape}", path)
    if values.ndim == 3:
        values = values[:, None]
    shape = (options.layout[0].num_joints, len(options.channels))
    if values.ndim != 4 or values.shape[2:] != shape:
        contract = f"of shape (T, {shape[0]}, {shape[1]}) or (T, M, {shape[0]}, {shape[1]})"
        raise unreadable(contract, f"shape {values.shape}", path, "Correct it, or the topology or channels")
    frames = finite_frames(values, path)
    return SourceClip(clip_name(path), frames, -1, {}, class_name=options.class_of(path))


def _adapt(fmt: Format, options: PlainOptions) -> Format:
    layout, from_file = options.layout
    return replace(
        fmt,
        topology=layout.name,
        layout=layout if from_file else None,
        channels=options.channels,
        units=options.units,
        up_axis=options.up_axis,
    )


for _name, _read in (("npy", read_npy), ("json", read_json), ("csv", read_csv)):
    FORMATS.add(
        _name,
        Format(
            topology="",
            suffix=f".{_name}",
            channels=(),
            units="",
            up_axis="",
            class_names=(),
            columns=(),
            read=_read,
            about=f"a user's own .{_name} files, one clip each, with a skeleton given by name or file",
            options=PlainOptions(),
            adapt=_adapt,
        ),
    )
