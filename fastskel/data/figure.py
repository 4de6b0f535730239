"""A stick figure of the NTU-25 skeleton: joint angles to joint positions, and the actions it can perform.

Units are metres and radians, y is up, the figure's left is +x and it faces +z. A joint's rotation turns everything
below it in the chain, so bone lengths are constant whatever the angles. Angles by name, for the dominant side (_d)
and the other (_n): `flex` raises an arm forward, `abd` sideways, `hor` swings a raised arm outwards, `twist` turns
the upper arm; `elbow`, `hip`, `knee` bend; `spread` opens a leg. `lean`, `spine`, `neck`, `twist` and `jump` (metres)
belong to the trunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ACTIONS", "FEET", "Pose", "figure_offsets", "figure_positions", "turn"]

Float = NDArray[np.float32]

# joint, parent, rest offset in metres, and the rotation that turns what hangs on the joint
_CHAIN: tuple[tuple[int, int, tuple[float, float, float], str], ...] = (
    (0, 0, (0.0, 0.0, 0.0), "pelvis"),
    (1, 0, (0.0, 0.24, 0.0), "spine"),
    (20, 1, (0.0, 0.24, 0.0), ""),
    (2, 20, (0.0, 0.08, 0.01), "neck"),
    (3, 2, (0.0, 0.14, 0.02), ""),
    (4, 20, (0.18, -0.03, 0.0), "shoulder_l"),
    (5, 4, (0.0, -0.28, 0.0), "elbow_l"),
    (6, 5, (0.0, -0.24, 0.0), ""),
    (7, 6, (0.0, -0.08, 0.0), ""),
    (21, 7, (0.0, -0.08, 0.0), ""),
    (22, 7, (-0.02, -0.04, 0.03), ""),
    (8, 20, (-0.18, -0.03, 0.0), "shoulder_r"),
    (9, 8, (0.0, -0.28, 0.0), "elbow_r"),
    (10, 9, (0.0, -0.24, 0.0), ""),
    (11, 10, (0.0, -0.08, 0.0), ""),
    (23, 11, (0.0, -0.08, 0.0), ""),
    (24, 11, (0.02, -0.04, 0.03), ""),
    (12, 0, (0.09, -0.05, 0.0), "hip_l"),
    (13, 12, (0.0, -0.40, 0.0), "knee_l"),
    (14, 13, (0.0, -0.38, 0.0), "ankle_l"),
    (15, 14, (0.0, -0.05, 0.12), ""),
    (16, 0, (-0.09, -0.05, 0.0), "hip_r"),
    (17, 16, (0.0, -0.40, 0.0), "knee_r"),
    (18, 17, (0.0, -0.38, 0.0), "ankle_r"),
    (19, 18, (0.0, -0.05, 0.12), ""),
)
_ARMS, _LEGS, _SHOULDERS = (5, 6, 7, 21, 22, 9, 10, 11, 23, 24), (13, 14, 15, 17, 18, 19), (4, 8)
# ankles and feet: the lowest of them stands on the ground
FEET = (14, 15, 18, 19)


@dataclass(frozen=True)
class Pose:
    """Joint angles in radians and heights in metres, one value per frame, (F,) each.

    Attributes:
        angles: By name; arms and legs end in _d (dominant side) or _n (the other).
        phase: Phase of the repeated movement.
        level: How far the movement is in force, 0 to 1: rises once and stays.
        bump: One movement there and back, 0 to 1 to 0.
        size: Amplitude factor of the clip.
    """

    angles: dict[str, Float]
    phase: Float
    level: Float
    bump: Float
    size: Float

    def add(self, **angles: NDArray[np.floating[Any]]) -> None:
        """Add to the named angles, (F,) each."""
        for name, value in angles.items():
            self.angles[name] = np.asarray(self.angles.get(name, np.float32(0)) + value, np.float32)


def _wave(p: Pose) -> None:
    p.add(abd_d=p.level * 1.6 * p.size, flex_d=p.level * 0.3, elbow_d=p.level * 1.3, hor_d=p.level * 0.3)
    p.add(twist_d=p.level * (1.2 + 0.55 * p.size * np.sin(p.phase)))


def _drink(p: Pose) -> None:
    p.add(flex_d=p.bump * 0.9 * p.size, hor_d=-p.bump * 0.45, elbow_d=p.bump * 2.1, neck=-p.bump * 0.25)


def _clap(p: Pose) -> None:
    swing = 0.30 + 0.30 * p.size * np.sin(p.phase)
    p.add(flex_d=p.level * 1.1, flex_n=p.level * 1.1, elbow_d=p.level * 0.6, elbow_n=p.level * 0.6)
    p.add(hor_d=p.level * (swing - 0.55), hor_n=p.level * (swing - 0.55))


def _punch(p: Pose) -> None:
    reach = np.maximum(np.sin(p.phase), 0) ** 2 * p.size
    p.add(flex_d=p.level * (0.5 + 0.9 * reach), elbow_d=p.level * (2.0 - 1.8 * reach), twist=p.level * 0.35 * reach)
    p.add(flex_n=p.level * 0.6, elbow_n=p.level * 2.0, lean=p.level * 0.08 * reach)


def _raise_arms(p: Pose) -> None:
    p.add(abd_d=p.bump * 2.6 * p.size, abd_n=p.bump * 2.6 * p.size, elbow_d=p.bump * 0.15, elbow_n=p.bump * 0.15)


def _jumping_jack(p: Pose) -> None:
    swing = p.level * (0.5 - 0.5 * np.cos(p.phase)) * p.size
    p.add(abd_d=swing * 2.5, abd_n=swing * 2.5, spread_d=swing * 0.45, spread_n=swing * 0.45)
    p.add(jump=p.level * 0.10 * np.abs(np.sin(p.phase)) * p.size)


def _squat(p: Pose) -> None:
    depth = p.level * (0.5 - 0.5 * np.cos(p.phase)) * p.size
    p.add(hip_d=depth * 1.5, hip_n=depth * 1.5, knee_d=depth * 2.0, knee_n=depth * 2.0, lean=depth * 0.45)
    p.add(flex_d=depth * 1.2, flex_n=depth * 1.2)


def _sit(p: Pose) -> None:
    p.add(hip_d=p.level * 1.45, hip_n=p.level * 1.45, knee_d=p.level * 1.5, knee_n=p.level * 1.5)
    p.add(lean=p.level * (1 - p.level) * 1.8 * p.size, flex_d=p.level * 0.5, flex_n=p.level * 0.5)
    p.add(elbow_d=p.level * 0.6, elbow_n=p.level * 0.6)


def _bow(p: Pose) -> None:
    p.add(lean=p.bump * 0.55 * p.size, spine=p.bump * 0.6 * p.size, neck=p.bump * 0.3)
    p.add(hip_d=p.bump * 0.55 * p.size, hip_n=p.bump * 0.55 * p.size)


def _kick(p: Pose) -> None:
    swing = np.sin(p.phase)
    p.add(hip_d=p.level * p.size * (0.25 + 1.0 * np.maximum(swing, 0) - 0.35 * np.maximum(-swing, 0)))
    p.add(knee_d=p.level * (0.2 + 0.9 * np.maximum(-swing, 0)), abd_n=p.level * 0.35, lean=-p.level * 0.08)


def _walk(p: Pose) -> None:
    swing = np.sin(p.phase) * p.size * p.level
    bend_d, bend_n = np.maximum(np.cos(p.phase), 0), np.maximum(-np.cos(p.phase), 0)
    p.add(
        hip_d=swing * 0.5 + 0.1, hip_n=0.1 - swing * 0.5, knee_d=p.level * 0.9 * bend_d, knee_n=p.level * 0.9 * bend_n
    )
    p.add(flex_d=-swing * 0.5, flex_n=swing * 0.5, elbow_d=p.level * 0.35, elbow_n=p.level * 0.35, twist=-swing * 0.12)


def _throw(p: Pose) -> None:
    back, forth = p.bump * np.cos(p.level * np.pi), p.level
    p.add(
        flex_d=2.4 * p.bump * p.size,
        elbow_d=p.bump * (1.1 + 0.9 * back),
        twist=-0.5 * back * p.size,
        spine=0.3 * p.bump * forth,
    )


# the first eight are those that a single pose tells apart least
ACTIONS: dict[str, Callable[[Pose], None]] = {
    "wave": _wave,
    "drink": _drink,
    "throw": _throw,
    "punch": _punch,
    "clap": _clap,
    "raise arms": _raise_arms,
    "kick": _kick,
    "walk in place": _walk,
    "jumping jack": _jumping_jack,
    "squat": _squat,
    "bow": _bow,
    "sit down": _sit,
}


def turn(axis: int, angle: Float) -> Float:
    """Rotation matrices for column vectors about x, y or z, (F, 3, 3)."""
    out = np.zeros((len(angle), 3, 3), np.float32)
    out[:, axis, axis] = 1
    first, second = (axis + 1) % 3, (axis + 2) % 3
    out[:, first, first] = out[:, second, second] = np.cos(angle)
    out[:, second, first] = np.sin(angle)
    out[:, first, second] = -out[:, second, first]
    return out


def _rotations(angles: dict[str, Float], mirrored: NDArray[np.bool_], count: int) -> dict[str, Float]:
    """Local rotation of every moving joint, (F, 3, 3) each; mirrored frames swap the dominant side to the left."""
    zero = np.zeros(count, np.float32)

    def get(name: str, left: bool) -> Float:
        own, other = angles.get(f"{name}_d", zero), angles.get(f"{name}_n", zero)
        return np.where(mirrored == left, own, other).astype(np.float32)

    twist = np.where(mirrored, -1, 1).astype(np.float32) * angles.get("twist", zero)
    out = {
        "pelvis": turn(0, angles.get("lean", zero)),
        "spine": turn(1, twist) @ turn(0, angles.get("spine", zero)),
        "neck": turn(0, angles.get("neck", zero)),
    }
    for letter, left, side in (("l", True, 1.0), ("r", False, -1.0)):
        sign = np.float32(side)
        arm = turn(1, sign * get("hor", left)) @ turn(2, sign * get("abd", left))
        out[f"shoulder_{letter}"] = arm @ turn(0, -get("flex", left)) @ turn(1, sign * get("twist", left))
        out[f"elbow_{letter}"] = turn(0, -get("elbow", left))
        hip, knee = get("hip", left), get("knee", left)
        out[f"hip_{letter}"] = turn(2, sign * get("spread", left)) @ turn(0, -hip - angles.get("lean", zero))
        out[f"knee_{letter}"] = turn(0, knee)
        # the foot stays level
        out[f"ankle_{letter}"] = turn(0, hip - knee)
    return out


def figure_positions(angles: dict[str, Float], mirrored: NDArray[np.bool_], offsets: Float) -> Float:
    """Positions of the joints, the pelvis at the origin.

    Args:
        angles: By name, (F,) each; what is not named is 0.
        mirrored: Frames whose dominant side is the left, (F,).
        offsets: Rest offset of every joint from its parent, (F, 25, 3).
    Returns:
        Positions, (F, 25, 3), metres.
    """
    rotations = _rotations(angles, mirrored, len(offsets))
    position = np.zeros(offsets.shape, np.float32)
    frame: dict[int, Float] = {0: rotations["pelvis"]}
    for joint, parent, _, name in _CHAIN[1:]:
        position[:, joint] = position[:, parent] + np.einsum("fij,fj->fi", frame[parent], offsets[:, joint])
        frame[joint] = frame[parent] @ rotations[name] if name else frame[parent]
    return position


def figure_offsets(s: Float) -> Float:
    """Rest offsets of every clip's subject, (n, 25, 3), from uniform numbers of its own (n, 4 or more)."""
    rest = np.zeros((25, 3), np.float32)
    for joint, _, offset, _ in _CHAIN:
        rest[joint] = offset
    offsets = rest * (0.85 + 0.3 * s[:, 0, None, None])
    for joints, column in ((_ARMS, 1), (_LEGS, 2), (_SHOULDERS, 3)):
        offsets[:, joints] *= 0.9 + 0.2 * s[:, column, None, None]
    return offsets
