"""The objective contract: what a pretraining method owns, embeds and minimises."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastskel.data.batch import Batch
from fastskel.data.views import ViewSpec
from fastskel.models.encoder import Encoder
from fastskel.registry import Registry

__all__ = ["OBJECTIVES", "Objective", "Terms"]


@dataclass(frozen=True)
class Terms:
    """A loss and what it is made of.

    Attributes:
        total: What to minimise, ().
        terms: Every part by name, () each, unweighted and detached.
    """

    total: Tensor
    terms: Mapping[str, Tensor]


class Objective(nn.Module, abc.ABC):
    """A pretraining method; owns heads, decoders, queues: all of it is saved with the checkpoint.

    Attributes:
        views: How each view of a sample is made; a batch has one (N, T, M, V, C) view for each.
        needs_whole_batch: Whether `loss` couples the samples of a batch, so that it must see all embeddings at once; else it is
            a mean over samples.
    """

    views: tuple[ViewSpec, ...]
    needs_whole_batch: bool = True

    @abc.abstractmethod
    def embed(self, encoder: Encoder, batch: Batch) -> dict[str, Tensor]:
        """Embed all views of a batch, or of a chunk of one: tensors with leading (W, N).

        The same again for the same batch and parameters: draws are addressed, and buffers that it changes are not read.
        """

    @abc.abstractmethod
    def loss(self, embeddings: dict[str, Tensor], batch: Batch, progress: float) -> Terms:
        """Score embeddings with leading (W, N); `progress` runs from 0 to 1 over the training.

        A batch that was embedded in chunks has no views here, where the objective needs the whole batch.
        """

    def epoch_start(self, epoch: int) -> None:
        """Be told that an epoch begins, or that a resumed run goes on inside it."""

    def after_step(self) -> None:
        """Be told that the optimiser has stepped."""

    def param_groups(self, encoder: Encoder) -> Iterable[dict[str, Any]]:
        """Group the trainable parameters for the optimiser; by default all in one group, the encoder's first."""
        parameters = [p for module in (encoder, self) for p in module.parameters() if p.requires_grad]
        return [{"params": parameters}]

    def downstream_encoder(self, encoder: Encoder) -> Encoder:
        """Return the encoder that downstream tasks use."""
        return encoder


OBJECTIVES: Registry[type[Objective]] = Registry("objective")
