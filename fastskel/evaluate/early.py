r"""Early action prediction: how well a clip is recognised of which only the first frames were observed.

Two schemes. By prefix, the reference's: of a clip of n frames the first max(3, floor(n r)) are a clip of their own, resized to
the T frames of the view, for training and test alike; each observation ratio r has a classifier of its own, or all share that
of whole clips. A prefix is the same mapped frames under other offsets: nothing is copied and the loader knows of nothing.

Causally: the encoder runs once over the whole clip with a temporal stream that looks at the past only, and one classifier reads
the tokens of the first ceil(r T) frames of the view. The spatial stream sees all frames and is left out. The view resizes the
clip first, so its last observed frame may be interpolated with the next one of the clip; its length is known to both schemes.
Fine-tuning teaches an encoder this form; a frozen one was not trained for it and loses by it.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fastskel.atomic import atomic_write
from fastskel.data.identity import original_identity
from fastskel.data.packed import PackedDataset
from fastskel.data.protocols import Split
from fastskel.evaluate.causal import causal_features
from fastskel.evaluate.classifier import class_scores
from fastskel.evaluate.evaluation import TASKS, Evaluation, Task
from fastskel.evaluate.features import FeatureSet
from fastskel.evaluate.finetune import FinetuneConfig, fine_tune
from fastskel.evaluate.linear import LinearConfig, linear_probe
from fastskel.evaluate.metrics import class_metrics
from fastskel.evaluate.report import write_results

__all__ = ["RATIOS", "area", "evaluate_early", "first_frames", "observed"]

RATIOS = tuple(tenth / 10 for tenth in range(1, 11))
# the reference's least prefix
MIN_FRAMES = 3


def first_frames(dataset: PackedDataset, ratio: float, minimum: int = MIN_FRAMES) -> tuple[PackedDataset, NDArray[np.int64]]:
    """Cut every clip after its first max(minimum, floor(n ratio)) of n frames, at most n.

    Args:
        dataset: Packed clips (T, M, V, C); its frames are shared.
        ratio: Share of a clip that is kept, in (0, 1].
        minimum: Frames that are kept of any clip that has them.
    Returns:
        A data set whose clips are the prefixes and, unlabelled, what follows them, with an identity of its own; and the number
        that each prefix has in it, (n,).
    Raises:
        ValueError: If the ratio is not in (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"first_frames: ratio must be in (0, 1], got {ratio}. Give the share that is observed.")
    starts, lengths = dataset.offsets[:-1], dataset.num_frames
    kept = np.minimum(np.maximum(np.floor(lengths * ratio).astype(np.int64), minimum), lengths)
    # a prefix that is the whole clip leaves no rest, so its end is listed once
    bounds = np.unique(np.concatenate([dataset.offsets, starts + kept]))
    place = np.searchsorted(bounds, starts)
    owner = np.searchsorted(dataset.offsets, bounds[:-1], side="right") - 1
    prefix = np.isin(np.arange(len(owner)), place)
    columns = {
        name: values if dataset.per_frame(name) else np.asarray(values)[owner] for name, values in dataset.columns.items()
    }
    meta = {**dataset.meta, "original": original_identity(dataset)}
    if meta.get("checksums"):
        meta["checksums"] = {**meta["checksums"], "first_frames": f"{ratio!r}, at least {minimum}"}
    names, labels = dataset.names[owner], dataset.labels[owner]
    cut = replace(
        dataset, meta=meta, offsets=bounds, names=np.where(prefix, names, np.char.add(names, " rest")),
        labels=np.where(prefix, labels, -1), num_bodies=dataset.num_bodies[owner], columns=columns, segments=None, splits={},
    )  # fmt: skip
    return cut, place


