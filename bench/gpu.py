"""Run everything that waits for a GPU, in stages of at most eight minutes that can be run apart.

    python -m fastskel.bench.gpu --out DIR [--stage check kernels ...]
    python -m fastskel.bench.gpu --stages                             lists them
    python -m fastskel.bench.gpu --out DIR --dry-run                  every stage on a CPU with tiny sizes

Leaves a few small files in DIR: rows appended to <device>.jsonl, each with device, versions, commit and date;
summary-<stages>.txt; and <stages>.tar.gz with all logs, traces and what else the parts wrote. All are there after every part,
whatever becomes of the next. Every part is one process or more, with a time limit: what fails or hangs is recorded, and the next
part runs. The summary is printed last. Exit status: 0 nothing failed, 1 something did, 2 no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fastskel.bench.gpu_parts import Part, Result, Session, kernels, module, printed, sanitizer, tests
from fastskel.bench.step import STEP_RECIPES

from fastskel.atomic import atomic_write
from fastskel.provenance import provenance

__all__ = ["STAGES", "STAGE_S", "main", "parts_of"]

# seconds of all parts of a stage together; starting, and packing what they left, come on top
STAGE_S = 460
STAGES = {
    "check": "what the machine is and reaches; all tests marked gpu",
    "kernels": "each kernel beside its other providers",
    "training": "training steps and extraction beside the reference; where a step's time goes",
    "encoder": "the encoders beside the reference; the loss",
    "loader": "steps per recipe and precision, and fed by each loader; the loader alone",
    "jobs": "whole jobs with the loader on; the largest batch",
    "sweep": "cost per batch size from 1 to 4,096",
    "sanitize": "a few tests of each kernel under compute-sanitizer",
    "compiled": "training steps beside the compiled reference",
    "compiled-max": "the same, compiled with max-autotune",
    "kernels-compiled": "each kernel beside its compiled reference",
    "search": "exact nearest neighbours by the kernel beside the search without it, and torch's products and topk",
}
# the sources that this module lies in; an installed wheel has neither tests nor benchmarks to collect
REPOSITORY = Path(__file__).resolve().parents[1]
COMPILED_MAX = ("reference-compiled-max", "reference-sdpa-compiled-max")
MOST_LINES = 120
# a file of the archive that another machine's limits would refuse
ARCHIVE_BYTES = 15 << 20
# shared by the process's parts: pytest loads the plugins that it is told of, none that an environment happens to have
ENVIRONMENT = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1"}


@dataclass
class Report:
    """What has been found so far.

    Attributes:
        shared: What every row says: device, versions, commit, date.
        rows: File that rows are appended to.
        states: Parts that ended, their state and seconds.
        failures: What failed, and why, in one line each.
        ratios: Speeds beside others, in one line each.
        groups: Medians of kernel benchmarks by group and provider, seconds.
        facts: What else is worth a line: measured peaks, profiles.
    """

    shared: dict[str, Any]
    rows: Path
    states: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    ratios: list[str] = field(default_factory=list)
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    facts: list[str] = field(default_factory=list)

    def add(self, part: str, result: Result, seconds: float) -> None:
        """Append a row, and keep what the summary says of it."""
        figures = {key: value for key, value in result.figures.items() if key not in self.shared}
        row: dict[str, Any] = {"id": f"{self.shared['date']} {part} {result.case}", "part": part, "case": result.case}
        row |= {"status": result.status, **self.shared, "seconds": round(seconds, 2), **figures}
        row |= {"error": result.error} if result.error else {}
        with self.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if result.status == "failed":
            last = result.error.strip().splitlines()[-1:] or [""]
            self.failures.append(f"{part}: {result.case}: {last[0][:160]}")
            self.failures += [f"  {name}" for name in figures.get("failed_tests", [])]
        elif figures.get("speedup") is not None:
            spread = f"[{figures.get('speedup_q20', 0):.2f}, {figures.get('speedup_q80', 0):.2f}]"
            self.ratios.append(f"{result.case:<60} {figures['median_ms']:10.3f} ms {figures['speedup']:6.2f}x {spread}")
        elif figures.get("group") and figures.get("provider"):
            self.groups.setdefault(figures["group"], {})[figures["provider"]] = figures["median_s"]
        elif "busy_share" in figures:
            top = ", ".join(f"{kernel['name'][:30]} {100 * kernel['share']:.0f} %" for kernel in figures["kernels"][:3])
            about = f"{figures['span_ms']:.2f} ms, busy {100 * figures['busy_share']:.1f} %, {figures['launches']:.0f} launches"
            self.facts.append(f"{result.case}: {about}; {top}")
        elif part == "machine":
            peaks = {key: value for key, value in figures.items() if key.endswith("_per_s") and isinstance(value, float)}
            self.facts.append("measured peaks: " + ", ".join(f"{key} {value:.4g}" for key, value in peaks.items()))

    def kernel_lines(self) -> list[str]:
        """Say of each group of kernel benchmarks how the kernel stands beside the fastest other provider."""
        lines = []
        for group, medians in self.groups.items():
            others = {name: value for name, value in medians.items() if not name.startswith("triton")}
            for name in (n for n in medians if n.startswith("triton")):
                if others:
                    best = min(others, key=others.__getitem__)
                    ratio = others[best] / medians[name]
                    lines.append(f"{group:<60} {1e3 * medians[name]:10.3f} ms {ratio:6.2f}x of {best}, {name}")
        return lines

    def text(self) -> str:
        """Return the summary; what failed comes last, where a reply that is cut at its beginning still has it."""
        lines = [f"device {self.shared['device']}, commit {self.shared['commit']}, {self.shared['date']}", *self.facts]
        for title, part in (
            ("beside the baseline", self.ratios), ("kernels beside the best other", self.kernel_lines()),
            ("failed", self.failures),
        ):  # fmt: skip
            lines += [f"-- {title}: {len(part)}", *part[:MOST_LINES]]
            lines += [f"   {len(part) - MOST_LINES} more in the rows"] if len(part) > MOST_LINES else []
        return "\n".join([*lines, "-- parts", *self.states]) + "\n"


def parts_of(stage: str, dry: bool, work: Path) -> list[Part]:
    """List the parts of a stage; those of a rehearsal run the same modules on a CPU with tiny sizes."""
    on = ["--device", "cpu", "--quick"] if dry else ["--device", "cuda"]
    # who takes part in a rehearsal, beside the reference: each benchmark has a test of its own with all that a CPU has
    own = ["--providers", "fastskel", "--rounds", "1"]
    if stage == "check":
        return [module("machine", "machine", 60, *on), tests(400)]
    if stage == "kernels":
        return [kernels("kernels", STAGE_S, "not compiled")]
    if stage == "training":
        return [
            module("training", "training", 310, *on, *(["--limit", "0", *own] if dry else ["--limit", "60"])),
            module("profile_step", "profile", 150, *on, "--traces", str(work / "traces")),
        ]
    if stage == "encoder":
        size = ["--batch", "2", "--limit", "0", "--precision", "bf16", *own] if dry else ["--batch", "356", "--limit", "15"]
        names = ("dste", "sttr")[: 1 if dry else None]
        encoders = [module("encoder", f"encoder-{name}", 180, "--encoder", name, *on, *size) for name in names]
        rows = ["8", "--limit", "0"] if dry else ["356", "1024", "4096", "16384"]
        return [*encoders, module("loss", "loss", 100, *on, "--rows", *rows)]
    if stage == "loader":
        steps = [
            printed("step", f"step-{recipe}-{precision}", 45, "--recipe", recipe, "--precision", precision, *on)
            for recipe in STEP_RECIPES for precision in ("bf16", "fp32")
        ]  # fmt: skip
        # fp32 steps are too long for a loader to show beside them; the triton engine needs a GPU
        engines = ("native", "triton")[: 1 if dry else None]
        feeds = [printed("step", f"step-fed-{engine}", 45, "--feed", engine, *on) for engine in engines]
        # it has no sizes to choose but these
        alone = ["--rounds", "1", "--clips", "16", "--parts", "speed"] if dry else ["--rounds", "3"]
        # a fed step is the step, and more
        return [*([] if dry else steps), *feeds, module("loader", "loader", 150, *alone)]
    if stage == "jobs":
        job = module("job", "job", 300, *on, *([] if dry else ["--limit-s", "90"]))
        # nothing fits into so little
        largest = ["--parts", "largest", *(["--budget-gib", "0.0001", *own] if dry else ["--search-s", "90"])]
        return [job, module("sweep", "sweep-largest", 160, *on, *largest)]
    if stage == "sweep":
        # whole steps of four views take four times as long
        limits = {"step": 310, "encoder": 150}
        until = ["--most", "2", *own] if dry else ["--limit-s", "5"]
        return [
            module("sweep", f"sweep-{name}", limits[name], *on, "--parts", name, *until)
            for name in list(limits)[: 1 if dry else None]
        ]
    if stage == "sanitize":
        return [sanitizer(tool, STAGE_S // 2) for tool in ("memcheck", "racecheck")[: 1 if dry else None]]
    if stage == "search":
        # features take seconds to make
        some = ["--providers", "fastskel fp32", "--rounds", "1"] if dry else ["--rounds", "10", "--limit-s", "20"]
        cases = [(features, k) for features in ("fp32", "bf16") for k in ("1", "5", "20")][: 1 if dry else None]
        return [
            module("retrieval", f"search-{features}-k{k}", STAGE_S // len(cases), *on, *some, "--features", features, "--k", k)
            for features, k in cases
        ]
    if stage == "kernels-compiled":
        # on a CPU the same as "kernels"
        return [] if dry else [kernels("kernels-compiled", STAGE_S, "compiled or triton")]
    if dry:
        # without what is compiled the same as "training", and compiling takes minutes
        return []
    beside = ("reference-compiled",) if stage == "compiled" else COMPILED_MAX
    about = ["--parts", "step", "--limit", "30", "--providers", "fastskel-triton-graph", *beside]
    return [module("training", f"training-{stage}", STAGE_S, *on, *about)]


def run_stage(stage: str, session: Session, report: Report, out: Path, name: str) -> None:
    """Run the parts of a stage one after another, and write summary and archive after each."""
    session.deadline = time.monotonic() + STAGE_S
    for part in parts_of(stage, session.dry, session.work):
        begin, session.limit_s, states = time.monotonic(), part.limit_s, []
        try:
            for result in part.run(session):
                report.add(part.name, result, time.monotonic() - begin)
                states.append(result.status)
        except Exception as error:  # whatever stops one part is a result to record, and the next part runs
            states.append("failed")
            wrong = Result(part.name, {}, "failed", f"{type(error).__name__}: {error}")
            report.add(part.name, wrong, time.monotonic() - begin)
        counts = ", ".join(f"{states.count(state)} {state}" for state in ("ok", "failed", "skipped") if state in states)
        failed = "failed" in states or not states
        line = f"{'FAILED' if failed else 'ok':<7}{stage:<18}{part.name:<22}{time.monotonic() - begin:7.1f} s  {counts}"
        report.states.append(line)
        print(line, flush=True)
        with atomic_write(out / f"summary-{name}.txt") as scratch:
            scratch.write_text(report.text())
        _archive(session.work, out / f"{name}.tar.gz")


def _packed_bytes(path: Path) -> int:
    # compressed already, or text that compresses to a tenth
    return path.stat().st_size // (1 if path.suffix == ".gz" else 10)


def _archive(folder: Path, target: Path) -> None:
    """Pack a folder; the largest files are left out, by name, where the whole would be too large to be carried away."""
    size, left_out = 0, []
    with atomic_write(target) as scratch, tarfile.open(scratch, "w:gz") as archive:
        for path in sorted((path for path in folder.rglob("*") if path.is_file()), key=_packed_bytes):
            size += _packed_bytes(path)
            if size > ARCHIVE_BYTES:
                left_out.append(str(path.relative_to(folder)))
            else:
                archive.add(path, str(path.relative_to(folder)))
    if left_out:
        print(f"too large for the archive: {', '.join(left_out)}")


def _listing() -> str:
    lines = []
    for number, (stage, about) in enumerate(STAGES.items(), 1):
        parts = ", ".join(f"{part.name} {part.limit_s} s" for part in parts_of(stage, False, Path()))
        lines.append(f"{number} {stage:<18}{about}\n  {'':<18}{parts}")
    return "\n".join(lines)


def _stages(names: Sequence[str]) -> list[str]:
    """Return stages by number or name, in their order."""
    known = list(STAGES)
    chosen = {known[int(name) - 1] if name.isdecimal() and 0 < int(name) <= len(known) else name for name in names}
    wrong = sorted(chosen - set(known))
    if wrong:
        raise ValueError(f"gpu: --stage must be of {', '.join(known)} or 1 to {len(known)}, got {wrong[0]}. See --stages.")
    return [stage for stage in known if stage in chosen]


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for rows, summary and archive; rows are appended")
    parser.add_argument("--stage", nargs="+", default=list(STAGES), metavar="STAGE", help="names or numbers; all by default")
    parser.add_argument("--stages", action="store_true", help="list the stages and stop")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU with tiny sizes: whether it runs, not how fast")
    parser.add_argument("--commit", help="commit of the sources, where git cannot tell")
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help="where tests/ and bench/kernels lie")
    given = parser.parse_args(arguments)
    try:
        given.stage = _stages(given.stage)
    except ValueError as error:
        parser.error(str(error))
    if given.out is None and not given.stages:
        parser.error("--out must be a folder, got none. Name where results go.")
    return given


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; returns 0, 1 if something failed, 2 without a GPU."""
    given = _arguments(arguments)
    if given.stages:
        print(_listing())
        return 0
    if not given.dry_run and not torch.cuda.is_available():
        print(
            f"gpu: device must be a GPU that torch {torch.__version__} sees, got none. Run this where there is one, "
            "or rehearse with --dry-run.",
            file=sys.stderr,
        )
        return 2
    os.environ.update(ENVIRONMENT)
    device = "cpu" if given.dry_run else "cuda"
    name = "cpu" if given.dry_run else torch.cuda.get_device_name(0)
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    origin = provenance()
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    commit = given.commit or origin["commit"]
    shared = {"device": name, "versions": origin["versions"], "commit": commit, "date": date}
    report = Report(shared, out / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.jsonl")
    work = Path(tempfile.mkdtemp(prefix="fastskel-gpu-"))
    try:
        session = Session(device, given.dry_run, work, given.repository.resolve())
        label = "all" if given.stage == list(STAGES) else "-".join(given.stage)
        for stage in given.stage:
            run_stage(stage, session, report, out, label)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"\n{report.text()}\nrows in {report.rows}; logs and traces in {out / f'{label}.tar.gz'}")
    return int(any(line.startswith("FAILED") for line in report.states))


if __name__ == "__main__":
    sys.exit(main())
