"""Curves as inline SVG: lines with axes, bands and values that show under the pointer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fastskel.report.markup import Markup, element, join
from fastskel.report.numbers import number

__all__ = ["Line", "condense", "legend", "line_chart", "ticks"]

# of the picture, in its own units; text is 10 units high
WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 30
# more points than the picture has columns to show them
MAX_POINTS = 240
# strips that show values under the pointer
MAX_STRIPS = 48
# colours of the style sheet
NUM_COLOURS = 10
MAX_DECADES = 6


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        x: Places, (S,), increasing.
        y: Values, (S,).
        low: Lower edge of a band around it, (S,).
        high: Upper edge.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None


def condense(steps: NDArray[np.int64], values: NDArray[np.float64]) -> Line:
    """Shorten a curve, (S,) each: means of equally many neighbours, with their least and largest as band."""
    if len(steps) <= MAX_POINTS:
        return Line(steps.astype(np.float64), values)
    parts = [part for part in np.array_split(np.arange(len(steps)), MAX_POINTS) if len(part)]
    x, y = (np.array([row[part].mean() for part in parts]) for row in (steps, values))
    low, high = (np.array([take(values[part]) for part in parts]) for take in (np.min, np.max))
    return Line(x, y, low, high)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    rough = max(high - low, 1e-300) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * unit for factor in (1, 2, 5, 10)), key=lambda size: abs(size - rough))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    if last - first < 1:
        return [low, high]
    return [float(place) for place in range(first, last + 1, max(1, -(-(last - first) // MAX_DECADES)))]


@dataclass(frozen=True)
class _Axes:
    x: tuple[float, float]
    y: tuple[float, float]
    log: bool

    def across(self, value: float) -> float:
        return LEFT + (value - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def down(self, value: float) -> float:
        shown = math.log10(value) if self.log else value
        return HEIGHT - BOTTOM - (shown - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM)

    def points(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
        return " ".join(f"{self.across(a):.1f},{self.down(b):.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def _bounds(low: float, high: float) -> tuple[float, float]:
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    # a constant lies in the middle
    around = 0.5 * abs(low) or 1.0
    return low - around, high + around


def _axes(lines: Sequence[Line], log: bool, from_zero: bool) -> _Axes:
    x = np.concatenate([line.x for line in lines])
    y = np.concatenate([part for line in lines for part in (line.y, line.low, line.high) if part is not None])
    y = np.log10(y) if log else y
    low = min(0.0, float(y.min())) if from_zero and not log else float(y.min())
    return _Axes(_bounds(float(x.min()), float(x.max())), _bounds(low, float(y.max())), log)


def _frame(axes: _Axes, x_label: str, share: bool) -> Markup:
    parts: list[Markup] = []
    for place in _log_ticks(*axes.y) if axes.log else ticks(*axes.y):
        value = 10.0**place if axes.log else place
        at = f"{axes.down(value):.1f}"
        parts.append(element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at))
        text = f"{100 * value:g} %" if share else number(value)
        parts.append(element("text", text, x=LEFT - 5, y=at, text_anchor="end", dominant_baseline="middle"))
    for place in ticks(*axes.x):
        parts.append(element("text", f"{place:g}", x=f"{axes.across(place):.1f}", y=HEIGHT - BOTTOM + 13, text_anchor="middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(element("text", x_label, x=f"{middle:.0f}", y=HEIGHT - 4, text_anchor="middle"))
    return join(parts)


def _curve(axes: _Axes, line: Line, colour: int) -> Markup:
    parts: list[Markup] = []
    if line.low is not None and line.high is not None:
        edge = f"{axes.points(line.x, line.high)} {axes.points(line.x[::-1], line.low[::-1])}"
        parts.append(element("polygon", class_=f"band f{colour}", points=edge))
    parts.append(element("polyline", class_=f"line s{colour}", points=axes.points(line.x, line.y)))
    # a curve of a few points is one of dots
    if len(line.x) <= 20:
        for a, b in zip(line.x.tolist(), line.y.tolist(), strict=True):
            parts.append(element("circle", class_=f"f{colour}", cx=f"{axes.across(a):.1f}", cy=f"{axes.down(b):.1f}", r=2.5))
    return join(parts)


def _strips(axes: _Axes, lines: Mapping[str, Line], x_label: str, share: bool) -> Markup:
    """Invisible strips over the picture: each tells the values at its place."""
    places = np.unique(np.concatenate([line.x for line in lines.values()]))
    if len(places) > MAX_STRIPS:
        places = places[np.linspace(0, len(places) - 1, MAX_STRIPS).round().astype(int)]
    edges = [LEFT, *((axes.across(a) + axes.across(b)) / 2 for a, b in pairwise(places.tolist())), WIDTH - RIGHT]
    strips = []
    for place, left, right in zip(places.tolist(), edges, edges[1:]):
        told = [f"{x_label} {place:g}"]
        for name, line in lines.items():
            value = float(line.y[int(np.abs(line.x - place).argmin())])
            told.append(f"{name}: {100 * value:.1f} %" if share else f"{name}: {number(value)}")
        box = {"x": f"{left:.1f}", "width": f"{right - left:.1f}", "y": f"{TOP}", "height": f"{HEIGHT - TOP - BOTTOM}"}
        strips.append(element("rect", element("title", "\n".join(told)), class_="strip", **box))
    return join(strips)


def legend(names: Sequence[str], colours: Sequence[str] | None = None) -> Markup:
    """Name curves or classes beside their colours: by default those of the style sheet, in order."""
    marks = []
    for place, name in enumerate(names):
        style = f"background: {colours[place]}" if colours is not None else f"background: var(--c{place % NUM_COLOURS})"
        marks.append(element("li", element("i", style=style, aria_hidden="true"), name))
    return element("ul", *marks, class_="legend")


def line_chart(
    title: str, lines: Mapping[str, Line], *, x_label: str, share: bool = False, log: bool = False, from_zero: bool = True
) -> Markup:
    """Draw curves of values (S,) as a figure with its legend.

    Args:
        title: Heading, and the picture's text for who cannot see it.
        lines: Name -> curve, at least one, none of them empty.
        x_label: What runs along.
        share: Values are fractions of one.
        log: Logarithmic values; all must be positive.
        from_zero: Show zero in a chart that is not logarithmic.
    """
    axes = _axes(list(lines.values()), log, from_zero)
    ends = [f"{name} from {number(float(line.y[0]))} to {number(float(line.y[-1]))}" for name, line in lines.items()]
    spoken = f"{title} over {x_label}{', logarithmic' if log else ''}: {'; '.join(ends)}"
    curves = [_curve(axes, line, place % NUM_COLOURS) for place, line in enumerate(lines.values())]
    picture = element(
        "svg", _frame(axes, x_label, share), *curves, _strips(axes, lines, x_label, share),
        viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=spoken,
    )  # fmt: skip
    head = title + (" (logarithmic)" if log else "")
    return element("figure", element("figcaption", head), picture, legend(list(lines)) if len(lines) > 1 else None)
