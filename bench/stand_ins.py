"""Functions that stand in for the fused kernels where tensors have no values: they allocate what those would, and count costs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from fastskel.bench.counting import Counter
from fastskel.kernels._backend import Cost
from fastskel.kernels.attention import attention_cost
from fastskel.kernels.dense_shift import dense_shift_backward_cost, dense_shift_forward_cost
from fastskel.kernels.layer_norm import Term, TermGrad, layer_norm_backward_cost, layer_norm_forward_cost
from fastskel.kernels.mlp_hidden import Hidden, mlp_hidden_cost
from fastskel.kernels.mlp_residual import Branch, mlp_residual_cost
from fastskel.kernels.token_pool import token_pool_cost
from torch import Tensor

__all__ = ["kernels_stood_in"]


class _StandIns:
    """Named as what they stand in for; arguments and results are those of the kernels' host functions."""

    def __init__(self, counter: Counter) -> None:
        self.counter = counter

    def _add(self, name: str, cost: Cost) -> None:
        self.counter.add(f"kernel {name}", *cost)

    def layer_norm_forward(self, terms: Sequence[Term], eps: float, *, total_scale: float | None = None) -> Any:
        self._add(f"layer_norm, {len(terms)} terms", layer_norm_forward_cost(terms, total_scale=total_scale))
        statistics = [tuple(t.out.new_empty(t.out.shape[:2], dtype=torch.float32) for _ in range(2)) for t in terms]
        return statistics, None if total_scale is None else torch.empty_like(terms[0].base)

    def layer_norm_backward(self, terms: Sequence[TermGrad]) -> Any:
        self._add(f"layer_norm backward, {len(terms)} terms", layer_norm_backward_cost(terms))
        return [None if t.weight is None else (_sums(t.grad), _sums(t.grad)) for t in terms]

    def mlp_hidden(self, terms: Sequence[Hidden], activation: str, *, num_samples: int, **_: Any) -> Tensor:
        up = terms[0].up
        s, f = up.shape[1:]
        self._add(f"mlp_hidden, {len(terms)} terms", _hidden_cost(terms, num_samples, backward=False))
        return up.new_empty(num_samples, s, f)

    def mlp_hidden_backward(self, grad: Tensor, terms: Sequence[Hidden], activation: str, **_: Any) -> Any:
        self._add(f"mlp_hidden backward, {len(terms)} terms", _hidden_cost(terms, len(grad), backward=True))
        return torch.empty_like(grad), _sums(grad)

    def mlp_residual(self, base: Tensor, branches: Sequence[Branch], *, out: Tensor) -> Tensor:
        self._add("mlp_residual", _residual_cost(base, branches, backward=False))
        return out

    def mlp_residual_backward(self, grad: Tensor, branches: Sequence[Branch]) -> Any:
        self._add("mlp_residual backward", _residual_cost(grad, branches, backward=True))
        return [_sums(b.value) for b in branches]

    def dense_shift_forward(
        self, x: Tensor, wt1: Tensor, *_: Any, z: Tensor, want_cast: bool, want_shifted: bool = True, **__: Any
    ) -> Any:
        residual, compute = x.element_size(), wt1.element_size()
        cast = compute if want_cast and x.dtype != wt1.dtype else 0
        cost = dense_shift_forward_cost(*x.shape, len(z), compute, residual, residual if want_shifted else 0, cast)
        self._add("dense_shift", cost)
        mean, rstd = (x.new_empty(z.shape[:2], dtype=torch.float32) for _ in range(2))
        xb = (x.new_empty(x.shape, dtype=wt1.dtype) if cast else x) if want_cast else None
        return torch.empty_like(x) if want_shifted else None, xb, mean, rstd

    def dense_shift_backward(
        self, dz: Tensor, d_shifted: Tensor, into: Tensor, xb: Tensor, wt1: Tensor, *_: Any, extra: Tensor, **__: Any
    ) -> Any:
        sizes = (len(dz), xb.element_size(), into.element_size(), len(extra))
        self._add("dense_shift backward", dense_shift_backward_cost(*xb.shape, *sizes))
        s, d = xb.shape[1:]
        return tuple(xb.new_empty(shape, dtype=torch.float32) for shape in ((s, s), (s,), (s, s), (s,), (d,), (d,)))

    def attention_forward(self, q: Tensor, k: Tensor, v: Tensor | None, key_mask: None, scale: float) -> Any:
        self._add("attention", attention_cost(tuple(q.shape), q.dtype, shared=v is None))
        return q.new_empty(_tokens_first(q)).transpose(1, 2), q.new_empty(q.shape[:3], dtype=torch.float32)

    def attention_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor | None, *_: Any, want_out: bool = False
    ) -> Any:
        cost = attention_cost(tuple(q.shape), q.dtype, shared=v is None, backward=True, want_out=want_out)
        self._add("attention backward", cost)
        wanted = (True, True, v is not None, want_out)
        return tuple(q.new_empty(_tokens_first(q)).transpose(1, 2) if each else None for each in wanted)

    def token_max(self, tokens: Tensor, kernels: str = "auto") -> Tensor:
        return _Pool.apply(tokens, self)  # type: ignore[no-any-return]


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, owner: _StandIns) -> Tensor:
        ctx.shape, ctx.owner = tokens.shape, owner
        owner._add("token_pool", token_pool_cost(*tokens.shape, tokens.element_size()))
        return tokens.new_empty(tokens.shape[0], tokens.shape[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.owner._add("token_pool backward", token_pool_cost(*ctx.shape, grad.element_size()))
        return grad.new_empty(ctx.shape), None


def _sums(rows: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[-1], dtype=torch.float32)


def _tokens_first(q: Tensor) -> tuple[int, ...]:
    n, h, s, c = q.shape
    return n, s, h, c


def _hidden_cost(terms: Sequence[Hidden], num_samples: int, *, backward: bool) -> Cost:
    s, f = terms[0].up.shape[1:]
    counts = [len(t.up) * s for t in terms]
    return mlp_hidden_cost(counts, num_samples * s, f, terms[0].up.element_size(), backward)


def _residual_cost(rows: Tensor, branches: Sequence[Branch], *, backward: bool) -> Cost:
    n, s, d = rows.shape
    counts = [len(b.value) * s for b in branches]
    return mlp_residual_cost(counts, n * s, d, branches[0].value.element_size(), rows.element_size(), backward)


@contextlib.contextmanager
def kernels_stood_in(counter: Counter) -> Iterator[None]:
    """Let a model of tokens (N, S, D) choose the fused kernels, and count them instead of running them."""
    own = _StandIns(counter)
    names = {
        "fastskel.nn.dst_fused": (
            "layer_norm_forward", "layer_norm_backward", "mlp_hidden", "mlp_hidden_backward", "mlp_residual",
            "mlp_residual_backward", "dense_shift_forward", "dense_shift_backward",
        ),
        "fastskel.nn.attention": ("attention_forward", "attention_backward"),
        "fastskel.nn.embed": ("layer_norm_forward", "layer_norm_backward"),
        "fastskel.models.backbone": ("token_max",),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for module, functions in names.items():
            for function in functions:
                stack.enter_context(mock.patch(f"{module}.{function}", getattr(own, function)))
        for module in ("dst_layer", "embed"):
            stack.enter_context(mock.patch(f"fastskel.nn.{module}.choose_kernels", return_value="triton"))
        yield
