"""Downstream tasks on real data: raw coordinates, untrained and pretrained encoder, over several seeds.

    python -m fastskel.bench.downstream usdrl-small data/nw-ucla --train xview --on data/nw-ucla:xview --trials knn linear semi
    ... --on data/sbu:fold1,fold2,fold3,fold4,fold5 --trials knn linear
    ... --on data/utkinect:subject --trials detect segment
    ... --trials zeroshot --embeddings words.json
    ... data/utd-mhad --train one-shot --on data/utd-mhad:one-shot --trials oneshot --tag one-shot
    ... --streams

Each seed trains once without labels, on the training part alone; a run found under --runs is taken or goes on, if it is the same
in all its settings. Data that the encoder was not trained on are adapted as `fastskel evaluate transfer` does. A test part is
read once for each row, and chooses nothing: step size, penalty and standardisation of a probe are chosen on held-out training
subjects, fine-tuning is read after its last epoch. Rows that are in --out already are not made again.

`detect` and `segment` take a column of the recordings instead of a protocol and leave each of its values out in turn. --flat
trains and tests on the first two coordinates alone, as a camera without perspective has them. --streams compares joints, bones
and motion, their late fusion, and one encoder of all three. Settings of a recipe are changed by --set, as in `bench.accuracy`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastskel.bench.accuracy import PROBE, Contender, changed, contenders, trained
from fastskel.bench.harness import append_rows, origin
from fastskel.bench.trials import TRIALS, Metrics

from fastskel.data import pack_arrays
from fastskel.data.identity import dataset_identity
from fastskel.data.packed import PackedDataset, open_dataset
from fastskel.data.protocols import protocols, split
from fastskel.evaluate import Evaluation, adapt
from fastskel.evaluate.dense import leave_one_out
from fastskel.evaluate.fusion import evaluate_fusion
from fastskel.recipes import RECIPES

__all__ = ["STREAMS", "flat", "main", "measure", "measure_streams", "table"]

CASE, STREAMS_TASK = "downstream", "streams"
# as `bench.accuracy.contenders` calls them
CONTENDERS = ("raw coordinates", "raw, aligned", "untrained encoder", "pretrained encoder")
# what a recipe is trained on, and how it is called
STREAMS: Mapping[str, Sequence[str]] = {
    "": [], "bone": ["stream=bone"], "motion": ["stream=motion"], "multimodal": ["consistency=multi-modal"],
}  # fmt: skip


def _is_flat(made: PackedDataset, dataset: PackedDataset) -> bool:
    """Whether one data set holds the first two coordinates of another's clips (T, M, V, 3), and its names and labels."""
    return (
        np.array_equal(made.names, dataset.names)
        and np.array_equal(made.labels, dataset.labels)
        and all(np.array_equal(made.clip(number), dataset.clip(number)[..., :2]) for number in range(len(dataset)))
    )


def flat(dataset: PackedDataset, folder: Path) -> PackedDataset:
    """The first two coordinates of a data set's clips (T, M, V, 3), packed into a folder if they are not there yet.

    Raises:
        ValueError: If the folder holds something else.
    """
    if folder.exists():
        made = open_dataset(folder)
        if not _is_flat(made, dataset):
            raise ValueError(
                f"downstream: {folder} must hold the first two coordinates of {dataset.path}, got those of other clips. "
                "Name another folder."
            )
        return made
    meta, clips = dataset.meta, range(len(dataset))
    # protocols go by the name of the source, which is another one now
    parts = {name: vars(split(dataset, name)) for name in protocols(dataset)}
    return pack_arrays(
        (np.asarray(dataset.clip(number))[..., :2] for number in clips), out=folder, topology=dataset.topology,
        labels=dataset.labels, names=[str(name) for name in dataset.names], class_names=dataset.class_names, num_frames="all",
        columns={name: np.asarray(values) for name, values in dataset.columns.items() if not dataset.per_frame(name)},
        splits=parts, num_bodies=dataset.num_bodies_max, channels=meta["channels"][:2], units=meta["units"],
        up_axis=meta["up_axis"], source=f"{meta['source']}-2d",
    )  # fmt: skip


