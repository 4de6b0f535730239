"""Recognition by fine-tuning: encoder and linear layer trained on labelled clips, resumable bit for bit.

Every draw has an address: the order of clips and their crops (seed, epoch), DropPath (seed, step), the layer's first weights
(seed). So a training is a function of its settings, and one that was stopped goes on from its last checkpoint as if it had not
been.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fastskel.data.batch import View
from fastskel.data.identity import described_data
from fastskel.data.loader import Loader
from fastskel.data.views import RandomCrop, ViewSpec
from fastskel.evaluate.causal import causal_features
from fastskel.evaluate.classifier import Classifier, ClassifierStore, class_scores, described_encoder
from fastskel.evaluate.evaluation import TASKS, Evaluation, Task
from fastskel.evaluate.features import FeatureSet
from fastskel.evaluate.logistic import LogisticConfig
from fastskel.evaluate.metrics import class_metrics, top_k_accuracy
from fastskel.evaluate.seen import handed_on
from fastskel.evaluate.semi import probe_of_few
from fastskel.evaluate.training import set_drop_path, train_epoch, train_epochs, trainable_copy, training_identity
from fastskel.train.stage import describe

__all__ = ["FinetuneConfig", "Finetuned", "evaluate_finetune", "fine_tune"]


@dataclass(frozen=True)
class FinetuneConfig:
    """Optimiser and schedule of a fine-tuning. The defaults are fixed: `start` was chosen on training subjects held out.

    The reference publishes no settings for recognition. Those of its detection, which fine-tunes the whole network, are
    `FinetuneConfig(epochs=150, batch_size=512, optimizer="sgd", learning_rate=0.005, layer_decay=1.0, weight_decay=0.0,
    warmup_epochs=0, schedule="step", milestones=(), label_smoothing=0.0, drop_path=0.0, start="random")`.

    Attributes:
        epochs: Passes over the training clips.
        batch_size: Clips per step; the last step of an epoch may have fewer.
        optimizer: "adamw", or "sgd" with `momentum`.
        learning_rate: Step size of the linear layer.
        layer_decay: Factor of the step size for each layer further from the output; 1 for equal steps.
        weight_decay: Of matrices; biases and norms do not decay.
        momentum: Of SGD.
        warmup_epochs: Epochs over which the step size rises linearly.
        schedule: "cosine" falls to zero; "step" multiplies by `decay` at each of `milestones`.
        milestones: Epochs, counted from 0, of the schedule "step".
        decay: Factor of a milestone.
        label_smoothing: Share of the target that is spread over all classes.
        drop_path: DropPath rate of the encoder while it is trained; by default its own.
        start: First weights of the layer: "random", or those of a "probe" of the encoder as it comes: logistic regression to
            convergence, for frames the head that frozen features teach. A layer that starts at random spoils the encoder
            before it says anything (Kumar et al., ICLR 2022).
        frozen_epochs: First epochs, in which only the linear layer is trained.
        crop: Least share of a clip that a random temporal crop keeps in training; by default it trains on the evaluation view.
        evaluate_every: Epochs between two readings of the test accuracy, for the record; the last is always read.
        save_every: Epochs between two checkpoints; the last is always saved.
        seed: Key of every draw.
    """

    epochs: int = 50
    batch_size: int = 64
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    momentum: float = 0.9
    warmup_epochs: float = 5.0
    schedule: Literal["cosine", "step"] = "cosine"
    milestones: tuple[int, ...] = ()
    decay: float = 0.1
    label_smoothing: float = 0.1
    drop_path: float | None = None
    start: Literal["random", "probe"] = "probe"
    frozen_epochs: int = 0
    crop: float | None = None
    evaluate_every: int = 5
    save_every: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "epochs": (1, math.inf), "batch_size": (1, math.inf), "evaluate_every": (1, math.inf), "save_every": (1, math.inf),
            "layer_decay": (0, 1), "weight_decay": (0, math.inf), "momentum": (0, 1), "warmup_epochs": (0, math.inf),
            "label_smoothing": (0, 1), "frozen_epochs": (0, math.inf), "crop": (0, 1), "drop_path": (0, 1),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"FinetuneConfig: {name} must be in {low} .. {high}, got {value}. Choose another.")
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"FinetuneConfig: warmup_epochs must be at most epochs {self.epochs}, or the step size never gets up, got "
                f"{self.warmup_epochs:g}. Lower it, such as to {self.epochs / 10:g}."
            )
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"FinetuneConfig: learning_rate must be positive, got {self.learning_rate}. Try 0.001.")
        for name, known in (("optimizer", ("adamw", "sgd")), ("schedule", ("cosine", "step")), ("start", ("random", "probe"))):
            if getattr(self, name) not in known:
                raise ValueError(f"FinetuneConfig: {name} must be one of {known}, got {getattr(self, name)!r}. Choose one.")

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """Step size of the linear layer at a step, counted from 0."""
        warm = self.warmup_epochs * steps_per_epoch
        warmth = min(1.0, (step + 1) / warm) if warm else 1.0
        if self.schedule == "step":
            passed = sum(step // steps_per_epoch >= milestone for milestone in self.milestones)
            return self.learning_rate * warmth * self.decay**passed
        done = max(step - warm, 0) / max(self.epochs * steps_per_epoch - warm, 1)
        return self.learning_rate * warmth * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


@dataclass
class Finetuned:
    """What a fine-tuning made.

    Attributes:
        classifier: In evaluation mode, on the device it was trained on.
        scores: Of the test clips, (N, K), or (N, R, K) of a classifier of several observations.
        history: One row per epoch: step size, loss, training accuracy, and the test accuracy where it was read.
        train: Clips trained on, (N',).
        test: Clips tested, (N,).
        checkpoint: Its folder; None where nothing was written.
    """

    classifier: Classifier
    scores: Tensor
    history: list[dict[str, Any]]
    train: NDArray[np.int64]
    test: NDArray[np.int64]
    checkpoint: Path | None = None


def _chosen(evaluation: Evaluation, indices: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """The clips (N,) to train on."""
    train = evaluation.known("train")
    if indices is None:
        return train
    chosen = np.asarray(indices, dtype=np.int64)
    strange = np.setdiff1d(chosen, train)
    if chosen.ndim != 1 or chosen.size == 0 or strange.size or len(np.unique(chosen)) != len(chosen):
        raise ValueError(
            f"finetune: indices must be distinct labelled clips of the training part, got {chosen.size} clips, of which "
            f"{strange.tolist()[:5]} are not. Choose among evaluation.known('train')."
        )
    return chosen


def _start_from_probe(classifier: Classifier, evaluation: Evaluation, train: NDArray[np.int64]) -> None:
    """Give a classifier's layer the weights of the exact probe of its encoder's features of the clips (N,)."""
    if classifier.frames is None:
        rows = evaluation.features_of(train)
        groups = evaluation.groups(rows.index)
    else:
        # an observation is a row: one layer reads them all
        sets = causal_features(evaluation, train, classifier.frames)
        rows = FeatureSet(*(torch.cat([getattr(each, name) for each in sets]) for name in ("features", "labels", "index")))
        groups = evaluation.groups(rows.index)
        # those of a clip are held out together
        groups = rows.index if groups is None else groups
    head = classifier.head
    probe = probe_of_few(rows, rows, head.out_features, LogisticConfig(), groups, evaluation.device)
    with torch.no_grad():
        head.weight.copy_(probe.weight)
        # classes without training clips are at -inf, which no gradient leaves
        head.bias.copy_(probe.bias.clamp_min(float(probe.bias[probe.bias.isfinite()].min())))


def fine_tune(
    evaluation: Evaluation,
    config: FinetuneConfig | None = None,
    *,
    indices: NDArray[np.int64] | None = None,
    train_view: ViewSpec | None = None,
    frames: tuple[int, ...] | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> Finetuned:
    """Train a copy of an encoder with a linear layer on the training clips, and score the test clips.

    Args:
        evaluation: Encoder, clips (T, M, V, C) each, and how they are seen; its own encoder stays as it is.
        config: Optimiser and schedule.
        indices: Training clips to use, (n,); None is all that are labelled.
        train_view: View to train on; None is the evaluation's, cropped as `config.crop` says.
        frames: For a causal classifier of several observations, (R,): see `Classifier`.
        out: Folder for checkpoints; None: nothing is written.
        resume: Go on from the folder's checkpoint, bit for bit, or begin where there is none.
    Returns:
        The classifier after the last epoch, and its scores.
    Raises:
        ValueError: On settings or clips that cannot be used, a folder of another training, or if the loss is not finite.
    """
    config = config or FinetuneConfig()
    encoder, train = trainable_copy(evaluation.encoder), _chosen(evaluation, indices)
    test, view, dataset = evaluation.known("test"), evaluation.view, evaluation.dataset
    if train_view is None:
        least = max(1, view.frames // 2)
        train_view = view if config.crop is None else replace(view, crop=RandomCrop(config.crop, 1.0, least))
    set_drop_path(encoder, config.drop_path)
    device = torch.device(evaluation.device)
    classifier = Classifier(encoder, len(evaluation.class_names), frames=frames, seed=config.seed)
    store = ClassifierStore(None if out is None else Path(out))
    if out is not None:
        store.told = {
            "task": "finetune", "encoder": described_encoder(encoder), "eval_view": view, "topology": dataset.topology.name,
            "class_names": evaluation.class_names, "frames": frames, "run": evaluation.run, "config": describe(config),
            "identity": training_identity(evaluation, classifier, config, train_view, train, frames=frames),
            "described": described_data(dataset),
            "seen": handed_on(evaluation.seen, dataset, train, evaluation.trained_on),
        }  # fmt: skip
    classifier.to(device)
    loader = Loader(
        dataset, views=(train_view,), batch_size=min(config.batch_size, len(train)), seed=config.seed,
        num_threads=evaluation.num_threads, indices=train, drop_last=False, device=device,
    )  # fmt: skip
    labels = evaluation.labels_of(test)

    def score() -> Tensor:
        return class_scores(
            classifier, dataset, view, test, batch_size=evaluation.batch_size, device=device,
            num_threads=evaluation.num_threads, precision=evaluation.precision,
        )  # fmt: skip

    def loss_of(scores: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(scores.flatten(0, -2), labels.flatten(), label_smoothing=config.label_smoothing)

    def batches(epoch: int) -> Iterator[tuple[tuple[View], Tensor]]:
        for number, batch in enumerate(loader):
            # every observation of a clip has the clip's class
            classes = batch.labels if frames is None else batch.labels[:, None].expand(-1, len(frames))
            yield (batch.at(config.seed, epoch * len(loader) + number).views[0],), classes

    scores = None

    def one_epoch(optimizer: torch.optim.Optimizer, epoch: int) -> dict[str, Any]:
        nonlocal scores
        loader.epoch, loader.position = epoch, 0
        row = train_epoch(
            classifier, optimizer, batches(epoch), config, epoch, num_batches=len(loader), loss_of=loss_of, device=device,
            precision=evaluation.precision,
        )  # fmt: skip
        if epoch + 1 == config.epochs or (epoch + 1) % config.evaluate_every == 0:
            scores = score()
            # of the longest observation, where there are several
            row["test_top1"] = top_k_accuracy(scores if scores.dim() == 2 else scores[:, -1], labels, 1)
        return row

    with loader:
        history, path = train_epochs(
            classifier, config, store, one_epoch, resume=resume, progress=evaluation.progress,
            begin=partial(_start_from_probe, classifier, evaluation, train),
        )  # fmt: skip
    # nothing is left to train of one that had ended
    return Finetuned(classifier, score() if scores is None else scores, history, train, test, path)


def evaluate_finetune(
    evaluation: Evaluation,
    out: str | os.PathLike[str] | None = None,
    *,
    config: FinetuneConfig | None = None,
    indices: NDArray[np.int64] | None = None,
    train_view: ViewSpec | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Fine-tune the encoder with a linear layer on the training clips and classify the test clips.

    Args:
        evaluation: Encoder, clips (T, M, V, C) each, and how they are seen.
        out: Folder for results.json, confusion.csv, confusion.png and the classifier; None: nothing is written.
        config: Optimiser and schedule.
        indices: Training clips to use, (n,), for few labels; None is all that are labelled.
        train_view: View to train on; None is the evaluation's, cropped as `config.crop` says.
        resume: Go on where a fine-tuning in `out` was stopped.
    Returns:
        "top1", "top5" and "mean_class" after the last epoch, as fractions of one: the result; "best_top1" over all epochs
        read, which selects on the test set; "confusion" (K, K), "history", "checkpoint", and the record.
    Raises:
        ValueError: On settings or clips that cannot be used, or if the loss is not finite.
    """
    config = config or FinetuneConfig()
    made = fine_tune(evaluation, config, indices=indices, train_view=train_view, out=out, resume=resume)
    found, confusion = class_metrics(made.scores, evaluation.labels_of(made.test))
    read = [(row["test_top1"], -row["epoch"]) for row in made.history if "test_top1" in row]
    best_top1, best_epoch = max(read)
    results = {
        **found,
        "best_top1": best_top1,
        "best_epoch": -best_epoch,
        "note": "top1 is that of the last epoch; best_top1 is chosen on the test set",
        "config": asdict(config),
        "train_view": None if train_view is None else repr(train_view),
        "num_available": len(evaluation.known("train")),
        "checkpoint": None if made.checkpoint is None else str(made.checkpoint),
        **evaluation.record("finetune", torch.from_numpy(made.train), torch.from_numpy(made.test)),
        "history": made.history,
    }
    return evaluation.finish(out, results, confusion, "fine-tuning")


TASKS.add("finetune", Task(evaluate_finetune))
