"""The largest products of queries with a gallery: torch by the whole matrix in float32, in blocks of bfloat16, and Triton."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastskel.bench.harness import Timed
from fastskel.bench.kernels import NO_GPU
from fastskel.kernels.nearest import nearest, nearest_cost
from fastskel.kernels.reference.nearest import nearest as nearest_reference
from torch import Tensor

Case = tuple[int, int, int, int]
# queries, rows, terms, kept; a CPU would take minutes for the first ones
QUICK = os.environ.get("FASTSKEL_BENCH_QUICK") == "1" or not torch.cuda.is_available()
PUBLISHED = [(16_487, 40_091, 2112, 16), (16_487, 40_091, 2112, 32), (16_487, 40_091, 2112, 64), (1, 40_091, 2112, 16)]
CASES: list[Case] = [(40, 700, 64, 16)] if QUICK else PUBLISHED
PROVIDERS = ["reference", "blocks", "triton"]
BLOCK = 1024


def blocks(queries: Tensor, gallery: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Multiply in blocks of queries: products are rounded to bfloat16."""
    found = [(part @ gallery.T).topk(keep, dim=1) for part in torch.split(queries, BLOCK)]
    return torch.cat([best.values for best in found]), torch.cat([best.indices for best in found])


def setup(case: Case, provider: str) -> Callable[[], tuple[Tensor, Tensor]]:
    """Prepare one search by one provider."""
    num_queries, num_rows, width, keep = case
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    queries, gallery = (
        torch.randn(number, width, device=device, generator=generator).mul_(width**-0.5).to(torch.bfloat16)
        for number in (num_queries, num_rows)
    )
    functions = {"reference": nearest_reference, "blocks": blocks, "triton": nearest}
    return lambda: functions[provider](queries, gallery, keep)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case)))
def bench_nearest(benchmark: Any, timed: Timed, case: Case, provider: str) -> None:
    """Time one search after checking its products; reports TFLOP/s."""
    if provider == "triton" and not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    call = setup(case, provider)
    # bfloat16 keeps 8 bits; sums of float32 in another order differ by less
    rtol = 2.0**-8 if provider == "blocks" else 1e-4
    torch.testing.assert_close(call()[0].float(), setup(case, "reference")()[0], rtol=rtol, atol=1e-6)

    num_queries, num_rows, width, keep = case
    seconds = timed(f"nearest B={num_queries} N={num_rows} K={width} keep={keep}", call)
    if seconds is not None:
        benchmark.extra_info["tflop_per_s"] = nearest_cost(*case).flops / seconds / 1e12
