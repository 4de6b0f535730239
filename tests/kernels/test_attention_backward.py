"""The backward kernels of attention: reference, interpreter and GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from fastskel.kernels import attention_backward as module
from fastskel.kernels._attention_tiles import choose_blocks
from fastskel.kernels.attention import attention, attention_forward
from fastskel.kernels.attention_backward import attention_backward
from fastskel.kernels.reference.attention import attention_forward as attention_forward_reference
from fastskel.kernels.reference.attention_backward import attention_backward as attention_backward_reference
from torch import Tensor
from torch.utils import deterministic

LOW = [torch.bfloat16, torch.float16]
Case = tuple[int, int, int, int, bool, bool]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
# N, H, S, C, values shared with keys, masked
CASES: list[Case] = [
    (1, 1, 64, 1024, True, False),
    (1, 1, 50, 1024, True, False),
    (1, 1, 64, 256, False, True),
    (3, 2, 1, 16, False, False),
    (1, 1, 17, 1000, False, True),
    (2, 2, 34, 32, True, True),
    (2, 2, 49, 64, False, False),
    (1, 1, 63, 16, True, True),
    (2, 2, 65, 64, False, True),
    (1, 2, 128, 32, True, False),
    (1, 1, 192, 256, True, True),
    (1, 1, 192, 16, False, False),
]


def name(value: object) -> str:
    if isinstance(value, tuple):
        n, h, s, c, shared, masked = value
        return f"{n}x{h}x{s}x{c}" + "-shared" * shared + "-masked" * masked
    return str(value).removeprefix("torch.")


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill what is allocated with NaN: an element that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    deterministic.fill_uninitialized_memory = before[1]


def make(case: Case, dtype: torch.dtype) -> Inputs:
    """Gradient, queries, keys, values and mask on the CPU, laid out as projections (N, S, H, C) are."""
    n, h, s, c, shared, masked = case
    generator = torch.Generator().manual_seed(0)
    grad, q, k, v = (torch.randn((n, s, h, c), generator=generator).to(dtype).transpose(1, 2) for _ in range(4))
    mask = torch.rand((n, s), generator=generator) < 0.7 if masked else None
    if mask is not None:
        mask[:, 0] = True
    return grad, q, k, None if shared else v, mask


def to(inputs: Inputs, where: torch.device | torch.dtype) -> Inputs:
    *tensors, mask = inputs
    moved = mask if mask is None or isinstance(where, torch.dtype) else mask.to(where)
    return (*(None if t is None else t.to(where) for t in tensors), moved)  # type: ignore[return-value]


def exact_values(inputs: Inputs, scale: float) -> tuple[Tensor | None, ...]:
    """Gradients and output in float64, by autograd from the formula of the forward pass."""
    grad, q, k, v, mask = to(inputs, torch.float64)
    leaves = [t.detach().requires_grad_() for t in (q, k, v) if t is not None]
    out, _ = attention_forward_reference(*leaves[:2], leaves[2] if v is not None else None, mask, scale)
    grads = torch.autograd.grad(out, leaves, grad)
    return grads[0], grads[1], grads[2] if v is not None else None, out.detach()


def run(inputs: Inputs, scale: float, want_out: bool = True) -> tuple[Tensor | None, ...]:
    grad, q, k, v, mask = inputs
    _, lse = attention_forward(q, k, v, mask, scale)
    return attention_backward(grad, q, k, v, lse, mask, scale, want_out=want_out)


def plain(inputs: Inputs, scale: float) -> tuple[Tensor | None, ...]:
    """The same in torch as one writes it, in the type of the inputs."""
    grad, q, k, v, mask = inputs
    leaves = [t.detach().requires_grad_() for t in (q, k, v) if t is not None]
    scores = (leaves[0] @ leaves[1].mT) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
    out = scores.softmax(-1) @ leaves[-1]
    grads = torch.autograd.grad(out, leaves, grad)
    return grads[0], grads[1], grads[2] if v is not None else None, out.detach()


def relative(value: Tensor, exact: Tensor) -> float:
    return float((value.cpu().double() - exact).norm() / exact.norm())


def kernels_of(case: Case) -> list[str]:
    return ["_attention_bwd_kernel", "_attention_bwd_key_kernel"][: 1 + (case[2] > 64)]


@pytest.mark.parametrize("case", CASES, ids=name)
def test_kernels_equal_reference(case: Case, device: torch.device, launches: Callable[..., list[str]]) -> None:
    seen = launches(module._attention_bwd_kernel, module._attention_bwd_key_kernel)
    inputs = make(case, torch.float32)
    scale = 1.0 / math.sqrt(case[3])
    results = run(to(inputs, device), scale)
    assert seen == kernels_of(case)
    # sums of C products, then of S terms, whose gradients of scores are of the size of 1 before the scale
    tolerance = 8 * torch.finfo(torch.float32).eps * math.sqrt(case[3])
    for label, value, exact in zip(("dq", "dk", "dv", "out"), results, exact_values(inputs, scale), strict=True):
        assert (value is None) == (exact is None), label
        if value is not None and exact is not None:
            assert value.transpose(1, 2).is_contiguous(), label
            torch.testing.assert_close(
                value.cpu().double(), exact, rtol=1e-6, atol=tolerance, msg=lambda m, label=label: f"{label}: {m}"
            )


@pytest.mark.parametrize("dtype", LOW, ids=name)
@pytest.mark.parametrize("case", [CASES[i] for i in (1, 4, 5, 6, 8, 11)], ids=name)
def test_kernels_are_as_exact_as_torch(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    inputs = make(case, dtype)
    scale = 1.0 / math.sqrt(case[3])
    results = run(to(inputs, device), scale)
    rows = zip(("dq", "dk", "dv", "out"), results, exact_values(inputs, scale), plain(inputs, scale), strict=True)
    for label, value, exact, torch_value in rows:
        if value is not None and exact is not None and torch_value is not None:
            assert value.dtype == dtype
            bound = max(2 * relative(torch_value, exact), torch.finfo(dtype).eps)
            assert relative(value, exact) < bound, label


@pytest.mark.parametrize("case", [CASES[6], CASES[8]], ids=name)
def test_output_only_where_wanted(case: Case, device: torch.device) -> None:
    inputs = to(make(case, torch.bfloat16), device)
    with_out, without = run(inputs, 0.1), run(inputs, 0.1, want_out=False)
    assert without[3] is None and with_out[3] is not None
    # compiled with and without an output, exponentials may differ by a rounding; so do those of both passes
    for a, b in zip(with_out[:3], without[:3]):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-2)
    expected, _ = attention_forward(*inputs[1:], 0.1)
    torch.testing.assert_close(with_out[3], expected, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-2)


@pytest.mark.parametrize("case", [CASES[5], CASES[6], CASES[8], CASES[9]], ids=name)
def test_is_deterministic(case: Case, device: torch.device) -> None:
    inputs = to(make(case, torch.bfloat16), device)
    for first, second in zip(run(inputs, 0.1), run(inputs, 0.1), strict=True):
        assert first is second is None or torch.equal(first, second)


@pytest.mark.parametrize("case", [CASES[2], CASES[8]], ids=name)
def test_absent_keys_are_not_read_and_get_zeros(case: Case, device: torch.device) -> None:
    grad, q, k, v, mask = to(make(case, torch.float32), device)
    assert v is not None and mask is not None
    spoilt = [t.masked_fill(~mask[:, None, :, None], float("nan")) for t in (k, v)]
    results = run((grad, q, *spoilt, mask), 0.1)
    for value, expected in zip(results, run((grad, q, k, v, mask), 0.1), strict=True):
        assert value is not None and expected is not None and torch.equal(value, expected)
    for value in results[1:3]:
        assert value is not None and not value.transpose(1, 2)[~mask].any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("tokens", [18, 70])
@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["grad", "q", "k", "v"])
def test_nan_goes_where_the_formulas_take_it(which: int, tokens: int, device: torch.device) -> None:
    inputs = make((2, 2, tokens, 2, False, True), torch.float32)
    grad, q, k, v, mask = inputs
    assert v is not None and mask is not None and not mask.all()
    # the first token is present
    (grad, q, k, v)[which][1, 0, 0, 0] = float("nan")
    _, lse = attention_forward_reference(q, k, v, mask, 0.25)
    expected = attention_backward_reference(grad, q, k, v, lse, mask, 0.25, want_out=True)
    results = run(to(inputs, device), 0.25)
    for value, exact in zip(results, expected, strict=True):
        assert value is not None and exact is not None
        torch.testing.assert_close(value.cpu(), exact, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert value[0].isfinite().all() and value[1, 1].isfinite().all()
    assert any(value is not None and value.isnan().any() for value in results)


def test_no_key_at_all(device: torch.device) -> None:
    grad, q, k, v, mask = to(make((2, 1, 70, 16, False, True), torch.float32), device)
    assert mask is not None
    mask[1] = False
    for value in run((grad, q, k, v, mask), 0.25):
        assert value is not None and not value[1].any() and value[0].isfinite().all() and value[0].any()


@pytest.mark.parametrize("tokens", [20, 70])
def test_reads_any_layout(tokens: int, device: torch.device) -> None:
    grad, q, k, v, _ = to(make((2, 2, tokens, 24, False, False), torch.float32), device)
    assert v is not None
    expected = run((grad, q, k, v, None), 0.2)
    # strides that are no multiples of 8; a row of values that is not contiguous; heads before tokens
    odd = torch.nn.functional.pad(q, (1, 0))[..., 1:]
    results = run((grad.contiguous(), odd, k.contiguous(), torch.stack([v, v], -1)[..., 0], None), 0.2)
    # narrower loads may come with another order of sums
    for value, other in zip(results, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


def test_gradient_of_one_number(device: torch.device) -> None:
    # the gradient of a sum is one number expanded: all its strides are 0
    q, k = (t.detach().requires_grad_() for t in to(make(CASES[5], torch.float32), device)[1:3])
    attention(q, k).sum().backward()
    ones = torch.ones((2, 34, 2, 32), device=device).transpose(1, 2)
    expected = run((ones, q.detach(), k.detach(), None, None), 1.0 / math.sqrt(32))
    assert torch.equal(q.grad, expected[0]) and torch.equal(k.grad, expected[1])


def test_empty_batch(device: torch.device, launches: Callable[..., list[str]]) -> None:
    seen = launches(module._attention_bwd_kernel, module._attention_bwd_key_kernel)
    q = torch.zeros((0, 2, 5, 16), device=device)
    dq, dk, dv, out = run((q, q, q, None, None), 1.0)
    assert dq is not None and dk is not None and out is not None
    assert dq.shape == dk.shape == out.shape == q.shape and dv is None
    assert seen == []


@pytest.mark.parametrize("shared", [False, True])
def test_operator_on_device(shared: bool, device: torch.device) -> None:
    grad, q, k, v, mask = to(make((2, 2, 5, 16, shared, True), torch.float32), device)
    _, lse = attention_forward(q, k, v, mask, 0.3)
    torch.library.opcheck(torch.ops.fastskel.attention_backward.default, (grad, q, k, v, lse, mask, 0.3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_large_batch() -> None:
    inputs = make((70_000, 1, 3, 16, False, False), torch.float32)
    results = run(to(inputs, torch.device("cuda")), 0.25)
    for value, exact in zip(results, exact_values(inputs, 0.25), strict=True):
        assert value is not None and exact is not None
        torch.testing.assert_close(value.cpu().double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_reference_equals_autograd(case: Case) -> None:
    grad, q, k, v, mask = inputs = to(make(case, torch.float32), torch.float64)
    _, lse = attention_forward_reference(q, k, v, mask, 0.2)
    results = attention_backward_reference(grad, q, k, v, lse, mask, 0.2, want_out=True)
    for value, exact in zip(results, exact_values(inputs, 0.2), strict=True):
        assert (value is None) == (exact is None)
        if value is not None:
            torch.testing.assert_close(value, exact)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=name)
@pytest.mark.parametrize("backward", [False, True])
def test_tiles_hold_every_size(backward: bool, dtype: torch.dtype) -> None:
    for tokens in range(1, 193):
        for head_dim in (1, 16, 17, 64, 1000, 1024):
            tile, whole, width, _, _ = choose_blocks(tokens, head_dim, dtype, backward)
            assert 16 <= tile <= whole and whole >= tokens and whole % tile == 0
            assert width >= 16 and (tile == whole) == (tokens <= 64)
