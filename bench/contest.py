"""Providers that are made ready one after another and take turns then; one that fails is a row, and the others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from fastskel.bench.harness import compare
from fastskel.bench.providers import BASELINE, Kind

__all__ = ["Contest", "unavailable_row"]

Row = dict[str, Any]
Call = Callable[[], object]
# characters of an error that a row keeps
ERROR = 500


def unavailable_row(kind: Kind, reason: str) -> Row:
    """Return what a row says of a provider that cannot run here."""
    return {"provider": kind.name, "about": kind.about, "status": "unavailable", "reason": reason[:ERROR]}


class _FailedError(Exception):
    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(name)
        self.name, self.error = name, error


class Contest:
    """Collects what is to be timed; the baseline comes first, and its errors are everybody's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.calls: dict[str, Call] = {}
        self.about: dict[str, Row] = {}
        self.failures: list[Row] = []

    def enter(self, name: str, make: Callable[[], tuple[Call, Row]]) -> None:
        """Make a provider ready: `make` checks what it computes, and returns its call and what rows say of it."""
        try:
            call, self.about[name] = make()
        except Exception as error:  # whatever a provider raises, a compiler and a device among it, is its row
            self._fail(name, error)
        else:
            self.calls[name] = call

    def _fail(self, name: str, error: Exception) -> None:
        if name == BASELINE:
            raise error
        self.calls.pop(name, None)
        text = f"{type(error).__name__}: {error}"
        self.failures.append({"provider": name, "status": "failed", "error": text[:ERROR]})

    def rows(self, **limits: Any) -> Iterator[Row]:
        """Time what is ready, in turns, with `limits` of `compare`; the rows of what failed come first."""
        timings: list[Any] = []
        while not timings:
            try:
                calls = {name: self._named(name, call) for name, call in self.calls.items()}
                timings = compare(calls, BASELINE, device=self.device, **limits)
            except _FailedError as failed:
                # the rounds so far had it among them: they are run again without it
                self._fail(failed.name, failed.error)
        yield from self.failures
        for timing in timings:
            yield {**timing.row(), **self.about[timing.provider], "baseline": BASELINE, "status": "ok"}

    @staticmethod
    def _named(name: str, call: Call) -> Call:
        def run() -> object:
            try:
                return call()
            except Exception as error:  # whatever it raises while it is timed is its row, and the others go on
                raise _FailedError(name, error) from error

        return run
