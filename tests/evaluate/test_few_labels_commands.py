"""The commands of few labels, one shot, zero shots and clusters: what they pass on, print and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fastskel.cli import main
from fastskel.cli_evaluate import few_labels, frozen
from fastskel.data.views import eval_view
from fastskel.evaluate import Evaluation


@pytest.fixture
def out(encoder, dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands leave results; they evaluate the tiny encoder, whatever run and data they are given."""
    split = SimpleNamespace(train=np.arange(9), test=np.arange(9, 17))
    evaluation = Evaluation(encoder, dataset, split, eval_view(frames=6, normalise="none"), progress=False)

    def prepare(task, run, data, options, shown=(), reads=None):
        return evaluation, tmp_path / "-".join([task, *shown])

    for module in (few_labels, frozen):
        monkeypatch.setattr(module, "prepare", prepare)
    return tmp_path


@pytest.mark.parametrize(
    "command, folder, printed",
    [
        ("linear --solver exact", "linear-exact", r"top1 100.0 %  top5 100.0 %"),
        ("linear --solver exact --penalty 0.1 --seed 2", "linear-exact-penalty0.1-seed2", r"top1 100.0 %"),
        (
            "semi --fractions 0.7 1 --sampling balanced --seeds 2 --solver sgd",
            "semi-fractions0.7-1-balanced-seeds2-sgd",
            "100 % of the labels (9 clips)  top1 100.0 ± 0.0 %  mean_class 100.0 ± 0.0 %\nbalanced parts, 2 seeds",
        ),
        (
            "semi --fractions 0.1 --sampling balanced --seeds 1",
            "semi-fractions0.1-balanced-seeds1",
            "10 % of the labels (3 clips, 33.3 %: one of each class)  top1 100.0 %",
        ),
        (
            "fewshot --ways 2 --episodes 4 --queries 1",
            "fewshot-2way-1shot-queries1-episodes4",
            "2-way 1-shot top1 100.0 ± 0.0 % (95 % interval of the mean)   (4 episodes, 3 classes,",
        ),
        (
            "fewshot --ways 2 --episodes 1 --classifier logistic --centre",
            "fewshot-2way-1shot-episodes1-logistic-centred",
            "top1 100.0 %   (1 episodes",
        ),
        ("fewshot --ways 2 --episodes 2 --classes sit 2", "fewshot-2way-1shot-episodes2-classes-sit-2", "2 classes, 8 test"),
        ("oneshot", "oneshot", "top1 100.0 %  mean_class 100.0 %   (3 train, 8 test clips"),
        ("oneshot --novel sit wave", "oneshot-novel-sit-wave", "(2 train, 6 test clips"),
        (
            "cluster --seeds 2",
            "cluster-seeds2",
            "accuracy 100.0 ± 0.0 %  nmi 100.0 ± 0.0 %  ari 100.0 ± 0.0 %   (3 clusters of 8 clips",
        ),
        (
            "cluster --part all --num-clusters 2 --raw --seeds 1",
            "cluster-all-clusters2-raw-seeds1",
            "(2 clusters of 17 clips, 1 seeds",
        ),
    ],
)  # fmt: skip
def test_commands(out: Path, capsys, command, folder, printed) -> None:
    assert main(["evaluate", *command.split()[:1], "run", "data", *command.split()[1:]]) == 0
    shown = capsys.readouterr()
    assert printed in shown.out and str(out / folder) in shown.out and shown.err == ""
    assert json.loads((out / folder / "results.json").read_text())["task"] == command.split()[0]


def test_zero_shot(out: Path, capsys, dataset) -> None:
    (out / "words.json").write_text(json.dumps({"sit": [1, 0, 0], "wave": [0, 1, 0], "kick": [0, 0, 1]}))
    (out / "unseen.txt").write_text("sit\n\n wave \n")
    command = ["evaluate", "zeroshot", "run", "data", "--embeddings", str(out / "words.json"), "--penalty", "0.1"]
    assert main([*command, "--unseen-file", str(out / "unseen.txt")]) == 0
    printed = capsys.readouterr().out
    assert "top1 " in printed and "among all classes  seen " in printed and "harmonic" in printed
    assert "among the 2 unseen classes; by chance 50.0 %" in printed
    folder = out / "zeroshot-words-unseen-sit-wave-penalty0.1"
    assert json.loads((folder / "results.json").read_text())["unseen"] == ["sit", "wave"]


def test_names_from_files(out: Path, capsys) -> None:
    (out / "novel.txt").write_text("kick\nsit\n")
    (out / "clips.txt").write_text("clip009\nclip011\n")
    options = ["--novel-file", str(out / "novel.txt"), "--exemplars", str(out / "clips.txt")]
    assert main(["evaluate", "oneshot", "run", "data", *options]) == 0
    folder = out / "oneshot-novel-kick-sit-exemplars-clip009-clip011"
    assert json.loads((folder / "results.json").read_text())["exemplars"] == ["clip011", "clip009"]
    (out / "empty.txt").write_text("\n")
    capsys.readouterr()
    for given, message in [
        (["fewshot", "--classes", "sit", "--classes-file", str(out / "novel.txt")], "by name or by file, got both"),
        (["fewshot", "--classes-file", str(out / "empty.txt")], "empty.txt must name something, one in each line, got nothing"),
        (["zeroshot", "--embeddings", "a.npy"], "unseen or unseen_file must be given, got neither"),
        (["linear", "--penalty", "0.1"], "penalty must be left out, only the exact solver has one"),
        (["linear", "--solver", "exact", "--learning-rate", "1"], "the exact solver has none"),
        (["linear", "--solver", "exact", "--epochs", "3"], "the exact solver has none"),
    ]:
        assert main(["evaluate", given[0], "run", "data", *given[1:]]) == 2
        assert message in capsys.readouterr().err
