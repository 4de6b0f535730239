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

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from fastskel.kernels._backend import INTERPRETED, Cost
from fastskel.kernels._decorrelation_triton import decorrelate_triton
from fastskel.kernels.reference.decorrelation import Energies, Options, pairs_of
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = [
    "Energies", "Forms", "Options", "choose_form", "decorrelate", "decorrelate_torch", "decorrelation",
    "decorrelation_cost", "pairs_of",
]  # fmt: skip

Form = Literal["gram", "direct"]
DEFAULTS = Options()
ALL = slice(None)
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# elements of what a block of columns or rows of all views holds: some megabytes, which stay in a processor's cache
BLOCK_ELEMENTS = 1 << 18
# narrower blocks slow the products down; more rows of a symmetric matrix are computed twice than needed
MIN_COLUMNS, LEAF_ROWS = 512, 128
# features of a panel of a D x D matrix: its results are added to (N, D), which must not cost more than the product
PANEL = 1024


class Forms(NamedTuple):
    """How the two kinds of energies are computed."""

    covariance: Form
    pairs: Form


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


_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b' for a (I, K) and b (J, K), both dense: by oneDNN, on AMD's CPUs twice as fast as the BLAS torch calls."""
    if _ONEDNN and a.device.type == "cpu" and a.dtype == torch.float32 and torch.backends.mkldnn.enabled:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return out
    return a @ b.mT


def _gram(x: Tensor, out: Tensor) -> None:
    """Write x x' for x (N, D) to out (N, N), the products above its diagonal copied from below."""
    rows = len(x)
    if rows <= LEAF_ROWS or x.device.type != "cpu":
        out.copy_(_product(x, x))
        return
    half = (rows // 2 + 15) // 16 * 16
    _gram(x[:half], out[:half, :half])
    _gram(x[half:], out[half:, half:])
    below = _product(x[half:], x[:half])
    out[half:, :half] = below
    out[:half, half:] = below.mT


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of a * b for (I, J), (), in float64: it is made of many terms, and others are taken off."""
    rows = _step(a.device, a.shape[-1], len(a), 1)
    return torch.stack([(p * q).sum(dtype=torch.float64) for p, q in zip(torch.split(a, rows), torch.split(b, rows))]).sum()


def _step(device: torch.device, others: int, size: int, least: int) -> int:
    """Return how many of `size` rows or columns with `others` elements each make a block; on a GPU it is all of them."""
    return max(least, BLOCK_ELEMENTS // others) if device.type == "cpu" else size


def _blocks(z: Tensor) -> Iterator[slice]:
    num_views, rows, width = z.shape
    step = _step(z.device, num_views * rows, width, MIN_COLUMNS)
    return (slice(start, min(start + step, width)) for start in range(0, width, step))


class _Pass:
    """One call of `decorrelate_torch`: statistics of embeddings (W, N, D), and the gradient that its stages add to."""

    def __init__(self, z: Tensor, options: Options, weights: Energies | None) -> None:
        self.z, self.options = z, options
        self.type = torch.promote_types(z.dtype, torch.float32)
        self.num_views, self.rows, self.width = z.shape
        pairs: list[tuple[int, int]] = pairs_of(self.num_views) if options.pairs else []
        self.first, self.second = [a for a, _ in pairs], [b for _, b in pairs]
        self.weights = None if weights is None else Energies(*(weight.to(self.type) for weight in weights))
        self.grad = None if weights is None else self.empty(*z.shape)
        # the mean and its rounding error, without which columns of large means would not sum to zero
        self.mean, self.rest, self.moment = self.empty(3, self.num_views, 1, self.width)
        for columns in _blocks(z):
            x = z[..., columns].to(self.type)
            torch.mean(x, 1, keepdim=True, out=self.mean[..., columns])
            x = x - self.mean[..., columns]
            torch.mean(x, 1, keepdim=True, out=self.rest[..., columns])
            x.sub_(self.rest[..., columns]).square_()
            torch.sum(x, 1, keepdim=True, out=self.moment[..., columns])
        self.moment = self.moment[:, 0]
        self.scale = torch.rsqrt(self.moment / (self.rows - options.correction) + options.std_eps)

    def empty(self, *shape: int) -> Tensor:
        return self.z.new_empty(shape, dtype=self.type)

    def centred(self, views: int | slice, columns: slice = ALL) -> Tensor:
        x: Tensor = self.z[views, :, columns].to(self.type) - self.mean[views, :, columns]
        return x.sub_(self.rest[views, :, columns])

    def scales_of_pairs(self, columns: slice = ALL) -> Tensor:
        """Return products of the scales of both views, (P, B), for P at least 1; no list of views is sent to a GPU."""
        scales = self.scale[:, columns]
        return torch.stack([scales[a] * scales[b] for a, b in zip(self.first, self.second)])

    def spread(self, values: Tensor, matrix: Tensor) -> None:
        """Write values of pairs (P, ...) to a symmetric matrix (W, W, ...), one by one: index lists would be copied to a GPU."""
        for value, a, b in zip(values, self.first, self.second):
            matrix[a, b] = value
            matrix[b, a] = value

    def covariance_by_gram(self, view: int) -> Tensor:
        """Return a view's energy, (), and add its gradient but for what its own diagonal takes off."""
        x, matrix = self.centred(view), self.empty(self.rows, self.rows)
        _gram(x, matrix)
        moment = self.moment[view].double()
        energy: Tensor = (_inner(matrix, matrix) - moment.square().sum()) / (self.rows - 1) ** 2
        if self.weights is not None and self.grad is not None:
            matrix.mul_(self.weights.covariance[view] * (4.0 / (self.rows - 1) ** 2))
            for columns in _blocks(self.z):
                self.grad[view, :, columns].add_(_product(matrix, x[:, columns].contiguous().mT))
        return energy

    def covariance_directly(self, view: int) -> Tensor:
        """Return a view's energy, (), and add its gradient."""
        x, parts = self.centred(view), []
        for start in range(0, self.width, PANEL):
            columns = slice(start, start + PANEL)
            panel = _product(x[:, columns].contiguous().mT, x.mT)
            panel[:, columns].diagonal().zero_()
            parts.append(_inner(panel, panel))
            if self.weights is not None and self.grad is not None:
                panel.mul_(self.weights.covariance[view] * (4.0 / (self.rows - 1) ** 2))
                self.grad[view, :, columns].add_(_product(x, panel))
        return torch.stack(parts).sum() / (self.rows - 1) ** 2

    def pairs_by_gram(self) -> tuple[Tensor, Tensor | None]:
        """Return energies with their diagonals, (P,), and sum_b 2 f_ab G_b / N^2 for every view a, (W, N, N)."""
        grams = self.empty(self.num_views, self.rows, self.rows)
        for view, gram in enumerate(grams):
            _gram(self.centred(view).mul_(self.scale[view]), gram)
        parts = [_inner(grams[a], grams[b]) for a, b in zip(self.first, self.second)]
        energies = torch.stack(parts) / self.rows**2
        if self.weights is None:
            return energies, None
        factors = self.weights.off_diagonal * (2.0 / self.rows**2)
        for rows in torch.split(grams, _step(self.z.device, self.num_views * self.rows, self.rows, 1), 1):
            mixed = torch.zeros_like(rows)
            # no view has a part of its own, not even times zero, which would spread the NaN of one constant feature
            for factor, a, b in zip(factors, self.first, self.second):
                mixed[a].addcmul_(rows[b], factor)
                mixed[b].addcmul_(rows[a], factor)
            rows.copy_(mixed)
        return energies, grams

    def pairs_directly(self) -> Tensor:
        """Return energies, (P,), and write the gradients of the standardised views to `grad`."""
        u = torch.stack([self.centred(view).mul_(self.scale[view]) for view in range(self.num_views)])
        if self.grad is not None:
            self.grad.zero_()
        energies = []
        for pair, (a, b) in enumerate(zip(self.first, self.second)):
            parts = []
            for start in range(0, self.width, PANEL):
                columns = slice(start, start + PANEL)
                part = u[a, :, columns].contiguous()
                panel = _product(part.mT, u[b].mT)
                panel[:, columns].diagonal().zero_()
                parts.append(_inner(panel, panel))
                if self.weights is None or self.grad is None:
                    continue
                panel.mul_(self.weights.off_diagonal[pair] * (2.0 / self.rows**2))
                self.grad[a, :, columns].add_(_product(u[b], panel))
                # in pieces: what is added to (N, D) need not be another of that size
                for other in _blocks(self.z):
                    self.grad[b, :, other].add_(_product(part, panel[:, other].contiguous().mT))
            energies.append(torch.stack(parts).sum() / self.rows**2)
        return torch.stack(energies)

    def sweep(self, forms: Forms, grams: Tensor | None) -> Tensor:
        """Return sums over N of products of pairs of views, (P, D), and write all of `grad` but the covariances' products."""
        dots = self.empty(len(self.first), self.width)
        for columns in _blocks(self.z):
            x = self.centred(ALL, columns)
            for view in range(self.num_views - 1 if self.first else 0):
                own = self.first.index(view)
                products = x[view + 1 :] * x[view]
                torch.sum(products, 1, out=dots[own : own + len(products), columns])
            if self.grad is None:
                continue
            diagonal, out = self._own(forms, columns), self.grad[..., columns]
            if not self.first:
                torch.mul(x, diagonal[:, None], out=out)
                continue
            mixing, taken = self._mixing(forms, columns, dots[:, columns])
            scale = self.scale[:, columns]
            if grams is None:
                grad = out * scale[:, None]
            else:
                grad, square = torch.empty_like(x), scale.square()
                for view in range(self.num_views):
                    torch.mul(_product(grams[view], x[view].mT), square[view], out=grad[view])
            taken += (grad * x).sum(1)
            diagonal -= taken * scale.square() / (self.rows - self.options.correction)
            mixing.diagonal().copy_(diagonal.mT)
            for view in range(self.num_views - 1):
                grad.addcmul_(x[view], mixing[:, view, None])
            torch.addcmul(grad, x[-1], mixing[:, -1, None], out=out)
        return dots

    def _own(self, forms: Forms, columns: slice) -> Tensor:
        """Return the factor of x in its own gradient, of the hinge and of the covariances' diagonal, (W, B)."""
        assert self.weights is not None
        moment = self.moment[:, columns]
        deviation = torch.sqrt(moment / (self.rows - 1) + self.options.variance_eps)
        slope = -self.weights.hinge[:, None] / (self.width * (self.rows - 1)) / deviation
        factor = torch.where(deviation < self.options.gamma, slope, 0.0)
        if forms.covariance == "gram" and self.options.covariances:
            factor -= moment * (4.0 / (self.rows - 1) ** 2 * self.weights.covariance[:, None])
        return factor

    def _mixing(self, forms: Forms, columns: slice, dots: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of views x in the gradients of others, (W, W, B), and their part of sum_n(s du x), (W, B)."""
        assert self.weights is not None
        scale = self.scales_of_pairs(columns) / self.rows
        correlation = dots * scale
        factor = self.weights.on_diagonal[:, None] * (correlation - 1.0)
        if forms.pairs == "gram":
            factor -= self.weights.off_diagonal[:, None] * correlation
        factor *= 2.0 * scale
        mixing = self.empty(self.num_views, self.num_views, dots.shape[1])
        self.spread(factor, mixing)
        taken = torch.zeros_like(mixing[0])
        for pair, (a, b) in enumerate(zip(self.first, self.second)):
            taken[a].addcmul_(factor[pair], dots[pair])
            taken[b].addcmul_(factor[pair], dots[pair])
        return mixing, taken


@torch.no_grad()
def decorrelate_torch(
    z: Tensor, options: Options, weights: Energies | None = None, forms: Forms | None = None
) -> tuple[Energies, Tensor | None]:
    """Compute what `decorrelate` does by torch's own products, in given forms or in the faster ones.

    Beside the gradient it holds one matrix N x N per view, or, in the direct form, panels of a D x D matrix.
    """
    forms = forms or choose_form(z.shape[1], z.shape[2], z.shape[0], z.device)
    with torch.autocast(z.device.type, enabled=False):
        state = _Pass(z, options, weights)
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
