"""Measure providers of one result side by side: time, bytes, floating-point operations, and where figures come from.

Providers take turns (A B A B ...), so that what else the machine does meets all of them; a speed is the median over the
rounds of the baseline's time divided by the provider's in the same round, with how far that median may be off.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fastskel.atomic import atomic_write
from fastskel.provenance import provenance

__all__ = [
    "CPU_ATTENTION", "NOISY", "PROCESS_NOISE", "Timed", "Timing", "append_rows", "compare", "device_name", "flops", "held_bytes",
    "median_interval", "origin", "peak_bytes", "quantiles", "relative_l2", "resident_bytes", "saved_bytes", "timings",
    "waiting",
]  # fmt: skip

Call = Callable[[], object]
# the fixture `timed` of bench/conftest.py: times a call, by its group
Timed = Callable[..., float | None]
Result = TypeVar("Result")
LOW, HIGH = 0.2, 0.8
# fewer have no quantiles worth the name; also what a case gets that overruns its limit
MIN_ROUNDS = 3
# a row above it says so; more rounds are taken where there is time, up to so many times what was asked for
NOISY, MOST_ROUNDS = 0.05, 4
# warm-up ends when two successive rounds of the baseline are this close, or after so many rounds more than asked for, or
# this share of the limit
STABLE, MOST_WARMUP, WARMUP_SHARE = 0.05, 5, 0.25
# what one program's ratios differ by from process to process: where its memory lies is chosen anew each time
PROCESS_NOISE = 0.02
CONFIDENCE = 0.95
# below six rounds the extremes hold the median too seldom: half their distance times this does in 95 of 100 cases, of normal
# distributions, by two million draws each
FEW_ROUNDS = {3: 2.69, 4: 1.48, 5: 1.12}


@dataclass(frozen=True)
class Timing:
    """Times of one provider over the rounds of a comparison.

    Attributes:
        provider: Its name.
        rounds: Rounds counted.
        median_ms: Median time; `q20_ms` and `q80_ms` are its quantiles.
        speedup: Median over the rounds of baseline time / own time, above 1 where it is faster; with its quantiles.
        noise: Spread (q80 - q20) of the ratios of the baseline's successive rounds, relative to their median: what
            nobody's improvement looks like in a single round.
        uncertainty: How far the median ratio may be off, relative to it: half of its 95 % interval, wider where rounds are
            few, or the baseline's drift from round to round if that is more, and never less than `PROCESS_NOISE`; 1 of
            fewer than three rounds. Two runs should agree within the sum of theirs.
        noisy: Whether that is above `NOISY`: a figure that should not be quoted.
        warmup: Rounds that were run before and not counted.
    """

    provider: str
    rounds: int
    median_ms: float
    q20_ms: float
    q80_ms: float
    speedup: float
    speedup_q20: float
    speedup_q80: float
    noise: float
    uncertainty: float
    noisy: bool
    warmup: int

    def row(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return asdict(self)


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20 % quantile, the median and the 80 % quantile, interpolated linearly between the values."""
    ordered = sorted(values)

    def at(share: float) -> float:
        position = share * (len(ordered) - 1)
        lower = int(position)
        upper = min(lower + 1, len(ordered) - 1)
        return ordered[lower] + (position - lower) * (ordered[upper] - ordered[lower])

    return at(LOW), statistics.median(ordered), at(HIGH)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def waiting(call: Callable[[], Result], device: torch.device) -> Callable[[], Result]:
    """Make a call return when the device is done."""

    def run() -> Result:
        result = call()
        _wait(device)
        return result

    return run


