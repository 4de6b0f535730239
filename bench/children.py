"""Run a benchmark as a process of its own: with a time limit, its output kept, its rows read back.

A part that fails, hangs or takes the interpreter with it is a result to record, and the next part runs. What a part starts
itself, such as the workers of a loader, ends with it when its time is over.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["TIMED_OUT", "Child", "failure", "read_rows"]

# the status of timeout(1)
TIMED_OUT = 124
# of what a failed process printed, the end that a row keeps
TAIL_CHARACTERS = 2000


class Child:
    """Runs processes for one part and keeps what they print.

    Args:
        log: File that receives the output; its folder is made.
        limit_s: Seconds until the process, and all that it started, is killed.
        folder: Where it runs; None is the present folder.
        environment: What it gets beside this process's environment.
    """

    def __init__(
        self, log: Path, limit_s: float, folder: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self.log, self.limit_s, self.folder, self.environment = log, limit_s, folder, environment or {}

    def run(self, *command: str) -> tuple[int, str]:
        """Run a command of this interpreter to its end; return its status, `TIMED_OUT` if it was killed, and output."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w+", errors="replace") as log:
            # a session of its own: its process group is then all that it starts
            process = subprocess.Popen(
                [sys.executable, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                cwd=self.folder, env={**os.environ, **self.environment}, start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(self.limit_s)
            except subprocess.TimeoutExpired:
                status = TIMED_OUT
                _end(process)
                log.write(f"\nkilled after {self.limit_s:.0f} s\n")
            except BaseException:
                # Ctrl-C does not reach another session
                _end(process)
                raise
            log.seek(0)
            return status, log.read()


def _end(process: subprocess.Popen[bytes]) -> None:
    # not waited for yet, so the number is still that of its group
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def failure(status: int, output: str) -> str:
    """Say how a process failed: its status and the end of what it printed."""
    return f"exit status {status}: {output[-TAIL_CHARACTERS:].strip()}"


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a file of JSON lines.

    Raises:
        ValueError: If there is none, or a line is no JSON object.
    """
    source = Path(path)
    if not source.is_file():
        raise ValueError(f"read_rows: path must be a file of JSON lines, got {source}. Name the rows of a run.")
    rows = []
    for number, line in enumerate(source.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(
                f"read_rows: line {number} of {source} must be a JSON object, got {line[:60]!r}. Name a file of rows."
            )
        rows.append(row)
    return rows
