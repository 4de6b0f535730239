"""The log of a run: JSON lines always, TensorBoard on request, and what the run was."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from fastskel.atomic import atomic_write

__all__ = ["RunLog", "provenance"]

LOG_FILE = "log.jsonl"


def provenance() -> dict[str, Any]:
    """Say what produced a run: command, versions, commit of the source where there is one."""
    source = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    versions = {"python": platform.python_version()}
    for package in ("fastskel", "torch", "numpy", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {"command": sys.argv, "versions": versions, "commit": commit}


class RunLog:
    """Append-only records of a run folder.

    Args:
        run: Run folder.
        upto: Keep only records of steps before this one: what a killed run logged beyond its checkpoint is done again.
        tensorboard: Write TensorBoard event files too.
    Raises:
        ValueError: If TensorBoard is asked for and not installed.
    """

    def __init__(self, run: Path, upto: int, tensorboard: bool = False) -> None:
        self.path = run / LOG_FILE
        kept = [line for line in self._complete_lines() if json.loads(line).get("step", 0) < upto]
        with atomic_write(self.path) as scratch:
            scratch.write_text("".join(kept))
        self._file = self.path.open("a")
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

    def _complete_lines(self) -> list[str]:
        if not self.path.exists():
            return []
        # a killed writer may leave half a line behind
        return [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("}\n")]

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; it must hold its `step`."""
        self._file.write(json.dumps(dict(record)) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Put what was written on the disk, before a checkpoint that the log must not fall behind."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """End the log."""
        self._file.close()
        if self._board is not None:
            self._board.close()
