"""One pass over the embeddings of views by torch's own products: statistics, energies in either form, the gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from fastskel.kernels.reference.decorrelation import Energies, Options, pairs_of
from torch import Tensor

__all__ = ["Forms", "Pass"]

Form = Literal["gram", "direct"]
ALL = slice(None)
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


class Pass:
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
