"""The packed data set: a folder of plain `.npy` files and `meta.json`, memory-mapped, never pickled.

frames.npy      (sum T, M, V, C) float32, the valid frames of all clips one after the other
offsets.npy     (n + 1,) int64, clip i is frames[offsets[i]:offsets[i + 1]]
names.npy       (n,) fixed-width unicode, unique
labels.npy      (n,) int64, -1 where unknown
num_bodies.npy  (n,) int64, bodies seen in the clip
<column>.npy    (n,) per clip or (sum T,) per frame
segments.npy    (S, 5) float64, optional: clip, class, start, end (exclusive), confidence; they may overlap, and be empty
                or reversed (end <= start) where the source is
splits.json     optional: protocol -> part -> clip indices
topology.json   optional: the skeleton layout, where it is none of the registered ones
meta.json       what the numbers mean, and the SHA-256 of every other file
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastskel.data.npy_file import map_npy
from fastskel.data.topology_file import topology_from_json
from fastskel.skeleton import TOPOLOGIES, Topology

__all__ = [
    "FORMAT_VERSION",
    "SEGMENT_FIELDS",
    "UP_AXES",
    "PackedDataset",
    "check_column_name",
    "checksum",
    "open_dataset",
]

FORMAT_VERSION = 1
SEGMENT_FIELDS = ("clip", "class", "start", "end", "confidence")
UP_AXES = ("x", "y", "z", "-x", "-y", "-z")
_ARRAYS = ("frames", "offsets", "names", "labels", "num_bodies", "segments")
_COLUMN = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_META: dict[str, type] = {
    "source": str,
    "topology": str,
    "channels": list,
    "units": str,
    "up_axis": str,
    "class_names": list,
    "normalisation": str,
    "valid_frames_rule": str,
    "columns": dict,
    "checksums": dict,
}


@dataclass(frozen=True)
class PackedDataset:
    """A packed data set, opened for reading.

    Attributes:
        path: Folder.
        meta: Contents of `meta.json`.
        topology: Skeleton of the V joints.
        frames: Valid frames of all clips, (sum T, M, V, C), float32, read-only memory map.
        offsets: First frame of each clip and the end, (n + 1,), int64.
        names: Clip names, (n,), str.
        labels: Class of each clip, (n,), int64, -1 where unknown.
        num_bodies: Bodies seen in each clip, (n,), int64.
        columns: Named columns, (n,) per clip or (sum T,) per frame.
        segments: Labelled segments, (S, 5), float64: clip, class, start, end, confidence; None where there are none.
        splits: Protocol to parts ("train", "test") to clip indices, int64.
    """

    path: Path
    meta: dict[str, Any]
    topology: Topology
    frames: NDArray[np.float32]
    offsets: NDArray[np.int64]
    names: NDArray[np.str_]
    labels: NDArray[np.int64]
    num_bodies: NDArray[np.int64]
    columns: dict[str, NDArray[Any]] = field(default_factory=dict)
    segments: NDArray[np.float64] | None = None
    splits: dict[str, dict[str, NDArray[np.int64]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def clip(self, index: int) -> NDArray[np.float32]:
        """Return the frames of one clip, (T, M, V, C), float32, a read-only view of the file.

        Raises:
            ValueError: If there is no clip of that index.
        """
        if not 0 <= index < len(self):
            limits = f"in range({len(self)})"
            raise ValueError(
                f"PackedDataset.clip: index must be {limits}, got {index}, in {self.path}. Choose another."
            )
        # a plain view: slices of the memmap class carry bookkeeping that costs more than the slice
        return np.asarray(self.frames[self.offsets[index] : self.offsets[index + 1]])

    def column(self, name: str, index: int | None = None) -> NDArray[Any]:
        """Return a column, (n,) or (sum T,), or what it says of one clip, () or (T,).

        Raises:
            ValueError: If there is no such column.
        """
        if name not in self.columns:
            known = ", ".join(sorted(self.columns)) or "(none)"
            raise ValueError(
                f"PackedDataset.column: name must be of {known}, got {name!r}, in {self.path}. Choose one."
            )
        column = self.columns[name]
        if index is None:
            return column
        if self.per_frame(name):
            return column[self.offsets[index] : self.offsets[index + 1]]
        return column[index : index + 1].reshape(())

    def per_frame(self, name: str) -> bool:
        """Say whether a column has one value per frame, (sum T,), instead of one per clip, (n,)."""
        return bool(self.meta["columns"][name] == "frame")

    def index_of(self, name: str) -> int:
        """Return the index of the clip of that name, a scalar in range(n).

        Raises:
            ValueError: If there is no such clip.
        """
        found = np.flatnonzero(self.names == name)
        if len(found) == 0:
            raise ValueError(
                f"PackedDataset.index_of: name must be a clip, got {name!r}, in {self.path}. See names.npy."
            )
        return int(found[0])

    @property
    def num_frames(self) -> NDArray[np.int64]:
        """Frames of each clip, (n,), int64."""
        return np.diff(self.offsets)

    @property
    def class_names(self) -> list[str]:
        """Class names, (K,), empty where the data set has none."""
        return list(self.meta["class_names"])

    @property
    def num_bodies_max(self) -> int:
        """Bodies M that every frame (M, V, C) has room for."""
        return int(self.frames.shape[1])

    @property
    def channels(self) -> int:
        """Channels C of a joint, (C,)."""
        return int(self.frames.shape[3])

    @property
    def source(self) -> str:
        """Name of the data set the (n,) clips come from, "custom" for a user's own."""
        return str(self.meta["source"])


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits, a scalar string."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_column_name(name: str, function: str, where: str | os.PathLike[str]) -> None:
    """Refuse a column name (a scalar string) that cannot be a file of its own.

    Raises:
        ValueError: If it is no identifier or one of the format's own names.
    """
    if not isinstance(name, str) or not _COLUMN.fullmatch(name) or name.lower() in _ARRAYS:
        taken = ", ".join(_ARRAYS)
        raise ValueError(
            f"{function}: column name must be letters, digits and underscores, none of {taken}, "
            f"got {name!r}, in {os.fspath(where)}. Rename it."
        )


