"""A packing killed at any moment, and called again, ends as one that was not: byte for byte.

    python tests/data/pack_kill_proof.py --kills 100
    python tests/data/pack_kill_proof.py --every-moment

Packs made-up skeleton texts, from a folder and from a tar archive in turns, once without interruption. Then packs them again
and again: with `--kills`, each process is killed with SIGKILL after a random time and the same call goes on, until the asked
number of kills is reached; with `--every-moment`, a process ends on the spot before the first, second, ... call that changes
the disk (create, rename, remove, fsync), and the same call goes on. It must go on after the last file that the journal speaks
of, and every file of every packing that ends is compared. Clips are committed one by one (COMMIT_SECONDS = 0), and the first
one of two bodies comes in the middle, so that frames are written again with room for it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import signal
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tqdm  # noqa: F401 - imported once, not by each process

from fastskel.data import journal, pack_source
from fastskel.data.journal import FINISHED, JOURNAL

NUM_FRAMES, NUM_JOINTS = 20, 25
# a process lives this part of an uninterrupted packing at most, so a packing takes several
LONGEST_LIFE = 0.4
CRASHED = 9
# calls that change the disk, as Python's audit hooks name them; fsync has no hook
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def skeleton_text(seed: int, num_bodies: int) -> bytes:
    """Made-up text of a recording."""
    joints = np.random.default_rng(seed).normal(size=(NUM_FRAMES, num_bodies, NUM_JOINTS, 3))
    lines = [str(NUM_FRAMES)]
    for bodies in joints:
        lines.append(str(num_bodies))
        for number, body in enumerate(bodies):
            lines += [f"{number + 1} 0 1 1 1 1 0 0.5 0.5 2", str(NUM_JOINTS)]
            lines += [f"{x:.6f} {y:.6f} {z:.6f} 250 200 1000 540 0 0 0 1 2" for x, y, z in body]
    return ("\n".join(lines) + "\n").encode()


def make_sources(folder: Path, num_files: int) -> list[Path]:
    """Write the files into a folder and into an archive; a third of them have two bodies, one has none."""
    (folder / "files").mkdir()
    with tarfile.open(folder / "files.tar", "w") as archive:
        for number in range(num_files):
            name = f"S001C001P{number + 1:03}R001A001.skeleton"
            empty = number == num_files // 3
            data = b"1\n0\n" if empty else skeleton_text(number, 2 if number >= num_files // 2 else 1)
            (folder / "files" / name).write_bytes(data)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return [folder / "files", folder / "files.tar"]


def pack(source: Path, out: Path) -> None:
    """Pack or go on; nothing that the journal speaks of is done twice."""
    record = out.with_name(f"{out.name}.packing") / JOURNAL
    done = max(0, record.read_bytes().count(b"\n") - 1) if record.exists() else 0
    summary = pack_source("ntu60", source, out, threads=2, progress=False)
    assert summary.resumed == done, f"{summary.resumed} of {done} files were taken over"


def start(source: Path, out: Path, crash_at: int | None = None) -> int:
    """Fork a process that packs, and ends before the `crash_at`-th change of the disk, if given (0: never); its id."""
    process = os.fork()
    if process:
        return process
    try:
        if crash_at is not None:
            crash_before(crash_at, str(out))
        pack(source, out)
        os._exit(0)
    except BaseException as error:
        print(f"FAILED: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)


def crash_before(number: int, place: str) -> None:
    """End this process before its `number`-th call that changes the disk at a place."""
    count = 0

    def change() -> None:
        nonlocal count
        count += 1
        if count == number:
            os._exit(CRASHED)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        writes = event != "open" or bool(int(str(arguments[2] or 0)) & (os.O_WRONLY | os.O_RDWR))
        if event in EVENTS and writes and str(arguments[0]).startswith(place):
            change()

    # counted, not carried out: what a process has handed to the system outlives it
    os.fsync = lambda descriptor: change()
    sys.addaudithook(hook)


def finished(process: int) -> bool:
    """Wait for a process; whether it ended by itself, without an error."""
    _, status = os.waitpid(process, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) not in (0, CRASHED):
        raise SystemExit("FAILED: a packing ended with an error")
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def compare(out: Path, expected: dict[str, bytes], about: str) -> None:
    """Exit with an error unless a packing is complete and equal, and nothing is left beside it."""
    beside = out.with_name(f"{out.name}.packing")
    if beside.exists():
        # killed after the destination had its name: the call is refused, and tidies up
        with contextlib.suppress(ValueError):
            pack_source("ntu60", "nothing", out, progress=False)
    found = contents(out)
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if different or beside.exists():
        raise SystemExit(f"FAILED: {about}: {', '.join(different) or beside.name} should not be so")


def where(out: Path) -> str:
    """What a kill interrupted, from what it left behind."""
    folder = out.with_name(f"{out.name}.packing")
    if out.exists():
        return "after the last rename"
    if not (folder / JOURNAL).exists():
        return "before the first file"
    if (folder / FINISHED).exists():
        return "finishing"
    if len(list(folder.glob("frames-*.npy"))) > 1:
        return "making room for another body"
    return "packing"


def prove_kills(kills: int, seed: int, sources: list[Path], folder: Path, expected: dict[str, bytes], seconds: float) -> str:
    """Kill at random moments, go on, compare. Returns the summary; exits with an error at the first difference."""
    chance, counts, packings = random.Random(seed), Counter[str](), 0
    while counts.total() < kills:
        source, out = sources[packings % len(sources)], folder / f"killed-{packings}"
        while not out.exists():
            process = start(source, out)
            if counts.total() < kills:
                time.sleep(chance.uniform(0, LONGEST_LIFE * seconds))
                os.kill(process, signal.SIGKILL)
            if not finished(process):
                counts[where(out)] += 1
        compare(out, expected, f"packing {packings} after {counts.total()} kills")
        packings += 1
    moments = ", ".join(f"{count} {moment}" for moment, count in counts.most_common())
    return (
        f"{counts.total()} kills ({moments}) over {packings} packings of a folder and a tar archive in turns, seed {seed}: "
        f"all {len(expected)} files equal those of the uninterrupted packing, byte for byte"
    )


def prove_moments(sources: list[Path], folder: Path, expected: dict[str, bytes]) -> str:
    """End before every change of the disk in turn, go on, compare."""
    total = 0
    for source in sources:
        moment = 1
        while True:
            out = folder / f"{source.suffix}-{moment}"
            if finished(start(source, out, crash_at=moment)):
                break
            if not out.exists():
                finished(start(source, out, crash_at=0))
            compare(out, expected, f"{source.name}, ended before change {moment}")
            moment += 1
        total += moment - 1
    return (
        f"ended before each of {total} changes of the disk, in packings of a folder and a tar archive: "
        f"all {len(expected)} files equal those of the uninterrupted packing, byte for byte"
    )


def undisturbed(sources: list[Path], folder: Path) -> tuple[dict[str, bytes], float]:
    """Contents of a packing that was left alone, the same from all sources, and its seconds."""
    packed, seconds = [], 0.0
    for number, source in enumerate(sources):
        began = time.perf_counter()
        if not finished(start(source, folder / f"whole-{number}")):
            raise SystemExit("FAILED: an uninterrupted packing was interrupted")
        seconds = time.perf_counter() - began
        packed.append(contents(folder / f"whole-{number}"))
    if any(other != packed[0] for other in packed):
        raise SystemExit("FAILED: folder and archive give other bytes")
    return packed[0], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--every-moment", action="store_true")
    parser.add_argument("--files", type=int, default=60)
    given = parser.parse_args()
    assert threading.active_count() == 1, "processes are forked"
    journal.COMMIT_SECONDS = 0
    with tempfile.TemporaryDirectory() as name:
        sources = make_sources(Path(name), given.files)
        expected, seconds = undisturbed(sources, Path(name))
        runs: list[Callable[[], str]] = []
        if given.kills:
            runs.append(lambda: prove_kills(given.kills, given.seed, sources, Path(name), expected, seconds))
        if given.every_moment:
            runs.append(lambda: prove_moments(sources, Path(name), expected))
        for run in runs:
            print(run())


if __name__ == "__main__":
    sys.exit(main())
