"""Pretraining in 1, 2 and 4 processes, and stopped and resumed in another number of them; and how processes end together.

Processes run this file as a script. The numbers are compared in float64, where what is not the same mathematics shows.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastskel.data import PackedDataset, make_synthetic, open_dataset
from fastskel.objectives import MGFD
from fastskel.objectives.objective import Objective
from fastskel.recipes import RECIPES
from fastskel.train import Stage, TrainingStopped, checkpoint
from fastskel.train import pretrain as training
from fastskel.train.processes import processes
from fastskel.train.runlog import TIMINGS

WORLDS = (1, 2, 4)
# three clips are left out of each epoch
NUM_CLIPS, BATCH_SIZE, EPOCHS, STOPPED_AFTER = 27, 8, 7, 10
STEPS = NUM_CLIPS // BATCH_SIZE * EPOCHS
# relative: most of a gradient is a small difference of large numbers, and processes add in another order
GRADIENT_NORM = 1e-8
MODULE = sys.modules["fastskel.train.pretrain"]
START = MODULE.start


def make_stage(dataset: PackedDataset, **settings: Any) -> Stage:
    small = dict(
        width=16, num_layers=1, frames=16, crop_min_frames=16, num_views=2, batch_size=BATCH_SIZE, epochs=EPOCHS,
        milestones=(4,), warmup_steps=2, lr=5e-4, shear=1.0, drop_path=0.3, num_threads=0,
    )  # fmt: skip
    return replace(RECIPES["usdrl-demo"](), **(small | settings)).stages(dataset)[0]


def make_data(folder: Path) -> PackedDataset:
    return make_synthetic(folder, num_clips=NUM_CLIPS, num_classes=3, num_subjects=4)


def train(stage: Stage, dataset: PackedDataset, run: Path, *, stop_after: int = 0, **options: Any) -> dict[str, Any]:
    """Train in float64; return the samples of each step, the running statistics here, and the end of the run."""
    seen: dict[int, Tensor] = {}
    norms: dict[str, Tensor] = {}

    def start(stage: Stage) -> tuple[nn.Module, Objective]:
        encoder, objective = START(stage)

        def widen(_: nn.Module, inputs: tuple) -> tuple:
            (view,) = inputs
            seen[int(view.address.step)] = view.address.index[view.address.view == 0].clone()
            return (replace(view, clips=view.clips.double()),)

        encoder.register_forward_pre_hook(widen)
        norms.update(objective.double().named_buffers())
        return encoder.double(), objective

    def after_step(self: MGFD) -> None:
        if stop_after and len(seen) == stop_after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "start", start)
        patch.setattr(MGFD, "after_step", after_step)
        try:
            training(stage, dataset, run, device="cpu", progress=False, **options)
        except KeyboardInterrupt:
            assert stop_after
    return {"seen": seen, "norms": norms}


def grouped_by_process(world: int) -> Any:
    """Project as `world` processes would: the rows of each by themselves, running statistics moved by the first's alone."""
    project = MGFD.project

    def by_process(self: MGFD, y_t: Tensor, y_s: Tensor) -> tuple[Tensor, ...]:
        parts, kept = [], None
        for rank in range(world):
            parts.append(project(self, y_t[:, rank::world], y_s[:, rank::world]))
            kept = kept or {name: value.clone() for name, value in self.named_buffers()}
        for name, value in self.named_buffers():
            value.copy_(kept[name])
        # back into the order of the batch
        return tuple(torch.stack(z, 2).flatten(1, 2) for z in zip(*parts, strict=True))

    return by_process


def refusal(stage: Stage, dataset: PackedDataset, run: Path, kind: type[Exception] = ValueError, **options: Any) -> str:
    try:
        train(stage, dataset, run, **options)
    except kind as error:
        return str(error)
    return "nothing was refused"


