"""MG-FD as published: covariances and correlations as D x D matrices, in whatever type autocast gives them.

Source: specification of USDRL, section 2. Nothing is upcast and autocast stays on, as in the published training.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cal_xc", "similarity", "total", "v_ac", "xcorr_loss"]

Criterion = Callable[[Tensor, Tensor], Tensor]
XCORR_WEIGHTS = {"aaai": 1e-3, "journal": 0.0}


def _off_diagonal(matrix: Tensor) -> Tensor:
    """Copy what is not on the diagonal of (D, D) to (D * (D - 1),)."""
    size = matrix.shape[0]
    return matrix.flatten()[:-1].view(size - 1, size + 1)[:, 1:].flatten()


def similarity(z: Sequence[Tensor], criterion: Criterion = F.mse_loss) -> Tensor:
    """Pull three views to the fourth and to their own centre, (N, D) each, to ()."""
    first, second, third, anchor = z
    centre = (first + second + third) / 3
    to_anchor = criterion(first, anchor) + criterion(second, anchor) + criterion(third, anchor)
    return to_anchor + criterion(first, centre) + criterion(second, centre) + criterion(third, centre)


def v_ac(x: Tensor) -> Tensor:
    """Variance hinge and energy of the covariances of one view, (N, D) to ()."""
    rows, width = x.shape
    deviation = torch.sqrt(x.var(dim=0) + 1e-4)
    centred = x - x.mean(dim=0)
    covariance = (centred.T @ centred) / (rows - 1)
    return 5 * F.relu(1 - deviation).mean() + _off_diagonal(covariance).pow_(2).sum() / width


def xcorr_loss(z1: Tensor, z2: Tensor) -> Tensor:
    """Cross-correlation of two views against the identity, (N, D) each, to ()."""
    rows = z1.shape[0]
    z1 = (z1 - z1.mean(dim=0)) / z1.std(dim=0)
    z2 = (z2 - z2.mean(dim=0)) / z2.std(dim=0)
    c = (z1.T @ z2) / rows
    # in place, as published: the off-diagonal part is a copy and does not see it
    on_diagonal = torch.diagonal(c).add_(-1).pow_(2).sum()
    return on_diagonal + 0.005 * _off_diagonal(c).pow_(2).sum()


def cal_xc(z: Sequence[Tensor]) -> Tensor:
    """Sum `xcorr_loss` over the six pairs of four views, (N, D) each, to ()."""
    first, *rest = (xcorr_loss(a, b) for a, b in itertools.combinations(z, 2))
    return sum(rest, first)


def total(
    z_t: Sequence[Tensor], z_s: Sequence[Tensor], z_i: Sequence[Tensor], weighting: Literal["aaai", "journal"]
) -> Tensor:
    """Combine the terms of the three domains as the AAAI or the journal code does.

    Args:
        z_t: Temporal embeddings of four views, (N, 2D) each; the last view is the anchor.
        z_s: Spatial embeddings, (N, 2D) each.
        z_i: Joint embeddings, (N, 4D) each.
        weighting: "aaai" has the cross-correlation, "journal" leaves it out.
    Returns:
        The loss, ().
    Raises:
        ValueError: On another weighting.
    """
    if weighting not in XCORR_WEIGHTS:
        raise ValueError(f"total: weighting must be one of {sorted(XCORR_WEIGHTS)}, got {weighting!r}. Choose one.")

    def over_domains(term: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
        return term(z_i) + 0.5 * (term(z_t) + term(z_s))

    def variance(z: Sequence[Tensor]) -> Tensor:
        return v_ac(z[0]) + v_ac(z[1]) + v_ac(z[2]) + v_ac(z[3])

    loss = 5 * over_domains(similarity) + over_domains(variance)
    weight = XCORR_WEIGHTS[weighting]
    return loss + weight * over_domains(cal_xc) if weight else loss
