r"""Backward pass of bidirectional attention over short token sets, and the tiles that both passes work on.

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

import functools
from typing import Any, NamedTuple

import torch
from fastskel.kernels._backend import INTERPRETED, OPTIONS, CompileCase, Cost, device_of, jit, tl
from torch import Tensor

__all__ = [
    "MAX_TOKENS",
    "SHAPES",
    "SIZES",
    "STRIDES",
    "UNIT",
    "Shape",
    "attention_backward",
    "attention_cost",
    "choose_blocks",
    "compile_case",
    "dot",
    "empty_heads",
    "load_rows",
    "place",
    "present_keys",
    "readable",
    "store_rows",
    "strides_of",
]

# scores of a tile of queries against all keys must fit in registers
MAX_TOKENS = 192
# sets up to this size are one tile, of one program; larger ones have tiles of this size
TILE = 64
# elements by which strides are counted where they allow it: 16 bytes of the narrowest type, the widest load of a thread
UNIT = 8
# what is added to a head's address is an integer of 32 bits
MAX_ROW_STRIDE = (2**31 - 1) // MAX_TOKENS
# the interpreter multiplies the bits of bfloat16 as integers; the products of widened operands are the same
WIDEN = INTERPRETED if tl is None else tl.constexpr(INTERPRETED)


@jit()
def dot(a, b, acc):
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit()
def load_rows(p_tensor, stride, i_s, m_s, i_c, C: tl.constexpr, BLOCK_C: tl.constexpr):
    # the column goes to the scalar: what is left of the address is the same for all chunks
    o_c = tl.arange(0, BLOCK_C)
    if C % BLOCK_C == 0:
        mask = m_s[:, None]
    else:
        mask = m_s[:, None] & (o_c < C - i_c)[None, :]
    return tl.load(p_tensor + i_c + ((i_s * stride)[:, None] + o_c[None, :]), mask=mask, other=0.0)


@jit()
def store_rows(p_tensor, stride, i_s, m_s, i_c, block, C: tl.constexpr, BLOCK_C: tl.constexpr):
    o_c = tl.arange(0, BLOCK_C)
    if C % BLOCK_C == 0:
        mask = m_s[:, None]
    else:
        mask = m_s[:, None] & (o_c < C - i_c)[None, :]
    p_block = p_tensor + i_c + ((i_s * stride)[:, None] + o_c[None, :])
    tl.store(p_block, block.to(p_tensor.dtype.element_ty), mask=mask)


@jit()
def place(num_heads, num_tokens, TILE: tl.constexpr):
    # tiles of one sequence and head are neighbours: they read the same
    num_tiles = tl.cdiv(num_tokens, TILE)
    i_head = tl.program_id(0) // num_tiles
    i_tile = tl.program_id(0) % num_tiles * TILE + tl.arange(0, TILE)
    return (i_head // num_heads).to(tl.int64), (i_head % num_heads).to(tl.int64), i_tile


@jit()
def present_keys(p_mask, i_n, i_k, num_tokens):
    m_k = i_k < num_tokens
    if p_mask is not None:
        m_k = m_k & (tl.load(p_mask + i_n * num_tokens + i_k, mask=m_k, other=0) != 0)
    return m_k


STRIDES = ("q_n", "q_h", "q_s", "k_n", "k_h", "k_s", "v_n", "v_h", "v_s")
GRAD_STRIDES = ("g_n", "g_h", "g_s")
SIZES = ("num_heads", "num_tokens", "scale")
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
        b_s = dot(b_q, tl.trans(b_k), b_s)
        b_dp = dot(b_g, tl.trans(b_v), b_dp)

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
        b_dq = dot(b_ds, b_k, None)
        if p_out is not None:
            b_v = b_k
            if p_v is not None:
                b_v = load_rows(p_vh, v_s * UNIT, i_k, m_k, i_c, C, BLOCK_C)
            b_out = dot(b_p, b_v, None)
        if p_dk is not None:
            b_q = load_rows(p_qh, q_s * UNIT, i_q, m_q, i_c, C, BLOCK_C)
            b_g = load_rows(p_gh, g_s * UNIT, i_q, m_q, i_c, C, BLOCK_C)
            b_dk = dot(tl.trans(b_ds), b_q, None)
            if p_dv is None:
                b_dk = dot(tl.trans(b_p), b_g, b_dk)
            else:
                b_dv = dot(tl.trans(b_p), b_g, None)
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
        b_s = dot(b_k, tl.trans(b_q), b_s)
        b_dp = dot(b_v, tl.trans(b_g), b_dp)

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
        b_dk = dot(b_ds, b_q, None)
        if p_dv is None:
            b_dk = dot(b_p, b_g, b_dk)
        else:
            b_dv = dot(b_p, b_g, None)
            store_rows(p_dv + o_head, row, i_k, m_own, i_c, b_dv, C, BLOCK_C)
        store_rows(p_dk + o_head, row, i_k, m_own, i_c, b_dk, C, BLOCK_C)


class _Blocks(NamedTuple):
    """Sizes of tiles (of what is tiled, of all tokens, of the width), and launch options."""

    tile: int
    whole: int
    width: int
    num_warps: int
    num_stages: int


# width, warps, stages by padded tokens; shared memory stays within the limits of sm_80 to sm_100 and gfx942, and in 16 bits
# nothing spills on sm_90
FORWARD_BLOCKS = {16: (64, 4, 3), 32: (64, 4, 3), 64: (64, 4, 3), 128: (64, 8, 2), 256: (32, 8, 3)}
BACKWARD_BLOCKS = {16: (64, 4, 2), 32: (64, 4, 2), 64: (64, 8, 3), 128: (32, 8, 3), 256: (16, 8, 2)}
# float32 runs outside tensor cores, where operands take registers too: a few spill for 256 padded tokens
FORWARD_BLOCKS_32 = {16: (32, 4, 2), 32: (32, 4, 2), 64: (32, 8, 2), 128: (32, 8, 2), 256: (32, 8, 2)}
BACKWARD_BLOCKS_32 = {16: (16, 4, 2), 32: (16, 4, 2), 64: (16, 8, 2), 128: (16, 8, 2), 256: (16, 8, 2)}


def _padded(size: int) -> int:
    # matrix products take no fewer than 16
    return max(16, 1 << (size - 1).bit_length())


@functools.cache
def choose_blocks(num_tokens: int, head_dim: int, dtype: torch.dtype, backward: bool) -> _Blocks:
    """Choose for S tokens, heads of C, their type, and the forward or the backward kernels."""
    if num_tokens > MAX_TOKENS:
        raise ValueError(
            f"attention: S must be at most {MAX_TOKENS}, got {num_tokens}. Use torch's scaled_dot_product_attention."
        )
    whole, wide = _padded(num_tokens), dtype == torch.float32
    tables = (FORWARD_BLOCKS_32, BACKWARD_BLOCKS_32) if wide else (FORWARD_BLOCKS, BACKWARD_BLOCKS)
    width, num_warps, num_stages = tables[backward][whole]
    tile = whole if whole <= TILE else TILE // 2 if wide else TILE
    return _Blocks(tile, whole, min(width, _padded(head_dim)), num_warps, num_stages)


def readable(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 and tensor.stride(2) <= MAX_ROW_STRIDE else tensor.contiguous()


def strides_of(*tensors: Tensor) -> tuple[list[int], int]:
    """Return strides of sequences, heads and tokens in units, and the unit."""
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    if any(stride % UNIT for stride in strides):
        return strides, 1
    return [stride // UNIT for stride in strides], UNIT


def empty_heads(q: Tensor) -> Tensor:
    # in the memory order of (N, S, H, C), which a projection reads without a copy
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3])).transpose(1, 2)


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


def attention_cost(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    shared: bool = False,
    masked: bool = False,
    backward: bool = False,
    want_out: bool = False,
) -> Cost:
    """Count what a forward or a backward pass costs at least.

    Args:
        shape: Sequences, heads, tokens and width of a head, (N, H, S, C).
        dtype: Type of queries, keys and values.
        shared: Whether the values are the keys.
        masked: Whether there is a mask of keys.
        backward: Whether it is the backward pass.
        want_out: Whether that makes the output again.
    """
    products = 5 + want_out if backward else 2
    # read: queries, keys, values and the gradient; written: their gradients, or the output
    tensors = (3 if shared else 4) + ((2 if shared else 3) + want_out if backward else 0)
    return _cost(shape, dtype, products, tensors, masked)


def _cost(shape: tuple[int, int, int, int], dtype: torch.dtype, products: int, tensors: int, masked: bool) -> Cost:
    n, h, s, c = shape
    rows = n * h * s
    return Cost(2 * products * rows * s * c, tensors * rows * c * dtype.itemsize + 4 * rows + masked * n * s)


class Shape(NamedTuple):
    """What attention is compiled for offline: (N, H, S, C) and the rest of a call."""

    label: str
    dtype: torch.dtype
    size: tuple[int, int, int, int]
    shared: bool
    masked: bool = False
    hot: bool = False


def compile_case(
    shape: Shape, kernel: Any, pointers: tuple[str, ...], absent: set[str], products: int, tensors: int,
    backward: bool = True, by_keys: bool = False,
) -> CompileCase:  # fmt: skip
    """Describe one kernel at one shape.

    Args:
        shape: What it runs on.
        kernel: The kernel.
        pointers: Its pointers, in order.
        absent: Those that are None.
        products: Matrix products it computes.
        tensors: Tensors (N, H, S, C) it reads or writes.
        backward: Whether it is one of the backward pass.
        by_keys: Whether its tiles are of keys.
    """
    *_, s, c = shape.size
    tile, whole, width, num_warps, num_stages = choose_blocks(s, c, shape.dtype, backward)
    queries, keys = (whole, tile) if by_keys else (tile, whole)
    element = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[shape.dtype]
    kinds = {"p_mask": "*i1", "p_lse": "*fp32", "p_delta": "*fp32"}
    absent = absent if shape.masked else {*absent, "p_mask"}
    integers = (*(GRAD_STRIDES if backward else ()), *STRIDES, "num_heads", "num_tokens")
    return CompileCase(
        label=f"{shape.label}, {str(shape.dtype).removeprefix('torch.')}",
        kernel=kernel,
        signature={
            **{name: kinds.get(name, element) for name in pointers if name not in absent},
            **dict.fromkeys(integers, "i32"),
            "scale": "fp32",
        },
        constexprs={
            **{name: None for name in pointers if name in absent},
            "C": c,
            "UNIT": UNIT,
            "BLOCK_Q": queries,
            "BLOCK_K": keys,
            "BLOCK_C": width,
        },
        num_warps=num_warps,
        num_stages=num_stages,
        cost=_cost(shape.size, shape.dtype, products, tensors, shape.masked),
        hot=shape.hot,
    )


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


# the published layer over time and over joints, which compile to the same, for the three attentions of four views
PUBLISHED = (3 * 4 * 356, 1, 64, 1024)
SHAPES = (
    Shape("shared values, 64 or 50 tokens of 1024", torch.bfloat16, PUBLISHED, True, hot=True),
    Shape("16 heads, 64 tokens of 64", torch.bfloat16, (3 * 4 * 356, 16, 64, 64), False, hot=True),
    Shape("16 heads, 128 tokens of 64", torch.bfloat16, (4 * 356, 16, 128, 64), False, hot=True),
    Shape("shared values, 192 tokens of 1024", torch.bfloat16, (4 * 356, 1, 192, 1024), True, hot=True),
    Shape("shared values, 64 tokens of 1024, masked", torch.bfloat16, PUBLISHED, True, masked=True),
    Shape("64 tokens of 1024", torch.float16, PUBLISHED, False),
    Shape("192 tokens of 1024", torch.float32, (4 * 356, 1, 192, 1024), False),
)
COMPILE_CASES = [case for shape in SHAPES for case in _cases(shape)]
