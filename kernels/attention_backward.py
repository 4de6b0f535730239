r"""Backward pass of bidirectional attention over short token sets.

Per sequence and head, with what `fastskel.kernels.attention` returned and p = exp(scale q k' - lse) again,
    dp = grad v',  delta_i = sum_j p_ij dp_ij,  ds = scale p (dp - delta),
    dq = ds k,  dk = ds' q,  dv = p' grad,  and out = p v where it is wanted again;
where the values are the keys, dk is the sum of both. The scores of a tile of queries against all keys fit in registers: a program
streams the width of one sequence and head past them in chunks, twice. Sets of more than 64 tokens take several tiles, and two
kernels: one by tiles of queries, which leaves delta, and one by tiles of keys. Nothing is summed over sequences, so a program
does one tile; looping over several costs 40 registers a thread, for addresses kept between them.
Source: the softmax's backward pass through `delta` is that of FlashAttention-2 (Dao, 2023).
Bytes moved, in tensors (N, H, S, C): 5 with shared keys and values, 7 with separate ones, one more for the output; eager torch
adds some 8 passes over (N, H, S, S).
"""

from __future__ import annotations

from typing import Any

import torch
from fastskel.kernels._attention_tiles import (
    GRAD_STRIDES,
    SHAPES,
    SIZES,
    STRIDES,
    Shape,
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
from fastskel.kernels._backend import OPTIONS, CompileCase, device_of, jit, tl
from fastskel.kernels._product import product
from torch import Tensor

__all__ = ["attention_backward"]

POINTERS = (
    "p_grad", "p_q", "p_k", "p_v", "p_lse", "p_mask", "p_dq", "p_dk", "p_dv", "p_out", "p_delta",
)  # fmt: skip
KEY_POINTERS = ("p_grad", "p_q", "p_k", "p_v", "p_lse", "p_mask", "p_delta", "p_dk", "p_dv")


@jit(do_not_specialize=[*GRAD_STRIDES, *STRIDES, *SIZES])
def _attention_bwd_kernel(
    p_grad, p_q, p_k, p_v, p_lse, p_mask, p_dq, p_dk, p_dv, p_out, p_delta,
    g_n, g_h, g_s, q_n, q_h, q_s, k_n, k_h, k_s, v_n, v_h, v_s, num_heads, num_tokens, scale,
    C: tl.constexpr, UNIT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    num_chunks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_n, i_h, i_q = place(num_heads, num_tokens, BLOCK_Q)
    i_k = tl.arange(0, BLOCK_K)
    m_q = i_q < num_tokens
    m_k = present_keys(p_mask, i_n, i_k, num_tokens)
    p_gh = p_grad + (i_n * g_n + i_h * g_h) * UNIT
    p_qh = p_q + (i_n * q_n + i_h * q_h) * UNIT
    p_kh = p_k + (i_n * k_n + i_h * k_h) * UNIT
    if p_v is not None:
        p_vh = p_v + (i_n * v_n + i_h * v_h) * UNIT

    b_s = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    b_dp = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for i_chunk in range(num_chunks):
        i_c = i_chunk * BLOCK_C
        b_q = load_rows(p_qh, q_s * UNIT, i_q, m_q, i_c, C, BLOCK_C)
        b_k = load_rows(p_kh, k_s * UNIT, i_k, m_k, i_c, C, BLOCK_C)
        b_g = load_rows(p_gh, g_s * UNIT, i_q, m_q, i_c, C, BLOCK_C)
        b_v = b_k
        if p_v is not None:
            b_v = load_rows(p_vh, v_s * UNIT, i_k, m_k, i_c, C, BLOCK_C)
        b_s = product(b_q, tl.trans(b_k), b_s)
        b_dp = product(b_g, tl.trans(b_v), b_dp)

    o_statistics = (i_n * num_heads + i_h) * num_tokens + i_q
    b_lse = tl.load(p_lse + o_statistics, mask=m_q, other=float("inf"))
    b_p = tl.exp(tl.where(m_k[None, :], b_s * scale - b_lse[:, None], float("-inf")))
    b_delta = tl.sum(b_p * b_dp, 1)
    # chosen again: an absent key has no gradient even of a query that is not a number
    b_ds = tl.where(m_k[None, :], b_p * (b_dp - b_delta[:, None]) * scale, 0.0).to(p_q.dtype.element_ty)
    b_p = b_p.to(p_q.dtype.element_ty)

    row = num_heads * C
    o_head = i_n * num_tokens * row + i_h * C
    m_own = i_k < num_tokens
    for i_back in range(num_chunks):
        # last chunk first: it is the likeliest to be cached
        i_c = (num_chunks - 1 - i_back) * BLOCK_C
        b_k = load_rows(p_kh, k_s * UNIT, i_k, m_k, i_c, C, BLOCK_C)
        b_dq = product(b_ds, b_k, None)
        if p_out is not None:
            b_v = b_k
            if p_v is not None:
                b_v = load_rows(p_vh, v_s * UNIT, i_k, m_k, i_c, C, BLOCK_C)
            b_out = product(b_p, b_v, None)
        if p_dk is not None:
            b_q = load_rows(p_qh, q_s * UNIT, i_q, m_q, i_c, C, BLOCK_C)
            b_g = load_rows(p_gh, g_s * UNIT, i_q, m_q, i_c, C, BLOCK_C)
            b_dk = product(tl.trans(b_ds), b_q, None)
            if p_dv is None:
                b_dk = product(tl.trans(b_p), b_g, b_dk)
            else:
                b_dv = product(tl.trans(b_p), b_g, None)
                store_rows(p_dv + o_head, row, i_k, m_own, i_c, b_dv, C, BLOCK_C)
            store_rows(p_dk + o_head, row, i_k, m_own, i_c, b_dk, C, BLOCK_C)
        if p_out is not None:
            store_rows(p_out + o_head, row, i_q, m_q, i_c, b_out, C, BLOCK_C)
        store_rows(p_dq + o_head, row, i_q, m_q, i_c, b_dq, C, BLOCK_C)
    if p_delta is not None:
        tl.store(p_delta + o_statistics, b_delta, mask=m_q)


@jit(do_not_specialize=[*GRAD_STRIDES, *STRIDES, *SIZES])
def _attention_bwd_key_kernel(
    p_grad, p_q, p_k, p_v, p_lse, p_mask, p_delta, p_dk, p_dv,
    g_n, g_h, g_s, q_n, q_h, q_s, k_n, k_h, k_s, v_n, v_h, v_s, num_heads, num_tokens, scale,
    C: tl.constexpr, UNIT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    num_chunks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_n, i_h, i_k = place(num_heads, num_tokens, BLOCK_K)
    i_q = tl.arange(0, BLOCK_Q)
    m_q = i_q < num_tokens
    m_k = present_keys(p_mask, i_n, i_k, num_tokens)
    p_gh = p_grad + (i_n * g_n + i_h * g_h) * UNIT
    p_qh = p_q + (i_n * q_n + i_h * q_h) * UNIT
    p_kh = p_k + (i_n * k_n + i_h * k_h) * UNIT
    p_vh = p_v + (i_n * v_n + i_h * v_h) * UNIT

    # keys by queries: what is summed over queries needs no transposition
    b_s = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    b_dp = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    for i_chunk in range(num_chunks):
        i_c = i_chunk * BLOCK_C
        b_k = load_rows(p_kh, k_s * UNIT, i_k, m_k, i_c, C, BLOCK_C)
        b_q = load_rows(p_qh, q_s * UNIT, i_q, m_q, i_c, C, BLOCK_C)
        b_v = load_rows(p_vh, v_s * UNIT, i_k, m_k, i_c, C, BLOCK_C)
        b_g = load_rows(p_gh, g_s * UNIT, i_q, m_q, i_c, C, BLOCK_C)
        b_s = product(b_k, tl.trans(b_q), b_s)
        b_dp = product(b_v, tl.trans(b_g), b_dp)

    o_statistics = (i_n * num_heads + i_h) * num_tokens + i_q
    b_lse = tl.load(p_lse + o_statistics, mask=m_q, other=float("inf"))
    b_delta = tl.load(p_delta + o_statistics, mask=m_q, other=0.0)
    b_p = tl.exp(tl.where(m_k[:, None], b_s * scale - b_lse[None, :], float("-inf")))
    b_ds = tl.where(m_k[:, None], b_p * (b_dp - b_delta[None, :]) * scale, 0.0).to(p_q.dtype.element_ty)
    b_p = b_p.to(p_q.dtype.element_ty)

    row = num_heads * C
    o_head = i_n * num_tokens * row + i_h * C
    m_own = i_k < num_tokens
    for i_back in range(num_chunks):
        i_c = (num_chunks - 1 - i_back) * BLOCK_C
        b_q = load_rows(p_qh, q_s * UNIT, i_q, m_q, i_c, C, BLOCK_C)
        b_g = load_rows(p_gh, g_s * UNIT, i_q, m_q, i_c, C, BLOCK_C)
        b_dk = product(b_ds, b_q, None)
        if p_dv is None:
            b_dk = product(b_p, b_g, b_dk)
        else:
            b_dv = product(b_p, b_g, None)
            store_rows(p_dv + o_head, row, i_k, m_own, i_c, b_dv, C, BLOCK_C)
        store_rows(p_dk + o_head, row, i_k, m_own, i_c, b_dk, C, BLOCK_C)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    lse: Tensor,
    key_mask: Tensor | None,
    scale: float,
    *,
    want_out: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Launch the backward kernels, without validation.

    Args:
        grad: Gradient of the mixed values, (N, H, S, C), in the type of `q`.
        q: Queries, (N, H, S, C).
        k: Keys, (N, H, S, C).
        v: Values, (N, H, S, C); None: the keys.
        lse: What `attention_forward` returned, (N, H, S).
        key_mask: True where a key is present, (N, S); None: everywhere.
        scale: Factor of the products.
        want_out: Whether the mixed values are made again, in the same pass.
    Returns:
        Gradients of queries, keys and values (None where they are the keys, which then have the sum), and the mixed values or
        None, each (N, H, S, C).
    """
    n, h, s, c = q.shape
    grad, q, k, lse = readable(grad), readable(q), readable(k), lse.contiguous()
    v = None if v is None else readable(v)
    values = k if v is None else v
    key_mask = None if key_mask is None else key_mask.contiguous()
    dq, dk, dv = empty_heads(q), empty_heads(q), None if v is None else empty_heads(q)
    out = empty_heads(q) if want_out else None
    if n == 0:
        return dq, dk, dv, out
    strides, unit = strides_of(grad, q, k, values)
    tile, whole, width, num_warps, num_stages = choose_blocks(s, c, q.dtype, True)
    options: dict[str, Any] = {"C": c, "UNIT": unit, "BLOCK_C": width, "num_warps": num_warps, "num_stages": num_stages}
    # with several tiles, what is summed over queries takes a kernel of its own
    tiled = tile < whole
    delta = torch.empty_like(lse) if tiled else None
    grid = (n * h * -(-s // tile),)
    with device_of(q):
        _attention_bwd_kernel[grid](
            grad, q, k, v, lse, key_mask, dq, None if tiled else dk, None if tiled else dv, out, delta,
            *strides, h, s, scale, BLOCK_Q=tile, BLOCK_K=whole, **options, **OPTIONS,
        )  # fmt: skip
        if tiled:
            _attention_bwd_key_kernel[grid](
                grad, q, k, values, lse, key_mask, delta, dk, dv,
                *strides, h, s, scale, BLOCK_Q=whole, BLOCK_K=tile, **options, **OPTIONS,
            )  # fmt: skip
    return dq, dk, dv, out


def _cases(shape: Shape) -> list[CompileCase]:
    tile, whole, *_ = choose_blocks(*shape.size[2:], shape.dtype, True)
    absent = {"p_v", "p_dv"} if shape.shared else set()
    # the output made again, as a training step does
    if tile == whole:
        absent = {*absent, "p_delta"}
        return [compile_case(shape, _attention_bwd_kernel, POINTERS, absent, 6, 8 - 2 * shape.shared)]
    by_keys = absent - {"p_v"}
    return [
        compile_case(shape, _attention_bwd_kernel, POINTERS, {*absent, "p_dk", "p_dv"}, 4, 6 - shape.shared),
        compile_case(shape, _attention_bwd_key_kernel, KEY_POINTERS, by_keys, 4, 6 - 2 * shape.shared, by_keys=True),
    ]


COMPILE_CASES = [case for shape in SHAPES for case in _cases(shape)]
