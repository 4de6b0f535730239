"""Run everything that waits for a GPU, once: facts, GPU tests, kernel benchmarks, training steps, the encoder comparison.

Run as `python -m fastskel.bench.gpu --out DIR`. Appends one JSON line per result to DIR/<device>.jsonl, each with device,
versions, commit and date; leaves what the parts printed in DIR/logs. Every part is a process with a time limit: one that
fails or hangs is recorded as failed, and the next one runs. All limits together stay under ten minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fastskel.bench.step import PRECISIONS, STEP_RECIPES

from fastskel.provenance import provenance

__all__ = ["PARTS", "main"]

PARTS = ("environment", "peak", "tests", "kernels", "training", "step", "encoder", "loader")
# tests and benchmarks of kernels compile them first; the parts of one call share TOTAL_S
LIMITS_S = {"environment": 20, "peak": 60, "tests": 330, "kernels": 170, "training": 240, "step": 60, "encoder": 60, "loader": 60}
TOTAL_S = 580
# a part given less than this cannot even import torch
LEAST_S = 10
TAIL_CHARACTERS = 2000
# the sources that this module lies in; an installed wheel has neither tests nor benchmarks to collect
REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass
class Outcome:
    """What one part found: figures by case, and why it failed, if it did."""

    results: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    error: str = ""


class Child:
    """Runs processes for one part and keeps what they print.

    Args:
        log: File that receives the output.
        limit_s: Seconds until the process is killed.
        folder: Where it runs.
    """

    def __init__(self, log: Path, limit_s: float, folder: Path) -> None:
        self.log, self.limit_s, self.folder = log, limit_s, folder

    def run(self, *command: str) -> tuple[int, str]:
        """Run a command of this interpreter to its end; return its status and output."""
        with self.log.open("w+") as log:
            try:
                done = subprocess.run(
                    [sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, cwd=self.folder,
                    timeout=self.limit_s, check=False,
                )  # fmt: skip
                status = done.returncode
            except subprocess.TimeoutExpired:
                log.write(f"\nkilled after {self.limit_s:.0f} s\n")
                status = 124
            log.seek(0)
            return status, log.read()


def _failure(status: int, output: str) -> str:
    return f"exit status {status}: {output[-TAIL_CHARACTERS:].strip()}"


def _json_part(child: Child, case: str, module: str, *arguments: str) -> Outcome:
    """Run a module that prints one JSON object as its last line."""
    status, output = child.run("-m", module, *arguments)
    lines = output.strip().splitlines()
    if status or not lines:
        return Outcome(error=_failure(status, output))
    return Outcome([(case, json.loads(lines[-1]))])


def _tests_part(child: Child, out: Path) -> Outcome:
    """Run the tests marked gpu; none that ran proves nothing, so it counts as a failure."""
    report = out / "logs" / "tests.xml"
    report.unlink(missing_ok=True)
    status, output = child.run("-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", "tests")
    if not report.is_file():
        return Outcome(error=_failure(status, output))
    cases = list(xml.etree.ElementTree.parse(report).getroot().iter("testcase"))
    marks = {"skipped": "skipped", "failure": "failed", "error": "failed"}
    states = [next((marks[child.tag] for child in case if child.tag in marks), "passed") for case in cases]
    bad = [str(case.get("name")) for case, state in zip(cases, states) if state == "failed"]
    figures = {state: states.count(state) for state in ("passed", "failed", "skipped")} | {"failed_tests": bad}
    error = "" if figures["passed"] and not status else _failure(status, output)
    return Outcome([("pytest -m gpu", figures)], error)


def _kernels_part(child: Child, out: Path, quick: bool) -> Outcome:
    """Run the kernel benchmarks; every one becomes a row, those that failed are named by the log."""
    report = out / "kernels.json"
    report.unlink(missing_ok=True)
    short = ["--benchmark-min-rounds=1", "--benchmark-max-time=0.01"] if quick else []
    status, output = child.run("-m", "pytest", "-q", "bench/kernels", f"--benchmark-json={report}", *short)
    results = []
    if report.is_file() and report.stat().st_size:
        for entry in json.loads(report.read_text())["benchmarks"]:
            stats = {f"{name}_s": entry["stats"][name] for name in ("median", "q1", "q3", "min")}
            figures = {"group": entry["group"], **stats, "rounds": entry["stats"]["rounds"], **entry["extra_info"]}
            results.append((entry["name"], figures))
    return Outcome(results, "" if results and not status else _failure(status, output))


def _rows_part(child: Child, out: Path, name: str, arguments: list[str]) -> Outcome:
    """Run a comparison of providers, encoder or training; every provider becomes a row."""
    scratch = out / "logs" / f"{name}.jsonl"
    scratch.unlink(missing_ok=True)
    status, output = child.run("-m", f"fastskel.bench.{name}", "--out", str(scratch), *arguments)
    rows = [json.loads(line) for line in scratch.read_text().splitlines()] if scratch.is_file() else []
    shared = ("device", "versions", "commit", "date", "part")
    results = [
        (
            " ".join(str(row[key]) for key in ("part", "case", "provider") if key in row),
            {k: v for k, v in row.items() if k not in (*shared, "case")},
        )
        for row in rows
    ]
    return Outcome(results, "" if results and not status else _failure(status, output))


def _command_output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMITS_S["environment"])
    return done.stdout.strip() if done.returncode == 0 else None


def _environment_part(device: str) -> Outcome:
    """Facts of the machine; what cannot be read is None."""
    figures: dict[str, Any] = {"cuda": torch.version.cuda, "hip": torch.version.hip, "threads": torch.get_num_threads()}
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        query = (
            "nvidia-smi",
            "--id=0",
            "--query-gpu=driver_version,clocks.max.sm,power.limit",
            "--format=csv,noheader",
        )
        figures |= {
            "capability": list(torch.cuda.get_device_capability(0)),
            "memory_gib": found.total_memory / 2**30,
            "multiprocessors": found.multi_processor_count,
            "devices": torch.cuda.device_count(),
            "driver_clock_power": _command_output(*query),
        }
    return Outcome([("machine", figures)])


def _jobs(given: argparse.Namespace, device: str) -> list[tuple[str, str, Callable[[Child], Outcome]]]:
    """Name and case of every job, with what runs it."""
    quick = ["--quick"] if given.quick else []
    on = ["--device", device]
    jobs: list[tuple[str, str, Callable[[Child], Outcome]]] = [
        ("environment", "machine", lambda child: _environment_part(device)),
        ("peak", "device", lambda child: _json_part(child, "device", "fastskel.bench.peak", *on, *quick)),
        ("tests", "pytest -m gpu", lambda child: _tests_part(child, given.out)),
        ("kernels", "bench/kernels", lambda child: _kernels_part(child, given.out, given.quick)),
    ]
    arguments = [*on, *quick, *(["--kernels", *given.kernels] if given.kernels else [])]
    jobs.append(("training", "dste", lambda child, a=arguments: _rows_part(child, given.out, "training", a)))  # type: ignore[misc]
    size = ["--batch-size", str(given.batch_size)] if given.batch_size else []
    for recipe in given.recipes:
        for precision in given.precisions:
            case = f"{recipe} {precision}"
            command = ["--recipe", recipe, "--precision", precision, *on, *size, *quick]
            jobs.append(
                ("step", case, lambda child, c=case, a=command: _json_part(child, c, "fastskel.bench.step", *a))  # type: ignore[misc]
            )
    # fp32 steps are too long for a loader to show beside them
    for feed in ("cached", "native", "triton")[: None if device == "cuda" else 2]:
        command = ["--recipe", given.recipes[0], "--precision", given.precisions[0], "--feed", feed, *on, *size, *quick]
        jobs.append(
            ("loader", feed, lambda child, c=feed, a=command: _json_part(child, f"step {c}", "fastskel.bench.step", *a))  # type: ignore[misc]
        )
    for encoder in ("dste", "sttr"):
        arguments = ["--encoder", encoder, *on, *quick, "--batch", "8" if given.quick else "356"]
        jobs.append(("encoder", encoder, lambda child, a=arguments: _rows_part(child, given.out, "encoder", a)))  # type: ignore[misc]
    return [job for job in jobs if job[0] in given.parts]


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for rows and logs; rows are appended")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--recipes", nargs="+", choices=STEP_RECIPES, default=STEP_RECIPES, help="of the step part")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="of the step part")
    parser.add_argument("--kernels", nargs="+", help="of the training part: torch, triton; on a GPU both by default")
    parser.add_argument("--batch-size", type=int, help="of the step part; the recipe's 356 by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is for rehearsals")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    parser.add_argument("--commit", help="commit of the sources, where git cannot tell")
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help="where tests/ and bench/kernels lie")
    given = parser.parse_args(arguments)
    given.out = given.out.resolve()
    return given


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; returns 0, 1 if one failed, 2 without a GPU."""
    given = _arguments(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print(
            f"gpu: device must be a GPU that torch {torch.__version__} sees, got none. Run this where there is one, "
            "or rehearse with --device cpu --quick.",
            file=sys.stderr,
        )
        return 2
    name = torch.cuda.get_device_name(0) if given.device == "cuda" else "cpu"
    (given.out / "logs").mkdir(parents=True, exist_ok=True)
    rows = given.out / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.jsonl"
    origin = provenance()
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    shared = {
        "device": name,
        "versions": origin["versions"],
        "commit": given.commit or origin["commit"],
        "date": date,
    }
    deadline, failures = time.monotonic() + TOTAL_S, 0

    def write(part: str, case: str, seconds: float, figures: dict[str, Any], error: str) -> None:
        row = {"id": f"{date} {part} {case}", "part": part, "case": case, "status": "failed" if error else "ok"}
        row |= {**shared, "seconds": round(seconds, 2), **figures} | ({"error": error} if error else {})
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")

    for part, case, run in _jobs(given, given.device):
        begin = time.monotonic()
        limit = min(LIMITS_S[part], deadline - begin)
        log = given.out / "logs" / f"{part}-{case}.txt".replace("/", "-").replace(" ", "-")
        try:
            if limit < LEAST_S:
                raise TimeoutError(f"none of the {TOTAL_S} s was left")
            outcome = run(Child(log, limit, given.repository))
        # whatever stops one part is a result to record, and the next part runs
        except Exception as error:
            outcome = Outcome(error=f"{type(error).__name__}: {error}")
        seconds = time.monotonic() - begin
        found = dict(outcome.results)
        if outcome.error:
            # what a failed job still knows of itself, such as the number of tests that passed
            write(part, case, seconds, found.pop(case, {}), outcome.error)
        for other, figures in found.items():
            write(part, other, seconds, figures, "")
        failed = bool(outcome.error) or any(figures.get("status") == "failed" for figures in found.values())
        failures += failed
        print(f"{'FAILED' if failed else 'ok':<7}{part:<12}{case:<22}{seconds:7.1f} s", flush=True)
    print(f"{failures} failed; rows in {rows}, output in {given.out / 'logs'}")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
