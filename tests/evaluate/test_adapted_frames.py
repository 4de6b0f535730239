"""Recordings that an encoder was not made for: another skeleton of a published file, another unit, more persons."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastskel.cli import main
from fastskel.compat.usdrl import dste
from fastskel.data.convert import convert_dataset
from fastskel.data.pack_clips import pack_arrays
from fastskel.data.packed import PackedDataset
from fastskel.data.protocols import Split
from fastskel.data.views import eval_view
from fastskel.evaluate import (
    DenseConfig,
    Evaluation,
    FinetuneConfig,
    FrameHeadConfig,
    Windows,
    evaluate_detection,
    evaluate_segmentation,
)
from fastskel.models import DSTE

T = 8
HEAD = DenseConfig(FrameHeadConfig(epochs=1), Windows(overlap=0.0))
BOTH = pytest.mark.parametrize("evaluate", [evaluate_detection, evaluate_segmentation], ids=["detect", "segment"])


def evaluation(data: PackedDataset) -> Evaluation:
    torch.manual_seed(0)
    encoder = DSTE(num_joints=25, num_bodies=1, num_frames=T, width=8)
    return Evaluation(encoder, data, Split(np.arange(6), np.arange(6, 8)), eval_view(T), progress=False)


def test_published_files_are_told_their_skeleton(untrimmed, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.DataParallel(dste.USDRL(20 * 3, T * 3, 8, 1, 2))
    optimizer = torch.optim.Adam(model.parameters())
    torch.save({"epoch": 1, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, "file.pth.tar")
    # as many joints, in another order
    convert_dataset(untrimmed, "kinect-20-utd", "other")
    Path("halves.json").write_text(json.dumps({"train": [0, 1], "test": [2]}))
    command = ["evaluate", "segment", "file.pth.tar", "other", "--split-file", "halves.json", "--quiet", "--epochs", "1"]
    assert main([*command, "--adapt"]) == 2
    assert "trained_on must be given with adapt, file.pth.tar is a published file" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "--adapt", "--trained-on", "kinect-20-ucla"]) == 0
    assert "skeleton kinect-20-utd for kinect-20-ucla" in capsys.readouterr().out
    folder = Path("file.pth.tar-results/segment-halves-other-linear-epochs1-adapted-kinect-20-ucla")
    assert json.loads((folder / "results.json").read_text())["adaptation"]["skeleton"] == "kinect-20-utd for kinect-20-ucla"


@BOTH
def test_a_scale_is_not_measured_on_what_is_tested(evaluate, untrimmed) -> None:
    given = evaluation(replace(untrimmed, meta={**untrimmed.meta, "units": "feet"}))
    folds = replace(HEAD, leave_one_out="subject")
    with pytest.raises(ValueError, match="scale must be given with leave_one_out for data of another unit, got none for feet"):
        evaluate(given, config=folds, source={})
    assert evaluate(given, config=folds, source={}, scale=0.3)["adaptation"]["scale"] == 0.3
    # training recordings of a split are no test
    assert evaluate(given, config=HEAD, source={})["adaptation"]["scale"] != 1


def pack_pair(folder: Path, data: PackedDataset) -> PackedDataset:
    """The recordings, every other one with a second body that does the same nine frames later."""
    clips = []
    for number in range(len(data)):
        clip = np.repeat(data.clip(number), 2, axis=1)
        clip[:, 1] = np.roll(clip[:, 1], 9, axis=0) * (number % 2)
        clips.append(clip)
    return pack_arrays(
        clips, out=folder, topology=data.topology, class_names=data.class_names, segments=data.segments, num_frames="all"
    )


@BOTH
def test_an_encoder_of_one_person_reads_the_frames_of_two(evaluate, untrimmed, tmp_path: Path) -> None:
    pair = pack_pair(tmp_path / "pair", untrimmed)
    found = evaluate(evaluation(pair), config=replace(HEAD, windows=Windows(spatial=True)), source={})
    assert (found["adaptation"]["bodies"], found["num_features"]) == ("2 for 1", 32)


def test_an_encoder_of_one_person_learns_from_two(untrimmed, tmp_path: Path) -> None:
    pair = pack_pair(tmp_path / "pair", untrimmed)
    config = FinetuneConfig(
        epochs=4, batch_size=16, learning_rate=0.02, warmup_epochs=1, layer_decay=1.0, weight_decay=0.0, drop_path=0.0
    )
    frozen = evaluate_segmentation(evaluation(pair), config=HEAD, source={})
    tuned = evaluate_segmentation(evaluation(pair), tmp_path / "out", config=HEAD, finetune_config=config, source={})
    assert tuned["accuracy"] > frozen["accuracy"] and tuned["num_features"] == 16
