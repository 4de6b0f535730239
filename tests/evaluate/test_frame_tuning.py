"""Encoder and head of frames trained together on windows: what learns, what is not seen, resuming, what is refused."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastskel.cli import main
from fastskel.cli_evaluate.dense import TuningOptions
from fastskel.data.batch import View
from fastskel.data.convert import convert_dataset
from fastskel.data.packed import PackedDataset
from fastskel.data.protocols import Split
from fastskel.data.views import CenterCrop, eval_view
from fastskel.evaluate import (
    DenseConfig,
    Evaluation,
    FinetuneConfig,
    FrameHeadConfig,
    ProposalConfig,
    Windows,
    evaluate_detection,
    evaluate_segmentation,
    frame_features,
)
from fastskel.evaluate import frame_tuning as module
from fastskel.evaluate.dense import frame_truth, true_segments
from fastskel.evaluate.frame_heads import frame_probabilities, new_head, train_frame_head
from fastskel.evaluate.frame_tuning import FrameClassifier, fine_tune_frames, tuned_probabilities
from fastskel.evaluate.windows import window_view
from fastskel.models import DSTE
from fastskel.models.encoder import ENCODERS, Encoder, Features
from fastskel.train import load_encoder
from fastskel.train.checkpoint import save_checkpoint, weights

T = 8
NAMES = ["background", "lift", "wave", "kick"]
CONFIG = FinetuneConfig(
    epochs=4, batch_size=16, learning_rate=0.02, warmup_epochs=1, layer_decay=1.0, weight_decay=0.0, drop_path=0.0,
    start="random",
)  # fmt: skip
# two steps an epoch at a place where every step counts
QUICK = replace(CONFIG, epochs=3, batch_size=40, drop_path=0.2, save_every=1)
BOTH = pytest.mark.parametrize("evaluate", [evaluate_detection, evaluate_segmentation], ids=["detect", "segment"])


@pytest.fixture
def data(untrimmed) -> PackedDataset:
    return untrimmed


class FrameEncoder(Encoder):
    """Each frame for itself; not registered, and without DropPath."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = self.num_token_features = 4
        self.frame = nn.Linear(75, 4)

    def forward(self, view: View, *, token_mask: Tensor | None = None, mode: str | None = None) -> Features:
        temporal = self.frame(view.clips.flatten(2))
        return Features(temporal.amax(1), temporal=temporal)


def encoder_of(name: str = "usdrl-dste", **options):
    torch.manual_seed(0)
    return ENCODERS[name](num_joints=25, num_bodies=1, num_frames=T, width=8, **options)


def evaluation(data: PackedDataset, encoder=None, **options) -> Evaluation:
    settings = {"split": Split(np.arange(6), np.arange(6, 8)), "view": eval_view(T), "progress": False, **options}
    return Evaluation(encoder or encoder_of(), data, **settings)


def labels_of(data: PackedDataset) -> dict[int, Tensor]:
    clips = np.arange(len(data))
    return dict(enumerate(map(torch.from_numpy, frame_truth(true_segments(data, clips, "test"), data.num_frames.tolist()))))


def tune(data: PackedDataset, recordings=range(3), config: FinetuneConfig = QUICK, given: Evaluation | None = None, **options):
    clips = np.array(recordings)
    return fine_tune_frames(given or evaluation(data), clips, labels_of(data), NAMES, config, **options)


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_gradients_reach_all_of_the_encoder(name: str, data) -> None:
    encoder = encoder_of(name)
    model = FrameClassifier(encoder, new_head(FrameHeadConfig(), 16, 4), spatial=True)
    # the weights of a causal or another stream's pass are not of these features
    view = window_view(data, eval_view(T), 0, np.array([0, 8]), T)
    model(view, [T, T]).square().sum().backward()
    silent = {key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()}
    reference = encoder_of(name)
    reference(view).pooled.square().sum().backward()
    unused = {f"encoder.{key}" for key, value in reference.named_parameters() if value.grad is None or not value.grad.any()}
    assert silent <= unused and len(unused) < 0.2 * len(list(model.parameters()))


