"""The dense shift: Triton interpreted and on a GPU, against autograd of its definition in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from fastskel.kernels import dense_shift as operator
from fastskel.kernels._dense_shift_backward import _dense_shift_bwd_blocks_kernel, _dense_shift_bwd_kernel
from fastskel.kernels.dense_shift import (
    dense_shift_backward,
    dense_shift_forward,
)
from fastskel.kernels.reference import dense_shift as reference
from torch import Tensor

EPS = 1e-5
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# every number of tokens and every width once; (64, 1024) and (50, 1024) are the published sizes
SIZES = [(1, 16), (17, 1000), (34, 256), (49, 32), (50, 1024), (63, 64), (64, 1024), (65, 32), (128, 16), (192, 64)]
# with compute and residual type
NARROW = [(64, 1024, BF16, F32), (50, 1024, BF16, F32), (34, 256, BF16, BF16), (65, 32, BF16, F32), (49, 32, F16, F32),
          (63, 64, F16, F16)]  # fmt: skip
# rows of five sequences: those without one lie in between
SLOTS, EXTRA_SLOTS = [2, -1, 0, -1, 1], [-1, 1, 0, -1, -1]
# sums of some hundred terms, each rounded a few times; measured up to 2e-7
TOLERANCE = 16 * torch.finfo(F32).eps


class Case(NamedTuple):
    """Inputs of both passes over (N, S, D)."""

    x: Tensor
    wt1: Tensor
    b1: Tensor
    wt2: Tensor
    b2: Tensor
    gap: int
    weight: Tensor
    bias: Tensor
    dz: Tensor
    d_shifted: Tensor
    into: Tensor
    extra: Tensor
    slots: Tensor | None
    extra_slots: Tensor | None


def make(
    shape: tuple[int, int, int], device: torch.device, compute: torch.dtype = F32, residual: torch.dtype = F32,
    slots: bool = False, gap: int = 3,
) -> Case:  # fmt: skip
    n, s, d = shape
    generator = torch.Generator().manual_seed(s * d)

    def draw(dtype: torch.dtype, *size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

    def rows(values: list[int]) -> tuple[Tensor | None, int]:
        if not slots:
            return None, n
        return torch.tensor(values[:n], dtype=torch.int32, device=device), 1 + max(values[:n])

    (row, count), (extra_row, extra_count) = rows(SLOTS), rows(EXTRA_SLOTS)
    # x is what the compute type holds: the backward pass sees the same numbers
    x = (draw(compute, n, s, d) + 0.5).to(residual)
    mixtures = [draw(compute, *size, scale=size[-1] ** -0.5) for size in ((s, s), (s,), (s, s), (s,))]
    return Case(
        x, *mixtures, gap, draw(F32, d), draw(F32, d), draw(compute, count, s, d), draw(residual, n, s, d),
        draw(residual, n, s, d), draw(compute, extra_count, s, d), row, extra_row,
    )  # fmt: skip


@pytest.fixture
def nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round to bfloat16 as a GPU does: the interpreter cuts digits off, and its sums drift."""
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (str(source), str(target)) != ("fp32", "bf16"):
            return original(data, source, target, rounding)
        return torch.tensor(data).to(BF16).view(torch.int16).numpy().view("uint16")

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def parameters(case: Case) -> tuple[Any, ...]:
    return case.wt1, case.b1, case.wt2, case.b2, case.gap, case.weight, case.bias


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what is allocated with NaN: an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def forward(case: Case, **options: Any) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor, Tensor]:
    """Returns (shifted, z, xb, mean, rstd)."""
    with poisoned():
        z = torch.empty_like(case.dz)
        shifted, xb, mean, rstd = dense_shift_forward(
            case.x, *parameters(case), EPS, z=z, slots=case.slots, **{"want_cast": True, **options}
        )
    return shifted, z, xb, mean, rstd


