"""Parsers of raw text beside plain Python ones, in turns on one core: NTU RGB+D skeleton text.

Run as `python -m fastskel.bench.formats --out FILE.jsonl`. The text is made up, in the layout and with the digits of the
data set's files, or one of its files (`--file`); coordinates must agree bit for bit before parsers are timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fastskel.bench.harness import append_rows, compare, origin
from numpy.typing import NDArray

from fastskel import _native
from fastskel.data.formats.ntu import read

__all__ = ["by_lines", "by_words", "main", "measure", "skeleton_text"]

BASELINE = "lines"
NUM_JOINTS = 25
NUM_FRAMES, QUICK_FRAMES = 300, 5
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


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, append the rows."""
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.formats", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to add rows to")
    parser.add_argument("--file", type=Path, help="skeleton file of NTU RGB+D to parse")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="a tiny file: whether it runs, not how fast")
    given = parser.parse_args(arguments)
    data = given.file.read_bytes() if given.file else skeleton_text(QUICK_FRAMES if given.quick else NUM_FRAMES)
    source = "genuine file" if given.file else "made up"
    shared = {"part": "formats", "text": source, "quick": given.quick, **origin()}
    rows = [{**row, **shared} for row in measure(data, given.rounds)]
    append_rows(given.out, rows)
    for row in rows:
        print(f"{row['provider']:<22} {row['median_ms']:8.2f} ms {row['mb_per_s']:8.1f} MB/s {row['speedup']:7.1f}x")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
