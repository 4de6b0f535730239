"""Recipes of the USDRL family."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from fastskel.data.packed import PackedDataset
from fastskel.data.views import eval_view, usdrl_views
from fastskel.registry import Registry
from fastskel.train.stage import Optimizer, Precision, Schedule, Stage

__all__ = ["RECIPES", "USDRLRecipe"]


@dataclass(frozen=True)
class USDRLRecipe:
    """Settings of a USDRL pretraining; joints, bodies and channels come from the data set.

    Attributes:
        encoder: Encoder, dense (dste) or plain (sttr).
        width: Width D of both streams.
        num_heads: Attention heads.
        num_layers: Layers per stream.
        frames: Frames T of every view.
        gap: Every gap-th token passes the dense shift unchanged (dste).
        alpha: Weight of the convolutional attention branch (dste).
        drop_path: Probability that a residual branch is dropped (dste).
        weighting: Loss weighting of the AAAI or the journal code.
        stream: Joint positions, bones, or motion.
        normalise: Normalisation of each clip before its views are made.
        num_views: Views W of each clip.
        crop_low: Least share of the clip in a temporal crop.
        crop_min_frames: Least frames in a temporal crop; shorter clips are taken whole.
        corruption: Share of the joints that corruption chooses, 15 of 25 as published.
        shear: Largest factor of the shear, 1 as published.
        epochs: Passes over the data.
        batch_size: Clips per step, of all processes together.
        chunk: Clips in memory at a time, of all processes together: the loss stays that of the batch, BatchNorm is by chunk; a
            third more work. None takes the whole batch.
        optimizer: Optimiser; lamb and lars are for batches of thousands.
        lr: Learning rate; of batches of `base_batch_size` if it is scaled.
        lr_scaling: How the learning rate grows with the batch: not at all, linearly, or with its square root.
        base_batch_size: Clips per step that `lr` is meant for, if it is scaled.
        weight_decay: Weight decay; added to the gradient by adam, decoupled in adamw.
        decay_matrices_only: Whether biases and the weights of norms are left out of the decay.
        clip_norm: Largest norm of the gradient, 0 for any.
        schedule: Whether the learning rate falls at the milestones or along a cosine.
        milestones: Epochs from which the learning rate is multiplied by 0.1.
        lr_final: Share of the learning rate that the cosine ends at.
        warmup_steps: Steps over which the learning rate rises linearly.
        average: Decay per step of a running average of the weights, 0 for none.
        precision: Compute type of encoder and projectors; losses are at least fp32.
        synchronise_norms: BatchNorm of the projectors over all processes instead of over each.
        seed: Key of every random draw.
        num_threads: Loader threads; batches do not depend on it.
        checkpoint_steps: Steps between checkpoints, 0 for one per epoch.
        keep_checkpoints: Newest checkpoints that are kept.
        log_steps: Steps between log records.
    """

    encoder: Literal["dste", "sttr"] = "dste"
    width: int = 1024
    num_heads: int = 1
    num_layers: int = 2
    frames: int = 64
    gap: int = 4
    alpha: float = 0.5
    drop_path: float = 0.1
    weighting: Literal["aaai", "journal"] = "aaai"
    stream: Literal["joint", "bone", "motion"] = "joint"
    normalise: Literal["none", "center", "center-first", "align", "align-yaw"] = "none"
    num_views: int = 4
    crop_low: float = 0.1
    crop_min_frames: int = 64
    corruption: float = 0.6
    shear: float = 1.0
    epochs: int = 451
    batch_size: int = 356
    chunk: int | None = None
    optimizer: Optimizer = "adam"
    lr: float = 5e-4
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    base_batch_size: int = 356
    weight_decay: float = 1e-5
    decay_matrices_only: bool = False
    clip_norm: float = 0.0
    schedule: Schedule = "step"
    milestones: tuple[int, ...] = (351,)
    lr_final: float = 0.0
    warmup_steps: int = 0
    average: float = 0.0
    precision: Precision = "bf16"
    synchronise_norms: bool = False
    seed: int = 0
    num_threads: int = 1
    checkpoint_steps: int = 0
    keep_checkpoints: int = 2
    log_steps: int = 1

    def scaled_lr(self) -> float:
        """Learning rate of the recipe's batch size (Goyal et al., 2017, for linear; Krizhevsky, 2014, for sqrt)."""
        if self.base_batch_size < 1:
            raise ValueError(
                f"USDRLRecipe: base_batch_size must be at least 1, got {self.base_batch_size}. Give the batch that lr is for."
            )
        # of an impossible batch size the stage says what is wrong
        growth = max(self.batch_size, 1) / self.base_batch_size
        return self.lr * {"none": 1.0, "sqrt": math.sqrt(growth), "linear": growth}[self.lr_scaling]

    def stages(self, dataset: PackedDataset) -> tuple[Stage, ...]:
        """Return the single stage for a data set of clips (T, M, V, C)."""
        _, bodies, joints, channels = dataset.frames.shape
        options = dict(
            num_joints=joints, num_bodies=bodies, num_frames=self.frames, num_channels=channels,
            width=self.width, num_heads=self.num_heads, num_layers=self.num_layers,
        )  # fmt: skip
        if self.encoder == "dste":
            options |= dict(gap=self.gap, alpha=self.alpha, drop_path=self.drop_path)
        views = usdrl_views(
            self.frames, self.stream, self.num_views, self.normalise, self.crop_min_frames,
            low=self.crop_low, fraction=self.corruption, amplitude=self.shear,
        )  # fmt: skip
        stage = Stage(
            encoder=f"usdrl-{self.encoder}", encoder_options=options,
            objective="mgfd", objective_options={"weighting": self.weighting},
            views=views, eval_view=eval_view(self.frames, self.stream, self.normalise),
            epochs=self.epochs, batch_size=self.batch_size, chunk=self.chunk, optimizer=self.optimizer, lr=self.scaled_lr(),
            weight_decay=self.weight_decay, decay_matrices_only=self.decay_matrices_only, clip_norm=self.clip_norm,
            schedule=self.schedule, milestones=self.milestones, lr_final=self.lr_final, warmup_steps=self.warmup_steps,
            average=self.average, precision=self.precision, seed=self.seed, synchronise_norms=self.synchronise_norms,
            num_threads=self.num_threads, checkpoint_steps=self.checkpoint_steps, keep_checkpoints=self.keep_checkpoints,
            log_steps=self.log_steps,
        )  # fmt: skip
        return (stage,)


