"""Every operator returns what its fake promises, strides too, whatever the strides of its arguments: a compiler relies on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fastskel.kernels.attention import attention
from fastskel.kernels.decorrelation import decorrelation
from fastskel.kernels.dense_shift import dense_shift
from fastskel.kernels.layer_norm import layer_norm
from fastskel.kernels.mlp import mlp
from fastskel.kernels.standardize import standardize
from fastskel.kernels.token_pool import token_pool
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


def described(tensor: Tensor) -> tuple[Any, ...]:
    """Shape, type and the strides that mean something."""
    strides = [stride for stride, size in zip(tensor.stride(), tensor.shape) if size > 1] if tensor.numel() else []
    return tuple(tensor.shape), tensor.dtype, strides


class Compared(TorchDispatchMode):
    """Run every operator of this library twice: really, and on its fake."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace == "fastskel":
            self.seen.add(function._schema.name.removeprefix("fastskel::"))
            mode = FakeTensorMode()
            arguments = tree_map(lambda value: mode.from_tensor(value.detach()) if isinstance(value, Tensor) else value, args)
            with mode:
                promised = function(*arguments, **(kwargs or {}))
            for real, fake in zip(tree_leaves(result), tree_leaves(promised), strict=True):
                assert described(real) == described(fake), function
        return result


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32)


def layouts(*shape: int) -> Iterator[Tensor]:
    """Tensors of a shape that are no plain block of memory: last axes exchanged, all turned round, parts, repetitions."""
    yield numbers(*shape[:-2], shape[-1], shape[-2]).mT
    yield numbers(*shape[::-1]).permute(*range(len(shape) - 1, -1, -1))
    yield numbers(*(2 * size for size in shape))[tuple(slice(None, None, 2) for _ in shape)]
    yield numbers(*shape[:-1], 1).expand(shape)
    yield numbers(1, *shape[1:]).expand(shape)


def leaf(*shape: int) -> Tensor:
    return numbers(*shape).requires_grad_()


OTHER, HEADS = leaf(2, 5, 6), leaf(2, 3, 5, 4)
VECTOR, UP, DOWN = leaf(12)[::2], leaf(6, 7).mT, leaf(7, 6).mT
MIX, SHIFT = leaf(5, 5).mT, leaf(10)[::2]
MASK = torch.ones(5, 2, dtype=torch.bool).mT
FACTOR = torch.ones(4)[::2]

# what the operators are called, and shape of the argument whose strides change
CASES: dict[str, tuple[str, tuple[int, ...], Callable[[Tensor], Any]]] = {
    "queries": ("attention", (2, 3, 5, 4), lambda x: attention(x, HEADS)),
    "keys": ("attention", (2, 3, 5, 4), lambda x: attention(HEADS, x, HEADS, key_mask=MASK)),
    "values": ("attention", (2, 3, 5, 4), lambda x: attention(HEADS, HEADS, x)),
    "layer-norm": ("layer_norm", (2, 5, 6), lambda x: layer_norm(x, weight=VECTOR, bias=VECTOR)),
    "layer-norm-branch": ("layer_norm", (2, 5, 6), lambda x: layer_norm(OTHER, x, factor=FACTOR)),
    "layer-norm-base": ("layer_norm", (2, 5, 6), lambda x: layer_norm(x, OTHER, weight=VECTOR)),
    "token-pool": ("token_pool", (2, 5, 6), token_pool),
    "standardize": ("standardize", (2, 5, 6), standardize),
    "decorrelation": ("decorrelation", (3, 5, 6), lambda x: decorrelation(x)),
    "decorrelation-wide": ("decorrelation", (3, 5, 12), lambda x: decorrelation(x)),
    "mlp": ("mlp", (2, 5, 6), lambda x: mlp(x, UP, leaf(7), DOWN, VECTOR)),
    "mlp-residual": ("mlp", (2, 5, 6), lambda x: mlp(OTHER, UP, None, DOWN, None, residual=x, factor=FACTOR)),
    "dense-shift": ("dense_shift", (2, 5, 6), lambda x: dense_shift(x, MIX, SHIFT, MIX, SHIFT, 2, VECTOR, VECTOR)),
}
GRADIENTS = {"decorrelation": "decorrelation_gradient"}


def tensors(result: Any) -> list[Tensor]:
    return [value for value in tree_leaves(result) if isinstance(value, Tensor) and value.requires_grad]


def check(case: str) -> None:
    name, shape, call = CASES[case]
    with Compared() as compared:
        for value in layouts(*shape):
            out = tensors(call(value.detach().requires_grad_()))
            # gradients come in any layout too: that of a sum is one number, repeated
            torch.autograd.backward(out, [torch.ones(()).expand_as(o) for o in out], retain_graph=True)
            if out[0].dim() > 1:
                for gradient in layouts(*out[0].shape):
                    torch.autograd.backward(out[:1], [gradient.to(out[0].dtype)], retain_graph=True)
    assert compared.seen == {name, GRADIENTS.get(name, f"{name}_backward")}


@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_have_the_promised_strides(case: str) -> None:
    check(case)


@pytest.mark.interpreted
@pytest.mark.parametrize("case", CASES)
def test_results_of_kernels_have_the_promised_strides(case: str) -> None:
    check(case)
