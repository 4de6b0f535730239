"""Where a training step's time goes: kernels by time, the share of it that the device is busy, and the gaps between kernels.

    python -m fastskel.bench.profile_step --out FILE.jsonl [--traces DIR] [--kernels triton|torch] [--quick] [--device cpu]

Steps of published size on a cached batch, as `fastskel.bench.training` has them: the reference's, and fastskel's, launched by
Python and on a GPU captured into a graph as well. Figures are read from the trace of torch's profiler, which slows the launches
of Python down: what a step takes without it is printed beside them. On a CPU operations of torch take the place of kernels, to
show that everything runs. `--traces` keeps the compressed traces, for a viewer.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from fastskel.bench.devices import add_device
from fastskel.bench.harness import append_rows, origin
from fastskel.bench.training import CPU_BATCH, QUICK, OwnStep, ReferenceStep, Setting
from torch.profiler import ProfilerActivity, profile

from fastskel.train.capture import CapturedStep

__all__ = ["analyse", "main", "table"]

WARMUP_STEPS, STEPS = 3, 3
TOP = 25
QUANTILES = (0.5, 0.9, 0.99)
# categories of a trace: what a GPU does, and what stands for it without one
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
HOST_WORK = ("cpu_op",)
NAME_CHARACTERS = 90

Row = dict[str, Any]


def analyse(events: Sequence[dict[str, Any]], steps: int, on_device: bool) -> Row:
    """Read a trace of some equal steps.

    Args:
        events: Its `traceEvents`, times in microseconds.
        steps: How many steps it covers.
        on_device: Whether the work is a GPU's; else that of the operations which no other encloses.
    Returns:
        Milliseconds of a step from the first work to the last (`span_ms`) and busy, launches, gaps between works in microseconds
        by quantile, and `kernels`: name, milliseconds and launches of a step, share of the work, longest first.
    Raises:
        ValueError: If the trace holds no work.
    """
    kinds = DEVICE_WORK if on_device else HOST_WORK
    found = [e for e in events if e.get("ph") == "X" and e.get("cat") in kinds]
    if not found:
        raise ValueError(f"analyse: events must hold work of {', '.join(kinds)}, got none of {len(events)}. Profile a step.")
    # of equal starts the longest first: it encloses the others
    found.sort(key=lambda event: (float(event["ts"]), -float(event["dur"])))
    works: list[dict[str, Any]] = []
    gaps: list[float] = []
    busy, end = 0.0, float(found[0]["ts"])
    for event in found:
        start, stop = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        if not on_device and works and stop <= end:
            continue
        works.append(event)
        if start > end:
            gaps.append(start - end)
        # streams overlap: what two do at once is busy once
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    span = end - float(found[0]["ts"])
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in works:
        by_name[str(event["name"])].append(float(event["dur"]))
    total = sum(map(sum, by_name.values()))
    kernels = [
        {"name": name, "ms": sum(times) / steps / 1e3, "launches": len(times) / steps, "share": sum(times) / max(total, 1e-9)}
        for name, times in by_name.items()
    ]
    gaps.sort()
    at = {f"gap_us_q{100 * q:.0f}": gaps[min(int(q * len(gaps)), len(gaps) - 1)] if gaps else 0.0 for q in QUANTILES}
    return {
        "steps": steps, "span_ms": span / steps / 1e3, "busy_ms": busy / steps / 1e3, "busy_share": busy / span if span else 0.0,
        "launches": len(works) / steps, "gaps": len(gaps) / steps, "gap_ms": sum(gaps) / steps / 1e3, **at,
        "kernels": sorted(kernels, key=lambda kernel: -kernel["ms"]),
    }  # fmt: skip


def table(provider: str, row: Row, top: int = TOP) -> str:
    """Lay a profile out as text: sums, then the kernels that take longest."""
    gaps = ", ".join(f"{100 * q:.0f} % {row[f'gap_us_q{100 * q:.0f}']:.1f} us" for q in QUANTILES)
    lines = [
        f"{provider}: a step of {row['span_ms']:.2f} ms, {row['plain_ms']:.2f} ms without the profiler, device busy "
        f"{100 * row['busy_share']:.1f} % ({row['busy_ms']:.2f} ms) with {row['launches']:.0f} launches",
        f"gaps: {row['gaps']:.0f} a step, {row['gap_ms']:.2f} ms together; quantiles {gaps}",
        f"{'ms a step':>10} {'share':>7} {'launches':>9}  kernel",
    ]
    kernels = row["kernels"]
    for kernel in kernels[:top]:
        name = kernel["name"][:NAME_CHARACTERS]
        lines.append(f"{kernel['ms']:10.3f} {100 * kernel['share']:6.1f}% {kernel['launches']:9.1f}  {name}")
    rest = kernels[top:]
    if rest:
        sums = {key: sum(kernel[key] for kernel in rest) for key in ("ms", "share", "launches")}
        lines.append(f"{sums['ms']:10.3f} {100 * sums['share']:6.1f}% {sums['launches']:9.1f}  {len(rest)} more kinds")
    return "\n".join(lines)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile_steps(step: Callable[[], object], device: torch.device, trace: Path) -> Row:
    """Profile some steps after a warm-up; the compressed trace is left at `trace`, whose name ends in ".json.gz"."""
    for _ in range(WARMUP_STEPS):
        step()
    _wait(device)
    begin = time.perf_counter()
    for _ in range(STEPS):
        step()
    _wait(device)
    plain_ms = 1e3 * (time.perf_counter() - begin) / STEPS
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
        _wait(device)
    profiler.export_chrome_trace(str(trace))
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    return {"plain_ms": plain_ms, **analyse(events, STEPS, device.type == "cuda")}


def _steps(setting: Setting, kernels: Sequence[Any]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Make one provider after another ready; the reference in the precision that it has there."""
    cuda = setting.device.type == "cuda"
    reference = ReferenceStep(setting, torch.float16 if cuda else torch.bfloat16)
    # a step that the scaler skips launches less
    reference.settle()
    yield "reference", reference.step
    for choice in kernels:
        yield f"fastskel-{choice}", OwnStep(setting, choice, False).counted
        if cuda:
            own = OwnStep(setting, choice, True)
            yield f"fastskel-{choice}-graph", CapturedStep(own.step, own.counter, setting.device)


