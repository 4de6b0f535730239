r"""Decorrelation energies and their gradient in one pass, from Gram matrices of the batch or directly.

With x = z - mean over N, s the reciprocal deviation, u = s x, K_w = x_w x_w' and G_w = u_w u_w' (both N x N), and
c_dd = sum_n u_a u_b / N,
    covariance_w = (||K_w||^2 - sum_d moment_d^2) / (N - 1)^2,
    on_ab = sum_d (c_dd - 1)^2,   off_ab = <G_a, G_b> / N^2 - sum_d c_dd^2,
    d covariance_w / dx_w = 4 / (N - 1)^2 (K_w x_w - moment x_w),
    d off_ab / du_a = 2 / N^2 G_b u_a - 2 / N c_dd u_b,   d on_ab / du_a = 2 / N (c_dd - 1) u_b,
and from du to dz as `fastskel.kernels.standardize` goes. No matrix of features is formed: the published batch of 356 has 30 of up
to 4096 x 4096 in eager torch, here 8 Gram matrices (W = 4) for each kind of embedding, of which half the tiles are computed. The
gradient takes the weighted sum of other views' Gram matrices first, so that each view has two products. Batches much larger than
the features go to `fastskel.kernels._decorrelation_direct`.
All products are of float32 operands, whatever the embeddings' type: covariances lose their diagonal otherwise.
Memory beside z and the gradient: W matrices N x N, which hold K and then, when its part of the gradient is written, G. For that
the gradient is written and read once more: at N = 356, D = 2048 at most 5 us of an H200, where the products take 93 at least.
"""

from __future__ import annotations

import torch
from fastskel.kernels._backend import OPTIONS, CompileCase, Cost, device_of, jit, tl, triton
from fastskel.kernels._decorrelation_direct import decorrelate_direct, direct_cost
from fastskel.kernels._decorrelation_tiles import (
    CASE_BYTES,
    CASE_VIEWS,
    SIZES,
    STRIDES,
    WEIGHTS,
    Work,
    case_signature,
    column_dots,
    energies_of,
    grid,
    pair_index,
    store_gradient,
)
from fastskel.kernels.reference.decorrelation import Energies, Options
from fastskel.kernels.standardize import (
    STRIDE_UNIT,
    TYPES,
    column_statistics,
    correct_gradient,
    load_centred,
    readable,
    strides_of,
)
from torch import Tensor

__all__ = ["decorrelate_triton", "form_of", "pass_cost"]

DEFAULTS = Options()
PRECISIONS = ("ieee", "tf32x3")
FORMS = ("gram", "direct")
# tiles of Gram matrices: small ones for small batches, which would not fill a device else
SMALL_BLOCK, LARGE_BLOCK, SMALL_BATCH = 32, 64, 512
# features, or samples, that a product takes at once, and columns of a gradient's tile; float32 operands are whole in registers
GRAM_SUM, GRADIENT_SUM, BLOCK_COLUMNS = 32, 16, 64
NUM_STAGES = 2
# programs of one multiprocessor: some times what it holds, so that none is waited for
WAVES = 32
# elements of all Gram matrices that a program mixes at once
MIX = 4096
# before 3.9 Triton multiplies what it loaded as 16 bits in TF32 on compute capability 10, whatever precision it is asked for
EXACT_TRITON, TENSOR_MEMORY = (3, 9), 10


