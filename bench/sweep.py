"""Cost per batch size from 1 to 4,096, and the largest batch that memory allows, of the reference and fastskel.

    python -m fastskel.bench.sweep --out FILE.jsonl [--device cuda|cpu] [--parts step encoder largest] [--providers NAME ...]

step     whole training steps of four cached views, as `fastskel.bench.training` has them; of two samples at least, since the loss
         takes statistics over the batch
encoder  forward and backward pass of the encoder over one view
largest  the largest batch of a whole step: doubled until one does not fit, then searched in between. On a GPU a batch does not
         fit when torch is out of memory; on a CPU when torch allocates more than `--budget-gib` at the peak, since the system
         would swap before it refuses

Providers take turns at each size. `peak_mib` is what torch has allocated for a provider at most during a step: inputs, weights,
gradients, the optimiser's state, and what the backward pass needs. A provider whose time or memory would exceed its limit, as its
smaller batches foretell, is left out, and the row says why.
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from fastskel.bench.contest import unavailable_row
from fastskel.bench.devices import add_device
from fastskel.bench.harness import Timing, append_rows, compare, held_bytes, origin, peak_bytes
from fastskel.bench.providers import BASELINE, Kind, tf32
from fastskel.bench.systems import check, default_providers, prepared, reference_result
from fastskel.bench.train_steps import SEED, OwnStep, Setting, make_step
from torch import Tensor

from fastskel.data import Batch
from fastskel.data.batch import View
from fastskel.skeleton import Topology

__all__ = ["PARTS", "EncoderPass", "History", "Subject", "largest_batch", "main", "search", "sweep"]

Row = dict[str, Any]
Call = Callable[[], object]

# what rows call each part
PARTS = {"step": "sweep", "encoder": "sweep-encoder", "largest": "largest-batch"}
LARGEST_BATCH, LEAST = 4096, {"step": 2, "encoder": 1}
# norms over fewer samples make rounding large
CHECK_BATCH = 8
# sizes at which two cores come to a few hundred samples within minutes
CPU = dict(width=128)
CPU_BUDGET_GIB, CPU_STEP_S, GPU_STEP_S = 2.0, 2.0, 30.0
QUICK = dict(width=32, frames=16, joints=5, rounds=1, limit_s=0.0)
QUICK_BATCH, QUICK_BUDGET_GIB = 4, 0.005
# the largest batch is found to this share of it
RESOLUTION = 64
MIB, GIB = 1 << 20, 1 << 30


class EncoderPass:
    """Forward and backward pass of the encoder of a training step, over the first view of its batch.

    Args:
        train: The step.
    """

    def __init__(self, train: Any) -> None:
        own = isinstance(train, OwnStep)
        self.device, self.dtype = train.device, train.dtype
        self.encoder = train.encoder if own else train.model.backbone
        self.view: Any = train.batch.views[0] if own else train.views[0]

    def _features(self) -> Sequence[Tensor]:
        if not isinstance(self.view, Tensor):
            return [self.encoder(self.view).pooled]
        n, c, t, v, m = self.view.shape
        temporal = self.view.permute(0, 2, 4, 3, 1).reshape(n, t, m * v * c)
        return [y.amax(1) for y in self.encoder(temporal, self.view.permute(0, 4, 3, 2, 1).reshape(n, m * v, t * c))]

    def step(self) -> Tensor:
        """Run both passes; returns the mean square of the pooled features, ()."""
        self.encoder.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            features = self._features()
        loss = torch.stack([y.float().square().mean() for y in features]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


class Subject:
    """A provider that is built once and made ready for one batch after another.

    Args:
        part: "step" or "encoder".
        setting: Sizes but for the batch.
        kind: The provider.
    """

    def __init__(self, part: str, setting: Setting, kind: Kind) -> None:
        self.part, self.setting, self.kind = part, setting, kind
        # weights, and of whole steps what the optimiser keeps
        self._base = held_bytes(self._build, setting.device)

    def _build(self) -> Any:
        self.train: Any = make_step(replace(self.setting, batch=LEAST["step"]), self.kind)
        if self.part == "step":
            self.train.settle()
        self._drop()
        return self.train

    def _drop(self) -> None:
        """Let go of inputs and gradients: a CPU's profiler does not see that something older than itself is freed."""
        self.train.zero_grad()
        if isinstance(self.train, OwnStep):
            self.train.batch = Batch([], torch.empty(0), torch.empty(0))
        else:
            self.train.views = []

    def _hold(self, batch: int) -> None:
        """Give the step a batch; an encoder needs one view of it."""
        train, setting = self.train, replace(self.setting, batch=batch)
        clips = setting.clips()[: 1 if self.part == "encoder" else None]
        if not isinstance(train, OwnStep):
            train.views = [view.permute(0, 4, 1, 3, 2).contiguous() for view in clips]
            return
        mask, topology = torch.ones(clips.shape[1:4], dtype=torch.bool, device=train.device), Topology.unknown(setting.joints)
        index = torch.arange(batch, device=train.counter.device)
        train.batch = Batch([View(view, mask, topology) for view in clips], torch.zeros(batch), index).at(SEED, train.counter)

    def ready(self, batch: int) -> tuple[Call, int]:
        """Return what runs a batch of N samples, after one run, and how many bytes all that takes at its peak."""
        self._drop()
        # nothing of the last batch is in the way of this one
        gc.collect()
        if self.setting.device.type == "cuda":
            torch.cuda.empty_cache()
        kept: list[Call] = []

        def run() -> None:
            self._hold(batch)
            encoder = self.part == "encoder"
            kept.append(EncoderPass(self.train).step if encoder else prepared(self.kind, self.train, self.setting.device))
            kept[0]()

        peak = self._base + peak_bytes(run, self.setting.device)
        return kept[0], peak


