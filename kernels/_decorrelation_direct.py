r"""Decorrelation through blocks of columns of the D x D matrices, for batches larger than the features.

    C_w = x_w' x_w,   C_ab = u_a' u_b,   both without their diagonals;
    covariance_w = ||C_w||^2 / (N - 1)^2,   off_ab = ||C_ab||^2 / N^2,
    d covariance_w / dx_w = 4 x_w C_w / (N - 1)^2,   d off_ab / du_a = 2 u_b C_ba / N^2
Without a gradient a tile of C is squared and summed in registers, and of a C_w one half is enough. With one, a panel of columns
of all C_ab is kept at a time, of which the gradient of these columns is made: at most as much as W matrices D x D.
"""

from __future__ import annotations

import torch
from fastskel.kernels._backend import OPTIONS, CompileCase, Cost, device_of, jit, tl
from fastskel.kernels._decorrelation_tiles import (
    CASE_BYTES,
    CASE_VIEWS,
    SIZES,
    STRIDES,
    WEIGHTS,
    Work,
    case_signature,
    energies_of,
    grid,
    pair_index,
    store_gradient,
)
from fastskel.kernels.reference.decorrelation import Energies
from fastskel.kernels.standardize import STRIDE_UNIT, load_centred, strides_of
from torch import Tensor

__all__ = ["decorrelate_direct", "direct_cost"]

# a program's tile, and how much of the sum it multiplies at once: float32 operands are whole in registers
BLOCK, BLOCK_SUM = 64, 16
# columns of a panel: it fits the cache, of few views, and its products fill the device
PANEL = 512
NUM_WARPS, NUM_STAGES = 8, 2


@jit(do_not_specialize=[*STRIDES, *SIZES, "start_column", "num_tiles"])
def _panel_kernel(
    p_z, p_stats, p_panels, p_squares, p_products, stride_w, stride_n, num_rows, start_column, num_tiles,
    W: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SUM: tl.constexpr,
):  # fmt: skip
    """Write panels of C_w, of which the squares are wanted, and of C_ab, of which the products are."""
    o_n = tl.arange(0, BLOCK_SUM)
    num_blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    per_entry = num_blocks * num_tiles
    entries: tl.constexpr = W if p_products is None else W * W
    for item in range(tl.program_id(0), entries * per_entry, tl.num_programs(0)):
        i_entry = item // per_entry
        i_a = i_entry
        i_b = i_entry
        if p_products is not None:
            i_a = i_entry // W
            i_b = i_entry % W
        i_row = item % per_entry // num_tiles
        i_col = item % num_tiles
        i_d = i_row * BLOCK + tl.arange(0, BLOCK)
        i_e = start_column + i_col * BLOCK + tl.arange(0, BLOCK)
        i_part = i_row * num_blocks + start_column // BLOCK + i_col
        # the last panel may be narrower
        wanted = start_column + i_col * BLOCK < D
        factor = 1.0
        if p_squares is None:
            wanted &= i_a != i_b
        if p_panels is None:
            # by symmetry
            wanted &= (i_a < i_b) | ((i_a == i_b) & (i_row <= i_col))
            factor = tl.where((i_a == i_b) & (i_row < i_col), 2.0, 1.0)
        if wanted:
            b_scale_a = tl.load(p_stats + (2 * W + i_a) * D + i_d, mask=i_d < D, other=0.0)
            b_scale_a = tl.where(i_a == i_b, 1.0, b_scale_a)
            b_scale_b = tl.load(p_stats + (2 * W + i_b) * D + i_e, mask=i_e < D, other=0.0)
            b_scale_b = tl.where(i_a == i_b, 1.0, b_scale_b)
            b_c = tl.zeros([BLOCK, BLOCK], tl.float32)
            for first in range(0, num_rows, BLOCK_SUM):
                b_a = load_centred(p_z, p_stats, i_a, first, o_n, i_d, num_rows, stride_w, stride_n, D, UNIT)
                b_b = load_centred(p_z, p_stats, i_b, first, o_n, i_e, num_rows, stride_w, stride_n, D, UNIT)
                b_a = tl.trans(b_a * b_scale_a[None, :])
                b_c = tl.dot(b_a, b_b * b_scale_b[None, :], b_c, input_precision=PRECISION)
            b_c = tl.where(i_d[:, None] == i_e[None, :], 0.0, b_c)
            # over both dimensions at once: Triton 3.6 fails to compile one after the other for sm_100
            energy = factor * tl.sum(b_c * b_c)
            if p_squares is not None:
                tl.store(p_squares + i_a * (num_blocks * num_blocks) + i_part, energy, mask=i_a == i_b)
            if p_products is not None:
                o_pair = pair_index(i_a, i_b, W) * (num_blocks * num_blocks)
                tl.store(p_products + o_pair + i_part, energy, mask=i_a < i_b)
            if p_panels is not None:
                width = num_tiles * BLOCK
                p_panel = p_panels + tl.cast(i_entry, tl.int64) * (num_blocks * BLOCK) * width
                i_p = i_col * BLOCK + tl.arange(0, BLOCK)
                tl.store(p_panel + i_d[:, None] * width + i_p[None, :], b_c)


