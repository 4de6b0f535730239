"""The parts of the collected GPU run: what each starts, and how its results are read from what that leaves behind.

Every part is a process, or one for each file of tests: what fails, hangs or breaks the device ends with it. Results are read from
what a process has printed so far, so that one which is killed at its limit still counts.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastskel.bench.children import Child, failure

__all__ = ["Part", "Result", "Session", "kernels", "module", "printed", "sanitizer", "tests"]

Status = Literal["ok", "failed", "skipped"]
# of one test, as `pytest -v` prints it when it ends
TEST_LINE = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
STATES = {"PASSED": "passed", "XFAIL": "passed", "SKIPPED": "skipped", "FAILED": "failed", "ERROR": "failed", "XPASS": "failed"}
# what benchmarks say of a row; all else was measured
ROW_STATES: dict[str, Status] = {"failed": "failed", "unavailable": "skipped", "skipped": "skipped"}
# plugins of an environment are none of ours: see `gpu.main`. Warnings of other releases of torch and numpy are no failures
PYTEST = ("-m", "pytest", "-v", "-p", "no:cacheprovider", "-W", "default", "--no-header")
NO_TESTS = 5
COLLECT_LIMIT_S = 60
# names of failed tests that a row keeps
MOST_NAMES = 40
# a process of tests compiles kernels on a core or two, and they share one device
CORES_OF_A_PROCESS, MOST_PROCESSES = 4, 4
# tests of each file under a tool that makes them ten to a hundred times slower
SANITIZED_TESTS = 2
# runs the program that its arguments name, in place of itself
EXECUTE = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
# what a rehearsal collects and runs, and the benchmarks that take seconds on a CPU
DRY_TESTS = ("tests/data/test_loader_cuda.py",)
DRY_SANITIZED = ("tests/kernels/test_philox.py",)
DRY_KERNELS = ("bench_philox.py",)
KERNEL_FILE_LIMIT_S = 150


@dataclass
class Result:
    """One row to be: what was run, what came of it, and why it failed or was left out."""

    case: str
    figures: dict[str, Any] = field(default_factory=dict)
    status: Status = "ok"
    error: str = ""


@dataclass
class Session:
    """What parts share.

    Attributes:
        device: "cuda" or "cpu".
        dry: Whether this is a rehearsal with tiny sizes.
        work: Folder for logs, traces and what processes leave.
        repository: Where tests/ and bench/ lie, and where processes run.
        deadline: When the present stage must have ended, by time.monotonic().
        limit_s: Seconds of the present part.
    """

    device: str
    dry: bool
    work: Path
    repository: Path
    deadline: float = 0.0
    limit_s: float = 0.0

    def child(self, name: str, limit_s: float | None = None) -> Child:
        """Return a process to be, whose log has this name; it ends before the stage does.

        Raises:
            TimeoutError: If no time is left.
        """
        left = min(self.limit_s if limit_s is None else limit_s, self.deadline - time.monotonic())
        if left <= 0:
            raise TimeoutError(f"no time was left for {name}")
        logs = self.work / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        return Child(logs / f"{re.sub('[^A-Za-z0-9_.-]+', '-', name)}.txt", left, self.repository)


@dataclass(frozen=True)
class Part:
    """Something to run: a name, a time limit, and what yields its results."""

    name: str
    limit_s: int
    run: Callable[[Session], Iterator[Result]]


def module(name: str, label: str, limit_s: int, *arguments: str) -> Part:
    """Make a part of a benchmark that adds rows to `--out FILE`; every row of it becomes a result."""

    def run(session: Session) -> Iterator[Result]:
        scratch = session.work / f"{label}.jsonl"
        scratch.unlink(missing_ok=True)
        status, output = session.child(label).run(
            "-m", f"fastskel.bench.{name}", "--out", str(scratch), *arguments
        )
        rows = [json.loads(line) for line in scratch.read_text().splitlines()] if scratch.is_file() else []
        for row in rows:
            case = " ".join(str(row[key]) for key in ("part", "case", "provider") if row.get(key) is not None)
            reason = str(row.get("error") or row.get("reason") or "")
            yield Result(case, row, ROW_STATES.get(str(row.get("status")), "ok"), reason)
        if status or not rows:
            yield Result(label, {}, "failed", failure(status, output))

    return Part(label, limit_s, run)


def printed(name: str, label: str, limit_s: int, *arguments: str) -> Part:
    """Make a part of a benchmark that prints one JSON object in a line, which becomes a result; warnings may surround it."""

    def run(session: Session) -> Iterator[Result]:
        status, output = session.child(label).run("-m", f"fastskel.bench.{name}", *arguments)
        lines = [line for line in output.splitlines() if line.startswith("{")]
        if status or not lines:
            yield Result(label, {}, "failed", failure(status, output))
        else:
            yield Result(label, json.loads(lines[-1]))

    return Part(label, limit_s, run)


def _counts(output: str) -> dict[str, Any]:
    states: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for name, state in TEST_LINE.findall(output):
        states[STATES[state]].append(name)
    counts = {state: len(names) for state, names in states.items()}
    return {**counts, "failed_tests": states["failed"][:MOST_NAMES]}


def _collected(session: Session, where: Sequence[str]) -> tuple[dict[str, list[str]], str]:
    """Return the tests marked gpu by file, the file with most of them first, and what went wrong."""
    child = session.child("collect", COLLECT_LIMIT_S)
    status, output = child.run(*PYTEST[:2], "-q", "--collect-only", "-W", "default", "-m", "gpu", *where)
    found: dict[str, list[str]] = {}
    for line in output.splitlines():
        if "::" in line and not line.startswith(("ERROR", " ")):
            found.setdefault(line.split("::")[0], []).append(line)
    ordered = dict(sorted(found.items(), key=lambda item: -len(item[1])))
    return ordered, failure(status, output) if status or not found else ""


def _run_tests(
    session: Session, label: str, files: dict[str, list[str]], *, program: Sequence[str] = ()
) -> Iterator[Result]:
    """Run each file in a process of its own, several at once; yield a result for each as it ends."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    until = min(session.deadline, time.monotonic() + session.limit_s)

    def run(file: str) -> Result:
        case = f"{label} {file}"
        left = until - time.monotonic()
        if left <= 0:
            return Result(case, {}, "failed", "no time was left")
        command = [*PYTEST, "-m", "gpu", *files[file]]
        if program:
            command = ["-c", EXECUTE, *program, sys.executable, *command]
        status, output = session.child(case, left).run(*command)
        counts = _counts(output)
        if status in (0, NO_TESTS) and not counts["failed"]:
            # on a machine without what it needs a test is skipped: that proves nothing, and is no failure
            return Result(case, counts, "ok" if counts["passed"] else "skipped")
        return Result(case, counts, "failed", failure(status, output))

    with concurrent.futures.ThreadPoolExecutor(max(1, min(cores // CORES_OF_A_PROCESS, MOST_PROCESSES))) as pool:
        for done in concurrent.futures.as_completed([pool.submit(run, file) for file in files]):
            yield done.result()


def tests(limit_s: int) -> Part:
    """Make the part that runs the tests marked gpu; none that passed proves nothing, which is a failure but in a rehearsal."""

    def run(session: Session) -> Iterator[Result]:
        files, error = _collected(session, DRY_TESTS if session.dry else ("tests",))
        if error:
            yield Result("collect tests", {}, "failed", error)
        sums = dict.fromkeys(("passed", "failed", "skipped"), 0)
        for result in _run_tests(session, "tests", {file: [file] for file in files}):
            sums = {key: value + result.figures.get(key, 0) for key, value in sums.items()}
            yield result
        proved = sums["passed"] or (session.dry and sums["skipped"])
        yield Result("tests", sums, "ok" if proved and not sums["failed"] else "failed", "" if proved else "no test ran")

    return Part("tests", limit_s, run)


def _find_sanitizer() -> str | None:
    """Find compute-sanitizer on the path, or where CUDA is installed by default."""
    folders = [os.environ.get("PATH", ""), *(f"{root}/bin" for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if root)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def sanitizer(tool: str, limit_s: int) -> Part:
    """Make a part that runs a few tests of each kernel under compute-sanitizer, where that is installed.

    A rehearsal runs the same tests without it.
    """

    def run(session: Session) -> Iterator[Result]:
        # torch's pool would make neighbours of tensors, and hide a write behind the end of one
        os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        try:
            installed = _find_sanitizer()
            if installed is None and not session.dry:
                yield Result(tool, {}, "skipped", "compute-sanitizer is not installed")
                return
            program = [installed or "", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
            # torch asks the driver for what it may not have, and goes on
            program += ["--report-api-errors", "no"] if tool == "memcheck" else []
            files, error = _collected(session, DRY_SANITIZED if session.dry else ("tests/kernels",))
            if error:
                yield Result(f"collect {tool}", {}, "failed", error)
            some = {file: names[:SANITIZED_TESTS] for file, names in files.items()}
            yield from _run_tests(session, tool, some, program=() if session.dry else program)
        finally:
            del os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"]

    return Part(tool, limit_s, run)


def kernels(label: str, limit_s: int, providers: str) -> Part:
    """Make a part that runs the kernel benchmarks, file by file; every benchmark becomes a result.

    `providers` is an expression of pytest over their names: compiling takes so long that it has a part of its own.
    """

    def run(session: Session) -> Iterator[Result]:
        folder = session.repository / "bench" / "kernels"
        short = ["--benchmark-min-rounds=1", "--benchmark-max-time=0.01"] if session.dry else ["--benchmark-max-time=0.5"]
        names = DRY_KERNELS if session.dry else sorted(path.name for path in folder.glob("bench_*.py"))
        if not names:
            yield Result(label, {}, "failed", f"no benchmarks in {folder}")
        until = time.monotonic() + session.limit_s
        for name in names:
            case, report = f"{label} {name}", session.work / f"{label}-{name}.json"
            report.unlink(missing_ok=True)
            limit = min(KERNEL_FILE_LIMIT_S, until - time.monotonic())
            command = [*PYTEST, "-p", "pytest_benchmark.plugin", f"bench/kernels/{name}", "-k", providers, *short]
            status, output = session.child(case, limit).run(*command, f"--benchmark-json={report}")
            entries = json.loads(report.read_text())["benchmarks"] if report.is_file() and report.stat().st_size else []
            for entry in entries:
                stats = {f"{key}_s": entry["stats"][key] for key in ("median", "q1", "q3", "min")}
                provider = (entry["params"] or {}).get("provider")
                about = {"group": entry["group"], "provider": provider, "rounds": entry["stats"]["rounds"]}
                figures = {**about, **stats, **entry["extra_info"]}
                yield Result(entry["name"], figures)
            if session.dry and status in (0, NO_TESTS) and not entries:
                yield Result(case, _counts(output), "skipped", "no provider runs on a CPU")
            elif status or not entries:
                yield Result(case, _counts(output), "failed", failure(status, output))

    return Part(label, limit_s, run)
