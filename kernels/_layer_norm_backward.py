r"""Backward pass of layer normalisation: see `layer_norm`.

    dr = rstd (g - mean(g) - xhat mean(g xhat)),  g = d_out weight,  d_weight = sum d_out xhat,  d_bias = sum d_out,
    into = carry_scale carry + dr,  d_branch = scale factor dr (or of `into`), zero where a ReLU was.
xhat is read, where the normalised rows have no affine part, or made again from the rows in front of the normalisation.
Every program sums the weight's gradient over its rows and writes one partial sum: the result does not depend on their order.
Bytes moved: see `layer_norm_backward_cost`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fastskel.kernels._backend import CompileCase, Cost, jit, num_processors, tl
from fastskel.kernels._layer_norm_rows import (
    PROGRAMS,
    block_offsets,
    check_written,
    coefficient,
    compile_case,
    launch,
    load_block,
    nbytes,
    optional,
    residual_block,
    row_mask,
    slot_of,
    tile_of,
)
from fastskel.kernels.reference.layer_norm import TermGrad
from torch import Tensor

__all__ = ["layer_norm_backward", "layer_norm_backward_cost"]

# programs of one multiprocessor where each keeps and writes partial sums: what it holds at 80 registers a thread
AFFINE_PROGRAMS = 3

@jit()
def _load_grad(
    p_grad, p_xhat, p_base, p_branch, p_branch_slots, p_factor, p_mean, p_rstd, scale, slot, i_n, i_s, i_d, m_d,
    num_tokens, D: tl.constexpr,
):  # fmt: skip
    m_s = row_mask(i_s, slot >= 0, num_tokens)
    m_sd = m_s[:, None] & m_d[None, :]
    o_sd = block_offsets(slot, i_s, i_d, num_tokens, D)
    grad = load_block(p_grad, o_sd, m_sd)
    rstd = load_block(p_rstd, slot * num_tokens + i_s, m_s)
    if p_xhat is not None:
        xhat = load_block(p_xhat, o_sd, m_sd)
    else:
        r = residual_block(
            p_base, p_branch, p_branch_slots, p_factor, scale, slot >= 0, i_n, i_s, i_d, m_d, num_tokens, D
        )
        mean = load_block(p_mean, slot * num_tokens + i_s, m_s)
        # beyond the width the gradient is zero: what stands there here does not matter
        xhat = (r - mean[:, None]) * rstd[:, None]
    return grad, xhat, rstd


@jit()
def _rectified_grad(grad, xhat, b_weight, b_bias):
    return tl.where(xhat * b_weight + b_bias <= 0.0, 0.0, grad)


@jit()
def _row_grad(grad, xhat, rstd, b_weight, D: tl.constexpr):
    g = grad * b_weight
    mean_g = tl.sum(g, 1) / D
    mean_gx = tl.sum(g * xhat, 1) / D
    return rstd[:, None] * (g - mean_g[:, None] - xhat * mean_gx[:, None])


@jit()
def _store_branch(
    p_d_branch, p_branch, p_branch_slots, p_factor, scale, seen, i_n, i_s, i_d, m_d, num_tokens, D: tl.constexpr,
    RELU_MASK: tl.constexpr,
):  # fmt: skip
    slot = slot_of(p_branch_slots, i_n)
    o_branch = block_offsets(slot, i_s, i_d, num_tokens, D)
    m_branch = row_mask(i_s, slot >= 0, num_tokens)[:, None] & m_d[None, :]
    value = coefficient(p_factor, scale, slot, i_n) * seen
    if RELU_MASK:
        value = tl.where(load_block(p_branch, o_branch, m_branch) <= 0.0, 0.0, value)
    tl.store(p_d_branch + o_branch, value.to(p_d_branch.dtype.element_ty), mask=m_branch)


@jit()
def _store_partial(p_partial, d_weight, d_bias, i_d, m_d, D: tl.constexpr):
    o_partial = (tl.program_id(0) * 2).to(tl.int64) * D + i_d
    tl.store(p_partial + o_partial, tl.sum(d_weight, 0), mask=m_d)
    tl.store(p_partial + o_partial + D, tl.sum(d_bias, 0), mask=m_d)


@jit(do_not_specialize=["size", "num_tokens"])
def _layer_norm_backward_kernel(
    p_grad1, p_out_slots1, p_xhat1, p_base1, p_branch1, p_branch_slots1, p_factor1, p_mean1, p_rstd1, p_weight1, p_bias1,
    p_carry1, p_into1, p_d_branch1, p_partial1, scale1, carry_scale1, SEES_CARRY1: tl.constexpr, RELU_MASK1: tl.constexpr,
    RELU1: tl.constexpr,
    p_grad2, p_out_slots2, p_xhat2, p_base2, p_branch2, p_branch_slots2, p_factor2, p_mean2, p_rstd2, p_weight2, p_bias2,
    p_carry2, p_into2, p_d_branch2, p_partial2, scale2, carry_scale2, SEES_CARRY2: tl.constexpr, RELU_MASK2: tl.constexpr,
    RELU2: tl.constexpr,
    size, num_tokens, IN_PLACE: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # without p_into2, a second term adds to the first one's; IN_PLACE: rows without a gradient keep what they hold
    num_blocks = tl.cdiv(num_tokens, BLOCK_S)
    i_d = tl.arange(0, BLOCK_D)
    m_d = i_d < D
    b_weight1, b_bias1, b_weight2, b_bias2 = 1.0, 0.0, 1.0, 0.0
    if p_bias1 is not None:
        b_bias1 = load_block(p_bias1, i_d, m_d)[None, :]
    if p_bias2 is not None:
        b_bias2 = load_block(p_bias2, i_d, m_d)[None, :]
    if p_weight1 is not None:
        b_weight1 = load_block(p_weight1, i_d, m_d)[None, :]
        d_weight1 = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
        d_bias1 = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    if p_weight2 is not None:
        b_weight2 = load_block(p_weight2, i_d, m_d)[None, :]
        d_weight2 = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
        d_bias2 = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for item in range(tl.program_id(0), size * num_blocks, tl.num_programs(0)):
        i_n = (item // num_blocks).to(tl.int64)
        i_s = item % num_blocks * BLOCK_S + tl.arange(0, BLOCK_S)
        m_sd = (i_s < num_tokens)[:, None] & m_d[None, :]
        o_sd = block_offsets(i_n, i_s, i_d, num_tokens, D)
        slot1 = slot_of(p_out_slots1, i_n)
        touched = slot1 >= 0
        if p_grad2 is not None:
            slot2 = slot_of(p_out_slots2, i_n)
            touched |= slot2 >= 0
        if IN_PLACE:
            if p_d_branch1 is not None:
                touched |= slot_of(p_branch_slots1, i_n) >= 0
            if p_d_branch2 is not None:
                touched |= slot_of(p_branch_slots2, i_n) >= 0
        else:
            touched = i_n >= 0
        if touched:
            # everything is loaded before the first reduction, which waits for all warps
            grad1, xhat1, rstd1 = _load_grad(
                p_grad1, p_xhat1, p_base1, p_branch1, p_branch_slots1, p_factor1, p_mean1, p_rstd1, scale1, slot1, i_n, i_s,
                i_d, m_d, num_tokens, D,
            )  # fmt: skip
            if p_carry1 is not None:
                carry1 = carry_scale1 * load_block(p_carry1, o_sd, m_sd)
            if p_grad2 is not None:
                grad2, xhat2, rstd2 = _load_grad(
                    p_grad2, p_xhat2, p_base2, p_branch2, p_branch_slots2, p_factor2, p_mean2, p_rstd2, scale2, slot2, i_n,
                    i_s, i_d, m_d, num_tokens, D,
                )  # fmt: skip
                if p_carry2 is not None:
                    carry2 = carry_scale2 * load_block(p_carry2, o_sd, m_sd)
            if RELU1:
                grad1 = _rectified_grad(grad1, xhat1, b_weight1, b_bias1)
            if p_weight1 is not None:
                d_weight1 += grad1 * xhat1
                d_bias1 += grad1
            dr1 = _row_grad(grad1, xhat1, rstd1, b_weight1, D)
            into1 = dr1
            if p_carry1 is not None:
                into1 += carry1
            if p_d_branch1 is not None:
                _store_branch(
                    p_d_branch1, p_branch1, p_branch_slots1, p_factor1, scale1, into1 if SEES_CARRY1 else dr1, i_n, i_s, i_d,
                    m_d, num_tokens, D, RELU_MASK1,
                )  # fmt: skip
            if p_grad2 is not None:
                if RELU2:
                    grad2 = _rectified_grad(grad2, xhat2, b_weight2, b_bias2)
                if p_weight2 is not None:
                    d_weight2 += grad2 * xhat2
                    d_bias2 += grad2
                dr2 = _row_grad(grad2, xhat2, rstd2, b_weight2, D)
                into2 = dr2
                if p_carry2 is not None:
                    into2 += carry2
                if p_d_branch2 is not None:
                    _store_branch(
                        p_d_branch2, p_branch2, p_branch_slots2, p_factor2, scale2, into2 if SEES_CARRY2 else dr2, i_n, i_s,
                        i_d, m_d, num_tokens, D, RELU_MASK2,
                    )  # fmt: skip
                if p_into2 is None:
                    into1 += into2
                else:
                    tl.store(p_into2 + o_sd, into2.to(p_into2.dtype.element_ty), mask=m_sd)
            tl.store(p_into1 + o_sd, into1.to(p_into1.dtype.element_ty), mask=m_sd)
    if p_weight1 is not None:
        _store_partial(p_partial1, d_weight1, d_bias1, i_d, m_d, D)
    if p_weight2 is not None:
        _store_partial(p_partial2, d_weight2, d_bias2, i_d, m_d, D)


def _same(tensor: Tensor, other: Tensor | None) -> bool:
    # by storage, not by address: tensors without values have none
    return other is tensor or (
        other is not None
        and other.untyped_storage()._cdata == tensor.untyped_storage()._cdata
        and other.storage_offset() == tensor.storage_offset()
    )


def _in_place(terms: Sequence[TermGrad]) -> bool:
    """Whether rows without a gradient already hold what they are to receive."""
    first = terms[0].into
    return all(
        (_same(t.into, t.carry) and t.carry_scale == 1.0) or (t is not terms[0] and _same(first, t.into)) for t in terms
    )


def _arguments(terms: Sequence[TermGrad], partials: Sequence[Tensor | None]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for number, (t, partial) in enumerate(zip(terms, partials), 1):
        again = t.xhat is None
        shared = number == 2 and _same(terms[0].into, t.into)
        values = dict(
            p_grad=t.grad.contiguous(), p_out_slots=optional(t.out_slots), p_xhat=optional(t.xhat),
            p_base=optional(t.base) if again else None, p_branch=optional(t.branch) if again or t.relu_mask else None,
            p_branch_slots=optional(t.branch_slots), p_factor=optional(t.factor), p_mean=optional(t.mean) if again else None,
            p_rstd=t.rstd.contiguous(), p_weight=optional(t.weight), p_bias=optional(t.bias) if t.relu else None,
            p_carry=optional(t.carry),
            p_into=None if shared else t.into, p_d_branch=t.d_branch, p_partial=partial,
            scale=float(t.scale), carry_scale=float(t.carry_scale), SEES_CARRY=t.branch_sees_carry, RELU_MASK=t.relu_mask,
            RELU=t.relu,
        )  # fmt: skip
        arguments.update({f"{name}{number}": value for name, value in values.items()})
    if len(terms) == 1:
        arguments.update({f"{name}2": None for name in values})
    size, num_tokens, width = terms[0].into.shape
    tile = tile_of(num_tokens, width)
    return {**arguments, "size": size, "num_tokens": num_tokens, "IN_PLACE": _in_place(terms), **tile}


def _check(terms: Sequence[TermGrad]) -> None:
    for t in terms:
        check_written("layer_norm_backward", into=t.into, d_branch=t.d_branch)
    if len(terms) == 2:
        first, second = terms
        shared = _same(first.into, second.into)
        if shared and second.carry is not None:
            raise ValueError(
                "layer_norm_backward: the second carry must be None where both terms name one into, got a tensor. "
                "Give it to the first."
            )
        # the other term's threads may have read it already, or not
        if not shared and (_same(first.into, second.carry) or _same(second.into, first.carry)):
            raise ValueError(
                "layer_norm_backward: into must not be the other term's carry, got one that is. Give a buffer of its own."
            )


def layer_norm_backward(
    terms: Sequence[TermGrad], *, programs: int | None = None
) -> list[tuple[Tensor, Tensor] | None]:
    """Differentiate one term or two in one launch; writes to what they name.

    Args:
        terms: Of the same (N, S, D) and device.
        programs: How many programs share the rows, and of how many partial sums a weight's gradient is made; None for what
            suits the device.
    Returns:
        Gradients of weight and bias (D,), fp32, of each term, None of one without a weight.
    Raises:
        ValueError: If something written is not contiguous, or is read for the other term.
    """
    _check(terms)
    into = terms[0].into
    size, num_tokens, width = into.shape
    if programs is None:
        affine = any(t.weight is not None for t in terms)
        programs = (AFFINE_PROGRAMS if affine else PROGRAMS) * num_processors(into.device)
    programs = min(programs, size * -(-num_tokens // tile_of(num_tokens, width)["BLOCK_S"]))
    shape = (programs, 2, width)
    partials = [None if t.weight is None else into.new_empty(shape, dtype=torch.float32) for t in terms]
    launch(_layer_norm_backward_kernel, _arguments(terms, partials), programs)
    sums = [None if partial is None else partial.sum(0) for partial in partials]
    return [None if total is None else (total[0], total[1]) for total in sums]


def layer_norm_backward_cost(terms: Sequence[TermGrad]) -> Cost:
    """Count what `layer_norm_backward` reads and writes at least; of meta tensors too."""
    count, in_place = 0.0, _in_place(terms)
    for t in terms:
        # the samples of (N, S, D) that are looked at
        share = len(t.grad) / max(len(t.into), 1)
        count += nbytes(t.grad, t.out_slots, t.rstd, t.branch_slots, t.factor, t.weight, t.d_branch)
        if t.xhat is None:
            again = t is not terms[0] and t.base is terms[0].base
            count += nbytes(t.mean) + (0 if again else share * nbytes(t.base))
        count += nbytes(t.xhat, t.branch if t.xhat is None or t.relu_mask else None)
        # sums of weight and bias
        count += 0 if t.weight is None else 2 * 4 * t.weight.numel()
        if t is terms[0] or not _same(terms[0].into, t.into):
            count += (share if in_place else 1.0) * nbytes(t.carry, t.into)
    return Cost(0, round(count))


def _cases() -> list[CompileCase]:
    """The layer's uses at its published size, four views of a batch with one sample in ten left out of each branch."""
    size, live, tokens, width = 1424, 1282, 64, 1024

    def meta(rows: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, tokens, width, dtype=dtype, device="meta")

    slots = torch.empty(size, dtype=torch.int32, device="meta")

    def saved(compute: torch.dtype, residual: torch.dtype, masked: bool, **change: Any) -> TermGrad:
        rows = size if masked else live
        term = TermGrad(
            grad=meta(rows, compute), rstd=torch.empty(rows, tokens, device="meta"), into=meta(size, residual),
            xhat=meta(rows, compute), carry=meta(size, residual), d_branch=meta(rows, compute),
            factor=torch.empty(size, device="meta") if masked else None, out_slots=None if masked else slots,
            branch_slots=None if masked else slots,
        )  # fmt: skip
        return term._replace(**change)

    def in_place(term: TermGrad) -> TermGrad:
        return term._replace(carry=term.into)

    half, single = torch.bfloat16, torch.float32
    affine = dict(
        xhat=None, mean=torch.empty(live, tokens, device="meta"), base=meta(size, single),
        weight=torch.empty(width, device="meta"),
    )  # fmt: skip
    conv = in_place(saved(half, single, False, **affine, branch=meta(live, half), relu_mask=True))
    plain = saved(half, single, False, **affine, into=conv.into, carry=None, d_branch=None, branch_slots=None)
    streams = [saved(half, single, False, carry_scale=0.25, branch_sees_carry=True) for _ in range(2)]
    one = [in_place(saved(half, single, False))]
    embedding = TermGrad(
        meta(size, half), torch.empty(size, tokens, device="meta"), meta(size, half), base=meta(size, half), relu=True,
        mean=torch.empty(size, tokens, device="meta"), weight=affine["weight"], bias=affine["weight"],
    )  # fmt: skip
    uses = {
        "before the attentions, bf16": ([conv, plain], True),
        "after CA's attention, bf16": (one, True),
        "after the dense shift's attentions, bf16": (streams, True),
        "after the dense shift's attentions, bf16, masked": (
            [saved(half, single, True, carry_scale=0.25, branch_sees_carry=True) for _ in range(2)], False
        ),
        "embedding, bf16": ([embedding], True),
        "after CA's attention, fp32": ([in_place(saved(single, single, False))], False),
        "after CA's attention, fp16": ([in_place(saved(torch.float16, single, False))], False),
    }  # fmt: skip
    cases = []
    for label, (terms, hot) in uses.items():
        partials = [None if t.weight is None else torch.empty(1, 2, width, device="meta") for t in terms]
        cost = layer_norm_backward_cost(terms)
        cases.append(compile_case(label, _layer_norm_backward_kernel, _arguments(terms, partials), cost, hot))
    return cases


COMPILE_CASES = _cases()
