"""The operator `fastskel::attention` and its forward kernel: reference, interpreter and GPU; what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from fastskel.kernels import attention as module
from fastskel.kernels.attention import attention, attention_cost, attention_forward
from fastskel.kernels.reference.attention import attention_forward as attention_forward_reference
from torch import Tensor
from torch.utils import deterministic
from torch.utils.flop_counter import FlopCounterMode

Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
LOW = [torch.bfloat16, torch.float16]
# N, H, S, C, values shared with keys, masked
CASES = [
    (2, 1, 64, 1024, True, False),
    (2, 1, 50, 1024, True, False),
    (3, 2, 1, 16, False, True),
    (1, 1, 17, 1000, False, False),
    (2, 2, 34, 32, True, True),
    (2, 2, 49, 64, False, False),
    (1, 1, 63, 256, True, True),
    (2, 2, 65, 64, False, True),
    (1, 2, 128, 16, True, False),
    (1, 1, 192, 256, False, True),
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


def make(case: tuple[int, int, int, int, bool, bool], dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Inputs on the CPU, laid out as projections (N, S, H, C) are."""
    n, h, s, c, shared, masked = case
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn((n, s, h, c), generator=generator).to(dtype).transpose(1, 2) for _ in range(3))
    mask = torch.rand((n, s), generator=generator) < 0.7 if masked else None
    if mask is not None:
        mask[:, 0] = True
    return q, k, None if shared else v, mask


def to(inputs: Inputs, where: torch.device | torch.dtype) -> Inputs:
    q, k, v, mask = inputs
    moved = mask if mask is None or isinstance(where, torch.dtype) else mask.to(where)
    return q.to(where), k.to(where), None if v is None else v.to(where), moved


