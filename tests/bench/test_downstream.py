"""Rows of the downstream tasks on real data: who is compared, what is read, and that nothing is measured twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fastskel.bench import downstream, trials

from fastskel.data import make_synthetic, open_dataset, pack_arrays
from fastskel.data.packed import PackedDataset
from fastskel.data.protocols import split
from fastskel.evaluate import Evaluation, FinetuneConfig, Task, frame_tuning, training

TINY = ["epochs=1", "width=16", "frames=16", "batch_size=8", "warmup_steps=0", "milestones=()", "precision=fp32"]
WHO = ["raw coordinates", "raw, aligned", "untrained encoder", "pretrained encoder"]


@pytest.fixture
def source(tmp_path: Path) -> PackedDataset:
    make_synthetic(tmp_path / "data", num_clips=24, num_classes=3, num_subjects=4)
    return open_dataset(tmp_path / "data")


def tried(source: PackedDataset, target: PackedDataset, protocol: str, trials: list[str], folder: Path) -> list[dict]:
    return downstream.measure(
        "usdrl-small", 0, source, "xsub", [(target, [protocol])], trials, folder / "runs", folder / "rows.jsonl", TINY, "tiny"
    )


def test_every_contender_has_a_row_for_every_trial_and_none_is_measured_twice(source: PackedDataset, tmp_path: Path) -> None:
    rows = tried(source, source, "xsub", ["knn", "linear"], tmp_path)
    assert [(row["features"], row["task"]) for row in rows] == [(who, task) for who in WHO for task in ("knn", "linear")]
    assert all(set(row["metrics"]) == {"top1"} and 0 <= row["metrics"]["top1"] <= 1 for row in rows)
    assert {(row["tag"], row["settings"]["width"], row["trained_on"]) for row in rows} == {("tiny", 16, "synthetic xsub")}
    # what is as the recipe has it is not repeated
    assert "num_heads" not in rows[0]["settings"] and "seed" not in rows[0]["settings"]
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == json.loads(json.dumps(rows))
    more = tried(source, source, "xsub", ["knn", "linear", "cluster"], tmp_path)
    assert [row["task"] for row in more] == ["cluster"] * 4
    assert set(more[0]["metrics"]) == {"accuracy", "nmi", "ari"}


def test_raw_coordinates_are_not_fine_tuned(
    source: PackedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    trial = trials.Trial(lambda evaluation, seed: asked.append(evaluation.encoder) or {"top1": 1.0}, trains=True)
    monkeypatch.setattr(downstream, "TRIALS", {"finetune": trial})
    rows = tried(source, source, "xsub", ["finetune"], tmp_path)
    assert [row["features"] for row in rows] == WHO[2:]
    assert None not in asked


def test_other_data_are_adapted(source: PackedDataset, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    clips = [generator.normal(size=(20, 2, 20, 3)).astype(np.float32) for _ in range(12)]
    parts = {"fold": {"train": range(6), "test": range(6, 12)}}
    labels = [number % 2 for number in range(12)]
    other = pack_arrays(
        clips, out=tmp_path / "other", topology="kinect-20-utd", labels=labels, splits=parts, units="feet", source="other"
    )
    rows = tried(source, other, "fold", ["knn"], tmp_path)
    assert [(row["data"], row["features"]) for row in rows] == [("other", who) for who in WHO]


def test_contenders_are_made_once_for_all_test_parts(
    source: PackedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, contenders = [], downstream.contenders
    monkeypatch.setattr(downstream, "contenders", lambda *given: made.append(given) or contenders(*given))
    rows = downstream.measure(
        "usdrl-small", 0, source, "xsub", [(source, ["xsub"])] * 2, ["knn"], tmp_path / "runs", settings=TINY, tag="tiny"
    )
    assert [row["features"] for row in rows] == WHO * 2 and len(made) == 1
    assert [row["metrics"] for row in rows[:4]] == [row["metrics"] for row in rows[4:]]


def test_data_are_the_same_by_whatever_path(source: PackedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    again = open_dataset(Path("data"))
    assert again.path != source.path
    monkeypatch.setattr(downstream, "adapt", lambda *given, **more: pytest.fail("adapted"))
    assert [row["features"] for row in tried(source, again, "xsub", ["knn"], tmp_path)] == WHO
    asked = []
    monkeypatch.setattr(downstream, "measure", lambda *given, **more: asked.append((given[2], given[4])) or [])
    words = ["downstream", "usdrl-small", "data", "--train", "xsub", "--on", f"{tmp_path}/data:xsub", "--flat", "plane"]
    monkeypatch.setattr("sys.argv", [*words, "--seeds", "0"])
    downstream.main()
    ((trained, ((tested, _),)),) = asked
    assert trained.meta["channels"] == tested.meta["channels"] == ["x", "y"]


def test_untrimmed_recordings_leave_each_value_of_a_column_out(
    source: PackedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    clips = [generator.normal(size=(60, 1, source.topology.num_joints, 3)).astype(np.float32) for _ in range(4)]
    segments = [(clip, clip % 2, 10, 40) for clip in range(4)]
    recordings = pack_arrays(
        clips, out=tmp_path / "long", topology=source.topology, segments=segments, class_names=["a", "b"],
        columns={"subject": [0, 0, 1, 1]}, num_bodies=source.num_bodies_max, source="long",
    )  # fmt: skip
    trained = []
    real = training.train_epoch

    def counted(*arguments: object, **options: object) -> dict:
        trained.append(arguments[4])
        return real(*arguments, **options)

    monkeypatch.setattr(frame_tuning, "train_epoch", counted)
    short = {"epochs": 2, "warmup_epochs": 0}
    monkeypatch.setattr(trials, "FinetuneConfig", lambda **given: FinetuneConfig(**{**given, **short}))
    rows = tried(source, recordings, "subject", ["detect", "segment", "frames-tuned"], tmp_path)
    assert {row["protocol"] for row in rows} == {"subject"}
    assert [row["task"] for row in rows] == ["detect", "segment"] * 2 + ["detect", "segment", "frames-tuned"] * 2
    assert set(rows[-1]["metrics"]) == {*rows[-2]["metrics"], *rows[-3]["metrics"]}
    # two encoders, two folds, two epochs, for both tasks together
    assert trained == [0, 1] * 4


def test_unseen_classes_are_told_by_words_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_synthetic(tmp_path / "data", num_clips=60, num_classes=10, num_subjects=4)
    source = open_dataset(tmp_path / "data")
    words = np.random.default_rng(0).normal(size=(10, 6))
    np.save(tmp_path / "words.npy", words)
    asked = []
    real = trials.TASKS["zeroshot"].run

    def run(evaluation: Evaluation, **settings: object) -> dict:
        asked.append(settings["unseen"])
        return real(evaluation, **settings)

    monkeypatch.setattr(trials, "TASKS", {"zeroshot": Task(run)})
    rows = downstream.measure(
        "usdrl-small", 0, source, "xsub", [(source, ["xsub"])], ["zeroshot"], tmp_path / "runs", settings=TINY, tag="tiny",
        words=tmp_path / "words.npy",
    )  # fmt: skip
    assert [row["features"] for row in rows] == WHO
    assert sorted(number for part in asked[:5] for number in part) == list(range(10))
    assert [len(part) for part in asked[:5]] == [2] * 5
    # all are asked for the same classes
    assert asked == asked[:5] * len(WHO)
    assert all(row["metrics"]["chance"] == 0.5 for row in rows)


def test_words_are_asked_for_before_anything_is_trained(source: PackedDataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="downstream: embeddings must be given for zeroshot, got none"):
        tried(source, source, "xsub", ["knn", "zeroshot"], tmp_path)
    assert not (tmp_path / "runs").exists()


def test_one_shot_needs_classes_that_nothing_was_trained_on(source: PackedDataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="training part of xsub must have no clip of a class that is tested"):
        tried(source, source, "xsub", ["oneshot"], tmp_path)
    parts = {"train": np.flatnonzero(source.labels == 2), "test": np.flatnonzero(source.labels != 2)}
    novel = replace(source, splits={"novel": parts})
    rows = downstream.measure(
        "usdrl-small", 0, novel, "novel", [(novel, ["novel"])], ["oneshot"], tmp_path / "runs", settings=TINY, tag="novel"
    )
    assert [row["features"] for row in rows] == WHO
    assert all(set(row["metrics"]) == {"top1", "mean_class"} for row in rows)


def test_streams_are_compared_alone_and_fused(source: PackedDataset, tmp_path: Path) -> None:
    rows = downstream.measure_streams(
        "usdrl-small", 0, source, "xsub", ["xsub"], tmp_path / "runs", tmp_path / "rows.jsonl", TINY
    )
    streams = ("joint", "bone", "motion", "late fusion", "multi-modal")
    wanted = [f"{kind}, {stream}" for kind in (WHO[0], *WHO[2:]) for stream in streams]
    assert [row["features"] for row in rows] == [name for name in wanted if name != "raw coordinates, multi-modal"]
    assert all(set(row["metrics"]) == {"knn", "linear"} for row in rows)
    assert downstream.measure_streams(
        "usdrl-small", 0, source, "xsub", ["xsub"], tmp_path / "runs", tmp_path / "rows.jsonl", TINY
    ) == []  # fmt: skip


def test_flat_data_have_the_first_two_coordinates_and_everything_else(source: PackedDataset, tmp_path: Path) -> None:
    made = downstream.flat(source, tmp_path / "flat")
    assert np.array_equal(np.asarray(made.clip(3)), np.asarray(source.clip(3))[..., :2])
    assert made.meta["channels"] == ["x", "y"]
    assert np.array_equal(made.labels, source.labels)
    assert np.array_equal(made.column("subject"), source.column("subject"))
    assert np.array_equal(split(made, "xsub").test, split(source, "xsub").test)
    assert downstream.flat(source, tmp_path / "flat").path == made.path
    make_synthetic(tmp_path / "others", num_clips=24, num_classes=3, num_subjects=4, seed=1)
    with pytest.raises(ValueError, match="flat must hold the first two coordinates of .*others, got those of other clips"):
        downstream.flat(open_dataset(tmp_path / "others"), tmp_path / "flat")
    rows = downstream.measure(
        "usdrl-small", 0, made, "xsub", [(made, ["xsub"])], ["knn"], tmp_path / "runs", settings=TINY, tag="tiny"
    )
    assert [row["features"] for row in rows] == ["raw coordinates", "untrained encoder", "pretrained encoder"]


def test_the_table_counts_a_seed_by_the_mean_of_its_parts_and_keeps_protocols_apart() -> None:
    def row(seed: int, protocol: str, top1: float, features: str = WHO[0], task: str = "knn") -> dict:
        return {
            "data": "sbu", "task": task, "trained_on": "nw-ucla xview", "tag": "", "features": features, "seed": seed,
            "protocol": protocol, "metrics": {"top1": top1},
        }  # fmt: skip

    folds = [row(0, "fold1", 0.5), row(0, "fold2", 0.7), row(1, "fold1", 0.6), row(1, "fold2", 0.8)]
    views = [row(0, "xview", 0.4), row(0, "xview-clean", 0.3), row(0, "xview", 0.9, "raw coordinates, bone", "streams")]
    assert downstream.table([row(0, "fold1", 0.1, WHO[3]), *folds, *views]).splitlines() == [
        "sbu fold, trained on nw-ucla xview:", "", "| | raw coordinates | pretrained encoder | seeds |", "|---|---|---|---|",
        "| knn top1 | 65.0 ± 7.1 | 10.0 | 1/2 |", "",
        "sbu xview, trained on nw-ucla xview:", "", "| | raw coordinates | seeds |", "|---|---|---|",
        "| knn top1 | 40.0 | 1 |", "| streams bone top1 | 90.0 | 1 |", "",
        "sbu xview-clean, trained on nw-ucla xview:", "", "| | raw coordinates | seeds |", "|---|---|---|",
        "| knn top1 | 30.0 | 1 |",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["data", "data:", ":xsub"])
def test_a_target_names_data_and_protocol(text: str) -> None:
    with pytest.raises(ValueError, match="downstream: on must be DATA:PROTOCOL"):
        downstream._target(text)


def test_the_command_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in ((["--table"], "--out must name"), (["usdrl-small"], "recipe, data and --train must be given")):
        monkeypatch.setattr("sys.argv", ["downstream", *words])
        with pytest.raises(SystemExit):
            downstream.main()
        assert message in capsys.readouterr().err


def test_the_page_shows_the_rows() -> None:
    root = Path(__file__).parents[2]
    lines = (root / "bench/results/downstream.jsonl").read_text().splitlines()
    table = downstream.table([row for row in map(json.loads, lines) if row["case"] == downstream.CASE])
    assert (root / "docs/downstream.md").read_text().endswith(table)


def test_the_command_shows_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "case": "downstream", "data": "sbu", "protocol": "fold1", "task": "knn", "trained_on": "nw-ucla xview", "tag": "",
        "features": WHO[0], "seed": 0, "metrics": {"top1": 0.25},
    }  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"case": "accuracy"}) + "\n")
    monkeypatch.setattr("sys.argv", ["downstream", "--table", "--out", str(tmp_path / "rows.jsonl")])
    downstream.main()
    assert capsys.readouterr().out.endswith("| | raw coordinates | seeds |\n|---|---|---|\n| knn top1 | 25.0 | 1 |\n\n")
