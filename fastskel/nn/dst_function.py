"""One dense spatio-temporal layer as plain forward and backward functions, at the cost its algebra allows.

    ca  = m1 MLP_c(LN(x + m0 att(LN(x + relu(x Wc'))))         convolutional attention, its last residual left out as published
    p_i = r_i + m_i MLP_d(LN r_i),  r_i = b_i + m_i' att(LN b_i)   for b_1 = shift(x), b_2 = x
    y   = alpha ca + (1 - alpha) (p_1 + p_2) / 2

All three attentions share their weights: they are one batch. The second linear of MLP_d is shared and linear: it runs once, on
the sum of both hidden activations. The affine part of the second normalisations is folded into the first linears, so that what
is kept for their weights' gradient, the normalised rows, is what the normalisation's gradient needs too. Dropped work is not
done. With one head, a token costs 17 D^2 multiplications where the plain layer takes 25, and 14 vectors of D numbers are kept for
it where the plain layer keeps 50.

Source: specification of USDRL, sections 1.3 to 1.8.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastskel.nn.attention import attend, attend_backward
from fastskel.nn.drop_path import (
    CA_ATTENTION,
    CA_MLP,
    PLAIN_ATTENTION,
    PLAIN_MLP,
    SHIFTED_ATTENTION,
    SHIFTED_MLP,
    LayerDrops,
)
from fastskel.nn.gemm import linear, linear_grads, matmul, relu_grad
from fastskel.nn.kernel_choice import Kernels
from fastskel.nn.memory import MemoryMode
from fastskel.nn.norm import fold, normalise, normalise_grad, unfold
from fastskel.nn.precision import Precision
from fastskel.nn.projections import Attention, Projections

__all__ = ["Kept", "LayerSpec", "Weights", "backward", "forward", "live_tokens", "prepare", "unprepare"]

class LayerSpec(NamedTuple):
    """What a layer's pass depends on beside tensors.

    Attributes:
        attention: How attention is computed.
        precision: Types.
        alpha: Weight of the convolutional attention branch.
        gap: Every gap-th token passes the dense shift unchanged.
        eps: Added to variances.
        memory: How much is kept for the backward pass.
        kernels: Who computes what lies between the products.
    """

    attention: Attention
    precision: Precision
    alpha: float
    gap: int
    eps: float
    memory: MemoryMode
    kernels: Kernels = "torch"


class Weights(NamedTuple):
    """Parameters of a layer; prepared, the same names hold what the pass multiplies with.

    Prepared: in the compute type, the second normalisations folded into `ca_up` and `dsa_up`; first normalisations, and the bias
    that is added to the residual stream, in its type.
    """

    first: Tensor
    first_bias: Tensor
    last: Tensor
    last_bias: Tensor
    conv: Tensor
    conv_bias: Tensor
    ca_norm1: Tensor
    ca_norm1_bias: Tensor
    ca_norm2: Tensor
    ca_norm2_bias: Tensor
    ca_up: Tensor
    ca_up_bias: Tensor
    ca_down: Tensor
    ca_down_bias: Tensor
    wt1: Tensor
    wt1_bias: Tensor
    wt2: Tensor
    wt2_bias: Tensor
    dsa_norm1: Tensor
    dsa_norm1_bias: Tensor
    dsa_norm2: Tensor
    dsa_norm2_bias: Tensor
    dsa_up: Tensor
    dsa_up_bias: Tensor
    dsa_down: Tensor
    dsa_down_bias: Tensor

    @property
    def projections(self) -> Projections:
        """The attention's own, (D, D) or (3D, D)."""
        return Projections(self.first, self.first_bias, self.last, self.last_bias)


class Kept(NamedTuple):
    """What a forward pass leaves for the backward pass beside its input; None where it is computed again.

    Attributes:
        conv: Rectified convolution, (n, S, D).
        q: Queries of all attentions, (n, S, D), or with keys and values (n, S, 3D).
        p: Their weights, (n * H, S, S), where the core is our own; for the fused kernel logarithms of their sums, (n, H, S).
        ca: Normalised rows before CA's MLP, (n, S, D), and what they were divided by, (n, S, 1).
        ca_up: CA's hidden activations before GELU, (n, S, 2D).
        dsa: Normalised rows before the dense shift MLPs, shifted then plain, (n, S, D).
        dsa_up: Their hidden activations before GELU, (n, S, 2D).
    """

    conv: Tensor | None
    q: Tensor | None
    p: Tensor | None
    ca: Tensor | None
    ca_rstd: Tensor | None
    ca_up: Tensor | None
    dsa: Tensor | None
    dsa_rstd: Tensor | None
    dsa_up: Tensor | None


