"""The page: sections put together, written whole as one file that needs nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastskel.atomic import atomic_write
from fastskel.data.inspect import info
from fastskel.data.packed import PackedDataset
from fastskel.evaluate.report import PANELS, TERMS, log_panels
from fastskel.provenance import provenance
from fastskel.report.assets import SCRIPT, STYLE
from fastskel.report.charts import condense, line_chart
from fastskel.report.details import details
from fastskel.report.features import embedding_map, encoder_of, occlusion_maps, shown_clips
from fastskel.report.found import CONFIG_FILE, LOG_FILE, Found, Result, open_datasets, read_run
from fastskel.report.markup import Markup, element, join
from fastskel.report.motion import Motions
from fastskel.report.numbers import figures, main_figure, row_figures
from fastskel.report.pictures import data_table

__all__ = ["write_report"]

PAGE_FILE = "report.html"
# nothing is fetched, even if a name that slipped through asked for it
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
# figures of a result in the overview, beside its main one
MAX_FURTHER = 4


def _facts(config: Mapping[str, Any]) -> Markup:
    """What a run is, in a list; what its record does not say is left out."""
    recipe, identity = config.get("recipe") or {}, config.get("identity") or {}
    stage, clips = identity.get("stage") or {}, identity.get("indices")
    facts = {
        "recipe": recipe.get("name"),
        "protocol": recipe.get("protocol"),
        "encoder": stage.get("encoder"),
        "objective": stage.get("objective"),
        "data": config.get("data"),
        "clips": "all" if clips is None else clips.get("num"),
        **{key: stage.get(key) for key in ("epochs", "batch_size", "optimizer", "lr", "precision", "seed")},
        "computed on": f"{config.get('device')}, {config.get('processes')} process(es) of {config.get('threads')} thread(s)",
        "hardware": config.get("hardware"),
        "resumed": f"{len(config['resumed'])} time(s)" if config.get("resumed") else None,
        "versions": ", ".join(f"{name} {version}" for name, version in (config.get("versions") or {}).items()),
        "commit": config.get("commit"),
        "command": " ".join(map(str, config.get("command") or [])),
    }
    told = [(element("dt", name), element("dd", str(value))) for name, value in facts.items() if value not in (None, "")]
    return element("dl", *(part for pair in told for part in pair))


def _run_section(found: Found) -> Markup:
    path = found.base / CONFIG_FILE
    content: list[Markup | None] = []
    if found.config:
        content.append(found.attempt(path, "the record of the training", lambda: _facts(found.config)))
        text = json.dumps(found.config, indent=1, ensure_ascii=False)
        content.append(element("details", element("summary", "The whole record"), element("pre", text)))
        content.append(element("p", str(path), class_="path"))
    else:
        content.append(element("p", "There is no record of the training."))
    return element("section", element("h2", "Run"), *content, id="run")


def _data_section(datasets: Mapping[str, PackedDataset], found: Found) -> Markup | None:
    parts = []
    for dataset in datasets.values():
        described = found.attempt(dataset.path, "the data set", partial(info, dataset))
        if described is not None:
            summary = element("summary", f"{dataset.source}: {dataset.path}")
            parts.append(element("details", summary, element("pre", described)))
    return element("section", element("h2", "Data"), *parts, id="data") if parts else None


def _curves(found: Found) -> Markup:
    charts = []
    for heading, curves in log_panels(found.curves).items():
        lines = {name.removeprefix("terms/"): condense(*curve) for name, curve in sorted(curves.items())}
        # terms differ by orders of magnitude; a logarithm needs them positive
        log = heading == TERMS and all((values > 0).all() for _, values in curves.values())
        charts.append(line_chart(heading, lines, x_label="step", log=log, from_zero=heading in PANELS.values()))
    steps = max(len(curve[0]) for curve in found.curves.values())
    about = f"{steps} records. Of longer curves a point is the mean of its neighbours, the band their range."
    origin = element("p", str(found.base / LOG_FILE), class_="path")
    return join([element("p", about), element("div", *charts, class_="charts"), origin])


def _curves_section(found: Found) -> Markup | None:
    if not found.curves:
        return None
    drawn = found.attempt(found.base / LOG_FILE, "the curves of the training", lambda: _curves(found))
    return element("section", element("h2", "Training"), drawn, id="training")


def _overview_row(result: Result, anchor: str | None) -> list[str]:
    values, found = result.values, figures(result.values) or row_figures(result.values)
    main = main_figure(found)
    further = [figure for figure in found if figure is not main][:MAX_FURTHER]
    clips = f"{values.get('num_train', '?')} / {values.get('num_test', '?')}"
    return [
        result.task if anchor is None else element("a", result.task, href=f"#{anchor}"), result.encoder, result.data,
        "none" if main is None else f"{main.name} {main.text}",
        join([f"{figure.name} {figure.text}" for figure in further], ", "), clips, str(result.path),
    ]  # fmt: skip


def _results_sections(found: Found, datasets: Mapping[str, PackedDataset], motions: Motions) -> Markup:
    if not found.results:
        return element("section", element("h2", "Results"), element("p", "No evaluation was found."), id="results")
    rows, parts = [], []
    for place, result in enumerate(found.results):
        name = f"result-{place}"
        shown = found.attempt(result.path, "the result", partial(details, result, datasets, motions, found, name))
        row = found.attempt(result.path, "its row", partial(_overview_row, result, None if shown is None else name))
        rows += [] if row is None else [row]
        parts.append(shown)
    head = ("task", "features", "data, protocol", "main number", "further numbers", "train / test clips", "file")
    about = (
        "[low, high] is Wilson's 95 % interval of a share of the test clips, taken as independent of each other; clips of "
        "one subject are not, so that it is too narrow for new subjects. ± is the sample deviation over the runs that the result "
        "names, or half of the 95 % interval of their mean, where that is said."
    )
    table = data_table(head, rows, "Every evaluation that was found")
    return join([
        element("section", element("h2", "Results"), table, element("p", about), id="results"),
        element("section", element("h2", "Results in detail"), *parts, id="details"),
    ])  # fmt: skip


def _features(found: Found, dataset: PackedDataset, identity: str, clips: int, device: str, progress: bool) -> Markup:
    encoder, view = encoder_of(found)
    shown = shown_clips(found, dataset, identity)
    parts = [
        found.attempt(
            found.run, "the map of features",
            lambda: embedding_map(encoder, view, shown, found, device=device, progress=progress),
        )
    ]  # fmt: skip
    if clips:
        maps = found.attempt(
            found.run, "the occlusion",
            lambda: occlusion_maps(encoder, view, shown, clips=clips, device=device, progress=progress),
        )  # fmt: skip
        parts += [element("h3", "Occlusion"), maps] if maps is not None else []
    return join([*parts, element("p", f"last weights of {found.run}, clips of {dataset.path}", class_="path")])


def _features_section(
    found: Found, datasets: Mapping[str, PackedDataset], clips: int, device: str, progress: bool
) -> Markup | None:
    if not datasets:
        found.note(found.run, "the map of features and the occlusion need the data set. Give it with --data.")
        return None
    identity, dataset = next(iter(datasets.items()))
    content = found.attempt(
        found.run, "what features look like", lambda: _features(found, dataset, identity, clips, device, progress)
    )
    return None if content is None else element("section", element("h2", "Features"), content, id="features")


def _problems_section(found: Found) -> Markup:
    rows = [(problem.where, problem.reason) for problem in found.problems]
    content = data_table(("where", "why"), rows, "Parts that are missing or damaged") if rows else element("p", "Nothing.")
    return element("section", element("h2", "What is not shown"), content, id="problems")


def _page(title: str, sections: Mapping[str, Markup | None], motions: Motions) -> Markup:
    told = provenance()
    origin = f"Written by fastskel {told['versions']['fastskel']}, commit {told['commit'] or 'not known'}"
    shown = {key: section for key, section in sections.items() if section is not None}
    links = [element("a", key.capitalize(), href=f"#{key}") for key in shown]
    head = element(
        "head", element("meta", charset="utf-8"), element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY), element("title", title),
        element("style", Markup(STYLE)),
    )  # fmt: skip
    body = element(
        "body", element("header", element("h1", title), element("nav", *links, aria_label="Sections")),
        element("main", *shown.values()), element("footer", element("p", origin, class_="path")),
        motions.data(), element("script", Markup(SCRIPT)),
    )  # fmt: skip
    return join([Markup("<!DOCTYPE html>\n"), element("html", head, body, lang="en"), Markup("\n")])


def write_report(
    run: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    results: Sequence[str | os.PathLike[str]] = (),
    clips: int = 32,
    device: str = "auto",
    progress: bool = True,
) -> tuple[Path, Found]:
    """Write one HTML page of all that is known of a run: record, curves, results, features.

    What is missing or damaged is listed in the page with the reason.

    Args:
        run: Run folder, or published .pth.tar with results beside it.
        data: Packed data set of clips (T, M, V, C); None takes what the run recorded, if it is still there.
        out: File to write; None is report.html in the run, or in the results of a published file.
        results: Further folders to search for results.json.
        clips: Test clips to measure occlusion on; 0 leaves it out.
        device: Where features are computed that are not in the run's cache.
        progress: Show bars.
    Returns:
        The page, and what it was made of.
    Raises:
        ValueError: If there is neither run nor result, or a given folder is missing or damaged.
    """
    if clips < 0:
        raise ValueError(f"report: clips must be at least 0, got {clips}. Pass 0 to leave occlusion out.")
    found = read_run(run, results)
    datasets, motions = open_datasets(found, data), Motions()
    sections = {
        "run": _run_section(found),
        "data": _data_section(datasets, found),
        "training": _curves_section(found),
        "results": _results_sections(found, datasets, motions),
        "features": _features_section(found, datasets, clips, device, progress),
    }
    # last: it knows what the others could not show
    sections["problems"] = _problems_section(found)
    target = Path(out) if out is not None else found.base / PAGE_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as scratch:
        scratch.write_text(_page(f"fastskel: {found.run.resolve().name}", sections, motions), encoding="utf-8")
    return target, found
