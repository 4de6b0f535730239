"""Cosine k-nearest-neighbour classification over the exact search of `search`; k = 1 is the retrieval of USDRL.

Classes are ranked by votes among the k neighbours, then by the sum of these votes' similarities (the smallest summed
distance), then by their nearest sample. A zero vector has similarity 0 with everything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastskel.evaluate.search import LOWEST, CosineSearch, rows_of, similarities_of, steps_of

__all__ = ["knn_neighbours", "knn_predict", "knn_rank"]

# neighbours looked at first for each class to rank, and how many times more where they are of too few classes
NEAR_PER_CLASS, MORE = 8, 8


def _search(
    function: str, train_x: Tensor, test_x: Tensor, k: int, block_rows: int, device: torch.device | str
) -> CosineSearch:
    if len(test_x) == 0:
        raise ValueError(f"{function}: test_x must have rows, got none. Check the split.")
    if not 1 <= k <= max(1, len(train_x)):
        raise ValueError(f"{function}: k must lie in 1..{len(train_x)} (training rows), got {k}. Lower k.")
    return CosineSearch(train_x, block_rows=block_rows, device=device, function=function, name="train_x")


def _rank(near: Tensor, k: int, classes: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Class numbers in order of votes of the first k of keys (N, R), summed similarity, nearest sample.

    Returns:
        Class numbers, (N, K), and how many of them have a sample among the R, (N,): only these are in order.
    """
    own = classes.to(near.device)[rows_of(near)]
    votes = torch.zeros(len(near), num_classes, dtype=torch.int64, device=near.device)
    total = votes.scatter_add(1, own[:, :k], steps_of(near[:, :k]))
    best = torch.full_like(votes, LOWEST).scatter_reduce(1, own, near, "amax")
    votes = votes.scatter_add(1, own[:, :k], torch.ones_like(own[:, :k]))
    order = best.argsort(dim=1, descending=True, stable=True)
    for value in (total, votes):
        order = order.gather(1, value.gather(1, order).argsort(dim=1, descending=True, stable=True))
    return order, (best > LOWEST).sum(1)


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
    search = _search("knn_neighbours", train_x, test_x, k, block_rows, device)
    top = search.nearest(test_x, k, name="test_x").cpu()
    return similarities_of(top), rows_of(top)


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
    search = _search("knn_predict", train_x, test_x, k, block_rows, device)
    values, inverse = _classes("knn_predict", train_x, train_y, metric)
    # a class with a vote has its nearest sample among the neighbours
    order, _ = _rank(search.nearest(test_x, k, name="test_x"), k, inverse, len(values))
    return values[order[:, 0].cpu()]


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
    search = _search("knn_rank", train_x, test_x, k, block_rows, device)
    if num_ranked < 1:
        raise ValueError(f"knn_rank: num_ranked must be at least 1, got {num_ranked}. Pass 5 for top-5.")
    values, inverse = _classes("knn_rank", train_x, train_y, "cosine")
    num_ranked = min(num_ranked, len(values))
    ranking = torch.empty(len(test_x), num_ranked, dtype=torch.int64)
    left, reach = torch.arange(len(test_x)), max(k, NEAR_PER_CLASS * num_ranked)
    while len(left):
        reach = min(reach, len(train_x))
        rows = test_x if len(left) == len(test_x) else test_x[left]
        order, num_met = _rank(search.nearest(rows, reach, name="test_x"), k, inverse, len(values))
        ranking[left] = order[:, :num_ranked].cpu()
        left = left[(num_met < num_ranked).cpu()]
        reach *= MORE
    return values[ranking]
