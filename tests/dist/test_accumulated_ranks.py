"""A loss that is a mean over samples, in chunks of unequal size in 2 processes: the training of one process and a whole batch.

Processes run this file as a script. The numbers are compared in float64, where what is not the same mathematics shows.
"""

from __future__ import annotations

import datetime
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from fastskel.data import PackedDataset, make_synthetic
from fastskel.data.batch import concat_views
from fastskel.objectives.objective import OBJECTIVES, Objective, Terms
from fastskel.recipes import RECIPES
from fastskel.train import Stage, checkpoint, chunked
from fastskel.train import pretrain as training
from fastskel.train.runlog import TIMINGS

# 7 samples in each of 2 processes, at most 3 at a time: 3, 2, 2; the first 2 of 30 clips are left out of each epoch
NUM_CLIPS, BATCH_SIZE, CHUNK, EPOCHS = 30, 14, 6, 3
STEPS = NUM_CLIPS // BATCH_SIZE * EPOCHS
MODULE = sys.modules["fastskel.train.pretrain"]
START, JOIN = MODULE.start, chunked.join


class Apart(Objective):
    """A mean over samples of how far views are from each other; one parameter is the loss's own, and one has no influence."""

    needs_whole_batch = False

    def __init__(self, encoder, views) -> None:
        super().__init__()
        self.views = tuple(views)
        self.head = nn.Linear(encoder.num_features, 4)
        self.scale, self.idle = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(1.0))

    def embed(self, encoder, batch):
        z = self.head(encoder(concat_views(batch.views)).pooled)
        return {"z": z.view(len(batch.views), len(batch), -1)}

    def loss(self, embeddings, batch, progress):
        z = embeddings["z"]
        near, size = (z - z[:1]).square().mean(), (z.square().mean((0, 2)) - 1).square().mean()
        return Terms(self.scale * near + size, {"near": near.detach(), "size": size.detach()})


def make_stage(dataset: PackedDataset, **settings: Any) -> Stage:
    small = dict(
        width=16, num_layers=1, frames=16, crop_min_frames=16, num_views=2, batch_size=BATCH_SIZE, epochs=EPOCHS,
        milestones=(2,), warmup_steps=2, lr=5e-4, shear=1.0, drop_path=0.3, num_threads=0,
    )  # fmt: skip
    (stage,) = replace(RECIPES["usdrl-demo"](), **small).stages(dataset)
    return replace(stage, objective="test-apart", objective_options={}, **settings)


def train(stage: Stage, dataset: PackedDataset, run: Path, **options: Any) -> int:
    """Train in float64; return how often buckets of gradients were exchanged."""
    exchanged: list[int] = []

    def start(stage: Stage) -> tuple[nn.Module, Objective]:
        encoder, objective = START(stage)
        encoder.register_forward_pre_hook(lambda _, inputs: (replace(inputs[0], clips=inputs[0].clips.double()),))
        return encoder.double(), objective.double()

    def join(*given: Any, **named: Any) -> Any:
        module = JOIN(*given, **named)
        if dist.is_initialized():
            module.register_comm_hook(None, lambda _, bucket: (exchanged.append(1), allreduce_hook(None, bucket))[1])
        return module

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # embeddings of four numbers
        warnings.filterwarnings("ignore", "pretrain: the embeddings' effective rank should be")
        patch.setattr(MODULE, "start", start)
        patch.setattr(chunked, "join", join)
        training(stage, dataset, run, device="cpu", progress=False, **options)
    return len(exchanged)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    OBJECTIVES.add("test-apart", Apart)
    dataset = make_synthetic(folder / f"data-{rank}", num_clips=NUM_CLIPS, num_classes=3, num_subjects=4)
    wait = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2, timeout=wait)
    stage = make_stage(dataset)
    found: dict[str, Any] = {
        "whole": train(stage, dataset, folder / "whole-2"),
        "chunked": train(replace(stage, chunk=CHUNK), dataset, folder / "chunked-2"),
    }
    dist.destroy_process_group()
    if rank == 0:
        train(stage, dataset, folder / "whole-1")
        train(replace(stage, chunk=4), dataset, folder / "chunked-1")
    found["folder"] = str(folder)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(run_processes) -> list[dict[str, Any]]:
    return run_processes(__file__, 2)


def log_of(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMINGS} for record in records]


@pytest.mark.parametrize("kind", ["chunked-2", "whole-2", "chunked-1"])
def test_it_is_the_training_of_one_process_and_a_whole_batch(found, kind) -> None:
    folder = Path(found[0]["folder"])
    ours, theirs = (log_of(folder / name) for name in (kind, "whole-1"))
    assert len(ours) == len(theirs) == STEPS
    for record, other in zip(ours, theirs, strict=True):
        assert record == pytest.approx(other, rel=1e-10)
    ours, theirs = (load_file(checkpoint.newest(folder / name) / "model.safetensors") for name in (kind, "whole-1"))
    assert ours.keys() == theirs.keys() and theirs["objective.idle"] == 1 and theirs["objective.scale"] != 1.5
    for name, value in theirs.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(
            ours[name], value, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_gradients_are_exchanged_once_a_step(found) -> None:
    for own in found:
        assert own["chunked"] == own["whole"] > 0
        assert own["chunked"] % STEPS == 0


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[3]))
