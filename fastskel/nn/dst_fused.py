"""The dense spatio-temporal layer on a GPU: the same passes as `dst_function`, with fused kernels between the matrix products.

Between two products the plain functions read and write their rows several times, once for each operation; here one kernel does
all of it in one pass. What is kept, and what is computed again, is the same. Rows that DropPath leaves out are gathered and
scattered inside the kernels, by `LayerDrops.slots`.

    forward     dense_shift            x -> its cast, the mixture, its normalised rows
                layer_norm (two terms) x + conv and x -> normalised rows of the other two attentions
                attention              between its two products
                layer_norm (one)       x + m att -> normalised rows of CA's MLP
                layer_norm (two)       both dense shift branches -> normalised rows, and half of their sum
                mlp_hidden (twice)     GELU; both dense shift branches in one sum
                mlp_residual           sum of everything
    backward    mlp_residual, mlp_hidden (twice), layer_norm (three times), attention, dense_shift;
                dense_shift and layer_norm again, for the normalised rows that were not kept

Source: specification of USDRL, sections 1.3 to 1.8.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from fastskel.kernels.dense_shift import dense_shift_backward, dense_shift_forward
from fastskel.kernels.layer_norm import Term, TermGrad, layer_norm_backward, layer_norm_forward
from fastskel.kernels.mlp_hidden import Hidden, mlp_hidden, mlp_hidden_backward
from fastskel.kernels.mlp_residual import Branch, mlp_residual, mlp_residual_backward
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
from fastskel.nn.dst_function import Kept, LayerSpec, Weights, live_tokens
from fastskel.nn.gemm import linear, matmul, weight_grad

__all__ = ["backward", "forward"]

ATTENTIONS = (CA_ATTENTION, SHIFTED_ATTENTION, PLAIN_ATTENTION)


def _take(t: Tensor, rows: Tensor | None) -> Tensor:
    return t if rows is None else t.index_select(0, rows)


def _counts(drops: LayerDrops, calls: Collection[int], num_rows: int) -> list[int]:
    """Samples that each of the branches computes, of N."""
    chosen = [drops.rows[call] for call in calls]
    return [num_rows if rows is None else len(rows) for rows in chosen]


def _attention_rows(
    x: Tensor, conv: Tensor | None, w: Weights, drops: LayerDrops, spec: LayerSpec
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, list[tuple[Tensor, Tensor]]]:
    """Normalise the rows of all attentions into one batch.

    Args:
        x: Tokens, (N, S, D), in the residual type, or in the backward pass in the compute type.
        conv: Rectified convolution (n, S, D), None to compute it.
        w: Prepared weights.
        drops: What is dropped.
        spec: The rest.
    Returns:
        Normalised rows (n, S, D); the convolution; the token mixture (N, S, D), unless the convolution was given; the input
        in the compute type; mean and 1 / deviation of the three parts.
    """
    n, s, d = x.shape
    compute, slots = spec.precision.compute, drops.slots
    counts = _counts(drops, ATTENTIONS, n)
    z = x.new_empty(sum(counts), s, d, dtype=compute)
    z_ca, z_shifted, z_plain = torch.split(z, counts)
    shifted, xb, *shifted_stats = dense_shift_forward(
        x, w.wt1[:s, :s], w.wt1_bias[:s], w.wt2[:s, :s], w.wt2_bias[:s], spec.gap, w.dsa_norm1, w.dsa_norm1_bias, spec.eps,
        z=z_shifted, slots=slots[SHIFTED_ATTENTION], want_cast=conv is None, want_shifted=conv is None,
        residual=spec.precision.residual,
    )  # fmt: skip
    if conv is None:
        conv = linear(_take(xb, drops.rows[CA_ATTENTION]), w.conv, w.conv_bias, "relu")
    (ca_stats, plain_stats), _ = layer_norm_forward(
        [
            Term(
                x, z_ca, slots[CA_ATTENTION], branch=conv, branch_slots=slots[CA_ATTENTION],
                weight=w.ca_norm1, bias=w.ca_norm1_bias,
            ),
            Term(x, z_plain, slots[PLAIN_ATTENTION], weight=w.dsa_norm1, bias=w.dsa_norm1_bias),
        ],
        spec.eps,
    )  # fmt: skip
    return z, conv, shifted, xb, [ca_stats, tuple(shifted_stats), plain_stats]


def forward(x: Tensor, w: Weights, drops: LayerDrops, spec: LayerSpec) -> tuple[Tensor, Tensor, Kept]:
    """Run a layer; arguments and results are those of `dst_function.forward`, tokens (N, S, D)."""
    n, s, d = x.shape
    compute, slots, half = spec.precision.compute, drops.slots, 0.5 * (1.0 - spec.alpha)
    if any(rows is not None and places is None for rows, places in zip(drops.rows, slots, strict=True)):
        raise ValueError("dst_fused: drops must have slots where they have rows, got none. Plan them with slots=True.")
    x = x.contiguous()
    z, conv, shifted, xb, _ = _attention_rows(x, None, w, drops, spec)
    attended, q, p = attend(z, w.projections, spec.attention, spec.precision, keep=spec.memory != "layer")
    del z
    a_ca, a_shifted, a_plain = torch.split(attended, _counts(drops, ATTENTIONS, n))

    ca = x.new_empty(*_counts(drops, [CA_MLP], n), s, d, dtype=compute)
    [(_, ca_rstd)], _ = layer_norm_forward(
        [Term(x, ca, slots[CA_MLP], a_ca, slots[CA_ATTENTION], *drops.scale(CA_ATTENTION))], spec.eps
    )
    counts = _counts(drops, [SHIFTED_MLP, PLAIN_MLP], n)
    dsa = x.new_empty(sum(counts), s, d, dtype=compute)
    dsa_shifted, dsa_plain = torch.split(dsa, counts)
    stats, total = layer_norm_forward(
        [
            Term(
                shifted, dsa_shifted, slots[SHIFTED_MLP],
                a_shifted, slots[SHIFTED_ATTENTION], *drops.scale(SHIFTED_ATTENTION),
            ),
            Term(x, dsa_plain, slots[PLAIN_MLP], a_plain, slots[PLAIN_ATTENTION], *drops.scale(PLAIN_ATTENTION)),
        ],
        spec.eps, total_scale=half,
    )  # fmt: skip
    dsa_rstd = torch.cat([rstd for _, rstd in stats])
    del attended, a_ca, a_shifted, a_plain, shifted

    ca_up = linear(ca, w.ca_up, w.ca_up_bias)
    dsa_up = linear(dsa, w.dsa_up, w.dsa_up_bias)
    out = _output(total, ca_up, dsa_up, w, drops, spec)
    # (n, S, 1), as the plain passes keep them
    return out, xb, Kept(conv, q, p, ca, ca_rstd[..., None], ca_up, dsa, dsa_rstd[..., None], dsa_up)


def _hidden_terms(dsa_up: Tensor, num_rows: int, drops: LayerDrops) -> list[Hidden]:
    """Both dense shift branches of activations before GELU, (n, S, 2D)."""
    calls = (SHIFTED_MLP, PLAIN_MLP)
    parts = torch.split(dsa_up, _counts(drops, calls, num_rows))
    return [Hidden(up, drops.slots[call], *drops.scale(call)) for up, call in zip(parts, calls, strict=True)]


def _output(
    total: Tensor, ca_up: Tensor, dsa_up: Tensor, w: Weights, drops: LayerDrops, spec: LayerSpec
) -> Tensor:
    """Add what both MLPs make of their activations before GELU (n, S, 2D) to `total` (N, S, D)."""
    n, half = len(total), 0.5 * (1.0 - spec.alpha)
    scale, factor = drops.scale(CA_MLP)
    times, bias_factor = drops.bias_scale()
    # one number for all samples is the bias' own
    bias = w.dsa_down_bias * times if bias_factor is None else w.dsa_down_bias
    mixed = linear(mlp_hidden(_hidden_terms(dsa_up, n, drops), "gelu", num_samples=n), w.dsa_down)
    own = linear(mlp_hidden([Hidden(ca_up)], "gelu", num_samples=len(ca_up)), w.ca_down, w.ca_down_bias)
    out: Tensor = mlp_residual(
        total,
        [
            Branch(mixed, scale=half, bias=bias, bias_factor=bias_factor, bias_scale=half),
            Branch(own, drops.slots[CA_MLP], scale * spec.alpha, factor),
        ],
        out=total,
    )
    return out


def backward(
    grad: Tensor, xb: Tensor, kept: Kept, w: Weights, drops: LayerDrops, spec: LayerSpec, need: Collection[str]
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Differentiate a layer; arguments and results are those of `dst_function.backward`, tokens (N, S, D)."""
    n, half, slots = len(xb), 0.5 * (1.0 - spec.alpha), drops.slots
    wide, residual = spec.precision.wide, spec.precision.residual
    assert kept.ca is not None and kept.ca_rstd is not None and kept.ca_up is not None and kept.conv is not None
    assert kept.dsa is not None and kept.dsa_rstd is not None and kept.dsa_up is not None
    grad = grad.to(residual).contiguous()
    got: dict[str, Tensor | None] = {}
    needed = set(need)
    # a folded normalisation gets its gradient from the linear's
    needed |= {name.replace("norm2", "up") for name in needed if "norm2" in name}

    def keep(name: str, g: Tensor, inp: Tensor, bias: Tensor | None) -> None:
        wanted = bool(needed & {name, name + "_bias"})
        got[name], got[name + "_bias"] = (weight_grad(g, inp, wide), bias) if wanted else (None, None)

    # both MLPs, back to what their normalisations made
    scale, factor = drops.scale(CA_MLP)
    times, bias_factor = drops.bias_scale()
    g_dsa, g_ca = torch.empty_like(xb), xb.new_empty(kept.ca.shape)
    dsa_bias, ca_bias = mlp_residual_backward(
        grad,
        [
            Branch(g_dsa, scale=half, bias=w.dsa_down_bias, bias_factor=bias_factor, bias_scale=half),
            Branch(g_ca, slots[CA_MLP], scale * spec.alpha, factor, bias=w.ca_down_bias),
        ],
    )
    if bias_factor is None:
        dsa_bias = dsa_bias * times
    d_up = matmul(g_ca, w.ca_down)
    hidden, d_bias = mlp_hidden_backward(
        d_up, [Hidden(kept.ca_up)], "gelu", d_ups=[d_up], want_hidden=True, want_bias=True
    )
    keep("ca_down", g_ca, hidden, ca_bias)
    keep("ca_up", d_up, kept.ca, d_bias)
    d_ca = matmul(d_up, w.ca_up)
    del g_ca, d_up, hidden
    d_up = torch.empty_like(kept.dsa_up)
    counts = _counts(drops, [SHIFTED_MLP, PLAIN_MLP], n)
    hidden, d_bias = mlp_hidden_backward(
        matmul(g_dsa, w.dsa_down), _hidden_terms(kept.dsa_up, n, drops), "gelu",
        d_ups=list(torch.split(d_up, counts)), want_hidden=True, want_bias=True,
    )  # fmt: skip
    keep("dsa_down", g_dsa, hidden, dsa_bias)
    keep("dsa_up", d_up, kept.dsa, d_bias)
    d_dsa = matmul(d_up, w.dsa_up)
    del g_dsa, d_up, hidden

    # the second normalisations, and the residual sums in front of them
    first, second = torch.empty_like(grad), torch.empty_like(grad)
    attention_counts = _counts(drops, ATTENTIONS, n)
    d_attended = xb.new_empty(sum(attention_counts), *xb.shape[1:])
    da_ca, da_shifted, da_plain = torch.split(d_attended, attention_counts)
    terms = []
    for part, xhat, rstd, into, d_branch, mlp, attention in zip(
        torch.split(d_dsa, counts), torch.split(kept.dsa, counts), torch.split(kept.dsa_rstd[..., 0], counts),
        (first, second), (da_shifted, da_plain), (SHIFTED_MLP, PLAIN_MLP), (SHIFTED_ATTENTION, PLAIN_ATTENTION),
        strict=True,
    ):  # fmt: skip
        scale, factor = drops.scale(attention)
        terms.append(
            TermGrad(
                part, rstd, into, slots[mlp], xhat=xhat, branch_slots=slots[attention], scale=scale, factor=factor,
                carry=grad, carry_scale=half, d_branch=d_branch, branch_sees_carry=True,
            )
        )  # fmt: skip
    layer_norm_backward(terms)
    scale, factor = drops.scale(CA_ATTENTION)
    layer_norm_backward(
        [
            TermGrad(
                d_ca, kept.ca_rstd[..., 0], second, slots[CA_MLP], xhat=kept.ca, branch_slots=slots[CA_ATTENTION],
                scale=scale, factor=factor, carry=second, d_branch=da_ca,
            )
        ]
    )  # fmt: skip
    del terms, d_dsa, d_ca, part, xhat, d_branch, da_ca, da_shifted, da_plain

    # the three attentions as one batch, from rows that are made again
    z, conv, _, _, stats = _attention_rows(xb, kept.conv, w, drops, spec)
    wanted = (bool(needed & {"first", "first_bias"}), bool(needed & {"last", "last_bias"}))
    grads = [d_attended]
    del d_attended
    dz, d_projections = attend_backward(
        grads, z, kept.q, kept.p, w.projections, spec.attention, spec.precision, wanted
    )
    got.update(zip(("first", "first_bias", "last", "last_bias"), d_projections, strict=True))
    del z
    dz_ca, dz_shifted, dz_plain = torch.split(dz, attention_counts)
    (ca_mean, ca_rstd), (shifted_mean, shifted_rstd), (plain_mean, plain_rstd) = stats
    d_conv = torch.empty_like(conv)
    (ca_norm, plain_norm) = layer_norm_backward(
        [
            TermGrad(
                dz_ca, ca_rstd, second, slots[CA_ATTENTION], mean=ca_mean, base=xb, branch=conv,
                branch_slots=slots[CA_ATTENTION], weight=w.ca_norm1, carry=second, d_branch=d_conv, relu_mask=True,
            ),
            TermGrad(
                dz_plain, plain_rstd, second, slots[PLAIN_ATTENTION], mean=plain_mean, base=xb, weight=w.dsa_norm1,
            ),
        ]
    )  # fmt: skip
    keep("conv", d_conv, _take(xb, drops.rows[CA_ATTENTION]), None)
    if got["conv"] is not None:
        got["conv_bias"] = d_conv.sum((0, 1), dtype=wide)
    s = xb.shape[1]
    wt1, wt1_bias, wt2, wt2_bias, *shifted_norm = dense_shift_backward(
        dz_shifted, first, second, xb, w.wt1[:s, :s], w.wt1_bias[:s], w.wt2[:s, :s], w.wt2_bias[:s], spec.gap,
        w.dsa_norm1, shifted_mean, shifted_rstd, slots[SHIFTED_ATTENTION],
        extra=matmul(d_conv, w.conv), extra_slots=slots[CA_ATTENTION],
    )  # fmt: skip
    live = live_tokens(s, spec.gap, xb.device)
    got.update(wt1=wt1, wt1_bias=wt1_bias, wt2=wt2.index_select(0, live), wt2_bias=wt2_bias.index_select(0, live))
    got.update(zip(("ca_norm1", "ca_norm1_bias"), ca_norm, strict=True))
    for name, one, other in zip(("dsa_norm1", "dsa_norm1_bias"), shifted_norm, plain_norm, strict=True):
        got[name] = one + other
    return second, got
