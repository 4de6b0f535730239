"""Self-attention over short token sets as plain forward and backward functions, for blocks that are one autograd node."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastskel.kernels.attention import attention_backward, attention_forward
from fastskel.nn.gemm import linear, linear_grads, matmul
from fastskel.nn.kernel_choice import Kernels
from fastskel.nn.precision import Precision
from fastskel.nn.projections import Attention, Projections, pays

__all__ = ["BACKENDS", "AttentionBackend", "attend", "attend_backward", "choose_backend", "merges"]

AttentionBackend = Literal["auto", "fastskel", "sdpa", "xformers", "math"]
BACKENDS: tuple[AttentionBackend, ...] = ("auto", "fastskel", "sdpa", "xformers", "math")


# measured for widths 256 and 1024 and 2 to 16 heads, forward and backward: on a CPU torch's fused operator is the faster one in
# float32 by a tenth, and the slower one in bfloat16 by as much or more
_SEVERAL_HEADS: dict[tuple[str, torch.dtype], AttentionBackend] = {("cpu", torch.bfloat16): "math"}


def _xformers() -> Callable[..., Tensor]:
    try:
        ops = importlib.import_module("xformers.ops")
        # importing succeeds where the compiled operators do not load
        failure = getattr(importlib.import_module("xformers._cpp_lib"), "_cpp_library_load_exception", None)
        if failure is not None:
            raise ImportError(" ".join(str(failure).split()))
    except Exception as error:
        # whatever a foreign binary raises while loading is the reason to show
        raise ValueError(
            f"attention_backend: 'xformers' must be importable, got {type(error).__name__}: {error}. "
            "Install the build for this torch, or choose 'auto'."
        ) from error
    return ops.memory_efficient_attention  # type: ignore[no-any-return]


def merges(backend: AttentionBackend, width: int, num_heads: int) -> bool:
    """Say whether a backend merges projections over (N, S, D), wherever it runs.

    Raises:
        ValueError: On an unknown name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention_backend: must be one of {BACKENDS}, got {backend!r}. Choose one.")
    return backend in ("auto", "fastskel") and pays(width, num_heads)


def choose_backend(
    backend: AttentionBackend,
    width: int,
    num_heads: int,
    device: torch.device,
    compute: torch.dtype,
    merge: bool = True,
    kernels: Kernels = "torch",
) -> Attention:
    """Decide how attention over tokens (N, S, D) is computed.

    Args:
        backend: `"fastskel"` merges projections where that pays; `"sdpa"`, `"xformers"` and `"math"` do not merge and use torch's
            fused operator, xformers' or an explicit softmax; `"auto"` takes what was measured to be fastest.
        width: Width D.
        num_heads: Heads H.
        device: Where the tokens are.
        compute: Type of the matrix products.
        merge: Whether `"auto"` may merge: with gradients, few tokens do not repay it.
        kernels: Whether a core of our own is explicit or a fused kernel; `"math"` is explicit.
    Raises:
        ValueError: On an unknown name, or an xformers that does not load or does not support the device.
    """
    merged = merges(backend, width, num_heads)
    if backend == "auto":
        merged = merged and merge
        backend = "fastskel" if merged else _SEVERAL_HEADS.get((device.type, compute), "sdpa")
    if backend == "xformers":
        if device.type == "cpu":
            raise ValueError("attention_backend: 'xformers' must run on a GPU, got a CPU. Choose 'auto'.")
        _xformers()
        return Attention(num_heads, False, "xformers")
    if backend == "sdpa":
        return Attention(num_heads, False, "sdpa")
    return Attention(num_heads, merged, "triton" if kernels == "triton" and backend == "fastskel" else "own")


def _probabilities(q: Tensor, k: Tensor, scale: float, precision: Precision) -> Tensor:
    # scaled within the product: float16 scores stay small
    scores = torch.baddbmm(q.new_zeros(()), q, k.mT, beta=0, alpha=scale)
    return scores.softmax(-1, dtype=precision.wide).to(precision.compute)


