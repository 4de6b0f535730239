"""Put a plan for this machine's processor beside measured steps of a small model: operations, memory, time.

    python -m fastskel.bench.plan_check [--steps 7] [--json]

Times are of one process on this machine's processor, with torch's present number of threads.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from fastskel.bench.harness import CPU_ATTENTION, peak_bytes
from fastskel.bench.machine import measure as measure_machine
from fastskel.bench.plan import Workload, machine_of, stage_of, step_times
from fastskel.bench.plan_counts import count_step
from torch.utils.flop_counter import FlopCounterMode

from fastskel.data.batch import Batch, View
from fastskel.data.loader import num_chunks
from fastskel.recipes import RECIPES
from fastskel.skeleton import Topology
from fastskel.train import Stage, start
from fastskel.train.chunked import Gradients, choose_gradients
from fastskel.train.optimiser import build_optimizer

__all__ = ["compare", "main", "make_step", "operations"]

WIDTH, FRAMES, BATCH, CHUNK, JOINTS, BODIES = 64, 32, 32, 8, 25, 2
WARMUP_STEPS = 2


def _added(into: Sequence[int], left: Sequence[int], right: Sequence[int], **options: object) -> int:
    return 2 * math.prod(left) * right[-1]


# products that add to a tensor that is there, for which torch has no formulas
IN_PLACE = {torch.ops.aten.addmm_: _added, torch.ops.aten.baddbmm_: _added}


def make_chunks(stage: Stage, rows: int, chunk: int | None) -> list[Batch]:
    """Make random views (n, T, M, V, C) of a batch, in chunks as the loader cuts it."""
    options, generator = stage.encoder_options, torch.Generator().manual_seed(stage.seed)
    shape = [options[f"num_{name}"] for name in ("frames", "bodies", "joints", "channels")]
    found = []
    for index in torch.tensor_split(torch.arange(rows), num_chunks(rows, chunk)):
        views = [
            View(
                torch.randn(len(index), *shape, generator=generator),
                torch.ones(len(index), *shape[:2], dtype=torch.bool), Topology.unknown(shape[2]),
            ) for _ in stage.views
        ]  # fmt: skip
        found.append(Batch(views, torch.zeros_like(index), index).at(stage.seed, 0))
    return found


def make_step(stage: Stage, world: int = 1) -> tuple[Callable[[], None], Callable[[], None], Gradients]:
    """Build what a plan counts, on a CPU, for views (n, T, M, V, C) in chunks.

    Returns:
        What makes the gradients of a step and leaves them, what applies them, and how they are made.
    """
    encoder, objective = start(stage)
    encoder.train()
    objective.train()
    rows, chunk = stage.batch_size // world, stage.chunk and stage.chunk // world
    batches = make_chunks(stage, rows, chunk)
    gradients = choose_gradients(
        encoder, objective, num_rows=rows, num_chunks=len(batches), synchronise_norms=stage.synchronise_norms,
        autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=stage.precision != "fp32"),
    )  # fmt: skip
    optimizer = build_optimizer(stage, objective.param_groups(encoder))

    def differentiate() -> None:
        optimizer.zero_grad(set_to_none=True)
        # views stay with the caller: a plan counts them apart
        gradients([iter(batches) for _ in range(gradients.passes)], 0.0)

    def apply() -> None:
        optimizer.step()

    return differentiate, apply, gradients


def operations(call: Callable[[], None]) -> int:
    """Count the operations of a call's matrix products by torch's counter and its formulas."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION | IN_PLACE) as counter:
        call()
    return int(counter.get_total_flops())


def compare(stage: Stage, workload: Workload, steps: int) -> dict[str, tuple[float, float]]:
    """Return (planned, measured) by name, of views (n, T, M, V, C) on this processor: operations, peak bytes, seconds."""
    machine = machine_of(measure_machine(torch.device("cpu")), "this machine")
    counts = count_step(stage, gpu=False)
    planned = step_times(counts, stage, machine, workload)
    differentiate, apply, _ = make_step(stage)
    times = []
    for _ in range(WARMUP_STEPS + steps):
        begin = time.perf_counter()
        differentiate()
        apply()
        times.append(time.perf_counter() - begin)
    return {
        "operations": (counts.flops, operations(differentiate)),
        "peak bytes": (counts.peak, peak_bytes(differentiate)),
        "seconds of a step": (planned.step, statistics.median(times[WARMUP_STEPS:])),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print both; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.plan_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=7, help="steps that are timed")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    given = parser.parse_args(arguments)
    recipe = replace(
        RECIPES["usdrl-demo"](), width=WIDTH, frames=FRAMES, crop_min_frames=FRAMES, batch_size=BATCH, drop_path=0.0
    )
    found = {}
    for name, chunk in (("whole", None), (f"chunks of {CHUNK}", CHUNK)):
        stage = stage_of(replace(recipe, chunk=chunk), JOINTS, BODIES)
        for what, (planned, measured) in compare(stage, Workload(), given.steps).items():
            found[f"{name}, {what}"] = {"planned": planned, "measured": measured, "ratio": measured / planned}
    if given.json:
        print(json.dumps(found))
        return 0
    print(f"{'':<34} {'planned':>14} {'measured':>14} {'ratio':>7}")
    for name, row in found.items():
        print(f"{name:<34} {row['planned']:>14,.4g} {row['measured']:>14,.4g} {row['ratio']:>7.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