RECIPES: Registry[Callable[[], USDRLRecipe]] = Registry("recipe")


@RECIPES.register("usdrl-dste")
def usdrl_dste() -> USDRLRecipe:
    """DSTE on NTU RGB+D as the AAAI code trains it: width 1024, batch 356, 451 epochs."""
    return USDRLRecipe()


@RECIPES.register("usdrl-sttr")
def usdrl_sttr() -> USDRLRecipe:
    """STTR on NTU RGB+D as the AAAI code trains it."""
    return USDRLRecipe(encoder="sttr")


@RECIPES.register("usdrl-dste-journal")
def usdrl_dste_journal() -> USDRLRecipe:
    """DSTE on NTU RGB+D as the journal code trains it: no cross-correlation, a lower learning rate."""
    return USDRLRecipe(weighting="journal", lr=1e-4)


@RECIPES.register("usdrl-small")
def usdrl_small() -> USDRLRecipe:
    """A small DSTE for sets of about a thousand clips seen from several sides; minutes on two cores."""
    # batches of 32 instead of 128: what helped most on held-out subjects was more steps at the same cost
    return USDRLRecipe(
        width=128, frames=32, normalise="center-first", crop_low=0.4, crop_min_frames=16, epochs=60, batch_size=32,
        base_batch_size=32, lr=1e-3, milestones=(48,), warmup_steps=20,
    )  # fmt: skip


@RECIPES.register("usdrl-small-mild")
def usdrl_small_mild() -> USDRLRecipe:
    """The same with mild augmentation, for sets in which everybody faces the camera alike."""
    return replace(usdrl_small(), normalise="center", crop_low=0.7, shear=0.3)


@RECIPES.register("usdrl-demo")
def usdrl_demo() -> USDRLRecipe:
    """The demo's DSTE: two to three minutes on two cores over synthetic motion."""
    return replace(usdrl_small_mild(), width=64, shear=0.5, epochs=40, milestones=(32,), precision="fp32")
