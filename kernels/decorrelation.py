r"""Energies of the covariances and cross-correlations of views, and their gradient, without a D x D matrix.

For a view x (N, D) less its mean over N, with m = sum_n x^2, u = x s and s = (m / (N - correction) + std_eps)^-1/2:
    covariance = (||K||^2 - sum_d m^2) / (N - 1)^2,     K = x x'
    on = sum_d (c_dd - 1)^2,                            c_dd = sum_n u_a u_b / N
    off = <G_a, G_b> / N^2 - sum_d c_dd^2,              G = u u'
because ||x'x||^2 = ||xx'||^2 and ||u_a'u_b||^2 = <u_a u_a', u_b u_b'>. The gradients for weights k, o, f of the energies:
    dx = 4 k (K x - m x) / (N - 1)^2
    du_a = 2 / N sum_b (f_ab G_b u_a / N + (o_ab (c_dd - 1) - f_ab c_dd) u_b)
    dx_a = s du_a - x_a s^3 sum_n(du_a x_a) / (N - correction)
and the hinge adds -h x [sqrt(var + eps) < gamma] / (D (N - 1) sqrt(var + eps)), var = m / (N - 1). Columns of K x, G u and x
sum to zero, so that what flows through the mean is nothing. That is the Gram form: 2 W symmetric matrices N x N and as many
products of one with (N, D). Where N is well above D, the direct form takes panels of x'x or u_a'u_b with their diagonals
set to zero, one at a time, and uses each for energy and gradient at once. Either form serves either energy.
A feature that cannot be standardised (of variance 0 where std_eps is 0, or not finite) makes NaN where autograd of the definition
has it: in the energies of its view's pairs, in its own gradient, and in those of all features of the other views, for it is
correlated with each of them; its view's other features keep theirs. What is not finite makes NaN of its view's covariances too.
Bytes moved: z read and the gradient written; eager torch passes some ten times over each of W + P matrices D x D.
Source: the identity of Frobenius norms of x'x and xx'; energies as in VICReg (Bardes et al., 2022) and Barlow Twins
(Zbontar et al., 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastskel.kernels._backend import INTERPRETED, Cost
from fastskel.kernels._decorrelation_pass import Forms, Pass
from fastskel.kernels._decorrelation_triton import decorrelate_triton
from fastskel.kernels.reference.decorrelation import Energies, Options, pairs_of
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = [
    "Energies", "Forms", "Options", "choose_form", "decorrelate", "decorrelate_torch", "decorrelation",
    "decorrelation_cost", "pairs_of",
]  # fmt: skip

DEFAULTS = Options()
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# compute capabilities for which a row of bench/results shows that Triton's kernels win; none is measured yet
MEASURED: frozenset[tuple[int, int]] = frozenset()

# N / D of equal times, forward and gradient: of the covariances, and of the pairs per other view. Measured on an AMD EPYC (Zen 5)
# for D of 256 to 2048: 1.0 to 1.35, and 0.65 to 1.0; counted in operations for a GPU
CROSSOVERS = {"cpu": (1.2, 0.85), "cuda": (1.0, 0.75)}


def choose_form(num_rows: int, width: int, num_views: int, device: torch.device) -> Forms:
    """Choose forms for embeddings (W, N, D): Gram matrices of small batches, D x D in panels of large ones.

    Covariances take the faster one: one matrix at a time is alive. Pairs of views hold one Gram matrix per view, which would win
    for longer with more views, until N = 2.5 D with four; but above N = D they would be larger than D x D matrices.
    """
    covariance, pairs = CROSSOVERS.get(device.type, CROSSOVERS["cuda"])
    return Forms(
        "gram" if num_rows <= covariance * width else "direct",
        "gram" if num_rows <= min(pairs * max(num_views - 1, 1), 1.0) * width else "direct",
    )


def decorrelation(z: Tensor, options: Options = DEFAULTS) -> Energies:
    """Compute the energies of embeddings; differentiable once, the backward pass computes them again.

    Args:
        z: Embeddings, (W, N, D), float64, float32, bfloat16 or float16.
        options: Constants of the energies, and which of them are computed.
    Returns:
        Energies, (W,) or (P,) each, float64 for float64 and else float32, whatever autocast says.
    Raises:
        ValueError: On another type or shape, N below 2 or not above the correction.
    """
    if z.dim() != 3 or z.shape[0] < 1 or z.shape[1] < 2 or z.shape[2] < 1:
        raise ValueError(
            f"decorrelation: z must be (W, N, D) with N at least 2, got {tuple(z.shape)}. "
            "Stack the views of the samples; statistics over the batch need two of them."
        )
    if z.dtype not in TYPES:
        raise ValueError(f"decorrelation: z must be one of {[str(t) for t in TYPES]}, got {z.dtype}. Convert it.")
    if options.correction >= z.shape[1]:
        raise ValueError(
            f"decorrelation: options.correction must be below N = {z.shape[1]}, got {options.correction}. "
            "Use 0 or 1, or enlarge the batch."
        )
    return Energies(*_operator(z, *options))


def decorrelate(z: Tensor, options: Options, weights: Energies | None = None) -> tuple[Energies, Tensor | None]:
    """Compute the energies of embeddings and, given weights, the gradient of their weighted sum: one pass of a loss.

    Nothing is checked, nothing is differentiable: a loss that knows its weights keeps the gradient for its backward pass.

    Args:
        z: Embeddings, (W, N, D).
        options: Constants of the energies, and which of them are computed.
        weights: A weight for each energy, (W,), (W,), (P,) and (P,) on the device of z; P is 0 without pairs.
    Returns:
        The energies, and the gradient (W, N, D) in float32, in float64 for float64, or None without weights.
    """
    z = z.detach()
    if weights is None:
        return Energies(*_operator(z, *options)), None
    *energies, grad = _gradient_operator(z, *options, *weights)
    return Energies(*energies), grad


@torch.no_grad()
def decorrelate_torch(
    z: Tensor, options: Options, weights: Energies | None = None, forms: Forms | None = None
) -> tuple[Energies, Tensor | None]:
    """Compute what `decorrelate` does by torch's own products, in given forms or in the faster ones.

    Beside the gradient it holds one matrix N x N per view, or, in the direct form, panels of a D x D matrix.
    """
    forms = forms or choose_form(z.shape[1], z.shape[2], z.shape[0], z.device)
    with torch.autocast(z.device.type, enabled=False):
        state = Pass(z, options, weights)
        on, off, grams = state.empty(0), state.empty(0), None
        if state.first:
            off, grams = state.pairs_by_gram() if forms.pairs == "gram" else (state.pairs_directly(), None)
        dots = state.sweep(forms, grams)
        del grams
        if state.first:
            c = dots * state.scales_of_pairs() / state.rows
            on = (c - 1.0).square().sum(1)
            if forms.pairs == "gram":
                off = off - c.square().sum(1, dtype=torch.float64)
        covariance = state.moment.new_zeros(state.num_views)
        if options.covariances:
            one = state.covariance_by_gram if forms.covariance == "gram" else state.covariance_directly
            covariance = torch.stack([one(view) for view in range(state.num_views)])
        deviation = torch.sqrt(state.moment / (state.rows - 1) + options.variance_eps)
        hinge = torch.relu(options.gamma - deviation).mean(1)
        energies = Energies(hinge, covariance.to(state.type), on, off.to(state.type))
    return energies, state.grad


def _pass_for(z: Tensor) -> Callable[[Tensor, Options, Energies | None], tuple[Energies, Tensor | None]]:
    """Return what computes a pass on embeddings (W, N, D): Triton's kernels where they were measured to win, or interpreted."""
    measured = z.is_cuda and torch.cuda.get_device_capability(z.device) in MEASURED
    return decorrelate_triton if (measured or INTERPRETED) and z.dtype != torch.float64 else decorrelate_torch


