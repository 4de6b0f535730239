"""The reference's `model.loss`: `similarity`, `v_ac`, `xcorr_loss`, `cal_xc`, always computed in fp32 or wider."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastskel.objectives import functional

__all__ = ["cal_xc", "similarity", "v_ac", "xcorr_loss"]

NUM_VIEWS = 4


def _four(function: str, z_list: Sequence[Tensor]) -> Sequence[Tensor]:
    if len(z_list) != NUM_VIEWS:
        raise ValueError(
            f"{function}: z_list must have {NUM_VIEWS} views, got {len(z_list)}. Pass z_t, z_s or z_i whole."
        )
    return z_list


def similarity(z_list: Sequence[Tensor], criterion: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Pull four views, (N, D) each, together by a criterion; returns ()."""
    return functional.similarity(torch.stack(list(_four("similarity", z_list))), criterion)


def v_ac(x: Tensor) -> Tensor:
    """Variance hinge and covariance energy of one view, (N, D) to ()."""
    return functional.variance_covariance(x)


def xcorr_loss(z1: Tensor, z2: Tensor) -> Tensor:
    """Cross-correlation of two views against the identity, (N, D) each, to ()."""
    return functional.cross_correlation(z1, z2)


def cal_xc(z_list: Sequence[Tensor]) -> Tensor:
    """Sum `xcorr_loss` over the six pairs of four views, (N, D) each, to ()."""
    pairs = itertools.combinations(_four("cal_xc", z_list), 2)
    return torch.stack([functional.cross_correlation(a, b) for a, b in pairs]).sum()
