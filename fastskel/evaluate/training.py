"""How an encoder and its head are trained together, on whatever batches, resumable bit for bit."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastskel.data.identity import dataset_identity
from fastskel.data.views import ViewSpec
from fastskel.evaluate.classifier import ClassifierStore, TunedModel, bare_encoder, described_encoder, parts_of
from fastskel.evaluate.evaluation import Evaluation
from fastskel.models.encoder import Encoder
from fastskel.train.checkpoint import newest, weights

if TYPE_CHECKING:
    from fastskel.evaluate.finetune import FinetuneConfig

__all__ = [
    "make_optimizer", "parameter_groups", "set_drop_path", "train_epoch", "train_epochs", "trainable_copy", "training_identity",
]  # fmt: skip

# settings that change no bit of the result
FREE_SETTINGS = ("evaluate_every", "save_every")


def parameter_groups(model: TunedModel, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Give parameters (D, ..) their share of the step size by depth, matrices apart from what does not decay.

    Raises:
        ValueError: If the encoder's depths do not list each of its parameters once.
    """
    depths = model.encoder.depth_groups()
    listed = [p for group in depths for p in group]
    own = list(model.encoder.parameters())
    if len(listed) != len(own) or {id(p) for p in listed} != {id(p) for p in own}:
        raise ValueError(
            f"finetune: depth_groups of {type(model.encoder).__name__} must list each of {len(own)} parameters once, got "
            f"{len(listed)}. Mend the encoder."
        )
    depths = [*depths, list(model.head.parameters())]
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


def make_optimizer(model: TunedModel, config: FinetuneConfig) -> torch.optim.Optimizer:
    """Make the optimiser of all parameters (D, ..), with the step sizes that their depths have."""
    groups = parameter_groups(model, config)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def set_drop_path(encoder: Encoder, rate: float | None) -> None:
    """Give an encoder of views (N, T, M, V, C) another DropPath rate; None leaves its own.

    Raises:
        ValueError: If it has none.
    """
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


def train_epoch(
    model: TunedModel, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[tuple[Any, ...], Tensor]],
    config: FinetuneConfig, epoch: int, *, num_batches: int, loss_of: Callable[[Tensor, Tensor], Tensor],
    device: torch.device, precision: str,
) -> dict[str, Any]:  # fmt: skip
    """Train once over batches, on the device.

    Args:
        model: Returns class scores, (N, K) or (N, R, K).
        optimizer: Of its parameters.
        batches: What the model is called with, and labels (N,) or (N, R), -100 where there is none.
        config: Rates, epochs without the encoder.
        epoch: Counted from 0.
        num_batches: Steps of an epoch.
        loss_of: Mean loss of the labelled scores.
        device: Where the model is.
        precision: "fp32", or "bf16" for automatic mixed precision.
    Returns:
        What the epoch was like: step size, mean loss, share of right answers.
    Raises:
        ValueError: If the loss or a weight is not finite.
    """
    frozen = epoch < config.frozen_epochs
    model.train()
    model.encoder.train(not frozen).requires_grad_(not frozen)
    total, (right, count) = torch.zeros((), device=device), torch.zeros(2, dtype=torch.int64, device=device)
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    rate = 0.0
    for number, (inputs, labels) in enumerate(batches):
        rate = config.rate(epoch * num_batches + number, num_batches)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        with mixed:
            scores = model(*inputs).float()
        loss = loss_of(scores, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        known = (labels >= 0).sum()
        total += loss.detach() * known
        # no class has the number of what has no label
        right += (scores.detach().argmax(-1) == labels).sum()
        count += known
    model.encoder.requires_grad_(True)
    mean = float(total) / int(count)
    if not math.isfinite(mean) or not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise ValueError(
            f"finetune: loss and weights must stay finite, got loss {mean} in epoch {epoch}. Lower learning_rate (now "
            f"{config.learning_rate})."
        )
    return {"epoch": epoch, "learning_rate": rate, "loss": mean, "train_top1": int(right) / int(count)}


def train_epochs(
    model: TunedModel, config: FinetuneConfig, store: ClassifierStore,
    one_epoch: Callable[[torch.optim.Optimizer, int], dict[str, Any]], *, begin: Callable[[], None], resume: bool,
    progress: bool, title: str = "fine-tuning",
) -> tuple[list[dict[str, Any]], Path | None]:  # fmt: skip
    """Train a model of views (N, T, M, V, C) for the epochs that its store does not hold yet, and keep it there.

    Args:
        model: On its device, with its first weights; those of the last epoch afterwards.
        config: Optimiser, epochs, how often to save.
        store: Where checkpoints go, if anywhere.
        one_epoch: Trains the epoch of that number; returns its row of the history.
        begin: Gives the head the weights of a probe; for a training that asks for it and does not go on from a checkpoint.
        resume: Go on from the store's checkpoint, or begin where there is none.
        progress: Show a progress bar.
        title: Of the bar.
    Returns:
        One row per epoch, and the last checkpoint; None where nothing is kept.
    Raises:
        ValueError: If the store holds a training that is not to be resumed, or another one.
    """
    from tqdm import tqdm

    optimizer = make_optimizer(model, config)
    history = store.load(model, optimizer, resume)
    if not history and config.start == "probe":
        begin()
    path = newest(store.folder) if store.folder is not None else None
    with tqdm(
        total=config.epochs, initial=len(history), desc=title, unit="epoch", disable=not progress, leave=False
    ) as bar:
        for epoch in range(len(history), config.epochs):
            row = one_epoch(optimizer, epoch)
            history.append(row)
            last = epoch + 1 == config.epochs
            if last or (epoch + 1) % config.save_every == 0:
                path = store.save(model, None if last else optimizer, history)
            bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
            bar.update()
    model.eval()
    return history, path


def training_identity(
    evaluation: Evaluation, model: TunedModel, config: FinetuneConfig, view: ViewSpec, indices: NDArray[np.int64],
    **further: Any,
) -> dict[str, Any]:  # fmt: skip
    """What a resumed training on clips (N,) must share with the one that was stopped, in plain values."""
    digest = hashlib.sha256()
    for name, value in sorted(weights(parts_of(model)).items()):
        digest.update(name.encode() + value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    settings = {name: value for name, value in asdict(config).items() if name not in FREE_SETTINGS}
    clips = hashlib.sha256(np.ascontiguousarray(indices, "<i8").tobytes()).hexdigest()
    identity: dict[str, Any] = json.loads(json.dumps({
        "config": settings, "view": repr(view), "data": dataset_identity(evaluation.dataset), "clips": clips,
        "precision": evaluation.precision, "start": digest.hexdigest(),
        # heads, gap, scale and the like leave no trace in the weights
        "encoder": described_encoder(model.encoder), **further,
    }))  # fmt: skip
    return identity


def trainable_copy(encoder: Encoder | None) -> Encoder:
    """Copy an encoder of views (N, T, M, V, C) to train it.

    Raises:
        ValueError: If it has nothing to train.
    """
    if encoder is None or not any(True for _ in encoder.parameters()):
        kind = "raw coordinates" if encoder is None else f"{type(encoder).__name__} without parameters"
        raise ValueError(f"finetune: encoder must be one to train, got {kind}. Pass the original.")
    return copy.deepcopy(encoder)
