"""The state of a training: what moves from step to step, and how a checkpoint keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastskel.data.loader import Loader
from fastskel.models.encoder import Encoder
from fastskel.objectives.objective import Objective
from fastskel.train.checkpoint import Checkpoint, load_weights, weights
from fastskel.train.checkpoint_writer import CheckpointWriter
from fastskel.train.chunked import Gradients
from fastskel.train.optimiser import Average, learning_rate
from fastskel.train.processes import TrainingStopped
from fastskel.train.stage import Stage

__all__ = ["Run"]


@dataclass
class Run:
    """What moves during a training, and what a checkpoint keeps of it.

    Attributes:
        stage: What is trained.
        encoder: The trained encoder of views (N, T, M, V, C).
        objective: Its objective.
        optimizer: Over the parameters of both.
        loader: Of this process.
        step: The next step, or the one being taken.
        average: Running average of the encoder's weights, if the stage keeps one.
        best: Figure, value and step of the best checkpoint.
        saved: The last checkpoint.
        gradients: What takes a batch's gradient; set once a checkpoint has been read, because it then shares the weights.
    """

    stage: Stage
    encoder: Encoder
    objective: Objective
    optimizer: torch.optim.Optimizer
    loader: Loader
    step: int = 0
    average: Average | None = None
    best: dict[str, Any] | None = None
    saved: Path | None = None
    gradients: Gradients = field(init=False)

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        return self.stage.epochs * len(self.loader)

    @property
    def chunk(self) -> int | None:
        """Most samples that this process takes at a time."""
        return None if self.stage.chunk is None else self.stage.chunk // self.loader.world_size

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds the weights (D, ..) of."""
        kept = {"average": self.average.encoder} if self.average is not None else {}
        return {"encoder": self.encoder, "objective": self.objective, **kept}

    @property
    def lr(self) -> float:
        """Learning rate of the step that is next, or is being taken."""
        return learning_rate(self.stage, self.loader.epoch, self.step, self.total_steps)

    def parameter_names(self) -> list[str]:
        """Names of the trained parameters (D, ..), in the optimiser's order."""
        names = {id(p): f"{m}.{n}" for m, module in self.modules.items() for n, p in module.named_parameters()}
        return [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]

    def parameters(self) -> list[nn.Parameter]:
        """Trained parameters (D, ..), in the optimiser's order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Moments (D, ..) by the name of their parameter and their own."""
        state = self.optimizer.state_dict()["state"]
        return {
            f"{n}/{kind}": v
            for i, n in enumerate(self.parameter_names())
            if i in state
            for kind, v in state[i].items()
            if isinstance(v, Tensor)
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on where a checkpoint was saved.

        Raises:
            ValueError: If it is not one of this stage: other weights (D, ..), moments or batches.
        """
        names = {name: number for number, name in enumerate(self.parameter_names())}
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in checkpoint.optimizer.items():
            name, kind = key.rsplit("/", 1)
            if name not in names:
                raise ValueError(
                    f"pretrain: {checkpoint.path} must hold the optimiser of this model, got {name!r}. Use its own config."
                )
            state.setdefault(names[name], {})[kind] = value
        expected = names.keys() - set(checkpoint.state.get("unmoved", [])) if checkpoint.state["step"] else set()
        lacking = sorted(name for name in expected if names[name] not in state)
        if lacking:
            raise ValueError(
                f"pretrain: {checkpoint.path} must hold the optimiser of every parameter, got none for {lacking[:3]}. "
                "Use another checkpoint."
            )
        load_weights(self.modules, checkpoint.model, checkpoint.path)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.loader.load_state_dict(self._own_position(checkpoint))
        self.step, self.best = checkpoint.state["step"], checkpoint.state.get("best")
        self.saved = checkpoint.path

    def _own_position(self, checkpoint: Checkpoint) -> dict[str, int]:
        """Where the loader of any number of processes stood, for this one: positions count batches of all processes."""
        stored, own = checkpoint.state["loader"], self.loader
        if stored["batch_size"] * stored["world_size"] != self.stage.batch_size:
            raise ValueError(
                f"pretrain: {checkpoint.path} must have the stage's batch_size {self.stage.batch_size}, got "
                f"{stored['batch_size']} in each of {stored['world_size']} processes. Use its own config."
            )
        return {**stored, "batch_size": own.batch_size, "world_size": own.world_size}

    def save(self, writer: CheckpointWriter) -> Path:
        """Hand weights and moments (D, ..) and the state to a writer; return the checkpoint's folder.

        Raises:
            TrainingStopped: If a weight is not finite.
        """
        # of the next step: the loader's own epoch turns only when it is asked for the next batch
        stage, position = self.stage, self.loader.state_dict()
        lr = learning_rate(stage, position["epoch"], self.step, self.total_steps)
        if not all(bool(value.isfinite().all()) for value in weights(self.modules).values()):
            raise TrainingStopped(
                f"pretrain: weights must stay finite, got others after step {self.step - 1}; they were not saved. "
                + self.advice(lr)
            )
        moments = self.optimizer_tensors()
        state = {
            "encoder": {"name": stage.encoder, "config": self.encoder.config},
            "objective": {"name": stage.objective, "options": stage.objective_options},
            "optimizer": {"name": stage.optimizer, "lr": lr, "weight_decay": stage.weight_decay},
            "eval_view": stage.eval_view,
            "topology": self.loader.dataset.topology.name,
            "loader": position,
            "epoch": position["epoch"],
            "total_steps": self.total_steps,
            "best": self.best,
            # parameters that no step has given a gradient yet
            "unmoved": sorted(set(self.parameter_names()) - {key.rsplit("/", 1)[0] for key in moments}),
        }
        return writer.save(self.step, weights(self.modules), moments, state)

    def last_good(self) -> str:
        """Say where to go back to."""
        return "no checkpoint was written" if self.saved is None else f"the last good checkpoint is {self.saved}"

    def advice(self, lr: float) -> str:
        """Say what to try after numbers that are not finite."""
        return f"Start a new run with a lower lr (now {lr:g}), in fp32, or with a larger batch; {self.last_good()}."

    def is_best(self, figures: Mapping[str, float], step: int) -> bool:
        """Whether this epoch's figures, () each, are better than any before; remembers them if so.

        Raises:
            ValueError: If the stage's figure is not among them.
        """
        name = self.stage.keep_best.removeprefix("-")
        if name not in figures:
            raise ValueError(f"pretrain: keep_best must be one of the monitors' {sorted(figures)}, got {name!r}. Name one.")
        sign = -1 if self.stage.keep_best.startswith("-") else 1
        before = self.best if self.best is not None and self.best["figure"] == self.stage.keep_best else None
        # written so that NaN is never best
        if not (before is None or sign * figures[name] > sign * before["value"]) or math.isnan(figures[name]):
            return False
        self.best = {"figure": self.stage.keep_best, "value": figures[name], "step": step}
        return True
