"""Recognition from a few examples of each class, on frozen features: N-way K-shot episodes, and one-shot exemplars."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fastskel import philox
from fastskel.data.packed import PackedDataset
from fastskel.data.protocols import NTU_NOVEL_CLASSES
from fastskel.evaluate.evaluation import TASKS, Evaluation, Task
from fastskel.evaluate.features import FeatureSet
from fastskel.evaluate.knn import knn_neighbours
from fastskel.evaluate.logistic import LogisticConfig, logistic_probe
from fastskel.evaluate.metrics import accuracy, confusion_matrix, mean_and_deviation, mean_class_accuracy
from fastskel.evaluate.report import write_results

__all__ = ["NTU_EXEMPLARS", "class_numbers", "draw_episode", "evaluate_fewshot", "evaluate_oneshot"]

# the one clip of each novel class of NTU RGB+D 120: A001 to A055 of setup 1, A061 to A115 of setup 18. As the list of the
# data set's authors is quoted by public implementations of the protocol; the authors' page itself was not at hand.
NTU_EXEMPLARS = tuple(f"S{1 if number < 60 else 18:03d}C003P008R001A{number + 1:03d}" for number in NTU_NOVEL_CLASSES)
NTU_SOURCES = ("ntu-120", "ntu120")
# two-sided 95 % of a normal distribution
NORMAL_95 = 1.96
# support sets are too small to hold anything out; in units of the variance of their features
SUPPORT_PENALTY = 0.1


def class_numbers(dataset: PackedDataset, members: Sequence[str | int], function: str) -> list[int]:
    """Turn names or numbers of some of the K classes into numbers, in their order.

    Raises:
        ValueError: If one is unknown or named twice, or there are none.
    """
    names = list(dataset.class_names)
    count = max(len(names), int(np.max(dataset.labels, initial=-1)) + 1)
    numbers = []
    for member in members:
        if isinstance(member, str) and member in names:
            number = names.index(member)
        elif isinstance(member, (int, np.integer)) and not isinstance(member, bool):
            number = int(member)
        else:
            number = int(member) if isinstance(member, str) and member.isdecimal() else -1
        if not 0 <= number < count:
            raise ValueError(
                f"{function}: classes must be names or numbers below {count} of {dataset.path}, got {member!r}. "
                "See fastskel info."
            )
        numbers.append(number)
    if not numbers or len(set(numbers)) != len(numbers):
        raise ValueError(f"{function}: classes must be one or more, each once, got {list(members)}. Correct the list.")
    return numbers


def draw_episode(
    sizes: Sequence[int], ways: int, shots: int, queries: int, seed: int, episode: int
) -> list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """Draw the classes of an episode, and the clips of each that are shown and asked for.

    The classes are `distinct` of the words at (seed, 0, episode, 0, Use.EPISODE); the clips of way w, first those shown,
    `distinct` of those at (seed, w + 1, episode, 0, Use.EPISODE).

    Args:
        sizes: Clips of each class, (K,), above `shots`.
        ways: Classes of the episode.
        shots: Clips shown of each.
        queries: Clips asked for of each; a class that has fewer left gives all.
        seed: Of all episodes.
        episode: Number of the episode.
    Returns:
        For each way its class, the numbers within the class of those shown, (shots,), and of those asked for, (Q,).
    Raises:
        ValueError: If there are fewer classes than ways.
    """
    chosen = philox.distinct(philox.words(seed, [0], episode, 0, philox.Use.EPISODE, ways), len(sizes))[0]
    drawn = []
    for way, number in enumerate(chosen.tolist()):
        count = min(shots + queries, sizes[number])
        clips = philox.distinct(
            philox.words(seed, [way + 1], episode, 0, philox.Use.EPISODE, count), sizes[number]
        )[0]
        drawn.append((number, clips[:shots], clips[shots:]))
    return drawn


def _nearest_mean(support: Tensor, own: Tensor, query: Tensor, ways: int) -> Tensor:
    """Way of each query (Q, F): the mean of unit vectors (S, F) of ways (S,) that is nearest by angle."""
    means = torch.zeros(ways, support.shape[1], dtype=support.dtype)
    means.index_add_(0, own, functional.normalize(support, dim=1))
    return (query @ functional.normalize(means, dim=1).T).argmax(1)


def _logistic(support: Tensor, own: Tensor, query: Tensor, ways: int) -> Tensor:
    config = LogisticConfig(penalty=SUPPORT_PENALTY, standardise=False, tolerance=1e-4)
    # the labels of the queries have no say in what is predicted
    unknown = own.new_zeros(len(query))
    return logistic_probe(FeatureSet(support, own, own), FeatureSet(query, unknown, unknown), ways, config).predictions


def evaluate_fewshot(
    evaluation: Evaluation,
    out: str | os.PathLike[str] | None = None,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    episodes: int = 1000,
    classifier: Literal["mean", "logistic"] = "mean",
    classes: Sequence[str | int] | None = None,
    centre: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Recognise clips of the test part among a few classes, of each of which a few clips of the test part are shown.

    Args:
        evaluation: Encoder, clips, and how features (N, F) are computed.
        out: Folder for results.json; None: nothing is written.
        ways: Classes of an episode.
        shots: Clips shown of each.
        queries: Clips asked for of each, where there are as many.
        episodes: Episodes, with draws of their own, see `draw_episode`.
        classifier: "mean": the nearest class mean by angle; "logistic": a logistic regression on the clips shown.
        classes: Names or numbers of the classes to draw from; those that the test part has more clips of than `shots`
            if None, and the others are named in the results.
        centre: Subtract the mean of the training clips' features first, and scale to unit length.
        seed: Of the draws.
    Returns:
        "top1" with mean, deviation, "interval" (half of the 95 % interval of the mean) and values over the episodes,
        the settings, and the record.
    Raises:
        ValueError: If a class that was asked for has too few clips, or there are fewer classes than ways.
    """
    for name, value in (("ways", ways), ("shots", shots), ("queries", queries), ("episodes", episodes)):
        if value < (2 if name == "ways" else 1):
            raise ValueError(f"evaluate_fewshot: {name} must be at least {2 if name == 'ways' else 1}, got {value}. Raise it.")
    if classifier not in ("mean", "logistic"):
        raise ValueError(f"evaluate_fewshot: classifier must be mean or logistic, got {classifier!r}. Choose one.")
    asked = None if classes is None else class_numbers(evaluation.dataset, classes, "evaluate_fewshot")
    test = evaluation.features_of(evaluation.known("test"))
    count = torch.bincount(test.labels, minlength=len(evaluation.class_names)).tolist()
    members = asked if asked is not None else [number for number, clips in enumerate(count) if clips > shots]
    short = [number for number in members if count[number] <= shots]
    if short:
        raise ValueError(
            f"evaluate_fewshot: classes must have more than {shots} test clips, got {count[short[0]]} of "
            f"{evaluation.class_names[short[0]]!r}. Leave it out."
        )
    if len(members) < ways:
        raise ValueError(
            f"evaluate_fewshot: ways must be at most {len(members)}, the classes with more than {shots} test clips, got "
            f"{ways}. Lower it."
        )
    train_index, rows = test.index[:0], test.features
    if centre:
        train = evaluation.features_of(evaluation.known("train"))
        train_index, rows = train.index, rows - train.features.mean(0, dtype=torch.float64).float()
    if centre or classifier == "mean":
        rows = functional.normalize(rows, dim=1)
    clips = [(test.labels == number).nonzero().flatten() for number in members]
    own = torch.arange(ways).repeat_interleave(shots)
    reached = []
    for episode in range(episodes):
        drawn = draw_episode([len(mine) for mine in clips], ways, shots, queries, seed, episode)
        shown = torch.cat([clips[number][torch.from_numpy(support)] for number, support, _ in drawn])
        asked_for = torch.cat([clips[number][torch.from_numpy(query)] for number, _, query in drawn])
        truth = torch.arange(ways).repeat_interleave(torch.tensor([len(query) for _, _, query in drawn]))
        predict = _nearest_mean if classifier == "mean" else _logistic
        reached.append(accuracy(predict(rows[shown], own, rows[asked_for], ways), truth))
    top1 = mean_and_deviation(reached)
    top1["interval"] = None if episodes == 1 else NORMAL_95 * top1["deviation"] / math.sqrt(episodes)
    names = evaluation.class_names
    results = {
        "top1": top1,
        "ways": ways,
        "shots": shots,
        "queries": queries,
        "episodes": episodes,
        "classifier": classifier,
        "centred": centre,
        "seed": seed,
        "classes": [names[number] for number in members],
        "classes_left_out": [names[number] for number, clips_of in enumerate(count) if clips_of and number not in members],
        **evaluation.record("fewshot", train_index, test.index),
    }
    if not centre:
        # training clips are not dropped: they are not asked for
        results["dropped_train"] = 0
    if out is not None:
        write_results(Path(out) / "results.json", results)
    return results


