"""The exact probe: the optimum that scikit-learn finds, what it chooses, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from fastskel.data.views import eval_view
from fastskel.evaluate import Evaluation, FeatureSet, LogisticConfig, evaluate_logistic, logistic_probe
from fastskel.evaluate import logistic as logistic_module
from fastskel.evaluate.linear import held_out
from fastskel.evaluate.logistic import PENALTIES


def _set(num: int, width: int, num_classes: int, spread: float, seed: int = 0) -> FeatureSet:
    centres = np.random.default_rng(99).normal(0, 1, (num_classes, width))
    labels = np.arange(num) % num_classes
    rows = centres[labels] + np.random.default_rng(seed).normal(0, spread, (num, width))
    return FeatureSet(torch.tensor(rows, dtype=torch.float32), torch.from_numpy(labels), torch.arange(num))


def _loss(features, labels, weight, bias, penalty: float) -> float:
    logits = features @ np.asarray(weight).T + np.asarray(bias)
    logits = logits - logits.max(1, keepdims=True)
    log_share = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return float(-log_share[np.arange(len(labels)), labels].mean() + penalty / 2 * np.square(weight).sum())


@pytest.mark.parametrize(
    "num, width, num_classes, spread",
    [(200, 10, 4, 1.5), (33, 80, 3, 1.5), (60, 60, 5, 1.0), (9, 1, 3, 0.3)],
    ids=["tall", "wide", "square", "one-feature"],
)
@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("standardise", [False, True], ids=["as-given", "standardised"])
def test_the_optimum_of_scikit_learn(num, width, num_classes, spread, penalty, standardise) -> None:
    train, test = _set(num, width, num_classes, spread), _set(40, width, num_classes, spread, seed=1)
    # a common mean and unequal scales, as features have
    scale = torch.logspace(-1, 1, width) if width > 1 else torch.ones(1)
    train, test = (replace(part, features=part.features * scale + 3) for part in (train, test))
    config = LogisticConfig(penalty=penalty, standardise=standardise, tolerance=1e-8)
    ours = logistic_probe(train, test, num_classes, config)
    assert ours.converged

    rows, labels = train.features.double().numpy(), train.labels.numpy()
    mean, deviation = rows.mean(0), rows.std(0) if standardise else np.ones(width)
    rows = (rows - mean) / deviation
    absolute = penalty * rows.var(0).sum()
    assert ours.penalty == pytest.approx(absolute, rel=1e-5)
    oracle = LogisticRegression(C=1 / (ours.penalty * num), tol=1e-10, max_iter=20_000, solver="newton-cg").fit(rows, labels)
    best = _loss(rows, labels, oracle.coef_, oracle.intercept_, ours.penalty)
    weight = ours.weight.numpy() * deviation
    reached = _loss(rows, labels, weight, ours.bias.numpy() + ours.weight.numpy() @ mean, ours.penalty)
    assert reached == pytest.approx(best, rel=1e-6)
    assert ours.loss == pytest.approx(reached, rel=1e-6)
    expected = oracle.predict((test.features.double().numpy() - mean) / deviation)
    assert ours.predictions.tolist() == expected.tolist()


def test_stops_where_the_gradient_vanishes() -> None:
    train = _set(80, 6, 4, 1.5)
    config = LogisticConfig(penalty=1e-3, standardise=False, tolerance=1e-9)
    result = logistic_probe(train, train, 4, config)
    weight, bias = result.weight.clone().requires_grad_(), result.bias.clone().requires_grad_()
    logits = train.features.double() @ weight.T + bias
    loss = torch.nn.functional.cross_entropy(logits, train.labels) + result.penalty / 2 * weight.square().sum()
    loss.backward()
    # the gradient at zero is of the size of the features, about 1; its norm fell by 1e-9 on scaled axes
    assert float(weight.grad.norm()) < 1e-7 and float(bias.grad.norm()) < 1e-7


def test_features_of_unequal_variances_take_tens_of_iterations() -> None:
    train = _set(600, 100, 10, 5.0)
    mixed = torch.linalg.qr(torch.randn(100, 100, generator=torch.Generator().manual_seed(0)))[0]
    # variances over six orders of magnitude
    train = replace(train, features=(train.features * torch.logspace(0, -3, 100)) @ mixed + 0.5)
    config = LogisticConfig(penalty=1e-5, standardise=False, tolerance=1e-10)
    best = logistic_probe(train, train, 10, config)
    with pytest.warns(RuntimeWarning, match="within 25 iterations"):
        early = logistic_probe(train, train, 10, replace(config, max_iterations=25))
    # from curvature 1 on every axis it is 5 % above
    assert best.converged and early.loss == pytest.approx(best.loss, rel=1e-6)


def test_scale_and_shift_of_features_change_nothing() -> None:
    train, test = _set(60, 8, 3, 1.5), _set(50, 8, 3, 1.5, seed=1)
    config = LogisticConfig(penalty=1e-2, standardise=False, tolerance=1e-8)
    plain = logistic_probe(train, test, 3, config)
    moved = logistic_probe(*(replace(part, features=part.features * 256 - 512) for part in (train, test)), 3, config)
    assert moved.loss == pytest.approx(plain.loss, rel=1e-5)
    assert moved.predictions.tolist() == plain.predictions.tolist()


def test_classes_without_training_samples_are_never_predicted() -> None:
    train, test = _set(40, 6, 5, 0.5), _set(50, 6, 5, 0.5, seed=1)
    keep = (train.labels != 1) & (train.labels != 4)
    part = FeatureSet(train.features[keep], train.labels[keep], train.index[keep])
    config = LogisticConfig(penalty=1e-3, standardise=False)
    result = logistic_probe(part, test, 6, config)
    assert set(result.predictions.tolist()) == {0, 2, 3}
    assert result.bias.isneginf().tolist() == [False, True, False, False, True, True]
    assert 0.5 < result.top1 <= 0.6
    alone = logistic_probe(replace(part, labels=torch.full_like(part.labels, 2)), test, 6, config)
    assert alone.converged and set(alone.predictions.tolist()) == {2}


def test_penalty_chosen_on_whole_groups_as_by_hand() -> None:
    train, test = _set(90, 30, 3, 3.0), _set(30, 30, 3, 3.0, seed=1)
    groups = torch.arange(90) % 10
    result = logistic_probe(train, test, 3, LogisticConfig(standardise=False), groups=groups)
    held = held_out(train, 0, groups)
    assert not set(groups[held].tolist()) & set(groups[~held].tolist()) and len(set(groups[held].tolist())) == 2
    rows, labels = train.features.double().numpy(), train.labels.numpy()
    unit = rows.var(0).sum()
    right = []
    for penalty in PENALTIES:
        oracle = LogisticRegression(C=1 / (penalty * unit * int((~held).sum())), tol=1e-8, max_iter=20_000, solver="newton-cg")
        fitted = oracle.fit(rows[~held], labels[~held])
        right.append(fitted.score(rows[held], labels[held]))
    assert len(set(right)) > 1
    assert result.config.penalty == PENALTIES[right.index(max(right))]
    # the test rows have no say
    other = logistic_probe(train, replace(test, labels=test.labels.flip(0)), 3, LogisticConfig(), groups=groups)
    assert other.config == logistic_probe(train, test, 3, LogisticConfig(), groups=groups).config


def test_says_if_it_did_not_converge() -> None:
    train = _set(60, 8, 3, 1.5)
    with pytest.warns(RuntimeWarning, match="did not fall to 1e-06 of its norm within 2 iterations"):
        result = logistic_probe(train, train, 3, LogisticConfig(penalty=1e-3, standardise=False, max_iterations=2))
    assert not result.converged and result.iterations == 2


def test_rows_that_are_all_alike() -> None:
    train = _set(9, 4, 3, 1.0)
    same = replace(train, features=torch.ones(9, 4), labels=torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2]))
    result = logistic_probe(same, same, 3, LogisticConfig(penalty=0.1, standardise=False))
    assert result.converged and set(result.predictions.tolist()) == {0}
    # nothing but the frequencies of the classes to learn
    assert torch.softmax(result.bias, 0).tolist() == pytest.approx([4 / 9, 3 / 9, 2 / 9], abs=1e-6)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = _set(50, 8, 3, 1.5), _set(20, 8, 3, 1.5, seed=1)
    config = LogisticConfig(penalty=1e-2, standardise=True)
    whole = logistic_probe(train, test, 3, config)
    monkeypatch.setattr(logistic_module, "BLOCK_ROWS", 7)
    torch.testing.assert_close(logistic_probe(train, test, 3, config).weight, whole.weight, rtol=1e-6, atol=1e-9)


def test_errors() -> None:
    good = _set(12, 4, 3, 1.0)
    for config, message in [
        (LogisticConfig(penalty=0.0), "config.penalty must be positive, got 0.0"),
        (LogisticConfig(tolerance=float("nan")), "config.tolerance must be positive, got nan"),
        (LogisticConfig(max_iterations=0), "max_iterations must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            logistic_probe(good, good, 3, config)
    with pytest.raises(ValueError, match=r"logistic_probe: labels of test must lie in 0\.\.2, got 1\.\.3"):
        logistic_probe(good, replace(good, labels=good.labels + 1), 3)
    with pytest.raises(ValueError, match="logistic_probe: test must have the width of train, got 2 and 4"):
        logistic_probe(good, replace(good, features=good.features[:, :2]), 3)
    one_each = FeatureSet(good.features[:3], good.labels[:3], good.index[:3])
    with pytest.raises(ValueError, match="two samples of some class"):
        logistic_probe(one_each, good, 3)


def test_a_whole_evaluation(encoder, dataset, tmp_path: Path) -> None:
    split = SimpleNamespace(train=np.arange(9), test=np.arange(9, 17))
    evaluation = Evaluation(encoder, dataset, split, eval_view(frames=6, normalise="none"), progress=False)
    result = evaluate_logistic(evaluation, tmp_path / "out")
    assert (result["top1"], result["mean_class"], result["task"], result["solver"]) == (1.0, 1.0, "linear", "exact")
    assert result["converged"] and result["config"]["penalty"] in PENALTIES
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["confusion.csv", "confusion.png", "results.json"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(result))
