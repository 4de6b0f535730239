"""Decorrelation by kernels: energies and gradients against the definition in float64, interpreted and on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastskel.kernels import _decorrelation_direct as direct
from fastskel.kernels import _decorrelation_tiles as tiles
from fastskel.kernels import _decorrelation_triton as module
from fastskel.kernels._decorrelation_triton import decorrelate_triton, form_of, pass_cost
from fastskel.kernels.reference.decorrelation import Energies, Options, decorrelation
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ["gram", "direct"]
# as the losses use them: a deviation without an eps, and one with
PLAIN, SMOOTH = Options(), Options(gamma=1.2, std_eps=1e-3, correction=0)
# views, samples, features
SHAPES = [(2, 2, 16), (3, 17, 33), (4, 50, 64), (2, 65, 130), (8, 18, 16), (2, 100, 16), (1, 64, 64), (4, 64, 16)]
KERNELS = [
    (tiles, "_column_dots_kernel"), (tiles, "_energies_kernel"), (module, "_gram_kernel"), (module, "_mix_kernel"),
    (module, "_gram_gradient_kernel"), (direct, "_panel_kernel"), (direct, "_panel_gradient_kernel"),
]  # fmt: skip
# what is launched for a gradient, by form, pairs, covariances, beside the last sums
LAUNCHES = {
    ("gram", True, True): "column_dots gram gram_gradient gram mix gram_gradient",
    ("gram", True, False): "column_dots gram mix gram_gradient",
    ("gram", False, True): "gram gram_gradient",
    ("gram", False, False): "gram_gradient",
    ("direct", True, True): "column_dots panel panel_gradient",
    ("direct", True, False): "column_dots panel panel_gradient",
    ("direct", False, True): "panel panel_gradient",
    ("direct", False, False): "panel_gradient",
}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill what is allocated and not written with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def embeddings(shape: tuple[int, int, int], device: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Views that resemble each other, their features of different deviations about the hinge, off zero."""
    generator = torch.Generator().manual_seed(sum(shape))
    shared = torch.randn(shape[1:], generator=generator)
    own = torch.randn(shape, generator=generator)
    deviation = 0.5 + torch.rand(shape[2], generator=generator)
    return ((shared + own) * deviation + 1).to(device, dtype)


def weights_of(num_views: int, device: Any, pairs: bool = True) -> Energies:
    """Weights of which some are zero, each of its own size as in a loss."""
    generator = torch.Generator().manual_seed(num_views)
    count = num_views * (num_views - 1) // 2 if pairs else 0
    drawn = [torch.rand(size, generator=generator) for size in (num_views, num_views, count, count)]
    drawn[1][1:2], drawn[3][1:2] = 0.0, 0.0
    return Energies(*(weight.to(device) for weight in drawn))


def truth(z: Tensor, options: Options, weights: Energies) -> tuple[Energies, Tensor]:
    return decorrelation(z.double(), options), gradient(z.double(), options, weights)


def gradient(z: Tensor, options: Options, weights: Energies) -> Tensor:
    leaf = z.detach().to(torch.promote_types(z.dtype, torch.float32)).requires_grad_()
    energies = decorrelation(leaf, options)
    return torch.autograd.grad(sum((weight * energy).sum() for weight, energy in zip(weights, energies)), leaf)[0]


