"""Heads over frames: what they see, that they learn, and that nothing but their arguments decides what."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastskel.evaluate.frame_heads import (
    FrameHead,
    FrameHeadConfig,
    frame_probabilities,
    smoothing_loss,
    train_frame_head,
)

WIDTH, CLASSES = 5, 3


def problem(lengths: tuple[int, ...] = (40, 1, 63), seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Frames whose class moves one feature; the features are far from standard."""
    draw = torch.Generator().manual_seed(seed)
    labels = [torch.arange(length) // 7 % CLASSES for length in lengths]
    noise = [torch.randn(length, WIDTH, generator=draw) for length in lengths]
    return [50 + 3 * (values + 4 * torch.eye(WIDTH)[classes]) for values, classes in zip(noise, labels, strict=True)], labels


def test_each_head_has_a_step_size_of_its_own() -> None:
    assert (FrameHeadConfig().rate, FrameHeadConfig("tcn").rate, FrameHeadConfig(learning_rate=0.3).rate) == (0.01, 0.001, 0.3)
    usual, told = FrameHeadConfig(), FrameHeadConfig(epochs=3, weight_decay=0.1)
    assert (usual.passes, usual.decay) == (50, 0.0) and (told.passes, told.decay) == (3, 0.1)


@pytest.mark.parametrize("config", [FrameHeadConfig(learning_rate=0.05), FrameHeadConfig("tcn", 16, 3)], ids=["linear", "tcn"])
def test_learns(config: FrameHeadConfig) -> None:
    features, labels = problem()
    state = torch.get_rng_state()
    trained = train_frame_head(features, labels, CLASSES, config)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(trained.losses) == config.passes and trained.losses[-1] < 0.3 * trained.losses[0]
    test_features, test_labels = problem((90, 17), seed=1)
    for rows, classes in zip(test_features, test_labels, strict=True):
        probabilities = frame_probabilities(trained.head, rows)
        assert probabilities.shape == (len(rows), CLASSES) and probabilities.dtype == np.float64
        np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-12)
        assert (probabilities.argmax(1) == classes.numpy()).mean() > 0.9
    assert not trained.head.training


