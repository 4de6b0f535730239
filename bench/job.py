"""The whole job: pretraining steps with the loader on, samples per second, and what an epoch and a recipe would take.

    python -m fastskel.bench.job --out FILE.jsonl [--device cuda|cpu] [--providers NAME ...]

All take turns in one process: the reference, as `fastskel.bench.training` has it, fed by worker processes of torch's DataLoader
over the plain feeder; and fastskel, fed by its native loader's threads. Each reads its loss in every step, as both training loops
do. They start from the same weights, and loss and gradients of one batch must agree before anything is timed.

A turn begins with nothing made ahead: its first steps are not timed and bring the loader to its pace, and what a loader has made
ahead at the end is thrown away, not timed. So between turns no worker has anything to do, and nobody begins with batches that
cost nothing.

The clips have NTU-60's shape: 60 to 120 frames, two bodies, 25 joints. Files hold a few thousand distinct ones, which an epoch
visits until it has visited as many as NTU-60 has, 40,091: all of them would fill more than 2 GB, and a step's work is the same.
`epoch_s` and `recipe_h` are extrapolated from the steps that were timed (`from_steps`).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fastskel.bench.contest import Contest
from fastskel.bench.devices import add_device
from fastskel.bench.energy import EnergyMeter
from fastskel.bench.harness import append_rows, origin
from fastskel.bench.loader import make_data
from fastskel.bench.providers import tf32
from fastskel.bench.systems import (
    EPOCHS,
    PREFETCH,
    THREADS,
    WORKERS,
    Job,
    System,
    check,
    default_providers,
    hold_one_batch,
    make_systems,
)  # fmt: skip
from fastskel.bench.train_steps import VIEWS, Setting

from fastskel import _native

__all__ = ["main", "measure"]

Row = dict[str, Any]

# timed steps of a turn at least
STEPS = 8
# a step of the published size takes minutes on two cores
CPU = dict(batch=32, width=256)
QUICK = dict(batch=8, width=32, frames=16, rounds=1, limit_s=0.0)


class _Stopwatch:
    """A clock that stands still while something is not timed."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._left_out = clock, 0.0

    def __call__(self) -> float:
        return self._clock() - self._left_out

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        begin = self._clock()
        try:
            yield
        finally:
            self._left_out += self._clock() - begin


@dataclass
class _Turn:
    """Turns of one system, to be called by `compare`.

    Attributes:
        waits: Seconds that the timed steps of each turn waited for their batches.
        joules: Energy of the timed steps of each turn, None where it is not readable.
    """

    system: System
    job: Job
    watch: _Stopwatch
    meter: EnergyMeter
    waits: list[float] = field(default_factory=list)
    joules: list[float | None] = field(default_factory=list)

    def __call__(self) -> None:
        """Bring the loader to its pace, train, and throw away what was made ahead."""
        lead = self.job.lead
        with self.watch.stopped():
            batches = self.system.batches(lead + self.job.steps + lead)
            for batch in itertools.islice(batches, lead):
                self.system.step(batch)
        before, waited = self.meter.read(), 0.0
        for _ in range(self.job.steps):
            begin = self.watch()
            batch = next(batches)
            waited += self.watch() - begin
            self.system.step(batch)
        after = self.meter.read()
        self.waits.append(waited)
        self.joules.append(self.meter.joules(before, after))
        with self.watch.stopped():
            for _ in batches:
                pass


def measure(job: Job, folder: Path) -> Iterator[Row]:
    """Run the job in turns.

    Args:
        job: What is trained, and by whom.
        folder: Where the clips are written.
    Returns:
        One row for each provider, `status` "ok", "failed", where it does not agree among others, or "unavailable".
    Raises:
        ValueError: If the reference itself is wrong in its own precision.
    """
    setting, dataset = job.setting, make_data(folder, job.distinct)
    systems, rows = make_systems(job, dataset)
    yield from rows
    watch, meter, contest = _Stopwatch(), EnergyMeter(setting.device), Contest(setting.device)
    turns = {name: _Turn(system, job, watch, meter) for name, system in systems.items()}
    exact = hold_one_batch(job, dataset, systems)

    def ready(name: str) -> tuple[_Turn, Row]:
        system = systems[name]
        about = {"about": system.kind.about, "precision": setting.precision(system.kind)}
        about |= check(setting, system.kind, system.train, exact)
        system.prepare()
        return turns[name], about

    try:
        for name in systems:
            contest.enter(name, functools.partial(ready, name))
        # the watch runs for a part of each turn only
        timed_s = setting.limit_s * job.steps / (job.steps + job.lead)
        for row in contest.rows(rounds=setting.rounds, warmup=1, limit_s=timed_s, clock=watch):
            energy = {"energy_of": meter.source or "not readable"}
            yield row | _figures(job, row, turns[row["provider"]]) | energy if row["status"] == "ok" else row
    finally:
        for system in systems.values():
            system.close()


