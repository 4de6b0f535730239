"""Retrieval: which training clips lie nearest to a test clip, and how many of them show what it shows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastskel.evaluate.evaluation import TASKS, Evaluation, Task
from fastskel.evaluate.features import FeatureSet
from fastskel.evaluate.report import write_results
from fastskel.evaluate.search import CosineSearch, rows_of, similarities_of

__all__ = ["RetrievalScores", "average_precision", "evaluate_retrieval", "retrieval_scores"]

KS = (1, 5, 10)
NUM_SHOWN = 5


@dataclass(frozen=True)
class RetrievalScores:
    """What a gallery of N features returns for B queries.

    Attributes:
        keys: Keys of the nearest, (B, n), falling: see `CosineSearch.nearest`.
        recall: Share of the queries that have their class among their k nearest, by k.
        precision: Mean share of their class among the k nearest, by k.
        mean_average_precision: Mean over the queries with a match, None if it was not asked for.
        num_without_match: Queries whose class the gallery lacks: no hit at any k, and left out of that mean.
    """

    keys: Tensor
    recall: dict[int, float]
    precision: dict[int, float]
    mean_average_precision: float | None
    num_without_match: int


def average_precision(relevant: Tensor) -> Tensor:
    """Average precision of ranked lists: the mean over the relevant places of the share of relevant ones up to there.

    Args:
        relevant: Whether each place of a list holds what was looked for, (B, N), nearest first.
    Returns:
        One value for each list, (B,), float64; NaN where nothing is relevant.
    """
    hits = relevant.cumsum(1, dtype=torch.int32)
    places = torch.arange(1, relevant.shape[1] + 1, device=relevant.device, dtype=torch.float64)
    return (hits / places).mul_(relevant).sum(1) / hits[:, -1]


def _checked_ks(ks: Sequence[int] | None, num_rows: int) -> list[int]:
    if ks is None:
        return [k for k in KS if k <= num_rows]
    if not ks or any(not 1 <= k <= num_rows for k in ks):
        raise ValueError(f"evaluate_retrieval: ks must lie in 1..{num_rows} (training clips), got {list(ks)}. Leave out others.")
    return sorted(set(ks))


def retrieval_scores(
    train: FeatureSet,
    test: FeatureSet,
    *,
    ks: Sequence[int] | None = None,
    mean_average_precision: bool = True,
    device: torch.device | str = "cpu",
) -> RetrievalScores:
    """Look test clips (B,) up among training clips (N,), by cosine similarity.

    Equal similarities rank in the order of the training clips, also in average precision.

    Args:
        train: Gallery, features (N, F).
        test: Queries, features (B, F).
        ks: Numbers of neighbours to judge, each in 1..N; by default those of 1, 5 and 10 that the gallery has.
        mean_average_precision: Rank the whole gallery for it, which costs several times what finding the nearest does.
        device: Where the products run.
    Raises:
        ValueError: On ks, on features that are not finite or of other widths, and if mean average precision is asked for
            where no test clip has a training clip of its class.
    """
    chosen = _checked_ks(ks, len(train))
    search = CosineSearch(train.features, device=device, function="evaluate_retrieval", name="training features")
    labels, wanted = train.labels.to(search.device), test.labels.to(search.device)
    with_match = torch.isin(wanted, labels)
    num_without = len(test) - int(with_match.sum())
    num_near = min(len(train), max(*chosen, NUM_SHOWN))
    mean = None
    if mean_average_precision:
        if num_without == len(test):
            raise ValueError(
                "evaluate_retrieval: a test clip must have a training clip of its class, got none that does. "
                "Check the protocol; mean average precision can be left out."
            )
        near, precisions = [], []
        for part, keys in search.ranked(test.features, name="test features"):
            near.append(keys[:, :num_near].clone())
            precisions.append(average_precision(labels[rows_of(keys)] == wanted[part, None]))
        keys, mean = torch.cat(near), float(torch.cat(precisions)[with_match].mean())
    else:
        keys = search.nearest(test.features, num_near, name="test features")
    hits = (labels[rows_of(keys)] == wanted[:, None]).cumsum(1)
    return RetrievalScores(
        keys.cpu(),
        {k: int((hits[:, k - 1] > 0).sum()) / len(test) for k in chosen},
        {k: int(hits[:, k - 1].sum()) / (k * len(test)) for k in chosen},
        mean,
        num_without,
    )


def _examples(train: FeatureSet, test: FeatureSet, keys: Tensor) -> list[dict[str, Any]]:
    """The first test clip of each class by clip number, with its nearest training clips."""
    order = test.index.argsort(stable=True).tolist()
    first: dict[int, int] = {}
    for query in order:
        first.setdefault(int(test.labels[query]), query)
    examples = []
    for label, query in sorted(first.items()):
        near = keys[query, :NUM_SHOWN]
        examples.append(
            {
                "query": int(test.index[query]),
                "label": label,
                "neighbours": train.index[rows_of(near)].tolist(),
                "labels": train.labels[rows_of(near)].tolist(),
                "similarities": similarities_of(near).tolist(),
            }
        )
    return examples


def evaluate_retrieval(
    evaluation: Evaluation,
    out: str | os.PathLike[str] | None = None,
    *,
    ks: Sequence[int] | None = None,
    mean_average_precision: bool = True,
) -> dict[str, Any]:
    """Look the test clips up among the training clips: exact search by cosine similarity.

    Args:
        evaluation: Encoder, clips, and how features (N, F) are computed.
        out: Folder for results.json; None: nothing is written.
        ks: Numbers of neighbours to judge; by default those of 1, 5 and 10 that there are training clips for.
        mean_average_precision: Rank the whole gallery for it.
    Returns:
        "top1" is that of 1-NN. "recall_at" k: test clips with their class among their k nearest. "precision_at" k: mean
        share of it among them. "map": mean average precision over the whole ranking, None if it was left out; test clips
        whose class no training clip has, counted in "num_without_match", are left out of it and are misses elsewhere. All
        as fractions of one. "examples": the nearest training clips of the first test clip of each class, by their numbers
        in the data set. Then the record.
    Raises:
        ValueError: If a part of the split has no labelled clip, or a k exceeds the training clips.
    """
    train, test = evaluation.features()
    scores = retrieval_scores(
        train, test, ks=ks, mean_average_precision=mean_average_precision, device=evaluation.device
    )
    nearest = train.labels[rows_of(scores.keys[:, 0])]
    results = {
        "top1": int((nearest == test.labels).sum()) / len(test),
        # keys of a JSON object are text
        "recall_at": {str(k): share for k, share in scores.recall.items()},
        "precision_at": {str(k): share for k, share in scores.precision.items()},
        "map": scores.mean_average_precision,
        "num_without_match": scores.num_without_match,
        **evaluation.record("retrieval", train.index, test.index),
        "examples": _examples(train, test, scores.keys),
    }
    if out is not None:
        write_results(Path(out) / "results.json", results)
    return results


TASKS.add("retrieval", Task(evaluate_retrieval))
