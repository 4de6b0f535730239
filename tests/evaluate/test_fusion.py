"""Late fusion: of scores and of neighbours, weights chosen without the test, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastskel.cli import main
from fastskel.data import PackedDataset, make_synthetic, pack_arrays
from fastskel.data.batch import View
from fastskel.data.views import eval_view
from fastskel.evaluate import Evaluation, LinearConfig, accuracy, evaluate_knn, evaluate_linear, linear_probe
from fastskel.evaluate.fusion import choose_weights, evaluate_fusion, fuse_features, fuse_scores
from fastskel.models.encoder import Encoder, Features
from fastskel.recipes import RECIPES
from fastskel.train import pretrain

NUM_CLASSES, PER_CLASS = 3, 12
SPLIT = SimpleNamespace(train=np.arange(0, 36, 2), test=np.arange(1, 36, 2))
CONFIG = LinearConfig(epochs=30, learning_rate=0.3, milestones=(25,), evaluate_every=30)


class Partial(Encoder):
    """Sees whether one of the classes moves its joint; the others look alike to it, but for noise."""

    def __init__(self, seen: int) -> None:
        super().__init__()
        self.num_features = 4
        self.seen = seen
        self.noise = nn.Linear(25, 3, bias=False)
        with torch.no_grad():
            self.noise.weight.copy_(torch.randn(3, 25, generator=torch.Generator().manual_seed(seen)))

    def forward(self, view: View, *, token_mask: Tensor | None = None, mode: str | None = None) -> Features:
        pose = view.clips.mean((1, 2))
        return Features(torch.cat([4 * pose[:, 4 + 3 * self.seen, 1:2], self.noise(pose[..., 0])], 1))


def pack(folder: Path, seed: int = 0) -> PackedDataset:
    """Clips of 36 recordings by six subjects whose class moves one joint."""
    draw = np.random.default_rng(seed)
    labels = np.arange(NUM_CLASSES * PER_CLASS) % NUM_CLASSES
    clips = draw.normal(0, 0.05, (len(labels), 6, 1, 25, 3)).astype(np.float32)
    clips[np.arange(len(labels)), :, 0, 4 + 3 * labels, 1] += 1.0
    return pack_arrays(
        clips, out=folder, topology="ntu-25", labels=labels, columns={"subject": np.arange(len(labels)) // 2 % 6},
        class_names=("sit", "wave", "kick"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> PackedDataset:
    return pack(tmp_path_factory.mktemp("data") / "packed")


def evaluations(dataset, seen=(0, 1, 2), **options) -> list[Evaluation]:
    named = {"protocol": "halves", "progress": False} | options
    return [Evaluation(Partial(each), dataset, SPLIT, eval_view(6), run=f"runs/{each}", **named) for each in seen]


def test_together_they_know_what_none_knows_alone(labelled, tmp_path) -> None:
    result = evaluate_fusion(evaluations(labelled), tmp_path / "out", config=CONFIG)
    assert (result["top1"], result["top5"], result["mean_class"]) == (1.0, 1.0, 1.0)
    assert all(alone["top1"] < 0.9 for alone in result["alone"])
    assert result["weights"] == pytest.approx([1 / 3] * 3) and result["weights_from"] == "equal"
    assert [alone["run"] for alone in result["alone"]] == result["run"] == ["runs/0", "runs/1", "runs/2"]
    assert (result["num_train"], result["num_test"], result["num_features"]) == (18, 18, [4, 4, 4])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["confusion.csv", "confusion.png", "results.json"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(result))


def test_alone_is_what_the_single_evaluations_say(labelled) -> None:
    result = evaluate_fusion(evaluations(labelled), config=CONFIG)
    for evaluation, alone in zip(evaluations(labelled), result["alone"], strict=True):
        assert alone["top1"] == evaluate_linear(evaluation, config=CONFIG)["top1"]
        assert alone["knn_top1"] == evaluate_knn(evaluation)["top1"]
        assert (alone["stream"], alone["config"]["learning_rate"]) == ("joint", 0.3)


@pytest.mark.parametrize("number", range(3))
def test_all_weight_on_one_run_is_that_run(labelled, number) -> None:
    weights = [0.0] * 3
    weights[number] = 2.5
    result = evaluate_fusion(evaluations(labelled), weights=weights, config=CONFIG)
    assert result["weights"] == [float(number == other) for other in range(3)]
    for name in ("top1", "top5", "mean_class", "knn_top1"):
        assert result[name] == result["alone"][number][name], name


def test_scores_are_probabilities_weighted(labelled) -> None:
    """The whole of it once more, by hand."""
    given = evaluations(labelled)
    result = evaluate_fusion(given, weights=(1, 2, 5), config=CONFIG)
    total = torch.zeros(18, NUM_CLASSES, dtype=torch.float64)
    for evaluation, weight in zip(given, (1, 2, 5), strict=True):
        train, test = evaluation.features()
        probe = linear_probe(train, test, NUM_CLASSES, CONFIG)
        total += weight * (test.features.double() @ probe.weight.double().T + probe.bias.double()).softmax(1)
    assert result["top1"] == accuracy(total.argmax(1), test.labels)
    confusion = torch.tensor(result["confusion"])
    assert confusion.sum() == 18 and confusion.trace() / 18 == result["top1"]


def test_fused_similarity_is_the_mean_of_cosines() -> None:
    draw = torch.Generator().manual_seed(0)
    one, other = torch.randn(7, 5, generator=draw), 100 * torch.randn(7, 3, generator=draw)
    fused = fuse_features([one, other], (0.25, 0.75))
    cosines = [F.normalize(x.double(), dim=1) @ F.normalize(x.double(), dim=1).T for x in (one, other, fused)]
    # of rows rounded to float32
    torch.testing.assert_close(cosines[2], 0.25 * cosines[0] + 0.75 * cosines[1], rtol=0, atol=1e-6)


def test_chosen_weights_are_the_best_in_tenths() -> None:
    draw = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 4, (200,), generator=draw)
    truth = F.one_hot(labels, 4).double()
    scores = [(truth + size * torch.randn(200, 4, generator=draw)).softmax(1) for size in (0.8, 1.2, 5.0)]
    chosen = choose_weights(scores, labels)
    assert sum(chosen) == pytest.approx(1) and chosen[2] < min(chosen[:2])
    reached = accuracy(fuse_scores(scores, chosen).argmax(1), labels)
    tenths = [(a / 10, b / 10, (10 - a - b) / 10) for a in range(11) for b in range(11 - a)]
    assert reached == max(accuracy(fuse_scores(scores, each).argmax(1), labels) for each in [(1 / 3,) * 3, *tenths])
    # among equals the equal ones
    assert choose_weights([scores[0]] * 4, labels) == (0.25,) * 4


def test_weights_are_chosen_without_the_test(labelled) -> None:
    """Other labels of the test change no weight; a run that tells nothing gets none that counts."""
    given = evaluations(labelled, seen=(0, 1, 5))
    first = evaluate_fusion(given, weights="auto", config=CONFIG)
    assert first["weights_from"] == "held-out training clips" and first["top1"] == 1.0
    labels = labelled.labels.copy()
    labels[SPLIT.test] = (labels[SPLIT.test] + 1) % 3
    wrong = replace(labelled, labels=labels)
    other = evaluate_fusion([replace(each, dataset=wrong) for each in given], weights="auto", config=CONFIG)
    assert other["weights"] == first["weights"] and other["top1"] == 0.0
    # other labels of the training clips do
    labels = labelled.labels.copy()
    labels[SPLIT.train] = np.random.default_rng(0).permutation(labels[SPLIT.train])
    shuffled = [replace(each, dataset=replace(labelled, labels=labels)) for each in given]
    assert evaluate_fusion(shuffled, weights="auto", config=CONFIG)["weights"] != first["weights"]


@pytest.mark.parametrize("weights", [(1, 1), (1, 1, -1), (0, 0, 0), (1, 1, float("nan")), (1, 1, float("inf"))], ids=str)
def test_weights_that_do_not_fit_are_refused(labelled, weights) -> None:
    with pytest.raises(ValueError, match="weights must be 3 finite numbers from 0 on, one for each run and not all 0, got "):
        evaluate_fusion(evaluations(labelled), weights=weights, config=CONFIG)


def test_runs_that_do_not_belong_together_are_refused(labelled, tmp_path) -> None:
    given = evaluations(labelled)
    with pytest.raises(ValueError, match="evaluations must be at least 2, got 1"):
        evaluate_fusion(given[:1])
    swapped = SimpleNamespace(train=SPLIT.test, test=SPLIT.train)
    for change in ({"split": swapped}, {"protocol": "xview"}, {"dataset": pack(tmp_path / "other", seed=1)}):
        with pytest.raises(ValueError, match="evaluations must be of one data set and protocol, got .*packed halves and"):
            evaluate_fusion([given[0], replace(given[1], **change)])
    trained = [np.arange(18), np.arange(17), None]
    known = [replace(each, trained_on=clips) for each, clips in zip(given, trained, strict=True)]
    with pytest.raises(ValueError, match="runs must be trained on the same clips of .*, got 18 in runs/0 and others, 17, in"):
        evaluate_fusion(known)
    known[1] = replace(known[1], trained_on=np.arange(18)[::-1])
    # whichever run says so
    for order in (known, known[::-1]):
        assert evaluate_fusion(order, config=CONFIG)["test_clips_trained_on"] == 9


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[list[Path], Path]:
    """Three runs of a step each, over joints, bones and motion."""
    folder = tmp_path_factory.mktemp("runs")
    dataset = make_synthetic(folder / "data", num_clips=24, num_classes=3, num_subjects=4)
    found = []
    for stream in ("joint", "bone", "motion"):
        recipe = replace(
            RECIPES["usdrl-demo"](), stream=stream, width=8, num_layers=1, frames=8, crop_min_frames=8, epochs=1, batch_size=16,
        )  # fmt: skip
        (stage,) = recipe.stages(dataset)
        pretrain(stage, dataset, folder / stream, indices=np.arange(16), device="cpu", progress=False)
        found.append(folder / stream)
    return found, dataset.path


def test_command_line(runs, capsys) -> None:
    folders, data = runs
    paths = [*map(str, folders), str(data)]
    assert main(["evaluate", "fusion", *paths, "--protocol", "xsub", "--weights", "2", "1", "1", "--epochs", "3", "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[1:4]] == ["joint", "bone", "motion"]
    assert lines[4].split()[:4] == ["fused", "0.50", "0.25", "0.25"]
    out = folders[0] / "fusion-xsub-data-with-bone-motion-2-1-1-epochs3"
    result = json.loads((out / "results.json").read_text())
    assert result["run"] == paths[:3] and str(out) in lines[5]
    # features of each run are kept in its own folder
    assert [len(list((folder / "features").iterdir())) for folder in folders] == [2, 2, 2]
    assert main(["evaluate", "fusion", *paths, "--protocol", "xsub", "--weights", "auto", "--epochs", "3", "--quiet"]) == 0
    assert (folders[0] / "fusion-xsub-data-with-bone-motion-auto-epochs3" / "results.json").is_file()


def test_command_line_refuses(runs, tmp_path, capsys) -> None:
    (joint, bone, _), data = runs
    assert main(["evaluate", "fusion", str(joint), str(data), "--protocol", "xsub"]) == 2
    assert "fusion must have two runs at least and then the data, got 2 paths" in capsys.readouterr().err
    assert main(["evaluate", "fusion", str(joint), str(bone), str(data), "--protocol", "xsub", "--modalities", "joint"]) == 2
    assert "modalities must be one for each of 2 runs, got 1" in capsys.readouterr().err
    clips = np.random.default_rng(0).normal(size=(2, 20, 1, 20, 3)).astype(np.float32)
    pack_arrays(clips, out=tmp_path / "ucla", topology="kinect-20-ucla", labels=[0, 1])
    split_file = tmp_path / "split.json"
    split_file.write_text(json.dumps({"train": [0], "test": [1]}))
    paths = [str(path) for path in (joint, bone, tmp_path / "ucla")]
    assert main(["evaluate", "fusion", *paths, "--split-file", str(split_file), "--quiet"]) == 2
    assert "the encoder must be made for clips like those of" in capsys.readouterr().err