def observed(evaluation: Evaluation, ratio: float) -> Evaluation:
    """The same evaluation of the first frames of its clips (T, M, V, C), in the same order."""
    if ratio == 1:
        return evaluation
    dataset, place = first_frames(evaluation.dataset, ratio)
    split = Split(*(place[np.asarray(part, np.int64)] for part in (evaluation.split.train, evaluation.split.test)))
    seen = None if evaluation.trained_on is None else place[evaluation.trained_on]
    return replace(evaluation, dataset=dataset, split=split, trained_on=seen)


def _frames_of(ratio: float, frames: int) -> int:
    # rounded: 0.55 * 20 is a little more than 11
    return max(1, math.ceil(round(ratio * frames, 9)))


def _probe_scores(
    train: FeatureSet, tests: Sequence[FeatureSet], evaluation: Evaluation, config: LinearConfig | None, column: str
) -> list[Tensor]:
    """Train one probe and score several sets of the test clips."""
    groups = evaluation.groups(train.index, column)
    probe = linear_probe(
        train, tests[-1], len(evaluation.class_names), config, groups=groups, device=evaluation.device
    )
    return [functional.linear(test.features, probe.weight, probe.bias) for test in tests]


def _frozen_scores(
    evaluation: Evaluation, parts: Sequence[Evaluation], config: LinearConfig | None, train_full: bool, column: str
) -> list[Tensor]:
    if train_full:
        tests = [part.features_of(part.known("test")) for part in parts]
        return _probe_scores(evaluation.features_of(evaluation.known("train")), tests, evaluation, config, column)
    scores = []
    for part in parts:
        train, test = part.features()
        scores += _probe_scores(train, [test], part, config, column)
    return scores


def _finetuned_scores(
    evaluation: Evaluation, ratios: Sequence[float], parts: Sequence[Evaluation], config: FinetuneConfig, train_full: bool,
    out: Path | None, resume: bool,
) -> list[Tensor]:  # fmt: skip
    def place(name: str) -> Path | None:
        return None if out is None else out / name

    if not train_full:
        return [
            fine_tune(part, config, out=place(f"ratio-{100 * ratio:g}"), resume=resume).scores
            for ratio, part in zip(ratios, parts, strict=True)
        ]
    made = fine_tune(evaluation, config, out=place("full"), resume=resume)
    return [
        class_scores(
            made.classifier, part.dataset, part.view, part.known("test"), batch_size=part.batch_size, device=part.device,
            num_threads=part.num_threads, precision=part.precision,
        )
        for part in parts
    ]  # fmt: skip


def _causal_scores(
    evaluation: Evaluation, ratios: Sequence[float], config: LinearConfig | None, tuned: FinetuneConfig | None, out: Path | None,
    resume: bool, column: str,
) -> list[Tensor]:  # fmt: skip
    frames = tuple(_frames_of(ratio, evaluation.view.frames) for ratio in ratios)
    if tuned is not None:
        place = None if out is None else out / "causal"
        return list(fine_tune(evaluation, tuned, frames=frames, out=place, resume=resume).scores.unbind(1))
    train = causal_features(evaluation, evaluation.known("train"), frames)
    test = causal_features(evaluation, evaluation.known("test"), frames)
    return [_probe_scores(own, [other], evaluation, config, column)[0] for own, other in zip(train, test, strict=True)]


def area(ratios: Sequence[float], values: Sequence[float]) -> float:
    """Mean of a curve of values (R,) over its ratios (R,), by trapezoids; that of one point is its value."""
    if len(ratios) == 1:
        return values[0]
    steps = zip(ratios, ratios[1:], values, values[1:], strict=False)
    return sum(0.5 * (high - low) * (a + b) for low, high, a, b in steps) / (ratios[-1] - ratios[0])


