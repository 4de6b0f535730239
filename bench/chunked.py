"""Peak memory and time of a training step against the batch: the reference's way, fastskel whole, fastskel in chunks.

    python -m fastskel.bench.chunked [--out FILE.jsonl] [--batches N ...] [--chunk n] [--limit-gib G]

Every case is a process of its own, which loads batches of four views, takes the published loss and steps Adam. On a CPU the peak
is that of the process, with all it has imported and the clips it has mapped (1.2 KB each); on a GPU that of the memory torch
allocated. Peaks of a way without chunks grow in proportion to the batch: a size whose peak would exceed the limit is not run, and
its row says so. Operations are those of matrix products, counted in one more step, after the peak was read: counting takes memory
too. Times are of processes one after the other, so that only large ratios mean anything. `embeddings_bytes` are the embeddings of
the batch and their gradient, which is what must grow.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastskel.bench.devices import add_device
from fastskel.bench.harness import append_rows, flops, origin
from fastskel.bench.reference import loss as reference_loss
from fastskel.bench.reference.usdrl import USDRL

from fastskel.data import Batch, Loader, PackedDataset, open_dataset, pack_arrays
from fastskel.data.loader import num_chunks
from fastskel.recipes import RECIPES
from fastskel.train import Stage, start
from fastskel.train.chunked import choose_gradients

__all__ = ["PROVIDERS", "Case", "main", "measure"]

PROVIDERS = ("reference", "whole", "chunked")
BATCHES, CHUNK, LIMIT_GIB = (128, 512, 2048, 8192), 128, 6.0
FRAMES, VIEWS, CLIP_FRAMES, JOINTS = 16, 4, 4, 25
WARMUP_STEPS, SEED = 1, 5

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One process.

    Attributes:
        provider: "reference", "whole" or "chunked".
        batch: Samples N of a step.
        chunk: Most samples at a time, where the provider takes chunks.
        width: D.
        steps: Steps that are timed.
        device: "cpu" or "cuda".
    """

    provider: str
    batch: int
    chunk: int = CHUNK
    width: int = 16
    steps: int = 3
    device: str = "cpu"

    def stage(self, dataset: PackedDataset) -> Stage:
        """Return the stage for clips (T, M, V, C)."""
        recipe = replace(
            RECIPES["usdrl-demo"](), width=self.width, frames=FRAMES, crop_min_frames=FRAMES, num_views=VIEWS, normalise="none",
            batch_size=self.batch, chunk=self.chunk if self.provider == "chunked" else None, num_threads=0,
        )  # fmt: skip
        return recipe.stages(dataset)[0]


def make_clips(folder: Path, number: int) -> PackedDataset:
    """Pack short random clips, (4, 1, 25, 3) each: what they show does not matter, and a mapped file counts as memory."""
    generator = np.random.default_rng(SEED)
    clips = (generator.standard_normal((CLIP_FRAMES, 1, JOINTS, 3), np.float32) for _ in range(number))
    return pack_arrays(clips, out=folder, topology="ntu-25")


def _own(stage: Stage, loader: Loader, device: torch.device) -> Callable[[], None]:
    encoder, objective = start(stage)
    encoder.to(device).train()
    # skipping makes products of ever new sizes, each of which torch's CPU library keeps compiled: up to hundreds of MiB, whatever
    # the batch. the reference masks too
    encoder.configure(drop_path_mode="mask")  # type: ignore[operator]
    objective.to(device).train()
    gradients = choose_gradients(
        encoder, objective, num_rows=stage.batch_size, num_chunks=num_chunks(stage.batch_size, stage.chunk),
        synchronise_norms=False, autocast=lambda: torch.autocast(device.type, enabled=False),
    )  # fmt: skip
    optimizer = torch.optim.Adam(objective.param_groups(encoder), stage.lr, fused=True)
    steps = _endless(lambda: loader.steps(stage.chunk, gradients.passes))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        gradients([(part.at(stage.seed, 0) for part in parts) for parts in next(steps)], 0.0)
        optimizer.step()

    return step


