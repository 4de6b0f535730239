"""Mutates seeds of every reader for a while, and saves what breaks one.

    python tests/data/fuzz/run.py --seconds 60 --targets sbu pyskl

Each target runs in a process of its own, with limits on memory and time; if it dies, the case that it died of is saved as
well. Mutations follow from --seed, so that a number of executions is the same ones every time; cases that took a way through
the library that none had taken before are mutated further. What is in --corpus, such as earlier findings, runs first.
Findings are made smaller and written to --out: a folder each, with the files and what happened. Ends with 1 if there are any.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import pickle
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random

import numpy as np

# importing registers targets
import others  # noqa: F401
import seeds  # noqa: F401
from harness import FINDING, TARGETS, Case, Outcome, Target, execute, limit_memory, read_case, write_case
from mutators import mutated

CORPUS = Path(__file__).parent / "findings"
# memory where there is such a file system: what is packed is written whole
_SCRATCH = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
_ARENA_BYTES = 16 << 20
# a reader that no signal of the interpreter stops, because it hangs in C
_HANG_SECONDS = 120.0
# of the cases, one in so many is packed as well
_PACK_EVERY = 8
_SHRINK_TRIES = 400
_MOST_FINDINGS = 20


@dataclass
class Tally:
    """What came of the executions of one target."""

    target: str
    executions: int = 0
    seconds: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict)
    ways: int = 0
    findings: list[str] = field(default_factory=list)


class Arena:
    """Memory that outlives the process that executes: the case that runs, and how many ran before."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _ARENA_BYTES)

    def note(self, number: int, case: Case) -> None:
        content = pickle.dumps(case)
        self._memory[16 : 16 + len(content)] = content
        struct.pack_into("<qq", self._memory, 0, number, len(content))

    @property
    def number(self) -> int:
        return int(struct.unpack_from("<q", self._memory, 0)[0])

    def case(self) -> Case:
        size = struct.unpack_from("<q", self._memory, 8)[0]
        # it is what `note` wrote
        return pickle.loads(self._memory[16 : 16 + size])


class Findings:
    """Saves what broke a reader, each way of breaking it once."""

    def __init__(self, out: Path, target: str) -> None:
        self.folder = out / target
        self.saved: list[str] = []
        self._known: set[tuple[object, ...]] = set()

    def is_new(self, outcome: Outcome) -> bool:
        key = (outcome.kind, *outcome.behaviour)
        new = key not in self._known and len(self._known) < _MOST_FINDINGS
        self._known.add(key)
        return new

    def save(self, outcome: Outcome, case: Case) -> None:
        digest = hashlib.sha256(repr(sorted(case.items())).encode()).hexdigest()[:10]
        folder = self.folder / f"{outcome.kind}-{digest}"
        shutil.rmtree(folder, ignore_errors=True)
        write_case(case, folder)
        way = " > ".join(":".join(map(str, step)) for step in outcome.behaviour if isinstance(step, tuple))
        (folder / FINDING).write_text(f"{outcome.kind}\n{outcome.detail[:2000]!r}\n{way}\n")
        self.saved.append(f"{folder}: {outcome.kind}: {outcome.detail[:300]!r} ({way})")


def cases_to_start_from(target: Target, corpus: Path) -> tuple[list[Case], list[Case]]:
    """Seeds, which must be taken, and what the corpus holds of the target, which must not break it."""
    made = target.seeds(np.random.default_rng(0))
    folder = corpus / target.name
    return made, [read_case(case) for case in sorted(folder.iterdir())] if folder.is_dir() else []


def fuzz(target: Target, options: argparse.Namespace, start: int, arena: Arena) -> Tally:
    """Run the seeds, the corpus and mutations of them; `start` executions have been made before a crash."""
    tally, kinds = Tally(target.name), Counter[str]()
    findings, random = Findings(options.out, target.name), Random(f"{options.seed}/{target.name}/{start}")
    made, kept = cases_to_start_from(target, options.corpus)
    begin = time.monotonic()
    ways: set[tuple[object, ...]] = set()
    grown: list[Case] = []
    # the corpus has run before a crash; what crashed may be in it
    first = [*made, *kept] if start == 0 else []
    with tempfile.TemporaryDirectory(dir=_SCRATCH) as scratch:
        folder = Path(scratch) / "case"
        folder.mkdir()
        number = start
        while number < options.executions and (number == start or time.monotonic() - begin < options.seconds):
            place = number - start
            if place < len(first):
                case, packing = first[place], True
            else:
                pool = grown if grown and random.randrange(2) else [*made, *kept]
                case, packing = mutated(random.choice(pool), made, random, target.renames), random.randrange(_PACK_EVERY) == 0
            arena.note(number, case)
            outcome = execute(target, case, folder, packing)
            emptied(folder)
            number += 1
            kinds[outcome.kind] += 1
            if start == 0 and place < len(made) and outcome.kind not in ("taken", "skipped"):
                outcome = Outcome("seed", f"{outcome.kind}: {outcome.detail}", ())
            if outcome.sound or outcome.kind == "seed":
                if outcome.behaviour not in ways and place >= len(first):
                    grown.append(case)
                ways.add(outcome.behaviour)
            if not outcome.sound and findings.is_new(outcome):
                smaller = shrunk(target, case, outcome, folder, packing)
                findings.save(replace(outcome, detail=outcome.detail.replace(str(folder), "CASE")), smaller)
    tally.executions, tally.seconds, tally.kinds = number - start, time.monotonic() - begin, dict(kinds)
    tally.ways, tally.findings = len(ways), findings.saved
    return tally


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            # a new file next time: this one may still be mapped
            path.unlink()


