"""Tiles of attention that its forward and backward kernels share, the choice of their sizes, and the cases they compile for."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from fastskel.kernels._backend import CompileCase, Cost, jit, tl
from torch import Tensor

__all__ = [
    "GRAD_STRIDES", "MAX_TOKENS", "SHAPES", "SIZES", "STRIDES", "Shape", "attention_cost", "choose_blocks", "compile_case",
    "empty_heads", "load_rows", "place", "present_keys", "readable", "store_rows", "strides_of",
]  # fmt: skip

# scores of a tile of queries against all keys must fit in registers
MAX_TOKENS = 192
# sets up to this size are one tile, of one program; larger ones have tiles of this size
TILE = 64
# elements by which strides are counted where they allow it: 16 bytes of the narrowest type, the widest load of a thread
UNIT = 8
# what is added to a head's address is an integer of 32 bits
MAX_ROW_STRIDE = (2**31 - 1) // MAX_TOKENS
STRIDES = ("q_n", "q_h", "q_s", "k_n", "k_h", "k_s", "v_n", "v_h", "v_s")
GRAD_STRIDES = ("g_n", "g_h", "g_s")
SIZES = ("num_heads", "num_tokens", "scale")


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
