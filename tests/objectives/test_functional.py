"""The losses against their formulae, written out as loops in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastskel.compat.usdrl import loss as compat
from fastskel.objectives.functional import cross_correlation, mgfd_loss, similarity, variance_covariance


def embeddings(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # deviations on both sides of the hinge at 1
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * torch.linspace(0.3, 2.0, shape[-1])


def naive_mse(a: Tensor, b: Tensor) -> float:
    rows, width = a.shape
    return sum(float(a[i, j] - b[i, j]) ** 2 for i in range(rows) for j in range(width)) / (rows * width)


def naive_similarity(z: Tensor) -> float:
    centre = sum(z[:-1]) / (len(z) - 1)
    return sum(naive_mse(view, z[-1]) + naive_mse(view, centre) for view in z[:-1])


def covariance(a: Tensor, b: Tensor, i: int, j: int) -> float:
    x, y = a[:, i] - a[:, i].sum() / len(a), b[:, j] - b[:, j].sum() / len(b)
    return float((x * y).sum()) / (len(a) - 1)


def naive_variance_covariance(z: Tensor) -> float:
    width = z.shape[1]
    hinge = sum(max(0.0, 1 - (covariance(z, z, i, i) + 1e-4) ** 0.5) for i in range(width)) / width
    return 5 * hinge + sum(covariance(z, z, i, j) ** 2 for i in range(width) for j in range(width) if i != j) / width


def naive_cross_correlation(a: Tensor, b: Tensor) -> float:
    rows, width = a.shape
    total = 0.0
    for i in range(width):
        for j in range(width):
            # the sum runs over N, the deviations over N - 1
            c = covariance(a, b, i, j) * (rows - 1) / rows
            c /= (covariance(a, a, i, i) * covariance(b, b, j, j)) ** 0.5
            total += (c - 1) ** 2 if i == j else 0.005 * c**2
    return total


@pytest.mark.parametrize("views", [2, 3, 4, 5])
@pytest.mark.parametrize("rows, width", [(2, 1), (2, 5), (7, 4)])
def test_terms_equal_their_formulae(views, rows, width):
    z = embeddings(views, rows, width)
    assert float(similarity(z)) == pytest.approx(naive_similarity(z), rel=1e-12)
    assert float(variance_covariance(z[0])) == pytest.approx(naive_variance_covariance(z[0]), rel=1e-12)
    assert float(cross_correlation(z[0], z[1])) == pytest.approx(naive_cross_correlation(z[0], z[1]), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("views", [2, 3, 4, 5])
@pytest.mark.parametrize("weight", [1e-3, 0.0, 0.7])
def test_total_weighs_terms_and_domains(views, weight):
    z_t, z_s, z_i = embeddings(views, 6, 3, seed=1), embeddings(views, 6, 3, seed=2), embeddings(views, 6, 5, seed=3)
    total, terms = mgfd_loss(z_t, z_s, z_i, xcorr_weight=weight)
    expected = 0.0
    for domain, z, share in (("t", z_t, 0.5), ("s", z_s, 0.5), ("i", z_i, 1.0)):
        named = {
            "sim": naive_similarity(z),
            "vac": sum(naive_variance_covariance(view) for view in z),
            "xcorr": sum(naive_cross_correlation(a, b) for a, b in itertools.combinations(z, 2)),
        }
        for term, factor in (("sim", 5.0), ("vac", 1.0), ("xcorr", weight)):
            expected += share * factor * named[term]
            if term != "xcorr" or weight:
                assert float(terms[f"{term}_{domain}"]) == pytest.approx(named[term], rel=1e-12)
    assert float(total) == pytest.approx(expected, rel=1e-12)


def test_journal_names_no_cross_correlation():
    z = embeddings(4, 6, 3)
    assert not [name for name in mgfd_loss(z, z, z, xcorr_weight=0.0)[1] if "xcorr" in name]
    assert len(mgfd_loss(z, z, z)[1]) == 9


def test_terms_are_detached_and_the_total_is_not():
    z = embeddings(2, 6, 3).requires_grad_()
    total, terms = mgfd_loss(z, z, z)
    assert total.requires_grad and not any(term.requires_grad for term in terms.values())


def test_the_anchor_is_the_last_view():
    z = embeddings(3, 4, 2)
    swapped = z[[2, 1, 0]]
    assert float(similarity(z)) != pytest.approx(float(similarity(swapped)))
    assert float(similarity(z)) == pytest.approx(float(similarity(z[[1, 0, 2]])))


def test_a_criterion_of_ones_own():
    z = embeddings(4, 5, 2)
    calls = []

    def criterion(a: Tensor, b: Tensor) -> Tensor:
        calls.append((a, b))
        return (a - b).abs().sum()

    value = similarity(z, criterion)
    centre = z[:3].mean(0)
    torch.testing.assert_close(value, (z[:3] - z[3]).abs().sum() + (z[:3] - centre).abs().sum())
    assert len(calls) == 6


def test_gradients_are_those_of_the_values():
    z_t, z_s, z_i = (embeddings(3, 4, width, seed=width).requires_grad_() for width in (2, 3, 4))
    assert torch.autograd.gradcheck(lambda *z: mgfd_loss(*z)[0], (z_t, z_s, z_i))
    assert torch.autograd.gradcheck(similarity, (z_t,))
    assert torch.autograd.gradcheck(variance_covariance, (z_s[0].detach().requires_grad_(),))
    a, b = (z_i[k].detach().requires_grad_() for k in range(2))
    assert torch.autograd.gradcheck(cross_correlation, (a, b))


def test_a_constant_feature():
    """It costs the variance hinge 0.99 / D and has finite gradients; its cross-correlation is not a number."""
    z = embeddings(6, 3)
    z[:, 1] = 2.0
    z.requires_grad_()
    value = variance_covariance(z)
    (grad,) = torch.autograd.grad(value, z)
    value = value.detach()
    z = z.detach()
    assert float(value) == pytest.approx(naive_variance_covariance(z), rel=1e-12)
    assert grad.isfinite().all()
    assert cross_correlation(z, embeddings(6, 3, seed=1)).isnan()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_total(bad):
    z = embeddings(2, 6, 3)
    broken = z.clone()
    broken[0, 0, 0] = bad
    for arguments in ((broken, z, z), (z, broken, z), (z, z, broken)):
        assert not mgfd_loss(*arguments)[0].isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype):
    z = [embeddings(4, 8, width, seed=width).to(dtype) for width in (16, 16, 32)]
    expected, expected_terms = mgfd_loss(*(part.float() for part in z))
    leaves = [part.clone().requires_grad_() for part in z]
    with torch.autocast("cpu", dtype):
        total, terms = mgfd_loss(*leaves)
    assert total.dtype == torch.float32
    assert torch.equal(total, expected)
    assert all(torch.equal(terms[name], expected_terms[name]) for name in expected_terms)
    total.backward()
    assert all(part.grad.dtype == dtype for part in leaves)


def test_large_values_survive_half_precision():
    # squares beyond 65,504, the largest half-precision number
    z = (1000 * embeddings(4, 8, 4)).half()
    with torch.autocast("cpu", torch.float16):
        assert mgfd_loss(z, z, z)[0].isfinite()


@pytest.mark.parametrize("function", [variance_covariance, lambda z: cross_correlation(z, z)])
@pytest.mark.parametrize("shape", [(1, 3), (0, 3), (4, 0), (4,), (2, 4, 3)], ids=str)
def test_batches_without_statistics_are_refused(function, shape):
    with pytest.raises(ValueError, match=r"must be \(N, D\) with N at least 2, got \("):
        function(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 4, 3), (0, 4, 3), (4, 3)], ids=str)
def test_similarity_needs_two_views(shape):
    with pytest.raises(ValueError, match=r"z must be \(W, N, D\) with W at least 2, got \("):
        similarity(torch.zeros(shape))


@pytest.mark.parametrize("other", [(4, 1), (4, 5), (5, 3)], ids=str)
def test_cross_correlation_of_other_shapes_is_refused(other):
    with pytest.raises(ValueError, match=r"a and b must agree in shape, got \(4, 3\) and \("):
        cross_correlation(torch.zeros(4, 3), torch.zeros(other))


@pytest.mark.parametrize("shapes", [[(2, 4, 3), (2, 4, 3), (3, 4, 3)], [(2, 4, 3), (2, 5, 3), (2, 4, 3)], [(1, 4, 3)] * 3])
def test_stacks_that_disagree_are_refused(shapes):
    with pytest.raises(ValueError, match=r"equal W >= 2 and equal N, got \("):
        mgfd_loss(*(torch.randn(shape) for shape in shapes))


def test_one_sample_is_refused():
    with pytest.raises(ValueError, match="N at least 2"):
        mgfd_loss(*(torch.randn(2, 1, 3) for _ in range(3)))


def test_the_reference_names():
    z = list(embeddings(4, 6, 5))
    assert float(compat.similarity(z, torch.nn.MSELoss())) == pytest.approx(naive_similarity(torch.stack(z)))
    assert float(compat.v_ac(z[0])) == pytest.approx(naive_variance_covariance(z[0]))
    assert float(compat.xcorr_loss(z[0], z[1])) == pytest.approx(naive_cross_correlation(z[0], z[1]))
    pairs = sum(naive_cross_correlation(a, b) for a, b in itertools.combinations(z, 2))
    assert float(compat.cal_xc(z)) == pytest.approx(pairs)
    for function in (compat.cal_xc, lambda z: compat.similarity(z, torch.nn.MSELoss())):
        with pytest.raises(ValueError, match="z_list must have 4 views, got 3"):
            function(z[:3])
