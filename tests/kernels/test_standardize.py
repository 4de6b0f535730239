"""Standardised features: kernels and operator against their definition in float64, values, gradients and statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastskel.kernels import standardize as module
from fastskel.kernels._backend import INTERPRETED
from fastskel.kernels.reference import standardize as reference
from fastskel.kernels.standardize import (
    column_statistics,
    standardize,
    standardize_backward,
    standardize_cost,
    standardize_forward,
)
from torch import Tensor

TYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {dtype: torch.finfo(dtype).eps for dtype in TYPES}
# views, samples, features
SHAPES = [
    (1, 64, 1024), (1, 50, 1024), (2, 2, 16), (3, 17, 32), (4, 34, 64), (1, 49, 256), (1, 63, 1000), (8, 65, 33), (1, 192, 1),
]  # fmt: skip
KERNELS = ["_statistics_kernel", "_standardize_fwd_kernel", "_column_sums_kernel", "_standardize_bwd_kernel"]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill what is allocated and not written with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: Any = "cpu", offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + offset).to(device, dtype)


def plain(z: Tensor, eps: float, correction: int) -> Tensor:
    """What one would write without kernels, in the type of z."""
    x = z - z.mean(1, keepdim=True)
    return x / (x.square().sum(1, keepdim=True) / (z.shape[1] - correction) + eps).sqrt()


def run(function: Any, z: Tensor, grad: Tensor, eps: float, correction: int) -> tuple[Tensor, Tensor]:
    leaf = z.detach().requires_grad_()
    u = function(leaf, eps, correction)
    return u.detach(), torch.autograd.grad(u, leaf, grad)[0]


def ours(z: Tensor, eps: float, correction: int) -> Tensor:
    return standardize(z, eps=eps, correction=correction)


def close(z: Tensor, grad: Tensor, eps: float = 0.0, correction: int = 1) -> None:
    """Relative error against float64 at most twice that of plain torch, or what rounding the result costs by itself."""
    truth = run(plain, z.double(), grad.double(), eps, correction)
    # the interpreter truncates to bfloat16 where a GPU rounds
    rounding = (2 if INTERPRETED else 1) * EPS[z.dtype]
    for value, other, true in zip(run(ours, z, grad, eps, correction), run(plain, z, grad, eps, correction), truth):
        assert value.dtype == z.dtype and value.shape == z.shape
        error, allowed = ((t.double() - true).norm() / true.norm() for t in (value, other))
        assert error <= max(2 * allowed, rounding), (error, allowed)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape, device, launches):
    seen = launches(*(getattr(module, name) for name in KERNELS))
    # two samples are standardised to signs, and the gradient is no more than rounding: an eps makes it more
    close(random(shape, device=device, offset=1.0), random(shape[::-1], device=device).permute(2, 1, 0), eps=1e-2)
    assert seen == KERNELS


@pytest.mark.parametrize("eps, correction", [(0.0, 1), (0.0, 0), (1e-4, 1)])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_types(dtype, eps, correction, device):
    shape = (2, 40, 70)
    close(random(shape, dtype, device, 0.5), random((3, *shape), dtype, device)[1], eps, correction)


def test_parts_merge(device, launches, monkeypatch):
    monkeypatch.setattr(module, "PART", 64)
    seen = launches(module._merge_kernel)
    z = random((2, 200, 40), device=device, offset=1000.0)
    close(z, random((2, 2, 200, 40), device=device)[1])
    assert seen == ["_merge_kernel"]
    mean, moment, rstd = column_statistics(z, 0.0, 1).double().cpu()
    true = z.double().cpu()
    torch.testing.assert_close(mean, true.mean(1), rtol=1e-6, atol=0)
    # means of 1000 are rounded by 3e-5, those of parts are some 0.1 apart; of E[x^2] - E[x]^2 float32 would keep nothing
    torch.testing.assert_close(moment, (true - true.mean(1, keepdim=True)).square().sum(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(rstd, 1 / true.std(1), rtol=1e-4, atol=0)


def test_more_items_than_programs(device, monkeypatch):
    z, grad = random((3, 140, 100), device=device), random((3, 140, 100), device=device, offset=1.0)
    first = standardize_forward(z, 0.0, 1)
    second = standardize_backward(grad, z, first[1], 1)
    monkeypatch.setattr(module, "num_processors", lambda device: 1)
    monkeypatch.setattr(module, "OCCUPANCY", 2)
    again = standardize_forward(z, 0.0, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert torch.equal(second, standardize_backward(grad, z, again[1], 1))


def test_every_element_is_written(device, monkeypatch):
    monkeypatch.setattr(module, "PART", 64)
    z, grad = random((2, 70, 33), device=device), random((2, 70, 33), device=device)
    with poisoned():
        u, stats = standardize_forward(z, 0.0, 1)
        dz = standardize_backward(grad, z, stats, 1)
    assert all(t.isfinite().all() for t in (u, stats, dz))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_constant_features(device):
    z = random((2, 20, 5), device=device)
    z[1, :, 3] = 2.0
    u, dz = run(ours, z, torch.ones_like(z), 0.0, 1)
    expected = torch.zeros(2, 5, dtype=torch.bool)
    expected[1, 3] = True
    for value in (u, dz):
        assert torch.equal(value.isnan().all(1).cpu(), expected) and torch.equal(value.isnan().any(1).cpu(), expected)
    u, dz = run(ours, z, torch.ones_like(z), 1e-4, 1)
    assert u.isfinite().all() and (u[1, :, 3] == 0).all() and dz.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_stays_in_its_feature(bad, device):
    z, grad = random((2, 70, 40), device=device), random((2, 70, 40), device=device)
    z[0, 66, 35] = bad
    truth = run(plain, z, grad, 0.0, 1)
    for value, true in zip(run(ours, z, grad, 0.0, 1), truth):
        assert torch.equal(value.isnan(), true.isnan()) and value.isnan().any()


@pytest.mark.parametrize(
    "view", [lambda z: z.transpose(0, 1), lambda z: z[:, ::2, :40], lambda z: z.mT, lambda z: z[:1].expand(3, -1, -1)],
    ids=["swapped", "strided", "transposed", "expanded"],
)  # fmt: skip
def test_any_strides(view, device):
    z = view(random((3, 6, 48), device=device))
    assert not z.is_contiguous()
    close(z, torch.ones(1, 1, 1, device=device).expand(z.shape) * torch.arange(z.shape[1], device=device)[:, None], 1e-3)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)], ids=str)
def test_nothing_to_do(shape, device):
    z = torch.zeros(shape, device=device)
    for value in run(ours, z, z, 0.0, 1):
        assert value.shape == shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_large_batch() -> None:
    close(random((1, 70001, 40), device="cuda"), random((1, 70001, 40), device="cuda", offset=1.0))


def check_operators(dtype: torch.dtype) -> None:
    # a compiler relies on the strides that are promised, whatever those of the embeddings are
    for z in (random((2, 7, 5), dtype), random((2, 5, 7), dtype).mT, random((7, 2, 5), dtype).transpose(0, 1)):
        torch.library.opcheck(torch.ops.fastskel.standardize.default, (z.requires_grad_(), 1e-3, 1))
        stats = reference.statistics(z.detach(), 1e-3, 1)
        torch.library.opcheck(torch.ops.fastskel.standardize_backward.default, (z.detach(), z.detach(), stats, 1))


@pytest.mark.interpreted
def test_opcheck_interpreted() -> None:
    check_operators(torch.bfloat16)


@pytest.mark.interpreted
def test_refuses_float64_where_kernels_run() -> None:
    with pytest.raises(ValueError, match="standardize: z must be float32, bfloat16 or float16, got torch.float64"):
        standardize(torch.zeros(2, 3, 4).double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    check_operators(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, *TYPES], ids=str)
def test_operator_equals_reference(dtype: torch.dtype) -> None:
    z, grad = random((2, 9, 5), dtype, offset=1.0), random((2, 9, 5), dtype)
    # autocast chooses nothing: results follow the arguments
    with torch.autocast("cpu", torch.bfloat16):
        u, dz = run(ours, z, grad, 1e-3, 1)
    assert torch.equal(u, reference.standardize(z, 1e-3, 1)) and dz.dtype == dtype
    wide = run(reference.standardize, z.double(), grad.double(), 1e-3, 1)[1]
    torch.testing.assert_close(dz, wide.to(dtype))


def test_gradients_are_those_of_the_values() -> None:
    z = random((2, 6, 4), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: standardize(t, eps=1e-3), (z,))
    assert torch.autograd.gradcheck(lambda t: standardize(t, correction=0), (z,))


def test_compiles_as_one_graph() -> None:
    z = random((2, 6, 4)).requires_grad_()
    compiled = torch.compile(lambda t: standardize(3 * t).pow(3), backend="aot_eager", fullgraph=True)
    values, target = compiled(z), standardize(3 * z).pow(3)
    assert torch.equal(values, target)
    assert torch.equal(torch.autograd.grad(values.sum(), z)[0], torch.autograd.grad(target.sum(), z)[0])


@pytest.mark.parametrize("shape, correction", [((3, 4), 1), ((2, 1, 4), 1), ((2, 3, 4), 3)], ids=str)
def test_shapes_without_variance_are_refused(shape: tuple[int, ...], correction: int) -> None:
    with pytest.raises(ValueError, match=rf"standardize: z must be \(W, N, D\) with N above the correction {correction}, got"):
        standardize(torch.zeros(shape), correction=correction)


def test_other_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="standardize: z must be float32, bfloat16 or float16, got torch.int64"):
        standardize(torch.zeros(2, 3, 4).long())
    with pytest.raises(ValueError, match="standardize: eps must be at least 0, got -0.1"):
        standardize(torch.zeros(2, 3, 4), eps=-0.1)


def test_cost() -> None:
    assert standardize_cost(2, 3, 5, 2).bytes == 2 * 2 * 30 + 3 * 10 * 4
    assert standardize_cost(2, 3, 5, 2, backward=True).bytes == 3 * 2 * 30 + 3 * 10 * 4
