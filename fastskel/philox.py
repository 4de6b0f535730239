"""Addressed random draws: Philox4x32-10 in NumPy, with a native fast path of the same bits.

Every draw of training is a pure function of its address (seed, sample, step, view, use, running number), so it does not
depend on threads, ranks, batch composition or restarts. Source: Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011.
"""

from __future__ import annotations

import enum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastskel import _native

__all__ = [
    "Use", "below", "distinct", "integer_weights", "normal", "permutation", "philox4x32", "symmetric", "uniform",
    "weighted_order", "words", "words_numpy",
]

WORD_LIMIT = 2**32
HALF_LIMIT = 2**16
SEED_LIMIT = 2**64

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
NUM_ROUNDS = 10


class Use(enum.IntEnum):
    """What a draw is for: part of its address, so numbers are never reused or renumbered."""

    SHUFFLE = 0
    CROP = 1
    SPATIAL = 2
    JOINTS = 3
    DROP_PATH = 4
    SYNTHETIC = 5
    SUBSET = 6
    MASK = 7
    NOISE = 8
    FRAMES = 9
    WEIGHTED = 10
    EPISODE = 11
    CENTRE = 12


def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Encrypt counters into random words, ten rounds.

    Args:
        counter: 128-bit counters as four words, (..., 4), lowest first.
        key: 64-bit key as two words, (2,), lowest first.
    Returns:
        Random words, (..., 4).
    """
    shift, mask = np.uint64(32), np.uint64(WORD_LIMIT - 1)
    wide = np.asarray(counter).astype(np.uint64)
    c0, c1, c2, c3 = wide[..., 0], wide[..., 1], wide[..., 2], wide[..., 3]
    key0, key1 = int(key[0]), int(key[1])
    for _ in range(NUM_ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (product1 >> shift) ^ c1 ^ np.uint64(key0)
        c2 = (product0 >> shift) ^ c3 ^ np.uint64(key1)
        c1, c3 = product1 & mask, product0 & mask
        key0, key1 = (key0 + WEYL[0]) % WORD_LIMIT, (key1 + WEYL[1]) % WORD_LIMIT
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def _integers(argument: str, values: ArrayLike, limit: int) -> NDArray[np.uint32]:
    array = np.asarray(values)
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, np.uint32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"philox.words: {argument} must be integers (N,), got {array.dtype} {array.shape}. "
            "Give one number per sample."
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= limit:
        raise ValueError(
            f"philox.words: {argument} must be in [0, {limit}), got {low} to {high}. Number samples and views from 0."
        )
    return np.ascontiguousarray(array, dtype=np.uint32)


def _scalar(argument: str, value: int, limit: int) -> int:
    if not 0 <= value < limit:
        raise ValueError(f"philox.words: {argument} must be in [0, {limit}), got {value}. Choose another {argument}.")
    return int(value)


def _address(
    seed: int, index: ArrayLike, step: int, view: int | ArrayLike, use: int, num: int
) -> tuple[int, NDArray[np.uint32], int, NDArray[np.uint32], int, int]:
    samples = _integers("index", index, WORD_LIMIT)
    if np.ndim(view) == 0:
        view = np.broadcast_to(np.asarray(view), samples.shape)
    views = _integers("view", view, HALF_LIMIT)
    if views.shape != samples.shape:
        raise ValueError(
            f"philox.words: view must be one number or of index's shape {samples.shape}, got {views.shape}. "
            "Give one view number per sample."
        )
    return (
        _scalar("seed", seed, SEED_LIMIT),
        samples,
        _scalar("step", step, WORD_LIMIT),
        views,
        _scalar("use", use, HALF_LIMIT),
        _scalar("num", num, WORD_LIMIT),
    )


def words(
    seed: int, index: ArrayLike, step: int, view: int | ArrayLike, use: int, num: int, *, first: int = 0
) -> NDArray[np.uint32]:
    """Draw random words for samples, each a function of its address alone.

    Word w of sample i is word w % 4 of the Philox block with counter (index_i, step, view_i | use << 16, w // 4) and
    the seed as key.

    Args:
        seed: 64-bit key.
        index: Global sample index, (N,), below 2**32.
        step: Epoch for views, optimiser step for the model, below 2**32.
        view: View number, one for all or (N,), below 2**16.
        use: What the draw is for, a member of `Use`, below 2**16.
        num: Words per sample.
        first: Number of the first word, a multiple of 4 below 2**32.
    Returns:
        Words first .. first + num - 1, (N, num).
    Raises:
        ValueError: If a number leaves its range or `view` has another shape than `index`.
    """
    if first:
        return words_numpy(seed, index, step, view, use, num, first=first)
    return _native.philox_words(*_address(seed, index, step, view, use, num))


def words_numpy(
    seed: int, index: ArrayLike, step: int, view: int | ArrayLike, use: int, num: int, *, first: int = 0
) -> NDArray[np.uint32]:
    """Draw the words (N, num) of `words` in NumPy: the definition that the native routine equals bit for bit.

    Raises:
        ValueError: If a number leaves its range or `view` has another shape than `index` (N,).
    """
    seed, samples, step, views, use, num = _address(seed, index, step, view, use, num)
    if first % 4:
        raise ValueError(f"philox.words: first must be a multiple of 4, got {first}. Begin with a whole block.")
    begin, num_blocks = _scalar("first", first, WORD_LIMIT) // 4, -(-num // 4)
    counter = np.empty((len(samples), num_blocks, 4), np.uint32)
    counter[..., 0] = samples[:, None]
    counter[..., 1] = step
    counter[..., 2] = (views | np.uint32(use << 16))[:, None]
    counter[..., 3] = np.arange(begin, begin + num_blocks, dtype=np.uint32)
    key = np.array([seed % WORD_LIMIT, seed // WORD_LIMIT], np.uint32)
    return np.ascontiguousarray(philox4x32(counter, key).reshape(len(samples), num_blocks * 4)[:, :num])


def uniform(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Turn words (...,) into floats (...,) in [0, 1): the upper 24 bits, which float32 holds exactly."""
    return (words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def symmetric(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Turn words (...,) into floats (...,) in [-1, 1): 2 uniform - 1, exact."""
    return uniform(words) * np.float32(2) - np.float32(1)


def normal(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Turn pairs of words into pairs of independent standard normal numbers (Box and Muller, 1958).

    With u1 = 1 - uniform(first word) and u2 = uniform(second word), r = sqrt(-2 ln u1), the pair is
    r cos(2 pi u2), r sin(2 pi u2); computed in float64 and rounded.

    Args:
        words: Random words, (..., 2K).
    Returns:
        Normal numbers, (..., 2K), float32.
    """
    drawn = uniform(words).astype(np.float64)
    radius = np.sqrt(-2 * np.log(1 - drawn[..., ::2]))
    angle = 2 * np.pi * drawn[..., 1::2]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return pairs.reshape(words.shape).astype(np.float32)


def below(words: NDArray[np.uint32], n: int | ArrayLike) -> NDArray[np.int64]:
    """Turn words into integers below a bound, by the upper half of a 64-bit product.

    Args:
        words: Random words, (...,).
        n: Exclusive bound, one or broadcast against (...,), at least 1 and below 2**32.
    Returns:
        Integers in [0, n), (...,).
    Raises:
        ValueError: If a bound leaves its range.
    """
    bound = np.asarray(n)
    if bound.dtype.kind not in "iu" or (bound.size and (int(bound.min()) < 1 or int(bound.max()) >= WORD_LIMIT)):
        raise ValueError(f"philox.below: n must be integers in [1, 2**32), got {bound}. Draw below a positive bound.")
    wide = np.asarray(words).astype(np.uint64) * bound.astype(np.uint64)
    return (wide >> np.uint64(32)).astype(np.int64)


def distinct(words: NDArray[np.uint32], n: int) -> NDArray[np.int64]:
    """Choose distinct members of range(n) by a partial Fisher-Yates shuffle, one word for each.

    Args:
        words: Random words, (N, k), k at most n.
        n: Numbers to choose from.
    Returns:
        Distinct integers in [0, n), (N, k), in drawn order.
    Raises:
        ValueError: If more numbers are asked for than there are.
    """
    rows, count = words.shape
    if count > n:
        raise ValueError(
            f"philox.distinct: words must have at most n = {n} columns, got {count}. Choose fewer numbers."
        )
    pool = np.tile(np.arange(n, dtype=np.int64), (rows, 1))
    row = np.arange(rows)
    for j in range(count):
        other = j + below(words[:, j], n - j)
        chosen = pool[row, other]
        pool[row, other] = pool[:, j]
        pool[:, j] = chosen
    return pool[:, :count].copy()


def permutation(seed: int, epoch: int, n: int, use: int = Use.SHUFFLE) -> NDArray[np.int64]:
    """Shuffle range(n) for an epoch and a use: the stable order of 64-bit keys, word 0 the lower half, word 1 the upper.

    Returns:
        Permutation of range(n), (n,).
    Raises:
        ValueError: If the seed, the epoch or n leaves its range.
    """
    keys = words(seed, np.arange(n, dtype=np.int64), epoch, 0, use, 2).astype(np.uint64)
    return np.argsort(keys[:, 0] | keys[:, 1] << np.uint64(32), kind="stable").astype(np.int64)


def integer_weights(weights: ArrayLike) -> NDArray[np.uint64]:
    """Turn weights into whole numbers of at most 2^32, so that draws do not depend on rounding.

    Args:
        weights: Finite numbers of at least 0, not all zero, (n,).
    Returns:
        round(w / max(w) * 2^32), at least 1 where w > 0, (n,).
    Raises:
        ValueError: If the weights are not as described.
    """
    values = np.asarray(weights, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or values.min() < 0 or values.max() == 0:
        shown = f"{values.shape} from {values.min()} to {values.max()}" if values.size else f"{values.shape}"
        raise ValueError(
            f"philox.integer_weights: weights must be finite, at least 0 and not all zero, (n,), got {shown}. "
            "Give a weight per sample."
        )
    scaled = np.rint(values / values.max() * WORD_LIMIT)
    return np.where(values > 0, np.maximum(scaled, 1), 0).astype(np.uint64)


def weighted_order(seed: int, epoch: int, weights: NDArray[np.uint64], num: int) -> NDArray[np.int64]:
    """Draw positions with replacement, each with the odds of its weight: what `_native.epoch_order` equals bit for bit.

    The 64-bit key of draw i, word 0 the lower half, times the sum of the weights has 128 bits; the position is the
    first whose cumulative weight exceeds their upper half.

    Args:
        seed: 64-bit key.
        epoch: Epoch of the draws, below 2**32.
        weights: Whole numbers, (n,), of a sum in 1 .. 2**63 - 1.
        num: Number of draws, below 2**32.
    Returns:
        Positions in range(n), (num,).
    Raises:
        ValueError: If a number leaves its range.
    """
    total = sum(np.asarray(weights).tolist())
    if not 0 < total < 2**63:
        raise ValueError(
            f"philox.weighted_order: weights must be of a sum in 1 .. 2**63 - 1, got {total}. Scale them."
        )
    shift, mask = np.uint64(32), np.uint64(WORD_LIMIT - 1)
    drawn = words(seed, np.arange(num, dtype=np.int64), epoch, 0, Use.WEIGHTED, 2).astype(np.uint64)
    low, high = drawn[:, 0], drawn[:, 1]
    total_low, total_high = np.uint64(total % WORD_LIMIT), np.uint64(total // WORD_LIMIT)
    # schoolbook product of halves; each sum fits 64 bits
    middle = high * total_low + (low * total_low >> shift)
    other = low * total_high + (middle & mask)
    target = high * total_high + (middle >> shift) + (other >> shift)
    positions: NDArray[np.int64] = np.searchsorted(np.cumsum(weights, dtype=np.uint64), target, side="right")
    return positions.astype(np.int64)
