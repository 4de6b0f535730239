r"""Bidirectional attention over short token sets, the scores of which never reach global memory.

Per sequence and head, with queries, keys and values (S, C), key j taking part where it is present,
    s = scale q k',  lse_i = log sum_j exp s_ij,  p = exp(s - lse),  out = p v;
the backward pass is `fastskel.kernels.attention_backward`. The scores of a tile of queries against all keys fit in registers, so
that the softmax is a plain one: a program streams the width of one sequence and head past them in chunks, twice. Sets of up to 64
tokens are one tile.
Bytes moved, in tensors (N, H, S, C): 3 with shared keys and values, 4 with separate ones; eager torch adds some 5 passes over
(N, H, S, S).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from fastskel.kernels._attention_tiles import (
    MAX_TOKENS,
    SHAPES,
    SIZES,
    STRIDES,
    attention_cost,
    choose_blocks,
    compile_case,
    empty_heads,
    load_rows,
    place,
    present_keys,
    readable,
    store_rows,
    strides_of,
)
from fastskel.kernels._backend import INTERPRETED, OPTIONS, cpu_kernel, device_of, jit, tl
from fastskel.kernels._product import product
from fastskel.kernels.attention_backward import attention_backward
from fastskel.kernels.reference.attention import attention_forward as attention_forward_reference
from fastskel.kernels.reference.attention_backward import attention_backward as attention_backward_reference
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["MAX_HEAD_DIM", "MAX_TOKENS", "attention", "attention_backward", "attention_cost", "attention_forward"]

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_HEAD_DIM = 1024


def attention(
    q: Tensor, k: Tensor, v: Tensor | None = None, *, key_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Mix values by the softmax of scaled products of queries and keys, within each sequence and head.

    Args:
        q: Queries, (N, H, S, C), S up to 192, C up to 1024; float32, bfloat16, float16, on the CPU also float64.
        k: Keys, (N, H, S, C).
        v: Values, (N, H, S, C); None: the keys.
        key_mask: True where a key is present, (N, S), bool; absent ones are not read. All queries are answered, with zeros
            where no key is present.
        scale: Factor of the products; None: 1 / sqrt(C).
    Returns:
        Mixed values, (N, H, S, C), in the type of `q`, in the memory order of (N, S, H, C).
    Raises:
        ValueError: On shapes, types and devices that are not these.
    """
    _check(q, k, v, key_mask)
    out, _ = _forward(q, k, v, key_mask, 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale))
    return out  # type: ignore[no-any-return]


def _check(q: Tensor, k: Tensor, v: Tensor | None, key_mask: Tensor | None) -> None:
    if q.ndim != 4 or not 1 <= q.shape[2] <= MAX_TOKENS or not 1 <= q.shape[3] <= MAX_HEAD_DIM or q.shape[1] < 1:
        raise ValueError(
            f"attention: q must be (N, H, S, C) with H at least 1, S in [1, {MAX_TOKENS}] and C in [1, {MAX_HEAD_DIM}], "
            f"got {tuple(q.shape)}. Use torch's scaled_dot_product_attention for others."
        )
    if q.dtype not in TYPES or (q.dtype == torch.float64 and (INTERPRETED or q.device.type != "cpu")):
        raise ValueError(
            f"attention: q must be float32, bfloat16 or float16, got {q.dtype} on {q.device}. Convert it; float64 is "
            "for the CPU."
        )
    for name, value in (("k", k), ("v", v)):
        if value is not None and (value.shape != q.shape or value.dtype != q.dtype or value.device != q.device):
            raise ValueError(
                f"attention: {name} must be {q.dtype} {tuple(q.shape)} on {q.device} as q, got {value.dtype} "
                f"{tuple(value.shape)} on {value.device}. Give one per query."
            )
    if key_mask is not None:
        shape = (q.shape[0], q.shape[2])
        if key_mask.shape != shape or key_mask.dtype != torch.bool or key_mask.device != q.device:
            raise ValueError(
                f"attention: key_mask must be bool {shape} on {q.device}, got {key_mask.dtype} {tuple(key_mask.shape)} on "
                f"{key_mask.device}. Mark present keys with True."
            )


