"""Decorrelation losses as plain functions of embeddings.

Every function computes in fp32 or wider, whatever autocast says: covariances lose their diagonal in half precision. The weights
of a loss are known in advance, so its forward pass makes the gradient too and keeps nothing else for the backward pass; it is
differentiable once, by a backward pass: create_graph=True, forward mode and transforms of torch.func are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from fastskel.kernels.decorrelation import Energies, Options, decorrelate, decorrelation

__all__ = [
    "barlow_twins_loss", "covariance_penalty", "cross_correlation", "mgfd_loss", "similarity", "variance_covariance",
    "vicreg_loss",
]  # fmt: skip

MSE_WEIGHT = 5.0
VARIANCE_WEIGHT = 5.0
OFF_DIAGONAL_WEIGHT = 0.005
# weight of the two single domains beside the joint one
DOMAIN_WEIGHT = 0.5
VARIANCE_EPSILON = 1e-4
# elements of all views that a pass takes at a time on a CPU: a megabyte, which stays in its cache
BLOCK_ELEMENTS = 1 << 18


def _at_least_fp32(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _without_autocast(z: Tensor) -> torch.autocast:
    return torch.autocast(z.device.type, enabled=False)


def _check(function: str, z: Tensor) -> None:
    if z.dim() != 2 or z.shape[0] < 2 or z.shape[1] < 1:
        raise ValueError(
            f"{function}: embeddings must be (N, D) with N at least 2, got {tuple(z.shape)}. "
            "Statistics over the batch need two samples: enlarge the batch or drop the last short one."
        )


def _check_two(function: str, a: Tensor, b: Tensor, names: str) -> None:
    _check(function, a)
    if a.shape != b.shape:
        raise ValueError(
            f"{function}: {names} must agree in shape, got {tuple(a.shape)} and {tuple(b.shape)}. "
            "Pass two views of the same samples."
        )


class Rows(NamedTuple):
    """How what is computed of a process's rows becomes that of the whole batch.

    Attributes:
        number: Rows N of the whole batch.
        decorrelate: Computes its energies, and the gradient by this process's rows, as `fastskel.kernels.decorrelation` does.
        total: Sums a tensor, () each, over the processes.
        world: Processes, each of which differentiates its own copy of a loss.
    """

    number: int
    decorrelate: Callable[[Tensor, Options, Energies | None], tuple[Energies, Tensor | None]]
    total: Callable[[Tensor], Tensor] = lambda value: value
    world: int = 1


def needs_gradient(z: Tensor) -> bool:
    """Say whether the gradient by z (W, n, D) is wanted; refuse transforms for which a known gradient would be none at all."""
    if torch._C._functorch.is_functorch_wrapped_tensor(z) or unpack_dual(z).tangent is not None:  # type: ignore[no-untyped-call]
        raise RuntimeError(
            "a decorrelation loss must be differentiated by a backward pass of plain tensors, got a tensor of torch.func or of "
            "forward mode. Its gradient is kept as numbers."
        )
    return z.requires_grad and torch.is_grad_enabled()


def _saved_as_it_is() -> bool:
    """Say whether no hook takes what is saved now: what a hook returns may belong to somebody else."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is None


def _may_overwrite(upstream: Tensor) -> bool:
    """Say whether the graph that is being differentiated is dropped afterwards, as is usual, and not for a batch of gradients."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    batched = torch._C._functorch.is_batchedtensor(upstream) or torch._C._functorch.is_legacy_batchedtensor(upstream)
    return kept is not None and not kept() and not batched


class _Known(torch.autograd.Function):
    """A value () of z (W, N, D) with the gradient that was computed along with it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, value: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        ctx.dtype, ctx.owned = z.dtype, _saved_as_it_is()
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a decorrelation loss must be differentiated once, got create_graph=True. Its gradient is kept as numbers."
            )
        (grad,) = ctx.saved_tensors
        grad = grad.mul_(upstream) if ctx.owned and _may_overwrite(upstream) else grad * upstream
        return grad.to(ctx.dtype), None, None


def attach(z: Tensor, value: Tensor, grad: Tensor | None) -> Tensor:
    """Make value () a function of z (W, n, D) whose gradient is known; None is no gradient. The gradient is given away."""
    return value if grad is None else _Known.apply(z, value, grad)  # type: ignore[no-untyped-call]


