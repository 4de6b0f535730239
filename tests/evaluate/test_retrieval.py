"""Retrieval against scikit-learn, by hand, and as a whole evaluation."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from fastskel.cli import main
from fastskel.data import make_synthetic
from fastskel.data.views import eval_view
from fastskel.evaluate import (
    TASKS,
    Evaluation,
    FeatureSet,
    average_precision,
    evaluate_knn,
    evaluate_retrieval,
    retrieval_scores,
)

VIEW = eval_view(frames=6, normalise="none")
SPLIT = SimpleNamespace(train=np.arange(9), test=np.arange(9, 17))


def _set(features: Tensor, labels: Tensor, first: int = 0) -> FeatureSet:
    return FeatureSet(features, labels, torch.arange(first, first + len(labels)))


def _draw(num_train: int = 60, num_test: int = 25, width: int = 8, classes: int = 4) -> tuple[FeatureSet, FeatureSet]:
    draw = torch.Generator().manual_seed(2)
    centres = torch.randn(classes, width, generator=draw)
    sets = []
    for number in (num_train, num_test):
        labels = torch.randint(classes, (number,), generator=draw)
        sets.append(_set(centres[labels] + torch.randn(number, width, generator=draw), labels, 100 * len(sets)))
    return sets[0], sets[1]


def _angles(*degrees: float) -> Tensor:
    angle = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angle.cos(), angle.sin()], 1)


def _evaluate(encoder, dataset, split=SPLIT, out=None, settings=None, **options):
    return evaluate_retrieval(Evaluation(encoder, dataset, split, VIEW, progress=False, **options), out, **(settings or {}))


def test_average_precision_by_hand() -> None:
    relevant = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    found = average_precision(relevant)
    torch.testing.assert_close(found[:3], torch.tensor([(1 + 2 / 3) / 2, 1 / 4, 1.0], dtype=torch.float64))
    assert torch.isnan(found[3])


def test_mean_average_precision_is_that_of_scikit_learn() -> None:
    train, test = _draw()
    scores = retrieval_scores(train, test)
    cosine = torch.nn.functional.normalize(test.features.double()) @ torch.nn.functional.normalize(train.features.double()).T
    expected = [average_precision_score(train.labels == label, row) for label, row in zip(test.labels, cosine)]
    assert scores.mean_average_precision == pytest.approx(np.mean(expected), abs=1e-12)
    assert 0.3 < scores.mean_average_precision < 0.95 and scores.num_without_match == 0


def test_recall_and_precision_by_hand() -> None:
    train = _set(_angles(0, 10, 20, 90), torch.tensor([0, 1, 1, 0]))
    # the first sees classes 0 1 1 0, the second 1 1 0 0, the third 0 1 1 0
    test = _set(_angles(1, 14, 80), torch.tensor([1, 1, 0]))
    scores = retrieval_scores(train, test, ks=(1, 2, 3, 4))
    assert scores.recall == {1: 2 / 3, 2: 1.0, 3: 1.0, 4: 1.0}
    assert scores.precision == pytest.approx({1: 2 / 3, 2: (1 + 2 + 1) / 6, 3: (2 + 2 + 1) / 9, 4: 6 / 12})
    first, second, third = (1 / 2 + 2 / 3) / 2, 1.0, (1 + 2 / 4) / 2
    assert scores.mean_average_precision == pytest.approx((first + second + third) / 3)


def test_equal_similarities_rank_in_the_order_of_the_gallery() -> None:
    train = _set(_angles(0, 0, 0, 0), torch.tensor([0, 1, 0, 1]))
    scores = retrieval_scores(train, _set(_angles(30), torch.tensor([1])), ks=(1, 2))
    assert scores.recall == {1: 0.0, 2: 1.0}
    assert scores.mean_average_precision == pytest.approx((1 / 2 + 2 / 4) / 2)


def test_perfect_features_and_useless_ones() -> None:
    labels = torch.arange(12) % 3
    perfect = retrieval_scores(_set(torch.eye(3)[labels], labels), _set(torch.eye(3), torch.arange(3)), ks=(1, 4))
    assert (perfect.recall, perfect.precision, perfect.mean_average_precision) == ({1: 1.0, 4: 1.0}, {1: 1.0, 4: 1.0}, 1.0)
    wrong = retrieval_scores(_set(torch.eye(3)[labels], labels), _set(torch.eye(3)[[1, 2, 0]], torch.arange(3)), ks=(1, 4))
    assert (wrong.recall, wrong.precision) == ({1: 0.0, 4: 0.0}, {1: 0.0, 4: 0.0})


def test_the_order_of_clips_does_not_matter() -> None:
    train, test = _draw()
    draw = torch.Generator().manual_seed(0)
    expected = retrieval_scores(train, test)

    def shuffled(clips: FeatureSet) -> FeatureSet:
        order = torch.randperm(len(clips), generator=draw)
        return FeatureSet(clips.features[order], clips.labels[order], clips.index[order])

    found = retrieval_scores(shuffled(train), shuffled(test))
    assert (found.recall, found.precision) == (expected.recall, expected.precision)
    assert found.mean_average_precision == pytest.approx(expected.mean_average_precision, abs=1e-14)


def test_queries_without_a_match_are_misses_and_left_out_of_the_mean() -> None:
    train = _set(_angles(0, 10), torch.tensor([0, 1]))
    test = _set(_angles(1, 2), torch.tensor([0, 7]))
    scores = retrieval_scores(train, test, ks=(1, 2))
    assert scores.num_without_match == 1 and scores.mean_average_precision == 1.0
    assert scores.recall == {1: 0.5, 2: 0.5} and scores.precision == {1: 0.5, 2: 0.25}
    strangers = _set(test.features, torch.tensor([7, 8]))
    with pytest.raises(ValueError, match="a test clip must have a training clip of its class, got none"):
        retrieval_scores(train, strangers)
    assert retrieval_scores(train, strangers, mean_average_precision=False).recall == {1: 0.0}


def test_without_the_whole_ranking_the_neighbours_are_the_same() -> None:
    train, test = _draw(300, 40)
    whole, near = (retrieval_scores(train, test, mean_average_precision=asked) for asked in (True, False))
    assert torch.equal(whole.keys, near.keys)
    assert (whole.recall, whole.precision) == (near.recall, near.precision)
    assert near.mean_average_precision is None


@pytest.mark.parametrize("raw", [False, True], ids=["encoder", "raw"])
def test_separable_classes(encoder, dataset, raw: bool, tmp_path: Path, capsys) -> None:
    out = tmp_path / "deep" / "result"
    result = _evaluate(None if raw else encoder, dataset, out=out, protocol="halves", run="runs/one")
    assert (result["top1"], result["recall_at"], result["map"]) == (1.0, {"1": 1.0, "5": 1.0}, 1.0)
    # three training clips of each of three classes
    assert result["precision_at"] == pytest.approx({"1": 1.0, "5": 3 / 5})
    assert (result["task"], result["num_train"], result["num_test"], result["num_without_match"]) == ("retrieval", 9, 8, 0)
    assert [path.name for path in out.iterdir()] == ["results.json"]
    assert json.loads((out / "results.json").read_text()) == result
    assert capsys.readouterr().out == ""
    assert TASKS["retrieval"].needs == ("pooled",)


def test_examples_name_clips_of_the_data_set(encoder, dataset) -> None:
    split = SimpleNamespace(train=np.array([16, 3, 1, 2, 5, 4, 0]), test=np.array([15, 9, 8, 7]))
    examples = _evaluate(encoder, dataset, split=split, settings={"ks": (1,)})["examples"]
    # of the classes 0 1 2 the test clips 9 and 15, 7, 8
    assert [(example["query"], example["label"]) for example in examples] == [(9, 0), (7, 1), (8, 2)]
    for example in examples:
        assert len(example["neighbours"]) == 5 and set(example["neighbours"]) <= set(split.train)
        assert example["labels"] == [dataset.labels[clip] for clip in example["neighbours"]]
        assert example["labels"][0] == example["label"]
        assert example["similarities"] == sorted(example["similarities"], reverse=True)


def test_first_neighbour_is_that_of_knn(dataset) -> None:
    # classes that coordinates do not tell apart
    shuffled = replace(dataset, labels=np.random.default_rng(1).permutation(dataset.labels))
    evaluation = Evaluation(None, shuffled, SPLIT, VIEW, progress=False)
    found, expected = evaluate_retrieval(evaluation), evaluate_knn(evaluation)
    assert found["top1"] == found["recall_at"]["1"] == found["precision_at"]["1"] == expected["top1"] < 1.0


def test_labels_cache_and_training_clips(encoder, dataset, tmp_path: Path) -> None:
    labels = dataset.labels.copy()
    labels[[0, 16]] = -1
    result = _evaluate(encoder, replace(dataset, labels=labels), cache=tmp_path, trained_on=np.array([3, 9, 10]))
    assert (result["num_train"], result["dropped_train"], result["num_test"], result["dropped_test"]) == (8, 1, 7, 1)
    assert result["test_clips_trained_on"] == 2
    calls = encoder.calls[0]
    _evaluate(encoder, replace(dataset, labels=labels), cache=tmp_path, settings={"mean_average_precision": False})
    assert encoder.calls[0] == calls


@pytest.mark.parametrize("ks", [(0,), (1, 10), ()], ids=str)
def test_bad_numbers_of_neighbours(ks, encoder, dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ks must lie in 1\.\.9 .training clips."):
        _evaluate(encoder, dataset, out=tmp_path / "out", settings={"ks": ks})
    assert not (tmp_path / "out").exists()


# a training of three steps
TRAINING = "--width 16 --frames 16 --crop-min-frames 16 --num-views 2 --batch-size 6 --epochs 1 --threads 1 --device cpu --quiet"


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    make_synthetic("data", num_clips=32, num_classes=3, num_subjects=4)
    threads = torch.get_num_threads()
    assert main(["pretrain", "usdrl-demo", "data", "--out", "run", *TRAINING.split()]) == 0
    torch.set_num_threads(threads)
    capsys.readouterr()
    command = ["evaluate", "retrieval", "run", "data", "--protocol", "xsub", "--quiet"]
    assert main(command) == 0
    said = capsys.readouterr()
    percent = r"[\d.]+ %  "
    shown = rf"top1 {percent}mAP {percent}recall@5 {percent}recall@10 {percent}precision@5 {percent}precision@10 {percent} "
    assert re.fullmatch(shown + r"\(\d+ train, \d+ test clips; run/retrieval-xsub-data\)\n", said.out)
    # the run was trained on all clips
    assert re.match(r"warning: (\d+) of \1 test clips were trained on", said.err)
    results = json.loads(Path("run/retrieval-xsub-data/results.json").read_text())
    assert (results["task"], results["protocol"], sorted(results["recall_at"])) == ("retrieval", "xsub", ["1", "10", "5"])
    assert main([*command, "--ks", "2", "3", "--skip-map"]) == 0
    assert re.match(r"top1 .*%  recall@2 .*%  recall@3 .*%  precision@2 .*", capsys.readouterr().out)
    again = json.loads(Path("run/retrieval-xsub-data-k2-3-nomap/results.json").read_text())
    assert again["map"] is None and list(again["recall_at"]) == ["2", "3"] and again["top1"] == results["top1"]
    assert main([*command, "--ks", "1000"]) == 2
    assert "ks must lie in 1.." in capsys.readouterr().err
