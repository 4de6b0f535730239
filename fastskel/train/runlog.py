"""The log of a run: JSON lines always, TensorBoard on request."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["TIMINGS", "RunLog"]

LOG_FILE = "log.jsonl"
# what a record says of machine and moment; all else is the same in a run that was resumed
TIMINGS = frozenset(
    {"samples_per_s", "model_tflop_per_s", "mfu", "data_stall", "memory_gib", "slowest_rank", "rank_seconds"}
)


def _end_of(path: Path, upto: int) -> int:
    """Bytes of a log that hold the complete records of steps before `upto`; they come first, steps never decrease."""
    end = 0
    if not path.exists():
        return end
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            # a killed writer may leave half a line behind
            if not line.endswith(b"\n"):
                break
            try:
                repeated = json.loads(line)["step"] >= upto
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"RunLog: line {number} of {path} must be a record with its step, got {line[:40]!r}. "
                    "Remove the line, or the file to begin it anew."
                ) from error
            if repeated:
                break
            end += len(line)
    return end


class RunLog:
    """Append-only records of a run folder.

    Args:
        run: Run folder.
        upto: Keep only records of steps before this one: what a killed run logged beyond its checkpoint is done again.
        tensorboard: Write TensorBoard event files too.
    Raises:
        ValueError: If TensorBoard is asked for and not installed, or the log was damaged.
        OSError: From every method, if the log cannot be written any more.
    """

    def __init__(self, run: Path, upto: int, tensorboard: bool = False) -> None:
        self.path = run / LOG_FILE
        end = _end_of(self.path, upto)
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter  # type: ignore[attr-defined,unused-ignore]
            except ImportError as error:
                raise ValueError(
                    f"RunLog: tensorboard must be installed to be asked for, got {error}. "
                    "Install fastskel[tensorboard] or leave the option out; the JSON log is always written."
                ) from error
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=upto)
        # without a buffer: what a full disk did not take is not tried again at the end
        self._file = self.path.open("ab", buffering=0)
        self._file.truncate(end)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; it must hold its `step`."""
        line = json.dumps(dict(record)).encode() + b"\n"
        try:
            taken = self._file.write(line)
        except OSError as error:
            raise self._unwritten(str(error)) from error
        # a disk that fills up takes a part
        if taken != len(line):
            raise self._unwritten(f"{taken} of {len(line)} bytes were taken")
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Put what was written on the disk, before a checkpoint that the log must not fall behind."""
        try:
            os.fsync(self._file.fileno())
            # removed or moved, the file would go on to take records that nobody finds
            there = os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except OSError as error:
            raise self._unwritten(str(error)) from error
        if not there:
            raise self._unwritten("another file has its place")

    def _unwritten(self, reason: str) -> OSError:
        return OSError(
            f"RunLog: {self.path} must take the records of the run to its end, got: {reason}. Free space on its disk, or put the "
            "run folder back; then resume."
        )

    def close(self) -> None:
        """End the log."""
        self._file.close()
        if self._board is not None:
            self._board.close()
