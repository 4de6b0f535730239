"""Synthetic motion: stick figures of the NTU-25 skeleton that perform parametric actions before a camera.

For demonstrations and tests where no recorded data is at hand. Units are metres, y is up, the camera stands at the
origin and looks along +z; the subject faces it at yaw 0. Every subject has body proportions, a handedness and a style
of its own, every clip a duration, phase, tempo, amplitude, camera yaw (165 degrees to either side) and sensor noise
of its own. Joint angles drive a kinematic chain, so bone lengths are constant within a clip before the noise. Every
number is a Philox word of use SYNTHETIC: views 0 (clip), 1 (subject), 2 (noise), 3 (lost joints).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastskel.data.figure import ACTIONS, FEET, Pose, figure_offsets, figure_positions, turn
from fastskel.data.pack import pack_arrays
from fastskel.data.packed import PackedDataset
from fastskel.philox import Use, below, distinct, uniform, words
from fastskel.skeleton import topology as named_topology

__all__ = ["SyntheticMotion", "make_synthetic", "synthetic_motion"]

Float = NDArray[np.float32]
MIN_FRAMES, MAX_FRAMES = 40, 120
CLIP_VIEW, SUBJECT_VIEW, NOISE_VIEW, LOST_VIEW = 0, 1, 2, 3
# every joint can be lost but the one that normalisation centres the body on
LOSABLE = np.delete(np.arange(25), named_topology("ntu-25").centre)
# standard deviation of a joint's position as depth cameras report it, metres
NOISE = 0.012


@dataclass(frozen=True)
class SyntheticMotion:
    """Generated clips.

    Attributes:
        clips: One array per clip, (T, M, 25, 3), metres, y up.
        labels: Action of each clip, (n,).
        class_names: Name of each action.
        columns: subject, camera and setup of each clip, (n,) each.
        splits: xsub (disjoint subjects) and xview (camera 2 is the test).
    """

    clips: list[Float]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    columns: dict[str, NDArray[np.int64]]
    splits: dict[str, dict[str, NDArray[np.int64]]]


def _ramp(value: Float) -> Float:
    """Smooth step from 0 to 1, any shape."""
    clipped = np.clip(value, 0, 1)
    return clipped * clipped * (3 - 2 * clipped)


def synthetic_motion(
    num_clips: int,
    *,
    num_classes: int = 8,
    num_subjects: int = 20,
    seed: int = 0,
    bodies: int = 1,
    noise: float = NOISE,
    max_lost: int = 0,
) -> SyntheticMotion:
    """Generate clips (T, M, 25, 3) of 40 to 120 frames.

    Args:
        num_clips: n; classes are balanced up to one clip.
        num_classes: Number of actions, the first of `ACTIONS`.
        num_subjects: Number of subjects; every second one is in the training part of xsub.
        seed: 64-bit key of every draw.
        bodies: M; bodies after the first are absent, zeros.
        noise: Standard deviation of the sensor noise, metres.
        max_lost: Most joints that the sensor loses in a clip, as behind a table; they are zero in all of its frames.
    Returns:
        Clips with labels, columns and splits; the same for the same arguments.
    Raises:
        ValueError: If a number is out of range.
    """
    limits = {
        "num_clips": (num_clips, 1, 1 << 24),
        "num_classes": (num_classes, 2, len(ACTIONS)),
        "num_subjects": (num_subjects, 2, 1 << 16),
        "bodies": (bodies, 1, 16),
        "max_lost": (max_lost, 0, len(LOSABLE)),
    }
    for argument, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise ValueError(f"synthetic_motion: {argument} must be in {low} .. {high}, got {value}. Choose another.")
    number = np.arange(num_clips)
    u = uniform(words(seed, number, 0, CLIP_VIEW, Use.SYNTHETIC, 32))
    labels = number % num_classes
    subject = np.minimum((u[:, 0] * num_subjects).astype(np.int64), num_subjects - 1)
    camera = np.minimum((u[:, 1] * 3).astype(np.int64), 2)
    setup = subject * 4 // num_subjects
    s = uniform(words(seed, np.arange(num_subjects), 0, SUBJECT_VIEW, Use.SYNTHETIC, 16))[subject]

    length = MIN_FRAMES + (u[:, 2] * (MAX_FRAMES - MIN_FRAMES + 1)).astype(np.int64)
    clip = np.repeat(number, length)
    first = np.cumsum(length) - length
    time = ((np.arange(len(clip)) - first[clip]) / (length[clip] - 1)).astype(np.float32)
    # tempo: one clip hurries at its beginning, another at its end
    time = time ** np.exp2(u[clip, 3] - 0.5)
    cycles, onset, pace = 1.5 + 2.5 * u[:, 4], 0.5 * u[:, 5], 0.3 + 0.2 * s[:, 6]
    moved = (time - onset[clip]) / pace[clip]
    phase = (2 * np.pi * (cycles[clip] * time + u[clip, 6])).astype(np.float32)
    level = _ramp(moved * (1.5 + u[clip, 7]))
    bump = _ramp(moved * 2) * _ramp((1.5 + 0.7 * u[clip, 8] - moved) * 2)
    size = (0.45 + 0.45 * u[:, 9] + 0.3 * s[:, 7])[clip]

    angles = _idle(u[clip], s[clip], time)
    for label, action in enumerate(list(ACTIONS.values())[:num_classes]):
        rows = np.flatnonzero(labels[clip] == label)
        pose = Pose({}, phase[rows], level[rows], bump[rows], size[rows])
        action(pose)
        for name, angle in pose.angles.items():
            angles.setdefault(name, np.zeros(len(clip), np.float32))[rows] += angle
    # a third of the subjects is left-handed, and anybody uses the other hand now and then
    mirrored = ((s[:, 5] < 0.35) ^ (u[:, 10] < 0.2))[clip]
    points = figure_positions(angles, mirrored, figure_offsets(s)[clip])
    points[..., 1] -= points[:, FEET, 1].min(1)[:, None]
    if "jump" in angles:
        points[..., 1] += angles["jump"][:, None]
    points = _before_camera(points, clip, time, u, camera, setup)
    if noise:
        points += np.float32(noise) * _normal(seed, clip, first, length, points.shape[1] * 3).reshape(points.shape)
    if max_lost:
        drawn = words(seed, number, 0, LOST_VIEW, Use.SYNTHETIC, 1 + max_lost)
        lost = np.zeros((num_clips, 25), np.bool_)
        chosen = LOSABLE[distinct(drawn[:, 1:], len(LOSABLE))]
        np.put_along_axis(lost, chosen, np.arange(max_lost) < below(drawn[:, 0], max_lost + 1)[:, None], 1)
        points[lost[clip]] = 0
    frames = np.zeros((len(clip), bodies, 25, 3), np.float32)
    frames[:, 0] = points
    test = {"xsub": subject % 2 == 1, "xview": camera == 2}
    return SyntheticMotion(
        np.split(frames, first[1:]),
        labels,
        tuple(ACTIONS)[:num_classes],
        {"subject": subject, "camera": camera, "setup": setup},
        {name: {"train": np.flatnonzero(~part), "test": np.flatnonzero(part)} for name, part in test.items()},
    )


def _idle(u: Float, s: Float, time: Float) -> dict[str, Float]:
    """Posture and sway of a standing person, (F,) each."""
    sway = np.sin(2 * np.pi * (time * (0.5 + u[:, 11]) + u[:, 12]))
    other = np.sin(2 * np.pi * (time * (0.5 + u[:, 13]) + u[:, 14]))
    # in every other clip the other hand is held up, as with a bag or a telephone
    held = (u[:, 27] < 0.5) * (0.3 + 0.9 * u[:, 28])
    return {
        "lean": 0.10 * (s[:, 8] - 0.3) + 0.03 * sway,
        "spine": 0.15 * (s[:, 9] - 0.3) + 0.02 * other,
        "twist": 0.25 * (u[:, 15] - 0.5) + 0.04 * other,
        "neck": 0.3 * (u[:, 16] - 0.5) + 0.05 * sway,
        "abd_d": 0.08 + 0.25 * s[:, 10] * u[:, 17],
        "abd_n": 0.08 + 0.25 * s[:, 10] * u[:, 18] + 0.5 * held,
        "flex_d": 0.5 * (u[:, 19] - 0.4) + 0.05 * sway,
        "flex_n": 0.5 * (u[:, 20] - 0.4) + 0.05 * other + 0.7 * held,
        "elbow_d": 0.1 + 0.5 * u[:, 21],
        "elbow_n": 0.1 + 0.5 * u[:, 22] + 1.2 * held,
        "spread_d": 0.02 + 0.12 * s[:, 11],
        "spread_n": 0.02 + 0.12 * s[:, 11],
    }


def _before_camera(
    points: Float,
    clip: NDArray[np.int64],
    time: Float,
    u: Float,
    camera: NDArray[np.int64],
    setup: NDArray[np.int64],
) -> Float:
    """Points of a person on the ground (F, 25, 3) as the clip's camera sees them, in the camera's frame (F, 25, 3)."""
    yaw = np.pi + np.deg2rad(90) * (camera - 1) + np.deg2rad(150) * (u[:, 23] - 0.5)
    pitch = np.deg2rad(8) * (setup - 1) / 2 + np.deg2rad(10) * (u[:, 24] - 0.5)
    place = np.stack([1.2 * (u[:, 25] - 0.5), np.zeros(len(u)), 2.6 + 0.4 * setup + 1.2 * (u[:, 26] - 0.5)], 1)
    height = np.array([0.0, 1.0, 0.0]) * (0.9 + 0.15 * setup[:, None])
    # the subject turns by up to 45 degrees to either side while acting
    turning = yaw[clip] + np.deg2rad(180) * (u[clip, 29] - 0.5) * (time - 0.5)
    turned = points @ turn(1, turning).transpose(0, 2, 1) + (place - height).astype(np.float32)[clip, None]
    return np.asarray(turned @ turn(0, pitch).transpose(0, 2, 1)[clip], np.float32)


def _normal(
    seed: int, clip: NDArray[np.int64], first: NDArray[np.int64], length: NDArray[np.int64], width: int
) -> Float:
    """Standard normal numbers, (F, width), by Box and Muller from the clips' noise words."""
    out = np.empty((len(clip), width), np.float32)
    for number, (begin, count) in enumerate(zip(first.tolist(), length.tolist(), strict=True)):
        half = (count * width + 1) // 2
        drawn = words(seed, np.array([number]), 0, NOISE_VIEW, Use.SYNTHETIC, 2 * half)[0]
        radius = np.sqrt(-2 * np.log1p(-uniform(drawn[:half])))
        angle = np.float32(2 * np.pi) * uniform(drawn[half:])
        values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        out[begin : begin + count] = values[: count * width].reshape(count, width)
    return out


