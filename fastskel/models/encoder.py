"""The encoder contract: what every skeleton encoder takes and returns."""

from __future__ import annotations

import abc
import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from fastskel.data.batch import View
from fastskel.registry import Registry
from fastskel.skeleton import STREAMS

__all__ = ["ENCODERS", "MODES", "Encoder", "Features"]

# of an encoder of several modalities: each alone, and all in one
MODES = (*STREAMS, "fused")


@dataclass(frozen=True)
class Features:
    """What an encoder says of a view; a task names what it needs of it.

    Attributes:
        pooled: One vector per sample, (N, F).
        temporal: Per-frame features, (N, T', D), where the encoder has them.
        spatial: Per-joint features, (N, S, D), where the encoder has them.
        tokens: Per-body, per-frame, per-joint features, (N, M, T', V', D), where the encoder has them.
        temporal_pooled: Maxima of `temporal`, (N, D), where the encoder has them already; who replaces one replaces both.
        spatial_pooled: Maxima of `spatial`, (N, D), likewise.
        aux: Anything else, by name.
    """

    pooled: Tensor
    temporal: Tensor | None = None
    spatial: Tensor | None = None
    tokens: Tensor | None = None
    temporal_pooled: Tensor | None = None
    spatial_pooled: Tensor | None = None
    aux: dict[str, Any] = field(default_factory=dict)

    def need(self, name: str, task: str) -> Tensor:
        """Return the named feature, (N, ...) as its attribute says.

        Raises:
            ValueError: If the encoder does not provide it.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"{task}: the encoder must provide {name!r} features, got none. Choose another encoder.")
        return value  # type: ignore[no-any-return]


class Encoder(nn.Module, abc.ABC):
    """Base of all encoders.

    Attributes:
        num_features: The F of `Features.pooled`, (N, F).
        num_token_features: The D of `temporal`, `spatial` and `tokens`, (..., D).
        config: Constructor arguments, so that a checkpoint can rebuild the encoder.
        shape: Longest clip that it takes, (T, M, V, C); None where it takes any.
    """

    num_features: int
    num_token_features: int
    config: dict[str, Any]
    shape: tuple[int, int, int, int] | None = None

    @abc.abstractmethod
    def forward(self, view: View, *, token_mask: Tensor | None = None, mode: str | None = None) -> Features:
        """Encode one view.

        Args:
            view: Clips (N, T, M, V, C) with their mask and topology.
            token_mask: Tokens to hide, for encoders that mask inside.
            mode: Named variant of the forward pass, for encoders that have several.
        Returns:
            Features, `pooled` (N, F) always.
        Raises:
            ValueError: On shapes, masks or modes that the encoder does not support.
        """

    def model_flops(self, frames: int, *, backward: bool = False) -> int | None:
        """Count the operations of the matrix products that the model's definition has for one view (1, T, M, V, C).

        A multiplication and its addition are two. What an implementation saves, or computes twice, does not count.

        Args:
            frames: T.
            backward: Count the gradients of parameters too.
        Returns:
            Operations; None, as here, where an encoder does not say.
        """
        return None

    def depth_groups(self) -> list[list[nn.Parameter]]:
        """List the parameters by depth, those next to the clips (N, T, M, V, C) first; each is in one group.

        Fine-tuning gives shallow ones smaller steps. Encoders of several layers override this; here all are of one depth.
        """
        return [list(self.parameters())]

    def optimize_for_inference(self, dtype: torch.dtype | None = None) -> Self:
        """Copy the encoder of views (N, T, M, V, C) for inference: in evaluation mode, without gradients.

        Encoders that can prepare their weights override this; here nothing is prepared.

        Raises:
            ValueError: If another type than the encoder's own is asked for.
        """
        own = next((p.dtype for p in self.parameters()), None)
        if dtype not in (None, own):
            raise ValueError(
                f"optimize_for_inference: dtype must be None or {own} for {type(self).__name__}, got {dtype}. Use autocast."
            )
        return copy.deepcopy(self).eval().requires_grad_(False)


ENCODERS: Registry[type[Encoder]] = Registry("encoder")
