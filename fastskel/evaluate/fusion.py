"""Late fusion: classifiers of several runs, such as one each of joints, bones and motion, alone and by their mean score."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastskel.data.identity import dataset_identity
from fastskel.evaluate.evaluation import Evaluation
from fastskel.evaluate.features import FeatureSet
from fastskel.evaluate.knn import knn_predict
from fastskel.evaluate.linear import LinearConfig, LinearResult, held_out, linear_probe
from fastskel.evaluate.metrics import accuracy, class_metrics

__all__ = ["choose_weights", "evaluate_fusion", "fuse_features", "fuse_scores"]

# weights that are chosen are multiples of a tenth
STEPS = 10


@dataclass(frozen=True)
class _Member:
    evaluation: Evaluation
    train: FeatureSet
    test: FeatureSet
    probe: LinearResult


def _normalised(weights: Sequence[float], count: int) -> tuple[float, ...]:
    total = sum(weights)
    # written so that NaN fails
    if len(weights) != count or not all(0 <= weight < math.inf for weight in weights) or not 0 < total < math.inf:
        raise ValueError(
            f"evaluate_fusion: weights must be {count} finite numbers from 0 on, one for each run and not all 0, got "
            f"{tuple(weights)}. Give as many, or none for equal ones."
        )
    return tuple(weight / total for weight in weights)


def _check(evaluations: Sequence[Evaluation]) -> None:
    if len(evaluations) < 2:
        raise ValueError(f"evaluate_fusion: evaluations must be at least 2, got {len(evaluations)}. Give several runs.")
    first = evaluations[0]
    for other in evaluations[1:]:
        pairs = [(np.asarray(getattr(one.split, part)) for one in (first, other)) for part in ("train", "test")]
        same = other.protocol == first.protocol and all(np.array_equal(a, b) for a, b in pairs)
        if not same or dataset_identity(other.dataset) != dataset_identity(first.dataset):
            raise ValueError(
                f"evaluate_fusion: evaluations must be of one data set and protocol, got {first.dataset.path} "
                f"{first.protocol} and {other.dataset.path} {other.protocol}. Evaluate all runs on the same clips."
            )
    known = [(each.run, np.sort(each.trained_on)) for each in evaluations if each.trained_on is not None]
    for run, clips in known[1:]:
        if not np.array_equal(clips, known[0][1]):
            raise ValueError(
                f"evaluate_fusion: runs must be trained on the same clips of {first.dataset.path}, got {len(known[0][1])} in "
                f"{known[0][0]} and others, {len(clips)}, in {run}. Pretrain all with one protocol."
            )


def fuse_scores(scores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Average the scores (N, K) of several classifiers by weights that sum to one: (N, K)."""
    return sum((weight * score for weight, score in zip(weights, scores, strict=True)), torch.zeros_like(scores[0]))


