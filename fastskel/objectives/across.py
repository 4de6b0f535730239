"""Decorrelation of a batch whose rows lie in several processes, each of which computes its share only.

Gradients of autograd's functions here are made for DistributedDataParallel, which averages those of parameters over the
processes: see `mgfd_across`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from fastskel.dist import exchange, gather_rows, rank_and_world, start_sum
from fastskel.kernels.decorrelation import TYPES, Energies, Options, pairs_of
from fastskel.objectives.functional import Rows, attach, needs_gradient, pull, weigh_domains

if TYPE_CHECKING:
    # builds of torch without it train in one process
    from torch.distributed import ProcessGroup

__all__ = ["Form", "choose_across", "decorrelate_across", "mgfd_across", "similarity_across"]

Form = Literal["gram", "direct"]
# columns of a D x D matrix that travel at once: at D = 4096 a message of 8 MiB in float32
PANEL = 512


class _Batch(NamedTuple):
    """This process's rows of a batch, and what is known of the whole of it.

    Attributes:
        x: Rows about the mean of the batch, (W, n, D).
        centre: That mean and its rounding error, which is taken off after it, (2, W, D).
        second: Sums of squares over the batch, (W, D).
        counts: Rows of every process, by rank.
        group: The processes.
    """

    x: Tensor
    centre: Tensor
    second: Tensor
    counts: Sequence[int]
    group: ProcessGroup | None

    @property
    def num_rows(self) -> int:
        return sum(self.counts)


class _Block(NamedTuple):
    """Columns from `start` on of u_a'u_b, (D, B); of x'x where a is b, from the row `start` on, (D - start, B)."""

    a: int
    b: int
    start: int
    values: Tensor


class _Parts(NamedTuple):
    """What a form computes.

    Attributes:
        covariance: Energy off the diagonal of x'x, (W,), without its factor.
        off_diagonal: Energy off the diagonal of u_a'u_b, (P,), without its factor.
        grad_x: A quarter of the first energy's gradient by x, x @ (x'x off its diagonal), (W, n, D).
        grad_u: Half of the second's, weighted: sum over b of f_ab * u_b @ (u_b'u_a off its diagonal), (W, n, D).
    """

    covariance: Tensor
    off_diagonal: Tensor
    grad_x: Tensor | None
    grad_u: Tensor | None


def _sum(x: Tensor, group: ProcessGroup | None) -> Tensor:
    if work := start_sum(x, group):
        work.wait()
    return x


def _about_mean(z: Tensor, counts: Sequence[int], group: ProcessGroup | None) -> _Batch:
    x, centre = z.to(torch.promote_types(z.dtype, torch.float32)), []
    # a mean far above the deviation is rounded in units that are not small beside it
    for _ in range(2):
        centre.append(_sum(x.sum(1), group) / sum(counts))
        x = x - centre[-1][:, None]
    # second moments of what is centred: differences of large sums would lose all digits
    return _Batch(x, torch.stack(centre), _sum(x.square().sum(1), group), counts, group)


def _by_grams(
    z: Tensor, batch: _Batch, u: Tensor, scale: Tensor, dots: Tensor, pair_weights: Tensor | None, covariances: bool
) -> _Parts:
    """Compute from this process's rows of the N x N matrices x x' and u u', which need everybody's rows.

    Args:
        z: Rows as they are sent, in their own type, (W, n, D).
        batch: The same about their mean, and its statistics.
        u: Standardised rows, (W, n, D); (0, n, D) where pairs are not compared.
        scale: What standardises, (W, D).
        dots: Column sums of u_a * u_b, (P, D).
        pair_weights: Weights f_ab of the off-diagonal energies, (W, W), symmetric; None without gradient.
        covariances: Whether x x' is computed.
    """
    x, (num_views, rows, _) = batch.x, batch.x.shape
    everyone = gather_rows(z, batch.group, batch.counts)

    def about_mean(view: int) -> Tensor:
        mean, rest = batch.centre[:, view]
        centred: Tensor = everyone[view].to(x.dtype) - mean
        return centred.sub_(rest)

    with_gradient = pair_weights is not None
    grad_x, grad_u = torch.zeros_like(x) if with_gradient else None, None
    grams = x.new_empty(len(u), rows, batch.num_rows)
    energies = x.new_zeros(num_views, dtype=torch.float64)
    for view in range(num_views):
        everything = about_mean(view)
        if covariances:
            gram = x[view] @ everything.T
            energies[view] = torch.linalg.vector_norm(gram, dim=1).double().square().sum()
            if grad_x is not None:
                torch.mm(gram, everything, out=grad_x[view]).addcmul_(x[view], batch.second[view], value=-1.0)
        if len(u):
            torch.mm(u[view], everything.mul_(scale[view]).T, out=grams[view])
    # inner products of all pairs of matrices
    by_row = grams.transpose(0, 1)
    inner = (by_row @ by_row.mT).sum(0, dtype=torch.float64)
    # what the diagonals take away from these may be most of them
    sums = _sum(torch.cat([energies, inner.flatten()]), batch.group)
    covariance = sums[:num_views]
    if covariances:
        covariance -= batch.second.double().square().sum(1)
    inner = sums[num_views:].view(len(u), len(u))
    pairs = pairs_of(len(u))
    off = torch.stack([inner[a, b] for a, b in pairs]) - dots.double().square().sum(1) if pairs else sums.new_zeros(0)
    if pairs and pair_weights is not None:
        grad_u = torch.empty_like(u)
        for view in range(num_views):
            # without its own, which would spread a constant feature's NaN: zero times NaN
            others = torch.zeros_like(grams[view])
            for other in range(num_views):
                if other != view:
                    others.addcmul_(grams[other], pair_weights[view, other])
            torch.mm(others, about_mean(view).mul_(scale[view]), out=grad_u[view])
        _add_pairs(grad_u, u, [-pair_weights[a, b] * dot for (a, b), dot in zip(pairs, dots, strict=True)])
    return _Parts(covariance.to(x.dtype), off.to(x.dtype), grad_x, grad_u)


def _summed(blocks: Iterable[_Block], group: ProcessGroup | None) -> Iterator[_Block]:
    """Sum blocks over the processes; one travels while the one before is used."""
    before = None
    for block in itertools.chain(blocks, [None]):
        now = None if block is None else (block, start_sum(block.values, group))
        if before is not None:
            if before[1]:
                before[1].wait()
            yield before[0]
        before = now


def _by_panels(batch: _Batch, u: Tensor, pair_weights: Tensor | None, covariances: bool) -> _Parts:
    """Compute from the D x D matrices x'x and u_a'u_b, a panel of columns at a time; arguments as of `_by_grams`."""
    x, (num_views, _, width) = batch.x, batch.x.shape
    pairs = pairs_of(len(u))
    number = {pair: index for index, pair in enumerate(pairs)}
    covariance, off = x.new_zeros(num_views), x.new_zeros(len(pairs))
    with_gradient = pair_weights is not None
    grad_x = torch.zeros_like(x) if with_gradient else None
    grad_u = torch.zeros_like(u) if with_gradient and pairs else None

    def blocks() -> Iterator[_Block]:
        for start in range(0, width, PANEL):
            panel = slice(start, start + PANEL)
            for view in range(num_views if covariances else 0):
                # symmetric: rows above the panel are columns of earlier ones
                yield _Block(view, view, start, x[view, :, start:].T @ x[view, :, panel])
            for a, b in pairs:
                yield _Block(a, b, start, u[a].T @ u[b, :, panel])

    for a, b, start, block in _summed(blocks(), batch.group):
        columns = block.shape[1]
        stop = start + columns
        if a == b:
            block.diagonal().zero_()
            square, below = block[:columns], block[columns:]
            covariance[a] += square.square().sum() + 2.0 * below.square().sum()
            if grad_x is not None:
                grad_x[a, :, start:stop] += x[a, :, start:] @ block
                grad_x[a, :, stop:] += x[a, :, start:stop] @ below.T
        else:
            block[start:stop].diagonal().zero_()
            off[number[a, b]] += block.square().sum()
            if grad_u is not None and pair_weights is not None:
                block *= pair_weights[a, b]
                grad_u[a] += u[b, :, start:stop] @ block.T
                grad_u[b, :, start:stop] += u[a] @ block
        # before the next one is made
        del block
    return _Parts(covariance, off, grad_x, grad_u)


def _add_pairs(grad: Tensor, u: Tensor, factors: Sequence[Tensor]) -> None:
    """Add factor (D,) * u_b to the gradient of u_a, and the reverse, for all pairs; (W, n, D)."""
    for (a, b), factor in zip(pairs_of(len(u)), factors, strict=True):
        grad[a].addcmul_(u[b], factor)
        grad[b].addcmul_(u[a], factor)


def choose_across(num_rows: int, width: int, num_views: int, world: int, itemsize: int, options: Options) -> Form:
    """Choose the form in which a process sends fewer bytes.

    With P = W (W - 1) / 2 pairs and R processes: `"gram"` gathers all rows, W N D (R - 1) / R elements of the embeddings' type.
    `"direct"` sums D x D matrices, 2 (W / 2 + P) D^2 (R - 1) / R elements of 4 bytes at least; of the W symmetric ones only the
    lower half travels, in whole blocks. The matrix products do not count, except in a single process, which sends nothing: there
    4 W N against (1.5 W + 3 P) D multiplications per row and feature decide.

    Args:
        num_rows: Rows N of the whole batch.
        width: Features D.
        num_views: Views W.
        world: Processes R.
        itemsize: Bytes of an element of the embeddings (W, N, D).
        options: Which energies are computed.
    """
    num_pairs = len(pairs_of(num_views)) if options.pairs else 0
    if world == 1:
        products = 2 * (options.pairs + options.covariances) * num_views * num_rows
        return "gram" if products <= (1.5 * num_views * options.covariances + 3 * num_pairs) * width else "direct"
    gathered = num_views * num_rows * width * itemsize
    symmetric = options.covariances * num_views * width * (width + min(width, PANEL)) // 2
    summed = 2 * (symmetric + num_pairs * width**2) * max(itemsize, 4)
    # both carry the factor (R - 1) / R
    return "gram" if gathered <= summed else "direct"


def _check(function: str, z: Tensor) -> None:
    if z.dim() != 3 or z.shape[0] < 1 or z.shape[2] < 1 or z.dtype not in TYPES:
        raise ValueError(
            f"{function}: z must be (W, n, D) of floating-point numbers with W and D at least 1, got {tuple(z.shape)} of "
            f"{z.dtype}. Stack the views of this process's samples in one of {[str(dtype) for dtype in TYPES]}."
        )


def _rows(
    function: str, counts: Sequence[int] | None, group: ProcessGroup | None, stacks: Sequence[Tensor], gradients: Sequence[bool]
) -> Sequence[int]:
    """Return every process's rows of stacks (W, n, D), which may differ in D; all processes refuse what one must."""
    rank, world = rank_and_world(group)
    rows = stacks[0].shape[1]
    if counts is None:
        types = (TYPES.index(z.dtype) for z in stacks)
        mine = (rows, stacks[0].shape[0], *(z.shape[2] for z in stacks), *types, *gradients)
        shapes = exchange(mine, stacks[0].device, group)
        if any(shape[1:] != shapes[0][1:] for shape in shapes):
            raise ValueError(
                f"{function}: z must agree in all but its rows with other processes, got (rows, views, widths, types, whether "
                f"gradients are wanted) {shapes} by rank. Pass the same views, widths and types everywhere, and gradients too."
            )
        counts = [shape[0] for shape in shapes]
    elif len(counts) != world or counts[rank] != rows:
        raise ValueError(
            f"{function}: counts must name {rows} rows for process {rank} of {world}, got {list(counts)}. Exchange them again."
        )
    if sum(counts) < 2:
        raise ValueError(
            f"{function}: z must have 2 rows in all processes together, got {sum(counts)}. "
            "Statistics over the batch need two samples."
        )
    return counts


