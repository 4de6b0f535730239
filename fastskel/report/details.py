"""Each result in full: its numbers, and a picture of what is known to be drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from fastskel.data.packed import PackedDataset
from fastskel.report.charts import Line, line_chart
from fastskel.report.found import CONFUSION_FILE, Found, Result, class_names, read_confusion
from fastskel.report.markup import Markup, element, join
from fastskel.report.motion import Motions
from fastskel.report.numbers import PLACES, Figure, figures, is_number, is_share, number, percent
from fastskel.report.pictures import confusion_map, data_table, timelines

__all__ = ["details"]

Rows = Sequence[Mapping[str, Any]]
# queries of one result that are shown with their neighbours
MAX_QUERIES, MAX_NEIGHBOURS = 6, 5
# longer lists are summed up where settings are printed
MAX_PRINTED = 20


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        # a mean with its deviation or interval
        return figures({name: value})[0].text
    if isinstance(value, float) and math.isfinite(value):
        return percent(value) if is_share(name, value) and name not in PLACES else number(value)
    return str(value)


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _is_mean(value: object) -> bool:
    return isinstance(value, dict) and is_number(value.get("mean"))


def _rows_table(rows: Rows, caption: str) -> Markup:
    """Table of rows; what is neither a single value nor a mean is left out."""
    plain = [{key: value for key, value in row.items() if _is_mean(value) or not isinstance(value, (dict, list))} for row in rows]
    names = list(dict.fromkeys(key for row in plain for key in row))
    if not names:
        raise ValueError("the rows hold no single values")
    return data_table(names, [[_cell(name, row.get(name)) for name in names] for row in plain], caption)


def _line(rows: Rows, x: str, name: str) -> Line | None:
    """Curve of a number, (S,), or of a mean with its deviation as band; None where rows hold no such thing."""
    known = [(row[x], row.get(name), 0.0) for row in rows if is_number(row.get(x)) and is_number(row.get(name))]
    means = [(row[x], row[name]) for row in rows if is_number(row.get(x)) and _is_mean(row.get(name))]
    known += [(place, value["mean"], value.get("deviation") or 0.0) for place, value in means]
    if not known:
        return None
    places, values, spread = np.array(sorted(known), dtype=np.float64).T
    return Line(places, values, values - spread, values + spread) if means else Line(places, values)


def _rows_charts(rows: Rows, title: str) -> Markup:
    """Charts of rows over what they run along: shares in one, every other number in one of its own."""
    x = next((name for name in PLACES if name in rows[0]), None)
    if x is None:
        raise ValueError(f"rows must have one of {', '.join(PLACES)}, got {', '.join(rows[0])}")
    if {"mean", "deviation"} <= set(rows[0]):
        rows = [{x: row[x], "mean ± deviation": row} for row in rows]
    # counts are for the table
    names = [name for name in rows[0] if name not in PLACES and not name.startswith("num_")]
    lines = {name: line for name in names if (line := _line(rows, x, name)) is not None}
    shares = {name: line for name, line in lines.items() if all(is_share(name, value) for value in line.y.tolist())}
    charts = [line_chart(title, shares, x_label=x, share=True)] if shares else []
    charts += [line_chart(name, {name: line}, x_label=x) for name, line in lines.items() if name not in shares]
    if not charts:
        raise ValueError("the rows hold no numbers")
    return element("div", *charts, class_="charts")


def _chart_and_table(rows: Rows, title: str) -> Markup:
    return join([_rows_charts(rows, title), _rows_table(rows, title)])


def _by_threshold(told: Any, title: str) -> Markup:
    """Numbers by IoU, whether they are told as rows or by the threshold's name."""
    rows = [{"iou": float(name), **row} for name, row in told.items()] if isinstance(told, dict) else told
    return _chart_and_table(rows, title)


def _by_class(told: Mapping[str, Any]) -> Markup:
    rows = [(name, _cell("share", value)) for name, value in told.items()]
    return data_table(("class", "value"), rows, "By class")


