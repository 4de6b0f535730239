"""How fast the native loader makes batches, beside a plain feeder, this machine's memory, and a consumer that trains.

Run as `python -m fastskel.bench.loader --out FILE.jsonl [--parts ...]`. All parts make four views of clips like NTU's (60 to 120
frames, two bodies, 25 joints, 64 frames out) in one run, in turns. Parts:

speed     samples per second of one core: the plain feeder of `fastskel.bench.reference.feeder`, the NumPy definition, and native
          code that writes float32 and bfloat16
scaling   samples per second of 1, 2, .. native threads, and bytes written as a share of what copying reaches on as many cores
consumer  a consumer that computes for about 80 ms a step, alone and fed with batches of 356
memory    memory of a process and its workers while it iterates, everything made ahead: the native loader, and DataLoader over
          the feeder
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import stat
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastskel.bench.harness import append_rows, compare, origin, quantiles
from fastskel.bench.reference.feeder import Feeder
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from fastskel.data import Loader, PackedDataset, open_dataset, pack_arrays, usdrl_views

__all__ = ["PARTS", "main"]

PARTS = ("speed", "scaling", "consumer", "memory")
VIEWS, FRAMES, BODIES, JOINTS, CHANNELS = 4, 64, 2, 25, 3
SAMPLE_BYTES = VIEWS * FRAMES * BODIES * JOINTS * CHANNELS * 4
# and the part of those bytes that each takes
TYPES = {"float32": 1.0, "bfloat16": 0.5}
BATCH, STEP_S = 356, 0.08
MIN_LENGTH, MAX_LENGTH = 60, 120
# length of the published files' zero-padded clips
BUFFER_FRAMES = 300
MIB = 1 << 20
# unit of a file's blocks, whatever the file system's are
STAT_BLOCK = 512
# long enough for everything that is made ahead to be there
FILL_S, MEMORY_BATCHES = 0.5, 6


def make_data(folder: Path, num_clips: int) -> PackedDataset:
    """Pack clips (T, 2, 25, 3) of NTU's length."""
    draw = np.random.default_rng(0)

    def clips() -> Iterator[np.ndarray[Any, Any]]:
        for length in draw.integers(MIN_LENGTH, MAX_LENGTH + 1, num_clips):
            yield draw.standard_normal((int(length), BODIES, JOINTS, CHANNELS)).astype(np.float32)

    return pack_arrays(clips(), out=folder / "data", topology="ntu-25", labels=np.arange(num_clips) % 60)


def buffer_of(dataset: PackedDataset, frames: int = BUFFER_FRAMES) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Unpack clips to the published layout.

    Returns:
        Clips padded with zeros or cut to the same length, (n, C, frames, V, M), and their frames, (n,).
    """
    _, bodies, joints, channels = dataset.frames.shape
    buffer = np.zeros((len(dataset), channels, frames, joints, bodies), np.float32)
    counts = np.minimum(dataset.num_frames, frames)
    for number, count in enumerate(counts.tolist()):
        buffer[number, :, :count] = dataset.clip(number)[:count].transpose(3, 0, 2, 1)
    return buffer, counts


def loader_of(dataset: PackedDataset, **options: Any) -> Loader:
    """Make the loader of USDRL's four views."""
    return Loader(dataset, **{"views": usdrl_views(FRAMES), "batch_size": min(BATCH, len(dataset)), **options})


def _endless(loader: Loader) -> Iterator[Any]:
    return itertools.chain.from_iterable(iter(loader) for _ in itertools.count())


def _drawing(loader: Loader, count: int) -> Callable[[], None]:
    def draw() -> None:
        # an iteration of its own: none of its batches was made before, and none is made after
        for _ in itertools.islice(_endless(loader), count):
            pass

    return draw


