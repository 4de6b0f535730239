"""Temporal action segmentation of untrimmed recordings: one class for every frame."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fastskel.evaluate.dense import (
    DenseConfig,
    dense_classes,
    dense_record,
    fitted,
    frame_truth,
    predict_frames,
    timelines,
)
from fastskel.evaluate.evaluation import TASKS, Evaluation, Task
from fastskel.evaluate.finetune import FinetuneConfig
from fastskel.evaluate.metrics import mean_and_deviation
from fastskel.evaluate.report import write_results
from fastskel.evaluate.segmentation_metrics import segmentation_metrics

__all__ = ["evaluate_segmentation"]

TASK = "segment"


def evaluate_segmentation(
    evaluation: Evaluation,
    out: str | os.PathLike[str] | None = None,
    *,
    config: DenseConfig | None = None,
    count_background: bool = False,
    finetune_config: FinetuneConfig | None = None,
    resume: bool = False,
    source: Mapping[str, Any] | None = None,
    scale: float | None = None,
    on_adapted: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Classify every frame of untrimmed recordings, with a head on frame features.

    Args:
        evaluation: Encoder, recordings, and how their frame features (T, D) are computed.
        out: Folder for results.json and what is fine-tuned; None: nothing is written.
        config: Head, windows, folds.
        count_background: Count runs of frames without an action in edit score and F1 as those of any class.
        finetune_config: Train the encoder with the head, with these settings, once for each fold; None: it stays as it is.
        resume: Go on where a fine-tuning in `out` was stopped; folds that had ended are not trained again.
        source: Adapt encoder and recordings to each other, given what is known of the data it was trained on: see `adapt`;
            empty where nothing is. None: they have to fit.
        scale: Factor of all coordinates, see `adapt`.
        on_adapted: Called with what was done to adapt them, before anything is computed.
    Returns:
        "accuracy", "action_accuracy", "edit", "f1@10", "f1@25" and "f1@50" of all test recordings; "majority_accuracy",
        what the most frequent class of the training frames alone reaches; with folds "over_folds", mean, deviation and
        values of each of these; "timelines"; the record.
    Raises:
        ValueError: On missing or reversed segments, splits that share clips, encoders without frame features, encoders and
            recordings that do not fit, or what the training refuses.
    """
    config = config or DenseConfig()
    background = None if count_background else 0
    evaluation, adaptation = fitted(evaluation, source, config, scale, on_adapted)
    folds = predict_frames(evaluation, config, TASK, finetune_config=finetune_config, out=out, resume=resume)
    truths = [frame_truth(fold.truth, [len(values) for values in fold.probabilities]) for fold in folds]
    predicted = [[values.argmax(1) for values in fold.probabilities] for fold in folds]
    results = segmentation_metrics(list(chain(*predicted)), list(chain(*truths)), background=background)
    right = [np.concatenate(truth) == fold.majority for fold, truth in zip(folds, truths, strict=True)]
    results["majority_accuracy"] = float(np.concatenate(right).mean())
    if config.leave_one_out is not None:
        each = [segmentation_metrics(a, b, background=background) for a, b in zip(predicted, truths, strict=True)]
        results["over_folds"] = {name: mean_and_deviation([values[name] for values in each]) for name in each[0]}
    class_names = dense_classes(evaluation.dataset, TASK)
    results |= {
        "count_background": count_background,
        **dense_record(evaluation, config, folds, TASK, finetune_config, adaptation),
        "timelines": timelines(evaluation.dataset, folds[0], class_names, config.num_timelines),
    }
    if out is not None:
        write_results(Path(out) / "results.json", results)
    return results


TASKS.add("segment", Task(evaluate_segmentation, needs=("temporal",)))
