"""Parsers of raw text beside plain Python ones, in turns on one core, and a whole data set packed: NTU RGB+D skeleton text.

Run as `python -m fastskel.bench.formats --out FILE.jsonl`. The text is made up, in the layout and with the digits of the
data set's files, or one of its files (`--file`); coordinates must agree bit for bit before parsers are timed.

`--pack 5000` makes so many files up instead, of 60 to 120 frames and one or two bodies, and packs them with `fastskel pack` in a
process of its own, with one thread and with one for each CPU: seconds, MB/s, peak memory. The bytes must be the same.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fastskel.bench.harness import append_rows, compare, origin
from numpy.typing import NDArray

from fastskel import _native
from fastskel.data.formats.ntu import read
from fastskel.data.packed import open_dataset

__all__ = ["by_lines", "by_words", "main", "measure", "measure_packing", "skeleton_text", "write_recordings"]

BASELINE = "lines"
NUM_JOINTS = 25
NUM_FRAMES, QUICK_FRAMES = 300, 5
# of the recordings that are packed; and bodies of which they are put together
PACK_FRAMES, POOL_FRAMES = (60, 120), 256
NAME = "S001C001P001R001A050.skeleton"


def skeleton_text(num_frames: int, num_bodies: int = 2) -> bytes:
    """Make up the text of a recording, T = `num_frames`, M = `num_bodies`, joints (V, 12), seven digits a number."""
    rng = np.random.default_rng(0)
    lines = [str(num_frames)]
    for _ in range(num_frames):
        lines.append(str(num_bodies))
        for body in range(num_bodies):
            lines += [f"{72057594037931648 + body} 0 1 1 1 1 0 {rng.normal():.7g} {rng.normal():.7g} 2", str(NUM_JOINTS)]
            for x, y, depth_x, depth_y, *turn in rng.normal(size=(NUM_JOINTS, 8)):
                pixels = f"{250 + 50 * depth_x:.7g} {200 + 50 * depth_y:.7g} {1000 + 90 * depth_x:.7g} {540 + 90 * depth_y:.7g}"
                lines.append(f"{x:.7g} {y:.7g} {3 + 0.1 * x:.7g} {pixels} {' '.join(f'{t:.7g}' for t in turn)} 2")
    return ("\r\n".join(lines) + "\r\n").encode()


def by_lines(data: bytes) -> NDArray[np.float32]:
    """Parse line by line, as the field's scripts do; coordinates of all bodies, (B, V, 3)."""
    lines = iter(data.decode("ascii").split("\n"))
    joints: list[list[list[float]]] = []
    for _ in range(int(next(lines))):
        for _ in range(int(next(lines))):
            next(lines)
            joints.append([[float(word) for word in next(lines).split()[:3]] for _ in range(int(next(lines)))])
    return np.array(joints, dtype=np.float64).astype(np.float32)


def by_words(data: bytes) -> NDArray[np.float32]:
    """Split the text once and let NumPy read the words, about the best of Python; (B, V, 3)."""
    words = data.split()
    place, joints = 1, []
    for _ in range(int(words[0])):
        num_bodies = int(words[place])
        place += 1
        for _ in range(num_bodies):
            begin, place = place + 11, place + 11 + 12 * NUM_JOINTS
            joints.append([words[begin:place:12], words[begin + 1 : place : 12], words[begin + 2 : place : 12]])
    return np.array(joints).astype(np.float64).astype(np.float32).transpose(0, 2, 1)


def measure(data: bytes, rounds: int) -> Iterator[dict[str, Any]]:
    """Compare the parsers on one file; one row for each, with its MB/s."""
    native = partial(_native.parse_ntu, data, NAME, NUM_JOINTS)
    calls: dict[str, Callable[[], object]] = {
        "lines": lambda: by_lines(data),
        "words": lambda: by_words(data),
        "fastskel": native,
        "fastskel, all values": lambda: native(all_values=True),
        "fastskel, to a clip": lambda: read(data, NAME),
    }
    for name, joints in (("lines", by_lines(data)), ("words", by_words(data))):
        if not np.array_equal(joints, native()[3]):
            raise ValueError(f"formats: {name} must agree with fastskel, got other coordinates. Mend one of them.")
    for timing in compare(calls, BASELINE, rounds=rounds):
        yield {"case": f"ntu {len(data)} bytes", **timing.row(), "mb_per_s": len(data) / timing.median_ms / 1e3}


