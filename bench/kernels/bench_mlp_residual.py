"""The end of the dense layer, y + half lin + alpha ca(rows) + bias: plain torch as the layer writes it, compiled, Triton."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from fastskel.bench.harness import Timed
from fastskel.bench.kernels import NO_GPU
from fastskel.kernels.mlp_residual import Branch, mlp_residual, mlp_residual_backward, mlp_residual_cost
from fastskel.kernels.reference.mlp_residual import mlp_residual as mlp_residual_reference
from torch import Tensor

# of the compiler, about itself
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

QUICK = os.environ.get("FASTSKEL_BENCH_QUICK") == "1"
# sequences (4 views of 356 clips), tokens, columns; branches in bfloat16, the stream in float32
CASES = [(4, 6, 32)] if QUICK else [(1424, 64, 1024), (1424, 50, 1024)]
PROVIDERS = ["eager", "compiled", "triton"]
PASSES = ["forward", "backward"]
HALF, ALPHA = 0.25, 0.5 / 0.9
# a rounding of bfloat16
TOLERANCE = 1e-2


class Inputs(NamedTuple):
    """Stream and its gradient (N, S, D), both values (n, S, D), bias (D,), its count (N,), rows of the second, and its slots."""

    base: Tensor
    grad: Tensor
    mixed: Tensor
    some: Tensor
    bias: Tensor
    count: Tensor
    rows: Tensor
    slots: Tensor


def inputs(case: tuple[int, int, int]) -> Inputs:
    """Draw the tensors of a case."""
    n, s, d = case
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=generator)

    there = torch.rand(n, device=device, generator=generator) >= 0.1
    rows, slots = there.nonzero()[:, 0], torch.where(there, there.cumsum(0) - 1, -1).int()
    mixed, some = randn(n, s, d).bfloat16(), randn(len(rows), s, d).bfloat16()
    return Inputs(randn(n, s, d), randn(n, s, d), mixed, some, randn(d), randn(n).abs(), rows, slots)


def eager_forward(base: Tensor, mixed: Tensor, some: Tensor, bias: Tensor, count: Tensor, rows: Tensor) -> Tensor:
    """Add everything as the plain layer does, in place."""
    base.add_(mixed.to(base.dtype), alpha=HALF).addcmul_((HALF * count)[:, None, None], bias)
    return base.index_add_(0, rows, some.to(base.dtype), alpha=ALPHA)


def eager_backward(grad: Tensor, count: Tensor, rows: Tensor) -> list[Tensor]:
    """Gradients of both values, and of both biases."""
    half = grad * HALF
    d_some = grad.index_select(0, rows) * ALPHA
    d_bias = (half.sum(1) * count[:, None]).sum(0)
    return [half.bfloat16(), d_some.bfloat16(), d_bias, d_some.sum((0, 1))]


def setup(case: tuple[int, int, int], provider: str, direction: str) -> Callable[[], list[Tensor]]:
    """Prepare one pass by one provider; forward passes write to the stream, which is why it is drawn for each."""
    given = inputs(case)
    zeros = torch.zeros_like(given.bias)
    branches = [
        Branch(given.mixed, None, HALF, None, given.bias, given.count, HALF),
        Branch(given.some, given.slots, ALPHA, None, zeros),
    ]
    if provider == "triton":
        if direction == "forward":
            return lambda: [mlp_residual(given.base, branches, out=given.base)]
        buffers = [branch._replace(value=torch.empty_like(branch.value)) for branch in branches]
        return lambda: [*(branch.value for branch in buffers), *mlp_residual_backward(given.grad, buffers)]
    if provider == "reference":
        leaves = [given.mixed, given.some, given.bias, zeros]
        out = mlp_residual_reference(given.base, branches if direction == "forward" else [
            branch._replace(value=branch.value.requires_grad_(), bias=branch.bias.requires_grad_()) for branch in branches
        ])  # fmt: skip
        return lambda: [out] if direction == "forward" else list(torch.autograd.grad(out, leaves, given.grad))
    call = eager_forward if direction == "forward" else eager_backward
    if provider == "compiled":
        call = torch.compile(call, dynamic=False)
    if direction == "forward":
        return lambda: [call(given.base, given.mixed, given.some, given.bias, given.count, given.rows)]
    return lambda: call(given.grad, given.count, given.rows)


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case)))
def bench_mlp_residual(benchmark: Any, timed: Timed, case: tuple[int, int, int], provider: str, direction: str) -> None:
    """Time one pass after checking it; reports GB/s of what a pass must move at least."""
    if provider == "triton" and not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    call = setup(case, provider, direction)
    for value, target in zip(call(), setup(case, "reference", direction)(), strict=True):
        scale = float(target.detach().abs().max())
        torch.testing.assert_close(value.float(), target.float(), rtol=TOLERANCE, atol=TOLERANCE * scale)

    n, s, d = case
    seconds = timed(f"mlp_residual {direction} N={n} S={s} D={d}", call)
    if seconds is not None:
        rows = [n * s, len(inputs(case).rows) * s]
        cost = mlp_residual_cost(rows, n * s, d, 2, 4, direction == "backward")
        benchmark.extra_info["gigabytes_per_second"] = cost.bytes / seconds / 1e9