def _figures(job: Job, row: Row, turn: _Turn) -> Row:
    """Figures of one provider, of steps rather than turns."""
    step = {name: row[name] / job.steps for name in ("median_ms", "q20_ms", "q80_ms")}
    # turns of the warm-up are not among the timing's
    waits, joules = turn.waits[-row["rounds"] :], turn.joules[-row["rounds"] :]
    waited = statistics.median(waits) / job.steps
    known = [value for value in joules if value is not None]
    rate = 1e3 * job.setting.batch / step["median_ms"]
    per_sample = statistics.median(known) / (job.steps * job.setting.batch) if known else None
    epoch_s = job.clips / rate
    return {
        **step, "samples_per_s": rate, "waited_ms": 1e3 * waited, "waited_share": 1e3 * waited / step["median_ms"],
        "epoch_s": epoch_s, "recipe_h": job.epochs * epoch_s / 3600, "extrapolated": True,
        "from_steps": row["rounds"] * job.steps, "joules_per_sample": per_sample,
        "recipe_kwh": None if per_sample is None else per_sample * job.clips * job.epochs / 3.6e6,
    }  # fmt: skip


def line(row: Row) -> str:
    """Say a row in one line."""
    if row["status"] != "ok":
        return f"{row['provider']:<22}{row['status'].upper()} {row.get('reason') or row['error']}"
    energy = "energy not readable" if row["joules_per_sample"] is None else f"{row['joules_per_sample']:.3g} J a sample"
    return (
        f"{row['provider']:<22}{row['median_ms']:9.1f} ms a step  {row['samples_per_s']:8.1f} samples/s  {row['speedup']:5.2f}x "
        f"[{row['speedup_q20']:.2f}, {row['speedup_q80']:.2f}]  waits {100 * row['waited_share']:4.1f} %  extrapolated: "
        f"epoch {row['epoch_s']:.0f} s, {row['epochs']} epochs {row['recipe_h']:.1f} h  {energy}"
    )


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.job", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to add rows to")
    add_device(parser)
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="who takes part; the reference always does")
    parser.add_argument("--batch", type=int, help=f"samples N; the published 356, on a CPU {CPU['batch']}")
    parser.add_argument("--width", type=int, help=f"D; the published 1024, on a CPU {CPU['width']}")
    parser.add_argument("--steps", type=int, help="timed steps of a turn; 8, or as many as the workers make ahead")
    parser.add_argument("--rounds", type=int, help="rounds of a turn each, 9 by default")
    parser.add_argument("--limit-s", type=float, default=120.0, help="seconds, about, after which no round begins")
    parser.add_argument("--workers", type=int, help=f"processes of the reference's feeder; one a processor, at most {WORKERS}")
    parser.add_argument("--threads", type=int, help=f"threads of the native loader; one a processor, at most {THREADS}")
    parser.add_argument("--distinct", type=int, default=2_000, help="clips that the files hold")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the recipe that is extrapolated to")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    return parser.parse_args(arguments)


@tf32(False)
def main(arguments: list[str] | None = None) -> int:
    """Run the job, print and append its rows; returns 1 if a provider of fastskel failed, else 0."""
    given = _arguments(arguments)
    sizes: dict[str, Any] = {"rounds": 9, "limit_s": given.limit_s} | (CPU if given.device == "cpu" else {})
    sizes |= QUICK if given.quick else {}
    sizes |= {name: value for name in ("batch", "width", "rounds") if (value := getattr(given, name)) is not None}
    device, cpus = torch.device(given.device), _native.available_cpus()
    setting = Setting(device=device, providers=tuple(given.providers or default_providers(device)), **sizes)
    workers = given.workers or min(cpus, WORKERS)
    job = Job(
        setting, steps=given.steps or (1 if given.quick else max(STEPS, PREFETCH * workers)), workers=workers,
        threads=given.threads or min(cpus, THREADS), distinct=2 * setting.batch if given.quick else given.distinct,
        epochs=given.epochs,
    )  # fmt: skip
    about = {
        "batch": setting.batch, "width": setting.width, "frames": setting.frames, "views": VIEWS, "workers": job.workers,
        "prefetch": PREFETCH, "loader_threads": job.threads, "steps": job.steps, "lead_steps": job.lead, "clips": job.clips,
        "distinct_clips": job.distinct, "epochs": job.epochs, "quick": given.quick, **origin(setting.device),
    }  # fmt: skip
    case = f"usdrl-dste D={setting.width} N={setting.batch}"
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for figures in measure(job, Path(folder)):
            row = {"part": "job", "case": case, **figures, **about}
            append_rows(given.out, [row])
            print(line(row), flush=True)
            failed |= row["status"] == "failed" and row["provider"].startswith("fastskel")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
