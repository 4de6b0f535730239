"""The suite: what fails is a row and stops nothing, what is asked for wrongly is refused, and files and table say the same."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fastskel.bench import cases, suite
from fastskel.bench.cases import Case
from fastskel.bench.children import read_rows
from fastskel.bench.harness import flops
from fastskel.bench.kernel_rows import kernel_rows
from fastskel.bench.providers import Setting, build

from fastskel.cli import main as fastskel

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"device": "a machine", "cpu": "a machine", "matmul_bf16_tflop_per_s": 1.0, "copy_gb_per_s": 40.0}
# what a benchmark appends
BASE = {
    "part": "forward", "case": "bf16 N=8", "precision": "bf16", "provider": "reference", "median_ms": 100.0, "speedup": 1.0,
    "speedup_q20": 1.0, "speedup_q80": 1.0, "uncertainty": 0.02, "noisy": False, "gflop_per_s": 250.0, "quick": False,
    "device": "a machine",
}  # fmt: skip
OWN = {**BASE, "provider": "fastskel", "median_ms": 50.0, "speedup": 2.0, "gflop_per_s": 500.0, "widths": [1, 2]}
PROGRAM = """
import json, sys, time
out, rows, behaviour = sys.argv[1:]
print("begun", flush=True)
if rows != "[]":
    with open(out, "w") as file:
        file.writelines(json.dumps(row) + chr(10) for row in json.loads(rows))
if behaviour == "hang":
    time.sleep(60)
if behaviour == "gate":
    raise ValueError("encoder: output of fastskel must be within 1e-05 of the reference, got 3.00e-01. Mend it.")
