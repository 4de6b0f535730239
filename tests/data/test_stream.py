"""The native stream of batches: order, bits, memory, errors, signals, forks and exits."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fastskel import _native, philox

LENGTHS = [5, 40, 1, 17, 90, 3, 64, 8, 30, 12, 2, 77, 9]
NUM = len(LENGTHS)
SHEAR = {"kind": "shear", "amplitude": 0.5}
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


def program(frames: int = 16, transforms=(), **changes) -> dict:
    return {
        "frames": frames,
        "crop": ("random", 1 << 21, 1 << 24, 4),
        "normalise": "none",
        "centre_joint": 0,
        "alignment": None,
        "transforms": list(transforms),
        "stream": "joint",
        "parents": None,
        **changes,
    }


def slow(taps: int) -> dict:
    """A view whose rows take a good part of a second each and next to no memory."""
    blur = {"kind": "blur", "low": 1.0, "high": 1.0, "taps": taps, "probability": 1.0, "normalise": True}
    return program(64, [{**blur, "padding": "edge"}])


PROGRAMS = [program(16, [SHEAR]), program(7, stream="motion"), program(16)]


@pytest.fixture(scope="module")
def arrays() -> tuple[np.ndarray, np.ndarray]:
    frames = np.random.default_rng(0).standard_normal((sum(LENGTHS), 2, 5, 3)).astype(np.float32)
    return frames, np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int64)


@pytest.fixture
def folder(arrays, tmp_path: Path) -> Path:
    np.save(tmp_path / "frames.npy", arrays[0])
    np.save(tmp_path / "offsets.npy", arrays[1])
    return tmp_path


def opened(folder: Path):
    return _native.Clips.open(folder / "frames.npy", folder / "offsets.npy")


def stream_of(clips, programs=PROGRAMS, *, batch_size=4, num_threads=2, depth=2, dtype="float32", seed=5):
    views = _native.ViewMakers(clips, programs, seed=seed, dtype=dtype)
    return _native.BatchStream(views, batch_size=batch_size, num_threads=num_threads, depth=depth)


def rest(stream):
    while (batch := stream.next()) is not None:
        yield batch


def expected(clips, index, epoch, programs=PROGRAMS, dtype="float32", seed=5):
    return _native.ViewMakers(clips, programs, seed=seed, dtype=dtype).make(epoch, np.ascontiguousarray(index))


def assert_equal(batch, index, views) -> None:
    made, numbers, _ = batch
    assert np.array_equal(numbers, index) and len(made) == len(views)
    for (clips, mask), (other_clips, other_mask) in zip(made, views):
        assert clips.dtype == other_clips.dtype and clips.shape == other_clips.shape
        assert clips.tobytes() == other_clips.tobytes()
        assert mask.dtype == np.bool_ and np.array_equal(mask, other_mask)
        assert clips.ctypes.data % 64 == 0 and mask.ctypes.data % 64 == 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("num_threads", [0, 1, 2, 4, 8])
def test_bits_do_not_depend_on_threads(folder: Path, num_threads: int, dtype: str) -> None:
    clips = opened(folder)
    stream = stream_of(clips, num_threads=num_threads, dtype=dtype)
    for epoch in (0, 3):
        order = philox.permutation(5, epoch, NUM)
        stream.start(epoch, order, 0)
        batches = list(rest(stream))
        assert [len(index) for _, index, _ in batches] == [4, 4, 4, 1]
        for number, batch in enumerate(batches):
            index = order[4 * number : 4 * number + 4]
            assert_equal(batch, index, expected(clips, index, epoch, dtype=dtype))


@pytest.mark.parametrize("num_threads", [0, 3])
def test_resumes_at_every_position(folder: Path, num_threads: int) -> None:
    clips = opened(folder)
    stream = stream_of(clips, num_threads=num_threads, batch_size=2)
    order = philox.permutation(5, 1, NUM)
    num_batches = -(-NUM // 2)
    for position in range(num_batches + 2):
        stream.start(1, order, position)
        batches = list(rest(stream))
        assert len(batches) == max(num_batches - position, 0)
        for number, batch in enumerate(batches, position):
            index = order[2 * number : 2 * number + 2]
            assert_equal(batch, index, expected(clips, index, 1))


@pytest.mark.parametrize("num_threads", [0, 2])
def test_kept_batches_stay_as_they_are(folder: Path, num_threads: int) -> None:
    clips = opened(folder)
    stream = stream_of(clips, num_threads=num_threads, batch_size=1, depth=1)
    order = np.tile(np.arange(NUM), 5)
    stream.start(0, order, 0)
    batches = list(rest(stream))
    assert len({number for _, _, number in batches}) == len(batches) == stream.slots_held
    stream.start(1, order[::-1].copy(), 0)
    list(rest(stream))
    for clip, batch in zip(order, batches, strict=True):
        assert_equal(batch, [clip], expected(clips, order[clip : clip + 1], 0))
    del batch, batches
    gc.collect()
    assert stream.slots_held <= 1 + 2


def test_batches_outlive_their_stream_and_may_be_written(folder: Path) -> None:
    clips = opened(folder)
    index = np.arange(4)
    views = expected(clips, index, 0)
    stream = stream_of(clips)
    stream.start(0, np.arange(NUM), 0)
    batch = stream.next()
    # an array alone keeps the memory of its batch
    mask = batch[0][1][1]
    stream.close()
    assert stream.next() is None
    del stream, clips
    gc.collect()
    assert_equal(batch, index, views)
    batch[0][0][0][:] = 1
    del batch
    gc.collect()
    assert np.array_equal(mask, views[1][1])


def test_slots_are_used_again(folder: Path) -> None:
    stream = stream_of(opened(folder), depth=2)
    for epoch in range(20):
        stream.start(epoch, np.tile(np.arange(NUM), 8), 0)
        for views, _, number in rest(stream):
            assert len(views) == len(PROGRAMS)
            assert 0 <= number < 4
    # two ahead, one in the hand of the loop, one that has just come
    assert stream.slots_allocated <= 4 and stream.slots_held <= 4
    rows = sum(64 * -(-4 * frames * 2 * (5 * 3 * 4) // 64) + 64 * -(-4 * frames * 2 // 64) for frames in (16, 7, 16))
    assert stream.slot_bytes == rows
    assert stream.seconds_waited > 0


@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_stops_and_starts_again(folder: Path, num_threads: int) -> None:
    clips = opened(folder)
    stream = stream_of(clips, num_threads=num_threads)
    assert stream.next() is None
    for epoch in range(30):
        order = philox.permutation(5, epoch, NUM)
        stream.start(epoch, order, 0)
        for number in range(epoch % 4):
            index = order[4 * number : 4 * number + 4]
            assert_equal(stream.next(), index, expected(clips, index, epoch))
        if epoch % 3 == 0:
            stream.stop()
            assert stream.next() is None
    stream.close()
    stream.close()
    with pytest.raises(_native.NativeError, match="stream must be open, got a closed one"):
        stream.start(0, np.arange(NUM), 0)


def test_an_exception_in_the_loop_leaves_the_stream_whole(folder: Path) -> None:
    clips = opened(folder)
    stream = stream_of(clips)
    stream.start(0, np.arange(NUM), 0)

    def loop(batches) -> None:
        for number, _ in enumerate(batches):
            if number == 1:
                raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        loop(rest(stream))
    # the loop took two batches; the third is next
    assert_equal(stream.next(), np.arange(8, 12), expected(clips, np.arange(8, 12), 0))
    batches = rest(stream)
    assert len(next(batches)[1]) == 1
    del batches, stream
    gc.collect()


@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_truncated_file_is_an_error(folder: Path, num_threads: int) -> None:
    stream = stream_of(opened(folder), num_threads=num_threads)
    stream.start(0, np.arange(NUM), 0)
    assert stream.next() is not None
    path = folder / "frames.npy"
    size = path.stat().st_size
    # the last values lie on a page that remains: it shows zeros, and nothing but the length tells
    os.truncate(path, size - 4)
    with pytest.raises(_native.NativeError, match=f"as long as it was, {size} bytes, got {size - 4}, in {path}") as caught:
        list(rest(stream))
    assert caught.value.clip == -1
    assert stream.next() is None


def test_a_deleted_file_is_read_to_the_end(folder: Path, arrays) -> None:
    clips = opened(folder)
    (folder / "frames.npy").unlink()
    (folder / "offsets.npy").unlink()
    stream = stream_of(clips)
    stream.start(0, np.arange(NUM), 0)
    borrowed = _native.Clips.borrow(*arrays)
    for number, batch in enumerate(rest(stream)):
        index = np.arange(NUM)[4 * number : 4 * number + 4]
        assert_equal(batch, index, expected(borrowed, index, 0))


def test_borrowed_arrays_are_kept(arrays) -> None:
    frames = arrays[0].copy()
    stream = stream_of(_native.Clips.borrow(frames, arrays[1].copy()))
    want = expected(_native.Clips.borrow(*arrays), np.arange(4), 0)
    users = sys.getrefcount(frames)
    address = frames.ctypes.data
    del frames
    gc.collect()
    # would be handed out again if the array had been freed
    other = np.full_like(arrays[0], np.nan)
    assert users >= 3 and other.ctypes.data != address
    stream.start(0, np.arange(NUM), 0)
    assert_equal(stream.next(), np.arange(4), want)


def test_bad_starts(arrays) -> None:
    clips = _native.Clips.borrow(*arrays)
    with pytest.raises(ValueError, match="order must be in 0 .. 12, got 13"):
        stream_of(clips).start(0, np.array([0, 13]), 0)
    with pytest.raises(ValueError, match="order must be contiguous int64"):
        stream_of(clips).start(0, np.arange(4, dtype=np.int32), 0)
    with pytest.raises(ValueError, match="order must be contiguous int64"):
        stream_of(clips).start(0, np.arange(8)[::2], 0)
    with pytest.raises(ValueError, match="epoch must be in 0 .. 4294967295, got -1"):
        stream_of(clips).start(-1, np.arange(4), 0)
    with pytest.raises(ValueError, match="position must be in 0 "):
        stream_of(clips).start(0, np.arange(4), -1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 0}, "batch_size must be in 1 .. 2147483648, got 0"),
        ({"num_threads": -1}, "num_threads must be in 0 .. 1024, got -1"),
        ({"depth": 0}, "depth must be in 1 .. 1024, got 0"),
        ({"programs": []}, "programs must be in 1 .. 65535, got 0"),
        ({"dtype": "float64"}, "dtype must be one of float32, float16, bfloat16, got 'float64'"),
        ({"programs": [program(0)]}, "frames must be"),
    ],
)
def test_bad_arguments(arrays, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream_of(_native.Clips.borrow(*arrays), **changes)


def test_bad_clips(arrays, folder: Path) -> None:
    frames, offsets = arrays
    with pytest.raises(ValueError, match=r"frames must be contiguous float32 \(sum T, M, V, C\), got float64"):
        _native.Clips.borrow(frames.astype(np.float64), offsets)
    with pytest.raises(ValueError, match="frames must be contiguous"):
        _native.Clips.borrow(frames[:, :, ::2], offsets)
    with pytest.raises(ValueError, match="frames must be at least one value"):
        _native.Clips.borrow(frames[:0], offsets)
    with pytest.raises(ValueError, match="offsets must be contiguous int64"):
        _native.Clips.borrow(frames, offsets.astype(np.int32))
    with pytest.raises(_native.NativeError, match="up to the 358 frames there are, got 349"):
        _native.Clips.borrow(frames, offsets[:-1])
    np.save(folder / "frames.npy", frames.astype(">f4"))
    with pytest.raises(_native.NativeError, match=f"got values of type >f4, in {folder}/frames.npy") as caught:
        opened(folder)
    assert caught.value.clip == _native.NativeError.clip == -1
    assert isinstance(caught.value, RuntimeError)


def test_packed_files_are_read(tmp_path: Path) -> None:
    from fastskel.data import pack_arrays

    made = [np.random.default_rng(i).standard_normal((t, 1, 25, 3)).astype(np.float32) for i, t in enumerate(LENGTHS)]
    dataset = pack_arrays(made, out=tmp_path / "packed", topology="ntu-25")
    clips = opened(tmp_path / "packed")
    assert len(clips) == NUM
    clips.check_unchanged()
    borrowed = _native.Clips.borrow(np.asarray(dataset.frames), dataset.offsets)
    for mine, other in zip(expected(clips, np.arange(NUM), 0), expected(borrowed, np.arange(NUM), 0)):
        assert np.array_equal(mine[0], other[0])


def test_names_of_files_need_not_be_text(arrays, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("the file system takes no such names")
    with pytest.raises(_native.NativeError, match="No such file"):
        opened(folder)
    np.save(folder / "frames.npy", arrays[0])
    np.save(folder / "offsets.npy", arrays[1])
    assert len(opened(folder)) == NUM


def test_cpus() -> None:
    count = _native.available_cpus()
    assert count >= 1
    if hasattr(os, "sched_getaffinity"):
        assert count <= len(os.sched_getaffinity(0))


def loader_threads() -> list[Path]:
    return [task for task in Path("/proc/self/task").iterdir() if (task / "comm").read_text() == "fastskel-loader\n"]


@LINUX
def test_threads_have_a_name_take_no_signals_and_end(folder: Path) -> None:
    before = len(loader_threads())
    stream = stream_of(opened(folder), num_threads=3)
    assert len(loader_threads()) == before
    stream.start(0, np.arange(NUM), 0)
    stream.next()
    deadline = time.monotonic() + 10
    while len(loader_threads()) < before + 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    tasks = loader_threads()
    assert len(tasks) == before + 3
    (blocked,) = (line.split()[1] for line in (tasks[-1] / "status").read_text().splitlines() if "SigBlk" in line)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1, signal.SIGALRM):
        assert int(blocked, 16) >> (number - 1) & 1
    # faults are the thread's own: a handler that prints where must see them
    for number in (signal.SIGSEGV, signal.SIGBUS):
        assert not int(blocked, 16) >> (number - 1) & 1
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    stream.close()
    assert len(loader_threads()) == before


@LINUX
def test_neither_memory_nor_threads_leak(folder: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    clips, order = opened(folder), np.tile(np.arange(NUM), 4)
    programs = [program(200)] * 4
    # 52 rows of 4 views of 200 frames, half a megabyte a batch
    kept = None
    for round_ in range(60):
        stream = stream_of(clips, programs, num_threads=2, batch_size=4)
        for epoch in range(3):
            stream.start(epoch, order, 0)
            for number, batch in enumerate(rest(stream)):
                kept = batch
                if epoch == 1 and number == 5:
                    break
        if round_ == 9:
            gc.collect()
            before = resident()
    gc.collect()
    assert resident() - before < 8 << 20
    assert kept is not None
    del stream
    gc.collect()
    assert loader_threads() == []


def test_other_threads_run_while_a_batch_is_waited_for(arrays) -> None:
    stream = stream_of(_native.Clips.borrow(*arrays), [slow(1_000_001)], num_threads=1, batch_size=2)
    stream.start(0, np.arange(4), 0)
    turns, done = [0], threading.Event()

    def turn() -> None:
        while not done.is_set():
            turns[0] += 1
            time.sleep(0.001)

    other = threading.Thread(target=turn)
    other.start()
    begin = time.monotonic()
    stream.next()
    waited, seen = time.monotonic() - begin, turns[0]
    done.set()
    other.join()
    # a thread that was shut out would have turned once or twice
    assert waited > 0.05 and seen > 10 * waited
    assert stream.seconds_waited > 0.5 * waited
