"""Layer normalisation behind a residual addition: reference by autograd, Triton kernels against the reference in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastskel.kernels._backend import INTERPRETED
from fastskel.kernels._layer_norm_backward import _layer_norm_backward_kernel
from fastskel.kernels.layer_norm import (
    Term,
    TermGrad,
    _layer_norm_forward_kernel,
    layer_norm_backward,
    layer_norm_backward_cost,
    layer_norm_forward,
    layer_norm_forward_cost,
)
from fastskel.kernels.reference import layer_norm as reference
from torch import Tensor

EPS = 1e-5
HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
USES = ["attentions", "one", "two", "masked", "embedding"]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill what is not initialised with NaN: an element that nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(generator: torch.Generator, *shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(shape, generator=generator, dtype=DOUBLE).to(device, dtype)


def slots_of(generator: torch.Generator, size: int, rows: int, device: torch.device | str) -> Tensor:
    """Name places 0 to rows - 1 for `rows` samples chosen at random, in an order that is not theirs."""
    slots = torch.full((size,), -1, dtype=torch.int32)
    slots[torch.randperm(size, generator=generator)[:rows]] = torch.arange(rows, dtype=torch.int32)
    return slots.to(device)


def make_terms(
    use: str, shape: tuple[int, int, int], types: tuple[torch.dtype, torch.dtype], device: torch.device | str = "cpu"
) -> tuple[list[Term], float | None]:
    """Make the terms of one use in the layer, in compute and residual types; all outs are slices of one buffer."""
    size, tokens, width = shape
    compute, residual = types
    g = torch.Generator().manual_seed(size * 10007 + tokens * 101 + width)
    live = size if use == "masked" else size - (size + 1) // 3

    def stream() -> Tensor:
        return 2.0 + 3.0 * draw(g, size, tokens, width, dtype=residual, device=device)

    def branch(rows: int) -> Tensor:
        return draw(g, rows, tokens, width, dtype=compute, device=device)

    def named(rows: int) -> Tensor:
        return slots_of(g, size, rows, device)

    def affine() -> dict[str, Tensor]:
        return dict(
            weight=draw(g, width, dtype=residual, device=device), bias=draw(g, width, dtype=residual, device=device)
        )

    outs = torch.empty(2 * live, tokens, width, dtype=compute, device=device).split([live, live])
    if use == "attentions":
        slots = named(live)
        conv = Term(stream(), outs[0], slots, branch(live).relu(), slots, **affine())
        return [conv, Term(conv.base, outs[1], named(live), **affine())], None
    if use == "embedding":
        # in the compute type before and after; all samples
        out = torch.empty(size, tokens, width, dtype=compute, device=device)
        return [Term(branch(size), out, **affine(), relu=True)], None
    if use == "one":
        fewer = max(min(live, 1), live - 1)
        return [Term(stream(), outs[0], named(live), branch(fewer), named(fewer), scale=1.25)], None
    if use == "two":
        return [Term(stream(), out, named(live), branch(live), named(live), scale=0.5) for out in outs], 0.25
    factors = [1.5 * torch.rand(size, generator=g).round().to(device) for _ in outs]
    return [Term(stream(), out, None, branch(size), None, 1.0, factor) for out, factor in zip(outs, factors)], 0.25


def make_grads(use: str, terms: Sequence[Term], statistics: Sequence[tuple[Tensor, Tensor]]) -> list[TermGrad]:
    """Ask for the gradients of terms in the way in which the layer does."""
    g = torch.Generator().manual_seed(7)
    x = terms[0].base
    carry = draw(g, *x.shape, dtype=x.dtype, device=x.device)
    grads = []
    for t, (mean, rstd) in zip(terms, statistics):
        grad = draw(g, *t.out.shape, dtype=t.out.dtype, device=x.device)
        d_branch = None if t.branch is None else torch.empty_like(t.branch)
        keep = dict(branch_slots=t.branch_slots, scale=t.scale, factor=t.factor, d_branch=d_branch)
        grads.append(TermGrad(grad, rstd, carry, t.out_slots, carry=carry, **keep))
        if use == "embedding":
            into = torch.empty_like(x)
            again = dict(mean=mean, base=t.base, weight=t.weight, bias=t.bias, relu=True)
            return [TermGrad(grad, rstd, into, **again)]
        if use == "attentions":
            grads[-1] = grads[-1]._replace(mean=mean, base=t.base, branch=t.branch, weight=t.weight)
        else:
            grads[-1] = grads[-1]._replace(xhat=t.out)
        if len(terms) == 2 and use != "attentions":
            grads[-1] = grads[-1]._replace(into=torch.empty_like(x), carry_scale=0.25, branch_sees_carry=True)
    if use == "attentions":
        grads = [grads[0]._replace(relu_mask=True), grads[1]._replace(carry=None)]
    return grads


def copied(terms: Sequence[Any], dtype: torch.dtype | None = None) -> list[Any]:
    """Copy terms, what they share included; floating point in another type if one is given."""
    copies: dict[int, Tensor] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in copies:
            copies[id(value)] = value.to(dtype, copy=True) if dtype and value.is_floating_point() else value.clone()
        return copies[id(value)]

    return [type(t)(*map(copy, t)) for t in terms]


def written(grads: Sequence[TermGrad], affine: Sequence[tuple[Tensor, Tensor] | None]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for number, (t, pair) in enumerate(zip(grads, affine)):
        found[f"into {number}"] = t.into
        if t.d_branch is not None:
            found[f"d_branch {number}"] = t.d_branch
        if pair is not None:
            found[f"d_weight {number}"], found[f"d_bias {number}"] = pair
    return found


def check_close(ours: dict[str, Tensor], plain: dict[str, Tensor], true: dict[str, Tensor]) -> None:
    """At most twice the error of plain torch in the same types; below, rounding of fp32 sums in another order."""
    assert ours.keys() == plain.keys() == true.keys()
    for name, value in ours.items():
        assert value.dtype == plain[name].dtype, name
        if not value.numel():
            continue
        error, bound = ((t[name].double() - true[name]).abs().max().item() for t in (ours, plain))
        floor = 16 * torch.finfo(SINGLE).eps * max(true[name].abs().max().item(), 1.0)
        # Triton's interpreter truncates to bf16 where GPUs round to nearest: twice the error
        bound *= 4.0 if INTERPRETED and value.dtype == BRAIN else 2.0
        assert error <= bound + floor, f"{name}: error {error}, bound {bound} + {floor}"


def run_forward(terms: Sequence[Term], scale: float | None, module: Any, **options: Any) -> dict[str, Tensor]:
    statistics, total = module.layer_norm_forward(terms, EPS, total_scale=scale, **options)
    found = {f"out {number}": t.out for number, t in enumerate(terms)}
    for number, (mean, rstd) in enumerate(statistics):
        found.update({f"mean {number}": mean, f"rstd {number}": rstd})
    return found if total is None else {**found, "total": total}


class ours:
    layer_norm_forward = staticmethod(layer_norm_forward)
    layer_norm_backward = staticmethod(layer_norm_backward)


def run_backward(grads: Sequence[TermGrad], module: Any, **options: Any) -> dict[str, Tensor]:
    return written(grads, module.layer_norm_backward(grads, **options))


def check_use(use: str, shape: tuple[int, int, int], types: tuple[torch.dtype, torch.dtype], device: torch.device) -> None:
    terms, scale = make_terms(use, shape, types, device)
    found = run_forward(terms, scale, ours)
    check_close(found, run_forward(copied(terms), scale, reference), run_forward(copied(terms, DOUBLE), scale, reference))
    grads = make_grads(use, terms, [(found[f"mean {number}"], found[f"rstd {number}"]) for number in range(len(terms))])
    parts = copied(grads), copied(grads), copied(grads, DOUBLE)
    check_close(*(run_backward(part, module) for part, module in zip(parts, (ours, reference, reference))))


# every number of tokens and every width that a kernel meets, the layer's own with each of its uses
CASES = [
    *(pytest.param(use, (2, tokens, 1024), (BRAIN, SINGLE)) for use in USES for tokens in (50, 64)[use in ("one", "masked"):]),
    *(pytest.param(use, (3, 1, 16), (SINGLE, SINGLE)) for use in USES),
    pytest.param("attentions", (5, 17, 32), (HALF, SINGLE)),
    pytest.param("one", (4, 34, 64), (SINGLE, SINGLE)),
    pytest.param("two", (3, 49, 256), (BRAIN, BRAIN)),
    pytest.param("attentions", (2, 63, 1000), (BRAIN, SINGLE)),
    pytest.param("masked", (3, 65, 16), (HALF, HALF)),
    pytest.param("two", (3, 128, 64), (SINGLE, SINGLE)),
    pytest.param("attentions", (3, 192, 32), (BRAIN, BRAIN)),
    pytest.param("attentions", (2, 3, 3000), (BRAIN, SINGLE)),
    pytest.param("two", (7, 2, 1), (SINGLE, SINGLE)),
]


def name_of(value: object) -> str:
    if isinstance(value, tuple):
        return "-".join(str(part).removeprefix("torch.") for part in value)
    return str(value)


@pytest.mark.parametrize("use, shape, types", CASES, ids=name_of)
def test_uses(
    use: str, shape: tuple[int, int, int], types: tuple[torch.dtype, torch.dtype], device: torch.device,
    launches: Callable[..., list[str]],
) -> None:  # fmt: skip
    seen = launches(_layer_norm_forward_kernel, _layer_norm_backward_kernel)
    check_use(use, shape, types, device)
    # both terms in one launch
    assert seen == ["_layer_norm_forward_kernel", "_layer_norm_backward_kernel"]


@pytest.mark.parametrize("programs", [1, 2, 1000])
def test_programs_share_rows(programs: int, device: torch.device) -> None:
    terms, _ = make_terms("attentions", (5, 6, 48), (SINGLE, SINGLE), device)
    found = run_forward(terms, 0.5, ours, programs=programs)
    for name, value in run_forward(copied(terms), 0.5, ours).items():
        assert torch.equal(value, found[name]), name
    grads = make_grads("attentions", terms, [(found[f"mean {n}"], found[f"rstd {n}"]) for n in range(2)])
    parts = copied(grads), copied(grads), copied(grads, DOUBLE)
    sums = run_backward(parts[0], ours, programs=programs)
    check_close(sums, run_backward(parts[1], reference), run_backward(parts[2], reference))
    again = run_backward(copied(grads), ours, programs=programs)
    assert all(torch.equal(value, again[name]) for name, value in sums.items())


def test_views_of_one_buffer_are_one_buffer(device: torch.device) -> None:
    terms, _ = make_terms("attentions", (5, 6, 48), (SINGLE, SINGLE), device)
    found = run_forward(terms, None, ours)
    grads = make_grads("attentions", terms, [(found[f"mean {n}"], found[f"rstd {n}"]) for n in range(2)])
    others = copied(grads)
    others[1] = others[1]._replace(into=others[0].into[:])
    others[0] = others[0]._replace(carry=others[0].into[:])
    expected = run_backward(grads, ours)
    assert all(torch.equal(value, expected[name]) for name, value in run_backward(others, ours).items())


@pytest.mark.parametrize("use", USES)
def test_strides(use: str, device: torch.device) -> None:
    terms, scale = make_terms(use, (4, 5, 24), (SINGLE, SINGLE), device)

    def strided(t: Tensor | None) -> Tensor | None:
        return t if t is None else torch.stack([t, t], dim=-1)[..., 0]

    names = ("base", "branch", "branch_slots", "out_slots", "factor", "weight", "bias")
    others = [t._replace(**{name: strided(getattr(t, name)) for name in names}) for t in copied(terms)]
    found, expected = run_forward(others, scale, ours), run_forward(terms, scale, ours)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    grads = make_grads(use, terms, [(found[f"mean {n}"], found[f"rstd {n}"]) for n in range(len(terms))])
    names = ("grad", "rstd", "xhat", "mean", "base", "branch", "branch_slots", "out_slots", "factor", "weight")
    others = [t._replace(**{name: strided(getattr(t, name)) for name in names}) for t in copied(grads)]
    found, expected = run_backward(others, ours), run_backward(grads, ours)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("use", USES)
def test_no_samples(use: str, device: torch.device) -> None:
    terms, scale = make_terms(use, (0, 4, 16), (BRAIN, SINGLE), device)
    found = run_forward(terms, scale, ours)
    assert found["out 0"].shape == (0, 4, 16)
    grads = make_grads(use, terms, [(found[f"mean {n}"], found[f"rstd {n}"]) for n in range(len(terms))])
    sums = run_backward(grads, ours)
    assert all(not value.any() for value in sums.values())


@pytest.mark.parametrize("use", ["attentions", "two"])
def test_all_left_out(use: str, device: torch.device) -> None:
    terms, _ = make_terms(use, (3, 4, 16), (SINGLE, SINGLE), device)
    nobody = torch.full((3,), -1, dtype=torch.int32, device=device)
    nothing = dict(out_slots=nobody, branch_slots=nobody)
    terms = [t._replace(out=t.out[:0], branch=None if t.branch is None else t.branch[:0], **nothing) for t in terms]
    found = run_forward(terms, 0.5, ours)
    assert torch.equal(found["total"], 0.5 * (terms[0].base + terms[1].base))
    grads = make_grads(use, terms, [(found[f"mean {n}"], found[f"rstd {n}"]) for n in range(2)])
    scale, carry = grads[0].carry_scale, grads[0].carry
    assert carry is not None
    expected = scale * carry.clone()
    sums = run_backward(grads, ours)
    assert torch.equal(grads[0].into, expected) and torch.equal(grads[1].into, expected)
    assert all(not value.any() for name, value in sums.items() if "weight" in name or "bias" in name)


def test_rows_that_nobody_names_are_left_alone(device: torch.device) -> None:
    [term], _ = make_terms("one", (4, 3, 16), (SINGLE, SINGLE), device)
    assert term.out_slots is not None
    # three places of which the second is free
    term = term._replace(out_slots=torch.where(term.out_slots == 1, -1, term.out_slots), out=torch.full_like(term.out, 7.0))
    layer_norm_forward([term], EPS)
    assert term.out[1].eq(7.0).all() and not term.out[0].eq(7.0).any() and not term.out[2].eq(7.0).any()


def test_factor_of_a_sample_left_out_does_not_matter(device: torch.device) -> None:
    [term], _ = make_terms("one", (4, 3, 16), (SINGLE, SINGLE), device)
    assert term.branch_slots is not None and term.out_slots is not None
    factor = torch.where(term.branch_slots < 0, float("inf"), 1.0)
    found = run_forward([term._replace(factor=factor)], 1.0, ours)
    assert found["total"].isfinite().all() and found["out 0"].isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_more_samples_than_other_grids_take() -> None:
    check_use("two", (70_000, 2, 16), (BRAIN, SINGLE), torch.device("cuda"))


@pytest.mark.parametrize("use", USES)
def test_reference_equals_autograd(use: str) -> None:
    terms, scale = make_terms(use, (5, 4, 12), (DOUBLE, DOUBLE))
    found = run_forward(terms, scale, reference)
    grads = make_grads(use, terms, [(found[f"mean {n}"], found[f"rstd {n}"]) for n in range(len(terms))])
    carries = [None if g.carry is None else g.carry_scale * g.carry.clone() for g in grads]
    actual = run_backward(grads, reference)

    leaves: dict[int, Tensor] = {}
    total, expected = torch.zeros((), dtype=DOUBLE), {}
    for number, (t, g, carry) in enumerate(zip(terms, grads, carries)):
        base, branch, weight, bias = (
            None if v is None else leaves.setdefault(id(v), v.detach().requires_grad_())
            for v in (t.base, t.branch, t.weight, t.bias)
        )
        r = base
        if branch is not None:
            # a ReLU of what is positive already, and of the zeros that another one left
            shown = branch.relu() if g.relu_mask else branch
            samples = range(len(r)) if t.branch_slots is None else (t.branch_slots >= 0).nonzero()[:, 0].tolist()
            rows = list(r)
            for i in samples:
                place = i if t.branch_slots is None else int(t.branch_slots[i])
                rows[i] = rows[i] + t.scale * (1.0 if t.factor is None else t.factor[i]) * shown[place]
            r = torch.stack(rows)
        order = torch.arange(len(r)) if t.out_slots is None else t.out_slots.argsort()[-len(t.out) :]
        out = F.layer_norm(r[order], r.shape[-1:], weight, bias, EPS)
        out = out.relu() if t.relu else out
        torch.testing.assert_close(found[f"out {number}"], out.detach())
        total = total + (out * g.grad).sum() + (0.0 if carry is None else ((r if g.branch_sees_carry else base) * carry).sum())
        named = dict(into=base, d_branch=branch, d_weight=weight, d_bias=bias)
        expected.update({f"{name} {number}": leaf for name, leaf in named.items()})
    total.backward()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name].grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("use", ["two", "masked"])
def test_reference_sums_terms(use: str) -> None:
    terms, _ = make_terms(use, (3, 4, 12), (DOUBLE, DOUBLE))
    parts = [run_forward([t], 1.0, reference)["total"] for t in terms]
    torch.testing.assert_close(run_forward(terms, 0.25, reference)["total"], 0.25 * (parts[0] + parts[1]))


def test_costs() -> None:
    terms, scale = make_terms("one", (6, 4, 32), (BRAIN, SINGLE))
    row, slots, single = 4 * 32, 2 * 4 * 6, 4 * 4
    # four samples are normalised, three have a branch
    assert layer_norm_forward_cost(terms) == (0, 4 * row * (4 + 2) + 3 * row * 2 + slots + 2 * 4 * single)
    assert layer_norm_forward_cost(terms, total_scale=1.0).bytes == 6 * row * 8 + 4 * row * 2 + 3 * row * 2 + slots + 8 * single
    found = run_forward(terms, scale, reference)
    grads = make_grads("one", terms, [(found["mean 0"], found["rstd 0"])])
    # in place: gradient and rows saved, what is carried read and written
    assert layer_norm_backward_cost(grads) == (0, 4 * row * (2 + 2 + 4 + 4) + 3 * row * 2 + slots + 4 * single)
    affine, _ = make_terms("attentions", (6, 4, 32), (BRAIN, SINGLE))
    statistics = [(torch.empty(4, 4), torch.empty(4, 4))] * 2
    # two gradients, one base, the convolution and its gradient; weight and the two sums
    compact, vectors = 4 * row * (2 + 2 + 4 + 2 + 2 + 4 + 4), 2 * 3 * 4 * 32
    expected = compact + 4 * single * 4 + vectors + 3 * 4 * 6
    assert layer_norm_backward_cost(make_grads("attentions", affine, statistics)).bytes == expected


def test_host_functions_refuse() -> None:
    terms, _ = make_terms("two", (3, 4, 8), (SINGLE, SINGLE))
    with pytest.raises(ValueError, match=r"layer_norm_forward: out must be contiguous, got strides \(1, 2, 8\)"):
        layer_norm_forward([terms[0]._replace(out=torch.empty(8, 4, 2).mT.transpose(0, 1).mT)], EPS)
    first, second = make_grads("two", terms, [(torch.empty(2, 4), torch.empty(2, 4))] * 2)
    strided = first.into.mT.contiguous().mT
    with pytest.raises(ValueError, match="layer_norm_backward: into must be contiguous"):
        layer_norm_backward([first._replace(into=strided)])
    with pytest.raises(ValueError, match="layer_norm_backward: d_branch must be contiguous"):
        layer_norm_backward([first._replace(d_branch=strided)])
    with pytest.raises(ValueError, match="layer_norm_backward: the second carry must be None where both terms name one into"):
        layer_norm_backward([first, second._replace(into=first.into)])
    with pytest.raises(ValueError, match="layer_norm_backward: into must not be the other term's carry"):
        layer_norm_backward([first._replace(into=first.carry), second])