def _evaluation(
    contender: Contender, source: PackedDataset, dataset: PackedDataset, protocol: str, untrimmed: bool, run: Path
) -> Evaluation:
    """One contender on a part of a data set, adapted if its encoder was made for other clips."""
    _, encoder, view = contender
    parts = leave_one_out(dataset, protocol, np.arange(len(dataset)))[0][1] if untrimmed else split(dataset, protocol)
    other = dataset_identity(dataset) != dataset_identity(source)
    view = replace(view, topology=None) if encoder is None and other else view
    evaluation = Evaluation(
        encoder, dataset, parts, view, protocol=protocol, run=str(run), cache=run / "features", progress=False
    )
    if encoder is None or not other:
        return evaluation
    return adapt(evaluation, source={key: source.meta[key] for key in ("units", "up_axis", "channels")})[0]


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("recipe", "trained_on", "tag", "data", "protocol", "task", "features", "seed"))


def _done(out: Path | None) -> set[tuple[str, ...]]:
    """Rows that a file holds already."""
    if out is None or not out.exists():
        return set()
    rows = (json.loads(line) for line in out.read_text().splitlines())
    return {_key(row) for row in rows if row.get("case") == CASE}


def _finished(facts: Mapping[str, Any], metrics: Metrics, out: Path | None) -> dict[str, Any]:
    """Complete a row and write it."""
    row = {"case": CASE, **facts, "metrics": metrics, **origin()}
    if out is not None:
        append_rows(out, [row])
    print(_line(row), flush=True)
    return row


def _line(row: Mapping[str, Any]) -> str:
    values = "  ".join(f"{name} {100 * value:.1f}" for name, value in row["metrics"].items())
    return f"{row['data']} {row['protocol']} {row['task']} {row['features']} {row['tag']} seed {row['seed']}: {values}"


def _begin(
    name: str, seed: int, settings: Sequence[str], tag: str, source: PackedDataset, train: str, runs: Path
) -> tuple[Any, Path, dict[str, Any]]:
    """Train a run, or take it; return its recipe, its folder, and what its rows say of it."""
    indices = split(source, train).train
    recipe = changed(replace(RECIPES[name](), seed=seed), settings, len(indices))
    run = runs / "-".join(part for part in (name, tag, source.path.name, str(seed)) if part)
    made = trained(name, recipe, source, indices, run)
    usual = asdict(replace(RECIPES[name](), seed=seed))
    facts = {
        "recipe": name, "settings": {key: value for key, value in asdict(recipe).items() if value != usual[key]}, "tag": tag,
        "seed": seed, "trained_on": f"{source.source} {train}", "trained_at_commit": made["trained_at_commit"],
    }  # fmt: skip
    return recipe, run, facts