"""


@dataclass(frozen=True)
class Fake(Case):
    """A process that writes rows and then ends, hangs, or finds that providers differ."""

    rows: tuple[Any, ...] = ()
    behaviour: str = "end"

    def command(self, out: Path, *, smoke: bool = False) -> list[str]:
        return ["-c", PROGRAM, str(out), json.dumps(self.rows), self.behaviour]


def fake(name: str, *rows: Any, behaviour: str = "end", limit_s: float = 20.0) -> Fake:
    return Fake(name, "encoder", "encoder", (), limit_s, rows=rows, behaviour=behaviour)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """Cases of the next run, on a machine that is known already."""
    found: list[Case] = []
    monkeypatch.setattr(suite, "cases", lambda *given, **options: found)
    monkeypatch.setattr(suite, "_facts", lambda *given: (dict(FACTS), ""))
    monkeypatch.setattr(suite, "_intensity", lambda out: [])
    monkeypatch.setattr(suite, "describe", lambda facts: "\n".join(facts))
    return found


def test_what_fails_is_a_row_and_the_next_case_runs(chosen: list[Case], tmp_path: Path, capsys) -> None:
    chosen += [
        fake("hangs", BASE, behaviour="hang", limit_s=1.0), fake("differs", behaviour="gate"), fake("silent"),
        fake("works", BASE, OWN),
    ]  # fmt: skip
    out = tmp_path / "run"
    assert suite.run("quick", out, progress=False) == 1
    rows = read_rows(out / "rows.jsonl")
    assert [(row["suite_case"], row["status"]) for row in rows] == [
        ("hangs", "ok"), ("hangs", "failed"), ("differs", "failed"), ("silent", "failed"), ("works", "ok"), ("works", "ok"),
    ]  # fmt: skip
    failed = [row for row in rows if row["status"] == "failed"]
    # a red gate prints no speed, nor does anything else that failed
    assert not any("median_ms" in row or "speedup" in row for row in failed)
    assert failed[0]["error"] == "not done within 1 s" and failed[2]["error"] == "it made no rows"
    assert "must be within 1e-05 of the reference" in failed[1]["error"]
    assert {"commit", "date", "versions", "device", "seconds"} <= failed[0].keys()
    assert (out / "logs" / "differs.txt").read_text().startswith("begun")
    assert [row["peak_share"] for row in rows[-2:]] == [0.25, 0.5]
    assert len({row["id"] for row in rows}) == len(rows) - 1, "the hanging case's reference has the name of the working one's"

    text = capsys.readouterr().out
    assert text.startswith("This machine\ndevice\n") and "What the columns say" in text and str(out) in text
    assert re.search(r"fastskel +50\.0 ms +2\.00 .* 50% +2\.0x faster\n", text)
    assert "failed: ValueError: encoder: output of fastskel must be within" in text
    assert (out / "table.txt").read_text() in text
    assert json.loads((out / "machine.json").read_text()) == FACTS
    with (out / "rows.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows)
    assert table[-1]["speedup"] == "2.0" and json.loads(table[-1]["widths"]) == [1, 2] and table[1]["median_ms"] == ""


def test_all_well(chosen: list[Case], tmp_path: Path, capsys) -> None:
    chosen.append(fake("works", BASE, OWN))
    assert suite.run("quick", tmp_path / "run", progress=True) == 0
    # progress goes where a table in a file does not meet it
    assert "works (at most 20 s)" in capsys.readouterr().err
    with pytest.raises(ValueError, match="out must be a folder without rows of an earlier run"):
        suite.run("quick", tmp_path / "run")


def test_limit_for_each_case(chosen: list[Case], tmp_path: Path) -> None:
    chosen.append(fake("hangs", behaviour="hang", limit_s=50.0))
    assert suite.run("quick", tmp_path / "run", limit_s=1.0, progress=False) == 1
    (row,) = read_rows(tmp_path / "run" / "rows.jsonl")
    assert row["error"] == "not done within 1 s" and 1 <= row["seconds"] < 20


def test_an_earlier_run_beside_this_one(chosen: list[Case], tmp_path: Path, capsys) -> None:
    chosen.append(fake("works", BASE, OWN))
    assert suite.run("quick", tmp_path / "first", progress=False) == 0
    faster = {**OWN, "speedup": 4.0, "median_ms": 25.0}
    chosen[0] = fake("works", BASE, faster)
    capsys.readouterr()
    assert suite.run("quick", tmp_path / "second", compare=str(tmp_path / "first"), progress=False) == 0
    text = capsys.readouterr().out
    assert re.search(r"fastskel +50\.0 ms +25\.0 ms +2\.00 +2\.00 +4\.00 +4% +DIFFER by more than both noises\n", text)
    assert "1 of 1 speed-ups differ" in text

    # another machine's: refused in a sentence, and the run is kept
    chosen[0] = fake("works", BASE, {**OWN, "device": "another"})
    assert suite.run("quick", tmp_path / "third", compare=str(tmp_path / "first"), progress=False) == 0
    text = capsys.readouterr().out
    assert "must have one device, got 'a machine' and 'another'" in text and "2.0x faster" in text
    assert (tmp_path / "third" / "rows.csv").is_file()

    # through the command line, as files, folders and ids
    runs = [str(tmp_path / name) for name in ("first", "second", "third")]
    assert suite.main(["--agree", runs[0], runs[0]]) == 0
    assert suite.main(["--agree", runs[0], f"{runs[1]}/rows.jsonl"]) == 1
    assert fastskel(["bench", "compare", runs[0], runs[1]]) == 1
    assert fastskel(["bench", "compare", runs[0], runs[0]]) == 0
    capsys.readouterr()
    assert fastskel(["bench", "compare", runs[0], runs[2]]) == 2
    assert "must have one device" in capsys.readouterr().err


def test_rows_are_found_by_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench-run" / "one").mkdir(parents=True)
    (tmp_path / "bench-run" / "one" / "rows.jsonl").write_text('{"id": "now encoder", "part": "forward"}\n{"id": "other"}\n')
    assert suite.find_rows("now encoder") == [{"id": "now encoder", "part": "forward"}]
    message = "must be a file, a folder of a run, or the id of a row in bench-run, got 'no'"
    with pytest.raises(ValueError, match=re.escape(message)):
        suite.find_rows("no")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quick", "--parts", "enc", "nothing"], "parts must begin names of cases (encoder-inference, "),
        (["quick", "--compare", "nothing"], "must be a file, a folder of a run"),
        pytest.param(["quick", "--device", "cuda"], "device must be one that torch", marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason="there is a GPU")),
    ],
    ids=["parts", "compare", "device"],
)  # fmt: skip
def test_refusals(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for main in (suite.main, lambda words: fastskel(["bench", *words])):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    # before anything was measured or written
    assert list(tmp_path.iterdir()) == []


def test_selections() -> None:
    with pytest.raises(ValueError, match="selection must be one of quick, kernels"):
        cases.cases("fast", "cpu")
    names = {selection: [case.name for case in cases.cases(selection, "cpu")] for selection in cases.SELECTIONS}
    assert all(names.values())
    # each of its own log, and in "all" whatever can be asked for alone
    assert all(len(set(found)) == len(found) for found in names.values())
    assert names["all"] == [name for key in names if key not in ("quick", "all") for name in names[key]]
    chosen = [case.name for case in cases.cases("quick", "cpu", ["enc", "loss"])]
    assert chosen == ["encoder-inference", "encoder-training", "loss"]
    (plain,), (more,) = cases.cases("step", "cpu"), cases.cases("step", "cpu", compiled=True, reference=Path("code"))
    assert more.command(Path("rows"))[-3:] == ["--reference", "code", "--compile"] and "--compile" not in plain.arguments


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_case_names_a_module_and_its_options(device: str) -> None:
    for case in cases.cases("all", device) + cases.cases("quick", device):
        if case.is_pytest:
            continue
        found = importlib.util.find_spec(f"fastskel.bench.{case.module}")
        assert found is not None and found.origin is not None, case.module
        source = Path(found.origin).read_text()
        asked = re.findall(r'add_argument\(\s*"(--[a-z-]+)"', source) + ["--device"] * ("add_device(parser" in source)
        given = {word for word in (*case.arguments, *case.smoke) if word.startswith("--")}
        assert given <= set(asked), f"{case.name}: {given - set(asked)}"


def test_kernels_run_where_no_checkout_is_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # as installed: no settings of pytest above the folder, and no folder in common with where the suite is started
    installed = tmp_path / "bench"
    shutil.copytree(cases.KERNELS, installed / "kernels", ignore=lambda folder, names: {*names} - {"bench_philox.py"})
    shutil.copy(cases.KERNELS.with_name("conftest.py"), installed)
    monkeypatch.setattr(cases, "KERNELS", installed / "kernels")
    (case,) = cases.cases("kernels", "cpu")
    command = [sys.executable, *case.command(tmp_path / "rows.json", smoke=True), "-k", "numpy"]
    done = subprocess.run(command, cwd=tmp_path.anchor, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["provider"] for row in kernel_rows(tmp_path / "rows.json", torch.device("cpu"), quick=True)} == {"numpy"}


def test_without_pytest_benchmark_the_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pytest-benchmark must be installed for the kernels"):
        cases.cases("all", "cpu")
    assert cases.cases("quick", "cpu")


def test_kernel_rows(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    entry = {
        "name": "bench_mlp[eager]", "group": "mlp 1424x64", "params": {"provider": "eager"},
        "stats": {"median": 0.002, "q1": 0.001, "q3": 0.003, "rounds": 7},
        "extra_info": {"gigabytes_per_second": 12.0, "teraflops_per_second": 0.5},
    }  # fmt: skip
    plain = {"name": "bench_x", "group": None, "params": None, "stats": entry["stats"], "extra_info": {}}
    path.write_text(json.dumps({"benchmarks": [entry, plain]}))
    first, second = kernel_rows(path, torch.device("cpu"), quick=True)
    assert (first["case"], first["provider"], first["median_ms"], first["rounds"]) == ("mlp 1424x64", "eager", 2.0, 7)
    assert first["tflop_per_s"] == 0.5 and first["gigabytes_per_second"] == 12.0 and first["quick"] is True
    # not measured in turns
    assert "speedup" not in first and (second["case"], second["provider"]) == ("bench_x", "bench_x")
    path.write_text("")
    assert kernel_rows(path, torch.device("cpu"), quick=False) == []


def test_a_real_case_from_end_to_end(tmp_path: Path) -> None:
    """A machine, a case and its table in another folder, as after an installation."""
    command = [sys.executable, "-m", "fastskel", "bench", "quick", "--smoke", "--parts", "loss", "--out", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rows(tmp_path / "run" / "rows.jsonl")
    assert [(row["part"], row["provider"], row["quick"]) for row in rows] == [
        ("loss", "reference", True), ("loss", "fastskel", True),
    ]  # fmt: skip
    assert all(row["peak_share"] > 0 for row in rows)
    # tiny sizes never look like a result
    assert "runs; a tiny size shows no speed" in done.stdout and "x faster" not in done.stdout
    assert {path.name for path in (tmp_path / "run" / "logs").iterdir()} == {"machine.txt", "loss.txt"}


def test_intensity_counts_what_the_encoders_do(tmp_path: Path) -> None:
    about = {"part": "forward", "case": "fp32 N=2", "encoder": "sttr", "width": 16, "frames": 8, "spatial_tokens": 10}
    about |= {"batch": 2, "precision": "fp32", "median_ms": 2.0}
    rows = [{**about, "provider": name} for name in ("reference", "fastskel", "another")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "fastskel.bench.intensity", "rows.jsonl", "--out", "counted.jsonl"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    counted = {row["provider"]: row for row in read_rows(tmp_path / "counted.jsonl")}
    assert counted.keys() == {"reference", "fastskel"}
    setting = Setting(encoder="sttr", batch=2, width=16, frames=8, joints=5)
    with torch.no_grad():
        real = {p.name: flops(lambda p=p: p.encode(*setting.tokens(2))) for p in build(setting, 0.0)}
    assert {name: row["flops"] for name, row in counted.items()} == {name: real[name] for name in counted}
    # weights are read, tokens read and written
    assert min(row["bytes"] for row in counted.values()) > 4 * 2 * 16 * 18


@pytest.mark.parametrize("limit_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_limit_that_is_no_time_is_refused(chosen: list[Case], tmp_path: Path, limit_s: float) -> None:
    with pytest.raises(ValueError, match="limit-s must be a positive number of seconds"):
        suite.run("quick", tmp_path / "run", limit_s=limit_s, progress=False)
    assert not (tmp_path / "run").exists()


def test_results_cut_off_in_the_middle_are_a_failed_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import sys; open(sys.argv[1], 'w').write('{\"benchmarks\": [{\"na')"
    monkeypatch.setattr(Case, "command", lambda case, out, smoke=False: ["-c", program, str(out)])
    for module in ("", "encoder"):
        found, error = suite._run_case(Case("kernels", "kernels", module, (), 20.0), tmp_path, "cpu", 20.0, False)
        assert found == [] and "its results are not readable" in error


def test_encoders_have_ids_of_their_own_and_comparison_tells_what_is_missing(chosen: list[Case], tmp_path: Path) -> None:
    both = [{**one, "encoder": encoder} for encoder in ("dste", "sttr") for one in (BASE, OWN)]
    chosen[:] = [fake("encoders", *both)]
    assert suite.run("encoder", tmp_path / "a", progress=False) == 0
    assert len({row["id"] for row in read_rows(tmp_path / "a" / "rows.jsonl")}) == 4
    chosen[:] = [fake("encoders", *both[:3])]
    assert suite.run("encoder", tmp_path / "b", progress=False) == 0
    text, agree = suite.compare_runs(str(tmp_path / "a"), str(tmp_path / "b"))
    assert agree and "Only the earlier run timed: encode a batch, sttr, bf16 N=8, fastskel" in text


def test_tiny_sizes_of_the_loader_are_no_result(tmp_path: Path) -> None:
    """Every smoke case says that it is one; the quick loader ends before its process is stopped."""
    for selection in ("quick", "all"):
        for case in cases.cases(selection, "cpu"):
            assert case.is_pytest or "--quick" in case.smoke, case.name
    (loader,) = (case for case in cases.cases("quick", "cpu") if case.name == "loader")
    assert float(loader.arguments[loader.arguments.index("--limit") + 1]) < loader.limit_s
    found, error = suite._run_case(loader, tmp_path, "cpu", 60.0, True)
    assert not error and found and all(row["quick"] for row in found)