@jit(do_not_specialize=[*STRIDES, *SIZES, "start_column", "num_tiles", "gamma", "variance_eps"])
def _panel_gradient_kernel(
    p_z, p_stats, p_dots, p_panels, p_w_hinge, p_w_covariance, p_w_on, p_w_off, p_dx, p_sums,
    stride_w, stride_n, num_rows, start_column, num_tiles, gamma, variance_eps,
    W: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, COVARIANCES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_SUM: tl.constexpr,
):  # fmt: skip
    o_n = tl.arange(0, BLOCK)
    num_blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    width = num_tiles * BLOCK
    num_bands = tl.cdiv(num_rows, BLOCK)
    for item in range(tl.program_id(0), W * num_bands * num_tiles, tl.num_programs(0)):
        i_w = item // (num_bands * num_tiles)
        i_band = item // num_tiles % num_bands
        first = i_band * BLOCK
        i_p = item % num_tiles * BLOCK + tl.arange(0, BLOCK)
        b_k = tl.zeros([BLOCK, BLOCK], tl.float32)
        b_u = tl.zeros([BLOCK, BLOCK], tl.float32)
        if COVARIANCES:
            i_entry = i_w
            if p_dots is not None:
                i_entry = i_w * (W + 1)
            p_panel = p_panels + tl.cast(i_entry, tl.int64) * (num_blocks * BLOCK) * width
            for start in range(0, D, BLOCK_SUM):
                i_k = start + tl.arange(0, BLOCK_SUM)
                b_x = load_centred(p_z, p_stats, i_w, first, o_n, i_k, num_rows, stride_w, stride_n, D, UNIT)
                b_c = tl.load(p_panel + i_k[:, None] * width + i_p[None, :])
                b_k = tl.dot(b_x, b_c, b_k, input_precision=PRECISION)
        if p_dots is not None:
            for i_b in range(W):
                if i_b != i_w:
                    weight = tl.load(p_w_off + pair_index(i_w, i_b, W))
                    p_panel = p_panels + tl.cast(i_b * W + i_w, tl.int64) * (num_blocks * BLOCK) * width
                    for start in range(0, D, BLOCK_SUM):
                        i_k = start + tl.arange(0, BLOCK_SUM)
                        b_x = load_centred(p_z, p_stats, i_b, first, o_n, i_k, num_rows, stride_w, stride_n, D, UNIT)
                        b_rstd = tl.load(p_stats + (2 * W + i_b) * D + i_k, mask=i_k < D, other=0.0)
                        b_c = tl.load(p_panel + i_k[:, None] * width + i_p[None, :]) * weight
                        b_u = tl.dot(b_x * b_rstd[None, :], b_c, b_u, input_precision=PRECISION)
        store_gradient(
            b_k, b_u, i_w, i_band, first, o_n, start_column + i_p, p_z, p_stats, p_dots, p_w_hinge, p_w_covariance,
            p_w_on, p_w_off, p_dx, p_sums, stride_w, stride_n, num_rows, gamma, variance_eps,
            W, D, UNIT, COVARIANCES, False, False,
        )  # fmt: skip


def direct_cost(
    num_views: int, num_rows: int, width: int, covariances: bool = True, pairs: bool = True, gradient: bool = True
) -> int:
    """Count the operations of the products of the direct form for (W, N, D)."""
    w = num_views
    # a covariance's half is enough of its energy, and either of c_ab and c_ba
    entries = w * covariances + w * (w - 1) * pairs
    return int((4 if gradient else 1) * entries * num_rows * width * width)


