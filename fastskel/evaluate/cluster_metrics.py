"""How well clusters agree with classes: accuracy under the best matching, mutual information, adjusted Rand index."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "adjusted_rand_index", "best_assignment", "cluster_accuracy", "contingency_table", "normalised_mutual_information",
]


def contingency_table(labels: Tensor, clusters: Tensor) -> Tensor:
    """Count samples by class (row) and cluster (column).

    Args:
        labels: Classes, (N,), any integers.
        clusters: Clusters, (N,), any integers.
    Returns:
        Counts of the classes and clusters that occur, in their order, (K, R), int64, on the host.
    Raises:
        ValueError: If lengths differ, there are no samples, or numbers are not integers.
    """
    for name, values in (("labels", labels), ("clusters", clusters)):
        if values.dim() != 1 or values.is_floating_point() or values.numel() == 0:
            raise ValueError(
                f"contingency_table: {name} must be one integer per sample, got {values.dtype} of shape "
                f"{tuple(values.shape)}. Pass numbers (N,)."
            )
    if len(labels) != len(clusters):
        raise ValueError(
            f"contingency_table: labels and clusters must agree in length, got {len(labels)} and {len(clusters)}. "
            "Pass one cluster per label."
        )
    rows, row = torch.unique(labels.cpu(), return_inverse=True)
    columns, column = torch.unique(clusters.cpu(), return_inverse=True)
    return torch.bincount(row * len(columns) + column, minlength=len(rows) * len(columns)).reshape(len(rows), -1)


def best_assignment(weight: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Match rows with columns one to one so that the sum of their weights is largest.

    Args:
        weight: Finite numbers, (K, R).
    Returns:
        Matched rows, ascending, and their columns, (min(K, R),) each.
    Raises:
        ValueError: If the weights are not a matrix of finite numbers.
    Source: shortest augmenting paths of Jonker and Volgenant, "A shortest augmenting path algorithm for dense and sparse
    linear assignment problems", Computing 1987; O(K^2 R).
    """
    weight = np.asarray(weight, dtype=np.float64)
    if weight.ndim != 2 or weight.size == 0 or not np.isfinite(weight).all():
        raise ValueError(
            f"best_assignment: weight must be finite numbers (K, R), got shape {weight.shape}. Pass a table of counts."
        )
    if weight.shape[0] > weight.shape[1]:
        columns, rows = best_assignment(weight.T)
        order = np.argsort(rows)
        return rows[order], columns[order]
    cost = weight.max() - weight
    num_rows, num_columns = cost.shape
    row_price, column_price = np.zeros(num_rows), np.zeros(num_columns)
    # row of each column and column of each row, or -1
    owner, column_of = np.full(num_columns, -1), np.full(num_rows, -1)
    for first in range(num_rows):
        # distances of the shortest paths from the free row to each column, and the row before it on that path
        distance, previous = np.full(num_columns, np.inf), np.full(num_columns, -1)
        done = np.zeros(num_columns, dtype=bool)
        row, reached = first, 0.0
        while True:
            through = reached + cost[row] - row_price[row] - column_price
            closer = ~done & (through < distance)
            distance[closer], previous[closer] = through[closer], row
            column = int(np.argmin(np.where(done, np.inf, distance)))
            reached = distance[column]
            done[column] = True
            if owner[column] < 0:
                break
            row = int(owner[column])
        # prices keep every reduced cost at least zero, and zero on matched pairs
        gain = reached - distance[done]
        row_price[owner[done & (owner >= 0)]] += gain[owner[done] >= 0]
        row_price[first] += reached
        column_price[done] -= gain
        while column >= 0:
            row = int(previous[column])
            owner[column] = row
            # the row gives up the column that it had, which goes to the row before it on the path
            column, column_of[row] = int(column_of[row]), column
    return np.arange(num_rows), column_of.astype(np.int64)


def cluster_accuracy(table: Tensor) -> float:
    """Fraction of samples whose cluster is matched with their class, under the best one-to-one matching, of (K, R) counts."""
    rows, columns = best_assignment(table.numpy().astype(np.float64))
    return int(table[rows, columns].sum()) / int(table.sum())


def _entropy(counts: Tensor) -> float:
    share = counts[counts > 0].to(torch.float64) / int(counts.sum())
    return float(-(share * share.log()).sum())


def normalised_mutual_information(table: Tensor) -> float:
    """Mutual information of class and cluster over the mean of their entropies, of (K, R) counts.

    One class in one cluster agree perfectly and give 1; one class in several clusters, or several in one, 0.
    """
    classes, clusters = _entropy(table.sum(1)), _entropy(table.sum(0))
    if min(table.shape) == 1:
        return 1.0 if max(table.shape) == 1 else 0.0
    mutual = classes + clusters - _entropy(table.flatten())
    return min(max(2 * mutual / (classes + clusters), 0.0), 1.0)


def adjusted_rand_index(table: Tensor) -> float:
    """Share of pairs of samples that classes and clusters both join or both part, 0 for chance, of (K, R) counts.

    Source: Hubert and Arabie, "Comparing partitions", Journal of Classification 1985.
    """

    def pairs(counts: Tensor) -> int:
        return int((counts * (counts - 1)).sum()) // 2

    both, classes, clusters = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    every = pairs(table.sum()[None])
    # in whole numbers, times all pairs: both partitions trivial in the same way leave nothing to adjust
    most, chance = (classes + clusters) * every, 2 * classes * clusters
    return 1.0 if most == chance else (2 * both * every - chance) / (most - chance)
