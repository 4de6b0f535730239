"""PKU-MMD I and II: text files `0002-L.txt` or `A01N01-L.txt`, untrimmed, up to two persons, Kinect v2, metres.

Skeletons, labels and lists of parts come in folders of their own and with the same names: pack the folder that holds them all.
Labels are files under a folder with "label" in its name, lists are called `cross-subject.txt`, `cross_view_v2.txt` and the like.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from fastskel.data.formats.format import FORMATS, Annotations, Format, SourceClip, finite_frames, unreadable
from fastskel.data.formats.text_rows import number_rows, text_lines, whole_column
from fastskel.data.formats.untrimmed import frame_classes
from fastskel.skeleton import topology

__all__ = ["CLASSES", "TOPOLOGY", "PkuAnnotations", "read", "read_annotations"]

# ids 1 to 51 of Actions.xlsx (Liu, Hu, Li, Song, Liu, 2017); the second part uses 41 of them
# fmt: off
CLASSES = (
    "bow", "brush hair", "brush teeth", "check time from watch", "cheer up", "clapping", "cross hands in front", "drink water",
    "drop", "eat meal", "falling", "give something to other person", "hand waving", "handshaking", "hopping",
    "hug other person", "jump up", "kick other person", "kick something", "phone call", "pat on back of other person", "pick up",
    "play with phone or tablet", "point finger at other person", "point to something", "punch or slap other person",
    "push other person", "put on a hat or cap", "put something inside pocket", "reading", "rub two hands", "salute", "sit down",
    "stand up", "take off a hat or cap", "take off glasses", "take off jacket", "take something out of pocket",
    "taking a selfie", "tear up paper", "throw", "touch back", "touch chest", "touch head", "touch neck", "type on a keyboard",
    "use a fan", "wear jacket", "wear glasses", "wipe face", "writing",
)
# fmt: on
TOPOLOGY = "ntu-25"
_BODIES = 2
_BESIDE = re.compile(r"(?:^|/)(?:[^/]*label[^/]*/(?:.*/)?[^/]*|cross[-_](?:subject|view)[^/]*)\.txt$", re.IGNORECASE)
_LIST = re.compile(r"cross[-_](subject|view)", re.IGNORECASE)
_NAME = re.compile(r"(?:(\d{4})|A(\d\d)N(\d\d))-([LMR])", re.ASCII)
# the published lists spell it "Validataion videos:"
_PART = re.compile(r"(train|val|test)\w* videos?\s*:?", re.IGNORECASE)


@dataclass(frozen=True)
class PkuAnnotations:
    """What the files beside the skeletons say.

    Attributes:
        labels: Recording to its segments (class, start, end, confidence), as the file has them.
        parts: Protocol to "train" and "test" to names of recordings.
    """

    labels: dict[str, list[tuple[int, int, int, float]]] = field(default_factory=dict)
    parts: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def splits(self, names: Sequence[str]) -> dict[str, dict[str, list[int]]]:
        """Return protocol -> part -> clip indices among the names, (n,); protocols with an empty part are left out."""
        index = {name: number for number, name in enumerate(names)}
        found = {
            protocol: {part: sorted(index[name] for name in set(members) if name in index) for part, members in parts.items()}
            for protocol, parts in self.parts.items()
        }
        return {protocol: parts for protocol, parts in found.items() if all(parts.values())}


def read_annotations(files: Mapping[str, bytes]) -> PkuAnnotations:
    """Read label texts, rows (action id, start, end[, confidence]), and lists of parts.

    Args:
        files: Path to contents.
    Returns:
        Segments, (S, 4) for each recording, and parts.
    Raises:
        ValueError: If a file is neither, or a recording has two label files.
    """
    annotations = PkuAnnotations()
    for path, data in files.items():
        name = PurePosixPath(path).stem
        if match := _LIST.match(name):
            protocol = "xsub" if match[1].lower() == "subject" else "xview"
            _read_list(data, path, annotations.parts.setdefault(protocol, {}))
        elif _NAME.fullmatch(name):
            if name in annotations.labels:
                raise unreadable("the only labels of its recording", f"others of {name}", path, "Remove one of them")
            annotations.labels[name] = _read_labels(data, path) if data.strip() else []
        else:
            raise unreadable("labels named like a recording", PurePosixPath(path).name, path)
    return annotations


def _read_labels(data: bytes, path: str) -> list[tuple[int, int, int, float]]:
    lines = text_lines(data, path)
    rows = number_rows(lines, path, None, ",")
    if rows.shape[1] not in (3, 4):
        raise unreadable("rows of action id, start, end and confidence", f"{rows.shape[1]} numbers a row", path)
    labels, starts, ends = (whole_column(rows, column, "labels and frames", path).tolist() for column in range(3))
    confidences = rows[:, 3].tolist() if rows.shape[1] == 4 else [1.0] * len(rows)
    segments = []
    for (line, _), label, start, end, confidence in zip(lines, labels, starts, ends, confidences, strict=True):
        if not 1 <= label <= len(CLASSES) or start < 0 or end < 0 or not abs(confidence) < float("inf"):
            contract = f"of actions 1 to {len(CLASSES)}, frames from 0 and finite confidence"
            raise unreadable(contract, f"{label},{start},{end},{confidence} in line {line}", path, "Correct it")
        segments.append((label - 1, start, end, confidence))
    return segments


def _read_list(data: bytes, path: str, parts: dict[str, list[str]]) -> None:
    members: list[str] | None = None
    for number, line in text_lines(data, path):
        if match := _PART.fullmatch(line):
            members = parts.setdefault("train" if match[1].lower() == "train" else "test", [])
            continue
        names = [name.strip().removesuffix(".txt") for name in line.split(",") if name.strip()]
        wrong = [name for name in names if not _NAME.fullmatch(name)]
        if members is None or wrong:
            contract = '"Training videos:" and "Validation videos:", each above names such as 0002-L'
            raise unreadable(contract, f"{(wrong or [line])[0]!r} in line {number}", path, "Correct it")
        members += names


def read(data: bytes, path: str, annotations: PkuAnnotations = PkuAnnotations()) -> SourceClip:
    """Read one recording.

    Args:
        data: Rows of 2 bodies x V joints x 3 coordinates, separated by blanks; zeros where there is no body.
        path: Its path, for the name of the clip and for messages.
        annotations: Segments of every recording. Ends are taken as exclusive; what reaches beyond the recording is cut.
    Returns:
        The recording; frames (T, M, V, 3), metres, M 1 where the second body is never there, and the column `action`
        (class, -1 for none) per frame.
    Raises:
        ValueError: If the name or the contents are not those of a PKU-MMD skeleton.
    """
    name = PurePosixPath(path).stem
    match = _NAME.fullmatch(name)
    if match is None:
        raise unreadable("named 0002-L.txt or A01N01-L.txt", PurePosixPath(path).name, path)
    num_joints = topology(TOPOLOGY).num_joints
    rows = number_rows(text_lines(data, path), path, _BODIES * num_joints * 3)
    frames = finite_frames(rows.reshape(-1, _BODIES, num_joints, 3), path)
    if not frames[:, 1].any():
        frames = frames[:, :1]
    notes = []
    if name not in annotations.labels:
        notes.append("no labels in the source")
    segments = []
    for label, start, end, confidence in annotations.labels.get(name, ()):
        if max(start, end) > len(frames):
            notes.append(f"segment of class {CLASSES[label]!r}, {start} to {end}, is cut at the end, {len(frames)}")
        elif end <= start:
            notes.append(f"segment of class {CLASSES[label]!r} starts at {start} and ends at {end}")
        segments.append((label, min(start, len(frames)), min(end, len(frames)), confidence))
    # of the second part, A01N01 is recording 101
    video = int(match[1]) if match[1] else 100 * int(match[2]) + int(match[3])
    action = frame_classes(segments, len(frames))
    return SourceClip(name, frames, -1, {"video": video, "camera": match[4]}, {"action": action}, segments, notes=tuple(notes))


FORMATS.add(
    "pku-mmd",
    Format(
        topology=TOPOLOGY,
        suffix=".txt",
        channels=("x", "y", "z"),
        units="metres",
        up_axis="y",
        class_names=CLASSES,
        columns=("video", "camera"),
        read=read,
        about="skeleton and label text of PKU-MMD I or II (51 classes, untrimmed, Kinect v2), from the page of Peking University",
        frame_columns=("action",),
        annotations=Annotations(_BESIDE, read_annotations, PkuAnnotations.splits),
    ),
)