def shrunk(target: Target, case: Case, outcome: Outcome, folder: Path, packing: bool) -> Case:
    """Leave out what the finding does not need: whole files, then pieces of them."""
    tries = 0 if outcome.kind == "time" else _SHRINK_TRIES

    def still(smaller: Case) -> bool:
        found = execute(target, smaller, folder, packing)
        emptied(folder)
        return (found.kind, found.behaviour) == (outcome.kind, outcome.behaviour)

    for name in list(case):
        rest = {other: data for other, data in case.items() if other != name}
        if rest and tries > 0 and still(rest):
            case = rest
    for name in list(case):
        size = max(1, len(case[name]) // 2)
        while size >= 1 and tries > 0:
            at = 0
            while at < len(case[name]) and tries > 0:
                smaller = {**case, name: case[name][:at] + case[name][at + size :]}
                tries -= 1
                if still(smaller):
                    case = smaller
                else:
                    at += size
            size //= 2
    return case


def run_apart(target: Target, options: argparse.Namespace) -> Tally:
    """Fuzz in a process of its own, again and again if it dies, and save what it died of."""
    total, start, arena = Tally(target.name), 0, Arena()
    findings, kinds = Findings(options.out, target.name), Counter[str]()
    end = time.monotonic() + options.seconds
    while True:
        with tempfile.NamedTemporaryFile("r") as report:
            process = os.fork()
            if process == 0:
                _in_child(target, options, start, arena, Path(report.name))
            died = _waited(process, arena)
            if died == 0:
                part = Tally(**json.loads(report.read()))
                total.executions += part.executions
                total.ways = max(total.ways, part.ways)
                total.findings += part.findings
                kinds.update(part.kinds)
                break
        kind = "hang" if died == signal.SIGKILL else "crash"
        outcome = Outcome(kind, f"the process ended with signal {died}", (("", died),))
        kinds[kind] += 1
        if findings.is_new(outcome):
            findings.save(outcome, arena.case())
        total.executions += arena.number + 1 - start
        start = arena.number + 1
        options.seconds = max(1.0, end - time.monotonic())
    total.kinds, total.findings = dict(kinds), total.findings + findings.saved
    return total


def _in_child(target: Target, options: argparse.Namespace, start: int, arena: Arena, report: Path) -> None:
    code = 1
    try:
        # what is packed here need not outlive a power failure
        os.fsync = lambda descriptor: None  # type: ignore[assignment]
        limit_memory()
        report.write_text(json.dumps(asdict(fuzz(target, options, start, arena))))
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(code)


def _waited(process: int, arena: Arena) -> int:
    """Wait for a process; returns the signal that ended it, 0 if none, and kills it where it does not go on."""
    number, since = arena.number, time.monotonic()
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the harness itself failed"
            return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if arena.number != number:
            number, since = arena.number, time.monotonic()
        elif time.monotonic() - since > _HANG_SECONDS:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.01)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=sorted(TARGETS), default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--executions", type=int, default=1 << 62, help="at most, of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="folder of cases that run first")
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"), help="folder for findings")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    tallies = []
    print(f"{'target':<20}{'executions':>12}{'taken':>10}{'skipped':>10}{'refused':>10}{'ways':>6}{'findings':>10}")
    seconds = options.seconds
    for name in options.targets:
        options.seconds = seconds
        tally = run_apart(TARGETS[name], options)
        tallies.append(tally)
        counts = "".join(f"{tally.kinds.get(kind, 0):>10,}" for kind in ("taken", "skipped", "refused"))
        print(f"{name:<20}{tally.executions:>12,}{counts}{tally.ways:>6}{len(tally.findings):>10}", flush=True)
        for finding in tally.findings:
            print(f"  {finding}", flush=True)
    if options.json is not None:
        figures = [{**asdict(tally), "format": TARGETS[tally.target].format} for tally in tallies]
        options.json.write_text(json.dumps(figures, indent=1))
    return int(any(tally.findings for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
