"""Figures of results: which there are, how sure they are, how they are written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

__all__ = ["PLACES", "Figure", "figures", "is_number", "is_share", "main_figure", "number", "percent", "row_figures", "wilson"]

# the 97.5 % quantile of the normal distribution
Z95 = 1.959963984540054
# shares of test clips that are right, as recall of the k nearest is; an "accuracy" may be one of frames or clusters
PROPORTIONS = ("top1", "top5")
# parts of a result that say how it was made
SETTINGS = frozenset({"adaptation", "config", "dataset", "options", "proposal_config", "settings", "source", "versions", "view"})
# parts of a result that have a table of their own
TABLES = frozenset({"per_class", "thresholds"})
# numbers that happen to lie between 0 and 1 and are no shares
PLAIN = frozenset(
    {"loss", "learning_rate", "weight_decay", "penalty", "seconds", "threshold", "temperature", "overlap", "momentum",
     "dropout", "drop_path", "tolerance", "gradient", "gradient_norm", "decay", "inertia"}
)  # fmt: skip
# what rows of numbers run along; fractions of one that are no results
PLACES = ("epoch", "step", "ratio", "fraction", "iou", "k")


@dataclass(frozen=True)
class Figure:
    """A number of a result.

    Attributes:
        name: Where in the result it stands, parts separated by /.
        value: The number, or the mean of several.
        share: Whether it is a fraction of one.
        low: Lower end of the 95 % interval, where there is one.
        high: Upper end.
        deviation: Sample deviation of the numbers that the value is the mean of.
        half: Half of the 95 % interval of that mean, where the task gives it; shown in place of the deviation.
        count: How many these are.
    """

    name: str
    value: float
    share: bool
    low: float | None = None
    high: float | None = None
    deviation: float | None = None
    half: float | None = None
    count: int | None = None

    @property
    def text(self) -> str:
        """The number with its interval or deviation."""

        def write(value: float) -> str:
            return f"{100 * value:.1f}" if self.share else number(value)

        spread = self.deviation if self.half is None else self.half
        shown = write(self.value) + ("" if spread is None else f" ± {write(spread)}") + (" %" if self.share else "")
        if self.low is not None and self.high is not None:
            shown += f" [{write(self.low)}, {write(self.high)}]"
        # ± alone is a deviation
        return shown if self.half is None else f"{shown} (95 % interval of the mean)"


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a probability of which `share` of `count` independent trials are right.

    Raises:
        ValueError: If the share is no fraction of one, or there was no trial.
    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    if count < 1 or not 0 <= share <= 1:
        raise ValueError(f"wilson: share must be in [0, 1] of at least one trial, got {share} of {count}. Check the result.")
    spread = Z95**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    # exact at the ends, where rounding would leave the unit interval
    return (0.0 if share == 0 else middle - half), (1.0 if share == 1 else middle + half)


def percent(value: float) -> str:
    """Write a fraction of one."""
    return f"{100 * value:.1f} %"


def number(value: float) -> str:
    """Write a number of any size in a few characters."""
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.4g}"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_share(name: str, value: float) -> bool:
    """Whether a named number is taken for a fraction of one."""
    return 0 <= value <= 1 and name not in PLAIN


def _mean(path: str, value: Mapping[str, Any]) -> Figure:
    mean, values = float(value["mean"]), value.get("values")
    deviation, half = (float(part) if is_number(part) else None for part in (value.get("deviation"), value.get("interval")))
    share, count = is_share(path.rsplit("/", 1)[-1], mean), len(values) if isinstance(values, list) else None
    return Figure(path, mean, share, deviation=deviation, half=half, count=count)


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """Find the numbers of a result: its fractions, also those inside of objects, and means with their deviation or interval.

    Whole numbers are settings and counts, and are passed over, as are lists. Shares of the "num_test" test clips get
    Wilson's interval.
    """
    count = result.get("num_test")
    found: list[Figure] = []

    def visit(prefix: str, part: Mapping[str, Any]) -> None:
        for name, value in part.items():
            path = f"{prefix}{name}"
            if isinstance(value, dict):
                if is_number(value.get("mean")):
                    found.append(_mean(path, value))
                # what has a checksum describes data
                elif name not in SETTINGS | TABLES and "sha256" not in value:
                    visit(f"{path}/", value)
            elif isinstance(value, float) and math.isfinite(value):
                share = is_share(name, value)
                proportion = share and (name in PROPORTIONS or prefix == "recall/")
                low, high = wilson(value, count) if proportion and isinstance(count, int) and count > 0 else (None, None)
                found.append(Figure(path, value, share, low, high))

    visit("", result)
    return found


def row_figures(result: Mapping[str, Any]) -> list[Figure]:
    """First number of each row of a result that is told in rows, such as one over fractions of the labels."""
    found = []
    for rows in (result.get("fractions"), result.get("curve")):
        for row in rows if isinstance(rows, list) else []:
            place = next((name for name in PLACES if name in row), None)
            numbers = figures({name: value for name, value in row.items() if name not in PLACES})
            if place is not None and numbers:
                found.append(replace(numbers[0], name=f"{numbers[0].name} at {place} {row[place]:g}"))
    return found


def main_figure(found: list[Figure]) -> Figure | None:
    """The number that stands for a result: "top1" where there is one, otherwise the first."""
    return next((figure for figure in found if figure.name == "top1"), found[0] if found else None)