def agree(z: Tensor, options: Options, form: str | None, precision: str = "ieee") -> None:
    """Errors of a few float32 roundings, or of plain torch, whatever the type of z; the gradient of a view is one vector."""
    weights = weights_of(len(z), z.device, options.pairs)
    energies, grad = decorrelate_triton(z, options, weights, form=form, input_precision=precision)
    alone, none = decorrelate_triton(z, options, None, form=form, input_precision=precision)
    expected, direction = truth(z, options, weights)
    assert none is None and grad is not None and grad.dtype == torch.float32
    for value, single, true in zip(energies, alone, expected):
        assert value.dtype == torch.float32
        # what is off the diagonal is a difference of sums of which it may be a tenth: eight roundings of 6e-8 in ten times it
        torch.testing.assert_close(value.double(), true, rtol=5e-6, atol=1e-9)
        torch.testing.assert_close(single.double(), true, rtol=5e-6, atol=1e-9)
    for ours, plain, true in zip(grad.double(), gradient(z, options, weights).double(), direction):
        # two samples are standardised to signs, and of their gradient what is left is rounding, in either order of operations
        times = 2 if z.shape[1] > 2 else 8
        assert (ours - true).norm() <= max(2e-6 * true.norm(), times * (plain - true).norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape, form, device):
    agree(embeddings(shape, device), PLAIN, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_types_and_options(dtype, form, device):
    agree(embeddings((3, 33, 40), device, dtype), SMOOTH, form)


@pytest.mark.parametrize("form, pairs, covariances", LAUNCHES)
def test_what_is_not_wanted_is_not_computed(form, pairs, covariances, device, launches):
    options = PLAIN._replace(pairs=pairs, covariances=covariances)
    agree(embeddings((3, 40, 33), device), options, form)
    seen = launches(*(getattr(where, name) for where, name in KERNELS))
    z = embeddings((2, 20, 16), device)
    decorrelate_triton(z, options, weights_of(2, device, pairs), form=form)
    wanted = [f"_{name}_kernel" for name in [*LAUNCHES[form, pairs, covariances].split(), "energies"]]
    assert seen == wanted
    seen.clear()
    decorrelate_triton(z, options, None, form=form)
    assert seen == [name for name in wanted if "gradient" not in name]


@pytest.mark.parametrize("form", FORMS)
def test_covariances_that_are_not_wanted_do_not_count(form, device):
    z, weights = embeddings((3, 20, 16), device), weights_of(3, device)
    nothing = weights._replace(covariance=torch.full_like(weights.covariance, float("nan")))
    energies, grad = decorrelate_triton(z, PLAIN._replace(covariances=False), nothing, form=form)
    assert torch.equal(energies.covariance, torch.zeros(3, device=device)) and grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 7, 1), (8, 3, 1), (5, 2, 3)], ids=str)
def test_one_feature_and_two_samples(shape, form, device):
    # energies are no more than the rounding of the diagonal, 1 for a pair: they are compared with that
    z, weights = embeddings(shape, device), weights_of(shape[0], device)
    energies, grad = decorrelate_triton(z, SMOOTH, weights, form=form)
    expected, direction = truth(z, SMOOTH, weights)
    for value, true in zip(energies, expected):
        torch.testing.assert_close(value.double(), true, rtol=5e-6, atol=2e-6)
    assert (grad.double() - direction).norm() <= 1e-5 * direction.norm()


def test_tiles_of_large_batches(device, monkeypatch):
    monkeypatch.setattr(module, "SMALL_BATCH", 16)
    agree(embeddings((2, 130, 33), device), PLAIN, "gram")


@pytest.mark.parametrize("options", [PLAIN, PLAIN._replace(pairs=False)], ids=["pairs", "no pairs"])
def test_several_panels(options, device, monkeypatch):
    # of one tile each, and of two, where the last panel has one
    monkeypatch.setattr(direct, "PANEL", 128)
    agree(embeddings((2, 40, 150), device), options, "direct")


@pytest.mark.parametrize("form", FORMS)
def test_every_element_is_written_and_bits_repeat(form, device):
    z, weights = embeddings((3, 34, 70), device), weights_of(3, device)
    expected = decorrelate_triton(z, PLAIN, weights, form=form)
    with poisoned():
        again = decorrelate_triton(z, PLAIN, weights, form=form)
        alone, _ = decorrelate_triton(z, PLAIN, None, form=form)
    for first, second in zip((*expected[0], expected[1]), (*again[0], again[1])):
        assert second.isfinite().all() and torch.equal(first, second)
    assert all(value.isfinite().all() for value in alone)


@pytest.mark.parametrize("form", FORMS)
def test_bits_do_not_depend_on_the_number_of_programs(form, device, monkeypatch):
    z, weights = embeddings((2, 70, 70), device), weights_of(2, device)
    expected = decorrelate_triton(z, PLAIN, weights, form=form)
    monkeypatch.setattr(tiles, "OCCUPANCY", 1)
    monkeypatch.setattr(tiles, "num_processors", lambda device: 1)
    monkeypatch.setattr(module, "WAVES", 1)
    again = decorrelate_triton(z, PLAIN, weights, form=form)
    for first, second in zip((*expected[0], expected[1]), (*again[0], again[1])):
        assert torch.equal(first, second)


def test_several_chunks_are_mixed(device, monkeypatch):
    monkeypatch.setattr(module, "MIX", 1024)
    agree(embeddings((3, 40, 33), device), PLAIN, "gram")


