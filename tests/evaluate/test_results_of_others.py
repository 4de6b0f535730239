"""Results of other files, data or runs that go by the same name are not overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastskel.cli import main
from fastskel.data import make_synthetic
from fastskel.data.views import eval_view
from fastskel.models import DSTE
from fastskel.train.checkpoint import save_checkpoint, weights


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with packed data in `data` and checkpoints of untrained encoders in `run`, `one/bone` and `two/bone`."""
    monkeypatch.chdir(tmp_path)
    make_synthetic(tmp_path / "data", num_clips=24, num_classes=4, num_subjects=4)
    for name in ("one", "two"):
        Path(name).mkdir()
    for number, name in enumerate(("run", "one/bone", "two/bone")):
        torch.manual_seed(number)
        encoder = DSTE(num_joints=25, num_bodies=1, num_frames=8, width=8)
        state = {
            "encoder": {"name": "usdrl-dste", "config": encoder.config}, "eval_view": eval_view(8, normalise="center"),
            "topology": "ntu-25",
        }  # fmt: skip
        save_checkpoint(tmp_path / name / "checkpoints", 1, weights({"encoder": encoder}), state)
    return tmp_path


def ask(task: str, *words: str) -> int:
    return main(["evaluate", task, *words, "--quiet"])


def refused(capsys, what: str, file: str) -> None:
    assert f"{file} must be of the same {what}, got results of another one of that name" in capsys.readouterr().err


def test_damaged_results_are_made_again(here: Path) -> None:
    file = Path("run/knn-xsub-data/results.json")
    file.parent.mkdir()
    file.write_text('{"task": ')
    assert ask("knn", "run", "data", "--protocol", "xsub") == 0
    assert json.loads(file.read_text())["task"] == "knn"


def test_a_split_file_of_the_same_name(here: Path, capsys) -> None:
    parts = {"one": (range(6), range(6, 12)), "two": (range(6, 12), range(6))}
    for folder, (train, test) in parts.items():
        Path(folder, "halves.json").write_text(json.dumps({"train": list(train), "test": list(test)}))
    assert ask("knn", "run", "data", "--split-file", "one/halves.json") == 0
    file = Path("run/knn-halves-data/results.json")
    first = file.read_text()
    assert ask("knn", "run", "data", "--split-file", "two/halves.json") == 2
    refused(capsys, "split", str(file))
    assert file.read_text() == first
    # it is the clips that count
    Path("one/halves.json").write_text(json.dumps({"test": list(range(6, 12)), "train": list(range(6))}, indent=1))
    assert ask("knn", "run", "data", "--split-file", "one/halves.json") == 0
    assert ask("knn", "run", "data", "--split-file", "two/halves.json", "--out", "there") == 0
    # where a folder is named it is overwritten, and so are results that do not say what they are of
    assert ask("knn", "run", "data", "--split-file", "one/halves.json", "--out", "there") == 0
    old = json.loads(first)
    del old["split_sha256"]
    file.write_text(json.dumps(old))
    assert ask("knn", "run", "data", "--split-file", "two/halves.json") == 0


def test_data_of_the_same_name(here: Path, capsys) -> None:
    make_synthetic(here / "one" / "data", num_clips=12, num_classes=3, num_subjects=4, seed=1)
    assert ask("knn", "run", "data", "--protocol", "xsub") == 0
    assert ask("knn", "run", "one/data", "--protocol", "xsub") == 2
    refused(capsys, "data", "run/knn-xsub-data/results.json")
    assert ask("knn", "run", str(here / "data"), "--protocol", "xsub") == 0


def test_embeddings_of_the_same_name(here: Path, capsys) -> None:
    names = json.loads(Path("data/meta.json").read_text())["class_names"]
    for folder, turn in (("one", 0), ("two", 1)):
        rows = {name: [float((number + turn) % 4 == place) for place in range(4)] for number, name in enumerate(names)}
        Path(folder, "words.json").write_text(json.dumps(rows))
    command = ["run", "data", "--protocol", "xsub", "--unseen", *names[:2], "--penalty", "0.1", "--embeddings"]
    assert [ask("zeroshot", *command, f"{folder}/words.json") for folder in ("one", "one", "two")] == [0, 0, 2]
    (folder,) = Path("run").glob("zeroshot-*")
    refused(capsys, "embeddings", f"{folder}/results.json")


def test_runs_of_the_same_name(here: Path, capsys) -> None:
    command = ["data", "--protocol", "xsub", "--epochs", "2"]
    assert ask("fusion", "run", "one/bone", *command) == 0
    assert ask("fusion", "run", "two/bone", *command) == 2
    refused(capsys, "run", "run/fusion-xsub-data-with-bone-epochs2/results.json")
    # by another path; what lies in a run that is not the first is left alone
    theirs = Path("one/bone/fusion-xsub-data-with-bone-epochs2/results.json")
    theirs.parent.mkdir()
    theirs.write_text('{"run": ["x"], "dataset": {"sha256": "y"}}')
    assert ask("fusion", str(here / "run"), "one/bone", *command) == 0