def measure_speed(dataset: PackedDataset, rounds: int, limit_s: float = 60.0) -> Iterator[dict[str, Any]]:
    """One core: nothing but the calling thread makes views."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    feeder = Feeder(*buffer_of(dataset))
    order = itertools.cycle(np.random.default_rng(1).permutation(len(dataset)).tolist())
    items, batches = BATCH // 2, 8

    def feed() -> None:
        for _ in range(items):
            feeder[next(order)]

    calls: dict[str, Callable[[], None]] = {"feeder": feed}
    samples, size = {"feeder": items}, min(BATCH, len(dataset))
    for name, options in {
        "numpy": {"engine": "numpy"}, "native-float32": {}, "native-bfloat16": {"dtype": "bfloat16"},
    }.items():  # fmt: skip
        count = 1 if name == "numpy" else batches
        calls[name] = _drawing(loader_of(dataset, num_threads=0, **options), count)
        samples[name] = count * size
    for timing in compare(calls, "feeder", rounds=rounds, limit_s=limit_s):
        rate = 1e3 * samples[timing.provider] / timing.median_ms
        share = samples[timing.provider] / items
        # the time of as many samples as the feeder makes: providers differ in how many a call makes
        spread = {name: getattr(timing, name) / share for name in ("median_ms", "q20_ms", "q80_ms")}
        faster = {name: getattr(timing, name) * share for name in ("speedup", "speedup_q20", "speedup_q80")}
        written = SAMPLE_BYTES * TYPES[timing.provider.removeprefix("native-")] if "native" in timing.provider else SAMPLE_BYTES
        yield {
            "case": f"{items} samples", **timing.row(), **spread, **faster, "samples_per_s": rate,
            "bytes_per_s": rate * written,
        }  # fmt: skip
    torch.set_num_threads(threads)


def _copying(threads: int, size: int, count: int) -> Callable[[], None]:
    """Copy `size` bytes `count` times in each of some threads, from memory that no cache holds to memory that none holds."""
    pairs = [(np.ones(size, np.uint8), np.zeros(size, np.uint8)) for _ in range(threads)]

    def copy_all() -> None:
        def copy(pair: tuple[Any, Any]) -> None:
            for _ in range(count):
                np.copyto(pair[1], pair[0])

        workers = [threading.Thread(target=copy, args=(pair,)) for pair in pairs]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return copy_all


def measure_scaling(dataset: PackedDataset, rounds: int) -> Iterator[dict[str, Any]]:
    """Native threads and plain copies, on 1, 2, .. cores."""
    cores, batches, copies = len(os.sched_getaffinity(0)), 12, 12
    calls: dict[str, Callable[[], None]] = {}
    size = min(BATCH, len(dataset))
    for threads in range(1, cores + 1):
        calls[f"copy-{threads}"] = _copying(threads, 64 * MIB, copies)
        for dtype in TYPES:
            calls[f"{dtype}-{threads}"] = _drawing(loader_of(dataset, num_threads=threads, dtype=dtype), batches)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for timing_round in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            # the first round warms up
            times[name] += [time.perf_counter() - begin] if timing_round else []
    for threads in range(1, cores + 1):
        copied = 64 * MIB * copies * threads / statistics.median(times[f"copy-{threads}"])
        yield {"case": f"copy-{threads}", "provider": "copy", "workers": threads, "bytes_per_s": copied, "rounds": rounds}
        for dtype, share in TYPES.items():
            own, one = times[f"{dtype}-{threads}"], times[f"{dtype}-1"]
            rate = size * batches / statistics.median(own)
            low, middle, high = quantiles([a / b for a, b in zip(one, own, strict=True)])
            yield {
                "case": f"{dtype}-{threads}", "provider": dtype, "workers": threads,
                "samples_per_s": rate, "bytes_per_s": rate * SAMPLE_BYTES * share,
                "share_of_copy": rate * SAMPLE_BYTES * share / copied, "over_one_thread": middle, "over_q20": low,
                "over_q80": high, "rounds": rounds,
            }  # fmt: skip


def _work(seconds: float) -> Callable[[], None]:
    """Make a computation of one core and a fixed amount that takes about so long."""
    a = torch.randn(512, 512)
    begin = time.perf_counter()
    for _ in range(20):
        a @ a
    count = max(1, round(seconds * 20 / (time.perf_counter() - begin)))

    def work() -> None:
        for _ in range(count):
            a @ a

    return work


def measure_consumer(dataset: PackedDataset, rounds: int) -> Iterator[dict[str, Any]]:
    """Steps of a consumer that computes on one core: alone, and beside two threads of the loader."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    work, steps = _work(STEP_S), 12
    batches = _endless(loader_of(dataset, num_threads=2))
    alone: list[float] = []
    beside: list[float] = []
    waited: list[float] = []
    for _ in range(rounds + 1):
        for taken, fed in ((alone, False), (beside, True)):
            for _ in range(steps):
                begin = time.perf_counter()
                if fed:
                    batch = next(batches)
                    waited.append(time.perf_counter() - begin)
                begin = time.perf_counter()
                work()
                taken.append(time.perf_counter() - begin)
                del begin
    # the first round warms up, and finds the ring empty
    alone, beside, waited = alone[steps:], beside[steps:], waited[steps:]
    del batch
    torch.set_num_threads(threads)
    slower = [sum(b) / sum(a) for a, b in zip(_chunks(alone, steps), _chunks(beside, steps), strict=True)]
    low, middle, high = quantiles(slower)
    yield {
        "case": f"{min(BATCH, len(dataset))} per {1e3 * STEP_S:.0f} ms", "step_ms": 1e3 * quantiles(alone)[1],
        "fed_step_ms": 1e3 * quantiles(beside)[1], "slower": middle - 1, "slower_q20": low - 1, "slower_q80": high - 1,
        "waited_ms": 1e3 * quantiles(waited)[1], "waited_most_ms": 1e3 * max(waited), "rounds": rounds,
    }  # fmt: skip


