"""Semi-supervised recognition: a linear probe that knows the labels of a small part of the training clips."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastskel import philox
from fastskel.data.protocols import semi
from fastskel.evaluate.evaluation import TASKS, Evaluation, Task
from fastskel.evaluate.features import FeatureSet
from fastskel.evaluate.linear import LinearConfig, LinearResult, held_out, linear_probe
from fastskel.evaluate.logistic import LogisticConfig, LogisticResult, logistic_probe
from fastskel.evaluate.metrics import mean_and_deviation
from fastskel.evaluate.report import write_results

__all__ = ["UNCHOSEN_PENALTY", "evaluate_semi", "labelled_subset", "probe_of_few"]

# where too few clips can be held out to choose one. A strong penalty shrinks weights but not the bias: where some classes have
# a clip more than others everything is then taken for these
UNCHOSEN_PENALTY = 1e-3
# of SGD on standardised features: on training subjects held out, by one or two clips of each class, 0.006 to 0.2 differ by less
# than a percent, and larger steps, or features as they are, classify fewer right
UNCHOSEN_RATE = 0.06


def labelled_subset(
    train: NDArray[np.int64],
    labels: NDArray[np.int64],
    fraction: float,
    seed: int,
    sampling: Literal["random", "balanced"] = "random",
) -> NDArray[np.int64]:
    """Choose the training clips whose labels are known; the choice depends on these arguments alone.

    Clips are taken in the order of `philox.permutation(seed, 0, k, Use.SUBSET)` of the k labelled clips: "random" takes the
    first of them; "balanced" takes the first of every class, then the second of every class, and so on. Larger fractions
    hold smaller ones.

    Args:
        train: Training clips, (N,).
        labels: Class of every clip of the data set, (n,), -1 where unknown.
        fraction: Part of the labelled clips, in (0, 1].
        seed: Seed of the permutation.
        sampling: "random", int(k * fraction) clips whatever their classes, as the reference does; or "balanced", as
            many, but at least one of each class, and as equally many of each as there are.
    Returns:
        Chosen clips, ascending, (l,).
    Raises:
        ValueError: If the sampling is unknown, the fraction is out of range, or it leaves nothing.
    """
    if sampling == "random":
        return semi(train, labels, fraction, seed)
    if sampling != "balanced":
        raise ValueError(f"labelled_subset: sampling must be random or balanced, got {sampling!r}. Choose one.")
    if not 0 < fraction <= 1:
        raise ValueError(f"labelled_subset: fraction must be in (0, 1], got {fraction}. Choose another.")
    known = train[labels[train] != -1]
    if len(known) == 0:
        raise ValueError("labelled_subset: train must have labelled clips, got none. Check the split.")
    order = known[philox.permutation(seed, 0, len(known), philox.Use.SUBSET)]
    turn = np.empty(len(order), dtype=np.int64)
    classes = np.unique(labels[order])
    for label in classes:
        mine = labels[order] == label
        turn[mine] = np.arange(mine.sum())
    count = max(len(classes), int(len(order) * fraction))
    return np.sort(order[np.argsort(turn, kind="stable")[:count]])


def _can_choose(train: FeatureSet, seed: int, groups: Tensor | None) -> bool:
    """Whether a choice has evidence: as many clips held out of classes (K,) that the other clips show as there are classes."""
    if int(torch.bincount(train.labels).max()) < 2:
        return False
    held = held_out(train, seed, groups)
    known = torch.isin(train.labels[held], train.labels[~held])
    return int(known.sum()) >= len(torch.unique(train.labels))


def _unchosen(config: LinearConfig | LogisticConfig) -> LinearConfig | LogisticConfig:
    """Set what a config leaves open, without a look at features (N, F)."""
    if isinstance(config, LogisticConfig):
        penalty = UNCHOSEN_PENALTY if config.penalty is None else config.penalty
        return replace(config, penalty=penalty, standardise=bool(config.standardise))
    rate = UNCHOSEN_RATE if config.learning_rate is None else config.learning_rate
    return replace(config, learning_rate=rate, standardise=True if config.standardise is None else config.standardise)


def probe_of_few(
    train: FeatureSet, test: FeatureSet, num_classes: int, config: LinearConfig | LogisticConfig, groups: Tensor | None,
    device: torch.device | str,
) -> LinearResult | LogisticResult:  # fmt: skip
    """Train a linear probe on clips (N, F), which may be too few to choose what its config leaves open."""
    if not _can_choose(train, config.seed, groups):
        config = _unchosen(config)
    if isinstance(config, LinearConfig):
        return linear_probe(train, test, num_classes, config, groups=groups, device=device)
    return logistic_probe(train, test, num_classes, config, groups=groups, device=device)


def evaluate_semi(
    evaluation: Evaluation,
    out: str | os.PathLike[str] | None = None,
    *,
    fractions: Sequence[float] = (0.01, 0.05, 0.1),
    sampling: Literal["random", "balanced"] = "random",
    seeds: int = 5,
    config: LinearConfig | LogisticConfig | None = None,
    group_column: str = "subject",
) -> dict[str, Any]:
    """Train linear probes on parts of the training labels and classify the test clips.

    Args:
        evaluation: Encoder, clips, and how features (N, F) are computed.
        out: Folder for results.json; None: nothing is written.
        fractions: Parts of the labelled training clips.
        sampling: How a part is chosen, see `labelled_subset`.
        seeds: Parts drawn of each fraction, with seeds from 0.
        config: A `LogisticConfig` is fitted to convergence, the default; a `LinearConfig` trains with SGD. Their seed is
            replaced by that of the part.
        group_column: Column whose values are held out whole, within the part, to choose what the config leaves open.
    Returns:
        "fractions": for each the number of labels, "top1", "top5" and "mean_class" with mean, deviation and values over
        the seeds, digests of the parts and what the probes ran with; and the record. Where fewer clips can be held out than
        there are classes, of classes that other clips show, an open penalty is 0.001 and open standardisation is off; with SGD
        an open step size is 0.06 and open standardisation is on.
    Raises:
        ValueError: If a fraction is out of range, if it leaves nothing, if seeds is below 1, or if the encoder saw labels of
            the training part.
    """
    if seeds < 1:
        raise ValueError(f"evaluate_semi: seeds must be at least 1, got {seeds}. Pass 5.")
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        raise ValueError(f"evaluate_semi: fractions must lie in (0, 1], got {list(fractions)}. Pass 0.01 for 1 %.")
    config = config or LogisticConfig()
    # an encoder that saw all labels says nothing of few
    evaluation.check_unseen(
        evaluation.known("train"), "the part that few labels are drawn from", "Take an encoder that was pretrained without labels"
    )
    train, test = evaluation.features()
    labels = np.asarray(evaluation.dataset.labels)
    rows = []
    for fraction in fractions:
        probes: list[LinearResult | LogisticResult] = []
        parts = []
        for seed in range(seeds):
            chosen = labelled_subset(train.index.numpy(), labels, fraction, seed, sampling)
            keep = torch.isin(train.index, torch.from_numpy(chosen))
            part = FeatureSet(train.features[keep], train.labels[keep], train.index[keep])
            groups = evaluation.groups(part.index, group_column)
            own = replace(config, seed=seed)
            probes.append(probe_of_few(part, test, len(evaluation.class_names), own, groups, evaluation.device))
            parts.append(chosen)
        rows.append(
            {
                "fraction": fraction,
                "num_labels": len(parts[0]),
                "num_classes_seen": [len(np.unique(labels[part])) for part in parts],
                **{
                    name: mean_and_deviation([getattr(probe, name) for probe in probes])
                    for name in ("top1", "top5", "mean_class")
                },
                "subsets": [hashlib.sha256(part.astype("<i8").tobytes()).hexdigest() for part in parts],
                "configs": [asdict(probe.config) for probe in probes],
            }
        )
    results = {
        "fractions": rows,
        "sampling": sampling,
        "seeds": list(range(seeds)),
        "solver": "exact" if isinstance(config, LogisticConfig) else "sgd",
        **evaluation.record("semi", train.index, test.index),
    }
    if out is not None:
        write_results(Path(out) / "results.json", results)
    return results


TASKS.add("semi", Task(evaluate_semi))
