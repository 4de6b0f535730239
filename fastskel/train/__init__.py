"""Pretraining: the loop, its checkpoints and its run folder."""

from fastskel.train.checkpoint import Checkpoint, load_encoder, read_checkpoint
from fastskel.train.device import choose_device
from fastskel.train.optimiser import build_optimizer, learning_rate
from fastskel.train.preemption import Preempted
from fastskel.train.pretrain import Monitor, pretrain, start
from fastskel.train.processes import TrainingStopped
from fastskel.train.record import trained_clips
from fastskel.train.stage import Recipe, Stage

__all__ = [
    "Checkpoint",
    "Monitor",
    "Preempted",
    "Recipe",
    "Stage",
    "TrainingStopped",
    "build_optimizer",
    "choose_device",
    "learning_rate",
    "load_encoder",
    "pretrain",
    "read_checkpoint",
    "start",
    "trained_clips",
]
