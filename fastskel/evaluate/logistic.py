r"""Multinomial logistic regression on cached features, run to convergence: the linear probe without a schedule.

Over W (K, F) and b (K,) it minimises mean cross-entropy + penalty / 2 * |W|^2; the bias is not penalised.

Features are centred and turned onto the principal axes of the training rows, once for all penalties. Neither changes the
optimum: the bias takes up the centre, a rotation keeps |W|, and the optimum lies in the span of the rows, so that F > N
costs N columns. On these axes the curvature is about diagonal, variance * mean of p (1 - p) + penalty; L-BFGS that starts
from it needs tens of iterations, also where variances differ by orders of magnitude. Along a direction logits are linear,
so that the line search multiplies no features: an iteration costs two products, of (N, F) with (F, K) and of its transpose
with (N, K). All of it is float64.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import deque
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastskel.evaluate.evaluation import TASKS, Evaluation, Task
from fastskel.evaluate.features import FeatureSet
from fastskel.evaluate.linear import check_pair, column_scale, held_out
from fastskel.evaluate.metrics import accuracy, class_metrics

__all__ = ["PENALTIES", "LogisticConfig", "LogisticResult", "evaluate_logistic", "logistic_probe"]

# in units of the total variance of the features: from next to nothing learned to next to no penalty, strongest first
PENALTIES = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6)
# what a candidate classifies right settles long before its loss does
CHOICE_TOLERANCE = 1e-3
# steps that L-BFGS remembers
MEMORY = 20
# the line search stops where the slope has fallen to this share of the first one
SLOPE = 0.1
LINE_STEPS = 30
# rows that are in float64 at a time, beside those on the principal axes
BLOCK_ROWS = 4096


@dataclass(frozen=True)
class LogisticConfig:
    """What is fitted, and how closely.

    Attributes:
        penalty: Of the squared weights, in units of the total variance of the training features, so that it means the
            same for any encoder; scikit-learn's C is 1 / (penalty * variance * N). None: chosen on training samples
            held out.
        standardise: Scale features by the deviation of the training rows. None: chosen with the penalty.
        tolerance: Stop when the norm of the gradient, on axes scaled by the curvature, is this share of its norm at
            weights of zero.
        max_iterations: Stop after that many, and say that it did not converge.
        seed: Of the samples that are held out.
    """

    penalty: float | None = None
    standardise: bool | None = None
    tolerance: float = 1e-6
    max_iterations: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class LogisticResult:
    """What the regression reached; accuracies are fractions of one.

    Attributes:
        top1: Test accuracy.
        top5: The same among the five best classes.
        mean_class: Mean over classes of the accuracy.
        weight: (K, F), for features as given; zero for classes without training samples.
        bias: (K,); -inf for classes without training samples.
        predictions: Classes of the test rows, (N,).
        confusion: Counts by true and predicted class, (K, K).
        loss: Mean cross-entropy of the training rows with the penalty.
        penalty: Of the squared weights of features as fitted, absolute.
        iterations: Of the last fit.
        converged: Whether the gradient fell below the tolerance.
        config: As run, with nothing left open.
    """

    top1: float
    top5: float
    mean_class: float
    weight: Tensor
    bias: Tensor
    predictions: Tensor
    confusion: Tensor
    loss: float
    penalty: float
    iterations: int
    converged: bool
    config: LogisticConfig


@dataclass(frozen=True)
class _Axes:
    """Training rows on their principal axes, with a column of ones for the bias."""

    mean: Tensor
    deviation: Tensor
    axes: Tensor
    variance: Tensor
    rows: Tensor

    def fold(self, solution: Tensor) -> tuple[Tensor, Tensor]:
        """Turn weights of the axes and bias, (R + 1, K), into those of features as given, (K, F) and (K,)."""
        weight = (self.axes @ solution[:-1]).T / self.deviation
        return weight, solution[-1] - weight @ self.mean


@dataclass(frozen=True)
class _Solution:
    weight: Tensor
    loss: float
    iterations: int
    converged: bool


def _principal_axes(features: Tensor, standardise: bool, device: torch.device | str) -> _Axes:
    """Centre features (N, F) and turn them onto the R axes on which they vary; (N, R + 1) with a last column of ones."""
    num_rows, width = features.shape
    mean, deviation = (part.to(device, torch.float64) for part in column_scale(features))
    if not standardise:
        deviation = torch.ones_like(deviation)

    def centred(rows: Tensor) -> Tensor:
        return (rows.to(device, torch.float64) - mean) / deviation

    blocks = torch.split(features, BLOCK_ROWS)
    # the smaller of the two Gram matrices
    wide = width > num_rows
    gram = torch.zeros(min(num_rows, width), min(num_rows, width), dtype=torch.float64, device=device)
    if wide:
        everything = centred(features)
        gram = everything @ everything.T
    else:
        for block in blocks:
            part = centred(block)
            gram.addmm_(part.T, part)
    value, vector = torch.linalg.eigh(gram)
    # below the rounding of the Gram matrix an axis is noise
    keep = value > torch.finfo(torch.float64).eps * len(value) * value[-1].clamp_min(0)
    value, vector = value[keep], vector[:, keep]
    axes = everything.T @ (vector / value.sqrt()) if wide else vector
    rows = torch.ones(num_rows, len(value) + 1, dtype=torch.float64, device=device)
    for begin, block in zip(range(0, num_rows, BLOCK_ROWS), blocks):
        rows[begin : begin + BLOCK_ROWS, :-1] = centred(block) @ axes
    return _Axes(mean, deviation, axes, value / num_rows, rows)


def _descent(gradient: Tensor, pairs: deque[tuple[Tensor, Tensor]], curvature: Tensor) -> Tensor:
    """Direction of L-BFGS (Nocedal, 1980) from a gradient, (R + 1, K), and the last steps with their changes of it.

    Where they say nothing, the curvature of each axis does, (R + 1, 1).
    """
    direction, shares = -gradient, []
    for step, change in reversed(pairs):
        share = (step * direction).sum() / (step * change).sum()
        direction = direction - share * change
        shares.append(share)
    direction = direction / curvature
    if pairs:
        step, change = pairs[-1]
        direction = direction * ((step * change).sum() / (change.square() / curvature).sum())
    for (step, change), share in zip(pairs, reversed(shares)):
        direction = direction + step * (share - (change * direction).sum() / (step * change).sum())
    return direction


def _step_length(logits: Tensor, along: Tensor, own: Tensor, slope_of_penalty: float, bend_of_penalty: float) -> float:
    """Length that minimises a convex loss along a direction, by Newton's method within a bracket; 0 if it does not fall.

    Args:
        logits: (N, K).
        along: Change of the logits by a step of length 1, (N, K).
        own: Mean over rows of `along` of the true class, scalar.
        slope_of_penalty: Derivative of the penalty at 0.
        bend_of_penalty: Its second derivative.
    Returns:
        Length at which the slope is at most `SLOPE` of that at 0, in size.
    """

    def derivatives(length: float) -> tuple[float, float]:
        share = torch.softmax(logits + length * along, 1)
        mean = (share * along).sum(1)
        bend = (share * along.square()).sum(1) - mean.square()
        slope = mean.mean() - own + slope_of_penalty + length * bend_of_penalty
        return float(slope), float(bend.mean().clamp_min(0)) + bend_of_penalty

    first, _ = derivatives(0.0)
    if not first < 0:
        return 0.0
    low, high, length = 0.0, math.inf, 1.0
    for _ in range(LINE_STEPS):
        slope, bend = derivatives(length)
        if abs(slope) <= SLOPE * -first:
            break
        low, high = (length, high) if slope < 0 else (low, length)
        length = length - slope / bend if bend > 0 else math.inf
        if not low < length < high:
            length = (low + high) / 2 if high < math.inf else 4 * low
    return length


def _minimise(
    rows: Tensor, labels: Tensor, num_classes: int, variance: Tensor, penalty: float, tolerance: float, max_iterations: int,
    start: Tensor | None = None,
) -> _Solution:  # fmt: skip
    """Fit weights (R + 1, K) to rows (N, R + 1) of known variance (R,) and labels (N,), every class of which occurs."""
    num_rows = len(rows)
    truth = torch.nn.functional.one_hot(labels, num_classes).to(rows.dtype)
    # the last row is the bias: a column of ones, without a penalty
    penalties = torch.cat([torch.full_like(variance, penalty), variance.new_zeros(1)])[:, None]
    spread = torch.cat([variance, variance.new_ones(1)])[:, None]

    def derivatives(logits: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient (R + 1, K), and the curvature of each axis, (R + 1, 1), as if all rows and classes had the same."""
        share = torch.softmax(logits, 1)
        gradient = rows.T @ (share - truth) / num_rows + penalties * weight
        # a single class has none at all
        bend = (share * (1 - share)).mean().clamp_min(torch.finfo(share.dtype).eps)
        return gradient, spread * bend + penalties

    zero = torch.zeros(rows.shape[1], num_classes, dtype=rows.dtype, device=rows.device)
    gradient, scale = derivatives(torch.zeros_like(truth), zero)

    def size(gradient: Tensor) -> float:
        return float((gradient / scale.sqrt()).norm())

    enough = tolerance * size(gradient)
    weight = zero if start is None else start
    logits = rows @ weight
    pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=MEMORY)
    gradient, curvature = derivatives(logits, weight)
    iteration = 0
    while size(gradient) > enough and iteration < max_iterations:
        direction = _descent(gradient, pairs, curvature)
        along = rows @ direction
        slope, bend = float((penalties * weight * direction).sum()), float((penalties * direction.square()).sum())
        length = _step_length(logits, along, (along * truth).sum() / num_rows, slope, bend)
        if length == 0:
            break
        weight, logits, before = weight + length * direction, logits + length * along, gradient
        gradient, curvature = derivatives(logits, weight)
        iteration += 1
        step, change = length * direction, gradient - before
        if float((step * change).sum()) > 0:
            pairs.append((step, change))
    loss = torch.nn.functional.cross_entropy(logits, labels) + (penalties * weight.square()).sum() / 2
    return _Solution(weight, float(loss), iteration, size(gradient) <= enough)


