"""Kinetics-skeleton of ST-GCN: JSON files of OpenPose joints, up to five persons in a frame, coordinates in [0, 1]."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastskel.data.formats.format import (
    FORMATS,
    Annotations,
    Format,
    SkipFile,
    SourceClip,
    clip_name,
    finite_frames,
    unreadable,
)
from fastskel.skeleton import topology

__all__ = ["TOPOLOGY", "KineticsOptions", "read"]

TOPOLOGY = "openpose-18"
# the release has at most 300 frames a clip; what claims more is no file of it
_MOST_FRAMES = 10_000
# classes of Kinetics-400, 600 and 700
_MOST_CLASSES = 700
# far beyond a picture; whole numbers in JSON can be larger than any float
_MOST_VALUE = 1e30
# labels of a whole folder in one file: the clips have them too
_LISTS = re.compile(r"(?:^|/)kinetics_\w+_label\.json$")


@dataclass(frozen=True)
class KineticsOptions:
    """What becomes a body of a clip.

    Attributes:
        bodies: Most bodies of a frame, those of the largest sum of scores. Bodies have no identity over time: the first
            of a frame is the one that scores best in it, as in ST-GCN, which keeps 2 of them.
    """

    bodies: int = 5

    def __post_init__(self) -> None:
        if type(self.bodies) is not int or self.bodies < 1:
            raise ValueError(
                f"pack_source: option bodies must be a whole number of at least 1, got {self.bodies!r}. Pass a count."
            )


def read(
    data: bytes, path: str, options: KineticsOptions = KineticsOptions(), annotations: Mapping[str, bytes] | None = None
) -> SourceClip:
    """Read one file.

    Args:
        data: JSON object with `data`, a list of frames {"frame_index", "skeleton": [{"pose": 2 V numbers, "score": V}]},
            `label` and `label_index`.
        path: Its path, for the name of the clip and for messages; under a folder `kinetics_val` the clip is one of the test part.
        options: How many bodies to keep.
        annotations: Not used: lists of labels, which the clips repeat.
    Returns:
        The clip; frames (T, M, V, 3): x and y in parts of the picture and the score. The first listed frame is frame 0;
        frames that are not listed or have nobody are zero.
    Raises:
        ValueError: If the contents are not those of a Kinetics-skeleton clip.
        SkipFile: If nobody is in any frame.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise unreadable("complete JSON", f"an unreadable one ({error})", path) from error
    listed = content.get("data") if isinstance(content, dict) else None
    if not isinstance(listed, list) or not all(isinstance(frame, dict) for frame in listed):
        raise unreadable("a JSON object with the list `data` of frames", "none", path)
    label, class_name = content.get("label_index"), content.get("label")
    if type(label) is not int or not 0 <= label < _MOST_CLASSES or not isinstance(class_name, str):
        contract = f"of a label and a label_index in range({_MOST_CLASSES})"
        raise unreadable(contract, f"{class_name!r} and {label!r}", path)
    numbers = [frame.get("frame_index") for frame in listed]
    for number, before in zip(numbers, [-1, *numbers], strict=False):
        if type(number) is not int or not before < number:
            raise unreadable("of rising frame_index", f"{number!r} after {before}", path)
    bodies = [_bodies(frame, path)[: options.bodies] for frame in listed]
    most = max(map(len, bodies), default=0)
    if most == 0:
        raise SkipFile("no body in any frame")
    num_frames = numbers[-1] - numbers[0] + 1
    if num_frames > _MOST_FRAMES:
        raise unreadable(f"of at most {_MOST_FRAMES} frames", num_frames, path)
    frames = np.zeros((num_frames, most, topology(TOPOLOGY).num_joints, 3))
    for number, found in zip(numbers, bodies, strict=True):
        frames[number - numbers[0], : len(found)] = found
    folders = {part.lower() for part in PurePosixPath(path).parts[:-1]}
    train = 1 if "kinetics_train" in folders else 0 if "kinetics_val" in folders else -1
    return SourceClip(clip_name(path), finite_frames(frames, path), label, {"train": train}, class_name=class_name)


def _bodies(frame: Mapping[str, Any], path: str) -> NDArray[np.float64]:
    # (M, V, 3), the highest sum of scores first
    num_joints = topology(TOPOLOGY).num_joints
    where = f"frame_index {frame['frame_index']}"
    skeletons = frame.get("skeleton")
    if not isinstance(skeletons, list):
        raise unreadable("of frames with the list `skeleton`", f"none in {where}", path)
    bodies = np.zeros((len(skeletons), num_joints, 3))
    for body, skeleton in zip(bodies, skeletons, strict=True):
        for key, count in (("pose", 2 * num_joints), ("score", num_joints)):
            values = skeleton.get(key) if isinstance(skeleton, dict) else None
            if not isinstance(values, list) or len(values) != count or not all(type(v) in (int, float) for v in values):
                raise unreadable(f"of {count} numbers under `{key}`", f"others in {where}", path)
            if any(abs(value) > _MOST_VALUE for value in values):
                raise unreadable("finite numbers", f"others under `{key}` in {where}", path)
            if key == "pose":
                body[:, :2] = np.array(values, dtype=np.float64).reshape(num_joints, 2)
            else:
                body[:, 2] = values
    return bodies[np.argsort(-bodies[:, :, 2].sum(axis=1), kind="stable")]


FORMATS.add(
    "kinetics-skeleton",
    Format(
        topology=TOPOLOGY,
        suffix=".json",
        channels=("x", "y", "score"),
        units="picture",
        up_axis="-y",
        class_names=(),
        columns=("train",),
        read=read,
        about="folders of JSON files of Kinetics-skeleton (400 classes, OpenPose, up to five persons), as ST-GCN released it",
        options=KineticsOptions(),
        annotations=Annotations(_LISTS, dict),
    ),
)
