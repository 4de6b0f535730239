"""Forward kinematics of motion capture: from the numbers of each frame to joint positions, vectorised over frames.

A link lies at x = x_parent + A (offset + moves), in axes G = G_parent (before R before-to-after) of the world. In BVH A are the
parent's axes: a joint turns what hangs on it. In Acclaim files A are the link's own: a bone turns with its joint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Link", "rotation_product", "world_positions"]

# joints of one block of frames: 72 bytes each for the axes that children need, some 20 MB in all
_BLOCK = 1 << 18
_SELF = np.eye(3)


@dataclass(frozen=True)
class Link:
    """One joint of a hierarchy, and the numbers of a frame that move it.

    Attributes:
        name: Name of the joint.
        parent: Number of the link that it hangs on, smaller than its own; -1 for the root.
        offset: Where it lies in the axes that carry it, seen from its parent, (3,).
        moves: (axis, number in the frame) of translations that add to the offset.
        turns: (axis, number in the frame) of rotations, R = R1 R2 R3 in their order: the last one is done first.
        before: Matrix left of R, (3, 3).
        after: Matrix right of R, (3, 3).
        swings: Whether its own axes carry its offset, instead of its parent's.
    """

    name: str
    parent: int
    offset: tuple[float, float, float]
    moves: tuple[tuple[int, int], ...] = ()
    turns: tuple[tuple[int, int], ...] = ()
    before: NDArray[np.float64] | None = None
    after: NDArray[np.float64] | None = None
    swings: bool = False


def rotation_product(axes: Sequence[int], angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Multiply rotations about the axes x, y and z.

    Args:
        axes: Axis of each, 0 to 2, (K,), from left to right.
        angles: Angles, (T, K), radians, counterclockwise seen from the tip of the axis.
    Returns:
        Their products, (T, 3, 3).
    """
    product = np.broadcast_to(_SELF, (len(angles), 3, 3))
    for axis, angle in zip(axes, angles.T, strict=True):
        turn = np.zeros((len(angles), 3, 3))
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn[:, axis, axis] = 1
        turn[:, first, first] = turn[:, second, second] = np.cos(angle)
        turn[:, second, first] = np.sin(angle)
        turn[:, first, second] = -turn[:, second, first]
        product = product @ turn
    return product


def world_positions(
    links: Sequence[Link], values: NDArray[np.float64], unit: float, scale: float, wanted: Sequence[int]
) -> NDArray[np.float32]:
    """Place joints in the world.

    Args:
        links: The hierarchy, (L,), parents before children.
        values: Numbers of each frame, (T, n).
        unit: Radians of one unit of angles.
        scale: What positions are multiplied by.
        wanted: Links whose positions are asked for, (V,).
    Returns:
        Positions, (T, V, 3); not finite where they are no float32.
    """
    positions = np.empty((len(values), len(wanted), 3), np.float32)
    step = max(1, _BLOCK // len(links))
    for start in range(0, len(values), step):
        block = slice(start, start + step)
        with np.errstate(over="ignore", invalid="ignore"):
            positions[block] = _placed(links, values[block], unit)[:, wanted] * scale
    return positions


def _placed(links: Sequence[Link], values: NDArray[np.float64], unit: float) -> NDArray[np.float64]:
    placed = np.empty((len(values), len(links), 3))
    axes: list[NDArray[np.float64]] = []
    for number, link in enumerate(links):
        parent = axes[link.parent] if link.parent >= 0 else np.broadcast_to(_SELF, (len(values), 3, 3))
        turned = rotation_product([axis for axis, _ in link.turns], values[:, [column for _, column in link.turns]] * unit)
        if link.before is not None:
            turned = link.before @ turned
        if link.after is not None:
            turned = turned @ link.after
        axes.append(parent @ turned)
        offset = np.tile(np.array(link.offset), (len(values), 1))
        for axis, column in link.moves:
            offset[:, axis] += values[:, column]
        carrier = axes[number] if link.swings else parent
        placed[:, number] = (carrier @ offset[:, :, None])[:, :, 0]
        if link.parent >= 0:
            placed[:, number] += placed[:, link.parent]
    return placed