def backward(case: Case, mean: Tensor, rstd: Tensor, programs: int | None = 2) -> list[Tensor]:
    """Returns gradients of (x, wt1, b1, wt2, b2, weight, bias), the first added to what `into` held."""
    into = case.into.clone()
    with poisoned():
        sums = dense_shift_backward(
            case.dz, case.d_shifted, into, case.x.to(case.wt1.dtype), *parameters(case)[:-1], mean, rstd, case.slots,
            extra=case.extra, extra_slots=case.extra_slots, programs=programs,
        )  # fmt: skip
    return [into, *sums]


def spread(values: Tensor, slots: Tensor | None, count: int) -> Tensor:
    """Undo compaction: rows (rows, S, D) to (N, S, D), zeros where there is none."""
    if slots is None:
        return values
    out = values.new_zeros(count, *values.shape[1:])
    chosen = slots >= 0
    out[chosen] = values[slots[chosen].long()]
    return out


def compact(values: Tensor, slots: Tensor | None) -> Tensor:
    """Rows of (N, ...) by slot."""
    if slots is None:
        return values
    chosen = (slots >= 0).nonzero()[:, 0]
    return values[chosen[slots[chosen].argsort()]]


def exact(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs (shifted, z, mean, rstd) and gradients by autograd of the definition, in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (case.x, *parameters(case)) if isinstance(t, Tensor)]
    x, wt1, b1, wt2, b2, weight, bias = leaves
    shifted, z, mean, rstd = reference.dense_shift(x, wt1, b1, wt2, b2, case.gap, weight, bias, EPS)
    outputs = [shifted, *(compact(t, case.slots) for t in (z, mean, rstd))]
    loss = (shifted * case.d_shifted.double()).sum() + (outputs[1] * case.dz.double()).sum()
    grads = list(torch.autograd.grad(loss, leaves))
    grads[0] = grads[0] + case.into.double() + spread(case.extra, case.extra_slots, len(case.x)).double()
    return [t.detach() for t in outputs], grads


