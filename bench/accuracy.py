"""Accuracy of a recipe on real data: raw coordinates, untrained and pretrained encoder, over several seeds.

    python -m fastskel.bench.accuracy usdrl-small DATA --train xview --test xview xview-clean --out RESULTS.jsonl

Each seed trains once, on the training part alone, and reads each test part once; a run found under --runs goes on, if it
is the same in all its settings. With --raw nothing is trained: raw coordinates under every normalisation. The rows'
mean and deviation go to the screen, the rows with device, versions, commit and date to the file.

`--set batch_size=256 lr_scaling=sqrt` changes settings of the recipe; `batch_size=whole` is the training part in one batch, and
`warmup_steps=0.1` that share of the steps. `--tag` tells such runs and rows from others. `train_cpu_s` is the processor time of
a training that was not resumed, which does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastskel.bench.harness import device_name
from numpy.typing import NDArray

from fastskel.data.normalise import NORMALISATIONS
from fastskel.data.packed import PackedDataset, open_dataset
from fastskel.data.protocols import split
from fastskel.data.views import ViewSpec
from fastskel.evaluate import Evaluation, LinearConfig, evaluate_knn, evaluate_linear
from fastskel.models.encoder import Encoder
from fastskel.recipes import RECIPES
from fastskel.train import Stage, load_encoder, pretrain, start

# step size and standardisation are chosen on held-out training subjects, for every kind of features alike;
# the test part is read once, after the last epoch
PROBE = LinearConfig(
    learning_rate=None, standardise=None, epochs=100, milestones=(75, 90), batch_size=128, evaluate_every=100
)
# name, encoder or None for raw coordinates, how its view is made
Contender = tuple[str, Encoder | None, ViewSpec]


def changed(recipe: Any, settings: Sequence[str], num_train: int) -> Any:
    """Return a recipe with settings "name=value" of its own, for a training part of so many clips.

    Raises:
        ValueError: If a setting is no pair, or not one of the recipe's.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        name, found, text = setting.partition("=")
        if not found or name not in asdict(recipe):
            raise ValueError(f"accuracy: set must be name=value of {sorted(asdict(recipe))}, got {setting!r}. Name a setting.")
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
    if values.get("batch_size") == "whole":
        values["batch_size"] = num_train
    # steps that are a share are one of all steps, once these are known
    share = values.pop("warmup_steps", recipe.warmup_steps)
    recipe = replace(recipe, **values)
    steps = recipe.epochs * max(num_train // recipe.batch_size, 1)
    return replace(recipe, warmup_steps=math.ceil(share * steps) if isinstance(share, float) else share)


def trained(recipe_name: str, recipe: Any, dataset: PackedDataset, indices: NDArray[np.int64], run: Path) -> dict[str, Any]:
    """Train, or take the run that is there; return the loss of its last epoch, processor seconds, and who trained it."""
    (stage,) = recipe.stages(dataset)
    # a run that is there goes on, or is finished: refused unless configuration, data and clips are these
    known, begun, begin = {"name": recipe_name, **asdict(recipe)}, run.exists(), time.process_time()
    pretrain(stage, dataset, run, indices=indices, recipe=known, resume=begun)
    seconds = time.process_time() - begin
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record and record["epoch"] == stage.epochs - 1]
    return {
        "trained_at_commit": json.loads((run / "config.json").read_text())["commit"],
        "train_cpu_s": None if begun else seconds, "final_loss": statistics.mean(losses), "train_steps": records[-1]["step"] + 1,
    }  # fmt: skip


def contenders(stage: Stage, run: Path) -> list[Contender]:
    """Return what is compared with the run's encoder."""
    encoder, view, _ = load_encoder(run)
    # raw coordinates twice: as the encoder sees them, and turned to face the camera
    turned = replace(view, normalise="align-yaw")
    raw: list[Contender] = [("raw coordinates", None, view), ("raw, aligned", None, turned)]
    # a plane has nothing to turn about
    kinds = raw if encoder.shape is None or encoder.shape[3] == 3 else raw[:1]
    return [*kinds, ("untrained encoder", start(stage)[0], view), ("pretrained encoder", encoder, view)]


