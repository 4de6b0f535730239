"""Tables of benchmark rows for people who see them for the first time: every column is explained below the table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastskel.bench.harness import NOISY, PROCESS_NOISE
from fastskel.bench.rows import Difference, Row, baseline_of, cases, memory_mib, noise, verdict

__all__ = ["differences_table", "legend", "lines", "rows_table", "unmatched_lines"]

# part of a row -> what it times
WORDS = {
    "backends": "attention layer", "extract": "extract features", "forward": "encode a batch", "job": "whole job",
    "kernels": "kernel", "latency": "encode one clip", "loader-consumer": "loader beside a training",
    "loader-memory": "memory of the loader", "loader-scaling": "loader by threads", "loader-speed": "make batches, one core",
    "loss": "loss and gradient", "step": "training step", "sweep": "training step",
    "sweep-encoder": "encoder, forward + backward", "largest-batch": "largest training step",
    "train": "encoder, forward + backward",
}  # fmt: skip
# figures of rows without times: key, unit, factor
FIGURES = (
    ("gflop_per_view", "GFLOP per view", 1.0), ("saved_bytes_per_view", "MB saved per view", 1e-6),
    ("held_bytes_per_view", "MB held per view", 1e-6), ("peak_bytes_per_view", "MB at the peak per view", 1e-6),
    ("samples_per_s", "samples/s", 1.0), ("bytes_per_s", "GB/s written", 1e-9), ("risen_mib", "MiB", 1.0),
    ("slower", "slower", 1.0), ("largest_batch", "samples fit", 1.0), ("epoch_s", "s per epoch", 1.0),
    ("recipe_h", "h per recipe", 1.0),
)  # fmt: skip
HEADINGS = ("what", "time", "speed-up", "20..80 %", "noise", "memory", "of peak", "verdict")
COMPARED_WITH = "what the others are compared with"
LEGEND = (
    ("what", "a piece of work, and below it who did it: the reference is the published method in plain PyTorch, reference-...\n"
             "the same with PyTorch's own ways to make it faster; N is the number of clips, fp32 and bf16 the precision"),
    ("time", "median over several rounds, in which all take turns"),
    ("speed-up", "reference time / own time, round by round, and of that the median: 2 means in half the time"),
    ("20..80 %", "three of five rounds had a speed-up between these two"),
    ("noise", f"how far the speed-up may be off, with 95 % confidence; {PROCESS_NOISE:.0%} at least, and above {NOISY:.0%} the\n"
              "machine was too busy for a figure to quote: close other programs and run again"),
    ("memory", "how far the memory in use rose at most during the work"),
    ("of peak", "share of the fastest matrix product, or copy, that this machine managed just before; operations of encoders\n"
                "and steps are counted as the reference does them, so whoever leaves some out can exceed 100 %; the reference\n"
                "does only where the machine was busier when its peak was measured"),
    ("verdict", "the same in words; a difference below the noise is called none"),
)  # fmt: skip


def lines(table: Sequence[Sequence[str]], left: Iterable[int] = (0,)) -> list[str]:
    """Align the columns of a table whose first row is its heading; the columns in `left` and the last to the left."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    aligned = {*left, len(widths) - 1}
    made = []
    for row in table:
        cells = [cell.ljust(w) if i in aligned else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        made.append("  ".join(cells).rstrip())
    made.insert(1, "-" * max(map(len, made)))
    return made


def duration(milliseconds: float) -> str:
    """Say a time with three digits: "0.412 ms", "27.3 ms", "1.83 s"."""
    return f"{number(milliseconds)} ms" if milliseconds < 999.5 else f"{number(milliseconds / 1e3)} s"


def number(value: float) -> str:
    """Say a figure with three digits, and large ones in full: "0.412", "27.3", "2.00", "79,511"."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def what(row: Row) -> str:
    """Say what a row is about: its part in words, the encoder, the case."""
    part = str(row.get("part") or "")
    words = [WORDS.get(part, part), str(row.get("encoder") or row.get("kernel") or ""), str(row.get("case") or "")]
    return ", ".join(word for word in words if word)


def _share(row: Row) -> str:
    share = row.get("peak_share")
    return "" if share is None else f"{share:.0%}" if share >= 0.095 else f"{share:.1%}"


def _memory(row: Row) -> str:
    mib = memory_mib(row)
    return "" if mib is None else f"{mib:,.0f} MiB" if mib >= 9.5 else f"{mib:.1f} MiB"


def _figure(value: float, factor: float) -> str:
    return f"{value:,}" if isinstance(value, int) else number(factor * value)


def _figures(row: Row) -> str:
    """Say what is known of a row beside its times."""
    figures = [f"{_figure(row[key], factor)} {unit}" for key, unit, factor in FIGURES if row.get(key) is not None]
    figures += ["or more"] if row.get("at_least") else []
    return ", ".join(figures + (["extrapolated"] if row.get("extrapolated") else []))


def _timed(row: Row, base: Row | None) -> list[str]:
    """Lay out what one provider did; `base` is who it is compared with, if anybody."""
    own = [f"  {row.get('provider') or ''}", duration(row["median_ms"])]
    rest = [_memory(row), _share(row)]
    if base is None or row.get("speedup") is None:
        return [*own, "", "", "", *rest, verdict({**row, "speedup": None})]
    if row is base:
        return [*own, "", "", "", *rest, COMPARED_WITH]
    if row.get("quick"):
        # a number here would be taken for a result
        return [*own, "", "", "", *rest, verdict(row)]
    spread, off = f"{number(row['speedup_q20'])}..{number(row['speedup_q80'])}", noise(row)
    return [*own, number(row["speedup"]), spread, "" if off is None else f"{off:.0%}", *rest, verdict(row)]


def rows_table(rows: Sequence[Row]) -> str:
    """Lay out results: times by case, each provider a line, and then what is not a time."""
    timed, others = [list(HEADINGS)], [["what", "who", "figures"]]
    empty = [""] * (len(HEADINGS) - 1)
    for group in cases(rows).values():
        base, told = baseline_of(group), [row for row in group if row.get("status", "ok") != "ok"]
        times = [row for row in group if row not in told and row.get("median_ms") is not None]
        if times:
            timed.append([what(times[0]), *empty])
            timed += [_timed(row, base) for row in times]
            timed += [[f"  {row.get('provider') or ''}", *empty[:-1], verdict(row)] for row in told]
        else:
            others += [[what(row), str(row.get("provider") or ""), verdict(row)] for row in told]
        # what a job would take, beside the time of its step
        tellable = [row for row in group if row not in told and not (row.get("quick") and row.get("extrapolated"))]
        figures = [(row, _figures(row)) for row in tellable if row not in times or row.get("extrapolated")]
        others += [[what(row), str(row.get("provider") or ""), text] for row, text in figures if text]
    parts = [lines(table, left) for table, left in ((timed, (0,)), (others, (0, 1))) if len(table) > 1]
    return "\n\n".join("\n".join(part) for part in parts)


def legend() -> str:
    """Explain the columns of `rows_table` in plain words."""
    width = max(len(word) for word, _ in LEGEND)
    made = []
    for word, text in LEGEND:
        first, *more = text.splitlines()
        made += [f"  {word:<{width}}  {first}", *(f"  {'':<{width}}  {line}" for line in more)]
    return "\n".join(["What the columns say:", *made])


def _words(difference: Difference) -> str:
    if difference.agrees is None:
        return "a time alone: it is the machine's as much as the code's"
    return "agree" if difference.agrees else "DIFFER by more than both noises"


def differences_table(found: Sequence[Difference]) -> str:
    """Lay out two runs side by side, times and ratios to the baseline, and count what differs by more than the noise."""
    table = [["what", "who", "earlier", "now", "earlier / now", "speed-up then", "now", "both noises", "verdict"]]
    for difference in found:
        before, after = difference.earlier, difference.later
        ratios = [number(row["speedup"]) if row.get("speedup") else "" for row in (before, after)]
        allowed = "" if difference.allowed is None else f"{difference.allowed:.0%}"
        table.append([
            what(after), str(after.get("provider") or ""), duration(before["median_ms"]), duration(after["median_ms"]),
            f"{difference.ratio:.2f}", *ratios, allowed, _words(difference),
        ])  # fmt: skip
    compared = [difference.agrees for difference in found if difference.agrees is not None]
    summary = f"{compared.count(False)} of {len(compared)} speed-ups differ by more than both noises."
    return "\n".join([*lines(table, (0, 1)), "", summary])


def unmatched_lines(earlier: Sequence[Row], later: Sequence[Row]) -> list[str]:
    """Say what only one of two runs timed: nothing can be compared there, and it may have failed in the other."""
    runs = (("earlier", earlier), ("later", later))
    return [f"Only the {run} run timed: {what(row)}, {row.get('provider') or ''}" for run, rows in runs for row in rows]
