"""`fastskel evaluate finetune | transfer | early` through `main`, on an untrained encoder's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastskel import evaluate
from fastskel.cli import main
from fastskel.cli_evaluate.options import EvaluateOptions, prepare
from fastskel.cli_evaluate.trained import source_of
from fastskel.data import make_synthetic, open_dataset, pack_arrays
from fastskel.data.convert import convert_dataset
from fastskel.data.identity import described_data
from fastskel.data.views import eval_view
from fastskel.evaluate import Classifier, Evaluation, FinetuneConfig, adapt, class_scores, fine_tune, load_classifier
from fastskel.models import DSTE
from fastskel.train.checkpoint import save_checkpoint, weights

QUICK = ["--epochs", "2", "--batch-size", "8", "--warmup-epochs", "0", "--quiet"]
TUNED = FinetuneConfig(epochs=1, batch_size=8, warmup_epochs=0)
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
    assert capsys.readouterr().err.splitlines()[-1] == f"interrupted{how}"


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


def fitted(run: str, data: str, **options) -> tuple[Evaluation, dict]:
    """What `evaluate transfer RUN DATA` evaluates, and what it says of it."""
    evaluation, _ = prepare("transfer", Path(run), Path(data), EvaluateOptions(protocol="xsub", quiet=True, device="cpu"))
    return adapt(evaluation, source=source_of(Path(run)), **options)


def in_unit(folder: Path, units: str, factor: float, up_axis: str = "y") -> None:
    """The clips of `data` in another unit."""
    given = open_dataset("data")
    pack_arrays(
        [factor * given.clip(number) for number in range(len(given))], out=folder, topology=given.topology, units=units,
        labels=given.labels, class_names=given.class_names, up_axis=up_axis, num_frames="all",
        splits={name: {part: index.tolist() for part, index in parts.items()} for name, parts in given.splits.items()},
    )  # fmt: skip


def test_what_was_adapted_reads_the_data_it_was_adapted_to(here, capsys) -> None:
    in_unit(here / "feet", "feet", 3.28, "z")
    first, told = fitted("run", "feet")
    assert told["scale"] != 1 and told["up_axis"] == "z for y"
    made = fine_tune(first, TUNED, out="first")
    again, told = fitted("first", "feet")
    assert (told["scale"], told["up_axis"]) == (1.0, "z for z")
    scores = class_scores(Classifier(again.encoder, 3), again.dataset, again.view, made.test)
    assert torch.equal(scores, class_scores(Classifier(made.classifier.encoder, 3), first.dataset, first.view, made.test))
    # other data are turned and scaled to those, and what is fine-tuned on them can be kept
    with pytest.raises(ValueError, match="scale must be given for data in metres and an encoder of clips in feet, got none"):
        fitted("first", "data")
    other, _ = fitted("first", "data", scale=3.28)
    fine_tune(other, TUNED, out="second")
    second, scale = load_classifier("second")[0].encoder, made.classifier.encoder.matrix[0][0]
    assert np.allclose(second.matrix, 3.28 * scale * np.eye(3), atol=1e-6)
    # an older version did not say what the encoder reads
    forget("first")
    with pytest.raises(ValueError, match="source must say units and up_axis of the data that the encoder was adapted to"):
        fitted("first", "feet")
    assert "warning: nothing is recorded of the data that first was trained on" in capsys.readouterr().err


def forget(folder: str) -> None:
    """Make the checkpoint of a fine-tuning one of an older version."""
    path = next(Path(folder, "checkpoints").glob("*/state.json"))
    state = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in state.items() if key not in ("described", "checksums")}))


def test_units_are_those_of_the_last_training(here, capsys) -> None:
    in_unit(here / "mm", "millimetres", 1000)
    record = {"data": "gone", "described": described_data(open_dataset("mm")), "identity": {"data": "0", "indices": None}}
    Path("run/config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="scale must be given for data in metres and an encoder of clips in millimetres"):
        fitted("run", "data")
    fine_tune(fitted("run", "mm")[0], TUNED, out="tuned")
    assert fitted("tuned", "mm")[1]["scale"] == 1.0 and capsys.readouterr().err == ""
    forget("tuned")
    assert fitted("tuned", "mm")[1]["scale"] != 1.0
    assert "nothing is recorded of the data that tuned was trained on; their units are taken for m" in capsys.readouterr().err


def test_early(here, capsys) -> None:
    command = ["evaluate", "early", "run", "data", "--protocol", "xsub", "--ratios", "0.3", "1.0"]
    assert main([*command, "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16] for line in lines[:2]] == ["observed  30.0 %", "observed 100.0 %"] and lines[2].startswith("area ")
    assert main([*command, "--causal", "--fine-tune", *QUICK]) == 0
    results = json.loads(Path(f"run/early-xsub-data-causal-fine-tuned-ratios0.3-1-{SHOWN}/results.json").read_text())
    assert (results["scheme"], [row["ratio"] for row in results["curve"]]) == ("causal", [0.3, 1.0])
    assert "train_full must be False with causal" in refused(capsys, *command, "--causal", "--train-full", "--quiet")
