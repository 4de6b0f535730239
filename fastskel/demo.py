"""The main job on motion that the demo makes itself: pack, pretrain, evaluate, draw, and say what to try next."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastskel.data.inspect import show
from fastskel.data.protocols import split
from fastskel.data.synthetic import make_synthetic
from fastskel.evaluate import Evaluation, LinearConfig, evaluate_knn, evaluate_linear
from fastskel.evaluate.report import curves_figure, embedding_figure, write_results
from fastskel.models.encoder import Encoder
from fastskel.recipes import RECIPES
from fastskel.train import load_encoder, pretrain, start

__all__ = ["run_demo"]

PROTOCOL = "xsub"
NUM_ANIMATED = 4
# what makes the task one for learned features: nearest neighbours of raw coordinates mistake a lost joint for a pose
MAX_LOST = 12


def _table(rows: dict[str, dict[str, float]]) -> str:
    head = f"{'features':<22}{'1-NN':>10}{'linear':>10}"
    body = [f"{name:<22}{100 * row['knn']:>8.1f} %{100 * row['linear']:>8.1f} %" for name, row in rows.items()]
    return "\n".join([head, "-" * len(head), *body])


def run_demo(out: str | os.PathLike[str], *, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Run the whole path on synthetic clips, (T, M, V, C), and leave data, run, results and pictures behind.

    Args:
        out: Folder to create.
        seed: Seed of data and training.
        quick: Few clips and steps: whether everything works, not what it learns.
    Returns:
        1-NN and linear accuracy of raw coordinates, untrained and pretrained encoder.
    Raises:
        ValueError: If the folder exists.
    """
    folder = Path(out)
    if folder.exists():
        raise ValueError(f"demo: out must be new, got the existing {folder}. Remove it or choose another with --out.")
    started = time.perf_counter()
    print("1/4  making synthetic motion")
    dataset = make_synthetic(folder / "data", num_clips=240 if quick else 1600, seed=seed, max_lost=MAX_LOST)
    parts = split(dataset, PROTOCOL)
    print(
        f"     {len(dataset)} clips of {len(dataset.class_names)} actions: {len(parts.train)} of some subjects to train on, "
        f"{len(parts.test)} of others to test on; in each the sensor loses up to {MAX_LOST} of 25 joints"
    )

    recipe = replace(RECIPES["usdrl-demo"](), seed=seed)
    if quick:
        recipe = replace(recipe, epochs=1)
    (stage,) = recipe.stages(dataset)
    print("2/4  pretraining USDRL without labels")
    run = folder / "run"
    pretrain(stage, dataset, run, indices=parts.train, recipe={"name": "usdrl-demo", **asdict(recipe)})

    print("3/4  evaluating frozen features: nearest neighbour and linear probe")
    encoder, view, _ = load_encoder(run)
    contenders: dict[str, Encoder | None] = {
        "raw coordinates": None, "untrained encoder": start(stage)[0], "pretrained encoder": encoder,
    }  # fmt: skip
    # step size and standardisation are chosen on held-out training clips, for each kind of features alike
    probe = LinearConfig(
        learning_rate=None, standardise=None, epochs=20 if quick else 100, milestones=(75, 90), batch_size=128
    )
    rows: dict[str, dict[str, float]] = {}
    features = {}
    for name, contender in contenders.items():
        evaluation = Evaluation(
            contender, dataset, parts, view, protocol=PROTOCOL, run=str(run), cache=folder / "features", progress=False
        )
        target = folder / "results" / name.replace(" ", "-")
        knn = evaluate_knn(evaluation, target / "knn")
        linear = evaluate_linear(evaluation, target / "linear", config=probe)
        rows[name] = {"knn": knn["top1"], "linear": linear["top1"]}
        _, test = evaluation.features()
        features[name] = (test.features, test.labels)

    print("4/4  drawing")
    pictures = folder / "pictures"
    pictures.mkdir()
    embedding_figure(pictures / "embedding.png", features, dataset.class_names, "Test clips of unseen subjects")
    curves_figure(pictures / "training.png", run / "log.jsonl", "USDRL pretraining on synthetic motion")
    # of each of the first actions the test clip in which the sensor lost least
    for label in range(min(NUM_ANIMATED, len(dataset.class_names))):
        of_class = parts.test[dataset.labels[parts.test] == label]
        seen = [np.count_nonzero(dataset.clip(int(number)).any(axis=(0, 1, 3))) for number in of_class]
        if seen:
            show(dataset, int(of_class[np.argmax(seen)]), pictures)
    seconds = time.perf_counter() - started
    chance = 1 / len(np.unique(dataset.labels))
    result: dict[str, Any] = {"seconds": seconds, "accuracy": rows, "chance": chance}
    write_results(folder / "results.json", result)
    print(f"\n{_table(rows)}\n")
    print(f"chance is {100 * chance:.1f} %; test subjects were never seen; {seconds:.0f} s in all")
    if quick:
        print("quick: too few steps to learn; the figures say only that everything works")
    print(f"pictures: {pictures}   results: {folder / 'results'}   run: {run}\n")
    print("next, on your own data:")
    print("  fastskel pack --help                          public data sets; fastskel.data.pack_arrays for your arrays")
    print("  fastskel pretrain usdrl-small DATA --protocol xsub")
    print("  fastskel evaluate knn runs/usdrl-small-DATA-0 DATA --protocol xsub")
    return result
