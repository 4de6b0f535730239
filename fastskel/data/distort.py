r"""Transforms of a view that are no linear map of single joints: mirror, noise, blur over time, masks of frames and bodies.

Draws. Transform number p of a pipeline is applied where uniform(word 64 p + 1 of use SPATIAL) < probability. Its other
words, with w for a word's number less 64 p in SPATIAL, less 2^24 p in NOISE, less 2^16 p in FRAMES:

    SPATIAL w = 4        GaussianBlur: sigma = low + (high - low) uniform(word)
    SPATIAL w = 4        BodyMask: the body 1 + below(word, M - 1)
    NOISE   w = e        GaussianNoise: element e = ((t M + m) V + v) C + c, in pairs
    FRAMES  w = 0 .. k-1 FrameMask: k distinct frames by the partial Fisher-Yates shuffle

Parameters are rounded to float32 once, every product and sum of coordinates is a float32 operation of its own.

Source: mirror, noise and blur of AimCLR and HiCLR (there noise and blur of AS-CAL, Rao et al., 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastskel.data.parameters import LARGEST, check_flag, check_number, check_share, share_of
from fastskel.data.transforms import TRANSFORMS, ClipAddress, ClipTransform, coin
from fastskel.philox import Use, below, distinct, normal, uniform
from fastskel.skeleton import Topology

__all__ = ["BodyMask", "FrameMask", "GaussianBlur", "GaussianNoise", "Mirror"]

Float = NDArray[np.float32]

# words that one transform of a pipeline owns of use NOISE and of use FRAMES: its largest clip and its longest
NOISE_WORDS = 1 << 24
FRAME_WORDS = 1 << 16
PADDINGS = ("edge", "zero")
# below this a standard deviation in frames is zero as float32 or its square as float64
SMALLEST_SIGMA = 1e-6


@TRANSFORMS.register("mirror")
@dataclass(frozen=True)
class Mirror(ClipTransform):
    """Let left and right joints change places: out[v] = in[mirror[v]], by the skeleton's `mirror`.

    Attributes:
        probability: Probability that a clip is mirrored.
        reflect: Also multiply channel 0 by -1, as a mirror in the plane x = 0 does. Without it only the joints are
            exchanged, as if the body faced the other way.
    Source: spatial flip of AimCLR and HiCLR, which change joints alone (reflect=False).
    """

    probability: float = 0.5
    reflect: bool = True

    def __post_init__(self) -> None:
        check_share("Mirror", "probability", self.probability)
        check_flag("Mirror", "reflect", self.reflect)

    def apply(self, clips: Float, address: ClipAddress, number: int, topology: Topology) -> Float:
        """Mirrored clips, (N, T, M, V, C)."""
        rows = _rows(address, number, self.probability)
        mirrored = clips[rows][..., list(topology.mirror), :]
        if self.reflect:
            mirrored[..., 0] *= np.float32(-1)
        return _replaced(clips, rows, mirrored)


@TRANSFORMS.register("noise")
@dataclass(frozen=True)
class GaussianNoise(ClipTransform):
    """Add std times a standard normal number to every coordinate of every joint that is present (not all zero).

    Attributes:
        std: Standard deviation, in the unit of the coordinates.
        probability: Probability that a clip gets noise.
    Source: Gaussian noise of AimCLR and HiCLR, std 0.01 with odds of one half, which they add to absent joints too.
    """

    std: float = 0.01
    probability: float = 0.5

    def __post_init__(self) -> None:
        check_number("GaussianNoise", "std", self.std, 0.0, LARGEST, "finite and at least 0")
        check_share("GaussianNoise", "probability", self.probability)

    def check(self, shape: tuple[int, int, int, int]) -> None:
        """Raise ValueError if the elements of clips (T, M, V, C) take more words than a transform owns."""
        if np.prod(shape, dtype=np.int64) >= NOISE_WORDS:
            raise ValueError(
                f"GaussianNoise: clips must have T M V C < 2^24, got (T, M, V, C) = {shape}. Make the view shorter."
            )

    def apply(self, clips: Float, address: ClipAddress, number: int, topology: Topology) -> Float:
        """Clips with noise, (N, T, M, V, C)."""
        rows = _rows(address, number, self.probability)
        quiet = clips[rows]
        size = quiet[:1].size if len(rows) else 0
        drawn = address.rows(rows).words(Use.NOISE, size + size % 2, first=NOISE_WORDS * number)
        noise = normal(drawn)[:, :size].reshape(quiet.shape)
        present = quiet.any(axis=-1, keepdims=True)
        return _replaced(clips, rows, np.where(present, quiet + np.float32(self.std) * noise, quiet))


@TRANSFORMS.register("blur")
@dataclass(frozen=True)
class GaussianBlur(ClipTransform):
    """Blur over time: out[t] = sum_j w_j in[t + j - taps // 2], j ascending, w_j = exp(-(j - taps // 2)^2 / (2 sigma^2)).

    Sigma comes from U(low, high). The weights are computed in float64, divided by their sum (ascending) if `normalise`,
    and rounded to float32. An absent joint is zero here like any other value, so it can become non-zero.

    Attributes:
        low: Least sigma, frames.
        high: Largest sigma, frames.
        taps: Frames that are summed, odd.
        probability: Probability that a clip is blurred.
        normalise: Make the weights sum to one.
        padding: What lies beyond the ends: "edge" repeats the end frames, "zero" is zeros, which are summed too.
    Source: Gaussian blur of AimCLR and HiCLR, whose code is the default otherwise but normalise=False, padding="zero".
    """

    low: float = 0.1
    high: float = 2.0
    taps: int = 15
    probability: float = 0.5
    normalise: bool = True
    padding: str = "edge"

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            value, contract = getattr(self, name), f"finite and at least {SMALLEST_SIGMA} frames"
            check_number("GaussianBlur", name, value, SMALLEST_SIGMA, LARGEST, contract)
        if self.low > self.high:
            raise ValueError(f"GaussianBlur: low must be at most high, got {self.low} and {self.high}. Exchange them.")
        if isinstance(self.taps, bool) or not isinstance(self.taps, int) or self.taps < 1 or self.taps % 2 == 0:
            raise ValueError(f"GaussianBlur: taps must be an odd number from 1, got {self.taps!r}. Give one.")
        check_share("GaussianBlur", "probability", self.probability)
        check_flag("GaussianBlur", "normalise", self.normalise)
        if self.padding not in PADDINGS:
            names = ", ".join(PADDINGS)
            raise ValueError(f"GaussianBlur: padding must be one of {names}, got {self.padding!r}. Choose one.")

    def apply(self, clips: Float, address: ClipAddress, number: int, topology: Topology) -> Float:
        """Blurred clips, (N, T, M, V, C)."""
        rows = _rows(address, number, self.probability)
        low, high = np.float32(self.low), np.float32(self.high)
        weights = self.weights(low + (high - low) * uniform(address.spatial(number)[rows, 4]))
        half, frames = self.taps // 2, clips.shape[1]
        around = [(0, 0), (half, half), *[(0, 0)] * (clips.ndim - 2)]
        padded = np.pad(clips[rows], around, mode="edge" if self.padding == "edge" else "constant")
        weights = weights[..., None, None, None, None]
        blurred = weights[:, 0] * padded[:, :frames]
        for tap in range(1, self.taps):
            blurred = blurred + weights[:, tap] * padded[:, tap : tap + frames]
        return _replaced(clips, rows, blurred)

    def weights(self, sigma: Float) -> Float:
        """Weights of the taps K = taps, (N, K), for each sigma, (N,), in frames."""
        offsets = np.arange(self.taps, dtype=np.float64) - self.taps // 2
        wide = sigma.astype(np.float64)[:, None]
        weights = np.exp(-(offsets * offsets) / (2 * (wide * wide)))
        if self.normalise:
            # one at a time: the sum of an array adds in an order of its own
            total = np.zeros(len(sigma))
            for tap in range(self.taps):
                total = total + weights[:, tap]
            weights /= total[:, None]
        return weights.astype(np.float32)


@TRANSFORMS.register("frame-mask")
@dataclass(frozen=True)
class FrameMask(ClipTransform):
    """Set a fraction of the frames to zero.

    Attributes:
        fraction: Share of the frames chosen; floor(fraction T + 1/2) of them.
        probability: Probability that a clip is masked.
    Source: masked frames of masked skeleton modelling.
    """

    fraction: float = 0.1
    probability: float = 1.0

    def __post_init__(self) -> None:
        check_share("FrameMask", "fraction", self.fraction)
        check_share("FrameMask", "probability", self.probability)

    def check(self, shape: tuple[int, int, int, int]) -> None:
        """Raise ValueError if the frames of clips (T, M, V, C) take more words than a transform owns."""
        if shape[0] > FRAME_WORDS:
            raise ValueError(f"FrameMask: clips must have at most 65536 frames, got {shape[0]}. Make the view shorter.")

    def num_masked(self, num_frames: int) -> int:
        """Frames chosen of T, a scalar: floor(fraction T + 1/2)."""
        return share_of(self.fraction, num_frames)

    def apply(self, clips: Float, address: ClipAddress, number: int, topology: Topology) -> Float:
        """Masked clips, (N, T, M, V, C)."""
        rows, frames = _rows(address, number, self.probability), clips.shape[1]
        drawn = address.rows(rows).words(Use.FRAMES, self.num_masked(frames), first=FRAME_WORDS * number)
        masked = clips[rows]
        masked[np.arange(len(rows))[:, None], distinct(drawn, frames)] = 0
        return _replaced(clips, rows, masked)


@TRANSFORMS.register("body-mask")
@dataclass(frozen=True)
class BodyMask(ClipTransform):
    """Set one body other than the first to zero; nothing where there is only one.

    Attributes:
        probability: Probability that a clip loses a body.
    """

    probability: float = 0.5

    def __post_init__(self) -> None:
        check_share("BodyMask", "probability", self.probability)

    def apply(self, clips: Float, address: ClipAddress, number: int, topology: Topology) -> Float:
        """Clips, (N, T, M, V, C), with at most one body less."""
        others = clips.shape[2] - 1
        if others == 0:
            return clips
        rows = _rows(address, number, self.probability)
        masked = clips[rows]
        masked[np.arange(len(rows)), :, 1 + below(address.spatial(number)[rows, 4], others)] = 0
        return _replaced(clips, rows, masked)


def _rows(address: ClipAddress, number: int, probability: float) -> NDArray[np.int64]:
    return np.flatnonzero(coin(address.spatial(number), probability))


def _replaced(clips: Float, rows: NDArray[np.int64], values: Float) -> Float:
    # a new array: what a caller holds never changes
    out = clips.copy()
    out[rows] = values
    return out
