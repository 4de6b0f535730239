"""Penn Action: MATLAB files `0001.mat`, one person, 13 annotated joints in pictures."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import numpy as np

from fastskel.data.formats.format import FORMATS, Format, SourceClip, finite_frames, unreadable
from fastskel.data.formats.matlab import matlab_variables
from fastskel.skeleton import topology

__all__ = ["CLASSES", "TOPOLOGY", "read"]

# variable `action` (Zhang, Zhu, Derpanis, ICCV 2013), in the alphabet's order
CLASSES = (
    "baseball_pitch",
    "baseball_swing",
    "bench_press",
    "bowl",
    "clean_and_jerk",
    "golf_swing",
    "jump_rope",
    "jumping_jacks",
    "pullup",
    "pushup",
    "situp",
    "squat",
    "strum_guitar",
    "tennis_forehand",
    "tennis_serve",
)
TOPOLOGY = "penn-13"
_NAME = re.compile(r"\d{4}", re.ASCII)


def read(data: bytes, path: str) -> SourceClip:
    """Read one file.

    Args:
        data: Contents of a MATLAB 5 file with `x`, `y` and `visibility`, (T, V), `action` and `train` (1, or -1 or 0 for
            a test clip).
        path: Its path, for the name of the clip and for messages.
    Returns:
        The clip; frames (T, 1, V, 3): x and y in pixels, as they stand in the file for hidden joints too, and 1 where
        the joint is visible, else 0.
    Raises:
        ValueError: If the name or the contents are not those of Penn Action labels.
    """
    name = PurePosixPath(path).stem
    if not _NAME.fullmatch(name):
        raise unreadable("named 0001.mat", PurePosixPath(path).name, path)
    values = matlab_variables(data, path, ("x", "y", "visibility", "action", "train"))
    action = values["action"]
    if not isinstance(action, str) or action not in CLASSES:
        raise unreadable(f"of an action among {', '.join(CLASSES)}", repr(action)[:80], path)
    train = np.asarray(values["train"])
    if train.dtype.kind not in "bfiu" or train.size != 1 or train.item() not in (1, 0, -1):
        raise unreadable("of train 1, 0 or -1", repr(train.tolist())[:80], path)
    num_joints = topology(TOPOLOGY).num_joints
    channels = []
    for variable in ("x", "y", "visibility"):
        array = np.asarray(values[variable])
        if array.dtype.kind not in "bfiu" or array.ndim != 2 or array.shape[1] != num_joints:
            raise unreadable(f"{variable} of shape (T, {num_joints})", f"{array.dtype} of shape {array.shape}", path)
        channels.append(array.astype(np.float64))
    lengths = [len(array) for array in channels]
    if len(set(lengths)) > 1:
        raise unreadable("x, y and visibility of as many frames", f"{lengths}", path)
    frames = finite_frames(np.stack(channels, axis=-1), path)
    return SourceClip(name, frames[:, None], CLASSES.index(action), {"train": int(train.item() == 1)})


FORMATS.add(
    "penn-action",
    Format(
        topology=TOPOLOGY,
        suffix=".mat",
        channels=("x", "y", "score"),
        units="pixels",
        up_axis="-y",
        class_names=CLASSES,
        columns=("train",),
        read=read,
        about="0001.mat and so on of Penn Action (15 classes, 13 annotated joints in pictures), from the "
        "University of Pennsylvania",
    ),
)
