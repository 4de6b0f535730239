r"""Layer normalisation behind a residual addition, over samples of which some are skipped; up to two terms in one pass.

    r_i = base_i + scale factor_i branch_i,    xhat = (r - mean) rstd,    out = xhat weight + bias,
    dr = rstd (g - mean(g) - xhat mean(g xhat)) with g = d_out weight,    rstd = 1 / sqrt(var + eps).
`branch` and `out` are compact: they hold the samples that are computed, at places named by slots (see `Term`). The same pass
can return the terms' sum of r, and going back adds dr to a gradient of r from elsewhere and makes the branch's gradient.
Source: Ba et al., "Layer normalization", 2016; Huang et al., "Deep networks with stochastic depth", ECCV 2016.
Bytes moved for one term without affine part, its base of 4 bytes a number and its branch of 2: forward 8 a number, eager torch
32 (the branch converted, r and the rows written and read); backward with a carry in place 14, eager torch 58.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fastskel.kernels._backend import INTERPRETED, CompileCase, Cost, cpu_kernel, jit, num_processors, tl
from fastskel.kernels._layer_norm_backward import layer_norm_backward, layer_norm_backward_cost
from fastskel.kernels._layer_norm_rows import (
    PROGRAMS,
    block_offsets,
    check_written,
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
from fastskel.kernels.reference import layer_norm as reference
from fastskel.kernels.reference.layer_norm import Term, TermGrad
from torch import Tensor

__all__ = [
    "Term",
    "TermGrad",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_backward_cost",
    "layer_norm_forward",
    "layer_norm_forward_cost",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 8192


def layer_norm(
    x: Tensor,
    residual: Tensor | None = None,
    *,
    scale: float = 1.0,
    factor: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Add a branch to a residual stream and normalise the sum over its last dimension.

    Args:
        x: Residual stream, (N, S, D), D at most 8192.
        residual: Branch, (N, S, D), or None.
        scale: Multiplies the branch.
        factor: Multiplies each sample's branch too, (N,), fp32; it gets no gradient.
        weight: Of the affine part, (D,), or None.
        bias: Likewise; needs a weight.
        eps: Added to variances.
    Returns:
        Normalised rows, (N, S, D), in the type of `residual`, or of `x` without one; r = x + scale * factor * residual,
        (N, S, D), in the type of `x`. What is normalised is r before it is rounded.
    Raises:
        ValueError: On shapes, types, devices and numbers out of range.
    """
    _check(x, residual, factor, weight, bias, eps)
    out, r, _, _ = _operator(x, residual, float(scale), factor, weight, bias, float(eps))
    return out, x if residual is None else r