def _write(out: Path, results: dict[str, Any], title: str) -> None:
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    curve = results["curve"]
    with atomic_write(out / "curve.csv") as scratch, open(scratch, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(curve[0]))
        writer.writeheader()
        writer.writerows(curve)
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([100 * row["ratio"] for row in curve], [100 * row["top1"] for row in curve], marker="o", linewidth=1.6)
    axes.set_xlabel("observed frames, %")
    axes.set_ylabel("test clips right, %")
    axes.set_ylim(0, 100)
    axes.grid(color="#e6e8eb", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{title}\narea under the curve {100 * results['area']:.1f} %", fontsize=11)
    with atomic_write(out / "curve.png") as scratch:
        figure.savefig(scratch, dpi=130, facecolor="white")
    # last: a folder with results is complete
    write_results(out / "results.json", results)


def evaluate_early(
    evaluation: Evaluation,
    out: str | os.PathLike[str] | None = None,
    *,
    ratios: Sequence[float] = RATIOS,
    config: LinearConfig | None = None,
    finetune_config: FinetuneConfig | None = None,
    train_full: bool = False,
    causal: bool = False,
    resume: bool = False,
    group_column: str = "subject",
) -> dict[str, Any]:
    """Classify test clips of which only the first frames were observed, at several observation ratios.

    Args:
        evaluation: Encoder, or None for raw coordinates (by prefix, not fine-tuned), clips (T, M, V, C) each, and their view.
        out: Folder for results.json, curve.csv, curve.png, and classifiers if any are fine-tuned; None: nothing is written.
        ratios: Observation ratios, (R,), ascending, in (0, 1].
        config: Of the linear probes; the reference's if None.
        finetune_config: Fine-tune with these settings instead of probing frozen features.
        train_full: Train once on whole clips instead of on what is observed at each ratio.
        causal: Run the encoder causally over whole clips, once for all ratios, instead of over each prefix.
        resume: Go on where fine-tunings in `out` were stopped.
        group_column: Column whose values are held out whole to choose what `config` leaves open, where it exists.
    Returns:
        "curve", one row per ratio of "top1", "top5" and "mean_class", and "area", their mean under the curve of top1; the
        largest ratio's accuracies also by themselves; and the record. All fractions of one.
    Raises:
        ValueError: On ratios or settings that do not go together, or what the classifiers refuse.
    """
    ratios = [float(ratio) for ratio in ratios]
    if not ratios or ratios != sorted(set(ratios)) or not 0 < ratios[0] <= ratios[-1] <= 1:
        raise ValueError(f"evaluate_early: ratios must be ascending in (0, 1], got {ratios}. Pass such as 0.1 0.5 1.")
    if causal and train_full:
        raise ValueError("evaluate_early: train_full must be False with causal, got True: it is always so. Leave it out.")
    if causal and evaluation.view.stream == "motion":
        raise ValueError("evaluate_early: view must be of joints or bones with causal, got motion: it looks ahead. Use a prefix.")
    train, test = evaluation.known("train"), evaluation.known("test")
    folder = None if out is None else Path(out)
    if causal:
        scores = _causal_scores(evaluation, ratios, config, finetune_config, folder, resume, group_column)
    else:
        parts = [observed(evaluation, ratio) for ratio in ratios]
        if finetune_config is not None:
            scores = _finetuned_scores(evaluation, ratios, parts, finetune_config, train_full, folder, resume)
        else:
            scores = _frozen_scores(evaluation, parts, config, train_full, group_column)
    labels = evaluation.labels_of(test)
    curve = [{"ratio": ratio, **class_metrics(values, labels)[0]} for ratio, values in zip(ratios, scores, strict=True)]
    used = finetune_config if finetune_config is not None else config or LinearConfig()
    results = {
        **{name: curve[-1][name] for name in ("top1", "top5", "mean_class")},
        "area": area(ratios, [row["top1"] for row in curve]),
        "curve": curve,
        "scheme": "causal" if causal else "prefix",
        "classifier": "linear probe" if finetune_config is None else "fine-tuning",
        "trained_on_whole_clips": train_full or causal,
        "config": asdict(used),
        **evaluation.record("early", torch.from_numpy(train), torch.from_numpy(test)),
    }
    if folder is not None:
        _write(folder, results, evaluation.title("early prediction"))
    return results


TASKS.add("early", Task(evaluate_early))
