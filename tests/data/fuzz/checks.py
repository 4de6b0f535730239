"""What clips must be that a reader returned, and the reading itself, as `fastskel pack` does it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import BrokenContractError, Case, write_case

from fastskel.data.formats import FORMATS, PREPARED, Format, PreparedClips, SkipFile, SourceClip
from fastskel.data.pack import pack_source
from fastskel.data.packed import open_dataset
from fastskel.skeleton import topology


def need(condition: bool, what: str) -> None:
    """Refuse what a reader returned."""
    if not condition:
        raise BrokenContractError(what)


def read_source(name: str, options: Mapping[str, Any], case: Case, folder: Path, packing: bool) -> tuple[object, ...]:
    """Read the files of a case with a reader of `FORMATS`, in memory, and pack them where asked to."""
    plain = FORMATS[name]
    read, fmt = plain.reader(options), plain.adapted(options)
    clips, beside = dict(case), {}
    if fmt.annotations is not None:
        beside = {path: data for path, data in case.items() if fmt.annotations.pattern.search(path)}
        clips = {path: data for path, data in case.items() if path not in beside}
        read = partial(read, annotations=fmt.annotations.parse(beside))
    read_clips = []
    for path, data in clips.items():
        if Path(path).suffix == fmt.suffix:
            if not read_clips:
                fmt, read = fmt.with_layout(read, data, path)
            clip = read(data, path)
            check_source_clip(clip, fmt)
            read_clips.append(clip)
    if fmt.annotations is not None and fmt.annotations.splits is not None:
        names = [clip.name for clip in read_clips]
        for parts in fmt.annotations.splits(read.keywords["annotations"], names).values():
            members = [index for part in parts.values() for index in part]
            need(all(type(index) is int and 0 <= index < len(names) for index in members), f"splits {parts}")
    if packing and read_clips:
        pack(name, options, case, folder, None)
    shapes = {(min(clip.frames.shape[1], 4), bool(clip.segments), bool(clip.notes)) for clip in read_clips}
    return (name, len(read_clips), *sorted(shapes))


def check_source_clip(clip: SourceClip, fmt: Format) -> None:
    """Hold a clip against the docstrings of `SourceClip` and `Format`."""
    frames, num_joints = clip.frames, (fmt.layout or topology(fmt.topology)).num_joints
    need(isinstance(frames, np.ndarray) and frames.dtype == np.float32 and frames.ndim == 4, f"frames {type(frames)}")
    need(min(frames.shape) >= 1 and frames.shape[2:] == (num_joints, len(fmt.channels)), f"frames of shape {frames.shape}")
    need(bool(np.isfinite(frames).all()), "frames that are not finite")
    need(isinstance(clip.name, str) and clip.name.strip() != "" and clip.name.isprintable(), f"name {clip.name!r}")
    classes = len(fmt.class_names)
    need(type(clip.label) is int and clip.label >= -1 and (not classes or clip.label < classes), f"label {clip.label!r}")
    need(clip.class_name is None or isinstance(clip.class_name, str), f"class name {clip.class_name!r}")
    need(tuple(clip.columns) == fmt.columns, f"columns {tuple(clip.columns)}")
    for column, value in clip.columns.items():
        need(isinstance(value, str) or (type(value) is int and abs(value) < 1 << 63), f"column {column} {value!r}")
    need(tuple(clip.frame_columns) == fmt.frame_columns, f"frame columns {tuple(clip.frame_columns)}")
    for column, values in clip.frame_columns.items():
        need(values.shape == (len(frames),) and values.dtype.kind in "biufU", f"column {column} of shape {values.shape}")
    for row in clip.segments:
        label, start, end, confidence = row
        need(all(type(value) is int for value in row[:3]), f"segment {row}")
        need(0 <= label < (classes or 1 << 31) and 0 <= start <= len(frames) and 0 <= end <= len(frames), f"segment {row}")
        need(bool(np.isfinite(confidence)), f"segment {row}")
    need(all(isinstance(note, str) and note.isprintable() for note in clip.notes), f"notes {clip.notes}")


def read_prepared(
    name: str, file: str, options: Mapping[str, Any], case: Case, folder: Path, packing: bool
) -> tuple[object, ...]:
    """Read a case with a reader of `PREPARED`: the folder of its files, or the one that is named."""
    write_case(case, folder)
    fmt = PREPARED[name]
    source = fmt.open(folder / file, fmt.chosen(options))
    check_prepared(source)
    num_bodies = set()
    num_clips = 0
    for clip in source.clips:
        need(isinstance(clip, np.ndarray) and clip.ndim == 4 and len(clip) >= 1, f"clip {num_clips} of {np.shape(clip)}")
        num_bodies.add(min(clip.shape[1], 4))
        num_clips += 1
    need(num_clips == len(source.names), f"{num_clips} clips for {len(source.names)} names")
    if packing:
        pack(name, options, {}, folder, file)
    return (name, min(num_clips, 4), bool(source.skipped), bool(source.segments), *sorted(num_bodies))


def check_prepared(source: PreparedClips) -> None:
    """Hold what was opened against the docstring of `PreparedClips`."""
    names, labels = source.names, source.labels
    need(all(isinstance(name, str) for name in names), "names that are no text")
    need(isinstance(labels, np.ndarray) and labels.dtype == np.int64 and labels.shape == (len(names),), "labels")
    need(len(labels) == 0 or int(labels.min()) >= -1, "labels below -1")
    need(topology(source.topology).num_joints >= 1 and len(source.channels) >= 1, "topology or channels")
    for column, values in source.columns.items():
        need(len(values) == len(names), f"column {column} of {len(values)} values")
    known = set(names)
    for protocol, parts in source.splits.items():
        for members in parts.values():
            need(set(members) <= known, f"splits of {protocol}")
    for row in source.segments:
        need(row[0] in known, f"segment {row}")


def pack(name: str, options: Mapping[str, Any], case: Case, folder: Path, file: str | None) -> None:
    """Pack a case and open what came of it; its files are in the folder already if one is named."""
    out = folder.with_name("out") / "packed"
    if file is None:
        write_case(case, folder)
    source = folder / (file or "")
    try:
        pack_source(name, source, out, options=options, progress=False)
        dataset = open_dataset(out, verify=True)
        need(len(dataset) >= 1 and bool(np.isfinite(dataset.frames).all()), "a packed data set of frames that are not finite")
    except SkipFile as skip:
        raise BrokenContractError("a skipped file ended the packing") from skip
    except ValueError:
        need(not out.exists(), "a refused source left its destination behind")
        raise
    finally:
        shutil.rmtree(out.parent, ignore_errors=True)
