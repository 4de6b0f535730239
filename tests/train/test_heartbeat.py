"""Processes that hang, each in another way: the others name them and end. This file is also what the processes run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
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


def test_who_never_spoke_is_named_by_its_rank() -> None:
    named = "rank 1 (which never said where it runs, silent for 31 s)"
    assert behind([say(0, 9), None, say(2, 9)], [0.0, 31.0, 0.0], 0) == [named]
    assert behind([say(0, 9), None], [0.0, 0.0], 0) == []


def test_who_is_slow_and_goes_on_is_not_named() -> None:
    beats = [say(0, 9), say(1, 3), say(2, 5)]
    assert [name[:6] for name in behind(beats, [0.0] * 3, 0, {1})] == ["rank 2"]
    # its last word is no proof that it goes on
    assert [name[:6] for name in behind(beats, [0, 25, 0], 0, {1, 2})] == ["rank 1"]


class Memory:
    """A store in this process, where a word that was never said is waited for, as in torch's."""

    def __init__(self) -> None:
        self.words: dict[str, str] = {}

    def clone(self) -> Memory:
        return self

    def set(self, key: str, word: str) -> None:
        self.words[key] = word

    def check(self, keys: list[str]) -> bool:
        return all(key in self.words for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        assert self.check(keys), "would wait for a word that nobody says"
        return [self.words[key].encode() for key in keys]

    def compare_set(self, key: str, expected: str, word: str) -> bytes:
        return self.words.setdefault(key, word).encode()

    def says(self, beat: Beat, rank: int) -> None:
        self.set(f"fastskel-beat/{rank}", json.dumps(beat))


class Ended(BaseException):
    """Stands for the end of the process."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def heart(monkeypatch) -> Iterator[Heartbeat]:
    """Rank 0 of 3, whose threads do nothing by themselves."""

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(heartbeat.threading.Thread, "start", lambda self: None)
    monkeypatch.setattr(heartbeat.threading.Thread, "join", lambda self, timeout=None: None)
    made = Heartbeat(Memory(), 0, 3)
    monkeypatch.undo()
    monkeypatch.setattr(heartbeat, "time", Clock())
    monkeypatch.setattr(heartbeat.os, "_exit", end)
    made._threads.clear()
    # its clock starts anew
    made._read_at, made._seen = 1000.0, dict.fromkeys(range(3), heartbeat.Heard(None, 1000.0, 1000.0))
    made.mark("embeds", step=4)
    return made


def waits(heart: Heartbeat, seconds: float) -> str:
    """Let time pass, read what the others said, and look."""
    heartbeat.time.now += seconds
    heart._hear()
    _, _, _, since, patience = heart._place
    return heart._missing(heartbeat.time.now, heartbeat.time.now - since, patience)


def test_a_process_that_hangs_before_its_first_word_is_named_and_silences_nobody(heart) -> None:
    heart._store.says(say(1, 1), 1)
    waits(heart, 0)
    heart._store.says(say(1, 1)._replace(number=8), 1)
    assert waits(heart, 310) == "rank 2 (which never said where it runs, silent for 310 s)"


def test_a_straggler_that_goes_on_is_waited_for(heart) -> None:
    heart.mark("shares its embeddings", step=4)
    for number in range(12):
        # rank 1 needs a minute for each place, and is far behind; rank 2 is where rank 0 is
        for rank, marks in ((1, -20 + number), (2, 2)):
            heart._store.says(Beat(number, marks, "embeds", 4, f"node{rank}", 100 + rank), rank)
        if number * 50 <= heartbeat.LONG_PATIENCE_SECONDS:
            assert waits(heart, 50 * bool(number)) == "", number
    for rank, marks in ((1, -5), (2, 2)):
        heart._store.says(Beat(12, marks, "embeds", 4, f"node{rank}", 100 + rank), rank)
    # torch would end all soon, without a name
    assert waits(heart, 50) == "rank 1 (host node1, process 101: embeds in step 4)"


def test_a_straggler_that_stops_is_named_though_it_speaks(heart) -> None:
    heart.mark("shares its embeddings", step=4)
    for number in range(34):
        for rank, marks in ((1, min(number, 1)), (2, 2)):
            heart._store.says(Beat(number, marks, "embeds", 4, f"node{rank}", 100 + rank), rank)
        named = waits(heart, 10)
        assert named == "" or number > 31
    assert named == "rank 1 (host node1, process 101: embeds in step 4)"


def looked(heart: Heartbeat, monkeypatch, *, meanwhile: Callable[[], None]) -> None:
    """Look once, long after the last place, while something happens."""
    rounds = iter([False, True])

    def passes(seconds: float) -> bool:
        heartbeat.time.now += 400
        return next(rounds)

    # so long at once, and not stopped itself
    monkeypatch.setattr(heartbeat, "MISSED_BEATS", 1000)
    monkeypatch.setattr(heart._over, "wait", passes)

    def missing(now: float, waited: float, patience: float) -> str:
        meanwhile()
        return "rank 1"

    monkeypatch.setattr(heart, "_missing", missing)
    heart.mark("embeds")
    heart._look()


def test_who_goes_on_while_the_others_are_looked_at_is_not_ended(heart, monkeypatch, capfd) -> None:
    looked(heart, monkeypatch, meanwhile=lambda: heart.mark("ends its step"))
    looked(heart, monkeypatch, meanwhile=heart._over.set)
    heart._over.clear()
    with pytest.raises(Ended):
        looked(heart, monkeypatch, meanwhile=lambda: None)
    assert "got no progress of rank 1" in capfd.readouterr().err


def full(descriptor: int, data: bytes) -> int:
    raise OSError(28, "No space left on device")


def unread(descriptor: int, data: bytes) -> int:
    time.sleep(8)
    return 0


def no_thread(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("kind", ["full disk", "unread pipe", "no thread"])
def test_nothing_keeps_a_process_from_ending(heart, monkeypatch, kind) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.1)
    if kind == "no thread":
        monkeypatch.setattr(heartbeat.threading.Thread, "start", no_thread)
    else:
        monkeypatch.setattr(heartbeat.os, "write", full if kind == "full disk" else unread)
    began = time.monotonic()
    with pytest.raises(Ended) as caught:
        heart._end("rank 1", 400.0)
    assert caught.value.args == (heartbeat.STOPPED_STATUS,) and time.monotonic() - began < 4
    if kind != "no thread":
        # and the others hear why
        assert heart._store.words[heartbeat.FAILED] == "rank 0, which waited for rank 1"


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
