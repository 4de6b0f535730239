"""Attention over short token sets, backward: explicit softmax, compiled, torch's fused operators, Triton; each checked first.

Run as `pytest bench/kernels/bench_attention_backward.py`; FASTSKEL_BENCH_QUICK=1 takes tiny sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._functorch.config
from fastskel.bench.harness import Timed, waiting
from fastskel.bench.kernels.bench_attention import (
    CASES,
    DEVICE,
    PROVIDERS,
    TOLERANCE,
    Case,
    error_of,
    function_of,
    make,
    report,
    skip_if_refused,
)
from fastskel.kernels.attention import attention_backward, attention_forward
from fastskel.kernels.reference.attention import attention_forward as attention_forward_reference
from fastskel.kernels.reference.attention_backward import attention_backward as attention_backward_reference
from torch import Tensor

# torch's compiler warns of its own imports
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def setup(case: Case, provider: str) -> Callable[[], tuple[Tensor | None, ...]]:
    """Prepare the backward pass of one provider after its forward pass, checked against the reference."""
    q, k, v, grad, scale = make(case)
    function = function_of(provider)
    leaves = [t.requires_grad_() for t in (q, k, v) if t is not None]
    if provider == "triton":
        with torch.no_grad():
            _, lse = attention_forward(q, k, v, None, scale)

        def call() -> tuple[Tensor | None, ...]:
            return attention_backward(grad, q.detach(), k.detach(), v, lse, None, scale)
    else:
        out = skip_if_refused(provider, lambda: function(q, k, v, scale))

        def call() -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    # a fused operator may refuse its backward pass only
    gradients = [t for t in skip_if_refused(provider, waiting(call, DEVICE)) if t is not None]
    with torch.no_grad():
        # in parts: the reference keeps its scores, and everything in float32
        for rows in torch.arange(case.size[0]).split(64):
            part = [None if t is None else t[rows] for t in (q, k, v)]
            _, lse_part = attention_forward_reference(*part, None, scale)
            expected = attention_backward_reference(grad[rows], *part, lse_part, None, scale)
            for value, exact in zip(gradients, [t for t in expected if t is not None], strict=True):
                assert error_of(value[rows], exact) < TOLERANCE
    return call


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_attention_backward(benchmark: Any, timed: Timed, case: Case, provider: str) -> None:
    """Time one provider's backward pass; reports GB/s, the share of a copy's, and TFLOP/s."""
    # the graph of one forward pass is gone through many times
    with torch._functorch.config.patch(donated_buffer=False):
        seconds = timed(f"attention {case} backward", setup(case, provider))
    report(benchmark, seconds, case, backward=True)
