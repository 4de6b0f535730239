"""Compile every Triton kernel at its real shapes for several GPUs, without a GPU, and compare with what is recorded.

Run as `python -m fastskel.bench.offline`. Prints a row for every case with its figures for sm_90, and a line with those
of the other targets. Ends with a nonzero status if a kernel does not compile or has no case, if a hot case spills
registers on sm_90, if shared memory exceeds a target's, or if figures are worse than those in
`bench/results/offline.json`. A process of its own: TRITON_INTERPRET is read when a kernel is decorated, and compilation
needs real JIT functions.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import fastskel.kernels
from fastskel.bench.compile_records import RECORDED, complaints, minor_version, read_records, write_records
from fastskel.bench.compile_usage import TARGETS, Job, Target, compile_case, compile_jobs
from fastskel.kernels._backend import CompileCase, Cost, triton

from fastskel.atomic import atomic_write
from fastskel.provenance import commit

__all__ = ["TARGETS", "compile_case", "main"]

RECORDS = Path(__file__).with_name("results") / "offline.json"
# the card of the roofline times: rates of a copy and of a bfloat16 product measured on it, and its nominal fp32 rate
H200_BYTES_PER_SECOND = 4.3e12
H200_MATRIX_FLOPS = 790e12
H200_FP32_FLOPS = 67e12
# whose figures have the rows of the table
MAIN_TARGET = "sm_90"

Row = dict[str, Any]
# case, target, what is wrong with it
Complaint = tuple[str, str, str]


def import_kernels() -> tuple[dict[str, ModuleType], dict[str, str]]:
    """Import every module of `fastskel.kernels`; returns those, and what is wrong with the others."""
    modules, broken = {}, {}
    for entry in pkgutil.walk_packages(fastskel.kernels.__path__, "fastskel.kernels."):
        try:
            modules[entry.name] = importlib.import_module(entry.name)
        # whatever one module raises, the others are still compiled
        except Exception as error:
            broken[entry.name] = f"does not import: {type(error).__name__}: {error}"
    return modules, broken


def kernel_title(module: str, name: str) -> str:
    """Name a kernel by its module, below `fastskel.kernels`, and its function."""
    return f"{module.removeprefix('fastskel.kernels.')}.{name}"


def uncovered(modules: Mapping[str, ModuleType]) -> list[str]:
    """Name the kernels that no module gives a case for: JIT functions whose names end in `_kernel`."""
    covered = {id(case.kernel) for module in modules.values() for case in getattr(module, "COMPILE_CASES", [])}
    return [
        kernel_title(module, name)
        for module, content in modules.items()
        for name, value in vars(content).items()
        if isinstance(value, triton.runtime.JITFunction)
        and name.endswith("_kernel")
        # elsewhere it is an import
        and value.fn.__module__ == module
        and id(value) not in covered
    ]


def select_cases(modules: Mapping[str, ModuleType], kernel: str, sample: bool) -> list[tuple[str, int, CompileCase]]:
    """Choose cases by a part of their kernels' titles, and of a sample each module's first hot one (else its first).

    Returns:
        Module, position among its cases, and case; in the order of the modules.
    """
    chosen = []
    for name, module in modules.items():
        cases = [
            (name, position, case)
            for position, case in enumerate(getattr(module, "COMPILE_CASES", []))
            if kernel in kernel_title(name, case.kernel.__name__)
        ]
        if sample and cases:
            cases = [next((entry for entry in cases if entry[2].hot), cases[0])]
        chosen.extend(cases)
    return chosen


def roofline(case: CompileCase) -> dict[str, Any]:
    """Say how long a call takes at least on an H200, and which of its rates says so; without a cost, nothing."""
    if case.cost == Cost(0, 0):
        return {"bytes": None, "flops": None, "microseconds": None, "bound": None}
    first = next((kind for kind in case.signature.values() if kind.startswith("*")), "")
    kind, rate = ("fp32", H200_FP32_FLOPS) if first == "*fp32" else ("matrix", H200_MATRIX_FLOPS)
    moving, computing = case.cost.bytes / H200_BYTES_PER_SECOND, case.cost.flops / rate
    bound = kind if computing > moving else "memory"
    return {**case.cost._asdict(), "microseconds": 1e6 * max(moving, computing), "bound": bound}


def table(rows: Sequence[Row]) -> str:
    """Lay out rows by kernel and case: one line for a case, and below it a compact one for its other targets."""
    width = max((len(row["case"]) for row in rows), default=0) + 2
    head = "registers  spilled   shared  matrix   copies              MB     GFLOP        us  bound   on"
    lines, kernel = [f"  {'case':{width}}{head}"], None
    if any(row["target"] != MAIN_TARGET for row in rows):
        lines.append("    other targets: registers spilled shared matrix copies")
    for cases in _grouped(rows):
        main = next((row for row in cases if row["target"] == MAIN_TARGET), cases[0])
        if main["kernel"] != kernel:
            kernel = main["kernel"]
            lines.append(kernel)
        used = f"{main['registers']:9} {main['spilled']:8} {main['shared']:8}  {main['matrix']:8} {main['copies']:13}"
        cost = f"{'-':>8} {'-':>9} {'-':>9}  {'-':7}"
        if main["microseconds"] is not None:
            cost = (
                f"{main['bytes'] / 1e6:8.1f} {main['flops'] / 1e9:9.1f} {main['microseconds']:9.1f}  {main['bound']:7}"
            )
        marks = (mark for mark in ("hot", "new") if main[mark])
        lines.append("  ".join((f"  {main['case']:{width - 2}}", used + cost, main["target"], *marks)))
        others = (
            f"{row['target']}: {row['registers']} {row['spilled']} {row['shared']} {row['matrix']} {row['copies']}"
            for row in cases
            if row is not main
        )
        lines.append("    " + " | ".join(others))
    return "\n".join(line for line in lines if line.strip())


def _grouped(rows: Sequence[Row]) -> list[list[Row]]:
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["kernel"], row["case"]), []).append(row)
    # a module may list its cases by shape: here they stand by kernel
    return sorted(cases.values(), key=lambda group: group[0]["kernel"])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command's options."""
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.offline", description=__doc__.splitlines()[0])
    names = [target.name for target in TARGETS]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--kernel", default="", metavar="PART", help="only kernels whose module.name contains this")
    parser.add_argument("--target", action="append", choices=names, help="only this target; may be repeated")
    parser.add_argument("--sample", action="store_true", help="one case of every module, a hot one if there is one")
    parser.add_argument("--jobs", type=int, default=cores, help="cases compiled at once (default: usable cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    parser.add_argument("--records", type=Path, default=RECORDS, metavar="FILE", help="recorded figures")
    parser.add_argument("--record", action="store_true", help="record the figures of this version of Triton")
    parser.add_argument("--strict", action="store_true", help="fail where a case has no record")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"offline: --jobs must be at least 1, got {options.jobs}. Leave it out for one per core.")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Compile, compare, print, record; returns the number of failures."""
    options = parse(arguments)
    if triton is None:
        print(
            "offline: Triton must be installed to compile kernels, got none. Run `pip install triton`.", file=sys.stderr
        )
        return 1
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        print("offline: TRITON_INTERPRET must be unset, got 1: it replaces the compiler. Unset it.", file=sys.stderr)
        return 1
    modules, broken = import_kernels()
    chosen = select_cases(modules, options.kernel, options.sample)
    failures = [f"{name}: no entry in COMPILE_CASES" for name in uncovered(modules) if options.kernel in name]
    for name, what in broken.items():
        # a filter asks about some kernels: others' modules may be broken
        if options.kernel in name or not chosen:
            failures.append(f"{kernel_title(name, '*')}: {what}")
    if not chosen:
        failures.append(f"--kernel must be part of the name of a kernel with cases, got {options.kernel!r}")
    failures += _repeated(chosen)
    rows, found = _compile(chosen, options.target or [target.name for target in TARGETS], options.jobs)
    version = minor_version(triton.__version__)
    records = read_records(options.records)
    whole = not (options.kernel or options.target or options.sample)
    found += _judge(rows, records.get(version, {}), limits_only=options.record)
    unrecorded = [_complaint(row, "no record; run with --record") for row in rows if row["new"]]
    if options.record:
        _record(records, version, rows, whole)
        write_records(options.records, records)
    elif unrecorded and options.strict and (version in records or not records):
        found += unrecorded
    elif version not in records:
        print(f"offline: nothing is recorded for Triton {version}: figures are compared with limits only")
    print(table(rows))
    if whole and not options.record:
        for name in _gone(records.get(version, {}), rows):
            print(f"gone {name}: recorded, but not compiled; run with --record")
    failures += _joined(found)
    for failure in failures:
        print(f"FAILED {failure}")
    if options.json:
        _write_json(options.json, rows, failures)
    print(f"offline: Triton {triton.__version__}, {len(rows)} compiled, {len(failures)} failures")
    return len(failures)


def _repeated(chosen: Iterable[tuple[str, int, CompileCase]]) -> list[str]:
    seen, failures = set(), []
    for module, _, case in chosen:
        key = kernel_title(module, case.kernel.__name__), case.label
        if key in seen:
            failures.append(f"{key[0]} [{key[1]}]: two cases have this label, and records go by it")
        seen.add(key)
    return failures


def _compile(
    chosen: Iterable[tuple[str, int, CompileCase]], names: Iterable[str], num_processes: int
) -> tuple[list[Row], list[Complaint]]:
    targets = [target for target in TARGETS if target.name in names]
    jobs = {Job(module, position, target): case for module, position, case in chosen for target in targets}
    outcomes = dict(compile_jobs(jobs, num_processes))
    rows, failed = [], []
    for job, case in jobs.items():
        row = {"kernel": kernel_title(job.module, case.kernel.__name__), "case": case.label, "target": job.target.name}
        outcome = outcomes[job]
        if isinstance(outcome, str):
            failed.append(_complaint(row, outcome))
        else:
            rows.append({**row, "hot": case.hot, **outcome, **roofline(case)})
    return rows, failed


def _complaint(row: Row, what: str) -> Complaint:
    return f"{row['kernel']} [{row['case']}]", row["target"], what


def _joined(found: Iterable[Complaint]) -> list[str]:
    """Say once what is said of several targets of a case."""
    targets: dict[tuple[str, str], list[str]] = {}
    for case, target, what in found:
        targets.setdefault((case, what), []).append(target)
    return [f"{case} {', '.join(names)}: {what}" for (case, what), names in targets.items()]


def _judge(rows: Iterable[Row], recorded: Mapping[str, Any], *, limits_only: bool) -> list[Complaint]:
    """Compare rows with limits, and with records unless these are being replaced; notes in each row whether it is new."""
    targets: dict[str, Target] = {target.name: target for target in TARGETS}
    judged = []
    for row in rows:
        record = recorded.get(row["kernel"], {}).get(row["case"], {}).get(row["target"])
        row["new"] = record is None
        found = complaints(row, targets[row["target"]], hot=row["hot"], record=None if limits_only else record)
        judged += [_complaint(row, what) for what in found]
    return judged


def _record(records: dict[str, Any], version: str, rows: Iterable[Row], whole: bool) -> None:
    # what a filter left out keeps its record
    if whole:
        records.pop(version, None)
    for row in rows:
        case = records.setdefault(version, {}).setdefault(row["kernel"], {}).setdefault(row["case"], {})
        case[row["target"]] = {key: row[key] for key in RECORDED}


def _gone(recorded: Mapping[str, Any], rows: Iterable[Row]) -> list[str]:
    compiled = {(row["kernel"], row["case"], row["target"]) for row in rows}
    names = ((kernel, case, name) for kernel, cases in recorded.items() for case in cases for name in cases[case])
    return [f"{kernel} [{case}] {name}" for kernel, case, name in names if (kernel, case, name) not in compiled]


def _write_json(path: Path, rows: Sequence[Row], failures: Sequence[str]) -> None:
    made = {"triton": triton.__version__, "date": datetime.date.today().isoformat(), "commit": commit()}
    with atomic_write(path) as scratch:
        scratch.write_text(json.dumps({**made, "cases": rows, "failures": failures}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(min(main(), 1))
