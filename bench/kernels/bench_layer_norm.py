"""Layer normalisation behind a residual addition: the layer's torch operations, compiled, torch's own without skipping, Triton.

Run as `pytest bench/kernels/bench_layer_norm.py`; FASTSKEL_BENCH_QUICK=1 takes a tiny size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastskel.bench.harness import Timed
from fastskel.bench.kernels import NO_GPU
from fastskel.kernels.layer_norm import (
    Term,
    TermGrad,
    layer_norm_backward,
    layer_norm_backward_cost,
    layer_norm_forward,
    layer_norm_forward_cost,
)
from fastskel.kernels.reference import layer_norm as reference
from torch import Tensor

EPS = 1e-5
DROP_RATE = 0.1
COMPUTE, RESIDUAL = torch.bfloat16, torch.float32
QUICK = os.environ.get("FASTSKEL_BENCH_QUICK", "0") == "1"
# four views of the published batch, by the tokens of the temporal stream
SHAPE = (12, 6, 32) if QUICK else (1424, 64, 1024)
# before the attentions, after CA's, after the dense shift's
USES = ("attentions", "one", "two")
PASSES = ("forward", "backward")
PROVIDERS = ("eager", "compiled", "native", "triton")
# sums of rows rounded to the compute type in other orders
TOLERANCE = 2e-2

Results = dict[str, Tensor]


class Problem:
    """Inputs of one use of the layer, and what a provider fills or returns.

    Args:
        use: One of `USES`.
        device: Where the tensors are.
    """

    def __init__(self, use: str, device: str) -> None:
        self.use, self.device = use, device
        self.g = torch.Generator(device).manual_seed(0)
        size, tokens, width = SHAPE
        self.total_scale = 0.25 if use == "two" else None
        self.rows: list[Tensor] = []
        self.terms: list[Term] = []
        x = self.draw(*SHAPE, dtype=RESIDUAL)
        for number in range(1 if use == "one" else 2):
            rows, slots = self.kept(size)
            base = x if number == 0 or use == "attentions" else self.draw(*SHAPE, dtype=RESIDUAL)
            term = Term(base, torch.empty(len(rows), tokens, width, dtype=COMPUTE, device=device), slots)
            if use != "attentions" or number == 0:
                branch = self.draw(len(rows), tokens, width, dtype=COMPUTE)
                term = term._replace(branch=branch.relu() if use == "attentions" else branch, branch_slots=slots)
            if use == "attentions":
                weight, bias = (self.draw(width, dtype=RESIDUAL) for _ in range(2))
                term = term._replace(weight=weight, bias=bias)
            else:
                term = term._replace(scale=1.0 / (1.0 - DROP_RATE))
            self.rows.append(rows)
            self.terms.append(term)

    def draw(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.g, device=self.device, dtype=dtype)

    def kept(self, size: int) -> tuple[Tensor, Tensor]:
        """List the samples that a branch keeps, (n,), and their places, (N,)."""
        kept = torch.rand(size, generator=self.g, device=self.device) >= DROP_RATE
        slots = torch.where(kept, kept.cumsum(0) - 1, -1)
        return kept.nonzero()[:, 0], slots.to(torch.int32)

    def grads(self) -> list[TermGrad]:
        """Make what the backward pass is asked for, with buffers of its own."""
        self.g.manual_seed(1)
        statistics, _ = reference.layer_norm_forward(self.terms, EPS)
        carry = self.draw(*SHAPE, dtype=RESIDUAL)
        found = []
        for number, (t, (mean, rstd)) in enumerate(zip(self.terms, statistics)):
            g = TermGrad(
                self.draw(*t.out.shape, dtype=COMPUTE), rstd, carry, t.out_slots, xhat=t.out, branch_slots=t.branch_slots,
                scale=t.scale, carry=carry, d_branch=None if t.branch is None else torch.empty_like(t.branch),
            )  # fmt: skip
            if self.use == "attentions":
                again = dict(xhat=None, mean=mean, base=t.base, branch=t.branch, weight=t.weight, relu_mask=number == 0)
                g = g._replace(**again, carry=carry if number == 0 else None)
            if self.use == "two":
                g = g._replace(into=torch.empty_like(carry), carry_scale=0.25, branch_sees_carry=True)
            found.append(g)
        return found


def forward_results(terms: Sequence[Term], total: Tensor | None) -> Results:
    found = {f"out {number}": t.out for number, t in enumerate(terms)}
    return found if total is None else {**found, "total": total}


def backward_results(grads: Sequence[TermGrad], affine: Sequence[tuple[Tensor, ...] | None]) -> Results:
    found = {f"into {number}": g.into for number, g in enumerate(grads)}
    found.update({f"d_branch {n}": g.d_branch for n, g in enumerate(grads) if g.d_branch is not None})
    found.update({f"d_weight {n}": pair[0] for n, pair in enumerate(affine) if pair is not None})
    return found


def eager_forward(p: Problem) -> Results:
    sums = []
    for t, rows in zip(p.terms, p.rows):
        if p.use == "attentions":
            chosen = t.base.index_select(0, rows)
            chosen = chosen if t.branch is None else chosen + t.branch
        else:
            r = t.base if t.branch is None else t.base.index_add(0, rows, t.branch.to(RESIDUAL), alpha=t.scale)
            sums.append(r)
            chosen = r.index_select(0, rows)
        t.out.copy_(torch.native_layer_norm(chosen, chosen.shape[-1:], t.weight, t.bias, EPS)[0])
    return forward_results(p.terms, None if p.total_scale is None else sums[0].add_(sums[1]).mul_(p.total_scale))


def eager_backward(p: Problem, grads: Sequence[TermGrad]) -> Results:
    affine: list[tuple[Tensor, ...] | None] = []
    for g, t, rows in zip(grads, p.terms, p.rows):
        grad, wanted = g.grad.to(RESIDUAL), g.weight is not None
        if g.xhat is None:
            chosen = t.base.index_select(0, rows)
            chosen = chosen if t.branch is None else chosen + t.branch
            mean, rstd = g.mean[..., None], g.rstd[..., None]
        else:
            chosen, rstd = g.xhat.to(RESIDUAL), g.rstd[..., None]
            mean, rstd = torch.zeros_like(rstd), torch.ones_like(rstd)
        d_rows, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
            grad, chosen, chosen.shape[-1:], mean, rstd, t.weight, t.bias, [True, wanted, wanted]
        )
        affine.append((d_weight, d_bias) if wanted else None)
        if g.xhat is not None:
            d_rows.mul_(g.rstd[..., None])
        if g.carry is not g.into and g.carry is not None:
            torch.mul(g.carry, g.carry_scale, out=g.into)
        g.into.index_add_(0, rows, d_rows)
        if g.d_branch is not None:
            seen = g.into.index_select(0, rows) if g.branch_sees_carry else d_rows
            d_branch = (seen * g.scale).to(COMPUTE)
            g.d_branch.copy_(torch.ops.aten.threshold_backward(d_branch, g.branch, 0) if g.relu_mask else d_branch)
    return backward_results(grads, affine)


def native(p: Problem, grads: Sequence[TermGrad] | None) -> Callable[[], Results]:
    """Compute every sample with torch's own operations and autograd: DropPath multiplies, nothing is skipped.

    What is compact elsewhere is returned for all samples.
    """
    leaves, branches, weights = {}, [], []
    for t, rows in zip(p.terms, p.rows):
        leaves.setdefault(id(t.base), t.base.detach().requires_grad_(grads is not None))
        full = torch.zeros(SHAPE, dtype=COMPUTE, device=p.device)
        if t.branch is not None:
            full[rows] = t.branch
        branches.append(None if t.branch is None else full.requires_grad_(grads is not None))
        weights.append(None if t.weight is None else t.weight.detach().requires_grad_(grads is not None))
    factor = torch.ones(SHAPE[0], 1, 1, device=p.device)

    def forward() -> tuple[list[Tensor], list[Tensor]]:
        outs, sums = [], []
        for t, branch, weight in zip(p.terms, branches, weights):
            base = leaves[id(t.base)]
            r = base if branch is None else base + t.scale * factor * branch
            outs.append(F.layer_norm(r, r.shape[-1:], weight, t.bias, EPS).to(COMPUTE))
            sums.append(r)
        return outs, sums

    def forward_only() -> Results:
        outs, sums = forward()
        found = {f"out {n}": out for n, out in enumerate(outs)}
        return found if p.total_scale is None else {**found, "total": p.total_scale * (sums[0] + sums[1])}

    if grads is None:
        return forward_only
    outs, sums = forward()
    upstream, carried = [], []
    for g, rows in zip(grads, p.rows):
        full = torch.zeros(SHAPE, dtype=COMPUTE, device=p.device)
        full[rows] = g.grad
        upstream.append(full)
        if g.branch_sees_carry:
            carried.append(g.carry_scale * g.carry)
    inputs = [*leaves.values(), *(t for t in [*branches, *weights] if t is not None)]
    outputs = [*outs, *sums[: len(carried)]]

    def backward() -> Results:
        got = dict(zip(map(id, inputs), torch.autograd.grad(outputs, inputs, [*upstream, *carried], retain_graph=True)))
        found = {}
        for n, (g, t, branch, weight) in enumerate(zip(grads, p.terms, branches, weights)):
            found[f"into {n}"] = got[id(leaves[id(t.base)])]
            if branch is not None:
                found[f"d_branch {n}"] = torch.where(branch > 0, got[id(branch)], 0.0) if g.relu_mask else got[id(branch)]
            if weight is not None:
                found[f"d_weight {n}"] = got[id(weight)]
        if p.use != "two":
            dx = found["into 0"] + grads[0].carry
            found.update({name: dx for name in found if name.startswith("into")})
        return found

    return backward


def setup(case: tuple[str, str], provider: str) -> tuple[Callable[[], Results], int, list[Tensor]]:
    """Prepare one pass of one use by one provider; returns it, the bytes that it has to move at least, and who is kept."""
    use, direction = case
    p = Problem(use, "cuda" if torch.cuda.is_available() else "cpu")
    reference.layer_norm_forward(p.terms, EPS)
    grads = p.grads() if direction == "backward" else None
    cost = layer_norm_forward_cost(p.terms, total_scale=p.total_scale) if grads is None else layer_norm_backward_cost(grads)
    if provider == "native":
        return native(p, grads), cost.bytes, p.rows
    if provider in ("eager", "compiled"):
        call: Callable[..., Results] = eager_forward if grads is None else eager_backward
        call = torch.compile(call) if provider == "compiled" else call
        return (lambda: call(p) if grads is None else call(p, grads)), cost.bytes, p.rows
    if grads is None:
        run = reference.layer_norm_forward if provider == "reference" else layer_norm_forward
        return lambda: forward_results(p.terms, run(p.terms, EPS, total_scale=p.total_scale)[1]), cost.bytes, p.rows
    run_back: Any = reference.layer_norm_backward if provider == "reference" else layer_norm_backward
    return lambda: backward_results(grads, run_back(grads)), cost.bytes, p.rows


# torch's compiler warns of its own imports
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("use", USES)
def bench_layer_norm(benchmark: Any, timed: Timed, use: str, direction: str, provider: str) -> None:
    """Time one provider, after checking it against the reference; reports GB/s of the bytes that must be moved."""
    if provider == "triton" and not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    call, moved, rows = setup((use, direction), provider)
    expected, found = setup((use, direction), "reference")[0](), call()
    for name, value in expected.items():
        if provider == "native" and name.startswith(("out", "d_branch")):
            found[name] = found[name][rows[int(name[-1])]]
        error = (found[name].float() - value.float()).norm() / value.float().norm()
        assert error < TOLERANCE, f"{name}: relative error {error}"

    seconds = timed(f"layer_norm {use} {direction} {'x'.join(map(str, SHAPE))}", call)
    if seconds is not None:
        benchmark.extra_info["gigabytes_per_second"] = moved / seconds / 1e9
