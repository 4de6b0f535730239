"""Batches taken in chunks: the same training as in one graph, in less memory, for about a third more operations.

Numbers are compared in float64, where what is not the same mathematics shows.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastskel.bench.harness import flops, peak_bytes
from safetensors.torch import load_file
from torch import Tensor, nn

from fastskel.data import Loader, PackedDataset, make_synthetic
from fastskel.data.batch import Batch, concat_views
from fastskel.models.encoder import ENCODERS
from fastskel.objectives import MGFD
from fastskel.objectives.objective import OBJECTIVES, Objective, Terms
from fastskel.recipes import RECIPES
from fastskel.train import Stage, TrainingStopped, checkpoint, pretrain, start
from fastskel.train.chunked import AccumulatedGradients, CachedGradients, Outcome, WholeGradients, choose_gradients
from fastskel.train.runlog import TIMINGS

NUM_CLIPS, BATCH_SIZE = 40, 16
# two steps an epoch, and none more
EPOCHS = 3
MODULE = sys.modules["fastskel.train.pretrain"]
START = MODULE.start


class Interrupted(BaseException):
    """Stands for whatever ends a process."""


class Nearness(Objective):
    """A mean over samples of how far views are from the first; its scale is the loss's own parameter."""

    needs_whole_batch = False

    def __init__(self, encoder, views, *, coupled: bool = False) -> None:
        super().__init__()
        self.views, self.needs_whole_batch = tuple(views), coupled
        self.head = nn.Linear(encoder.num_features, 4)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def embed(self, encoder, batch):
        z = self.head(encoder(concat_views(batch.views)).pooled)
        return {"z": z.view(len(batch.views), len(batch), -1)}

    def loss(self, embeddings, batch, progress):
        z = embeddings["z"]
        if not self.needs_whole_batch:
            assert len(batch.views) == len(z) and len(batch.labels) == z.shape[1]
        total = self.scale * (z - z[:1]).square().mean() + (z.square().mean() - 1).abs() * 0
        return Terms(total, {"near": total.detach()})


class Coupled(Nearness):
    """The same, called a loss of the whole batch."""

    def __init__(self, encoder, views) -> None:
        super().__init__(encoder, views, coupled=True)


@pytest.fixture(scope="module", autouse=True)
def objectives() -> Iterator[None]:
    OBJECTIVES.add("test-nearness", Nearness)
    OBJECTIVES.add("test-coupled", Coupled)
    yield
    for name in ("test-nearness", "test-coupled"):
        del OBJECTIVES._entries[name]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    folder = tmp_path_factory.mktemp("data") / "packed"
    return make_synthetic(folder, num_clips=NUM_CLIPS, num_classes=3, num_subjects=4)


def make_stage(dataset: PackedDataset, **settings: Any) -> Stage:
    small = dict(
        width=16, num_layers=1, frames=16, crop_min_frames=16, num_views=2, batch_size=BATCH_SIZE, epochs=EPOCHS,
        milestones=(2,), warmup_steps=2, lr=5e-4, shear=1.0, drop_path=0.3, num_threads=0,
    )  # fmt: skip
    (stage,) = replace(RECIPES["usdrl-demo"](), **(small | settings)).stages(dataset)
    return stage


def train(stage: Stage, dataset: PackedDataset, run: Path, **options: Any) -> Path:
    return pretrain(stage, dataset, run, device="cpu", progress=False, **options)


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    def begin(stage: Stage) -> tuple[nn.Module, Objective]:
        encoder, objective = START(stage)
        encoder.register_forward_pre_hook(lambda _, inputs: (replace(inputs[0], clips=inputs[0].clips.double()),))
        return encoder.double(), objective.double()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "start", begin)
        yield


