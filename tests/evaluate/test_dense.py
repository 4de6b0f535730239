"""Detection and segmentation of untrimmed recordings, whole, and what they leave on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastskel.cli import main
from fastskel.data.packed import PackedDataset
from fastskel.data.protocols import Split
from fastskel.data.views import eval_view
from fastskel.evaluate import (
    DenseConfig,
    Evaluation,
    FrameHeadConfig,
    ProposalConfig,
    Windows,
    evaluate_detection,
    evaluate_segmentation,
)
from fastskel.evaluate.dense import frame_truth, leave_one_out, true_segments
from fastskel.evaluate.detection import frame_proposals
from fastskel.evaluate.detection_metrics import Segments
from fastskel.evaluate.evaluation import TASKS
from fastskel.evaluate.metrics import mean_and_deviation

T = 8
CONFIG = DenseConfig(FrameHeadConfig(learning_rate=0.05, epochs=20))
BOTH = pytest.mark.parametrize("evaluate", [evaluate_detection, evaluate_segmentation], ids=["detect", "segment"])


@pytest.fixture
def data(untrimmed) -> PackedDataset:
    return untrimmed


def evaluation(data: PackedDataset, **options) -> Evaluation:
    clips = np.arange(len(data))
    settings = {"split": Split(clips[:6], clips[6:]), "view": eval_view(T), "progress": False, **options}
    return Evaluation(None, data, **settings)


def test_detection_finds_what_is_there(data, tmp_path: Path) -> None:
    proposals = ProposalConfig(thresholds=(0.5,))
    result = evaluate_detection(
        evaluation(data, protocol="last-two"), tmp_path / "out", config=CONFIG, proposals=proposals, frame_rate=15
    )
    assert result["map_action"] > 0.95 and result["map_video"] > 0.95
    assert (result["num_segments"], result["num_train"], result["num_test"]) == (6, 6, 2)
    assert set(result["per_class"]) == {"lift", "wave", "kick"}
    assert list(result["thresholds"]) == ["0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7"]
    assert (result["task"], result["protocol"], result["num_classes"]) == ("detect", "last-two", 3)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["proposals.json", "results.json"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(result))
    listed = json.loads((tmp_path / "out" / "proposals.json").read_text())
    assert len(listed) == result["num_proposals"]
    first = listed[0]
    assert first["recording"] == data.names[6] and first["class"] == data.class_names[first["label"]]
    assert (first["start_seconds"], first["end_seconds"]) == (first["start"] / 15, first["end"] / 15)
    line = result["timelines"][0]
    assert (line["recording"], line["num_frames"]) == (data.names[6], data.num_frames[6])
    own = data.segments[data.segments[:, 0] == 6]
    assert [(row["start"], row["end"]) for row in line["truth"]] == [tuple(row) for row in own[:, 2:4].astype(int).tolist()]
    assert [row["class"] for row in line["predicted"]] == [row["class"] for row in line["truth"]]
    assert all(0.3 < row["score"] <= 1 for row in line["predicted"])


def test_segmentation_finds_what_is_there(data, tmp_path: Path) -> None:
    result = evaluate_segmentation(evaluation(data), tmp_path, config=CONFIG)
    assert result["accuracy"] > 0.97 and result["f1@50"] > 0.9 and result["edit"] > 0.9
    labels = frame_truth(true_segments(data, np.array([6, 7]), "test"), data.num_frames[6:].tolist())
    assert result["majority_accuracy"] == pytest.approx((np.concatenate(labels) == 0).mean())
    assert result["num_test_frames"] == data.num_frames[6:].sum()
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(result))
    # a head that has learned little
    plain, counted = (
        evaluate_segmentation(evaluation(data), config=DenseConfig(FrameHeadConfig(epochs=4)), count_background=count)
        for count in (False, True)
    )
    assert plain["accuracy"] == counted["accuracy"] < result["accuracy"]
    assert plain["edit"] != counted["edit"] and plain["f1@10"] != counted["f1@10"]


@BOTH
def test_untold_frames_are_not_learned(evaluate, data) -> None:
    # the truth of the training part on other frames: what is found is what was taught
    moved = data.segments.copy()
    training = moved[:, 0] < 6
    moved[training, 1] = (moved[training, 1] + 1) % 3
    name = "map_action" if evaluate is evaluate_detection else "action_accuracy"
    assert evaluate(evaluation(data), config=CONFIG)[name] > 0.9
    assert evaluate(evaluation(replace(data, segments=moved)), config=CONFIG)[name] < 0.1


@BOTH
def test_leave_one_out(evaluate, data) -> None:
    config = replace(CONFIG, leave_one_out="subject")
    result = evaluate(evaluation(data), config=config)
    name = "map_action" if evaluate is evaluate_detection else "edit"
    assert [fold["name"] for fold in result["folds"]] == [f"subject {number}" for number in range(4)]
    assert [(fold["num_train"], fold["num_test"]) for fold in result["folds"]] == [(6, 2)] * 4
    assert (result["num_train"], result["num_test"], result["dropped_test"]) == (8, 8, 0)
    values = result["over_folds"][name]["values"]
    assert result["over_folds"][name] == mean_and_deviation(values) and len(values) == 4
    if evaluate is evaluate_detection:
        # a recording is judged by itself, and folds have two each: all together are the mean of the folds
        assert result["map_video"] == pytest.approx(result["over_folds"]["map_video"]["mean"], abs=1e-12)
    # the last fold is the split of before
    assert values[3] == evaluate(evaluation(data), config=CONFIG)[name]
    # test clips are those of their fold alone: teaching subject 3 nonsense changes the other folds only
    nonsense = data.segments.copy()
    nonsense[nonsense[:, 0] >= 6, 1] = 0
    changed = evaluate(evaluation(replace(data, segments=nonsense)), config=config)["over_folds"][name]["values"]
    assert changed[:3] != values[:3] and changed[3] < values[3]


def test_folds(data) -> None:
    folds = leave_one_out(data, "subject", np.array([0, 2, 3, 7]))
    assert [(name, split.train.tolist(), split.test.tolist()) for name, split in folds] == [
        ("subject 0", [2, 3, 7], [0]), ("subject 1", [0, 7], [2, 3]), ("subject 3", [0, 2, 3], [7]),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"leave_one_out: column must have two values, got \[0\] in 'subject'"):
        leave_one_out(data, "subject", np.array([0, 1]))
    with pytest.raises(ValueError, match="name must be of subject, got 'camera'"):
        leave_one_out(data, "camera", np.arange(8))


def test_the_later_segment_counts_where_two_overlap() -> None:
    truth = Segments.of([[0, 2, 4, 8, 1], [0, 0, 1, 6, 1], [1, 1, 0, 2, 1], [0, 1, 4, 5, 1]])
    labels = frame_truth(truth, [9, 3])
    # of two that begin together the one listed last
    assert [values.tolist() for values in labels] == [[0, 1, 1, 1, 2, 3, 3, 3, 0], [2, 2, 0]]


def test_proposals_by_hand() -> None:
    values = np.array([[0.9, 0.5, 0.1, 0.02, 0.3, 0.97], [0.06, 0.3, 0.9, 0.98, 0.01, 0.02], [0.04, 0.2, 0.0, 0.0, 0.69, 0.01]]).T
    rows = frame_proposals([values, values[:0], values[4:5]]).rows().tolist()
    assert [row[:4] for row in rows] == [[0, 0, 0, 4], [0, 1, 0, 2], [0, 1, 4, 5], [2, 1, 0, 1]]
    np.testing.assert_allclose([row[4] for row in rows], [0.56, 0.12, 0.69, 0.69], rtol=1e-12)
    # 0.02 itself does not exceed 0.02
    nested = frame_proposals([values], ProposalConfig(thresholds=(0.02, 0.5)))
    assert [row[1:4] for row in nested.rows().tolist()] == [[0, 0, 4], [1, 0, 2], [1, 4, 5], [0, 2, 4], [1, 4, 5]]
    kept = frame_proposals([values], ProposalConfig((0.02, 0.5), nms=0.4))
    # the better inner one suppresses the outer one, which shares half; of twins the first stays
    assert [row[1:4] for row in kept.rows().tolist()] == [[1, 0, 2], [1, 4, 5], [0, 2, 4]]
    for settings, message in (({"thresholds": ()}, "thresholds must"), ({"nms": 1.0}, "nms must lie")):
        with pytest.raises(ValueError, match=message):
            ProposalConfig(**settings)


def test_proposals_against_a_plain_loop() -> None:
    draw = np.random.default_rng(0)
    values = draw.dirichlet(np.full(4, 0.3), 200)
    expected = []
    for label in range(1, 4):
        start = None
        for frame in range(201):
            inside = frame < 200 and values[frame, label] > 0.02
            if inside and start is None:
                start = frame
            elif not inside and start is not None:
                expected.append([0, label - 1, start, frame, values[start:frame, label].mean()])
                start = None
    np.testing.assert_allclose(frame_proposals([values]).rows(), expected, atol=1e-12)


@BOTH
def test_recordings_without_segments_are_left_out_and_counted(evaluate, data) -> None:
    some = data.segments[~np.isin(data.segments[:, 0], [0, 7])]
    result = evaluate(evaluation(replace(data, segments=some)), config=CONFIG)
    assert (result["num_train"], result["dropped_train"], result["num_test"], result["dropped_test"]) == (5, 1, 1, 1)


@BOTH
def test_refused(evaluate, data, encoder, tmp_path: Path) -> None:
    task = "detect" if evaluate is evaluate_detection else "segment"
    with pytest.raises(ValueError, match=f"{task}: the data set must have segments, got none in .*Pack it with its label files"):
        evaluate(evaluation(replace(data, segments=None)), tmp_path / "out")
    none = data.segments[data.segments[:, 0] < 6]
    with pytest.raises(ValueError, match="the test split of .* must have recordings with segments, got 2 clips, none with one"):
        evaluate(evaluation(replace(data, segments=none)), tmp_path / "out")
    with pytest.raises(ValueError, match="split must have parts without common clips, got 1 in both"):
        evaluate(evaluation(data, split=Split(np.arange(6), np.arange(5, 8))), tmp_path / "out")
    backward = data.segments.copy()
    backward[19, 3] = backward[19, 2]
    start = f"{backward[19, 2]:g}"
    message = f"{task}: segments must have start < end, got {start} to {start} of class .* in recording {data.names[6]}"
    with pytest.raises(ValueError, match=message):
        evaluate(evaluation(replace(data, segments=backward)), tmp_path / "out")
    dropped = evaluate(evaluation(replace(data, segments=backward)), config=replace(CONFIG, drop_reversed=True))
    assert sum(len(line["truth"]) for line in dropped["timelines"]) == 5
    with pytest.raises(ValueError, match=f"{task}: the encoder must provide 'temporal' features, got none"):
        evaluate(replace(evaluation(data), encoder=encoder), tmp_path / "out")
    with pytest.raises(ValueError, match="num_timelines must be at least 0, got -1"):
        replace(CONFIG, num_timelines=-1)
    assert not (tmp_path / "out").exists()
    assert TASKS[task].run is evaluate and TASKS[task].needs == ("temporal",)


def test_refused_frame_rate(data) -> None:
    with pytest.raises(ValueError, match="frame_rate must be above 0, got 0"):
        evaluate_detection(evaluation(data), frame_rate=0)


def test_test_recordings_that_were_trained_on_are_counted(data) -> None:
    result = evaluate_segmentation(evaluation(data, trained_on=np.array([1, 7])), config=CONFIG)
    assert result["test_clips_trained_on"] == 1


def test_windows_and_heads_reach_the_features(data) -> None:
    plain = evaluate_segmentation(evaluation(data), config=CONFIG)
    wide = replace(CONFIG, windows=Windows(window=20), head=FrameHeadConfig("tcn", 8, 2, epochs=2))
    other = evaluate_segmentation(evaluation(data), config=wide)
    assert other["accuracy"] != plain["accuracy"]
    assert (other["config"]["windows"]["window"], other["config"]["head"]["head"]) == (20, "tcn")
    # what the head is given, not the pooled features of a clip
    assert (plain["num_features"], other["num_features"]) == (75, 75)
    assert (plain["config"]["receptive_field"], other["config"]["receptive_field"]) == (1, 7)


def test_commands(data, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    small = f"--width 8 --frames {T} --crop-min-frames {T} --num-views 2 --batch-size 4 --epochs 1 --threads 1 --device cpu"
    assert main(["pretrain", "usdrl-demo", str(data.path), "--out", "run", *small.split(), "--quiet"]) == 0
    capsys.readouterr()
    torch.manual_seed(0)
    options = ["run", str(data.path), "--leave-one-out", "subject", "--epochs", "3", "--quiet", "--device", "cpu"]
    assert main(["evaluate", "detect", *options, "--thresholds", "0.02", "0.3", "--nms", "0.5"]) == 0
    said = capsys.readouterr()
    folder = Path("run/detect-leave-one-subject-out-packed-linear-epochs3-above0.02-0.3-nms0.5")
    assert f"(8 test recordings, {data.num_frames.sum()} frames; {folder})" in said.out
    assert "mean and deviation over 4 folds: map_action" in said.out and "IoU     0.1    0.2" in said.out
    assert "warning: 8 of 8 test clips were trained on" in said.err
    assert json.loads((folder / "results.json").read_text())["proposal_config"] == {"thresholds": [0.02, 0.3], "nms": 0.5}
    assert main(["evaluate", "segment", *options, "--head", "tcn", "--overlap", "0.25", "--smoothing", "0.15"]) == 0
    assert "majority_accuracy" in capsys.readouterr().out
    folder = Path("run/segment-leave-one-subject-out-packed-tcn-epochs3-smoothing0.15-overlap0.25")
    stored = json.loads((folder / "results.json").read_text())
    assert stored["num_features"] == 8
    assert stored["config"]["head"]["smoothing"] == 0.15 and stored["config"]["windows"]["overlap"] == 0.25
    # settings of the head are told apart too: nothing is written over
    assert main(["evaluate", "segment", *options, "--head", "tcn", "--overlap", "0.25", "--class-weights"]) == 0
    assert len(list(Path("run").glob("segment-*"))) == 2
    # features of both windows are there to be used again
    assert len(list(Path("run/features").iterdir())) == 16
    assert main(["evaluate", "segment", *options, "--protocol", "xsub"]) == 2
    assert "protocol and split_file must be left out with leave_one_out" in " ".join(capsys.readouterr().err.split())
    Path("halves.json").write_text(json.dumps({"train": list(range(4)), "test": list(range(4, 8))}))
    assert main(["evaluate", "segment", "run", str(data.path), "--split-file", "halves.json", "--epochs", "3", "--quiet"]) == 0
    assert Path("run/segment-halves-packed-linear-epochs3/results.json").exists()