# the command line, and the most that its process had resident: what rusage says begins with its parent's
PACK = """
import re, sys
from fastskel.cli import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read()).group(1))
sys.exit(code)
"""


def write_recordings(folder: Path, num_files: int) -> int:
    """Make up recordings, T from 60 to 120 frames, M 1 or 2 bodies of joints (V, 12); returns their bytes."""
    # numbers are turned to text once: a file takes its bodies from these in an order of its own
    frames = skeleton_text(POOL_FRAMES, 1).split(b"\r\n")[1:-1]
    length = NUM_JOINTS + 3
    bodies = [b"\r\n".join(frames[start + 2 : start + length]) for start in range(0, len(frames), length)]
    rng = np.random.default_rng(1)
    total = 0
    for number in range(num_files):
        num_frames, num_bodies = int(rng.integers(*PACK_FRAMES, endpoint=True)), int(rng.integers(1, 3))
        chosen = rng.integers(len(bodies), size=(num_frames, num_bodies))
        parts = [b"%d" % num_frames]
        for row in chosen.tolist():
            parts.append(b"%d" % num_bodies)
            for body, index in enumerate(row):
                parts += [b"%d 0 1 1 1 1 0 0.5 0.5 2" % (72057594037931648 + body), bodies[index]]
        subject, action = divmod(number, 60)
        path = folder / f"S001C001P{subject % 999 + 1:03}R{subject // 999 + 1:03}A{action + 1:03}.skeleton"
        total += path.write_bytes(b"\r\n".join(parts) + b"\r\n")
    return total


def measure_packing(folder: Path, num_files: int, threads: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Pack made-up recordings, one row for each number of threads: seconds, MB/s and the process's peak resident memory."""
    source = folder / "source"
    source.mkdir()
    num_bytes = write_recordings(source, num_files)
    sums: list[dict[str, str]] = []
    for number in threads:
        out = folder / f"packed-{number}"
        command = [sys.executable, "-c", PACK, "pack", "ntu60", str(source), str(out), "--quiet", "--threads", str(number)]
        begin = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        seconds = time.perf_counter() - begin
        if done.returncode:
            raise RuntimeError(f"formats: {' '.join(command)} ended with code {done.returncode}")
        sums.append(open_dataset(out).meta["checksums"])
        if sums[-1] != sums[0]:
            raise ValueError(f"formats: {number} threads must give the bytes of {threads[0]}, got others. Mend the packing.")
        yield {
            "case": f"pack {num_files} files, {num_bytes} bytes",
            "provider": f"fastskel pack --threads {number}",
            "seconds": seconds,
            "mb_per_s": num_bytes / seconds / 1e6,
            "peak_mb": int(done.stdout.split()[-1]) * 1024 / 1e6,
            "clips": len(open_dataset(out)),
        }
        shutil.rmtree(out)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, append the rows."""
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.formats", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to add rows to")
    parser.add_argument("--file", type=Path, help="skeleton file of NTU RGB+D to parse")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="a tiny file: whether it runs, not how fast")
    parser.add_argument("--pack", type=int, metavar="FILES", help="pack so many made-up files instead")
    parser.add_argument("--folder", type=Path, help="where they go, about 0.45 MB each; by default the temporary files'")
    given = parser.parse_args(arguments)
    if given.pack:
        return _pack(given)
    data = given.file.read_bytes() if given.file else skeleton_text(QUICK_FRAMES if given.quick else NUM_FRAMES)
    source = "genuine file" if given.file else "made up"
    shared = {"part": "formats", "text": source, "quick": given.quick, **origin()}
    rows = [{**row, **shared} for row in measure(data, given.rounds)]
    append_rows(given.out, rows)
    for row in rows:
        print(f"{row['provider']:<22} {row['median_ms']:8.2f} ms {row['mb_per_s']:8.1f} MB/s {row['speedup']:7.1f}x")
    return 0


def _pack(given: argparse.Namespace) -> int:
    cpus = _native.available_cpus()
    shared = {"part": "packing", "text": "made up", "quick": given.quick, **origin()}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for row in measure_packing(Path(folder), given.pack, sorted({1, cpus})):
            append_rows(given.out, [{**row, **shared}])
            print(
                f"{row['provider']:<26} {row['seconds']:8.1f} s {row['mb_per_s']:8.1f} MB/s, "
                f"{row['peak_mb']:.0f} MB at most, {row['clips']:,} clips"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
