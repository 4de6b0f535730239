"""Signals that ask a training to stop, checkpoints written beside it, and which of them are kept."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastskel.cli import main
from fastskel.data import PackedDataset, make_synthetic
from fastskel.objectives import MGFD
from fastskel.recipes import RECIPES
from fastskel.train import Preempted, Stage, checkpoint, pretrain, read_checkpoint
from fastskel.train import checkpoint_writer as module
from fastskel.train.checkpoint_writer import CheckpointWriter
from fastskel.train.preemption import stop_on_signals

NUM_CLIPS, STEPS = 16, 6
SMALL = dict(
    width=16, num_layers=1, frames=8, crop_min_frames=8, num_views=2, batch_size=8, epochs=3, milestones=(), warmup_steps=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    return make_synthetic(tmp_path_factory.mktemp("data") / "packed", num_clips=NUM_CLIPS, num_classes=2, num_subjects=2)


def make_stage(dataset: PackedDataset, **settings) -> Stage:
    (stage,) = replace(RECIPES["usdrl-demo"](), **SMALL).stages(dataset)
    return replace(stage, **settings)


def train(stage: Stage, dataset: PackedDataset, out: Path, **options) -> Path:
    return pretrain(stage, dataset, out, device="cpu", progress=False, **options)


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def send(monkeypatch: pytest.MonkeyPatch, number: int, after: int) -> None:
    """Let this process receive a signal in its n-th step from now on."""
    left = [after]

    def after_step(self: MGFD) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(MGFD, "after_step", after_step)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_it_saves_and_goes_on_bit_for_bit(dataset, tmp_path, monkeypatch, number) -> None:
    before = signal.getsignal(number)
    stage = make_stage(dataset)
    train(stage, dataset, tmp_path / "whole")
    send(monkeypatch, number, 3)
    with pytest.raises(Preempted, match=rf"asked to stop by {signal.Signals(number).name}; saved .*step-000000003. Resume"):
        train(stage, dataset, tmp_path / "parts")
    monkeypatch.undo()
    # in the middle of an epoch, complete, and the handlers are as they were
    assert steps_of(tmp_path / "parts") == [2, 3]
    assert signal.getsignal(number) == before
    train(stage, dataset, tmp_path / "parts", resume=True)
    one, other = (read_checkpoint(tmp_path / name, optimizer=True) for name in ("whole", "parts"))
    assert one.state == other.state and one.state["step"] == STEPS
    for kind in ("model", "optimizer"):
        mine, theirs = getattr(one, kind), getattr(other, kind)
        assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []


def test_asked_in_the_last_step_it_ends_as_ever(dataset, tmp_path, monkeypatch) -> None:
    send(monkeypatch, signal.SIGTERM, STEPS)
    assert train(make_stage(dataset), dataset, tmp_path / "run").name == f"step-{STEPS:09d}"


def test_exit_code_and_starting_again(dataset, tmp_path, monkeypatch, capsys) -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if not isinstance(value, tuple)]
    command = ["pretrain", "usdrl-demo", str(dataset.path), *options, "--milestones", "9", "--quiet"]
    command += ["--out", str(tmp_path / "run")]
    # the same command whatever happened before: a run that begins, one that goes on, one that is complete
    command.append("--resume-if-started")
    send(monkeypatch, signal.SIGTERM, 3)
    assert main(command) == 75
    assert "stopped: pretrain: asked to stop by SIGTERM; saved" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(command) == 0
    assert main(command) == 0
    assert steps_of(tmp_path / "run")[-1] == STEPS


def test_without_the_main_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter() -> None:
        with stop_on_signals() as request:
            seen.append((signal.getsignal(signal.SIGTERM), request.anywhere()))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def test_the_writer_copies_before_it_returns(tmp_path, monkeypatch) -> None:
    go = threading.Event()
    original = module.save_checkpoint

    def slow(*arguments, **options):
        assert go.wait(10)
        return original(*arguments, **options)

    monkeypatch.setattr(module, "save_checkpoint", slow)
    weight, moment = torch.zeros(3), torch.zeros(3)
    with CheckpointWriter(tmp_path, 1) as writer:
        path = writer.save(1, {"encoder.w": weight}, {"encoder.w/m": moment}, {"best": None})
        # what the next step does to the weights is not in it
        weight += 1
        moment += 1
        assert not path.exists()
        go.set()
    found = read_checkpoint(path, optimizer=True)
    assert found.model["encoder.w"].tolist() == [0, 0, 0] and found.optimizer["encoder.w/m"].tolist() == [0, 0, 0]


def test_the_writer_says_at_the_next_checkpoint_what_went_wrong(tmp_path, monkeypatch) -> None:
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = CheckpointWriter(tmp_path, 1)
    monkeypatch.setattr(module, "save_checkpoint", full)
    writer.save(1, {}, {}, {})
    with pytest.raises(OSError, match="No space left on device"):
        writer.save(2, {}, {}, {})
    # told once
    writer.wait()
    with pytest.raises(OSError, match="No space left"), writer:
        writer.save(3, {}, {}, {})


def test_a_full_disk_is_told_in_one_line(dataset, tmp_path, capsys) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    settings = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items() if value != ()]
    command = ["pretrain", "usdrl-demo", str(dataset.path), "--out", str(tmp_path / "run"), "--quiet", "--device=cpu", *settings]
    # stands for the disk: less than the weights take
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        code = main(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert code == 2 and "could not be written: " in error and "File too large" in error and error.count("\n") == 1
    assert steps_of(tmp_path / "run") == []
    # with room again the run goes on, from its beginning
    assert main([*command, "--resume"]) == 0
    assert steps_of(tmp_path / "run")[-1] == STEPS


def test_what_ended_a_training_comes_before_what_kept_its_checkpoint_from_the_disk(tmp_path, monkeypatch) -> None:
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_checkpoint", full)
    writer = CheckpointWriter(tmp_path, 1)
    writer.save(4, {}, {}, {})
    error = KeyError("the training's own")
    with pytest.warns(UserWarning, match="the last checkpoint was not written: .*No space"):
        writer.__exit__(KeyError, error, None)


def test_training_goes_on_while_a_checkpoint_is_written(dataset, tmp_path, monkeypatch) -> None:
    original, steps = module.save_checkpoint, []

    def slow(folder, step, *arguments, **options):
        deadline = time.monotonic() + 10
        # the first one waits until the step after it has been taken
        while step == 1 and len(steps) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert step != 1 or len(steps) >= 2
        return original(folder, step, *arguments, **options)

    monkeypatch.setattr(module, "save_checkpoint", slow)
    monkeypatch.setattr(MGFD, "after_step", lambda self: steps.append(1))
    train(make_stage(dataset, checkpoint_steps=1), dataset, tmp_path / "run")
    assert steps_of(tmp_path / "run") == [STEPS - 1, STEPS]


def test_more_checkpoints_are_kept_if_asked_for(dataset, tmp_path) -> None:
    train(make_stage(dataset, checkpoint_steps=1, keep_checkpoints=4), dataset, tmp_path / "run")
    assert steps_of(tmp_path / "run") == [3, 4, 5, 6]


@pytest.mark.parametrize("name, best", [("score", 4), ("-score", 2)])
def test_the_best_checkpoint_is_kept(dataset, tmp_path, name: str, best: int) -> None:
    stage = make_stage(dataset, epochs=5, keep_checkpoints=1, keep_best=name)
    scores = [0.1, 0.7, 0.4, 0.7, float("nan")]

    def monitor(encoder: torch.nn.Module, epoch: int) -> dict[str, float]:
        return {"score": scores[epoch]}

    train(stage, dataset, tmp_path / "run", monitors=[monitor])
    # an equal one later is not better
    assert steps_of(tmp_path / "run") == [best, 10]
    found = read_checkpoint(tmp_path / "run", best=True)
    assert found.state["step"] == best
    assert found.state["best"] == {"figure": name, "value": scores[best // 2 - 1], "step": best}
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len([record for record in log if "score" in record]) == 5


def test_the_best_is_known_after_resuming(dataset, tmp_path, monkeypatch) -> None:
    stage = make_stage(dataset, epochs=4, keep_checkpoints=1, keep_best="score")
    send(monkeypatch, signal.SIGTERM, 5)
    monitors = [lambda encoder, epoch: {"score": -float(epoch)}]
    with pytest.raises(Preempted):
        train(stage, dataset, tmp_path / "run", monitors=monitors)
    monkeypatch.undo()
    train(stage, dataset, tmp_path / "run", monitors=monitors, resume=True)
    assert steps_of(tmp_path / "run") == [2, 8]


def test_what_a_run_resumed_from_is_let_go(dataset, tmp_path, monkeypatch) -> None:
    training, read, held = sys.modules["fastskel.train.pretrain"], [], []

    def note(*arguments, **options) -> checkpoint.Checkpoint:
        found = read_checkpoint(*arguments, **options)
        read.append(weakref.ref(found))
        return found

    send(monkeypatch, signal.SIGTERM, 3)
    with pytest.raises(Preempted):
        train(make_stage(dataset), dataset, tmp_path / "run")
    monkeypatch.setattr(training, "read_checkpoint", note)
    monkeypatch.setattr(MGFD, "after_step", lambda self: held.append(read[0]()))
    train(make_stage(dataset), dataset, tmp_path / "run", resume=True)
    assert held == [None] * 3


def test_unknown_best_figure(dataset, tmp_path) -> None:
    stage = make_stage(dataset, keep_best="top1")
    with pytest.raises(ValueError, match="monitors must be given for keep_best 'top1', got none"):
        train(stage, dataset, tmp_path / "run")
    with pytest.raises(ValueError, match=r"keep_best must be one of the monitors' \['score'\], got 'top1'"):
        train(stage, dataset, tmp_path / "run", monitors=[lambda encoder, epoch: {"score": 1.0}])
    path = train(make_stage(dataset), dataset, tmp_path / "other")
    with pytest.raises(ValueError, match="must name the run's best checkpoint, got none"):
        read_checkpoint(path, best=True)
    assert checkpoint.newest(tmp_path / "other") == path


def test_sigkill_at_random_moments_changes_no_bit() -> None:
    # the record of many kills is in docs/proofs.md
    script = Path(__file__).with_name("kill_proof.py")
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "3", "--epochs", "8"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("3 kills") and "bit for bit" in done.stdout
