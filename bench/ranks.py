"""What training in several processes costs: the same global batch by one process on all cores, and by one process per core.

    python -m fastskel.bench.ranks --out FILE.jsonl [--processes 2] [--width 256] [--batch 64]

Both are whole trainings by `fastskel pretrain`, loader, log and optimiser included; torchrun starts the several, which exchange
gradients and statistics of the loss by gloo. They take turns, and every turn is a training of its own: its figure is the median
over the steps behind the warm-up, as its log has them. `speedup` above 1 means that the several processes are faster, and the
overhead of distribution is 1 / speedup - 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastskel.bench.children import Child, failure
from fastskel.bench.harness import append_rows, compare, origin
from fastskel.bench.loader import make_data

__all__ = ["Setting", "main", "measure"]

# steps of a training that are not counted: memory is allocated, products are prepared, buckets of gradients are chosen
WARMUP_STEPS = 3
LIMIT_S = 300.0

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One comparison.

    Attributes:
        processes: Processes of the distributed training, one core each; the other has one process and as many threads.
        batch: Samples N of a step, of all processes together.
        width: D.
        steps: Steps that count.
        rounds: Trainings of each kind.
        precision: "fp32" or "bf16".
    """

    processes: int = 2
    batch: int = 64
    width: int = 256
    steps: int = 12
    rounds: int = 5
    precision: str = "bf16"

    @property
    def all_steps(self) -> int:
        """Steps of one training."""
        return WARMUP_STEPS + self.steps

    def command(self, data: Path, run: Path, processes: int) -> list[str]:
        """Return the words after `python` that train in so many processes."""
        threads = str(self.processes // processes)
        start = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        return [
            *start, "-m", "fastskel", "pretrain", "usdrl-dste", str(data), "--out", str(run), "--width", str(self.width),
            "--batch-size", str(self.batch), "--base-batch-size", str(self.batch), "--epochs", "1", "--milestones", "1",
            "--precision", self.precision, "--threads", threads, "--num-threads", threads, "--device", "cpu", "--quiet",
        ]  # fmt: skip


class _Turns:
    """Trainings in turns; its clock counts the time of one step of each."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting, self.folder, self.seconds = setting, folder, 0.0

    def clock(self) -> float:
        return self.seconds

    def train(self, processes: int) -> Callable[[], None]:
        """Return a call that trains once and adds the median seconds of a step to the clock."""
        run, log = self.folder / f"run-{processes}", self.folder / "train.txt"
        threads = {"OMP_NUM_THREADS": str(self.setting.processes // processes)}

        def turn() -> None:
            shutil.rmtree(run, ignore_errors=True)
            status, output = Child(log, LIMIT_S, environment=threads).run(
                *self.setting.command(self.folder / "data", run, processes)
            )
            if status:
                raise RuntimeError(f"ranks: training in {processes} processes ended: {failure(status, output)}")
            records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
            speeds = [record["samples_per_s"] for record in records[WARMUP_STEPS:] if "samples_per_s" in record]
            if len(speeds) != self.setting.steps:
                raise RuntimeError(f"ranks: the log must have {self.setting.steps} steps, got {len(speeds)}. Look at {log}.")
            self.seconds += self.setting.batch / statistics.median(speeds)

        return turn


def measure(setting: Setting, folder: Path) -> Iterator[Row]:
    """Compare both ways of using the cores; one row for each.

    Args:
        setting: What is trained (N, T, M, V, C), by how many processes.
        folder: Where data and runs are written.
    Raises:
        RuntimeError: If a training fails.
    """
    make_data(folder, setting.batch * setting.all_steps)
    turns = _Turns(setting, folder)
    ways = {"one process": turns.train(1), f"{setting.processes} processes": turns.train(setting.processes)}
    for timing in compare(ways, "one process", rounds=setting.rounds, warmup=0, clock=turns.clock):
        yield {
            "case": f"ranks N={setting.batch} D={setting.width} {setting.precision}", "processes": setting.processes,
            "batch": setting.batch, "width": setting.width, "precision": setting.precision, "steps": setting.steps,
            "samples_per_s": 1e3 * setting.batch / timing.median_ms, "overhead": 1 / timing.speedup - 1, **timing.row(),
        }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and append rows."""
    defaults = Setting()
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.ranks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON lines file to add rows to")
    parser.add_argument("--processes", type=int, default=defaults.processes, help="processes, one core each")
    parser.add_argument("--batch", type=int, default=defaults.batch, help="samples N of a step, of all together")
    parser.add_argument("--width", type=int, default=defaults.width, help="width D")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="steps that count")
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="trainings of each kind")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=defaults.precision)
    given = parser.parse_args(arguments)
    out, options = given.out, {name: value for name, value in vars(given).items() if name != "out"}
    if os.cpu_count() and given.processes > (os.cpu_count() or 1):
        parser.error(f"--processes must be at most the {os.cpu_count()} cores, got {given.processes}")
    with tempfile.TemporaryDirectory() as folder:
        rows = list(measure(Setting(**options), Path(folder)))
    if out is not None:
        append_rows(out, [{"part": "ranks", **row, **origin(torch.device("cpu"))} for row in rows])
    for row in rows:
        print(
            f"{row['case']}  {row['provider']:<12} {row['median_ms']:8.1f} ms a step  {row['samples_per_s']:7.1f} samples/s  "
            f"{row['speedup']:.2f}x [{row['speedup_q20']:.2f}, {row['speedup_q80']:.2f}]  "
            f"overhead {100 * row['overhead']:.1f} %  noise {100 * row['uncertainty']:.0f} %"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
