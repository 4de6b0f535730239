"""Processes that hang, each in another way: the others name them and end. This file is also what the processes run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastskel.train import heartbeat
from fastskel.train.heartbeat import Beat, Heartbeat, behind
from fastskel.train.processes import processes

PATIENCE = 4.0


def say(rank: int, marks: int) -> Beat:
    return Beat(7, marks, "reads data", 4, f"node{rank}", 100 + rank)


def test_who_is_behind() -> None:
    beats = [say(rank, marks) for rank, marks in enumerate((9, 8, 9, 9))]
    late, silent = (f"rank {r} (host node{r}, process {100 + r}: reads data in step 4" for r in (1, 3))
    assert behind(beats, [0, 0, 0, 25.2], 0) == [f"{late})", f"{silent}, silent for 25 s)"]
    # who hangs waits for nobody, and so does a process among equals
    assert behind(beats, [0.0] * 4, 1) == []
    assert behind([say(0, 9), say(1, 9)], [0.0, 0.0], 0) == []
    # a process that is late itself is not waited for by itself
    assert behind([say(0, 8), say(1, 9)], [30.0, 0.0], 0) == []


def test_alone_there_is_no_thread() -> None:
    before = threading.active_count()
    heart = Heartbeat()
    heart.mark("embeds", step=3, long=True)
    assert threading.active_count() == before
    heart.close()


def live(kind: str, folder: Path) -> None:
    """Meet the other processes twice in each of some rounds; rank 1, or 0, fails to come as `kind` says."""
    heartbeat.BEAT_SECONDS, heartbeat.PATIENCE_SECONDS, heartbeat.LONG_PATIENCE_SECONDS = 0.3, PATIENCE, 2 * PATIENCE
    rank = int(os.environ["RANK"])
    import torch.distributed as dist

    with processes("cpu") as (_, heart):
        for step in range(4):
            heart.mark("reads data", step=step)
            if step == 2 and kind == f"sleeps {rank}":
                time.sleep(60)
            if step == 2 and kind == f"stops {rank}":
                # the others know what it said last
                time.sleep(5 * heartbeat.BEAT_SECONDS)
                os.kill(os.getpid(), signal.SIGSTOP)
            if step == 2 and kind == "slow":
                # longer than patience, but all of them
                time.sleep(1.5 * PATIENCE)
            heart.mark("shares")
            dist.barrier()
    names = sorted(thread.name for thread in threading.enumerate())
    (folder / f"{rank}.txt").write_text(", ".join(name for name in names if name.startswith("fastskel")))


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(kind: str, folder: Path, world: int) -> list[subprocess.Popen[bytes]]:
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared = {**os.environ, **place, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    command = [sys.executable, __file__, kind, str(folder)]
    running = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"{rank}.log").open("w") as log:
            running.append(subprocess.Popen(command, env={**shared, **own}, stderr=log))
    return running


@pytest.mark.parametrize("kind", ["sleeps 1", "stops 1", "stops 0"])
def test_a_process_that_hangs_is_named(tmp_path, kind) -> None:
    running = launch(kind, tmp_path, 3)
    hung = int(kind[-1])
    others = [rank for rank in range(3) if rank != hung]
    try:
        # far below the minutes after which torch gives up
        for rank in others:
            running[rank].wait(timeout=60)
        assert running[hung].poll() is None
    finally:
        for process in running:
            process.kill()
            process.wait()
    said = {rank: (tmp_path / f"{rank}.log").read_text() for rank in others}
    first = [text for text in said.values() if "got no progress of" in text]
    assert first, said
    for rank in others:
        assert running[rank].returncode
    for text in first:
        if kind == "stops 0":
            assert "no progress of the process that holds the store" in text
        else:
            name = f"rank 1 (host {socket.gethostname()}, process {running[1].pid}: reads data in step 2"
            assert f"got no progress of {name}" in text and "rank 2 (" not in text and "rank 0 (" not in text
            assert ("silent for" in text) == (kind == "stops 1")
    # one that was ended by the end of another says the same
    for text in said.values():
        assert "got no progress of" in text or "waited for rank 1" in text or kind == "stops 0"
    assert {running[rank].returncode for rank, text in said.items() if text in first} == {heartbeat.STOPPED_STATUS}


def test_processes_that_are_slow_together_go_on(tmp_path) -> None:
    running = launch("slow", tmp_path, 2)
    try:
        status = [process.wait(timeout=60) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert status == [0, 0], [(tmp_path / f"{rank}.log").read_text() for rank in (0, 1)]
    # and leave no thread behind
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["", ""]


if __name__ == "__main__":
    live(sys.argv[1], Path(sys.argv[2]))
