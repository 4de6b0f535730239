"""One picture of a check: which kinds of findings, where in the data set, how long the clips, how many per class."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from fastskel.atomic import atomic_write
from fastskel.data.findings import CheckReport, counted
from fastskel.data.packed import PackedDataset

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_check"]

_COLOURS = {"error": "#dc2626", "warning": "#f59e0b", "note": "#94a3b8"}
_BACKGROUND, _GRID, _GREY, _INK, _BLUE = "#ffffff", "#e2e8f0", "#64748b", "#1e293b", "#0369a1"
_BINS = 40
# inches of a row of findings, and of everything else
_ROW, _REST = 0.24, 4.8
_TITLE_LENGTH = 60


def draw_check(report: CheckReport, dataset: PackedDataset, path: str | os.PathLike[str]) -> None:
    """Draw a report over the n clips, (T, M, V, C) each, it was made of, as PNG.

    Raises:
        ValueError: If the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = report.rows()
    height = _REST + _ROW * max(len(rows), 4)
    figure = Figure(figsize=(12, height), dpi=110, facecolor=_BACKGROUND)
    FigureCanvasAgg(figure)
    title = str(report.path) if len(str(report.path)) <= _TITLE_LENGTH else f"...{str(report.path)[-_TITLE_LENGTH:]}"
    sizes = f"{counted(report.num_clips, 'clip')}, {counted(report.num_frames, 'frame')}"
    figure.text(0.02, 1 - 0.3 / height, title, fontsize=12, color=_INK, va="center", parse_math=False)
    figure.text(0.02, 1 - 0.58 / height, sizes, fontsize=10, color=_GREY, va="center")
    for place, (severity, colour) in enumerate(_COLOURS.items()):
        total = sum(row["findings"] for row in rows if row["severity"] == severity)
        figure.text(0.62 + 0.125 * place, 1 - 0.3 / height, counted(total, severity), fontsize=10, color=colour, va="center")
    # inches from the bottom: two panels below, two above that share their rows
    low, high, top = 0.75 / height, 2.5 / height, (height - 1.3) / height
    middle = 3.65 / height
    _kinds(figure.add_axes((0.17, middle, 0.27, top - middle)), rows)
    _places(figure.add_axes((0.47, middle, 0.5, top - middle)), rows, report)
    _lengths(figure.add_axes((0.07, low, 0.37, high - low + 0.2 / height)), report, dataset)
    _classes(figure.add_axes((0.53, low, 0.44, high - low + 0.2 / height)), dataset)
    try:
        with atomic_write(path) as scratch:
            figure.savefig(scratch, format="png", facecolor=_BACKGROUND, metadata={"Software": None})
    except OSError as error:
        raise ValueError(
            f"draw_check: path must be writable, got {error.strerror or error}, in {os.fspath(path)}. Choose another."
        ) from error


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, color=_INK, loc="left")
    axes.tick_params(labelsize=8, colors=_GREY, length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)


def _kinds(axes: Axes, rows: list[dict[str, Any]]) -> None:
    _plain(axes, "findings")
    axes.set_ylim(max(len(rows), 4) - 0.5, -0.5)
    if not rows:
        axes.text(0.5, 0.5, "nothing found", transform=axes.transAxes, ha="center", color=_GREY)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    counts = [row["findings"] for row in rows]
    axes.barh(range(len(rows)), counts, color=[_COLOURS[row["severity"]] for row in rows], height=0.7)
    axes.set_xscale("log")
    # from below 1, so that a single finding has a bar; to the right there is room for the number
    axes.set_xlim(0.5, max(counts) * 8)
    axes.set_xticks([])
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), [row["kind"] for row in rows])
    for place, count in enumerate(counts):
        axes.text(count * 1.15, place, f"{count:,}", va="center", fontsize=8, color=_INK)


def _places(axes: Axes, rows: list[dict[str, Any]], report: CheckReport) -> None:
    _plain(axes, "clips, in the order of the data set")
    axes.set_ylim(max(len(rows), 4) - 0.5, -0.5)
    axes.set_xlim(-0.01 * report.num_clips - 0.5, 1.01 * report.num_clips - 0.5)
    axes.set_yticks([])
    for place, row in enumerate(rows):
        axes.axhline(place, color=_GRID, linewidth=0.8, zorder=0)
        kind = row["kind"], row["severity"]
        clips = sorted({f.clip for f in report.findings if (f.kind, f.severity) == kind and f.clip is not None})
        if clips:
            axes.plot(clips, [place] * len(clips), "|", color=_COLOURS[row["severity"]], markersize=9, markeredgewidth=1.0)
        else:
            axes.text(0, place, " the data set as a whole ", fontsize=8, color=_GREY, va="center", backgroundcolor=_BACKGROUND)


def _lengths(axes: Axes, report: CheckReport, dataset: PackedDataset) -> None:
    _plain(axes, "frames per clip")
    crop = int(report.settings["crop"])
    lengths = dataset.num_frames
    bins = np.linspace(0, max(int(lengths.max()), crop) + 1, _BINS + 1)
    axes.hist(lengths, bins=bins.tolist(), color=_BLUE)
    axes.axvline(crop, color=_COLOURS["error"], linewidth=1.2, linestyle="--")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.15)
    axes.annotate(f" crop {crop} ", (crop, axes.get_ylim()[1]), fontsize=8, color=_COLOURS["error"], va="top")
    axes.set_xlabel("frames", fontsize=8, color=_GREY)
    axes.grid(axis="y", color=_GRID)


def _classes(axes: Axes, dataset: PackedDataset) -> None:
    segments, labels = dataset.segments, dataset.labels[dataset.labels >= 0]
    what = "clips"
    if len(labels) == 0 and segments is not None:
        labels, what = segments[:, 1].astype(np.int64), "segments"
    _plain(axes, f"{what} per class")
    if len(labels) == 0:
        axes.text(0.5, 0.5, "no labels", transform=axes.transAxes, ha="center", color=_GREY)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    counts = np.bincount(labels, minlength=len(dataset.class_names))
    axes.bar(range(len(counts)), counts, color=_BLUE, width=0.85)
    axes.set_xlabel("class", fontsize=8, color=_GREY)
    axes.set_xlim(-0.6, len(counts) - 0.4)
    axes.locator_params(axis="x", integer=True)
    axes.grid(axis="y", color=_GRID)
