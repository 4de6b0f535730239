"""Query-key and value-output projections of one wide head, merged into one matrix each.

With queries `x Wq' + bq`, keys `x Wk' + bk` and one head, the scores are `(x A' + c) x'` with `A = Wk' Wq` and `c = Wk' bq`: what
`bk` adds is the same for all keys of a query and drops out of the softmax. The values, mixed by weights that sum to 1, leave
as `(P x) (Wo Wv)' + (bo + Wo bv)`. Four D x D projections of every token become two, for two D^3 products of weights.
Pays when a head is wider than D/2, which is to say for one head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastskel.nn.gemm import matmul
from fastskel.nn.precision import without_autocast

__all__ = [
    "Attention",
    "MergeCache",
    "MergingLayer",
    "Projections",
    "merge",
    "merge_projections",
    "merged_backward",
    "pays",
    "projections_of",
]


class Attention(NamedTuple):
    """How an attention over (N, S, D) is computed.

    Attributes:
        num_heads: Heads H.
        merged: Whether its projections are merged; keys and values are then the input itself.
        core: Who computes scores and mixes values: `"own"` explicitly, `"triton"` in a fused kernel, `"sdpa"` or `"xformers"`.
    """

    num_heads: int
    merged: bool
    core: Literal["own", "triton", "sdpa", "xformers"]


class Projections(NamedTuple):
    """Weights of an attention, merged or not.

    Attributes:
        first: `A`, (D, D); not merged: query, key and value projection, (3D, D).
        first_bias: `c`, (D,); not merged (3D,).
        last: `Wo Wv`, (D, D); not merged `Wo`.
        last_bias: `bo + Wo bv`, (D,); not merged `bo`.
    """

    first: Tensor
    first_bias: Tensor
    last: Tensor
    last_bias: Tensor


def pays(width: int, num_heads: int) -> bool:
    """Say whether merging saves work for heads of D / H out of D features."""
    return width // num_heads > width // 2


def merge(in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> Projections:
    """Merge without gradient, in float32 at least.

    Args:
        in_weight: Query, key and value projection, (3D, D).
        in_bias: Its bias, (3D,).
        out_weight: Output projection, (D, D).
        out_bias: Its bias, (D,).
    """
    wide = torch.promote_types(in_weight.dtype, torch.float32)
    wq, wk, wv = in_weight.to(wide).chunk(3)
    bq, _, bv = in_bias.to(wide).chunk(3)
    wo = out_weight.to(wide)
    return Projections(matmul(wk.mT, wq), wk.mT @ bq, matmul(wo, wv), out_bias.to(wide) + wo @ bv)


def merged_backward(
    grads: Projections, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, compute: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn gradients of merged projections into those of the original parameters.

    Args:
        grads: Gradients of the merged weights, (D, D) and (D,).
        in_weight: Query, key and value projection, (3D, D).
        in_bias: Its bias, (3D,).
        out_weight: Output projection, (D, D).
        compute: Type of the four D^3 products.
    Returns:
        Gradients of input projection (3D, D), its bias (3D,), output projection (D, D) and its bias (D,). The key bias has
        no influence: its gradient is zero, and not None, so that weight decay still moves it.
    """
    wide = grads.first_bias.dtype
    wq, wk, wv = in_weight.chunk(3)
    bq, _, bv = in_bias.to(wide).chunk(3)
    first, last = grads.first.to(compute), grads.last.to(compute)
    d_in = torch.empty_like(in_weight, dtype=wide)
    dwq, dwk, dwv = d_in.chunk(3)
    dwq.copy_(matmul(wk.to(compute), first))
    dwk.copy_(matmul(wq.to(compute), first.mT)).addr_(bq, grads.first_bias)
    dwv.copy_(matmul(out_weight.to(compute).mT, last))
    d_out = matmul(last, wv.to(compute).mT).to(wide).addr_(grads.last_bias, bv)
    d_in_bias = torch.cat([wk.to(wide) @ grads.first_bias, torch.zeros_like(bq), out_weight.to(wide).mT @ grads.last_bias])
    return d_in, d_in_bias, d_out, grads.last_bias


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor, compute: torch.dtype
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(in_weight, in_bias, out_weight)
        ctx.compute = compute
        with without_autocast(in_weight.device):
            return tuple(merge(in_weight, in_bias, out_weight, out_bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        in_weight, in_bias, out_weight = ctx.saved_tensors
        with without_autocast(in_weight.device):
            full = merged_backward(Projections(*grads), in_weight, in_bias, out_weight, ctx.compute)
        needed = [g.to(in_weight.dtype) if need else None for g, need in zip(full, ctx.needs_input_grad[:4], strict=True)]
        return (*needed, None)


def _bits(tensor: Tensor) -> Tensor:
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(whole)


def _parameters(attn: nn.MultiheadAttention) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.weight, attn.out_proj.bias


def projections_of(attn: nn.MultiheadAttention, how: Attention) -> Projections:
    """Return the projections as `how` needs them, (D, D) or (3D, D), without gradient and kept nowhere."""
    with torch.no_grad():
        return merge(*_parameters(attn)) if how.merged else Projections(*_parameters(attn))


def _same(now: tuple[Tensor, ...], then: tuple[Tensor, ...]) -> bool:
    # bit for bit: writes through `.data` leave version counters alone, so only the values tell
    return all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(_bits(a), _bits(b))
        for a, b in zip(now, then, strict=True)
    )


class MergeCache:
    """Merged projections of one attention: kept between passes without gradient, shared between the chunks of one step."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[Tensor, ...], Projections] | None = None
        self._shared: tuple[list[tuple[Tensor, int]], Projections] | None = None

    @property
    def shared(self) -> bool:
        """Whether passes over (N, S, D) share what was merged."""
        return self._shared is not None

    def __deepcopy__(self, memo: dict[int, Any]) -> MergeCache:
        return MergeCache()

    def __reduce__(self) -> tuple[type[MergeCache], tuple[()]]:
        return MergeCache, ()

    def share(self, attn: nn.MultiheadAttention, projections: Projections) -> None:
        """Use these leaves, (D, D) and (D,), of the parameters as they are now, until `unshare`."""
        self._shared = ([(p, p._version) for p in _parameters(attn)], projections)

    def unshare(self) -> None:
        """Merge again for each pass over (N, S, D)."""
        self._shared = None

    def get(self, attn: nn.MultiheadAttention, how: Attention, compute: torch.dtype) -> Projections:
        """Return the projections as `how` needs them.

        Returns:
            The parameters themselves, (3D, D) and (D, D); or merged, (D, D) each, in float32 at least, with gradient where the
            parameters have one.
        """
        parameters = _parameters(attn)
        if not how.merged:
            return Projections(*parameters)
        if self._shared is not None:
            then, shared = self._shared
            if any(p is not q or p._version != version for p, (q, version) in zip(parameters, then, strict=True)):
                raise ValueError("merged_once: parameters must not change inside the block, got others. End it before a step.")
            return shared
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
            # training: what inference kept will not be asked for again
            self._kept = None
            return merge_projections(attn, compute)
        if torch.compiler.is_compiling() or parameters[0].is_meta or _capturing(parameters[0].device):
            return merge(*parameters)
        # read once: replicas in other threads share this object
        kept = self._kept
        if kept is None or not _same(parameters, kept[0]):
            # outside of inference mode: what is kept may serve a frozen attention in training
            with torch.inference_mode(False), torch.no_grad(), without_autocast(parameters[0].device):
                kept = (tuple(p.detach().clone() for p in parameters), merge(*parameters))
            self._kept = kept
        return kept[1]


def _late(_: Tensor) -> None:
    raise ValueError("merged_once: backward passes must run inside the block, got one after it. Move it inside.")


class MergingLayer(nn.Module):
    """A layer over tokens (N, S, D) around one attention whose projections can be merged.

    Attributes:
        multiplies_in_fp8: Whether its linear maps follow `fp8_products`.
        merged: What is kept of merging.
        least_tokens: Tokens, as a share of D, from which merging repays its six D^3 products in training.
    """

    multiplies_in_fp8 = True
    merged: MergeCache
    least_tokens: float

    def repays(self, x: Tensor) -> bool:
        """Say whether merging is worth it for tokens (N, S, D): always without gradients, where it is done once."""
        attn = self.attention()
        trained = torch.is_grad_enabled() and (attn.in_proj_weight.requires_grad or attn.out_proj.weight.requires_grad)
        return not trained or self.merged.shared or x.shape[0] * x.shape[1] >= self.least_tokens * attn.embed_dim

    def attention(self) -> nn.MultiheadAttention:
        """Return the attention that (N, S, D) go through."""
        raise NotImplementedError

    @contextlib.contextmanager
    def merged_once(self) -> Iterator[None]:
        """Merge once for all passes over (N, S, D) inside; gradients reach the parameters when the block ends.

        Raises:
            ValueError: If parameters change inside, or a backward pass comes after the block.
        """
        attn = self.attention()
        if not pays(attn.embed_dim, attn.num_heads):
            yield
            return
        kind = attn.in_proj_weight.device.type
        compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else attn.in_proj_weight.dtype
        # also where the block is entered without gradients: passes inside may have them
        with torch.enable_grad():
            roots = merge_projections(attn, compute)
        leaves = Projections(*(root.detach().requires_grad_(root.requires_grad) for root in roots))
        self.merged.share(attn, leaves)
        try:
            yield
        finally:
            self.merged.unshare()
            for leaf in leaves:
                if leaf.requires_grad:
                    leaf.register_hook(_late)  # type: ignore[no-untyped-call]
        pairs = [(root, leaf.grad) for root, leaf in zip(roots, leaves, strict=True) if leaf.grad is not None]
        if pairs:
            torch.autograd.backward([root for root, _ in pairs], [grad for _, grad in pairs])


def _capturing(device: torch.device) -> bool:
    # reading the bits back would break the capture of a CUDA graph
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def merge_projections(attn: nn.MultiheadAttention, compute: torch.dtype) -> Projections:
    """Merge an attention's projections, (D, D) and (D,), so that gradients reach its parameters.

    Args:
        attn: Attention of one head, as torch's module holds it.
        compute: Type in which gradients are multiplied with weights; float16 is widened, because scaled gradients overflow it.
    """
    low = torch.promote_types(compute, torch.float32) if compute == torch.float16 else compute
    merged = _Merge.apply(  # type: ignore[no-untyped-call]
        attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.weight, attn.out_proj.bias, low
    )
    return Projections(*merged)
