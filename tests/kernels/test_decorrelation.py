"""The operator `fastskel::decorrelation` and the pass below it: both forms, gradients, types, memory, errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fastskel.kernels import _decorrelation_pass as pass_module
from fastskel.kernels import _decorrelation_triton as triton_module
from fastskel.kernels.decorrelation import (
    Energies,
    Forms,
    Options,
    choose_form,
    decorrelate,
    decorrelate_torch,
    decorrelation,
    decorrelation_cost,
)
from fastskel.kernels.reference.decorrelation import decorrelation as reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
OPTIONS = {
    "published": Options(),
    "no-pairs": Options(pairs=False),
    "no-covariances": Options(covariances=False),
    "hinge": Options(pairs=False, covariances=False),
    "batch-norm": Options(gamma=1.3, std_eps=1e-5, correction=0),
}
FORMS = [Forms(*pair) for pair in itertools.product(("gram", "direct"), repeat=2)]
# (views, samples, features): N below, at and above D; two samples; one view; rows, columns and panels in several blocks
SHAPES = [(4, 6, 9), (4, 9, 9), (4, 20, 7), (2, 2, 5), (2, 3, 1), (1, 5, 4), (8, 5, 3), (3, 130, 60), (3, 300, 40), (4, 40, 1300)]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill what is not initialised with NaN: an element that nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def embeddings(*shape: int, dtype: torch.dtype = DOUBLE, seed: int = 0, mean: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # deviations on both sides of the hinge at 1
    z = torch.randn(shape, generator=generator, dtype=DOUBLE) * torch.linspace(0.3, 2.0, shape[-1], dtype=DOUBLE)
    return (z + mean).to(dtype)


def weights_for(energies: Energies, seed: int = 1) -> Energies:
    generator = torch.Generator().manual_seed(seed)
    return Energies(*(torch.rand(len(e), generator=generator, dtype=DOUBLE).to(e) for e in energies))


def differentiate(function: Callable[..., Energies], z: Tensor, options: Options, weights: Energies) -> Tensor:
    z = z.detach().requires_grad_()
    energies = function(z, options)
    (grad,) = torch.autograd.grad(sum((e * w.to(e)).sum() for e, w in zip(energies, weights)), z)
    return grad


def distance(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """Relative distance of two tensors as vectors; an energy that is zero has only the rounding of what was taken off."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(floor)) if len(b) else 0.0


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_forms_equal_the_definition(shape: tuple[int, int, int], options: Options) -> None:
    z = embeddings(*shape)
    expected = reference(z, options)
    weights = weights_for(expected)
    expected_grad = differentiate(reference, z, options, weights)
    for forms in FORMS:
        energies, grad = decorrelate_torch(z, options, weights, forms)
        for name, energy, target in zip(Energies._fields, energies, expected):
            assert energy.shape == target.shape, name
            assert distance(energy, target, floor=1e-3) <= 1e-12, (forms, name)
        assert distance(grad, expected_grad) <= 1e-12, forms
        alone, nothing = decorrelate_torch(z, options, None, forms)
        assert nothing is None and all(torch.equal(a, b) for a, b in zip(alone, energies))


@pytest.mark.parametrize("name", Energies._fields)
@pytest.mark.parametrize("forms", FORMS, ids="-".join)
def test_each_energy_has_its_gradient(name: str, forms: Forms) -> None:
    z = embeddings(3, 8, 6)
    energies = reference(z)
    weights = Energies(*(torch.ones_like(e) if e is getattr(energies, name) else torch.zeros_like(e) for e in energies))
    _, grad = decorrelate_torch(z, Options(), weights, forms)
    assert distance(grad, differentiate(reference, z, Options(), weights)) <= 1e-12


