"""Multi-modal pretraining in two processes, whole and in chunks, is that of one.

Processes run this file as a script. The numbers are compared in float64, where what is not the same mathematics shows.
"""

from __future__ import annotations

import datetime
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from fastskel.data import PackedDataset, make_synthetic
from fastskel.objectives.objective import Objective
from fastskel.recipes import RECIPES
from fastskel.train import Stage, checkpoint
from fastskel.train import pretrain as training

NUM_CLIPS, BATCH_SIZE, EPOCHS = 18, 8, 2
MODULE = sys.modules["fastskel.train.pretrain"]
START = MODULE.start
KINDS: dict[str, dict[str, Any]] = {"whole": {}, "chunks": {"chunk": 4, "encoder": "sttr"}}


def make_stage(dataset: PackedDataset, **settings: Any) -> Stage:
    small = dict(
        consistency="multi-modal", width=16, num_layers=1, frames=16, crop_min_frames=16, batch_size=BATCH_SIZE, epochs=EPOCHS,
        milestones=(1,), warmup_steps=2, lr=5e-4, drop_path=0.3, num_threads=0, synchronise_norms=True,
    )  # fmt: skip
    return replace(RECIPES["usdrl-demo"](), **(small | settings)).stages(dataset)[0]


def train(stage: Stage, dataset: PackedDataset, run: Path) -> None:
    def start(stage: Stage) -> tuple[nn.Module, Objective]:
        encoder, objective = START(stage)
        encoder.register_forward_pre_hook(lambda _, inputs: (replace(inputs[0], clips=inputs[0].clips.double()),))
        return encoder.double(), objective.double()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "start", start)
        training(stage, dataset, run, device="cpu", progress=False)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dataset = make_synthetic(folder / f"data-{rank}", num_clips=NUM_CLIPS, num_classes=3, num_subjects=4)
    wait = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2, timeout=wait)
    for kind, settings in KINDS.items():
        train(make_stage(dataset, **settings), dataset, folder / f"{kind}-2")
    dist.destroy_process_group()
    if rank == 0:
        for kind, settings in KINDS.items():
            # statistics over the rows of a chunk of both processes are those of the chunk of one
            train(make_stage(dataset, **settings), dataset, folder / f"{kind}-1")
    torch.save({"folder": str(folder)}, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def folder(run_processes) -> Path:
    return Path(run_processes(__file__, 2)[0]["folder"])


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(folder, kind) -> None:
    texts = [(folder / f"{kind}-{world}" / "log.jsonl").read_text() for world in (1, 2)]
    logs = [[json.loads(line) for line in text.splitlines()] for text in texts]
    assert len(logs[0]) == NUM_CLIPS // BATCH_SIZE * EPOCHS
    for one, two in zip(*logs, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-10)
    expected, found = (load_file(checkpoint.newest(folder / f"{kind}-{world}") / "model.safetensors") for world in (1, 2))
    assert {name.split(".")[1] for name in found} >= {"bone_emb", "motion_emb", "fusion"}
    for name, value in expected.items():
        # a bias before BatchNorm has no gradient but rounding, which Adam divides by 1e-8; running means follow the bias
        cancelled = name.endswith((".0.bias", ".3.bias", ".running_mean")) and "_proj." in name
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-8 if cancelled else 1e-10)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[3]))
