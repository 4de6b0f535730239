"""Evaluations of recognition on frozen features: nearest neighbours, linear probe."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from fastskel.evaluate.evaluation import TASKS, Evaluation, Task
from fastskel.evaluate.knn import knn_rank
from fastskel.evaluate.linear import LinearConfig, linear_probe
from fastskel.evaluate.metrics import accuracy, confusion_matrix, mean_class_accuracy

__all__ = ["evaluate_knn", "evaluate_linear"]

NUM_RANKED = 5


def evaluate_knn(evaluation: Evaluation, out: str | os.PathLike[str] | None = None, *, k: int = 1) -> dict[str, Any]:
    """Classify the test clips by their k nearest training clips in cosine distance.

    Args:
        evaluation: Encoder, clips, and how features (N, F) are computed.
        out: Folder for results.json, confusion.csv and confusion.png; None: nothing is written.
        k: Neighbours that vote; 1 is the reference's retrieval.
    Returns:
        "top1", "top5" and "mean_class" as fractions of one, "confusion" (K, K) as nested lists, and the record. A
        class ranks by its votes, then by its nearest sample; "top5" counts test clips whose class is in the first five.
    Raises:
        ValueError: If a part of the split has no labelled clip, or k exceeds the training clips.
    """
    train, test = evaluation.features()
    ranking = knn_rank(
        train.features, train.labels, test.features, k, num_ranked=NUM_RANKED, device=evaluation.device
    )
    confusion = confusion_matrix(test.labels, ranking[:, 0], len(evaluation.class_names))
    results = {
        "top1": accuracy(ranking[:, 0], test.labels),
        "top5": int((ranking == test.labels[:, None]).any(1).sum()) / len(test),
        "mean_class": mean_class_accuracy(confusion),
        "k": k,
        **evaluation.record("knn", train.index, test.index),
    }
    return evaluation.finish(out, results, confusion, f"{k}-NN")


def evaluate_linear(
    evaluation: Evaluation,
    out: str | os.PathLike[str] | None = None,
    *,
    config: LinearConfig | None = None,
    group_column: str = "subject",
) -> dict[str, Any]:
    """Train a linear layer on the training clips' features and classify the test clips.

    Args:
        evaluation: Encoder, clips, and how features (N, F) are computed.
        out: Folder for results.json, confusion.csv and confusion.png; None: nothing is written.
        config: Optimiser and schedule of the probe; the reference's if None.
        group_column: Column whose values are held out whole to choose what the config leaves open, where it exists.
    Returns:
        "top1", "top5" and "mean_class" after the last epoch, as fractions of one; "best_top1" over all epochs read,
        which is what the reference reports and selects on the test set; "confusion" (K, K), "history", and the record.
    Raises:
        ValueError: If a part of the split has no labelled clip, or the probe diverges.
    """
    train, test = evaluation.features()
    groups = evaluation.groups(train.index, group_column)
    probe = linear_probe(train, test, len(evaluation.class_names), config, groups=groups, device=evaluation.device)
    results = {
        "top1": probe.top1,
        "top5": probe.top5,
        "mean_class": probe.mean_class,
        "best_top1": probe.best_top1,
        "best_epoch": probe.best_epoch,
        "solver": "sgd",
        "note": "top1 is that of the last epoch; best_top1 is chosen on the test set, as the reference reports it",
        "config": asdict(probe.config),
        **evaluation.record("linear", train.index, test.index),
        "history": [asdict(row) for row in probe.history],
    }
    return evaluation.finish(out, results, probe.confusion, "linear probe")


TASKS.add("knn", Task(evaluate_knn))
TASKS.add("linear", Task(evaluate_linear))