@pytest.mark.parametrize("num_views", range(2, 9))
def test_operator_equals_the_definition(num_views: int) -> None:
    z = embeddings(num_views, 7, 5)
    weights = weights_for(reference(z))
    for energy, target in zip(decorrelation(z), reference(z)):
        torch.testing.assert_close(energy, target, rtol=1e-12, atol=0)
    assert distance(*(differentiate(f, z, Options(), weights) for f in (decorrelation, reference))) <= 1e-12


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options: Options) -> None:
    for shape in ((3, 5, 4), (2, 12, 3)):
        z = embeddings(*shape).requires_grad_()
        assert torch.autograd.gradcheck(lambda z: tuple(e for e in decorrelation(z, options) if len(e)), (z,))


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN, HALF], ids=str)
@pytest.mark.parametrize("shape", [(4, 64, 96), (4, 64, 64), (3, 150, 40)], ids=str)
def test_errors_are_those_of_the_definition(shape: tuple[int, int, int], dtype: torch.dtype, mean: float) -> None:
    z = embeddings(*shape, dtype=dtype, mean=mean)
    true, plain = reference(z.double()), reference(z)
    weights = weights_for(plain)
    true_grad, plain_grad = (differentiate(reference, t, Options(), weights) for t in (z.double(), z.float()))
    for forms in FORMS:
        energies, grad = decorrelate_torch(z, Options(), weights, forms)
        assert grad.dtype == energies.hinge.dtype == SINGLE
        # twice what plain torch loses, beside a rounding of float32 where it happens to lose less
        for name, e, p, t in zip(Energies._fields, energies, plain, true):
            assert distance(e, t) <= 2 * distance(p, t) + 8 * torch.finfo(SINGLE).eps, (forms, name)
        assert distance(grad, true_grad) <= 2 * distance(plain_grad, true_grad) + torch.finfo(SINGLE).eps, forms


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE, BRAIN, HALF], ids=str)
def test_types(dtype: torch.dtype) -> None:
    z = embeddings(3, 6, 4, dtype=dtype)
    wide = torch.promote_types(dtype, SINGLE)
    with torch.autocast("cpu", BRAIN):
        leaf = z.clone().requires_grad_()
        energies = decorrelation(leaf)
        assert {e.dtype for e in energies} == {wide}
        sum(e.sum() for e in energies).backward()
        assert leaf.grad.dtype == dtype
        _, grad = decorrelate(z, Options(), Energies(*(torch.ones_like(e) for e in energies)))
    assert grad.dtype == wide
    assert torch.equal(grad.to(dtype), leaf.grad)
    # autocast changed nothing
    assert all(torch.equal(a, b) for a, b in zip(energies, decorrelation(z)))


@pytest.mark.parametrize("name", ["published", "no-pairs", "no-covariances", "batch-norm"])
@pytest.mark.parametrize("kind", ["constant", "nan", "inf"])
@pytest.mark.parametrize("forms", FORMS, ids="-".join)
def test_what_is_no_number_is_where_the_definition_has_it(forms: Forms, kind: str, name: str) -> None:
    options = OPTIONS[name]
    for shape, view in (((3, 6, 4), 1), ((4, 20, 7), 3), ((2, 9, 3), 0)):
        z = embeddings(*shape)
        if kind == "constant":
            z[view, :, 2] = 2.0
        else:
            z[view, 2, 2] = float(kind)
        weights = weights_for(reference(z, options))
        energies, grad = decorrelate_torch(z, options, weights, forms)
        for energy, target in zip(energies, reference(z, options)):
            torch.testing.assert_close(energy, target, rtol=1e-12, atol=0, equal_nan=True)
        expected = differentiate(reference, z, options, weights)
        assert torch.equal(grad.isnan(), expected.isnan()), shape
        assert distance(grad.nan_to_num(), expected.nan_to_num(), floor=1e-3) <= 1e-12, shape
        if (name, kind) == ("published", "constant"):
            # its view's pairs have no energy, itself no gradient, nor has anything that is correlated with it
            touched = torch.tensor([view in pair for pair in itertools.combinations(range(len(z)), 2)])
            assert torch.equal(energies.on_diagonal.isnan(), touched) and torch.equal(energies.off_diagonal.isnan(), touched)
            own = torch.arange(shape[2]) == 2
            assert torch.equal(grad[view].isnan().all(0), own) and torch.equal(grad[view].isnan().any(0), own)
            assert all(part.isnan().all() for other, part in enumerate(grad) if other != view)


def test_weights_of_covariances_that_are_not_computed_do_not_count() -> None:
    z, options = embeddings(3, 6, 4), Options(covariances=False)
    weights = weights_for(reference(z, options))
    bad = weights._replace(covariance=torch.full_like(weights.covariance, float("nan")))
    for forms in FORMS:
        energies, grad = decorrelate_torch(z, options, weights, forms)
        assert not energies.covariance.any()
        assert torch.equal(decorrelate_torch(z, options, bad, forms)[1], grad)


