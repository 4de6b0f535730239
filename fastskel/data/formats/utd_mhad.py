"""UTD-MHAD: MATLAB files `a<class>_s<subject>_t<repetition>_skeleton.mat`, one person, Kinect v1, metres."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from fastskel.data.formats.format import FORMATS, Format, SourceClip, finite_frames, unreadable
from fastskel.data.formats.matlab import matlab_variables
from fastskel.skeleton import topology

__all__ = ["CLASSES", "TOPOLOGY", "read"]

# names and order of the data set's description (Chen, Jafari, Kehtarnavaz, ICIP 2015)
CLASSES = (
    "swipe left",
    "swipe right",
    "wave",
    "clap",
    "throw",
    "arm cross",
    "basketball shoot",
    "draw x",
    "draw circle clockwise",
    "draw circle counter-clockwise",
    "draw triangle",
    "bowling",
    "boxing",
    "baseball swing",
    "tennis swing",
    "arm curl",
    "tennis serve",
    "push",
    "knock",
    "catch",
    "pick up and throw",
    "jog",
    "walk",
    "sit to stand",
    "stand to sit",
    "lunge",
    "squat",
)
TOPOLOGY = "kinect-20-utd"
_NAME = re.compile(r"(a(\d{1,2})_s(\d{1,2})_t(\d{1,2}))_skeleton", re.ASCII)


def read(data: bytes, path: str) -> SourceClip:
    """Read one file.

    Args:
        data: Contents of a MATLAB 5 file with `d_skel`, (V, 3, T).
        path: Its path, for the name of the clip and for messages.
    Returns:
        The clip; frames (T, 1, V, 3), metres.
    Raises:
        ValueError: If the name or the contents are not those of a UTD-MHAD skeleton.
    """
    match = _NAME.fullmatch(PurePosixPath(path).stem)
    if match is None or not 1 <= int(match[2]) <= len(CLASSES):
        raise unreadable("named a<1..27>_s<subject>_t<repetition>_skeleton.mat", PurePosixPath(path).name, path)
    values = matlab_variables(data, path, ["d_skel"])["d_skel"]
    num_joints = topology(TOPOLOGY).num_joints
    if isinstance(values, str):
        raise unreadable("made of numbers", "d_skel of text", path)
    if values.ndim == 2:
        # MATLAB drops a last axis of one: a clip of one frame
        values = values[:, :, None]
    if values.ndim != 3 or values.shape[:2] != (num_joints, 3):
        raise unreadable(f"d_skel of shape ({num_joints} joints, 3, T)", f"shape {values.shape}", path)
    frames = finite_frames(values.transpose(2, 0, 1), path)
    columns = {"subject": int(match[3]), "repetition": int(match[4])}
    return SourceClip(match[1], frames[:, None], int(match[2]) - 1, columns)


FORMATS.add(
    "utd-mhad",
    Format(
        topology=TOPOLOGY,
        suffix=".mat",
        channels=("x", "y", "z"),
        units="metres",
        up_axis="y",
        class_names=CLASSES,
        columns=("subject", "repetition"),
        read=read,
        about="*_skeleton.mat files of UTD-MHAD (27 classes, Kinect v1), from the page of the University of Texas at Dallas",
    ),
)
