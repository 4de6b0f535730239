"""Stochastic depth whose draws have addresses."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastskel import philox

__all__ = ["drop_path_scale"]


def drop_path_scale(rate: float, num_calls: int, *, seed: int, step: int, index: Tensor, view: Tensor) -> Tensor:
    """Draw the factor of each residual branch for each sample.

    Args:
        rate: Probability that a branch is dropped, in [0, 1).
        num_calls: Branches drawn for, numbered in the order of the encoder's layers.
        seed: Philox key.
        step: Optimiser step.
        index: Global sample index of each row, (N,), on the host.
        view: View number of each row, (N,), on the host.
    Returns:
        `1 / (1 - rate)` or 0 for each sample and call, (N, num_calls), float32 on the host.
    Raises:
        ValueError: If rate is outside [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"drop_path_scale: rate must be in [0, 1), got {rate}. Choose a smaller rate.")
    drawn = philox.uniform(philox.words(seed, index.numpy(), step, view.numpy(), philox.Use.DROP_PATH, num_calls))
    # floor(keep + u) of the reference is 1 exactly where u >= rate
    return torch.from_numpy((drawn >= np.float32(rate)).astype(np.float32)) / (1.0 - rate)
