"""Linear probe on cached features, with the optimiser and the schedule of USDRL's linear evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from fastskel import philox
from fastskel.evaluate.features import FeatureSet
from fastskel.evaluate.metrics import class_metrics, top_k_accuracy

__all__ = [
    "EpochRow", "LinearConfig", "LinearResult", "check_pair", "choose_config", "column_scale", "held_out", "linear_probe",
]

# initial deviation of the weights in the reference
INIT_STD = 0.01
# steps of about sqrt(10), from the reference's published 0.006 up to the 30 that its command line defaults to
LEARNING_RATES = (0.006, 0.02, 0.06, 0.2, 0.6, 2.0, 6.0, 30.0)
# every fifth training sample of a class chooses the learning rate
HELD_OUT = 5


@dataclass(frozen=True)
class LinearConfig:
    """Optimiser and schedule of the probe; the defaults are the reference's for NTU-60 cross-subject.

    Attributes:
        epochs: Passes over the training features.
        learning_rate: Step size. The reference's 0.006 suits 40,000 clips and features 2,048 wide: small sets (few
            steps per epoch) and narrow encoders need more, 0.1 to 6, or 0.1 with `standardise`. None: chosen on
            training samples held out.
        milestones: Epochs at which the step size is multiplied by `decay`.
        decay: Factor of a milestone.
        momentum: Of SGD.
        weight_decay: Of SGD.
        batch_size: Rows per step; the last batch of an epoch may be smaller.
        evaluate_every: Epochs between two readings of the test accuracy; the last epoch is always read.
        standardise: Centre and scale features by the mean and deviation of the training rows; off in the reference.
            Narrow encoders whose features share a large mean need it, raw coordinates lose by it. None: chosen with the
            learning rate.
        seed: Of the initial weights and the order of rows.
    """

    epochs: int = 160
    learning_rate: float | None = 0.006
    milestones: tuple[int, ...] = (120, 140)
    decay: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 512
    evaluate_every: int = 5
    standardise: bool | None = False
    seed: int = 0

    def rate(self, epoch: int) -> float:
        """Step size of an epoch, counted from 0."""
        if self.learning_rate is None:
            raise ValueError(
                "LinearConfig.rate: learning_rate must be a number, got None. Call choose_config first."
            )
        return self.learning_rate * self.decay ** sum(epoch >= milestone for milestone in self.milestones)


@dataclass(frozen=True)
class EpochRow:
    """One epoch of the probe; the test accuracies are None where they were not read."""

    epoch: int
    learning_rate: float
    loss: float
    train_top1: float
    test_top1: float | None = None
    test_top5: float | None = None


@dataclass(frozen=True)
class LinearResult:
    """What the probe reached; accuracies are fractions of one.

    Attributes:
        top1: Test accuracy after the last epoch: the result.
        top5: The same among the five best classes.
        mean_class: Mean over classes of the accuracy after the last epoch.
        best_top1: Best test accuracy of all epochs read: the reference's way, which selects on the test set.
        best_epoch: Its epoch, counted from 0.
        weight: (K, F), for features as given, whether standardised or not.
        bias: (K,).
        predictions: Classes of the test rows after the last epoch, (N,).
        confusion: Counts by true and predicted class, (K, K).
        history: One row per epoch.
        config: As run, with the learning rate that was used.
    """

    top1: float
    top5: float
    mean_class: float
    best_top1: float
    best_epoch: int
    weight: Tensor
    bias: Tensor
    predictions: Tensor
    confusion: Tensor
    history: tuple[EpochRow, ...]
    config: LinearConfig


def _check_set(function: str, name: str, values: FeatureSet, num_classes: int) -> None:
    if len(values) == 0:
        raise ValueError(f"{function}: {name} must have samples, got none. Check the split.")
    if values.features.dim() != 2 or values.features.shape[0] != values.labels.shape[0]:
        raise ValueError(
            f"{function}: {name} must hold features (N, F) and labels (N,), got {tuple(values.features.shape)} and "
            f"{tuple(values.labels.shape)}. Extract it again."
        )
    bad = (~torch.isfinite(values.features)).any(1).nonzero()
    if bad.numel():
        raise ValueError(
            f"{function}: {name} must have finite features, got nan or inf in row {int(bad[0])}. "
            "Check the encoder's weights and its input."
        )
    low, high = int(values.labels.min()), int(values.labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"{function}: labels of {name} must lie in 0..{num_classes - 1}, got {low}..{high}. "
            "Drop unknown labels (-1) and check num_classes."
        )


def check_pair(function: str, train: FeatureSet, test: FeatureSet, num_classes: int) -> None:
    """Refuse sets of features (N, F) and (N', F) that cannot train and test one classifier.

    Raises:
        ValueError: On empty or mismatched sets, features that are not finite, labels outside of the K classes.
    """
    _check_set(function, "train", train, num_classes)
    _check_set(function, "test", test, num_classes)
    if train.features.shape[1] != test.features.shape[1]:
        raise ValueError(
            f"{function}: test must have the width of train, got {test.features.shape[1]} and "
            f"{train.features.shape[1]}. Extract both with the same encoder."
        )


def _check_config(config: LinearConfig) -> None:
    for name in ("epochs", "batch_size", "evaluate_every"):
        if getattr(config, name) < 1:
            raise ValueError(
                f"linear_probe: config.{name} must be at least 1, got {getattr(config, name)}. Pass a positive number."
            )
    rate = config.learning_rate
    if rate is not None and not (rate > 0 and math.isfinite(rate)):
        raise ValueError(f"linear_probe: config.learning_rate must be positive, got {rate}. Try 0.1.")


def column_scale(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the columns of (N, F), (F,) each; constant columns keep their scale."""
    rows = features.to(torch.float64)
    mean = rows.mean(0)
    deviation = (rows - mean).square().mean(0).sqrt()
    # below the rounding of float32 a column is constant, and dividing would blow up its noise
    constant = deviation <= torch.finfo(torch.float32).eps * rows.abs().amax(0)
    return mean.float(), torch.where(constant, 1.0, deviation).float()


def linear_probe(
    train: FeatureSet,
    test: FeatureSet,
    num_classes: int,
    config: LinearConfig | None = None,
    *,
    groups: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> LinearResult:
    """Train one linear layer on frozen features and test it.

    Weights start as N(0, 0.01), the bias as 0; SGD with momentum on the cross-entropy; rows in the order of
    `philox.permutation(seed, epoch, N)`. The result is that of the last epoch.

    Args:
        train: Features (N, F) and labels (N,) to train on.
        test: Features (N', F) and labels (N',) to test on; never used to choose anything.
        num_classes: K.
        config: Optimiser and schedule; the reference's if None.
        groups: Of the training rows, (N,), for what `choose_config` chooses.
        device: Where the layer is trained.
    Returns:
        Accuracies, weights (K, F), history.
    Raises:
        ValueError: On empty or mismatched sets, labels outside of the K classes, or if the loss is not finite.
    Source: linear evaluation of USDRL on features of the encoder in evaluation mode.
    """
    config = config or LinearConfig()
    _check_config(config)
    check_pair("linear_probe", train, test, num_classes)
    if config.learning_rate is None or config.standardise is None:
        config = choose_config(train, num_classes, config, groups=groups, device=device)

    train_x, test_x = train.features.to(device, torch.float32), test.features.to(device, torch.float32)
    train_y, test_y = train.labels.to(device), test.labels.to(device)
    mean, deviation = torch.zeros_like(train_x[0]), torch.ones_like(train_x[0])
    if config.standardise:
        mean, deviation = column_scale(train_x)
        train_x, test_x = (train_x - mean) / deviation, (test_x - mean) / deviation

    generator = torch.Generator().manual_seed(config.seed)
    weight = torch.empty(num_classes, train_x.shape[1]).normal_(0, INIT_STD, generator=generator).to(device)
    weight.requires_grad_()
    bias = torch.zeros(num_classes, device=device, requires_grad=True)
    optimizer = torch.optim.SGD(
        [weight, bias], lr=config.rate(0), momentum=config.momentum, weight_decay=config.weight_decay
    )
    history: list[EpochRow] = []
    scores = torch.empty(0)
    for epoch in range(config.epochs):
        rate = config.rate(epoch)
        for group in optimizer.param_groups:
            group["lr"] = rate
        order = torch.from_numpy(philox.permutation(config.seed, epoch, len(train))).to(device)
        loss_sum, right = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)
        for rows in torch.split(order, config.batch_size):
            logits = functional.linear(train_x[rows], weight, bias)
            loss = functional.cross_entropy(logits, train_y[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss_sum += loss.detach() * len(rows)
            right += (logits.detach().argmax(1) == train_y[rows]).sum()
        mean_loss = float(loss_sum) / len(train)
        if not (math.isfinite(mean_loss) and bool(torch.isfinite(weight).all())):
            raise ValueError(
                f"linear_probe: the loss must stay finite, got {mean_loss} in epoch {epoch}. Lower "
                f"config.learning_rate (now {config.learning_rate}) or set config.standardise."
            )
        row = EpochRow(epoch, rate, mean_loss, int(right) / len(train))
        if (epoch + 1) % config.evaluate_every == 0 or epoch + 1 == config.epochs:
            with torch.no_grad():
                scores = functional.linear(test_x, weight, bias)
            row = replace(row, test_top1=top_k_accuracy(scores, test_y, 1), test_top5=top_k_accuracy(scores, test_y, 5))
        history.append(row)

    found, confusion = class_metrics(scores, test_y)
    read = [(row.test_top1, -row.epoch) for row in history if row.test_top1 is not None]
    best_top1, best_epoch = max(read)
    # folded, so that the weights apply to features as they come
    folded = weight.detach() / deviation
    return LinearResult(
        **found,
        best_top1=best_top1,
        best_epoch=-best_epoch,
        weight=folded.cpu(),
        bias=(bias.detach() - folded @ mean).cpu(),
        predictions=scores.argmax(1).cpu(),
        confusion=confusion,
        history=tuple(history),
        config=config,
    )


def held_out(train: FeatureSet, seed: int, groups: Tensor | None) -> Tensor:
    """Mark the samples that choose a config, (N,), bool: a fifth of the groups, or of each class, in random order.

    Raises:
        ValueError: If there are no groups to hold out, and no class has two samples.
    """
    known = torch.unique(train.labels if groups is None else groups)
    if groups is not None and len(known) > 1:
        order = torch.from_numpy(philox.permutation(seed, 0, len(known), philox.Use.SUBSET))
        return torch.isin(groups, known[order[: math.ceil(len(known) / HELD_OUT)]])
    order = torch.from_numpy(philox.permutation(seed, 0, len(train), philox.Use.SUBSET))
    held = torch.zeros(len(train), dtype=torch.bool)
    for label in torch.unique(train.labels):
        mine = order[train.labels[order] == label]
        # the last of every five, so that a class with a few samples keeps them for training
        held[mine[HELD_OUT - 1 :: HELD_OUT]] = True
    if not bool(held.any()):
        # classes smaller than five: one sample of each that has two
        for label in torch.unique(train.labels):
            held[order[train.labels[order] == label][1:2]] = True
    if not bool(held.any()):
        raise ValueError(
            "held_out: train must have two samples of some class, got one of each. Set config.learning_rate or config.penalty."
        )
    return held


def choose_config(
    train: FeatureSet,
    num_classes: int,
    config: LinearConfig,
    *,
    groups: Tensor | None = None,
    rates: tuple[float, ...] = LEARNING_RATES,
    device: torch.device | str = "cpu",
) -> LinearConfig:
    """Choose what the config leaves open, step size or standardisation, without looking at the test set.

    A fifth of the groups is held out, or without groups every fifth training sample of each class, in random order. What
    classifies most of them right wins, as given before standardised and the smallest rate among equals. A rate that
    diverges is out.

    Args:
        train: Features (N, F) and labels (N,).
        num_classes: K.
        config: What the probe will run with; `learning_rate` and `standardise` are chosen where they are None.
        groups: What a sample must not share with the test, such as its subject, (N,); None, or a single group: samples
            are held out singly, which favours settings that recognise a group again.
        rates: Candidates.
        device: Where the probes are trained.
    Returns:
        The config, with nothing left open.
    Raises:
        ValueError: If no class has two samples, or if every rate diverges.
    """
    _check_set("linear_probe", "train", train, num_classes)
    held = held_out(train, config.seed, groups)
    fit, check = (FeatureSet(train.features[rows], train.labels[rows], train.index[rows]) for rows in (~held, held))
    best: tuple[float, LinearConfig] | None = None
    tried = [config.learning_rate] if config.learning_rate is not None else sorted(rates)
    for standardise in [config.standardise] if config.standardise is not None else [False, True]:
        for rate in tried:
            candidate = replace(config, learning_rate=rate, standardise=standardise)
            try:
                # read once, at the end: reading more often cannot change the choice
                quiet = replace(candidate, evaluate_every=config.epochs)
                reached = linear_probe(fit, check, num_classes, quiet, device=device).top1
            except ValueError as error:
                if "the loss must stay finite" not in str(error):
                    raise
                continue
            if best is None or reached > best[0]:
                best = (reached, candidate)
    if best is None:
        raise ValueError(
            f"choose_config: one rate must converge, got divergence for all of {tried}. Set config.standardise."
        )
    return best[1]
