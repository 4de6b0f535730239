"""The dense spatio-temporal layer as one operator, for `torch.compile` and export where its kernels are Triton's.

A compiler cannot look into a layer whose kernels write to buffers of each other, and need not: it sees one operator forward and
one backward. Run eagerly, the layer is an autograd node instead, which costs less to call. What is dropped is masked, or nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastskel.nn import dst_function, dst_fused
from fastskel.nn.drop_path import NO_DROPS, LayerDrops, masked_drops
from fastskel.nn.dst_function import Kept, LayerSpec, Weights
from fastskel.nn.memory import check_memory
from fastskel.nn.precision import Precision, without_autocast
from fastskel.nn.projections import Attention

__all__ = ["Passes", "dst_layer", "passes"]

_SPEC = (
    "int num_heads, bool merged, str core, ScalarType compute, ScalarType residual, ScalarType wide, float alpha, int gap, "
    "float eps, str memory, str kernels"
)


class Passes(Protocol):
    """The two passes of a layer over (N, S, D), as `dst_function` documents them."""

    def forward(self, x: Tensor, w: Weights, drops: LayerDrops, spec: LayerSpec) -> tuple[Tensor, Tensor, Kept]:
        """Run a layer over (N, S, D)."""
        ...

    def backward(
        self, grad: Tensor, xb: Tensor, kept: Kept, w: Weights, drops: LayerDrops, spec: LayerSpec, need: Collection[str]
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Differentiate a layer over (N, S, D)."""
        ...


def passes(spec: LayerSpec) -> Passes:
    """Choose the module whose `forward` and `backward` are the passes of a layer over (N, S, D)."""
    return dst_fused if spec.kernels == "triton" else dst_function


def dst_layer(x: Tensor, weights: Weights, drops: LayerDrops, spec: LayerSpec, *, prepared: bool = False) -> Tensor:
    """Run a layer over tokens (N, S, D) as one operator; with gradient, unless its weights are prepared already.

    Raises:
        ValueError: If what is dropped is skipped: shapes would depend on the draws.
    """
    masked = all(isinstance(factor, Tensor) for factor in drops.factors)
    if drops is not NO_DROPS and not masked:
        raise ValueError(
            "dst_layer: drops must be masked in a compiled layer, got skipped samples. Configure drop_path_mode='mask'."
        )
    # (N, 1, 6), from which the plan is made again
    scales = torch.cat([f[:, 0] for f in drops.factors], -1)[:, None] if masked else None  # type: ignore[index]
    out: Tensor = _forward_operator(x, list(weights), scales, prepared, *_flat(spec))[0]
    return out


def _flat(spec: LayerSpec) -> tuple[Any, ...]:
    rest = (spec.alpha, spec.gap, spec.eps, spec.memory, spec.kernels)
    # compiled code has no fp8
    return (*spec.attention, *spec.precision[:3], *rest)


def _spec(
    num_heads: int, merged: bool, core: Any, compute: torch.dtype, residual: torch.dtype, wide: torch.dtype,
    alpha: float, gap: int, eps: float, memory: Any, kernels: Any,
) -> LayerSpec:  # fmt: skip
    check_memory(memory)
    precision = Precision(compute=compute, residual=residual, wide=wide)
    return LayerSpec(Attention(num_heads, merged, core), precision, alpha, gap, eps, memory, kernels)


def _drops(scales: Tensor | None) -> LayerDrops:
    return NO_DROPS if scales is None else masked_drops(scales)[0]


def _forward(x: Tensor, weights: list[Tensor], scales: Tensor | None, prepared: bool, *flat: Any) -> list[Tensor]:
    spec, w = _spec(*flat), Weights(*weights)
    with without_autocast(x.device):
        w = w if prepared else dst_function.prepare(w, spec.precision)
        y, xb, kept = passes(spec).forward(x.to(spec.precision.residual), w, _drops(scales), spec)
    if spec.memory == "layer":
        return [y]
    # an operator's output may not be its input
    cast = xb.new_empty(0) if xb.dtype == x.dtype else xb
    return [y, cast, *(xb.new_empty(0) if t is None else t for t in kept)]


