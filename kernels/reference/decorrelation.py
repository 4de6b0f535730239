"""Energies of covariances and cross-correlations of views, from their D x D matrices: the definition."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Energies", "Options", "decorrelation", "pairs_of"]


class Options(NamedTuple):
    """What the energies depend on beside the embeddings (W, N, D).

    Attributes:
        gamma: Deviation below which a feature's hinge is above zero.
        variance_eps: Added to variances in the hinge.
        std_eps: Added to variances where features are standardised; with 0 a constant feature gives NaN: in the energies of its
            view's pairs, in its own gradient and in those of all features of the other views.
        correction: Variances that standardise are sums over N - correction.
        pairs: Whether pairs of views are compared at all.
        covariances: Whether covariances are computed; where not, their energies are 0 and their weights do not count.
    """

    gamma: float = 1.0
    variance_eps: float = 1e-4
    std_eps: float = 0.0
    correction: int = 1
    pairs: bool = True
    covariances: bool = True


class Energies(NamedTuple):
    """Sums over features, for each of W views and each of P = W (W - 1) / 2 pairs of views; also gradients of them.

    Attributes:
        hinge: Mean over features of relu(gamma - sqrt(variance + variance_eps)), (W,), variances over N - 1.
        covariance: Sum of squares of covariances off the diagonal, (W,), over N - 1.
        on_diagonal: Sum of (c_dd - 1)^2, (P,), for the cross-correlation c = u_a' u_b / N of standardised views.
        off_diagonal: Sum of squares of c off the diagonal, (P,).
    """

    hinge: Tensor
    covariance: Tensor
    on_diagonal: Tensor
    off_diagonal: Tensor


def pairs_of(num_views: int) -> list[tuple[int, int]]:
    """List pairs of views in the order of the energies: (0, 1), (0, 2), .. for W views (W, N, D)."""
    return list(itertools.combinations(range(num_views), 2))


def _off_diagonal(matrix: Tensor) -> Tensor:
    eye = torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)
    return matrix.masked_fill(eye, 0.0).square().sum()


DEFAULT = Options()


def decorrelation(z: Tensor, options: Options = DEFAULT) -> Energies:
    """Compute the energies of embeddings (W, N, D), in float32 at least; autograd differentiates it."""
    z = z if z.dtype == torch.float64 else z.float()
    num_views, n, _ = z.shape
    x = z - z.mean(1, keepdim=True)
    variance = x.square().sum(1) / (n - 1)
    hinge = torch.relu(options.gamma - torch.sqrt(variance + options.variance_eps)).mean(1)
    covariance = hinge.new_zeros(num_views)
    if options.covariances:
        covariance = torch.stack([_off_diagonal(view.T @ view / (n - 1)) for view in x])
    on, off = [], []
    if options.pairs:
        u = x / torch.sqrt(x.square().sum(1, keepdim=True) / (n - options.correction) + options.std_eps)
        for a, b in pairs_of(num_views):
            c = u[a].T @ u[b] / n
            on.append((c.diagonal() - 1.0).square().sum())
            off.append(_off_diagonal(c))
    none = z.new_zeros(0)
    return Energies(hinge, covariance, torch.stack(on) if on else none, torch.stack(off) if off else none)