def decorrelate_across(
    z: Tensor,
    options: Options = Options(),  # noqa: B008
    weights: Energies | None = None,
    group: ProcessGroup | None = None,
    *,
    form: Literal["auto", "gram", "direct"] = "auto",
    counts: Sequence[int] | None = None,
) -> tuple[Energies, Tensor | None]:
    """Compute the energies of a batch whose rows lie in several processes, and this process's rows of their gradient.

    Both forms add in float32 (float64 for float64). Statistics are sums over all processes, first of the rows, then of their
    squares about the mean. `"gram"` gathers all rows, in their own type, and computes this process's rows of the N x N matrices;
    the diagonals of D x D matrices are taken away from its energies, which costs digits where N is many times D. `"direct"` sums
    the D x D matrices over the processes by panels of columns, of which two exist at a time. All arguments but z's rows must be
    the same in all processes.

    Args:
        z: This process's rows, (W, n, D); processes may differ in n, which may be 0.
        options: What the energies depend on beside the embeddings.
        weights: Of the energies, (W,), (W,), (P,), (P,), on z's device; None makes no gradient.
        group: Processes that share the batch; None are all of them, or this one where none were set up.
        form: `"auto"` takes what `choose_across` says.
        counts: Rows of every process by rank, if known: then the host need not wait for the device.
    Returns:
        Energies of the whole batch, the same in all processes, and the gradient of sum(weights * energies) by z,
        (W, n, D): not scaled for DistributedDataParallel.
    Raises:
        ValueError: On other shapes or an unknown form, and if all processes together have fewer than two rows, or no more
            than the correction.
    """
    _check("decorrelate_across", z)
    if form not in ("auto", "gram", "direct"):
        raise ValueError(f"decorrelate_across: form must be 'auto', 'gram' or 'direct', got {form!r}. Choose one.")
    num_views, _, width = z.shape
    pairs = pairs_of(num_views) if options.pairs else []
    if weights is not None:
        lengths, expected = [len(part) for part in weights], [num_views, num_views, len(pairs), len(pairs)]
        if lengths != expected:
            raise ValueError(
                f"decorrelate_across: weights must have {expected} entries, got {lengths}. Give one per view and per pair."
            )
    counts = _rows("decorrelate_across", counts, group, [z], [weights is not None])
    if options.correction >= sum(counts):
        raise ValueError(
            f"decorrelate_across: options.correction must be below {sum(counts)}, the rows of all processes together, got "
            f"{options.correction}. Use 0 or 1, or enlarge the batch."
        )
    if form == "auto":
        _, world = rank_and_world(group)
        form = choose_across(sum(counts), width, num_views, world, z.element_size(), options)
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        return _decorrelate(z, options, weights, _about_mean(z, counts, group), form)


