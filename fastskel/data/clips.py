"""Checks a user's clips and what comes with them, and brings them to the form the packed format stores."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastskel.data.npy_file import map_npy
from fastskel.data.packed import check_column_name
from fastskel.skeleton import Topology

__all__ = [
    "ClipReader",
    "Columns",
    "Part",
    "plain_labels",
    "plain_names",
    "plain_segments",
    "plain_splits",
    "plain_strings",
]

# a clip of a split: its index or its name
Part = int | str


def _fault(argument: str, contract: str, actual: object, action: str) -> ValueError:
    return ValueError(f"pack_arrays: {argument} must be {contract}, got {actual}. {action}.")


def _is_list(values: object) -> bool:
    # text is a list of characters to Python, a mapping one of keys, and a set has no order
    if isinstance(values, (str, bytes, Mapping, Set)) or not isinstance(values, Collection):
        return False
    return bool(getattr(values, "ndim", 1) > 0)


def _whole(value: Any) -> int | None:
    # rows of an array of segments hold whole numbers as floats; True is no number of anything
    if hasattr(value, "item") and np.ndim(value) == 0:
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


class ClipReader:
    """Reads clips one by one as (T, M, V, C) float32 with the mask of their valid frames, (T,)."""

    def __init__(self, topology: Topology, names: Sequence[str] | None, num_frames: Any) -> None:
        if names is not None and not _is_list(names):
            raise _fault("names", "a list of strings", reprlib.repr(names), "Pass one name per clip")
        self.topology = topology
        self.names = names
        self.all_valid = isinstance(num_frames, str) and num_frames == "all"
        counted = num_frames is not None and not self.all_valid
        self.num_frames = _integers("num_frames", num_frames) if counted else None
        self.num_channels = 0
        self.where = ""

    def read(self, clips: Iterable[Any]) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
        """Yield the valid frames (T', M, V, C) of each clip and which of its T frames they are, (T,).

        Raises:
            ValueError: If a clip cannot be packed, naming it.
        """
        number = -1
        fault = _fault("clips", "a list or generator", type(clips).__name__, "Put a single clip into a list")
        if isinstance(clips, (str, bytes, os.PathLike, Mapping)):
            raise fault
        try:
            iterator = enumerate(clips)
        except TypeError as error:
            raise fault from error
        while True:
            try:
                number, clip = next(iterator)
            except StopIteration:
                break
            except OSError as error:
                raise _fault(f"clip {number + 1}", "readable", error, "Fix or remove it") from error
            self.where = self._where(number, clip)
            frames = self._frames(clip)
            valid = self._valid(number, frames)
            yield (frames if valid.all() else frames[valid]), valid
        total = number + 1
        if total == 0:
            raise _fault("clips", "at least one", "none", "Pass the clips to pack")
        if self.num_frames is not None and len(self.num_frames) != total:
            raise _fault("num_frames", f"one per clip ({total})", len(self.num_frames), "Pass one number per clip")

    def _where(self, number: int, clip: Any) -> str:
        name = f" ({self.names[number]!r})" if self.names is not None and number < len(self.names) else ""
        path = f" in {os.fspath(clip)}" if isinstance(clip, (str, os.PathLike)) else ""
        return f"clip {number}{name}{path}"

    def _frames(self, clip: Any) -> NDArray[np.float32]:
        try:
            # numbers only: neither a file nor an object array may run code
            values = map_npy(Path(clip)) if isinstance(clip, (str, os.PathLike)) else np.asarray(clip)
        except (ValueError, TypeError, OSError) as error:
            contract = "an array or a complete .npy file of numbers"
            raise _fault(self.where, contract, f"an unreadable one ({error})", "Fix or remove it") from error
        if values.dtype.kind not in "fiu":
            raise _fault(self.where, "made of numbers", f"values of type {values.dtype}", "Convert it to float32")
        joints = self.topology.num_joints
        if values.ndim != 4 or values.shape[2] != joints:
            contract = f"(T, M, {joints}, C) for {self.topology.name!r}"
            raise _fault(self.where, contract, f"shape {values.shape}", "Add the missing axes or name another topology")
        if 0 in values.shape:
            raise _fault(self.where, "at least one frame, body and channel", f"shape {values.shape}", "Remove the clip")
        if self.num_channels not in (0, values.shape[3]):
            contract = f"of {self.num_channels} channels as the clips before it"
            raise _fault(self.where, contract, values.shape[3], "Bring all clips to the same channels")
        self.num_channels = values.shape[3]
        with np.errstate(over="ignore"):
            frames = np.ascontiguousarray(values, dtype=np.float32)
        finite = np.isfinite(frames).reshape(len(frames), -1).all(axis=1)
        if not finite.all():
            actual = f"NaN or infinity in frame {int(np.argmin(finite))}"
            raise _fault(self.where, "finite numbers", actual, "Set absent joints to zero")
        return frames

    def _valid(self, number: int, frames: NDArray[np.float32]) -> NDArray[np.bool_]:
        if self.all_valid:
            return np.ones(len(frames), dtype=bool)
        if self.num_frames is None:
            valid = np.asarray(frames.any(axis=(1, 2, 3)))
            if not valid.any():
                raise _fault(self.where, "at least one frame with a non-zero joint", "none", "Remove the clip")
            return valid
        if number >= len(self.num_frames):
            raise _fault("num_frames", "one per clip", f"only {number}", "Pass one number per clip")
        count = int(self.num_frames[number])
        if not 1 <= count <= len(frames):
            contract = f"in [1, {len(frames)}] for {self.where}"
            raise _fault("num_frames", contract, count, "Remove empty clips and correct the counts")
        return np.arange(len(frames)) < count


class Columns:
    """Columns of the n clips, with one value per clip, (n,), or per frame, (T,) for each clip."""

    def __init__(self, columns: Mapping[str, Any], where: str) -> None:
        if not isinstance(columns, Mapping):
            raise _fault("columns", "a mapping from name to values", reprlib.repr(columns), "Name the columns")
        lowered = [str(name).lower() for name in columns]
        if len(set(lowered)) != len(lowered):
            # some file systems do not tell their files apart
            raise _fault("columns", "named apart from upper and lower case", list(columns), "Rename one")
        self._clip: dict[str, NDArray[Any]] = {}
        self._frame: dict[str, Sequence[Any]] = {}
        self._taken: dict[str, list[NDArray[Any]]] = {}
        for name, values in columns.items():
            check_column_name(name, "pack_arrays", where)
            if not _is_list(values):
                contract = "a list with one value per clip, or of arrays with one value per frame"
                raise _fault(f"column {name!r}", contract, reprlib.repr(values), "Correct it")
            if len(values) and all(_is_list(value) for value in values):
                self._frame[name], self._taken[name] = values, []
            else:
                self._clip[name] = _plain_column(name, values)

    def take(self, number: int, valid: NDArray[np.bool_], where: str) -> None:
        """Keep the values of one clip's valid frames, given as a mask (T,).

        Raises:
            ValueError: If a per-frame column has another length, naming the clip.
        """
        for name, values in self._frame.items():
            if number >= len(values):
                raise _fault(
                    f"column {name!r}", "given for every clip", f"{len(values)} clips", "Pass one array per clip"
                )
            value = _plain_column(name, values[number])
            if len(value) != len(valid):
                contract = f"one value for each of the {len(valid)} frames of {where}"
                raise _fault(f"column {name!r}", contract, len(value), "Pass one value per frame")
            self._taken[name].append(value[valid])

    def finish(self, num_clips: int) -> dict[str, tuple[str, NDArray[Any]]]:
        """Return name to ("clip", (n,)) or ("frame", (sum T,)).

        Raises:
            ValueError: If a column does not fit the number of clips.
        """
        done: dict[str, tuple[str, NDArray[Any]]] = {}
        for name, values in self._clip.items():
            if len(values) != num_clips:
                contract = f"one value per clip ({num_clips}) or a list of arrays with one per frame"
                raise _fault(f"column {name!r}", contract, f"{len(values)} values", "Correct its length")
            done[name] = "clip", values
        for name, taken in self._taken.items():
            if len(self._frame[name]) != num_clips:
                actual = f"{len(self._frame[name])} arrays"
                raise _fault(f"column {name!r}", f"given for {num_clips} clips", actual, "Pass one array per clip")
            done[name] = "frame", np.concatenate(taken)
        return done


def _plain_column(name: str, values: Any) -> NDArray[Any]:
    try:
        column = np.asarray(values)
    except ValueError as error:
        raise _fault(f"column {name!r}", "one plain value per clip or frame", error, "Flatten it") from error
    # wider numbers differ from machine to machine, and tensors cannot hold them
    if column.dtype.kind not in "biufU" or column.ndim != 1 or (column.dtype.kind != "U" and column.itemsize > 8):
        actual = f"{column.dtype} with {column.ndim} axes"
        raise _fault(
            f"column {name!r}", "numbers or strings along one axis, a number of at most 8 bytes", actual, "Convert it"
        )
    return column.astype(np.int64) if column.dtype.kind == "i" else column


def _integers(argument: str, values: Any) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise _fault(argument, "whole numbers along one axis", f"{array.dtype} of shape {array.shape}", "Convert them")
    return array.astype(np.int64)


def plain_strings(argument: str, values: Sequence[str]) -> list[str]:
    """Return names of classes or channels, (K,).

    Raises:
        ValueError: If they are not a list of distinct strings.
    """
    if not _is_list(values) or not all(isinstance(value, str) for value in values):
        raise _fault(argument, "a list of strings", reprlib.repr(values), "Pass a list, also of one name")
    names = [str(value) for value in values]
    if len(set(names)) != len(names):
        raise _fault(argument, "distinct", names, "Rename one")
    return names


def plain_names(names: Sequence[str] | None, num_clips: int) -> NDArray[np.str_]:
    """Return clip names, (n,), given or numbered.

    Raises:
        ValueError: If there are not n of them, or one is empty, not printable or there twice.
    """
    if names is None:
        return np.array([f"clip-{number:06d}" for number in range(num_clips)])
    if len(names) != num_clips:
        raise _fault("names", f"one per clip ({num_clips})", len(names), "Pass one name per clip")
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise _fault("names", "printable strings", repr(name), "Rename the clip")
        if str(name) in seen:
            raise _fault("names", "unique", f"{name!r} twice", "Rename one of the clips")
        seen.add(str(name))
    return np.array([str(name) for name in names])


def plain_labels(labels: Any, num_clips: int, num_classes: int) -> NDArray[np.int64]:
    """Return the class of each clip, (n,), -1 where unknown.

    Raises:
        ValueError: If there are not n labels, or one is no class and not -1, naming the clip.
    """
    if labels is None:
        return np.full(num_clips, -1, dtype=np.int64)
    array = _integers("labels", labels)
    if len(array) != num_clips:
        raise _fault("labels", f"one per clip ({num_clips})", len(array), "Pass one label per clip")
    wrong = np.flatnonzero((array < -1) | ((array >= num_classes) & (num_classes > 0)))
    if len(wrong):
        contract = (
            f"-1 or in range({num_classes}), one of the class names" if num_classes else "-1 or a class from 0 on"
        )
        raise _fault(
            "labels", contract, f"{array[wrong[0]]} for clip {wrong[0]}", "Correct the label or the class names"
        )
    return array


def plain_splits(
    splits: Mapping[str, Mapping[str, Sequence[Part]]], names: NDArray[np.str_]
) -> dict[str, dict[str, list[int]]]:
    """Return protocol to part to clip indices, (k,) each, of clips given by index or by one of the names, (n,).

    Raises:
        ValueError: If the form is another, or a clip is unknown, or twice in a protocol.
    """
    form = "a mapping from string to "
    if not isinstance(splits, Mapping) or not all(isinstance(name, str) for name in splits):
        raise _fault("splits", f"{form}the parts of a protocol", reprlib.repr(splits), "Name the protocols")
    index = {str(name): number for number, name in enumerate(names)}
    done: dict[str, dict[str, list[int]]] = {}
    for protocol, parts in splits.items():
        if not isinstance(parts, Mapping) or not all(isinstance(part, str) for part in parts):
            raise _fault(f"splits[{protocol!r}]", f"{form}clips", reprlib.repr(parts), "Name its parts train and test")
        done[protocol] = {}
        seen: dict[int, str] = {}
        for part, members in parts.items():
            done[protocol][part] = []
            where = f"splits[{protocol!r}][{part!r}]"
            if not _is_list(members):
                raise _fault(where, "a list of clips", reprlib.repr(members), "Pass names or indices")
            for member in members:
                number = index.get(str(member)) if isinstance(member, str) else _whole(member)
                if number is None or not 0 <= number < len(names):
                    raise _fault(where, f"names or indices of the {len(names)} clips", repr(member), "Remove it")
                if number in seen:
                    actual = f"clip {number} ({str(names[number])!r}) in {seen[number]!r} too"
                    raise _fault(where, "apart from the other parts, without repeats", actual, "Remove it from one")
                seen[number] = part
                done[protocol][part].append(number)
    return done


def plain_segments(
    segments: Any, names: NDArray[np.str_], kept: Sequence[NDArray[np.bool_]], num_classes: int
) -> NDArray[np.float64]:
    """Return segments, (S, 5), counted in valid frames.

    Args:
        segments: Rows (clip, class, start, end[, confidence]), clip by index or name, frames as given by the user.
        names: Clip names, (n,).
        kept: Which frames of each clip are valid, (T,) each.
        num_classes: Number of classes K, 0 where unknown.
    Raises:
        ValueError: If a row does not fit its clip, naming the row.
    """
    if not _is_list(segments):
        raise _fault("segments", "a list of rows", reprlib.repr(segments), "Put a single one into a list")
    index = {str(name): number for number, name in enumerate(names)}
    rows = np.zeros((len(segments), 5))
    for number, row in enumerate(segments):
        if not _is_list(row) or not 4 <= len(row) <= 5:
            raise _fault(f"segment {number}", "(clip, class, start, end[, confidence])", repr(row), "Correct it")
        clip = index.get(str(row[0])) if isinstance(row[0], str) else _whole(row[0])
        label, start, end = (_whole(value) for value in row[1:4])
        if label is None or start is None or end is None:
            raise _fault(f"segment {number}", "of whole class, start and end", repr(row), "Correct or round it")
        try:
            confidence = float(row[4]) if len(row) == 5 else 1.0
        except (TypeError, ValueError):
            confidence = math.nan
        if clip is None or not 0 <= clip < len(names):
            raise _fault(f"segment {number}", f"in one of the {len(names)} clips", repr(row[0]), "Correct it")
        valid = kept[clip]
        if not 0 <= start < end <= len(valid):
            contract = f"0 <= start < end <= {len(valid)}, the frames of clip {clip}"
            raise _fault(f"segment {number}", contract, f"start {start}, end {end}", "Correct or remove it")
        if label < 0 or 0 < num_classes <= label:
            raise _fault(f"segment {number}", f"of a class in range({num_classes})", label, "Correct it")
        if not np.isfinite(confidence):
            raise _fault(f"segment {number}", "of finite confidence", repr(row[4]), "Correct it")
        before = np.concatenate([[0], np.cumsum(valid)])
        if before[start] == before[end]:
            raise _fault(f"segment {number}", "over at least one valid frame", "none", "Remove it or pass num_frames")
        rows[number] = clip, label, before[start], before[end], confidence
    return rows
