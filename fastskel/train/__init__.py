"""Pretraining: the loop, its checkpoints and its run folder."""

from fastskel.train.checkpoint import Checkpoint, load_encoder, read_checkpoint
from fastskel.train.pretrain import TrainingStopped, pretrain
from fastskel.train.stage import Recipe, Stage

__all__ = ["Checkpoint", "Recipe", "Stage", "TrainingStopped", "load_encoder", "pretrain", "read_checkpoint"]
