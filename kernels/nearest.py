r"""The largest products of each query with the rows of a gallery, without the matrix of all products.

For queries q (B, K) and a gallery g (N, K) in bfloat16,

    s_bn = sum_k q_bk g_nk,        the `keep` largest s_bn of every b, and their n.

A program owns a block of queries and a split of the gallery, which it walks in tiles. It sums a tile of products in float32 and
holds the best so far in registers; while some query has a product in the tile above the least of its best, the largest is moved
from the tile to the place of that least. Of n rows in no order a query moves keep (1 + log(n / keep)), and a tile goes round as
often as the query that moves most. Torch then joins the lists of the splits.
Bytes moved for B = 16,487, N = 40,091, K = 2,112: the operands of all tiles, 2 B N K (2 / BLOCK) bytes or 44 GB, of which the
queries and tiles of the programs that run at a time stay in cache: from memory the gallery for every 33 blocks, 0.7 GB. The 2.8
TFLOP take at least 3.5 ms of an H200 (790 TFLOP/s). Torch in blocks writes B N products, and reads them several times to select:
1.3 GB each time in bfloat16, as which they prove nothing; 2.6 GB in float32, the products of which take 42 ms (67 TFLOP/s).
"""

from __future__ import annotations

import torch
from fastskel.kernels._backend import OPTIONS, CompileCase, Cost, cpu_kernel, device_of, jit, num_processors, tl
from fastskel.kernels._product import product
from fastskel.kernels.reference.nearest import nearest as nearest_reference
from torch import Tensor

__all__ = ["BLOCK_K", "MOST_KEPT", "MOST_ROWS", "nearest", "nearest_cost", "nearest_triton"]

# a tile of products, and the terms that are multiplied at a time
BLOCK_B, BLOCK_N, BLOCK_K = 128, 128, 64
NUM_WARPS, NUM_STAGES = 8, 3
# lists of 64 take as many registers as a tile
MOST_KEPT = 64
# row numbers have 32 bits, also those of the end of the last split
MOST_ROWS = 2**30
# parts of the gallery at least: the blocks of queries that run side by side stay in cache; lists of many parts begin anew in each
SPLITS = 4