def test_strides_and_repetition() -> None:
    z = embeddings(3, 11, 6)
    weights = weights_for(reference(z))
    for forms in FORMS:
        energies, grad = decorrelate_torch(z, Options(), weights, forms)
        again, again_grad = decorrelate_torch(z, Options(), weights, forms)
        assert torch.equal(grad, again_grad) and all(torch.equal(a, b) for a, b in zip(energies, again))
        # views stacked behind the samples, part of a wider tensor, adjacent samples: sums may have another order
        for other in (z.transpose(0, 1).contiguous().transpose(0, 1), z.repeat(1, 1, 2)[..., :6], z.mT.contiguous().mT):
            again, again_grad = decorrelate_torch(other, Options(), weights, forms)
            assert distance(again_grad, grad) <= 1e-14
            assert all(distance(a, b) <= 1e-14 for a, b in zip(again, energies))


class Sizes(TorchDispatchMode):
    """Record the operators, and the shapes of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        self.shapes |= {tuple(leaf.shape) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        return out


def test_no_matrix_of_features_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    num_views, rows, width = 4, 16, 200
    z = embeddings(num_views, rows, width, dtype=SINGLE)
    weights = weights_for(reference(z))
    with Sizes() as gram:
        decorrelate_torch(z, Options(), weights)
    assert choose_form(rows, width, num_views, z.device) == ("gram", "gram")
    assert not [shape for shape in gram.shapes if shape.count(width) > 1]
    # one matrix N x N for each view, none for each pair of views
    assert max(torch.Size(shape).numel() for shape in gram.shapes if shape.count(rows) > 1) == num_views * rows**2
    monkeypatch.setattr(pass_module, "PANEL", 48)
    with Sizes() as direct:
        decorrelate_torch(z, Options(), weights, Forms("direct", "direct"))
    assert (48, width) in direct.shapes
    assert not [shape for shape in direct.shapes if shape.count(width) > 1 or shape.count(rows) > 1]


def test_what_is_not_computed_costs_nothing() -> None:
    num_views, rows, width = 4, 16, 200
    z = embeddings(num_views, rows, width, dtype=SINGLE)
    weights = weights_for(reference(z))
    products = {}
    for name, forms in itertools.product(("published", "no-covariances", "hinge"), (FORMS[0], FORMS[-1])):
        with Sizes() as seen:
            some = weights if OPTIONS[name].pairs else weights._replace(on_diagonal=weights[2][:0], off_diagonal=weights[3][:0])
            decorrelate_torch(z, OPTIONS[name], some, forms)
        products[name, forms.pairs] = sum(operator in ("_linear_pointwise", "mm") for operator in seen.names)
        # lists of views would be copied to a GPU
        assert not {"index", "index_put_", "_local_scalar_dense"} & set(seen.names)
    # of each view a Gram matrix, and a product of it
    assert products["published", "gram"] - products["no-covariances", "gram"] == 2 * num_views
    assert products["published", "direct"] - products["no-covariances", "direct"] == 2 * num_views
    assert products["hinge", "gram"] == products["hinge", "direct"] == 0


def test_forms_are_chosen_by_size() -> None:
    cpu = torch.device("cpu")
    assert choose_form(356, 2048, 4, cpu) == ("gram", "gram")
    assert choose_form(2048, 2048, 4, cpu) == ("gram", "gram")
    # faster by Gram matrices, but those would be larger than D x D
    assert choose_form(2049, 2048, 4, cpu) == ("gram", "direct")
    assert choose_form(4096, 2048, 4, cpu) == ("direct", "direct")
    assert choose_form(8192, 2048, 4, cpu) == ("direct", "direct")
    # one Gram matrix serves all pairs of a view
    assert choose_form(1800, 2048, 4, cpu).pairs == "gram"
    assert choose_form(1800, 2048, 2, cpu).pairs == "direct"


def example(dtype: torch.dtype = SINGLE) -> tuple[Tensor, Energies]:
    # not more samples than features: by Gram matrices
    z = embeddings(3, 5, 6, dtype=dtype)
    return z, weights_for(reference(z))


def check_operators(device: torch.device | str) -> None:
    z, weights = example()
    weights = Energies(*(weight.to(device) for weight in weights))
    leaf = z.to(device).requires_grad_()
    torch.library.opcheck(torch.ops.fastskel.decorrelation.default, (leaf, *Options()))
    torch.library.opcheck(torch.ops.fastskel.decorrelation.default, (leaf.detach().bfloat16(), *Options(pairs=False)))
    torch.library.opcheck(torch.ops.fastskel.decorrelation.default, (leaf, *Options(covariances=False)))
    for options in (Options(), Options(covariances=False)):
        torch.library.opcheck(torch.ops.fastskel.decorrelation_gradient.default, (leaf.detach(), *options, *weights))


def test_opcheck_of_the_torch_form() -> None:
    check_operators("cpu")


def test_opcheck(device: torch.device) -> None:
    check_operators(device)


def test_operator_is_triton(device: torch.device, launches: Callable[..., list[str]]) -> None:
    seen = launches(triton_module._gram_kernel, triton_module._gram_gradient_kernel)
    z, weights = example()
    grad = differentiate(decorrelation, z.to(device), Options(), Energies(*(weight.to(device) for weight in weights)))
    assert distance(grad.cpu(), differentiate(reference, z.double(), Options(), weights)) <= 1e-5
    assert set(seen) == {"_gram_kernel", "_gram_gradient_kernel"}
    seen.clear()
    # its kernels have no float64
    grad = differentiate(decorrelation, z.double().to(device), Options(), Energies(*(weight.to(device) for weight in weights)))
    assert distance(grad.cpu(), differentiate(reference, z.double(), Options(), weights)) <= 1e-12
    assert not seen


def test_compiles_as_one_graph() -> None:
    def call(z: Tensor) -> Tensor:
        energies = decorrelation(z)
        return (energies.covariance * energies.hinge).sum() + (energies.on_diagonal + energies.off_diagonal).sum()

    z = example()[0].requires_grad_()
    (expected,) = torch.autograd.grad(call(z), z)
    (grad,) = torch.autograd.grad(torch.compile(call, backend="aot_eager", fullgraph=True)(z), z)
    torch.testing.assert_close(grad, expected)


def test_flops_are_counted() -> None:
    z = example()[0].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        energies = decorrelation(z)
        forward = counter.get_total_flops()
        sum(e.sum() for e in energies).backward()
    assert forward == decorrelation_cost(*z.shape, 4).flops
    assert counter.get_total_flops() == forward + decorrelation_cost(*z.shape, 4, backward=True).flops


def test_cost() -> None:
    # K and G of each view, half of each; D x D where that is smaller, of the covariances and of a pair
    assert decorrelation_cost(4, 10, 1000, 2) == (4 * 2 * 10 * 10 * 1000, 4 * 10 * 1000 * 2)
    assert decorrelation_cost(2, 1000, 10, 4, backward=True).flops == 3 * (2 * 1000 * 10 * 10 + 2 * 1000 * 10 * 10)
    covariances = decorrelation_cost(4, 10, 1000, 2, options=Options(pairs=False), backward=True)
    assert covariances == (4 * 3 * 10 * 10 * 1000, 4 * 10 * 1000 * 6)
    assert decorrelation_cost(4, 10, 1000, 2, options=Options(covariances=False)).flops == 4 * 10 * 10 * 1000
    assert decorrelation_cost(4, 10, 1000, 2, options=Options(pairs=False, covariances=False)).flops == 0


@pytest.mark.parametrize(
    "z, options, message",
    [
        (torch.zeros(4, 3), Options(), r"z must be \(W, N, D\) with N at least 2, got \(4, 3\)"),
        (torch.zeros(2, 1, 3), Options(), r"z must be \(W, N, D\) with N at least 2, got \(2, 1, 3\)"),
        (torch.zeros(0, 4, 3), Options(), r"z must be \(W, N, D\) .* got \(0, 4, 3\)"),
        (torch.zeros(2, 4, 0), Options(), r"z must be \(W, N, D\) .* got \(2, 4, 0\)"),
        (torch.zeros(2, 4, 3, dtype=torch.int64), Options(), r"z must be one of \[.*\], got torch.int64"),
        (torch.zeros(2, 4, 3), Options(correction=4), "options.correction must be below N = 4, got 4"),
    ],
    ids=["two-dimensions", "one-sample", "no-view", "no-feature", "integers", "correction"],
)
def test_refuses(z: Tensor, options: Options, message: str) -> None:
    with pytest.raises(ValueError, match=f"decorrelation: {message}"):
        decorrelation(z, options)
