"""What a row of a benchmark says in words: its share of the device's peak, its memory, its verdict; and two runs side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastskel.bench.harness import NOISY

__all__ = [
    "Difference", "Row", "agreement", "baseline_of", "cases", "memory_mib", "name", "noise", "peak_share", "ratio_words",
    "unmatched", "verdict",
]  # fmt: skip

Row = Mapping[str, Any]
# what tells rows of one case apart from those of another, beside its name
CASE = ("part", "case", "encoder", "width", "kernel")
# who the others are compared with, where a row of ratio 1 does not say
BASELINES = ("reference", "feeder", "sdpa", "eager")


def name(row: Row) -> tuple[str, ...]:
    """Name the case of a row: part, case, and what else tells it from others."""
    return tuple(str(row[key]) for key in CASE if row.get(key) is not None)


def cases(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Sort rows by their case, in the order in which cases appear."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(name(row), []).append(row)
    return found


def baseline_of(rows: Sequence[Row]) -> Row | None:
    """Find the row that the ratios of a case refer to, if it has one."""
    timed = [row for row in rows if row.get("median_ms") is not None and row.get("status", "ok") == "ok"]
    of_one = [row for row in timed if row.get("speedup") == 1.0]
    named = [row for row in of_one if str(row.get("provider")).startswith(BASELINES)]
    return next(iter(named or of_one), None)


def peak_share(row: Row, facts: Mapping[str, Any]) -> float | None:
    """Return the share of the device's measured peak that a result reaches, or None where either is not known.

    Operations are held against the largest measured matrix product of the row's precision, bytes written against the
    larger of the measured copies, which writes half of the bytes it moves; the larger share is what limits.
    """
    shares = []
    peak = facts.get(f"matmul_{row.get('precision')}_tflop_per_s")
    work = row.get("gflop_per_s")
    for key in ("tflop_per_s", "reference_tflop_per_s"):
        work = 1e3 * row[key] if work is None and row.get(key) is not None else work
    if peak and work is not None:
        shares.append(work / (1e3 * peak))
    copies = [value for key, value in facts.items() if key.startswith("copy_") and key.endswith("gb_per_s") and value]
    if copies and row.get("bytes_per_s") is not None:
        shares.append(2 * row["bytes_per_s"] / (1e9 * max(copies)))
    if copies and row.get("gigabytes_per_second") is not None:
        shares.append(row["gigabytes_per_second"] / max(copies))
    return max(shares, default=None)


def memory_mib(row: Row) -> float | None:
    """Return the peak memory of a result in MiB, where it was measured."""
    if row.get("peak_mib") is not None:
        return float(row["peak_mib"])
    return None if row.get("peak_bytes") is None else row["peak_bytes"] / 2**20


def noise(row: Row) -> float | None:
    """Return how far the ratio of a row may be off, relative to it.

    Rows from before there was an `uncertainty` have the spread of their rounds, which is wider.
    """
    if row.get("uncertainty") is not None:
        return float(row["uncertainty"])
    if row.get("speedup_q20") is None or not row.get("speedup"):
        return None
    return float((row["speedup_q80"] - row["speedup_q20"]) / row["speedup"])


def ratio_words(ratio: float) -> str:
    """Say a ratio of times: "3.1x faster", "1.06x slower", "44x faster"."""
    factor, direction = (ratio, "faster") if ratio >= 1.0 else (1.0 / ratio, "slower")
    digits = 2 if factor < 1.95 else 1 if factor < 9.95 else 0
    return f"{factor:.{digits}f}x {direction}"


def verdict(row: Row) -> str:
    """Say what a row shows, in words; a difference that is smaller than its noise is none."""
    status = row.get("status", "ok")
    if status != "ok":
        told = (row.get(key) for key in ("error", "reason", "why"))
        return f"{status}: {next((str(text).strip().splitlines()[-1] for text in told if text), 'no reason given')}"
    if row.get("quick"):
        return "runs; a tiny size shows no speed"
    ratio, off = row.get("speedup"), noise(row)
    if ratio is None or off is None:
        return "measured alone"
    if abs(math.log(ratio)) <= math.log1p(off):
        return f"too noisy to say: noise {off:.0%}" if off > NOISY else "no difference (below noise)"
    return ratio_words(ratio) + (f", but noisy: {off:.0%}" if off > NOISY else "")


@dataclass(frozen=True)
class Difference:
    """One result of two runs.

    Attributes:
        name: Case and provider.
        earlier: Row of the first run.
        later: Row of the second.
        ratio: Time of the earlier run / time of the later one.
        change: Ratio to the baseline in the later run / in the earlier one, None where a row has none, or is the baseline.
        allowed: Sum of what both rows say of their noise.
    """

    name: tuple[str, ...]
    earlier: Row
    later: Row
    ratio: float
    change: float | None
    allowed: float | None

    @property
    def agrees(self) -> bool | None:
        """Whether both ratios agree within their noise; None if one of them has no noise to tell."""
        if self.change is None or self.allowed is None:
            return None
        return abs(math.log(self.change)) <= math.log1p(self.allowed)


def _by_provider(rows: Iterable[Row]) -> dict[tuple[str, ...], Row]:
    timed = (row for row in rows if row.get("status", "ok") == "ok" and row.get("median_ms"))
    # of rows of the same name the last counts: it was measured last
    return {(*name(row), str(row.get("provider"))): row for row in timed}


def agreement(earlier: Iterable[Row], later: Iterable[Row]) -> list[Difference]:
    """Put the results that two runs share side by side.

    Raises:
        ValueError: If they come from different devices or numbers of threads, or one proves only that something runs, or they
            share nothing.
    """
    before, after = _by_provider(earlier), _by_provider(later)
    shared = [key for key in after if key in before]
    if not shared:
        raise ValueError(
            f"agreement: runs must share a timed case and provider, got {len(before)} and {len(after)} that do not meet. "
            "Run the same part of the suite twice."
        )
    found = []
    for key in shared:
        a, b = before[key], after[key]
        for what in ("device", "quick", "threads"):
            # rows of before sizes could be tiny, or before threads were told, lack them
            if a.get(what, b.get(what)) != b.get(what, a.get(what)):
                raise ValueError(
                    f"agreement: both runs of {' '.join(key)} must have one {what}, got {a.get(what)!r} and {b.get(what)!r}. "
                    "Times of different machines, sizes or threads say nothing about a change: measure again on one."
                )
        # a baseline is as fast as itself in any run
        both = a.get("speedup") and b.get("speedup") and not a["speedup"] == b["speedup"] == 1.0
        noises = noise(a), noise(b)
        allowed = None if None in noises else sum(noises)  # type: ignore[arg-type]
        change = b["speedup"] / a["speedup"] if both else None
        found.append(Difference(key, a, b, a["median_ms"] / b["median_ms"], change, allowed))
    return found


def unmatched(earlier: Iterable[Row], later: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Return what only the earlier run timed, as of a provider that failed since, and what only the later one did."""
    before, after = _by_provider(earlier), _by_provider(later)
    return [row for key, row in before.items() if key not in after], [row for key, row in after.items() if key not in before]
