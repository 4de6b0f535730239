"""Northwestern-UCLA: JSON files `a<class>_s<subject>_e<episode>_v<camera>.json`, one person, Kinect v1, metres."""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath

import numpy as np

from fastskel.data.formats.format import FORMATS, Format, SourceClip, finite_frames, unreadable
from fastskel.skeleton import topology

__all__ = ["CLASSES", "TOPOLOGY", "read"]

# number in the file name to name (Wang, Nie, Xia, Wu, Zhu, CVPR 2014); 7 and 10 do not exist
CLASSES = {
    1: "pick up with one hand",
    2: "pick up with two hands",
    3: "drop trash",
    4: "walk around",
    5: "sit down",
    6: "stand up",
    8: "donning",
    9: "doffing",
    11: "throw",
    12: "carry",
}
TOPOLOGY = "kinect-20-ucla"
_NAME = re.compile(r"a(\d\d)_s(\d\d)_e(\d\d)_v(\d\d)", re.ASCII)


def read(data: bytes, path: str) -> SourceClip:
    """Read one file.

    Args:
        data: Contents of a JSON file with `skeletons`, (T, V, 3), and `label`, 1 to 10.
        path: Its path, for the name of the clip and for messages.
    Returns:
        The clip; frames (T, 1, V, 3), metres.
    Raises:
        ValueError: If the name or the contents are not those of an NW-UCLA skeleton.
    """
    name = PurePosixPath(path).stem
    match = _NAME.fullmatch(name)
    if match is None or int(match[1]) not in CLASSES:
        raise unreadable("named a<class>_s<subject>_e<episode>_v<camera>.json", PurePosixPath(path).name, path)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise unreadable("complete JSON", f"an unreadable one ({error})", path) from error
    if not isinstance(content, dict) or not isinstance(content.get("skeletons"), list):
        raise unreadable("a JSON object with the list `skeletons`", "none", path)
    label = list(CLASSES).index(int(match[1]))
    if content.get("label", label + 1) != label + 1:
        raise unreadable(f"of label {label + 1} as its name says", f"label {content['label']!r}", path)
    num_joints = topology(TOPOLOGY).num_joints
    try:
        values = np.asarray(content["skeletons"])
    except ValueError as error:
        raise unreadable(f"frames of {num_joints} joints x 3", "frames of different lengths", path) from error
    if len(values) and values.shape[1:] != (num_joints, 3):
        raise unreadable(f"frames of {num_joints} joints x 3", f"shape {values.shape}", path)
    frames = finite_frames(values, path)
    columns = {"subject": int(match[2]), "repetition": int(match[3]), "camera": int(match[4])}
    return SourceClip(name, frames[:, None], label, columns)


FORMATS.add(
    "nw-ucla",
    Format(
        topology=TOPOLOGY,
        suffix=".json",
        channels=("x", "y", "z"),
        units="metres",
        up_axis="y",
        class_names=tuple(CLASSES.values()),
        columns=("subject", "repetition", "camera"),
        read=read,
        about="JSON files of the Northwestern-UCLA Multiview Action 3D data set (10 classes, Kinect v1), as the repositories of "
        "CTR-GCN and others pass them on",
    ),
)
