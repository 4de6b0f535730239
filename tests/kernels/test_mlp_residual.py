"""Branches added to a residual stream: the kernels against their definition in float64, interpreted and on a GPU."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
from fastskel.kernels import mlp_residual as module
from fastskel.kernels._backend import INTERPRETED
from fastskel.kernels.mlp_residual import Branch, mlp_residual, mlp_residual_backward, mlp_residual_cost
from fastskel.kernels.reference.mlp_residual import mlp_residual as mlp_residual_reference
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
# error against plain torch of the same type; the interpreter truncates to bfloat16 where a GPU rounds, twice the error by itself
TIMES_PLAIN = {torch.float32: 2, torch.float16: 2, torch.bfloat16: 4 if INTERPRETED else 2}
# samples, tokens, columns
SHAPES = [
    (2, 64, 1024), (2, 50, 1024), (3, 1, 16), (4, 17, 32), (3, 34, 64), (1, 49, 256), (2, 63, 1000), (1, 65, 16), (1, 128, 64),
    (1, 192, 32),
]  # fmt: skip
KINDS = ["plain", "factors", "slots", "two"]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill what is allocated and not written with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def make(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> list[Branch]:
    """One branch with everything there, with factors, or with absent samples; or two, as the dense layer ends."""
    n, s, d = shape
    generator = torch.Generator().manual_seed(n * s + d)

    def randn(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    if kind == "plain":
        return [Branch(randn(n, s, d, dtype=dtype), scale=0.7)]
    if kind == "factors":
        return [Branch(randn(n, s, d, dtype=dtype), None, 0.7, randn(n), randn(d, dtype=dtype))]
    # rows lie in another order than samples
    there = torch.tensor([True, False, True, False][:n])
    slots = torch.where(there, there.sum() - there.cumsum(0), -1).int().to(device)
    some = Branch(randn(int(there.sum()), s, d, dtype=dtype), slots, 1.1, None, randn(d, dtype=dtype))
    if kind == "slots":
        return [some]
    return [Branch(randn(n, s, d, dtype=dtype), None, 0.25, None, randn(d), randn(n), 0.3), some._replace(factor=randn(n))]


def moved(branches: list[Branch], dtype: torch.dtype) -> list[Branch]:
    """The same branches on the CPU, values and biases in another type."""
    out = []
    for branch in branches:
        parts = {name: part.cpu() for name, part in branch._asdict().items() if isinstance(part, Tensor)}
        parts.update({name: parts[name].to(dtype) for name in ("value", "bias") if name in parts})
        out.append(branch._replace(**parts))
    return out


def eager(base: Tensor | None, branches: list[Branch], grad: Tensor) -> list[Tensor]:
    """Result and gradients of values, then of biases, by plain torch in the types of what is given."""
    values = [branch.value.detach().requires_grad_() for branch in branches]
    biases = [None if branch.bias is None else branch.bias.detach().requires_grad_() for branch in branches]
    branches = [branch._replace(value=v, bias=b) for branch, v, b in zip(branches, values, biases)]
    out = mlp_residual_reference(base, branches)
    wanted = [*values, *(bias for bias in biases if bias is not None)]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


def run(base: Tensor | None, branches: list[Branch], grad: Tensor, **options: int) -> list[Tensor]:
    """The same by the kernels."""
    buffers = [torch.full_like(branch.value.contiguous(), float("nan")) for branch in branches]
    places = [branch._replace(value=buffer) for branch, buffer in zip(branches, buffers)]
    with poisoned():
        out = mlp_residual(base, branches)
        d_biases = mlp_residual_backward(grad, places, **options)
    assert [d_bias is None for d_bias in d_biases] == [branch.bias is None for branch in branches]
    found = [d_bias for d_bias in d_biases if d_bias is not None]
    assert all(d_bias.dtype == torch.float32 for d_bias in found)
    return [out, *buffers, *found]


def agree(base: Tensor | None, branches: list[Branch], grad: Tensor) -> None:
    actual = [value.cpu() for value in run(base, branches, grad)]
    low = branches[0].value.dtype
    wide, narrow = (None if base is None else base.cpu().to(dtype) for dtype in (torch.float64, grad.dtype))
    expected = eager(wide, moved(branches, torch.float64), grad.cpu().double())
    plain = eager(narrow, moved(branches, low), grad.cpu())
    exact = low == torch.float32
    for number, (result, target, other) in enumerate(zip(actual, expected, plain, strict=True)):
        # a few roundings of each element; in the sum for a bias those of its terms too
        num_terms = grad.shape[0] * grad.shape[1] if number > len(branches) else 1
        floor = 8 * EPS * math.sqrt(num_terms)
        # written so that NaN does not agree
        assert (result.double() - target).abs().max() <= floor * target.abs().max() or not exact, number
        error, allowed = ((tensor.double() - target).norm() for tensor in (result, other))
        assert error <= TIMES_PLAIN[low] * allowed + floor * target.norm(), (number, error, allowed)


def stream(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    base, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    return base, grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_definition(shape, kind, device, launches):
    seen = launches(module._mlp_residual_fwd_kernel, module._mlp_residual_bwd_kernel)
    agree(stream(shape, device)[0], make(kind, shape, torch.float32, device), stream(shape, device)[1])
    assert seen == ["_mlp_residual_fwd_kernel", "_mlp_residual_bwd_kernel"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wide", [True, False], ids=["stream-float32", "stream-same"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype, wide, kind, device):
    base, grad = stream((4, 33, 64), device, torch.float32 if wide else dtype)
    agree(base, make(kind, (4, 33, 64), dtype, device), grad)


def test_without_base(device):
    _, grad = stream((3, 5, 40), device)
    agree(None, make("factors", (3, 5, 40), torch.float32, device), grad)
    agree(None, make("two", (3, 5, 40), torch.float32, device), grad)


def test_writes_in_place(device):
    base, grad = stream((3, 20, 300), device)
    branches = make("two", tuple(base.shape), torch.bfloat16, device)
    expected = mlp_residual(base, branches)
    assert mlp_residual(base, branches, out=base) is base and torch.equal(base, expected)
    (branch,) = make("factors", tuple(base.shape), torch.float32, device)
    expected = mlp_residual(None, [branch])
    value = branch.value.clone()
    assert torch.equal(mlp_residual(None, [branch._replace(value=value)], out=value), expected)
    _, d_value, d_bias = run(None, [branch], grad)
    (found,) = mlp_residual_backward(grad, [branch._replace(value=grad)])
    assert torch.equal(grad, d_value) and torch.equal(found, d_bias)


@pytest.mark.parametrize("programs", [1, 2, 1000])
def test_any_number_of_programs(programs, device):
    base, grad = stream((3, 50, 40), device)
    branches = make("two", (3, 50, 40), torch.float32, device)
    exact = run(base, branches, grad)
    found = run(base, branches, grad, programs=programs)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], exact[:3], strict=True))
    torch.testing.assert_close(found[3:], exact[3:], rtol=1e-5, atol=1e-4)
    # no atomics: the same bits again
    assert all(torch.equal(a, b) for a, b in zip(run(base, branches, grad, programs=programs), found, strict=True))


def test_any_strides(device):
    base, grad = torch.randn(3, 8, 6, device=device).mT, torch.randn(3, 6, 16, device=device)[:, :, ::2]
    value, bias = torch.randn(2, 8, 6, device=device).mT, torch.randn(16, device=device)[::2]
    slots = torch.tensor([1, 9, -1, 9, 0], dtype=torch.int32)[::2].to(device)
    branch = Branch(value, slots, 1.0, torch.rand(6, device=device)[::2], bias, torch.rand(6, device=device)[::2], 2.0)
    straight = branch._replace(**{k: v.contiguous() for k, v in branch._asdict().items() if isinstance(v, Tensor)})
    given = run(base, [branch], grad)
    assert all(torch.equal(a, b) for a, b in zip(given, run(base.contiguous(), [straight], grad.contiguous()), strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_stays_where_it_is(device):
    base, grad = stream((3, 5, 40), device)
    branches = make("two", (3, 5, 40), torch.float32, device)
    base[0, 1, 2], branches[0].value[1, 3, 4], grad[1, 0, 7] = float("nan"), float("inf"), float("nan")
    out, d_value, d_some, d_bias, d_bias_some = run(base, branches, grad)
    assert out.isfinite().logical_not().nonzero().tolist() == [[0, 1, 2], [1, 3, 4]]
    assert d_value.isnan().nonzero().tolist() == [[1, 0, 7]] and d_bias.isnan().nonzero().tolist() == [[7]]
    # sample 1 is absent from the second branch: what is there is not touched by it
    assert not d_some.isnan().any() and not d_bias_some.isnan().any()


def test_nothing_to_do(device):
    empty, bias = torch.empty(0, 5, 8, device=device), torch.ones(8, device=device)
    absent = torch.full((3,), -1, dtype=torch.int32, device=device)
    base = torch.randn(3, 5, 8, device=device)
    with poisoned():
        assert mlp_residual(empty, [Branch(empty, bias=bias)]).shape == (0, 5, 8)
        assert torch.equal(mlp_residual(base, [Branch(empty, absent, bias=bias)]), base)
        for grad, slots in ((empty, None), (base, absent)):
            (d_bias,) = mlp_residual_backward(grad, [Branch(empty.clone(), slots, bias=bias)])
            assert torch.equal(d_bias, torch.zeros(8, device=device))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_more_samples_than_a_grid_axis_takes() -> None:
    base, grad = stream((70001, 3, 48), torch.device("cuda"))
    agree(base, make("factors", (70001, 3, 48), torch.bfloat16, torch.device("cuda")), grad)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(branches=[]), "branches must be one or two, got 0"),
        (dict(branches=[Branch(torch.zeros(2, 3, 4))] * 3), "branches must be one or two, got 3"),
        (dict(base=torch.zeros(2, 12)), r"the residual stream must be \(N, S, D\) .*got \(2, 12\)"),
        (dict(base=torch.zeros(2, 3, 4).double()), "the residual stream must be .*float64"),
        (dict(branches=[Branch(torch.zeros(2, 3, 4).double())]), "tensor 0 must be .*float64"),
        (dict(branches=[Branch(torch.zeros(2, 3, 5))]), r"tensor 0 must be \(n, 3, 4\)"),
        (dict(branches=[Branch(torch.zeros(1, 3, 4))]), "tensor 0 must have 2 samples where there are no slots, got 1"),
        (dict(branches=[Branch(torch.zeros(1, 3, 4), torch.zeros(2))]), "slots and factors .*got torch.float32"),
        (dict(branches=[Branch(torch.zeros(2, 3, 4), bias_factor=torch.zeros(3))]), r"slots and factors .*\(3,\)"),
        (dict(branches=[Branch(torch.zeros(2, 3, 4), bias=torch.zeros(3))]), r"bias 0 must be \(4,\), got \(3,\)"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    given = {**dict(base=torch.zeros(2, 3, 4), branches=[Branch(torch.zeros(2, 3, 4))]), **change}
    with pytest.raises(ValueError, match=f"mlp_residual: {message}"):
        mlp_residual(given["base"], given["branches"])
    with pytest.raises(ValueError, match=f"mlp_residual_backward: {message}"):
        mlp_residual_backward(given["base"], given["branches"])


def test_refuses_places_that_do_not_fit() -> None:
    x, transposed = torch.zeros(2, 3, 4), torch.zeros(2, 4, 3).mT
    for out in (transposed, torch.zeros(2, 3, 5), x.double()):
        with pytest.raises(ValueError, match=r"mlp_residual: out must be contiguous \(2, 3, 4\) "):
            mlp_residual(x, [Branch(x)], out=out)
    with pytest.raises(ValueError, match=r"mlp_residual_backward: value must be contiguous, got strides \(12, 1, 3\)"):
        mlp_residual_backward(x, [Branch(transposed)])
    with pytest.raises(ValueError, match="mlp_residual: base must be given where the first branch has slots"):
        mlp_residual(None, [Branch(x, torch.zeros(2, dtype=torch.int32))])


def test_reference_has_gradients() -> None:
    slots, factor = torch.tensor([1, -1, 0], dtype=torch.int32), torch.rand(3)

    def total(base: Tensor, value: Tensor, some: Tensor, bias: Tensor, other: Tensor) -> Tensor:
        first = Branch(value, None, 0.5, None, bias, factor, 0.3)
        return mlp_residual_reference(base, [first, Branch(some, slots, 2.0, factor, other)])

    shapes = [(3, 2, 4), (3, 2, 4), (2, 2, 4), (4,), (4,)]
    assert torch.autograd.gradcheck(total, [torch.randn(shape).double().requires_grad_() for shape in shapes])


def test_cost_counts_what_is_there() -> None:
    # branches of 2 and 3 of 3 rows, 4 columns of 2 bytes, a stream of 4 bytes
    assert mlp_residual_cost([2, 3], 3, 4, 2, 4).bytes == 4 * (5 * 2 + 2 * 3 * 4)
    assert mlp_residual_cost([2, 3], 3, 4, 2, 4, backward=True).bytes == 4 * (5 * 2 + 3 * 4)
