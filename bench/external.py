"""The published code in a folder of the user's, as a provider: it runs in a process of its own, from where it lies.

The child is `fastskel.bench.external_child`. Nothing is copied from the folder and nothing is written into it. Parent and
child take turns: a call sends one line and waits for the answer, so they never run at once. A child that fails, dies or does
not answer in time raises, with the end of what it printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

__all__ = ["EXTERNAL", "Checkout", "CheckoutError", "Source", "add_arguments", "source_of"]

# what rows call it
EXTERNAL = "reference-checkout"
PRINTED, QUIT_S, PINGS = 2000, 5.0, 20


class CheckoutError(RuntimeError):
    """The code in the folder did not do what was asked."""


@dataclass(frozen=True)
class Source:
    """Where the published code lies, and what to take from it.

    Attributes:
        folder: The checkout: what its own scripts have as their working directory.
        module: Module with the model, as the published scripts import it.
        name: Class of the pretraining model.
        losses: Module with `similarity`, `v_ac` and `cal_xc`.
        limit_s: Seconds that it may take to answer.
    """

    folder: Path
    module: str = "model.DSTE"
    name: str = "USDRL"
    losses: str = "model.loss"
    limit_s: float = 120.0


def add_arguments(parser: Any) -> None:
    """Add the options that name a checkout."""
    group = parser.add_argument_group("published code")
    group.add_argument("--reference", type=Path, help="folder of the published code, to be compared from where it lies")
    group.add_argument("--reference-module", default=Source.module, help="module with its model (%(default)s)")
    group.add_argument("--reference-class", default=Source.name, help="class of its pretraining model (%(default)s)")
    group.add_argument("--reference-loss", default=Source.losses, help="module with its losses (%(default)s)")
    group.add_argument("--reference-limit", type=float, default=Source.limit_s, help="seconds of an answer (%(default)s)")


def source_of(given: Any) -> Source | None:
    """Return the checkout that parsed options name, None where they name none."""
    if given.reference is None:
        return None
    return Source(
        given.reference, given.reference_module, given.reference_class, given.reference_loss, given.reference_limit
    )


class Checkout:
    """A model of the published code, alive in a child until `close`, or the end of a `with` block.

    Args:
        source: Where the code lies.
        arguments: Of the constructor, by the published names.
        state: Weights and buffers by name, (D_out, D_in) and others.
        device: Where it runs.
    Raises:
        ValueError: If the folder is none.
        CheckoutError: If the model cannot be built from it.
    """

    def __init__(
        self, source: Source, arguments: Mapping[str, Any], state: Mapping[str, Tensor], device: torch.device
    ) -> None:
        folder = source.folder.resolve()
        if not folder.is_dir():
            raise ValueError(f"Checkout: folder must be one with the published code, got {source.folder}. Name it.")
        self.name, self.limit_s = f"{source.module}.{source.name}", source.limit_s
        self._stack = contextlib.ExitStack()
        self._files = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fastskel-checkout-")))
        self._log: IO[bytes] = self._stack.enter_context((self._files / "log").open("w+b"))
        # a working directory of its own: neither what it writes nor what it imports may come from where the parent stands
        (self._files / "cwd").mkdir()
        self._child = subprocess.Popen(
            # -B: no compiled files beside the folder's sources
            [sys.executable, "-B", Path(__file__).with_name("external_child.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, cwd=self._files / "cwd",
            start_new_session=True,
        )  # fmt: skip
        self._pending = b""
        try:
            built = self._ask(
                "build", folder=str(folder), module=source.module, name=source.name, losses=source.losses,
                arguments=dict(arguments), state=self._save("state", {k: v.detach().cpu() for k, v in state.items()}),
                device=str(device), threads=torch.get_num_threads(),
            )  # fmt: skip
            self.file: str = built["file"]
            self.pipe_ms = self._round_trip()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Checkout:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child, and everything that it started."""
        child = self._child
        assert child.stdin is not None and child.stdout is not None
        with contextlib.suppress(OSError):
            child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(QUIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        self._stack.close()

    def prepare(self, what: str, inputs: Sequence[Tensor], *, precision: str, drop_path: float = 0.0) -> None:
        """Choose what runs.

        Args:
            what: "encode" the tokens; "gradients" of them with cotangents; "train", forward and backward with weights of the
                maxima; "loss" with gradients of four views; "step", a whole one.
            inputs: Tokens (N, T, M*V*C) and (N, M*V, T*C) with what else is needed, or views (N, C, T, V, M).
            precision: "fp32", "bf16" or "fp16", with a scaler.
            drop_path: Probability that it drops a branch.
        """
        path = self._save("inputs", [each.cpu() for each in inputs])
        answer = self._ask("prepare", what=what, inputs=path, precision=precision, drop_path=drop_path)
        self.names: list[str] = answer["names"]

    def results(self) -> list[Tensor | None]:
        """Run once; returns what came out, (N, T, D) or any other shape; gradients in the order of `names`."""
        path = self._files / "results"
        self._ask("results", path=str(path))
        found: list[Tensor | None] = torch.load(path, weights_only=True)
        return found

    def run(self) -> dict[str, Any]:
        """Run once; returns the child's own milliseconds, `ms`, and the scaler's `scale`."""
        return self._ask("run")

    def _round_trip(self) -> float:
        begin = time.perf_counter()
        for _ in range(PINGS):
            self._ask("ping")
        return 1e3 * (time.perf_counter() - begin) / PINGS

    def _save(self, name: str, tensors: Any) -> str:
        path = self._files / name
        torch.save(tensors, path)
        return str(path)

    def _ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write((json.dumps({"do": do, **request}) + "\n").encode())
            self._child.stdin.flush()
        except OSError:
            # it is dead, and the missing answer says more
            pass
        answer: dict[str, Any] = json.loads(self._line(do))
        if "error" in answer:
            raise CheckoutError(f"the published code failed at {do!r}: {answer['error']}{self._printed()}")
        result: dict[str, Any] = answer["ok"]
        return result

    def _line(self, do: str) -> bytes:
        assert self._child.stdout is not None
        end = time.monotonic() + self.limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                left = end - time.monotonic()
                if left <= 0 or not selector.select(left):
                    os.killpg(self._child.pid, signal.SIGKILL)
                    raise CheckoutError(
                        f"the published code must answer {do!r} within {self.limit_s:g} s, got nothing.{self._printed()}"
                    )
                read = os.read(self._child.stdout.fileno(), 65536)
                if not read:
                    status = self._child.wait()
                    raise CheckoutError(f"the published code ended at {do!r} with status {status}.{self._printed()}")
                self._pending += read
        line, self._pending = self._pending.split(b"\n", 1)
        return line

    def _printed(self) -> str:
        self._log.flush()
        text = (self._files / "log").read_text(errors="replace")[-PRINTED:].strip()
        return f" It printed: {text}" if text else ""
