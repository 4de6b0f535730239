"""NTU RGB+D 60 and 120: text files `S<setup>C<camera>P<subject>R<replication>A<action>.skeleton`, Kinect v2, metres."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from fastskel import _native
from fastskel.data.formats.format import FORMATS, Format, SkipFile, SourceClip, unreadable
from fastskel.data.formats.ntu_bodies import RULES, bodies_over_time, chosen_bodies, placed
from fastskel.skeleton import topology

__all__ = ["CLASSES", "TOPOLOGY", "NtuOptions", "read"]

# A1 to A120 in the order of the data set's description (Shahroudy et al., CVPR 2016; Liu et al., TPAMI 2020); the
# first 60 are those of NTU RGB+D
# fmt: off
CLASSES = (
    "drink water", "eat meal", "brush teeth", "brush hair", "drop", "pick up", "throw", "sit down", "stand up",
    "clapping", "reading", "writing", "tear up paper", "put on jacket", "take off jacket", "put on a shoe",
    "take off a shoe", "put on glasses", "take off glasses", "put on a hat or cap", "take off a hat or cap", "cheer up",
    "hand waving", "kicking something", "reach into pocket", "hopping", "jump up", "phone call",
    "play with phone or tablet", "type on a keyboard", "point to something", "taking a selfie", "check time from watch",
    "rub two hands", "nod head or bow", "shake head", "wipe face", "salute", "put palms together",
    "cross hands in front", "sneeze or cough", "staggering", "falling down", "headache", "chest pain", "back pain",
    "neck pain", "nausea or vomiting", "fan self", "punch or slap", "kicking", "pushing", "pat on back", "point finger",
    "hugging", "giving object", "touch pocket", "shaking hands", "walking towards", "walking apart", "put on headphone",
    "take off headphone", "shoot at basket", "bounce ball", "tennis bat swing", "juggle table tennis ball", "hush",
    "flick hair", "thumb up", "thumb down", "make ok sign", "make victory sign", "staple book", "counting money",
    "cutting nails", "cutting paper", "snap fingers", "open bottle", "sniff or smell", "squat down", "toss a coin",
    "fold paper", "ball up paper", "play magic cube", "apply cream on face", "apply cream on hand", "put on bag",
    "take off bag", "put object into bag", "take object out of bag", "open a box", "move heavy objects", "shake fist",
    "throw up cap or hat", "capitulate", "cross arms", "arm circles", "arm swings", "run on the spot", "butt kicks",
    "cross toe touch", "side kick", "yawn", "stretch oneself", "blow nose", "hit with object", "wield knife",
    "knock over", "grab stuff", "shoot with gun", "step on foot", "high-five", "cheers and drink", "carry object",
    "take a photo", "follow", "whisper", "exchange things", "support somebody", "rock-paper-scissors",
)
# fmt: on
TOPOLOGY = "ntu-25"
_COLUMNS = ("setup", "camera", "subject", "replication")
_NAME = re.compile(r"S(\d{3})C(\d{3})P(\d{3})R(\d{3})A(\d{3})", re.ASCII)


@dataclass(frozen=True)
class NtuOptions:
    """What becomes a body of a clip. By default what 2s-AGCN keeps: the two bodies that move most, none removed.

    Attributes:
        missing: Text file with the names of clips whose skeletons are missing or incomplete; they are skipped.
        bodies: Most bodies of a clip, those that move most (sum of the standard deviations of x, y and z).
        denoise: Rules by which spurious bodies are dropped first, as in the scripts of CTR-GCN: length (in at most 11
            frames), spread (wider than 0.8 of their height in at least 69.754 % of their frames), motion (variance
            outside 0.089925 to 2 square metres; not the body that moves most). One body always stays.
        join: Let a body that shares no frame with one that moves more go on in its place, as CTR-GCN does: someone
            whom the sensor lost and found under another number.
    """

    missing: Path | None = None
    bodies: int = 2
    denoise: tuple[Literal["length", "spread", "motion"], ...] = ()
    join: bool = False

    def __post_init__(self) -> None:
        if type(self.bodies) is not int or self.bodies < 1:
            raise _wrong("bodies", "a whole number of at least 1", repr(self.bodies), "Pass a count")
        if not isinstance(self.denoise, tuple) or not set(self.denoise) <= set(RULES):
            raise _wrong("denoise", f"a tuple of {', '.join(RULES)}", repr(self.denoise), "Name the rules")
        # read now: a wrong path is an error of the call, not of a file
        _ = self.missing_names

    @cached_property
    def missing_names(self) -> frozenset[str]:
        """Names in the list of missing skeletons."""
        if self.missing is None:
            return frozenset()
        try:
            text = Path(self.missing).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise _wrong("missing", "a readable list", f"{error}, in {self.missing}", "Correct the path or the file") from error
        # the published lists begin with a sentence or two about themselves
        names = frozenset(match[0] for match in _NAME.finditer(text))
        if not names:
            contract = "a list of clip names such as S001C002P005R002A008"
            raise _wrong("missing", contract, f"none in {self.missing}", "Correct the path")
        return names


def _wrong(option: str, contract: str, actual: str, action: str) -> ValueError:
    return ValueError(f"pack_source: option {option} must be {contract}, got {actual}. {action}.")


def read(data: bytes, path: str, options: NtuOptions = NtuOptions(), num_classes: int = len(CLASSES)) -> SourceClip:
    """Read one file.

    Args:
        data: Contents of a skeleton text.
        path: Its path, for the name of the clip and for messages.
        options: Which bodies become bodies of the clip.
        num_classes: Clips of later actions are skipped.
    Returns:
        The clip; frames (T, M, V, 3), metres, as they stand in the file: a body keeps its place however the slots
        change, and is zero in frames without it. M is at least 1.
    Raises:
        ValueError: If the name or the contents are not those of an NTU RGB+D skeleton.
        SkipFile: If the list of missing skeletons names it, no frame has a body, or its action is beyond the classes.
    """
    name = PurePosixPath(path).stem
    match = _NAME.fullmatch(name)
    if match is None or not 1 <= int(match[5]) <= len(CLASSES):
        contract = "named S<setup>C<camera>P<subject>R<replication>A<action>.skeleton, actions 001 to 120"
        raise unreadable(contract, PurePosixPath(path).name, path)
    *origin, action = (int(digits) for digits in match.groups())
    if action > num_classes:
        raise SkipFile(f"action {action} is not among the {num_classes} of the data set")
    if name in options.missing_names:
        raise SkipFile("in the list of missing skeletons")
    num_bodies, ids, _, joints = _native.parse_ntu(data, path, topology(TOPOLOGY).num_joints)
    try:
        bodies = bodies_over_time(num_bodies, ids, joints)
    except ValueError as error:
        raise unreadable("with each body at most once in a frame", str(error), path) from error
    if not bodies:
        raise SkipFile("no body in any frame")
    # before bodies are compared: NaN has no place in an order
    finite = np.isfinite(joints).all(axis=(1, 2))
    if not finite.all():
        frame = np.repeat(np.arange(len(num_bodies)), num_bodies)[int(np.argmin(finite))]
        raise unreadable("finite coordinates", f"NaN or infinity in frame {frame}", path)
    frames = placed(chosen_bodies(bodies, options.denoise), len(num_bodies), options.bodies, options.join)
    return SourceClip(name, frames, action - 1, dict(zip(_COLUMNS, origin)))


def _format(num_classes: int) -> Format:
    return Format(
        topology=TOPOLOGY,
        suffix=".skeleton",
        channels=("x", "y", "z"),
        units="metres",
        up_axis="y",
        class_names=CLASSES[:num_classes],
        columns=_COLUMNS,
        read=partial(read, num_classes=num_classes),
        options=NtuOptions(),
        about=f".skeleton text of NTU RGB+D {num_classes} ({num_classes} classes, Kinect v2), from the ROSE Lab of Nanyang "
        "Technological University on request",
    )


FORMATS.add("ntu60", _format(60))
FORMATS.add("ntu120", _format(120))