def prepare(w: Weights, precision: Precision) -> Weights:
    """Turn the parameters of a layer over (N, S, D) into what its passes multiply with: see `Weights`."""
    to, residual = precision.compute, precision.residual
    ca_up, ca_up_bias = fold(w.ca_up, w.ca_up_bias, w.ca_norm2, w.ca_norm2_bias, precision)
    dsa_up, dsa_up_bias = fold(w.dsa_up, w.dsa_up_bias, w.dsa_norm2, w.dsa_norm2_bias, precision)
    kept = {"ca_norm1", "ca_norm1_bias", "dsa_norm1", "dsa_norm1_bias", "dsa_down_bias"}
    cast = {name: value.to(residual if name in kept else to) for name, value in w._asdict().items() if "_norm2" not in name}
    cast.update(ca_up=ca_up, ca_up_bias=ca_up_bias, dsa_up=dsa_up, dsa_up_bias=dsa_up_bias, conv=cast["conv"].flatten(1))
    # folded: nothing reads them
    unread = ca_up_bias[:0]
    return Weights(**{name: cast.get(name, unread) for name in Weights._fields})


def live_tokens(num_tokens: int, gap: int, device: torch.device) -> Tensor:
    """List the tokens of (N, S, D) that the dense shift mixes, (n,): all but every gap-th, the first included."""
    numbers = torch.arange(num_tokens - -(-num_tokens // gap), device=device)
    # computed, because selecting by a condition would wait for the device
    return numbers + 1 + numbers // max(gap - 1, 1)


def _take(t: Tensor, rows: Tensor | None) -> Tensor:
    return t if rows is None else t.index_select(0, rows)


def _add(base: Tensor, rows: Tensor | None, value: Tensor, factor: float | Tensor) -> Tensor:
    """Add a branch to the rows it was computed for; may write to `base`."""
    if rows is not None:
        assert isinstance(factor, float)
        return base.index_add_(0, rows, value.to(base.dtype), alpha=factor)
    if isinstance(factor, float):
        return base.add_(value.to(base.dtype), alpha=factor)
    return base.addcmul_(value.to(base.dtype), factor.to(base.dtype))


def _sum(base: Tensor, rows: Tensor | None, value: Tensor, factor: float | Tensor) -> Tensor:
    """As `_add`, leaving `base` alone."""
    if rows is None and isinstance(factor, float):
        return torch.add(base, value.to(base.dtype), alpha=factor)
    return _add(base.clone(), rows, value, factor)


def _shift(x: Tensor, xb: Tensor, live: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
    """Mix tokens; return them (N, S, D), and the rectified hidden mixture."""
    n = x.shape[1]
    hidden = torch.matmul(w.wt1[:n, :n], xb).add_(w.wt1_bias[:n, None]).relu_()
    mixed = torch.matmul(w.wt2[live, :n], hidden).add_(w.wt2_bias[live, None])
    return x.index_add(1, live, mixed.to(x.dtype)), hidden


# the three attentions of the batch, and the normalisation in front of each
_ATTENTIONS = ((CA_ATTENTION, "ca_norm1"), (SHIFTED_ATTENTION, "dsa_norm1"), (PLAIN_ATTENTION, "dsa_norm1"))


def _attention_input(call: int, x: Tensor, shifted: Tensor, conv: Tensor, drops: LayerDrops) -> Tensor:
    """Rows that one of the attentions normalises."""
    rows = _take(shifted if call == SHIFTED_ATTENTION else x, drops.rows[call])
    return rows + conv if call == CA_ATTENTION else rows


def _normalised(
    x: Tensor, shifted: Tensor, conv: Tensor, w: Weights, drops: LayerDrops, spec: LayerSpec
) -> tuple[Tensor, list[int], list[tuple[Tensor, Tensor]]]:
    """Normalise the rows of all attentions into one batch (n, S, D); return the size and the statistics of each too."""
    chosen = [drops.rows[call] for call, _ in _ATTENTIONS]
    counts = [len(x) if rows is None else len(rows) for rows in chosen]
    z = x.new_empty(sum(counts), *x.shape[1:], dtype=spec.precision.compute)
    statistics = []
    # one after the other: their rows are wide
    for (call, norm), part in zip(_ATTENTIONS, torch.split(z, counts), strict=True):
        rows = _attention_input(call, x, shifted, conv, drops)
        weight, bias = getattr(w, norm), getattr(w, f"{norm}_bias")
        out, mean, rstd = torch.native_layer_norm(rows, rows.shape[-1:], weight, bias, spec.eps)
        part.copy_(out)
        statistics.append((mean, rstd))
    return z, counts, statistics


def forward(x: Tensor, w: Weights, drops: LayerDrops, spec: LayerSpec) -> tuple[Tensor, Tensor, Kept]:
    """Run a layer.

    Args:
        x: Tokens, (N, S, D), in the residual type.
        w: Prepared weights.
        drops: What is dropped.
        spec: The rest.
    Returns:
        Tokens (N, S, D) in the residual type; the input in the compute type; what the backward pass needs beside it.
    """
    rows, factors, alpha, half = drops.rows, drops.factors, spec.alpha, 0.5 * (1.0 - spec.alpha)
    compute = spec.precision.compute
    live = live_tokens(x.shape[1], spec.gap, x.device)
    xb = x.to(compute)
    conv = linear(_take(xb, rows[CA_ATTENTION]), w.conv, w.conv_bias, "relu")
    shifted, _ = _shift(x, xb, live, w)
    z, counts, _ = _normalised(x, shifted, conv, w, drops, spec)
    attended, q, p = attend(z, w.projections, spec.attention, spec.precision, keep=spec.memory != "layer")
    del z
    a_ca, a_shifted, a_plain = torch.split(attended, counts)

    u = _sum(_take(x, rows[CA_MLP]), drops.inner, a_ca, factors[CA_ATTENTION])
    first = _add(shifted, rows[SHIFTED_ATTENTION], a_shifted, factors[SHIFTED_ATTENTION])
    second = _sum(x, rows[PLAIN_ATTENTION], a_plain, factors[PLAIN_ATTENTION])
    del attended, a_ca, a_shifted, a_plain

    ca, ca_rstd = normalise(u, spec.eps, compute)
    ca_up = linear(ca, w.ca_up, w.ca_up_bias)
    parts = [normalise(_take(r, rows[call]), spec.eps, compute) for r, call in ((first, SHIFTED_MLP), (second, PLAIN_MLP))]
    dsa, dsa_rstd = (torch.cat(pair) for pair in zip(*parts, strict=True))
    dsa_up = linear(dsa, w.dsa_up, w.dsa_up_bias)
    del u, parts

    y = first.add_(second).mul_(half)
    y.add_(linear(_hidden(dsa_up, len(x), drops), w.dsa_down).to(y.dtype), alpha=half)
    bias = drops.bias * half
    if isinstance(bias, Tensor):
        y.addcmul_(bias.to(y.dtype), w.dsa_down_bias)
    else:
        y.add_(w.dsa_down_bias, alpha=bias)
    _add(y, rows[CA_MLP], linear(F.gelu(ca_up), w.ca_down, w.ca_down_bias), factors[CA_MLP] * alpha)
    return y, xb, Kept(conv, q, p, ca, ca_rstd, ca_up, dsa, dsa_rstd, dsa_up)


def _hidden(dsa_up: Tensor, num_rows: int, drops: LayerDrops) -> Tensor:
    """Sum the hidden activations (N, S, 2D) of both dense shift branches, each with its DropPath factor."""
    rows, factor, other = drops.rows[SHIFTED_MLP], drops.factors[SHIFTED_MLP], drops.factors[PLAIN_MLP]
    hidden = F.gelu(dsa_up)
    count = num_rows if rows is None else len(rows)
    first, second = torch.split(hidden, [count, len(hidden) - count])
    if isinstance(factor, Tensor) and isinstance(other, Tensor):
        return torch.addcmul(first * factor.to(first.dtype), second, other.to(first.dtype))
    total = first if rows is None else first.new_zeros(num_rows, *first.shape[1:]).index_copy_(0, rows, first)
    # what is computed of either branch has the same factor
    total = _add(total, drops.rows[PLAIN_MLP], second, 1.0)
    return total if factor == 1.0 else total.mul_(factor)


def backward(
    grad: Tensor, xb: Tensor, kept: Kept, w: Weights, drops: LayerDrops, spec: LayerSpec, need: Collection[str]
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Differentiate a layer.

    Args:
        grad: Gradient of the output, (N, S, D).
        xb: Its input in the compute type, (N, S, D).
        kept: What the forward pass kept.
        w: Prepared weights.
        drops: What was dropped.
        spec: The rest.
        need: Names of the weights whose gradients are wanted; others may come along.
    Returns:
        Gradients of the input (N, S, D), and of the prepared weights by name, None where not wanted; of `wt2` those of its live
        rows.
    """
    rows, factors, half = drops.rows, drops.factors, 0.5 * (1.0 - spec.alpha)
    wide, compute, residual = spec.precision.wide, spec.precision.compute, spec.precision.residual
    grad = grad.to(residual)
    got: dict[str, Tensor | None] = {}
    needed = set(need)
    # a folded normalisation gets its gradient from the linear's
    needed |= {name.replace("norm2", "up") for name in needed if "norm2" in name}

    def keep(name: str, g: Tensor, inp: Tensor) -> None:
        got[name], got[name + "_bias"] = linear_grads(g, inp, wide, bool(needed & {name, name + "_bias"}))

    # CA's MLP
    assert kept.ca is not None and kept.ca_rstd is not None and kept.ca_up is not None
    g = (_take(grad, rows[CA_MLP]) * _as(factors[CA_MLP] * spec.alpha, residual)).to(compute)
    keep("ca_down", g, F.gelu(kept.ca_up))
    d_up = torch.ops.aten.gelu_backward(matmul(g, w.ca_down), kept.ca_up)
    keep("ca_up", d_up, kept.ca)
    du = normalise_grad(matmul(d_up, w.ca_up), kept.ca, kept.ca_rstd, residual)
    del g, d_up

    # dense shift MLPs: one product through the shared second linear, for both
    assert kept.dsa is not None and kept.dsa_rstd is not None and kept.dsa_up is not None
    base = grad * half
    g = base.to(compute)
    keep("dsa_down", g, _hidden(kept.dsa_up, len(grad), drops))
    if got["dsa_down_bias"] is not None:
        got["dsa_down_bias"] = _bias_grad(base, drops.bias, wide)
    d_up, count = _hidden_grad(matmul(g, w.dsa_down), kept.dsa_up, drops)
    del g
    keep("dsa_up", d_up, kept.dsa)
    d_rows = normalise_grad(matmul(d_up, w.dsa_up), kept.dsa, kept.dsa_rstd, residual)
    first = _sum(base, rows[SHIFTED_MLP], d_rows[:count], 1.0)
    second = _add(base, rows[PLAIN_MLP], d_rows[count:], 1.0)
    del d_up, d_rows

    # the three attentions as one batch; what they normalise is made twice, to be gone in between
    assert kept.conv is not None
    x = xb.to(residual)
    live = live_tokens(x.shape[1], spec.gap, x.device)
    z, counts, statistics = _normalised(x, _shift(x, xb, live, w)[0], kept.conv, w, drops, spec)
    wanted = (bool(needed & {"first", "first_bias"}), bool(needed & {"last", "last_bias"}))
    branches = ((du, drops.inner, CA_ATTENTION), (first, rows[SHIFTED_ATTENTION], SHIFTED_ATTENTION),
                (second, rows[PLAIN_ATTENTION], PLAIN_ATTENTION))  # fmt: skip
    d_attended = torch.empty_like(z)
    for part, (g, chosen, call) in zip(torch.split(d_attended, counts), branches, strict=True):
        torch.mul(_take(g, chosen), _as(factors[call], residual), out=part)
    del branches, g, part
    dz, d_projections = attend_backward(
        [d_attended], z, kept.q, kept.p, w.projections, spec.attention, spec.precision, wanted
    )
    got.update(zip(("first", "first_bias", "last", "last_bias"), d_projections, strict=True))
    del d_attended, z
    shifted, hidden = _shift(x, xb, live, w)
    d_inputs = []
    for (call, norm), part, (mean, rstd) in zip(_ATTENTIONS, torch.split(dz, counts), statistics, strict=True):
        rows_in = _attention_input(call, x, shifted, kept.conv, drops)
        weight, bias = getattr(w, norm), getattr(w, f"{norm}_bias")
        d_in, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
            part.to(residual), rows_in, rows_in.shape[-1:], mean, rstd, weight, bias, [True, True, True]
        )
        d_inputs.append(d_in)
        for name, value in ((norm, d_weight.to(wide)), (f"{norm}_bias", d_bias.to(wide))):
            before = got.get(name)
            got[name] = value if before is None else before + value
    del dz, part, shifted, x

    dx = _add(second, rows[PLAIN_ATTENTION], d_inputs[2], 1.0)
    d_shifted = _add(first, rows[SHIFTED_ATTENTION], d_inputs[1], 1.0)
    _shift_grad(dx, d_shifted, xb, hidden, live, w, got, wide)
    _add(dx, rows[CA_MLP], du, 1.0)
    d_conv = relu_grad(d_inputs[0].to(compute), kept.conv)
    keep("conv", d_conv, _take(xb, rows[CA_ATTENTION]))
    _add(dx, rows[CA_ATTENTION], d_inputs[0].add_(matmul(d_conv, w.conv)), 1.0)
    return dx, got


def _hidden_grad(grad: Tensor, dsa_up: Tensor, drops: LayerDrops) -> tuple[Tensor, int]:
    """Gradient of both branches' activations before GELU (n, S, 2D) from that of their sum; and the rows of the first."""
    calls = (SHIFTED_MLP, PLAIN_MLP)
    count = len(grad) if drops.rows[SHIFTED_MLP] is None else len(drops.rows[SHIFTED_MLP])  # type: ignore[arg-type]
    out = torch.empty_like(dsa_up)
    counts = [count, len(dsa_up) - count]
    for call, into, before in zip(calls, torch.split(out, counts), torch.split(dsa_up, counts), strict=True):
        scaled = _take(grad, drops.rows[call]) * _as(drops.factors[call], grad.dtype)
        torch.ops.aten.gelu_backward.grad_input(scaled, before, grad_input=into)
    return out, count


def _as(factor: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return factor.to(dtype) if isinstance(factor, Tensor) else factor


def _bias_grad(base: Tensor, factor: float | Tensor, wide: torch.dtype) -> Tensor:
    total = base.sum(1, dtype=wide)
    return (total * (factor[:, :, 0].to(wide) if isinstance(factor, Tensor) else factor)).sum(0)


def _shift_grad(
    dx: Tensor, grad: Tensor, xb: Tensor, hidden: Tensor, live: Tensor, w: Weights, got: dict[str, Tensor | None],
    wide: torch.dtype,
) -> None:  # fmt: skip
    """Add the dense shift's input gradient to dx, and leave its weights' in `got`."""
    n = xb.shape[1]
    dx.add_(grad)
    g = grad.index_select(1, live).to(xb.dtype)
    got["wt2"] = torch.bmm(g, hidden.mT).sum(0, dtype=wide)
    got["wt2_bias"] = g.sum((0, 2), dtype=wide)
    d_hidden = relu_grad(torch.matmul(w.wt2[live, :n].mT, g), hidden)
    got["wt1"] = torch.bmm(d_hidden, xb.mT).sum(0, dtype=wide)
    got["wt1_bias"] = d_hidden.sum((0, 2), dtype=wide)
    dx.add_(torch.matmul(w.wt1[:n, :n].mT, d_hidden).to(dx.dtype))


def unprepare(grads: dict[str, Tensor | None], w: Weights, gap: int) -> dict[str, Tensor | None]:
    """Turn gradients of prepared weights into those of the parameters of a layer over (N, S, D), of their shapes and types.

    Rows of the token mixture that reach no output get zeros.
    """
    out = dict(grads)
    for branch in ("ca", "dsa"):
        norm, up = f"{branch}_norm2", f"{branch}_up"
        grad, grad_bias = grads[up], grads[f"{up}_bias"]
        if grad is not None and grad_bias is not None:
            values = unfold(grad, grad_bias, getattr(w, up), getattr(w, norm), getattr(w, f"{norm}_bias"))
            out.update(zip((norm, f"{norm}_bias", up, f"{up}_bias"), values, strict=True))
    leading = grads["wt1"]
    assert leading is not None
    num_tokens, device = len(leading), leading.device
    for name, rows in (("wt1", torch.arange(num_tokens, device=device)), ("wt2", live_tokens(num_tokens, gap, device))):
        for key in (name, f"{name}_bias"):
            grad, parameter = grads[key], getattr(w, key)
            assert grad is not None
            spread = torch.zeros_like(parameter, dtype=grad.dtype)
            (spread[:, :num_tokens] if spread.dim() == 2 else spread).index_copy_(0, rows, grad)
            out[key] = spread
    shaped = {key: None if g is None else g.view_as(getattr(w, key)) for key, g in out.items()}
    return {key: None if g is None else g.to(getattr(w, key).dtype) for key, g in shaped.items()}
