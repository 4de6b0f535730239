"""Two-layer perceptron of the transformer blocks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MLP"]


class MLP(nn.Module):
    """`fc2(gelu(fc1(x)))` with the exact (erf) GELU, (N, S, D) to (N, S, D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform tokens (N, S, D)."""
        return self.fc2(F.gelu(self.fc1(tokens)))  # type: ignore[no-any-return]