def _fit(
    space: _Axes, chosen: Tensor, labels: Tensor, penalty: float, tolerance: float, max_iterations: int,
    start: Tensor | None = None,
) -> tuple[Tensor, _Solution]:  # fmt: skip
    """Classes (K',) that occur among the chosen rows (N,), and the fit of these rows."""
    classes, compact = torch.unique(labels[chosen], return_inverse=True)
    rows = space.rows if bool(chosen.all()) else space.rows[chosen]
    return classes, _minimise(
        rows, compact, len(classes), space.variance, penalty, tolerance, max_iterations, start=start
    )


def _choose(
    train: FeatureSet, config: LogisticConfig, groups: Tensor | None, device: torch.device | str
) -> tuple[LogisticConfig, _Axes]:
    """Choose penalty and standardisation where they are open, on samples held out of the training part."""
    labels = train.labels.to(device)
    held = held_out(train, config.seed, groups).to(device)
    penalties = [config.penalty] if config.penalty is not None else sorted(PENALTIES, reverse=True)
    best: tuple[float, LogisticConfig, _Axes] | None = None
    for standardise in [config.standardise] if config.standardise is not None else [False, True]:
        space = _principal_axes(train.features, standardise, device)
        start = None
        for penalty in penalties:
            absolute = penalty * _total_variance(space)
            tolerance = max(config.tolerance, CHOICE_TOLERANCE)
            classes, fitted = _fit(space, ~held, labels, absolute, tolerance, config.max_iterations, start)
            start = fitted.weight
            reached = accuracy(classes[(space.rows[held] @ fitted.weight).argmax(1)], labels[held])
            if best is None or reached > best[0]:
                best = (reached, replace(config, penalty=penalty, standardise=standardise), space)
    assert best is not None
    return best[1], best[2]


