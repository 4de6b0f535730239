"""Maximum over tokens: torch.amax, with a byte kept per element as the models do, compiled, the operator, Triton."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastskel.bench.harness import Timed
from fastskel.bench.kernels import NO_GPU
from fastskel.kernels.token_pool import token_pool, token_pool_backward, token_pool_cost, token_pool_forward
from torch import Tensor

# of the compiler, about itself
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

QUICK = os.environ.get("FASTSKEL_BENCH_QUICK") == "1"
# sequences (4 views of 356 clips), tokens, columns; float32
CASES = [(4, 6, 32)] if QUICK else [(1424, 64, 1024), (1424, 50, 1024)]
# without a GPU the operator is its reference
PROVIDERS = ["amax", "eager", "compiled", "operator", "triton"]
PASSES = ["forward", "backward"]


def eager_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima, and a byte per element."""
    values = x.amax(1)
    return values, x == values[:, None]


def eager_backward(grad: Tensor, chosen: Tensor) -> Tensor:
    """Share the gradient among ties."""
    share = (grad / chosen.view(torch.uint8).sum(1, dtype=torch.uint8))[:, None]
    return torch.where(chosen, share, 0 * share)


def setup(case: tuple[int, int, int], provider: str, direction: str) -> Callable[[], Tensor]:
    """Prepare one pass by one provider; a forward pass leaves what a backward pass needs."""
    n, s, d = case
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    x, grad = (torch.randn(size, device=device, generator=generator) for size in ((n, s, d), (n, d)))
    forward = direction == "forward"
    if provider in ("amax", "operator"):
        leaf = x.requires_grad_()
        function = token_pool if provider == "operator" else lambda tokens: tokens.amax(1)
        if forward:
            return lambda: function(leaf)
        values = function(leaf)
        return lambda: torch.autograd.grad(values, leaf, grad, retain_graph=True)[0]
    if provider == "triton":
        winners = token_pool_forward(x, True)[1]
        return lambda: token_pool_forward(x, True)[0] if forward else token_pool_backward(grad, winners, s, x.dtype)
    chosen = eager_forward(x)[1]
    call: Callable[..., Any] = eager_forward if forward else eager_backward
    if provider == "compiled":
        call = torch.compile(call, dynamic=False)
    return lambda: call(x)[0] if forward else call(grad, chosen)


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case)))
def bench_token_pool(benchmark: Any, timed: Timed, case: tuple[int, int, int], provider: str, direction: str) -> None:
    """Time one pass after checking it; reports GB/s of what a pass with a bit kept per element must move at least."""
    if provider == "triton" and not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    call = setup(case, provider, direction)
    torch.testing.assert_close(call(), setup(case, "amax", direction)(), rtol=0, atol=0)

    n, s, d = case
    seconds = timed(f"token_pool {direction} N={n} S={s} D={d}", call)
    if seconds is not None:
        benchmark.extra_info["gigabytes_per_second"] = token_pool_cost(n, s, d).bytes / seconds / 1e9
