"""Steps of a loader: the parts of every batch, as often as they are asked for, and nothing else than the batches' rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fastskel.data import Loader, usdrl_views
from fastskel.data.loader import num_chunks

VIEWS = usdrl_views(8, num_views=2, normalise="center", min_frames=4)


@pytest.fixture(scope="module")
def dataset(memory_dataset):
    lengths = np.arange(23) + 5
    columns = [("subject", np.arange(23), "clip"), ("phase", np.arange(lengths.sum()), "frame")]
    return memory_dataset(lengths, columns=columns)


def make(dataset, **changes):
    return Loader(dataset, **{"views": VIEWS, "batch_size": 10, "seed": 3} | changes)


def assert_rows(parts, batch):
    """The parts are the rows of a batch, in order."""
    for name in ("index", "labels"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    for name, values in batch.extras.items():
        assert torch.equal(torch.cat([part.extras[name] for part in parts]), values)
    for number, view in enumerate(batch.views):
        assert torch.equal(torch.cat([part.views[number].clips for part in parts]), view.clips)
        assert torch.equal(torch.cat([part.views[number].mask for part in parts]), view.mask)


@pytest.mark.parametrize(
    "batch_size, chunk, expected", [(10, None, 1), (10, 10, 1), (10, 11, 1), (10, 9, 2), (10, 4, 3), (10, 1, 10)]
)
def test_number_of_chunks(batch_size, chunk, expected) -> None:
    assert num_chunks(batch_size, chunk) == expected


@pytest.mark.parametrize("engine, num_threads", [("native", 0), ("native", 2), ("numpy", 2)])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("chunk, sizes", [(None, [10]), (4, [4, 3, 3]), (5, [5, 5]), (1, [1] * 10), (99, [10])])
def test_parts_are_the_rows_of_the_batch(dataset, engine, num_threads, passes, chunk, sizes) -> None:
    batches = list(make(dataset))
    loader = make(dataset, engine=engine, num_threads=num_threads)
    steps = [[list(turn) for turn in turns] for turns in loader.steps(chunk, passes)]
    assert len(steps) == len(batches) == 2
    for turns, batch in zip(steps, batches, strict=True):
        assert [[len(part) for part in turn] for turn in turns] == [sizes] * passes
        for turn in turns:
            assert_rows(turn, batch)
    assert (loader.epoch, loader.position) == (1, 0)


def test_a_short_last_batch_is_cut_as_finely(dataset) -> None:
    loader, whole = (make(dataset, batch_size=9, drop_last=False) for _ in range(2))
    steps = [[list(turn) for turn in turns] for turns in loader.steps(8, 2)]
    assert [[len(part) for part in first] for first, _ in steps] == [[5, 4], [5, 4], [5]]
    for turns, batch in zip(steps, whole, strict=True):
        for turn in turns:
            assert_rows(turn, batch)


def test_what_is_not_read_is_passed_over(dataset) -> None:
    batches = list(make(dataset))
    seen = [next(first) for first, _ in make(dataset).steps(4, 2)]
    assert [part.index.tolist() for part in seen] == [batch.index[:4].tolist() for batch in batches]


@pytest.mark.parametrize("read", [1, 3, 5, 6])
def test_a_step_that_is_broken_off_counts_from_its_first_part(dataset, read) -> None:
    batches = list(make(dataset))
    loader = make(dataset)
    with_it = loader.steps(4, 2)
    parts = list(itertools.islice(itertools.chain(*next(with_it)), read))
    assert len(parts) == read and loader.state_dict()["position"] == 1
    with_it.close()
    for turns in loader.steps(4, 2):
        assert_rows(list(turns[0]), batches[1])


def test_a_step_of_which_nothing_was_read_comes_again(dataset) -> None:
    loader = make(dataset)
    next(loader.steps(4))
    assert loader.state_dict()["position"] == 0
    steps = loader.steps(4)
    (first,) = next(steps)
    assert_rows(list(first), next(iter(make(dataset))))


def test_kept_parts_stay_as_they_are_and_others_are_let_go(dataset) -> None:
    loader = make(dataset, num_threads=2)
    kept = [part for turns in loader.steps(4, 2) for turn in turns for part in turn]
    again = [part for turns in make(dataset, num_threads=0).steps(4, 2) for turn in turns for part in turn]
    for part, other in zip(kept, again, strict=True):
        assert_rows([part], other)


def test_a_second_iteration_ends_the_first(dataset) -> None:
    loader = make(dataset)
    steps = loader.steps(4, 2)
    first, second = next(steps)
    next(first)
    whole = iter(loader)
    assert len(next(whole)) == 10
    with pytest.raises(RuntimeError, match="iterations must follow one another, got two at once"):
        next(first)
    with pytest.raises(RuntimeError, match="iterations must follow one another, got two at once"):
        next(second)


@pytest.mark.parametrize("engine, num_threads", [("native", 0), ("native", 2), ("numpy", 2)])
def test_sizes_of_parts_may_change(dataset, engine, num_threads) -> None:
    loader, other = (make(dataset, engine=engine, num_threads=num_threads) for _ in range(2))
    for chunk in (4, None, 3):
        for (parts,), batch in zip(loader.steps(chunk), other, strict=True):
            assert_rows(list(parts), batch)


@pytest.mark.parametrize(
    "given, message", [((0,), "chunk must be at least 1, got 0"), ((4, 0), "passes must be at least 1, got 0")]
)
def test_refuses(dataset, given, message) -> None:
    with pytest.raises(ValueError, match=f"Loader: {message}"):
        next(make(dataset).steps(*given))