@jit(do_not_specialize=[*STRIDES, *SIZES])
def _attention_fwd_kernel(
    p_q, p_k, p_v, p_mask, p_out, p_lse,
    q_n, q_h, q_s, k_n, k_h, k_s, v_n, v_h, v_s, num_heads, num_tokens, scale,
    C: tl.constexpr, UNIT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    num_chunks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_n, i_h, i_q = place(num_heads, num_tokens, BLOCK_Q)
    i_k = tl.arange(0, BLOCK_K)
    m_q = i_q < num_tokens
    m_k = present_keys(p_mask, i_n, i_k, num_tokens)
    p_qh = p_q + (i_n * q_n + i_h * q_h) * UNIT
    p_kh = p_k + (i_n * k_n + i_h * k_h) * UNIT
    p_vh = p_v + (i_n * v_n + i_h * v_h) * UNIT

    b_s = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for i_chunk in range(num_chunks):
        i_c = i_chunk * BLOCK_C
        b_q = load_rows(p_qh, q_s * UNIT, i_q, m_q, i_c, C, BLOCK_C)
        b_k = load_rows(p_kh, k_s * UNIT, i_k, m_k, i_c, C, BLOCK_C)
        b_s = product(b_q, tl.trans(b_k), b_s)
    b_s = b_s * scale
    b_max = tl.max(tl.where(m_k[None, :], b_s, float("-inf")), 1)
    # chosen after the difference: without any key, that of two infinities would not be a number
    b_p = tl.exp(tl.where(m_k[None, :], b_s - b_max[:, None], float("-inf")))
    b_total = tl.sum(b_p, 1)
    if p_mask is not None:
        b_total = tl.where(tl.max(m_k.to(tl.int32), 0) > 0, b_total, 1.0)
    b_p = (b_p / b_total[:, None]).to(p_v.dtype.element_ty)

    row = num_heads * C
    p_outh = p_out + i_n * num_tokens * row + i_h * C
    for i_back in range(num_chunks):
        # last chunk first: of shared keys it is the likeliest to be cached
        i_c = (num_chunks - 1 - i_back) * BLOCK_C
        b_v = load_rows(p_vh, v_s * UNIT, i_k, m_k, i_c, C, BLOCK_C)
        store_rows(p_outh, row, i_q, m_q, i_c, product(b_p, b_v, None), C, BLOCK_C)
    tl.store(p_lse + (i_n * num_heads + i_h) * num_tokens + i_q, b_max + tl.log(b_total), mask=m_q)


POINTERS = ("p_q", "p_k", "p_v", "p_mask", "p_out", "p_lse")
COMPILE_CASES = [
    compile_case(shape, _attention_fwd_kernel, POINTERS, set(), 2, 4 - shape.shared, backward=False) for shape in SHAPES
]


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor | None, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel, without validation.

    Args:
        q: Queries, (N, H, S, C).
        k: Keys, (N, H, S, C).
        v: Values, (N, H, S, C); None: the keys.
        key_mask: True where a key is present, (N, S); None: everywhere.
        scale: Factor of the products.
    Returns:
        Mixed values (N, H, S, C); logarithm of the sum of exponentials of scaled scores (N, H, S), float32, -inf where no key
        is present.
    """
    n, h, s, c = q.shape
    q, k = readable(q), readable(k)
    v = k if v is None else readable(v)
    key_mask = None if key_mask is None else key_mask.contiguous()
    out, lse = empty_heads(q), q.new_empty((n, h, s), dtype=torch.float32)
    if n:
        strides, unit = strides_of(q, k, v)
        tile, whole, width, num_warps, num_stages = choose_blocks(s, c, q.dtype, False)
        with device_of(q):
            _attention_fwd_kernel[(n * h * -(-s // tile),)](
                q, k, v, key_mask, out, lse, *strides, h, s, scale,
                C=c, UNIT=unit, BLOCK_Q=tile, BLOCK_K=whole, BLOCK_C=width,
                num_warps=num_warps, num_stages=num_stages, **OPTIONS,
            )  # fmt: skip
    return out, lse


def _laid_out(tensor: Tensor) -> Tensor:
    return empty_heads(tensor).copy_(tensor)


def _forward_reference(
    q: Tensor, k: Tensor, v: Tensor | None, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        out, lse = attention_forward_reference(q, k, v, key_mask, scale)
    return _laid_out(out), lse


def _backward_operator(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor | None, lse: Tensor, key_mask: Tensor | None, scale: float
) -> list[Tensor]:
    gradients = attention_backward(grad, q, k, v, lse, key_mask, scale)
    return [gradient for gradient in gradients if gradient is not None]


def _backward_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor | None, lse: Tensor, key_mask: Tensor | None, scale: float
) -> list[Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        gradients = attention_backward_reference(grad, q, k, v, lse, key_mask, scale)
    return [_laid_out(gradient) for gradient in gradients if gradient is not None]


_forward = torch.library.custom_op(
    "fastskel::attention",
    attention_forward,
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor q, Tensor k, Tensor? v, Tensor? key_mask, float scale) -> (Tensor, Tensor)",
)
_forward.register_kernel("cpu")(cpu_kernel(_forward_reference, attention_forward))
_backward = torch.library.custom_op(
    "fastskel::attention_backward",
    _backward_operator,
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor grad, Tensor q, Tensor k, Tensor? v, Tensor lse, Tensor? key_mask, float scale) -> Tensor[]",
)
_backward.register_kernel("cpu")(cpu_kernel(_backward_reference, _backward_operator))


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor | None, key_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor | None, lse: Tensor, key_mask: Tensor | None, scale: float
) -> list[Tensor]:
    return [empty_heads(q) for _ in range(2 if v is None else 3)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_mask, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, key_mask, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    q, k, v, key_mask, lse = ctx.saved_tensors
    dq, dk, *dv = _backward(grad, q, k, v, lse, key_mask, ctx.scale)
    return dq, dk, dv[0] if dv else None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup)


@register_flop_formula(torch.ops.fastskel.attention)
def _(q_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    n, h, s, c = q_shape
    return attention_cost((n, h, s, c), torch.float32).flops


@register_flop_formula(torch.ops.fastskel.attention_backward)
def _(grad_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    n, h, s, c = grad_shape
    return attention_cost((n, h, s, c), torch.float32, backward=True).flops