def fuse_features(features: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Join features (N, F) of several encoders so that cosines are the weighted means of theirs: (N, F1 + F2 + ..).

    A row of zeros counts as similar to nothing, as in `knn_neighbours`.
    """
    parts = [math.sqrt(weight) * F.normalize(rows.double(), dim=1) for rows, weight in zip(features, weights, strict=True)]
    return torch.cat(parts, 1).float()


def _scores(probe: LinearResult, features: Tensor) -> Tensor:
    """Probabilities of the classes, (N, K), float64: settings of a probe may saturate narrower ones."""
    return F.linear(features.double(), probe.weight.double(), probe.bias.double()).softmax(1)


def _shares(count: int) -> Iterator[tuple[float, ...]]:
    """All weights in steps that sum to one, those closest to equal ones first."""
    cuts = itertools.combinations(range(STEPS + count - 1), count - 1)
    found = [tuple((b - a - 1) / STEPS for a, b in itertools.pairwise((-1, *cut, STEPS + count - 1))) for cut in cuts]
    yield from sorted(found, key=lambda shares: (round(sum((share - 1 / count) ** 2 for share in shares), 9), shares))


def choose_weights(scores: Sequence[Tensor], labels: Tensor) -> tuple[float, ...]:
    """Choose the weights, in tenths, whose mean of scores (N, K) classifies most of N samples as labelled, (N,).

    Equal weights, then those closest to them, win among equals.
    """
    candidates = [(1 / len(scores),) * len(scores), *_shares(len(scores))]
    # the first of the largest
    return max(candidates, key=lambda weights: accuracy(fuse_scores(scores, weights).argmax(1), labels))


def _held_out_scores(member: _Member, held: Tensor, num_classes: int) -> Tensor:
    """Scores of the training clips held out, (N, K), by a probe that the others trained."""
    train = member.train
    fit, check = (FeatureSet(train.features[rows], train.labels[rows], train.index[rows]) for rows in (~held, held))
    probe = linear_probe(fit, check, num_classes, member.probe.config, device=member.evaluation.device)
    return _scores(probe, check.features)


def evaluate_fusion(
    evaluations: Sequence[Evaluation],
    out: str | os.PathLike[str] | None = None,
    *,
    weights: Sequence[float] | Literal["auto"] | None = None,
    k: int = 1,
    config: LinearConfig | None = None,
    group_column: str = "subject",
) -> dict[str, Any]:
    """Train a linear probe on the features of each run, and classify by the mean of their probabilities; by neighbours likewise.

    A neighbour's similarity is the mean of its cosines under the runs, with the same weights.

    Args:
        evaluations: One for each run, of the same clips; features are (N, F) with an F of each run's own.
        out: Folder for results.json, confusion.csv and confusion.png; None: nothing is written.
        weights: One for each run, scaled to a sum of one; None for equal ones. "auto" chooses tenths on training clips held
            out, by probes that the other training clips trained: a fifth of the subjects, as `choose_config` does.
        k: Neighbours that vote.
        config: Of every probe; by default step size and standardisation are chosen for each on training clips held out.
        group_column: Column whose values are held out whole, where it exists.
    Returns:
        "top1", "top5", "mean_class" of the fused probes and "knn_top1" of the fused neighbours, as fractions of one; "weights";
        "alone", the same of each run; "confusion" (K, K), and the record, with lists of what the runs differ in.
    Raises:
        ValueError: On a single run, on runs that were evaluated on different clips, trained on different clips of the data set
            or on another skeleton, and on weights that do not fit.
    Source: the three-stream rows of USDRL, whose weights are not published; equal ones are usual.
    """
    _check(evaluations)
    count, first = len(evaluations), evaluations[0]
    shares = _normalised((1.0,) * count if weights is None or weights == "auto" else weights, count)
    num_classes = len(first.class_names)
    config = config or LinearConfig(learning_rate=None, standardise=None)
    features = [evaluation.features() for evaluation in evaluations]
    # the same clips, whoever encoded them
    train, test = features[0]
    groups = first.groups(train.index, group_column)
    members = [
        _Member(each, *parts, linear_probe(*parts, num_classes, config, groups=groups, device=each.device))
        for each, parts in zip(evaluations, features, strict=True)
    ]
    if weights == "auto":
        held = held_out(train, config.seed, groups)
        shares = choose_weights([_held_out_scores(member, held, num_classes) for member in members], train.labels[held])

    def neighbours(chosen: Sequence[_Member], parts: Sequence[float]) -> float:
        rows, queries = (fuse_features([getattr(m, part).features for m in chosen], parts) for part in ("train", "test"))
        return accuracy(knn_predict(rows, train.labels, queries, k, device=first.device), test.labels)

    scores = fuse_scores([_scores(member.probe, member.test.features) for member in members], shares)
    found, confusion = class_metrics(scores, test.labels)
    records = [evaluation.record("fusion", train.index, test.index) for evaluation in evaluations]
    # the same for all runs that are known to have been trained on some
    seen = [record["test_clips_trained_on"] for record in records if record["test_clips_trained_on"] is not None]
    doubts = {record["test_labels_not_known"] for record in records} - {None}
    results = {
        **found,
        "knn_top1": neighbours(members, shares),
        "k": k,
        "weights": list(shares),
        "weights_from": "held-out training clips" if weights == "auto" else "equal" if weights is None else "given",
        "alone": [
            {
                "run": member.evaluation.run, "stream": member.evaluation.view.stream, "top1": member.probe.top1,
                "top5": member.probe.top5, "mean_class": member.probe.mean_class, "knn_top1": neighbours([member], (1.0,)),
                "config": asdict(member.probe.config),
            }
            for member in members
        ],
        **records[0],
        **{key: [record[key] for record in records] for key in ("run", "encoder", "num_features", "view")},
        "test_clips_trained_on": seen[0] if seen else None,
        "test_labels_not_known": "; ".join(sorted(doubts)) or None,
    }  # fmt: skip
    return first.finish(out, results, confusion, "late fusion")
