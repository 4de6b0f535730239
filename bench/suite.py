"""Run the benchmarks as one suite: facts of the machine first, then case after case, then a table, files and pictures.

    fastskel bench quick
    python -m fastskel.bench.suite all --device cuda --out DIR

Every case is a process with a time limit. One that fails, is too slow, or whose results do not agree with the reference is a
row with its error and no speed, and the next case runs. A folder holds everything: `rows.jsonl` and `rows.csv`, `machine.json`,
`table.txt`, `plots/*.png`, and in `logs` what the cases printed.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fastskel.bench.cases import SELECTIONS, Case, cases
from fastskel.bench.children import TIMED_OUT, Child, failure, read_rows
from fastskel.bench.harness import append_rows, origin
from fastskel.bench.intensity import BACKWARD
from fastskel.bench.kernel_rows import kernel_rows
from fastskel.bench.machine import describe
from fastskel.bench.plots import draw
from fastskel.bench.rows import Difference, agreement, name, peak_share, unmatched
from fastskel.bench.table import differences_table, legend, rows_table, unmatched_lines
from tqdm import tqdm

from fastskel.atomic import atomic_write

__all__ = ["compare_runs", "find_rows", "main", "run"]

Row = dict[str, Any]

ROWS, TABLE, FACTS, LOGS, PLOTS = "rows.jsonl", "table.txt", "machine.json", "logs", "plots"
FACTS_LIMIT_S, INTENSITY_LIMIT_S = 60.0, 120.0
# where rows of earlier runs lie: of this folder's runs, and in a checkout those of machines measured so far
RUNS = Path("bench-run")
RESULTS = Path(__file__).resolve().parent / "results"


def _facts(out: Path, device: str, smoke: bool) -> tuple[Row, str]:
    """Measure the machine in a process of its own; returns its facts and what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "facts.jsonl"
        command = ["--out", str(path), "--device", device, *(["--quick"] if smoke else [])]
        status, output = Child(out / LOGS / "machine.txt", FACTS_LIMIT_S).run("-m", "fastskel.bench.machine", *command)
        if status or not path.is_file():
            return {}, failure(status, output)
        return read_rows(path)[-1], ""


def _run_case(case: Case, out: Path, device: str, limit_s: float, smoke: bool) -> tuple[list[Row], str]:
    """Run one case in a process; returns the rows it made, also before it failed, and what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ROWS
        tiny = smoke or case.tiny_kernels
        child = Child(out / LOGS / f"{case.name}.txt", limit_s, environment={"FASTSKEL_BENCH_QUICK": "1"} if tiny else {})
        status, output = child.run(*case.command(path, smoke=smoke))
        rows: list[Row] = []
        if path.is_file():
            try:
                rows = kernel_rows(path, torch.device(device), quick=tiny) if case.is_pytest else read_rows(path)
            except ValueError as error:
                # killed in the middle of writing
                output += f"\nits results are not readable: {error}"
                status = status or 1
    if status == TIMED_OUT:
        return rows, f"not done within {limit_s:.0f} s"
    if status:
        return rows, failure(status, output)
    return rows, "" if rows else "it made no rows"


def _intensity(out: Path) -> list[Row]:
    """Count what the timed encoders compute and move; without it there is no roofline of them, and the log says why."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ROWS
        child = Child(out / LOGS / "intensity.txt", INTENSITY_LIMIT_S)
        status, _ = child.run("-m", "fastskel.bench.intensity", str(out / ROWS), "--out", str(path))
        return [] if status else read_rows(path)


def _complete(rows: Sequence[Row], case: Case, facts: Mapping[str, Any], begun: str) -> list[Row]:
    """Give rows their id, their case of the suite, and their share of the peak."""
    made = []
    for row in rows:
        words = [begun, *name(row), *([str(row["provider"])] if row.get("provider") is not None else [])]
        full = {"id": " ".join(words), "suite_case": case.name, "status": "ok", **row}
        share = peak_share(full, facts)
        made.append(full if share is None else {**full, "peak_share": share})
    return made


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_write(path) as scratch, scratch.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()})


def _folder(out: Path | None, selection: str, begun: datetime.datetime) -> Path:
    folder = RUNS / f"{selection}-{begun:%Y%m%d-%H%M%S}" if out is None else out
    if (folder / ROWS).exists():
        raise ValueError(f"bench: out must be a folder without rows of an earlier run, got {folder}. Name another one.")
    return folder


def find_rows(source: str) -> list[Row]:
    """Read rows of an earlier run.

    Args:
        source: File of JSON lines, folder of a run, or the id of one row of a run in `bench-run` or of the committed results.
    Raises:
        ValueError: If there are none.
    """
    path = Path(source)
    if path.is_dir():
        path = path / ROWS
    if path.is_file():
        return read_rows(path)
    known = [*sorted(RUNS.glob(f"*/{ROWS}")), *sorted(RESULTS.glob("*.jsonl"))]
    for file in known:
        if found := [row for row in read_rows(file) if row.get("id") == source]:
            return found
    raise ValueError(
        f"bench: rows must be a file, a folder of a run, or the id of a row in {RUNS}, got {source!r}. "
        f"Searched {len(known)} files."
    )


def _differences(found: Sequence[Difference], earlier: Sequence[Row], later: Sequence[Row]) -> str:
    return "\n".join([differences_table(found), *unmatched_lines(*unmatched(earlier, later))])


