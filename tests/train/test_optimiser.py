"""Optimisers, schedules, clipping and the running average: their formulae, and what a stage makes of them."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastskel.compat.usdrl.checkpoint import export
from fastskel.data import PackedDataset, make_synthetic
from fastskel.objectives import MGFD
from fastskel.recipes import RECIPES
from fastskel.train import Stage, build_optimizer, checkpoint, learning_rate, load_encoder, pretrain
from fastskel.train.heartbeat import Heartbeat
from fastskel.train.optimiser import Average
from fastskel.train.pretrain import _build, _choose_gradients, _clip, _train_step
from fastskel.train.watch import Watch

NUM_CLIPS = 16
OPTIMIZERS = ("adam", "adamw", "lamb", "lars")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    return make_synthetic(tmp_path_factory.mktemp("data") / "packed", num_clips=NUM_CLIPS, num_classes=2, num_subjects=2)


def make_stage(dataset: PackedDataset, **settings) -> Stage:
    small = dict(
        width=16, num_layers=1, frames=8, crop_min_frames=8, num_views=2, batch_size=8, epochs=2, milestones=(), warmup_steps=0,
    )  # fmt: skip
    (stage,) = replace(RECIPES["usdrl-demo"](), **(small | settings)).stages(dataset)
    return stage


def train(stage: Stage, dataset: PackedDataset, out: Path, **options) -> Path:
    return pretrain(stage, dataset, out, device="cpu", progress=False, **options)


@pytest.mark.parametrize(
    "epoch, step, expected",
    [(0, 0, 0.25), (0, 1, 0.5), (0, 3, 1.0), (0, 9, 1.0), (1, 10, 1.0), (2, 20, 0.1), (4, 40, 0.1), (5, 50, 0.01), (5, 1, 0.005)],
)  # fmt: skip
def test_steps_of_the_learning_rate(dataset, epoch: int, step: int, expected: float) -> None:
    stage = replace(make_stage(dataset), lr=1.0, milestones=(2, 5), lr_factor=0.1, warmup_steps=4)
    assert learning_rate(stage, epoch, step, 60) == pytest.approx(expected)
    assert learning_rate(replace(stage, warmup_steps=0), 0, 0, 60) == 1.0


def test_cosine_of_the_learning_rate(dataset) -> None:
    stage = replace(make_stage(dataset), lr=2.0, schedule="cosine", warmup_steps=4, lr_final=0.25, milestones=(1,))
    rates = [learning_rate(stage, step // 3, step, 13) for step in range(13)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    # half of the way from the end of the warm-up to the last step, and the last step
    assert rates[8] == pytest.approx(2.0 * (0.25 + 0.75 / 2))
    assert rates[12] == pytest.approx(0.5)
    assert (np.diff(rates[4:]) < 0).all()
    alone = replace(stage, warmup_steps=0)
    assert [learning_rate(alone, 0, 0, 1), learning_rate(replace(stage, warmup_steps=9), 0, 2, 3)] == pytest.approx([2.0, 2 / 3])


@pytest.mark.parametrize(
    "scaling, batch, expected", [("none", 64, 1e-3), ("linear", 64, 2e-3), ("sqrt", 128, 2e-3), ("sqrt", 8, 5e-4)]
)
def test_the_recipe_scales_the_learning_rate(dataset, scaling: str, batch: int, expected: float) -> None:
    recipe = replace(RECIPES["usdrl-small"](), lr_scaling=scaling, batch_size=batch, lr=1e-3)
    (stage,) = recipe.stages(dataset)
    assert stage.lr == pytest.approx(expected)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"optimizer": "sgd"}, "Stage: optimizer must be one of adam, adamw, lamb, lars, got 'sgd'"),
        ({"schedule": "linear"}, "Stage: schedule must be one of step, cosine, got 'linear'"),
        ({"clip_norm": float("nan")}, "Stage: clip_norm must be finite and not negative"),
        ({"clip_norm": -1.0}, "Stage: clip_norm must be finite and not negative"),
        ({"lr_final": 1.5}, "lr_final in \\[0, 1\\]"),
        ({"average": 1.0}, "average in \\[0, 1\\)"),
        ({"batch_size": -4, "lr_scaling": "sqrt"}, "Stage: batch_size must be at least 1, got -4"),
        ({"base_batch_size": 0}, "USDRLRecipe: base_batch_size must be at least 1, got 0"),
    ],
)
def test_bad_settings(dataset, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_stage(dataset, **settings)


def _weights() -> tuple[nn.Parameter, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    matrix, vector = torch.randn(5, 3, generator=generator), torch.randn(5, generator=generator)
    return nn.Parameter(matrix.double()), nn.Parameter(vector.double())


def _adam(gradients: list[np.ndarray], correct: bool, eps: float) -> np.ndarray:
    """Direction of Adam after these gradients."""
    first = second = np.zeros_like(gradients[0])
    for gradient in gradients:
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
    if correct:
        first, second = first / (1 - 0.9 ** len(gradients)), second / (1 - 0.999 ** len(gradients))
    return first / (np.sqrt(second) + eps)


@pytest.mark.parametrize("decay_matrices_only", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_formulae(dataset, name: str, decay_matrices_only: bool) -> None:
    """Three steps of every optimiser, in float64, as the papers have them."""
    lr, decay = 0.01, 0.1
    stage = replace(make_stage(dataset), optimizer=name, lr=lr, weight_decay=decay, decay_matrices_only=decay_matrices_only)
    parameters = _weights()
    optimizer = build_optimizer(stage, [{"params": list(parameters)}])
    expected = [p.detach().numpy().copy() for p in parameters]
    momentum = [np.zeros_like(w) for w in expected]
    seen: list[list[np.ndarray]] = [[], []]
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            weight, gradient = expected[number], parameter.grad.numpy().copy()
            own = 0.0 if decay_matrices_only and weight.ndim == 1 else decay
            if name == "adam":
                seen[number].append(gradient + own * weight)
                expected[number] = weight - lr * _adam(seen[number], True, 1e-8)
            elif name == "adamw":
                seen[number].append(gradient)
                expected[number] = weight * (1 - lr * own) - lr * _adam(seen[number], True, 1e-8)
            elif name == "lamb":
                seen[number].append(gradient)
                update = _adam(seen[number], False, 1e-6) + own * weight
                expected[number] = weight - lr * update * np.linalg.norm(weight) / (np.linalg.norm(update) + 1e-6)
            else:
                if weight.ndim > 1:
                    norm = np.linalg.norm(weight)
                    trust = 1e-3 * norm / (np.linalg.norm(gradient) + own * norm)
                    gradient = trust * (gradient + own * weight)
                momentum[number] = 0.9 * momentum[number] + gradient
                expected[number] = weight - lr * momentum[number]
        optimizer.step()
    for parameter, weight in zip(parameters, expected, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), weight, rtol=1e-9, atol=1e-12)


def test_the_gradient_is_clipped(dataset) -> None:
    def step(clip: float) -> tuple[torch.Tensor, torch.Tensor]:
        run = _build(replace(make_stage(dataset), batch_size=NUM_CLIPS, clip_norm=clip), dataset, None, torch.device("cpu"))
        run.gradients = _choose_gradients(run, torch.device("cpu"))
        watch = Watch(run.encoder, torch.device("cpu"), Heartbeat(), None)
        watch.begin(0, logged=True)
        # to its end: an epoch of one step
        for passes in run.loader.steps():
            _train_step(run, passes, 0.0, watch)
        watch.close()
        norm = _clip(run)
        return norm, torch.cat([p.grad.flatten() for p in run.parameters() if p.grad is not None])

    free, gradient = step(0.0)
    torch.testing.assert_close(free, gradient.norm())
    clipped, short = step(0.25 * free.item())
    # what is logged is how long it was
    torch.testing.assert_close(clipped, free)
    torch.testing.assert_close(short, 0.25 * gradient, rtol=1e-4, atol=1e-9)
    _, long = step(2 * free.item())
    assert torch.equal(long, gradient)


def test_average() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    kept = Average(model, 0.5)
    expected = [p.detach().clone() for p in model.parameters()]
    for step in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model[1].running_mean.add_(1.0)
        kept.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = [decay * a + (1 - decay) * p.detach() for a, p in zip(expected, model.parameters(), strict=True)]
    for own, wanted in zip(kept.encoder.parameters(), expected, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-12, atol=1e-12)
        assert not own.requires_grad
    assert torch.equal(kept.encoder[1].running_mean, model[1].running_mean)


def test_the_average_is_in_the_checkpoint(dataset, tmp_path) -> None:
    # two layers: the reference has no others
    stage = make_stage(dataset, average=0.9, num_layers=2)
    seen: list[dict[str, torch.Tensor]] = []

    def monitor(encoder: nn.Module, epoch: int) -> dict[str, float]:
        seen.append({name: p.detach().clone() for name, p in encoder.named_parameters()})
        return {}

    # an epoch of one step, so that the monitor sees every weight that is averaged
    path = train(replace(stage, batch_size=NUM_CLIPS, epochs=3), dataset, tmp_path / "run", monitors=[monitor])
    run = _build(replace(stage, batch_size=NUM_CLIPS), dataset, None, torch.device("cpu"))
    expected = {name: p.detach().clone() for name, p in run.encoder.named_parameters()}
    for step, after in enumerate(seen):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = {name: torch.lerp(value, after[name], 1 - decay) for name, value in expected.items()}
    averaged, _, _ = load_encoder(path, average=True)
    last, _, _ = load_encoder(path)
    for name, parameter in averaged.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(a, b) for a, b in zip(averaged.parameters(), last.parameters(), strict=True))
    # written for the reference's scripts without it
    assert export(path, tmp_path / "file.pth.tar", announce=lambda _: None).exists()


def test_without_an_average_there_is_none_to_load(dataset, tmp_path) -> None:
    path = train(make_stage(dataset, epochs=1), dataset, tmp_path / "run")
    with pytest.raises(ValueError, match=r"load_encoder: .*model.safetensors must hold a running average, got none"):
        load_encoder(path, average=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_with_every_optimiser(dataset, tmp_path, monkeypatch, name: str) -> None:
    stage = make_stage(
        dataset, optimizer=name, average=0.9, clip_norm=1.0, schedule="cosine", decay_matrices_only=True, warmup_steps=1,
        checkpoint_steps=1,
    )  # fmt: skip
    train(stage, dataset, tmp_path / "whole")

    class Ended(BaseException):
        pass

    original, left = Average.update, [3]

    def update(self: Average, encoder: nn.Module, step: int) -> None:
        original(self, encoder, step)
        left[0] -= 1
        if left[0] == 0:
            raise Ended

    monkeypatch.setattr(Average, "update", update)
    with pytest.raises(Ended):
        train(stage, dataset, tmp_path / "parts")
    train(stage, dataset, tmp_path / "parts", resume=True)
    one, other = (checkpoint.read_checkpoint(tmp_path / part, optimizer=True) for part in ("whole", "parts"))
    assert one.state == other.state and one.state["step"] == 4 and one.state["optimizer"]["name"] == name
    for kind in ("model", "optimizer"):
        mine, theirs = getattr(one, kind), getattr(other, kind)
        assert mine.keys() == theirs.keys() and mine
        assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []
    rates = [json.loads(line)["lr"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([learning_rate(stage, step // 2, step, 4) for step in range(4)])


def test_resumed_with_a_parameter_that_never_moved(dataset, tmp_path, monkeypatch) -> None:
    original, left = MGFD.__init__, [3]

    def construct(self: MGFD, *given, **options) -> None:
        original(self, *given, **options)
        self.spare = nn.Parameter(torch.ones(2))

    def after_step(self: MGFD) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(MGFD, "__init__", construct)
    stage = make_stage(dataset, checkpoint_steps=1)
    whole = checkpoint.read_checkpoint(train(stage, dataset, tmp_path / "whole"), optimizer=True)
    with monkeypatch.context() as patch:
        patch.setattr(MGFD, "after_step", after_step)
        with pytest.raises(KeyboardInterrupt):
            train(stage, dataset, tmp_path / "parts")
    # moments that were lost are another matter
    lossy = tmp_path / "lossy"
    shutil.copytree(tmp_path / "parts", lossy)
    last = checkpoint.newest(lossy)
    moments = load_file(last / "optimizer.safetensors")
    lost = min(moments).rsplit("/", 1)[0]
    save_file({key: value for key, value in moments.items() if not key.startswith(f"{lost}/")}, last / "optimizer.safetensors")
    state = json.loads((last / "state.json").read_text())
    assert state["unmoved"] == ["objective.spare"]
    (last / "state.json").write_text(json.dumps(state | {"checksums": {}}))
    with pytest.raises(ValueError, match=rf"the optimiser of every parameter, got none for \['{lost}'\]"):
        train(stage, dataset, lossy, resume=True)
    parts = checkpoint.read_checkpoint(train(stage, dataset, tmp_path / "parts", resume=True), optimizer=True)
    for kind in ("model", "optimizer"):
        mine, theirs = getattr(whole, kind), getattr(parts, kind)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_the_reference_has_adam_only(dataset, tmp_path) -> None:
    path = train(make_stage(dataset, optimizer="adamw", epochs=1, num_layers=2), dataset, tmp_path / "run")
    with pytest.raises(ValueError, match="must be trained with adam, as the reference is, got adamw"):
        export(path, tmp_path / "file.pth.tar", announce=lambda _: None)


def test_the_library_is_named_where_it_is_missing(dataset, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    stage = replace(make_stage(dataset), optimizer="lamb")
    with pytest.raises(ValueError, match=r"pytorch-optimizer must be installed for lamb.*fastskel\[large-batch\]"):
        build_optimizer(stage, [{"params": list(_weights())}])
