"""Host batches on their way to a GPU: order, what may be written again and when, errors, early ends. Objects play CUDA."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from fastskel.data import Loader, engines, make_synthetic, transfer, usdrl_views


class Cuda:
    """One side stream whose copies are done when a test says so, or when they are waited for."""

    def __init__(self):
        self.done, self.copies, self.waited, self.log = 0, 0, 0, []
        self.current = SimpleNamespace(wait_event=lambda event: self.log.append(("wait", event.number)))

    def Stream(self, device):
        return SimpleNamespace(record_event=self.record_event, synchronize=self.synchronize)

    def record_event(self):
        number = self.copies
        self.copies += 1
        return SimpleNamespace(number=number, query=lambda: number < self.done, synchronize=lambda: self.wait(number))

    def wait(self, number):
        self.waited += number >= self.done
        self.done = max(self.done, number + 1)

    def synchronize(self):
        self.done = self.copies
        self.log.append("synchronized")

    def current_stream(self, device):
        return self.current

    def stream(self, side):
        cuda = self

        class Inside:
            def __enter__(self):
                cuda.log.append("side")

            def __exit__(self, *_):
                cuda.log.append("current")

        return Inside()


class Recorded:
    def __init__(self, log, number):
        self.log, self.number = log, number

    def record_stream(self, stream):
        self.log.append(("record", self.number))


class HostBatch:
    def __init__(self, cuda, number):
        self.cuda, self.number = cuda, number

    def to(self, device, *, non_blocking):
        assert non_blocking
        assert self.cuda.log[-1] == "side"
        part = Recorded(self.cuda.log, self.number)
        view = SimpleNamespace(clips=part, mask=part)
        return SimpleNamespace(number=self.number, views=[view], labels=part, extras={"subject": part})


@pytest.fixture
def cuda(monkeypatch):
    played = Cuda()
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(played, name))
    return played


def made(cuda, count, alive=None, fails=False):
    for number in range(count):
        batch = HostBatch(cuda, number)
        if alive is not None:
            alive.append(weakref.ref(batch))
        yield batch
        del batch
    if fails:
        raise ValueError("of the next batch")


def on_gpu(batches):
    return transfer.transferred(batches, torch.device("cuda"))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 9])
def test_all_batches_in_order_each_after_its_copy(cuda, count):
    for expected, batch in enumerate(on_gpu(made(cuda, count))):
        assert batch.number == expected
        # every tensor is told of the stream that uses it, behind the wait for its copy
        assert cuda.log[-5:] == [("wait", expected), *[("record", expected)] * 4]
        assert cuda.copies == min(expected + 1 + transfer.AHEAD, count)
    assert expected == count - 1 if count else cuda.copies == 0
    assert cuda.log[-1] == "synchronized"


def test_memory_is_the_loader_s_again_only_when_its_copy_is_done(cuda):
    alive = []
    batches = on_gpu(made(cuda, 9, alive))
    next(batches)
    gc.collect()
    assert [ref() is not None for ref in alive] == [True] * 3
    cuda.done = 2
    next(batches)
    assert [ref() is not None for ref in alive] == [False, False, True, True]


def test_copies_that_lag_are_waited_for(cuda):
    alive = []
    for _ in on_gpu(made(cuda, 30, alive)):
        assert sum(ref() is not None for ref in alive) <= transfer.AHEAD + 2
    assert cuda.waited > 20


def test_batches_before_an_error_are_delivered(cuda):
    batches = on_gpu(made(cuda, 4, fails=True))
    assert [next(batches).number for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="of the next batch"):
        next(batches)
    assert cuda.log[-1] == "synchronized"


def test_an_early_end_waits_for_the_copies(cuda):
    alive, source = [], None
    source = made(cuda, 9, alive)
    batches = on_gpu(source)
    next(batches)
    batches.close()
    assert cuda.log[-1] == "synchronized"
    assert cuda.done == cuda.copies == 3
    del batches
    source.close()
    assert not any(ref() is not None for ref in alive)


def test_pinned_memory_is_given_back_with_the_loader_or_before(cuda, monkeypatch, tmp_path):
    pinned = {}

    def register(address, size, flags):
        # as the driver does with memory that it knows
        assert not any(address < end and begin < address + size for begin, end in pinned.items())
        pinned[address] = address + size
        return 0

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda address: pinned.pop(address) and 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: cuda.log.append("all"))
    monkeypatch.setattr("fastskel.data.loader.transferred", lambda batches, device: batches)
    dataset = make_synthetic(tmp_path / "data", num_clips=24)
    for closes in (True, False, False):
        loader = Loader(dataset, views=usdrl_views(8), batch_size=4, num_threads=2, device="cuda")
        assert [sum(1 for _ in loader) for _ in range(2)] == [6, 6]
        assert 1 <= len(pinned) <= engines.DEPTH + 4
        if closes:
            loader.close()
            assert not pinned
            assert sum(1 for _ in loader) == 6
        del loader
        gc.collect()
        # memory that is freed while it is registered makes the next loader's registration fail
        assert not pinned
        assert cuda.log[-1] == "all"