def _total_variance(space: _Axes) -> float:
    # features that are all alike have nothing to weigh; any positive unit will do
    return float(space.variance.sum()) or 1.0


def _check_config(config: LogisticConfig) -> None:
    for name, value in (("penalty", config.penalty), ("tolerance", config.tolerance)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"logistic_probe: config.{name} must be positive, got {value}. Try 1e-3.")
    if config.max_iterations < 1:
        raise ValueError(
            f"logistic_probe: config.max_iterations must be at least 1, got {config.max_iterations}. Leave it out."
        )


def logistic_probe(
    train: FeatureSet,
    test: FeatureSet,
    num_classes: int,
    config: LogisticConfig | None = None,
    *,
    groups: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> LogisticResult:
    """Fit a multinomial logistic regression to frozen features, to convergence, and test it.

    What the config leaves open is chosen on training samples: a fifth of the groups is held out, or without groups every
    fifth sample of each class, in random order. What classifies most of them right wins, features as given before
    standardised ones, and the strongest penalty among equals. Means and deviations are those of all training rows.

    Args:
        train: Features (N, F) and labels (N,) to fit.
        test: Features (N', F) and labels (N',) to test on; never used to choose anything.
        num_classes: K.
        config: What is fitted and how closely; all is chosen if None.
        groups: What a sample must not share with the test, such as its subject, (N,); None: samples are held out singly.
        device: Where it is fitted, in float64.
    Returns:
        Accuracies, weights (K, F), and whether it converged; it warns if it did not.
    Raises:
        ValueError: On empty or mismatched sets, labels outside of the K classes, settings out of range, or if there is
            nothing to hold out and something to choose.
    """
    config = config or LogisticConfig()
    _check_config(config)
    check_pair("logistic_probe", train, test, num_classes)
    if config.penalty is None or config.standardise is None:
        config, space = _choose(train, config, groups, device)
    else:
        space = _principal_axes(train.features, config.standardise, device)
    assert config.penalty is not None
    penalty = config.penalty * _total_variance(space)
    everything = torch.ones(len(train), dtype=torch.bool, device=device)
    classes, fitted = _fit(
        space, everything, train.labels.to(device), penalty, config.tolerance, config.max_iterations
    )
    if not fitted.converged:
        warnings.warn(
            f"logistic_probe: the gradient did not fall to {config.tolerance} of its norm within {fitted.iterations} "
            "iterations; raise config.max_iterations or config.penalty",
            RuntimeWarning,
            stacklevel=2,
        )
    weight = torch.zeros(num_classes, train.features.shape[1], dtype=torch.float64, device=device)
    bias = torch.full((num_classes,), -math.inf, dtype=torch.float64, device=device)
    weight[classes], bias[classes] = space.fold(fitted.weight)
    blocks = torch.split(test.features, BLOCK_ROWS)
    scores = torch.cat([block.to(device, torch.float64) @ weight.T + bias for block in blocks]).cpu()
    found, confusion = class_metrics(scores, test.labels.cpu())
    return LogisticResult(
        **found,
        weight=weight.cpu(),
        bias=bias.cpu(),
        predictions=scores.argmax(1),
        confusion=confusion,
        loss=fitted.loss,
        penalty=penalty,
        iterations=fitted.iterations,
        converged=fitted.converged,
        config=config,
    )


def evaluate_logistic(
    evaluation: Evaluation,
    out: str | os.PathLike[str] | None = None,
    *,
    config: LogisticConfig | None = None,
    group_column: str = "subject",
) -> dict[str, Any]:
    """Fit a logistic regression to the training clips' features and classify the test clips.

    Args:
        evaluation: Encoder, clips, and how features (N, F) are computed.
        out: Folder for results.json, confusion.csv and confusion.png; None: nothing is written.
        config: What is fitted and how closely; penalty and standardisation are chosen if None.
        group_column: Column whose values are held out whole to choose what the config leaves open, where it exists.
    Returns:
        "top1", "top5" and "mean_class" as fractions of one, "loss", "iterations", "converged", "confusion" (K, K), and
        the record of the task "linear", with "solver" "exact".
    Raises:
        ValueError: If a part of the split has no labelled clip.
    """
    train, test = evaluation.features()
    groups = evaluation.groups(train.index, group_column)
    probe = logistic_probe(train, test, len(evaluation.class_names), config, groups=groups, device=evaluation.device)
    results = {
        "top1": probe.top1,
        "top5": probe.top5,
        "mean_class": probe.mean_class,
        "solver": "exact",
        "loss": probe.loss,
        "penalty": probe.penalty,
        "iterations": probe.iterations,
        "converged": probe.converged,
        "config": asdict(probe.config),
        **evaluation.record("linear", train.index, test.index),
    }
    return evaluation.finish(out, results, probe.confusion, "logistic regression")


TASKS.add("logistic", Task(evaluate_logistic))
