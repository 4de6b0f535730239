"""The MLP as one operator, on a residual stream: torch's modules, compiled, the operator with its reference, Triton."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastskel.bench.harness import Timed
from fastskel.bench.kernels import NO_GPU
from fastskel.kernels.mlp import mlp, mlp_cost
from fastskel.kernels.reference.mlp import mlp as mlp_reference
from torch import Tensor

# of the compiler, about itself
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

QUICK = os.environ.get("FASTSKEL_BENCH_QUICK") == "1"
# sequences (4 views of 356 clips), tokens, width, hidden width; bfloat16, the stream in float32
CASES = [(4, 6, 16, 32)] if QUICK else [(1424, 64, 1024, 2048), (1424, 50, 1024, 2048)]
# without a GPU the operator is its reference
PROVIDERS = ["eager", "compiled", "operator", "triton"]
PASSES = ["forward", "both"]
# two roundings of bfloat16
TOLERANCE = 2e-2
TRITONS = "on a GPU the operator is Triton's kernel. Take the figures of triton."


def inputs(case: tuple[int, int, int, int]) -> dict[str, Tensor]:
    """Draw the arguments of a case."""
    n, s, d, hidden = case
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (scale * torch.randn(size, device=device, generator=generator)).to(dtype).requires_grad_()

    return dict(
        x=randn(n, s, d),
        up_weight=randn(hidden, d, scale=d**-0.5),
        up_bias=randn(hidden),
        down_weight=randn(d, hidden, scale=hidden**-0.5),
        down_bias=randn(d),
        residual=randn(n, s, d, dtype=torch.float32),
    )


def eager(x: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor, down_bias: Tensor, residual: Tensor) -> Tensor:
    """What a user writes."""
    return residual + F.linear(F.gelu(F.linear(x, up_weight, up_bias)), down_weight, down_bias)


def setup(case: tuple[int, int, int, int], provider: str, direction: str) -> Callable[[], list[Tensor]]:
    """Prepare the forward pass, or it and the backward pass, by one provider."""
    given = inputs(case)
    grad = torch.ones_like(given["residual"])
    functions = dict(eager=eager, reference=mlp_reference, operator=mlp, triton=mlp)
    function = torch.compile(eager, dynamic=False) if provider == "compiled" else functions[provider]
    if direction == "forward":
        with torch.no_grad():
            given = {name: value.detach() for name, value in given.items()}
        return lambda: [function(**given)]

    def both() -> list[Tensor]:
        out = function(**given)
        return [out.detach(), *torch.autograd.grad(out, list(given.values()), grad)]

    return both


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case)))
def bench_mlp(benchmark: Any, timed: Timed, case: tuple[int, int, int, int], provider: str, direction: str) -> None:
    """Time one pass or both after checking them; reports TFLOP/s of the products, and GB/s of what must move at least."""
    if (provider == "triton") != torch.cuda.is_available() and provider in ("triton", "operator"):
        pytest.skip(NO_GPU if provider == "triton" else TRITONS)
    call = setup(case, provider, direction)
    for value, target in zip(call(), setup(case, "reference", direction)(), strict=True):
        scale = float(target.abs().max())
        torch.testing.assert_close(value.float(), target.float(), rtol=TOLERANCE, atol=TOLERANCE * scale)

    n, s, d, hidden = case
    seconds = timed(f"mlp {direction} N={n} S={s} D={d} F={hidden}", call)
    if seconds is not None:
        passes = (False, True) if direction == "both" else (False,)
        costs = [mlp_cost(n * s, d, hidden, 2, 4, backward) for backward in passes]
        benchmark.extra_info["teraflops_per_second"] = sum(cost.flops for cost in costs) / seconds / 1e12
        benchmark.extra_info["gigabytes_per_second"] = sum(cost.bytes for cost in costs) / seconds / 1e9
