"""Recipes of the USDRL family."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from fastskel.data.packed import PackedDataset
from fastskel.data.views import eval_view, usdrl_views
from fastskel.nn.init import Init
from fastskel.registry import Registry
from fastskel.train.stage import Optimizer, Precision, Schedule, Stage

__all__ = ["LINEAR_RATES", "RECIPES", "USDRLRecipe"]

Encoder = Literal["dste", "sttr"]


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
        init: Start of Linear layers, from N(0, 0.02) or as torch does.
        weighting: Loss weighting of the AAAI or the journal code.
        consistency: Between views of one stream, or between joints, bones, motion and all three fused in one encoder.
        stream: Joint positions, bones, or motion.
        bone_variant: Named bone list of the skeleton; by default its first.
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
        precision: Compute type of encoder and projectors; losses are at least fp32. fp8 is bf16 with products of 8 bits in
            the layers.
        synchronise_norms: BatchNorm of the projectors over all processes instead of over each.
        seed: Key of every random draw.
        num_threads: Loader threads; batches do not depend on it.
        checkpoint_steps: Steps between checkpoints, 0 for one per epoch.
        keep_checkpoints: Newest checkpoints that are kept.
        log_steps: Steps between log records.
    """

    encoder: Encoder = "dste"
    width: int = 1024
    num_heads: int = 1
    num_layers: int = 2
    frames: int = 64
    gap: int = 4
    alpha: float = 0.5
    drop_path: float = 0.1
    init: Init = "usdrl"
    weighting: Literal["aaai", "journal"] = "aaai"
    consistency: Literal["multi-view", "multi-modal"] = "multi-view"
    stream: Literal["joint", "bone", "motion"] = "joint"
    bone_variant: str | None = None
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
        """Return the single stage for a data set of clips (T, M, V, C).

        Raises:
            ValueError: If several modalities are asked for with a stream or a number of views that they do not have.
        """
        multimodal = self.consistency == "multi-modal"
        if multimodal and (self.stream, self.num_views) != ("joint", 4):
            raise ValueError(
                "USDRLRecipe: multi-modal consistency must have 4 views of the stream joint, from which bones and motion are "
                f"derived, got {self.num_views} of {self.stream}. Leave both as they are."
            )
        _, bodies, joints, channels = dataset.frames.shape
        options = dict(
            num_joints=joints, num_bodies=bodies, num_frames=self.frames, num_channels=channels,
            width=self.width, num_heads=self.num_heads, num_layers=self.num_layers,
        )  # fmt: skip
        if self.encoder == "dste":
            options |= dict(gap=self.gap, alpha=self.alpha, drop_path=self.drop_path)
        if multimodal:
            options["bone_variant"] = self.bone_variant
        # what is not named is the default: runs of versions that could not name it go on
        init = {} if self.init == "usdrl" else {"init": self.init}
        views = usdrl_views(
            self.frames, self.stream, self.num_views, self.normalise, self.crop_min_frames,
            low=self.crop_low, fraction=self.corruption, amplitude=self.shear, bone_variant=self.bone_variant,
        )  # fmt: skip
        suffix = "-multimodal" if multimodal else ""
        stage = Stage(
            encoder=f"usdrl-{self.encoder}{suffix}", encoder_options=options | init,
            objective=f"mgfd{suffix}", objective_options={"weighting": self.weighting} | init,
            views=views, eval_view=eval_view(self.frames, self.stream, self.normalise, bone_variant=self.bone_variant),
            epochs=self.epochs, batch_size=self.batch_size, chunk=self.chunk, optimizer=self.optimizer, lr=self.scaled_lr(),
            weight_decay=self.weight_decay, decay_matrices_only=self.decay_matrices_only, clip_norm=self.clip_norm,
            schedule=self.schedule, milestones=self.milestones, lr_final=self.lr_final, warmup_steps=self.warmup_steps,
            average=self.average, precision=self.precision, seed=self.seed, synchronise_norms=self.synchronise_norms,
            num_threads=self.num_threads, checkpoint_steps=self.checkpoint_steps, keep_checkpoints=self.keep_checkpoints,
            log_steps=self.log_steps,
        )  # fmt: skip
        return (stage,)


RECIPES: Registry[Callable[[], USDRLRecipe]] = Registry("recipe")

# step size of linear evaluation on joints in the published scripts, of either encoder where both have one
LINEAR_RATES: Mapping[str, float] = {
    "ntu60-xsub": 0.006,
    "ntu60-xview": 0.03,
    "ntu120-xsub": 0.006,
    "ntu120-xset": 0.006,
    "pku2-xsub": 0.01,
}
# the journal code corrupts 15 joints of any skeleton, and has bones of its own for 17 joints
_17_JOINTS: Mapping[str, Any] = {"corruption": 15 / 17, "bone_variant": "usdrl"}


def _published(encoder: Encoder) -> Iterator[tuple[str, str, USDRLRecipe]]:
    """Yield name, help and settings of what the published codes train with an encoder; a setting's protocol is an option."""
    ntu = "on NTU-60 (xsub, xview) or NTU-120 (xsub, xset)"
    aaai = USDRLRecipe(encoder=encoder)
    journal = replace(aaai, weighting="journal", lr=1e-4, init="torch" if encoder == "sttr" else "usdrl")
    yield "", f"{ntu} as the AAAI code trains it; before detection on PKU-MMD I too.", aaai
    yield "-journal", f"{ntu} as the journal code trains it.", journal
    longer = replace(aaai, batch_size=512, base_batch_size=512, epochs=1201, milestones=(801,))
    yield "-pku", "on PKU-MMD II (xsub) as the AAAI code trains it.", longer
    flat = replace(journal, batch_size=384, base_batch_size=384, **_17_JOINTS)
    yield "-2d", "on NTU-60 or NTU-120 in 2-D (17 joints) as the journal code trains it.", flat
    yield "-uav", "on UAV-Human (v1, v2; 17 joints), constants of the journal code.", replace(journal, **_17_JOINTS)
    yield "-multimodal", f"{ntu}, joints, bones and motion in one.", replace(journal, consistency="multi-modal")


def _register(name: str, about: str, recipe: USDRLRecipe) -> None:
    def make() -> USDRLRecipe:
        return recipe

    make.__doc__ = about
    RECIPES.add(name, make)


for _encoder in get_args(Encoder):
    for _ending, _about, _recipe in _published(_encoder):
        _register(f"usdrl-{_encoder}{_ending}", f"{_encoder.upper()} {_about}", _recipe)


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