def _chunks(values: list[float], size: int) -> list[list[float]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def _tree_bytes(pid: int) -> int:
    """Memory of a process and its children: their own, and what they share without a file that has a name.

    Pages of files are the system's cache. Batches between two processes are mapped by neither: descriptors tell of them.
    """
    total, shared = 0, {}
    for process in [pid, *_children(pid)]:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss_Anon:"))
        for descriptor in Path(f"/proc/{process}/fd").glob("*"):
            with contextlib.suppress(OSError):
                status = descriptor.stat()
                if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                    shared[status.st_dev, status.st_ino] = status.st_blocks * STAT_BLOCK
    return total + sum(shared.values())


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *_children(child)]
    return found


def _memory_of(kind: str, folder: Path, batches: int) -> None:
    """Iterate in this process and print how far its memory rose above what the libraries take; the data are a mapped file."""
    dataset = open_dataset(folder / "data")
    made: Iterator[Any]
    if kind == "native":
        before = _tree_bytes(os.getpid())
        made = _endless(loader_of(dataset, num_threads=2))
    else:
        buffer = np.load(folder / "buffer.npy", mmap_mode="r")
        before = _tree_bytes(os.getpid())
        loaded = DataLoader(
            Feeder(buffer, np.load(folder / "counts.npy")), min(BATCH, len(buffer)), shuffle=True, num_workers=2, drop_last=True,
            persistent_workers=True,
        )  # fmt: skip
        made = itertools.chain.from_iterable(iter(loaded) for _ in itertools.count())
    peak = 0
    for _ in range(batches):
        batch = next(made)
        time.sleep(FILL_S)
        peak = max(peak, _tree_bytes(os.getpid()))
    del batch
    print(json.dumps({"before_mib": before / MIB, "risen_mib": (peak - before) / MIB}))


def measure_memory(dataset: PackedDataset) -> Iterator[dict[str, Any]]:
    """Each in a process of its own."""
    folder = dataset.path.parent
    buffer, counts = buffer_of(dataset)
    np.save(folder / "buffer.npy", buffer)
    np.save(folder / "counts.npy", counts)
    for kind in ("native", "dataloader"):
        command = [sys.executable, "-m", "fastskel.bench.loader", "--child", kind, "--folder", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        batch = SAMPLE_BYTES * min(BATCH, len(dataset)) / MIB
        yield {"case": kind, "batch_mib": batch, **json.loads(done.stdout.splitlines()[-1])}


def main(arguments: list[str] | None = None) -> int:
    """Measure the parts, print and append their rows."""
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.loader", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON lines file to add rows to")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clips", type=int, default=3000)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which no round of the speed begins")
    parser.add_argument("--quick", action="store_true", help="say in the rows that sizes are tiny: whether it runs, not how fast")
    parser.add_argument("--child", choices=("native", "dataloader"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        _memory_of(given.child, given.folder, MEMORY_BATCHES)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_data(Path(folder), given.clips)
        parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
            "speed": lambda: measure_speed(dataset, given.rounds, given.limit),
            "scaling": lambda: measure_scaling(dataset, given.rounds),
            "consumer": lambda: measure_consumer(dataset, given.rounds),
            "memory": lambda: measure_memory(dataset),
        }
        for part in given.parts:
            for row in parts[part]():
                if given.out:
                    append_rows(given.out, [{"part": f"loader-{part}", "quick": given.quick, **row, **origin()}])
                figures = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
                print(f"{part:<10}{figures}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