def work(rank: int, world: int, folder: Path, dataset: PackedDataset) -> dict[str, Any]:
    """What each process of a group of `world` does."""
    together, apart = make_stage(dataset, synchronise_norms=True), make_stage(dataset)
    found = {"together": train(together, dataset, folder / f"together-{world}")}
    if world == 1:
        for number in WORLDS[1:]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(MGFD, "project", grouped_by_process(number))
                found[f"apart {number}"] = train(apart, dataset, folder / f"apart-{number}-emulated")
    else:
        found["apart"] = train(apart, dataset, folder / f"apart-{world}")
    if world == 2:
        # a checkpoint within an epoch, and one step beyond it
        often = replace(together, checkpoint_steps=4)
        train(often, dataset, folder / "stopped", stop_after=STOPPED_AFTER)
        if rank == 0:
            for number in WORLDS:
                shutil.copytree(folder / "stopped", folder / f"resumed-{number}")
    if dist.is_initialized():
        dist.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found["resumed"] = train(together, dataset, folder / f"resumed-{world}", resume=True)
    found["warned"] = [str(warning.message) for warning in caught if warning.category is UserWarning]
    if world == 4:
        train(replace(together, checkpoint_steps=4), dataset, folder / "again-4", stop_after=STOPPED_AFTER)
        dist.barrier()
        train(together, dataset, folder / "again-4", resume=True)
        odd = replace(together, batch_size=10)
        found["indivisible"] = refusal(odd, dataset, folder / "refused")
        found["exists"] = refusal(together, dataset, folder / "together-4")
        found["unlike"] = refusal(replace(together, lr=1e-3 * (1 + rank % 2)), dataset, folder / "refused")
        single = replace(together, batch_size=4)
        found["alone"] = train(replace(single, epochs=1), dataset, folder / "alone")
        found["refused left"] = (folder / "refused").exists()
        wild = replace(together, lr=1e30, warmup_steps=0, milestones=())
        found["diverged"] = refusal(wild, dataset, folder / "wild", TrainingStopped)
        damaged = make_data(folder / f"damaged-{rank}")
        frames = np.load(damaged.path / "frames.npy", mmap_mode="r+")
        for clip in (5, 6):
            frames[damaged.offsets[clip] : damaged.offsets[clip + 1], 0, 3] = np.nan
        frames.flush()
        found["spoilt"] = refusal(together, open_dataset(damaged.path), folder / "spoilt", TrainingStopped)
    return found


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dataset, found = make_data(folder / f"data-{rank}"), {}
    for world in (2, 4, 1):
        if rank >= world:
            continue
        if world > 1:
            wait = datetime.timedelta(seconds=120)
            dist.init_process_group("gloo", f"file://{folder}/meeting-{world}", rank=rank, world_size=world, timeout=wait)
        found[world] = work(rank, world, folder, dataset)
        if world > 1:
            dist.destroy_process_group()
    found["folder"] = str(folder)
    torch.save(found, folder / f"{rank}.pt")


