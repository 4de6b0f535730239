r"""Maximum over tokens that keeps one bit per element for its gradient.

    y_nd = max_s x_nsd,        dx_nsd = dy_nd / c_nd where x_nsd = y_nd, else 0,        c_nd = #{s : x_nsd = y_nd}

A column that holds NaN has the maximum NaN, no winner, and a gradient of NaN; the gradient outside the winners is 0 times the
share, so that what is not finite reaches the whole column, as under torch.amax.
Bytes moved for N S D elements of b bytes: forward b + 1/8 per element, backward b + 1/8. Eager torch moves 2 b + 1 forward (the
maximum, and the comparison with it) and 3 b + 2 backward, and keeps a byte per element, or under amax its input.
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
from fastskel.kernels.reference.token_pool import WORD_BITS
from fastskel.kernels.reference.token_pool import token_pool_backward as token_pool_backward_reference
from fastskel.kernels.reference.token_pool import token_pool_forward as token_pool_forward_reference
from torch import Tensor

__all__ = ["token_pool", "token_pool_backward", "token_pool_cost", "token_pool_forward"]

TYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_TOKENS = 1024
# elements of one program, which holds all tokens of its columns at once: 32 registers of a thread
TILE = 4096
# 256 bytes of float32; more columns add nothing, fewer than 16 waste half of what a transaction reads
MAX_BLOCK_D, MIN_BLOCK_D = 64, 16
# programs that a multiprocessor holds at a time
OCCUPANCY = 5


def token_pool(x: Tensor) -> Tensor:
    """Maximum over tokens, equal to `x.amax(1)` with its gradient: ties share it evenly.

    Autograd keeps one bit per element. There is no second derivative.

    Args:
        x: Tokens, (N, S, D), S from 1 to 1024; float32, bfloat16 or float16, on the CPU float64 too.
    Returns:
        Maxima, (N, D), in the type of x. A column (N, :, D) that holds NaN has the maximum NaN and an all-NaN gradient.
    Raises:
        ValueError: On another shape or type.
    """
    if x.dim() != 3 or not 1 <= x.shape[1] <= MAX_TOKENS:
        raise ValueError(
            f"token_pool: x must be (N, S, D) with S from 1 to {MAX_TOKENS}, got {tuple(x.shape)}. Put the tokens second."
        )
    # a kernel computes in float32; the reference on the CPU in the type that it is given
    narrow = x.is_cuda or INTERPRETED
    if x.dtype not in TYPES and (narrow or x.dtype != torch.float64):
        raise ValueError(f"token_pool: x must be float32, bfloat16 or float16, got {x.dtype}. Convert it.")
    values: Tensor = _operator(x, torch.is_grad_enabled() and x.requires_grad)[0]
    return values


@jit(do_not_specialize=["num_samples", "num_tokens"])
def _token_pool_fwd_kernel(
    p_x, p_values, p_winners, num_samples, num_tokens, D: tl.constexpr, WORDS: tl.constexpr, BLOCK_D: tl.constexpr
):
    i_word = tl.arange(0, WORDS)
    i_bit = tl.arange(0, 32)
    i_s = (i_word[:, None] * 32 + i_bit[None, :])[:, :, None]
    num_blocks = tl.cdiv(D, BLOCK_D)
    for item in range(tl.program_id(0), num_samples * num_blocks, tl.num_programs(0)):
        i_n = (item // num_blocks).to(tl.int64)
        i_d = item % num_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
        m_d = i_d < D
        m_x = (i_s < num_tokens) & m_d[None, None, :]
        b_x = tl.load(p_x + i_n * num_tokens * D + i_s * D + i_d[None, None, :], mask=m_x, other=float("-inf"))
        b_x = b_x.to(tl.float32)
        # the maximum passes over NaN: found apart
        b_max = tl.max(tl.max(b_x, 1), 0)
        m_nan = tl.max(tl.max((b_x != b_x).to(tl.int32), 1), 0) != 0
        b_max = tl.where(m_nan, float("nan"), b_max)
        tl.store(p_values + i_n * D + i_d, b_max.to(p_values.dtype.element_ty), mask=m_d)
        if p_winners is not None:
            m_won = (b_x == b_max[None, None, :]) & m_x
            # bits are disjoint: their sum is the word
            b_words = tl.sum(m_won.to(tl.int32) << i_bit[None, :, None], 1)
            num_words = tl.cdiv(num_tokens, 32)
            o_words = (i_n * num_words + i_word[:, None]) * D + i_d[None, :]
            tl.store(p_winners + o_words, b_words, mask=(i_word < num_words)[:, None] & m_d[None, :])


@jit(do_not_specialize=["num_samples", "num_tokens"])
def _token_pool_bwd_kernel(
    p_grad, p_winners, p_dx, num_samples, num_tokens, D: tl.constexpr, WORDS: tl.constexpr, BLOCK_D: tl.constexpr
):
    i_word = tl.arange(0, WORDS)
    i_bit = tl.arange(0, 32)
    i_s = (i_word[:, None] * 32 + i_bit[None, :])[:, :, None]
    num_blocks = tl.cdiv(D, BLOCK_D)
    num_words = tl.cdiv(num_tokens, 32)
    for item in range(tl.program_id(0), num_samples * num_blocks, tl.num_programs(0)):
        i_n = (item // num_blocks).to(tl.int64)
        i_d = item % num_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
        m_d = i_d < D
        o_words = (i_n * num_words + i_word[:, None]) * D + i_d[None, :]
        m_words = (i_word < num_words)[:, None] & m_d[None, :]
        b_words = tl.load(p_winners + o_words, mask=m_words, other=0)
        b_won = (b_words[:, None, :] >> i_bit[None, :, None]) & 1
        b_count = tl.sum(tl.sum(b_won, 1), 0).to(tl.float32)
        b_grad = tl.load(p_grad + i_n * D + i_d, mask=m_d, other=0.0).to(tl.float32)
        # rounded as torch divides in the gradient's type; no winner, no finite share
        b_share = tl.where(b_count > 0, tl.div_rn(b_grad, tl.maximum(b_count, 1.0)), float("nan"))
        b_share = b_share.to(p_grad.dtype.element_ty).to(tl.float32)
        b_dx = tl.where(b_won != 0, b_share[None, None, :], (0.0 * b_share)[None, None, :])
        o_dx = i_n * num_tokens * D + i_s * D + i_d[None, None, :]
        m_dx = (i_s < num_tokens) & m_d[None, None, :]
        tl.store(p_dx + o_dx, b_dx.to(p_dx.dtype.element_ty), mask=m_dx)


def _config(num_tokens: int, width: int) -> dict[str, int]:
    """Choose the tile: all tokens, whole words, and as many columns as registers hold."""
    words = _power_of_two(-(-num_tokens // WORD_BITS))
    block = min(MAX_BLOCK_D, max(MIN_BLOCK_D, TILE // (words * WORD_BITS)), _power_of_two(width))
    return {"WORDS": words, "BLOCK_D": block, "num_warps": 4 if words * WORD_BITS * block <= TILE else 8}


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def token_pool_cost(num_samples: int, num_tokens: int, width: int, itemsize: int = 4, winners: bool = True) -> Cost:
    """Cost of one pass over (N, S, D), forward or backward: the tensor, its maxima, and the words of the winners."""
    words = -(-num_tokens // WORD_BITS) if winners else 0
    return Cost(0, num_samples * width * (itemsize * (num_tokens + 1) + 4 * words))


def _compile_cases() -> list[CompileCase]:
    samples, width = 1424, 1024
    cases = []
    # sizes are arguments: one tile serves 50 and 64 tokens
    for kind, hot in (("fp32", True), ("bf16", False), ("fp16", False)):
        itemsize = 4 if kind == "fp32" else 2
        constexprs = {"D": width, **_config(64, width)}
        num_warps = constexprs.pop("num_warps")
        sizes = {"num_samples": "i32", "num_tokens": "i32"}
        common = {"num_warps": num_warps, "cost": token_pool_cost(samples, 64, width, itemsize), "hot": hot}
        cases += [
            CompileCase(
                f"S=50, 64 {kind}", _token_pool_fwd_kernel,
                {"p_x": f"*{kind}", "p_values": f"*{kind}", "p_winners": "*i32", **sizes}, constexprs, **common,
            ),
            CompileCase(
                f"S=50, 64 {kind}", _token_pool_bwd_kernel,
                {"p_grad": f"*{kind}", "p_winners": "*i32", "p_dx": f"*{kind}", **sizes}, constexprs, **common,
            ),
        ]  # fmt: skip
    return cases


COMPILE_CASES = _compile_cases()


def token_pool_forward(x: Tensor, want_winners: bool) -> tuple[Tensor, Tensor | None]:
    """Launch the forward kernel on x (N, S, D).

    Returns:
        Maxima (N, D) in the type of x; winners (N, ceil(S / 32), D) int32, bit s % 32 of word s // 32, or None.
    """
    _check_type("token_pool_forward", "x", x.dtype)
    x = x.contiguous()
    n, s, d = x.shape
    values = x.new_empty(n, d)
    winners = x.new_empty(n, -(-s // WORD_BITS), d, dtype=torch.int32) if want_winners else None
    _launch(_token_pool_fwd_kernel, x, values, winners, n, s, d)
    return values, winners


def token_pool_backward(grad: Tensor, winners: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
    """Launch the backward kernel on the gradient (N, D) and the forward pass's winners; returns (N, S, D) in `dtype`."""
    _check_type("token_pool_backward", "grad", grad.dtype)
    _check_type("token_pool_backward", "dtype", dtype)
    n, d = grad.shape
    dx = grad.new_empty(n, num_tokens, d, dtype=dtype)
    _launch(_token_pool_bwd_kernel, grad.contiguous(), winners.contiguous(), dx, n, num_tokens, d)
    return dx


