"""What detection and segmentation of untrimmed recordings share: their truth, folds, training, timelines.

The truth is in the segments of the data set, in valid frames, whatever the clips' own labels are. Where two segments of a
recording overlap, a frame has the class of the one that begins later (of two that begin together, the one listed last). Class 0
of a head is the background, class c + 1 is class c of the data set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastskel.data.identity import dataset_identity
from fastskel.data.packed import PackedDataset
from fastskel.data.protocols import Split
from fastskel.evaluate.detection_metrics import Segments
from fastskel.evaluate.evaluation import Evaluation, names_of
from fastskel.evaluate.finetune import FinetuneConfig
from fastskel.evaluate.frame_heads import FrameHeadConfig, frame_probabilities, train_frame_head
from fastskel.evaluate.frame_tuning import TRAINING_SETTINGS, fine_tune_frames, tuned_probabilities
from fastskel.evaluate.segmentation_metrics import label_runs
from fastskel.evaluate.transfer import adapt
from fastskel.evaluate.windows import Windows, frame_features

__all__ = [
    "DenseConfig", "DenseFold", "dense_classes", "dense_record", "fitted", "frame_truth", "leave_one_out", "predict_frames",
    "timelines", "true_segments",
]  # fmt: skip


@dataclass(frozen=True)
class DenseConfig:
    """What detection and segmentation are both told.

    Attributes:
        head: Classifier of frames, and its training; where the encoder is trained too, the
            fine-tuning's settings take the place of the latter.
        windows: How recordings are cut for the encoder.
        leave_one_out: Per-clip column, such as subject: each of its values is tested once, by a head trained on the others,
            over the clips of both parts of the split. None: the split as it is.
        drop_reversed: Leave out true segments with end <= start, which a published list holds, instead of refusing them.
        num_timelines: Test recordings whose true and predicted segments go into the results.
    """

    head: FrameHeadConfig = field(default_factory=FrameHeadConfig)
    windows: Windows = field(default_factory=Windows)
    leave_one_out: str | None = None
    drop_reversed: bool = False
    num_timelines: int = 3

    def __post_init__(self) -> None:
        if self.num_timelines < 0:
            raise ValueError(f"DenseConfig: num_timelines must be at least 0, got {self.num_timelines}. Pass 0 for none.")


@dataclass(frozen=True)
class DenseFold:
    """One training and what it says of its test recordings.

    Attributes:
        name: What was left out, or the protocol.
        train: Recordings trained on, (N,).
        test: Recordings tested on, (N',).
        truth: Segments of the test recordings, (S,), numbered as there.
        probabilities: For each test recording, (T, K + 1), the background first.
        majority: Class most training frames have, the background being 0.
        losses: Mean loss of each epoch.
        num_features: Width D of the frame features.
        checkpoint: Folder of what was fine-tuned; None where nothing was, or was not written.
    """

    name: str
    train: NDArray[np.int64]
    test: NDArray[np.int64]
    truth: Segments
    probabilities: list[NDArray[np.float64]]
    majority: int
    losses: tuple[float, ...]
    num_features: int
    checkpoint: Path | None = None


def dense_classes(dataset: PackedDataset, task: str) -> list[str]:
    """Names of the K classes of segments, (K,).

    Raises:
        ValueError: If the data set has no segments.
    """
    if dataset.segments is None or not len(dataset.segments):
        raise ValueError(f"{task}: the data set must have segments, got none in {dataset.path}. Pack it with its label files.")
    return names_of(dataset, dataset.segments[:, 1])


def true_segments(
    dataset: PackedDataset, recordings: NDArray[np.int64], task: str, drop_reversed: bool = False
) -> Segments:
    """Segments (S,) of recordings (N,), numbered as there, confidence as score.

    Raises:
        ValueError: If one has end <= start, naming it, unless these are left out.
    """
    dense_classes(dataset, task)
    assert dataset.segments is not None
    number = np.full(len(dataset), -1)
    number[recordings] = np.arange(len(recordings))
    clip = dataset.segments[:, 0].astype(np.int64)
    rows = dataset.segments[number[clip] >= 0]
    reversed_rows = rows[:, 3] <= rows[:, 2]
    if reversed_rows.any() and not drop_reversed:
        row = rows[int(reversed_rows.argmax())]
        raise ValueError(
            f"{task}: segments must have start < end, got {row[2]:g} to {row[3]:g} of class {int(row[1])} in recording "
            f"{dataset.names[int(row[0])]} of {dataset.path}. Mend it, or leave such segments out (drop_reversed)."
        )
    rows = rows[~reversed_rows]
    return Segments.of(np.column_stack([number[rows[:, 0].astype(np.int64)], rows[:, 1:]]))


def frame_truth(truth: Segments, num_frames: Sequence[int]) -> list[NDArray[np.int64]]:
    """Class of every frame of each recording, (T,), 0 where no segment is, class + 1 elsewhere."""
    labels = [np.zeros(count, dtype=np.int64) for count in num_frames]
    for recording, label, start, end, _ in truth.take(np.argsort(truth.start, kind="stable")).rows():
        labels[int(recording)][int(start) : int(end)] = int(label) + 1
    return labels


def leave_one_out(dataset: PackedDataset, column: str, clips: NDArray[np.int64]) -> list[tuple[str, Split]]:
    """Folds over the values that a per-clip column has among clips (N,): all but one train, that one tests.

    Raises:
        ValueError: If the column is unknown or per frame, or has a single value.
    """
    values = dataset.column(column)
    if dataset.per_frame(column):
        raise ValueError(f"leave_one_out: column must have one value per clip, got {column!r} of {dataset.path}. Choose another.")
    known = np.unique(values[clips])
    if len(known) < 2:
        raise ValueError(
            f"leave_one_out: column must have two values, got {known.tolist()} in {column!r} of {dataset.path}. Choose another."
        )
    own = values[clips]
    return [(f"{column} {value}", Split(clips[own != value], clips[own == value])) for value in known.tolist()]


def _labelled(evaluation: Evaluation, clips: NDArray[np.int64], part: str, task: str) -> NDArray[np.int64]:
    """Clips (N,) that have segments, in ascending order."""
    assert evaluation.dataset.segments is not None
    known = np.intersect1d(clips, evaluation.dataset.segments[:, 0].astype(np.int64))
    if not len(known):
        raise ValueError(
            f"{task}: the {part} split of {evaluation.dataset.path} must have recordings with segments, got {len(clips)} clips, "
            "none with one. Check the protocol and the labels."
        )
    return known


def _folds(evaluation: Evaluation, config: DenseConfig, task: str) -> list[tuple[str, Split]]:
    train, test = np.asarray(evaluation.split.train), np.asarray(evaluation.split.test)
    if config.leave_one_out is not None:
        known = _labelled(evaluation, np.union1d(train, test), "whole", task)
        return leave_one_out(evaluation.dataset, config.leave_one_out, known)
    shared = np.intersect1d(train, test)
    if len(shared):
        raise ValueError(
            f"{task}: split must have parts without common clips, got {len(shared)} in both, such as "
            f"{evaluation.dataset.names[shared[0]]}. Take them out of one."
        )
    split = Split(_labelled(evaluation, train, "train", task), _labelled(evaluation, test, "test", task))
    return [(evaluation.protocol or "split", split)]


def fitted(
    evaluation: Evaluation,
    source: Mapping[str, Any] | None,
    config: DenseConfig,
    scale: float | None = None,
    on_adapted: Callable[[Mapping[str, Any]], None] | None = None,
) -> tuple[Evaluation, dict[str, Any]]:
    """Adapt encoder and recordings (T, M, V, C) to each other if asked to.

    Args:
        evaluation: Encoder, recordings, and the view the encoder was trained with.
        source: What is known of the data it was trained on, see `adapt`; empty where nothing is. None: they have to fit as they
            are.
        config: Folds.
        scale: Factor of all coordinates, see `adapt`.
        on_adapted: Called with what was done, if anything was to be.
    Returns:
        The evaluation to run, and what the record says of it: the original data set, and what was done.
    Raises:
        ValueError: If they do not fit, or cannot be made to, or not without a look at recordings that are tested.
    """
    if source is None:
        evaluation.check_fit("Adapt them to each other (source; --adapt on the command line)")
        return evaluation, {}
    adapted, told = adapt(evaluation, source=source, scale=scale)
    if config.leave_one_out is not None and scale is None and told["scale"] != 1:
        raise ValueError(
            f"evaluate: scale must be given with leave_one_out for data of another unit, got none for {told['units']}: it would "
            "be measured on recordings that are tested. Pass --scale."
        )
    if on_adapted is not None:
        on_adapted(told)
    original = {"path": str(evaluation.dataset.path), "sha256": dataset_identity(evaluation.dataset)}
    return adapted, {"dataset": original, "adaptation": told, "source": dict(source)}


def predict_frames(
    evaluation: Evaluation,
    config: DenseConfig,
    task: str,
    *,
    finetune_config: FinetuneConfig | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> list[DenseFold]:
    """Train on the frames of every fold and classify the frames (T,) of its test recordings.

    A head alone is trained on features that are computed once for all folds; with `finetune_config` a copy of the encoder is
    trained with it, anew for each fold, which is kept in a folder of its own under `out`.

    Raises:
        ValueError: On missing segments, splits that share clips, encoders without frame features, or what the training refuses.
    """
    from tqdm import tqdm

    dataset, names = evaluation.dataset, ["background", *dense_classes(evaluation.dataset, task)]
    folds = _folds(evaluation, config, task)
    clips = np.unique(np.concatenate([np.concatenate([split.train, split.test]) for _, split in folds]))
    evaluation.check_unseen(np.concatenate([split.test for _, split in folds]))
    truth = true_segments(dataset, clips, task, config.drop_reversed)
    lengths = dataset.num_frames[clips].tolist()
    labels = dict(zip(clips.tolist(), map(torch.from_numpy, frame_truth(truth, lengths)), strict=True))
    features = {}
    if finetune_config is None:
        features = dict(zip(clips.tolist(), frame_features(evaluation, clips, config.windows, task=task), strict=True))
    results = []
    # a fine-tuning has a bar of its own for each fold
    quiet = not evaluation.progress or finetune_config is not None
    for number, (name, split) in enumerate(tqdm(folds, desc="heads of frames", unit="fold", disable=quiet, leave=False)):
        train, test, path = split.train.tolist(), split.test.tolist(), None
        if finetune_config is None:
            trained = train_frame_head(
                [features[clip] for clip in train], [labels[clip] for clip in train], len(names), config.head,
                device=evaluation.device,
            )  # fmt: skip
            probabilities = [frame_probabilities(trained.head, features[clip]) for clip in test]
            width, losses = trained.head.mean.numel(), trained.losses
        else:
            own = {clip: labels[clip] for clip in train}
            tuned = fine_tune_frames(
                evaluation, split.train, own, names, finetune_config, head=config.head, windows=config.windows, task=task,
                out=None if out is None else Path(out) / "folds" / _folder_name(number, name), resume=resume,
                title=f"fine-tuning, {name}",
            )  # fmt: skip
            probabilities = [tuned_probabilities(tuned.model, evaluation, clip, config.windows) for clip in test]
            width, losses, path = tuned.num_features, tuple(row["loss"] for row in tuned.history), tuned.checkpoint
        majority = int(torch.bincount(torch.cat([labels[clip] for clip in train])).argmax())
        tested = true_segments(dataset, split.test, task, config.drop_reversed)
        results.append(DenseFold(name, split.train, split.test, tested, probabilities, majority, losses, width, path))
    return results


def _folder_name(number: int, name: str) -> str:
    # values of a column may hold anything
    return f"{number}-" + re.sub(r"[^\w.-]+", "-", name)


def timelines(dataset: PackedDataset, fold: DenseFold, class_names: Sequence[str], count: int) -> list[dict[str, Any]]:
    """True and predicted segments of the first recordings of a fold, for a picture.

    Predicted are the runs of the most probable class, with their mean probability as score; the background is left out.

    Args:
        dataset: Packed data set.
        fold: Truth and prediction, (T, K + 1) of each recording.
        class_names: K names.
        count: Most recordings to take.
    """
    found = []
    for number, (clip, probabilities) in enumerate(zip(fold.test[:count].tolist(), fold.probabilities, strict=False)):
        true = fold.truth.take(fold.truth.recording == number).rows().tolist()
        runs = zip(*(values.tolist() for values in label_runs(probabilities.argmax(1), 0)), strict=True)
        predicted = [(label - 1, start, end, float(probabilities[start:end, label].mean())) for label, start, end in runs]
        found.append({
            "recording": str(dataset.names[clip]),
            "num_frames": len(probabilities),
            "truth": [
                {"class": class_names[int(label)], "start": int(start), "end": int(end)} for _, label, start, end, _ in true
            ],
            "predicted": [
                {"class": class_names[label], "start": start, "end": end, "score": score}
                for label, start, end, score in predicted
            ],
        })
    return found


def dense_record(
    evaluation: Evaluation,
    config: DenseConfig,
    folds: Sequence[DenseFold],
    task: str,
    finetune_config: FinetuneConfig | None = None,
    adaptation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What was evaluated, on which recordings (N,), and how; `adaptation` is what `fitted` said."""
    clips = np.union1d(evaluation.split.train, evaluation.split.test)
    train, test = (torch.from_numpy(np.unique(np.concatenate([getattr(f, part) for f in folds]))) for part in ("train", "test"))
    # folds test and train on all clips in turn
    whole = replace(evaluation, split=Split(clips, clips)) if config.leave_one_out is not None else evaluation
    settings, head = asdict(config), config.head
    settings["head"] |= {"epochs": head.passes, "learning_rate": head.rate, "weight_decay": head.decay}
    if finetune_config is not None:
        settings["head"] = {name: value for name, value in settings["head"].items() if name not in TRAINING_SETTINGS}
        settings["finetune"] = asdict(finetune_config)
    record, adaptation = whole.record(task, train, test), adaptation or {}
    return {
        **record,
        **adaptation,
        "dataset": {**record["dataset"], **adaptation.get("dataset", {})},
        "num_classes": len(dense_classes(evaluation.dataset, task)),
        # of a frame, not of a clip
        "num_features": folds[0].num_features,
        "num_test_frames": int(evaluation.dataset.num_frames[test.numpy()].sum()),
        "config": {**settings, "receptive_field": head.receptive_field},
        "folds": [
            {
                "name": fold.name, "num_train": len(fold.train), "num_test": len(fold.test), "loss": fold.losses[-1],
                **({} if fold.checkpoint is None else {"checkpoint": str(fold.checkpoint)}),
            }
            for fold in folds
        ],
    }
