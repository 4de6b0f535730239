"""What an encoder has seen, through copies of the data and chains of trainings: labels that it saw are never tested."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastskel.cli import main
from fastskel.cli_evaluate import trained
from fastskel.data import PackedDataset, open_dataset, pack_arrays
from fastskel.data.convert import convert_dataset
from fastskel.data.identity import dataset_identity, described_data
from fastskel.data.views import eval_view
from fastskel.evaluate import LinearConfig
from fastskel.evaluate.seen import SeenClips, clips_seen, handed_on, labels_seen, seen_by
from fastskel.models import DSTE
from fastskel.skeleton import topology
from fastskel.train import load_encoder
from fastskel.train.checkpoint import save_checkpoint, weights

NUM = 16
ALL = np.arange(NUM)
QUICK = ["--epochs", "1", "--warmup-epochs", "0", "--batch-size", "16", "--start", "random", "--quiet", "--device", "cpu"]
TUNE = ["--fine-tune", *QUICK]
HEAD = ["--epochs", "1", "--quiet", "--device", "cpu"]
PLAIN = ["--quiet", "--device", "cpu"]
SPLITS = {
    "first": (range(8), range(8, 16)), "turned": (range(8, 16), range(8)), "early": (range(4), range(12, 16)),
    "late": (range(4, 8), range(12, 16)), "back": (range(8, 12), range(4)),
}  # fmt: skip


def pack(folder: Path, skeleton: str = "ntu-25", source: str = "custom", **options) -> PackedDataset:
    """Sixteen clips of four subjects and four classes; a segment says the class too."""
    draw, joints = np.random.default_rng(0), topology(skeleton).num_joints
    labels = ALL % 4
    settings = {
        "topology": skeleton, "labels": labels, "class_names": ["sit", "wave", "kick", "bow"], "source": source,
        "columns": {"subject": ALL // 4}, "segments": [(number, label, 3, 9) for number, label in enumerate(labels)], **options,
    }  # fmt: skip
    return pack_arrays([draw.normal(size=(12, 1, joints, 3)).astype(np.float32) for _ in ALL], out=folder, **settings)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The data set `data`, `other` of other joints, splits of both, an encoder's checkpoint in `run`."""
    folder = tmp_path_factory.mktemp("seen")
    pack(folder / "data")
    pack(folder / "other", "kinect-20-utd", "elsewhere", names=[f"other{number}" for number in ALL])
    for name, (train, test) in SPLITS.items():
        (folder / f"{name}.json").write_text(json.dumps({"train": list(train), "test": list(test)}))
    torch.manual_seed(0)
    encoder = DSTE(num_joints=25, num_bodies=1, num_frames=8, width=8)
    state = {
        "encoder": {"name": "usdrl-dste", "config": encoder.config}, "eval_view": eval_view(8, normalise="center"),
        "topology": "ntu-25", "data": described_data(open_dataset(folder / "data")),
    }  # fmt: skip
    save_checkpoint(folder / "run" / "checkpoints", 1, weights({"encoder": encoder}), state)
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    # what is chosen for a probe is no matter here
    monkeypatch.setattr(trained, "_probe", lambda seed: LinearConfig(epochs=2, learning_rate=0.1, milestones=()))
    return place


def evaluate(*arguments: str) -> None:
    assert main(["evaluate", *arguments]) == 0


