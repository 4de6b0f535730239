"""Recognition by fine-tuning: encoder and linear layer trained on labelled clips, resumable bit for bit.

Every draw has an address: the order of clips and their crops (seed, epoch), DropPath (seed, step), the layer's first weights
(seed). So a training is a function of its settings, and one that was stopped goes on from its last checkpoint as if it had not
been.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fastskel.data.identity import dataset_identity
from fastskel.data.loader import Loader
from fastskel.data.views import RandomCrop, ViewSpec
from fastskel.evaluate.classifier import (
    Classifier,
    ClassifierStore,
    bare_encoder,
    class_scores,
    described_encoder,
    parts_of,
)
from fastskel.evaluate.evaluation import TASKS, Evaluation, Task
from fastskel.evaluate.metrics import class_metrics, top_k_accuracy
from fastskel.models.encoder import Encoder
from fastskel.train.checkpoint import newest, weights
from fastskel.train.stage import describe

__all__ = ["FinetuneConfig", "Finetuned", "evaluate_finetune", "fine_tune"]

# settings that change no bit of the result
FREE_SETTINGS = ("evaluate_every", "save_every")


@dataclass(frozen=True)
class FinetuneConfig:
    """Optimiser and schedule of a fine-tuning. The defaults are fixed: they were chosen on no test set.

    The reference publishes no settings for recognition. Those of its detection, which fine-tunes the whole network, are
    `FinetuneConfig(epochs=150, batch_size=512, optimizer="sgd", learning_rate=0.005, layer_decay=1.0, weight_decay=0.0,
    warmup_epochs=0, schedule="step", milestones=(), label_smoothing=0.0, drop_path=0.0)`.

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
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"FinetuneConfig: learning_rate must be positive, got {self.learning_rate}. Try 0.001.")
        for name, known in (("optimizer", ("adamw", "sgd")), ("schedule", ("cosine", "step"))):
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


