"""What the Gram form and the direct form of decorrelation share: column dots, the last sums, a tile's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from fastskel.kernels._backend import OPTIONS, CompileCase, Cost, device_of, jit, num_processors, tl
from fastskel.kernels.reference.decorrelation import Energies, Options
from fastskel.kernels.standardize import STRIDE_UNIT, load_centred, strides_of
from torch import Tensor

__all__ = [
    "CASE_BYTES",
    "CASE_VIEWS",
    "SIZES",
    "STRIDES",
    "WEIGHTS",
    "Work",
    "case_signature",
    "column_dots",
    "energies_of",
    "grid",
    "pair_index",
    "store_gradient",
]

# programs of one multiprocessor
OCCUPANCY = 4
# a program's tile of column dots
BLOCK_N, BLOCK_D = 64, 32
# numbers that the last sums take at once
BLOCK_SUM = 1024
NUM_WARPS = 4
STRIDES = ["stride_w", "stride_n"]
SIZES = ["num_rows"]
# what the energies' weights are called in kernels
WEIGHTS = ("p_w_hinge", "p_w_covariance", "p_w_on", "p_w_off")
# of compile cases: views of a step, and bytes of types
CASE_VIEWS = 4
CASE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


class Work(NamedTuple):
    """What both forms compute from.

    Attributes:
        z: Embeddings, (W, N, D), readable and not empty.
        options: Options of the energies.
        weights: Of the sum whose gradient is wanted, float32 on z's device; None for no gradient.
        stats: Mean, centred second moment and reciprocal deviation, (3, W, D).
        dots: c_dd of each pair, (P, D); None for no pairs.
        precision: Triton's `input_precision` of products.
    """

    z: Tensor
    options: Options
    weights: Energies | None
    stats: Tensor
    dots: Tensor | None
    precision: str


@jit()
def pair_index(i_a, i_b, W: tl.constexpr):
    """Number pairs (0, 1), (0, 2), .. of different views in either order."""
    low = tl.minimum(i_a, i_b)
    return low * (2 * W - low - 1) // 2 + tl.maximum(i_a, i_b) - low - 1


@jit()
def _pair_of(i_p, W: tl.constexpr):
    i_a = 0
    rest = i_p
    for i_w in range(W):
        # pairs that begin with i_w
        count = W - 1 - i_w
        beyond = (rest >= count) & (i_a == i_w)
        rest = tl.where(beyond, rest - count, rest)
        i_a = tl.where(beyond, i_w + 1, i_a)
    return i_a, i_a + 1 + rest


@jit(do_not_specialize=[*STRIDES, *SIZES])
def _column_dots_kernel(
    p_z, p_stats, p_dots, stride_w, stride_n, num_rows,
    W: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_n = tl.arange(0, BLOCK_N)
    num_blocks = tl.cdiv(D, BLOCK_D)
    for item in range(tl.program_id(0), W * (W - 1) // 2 * num_blocks, tl.num_programs(0)):
        i_p = item // num_blocks
        i_a, i_b = _pair_of(i_p, W)
        i_d = item % num_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
        m_d = i_d < D
        b_rstd_a = tl.load(p_stats + (2 * W + i_a) * D + i_d, mask=m_d, other=0.0)
        b_rstd_b = tl.load(p_stats + (2 * W + i_b) * D + i_d, mask=m_d, other=0.0)
        b_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for first in range(0, num_rows, BLOCK_N):
            b_a = load_centred(p_z, p_stats, i_a, first, o_n, i_d, num_rows, stride_w, stride_n, D, UNIT)
            b_b = load_centred(p_z, p_stats, i_b, first, o_n, i_d, num_rows, stride_w, stride_n, D, UNIT)
            b_sum += (b_a * b_rstd_a[None, :]) * (b_b * b_rstd_b[None, :])
        tl.store(p_dots + i_p * D + i_d, tl.div_rn(tl.sum(b_sum, 0), num_rows.to(tl.float32)), mask=m_d)


@jit()
def _wide_sum(p_partial, count, BLOCK: tl.constexpr):
    b_sum = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        i_s = start + tl.arange(0, BLOCK)
        b_sum += tl.load(p_partial + i_s, mask=i_s < count, other=0.0).to(tl.float64)
    return tl.sum(b_sum, 0)


@jit(do_not_specialize=[*SIZES, "num_squares", "num_products", "gamma", "variance_eps"])
def _energies_kernel(
    p_squares, p_products, p_stats, p_dots, p_hinge, p_covariance, p_on, p_off,
    num_squares, num_products, num_rows, gamma, variance_eps,
    W: tl.constexpr, D: tl.constexpr, DIAGONAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_sum = tl.arange(0, BLOCK)
    num_items = W
    if p_dots is not None:
        num_items = W + W * (W - 1) // 2
    wide = num_rows.to(tl.float64)
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        # wide, because the diagonal is taken off a sum that it dominates where features are decorrelated
        b_first = tl.zeros([BLOCK], tl.float64)
        b_square = tl.zeros([BLOCK], tl.float64)
        if item < W:
            for start in range(0, D, BLOCK):
                i_d = start + o_sum
                b_moment = tl.load(p_stats + (W + item) * D + i_d, mask=i_d < D, other=0.0)
                b_below = gamma - tl.sqrt_rn(tl.div_rn(b_moment, (num_rows - 1).to(tl.float32)) + variance_eps)
                b_first += tl.where((b_below <= 0) | (i_d >= D), 0.0, b_below).to(tl.float64)
                b_square += b_moment.to(tl.float64) * b_moment.to(tl.float64)
            tl.store(p_hinge + item, (tl.sum(b_first, 0) / D).to(tl.float32))
            if p_squares is None:
                tl.store(p_covariance + item, 0.0)
            else:
                total = _wide_sum(p_squares + tl.cast(item, tl.int64) * num_squares, num_squares, BLOCK)
                if DIAGONAL:
                    total -= tl.sum(b_square, 0)
                tl.store(p_covariance + item, (total / ((wide - 1) * (wide - 1))).to(tl.float32))
        else:
            if p_dots is not None:
                i_p = item - W
                for start in range(0, D, BLOCK):
                    i_d = start + o_sum
                    b_c = tl.load(p_dots + i_p * D + i_d, mask=i_d < D, other=0.0).to(tl.float64)
                    b_first += tl.where(i_d < D, (b_c - 1) * (b_c - 1), 0.0)
                    b_square += b_c * b_c
                total = _wide_sum(p_products + tl.cast(i_p, tl.int64) * num_products, num_products, BLOCK) / (wide * wide)
                if DIAGONAL:
                    total -= tl.sum(b_square, 0)
                tl.store(p_on + i_p, tl.sum(b_first, 0).to(tl.float32))
                tl.store(p_off + i_p, total.to(tl.float32))


@jit()
def store_gradient(
    b_k, b_u, i_w, i_tile, first, o_n, i_d, p_z, p_stats, p_dots, p_w_hinge, p_w_covariance, p_w_on, p_w_off, p_dx, p_sums,
    stride_w, stride_n, num_rows, gamma, variance_eps,
    W: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, COVARIANCES: tl.constexpr, ADD: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Store a tile of the gradient before centring, and its column sums, from the products of the two kinds of energy.

    `b_k` is K x, or x C, and counts with COVARIANCES; `b_u` is the weighted sum over other views of G u, or u C', and counts
    with `p_dots`. Their diagonals are inside with DIAGONAL. With ADD the hinge and the covariances are in `p_dx` already;
    without `p_sums` more is still to be added.
    """
    m_d = i_d < D
    m_n = (first + o_n < num_rows)[:, None]
    o_row = i_w * D + i_d
    p_tile = p_dx + (tl.cast(i_w, tl.int64) * num_rows + first) * D + o_n[:, None] * D + i_d[None, :]
    b_x = load_centred(p_z, p_stats, i_w, first, o_n, i_d, num_rows, stride_w, stride_n, D, UNIT)
    rows = num_rows.to(tl.float32)
    if ADD:
        b_dx = tl.load(p_tile, mask=m_n & m_d[None, :], other=0.0)
    else:
        b_moment = tl.load(p_stats + W * D + o_row, mask=m_d, other=1.0)
        b_deviation = tl.sqrt_rn(tl.div_rn(b_moment, rows - 1) + variance_eps)
        b_own = tl.div_rn(-tl.load(p_w_hinge + i_w) / D, (rows - 1) * b_deviation)
        b_dx = b_x * tl.where(b_deviation >= gamma, 0.0, b_own)[None, :]
        if COVARIANCES:
            if DIAGONAL:
                b_k -= b_x * b_moment[None, :]
            b_dx += tl.load(p_w_covariance + i_w) * tl.div_rn(4.0, (rows - 1) * (rows - 1)) * b_k
    o_sums = i_tile * 2 * W * D + o_row
    if p_dots is not None:
        b_u *= tl.div_rn(2.0, rows * rows)
        for i_b in range(W):
            if i_b != i_w:
                i_p = pair_index(i_w, i_b, W)
                b_c = tl.load(p_dots + i_p * D + i_d, mask=m_d, other=0.0)
                b_weight = tl.load(p_w_on + i_p) * (b_c - 1)
                if DIAGONAL:
                    b_weight -= tl.load(p_w_off + i_p) * b_c
                b_rstd = tl.load(p_stats + (2 * W + i_b) * D + i_d, mask=m_d, other=0.0)
                b_other = load_centred(p_z, p_stats, i_b, first, o_n, i_d, num_rows, stride_w, stride_n, D, UNIT)
                b_u += (tl.div_rn(2.0, rows) * b_weight)[None, :] * (b_other * b_rstd[None, :])
        b_rstd = tl.load(p_stats + 2 * W * D + o_row, mask=m_d, other=0.0)
        b_dx += b_u * b_rstd[None, :]
        tl.store(p_sums + o_sums + W * D, tl.sum(tl.where(m_n, b_u * (b_x * b_rstd[None, :]), 0.0), 0), mask=m_d)
    if p_sums is not None:
        tl.store(p_sums + o_sums, tl.sum(tl.where(m_n, b_dx, 0.0), 0), mask=m_d)
    tl.store(p_tile, b_dx, mask=m_n & m_d[None, :])


