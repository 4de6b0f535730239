r"""Transforms of a view: the pipeline, and the linear ones; the others are in `fastskel.data.distort`.

A linear transform draws its parameters and turns them into matrices A (N, V, C, C); a point is a row vector, p' = p A.
Several in a row compose by the matrix product in their order and are applied once, so the cost of a pipeline does not
grow with their number, and absent joints (zero) stay absent.

Draws. Transform number p of a pipeline (from 0) owns words 64 p .. 64 p + 63 of uses SPATIAL and JOINTS of its
sample's address (`fastskel.philox`): word numbers are fixed, nothing is consumed in sequence. With w for the word's
number less 64 p:

    SPATIAL w = 0        OneOf: option = below(word, number of options); the option reads the rest of the same block
    SPATIAL w = 1        JointCorruption: the joints become zero where uniform(word) < zero_probability
    SPATIAL w = 1        Rotation, Scaling, JointMask: applied where uniform(word) < probability, else the identity
    SPATIAL w = 4 .. 12  JointCorruption: the 3 x 3 matrix W, row by row, 2 uniform(word) - 1
    SPATIAL w = 4 .. 9   Shear: a, b, c, d, e, f, each amplitude * (2 uniform(word) - 1)
    SPATIAL w = 4 .. 6   Rotation: angles about x, y, z, each angle * (2 uniform(word) - 1)
    SPATIAL w = 4 .. 6   Scaling: factor of each channel, low + (high - low) uniform(word); one for all reads w = 4
    JOINTS  w = 0 .. k-1 JointCorruption, JointMask: k distinct joints by the partial Fisher-Yates shuffle

with k = floor(fraction V + 1/2). The fraction is a double; every other parameter is rounded to float32 once, and every
product and sum is a float32 operation of its own (no fused multiply-add), in ascending order of the channel summed
over. With C = 2 the leading 2 x 2 blocks are used, and of a rotation the one about z.

Source: joint_corruption and pose_augmentation of USDRL's multi-view augmentation; random rotation of CTR-GCN's,
STTFormer's and MAMP's feeders; joint mask of AS-CAL (Rao et al., 2021).
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastskel.data.matrices import apply_matrices, compose_matrices, corrupt_matrices, shear_matrices
from fastskel.data.parameters import LARGEST, check_flag, check_number, check_share, share_of
from fastskel.philox import Use, below, distinct, symmetric, uniform, words
from fastskel.registry import Registry
from fastskel.skeleton import Topology

__all__ = [
    "TRANSFORMS",
    "ClipAddress",
    "ClipTransform",
    "JointCorruption",
    "JointMask",
    "OneOf",
    "Rotation",
    "Scaling",
    "Shear",
    "SpatialTransform",
    "Transform",
    "apply_transforms",
    "coin",
    "draw_matrices",
]

Float = NDArray[np.float32]
Words = NDArray[np.uint32]

# words that one transform of a pipeline owns in each use: enough for the joints of every known skeleton
BLOCK_WORDS = 64
# of the SPATIAL block, the words any transform reads: a coin, its own coin, two spare, and twelve parameters
SPATIAL_WORDS = 16


@dataclass(frozen=True)
class ClipAddress:
    """Where the draws of N samples of one view come from.

    Attributes:
        seed: 64-bit key.
        index: Global sample index of each row, (N,).
        epoch: Epoch of the draws.
        view: View number of the draws.
    """

    seed: int
    index: NDArray[np.int64]
    epoch: int
    view: int

    def words(self, use: int, num: int, *, first: int = 0) -> Words:
        """Words first .. first + num - 1 of a use, (N, num); `first` a multiple of 4."""
        return words(self.seed, self.index, self.epoch, self.view, use, num, first=first)

    def spatial(self, number: int) -> Words:
        """The SPATIAL words of transform `number` of the pipeline, (N, 16)."""
        return self.words(Use.SPATIAL, SPATIAL_WORDS, first=BLOCK_WORDS * number)

    def rows(self, chosen: NDArray[np.int64]) -> ClipAddress:
        """The address of some of the samples, rows (K,)."""
        return ClipAddress(self.seed, self.index[chosen], self.epoch, self.view)


class Transform:
    """A random change of a view's clips; subclasses are frozen dataclasses of numbers, named in `TRANSFORMS`.

    A transform of one's own derives from `SpatialTransform` or from `ClipTransform`.
    """

    def check(self, shape: tuple[int, int, int, int]) -> None:
        """Raise ValueError if clips of shape (T, M, V, C) cannot be transformed."""


class SpatialTransform(Transform, abc.ABC):
    """A random linear map per sample and joint."""

    def check(self, shape: tuple[int, int, int, int]) -> None:
        """Raise ValueError if the joints of clips (T, M, V, C) take more words than a transform owns."""
        count = self.num_joint_words(shape[2])
        if count > BLOCK_WORDS:
            raise ValueError(
                f"{type(self).__name__}: a transform must read at most {BLOCK_WORDS} joint words, got {count}. "
                "Lower its fraction."
            )

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


class ClipTransform(Transform, abc.ABC):
    """A random change that is no linear map of single joints."""

    @abc.abstractmethod
    def apply(self, clips: Float, address: ClipAddress, number: int, topology: Topology) -> Float:
        """Transform joint positions; every row depends on its own clip and address alone.

        Args:
            clips: Positions, (N, T, M, V, C), float32; left as they are.
            address: Where the rows' draws come from.
            number: The transform's number in the pipeline: words 64 number + w of SPATIAL are its own.
            topology: Skeleton of the V joints.
        Returns:
            Transformed positions, (N, T, M, V, C), float32; `clips` itself where nothing changes.
        """


TRANSFORMS: Registry[type[Transform]] = Registry("transform")


def draw_matrices(
    spatial: tuple[SpatialTransform, ...],
    num_joints: int,
    num_channels: int,
    *,
    seed: int,
    index: NDArray[np.int64],
    epoch: int,
    view: int,
    first: int = 0,
) -> Float:
    """Draw some linear transforms that follow each other in a pipeline and compose them.

    Args:
        spatial: The transforms, at least one.
        num_joints: V.
        num_channels: C, 2 or 3.
        seed: 64-bit key of the draws.
        index: Global sample index of each row, (N,).
        epoch: Epoch of the draws.
        view: View number of the draws.
        first: Number of the first of them in the whole pipeline.
    Returns:
        Matrices of all of them together, (N, V, C, C).
    Raises:
        ValueError: If there is none, C is not 2 or 3, or a transform needs more than its 64 words.
    """
    if not spatial:
        raise ValueError(
            "draw_matrices: spatial must be a pipeline of at least one transform, got none. Skip the call."
        )
    if num_channels not in (2, 3):
        raise ValueError(
            f"draw_matrices: num_channels must be 2 or 3, got {num_channels}. Remove the spatial transforms."
        )
    address = ClipAddress(seed, index, epoch, view)
    total: Float | None = None
    for number, transform in enumerate(spatial, first):
        transform.check((1, 1, num_joints, num_channels))
        count = transform.num_joint_words(num_joints)
        joints = address.words(Use.JOINTS, count, first=BLOCK_WORDS * number)
        matrices = transform.matrices(address.spatial(number), joints, num_joints, num_channels)
        total = matrices if total is None else compose_matrices(total, matrices)
    assert total is not None
    return total


def apply_transforms(
    clips: Float, transforms: tuple[Transform, ...], address: ClipAddress, topology: Topology
) -> Float:
    """Apply a pipeline in its order, linear transforms that follow each other as one matrix per sample and joint.

    Args:
        clips: Joint positions, (N, T, M, V, C), float32.
        transforms: The pipeline.
        address: Where the draws of the N samples come from.
        topology: Skeleton of the V joints.
    Returns:
        Transformed positions, (N, T, M, V, C), float32.
    Raises:
        ValueError: If a transform does not fit the clips.
    """
    seed, index, epoch, view = address.seed, address.index, address.epoch, address.view
    run: list[SpatialTransform] = []
    for number, transform in enumerate((*transforms, None)):
        if isinstance(transform, SpatialTransform):
            run.append(transform)
            continue
        if run:
            matrices = draw_matrices(
                tuple(run), *clips.shape[-2:], seed=seed, index=index, epoch=epoch, view=view, first=number - len(run)
            )
            clips, run = apply_matrices(clips, matrices), []
        if isinstance(transform, ClipTransform):
            clips = transform.apply(clips, address, number, topology)
    return clips


def coin(spatial: Words, probability: float) -> NDArray[np.bool_]:
    """Samples that a transform is applied to, (N,), from its SPATIAL words (N, 16)."""
    return uniform(spatial[:, 1]) < np.float32(probability)


def _chosen(spatial: Words, probability: float, matrices: Float, num_joints: int) -> Float:
    # (N, C, C) where the coin says so, else the identity, the same for every joint
    applied = coin(spatial, probability)[:, None, None]
    chosen = np.where(applied, matrices, np.eye(matrices.shape[-1], dtype=np.float32))
    return np.broadcast_to(chosen[:, None], (len(chosen), num_joints, *chosen.shape[1:]))


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
        check_share("JointCorruption", "fraction", self.fraction)
        check_share("JointCorruption", "zero_probability", self.zero_probability)

    def num_joint_words(self, num_joints: int) -> int:
        """Joints chosen of V: floor(fraction V + 1/2)."""
        return share_of(self.fraction, num_joints)

    def matrices(self, spatial: Words, joints: Words, num_joints: int, num_channels: int) -> Float:
        """Matrices (N, V, C, C) from words (N, 16) and (N, k)."""
        chosen = distinct(joints[:, : self.num_joint_words(num_joints)], num_joints)
        zero = uniform(spatial[:, 1]) < np.float32(self.zero_probability)
        return corrupt_matrices(chosen, zero, symmetric(spatial[:, 4:13]).reshape(-1, 3, 3), num_joints, num_channels)


@TRANSFORMS.register("shear")
@dataclass(frozen=True)
class Shear(SpatialTransform):
    """Shear all joints by one matrix with unit diagonal and off-diagonal entries from U(-amplitude, amplitude)."""

    amplitude: float = 1.0

    def __post_init__(self) -> None:
        check_number("Shear", "amplitude", self.amplitude, 0.0, LARGEST, "finite and at least 0")

    def matrices(self, spatial: Words, joints: Words, num_joints: int, num_channels: int) -> Float:
        """Matrices (N, V, C, C) from words (N, 16)."""
        return shear_matrices(symmetric(spatial[:, 4:10]) * np.float32(self.amplitude), num_joints, num_channels)


@TRANSFORMS.register("rotation")
@dataclass(frozen=True)
class Rotation(SpatialTransform):
    """Turn the whole clip by random angles about x, then y, then z; with two channels about z alone.

    For row vectors the matrix is (X Y) Z with

        X = [[1, 0, 0], [0, cos a, -sin a], [0, sin a, cos a]]
        Y = [[cos b, 0, sin b], [0, 1, 0], [-sin b, 0, cos b]]
        Z = [[cos c, -sin c, 0], [sin c, cos c, 0], [0, 0, 1]]

    and angles a, b, c from U(-angle, angle), each with its own bound. Sines and cosines are computed in float64 from
    the float32 angle and rounded to float32.

    Attributes:
        angle: Largest angle in radians, one for all axes or one for each of x, y, z.
        probability: Probability that a clip is turned.
    Source: random rotation of CTR-GCN's feeder, as in STTFormer and MAMP: their R = Rz Ry Rx for column vectors has
        +sin above the diagonal for x and z, and X, Y, Z are the transposes of its factors. Their default is 0.3.
    """

    angle: float | tuple[float, float, float] = 0.3
    probability: float = 1.0

    def __post_init__(self) -> None:
        angles: Any = self.angle
        if isinstance(angles, tuple) and len(angles) != 3:
            raise ValueError(f"Rotation: angle must be one number or three, got {angles!r}. Give one for x, y and z.")
        for value in angles if isinstance(angles, tuple) else (angles,):
            check_number("Rotation", "angle", value, 0.0, LARGEST, "finite and at least 0 radians")
        check_share("Rotation", "probability", self.probability)

    @property
    def angles(self) -> tuple[float, float, float]:
        """Largest angle about x, y and z, radians, (3,)."""
        return self.angle if isinstance(self.angle, tuple) else (self.angle, self.angle, self.angle)

    def matrices(self, spatial: Words, joints: Words, num_joints: int, num_channels: int) -> Float:
        """Matrices (N, V, C, C) from words (N, 16)."""
        drawn = np.array(self.angles, np.float32) * symmetric(spatial[:, 4:7])
        sines, cosines = (f(drawn.astype(np.float64)).astype(np.float32) for f in (np.sin, np.cos))
        turns = []
        # rows and columns that turn: the sine stands below the diagonal for x and z, above it for y
        for axis, (first, second) in enumerate(((1, 2), (2, 0), (0, 1))):
            turn = np.broadcast_to(np.eye(3, dtype=np.float32), (len(drawn), 3, 3)).copy()
            turn[:, first, first] = turn[:, second, second] = cosines[:, axis]
            turn[:, first, second], turn[:, second, first] = -sines[:, axis], sines[:, axis]
            turns.append(turn)
        if num_channels == 2:
            turned = turns[2][:, :2, :2]
        else:
            turned = compose_matrices(compose_matrices(turns[0], turns[1]), turns[2])
        return _chosen(spatial, self.probability, turned, num_joints)


@TRANSFORMS.register("scaling")
@dataclass(frozen=True)
class Scaling(SpatialTransform):
    """Multiply all positions by a random factor from U(low, high): low + (high - low) u.

    Attributes:
        low: Least factor.
        high: Largest factor.
        per_axis: Draw one factor for each channel instead of one for all.
        probability: Probability that a clip is scaled.
    Source: random scale of ST-GCN's random_move, there one of 0.9, 1.0 and 1.1, changing over time.
    """

    low: float = 0.9
    high: float = 1.1
    per_axis: bool = False
    probability: float = 1.0

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            check_number("Scaling", name, getattr(self, name), -LARGEST, LARGEST, "finite")
        if self.low > self.high:
            raise ValueError(f"Scaling: low must be at most high, got {self.low} and {self.high}. Exchange them.")
        check_flag("Scaling", "per_axis", self.per_axis)
        check_share("Scaling", "probability", self.probability)

    def matrices(self, spatial: Words, joints: Words, num_joints: int, num_channels: int) -> Float:
        """Matrices (N, V, C, C) from words (N, 16)."""
        low, high = np.float32(self.low), np.float32(self.high)
        factors = low + (high - low) * uniform(spatial[:, 4 : 4 + (num_channels if self.per_axis else 1)])
        scaled = np.zeros((len(spatial), num_channels, num_channels), np.float32)
        scaled[:, range(num_channels), range(num_channels)] = factors
        return _chosen(spatial, self.probability, scaled, num_joints)


@TRANSFORMS.register("joint-mask")
@dataclass(frozen=True)
class JointMask(SpatialTransform):
    """Set a fraction of the joints to zero for the whole clip and all bodies.

    Attributes:
        fraction: Share of the joints chosen; floor(fraction V + 1/2) of them.
        probability: Probability that a clip is masked.
    Source: joint mask of AS-CAL (Rao et al., 2021), there for a part of the frames.
    """

    fraction: float = 0.1
    probability: float = 1.0

    def __post_init__(self) -> None:
        check_share("JointMask", "fraction", self.fraction)
        check_share("JointMask", "probability", self.probability)

    def num_joint_words(self, num_joints: int) -> int:
        """Joints chosen of V: floor(fraction V + 1/2)."""
        return share_of(self.fraction, num_joints)

    def matrices(self, spatial: Words, joints: Words, num_joints: int, num_channels: int) -> Float:
        """Matrices (N, V, C, C) from words (N, 16) and (N, k)."""
        chosen = distinct(joints[:, : self.num_joint_words(num_joints)], num_joints)
        kept = np.broadcast_to(np.eye(3, dtype=np.float32), (len(spatial), 3, 3))
        return corrupt_matrices(chosen, coin(spatial, self.probability), kept, num_joints, num_channels)


@TRANSFORMS.register("one-of")
@dataclass(frozen=True)
class OneOf(SpatialTransform):
    """Choose one of several linear transforms for each sample, with equal odds."""

    options: tuple[SpatialTransform, ...] = ()

    def __post_init__(self) -> None:
        options: Any = self.options
        if not (isinstance(options, tuple) and options) or any(
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
