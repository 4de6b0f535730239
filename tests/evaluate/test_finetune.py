"""Fine-tuning: what it trains and what it leaves, that it is a function of its settings, resuming, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastskel.data.views import CenterCrop, eval_view
from fastskel.evaluate import Evaluation, FinetuneConfig, class_scores, evaluate_finetune, fine_tune, load_classifier
from fastskel.evaluate import finetune as loop
from fastskel.evaluate.causal import causal_features
from fastskel.evaluate.features import FeatureSet
from fastskel.evaluate.logistic import LogisticConfig, logistic_probe
from fastskel.evaluate.semi import UNCHOSEN_PENALTY, probe_of_few
from fastskel.evaluate.training import parameter_groups
from fastskel.models import DSTE
from fastskel.train import load_encoder

VIEW = eval_view(frames=6)
SPLIT = SimpleNamespace(train=np.arange(11), test=np.arange(11, 17))
CONFIG = FinetuneConfig(
    epochs=6, batch_size=4, learning_rate=0.01, warmup_epochs=1, evaluate_every=3, save_every=2, drop_path=0.2, start="random"
)


@pytest.fixture
def evaluation(dataset) -> Evaluation:
    torch.manual_seed(0)
    encoder = DSTE(num_joints=25, num_bodies=1, num_frames=6, width=16)
    return Evaluation(encoder, dataset, SPLIT, VIEW, protocol="halves", run="runs/one", progress=False)


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_it_learns_and_says_so(evaluation, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in evaluation.encoder.state_dict().items()}
    result = evaluate_finetune(evaluation, tmp_path / "out", config=replace(CONFIG, epochs=20))
    assert (result["top1"], result["top5"], result["mean_class"]) == (1.0, 1.0, 1.0)
    history = result["history"]
    assert [row["epoch"] for row in history if "test_top1" in row] == [2, 5, 8, 11, 14, 17, 19]
    assert history[-1]["loss"] < 0.7 * history[0]["loss"] and history[-1]["train_top1"] == 1.0
    assert result["best_top1"] == max(row.get("test_top1", 0) for row in history)
    assert (result["task"], result["num_train"], result["num_test"], result["num_available"]) == ("finetune", 11, 6, 11)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(result))
    assert (tmp_path / "out" / "confusion.png").exists()
    # the encoder that was given is still what it was
    assert all(torch.equal(before[name], value) for name, value in evaluation.encoder.state_dict().items())
    assert evaluation.encoder.drop_path == 0.1 and evaluation.encoder.config["drop_path"] == 0.1


def test_the_classifier_can_be_used_again(evaluation, tmp_path: Path) -> None:
    made = fine_tune(evaluation, CONFIG, out=tmp_path)
    classifier, view, names = load_classifier(tmp_path)
    assert names == ["sit", "wave", "kick"] and view == replace(VIEW, topology="ntu-25")
    assert not classifier.training and classifier.encoder.drop_path == 0.2
    assert torch.equal(class_scores(classifier, evaluation.dataset, view, SPLIT.test), made.scores)
    # as an encoder it is a run like any other
    encoder, _, _ = load_encoder(tmp_path)
    assert same(encoder, made.classifier.encoder)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000006"]


def test_it_is_a_function_of_its_settings(evaluation) -> None:
    made = [fine_tune(evaluation, config) for config in (CONFIG, CONFIG, replace(CONFIG, seed=1))]
    assert same(made[0].classifier, made[1].classifier) and made[0].history == made[1].history
    assert not same(made[0].classifier, made[2].classifier)


@pytest.mark.parametrize(("optimizer", "start"), [("adamw", "probe"), ("sgd", "random")])
def test_resuming_gives_the_same_bits(evaluation, tmp_path: Path, monkeypatch, optimizer: str, start: str) -> None:
    config = replace(CONFIG, optimizer=optimizer, start=start, crop=0.3, frozen_epochs=1)
    whole = evaluate_finetune(evaluation, tmp_path / "whole", config=config)
    train = loop.train_epoch

    def interrupt(*arguments, **options):
        if arguments[4] == 5:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    monkeypatch.setattr(loop, "train_epoch", interrupt)
    out = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        evaluate_finetune(evaluation, out, config=config)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000000004"]
    assert not (out / "results.json").exists()
    monkeypatch.setattr(loop, "train_epoch", train)
    with pytest.raises(ValueError, match="out must be new, got .* with a fine-tuning. Resume it"):
        evaluate_finetune(evaluation, out, config=config)
    with pytest.raises(ValueError, match="must keep its settings, got other learning_rate than in"):
        evaluate_finetune(evaluation, out, config=replace(config, learning_rate=1.0), resume=True)
    with pytest.raises(ValueError, match="must keep its settings, got other clips than in"):
        evaluate_finetune(evaluation, out, config=config, indices=SPLIT.train[:9], resume=True)
    # where it goes on from is not where it began
    monkeypatch.setattr(loop, "_start_from_probe", lambda *_: pytest.fail("a training that goes on begins again"))
    # how often it is read changes no bit
    resumed = evaluate_finetune(evaluation, out, config=replace(config, save_every=1), resume=True)
    assert resumed["history"] == whole["history"] and resumed["confusion"] == whole["confusion"]
    name = "checkpoints/step-000000006/model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # once more: there is nothing left to do
    again = evaluate_finetune(evaluation, out, config=config, resume=True)
    assert again["history"] == whole["history"] and again["checkpoint"] == resumed["checkpoint"]


def test_frozen_epochs_train_the_linear_layer_alone(evaluation) -> None:
    made = fine_tune(evaluation, replace(CONFIG, epochs=2, frozen_epochs=2, drop_path=None))
    assert same(made.classifier.encoder, evaluation.encoder)
    assert made.classifier.head.bias.abs().max() > 0
    assert all(parameter.requires_grad for parameter in made.classifier.parameters())
    assert not same(fine_tune(evaluation, replace(CONFIG, epochs=2, frozen_epochs=1)).classifier.encoder, evaluation.encoder)


# steps too small to leave where the layer starts
STILL = replace(CONFIG, epochs=1, learning_rate=1e-12, start="probe", drop_path=None)


def test_a_layer_that_starts_from_a_probe_is_the_exact_one(evaluation) -> None:
    train, test = evaluation.features()
    exact = logistic_probe(train, test, 3)
    made = fine_tune(evaluation, STILL)
    torch.testing.assert_close(made.classifier.head.weight, exact.weight.float())
    expected = test.features @ exact.weight.float().T + exact.bias.float()
    torch.testing.assert_close(made.scores, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(made.scores.argmax(1), exact.predictions)


def test_a_probe_knows_only_the_clips_that_are_trained_on(evaluation) -> None:
    labels = evaluation.dataset.labels
    few = SPLIT.train[labels[SPLIT.train] != 1]
    made = fine_tune(evaluation, STILL, indices=few)
    head = made.classifier.head
    rows = evaluation.features_of(few)
    exact = logistic_probe(rows, rows, 3)
    torch.testing.assert_close(head.weight, exact.weight.float())
    # the class that has no clip starts at zero weights, no better than any other, and can be learnt
    assert head.weight[1].abs().max() < 1e-9 and head.bias.argsort()[:2].tolist().count(1) == 1
    assert math.isfinite(made.history[0]["loss"])


def test_a_probe_of_one_clip_of_each_class(evaluation) -> None:
    labels = evaluation.dataset.labels[SPLIT.train]
    few = np.array([SPLIT.train[labels == label][0] for label in range(3)])
    made = fine_tune(evaluation, STILL, indices=few)
    rows = evaluation.features_of(few)
    exact = logistic_probe(rows, rows, 3, LogisticConfig(penalty=UNCHOSEN_PENALTY, standardise=False))
    torch.testing.assert_close(made.classifier.head.weight, exact.weight.float())


def test_observations_of_a_clip_are_held_out_together(evaluation, monkeypatch) -> None:
    found = []
    monkeypatch.setattr(loop, "probe_of_few", lambda *given: found.append(given) or probe_of_few(*given))
    fine_tune(evaluation, STILL, frames=(2, 6))
    ((rows, _, _, _, groups, _),) = found
    assert torch.equal(groups, rows.index) and groups.tolist() == [*SPLIT.train, *SPLIT.train]


def test_a_probe_of_all_observations(evaluation) -> None:
    made = fine_tune(evaluation, STILL, frames=(2, 6))
    sets = causal_features(evaluation, SPLIT.train, (2, 6))
    rows = FeatureSet(*(torch.cat([getattr(each, name) for each in sets]) for name in ("features", "labels", "index")))
    torch.testing.assert_close(made.classifier.head.weight, logistic_probe(rows, rows, 3, groups=rows.index).weight.float())


def test_steps_shrink_towards_the_input(evaluation) -> None:
    classifier = loop.Classifier(evaluation.encoder, 3)
    groups = parameter_groups(classifier, replace(CONFIG, layer_decay=0.5, weight_decay=0.3))
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    found = {names[id(p)]: (group["share"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == len(names)
    assert found["head.weight"] == (1.0, 0.3) and found["head.bias"] == (1.0, 0.0)
    assert found["encoder.t_tr1.CA.conv1.weight"] == (0.5, 0.3)
    assert found["encoder.t_tr.DSA.norm1.weight"] == (0.25, 0.0)
    assert found["encoder.ske_emb.t_embedding.0.weight"] == (0.125, 0.3)


def test_rates() -> None:
    config = FinetuneConfig(epochs=10, learning_rate=2.0, warmup_epochs=2)
    rates = [config.rate(step, 5) for step in range(50)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0) and rates[10] == pytest.approx(2.0)
    assert rates[30] == pytest.approx(1.0) and rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(1 + math.cos(math.pi * 39 / 40), abs=1e-9)
    config = FinetuneConfig(epochs=10, learning_rate=2.0, warmup_epochs=0, schedule="step", milestones=(3, 6))
    assert [config.rate(5 * epoch, 5) for epoch in (0, 2, 3, 6)] == pytest.approx([2, 2, 0.2, 0.02])


def test_few_labels(evaluation) -> None:
    result = evaluate_finetune(evaluation, config=CONFIG, indices=np.array([0, 1, 2]))
    assert (result["num_train"], result["num_available"], result["num_test"]) == (3, 11, 6)
    for bad in ([0, 12], [0, 0], []):
        with pytest.raises(ValueError, match="indices must be distinct labelled clips of the training part"):
            evaluate_finetune(evaluation, config=CONFIG, indices=np.array(bad, dtype=np.int64))
    unknown = replace(evaluation.dataset, labels=np.where(np.arange(17) == 3, -1, evaluation.dataset.labels))
    short = evaluate_finetune(replace(evaluation, dataset=unknown), config=replace(CONFIG, epochs=1))
    assert (short["num_train"], short["dropped_train"]) == (10, 1)


def test_training_sees_another_view_and_testing_does_not(evaluation) -> None:
    seen = []

    class Watching(DSTE):
        def forward(self, view, **options):
            seen.append((self.training, view.clips[0, :, 0, 0, 0]))
            return super().forward(view, **options)

    encoder = Watching(num_joints=25, num_bodies=1, num_frames=6, width=16)
    watched = replace(evaluation, encoder=encoder)
    plain = fine_tune(watched, replace(CONFIG, epochs=1, evaluate_every=1))
    number = sum(training for training, _ in seen)
    assert number == 3
    tested = [clip for training, clip in seen if not training]
    seen.clear()
    cropped = fine_tune(watched, replace(CONFIG, epochs=1, crop=0.2))
    assert all(torch.equal(a, b) for a, b in zip(tested, [clip for training, clip in seen if not training], strict=True))
    assert not same(plain.classifier, cropped.classifier)
    half = fine_tune(watched, replace(CONFIG, epochs=1), train_view=replace(VIEW, crop=CenterCrop(0.5)))
    assert not same(plain.classifier, half.classifier)


def test_bfloat16(evaluation) -> None:
    made = fine_tune(replace(evaluation, precision="bf16"), replace(CONFIG, epochs=8, drop_path=0.0))
    exact = fine_tune(evaluation, replace(CONFIG, epochs=8, drop_path=0.0))
    assert made.history != exact.history
    # one class's logits away from another by the end; 8 bits of mantissa on the way
    assert made.history[-1]["loss"] == pytest.approx(exact.history[-1]["loss"], rel=0.1)


def test_refusals(evaluation, encoder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="encoder must be one to train, got raw coordinates"):
        fine_tune(replace(evaluation, encoder=None), CONFIG)
    prepared = evaluation.encoder.optimize_for_inference()
    with pytest.raises(ValueError, match="encoder must be one to train, got DSTE without parameters"):
        fine_tune(replace(evaluation, encoder=prepared), CONFIG)
    with pytest.raises(ValueError, match="drop_path must be None for CountingEncoder"):
        fine_tune(replace(evaluation, encoder=encoder), CONFIG)
    with pytest.raises(ValueError, match="encoder must be registered to be saved, got CountingEncoder"):
        fine_tune(replace(evaluation, encoder=encoder), replace(CONFIG, drop_path=None), out=tmp_path)
    assert fine_tune(replace(evaluation, encoder=encoder), replace(CONFIG, drop_path=None)).scores.shape == (6, 3)
    with pytest.raises(ValueError, match=r"loss and weights must stay finite, .* Lower learning_rate \(now 1e\+30\)"):
        fine_tune(evaluation, replace(CONFIG, learning_rate=1e30, optimizer="sgd"))
    with pytest.raises(ValueError, match="must hold a classifier|read_checkpoint: path must be"):
        load_classifier(tmp_path)
    nobody = SimpleNamespace(train=SPLIT.train, test=np.array([], dtype=np.int64))
    with pytest.raises(ValueError, match="the test split of in-memory must have labelled clips"):
        fine_tune(replace(evaluation, split=nobody), CONFIG)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"epochs": 0}, "epochs must be in 1"), ({"layer_decay": 1.5}, "layer_decay must be in 0 .. 1, got 1.5"),
        ({"optimizer": "adam"}, "optimizer must be one of"), ({"schedule": "linear"}, "schedule must be one of"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"), ({"crop": -0.1}, "crop must be in"),
        ({"epochs": 4, "warmup_epochs": 5}, "warmup_epochs must be at most epochs 4, .* got 5. Lower it, such as to 0.4"),
    ],
)  # fmt: skip
def test_settings_out_of_range(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**change)
