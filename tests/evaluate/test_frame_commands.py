"""What `detect` and `segment` are asked for on the command line, and what they say first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastskel.cli import main
from fastskel.data.convert import convert_dataset
from fastskel.data.views import eval_view
from fastskel.evaluate import FinetuneConfig, Windows
from fastskel.models import DSTE
from fastskel.train.checkpoint import save_checkpoint, weights

TASKS_PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"
PUBLISHED = (
    "--epochs 150 --batch-size 512 --optimizer sgd --learning-rate 0.005 --layer-decay 1 --weight-decay 0 --warmup-epochs 0 "
    "--schedule step --label-smoothing 0 --drop-path 0 --start random --overlap 0"
)
# what computes first
FIRST = {"detect": "detection.predict_frames", "segment": "segmentation.predict_frames", "transfer": "transfer.evaluate_knn"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained encoder's checkpoint in the folder `run`, here."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    encoder = DSTE(num_joints=25, num_bodies=1, num_frames=8, width=8)
    state = {
        "encoder": {"name": "usdrl-dste", "config": encoder.config}, "eval_view": eval_view(8, normalise="center"),
        "topology": "ntu-25",
    }  # fmt: skip
    save_checkpoint(tmp_path / "run" / "checkpoints", 1, weights({"encoder": encoder}), state)


@pytest.fixture
def asked(untrimmed, run, monkeypatch):
    """Ask for a fine-tuning for detection with options, and return its settings, windows and folder."""
    found = []

    def evaluate(evaluation, out, **options):
        found.append((options["finetune_config"], options["config"].windows, out.name))
        raise ValueError("enough")

    def ask(*options: str) -> tuple[FinetuneConfig, Windows, str]:
        command = ["evaluate", "detect", "run", str(untrimmed.path), "--leave-one-out", "subject", "--fine-tune", "--quiet"]
        assert main([*command, *options]) == 2
        return found.pop()

    monkeypatch.setattr("fastskel.evaluate.evaluate_detection", evaluate)
    return ask


def test_what_is_not_said_is_as_usual_for_a_fine_tuning(asked) -> None:
    usual, _, name = asked()
    assert usual == FinetuneConfig() and name.endswith("-linear-fine-tuned")
    for option, field, value in (("--weight-decay", "weight_decay", 0.0), ("--epochs", "epochs", 50)):
        tuning, _, name = asked(option, f"{value:g}")
        assert tuning == replace(FinetuneConfig(), **{field: value}) and name.endswith(f"-linear-{field}{value:g}-fine-tuned")


def test_the_published_settings_can_be_asked_for(asked) -> None:
    tuning, windows, name = asked(*PUBLISHED.split())
    # as the documentation of FinetuneConfig has it
    published = FinetuneConfig(
        epochs=150, batch_size=512, optimizer="sgd", learning_rate=0.005, layer_decay=1.0, weight_decay=0.0, warmup_epochs=0,
        schedule="step", milestones=(), label_smoothing=0.0, drop_path=0.0, start="random",
    )  # fmt: skip
    assert tuning == published and {published.rate(step, 7) for step in range(150 * 7)} == {0.005}
    # of 64 frames, as many as a view has there, one behind the other
    assert windows == Windows(overlap=0.0)
    assert PUBLISHED in " ".join(TASKS_PAGE.read_text().split())
    assert name.startswith("detect-leave-one-subject-out-packed-linear-epochs150-lr0.005-weight_decay0-overlap0-fine-tuned-")


@pytest.mark.parametrize("task", ["detect", "segment", "transfer"])
def test_what_is_adapted_is_said_first(task: str, untrimmed, run, monkeypatch, capsys) -> None:
    convert_dataset(replace(untrimmed, labels=np.arange(8) % 2), "kinect-20-utd", "other")
    Path("halves.json").write_text(json.dumps({"train": [0, 1, 2, 3], "test": [4, 5, 6, 7]}))

    def stop(*given, **options):
        said.append(capsys.readouterr().out)
        raise ValueError("enough")

    said = []
    monkeypatch.setattr(f"fastskel.evaluate.{FIRST[task]}", stop)
    command = ["evaluate", task, "run", "other", "--split-file", "halves.json", "--quiet"]
    assert main([*command, *([] if task == "transfer" else ["--adapt"])]) == 2
    assert said[0].startswith("skeleton kinect-20-utd for ntu-25, bodies 1 for 1") and capsys.readouterr().out == ""
