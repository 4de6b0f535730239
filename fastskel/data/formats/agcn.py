"""Prepared files of 2s-AGCN and UmURL: `.npy` of (N, C, T, V, M) with labels in a pickle and counts beside it."""

from __future__ import annotations

from collections.abc import Iterator
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
    existing,
    layout,
    mapped_array,
    ntu_columns,
    plain_list,
    trimmed,
    whole_labels,
)

__all__ = ["AgcnOptions", "open_agcn"]


@dataclass(frozen=True)
class AgcnOptions(PreparedOptions):
    """What the files do not say about themselves.

    Attributes:
        dataset: Data set that the clips are from. ntu60 and ntu120 bring class names, and protocols that are rules
            where the names of the clips are those of NTU RGB+D.
        topology: Skeleton; auto goes by the number of joints.
        units: Unit of the coordinates; auto is metres for 25 joints and pixels for others.
        up_axis: Axis that points up; auto is z, to which the preparation turns the spine, or -y for OpenPose.
        protocol: Protocol that the two parts belong to; auto is the name of the folder.
        channels: Names of the channels; auto is x, y and z (the preparation of UAV-Human turns its scores with
            its joints), or x, y and score for OpenPose.
    """

    protocol: str = "auto"
    channels: tuple[str, ...] = ("auto",)


@dataclass(frozen=True)
class _Part:
    data: NDArray[Any]
    counts: NDArray[Any] | None
    names: list[str]
    labels: NDArray[np.int64]


def open_agcn(folder: Path, options: AgcnOptions) -> PreparedClips:
    """Open a folder with a training part, a test part, or both, of (N, C, T, V, M); nothing is read before it is asked for.

    Args:
        folder: Holds, for `train` and for `val` or `test`, the joints `<part>_data_joint.npy` or `<part>_data.npy`, the
            labels `<part>_label.pkl` (names and labels) or `.npy`, and optionally the valid frames
            `<part>_num_frame.npy` or `<part>_num_of_frames.npy`.
        options: What the files do not say.
    Returns:
        The clips, (T, M, V, C) each. Without counts, zero frames at the end of a clip are padding; padding that repeats
        the clip, as 2s-AGCN's own, cannot be told from it.
    Raises:
        ValueError: If a file is missing, damaged, or does not fit the others.
    """
    files = {part: _data_file(folder, part) for part in PARTS}
    parts = {part: _open_part(folder, part, path) for part, path in files.items() if path is not None}
    if not parts:
        contract = "a folder with train_data_joint.npy, train_data.npy or the like"
        raise unreadable(contract, "none", str(folder), "Correct the path")
    shapes = {part.data.shape[1:2] + part.data.shape[3:4] for part in parts.values()}
    if len(shapes) > 1:
        raise unreadable("with parts of the same channels and joints", sorted(shapes), str(folder), "Remove one part")
    ((num_channels, num_joints),) = shapes
    openpose = num_joints == 18
    channels = options.channels
    if channels == ("auto",):
        channels = ("x", "y", "score" if openpose else "z")[:num_channels]
    protocol = folder.resolve().name if options.protocol == "auto" else options.protocol
    names = [name for part in parts.values() for name in part.names]
    splits: dict[str, list[str]] = {}
    for part, content in parts.items():
        splits.setdefault(PARTS[part], []).extend(content.names)
    return PreparedClips(
        clips=_clips(list(parts.values())),
        names=names,
        labels=np.concatenate([part.labels for part in parts.values()]),
        topology=layout(options, num_joints, folder),
        channels=channels,
        units=options.units if options.units != "auto" else "metres" if num_joints == 25 else "pixels",
        up_axis=options.up_axis if options.up_axis != "auto" else "-y" if openpose else "z",
        columns=ntu_columns(names),
        splits={protocol: splits},
    )


def _data_file(folder: Path, part: str) -> Path | None:
    candidates = [folder / f"{part}_data_joint.npy", folder / f"{part}_data.npy"]
    return next((path for path in candidates if path.is_file()), None)


def _open_part(folder: Path, part: str, path: Path) -> _Part:
    data = mapped_array(path, 5)
    if 0 in data.shape:
        raise unreadable("of shape (N, C, T, V, M) without a zero", data.shape, str(path))
    label_path = existing(folder, f"{part}_label.pkl", f"{part}_label.npy")
    if label_path.suffix == ".npy":
        names = [f"{part}-{number:06d}" for number in range(len(data))]
        labels = whole_labels(mapped_array(label_path, 1), label_path)
    else:
        pair = plain_list(load_pickle(label_path), "a pair of names and labels", label_path)
        if len(pair) != 2:
            raise unreadable("a pair of names and labels", f"{len(pair)} lists", str(label_path))
        names = plain_list(pair[0], "with a list of names", label_path)
        if not all(isinstance(name, str) for name in names):
            raise unreadable("with names that are text", "others", str(label_path))
        names = [str(name).removesuffix(".skeleton") for name in names]
        labels = whole_labels(pair[1], label_path)
    for what, length in (("names", len(names)), ("labels", len(labels))):
        if length != len(data):
            raise unreadable(f"of {len(data)} {what}, as {path.name} has clips", length, str(label_path))
    return _Part(data, _counts(folder, part, len(data)), names, labels)


def _counts(folder: Path, part: str, num_clips: int) -> NDArray[Any] | None:
    for name in (f"{part}_num_frame.npy", f"{part}_num_of_frames.npy"):
        path = folder / name
        if path.is_file():
            counts = mapped_array(path, 1)
            if len(counts) != num_clips or counts.dtype.kind not in "iu" or (num_clips and counts.min() < 0):
                actual = f"{len(counts)} of type {counts.dtype}"
                raise unreadable(f"of {num_clips} whole numbers of at least 0", actual, str(path))
            return counts
    return None


def _clips(parts: list[_Part]) -> Iterator[NDArray[Any]]:
    for part in parts:
        for number, clip in enumerate(part.data):
            count = None if part.counts is None else int(part.counts[number])
            yield trimmed(np.asarray(clip).transpose(1, 3, 2, 0), count)


PREPARED.add(
    "agcn",
    PreparedFormat(
        open=open_agcn,
        options=AgcnOptions(),
        about="folder with {train,val}_data_joint.npy, _label.pkl and _num_frame.npy, as the scripts of 2s-AGCN, UmURL and "
        "USDRL write them (NTU RGB+D, UAV-Human, Kinetics-skeleton)",
    ),
)
