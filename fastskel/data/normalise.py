"""Normalisations of joint positions, and the AGCN pre-normalisation that published NTU models were trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastskel.skeleton import Topology

__all__ = ["NORMALISATIONS", "align_body", "body_frame", "center", "check_axes", "normalise", "prenorm"]

NORMALISATIONS = ("none", "center", "center-first", "align", "align-yaw")
# below this a direction or an angle is rounding noise: the bound of the AGCN code
_DEGENERATE = 1e-6


def normalise(clip: NDArray[np.float32], kind: str, topology: Topology) -> NDArray[np.float32]:
    """Normalise one clip.

    Args:
        clip: Joint positions, (T, M, V, C).
        kind: "none"; "center" or "center-first" (see `center`); "align" or "align-yaw" (see `align_body`).
        topology: Skeleton of the V joints.
    Returns:
        Normalised positions, (T, M, V, C); absent (all-zero) joints stay zero.
    Raises:
        ValueError: If the kind is unknown or the clip does not fit it.
    """
    if kind == "none":
        return clip
    if kind == "center":
        return center(clip, topology)
    if kind == "center-first":
        return center(clip, topology, per_frame=False)
    if kind == "align":
        return align_body(clip, topology)
    if kind == "align-yaw":
        return align_body(clip, topology, upright=False)
    raise ValueError(f"normalise: kind must be one of {', '.join(NORMALISATIONS)}, got {kind!r}. Choose one.")


def check_axes(kind: str, channels: Sequence[str], up_axis: str) -> None:
    """Refuse to align what is not x, y and z with y up: the third channel of flat clips is a score.

    Args:
        kind: Normalisation.
        channels: Names of the channels, (C,).
        up_axis: Axis that points up.
    Raises:
        ValueError: If clips with these axes cannot be aligned.
    """
    if kind in ("align", "align-yaw") and (tuple(channels) != ("x", "y", "z") or up_axis != "y"):
        raise ValueError(
            "pack_source: normalisation must be none, center or center-first unless channels are x, y, z with y up, "
            f"got {kind!r} for {', '.join(channels)} with {up_axis} up. Choose another."
        )


def center(clip: NDArray[np.float32], topology: Topology, *, per_frame: bool = True) -> NDArray[np.float32]:
    """Subtract the centre joint of the first body from every body.

    Where that joint is absent, its last known position is used, and before it is first seen its first one, so that
    the clip does not jump.

    Args:
        clip: Joint positions, (T, M, V, C).
        topology: Skeleton of the V joints.
        per_frame: Subtract each frame's own centre; otherwise that of the first frame, which keeps the body's path.
    Returns:
        Centred positions, (T, M, V, C); absent (all-zero) joints stay zero.
    Raises:
        ValueError: If the joints are not those of the topology.
    """
    _check_joints("center", clip, topology)
    present = np.asarray(clip.any(axis=-1))
    track = _held(clip[:, 0, topology.centre], present[:, 0, topology.centre])
    shift = track if per_frame else track[:1]
    centred: NDArray[np.float32] = (clip - shift[:, None, None, :]) * present[..., None]
    return centred


def align_body(clip: NDArray[np.float32], topology: Topology, *, upright: bool = True) -> NDArray[np.float32]:
    """Turn a clip into the view of its own first body, as it stands in the first frame that shows it.

    The origin moves to that body's pelvis. The scene turns until the line from pelvis to neck points along y, then
    about y until the line from its left to its right side (hips and shoulders together) points along x. One rotation
    serves the whole clip, so motion, path and distances between bodies are kept, and the camera's position drops out.

    A clip of which no frame shows every joint of the axes says nothing about where its body faces: it is not turned,
    only moved as "center-first" does. With d = x - origin in float64, coordinate c of the result is
    (d0 R[c, 0] + d1 R[c, 1]) + d2 R[c, 2], every operation rounded on its own, times 1 or 0 for present or absent, and
    rounded to float32 (see `body_frame`). An all-zero joint counts as absent, and of centred clips that is the pelvis in
    every frame, so align before centring, not after; a view of data packed with a normalisation is refused.

    Args:
        clip: Joint positions, (T, M, V, 3), y up.
        topology: Skeleton of the V joints, with its `axes`.
        upright: Turn the body's own up to y. Otherwise the world's y stays as it is and the scene turns about it alone,
            which is right for cameras without tilt and keeps a body lying if it lies.
    Returns:
        Aligned positions, (T, M, V, 3); absent (all-zero) joints stay zero.
    Raises:
        ValueError: If the clip has not 3 channels, or the topology names no axes.
    """
    reference = body_frame(clip, topology, upright=upright)
    if np.isnan(reference[0, 0]):
        return center(clip, topology, per_frame=False)
    origin, rotation = reference[0], reference[1:]
    moved = clip.astype(np.float64) - origin
    turned = np.empty_like(moved)
    # sums of a stated order, which a matrix product does not have
    for axis in range(3):
        x, y, z = (moved[..., channel] * rotation[axis, channel] for channel in range(3))
        turned[..., axis] = (x + y) + z
    return np.asarray(turned * clip.any(axis=-1, keepdims=True), dtype=clip.dtype)


def body_frame(clip: NDArray[np.float32], topology: Topology, *, upright: bool = True) -> NDArray[np.float64]:
    """Where `align_body` puts the origin and how it turns: turned = R (x - origin).

    Args:
        clip: Joint positions, (T, M, V, 3), y up.
        topology: Skeleton of the V joints, with its `axes`.
        upright: As in `align_body`.
    Returns:
        The origin and the rows of R, (4, 3); NaN if no frame shows every joint of the axes with finite coordinates.
    Raises:
        ValueError: If the clip has not 3 channels, or the topology names no axes.
    """
    _check_joints("align_body", clip, topology)
    if clip.shape[-1] != 3:
        raise ValueError(f"align_body: clip must be (T, M, V, 3), got shape {clip.shape}. Use 'center' for flat clips.")
    axes = topology.axes
    if len(axes) != 6:
        raise ValueError(f"align_body: topology must name all body axes, {topology.name!r} has {list(axes)}. Add them.")
    shown = clip[:, 0, sorted({joint for joints in axes.values() for joint in joints})]
    complete = (shown.any(axis=-1) & np.isfinite(shown).all(axis=-1)).all(axis=-1)
    if not complete.any():
        return np.full((4, 3), np.nan)
    body = clip[int(np.argmax(complete)), 0].astype(np.float64)
    point = {axis: body[list(joints)].mean(axis=0) for axis, joints in axes.items()}
    side = (point["right_hip"] - point["left_hip"]) + (point["right_shoulder"] - point["left_shoulder"])
    up = point["neck"] - point["pelvis"] if upright else np.array([0.0, 1.0, 0.0])
    return np.concatenate([point["pelvis"][None], _frame(side, up)])


def prenorm(
    clips: NDArray[np.float32],
    *,
    center_joint: int = 1,
    zaxis: Sequence[int] = (0, 1),
    xaxis: Sequence[int] = (8, 4),
) -> NDArray[np.float32]:
    """Pre-normalise clips as 2s-AGCN does: fill empty frames, centre, turn spine and shoulders to axes.

    A body that begins with empty frames loses all its empty frames; then its empty end is filled by repeating what is
    before it (other empty frames stay). The first body's centre joint is subtracted frame by frame. Last, all bodies
    are turned so that in the first frame of the first body the bone `zaxis` points along z, then `xaxis` along x.

    Args:
        clips: Joint positions, (N, T, M, V, 3), zero where absent.
        center_joint: Joint to subtract.
        zaxis: First and second joint of the line to turn to z; empty to leave out. NTU: (0, 1); UAV-Human: (11, 5).
        xaxis: First and second joint of the line to turn to x; empty to leave out. NTU: (8, 4); UAV-Human: none.
    Returns:
        Normalised copies, (N, T, M, V, 3), float32.
    Raises:
        ValueError: If the clips are not of that shape, or an axis has not two joints.
    Source: pre-normalisation of 2s-AGCN as used by USDRL's data preparation.
    """
    if clips.ndim != 5 or clips.shape[-1] != 3:
        raise ValueError(f"prenorm: clips must be (N, T, M, V, 3), got shape {clips.shape}. Add the missing axes.")
    joints = [center_joint, *zaxis, *xaxis]
    if {len(zaxis), len(xaxis)} - {0, 2} or not all(0 <= joint < clips.shape[3] for joint in joints):
        raise ValueError(
            f"prenorm: center_joint, zaxis and xaxis must be joints of range({clips.shape[3]}), two or none per axis, "
            f"got {center_joint}, {tuple(zaxis)} and {tuple(xaxis)}. Name the joints of your skeleton."
        )
    result = np.array(clips, dtype=np.float32)
    for clip in result:
        for number in range(clip.shape[1]):
            clip[:, number] = _fill(clip[:, number])
        # the reference tells absence by coordinate sums: kept, for equal results
        mask = clip.sum(axis=-1, keepdims=True) != 0
        clip[...] = (clip - clip[:, :1, center_joint : center_joint + 1]) * mask
        for axis, target in ((tuple(zaxis), (0.0, 0.0, 1.0)), (tuple(xaxis), (1.0, 0.0, 0.0))):
            if axis and clip.any():
                start, end = clip[0, 0, axis[0]], clip[0, 0, axis[1]]
                clip[...] = clip @ _turn((end - start).astype(np.float64), np.array(target)).T
    return result


def _check_joints(function: str, clip: NDArray[np.float32], topology: Topology) -> None:
    if clip.ndim != 4 or clip.shape[2] != topology.num_joints:
        expected = f"(T, M, {topology.num_joints}, C) for {topology.name!r}"
        raise ValueError(f"{function}: clip must be {expected}, got shape {clip.shape}. Name the clip's topology.")


def _held(track: NDArray[np.float32], known: NDArray[np.bool_]) -> NDArray[np.float32]:
    # index of the last known frame at or before each one; before the first known frame, that frame
    last = np.maximum.accumulate(np.where(known, np.arange(len(track)), 0))
    return track[np.maximum(last, int(np.argmax(known)))]


def _fill(body: NDArray[np.float32]) -> NDArray[np.float32]:
    shown = np.flatnonzero(body.sum(axis=(1, 2)) != 0)
    if len(shown) == 0:
        return body
    if shown[0] > 0:
        moved = np.zeros_like(body)
        moved[: len(shown)] = body[shown]
        body, end = moved, len(shown)
    else:
        end = int(shown[-1]) + 1
    return body[np.arange(len(body)) % end]


def _frame(side: NDArray[np.float64], up: NDArray[np.float64]) -> NDArray[np.float64]:
    # rows are the body's x, y and z axes: y is exact, x is the part of `side` at right angles to it
    identity = np.eye(3)
    if np.linalg.norm(up) < _DEGENERATE:
        return identity
    y = up / np.linalg.norm(up)
    x = side - (side @ y) * y
    if np.linalg.norm(x) < _DEGENERATE:
        return identity
    x /= np.linalg.norm(x)
    return np.stack([x, y, np.cross(x, y)])


def _turn(start: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    # smallest rotation that takes `start` to the unit vector `target` (Rodrigues)
    length = np.linalg.norm(start)
    axis = np.cross(start, target)
    if length == 0 or np.abs(axis).sum() < _DEGENERATE:
        return np.eye(3)
    angle = np.arccos(np.clip(start @ target / length, -1.0, 1.0))
    if angle < _DEGENERATE:
        return np.eye(3)
    x, y, z = axis / np.linalg.norm(axis)
    skew = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    rotation: NDArray[np.float64] = np.eye(3) + np.sin(angle) * skew + (1 - np.cos(angle)) * (skew @ skew)
    return rotation
