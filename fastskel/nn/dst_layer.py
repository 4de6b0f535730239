"""Dense spatio-temporal layer: convolutional attention beside dense shift attention, sharing one attention.

The modules hold parameters under the reference's names, because its checkpoints do; `dst_function` computes, and here it becomes
one autograd node. Source: specification of USDRL, sections 1.6 to 1.8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastskel.nn import dst_function as fn
from fastskel.nn import dst_pieces as pieces
from fastskel.nn.attention import AttentionBackend, choose_backend, merges
from fastskel.nn.drop_path import NO_DROPS, LayerDrops
from fastskel.nn.dst_function import LayerSpec, Weights
from fastskel.nn.dst_operator import dst_layer
from fastskel.nn.kernel_choice import KernelChoice, choose_kernels
from fastskel.nn.memory import MemoryMode, check_memory, keeps_converted, memory_in_use
from fastskel.nn.mlp import MLP
from fastskel.nn.plain import check_plain
from fastskel.nn.precision import Precision, computing, precision_of, without_autocast
from fastskel.nn.projections import Attention, MergeCache, MergingLayer, Projections, projections_of

__all__ = ["ConvAttention", "DSTLayer", "DenseShiftAttention", "FrozenDSTLayer"]


class ConvAttention(nn.Module):
    """Parameters of CA: convolution over single tokens, attention and MLP over (N, S, D)."""

    def __init__(self, width: int, attn: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attn = attn
        self.conv1 = nn.Conv1d(width, width, 1)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 2 * width)


class DenseShiftAttention(nn.Module):
    """Parameters of DSA: the token mixture, and the transformer block over tokens (N, S, D) and over their mixture."""

    def __init__(self, num_tokens: int, width: int, attn: nn.MultiheadAttention) -> None:
        super().__init__()
        self.wt1 = nn.Linear(num_tokens, num_tokens)
        self.wt2 = nn.Linear(num_tokens, num_tokens)
        self.attn = attn
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 2 * width)


class DSTLayer(MergingLayer):
    """`alpha * CA(x) + (1 - alpha) * DSA(x)` over tokens (N, S, D), as one autograd node.

    Args:
        num_tokens: Most tokens S; fewer use the leading block of the token mixture.
        width: Width D.
        num_heads: Heads H.
        alpha: Weight of CA.
        gap: Every gap-th token passes the dense shift unchanged; the rows of `wt2` behind them get zero gradients.
    """

    # measured (bench/results): six D^3 products against 18 D^2 saved per token
    least_tokens = 0.5

    def __init__(self, num_tokens: int, width: int, num_heads: int, alpha: float, gap: int) -> None:
        super().__init__()
        attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.alpha = alpha
        self.gap = gap
        self.CA = ConvAttention(width, attn)
        self.DSA = DenseShiftAttention(num_tokens, width, attn)
        self.merged = MergeCache()

    def attention(self) -> nn.MultiheadAttention:
        """Return the attention that both branches of (N, S, D) share."""
        return self.CA.attn

    def _weights(self, projections: Projections) -> Weights:
        ca, dsa = self.CA, self.DSA
        linears = (ca.mlp.fc1, ca.mlp.fc2, dsa.mlp.fc1, dsa.mlp.fc2, dsa.wt1, dsa.wt2)
        norms = (ca.norm1, ca.norm2, dsa.norm1, dsa.norm2)
        check_plain("DSTLayer", nn.Linear, *linears)
        check_plain("DSTLayer", nn.LayerNorm, *norms)
        check_plain("DSTLayer", nn.Conv1d, ca.conv1)
        check_plain("DSTLayer", nn.MultiheadAttention, ca.attn)
        if dsa.attn is not ca.attn or len({norm.eps for norm in norms}) > 1:
            raise ValueError(
                "DSTLayer: CA and DSA must share one attention, and all norms one eps, got others. Replace them in both places."
            )
        assert ca.conv1.bias is not None
        return Weights(
            *projections,
            ca.conv1.weight, ca.conv1.bias,
            ca.norm1.weight, ca.norm1.bias, ca.norm2.weight, ca.norm2.bias,
            ca.mlp.fc1.weight, ca.mlp.fc1.bias, ca.mlp.fc2.weight, ca.mlp.fc2.bias,
            dsa.wt1.weight, dsa.wt1.bias, dsa.wt2.weight, dsa.wt2.bias,
            dsa.norm1.weight, dsa.norm1.bias, dsa.norm2.weight, dsa.norm2.bias,
            dsa.mlp.fc1.weight, dsa.mlp.fc1.bias, dsa.mlp.fc2.weight, dsa.mlp.fc2.bias,
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        drops: LayerDrops | None = None,
        *,
        memory: MemoryMode = "lean",
        backend: AttentionBackend = "auto",
        kernels: KernelChoice = "auto",
    ) -> Tensor:
        """Transform tokens.

        Args:
            x: Tokens, (N, S, D).
            drops: What DropPath drops, None outside of training.
            memory: How much is kept for the backward pass: `"saved"` most, `"layer"` the input only. Nothing where gradients are
                off.
            backend: Who computes attention.
            kernels: Who computes what lies between the matrix products.
        Returns:
            Tokens, (N, S, D); under autocast in float32, as the plain residual stream is.
        Raises:
            ValueError: On tokens of another shape or type, an unknown memory mode, or a backend or kernels that are
                unknown or not there.
        """
        attn = self.CA.attn
        _check_tokens(x, self.DSA.wt1.in_features, attn.embed_dim)
        check_memory(memory)
        precision = precision_of(x, attn.in_proj_weight, "DSTLayer")
        chosen = choose_kernels(kernels, x.device, precision.compute)
        attention = choose_backend(
            backend, attn.embed_dim, attn.num_heads, x.device, precision.compute, self.repays(x), chosen
        )
        weights = self._weights(self.merged.get(attn, attention, precision.compute))
        spec = LayerSpec(attention, precision, self.alpha, self.gap, self.CA.norm1.eps, memory_in_use(memory), chosen)
        drops = NO_DROPS if drops is None else drops
        if torch.compiler.is_compiling() and chosen == "triton":
            # borrowed cores are differentiated by autograd, which is off inside an operator
            core = "triton" if attention.core in ("sdpa", "xformers") else attention.core
            return dst_layer(x, weights, drops, spec._replace(attention=attention._replace(core=core)))
        out: Tensor = _Layer.apply(x, drops, spec, *weights)  # type: ignore[no-untyped-call]
        return out

    def freeze(self, dtype: torch.dtype, backend: AttentionBackend) -> FrozenDSTLayer:
        """Prepare the layer over tokens (N, S, D) for inference in a type, apart from its parameters."""
        return FrozenDSTLayer(self, dtype, backend)


class FrozenDSTLayer(nn.Module):
    """A layer over tokens (N, S, D) whose weights are merged, folded and converted once; without gradient.

    Args:
        layer: The layer; what happens to it afterwards has no influence.
        dtype: Type of matrix products.
        backend: Who computes attention.
    """

    @torch.no_grad()
    def __init__(self, layer: DSTLayer, dtype: torch.dtype, backend: AttentionBackend) -> None:
        super().__init__()
        attn = layer.CA.attn
        self.num_tokens, self.width = layer.DSA.wt1.in_features, attn.embed_dim
        self.backend, self.num_heads = backend, attn.num_heads
        attention = Attention(attn.num_heads, merges(backend, self.width, attn.num_heads), "own")
        self.spec = LayerSpec(attention, Precision.of(dtype), layer.alpha, layer.gap, layer.CA.norm1.eps, "layer")
        weights = layer._weights(projections_of(attn, attention))
        for name, value in fn.prepare(weights, self.spec.precision)._asdict().items():
            # a copy, also where nothing was converted: the layer may go on training
            self.register_buffer(name, value.detach().clone(), persistent=False)

    @torch.no_grad()
    def forward(
        self, x: Tensor, drops: LayerDrops | None = None, *, kernels: KernelChoice = "auto", **_: Any
    ) -> Tensor:
        """Transform tokens (N, S, D), in the residual type; how was decided when the layer was frozen."""
        _check_tokens(x, self.num_tokens, self.width)
        if drops is not None and drops is not NO_DROPS:
            raise ValueError("FrozenDSTLayer: drops must be None, got some. A frozen encoder does not train.")
        weights = Weights(**{name: getattr(self, name) for name in Weights._fields})
        with without_autocast(x.device):
            # chosen where it runs, which need not be where it was made
            compute = self.spec.precision.compute
            chosen = choose_kernels(kernels, x.device, compute)
            attention = choose_backend(self.backend, self.width, self.num_heads, x.device, compute, kernels=chosen)
            spec = self.spec._replace(attention=attention, kernels=chosen)
            if torch.compiler.is_compiling() and chosen == "triton":
                return dst_layer(x, weights, NO_DROPS, spec, prepared=True)
            return pieces.forward(x, weights, NO_DROPS, spec, pieces.cut(x, spec))[0]


def _check_tokens(x: Tensor, most: int, width: int) -> None:
    """Refuse tokens that are not (N, S, D) of this width, with S up to `most`.

    Raises:
        ValueError: Naming both shapes.
    """
    if x.dim() != 3 or x.shape[2] != width or not 1 <= x.shape[1] <= most:
        raise ValueError(
            f"DSTLayer: x must be (N, 1..{most}, {width}), got {tuple(x.shape)}. Build the layer for such tokens."
        )


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, drops: LayerDrops, spec: LayerSpec, *parameters: Tensor
    ) -> Tensor:
        with computing(spec.precision, x.device):
            prepared, cuts = fn.prepare(Weights(*parameters), spec.precision), pieces.cut(x, spec)
            y, saved = pieces.forward(x, prepared, drops, spec, cuts)
        if any(ctx.needs_input_grad):
            ctx.drops, ctx.spec, ctx.cuts, ctx.dtype = drops, spec, cuts, x.dtype
            converted = prepared if keeps_converted(spec.memory, prepared, saved[1:]) else ()
            ctx.num_saved = len(saved)
            # the input as it came: computed again, everything has the same bits
            ctx.save_for_backward(None if saved else x, *saved, *parameters, *converted)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        first, second = ctx.num_saved, ctx.num_saved + len(Weights._fields)
        saved, parameters, converted = rest[:first], Weights(*rest[first:second]), rest[second:]
        spec, cuts = ctx.spec, ctx.cuts
        need = [name for name, wanted in zip(Weights._fields, ctx.needs_input_grad[3:], strict=True) if wanted]
        with computing(spec.precision, grad.device):
            prepared = Weights(*converted) if converted else fn.prepare(parameters, spec.precision)
            dx, raw = pieces.backward(grad, x, saved, prepared, ctx.drops, spec, cuts, need)
            grads = fn.unprepare(raw, parameters, spec.gap)
        return (dx.to(ctx.dtype), None, None, *(grads[name] if name in need else None for name in Weights._fields))
