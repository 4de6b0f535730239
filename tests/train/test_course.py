"""How a training goes: it learns with the logged rate, refuses to begin, or stops."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastskel.data import PackedDataset, make_synthetic
from fastskel.recipes import RECIPES
from fastskel.train import Stage, TrainingStopped, checkpoint, choose_device, pretrain, read_checkpoint
from fastskel.train.pretrain import _build

NUM_CLIPS, BATCH_SIZE = 24, 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    folder = tmp_path_factory.mktemp("data") / "packed"
    return make_synthetic(folder, num_clips=NUM_CLIPS, num_classes=3, num_subjects=4)


def make_stage(dataset: PackedDataset, **settings) -> Stage:
    small = dict(
        width=16, num_layers=1, frames=16, crop_min_frames=16, num_views=2, batch_size=BATCH_SIZE, epochs=2,
        milestones=(1,), warmup_steps=2, lr=5e-4, shear=1.0,
    )  # fmt: skip
    (stage,) = replace(RECIPES["usdrl-demo"](), **(small | settings)).stages(dataset)
    return stage


def train(dataset: PackedDataset, out: Path, *, stage: Stage | None = None, **options) -> Path:
    return pretrain(stage or make_stage(dataset), dataset, out, device="cpu", progress=False, **options)


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_decreases(dataset, tmp_path, precision) -> None:
    stage = make_stage(dataset, epochs=8, lr=5e-3, milestones=(6,), precision=precision, log_steps=5)
    train(dataset, tmp_path / "run", stage=stage)
    records = log_of(tmp_path / "run")
    # every fifth step, and the last
    assert [record["step"] for record in records] == [0, 5, 10, 15, 20, 23]
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]
    assert records[-1]["embedding_std"] > 1.5 * records[0]["embedding_std"]


def test_the_optimiser_steps_with_the_logged_rate(dataset, tmp_path) -> None:
    # Adam's first step moves every weight that has a gradient by lr, less what epsilon takes
    stage = make_stage(dataset, epochs=1, warmup_steps=5, weight_decay=0.0, checkpoint_steps=1)
    run = _build(stage, dataset, None, torch.device("cpu"))
    before = {name: value.clone() for name, value in checkpoint.weights(run.modules).items()}
    train(dataset, tmp_path / "run", stage=replace(stage, batch_size=NUM_CLIPS))
    after = load_file(tmp_path / "run" / "checkpoints" / "step-000000001" / "model.safetensors")
    weight = "objective.i_proj.6.weight"
    moved = (after[weight] - before[weight]).abs()
    assert moved.max().item() == pytest.approx(log_of(tmp_path / "run")[0]["lr"], rel=1e-3)


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"epochs": 0}, "Stage: epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "Stage: batch_size must be at least 1"),
        ({"log_steps": 0}, "Stage: log_steps must be at least 1"),
        ({"warmup_steps": -1}, "Stage: warmup_steps must be at least 0"),
        ({"checkpoint_steps": -1}, "Stage: checkpoint_steps must be at least 0"),
        ({"lr": 0.0}, "Stage: lr and lr_factor must be positive"),
        ({"lr": float("nan")}, "Stage: lr and lr_factor must be positive"),
        ({"weight_decay": -1.0}, "weight_decay not negative"),
        ({"precision": "fp16"}, "Stage: precision must be one of fp32, bf16, fp8, got 'fp16'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_stage_refuses(dataset, setting, message) -> None:
    with pytest.raises(ValueError, match=message):
        replace(make_stage(dataset), **setting)


def test_a_refused_run_leaves_no_folder(dataset, tmp_path) -> None:
    for stage in (
        make_stage(dataset, batch_size=NUM_CLIPS + 1),
        replace(make_stage(dataset), encoder="usdrl-dsti"),
        # refused by the batch statistics of its first step
        make_stage(dataset, batch_size=1),
    ):
        with pytest.raises(
            ValueError, match=r"batch_size must be at most|Did you mean|[Ee]xpected more than 1|at least 2"
        ):
            train(dataset, tmp_path / "run", stage=stage)
        assert list(tmp_path.iterdir()) == []


def test_processes_without_an_address_are_refused(dataset, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE, MASTER_ADDR, MASTER_PORT must be set together"):
        train(dataset, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("toaster", "cuda:99"):
        with pytest.raises(ValueError, match=f"device must be one this machine has, got '{name}'"):
            choose_device(name)


def test_tensorboard_absent(dataset, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"RunLog: tensorboard must be installed.*Install fastskel\[tensorboard\]"):
        train(dataset, tmp_path / "run", tensorboard=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("log_steps", [1, 100], ids=["logged", "unlogged"])
def test_divergence_stops(dataset, tmp_path, log_steps) -> None:
    stage = make_stage(dataset, lr=1e30, warmup_steps=0, checkpoint_steps=1, log_steps=log_steps)
    message = "the loss and its gradient must stay finite, got nan at step 1" if log_steps == 1 else "weights must stay finite"
    with pytest.raises(TrainingStopped, match=rf"{message}.*lower lr \(now 1e\+30\).*(step-00000000|no checkpoint)"):
        train(dataset, tmp_path / "run", stage=stage)
    last = read_checkpoint(tmp_path / "run", optimizer=True)
    assert last.state["step"] >= 1
    assert all(value.isfinite().all() for value in last.model.values())
    # JSON has no NaN: what is not finite is not logged
    assert [record["step"] for record in log_of(tmp_path / "run")] == [0]


def test_spoilt_clips_are_named(dataset, tmp_path) -> None:
    frames = dataset.frames.copy()
    frames[dataset.offsets[5] : dataset.offsets[6], 0, 3] = np.nan
    with pytest.raises(
        TrainingStopped, match=r"must stay finite.*The clips \['clip000005'\] hold NaN or infinity"
    ):
        train(replace(dataset, frames=frames), tmp_path / "run")


@pytest.mark.parametrize("weighting", ["aaai", "journal"])
def test_collapse_stops(dataset, tmp_path, weighting) -> None:
    # equal clips whose views are equal too: nothing tells one embedding from another
    equal = replace(dataset, frames=np.zeros_like(dataset.frames))
    with pytest.raises(
        TrainingStopped, match=r"embeddings must differ between samples.*at step 0: collapsed. Check that"
    ):
        train(equal, tmp_path / "run", stage=make_stage(dataset, drop_path=0.0, weighting=weighting))
