"""Files of results: content, refusals, and pictures that exist and are not blank."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastskel.evaluate import report


def _colours(path: Path) -> int:
    return len(np.unique(np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3), axis=0))


@pytest.mark.parametrize("num_classes", [1, 3, 31, 155], ids=str)
def test_confusion_picture(num_classes: int, tmp_path: Path) -> None:
    counts = torch.randint(0, 9, (num_classes, num_classes), generator=torch.Generator().manual_seed(0))
    counts[0] = 0  # a class that does not occur has no share
    names = [f"a rather long name of the action {number}" for number in range(num_classes)]
    report.confusion_figure(tmp_path / "confusion.png", counts, names, "title")
    assert _colours(tmp_path / "confusion.png") > 10
    assert list(tmp_path.iterdir()) == [tmp_path / "confusion.png"]


def test_confusion_csv_keeps_odd_names(tmp_path: Path) -> None:
    names = ['say "hi", twice', "line\nbreak", "müde"]
    report.confusion_csv(tmp_path / "c.csv", torch.arange(9).reshape(3, 3), names)
    with open(tmp_path / "c.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["true \\ predicted", *names]
    assert rows[3] == ["müde", "6", "7", "8"]


def test_results_of_tensors_and_arrays(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    report.write_results(path, {"a": torch.tensor([1, 2]), "b": np.float32(0.5), "c": Path("x"), "d": None})
    assert json.loads(path.read_text()) == {"a": [1, 2], "b": 0.5, "c": "x", "d": None}
    for value, message in [(float("nan"), "plain values"), (object(), "got a object")]:
        with pytest.raises(ValueError, match=message):
            report.write_results(path, {"a": value})
    assert json.loads(path.read_text())["a"] == [1, 2]


@pytest.mark.parametrize("num, width", [(1, 1), (1, 5), (5, 1), (40, 7), (7, 40)], ids=str)
def test_projection_is_the_principal_components(num: int, width: int) -> None:
    rows = torch.randn(num, width, generator=torch.Generator().manual_seed(2)) + 3
    points, shares = report.project_2d(rows)
    centred = rows.double() - rows.double().mean(0)
    left, scale, _ = torch.linalg.svd(centred, full_matrices=False)
    expected = torch.zeros(num, 2, dtype=torch.float64)
    count = min(2, len(scale))
    expected[:, :count] = left[:, :count] * scale[:count]
    # squaring in the Gram matrix leaves the root of the rounding
    torch.testing.assert_close(points.abs(), expected.abs(), atol=1e-6, rtol=1e-6)
    assert (points.gather(0, points.abs().argmax(0, keepdim=True)) >= 0).all()
    assert 0 <= shares[1] <= shares[0] <= 1 + 1e-12


@pytest.mark.parametrize("num_classes", [2, 12, 27, 60], ids=str)
def test_embedding_picture(num_classes: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % num_classes
    rows = torch.randn(num_classes, 9, generator=generator)[labels] + 0.2 * torch.randn(200, 9, generator=generator)
    labels[::11] = -1
    names = [f"class {number}" for number in range(num_classes)]
    path = tmp_path / "embedding.png"
    report.embedding_figure(path, {"raw": (rows, labels), "pretrained": (rows[:50] * 2, labels[:50])}, names, "title")
    assert _colours(path) > num_classes


def _write_log(path: Path, rows: list[dict[str, object]], tail: str = "") -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def test_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    rows: list[dict[str, object]] = [{"event": "start"}]
    rows += [
        {"step": step, "loss": 1.0 / (step + 1), "terms": {"sim": step}, "text": "x", "flag": True} for step in range(4)
    ]
    rows += [{"step": 2, "loss": 9.0}, {"step": 4, "loss": float("nan")}]
    _write_log(log, rows, '{"step": 5, "lo')
    curves = report.read_log(log)
    assert set(curves) == {"loss", "terms/sim"}
    steps, values = curves["loss"]
    # step 2 was logged again after a resume; what is not a number has no place in a curve
    assert steps.tolist() == [0, 1, 2, 3]
    assert values.tolist() == [1.0, 0.5, 9.0, 0.25]
    _write_log(log, [{"step": 1, "loss": 1.0}], 'broken\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*log.jsonl must be JSON, got 'broken'"):
        report.read_log(log)


def test_curves_picture(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    _write_log(
        log,
        [
            {
                "step": step,
                "loss": 5 / (step + 1),
                "terms": {"similarity": 1 / (step + 1), "vac": 2.0},
                "learning_rate": 1e-3,
            }
            for step in range(120)
        ],
    )
    report.curves_figure(tmp_path / "curves.png", log, "title")
    assert _colours(tmp_path / "curves.png") > 10
    # as a training run logs: terms beside the loss, monitors at steps of their own
    flat = [{"step": s, "epoch": 0, "lr": 1e-3, "embedding_std": 0.3, "loss": 1.0, "vac_t": 2.0} for s in range(30)]
    _write_log(log, [*flat, {"step": 30, "knn_top1": 0.5}])
    report.curves_figure(tmp_path / "curves.png", log)
    assert _colours(tmp_path / "curves.png") > 10
    _write_log(log, [{"step": 0, "loss": -1.0}])
    report.curves_figure(tmp_path / "curves.png", log)
    _write_log(log, [{"step": 0, "other": 1.0}])
    with pytest.raises(ValueError, match=r"must log a loss, got \['other'\]"):
        report.curves_figure(tmp_path / "curves.png", log)


def test_errors(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    with pytest.raises(ValueError, match="class_names must have 2 entries, got 1"):
        report.confusion_figure(path, torch.zeros(2, 2), ["a"])
    with pytest.raises(ValueError, match=r"confusion must be \(K, K\), got \(2, 3\)"):
        report.confusion_csv(path, torch.zeros(2, 3), ["a", "b"])
    with pytest.raises(ValueError, match="features must name an encoder, got none"):
        report.embedding_figure(path, {}, ["a"])
    with pytest.raises(ValueError, match="labels of 'one' must be one of 2 classes per row"):
        report.embedding_figure(path, {"one": (torch.zeros(2, 3), torch.tensor([0, 2]))}, ["a", "b"])
    with pytest.raises(ValueError, match="features must be finite, got nan or inf in row 1"):
        report.project_2d(torch.tensor([[0.0], [float("nan")]]))
    with pytest.raises(ValueError, match=r"features must be \(N, F\)"):
        report.project_2d(torch.zeros(0, 3))
    assert list(tmp_path.iterdir()) == []