def main(arguments: list[str] | None = None) -> int:
    """Profile every provider, print tables, append rows; returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m fastskel.bench.profile_step", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, help="JSON lines file to add rows to")
    parser.add_argument("--traces", type=Path, help="folder that keeps the compressed traces")
    parser.add_argument("--kernels", nargs="+", choices=("torch", "triton"), help="of fastskel; on a GPU triton, else torch")
    parser.add_argument("--batch", type=int, help="samples N, 356 by default, 8 on a CPU")
    add_device(parser)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    given = parser.parse_args(arguments)
    sizes: dict[str, Any] = dict(QUICK) if given.quick else {"batch": CPU_BATCH} if given.device == "cpu" else {}
    sizes |= {"batch": given.batch} if given.batch else {}
    setting = Setting(device=torch.device(given.device), **sizes)
    about = {"batch": setting.batch, "width": setting.width, "frames": setting.frames, "quick": given.quick}
    about |= origin(setting.device)
    kernels = given.kernels or (["triton"] if given.device == "cuda" else ["torch"])
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.traces or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for provider, step in _steps(setting, kernels):
            row = profile_steps(step, setting.device, folder / f"{provider}.json.gz")
            print(f"{table(provider, row)}\n", flush=True)
            row["kernels"] = row["kernels"][:TOP]
            if given.out:
                append_rows(given.out, [{"part": "profile", "case": "step", "provider": provider, **row, **about}])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
