"""Hidden activations of both dense shift branches under DropPath: plain torch as the layer writes it, compiled, Triton."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastskel.bench.harness import Timed
from fastskel.bench.kernels import NO_GPU
from fastskel.kernels.mlp_hidden import Hidden, mlp_hidden, mlp_hidden_backward, mlp_hidden_cost
from fastskel.kernels.reference.mlp_hidden import mlp_hidden as mlp_hidden_reference
from torch import Tensor

# of the compiler, about itself
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

QUICK = os.environ.get("FASTSKEL_BENCH_QUICK") == "1"
# sequences (4 views of 356 clips), tokens, columns; bfloat16
CASES = [(4, 6, 32)] if QUICK else [(1424, 64, 2048), (1424, 50, 2048)]
PROVIDERS = ["eager", "compiled", "triton"]
PASSES = ["forward", "backward"]
FACTOR = 1.0 / 0.9
# two roundings of bfloat16, of numbers that a sum cancels to
TOLERANCE = 2e-2


def inputs(case: tuple[int, int, int]) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Gradient (N, S, F), both branches (n, S, F) in one buffer, the rows of each, and their slots in the buffer."""
    n, s, f = case
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    kept = [torch.rand(n, device=device, generator=generator) >= 0.1 for _ in range(2)]
    rows = [there.nonzero()[:, 0] for there in kept]
    starts = [0, len(rows[0])]
    slots = [torch.where(there, there.cumsum(0) - 1 + start, -1).int() for there, start in zip(kept, starts)]
    grad, up = (
        torch.randn(size, s, f, device=device, generator=generator).bfloat16() for size in (n, len(rows[0]) + len(rows[1]))
    )
    return grad, up, rows, slots


def eager_forward(up: Tensor, rows: list[Tensor], num_samples: int) -> Tensor:
    """Sum both branches as the plain layer does."""
    first, second = torch.split(F.gelu(up), [len(chosen) for chosen in rows])
    total = first.new_zeros(num_samples, *up.shape[1:]).index_copy_(0, rows[0], first)
    return total.index_add_(0, rows[1], second).mul_(FACTOR)


def eager_backward(grad: Tensor, up: Tensor, rows: list[Tensor]) -> list[Tensor]:
    """Activations again, gradient of what is before them, and the sum for its bias."""
    gathered = torch.cat([grad.index_select(0, chosen) for chosen in rows]) * FACTOR
    d_up = torch.ops.aten.gelu_backward(gathered, up)
    return [eager_forward(up, rows, len(grad)), d_up, d_up.sum((0, 1), dtype=torch.float32)]


def setup(case: tuple[int, int, int], provider: str, direction: str) -> Callable[[], list[Tensor]]:
    """Prepare one pass by one provider."""
    grad, up, rows, slots = inputs(case)
    terms = [Hidden(up, places, FACTOR) for places in slots]
    if provider == "triton":
        if direction == "forward":
            return lambda: [mlp_hidden(terms, "gelu", num_samples=case[0])]
        d_up = torch.empty_like(up)

        def backward() -> list[Tensor]:
            hidden, d_bias = mlp_hidden_backward(grad, terms, "gelu", d_ups=[d_up, d_up], want_hidden=True, want_bias=True)
            return [hidden, d_up, d_bias]

        return backward
    if provider == "reference":
        leaf, bias = up.requires_grad_(), torch.zeros(case[2], device=up.device, requires_grad=True)
        terms = [term._replace(up=(leaf + bias).float()) for term in terms]
        out = mlp_hidden_reference(terms, "gelu", num_samples=case[0])
        grads = [] if direction == "forward" else torch.autograd.grad(out, [leaf, bias], grad.float())
        return lambda: [out.detach(), *grads]
    function: Callable[..., Any] = eager_forward if direction == "forward" else eager_backward
    arguments = (up, rows, case[0]) if direction == "forward" else (grad, up, rows)
    call = torch.compile(function, dynamic=False) if provider == "compiled" else function
    return lambda: found if isinstance(found := call(*arguments), list) else [found]


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case)))
def bench_mlp_hidden(benchmark: Any, timed: Timed, case: tuple[int, int, int], provider: str, direction: str) -> None:
    """Time one pass after checking it; reports GB/s of what a pass must move at least."""
    if provider == "triton" and not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    call = setup(case, provider, direction)
    for value, target in zip(call(), setup(case, "reference", direction)(), strict=True):
        torch.testing.assert_close(value.float(), target.float(), rtol=TOLERANCE, atol=TOLERANCE * float(target.abs().max()))

    n, s, f = case
    seconds = timed(f"mlp_hidden {direction} N={n} S={s} F={f}", call)
    if seconds is not None:
        rows = [len(chosen) * s for chosen in inputs(case)[2]]
        cost = mlp_hidden_cost(rows, n * s, f, 2, direction == "backward")
        benchmark.extra_info["gigabytes_per_second"] = cost.bytes / seconds / 1e9
