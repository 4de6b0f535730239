"""Batches in chunks in 2 processes: the training of one, one exchange of gradients a step, and resuming.

Processes run this file as a script. The numbers are compared in float64, where what is not the same mathematics shows.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from fastskel.data import Loader, PackedDataset, make_synthetic
from fastskel.objectives import MGFD
from fastskel.objectives.objective import Objective, Terms
from fastskel.recipes import RECIPES
from fastskel.train import Stage, checkpoint, chunked
from fastskel.train import pretrain as training
from fastskel.train.runlog import TIMINGS

NUM_CLIPS, BATCH_SIZE, EPOCHS = 18, 8, 3
STEPS = NUM_CLIPS // BATCH_SIZE * EPOCHS
MODULE = sys.modules["fastskel.train.pretrain"]
START, JOIN, ORDER = MODULE.start, chunked.join, Loader.order
INIT, PROJECT, LOSS = MGFD.__init__, MGFD.project, MGFD.loss


def make_stage(dataset: PackedDataset, **settings: Any) -> Stage:
    small = dict(
        width=16, num_layers=1, frames=16, crop_min_frames=16, num_views=2, batch_size=BATCH_SIZE, epochs=EPOCHS, chunk=4,
        milestones=(2,), warmup_steps=2, lr=5e-4, shear=1.0, drop_path=0.3, num_threads=0,
    )  # fmt: skip
    return replace(RECIPES["usdrl-demo"](), **(small | settings)).stages(dataset)[0]


def train(stage: Stage, dataset: PackedDataset, run: Path, *, stop_after: int = 0, **options: Any) -> int:
    """Train in float64; return how often buckets of gradients were exchanged."""
    exchanged, steps = [], []

    def start(stage: Stage) -> tuple[nn.Module, Objective]:
        encoder, objective = START(stage)
        encoder.register_forward_pre_hook(lambda _, inputs: (replace(inputs[0], clips=inputs[0].clips.double()),))
        return encoder.double(), objective.double()

    def join(*given: Any, **named: Any) -> Any:
        module = JOIN(*given, **named)
        if dist.is_initialized():
            module.register_comm_hook(None, lambda _, bucket: (exchanged.append(1), allreduce_hook(None, bucket))[1])
        return module

    def after_step(self: MGFD) -> None:
        steps.append(1)
        if len(steps) == stop_after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "start", start)
        patch.setattr(chunked, "join", join)
        patch.setattr(MGFD, "after_step", after_step)
        try:
            training(stage, dataset, run, device="cpu", progress=False, **options)
        except KeyboardInterrupt:
            assert stop_after
    return len(exchanged)


def by_process(self: Loader, epoch: int) -> Any:
    """Order each batch as two processes with two chunks each take turns: chunk by chunk, all of a process's rows together."""
    return ORDER(self, epoch).reshape(-1, 2, 2, 2).swapaxes(-1, -2).ravel()


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Let one process with four chunks stand for two with two each; running statistics are moved by the first's alone."""
    calls: list[int] = []

    def project(self: MGFD, y_t: Tensor, y_s: Tensor) -> tuple[Tensor, ...]:
        before = [(buffer, buffer.clone()) for buffer in self.buffers()]
        projected = PROJECT(self, y_t, y_s)
        for buffer, value in before if len(calls) % 2 else ():
            buffer.copy_(value)
        calls.append(1)
        return projected

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "order", by_process)
        patch.setattr(MGFD, "project", project)
        yield


@contextlib.contextmanager
def own_parameter() -> Iterator[None]:
    """Give the loss a parameter that embeds nothing."""

    def construct(self: MGFD, *given: Any, **options: Any) -> None:
        INIT(self, *given, **options)
        self.scale = nn.Parameter(torch.ones(()))

    def scaled(self: MGFD, *given: Any) -> Terms:
        terms = LOSS(self, *given)
        return replace(terms, total=terms.total * self.scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MGFD, "__init__", construct)
        patch.setattr(MGFD, "loss", scaled)
        yield


def refusal(stage: Stage, dataset: PackedDataset, run: Path) -> str:
    try:
        train(stage, dataset, run)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def work(rank: int, folder: Path, dataset: PackedDataset) -> dict[str, Any]:
    """What each of two processes does."""
    apart, together = make_stage(dataset), make_stage(dataset, synchronise_norms=True)
    found: dict[str, Any] = {
        "chunked": train(apart, dataset, folder / "apart-2"),
        "together": train(together, dataset, folder / "together-2"),
        "whole": train(replace(apart, chunk=None), dataset, folder / "whole-2"),
    }
    train(replace(apart, checkpoint_steps=3), dataset, folder / "pieces", stop_after=4)
    dist.barrier()
    train(apart, dataset, folder / "pieces", resume=True)
    found["indivisible"] = refusal(replace(apart, chunk=3), dataset, folder / "refused")
    found["single"] = refusal(replace(apart, chunk=2), dataset, folder / "refused")
    # a sample in each process, which its statistics need not be of
    train(replace(together, chunk=2, epochs=1), dataset, folder / "single")
    with own_parameter():
        train(apart, dataset, folder / "own-2")
    return found


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dataset = make_synthetic(folder / f"data-{rank}", num_clips=NUM_CLIPS, num_classes=3, num_subjects=4)
    wait = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2, timeout=wait)
    found = work(rank, folder, dataset)
    dist.destroy_process_group()
    if rank == 0:
        train(make_stage(dataset, synchronise_norms=True), dataset, folder / "together-1")
        with emulated():
            train(make_stage(dataset, chunk=2), dataset, folder / "apart-1")
        with emulated(), own_parameter():
            train(make_stage(dataset, chunk=2), dataset, folder / "own-1")
    found["folder"] = str(folder)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(run_processes) -> list[dict[str, Any]]:
    return run_processes(__file__, 2)


@pytest.fixture(scope="module")
def folder(found) -> Path:
    return Path(found[0]["folder"])


def log_of(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMINGS} for record in records]


@pytest.mark.parametrize("kind", ["together", "apart", "own"])
def test_two_processes_of_two_chunks_are_one(folder, assert_equal_runs, kind) -> None:
    assert len(log_of(folder / f"{kind}-2")) == STEPS
    assert_equal_runs(folder / f"{kind}-2", folder / f"{kind}-1")
    weights = load_file(checkpoint.newest(folder / f"{kind}-1") / "model.safetensors")
    assert ("objective.scale" in weights) == (kind == "own")


def test_gradients_are_exchanged_once_a_step(found) -> None:
    for own in found:
        assert own["chunked"] == own["together"] == own["whole"] > 0
        assert own["chunked"] % STEPS == 0


def test_resumed_bit_for_bit(folder) -> None:
    for file in ("model.safetensors", "optimizer.safetensors", "state.json"):
        pieces, whole = ((checkpoint.newest(folder / name) / file).read_bytes() for name in ("pieces", "apart-2"))
        assert pieces == whole, file
    assert log_of(folder / "pieces") == log_of(folder / "apart-2")


def test_refusals_are_the_same_everywhere(found, folder) -> None:
    starts = {
        "indivisible": "pretrain: chunk must be a multiple of the 2 processes, got 3.",
        "single": "pretrain: chunk must leave at least 2 samples to each part of a process's batch, got 4 samples in 4 parts.",
    }
    for name, start in starts.items():
        said = {own[name] for own in found}
        assert len(said) == 1 and said.pop().startswith(start), (name, found[0][name])
    assert not (folder / "refused").exists()
    assert len(log_of(folder / "single")) == STEPS // EPOCHS


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[3]))
