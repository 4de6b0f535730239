"""Packs clips: a user's own arrays with `pack_arrays`, the files of a public data set with `pack_source`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastskel.data.clips import (
    ClipReader,
    Columns,
    Part,
    plain_labels,
    plain_names,
    plain_segments,
    plain_splits,
    plain_strings,
)
from fastskel.data.formats import FORMATS, PREPARED, SkipFile, SourceClip
from fastskel.data.gather import GatheredExtras
from fastskel.data.normalise import NORMALISATIONS, normalise
from fastskel.data.packed import UP_AXES, PackedDataset, open_dataset
from fastskel.data.source import open_source
from fastskel.data.topology_file import topology_to_json
from fastskel.data.writer import FramesWriter, destination, write_array, write_json, write_meta
from fastskel.skeleton import TOPOLOGIES, Topology
from fastskel.skeleton import topology as named_topology

__all__ = ["PackSummary", "pack_arrays", "pack_source"]


@dataclass(frozen=True)
class PackSummary:
    """What `pack_source` wrote.

    Attributes:
        path: The packed data set.
        clips: Number of clips.
        frames: Frames of all clips together.
        bodies: Most bodies in one clip.
        skipped: Path and reason of every file that holds no clip.
        seconds: Wall-clock time.
        notes: Clip name and remark, where the user should know something about a clip that was packed.
    """

    path: Path
    clips: int
    frames: int
    bodies: int
    skipped: tuple[tuple[str, str], ...]
    seconds: float
    notes: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [f"packed {self.clips:,} clips, {self.frames:,} frames, {self.bodies} bodies at most, into {self.path}"]
        lines[0] += f" in {self.seconds:.1f} s"
        lines += [f"  skipped {path}: {reason}" for path, reason in self.skipped[:10]]
        if len(self.skipped) > 10:
            lines.append(f"  and {len(self.skipped) - 10} more files")
        lines += [f"  note {name}: {remark}" for name, remark in self.notes[:40]]
        if len(self.notes) > 40:
            lines.append(f"  and {len(self.notes) - 40} more notes")
        return "\n".join(lines)


def pack_arrays(
    clips: Iterable[ArrayLike | str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str],
    topology: str | Topology,
    labels: Sequence[int] | NDArray[np.integer[Any]] | None = None,
    names: Sequence[str] | None = None,
    columns: Mapping[str, Any] | None = None,
    splits: Mapping[str, Mapping[str, Sequence[Part]]] | None = None,
    segments: Sequence[Sequence[Any]] | NDArray[Any] | None = None,
    class_names: Sequence[str] = (),
    num_frames: Sequence[int] | NDArray[np.integer[Any]] | Literal["all"] | None = None,
    num_bodies: int = 1,
    channels: Sequence[str] | None = None,
    units: str = "metres",
    up_axis: str = "y",
    normalisation: str = "none",
    source: str = "custom",
) -> PackedDataset:
    """Pack a user's own clips.

    Args:
        clips: Joint positions, (T, M, V, C) each, finite numbers, or paths of `.npy` files that hold them. T and M may
            differ from clip to clip (absent bodies become zero); V and C may not. Read one at a time, so a generator
            keeps memory small.
        out: Folder to create.
        topology: Skeleton of the V joints, registered in `TOPOLOGIES`, or its name.
        labels: Class of each clip, (n,), -1 where unknown; None: all unknown.
        names: Unique clip names, (n,); None: "clip-000000" and so on.
        columns: Column name to one value per clip, (n,), or to a list of n arrays with one value per frame, (T,) each.
        splits: Protocol to {"train": clips, "test": clips}, clips given by index or name.
        segments: Rows (clip, class, start, end[, confidence]), clip by index or name, end exclusive; they may overlap.
        class_names: Distinct names of the K classes.
        num_frames: Valid frames at the beginning of each clip, (n,); "all": every frame is valid; None: frames with any
            non-zero joint are valid. Other frames are dropped, with their values in per-frame columns, and segments
            follow.
        num_bodies: Least M of the packed frames, at least 1.
        channels: Distinct names of the C channels; None: x, y and z or score.
        units: Unit of the coordinates, "metres", "pixels" or your own.
        up_axis: Axis that points up in the world, "-y" where y points down as in images.
        normalisation: Applied before writing: "none", "center", "center-first", "align" or "align-yaw".
        source: Name of the data set; protocols that are rules belong to one.
    Returns:
        The packed data set, opened.
    Raises:
        ValueError: If an argument does not fit, naming the clip; nothing is left at `out`.
    """
    layout = _registered(topology)
    _check_choice("normalisation", normalisation, NORMALISATIONS)
    _check_choice("up_axis", up_axis, UP_AXES)
    for argument, text in (("units", units), ("source", source)):
        _check(isinstance(text, str), argument, "a string", text, "Name it")
    whole = isinstance(num_bodies, (int, np.integer)) and not isinstance(num_bodies, bool)
    _check(whole and num_bodies >= 1, "num_bodies", "a whole number of at least 1", num_bodies, "Pass a count")
    classes = plain_strings("class_names", class_names)
    channel_names = None if channels is None else plain_strings("channels", channels)
    reader = ClipReader(layout, names, num_frames)
    values = Columns({} if columns is None else columns, where=os.fspath(out))
    kept: list[NDArray[np.bool_]] = []
    bodies: list[int] = []
    with destination("pack_arrays", out) as scratch:
        writer = FramesWriter(scratch / "frames.npy")
        try:
            for frames, valid in reader.read(clips):
                values.take(len(kept), valid, reader.where)
                kept.append(valid)
                frames = normalise(frames, normalisation, layout)
                bodies.append(int(frames.any(axis=(0, 2, 3)).sum()))
                writer.append(frames)
            writer.finish(int(num_bodies))
        finally:
            writer.close()
        clip_names = plain_names(names, len(kept))
        if channel_names is None:
            channel_names = ["x", "y", "score" if units == "pixels" else "z", *"wuvabcd"][: reader.num_channels]
        if len(channel_names) != reader.num_channels:
            raise ValueError(
                f"pack_arrays: channels must name the {reader.num_channels} channels of the clips, "
                f"got {channel_names}. Name each once."
            )
        meta = {
            "source": source,
            "topology": layout.name,
            "channels": channel_names,
            "units": units,
            "up_axis": up_axis,
            "class_names": classes,
            "normalisation": normalisation,
            "valid_frames_rule": "nonzero" if num_frames is None else "counted",
        }
        arrays: dict[str, NDArray[Any]] = {
            "names": clip_names,
            "labels": plain_labels(labels, len(kept), len(classes)),
        }
        rows = plain_segments(() if segments is None else segments, clip_names, kept, len(classes))
        if len(rows):
            arrays["segments"] = rows
        if members := plain_splits({} if splits is None else splits, clip_names):
            write_json(scratch / "splits.json", members)
        _write(scratch, meta, arrays, [int(valid.sum()) for valid in kept], bodies, values.finish(len(kept)))
    return open_dataset(out)


def pack_source(
    format_name: str,
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> PackSummary:
    """Pack the files of a public data set, clips of (T, M, V, C).

    Args:
        format_name: Name in `FORMATS`, such as "utd-mhad", or in `PREPARED`, such as "pyskl".
        src: Folder with the files, searched recursively, or the tar or zip archive they come in. Of a prepared format,
            see `fastskel.data.pack_prepared`.
        dst: Folder to create. The same files give the same bytes.
        options: What the format lets one choose, by name; None: its defaults.
        progress: Show a progress bar on standard error.
    Returns:
        Summary of what was packed and skipped.
    Raises:
        ValueError: If the format or an option is unknown, a file is damaged, naming it, or every file is skipped;
            nothing is left at `dst`.
    """
    from tqdm import tqdm

    if format_name in PREPARED:
        from fastskel.data.pack_prepared import pack_prepared

        return pack_prepared(format_name, src, dst, options=options, progress=progress)
    fmt = FORMATS[format_name]
    chosen = {} if options is None else options
    read: Callable[..., SourceClip] = fmt.reader(chosen)
    fmt = fmt.adapted(chosen)
    beside = None if fmt.annotations is None else fmt.annotations.pattern
    extras = GatheredExtras(fmt)
    begin = time.perf_counter()
    names: list[str] = []
    labels: list[int] = []
    lengths: list[int] = []
    bodies: list[int] = []
    columns: dict[str, list[int | str]] = {column: [] for column in fmt.columns}
    with (
        destination("pack_source", dst) as scratch,
        open_source(src, fmt.suffix, scratch, beside=beside, unique_names=fmt.unique_names) as files,
    ):
        if fmt.annotations is not None:
            annotations = fmt.annotations.parse({f"{os.fspath(src)}/{path}": files.read(path) for path in files.beside})
            read = partial(read, annotations=annotations)
        fmt, read = fmt.with_layout(read, files.read(files.paths[0]), f"{os.fspath(src)}/{files.paths[0]}")
        writer = FramesWriter(scratch / "frames.npy")
        try:
            for path in tqdm(files.paths, desc=f"packing {format_name}", unit="clip", disable=not progress):
                try:
                    clip = read(files.read(path), f"{os.fspath(src)}/{path}")
                except SkipFile as skip:
                    files.skipped.append((path, str(skip)))
                    continue
                extras.take(clip, path)
                writer.append(clip.frames)
                names.append(clip.name)
                labels.append(clip.label)
                lengths.append(len(clip.frames))
                bodies.append(clip.frames.shape[1])
                for column, values in columns.items():
                    values.append(clip.columns[column])
            if not names:
                path, reason = files.skipped[-1]
                raise ValueError(
                    f"pack_source: source must be with at least one clip, got none ({path}: {reason}), in {os.fspath(src)}. "
                    "Correct the path or the options."
                )
            writer.finish()
        finally:
            writer.close()
        classes, class_names = extras.classes(labels)
        meta = {
            "source": format_name,
            "topology": fmt.topology,
            "channels": list(fmt.channels),
            "units": fmt.units,
            "up_axis": fmt.up_axis,
            "class_names": class_names,
            "normalisation": "none",
            "valid_frames_rule": "counted",
        }
        arrays = {"names": np.array(names), "labels": classes, **extras.segments()}
        packed_columns = {column: ("clip", np.array(values)) for column, values in columns.items()}
        packed_columns.update(extras.frame_columns())
        if fmt.annotations is not None and fmt.annotations.splits is not None:
            splits = fmt.annotations.splits(annotations, names)
            if splits:
                write_json(scratch / "splits.json", splits)
        if fmt.layout is not None:
            write_json(scratch / "topology.json", topology_to_json(fmt.layout))
        _write(scratch, meta, arrays, lengths, bodies, packed_columns)
        skipped = tuple(files.skipped)
    seconds = time.perf_counter() - begin
    return PackSummary(Path(dst), len(names), sum(lengths), max(bodies), skipped, seconds, tuple(extras.notes))


def _check(condition: bool, argument: str, contract: str, actual: object, action: str) -> None:
    if not condition:
        raise ValueError(f"pack_arrays: {argument} must be {contract}, got {actual!r}. {action}.")


def _check_choice(argument: str, value: str, choices: Sequence[str]) -> None:
    _check(value in choices, argument, f"one of {', '.join(choices)}", value, "Choose one")


def _registered(topology: str | Topology) -> Topology:
    if isinstance(topology, str):
        return named_topology(topology)
    _check(isinstance(topology, Topology), "topology", "a name or a Topology", topology, "Choose one of TOPOLOGIES")
    # the files hold its name alone: without an entry under it they could not be opened
    same = topology.name in TOPOLOGIES and TOPOLOGIES[topology.name] == topology
    advice = "Register it with TOPOLOGIES.add(name, topology), here and where the data is opened"
    _check(same, "topology", "registered in TOPOLOGIES under its name", topology.name, advice)
    return topology


def _write(
    scratch: Path,
    meta: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
    lengths: Sequence[int],
    bodies: Sequence[int],
    columns: Mapping[str, tuple[str, NDArray[Any]]],
) -> None:
    write_array(scratch / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    write_array(scratch / "num_bodies.npy", np.array(bodies, dtype=np.int64))
    for name, array in arrays.items():
        write_array(scratch / f"{name}.npy", array)
    for name, (_, array) in columns.items():
        write_array(scratch / f"{name}.npy", array)
    write_meta(scratch, {**meta, "columns": {name: kind for name, (kind, _) in columns.items()}})
    # what could not be opened again must not appear at the destination
    open_dataset(scratch)
