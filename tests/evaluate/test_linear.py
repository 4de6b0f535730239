"""The linear probe against a loop written by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fastskel.evaluate import FeatureSet, LinearConfig, LinearResult, choose_config, linear_probe
from fastskel.evaluate import linear as linear_module
from fastskel.philox import permutation


def _set(num: int, width: int, num_classes: int, noise: float, seed: int = 0) -> FeatureSet:
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % num_classes
    features = centres[labels] + noise * torch.randn(num, width, generator=generator)
    return FeatureSet(features, labels, torch.arange(num))


def test_separable_features_are_learnt() -> None:
    result = linear_probe(_set(90, 16, 5, 0.1), _set(31, 16, 5, 0.1, seed=1), 5, LinearConfig(learning_rate=0.1))
    assert (result.top1, result.top5, result.mean_class, result.best_top1) == (1.0, 1.0, 1.0, 1.0)
    assert result.history[-1].train_top1 == 1.0
    assert result.confusion.diagonal().sum() == 31


@pytest.mark.parametrize("num, batch_size", [(50, 16), (50, 512), (1, 1)], ids=["ragged", "one-batch", "unit"])
def test_equal_to_a_loop_written_by_hand(num: int, batch_size: int) -> None:
    train, test = _set(num, 7, 4, 1.5), _set(23, 7, 4, 1.5, seed=1)
    config = LinearConfig(
        epochs=9,
        learning_rate=0.3,
        milestones=(4, 7),
        batch_size=batch_size,
        evaluate_every=4,
        weight_decay=0.01,
        seed=3,
    )
    result = linear_probe(train, test, 4, config)

    layer = nn.Linear(7, 4)
    with torch.no_grad():
        layer.weight.normal_(0, 0.01, generator=torch.Generator().manual_seed(3))
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [4, 7], 0.1)
    read = {}
    for epoch in range(9):
        assert result.history[epoch].learning_rate == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        order = torch.from_numpy(permutation(3, epoch, num))
        total = 0.0
        for begin in range(0, num, batch_size):
            rows = order[begin : begin + batch_size]
            loss = nn.functional.cross_entropy(layer(train.features[rows]), train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        schedule.step()
        # fp32 sums of at most 50 losses
        assert result.history[epoch].loss == pytest.approx(total / num, rel=1e-5)
        if epoch in (3, 7, 8):
            read[epoch] = (layer(test.features).argmax(1) == test.labels).double().mean().item()
    assert {row.epoch: row.test_top1 for row in result.history if row.test_top1 is not None} == pytest.approx(read)
    torch.testing.assert_close(result.weight, layer.weight.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.bias, layer.bias.detach(), rtol=1e-5, atol=1e-6)
    assert result.top1 == pytest.approx(read[8])
    assert result.best_top1 == pytest.approx(max(read.values()))
    assert result.best_epoch == min(epoch for epoch, value in read.items() if value == max(read.values()))


def test_defaults_are_the_references() -> None:
    config = LinearConfig()
    rates = {config.rate(epoch) for epoch in range(120)}, {config.rate(e) for e in range(120, 140)}, config.rate(140)
    assert rates == ({0.006}, {0.006 * 0.1}, 0.006 * 0.1**2)
    assert (config.epochs, config.momentum, config.weight_decay, config.batch_size) == (160, 0.9, 0.0, 512)
    assert not config.standardise


def test_seeded() -> None:
    train, test = _set(40, 5, 3, 1.0), _set(20, 5, 3, 1.0, seed=1)
    config = LinearConfig(epochs=3, learning_rate=0.1, batch_size=8)
    torch.manual_seed(1)
    first = linear_probe(train, test, 3, config)
    torch.manual_seed(2)
    assert torch.equal(first.weight, linear_probe(train, test, 3, config).weight)
    assert not torch.equal(first.weight, linear_probe(train, test, 3, replace(config, seed=1)).weight)


def test_standardise_uses_the_training_rows_and_is_folded_into_the_weights() -> None:
    train, test = _set(60, 6, 3, 0.3), _set(30, 6, 3, 0.3, seed=1)
    scale = torch.tensor([1e-3, 1, 1e3, 1, 1, 1])
    shift = torch.tensor([5.0, -40, 0, 0, 0, 0])
    moved = [FeatureSet(part.features * scale + shift, part.labels, part.index) for part in (train, test)]
    for part in moved:
        part.features[:, 5] = 7.3  # constant: nothing to divide by
    config = LinearConfig(epochs=20, learning_rate=0.1, standardise=True)
    result = linear_probe(*moved, 3, config)
    assert result.top1 == 1.0
    direct = (moved[1].features @ result.weight.T + result.bias).argmax(1)
    assert direct.tolist() == result.predictions.tolist()
    # the test rows shift nothing: the weights are the same for any test set
    other = FeatureSet(moved[1].features + 100, moved[1].labels, moved[1].index)
    assert torch.equal(linear_probe(moved[0], other, 3, config).weight, result.weight)


def test_learning_rate_chosen_without_the_test_set() -> None:
    train, test = _set(60, 8, 3, 0.5), _set(30, 8, 3, 0.5, seed=1)
    small = FeatureSet(train.features * 1e-3, train.labels, train.index)
    small_test = FeatureSet(test.features * 1e-3, test.labels, test.index)
    config = LinearConfig(epochs=30, learning_rate=None, milestones=(20, 25))
    rate = choose_config(small, 3, config).learning_rate
    result = linear_probe(small, small_test, 3, config)
    assert result.config.learning_rate == rate
    # the reference's rate does not move the weights of features this small in thirty steps
    assert linear_probe(small, small_test, 3, replace(config, learning_rate=0.006)).top1 <= 0.5
    assert result.top1 >= 0.9


def test_divergence_is_refused_with_advice() -> None:
    train = _set(40, 5, 3, 1.0)
    big = FeatureSet(train.features * 1e20, train.labels, train.index)
    with pytest.raises(ValueError, match=r"the loss must stay finite, got .* in epoch \d+. Lower config.learning_rate"):
        linear_probe(big, big, 3, LinearConfig(learning_rate=1e20))


def test_errors() -> None:
    good = _set(12, 4, 3, 1.0)

    def changed(**fields: torch.Tensor) -> FeatureSet:
        return replace(good, **fields)

    nan = good.features.clone()
    nan[5, 0] = float("inf")
    for train, test, message in [
        (good, changed(features=good.features[:, :2]), "width of train, got 2 and 4"),
        (good, changed(labels=good.labels - 1), r"labels of test must lie in 0\.\.2, got -1\.\.1"),
        (changed(labels=good.labels + 1), good, r"labels of train must lie in 0\.\.2, got 1\.\.3"),
        (changed(features=nan), good, "train must have finite features, got nan or inf in row 5"),
        (FeatureSet(good.features[:0], good.labels[:0], good.index[:0]), good, "train must have samples"),
        (changed(labels=good.labels[:4]), good, r"features \(N, F\) and labels \(N,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_probe(train, test, 3)
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        linear_probe(good, good, 3, LinearConfig(epochs=0))
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        linear_probe(good, good, 3, LinearConfig(learning_rate=0))
    one_each = FeatureSet(good.features[:3], good.labels[:3], good.index[:3])
    with pytest.raises(ValueError, match="two samples of some class"):
        choose_config(one_each, 3, LinearConfig(learning_rate=None))
    with pytest.raises(ValueError, match="got None. Call choose_config"):
        LinearConfig(learning_rate=None).rate(0)


def test_whole_groups_are_held_out() -> None:
    train = _set(60, 8, 3, 0.5)
    groups = torch.arange(60) % 10
    config = LinearConfig(epochs=5, learning_rate=None, standardise=False, milestones=(4,))
    chosen = choose_config(train, 3, config, groups=groups)
    calls: list[set[int]] = []
    real = linear_module.linear_probe

    def spy(fit: FeatureSet, check: FeatureSet, *args: object, **kwargs: object) -> LinearResult:
        calls.append(set(groups[fit.index].tolist()) & set(groups[check.index].tolist()))
        assert len(set(groups[check.index].tolist())) == 2
        return real(fit, check, *args, **kwargs)

    linear_module.linear_probe = spy
    try:
        assert choose_config(train, 3, config, groups=groups) == chosen
    finally:
        linear_module.linear_probe = real
    assert calls and not any(calls)
    # a single group cannot be held out: samples are
    assert choose_config(train, 3, config, groups=torch.zeros(60)) == choose_config(train, 3, config)