def _decorrelate(
    z: Tensor, options: Options, weights: Energies | None, batch: _Batch, form: Form
) -> tuple[Energies, Tensor | None]:
    x, second, n = batch.x, batch.second, batch.num_rows
    num_views, _, width = x.shape
    pairs = pairs_of(num_views) if options.pairs else []
    scale = 1.0 / torch.sqrt(second / (n - options.correction) + options.std_eps)
    u = x * scale[:, None] if pairs else x[:0]
    # columns on the diagonal by themselves, never from a difference
    dots = torch.stack([(u[a] * u[b]).sum(0) for a, b in pairs]) if pairs else x.new_zeros(0, width)
    dots = _sum(dots, batch.group) if pairs else dots
    pair_weights = None
    if weights is not None:
        weights = Energies(*(part.to(x.dtype) for part in weights))
        pair_weights = x.new_zeros(num_views, num_views)
        for number, (a, b) in enumerate(pairs):
            pair_weights[a, b] = pair_weights[b, a] = weights.off_diagonal[number]
    if form == "gram":
        parts = _by_grams(z, batch, u, scale, dots, pair_weights, options.covariances)
    else:
        parts = _by_panels(batch, u, pair_weights, options.covariances)
    deviation = torch.sqrt(second / (n - 1) + options.variance_eps)
    energies = Energies(
        torch.relu(options.gamma - deviation).mean(1),
        parts.covariance / (n - 1) ** 2,
        (dots / n - 1.0).square().sum(1),
        parts.off_diagonal / n**2,
    )
    if weights is None or parts.grad_x is None:
        return energies, None
    grad = parts.grad_x
    if options.covariances:
        grad.mul_((weights.covariance * (4.0 / (n - 1) ** 2))[:, None, None])
    # what multiplies x itself
    factor = (deviation < options.gamma) / ((n - 1) * deviation) * (weights.hinge / -width)[:, None]
    if parts.grad_u is not None:
        grad_u = parts.grad_u.mul_(2.0 / n**2)
        _add_pairs(grad_u, u, list((2.0 / n) * weights.on_diagonal[:, None] * (dots / n - 1.0)))
        projected = _sum((grad_u * x).sum(1), batch.group)
        factor -= scale.pow(3) / (n - options.correction) * projected
        grad.addcmul_(grad_u, scale[:, None])
    # x has mean zero, so only this part needs centring
    grad -= _sum(grad.sum(1), batch.group)[:, None] / n
    return energies, grad.addcmul_(x, factor[:, None])