def pull(z: Tensor, weight: float, grad: Tensor | None, rows: Rows) -> Tensor:
    """Return `similarity` of z (W, n, D) as the mean over all rows, (), and add its gradient times a weight to `grad`.

    With the centre c of the others and the anchor a, sum_i |z_i - a|^2 = sum_i |z_i - c|^2 + (W - 1) |c - a|^2.
    """
    num_views, num_rows, width = z.shape
    step = max(1, BLOCK_ELEMENTS // (num_views * width) if z.device.type == "cpu" else num_rows)
    count = rows.number * width
    factor = 2.0 * weight / count
    parts = []
    # once for no row too
    for start in range(0, max(1, num_rows), step):
        block = _at_least_fp32(z[:, start : start + step])
        centre = block[:-1].mean(0)
        spread, away = block[:-1] - centre, centre - block[-1]
        if grad is not None and weight:
            others, anchor = grad[:-1, start : start + step], grad[-1, start : start + step]
            others.add_(spread, alpha=2.0 * factor).add_(away, alpha=factor)
            anchor.sub_(away, alpha=(num_views - 1) * factor)
        far, near = (part.square_().sum(dtype=torch.float64) for part in (away, spread))
        parts.append(2.0 * near + (num_views - 1) * far)
    value = rows.total(torch.stack(parts).sum() / count)
    return value.to(centre.dtype)


def _evaluate(
    z: Tensor, options: Options, *, hinge: float = 0.0, covariance: float = 0.0, on: float = 0.0, off: float = 0.0,
    near: float | None = None, rows: Rows | None = None,
) -> tuple[Tensor, Energies, Tensor]:  # fmt: skip
    """Weigh the energies of z (W, n, D), each weight for all views or pairs, and its similarity, None where it is not computed.

    Returns the sum, (), differentiable; and the energies and the similarity, detached.
    """
    weights, wide = (hinge, covariance, on, off), torch.promote_types(z.dtype, torch.float32)
    nothing = z.new_zeros((), dtype=wide)

    def total_of(energies: Energies, distance: Tensor) -> Tensor:
        terms = [weight * energy.sum() for weight, energy in zip(weights, energies, strict=True) if weight]
        return torch.stack([*terms, near * distance if near else nothing]).sum()

    if torch.compiler.is_compiling() and rows is None:
        # a compiler differentiates operators and plain torch best: the energies are computed again in the backward pass
        energies = decorrelation(z, options)
        distance = nothing if near is None else similarity(z)
        return total_of(energies, distance), Energies(*(energy.detach() for energy in energies)), distance.detach()
    rows = rows or Rows(z.shape[1], decorrelate)
    needed = needs_gradient(z)
    with torch.no_grad(), _without_autocast(z):
        sizes = len(z), len(z), *(2 * [len(z) * (len(z) - 1) // 2 if options.pairs else 0])
        filled = (z.new_full((size,), rows.world * weight, dtype=wide) for size, weight in zip(sizes, weights, strict=True))
        energies, grad = rows.decorrelate(z, options, Energies(*filled) if needed else None)
        distance = nothing if near is None else pull(z, rows.world * near, grad, rows)
        total = total_of(energies, distance)
    return attach(z, total, grad), energies, distance


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
    options = Options(variance_eps=VARIANCE_EPSILON, pairs=False)
    return _evaluate(z[None], options, hinge=VARIANCE_WEIGHT, covariance=1.0 / z.shape[1])[0]


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
    _check_two("cross_correlation", a, b, "a and b")
    return _evaluate(torch.stack((a, b)), Options(covariances=False), on=1.0, off=OFF_DIAGONAL_WEIGHT)[0]


def weigh_domains(
    z_t: Tensor, z_s: Tensor, z_i: Tensor, xcorr_weight: float, rows: Rows | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute what `mgfd_loss` says of checked stacks (W, n, D), which may be a process's rows of a batch; all are () each."""
    options = Options(variance_eps=VARIANCE_EPSILON, pairs=bool(xcorr_weight))
    totals: list[Tensor] = []
    parts: dict[str, Tensor] = {}
    # the widest first: what a pass needs beside its gradient comes on top of the gradients that are there
    for domain, z, share in (("i", z_i, 1.0), ("t", z_t, DOMAIN_WEIGHT), ("s", z_s, DOMAIN_WEIGHT)):
        width = z.shape[2]
        total, energies, distance = _evaluate(
            z, options, hinge=share * VARIANCE_WEIGHT, covariance=share / width, on=share * xcorr_weight,
            off=share * xcorr_weight * OFF_DIAGONAL_WEIGHT, near=share * MSE_WEIGHT, rows=rows,
        )  # fmt: skip
        totals.append(total)
        parts[f"sim_{domain}"] = distance
        parts[f"vac_{domain}"] = (VARIANCE_WEIGHT * energies.hinge + energies.covariance / width).sum()
        if xcorr_weight:
            parts[f"xcorr_{domain}"] = (energies.on_diagonal + OFF_DIAGONAL_WEIGHT * energies.off_diagonal).sum()
    ordered = [f"{term}_{domain}" for domain in "tsi" for term in ("sim", "vac", "xcorr")]
    return torch.stack(totals).sum(), {name: parts[name] for name in ordered if name in parts}


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
    if {z_t.dim(), z_s.dim(), z_i.dim()} != {3} or not z_t.shape[:2] == z_s.shape[:2] == z_i.shape[:2] or len(z_t) < 2:
        raise ValueError(
            "mgfd_loss: z_t, z_s and z_i must be (W, N, D) with equal W >= 2 and equal N, got "
            f"{tuple(z_t.shape)}, {tuple(z_s.shape)} and {tuple(z_i.shape)}. Stack the same views of the same samples."
        )
    for z in (z_t, z_s, z_i):
        _check("mgfd_loss", z[0])
    return weigh_domains(z_t, z_s, z_i, xcorr_weight)


def vicreg_loss(
    z_a: Tensor, z_b: Tensor, *, invariance_weight: float = 25.0, variance_weight: float = 25.0,
    covariance_weight: float = 1.0, eps: float = 1e-4,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Variance, invariance and covariance regularisation of two views.

    `25 * mean (z_a - z_b)^2 + 25 * v + c` with v the mean over both views and all features of `relu(1 - sqrt(var + eps))`
    and c the sum over both views of `sum_{i != j} cov_ij^2 / D`; variance and covariance over N - 1.

    Args:
        z_a: Embeddings of one view, (N, D).
        z_b: Embeddings of another, (N, D).
        invariance_weight: Weight of the mean squared error.
        variance_weight: Weight of v.
        covariance_weight: Weight of c.
        eps: Added to the variances.
    Returns:
        The loss, (), and its unweighted detached parts `{"invariance", "variance", "covariance"}`, () each.
    Raises:
        ValueError: If z_a and z_b are not (N, D) of one shape with at least two samples.
    Source: Bardes, Ponce, LeCun, "VICReg", ICLR 2022; the mean over views as in the authors' code.
    """
    _check_two("vicreg_loss", z_a, z_b, "z_a and z_b")
    width = z_a.shape[1]
    total, energies, distance = _evaluate(
        torch.stack((z_a, z_b)), Options(variance_eps=eps, pairs=False), hinge=variance_weight / 2,
        covariance=covariance_weight / width, near=invariance_weight,
    )  # fmt: skip
    parts = {"invariance": distance, "variance": energies.hinge.mean(), "covariance": energies.covariance.sum() / width}
    return total, parts


def barlow_twins_loss(
    z_a: Tensor, z_b: Tensor, *, off_diagonal_weight: float = 0.0051, eps: float = 1e-5
) -> tuple[Tensor, dict[str, Tensor]]:
    """Redundancy reduction between two views.

    `sum_i (c_ii - 1)^2 + 0.0051 sum_{i != j} c_ij^2` with `c = normalise(z_a)^T normalise(z_b) / N`, features normalised as
    BatchNorm without affine does in training: by the variance over N, to which eps is added.

    Args:
        z_a: Embeddings of one view, (N, D).
        z_b: Embeddings of another, (N, D).
        off_diagonal_weight: Weight of the second sum.
        eps: Added to the variances.
    Returns:
        The loss, (), and its unweighted detached parts `{"on_diagonal", "off_diagonal"}`, () each.
    Raises:
        ValueError: If z_a and z_b are not (N, D) of one shape with at least two samples.
    Source: Zbontar et al., "Barlow Twins", ICML 2021, and the authors' code.
    """
    _check_two("barlow_twins_loss", z_a, z_b, "z_a and z_b")
    options = Options(std_eps=eps, correction=0, covariances=False)
    total, energies, _ = _evaluate(torch.stack((z_a, z_b)), options, on=1.0, off=off_diagonal_weight)
    return total, {"on_diagonal": energies.on_diagonal.sum(), "off_diagonal": energies.off_diagonal.sum()}


def covariance_penalty(z: Tensor) -> Tensor:
    """Penalise linear dependence of features.

    `sum_{i != j} cov_ij^2 / D`, covariances over N - 1; the mean over views.

    Args:
        z: Embeddings, (N, D), or of views, (W, N, D).
    Returns:
        The loss, ().
    Raises:
        ValueError: If z is neither, or has fewer than two samples.
    Source: c(Z) of Bardes, Ponce, LeCun, "VICReg", ICLR 2022.
    """
    views = z[None] if z.dim() == 2 else z
    if views.dim() != 3 or len(views) < 1:
        raise ValueError(
            f"covariance_penalty: z must be (N, D) or (W, N, D), got {tuple(z.shape)}. Flatten or stack the embeddings."
        )
    _check("covariance_penalty", views[0])
    return _evaluate(views, Options(pairs=False), covariance=1.0 / (len(views) * views.shape[2]))[0]
