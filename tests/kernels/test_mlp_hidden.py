"""Hidden activations of an MLP: the kernels against their definition in float64, interpreted and on a GPU."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
from fastskel.kernels import mlp_hidden as module
from fastskel.kernels._backend import INTERPRETED
from fastskel.kernels.mlp_hidden import Hidden, mlp_hidden, mlp_hidden_backward, mlp_hidden_cost
from fastskel.kernels.reference.mlp_hidden import mlp_hidden as mlp_hidden_reference
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
# error against plain torch of the same type; the interpreter truncates to bfloat16 where a GPU rounds, twice the error by itself
TIMES_PLAIN = {torch.float32: 2, torch.float16: 2, torch.bfloat16: 4 if INTERPRETED else 2}
# samples, tokens, columns
SHAPES = [
    (2, 64, 1024), (2, 50, 1024), (3, 1, 16), (2, 17, 32), (3, 34, 64), (1, 49, 256), (2, 63, 1000), (1, 65, 16), (1, 128, 64),
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


def make(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> list[Hidden]:
    """Terms of a sum: one with everything there, one with factors or absent samples, or both branches of a buffer."""
    n, s, f = shape
    generator = torch.Generator().manual_seed(n * s + f)

    def randn(*size: int) -> Tensor:
        return 2 * torch.randn(size, generator=generator)

    if kind in ("plain", "factors"):
        factor = randn(n).to(device) if kind == "factors" else None
        return [Hidden(randn(n, s, f).to(device, dtype), None, 0.7, factor)]
    # one sample is there in both branches, one in neither, and one in each; rows lie in another order than samples
    first, second = (places(pattern[:n]) for pattern in ([True, False, True, False], [True, False, False, True]))
    count = int(first.max()) + 1
    up = randn(count + int(second.max()) + 1, s, f).to(device, dtype)
    if kind == "slots":
        return [Hidden(up[:count], first.to(device), 1.1, randn(n).to(device))]
    offset = torch.where(second < 0, second, second + count)
    return [Hidden(up, first.to(device), 1.1), Hidden(up, offset.to(device), 0.9, randn(n).to(device))]


def places(there: list[bool]) -> Tensor:
    """Number the rows of the samples that are there, last first; -1 for the others."""
    rank = torch.tensor(there).cumsum(0)
    return torch.where(torch.tensor(there), rank[-1] - rank, -1).int()


def on_cpu(terms: list[Hidden], dtype: torch.dtype) -> list[Hidden]:
    """The same terms in another type; those that share a buffer go on to."""
    ups = {term.up.data_ptr(): term.up.cpu().to(dtype) for term in terms}
    parts = [[None if part is None else part.cpu() for part in (term.slots, term.factor)] for term in terms]
    return [Hidden(ups[term.up.data_ptr()], slots, term.scale, factor) for term, (slots, factor) in zip(terms, parts)]


def eager(terms: list[Hidden], activation: str, bias: Tensor | None, grad: Tensor) -> list[Tensor]:
    """Values, gradients and the bias gradient by plain torch in the type of what is given."""
    leaves = list({term.up.data_ptr(): term.up for term in terms}.values())
    bias = leaves[0].new_zeros(leaves[0].shape[2]) if bias is None else bias.to(leaves[0].dtype)
    bias = bias.detach().requires_grad_()
    ups = {leaf.data_ptr(): leaf.detach().requires_grad_() for leaf in leaves}
    terms = [term._replace(up=ups[term.up.data_ptr()]) for term in terms]
    out = mlp_hidden_reference(terms, activation, bias=bias, num_samples=len(grad))
    return [out.detach(), *torch.autograd.grad(out, [*ups.values(), bias], grad.to(out.dtype))]


def run(terms: list[Hidden], activation: str, bias: Tensor | None, grad: Tensor, **options: int) -> list[Tensor]:
    """The same by the kernels; twice for the activations."""
    buffers = {term.up.data_ptr(): torch.full_like(term.up.contiguous(), float("nan")) for term in terms}
    with poisoned():
        out = mlp_hidden(terms, activation, bias=bias, num_samples=len(grad))
        hidden, d_bias = mlp_hidden_backward(
            grad, terms, activation, bias=bias, d_ups=[buffers[term.up.data_ptr()] for term in terms],
            want_hidden=True, want_bias=True, **options,
        )  # fmt: skip
    torch.testing.assert_close(hidden, out, rtol=0, atol=0, equal_nan=True)
    assert d_bias.dtype == torch.float32
    return [out, *buffers.values(), d_bias]


def agree(terms: list[Hidden], activation: str, bias: Tensor | None, grad: Tensor) -> None:
    actual = [value.cpu() for value in run(terms, activation, bias, grad)]
    bias = None if bias is None else bias.cpu()
    expected = eager(on_cpu(terms, torch.float64), activation, bias, grad.cpu().double())
    plain = eager(on_cpu(terms, grad.dtype), activation, bias, grad.cpu())
    exact = grad.dtype == torch.float32
    for number, (value, target, other) in enumerate(zip(actual, expected, plain, strict=True)):
        # a few roundings of each element; in the sum for the bias those of its terms too
        num_terms = grad.shape[0] * grad.shape[1] if number == len(actual) - 1 else 1
        floor = 8 * EPS * math.sqrt(num_terms)
        # written so that NaN does not agree
        assert (value.double() - target).abs().max() <= floor * target.abs().max() or not exact, number
        error, allowed = ((tensor.double() - target).norm() for tensor in (value, other))
        assert error <= TIMES_PLAIN[grad.dtype] * allowed + floor * target.norm(), (number, error, allowed)


@pytest.mark.parametrize("number", range(len(KINDS)), ids=KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_definition(shape, number, device, launches):
    seen = launches(module._mlp_hidden_fwd_kernel, module._mlp_hidden_bwd_kernel)
    terms = make(KINDS[number], shape, torch.float32, device)
    generator = torch.Generator().manual_seed(5)
    bias = torch.randn(shape[2], generator=generator).to(device) if number else None
    # every shape and every kind of terms with either activation
    activation = ("gelu", "relu")[(SHAPES.index(shape) + number) % 2]
    agree(terms, activation, bias, torch.randn(shape, generator=generator).to(device))
    assert seen == ["_mlp_hidden_fwd_kernel", "_mlp_hidden_bwd_kernel"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype, activation, kind, device):
    shape = (4, 33, 64)
    terms = make(kind, shape, dtype, device)
    agree(terms, activation, torch.randn(64).to(device, dtype), torch.randn(shape).to(device, dtype))


def test_gelu_is_as_exact_as_float32(device):
    x = torch.linspace(-13, 13, 4001, device=device).view(1, 1, -1)
    d_up = torch.empty_like(x)
    value, _ = mlp_hidden_backward(
        torch.ones_like(x), [Hidden(x)], "gelu", d_ups=[d_up], want_hidden=True, want_bias=False
    )
    wide = x.cpu().double()
    cdf, density = 0.5 * torch.special.erfc(-wide / math.sqrt(2)), (-0.5 * wide**2).exp() / math.sqrt(2 * math.pi)
    error = ((value.cpu() - wide * cdf) / (wide * cdf)).nan_to_num()
    # in the tail the exponent of up to 85 is rounded; plain torch cancels there: it is wrong by all of the value
    assert error.abs().max() < 100 * EPS
    assert error[wide > -3].abs().max() < 16 * EPS
    assert (d_up.cpu() - cdf - wide * density).abs().max() < 8 * EPS


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_what_is_not_finite_acts_as_defined(activation, device):
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, 60.0, -60.0, 3e38, -3e38])
    x, grad = (part.contiguous().to(device) for part in torch.meshgrid(values, values, indexing="ij"))
    x, grad = x[None], grad[None]
    value, d_up, _ = run([Hidden(x)], activation, None, grad)
    # the formulas: torch's own GELU of infinity depends on the vectors of the CPU
    wide = x.double()
    expected, expected_grad = wide.relu(), torch.where(wide <= 0, 0, grad)
    if activation == "gelu":
        cdf = 0.5 * (1 + torch.special.erf(wide / math.sqrt(2)))
        slope = cdf + wide * (-0.5 * wide**2).exp() / math.sqrt(2 * math.pi)
        expected, expected_grad = wide * cdf, grad * slope
    torch.testing.assert_close(value, expected.float(), equal_nan=True)
    torch.testing.assert_close(d_up, expected_grad.float(), equal_nan=True)


@pytest.mark.parametrize("programs", [1, 2, 1000])
def test_any_number_of_programs(programs, device):
    shape = (3, 50, 40)
    terms, grad = make("two", shape, torch.float32, device), torch.randn(shape, device=device)
    *exact, total = run(terms, "gelu", None, grad)
    *values, d_bias = run(terms, "gelu", None, grad, programs=programs)
    assert all(torch.equal(a, b) for a, b in zip(values, exact, strict=True))
    torch.testing.assert_close(d_bias, total, rtol=1e-5, atol=1e-4)
    # no atomics: the same bits again
    assert torch.equal(run(terms, "gelu", None, grad, programs=programs)[-1], d_bias)


def test_gradient_in_place(device):
    x, grad = torch.randn(3, 20, 300, device=device), torch.randn(3, 20, 300, device=device)
    _, expected, _ = run([Hidden(x)], "gelu", None, grad)
    hidden, d_bias = mlp_hidden_backward(grad, [Hidden(x)], "gelu", d_ups=[grad], want_hidden=False, want_bias=False)
    assert torch.equal(grad, expected) and hidden is None and d_bias is None


def test_any_strides(device):
    up, grad = torch.randn(5, 8, 6, device=device).mT, torch.randn(3, 6, 16, device=device)[:, :, ::2]
    slots, factor = torch.tensor([3, 9, 0, 9, -1], dtype=torch.int32)[::2].to(device), torch.rand(6, device=device)[::2]
    given = run([Hidden(up, slots, 1.0, factor)], "gelu", None, grad)
    straight = run([Hidden(up.contiguous(), slots.contiguous(), 1.0, factor.contiguous())], "gelu", None, grad.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(given, straight, strict=True) if not a.isnan().any())
    out = torch.empty(3, 6, 8, device=device)
    assert mlp_hidden([Hidden(up, slots, 1.0, factor)], "gelu", num_samples=3, out=out) is out
    assert torch.equal(out, given[0])


def test_nothing_to_do(device):
    empty = torch.empty(0, 5, 8, device=device)
    absent = torch.full((3,), -1, dtype=torch.int32, device=device)
    assert mlp_hidden([Hidden(empty)], "gelu", num_samples=0).shape == (0, 5, 8)
    with poisoned():
        assert torch.equal(mlp_hidden([Hidden(empty, absent)], "gelu", num_samples=3), torch.zeros(3, 5, 8, device=device))
        for n, slots in ((0, None), (3, absent)):
            hidden, d_bias = mlp_hidden_backward(
                torch.ones(n, 5, 8, device=device), [Hidden(empty, slots)], "relu", d_ups=[empty.clone()], want_hidden=True,
                want_bias=True,
            )  # fmt: skip
            assert torch.equal(hidden, torch.zeros(n, 5, 8, device=device))
            assert torch.equal(d_bias, torch.zeros(8, device=device))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_more_samples_than_a_grid_axis_takes() -> None:
    terms = [Hidden(torch.randn(70001, 3, 48, device="cuda", dtype=torch.bfloat16))]
    agree(terms, "gelu", None, torch.randn(70001, 3, 48, device="cuda", dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_more_elements_than_32_bits_address() -> None:
    n = 2**31 // (64 * 2048) + 1
    if torch.cuda.mem_get_info()[0] < 12 * n * 64 * 2048:
        pytest.skip("not enough device memory")
    up = torch.ones(n, 64, 2048, device="cuda", dtype=torch.bfloat16)
    up[-1] = 2.0
    out = mlp_hidden([Hidden(up)], "relu", num_samples=n)
    assert bool((out[-1] == 2.0).all()) and bool((out[0] == 1.0).all())


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(terms=[]), "terms must be one or two, got 0"),
        (dict(terms=[Hidden(torch.zeros(2, 3, 4))] * 3), "terms must be one or two, got 3"),
        (dict(activation="tanh"), "activation must be one of .*got 'tanh'"),
        (dict(terms=[Hidden(torch.zeros(2, 3, 4).double())]), "tensor 0 must be .*got .*float64"),
        (dict(terms=[Hidden(torch.zeros(2, 3, 4)), Hidden(torch.zeros(2, 3, 4).half())]), "tensor 1 must be .*float16"),
        (dict(terms=[Hidden(torch.zeros(2, 3, 4)), Hidden(torch.zeros(2, 3, 5))]), r"tensor 1 must be \(n, 3, 4\)"),
        (dict(terms=[Hidden(torch.zeros(1, 3, 4))]), "tensor 0 must have 2 samples where there are no slots, got 1"),
        (dict(terms=[Hidden(torch.zeros(2, 3, 4), torch.zeros(2).long())]), "slots and factors .*got torch.int64"),
        (dict(terms=[Hidden(torch.zeros(2, 3, 4), None, 1.0, torch.zeros(3))]), r"slots and factors .*\(3,\)"),
        (dict(bias=torch.zeros(3)), r"bias must be \(4,\), got \(3,\)"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    given = {**dict(terms=[Hidden(torch.zeros(2, 3, 4))], activation="gelu"), **change}
    if given["terms"]:
        with pytest.raises(ValueError, match=f"mlp_hidden: {message}"):
            mlp_hidden(**given, num_samples=2)
    options = dict(d_ups=[term.up.clone() for term in given["terms"]], want_hidden=True, want_bias=True)
    with pytest.raises(ValueError, match=f"mlp_hidden_backward: {message}"):
        mlp_hidden_backward(torch.zeros(2, 3, 4), **given, **options)


def test_refuses_places_that_do_not_fit() -> None:
    x = torch.zeros(2, 3, 4)
    for out in (torch.zeros(2, 4, 3).mT, torch.zeros(2, 3, 5), x.half()):
        with pytest.raises(ValueError, match=r"mlp_hidden: out must be contiguous \(2, 3, 4\) torch.float32, got"):
            mlp_hidden([Hidden(x)], "gelu", num_samples=2, out=out)
        with pytest.raises(ValueError, match=r"mlp_hidden_backward: d_ups must be contiguous \(2, 3, 4\) torch.float32, got"):
            mlp_hidden_backward(x, [Hidden(x)], "gelu", d_ups=[out], want_hidden=True, want_bias=True)
    with pytest.raises(ValueError, match="mlp_hidden_backward: grad must be torch.float32, got torch.float16"):
        mlp_hidden_backward(x.half(), [Hidden(x)], "gelu", d_ups=[x], want_hidden=True, want_bias=True)


def test_reference_has_gradients() -> None:
    slots, factor = torch.tensor([1, -1, 0], dtype=torch.int32), torch.rand(3)

    def total(up: Tensor, bias: Tensor) -> Tensor:
        terms = [Hidden(up, slots, 0.5, factor), Hidden(up, slots.flip(0), 2.0)]
        return mlp_hidden_reference(terms, "gelu", bias=bias, num_samples=3)

    up, bias = torch.randn(2, 3, 4).double().requires_grad_(), torch.randn(4).double().requires_grad_()
    assert torch.autograd.gradcheck(total, (up, bias))
    assert total(up, bias)[1].abs().max() == 0


def test_cost_counts_what_is_there() -> None:
    # one term of 2 of 3 rows, 4 columns of 2 bytes
    assert mlp_hidden_cost([2], 3, 4, 2).bytes == 2 * 4 * (2 + 3)
    assert mlp_hidden_cost([2], 3, 4, 2, backward=True).bytes == 2 * 4 * (2 + 2 + 3 + 3)