def _subjects(part: str, setting: Setting) -> Iterator[tuple[Kind, Row | None]]:
    """List the providers, with the row that says why one is left out, None where it takes part."""
    for kind, reason in setting.kinds():
        left_out = {"provider": kind.name, "status": "skipped"}
        if reason is not None:
            yield kind, unavailable_row(kind, reason)
        elif kind.mode is not None:
            yield kind, {**left_out, "reason": "it compiles anew for every batch size"}
        elif kind.captured and part != "step":
            # torch does not recover from running out of memory within a capture
            yield kind, {**left_out, "reason": "only whole steps that fit are captured"}
        else:
            yield kind, None


@dataclass
class History:
    """What a provider's batches have cost so far, to foretell the next.

    Attributes:
        costs: Batch, milliseconds and bytes of each.
        stopped: Why the provider is left out from here on; empty while it is not.
    """

    costs: list[tuple[int, float, int]] = field(default_factory=list)
    stopped: str = ""

    def foresee(self, batch: int, step_s: float, budget: float) -> str:
        """Say why a batch is not to be tried, as time and memory grow on straight lines; empty where it is."""
        if self.stopped or not self.costs:
            return self.stopped
        last, milliseconds, peak = self.costs[-1]
        earlier, before, below = self.costs[-2] if len(self.costs) > 1 else (0, 0.0, 0)
        further = (batch - last) / (last - earlier)
        # noise may make a line fall
        seconds = 1e-3 * (milliseconds + max(milliseconds - before, 0.0) * further)
        num_bytes = peak + max(peak - below, 0) * further
        if seconds > step_s:
            self.stopped = f"a step of {batch} would take {seconds:.2f} s, more than {step_s:g} s"
        elif num_bytes > budget:
            self.stopped = f"a step of {batch} would need {num_bytes / GIB:.2f} GiB, more than {budget / GIB:.2f} GiB"
        return self.stopped


def _is_out_of_memory(error: RuntimeError) -> bool:
    # torch's allocator says so by its type; code that is loaded late, and libraries, in words
    words = str(error)
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in words or "ALLOC_FAILED" in words


def _ready_at(subject: Subject, history: History, batch: int, limits: tuple[float, float]) -> tuple[Call, int] | Row:
    """Return a provider's call and bytes at a batch, or the row that says why there is none."""
    row = {"batch": batch, "provider": subject.kind.name, "status": "skipped"}
    least = LEAST[subject.part]
    if batch < least:
        return {**row, "reason": f"the loss takes statistics over the batch: {least} samples at least"}
    if reason := history.foresee(batch, *limits):
        return {**row, "reason": reason}
    try:
        return subject.ready(batch)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        history.stopped = f"out of memory at {batch}"
        return {**row, "reason": history.stopped}