def _exemplars(dataset: PackedDataset, novel: Sequence[int], pool: NDArray[np.int64], names: Sequence[str] | None) -> list[int]:
    """Clip of each novel class that is shown: the named one, or the first of the pool, (n,)."""
    labels = np.asarray(dataset.labels)
    if names is None:
        chosen = [pool[labels[pool] == number][:1].tolist() for number in novel]
        absent = [number for number, clip in zip(novel, chosen) if not clip]
        if absent:
            raise ValueError(
                f"evaluate_oneshot: every novel class must have a clip in {dataset.path}, got none of class {absent[0]}. "
                "Leave it out."
            )
        return [clip[0] for clip in chosen]
    known = {str(name): number for number, name in enumerate(dataset.names)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"evaluate_oneshot: exemplars must be clips of {dataset.path}, got {unknown[0]!r} ({len(unknown)} unknown). "
            "Correct the list, or pack the missing clips."
        )
    clips = [known[name] for name in names]
    found = labels[clips].tolist()
    if sorted(found) != sorted(novel):
        raise ValueError(
            f"evaluate_oneshot: exemplars must be one clip of each of the classes {sorted(novel)}, got clips of "
            f"{sorted(found)}. Correct the list."
        )
    return [clips[found.index(number)] for number in novel]


def evaluate_oneshot(
    evaluation: Evaluation,
    out: str | os.PathLike[str] | None = None,
    *,
    novel: Sequence[str | int] | None = None,
    exemplars: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Recognise test clips of novel classes by the most similar of their exemplars, one clip of each class.

    For NTU RGB+D 120 classes and exemplars are those of its one-shot protocol (`NTU_EXEMPLARS`); with the protocol
    `one-shot` the test part is all clips of the novel classes, and the training part all others.

    Args:
        evaluation: Encoder, clips, and how features (N, F) are computed.
        out: Folder for results.json, confusion.csv and confusion.png; None: nothing is written.
        novel: Names or numbers of the novel classes; those of the test part if None.
        exemplars: Names of clips, one of each novel class, of any part; the first labelled clip of each class, in the order
            of the data set, if None.
    Returns:
        "top1" and "mean_class" as fractions of one, "exemplars", "confusion" (K, K) over the novel classes, and the
        record. Exemplars are not among the test clips; "train_clips_of_novel_classes" counts what a protocol with novel
        classes does not have.
    Raises:
        ValueError: If a class or a clip is unknown, a class has no or several exemplars, or nothing is left to test on.
    Source: Liu et al., "NTU RGB+D 120", TPAMI 2019, one-shot recognition; nearest by cosine similarity.
    """
    dataset = evaluation.dataset
    labels = np.asarray(dataset.labels)
    published = dataset.source in NTU_SOURCES and novel is None
    members = class_numbers(dataset, novel, "evaluate_oneshot") if novel is not None else None
    if members is None:
        known = np.unique(labels[evaluation.known("test")]).tolist()
        members = list(NTU_NOVEL_CLASSES) if published else known
    evaluation.check_unseen(np.flatnonzero(np.isin(labels, members)), "the novel classes", "Fine-tune on the others")
    pool = np.sort(np.concatenate([evaluation.split.train, evaluation.split.test]))
    shown = _exemplars(dataset, members, pool, NTU_EXEMPLARS if published and exemplars is None else exemplars)
    test = evaluation.known("test")
    test = test[np.isin(labels[test], members) & ~np.isin(test, shown)]
    if len(test) == 0:
        raise ValueError("evaluate_oneshot: the test part must have clips of the novel classes, got none. Check the protocol.")
    support, query = (evaluation.features_of(np.asarray(clips, dtype=np.int64)) for clips in (shown, test))
    nearest = knn_neighbours(support.features, query.features, 1, device=evaluation.device)[1][:, 0]
    truth = torch.from_numpy(np.searchsorted(np.sort(members), query.labels.numpy()))
    # classes of the results are the novel ones, in the order of the data set
    place = torch.from_numpy(np.argsort(np.argsort(members)))
    names = [evaluation.class_names[number] for number in sorted(members)]
    predictions = place[nearest]
    confusion = confusion_matrix(truth, predictions, len(members))
    num_train_novel = int(np.isin(labels[evaluation.split.train], members).sum())
    # the protocol tests every other clip of the novel classes and trains on none
    whole = num_train_novel == 0 and len(test) + len(shown) == int(np.isin(labels, members).sum())
    results = {
        "top1": accuracy(predictions, truth),
        "mean_class": mean_class_accuracy(confusion),
        "classes": names,
        "exemplars": [str(dataset.names[clip]) for clip in shown],
        "published_protocol": published and exemplars is None and whole,
        "train_clips_of_novel_classes": num_train_novel,
        **evaluation.record("oneshot", support.index, query.index),
        # exemplars and clips of other classes are not dropped
        "dropped_train": 0,
        "dropped_test": len(evaluation.split.test) - len(evaluation.known("test")),
    }
    return evaluation.finish(out, results, confusion, "one-shot", names)


TASKS.add("fewshot", Task(evaluate_fewshot))
TASKS.add("oneshot", Task(evaluate_oneshot))
