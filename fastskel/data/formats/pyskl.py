"""PYSKL pickles: a list of annotations, one per clip, and the parts of every protocol, in one file."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

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
    ntu_columns,
    plain_list,
    trimmed,
    whole_labels,
)

__all__ = ["PysklOptions", "image_size", "named_splits", "open_pyskl"]

# xsub_train, train, train1 (the three splits of UCF101 and HMDB51)
_SPLIT = re.compile(r"(?:(.+)_)?(train|val|test|eval)(\d*)")


@dataclass(frozen=True)
class PysklOptions(PreparedOptions):
    """What the file does not say about itself, and what becomes of 2-D joints.

    Attributes:
        dataset: Data set that the clips are from. ntu60 and ntu120 bring class names, and protocols that are rules
            where the names of the clips are those of NTU RGB+D.
        topology: Skeleton; auto goes by the number of joints.
        units: Unit of the coordinates; auto is pixels for 2-D joints and metres for others.
        up_axis: Axis that points up; auto is -y for 2-D joints and y for others.
        third: Third channel of 2-D joints: score, zero (as USDRL may), or none.
        usdrl_scaling: Divide joint 0 by the height and joint 1 by the width of the image, both in x and y, and leave the
            other joints in pixels, as USDRL's code does for NTU RGB+D in 2-D, which its published models expect.
    """

    third: Literal["score", "zero", "none"] = "score"
    usdrl_scaling: bool = False


def open_pyskl(path: Path, options: PysklOptions) -> PreparedClips:
    """Open a pickle of {"split": {name: clip names}, "annotations": [...]}, or of the list of annotations alone.

    Args:
        path: Pickle. An annotation has `frame_dir` (or `filename`), `label`, `keypoint`, (M, T, V, 2 or 3), and may have
            `keypoint_score`, (M, T, V), `total_frames` and `img_shape` (height, width). Everything but its arrays, which
            are mapped, is held in memory.
        options: What the file does not say.
    Returns:
        The clips, (T, M, V, C) each, in the order of the file; those without a body or frame are skipped. A split such
        as xsub_val is the test part of the protocol xsub, one without a protocol belongs to "default".
    Raises:
        ValueError: If the file is damaged, is no such pickle, or an annotation is incomplete, naming it.
    """
    content = load_pickle(path)
    lists = content if isinstance(content, dict) else {"annotations": content}
    annotations = plain_list(lists.get("annotations"), "with a list of annotations", path)
    kept: list[Mapping[str, Any]] = []
    names: list[str] = []
    skipped: list[tuple[str, str]] = []
    for number, annotation in enumerate(annotations):
        name, keypoint = _checked(number, annotation, path)
        if 0 in keypoint.shape[:2]:
            skipped.append((name, "no body" if keypoint.shape[0] == 0 else "no frame"))
            continue
        kept.append(annotation)
        names.append(name)
    if not kept:
        raise unreadable("with at least one clip", "none", str(path))
    first = kept[0]["keypoint"]
    flat = first.shape[3] == 2
    if options.usdrl_scaling and not flat:
        raise unreadable("of 2-D joints for usdrl_scaling", "3-D joints", str(path), "Leave usdrl_scaling out")
    columns: dict[str, Any] = dict(ntu_columns(names))
    if all("img_shape" in annotation for annotation in kept):
        sizes = [image_size(annotation, name, path) for annotation, name in zip(kept, names)]
        columns |= {"image_height": [size[0] for size in sizes], "image_width": [size[1] for size in sizes]}
    third = _third(kept, options, flat, path)
    units = ("mixed" if options.usdrl_scaling else "pixels") if flat else "metres"
    return PreparedClips(
        clips=_clips(kept, names, third, options.usdrl_scaling, path),
        names=names,
        labels=whole_labels([annotation.get("label", -1) for annotation in kept], path),
        topology=layout(options, first.shape[2], path),
        channels=("x", "y", "score") if third != "none" else ("x", "y", "z")[: first.shape[3]],
        units=units if options.units == "auto" else options.units,
        up_axis=("-y" if flat else "y") if options.up_axis == "auto" else options.up_axis,
        columns=columns,
        splits=named_splits(lists.get("split", {}), names, skipped, path),
        skipped=skipped,
    )


def _checked(number: int, annotation: Any, path: Path) -> tuple[str, NDArray[Any]]:
    if not isinstance(annotation, dict):
        raise unreadable("with annotations that are dicts", f"{type(annotation).__name__} {number}", str(path))
    name = annotation.get("frame_dir", annotation.get("filename"))
    keypoint = annotation.get("keypoint")
    if not isinstance(name, str):
        raise unreadable("with annotations that have a frame_dir", f"none in annotation {number}", str(path))
    if not _is_floats(keypoint) or keypoint.ndim != 4 or keypoint.shape[3] not in (2, 3):
        actual = f"{getattr(keypoint, 'shape', type(keypoint).__name__)} in {name!r:.80}"
        raise unreadable("with keypoint arrays of floats, (M, T, V, 2 or 3)", actual, str(path))
    score = annotation.get("keypoint_score")
    if score is not None and (not _is_floats(score) or score.shape != keypoint.shape[:3]):
        actual = f"{getattr(score, 'shape', type(score).__name__)} in {name!r:.80}"
        raise unreadable(f"with keypoint_score of shape {keypoint.shape[:3]}", actual, str(path))
    frames = annotation.get("total_frames", keypoint.shape[1])
    if not isinstance(frames, (int, np.integer)) or frames < 0:
        raise unreadable("with whole total_frames", f"{reprlib.repr(frames)} in {name!r:.80}", str(path))
    return str(name), keypoint


def _is_floats(value: Any) -> TypeGuard[NDArray[Any]]:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def image_size(annotation: Mapping[str, Any], name: str, path: Path) -> tuple[int, int]:
    """Return height and width of an annotation's pictures, pixels, (2,).

    Raises:
        ValueError: If they are none.
    """
    size = annotation.get("img_shape")
    if (
        not isinstance(size, (tuple, list))
        or len(size) != 2
        or not all(isinstance(side, (int, np.integer)) and 0 < side < 1 << 31 for side in size)
    ):
        raise unreadable("with img_shape (height, width)", f"{reprlib.repr(size)} in {name!r:.80}", str(path))
    return int(size[0]), int(size[1])


def _third(kept: Sequence[Mapping[str, Any]], options: PysklOptions, flat: bool, path: Path) -> str:
    if not flat:
        return "none"
    if options.third == "score" and any(annotation.get("keypoint_score") is None for annotation in kept):
        actual = "annotations without"
        raise unreadable("with keypoint_score in all annotations", actual, str(path), "Choose third zero or none")
    return options.third


def _clips(
    kept: Sequence[Mapping[str, Any]], names: Sequence[str], third: str, scaling: bool, path: Path
) -> Iterator[NDArray[Any]]:
    for annotation, name in zip(kept, names):
        keypoint = annotation["keypoint"]
        if scaling:
            # in the type of the file, half precision, as the reference divides
            keypoint = keypoint.copy()
            height, width = image_size(annotation, name, path)
            keypoint[:, :, 0] /= height
            keypoint[:, :, 1] /= width
        channels = [keypoint]
        if third == "score":
            channels.append(annotation["keypoint_score"][..., None])
        elif third == "zero":
            channels.append(np.zeros((*keypoint.shape[:3], 1), np.float32))
        # each by itself: joints in half precision must not round scores in single precision
        frames = np.concatenate([channel.astype(np.float32) for channel in channels], axis=3).transpose(1, 0, 2, 3)
        yield trimmed(frames, int(annotation.get("total_frames", len(frames))))


def named_splits(
    listed: Any, names: Sequence[str], skipped: list[tuple[str, str]], path: Path
) -> dict[str, dict[str, list[str]]]:
    """Return protocol -> part -> clips from the splits of a file.

    Args:
        listed: Split such as xsub_train -> names.
        names: Clips that are packed, (n,).
        skipped: Clips that are not, with reasons; those without an annotation are appended.
        path: The file, for messages.
    Raises:
        ValueError: If a split is called otherwise, or holds something else than names.
    """
    if not isinstance(listed, dict):
        raise unreadable("with a dict of splits", type(listed).__name__, str(path))
    known, left_out = set(names), {name for name, _ in skipped}
    found: dict[str, dict[str, list[str]]] = {}
    for split, values in listed.items():
        match = _SPLIT.fullmatch(str(split))
        if match is None:
            contract = "with splits called <protocol>_train, <protocol>_val or the like"
            raise unreadable(contract, f"{split!r:.80}", str(path))
        members = plain_list(values, f"with a list of clips in split {split!r}", path)
        if not all(isinstance(member, str) for member in members):
            raise unreadable(f"with names in split {split!r}", "something else", str(path))
        missing = [member for member in members if member not in known and member not in left_out]
        skipped += [(member, f"in split {split} without an annotation") for member in missing]
        protocol = "-".join(word for word in (match[1], match[3]) if word) or "default"
        # as PYSKL does: a split is a set of names
        found.setdefault(protocol, {})[match[2]] = list(dict.fromkeys(m for m in members if m in known))
    splits: dict[str, dict[str, list[str]]] = {}
    for protocol, parts in found.items():
        # val is the test part, unless there is one beside it
        rename = {} if {"val", "test"} <= set(parts) else PARTS
        splits[protocol] = {rename.get(part, part): members for part, members in parts.items()}
    return splits


PREPARED.add(
    "pyskl",
    PreparedFormat(
        open=open_pyskl,
        options=PysklOptions(),
        about="one .pkl file with annotations and splits, as PYSKL publishes them (NTU RGB+D in 2-D and 3-D, FineGYM, "
        "Diving48, UCF101, HMDB51); ProtoGCN, ACLNet and others read it",
    ),
)
