"""The loader: same bits for any number of threads, resume, shares of ranks, errors of workers, clean shutdown."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fastskel.data import Loader, eval_view, make_synthetic, make_view, usdrl_views
from fastskel.data import views as views_module

VIEWS = usdrl_views(8, num_views=2, normalise="center", min_frames=4)


@pytest.fixture(scope="module")
def dataset(memory_dataset):
    return memory_dataset(np.arange(23) + 5)


def make(dataset, **changes):
    return Loader(dataset, **{"views": VIEWS, "batch_size": 4, "seed": 3} | changes)


def same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.labels, other.labels)
        for view, twin in zip(one.views, other.views, strict=True):
            assert torch.equal(view.clips, twin.clips)
            assert torch.equal(view.mask, twin.mask)


def order(batches):
    return torch.cat([batch.index for batch in batches]).tolist()


def workers():
    """Threads of loaders, of native code too, by the names that the system has for them."""
    native = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in native if name == "fastskel-loader"] + [
        thread.name for thread in threading.enumerate() if thread.name.startswith("fastskel-loader")
    ]


@pytest.mark.parametrize("engine", ["native", "numpy"])
@pytest.mark.parametrize("num_threads", [1, 2, 4, 8, None])
def test_threads_and_engines_change_no_bit(dataset, num_threads, engine):
    inline, threaded = make(dataset, num_threads=0), make(dataset, num_threads=num_threads, engine=engine)
    for _ in range(2):
        same(inline, threaded)
    threaded.close()
    assert not workers()


def test_batch_is_the_views_of_its_samples(dataset):
    loader = make(dataset)
    list(loader)
    batch = next(iter(loader))
    assert len(batch) == 4
    assert batch.labels.tolist() == [int(dataset.labels[i]) for i in batch.index]
    for number, view in enumerate(batch.views):
        expected = make_view(dataset, VIEWS[number], batch.index.numpy(), 3, 1, number)
        assert torch.equal(view.clips, expected.clips)
    assert not torch.equal(batch.views[0].clips, batch.views[1].clips)
    assert batch.stack().shape == (2, 4, 8, 1, 25, 3)


def test_epochs(dataset):
    loader = make(dataset)
    assert len(loader) == 5
    first, second = order(loader), order(loader)
    assert loader.epoch == 2
    assert loader.position == 0
    assert len(set(first)) == len(set(second)) == 20
    assert first != second
    assert order(make(dataset, seed=4)) != first


@pytest.mark.parametrize("position", range(12))
def test_resume(dataset, position):
    loader = make(dataset)
    forever = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())
    for _ in range(position):
        next(forever)
    other = make(dataset, num_threads=0)
    other.load_state_dict(loader.state_dict())
    assert (other.epoch, other.position) == divmod(position, 5)
    rest = itertools.chain.from_iterable(iter(other) for _ in itertools.count())
    same(itertools.islice(forever, 7), itertools.islice(rest, 7))


def test_breaking_after_the_last_batch_begins_the_next_epoch(dataset):
    loader = make(dataset)
    assert len(list(itertools.islice(loader, 5))) == 5
    assert len(list(loader)) == 5
    assert loader.epoch == 2


@pytest.mark.parametrize("engine", ["native", "numpy"])
def test_early_break_closing_and_errors_leave_no_threads(dataset, engine):
    loader = make(dataset, num_threads=3, engine=engine)
    for _ in loader:
        assert workers()
        break
    loader.close()
    assert not workers()
    # a closed loader begins again
    iterator = iter(loader)
    next(iterator)
    del iterator, loader
    assert not workers()


def test_an_error_of_the_caller_leaves_no_threads(dataset):
    def consume():
        with make(dataset, num_threads=2) as loader:
            for _ in loader:
                raise RuntimeError("of the caller")

    with pytest.raises(RuntimeError, match="of the caller"):
        consume()
    assert not workers()


def test_batches_stay_as_they_are_when_kept(dataset):
    expected = list(make(dataset, num_threads=0))
    with make(dataset, num_threads=2) as loader:
        kept = list(loader)
        list(loader)
    same(kept, expected)


def test_a_second_iteration_ends_the_first(dataset):
    loader = make(dataset, num_threads=2)
    first = iter(loader)
    next(first)
    second = iter(loader)
    batch = next(second)
    with pytest.raises(RuntimeError, match="iterations must follow one another, got two at once"):
        next(first)
    # the position is shared: the second went on behind the first
    assert torch.equal(batch.index, list(make(dataset))[1].index)
    assert len(list(second)) == 3


CHILD = """
import numpy as np, os, sys, torch
from fastskel.data import Loader, make_synthetic, usdrl_views
dataset = make_synthetic(sys.argv[1], num_clips=24)
loader = Loader(dataset, views=usdrl_views(8, num_views=2), batch_size=4, num_threads=2)
batches = iter(loader)
mine = [next(batches).stack()]
child = os.fork()
if child == 0:
    # threads do not survive a fork: an iteration that goes on says so, a new one has its own
    try:
        next(batches)
    except ValueError as error:
        assert "before the process forked" in str(error), error
    else:
        os._exit(3)
    again = Loader(dataset, views=loader.views, batch_size=4, num_threads=2)
    assert torch.equal(next(iter(again)).stack(), mine[0])
    loader.position = 0
    assert torch.equal(next(iter(loader)).stack(), mine[0])
    sys.exit(0)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert len(list(batches)) == 5
