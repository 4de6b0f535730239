"""Pictures of benchmark rows: the roofline, time and memory against the batch, the loader's throughput against its threads."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastskel.bench.rows import memory_mib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["batch_series", "draw", "roofline_points", "thread_series"]

Row = Mapping[str, Any]
Point = tuple[float, float]
# parts whose cases differ in the batch -> the field that holds it
BATCH_FIELDS = {"sweep": "batch", "sweep-encoder": "batch", "loss": "rows"}
BATCH_IN_NAME = re.compile(r"\bN=\d+")
WIDE, HIGH, DPI = 8.0, 5.0, 120
# the reference in greys, fastskel in colours
COLOURS = {
    "reference": "0.35", "reference-sdpa": "0.6", "feeder": "0.35", "copy": "0.6", "fastskel": "tab:blue",
    "fastskel-triton": "tab:orange", "float32": "tab:blue", "bfloat16": "tab:orange",
}  # fmt: skip
MARKERS = "os^Dv<>pP*X"


def batch_series(rows: Sequence[Row], value: Callable[[Row], float | None]) -> dict[str, list[Point]]:
    """Collect (batch, value) by part and provider, of parts that were run at two batches or more."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        part, number = str(row.get("part")), value(row)
        batch = row.get(BATCH_FIELDS.get(part, ""))
        if batch is not None and number is not None:
            # a case is named by its batch, and by what was done with it
            work = " ".join(BATCH_IN_NAME.sub("", str(row.get("case") or "")).split())
            name = f"{part} {work}: {row.get('provider')}"
            found.setdefault(name, {})[float(batch)] = number
    return {name: sorted(points.items()) for name, points in found.items() if len(points) > 1}


