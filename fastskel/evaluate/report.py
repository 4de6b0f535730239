"""Results on disk: JSON, CSV and pictures, each written whole or not at all."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastskel.atomic import atomic_write
from fastskel.train.runlog import TIMINGS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "confusion_csv",
    "confusion_figure",
    "curves_figure",
    "embedding_figure",
    "log_panels",
    "project_2d",
    "read_log",
    "write_results",
]

# more classes than this leave no room for a number in a cell, or for a name beside every row
MAX_CLASSES_WITH_COUNTS = 30
MAX_CLASSES_WITH_NAMES = 80
# beyond this many classes a legend is longer than the picture
MAX_CLASSES_IN_LEGEND = 30
MARKERS = ("o", "^", "s")
NAME_LENGTH = 24
INK, FAINT = "#222222", "#9aa0a6"
Curve = tuple[NDArray[np.int64], NDArray[np.float64]]
# logged numbers with a panel of their own, and those that are no term of the loss
RATES = ("lr", "learning_rate")
PANELS = {
    "embedding_std": "deviation of the embeddings",
    "embedding_rank": "effective rank of the embeddings",
    "gradient_norm": "norm of the gradient",
    **dict.fromkeys(RATES, "learning rate"),
    "samples_per_s": "samples a second",
    "mfu": "model FLOPs utilisation",
    "data_stall": "share of time waiting for data",
}
TERMS = "terms of the loss"
NOT_TERMS = {"loss", "epoch", *TIMINGS, *PANELS}


def write_results(path: str | os.PathLike[str], results: Mapping[str, Any]) -> None:
    """Write results as JSON; arrays and tensors of any shape become lists.

    Raises:
        ValueError: If a value cannot be written, or is not finite: JSON has no NaN.
    """

    def plain(value: object) -> object:
        if isinstance(value, (np.ndarray, np.generic, Tensor)):
            return value.tolist()
        if isinstance(value, Path):
            return str(value)
        raise TypeError(f"a {type(value).__name__}")

    try:
        text = json.dumps(results, indent=2, default=plain, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"write_results: results for {path} must be plain values, got {error}. Convert them first."
        ) from error
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as scratch:
        scratch.write_text(text + "\n", encoding="utf-8")


def _names(function: str, class_names: Sequence[str], num_classes: int) -> list[str]:
    if len(class_names) != num_classes:
        raise ValueError(
            f"{function}: class_names must have {num_classes} entries, got {len(class_names)}. Pass one per class."
        )
    return [str(name) for name in class_names]


def _counts(function: str, confusion: Tensor | NDArray[np.int64]) -> NDArray[np.int64]:
    counts = np.asarray(confusion)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or counts.shape[0] == 0:
        raise ValueError(f"{function}: confusion must be (K, K), got {counts.shape}. Pass confusion_matrix(...).")
    return counts


def confusion_csv(
    path: str | os.PathLike[str], confusion: Tensor | NDArray[np.int64], class_names: Sequence[str]
) -> None:
    """Write counts (K, K) with class names: true classes in rows, predicted ones in columns.

    Raises:
        ValueError: If the matrix is not square or the names do not fit it.
    """
    counts = _counts("confusion_csv", confusion)
    names = _names("confusion_csv", class_names, counts.shape[0])
    with atomic_write(path) as scratch, open(scratch, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *names])
        for name, row in zip(names, counts.tolist(), strict=True):
            writer.writerow([name, *row])


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as scratch:
        # tight: labels may need more room than the layout foresaw
        figure.savefig(scratch, dpi=130, facecolor="white", bbox_inches="tight", pad_inches=0.15)


def _short(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


def confusion_figure(
    path: str | os.PathLike[str],
    confusion: Tensor | NDArray[np.int64],
    class_names: Sequence[str],
    title: str = "",
) -> None:
    """Draw counts (K, K): colours are shares of the true class, numbers are counts where there is room for them.

    Raises:
        ValueError: If the matrix is not square or the names do not fit it.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    counts = _counts("confusion_figure", confusion)
    num_classes = counts.shape[0]
    names = [_short(name) for name in _names("confusion_figure", class_names, num_classes)]
    totals = counts.sum(1, keepdims=True)
    share = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    # a cell holds a number of three digits; a matrix without numbers needs room for the names, or for nothing
    cell = 0.36 if num_classes <= MAX_CLASSES_WITH_COUNTS else 0.15 if num_classes <= MAX_CLASSES_WITH_NAMES else 0.07
    side = max(4.0, cell * num_classes)
    figure = Figure(figsize=(side + 3.2, side + 2.4), layout="constrained")
    axes = figure.add_subplot()
    # the root of the share: single confusions stay visible beside the diagonal
    image = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")
    if num_classes <= MAX_CLASSES_WITH_NAMES:
        size = 9 if num_classes <= MAX_CLASSES_WITH_COUNTS else 7
        axes.set_xticks(range(num_classes), names, rotation=90, fontsize=size)
        axes.set_yticks(range(num_classes), names, fontsize=size)
        axes.set_xticks(np.arange(num_classes + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(num_classes + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="#e6e8eb", linewidth=0.5)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if num_classes <= MAX_CLASSES_WITH_COUNTS:
        for row, column in zip(*np.nonzero(counts), strict=True):
            # dark cells take white ink
            ink = "white" if share[row, column] > 0.3 else INK
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8, color=ink)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_color("#c4c8cc")
    right = np.trace(counts) / max(int(counts.sum()), 1)
    heading = f"{100 * right:.1f} % of {int(counts.sum())} samples right"
    axes.set_title(f"{title}\n{heading}" if title else heading, fontsize=11)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02)
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    _save(figure, path)


