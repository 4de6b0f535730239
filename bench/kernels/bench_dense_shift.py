"""Dense shift with the normalisation that follows: the layer's torch operations, compiled, autograd of its definition, Triton.

Run as `pytest bench/kernels/bench_dense_shift.py`; FASTSKEL_BENCH_QUICK=1 takes a tiny size.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastskel.bench.harness import Timed
from fastskel.bench.kernels import NO_GPU
from fastskel.kernels.dense_shift import (
    dense_shift_backward,
    dense_shift_backward_cost,
    dense_shift_forward,
    dense_shift_forward_cost,
)
from fastskel.kernels.reference import dense_shift as reference
from torch import Tensor

EPS, GAP = 1e-5, 4
COMPUTE, RESIDUAL = torch.bfloat16, torch.float32
QUICK = os.environ.get("FASTSKEL_BENCH_QUICK", "0") == "1"
# four views of the published batch, in the temporal and the spatial stream
SHAPES = [(4, 17, 32)] if QUICK else [(1424, 64, 1024), (1424, 50, 1024)]
PASSES = ("forward", "backward")
# autograd: what a user has without any of this, its backward pass from what its forward pass kept
PROVIDERS = ("eager", "compiled", "autograd", "triton")
# sums of rows rounded to the compute type in other orders
TOLERANCE = 2e-2

Call = Callable[[], tuple[Tensor, ...]]


class Problem:
    """Inputs of both passes.

    Args:
        shape: (N, S, D).
        device: Where the tensors are.
    """

    def __init__(self, shape: tuple[int, int, int], device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(dtype: torch.dtype, *size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=dtype)

        _, s, d = shape
        self.xb = draw(COMPUTE, *shape)
        self.x = self.xb.to(RESIDUAL)
        self.mixtures = (draw(COMPUTE, s, s) / s**0.5, draw(COMPUTE, s), draw(COMPUTE, s, s) / s**0.5, draw(COMPUTE, s))
        self.weight, self.bias = draw(RESIDUAL, d), draw(RESIDUAL, d)
        self.dz, self.d_shifted, self.into = draw(COMPUTE, *shape), draw(RESIDUAL, *shape), draw(RESIDUAL, *shape)
        self.live = (torch.arange(s, device=device) % GAP).nonzero()[:, 0]
        _, self.z, self.mean, self.rstd = reference.dense_shift(
            self.x, *self.mixtures, GAP, self.weight, self.bias, EPS
        )


def eager_shift(p: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    wt1, b1, wt2, b2 = p.mixtures
    hidden = torch.matmul(wt1, p.xb).add_(b1[:, None]).relu_()
    mixed = torch.matmul(wt2[p.live], hidden).add_(b2[p.live, None])
    return x.index_add(1, p.live, mixed.to(x.dtype)), hidden


def eager_forward(p: Problem, x: Tensor) -> tuple[Tensor, ...]:
    # the cast of x is one of the passes' costs
    xb = x.to(COMPUTE)
    shifted, _ = eager_shift(p, x)
    out, mean, rstd = torch.native_layer_norm(shifted, shifted.shape[-1:], p.weight, p.bias, EPS)
    return shifted, out.to(COMPUTE), xb, mean[..., 0], rstd[..., 0]


def eager_backward(p: Problem, into: Tensor) -> tuple[Tensor, ...]:
    wt1, _, wt2, _ = p.mixtures
    shifted, hidden = eager_shift(p, p.xb.to(RESIDUAL))
    d_in, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
        p.dz.to(RESIDUAL),
        shifted,
        shifted.shape[-1:],
        p.mean[..., None],
        p.rstd[..., None],
        p.weight,
        p.bias,
        [True] * 3,
    )
    g = d_in + p.d_shifted
    gm = g.index_select(1, p.live).to(COMPUTE)
    d_wt2 = torch.bmm(gm, hidden.mT).sum(0, dtype=RESIDUAL)
    dh = torch.ops.aten.threshold_backward(torch.matmul(wt2[p.live].mT, gm), hidden, 0)
    d_wt1 = torch.bmm(dh, p.xb.mT).sum(0, dtype=RESIDUAL)
    into.add_(g).add_(torch.matmul(wt1.mT, dh).to(RESIDUAL))
    d_b1, d_b2 = dh.sum((0, 2), dtype=RESIDUAL), gm.sum((0, 2), dtype=RESIDUAL)
    spread = [
        torch.zeros_like(t, dtype=RESIDUAL).index_copy_(0, p.live, d) for t, d in zip(p.mixtures[2:], (d_wt2, d_b2))
    ]
    return into, d_wt1, d_b1, *spread, d_weight, d_bias


def setup(case: tuple[tuple[int, int, int], str], provider: str) -> tuple[Call, Call, Problem]:
    """Prepare a pass over (N, S, D): the call to time, the same on a fresh `into`, and its problem."""
    shape, which = case
    p = Problem(shape, "cuda" if torch.cuda.is_available() else "cpu")
    if provider == "triton":

        def forward(_: Problem, x: Tensor) -> tuple[Tensor, ...]:
            z = torch.empty_like(p.z)
            shifted, xb, mean, rstd = dense_shift_forward(
                x, *p.mixtures, GAP, p.weight, p.bias, EPS, z=z, want_cast=True
            )
            assert shifted is not None and xb is not None
            return shifted, z, xb, mean, rstd

        def backward(_: Problem, into: Tensor) -> tuple[Tensor, ...]:
            sums = dense_shift_backward(p.dz, p.d_shifted, into, p.xb, *p.mixtures, GAP, p.weight, p.mean, p.rstd)
            return into, *sums
    elif provider == "autograd":
        leaves = [t.clone().requires_grad_() for t in (p.x, *p.mixtures, p.weight, p.bias)]
        kept = reference.dense_shift(*leaves[:5], GAP, *leaves[5:], EPS)

        def forward(_: Problem, x: Tensor) -> tuple[Tensor, ...]:
            shifted, z, mean, rstd = reference.dense_shift(*leaves[:5], GAP, *leaves[5:], EPS)
            return shifted.detach(), z.detach(), x.to(COMPUTE), mean.detach(), rstd.detach()

        def backward(_: Problem, into: Tensor) -> tuple[Tensor, ...]:
            dx, *sums = torch.autograd.grad(kept[:2], leaves, [p.d_shifted, p.dz], retain_graph=True)
            return into.add_(dx), *sums
    else:
        forward, backward = eager_forward, eager_backward
        if provider == "compiled":
            forward, backward = torch.compile(forward, dynamic=False), torch.compile(backward, dynamic=False)
    if which == "forward":
        return (lambda: forward(p, p.x)), (lambda: forward(p, p.x)), p
    scratch = p.into.clone()
    return (lambda: backward(p, scratch)), (lambda: backward(p, p.into.clone())), p


def expected(p: Problem, which: str) -> tuple[Tensor, ...]:
    if which == "forward":
        shifted, z, mean, rstd = reference.dense_shift(p.x, *p.mixtures, GAP, p.weight, p.bias, EPS)
        return shifted, z, p.xb, mean, rstd
    dx, *sums = reference.dense_shift_backward(p.dz, p.d_shifted, p.xb, *p.mixtures, GAP, p.weight, p.mean, p.rstd)
    return p.into + dx, *sums


# Inductor's own imports use what torch has deprecated
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def bench_dense_shift(benchmark: Any, timed: Timed, shape: tuple[int, int, int], which: str, provider: str) -> None:
    """Time one pass by one provider, after checking it; reports GB/s and TFLOP/s of what the pass needs at least."""
    if provider == "triton" and not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    call, fresh, p = setup((shape, which), provider)
    for value, truth in zip(fresh(), expected(p, which), strict=True):
        scale = truth.double().norm().clamp_min(1e-12)
        assert value.shape == truth.shape
        assert (value.double() - truth.double()).norm() / scale < TOLERANCE

    seconds = timed(f"dense shift {which} {shape}", call)
    if seconds is not None:
        sizes = COMPUTE.itemsize, RESIDUAL.itemsize
        n = shape[0]
        forward = dense_shift_forward_cost(*shape, n, sizes[0], sizes[1], shifted=sizes[1], cast=sizes[0])
        cost = forward if which == "forward" else dense_shift_backward_cost(*shape, n, *sizes)
        benchmark.extra_info["gigabytes_per_second"] = cost.bytes / seconds / 1e9
        benchmark.extra_info["teraflops_per_second"] = cost.flops / seconds / 1e12
