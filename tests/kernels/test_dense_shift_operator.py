"""The operator `fastskel::dense_shift`: gradients, compilation, operations, what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from fastskel.kernels import dense_shift as operator
from fastskel.kernels._dense_shift_backward import _dense_shift_bwd_kernel
from fastskel.kernels.dense_shift import (
    dense_shift,
    dense_shift_backward,
    dense_shift_backward_cost,
    dense_shift_forward,
    dense_shift_forward_cost,
)
from fastskel.kernels.reference import dense_shift as reference
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

EPS = 1e-5
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
CPU = torch.device("cpu")


class Case(NamedTuple):
    """Arguments over (N, S, D), and gradients of both outputs."""

    x: Tensor
    parameters: tuple[Any, ...]
    d_shifted: Tensor
    dz: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """What has a gradient."""
        return [self.x, *(p for p in self.parameters if isinstance(p, Tensor))]


def make(
    shape: tuple[int, int, int], device: torch.device = CPU, compute: torch.dtype = F32, residual: torch.dtype = F32,
    gap: int = 3, grad: bool = False,
) -> Case:  # fmt: skip
    _, s, d = shape
    generator = torch.Generator().manual_seed(s * d)

    def draw(dtype: torch.dtype, *size: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(size, generator=generator, dtype=F64) * scale
        return values.to(device, dtype).requires_grad_(grad)

    mixtures = [draw(compute, *size, scale=s**-0.5) for size in ((s, s), (s,), (s, s), (s,))]
    wide = torch.promote_types(residual, F32)
    parameters = (*mixtures, gap, draw(wide, d), draw(wide, d))
    return Case(draw(residual, *shape), parameters, draw(residual, *shape).detach(), draw(compute, *shape).detach())


@pytest.mark.interpreted
def test_cpu_operator_launches(launches: Callable[..., list[str]]) -> None:
    case = make((2, 8, 16), grad=True)
    seen = launches(operator._dense_shift_fwd_kernel, _dense_shift_bwd_kernel)
    outputs = dense_shift(case.x, *case.parameters)
    grads = torch.autograd.grad(outputs, case.leaves, [case.d_shifted, case.dz])
    assert seen == ["_dense_shift_fwd_kernel", "_dense_shift_bwd_kernel"]
    others = reference.dense_shift(case.x, *case.parameters, EPS)[:2]
    for value, other in zip(grads, torch.autograd.grad(others, case.leaves, [case.d_shifted, case.dz])):
        torch.testing.assert_close(value, other)


@pytest.mark.interpreted
def test_interpreted_refuses_float64() -> None:
    case = make((1, 3, 4), compute=F64, residual=F64)
    with pytest.raises(ValueError, match="dense_shift: x must be float32, bfloat16 or float16, got torch.float64"):
        dense_shift(case.x, *case.parameters)


def check_operator(device: torch.device) -> None:
    case = make((2, 6, 20), device, grad=True)
    turned = case.x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    for x in (case.x, turned):
        torch.library.opcheck(torch.ops.fastskel.dense_shift.default, (x, *case.parameters, EPS))
    case = make((2, 6, 20), device)
    _, _, mean, rstd = reference.dense_shift(case.x, *case.parameters, EPS)
    arguments = (case.dz, case.d_shifted, case.x, *case.parameters[:-1], mean, rstd)
    torch.library.opcheck(torch.ops.fastskel.dense_shift_backward.default, arguments)


def test_opcheck_where_kernels_run(device: torch.device) -> None:
    check_operator(device)


def test_opcheck() -> None:
    check_operator(CPU)


@pytest.mark.parametrize("compute, residual", [(F32, F32), (BF16, F32), (BF16, BF16), (F64, F64)])
def test_equals_reference(compute: torch.dtype, residual: torch.dtype) -> None:
    case = make((2, 7, 24), CPU, compute, residual, grad=True)
    # autocast chooses nothing: results follow the arguments
    with torch.autocast("cpu", BF16):
        shifted, z = dense_shift(case.x, *case.parameters)
        grads = torch.autograd.grad([shifted, z], case.leaves, [case.d_shifted, case.dz])
    with torch.no_grad():
        others = reference.dense_shift(case.x, *case.parameters, EPS)
        truth = reference.dense_shift_backward(
            case.dz, case.d_shifted, case.x.to(compute), *case.parameters[:-1], *others[2:]
        )
    assert torch.equal(shifted, others[0]) and torch.equal(z, others[1])
    for leaf, value, expected in zip(case.leaves, grads, truth):
        assert value.dtype == leaf.dtype and torch.equal(value, expected.to(leaf.dtype))


def test_gradcheck() -> None:
    case = make((2, 5, 6), CPU, F64, F64, grad=True)

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return dense_shift(x, *rest[:4], 2, *rest[4:])

    assert torch.autograd.gradcheck(run, case.leaves)


def test_one_output_is_enough() -> None:
    case = make((2, 5, 6), CPU, F64, F64, grad=True)
    for which in range(2):
        (ours,) = torch.autograd.grad(dense_shift(case.x, *case.parameters)[which].sum(), case.x)
        (other,) = torch.autograd.grad(reference.dense_shift(case.x, *case.parameters, EPS)[which].sum(), case.x)
        torch.testing.assert_close(ours, other)


def test_compiles_as_one_graph() -> None:
    case = make((2, 6, 20), grad=True)

    def run(x: Tensor) -> Tensor:
        shifted, z = dense_shift(x * 2, *case.parameters)
        return (shifted * z).sum()

    expected = torch.autograd.grad(run(case.x), case.leaves)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for value, other in zip(torch.autograd.grad(compiled(case.x), case.leaves), expected):
        assert torch.equal(value, other)


def test_counts_operations() -> None:
    n, s, d = 3, 6, 20
    case = make((n, s, d), grad=True)
    with FlopCounterMode(display=False) as counter:
        shifted, z = dense_shift(case.x, *case.parameters)
        (shifted.sum() + z.sum()).backward()
    # two products forward; both again, and two for each, backward
    assert counter.get_total_flops() == 2 * (2 + 6) * n * s * s * d


def test_costs() -> None:
    n, s, d = 3, 6, 20
    tile, square = s * d, 2 * (s * s + s)
    cost = dense_shift_forward_cost(n, s, d, 2, compute=2, x=4, shifted=4, cast=2)
    assert cost.flops == 4 * n * s * tile
    assert cost.bytes == n * tile * 10 + 2 * (tile * 2 + 8 * s) + square * 2 + 8 * d + 4 * n
    cost = dense_shift_backward_cost(n, s, d, 2, compute=2, residual=4, extra=1)
    assert cost.flops == 12 * n * s * tile
    assert cost.bytes == n * tile * 14 + 3 * tile * 2 + 2 * 8 * s + square * 6 + 12 * d + 8 * n


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(3, 4)), r"x must be \(N, S, D\), got \(3, 4\)"),
        (dict(x=torch.zeros(3, 0, 4)), r"x must be \(N, S, D\), got \(3, 0, 4\)"),
        (dict(x=torch.zeros(1, 193, 4)), r"S must be at most 192, got 193"),
        (dict(x=torch.zeros(2, 3, 4, dtype=torch.int32)), r"x must be float32, bfloat16 or float16, got torch.int32"),
        (dict(x=torch.zeros(2, 3, 4, dtype=BF16)), r"wt1 must be torch.bfloat16, or 16 bits.*got torch.float32"),
        (dict(wt1=torch.zeros(3, 3, dtype=torch.float64)), r"wt1 must be torch.float32, or 16 bits.*got torch.float64"),
        (dict(wt1=torch.zeros(4, 4)), r"wt1 must be torch.float32 \(3, 3\) on cpu, got torch.float32 \(4, 4\)"),
        (dict(wt2=torch.zeros(3, 3, dtype=BF16)), r"wt2 must be torch.float32 \(3, 3\) on cpu, got torch.bfloat16"),
        (dict(b1=torch.zeros(4)), r"b1 must be torch.float32 \(3,\) on cpu, got torch.float32 \(4,\)"),
        (dict(b2=torch.zeros(3, device="meta")), r"b2 must be torch.float32 \(3,\) on cpu, got .* on meta"),
        (dict(weight=torch.zeros(3)), r"weight must be torch.float32 \(4,\) on cpu, got torch.float32 \(3,\)"),
        (dict(bias=torch.zeros(4, dtype=BF16)), r"bias must be torch.float32 \(4,\) on cpu, got torch.bfloat16"),
        (dict(gap=0), r"gap must be at least 1, got 0"),
        (dict(eps=0.0), r"eps must be above 0, got 0.0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    good = dict(
        x=torch.zeros(2, 3, 4), wt1=torch.zeros(3, 3), b1=torch.zeros(3), wt2=torch.zeros(3, 3), b2=torch.zeros(3), gap=2,
        weight=torch.ones(4), bias=torch.zeros(4), eps=EPS,
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"dense_shift: {message}"):
        dense_shift(**{**good, **change})


def test_launchers_refuse() -> None:
    case = make((2, 3, 4))
    with pytest.raises(ValueError, match=r"dense_shift_forward: z must be contiguous, got strides"):
        dense_shift_forward(case.x, *case.parameters, EPS, z=case.dz.mT, want_cast=False)
    rest = (case.x, *case.parameters[:-1], case.x[..., 0], case.x[..., 0])
    with pytest.raises(ValueError, match=r"dense_shift_backward: into must be contiguous, got strides"):
        dense_shift_backward(case.dz, case.d_shifted, case.d_shifted.mT, *rest)
    with pytest.raises(ValueError, match=r"dense_shift_forward: S must be at most 192, got 200"):
        dense_shift_forward(torch.zeros(1, 200, 4), *case.parameters, EPS, z=case.dz, want_cast=False)
