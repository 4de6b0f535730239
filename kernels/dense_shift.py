r"""Dense shift: two mixtures of tokens with a residual, and the normalisation that follows, in one pass.

For one sequence x (S, D), mixtures W1, W2 (S, S) and live = (s mod gap != 0),
    h = relu(W1 x + b1),  y = x + live (W2 h + b2),  z = (y - mean y) / sqrt(var y + eps) weight + bias.
A program takes one sequence after the other, in chunks of the width: it mixes a chunk, writes y, merges its means and centred
second moments (Chan et al., "Updating formulae and a pairwise algorithm for computing sample variances", 1979), and goes over
the chunks again for z. The mixtures stay on chip. Products take operands of the compute type and accumulate in float32.
Bytes moved: x read, y, x in the compute type and z written; eager torch passes over tensors of that size some 10 times.
The backward pass is in `dense_shift_backward`.
"""

from __future__ import annotations

from typing import Any

import torch
from fastskel.kernels._backend import (
    INTERPRETED,
    OPTIONS,
    CompileCase,
    Cost,
    cpu_kernel,
    device_of,
    jit,
    num_processors,
    tl,
)
from fastskel.kernels._dense_shift_backward import dense_shift_backward, dense_shift_backward_cost
from fastskel.kernels._dense_shift_tiles import (
    CASE_BYTES,
    CASE_SEQUENCES,
    MAX_BLOCK_S,
    OCCUPANCY,
    check_tokens,
    load_square,
    row_of,
    shifted_tile,
    token_block,
)
from fastskel.kernels.reference import dense_shift as reference
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = [
    "dense_shift",
    "dense_shift_backward",
    "dense_shift_backward_cost",
    "dense_shift_forward",
    "dense_shift_forward_cost",
]

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def dense_shift(
    x: Tensor,
    wt1: Tensor,
    b1: Tensor,
    wt2: Tensor,
    b2: Tensor,
    gap: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Mix the tokens of sequences, leaving every gap-th as it is, and normalise them. Differentiable.

    Args:
        x: Tokens, (N, S, D), S at most 192.
        wt1: First mixture, (S, S); its type is the compute type: that of x, or 16 bits beside float32.
        b1: Its bias, (S,), in the compute type.
        wt2: Second mixture, (S, S), in the compute type.
        b2: Its bias, (S,), in the compute type.
        gap: Tokens whose number is a multiple of it pass unchanged, at least 1.
        weight: Weight of the normalisation, (D,).
        bias: Its bias, (D,), in the weight's type.
        eps: What is added to the variance.
    Returns:
        Shifted tokens, (N, S, D), in the type of x, and normalised ones, (N, S, D), in the compute type.
    Raises:
        ValueError: On shapes, types, devices and numbers out of range.
    """
    _check(x, (wt1, b1, wt2, b2, weight, bias), gap, eps)
    shifted, z, _, _ = _operator(x, wt1, b1, wt2, b2, gap, weight, bias, eps)
    return shifted, z


def _check(x: Tensor, parameters: tuple[Tensor, ...], gap: int, eps: float) -> None:
    if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] == 0:
        raise ValueError(f"dense_shift: x must be (N, S, D), got {tuple(x.shape)}. Give tokens of sequences.")
    S, D = x.shape[1:]
    check_tokens("dense_shift", S)
    native = x.is_cuda or INTERPRETED
    if x.dtype not in TYPES and (native or x.dtype != torch.float64):
        raise ValueError(f"dense_shift: x must be float32, bfloat16 or float16, got {x.dtype}. Convert it.")
    compute = parameters[0].dtype
    if compute != x.dtype and (x.dtype != torch.float32 or compute not in TYPES):
        raise ValueError(
            f"dense_shift: wt1 must be {x.dtype}, or 16 bits beside float32, got {compute}. Convert the mixtures."
        )
    kinds = (*TYPES, x.dtype)
    shapes = ((S, S), (S,), (S, S), (S,), (D,), (D,))
    for name, parameter, shape in zip(("wt1", "b1", "wt2", "b2", "weight", "bias"), parameters, shapes):
        allowed = (parameters[4].dtype,) if name == "bias" else kinds if name == "weight" else (compute,)
        if parameter.shape != shape or parameter.dtype not in allowed or parameter.device != x.device:
            raise ValueError(
                f"dense_shift: {name} must be {allowed[0]} {shape} on {x.device}, got {parameter.dtype} "
                f"{tuple(parameter.shape)} on {parameter.device}. Take its leading block, and convert it."
            )
    if gap < 1:
        raise ValueError(f"dense_shift: gap must be at least 1, got {gap}. With 1 every token passes unchanged.")
    if not eps > 0:
        raise ValueError(f"dense_shift: eps must be above 0, got {eps}. Layer normalisation takes 1e-5.")


@jit(do_not_specialize=["num_sequences", "gap"])
def _dense_shift_fwd_kernel(
    p_x, p_wt1, p_b1, p_wt2, p_b2, p_weight, p_bias, p_slots, p_shifted, p_xb, p_z, p_mean, p_rstd,
    num_sequences, stride_wt1, stride_wt2, gap, eps,
    ROUND: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    residual: tl.constexpr = p_x.dtype.element_ty if ROUND else tl.float32
    o_k = tl.arange(0, BLOCK_S)
    # the whole mixtures where tokens are one block; otherwise not used
    b_wt1 = load_square(p_wt1, o_k, o_k, o_k < S, stride_wt1, S)
    b_wt2 = load_square(p_wt2, o_k, o_k, (o_k < S) & (o_k % gap != 0), stride_wt2, S)
    b_b1 = tl.load(p_b1 + o_k, mask=o_k < S, other=0.0).to(tl.float32)
    for i_n in range(tl.program_id(0), num_sequences, tl.num_programs(0)):
        o_n = tl.cast(i_n, tl.int64) * (S * D)
        i_row = row_of(p_slots, i_n)
        o_row = i_row * S
        for s_block in range(tl.cdiv(S, BLOCK_S)):
            o_s = s_block * BLOCK_S + o_k
            m_s = o_s < S
            m_live = m_s & (o_s % gap != 0)
            b_b2 = tl.load(p_b2 + o_s, mask=m_live, other=0.0).to(tl.float32)
            mean = tl.zeros([BLOCK_S], tl.float32)
            moment = tl.zeros([BLOCK_S], tl.float32)
            for i_d in range(0, D, BLOCK_D):
                o_d = i_d + tl.arange(0, BLOCK_D)
                m_d = (o_d < D)[None, :]
                o_x = o_s[:, None] * D + o_d[None, :]
                _, b_xb, _, shifted = shifted_tile(
                    p_x + o_n, p_wt1, p_b1, p_wt2, b_wt1, b_b1, b_wt2, b_b2, o_s, m_live, o_d, stride_wt1, stride_wt2,
                    S, D, BLOCK_S,
                )  # fmt: skip
                shifted = shifted.to(residual)
                if p_shifted is not None:
                    tl.store(p_shifted + o_n + o_x, shifted, mask=m_s[:, None] & m_d)
                if p_xb is not None:
                    tl.store(p_xb + o_n + o_x, b_xb, mask=m_s[:, None] & m_d)
                # statistics of the chunk, merged into those of the chunks before
                shifted = shifted.to(tl.float32)
                count = tl.minimum(D - i_d, BLOCK_D).to(tl.float32)
                chunk_mean = tl.sum(tl.where(m_d, shifted, 0.0), 1) / count
                centred = tl.where(m_d, shifted - chunk_mean[:, None], 0.0)
                delta = chunk_mean - mean
                share = count / (i_d + count)
                mean += delta * share
                moment += tl.sum(centred * centred, 1) + delta * delta * (i_d * share)
            if i_row >= 0:
                rstd = 1.0 / tl.sqrt(moment / D + eps)
                tl.store(p_mean + o_row + o_s, mean, mask=m_s)
                tl.store(p_rstd + o_row + o_s, rstd, mask=m_s)
                # other threads may have written what is read next
                tl.debug_barrier()
                # last chunk first: it is the likeliest to be cached
                for i_back in range((D + BLOCK_D - 1) // BLOCK_D):
                    o_d = ((D - 1) // BLOCK_D - i_back) * BLOCK_D + tl.arange(0, BLOCK_D)
                    o_x = o_s[:, None] * D + o_d[None, :]
                    m_x = m_s[:, None] & (o_d < D)[None, :]
                    if p_shifted is not None:
                        shifted = tl.load(p_shifted + o_n + o_x, mask=m_x, other=0.0)
                    else:
                        _, _, _, shifted = shifted_tile(
                            p_x + o_n, p_wt1, p_b1, p_wt2, b_wt1, b_b1, b_wt2, b_b2, o_s, m_live, o_d, stride_wt1,
                            stride_wt2, S, D, BLOCK_S,
                        )  # fmt: skip
                    xhat = (shifted.to(residual).to(tl.float32) - mean[:, None]) * rstd[:, None]
                    b_weight = tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
                    b_bias = tl.load(p_bias + o_d, mask=o_d < D, other=0.0).to(tl.float32)
                    z = xhat * b_weight[None, :] + b_bias[None, :]
                    tl.store(p_z + o_row * D + o_x, z.to(p_z.dtype.element_ty), mask=m_x)


def launch_options(num_tokens: int, itemsize: int) -> dict[str, int]:
    """Choose tiles and warps of a forward pass over (N, S, D) for a compute type of so many bytes."""
    # products of float32 have no matrix instruction: each thread holds its operands
    wide = itemsize == 4
    return {
        "BLOCK_S": token_block(num_tokens),
        "BLOCK_D": 16 if wide else 64,
        # several blocks of tokens take registers of twice as many threads
        "num_warps": 8 if wide or num_tokens > MAX_BLOCK_S else 4,
        # with two stages the next chunk would be waited for at once
        "num_stages": 1 if wide else 3,
    }


def dense_shift_forward(
    x: Tensor,
    wt1: Tensor,
    b1: Tensor,
    wt2: Tensor,
    b2: Tensor,
    gap: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    z: Tensor,
    slots: Tensor | None = None,
    want_cast: bool,
    want_shifted: bool = True,
    residual: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Launch the forward pass; writes the normalised tokens to `z`.

    Args:
        x: Tokens, (N, S, D), in the residual type; or in the compute type, to make again what came of them.
        wt1: First mixture, (S, S), in the compute type; may be a leading block of a larger matrix.
        b1: Its bias, (S,).
        wt2: Second mixture, (S, S), as the first.
        b2: Its bias, (S,).
        gap: Every gap-th token passes unchanged.
        weight: Weight of the normalisation, (D,).
        bias: Its bias, (D,).
        eps: What is added to the variance.
        z: Where normalised tokens go, (rows, S, D), contiguous, in the compute type.
        slots: Row of each sequence in `z`, (N,), int32, negative for none; None where all are there in order.
        want_cast: Whether to return x in the compute type.
        want_shifted: Whether to return shifted tokens.
        residual: Type of shifted tokens, float32 or that of x, which is the default.
    Returns:
        Shifted tokens (N, S, D) in the residual type or None; x in the compute type, x itself where it is, or None; means and
        reciprocal deviations (rows, S), float32.
    Raises:
        ValueError: If there are too many tokens, or `z` is not contiguous.
    """
    num_sequences, S, D = x.shape
    check_tokens("dense_shift_forward", S)
    if not z.is_contiguous():
        raise ValueError(
            f"dense_shift_forward: z must be contiguous, got strides {z.stride()}. Give leading rows of a larger tensor."
        )
    x = x.contiguous()
    dtype = wt1.dtype
    residual = x.dtype if residual is None else residual
    shifted = torch.empty_like(x, dtype=residual) if want_shifted else None
    stored = torch.empty_like(x, dtype=dtype) if want_cast and x.dtype != dtype else None
    mean = torch.empty((z.shape[0], S), device=x.device, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.numel():
        wt1, wt2 = (w if w.stride(1) == 1 else w.contiguous() for w in (wt1, wt2))
        grid = (min(num_sequences, num_processors(x.device) * OCCUPANCY),)
        with device_of(x):
            _dense_shift_fwd_kernel[grid](
                x,
                wt1,
                b1.contiguous(),
                wt2,
                b2.contiguous(),
                weight.contiguous(),
                bias.contiguous(),
                None if slots is None else slots.contiguous(),
                shifted,
                stored,
                z,
                mean,
                rstd,
                num_sequences,
                wt1.stride(0),
                wt2.stride(0),
                gap,
                eps,
                ROUND=residual != torch.float32,
                S=S,
                D=D,
                **launch_options(S, dtype.itemsize),
                **OPTIONS,
            )
    xb = None if not want_cast else x if stored is None else stored
    return shifted, xb, mean, rstd


def dense_shift_forward_cost(
    num_sequences: int, num_tokens: int, width: int, rows: int, compute: int, x: int, shifted: int, cast: int
) -> Cost:
    """Count the forward pass over (N, S, D) with `rows` normalised.

    Args:
        num_sequences: N.
        num_tokens: S.
        width: D.
        rows: Sequences whose normalised tokens are written.
        compute: Bytes of the compute type.
        x: Bytes of the input's type.
        shifted: Those of shifted tokens, 0 where they are not written.
        cast: Those of the input in the compute type, 0 where it is not written.
    """
    tile = num_tokens * width
    flops = 4 * num_sequences * num_tokens * tile
    moved = num_sequences * tile * (x + shifted + cast) + rows * (tile * compute + 8 * num_tokens)
    weights = 2 * (num_tokens + 1) * num_tokens * compute + 8 * width
    return Cost(flops, moved + weights + 4 * num_sequences)


def _case(num_tokens: int, compute: str, residual: str, shifted: bool = True, hot: bool = False) -> CompileCase:
    options, n, size = launch_options(num_tokens, CASE_BYTES[compute]), CASE_SEQUENCES, CASE_BYTES
    x, cast = residual if shifted else compute, shifted and compute != residual
    types = dict.fromkeys(("p_wt1", "p_b1", "p_wt2", "p_b2", "p_xb", "p_z"), compute)
    types |= dict.fromkeys(("p_weight", "p_bias", "p_mean", "p_rstd"), "fp32")
    types |= {"p_x": x, "p_slots": "i32", "p_shifted": residual}
    absent = [name for name, wanted in (("p_shifted", shifted), ("p_xb", cast)) if not wanted]
    sizes = {**dict.fromkeys(("num_sequences", "stride_wt1", "stride_wt2", "gap"), "i32"), "eps": "fp32"}
    tiles = {"ROUND": residual != "fp32", "S": num_tokens, "D": 1024}
    return CompileCase(
        label=f"S={num_tokens} D=1024 {compute} in {residual}{'' if shifted else ' again'}",
        kernel=_dense_shift_fwd_kernel,
        signature={name: f"*{type}" for name, type in types.items() if name not in absent} | sizes,
        constexprs={**dict.fromkeys(absent), **tiles, **{name: options[name] for name in ("BLOCK_S", "BLOCK_D")}},
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        cost=dense_shift_forward_cost(
            n, num_tokens, 1024, n, size[compute], size[x], size[residual] * shifted, size[compute] * cast
        ),
        hot=hot,
    )


# "again": what a backward pass makes anew, from the input in the compute type
COMPILE_CASES = [
    _case(64, "bf16", "fp32", hot=True),
    _case(64, "bf16", "fp32", shifted=False, hot=True),
    _case(50, "bf16", "fp32", hot=True),
    _case(50, "bf16", "fp32", shifted=False, hot=True),
    _case(64, "fp32", "fp32"),
    _case(64, "fp16", "fp32"),
    _case(192, "bf16", "fp32"),
]


def dense_shift_triton(
    x: Tensor, wt1: Tensor, b1: Tensor, wt2: Tensor, b2: Tensor, gap: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward pass of the operator over (N, S, D); returns what `reference.dense_shift` does."""
    z = torch.empty(x.shape, device=x.device, dtype=wt1.dtype)
    shifted, _, mean, rstd = dense_shift_forward(
        x, wt1, b1, wt2, b2, gap, weight, bias, eps, z=z, want_cast=False, want_shifted=True
    )
    assert shifted is not None
    return shifted, z, mean, rstd


def dense_shift_backward_triton(
    dz: Tensor, d_shifted: Tensor, x: Tensor, wt1: Tensor, b1: Tensor, wt2: Tensor, b2: Tensor, gap: int, weight: Tensor,
    mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward pass of the operator over (N, S, D); returns what `reference.dense_shift_backward` does."""
    into = torch.zeros(x.shape, device=x.device, dtype=x.dtype)
    sums = dense_shift_backward(dz, d_shifted, into, x.to(wt1.dtype), wt1, b1, wt2, b2, gap, weight, mean, rstd)
    # parts of one buffer: an operator's outputs share no memory
    d_wt1, d_b1, d_wt2, d_b2, d_weight, d_bias = (t.clone(memory_format=torch.contiguous_format) for t in sums)
    return into, d_wt1, d_b1, d_wt2, d_b2, d_weight, d_bias


def _on_cpu(function: Any) -> Any:
    # autocast stays on inside an operator, and would choose other types than its arguments'; strides of results are the fakes'
    def run(*arguments: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return function(*(a.contiguous() if isinstance(a, Tensor) else a for a in arguments))

    return run


def _reference_backward(dz: Tensor, d_shifted: Tensor, x: Tensor, wt1: Tensor, *rest: Any) -> Any:
    return reference.dense_shift_backward(dz, d_shifted, x.to(wt1.dtype), wt1, *rest)


_operator = torch.library.custom_op(
    "fastskel::dense_shift",
    dense_shift_triton,
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor x, Tensor wt1, Tensor b1, Tensor wt2, Tensor b2, int gap, Tensor weight, Tensor bias, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
_operator.register_kernel("cpu")(_on_cpu(cpu_kernel(reference.dense_shift, dense_shift_triton)))
_backward_operator = torch.library.custom_op(
    "fastskel::dense_shift_backward",
    dense_shift_backward_triton,
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor dz, Tensor d_shifted, Tensor x, Tensor wt1, Tensor b1, Tensor wt2, Tensor b2, int gap, Tensor weight, "
    "Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_backward_operator.register_kernel("cpu")(_on_cpu(cpu_kernel(_reference_backward, dense_shift_backward_triton)))


@_operator.register_fake
def _(
    x: Tensor, wt1: Tensor, b1: Tensor, wt2: Tensor, b2: Tensor, gap: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, ...]:
    wide = torch.promote_types(x.dtype, torch.float32)
    statistics = [x.new_empty(x.shape[:2], dtype=wide) for _ in range(2)]
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=wt1.dtype), *statistics


@_backward_operator.register_fake
def _(
    dz: Tensor, d_shifted: Tensor, x: Tensor, wt1: Tensor, b1: Tensor, wt2: Tensor, b2: Tensor, gap: int, weight: Tensor,
    mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = [x.new_empty(t.shape, dtype=wide) for t in (wt1, b1, wt2, b2, weight, weight)]
    return x.new_empty(x.shape), *sums


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, wt1, b1, wt2, b2, gap, weight, bias, _ = inputs
    ctx.save_for_backward(x, wt1, b1, wt2, b2, weight, output[2], output[3])
    ctx.gap, ctx.bias_dtype = gap, bias.dtype


def _differentiate(ctx: Any, d_shifted: Tensor, dz: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, wt1, b1, wt2, b2, weight, mean, rstd = ctx.saved_tensors
    dx, d_wt1, d_b1, d_wt2, d_b2, d_weight, d_bias = _backward_operator(
        dz, d_shifted, x, wt1, b1, wt2, b2, ctx.gap, weight, mean, rstd
    )
    mixtures = (d.to(wt1.dtype) for d in (d_wt1, d_b1, d_wt2, d_b2))
    return dx, *mixtures, None, d_weight.to(weight.dtype), d_bias.to(ctx.bias_dtype), None


_operator.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.fastskel.dense_shift)
def _(x_shape: Any, *_: Any, **__: Any) -> int:
    return dense_shift_forward_cost(*x_shape, x_shape[0], 0, 0, 0, 0).flops


@register_flop_formula(torch.ops.fastskel.dense_shift_backward)
def _(dz_shape: Any, *_: Any, **__: Any) -> int:
    return dense_shift_backward_cost(*dz_shape, dz_shape[0], 0, 0).flops