def grouped_by_chunk(number: int) -> Any:
    """Project as `number` chunks would, in one graph: the rows of each by themselves, running statistics moved in order."""
    project = MGFD.project

    def by_chunk(self: MGFD, y_t: Tensor, y_s: Tensor) -> tuple[Tensor, ...]:
        parts = zip(torch.tensor_split(y_t, number, 1), torch.tensor_split(y_s, number, 1), strict=True)
        return tuple(torch.cat(z, 1) for z in zip(*(project(self, *part) for part in parts), strict=True))

    return by_chunk


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def same_bits(run: Path, expected: Path) -> bool:
    files = ("model.safetensors", "optimizer.safetensors", "state.json")
    return all((checkpoint.newest(run) / f).read_bytes() == (checkpoint.newest(expected) / f).read_bytes() for f in files)


@pytest.mark.parametrize("encoder", ["dste", "sttr"])
@pytest.mark.parametrize("number", [2, 4, 8], ids=lambda number: f"1 in {number}")
def test_chunks_are_one_graph_with_statistics_by_chunk(
    dataset, tmp_path, monkeypatch, assert_equal_runs, encoder, number
) -> None:
    stage = make_stage(dataset, encoder=encoder)
    with double_precision():
        train(replace(stage, chunk=BATCH_SIZE // number), dataset, tmp_path / "chunked")
        monkeypatch.setattr(MGFD, "project", grouped_by_chunk(number))
        train(stage, dataset, tmp_path / "whole")
    assert len(log_of(tmp_path / "chunked")) == 6
    assert_equal_runs(tmp_path / "chunked", tmp_path / "whole")
    # every view of every chunk moved them once
    state = load_file(checkpoint.newest(tmp_path / "chunked") / "model.safetensors")
    assert state["objective.i_proj.1.num_batches_tracked"] == 6 * 2 * number


def test_chunks_need_not_be_equal(dataset, tmp_path, monkeypatch, assert_equal_runs) -> None:
    # 14 samples, at most 4 at a time: 4, 4, 3, 3
    stage = make_stage(dataset, batch_size=14)
    with double_precision():
        train(replace(stage, chunk=4), dataset, tmp_path / "chunked")
        monkeypatch.setattr(MGFD, "project", grouped_by_chunk(4))
        train(stage, dataset, tmp_path / "whole")
    assert_equal_runs(tmp_path / "chunked", tmp_path / "whole")


def test_statistics_by_chunk_are_another_training(dataset, tmp_path) -> None:
    stage = make_stage(dataset, epochs=1)
    for name, chunk in {"whole": None, "halves": 8, "quarters": 4}.items():
        train(replace(stage, chunk=chunk), dataset, tmp_path / name)
    losses = [log_of(tmp_path / name)[0]["loss"] for name in ("whole", "halves", "quarters")]
    assert abs(losses[0] - losses[1]) > 1e-4 and abs(losses[1] - losses[2]) > 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("chunk", [BATCH_SIZE, 1000])
def test_a_chunk_of_the_whole_batch_changes_no_bit(dataset, tmp_path, precision, chunk) -> None:
    stage = make_stage(dataset, precision=precision, epochs=1)
    train(stage, dataset, tmp_path / "whole")
    train(replace(stage, chunk=chunk), dataset, tmp_path / "chunk")
    assert same_bits(tmp_path / "chunk", tmp_path / "whole")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resuming_changes_no_bit(dataset, tmp_path, monkeypatch, precision) -> None:
    stage = make_stage(dataset, precision=precision, chunk=6)
    train(stage, dataset, tmp_path / "whole")
    for stop in (3, 2):
        left = [stop]

        def after_step(self: MGFD, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise Interrupted

        monkeypatch.setattr(MGFD, "after_step", after_step)
        with pytest.raises(Interrupted):
            train(replace(stage, checkpoint_steps=1), dataset, tmp_path / "pieces", resume=(tmp_path / "pieces").exists())
    monkeypatch.undo()
    train(stage, dataset, tmp_path / "pieces", resume=True)
    assert [part["step"] for part in json.loads((tmp_path / "pieces" / "config.json").read_text())["resumed"]] == [2, 3]
    assert same_bits(tmp_path / "pieces", tmp_path / "whole")
    records = [[{**record, **dict.fromkeys(TIMINGS)} for record in log_of(tmp_path / name)] for name in ("pieces", "whole")]
    assert records[0] == records[1]
    with pytest.raises(ValueError, match="must keep its configuration and data, got other chunk than"):
        train(replace(stage, chunk=8), dataset, tmp_path / "pieces", resume=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_in_low_precision_are_as_good_as_of_the_whole(dataset, precision) -> None:
    gradients = {}
    for kind, chunk in {"exact": None, "whole": None, "chunked": 4}.items():
        with pytest.MonkeyPatch.context() as patch:
            if chunk is None:
                patch.setattr(MGFD, "project", grouped_by_chunk(4))
            step = Step(dataset, make_stage(dataset), chunk, "fp64" if kind == "exact" else precision)
            step()
        gradients[kind] = torch.cat([p.grad.double().flatten() for p in step.parameters()])
    exact = gradients["exact"]
    apart = {kind: float((gradients[kind] - exact).norm() / exact.norm()) for kind in ("whole", "chunked")}
    assert 0 < apart["chunked"] <= 1.5 * apart["whole"], apart


class Step:
    """Gradients of the first batches of a data set, without an optimiser."""

    def __init__(self, dataset: PackedDataset, stage: Stage, chunk: int | None, precision: str = "fp32") -> None:
        encoder, objective = start(stage)
        self.encoder, self.objective = encoder.train(), objective.train()
        self.double = precision == "fp64"
        if self.double:
            encoder.double(), objective.double()
        self.loader = Loader(dataset, views=stage.views, batch_size=stage.batch_size, num_threads=0)
        rows = stage.batch_size
        number = 1 if chunk is None else -(-rows // chunk)
        self.gradients = choose_gradients(
            encoder, objective, num_rows=rows, num_chunks=number, synchronise_norms=False,
            autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        )  # fmt: skip
        self.steps = self.loader.steps(chunk, self.gradients.passes)

    def parameters(self) -> list[nn.Parameter]:
        return [p for module in (self.encoder, self.objective) for p in module.parameters()]

    def addressed(self, parts: Iterator[Batch]) -> Iterator[Batch]:
        for part in parts:
            views = [replace(view, clips=view.clips.double()) if self.double else view for view in part.views]
            yield replace(part, views=views).at(0, 0)

    def __call__(self) -> Outcome:
        for parameter in self.parameters():
            parameter.grad = None
        return self.gradients([self.addressed(parts) for parts in next(self.steps)], 0.0)


@pytest.mark.parametrize("chunk, expected", [(None, WholeGradients), (16, WholeGradients), (5, CachedGradients)])
def test_the_way_is_chosen_by_objective_and_chunk(dataset, chunk, expected) -> None:
    assert type(Step(dataset, make_stage(dataset), chunk).gradients) is expected
    alone = replace(make_stage(dataset), objective="test-nearness", objective_options={})
    assert type(Step(dataset, alone, chunk).gradients) is (AccumulatedGradients if chunk == 5 else WholeGradients)


@pytest.mark.parametrize("objective", ["test-nearness", "test-coupled"])
def test_every_objective_gets_the_gradient_of_its_batch(dataset, objective) -> None:
    stage = replace(make_stage(dataset, batch_size=14), objective=objective, objective_options={})
    whole, chunked = (Step(dataset, stage, chunk, "fp64") for chunk in (None, 4))
    expected, found = whole(), chunked()
    assert found.terms.total.item() == pytest.approx(expected.terms.total.item(), rel=1e-12)
    assert found.terms.terms["near"].item() == pytest.approx(expected.terms.total.item(), rel=1e-12)
    assert not found.terms.total.requires_grad and not found.embeddings["z"].requires_grad
    torch.testing.assert_close(found.embeddings["z"], expected.embeddings["z"], rtol=1e-12, atol=1e-12)
    assert torch.equal(found.batch.index, expected.batch.index) and torch.equal(found.batch.labels, expected.batch.labels)
    for name, values in expected.batch.extras.items():
        assert torch.equal(found.batch.extras[name], values)
    # of the loss alone, not of what embeds
    assert chunked.objective.scale.grad is not None
    for ours, theirs in zip(chunked.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_weights_are_merged_once_a_step(dataset, monkeypatch) -> None:
    from fastskel.nn import projections

    calls, merge = [], projections.merge_projections
    monkeypatch.setattr(projections, "merge_projections", lambda *given: (calls.append(1), merge(*given))[1])
    step = Step(dataset, make_stage(dataset), 4)
    step()
    # the layer of each stream, over four chunks and two passes
    assert len(calls) == 2
    assert all(p.grad is not None for p in step.parameters())


def test_draws_of_torchs_generator_are_found(dataset, tmp_path) -> None:
    class Dropping(ENCODERS["usdrl-dste"]):
        def forward(self, view, **options):
            features = super().forward(view, **options)
            return replace(features, temporal_pooled=nn.functional.dropout(features.temporal.amax(1), 0.1))

    stage = replace(make_stage(dataset), chunk=4)

    def begin(stage: Stage) -> tuple[nn.Module, Objective]:
        encoder, objective = START(stage)
        encoder.__class__ = Dropping
        return encoder, objective

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "start", begin)
        with pytest.raises(ValueError, match="embed must give the same embeddings in both passes over a chunk, got 'z_t'"):
            train(stage, dataset, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_capture_is_refused(dataset, monkeypatch) -> None:
    step = Step(dataset, make_stage(dataset), 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="a step in chunks must run outside of a CUDA graph, got a capture"):
        step()


@pytest.mark.parametrize("chunk, batch_size", [(1, 16), (2, 15)])
def test_a_chunk_of_one_sample_is_refused(dataset, tmp_path, chunk, batch_size) -> None:
    message = f"chunk must leave at least 2 samples to each part of a process's batch, got {batch_size} samples in"
    with pytest.raises(ValueError, match=message):
        train(make_stage(dataset, chunk=chunk, batch_size=batch_size), dataset, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="Stage: chunk must be at least 1, got 0"):
        make_stage(dataset, chunk=0)


def test_spoilt_clips_are_named(dataset, tmp_path) -> None:
    frames = dataset.frames.copy()
    for clip in (5, 23):
        frames[dataset.offsets[clip] : dataset.offsets[clip + 1], 0, 3] = np.nan
    stage = make_stage(dataset, chunk=6, batch_size=NUM_CLIPS)
    with pytest.raises(TrainingStopped, match=r"The clips \['clip0000(05', 'clip000023|23', 'clip000005)'\] hold NaN"):
        train(stage, replace(dataset, frames=frames), tmp_path / "run")


def test_collapse_stops(dataset, tmp_path) -> None:
    equal = replace(dataset, frames=np.zeros_like(dataset.frames))
    with pytest.raises(TrainingStopped, match=r"embeddings must differ between samples.*at step 0: collapsed"):
        train(make_stage(dataset, drop_path=0.0, chunk=4), equal, tmp_path / "run")


def test_a_third_more_operations(dataset) -> None:
    # wide enough that products with tokens, not those of the loss, are what counts
    stage = make_stage(dataset, batch_size=32, width=32)
    once, twice = (flops(Step(dataset, stage, chunk)) for chunk in (None, 8))
    assert 1.2 < twice / once < 1.37


def test_memory_is_that_of_a_chunk_and_embeddings(dataset, tmp_path) -> None:
    large = make_synthetic(tmp_path / "large", num_clips=256, num_classes=3, num_subjects=4)

    def peak(batch_size: int, chunk: int | None) -> int:
        step = Step(large, make_stage(large, batch_size=batch_size), chunk)
        # the first one compares its two passes
        step()
        step.steps = step.loader.steps(chunk, step.gradients.passes)
        step.loader.position = 0
        return peak_bytes(step)

    small, whole, chunked = peak(32, 16), peak(256, None), peak(256, 16)
    # two views of z_t, z_s (2 D each) and z_i (4 D); their gradient; at most twice as much in the loss
    embeddings = 2 * 256 * 8 * 16 * 4
    assert chunked - small < 4 * embeddings, (small, chunked, embeddings)
    assert chunked < whole / 4, (whole, chunked)
