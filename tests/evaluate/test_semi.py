"""Semi-supervised recognition: which labels are known, and what is made of them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fastskel.data.protocols import semi
from fastskel.data.views import eval_view
from fastskel.evaluate import (
    Evaluation,
    LinearConfig,
    LogisticConfig,
    evaluate_semi,
    labelled_subset,
    linear_probe,
    logistic_probe,
)

VIEW = eval_view(frames=6, normalise="none")
LABELS = np.array([-1, *([0] * 50), *([1] * 9), *([2] * 40), 3])
TRAIN = np.arange(0, 101)


@pytest.fixture
def evaluation(encoder, dataset) -> Evaluation:
    split = SimpleNamespace(train=np.arange(12), test=np.arange(12, 17))
    return Evaluation(encoder, dataset, split, VIEW, progress=False)


def test_random_is_the_references_rule() -> None:
    for seed in range(3):
        chosen = labelled_subset(TRAIN, LABELS, 0.1, seed)
        assert len(chosen) == 10 and (LABELS[chosen] >= 0).all()
        assert chosen.tolist() == semi(TRAIN, LABELS, 0.1, seed).tolist()


@pytest.mark.parametrize(
    "fraction, counts",
    [(0.001, [1, 1, 1, 1]), (0.12, [4, 4, 3, 1]), (0.3, [10, 9, 10, 1]), (0.5, [20, 9, 20, 1]), (1, [50, 9, 40, 1])],
)
def test_balanced_counts(fraction, counts) -> None:
    for seed in range(5):
        found = np.bincount(LABELS[labelled_subset(TRAIN, LABELS, fraction, seed, "balanced")], minlength=4)
        total = max(4, int(100 * fraction))
        assert found.sum() == total
        # classes that are used up aside, no two differ by more than one
        open_classes = found < np.bincount(LABELS[1:])
        assert (found >= 1).all() and (not open_classes.any() or np.ptp(found[open_classes]) <= 1)
        assert sorted(found.tolist()) == pytest.approx(sorted(counts), abs=1)


@pytest.mark.parametrize("sampling", ["random", "balanced"])
def test_subsets_are_nested_and_depend_on_nothing_else(sampling) -> None:
    small, large = (labelled_subset(TRAIN, LABELS, fraction, 7, sampling) for fraction in (0.1, 0.4))
    assert set(small) < set(large)
    assert (np.diff(large) > 0).all()
    assert labelled_subset(TRAIN, LABELS, 0.1, 7, sampling).tolist() == small.tolist()
    assert labelled_subset(TRAIN, LABELS, 0.1, 8, sampling).tolist() != small.tolist()


def test_subset_errors() -> None:
    with pytest.raises(ValueError, match="sampling must be random or balanced, got 'even'"):
        labelled_subset(TRAIN, LABELS, 0.1, 0, "even")
    for fraction in (0, 1.5):
        with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\]"):
            labelled_subset(TRAIN, LABELS, fraction, 0, "balanced")
    with pytest.raises(ValueError, match="must have labelled clips, got none"):
        labelled_subset(TRAIN[:1], LABELS, 0.5, 0, "balanced")


@pytest.mark.parametrize("config", [None, LinearConfig(epochs=20, learning_rate=0.1, milestones=(15,))], ids=["exact", "sgd"])
def test_a_whole_evaluation(evaluation, config, tmp_path: Path) -> None:
    result = evaluate_semi(
        evaluation, tmp_path / "out", fractions=(0.25, 0.5), sampling="balanced", seeds=3, config=config
    )
    assert [(row["fraction"], row["num_labels"]) for row in result["fractions"]] == [(0.25, 3), (0.5, 6)]
    assert result["solver"] == ("exact" if config is None else "sgd")
    for row in result["fractions"]:
        assert row["num_classes_seen"] == [3, 3, 3]
        assert [own["seed"] for own in row["configs"]] == [0, 1, 2]
        for name in ("top1", "top5", "mean_class"):
            values = row[name]["values"]
            assert len(values) == 3
            assert row[name]["mean"] == pytest.approx(np.mean(values))
            assert row[name]["deviation"] == pytest.approx(np.std(values, ddof=1))
    # classes lie apart: a clip of each tells most of them
    assert result["fractions"][1]["top1"]["mean"] > 0.9
    assert (result["task"], result["num_train"], result["num_test"]) == ("semi", 12, 5)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(result))


def test_only_the_labels_of_the_part_are_used(evaluation) -> None:
    result = evaluate_semi(evaluation, fractions=(0.5,), seeds=1)
    labels = evaluation.dataset.labels.copy()
    hidden = np.setdiff1d(np.arange(12), labelled_subset(np.arange(12), labels, 0.5, 0))
    labels[hidden] = (labels[hidden] + 1) % 3
    spoilt = replace(evaluation, dataset=replace(evaluation.dataset, labels=labels))
    assert evaluate_semi(spoilt, fractions=(0.5,), seeds=1)["fractions"] == result["fractions"]


def test_encoders_are_given_the_same_parts(evaluation) -> None:
    parts = [
        [row["subsets"] for row in evaluate_semi(own, fractions=(0.5,), seeds=2)["fractions"]]
        for own in (evaluation, replace(evaluation, encoder=None))
    ]
    assert parts[0] == parts[1] and len(set(parts[0][0])) == 2


def test_a_penalty_is_chosen_where_clips_can_be_held_out(evaluation) -> None:
    row = evaluate_semi(evaluation, fractions=(0.1,), sampling="balanced", seeds=1)["fractions"][0]
    assert row["num_labels"] == 3
    assert (row["configs"][0]["penalty"], row["configs"][0]["standardise"]) == (0.001, False)
    # one clip can be held out, which is no evidence: with the strongest penalty all would be taken for the class of two clips
    row = evaluate_semi(evaluation, fractions=(0.34,), sampling="balanced", seeds=3)["fractions"][0]
    assert row["num_labels"] == 4 and {config["penalty"] for config in row["configs"]} == {0.001}
    assert row["top1"]["mean"] == 1.0
    given = LogisticConfig(penalty=0.5, standardise=True)
    row = evaluate_semi(evaluation, fractions=(0.1,), sampling="balanced", seeds=1, config=given)["fractions"][0]
    assert (row["configs"][0]["penalty"], row["configs"][0]["standardise"]) == (0.5, True)
    more = replace(evaluation, split=SimpleNamespace(train=np.arange(15), test=np.arange(15, 17)))
    row = evaluate_semi(more, fractions=(1.0,), seeds=1)["fractions"][0]
    chosen = logistic_probe(*more.features(), 3, LogisticConfig()).config
    assert row["num_labels"] == 15 and row["configs"][0] == asdict(chosen)
    assert chosen.penalty != 0.001


@pytest.mark.parametrize("subjects", [None, range(17), np.arange(17) // 3 % 2], ids=["none", "one each", "two"])
def test_a_step_size_is_chosen_where_clips_can_be_held_out(evaluation, subjects) -> None:
    columns = {} if subjects is None else {"subject": np.array(subjects)}
    meta = {**evaluation.dataset.meta, "columns": dict.fromkeys(columns, "clip")}
    evaluation = replace(evaluation, dataset=replace(evaluation.dataset, columns=columns, meta=meta))
    open_config = LinearConfig(epochs=20, learning_rate=None, standardise=None, milestones=(15,))

    def used(config: LinearConfig, fraction: float = 0.1) -> list[tuple]:
        row = evaluate_semi(evaluation, fractions=(fraction,), sampling="balanced", seeds=2, config=config)["fractions"][0]
        return [(own["learning_rate"], own["standardise"]) for own in row["configs"]]

    # a clip of each class: what is held out is of classes that nothing else shows
    assert used(open_config) == [(0.06, True)] * 2
    assert used(replace(open_config, learning_rate=0.5)) == [(0.5, True)] * 2
    assert used(replace(open_config, standardise=False)) == [(0.06, False)] * 2
    train, test = evaluation.features()
    chosen = linear_probe(train, test, 3, open_config, groups=evaluation.groups(train.index)).config
    assert used(open_config, 1.0)[0] == (chosen.learning_rate, chosen.standardise) != (0.06, True)


def test_errors(evaluation) -> None:
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        evaluate_semi(evaluation, seeds=0)
    with pytest.raises(ValueError, match=r"fractions must lie in \(0, 1\], got \[2\]"):
        evaluate_semi(evaluation, fractions=[2])
    with pytest.raises(ValueError, match="must leave at least one of 12 clips"):
        evaluate_semi(evaluation, fractions=[0.01], seeds=1)
