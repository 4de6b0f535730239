"""Temporal action segmentation: frame accuracy, edit score and segmental F1, as the field counts them.

A recording's frame labels are runs of equal labels. Runs of the background count for the accuracy of frames and not for
edit score and F1, unless asked for. F1 goes through the predicted runs in time; each is compared with the true run of its
label of highest IoU, the first among equals: a true positive if the IoU reaches the threshold and no earlier run took that
one, else a false positive. True runs that nobody took are false negatives. Counts are summed over recordings before F1 is
formed; edit scores, 1 - distance / longer length, are averaged over recordings; frames are pooled.

Source: Lea et al., "Temporal convolutional networks for action segmentation and detection", CVPR 2017, and the counting of
Abu Farha and Gall, "MS-TCN", CVPR 2019. Ends of runs are exclusive, the end of the last run included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["OVERLAPS", "edit_score", "label_runs", "segmental_counts", "segmentation_metrics"]

OVERLAPS = (0.1, 0.25, 0.5)

Runs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def label_runs(labels: NDArray[np.int64], background: int | None = None) -> Runs:
    """Find the maximal runs of equal labels.

    Args:
        labels: Label of each frame, (T,).
        background: Label whose runs are left out; None keeps all.
    Returns:
        Label, first frame and end (exclusive) of each run, (S,) each, in time.
    """
    change = np.flatnonzero(labels[1:] != labels[:-1]) + 1
    start = np.concatenate([[0], change]).astype(np.int64)[: len(labels)]
    end = np.concatenate([change, [len(labels)]]).astype(np.int64)[: len(labels)]
    label = labels[start]
    kept = np.ones(len(label), dtype=bool) if background is None else label != background
    return label[kept], start[kept], end[kept]


def edit_score(predicted: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    """Similarity of two sequences of labels, (S,) and (S',): 1 - edit distance / longer length; 1 for two empty ones.

    Source: normalised Levenshtein distance, every insertion, deletion and replacement costs 1.
    """
    longer = max(len(predicted), len(truth))
    if longer == 0:
        return 1.0
    columns = np.arange(len(truth) + 1)
    row = columns
    for number, label in enumerate(predicted.tolist(), 1):
        # deletion and replacement look at the row above; a run of insertions is a running minimum along the row
        best = np.concatenate([[number], np.minimum(row[1:] + 1, row[:-1] + (truth != label))])
        row = np.minimum.accumulate(best - columns) + columns
    return 1.0 - int(row[-1]) / longer


def segmental_counts(predicted: Runs, truth: Runs, overlap: float) -> tuple[int, int, int]:
    """Count true positives, false positives and false negatives among runs, (S,) and (S',), at a least IoU."""
    label, start, end = truth
    taken = np.zeros(len(label), dtype=bool)
    for run_label, run_start, run_end in zip(*(values.tolist() for values in predicted), strict=True):
        shared = np.minimum(run_end, end) - np.maximum(run_start, start)
        whole = np.maximum(run_end, end) - np.minimum(run_start, start)
        iou = np.where(label == run_label, shared / whole, 0.0)
        best = int(iou.argmax()) if len(iou) else -1
        if best >= 0 and iou[best] >= overlap:
            taken[best] = True
    hits = int(taken.sum())
    return hits, len(predicted[0]) - hits, len(label) - hits


def _check(function: str, predicted: Sequence[NDArray[np.int64]], truth: Sequence[NDArray[np.int64]]) -> None:
    if len(predicted) != len(truth) or not truth:
        raise ValueError(
            f"{function}: predicted and truth must be one array per recording, got {len(predicted)} and {len(truth)}. "
            "Check the split."
        )
    for number, (one, other) in enumerate(zip(predicted, truth, strict=True)):
        if one.ndim != 1 or one.shape != other.shape or one.size == 0 or not all(a.dtype.kind in "iu" for a in (one, other)):
            raise ValueError(
                f"{function}: labels of recording {number} must be integers (T,), got {one.dtype} {one.shape} predicted and "
                f"{other.dtype} {other.shape} true. Predict every frame once."
            )


def segmentation_metrics(
    predicted: Sequence[NDArray[np.int64]],
    truth: Sequence[NDArray[np.int64]],
    *,
    background: int | None = 0,
    overlaps: Sequence[float] = OVERLAPS,
) -> dict[str, Any]:
    """Measure the frame labels of recordings.

    Args:
        predicted: Labels of each recording, (T,).
        truth: True labels of each, (T,).
        background: Label that is no action; None: every label is one.
        overlaps: Least IoU of a true positive, in (0, 1].
    Returns:
        "accuracy" of all frames, "action_accuracy" of the frames whose truth is an action, "edit", and "f1@10", "f1@25",
        "f1@50" (by percent of the overlap); fractions of one.
    Raises:
        ValueError: If recordings or lengths do not agree, or on overlaps.
    """
    _check("segmentation_metrics", predicted, truth)
    if not overlaps or not all(0 < value <= 1 for value in overlaps):
        raise ValueError(f"segmentation_metrics: overlaps must lie in (0, 1], got {list(overlaps)}. Pass 0.5.")
    one, other = np.concatenate(predicted), np.concatenate(truth)
    action = np.ones(len(other), dtype=bool) if background is None else other != background
    runs = [(label_runs(a, background), label_runs(b, background)) for a, b in zip(predicted, truth, strict=True)]
    results = {
        "accuracy": float((one == other).mean()),
        "action_accuracy": float((one == other)[action].mean()) if action.any() else 0.0,
        "edit": float(np.mean([edit_score(a[0], b[0]) for a, b in runs])),
    }
    for overlap in overlaps:
        hits, wrong, missed = np.sum([segmental_counts(a, b, overlap) for a, b in runs], axis=0).tolist()
        # nothing to find and nothing found is perfect
        results[f"f1@{100 * overlap:g}"] = 2 * hits / (2 * hits + wrong + missed) if hits + wrong + missed else 1.0
    return results
