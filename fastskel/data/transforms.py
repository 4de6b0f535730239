r"""Spatial transforms of a view: every one is a C x C matrix per sample and joint.

A transform draws its parameters and turns them into matrices A (N, V, C, C); a point is a row vector, p' = p A.
Several transforms compose by the matrix product in their order and are applied once, so the cost of a pipeline does
not grow with its length, and absent joints (zero) stay absent.

Draws. Transform number p of a pipeline (from 0) owns words 64 p .. 64 p + 63 of uses SPATIAL and JOINTS of its
sample's address (`fastskel.philox`): word numbers are fixed, nothing is consumed in sequence. With w for the word's
number less 64 p:

    SPATIAL w = 0        OneOf: option = below(word, number of options); the option reads the rest of the same block
    SPATIAL w = 1        JointCorruption: the joints become zero where uniform(word) < zero_probability
    SPATIAL w = 4 .. 12  JointCorruption: the 3 x 3 matrix W, row by row, 2 uniform(word) - 1
    SPATIAL w = 4 .. 9   Shear: a, b, c, d, e, f, each amplitude * (2 uniform(word) - 1)
    JOINTS  w = 0 .. k-1 JointCorruption: k distinct joints by the partial Fisher-Yates shuffle

with k = floor(fraction V + 1/2). The fraction is a double; the probability and the amplitude are rounded to float32
once, and every product and sum is a float32 operation of its own (no fused multiply-add), in ascending order of the
channel summed over. With C = 2 the leading 2 x 2 blocks are used.

Source: joint_corruption and pose_augmentation of USDRL's multi-view augmentation.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastskel.philox import Use, below, distinct, uniform, words
from fastskel.registry import Registry

__all__ = [
    "TRANSFORMS",
    "JointCorruption",
    "OneOf",
    "Shear",
    "SpatialTransform",
    "apply_matrices",
    "compose_matrices",
    "corrupt_matrices",
    "draw_matrices",
    "shear_matrices",
]

Float = NDArray[np.float32]
Words = NDArray[np.uint32]

# words that one transform of a pipeline owns in each use: enough for the joints of every known skeleton
BLOCK_WORDS = 64
# of the SPATIAL block, the words any transform reads: a coin, its own coin, two spare, and twelve parameters
SPATIAL_WORDS = 16


class SpatialTransform(abc.ABC):
    """A random linear map per sample and joint; subclasses are frozen dataclasses, named in `TRANSFORMS`."""

    def num_joint_words(self, num_joints: int) -> int:
        """Words of use JOINTS that the transform reads for a skeleton of V joints, at most 64."""
        return 0

    @abc.abstractmethod
    def matrices(self, spatial: Words, joints: Words, num_joints: int, num_channels: int) -> Float:
        """Turn drawn words into matrices.

        Args:
            spatial: Words 0 .. 15 of the transform's SPATIAL block, (N, 16).
            joints: First words of its JOINTS block, (N, at least `num_joint_words(V)`).
            num_joints: V.
            num_channels: C, 2 or 3.
        Returns:
            One matrix per sample and joint for row vectors, (N, V, C, C).
        """


TRANSFORMS: Registry[type[SpatialTransform]] = Registry("spatial transform")


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


def draw_matrices(
    spatial: tuple[SpatialTransform, ...],
    num_joints: int,
    num_channels: int,
    *,
    seed: int,
    index: NDArray[np.int64],
    epoch: int,
    view: int,
) -> Float:
    """Draw every transform of a pipeline and compose them.

    Args:
        spatial: The pipeline, at least one transform.
        num_joints: V.
        num_channels: C, 2 or 3.
        seed: 64-bit key of the draws.
        index: Global sample index of each row, (N,).
        epoch: Epoch of the draws.
        view: View number of the draws.
    Returns:
        Matrices of the whole pipeline, (N, V, C, C).
    Raises:
        ValueError: If the pipeline is empty, C is not 2 or 3, or a transform needs more than its 64 words.
    """
    if not spatial:
        raise ValueError(
            "draw_matrices: spatial must be a pipeline of at least one transform, got none. Skip the call."
        )
    if num_channels not in (2, 3):
        raise ValueError(
            f"draw_matrices: num_channels must be 2 or 3, got {num_channels}. Remove the spatial transforms."
        )
    last = BLOCK_WORDS * (len(spatial) - 1)
    counts = [transform.num_joint_words(num_joints) for transform in spatial]
    if max(counts) > BLOCK_WORDS:
        raise ValueError(
            f"draw_matrices: a transform must read at most {BLOCK_WORDS} joint words, got {max(counts)}. "
            "Lower its fraction."
        )
    coins = words(seed, index, epoch, view, Use.SPATIAL, last + SPATIAL_WORDS)
    picks = (
        words(seed, index, epoch, view, Use.JOINTS, last + max(counts))
        if max(counts)
        else np.empty((len(index), 0), np.uint32)
    )
    total: Float | None = None
    for number, transform in enumerate(spatial):
        base = BLOCK_WORDS * number
        own = coins[:, base : base + SPATIAL_WORDS]
        matrices = transform.matrices(own, picks[:, base : base + counts[number]], num_joints, num_channels)
        total = matrices if total is None else compose_matrices(total, matrices)
    assert total is not None
    return total


def _symmetric(drawn: Words) -> Float:
    # 2 u - 1 is exact: u has 24 bits
    return uniform(drawn) * np.float32(2) - np.float32(1)


@TRANSFORMS.register("joint-corruption")
@dataclass(frozen=True)
class JointCorruption(SpatialTransform):
    """Set a fraction of the joints to zero, or mix their coordinates by one random matrix, for the whole clip.

    Attributes:
        fraction: Share of the joints chosen; floor(fraction V + 1/2) of them, 15 of 25.
        zero_probability: Probability of zeros; else one 3 x 3 matrix with entries from U(-1, 1) for all chosen joints.
    """

    fraction: float = 0.6
    zero_probability: float = 0.5

    def __post_init__(self) -> None:
        for name in ("fraction", "zero_probability"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"JointCorruption: {name} must be in [0, 1], got {value}. Give a share.")

    def num_joint_words(self, num_joints: int) -> int:
        """Joints chosen of V: floor(fraction V + 1/2)."""
        return math.floor(self.fraction * num_joints + 0.5)

    def matrices(self, spatial: Words, joints: Words, num_joints: int, num_channels: int) -> Float:
        """Matrices (N, V, C, C) from words (N, 16) and (N, k)."""
        chosen = distinct(joints[:, : self.num_joint_words(num_joints)], num_joints)
        zero = uniform(spatial[:, 1]) < np.float32(self.zero_probability)
        return corrupt_matrices(chosen, zero, _symmetric(spatial[:, 4:13]).reshape(-1, 3, 3), num_joints, num_channels)


@TRANSFORMS.register("shear")
@dataclass(frozen=True)
class Shear(SpatialTransform):
    """Shear all joints by one matrix with unit diagonal and off-diagonal entries from U(-amplitude, amplitude)."""

    amplitude: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.amplitude < math.inf:
            raise ValueError(
                f"Shear: amplitude must be finite and at least 0, got {self.amplitude}. Give a positive number."
            )

    def matrices(self, spatial: Words, joints: Words, num_joints: int, num_channels: int) -> Float:
        """Matrices (N, V, C, C) from words (N, 16)."""
        return shear_matrices(_symmetric(spatial[:, 4:10]) * np.float32(self.amplitude), num_joints, num_channels)


@TRANSFORMS.register("one-of")
@dataclass(frozen=True)
class OneOf(SpatialTransform):
    """Choose one of several transforms for each sample, with equal odds."""

    options: tuple[SpatialTransform, ...] = ()

    def __post_init__(self) -> None:
        options: tuple[Any, ...] = self.options
        if not options or any(
            isinstance(option, OneOf) or not isinstance(option, SpatialTransform) for option in options
        ):
            raise ValueError(
                f"OneOf: options must be a non-empty tuple of transforms other than OneOf, got {options}. "
                "List them flat."
            )

    def num_joint_words(self, num_joints: int) -> int:
        """The most that any option reads for V joints."""
        return max(option.num_joint_words(num_joints) for option in self.options)

    def matrices(self, spatial: Words, joints: Words, num_joints: int, num_channels: int) -> Float:
        """Matrices (N, V, C, C) from words (N, 16) and (N, k): the coin is word 0."""
        choice = below(spatial[:, 0], len(self.options))
        out = np.empty((len(spatial), num_joints, num_channels, num_channels), np.float32)
        for number, option in enumerate(self.options):
            rows = np.flatnonzero(choice == number)
            out[rows] = option.matrices(spatial[rows], joints[rows], num_joints, num_channels)
        return out