def _milliseconds(call: Call, device: torch.device, clock: Callable[[], float]) -> float:
    _wait(device)
    begin = clock()
    call()
    _wait(device)
    return 1e3 * (clock() - begin)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return an interval that holds the true median in 95 of 100 cases, whatever the distribution.

    As many values are cut off at both ends as the binomial distribution allows, by which a value lies below the median.
    Fewer than six values cannot be that sure: theirs is from the least to the largest.
    """
    ordered, count, cut = sorted(values), len(values), 0
    # chance that the median lies beyond the values that are left
    outside = 2 / 2**count
    while outside + 2 * math.comb(count, cut + 1) / 2**count <= 1 - CONFIDENCE:
        cut += 1
        outside += 2 * math.comb(count, cut) / 2**count
    return ordered[cut], ordered[count - 1 - cut]


def compare(
    calls: Mapping[str, Call],
    baseline: str,
    *,
    device: torch.device | None = None,
    rounds: int = 15,
    warmup: int = 2,
    limit_s: float = 60.0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time providers in turns.

    Warm-up goes on until two successive rounds of the baseline agree within 5 %, for at most five rounds more than asked
    for. While a ratio is known to no better than 5 %, more rounds follow, up to four times as many, within the limit.

    Args:
        calls: What to time, by provider; run in this order in every round.
        baseline: The provider that ratios refer to.
        device: What to wait for before and after each call; None is the CPU.
        rounds: Rounds to count at least.
        warmup: Rounds before them that are not counted, at least; 0 counts from the first on.
        limit_s: Seconds after which no further round begins; the first three are run in any case.
        clock: What tells seconds.
    Returns:
        One timing for each provider, in their order.
    Raises:
        ValueError: If the baseline is not among the calls, or there are no rounds.
    """
    if baseline not in calls:
        raise ValueError(f"compare: baseline must be one of {list(calls)}, got {baseline!r}. Name a provider.")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"compare: rounds must be at least 1, got {rounds} after {warmup} of warm-up. Ask for more.")
    where, begin = device or torch.device("cpu"), clock()

    def one_round() -> dict[str, float]:
        return {name: _milliseconds(call, where, clock) for name, call in calls.items()}

    warm: list[float] = []
    while len(warm) < warmup or (
        0 < warmup <= len(warm) < warmup + MOST_WARMUP
        and clock() - begin < WARMUP_SHARE * limit_s
        and not _settled(warm)
    ):
        warm.append(one_round()[baseline])
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(1, MOST_ROUNDS * rounds + 1):
        for name, elapsed in one_round().items():
            times[name].append(elapsed)
        if number >= MIN_ROUNDS and clock() - begin > limit_s:
            break
        if number % rounds == 0:
            found = timings(times, baseline, len(warm))
            if not any(timing.noisy for timing in found):
                return found
    return timings(times, baseline, len(warm))


def _settled(times: Sequence[float]) -> bool:
    """Whether the last two times are close; of one, nobody knows."""
    return len(times) > 1 and abs(times[-1] / times[-2] - 1.0) <= STABLE


def timings(times: Mapping[str, Sequence[float]], baseline: str, warmup: int = 0) -> list[Timing]:
    """Sum up the milliseconds that each provider took in the same rounds, (R,) each; one timing for each, in their order."""
    base = times[baseline]
    successive = [a / b for a, b in itertools.pairwise(base)] or [1.0]
    low, middle, high = quantiles(successive)
    noise, drift = (high - low) / middle, abs(middle - 1.0)
    found = []
    for name, own in times.items():
        q20, median, q80 = quantiles(own)
        ratios = [b / a for a, b in zip(own, base, strict=True)]
        slow, ratio, fast = quantiles(ratios)
        # against itself the baseline's ratio is 1: its successive rounds stand for two providers of one speed
        least, most = median_interval(successive if name == baseline else ratios)
        half = FEW_ROUNDS.get(len(own), 1.0) * (most - least) / (2 * ratio)
        uncertainty = max(half, drift, PROCESS_NOISE) if len(own) >= MIN_ROUNDS else 1.0
        found.append(
            Timing(name, len(own), median, q20, q80, ratio, slow, fast, noise, uncertainty, uncertainty > NOISY, warmup)
        )
    return found