def compare_runs(earlier: str, later: str) -> tuple[str, bool]:
    """Put two runs side by side; returns the table, and whether all their ratios agree within their noise."""
    before, after = find_rows(earlier), find_rows(later)
    found = agreement(before, after)
    return _differences(found, before, after), not any(difference.agrees is False for difference in found)


def _report(rows: Sequence[Row], facts: Row, problem: str, compared: str) -> str:
    head = describe(facts) if facts else f"The machine could not be measured: {problem}"
    parts = ["This machine", head, "", rows_table(rows), "", legend()]
    return "\n".join([*parts, *(["", "Beside the earlier run", compared] if compared else [])])


def _compared(compare: str | None, earlier: Sequence[Row], rows: Sequence[Row]) -> str:
    """Compare with an earlier run; a run that took minutes is not thrown away because that cannot be done."""
    if compare is None:
        return ""
    try:
        return _differences(agreement(earlier, rows), earlier, rows)
    except ValueError as error:
        return f"not compared: {error}"


def run(
    selection: str,
    out: Path | None = None,
    *,
    device: str = "cpu",
    parts: Sequence[str] = (),
    limit_s: float | None = None,
    compare: str | None = None,
    reference: Path | None = None,
    compiled: bool = False,
    smoke: bool = False,
    progress: bool = True,
) -> int:
    """Run a selection of the suite, print its table and leave its files.

    Args:
        selection: One of `SELECTIONS`.
        out: Folder for everything; by default one of its own in `bench-run`.
        device: "cpu" or "cuda".
        parts: Cases to run, by the beginnings of their names; all if there are none.
        limit_s: Seconds for each case, instead of its own limit.
        compare: Earlier rows to put the results beside, as `find_rows` takes them.
        reference: Folder of the published code, to be compared from where it lies.
        compiled: Compare with what torch.compile makes of the reference too: minutes.
        smoke: Take sizes that prove that everything runs and say nothing about speed.
        progress: Show a bar on standard error.
    Returns:
        0, or 1 if a case failed.
    Raises:
        ValueError: On a limit that is no time, a device that is not there, a selection, part or earlier row that nobody knows,
            or a used folder.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"bench: device must be one that torch {torch.__version__} sees, got 'cuda'. Leave it out for the CPU.")
    if limit_s is not None and not 0 < limit_s < float("inf"):
        raise ValueError(f"bench: limit-s must be a positive number of seconds, got {limit_s}. Leave it out.")
    chosen = cases(selection, device, parts, reference=reference, compiled=compiled)
    earlier = find_rows(compare) if compare else []
    begun = datetime.datetime.now(datetime.timezone.utc)
    folder = _folder(out, selection, begun)
    folder.mkdir(parents=True, exist_ok=True)
    facts, problem = _facts(folder, device, smoke)
    with atomic_write(folder / FACTS) as scratch:
        scratch.write_text(json.dumps(facts, indent=1) + "\n")
    rows, failed = [], bool(problem)
    bar = tqdm(chosen, disable=not progress, file=sys.stderr, unit="case")
    for case in bar:
        bar.set_description(f"{case.name} (at most {limit_s or case.limit_s:.0f} s)")
        begin = time.monotonic()
        found, error = _run_case(case, folder, device, limit_s or case.limit_s, smoke)
        if error:
            failed = True
            stopped = {"part": case.part, "case": case.name, "status": "failed", "error": error}
            found.append({**stopped, "quick": smoke, "seconds": time.monotonic() - begin, **origin(torch.device(device))})
        complete = _complete(found, case, facts, begun.isoformat(timespec="seconds"))
        append_rows(folder / ROWS, complete)
        rows += complete
    _write_csv(folder / "rows.csv", rows)
    counted = _intensity(folder) if any(row.get("part") in BACKWARD for row in rows) else []
    draw(rows, facts, counted, folder / PLOTS)
    text = _report(rows, facts, problem, _compared(compare, earlier, rows))
    with atomic_write(folder / TABLE) as scratch:
        scratch.write_text(text + "\n")
    print(text)
    print(f"\nAll of it, with logs and pictures, is in {folder}.")
    return int(failed)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run; or with `--agree` compare two runs, which returns 1 if they differ."""
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.suite", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("selection", nargs="?", choices=SELECTIONS, default="quick")
    parser.add_argument("--agree", nargs=2, metavar=("EARLIER", "LATER"), help="compare two runs instead")
    parser.add_argument("--out", type=Path, help=f"folder for everything; by default one in {RUNS}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--parts", nargs="+", default=(), help="beginnings of the names of the cases to run")
    parser.add_argument("--limit-s", type=float, help="seconds for each case")
    parser.add_argument("--compare", help="rows of an earlier run: a file, a folder, or the id of a row")
    parser.add_argument("--reference", type=Path, help="folder of the published code, to be compared from where it lies")
    parser.add_argument("--compile", action="store_true", help="compare with the compiled reference too: minutes")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: whether it runs, not how fast")
    given = parser.parse_args(arguments)
    try:
        if given.agree:
            text, agree = compare_runs(*given.agree)
            print(text)
            return int(not agree)
        return run(
            given.selection, given.out, device=given.device, parts=given.parts, limit_s=given.limit_s, compare=given.compare,
            reference=given.reference, compiled=given.compile, smoke=given.smoke,
        )  # fmt: skip
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
