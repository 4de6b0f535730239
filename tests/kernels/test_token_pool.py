"""The operator `fastskel::token_pool`: reference, interpreter and GPU against torch.amax, in values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastskel.kernels import token_pool as module
from fastskel.kernels._backend import INTERPRETED
from fastskel.kernels.reference import token_pool as reference
from fastskel.kernels.token_pool import token_pool, token_pool_backward, token_pool_cost, token_pool_forward
from torch import Tensor

TYPES = [torch.float32, torch.bfloat16, torch.float16]
# samples, tokens, columns
SHAPES = [
    (2, 64, 1024), (2, 50, 1024), (3, 1, 16), (4, 17, 32), (3, 34, 64), (2, 49, 256), (2, 63, 1000), (1, 65, 16), (2, 128, 64),
    (1, 192, 64), (1, 1024, 20), (2, 31, 1), (2, 33, 3),
]  # fmt: skip


def random(shape: tuple[int, ...], levels: int, dtype: torch.dtype, device: Any = "cpu") -> Tensor:
    """Normal tokens, or few different integers, so that most columns have ties."""
    generator = torch.Generator().manual_seed(sum(shape))
    if levels:
        return torch.randint(levels, shape, generator=generator).to(device, dtype)
    return torch.randn(shape, generator=generator).to(device, dtype)


def agree(x: Tensor, grad: Tensor | None = None) -> None:
    """The same bits as torch.amax: there is nothing to round but one division."""
    if grad is None:
        grad = random((x.shape[0], x.shape[2]), 0, x.dtype, x.device)
    found = []
    for function in (token_pool, lambda tokens: tokens.amax(1)):
        leaf = x.detach().requires_grad_()
        values = function(leaf)
        found.append((values.detach(), torch.autograd.grad(values, leaf, grad)[0]))
    # the interpreter truncates to bfloat16 where a GPU rounds
    rtol = torch.finfo(x.dtype).eps if INTERPRETED and x.dtype == torch.bfloat16 else 0
    for value, target in zip(*found, strict=True):
        torch.testing.assert_close(value, target, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_amax(shape, levels, device, launches):
    seen = launches(module._token_pool_fwd_kernel, module._token_pool_bwd_kernel)
    agree(random(shape, levels, torch.float32, device))
    assert seen == ["_token_pool_fwd_kernel", "_token_pool_bwd_kernel"]


@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_types(dtype, levels, device):
    agree(random((3, 50, 70), levels, dtype, device))


def test_words_are_those_of_the_reference(device):
    for shape in [(3, 50, 70), (1, 200, 16)]:
        x = random(shape, 3, torch.float32, device)
        values, winners = token_pool_forward(x, True)
        target, words = reference.token_pool_forward(x.cpu(), True)
        assert torch.equal(values.cpu(), target) and torch.equal(winners.cpu(), words)
        assert winners.shape == (shape[0], -(-shape[1] // 32), shape[2]) and winners.dtype == torch.int32
        assert torch.equal(token_pool_forward(x, False)[0], values) and token_pool_forward(x, False)[1] is None


def test_every_element_is_written(device):
    x, grad = random((9, 50, 130), 3, torch.float32, device), random((9, 130), 0, torch.float32, device)
    torch.use_deterministic_algorithms(True)
    try:
        # fills what is allocated with NaN and the largest integer
        values, winners = token_pool_forward(x, True)
        first = token_pool_backward(grad, winners, 50, torch.bfloat16)
        second = token_pool_backward(grad, winners, 50, torch.bfloat16)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(winners.cpu(), reference.token_pool_forward(x.cpu(), True)[1]) and not values.isnan().any()
    assert torch.equal(first, second) and not first.isnan().any() and first.dtype == torch.bfloat16


def test_more_items_than_programs(device, monkeypatch):
    x = random((7, 40, 130), 3, torch.float32, device)
    monkeypatch.setattr(module, "num_processors", lambda device: 1)
    monkeypatch.setattr(module, "OCCUPANCY", 2)
    agree(x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_acts_as_under_amax(bad, device):
    x = random((3, 5, 4), 2, torch.float32, device)
    x[1, 2, 3] = x[0, 1, 0] = x[0, 3, 0] = bad
    x[2, :, 1] = bad
    agree(x)
    agree(x, torch.zeros(3, 4, device=device))
    grad = torch.ones(3, 4, device=device)
    grad[2, 0], grad[1, 1] = bad, bad
    agree(x, grad)
    leaf = x.detach().requires_grad_()
    token_pool(leaf).sum().backward()
    # a column that holds NaN, and no other
    assert torch.equal(leaf.grad.isnan().all(1), x.isnan().any(1)) and torch.equal(leaf.grad.isnan().any(1), x.isnan().any(1))


def test_zeros_of_either_sign_are_ties(device):
    agree(torch.tensor([0.0, -0.0, -1.0, 0.0], device=device).view(1, 4, 1))
    agree(torch.tensor([-0.0, -1.0], device=device).view(1, 2, 1))


@pytest.mark.parametrize(
    "view", [lambda x: x.mT, lambda x: x.transpose(0, 1), lambda x: x[:, ::2, 1::2], lambda x: x[:1].expand(4, -1, -1)],
    ids=["transposed", "swapped", "strided", "expanded"],
)  # fmt: skip
def test_any_strides(view, device):
    x = view(random((4, 6, 5), 4, torch.float32, device))
    assert not x.is_contiguous()
    agree(x, torch.ones(1, 1, device=device).expand(x.shape[0], x.shape[2]))


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0)], ids=str)
def test_nothing_to_do(shape, device):
    agree(torch.zeros(shape, device=device))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_more_samples_than_a_grid_axis_takes() -> None:
    agree(random((70001, 5, 8), 3, torch.float32, "cuda"))


@pytest.mark.interpreted
def test_opcheck_interpreted() -> None:
    check_operators(torch.float32)


@pytest.mark.interpreted
def test_refuses_float64_where_kernels_run() -> None:
    with pytest.raises(ValueError, match="token_pool: x must be float32, bfloat16 or float16, got torch.float64"):
        token_pool(torch.zeros(2, 3, 4).double())


def test_opcheck() -> None:
    check_operators(torch.float64)


def check_operators(dtype: torch.dtype) -> None:
    x = random((3, 35, 5), 3, dtype).requires_grad_()
    torch.library.opcheck(torch.ops.fastskel.token_pool.default, (x, True))
    torch.library.opcheck(torch.ops.fastskel.token_pool.default, (x.detach(), False))
    words = reference.token_pool_forward(x.detach(), True)[1]
    torch.library.opcheck(torch.ops.fastskel.token_pool_backward.default, (x.detach()[:, 0], words, 35, dtype))


@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float64, *TYPES], ids=str)
@pytest.mark.parametrize("shape", [(3, 7, 5), (2, 64, 33), (2, 300, 3)], ids=str)
def test_operator_equals_amax(shape: tuple[int, ...], dtype: torch.dtype, levels: int) -> None:
    agree(random(shape, levels, dtype))


def test_gradients_are_those_of_the_values() -> None:
    assert torch.autograd.gradcheck(token_pool, (random((3, 40, 4), 0, torch.float64).requires_grad_(),))


def test_compiles_as_one_graph() -> None:
    x = random((3, 40, 4), 3, torch.float32).requires_grad_()
    compiled = torch.compile(lambda t: 2 * token_pool(3 * t), backend="aot_eager", fullgraph=True)
    values, target = compiled(x), 2 * (3 * x).amax(1)
    assert torch.equal(values, target)
    assert torch.equal(torch.autograd.grad(values.sum(), x)[0], torch.autograd.grad(target.sum(), x)[0])


def test_a_bit_per_element_is_kept() -> None:
    kept: list[Tensor] = []
    x = random((3, 64, 5), 0, torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        values = token_pool(x)
    assert [t.dtype for t in kept] == [torch.int32] and kept[0].nbytes * 8 == x.numel()
    assert values.requires_grad and not token_pool(x.detach()).requires_grad
    with torch.no_grad():
        assert module._operator(x, False)[1].numel() == 0


def test_there_is_no_second_derivative() -> None:
    x, scale = random((2, 3, 4), 0, torch.float32).requires_grad_(), torch.ones(2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(token_pool(x), x, scale, create_graph=True)
    with pytest.raises(RuntimeError, match="token_pool_backward"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 5), (2, 0, 4), (1, 1025, 1)], ids=str)
def test_shapes_without_tokens_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"token_pool: x must be \(N, S, D\) with S from 1 to 1024, got \("):
        token_pool(torch.zeros(shape))


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="token_pool: x must be float32, bfloat16 or float16, got torch.int64"):
        token_pool(torch.zeros(2, 3, 4).long())
    with pytest.raises(ValueError, match="token_pool_forward: x must be float32, bfloat16 or float16, got torch.float64"):
        token_pool_forward(torch.zeros(2, 3, 4).double(), True)
    words = torch.zeros(2, 1, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="token_pool_backward: grad must be float32, bfloat16 or float16, got torch.float64"):
        token_pool_backward(torch.zeros(2, 4).double(), words, 3, torch.float32)
    with pytest.raises(ValueError, match="token_pool_backward: dtype must be float32, bfloat16 or float16, got torch.float64"):
        token_pool_backward(torch.zeros(2, 4), words, 3, torch.float64)


def test_cost_counts_words() -> None:
    # 2 samples, 33 tokens in 2 words, 5 columns of 4 bytes
    assert token_pool_cost(2, 33, 5).bytes == 2 * 5 * (4 * 34 + 8)
    assert token_pool_cost(2, 33, 5, 2, winners=False).bytes == 2 * 5 * 2 * 34