def project_2d(features: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """Project features on their two main axes.

    Args:
        features: (N, F).
    Returns:
        Coordinates, (N, 2), float64, the sign of an axis such that its largest entry is positive; the share of the
        variance on each axis.
    Raises:
        ValueError: If there are no rows or one is not finite.
    """
    if features.dim() != 2 or features.shape[0] == 0:
        raise ValueError(f"project_2d: features must be (N, F), got {tuple(features.shape)}. Pass one row per sample.")
    rows = features.detach().to("cpu", torch.float64)
    bad = (~torch.isfinite(rows)).any(1).nonzero()
    if bad.numel():
        raise ValueError(
            f"project_2d: features must be finite, got nan or inf in row {int(bad[0])}. Check the encoder."
        )
    rows = rows - rows.mean(0)
    wide = rows.shape[1] > rows.shape[0]
    # the smaller of the two Gram matrices: a data set has many rows or many columns, seldom few of both
    value, vector = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    scale, vector = value.flip(0).clamp_min(0).sqrt(), vector.flip(1)
    points = torch.zeros(rows.shape[0], 2, dtype=torch.float64)
    count = min(2, scale.shape[0])
    points[:, :count] = vector[:, :count] * scale[:count] if wide else rows @ vector[:, :count]
    largest = points.gather(0, points.abs().argmax(0, keepdim=True))
    points = points * torch.where(largest < 0, -1.0, 1.0)
    total = float(scale.square().sum())
    shares = [float(scale[axis].square()) / total if axis < count and total > 0 else 0.0 for axis in range(2)]
    return points, (shares[0], shares[1])


def embedding_figure(
    path: str | os.PathLike[str],
    features: Mapping[str, tuple[Tensor, Tensor]],
    class_names: Sequence[str],
    title: str = "",
) -> None:
    """Draw features of several encoders side by side, each on its two main axes, coloured by class.

    Args:
        path: PNG to write.
        features: Name -> features (N, F) and labels (N,); labels of -1 are drawn in grey.
        class_names: K names.
        title: Above the panels.
    Raises:
        ValueError: If there is nothing to draw, or a label has no name.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not features:
        raise ValueError("embedding_figure: features must name an encoder, got none. Pass {name: (features, labels)}.")
    num_classes = len(class_names)
    legend = num_classes <= MAX_CLASSES_IN_LEGEND
    if legend:
        # ten colours that can be told apart, then the same ones in another shape
        styles = [(matplotlib.colormaps["tab10"](k % 10), MARKERS[k // 10]) for k in range(num_classes)]
    else:
        styles = [(matplotlib.colormaps["turbo"]((k + 0.5) / num_classes), MARKERS[0]) for k in range(num_classes)]
    width = 4.2 * len(features) + (2.6 if legend else 0.4)
    figure = Figure(figsize=(width, 4.8), layout="constrained")
    panels = figure.subplots(1, len(features), squeeze=False)[0]
    for axes, (name, (rows, labels)) in zip(panels, features.items(), strict=True):
        if len(labels) != len(rows) or (len(labels) and int(labels.max()) >= num_classes):
            raise ValueError(
                f"embedding_figure: labels of {name!r} must be one of {num_classes} classes per row, got {len(labels)} "
                f"labels for {len(rows)} rows. Pass the data set's class names."
            )
        points, shares = project_2d(rows)
        size = float(np.clip(6000 / len(points), 5, 32))
        for label in torch.unique(labels).tolist():
            colour, marker = styles[label] if label >= 0 else (FAINT, MARKERS[0])
            x, y = points[labels == label].T
            axes.scatter(x, y, s=size, color=colour, marker=marker, alpha=0.85, linewidths=0.3, edgecolors="white")
        axes.set_title(name, fontsize=11)
        axes.set_xlabel(f"first axis, {100 * shares[0]:.0f} % of variance", fontsize=9)
        axes.set_ylabel(f"second axis, {100 * shares[1]:.0f} % of variance", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color("#c4c8cc")
    if legend:
        marks = [
            Line2D([], [], marker=marker, linestyle="", markersize=6, color=colour, label=_short(str(name)))
            for (colour, marker), name in zip(styles, class_names, strict=True)
        ]
        columns = 1 if num_classes <= 16 else 2
        figure.legend(handles=marks, loc="outside right center", frameon=False, fontsize=9, ncols=columns)
    if title:
        figure.suptitle(title, fontsize=12)
    _save(figure, path)


def read_log(path: str | os.PathLike[str]) -> dict[str, Curve]:
    """Read the numbers of a training log: name -> steps (S,) and values (S,).

    Nested objects become "outer/inner". A step logged twice (a resumed run) counts as logged last. Lines without a step
    are events and are passed over, as is a last line cut short by a killed run.

    Raises:
        ValueError: If another line is not JSON.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    found: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                continue
            raise ValueError(
                f"read_log: line {number} of {path} must be JSON, got {line[:40]!r}. Was the log edited?"
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            continue
        pending = list(row.items())
        while pending:
            name, value = pending.pop()
            if isinstance(value, dict):
                pending.extend((f"{name}/{inner}", deeper) for inner, deeper in value.items())
            elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                found.setdefault(name, {})[row["step"]] = float(value)
    found.pop("step", None)
    return {
        name: (np.array(sorted(values), dtype=np.int64), np.array([values[step] for step in sorted(values)]))
        for name, values in found.items()
    }


def log_panels(curves: Mapping[str, Curve]) -> dict[str, dict[str, Curve]]:
    """Sort the curves of a log, steps and values (S,) each, into panels: heading -> name -> curve.

    A term is what is logged at the very steps of the loss and is not known to be something else; what is logged at
    other steps was read by a monitor and has a panel of its own. Panels without a curve are left out.
    """
    others = {name: curve for name, curve in curves.items() if name not in NOT_TERMS}
    steps = curves["loss"][0] if "loss" in curves else None
    terms = {name: curve for name, curve in others.items() if steps is not None and np.array_equal(curve[0], steps)}
    panels = {"loss": {name: curves[name] for name in ("loss",) if name in curves}, TERMS: terms}
    panels["read during training"] = {name: curve for name, curve in others.items() if name not in terms}
    for name, heading in PANELS.items():
        panels.setdefault(heading, {}).update({name: curves[name]} if name in curves else {})
    return {heading: lines for heading, lines in panels.items() if lines}


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Moving mean over a fortieth of the curve, (S,) to (S,); cut off at the ends."""
    half = len(values) // 80
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    mean: NDArray[np.float64] = (total[last] - total[first]) / (last - first)
    return mean


def _curve(axes: Axes, steps: NDArray[np.int64], values: NDArray[np.float64], colour: Any, name: str) -> None:
    # a step size is exact: smoothing would round its corners
    exact = name in RATES
    axes.plot(steps, values, color=colour, alpha=0.0 if exact else 0.25, linewidth=0.8)
    # a curve of a few points is one of dots
    marker = "o" if len(steps) <= 20 else ""
    axes.plot(
        steps,
        values if exact else _smooth(values),
        color=colour,
        linewidth=1.6,
        label=name,
        marker=marker,
        markersize=4,
    )


def curves_figure(path: str | os.PathLike[str], log: str | os.PathLike[str], title: str = "") -> None:
    """Draw what a training log holds, curves of values (S,): loss, its terms, the embeddings' deviation, the step size.

    Raises:
        ValueError: If the log has no loss.
    """
    import matplotlib
    from matplotlib.figure import Figure

    curves = read_log(log)
    if "loss" not in curves:
        raise ValueError(f"curves_figure: {log} must log a loss, got {sorted(curves)}. Pass the log of a training run.")
    panels = log_panels(curves)
    columns = min(len(panels), 3) if len(panels) != 4 else 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns + 0.4, 3.5 * rows + 0.3), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (heading, lines) in zip(grid, panels.items()):
        colours = matplotlib.colormaps["tab10" if len(lines) <= 10 else "tab20"]
        for number, (name, curve) in enumerate(sorted(lines.items())):
            _curve(axes, *curve, colours(number % colours.N), name.removeprefix("terms/"))
        axes.set_title(heading, fontsize=11)
        axes.set_xlabel("step")
        axes.grid(color="#e6e8eb", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        if len(lines) > 1 or heading == "read during training":
            axes.legend(frameon=False, fontsize=8, ncols=3)
        # terms differ by orders of magnitude; a logarithm needs them positive
        if heading == TERMS and all((values > 0).all() for _, values in lines.values()):
            axes.set_yscale("log")
        elif heading in PANELS.values():
            axes.set_ylim(bottom=0)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=12)
    _save(figure, path)