def _groups(classifier: Classifier, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Parameters (D, ..) with their share of the step size, matrices apart from what does not decay."""
    depths = classifier.encoder.depth_groups()
    listed = [p for group in depths for p in group]
    own = list(classifier.encoder.parameters())
    if len(listed) != len(own) or {id(p) for p in listed} != {id(p) for p in own}:
        raise ValueError(
            f"finetune: depth_groups of {type(classifier.encoder).__name__} must list each of {len(own)} parameters once, got "
            f"{len(listed)}. Mend the encoder."
        )
    depths = [*depths, list(classifier.head.parameters())]
    groups = []
    for depth, parameters in enumerate(depths):
        share = config.layer_decay ** (len(depths) - 1 - depth)
        for chosen, decay in (
            ([p for p in parameters if p.dim() > 1], config.weight_decay),
            ([p for p in parameters if p.dim() <= 1], 0.0),
        ):
            if chosen:
                groups.append({"params": chosen, "weight_decay": decay, "share": share})
    return groups


def _optimizer(classifier: Classifier, config: FinetuneConfig) -> torch.optim.Optimizer:
    groups = _groups(classifier, config)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def _set_drop_path(encoder: Encoder, rate: float | None) -> None:
    if rate is None:
        return
    encoder = bare_encoder(encoder)
    if not isinstance(getattr(encoder, "drop_path", None), float) or "drop_path" not in encoder.config:
        raise ValueError(
            f"finetune: drop_path must be None for {type(encoder).__name__}, which has none, got {rate}. Leave it out."
        )
    if rate >= 1:
        raise ValueError(f"finetune: drop_path must be below 1, got {rate}. Choose another.")
    encoder.drop_path, encoder.config = rate, {**encoder.config, "drop_path": rate}  # type: ignore[assignment]


def _train_epoch(
    classifier: Classifier, optimizer: torch.optim.Optimizer, loader: Loader, config: FinetuneConfig, epoch: int,
    precision: str,
) -> dict[str, Any]:  # fmt: skip
    """Train over all clips once; say what it was like."""
    device = loader.device
    frozen = epoch < config.frozen_epochs
    classifier.train()
    classifier.encoder.train(not frozen).requires_grad_(not frozen)
    total, right, count = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device), 0
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    rate = 0.0
    for number, batch in enumerate(loader):
        step = epoch * len(loader) + number
        rate = config.rate(step, len(loader))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        with mixed:
            scores = classifier(batch.at(config.seed, step).views[0]).float()
        # every observation of a clip has the clip's class
        labels = batch.labels.view(-1, *[1] * (scores.dim() - 2)).expand(scores.shape[:-1]).flatten()
        scores = scores.flatten(0, -2)
        loss = functional.cross_entropy(scores, labels, label_smoothing=config.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.detach() * len(labels)
        right += (scores.detach().argmax(1) == labels).sum()
        count += len(labels)
    classifier.encoder.requires_grad_(True)
    mean = float(total) / count
    if not math.isfinite(mean) or not all(bool(p.isfinite().all()) for p in classifier.parameters()):
        raise ValueError(
            f"finetune: loss and weights must stay finite, got loss {mean} in epoch {epoch}. Lower learning_rate (now "
            f"{config.learning_rate})."
        )
    return {"epoch": epoch, "learning_rate": rate, "loss": mean, "train_top1": int(right) / count}


def _identity(
    evaluation: Evaluation, classifier: Classifier, config: FinetuneConfig, view: ViewSpec, indices: NDArray[np.int64]
) -> dict[str, Any]:
    """What a resumed fine-tuning must share with the one that was stopped."""
    digest = hashlib.sha256()
    for name, value in sorted(weights(parts_of(classifier)).items()):
        digest.update(name.encode() + value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    settings = {name: value for name, value in asdict(config).items() if name not in FREE_SETTINGS}
    clips = hashlib.sha256(np.ascontiguousarray(indices, "<i8").tobytes()).hexdigest()
    identity: dict[str, Any] = json.loads(json.dumps({
        "config": settings, "view": repr(view), "data": dataset_identity(evaluation.dataset), "clips": clips,
        "precision": evaluation.precision, "frames": classifier.frames, "start": digest.hexdigest(),
        # heads, gap, scale and the like leave no trace in the weights
        "encoder": described_encoder(classifier.encoder),
    }))  # fmt: skip
    return identity


def _checked(evaluation: Evaluation, indices: NDArray[np.int64] | None) -> tuple[Encoder, NDArray[np.int64]]:
    """A copy of the encoder to train, and the clips (N,) to train on."""
    encoder, train = evaluation.encoder, evaluation.known("train")
    if encoder is None or not any(True for _ in encoder.parameters()):
        kind = "raw coordinates" if encoder is None else f"{type(encoder).__name__} without parameters"
        raise ValueError(f"finetune: encoder must be one to train, got {kind}. Pass the original.")
    if indices is None:
        return copy.deepcopy(encoder), train
    chosen = np.asarray(indices, dtype=np.int64)
    strange = np.setdiff1d(chosen, train)
    if chosen.ndim != 1 or chosen.size == 0 or strange.size or len(np.unique(chosen)) != len(chosen):
        raise ValueError(
            f"finetune: indices must be distinct labelled clips of the training part, got {chosen.size} clips, of which "
            f"{strange.tolist()[:5]} are not. Choose among evaluation.known('train')."
        )
    return copy.deepcopy(encoder), chosen


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
    from tqdm import tqdm

    config = config or FinetuneConfig()
    encoder, train = _checked(evaluation, indices)
    test, view, dataset = evaluation.known("test"), evaluation.view, evaluation.dataset
    if train_view is None:
        least = max(1, view.frames // 2)
        train_view = view if config.crop is None else replace(view, crop=RandomCrop(config.crop, 1.0, least))
    _set_drop_path(encoder, config.drop_path)
    device = torch.device(evaluation.device)
    classifier = Classifier(encoder, len(evaluation.class_names), frames=frames, seed=config.seed)
    store = ClassifierStore(None if out is None else Path(out))
    if out is not None:
        store.told = {
            "task": "finetune", "encoder": described_encoder(encoder), "eval_view": view, "topology": dataset.topology.name,
            "class_names": evaluation.class_names, "frames": frames, "run": evaluation.run, "config": describe(config),
            "identity": _identity(evaluation, classifier, config, train_view, train), "labelled_clips": train.tolist(),
            "unlabelled_clips": None if evaluation.trained_on is None else evaluation.trained_on.tolist(),
        }  # fmt: skip
    classifier.to(device)
    optimizer = _optimizer(classifier, config)
    history = store.load(classifier, optimizer, resume)
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

    scores, path = None, None
    if len(history) == config.epochs:
        scores, path = score(), newest(Path(out)) if out is not None else None
    with loader, tqdm(
        total=config.epochs, initial=len(history), desc="fine-tuning", unit="epoch", disable=not evaluation.progress, leave=False
    ) as bar:
        for epoch in range(len(history), config.epochs):
            loader.epoch, loader.position = epoch, 0
            row = _train_epoch(classifier, optimizer, loader, config, epoch, evaluation.precision)
            last = epoch + 1 == config.epochs
            if last or (epoch + 1) % config.evaluate_every == 0:
                scores = score()
                # of the longest observation, where there are several
                row["test_top1"] = top_k_accuracy(scores if scores.dim() == 2 else scores[:, -1], labels, 1)
            history.append(row)
            if last or (epoch + 1) % config.save_every == 0:
                path = store.save(classifier, None if last else optimizer, history)
            bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
            bar.update()
    assert scores is not None
    return Finetuned(classifier.eval(), scores, history, train, test, path)


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
