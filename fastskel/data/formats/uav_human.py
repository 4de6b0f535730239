"""UAV-Human: text of the kind of NTU RGB+D with 17 joints, seen from a drone, in pixels.

Files are named like `P000S00G10B10H10UC022000LC021000A000R0_08241716.txt`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from fastskel import _native
from fastskel.data.formats.format import FORMATS, Format, SkipFile, SourceClip, unreadable
from fastskel.data.formats.ntu_bodies import bodies_over_time, chosen_bodies, placed
from fastskel.skeleton import topology

__all__ = ["NUM_CLASSES", "TOPOLOGY", "UavOptions", "read"]

# A000 to A154 (Li, Liu, Zhang, Ni, Wang, Li, CVPR 2021)
NUM_CLASSES = 155
TOPOLOGY = "coco-17"
_NAME = re.compile(r"P(\d{3})S(\d\d)G(\d\d)B(\d\d)H(\d\d)UC\d{6}LC\d{6}A(\d{3})R(\d)_\d{8}", re.ASCII)
_COLUMNS = ("subject", "setup", "gender", "backpack", "hat", "repetition")


@dataclass(frozen=True)
class UavOptions:
    """What becomes a body of a clip.

    Attributes:
        bodies: Most bodies of a clip, those that move most (sum of the standard deviations of the channels).
    """

    bodies: int = 2

    def __post_init__(self) -> None:
        if type(self.bodies) is not int or self.bodies < 1:
            raise ValueError(
                f"pack_source: option bodies must be a whole number of at least 1, got {self.bodies!r}. Pass a count."
            )


def read(data: bytes, path: str, options: UavOptions = UavOptions()) -> SourceClip:
    """Read one file.

    Args:
        data: Contents of a skeleton text with V joints a body.
        path: Its path, for the name of the clip and for messages.
        options: How many bodies to keep.
    Returns:
        The clip; frames (T, M, V, 3): x and y in pixels, and the third number of the file. A body keeps its place by its number;
        where two bodies of a frame share a number, places are those of the file, which a note says.
    Raises:
        ValueError: If the name or the contents are not those of a UAV-Human skeleton.
        SkipFile: If no frame has a body.
    """
    name = PurePosixPath(path).stem
    match = _NAME.fullmatch(name)
    if match is None or int(match[6]) >= NUM_CLASSES:
        contract = f"named like P000S00G10B10H10UC022000LC021000A000R0_08241716.txt, actions 000 to {NUM_CLASSES - 1},"
        raise unreadable(contract, PurePosixPath(path).name, path)
    num_bodies, ids, _, joints = _native.parse_ntu(data, path, topology(TOPOLOGY).num_joints)
    finite = np.isfinite(joints).all(axis=(1, 2))
    if not finite.all():
        frame = np.repeat(np.arange(len(num_bodies)), num_bodies)[int(np.argmin(finite))]
        raise unreadable("finite coordinates", f"NaN or infinity in frame {frame}", path)
    notes: tuple[str, ...] = ()
    try:
        bodies = bodies_over_time(num_bodies, ids, joints)
    except ValueError as error:
        notes = (f"{error}: bodies are told apart by their place in the file",)
        first = np.repeat(np.cumsum(num_bodies) - num_bodies, num_bodies)
        bodies = bodies_over_time(num_bodies, np.arange(len(ids)) - first, joints)
    if not bodies:
        raise SkipFile("no body in any frame")
    frames = placed(chosen_bodies(bodies, ()), len(num_bodies), options.bodies, join=False)
    numbers = [int(match[group]) for group in (1, 2, 3, 4, 5, 7)]
    return SourceClip(name, frames, int(match[6]), dict(zip(_COLUMNS, numbers, strict=True)), notes=notes)


FORMATS.add(
    "uav-human",
    Format(
        topology=TOPOLOGY,
        suffix=".txt",
        channels=("x", "y", "score"),
        units="pixels",
        up_axis="-y",
        class_names=tuple(f"A{number:03}" for number in range(NUM_CLASSES)),
        columns=_COLUMNS,
        read=read,
        about="skeleton text of UAV-Human (155 classes, 17 joints in pixels), from the data set's page",
        options=UavOptions(),
    ),
)
