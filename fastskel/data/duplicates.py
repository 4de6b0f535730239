"""Clips that repeat others: equal bytes, or a stretch of equal frames at a fixed distance in time.

A frame is known by one 64-bit number, computed after centring and rounding to about a thousandth of a body
(`clip_checks`). Two clips share a stretch if several of these numbers agree at one offset; single frames whose rounding
falls the other way do not matter. Found: copies moved in space, cut shorter, or overlapping in time. Not found: copies
that are turned, mirrored, scaled, resampled, filtered, noisy, or have their bodies in another order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["SharedFrames", "equal_clips", "fingerprint", "shared_frames"]

# a frame is compared with the next clips that hold it too: a pose that thousands share must not cost their square
_NEIGHBOURS = 32


@dataclass(frozen=True)
class SharedFrames:
    """Two clips that share frames.

    Attributes:
        first: Clip with the lower index.
        second: The other clip.
        start: First shared frame of the second clip.
        end: Last shared frame of the second clip, exclusive.
        offset: Frame of the first clip minus that of the second.
        count: Different shared frames.
    """

    first: int
    second: int
    start: int
    end: int
    offset: int
    count: int


_NONE = SharedFrames(-1, -1, 0, 0, 0, 0)


def fingerprint(frames: NDArray[np.float32]) -> bytes:
    """Digest one clip, (T, M, V, C): equal for equal bytes."""
    return hashlib.blake2b(np.ascontiguousarray(frames).data, digest_size=16).digest()


def equal_clips(fingerprints: Sequence[bytes]) -> list[list[int]]:
    """Return the groups of two and more clips whose fingerprints, (n,), are equal; clips ascend in each."""
    groups: dict[bytes, list[int]] = {}
    for clip, digest in enumerate(fingerprints):
        groups.setdefault(digest, []).append(clip)
    return [group for group in groups.values() if len(group) > 1]


def shared_frames(
    hashes: NDArray[np.uint64], offsets: NDArray[np.int64], skip: NDArray[np.bool_], least: int
) -> list[SharedFrames]:
    """Find pairs of clips that share a stretch of frames.

    Args:
        hashes: One number per frame, (sum T,), 0 for frames that do not count.
        offsets: First frame of each clip and the end, (n + 1,).
        skip: Clips to leave out, (n,): of equal clips, all but one.
        least: Least number of different frames at one offset; a clip with fewer must share all that it has.
    Returns:
        One entry per pair, at the offset with most shared frames, sorted by clips.
    """
    clips = np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))
    kept = np.flatnonzero((hashes != 0) & ~skip[clips])
    # by number, then clip, then frame; a clip counts once per number
    kept = kept[np.argsort(hashes[kept], kind="stable")]
    first = np.ones(len(kept), bool)
    first[1:] = (hashes[kept[1:]] != hashes[kept[:-1]]) | (clips[kept[1:]] != clips[kept[:-1]])
    kept = kept[first]
    different = np.bincount(clips[kept], minlength=len(offsets) - 1)
    # frames that no other clip holds need no more attention
    alone = np.ones(len(kept), bool)
    equal = hashes[kept[1:]] == hashes[kept[:-1]]
    alone[1:] &= ~equal
    alone[:-1] &= ~equal
    kept = kept[~alone]
    parts = [_matches(hashes, offsets, clips, kept, distance) for distance in range(1, min(_NEIGHBOURS, len(kept)))]
    rows = np.concatenate(parts) if parts else np.zeros((0, 6), np.int64)
    rows = _merged(rows)
    best: dict[tuple[int, int], SharedFrames] = {}
    for a, b, offset, start, end, count in rows.tolist():
        if count >= min(least, different[a], different[b]) and count > best.get((a, b), _NONE).count:
            best[a, b] = SharedFrames(a, b, start, end, offset, count)
    return [best[pair] for pair in sorted(best)]


def _matches(
    hashes: NDArray[np.uint64],
    offsets: NDArray[np.int64],
    clips: NDArray[np.int32],
    kept: NDArray[np.int64],
    distance: int,
) -> NDArray[np.int64]:
    # entries that hold the same number `distance` places on: rows (first, second, offset, start, end, count)
    left, right = kept[:-distance], kept[distance:]
    equal = hashes[left] == hashes[right]
    left, right = left[equal], right[equal]
    a, b = clips[left].astype(np.int64), clips[right].astype(np.int64)
    frame_a, frame_b = left - offsets[a], right - offsets[b]
    return _merged(np.stack([a, b, frame_a - frame_b, frame_b, frame_b + 1, np.ones_like(a)], axis=1))


def _merged(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    # one row per pair and offset
    if len(rows) == 0:
        return rows
    rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
    starts = np.flatnonzero(np.concatenate([[True], (rows[1:, :3] != rows[:-1, :3]).any(axis=1)]))
    merged = rows[starts]
    merged[:, 3] = np.minimum.reduceat(rows[:, 3], starts)
    merged[:, 4] = np.maximum.reduceat(rows[:, 4], starts)
    merged[:, 5] = np.add.reduceat(rows[:, 5], starts)
    return merged
