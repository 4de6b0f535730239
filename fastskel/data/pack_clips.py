"""Packs a user's own clips: arrays, or files of arrays."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
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
from fastskel.data.normalise import NORMALISATIONS, normalise
from fastskel.data.packed import UP_AXES, PackedDataset, open_dataset
from fastskel.data.writer import FramesWriter, destination, plain_options, write_json, write_rest
from fastskel.skeleton import TOPOLOGIES, Topology
from fastskel.skeleton import topology as named_topology

__all__ = ["pack_arrays"]


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
    options: Mapping[str, Any] | None = None,
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
        options: How the clips were made, plain values by name, for `meta.json`; None: nothing is said.
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
    _check(options is None or isinstance(options, Mapping), "options", "a mapping from name to value", options, "Name them")
    whole = isinstance(num_bodies, (int, np.integer)) and not isinstance(num_bodies, bool)
    _check(whole and num_bodies >= 1, "num_bodies", "a whole number of at least 1", num_bodies, "Pass a count")
    classes = plain_strings("class_names", class_names)
    channel_names = None if channels is None else plain_strings("channels", channels)
    reader = ClipReader(layout, names, num_frames)
    values = Columns({} if columns is None else columns, where=os.fspath(out))
    kept: list[NDArray[np.bool_]] = []
    bodies: list[int] = []
    with destination("pack_arrays", out) as scratch:
        writer = FramesWriter(scratch)
        try:
            for frames, valid in reader.read(clips):
                values.take(len(kept), valid, reader.where)
                kept.append(valid)
                frames = normalise(frames, normalisation, layout)
                bodies.append(int(frames.any(axis=(0, 2, 3)).sum()))
                writer.append(frames)
            writer.finish(scratch / "frames.npy", int(num_bodies))
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
        meta: dict[str, Any] = {
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
        if options is not None:
            meta["options"] = plain_options(options)
        write_rest(scratch, meta, arrays, [int(valid.sum()) for valid in kept], bodies, values.finish(len(kept)))
    return open_dataset(out)


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