def grid(items: int, device: torch.device, occupancy: int = OCCUPANCY) -> tuple[int]:
    """Choose the programs of a persistent kernel."""
    return (min(items, occupancy * num_processors(device)),)


def column_dots(z: Tensor, stats: Tensor) -> Tensor:
    """Launch the kernel of the dots of equal features of each pair of views (W, N, D), over N: (P, D)."""
    w, n, d = z.shape
    dots = z.new_empty(w * (w - 1) // 2, d, dtype=torch.float32)
    stride_w, stride_n, unit = strides_of(z)
    with device_of(z):
        _column_dots_kernel[grid(len(dots) * -(-d // BLOCK_D), z.device)](
            z, stats, dots, stride_w, stride_n, n, W=w, D=d, UNIT=unit, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D,
            num_warps=NUM_WARPS, num_stages=1, **OPTIONS,
        )  # fmt: skip
    return dots


def energies_of(work: Work, squares: Tensor | None, products: Tensor | None, diagonal: bool) -> Energies:
    """Launch the last sums.

    Args:
        work: What the form computed from.
        squares: Parts of the sums of squares of K_w or C_w, (W, ..); None without covariances.
        products: Parts of <G_a, G_b> or of the sums of squares of u_a' u_b, (P, ..); None without pairs.
        diagonal: Whether the diagonals are inside these sums.
    """
    w, n, d = work.z.shape
    pairs = 0 if work.dots is None else len(work.dots)
    energies = Energies(*(work.stats.new_empty(size) for size in (w, w, pairs, pairs)))
    counts = (0 if squares is None else squares[0].numel(), 0 if products is None else products[0].numel())
    with device_of(work.z):
        _energies_kernel[(w + pairs,)](
            squares, products, work.stats, work.dots, *energies, *counts, n,
            work.options.gamma, work.options.variance_eps, W=w, D=d, DIAGONAL=diagonal, BLOCK=BLOCK_SUM,
            num_warps=NUM_WARPS, num_stages=1, **OPTIONS,
        )  # fmt: skip
    return energies


def case_signature(
    kind: str, pointers: Sequence[str], integers: Sequence[str], numbers: Sequence[str] = ()
) -> dict[str, str]:
    """Give the types of a kernel's arguments, of which only the embeddings are of type `kind`."""
    # the first type says at what rate a roofline multiplies: here of float32, whatever the embeddings are
    types = {name: f"*{kind}" if name == "p_z" else "*fp32" for name in sorted(pointers, key="p_z".__eq__)}
    return {**types, **dict.fromkeys(integers, "i32"), **dict.fromkeys(numbers, "fp32")}


def _compile_cases() -> list[CompileCase]:
    w, n, cases = CASE_VIEWS, 356, []
    pairs = w * (w - 1) // 2
    for kind, d, hot in (("bf16", 2048, True), ("fp32", 4096, True), ("fp16", 2048, False)):
        moved = w * n * d * CASE_BYTES[kind] + (3 * w + pairs) * d * 4
        cases.append(
            CompileCase(
                f"D={d} {kind}", _column_dots_kernel,
                case_signature(kind, ("p_z", "p_stats", "p_dots"), (*STRIDES, *SIZES)),
                {"W": w, "D": d, "UNIT": STRIDE_UNIT, "BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D},
                num_warps=NUM_WARPS, num_stages=1, cost=Cost(0, moved), hot=hot,
            )
        )  # fmt: skip
    outputs = ("p_hinge", "p_covariance", "p_on", "p_off")
    sums = ("p_squares", "p_products", "p_stats", "p_dots")
    signature = case_signature("fp32", (*sums, *outputs), ("num_squares", "num_products", *SIZES))
    cases.append(
        CompileCase(
            "D=4096", _energies_kernel, {**signature, "gamma": "fp32", "variance_eps": "fp32"},
            {"W": w, "D": 4096, "DIAGONAL": True, "BLOCK": BLOCK_SUM},
            num_warps=NUM_WARPS, num_stages=1, cost=Cost(0, (w + pairs) * 4096 * 4), hot=True,
        )
    )  # fmt: skip
    return cases


COMPILE_CASES = _compile_cases()
