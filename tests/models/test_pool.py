"""The maximum over tokens against torch's, in values, gradients and what autograd keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastskel.nn.pool import token_max

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def with_gradient(function, tokens: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    tokens = tokens.detach().requires_grad_()
    values = function(tokens)
    return values.detach(), torch.autograd.grad(values, tokens, grad)[0]


def agree(tokens: Tensor, grad: Tensor | None = None) -> None:
    if grad is None:
        grad = torch.randn(tokens.shape[0], tokens.shape[2], generator=torch.Generator().manual_seed(1)).to(
            tokens.dtype
        )
    actual, expected = (with_gradient(f, tokens, grad) for f in (token_max, lambda x: x.amax(1)))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def random(*shape: int, dtype: torch.dtype = torch.float64, levels: int = 0) -> Tensor:
    """Normal tokens, or few different integers, so that most columns have ties."""
    generator = torch.Generator().manual_seed(0)
    if levels:
        return torch.randint(levels, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [(3, 7, 5), (1, 1, 1), (4, 1, 3), (2, 64, 33), (0, 4, 3), (2, 4, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("levels", [0, 1, 3])
def test_equals_amax(shape, dtype, levels):
    agree(random(*shape, dtype=dtype, levels=levels))


@pytest.mark.parametrize("tokens", [255, 256, 257, 512, 700])
def test_as_many_ties_as_a_byte_cannot_count(tokens):
    agree(torch.ones(2, tokens, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, 2),
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2, 1::2],
        lambda x: x[:1].expand(4, -1, -1),
    ],
    ids=["transposed", "swapped", "strided", "expanded"],
)
def test_any_strides(view):
    base = random(4, 6, 5, levels=4)
    assert not view(base).is_contiguous()
    agree(view(base))


def test_gradients_are_those_of_the_values():
    assert torch.autograd.gradcheck(token_max, (random(3, 5, 4).requires_grad_(),))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_acts_as_under_amax(bad):
    tokens = random(3, 5, 4, levels=2)
    tokens[1, 2, 3] = tokens[0, 1, 0] = tokens[0, 3, 0] = bad
    tokens[2, :, 1] = bad
    agree(tokens)
    agree(tokens, torch.zeros(3, 4, dtype=torch.float64))
    values, gradient = with_gradient(token_max, tokens, torch.ones(3, 4, dtype=torch.float64))
    # a column that holds NaN, and no other
    assert torch.equal(gradient.isnan().all(1), values.isnan()) and torch.equal(gradient.isnan().any(1), values.isnan())
    grad = torch.ones(3, 4, dtype=torch.float64)
    grad[2, 0], grad[1, 1] = bad, bad
    agree(tokens, grad)


def test_a_byte_per_element_is_kept():
    kept: list[Tensor] = []
    tokens = random(3, 7, 5).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        values = token_max(tokens * 1)
        scaled = len(kept)
        values.sum().backward()
    assert scaled == 1 and kept[0].dtype == torch.bool
    assert kept[0].untyped_storage().nbytes() == 3 * 7 * 5
    torch.testing.assert_close(tokens.grad.sum(1), torch.ones(3, 5, dtype=torch.float64))


def test_nothing_is_kept_without_gradients():
    kept: list[Tensor] = []
    tokens = random(3, 7, 5)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        values = token_max(tokens)
        with torch.no_grad():
            token_max(tokens.clone().requires_grad_())
    assert kept == [] and not values.requires_grad


def test_there_is_no_second_derivative():
    tokens = random(2, 3, 4).requires_grad_()
    scale = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(token_max(tokens), tokens, scale, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 5), (2, 0, 4)], ids=str)
def test_shapes_without_tokens_are_refused(shape):
    with pytest.raises(ValueError, match=r"token_max: tokens must be \(N, S, D\) with S at least 1, got \("):
        token_max(torch.zeros(shape))
