"""Being asked to stop: a signal becomes a checkpoint, and an end that says so."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import torch
import torch.distributed as dist

from fastskel.dist import rank_and_world

__all__ = ["Preempted", "StopRequest", "stop_on_signals"]

# what clusters send before they take a machine away, some minutes or seconds ahead
SIGNALS = (signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))


class Preempted(RuntimeError):
    """The training was asked to stop, and has saved where it stands."""


class StopRequest:
    """Whether a process of the training was asked to stop.

    Attributes:
        signal: Name of the signal that this process received, empty before.
        group: The processes, by connections of their hosts; None where those of the default group are.
    """

    def __init__(self) -> None:
        self.signal = ""
        self.group = None
        if rank_and_world()[1] > 1 and dist.get_backend() != "gloo":
            # asked on the host, so that no step waits for its device
            self.group = dist.new_group(backend="gloo")

    def anywhere(self) -> bool:
        """Ask all processes; the same answer, after the same step, in each."""
        if rank_and_world()[1] == 1:
            return bool(self.signal)
        asked = torch.tensor(int(bool(self.signal)))
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.group)
        return bool(asked)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Note the signals that ask for an end instead of dying of them, while inside; in the main thread only."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number).name

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