def _check_type(function: str, argument: str, dtype: torch.dtype) -> None:
    if dtype not in TYPES:
        raise ValueError(f"{function}: {argument} must be float32, bfloat16 or float16, got {dtype}. Convert it.")


def _launch(kernel: Any, first: Tensor, second: Tensor, third: Tensor | None, n: int, s: int, d: int) -> None:
    if n and d:
        config = _config(s, d)
        num_items = n * -(-d // config["BLOCK_D"])
        grid = (min(num_items, num_processors(first.device) * OCCUPANCY),)
        with device_of(first):
            kernel[grid](first, second, third, n, s, D=d, **config, **OPTIONS)


def _forward(x: Tensor, want_winners: bool) -> tuple[Tensor, Tensor]:
    values, winners = token_pool_forward(x, want_winners)
    return values, x.new_empty(0, dtype=torch.int32) if winners is None else winners


_operator = torch.library.custom_op(
    "fastskel::token_pool",
    _forward,
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor x, bool want_winners) -> (Tensor, Tensor)",
)
_operator.register_kernel("cpu")(cpu_kernel(token_pool_forward_reference, _forward))

_backward_operator = torch.library.custom_op(
    "fastskel::token_pool_backward",
    token_pool_backward,
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor grad, Tensor winners, int num_tokens, ScalarType dtype) -> Tensor",
)
_backward_operator.register_kernel("cpu")(cpu_kernel(token_pool_backward_reference, token_pool_backward))


@_operator.register_fake
def _(x: Tensor, want_winners: bool) -> tuple[Tensor, Tensor]:
    n, s, d = x.shape
    shape = (n, -(-s // WORD_BITS), d) if want_winners else (0,)
    return x.new_empty(n, d), x.new_empty(shape, dtype=torch.int32)


@_backward_operator.register_fake
def _(grad: Tensor, winners: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(grad.shape[0], num_tokens, grad.shape[1], dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.num_tokens = inputs[0].shape[1]
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    (winners,) = ctx.saved_tensors
    return _backward_operator(grad, winners, ctx.num_tokens, grad.dtype), None


_operator.register_autograd(_differentiate, setup_context=_setup)