def refused(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["evaluate", *arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def tuned(place: Path) -> str:
    """Fine-tuned on the first half of `data`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        evaluate("finetune", "run", "data", "--split-file", "first.json", *QUICK, "--out", "tuned")
    return "tuned"


def test_a_fold_is_not_tested_on_what_it_was_trained_on(here, capsys) -> None:
    evaluate("segment", "run", "data", "--leave-one-out", "subject", *TUNE, "--out", "folds")
    for fold in ("0-subject-0", "3-subject-3"):
        error = refused(capsys, "segment", f"folds/folds/{fold}", "data", "--leave-one-out", "subject", *HEAD)
        assert "must not have seen labels of the test part, got 12 of 16 clips" in error
    # the subject that it left out
    Path("own.json").write_text(json.dumps({"train": list(range(4, 16)), "test": list(range(4))}))
    evaluate("segment", "folds/folds/0-subject-0", "data", "--split-file", "own.json", *HEAD)


@pytest.mark.parametrize(
    "task, data, more, folder, again",
    [
        ("transfer", "other", [], "finetune", ["transfer"]),
        ("segment", "other", ["--adapt"], "folds/0-first", ["detect", "--adapt"]),
        ("early", "data", ["--ratios", "0.5", "1"], "ratio-50", ["knn"]),
    ],
)
def test_a_copy_is_the_data_that_it_was_made_of(here, capsys, task, data, more, folder, again) -> None:
    evaluate(task, "run", data, "--split-file", "first.json", *more, *TUNE, "--out", f"{task}-copy")
    command = [again[0], f"{task}-copy/{folder}", data, *again[1:], *PLAIN, "--split-file"]
    assert "labels of the test part, got 8 of 8 clips" in refused(capsys, *command, "turned.json")
    evaluate(*command, "first.json")


def test_what_was_seen_is_handed_on(here, capsys) -> None:
    evaluate("finetune", "run", "data", "--split-file", "early.json", *QUICK, "--out", "one")
    evaluate("finetune", "one", "data", "--split-file", "late.json", *QUICK, "--out", "two")
    error = refused(capsys, "knn", "two", "data", "--split-file", "back.json", *PLAIN)
    assert "labels of the test part, got 4 of 4 clips" in error
    evaluate("transfer", "two", "other", "--split-file", "first.json", *TUNE, "--out", "three")
    names = {part["source"]: part["labelled"] for part in load_encoder("three/finetune")[2].state["seen"] if part["data"]}
    assert names == {
        "custom": open_dataset("data").names[:8].tolist(), "elsewhere": sorted(open_dataset("other").names[:8].tolist())
    }
    error = refused(capsys, "knn", "three/finetune", "data", "--split-file", "back.json", *PLAIN)
    assert "labels of the test part, got 4 of 4 clips" in error


def test_every_clip_that_is_judged_counts(here, tuned, capsys) -> None:
    np.save("words.npy", np.eye(4))
    settings = ["data", "--split-file", "first.json", *PLAIN]
    error = refused(capsys, "cluster", tuned, *settings, "--part", "all")
    assert "labels of clips that are clustered, got 8 of 8 clips" in error and error.endswith("Cluster the test part.")
    error = refused(capsys, "oneshot", tuned, *settings, "--novel", "wave", "kick")
    assert "labels of the novel classes, got 4 of 8 clips" in error
    words = ["--embeddings", "words.npy", "--penalty", "1"]
    error = refused(capsys, "zeroshot", tuned, *settings, *words, "--unseen", "wave", "kick")
    assert "labels of the unseen classes, got 4 of 8 clips" in error
    error = refused(capsys, "semi", tuned, *settings, "--fractions", "0.5")
    assert "labels of the part that few labels are drawn from, got 8 of 8 clips" in error
    evaluate("cluster", tuned, *settings)
    # an encoder without labels may be judged by all
    evaluate("oneshot", "run", *settings, "--novel", "wave", "kick")


def test_what_cannot_be_known_is_said(here, tuned, capsys) -> None:
    # other data of a user's own, whose clips have the same names
    pack(here / "namesake", "ntu-25", labels=ALL // 4)
    capsys.readouterr()
    evaluate("knn", tuned, "namesake", "--split-file", "turned.json", *PLAIN, "--out", "doubt")
    said = capsys.readouterr().err
    assert "warning: whether the encoder saw labels of the test clips is not known: 8 of 8 clips have names of clips" in said
    results = json.loads(Path("doubt/results.json").read_text())
    assert "8 of 8 clips have names" in results["test_labels_not_known"]
    evaluate("knn", tuned, "data", "--split-file", "first.json", *PLAIN, "--out", "sure")
    assert capsys.readouterr().err == "" and json.loads(Path("sure/results.json").read_text())["test_labels_not_known"] is None


def test_records_of_older_versions_are_judged_as_before(here, tuned, capsys) -> None:
    dataset, other = open_dataset("data"), open_dataset("other")
    told = {"identity": {"data": dataset_identity(dataset)}, "labelled_clips": [0, 3], "unlabelled_clips": [5]}
    seen = seen_by(Path("run"), told, dataset)
    assert labels_seen(seen, dataset, ALL)[0].tolist() == [0, 3] and clips_seen(seen, dataset).tolist() == [5]
    unknown = seen_by(Path("run"), told, other)
    found, doubts = labels_seen(unknown, other, ALL)
    assert not len(found) and clips_seen(unknown, other) is None
    assert doubts == ["it was fine-tuned on labels of other data, by a version that did not record the clips' names"]
    assert clips_seen(seen_by(Path("run"), {**told, "unlabelled_clips": None}, dataset), dataset) is None
    # what they did not say stays open in trainings that go on from them
    later = handed_on(unknown, other, np.array([2]), None)
    assert labels_seen(seen_by(Path("run"), {"seen": later}, dataset), dataset, ALL)[1] == doubts


def test_names_are_compared_where_they_mean_the_same(tmp_path: Path) -> None:
    first, second = (pack(tmp_path / name, source="ucla", labels=ALL // other) for name, other in (("first", 4), ("second", 8)))
    seen = (SeenClips(dataset_identity(first), "ucla", ("clip-000001",), ("clip-000001", "clip-000004")),)
    # packed again, otherwise
    assert labels_seen(seen, second, ALL) == (np.array([1]), []) and clips_seen(seen, second).tolist() == [1, 4]
    assert labels_seen(seen, second, ALL[2:])[0].tolist() == []
    named = replace(second, names=np.array([f"a{number}" for number in ALL]))
    doubt = "it was fine-tuned on labels of another copy of ucla, whose clips have other names"
    assert labels_seen(seen, named, ALL)[1] == [doubt]
    # one release in two sizes; a release and what was made of it; a data set that has nothing to do with it
    for own, theirs, sure, doubtful in (
        ("ntu60", "ntu120", True, False), ("ucla-2d", "ucla", False, True), ("custom", "custom", False, True)
    ):
        part = (replace(seen[0], source=own, data="0"),)
        dataset = replace(second, meta={**second.meta, "source": theirs})
        found, doubts = labels_seen(part, dataset, ALL)
        assert (len(found) == 1, bool(doubts)) == (sure, doubtful) and (clips_seen(part, dataset) is None) == doubtful
    assert labels_seen(seen, replace(named, meta={**named.meta, "source": "utd"}), ALL)[1] == []


def test_a_pretraining_of_data_that_are_elsewhere(tmp_path: Path) -> None:
    dataset = pack(tmp_path / "data", source="ucla")
    copy = convert_dataset(dataset, "kinect-20-utd", tmp_path / "copy")
    run = tmp_path / "run"
    run.mkdir()

    def record(**more) -> None:
        identity = {"data": dataset_identity(dataset), "indices": {}}
        (run / "config.json").write_text(json.dumps({"data": str(dataset.path), "identity": identity, **more}))

    np.save(run / "indices.npy", np.array([1, 2]))
    record()
    assert clips_seen(seen_by(run, {}, copy), copy).tolist() == clips_seen(seen_by(run, {}, dataset), dataset).tolist() == [1, 2]
    assert seen_by(run, {}, copy) == (SeenClips(dataset_identity(dataset), "ucla", (), ("clip-000001", "clip-000002")),)
    # gone: what it was is known, which clips is not
    record(data="gone", described=described_data(dataset))
    assert clips_seen(seen_by(run, {}, copy), copy) is None
    stranger = replace(dataset, meta={**dataset.meta, "source": "utd", "checksums": {"frames.npy": "1"}})
    assert clips_seen(seen_by(run, {}, stranger), stranger).tolist() == []
    # a record of an older version does not say it: other data are others, as before
    record(data="gone")
    assert clips_seen(seen_by(run, {}, stranger), stranger).tolist() == []
    assert seen_by(tmp_path, {}, dataset) is None and clips_seen(None, dataset) is None
    # a file from elsewhere may have seen anything, whatever it was fine-tuned on
    later = seen_by(run, {"seen": handed_on(None, dataset, np.array([3]), None)}, dataset)
    assert labels_seen(later, copy, ALL)[0].tolist() == [3] and clips_seen(later, stranger) is None
