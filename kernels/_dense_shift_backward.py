r"""Backward pass of the dense shift.

With h = relu(W1 x + b1), m = W2 h + b2, y = x + live m, xhat = (y - mean) rstd and p = weight dz, over a width of D,
    g   = d_shifted + rstd (p - sum_d p / D - xhat sum_d(p xhat) / D)
    gm  = live g,  dh = (W2' gm) (h > 0),  dx = g + W1' dh
    dW2 = sum_n gm h',  db2 = sum gm,  dW1 = sum_n dh x',  db1 = sum dh,  dweight = sum dz xhat,  dbias = sum dz.
y is made again from x in the compute type; g, gm and dh are rounded to it where a product takes them. Up to 64 tokens, the
gradients of the (S, S) matrices stay in registers while a program goes through its sequences; above, tokens go in blocks of 64
through a scratch of one chunk. Every program sums into a row of its own: the result does not depend on the order of programs.
Bytes moved: dz, x and d_shifted read once, the input's gradient read and written; eager torch passes some 20 times.
"""

from __future__ import annotations

import torch
from fastskel.kernels._backend import OPTIONS, CompileCase, Cost, device_of, jit, num_processors, tl, triton
from fastskel.kernels._dense_shift_tiles import (
    CASE_BYTES,
    CASE_SEQUENCES,
    MAX_BLOCK_S,
    OCCUPANCY,
    check_tokens,
    hidden_block,
    load_square,
    row_of,
    shifted_tile,
    token_block,
)
from fastskel.kernels._product import product
from torch import Tensor

__all__ = ["dense_shift_backward", "dense_shift_backward_cost"]


