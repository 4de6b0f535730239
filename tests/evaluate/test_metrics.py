"""Metrics against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as oracle

from fastskel.evaluate import accuracy, confusion_matrix, mean_class_accuracy, top_k_accuracy
from fastskel.evaluate.metrics import mean_and_deviation


def _draw(num: int, num_classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num,), generator=generator)
    return labels, torch.randn(num, num_classes, generator=generator)


@pytest.mark.parametrize("num, num_classes", [(1, 2), (1, 7), (13, 2), (101, 11)], ids=str)
def test_equal_to_scikit_learn(num: int, num_classes: int) -> None:
    labels, scores = _draw(num, num_classes)
    predictions = scores.argmax(1)
    confusion = confusion_matrix(labels, predictions, num_classes)
    expected = oracle.confusion_matrix(labels, predictions, labels=range(num_classes))
    assert confusion.tolist() == expected.tolist()
    assert accuracy(predictions, labels) == pytest.approx(oracle.accuracy_score(labels, predictions), abs=1e-15)
    assert top_k_accuracy(scores, labels, 1) == accuracy(predictions, labels)
    seen = torch.unique(labels).tolist()
    recall = oracle.recall_score(labels, predictions, labels=seen, average="macro", zero_division=0)
    assert mean_class_accuracy(confusion) == pytest.approx(recall, abs=1e-15)


def test_order_of_samples_and_numbers_of_classes_do_not_matter() -> None:
    draw = torch.Generator().manual_seed(0)
    labels, scores = torch.randint(0, 6, (200,), generator=draw), torch.rand(200, 6, generator=draw)
    # a third of the samples are right
    scores[::3] += 2 * torch.nn.functional.one_hot(labels[::3], 6)

    def measures(scores: torch.Tensor, labels: torch.Tensor) -> list[float]:
        predictions = scores.argmax(1)
        mean_class = mean_class_accuracy(confusion_matrix(labels, predictions, 6))
        return [accuracy(predictions, labels), mean_class, *(top_k_accuracy(scores, labels, k) for k in (1, 2, 5))]

    order, numbers = torch.randperm(200, generator=draw), torch.randperm(6, generator=draw)
    renamed = torch.empty_like(scores)
    renamed[:, numbers] = scores
    expected = measures(scores, labels)
    # means over classes are added in another order
    assert measures(scores[order], labels[order]) == pytest.approx(expected, abs=1e-14)
    assert measures(renamed, numbers[labels]) == pytest.approx(expected, abs=1e-14)
    assert measures(torch.nn.functional.one_hot(labels, 6).float(), labels) == [1.0] * 5


def test_mean_class_is_balanced_accuracy() -> None:
    labels, scores = _draw(200, 5, seed=3)
    predictions = scores.argmax(1)
    confusion = confusion_matrix(labels, predictions, 5)
    assert mean_class_accuracy(confusion) == pytest.approx(
        oracle.balanced_accuracy_score(labels, predictions), abs=1e-15
    )


@pytest.mark.parametrize("k", [1, 2, 5, 11], ids=str)
def test_top_k_equal_to_scikit_learn(k: int) -> None:
    labels, scores = _draw(101, 11)
    expected = oracle.top_k_accuracy_score(labels, scores, k=k, labels=range(11)) if k < 11 else 1.0
    assert top_k_accuracy(scores, labels, k) == pytest.approx(expected, abs=1e-15)


def test_top_k_beyond_the_classes_and_ties() -> None:
    scores = torch.zeros(3, 3)
    labels = torch.tensor([0, 1, 2])
    assert top_k_accuracy(scores, labels, 99) == 1.0
    # equal scores rank in class order
    assert top_k_accuracy(scores, labels, 1) == pytest.approx(1 / 3)
    assert top_k_accuracy(scores, labels, 2) == pytest.approx(2 / 3)


def test_absent_classes_do_not_count() -> None:
    confusion = torch.tensor([[2, 0, 0], [0, 0, 0], [0, 2, 2]])
    assert mean_class_accuracy(confusion) == 0.75


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: accuracy(torch.zeros(2), torch.zeros(3)), "must agree in length, got 2 and 3"),
        (lambda: accuracy(torch.zeros(0), torch.zeros(0)), "must not be empty"),
        (lambda: confusion_matrix(torch.tensor([-1]), torch.tensor([0]), 2), r"labels must lie in 0\.\.1, got -1"),
        (lambda: confusion_matrix(torch.tensor([1]), torch.tensor([2]), 2), r"predictions must lie in 0\.\.1"),
        (lambda: confusion_matrix(torch.tensor([1.0]), torch.tensor([1]), 2), "one integer per sample"),
        (lambda: mean_class_accuracy(torch.zeros(2, 3)), r"must be \(K, K\), got \(2, 3\)"),
        (lambda: mean_class_accuracy(torch.zeros(2, 2)), "must count samples, got none"),
        (lambda: top_k_accuracy(torch.zeros(2, 2), torch.tensor([0, 1]), 0), "k must be at least 1"),
        (lambda: top_k_accuracy(torch.zeros(2), torch.tensor([0, 1]), 1), r"must be \(N, K\)"),
        (lambda: top_k_accuracy(torch.tensor([[0.0, 1], [0, float("nan")]]), torch.tensor([0, 1]), 1), "nan in row 1"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_one_class() -> None:
    labels = torch.zeros(3, dtype=torch.int64)
    assert confusion_matrix(labels, labels, 1).tolist() == [[3]]
    assert mean_class_accuracy(torch.tensor([[3]])) == 1.0


def test_mean_and_deviation() -> None:
    values = [0.5, 0.75, 0.25, 0.6]
    row = mean_and_deviation(values)
    assert row["values"] == values
    assert row["mean"] == pytest.approx(np.mean(values)) and row["deviation"] == pytest.approx(np.std(values, ddof=1))
    assert mean_and_deviation([0.5]) == {"mean": 0.5, "deviation": None, "values": [0.5]}
    with pytest.raises(ValueError, match="values must not be empty"):
        mean_and_deviation([])
