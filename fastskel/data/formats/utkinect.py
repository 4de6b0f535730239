"""UTKinect-Action3D: text files `joints_s<subject>_e<episode>.txt`, untrimmed, one person, Kinect v1, metres."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from fastskel.data.formats.format import FORMATS, Annotations, Format, SourceClip, finite_frames, unreadable
from fastskel.data.formats.text_rows import number_rows, text_lines, whole_column
from fastskel.data.formats.untrimmed import frame_classes
from fastskel.skeleton import topology

__all__ = ["CLASSES", "TOPOLOGY", "read", "read_labels"]

# names and order of the label file (Xia, Chen, Aggarwal, CVPR workshops 2012) to ours
CLASSES = {
    "walk": "walk",
    "sitDown": "sit down",
    "standUp": "stand up",
    "pickUp": "pick up",
    "carry": "carry",
    "throw": "throw",
    "push": "push",
    "pull": "pull",
    "waveHands": "wave hands",
    "clapHands": "clap hands",
}
TOPOLOGY = "kinect-20-ucla"
# the second one corrects six segments of the first
_LABELS = re.compile(r"(?:^|/)actionLabel(_modified)?\.txt$")
_NAME = re.compile(r"joints_(s(\d\d)_e(\d\d))", re.ASCII)
_SEGMENT = re.compile(r"(\w+)\s*:\s*(\S+)\s+(\S+)")
_FRAME_ID = re.compile(r"\d{1,15}", re.ASCII)
_LISTED = 5

# recording -> (class, first frame id, last frame id), no ids where a class is missing in it
Labels = Mapping[str, list[tuple[int, int | None, int | None]]]


def read_labels(files: Mapping[str, bytes]) -> Labels:
    """Read the label text: a line for each recording, then lines "<class>: <first frame id> <last frame id>", S in all.

    Args:
        files: Path to contents; the corrected text, `actionLabel_modified.txt`, goes before the other one.
    Returns:
        Segments of each recording, in frame ids.
    Raises:
        ValueError: If a line is none of these; names it.
    """
    if not files:
        return {}
    path = max(files, key=lambda path: (path.endswith("_modified.txt"), path))
    labels: dict[str, list[tuple[int, int | None, int | None]]] = {}
    rows: list[tuple[int, int | None, int | None]] | None = None
    for number, line in text_lines(files[path], path):
        if re.fullmatch(r"s\d\d_e\d\d", line):
            rows = labels.setdefault(line, [])
            continue
        match = _SEGMENT.fullmatch(line)
        if match is None or match[1] not in CLASSES or rows is None:
            raise unreadable("of recordings and their segments", f"{line!r} in line {number}", path, "Correct it")
        ids = [None if word == "NaN" else int(word) if _FRAME_ID.fullmatch(word) else -1 for word in match.groups()[1:]]
        if -1 in ids or (ids[0] is None) != (ids[1] is None):
            raise unreadable("of two frame ids or two NaN", f"{line!r} in line {number}", path, "Correct it")
        rows.append((list(CLASSES).index(match[1]), ids[0], ids[1]))
    return labels


def read(data: bytes, path: str, annotations: Labels | None = None) -> SourceClip:
    """Read one file.

    Args:
        data: Rows of a frame id and V joints x 3 coordinates, separated by blanks. Ids rise by two and more; rows that
            repeat the id of the row before stay, and are named in the notes.
        path: Its path, for the name of the clip and for messages.
        annotations: Segments of every recording; None: no labels.
    Returns:
        The recording; frames (T, 1, V, 3), metres, columns `frame_id` and `action` (class, -1 for none) per frame.
    Raises:
        ValueError: If the name or the contents are not those of a UTKinect recording.
    """
    match = _NAME.fullmatch(PurePosixPath(path).stem)
    if match is None:
        raise unreadable("named joints_s<subject>_e<episode>.txt", PurePosixPath(path).name, path)
    num_joints = topology(TOPOLOGY).num_joints
    rows = number_rows(text_lines(data, path), path, 1 + num_joints * 3)
    frames = finite_frames(rows[:, 1:].reshape(-1, 1, num_joints, 3), path)
    frame_id = whole_column(rows, 0, "frame ids", path)
    back = np.flatnonzero(np.diff(frame_id) < 0)
    if len(back):
        actual = f"{frame_id[back[0] + 1]} after {frame_id[back[0]]} in row {back[0] + 1}"
        raise unreadable("of frame ids that never go back", actual, path)
    segments, notes = _segments(frame_id, (annotations or {}).get(match[1]))
    notes = [*_repeated(frame_id), *notes]
    columns = {"subject": int(match[2]), "repetition": int(match[3])}
    per_frame = {"frame_id": frame_id, "action": frame_classes(segments, len(frames))}
    return SourceClip(match[1], frames, -1, columns, per_frame, segments, notes=tuple(notes))


def _repeated(frame_id: NDArray[np.int64]) -> list[str]:
    ids = frame_id[1:][np.diff(frame_id) == 0]
    if not len(ids):
        return []
    shown = ", ".join(str(number) for number in np.unique(ids)[:_LISTED]) + (", ..." if len(np.unique(ids)) > _LISTED else "")
    return [f"{len(ids)} rows repeat the frame id of the row before (frame ids {shown}); all rows are kept"]


def _segments(
    frame_id: NDArray[np.int64], labels: list[tuple[int, int | None, int | None]] | None
) -> tuple[list[tuple[int, int, int, float]], list[str]]:
    if labels is None:
        return [], ["no labels in the source"]
    segments: list[tuple[int, int, int, float]] = []
    notes = []
    names = list(CLASSES.values())
    for label, first, last in labels:
        if first is None or last is None:
            notes.append(f"no segment of class {names[label]!r}: the labels say NaN")
            continue
        # rows of the ids first to last, both among them
        start, end = (int(np.searchsorted(frame_id, *where)) for where in ((first, "left"), (last, "right")))
        if end <= start:
            notes.append(f"segment of class {names[label]!r}, frame ids {first} to {last}, has no frames")
        segments.append((label, start, end, 1.0))
    return segments, notes


FORMATS.add(
    "utkinect",
    Format(
        topology=TOPOLOGY,
        suffix=".txt",
        channels=("x", "y", "z"),
        units="metres",
        up_axis="y",
        class_names=tuple(CLASSES.values()),
        columns=("subject", "repetition"),
        read=read,
        about="joints and action labels of UTKinect-Action3D (10 classes, untrimmed, Kinect v1), from the "
        "University of Texas at Austin",
        frame_columns=("frame_id", "action"),
        annotations=Annotations(_LABELS, read_labels),
    ),
)
