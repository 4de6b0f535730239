"""The contract of a reader of prepared files: many clips in a few files, with their labels and parts beside them."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastskel.data.formats import ntu
from fastskel.data.formats.format import unreadable
from fastskel.data.npy_file import map_npy
from fastskel.registry import Registry
from fastskel.skeleton import topology

__all__ = [
    "PREPARED",
    "PreparedClips",
    "PreparedFormat",
    "PreparedOptions",
    "existing",
    "layout",
    "mapped_array",
    "ntu_columns",
    "plain_list",
    "trimmed",
    "whole_labels",
]

# which part of a protocol a file or list is, by what the field calls it
PARTS = {"train": "train", "val": "test", "test": "test", "eval": "test"}
_BY_JOINTS = {25: "ntu-25", 17: "coco-17", 18: "openpose-18", 15: "sbu-15"}
_NTU_NAME = re.compile(r"S(\d{3})C(\d{3})P(\d{3})R(\d{3})A\d{3}(?:\.skeleton)?", re.ASCII)
_NTU_COLUMNS = ("setup", "camera", "subject", "replication")
_NTU_CLASSES = {"ntu60": ntu.CLASSES[:60], "ntu120": ntu.CLASSES}


@dataclass(frozen=True)
class PreparedOptions:
    """What the files do not say about themselves.

    Attributes:
        dataset: Data set that the clips are from. ntu60 and ntu120 bring class names, and protocols that are rules
            where the names of the clips are those of NTU RGB+D.
        topology: Skeleton; auto goes by the number of joints.
        units: Unit of the coordinates; auto is what the format's files usually hold.
        up_axis: Axis that points up; auto is what the format's files usually hold.
    """

    dataset: str = "custom"
    topology: str = "auto"
    units: str = "auto"
    up_axis: str = "auto"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the K classes, (K,), none where the data set's are not known."""
        return _NTU_CLASSES.get(self.dataset, ())


@dataclass(frozen=True)
class PreparedClips:
    """An opened prepared source: what `fastskel.data.pack_arrays` takes.

    Attributes:
        clips: Joint positions of each clip, (T, M, V, C), valid frames only; read once, one at a time.
        names: Name of each clip, (n,).
        labels: Class of each, (n,), -1 where unknown.
        topology: Name of the skeleton layout.
        channels: Names of the C channels.
        units: Unit of the coordinates.
        up_axis: Axis that points up.
        columns: Name to one value per clip, (n,), or n arrays of one value per frame, (T,).
        splits: Protocol to part to clip names.
        segments: Rows (clip, class, start, end, confidence).
        skipped: Path or name, and reason, of what is no clip.
    """

    clips: Iterable[NDArray[Any]]
    names: Sequence[str]
    labels: NDArray[np.int64]
    topology: str
    channels: tuple[str, ...]
    units: str
    up_axis: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    splits: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    segments: Sequence[Sequence[Any]] = ()
    skipped: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class PreparedFormat:
    """How one tool of the field stores many clips, (T, M, V, C) each.

    Attributes:
        open: Opens a path with options; raises ValueError naming the path.
        options: Frozen dataclass, a `PreparedOptions`, with the defaults of what a user may choose.
        about: What the files are and where they come from, for `fastskel pack --list-formats`.
    """

    open: Callable[[Path, Any], PreparedClips]
    options: PreparedOptions
    about: str

    def chosen(self, given: Mapping[str, Any]) -> PreparedOptions:
        """Return the options, with those that a user chose by name.

        Raises:
            ValueError: If there is no such option.
        """
        known = [option.name for option in fields(self.options)]
        for name in given:
            if name not in known:
                raise ValueError(
                    f"pack_source: options must be among those of the format ({', '.join(known)}), "
                    f"got {name!r}. Leave it out."
                )
        return replace(self.options, **given)


PREPARED: Registry[PreparedFormat] = Registry("format")


def existing(folder: Path, *names: str) -> Path:
    """Return the first of some files, (k,) names, that a folder holds.

    Raises:
        ValueError: If there is none.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise unreadable(f"with {' or '.join(names)}", "none", str(folder), "Correct the path or add the file")


def mapped_array(path: Path, ndim: int) -> NDArray[Any]:
    """Map an `.npy` file of numbers with `ndim` axes into memory, (N, ...).

    Raises:
        ValueError: If it is damaged, or holds something else.
    """
    try:
        array = map_npy(path)
    except (ValueError, OSError) as error:
        contract = "a complete .npy array without Python objects"
        raise unreadable(contract, f"an unreadable one ({error})", str(path)) from error
    if array.dtype.kind not in "fiu" or array.ndim != ndim:
        actual = f"{array.dtype} with {array.ndim} axes"
        raise unreadable(f"an array of numbers with {ndim} axes", actual, str(path), "Correct the path")
    return array


def layout(options: PreparedOptions, num_joints: int, path: Path) -> str:
    """Return the name of the topology of V joints that a user named, or that alone has so many (a scalar).

    Raises:
        ValueError: If it has another number of joints, or none is known.
    """
    name = options.topology
    if name == "auto":
        if num_joints not in _BY_JOINTS:
            action = "Name the topology among the options"
            raise unreadable(f"of {', '.join(map(str, _BY_JOINTS))} joints", num_joints, str(path), action)
        name = _BY_JOINTS[num_joints]
    if topology(name).num_joints != num_joints:
        contract = f"of {topology(name).num_joints} joints as {name}"
        raise unreadable(contract, num_joints, str(path), "Name another topology")
    return name


def trimmed(frames: NDArray[Any], count: int | None) -> NDArray[Any]:
    """Drop the padding of a clip, (T, M, V, C) to (T', M, V, C).

    Args:
        frames: Clip, zero or repeated behind its end.
        count: Valid frames as the source counts them; more than T are of a clip that was cut to T. None: up to the
            last frame that is not zero.
    Returns:
        At least one frame: a clip without any keeps its first, so that labels stay in step.
    """
    if count is None:
        # NaN is a value like another here
        with np.errstate(invalid="ignore"):
            filled = np.flatnonzero(frames.reshape(len(frames), -1).any(axis=1))
        count = int(filled[-1]) + 1 if len(filled) else 1
    return frames[: max(1, count)]


def plain_list(values: Any, contract: str, path: Path) -> list[Any]:
    """Return a list, tuple or array of one axis out of a pickle as a list, (n,).

    Raises:
        ValueError: If it is something else.
    """
    if isinstance(values, np.ndarray) and values.ndim == 1:
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise unreadable(contract, type(values).__name__, str(path), "Correct the path")
    return list(values)


def whole_labels(values: Any, path: Path) -> NDArray[np.int64]:
    """Return labels out of a file as whole numbers, (n,).

    Raises:
        ValueError: If one is no whole number of at least -1.
    """
    labels = plain_list(values, "with a list of labels", path)
    for number, label in enumerate(labels):
        if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or not -1 <= label < 1 << 31:
            contract = "with labels that are whole numbers of at least -1"
            raise unreadable(contract, f"{reprlib.repr(label)} for clip {number}", str(path))
    return np.array(labels, dtype=np.int64)


def ntu_columns(names: Sequence[str]) -> dict[str, list[int]]:
    """Return setup, camera, subject and replication of clips, (n,) each, if all have the names of NTU RGB+D."""
    matches = [_NTU_NAME.fullmatch(name) for name in names]
    if not names or not all(matches):
        return {}
    return {column: [int(m[group]) for m in matches if m] for group, column in enumerate(_NTU_COLUMNS, 1)}