def measure(
    name: str, seed: int, source: PackedDataset, train: str, targets: Sequence[tuple[PackedDataset, Sequence[str]]],
    trials: Sequence[str], runs: Path, out: Path | None = None, settings: Sequence[str] = (), tag: str = "",
    words: Path | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Try raw coordinates, the untrained and the pretrained encoder of one seed; one row for each task and test part.

    Args:
        name: Of the recipe.
        seed: Of the recipe, and of what the tasks draw.
        source: Data set to train on.
        train: Its protocol.
        targets: Data sets to test on, with their protocols, or columns to leave out.
        trials: Names of `TRIALS`.
        runs: Where the run folders go.
        out: File of rows, which are added one by one; what is there is not measured again.
        settings: Of the recipe, changed as `bench.accuracy.changed` says.
        tag: Name of such settings.
        words: File of text embeddings of the class names, for trials that need one.
    """
    wordless = [task for task in trials if TRIALS[task].worded and words is None]
    if wordless:
        raise ValueError(f"downstream: embeddings must be given for {wordless[0]}, got none. Pass a file of them.")
    recipe, run, facts = _begin(name, seed, settings, tag, source, train, runs)
    done, rows, offered = _done(out), [], contenders(recipe.stages(source)[0], run)
    for dataset, tests in targets:
        for protocol in tests:
            for contender in offered:
                for task in trials:
                    trial = TRIALS[task]
                    if trial.trains and contender[1] is None:
                        continue
                    row = {**facts, "data": dataset.source, "protocol": protocol, "task": task, "features": contender[0]}
                    if _key(row) not in done:
                        evaluation = _evaluation(contender, source, dataset, protocol, trial.untrimmed, run)
                        metrics = trial.run(evaluation, seed, words) if trial.worded else trial.run(evaluation, seed)
                        rows.append(_finished(row, metrics, out))
    return rows


def measure_streams(
    name: str, seed: int, source: PackedDataset, train: str, tests: Sequence[str], runs: Path, out: Path | None = None,
    settings: Sequence[str] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """Compare joints, bones and motion of one seed, alone and fused late, with one encoder of all three; a row for each.

    Raw coordinates and untrained encoders are fused too: what fusion gains is not always what pretraining gains.
    """
    made = {tag: _begin(name, seed, [*settings, *own], tag, source, train, runs) for tag, own in STREAMS.items()}
    done, rows = _done(out), []
    offered = {
        tag: {each[0]: each for each in contenders(recipe.stages(source)[0], run)} for tag, (recipe, run, _) in made.items()
    }
    facts = {**made[""][2], "data": source.source, "task": STREAMS_TASK}
    for protocol in tests:
        for kind in ("raw coordinates", "untrained encoder", "pretrained encoder"):
            evaluations = {
                tag: _evaluation(members[kind], source, source, protocol, False, made[tag][1]) for tag, members in offered.items()
            }
            parts = {**facts, "protocol": protocol}
            wanted = {stream: {**parts, "features": f"{kind}, {stream}"} for stream in ("joint", "bone", "motion", "late fusion")}
            if not all(_key(row) in done for row in wanted.values()):
                fused = evaluate_fusion([evaluations[tag] for tag in ("", "bone", "motion")], config=replace(PROBE, seed=seed))
                for row, result in zip(wanted.values(), [*fused["alone"], fused], strict=True):
                    rows.append(_finished(row, {"knn": result["knn_top1"], "linear": result["top1"]}, out))
            row = {**parts, "features": f"{kind}, multi-modal"}
            # raw coordinates have no encoder that fuses them
            if kind != "raw coordinates" and _key(row) not in done:
                metrics = {task: TRIALS[task].run(evaluations["multimodal"], seed)["top1"] for task in ("knn", "linear")}
                rows.append(_finished(row, metrics, out))
    return rows


def _cell(seeds: Mapping[int, Sequence[float]] | None) -> str:
    """Mean and deviation over seeds, in percent, if they differ; a seed with several parts counts with their mean."""
    if seeds is None:
        return ""
    values = [100 * statistics.mean(parts) for parts in seeds.values()]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean and deviation over the seeds, in percent: a table for each training and test part, a column for each contender.

    Test parts that differ in a last number alone, such as folds, are parts of one.
    """
    tables: dict[str, dict[str, dict[str, dict[int, list[float]]]]] = {}
    tasks = [*TRIALS, STREAMS_TASK]
    for row in sorted(rows, key=lambda row: tasks.index(row["task"])):
        # of streams, the contender comes first and what it looks at second
        who, _, stream = row["features"].rpartition(", ") if row["task"] == STREAMS_TASK else (row["features"], "", "")
        trained_on = f"{row['trained_on']} {row['tag']}".strip()
        title = f"{row['data']} {row['protocol'].rstrip('0123456789')}, trained on {trained_on}"
        for metric, value in row["metrics"].items():
            line = " ".join(part for part in (row["task"], stream, metric) if part)
            tables.setdefault(title, {}).setdefault(line, {}).setdefault(who, {}).setdefault(row["seed"], []).append(value)
    text = []
    for title, lines in tables.items():
        columns = sorted({who for cells in lines.values() for who in cells}, key=CONTENDERS.index)
        text += [f"{title}:", "", f"| | {' | '.join(columns)} | seeds |", "|---" * (len(columns) + 2) + "|"]
        for line, cells in lines.items():
            counts = sorted({len(seeds) for seeds in cells.values()})
            text.append(f"| {line} | {' | '.join(_cell(cells.get(who)) for who in columns)} | {'/'.join(map(str, counts))} |")
        text.append("")
    return "\n".join(text)


def _target(text: str) -> tuple[PackedDataset, list[str]]:
    """Data set and protocols of "DATA:PROTOCOL,PROTOCOL"."""
    path, colon, protocols = text.rpartition(":")
    if not colon or not path or not protocols:
        raise ValueError(f"downstream: on must be DATA:PROTOCOL, got {text!r}. Name a data set and a protocol.")
    return open_dataset(Path(path)), protocols.split(",")


def main() -> None:
    """Parse the command line, measure, print, append."""
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.downstream", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", help="name of a recipe")
    parser.add_argument("data", nargs="?", type=Path, help="packed data set to train on")
    parser.add_argument("--train", help="protocol whose training part to train on")
    parser.add_argument("--on", nargs="+", default=[], metavar="DATA:PROTOCOL,..", help="where to test")
    parser.add_argument("--trials", nargs="+", choices=list(TRIALS), default=["knn", "linear"], help="tasks")
    parser.add_argument("--embeddings", type=Path, metavar="FILE", help="text embeddings of the class names, for zeroshot")
    parser.add_argument("--streams", action="store_true", help="joints, bones, motion and their fusions, by --train's test part")
    parser.add_argument("--flat", type=Path, metavar="FOLDER", help="keep two coordinates; where the data of them are packed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", dest="settings", help="settings of the recipe")
    parser.add_argument("--tag", default="", help="what runs and rows of these settings are called")
    parser.add_argument("--threads", type=int, help="compute threads")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders go")
    parser.add_argument("--out", type=Path, help="JSON lines file to append to")
    parser.add_argument("--table", action="store_true", help="print the table of --out, measure nothing")
    arguments = parser.parse_args()
    if arguments.table:
        if arguments.out is None:
            parser.error("--out must name the file of rows to show, got none")
        print(table([row for row in map(json.loads, arguments.out.read_text().splitlines()) if row.get("case") == CASE]))
        return
    if None in (arguments.recipe, arguments.data, arguments.train):
        parser.error("recipe, data and --train must be given to measure anything, got not all of them")
    if arguments.settings and not arguments.tag:
        parser.error("--tag must name runs with settings of their own, got none")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    source = open_dataset(arguments.data)
    targets = [_target(text) for text in arguments.on]
    if arguments.flat is not None:
        # the training data's own: what else is tested on has as many coordinates already
        own, plane = dataset_identity(source), flat(source, arguments.flat)
        targets = [(plane if dataset_identity(data) == own else data, tests) for data, tests in targets]
        source = plane
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        if arguments.streams:
            rows += measure_streams(
                arguments.recipe, seed, source, arguments.train, [arguments.train], arguments.runs, arguments.out,
                arguments.settings,
            )
        rows += measure(
            arguments.recipe, seed, source, arguments.train, targets, arguments.trials, arguments.runs, arguments.out,
            arguments.settings, arguments.tag, arguments.embeddings,
        )  # fmt: skip
    print(table(rows))


if __name__ == "__main__":
    main()