def measure(
    recipe_name: str, data: Path, seed: int, train: str, tests: list[str], runs: Path, raw: bool,
    settings: Sequence[str] = (), tag: str = "",
) -> list[dict[str, Any]]:
    """Evaluate all contenders of one seed on every test protocol; one row for each pair.

    With `raw` nothing is trained: the contenders are raw coordinates under every normalisation. `settings` change the recipe
    as `changed` says, under the name of `tag`.
    """
    dataset = open_dataset(data)
    indices = split(dataset, train).train
    recipe = changed(replace(RECIPES[recipe_name](), seed=seed), settings, len(indices))
    for protocol in tests:
        if not np.array_equal(split(dataset, protocol).train, indices):
            raise ValueError(f"accuracy: {protocol} must have the training part of {train}, got another. Train on its own.")
    made: dict[str, Any] = {"trained_at_commit": None}
    run = runs / "-".join(part for part in (recipe_name, tag, data.name, str(seed)) if part)
    if raw:
        view = recipe.stages(dataset)[0].eval_view
        compared: list[Contender] = [
            (f"raw, {kind}", None, replace(view, normalise=kind)) for kind in NORMALISATIONS
        ]
    else:
        made = trained(recipe_name, recipe, dataset, indices, run)
        compared = contenders(recipe.stages(dataset)[0], run)
    rows = []
    for protocol in tests:
        for name, encoder, view in compared:
            evaluation = Evaluation(
                encoder, dataset, split(dataset, protocol), view,
                protocol=protocol, run=str(run), cache=run / "features", progress=False,
            )  # fmt: skip
            knn = evaluate_knn(evaluation)
            linear = evaluate_linear(evaluation, config=replace(PROBE, seed=seed))
            rows.append(
                {
                    "case": "accuracy", "data": dataset.source, "protocol": protocol, "features": name,
                    "normalise": view.normalise, "seed": seed,
                    "knn_top1": knn["top1"], "linear_top1": linear["top1"],
                    "linear_lr": linear["config"]["learning_rate"], "standardise": linear["config"]["standardise"],
                    "num_train": knn["num_train"], "num_test": knn["num_test"],
                    "recipe": {"name": recipe_name, **asdict(recipe)}, "tag": tag, **made,
                    "device": device_name(), "threads": torch.get_num_threads(),
                    "versions": knn["versions"], "commit": knn["commit"], "date": datetime.date.today().isoformat(),
                }
            )  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and deviation over the seeds, in percent, one line per data set, protocol and kind of features."""
    lines = [f"{'data':<10} {'protocol':<12} {'features':<28} {'1-NN':>14} {'linear':>14}  seeds"]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["protocol"], f"{row['features']} {row['tag']}".strip()), []).append(row)
    for (data, protocol, features), members in groups.items():
        cells = []
        for metric in ("knn_top1", "linear_top1"):
            values = [100 * member[metric] for member in members]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):6.1f} +- {deviation:4.1f}")
        lines.append(f"{data:<10} {protocol:<12} {features:<28} {cells[0]:>14} {cells[1]:>14}  {len(members)}")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure, print, append."""
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="name of a recipe")
    parser.add_argument("data", type=Path, help="packed data set")
    parser.add_argument("--train", required=True, help="protocol whose training part to train on")
    parser.add_argument("--test", nargs="+", required=True, help="protocols to evaluate; their training parts must agree")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--raw", action="store_true", help="train nothing: raw coordinates under every normalisation")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", dest="settings", help="settings of the recipe")
    parser.add_argument("--tag", default="", help="what runs and rows of these settings are called")
    parser.add_argument("--threads", type=int, help="compute threads")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders go")
    parser.add_argument("--out", type=Path, help="JSON lines file to append to")
    arguments = parser.parse_args()
    if arguments.settings and not arguments.tag:
        parser.error("--tag must name runs with settings of their own, got none")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        new = measure(
            arguments.recipe, arguments.data, seed, arguments.train, arguments.test, arguments.runs, arguments.raw,
            arguments.settings, arguments.tag,
        )  # fmt: skip
        rows += new
        if arguments.out:
            with arguments.out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in new)
        print(table(new), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