@pytest.mark.parametrize("head", ["linear", "tcn"])
def test_only_the_arguments_decide(head: str) -> None:
    features, labels = problem()
    config = FrameHeadConfig(head, 8, 2, epochs=3, smoothing=0.1, class_weights=True)
    results = []
    for number, other in enumerate((config, config, FrameHeadConfig(head, 8, 2, epochs=3, seed=1))):
        torch.manual_seed(number)
        results.append(train_frame_head(features, labels, CLASSES, other))
    assert results[0].losses == results[1].losses != results[2].losses
    for one, two in zip(results[0].head.parameters(), results[1].head.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("config", [FrameHeadConfig(), FrameHeadConfig("tcn", 4, 1), FrameHeadConfig("tcn", 4, 4)], ids=repr)
def test_receptive_field(config: FrameHeadConfig) -> None:
    torch.manual_seed(0)
    head, middle = FrameHead(config, WIDTH, CLASSES), 40
    features = torch.randn(81, WIDTH, requires_grad=True)
    head(features)[middle].sum().backward()
    assert features.grad is not None
    seen = features.grad.abs().sum(1).nonzero()[:, 0]
    half = config.receptive_field // 2
    assert config.receptive_field == 2 * half + 1
    # the ends are seen, and nothing beyond them
    assert (int(seen.min()), int(seen.max())) == (middle - half, middle + half)


@pytest.mark.parametrize("length", [1, 2, 3, 50])
@pytest.mark.parametrize("head", ["linear", "tcn"])
def test_any_length(head: str, length: int) -> None:
    torch.manual_seed(0)
    scores = FrameHead(FrameHeadConfig(head, 4, 6), WIDTH, CLASSES)(torch.randn(length, WIDTH))
    assert scores.shape == (length, CLASSES) and bool(scores.isfinite().all())


def test_standardisation_is_that_of_the_training_frames() -> None:
    features, _ = problem()
    features = [torch.cat([rows, torch.full((len(rows), 1), 7.0)], 1) for rows in features]
    head = FrameHead(FrameHeadConfig(), WIDTH + 1, CLASSES)
    head.standardise(features)
    every = torch.cat(features).double()
    torch.testing.assert_close(head.mean.double(), every.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(head.deviation[:-1].double(), every.std(0, correction=0)[:-1], rtol=1e-6, atol=0)
    # a constant column is left at its scale
    assert head.deviation[-1] == 1


def test_class_weights_count_classes_alike() -> None:
    # one frame of 50 is of class 1, and features say nothing: the most probable class is a question of weights
    features, labels = [torch.zeros(50, 1)], [torch.zeros(50, dtype=torch.int64)]
    labels[0][7] = 1
    shares = []
    for weighted in (False, True):
        config = FrameHeadConfig(learning_rate=0.1, epochs=300, class_weights=weighted)
        shares.append(frame_probabilities(train_frame_head(features, labels, 2, config).head, features[0])[0, 1])
    assert shares[0] == pytest.approx(0.02, abs=0.005) and shares[1] == pytest.approx(0.5, abs=0.01)


def test_smoothing_loss() -> None:
    scores = torch.tensor([[0.0, 0.0], [1.0, 0.0], [100.0, 0.0]], dtype=torch.float64, requires_grad=True)
    log = scores.detach().log_softmax(1)
    steps = (log[1:] - log[:-1]).square().clamp(max=16)
    loss = smoothing_loss(scores)
    assert loss.item() == pytest.approx(float(steps.mean()))
    # the step of the second class from frame 1 to 2 is beyond the limit
    assert steps[1, 1] == 16 and steps[0].max() < 16
    loss.backward()
    assert scores.grad is not None
    # gradients reach the later frame of a step only: frame 0 is never one
    assert not scores.grad[0].any() and scores.grad[1].any()
    assert smoothing_loss(torch.ones(1, 3)).item() == 0


def test_smoothing_smooths() -> None:
    features, labels = problem((120,))
    features[0] += 12 * torch.randn(120, WIDTH, generator=torch.Generator().manual_seed(5))
    changes = []
    for smoothing in (0.0, 3.0):
        head = train_frame_head(features, labels, CLASSES, FrameHeadConfig(smoothing=smoothing, learning_rate=0.02)).head
        changes.append(np.abs(np.diff(np.log(frame_probabilities(head, features[0])), axis=0)).mean())
    assert changes[1] < 0.7 * changes[0]


def test_refused() -> None:
    features, labels = problem()
    with pytest.raises(ValueError, match="features and labels must be one tensor per recording, got 3 and 2"):
        train_frame_head(features, labels[:2], CLASSES)
    with pytest.raises(ValueError, match=r"recording 1 must have features \(T, 5\) and labels \(T,\), got \(1, 4\) and \(1,\)"):
        train_frame_head([features[0], features[1][:, :4], features[2]], labels, CLASSES)
    with pytest.raises(ValueError, match=r"recording 0 must have .* got \(40, 5\) and \(39,\)"):
        train_frame_head(features, [labels[0][1:], *labels[1:]], CLASSES)
    with pytest.raises(ValueError, match=r"labels of recording 0 must lie in 0\.\.1, got 0\.\.2"):
        train_frame_head(features, labels, 2)
    with pytest.raises(ValueError, match=r"labels of recording 1 must lie in 0\.\.2, got -1\.\.-1"):
        train_frame_head(features, [labels[0], labels[1] - 1, labels[2]], CLASSES)
    with pytest.raises(ValueError, match="the loss must stay finite, got .* in epoch 0. Lower config.learning_rate"):
        train_frame_head(features, labels, CLASSES, FrameHeadConfig("tcn", learning_rate=1e30))
    for settings, message in (
        ({"head": "lstm"}, "head must be linear or tcn, got 'lstm'"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"seed": -1}, r"seed must lie in \[0, 2\^64\), got -1"),
        ({"seed": 2**64}, r"seed must lie in \[0, 2\^64\), got 18446744073709551616"),
        ({"smoothing": -1.0}, "smoothing must be at least 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            FrameHeadConfig(**settings)