def _score_grads(dp: Tensor, p: Tensor, scale: float, precision: Precision) -> Tensor:
    dp, p = dp.to(precision.wide), p.to(precision.wide)
    return dp.sub_((dp * p).sum(-1, keepdim=True)).mul_(p).mul_(scale).to(precision.compute)


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    n, s, d = qkv.shape
    q, k, v = qkv.view(n, s, 3, num_heads, d // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _fused(q: Tensor, k: Tensor, v: Tensor, core: str) -> Tensor:
    """Mix values by one of the borrowed operators, (N, H, S, D / H) to (N, S, D)."""
    if core == "xformers":
        return _xformers()(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).flatten(2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attend(
    z: Tensor, w: Projections, how: Attention, precision: Precision, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Attend.

    Args:
        z: Tokens, (N, S, D).
        w: Projections in the compute type.
        how: From `choose_backend`.
        precision: Types.
        keep: Whether the first projection is returned.
    Returns:
        Tokens (N, S, D); queries (N, S, D), or not merged queries, keys and values (N, S, 3D), or None; weights (N * H, S, S) if
        the core is our own and explicit, logarithms of their sums (N, H, S) if it is the kernel.
    """
    q = linear(z, w.first, w.first_bias)
    scale = 1.0 / math.sqrt(z.shape[-1] / how.num_heads)
    p = None
    if how.core == "triton":
        mixed, p = attention_forward(*_operands(q, z, how), None, scale)
        mixed = mixed.transpose(1, 2).flatten(2)
    elif how.merged:
        p = _probabilities(q, z, scale, precision)
        mixed = torch.bmm(p, z)
    elif how.core == "own":
        heads = [t.reshape(-1, *t.shape[2:]) for t in _heads(q, how.num_heads)]
        p = _probabilities(heads[0], heads[1], scale, precision)
        mixed = _joined(torch.bmm(p, heads[2]), how.num_heads)
    else:
        mixed = _fused(*_heads(q, how.num_heads), how.core)
    kept = q if keep else None
    del q
    return linear(mixed, w.last, w.last_bias), kept, p


def _operands(q: Tensor, z: Tensor, how: Attention) -> tuple[Tensor, Tensor, Tensor | None]:
    """View what the kernel reads as (N, H, S, D / H): queries and keys that are values too, or all three."""
    return (q[:, None], z[:, None], None) if how.merged else _heads(q, how.num_heads)


def _fused_backward(
    grad: Tensor, q: Tensor, z: Tensor, sums: Tensor, scale: float, how: Attention
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the gradient of the first projection's output (N, S, D), if merged that of the tokens, and the mixed values."""
    n, s, d = grad.shape
    heads = grad.view(n, s, how.num_heads, d // how.num_heads).transpose(1, 2)
    found = attention_backward(heads, *_operands(q, z, how), sums, None, scale, want_out=True)
    dq, dk, dv, mixed = (None if t is None else t.transpose(1, 2).flatten(2) for t in found)
    assert dq is not None and dk is not None and mixed is not None
    if dv is None:
        return dq, dk, mixed
    return torch.cat([dq, dk, dv], -1), None, mixed


def _joined(heads: Tensor, num_heads: int) -> Tensor:
    """Put heads (N * H, S, D / H) side by side, (N, S, D)."""
    return heads.view(-1, num_heads, *heads.shape[1:]).transpose(1, 2).flatten(2)


def attend_backward(
    grad: list[Tensor],
    z: Tensor,
    q: Tensor | None,
    p: Tensor | None,
    w: Projections,
    how: Attention,
    precision: Precision,
    need: tuple[bool, bool],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return the gradients of tokens and projections.

    Args:
        grad: Gradient of the output, (N, S, D), in a list that is emptied: it can go before the end.
        z: Tokens, (N, S, D).
        q: What `attend` returned, or None to compute it again.
        p: What `attend` returned.
        w: Projections in the compute type.
        how: From `choose_backend`.
        precision: Types.
        need: Whether the gradients of first and last projection are wanted.
    Returns:
        Gradient of the tokens (N, S, D), and of the projections in their order.
    """
    scale = 1.0 / math.sqrt(z.shape[-1] / how.num_heads)
    out = grad.pop()
    d_mixed = matmul(out, w.last)
    dz = None
    if how.core == "triton":
        assert p is not None
        first = linear(z, w.first, w.first_bias) if q is None else q
        dq, dz, mixed = _fused_backward(d_mixed, first, z, p, scale, how)
        d_last = linear_grads(out, mixed, precision.wide, need[1])
        del out, d_mixed, mixed, first
    elif how.merged:
        assert p is not None
        d_last = linear_grads(out, torch.bmm(p, z), precision.wide, need[1])
        del out
        ds = _score_grads(torch.bmm(d_mixed, z.mT), p, scale, precision)
        dz = torch.bmm(p.mT, d_mixed)
        del d_mixed
        dz.baddbmm_(ds.mT, linear(z, w.first, w.first_bias) if q is None else q)
        dq = torch.bmm(ds, z)
    else:
        qkv = linear(z, w.first, w.first_bias) if q is None else q
        if how.core == "own":
            assert p is not None
            dq, mixed = _own_backward(d_mixed, qkv, p, scale, how.num_heads, precision)
        else:
            leaf = qkv.detach().requires_grad_()
            with torch.enable_grad():
                mixed = _fused(*_heads(leaf, how.num_heads), how.core)
            (dq,) = torch.autograd.grad(mixed, leaf, d_mixed)
        d_last = linear_grads(out, mixed.detach(), precision.wide, need[1])
        del out, d_mixed, mixed, qkv
    d_first = linear_grads(dq, z, precision.wide, need[0])
    if dz is None:
        return matmul(dq, w.first), (*d_first, *d_last)
    if how.core == "triton":
        # added where the product is summed: no pass of its own
        dz.flatten(0, 1).addmm_(dq.flatten(0, 1), w.first)
        return dz, (*d_first, *d_last)
    return dz.add_(matmul(dq, w.first)), (*d_first, *d_last)


def _own_backward(
    grad: Tensor, qkv: Tensor, p: Tensor, scale: float, num_heads: int, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Return the gradient of queries, keys and values (N, S, 3D), and the mixed values (N, S, D)."""
    q, k, v = (t.reshape(-1, *t.shape[2:]) for t in _heads(qkv, num_heads))
    n, s, d = grad.shape
    grad = grad.view(n, s, num_heads, d // num_heads).transpose(1, 2).reshape(-1, s, d // num_heads)
    ds = _score_grads(torch.bmm(grad, v.mT), p, scale, precision)
    out = torch.empty_like(qkv)
    parts = (torch.bmm(ds, k), torch.bmm(ds.mT, q), torch.bmm(p.mT, grad))
    for into, value in zip(_heads(out, num_heads), parts, strict=True):
        into.copy_(value.view(into.shape))
    return out, _joined(torch.bmm(p, v), num_heads)