def decorrelate_direct(work: Work) -> tuple[Energies, Tensor | None, Tensor | None]:
    """Launch the direct form.

    Returns:
        The energies; with weights the gradient (W, N, D), float32, before it is corrected, and its column sums (2, W, D).
    """
    z, weights, covariances = work.z, work.weights, work.options.covariances
    w, n, d = z.shape
    num_blocks, num_bands = -(-d // BLOCK), -(-n // BLOCK)
    entries = w if work.dots is None else w * w
    stride_w, stride_n, unit = strides_of(z)
    launch = {"W": w, "D": d, "UNIT": unit, "PRECISION": work.precision, "BLOCK": BLOCK, "BLOCK_SUM": BLOCK_SUM}
    launch |= {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES, **OPTIONS}
    tiles, panels, squares, products, dx, sums = num_blocks, None, None, None, None, None
    if covariances:
        # of the tiles below its diagonal nothing is written where the others are enough
        squares = z.new_zeros(w, num_blocks * num_blocks, dtype=torch.float32)
    if work.dots is not None:
        products = z.new_empty(len(work.dots), num_blocks * num_blocks, dtype=torch.float32)
    if weights is not None:
        # no more than a matrix D x D for each view
        tiles = max(1, min(PANEL // BLOCK, num_blocks * w // entries))
        panels = z.new_empty(entries, num_blocks * BLOCK, tiles * BLOCK, dtype=torch.float32)
        dx = z.new_empty(w, n, d, dtype=torch.float32)
        sums = z.new_empty(num_bands, 2, w, d, dtype=torch.float32)
    with device_of(z):
        for start in range(0, d, tiles * BLOCK):
            if covariances or products is not None:
                _panel_kernel[grid(entries * num_blocks * tiles, z.device)](
                    z, work.stats, panels, squares, products, stride_w, stride_n, n, start, tiles, **launch
                )
            if weights is not None:
                _panel_gradient_kernel[grid(w * num_bands * tiles, z.device)](
                    z, work.stats, work.dots, panels, *weights, dx, sums, stride_w, stride_n, n, start, tiles,
                    work.options.gamma, work.options.variance_eps, COVARIANCES=covariances, **launch,
                )  # fmt: skip
    return energies_of(work, squares, products, False), dx, None if sums is None else sums.sum(0)


def _cases(kind: str, num_rows: int, width: int) -> list[CompileCase]:
    w, n, d = CASE_VIEWS, num_rows, width
    launch = {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES}
    tile = {"W": w, "D": d, "UNIT": STRIDE_UNIT, "PRECISION": "ieee", "BLOCK": BLOCK, "BLOCK_SUM": BLOCK_SUM}
    places, label = (*STRIDES, *SIZES, "start_column", "num_tiles"), f"N={n} D={d} {kind}"
    read, panels, sums = w * n * d * CASE_BYTES[kind], 4 * w * w * d * PANEL, ("p_squares", "p_products")
    operations = 2 * w * w * n * d * PANEL
    return [
        CompileCase(
            f"{label}, energies", _panel_kernel, case_signature(kind, ("p_z", "p_stats", *sums), places),
            {**tile, "p_panels": None}, cost=Cost(direct_cost(w, n, d, gradient=False), read), **launch,
        ),
        CompileCase(
            f"{label}, {PANEL} columns", _panel_kernel,
            case_signature(kind, ("p_z", "p_stats", "p_panels", *sums), places),
            tile, cost=Cost(operations, read + panels), **launch,
        ),
        CompileCase(
            f"{label}, {PANEL} columns", _panel_gradient_kernel,
            case_signature(
                kind, ("p_z", "p_stats", "p_dots", "p_panels", *WEIGHTS, "p_dx", "p_sums"), places, ("gamma", "variance_eps")
            ),
            {**tile, "COVARIANCES": True}, cost=Cost(operations, read + panels + 4 * w * n * PANEL), **launch,
        ),
    ]  # fmt: skip


COMPILE_CASES = [*_cases("fp32", 8192, 4096), *_cases("bf16", 8192, 2048), *_cases("fp16", 8192, 2048)[1:]]
