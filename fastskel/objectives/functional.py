"""Decorrelation losses as plain functions of embeddings.

Every function computes in fp32 or wider, whatever autocast says: covariances lose their diagonal in half precision.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["cross_correlation", "mgfd_loss", "similarity", "variance_covariance"]

MSE_WEIGHT = 5.0
VARIANCE_WEIGHT = 5.0
OFF_DIAGONAL_WEIGHT = 0.005
# weight of the two single domains beside the joint one
DOMAIN_WEIGHT = 0.5
VARIANCE_EPSILON = 1e-4


def _at_least_fp32(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _without_autocast(z: Tensor) -> torch.autocast:
    return torch.autocast(z.device.type, enabled=False)


def _off_diagonal_energy(matrix: Tensor) -> Tensor:
    eye = torch.eye(matrix.shape[-1], dtype=torch.bool, device=matrix.device)
    return matrix.masked_fill(eye, 0.0).square().sum()


def _check(function: str, z: Tensor) -> None:
    if z.dim() != 2 or z.shape[0] < 2 or z.shape[1] < 1:
        raise ValueError(
            f"{function}: embeddings must be (N, D) with N at least 2, got {tuple(z.shape)}. "
            "Statistics over the batch need two samples: enlarge the batch or drop the last short one."
        )


def similarity(z: Tensor, criterion: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """Pull every view to the anchor (the last view) and to the mean of the others.

    Args:
        z: Embeddings of W views, (W, N, D).
        criterion: Distance of two (N, D) tensors; None is the mean squared error.
    Returns:
        Sum of the 2 * (W - 1) distances, ().
    Raises:
        ValueError: If z is not (W, N, D) with at least two views.
    Source: `similarity` of USDRL; the anchor is never part of the centre.
    """
    if z.dim() != 3 or z.shape[0] < 2:
        raise ValueError(
            f"similarity: z must be (W, N, D) with W at least 2, got {tuple(z.shape)}. Stack the views of the samples."
        )
    with _without_autocast(z):
        z = _at_least_fp32(z)
        distance = criterion or torch.nn.functional.mse_loss
        others, anchor = z[:-1], z[-1]
        centre = others.mean(0)
        to_anchor = torch.stack([distance(view, anchor) for view in others]).sum()
        return to_anchor + torch.stack([distance(view, centre) for view in others]).sum()


def variance_covariance(z: Tensor) -> Tensor:
    """Hinge on each feature's deviation, and the energy of the features' covariances.

    `5 * mean_d relu(1 - sqrt(var_d + 1e-4)) + sum_{i != j} cov_ij^2 / D`, variance and covariance over N - 1.

    Args:
        z: Embeddings, (N, D).
    Returns:
        The loss, ().
    Raises:
        ValueError: If z is not (N, D) with at least two samples.
    Source: `v_ac` of USDRL, after VICReg.
    """
    _check("variance_covariance", z)
    with _without_autocast(z):
        z = _at_least_fp32(z)
        rows, width = z.shape
        deviation = torch.sqrt(z.var(0) + VARIANCE_EPSILON)
        centred = z - z.mean(0)
        covariance = centred.T @ centred / (rows - 1)
        return VARIANCE_WEIGHT * torch.relu(1.0 - deviation).mean() + _off_diagonal_energy(covariance) / width


def cross_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Drive the cross-correlation of two views to the identity.

    `sum_i (c_ii - 1)^2 + 0.005 sum_{i != j} c_ij^2` with `c = standardise(a)^T standardise(b) / N`; the deviation is
    over N - 1 and has no epsilon, so a constant feature gives NaN.

    Args:
        a: Embeddings of one view, (N, D).
        b: Embeddings of another, (N, D).
    Returns:
        The loss, ().
    Raises:
        ValueError: If a and b are not (N, D) of one shape with at least two samples.
    Source: `xcorr_loss` of USDRL, after Barlow Twins.
    """
    _check("cross_correlation", a)
    if a.shape != b.shape:
        raise ValueError(
            f"cross_correlation: a and b must agree in shape, got {tuple(a.shape)} and {tuple(b.shape)}. "
            "Pass two views of the same samples."
        )
    with _without_autocast(a):
        a, b = _at_least_fp32(a), _at_least_fp32(b)
        c = ((a - a.mean(0)) / a.std(0)).T @ ((b - b.mean(0)) / b.std(0)) / a.shape[0]
        return (c.diagonal() - 1.0).square().sum() + OFF_DIAGONAL_WEIGHT * _off_diagonal_energy(c)


def mgfd_loss(z_t: Tensor, z_s: Tensor, z_i: Tensor, *, xcorr_weight: float = 1e-3) -> tuple[Tensor, dict[str, Tensor]]:
    """Multi-grained feature decorrelation over the temporal, spatial and instance domain.

    `5 * sim + vac + xcorr_weight * xcorr`, each summed over the domains as `X_i + (X_t + X_s) / 2`, over the views
    (`vac`) and over all pairs of views (`xcorr`).

    Args:
        z_t: Temporal embeddings, (W, N, D_t); the last view is the anchor.
        z_s: Spatial embeddings, (W, N, D_s).
        z_i: Instance embeddings, (W, N, D_i).
        xcorr_weight: 1e-3 as in the AAAI code; 0 as in the journal code, where the term is neither computed nor named.
    Returns:
        The loss, (), and its unweighted detached parts `{"sim_t", "vac_t", "xcorr_t", "sim_s", ...}`, () each.
    Raises:
        ValueError: If the stacks are not (W, N, D) of equal W and N, with W and N at least 2.
    """
    if not z_t.shape[:2] == z_s.shape[:2] == z_i.shape[:2] or z_t.shape[0] < 2:
        raise ValueError(
            "mgfd_loss: z_t, z_s and z_i must be (W, N, D) with equal W >= 2 and equal N, got "
            f"{tuple(z_t.shape)}, {tuple(z_s.shape)} and {tuple(z_i.shape)}. Stack the same views of the same samples."
        )
    parts: dict[str, Tensor] = {}
    for domain, z in (("t", z_t), ("s", z_s), ("i", z_i)):
        parts[f"sim_{domain}"] = similarity(z)
        parts[f"vac_{domain}"] = torch.stack([variance_covariance(view) for view in z]).sum()
        if xcorr_weight:
            pairs = itertools.combinations(z, 2)
            parts[f"xcorr_{domain}"] = torch.stack([cross_correlation(a, b) for a, b in pairs]).sum()

    def over_domains(term: str) -> Tensor:
        return parts[f"{term}_i"] + DOMAIN_WEIGHT * (parts[f"{term}_t"] + parts[f"{term}_s"])

    total = MSE_WEIGHT * over_domains("sim") + over_domains("vac")
    if xcorr_weight:
        total = total + xcorr_weight * over_domains("xcorr")
    return total, {name: part.detach() for name, part in parts.items()}
