"""Skeleton embedding and positional encoding of the USDRL backbones."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastskel.kernels.layer_norm import Term, TermGrad, layer_norm_backward, layer_norm_forward
from fastskel.nn.attention import AttentionBackend
from fastskel.nn.gemm import linear, linear_grads, matmul, relu_grad
from fastskel.nn.kernel_choice import KernelChoice, Kernels, choose_kernels
from fastskel.nn.plain import check_plain
from fastskel.nn.precision import Precision, precision_of, without_autocast

__all__ = ["FrozenEmbedding", "PositionalEncoding", "SkeletonEmbedding", "embed"]


class SkeletonEmbedding(nn.Module):
    """Embed the two token sets, (N, T, M*V*C) and (N, M*V, T*C), to width D by two separate small networks.

    Source: specification of USDRL, `Skeleton_Emb`: Linear, LayerNorm, ReLU, Linear for each set.
    """

    def __init__(self, temporal_features: int, spatial_features: int, width: int) -> None:
        super().__init__()
        self.t_embedding = self._branch(temporal_features, width)
        self.s_embedding = self._branch(spatial_features, width)

    @staticmethod
    def _branch(features: int, width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(features, width), nn.LayerNorm(width), nn.ReLU(inplace=True), nn.Linear(width, width)
        )

    def freeze(self, dtype: torch.dtype, _: AttentionBackend) -> FrozenEmbedding:
        """Prepare both networks, of tokens (N, S, I), for inference in a type, apart from their parameters."""
        return FrozenEmbedding(self, dtype)

    def forward(
        self, temporal: Tensor, spatial: Tensor, *, kernels: KernelChoice = "auto"
    ) -> tuple[Tensor, Tensor]:
        """Embed tokens.

        Args:
            temporal: One token per frame, (N, T, M*V*C).
            spatial: One token per joint and body, (N, M*V, T*C); fewer frames than configured use the leading weights.
            kernels: Who computes what lies between the matrix products.
        Returns:
            Embedded tokens, (N, T, D) and (N, M*V, D).
        """
        return embed(temporal, self.t_embedding, kernels), embed(spatial, self.s_embedding, kernels)


class FrozenEmbedding(nn.Module):
    """Both networks over tokens (N, S, I) with weights converted once; without gradient.

    Args:
        embedding: The embedding; what happens to it afterwards has no influence.
        dtype: Type of matrix products.
    """

    @torch.no_grad()
    def __init__(self, embedding: SkeletonEmbedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.precision = Precision.of(dtype)
        for kind, branch in (("t", embedding.t_embedding), ("s", embedding.s_embedding)):
            self.eps = float(branch[1].eps)  # type: ignore[arg-type]
            for name, value in _prepare(_parameters(branch), self.precision)._asdict().items():
                # a copy, also where nothing was converted: the embedding may go on training
                self.register_buffer(f"{kind}_{name}", value.detach().clone(), persistent=False)

    @torch.no_grad()
    def forward(
        self, temporal: Tensor, spatial: Tensor, *, kernels: KernelChoice = "auto"
    ) -> tuple[Tensor, Tensor]:
        """Embed tokens (N, T, M*V*C) and (N, M*V, T*C) to (N, T, D) and (N, M*V, D)."""
        out, chosen = [], _choose(kernels, temporal, self.precision)
        for kind, tokens in (("t", temporal), ("s", spatial)):
            weights = _Weights(**{name: getattr(self, f"{kind}_{name}") for name in _Weights._fields})
            with without_autocast(tokens.device):
                out.append(_forward(tokens.to(self.precision.compute), weights, self.eps, self.precision, chosen)[0])
        return out[0], out[1]


def _choose(kernels: KernelChoice, tokens: Tensor, precision: Precision) -> Kernels:
    """Decide who computes over (N, S, D); a compiler sees torch's operators, which it fuses itself."""
    chosen = choose_kernels(kernels, tokens.device, precision.compute)
    return "torch" if torch.compiler.is_compiling() else chosen


def embed(tokens: Tensor, branch: nn.Sequential, kernels: KernelChoice = "auto") -> Tensor:
    """Run Linear, LayerNorm, ReLU and Linear over tokens (N, S, I), giving (N, S, D), as one autograd node.

    Features may be fewer than the first linear takes: they are its leading ones, the rest counts as zero.
    """
    weights = _parameters(branch)
    precision = precision_of(tokens, weights.first, "embed")
    chosen = _choose(kernels, tokens, precision)
    out: Tensor = _Embed.apply(tokens, precision, branch[1].eps, chosen, *weights)  # type: ignore[no-untyped-call]
    return out


class _Weights(NamedTuple):
    first: Tensor
    first_bias: Tensor
    norm: Tensor
    norm_bias: Tensor
    last: Tensor
    last_bias: Tensor


def _parameters(branch: nn.Sequential) -> _Weights:
    first, norm, _, last = branch
    check_plain("SkeletonEmbedding", nn.Linear, first, last)
    check_plain("SkeletonEmbedding", nn.LayerNorm, norm)
    return _Weights(first.weight, first.bias, norm.weight, norm.bias, last.weight, last.bias)  # type: ignore[arg-type]