def decorrelation_cost(
    num_views: int, num_rows: int, width: int, itemsize: int, *, options: Options = DEFAULTS, backward: bool = False
) -> Cost:
    """Return what the energies of (W, N, D), or they and a gradient, cost at least, each in the form of fewer operations."""
    # half of a symmetric matrix, and its product with all rows or all columns
    small, times = min(num_rows, width), 3 if backward else 1
    covariance = num_views * times * small * num_rows * width
    direct = num_views * (num_views - 1) * times * num_rows * width**2
    gram = num_views * times * num_rows**2 * width
    size = num_views * num_rows * width
    return Cost(
        covariance * options.covariances + min(direct, gram) * (options.pairs and num_views > 1),
        size * (itemsize + (max(itemsize, 4) if backward else 0)),
    )


_OPTIONS = "float gamma, float variance_eps, float std_eps, int correction, bool pairs, bool covariances"
_COUNT = len(Options._fields)


def _energies(z: Tensor, *options: Any) -> tuple[Tensor, ...]:
    energies, _ = _pass_for(z)(z, Options(*options), None)
    return tuple(energies)


def _energies_and_gradient(z: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    options, weights = Options(*rest[:_COUNT]), Energies(*rest[_COUNT:])
    energies, grad = _pass_for(z)(z, options, weights)
    return (*energies, grad)


_operator = torch.library.custom_op(
    "fastskel::decorrelation", _energies, mutates_args=(),
    schema=f"(Tensor z, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
_gradient_operator = torch.library.custom_op(
    "fastskel::decorrelation_gradient", _energies_and_gradient, mutates_args=(),
    schema=f"(Tensor z, {_OPTIONS}, Tensor hinge, Tensor covariance, Tensor on_diagonal, Tensor off_diagonal)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip


@_operator.register_fake
def _(z: Tensor, *options: Any) -> tuple[Tensor, ...]:
    views = z.shape[0]
    num_pairs = views * (views - 1) // 2 if Options(*options).pairs else 0
    wide = torch.promote_types(z.dtype, torch.float32)
    return tuple(z.new_empty(size, dtype=wide) for size in (views, views, num_pairs, num_pairs))


@_gradient_operator.register_fake
def _(z: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    wide = torch.promote_types(z.dtype, torch.float32)
    return (*(torch.empty_like(weight, dtype=wide) for weight in rest[_COUNT:]), z.new_empty(z.shape, dtype=wide))


@register_flop_formula(torch.ops.fastskel.decorrelation)
def _flops(z: tuple[int, int, int], *options: Any, **_: Any) -> int:
    return int(decorrelation_cost(*z, 4, options=Options(*options)).flops)


@register_flop_formula(torch.ops.fastskel.decorrelation_gradient)
def _gradient_flops(z: tuple[int, int, int], *rest: Any, **_: Any) -> int:
    return int(decorrelation_cost(*z, 4, options=Options(*rest[:_COUNT]), backward=True).flops)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, *options = inputs
    ctx.save_for_backward(z)
    ctx.options = options


def _differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    (z,) = ctx.saved_tensors
    *_, grad = _gradient_operator(z, *ctx.options, *grads)
    return grad.to(z.dtype), *(None for _ in ctx.options)


_operator.register_autograd(_differentiate, setup_context=_keep)