def _check(
    x: Tensor, residual: Tensor | None, factor: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    if x.ndim != 3 or not 1 <= x.shape[2] <= MAX_WIDTH or not x.shape[1]:
        raise ValueError(
            f"layer_norm: x must be (N, S, D) with S at least 1 and D from 1 to {MAX_WIDTH}, got {tuple(x.shape)}. "
            "Give samples of tokens."
        )
    if factor is not None and residual is None:
        raise ValueError("layer_norm: factor must be None without residual, got a tensor. Leave it out.")
    if bias is not None and weight is None:
        raise ValueError("layer_norm: bias must be None without weight, got a tensor. Give a weight of ones.")
    if factor is not None and factor.requires_grad:
        raise ValueError("layer_norm: factor must not require a gradient, got one that does. Detach it.")
    if not eps > 0.0:
        raise ValueError(f"layer_norm: eps must be above 0, got {eps}. Give a small positive number.")
    # the kernels compute in fp32, the CPU operator also in fp64
    floats = FLOATS if x.is_cuda or INTERPRETED else (*FLOATS, torch.float64)
    for argument, tensor, shape in (
        ("x", x, x.shape),
        ("residual", residual, x.shape),
        ("factor", factor, x.shape[:1]),
        ("weight", weight, x.shape[2:]),
        ("bias", bias, x.shape[2:]),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in floats:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in floats)
            raise ValueError(f"layer_norm: {argument} must be one of {names}, got {tensor.dtype}. Convert it.")
        if tensor.shape != shape or tensor.device != x.device:
            raise ValueError(
                f"layer_norm: {argument} must be {tuple(shape)} on {x.device}, got {tuple(tensor.shape)} on "
                f"{tensor.device}. Give it beside x."
            )


@jit()
def _normalise(
    r, b_weight, b_bias, p_out, p_mean, p_rstd, slot, i_s, i_d, m_d, num_tokens, eps, D: tl.constexpr, RELU: tl.constexpr
):
    mean = tl.sum(r, 1) / D
    centred = tl.where(m_d[None, :], r - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    m_out = row_mask(i_s, slot >= 0, num_tokens)
    tl.store(p_mean + slot * num_tokens + i_s, mean, mask=m_out)
    tl.store(p_rstd + slot * num_tokens + i_s, rstd, mask=m_out)
    value = centred * rstd[:, None] * b_weight + b_bias
    if RELU:
        # NaN passes
        value = tl.where(value <= 0.0, 0.0, value)
    o_out = block_offsets(slot, i_s, i_d, num_tokens, D)
    tl.store(p_out + o_out, value.to(p_out.dtype.element_ty), mask=m_out[:, None] & m_d[None, :])


# sizes are not specialised: the tail of a data set would compile again
@jit(do_not_specialize=["size", "num_tokens"])
def _layer_norm_forward_kernel(
    p_base1, p_branch1, p_branch_slots1, p_factor1, p_weight1, p_bias1, p_out1, p_out_slots1, p_mean1, p_rstd1, scale1,
    RELU1: tl.constexpr,
    p_base2, p_branch2, p_branch_slots2, p_factor2, p_weight2, p_bias2, p_out2, p_out_slots2, p_mean2, p_rstd2, scale2,
    RELU2: tl.constexpr,
    p_total, total_scale, eps, size, num_tokens, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(num_tokens, BLOCK_S)
    i_d = tl.arange(0, BLOCK_D)
    m_d = i_d < D
    b_weight1, b_bias1, b_weight2, b_bias2 = 1.0, 0.0, 1.0, 0.0
    if p_weight1 is not None:
        b_weight1 = load_block(p_weight1, i_d, m_d)[None, :]
    if p_bias1 is not None:
        b_bias1 = load_block(p_bias1, i_d, m_d)[None, :]
    if p_weight2 is not None:
        b_weight2 = load_block(p_weight2, i_d, m_d)[None, :]
    if p_bias2 is not None:
        b_bias2 = load_block(p_bias2, i_d, m_d)[None, :]
    for item in range(tl.program_id(0), size * num_blocks, tl.num_programs(0)):
        i_n = (item // num_blocks).to(tl.int64)
        i_s = item % num_blocks * BLOCK_S + tl.arange(0, BLOCK_S)
        slot1 = slot_of(p_out_slots1, i_n)
        wanted1 = slot1 >= 0
        wanted2 = wanted1
        if p_out2 is not None:
            slot2 = slot_of(p_out_slots2, i_n)
            wanted2 = slot2 >= 0
        if p_total is not None:
            wanted1 = i_n >= 0
            wanted2 = wanted1
        if wanted1 | wanted2:
            # everything is loaded before the first reduction, which waits for all warps
            r1 = residual_block(
                p_base1, p_branch1, p_branch_slots1, p_factor1, scale1, wanted1, i_n, i_s, i_d, m_d, num_tokens, D
            )
            total = r1
            if p_out2 is not None:
                r2 = residual_block(
                    p_base2, p_branch2, p_branch_slots2, p_factor2, scale2, wanted2, i_n, i_s, i_d, m_d, num_tokens, D
                )
                total = r1 + r2
            if p_total is not None:
                m_total = (i_s < num_tokens)[:, None] & m_d[None, :]
                o_total = block_offsets(i_n, i_s, i_d, num_tokens, D)
                tl.store(p_total + o_total, (total_scale * total).to(p_total.dtype.element_ty), mask=m_total)
            _normalise(
                r1, b_weight1, b_bias1, p_out1, p_mean1, p_rstd1, slot1, i_s, i_d, m_d, num_tokens, eps, D, RELU1
            )
            if p_out2 is not None:
                _normalise(
                    r2, b_weight2, b_bias2, p_out2, p_mean2, p_rstd2, slot2, i_s, i_d, m_d, num_tokens, eps, D, RELU2
                )


def _arguments(
    terms: Sequence[Term], statistics: Sequence[tuple[Tensor, Tensor]], eps: float, scale: float | None, total: Tensor | None
) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for number, (t, (mean, rstd)) in enumerate(zip(terms, statistics), 1):
        values = dict(
            p_base=t.base.contiguous(), p_branch=optional(t.branch), p_branch_slots=optional(t.branch_slots),
            p_factor=optional(t.factor), p_weight=optional(t.weight), p_bias=optional(t.bias), p_out=t.out,
            p_out_slots=optional(t.out_slots), p_mean=mean, p_rstd=rstd, scale=float(t.scale), RELU=t.relu,
        )  # fmt: skip
        arguments.update({f"{name}{number}": value for name, value in values.items()})
    if len(terms) == 1:
        arguments.update({f"{name}2": None for name in values})
    size, num_tokens, width = terms[0].base.shape
    arguments.update(p_total=total, total_scale=None if scale is None else float(scale), eps=float(eps))
    return {**arguments, "size": size, "num_tokens": num_tokens, **tile_of(num_tokens, width)}


def layer_norm_forward(
    terms: Sequence[Term], eps: float, *, total_scale: float | None = None, programs: int | None = None
) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """Normalise the rows of one term or two in one launch; written to the `out` of each.

    Args:
        terms: Of the same (N, S, D) and device.
        eps: Added to variances.
        total_scale: Multiplies the sum of the terms' r.
        programs: How many programs share the rows; None for what suits the device.
    Returns:
        Mean and 1 / deviation (n, S), fp32, of each term; the sum (N, S, D) in the type of the first base, None without its
        scale. Rows that no slot names are not written.
    Raises:
        ValueError: If an `out` is not contiguous.
    """
    base = terms[0].base
    statistics = []
    for t in terms:
        check_written("layer_norm_forward", out=t.out)
        shape = t.out.shape[:2]
        statistics.append((base.new_empty(shape, dtype=torch.float32), base.new_empty(shape, dtype=torch.float32)))
    total = None if total_scale is None else base.new_empty(base.shape)
    programs = PROGRAMS * num_processors(base.device) if programs is None else programs
    launch(_layer_norm_forward_kernel, _arguments(terms, statistics, eps, total_scale, total), programs)
    return statistics, total


def layer_norm_forward_cost(terms: Sequence[Term], *, total_scale: float | None = None) -> Cost:
    """Count what `layer_norm_forward` reads and writes at least; of meta tensors too."""
    count, bases = 0, {}
    for t in terms:
        # the samples of (N, S, D) that are looked at; a base of both terms is read once
        samples = len(t.base) if total_scale is not None else len(t.out)
        bases[id(t.base)] = max(bases.get(id(t.base), 0), samples * t.base.nbytes // max(len(t.base), 1))
        count += nbytes(t.branch, t.branch_slots, t.factor, t.weight, t.bias, t.out, t.out_slots)
        # mean and 1 / deviation
        count += 2 * 4 * t.out.shape[0] * t.out.shape[1]
    return Cost(0, count + sum(bases.values()) + (0 if total_scale is None else terms[0].base.nbytes))


def _cases() -> list[CompileCase]:
    """The layer's uses at its published sizes, four views of a batch with one sample in ten left out of each branch."""
    size, live, tokens, width = 1424, 1282, 64, 1024
    half, single = torch.bfloat16, torch.float32

    def meta(*shape: int, dtype: torch.dtype = single) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    slots = meta(size, dtype=torch.int32)

    def term(compute: torch.dtype, **change: Any) -> Term:
        out, branch = (meta(live, tokens, width, dtype=compute) for _ in range(2))
        return Term(meta(size, tokens, width), out, slots, branch, slots)._replace(**change)

    affine = dict(weight=meta(width), bias=meta(width))
    conv = term(half, **affine)
    streams = [term(half), term(half)]
    whole = meta(size, tokens, width, dtype=half)
    masked = term(half, out=whole, out_slots=None, branch=whole, branch_slots=None, factor=meta(size))
    uses: dict[str, tuple[list[Term], float | None, bool]] = {
        "before the attentions, bf16": ([conv, term(half, base=conv.base, branch=None, branch_slots=None, **affine)], None, True),
        "after CA's attention, bf16": ([term(half)], None, True),
        "after the dense shift's attentions, bf16": (streams, 0.25, True),
        "after the dense shift's attentions, bf16, masked": (
            [masked, masked._replace(base=meta(size, tokens, width))], 0.25, False
        ),
        "embedding, bf16": (
            [Term(meta(size, tokens, width, dtype=half), whole, **affine, relu=True)], None, True
        ),
        "after CA's attention, fp32": ([term(single)], None, False),
        "after CA's attention, fp16": ([term(torch.float16)], None, False),
    }  # fmt: skip
    cases = []
    for label, (terms, scale, hot) in uses.items():
        statistics = [(meta(*t.out.shape[:2]), meta(*t.out.shape[:2])) for t in terms]
        arguments = _arguments(terms, statistics, 1e-5, scale, None if scale is None else terms[0].base)
        cost = layer_norm_forward_cost(terms, total_scale=scale)
        cases.append(compile_case(label, _layer_norm_forward_kernel, arguments, cost, hot))
    return cases


COMPILE_CASES = _cases()


def _compute(forward: Any, x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the operator on one of the host functions: Triton's or the reference's."""
    scale, factor, weight, bias, eps = rest
    out = x.new_empty(x.shape, dtype=(x if residual is None else residual).dtype)
    term = Term(x, out, branch=residual, scale=scale, factor=factor, weight=weight, bias=bias)
    [(mean, rstd)], r = forward([term], eps, total_scale=None if residual is None else 1.0)
    # an operator may not return its input
    return out, x.new_empty(0) if r is None else r, mean, rstd


def _compute_grad(
    backward: Any, grad: Tensor, grad_r: Tensor | None, x: Tensor, residual: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scale, factor, weight, mean, rstd = rest
    into, d_residual = x.new_empty(x.shape), None if residual is None else residual.new_empty(residual.shape)
    term = TermGrad(
        grad, rstd, into, mean=mean, base=x, branch=residual, scale=scale, factor=factor, weight=weight, carry=grad_r,
        d_branch=d_residual, branch_sees_carry=True,
    )  # fmt: skip
    # copies: outputs of an operator may not share memory
    d_weight, d_bias = (value.clone() for value in backward([term])[0] or (mean.new_empty(0),) * 2)
    return into, x.new_empty(0) if d_residual is None else d_residual, d_weight, d_bias


def _layer_norm_triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _compute(layer_norm_forward, *arguments)


def _layer_norm_reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _compute(reference.layer_norm_forward, *arguments)


def _layer_norm_backward_triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _compute_grad(layer_norm_backward, *arguments)


def _layer_norm_backward_reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _compute_grad(reference.layer_norm_backward, *arguments)


_operator = torch.library.custom_op(
    "fastskel::layer_norm",
    _layer_norm_triton,
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor x, Tensor? residual, float scale, Tensor? factor, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
_operator.register_kernel("cpu")(cpu_kernel(_layer_norm_reference, _layer_norm_triton))

_backward_operator = torch.library.custom_op(
    "fastskel::layer_norm_backward",
    _layer_norm_backward_triton,
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor grad, Tensor? grad_r, Tensor x, Tensor? residual, float scale, Tensor? factor, Tensor? weight, "
    "Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor, Tensor)",
)
_backward_operator.register_kernel("cpu")(cpu_kernel(_layer_norm_backward_reference, _layer_norm_backward_triton))


@_operator.register_fake
def _(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = x.new_empty(x.shape, dtype=(x if residual is None else residual).dtype)
    r = x.new_empty(0 if residual is None else x.shape)
    wide = torch.promote_types(x.dtype, torch.float32)
    return out, r, x.new_empty(x.shape[:2], dtype=wide), x.new_empty(x.shape[:2], dtype=wide)


@_backward_operator.register_fake
def _(
    grad: Tensor, grad_r: Tensor | None, x: Tensor, residual: Tensor | None, scale: float, factor: Tensor | None,
    weight: Tensor | None, mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape = 0 if weight is None else weight.shape
    d_residual = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    return x.new_empty(x.shape), d_residual, mean.new_empty(shape), mean.new_empty(shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, scale, factor, weight, bias, _ = inputs
    _, _, mean, rstd = output
    ctx.save_for_backward(x, residual, factor, weight, mean, rstd)
    ctx.scale, ctx.bias_type = scale, None if bias is None else bias.dtype
    ctx.mark_non_differentiable(mean, rstd)


def _differentiate(ctx: Any, grad: Tensor, grad_r: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, residual, factor, weight, mean, rstd = ctx.saved_tensors
    carry = None if residual is None else grad_r
    dx, d_residual, d_weight, d_bias = _backward_operator(grad, carry, x, residual, ctx.scale, factor, weight, mean, rstd)
    return (
        dx,
        None if residual is None else d_residual,
        None,
        None,
        None if weight is None else d_weight.to(weight.dtype),
        None if ctx.bias_type is None else d_bias.to(ctx.bias_type),
        None,
    )


_operator.register_autograd(_differentiate, setup_context=_keep)