def _prepare(w: _Weights, precision: Precision) -> _Weights:
    cast = {k: v.to(precision.residual if k.startswith("norm") else precision.compute) for k, v in w._asdict().items()}
    return _Weights(**cast)


def _rectified(
    h: Tensor, w: _Weights, eps: float, precision: Precision, kernels: Kernels
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise and rectify (N, S, D); in the compute type by a fused kernel, in the residual type by torch."""
    if kernels == "triton":
        z = torch.empty_like(h)
        [(mean, rstd)], _ = layer_norm_forward([Term(h, z, weight=w.norm, bias=w.norm_bias, relu=True)], eps)
        return z, mean, rstd
    out, mean, rstd = torch.native_layer_norm(h.to(precision.residual), h.shape[-1:], w.norm, w.norm_bias, eps)
    return out.relu_(), mean, rstd


def _rectified_grad(
    grad: Tensor, rectified: Tensor, h: Tensor, mean: Tensor, rstd: Tensor, w: _Weights, precision: Precision,
    kernels: Kernels,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradient of h (N, S, D) in the compute type, and of the normalisation's weight and bias."""
    if kernels == "triton":
        dh = torch.empty_like(h)
        term = TermGrad(grad, rstd, dh, mean=mean, base=h, weight=w.norm, bias=w.norm_bias, relu=True)
        [(d_norm, d_norm_bias)] = layer_norm_backward([term])
        return dh, d_norm, d_norm_bias
    dh, d_norm, d_norm_bias = torch.ops.aten.native_layer_norm_backward(
        relu_grad(grad.to(precision.residual), rectified), h.to(precision.residual), h.shape[-1:], mean, rstd,
        w.norm, w.norm_bias, [True] * 3,
    )  # fmt: skip
    return dh.to(precision.compute), d_norm, d_norm_bias


def _forward(
    xb: Tensor, w: _Weights, eps: float, precision: Precision, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """Return the embedded tokens, and the output of the first linear."""
    # frames run slowest in a spatial token, so a shorter clip is the leading slice of the weight: absent frames are 0
    h = linear(xb, w.first[:, : xb.shape[-1]], w.first_bias)
    return linear(_rectified(h, w, eps, precision, kernels)[0].to(precision.compute), w.last, w.last_bias), h


class _Embed(torch.autograd.Function):
    """Keeps the tokens and the first linear's output; normalised and rectified again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, precision: Precision, eps: float, kernels: Kernels, *parameters: Tensor
    ) -> Tensor:
        with without_autocast(x.device):
            xb = x.to(precision.compute)
            out, h = _forward(xb, _prepare(_Weights(*parameters), precision), eps, precision, kernels)
        if any(ctx.needs_input_grad):
            ctx.precision, ctx.eps, ctx.kernels, ctx.dtype = precision, eps, kernels, x.dtype
            ctx.save_for_backward(xb, h, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        xb, h, *parameters = ctx.saved_tensors
        compute, _, wide = ctx.precision[:3]
        need_x, _, _, _, *need = ctx.needs_input_grad
        with without_autocast(xb.device):
            w = _prepare(_Weights(*parameters), ctx.precision)
            rectified, mean, rstd = _rectified(h, w, ctx.eps, ctx.precision, ctx.kernels)
            g = grad.to(compute)
            d_last = linear_grads(g, rectified.to(compute), wide, need[4] or need[5])
            dh, d_norm, d_norm_bias = _rectified_grad(
                matmul(g, w.last), rectified, h, mean, rstd, w, ctx.precision, ctx.kernels
            )
            d_first, d_first_bias = linear_grads(dh, xb, wide, need[0] or need[1])
            if d_first is not None:
                d_first = F.pad(d_first, (0, parameters[0].shape[1] - d_first.shape[1]))
            dx = matmul(dh, w.first[:, : xb.shape[-1]]).to(ctx.dtype) if need_x else None
        grads = (d_first, d_first_bias, d_norm, d_norm_bias, *d_last)
        wanted = [g.to(parameters[0].dtype) if n and g is not None else None for g, n in zip(grads, need, strict=True)]
        return (dx, None, None, None, *wanted)


class PositionalEncoding(nn.Module):
    """Add fixed sine and cosine positions to tokens (N, S, D), S up to `length`."""

    pe: Tensor

    def __init__(self, width: int, length: int = 200) -> None:
        super().__init__()
        position = torch.arange(length, dtype=torch.float32)[:, None]
        rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(1e4) / width))
        table = torch.zeros(1, length, width)
        table[0, :, 0::2] = torch.sin(position * rate)
        table[0, :, 1::2] = torch.cos(position * rate)[:, : width // 2]
        # persistent, because the reference's checkpoints hold it
        self.register_buffer("pe", table)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens (N, S, D) with the first S positions added."""
        return tokens + self.pe[:, : tokens.shape[1]]
