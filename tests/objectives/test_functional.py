"""The losses against their formulae, written out as loops in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from fastskel.bench.harness import peak_bytes, relative_l2, saved_bytes
from fastskel.bench.reference import loss as published
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastskel.compat.usdrl import loss as compat
from fastskel.objectives.functional import (
    barlow_twins_loss,
    covariance_penalty,
    cross_correlation,
    mgfd_loss,
    similarity,
    variance_covariance,
    vicreg_loss,
)


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


@pytest.mark.parametrize(
    "shapes",
    [[(2, 4, 3), (2, 4, 3), (3, 4, 3)], [(2, 4, 3), (2, 5, 3), (2, 4, 3)], [(1, 4, 3)] * 3, [(4, 3)] * 3, [(2, 4, 3, 1)] * 3],
    ids=str,
)
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


def direct_covariance(z: Tensor) -> Tensor:
    x = z - z.mean(0)
    c = x.T @ x / (len(x) - 1)
    return (c - c.diagonal().diag()).square().sum() / z.shape[1]


def direct_mgfd(z_t: Tensor, z_s: Tensor, z_i: Tensor, weight: float = 1e-3) -> Tensor:
    """The formula in plain torch, with matrices of features."""
    total = torch.zeros((), dtype=z_t.dtype)
    for z, share in ((z_t, 0.5), (z_s, 0.5), (z_i, 1.0)):
        centre = z[:-1].mean(0)
        near = sum(F.mse_loss(view, z[-1]) + F.mse_loss(view, centre) for view in z[:-1])
        vac = sum(5 * torch.relu(1 - torch.sqrt(view.var(0) + 1e-4)).mean() + direct_covariance(view) for view in z)
        total = total + share * (5 * near + vac)
        for a, b in itertools.combinations(z, 2):
            c = ((a - a.mean(0)) / a.std(0)).T @ ((b - b.mean(0)) / b.std(0)) / len(a)
            off = (c - c.diagonal().diag()).square().sum()
            total = total + share * weight * ((c.diagonal() - 1).square().sum() + 0.005 * off)
    return total


def gradients(function, z: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*z), z)


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [embeddings(*shape, seed=seed).to(dtype).requires_grad_() for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("views", range(2, 9))
@pytest.mark.parametrize("rows", [2, 5, 9, 23], ids="N{}".format)
def test_gradients_equal_those_of_the_direct_formula(views, rows):
    z = leaves((views, rows, 5), (views, rows, 9), (views, rows, 11))
    torch.testing.assert_close(mgfd_loss(*z)[0], direct_mgfd(*z), rtol=1e-12, atol=0)
    for grad, expected in zip(gradients(lambda *z: mgfd_loss(*z)[0], z), gradients(direct_mgfd, z)):
        assert relative_l2([grad], [expected]) <= 1e-12


@pytest.mark.parametrize("rows", [33, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_those_of_the_direct_formula(rows, dtype):
    z = leaves((4, rows, 96), (4, rows, 64), (4, rows, 160), dtype=dtype)
    wide, true = ([part.detach().to(target).requires_grad_() for part in z] for target in (torch.float32, torch.float64))
    value, plain, expected = (
        (function(*part), gradients(function, part))
        for function, part in ((lambda *z: mgfd_loss(*z)[0], z), (direct_mgfd, wide), (direct_mgfd, true))
    )
    assert value[0].dtype == torch.float32
    assert relative_l2([value[0]], [expected[0]]) <= 2 * relative_l2([plain[0]], [expected[0]]) + 1e-6
    for grad, near, target in zip(value[1], plain[1], expected[1]):
        assert grad.dtype == dtype
        rounded = near.to(dtype)
        assert relative_l2([grad], [target]) <= 2 * relative_l2([rounded], [target])


def test_inputs_may_be_strided_and_need_no_gradient():
    z = [embeddings(6, 3, width, seed=width).transpose(0, 1) for width in (4, 5, 7)]
    assert not mgfd_loss(*z)[0].requires_grad
    expected = gradients(direct_mgfd, [part.clone().requires_grad_() for part in z])
    for needed in range(3):
        z[needed].requires_grad_()
        (grad,) = torch.autograd.grad(mgfd_loss(*z)[0], z[needed])
        z[needed].requires_grad_(False)
        assert relative_l2([grad], [expected[needed]]) <= 1e-12
    with torch.no_grad():
        assert not mgfd_loss(*(part.requires_grad_() for part in z))[0].requires_grad


def test_the_graph_may_be_kept_or_not():
    z = leaves((3, 6, 4), (3, 6, 5), (3, 6, 7))
    expected = gradients(direct_mgfd, z)
    total, _ = mgfd_loss(*z)
    for scale in (1.0, 3.0):
        grads = torch.autograd.grad(scale * total, z, retain_graph=True)
        assert all(relative_l2([grad], [scale * target]) <= 1e-12 for grad, target in zip(grads, expected))
    grads = torch.autograd.grad(2.0 * total, z)
    assert all(relative_l2([grad], [2.0 * target]) <= 1e-12 for grad, target in zip(grads, expected))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(total, z)
    total, _ = mgfd_loss(*z)
    with pytest.raises(RuntimeError, match="a decorrelation loss must be differentiated once, got create_graph=True"):
        torch.autograd.grad(total, z, create_graph=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpoint(reentrant):
    z = leaves((3, 6, 4), (3, 6, 5), (3, 6, 7))
    grads = gradients(lambda *z: mgfd_loss(*z)[0], z)
    checkpoint(lambda *z: mgfd_loss(*(2.0 * part / 2.0 for part in z))[0], *z, use_reentrant=reentrant).backward()
    assert all(torch.equal(part.grad, grad) for part, grad in zip(z, grads))


def test_compiles_as_one_graph():
    def call(*z: Tensor) -> Tensor:
        total, terms = mgfd_loss(*z)
        return total + 0.0 * sum(terms.values())

    z = leaves((3, 6, 4), (3, 6, 5), (3, 6, 7))
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*z), call(*z), rtol=1e-12, atol=0)
    for grad, expected in zip(gradients(compiled, z), gradients(call, z)):
        assert relative_l2([grad], [expected]) <= 1e-12


def test_memory_is_that_of_the_gradients():
    z = leaves((4, 32, 512), (4, 32, 512), (4, 32, 1024), dtype=torch.float32)
    size = sum(part.nbytes for part in z)

    def direct(*z: Tensor) -> Tensor:
        return published.total(*(list(part.unbind(0)) for part in z), "aaai")

    def ours(*z: Tensor) -> Tensor:
        return mgfd_loss(*z)[0]

    assert saved_bytes(lambda: ours(*z)) == size
    peak = peak_bytes(lambda: gradients(ours, z))
    # the gradients, and passes over a fraction of them
    assert peak <= 2 * size + 2**21
    assert 20 * peak <= peak_bytes(lambda: gradients(direct, z))


def test_results_repeat():
    z = leaves((4, 40, 96), (4, 40, 33), (4, 40, 160), dtype=torch.float32)
    (first, grads), (second, again) = ((mgfd_loss(*z)[0], gradients(lambda *z: mgfd_loss(*z)[0], z)) for _ in range(2))
    assert torch.equal(first, second) and all(torch.equal(a, b) for a, b in zip(grads, again))


def direct_vicreg(a: Tensor, b: Tensor, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0) -> Tensor:
    hinge = sum(torch.relu(1 - torch.sqrt(z.var(0) + 1e-4)).mean() / 2 for z in (a, b))
    return invariance * F.mse_loss(a, b) + variance * hinge + covariance * (direct_covariance(a) + direct_covariance(b))


def direct_barlow_twins(a: Tensor, b: Tensor, weight: float = 0.0051) -> Tensor:
    c = F.batch_norm(a, None, None, training=True).T @ F.batch_norm(b, None, None, training=True) / len(a)
    return (c.diagonal() - 1).square().sum() + weight * (c - c.diagonal().diag()).square().sum()


@pytest.mark.parametrize("rows, width", [(2, 3), (6, 9), (9, 9), (30, 5)])
@pytest.mark.parametrize(
    "loss, direct, weights",
    [
        (vicreg_loss, direct_vicreg, {}),
        (vicreg_loss, direct_vicreg, dict(invariance_weight=2.0, variance_weight=0.0, covariance_weight=3.0)),
        (barlow_twins_loss, direct_barlow_twins, {}),
        (barlow_twins_loss, direct_barlow_twins, dict(off_diagonal_weight=0.3)),
    ],
    ids=["vicreg", "vicreg-weights", "barlow-twins", "barlow-twins-weight"],
)
def test_losses_of_two_views(loss, direct, weights, rows, width):
    z = leaves((rows, width), (rows, width))
    total, terms = loss(*z, **weights)
    expected = direct(*z, *weights.values())
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    assert not any(term.requires_grad for term in terms.values())
    names = ["invariance", "variance", "covariance"] if loss is vicreg_loss else ["on_diagonal", "off_diagonal"]
    defaults = [25.0, 25.0, 1.0] if loss is vicreg_loss else [1.0, 0.0051]
    scales = [weights.get(f"{name}_weight", value) for name, value in zip(names, defaults)]
    assert list(terms) == names
    weighted = sum(scale * terms[name] for scale, name in zip(scales, names))
    torch.testing.assert_close(weighted, total.detach(), rtol=1e-12, atol=0)
    for grad, target in zip(torch.autograd.grad(total, z), torch.autograd.grad(expected, z)):
        # two samples standardise to 1 and -1 whatever they are: all that is left is the effect of eps
        assert relative_l2([grad], [target]) <= (1e-12 if rows > 2 else 1e-11)
    assert torch.autograd.gradcheck(lambda *z: loss(*z, **weights)[0], z)


def test_covariance_penalty():
    (z,) = leaves((3, 6, 5))
    expected = sum(direct_covariance(view) for view in z) / 3
    torch.testing.assert_close(covariance_penalty(z), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(covariance_penalty(z[0]), direct_covariance(z[0]), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(covariance_penalty, (z,))


def test_barlow_twins_of_a_constant_feature_is_finite():
    a, b = leaves((6, 4), (6, 4))
    a.data[:, 1] = 2.0
    total, _ = barlow_twins_loss(a, b)
    assert total.isfinite() and all(grad.isfinite().all() for grad in torch.autograd.grad(total, (a, b)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [vicreg_loss, barlow_twins_loss])
def test_losses_of_two_views_under_autocast(loss, dtype):
    z = leaves((8, 6), (8, 6), dtype=dtype)
    with torch.autocast("cpu", dtype):
        total, _ = loss(*z)
    assert torch.equal(total, loss(*(part.float() for part in z))[0])
    assert all(grad.dtype == dtype for grad in torch.autograd.grad(total, z))


@pytest.mark.parametrize("loss", [vicreg_loss, barlow_twins_loss])
def test_losses_of_two_views_refuse(loss):
    with pytest.raises(ValueError, match=rf"{loss.__name__}: z_a and z_b must agree in shape, got \(4, 3\) and \(4, 2\)"):
        loss(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=rf"{loss.__name__}: embeddings must be \(N, D\) with N at least 2, got \(1, 3\)"):
        loss(torch.zeros(1, 3), torch.zeros(1, 3))


@pytest.mark.parametrize("shape", [(3,), (0, 4, 3), (2, 2, 4, 3)], ids=str)
def test_covariance_penalty_refuses(shape):
    with pytest.raises(ValueError, match=r"covariance_penalty: z must be \(N, D\) or \(W, N, D\), got \("):
        covariance_penalty(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"covariance_penalty: embeddings must be \(N, D\) with N at least 2, got \(1, 3\)"):
        covariance_penalty(torch.zeros(2, 1, 3))
