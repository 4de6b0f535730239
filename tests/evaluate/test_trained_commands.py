"""`fastskel evaluate finetune | transfer | early` through `main`, on an untrained encoder's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastskel import evaluate
from fastskel.cli import main
from fastskel.data import make_synthetic
from fastskel.data.convert import convert_dataset
from fastskel.data.views import eval_view
from fastskel.evaluate import load_classifier
from fastskel.models import DSTE
from fastskel.train.checkpoint import save_checkpoint, weights

QUICK = ["--epochs", "2", "--batch-size", "8", "--warmup-epochs", "0", "--quiet"]
# as they show in the names of folders
SHOWN = "epochs2-batch_size8-warmup_epochs0"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the packed data sets `data` and `other`, of another skeleton, and an encoder's checkpoint in `run`."""
    monkeypatch.chdir(tmp_path)
    dataset = make_synthetic(tmp_path / "data", num_clips=24, num_classes=3, num_subjects=4)
    convert_dataset(dataset, "kinect-20-utd", tmp_path / "other")
    torch.manual_seed(0)
    encoder = DSTE(num_joints=25, num_bodies=1, num_frames=8, width=8)
    state = {
        "encoder": {"name": "usdrl-dste", "config": encoder.config}, "eval_view": eval_view(8, normalise="center"),
        "topology": "ntu-25",
    }  # fmt: skip
    save_checkpoint(tmp_path / "run" / "checkpoints", 1, weights({"encoder": encoder}), state)
    return tmp_path


def refused(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


def test_finetune(here, capsys) -> None:
    command = ["evaluate", "finetune", "run", "data", "--protocol", "xsub", *QUICK]
    assert main(command) == 0
    output = capsys.readouterr()
    assert output.out.startswith("top1 ") and f"run/finetune-xsub-data-{SHOWN})" in output.out and output.err == ""
    folder = f"run/finetune-xsub-data-{SHOWN}"
    results = json.loads(Path(folder, "results.json").read_text())
    assert results["config"]["epochs"] == 2 and len(results["history"]) == 2
    assert load_classifier(folder)[2] == results_names(results, folder)
    assert "with a fine-tuning. Resume it" in refused(capsys, *command)
    assert main([*command, "--resume"]) == 0
    # what was fine-tuned is a run for other evaluations
    assert main(["evaluate", "knn", folder, "data", "--protocol", "xsub", "--quiet"]) == 0


@pytest.mark.parametrize(
    "task, more, how",
    [
        ("finetune", [], "; it goes on with --resume"),
        ("transfer", ["--fine-tune"], "; it goes on with --resume"),
        ("early", [], ""),
    ],
)
def test_an_interrupted_fine_tuning_says_how_to_go_on(here, capsys, monkeypatch, task, more, how) -> None:
    def stop(*given, **options) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, f"evaluate_{task}", stop)
    assert main(["evaluate", task, "run", "data", "--protocol", "xsub", "--quiet", *more]) == 130
    assert capsys.readouterr().err == f"interrupted{how}\n"


def test_labels_that_a_fine_tuning_saw_are_not_tested(here, capsys) -> None:
    for name, parts in (("one", (range(12), range(12, 24))), ("turned", (range(12, 24), range(12)))):
        Path(f"{name}.json").write_text(json.dumps({"train": list(parts[0]), "test": list(parts[1])}))
    assert main(["evaluate", "finetune", "run", "data", "--split-file", "one.json", *QUICK]) == 0
    command = ["evaluate", "knn", f"run/finetune-one-data-{SHOWN}", "data", "--quiet", "--split-file"]
    assert main([*command, "one.json"]) == 0
    assert "must not have seen labels of the test part, got 12 of 12 clips" in refused(capsys, *command, "turned.json")


def test_what_was_fine_tuned_on_scaled_clips_reads_scaled_clips(here) -> None:
    command = ["evaluate", "transfer", "run", "data", "--protocol", "xsub", "--fine-tune", "--scale", "0.01", "--out", "there"]
    assert main([*command, *QUICK]) == 0
    tuned = ["there/finetune", "data", "--protocol", "xsub", "--quiet", "--out"]
    assert main(["evaluate", "knn", *tuned, "neighbours"]) == 0
    assert json.loads(Path("neighbours/results.json").read_text())["encoder"] == "AdaptedEncoder"


def results_names(results, folder: str) -> list[str]:
    rows = Path(folder, "confusion.csv").read_text().splitlines()
    assert len(rows) == 1 + results["num_classes"]
    return [row.split(",")[0] for row in rows[1:]]


def test_transfer(here, capsys) -> None:
    error = refused(capsys, "evaluate", "knn", "run", "other", "--protocol", "xsub", "--quiet")
    assert "got skeleton ntu-25 for kinect-20-utd" in error and "Use evaluate transfer" in error
    assert main(["evaluate", "transfer", "run", "other", "--protocol", "xsub", "--fine-tune", *QUICK]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "skeleton kinect-20-utd for ntu-25, bodies 1 for 1, scale 1, upwards y for y"
    assert lines[1].startswith("joints that the data do not have: ")
    assert [line.split()[0] for line in lines[2:5]] == ["knn", "linear", "finetune"]
    results = json.loads(Path(f"run/transfer-xsub-other-fine-tuned-{SHOWN}/results.json").read_text())
    assert {"knn", "linear", "finetune", "adaptation", "source"} <= set(results)
    error = refused(capsys, "evaluate", "transfer", "run", "other", "--protocol", "xsub", "--trained-on", "ntu-25", "--quiet")
    assert "trained_on must be left out, run records its skeleton" in error


def test_transfer_says_what_it_cannot_know(here, capsys) -> None:
    command = ["evaluate", "transfer", "run", "other", "--protocol", "xsub", "--quiet"]
    record = {"data": "data", "identity": {"data": "0", "indices": None}}
    Path("run/config.json").write_text(json.dumps(record))
    assert main(command) == 0
    assert capsys.readouterr().err == ""
    Path("run/config.json").write_text(json.dumps({**record, "data": "gone"}))
    assert main(command) == 0
    assert "data that run was trained on are not at gone any more; their units are taken for metres" in capsys.readouterr().err


def test_early(here, capsys) -> None:
    command = ["evaluate", "early", "run", "data", "--protocol", "xsub", "--ratios", "0.3", "1.0"]
    assert main([*command, "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16] for line in lines[:2]] == ["observed  30.0 %", "observed 100.0 %"] and lines[2].startswith("area ")
    assert main([*command, "--causal", "--fine-tune", *QUICK]) == 0
    results = json.loads(Path(f"run/early-xsub-data-causal-fine-tuned-ratios0.3-1-{SHOWN}/results.json").read_text())
    assert (results["scheme"], [row["ratio"] for row in results["curve"]]) == ("causal", [0.3, 1.0])
    assert "train_full must be False with causal" in refused(capsys, *command, "--causal", "--train-full", "--quiet")
