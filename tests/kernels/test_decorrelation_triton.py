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

TYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ["gram", "direct"]
# as the losses use them: a deviation without an eps, and one with
PLAIN, SMOOTH = Options(), Options(gamma=1.2, std_eps=1e-3, correction=0)
# views, samples, features
SHAPES = [(2, 2, 16), (3, 17, 33), (4, 50, 64), (2, 65, 130), (8, 18, 16), (2, 100, 16), (1, 64, 64), (4, 64, 16)]
COMMON = ["_column_dots_kernel", "_energies_kernel"]
KERNELS = {
    "gram": [(module, "_gram_kernel"), (module, "_mix_kernel"), (module, "_gram_gradient_kernel")],
    "direct": [(direct, "_panel_kernel"), (direct, "_panel_gradient_kernel")],
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


@pytest.mark.parametrize("form", FORMS)
def test_without_pairs(form, device):
    agree(embeddings((3, 40, 33), device), PLAIN._replace(pairs=False), form)


def test_tiles_of_large_batches(device, monkeypatch):
    monkeypatch.setattr(module, "SMALL_BATCH", 16)
    agree(embeddings((2, 130, 33), device), PLAIN, "gram")


def test_several_panels(device, monkeypatch):
    monkeypatch.setattr(direct, "PANEL", 64)
    agree(embeddings((2, 40, 150), device), PLAIN, "direct")


@pytest.mark.parametrize("form", FORMS)
def test_kernels_run(form, device, launches):
    names = {name: getattr(where, name) for where, name in KERNELS[form]}
    seen = launches(*names.values(), *(getattr(tiles, name) for name in COMMON))
    z = embeddings((2, 20, 16), device)
    decorrelate_triton(z, PLAIN, weights_of(2, device), form=form)
    assert sorted(seen) == sorted([*names, *COMMON])
    seen.clear()
    decorrelate_triton(z, PLAIN, None, form=form)
    assert sorted(seen) == sorted(name for name in [*names, *COMMON] if "gradient" not in name)


@pytest.mark.parametrize("form", FORMS)
def test_every_element_is_written_and_bits_repeat(form, device):
    z, weights = embeddings((3, 34, 33), device), weights_of(3, device)
    expected, _ = decorrelate_triton(z, PLAIN, weights, form=form), None
    with poisoned():
        again = decorrelate_triton(z, PLAIN, weights, form=form)
    for first, second in zip((*expected[0], expected[1]), (*again[0], again[1])):
        assert second.isfinite().all() and torch.equal(first, second)


@pytest.mark.parametrize("form", FORMS)
def test_more_items_than_programs(form, device, monkeypatch):
    monkeypatch.setattr(tiles, "num_processors", lambda device: 1)
    monkeypatch.setattr(module, "WAVES", 2)
    # of which programs add up several
    monkeypatch.setattr(module, "MIX", 1024)
    agree(embeddings((2, 70, 70), device), PLAIN, form)


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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_reaches_what_it_reaches(form, device):
    z, weights = embeddings((3, 20, 33), device), weights_of(3, device)
    z[2, 3, 4] = float("nan")
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
    assert form_of(356, 2048) == "gram" and form_of(3072, 2048) == "gram" and form_of(3073, 2048) == "direct"
    # products of half a Gram matrix, and two of a whole one, for each kind; all of C with itself
    assert pass_cost(2, 3, 5).flops == 2 * 2 * (3 * 4 * 5 + 2 * 3 * 3 * 5)
    assert pass_cost(2, 3, 5, pairs=False, gradient=False).flops == 2 * 3 * 4 * 5
    assert pass_cost(2, 30, 5).flops == 4 * 4 * 30 * 25
    assert pass_cost(2, 30, 5, gradient=False).flops == 2 * 2 * 30 * 25
    assert pass_cost(2, 30, 5, 2).bytes == 300 * 6


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
