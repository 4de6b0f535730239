"""Attention over short token sets, forward: explicit softmax, compiled, torch's fused operators, Triton; each checked first.

Run as `pytest bench/kernels/bench_attention.py`; FASTSKEL_BENCH_QUICK=1 takes tiny sizes.
"""

from __future__ import annotations

import functools
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fastskel.bench.harness import Timed, waiting
from fastskel.bench.kernels import NO_GPU
from fastskel.kernels._backend import INTERPRETED
from fastskel.kernels.attention import attention_cost, attention_forward
from fastskel.kernels.reference.attention import attention_forward as attention_forward_reference
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# torch's compiler warns of its own imports
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

QUICK = os.environ.get("FASTSKEL_BENCH_QUICK") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16
BACKENDS = {
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
PROVIDERS = ["eager", "compiled", *BACKENDS, "triton"]
COPIED_BYTES = 1 << (22 if QUICK else 28)
# of a result in bfloat16, relative to the reference, in L2: a few roundings of 2**-9
TOLERANCE = 2e-2


class Case(NamedTuple):
    """Sizes of a benchmark, (N, H, S, C), and whether values are the keys."""

    size: tuple[int, int, int, int]
    shared: bool

    def __str__(self) -> str:
        return "x".join(map(str, self.size)) + "-shared" * self.shared


# the sequences of four views of a published batch, of one wide head and of many
SIZES = [(4, 1, 10, 32), (4, 2, 10, 16)] if QUICK else [(4 * 356, 1, 64, 1024), (4 * 356, 16, 64, 64)]
CASES = [Case(SIZES[0], True), Case(SIZES[0], False), Case(SIZES[1], False)]


class Inputs(NamedTuple):
    """Tensors (N, H, S, C) of one case, in the memory order of projections (N, S, H, C); values None where shared."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    grad: Tensor
    scale: float


def make(case: Case) -> Inputs:
    """Draw the inputs of a case."""
    n, h, s, c = case.size
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k, v, grad = (
        torch.randn((n, s, h, c), generator=generator, device=DEVICE, dtype=DTYPE).transpose(1, 2) for _ in range(4)
    )
    return Inputs(q, k, None if case.shared else v, grad, 1.0 / math.sqrt(c))


def eager(q: Tensor, k: Tensor, v: Tensor | None, scale: float) -> Tensor:
    """Attend with scores in memory, as the layer does without a kernel."""
    heads = [t.reshape(-1, *t.shape[2:]) for t in (q, k, k if v is None else v)]
    scores = torch.baddbmm(q.new_zeros(()), heads[0], heads[1].mT, beta=0, alpha=scale)
    return torch.bmm(scores.softmax(-1, dtype=torch.float32).to(q.dtype), heads[2]).view(q.shape)


def function_of(provider: str) -> Callable[[Tensor, Tensor, Tensor | None, float], Tensor]:
    """Return a provider's forward pass, differentiable unless it is Triton's."""
    if provider == "eager":
        return eager
    if provider == "compiled":
        return torch.compile(eager)
    if provider == "triton":
        if DEVICE.type != "cuda" and not INTERPRETED:
            pytest.skip(NO_GPU)
        return lambda q, k, v, scale: attention_forward(q, k, v, None, scale)[0]

    def fused(q: Tensor, k: Tensor, v: Tensor | None, scale: float) -> Tensor:
        with sdpa_kernel(BACKENDS[provider]):
            return F.scaled_dot_product_attention(q, k, k if v is None else v, scale=scale)

    return fused


def skip_if_refused(provider: str, call: Callable[[], Any]) -> Any:
    """Run a provider once; skip where torch has no such operator for the shape."""
    try:
        return call()
    # torch gives its reasons as warnings, which tests turn into errors
    except (RuntimeError, UserWarning) as error:
        if provider not in BACKENDS:
            raise
        reason = " ".join(str(error).split())[:120]
        pytest.skip(f"torch {torch.__version__} has no {provider} for this case: {reason}. Compare the others.")


def error_of(value: Tensor, expected: Tensor) -> float:
    """Return the relative L2 distance of two tensors (N, H, S, C)."""
    return float((value.float() - expected.float()).norm() / expected.float().norm())


@functools.cache
def copy_bandwidth() -> float:
    """Measure bytes read and written a second by a copy."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = waiting(lambda: target.copy_(source), DEVICE)
    times = []
    for _ in range(12):
        begin = time.perf_counter()
        copy()
        times.append(time.perf_counter() - begin)
    return 2 * COPIED_BYTES / statistics.median(times[2:])


def report(benchmark: Any, seconds: float | None, case: Case, backward: bool) -> None:
    """Add what the cost function says was achieved, where something was timed."""
    if seconds is None:
        return
    cost = attention_cost(case.size, DTYPE, shared=case.shared, backward=backward)
    benchmark.extra_info.update(
        gigabytes_per_second=cost.bytes / seconds / 1e9,
        share_of_copy_bandwidth=cost.bytes / seconds / copy_bandwidth(),
        teraflops_per_second=cost.flops / seconds / 1e12,
    )


def setup(case: Case, provider: str) -> Callable[[], Tensor]:
    """Prepare the forward pass of one provider, checked against the reference."""
    inputs = make(case)
    function = function_of(provider)

    def call() -> Tensor:
        return function(inputs.q, inputs.k, inputs.v, inputs.scale)

    out = skip_if_refused(provider, waiting(call, DEVICE))
    # in parts: the reference keeps its scores, and everything in float32
    for rows in torch.arange(case.size[0]).split(64):
        part = [None if t is None else t[rows] for t in inputs[:3]]
        expected, _ = attention_forward_reference(*part, None, inputs.scale)
        assert error_of(out[rows], expected) < TOLERANCE
    return call


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_attention(benchmark: Any, timed: Timed, case: Case, provider: str) -> None:
    """Time one provider's forward pass; reports GB/s, the share of a copy's, and TFLOP/s."""
    with torch.no_grad():
        seconds = timed(f"attention {case} forward", setup(case, provider))
    report(benchmark, seconds, case, backward=False)
