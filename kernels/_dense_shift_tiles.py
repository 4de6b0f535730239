"""Tiles of the dense shift that its forward and backward kernels share."""

from __future__ import annotations

from fastskel.kernels._backend import jit, tl
from fastskel.kernels._product import product

__all__ = [
    "CASE_BYTES",
    "CASE_SEQUENCES",
    "MAX_BLOCK_S",
    "OCCUPANCY",
    "check_tokens",
    "hidden_block",
    "load_square",
    "row_of",
    "shifted_tile",
    "token_block",
]

MAX_TOKENS = 192
# tokens of one tile: a warp group's share of a matrix product, and the largest that keeps (S, S) gradients in registers
MAX_BLOCK_S = 64
# programs of one multiprocessor: while one waits for memory, the other computes
OCCUPANCY = 2
# of compile cases: sequences of a step, four views of a batch of 356, and bytes of types
CASE_SEQUENCES = 4 * 356
CASE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def check_tokens(function: str, num_tokens: int) -> None:
    """Refuse sequences (S, D) of more tokens than the kernels take."""
    if num_tokens > MAX_TOKENS:
        raise ValueError(
            f"{function}: S must be at most {MAX_TOKENS}, got {num_tokens}. Shorten the clip or pool its tokens."
        )


def token_block(num_tokens: int) -> int:
    """Choose the tokens of a tile for (N, S, D): a power of two that a matrix product takes."""
    return min(MAX_BLOCK_S, max(16, 1 << (num_tokens - 1).bit_length()))


@jit()
def row_of(p_slots, i_n):
    """Find a sequence's row in a compact tensor, negative for none."""
    if p_slots is None:
        i_row = tl.cast(i_n, tl.int64)
    else:
        i_row = tl.load(p_slots + i_n).to(tl.int64)
    return i_row


@jit()
def load_square(p_matrix, o_row, o_col, m_row, stride, S: tl.constexpr):
    """Load a block of an (S, S) matrix, zero outside and in rows without a mask."""
    mask = m_row[:, None] & (o_col < S)[None, :]
    return tl.load(p_matrix + o_row[:, None] * stride + o_col[None, :], mask=mask, other=0.0)


@jit()
def rectified(hidden, m_s):
    """Rectify so that NaN passes, but not where there is no token: zero times infinity came there."""
    return tl.where((hidden < 0) | ~m_s[:, None], 0.0, hidden)


@jit()
def hidden_tile(b_x, b_wt1, b_b1, m_s):
    """Rectified mixture of the tokens of one tile."""
    hidden = product(b_wt1, b_x, tl.zeros([b_x.shape[0], b_x.shape[1]], tl.float32)) + b_b1[:, None]
    return rectified(hidden, m_s).to(b_x.dtype)


@jit()
def hidden_block(p_x, p_wt1, p_b1, k_block, o_d, stride_wt1, S: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr):
    """Rectified mixture, for one of several blocks of tokens, of a sequence that starts at p_x."""
    dtype: tl.constexpr = p_wt1.dtype.element_ty
    o_k = k_block * BLOCK_S + tl.arange(0, BLOCK_S)
    hidden = tl.zeros([BLOCK_S, o_d.shape[0]], tl.float32)
    for j_block in range(tl.cdiv(S, BLOCK_S)):
        o_j = j_block * BLOCK_S + tl.arange(0, BLOCK_S)
        m_x = (o_j < S)[:, None] & (o_d < D)[None, :]
        b_x = tl.load(p_x + o_j[:, None] * D + o_d[None, :], mask=m_x, other=0.0).to(dtype)
        b_wt1 = load_square(p_wt1, o_k, o_j, o_k < S, stride_wt1, S)
        hidden = product(b_wt1, b_x, hidden)
    hidden += tl.load(p_b1 + o_k, mask=o_k < S, other=0.0).to(tl.float32)[:, None]
    return rectified(hidden, o_k < S).to(dtype)


@jit()
def shifted_tile(
    p_x, p_wt1, p_b1, p_wt2, b_wt1, b_b1, b_wt2, b_b2, o_s, m_live, o_d, stride_wt1, stride_wt2,
    S: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Load a tile of a sequence that starts at p_x; return it, rounded for products, its hidden mixture, and it shifted."""
    dtype: tl.constexpr = p_wt1.dtype.element_ty
    m_x = (o_s < S)[:, None] & (o_d < D)[None, :]
    b_x = tl.load(p_x + o_s[:, None] * D + o_d[None, :], mask=m_x, other=0.0)
    b_xb = b_x.to(dtype)
    mixed = tl.zeros([BLOCK_S, o_d.shape[0]], tl.float32)
    if S <= BLOCK_S:
        hidden = hidden_tile(b_xb, b_wt1, b_b1, o_s < S)
        mixed = product(b_wt2, hidden, mixed)
    else:
        hidden = b_xb
        for k_block in range(tl.cdiv(S, BLOCK_S)):
            b_hidden = hidden_block(p_x, p_wt1, p_b1, k_block, o_d, stride_wt1, S, D, BLOCK_S)
            b_w = load_square(p_wt2, o_s, k_block * BLOCK_S + tl.arange(0, BLOCK_S), m_live, stride_wt2, S)
            mixed = product(b_w, b_hidden, mixed)
    mixed = (mixed + b_b2[:, None]).to(dtype).to(tl.float32)
    wide = b_x.to(tl.float32)
    return b_x, b_xb, hidden, tl.where(m_live[:, None], wide + mixed, wide)
