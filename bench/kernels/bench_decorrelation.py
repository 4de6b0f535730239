"""MG-FD's loss and gradient: matrices of features as published, compiled too, and fastskel's in each form.

The largest batch takes a minute a call: it is timed where FASTSKEL_BENCH_LARGE=1 is set.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastskel.bench.harness import Timed, peak_bytes, relative_l2
from fastskel.bench.kernels import NO_GPU
from fastskel.bench.reference.loss import total
from fastskel.kernels import decorrelation as kernel_module
from fastskel.kernels._decorrelation_triton import decorrelate_triton
from fastskel.kernels.decorrelation import Forms, decorrelation_cost
from torch import Tensor

from fastskel.objectives.functional import mgfd_loss

# of the compiler, about itself
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]

QUICK = os.environ.get("FASTSKEL_BENCH_QUICK") == "1"
LARGE = [8192] if os.environ.get("FASTSKEL_BENCH_LARGE") == "1" else []
# samples of four views; widths of the temporal, spatial and joint embeddings, float32
SIZES = [356, 1024, 4096, 16384] if torch.cuda.is_available() else [64, 356, 1024, *LARGE]
CASES = [6, 40] if QUICK else SIZES
WIDTHS = (16, 16, 32) if QUICK else (2048, 2048, 4096)
NUM_VIEWS = 4
PROVIDERS = ["direct", "compiled", "gram", "blocked", "auto", "triton-ieee", "triton-tf32x3"]
FORMS = {"gram": Forms("gram", "gram"), "blocked": Forms("direct", "direct")}
# roundings of float32, of sums in another order
TOLERANCE = 1e-5


def inputs(num_rows: int) -> list[Tensor]:
    """Draw embeddings (W, N, D) of the three domains."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(NUM_VIEWS, num_rows, width) for width in WIDTHS]
    return [torch.randn(shape, device=device, generator=generator).requires_grad_() for shape in shapes]


def direct(z_t: Tensor, z_s: Tensor, z_i: Tensor) -> Tensor:
    """What the published training computes."""
    value: Tensor = total(list(z_t.unbind()), list(z_s.unbind()), list(z_i.unbind()), "aaai")
    return value


def ours(z_t: Tensor, z_s: Tensor, z_i: Tensor) -> Tensor:
    """What fastskel's training computes."""
    return mgfd_loss(z_t, z_s, z_i)[0]


def setup(num_rows: int, provider: str) -> Callable[[], list[Tensor]]:
    """Prepare the loss and its gradients by one provider."""
    z = inputs(num_rows)
    function = direct if provider in ("direct", "compiled") else ours
    if provider == "compiled":
        function = torch.compile(direct, dynamic=False)

    def both() -> list[Tensor]:
        loss = function(*z)
        return [loss.detach(), *torch.autograd.grad(loss, z)]

    return both


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("num_rows", CASES, ids="N{}".format)
def bench_decorrelation(
    benchmark: Any, timed: Timed, monkeypatch: pytest.MonkeyPatch, num_rows: int, provider: str
) -> None:
    """Time loss and gradients after checking them; reports TFLOP/s of the products that the cheapest form has."""
    if provider.startswith("triton"):
        if not torch.cuda.is_available():
            pytest.skip(NO_GPU)
        triton = functools.partial(decorrelate_triton, input_precision=provider.partition("-")[2])
        monkeypatch.setattr(kernel_module, "_pass_for", lambda z: triton)
    if provider in FORMS:
        monkeypatch.setattr(kernel_module, "choose_form", lambda *sizes: FORMS[provider])
    call = setup(num_rows, provider)
    for value, target in zip(call(), setup(num_rows, "direct")(), strict=True):
        assert relative_l2([value], [target]) <= TOLERANCE

    seconds = timed(f"mgfd N={num_rows} D={WIDTHS}", call)
    if seconds is not None:
        costs = [decorrelation_cost(NUM_VIEWS, num_rows, width, 4, backward=True) for width in WIDTHS]
        benchmark.extra_info["teraflops_per_second"] = sum(cost.flops for cost in costs) / seconds / 1e12
        if torch.cuda.is_available():
            benchmark.extra_info["peak_bytes"] = peak_bytes(call, torch.device("cuda"))
        benchmark.extra_info["gigabytes_per_second"] = sum(cost.bytes for cost in costs) / seconds / 1e9
