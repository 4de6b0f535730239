"""Temporal action detection in untrimmed recordings: frame probabilities, proposals, average precision.

Each class but the background makes a proposal of every maximal run of frames whose probability of it exceeds a threshold; its
score is the mean probability of the run. Several thresholds make nested proposals, which are meant for suppression (`nms`).
Source: specification of USDRL, section 5.6, where the threshold is 0.02 and nothing is suppressed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastskel.atomic import atomic_write
from fastskel.evaluate.dense import DenseConfig, dense_classes, dense_record, fitted, predict_frames, timelines
from fastskel.evaluate.detection_metrics import Segments, detection_metrics, temporal_nms
from fastskel.evaluate.evaluation import TASKS, Evaluation, Task
from fastskel.evaluate.finetune import FinetuneConfig
from fastskel.evaluate.metrics import mean_and_deviation
from fastskel.evaluate.report import write_results

__all__ = ["ProposalConfig", "evaluate_detection", "frame_proposals"]

TASK = "detect"
# the IoU whose results stand for the others, as in the reference
MAIN = "0.5"
HEADLINES = ("map_action", "map_video", "interpolated_map_action", "interpolated_map_video", "f1")


@dataclass(frozen=True)
class ProposalConfig:
    """How frame probabilities become proposals.

    Attributes:
        thresholds: Least probabilities of a run's frames; the reference has 0.02 alone.
        nms: Drop proposals whose IoU with a better one of their class is above this; None drops nothing.
    """

    thresholds: tuple[float, ...] = (0.02,)
    nms: float | None = None

    def __post_init__(self) -> None:
        if not self.thresholds or not all(0 <= value < 1 for value in self.thresholds):
            raise ValueError(f"ProposalConfig: thresholds must lie in [0, 1), got {list(self.thresholds)}. Pass 0.02.")
        if self.nms is not None and not 0 <= self.nms < 1:
            raise ValueError(f"ProposalConfig: nms must lie in [0, 1), got {self.nms}. Pass 0.5.")


def frame_proposals(
    probabilities: Sequence[NDArray[np.floating]], config: ProposalConfig | None = None
) -> Segments:
    """Make proposals of the frames of recordings.

    Args:
        probabilities: Class probabilities of each recording, (T, K + 1), the background first.
        config: Thresholds and suppression.
    Returns:
        Proposals (P,), by recording, threshold, class and start; classes from 0, without the background.
    """
    config = config or ProposalConfig()
    rows = [np.zeros((0, 5))]
    for number, values in enumerate(probabilities):
        actions = np.asarray(values, dtype=np.float64)[:, 1:].T
        total = np.pad(np.cumsum(actions, axis=1), ((0, 0), (1, 0)))
        for threshold in config.thresholds:
            above = np.pad(actions > threshold, ((0, 0), (1, 1))).astype(np.int8)
            # class by class, a run begins at +1 and ends before -1
            label, start = np.nonzero(np.diff(above, axis=1) == 1)
            _, end = np.nonzero(np.diff(above, axis=1) == -1)
            score = (total[label, end] - total[label, start]) / (end - start)
            rows.append(np.column_stack([np.full(len(label), number), label, start, end, score]))
    proposals = Segments.of(np.concatenate(rows))
    return proposals if config.nms is None else temporal_nms(proposals, config.nms)


def _write_proposals(
    path: Path, proposals: Segments, names: Sequence[str], class_names: Sequence[str], frame_rate: float | None
) -> None:
    listed = []
    for recording, label, start, end, score in proposals.rows().tolist():
        row = {
            "recording": names[int(recording)], "class": class_names[int(label)], "label": int(label),
            "start": int(start), "end": int(end), "score": score,
        }  # fmt: skip
        if frame_rate is not None:
            row |= {"start_seconds": start / frame_rate, "end_seconds": end / frame_rate}
        listed.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as scratch:
        scratch.write_text(json.dumps(listed, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _pooled(parts: Sequence[Segments], sizes: Sequence[int]) -> Segments:
    """Segments (S,) of the recordings of all folds in a row, given the number of recordings of each."""
    first = np.repeat(np.cumsum([0, *sizes[:-1]]), [len(part) for part in parts])
    whole = Segments.of(np.concatenate([part.rows() for part in parts]))
    return replace(whole, recording=whole.recording + first)


def evaluate_detection(
    evaluation: Evaluation,
    out: str | os.PathLike[str] | None = None,
    *,
    config: DenseConfig | None = None,
    proposals: ProposalConfig | None = None,
    frame_rate: float | None = None,
    finetune_config: FinetuneConfig | None = None,
    resume: bool = False,
    source: Mapping[str, Any] | None = None,
    scale: float | None = None,
    on_adapted: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Find the actions of untrimmed recordings, with a head on frame features.

    Args:
        evaluation: Encoder, recordings, and how their frame features (T, D) are computed.
        out: Folder for results.json, proposals.json and what is fine-tuned; None: nothing is written.
        config: Head, windows, folds.
        proposals: How frame probabilities become proposals.
        frame_rate: Valid frames a second, for proposals.json; None: frames only.
        finetune_config: Train the encoder with the head, with these settings, once for each fold; None: it stays as it is.
        resume: Go on where a fine-tuning in `out` was stopped; folds that had ended are not trained again.
        source: Adapt encoder and recordings to each other, given what is known of the data it was trained on: see `adapt`;
            empty where nothing is. None: they have to fit.
        scale: Factor of all coordinates, see `adapt`.
        on_adapted: Called with what was done to adapt them, before anything is computed.
    Returns:
        "map_action", "map_video", both "interpolated_", and "f1" at an IoU of 0.5; "thresholds" with all of
        `detection_metrics` at 0.1 to 0.7; for folds these are of all recordings together, and "over_folds" has mean,
        deviation and values of the folds; "per_class" average precision at 0.5 by name; "timelines"; the record.
    Raises:
        ValueError: On missing or reversed segments, splits that share clips, encoders without frame features, encoders and
            recordings that do not fit, or what the training refuses.
    """
    config, proposals = config or DenseConfig(), proposals or ProposalConfig()
    if frame_rate is not None and not frame_rate > 0:
        raise ValueError(f"{TASK}: frame_rate must be above 0, got {frame_rate}. Leave it out where it is not known.")
    evaluation, adaptation = fitted(evaluation, source, config, scale, on_adapted)
    dataset, class_names = evaluation.dataset, dense_classes(evaluation.dataset, TASK)
    folds = predict_frames(evaluation, config, TASK, finetune_config=finetune_config, out=out, resume=resume)
    found = [frame_proposals(fold.probabilities, proposals) for fold in folds]
    sizes = [len(fold.test) for fold in folds]
    truth, pooled = _pooled([fold.truth for fold in folds], sizes), _pooled(found, sizes)
    metrics = detection_metrics(truth, pooled, len(class_names), sum(sizes))
    results: dict[str, Any] = {name: metrics[MAIN][name] for name in HEADLINES}
    if config.leave_one_out is not None:
        each = [
            detection_metrics(fold.truth, segments, len(class_names), len(fold.test))[MAIN]
            for fold, segments in zip(folds, found, strict=True)
        ]
        results["over_folds"] = {name: mean_and_deviation([values[name] for values in each]) for name in HEADLINES}
    results |= {
        "num_segments": len(truth),
        "num_proposals": len(pooled),
        "per_class": dict(zip(class_names, metrics[MAIN]["per_class"], strict=True)),
        "thresholds": metrics,
        "proposal_config": asdict(proposals),
        **dense_record(evaluation, config, folds, TASK, finetune_config, adaptation),
        "timelines": timelines(dataset, folds[0], class_names, config.num_timelines),
    }
    if out is not None:
        names = [str(dataset.names[clip]) for fold in folds for clip in fold.test]
        _write_proposals(Path(out) / "proposals.json", pooled, names, class_names, frame_rate)
        write_results(Path(out) / "results.json", results)
    return results


TASKS.add("detect", Task(evaluate_detection, needs=("temporal",)))