def make_synthetic(
    out: str | os.PathLike[str],
    *,
    num_clips: int = 1000,
    num_classes: int = 8,
    num_subjects: int = 20,
    seed: int = 0,
    topology: str = "ntu-25",
    bodies: int = 1,
    noise: float = NOISE,
    max_lost: int = 0,
) -> PackedDataset:
    """Generate motion and pack it: clips (T, M, 25, 3) with subjects, cameras, setups and splits xsub and xview.

    Args:
        out: Folder to create.
        num_clips: n.
        num_classes: Number of actions, the first of `ACTIONS`.
        num_subjects: Number of subjects.
        seed: 64-bit key of every draw.
        topology: Skeleton; the figure is an "ntu-25".
        bodies: M; bodies after the first are absent, zeros.
        noise: Standard deviation of the sensor noise, metres.
        max_lost: Most joints that the sensor loses in a clip.
    Returns:
        The packed data set, opened.
    Raises:
        ValueError: If a number is out of range, the topology is another, or the folder exists.
    """
    if topology != "ntu-25":
        raise ValueError(f"make_synthetic: topology must be 'ntu-25', got {topology!r}. Leave it out.")
    motion = synthetic_motion(
        num_clips, num_classes=num_classes, num_subjects=num_subjects, seed=seed, bodies=bodies, noise=noise,
        max_lost=max_lost,
    )  # fmt: skip
    return pack_arrays(
        motion.clips,
        labels=motion.labels,
        topology=topology,
        out=out,
        names=[f"clip{number:06d}" for number in range(num_clips)],
        columns=motion.columns,
        splits={
            protocol: {part: indices.tolist() for part, indices in parts.items()}
            for protocol, parts in motion.splits.items()
        },
        class_names=list(motion.class_names),
        source="synthetic",
        units="metres",
        num_bodies=bodies,
    )
