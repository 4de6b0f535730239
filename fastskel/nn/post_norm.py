"""Post-norm transformer layer with ReLU, as torch's `TransformerEncoderLayer` without dropout, as one autograd node.

    r = x + att(x),  x1 = LN1(r),  y = LN2(x1 + W2 relu(W1 x1 + b1) + b2)

Projections of one wide head are merged; the affine part of LN1 is folded into W1. Parameters have torch's names, because the
reference's checkpoints do. Source: specification of USDRL, section 1.10.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastskel.nn.attention import AttentionBackend, attend, attend_backward, choose_backend, merges
from fastskel.nn.gemm import linear, linear_grads, matmul, relu_grad
from fastskel.nn.kernel_choice import KernelChoice, choose_kernels
from fastskel.nn.memory import MemoryMode, check_memory, keeps_converted, memory_in_use
from fastskel.nn.norm import fold, normalise, normalise_grad, unfold
from fastskel.nn.plain import check_plain
from fastskel.nn.precision import Precision, computing, precision_of, without_autocast
from fastskel.nn.projections import Attention, MergeCache, MergingLayer, Projections, projections_of

__all__ = ["FrozenPostNormLayer", "PostNormLayer", "PostNormStack"]


class _Weights(NamedTuple):
    first: Tensor
    first_bias: Tensor
    last: Tensor
    last_bias: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor
    norm1: Tensor
    norm1_bias: Tensor
    norm2: Tensor
    norm2_bias: Tensor


class _Spec(NamedTuple):
    attention: Attention
    precision: Precision
    eps: float
    memory: MemoryMode


class _Kept(NamedTuple):
    q: Tensor | None
    p: Tensor | None
    norm1: Tensor | None
    rstd1: Tensor | None
    hidden: Tensor | None
    norm2: Tensor | None
    rstd2: Tensor | None


class PostNormLayer(MergingLayer):
    """One layer over tokens (N, S, D), D hidden features."""

    # measured (bench/results): six D^3 products against 6 D^2 saved per token
    least_tokens = 1.25

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.linear1 = nn.Linear(width, width)
        self.linear2 = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.merged = MergeCache()

    def attention(self) -> nn.MultiheadAttention:
        """Return the attention that (N, S, D) go through."""
        return self.self_attn

    def _weights(self, projections: Projections) -> _Weights:
        check_plain("PostNormLayer", nn.Linear, self.linear1, self.linear2)
        check_plain("PostNormLayer", nn.LayerNorm, self.norm1, self.norm2)
        check_plain("PostNormLayer", nn.MultiheadAttention, self.self_attn)
        if self.norm1.eps != self.norm2.eps:
            raise ValueError(f"PostNormLayer: norms must share one eps, got {self.norm1.eps} and {self.norm2.eps}. Set both.")
        return _Weights(
            *projections,
            self.linear1.weight, self.linear1.bias, self.linear2.weight, self.linear2.bias,
            self.norm1.weight, self.norm1.bias, self.norm2.weight, self.norm2.bias,
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        *,
        memory: MemoryMode = "lean",
        backend: AttentionBackend = "auto",
        kernels: KernelChoice = "auto",
    ) -> Tensor:
        """Transform tokens.

        Args:
            x: Tokens, (N, S, D).
            memory: How much is kept for the backward pass: `"saved"` most, `"layer"` the input only. Nothing where gradients are
                off.
            backend: Who computes attention.
            kernels: Who computes what lies between the matrix products: here attention's core only.
        Returns:
            Tokens, (N, S, D); under autocast in float32.
        Raises:
            ValueError: On tokens of another width or type, an unknown memory mode, or a backend or kernels that are
                unknown or not there.
        """
        attn = self.self_attn
        _check_tokens(x, attn.embed_dim)
        check_memory(memory)
        precision = precision_of(x, attn.in_proj_weight, "PostNormLayer")
        chosen = choose_kernels(kernels, x.device, precision.compute)
        if torch.compiler.is_compiling():
            # a compiler traces into torch's operators
            chosen = "torch"
        attention = choose_backend(
            backend, attn.embed_dim, attn.num_heads, x.device, precision.compute, self.repays(x), chosen
        )
        weights = self._weights(self.merged.get(attn, attention, precision.compute))
        spec = _Spec(attention, precision, self.norm1.eps, memory_in_use(memory))
        out: Tensor = _Layer.apply(x, spec, *weights)  # type: ignore[no-untyped-call]
        return out

    def freeze(self, dtype: torch.dtype, backend: AttentionBackend) -> FrozenPostNormLayer:
        """Prepare the layer over tokens (N, S, D) for inference in a type, apart from its parameters."""
        return FrozenPostNormLayer(self, dtype, backend)


class FrozenPostNormLayer(nn.Module):
    """A layer over tokens (N, S, D) whose weights are merged, folded and converted once; without gradient.

    Args:
        layer: The layer; what happens to it afterwards has no influence.
        dtype: Type of matrix products.
        backend: Who computes attention.
    """

    @torch.no_grad()
    def __init__(self, layer: PostNormLayer, dtype: torch.dtype, backend: AttentionBackend) -> None:
        super().__init__()
        attn = layer.self_attn
        self.width = attn.embed_dim
        self.backend, self.num_heads = backend, attn.num_heads
        attention = Attention(attn.num_heads, merges(backend, self.width, attn.num_heads), "own")
        self.spec = _Spec(attention, Precision.of(dtype), layer.norm1.eps, "layer")
        weights = layer._weights(projections_of(attn, attention))
        for name, value in _prepare(weights, self.spec.precision)._asdict().items():
            # a copy, also where nothing was converted: the layer may go on training
            self.register_buffer(name, value.detach().clone(), persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, *, kernels: KernelChoice = "auto", **_: Any) -> Tensor:
        """Transform tokens (N, S, D), in the residual type; how was decided when the layer was frozen."""
        _check_tokens(x, self.width)
        weights = _Weights(**{name: getattr(self, name) for name in _Weights._fields})
        with without_autocast(x.device):
            # chosen where it runs, which need not be where it was made
            compute = self.spec.precision.compute
            chosen = choose_kernels(kernels, x.device, compute)
            if torch.compiler.is_compiling():
                chosen = "torch"
            attention = choose_backend(self.backend, self.width, self.num_heads, x.device, compute, kernels=chosen)
            return _forward(x.to(self.spec.precision.residual), weights, self.spec._replace(attention=attention))[0]


def _check_tokens(x: Tensor, width: int) -> None:
    if x.dim() != 3 or x.shape[1] < 1 or x.shape[2] != width:
        raise ValueError(
            f"PostNormLayer: x must be (N, S, {width}), got {tuple(x.shape)}. Build the layer for such tokens."
        )


class PostNormStack(nn.Module):
    """Layers over tokens (N, S, D), one after another."""

    def __init__(self, layers: Iterable[PostNormLayer | FrozenPostNormLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self,
        x: Tensor,
        *,
        memory: MemoryMode = "lean",
        backend: AttentionBackend = "auto",
        kernels: KernelChoice = "auto",
    ) -> Tensor:
        """Transform tokens (N, S, D) by all layers; arguments as the layer's."""
        for layer in self.layers:
            x = layer(x, memory=memory, backend=backend, kernels=kernels)
        return x

    def freeze(self, dtype: torch.dtype, backend: AttentionBackend) -> PostNormStack:
        """Prepare all layers over tokens (N, S, D) for inference in a type, apart from their parameters."""
        layers = cast("Iterable[PostNormLayer]", self.layers)
        return PostNormStack(layer.freeze(dtype, backend) for layer in layers)