def test_an_untrained_encoder_learns(data, tmp_path: Path) -> None:
    given = evaluation(data)
    before = {name: value.clone() for name, value in given.encoder.state_dict().items()}
    frozen = evaluate_segmentation(given, config=DenseConfig(FrameHeadConfig(learning_rate=0.05, epochs=20)))
    tuned = evaluate_segmentation(given, tmp_path, finetune_config=CONFIG)
    assert frozen["accuracy"] < 0.9 and tuned["accuracy"] > 0.97 and tuned["f1@50"] > 0.9
    assert all(torch.equal(before[name], value) for name, value in given.encoder.state_dict().items())
    assert tuned["config"]["finetune"]["epochs"] == 4 and "epochs" not in tuned["config"]["head"]
    assert "finetune" not in frozen["config"] and "checkpoint" not in frozen["folds"][0]
    assert tuned["num_features"] == 8 and json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(tuned))
    # what is kept is a run for other evaluations
    encoder, view, checkpoint = load_encoder(tmp_path / "folds" / "0-split")
    assert view == replace(eval_view(T), topology="ntu-25") and checkpoint.state["class_names"] == NAMES
    assert checkpoint.state["seen"][-1]["labelled"] == data.names[:6].tolist() and not same(encoder, given.encoder)
    assert checkpoint.state["described"]["units"] == "metres"


def test_detection_finds_what_is_there(data) -> None:
    result = evaluate_detection(evaluation(data), finetune_config=CONFIG, proposals=ProposalConfig(thresholds=(0.5,)))
    assert result["map_action"] > 0.9


def test_windows_are_scored_as_frozen_features_are(data) -> None:
    given, windows = evaluation(data), Windows(window=20, overlap=0.3, spatial=True)
    head = new_head(FrameHeadConfig(seed=3), 16, 4).eval()
    expected = frame_probabilities(head, frame_features(given, np.array([2]), windows)[0])
    model = FrameClassifier(given.encoder, head, spatial=True)
    np.testing.assert_allclose(tuned_probabilities(model, given, 2, windows), expected, atol=1e-6)


def test_short_windows_are_scored_without_what_pads_them(data) -> None:
    encoder = encoder_of().eval()
    model = FrameClassifier(encoder, new_head(FrameHeadConfig("tcn", 4, 2), 8, 4)).eval()
    lengths = [12, 5, 12, 7, 5]
    views = [window_view(data, eval_view(T), 1, np.array([start]), length) for start, length in enumerate(lengths)]
    scores = model(module.concat_views(views), lengths)
    assert scores.shape == (5, 12, 4)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(scores[row, :length], model(views[row], [length])[0])
        assert not scores[row, length:].any()


def short(data: PackedDataset) -> PackedDataset:
    """Recordings of 5, 85, and then as many frames as before: the first one is cut in two."""
    offsets = np.concatenate([[0, 5], data.offsets[1:-1]])
    segments = data.segments.copy()
    segments[:, 0] += 1
    rows = np.vstack([[0, 1, 1, 4, 1], segments[segments[:, 0] < 8]])
    rows[rows[:, 0] == 1, 2:4] -= 5
    return replace(data, offsets=np.append(offsets, data.offsets[-1])[: len(data) + 1], segments=rows)


def test_the_loss_is_the_mean_over_valid_frames(data) -> None:
    given, windows = evaluation(short(data)), Windows(overlap=0.0)
    # one batch of all windows, before the first step
    config = replace(QUICK, epochs=1, batch_size=1000, drop_path=0.0, label_smoothing=0.0)
    made = tune(given.dataset, (0, 1), config, given, windows=windows)
    model = FrameClassifier(encoder_of(), new_head(FrameHeadConfig(seed=config.seed), 8, 4)).eval()
    scores, truth = [], []
    for clip, length in ((0, 5), (1, T)):
        starts = np.array([0] if clip == 0 else [*range(0, 80, 8), 77])
        view = window_view(given.dataset, eval_view(T), clip, starts, length)
        scores.append(model(view, [length] * len(starts)).flatten(0, 1))
        truth += [labels_of(given.dataset)[clip][start : start + length] for start in starts]
    loss = functional.cross_entropy(torch.cat(scores), torch.cat(truth))
    assert made.history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    right = (torch.cat(scores).argmax(1) == torch.cat(truth)).double().mean()
    assert made.history[0]["train_top1"] == pytest.approx(float(right))


