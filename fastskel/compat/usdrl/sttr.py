"""The reference's `model.STTR`: `STTR`, `USDRL`, `Downstream`, with its constructors, forward signatures and keys.

Differences, all of them corrections: spatial tokens follow from `t_input_size`, frames from `s_input_size`; bones of
17-joint clips use the 17-joint list; nothing is printed. The AAAI code's initialisation is the default.
"""

from __future__ import annotations

from torch import Tensor

from fastskel.compat.usdrl.wrappers import DownstreamModel, PretrainingModel, sizes
from fastskel.models.sttr import STTR as Encoder

__all__ = ["STTR", "USDRL", "Downstream"]


class STTR(Encoder):
    """Spatio-temporal transformer over prepared tokens, (N, T, M*V*C) and (N, M*V, T*C)."""

    def __init__(self, t_input_size: int, s_input_size: int, hidden_size: int, num_head: int, num_layer: int) -> None:
        super().__init__(
            **sizes(t_input_size, s_input_size),
            width=hidden_size,
            num_heads=num_head,
            num_layers=num_layer,
            init="torch",
        )
        self.d_model = hidden_size

    def forward(self, jt: Tensor, js: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Encode tokens (N, T, M*V*C) and (N, M*V, T*C) to (N, T, H) and (N, M*V, H)."""
        return self.streams(jt, js)


class USDRL(PretrainingModel):
    """Backbone and projectors over four views of clips (N, C, T, V, M); alpha, kernel_size and gap are not used."""

    def __init__(
        self, t_input_size: int, s_input_size: int, hidden_size: int, num_head: int, num_layer: int,
        modality: str = "joint", alpha: float = 0.5, kernel_size: int = 1, gap: int = 4,
    ) -> None:  # fmt: skip
        backbone = STTR(t_input_size, s_input_size, hidden_size, num_head, num_layer)
        super().__init__(hidden_size, backbone, modality)


class Downstream(DownstreamModel):
    """Backbone and linear head over prepared tokens, (N, T, M*V*C) and (N, M*V, T*C) for each modality."""

    def __init__(
        self, t_input_size: int, s_input_size: int, hidden_size: int, num_head: int, num_layer: int,
        num_class: int = 60, modality: str = "joint", alpha: float = 0.5, gap: int = 4, kernel_size: int = 1,
    ) -> None:  # fmt: skip
        backbone = STTR(t_input_size, s_input_size, hidden_size, num_head, num_layer)
        super().__init__(hidden_size, backbone, num_class, modality)