def sweep(part: str, setting: Setting, *, most: int, step_s: float, budget: float) -> Iterator[Row]:
    """Time providers at batches 1, 2, 4 ..

    Args:
        part: "step" or "encoder".
        setting: Sizes but for the batch, and who takes part.
        most: Largest batch.
        step_s: Seconds of a step above which a provider is left out.
        budget: Bytes above which it is.
    Returns:
        A row for each batch and provider, `status` "ok", "skipped" or, once, "unavailable".
    Raises:
        ValueError: If a provider does not agree with the reference.
    """
    kinds = []
    for kind, left_out in _subjects(part, setting):
        if left_out is None:
            kinds.append(kind)
        else:
            yield left_out
    small = replace(setting, batch=CHECK_BATCH)
    exact = reference_result(small)
    about = {kind.name: check(small, kind, make_step(small, kind), exact) for kind in kinds}
    subjects = [Subject(part, setting, kind) for kind in kinds]
    histories = {kind.name: History() for kind in kinds}
    for batch in (1 << power for power in range(most.bit_length())):
        calls: dict[str, Call] = {}
        peaks: dict[str, int] = {}
        for subject in subjects:
            name = subject.kind.name
            found = _ready_at(subject, histories[name], batch, (step_s, budget))
            if isinstance(found, dict):
                yield found
            else:
                calls[name], peaks[name] = found
        # the last provider's call, which keeps what it was captured with
        del found
        for row in _timed(replace(setting, batch=batch), calls):
            name = row["provider"]
            if row["status"] == "ok":
                histories[name].costs.append((batch, row["median_ms"], peaks[name]))
                row |= {"peak_mib": peaks[name] / MIB, **about[name]}
            yield row


def _timed(setting: Setting, calls: dict[str, Call]) -> Iterator[Row]:
    """Time what is there; without the reference nothing is a speed-up.

    Captured steps keep their memory between turns. Where the others do not fit beside them, the last one is left out, and the
    rest begin anew: `calls` loses it.
    """
    timings: list[Timing] = []
    while calls and not timings:
        baseline = BASELINE if BASELINE in calls else next(iter(calls))
        try:
            timings = compare(
                calls, baseline, device=setting.device, rounds=setting.rounds, warmup=1, limit_s=setting.limit_s
            )
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            name = list(calls)[-1]
            del calls[name]
            reason = f"out of memory at {setting.batch} beside the others"
            yield {"batch": setting.batch, "provider": name, "status": "skipped", "reason": reason}
    for timing in timings:
        ratios = {} if baseline == BASELINE else dict.fromkeys(("speedup", "speedup_q20", "speedup_q80"))
        rate = 1e3 * setting.batch / timing.median_ms
        yield {**timing.row(), **ratios, "batch": setting.batch, "samples_per_s": rate, "status": "ok"}