class Allocations(TorchDispatchMode):
    """Counts elements of the tensors that are allocated meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.new_empty, torch.ops.aten.new_zeros):
            self.elements += out.numel()
        return out


@pytest.mark.parametrize("options", [PLAIN, PLAIN._replace(pairs=False)], ids=["pairs", "no pairs"])
@pytest.mark.parametrize("form, shape", [("gram", (2, 128, 20)), ("direct", (2, 20, 256))], ids=FORMS)
def test_one_matrix_for_each_view(form, shape, options, device):
    z, count = embeddings(shape, device), Allocations()
    with count:
        decorrelate_triton(z, options, weights_of(2, device, options.pairs), form=form)
    # beside the gradient, and sums that are little
    assert count.elements - z.numel() < 1.5 * 2 * max(shape) ** 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_constant_feature(form, device):
    z = embeddings((3, 20, 33), device)
    z[1, :, 5] = 2.0
    # without an eps it has no deviation: pairs with its view are not numbers, and gradients where the definition's are not
    weights = weights_of(3, device)
    energies, grad = decorrelate_triton(z, PLAIN, weights, form=form)
    expected, direction = truth(z, PLAIN, weights)
    for value, true in zip(energies, expected):
        torch.testing.assert_close(value.double(), true, rtol=5e-6, atol=0, equal_nan=True)
    assert energies.off_diagonal.isnan().tolist() == [True, False, True]
    assert torch.equal(grad.isnan(), direction.isnan()) and not grad.isnan().all()
    agree(z, SMOOTH, form)
    agree(z, PLAIN._replace(pairs=False), form)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_reaches_what_it_reaches(form, bad, device):
    z, weights = embeddings((3, 20, 33), device), weights_of(3, device)
    z[2, 3, 4] = bad
    energies, grad = decorrelate_triton(z, PLAIN, weights, form=form)
    expected, direction = truth(z, PLAIN, weights)
    for value, true in zip(energies, expected):
        assert torch.equal(value.isnan(), true.isnan())
    assert torch.equal(grad.isnan(), direction.isnan())


@pytest.mark.parametrize(
    "view", [lambda z: z.transpose(0, 1), lambda z: z[:, ::2, :33], lambda z: z.mT], ids=["swapped", "strided", "transposed"]
)
def test_any_strides(view, device):
    z = view(embeddings((20, 3, 40), device))[:3]
    assert not z.is_contiguous()
    agree(z, SMOOTH, None)


def test_three_products_are_as_exact(device):
    agree(embeddings((2, 40, 64), device), PLAIN, None, "tf32x3")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", module.PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 356, 2048), (4, 1024, 2048), (4, 4000, 1024)], ids=str)
def test_published_sizes(shape: tuple[int, int, int], dtype: torch.dtype, precision: str) -> None:
    agree(embeddings(shape, "cuda", dtype), PLAIN, None, precision)


def test_form_follows_sizes() -> None:
    assert form_of(356, 2048) == "gram" and form_of(2048, 2048) == "gram" and form_of(2049, 2048) == "direct"
    # products of half a Gram matrix, and two of a whole one, for each kind; all of C with itself
    alone = PLAIN._replace(pairs=False)
    assert pass_cost(2, 3, 5).flops == 2 * 2 * (3 * 4 * 5 + 2 * 3 * 3 * 5)
    assert pass_cost(2, 3, 5, options=alone, gradient=False).flops == 2 * 3 * 4 * 5
    assert pass_cost(2, 30, 5).flops == 4 * 4 * 30 * 25
    assert pass_cost(2, 30, 5, gradient=False).flops == 2 * 2 * 30 * 25
    assert pass_cost(2, 30, 5, options=PLAIN._replace(covariances=False)).flops == 2 * 4 * 30 * 25
    assert pass_cost(2, 3, 5, options=alone._replace(covariances=False)).flops == 0
    assert pass_cost(2, 30, 5, 2).bytes == 300 * 6


def test_older_compilers_are_given_float32() -> None:
    assert module._is_exact("3.6.0", 9) and module._is_exact("3.9.0+git1", 10) and module._is_exact("3.10.0", 12)
    assert not module._is_exact("3.6.0", 10) and not module._is_exact("3.8.1", 12)


def test_other_arguments_are_refused() -> None:
    z = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="z must be float32, bfloat16 or float16, got torch.float64"):
        decorrelate_triton(z.double(), PLAIN, None)
    with pytest.raises(ValueError, match=r"z must be \(W, N, D\) with N at least 2 and none 0, got \(2, 1, 4\)"):
        decorrelate_triton(z[:, :1], PLAIN, None)
    with pytest.raises(ValueError, match="input_precision must be one of .*, got 'tf32'"):
        decorrelate_triton(z, PLAIN, None, input_precision="tf32")
    with pytest.raises(ValueError, match="form must be one of .* or None, got 'panel'"):
        decorrelate_triton(z, PLAIN, None, form="panel")
