"""Unsupervised clustering of features: k-means, and how well its clusters agree with the classes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastskel import philox
from fastskel.evaluate.cluster_metrics import (
    adjusted_rand_index,
    cluster_accuracy,
    contingency_table,
    normalised_mutual_information,
)
from fastskel.evaluate.evaluation import TASKS, Evaluation, Task
from fastskel.evaluate.features import FeatureSet
from fastskel.evaluate.metrics import mean_and_deviation
from fastskel.evaluate.report import write_results

__all__ = ["KMeans", "evaluate_cluster", "k_means"]

# rows whose distances to all centres are in memory at a time
BLOCK_ROWS = 8192


@dataclass(frozen=True)
class KMeans:
    """Clusters of some rows.

    Attributes:
        clusters: Cluster of each row, (N,), int64.
        centres: Means of the clusters, (R, F), float64.
        inertia: Sum over rows of the squared distance to the own centre.
        iterations: Passes over the rows.
        converged: Whether the last pass moved no row.
    """

    clusters: Tensor
    centres: Tensor
    inertia: float
    iterations: int
    converged: bool


def _squared(rows: Tensor) -> Tensor:
    return rows.square().sum(1, dtype=torch.float64)


def _seeded_centres(rows: Tensor, norms: Tensor, num_clusters: int, seed: int, restart: int) -> Tensor:
    """Choose rows as centres, (R, F), each with the odds of its squared distance to those chosen before."""
    words = philox.words(seed, np.arange(num_clusters), restart, 0, philox.Use.CENTRE, 2).astype(np.float64)
    drawn = words[:, 1] / 2**32 + words[:, 0] / 2**64
    nearest = torch.full_like(norms, torch.inf)
    odds = torch.ones_like(norms)
    chosen = []
    for share in drawn:
        total = odds.cumsum(0)
        # a share that rounds up to the whole falls on the last row that has odds
        last = int(odds.nonzero()[-1]) if bool(total[-1] > 0) else 0
        row = min(int(torch.searchsorted(total, share * total[-1], right=True)), last)
        chosen.append(row)
        distance = norms + norms[row] - 2 * (rows @ rows[row]).to(torch.float64)
        distance[row] = 0
        nearest = torch.minimum(nearest, distance.clamp_min(0))
        odds = nearest
    return rows[chosen].to(torch.float64)


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    """Nearest centre of each row, (N,), the first among equals."""
    half = _squared(centres).to(rows.dtype) / 2
    narrow = centres.to(rows.dtype).T
    return torch.cat([(part @ narrow - half).argmax(1) for part in torch.split(rows, BLOCK_ROWS)])


def _distances(rows: Tensor, clusters: Tensor, centres: Tensor) -> Tensor:
    """Squared distance of each row to its own centre, (N,), float64."""
    parts = zip(torch.split(rows, BLOCK_ROWS), torch.split(clusters, BLOCK_ROWS))
    return torch.cat([_squared(part.to(torch.float64) - centres[own]) for part, own in parts])


def _means(rows: Tensor, clusters: Tensor, centres: Tensor) -> Tensor:
    """Means of the clusters, (R, F); an empty one keeps its centre."""
    count = torch.bincount(clusters, minlength=len(centres))[:, None]
    total = torch.zeros_like(centres)
    for part, own in zip(torch.split(rows, BLOCK_ROWS), torch.split(clusters, BLOCK_ROWS)):
        total.index_add_(0, own, part.to(torch.float64))
    return torch.where(count > 0, total / count.clamp_min(1), centres)


def _fill_empty(rows: Tensor, clusters: Tensor, centres: Tensor) -> Tensor:
    """Give each empty cluster the row farthest from its centre, first among equals, that leaves no other cluster empty."""
    count = torch.bincount(clusters, minlength=len(centres)).tolist()
    empty = [cluster for cluster, members in enumerate(count) if members == 0]
    if not empty:
        return clusters
    distance = _distances(rows, clusters, centres)
    clusters = clusters.clone()
    for row in distance.argsort(descending=True, stable=True).tolist():
        # rows that lie on their centre are as well off as they can be: there are fewer places than clusters
        if not empty or distance[row] <= 0:
            break
        if count[clusters[row]] > 1:
            count[clusters[row]] -= 1
            clusters[row] = empty.pop(0)
            count[clusters[row]] += 1
    return clusters


def _lloyd(rows: Tensor, centres: Tensor, max_iterations: int) -> KMeans:
    clusters = _fill_empty(rows, _nearest(rows, centres), centres)
    iterations, converged = 1, False
    while not converged and iterations < max_iterations:
        before, centres = clusters, _means(rows, clusters, centres)
        clusters = _fill_empty(rows, _nearest(rows, centres), centres)
        iterations, converged = iterations + 1, torch.equal(clusters, before)
    centres = _means(rows, clusters, centres)
    inertia = float(_distances(rows, clusters, centres).sum())
    return KMeans(clusters.cpu(), centres.cpu(), inertia, iterations, converged)


def k_means(
    rows: Tensor,
    num_clusters: int,
    *,
    seed: int = 0,
    restarts: int = 5,
    max_iterations: int = 300,
    device: torch.device | str = "cpu",
) -> KMeans:
    """Cluster rows by k-means: Lloyd's iterations from k-means++ centres until no row moves; the best of some restarts.

    Products are those of the rows' type, sums are float64. An empty cluster takes the row farthest from its centre.

    Args:
        rows: Finite numbers, (N, F).
        num_clusters: R, 1..N.
        seed: Of the first centres: number j of restart r is drawn at (seed, j, r, 0, Use.CENTRE).
        restarts: Runs; that of the smallest inertia is returned, the first among equals.
        max_iterations: Passes of a run at most.
        device: Where it runs.
    Returns:
        Clusters (N,) and centres (R, F), on the host.
    Raises:
        ValueError: On shapes, rows that are not finite, and numbers out of range.
    Source: Lloyd, IEEE Transactions on Information Theory 1982; Arthur and Vassilvitskii, "k-means++", SODA 2007.
    """
    if rows.dim() != 2 or not rows.is_floating_point() or not bool(torch.isfinite(rows).all()):
        raise ValueError(
            f"k_means: rows must be finite floating-point (N, F), got {rows.dtype} of shape {tuple(rows.shape)}. "
            "Check the encoder."
        )
    if not 1 <= num_clusters <= len(rows):
        raise ValueError(f"k_means: num_clusters must lie in 1..{len(rows)} (rows), got {num_clusters}. Ask for fewer.")
    for name, value in (("restarts", restarts), ("max_iterations", max_iterations)):
        if value < 1:
            raise ValueError(f"k_means: {name} must be at least 1, got {value}. Leave it out.")
    rows = rows.to(device)
    # distances do not change, and products of centred rows round less
    centre = rows.mean(0, dtype=torch.float64)
    rows = rows - centre.to(rows.dtype)
    norms = _squared(rows)
    best: KMeans | None = None
    for restart in range(restarts):
        run = _lloyd(rows, _seeded_centres(rows, norms, num_clusters, seed, restart), max_iterations)
        if best is None or run.inertia < best.inertia:
            best = run
    assert best is not None
    shift = centre.to(rows.dtype).to("cpu", torch.float64)
    return KMeans(best.clusters, best.centres + shift, best.inertia, best.iterations, best.converged)


def evaluate_cluster(
    evaluation: Evaluation,
    out: str | os.PathLike[str] | None = None,
    *,
    part: Literal["test", "all"] = "test",
    num_clusters: int | None = None,
    normalise: bool = True,
    seeds: int = 5,
    restarts: int = 5,
) -> dict[str, Any]:
    """Cluster features without their labels and compare the clusters with the classes.

    Args:
        evaluation: Encoder, clips, and how features (N, F) are computed.
        out: Folder for results.json; None: nothing is written.
        part: Labelled clips of the test part, or of training and test part.
        num_clusters: R; the number of classes that occur if None.
        normalise: Scale features to unit length.
        seeds: Clusterings, with seeds from 0.
        restarts: Runs of each, of which the one of the smallest inertia counts; labels choose nothing.
    Returns:
        "accuracy" under the best one-to-one matching, "nmi" and "ari", each with mean, deviation and values over the seeds;
        "inertia", "iterations" and "converged" of each seed; and the record.
    Raises:
        ValueError: If no clip is labelled, or numbers are out of range.
    """
    if part not in ("test", "all"):
        raise ValueError(f"evaluate_cluster: part must be test or all, got {part!r}. Choose one.")
    if seeds < 1:
        raise ValueError(f"evaluate_cluster: seeds must be at least 1, got {seeds}. Pass 5.")
    sets: tuple[FeatureSet, ...]
    if part == "all":
        sets = evaluation.features()
        train_index, test_index = (values.index for values in sets)
        evaluation.check_unseen(train_index.numpy(), "clips that are clustered", "Cluster the test part")
    else:
        sets = (evaluation.features_of(evaluation.known("test")),)
        train_index, test_index = sets[0].index[:0], sets[0].index
    features, labels = torch.cat([values.features for values in sets]), torch.cat([values.labels for values in sets])
    rows = functional.normalize(features, dim=1) if normalise else features
    count = num_clusters if num_clusters is not None else len(torch.unique(labels))
    runs = [k_means(rows, count, seed=seed, restarts=restarts, device=evaluation.device) for seed in range(seeds)]
    tables = [contingency_table(labels, run.clusters) for run in runs]
    measures = {
        "accuracy": cluster_accuracy, "nmi": normalised_mutual_information, "ari": adjusted_rand_index,
    }  # fmt: skip
    results = {
        **{name: mean_and_deviation([measure(table) for table in tables]) for name, measure in measures.items()},
        "part": part,
        "num_clusters": count,
        "normalised": normalise,
        "seeds": list(range(seeds)),
        "restarts": restarts,
        "inertia": [run.inertia for run in runs],
        "iterations": [run.iterations for run in runs],
        "converged": [run.converged for run in runs],
        **evaluation.record("cluster", train_index, test_index),
    }
    if part == "test":
        # training clips are not dropped: they are not asked for
        results["dropped_train"] = 0
    if out is not None:
        write_results(Path(out) / "results.json", results)
    return results


TASKS.add("cluster", Task(evaluate_cluster))
