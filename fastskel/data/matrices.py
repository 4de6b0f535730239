"""Matrices of linear transforms: for corruption and shear, their product, and their use on clips."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["apply_matrices", "compose_matrices", "corrupt_matrices", "shear_matrices"]

Float = NDArray[np.float32]


def corrupt_matrices(
    joints: NDArray[np.int64], zero: NDArray[np.bool_], mix: Float, num_joints: int, num_channels: int
) -> Float:
    """Matrices that zero or linearly mix the coordinates of chosen joints and leave the others alone.

    Args:
        joints: Distinct joints of each sample, (N, k).
        zero: Samples whose joints become zero, (N,); the others use `mix`.
        mix: One matrix per sample for row vectors, (N, 3, 3).
        num_joints: V.
        num_channels: C, 2 or 3: with 2 the leading block of `mix` is used.
    Returns:
        Matrices, (N, V, C, C).
    """
    out = np.broadcast_to(
        np.eye(num_channels, dtype=np.float32), (len(joints), num_joints, num_channels, num_channels)
    ).copy()
    block = np.where(zero[:, None, None], np.float32(0), mix[:, :num_channels, :num_channels])
    out[np.arange(len(joints))[:, None], joints] = block[:, None]
    return out


def shear_matrices(parameters: Float, num_joints: int, num_channels: int) -> Float:
    """Matrices of the shear p' = S p with S = [[1, a, b], [c, 1, d], [e, f, 1]], the same for every joint.

    Args:
        parameters: a, b, c, d, e, f of each sample, (N, 6).
        num_joints: V.
        num_channels: C, 2 or 3: with 2 the leading block of S is used.
    Returns:
        The transposes of S, for row vectors, (N, V, C, C), read-only.
    """
    shear = np.broadcast_to(np.eye(3, dtype=np.float32), (len(parameters), 3, 3)).copy()
    shear[:, [0, 0, 1, 1, 2, 2], [1, 2, 0, 2, 0, 1]] = parameters
    rows = shear.transpose(0, 2, 1)[:, :num_channels, :num_channels]
    return np.broadcast_to(rows[:, None], (len(rows), num_joints, num_channels, num_channels))


def compose_matrices(first: Float, second: Float) -> Float:
    """The map `first` followed by `second`: the product A B for row vectors.

    Args:
        first: A, (N, V, C, C).
        second: B, (N, V, C, C).
    Returns:
        A B, (N, V, C, C), summed in ascending order of the inner channel.
    """
    out = first[..., :, 0, None] * second[..., None, 0, :]
    for channel in range(1, first.shape[-1]):
        out = out + first[..., :, channel, None] * second[..., None, channel, :]
    return out


def apply_matrices(clips: Float, matrices: Float) -> Float:
    """Apply one matrix per sample and joint to every frame and body: p' = p A.

    Args:
        clips: Points, (N, T, M, V, C), float32.
        matrices: A, (N, V, C, C), float32.
    Returns:
        Transformed points, (N, T, M, V, C), float32, summed in ascending order of the channel.
    Raises:
        ValueError: If the shapes do not fit.
    """
    samples, _, _, num_joints, channels = clips.shape
    if matrices.shape != (samples, num_joints, channels, channels):
        raise ValueError(
            f"apply_matrices: matrices must be (N, V, C, C) = {(samples, num_joints, channels, channels)}, "
            f"got {matrices.shape}. Make them for these clips."
        )
    out = np.empty_like(clips)
    total = np.empty(clips.shape[:-1], np.float32)
    term = np.empty_like(total)
    # one output channel at a time keeps the inner loops over joints and the memory at two channels of the batch
    for column in range(channels):
        np.multiply(clips[..., 0], matrices[:, None, None, :, 0, column], out=total)
        for channel in range(1, channels):
            np.multiply(clips[..., channel], matrices[:, None, None, :, channel, column], out=term)
            np.add(total, term, out=total)
        out[..., column] = total
    return out
