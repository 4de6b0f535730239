"""Time one training step of a recipe: forward, loss, backward and optimiser, on batches that are already on the device or fed.

Run as `python -m fastskel.bench.step --recipe usdrl-dste --precision bf16`; the last line printed is one JSON object, and
`--out FILE.jsonl` adds a row to a file. Other systems are compared with it in `fastskel.bench.training`.
A process per case: peak memory starts from nothing, and an error of the device ends with the process.
`--feed cached` repeats one batch and leaves the loader out; `native` and `triton` draw a new batch from that engine of the loader
in every step, so that their time beside the cached one is what loading costs. DropPath is drawn on the host in every step, as
in training.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from fastskel.bench.devices import add_device
from fastskel.bench.harness import append_rows, origin
from fastskel.bench.training import CPU_BATCH
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastskel.data import Batch, Loader, make_synthetic
from fastskel.recipes import RECIPES
from fastskel.train import start

__all__ = ["FEEDS", "PRECISIONS", "STEP_RECIPES", "Feed", "main", "measure", "setup"]

Feed = Literal["cached", "native", "triton"]
FEEDS: tuple[Feed, ...] = ("cached", "native", "triton")

STEP_RECIPES = ("usdrl-dste", "usdrl-sttr")
PRECISIONS = ("bf16", "fp32")
# the published setting has two bodies, present or not
NUM_BODIES = 2
WARMUP_STEPS = 3
# enough steps for quantiles, few enough that fp32 without TF32 ends within the budget
MIN_STEPS, MAX_STEPS, BUDGET_S = 5, 30, 15.0
# sizes at which a step takes milliseconds on a CPU: whether it runs, not how fast
QUICK = {"width": 32, "frames": 16, "crop_min_frames": 16, "batch_size": 8}
# an epoch begins with an empty ring, which is no part of a step's usual cost
FED_BATCHES, FED_THREADS = 8, 2


def _endless(loader: Loader) -> Iterator[Batch]:
    return itertools.chain.from_iterable(iter(loader) for _ in itertools.count())


def setup(
    recipe: str, precision: str, device: torch.device, *, batch_size: int | None = None, quick: bool = False,
    feed: Feed = "cached",
) -> tuple[Callable[[int], Tensor], dict[str, Any]]:  # fmt: skip
    """Prepare a training step of a registered recipe on synthetic motion.

    Args:
        recipe: Name in `RECIPES`.
        precision: "bf16" or "fp32".
        device: Where the step runs.
        batch_size: N; None takes the recipe's.
        quick: Take tiny sizes instead of the recipe's.
        feed: "cached", or the engine of the loader that makes every step's batch.
    Returns:
        The step, from its number to its loss (), and what describes it.
    """
    changes: dict[str, Any] = {**(QUICK if quick else {}), "precision": precision}
    if batch_size is not None:
        changes["batch_size"] = batch_size
    settings = replace(RECIPES[recipe](), **changes)
    with tempfile.TemporaryDirectory() as folder:
        num_clips = settings.batch_size * (1 if feed == "cached" else FED_BATCHES)
        dataset = make_synthetic(Path(folder) / "data", num_clips=num_clips, bodies=NUM_BODIES)
        (stage,) = settings.stages(dataset)
        loader = Loader(
            dataset, views=stage.views, batch_size=stage.batch_size, seed=stage.seed, num_threads=FED_THREADS, device=device,
            engine="native" if feed == "cached" else feed,
        )  # fmt: skip
    # the files are gone, their map stays
    batches = _endless(loader)
    if feed == "cached":
        batches = itertools.repeat(next(batches))
    encoder, objective = start(stage)
    encoder.to(device).train()
    objective.to(device).train()
    optimizer = torch.optim.Adam(
        objective.param_groups(encoder), lr=stage.lr, weight_decay=stage.weight_decay, fused=True
    )

    def step(number: int) -> Tensor:
        addressed = next(batches).at(stage.seed, number)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            total: Tensor = objective.loss(objective.embed(encoder, addressed), addressed, 0.0).total
        optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return total.detach()

    about = {
        "recipe": recipe, "precision": precision, "feed": feed, "batch_size": stage.batch_size, "views": len(stage.views),
        "frames": stage.eval_view.frames, "encoder_options": dict(stage.encoder_options), "quick": quick,
        "parameters": sum(p.numel() for module in (encoder, objective) for p in module.parameters()),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }  # fmt: skip
    return step, about


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _durations(step: Callable[[int], Tensor], first: int, count: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `count` steps: by events on a GPU, by the clock elsewhere."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for number in range(first, first + count):
            step(number)
            marks.append(time.perf_counter())
        return [1e3 * (after - before) for before, after in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for number, event in enumerate(events[1:], first):
        step(number)
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def measure(
    recipe: str, precision: str, device: torch.device, *, batch_size: int | None = None, quick: bool = False,
    feed: Feed = "cached",
) -> dict[str, Any]:  # fmt: skip
    """Time a step as `setup` prepares it, after checking that its loss is a number.

    Returns:
        Median and deciles in milliseconds, samples/s, TFLOP/s of counted matrix products, peak memory (None on a CPU).
    Raises:
        ValueError: If the loss is not finite.
    """
    step, about = setup(recipe, precision, device, batch_size=batch_size, quick=quick, feed=feed)
    # the first step is slow for reasons of its own, so it is the one to count in
    with FlopCounterMode(display=False) as counter:
        loss = float(step(0))
    if not math.isfinite(loss):
        raise ValueError(f"measure: the loss of {recipe} in {precision} must be finite, got {loss}. Do not time it.")
    _wait(device)
    begin = time.perf_counter()
    for number in range(1, WARMUP_STEPS):
        step(number)
    _wait(device)
    estimate = (time.perf_counter() - begin) / (WARMUP_STEPS - 1)
    count = MIN_STEPS if quick else min(max(int(BUDGET_S / estimate), MIN_STEPS), MAX_STEPS)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    durations = _durations(step, WARMUP_STEPS, count, device)
    median = statistics.median(durations)
    deciles = statistics.quantiles(durations, n=10, method="inclusive")
    flops = counter.get_total_flops()
    return {
        **about,
        "loss_first": loss,
        "warmup_steps": WARMUP_STEPS,
        "steps": count,
        "median_ms": median,
        "p10_ms": deciles[0],
        "p90_ms": deciles[-1],
        "samples_per_s": about["batch_size"] / median * 1e3,
        "tflop_per_step": flops / 1e12,
        "tflop_per_s": flops / median / 1e9,
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure one case and print it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", choices=STEP_RECIPES, default=STEP_RECIPES[0])
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0])
    add_device(parser)
    parser.add_argument("--batch-size", type=int, help="samples of a step; the recipe's by default, 8 on a CPU")
    parser.add_argument("--out", type=Path, help="JSON lines file to add the row to")
    parser.add_argument("--feed", choices=FEEDS, default=FEEDS[0], help="where batches come from")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    given = parser.parse_args(arguments)
    figures = measure(
        given.recipe, given.precision, torch.device(given.device), quick=given.quick, feed=given.feed,
        batch_size=given.batch_size or (CPU_BATCH if given.device == "cpu" else None),
    )  # fmt: skip
    if given.out is not None:
        case = f"{given.recipe} {given.precision} N={figures['batch_size']} {given.feed}"
        shared = {"part": "recipe-step", "case": case, "provider": "fastskel", "status": "ok"}
        append_rows(given.out, [{**shared, **figures, **origin(torch.device(given.device))}])
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