def _reference(stage: Stage, loader: Loader, device: torch.device) -> Callable[[], None]:
    config = stage.encoder_options
    model = USDRL(
        JOINTS * 3, FRAMES * 3, config["width"], config["num_heads"], config["num_layers"], config["alpha"], config["gap"],
        drop_path=config["drop_path"],
    ).to(device).train()  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), stage.lr, fused=True)
    batches: Iterator[Batch] = _endless(lambda: iter(loader))

    def step() -> None:
        # N, C, T, V, M, as the reference's feeder lays clips out
        views = [view.clips.permute(0, 4, 1, 3, 2).contiguous() for view in next(batches).views]
        optimizer.zero_grad(set_to_none=True)
        z_t, z_s, z_i = model(*views)
        loss = reference_loss.total(z_t, z_s, z_i, weighting="aaai")
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _endless(epoch: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    while True:
        yield from epoch()


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # of this program: the peak that getrusage tells may be its parent's
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def measure(case: Case, data: Path) -> Row:
    """Run a case in this process, on the first clips (T, M, V, C) of a data set.

    Returns:
        Peak before and after the steps, operations of one, median time of those after the first, bytes of the embeddings.
    """
    dataset, device = open_dataset(data), torch.device(case.device)
    torch.manual_seed(SEED)
    stage = case.stage(dataset)
    indices = np.arange(case.batch)
    loader = Loader(
        dataset, views=stage.views, batch_size=case.batch, seed=SEED, num_threads=0, indices=indices, device=device
    )
    step = (_reference if case.provider == "reference" else _own)(stage, loader, device)
    before = _peak(device)
    times = []
    for _ in range(WARMUP_STEPS + case.steps):
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - begin))
    # the kernel counts pages of each thread in batches: its peak may fall by some
    peak = max(before, _peak(device))
    return {
        "start_bytes": before, "peak_bytes": peak, "flops": flops(step), "median_ms": statistics.median(times[WARMUP_STEPS:]),
        "embeddings_bytes": 2 * VIEWS * case.batch * 8 * case.width * 4,
    }  # fmt: skip


def _apart(case: Case, data: Path) -> Row:
    """Run a case in a process of its own; one that fails, or is ended, is a row with its error."""
    done = subprocess.run(
        [sys.executable, "-m", "fastskel.bench.chunked", "--one", json.dumps(vars(case)), "--data", str(data)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        return {"status": "failed", "error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:500]}
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return {**row, "status": "ok"}


def _expected(case: Case, earlier: Sequence[Row]) -> int:
    """Bytes that a case will take if what it adds to an empty process grows in proportion to the batch, as it does whole."""
    sound = [row for row in earlier if row["status"] == "ok" and row["provider"] == case.provider]
    if case.provider == "chunked" or not sound:
        return 0
    last = sound[-1]
    return int(last["start_bytes"] + (last["peak_bytes"] - last["start_bytes"]) * case.batch / last["batch"])


def line(row: Row, whole: Row | None) -> str:
    """Say a row in one line; operations beside those of the whole batch."""
    start = f"{row['provider']:<10} {row['batch']:>6}"
    if row["status"] != "ok":
        why = f"would take {row['expected_bytes'] / 2**30:.1f} GiB" if row["status"] == "not run" else row["error"][:80]
        return f"{start}  {row['status']}: {why}"
    ratio = f"  {row['flops'] / whole['flops']:.3f} x the operations" if whole and row["provider"] == "chunked" else ""
    added = (row["peak_bytes"] - row["start_bytes"]) / 2**20
    return f"{start}  peak {row['peak_bytes'] / 2**20:8.0f} MiB (+{added:.0f})  {row['median_ms']:9.1f} ms{ratio}"


def main(arguments: list[str] | None = None) -> int:
    """Measure every provider at every batch, print and append rows; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.chunked", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON lines file to add rows to")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--chunk", type=int, default=CHUNK)
    parser.add_argument("--width", type=int, default=Case.width)
    parser.add_argument("--steps", type=int, default=Case.steps, help="steps that are timed")
    parser.add_argument("--limit-gib", type=float, default=LIMIT_GIB, help="largest peak that is tried")
    add_device(parser, "cpu")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        print(json.dumps(measure(Case(**json.loads(given.one)), given.data)))
        return 0
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        data = make_clips(Path(folder) / "data", max(given.batches)).path
        for batch in sorted(given.batches):
            for provider in PROVIDERS:
                case = Case(provider, batch, given.chunk, given.width, given.steps, given.device)
                expected = _expected(case, rows)
                found = {"status": "not run", "expected_bytes": expected}
                if expected <= given.limit_gib * 2**30:
                    found = _apart(case, data)
                rows.append({"part": "chunked", **vars(case), **found})
                beside = [row for row in rows if row["batch"] == batch and row["provider"] == "whole" and row["status"] == "ok"]
                print(line(rows[-1], beside[0] if beside else None), flush=True)
    if given.out:
        append_rows(given.out, [{**row, **origin(torch.device(given.device))} for row in rows])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