def plain(q: Tensor, k: Tensor, v: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    """Attention as one writes it in torch, in the type of its inputs."""
    scores = (q @ k.mT) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
    return scores.softmax(-1) @ (k if v is None else v)


def relative(value: Tensor, exact: Tensor) -> float:
    return float((value.cpu().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("case", CASES, ids=name)
def test_kernel_equals_reference(
    case: tuple[int, int, int, int, bool, bool], device: torch.device, launches: Callable[..., list[str]]
) -> None:
    seen = launches(module._attention_fwd_kernel)
    inputs = make(case, torch.float32)
    scale = 1.7 / math.sqrt(case[3])
    out, lse = attention_forward(*to(inputs, device), scale)
    exact, exact_lse = attention_forward_reference(*to(inputs, torch.float64), scale)
    assert seen == ["_attention_fwd_kernel"]
    assert out.dtype == torch.float32 and lse.dtype == torch.float32
    # scores of size 2 are sums of C products, and their errors become relative ones of the output, itself a mean of S
    tolerance = 4 * torch.finfo(torch.float32).eps * math.sqrt(case[3])
    torch.testing.assert_close(out.cpu().double(), exact, rtol=0, atol=tolerance)
    torch.testing.assert_close(lse.cpu().double(), exact_lse, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("dtype", LOW, ids=name)
@pytest.mark.parametrize("case", [CASES[i] for i in (0, 1, 2, 4, 7, 9)], ids=name)
def test_kernel_is_as_exact_as_torch(
    case: tuple[int, int, int, int, bool, bool], dtype: torch.dtype, device: torch.device
) -> None:
    inputs = make(case, dtype)
    scale = 1.0 / math.sqrt(case[3])
    out, _ = attention_forward(*to(inputs, device), scale)
    exact, _ = attention_forward_reference(*to(inputs, torch.float64), scale)
    assert out.dtype == dtype
    # rounding the output alone is half a unit in its last place
    bound = max(2 * relative(plain(*inputs, scale), exact), torch.finfo(dtype).eps)
    assert relative(out, exact) < bound


def test_output_needs_no_copy(device: torch.device) -> None:
    out = attention(*to(make(CASES[5], torch.float32), device)[:3])
    assert out.shape == (2, 2, 49, 64)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("layout", ["packed", "odd", "heads-first", "sequence-first", "strided", "expanded", "distant"])
def test_reads_any_layout(layout: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    n, h, s, c = 2, 2, 20, 24
    generator = torch.Generator().manual_seed(1)
    packed = torch.randn((n, s, 3, h, c), generator=generator).to(device)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "packed": lambda t: t,
        # rows of 25 elements, from the second on: no wide loads
        "odd": lambda t: F.pad(t, (1, 0))[..., 1:],
        "heads-first": lambda t: t.contiguous(),
        "sequence-first": lambda t: t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        "strided": lambda t: torch.stack([t, t], -1)[..., 0],
        "expanded": lambda t: t[:1, :1].expand(t.shape),
        "distant": lambda t: t,
    }
    if layout == "distant":
        monkeypatch.setattr("fastskel.kernels._attention_tiles.MAX_ROW_STRIDE", 10)
    inputs = [changes[layout](t) for t in (q, k, v)]
    expected = attention(*(t.clone(memory_format=torch.contiguous_format) for t in inputs))
    # narrower loads may come with another order of sums
    torch.testing.assert_close(attention(*inputs), expected, rtol=1e-5, atol=1e-6)


def test_empty_batch(device: torch.device, launches: Callable[..., list[str]]) -> None:
    seen = launches(module._attention_fwd_kernel)
    q = torch.zeros((0, 2, 5, 16), device=device, requires_grad=True)
    out = attention(q, q)
    out.sum().backward()
    assert out.shape == q.shape and q.grad is not None and q.grad.shape == q.shape
    assert seen == []


def test_is_deterministic(device: torch.device) -> None:
    inputs = to(make(CASES[7], torch.bfloat16), device)
    first, second = (attention_forward(*inputs, 0.1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_absent_keys_are_not_read(device: torch.device) -> None:
    q, k, v, mask = to(make(CASES[7], torch.float32), device)
    assert v is not None and mask is not None
    spoilt = [t.masked_fill(~mask[:, None, :, None], float("nan")) for t in (k, v)]
    expected = attention(q, k, v, key_mask=mask)
    assert torch.equal(attention(q, *spoilt, key_mask=mask), expected)


def test_no_key_at_all(device: torch.device) -> None:
    q, k, v, mask = to(make((3, 2, 10, 16, False, True), torch.float32), device)
    assert mask is not None
    mask[1] = False
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = attention(*leaves, key_mask=mask)
    out.sum().backward()
    for value in (out, *(t.grad for t in leaves)):
        assert value is not None
        assert torch.equal(value[1], torch.zeros_like(value[1]))
        assert value[0].isfinite().all() and value[0].any()
    assert (attention_forward(q, k, v, mask, 1.0)[1][1] == float("-inf")).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_what_is_not_finite_propagates(which: str, value: float, device: torch.device) -> None:
    # heads of one feature: its product with a key is as large as it is, with the key's sign
    q, k, v, _ = make((2, 2, 18, 1, False, False), torch.float32)
    assert v is not None
    {"q": q, "k": k, "v": v}[which][1, 0, 3, 0] = value
    expected = plain(q, k, v, None, 1.0)
    out = attention(q.to(device), k.to(device), v.to(device), scale=1.0).cpu()
    assert not expected[1, 0].isfinite().all() and expected[0].isfinite().all()
    torch.testing.assert_close(out, expected, equal_nan=True)


def test_operator_on_device(device: torch.device) -> None:
    q, k, v, mask = to(make((2, 2, 5, 16, False, True), torch.float32), device)
    for values, present in ((v, mask), (None, None)):
        leaves = [None if t is None else t.detach().requires_grad_() for t in (q, k, values)]
        torch.library.opcheck(torch.ops.fastskel.attention.default, (*leaves, present, 0.3))


def test_refuses_float64_where_triton_runs(device: torch.device) -> None:
    q = torch.zeros((1, 1, 2, 16), dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="attention: q must be float32, bfloat16 or float16, got torch.float64"):
        attention(q, q)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_large_batch() -> None:
    inputs = make((70_000, 1, 3, 16, False, False), torch.float32)
    out, _ = attention_forward(*to(inputs, torch.device("cuda")), 0.25)
    torch.testing.assert_close(out.cpu(), attention_forward_reference(*inputs, 0.25)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_reference_equals_torch(case: tuple[int, int, int, int, bool, bool]) -> None:
    q, k, v, mask = to(make(case, torch.float32), torch.float64)
    out, lse = attention_forward_reference(q, k, v, mask, 0.3)
    attend = None if mask is None else mask[:, None, None, :]
    expected = F.scaled_dot_product_attention(q, k, k if v is None else v, attend, scale=0.3)
    torch.testing.assert_close(out, expected)
    scores = q @ k.mT * 0.3
    torch.testing.assert_close(lse, (scores if attend is None else scores.where(attend, -1e9)).logsumexp(-1))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients(shared: bool, masked: bool) -> None:
    q, k, v, mask = to(make((3, 2, 4, 3, shared, masked), torch.float32), torch.float64)
    if mask is not None:
        mask[1] = False
    leaves = [t.detach().requires_grad_() for t in (q, k, v) if t is not None]
    assert torch.autograd.gradcheck(lambda *t: attention(*t, key_mask=mask, scale=0.7), leaves)


def test_queries_as_keys() -> None:
    q = torch.randn((2, 1, 5, 4), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: attention(t, t), q)


def test_statistics_have_no_gradient() -> None:
    q = torch.randn((1, 1, 3, 4), requires_grad=True)
    out, lse = torch.ops.fastskel.attention(q, q, None, None, 0.5)
    assert out.requires_grad and not lse.requires_grad


def test_second_derivatives_are_refused() -> None:
    q = torch.randn((1, 1, 3, 4), requires_grad=True)
    (grad,) = torch.autograd.grad(attention(q, q).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        grad.sum().backward()


@pytest.mark.parametrize("shared", [False, True])
def test_opcheck(shared: bool) -> None:
    q, k, v, mask = make((2, 2, 5, 3, shared, True), torch.float32)
    leaves = [None if t is None else t.detach().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(torch.ops.fastskel.attention.default, (*leaves, mask, 0.3))
    _, lse = attention_forward_reference(q, k, v, mask, 0.3)
    arguments = (torch.ones_like(q), q, k, v, lse, mask, 0.3)
    torch.library.opcheck(torch.ops.fastskel.attention_backward.default, arguments)


def test_compiles_as_one_graph() -> None:
    q, k, v, mask = make((2, 2, 5, 8, False, True), torch.float32)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 2, k, v, key_mask=mask).transpose(1, 2).reshape(2, 5, 16).square().sum()

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        function(*leaves).backward()
        results.append([t.grad for t in leaves])
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager)


def test_types_follow_arguments_under_autocast() -> None:
    inputs = make((2, 2, 5, 64, False, False), torch.float32)
    expected = attention(*inputs[:3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(*inputs[:3]), expected)


@pytest.mark.parametrize("shared", [False, True])
def test_flops_are_counted(shared: bool) -> None:
    q, k, v, _ = make((2, 3, 5, 16, shared, False), torch.float32)
    leaf = q.detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = attention(leaf, k, v)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 2 * 2 * (2 * 3) * 5 * 5 * 16
    assert counter.get_total_flops() - forward == 5 * 2 * (2 * 3) * 5 * 5 * 16


def test_cost() -> None:
    size, rows = 2 * 3 * 5 * 16, 2 * 3 * 5
    shape = (2, 3, 5, 16)
    assert attention_cost(shape, torch.float32) == (4 * size * 5, 4 * 4 * size + 4 * rows)
    assert attention_cost(shape, torch.bfloat16, shared=True, masked=True) == (
        4 * size * 5,
        2 * 3 * size + 4 * rows + 10,
    )
    costs = attention_cost(shape, torch.bfloat16, shared=True, backward=True, want_out=True)
    assert costs == (12 * size * 5, 2 * 6 * size + 4 * rows)
    assert attention_cost(shape, torch.bfloat16, backward=True) == (10 * size * 5, 2 * 7 * size + 4 * rows)


Q = torch.zeros(2, 3, 4, 16)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=torch.zeros(2, 4, 16)), r"q must be \(N, H, S, C\) .* got \(2, 4, 16\)"),
        (dict(q=torch.zeros(1, 1, 193, 16)), r"q must be .* S in \[1, 192\] .* got \(1, 1, 193, 16\)"),
        (dict(q=torch.zeros(1, 1, 0, 16)), r"q must be .* got \(1, 1, 0, 16\)"),
        (dict(q=torch.zeros(1, 0, 4, 16)), r"q must be .* H at least 1.* got \(1, 0, 4, 16\)"),
        (dict(q=torch.zeros(1, 1, 4, 1025)), r"q must be .* C in \[1, 1024\], got \(1, 1, 4, 1025\)"),
        (dict(q=Q.long()), "q must be float32, bfloat16 or float16, got torch.int64"),
        (dict(k=Q[:, :, :3]), r"k must be torch.float32 \(2, 3, 4, 16\) .* got torch.float32 \(2, 3, 3, 16\)"),
        (dict(k=Q.bfloat16()), "k must be torch.float32 .* got torch.bfloat16"),
        (dict(k=Q.to("meta")), "k must be .* on cpu as q, got .* on meta"),
        (dict(v=Q[:1]), r"v must be torch.float32 \(2, 3, 4, 16\) .* got torch.float32 \(1, 3, 4, 16\)"),
        (dict(key_mask=torch.ones(2, 3, dtype=torch.bool)), r"key_mask must be bool \(2, 4\) on cpu, got torch.bool"),
        (dict(key_mask=torch.ones(2, 4)), r"key_mask must be bool \(2, 4\) on cpu, got torch.float32 \(2, 4\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"attention: {message}"):
        attention(**{**dict(q=Q, k=Q, v=Q), **change})
