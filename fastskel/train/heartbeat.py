"""A process that hangs is named by those that wait for it; they end, so that a launcher can start all again."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

__all__ = ["FAILED", "STOPPED_STATUS", "Beat", "Heard", "Heartbeat", "behind"]

# where the store holds the word of the process that failed first
FAILED = "fastskel-failed"
# of the command line, where a training stopped
STOPPED_STATUS = 3
# between two words to the others
BEAT_SECONDS = 5.0
# beats that a process may miss before it counts as silent
MISSED_BEATS = 4
# longest without progress within a step: a large batch in one piece takes a minute on a slow host
PATIENCE_SECONDS = 300.0
# longest in what may take long: evaluation, writing, and a first step that compiles; below the minutes after which torch gives up
# without naming anybody
LONG_PATIENCE_SECONDS = 570.0


class Beat(NamedTuple):
    """What a process last said of itself.

    Attributes:
        number: Counts its words; one that says nothing new is silent.
        marks: Places of the program it has passed, the same ones in all processes.
        doing: What it does since.
        step: Optimiser steps it has done.
        host: Name of its machine.
        pid: Its number there.
    """

    number: int
    marks: int
    doing: str
    step: int
    host: str
    pid: int


class Heard(NamedTuple):
    """What is known of a process.

    Attributes:
        beat: Its last word; None before the first.
        at: When that was new, by this process's clock.
        moved: When it was found to have passed another place.
    """

    beat: Beat | None
    at: float
    moved: float


def behind(
    beats: Sequence[Beat | None], silent: Sequence[float], own: int, going: Collection[int] = frozenset()
) -> list[str]:
    """Name the processes that rank `own` waits for: those that passed fewer places, and those that say nothing any more.

    Args:
        beats: Last words by rank, None of who never said one.
        silent: Seconds since each said something new, 0 for those that do.
        own: Rank that asks, and is never named.
        going: Ranks that are slower and go on; they are named if they are silent.
    """
    named, asking = [], beats[own]
    assert asking is not None
    for rank, (beat, seconds) in enumerate(zip(beats, silent, strict=True)):
        since = f", silent for {seconds:.0f} s" if seconds else ""
        if beat is None:
            named += [f"rank {rank} (which never said where it runs{since})"] if seconds else []
        elif rank != own and (seconds or (beat.marks < asking.marks and rank not in going)):
            named.append(f"rank {rank} (host {beat.host}, process {beat.pid}: {beat.doing} in step {beat.step}{since})")
    return named


class Heartbeat:
    """Tells the other processes how far this one is, and ends it when it has waited for one of them for too long.

    One thread speaks to the store, another looks at the clock: a store whose process hangs does not answer, and must not keep
    the second from saying so. The one that looks ends the process without cleaning up, as the main thread waits within torch
    and cannot be woken; checkpoints and log are made for that. A process that no other is behind goes on waiting, and so does
    one that waits for a slower one which goes on, until torch's own patience is almost over.

    Args:
        store: Shared by the processes; connections of their own are made. None where a process is alone, and nothing is done.
        rank: This process's number.
        world: Number of processes.
    """

    def __init__(self, store: Store | None = None, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world
        self._marks, self._step, self._number = 0, 0, 0
        self._place = (0, "starts", 0, time.monotonic(), LONG_PATIENCE_SECONDS)
        self._over = threading.Event()
        self._host = socket.gethostname()
        began = time.monotonic()
        self._seen = {other: Heard(None, began, began) for other in range(world)}
        self._read_at = began
        self._threads: list[threading.Thread] = []
        if store is None:
            return
        # a connection serves one thread; torch's stubs lack the method
        shared: Any = store
        self._store, self._farewell = shared.clone(), shared.clone()
        self._tell()
        for work in (self._speak, self._look):
            self._threads.append(threading.Thread(target=work, name=f"fastskel{work.__name__}", daemon=True))
            self._threads[-1].start()

    def mark(self, doing: str, *, step: int | None = None, long: bool = False) -> None:
        """Note that this process passed a place of the program that every process passes.

        Args:
            doing: What comes now, as in "rank 1 reads data".
            step: Optimiser steps done; None leaves it.
            long: Whether that may take as long as an evaluation.
        """
        self._marks += 1
        self._step = self._step if step is None else step
        patience = LONG_PATIENCE_SECONDS if long else PATIENCE_SECONDS
        # one assignment: the threads see all of it or nothing
        self._place = (self._marks, doing, self._step, time.monotonic(), patience)

    def close(self) -> None:
        """End the threads; one that a dead store holds is left behind, and dies with the process."""
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=1.0)

    def _beat(self) -> Beat:
        marks, doing, step, _, _ = self._place
        return Beat(self._number, marks, doing, step, self._host, os.getpid())

    def _key(self, rank: int) -> str:
        return f"fastskel-beat/{rank}"

    def _tell(self) -> None:
        self._number += 1
        self._store.set(self._key(self.rank), json.dumps(self._beat()))

    def _speak(self) -> None:
        # torch's errors of a connection, which the main thread meets by itself
        with contextlib.suppress(RuntimeError):
            while not self._over.wait(BEAT_SECONDS):
                self._tell()
                # nobody is asked as long as all goes well
                if time.monotonic() - self._place[3] > BEAT_SECONDS:
                    self._hear()

    def _hear(self) -> None:
        # who asks for a word that was not said yet waits for it, and would be silent meanwhile itself
        there = [rank for rank, heard in self._seen.items() if heard.beat or self._store.check([self._key(rank)])]
        said = self._store.multi_get([self._key(rank) for rank in there])
        now = time.monotonic()
        for rank, text in zip(there, said, strict=True):
            beat, before = Beat(*json.loads(text)), self._seen[rank]
            if before.beat is None or before.beat.marks != beat.marks:
                self._seen[rank] = Heard(beat, now, now)
            elif before.beat.number != beat.number:
                self._seen[rank] = Heard(beat, now, before.moved)
        self._read_at = now

    def _look(self) -> None:
        before = time.monotonic()
        awake = before
        while not self._over.wait(BEAT_SECONDS / 2):
            now = time.monotonic()
            if now - before > MISSED_BEATS * BEAT_SECONDS:
                # this process was stopped itself, and hears first how the others are
                awake = now
            before = now
            place = self._place
            _, _, _, since, patience = place
            waited = now - max(since, awake)
            if waited > patience:
                named = self._missing(now, waited, patience)
                # not where it went on, or ended, while the others were looked at
                if named and self._place is place and not self._over.is_set():
                    self._end(named, now - since)

    def _missing(self, now: float, waited: float, patience: float) -> str:
        """Name whom this process has waited for, that many seconds; empty if that is nobody."""
        limit = MISSED_BEATS * BEAT_SECONDS
        if now - self._read_at > limit:
            return "the process that holds the store (torchrun's on the first machine, else rank 0), which does not answer"
        heard = [self._seen[rank] for rank in range(self.world)]
        beats = [self._beat() if rank == self.rank else one.beat for rank, one in enumerate(heard)]
        silent = [now - one.at if now - one.at > limit else 0.0 for one in heard]
        # torch's patience ends without a name
        last = waited > LONG_PATIENCE_SECONDS
        going = {rank for rank, one in enumerate(heard) if now - one.moved <= patience and not last}
        return ", ".join(behind(beats, silent, self.rank, going))

    def _end(self, named: str, seconds: float) -> NoReturn:
        _, doing, step, _, _ = self._place
        text = (
            f"TrainingStopped: pretrain: all processes must go on, got no progress of {named}. Rank {self.rank} waited "
            f"{seconds:.0f} s ({doing} in step {step}). Look at that machine, then resume.\n"
        )
        word = f"rank {self.rank}, which waited for {named}"
        # nothing may keep it from ending: no pipe that nobody reads, no full disk, no dead store
        try:
            self._within(BEAT_SECONDS, lambda: os.write(2, text.encode()))
            self._within(BEAT_SECONDS, lambda: self._farewell.compare_set(FAILED, "", word))
        finally:
            os._exit(STOPPED_STATUS)

    def _within(self, seconds: float, work: Callable[[], object]) -> None:
        """Give up on what a dead store or reader may hold."""

        def quietly() -> None:
            with contextlib.suppress(RuntimeError, OSError):
                work()

        thread = threading.Thread(target=quietly, daemon=True)
        thread.start()
        thread.join(seconds)
