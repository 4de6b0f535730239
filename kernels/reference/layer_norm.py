"""Layer normalisation behind a residual addition, over samples of which some are skipped, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Term", "TermGrad", "layer_norm_backward", "layer_norm_forward"]


class Term(NamedTuple):
    """Rows to be normalised: r = base + scale * factor * branch.

    A compact tensor (n, S, D) holds some of the samples only; its slots (N,), int32, say at which place a sample lies, -1 for
    one that is left out, None for all in their order.

    Attributes:
        base: Residual stream, (N, S, D).
        out: Compact; receives the normalised rows.
        out_slots: Its slots.
        branch: Compact; what is added to the residual stream, or None. It adds nothing to a sample that it leaves out.
        branch_slots: Its slots.
        scale: Multiplies the branch.
        factor: Multiplies each sample's branch too, (N,), fp32, or None.
        weight: Of the affine part, (D,), or None.
        bias: Likewise.
        relu: Whether what is written to `out` is rectified.
    """

    base: Tensor
    out: Tensor
    out_slots: Tensor | None = None
    branch: Tensor | None = None
    branch_slots: Tensor | None = None
    scale: float = 1.0
    factor: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    relu: bool = False


class TermGrad(NamedTuple):
    """Gradient of a `Term`: that of r is dr = rstd (g - mean(g) - xhat mean(g xhat)), g = grad * weight.

    Attributes:
        grad: Gradient of the normalised rows, compact.
        rstd: 1 / deviation, (n, S), fp32.
        into: Receives carry_scale * carry + dr, (N, S, D); dr is zero where `out_slots` leaves a sample out. It may be `carry`.
            Two terms may name the same: it receives both dr.
        out_slots: Slots of `grad`, `rstd`, `xhat` and `mean`.
        xhat: Normalised rows before the affine part, compact; None to make them again from the next two and the branch.
        mean: Means, (n, S), fp32.
        base: As in the term.
        branch: Likewise; read to make the rows again, and for `relu_mask`.
        branch_slots: Slots of `branch` and `d_branch`.
        scale: As in the term.
        factor: Likewise.
        weight: Likewise; with one, the gradients of weight and bias are returned.
        bias: Likewise; read where `relu` is set only.
        relu: As in the term; `grad` is that of the rectified rows, which are made again and need a weight.
        carry: Gradient of r from elsewhere, (N, S, D), or None.
        carry_scale: Multiplies it.
        d_branch: Compact; receives scale * factor * dr, or None.
        branch_sees_carry: The branch's gradient is scale * factor * (carry_scale * carry + dr) instead.
        relu_mask: The branch was made by a ReLU, and its gradient is the one in front of it.
    """

    grad: Tensor
    rstd: Tensor
    into: Tensor
    out_slots: Tensor | None = None
    xhat: Tensor | None = None
    mean: Tensor | None = None
    base: Tensor | None = None
    branch: Tensor | None = None
    branch_slots: Tensor | None = None
    scale: float = 1.0
    factor: Tensor | None = None
    weight: Tensor | None = None
    carry: Tensor | None = None
    carry_scale: float = 1.0
    d_branch: Tensor | None = None
    branch_sees_carry: bool = False
    relu_mask: bool = False
    bias: Tensor | None = None
    relu: bool = False


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _places(slots: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """List the samples of `like` (N, ...) that a compact tensor holds, (n,), and where it holds them, (n,)."""
    if slots is None:
        samples = torch.arange(len(like), device=like.device)
        return samples, samples
    samples = (slots >= 0).nonzero()[:, 0]
    return samples, slots.long()[samples]


def _coefficient(scale: float, factor: Tensor | None, samples: Tensor, dtype: torch.dtype) -> Tensor | float:
    return scale if factor is None else (scale * factor[samples].to(dtype))[:, None, None]


def _residual(term: Term | TermGrad) -> Tensor:
    """Rows r (N, S, D) of a term."""
    assert term.base is not None
    dtype = _wide(term.base)
    rows = term.base.to(dtype)
    if term.branch is None:
        return rows
    samples, places = _places(term.branch_slots, term.base)
    coefficient = _coefficient(term.scale, term.factor, samples, dtype)
    return rows.index_add(0, samples, coefficient * term.branch[places].to(dtype))


def layer_norm_forward(
    terms: Sequence[Term], eps: float, *, total_scale: float | None = None
) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """Normalise the rows of one term or two; written to the `out` of each, rows that no sample names are left alone.

    Autograd differentiates it: with respect to bases, branches, weights and biases.

    Args:
        terms: Of the same (N, S, D).
        eps: Added to variances.
        total_scale: Multiplies the sum of the terms' r.
    Returns:
        Mean and 1 / deviation (n, S) of each term; the sum (N, S, D) in the type of the first base, None without its scale.
    """
    statistics, rows = [], []
    for term in terms:
        r = _residual(term)
        samples, places = _places(term.out_slots, term.base)
        chosen = r[samples]
        mean = chosen.mean(-1, keepdim=True)
        centred = chosen - mean
        # not rsqrt: autocast would choose its type
        rstd = 1.0 / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        value = centred * rstd
        if term.weight is not None:
            value = value * term.weight.to(r.dtype)
        if term.bias is not None:
            value = value + term.bias.to(r.dtype)
        if term.relu:
            value = value.relu()
        term.out.index_copy_(0, places, value.to(term.out.dtype))
        blank = r.new_zeros(term.out.shape[:2])
        statistics.append((blank.index_copy(0, places, mean[..., 0]), blank.index_copy(0, places, rstd[..., 0])))
        rows.append(r)
    total = None if total_scale is None else (total_scale * sum(rows[1:], rows[0])).to(terms[0].base.dtype)
    return statistics, total


def layer_norm_backward(terms: Sequence[TermGrad]) -> list[tuple[Tensor, Tensor] | None]:
    """Differentiate one term or two; writes to what they name.

    Args:
        terms: Of the same (N, S, D).
    Returns:
        Gradients of weight and bias (D,) of each term, None of one without a weight.
    """
    affine: list[tuple[Tensor, Tensor] | None] = []
    written: list[tuple[Tensor, Tensor, Tensor]] = []
    for term in terms:
        dtype = _wide(term.into)
        samples, places = _places(term.out_slots, term.into)
        grad, rstd = term.grad[places].to(dtype), term.rstd[places].to(dtype)[..., None]
        if term.xhat is None:
            assert term.mean is not None
            xhat = (_residual(term)[samples].to(dtype) - term.mean[places].to(dtype)[..., None]) * rstd
        else:
            xhat = term.xhat[places].to(dtype)
        if term.relu:
            assert term.weight is not None
            value = xhat * term.weight.to(dtype) + (0.0 if term.bias is None else term.bias.to(dtype))
            grad = torch.where(value <= 0, 0.0, grad)
        g = grad if term.weight is None else grad * term.weight.to(dtype)
        dr = rstd * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
        d_rows = torch.zeros_like(term.into, dtype=dtype).index_copy(0, samples, dr)
        carried = d_rows if term.carry is None else term.carry_scale * term.carry.to(dtype) + d_rows
        if term.d_branch is not None:
            samples, places = _places(term.branch_slots, term.into)
            seen = (carried if term.branch_sees_carry else d_rows)[samples]
            d_branch = _coefficient(term.scale, term.factor, samples, dtype) * seen
            if term.relu_mask:
                assert term.branch is not None
                d_branch = torch.where(term.branch[places] <= 0, 0.0, d_branch)
            term.d_branch.index_copy_(0, places, d_branch.to(term.d_branch.dtype))
        affine.append(None if term.weight is None else ((grad * xhat).sum((0, 1)), grad.sum((0, 1))))
        written.append((term.into, d_rows, carried))
    # only now: a carry may be what another term writes to
    if len(written) == 2 and written[0][0] is written[1][0]:
        written = [(written[0][0], written[0][1], written[0][2] + written[1][1])]
    for into, _, carried in written:
        into.copy_(carried)
    return affine
