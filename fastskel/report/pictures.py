"""Pictures of results as inline SVG: confusions, maps of features, timelines, strips of frames."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastskel.report.charts import legend
from fastskel.report.markup import Markup, element, join
from fastskel.report.numbers import number, percent

__all__ = ["class_colour", "confusion_map", "data_table", "scatter", "strip", "timelines"]

# more classes than this leave no room for a count in a cell, or for a name beside a row
MAX_CLASSES_WITH_COUNTS, MAX_CLASSES_WITH_NAMES = 30, 80
MAX_NAME = 22
# side of a cell, width of a letter of a name beside it, in units of the picture; text is 11 units high
CELL, LETTER = 20, 6.6
MAX_CONFUSED = 10
MAX_SEGMENTS = 400
MAX_RECORDINGS = 8
MAX_ROWS = 100
# shades of a map of many classes
NUM_SHADES = 12
GOLDEN_ANGLE = 137.508


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"


def _name(names: Sequence[str], number: int) -> str:
    return names[number] if 0 <= number < len(names) else f"class {number}"


def class_colour(number: int) -> str:
    """Colour of a class: neighbours differ, and both dark and light grounds carry it."""
    return f"hsl({number * GOLDEN_ANGLE % 360:.0f} 65% {(48, 60)[number // 9 % 2]}%)"


def data_table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> Markup:
    """Make a table with a caption and headed columns; the first cell of a row heads it."""
    first = element("tr", *(element("th", name, scope="col") for name in head))
    shown = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:]))
        for row in rows[:MAX_ROWS]
    ]
    left_out = f" The first {MAX_ROWS} of {len(rows)} rows." if len(rows) > MAX_ROWS else ""
    body = [element("caption", caption + left_out), element("thead", first), element("tbody", *shown)]
    return element("div", element("table", *body), class_="wide")


def _cells(counts: NDArray[np.int64], share: NDArray[np.float64], names: Sequence[str]) -> Markup:
    """Squares of a matrix (K, K) that tell their count under the pointer."""
    parts = []
    for row, column in np.argwhere(counts > 0).tolist():
        told = f"true {_name(names, row)}, predicted {_name(names, column)}: {counts[row, column]} of {counts[row].sum()}"
        shade = f"{math.sqrt(share[row, column]):.2f}"
        place = {"x": CELL * column, "y": CELL * row, "width": CELL, "height": CELL}
        parts.append(element("rect", element("title", told), class_="cell", fill_opacity=shade, **place))
        # dark cells take light ink
        ink = "ink light" if share[row, column] > 0.4 else "ink"
        at = {"x": CELL * (column + 0.5), "y": CELL * (row + 0.68)}
        parts.append(element("text", str(counts[row, column]), class_=ink, **at))
    return join(parts)


def _shades(share: NDArray[np.float64]) -> Markup:
    """One path for each shade of a matrix (K, K): many cells in few bytes."""
    level = np.ceil(np.sqrt(share) * NUM_SHADES).astype(int)
    parts = []
    for shade in range(1, NUM_SHADES + 1):
        squares = "".join(f"M{column} {row}h1v1h-1z" for row, column in np.argwhere(level == shade).tolist())
        if squares:
            parts.append(element("path", class_="cell", d=squares, fill_opacity=f"{shade / NUM_SHADES:.2f}"))
    return element("g", *parts, transform=f"scale({CELL})")


def confusion_map(confusion: Any, names: Sequence[str]) -> Markup:
    """Draw counts (K, K), true classes in rows, shaded by their share of the true class; with a table of the commonest.

    Raises:
        ValueError: If the counts are no square table of whole numbers.
    """
    counts = np.array(confusion)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or counts.size == 0 or counts.dtype.kind not in "iu":
        raise ValueError(f"confusion must be (K, K) counts, got {counts.dtype} of shape {counts.shape}")
    if (counts < 0).any():
        raise ValueError("confusion must be counts, got a negative number")
    classes = len(counts)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    named = classes <= MAX_CLASSES_WITH_NAMES
    cells = _cells(counts, share, names) if classes <= MAX_CLASSES_WITH_COUNTS else _shades(share)
    shown = [_short(_name(names, k)) for k in range(classes)] if named else []
    room, side = round(LETTER * max(map(len, shown), default=0)) + 8, CELL * classes
    labels = []
    for k, name in enumerate(shown):
        at = f"{CELL * (k + 0.68):.1f}"
        labels.append(element("text", name, x=-5, y=at, text_anchor="end"))
        labels.append(element("text", name, transform=f"translate({at} -5) rotate(-90)"))
    right, total = int(np.trace(counts)), int(counts.sum())
    picture = element(
        "svg", element("rect", class_="ground", x=0, y=0, width=side, height=side), cells, *labels,
        viewBox=f"{-room} {-room} {side + room} {side + room}", role="img", class_="matrix",
        aria_label=f"confusion matrix of {classes} classes: {right} of {total} clips right",
        style=f"max-width: {min(900, max(300, round(1.4 * (side + room))))}px",
    )  # fmt: skip
    caption = (
        f"Rows are true classes, columns predicted ones; stronger is a larger share of the true class. {right} of {total} right."
    )
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MAX_CONFUSED]
    pairs = [(int(place) // classes, int(place) % classes) for place in order if wrong.flat[place] > 0]
    rows = [
        (_name(names, true), _name(names, taken), f"{counts[true, taken]} of {counts[true].sum()}", percent(share[true, taken]))
        for true, taken in pairs
    ]
    told = data_table(("true class", "taken for", "count", "share"), rows, "Commonest confusions") if rows else None
    return join([element("figure", picture, element("figcaption", caption)), told])


def scatter(
    points: NDArray[np.float64], labels: NDArray[np.int64], told: Sequence[str], names: Sequence[str], spoken: str
) -> Markup:
    """Draw points (N, 2) coloured by class (N,), each with its text under the pointer."""
    low, span = points.min(0), np.maximum(np.ptp(points, axis=0), 1e-12)
    # both axes have one scale: distances are what the picture is for
    scale = 380 / float(span.max())
    radius = f"{float(np.clip(90 / math.sqrt(len(points)), 1.6, 4.5)):.1f}"
    dots = []
    for (x, y), label, text in zip(((points - low) * scale).tolist(), labels.tolist(), told, strict=True):
        colour = class_colour(label) if label >= 0 else "gray"
        place = {"cx": f"{x + 10:.1f}", "cy": f"{float(span[1]) * scale - y + 10:.1f}"}
        dots.append(element("circle", element("title", text), r=radius, fill=colour, **place))
    size = span * scale + 20
    picture = element("svg", *dots, viewBox=f"0 0 {size[0]:.0f} {size[1]:.0f}", role="img", aria_label=spoken, class_="map")
    shown = sorted({int(label) for label in labels.tolist() if label >= 0})
    marks = legend([_name(names, label) for label in shown], [class_colour(label) for label in shown])
    return element("figure", picture, element("figcaption", spoken), marks)


def strip(values: Sequence[float], told: Sequence[str], spoken: str) -> Markup:
    """Draw a value for each stretch of time as a row of bars, each with its text under the pointer."""
    largest = max([*values, 1e-12])
    width = 360 / len(values)
    bars = [
        element(
            "rect", element("title", text), class_="cell", x=f"{place * width + 1:.1f}", width=f"{width - 2:.1f}",
            y=f"{60 - 56 * max(value, 0) / largest:.1f}", height=f"{56 * max(value, 0) / largest:.1f}",
        )
        for place, (value, text) in enumerate(zip(values, told, strict=True))
    ]  # fmt: skip
    floor = element("line", class_="grid", x1=0, x2=360, y1=60, y2=60)
    picture = element("svg", *bars, floor, viewBox="0 0 360 62", role="img", aria_label=spoken)
    return element("figure", picture, element("figcaption", spoken))


def _kind(label: Any, names: Sequence[str]) -> tuple[int, str]:
    """Number for the colour, and name, of a class that is told by either."""
    if isinstance(label, (int, float)):
        return int(label), _name(names, int(label))
    return (names.index(label) if label in names else sum(map(ord, str(label)))), str(label)


def _rows(segments: Sequence[Any]) -> list[Sequence[Any]]:
    """Segments as (start, end, class[, score]), whether they are told as lists or by name."""
    keys = ("start", "end", "class", "score")
    told = [[row[key] for key in keys if key in row] if isinstance(row, dict) else row for row in segments]
    short = next((row for row in told if len(row) not in (3, 4)), None)
    if short is not None:
        raise ValueError(f"a segment must have start, end, class and perhaps score, got {short}")
    return told


def _segments(rows: Sequence[Sequence[Any]], names: Sequence[str], num_frames: float, top: int) -> Markup:
    """Boxes of segments (start, end, class[, score]) on a row of a timeline."""
    scored = bool(rows) and len(rows[0]) > 3
    best = sorted(rows, key=lambda row: -float(row[3])) if scored else list(rows)
    boxes = []
    # the surest lie on top
    for start, end, label, *score in reversed(best[:MAX_SEGMENTS]):
        kind, name = _kind(label, names)
        left, right = (float(np.clip(1000 * float(edge) / num_frames, 0, 1000)) for edge in (start, end))
        told = f"{name}, frames {number(float(start))} to {number(float(end))}"
        solid = None
        if score:
            told += f", score {number(float(score[0]))}"
            solid = f"{0.25 + 0.75 * float(np.clip(score[0], 0, 1)):.2f}"
        place = {"x": f"{left:.1f}", "width": f"{max(right - left, 1):.1f}", "y": f"{top}", "height": "26"}
        boxes.append(element("rect", element("title", told), fill=class_colour(kind), fill_opacity=solid, **place))
    return join(boxes)


def timelines(recordings: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Markup:
    """Draw the true and the predicted segments of recordings, one above the other."""
    shown, kinds = [], set[tuple[int, str]]()
    for recording in recordings[:MAX_RECORDINGS]:
        frames, true, predicted = float(recording["num_frames"]), _rows(recording["truth"]), _rows(recording["predicted"])
        if not frames > 0:
            raise ValueError(f"num_frames of a recording must be positive, got {frames:g}")
        kinds |= {_kind(row[2], names) for row in [*true, *predicted]}
        grounds = [element("rect", class_="ground", x=0, y=top, width=1000, height=26) for top in (0, 32)]
        spoken = (
            f"{recording['recording']}: {frames:g} frames, {len(true)} true segments above, {len(predicted)} predicted ones below"
        )
        picture = element(
            "svg", *grounds, _segments(true, names, frames, 0), _segments(predicted, names, frames, 32),
            viewBox="0 0 1000 58", preserveAspectRatio="none", role="img", aria_label=spoken, class_="timeline",
        )  # fmt: skip
        shown.append(element("figure", picture, element("figcaption", spoken)))
    if len(recordings) > MAX_RECORDINGS:
        shown.append(element("p", f"The first {MAX_RECORDINGS} of {len(recordings)} recordings."))
    marks = sorted(kinds)
    return join([*shown, legend([name for _, name in marks], [class_colour(kind) for kind, _ in marks])])
