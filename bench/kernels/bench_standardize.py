"""Standardised embeddings: plain torch as the losses write it, compiled, torch's batch normalisation, Triton."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastskel.bench.harness import Timed
from fastskel.bench.kernels import NO_GPU
from fastskel.kernels.reference.standardize import standardize as standardize_reference
from fastskel.kernels.standardize import standardize_backward, standardize_cost, standardize_forward
from torch import Tensor

# of the compiler, about itself
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

QUICK = os.environ.get("FASTSKEL_BENCH_QUICK") == "1"
# views, samples, features; float32
CASES = [(2, 16, 32)] if QUICK else [(4, 356, 2048), (4, 356, 4096)]
PROVIDERS = ["eager", "compiled", "batch_norm", "triton"]
PASSES = ["forward", "backward"]


def eager(z: Tensor) -> Tensor:
    """Standardise each view, as a loss does."""
    return torch.stack([(view - view.mean(0)) / view.std(0) for view in z])


def batch_norm(z: Tensor) -> Tensor:
    """Standardise by torch's kernels, of which the variance is over N."""
    scale = ((z.shape[1] - 1) / z.shape[1]) ** 0.5
    return torch.stack([F.batch_norm(view, None, None, training=True, eps=1e-12) for view in z]) * scale


def setup(case: tuple[int, int, int], provider: str, direction: str) -> Callable[[], Tensor]:
    """Prepare one pass by one provider; a forward pass leaves what a backward pass needs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    z, grad = (torch.randn(case, device=device, generator=generator) for _ in range(2))
    if provider == "triton":
        if direction == "forward":
            return lambda: standardize_forward(z, 0.0, 1)[0]
        _, stats = standardize_forward(z, 0.0, 1)
        return lambda: standardize_backward(grad, z, stats, 1)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "eager": eager, "batch_norm": batch_norm, "reference": standardize_reference
    }  # fmt: skip
    function = torch.compile(eager, dynamic=False) if provider == "compiled" else functions[provider]
    leaf = z.requires_grad_()
    if direction == "forward":
        return lambda: function(leaf)
    values = function(leaf)
    return lambda: torch.autograd.grad(values, leaf, grad, retain_graph=True)[0]


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case)))
def bench_standardize(benchmark: Any, timed: Timed, case: tuple[int, int, int], provider: str, direction: str) -> None:
    """Time one pass after checking it; reports GB/s of what it must move at least."""
    if provider == "triton" and not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    call = setup(case, provider, direction)
    torch.testing.assert_close(call(), setup(case, "reference", direction)(), rtol=1e-4, atol=1e-5)

    cost = standardize_cost(*case, backward=direction == "backward")
    seconds = timed(f"standardize {direction} W={case[0]} N={case[1]} D={case[2]}", call)
    if seconds is not None:
        benchmark.extra_info["gigabytes_per_second"] = cost.bytes / seconds / 1e9