def thread_series(rows: Sequence[Row]) -> dict[str, list[Point]]:
    """Collect (threads, samples per second) of the loader by what it writes."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        if row.get("part") == "loader-scaling" and row.get("samples_per_s") is not None and row.get("workers") is not None:
            found.setdefault(str(row["provider"]), {})[float(row["workers"])] = float(row["samples_per_s"])
    return {name: sorted(points.items()) for name, points in found.items()}


def roofline_points(counted: Sequence[Row], rows: Sequence[Row]) -> dict[str, list[Point]]:
    """Collect (FLOP per byte, GFLOP/s) of encoders that were counted, and of kernels whose rows tell both."""
    found: dict[str, list[Point]] = {}
    for row in counted:
        name = f"{row['encoder']} {row['part']} {row['precision']}: {row['provider']}"
        found.setdefault(name, []).append((row["flops"] / row["bytes"], row["flops"] / row["median_ms"] / 1e6))
    for row in rows:
        flops, moved = row.get("tflop_per_s"), row.get("gigabytes_per_second")
        if row.get("part") == "kernels" and flops and moved:
            found.setdefault(f"kernels: {row['provider']}", []).append((1e3 * flops / moved, 1e3 * flops))
    return found


def _colour(name: str) -> str | None:
    return COLOURS.get(name.rpartition(": ")[2])


def _roofs(facts: Row) -> dict[str, float]:
    """GFLOP/s of the measured products by type."""
    names = {key: key.removeprefix("matmul_").removesuffix("_tflop_per_s") for key in facts if key.endswith("_tflop_per_s")}
    return {name: 1e3 * facts[key] for key, name in names.items() if facts[key]}


def _draw_roofline(axes: Axes, points: Mapping[str, Sequence[Point]], facts: Row) -> None:
    slowest = min(y for series in points.values() for _, y in series)
    # a roof that everything lies above says nothing of it
    copy, roofs = float(facts["copy_gb_per_s"]), {name: speed for name, speed in _roofs(facts).items() if speed >= slowest}
    intensities = [x for series in points.values() for x, _ in series]
    ridges = [speed / copy for speed in roofs.values()]
    low, high = min([*intensities, *ridges]) / 4, max([*intensities, *ridges]) * 4
    for name, speed in roofs.items():
        ridge = speed / copy
        axes.plot([low, ridge, high], [low * copy, speed, speed], color="0.8", linewidth=1, zorder=1)
        axes.annotate(f"{name} products", (high, speed), ha="right", va="bottom", color="0.4", fontsize=8)
    axes.annotate(f"copying {copy:.0f} GB/s", (low, low * copy), ha="left", va="bottom", color="0.4", fontsize=8, rotation=35)
    for number, (name, series) in enumerate(points.items()):
        marker = MARKERS[number % len(MARKERS)]
        # hollow: points lie on each other
        axes.plot(*zip(*series), marker, color=_colour(name), markerfacecolor="none", label=name, zorder=2)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte moved, each operation on its own", ylabel="GFLOP/s")
    axes.set_title("Roofline: what this machine allows, and what was reached")


def _draw_series(axes: Axes, series: Mapping[str, Sequence[Point]]) -> None:
    for number, (name, points) in enumerate(series.items()):
        axes.plot(*zip(*points), marker=MARKERS[number % len(MARKERS)], color=_colour(name), markerfacecolor="none", label=name)


def _draw_batches(axes: Axes, series: Mapping[str, Sequence[Point]], title: str, unit: str) -> None:
    _draw_series(axes, series)
    axes.set(xscale="log", yscale="log", xlabel="samples of a batch", ylabel=unit)
    axes.set_title(title)


def _draw_threads(axes: Axes, series: Mapping[str, Sequence[Point]]) -> None:
    _draw_series(axes, series)
    for name, points in series.items():
        threads, rate = points[0]
        # what threads that do not disturb each other would reach
        axes.plot([x for x, _ in points], [rate * x / threads for x, _ in points], ":", color=_colour(name) or "0.5")
    axes.set(xlabel="threads of the loader (dotted: without loss)", ylabel="samples/s")
    axes.set_xticks(sorted({x for points in series.values() for x, _ in points}))
    axes.set_ylim(bottom=0)
    axes.set_title("Loader: samples per second against threads")


def draw(rows: Sequence[Row], facts: Row, counted: Sequence[Row], folder: Path) -> list[Path]:
    """Draw every picture that the rows have points for.

    Args:
        rows: Results.
        facts: Measured peaks of the machine; without them there is no roofline.
        counted: Results of encoders with `flops` and `bytes`, as `fastskel.bench.intensity` gives them.
        folder: Folder to create for the pictures.
    Returns:
        The files, PNG.
    """
    times = batch_series(rows, lambda row: row.get("median_ms"))
    memory = batch_series(rows, memory_mib)
    threads, points = thread_series(rows), roofline_points(counted, rows)
    pictures: dict[str, Callable[[Axes], None]] = {}
    if points and facts.get("copy_gb_per_s"):
        pictures["roofline"] = lambda axes: _draw_roofline(axes, points, facts)
    if times:
        pictures["time-by-batch"] = lambda axes: _draw_batches(axes, times, "Time against batch", "ms")
    if memory:
        pictures["memory-by-batch"] = lambda axes: _draw_batches(axes, memory, "Peak memory against batch", "MiB")
    if threads:
        pictures["loader-by-threads"] = lambda axes: _draw_threads(axes, threads)
    device = str(facts.get("device") or "")
    if any(row.get("quick") and row.get("part") != "kernels" for row in rows):
        device = f"{device} tiny sizes: speeds mean nothing".strip()
    return [_save(folder / f"{name}.png", picture, device) for name, picture in pictures.items()]


def _save(path: Path, picture: Callable[[Axes], None], device: str) -> Path:
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(WIDE, HIGH), layout="constrained")
    axes = figure.add_subplot()
    picture(axes)
    axes.grid(True, which="major", color="0.92")
    # beside the axes: a roofline has more entries than it has room
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    if device:
        figure.supxlabel(device, fontsize=8, color="0.4", x=0.99, ha="right")
    figure.savefig(path, dpi=DPI)
    return path
