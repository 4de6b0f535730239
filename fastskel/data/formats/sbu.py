"""SBU Kinect interaction: text files `s<actor>s<actor>/<class>/<repetition>/skeleton_pos.txt`, two persons, OpenNI joints.

Coordinates are normalised by the data set's authors and stay so: x and y are in [0, 1] of the picture, y down. Their notes undo
it by 1280 - 2560 x, 960 - 1920 y and 1280 z, millimetres.
"""

from __future__ import annotations

import re

from fastskel.data.formats.format import FORMATS, Format, SourceClip, finite_frames, unreadable
from fastskel.data.formats.text_rows import number_rows, text_lines, whole_column
from fastskel.skeleton import topology

__all__ = ["CLASSES", "TOPOLOGY", "read"]

# folder 01 to 08, after the data set's notes (Yun, Honorio, Chattopadhyay, Berg, Samaras, CVPR workshops 2012)
CLASSES = ("approaching", "departing", "kicking", "pushing", "shaking hands", "hugging", "exchanging objects", "punching")
TOPOLOGY = "sbu-15"
_BODIES = 2
_PATH = re.compile(r"(?:^|/)(s(\d\d)s(\d\d))/(\d\d)/(\d{3})/skeleton_pos\.txt", re.ASCII)


def read(data: bytes, path: str) -> SourceClip:
    """Read one file.

    Args:
        data: Rows of a frame number and 2 bodies x V joints x 3 coordinates, separated by commas.
        path: Its path, for the name of the clip and for messages.
    Returns:
        The clip; frames (T, 2, V, 3), normalised and in the order of the file.
    Raises:
        ValueError: If the path or the contents are not those of an SBU skeleton.
    """
    match = _PATH.search(path)
    if match is None or not 1 <= int(match[4]) <= len(CLASSES):
        contract = "at s<actor>s<actor>/<class 01..08>/<repetition>/skeleton_pos.txt"
        raise unreadable(contract, "/".join(path.split("/")[-4:]), path)
    num_joints = topology(TOPOLOGY).num_joints
    rows = number_rows(text_lines(data, path), path, 1 + _BODIES * num_joints * 3, ",")
    frames = finite_frames(rows[:, 1:].reshape(-1, _BODIES, num_joints, 3), path)
    columns = {"actor": int(match[2]), "partner": int(match[3]), "repetition": int(match[5])}
    name = f"{match[1]}_{match[4]}_{match[5]}"
    frame_id = whole_column(rows, 0, "frame numbers", path)
    return SourceClip(name, frames, int(match[4]) - 1, columns, {"frame_id": frame_id})


FORMATS.add(
    "sbu",
    Format(
        topology=TOPOLOGY,
        suffix=".txt",
        channels=("x", "y", "z"),
        units="normalised",
        up_axis="-y",
        class_names=CLASSES,
        columns=("actor", "partner", "repetition"),
        read=read,
        about="skeleton_pos.txt files of the SBU Kinect interaction data set (8 classes, two persons), "
        "from Stony Brook University",
        frame_columns=("frame_id",),
        unique_names=False,
    ),
)