running = iter(loader)
next(running)
# the interpreter ends while threads make batches
"""


def test_forks_and_the_end_of_the_interpreter(tmp_path):
    command = [sys.executable, "-c", CHILD, str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr


def test_subset(dataset):
    subset = [20, 3, 5, 8, 13, 1]
    loader = make(dataset, indices=subset, batch_size=3)
    assert sorted(order(loader)) == sorted(subset)
    assert order(make(dataset, indices=subset, batch_size=4, shuffle=False, drop_last=False)) == subset


def test_evaluation_order(dataset):
    loader = Loader(dataset, views=[eval_view(8)], batch_size=10, shuffle=False, drop_last=False)
    for _ in range(2):
        batches = list(loader)
        assert [len(batch) for batch in batches] == [10, 10, 3]
        assert order(batches) == list(range(23))
        expected = make_view(dataset, eval_view(8), np.arange(23), 0, 0, 0).clips
        assert torch.equal(torch.cat([batch.views[0].clips for batch in batches]), expected)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_an_epoch(dataset, world_size):
    whole = make(dataset, batch_size=1).order(0)
    parts = [make(dataset, batch_size=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    orders = [order(part) for part in parts]
    assert len({len(part) for part in orders}) == 1
    kept = 23 // world_size * world_size
    assert np.array(orders).T.ravel().tolist() == whole[:kept].tolist()


def test_ranks_wrap_around_without_drop_last(dataset):
    parts = [make(dataset, drop_last=False, rank=rank, world_size=4) for rank in range(4)]
    assert [part.num_samples for part in parts] == [6] * 4
    seen = [sample for part in parts for sample in order(part)]
    assert sorted(set(seen)) == list(range(23))
    assert len(seen) == 24


def test_more_ranks_than_samples_wrap_around(dataset):
    parts = [
        make(dataset, indices=[1, 2], drop_last=False, rank=rank, world_size=5, shuffle=False) for rank in range(5)
    ]
    assert [order(part) for part in parts] == [[1], [2], [1], [2], [1]]


@pytest.mark.parametrize("kind", ["center", "center-first", "align", "align-yaw"])
def test_normalisations_are_those_of_the_definition(tmp_path, kind):
    dataset = make_synthetic(tmp_path / "data", num_clips=6, max_lost=3)
    options = {"views": usdrl_views(16, normalise=kind), "batch_size": 6}
    same(Loader(dataset, **options), Loader(dataset, engine="numpy", **options))


@pytest.mark.parametrize("num_threads", [0, 2])
def test_worker_error_names_the_clip(dataset, num_threads, monkeypatch):
    real = views_module.normalise_clip

    def fail(clip, kind, topology):
        if len(clip) == 5 + 11:
            raise RuntimeError("broken")
        return real(clip, kind, topology)

    monkeypatch.setattr(views_module, "normalise_clip", fail)
    loader = make(dataset, num_threads=num_threads, engine="numpy", drop_last=False)
    with pytest.raises(ValueError, match=r"broken.* at clip 11 \(clip11\) of in-memory"):
        list(loader)
    assert not workers()


@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_file_that_is_cut_off_is_named(tmp_path, num_threads):
    dataset = make_synthetic(tmp_path / "data", num_clips=40)
    frames = tmp_path / "data" / "frames.npy"
    loader = Loader(dataset, views=usdrl_views(8), batch_size=4, num_threads=num_threads)
    batches = iter(loader)
    next(batches)
    # of the last page only, which no batch can read in between: what is mapped beyond a file's last page ends the process
    os.truncate(frames, frames.stat().st_size - 4)
    with pytest.raises(ValueError, match=r"frames\.npy"):
        list(batches)
    loader.close()


def test_a_deleted_file_keeps_working(tmp_path):
    dataset = make_synthetic(tmp_path / "data", num_clips=12)
    expected = list(Loader(dataset, views=usdrl_views(8), batch_size=4))
    loader = Loader(dataset, views=usdrl_views(8), batch_size=4)
    (tmp_path / "data" / "frames.npy").unlink()
    same(loader, expected)
    same(Loader(dataset, views=usdrl_views(8), batch_size=4), expected)


def test_refuses_the_state_of_other_arguments(dataset):
    state = make(dataset).state_dict()
    with pytest.raises(ValueError, match=r"state_dict\['batch_size'\] must be the loader's 5, got 4"):
        make(dataset, batch_size=5).load_state_dict(state)
    with pytest.raises(ValueError, match=r"state_dict\['seed'\] must be the loader's 9, got 3"):
        make(dataset, seed=9).load_state_dict(state)
    with pytest.raises(ValueError, match="an epoch and a position below 5"):
        make(dataset).load_state_dict(state | {"position": 5})
