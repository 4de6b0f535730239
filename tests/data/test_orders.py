"""Native orders of an epoch equal those of NumPy, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastskel import _native, philox


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 7), st.data())
@settings(max_examples=60, deadline=None)
def test_orders_equal_numpy(seed: int, epoch: int, n: int, world_size: int, data) -> None:
    order = _native.epoch_order(seed, epoch, n, shuffle=True)
    assert order.dtype == np.int64 and np.array_equal(order, philox.permutation(seed, epoch, n))
    assert np.array_equal(_native.epoch_order(seed, epoch, n, shuffle=False), np.arange(n))
    rank = data.draw(st.integers(0, world_size - 1))
    most = -(-n // world_size)
    num = data.draw(st.integers(0, most))
    # as Loader.order shares an epoch
    shared = np.resize(order, most * world_size)[rank::world_size][:num]
    mine = _native.epoch_order(seed, epoch, n, shuffle=True, rank=rank, world_size=world_size, num_samples=num)
    assert np.array_equal(mine, shared)


@given(st.lists(st.integers(0, 2**54), min_size=1, max_size=40), st.integers(0, 2**64 - 1), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_weighted_orders_equal_numpy(weights: list[int], seed: int, draws: int) -> None:
    array = np.array(weights, np.uint64)
    if not array.any():
        array[-1] = 1
    total = sum(array.tolist())
    words = philox.words(seed, np.arange(draws or len(array)), 7, 0, philox.Use.WEIGHTED, 2).tolist()
    targets = [(low | high << 32) * total >> 64 for low, high in words]
    by_integers = [int(np.argmax(np.cumsum(array) > np.uint64(target))) for target in targets]
    native = _native.epoch_order(seed, 7, len(array), shuffle=True, weights=array, num_draws=draws)
    assert native.tolist() == by_integers
    assert philox.weighted_order(seed, 7, array, len(by_integers)).tolist() == by_integers


def test_weights_become_integers() -> None:
    weights = philox.integer_weights([0, 1e-30, 0.25, 0.5])
    assert weights.dtype == np.uint64 and weights.tolist() == [0, 1, 2**31, 2**32]
    for bad in ([], [0, 0], [1, -1], [1, np.nan], [1, np.inf], [[1]]):
        with pytest.raises(ValueError, match="weights must be finite, at least 0 and not all zero"):
            philox.integer_weights(bad)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"epoch": 2**32}, "epoch must be in"),
        ({"n": 0}, "n must be in 1 .. 4294967295, got 0"),
        ({"rank": 2, "world_size": 2}, "rank must be in 0 .. 1, got 2"),
        ({"world_size": 0}, "world_size must be in 1"),
        ({"num_draws": 3}, "num_draws must be 0 without weights, got 3"),
        ({"num_samples": 5}, "num_samples must be in 0 .. 4, got 5"),
        ({"weights": np.ones(4)}, r"weights must be contiguous uint64 \(n,\), got float64 \(4,\)"),
        ({"weights": np.ones(3, np.uint64)}, "weights must be one for each of 4 positions, got 3"),
        ({"weights": np.ones(4, np.uint64), "shuffle": False}, "shuffle must be true where there are weights"),
    ],
)
def test_bad_orders(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _native.epoch_order(**{"seed": 0, "epoch": 0, "n": 4, "shuffle": True, **arguments})


@pytest.mark.parametrize("weights", [np.zeros(4, np.uint64), np.full(4, 2**61, np.uint64)], ids=["zeros", "huge"])
def test_bad_sums_of_weights(weights: np.ndarray) -> None:
    with pytest.raises(_native.NativeError, match="weights must be"):
        _native.epoch_order(0, 0, 4, shuffle=True, weights=weights)
    with pytest.raises(ValueError, match="weights must be"):
        philox.weighted_order(0, 0, weights, 4)
