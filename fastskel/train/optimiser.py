"""What moves the weights: optimisers, which parameters decay, the learning rate of each step, and a running average."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastskel.train.stage import Stage

__all__ = ["Average", "build_optimizer", "learning_rate"]

# LARS as its authors train ResNet: the share of a weight's norm that a step of rate 1 moves it by
TRUST_COEFFICIENT, MOMENTUM = 1e-3, 0.9


def _groups(stage: Stage, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split groups of parameters (D, ..) where biases and norms must not decay."""
    if not stage.decay_matrices_only:
        return list(groups)
    parts = []
    for group in groups:
        matrices = [p for p in group["params"] if p.dim() > 1]
        vectors = [p for p in group["params"] if p.dim() <= 1]
        parts += [{**group, "params": matrices}, {**group, "params": vectors, "weight_decay": 0.0}]
    return [part for part in parts if part["params"]]


def build_optimizer(stage: Stage, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
    """Build a stage's optimiser of groups of parameters (D, ..).

    "adam" adds the decay to the gradient, as the reference does; "adamw" takes it off the weight (Loshchilov and Hutter,
    ICLR 2019). "lamb" (You et al., ICLR 2020) scales Adam's direction, decay added, and "lars" (You et al., 2017) that of
    momentum, by the norm of each weight: for batches of thousands.

    Raises:
        ValueError: If the library that has LARS and LAMB is not installed.
    """
    parts = _groups(stage, groups)
    common: dict[str, Any] = dict(lr=stage.lr, weight_decay=stage.weight_decay)
    if stage.optimizer == "adam":
        return torch.optim.Adam(parts, fused=True, **common)
    if stage.optimizer == "adamw":
        return torch.optim.AdamW(parts, fused=True, **common)
    try:
        from pytorch_optimizer import LARS, Lamb
    except ImportError as error:
        raise ValueError(
            f"build_optimizer: pytorch-optimizer must be installed for {stage.optimizer}, got {error}. "
            "Run pip install 'fastskel[large-batch]', or take adam or adamw."
        ) from error
    optimizer: torch.optim.Optimizer
    if stage.optimizer == "lamb":
        # decay inside of what is scaled, as in the paper; without adam_debias its rate would start ten times as high, behind the
        # scaling. It takes 10 for the norm of any longer weight
        optimizer = Lamb(parts, weight_decouple=False, adam_debias=True, **common)
    else:
        optimizer = LARS(parts, momentum=MOMENTUM, trust_coefficient=TRUST_COEFFICIENT, **common)
    return optimizer


def learning_rate(stage: Stage, epoch: int, step: int, total_steps: int) -> float:
    """Learning rate of a step, as a function of its address in a training of `total_steps` alone."""
    warmth = min(1.0, (step + 1) / stage.warmup_steps) if stage.warmup_steps else 1.0
    if stage.schedule == "step":
        return stage.lr * warmth * stage.lr_factor ** sum(epoch >= milestone for milestone in stage.milestones)
    # from the end of the warm-up to the last step; of a training that is all warm-up nothing is left
    done = min(max(step - stage.warmup_steps, 0) / max(total_steps - 1 - stage.warmup_steps, 1), 1.0)
    return stage.lr * warmth * (stage.lr_final + (1 - stage.lr_final) * 0.5 * (1 + math.cos(math.pi * done)))


class Average(nn.Module):
    """A running average of an encoder's weights, kept beside it: a <- a + (1 - decay) * (w - a) after each step.

    In the beginning the decay is (1 + step) / (10 + step) where that is less, so that the average does not remember the
    weights it started from. Buffers are those of the encoder.

    Args:
        encoder: What is averaged.
        decay: Share of the average that a step keeps.
    """

    def __init__(self, encoder: nn.Module, decay: float) -> None:
        super().__init__()
        self.encoder, self.decay = copy.deepcopy(encoder).requires_grad_(False).eval(), decay

    @torch.no_grad()
    def update(self, encoder: nn.Module, step: int) -> None:
        """Take in the weights after step number `step`, from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        own, new = ([p.detach() for p in module.parameters()] for module in (self.encoder, encoder))
        torch._foreach_lerp_(own, new, 1 - decay)
        for mine, theirs in zip(self.encoder.buffers(), encoder.buffers(), strict=True):
            mine.copy_(theirs)
