"""Checkpoints written beside the training: copied at once, put on the disk while the next steps run."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastskel.train.checkpoint import prune, save_checkpoint

__all__ = ["CheckpointWriter"]


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread of its own; holds one copy of what it writes.

    Args:
        run: Run folder.
        keep: Checkpoints to keep: the newest ones.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self.run, self.keep = run, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, step: int, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> Path:
        """Copy named tensors of any shape and begin to write them; an earlier checkpoint is complete afterwards.

        Returns:
            Folder that appears once the checkpoint is complete.
        Raises:
            OSError: If the earlier one could not be written, with what was wrong.
        """
        self.wait()
        copies = [
            {name: value.detach().to("cpu", copy=True) for name, value in part.items()} for part in (model, optimizer)
        ]
        self._thread = threading.Thread(target=self._write, args=(step, copies, dict(state)), name="checkpoint")
        self._thread.start()
        return self.run / "checkpoints" / f"step-{step:09d}"

    def _write(self, step: int, copies: list[dict[str, Tensor]], state: dict[str, Any]) -> None:
        model, optimizer = copies
        try:
            save_checkpoint(self.run / "checkpoints", step, model, state, optimizer)
            # only when the new one is there
            best = state.get("best")
            prune(self.run, self.keep, None if best is None else best["step"])
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Wait until the checkpoint is on the disk; raises what kept it from there."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.wait()
        except Exception as own:
            # what ended the training comes first
            if error is None:
                raise
            warnings.warn(f"CheckpointWriter: the last checkpoint was not written: {own}", stacklevel=2)
