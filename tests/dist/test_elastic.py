"""Trainings of two processes that lose one, or are asked to stop: started again by torchrun, they end with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastskel.data import make_synthetic
from fastskel.train import checkpoint
from fastskel.train.runlog import TIMINGS

# long enough to be hit in the middle, about half a second on an idle core
EPOCHS, STEPS = 30, 60
PATIENCE_SECONDS = 120


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "packed"
    make_synthetic(folder, num_clips=16, num_classes=2, num_subjects=2)
    return folder


def launch(data: Path, run: Path, *, restarts: int = 0) -> subprocess.Popen[str]:
    """Start two processes under torchrun, with the command that works whatever happened before."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts),
        "--monitor-interval", "0.1", "-m", "fastskel", "pretrain", "usdrl-demo", str(data), "--out", str(run), "--quiet",
        "--resume-if-started", "--epochs", str(EPOCHS), "--batch-size", "8", "--width", "16", "--num-layers", "1",
        "--frames", "8", "--crop-min-frames", "8", "--num-views", "2", "--milestones", "20", "--checkpoint-steps", "1",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def workers(agent: int) -> list[int]:
    """Processes that a torchrun started, by their age."""
    children = Path(f"/proc/{agent}/task/{agent}/children")
    return [int(child) for child in children.read_text().split()]


def wait_for(run: Path, steps: int, process: subprocess.Popen[str]) -> None:
    """Wait until a training has taken so many steps."""
    deadline, log = time.monotonic() + PATIENCE_SECONDS, run / "log.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if log.is_file() and len(log.read_text().splitlines()) >= steps:
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"{steps} steps were not reached: {process.communicate()[0][-3000:]}")


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, output


def bits(run: Path) -> dict[str, bytes]:
    """What must not depend on what happened on the way."""
    last = checkpoint.newest(run)
    assert last is not None and last.name == f"step-{STEPS:09d}"
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in record.items() if key not in TIMINGS} for record in log]
    return {**{path.name: path.read_bytes() for path in last.iterdir()}, "log": json.dumps(kept).encode()}


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    run = tmp_path_factory.mktemp("runs") / "whole"
    status, output = finish(launch(data, run))
    assert status == 0, output
    return bits(run)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds torchrun's processes in /proc")
def test_killed_processes_are_started_again_by_torchrun(data, tmp_path, undisturbed) -> None:
    process = launch(data, tmp_path / "run", restarts=2)
    # one after the other
    for rank, steps in ((0, 15), (1, 35)):
        wait_for(tmp_path / "run", steps, process)
        os.kill(workers(process.pid)[rank], signal.SIGKILL)
    status, output = finish(process)
    assert status == 0, output
    assert bits(tmp_path / "run") == undisturbed
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    first, second = (session["step"] for session in config["resumed"])
    # the checkpoint of the last logged step or two may not have been complete
    assert 15 - 2 <= first < STEPS and max(first, 35 - 2) <= second <= STEPS


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds torchrun's processes in /proc")
def test_one_process_that_is_asked_to_stop_stops_all(data, tmp_path, undisturbed) -> None:
    process = launch(data, tmp_path / "run")
    wait_for(tmp_path / "run", 20, process)
    os.kill(workers(process.pid)[1], signal.SIGUSR1)
    status, output = finish(process)
    assert status == 1, output
    # torchrun shows the code of the process that ended first; both have the same
    assert "exitcode  : 75" in output and "asked to stop by SIGUSR1; saved" in output, output
    steps = int(checkpoint.newest(tmp_path / "run").name.removeprefix("step-"))
    assert 20 <= steps < STEPS
    status, output = finish(launch(data, tmp_path / "run"))
    assert status == 0, output
    assert bits(tmp_path / "run") == undisturbed