def nearest(queries: Tensor, gallery: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Find the largest products of each query with the rows of a gallery; equal ones in any order.

    Args:
        queries: (B, K), bfloat16, contiguous; K a multiple of 64; finite.
        gallery: (N, K), the same; N from 1 to 2^30.
        keep: Products of each query, a power of two from 1 to 64.
    Returns:
        The products, float32, falling, and their rows, int32, (B, keep) each; minus infinity and -1 where N is below `keep`.
    Raises:
        ValueError: On other shapes, types and numbers.
    """
    for name, rows in (("queries", queries), ("gallery", gallery)):
        alike = rows.dim() == 2 and rows.shape[1:] == queries.shape[1:] and rows.shape[1] % BLOCK_K == 0
        if not alike or rows.dtype != torch.bfloat16 or not rows.is_contiguous():
            raise ValueError(
                f"nearest: {name} must be contiguous bfloat16 rows of one width, a multiple of {BLOCK_K}, "
                f"got {rows.dtype} of shape {tuple(rows.shape)}. Fill them up with zeros."
            )
    if not 1 <= len(gallery) <= MOST_ROWS:
        raise ValueError(f"nearest: gallery must have 1 to {MOST_ROWS} rows, got {len(gallery)}. Search it in parts.")
    if keep not in (1, 2, 4, 8, 16, 32, MOST_KEPT):
        raise ValueError(f"nearest: keep must be a power of two from 1 to {MOST_KEPT}, got {keep}. Round it up.")
    scores, rows = _operator(queries, gallery, keep)
    return scores, rows


@jit(do_not_specialize=["num_queries", "num_rows", "num_splits", "split_rows"])
def _nearest_kernel(
    p_queries, p_gallery, p_scores, p_rows, num_queries, num_rows, num_splits, split_rows,
    K: tl.constexpr, KEEP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_split = tl.program_id(0) % num_splits
    i_b = tl.program_id(0) // num_splits * BLOCK_B + tl.arange(0, BLOCK_B)
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    o_keep = tl.arange(0, KEEP)
    # what lies outside reads row 0: no masks where it counts
    p_query = p_queries + tl.where(i_b < num_queries, i_b, 0).to(tl.int64)[:, None] * K + o_k[None, :]
    b_best = tl.full([BLOCK_B, KEEP], float("-inf"), tl.float32)
    b_row = tl.full([BLOCK_B, KEEP], -1, tl.int32)
    b_least = tl.full([BLOCK_B], float("-inf"), tl.float32)
    end = tl.minimum(num_rows, (i_split + 1) * split_rows)
    for first in range(i_split * split_rows, end, BLOCK_N):
        m_n = first + o_n < end
        p_row = p_gallery + tl.where(m_n, first + o_n, 0).to(tl.int64)[None, :] * K + o_k[:, None]
        b_score = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
        for start in range(0, K, BLOCK_K):
            b_score = product(tl.load(p_query + start), tl.load(p_row + start), b_score)
        b_score = tl.where(m_n[None, :], b_score, float("-inf"))
        b_most = tl.max(b_score, 1)
        while tl.max((b_most > b_least).to(tl.int32), 0) > 0:
            i_most = tl.argmax(b_score, 1)
            m_place = (o_keep[None, :] == tl.argmin(b_best, 1)[:, None]) & (b_most > b_least)[:, None]
            b_best = tl.where(m_place, b_most[:, None], b_best)
            b_row = tl.where(m_place, first + i_most[:, None], b_row)
            b_least = tl.min(b_best, 1)
            b_score = tl.where(o_n[None, :] == i_most[:, None], float("-inf"), b_score)
            b_most = tl.max(b_score, 1)
    o_list = (i_b.to(tl.int64) * num_splits + i_split)[:, None] * KEEP + o_keep[None, :]
    tl.store(p_scores + o_list, b_best, mask=(i_b < num_queries)[:, None])
    tl.store(p_rows + o_list, b_row, mask=(i_b < num_queries)[:, None])


def nearest_cost(num_queries: int, num_rows: int, width: int, keep: int) -> Cost:
    """Cost of one search of (B, K) in (N, K): both read once, the lists written once."""
    return Cost(2 * num_queries * num_rows * width, 2 * (num_queries + num_rows) * width + 8 * num_queries * keep)


def _compile_cases() -> list[CompileCase]:
    queries, rows, width = 16_487, 40_091, 2112
    pointers = {"p_queries": "*bf16", "p_gallery": "*bf16", "p_scores": "*fp32", "p_rows": "*i32"}
    sizes = dict.fromkeys(("num_queries", "num_rows", "num_splits", "split_rows"), "i32")
    return [
        CompileCase(
            f"K={width} keep {keep}", _nearest_kernel, {**pointers, **sizes},
            {"K": width, "KEEP": keep, "BLOCK_B": BLOCK_B, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K},
            num_warps=NUM_WARPS, num_stages=NUM_STAGES, cost=nearest_cost(queries, rows, width, keep),
        )
        for keep in (16, 32, 64)
    ]  # fmt: skip


COMPILE_CASES = _compile_cases()


def nearest_triton(queries: Tensor, gallery: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Launch the kernel on queries (B, K) and rows (N, K); returns products and rows, (B, keep) each."""
    num_queries, num_rows = len(queries), len(gallery)
    blocks, tiles = -(-num_queries // BLOCK_B), -(-num_rows // BLOCK_N)
    # as many splits as fill the waves that so few take; a multiprocessor holds one program
    processors = num_processors(queries.device)
    wanted = -(-SPLITS * blocks // processors) * processors // max(blocks, 1)
    split_rows = -(-tiles // max(wanted, 1)) * BLOCK_N
    splits = -(-num_rows // split_rows)
    scores = queries.new_empty(num_queries, splits, keep, dtype=torch.float32)
    rows = queries.new_empty(num_queries, splits, keep, dtype=torch.int32)
    if blocks:
        with device_of(queries):
            _nearest_kernel[(blocks * splits,)](
                queries, gallery, scores, rows, num_queries, num_rows, splits, split_rows,
                K=queries.shape[1], KEEP=keep, BLOCK_B=BLOCK_B, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
                num_warps=NUM_WARPS, num_stages=NUM_STAGES, **OPTIONS,
            )  # fmt: skip
    best, order = scores.flatten(1).topk(keep, dim=1)
    return best, rows.flatten(1).gather(1, order)


_operator = torch.library.custom_op(
    "fastskel::nearest", nearest_triton, mutates_args=(), device_types="cuda",
    schema="(Tensor queries, Tensor gallery, int keep) -> (Tensor, Tensor)",
)  # fmt: skip
_operator.register_kernel("cpu")(cpu_kernel(nearest_reference, nearest_triton))


@_operator.register_fake
def _(queries: Tensor, gallery: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    shape = (len(queries), keep)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int32)
