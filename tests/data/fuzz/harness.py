"""Fuzzing of the readers that are written in Python: what a target is, and what must hold of it whatever the input.

A case is what a user has: files by their path, one or several. A reader takes it or refuses it:

- it returns clips that keep the contract of their format (`checks.py`), or raises `SkipFile`, or a ValueError whose text is
  one printable line of bounded length that names the file;
- no other exception, no warning, at most `MEMORY_BYTES` more address space than before, at most `CPU_SECONDS`;
- some of the cases that a reader takes are packed with `pack_source` and opened again, which must succeed or refuse as well.

A format of `FORMATS` or `PREPARED` becomes a target by its seeds, in `seeds.py`:

    @seeds_of("bvh", topology="ntu-25")
    def bvh(draw: Generator) -> list[Case]:
        return [{"walk.bvh": b"HIERARCHY ..."}]

Seeds are small and genuine-looking, made from a fixed generator. Further seeds of a format under other options take the
keyword `variant`. What reads something else than a format registers itself in `others.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import FrameType, TracebackType

from numpy.random import Generator

from fastskel.data.formats import SkipFile

Case = dict[str, bytes]

# kilobytes of input: whoever wants more believed a number in it. Packing maps the frames that it has written
MEMORY_BYTES = 512 << 20
# of the process, so that a busy machine counts for nothing
CPU_SECONDS = 5.0
_LONGEST_MESSAGE = 1500
_DOOR = re.compile(r"(?:(?:pack_source|pack_arrays|open_dataset|topology_from_json|split)|Topology .{1,400}): ")
# of names that are changed, the one character that no printable line holds
BELL = "\x07"
# beside a case; its readers may see it
FINDING = "finding.txt"


class BrokenContractError(Exception):
    """A reader returned what its format does not promise."""


class TookTooLongError(BaseException):
    """The time of one execution is up. No Exception: nobody may catch it."""


@dataclass(frozen=True)
class Target:
    """One reader under one set of options.

    Attributes:
        name: Its name, and that of the folder with its findings.
        seeds: Makes cases to start from.
        read: Reads (case, empty folder, whether to pack it too), checks what came, and returns what is telling about it.
        format: Name of the format that it reads, "" if it is none.
        renames: Whether the names of files are part of the input.
    """

    name: str
    seeds: Callable[[Generator], list[Case]]
    read: Callable[[Case, Path, bool], tuple[object, ...]]
    format: str = ""
    renames: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of one execution.

    Attributes:
        kind: "taken", "skipped", "refused", or, what must not be: "exception", "memory", "time", "contract", "message".
        detail: What to tell of it.
        behaviour: Equal for executions that went the same way.
    """

    kind: str
    detail: str
    behaviour: tuple[object, ...]

    @property
    def sound(self) -> bool:
        return self.kind in ("taken", "skipped", "refused")


TARGETS: dict[str, Target] = {}


def add(target: Target) -> None:
    assert target.name not in TARGETS, target.name
    TARGETS[target.name] = target


def limit_memory() -> None:
    """Let the process have `MEMORY_BYTES` more than it has now; whoever asks for more gets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES, hard))


def _time_is_up(signum: int, frame: FrameType | None) -> None:
    raise TookTooLongError


@contextlib.contextmanager
def limited_time() -> Iterator[None]:
    signal.signal(signal.SIGPROF, _time_is_up)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def execute(target: Target, case: Case, folder: Path, packing: bool) -> Outcome:
    """Give a case to a reader and judge what it does."""
    # the time is up at any line, also at one of these
    try:
        with limited_time(), warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                return Outcome("taken", "", target.read(case, folder, packing))
            except SkipFile as error:
                return Outcome("skipped", str(error), _way(error.__traceback__))
            except ValueError as error:
                return _refused(error, case, folder)
            except BrokenContractError as error:
                return Outcome("contract", str(error), _way(error.__traceback__))
            except MemoryError as error:
                return Outcome("memory", f"MemoryError: {error}", _way(error.__traceback__))
            except Exception as error:
                return Outcome("exception", f"{type(error).__name__}: {error}", _way(error.__traceback__))
    except TookTooLongError as error:
        return Outcome("time", f"more than {CPU_SECONDS:g} s", _way(error.__traceback__))


def _refused(error: ValueError, case: Case, folder: Path) -> Outcome:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) and not _of_parser(cause):
            return Outcome("memory", str(error), _way(cause.__traceback__))
        cause = cause.__cause__ or cause.__context__
    way, text = _way(error.__traceback__), str(error)
    if not _DOOR.match(text):
        return Outcome("exception", f"{type(error).__name__}: {text}", way)
    if str(folder) not in text and not any(name in text for name in case):
        return Outcome("message", f"names no file: {text}", way)
    # the path itself stands as it is, whole or its end
    for name in sorted(case, key=len, reverse=True):
        for part in (name, PurePosixPath(name).name):
            text = text.replace(part, "")
    text = text.replace(BELL, "") if any(BELL in name for name in case) else text
    if len(text) > _LONGEST_MESSAGE or not text.isprintable():
        return Outcome("message", f"{len(text)} characters, no printable line: {text[:400]!r}", way)
    return Outcome("refused", text, way)


def _of_parser(error: MemoryError) -> bool:
    """Say whether it is the interpreter's word for an expression that is nested too deeply."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and Path(traceback.tb_frame.f_code.co_filename).name == "ast.py"


def _way(traceback: TracebackType | None) -> tuple[object, ...]:
    """Lines of the library that an error came through: the shape of what happened, without its numbers."""
    lines: list[tuple[str, int]] = []
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if "fastskel" in file:
            lines.append((Path(file).name, traceback.tb_lineno))
        traceback = traceback.tb_next
    return tuple(lines[-3:])


def write_case(case: Case, folder: Path) -> None:
    """Write the files of a case below a folder."""
    for name, data in case.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def read_case(folder: Path) -> Case:
    """Read a case, such as a saved finding, back from its folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != FINDING]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
