"""Parts of the page: escaping, intervals, charts, maps of counts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import binomtest

from fastskel.report.charts import MAX_POINTS, Line, condense, line_chart, ticks
from fastskel.report.markup import Markup, element, escape, join, script_json
from fastskel.report.numbers import figures, main_figure, number, wilson
from fastskel.report.pictures import confusion_map, data_table, scatter, strip, timelines


def test_text_is_escaped_once(read) -> None:
    text = "<&\"'> ü \x00 \udcff"
    made = element("p", text, element("b", "<"), None, title=text, data_name=3, class_="x")
    (p,) = read(made).all("p")
    assert p.text == "<&\"'> ü \ufffd \\udcff<"
    assert p.attributes == {"title": "<&\"'> ü \ufffd \\udcff", "data-name": "3", "class": "x"}
    assert escape(escape("<")) == "&lt;" and isinstance(join(["<", Markup("<br>")], ", "), Markup)
    assert join(["<", Markup("<br>")], "&") == "&lt;&amp;<br>"
    assert element("br") == "<br>" and element("rect", x=1, y=None) == '<rect x="1"></rect>'


def test_data_for_scripts_cannot_end_them(read) -> None:
    value = {"a": ["</script><!--", "&", 1.5]}
    (script,) = read(element("script", script_json(value), type="application/json")).all("script")
    # neither an end tag nor a comment can begin
    assert json.loads(script.text) == value and "<" not in script.text


@pytest.mark.parametrize("right, count", [(0, 7), (7, 7), (1, 1), (3, 10), (618, 813), (16486, 16487)], ids=str)
def test_interval_is_wilsons(right: int, count: int) -> None:
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("share, count", [(0.5, 0), (1.1, 3), (-0.1, 3), (float("nan"), 3)])
def test_no_interval_of_what_is_no_share(share: float, count: int) -> None:
    with pytest.raises(ValueError, match="wilson: share must be"):
        wilson(share, count)


def test_figures_are_found() -> None:
    result = {
        "mean_class": 0.5, "top1": 0.6, "accuracy": 0.7, "k": 1, "flag": True, "loss": 0.3, "num_test": 10,
        "nan": float("nan"), "list": [0.1],
        "config": {"decay": 0.1}, "source": {"sha256": "x", "share": 0.5}, "fused": {"top1": 1.0, "note": "text"},
        "nmi": {"mean": 0.25, "deviation": 0.05, "values": [0.2, 0.3]},
        "episodes": {"mean": 0.25, "deviation": 0.3, "interval": 0.05, "values": [0.2, 0.3]},
        "recall": {"5": 1.0}, "thresholds": {"0.5": {"f1": 0.5}},
    }  # fmt: skip
    found = {figure.name: figure.text for figure in figures(result)}
    low, high = wilson(0.6, 10)
    assert found == {
        "mean_class": "50.0 %", "accuracy": "70.0 %", "top1": f"60.0 % [{100 * low:.1f}, {100 * high:.1f}]", "loss": "0.3",
        "fused/top1": found["fused/top1"], "nmi": "25.0 ± 5.0 %", "episodes": "25.0 ± 5.0 % (95 % interval of the mean)",
        "recall/5": found["recall/5"],
    }  # fmt: skip
    assert found["fused/top1"].endswith(", 100.0]") and found["recall/5"] == found["fused/top1"]
    assert main_figure(figures(result)).name == "top1"
    assert main_figure(figures({"acc": 0.5})).name == "acc" and main_figure([]) is None
    assert (number(1234567.0), number(12000.0), number(0.123456)) == ("1.235e+06", "12,000", "0.1235")


@pytest.mark.parametrize("low, high", [(0, 1), (0, 960), (-3.2, 7.7), (1e-8, 3e-8), (0.1, 0.100001)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 3 <= len(found) <= 8
    slack = 1e-9 * (high - low)
    assert all(low - slack <= place <= high + slack for place in found)
    lead = f"{found[1] - found[0]:.3e}".split("e")[0]
    assert lead in ("1.000", "2.000", "5.000")


def test_condensed_curve_keeps_mean_and_range() -> None:
    steps, values = np.arange(1001), np.random.default_rng(0).normal(size=1001)
    line = condense(steps, values)
    assert len(line.x) == MAX_POINTS and line.low.min() == values.min() and line.high.max() == values.max()
    assert (line.low <= line.y).all() and (line.y <= line.high).all()
    first = slice(0, len(np.array_split(steps, MAX_POINTS)[0]))
    assert (line.x[0], line.y[0]) == (steps[first].mean(), values[first].mean())
    short = condense(steps[:5], values[:5])
    assert short.low is None and short.y.tolist() == values[:5].tolist()


def points(read, chart: str) -> np.ndarray:
    (line,) = read(chart).of_class("line")
    return np.array([[float(n) for n in pair.split(",")] for pair in line.attributes["points"].split()])


def test_curve_is_drawn_to_scale(read) -> None:
    x, y = np.array([0.0, 5.0, 10.0]), np.array([0.0, 1.0, 4.0])
    drawn = points(read, line_chart("a", {"a": Line(x, y)}, x_label="step"))
    # right and up; equal steps across, a quarter of the height
    assert drawn[1, 0] - drawn[0, 0] == pytest.approx(drawn[2, 0] - drawn[1, 0], abs=0.11)
    assert (drawn[0, 1] - drawn[1, 1]) * 4 == pytest.approx(drawn[0, 1] - drawn[2, 1], abs=0.5)
    log = points(read, line_chart("a", {"a": Line(x, 10.0**x)}, x_label="step", log=True))
    assert log[0, 1] - log[1, 1] == pytest.approx(log[1, 1] - log[2, 1], abs=0.11)
    one = points(read, line_chart("a", {"a": Line(np.array([3.0]), np.array([0.0]))}, x_label="step"))
    assert np.isfinite(one).all() and one.shape == (1, 2)


@pytest.mark.parametrize("classes", [1, 3, 31, 120])
def test_confusions(read, classes: int) -> None:
    counts = np.random.default_rng(0).integers(0, 5, (classes, classes))
    counts[0] = 0
    if classes > 1:
        counts[1, 0] = 99
    root = read(confusion_map(counts.tolist(), ["<first>", "second"]))
    (picture,) = root.of_class("matrix")
    cells = picture.of_class("cell")
    if classes <= 30:
        assert len(cells) == (counts > 0).sum()
    else:
        assert sum(cell.attributes["d"].count("M") for cell in cells) == (counts > 0).sum()
    assert len([text for text in picture.all("text") if text.text == "<first>"]) == (2 if classes <= 80 else 0)
    if classes > 1:
        rows = root.all("tr")
        assert [cell.text for cell in rows[1].all("td")][:2] == ["<first>", f"99 of {counts[1].sum()}"]
    assert len(confusion_map(counts.tolist(), [])) < 4e5


@pytest.mark.parametrize("counts", [[], [[1, 2]], [[0.5]], [[-1]], "text", [["a"]]], ids=str)
def test_no_confusions(counts) -> None:
    with pytest.raises(ValueError, match="confusion must be"):
        confusion_map(counts, [])


def test_points_strips_and_tables(read) -> None:
    root = read(scatter(np.array([[0.0, 0.0], [2.0, 1.0]]), np.array([1, -1]), ["<a>", "b"], ["x", "y"], "a map"))
    low, high = root.all("circle")
    # the second point lies to the right of and above the first, at one scale
    across, up = (float(high.attributes[k]) - float(low.attributes[k]) for k in ("cx", "cy"))
    assert across == pytest.approx(-2 * up) and across > 0
    assert low.text == "<a>" and high.attributes["fill"] == "gray" and [mark.text for mark in root.all("li")] == ["y"]
    bars = read(strip([0.0, 1.0, 0.5], ["a", "b", "c"], "s")).of_class("cell")
    assert [float(bar.attributes["height"]) for bar in bars] == [0, 56, 28]
    long = read(data_table(("a",), [(str(k),) for k in range(150)], "t"))
    assert len(long.all("tr")) == 101 and "The first 100 of 150 rows." in long.text


def test_timeline_of_no_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="num_frames of a recording must be positive, got 0"):
        timelines([{"recording": "r", "num_frames": 0, "truth": [], "predicted": []}], [])
