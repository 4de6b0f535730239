"""MG-FD beside the reference's direct formula: loss and gradient of three stacks of embeddings, time and peak memory.

Run as `python -m fastskel.bench.loss --out FILE.jsonl [--rows N ...]`. Four views of the published widths, in turns in one
process; loss and gradients must agree before they are timed. `--alone` leaves the reference out, where it has no memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from fastskel.bench.devices import add_device
from fastskel.bench.harness import append_rows, compare, flops, origin, peak_bytes, relative_l2
from fastskel.bench.reference import loss as reference
from torch import Tensor

from fastskel.objectives.functional import mgfd_loss

__all__ = ["main", "measure"]

WIDTHS, VIEWS = (2048, 2048, 4096), 4
# both add some million terms in float32, each in an order of its own
LIMIT = 1e-4


def _reference(*stacks: Tensor) -> Tensor:
    temporal, spatial, instance = (list(stack) for stack in stacks)
    return reference.total(temporal, spatial, instance, weighting="aaai")


def _fastskel(*stacks: Tensor) -> Tensor:
    return mgfd_loss(*stacks)[0]


PROVIDERS: dict[str, Callable[..., Tensor]] = {"reference": _reference, "fastskel": _fastskel}


def measure(
    rows: int, device: torch.device, providers: Sequence[str], rounds: int, widths: Sequence[int] = WIDTHS,
    limit_s: float = 60.0,
) -> Iterator[dict[str, Any]]:
    """Compare the providers for stacks (4, N, D); one row for each."""
    torch.manual_seed(0)
    stacks = [torch.randn(VIEWS, rows, width, device=device).requires_grad_() for width in widths]

    def call(provider: str) -> Callable[[], list[Tensor]]:
        def step() -> list[Tensor]:
            loss = PROVIDERS[provider](*stacks)
            return [loss.detach(), *torch.autograd.grad(loss, stacks)]

        return step

    def work(provider: str) -> float:
        """Count operations, GFLOP; the reference's, which take seconds, on tensors without values."""
        counted = [z.detach().to("meta").requires_grad_() for z in stacks] if provider == "reference" else stacks
        return flops(lambda: torch.autograd.grad(PROVIDERS[provider](*counted), counted)) / 1e9

    calls = {name: call(name) for name in providers}
    if len(calls) > 1:
        expected, actual = (calls[name]() for name in calls)
        distances = [relative_l2([a], [b]) for a, b in zip(actual, expected, strict=True)]
        # max would pass over one that is not a number
        if not all(distance <= LIMIT for distance in distances):
            raise ValueError(f"loss: providers must agree for N = {rows}, got distances {distances}. Mend it.")
        del expected, actual
    peaks = {name: peak_bytes(step, device) for name, step in calls.items()}
    gflop = {name: work(name) for name in providers}
    for timing in compare(calls, next(iter(calls)), device=device, rounds=rounds, warmup=1, limit_s=limit_s):
        # of its own operations: the reference's are hundreds of times as many
        speed = {"gflop": gflop[timing.provider], "gflop_per_s": 1e3 * gflop[timing.provider] / timing.median_ms}
        yield {
            "case": f"mgfd N={rows}", "rows": rows, "widths": list(widths), "views": VIEWS, "precision": "fp32",
            "peak_mib": peaks[timing.provider] / 2**20, **timing.row(), **speed,
        }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Measure all batches, print and append their rows."""
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.loss", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON lines file to add rows to")
    parser.add_argument("--rows", type=int, nargs="+", default=(64, 356, 1024), help="batch sizes N")
    parser.add_argument("--alone", action="store_true", help="without the reference")
    add_device(parser, "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of a batch size")
    parser.add_argument("--quick", action="store_true", help="tiny widths: whether it runs, not how fast")
    given = parser.parse_args(arguments)
    device, providers = torch.device(given.device), ["fastskel"] if given.alone else list(PROVIDERS)
    for rows in given.rows:
        widths = (16, 16, 32) if given.quick else WIDTHS
        found = list(measure(rows, device, providers, given.rounds, widths, given.limit))
        if given.out:
            append_rows(given.out, [{"part": "loss", "quick": given.quick, **row, **origin(device)} for row in found])
        cells = [f"{r['provider']} {r['median_ms']:.1f} ms, {r['peak_mib']:.0f} MiB ({r['speedup']:.1f}x)" for r in found]
        print(f"{found[0]['case']:<16} {'   '.join(cells)}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