def _backward(
    grad: Tensor, x: Tensor, saved: list[Tensor], weights: list[Tensor], scales: Tensor | None, *flat: Any
) -> list[Tensor]:
    spec, parameters, drops = _spec(*flat), Weights(*weights), _drops(scales)
    with without_autocast(x.device):
        prepared = dst_function.prepare(parameters, spec.precision)
        if saved:
            # what is not there has one dimension
            xb = saved[0] if saved[0].dim() > 1 else x.to(spec.precision.compute)
            kept = Kept(*(t if t.dim() > 1 else None for t in saved[1:]))
        else:
            again = spec._replace(memory="lean")
            _, xb, kept = passes(spec).forward(x.to(spec.precision.residual), prepared, drops, again)
        dx, raw = passes(spec).backward(grad, xb, kept, prepared, drops, spec, Weights._fields)
        grads = dst_function.unprepare(raw, parameters, spec.gap)
    out = [dx.to(x.dtype)]
    for name, parameter in parameters._asdict().items():
        g = grads[name]
        # an operator's outputs may not share memory, as two sums that a kernel made at once do
        shared = g is not None and any(g.untyped_storage().data_ptr() == o.untyped_storage().data_ptr() for o in out)
        out.append(torch.zeros_like(parameter) if g is None else g.clone() if shared else g)
    return out


_forward_operator = torch.library.custom_op(
    "fastskel::dst_layer", _forward, mutates_args=(),
    schema=f"(Tensor x, Tensor[] weights, Tensor? scales, bool prepared, {_SPEC}) -> Tensor[]",
)  # fmt: skip
_backward_operator = torch.library.custom_op(
    "fastskel::dst_layer_backward", _backward, mutates_args=(),
    schema=f"(Tensor grad, Tensor x, Tensor[] saved, Tensor[] weights, Tensor? scales, {_SPEC}) -> Tensor[]",
)  # fmt: skip


@_forward_operator.register_fake
def _(x: Tensor, weights: list[Tensor], scales: Tensor | None, prepared: bool, *flat: Any) -> list[Tensor]:
    spec = _spec(*flat)
    n, s, d = x.shape
    compute, residual, heads = spec.precision.compute, spec.precision.residual, spec.attention.num_heads
    y = x.new_empty(n, s, d, dtype=residual)
    if spec.memory == "layer":
        return [y]

    def rows(count: int, width: int) -> Tensor:
        return x.new_empty(count * n, s, width, dtype=compute)

    def deviations(count: int) -> Tensor:
        # the kernels' statistics are float32 whatever the stream is
        return x.new_empty(count * n, s, 1, dtype=torch.float32 if spec.kernels == "triton" else residual)

    sums = {"triton": (3 * n, heads, s), "own": (3 * n * heads, s, s)}.get(spec.attention.core, (0,))
    p = x.new_empty(sums, dtype=torch.float32 if spec.attention.core == "triton" else compute)
    cast = x.new_empty(0, dtype=compute) if compute == x.dtype else rows(1, d)
    q = rows(3, d if spec.attention.merged else 3 * d)
    return [y, cast, rows(1, d), q, p, rows(1, d), deviations(1), rows(1, 2 * d), rows(2, d), deviations(2), rows(2, 2 * d)]


@_backward_operator.register_fake
def _(
    grad: Tensor, x: Tensor, saved: list[Tensor], weights: list[Tensor], scales: Tensor | None, *flat: Any
) -> list[Tensor]:
    return [torch.empty_like(x), *(torch.empty_like(weight) for weight in weights)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, scales, prepared, *flat = inputs
    if prepared:
        raise ValueError("dst_layer: weights must be parameters to be differentiated, got prepared ones. Use torch.no_grad().")
    ctx.flat, ctx.num_saved, ctx.masked = flat, len(output) - 1, scales is not None
    ctx.save_for_backward(x, *output[1:], *weights, *([scales] if scales is not None else []))


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    saved, rest = rest[: ctx.num_saved], rest[ctx.num_saved :]
    weights, scales = (rest[:-1], rest[-1]) if ctx.masked else (rest, None)
    dx, *d_weights = _backward_operator(grads[0], x, saved, weights, scales, *ctx.flat)
    return (dx, d_weights, None, None, *(None for _ in ctx.flat))


_forward_operator.register_autograd(_differentiate, setup_context=_keep)


def _products(x: tuple[int, ...], merged: bool) -> int:
    # D^2 multiplications of each token: two or four projections of three attentions, the convolution, and both MLPs; then
    # scores and sums of three attentions, and the mixture
    n, s, d = x
    return 2 * n * s * ((11 + (6 if merged else 12)) * d * d + (2 * 3 + 2) * s * d)


@register_flop_formula(torch.ops.fastskel.dst_layer)
def _forward_flops(
    x: tuple[int, ...], weights: Any, scales: Any, prepared: bool, num_heads: int, merged: bool, *_: Any, **__: Any
) -> int:
    return _products(x, merged)


@register_flop_formula(torch.ops.fastskel.dst_layer_backward)
def _backward_flops(
    grad: Any, x: tuple[int, ...], saved: list[Any], weights: Any, scales: Any, num_heads: int, merged: bool, *_: Any, **__: Any
) -> int:
    # a layer that kept its input only runs forward again
    return (2 if saved else 3) * _products(x, merged)