def _batch_of(counts: Sequence[int], group: ProcessGroup | None) -> Rows:
    _, world = rank_and_world(group)
    across = functools.partial(decorrelate_across, group=group, counts=counts)
    return Rows(sum(counts), across, functools.partial(_sum, group=group), world)


def similarity_across(z: Tensor, group: ProcessGroup | None = None, *, counts: Sequence[int] | None = None) -> Tensor:
    """Pull every view to the anchor (the last view) and to the mean of the others, as means over all processes' rows.

    Only the value is summed over the processes; gradients as those of `mgfd_across`.

    Args:
        z: This process's rows, (W, n, D), W at least 2; processes may differ in n.
        group: Processes that share the batch; None are all of them.
        counts: Rows of every process by rank, if known.
    Returns:
        Sum of the 2 * (W - 1) mean squared errors, (), the same in all processes.
    Raises:
        ValueError: On other shapes, and if all processes together have fewer than two rows.
    """
    _check("similarity_across", z)
    if z.shape[0] < 2:
        raise ValueError(
            f"similarity_across: z must have W at least 2, got {tuple(z.shape)}. Stack the views of the samples."
        )
    needed = needs_gradient(z)
    rows = _batch_of(_rows("similarity_across", counts, group, [z], [needed]), group)
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        grad = torch.zeros_like(z, dtype=torch.promote_types(z.dtype, torch.float32)) if needed else None
        # every process adds its own copy of the value to what is differentiated
        value = pull(z, rows.world, grad, rows)
    return attach(z, value, grad)


