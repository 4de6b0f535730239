r"""Cosine k-nearest-neighbour classification by blocked matrix products; k = 1 is the retrieval of USDRL.

Similarities are products of unit vectors in float64, rounded to multiples of 2^-30: finer than what float32 features
resolve, coarser than what the summation order changes, so that equal vectors are equal wherever they stand in a block.
A similarity s of training row i becomes the integer round(s 2^30) 2^32 + (2^32 - 1 - i). These keys are unique and in
the order of neighbours: larger similarity first, lower training row first among equals. Block sizes therefore cannot
change a result.

Classes are ranked by votes among the k neighbours, then by the sum of these votes' similarities (the smallest summed
distance), then by their nearest sample. A zero vector has similarity 0 with everything.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["knn_neighbours", "knn_predict", "knn_rank"]

# what float32 unit vectors resolve is 2^-24; float64 products of them are good to about 2^-50
SCALE = 2**30
LOW = 2**32
LOWEST = torch.iinfo(torch.int64).min
# training rows per block for each test row of a block: normalising a block must cost little beside multiplying it
TRAIN_BLOCK = 4


def _check_rows(function: str, name: str, rows: Tensor) -> None:
    if rows.dim() != 2 or not rows.is_floating_point():
        raise ValueError(
            f"{function}: {name} must be floating-point (N, F), got {rows.dtype} of shape {tuple(rows.shape)}. "
            "Pass one feature row per sample."
        )
    if rows.shape[0] == 0:
        raise ValueError(f"{function}: {name} must have rows, got none. Check the split.")
    bad = (~torch.isfinite(rows)).any(1).nonzero()
    if bad.numel():
        raise ValueError(
            f"{function}: {name} must be finite, got {rows[int(bad[0])][~torch.isfinite(rows[int(bad[0])])][0].item()} "
            f"in row {int(bad[0])}. Check the encoder's weights and its input."
        )


def _check(function: str, train_x: Tensor, test_x: Tensor, k: int, block_rows: int) -> None:
    _check_rows(function, "train_x", train_x)
    _check_rows(function, "test_x", test_x)
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(
            f"{function}: test_x must have the width of train_x, got {test_x.shape[1]} and {train_x.shape[1]}. "
            "Extract both with the same encoder."
        )
    if not 1 <= k <= train_x.shape[0]:
        raise ValueError(f"{function}: k must lie in 1..{train_x.shape[0]} (training rows), got {k}. Lower k.")
    if train_x.shape[0] >= LOW:
        raise ValueError(f"{function}: train_x must have fewer than 2**32 rows, got {train_x.shape[0]}. Use a subset.")
    if block_rows < 1:
        raise ValueError(f"{function}: block_rows must be at least 1, got {block_rows}. Leave it at its default.")


def _unit(rows: Tensor, device: torch.device | str) -> Tensor:
    rows = rows.to(device, torch.float64)
    # scaling by the largest entry first keeps the squares of huge and of tiny features inside of float64
    largest = rows.abs().amax(1, keepdim=True)
    rows = rows / torch.where(largest > 0, largest, 1.0)
    norm = rows.square().sum(1, keepdim=True).sqrt()
    return rows / torch.where(norm > 0, norm, 1.0)


def _search(
    train_x: Tensor, test_x: Tensor, k: int, block_rows: int, device: torch.device | str, classes: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Keys of the k nearest, (N, k), and, given the training rows' classes, of the nearest of each class, (N, K)."""
    num_train, num_test = train_x.shape[0], test_x.shape[0]
    top = torch.full((num_test, k), LOWEST, dtype=torch.int64, device=device)
    best = None
    if classes is not None:
        classes = classes.to(device)
        best = torch.full((num_test, int(classes.max()) + 1), LOWEST, dtype=torch.int64, device=device)
    train_rows = TRAIN_BLOCK * block_rows
    for begin in range(0, num_train, train_rows):
        train = _unit(train_x[begin : begin + train_rows], device)
        low = LOW - 1 - torch.arange(begin, begin + train.shape[0], device=device)
        for start in range(0, num_test, block_rows):
            part = slice(start, start + block_rows)
            similarity = _unit(test_x[part], device) @ train.T
            keys = similarity.mul_(SCALE).round_().to(torch.int64).mul_(LOW).add_(low)
            nearest = keys.topk(min(k, keys.shape[1]), dim=1).values
            top[part] = torch.cat([top[part], nearest], 1).topk(k, dim=1).values
            if best is not None and classes is not None:
                column = classes[begin : begin + train_rows].expand(keys.shape[0], -1)
                best[part] = best[part].scatter_reduce(1, column, keys, "amax")
    return top, best


