r"""Hidden activations of an MLP between its two matrix products.

    h_i = sum_k c_ki act(u_k,j + b),         du_k,j = c_ki dh_i act'(u_k,j + b),         db = sum_kj du_k,j

for samples i, branches k, c_ki a number times a factor of the sample, and j = slot_k(i) the sample's row in a compact tensor that
holds only what is computed: c_ki = 0 where there is none. The backward pass returns h again, which the weight gradient of the
second product needs, so that h is never kept. The sum for the bias runs over tokens too.
Exact GELU is x Phi(x), its derivative Phi(x) + x phi(x): one exponential serves both, see `_gelu`.
Bytes moved for N S F activations of b bytes and one branch: forward 2 b, backward 4 b. Eager torch with DropPath moves 6 b (GELU,
scaling, spreading) and 12 b (the same again, gathering and scaling the gradient, GELU's gradient, the sum for the bias).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fastskel.kernels._backend import OPTIONS, CompileCase, Cost, device_of, jit, num_processors, tl
from fastskel.kernels.mlp_residual import (
    BACKWARD_OCCUPANCY,
    FORWARD_OCCUPANCY,
    NUM_WARPS,
    blocks,
    check_term,
    contiguous,
    places,
    split_types,
)
from fastskel.kernels.reference.mlp_hidden import Hidden
from torch import Tensor

__all__ = ["ACTIVATIONS", "Hidden", "mlp_hidden", "mlp_hidden_backward", "mlp_hidden_cost"]

ACTIVATIONS = ("gelu", "relu")


@jit()
def _gelu(x):
    # Phi(x) and phi(x) share exp(-x^2 / 2): Phi(-|x|) is that times a polynomial in t = 1 / (1 + 0.3 |x|), fitted to a
    # relative error of 6e-8 up to |x| = 13.5, where the exponential leaves float32; two thirds of the instructions of erf
    # and exp, and no cancellation in the tail
    e = tl.exp2(-0.7213475204444817 * x * x)
    d = 1.0 + 0.3 * tl.abs(x)
    # cheaper than a division
    t = tl.rsqrt(d * d)
    p = 0.0383342572 * t - 0.168951919
    p = p * t + 0.228217244
    p = p * t - 0.0759995398
    p = p * t + 0.142185032
    p = p * t + 0.0948329849
    p = p * t + 0.121882054
    p = p * t + 0.119493064
    tail = (p * t + 6.85292364e-06) * e
    return tl.where(x < 0, tail, 1.0 - tail), 0.3989422804014327 * e


@jit()
def _load_term(p_up, p_slots, p_factor, scale, p_bias, b_bias, i_row, i_f, m_row, m_f, num_tokens, F: tl.constexpr):
    i_compact, m_there, factor = places(p_slots, p_factor, scale, i_row, m_row, num_tokens)
    o_up = i_compact * F + i_f[None, :]
    m_up = m_there & m_f[None, :]
    b_up = tl.load(p_up + o_up, mask=m_up, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_up += b_bias
    return b_up, o_up, m_up, factor


@jit()
def _share(b_hidden, m_up, factor, p_bias):
    b_share = factor * b_hidden
    # what is absent was loaded as 0, which either activation keeps unless a bias is added
    if p_bias is not None:
        b_share = tl.where(m_up, b_share, 0.0)
    return b_share


@jit()
def _activate(b_up, m_up, factor, p_bias, GELU: tl.constexpr):
    if GELU:
        b_cdf, _ = _gelu(b_up)
        b_hidden = b_up * b_cdf
    else:
        # unlike a maximum, keeps NaN
        b_hidden = tl.where(b_up < 0, 0.0, b_up)
    return _share(b_hidden, m_up, factor, p_bias)


@jit()
def _store_grad(p_d_up, b_grad, b_up, o_up, m_up, factor, p_slots, p_bias, GELU: tl.constexpr):
    # store a term's gradient; return its share of the activations, and what the bias receives
    if GELU:
        b_cdf, b_density = _gelu(b_up)
        b_hidden = b_up * b_cdf
        b_d_up = factor * b_grad * (b_cdf + b_up * b_density)
    else:
        b_hidden = tl.where(b_up < 0, 0.0, b_up)
        b_d_up = tl.where(b_up <= 0, 0.0, factor * b_grad)
    tl.store(p_d_up + o_up, b_d_up.to(p_d_up.dtype.element_ty), mask=m_up)
    # an absent sample has a gradient; beyond the last row it was loaded as 0
    if p_slots is not None:
        b_d_up = tl.where(m_up, b_d_up, 0.0)
    return _share(b_hidden, m_up, factor, p_bias), b_d_up


@jit(do_not_specialize=["scale0", "scale1", "num_rows", "num_tokens"])
def _mlp_hidden_fwd_kernel(
    p_up0, p_slots0, p_factor0, p_up1, p_slots1, p_factor1, p_bias, p_out, scale0, scale1, num_rows, num_tokens,
    F: tl.constexpr, GELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    num_blocks_f = tl.cdiv(F, BLOCK_F)
    for item in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_R) * num_blocks_f, tl.num_programs(0)):
        i_row = item // num_blocks_f * BLOCK_R + tl.arange(0, BLOCK_R)
        i_f = item % num_blocks_f * BLOCK_F + tl.arange(0, BLOCK_F)
        m_row, m_f = i_row < num_rows, i_f < F
        b_bias = 0.0
        if p_bias is not None:
            b_bias = tl.load(p_bias + i_f, mask=m_f, other=0.0).to(tl.float32)[None, :]
        b_up, _, m_up, factor = _load_term(
            p_up0, p_slots0, p_factor0, scale0, p_bias, b_bias, i_row, i_f, m_row, m_f, num_tokens, F
        )
        b_out = _activate(b_up, m_up, factor, p_bias, GELU)
        if p_up1 is not None:
            b_up, _, m_up, factor = _load_term(
                p_up1, p_slots1, p_factor1, scale1, p_bias, b_bias, i_row, i_f, m_row, m_f, num_tokens, F
            )
            b_out += _activate(b_up, m_up, factor, p_bias, GELU)
        o_out = i_row.to(tl.int64)[:, None] * F + i_f[None, :]
        tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_row[:, None] & m_f[None, :])


@jit(do_not_specialize=["scale0", "scale1", "num_rows", "num_tokens"])
def _mlp_hidden_bwd_kernel(
    p_grad, p_up0, p_slots0, p_factor0, p_d_up0, p_up1, p_slots1, p_factor1, p_d_up1, p_bias, p_hidden, p_sums,
    scale0, scale1, num_rows, num_tokens,
    F: tl.constexpr, GELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # a program stays with its columns, whose sums it keeps in registers
    num_blocks_f = tl.cdiv(F, BLOCK_F)
    i_part, num_parts = tl.program_id(0) // num_blocks_f, tl.num_programs(0) // num_blocks_f
    i_f = tl.program_id(0) % num_blocks_f * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = i_f < F
    b_bias = 0.0
    if p_bias is not None:
        b_bias = tl.load(p_bias + i_f, mask=m_f, other=0.0).to(tl.float32)[None, :]
    b_sums = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
    for i_block in range(i_part, tl.cdiv(num_rows, BLOCK_R), num_parts):
        i_row = i_block * BLOCK_R + tl.arange(0, BLOCK_R)
        m_row = i_row < num_rows
        o_grad = i_row.to(tl.int64)[:, None] * F + i_f[None, :]
        m_grad = m_row[:, None] & m_f[None, :]
        b_grad = tl.load(p_grad + o_grad, mask=m_grad, other=0.0).to(tl.float32)
        b_up0, o_up0, m_up0, factor0 = _load_term(
            p_up0, p_slots0, p_factor0, scale0, p_bias, b_bias, i_row, i_f, m_row, m_f, num_tokens, F
        )
        # loads before stores, which nothing can be moved across
        if p_up1 is not None:
            b_up1, o_up1, m_up1, factor1 = _load_term(
                p_up1, p_slots1, p_factor1, scale1, p_bias, b_bias, i_row, i_f, m_row, m_f, num_tokens, F
            )
        b_hidden, b_d_up = _store_grad(p_d_up0, b_grad, b_up0, o_up0, m_up0, factor0, p_slots0, p_bias, GELU)
        b_sums += b_d_up
        if p_up1 is not None:
            b_other, b_d_up = _store_grad(p_d_up1, b_grad, b_up1, o_up1, m_up1, factor1, p_slots1, p_bias, GELU)
            b_hidden += b_other
            b_sums += b_d_up
        if p_hidden is not None:
            tl.store(p_hidden + o_grad, b_hidden.to(p_hidden.dtype.element_ty), mask=m_grad)
    if p_sums is not None:
        tl.store(p_sums + i_part * F + i_f, tl.sum(b_sums, 0), mask=m_f)


def mlp_hidden_cost(
    counts: Sequence[int], num_rows: int, width: int, itemsize: int, backward: bool = False
) -> Cost:
    """Cost of a pass over (rows, width) and the rows that each term computed; backward writes gradients and activations."""
    return Cost(0, width * itemsize * (2 if backward else 1) * (sum(counts) + num_rows))


def _compile_cases() -> list[CompileCase]:
    # 4 views of 356 clips, of which DropPath leaves 9 of 10; one tile serves 50 and 64 tokens, which are an argument
    width, rows = 2048, 4 * 356 * 64
    kept = rows * 9 // 10
    sizes = {"scale0": "fp32", "scale1": "fp32", "num_rows": "i32", "num_tokens": "i32"}
    cases = []
    for kind, gelu, num_terms in (
        ("bf16", True, 2), ("bf16", True, 1), ("bf16", False, 1), ("fp32", True, 2), ("fp16", True, 2)
    ):  # fmt: skip
        terms: list[dict[str, str | None]] = [
            {
                f"p_up{term}": f"*{kind}" if term < num_terms else None,
                # two terms are branches under DropPath
                f"p_slots{term}": "*i32" if term < num_terms == 2 else None,
                f"p_factor{term}": None,
                f"p_d_up{term}": f"*{kind}" if term < num_terms else None,
            }
            for term in range(2)
        ]
        both = {**terms[0], **terms[1]}
        forward = {name: value for name, value in both.items() if "d_up" not in name}
        counts = [kept if num_terms == 2 else rows] * num_terms
        itemsize = 4 if kind == "fp32" else 2
        for kernel, backward, types in (
            (_mlp_hidden_fwd_kernel, False, {**forward, "p_bias": None, "p_out": f"*{kind}"}),
            (_mlp_hidden_bwd_kernel, True, {
                "p_grad": f"*{kind}", **both, "p_bias": None, "p_hidden": f"*{kind}", "p_sums": "*fp32"
            }),
        ):  # fmt: skip
            signature, absent = split_types(types)
            cases.append(
                CompileCase(
                    f"S=50, 64 {kind} {'gelu' if gelu else 'relu'} of {num_terms}", kernel, {**signature, **sizes},
                    {**absent, "F": width, "GELU": gelu, **blocks(width)}, NUM_WARPS,
                    cost=mlp_hidden_cost(counts, rows, width, itemsize, backward), hot=kind == "bf16",
                )
            )  # fmt: skip
    return cases


COMPILE_CASES = _compile_cases()


def mlp_hidden(
    terms: Sequence[Hidden], activation: str, *, bias: Tensor | None = None, num_samples: int, out: Tensor | None = None
) -> Tensor:
    """Sum scaled activations of the terms, in one pass.

    Args:
        terms: One or two, (n, S, F) each, in one type: float32, bfloat16 or float16.
        activation: "gelu" or "relu".
        bias: Added before the activation, (F,).
        num_samples: N.
        out: Where to write, (N, S, F), contiguous, in the terms' type.
    Returns:
        (N, S, F); zeros where a sample is absent from all terms.
    Raises:
        ValueError: On an unknown activation, shapes or types that do not fit, or an `out` with other strides.
    """
    up = terms[0].up
    shape = (num_samples, *up.shape[1:])
    _check("mlp_hidden", terms, activation, bias, shape)
    if out is None:
        out = up.new_empty(shape)
    elif out.shape != shape or out.dtype != up.dtype or not out.is_contiguous():
        raise ValueError(
            f"mlp_hidden: out must be contiguous {shape} {up.dtype}, got {tuple(out.shape)} {out.dtype} with strides "
            f"{out.stride()}. Allocate it so."
        )
    if out.numel():
        n, s, f = shape
        config = blocks(f)
        num_items = -(-n * s // config["BLOCK_R"]) * -(-f // config["BLOCK_F"])
        grid = (min(num_items, num_processors(up.device) * FORWARD_OCCUPANCY),)
        tensors = [contiguous(value) for term in terms for value in (term.up, term.slots, term.factor)]
        scales = [term.scale for term in terms]
        with device_of(up):
            _mlp_hidden_fwd_kernel[grid](
                *tensors, *[None] * (6 - len(tensors)), contiguous(bias), out, scales[0], scales[-1], n * s, s,
                F=f, GELU=activation == "gelu", **config, num_warps=NUM_WARPS, **OPTIONS,
            )  # fmt: skip
    return out


def mlp_hidden_backward(
    grad: Tensor,
    terms: Sequence[Hidden],
    activation: str,
    *,
    bias: Tensor | None = None,
    d_ups: Sequence[Tensor],
    want_hidden: bool,
    want_bias: bool,
    programs: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Differentiate `mlp_hidden`, and compute it again, in one pass.

    Args:
        grad: Gradient of the result, (N, S, F), in the terms' type.
        terms: As in the forward pass.
        activation: As in the forward pass.
        bias: As in the forward pass.
        d_ups: Where the gradient of each term is written, as it is and contiguous; rows that no slot names stay as they are. May
            be `grad` itself where there is one term without slots.
        want_hidden: Whether to return the activations.
        want_bias: Whether to return the gradient of what was added before the activation, summed over the terms.
        programs: Programs that share the work, each with a partial sum of its own.
    Returns:
        Activations (N, S, F) or None; gradient of the bias (F,) float32 or None.
    Raises:
        ValueError: On an unknown activation, shapes or types that do not fit, or `d_ups` with other strides.
    """
    _check("mlp_hidden_backward", terms, activation, bias, tuple(grad.shape))
    up = terms[0].up
    if grad.dtype != up.dtype:
        raise ValueError(f"mlp_hidden_backward: grad must be {up.dtype}, got {grad.dtype}. Convert it.")
    if len(d_ups) != len(terms):
        raise ValueError(f"mlp_hidden_backward: d_ups must be {len(terms)}, got {len(d_ups)}. Give one for each term.")
    for term, d_up in zip(terms, d_ups):
        if d_up.shape != term.up.shape or d_up.dtype != up.dtype or not d_up.is_contiguous():
            raise ValueError(
                f"mlp_hidden_backward: d_ups must be contiguous {tuple(term.up.shape)} {up.dtype}, got {tuple(d_up.shape)} "
                f"{d_up.dtype} with strides {d_up.stride()}. Allocate them so."
            )
    n, s, f = grad.shape
    config = blocks(f)
    num_blocks = -(-f // config["BLOCK_F"])
    programs = num_processors(grad.device) * BACKWARD_OCCUPANCY if programs is None else programs
    num_parts = min(-(-n * s // config["BLOCK_R"]), max(1, programs // num_blocks))
    hidden = grad.new_empty(grad.shape) if want_hidden else None
    sums = torch.empty((num_parts, f), device=grad.device, dtype=torch.float32) if want_bias else None
    if grad.numel():
        tensors = [
            value
            for term, d_up in zip(terms, d_ups)
            for value in (contiguous(term.up), contiguous(term.slots), contiguous(term.factor), d_up)
        ]
        scales = [term.scale for term in terms]
        with device_of(grad):
            _mlp_hidden_bwd_kernel[(num_parts * num_blocks,)](
                grad.contiguous(), *tensors, *[None] * (8 - len(tensors)), contiguous(bias), hidden, sums,
                scales[0], scales[-1], n * s, s,
                F=f, GELU=activation == "gelu", **config, num_warps=NUM_WARPS, **OPTIONS,
            )  # fmt: skip
    return hidden, None if sums is None else sums.sum(0)


def _check(
    function: str, terms: Sequence[Hidden], activation: str, bias: Tensor | None, shape: tuple[int, ...]
) -> None:
    if not 1 <= len(terms) <= 2:
        raise ValueError(f"{function}: terms must be one or two, got {len(terms)}. Sum more in several calls.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{function}: activation must be one of {ACTIVATIONS}, got {activation!r}. Choose one of them.")
    for number, term in enumerate(terms):
        check_term(function, number, term.up, shape, terms[0].up.dtype, (term.slots, term.factor))
    if bias is not None and bias.shape != shape[2:]:
        raise ValueError(
            f"{function}: bias must be {shape[2:]}, got {tuple(bias.shape)}. Give one number per column."
        )
