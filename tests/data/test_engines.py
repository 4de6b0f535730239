"""The engine of native code: arithmetic of the caller, files that are cut, iterations that meet."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastskel import _native
from fastskel.data import Loader, usdrl_views
from fastskel.data.engines import NativeEngine

VIEWS = usdrl_views(8, num_views=2, normalise="center", min_frames=4)


@pytest.fixture(scope="module")
def dataset(memory_dataset):
    return memory_dataset(np.arange(40) + 5)


@pytest.fixture
def flush():
    """Turn denormal numbers of this thread, and of those it starts, into zeros; undone at the end."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    torch.set_flush_denormal(False)
    yield torch.set_flush_denormal
    torch.set_flush_denormal(False)


def tiny(dataset):
    """The same clips with coordinates that float32 can only hold below its normal numbers."""
    return memory(dataset, dataset.frames * np.float32(1e-40))


def memory(dataset, frames):
    return type(dataset)(**{**vars(dataset), "frames": frames})


@pytest.mark.parametrize("num_threads", [0, 2])
def test_flushed_denormals_change_no_bit(dataset, flush, num_threads) -> None:
    small = tiny(dataset)

    def bits() -> list[bytes]:
        with Loader(small, views=VIEWS, batch_size=8, num_threads=num_threads) as loader:
            return [part.numpy().tobytes() for batch in loader for view in batch.views for part in (view.clips, view.mask)]

    expected = bits()
    assert any(np.frombuffer(clips, np.uint8).any() for clips in expected)
    flush(True)
    assert bits() == expected


def test_flushed_denormals_change_no_view_and_no_resize(dataset, flush) -> None:
    small = tiny(dataset)
    engine = NativeEngine(small, VIEWS, 1, torch.float32, 0)
    clip = small.clip(30)

    def bits() -> list[bytes]:
        views = engine.make(0, np.arange(40))
        return [view.clips.numpy().tobytes() for view in views] + [_native.crop_resize(clip, 3, 20, 16).tobytes()]

    expected = bits()
    flush(True)
    assert bits() == expected
    # the caller's own mode is his again
    assert float(torch.tensor(1e-40) * 1) == 0.0


def test_views_of_a_file_cut_meanwhile_are_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "frames.npy", np.ones((64, 2, 5, 3), np.float32))
    np.save(tmp_path / "offsets.npy", np.array([0, 64]))
    blur = {"kind": "blur", "low": 1.0, "high": 1.0, "taps": 1_000_001, "probability": 1.0, "normalise": True, "padding": "edge"}
    program = {
        "frames": 64, "crop": ("center", 1 << 24), "normalise": "none", "centre_joint": 0, "alignment": None,
        "transforms": [blur], "stream": "joint", "parents": None,
    }  # fmt: skip
    clips = _native.Clips.open(tmp_path / "frames.npy", tmp_path / "offsets.npy")
    views = _native.ViewMakers(clips, [program], seed=0, dtype="float32")

    def cut() -> None:
        time.sleep(0.1)
        # within the last page, which stays mapped and shows zeros
        os.truncate(tmp_path / "frames.npy", (tmp_path / "frames.npy").stat().st_size - 4)

    thread = threading.Thread(target=cut)
    thread.start()
    with pytest.raises(_native.NativeError, match="file must be as long as it was"):
        views.make(0, np.zeros(4, np.int64))
    thread.join()


@pytest.mark.parametrize("num_threads", [0, 2])
@pytest.mark.parametrize("same_epoch", [True, False])
def test_streams_that_meet_are_an_error(dataset, num_threads, same_epoch) -> None:
    engine = NativeEngine(dataset, VIEWS, 1, torch.float32, num_threads)
    order = np.arange(40)
    first = engine.stream(0, order, 4)
    next(first)
    second = engine.stream(0 if same_epoch else 1, order, 4)
    next(second)
    with pytest.raises(RuntimeError, match="iterations must follow one another"):
        next(first)
    # it took a batch of the second
    with pytest.raises(RuntimeError, match="iterations must follow one another"):
        next(second)
    assert len(list(engine.stream(2, order, 4))) == 10
    engine.close()


def test_two_threads_lose_no_batch_in_silence(dataset) -> None:
    for attempt in range(20):
        loader = Loader(dataset, views=VIEWS, batch_size=1, num_threads=2)
        failed: list[str] = []
        complete: list[int] = []

        def consume(loader=loader, failed=failed, complete=complete, delay=attempt * 1e-4) -> None:
            time.sleep(delay)
            try:
                complete.append(len(list(loader)))
            except (RuntimeError, ValueError) as error:
                failed.append(str(error))

        threads = [threading.Thread(target=consume), threading.Thread(target=consume, kwargs={"delay": 0.0})]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        loader.close()
        # iterations that met have failed, all but the one that ended the others; nobody has an epoch with a hole
        assert len(failed) + len(complete) == 2
        assert complete == [40, 40] or all("Loader: iterations must" in text for text in failed)
