"""PKU-MMD as USDRL prepares it: pickles of trimmed clips (recognition), or of windows of 64 frames (detection)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastskel.data.formats.format import unreadable
from fastskel.data.formats.plain_pickle import load_pickle
from fastskel.data.formats.prepared import (
    PARTS,
    PREPARED,
    PreparedClips,
    PreparedFormat,
    PreparedOptions,
    layout,
    plain_list,
    trimmed,
    whole_labels,
)

__all__ = ["PkuPickleOptions", "open_pku_pickle"]

NUM_CLASSES = 51
_VIDEO = re.compile(r"\d+-([LMR])", re.ASCII)
_FILE = re.compile(r"(?:(.*)_)?(train|val|test)\.pkl")


@dataclass(frozen=True)
class PkuPickleOptions(PreparedOptions):
    """What the files do not say about themselves.

    Attributes:
        dataset: Data set that the clips are from.
        topology: Skeleton; auto goes by the number of joints.
        units: Unit of the coordinates; auto is metres.
        up_axis: Axis that points up; auto is y.
        prefix: Beginning of the file names, such as PKUv1_xsub; auto where the folder holds one pair alone.
        protocol: Protocol that the parts belong to; auto is the prefix behind its last underscore: xsub of PKUv1_xsub.
    """

    dataset: str = "pku-mmd"
    prefix: str = "auto"
    protocol: str = "auto"


@dataclass
class _Gathered:
    arrays: list[NDArray[Any]]
    counts: list[int]
    names: list[str]
    labels: list[int]
    videos: list[str]
    windows: list[int]
    frame_labels: list[NDArray[np.int64]]


def open_pku_pickle(source: Path, options: PkuPickleOptions) -> PreparedClips:
    """Open `<prefix>_train.pkl` and `<prefix>_val.pkl` of a folder, or one such file.

    Args:
        source: Folder or file. For recognition a file is {"data": arrays (3, T, V, M), "label": 1 to 51, "num_frames"};
            for detection a list, or dict by number, of {"name", "data": (3, T, V, M), "label": (T,), 0 where there is
            no action}. Everything but the arrays, which are mapped, is held in memory.
        options: What the files do not say.
    Returns:
        The clips, (T, M, V, 3) each, classes from 0. A window is a clip of its own, with its number within the video in
        the column `window`, the video in `video`, L, M or R in `camera` where all names end with it, the class of each
        frame in `action`, -1 where there is none, and its runs as segments.
    Raises:
        ValueError: If a file is missing, damaged or no such pickle.
    """
    prefix, files = _files(source, options.prefix)
    gathered = _Gathered([], [], [], [], [], [], [])
    splits: dict[str, list[str]] = {}
    detection = set()
    for part, path in files.items():
        content = load_pickle(path)
        first = len(gathered.names)
        trimmed_clips = isinstance(content, dict) and "data" in content
        if trimmed_clips:
            _gather_clips(gathered, content, part, path)
        else:
            _gather_windows(gathered, content, path)
        detection.add(not trimmed_clips)
        splits.setdefault(PARTS[part], []).extend(gathered.names[first:])
    if len(detection) > 1:
        raise unreadable("either clips or windows", "one of each", str(source), "Remove one")
    if not gathered.arrays:
        raise unreadable("with at least one clip", "none", str(source))
    columns: dict[str, Any] = {}
    segments: list[tuple[str, int, int, int]] = []
    if True in detection:
        columns = {"video": gathered.videos, "window": gathered.windows, "action": gathered.frame_labels}
        cameras = [match[1] for match in map(_VIDEO.fullmatch, gathered.videos) if match]
        if len(cameras) == len(gathered.videos):
            columns["camera"] = cameras
        segments = [
            (name, *run) for name, labels in zip(gathered.names, gathered.frame_labels) for run in _runs(labels)
        ]
    protocol = (prefix.rpartition("_")[2] or "default") if options.protocol == "auto" else options.protocol
    return PreparedClips(
        clips=_clips(gathered.arrays, gathered.counts),
        names=gathered.names,
        labels=np.array(gathered.labels, dtype=np.int64),
        topology=layout(options, gathered.arrays[0].shape[2], source),
        channels=("x", "y", "z"),
        units="metres" if options.units == "auto" else options.units,
        up_axis="y" if options.up_axis == "auto" else options.up_axis,
        columns=columns,
        splits={protocol: splits},
        segments=segments,
    )


def _files(source: Path, prefix: str) -> tuple[str, dict[str, Path]]:
    paths = [source] if source.is_file() else sorted(source.glob("*.pkl"))
    found: dict[str, dict[str, Path]] = {}
    for path in paths:
        if match := _FILE.fullmatch(path.name):
            found.setdefault(match[1] or "", {})[match[2]] = path
    if prefix != "auto":
        found = {name: files for name, files in found.items() if name == prefix}
    if len(found) != 1:
        actual = f"those of {', '.join(found)}" if found else "none"
        action = "Name one by the option prefix" if found else "Correct the path"
        raise unreadable("with <prefix>_train.pkl and <prefix>_val.pkl of one prefix", actual, str(source), action)
    (chosen,) = found.items()
    # training first, whatever the alphabet says
    return chosen[0], {part: chosen[1][part] for part in PARTS if part in chosen[1]}


def _array(value: Any, number: int, path: Path) -> NDArray[Any]:
    if not isinstance(value, np.ndarray) or value.ndim != 4 or value.shape[0] != 3 or 0 in value.shape:
        actual = f"{getattr(value, 'shape', type(value).__name__)} in clip {number}"
        raise unreadable("with arrays (3, T, V, M)", actual, str(path))
    return value


def _gather_clips(gathered: _Gathered, content: dict[Any, Any], part: str, path: Path) -> None:
    data = content["data"]
    # clips of one length may have been stacked
    stacked = isinstance(data, np.ndarray) and data.ndim == 5
    arrays = list(data) if stacked else plain_list(data, "with a list of arrays as data", path)
    labels = whole_labels(content.get("label"), path)
    counts = whole_labels(content["num_frames"], path) if "num_frames" in content else None
    for what, values in (("label", labels), ("num_frames", counts)):
        if values is not None and len(values) != len(arrays):
            raise unreadable(f"with a {what} for each of {len(arrays)} clips", len(values), str(path))
    _check_classes(labels, 1, path)
    for number, value in enumerate(arrays):
        array = _array(value, number, path)
        gathered.arrays.append(array)
        gathered.counts.append(array.shape[1] if counts is None else int(counts[number]))
        gathered.names.append(f"{part}-{number:06d}")
        gathered.labels.append(int(labels[number]) - 1)


def _gather_windows(gathered: _Gathered, content: Any, path: Path) -> None:
    if isinstance(content, dict):
        if not all(type(key) is int for key in content):
            raise unreadable("with `data`, or windows by number", "a dict of other keys", str(path), "Correct the path")
        windows = [content[key] for key in sorted(content)]
    else:
        windows = plain_list(content, "with a list of windows", path)
    seen: dict[str, int] = {}
    for number, window in enumerate(windows):
        if not isinstance(window, dict) or not isinstance(window.get("name"), str):
            raise unreadable("with windows that have a name", f"none in window {number}", str(path))
        array = _array(window.get("data"), number, path)
        labels = whole_labels(window.get("label"), path)
        if len(labels) != array.shape[1]:
            contract = f"with a label for each of {array.shape[1]} frames"
            raise unreadable(contract, f"{len(labels)} in window {number}", str(path))
        _check_classes(labels, 0, path)
        video = str(window["name"]).removesuffix(".txt")
        seen[video] = seen.get(video, -1) + 1
        gathered.arrays.append(array)
        gathered.counts.append(array.shape[1])
        gathered.names.append(f"{video}-{seen[video]:04d}")
        gathered.labels.append(-1)
        gathered.videos.append(video)
        gathered.windows.append(seen[video])
        gathered.frame_labels.append(labels - 1)


def _check_classes(labels: NDArray[np.int64], least: int, path: Path) -> None:
    if len(labels) and not least <= labels.min() <= labels.max() <= NUM_CLASSES:
        actual = f"{labels.min()} .. {labels.max()}"
        raise unreadable(f"with labels in {least} .. {NUM_CLASSES}", actual, str(path))


def _runs(labels: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    edges = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]
    return [(int(labels[a]), a, b) for a, b in itertools.pairwise(edges) if labels[a] >= 0]


def _clips(arrays: Sequence[NDArray[Any]], counts: Sequence[int]) -> Iterator[NDArray[Any]]:
    for array, count in zip(arrays, counts):
        yield trimmed(array.transpose(1, 3, 2, 0), count)


PREPARED.add(
    "pku-mmd-pkl",
    PreparedFormat(
        open=open_pku_pickle,
        options=PkuPickleOptions(),
        about="PKUv2_xsub_{train,val}.pkl (trimmed clips) or PKUv1_xsub_{train,val}.pkl (windows of 64 frames with a class per "
        "frame), as USDRL reads them",
    ),
)