def saved_bytes(call: Call, exclude: Iterable[Tensor] = ()) -> int:
    """Count what autograd keeps for the backward pass of what a call returns.

    Args:
        call: A forward pass.
        exclude: Tensors (..., D) whose storages do not count, as parameters and inputs.
    Returns:
        Bytes of the distinct storages saved; what a custom function keeps in another way is not seen: see `held_bytes`.
    """
    excluded = {tensor.untyped_storage()._cdata for tensor in exclude}
    # held until the end, or a later storage could have the address of an earlier one
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage._cdata not in excluded:
            storages[storage._cdata] = storage
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        result = call()
    total = sum(storage.nbytes() for storage in storages.values())
    del result
    return total


def _cpu_allocations(call: Call) -> tuple[int, int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    recorded = profiler.profiler
    assert recorded is not None and recorded.kineto_results is not None
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    # a free and an allocation of the same nanosecond keep the order in which they were recorded
    events.sort(key=lambda event: event.start_ns())
    running = list(itertools.accumulate((event.nbytes() for event in events), initial=0))
    del result
    return max(running), running[-1]


def _allocations(call: Call, device: torch.device | None) -> tuple[int, int]:
    """Return how far the allocated bytes rise during a call, and by how much while its result lives on."""
    if device is None or device.type != "cuda":
        return _cpu_allocations(call)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak, after = torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before
    del result
    return peak, after


def peak_bytes(call: Call, device: torch.device | None = None) -> int:
    """Return by how many bytes the memory that torch has allocated rises during a call, at its peak."""
    return _allocations(call, device)[0]


def held_bytes(call: Call, device: torch.device | None = None) -> int:
    """Return by how many bytes the memory that torch has allocated is larger after a call whose result lives on."""
    return _allocations(call, device)[1]


def _attention_flops(query: Sequence[int], key: Sequence[int], *rest: object, **options: object) -> int:
    # scores, and the sum of values
    return 2 * 2 * math.prod(query) * key[-2]


def _attention_backward_flops(
    gradient: object, query: Sequence[int], key: Sequence[int], *rest: object, **options: object
) -> int:
    # scores again, and one product for each of their, the values', the queries' and the keys' gradients
    return 5 * 2 * math.prod(query) * key[-2]


# the attention that torch runs on a CPU, which its own table of formulas lacks
CPU_ATTENTION: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def flops(call: Call) -> int:
    """Count the floating-point operations of a call's matrix products and convolutions, as torch's formulas have them."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        call()
    return int(counter.get_total_flops())


def resident_bytes(key: str) -> int:
    """Bytes of memory that this process has: "VmRSS" at present, "VmHWM" at most so far."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def relative_l2(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Return the relative distance of two lists of tensors (..., D), each list taken as one vector, in fp64."""
    distance = norm = 0.0
    for a, b in zip(actual, expected, strict=True):
        b64 = b.detach().double()
        distance += float((a.detach().double() - b64).square().sum())
        norm += float(b64.square().sum())
    return float((distance / norm) ** 0.5) if norm else float(distance > 0)


def device_name(device: torch.device | None = None) -> str:
    """Return the model of a GPU, or of the processor, where the system tells it."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def origin(device: torch.device | None = None) -> dict[str, Any]:
    """Return what every row says of its making: device, threads, load, versions, commit, date, command.

    `load` is the machine's load average just before: two threads on a busy CPU wait for each other, by a factor of
    ten and more, and evenly enough that `noise` does not show it. Of absolute paths in the command the last part stays:
    rows are published, and where somebody keeps files says nothing.
    """
    made = provenance()
    return {
        "device": device_name(device), "threads": torch.get_num_threads(), "load": os.getloadavg()[0],
        "versions": made["versions"], "commit": made["commit"],
        "date": datetime.date.today().isoformat(),
        "command": [Path(word).name if Path(word).is_absolute() else word for word in made["command"]],
    }  # fmt: skip


def append_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a file of JSON lines; the file appears with all of them or stays as it was."""
    target = Path(path)
    earlier = target.read_text() if target.exists() else ""
    with atomic_write(target) as scratch:
        scratch.write_text(earlier + "".join(json.dumps(row) + "\n" for row in rows))