def open_dataset(path: str | os.PathLike[str], *, verify: bool = False) -> PackedDataset:
    """Open a packed data set of n clips, (T, M, V, C) each.

    Args:
        path: Folder.
        verify: Also compare every file with its checksum, which reads all of them.
    Returns:
        The data set; `frames`, (sum T, M, V, C), is a read-only memory map.
    Raises:
        ValueError: If a file is missing, damaged, inconsistent with the others, or holds Python objects.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise _fault("path", "a packed data set (a folder)", "no such folder", folder, "Pack the data first")
    meta = _read_meta(folder)
    if verify:
        for name, expected in meta["checksums"].items():
            if checksum(_existing(folder / name)) != expected:
                raise _fault("file", "as its checksum says", "other contents", folder / name)
    dataset = PackedDataset(
        path=folder,
        meta=meta,
        topology=_topology(folder, meta["topology"]),
        frames=_read_array(folder / "frames.npy", "f4", 4, mapped=True),
        offsets=_read_array(folder / "offsets.npy", "i8", 1),
        names=_read_array(folder / "names.npy", "U", 1),
        labels=_read_array(folder / "labels.npy", "i8", 1),
        num_bodies=_read_array(folder / "num_bodies.npy", "i8", 1),
        columns={name: _read_array(folder / f"{name}.npy", "biufU", 1) for name in meta["columns"]},
        segments=_read_array(folder / "segments.npy", "f8", 2) if (folder / "segments.npy").exists() else None,
        splits=_read_splits(folder / "splits.json") if (folder / "splits.json").exists() else {},
    )
    _check(dataset)
    return dataset


def _fault(argument: str, contract: str, actual: str, path: Path, action: str = "Pack the data again") -> ValueError:
    return ValueError(f"open_dataset: {argument} must be {contract}, got {actual}, in {path}. {action}.")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise _fault("file", "present", "no such file", path)
    return path


def _read_json(path: Path) -> dict[str, Any]:
    data = _existing(path).read_bytes()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _fault("file", "JSON", f"an unreadable one ({error})", path) from error
    if not isinstance(content, dict):
        raise _fault("file", "a JSON object", type(content).__name__, path)
    return content


def _topology(folder: Path, name: str) -> Topology:
    path = folder / "topology.json"
    if not path.exists():
        return TOPOLOGIES[name]
    layout = topology_from_json(_read_json(path), path)
    if layout.name != name:
        raise _fault("topology", f"{name!r} as meta.json says", repr(layout.name), path)
    return layout


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    meta = _read_json(path)
    version = meta.get("format_version")
    if version != FORMAT_VERSION:
        raise _fault(
            "format_version", str(FORMAT_VERSION), repr(version), path, "Use the version of fastskel that wrote it"
        )
    for key, kind in _META.items():
        if not isinstance(meta.get(key), kind):
            raise _fault(key, f"a {kind.__name__}", repr(meta.get(key)), path)
    if not isinstance(meta.get("options", {}), dict):
        raise _fault("options", "a dict", repr(meta["options"]), path)
    if not isinstance(meta.get("original", ""), str):
        raise _fault("original", "a str", repr(meta["original"]), path)
    for key in ("channels", "class_names"):
        if not all(isinstance(name, str) for name in meta[key]):
            raise _fault(key, "a list of strings", repr(meta[key]), path)
    if meta["up_axis"] not in UP_AXES:
        raise _fault("up_axis", f"one of {', '.join(UP_AXES)}", repr(meta["up_axis"]), path)
    if meta["topology"] not in TOPOLOGIES and not (folder / "topology.json").exists():
        known = ", ".join(TOPOLOGIES)
        raise _fault("topology", f"one of {known}", meta["topology"], path, "Register it in TOPOLOGIES")
    for name, kind in meta["columns"].items():
        check_column_name(name, "open_dataset", path)
        if kind not in ("clip", "frame"):
            raise _fault(f"columns[{name!r}]", "'clip' or 'frame'", repr(kind), path)
    for name in meta["checksums"]:
        # a name with a folder in it would make `verify` read files outside of the data set
        if Path(name).name != name:
            raise _fault("checksums", "of plain file names", repr(name), path)
    return meta


def _read_array(path: Path, kinds: str, ndim: int, *, mapped: bool = False) -> NDArray[Any]:
    try:
        array = map_npy(_existing(path))
        if not mapped:
            array = np.array(array)
    except (ValueError, OSError) as error:
        if str(error).startswith("open_dataset:"):
            raise
        raise _fault(
            "file",
            "a complete .npy array without Python objects",
            f"an unreadable one ({error})",
            path,
        ) from error
    dtype = array.dtype
    known = dtype.kind in kinds if kinds.isalpha() else dtype == np.dtype(kinds)
    if not known or array.ndim != ndim:
        found = f"{dtype} with {array.ndim} axes"
        raise _fault("array", f"of type {kinds!r} with {ndim} axes", found, path)
    return array


def _read_splits(path: Path) -> dict[str, dict[str, NDArray[np.int64]]]:
    splits: dict[str, dict[str, NDArray[np.int64]]] = {}
    for protocol, parts in _read_json(path).items():
        if not isinstance(parts, dict):
            raise _fault(f"splits[{protocol!r}]", "an object of parts", repr(parts)[:80], path)
        splits[protocol] = {}
        for part, indices in parts.items():
            if not isinstance(indices, list) or any(type(i) is not int or abs(i) >> 62 for i in indices):
                raise _fault(
                    f"splits[{protocol!r}][{part!r}]",
                    "a list of clip indices",
                    repr(indices)[:80],
                    path,
                )
            splits[protocol][part] = np.array(indices, dtype=np.int64)
    return splits


def _check(dataset: PackedDataset) -> None:
    folder, num, total = dataset.path, len(dataset.offsets) - 1, len(dataset.frames)

    def need(condition: bool, file: str, argument: str, contract: str, actual: object) -> None:
        if not condition:
            raise _fault(argument, contract, str(actual), folder / file)

    starts = dataset.offsets[:2].tolist()
    need(num >= 1 and starts[0] == 0, "offsets.npy", "offsets", "0 and the end of at least one clip", starts)
    # compared, not subtracted: the difference of two offsets may not fit their type
    rising = dataset.offsets[1:] > dataset.offsets[:-1]
    bad = int(np.argmin(rising))
    first, last = dataset.offsets[bad : bad + 2].tolist()
    need(bool(rising[bad]), "offsets.npy", "offsets", "increasing", f"a step of {last - first} at clip {bad}")
    end = int(dataset.offsets[-1])
    need(end == total, "frames.npy", "frames", f"{end} as the offsets say", total)
    joints = dataset.frames.shape[2]
    need(joints == dataset.topology.num_joints, "frames.npy", "joints", f"those of {dataset.topology.name!r}", joints)
    channels, named = dataset.channels, dataset.meta["channels"]
    need(channels == len(named), "frames.npy", "channels", f"{named} as meta.json says", channels)
    need(dataset.num_bodies_max >= 1, "frames.npy", "bodies", "at least 1", dataset.num_bodies_max)
    for file in ("names", "labels", "num_bodies"):
        length = len(getattr(dataset, file))
        need(length == num, f"{file}.npy", "length", f"{num}, one per clip", length)
    need(len(np.unique(dataset.names)) == num, "names.npy", "names", "unique", "duplicates")
    most, least = int(dataset.num_bodies.max()), int(dataset.num_bodies.min())
    room = dataset.num_bodies_max
    need(least >= 0 and most <= room, "num_bodies.npy", "num_bodies", f"in 0 .. {room}", f"{least} .. {most}")
    classes = len(dataset.class_names)
    highest, lowest = int(dataset.labels.max()), int(dataset.labels.min())
    need(lowest >= -1, "labels.npy", "labels", "-1 or a class", lowest)
    need(classes == 0 or highest < classes, "labels.npy", "labels", f"below the {classes} class names", highest)
    for name, column in dataset.columns.items():
        expected = total if dataset.per_frame(name) else num
        need(len(column) == expected, f"{name}.npy", "length", str(expected), len(column))
    if dataset.segments is not None:
        _check_segments(dataset, dataset.segments)
    for protocol, parts in dataset.splits.items():
        for part, indices in parts.items():
            inside = bool(((indices >= 0) & (indices < num)).all()) and len(np.unique(indices)) == len(indices)
            need(inside, "splits.json", f"{protocol}/{part}", f"distinct indices in range({num})", "others")


def _check_segments(dataset: PackedDataset, segments: NDArray[np.float64]) -> None:
    path = dataset.path / "segments.npy"
    if segments.shape[1] != len(SEGMENT_FIELDS):
        raise _fault("columns", ", ".join(SEGMENT_FIELDS), str(segments.shape), path)
    clip, label, start, end = segments[:, :4].T
    num, classes = len(dataset), len(dataset.class_names)
    whole = (segments[:, :4] == np.floor(segments[:, :4])).all(axis=1) & np.isfinite(segments).all(axis=1)
    known = whole & (clip >= 0) & (clip < num)
    frames = dataset.num_frames[np.where(known, clip, 0).astype(np.int64)]
    # end <= start is let through: a published list holds such a segment, and only its user can say what it means
    for contract, fits in (
        ("finite, its clip, class, start and end whole", whole),
        (f"of a clip in range({num})", known),
        (f"of a class in range({classes or 'K'})", (label >= 0) & ((label < classes) | (classes == 0))),
        ("of start and end within its clip", (start >= 0) & (start <= frames) & (end >= 0) & (end <= frames)),
    ):
        if not fits.all():
            row = int(np.argmin(fits))
            raise _fault(f"segment {row}", contract, str(segments[row].tolist()), path)