@jit()
def row_sums(
    p_sums, p_xb, p_dz, p_wt1, p_b1, p_wt2, p_weight, b_wt1, b_b1, b_wt2, b_b2, b_mean, b_rstd, o_s, m_live,
    stride_wt1, stride_wt2,
    residual: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum over the width what the normalisation's gradient subtracts, and over tokens the gradients of weight and bias."""
    sum_p = tl.zeros([BLOCK_S], tl.float32)
    sum_px = tl.zeros([BLOCK_S], tl.float32)
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        _, _, _, shifted = shifted_tile(
            p_xb, p_wt1, p_b1, p_wt2, b_wt1, b_b1, b_wt2, b_b2, o_s, m_live, o_d, stride_wt1, stride_wt2, S, D, BLOCK_S
        )
        xhat = (shifted.to(residual).to(tl.float32) - b_mean[:, None]) * b_rstd[:, None]
        b_weight = tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        m_x = (o_s < S)[:, None] & (o_d < D)[None, :]
        b_dz = tl.load(p_dz + o_s[:, None] * D + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
        p = b_dz * b_weight[None, :]
        sum_p += tl.sum(p, 1)
        sum_px += tl.sum(p * xhat, 1)
        add_to(p_sums + o_d, tl.sum(b_dz * xhat, 0), o_d < D)
        add_to(p_sums + D + o_d, tl.sum(b_dz, 0), o_d < D)
    return sum_p / D, sum_px / D


@jit()
def normed_grad(p_dz, p_weight, xhat, b_rstd, sum_p, sum_px, num_normed, o_s, o_d, D: tl.constexpr):
    """Gradient of a tile through the normalisation."""
    m_x = (o_s < num_normed)[:, None] & (o_d < D)[None, :]
    b_weight = tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_dz = tl.load(p_dz + o_s[:, None] * D + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    g = (b_dz * b_weight[None, :] - sum_p[:, None] - xhat * sum_px[:, None]) * b_rstd[:, None]
    # columns beyond the width hold a mixture of biases
    return tl.where((o_d < tl.minimum(num_normed, 1) * D)[None, :], g, 0.0)


@jit()
def add_to(pointers, value, mask):
    """Add to float32 numbers that only this program knows."""
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + value, mask=mask)


@jit()
def add_into(p_into, p_extra, total, i_extra, o_n, o_x, m_x, S: tl.constexpr, D: tl.constexpr):
    """Add a tile, and what its sequence has in p_extra, to the input's gradient."""
    total += tl.load(p_into + o_n + o_x, mask=m_x, other=0.0).to(tl.float32)
    if p_extra is not None:
        m_extra = m_x & (o_x < tl.where(i_extra >= 0, S * D, 0))
        total += tl.load(p_extra + i_extra * (S * D) + o_x, mask=m_extra, other=0.0).to(tl.float32)
    tl.store(p_into + o_n + o_x, total.to(p_into.dtype.element_ty), mask=m_x)


@jit(do_not_specialize=["num_sequences", "gap"])
def _dense_shift_bwd_kernel(
    p_dz, p_d_shifted, p_into, p_xb, p_wt1, p_b1, p_wt2, p_b2, p_weight, p_mean, p_rstd, p_slots, p_extra, p_extra_slots,
    p_sums, num_sequences, stride_wt1, stride_wt2, gap,
    S: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = p_xb.dtype.element_ty
    residual: tl.constexpr = p_into.dtype.element_ty
    o_s = tl.arange(0, BLOCK_S)
    m_s = o_s < S
    m_live = m_s & (o_s % gap != 0)
    # rows that reach no output count as zeros, whatever they hold
    b_wt1 = load_square(p_wt1, o_s, o_s, m_s, stride_wt1, S)
    b_wt2 = load_square(p_wt2, o_s, o_s, m_live, stride_wt2, S)
    b_b1 = tl.load(p_b1 + o_s, mask=m_s, other=0.0).to(tl.float32)
    b_b2 = tl.load(p_b2 + o_s, mask=m_live, other=0.0).to(tl.float32)
    d_wt1 = tl.zeros([BLOCK_S, BLOCK_S], tl.float32)
    d_wt2 = tl.zeros([BLOCK_S, BLOCK_S], tl.float32)
    b_zero = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    d_b1 = tl.zeros([BLOCK_S], tl.float32)
    d_b2 = tl.zeros([BLOCK_S], tl.float32)
    p_sums += tl.program_id(0).to(tl.int64) * (2 * D + 2 * BLOCK_S * BLOCK_S + 2 * BLOCK_S)
    for i_n in range(tl.program_id(0), num_sequences, tl.num_programs(0)):
        o_n = tl.cast(i_n, tl.int64) * (S * D)
        i_row = row_of(p_slots, i_n)
        i_extra = row_of(p_extra_slots, i_n)
        # tokens that were normalised
        num_normed = tl.where(i_row >= 0, S, 0)
        o_row = i_row * S
        b_mean = tl.load(p_mean + o_row + o_s, mask=o_s < num_normed, other=0.0)
        b_rstd = tl.load(p_rstd + o_row + o_s, mask=o_s < num_normed, other=0.0)
        sum_p = tl.zeros([BLOCK_S], tl.float32)
        sum_px = tl.zeros([BLOCK_S], tl.float32)
        if i_row >= 0:
            sum_p, sum_px = row_sums(
                p_sums, p_xb + o_n, p_dz + o_row * D, p_wt1, p_b1, p_wt2, p_weight, b_wt1, b_b1, b_wt2, b_b2, b_mean,
                b_rstd, o_s, m_live, stride_wt1, stride_wt2, residual, S, D, BLOCK_S, BLOCK_D,
            )  # fmt: skip
        # last chunk first: it is the likeliest to be cached
        for i_back in range((D + BLOCK_D - 1) // BLOCK_D):
            o_d = ((D - 1) // BLOCK_D - i_back) * BLOCK_D + tl.arange(0, BLOCK_D)
            o_x = o_s[:, None] * D + o_d[None, :]
            m_x = m_s[:, None] & (o_d < D)[None, :]
            _, b_xb, hidden, shifted = shifted_tile(
                p_xb + o_n, p_wt1, p_b1, p_wt2, b_wt1, b_b1, b_wt2, b_b2, o_s, m_live, o_d, stride_wt1, stride_wt2,
                S, D, BLOCK_S,
            )  # fmt: skip
            xhat = (shifted.to(residual).to(tl.float32) - b_mean[:, None]) * b_rstd[:, None]
            g = normed_grad(p_dz + o_row * D, p_weight, xhat, b_rstd, sum_p, sum_px, num_normed, o_s, o_d, D)
            g += tl.load(p_d_shifted + o_n + o_x, mask=m_x, other=0.0).to(tl.float32)
            gm = tl.where(m_live[:, None], g, 0.0).to(dtype)
            d_wt2 = product(gm, tl.trans(hidden), d_wt2)
            d_b2 += tl.sum(gm.to(tl.float32), 1)
            dh = product(tl.trans(b_wt2), gm, b_zero)
            dh = tl.where(hidden <= 0, 0.0, dh).to(dtype)
            d_b1 += tl.sum(dh.to(tl.float32), 1)
            g = product(tl.trans(b_wt1), dh, g)
            add_into(p_into, p_extra, g, i_extra, o_n, o_x, m_x, S, D)
            # last: by its order of operations the loop just fits into registers on sm_90
            d_wt1 = product(dh, tl.trans(b_xb), d_wt1)
        # sums of columns are read again for the next sequence, maybe by other threads
        tl.debug_barrier()
    # squares of the tile's size, not the mixture's: without masks, which would occupy registers throughout
    o_square = o_s[:, None] * BLOCK_S + o_s[None, :]
    tl.store(p_sums + 2 * D + o_square, d_wt1)
    tl.store(p_sums + 2 * D + BLOCK_S * BLOCK_S + o_square, d_wt2)
    tl.store(p_sums + 2 * D + 2 * BLOCK_S * BLOCK_S + o_s, d_b1)
    tl.store(p_sums + 2 * D + 2 * BLOCK_S * BLOCK_S + BLOCK_S + o_s, d_b2)


@jit(do_not_specialize=["num_sequences", "gap"])
def _dense_shift_bwd_blocks_kernel(
    p_dz, p_d_shifted, p_into, p_xb, p_wt1, p_b1, p_wt2, p_b2, p_weight, p_mean, p_rstd, p_slots, p_extra, p_extra_slots,
    p_sums, p_tiles, p_wide, num_sequences, stride_wt1, stride_wt2, gap,
    S: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = p_xb.dtype.element_ty
    residual: tl.constexpr = p_into.dtype.element_ty
    num_blocks: tl.constexpr = (S + BLOCK_S - 1) // BLOCK_S
    size: tl.constexpr = num_blocks * BLOCK_S
    o_b = tl.arange(0, BLOCK_S)
    o_tile = o_b[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    # of sums that start, and in place of mixtures, which are read by blocks
    b_square = tl.zeros([BLOCK_S, BLOCK_S], tl.float32)
    b_none = b_square.to(dtype)
    p_sums += tl.program_id(0).to(tl.int64) * (2 * D + 2 * S * S + 2 * S)
    p_squares = p_sums + 2 * D
    # one chunk of h, gm and dh; the gradient of what was shifted, and the two sums of each token
    p_h = p_tiles + tl.program_id(0).to(tl.int64) * (3 * size * BLOCK_D)
    p_gm = p_h + size * BLOCK_D
    p_dh = p_gm + size * BLOCK_D
    p_g = p_wide + tl.program_id(0).to(tl.int64) * (size * BLOCK_D + 2 * size)
    p_rows = p_g + size * BLOCK_D
    for i_n in range(tl.program_id(0), num_sequences, tl.num_programs(0)):
        o_n = tl.cast(i_n, tl.int64) * (S * D)
        i_row = row_of(p_slots, i_n)
        i_extra = row_of(p_extra_slots, i_n)
        # tokens that were normalised
        num_normed = tl.where(i_row >= 0, S, 0)
        o_row = i_row * S
        # a barrier wherever a program reads what other threads of it wrote
        for s_block in range(num_blocks):
            o_s = s_block * BLOCK_S + o_b
            m_live = (o_s < S) & (o_s % gap != 0)
            sum_p = tl.zeros([BLOCK_S], tl.float32)
            sum_px = tl.zeros([BLOCK_S], tl.float32)
            if i_row >= 0:
                b_mean = tl.load(p_mean + o_row + o_s, mask=o_s < S, other=0.0)
                b_rstd = tl.load(p_rstd + o_row + o_s, mask=o_s < S, other=0.0)
                b_b2 = tl.load(p_b2 + o_s, mask=m_live, other=0.0).to(tl.float32)
                sum_p, sum_px = row_sums(
                    p_sums, p_xb + o_n, p_dz + o_row * D, p_wt1, p_b1, p_wt2, p_weight, b_none, b_b2, b_none, b_b2, b_mean,
                    b_rstd, o_s, m_live, stride_wt1, stride_wt2, residual, S, D, BLOCK_S, BLOCK_D,
                )  # fmt: skip
            tl.store(p_rows + o_s, sum_p)
            tl.store(p_rows + size + o_s, sum_px)
            tl.debug_barrier()
        for i_d in range(0, D, BLOCK_D):
            o_d = i_d + tl.arange(0, BLOCK_D)
            for k_block in range(num_blocks):
                hidden = hidden_block(p_xb + o_n, p_wt1, p_b1, k_block, o_d, stride_wt1, S, D, BLOCK_S)
                tl.store(p_h + k_block * BLOCK_S * BLOCK_D + o_tile, hidden)
            tl.debug_barrier()
            for s_block in range(num_blocks):
                o_s = s_block * BLOCK_S + o_b
                m_s = o_s < S
                m_live = m_s & (o_s % gap != 0)
                o_x = o_s[:, None] * D + o_d[None, :]
                m_x = m_s[:, None] & (o_d < D)[None, :]
                mixed = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
                for k_block in range(num_blocks):
                    hidden = tl.load(p_h + k_block * BLOCK_S * BLOCK_D + o_tile)
                    b_wt2 = load_square(p_wt2, o_s, k_block * BLOCK_S + o_b, m_live, stride_wt2, S)
                    mixed = product(b_wt2, hidden, mixed)
                mixed += tl.load(p_b2 + o_s, mask=m_live, other=0.0).to(tl.float32)[:, None]
                x = tl.load(p_xb + o_n + o_x, mask=m_x, other=0.0).to(tl.float32)
                shifted = tl.where(m_live[:, None], x + mixed.to(dtype).to(tl.float32), x).to(residual).to(tl.float32)
                b_mean = tl.load(p_mean + o_row + o_s, mask=o_s < num_normed, other=0.0)
                b_rstd = tl.load(p_rstd + o_row + o_s, mask=o_s < num_normed, other=0.0)
                xhat = (shifted - b_mean[:, None]) * b_rstd[:, None]
                sum_p = tl.load(p_rows + o_s)
                sum_px = tl.load(p_rows + size + o_s)
                g = normed_grad(p_dz + o_row * D, p_weight, xhat, b_rstd, sum_p, sum_px, num_normed, o_s, o_d, D)
                g += tl.load(p_d_shifted + o_n + o_x, mask=m_x, other=0.0).to(tl.float32)
                gm = tl.where(m_live[:, None], g, 0.0).to(dtype)
                tl.store(p_g + s_block * BLOCK_S * BLOCK_D + o_tile, g)
                tl.store(p_gm + s_block * BLOCK_S * BLOCK_D + o_tile, gm)
                add_to(p_squares + 2 * S * S + S + o_s, tl.sum(gm.to(tl.float32), 1), m_s)
            tl.debug_barrier()
            for k_block in range(num_blocks):
                o_k = k_block * BLOCK_S + o_b
                hidden = tl.load(p_h + k_block * BLOCK_S * BLOCK_D + o_tile)
                total = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
                for s_block in range(num_blocks):
                    o_s = s_block * BLOCK_S + o_b
                    gm = tl.load(p_gm + s_block * BLOCK_S * BLOCK_D + o_tile)
                    b_wt2 = load_square(p_wt2, o_s, o_k, (o_s < S) & (o_s % gap != 0), stride_wt2, S)
                    total = product(tl.trans(b_wt2), gm, total)
                    m_square = (o_s < S)[:, None] & (o_k < S)[None, :]
                    d_wt2 = product(gm, tl.trans(hidden), b_square)
                    add_to(p_squares + S * S + o_s[:, None] * S + o_k[None, :], d_wt2, m_square)
                dh = tl.where(hidden <= 0, 0.0, total).to(dtype)
                tl.store(p_dh + k_block * BLOCK_S * BLOCK_D + o_tile, dh)
                add_to(p_squares + 2 * S * S + o_k, tl.sum(dh.to(tl.float32), 1), o_k < S)
            tl.debug_barrier()
            for s_block in range(num_blocks):
                o_s = s_block * BLOCK_S + o_b
                o_x = o_s[:, None] * D + o_d[None, :]
                m_x = (o_s < S)[:, None] & (o_d < D)[None, :]
                b_xb = tl.load(p_xb + o_n + o_x, mask=m_x, other=0.0)
                total = tl.load(p_g + s_block * BLOCK_S * BLOCK_D + o_tile)
                for k_block in range(num_blocks):
                    o_k = k_block * BLOCK_S + o_b
                    dh = tl.load(p_dh + k_block * BLOCK_S * BLOCK_D + o_tile)
                    b_wt1 = load_square(p_wt1, o_k, o_s, o_k < S, stride_wt1, S)
                    total = product(tl.trans(b_wt1), dh, total)
                    m_square = (o_k < S)[:, None] & (o_s < S)[None, :]
                    d_wt1 = product(dh, tl.trans(b_xb), b_square)
                    add_to(p_squares + o_k[:, None] * S + o_s[None, :], d_wt1, m_square)
                add_into(p_into, p_extra, total, i_extra, o_n, o_x, m_x, S, D)
            tl.debug_barrier()


def launch_options(num_tokens: int, itemsize: int) -> dict[str, int]:
    """Choose tiles and warps of a backward pass over (N, S, D): the widest tile that does not spill registers on sm_90."""
    # products of float32 have no matrix instruction: each thread holds its operands
    wide = itemsize == 4
    return {
        "BLOCK_S": token_block(num_tokens),
        "BLOCK_D": 16 if wide else 32,
        "num_warps": 8 if wide else 4,
        "num_stages": 1,
    }


def dense_shift_backward(
    dz: Tensor,
    d_shifted: Tensor,
    into: Tensor,
    xb: Tensor,
    wt1: Tensor,
    b1: Tensor,
    wt2: Tensor,
    b2: Tensor,
    gap: int,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    slots: Tensor | None = None,
    *,
    extra: Tensor | None = None,
    extra_slots: Tensor | None = None,
    programs: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward pass; adds the input's gradient to `into`.

    Args:
        dz: Gradient of the normalised tokens, (rows, S, D), in the compute type.
        d_shifted: Gradient of the shifted tokens from elsewhere, (N, S, D), in the residual type.
        into: What the input's gradient is added to, (N, S, D), contiguous, in the residual type.
        xb: The input in the compute type, (N, S, D).
        wt1: First mixture, (S, S), in the compute type; may be a leading block of a larger matrix.
        b1: Its bias, (S,).
        wt2: Second mixture, (S, S), as the first.
        b2: Its bias, (S,).
        gap: Every gap-th token passes unchanged.
        weight: Weight of the normalisation, (D,).
        mean: Means of the forward pass, (rows, S), float32.
        rstd: Reciprocal deviations of the forward pass, (rows, S), float32.
        slots: Row of each sequence in `dz`, (N,), int32, negative for none; None where all are there in order.
        extra: Another gradient to add to `into`, (m, S, D), in the compute type.
        extra_slots: Row of each sequence in `extra`, as `slots`.
        programs: Programs that share the sequences, each with sums of its own.
    Returns:
        Gradients of wt1 (S, S), b1 (S,), wt2 (S, S), b2 (S,), weight (D,) and bias (D,), float32; zero for tokens that pass.
    Raises:
        ValueError: If there are too many tokens, or `into` is not contiguous.
    """
    num_sequences, S, D = xb.shape
    check_tokens("dense_shift_backward", S)
    if not into.is_contiguous():
        raise ValueError(
            f"dense_shift_backward: into must be contiguous, got strides {into.stride()}. Add to a contiguous tensor."
        )
    if programs is None:
        programs = num_processors(xb.device) * OCCUPANCY
    programs = max(1, min(programs, num_sequences))
    options = launch_options(S, xb.dtype.itemsize)
    kernel, side = _dense_shift_bwd_kernel, options["BLOCK_S"]
    if S > MAX_BLOCK_S:
        kernel, side = _dense_shift_bwd_blocks_kernel, S
    sums = torch.zeros((programs, 2 * (D + side * side + side)), device=xb.device, dtype=torch.float32)
    scratch: tuple[Tensor, ...] = ()
    if S > MAX_BLOCK_S:
        padded = triton.cdiv(S, MAX_BLOCK_S) * MAX_BLOCK_S
        tiles = xb.new_empty((programs, 3, padded, options["BLOCK_D"]))
        wide = sums.new_empty((programs, padded * (options["BLOCK_D"] + 2)))
        scratch = (tiles, wide)
    if xb.numel():
        wt1, wt2 = (w if w.stride(1) == 1 else w.contiguous() for w in (wt1, wt2))
        with device_of(xb):
            kernel[(programs,)](
                dz.contiguous(),
                d_shifted.contiguous(),
                into,
                xb.contiguous(),
                wt1,
                b1.contiguous(),
                wt2,
                b2.contiguous(),
                weight.contiguous(),
                mean.contiguous(),
                rstd.contiguous(),
                None if slots is None else slots.contiguous(),
                None if extra is None else extra.contiguous(),
                None if extra_slots is None else extra_slots.contiguous(),
                sums,
                *scratch,
                num_sequences,
                wt1.stride(0),
                wt2.stride(0),
                gap,
                S=S,
                D=D,
                **options,
                **OPTIONS,
            )
    total = sums.sum(0)
    d_weight, d_bias, d_wt1, d_wt2, d_b1, d_b2 = total.split([D, D, side * side, side * side, side, side])
    d_wt1, d_wt2 = (d.view(side, side)[:S, :S] for d in (d_wt1, d_wt2))
    return d_wt1, d_b1[:S], d_wt2, d_b2[:S], d_weight, d_bias


def dense_shift_backward_cost(
    num_sequences: int, num_tokens: int, width: int, rows: int, compute: int, residual: int, extra: int = 0
) -> Cost:
    """Count the backward pass over (N, S, D) with `rows` normalised and `extra` added, for types of so many bytes."""
    tile = num_tokens * width
    flops = 12 * num_sequences * num_tokens * tile
    moved = num_sequences * tile * (compute + 3 * residual) + (rows + extra) * tile * compute + 8 * rows * num_tokens
    # mixtures and biases once, their gradients in float32; slots
    weights = 2 * (num_tokens + 1) * num_tokens * (compute + 4) + 12 * width
    return Cost(flops, moved + weights + 8 * num_sequences)


def _case(num_tokens: int, compute: str, residual: str, hot: bool = False) -> CompileCase:
    options = launch_options(num_tokens, CASE_BYTES[compute])
    blocks = num_tokens > MAX_BLOCK_S
    kernel = _dense_shift_bwd_blocks_kernel if blocks else _dense_shift_bwd_kernel
    types = {"p_dz": compute, "p_d_shifted": residual, "p_into": residual, "p_xb": compute, "p_wt1": compute, "p_b1": compute,
             "p_wt2": compute, "p_b2": compute, "p_weight": "fp32", "p_mean": "fp32", "p_rstd": "fp32", "p_slots": "i32",
             "p_extra": compute, "p_extra_slots": "i32", "p_sums": "fp32", "p_tiles": compute, "p_wide": "fp32"}  # fmt: skip
    if not blocks:
        del types["p_tiles"], types["p_wide"]
    sizes = dict.fromkeys(("num_sequences", "stride_wt1", "stride_wt2", "gap"), "i32")
    n = CASE_SEQUENCES
    return CompileCase(
        label=f"S={num_tokens} D=1024 {compute} in {residual}",
        kernel=kernel,
        signature={name: f"*{type}" for name, type in types.items()} | sizes,
        constexprs={"S": num_tokens, "D": 1024, "BLOCK_S": options["BLOCK_S"], "BLOCK_D": options["BLOCK_D"]},
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        cost=dense_shift_backward_cost(n, num_tokens, 1024, n, CASE_BYTES[compute], CASE_BYTES[residual], n),
        hot=hot,
    )


COMPILE_CASES = [
    _case(64, "bf16", "fp32", hot=True),
    _case(50, "bf16", "fp32", hot=True),
    _case(64, "fp32", "fp32"),
    _case(64, "fp16", "fp32"),
    _case(192, "bf16", "fp32"),
]
