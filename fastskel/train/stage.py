"""What to train: one complete frozen configuration, and the recipes that return it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from fastskel.data.packed import PackedDataset
from fastskel.data.views import CenterCrop, ViewSpec

__all__ = ["Optimizer", "Precision", "Recipe", "Schedule", "Stage", "describe"]

Precision = Literal["fp32", "bf16", "fp8"]
Optimizer = Literal["adam", "adamw", "lamb", "lars"]
Schedule = Literal["step", "cosine"]


@dataclass(frozen=True)
class Stage:
    """One training from start to end.

    Attributes:
        encoder: Registered encoder name.
        encoder_options: Its constructor arguments.
        objective: Registered objective name.
        objective_options: Its constructor arguments beside encoder and views.
        views: How each view is made, (N, T, M, V, C) each.
        eval_view: How downstream tasks make their one view.
        epochs: Passes over the data.
        batch_size: Samples N per step, of all processes together.
        chunk: Most samples that are on the devices at a time, of all processes together; a batch is cut into parts that differ
            by at most one sample in each process, and BatchNorm takes the statistics of a part. None leaves it whole.
        optimizer: adam, adamw, lamb or lars.
        lr: Learning rate.
        weight_decay: Weight decay: coupled in adam, decoupled in adamw, inside of the scaled update in lamb and lars.
        decay_matrices_only: Whether biases and the weights of norms are left out of the decay.
        clip_norm: Largest L2 norm of all gradients together, longer ones are scaled down to it; 0 leaves them.
        schedule: step: the learning rate falls at the milestones; cosine: along half a cosine over what follows the warm-up.
        milestones: Epochs from which the learning rate is multiplied by `lr_factor`, once each; of the schedule step.
        lr_factor: Factor at each milestone.
        lr_final: Share of `lr` that the schedule cosine ends at.
        warmup_steps: Steps over which the learning rate rises linearly to `lr`; 0 starts there.
        average: Decay per step of a running average of the encoder's weights, kept in every checkpoint; 0 keeps none.
        precision: Compute type of the encoder and projectors; losses are always at least fp32. fp8 is bf16 whose layers multiply
            8-bit floats, but for gradients of weights.
        synchronise_norms: Whether the objective's BatchNorm takes its statistics over the samples of all processes, so that
            their number changes nothing; else over those of each process.
        seed: Key of every random draw.
        num_threads: Loader threads; batches do not depend on it.
        checkpoint_steps: Steps between checkpoints; 0 makes one at the end of each epoch.
        keep_checkpoints: Newest checkpoints that are kept.
        keep_best: Figure of a monitor; the checkpoint of the epoch where it is largest is kept too. With a minus before its name
            where it is smallest.
        log_steps: Steps between log records.
        name: What the progress bar calls it.
    """

    encoder: str
    objective: str
    views: tuple[ViewSpec, ...]
    eval_view: ViewSpec
    encoder_options: Mapping[str, Any] = field(default_factory=dict)
    objective_options: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 451
    batch_size: int = 356
    chunk: int | None = None
    optimizer: Optimizer = "adam"
    lr: float = 5e-4
    weight_decay: float = 1e-5
    decay_matrices_only: bool = False
    clip_norm: float = 0.0
    schedule: Schedule = "step"
    milestones: tuple[int, ...] = (351,)
    lr_factor: float = 0.1
    lr_final: float = 0.0
    warmup_steps: int = 0
    average: float = 0.0
    precision: Precision = "fp32"
    synchronise_norms: bool = False
    seed: int = 0
    num_threads: int = 1
    checkpoint_steps: int = 0
    keep_checkpoints: int = 2
    keep_best: str = ""
    log_steps: int = 1
    name: str = "pretrain"

    def __post_init__(self) -> None:
        limits = {
            "epochs": 1, "batch_size": 1, "log_steps": 1, "keep_checkpoints": 1, "warmup_steps": 0, "checkpoint_steps": 0,
        }  # fmt: skip
        for name, least in limits.items():
            if getattr(self, name) < least:
                raise ValueError(
                    f"Stage: {name} must be at least {least}, got {getattr(self, name)}. Give a larger number."
                )
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"Stage: chunk must be at least 1, got {self.chunk}. Leave it out for whole batches.")
        # written so that NaN fails
        if not (0 < self.lr < math.inf and 0 < self.lr_factor < math.inf and 0 <= self.weight_decay < math.inf):
            raise ValueError(
                "Stage: lr and lr_factor must be positive, weight_decay not negative, and all finite, "
                f"got {self.lr}, {self.lr_factor} and {self.weight_decay}. Fix them."
            )
        if any(milestone < 1 for milestone in self.milestones):
            raise ValueError(f"Stage: milestones must be epochs from 1 on, got {self.milestones}. Leave the others out.")
        if self.eval_view.transforms or not isinstance(self.eval_view.crop, CenterCrop):
            raise ValueError("Stage: eval_view must draw nothing, got a random one. Use fastskel.data.eval_view.")
        if not (0 <= self.clip_norm < math.inf and 0 <= self.lr_final <= 1 and 0 <= self.average < 1):
            raise ValueError(
                "Stage: clip_norm must be finite and not negative, lr_final in [0, 1] and average in [0, 1), "
                f"got {self.clip_norm}, {self.lr_final} and {self.average}. Fix them."
            )
        kinds = (("precision", Precision), ("optimizer", Optimizer), ("schedule", Schedule))
        for name, kind in kinds:
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"Stage: {name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}. Choose one."
                )


class Recipe(Protocol):
    """A frozen dataclass of friendly settings that becomes stages once the data set is known."""

    def stages(self, dataset: PackedDataset) -> tuple[Stage, ...]:
        """Return the complete configuration for a data set of clips (T, M, V, C)."""


def describe(value: Any) -> Any:
    """Turn configurations into plain JSON values; dataclasses name their type."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    return value
