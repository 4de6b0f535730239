"""Accuracies and the confusion matrix, as fractions of one, from plain tensors."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["accuracy", "class_metrics", "confusion_matrix", "mean_and_deviation", "mean_class_accuracy", "top_k_accuracy"]


def _check_labels(function: str, name: str, labels: Tensor, num_classes: int) -> None:
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            f"{function}: {name} must be one integer per sample, got {labels.dtype} of shape {tuple(labels.shape)}. "
            "Pass class numbers (N,)."
        )
    if labels.numel() == 0:
        raise ValueError(f"{function}: {name} must not be empty, got 0 samples. Check the split.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"{function}: {name} must lie in 0..{num_classes - 1}, got {low}..{high}. Drop unknown labels (-1) first."
        )


def _check_pair(function: str, predictions: Tensor, labels: Tensor) -> None:
    if predictions.shape[0] != labels.shape[0]:
        raise ValueError(
            f"{function}: predictions and labels must agree in length, got {predictions.shape[0]} and "
            f"{labels.shape[0]}. Pass one prediction per label."
        )


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Fraction of samples whose predicted class, (N,), is the label, (N,).

    Raises:
        ValueError: If lengths differ or there are no samples.
    """
    _check_pair("accuracy", predictions, labels)
    if labels.numel() == 0:
        raise ValueError("accuracy: labels must not be empty, got 0 samples. Check the split.")
    return int((predictions == labels).sum()) / labels.numel()


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int) -> float:
    """Fraction of samples whose label is among the k best scores.

    Equal scores rank in class order, so that the result does not depend on a sort; a k above K counts as K.

    Args:
        scores: Class scores, (N, K), larger is better.
        labels: Classes, (N,).
        k: Number of best classes, at least 1.
    Raises:
        ValueError: On shapes, on labels outside of the K classes, on scores that are NaN.
    """
    if k < 1:
        raise ValueError(f"top_k_accuracy: k must be at least 1, got {k}. Pass 1 or 5.")
    if scores.dim() != 2:
        raise ValueError(f"top_k_accuracy: scores must be (N, K), got {tuple(scores.shape)}. Pass one row per sample.")
    _check_pair("top_k_accuracy", scores, labels)
    _check_labels("top_k_accuracy", "labels", labels, scores.shape[1])
    bad = torch.isnan(scores).any(1).nonzero()
    if bad.numel():
        raise ValueError(f"top_k_accuracy: scores must be numbers, got nan in row {int(bad[0])}. Check the model.")
    own = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device)[None, :] < labels[:, None]
    rank = ((scores > own) | ((scores == own) & earlier)).sum(1)
    return int((rank < k).sum()) / labels.numel()


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Count samples by true class (row) and predicted class (column).

    Args:
        labels: True classes, (N,).
        predictions: Predicted classes, (N,).
        num_classes: K.
    Returns:
        Counts, (K, K), int64, on the host.
    Raises:
        ValueError: On lengths that differ and on classes outside of the K.
    """
    _check_pair("confusion_matrix", predictions, labels)
    _check_labels("confusion_matrix", "labels", labels, num_classes)
    _check_labels("confusion_matrix", "predictions", predictions, num_classes)
    cell = labels.to("cpu", torch.int64) * num_classes + predictions.to("cpu", torch.int64)
    return torch.bincount(cell, minlength=num_classes * num_classes).reshape(num_classes, num_classes)


def mean_class_accuracy(confusion: Tensor) -> float:
    """Mean over the classes that occur of the fraction predicted right, from counts (K, K).

    Raises:
        ValueError: If the matrix is not square or counts nothing.
    """
    if confusion.dim() != 2 or confusion.shape[0] != confusion.shape[1]:
        raise ValueError(
            f"mean_class_accuracy: confusion must be (K, K), got {tuple(confusion.shape)}. Pass confusion_matrix(...)."
        )
    totals = confusion.sum(1)
    seen = totals > 0
    if not bool(seen.any()):
        raise ValueError("mean_class_accuracy: confusion must count samples, got none. Check the split.")
    recall = confusion.diagonal()[seen].to(torch.float64) / totals[seen].to(torch.float64)
    return float(recall.mean())


def class_metrics(scores: Tensor, labels: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Judge class scores (N, K) by labels (N,).

    Returns:
        "top1", "top5" and "mean_class" as fractions of one, and the counts of `confusion_matrix`, (K, K).
    Raises:
        ValueError: As `top_k_accuracy` and `confusion_matrix`.
    """
    predictions = scores.argmax(1)
    confusion = confusion_matrix(labels, predictions, scores.shape[1])
    found = {
        "top1": accuracy(predictions, labels), "top5": top_k_accuracy(scores, labels, 5),
        "mean_class": mean_class_accuracy(confusion),
    }  # fmt: skip
    return found, confusion


def mean_and_deviation(values: Sequence[float]) -> dict[str, Any]:
    """Sum up what several seeds reached, for results.json.

    Returns:
        "mean", "deviation" (of the sample, n - 1; None for a single value) and "values".
    Raises:
        ValueError: If there are no values.
    """
    if not values:
        raise ValueError("mean_and_deviation: values must not be empty, got none. Run a seed.")
    numbers = [float(value) for value in values]
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
    return {"mean": statistics.fmean(numbers), "deviation": deviation, "values": numbers}
