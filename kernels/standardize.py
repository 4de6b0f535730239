r"""Features of each view brought to mean zero and variance one over the batch, and what else needs their statistics.

Per view and feature, over the N samples,
    mean = sum_n z / N,   moment = sum_n (z - mean)^2,   s = 1 / sqrt(moment / (N - correction) + eps),   u = s (z - mean);
    dz = s (g - mean_n(g) - u sum_n(g u) / (N - correction))
A program owns a block of features and streams the samples past it twice, for the mean and for what is centred; of many samples
each of several programs takes a part, the statistics of which are merged in their order by Chan's formula.
Bytes moved, in tensors (W, N, D): forward 2 reads (that for the second sum is cached) and 1 write, backward 4 reads and 1 write;
eager torch moves 8 forward (mean, difference, its square, the sum of that, product) and about twice as many backward.
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
from fastskel.kernels.reference.standardize import standardize_backward as standardize_backward_reference
from fastskel.kernels.reference.standardize import standardize_forward as standardize_forward_reference
from torch import Tensor

__all__ = [
    "column_statistics",
    "correct_gradient",
    "load_centred",
    "readable",
    "standardize",
    "standardize_backward",
    "standardize_cost",
    "standardize_forward",
    "strides_of",
]

TYPES = (torch.float32, torch.bfloat16, torch.float16)
# a program's tile; 32 features of 16 bits fill two memory sectors
BLOCK_N, BLOCK_D = 64, 32
# samples that one program sums: of the published batch all, and of a large one what its cache keeps for the second pass
PART = 1024
# programs of one multiprocessor: those that wait for memory leave it to others
OCCUPANCY = 8
NUM_WARPS = 4
# elements that strides are counted in where they are multiples of it: 16 bytes of a 16-bit type
STRIDE_UNIT = 8
# larger ones could pass 32 bits within a tile
MAX_ROW_STRIDE = 1 << 23
SIZES = ["num_views", "num_rows", "divisor"]
STRIDES = ["stride_w", "stride_n"]


def standardize(z: Tensor, *, eps: float = 0.0, correction: int = 1) -> Tensor:
    """Bring each feature of each view to mean zero and variance one over the batch.

    Args:
        z: Embeddings of W views, (W, N, D); float32, bfloat16 or float16, on the CPU float64 too.
        eps: Added to variances, at least 0. With 0 a constant feature gives NaN, and so does its gradient.
        correction: Variances are sums over N - correction.
    Returns:
        Standardised embeddings, (W, N, D), in the type of z; statistics are computed in float32 at least.
    Raises:
        ValueError: On another shape or type, a negative eps, or no more samples than the correction.
    """
    if z.dim() != 3 or 0 < z.shape[1] <= correction:
        raise ValueError(
            f"standardize: z must be (W, N, D) with N above the correction {correction}, got {tuple(z.shape)}. "
            "Enlarge the batch."
        )
    # a kernel computes in float32; the reference on the CPU in the type that it is given
    if z.dtype not in TYPES and (z.is_cuda or INTERPRETED or z.dtype != torch.float64):
        raise ValueError(f"standardize: z must be float32, bfloat16 or float16, got {z.dtype}. Convert it.")
    if eps < 0:
        raise ValueError(f"standardize: eps must be at least 0, got {eps}. Variances are not negative.")
    u: Tensor = _operator(z, float(eps), correction)[0]
    return u


@jit()
def load_centred(p_z, p_mean, i_w, first, o_n, i_d, num_rows, stride_w, stride_n, D: tl.constexpr, UNIT: tl.constexpr):
    """Load rows first + o_n and columns i_d of view i_w, minus the mean; zero outside."""
    p_first = p_z + (tl.cast(i_w, tl.int64) * stride_w + tl.cast(first, tl.int64) * stride_n) * UNIT
    m_d = i_d < D
    mask = (first + o_n < num_rows)[:, None] & m_d[None, :]
    b_z = tl.load(p_first + o_n[:, None] * (stride_n * UNIT) + i_d[None, :], mask=mask, other=0.0).to(tl.float32)
    b_mean = tl.load(p_mean + i_w * D + i_d, mask=m_d, other=0.0)
    return tl.where(mask, b_z - b_mean[None, :], 0.0)


@jit()
def _reciprocal_deviation(b_moment, eps, divisor):
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(b_moment, divisor.to(tl.float32)) + eps))


@jit(do_not_specialize=[*STRIDES, *SIZES, "eps"])
def _statistics_kernel(
    p_z, p_stats, stride_w, stride_n, num_views, num_rows, divisor, eps,
    D: tl.constexpr, UNIT: tl.constexpr, PART: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_n = tl.arange(0, BLOCK_N)
    num_blocks = tl.cdiv(D, BLOCK_D)
    for item in range(tl.program_id(0), tl.cdiv(num_rows, PART) * num_views * num_blocks, tl.num_programs(0)):
        i_part = item // (num_views * num_blocks)
        i_w = item // num_blocks % num_views
        i_d = item % num_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
        m_d = i_d < D
        end = tl.minimum(num_rows, (i_part + 1) * PART)
        p_view = p_z + tl.cast(i_w, tl.int64) * stride_w * UNIT
        b_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for first in range(i_part * PART, end, BLOCK_N):
            mask = (first + o_n < end)[:, None] & m_d[None, :]
            p_first = p_view + tl.cast(first, tl.int64) * stride_n * UNIT
            b_z = tl.load(p_first + o_n[:, None] * (stride_n * UNIT) + i_d[None, :], mask=mask, other=0.0)
            b_sum += b_z.to(tl.float32)
        b_mean = tl.div_rn(tl.sum(b_sum, 0), (end - i_part * PART).to(tl.float32))
        b_square = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for first in range(i_part * PART, end, BLOCK_N):
            mask = (first + o_n < end)[:, None] & m_d[None, :]
            p_first = p_view + tl.cast(first, tl.int64) * stride_n * UNIT
            b_z = tl.load(p_first + o_n[:, None] * (stride_n * UNIT) + i_d[None, :], mask=mask, other=0.0)
            b_x = tl.where(mask, b_z.to(tl.float32) - b_mean[None, :], 0.0)
            b_square += b_x * b_x
        # not 0 where there is no feature: it is divided by
        b_moment = tl.where(m_d, tl.sum(b_square, 0), 1.0)
        plane = num_views * D
        p_out = p_stats + i_part * 3 * plane + i_w * D + i_d
        tl.store(p_out, b_mean, mask=m_d)
        tl.store(p_out + plane, b_moment, mask=m_d)
        # of several parts, theirs is not read
        tl.store(p_out + 2 * plane, _reciprocal_deviation(b_moment, eps, divisor), mask=m_d)


@jit(do_not_specialize=[*SIZES, "eps"])
def _merge_kernel(
    p_parts, p_stats, num_views, num_rows, divisor, eps, D: tl.constexpr, PART: tl.constexpr, BLOCK_D: tl.constexpr
):
    num_parts = tl.cdiv(num_rows, PART)
    plane = num_views * D
    for item in range(tl.program_id(0), tl.cdiv(plane, BLOCK_D), tl.num_programs(0)):
        i_c = item * BLOCK_D + tl.arange(0, BLOCK_D)
        m_c = i_c < plane
        b_mean = tl.zeros([BLOCK_D], tl.float32)
        for i_part in range(num_parts):
            count = tl.minimum(PART, num_rows - i_part * PART).to(tl.float32)
            b_mean += count * tl.load(p_parts + i_part * 3 * plane + i_c, mask=m_c, other=0.0)
        b_mean = tl.div_rn(b_mean, num_rows.to(tl.float32))
        b_moment = tl.where(m_c, 0.0, 1.0)
        for i_part in range(num_parts):
            count = tl.minimum(PART, num_rows - i_part * PART).to(tl.float32)
            b_shift = tl.load(p_parts + i_part * 3 * plane + i_c, mask=m_c, other=0.0) - b_mean
            b_moment += tl.load(p_parts + (i_part * 3 + 1) * plane + i_c, mask=m_c, other=0.0) + count * b_shift * b_shift
        tl.store(p_stats + i_c, b_mean, mask=m_c)
        tl.store(p_stats + plane + i_c, b_moment, mask=m_c)
        tl.store(p_stats + 2 * plane + i_c, _reciprocal_deviation(b_moment, eps, divisor), mask=m_c)


@jit(do_not_specialize=[*STRIDES, "num_views", "num_rows"])
def _standardize_fwd_kernel(
    p_z, p_stats, p_u, stride_w, stride_n, num_views, num_rows,
    D: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_n = tl.arange(0, BLOCK_N)
    num_blocks = tl.cdiv(D, BLOCK_D)
    num_tiles = tl.cdiv(num_rows, BLOCK_N)
    for item in range(tl.program_id(0), num_views * num_tiles * num_blocks, tl.num_programs(0)):
        i_w = item // (num_tiles * num_blocks)
        first = item // num_blocks % num_tiles * BLOCK_N
        i_d = item % num_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
        m_d = i_d < D
        b_x = load_centred(p_z, p_stats, i_w, first, o_n, i_d, num_rows, stride_w, stride_n, D, UNIT)
        b_rstd = tl.load(p_stats + (2 * num_views + i_w) * D + i_d, mask=m_d, other=0.0)
        p_first = p_u + (tl.cast(i_w, tl.int64) * num_rows + first) * D
        mask = (first + o_n < num_rows)[:, None] & m_d[None, :]
        tl.store(p_first + o_n[:, None] * D + i_d[None, :], (b_x * b_rstd[None, :]).to(p_u.dtype.element_ty), mask=mask)


@jit(do_not_specialize=[*STRIDES, "num_views", "num_rows"])
def _column_sums_kernel(
    p_grad, p_z, p_stats, p_sums, stride_w, stride_n, num_views, num_rows,
    D: tl.constexpr, UNIT: tl.constexpr, PART: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_n = tl.arange(0, BLOCK_N)
    num_blocks = tl.cdiv(D, BLOCK_D)
    for item in range(tl.program_id(0), tl.cdiv(num_rows, PART) * num_views * num_blocks, tl.num_programs(0)):
        i_part = item // (num_views * num_blocks)
        i_w = item // num_blocks % num_views
        i_d = item % num_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
        m_d = i_d < D
        b_rstd = tl.load(p_stats + (2 * num_views + i_w) * D + i_d, mask=m_d, other=0.0)
        b_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        b_product = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for first in range(i_part * PART, tl.minimum(num_rows, (i_part + 1) * PART), BLOCK_N):
            p_first = p_grad + (tl.cast(i_w, tl.int64) * num_rows + first) * D
            mask = (first + o_n < num_rows)[:, None] & m_d[None, :]
            b_g = tl.load(p_first + o_n[:, None] * D + i_d[None, :], mask=mask, other=0.0).to(tl.float32)
            b_x = load_centred(p_z, p_stats, i_w, first, o_n, i_d, num_rows, stride_w, stride_n, D, UNIT)
            b_sum += b_g
            b_product += b_g * (b_x * b_rstd[None, :])
        p_out = p_sums + (i_part * 2 * num_views + i_w) * D + i_d
        tl.store(p_out, tl.sum(b_sum, 0), mask=m_d)
        tl.store(p_out + num_views * D, tl.sum(b_product, 0), mask=m_d)


@jit(do_not_specialize=[*STRIDES, *SIZES])
def _standardize_bwd_kernel(
    p_grad, p_z, p_stats, p_sums, p_dz, stride_w, stride_n, num_views, num_rows, divisor,
    D: tl.constexpr, UNIT: tl.constexpr, SCALED: tl.constexpr, PROJECTED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_n = tl.arange(0, BLOCK_N)
    num_blocks = tl.cdiv(D, BLOCK_D)
    num_tiles = tl.cdiv(num_rows, BLOCK_N)
    for item in range(tl.program_id(0), num_views * num_tiles * num_blocks, tl.num_programs(0)):
        i_w = item // (num_tiles * num_blocks)
        first = item // num_blocks % num_tiles * BLOCK_N
        i_d = item % num_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
        m_d = i_d < D
        o_first = (tl.cast(i_w, tl.int64) * num_rows + first) * D
        o_tile = o_n[:, None] * D + i_d[None, :]
        mask = (first + o_n < num_rows)[:, None] & m_d[None, :]
        b_dz = tl.load(p_grad + o_first + o_tile, mask=mask, other=0.0).to(tl.float32)
        b_dz -= tl.div_rn(tl.load(p_sums + i_w * D + i_d, mask=m_d, other=0.0), num_rows.to(tl.float32))[None, :]
        if SCALED or PROJECTED:
            b_rstd = tl.load(p_stats + (2 * num_views + i_w) * D + i_d, mask=m_d, other=0.0)
            if SCALED:
                b_dz *= b_rstd[None, :]
            if PROJECTED:
                b_x = load_centred(p_z, p_stats, i_w, first, o_n, i_d, num_rows, stride_w, stride_n, D, UNIT)
                b_product = tl.load(p_sums + (num_views + i_w) * D + i_d, mask=m_d, other=0.0)
                b_share = b_rstd * tl.div_rn(b_product, divisor.to(tl.float32))
                b_dz -= b_x * b_rstd[None, :] * b_share[None, :]
        tl.store(p_dz + o_first + o_tile, b_dz.to(p_dz.dtype.element_ty), mask=mask)


def standardize_cost(
    num_views: int, num_rows: int, width: int, itemsize: int = 4, backward: bool = False
) -> Cost:
    """Cost of one pass over (W, N, D): the embeddings, with a gradient also that, the result and (3, W, D) statistics."""
    return Cost(0, num_views * width * ((3 if backward else 2) * num_rows * itemsize + 3 * 4))


def _compile_cases() -> list[CompileCase]:
    w, n, sizes = 4, 356, dict.fromkeys(SIZES, "i32")
    strides, cases = dict.fromkeys(STRIDES, "i32"), []
    for kind, d, hot in (("bf16", 2048, True), ("fp32", 4096, True), ("fp16", 2048, False)):
        z, moved = f"*{kind}", w * n * d * (4 if kind == "fp32" else 2)
        tile = {"D": d, "UNIT": STRIDE_UNIT, "BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D}
        parts, eps = {**tile, "PART": PART}, {"eps": "fp32"}
        views = {"num_views": "i32", "num_rows": "i32"}
        few, merged = 16 * w * d, {"D": d, "PART": PART, "BLOCK_D": 4 * BLOCK_D}
        last = {**tile, "SCALED": True, "PROJECTED": True}
        stats, sums = {"p_stats": "*fp32"}, {"p_sums": "*fp32"}
        for kernel, signature, constexprs, nbytes in (
            (_statistics_kernel, {"p_z": z, **stats, **strides, **sizes, **eps}, parts, moved),
            (_merge_kernel, {"p_parts": "*fp32", **stats, **sizes, **eps}, merged, few),
            (_standardize_fwd_kernel, {"p_z": z, **stats, "p_u": z, **strides, **views}, tile, 2 * moved),
            (_column_sums_kernel, {"p_grad": z, "p_z": z, **stats, **sums, **strides, **views}, parts, 2 * moved),
            (
                _standardize_bwd_kernel,
                {"p_grad": z, "p_z": z, **stats, **sums, "p_dz": z, **strides, **sizes},
                last,
                3 * moved,
            ),
        ):
            # what merges does not depend on the type
            if kernel is not _merge_kernel or kind == "fp32":
                cases.append(
                    CompileCase(
                        f"D={d} {kind}", kernel, signature, constexprs,
                        num_warps=NUM_WARPS, num_stages=1, cost=Cost(0, nbytes + few), hot=hot,
                    )
                )  # fmt: skip
    return cases


COMPILE_CASES = _compile_cases()


def readable(z: Tensor) -> Tensor:
    """Copy embeddings (W, N, D) only where their strides are not what the kernels take."""
    return z if z.stride(2) == 1 and 0 <= z.stride(1) <= MAX_ROW_STRIDE else z.contiguous()


def strides_of(z: Tensor) -> tuple[int, int, int]:
    """Return strides of views and samples of z (W, N, D) in units, and the unit."""
    stride_w, stride_n, _ = z.stride()
    if stride_w % STRIDE_UNIT or stride_n % STRIDE_UNIT:
        return stride_w, stride_n, 1
    return stride_w // STRIDE_UNIT, stride_n // STRIDE_UNIT, STRIDE_UNIT


def _programs(items: int, device: torch.device) -> tuple[int]:
    return (min(items, OCCUPANCY * num_processors(device)),)


def column_statistics(z: Tensor, eps: float, correction: int) -> Tensor:
    """Launch the statistics' kernels on readable z (W, N, D), not empty, N above the correction.

    Returns:
        Mean, centred second moment (a sum), and 1 / sqrt(moment / (N - correction) + eps): (3, W, D), float32.
    """
    w, n, d = z.shape
    stats = z.new_empty(3, w, d, dtype=torch.float32)
    num_parts = -(-n // PART)
    parts = stats if num_parts == 1 else z.new_empty(num_parts, 3, w, d, dtype=torch.float32)
    stride_w, stride_n, unit = strides_of(z)
    launch = {"num_warps": NUM_WARPS, "num_stages": 1, **OPTIONS}
    with device_of(z):
        _statistics_kernel[_programs(num_parts * w * -(-d // BLOCK_D), z.device)](
            z, parts, stride_w, stride_n, w, n, n - correction, eps,
            D=d, UNIT=unit, PART=PART, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, **launch,
        )  # fmt: skip
        if num_parts > 1:
            _merge_kernel[_programs(-(-w * d // (4 * BLOCK_D)), z.device)](
                parts, stats, w, n, n - correction, eps, D=d, PART=PART, BLOCK_D=4 * BLOCK_D, **launch
            )
    return stats


def correct_gradient(
    grad: Tensor, z: Tensor, stats: Tensor, sums: Tensor, dz: Tensor, correction: int, scaled: bool, projected: bool
) -> None:
    """Write dz = s g - mean_n(s g) - s u sum_n(g u) / (N - correction).

    Args:
        grad: Gradient g of standardised embeddings, (W, N, D), contiguous.
        z: Embeddings, (W, N, D), readable, not empty.
        stats: What `column_statistics` returned.
        sums: Sums over the batch, (2, W, D): of `grad`, and of g u.
        dz: Where to write, (W, N, D), contiguous; may be `grad`.
        correction: As for the statistics.
        scaled: Whether `grad` has still to be multiplied by s; otherwise it is s g, and may have other terms.
        projected: Whether there is the last term.
    """
    w, n, d = z.shape
    stride_w, stride_n, unit = strides_of(z)
    with device_of(z):
        _standardize_bwd_kernel[_programs(w * -(-n // BLOCK_N) * -(-d // BLOCK_D), z.device)](
            grad, z, stats, sums, dz, stride_w, stride_n, w, n, n - correction,
            D=d, UNIT=unit, SCALED=scaled, PROJECTED=projected, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D,
            num_warps=NUM_WARPS, num_stages=1, **OPTIONS,
        )  # fmt: skip


def standardize_forward(z: Tensor, eps: float, correction: int) -> tuple[Tensor, Tensor]:
    """Launch the forward kernels on z (W, N, D).

    Returns:
        Standardised embeddings (W, N, D) in the type of z; statistics (3, W, D), float32, as of `column_statistics`.
    """
    z = readable(z)
    w, n, d = z.shape
    u = z.new_empty(w, n, d)
    if not u.numel():
        return u, z.new_zeros(3, w, d, dtype=torch.float32)
    stats = column_statistics(z, eps, correction)
    stride_w, stride_n, unit = strides_of(z)
    with device_of(z):
        _standardize_fwd_kernel[_programs(w * -(-n // BLOCK_N) * -(-d // BLOCK_D), z.device)](
            z, stats, u, stride_w, stride_n, w, n,
            D=d, UNIT=unit, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS, num_stages=1, **OPTIONS,
        )  # fmt: skip
    return u, stats


def standardize_backward(grad: Tensor, z: Tensor, stats: Tensor, correction: int) -> Tensor:
    """Launch the backward kernels on gradient and embeddings (W, N, D) and statistics; returns (W, N, D) in z's type."""
    grad, z, stats = grad.contiguous(), readable(z), stats.contiguous()
    w, n, d = z.shape
    dz = z.new_empty(w, n, d)
    if dz.numel():
        num_parts = -(-n // PART)
        sums = z.new_empty(num_parts, 2, w, d, dtype=torch.float32)
        stride_w, stride_n, unit = strides_of(z)
        with device_of(z):
            _column_sums_kernel[_programs(num_parts * w * -(-d // BLOCK_D), z.device)](
                grad, z, stats, sums, stride_w, stride_n, w, n,
                D=d, UNIT=unit, PART=PART, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D,
                num_warps=NUM_WARPS, num_stages=1, **OPTIONS,
            )  # fmt: skip
        correct_gradient(grad, z, stats, sums[0] if num_parts == 1 else sums.sum(0), dz, correction, True, True)
    return dz


_operator = torch.library.custom_op(
    "fastskel::standardize",
    standardize_forward,
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor z, float eps, int correction) -> (Tensor, Tensor)",
)
_operator.register_kernel("cpu")(cpu_kernel(standardize_forward_reference, standardize_forward))

_backward_operator = torch.library.custom_op(
    "fastskel::standardize_backward",
    standardize_backward,
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor grad, Tensor z, Tensor stats, int correction) -> Tensor",
)
_backward_operator.register_kernel("cpu")(cpu_kernel(standardize_backward_reference, standardize_backward))


@_operator.register_fake
def _(z: Tensor, eps: float, correction: int) -> tuple[Tensor, Tensor]:
    w, n, d = z.shape
    return z.new_empty(w, n, d), z.new_empty(3, w, d, dtype=torch.promote_types(z.dtype, torch.float32))


@_backward_operator.register_fake
def _(grad: Tensor, z: Tensor, stats: Tensor, correction: int) -> Tensor:
    return z.new_empty(z.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, _, ctx.correction = inputs
    ctx.save_for_backward(z, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, None, None]:
    z, stats = ctx.saved_tensors
    return _backward_operator(grad, z, stats, ctx.correction), None, None


_operator.register_autograd(_differentiate, setup_context=_setup)