def test_windows_come_in_another_order_every_epoch(data, monkeypatch) -> None:
    seen: list[list[tuple[int, int]]] = []
    make = module._TrainingWindows.view

    def watch(self, rows):
        seen.append([self.cuts[row][:2] for row in rows])
        return make(self, rows)

    monkeypatch.setattr(module._TrainingWindows, "view", watch)
    tune(data, (1, 4), QUICK)
    # the first view is the one that the width is read off
    epochs = [seen[start] + seen[start + 1] for start in range(1, len(seen), 2)]
    assert len(epochs) == 3 and all(len(set(epoch)) == len(epoch) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and len({frozenset(epoch) for epoch in epochs}) == 1
    assert {clip for epoch in epochs for clip, _ in epoch} == {1, 4}
    assert max(start for _, start in epochs[0]) == data.num_frames[4] - T


def test_draws_of_every_window_and_step_are_apart(data) -> None:
    windows = module._TrainingWindows(evaluation(data), [(0, start, T) for start in range(10)], labels_of(data))
    config = replace(QUICK, batch_size=4, seed=7)
    address = [view.address for epoch in (0, 2) for (view, _), _ in windows.batches(config, epoch)]
    assert [part.step for part in address] == [0, 1, 2, 6, 7, 8] and {part.seed for part in address} == {7}
    assert [len(part.index) for part in address] == [4, 4, 2] * 2
    assert all(sorted(torch.cat([part.index for part in own]).tolist()) == list(range(10)) for own in (address[:3], address[3:]))


def test_it_is_a_function_of_its_settings(data) -> None:
    def made(change=None, **options):
        return tune(data, (0,), replace(QUICK, epochs=2, **(change or {})), **options)

    first = made()
    assert same(made().model, first.model) and not first.model.training
    for change in ({"seed": 1}, {"drop_path": 0.0}, {"optimizer": "sgd"}, {"frozen_epochs": 1}):
        assert not same(made(change).model, first.model), change
    for options in ({"windows": Windows(overlap=0.25)}, {"windows": Windows(window=12)}):
        assert not same(made(**options).model, first.model), options
    for head in (FrameHeadConfig(class_weights=True), FrameHeadConfig(smoothing=5.0), FrameHeadConfig("tcn", 4, 2)):
        other = made(head=head)
        assert other.history != first.history and np.isfinite(other.history[-1]["loss"])
    # of the head's own training nothing is read
    assert same(made(head=FrameHeadConfig(epochs=2, learning_rate=9.0, weight_decay=1.0, seed=5)).model, first.model)


def test_frozen_epochs_train_the_head_alone(data) -> None:
    made = tune(data, config=replace(QUICK, frozen_epochs=3, drop_path=None))
    assert same(made.model.encoder, encoder_of())
    assert not same(made.model.head, new_head(FrameHeadConfig(), 8, 4))


@pytest.mark.parametrize("kind", ["linear", "tcn"])
def test_a_head_that_starts_from_a_probe_is_that_of_frozen_features(kind: str, data) -> None:
    given, head = evaluation(data), FrameHeadConfig(head=kind, epochs=7, hidden=8, layers=2, seed=5)
    still = replace(QUICK, epochs=1, learning_rate=1e-12, start="probe", drop_path=0.0)
    made = tune(data, config=still, given=given, head=head)
    labels = labels_of(data)
    frozen = frame_features(given, np.arange(3))
    # a fine-tuning's own epochs, steps and seed are not those of the head it starts from
    own = FrameHeadConfig(kind, 8, 2, seed=still.seed)
    taught = train_frame_head(frozen, [labels[clip] for clip in range(3)], len(NAMES), own)
    assert made.model.head.deviation.std() > 0
    for name, value in taught.head.state_dict().items():
        torch.testing.assert_close(made.model.head.state_dict()[name], value)


def test_test_recordings_are_never_trained_on(data, tmp_path: Path) -> None:
    config = DenseConfig(windows=Windows(overlap=0.0), leave_one_out="subject")
    quick = replace(QUICK, epochs=1, batch_size=200)
    evaluate_segmentation(evaluation(data), tmp_path / "one", config=config, finetune_config=quick)
    # other frames and another truth for subject 1, of recordings 2 and 3
    frames, segments = data.frames.copy(), data.segments.copy()
    frames[data.offsets[2] : data.offsets[4]] *= -1
    own = np.isin(segments[:, 0], [2, 3])
    segments[own, 1] = (segments[own, 1] + 1) % 3
    changed = replace(data, frames=frames, segments=segments)
    evaluate_segmentation(evaluation(changed), tmp_path / "other", config=config, finetune_config=quick)
    files = [f"folds/{subject}-subject-{subject}/checkpoints/step-000000001/model.safetensors" for subject in range(4)]
    equal = [(tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes() for file in files]
    assert equal == [False, True, False, False]


def test_resuming_gives_the_same_bits(data, tmp_path: Path, monkeypatch) -> None:
    halves = replace(data, columns={"subject": np.arange(8) // 4})
    config = DenseConfig(FrameHeadConfig(smoothing=0.1), Windows(overlap=0.0), leave_one_out="subject")

    def run(out: Path, resume: bool = False, tuning: FinetuneConfig = QUICK):
        return evaluate_segmentation(evaluation(halves), tmp_path / out, config=config, finetune_config=tuning, resume=resume)

    whole = run("whole")
    train, epochs = module.train_epoch, []

    def interrupt(*arguments, **options):
        epochs.append(arguments[4])
        if len(epochs) == 6:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    monkeypatch.setattr(module, "train_epoch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    assert not (tmp_path / "parts" / "results.json").exists()
    with pytest.raises(ValueError, match="out must be new, got .* with a fine-tuning. Resume it"):
        run("parts")
    with pytest.raises(ValueError, match="must keep its settings, got other learning_rate than in"):
        run("parts", True, replace(QUICK, learning_rate=1.0))
    changed = replace(config, windows=Windows(overlap=0.1))
    with pytest.raises(ValueError, match="must keep its settings, got other windows than in"):
        evaluate_segmentation(evaluation(halves), tmp_path / "parts", config=changed, finetune_config=QUICK, resume=True)
    resumed = run("parts", True)
    # the first fold had ended, the second had two epochs to show
    assert epochs[:6] == [0, 1, 2, 0, 1, 2] and epochs[6:] == [2]
    for result in (whole, resumed):
        assert [Path(fold.pop("checkpoint")).name for fold in result["folds"]] == ["step-000000003"] * 2
    assert resumed == whole
    for fold in ("0-subject-0", "1-subject-1"):
        name = f"folds/{fold}/checkpoints/step-000000003/model.safetensors"
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # once more: nothing is left to train
    assert run("parts", True)["accuracy"] == whole["accuracy"] and len(epochs) == 7


def test_a_resumed_training_must_have_the_same_truth(data, tmp_path: Path) -> None:
    tune(data, (0,), out=tmp_path)
    moved = data.segments.copy()
    moved[0, 3] += 1
    with pytest.raises(ValueError, match="must keep its settings, got other labels than in"):
        tune(replace(data, segments=moved), (0,), out=tmp_path, resume=True)


def test_bfloat16(data) -> None:
    exact = tune(data, (0,), replace(CONFIG, epochs=2))
    made = tune(data, (0,), replace(CONFIG, epochs=2), given=evaluation(data, precision="bf16"))
    assert made.history != exact.history
    # 8 bits of mantissa on the way
    assert made.history[-1]["loss"] == pytest.approx(exact.history[-1]["loss"], rel=0.1)


@BOTH
def test_refused(evaluate, data, encoder, tmp_path: Path) -> None:
    task = "detect" if evaluate is evaluate_detection else "segment"

    def refuse(message: str, config: FinetuneConfig = QUICK, **change) -> None:
        with pytest.raises(ValueError, match=message):
            evaluate(replace(evaluation(data), **change), tmp_path / "out", finetune_config=config)

    refuse("finetune: encoder must be one to train, got raw coordinates", encoder=None)
    refuse(f"{task}: the encoder must provide 'temporal' features, got none", replace(QUICK, drop_path=None), encoder=encoder)
    refuse("encoder must be registered to be saved, got FrameEncoder", replace(QUICK, drop_path=None), encoder=FrameEncoder())
    refuse("drop_path must be None for FrameEncoder", encoder=FrameEncoder())
    refuse(f"{task}: crop must be None, windows are trained on whole, got 0.5", replace(QUICK, crop=0.5))
    refuse("view must have neither crop nor transforms", view=replace(eval_view(T), crop=CenterCrop(0.5)))
    refuse("got skeleton kinect-20-utd for ntu-25. Adapt them", view=replace(eval_view(T), topology="kinect-20-utd"))
    refuse(r"loss and weights must stay finite, .* Lower learning_rate", replace(QUICK, learning_rate=1e30, optimizer="sgd"))
    assert not (tmp_path / "out").exists()
    # without a folder any encoder will do
    made = tune(data, config=replace(QUICK, epochs=1, drop_path=None), given=evaluation(data, FrameEncoder()))
    assert made.checkpoint is None and made.num_features == 4


def test_an_encoder_of_another_skeleton(data, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = DSTE(num_joints=20, num_bodies=2, num_frames=T, width=8)
    view = replace(eval_view(T), topology="kinect-20-utd")
    given = evaluation(data, encoder, view=view, cache=tmp_path / "cache")
    with pytest.raises(ValueError, match="got skeleton kinect-20-utd for ntu-25, bodies 2 for 1, joints 20 for 25. Adapt them"):
        evaluate_segmentation(given)
    head = DenseConfig(FrameHeadConfig(learning_rate=0.05, epochs=3), Windows(overlap=0.0))
    frozen = evaluate_segmentation(given, config=head, source={"source": "elsewhere"})
    assert frozen["adaptation"]["skeleton"] == "ntu-25 for kinect-20-utd" and frozen["source"] == {"source": "elsewhere"}
    assert frozen["dataset"]["path"] == str(data.path) and frozen["num_test"] == 2
    own = data.segments[data.segments[:, 0] == 6]
    assert [(row["start"], row["end"]) for row in frozen["timelines"][0]["truth"]] == [tuple(row) for row in own[:, 2:4].tolist()]
    tuned = evaluate_segmentation(given, tmp_path / "out", config=head, finetune_config=CONFIG, source={})
    assert tuned["accuracy"] > frozen["accuracy"] and tuned["adaptation"] == frozen["adaptation"]
    # what fits is left alone
    plain = evaluation(data)
    left = evaluate_segmentation(plain, config=head, source={})
    assert left["accuracy"] == evaluate_segmentation(plain, config=head)["accuracy"]


def test_options_have_the_defaults_of_the_settings() -> None:
    settings = FinetuneConfig()
    for field in dataclasses.fields(TuningOptions):
        assert field.default == getattr(settings, field.name), field.name


def checkpoint(folder: Path, **options) -> None:
    encoder = encoder_of(**options)
    state = {
        "encoder": {"name": "usdrl-dste", "config": encoder.config}, "eval_view": eval_view(T, normalise="center"),
        "topology": "ntu-25",
    }  # fmt: skip
    save_checkpoint(folder / "checkpoints", 1, weights({"encoder": encoder}), state)


def test_commands(data, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "run")
    Path("halves.json").write_text(json.dumps({"train": [0, 1], "test": [2]}))
    command = ["evaluate", "segment", "run", str(data.path), "--split-file", "halves.json", "--quiet", "--device", "cpu"]
    quick = ["--fine-tune", "--epochs", "1", "--batch-size", "200", "--warmup-epochs", "0", "--milestones", "3", "4"]
    folder = Path("run/segment-halves-packed-linear-epochs1-fine-tuned-batch_size200-warmup_epochs0-milestones3-4")
    assert main([*command, *quick]) == 0
    assert f"(1 test recordings, {data.num_frames[2]} frames; {folder})" in capsys.readouterr().out
    assert json.loads((folder / "results.json").read_text())["config"]["finetune"]["milestones"] == [3, 4]
    assert main([*command, *quick]) == 2
    assert "with a fine-tuning. Resume it" in capsys.readouterr().err
    assert main([*command, *quick, "--resume"]) == 0
    assert main([*command, "--batch-size", "200", "--resume"]) == 2
    assert "batch_size200, resume must be left out without fine_tune" in " ".join(capsys.readouterr().err.split())
    # what it was trained on is no test of what is left
    Path("turned.json").write_text(json.dumps({"train": [2], "test": [0, 1]}))
    tuned = ["evaluate", "segment", str(folder / "folds/0-halves"), str(data.path), "--quiet", "--split-file", "turned.json"]
    assert main(tuned) == 2
    assert "must not have seen labels of the test part, got 2 of 2 clips" in " ".join(capsys.readouterr().err.split())


def test_adapting_says_what_it_does(data, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "run")
    convert_dataset(data, "kinect-20-utd", "other")
    command = ["evaluate", "detect", "run", "other", "--leave-one-out", "subject", "--epochs", "1", "--quiet", "--device", "cpu"]
    assert main(command) == 2
    assert "got skeleton ntu-25 for kinect-20-utd" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "--adapt"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "skeleton kinect-20-utd for ntu-25, bodies 1 for 1, scale 1, upwards y for y"
    assert said[1].startswith("joints that the data do not have") and said[2].startswith("IoU ")
    # what a figure is of comes before it, and nothing in between
    assert said[5] == "at an IoU of 0.5:" and said[6].startswith("map_action ")
    assert main([*command, "--trained-on", "ntu-25", "--scale", "2"]) == 2
    assert "ntu-25, scale2 must be left out without adapt" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "--adapt", "--trained-on", "ntu-25"]) == 2
    assert "trained_on must be left out, run records its skeleton" in " ".join(capsys.readouterr().err.split())
    stored = json.loads(Path("run/detect-leave-one-subject-out-other-linear-epochs1-adapted/results.json").read_text())
    assert stored["dataset"]["path"] == "other" and stored["num_segments"] == len(data.segments)
