"""Checks that look at one clip alone: values, frames, bodies, bones and speeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastskel.data.findings import counted, frame_ranges
from fastskel.data.packed import PackedDataset

__all__ = ["CheckThresholds", "ClipChecker", "ClipMeasures", "RawFinding"]

Float = NDArray[np.float32]
Bool = NDArray[np.bool_]
# body sizes that a person can have, in metres: from a crouching child to an adult with raised arms, and some noise
_BODY_METRES = (0.3, 4.0)
# a person of fewer pixels is one in coordinates between 0 and 1
_BODY_PIXELS = 8.0
_PER_METRE = {
    **dict.fromkeys(("metres", "meters", "m"), 1.0),
    **dict.fromkeys(("centimetres", "centimeters", "cm"), 100.0),
    **dict.fromkeys(("millimetres", "millimeters", "mm"), 1000.0),
}
_NOT_SPACE = ("score", "confidence")
# coordinates beyond this are damage: their squares leave float32
_LARGEST = 1e18
# a body smaller than this in any unit is none
_SMALLEST = 1e-12
# bones shorter than this part of the body are mostly noise
_LONG_BONE = 0.1
# a quantile of fewer frames says nothing
_MIN_FRAMES = 8
# part of the dataset's body size that two copies of a frame may differ by; float32 coordinates are much finer
_GRID = 1 / 1024


@dataclass(frozen=True)
class CheckThresholds:
    """From where on something is reported. The body size is the median diagonal of a clip's bodies.

    Attributes:
        frozen_frames: Least length of a run of identical frames of a body.
        bone_spread: Least relative spread of bone lengths within a clip: from the 10th to the 90th percentile over
            frames, divided by the median; the median of this over the bones longer than a tenth of the body size.
        subject_ratio: Least factor by which a clip's bones are longer or shorter than in the subject's other clips.
        teleport_speed: Least speed of a joint, in body sizes per frame.
        teleport_ratio: Least speed of a joint in multiples of the 95th percentile of the clip's own speeds.
        swap_distance: Least mean distance of joints that swap bodies or sides, in body sizes.
        swap_gain: Largest ratio of the distances with and without the exchange undone.
        upside_down: Least height of the feet above the head, in body sizes, median over the frames.
        unit_ratio: Where the unit is no known one: least factor between a clip's body size and that of the data set.
        shared_frames: Least number of frames that near duplicates share; shorter clips must share all they have.
        imbalance: Least ratio of the numbers of clips of the most and the least frequent class.
    """

    frozen_frames: int = 5
    bone_spread: float = 0.5
    subject_ratio: float = 1.3
    teleport_speed: float = 0.5
    teleport_ratio: float = 6.0
    swap_distance: float = 0.05
    swap_gain: float = 0.5
    upside_down: float = 0.3
    unit_ratio: float = 5.0
    shared_frames: int = 8
    imbalance: float = 10.0

    def __post_init__(self) -> None:
        least = {"frozen_frames": 2, "shared_frames": 1, "subject_ratio": 1, "unit_ratio": 1, "imbalance": 1}
        for name, value in vars(self).items():
            low = least.get(name, 0)
            whole = name in ("frozen_frames", "shared_frames")
            kinds: tuple[type, ...] = (int, np.integer) if whole else (int, float, np.integer, np.floating)
            fits = isinstance(value, kinds) and not isinstance(value, bool)
            if not fits or not low <= value < np.inf:
                kind = "a whole number" if whole else "a finite number"
                raise ValueError(f"CheckThresholds: {name} must be {kind} of at least {low}, got {value!r}. Choose another.")


@dataclass(frozen=True)
class RawFinding:
    """A finding of a kind in some frames of the clip at hand."""

    kind: str
    frames: tuple[tuple[int, int], ...]
    value: float
    detail: str

    @classmethod
    def counting(cls, kind: str, mask: Bool, words: str) -> RawFinding:
        """Report the frames of a mask, (T,); `words` say what they are, with "{}" for how many."""
        count = int(mask.sum())
        return cls(kind, frame_ranges(mask), count, words.format(counted(count, "frame")))


@dataclass(frozen=True)
class ClipMeasures:
    """What the checks across clips need of one clip.

    Attributes:
        findings: What is wrong with it.
        size: Body size, NaN where no body is known.
        upward: From feet to head in body sizes, (C,) of the space's axes, median over frames; NaN where not known.
        bones: Median bone lengths of the first body, (E,), NaN where not known.
        hashes: One number per frame, (T,), the same for frames that differ by a translation; 0 for empty frames.
    """

    findings: list[RawFinding]
    size: float
    upward: NDArray[np.float64]
    bones: NDArray[np.float64]
    hashes: NDArray[np.uint64]


class ClipChecker:
    """Checks the clips, (T, M, V, C) each, of one data set."""

    def __init__(self, dataset: PackedDataset, thresholds: CheckThresholds) -> None:
        topology, meta = dataset.topology, dataset.meta
        self.thresholds = thresholds
        self.space = [c for c, name in enumerate(meta["channels"]) if name not in _NOT_SPACE][:3]
        edges = topology.edges("plain" if "plain" in topology.bones else None)
        self.bones = tuple(zip(*edges, strict=True)) or ((), ())
        self.bones_are_rigid = len(self.space) == 3
        # centring leaves the centre joint at the origin, where it looks absent
        self.centre = topology.centre if meta["normalisation"] != "none" else None
        self.joints = topology.joints
        self.head = list(topology.parts["head"])
        self.feet = [j for j, name in enumerate(topology.joints) if name.endswith(("_foot", "_ankle"))]
        self.mirror = np.array(topology.mirror)
        self.sides = np.flatnonzero(self.mirror != np.arange(len(self.mirror)))
        self.units = str(meta["units"]).lower()
        axis = "xyz".index(str(meta["up_axis"])[-1])
        self.up = np.zeros(len(self.space))
        self.up[axis : axis + 1] = -1.0 if str(meta["up_axis"]).startswith("-") else 1.0
        # odd multipliers of a linear hash modulo 2^64, one per coordinate of a frame
        self.multipliers = _splitmix(int(np.prod(dataset.frames.shape[1:])))
        chosen = np.unique(np.linspace(0, len(dataset) - 1, 64).astype(int))
        sizes = [self._size(*self._joints(dataset.clip(int(index)))) for index in chosen]
        known = [size for size in sizes if size > _SMALLEST]
        self.typical_size = float(np.median(known)) if known else 1.0

    def check(self, frames: NDArray[np.float32], num_bodies: int) -> ClipMeasures:
        """Check one clip, (T, M, V, C), said to show `num_bodies` bodies."""
        points, present = self._joints(frames)
        shown = np.asarray(present.any(axis=2))
        used = np.flatnonzero(shown.any(axis=0))
        found: list[RawFinding] = []
        found += self._values(frames, shown)
        nothing = ClipMeasures(
            found,
            np.nan,
            np.full(len(self.space), np.nan),
            np.full(len(self.bones[0]), np.nan),
            np.zeros(len(frames), np.uint64),
        )
        if len(frames) == 1:
            found.append(RawFinding("one-frame", (), 1, "one frame"))
        if len(used) != num_bodies:
            detail = f"num_bodies says {num_bodies}, the frames hold {len(used)}"
            found.append(RawFinding("body-count", (), abs(len(used) - num_bodies), detail))
        if len(used) == 0:
            return nothing
        hashes = self._hashes(points, present)
        found += self._repeats(frames, shown)
        if len(used) < frames.shape[1]:
            points, present, shown = points[:, :, used], present[:, used], shown[:, used]
        size = self._size(points, present)
        if not size > _SMALLEST:
            return ClipMeasures(found, np.nan, nothing.upward, nothing.bones, hashes)
        upward = self._upward(points, present, size)
        bones, spread = self._bone_lengths(points, present, size)
        found += self._scale(size)
        found += self._spread(spread)
        if float(upward @ self.up) < -self.thresholds.upside_down:
            height = -float(upward @ self.up)
            found.append(RawFinding("upside-down", (), height, f"feet {height:.2f} body sizes above the head"))
        if len(frames) > 1:
            found += self._motion(points, present, shown, size)
        return ClipMeasures(found, size, upward, bones, hashes)

    def _joints(self, frames: NDArray[np.float32]) -> tuple[Float, Bool]:
        # coordinates first, (C, T, M, V): each is contiguous
        points = np.ascontiguousarray(np.moveaxis(frames[..., self.space], -1, 0))
        if not _sound(points).all():
            points = np.where(_sound(points).all(axis=0), points, np.float32(0))
        present = np.asarray(points[0] != 0)
        for coordinate in points[1:]:
            present |= coordinate != 0
        if self.centre is not None:
            present[:, :, self.centre] |= present.any(axis=2)
        return points, present

    def _size(self, points: Float, present: Bool) -> float:
        shown = np.asarray(present.any(axis=2))
        if not shown.any():
            return np.nan
        if present.all():
            low, high = points.min(axis=3), points.max(axis=3)
        else:
            low = np.where(present, points, np.inf).min(axis=3)[:, shown]
            high = np.where(present, points, -np.inf).max(axis=3)[:, shown]
        return float(np.median(_norm(high - low)))

    def _values(self, frames: NDArray[np.float32], shown: Bool) -> Iterator[RawFinding]:
        broken = np.asarray(~_sound(frames).all(axis=(1, 2, 3)))
        if broken.any():
            yield RawFinding.counting("non-finite", broken, "{} of NaN or infinity")
        empty = ~shown.any(axis=1) & ~broken
        if empty.all():
            yield RawFinding("empty-clip", ((0, len(frames)),), len(frames), "every frame is zero")
            return
        if empty.any():
            yield RawFinding.counting("zero-frames", empty, "{} of zeros")
        used = shown[:, shown.any(axis=0)]
        gone = np.asarray(~used.all(axis=1)) & ~empty & ~broken
        if gone.any():
            yield RawFinding.counting("body-gap", gone, "a body is absent in {}")

    def _repeats(self, frames: NDArray[np.float32], shown: Bool) -> Iterator[RawFinding]:
        if len(frames) < 2:
            return
        bits = np.ascontiguousarray(frames).view(np.uint32).reshape(*frames.shape[:2], -1).astype(np.uint64)
        bodies = np.einsum("tmk,mk->tm", bits, self.multipliers.reshape(frames.shape[1], -1))
        whole, seen = bodies.sum(axis=1, dtype=np.uint64), shown.any(axis=1)
        frozen = np.zeros(len(frames), bool)
        longest = 0
        for body in np.flatnonzero(shown.any(axis=0)):
            run, length = _runs(bodies[:, body], shown[:, body], self.thresholds.frozen_frames)
            frozen |= run
            longest = max(longest, length)
        if longest:
            yield RawFinding("frozen-frames", frame_ranges(frozen), longest, f"up to {longest} identical frames in a row")
        _, first = np.unique(whole, return_index=True)
        again = np.ones(len(frames), bool)
        again[first] = False
        again &= seen & ~frozen
        if again.any():
            yield RawFinding.counting("repeated-frames", again, "{} seen before in the clip")

    def _hashes(self, points: Float, present: Bool) -> NDArray[np.uint64]:
        shown = np.asarray(present.any(axis=(1, 2)))
        count = np.maximum(present.sum(axis=(1, 2)), 1)
        middle = points.sum(axis=(2, 3), dtype=np.float64) / count
        grid = self.typical_size * _GRID
        cells = np.rint((points - middle[:, :, None, None]) * (present / grid))
        # far beyond any clip: keeps the conversion defined
        cells = np.clip(cells, -(2.0**40), 2.0**40).astype(np.int64).view(np.uint64)
        factors = self.multipliers[: cells[:, 0].size].reshape(len(points), 1, *cells.shape[2:])
        hashes: NDArray[np.uint64] = (cells * factors).sum(axis=(0, 2, 3), dtype=np.uint64)
        # another mixing: sums of small multiples lie in order
        hashes ^= hashes >> np.uint64(29)
        hashes *= np.uint64(0xBF58476D1CE4E5B9)
        hashes |= np.uint64(1)
        hashes[~shown] = 0
        return hashes

    def _upward(self, points: Float, present: Bool, size: float) -> NDArray[np.float64]:
        feet = [joint for joint in self.feet if present[:, 0, joint].any()]
        head = [joint for joint in self.head if present[:, 0, joint].any()]
        if not feet or not head:
            return np.full(len(points), np.nan)
        known = present[:, 0][:, head + feet].all(axis=1)
        if not known.any():
            return np.full(len(points), np.nan)
        body = points[:, known, 0]
        upward: NDArray[np.float64] = np.median(body[..., head].mean(axis=2) - body[..., feet].mean(axis=2), axis=1) / size
        return upward.astype(np.float64)

    def _bone_lengths(self, points: Float, present: Bool, size: float) -> tuple[NDArray[np.float64], float]:
        children, parents = (list(ends) for ends in self.bones)
        if not children:
            return np.zeros(0), np.nan
        # (T, M, E); unknown lengths are NaN, which sorting puts last
        lengths = _norm(points[..., children] - points[..., parents])
        lengths[~(present[..., children] & present[..., parents])] = np.nan
        lengths = np.sort(lengths, axis=0)
        count = np.asarray((~np.isnan(lengths)).sum(axis=0))
        low, median, high = (_rank(lengths, count, quantile) for quantile in (0.1, 0.5, 0.9))
        firm = (median > _LONG_BONE * size) & (count >= _MIN_FRAMES)
        spreads = [np.median(((high - low)[body] / median[body])[firm[body]]) for body in range(len(firm)) if firm[body].any()]
        return median[0].astype(np.float64), float(max(spreads, default=np.nan))

    def _spread(self, spread: float) -> Iterator[RawFinding]:
        if self.bones_are_rigid and spread > self.thresholds.bone_spread:
            yield RawFinding("bone-spread", (), spread, f"bone lengths vary by {100 * spread:.0f} %")

    def _scale(self, size: float) -> Iterator[RawFinding]:
        low, high = _BODY_METRES
        if self.units == "pixels":
            if size < _BODY_PIXELS:
                yield RawFinding("unit-scale", (), size, f"a body of {size:.3g} pixels: are these parts of the picture?")
        elif self.units in _PER_METRE:
            metres = size / _PER_METRE[self.units]
            if not low <= metres <= high:
                names = {1.0: "metres", 100.0: "centimetres", 1000.0: "millimetres"}
                likely = [name for factor, name in names.items() if low <= size / factor <= high]
                guess = f": {' or '.join(likely)}?" if likely else ""
                yield RawFinding("unit-scale", (), size, f"a body of {size:.4g} {self.units}{guess}")
        else:
            ratio = max(size / self.typical_size, self.typical_size / size)
            if ratio > self.thresholds.unit_ratio:
                detail = f"a body of {size:.3g} {self.units}, {self.typical_size:.3g} in other clips"
                yield RawFinding("unit-scale", (), size, detail)

    def _motion(self, points: Float, present: Bool, shown: Bool, size: float) -> Iterator[RawFinding]:
        limits = self.thresholds
        both = present[1:] & present[:-1]
        steps = np.where(both, _norm(points[:, 1:] - points[:, :-1]), np.float32(0))
        explained = np.zeros(both.shape[:2], bool)
        swaps = self._body_swaps(points, present, shown, steps, size)
        if swaps.any():
            explained |= swaps[:, None]
            times = counted(int(swaps.sum()), "time")
            frames = frame_ranges(np.concatenate([[False], swaps]))
            yield RawFinding("swapped-bodies", frames, int(swaps.sum()), f"bodies change slots {times}")
        flips = self._side_swaps(points, present, steps, size) & ~explained
        if flips.any():
            explained |= flips
            times = counted(int(flips.sum()), "time")
            frames = frame_ranges(np.concatenate([[False], flips.any(axis=1)]))
            yield RawFinding("left-right-swap", frames, int(flips.sum()), f"left and right change places {times}")
        speed = steps / np.float32(size)
        if speed.max() > limits.teleport_speed:
            usual = float(np.percentile(speed[both], 95))
            jumps = (speed > max(limits.teleport_speed, limits.teleport_ratio * usual)) & ~explained[..., None]
            if jumps.any():
                frames = frame_ranges(np.concatenate([[False], jumps.any(axis=(1, 2))]))
                fastest = float(speed[jumps].max())
                joints = np.flatnonzero(jumps.any(axis=(0, 1)))
                names = ", ".join(self.joints[joint] for joint in joints[:3]) + (", ..." if len(joints) > 3 else "")
                yield RawFinding("teleport", frames, fastest, f"{names}: {fastest:.2f} body sizes per frame")

    def _side_swaps(self, points: Float, present: Bool, steps: Float, size: float) -> Bool:
        # steps to (T - 1, M): the joints of both sides exchange places
        sides, other = self.sides, self.mirror[self.sides]
        known = present[:-1][..., sides] & present[1:][..., sides] & present[1:][..., other]
        keep = _mean(steps[..., sides], known)
        # fewer than half of the joints can be mirrored by chance
        far = (keep > self.thresholds.swap_distance * size) & (known.sum(axis=-1) * 2 > len(sides))
        if not far.any():
            return np.asarray(far)
        undone = _mean(_norm(points[:, 1:][..., other] - points[:, :-1][..., sides]), known)
        return np.asarray(far & (undone < self.thresholds.swap_gain * keep))

    def _body_swaps(self, points: Float, present: Bool, shown: Bool, steps: Float, size: float) -> Bool:
        num = present.shape[1]
        found = np.zeros(len(present) - 1, bool)
        far = self.thresholds.swap_distance * size
        # most clips move too little for any exchange
        if num < 2 or not (steps.max() > far or (shown[1:] != shown[:-1]).any()):
            return found
        # how far body i is, one frame later, from where body j is then: (M, M, T - 1)
        distance = np.full((num, num, len(found)), np.inf)
        for i in range(num):
            for j in range(num):
                known = present[:-1, i] & present[1:, j]
                step = _mean(_norm(points[:, 1:, j] - points[:, :-1, i]), known)
                distance[i, j] = np.where(known.sum(axis=-1) * 2 > known.shape[-1], step, np.inf)
        for i in range(num):
            for j in range(i + 1, num):
                keep, swap = distance[i, i] + distance[j, j], distance[i, j] + distance[j, i]
                pairs = shown[:, i] & shown[:, j]
                known = pairs[:-1] & pairs[1:] & np.isfinite(keep)
                found |= known & (keep > 2 * far) & (swap < self.thresholds.swap_gain * keep)
                # one body alone goes on in the other slot
                for here, there in ((i, j), (j, i)):
                    moves = shown[:-1, here] & ~shown[1:, here] & ~shown[:-1, there] & shown[1:, there]
                    found |= moves & (distance[here, there] < far)
        return found


def _sound(values: Float) -> Bool:
    # false for NaN and infinity too
    return np.asarray(np.abs(values) < _LARGEST)


def _norm(vectors: Float) -> Float:
    # (C, ...) to (...)
    squares = vectors[0] * vectors[0]
    for coordinate in vectors[1:]:
        squares += coordinate * coordinate
    return np.asarray(np.sqrt(squares))


def _mean(values: Float, known: Bool) -> NDArray[np.float64]:
    total = np.where(known, values, 0).sum(axis=-1, dtype=np.float64)
    mean: NDArray[np.float64] = total / np.maximum(known.sum(axis=-1), 1)
    return mean


def _rank(ascending: Float, count: NDArray[np.int64], quantile: float) -> Float:
    index = (quantile * np.maximum(count - 1, 0)).round().astype(np.int64)
    ranked: Float = np.take_along_axis(ascending, index[None], axis=0)[0]
    return ranked


def _runs(hashes: NDArray[np.uint64], shown: Bool, least: int) -> tuple[Bool, int]:
    # frames in runs of at least `least` equal hashes, and the longest such run
    same = (hashes[1:] == hashes[:-1]) & shown[1:] & shown[:-1]
    mask, longest = np.zeros(len(hashes), bool), 0
    if same.any():
        for start, end in frame_ranges(same):
            if end - start + 1 >= least:
                mask[start : end + 1] = True
                longest = max(longest, end - start + 1)
    return mask, longest


def _splitmix(count: int) -> NDArray[np.uint64]:
    # splitmix64 over 1, 2, ...; constants of its author
    words = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (words ^ (words >> np.uint64(31))) | np.uint64(1)
