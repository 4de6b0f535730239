"""Whole evaluations on a tiny data set, and what they leave on disk."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastskel.data.protocols import split
from fastskel.data.synthetic import make_synthetic
from fastskel.data.views import eval_view
from fastskel.evaluate import Evaluation, LinearConfig, accuracy, evaluate_knn, evaluate_linear, knn_predict
from fastskel.evaluate.features import feature_key
from fastskel.models.encoder import ENCODERS

VIEW = eval_view(frames=6, normalise="none")
SPLIT = SimpleNamespace(train=np.arange(9), test=np.arange(9, 17))
CONFIG = LinearConfig(epochs=20, learning_rate=0.1, milestones=(15,))


def _knn(encoder, dataset, split=SPLIT, out=None, k=1, **options):
    return evaluate_knn(Evaluation(encoder, dataset, split, VIEW, progress=False, **options), out, k=k)


def _linear(encoder, dataset, split=SPLIT, out=None, **options):
    return evaluate_linear(Evaluation(encoder, dataset, split, VIEW, progress=False, **options), out, config=CONFIG)


@pytest.mark.parametrize("evaluate", [_knn, _linear], ids=["knn", "linear"])
@pytest.mark.parametrize("raw", [False, True], ids=["encoder", "raw"])
def test_separable_classes(evaluate, encoder, dataset, raw: bool, tmp_path: Path, capsys) -> None:
    out = tmp_path / "deep" / "result"
    result = evaluate(None if raw else encoder, dataset, out=out, protocol="halves", run="runs/one")
    assert (result["top1"], result["top5"], result["mean_class"]) == (1.0, 1.0, 1.0)
    assert (result["num_train"], result["num_test"], result["dropped_train"], result["dropped_test"]) == (9, 8, 0, 0)
    assert result["encoder"] == ("raw coordinates" if raw else "CountingEncoder")
    assert result["num_features"] == (450 if raw else 8)
    assert sorted(path.name for path in out.iterdir()) == ["confusion.csv", "confusion.png", "results.json"]
    stored = json.loads((out / "results.json").read_text())
    assert stored == json.loads(json.dumps(result))
    assert (stored["protocol"], stored["run"], stored["dataset"]["source"]) == ("halves", "runs/one", "custom")
    assert {"fastskel", "torch", "numpy", "python"} <= set(stored["versions"])
    assert "commit" in stored
    with open(out / "confusion.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == ["sit", "wave", "kick"]
    assert [[int(cell) for cell in row[1:]] for row in rows[1:]] == result["confusion"]
    assert (out / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == ""


def test_a_clip_in_both_parts_is_refused(encoder, dataset) -> None:
    leaking = SimpleNamespace(train=np.arange(10), test=np.arange(9, 17))
    with pytest.raises(ValueError, match="parts of the split must be apart, got 1 clips in both, such as clip009"):
        _knn(encoder, dataset, leaking)


def test_linear_reports_the_last_epoch_and_the_best_apart(encoder, dataset) -> None:
    result = _linear(encoder, dataset)
    assert result["best_top1"] >= result["top1"] == result["history"][-1]["test_top1"]
    assert "chosen on the test set" in result["note"]
    assert result["config"]["learning_rate"] == 0.1


@pytest.mark.parametrize("evaluate", [_knn, _linear], ids=["knn", "linear"])
def test_unknown_labels_are_dropped_and_counted(evaluate, encoder, dataset) -> None:
    labels = dataset.labels.copy()
    labels[[0, 3, 16]] = -1
    result = evaluate(encoder, replace(dataset, labels=labels))
    assert (result["num_train"], result["dropped_train"]) == (7, 2)
    assert (result["num_test"], result["dropped_test"]) == (7, 1)


def test_features_are_shared_through_the_cache(encoder, dataset, tmp_path: Path) -> None:
    _knn(encoder, dataset, cache=tmp_path)
    calls = encoder.calls[0]
    _linear(encoder, dataset, cache=tmp_path)
    assert encoder.calls[0] == calls == 2


def test_classes_without_names(encoder, dataset, tmp_path: Path) -> None:
    unnamed = replace(dataset, meta=dataset.meta | {"class_names": []})
    assert _knn(encoder, unnamed, out=tmp_path)["num_classes"] == 3
    assert (tmp_path / "confusion.csv").read_text().splitlines()[1].startswith("class 0,")


def test_top5_counts_ranked_classes(encoder, dataset) -> None:
    # 3 classes in training: every test clip of them is among the first five
    split = SimpleNamespace(train=np.arange(3), test=np.arange(3, 17))
    assert _knn(encoder, dataset, split=split, k=3)["top5"] == 1.0


@pytest.mark.parametrize("evaluate", [_knn, _linear], ids=["knn", "linear"])
def test_empty_parts_are_refused(evaluate, encoder, dataset) -> None:
    nothing = np.array([], dtype=np.int64)
    with pytest.raises(ValueError, match="the train split of in-memory must have labelled clips, got 0 clips"):
        evaluate(encoder, dataset, split=SimpleNamespace(train=nothing, test=SPLIT.test))
    with pytest.raises(ValueError, match="the test split of in-memory must have labelled clips, got 0 clips"):
        evaluate(encoder, dataset, split=SimpleNamespace(train=SPLIT.train, test=nothing))
    unknown = replace(dataset, labels=np.where(np.arange(17) < 9, dataset.labels, -1))
    with pytest.raises(
        ValueError, match="test split of in-memory must have labelled clips, got 8 clips, none labelled"
    ):
        evaluate(encoder, unknown)
    assert encoder.calls[0] <= 3


def test_too_many_neighbours(encoder, dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.9"):
        _knn(encoder, dataset, out=tmp_path / "out", k=10)
    assert not (tmp_path / "out").exists()


def test_packed_data_and_a_real_encoder(tmp_path: Path) -> None:
    dataset = make_synthetic(tmp_path / "packed", num_clips=24, num_classes=3, num_subjects=4)
    view = eval_view(frames=16)
    torch.manual_seed(0)
    build = ENCODERS["usdrl-dste"]
    encoder = build(num_joints=25, num_bodies=1, num_frames=16, num_channels=3, width=32)
    parts = split(dataset, "xsub")
    out, cache = tmp_path / "out", tmp_path / "cache"
    options = {"protocol": "xsub", "progress": False, "num_threads": 2}
    results = []
    for number in range(2):
        evaluation = Evaluation(encoder, dataset, parts, view, cache=cache, batch_size=5 + number, **options)
        result = evaluate_knn(evaluation, out)
        assert (result["num_train"], result["num_test"]) == (len(parts.train), len(parts.test))
        assert result["num_features"] == 64
        assert len(list(cache.iterdir())) == 2
        results.append(result)
    assert results[0] == results[1]
    # an untrained encoder promises no accuracy: only that these are the neighbours of its features
    train, test = Evaluation(encoder, dataset, parts, view, progress=False).features()
    predictions = knn_predict(train.features, train.labels, test.features)
    assert result["top1"] == accuracy(predictions, test.labels)
    raw = evaluate_linear(Evaluation(None, dataset, parts, view, **options), config=CONFIG)
    assert raw["num_features"] == 16 * 25 * 3


def test_settings_without_weights_are_part_of_the_key(dataset) -> None:
    sizes = {"num_joints": 25, "num_bodies": 1, "num_frames": 6, "num_channels": 3, "width": 8}
    build = ENCODERS["usdrl-dste"]
    encoders = [build(**sizes, **change) for change in ({}, {}, {"alpha": 0.3}, {"num_heads": 2}, {"gap": 2})]
    for encoder in encoders[1:]:
        encoder.load_state_dict(encoders[0].state_dict())
    keys = [feature_key(encoder, dataset, VIEW, np.arange(3)) for encoder in encoders]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4