def _prepare(w: _Weights, precision: Precision) -> _Weights:
    to, residual = precision.compute, precision.residual
    up, up_bias = fold(w.up, w.up_bias, w.norm1, w.norm1_bias, precision)
    cast = {name: t.to(residual if name.startswith("norm") else to) for name, t in w._asdict().items()}
    cast.update(up=up, up_bias=up_bias)
    return _Weights(**cast)


def _forward(x: Tensor, w: _Weights, spec: _Spec) -> tuple[Tensor, Tensor, _Kept]:
    compute = spec.precision.compute
    xb = x.to(compute)
    attended, q, p = attend(xb, Projections(*w[:4]), spec.attention, spec.precision, keep=spec.memory != "layer")
    first, rstd1 = normalise(x + attended, spec.eps, spec.precision.residual)
    norm1 = first.to(compute)
    hidden = linear(norm1, w.up, w.up_bias, "relu")
    r = torch.addcmul(w.norm1_bias, first, w.norm1).add_(linear(hidden, w.down, w.down_bias).to(x.dtype))
    second, rstd2 = normalise(r, spec.eps, spec.precision.residual)
    y = torch.addcmul(w.norm2_bias, second, w.norm2)
    # kept wide: the gradient of norm2's weight is a product with it, and nothing else rounds there
    return y, xb, _Kept(q, p, norm1, rstd1, hidden, second, rstd2)


