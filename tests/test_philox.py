"""Addressed draws: known answers, native against NumPy, conversions, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastskel import _native, philox
from fastskel.philox import Use

# known-answer vectors published with Random123 for philox4x32, ten rounds: counter, key, words
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def hexadecimal(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], np.uint32)


@pytest.mark.parametrize("counter, key, expected", KNOWN, ids=["zeros", "ones", "pi"])
def test_known_answers(counter: str, key: str, expected: str) -> None:
    assert np.array_equal(philox.philox4x32(hexadecimal(counter), hexadecimal(key)), hexadecimal(expected))


@pytest.mark.parametrize("counter, key, expected", [KNOWN[0], KNOWN[2]], ids=["zeros", "pi"])
@pytest.mark.parametrize("draw", [philox.words, philox.words_numpy], ids=["native", "numpy"])
def test_known_answers_by_address(draw, counter: str, key: str, expected: str) -> None:
    (index, step, purpose, number), (low, high) = hexadecimal(counter).tolist(), hexadecimal(key).tolist()
    # the running number of a block counts from zero: reach `number` only where it is small
    if number:
        number = 0
        expected = " ".join(
            f"{w:08x}" for w in philox.philox4x32(np.array([index, step, purpose, 0], np.uint32), hexadecimal(key))
        )
    words = draw(low | high << 32, [index], step, purpose & 0xFFFF, purpose >> 16, 4 * number + 4)
    assert np.array_equal(words[0, -4:], hexadecimal(expected))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    index=st.lists(st.integers(0, 2**32 - 1), max_size=6),
    step=st.integers(0, 2**32 - 1),
    view=st.integers(0, 2**16 - 1),
    use=st.integers(0, 2**16 - 1),
    num=st.integers(0, 11),
)
def test_native_equals_numpy(seed: int, index: list[int], step: int, view: int, use: int, num: int) -> None:
    native = philox.words(seed, index, step, view, use, num)
    expected = philox.words_numpy(seed, index, step, view, use, num)
    assert native.dtype == expected.dtype == np.uint32
    assert native.shape == expected.shape == (len(index), num)
    assert np.array_equal(native, expected)


def test_each_part_of_the_address_matters() -> None:
    base = dict(seed=3, index=[5], step=7, view=1, use=2, num=4)
    changed = [{}, dict(seed=3 + 2**32), dict(index=[6]), dict(step=8), dict(view=0), dict(use=3)]
    assert len({philox.words(**{**base, **change}).tobytes() for change in changed}) == len(changed)


def test_sample_does_not_depend_on_its_neighbours() -> None:
    whole = philox.words(11, np.arange(100), 4, np.arange(100) % 3, Use.CROP, 7)
    part = philox.words(11, [42], 4, 0, Use.CROP, 3)
    assert np.array_equal(whole[42, :3], part[0])


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint64])
def test_index_types(dtype: type) -> None:
    assert np.array_equal(philox.words(1, np.arange(9, dtype=dtype), 0, 0, 0, 2), philox.words(1, range(9), 0, 0, 0, 2))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(seed=-1), r"philox.words: seed must be in \[0, 18446744073709551616\), got -1"),
        (dict(seed=2**64), "philox.words: seed must be"),
        (dict(index=[-1, 2]), r"philox.words: index must be in \[0, 4294967296\), got -1 to 2"),
        (dict(index=[2**32]), "philox.words: index must be in"),
        (dict(index=[[1]]), r"philox.words: index must be integers \(N,\), got int64 \(1, 1\)"),
        (dict(index=[0.5]), r"philox.words: index must be integers \(N,\), got float64"),
        (dict(step=2**32), "philox.words: step must be in"),
        (dict(view=2**16), "philox.words: view must be in"),
        (dict(view=[1, 2, 3]), r"philox.words: view must be one number or of index's shape \(2,\), got \(3,\)"),
        (dict(use=2**16), "philox.words: use must be in"),
        (dict(num=-1), "philox.words: num must be in"),
    ],
    ids=str,
)
@pytest.mark.parametrize("draw", [philox.words, philox.words_numpy], ids=["native", "numpy"])
def test_words_refuse(draw, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(**{**dict(seed=3, index=[5, 6], step=7, view=1, use=2, num=4), **change})


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(index=np.zeros(2, np.int64)), r"philox_words: index must be contiguous uint32 \(N,\), got int64 \(2,\)"),
        (dict(index=np.zeros(4, np.uint32)[::2]), "index must be contiguous"),
        (dict(view=np.zeros(3, np.uint32)), "view must be contiguous uint32 of index's shape"),
        (dict(view=np.full(2, 2**16, np.uint32)), r"view must be below 2\*\*16, got 65536"),
        (dict(step=-1), r"step must be in \[0, 2\*\*32\), got -1"),
        (dict(use=2**16), "use must be in"),
        (dict(num=-1), "num must be in"),
    ],
    ids=str,
)
def test_native_refuses(change: dict, message: str) -> None:
    address = dict(seed=0, index=np.zeros(2, np.uint32), step=0, view=np.zeros(2, np.uint32), use=0, num=1)
    with pytest.raises(ValueError, match=message):
        _native.philox_words(**{**address, **change})


def test_uniform_is_exact() -> None:
    ends = philox.uniform(np.array([0, 255, 256, 2**32 - 1], np.uint32))
    assert ends.dtype == np.float32
    assert ends.tolist() == [0.0, 0.0, 2.0**-24, 1 - 2.0**-24]


def test_uniform_is_uniform() -> None:
    values = philox.uniform(philox.words(0, np.arange(20_000), 0, 0, 0, 5)).ravel()
    counts = np.histogram(values, bins=50, range=(0, 1))[0]
    expected = values.size / 50
    # chi-square with 49 degrees of freedom: 99.99 % quantile
    assert ((counts - expected) ** 2 / expected).sum() < 96.0


def test_below() -> None:
    words = np.array([0, 2**31, 2**32 - 1], np.uint32)
    assert philox.below(words, 10).tolist() == [0, 5, 9]
    assert philox.below(words, [1, 3, 2**32 - 1]).tolist() == [0, 1, 2**32 - 2]
    assert philox.below(words[:, None], np.array([2, 4])).shape == (3, 2)
    for bound in (0, 2**32, 1.5):
        with pytest.raises(ValueError, match=r"philox.below: n must be integers in \[1, 2\*\*32\)"):
            philox.below(words, bound)


def test_distinct_are_distinct_and_uniform() -> None:
    chosen = philox.distinct(philox.words(5, np.arange(25_000), 0, 0, Use.JOINTS, 15), 25)
    assert chosen.shape == (25_000, 15)
    assert all(len(set(row)) == 15 for row in chosen[:500].tolist())
    # every joint is chosen 15 of 25 times: binomial deviation, six sigma
    share = np.bincount(chosen.ravel(), minlength=25) / 25_000
    assert np.abs(share - 0.6).max() < 6 * np.sqrt(0.6 * 0.4 / 25_000)


def test_distinct_by_hand() -> None:
    # words pick 2, then the second of what is left, then the first: 0 1 2 3 -> 2 1 0 3 -> 2 0 1 3 -> 2 0 1 3
    words = np.array([[2 << 30, (2**32 // 3) + 1, 0]], np.uint32)
    assert philox.distinct(words, 4).tolist() == [[2, 0, 1]]


def test_distinct_ends() -> None:
    assert sorted(philox.distinct(philox.words(1, [0], 0, 0, 0, 6), 6)[0].tolist()) == list(range(6))
    assert philox.distinct(np.zeros((3, 0), np.uint32), 6).shape == (3, 0)
    with pytest.raises(ValueError, match="philox.distinct: words must have at most n = 2 columns, got 3"):
        philox.distinct(np.zeros((1, 3), np.uint32), 2)


def test_permutation() -> None:
    order = philox.permutation(9, 2, 1000)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(1000))
    assert not np.array_equal(order, philox.permutation(9, 3, 1000))
    assert not np.array_equal(order, philox.permutation(8, 2, 1000))
    words = philox.words_numpy(9, range(1000), 2, 0, Use.SHUFFLE, 2).tolist()
    assert order.tolist() == sorted(range(1000), key=lambda i: words[i][0] + (words[i][1] << 32))
    assert philox.permutation(9, 2, 0).shape == (0,)
    assert philox.permutation(9, 2, 1).tolist() == [0]