def mgfd_across(
    z_t: Tensor,
    z_s: Tensor,
    z_i: Tensor,
    group: ProcessGroup | None = None,
    *,
    xcorr_weight: float = 1e-3,
    counts: Sequence[int] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Multi-grained feature decorrelation of a batch whose rows lie in several processes.

    The loss is `mgfd_loss` of all rows, the same number in all processes. Every process differentiates its own copy, and
    gradients are those of the sum of the copies: R times the gradient of the loss in R processes. This is what
    DistributedDataParallel expects, which divides the summed gradients of parameters by R: parameters get the gradients of
    one process with the whole batch. Without DistributedDataParallel, average gradients over the processes likewise.

    Args:
        z_t: This process's temporal embeddings, (W, n, D_t); the last view is the anchor.
        z_s: Spatial embeddings, (W, n, D_s).
        z_i: Instance embeddings, (W, n, D_i).
        group: Processes that share the batch; None are all of them.
        xcorr_weight: Weight of the cross-correlation; with 0 it is neither computed nor named.
        counts: Rows of every process by rank, if known: then the host need not wait for the device.
    Returns:
        The loss, (), and its unweighted detached parts `{"sim_t", "vac_t", "xcorr_t", "sim_s", ...}`, () each.
    Raises:
        ValueError: If the stacks are not (W, n, D) of equal W >= 2 and n, or all processes together have fewer than two rows.
    """
    if not z_t.shape[:2] == z_s.shape[:2] == z_i.shape[:2] or z_t.shape[0] < 2:
        raise ValueError(
            "mgfd_across: z_t, z_s and z_i must be (W, n, D) with equal W >= 2 and equal n, got "
            f"{tuple(z_t.shape)}, {tuple(z_s.shape)} and {tuple(z_i.shape)}. Stack the same views of the same samples."
        )
    stacks = (z_t, z_s, z_i)
    for z in stacks:
        _check("mgfd_across", z)
    counts = _rows("mgfd_across", counts, group, stacks, [needs_gradient(z) for z in stacks])
    return weigh_domains(*stacks, xcorr_weight, _batch_of(counts, group))
