"""The reference's `model.DSTE`: `DSTE`, `USDRL`, `Downstream`, with its constructors, forward signatures and keys.

Differences, all of them corrections: spatial tokens follow from `t_input_size` (150 gives 50, 102 gives 34), frames from
`s_input_size`; bones of 17-joint clips use the 17-joint list; detection applies the head; `kernel_size` must be 1.
"""

from __future__ import annotations

from torch import Tensor

from fastskel.compat.usdrl.wrappers import DownstreamModel, PretrainingModel, sizes
from fastskel.models.dste import DSTE as Encoder

__all__ = ["DSTE", "USDRL", "Downstream"]


class DSTE(Encoder):
    """Dense spatio-temporal encoder over prepared tokens, (N, T, M*V*C) and (N, M*V, T*C).

    `num_layer` is accepted and ignored, as in the reference: the encoder always has two layers per stream.
    """

    def __init__(
        self, t_input_size: int, s_input_size: int, hidden_size: int, num_head: int, num_layer: int,
        alpha: float = 0.5, gap: int = 4, kernel_size: int = 1,
    ) -> None:  # fmt: skip
        if kernel_size != 1:
            raise ValueError(
                f"DSTE: kernel_size must be 1, got {kernel_size}. Other sizes never worked in the reference."
            )
        super().__init__(
            **sizes(t_input_size, s_input_size), width=hidden_size, num_heads=num_head, num_layers=2,
            gap=gap, alpha=alpha, init="torch",
        )  # fmt: skip
        self.d_model = hidden_size

    def forward(self, jt: Tensor, js: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Encode tokens (N, T, M*V*C) and (N, M*V, T*C) to (N, T, H) and (N, M*V, H)."""
        return self.streams(jt, js)


class USDRL(PretrainingModel):
    """Backbone and projectors over four views of clips (N, C, T, V, M)."""

    def __init__(
        self, t_input_size: int, s_input_size: int, hidden_size: int, num_head: int, num_layer: int,
        modality: str = "joint", alpha: float = 0.5, gap: int = 4, kernel_size: int = 1,
    ) -> None:  # fmt: skip
        backbone = DSTE(t_input_size, s_input_size, hidden_size, num_head, num_layer, alpha, gap, kernel_size)
        super().__init__(hidden_size, backbone, modality)


class Downstream(DownstreamModel):
    """Backbone and linear head over prepared tokens, (N, T, M*V*C) and (N, M*V, T*C) for each modality."""

    def __init__(
        self, t_input_size: int, s_input_size: int, hidden_size: int, num_head: int, num_layer: int,
        num_class: int = 60, modality: str = "joint", alpha: float = 0.5, gap: int = 4, kernel_size: int = 1,
    ) -> None:  # fmt: skip
        backbone = DSTE(t_input_size, s_input_size, hidden_size, num_head, num_layer, alpha, gap, kernel_size)
        super().__init__(hidden_size, backbone, num_class, modality)