def _examples(examples: Rows, dataset: PackedDataset | None, names: Sequence[str], motions: Motions) -> Markup:
    """Queries beside their nearest training clips, as moving skeletons."""
    if dataset is None:
        raise ValueError("the data set of the result is not at hand. Give it with --data.")

    def named(label: int) -> str:
        return names[label] if 0 <= label < len(names) else f"class {label}"

    chosen = sorted({round(place) for place in np.linspace(0, len(examples) - 1, min(MAX_QUERIES, len(examples)))})
    rows = []
    for example in (examples[place] for place in chosen):
        query, label = example["query"], example["label"]
        shown = [motions.figure(dataset, query, f"query: {named(label)}", "query")]
        similarities = example.get("similarities") or []
        for rank, (clip, other) in enumerate(zip(example["neighbours"][:MAX_NEIGHBOURS], example["labels"]), 1):
            alike = f", similarity {similarities[rank - 1]:.3f}" if rank <= len(similarities) else ""
            kind = "right" if other == label else "wrong"
            shown.append(motions.figure(dataset, clip, f"{rank}. {kind}: {named(other)}{alike}", kind))
        rows.append(element("div", *shown, class_="clips"))
    head = f"{len(chosen)} of {len(examples)} queries, each beside its nearest training clips; at most 40 frames of a clip."
    return join([element("p", head, element("button", "Play", class_="play", type="button", hidden="hidden")), *rows])


def _confusion(result: Result, names: Sequence[str], found: Found) -> Markup | None:
    """Map of a result's counts; the file beside it says which classes these are, where they are not all of the data."""
    counts, path = result.values.get("confusion"), result.path.with_name(CONFUSION_FILE)
    read = found.attempt(path, "the table of confusions", partial(read_confusion, path)) if path.is_file() else None
    if read is not None:
        names, counts = read[0], read[1] if counts is None else counts
    if counts is None:
        return None
    return confusion_map(counts, names if len(names) == len(counts) else [])


def _brief(value: Any) -> Any:
    """What a result says, long lists summed up."""
    if isinstance(value, dict):
        return {key: _brief(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_brief(inner) for inner in value] if len(value) <= MAX_PRINTED else f"... {len(value)} entries, see the file"
    return value


def _numbers(found: Sequence[Figure]) -> Markup | None:
    runs = any(figure.count is not None for figure in found)
    rows = [[figure.name, figure.text] + [str(figure.count or "")] * runs for figure in found]
    return data_table(["number", "value"] + ["runs"] * runs, rows, "Numbers of the result") if rows else None


def details(result: Result, datasets: Mapping[str, PackedDataset], motions: Motions, found: Found, anchor: str) -> Markup:
    """Show one result: heading, numbers, pictures, settings. What cannot be drawn becomes a problem."""
    values, names = result.values, class_names(result, datasets)
    dataset = datasets.get(result.identity or "")
    drawn = {"confusion", "class_names"}

    def part(key: str, what: str, make: Callable[[Any], Markup | None]) -> Markup | None:
        drawn.add(key)
        value = values.get(key)
        return None if not value else found.attempt(result.path, what, lambda: make(value))

    content = [
        _numbers(figures(values)),
        part("curve", "the curve", lambda rows: _chart_and_table(rows, f"{result.task}: curve")),
        part("fractions", "the curve over fractions", lambda rows: _chart_and_table(rows, f"{result.task}: by labels")),
        part("thresholds", "the table over thresholds", lambda told: _by_threshold(told, f"{result.task}: by threshold")),
        part("timelines", "the timelines", lambda rows: timelines(rows, names)),
        part("examples", "the retrieval examples", lambda rows: _examples(rows, dataset, names, motions)),
        found.attempt(result.path, "the confusion matrix", lambda: _confusion(result, names, found)),
        part("per_class", "the table of classes", _by_class),
        part("history", "the history", lambda rows: _rows_charts(rows, f"{result.task}: while training")),
    ]
    for key, value in values.items():
        if key not in drawn and _is_rows(value):
            content.append(part(key, key, partial(_rows_table, caption=key)))
    rest = json.dumps(_brief({key: value for key, value in values.items() if key not in drawn}), indent=1, ensure_ascii=False)
    origin = element("details", element("summary", "Settings and origin"), element("pre", rest))
    seen = values.get("test_clips_trained_on")
    warnings = [f"{seen} of {values.get('num_test')} test clips were trained on, without their labels."] if seen else []
    if unknown := values.get("test_labels_not_known"):
        warnings.append(f"Whether the encoder saw labels of the test clips is not known: {unknown}.")
    return element(
        "section", element("h3", f"{result.task}: {result.encoder}, {result.data}"),
        element("p", str(result.path), class_="path"), *(element("p", element("strong", text)) for text in warnings), *content,
        origin, id=anchor,
    )  # fmt: skip