def search(fits: Callable[[int], bool], least: int, most: int, limit_s: float = float("inf")) -> tuple[int, int | None]:
    """Find the largest batch that fits, by doubling and then bisection, to a 64th of it.

    Args:
        fits: Whether a batch does; larger ones than one that does not are not asked for.
        least: First batch.
        most: Largest batch.
        limit_s: Seconds after which no further batch is tried.
    Returns:
        Largest batch that was seen to fit, 0 if none was, and the smallest that was seen not to, None if none was.
    """
    best, failed, batch, begin = 0, None, least, time.monotonic()
    while batch <= most and failed is None and time.monotonic() - begin < limit_s:
        if fits(batch):
            best, batch = batch, 2 * batch
        else:
            failed = batch
    # at worst everything up to the end was left out
    while best and failed is not None and failed - best > max(1, best // RESOLUTION) and time.monotonic() - begin < limit_s:
        middle = (best + failed) // 2
        if fits(middle):
            best = middle
        else:
            failed = middle
    return best, failed


def largest_batch(setting: Setting, *, most: int, budget: float, search_s: float) -> Iterator[Row]:
    """Search the largest batch of a whole step, for each provider alone.

    Args:
        setting: Sizes but for the batch, and who takes part.
        most: Largest batch to try.
        budget: Bytes that a step may take on a CPU; a GPU has what it has.
        search_s: Seconds of all searches together, after which no further batch is tried.
    Returns:
        A row for each provider, with `ratio` to the reference's batch.
    """
    cuda, reference, kinds = setting.device.type == "cuda", None, []
    for kind, left_out in _subjects("largest", setting):
        if left_out is None:
            kinds.append(kind)
        else:
            yield left_out
    end = time.monotonic() + search_s
    for number, kind in enumerate(kinds):
        subject = Subject("step", setting, kind)

        def fits(batch: int, subject: Subject = subject) -> bool:
            try:
                _, peak = subject.ready(batch)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                return False
            return cuda or peak <= budget

        # each has the same share of the time that is left
        best, failed = search(fits, LEAST["step"], most, (end - time.monotonic()) / (len(kinds) - number))
        reference = best if kind.name == BASELINE else reference
        close = failed is not None and (not best or failed - best <= max(1, best // RESOLUTION))
        yield {
            "provider": kind.name, "largest_batch": best, "failed_batch": failed, "at_least": not close,
            "ratio": best / reference if reference else None, "budget_gib": None if cuda else budget / GIB,
            "how": "torch out of memory" if cuda else "bytes that torch allocates, against the budget", "status": "ok",
        }  # fmt: skip


def line(row: Row) -> str:
    """Say a row in one line."""
    start = f"{row['part']:<14} {row['provider']:<22}"
    if row["status"] != "ok":
        return f"{start} {row.get('batch', ''):>5} {row['status'].upper()}: {row['reason']}"
    if row["part"] == PARTS["largest"]:
        ratio = "" if row["ratio"] is None else f"  {row['ratio']:.2f} of the reference's"
        return f"{start} {'at least ' if row['at_least'] else ''}{row['largest_batch']}{ratio}"
    speedup = "" if row["speedup"] is None else f"  {row['speedup']:5.2f}x [{row['speedup_q20']:.2f}, {row['speedup_q80']:.2f}]"
    return (
        f"{start} {row['batch']:>5} {row['median_ms']:9.2f} ms  {row['samples_per_s']:9.1f} samples/s  "
        f"{row['peak_mib']:9.1f} MiB{speedup}"
    )


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to add rows to")
    add_device(parser)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="who takes part; the reference always does")
    parser.add_argument("--width", type=int, help=f"D; the published 1024, on a CPU {CPU['width']}")
    parser.add_argument("--most", type=int, help=f"largest batch, {LARGEST_BATCH} by default")
    parser.add_argument("--rounds", type=int, help="rounds of a comparison, 5 by default")
    parser.add_argument("--limit-s", type=float, default=20.0, help="seconds of a comparison after which no round begins")
    parser.add_argument("--step-s", type=float, help=f"longest step; {GPU_STEP_S:g} s, on a CPU {CPU_STEP_S:g} s")
    parser.add_argument("--search-s", type=float, default=240.0, help="seconds of all searches together")
    parser.add_argument("--budget-gib", type=float, help=f"memory of a step; a GPU's own, on a CPU {CPU_BUDGET_GIB:g} GiB")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    return parser.parse_args(arguments)


def _budget(device: torch.device, given_gib: float | None) -> float:
    if given_gib is not None:
        return given_gib * GIB
    return float(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else CPU_BUDGET_GIB * GIB


@tf32(False)
def main(arguments: list[str] | None = None) -> int:
    """Run the parts, print and append their rows; returns 0."""
    given = _arguments(arguments)
    device, cpu = torch.device(given.device), given.device == "cpu"
    sizes: dict[str, Any] = {"rounds": 5, "limit_s": given.limit_s} | (CPU if cpu else {}) | (QUICK if given.quick else {})
    sizes |= {name: value for name in ("width", "rounds") if (value := getattr(given, name)) is not None}
    setting = Setting(device=device, providers=tuple(given.providers or default_providers(device)), **sizes)
    most = given.most or (QUICK_BATCH if given.quick else LARGEST_BATCH)
    step_s = given.step_s or (CPU_STEP_S if cpu else GPU_STEP_S)
    budget = _budget(device, given.budget_gib or (QUICK_BUDGET_GIB if given.quick else None))
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        name: functools.partial(sweep, name, setting, most=most, step_s=step_s, budget=budget) for name in LEAST
    }
    parts["largest"] = functools.partial(largest_batch, setting, most=16 * most, budget=budget, search_s=given.search_s)
    about = {"width": setting.width, "frames": setting.frames, "quick": given.quick, **origin(device)}
    for part in given.parts:
        for figures in parts[part]():
            case = f"usdrl-dste D={setting.width}" + (f" N={figures['batch']}" if part in LEAST and "batch" in figures else "")
            row = {"part": PARTS[part], "case": case, **figures, **about}
            append_rows(given.out, [row])
            print(line(row), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
