"""Bodies of a recording over time: which rows are the same body, which bodies are spurious, and which come first."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["RULES", "Body", "bodies_over_time", "chosen_bodies", "is_noise", "placed"]

RULES = ("length", "spread", "motion")
# thresholds of the denoising scripts that SGN and CTR-GCN publish: at most so many frames are short, ...
SHORT_FRAMES = 11
# ... x spread over y spread beyond this is no upright body in a frame, and in this share of frames no body at all
WIDE_RATIO = 0.8
WIDE_SHARE = 0.69754
# least and largest variance of x, y and z together, square metres, of a body that is not the one that moves most
MOTION_RANGE = (0.089925, 2.0)


@dataclass(frozen=True)
class Body:
    """One body of a recording.

    Attributes:
        identity: Number that the sensor follows it by.
        frames: Frames with it, ascending, (K,).
        joints: Its joints there, (K, V, 3), metres.
    """

    identity: int
    frames: NDArray[np.int64]
    joints: NDArray[np.float32]

    def motion(self) -> float:
        """Return the sum of the standard deviations of x, y and z over joints and frames, metres.

        Source: the order of bodies of 2s-AGCN.
        """
        return float(self._points().std(axis=0).sum())

    def variance(self) -> float:
        """Return the sum of the variances of x, y and z over joints and frames, square metres."""
        return float(self._points().var(axis=0).sum())

    def wide_share(self) -> float:
        """Return the share of frames whose x spread is beyond `WIDE_RATIO` times their y spread."""
        wide, high = np.moveaxis(np.ptp(self.joints[..., :2].astype(np.float64), axis=1), -1, 0)
        return float((wide > WIDE_RATIO * high).mean())

    def _points(self) -> NDArray[np.float64]:
        return self.joints.reshape(-1, 3).astype(np.float64)


def bodies_over_time(
    num_bodies: NDArray[np.int64], ids: NDArray[np.int64], joints: NDArray[np.float32]
) -> list[Body]:
    """Gather the rows of each body by its number, whichever slot it has in a frame.

    Args:
        num_bodies: Bodies in each frame, (T,).
        ids: Number of each body, frame after frame, (B,) with B the sum of `num_bodies`.
        joints: Joints of each, (B, V, 3), metres; where all are zero there is no body.
    Returns:
        Bodies in the order of their first row.
    Raises:
        ValueError: If a number occurs twice in one frame; says which.
    """
    frames = np.repeat(np.arange(len(num_bodies), dtype=np.int64), num_bodies)
    seen = joints.any(axis=(1, 2))
    bodies = []
    for identity in dict.fromkeys(ids[seen].tolist()):
        rows = np.flatnonzero(seen & (ids == identity))
        twice = np.flatnonzero(np.diff(frames[rows]) == 0)
        if len(twice):
            raise ValueError(f"body {identity} twice in frame {int(frames[rows[twice[0]]])}")
        bodies.append(Body(identity, frames[rows], joints[rows]))
    return bodies


def is_noise(body: Body, rule: str) -> bool:
    """Say whether a body of K frames, (K, V, 3), is spurious by a rule.

    Args:
        body: Body.
        rule: "length": in at most 11 frames. "spread": wider than 0.8 of its height in at least 69.754 % of its frames.
            "motion": variance below 0.089925 or above 2 square metres.
    Source: thresholds of the denoising scripts that SGN and CTR-GCN publish, which define the third and do not use it.
    """
    if rule == "length":
        return len(body.frames) <= SHORT_FRAMES
    if rule == "spread":
        return body.wide_share() >= WIDE_SHARE
    assert rule == "motion"
    return not MOTION_RANGE[0] <= body.variance() <= MOTION_RANGE[1]


def chosen_bodies(bodies: Sequence[Body], rules: Collection[str]) -> list[Body]:
    """Order bodies, (K, V, 3) each, by motion, largest first, and drop those that a rule calls spurious.

    Rules work one after the other in the order of `RULES`. The body that moves most is never dropped by "motion", and
    stays if another rule would drop all.
    """
    left = sorted(bodies, key=Body.motion, reverse=True)
    for rule in RULES:
        if rule in rules:
            safe = left[:1] if rule == "motion" else []
            left = safe + [body for body in left[len(safe) :] if not is_noise(body, rule)] or left[:1]
    return left


def placed(bodies: Sequence[Body], num_frames: int, num_bodies: int, join: bool) -> NDArray[np.float32]:
    """Give bodies their places in a clip.

    Args:
        bodies: At least one body, in order of importance.
        num_frames: T.
        num_bodies: Most bodies of the clip, at least 1.
        join: A body in none of the frames of an earlier place goes on in it: someone whom the sensor lost and found
            under another number.
    Returns:
        Joints, (T, M, V, 3), zero where a body is absent; M is at most `num_bodies`.
    """
    places: list[list[Body]] = []
    for body in bodies:
        place = next((place for place in places if _apart(body, place)), None) if join else None
        if place is not None:
            place.append(body)
        elif len(places) < num_bodies:
            places.append([body])
    joints = np.zeros((num_frames, len(places), *bodies[0].joints.shape[1:]), dtype=np.float32)
    for number, place in enumerate(places):
        for body in place:
            joints[body.frames, number] = body.joints
    return joints


def _apart(body: Body, place: Sequence[Body]) -> bool:
    return not any(np.isin(body.frames, other.frames).any() for other in place)