def _backward(
    grad: Tensor, xb: Tensor, kept: _Kept, w: _Weights, spec: _Spec, need: dict[str, bool]
) -> tuple[Tensor, dict[str, Tensor | None]]:
    compute, residual, wide = spec.precision[:3]
    _, p, norm1, rstd1, hidden, norm2, rstd2 = kept
    assert norm1 is not None and rstd1 is not None and hidden is not None and norm2 is not None and rstd2 is not None
    got: dict[str, Tensor | None] = {}
    grad = grad.to(residual)
    got["norm2"] = (grad * norm2).sum((0, 1), dtype=wide)
    got["norm2_bias"] = grad.sum((0, 1), dtype=wide)
    dr = normalise_grad(grad * w.norm2, norm2, rstd2, residual)
    g = dr.to(compute)
    got["down"], got["down_bias"] = linear_grads(g, hidden, wide, need["down"] or need["down_bias"])
    dh = relu_grad(matmul(g, w.down), hidden)
    wanted = any(need[name] for name in ("up", "up_bias", "norm1", "norm1_bias"))
    got["up"], got["up_bias"] = linear_grads(dh, norm1, wide, wanted)
    # through the residual; what comes through the folded linear is added when that is unfolded
    got["norm1"] = (dr * norm1).sum((0, 1), dtype=wide)
    got["norm1_bias"] = dr.sum((0, 1), dtype=wide)
    d1 = (dr * w.norm1).add_(matmul(dh, w.up).to(residual))
    dx = normalise_grad(d1, norm1, rstd1, residual)
    del dr, dh, d1, g
    dz, projections = attend_backward(
        [dx.to(compute)], xb, kept.q, p, Projections(*w[:4]), spec.attention, spec.precision,
        (need["first"] or need["first_bias"], need["last"] or need["last_bias"]),
    )  # fmt: skip
    got.update(zip(("first", "first_bias", "last", "last_bias"), projections, strict=True))
    return dx.add_(dz.to(residual)), got


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: _Spec, *parameters: Tensor) -> Tensor:
        with computing(spec.precision, x.device):
            prepared = _prepare(_Weights(*parameters), spec.precision)
            y, xb, kept = _forward(x.to(spec.precision.residual), prepared, spec)
        if any(ctx.needs_input_grad):
            ctx.spec, ctx.dtype = spec, x.dtype
            if spec.memory == "layer":
                # as it came: computed again, everything has the same bits
                xb, kept = x, _Kept(*(None,) * len(_Kept._fields))
            converted = prepared if keeps_converted(spec.memory, prepared, kept) else ()
            ctx.save_for_backward(xb, *kept, *parameters, *converted)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        xb, *rest = ctx.saved_tensors
        first, second = len(_Kept._fields), len(_Kept._fields) + len(_Weights._fields)
        kept, w, converted = _Kept(*rest[:first]), _Weights(*rest[first:second]), rest[second:]
        spec, needed = ctx.spec, ctx.needs_input_grad[2:]
        need = dict(zip(_Weights._fields, needed, strict=True))
        with computing(spec.precision, xb.device):
            prepared = _Weights(*converted) if converted else _prepare(w, spec.precision)
            if kept.norm1 is None:
                _, xb, kept = _forward(xb.to(spec.precision.residual), prepared, spec._replace(memory="lean"))
            dx, got = _backward(grad, xb, kept, prepared, spec, need)
            if got["up"] is not None and got["up_bias"] is not None:
                d_norm, d_norm_bias, got["up"], _ = unfold(got["up"], got["up_bias"], w.up, w.norm1, w.norm1_bias)
                got["norm1"] = d_norm.add_(got["norm1"])  # type: ignore[arg-type]
                got["norm1_bias"] = d_norm_bias.add_(got["norm1_bias"])  # type: ignore[arg-type]
        grads = [None if got[name] is None or not wanted else got[name].to(getattr(w, name).dtype)  # type: ignore[union-attr]
                 for name, wanted in need.items()]  # fmt: skip
        return (dx.to(ctx.dtype), None, *grads)
