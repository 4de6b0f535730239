"""Multi-modal pretraining through the one loop: resumed, in chunks, planned, loaded and evaluated without a word about it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastskel.cli import main
from fastskel.data import Loader, PackedDataset, make_synthetic
from fastskel.data.protocols import split
from fastskel.evaluate import Evaluation, LinearConfig, evaluate_knn, evaluate_linear
from fastskel.models import MultimodalDSTE
from fastskel.objectives import MGFD, Objective
from fastskel.recipes import RECIPES
from fastskel.train import Stage, checkpoint, load_encoder, pretrain

NUM_CLIPS, BATCH_SIZE, EPOCHS = 24, 8, 2
STEPS = NUM_CLIPS // BATCH_SIZE * EPOCHS
MODULE = sys.modules["fastskel.train.pretrain"]
START = MODULE.start


class Interrupted(BaseException):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    folder = tmp_path_factory.mktemp("data") / "packed"
    return make_synthetic(folder, num_clips=NUM_CLIPS, num_classes=3, num_subjects=4)


def make_stage(dataset: PackedDataset, **settings) -> Stage:
    small = dict(
        consistency="multi-modal", width=16, num_layers=1, frames=16, crop_min_frames=16, batch_size=BATCH_SIZE,
        epochs=EPOCHS, milestones=(1,), warmup_steps=2, lr=5e-4, drop_path=0.3, num_threads=0,
    )  # fmt: skip
    (stage,) = replace(RECIPES["usdrl-demo"](), **(small | settings)).stages(dataset)
    return stage


def train(stage: Stage, dataset: PackedDataset, run: Path, **options) -> Path:
    return pretrain(stage, dataset, run, device="cpu", progress=False, **options)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def model_of(run: Path) -> dict[str, Tensor]:
    return load_file(checkpoint.newest(run) / "model.safetensors")


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16", "chunk": 4, "encoder": "sttr"}], ids=["whole", "bf16 chunks"])
def test_resuming_changes_no_bit(dataset, tmp_path, monkeypatch, settings) -> None:
    stage = make_stage(dataset, **settings)
    train(stage, dataset, tmp_path / "whole")
    left = [4]

    def after_step(self: MGFD) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Interrupted

    monkeypatch.setattr(MGFD, "after_step", after_step)
    with pytest.raises(Interrupted):
        train(replace(stage, checkpoint_steps=2), dataset, tmp_path / "pieces")
    monkeypatch.undo()
    train(stage, dataset, tmp_path / "pieces", resume=True)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        resumed, whole = ((checkpoint.newest(tmp_path / run) / name).read_bytes() for run in ("pieces", "whole"))
        assert resumed == whole, name


def test_chunks_are_one_graph_with_statistics_by_chunk(dataset, tmp_path, monkeypatch) -> None:
    """In float64, where what is not the same mathematics shows."""

    def start(stage: Stage) -> tuple[nn.Module, Objective]:
        encoder, objective = START(stage)
        encoder.register_forward_pre_hook(lambda _, inputs: (replace(inputs[0], clips=inputs[0].clips.double()),))
        return encoder.double(), objective.double()

    project = MGFD.project

    def by_chunk(self: MGFD, y_t: Tensor, y_s: Tensor) -> tuple[Tensor, ...]:
        parts = zip(torch.tensor_split(y_t, 2, 1), torch.tensor_split(y_s, 2, 1), strict=True)
        return tuple(torch.cat(z, 1) for z in zip(*(project(self, *part) for part in parts), strict=True))

    monkeypatch.setattr(MODULE, "start", start)
    stage = make_stage(dataset)
    train(replace(stage, chunk=4), dataset, tmp_path / "chunked")
    monkeypatch.setattr(MGFD, "project", by_chunk)
    train(stage, dataset, tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == STEPS
    assert losses(tmp_path / "chunked") == pytest.approx(losses(tmp_path / "whole"), rel=1e-10)
    expected = model_of(tmp_path / "whole")
    for name, value in model_of(tmp_path / "chunked").items():
        # a bias before BatchNorm has no gradient but rounding, which Adam divides by 1e-8; running means follow the bias
        cancelled = name.endswith((".0.bias", ".3.bias", ".running_mean")) and "_proj." in name
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-8 if cancelled else 1e-10)


def test_a_run_is_loaded_and_evaluated_as_any_other(dataset, tmp_path) -> None:
    train(make_stage(dataset), dataset, tmp_path / "run")
    encoder, view, _ = load_encoder(tmp_path / "run")
    assert isinstance(encoder, MultimodalDSTE) and not encoder.training and (encoder.mode, view.stream) == ("fused", "joint")
    # every embedding, and the fusion, moved
    fresh = START(make_stage(dataset))[0].state_dict()
    moved = [name for name, value in encoder.state_dict().items() if not torch.equal(value, fresh[name])]
    assert {name.split(".")[0] for name in moved} >= {"ske_emb", "bone_emb", "motion_emb", "fusion", "t_tr", "s_tr"}
    evaluation = Evaluation(encoder, dataset, split(dataset, "xsub"), view, cache=tmp_path / "cache", progress=False)
    results = [
        evaluate_knn(evaluation),
        evaluate_linear(evaluation, config=LinearConfig(epochs=2, learning_rate=0.1, milestones=())),
    ]
    assert [result["encoder"] for result in results] == ["MultimodalDSTE"] * 2
    assert results[0]["num_features"] == 32
    # the features of one pass over fused views
    loader = Loader(dataset, views=(view,), batch_size=NUM_CLIPS, num_threads=0, shuffle=False, drop_last=False)
    (batch,) = list(loader)
    with torch.no_grad():
        expected = encoder(batch.views[0], mode="fused").pooled
    torch.testing.assert_close(evaluation.features_of(batch.index.numpy()).features, expected, rtol=1e-5, atol=1e-5)


def test_the_loss_falls(dataset, tmp_path) -> None:
    stage = make_stage(dataset, width=32, lr=2e-3, epochs=15, milestones=(), shear=0.3, crop_low=0.7, drop_path=0.0)
    train(stage, dataset, tmp_path / "run")
    found = losses(tmp_path / "run")
    # 45 steps of 8 clips: what they share is soon found, variance grows slowly
    assert sum(found[-3:]) < 0.9 * sum(found[:3])


@pytest.mark.parametrize("settings", [["--bone-variant", "usdrl", "--chunk", "4"], ["--encoder", "sttr"]], ids=["chunks", "sttr"])
def test_it_can_be_planned(capsys, settings) -> None:
    common = ["--consistency", "multi-modal", "--width", "16", "--frames", "8", "--batch-size", "8", "--crop-min-frames", "8"]
    assert main(["plan", "usdrl-demo", "--machine", "h200", *common, *settings]) == 0
    multimodal = capsys.readouterr().out
    assert main(["plan", "usdrl-demo", "--machine", "h200", *common[2:], *settings]) == 0
    single = capsys.readouterr().out

    def parameters(text: str) -> int:
        return int(next(line.split()[1] for line in text.splitlines() if line.strip().startswith("parameters")).replace(",", ""))

    # two embeddings and two maps more
    joints, bodies, frames, channels, width = 25, 2, 8, 3, 16
    inputs = (joints * bodies * channels, frames * channels)
    embedding = sum(width * (features + 1) + 2 * width + width * (width + 1) for features in inputs)
    assert parameters(multimodal) - parameters(single) == 2 * embedding + 2 * width * width


@pytest.mark.parametrize("settings", [{"stream": "bone"}, {"num_views": 3}])
def test_streams_and_numbers_that_it_does_not_have_are_refused(dataset, settings) -> None:
    with pytest.raises(ValueError, match=r"USDRLRecipe: multi-modal consistency must have 4 views of the stream joint, .* got"):
        make_stage(dataset, **settings)