def plain(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """The same by plain torch in the case's types."""
    shifted, z, mean, rstd = reference.dense_shift(case.x, *parameters(case), EPS)
    grads = reference.dense_shift_backward(
        case.dz, case.d_shifted, case.x.to(case.wt1.dtype), *parameters(case)[:-1], mean, rstd
    )
    return [shifted, z, mean, rstd], [case.into + (grads[0] + case.extra.to(grads[0].dtype)), *grads[1:]]


def error(value: Tensor, truth: Tensor) -> float:
    assert value.shape == truth.shape
    assert value.isfinite().all()
    return float((value.double() - truth).norm() / truth.norm().clamp_min(1e-300)) if truth.numel() else 0.0


def backward_kernel(num_tokens: int) -> tuple[Any, str]:
    if num_tokens > 64:
        return _dense_shift_bwd_blocks_kernel, "_dense_shift_bwd_blocks_kernel"
    return _dense_shift_bwd_kernel, "_dense_shift_bwd_kernel"


@pytest.mark.parametrize("s, d", SIZES)
def test_equals_float64(device: torch.device, launches: Callable[..., list[str]], s: int, d: int) -> None:
    slots = s in (1, 49, 63, 65)
    n = 5 if slots else 2
    case = make((n, s, d), device, slots=slots, gap={1: 1, 34: 2}.get(s, 3))
    kernel, name = backward_kernel(s)
    seen = launches(operator._dense_shift_fwd_kernel, kernel)
    shifted, z, xb, mean, rstd = forward(case)
    grads = backward(case, mean, rstd)
    assert seen == ["_dense_shift_fwd_kernel", name]
    assert xb is case.x
    outputs, truth = exact(case)
    for value, expected in zip([shifted, z, mean, rstd, *grads], [*outputs, *truth]):
        assert error(value, expected) < TOLERANCE
    # what no output depends on has no gradient, exactly; tokens that pass are the same bits
    assert not grads[3][:: case.gap].any() and not grads[4][:: case.gap].any()
    assert torch.equal(shifted[:, :: case.gap], case.x[:, :: case.gap])


@pytest.mark.usefixtures("nearest")
@pytest.mark.parametrize("s, d, compute, residual", NARROW)
def test_narrow_types(device: torch.device, s: int, d: int, compute: torch.dtype, residual: torch.dtype) -> None:
    case = make((2, s, d), device, compute, residual)
    shifted, z, xb, mean, rstd = forward(case)
    assert (shifted.dtype, z.dtype, mean.dtype) == (residual, compute, F32)
    assert xb.dtype == compute and torch.equal(xb, case.x.to(compute))
    values = [shifted, z, mean, rstd, *backward(case, mean, rstd)]
    (outputs, truth), (plain_outputs, plain_grads) = exact(case), plain(case)
    for value, expected, other in zip(values, [*outputs, *truth], [*plain_outputs, *plain_grads]):
        # beside errors of the same size as in float32, where those of the type cancel
        assert error(value, expected) <= 2 * error(other, expected) + TOLERANCE


@pytest.mark.parametrize("s", [5, 70])
def test_more_sequences_than_programs(device: torch.device, monkeypatch: pytest.MonkeyPatch, s: int) -> None:
    monkeypatch.setattr(operator, "num_processors", lambda _: 1)
    case = make((5, s, 24), device, slots=True)
    shifted, z, _, mean, rstd = forward(case, want_cast=False)
    by_programs = [backward(case, mean, rstd, programs) for programs in (1, 3, None)]
    outputs, truth = exact(case)
    for value, expected in zip([shifted, z, mean, rstd], outputs):
        assert error(value, expected) < TOLERANCE
    for grads in by_programs:
        for value, expected in zip(grads, truth):
            assert error(value, expected) < TOLERANCE


@pytest.mark.parametrize("s", [20, 66])
def test_deterministic(device: torch.device, s: int) -> None:
    case = make((4, s, 40), device, BF16)
    first, second = (forward(case) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    grads, again = (backward(case, first[3], first[4]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(grads, again))


@pytest.mark.parametrize("s", [20, 66])
def test_made_again_without_shifted(device: torch.device, s: int) -> None:
    case = make((5, s, 70), device, BF16, slots=True)
    shifted, z, xb, mean, rstd = forward(case)
    again = forward(case._replace(x=xb), want_shifted=False, want_cast=False, residual=F32)
    assert again[0] is None and again[2] is None
    assert shifted.dtype == F32
    for value, expected in zip((again[1], again[3], again[4]), (z, mean, rstd)):
        assert torch.equal(value, expected)
    widened = forward(case._replace(x=xb), residual=F32)
    assert torch.equal(widened[0], shifted)
    assert torch.equal(widened[1], z)


def test_statistics_are_centred(device: torch.device) -> None:
    # E[x^2] - E[x]^2 in float32 has no digit left here: 1e4 squared against a variance of 1
    case = make((2, 6, 160), device)
    case = case._replace(x=case.x + 1e4)
    _, z, _, _, rstd = forward(case)
    outputs, _ = exact(case)
    # one rounding of x + mixture at 1e4 is 5e-4 of a deviation
    assert error(z, outputs[1]) < 1e-3
    assert error(rstd, outputs[3]) < 1e-4


def test_strides(device: torch.device) -> None:
    case = make((5, 12, 20), device, slots=True)
    expected = forward(case)
    grads = backward(case, expected[3], expected[4])

    def spaced(t: Tensor) -> Tensor:
        return torch.stack([t, t], -1)[..., 0]

    def block(t: Tensor) -> Tensor:
        larger = t.new_full([size + 5 for size in t.shape], torch.nan)
        larger[tuple(slice(size) for size in t.shape)] = t
        return larger[tuple(slice(size) for size in t.shape)]

    def turned(t: Tensor) -> Tensor:
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    other = case._replace(
        x=turned(case.x), wt1=block(case.wt1), b1=spaced(case.b1), wt2=turned(case.wt2), b2=block(case.b2),
        weight=spaced(case.weight), bias=spaced(case.bias), d_shifted=turned(case.d_shifted), extra=spaced(case.extra),
        slots=spaced(case.slots), extra_slots=spaced(case.extra_slots),
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(forward(other), expected))
    other = other._replace(dz=turned(case.dz))
    assert all(torch.equal(a, b) for a, b in zip(backward(other, spaced(expected[3]), expected[4]), grads))


def test_writes_into_a_larger_buffer(device: torch.device) -> None:
    case = make((2, 9, 16), device)
    buffer = torch.full((6, 9, 16), 7.0, device=device)
    dense_shift_forward(case.x, *parameters(case), EPS, z=buffer[3:5], want_cast=False)
    assert torch.equal(buffer[3:5], forward(case)[1])
    assert (buffer[:3] == 7).all() and (buffer[5:] == 7).all()


def test_empty(device: torch.device) -> None:
    for s in (7, 80):
        case = make((2, s, 16), device)
        none = case._replace(**{name: getattr(case, name)[:0] for name in ("x", "dz", "d_shifted", "into", "extra")})
        shifted, z, _, mean, rstd = forward(none)
        assert shifted.shape == z.shape == (0, s, 16) and mean.shape == rstd.shape == (0, s)
        assert all(not grad.any() for grad in backward(none, mean, rstd))
        # sequences without a single one that is normalised
        absent = torch.full((2,), -1, dtype=torch.int32, device=device)
        bare = case._replace(dz=case.dz[:0], extra=case.extra[:0], slots=absent, extra_slots=absent)
        shifted, _, _, mean, rstd = forward(bare)
        outputs, truth = exact(bare._replace(dz=case.dz * 0, extra=case.extra * 0, slots=None, extra_slots=None))
        assert error(shifted, outputs[0]) < TOLERANCE
        for value, expected in zip(backward(bare, mean, rstd)[:5], truth):
            assert error(value, expected) < TOLERANCE


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_reaches_what_depends_on_it(device: torch.device) -> None:
    case = make((3, 10, 40), device)
    x = case.x.clone()
    x[1, 3, 7], x[2, 2, 39] = torch.nan, torch.inf
    case = case._replace(x=x)
    shifted, z, _, mean, rstd = forward(case)
    others, other_grads = plain(case)
    for value, other in zip([shifted, z, mean.isnan(), rstd], [*others[:2], others[2].isnan(), others[3]]):
        assert torch.equal(value.isnan(), other.isnan())
    assert shifted[:, ::3].isnan().sum() == 1
    for value, other in zip(backward(case, others[2], others[3]), other_grads):
        assert torch.equal(value.isnan(), other.isnan())


@pytest.mark.parametrize("s", [10, 70])
def test_rows_behind_passing_tokens_are_not_read(device: torch.device, s: int) -> None:
    case = make((2, s, 16), device)
    wt2, b2 = case.wt2.clone(), case.b2.clone()
    wt2[::3], b2[::3] = torch.nan, torch.inf
    expected = forward(case)
    other = case._replace(wt2=wt2, b2=b2)
    assert all(torch.equal(a, b) for a, b in zip(forward(other), expected))
    for value, truth in zip(backward(other, *expected[3:]), backward(case, *expected[3:])):
        assert torch.equal(value, truth)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_many_sequences() -> None:
    device = torch.device("cuda")
    case = make((70_000, 3, 16), device)
    shifted, z, _, mean, rstd = forward(case)
    outputs, truth = exact(case)
    for value, expected in zip([shifted, z, mean, rstd], outputs):
        assert error(value, expected) < TOLERANCE
    # sums over a million rows, accumulated in turn by each program
    for value, expected in zip(backward(case, mean, rstd, None), truth):
        assert error(value, expected) < 100 * TOLERANCE