def fail(kind: str, folder: Path) -> None:
    """Train in the processes that the environment names, until the second step of one of them fails."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dataset = make_data(folder / f"data-{rank}")
    steps = 0

    def after_step(self: MGFD) -> None:
        nonlocal steps
        steps += 1
        if steps == 2:
            (folder / f"step-of-{rank}").touch()
            if kind == "killed" and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == f"raised {rank}":
                raise ValueError("the disk is on fire")

    MGFD.after_step = after_step
    training(make_stage(dataset), dataset, folder / "run", device="cpu", progress=False)


@pytest.fixture(scope="module")
def found(run_processes) -> dict[int, list[dict[str, Any]]]:
    """What the processes found, by their number and rank."""
    by_rank = run_processes(__file__, 4)
    results: dict[int, list[dict[str, Any]]] = {world: [by_rank[rank][world] for rank in range(world)] for world in WORLDS}
    results[0] = [{"folder": Path(by_rank[0]["folder"])}]
    return results


@pytest.fixture(scope="module")
def folder(found) -> Path:
    return found[0][0]["folder"]


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("world", [2, 4])
def test_same_training_with_synchronised_norms(found, folder, assert_equal_runs, world) -> None:
    assert len(log_of(folder / "together-1")) == STEPS
    assert_equal_runs(folder / f"together-{world}", folder / "together-1", gradient_norm=GRADIENT_NORM)
    # synchronised statistics run alike everywhere
    for own in found[world][1:]:
        for name, value in found[world][0]["together"]["norms"].items():
            assert torch.equal(own["together"]["norms"][name], value)


@pytest.mark.parametrize("world", [2, 4])
def test_norms_of_each_process_are_those_of_its_rows(found, folder, assert_equal_runs, world) -> None:
    assert_equal_runs(folder / f"apart-{world}", folder / f"apart-{world}-emulated", gradient_norm=GRADIENT_NORM)
    # and another training than with all rows
    alone, apart = (log_of(folder / name)[0]["loss"] for name in ("together-1", f"apart-{world}"))
    assert abs(alone - apart) > 1e-4


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", ["together", "resumed"])
def test_processes_share_every_batch_of_one(found, world, kind) -> None:
    ranks = [own[kind]["seen"] for own in found[world]]
    assert list(ranks[0]) == list(range(8 if kind == "resumed" else 0, STEPS))
    for step in ranks[0]:
        turns = torch.stack([seen[step] for seen in ranks], 1).flatten()
        assert torch.equal(turns, found[1][0]["together"]["seen"][step])


@pytest.mark.parametrize("world", [1, 4])
def test_resumed_in_another_number_of_processes(found, folder, assert_equal_runs, world) -> None:
    assert min(found[world][0]["resumed"]["seen"]) == 8
    assert ["goes on with other processes than" in text for text in found[world][0]["warned"]] == [True]
    assert_equal_runs(folder / f"resumed-{world}", folder / "together-1", gradient_norm=GRADIENT_NORM)
    config = json.loads((folder / f"resumed-{world}" / "config.json").read_text())
    assert (config["processes"], [session["processes"] for session in config["resumed"]]) == (2, [world])
    state = json.loads((checkpoint.newest(folder / f"resumed-{world}") / "state.json").read_text())
    assert (state["loader"]["world_size"], state["loader"]["batch_size"]) == (world, BATCH_SIZE // world)


@pytest.mark.parametrize("names", [("resumed-2", "together-2"), ("again-4", "together-4")], ids=["two", "four"])
def test_resumed_in_as_many_processes_bit_for_bit(found, folder, names) -> None:
    assert found[2][0]["warned"] == []
    runs = [folder / name for name in names]
    for file in ("model.safetensors", "optimizer.safetensors", "state.json"):
        resumed, whole = ((checkpoint.newest(run) / file).read_bytes() for run in runs)
        assert resumed == whole, file
    resumed, whole = ([{**record, **dict.fromkeys(TIMINGS)} for record in log_of(run)] for run in runs)
    assert resumed == whole


def test_refusals_are_the_same_everywhere(found, folder) -> None:
    starts = {
        "indivisible": "pretrain: batch_size must be a multiple of the 4 processes, got 10.",
        "exists": f"pretrain: {folder}/together-4 must be new, got the folder of another run.",
        "unlike": "pretrain: all processes must train the same, got other settings than rank 0's by rank: "
        "{1: ['stage'], 3: ['stage']}.",
        "diverged": "pretrain: the loss and its gradient must stay finite, got ",
        "spoilt": "pretrain: the loss and its gradient must stay finite, got nan at step 0",
    }
    for name, start in starts.items():
        said = {own[name] for own in found[4]}
        assert len(said) == 1 and said.pop().startswith(start), (name, found[4][0][name])
    assert not found[4][0]["refused left"]
    # one sample in each process, which its statistics need not be of
    assert len(found[4][0]["alone"]["seen"]) == NUM_CLIPS // 4


def test_spoilt_clips_of_all_processes_are_named(found) -> None:
    order = found[1][0]["together"]["seen"][0].tolist()
    names = [f"clip{clip:06d}" for clip in order if clip in (5, 6)]
    assert names, "the first batch must have a spoilt clip"
    assert f"The clips {names} hold NaN or infinity" in found[4][0]["spoilt"]


def environment(**changes: str) -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, **changes}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize("kind", ["raised 0", "raised 1", "killed"])
def test_a_failure_ends_all(tmp_path, kind) -> None:
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, __file__, "fail", kind, str(tmp_path)]
    running = [
        subprocess.Popen(
            command, env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **place), stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "step-of-1").exists() and time.monotonic() < end:
            time.sleep(0.05)
        # far below the minutes after which a process gives up waiting
        said = [process.communicate(timeout=60)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode for process in running)
    if kind == "killed":
        assert running[1].returncode == -signal.SIGKILL
        assert "TrainingStopped: pretrain: all processes must go on, got the end of a process that left no word" in said[0]
        return
    failed = int(kind[-1])
    assert said[failed].rstrip().endswith("ValueError: the disk is on fire")
    word = f"rank {failed} (ValueError: the disk is on fire)"
    assert f"TrainingStopped: pretrain: all processes must go on, got the end of {word}" in said[1 - failed]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "must be set together, got no LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0"}, "must be set together, got no LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        (dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"), "2"), "RANK must be in 0 .."),
    ],
    ids=["no address", "no world", "no such rank"],
)
def test_half_an_environment_is_refused(monkeypatch, place, message) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), processes("cpu"):
        pass


def test_a_process_that_nobody_meets_says_so(monkeypatch) -> None:
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.modules["fastskel.train.processes"], "TIMEOUT", datetime.timedelta(seconds=0.5))
    with pytest.raises(TrainingStopped, match="all 2 processes must meet, got .*MASTER_PORT"), processes("cpu"):
        pass


def test_torchrun(tmp_path) -> None:
    data, run = make_data(tmp_path / "data").path, tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    small = "--width 16 --num-layers 1 --frames 16 --crop-min-frames 16 --num-views 2 --batch-size 8 --epochs 1"
    command = [*launcher, "-m", "fastskel", "pretrain", "usdrl-demo", str(data), "--out", str(run), *small.split()]
    done = subprocess.run(
        [*command, "--synchronise-norms", "--device", "cpu"], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained 1 epochs") == 1
    assert done.stderr.count("| 0/3 [") == 1
    assert [record["step"] for record in log_of(run)] == [0, 1, 2]
    config = json.loads((run / "config.json").read_text())
    assert (config["processes"], config["identity"]["stage"]["synchronise_norms"]) == (2, True)


if __name__ == "__main__":
    if sys.argv[1] == "fail":
        fail(sys.argv[2], Path(sys.argv[3]))
    else:
        main(int(sys.argv[1]), Path(sys.argv[3]))