def _rank(top: Tensor, classes: Tensor, num_classes: int, best: Tensor | None) -> Tensor:
    """Class numbers in order of votes, summed similarity, nearest sample: (N, K)."""
    own = classes.to(top.device)[LOW - 1 - (top & (LOW - 1))]
    votes = torch.zeros(top.shape[0], num_classes, dtype=torch.int64, device=top.device)
    total = votes.scatter_add(1, own, top >> 32)
    votes = votes.scatter_add(1, own, torch.ones_like(own))
    if best is None:
        # a class with a vote has its nearest sample among the neighbours; the others are not asked for
        best = torch.full_like(votes, LOWEST).scatter_reduce(1, own, top, "amax")
    order = best.argsort(dim=1, descending=True, stable=True)
    for value in (total, votes):
        order = order.gather(1, value.gather(1, order).argsort(dim=1, descending=True, stable=True))
    return order


def knn_neighbours(
    train_x: Tensor, test_x: Tensor, k: int, *, block_rows: int = 1024, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Find the k training rows of largest cosine similarity to each test row.

    Args:
        train_x: Training features, (N, F).
        test_x: Test features, (B, F).
        k: Neighbours per row, 1..N.
        block_rows: Test rows multiplied at a time, with four times as many training rows; bounds memory, not results.
        device: Where the products run.
    Returns:
        Similarities, (B, k), float64, to 2^-30, falling; training rows, (B, k), int64, the lower first among equals.
    Raises:
        ValueError: On shapes, widths, k, and rows that are not finite.
    """
    _check("knn_neighbours", train_x, test_x, k, block_rows)
    top, _ = _search(train_x, test_x, k, block_rows, device, None)
    top = top.cpu()
    return (top >> 32).to(torch.float64) / SCALE, LOW - 1 - (top & (LOW - 1))


def _classes(function: str, train_x: Tensor, train_y: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    if metric != "cosine":
        raise ValueError(f"{function}: metric must be 'cosine', got {metric!r}. Normalise and use 'cosine'.")
    if train_y.shape != train_x.shape[:1] or train_y.is_floating_point():
        raise ValueError(
            f"{function}: train_y must be one integer per training row, got {train_y.dtype} of shape "
            f"{tuple(train_y.shape)} for {train_x.shape[0]} rows. Pass class numbers (N,)."
        )
    values, inverse = torch.unique(train_y.cpu(), return_inverse=True)
    return values, inverse


def knn_predict(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    k: int = 1,
    *,
    metric: str = "cosine",
    block_rows: int = 1024,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Classify each test row by the majority of its k nearest training rows.

    Classes with equally many votes are told apart by the smaller summed distance, then by the nearer sample, then by
    the lower training row.

    Args:
        train_x: Training features, (N, F).
        train_y: Their classes, (N,).
        test_x: Test features, (B, F).
        k: Neighbours that vote, 1..N.
        metric: "cosine".
        block_rows: As in `knn_neighbours`.
        device: Where the products run.
    Returns:
        Predicted classes, (B,), int64, on the host.
    Raises:
        ValueError: On shapes, widths, k, the metric, and rows that are not finite.
    Source: action retrieval of USDRL is k = 1.
    """
    _check("knn_predict", train_x, test_x, k, block_rows)
    values, inverse = _classes("knn_predict", train_x, train_y, metric)
    top, _ = _search(train_x, test_x, k, block_rows, device, None)
    return values[_rank(top, inverse, len(values), None)[:, 0].cpu()]


def knn_rank(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    k: int = 1,
    *,
    num_ranked: int = 5,
    block_rows: int = 1024,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Rank the classes for each test row: first by votes as in `knn_predict`, then by their nearest sample.

    Args:
        train_x: Training features, (N, F).
        train_y: Their classes, (N,).
        test_x: Test features, (B, F).
        k: Neighbours that vote, 1..N.
        num_ranked: Classes to return, R; no more than there are.
        block_rows: As in `knn_neighbours`.
        device: Where the products run.
    Returns:
        Classes, best first, (B, R), int64, on the host; the first column is what `knn_predict` returns.
    Raises:
        ValueError: On shapes, widths, k, num_ranked, and rows that are not finite.
    """
    _check("knn_rank", train_x, test_x, k, block_rows)
    if num_ranked < 1:
        raise ValueError(f"knn_rank: num_ranked must be at least 1, got {num_ranked}. Pass 5 for top-5.")
    values, inverse = _classes("knn_rank", train_x, train_y, "cosine")
    top, best = _search(train_x, test_x, k, block_rows, device, inverse)
    return values[_rank(top, inverse, len(values), best)[:, :num_ranked].cpu()]