@jit(do_not_specialize=[*STRIDES, *SIZES])
def _gram_kernel(
    p_z, p_stats, p_grams, p_squares, stride_w, stride_n, num_rows,
    W: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, STANDARD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_SUM: tl.constexpr,
):  # fmt: skip
    """Write K of all views and the sum of squares of each tile with its mirror image, or, if STANDARD, G."""
    o_n = tl.arange(0, BLOCK)
    num_tiles = tl.cdiv(num_rows, BLOCK)
    size = num_tiles * BLOCK
    per_matrix = num_tiles * (num_tiles + 1) // 2
    for item in range(tl.program_id(0), W * per_matrix, tl.num_programs(0)):
        i_w = item // per_matrix
        i_tile = item % per_matrix
        # each tile and its mirror image once: those of a diagonal that wraps around
        i_row = i_tile % num_tiles
        i_col = (i_row + i_tile // num_tiles) % num_tiles
        b_gram = tl.zeros([BLOCK, BLOCK], tl.float32)
        for start in range(0, D, BLOCK_SUM):
            i_d = start + tl.arange(0, BLOCK_SUM)
            b_row = load_centred(p_z, p_stats, i_w, i_row * BLOCK, o_n, i_d, num_rows, stride_w, stride_n, D, UNIT)
            b_col = load_centred(p_z, p_stats, i_w, i_col * BLOCK, o_n, i_d, num_rows, stride_w, stride_n, D, UNIT)
            if STANDARD:
                b_scale = tl.load(p_stats + (2 * W + i_w) * D + i_d, mask=i_d < D, other=0.0)
                b_row *= b_scale[None, :]
                b_col *= b_scale[None, :]
            b_gram = tl.dot(b_row, tl.trans(b_col), b_gram, input_precision=PRECISION)
        if p_grams is not None:
            p_gram = p_grams + tl.cast(i_w, tl.int64) * size * size
            p_tile = p_gram + tl.cast(i_row * BLOCK, tl.int64) * size + i_col * BLOCK
            tl.store(p_tile + o_n[:, None] * size + o_n[None, :], b_gram)
            if i_row != i_col:
                p_tile = p_gram + tl.cast(i_col * BLOCK, tl.int64) * size + i_row * BLOCK
                tl.store(p_tile + o_n[:, None] * size + o_n[None, :], tl.trans(b_gram))
        if p_squares is not None:
            p_square = p_squares + i_w * per_matrix + i_tile
            # over both dimensions at once: Triton 3.6 fails to compile one after the other for sm_100
            if i_row == i_col:
                tl.store(p_square, tl.sum(b_gram * b_gram))
            else:
                tl.store(p_square, 2.0 * tl.sum(b_gram * b_gram))


@jit(do_not_specialize=["num_tiles"])
def _mix_kernel(
    p_grams, p_products, p_w_off, num_tiles,
    W: tl.constexpr, VIEWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sum products of each pair of G; with weights, put in place of each G_a the sum of the others that its gradient takes."""
    i_w = tl.arange(0, VIEWS)
    m_w = i_w < W
    size = tl.cast(num_tiles * BLOCK, tl.int64) * (num_tiles * BLOCK)
    num_chunks = tl.cdiv(size, CHUNK)
    o_w = tl.where(m_w, i_w, 0).to(tl.int64) * size
    for item in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        i_e = tl.cast(item, tl.int64) * CHUNK + tl.arange(0, CHUNK)
        m_e = i_e < size
        b_gram = tl.load(p_grams + o_w[:, None] + i_e[None, :], mask=m_w[:, None] & m_e[None, :], other=0.0)
        # what a thread stores below, another may have to load
        tl.debug_barrier()
        for i_a in range(W):
            b_one = tl.sum(tl.where((i_w == i_a)[:, None], b_gram, 0.0), 0)
            o_pair = pair_index(i_a, i_w, W).to(tl.int64) * num_chunks
            tl.store(p_products + o_pair + item, tl.sum(b_one[None, :] * b_gram, 1), mask=m_w & (i_w > i_a))
            if p_w_off is not None:
                m_other = m_w & (i_w != i_a)
                b_weight = tl.load(p_w_off + pair_index(i_a, i_w, W), mask=m_other, other=0.0)
                b_mixed = tl.sum(tl.where(m_other[:, None], b_weight[:, None] * b_gram, 0.0), 0)
                tl.store(p_grams + i_a * size + i_e, b_mixed, mask=m_e)


@jit(do_not_specialize=[*STRIDES, *SIZES, "gamma", "variance_eps"])
def _gram_gradient_kernel(
    p_z, p_stats, p_dots, p_grams, p_w_hinge, p_w_covariance, p_w_on, p_w_off, p_dx, p_sums,
    stride_w, stride_n, num_rows, gamma, variance_eps,
    W: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_SUM: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write, or ADD, the gradient through K or, with `p_dots`, through the mixed G; without either that of the hinge alone."""
    o_n = tl.arange(0, BLOCK)
    o_m = tl.arange(0, BLOCK_SUM)
    num_tiles = tl.cdiv(num_rows, BLOCK)
    num_columns: tl.constexpr = (D + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    size = num_tiles * BLOCK
    for item in range(tl.program_id(0), W * num_tiles * num_columns, tl.num_programs(0)):
        i_w = item // (num_tiles * num_columns)
        i_tile = item // num_columns % num_tiles
        i_d = item % num_columns * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        b_product = tl.zeros([BLOCK, BLOCK_COLUMNS], tl.float32)
        if p_grams is not None:
            p_rows = p_grams + (tl.cast(i_w, tl.int64) * size + i_tile * BLOCK) * size
            b_rstd = tl.load(p_stats + (2 * W + i_w) * D + i_d, mask=i_d < D, other=0.0)
            for start in range(0, size, BLOCK_SUM):
                b_x = load_centred(p_z, p_stats, i_w, start, o_m, i_d, num_rows, stride_w, stride_n, D, UNIT)
                if p_dots is not None:
                    b_x *= b_rstd[None, :]
                b_gram = tl.load(p_rows + o_n[:, None] * size + (start + o_m)[None, :])
                b_product = tl.dot(b_gram, b_x, b_product, input_precision=PRECISION)
        store_gradient(
            b_product, b_product, i_w, i_tile, i_tile * BLOCK, o_n, i_d, p_z, p_stats, p_dots, p_w_hinge, p_w_covariance,
            p_w_on, p_w_off, p_dx, p_sums, stride_w, stride_n, num_rows, gamma, variance_eps,
            W, D, UNIT, p_grams is not None and p_dots is None, ADD, True,
        )  # fmt: skip


def form_of(num_rows: int, width: int) -> str:
    """Choose "gram" or "direct" for (W, N, D): above N = D, W Gram matrices would take more memory than as many of D x D."""
    return "gram" if num_rows <= width else "direct"


def pass_cost(
    num_views: int, num_rows: int, width: int, itemsize: int = 4, options: Options = DEFAULTS, *, gradient: bool = True,
    form: str | None = None,
) -> Cost:  # fmt: skip
    """Cost of one pass over (W, N, D): products of the form, and the embeddings with their gradient in float32."""
    w, n, d = num_views, num_rows, width
    pairs = options.pairs and w > 1
    if (form or form_of(n, d)) == "direct":
        flops = direct_cost(w, n, d, options.covariances, pairs, gradient)
    else:
        flops = (options.covariances + pairs) * w * n * d * (n + 1 + (2 * n if gradient else 0))
    return Cost(flops, w * n * d * (itemsize + (4 if gradient else 0)))


def _is_exact(version: str, capability: int) -> bool:
    return capability < TENSOR_MEMORY or tuple(int(part) for part in version.split(".")[:2]) >= EXACT_TRITON


def _block(num_rows: int) -> int:
    return SMALL_BLOCK if num_rows <= SMALL_BATCH else LARGE_BLOCK


def _num_warps(block: int) -> int:
    # sixteen sums a thread of the gradient's kernel: more would not leave registers for operands
    return 4 if block == SMALL_BLOCK else 8


def decorrelate_triton(
    z: Tensor, options: Options, weights: Energies | None, *, input_precision: str = "ieee", form: str | None = None
) -> tuple[Energies, Tensor | None]:
    """Compute energies and the gradient of their weighted sum.

    Args:
        z: Embeddings, (W, N, D), N at least 2; float32, bfloat16 or float16.
        options: Options of the energies.
        weights: Weights of the sum, (W,), (W,), (P,), (P,) on z's device; None for no gradient.
        input_precision: Of products of float32 operands, "ieee" or, on NVIDIA, "tf32x3": three products of tensor cores.
        form: "gram", "direct", or None for what fits N and D.
    Returns:
        The energies, float32, and the gradient (W, N, D), float32, or None.
    Raises:
        ValueError: On types, precisions and forms that are not these, or embeddings without elements.
    """
    if z.dtype not in TYPES:
        raise ValueError(f"decorrelate_triton: z must be float32, bfloat16 or float16, got {z.dtype}. Convert it.")
    if z.dim() != 3 or z.shape[1] < 2 or not z.numel():
        raise ValueError(
            f"decorrelate_triton: z must be (W, N, D) with N at least 2 and none 0, got {tuple(z.shape)}. Enlarge the batch."
        )
    if input_precision not in PRECISIONS:
        raise ValueError(f"decorrelate_triton: input_precision must be one of {PRECISIONS}, got {input_precision!r}. Choose one.")
    if form not in (None, *FORMS):
        raise ValueError(f"decorrelate_triton: form must be one of {FORMS} or None, got {form!r}. Choose one.")
    if z.is_cuda and not _is_exact(triton.__version__, torch.cuda.get_device_capability(z.device)[0]):
        z = z.float()
    z = readable(z)
    w, n, d = z.shape
    if weights is not None:
        weights = Energies(*(weight.to(torch.float32).contiguous() for weight in weights))
    stats = column_statistics(z, options.std_eps, options.correction)
    dots = column_dots(z, stats) if options.pairs and w > 1 else None
    work = Work(z, options, weights, stats, dots, input_precision)
    run = decorrelate_gram if (form or form_of(n, d)) == "gram" else decorrelate_direct
    energies, grad, sums = run(work)
    if grad is not None and sums is not None:
        correct_gradient(grad, z, stats, sums, grad, options.correction, scaled=False, projected=dots is not None)
    return energies, grad


def decorrelate_gram(work: Work) -> tuple[Energies, Tensor | None, Tensor | None]:
    """Launch the Gram form.

    Returns:
        The energies; with weights the gradient (W, N, D), float32, before it is corrected, and its column sums (2, W, D).
    """
    z, weights, dots = work.z, work.weights, work.dots
    w, n, d = z.shape
    block = _block(n)
    tiles = -(-n // block)
    stride_w, stride_n, unit = strides_of(z)
    squares = products = grams = dx = sums = None
    if dots is not None or (weights is not None and work.options.covariances):
        grams = z.new_empty(w, tiles * block, tiles * block, dtype=torch.float32)
    if weights is not None:
        dx = z.new_empty(w, n, d, dtype=torch.float32)
        sums = z.new_empty(tiles, 2, w, d, dtype=torch.float32)
    launch = {"num_warps": _num_warps(block), "num_stages": NUM_STAGES, **OPTIONS}
    tile = {"W": w, "D": d, "UNIT": unit, "PRECISION": work.precision, "BLOCK": block, **launch}

    def multiply(grams: Tensor | None, squares: Tensor | None, standard: bool) -> None:
        _gram_kernel[grid(w * tiles * (tiles + 1) // 2, z.device, WAVES)](
            z, work.stats, grams, squares, stride_w, stride_n, n, STANDARD=standard, BLOCK_SUM=GRAM_SUM, **tile
        )

    def differentiate(grams: Tensor | None, dots: Tensor | None, sums: Tensor | None, add: bool) -> None:
        if weights is not None:
            _gram_gradient_kernel[grid(w * tiles * -(-d // BLOCK_COLUMNS), z.device, WAVES)](
                z, work.stats, dots, grams, *weights, dx, sums, stride_w, stride_n, n,
                work.options.gamma, work.options.variance_eps,
                ADD=add, BLOCK_SUM=GRADIENT_SUM, BLOCK_COLUMNS=BLOCK_COLUMNS, **tile,
            )  # fmt: skip

    with device_of(z):
        if work.options.covariances:
            squares = z.new_empty(w, tiles * (tiles + 1) // 2, dtype=torch.float32)
            multiply(None if weights is None else grams, squares, False)
        if work.options.covariances or dots is None:
            differentiate(grams, None, sums if dots is None else None, False)
        if dots is not None and grams is not None:
            multiply(grams, None, True)
            views = 1 << (w - 1).bit_length()
            chunks = -(-grams[0].numel() // (MIX // views))
            products = z.new_empty(len(dots), chunks, dtype=torch.float32)
            _mix_kernel[grid(chunks, z.device, WAVES)](
                grams, products, None if weights is None else weights.off_diagonal, tiles,
                W=w, VIEWS=views, BLOCK=block, CHUNK=MIX // views, **launch,
            )  # fmt: skip
            differentiate(grams, dots, sums, work.options.covariances)
    return energies_of(work, squares, products, True), dx, None if sums is None else sums.sum(0)


POINTERS = ("p_z", "p_stats", "p_dots", "p_grams", *WEIGHTS, "p_dx", "p_sums")


def _gram_cases(kind: str, num_rows: int, width: int, hot: bool) -> list[CompileCase]:
    w, n, d, block = CASE_VIEWS, num_rows, width, _block(num_rows)
    launch = {"num_warps": _num_warps(block), "num_stages": NUM_STAGES, "hot": hot}
    tile = {"W": w, "D": d, "UNIT": STRIDE_UNIT, "PRECISION": "ieee", "BLOCK": block}
    z, label, gradient = w * n * d, f"N={n} D={d} {kind}", {"BLOCK_SUM": GRADIENT_SUM, "BLOCK_COLUMNS": BLOCK_COLUMNS}
    moved = z * CASE_BYTES[kind] + 4 * w * n * n
    numbers, integers = ("gamma", "variance_eps"), (*STRIDES, *SIZES)
    gram, grams = Cost(w * n * (n + 1) * d, moved), ("p_z", "p_stats", "p_grams")
    first = tuple(name for name in POINTERS if name not in ("p_dots", "p_sums"))
    return [
        CompileCase(
            f"{label}, K", _gram_kernel, case_signature(kind, (*grams, "p_squares"), integers),
            {**tile, "BLOCK_SUM": GRAM_SUM, "STANDARD": False}, cost=gram, **launch,
        ),
        CompileCase(
            f"{label}, G", _gram_kernel, case_signature(kind, grams, integers),
            {**tile, "p_squares": None, "BLOCK_SUM": GRAM_SUM, "STANDARD": True}, cost=gram, **launch,
        ),
        CompileCase(
            f"{label}, K", _gram_gradient_kernel, case_signature(kind, first, integers, numbers),
            {**tile, **gradient, "p_dots": None, "p_sums": None, "ADD": False},
            cost=Cost(2 * w * n * n * d, moved + 4 * z), **launch,
        ),
        CompileCase(
            f"{label}, G", _gram_gradient_kernel, case_signature(kind, POINTERS, integers, numbers),
            {**tile, **gradient, "ADD": True}, cost=Cost(2 * w * n * n * d, moved + 8 * z), **launch,
        ),
    ]  # fmt: skip


def _mix_case(num_rows: int) -> CompileCase:
    w = CASE_VIEWS
    return CompileCase(
        f"N={num_rows}", _mix_kernel, case_signature("fp32", ("p_grams", "p_products", "p_w_off"), ("num_tiles",)),
        {"W": w, "VIEWS": w, "BLOCK": _block(num_rows), "CHUNK": MIX // w},
        num_warps=_num_warps(_block(num_rows)), num_stages=NUM_STAGES, cost=Cost(0, 2 * w * num_rows * num_rows * 4), hot=True,
    )  # fmt: skip


COMPILE_CASES = [
    *_gram_cases("bf16", 356, 2048, True),
    *_gram_cases("fp32", 356, 4096, True),
    *_gram_cases("fp32", 1024, 2048, True),
    *_gram_cases("fp16", 1024, 4096, False),
    _mix_case(356),
]
