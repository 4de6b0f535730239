"""The collected GPU run: rehearsed on a CPU through every stage, and what becomes of parts that fail, crash or hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastskel.bench import gpu, gpu_parts, profile_step, step
from fastskel.bench.gpu_parts import Result, Session

from fastskel.recipes import RECIPES

ORIGIN = {"id", "part", "case", "status", "device", "versions", "commit", "date", "seconds"}
# two halves of the rehearsal, of about the same length, which run side by side
HALVES = (
    ["check", "kernels", "training", "encoder"],
    ["loader", "jobs", "sweep", "sanitize", "compiled", "compiled-max", "kernels-compiled", "search"],
)


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "fastskel.bench.gpu", "--out", str(out), *arguments]
    return subprocess.Popen(
        command, cwd=out.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(out: Path, *arguments: str) -> tuple[int, str, str]:
    process = start(out, *arguments)
    printed, errors = process.communicate()
    return process.returncode, printed, errors


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_refuses_without_a_gpu(tmp_path: Path) -> None:
    status, _, errors = run(tmp_path / "out")
    assert status == 2
    assert errors.startswith("gpu: device must be a GPU that torch ")
    assert "got none" in errors and "--dry-run" in errors
    assert not (tmp_path / "out").exists()


def test_stages_fit_eight_minutes_and_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for stage in gpu.STAGES:
        parts = gpu.parts_of(stage, False, Path("work"))
        assert 0 < sum(part.limit_s for part in parts) <= gpu.STAGE_S < 480
        names = [part.name for part in parts]
        assert len(set(names)) == len(names)
        # a rehearsal leaves out what differs in a word only
        assert {part.name for part in gpu.parts_of(stage, True, Path("work"))} <= set(names)
    assert gpu.main(["--stages"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{number} {stage}" in printed for number, stage in enumerate(gpu.STAGES, 1))


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--out", "x", "--stage", "13"], "gpu: --stage must be of check, kernels"),
        (["--out", "x", "--stage", "chekc"], "got chekc"),
        ([], "--out must be a folder, got none"),
    ],
)
def test_refuses_bad_arguments(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert complaint in capsys.readouterr().err


def test_rehearsal_of_every_stage(tmp_path: Path) -> None:
    outs = [tmp_path / "first", tmp_path / "second"]
    started = [start(out, "--dry-run", "--commit", "abc", "--stage", *half) for out, half in zip(outs, HALVES)]
    assert [stage for half in HALVES for stage in half] == list(gpu.STAGES)
    for out, half, process in zip(outs, HALVES, started):
        printed, errors = process.communicate()
        assert process.returncode == 0, printed + errors
        label = "-".join(half)
        assert {path.name for path in out.iterdir()} == {f"{label}.tar.gz", "cpu.jsonl", f"summary-{label}.txt"}
        # the summary is what is printed last, and its end says what failed
        assert (out / f"summary-{label}.txt").read_text() in printed
        assert "-- failed: 0\n-- parts\nok" in printed
        found = rows(out / "cpu.jsonl")
        assert all(row.keys() >= ORIGIN and row["device"] == "cpu" and row["commit"] == "abc" for row in found)
        assert {row["status"] for row in found} <= {"ok", "skipped", "unavailable"}
        with tarfile.open(out / f"{label}.tar.gz") as archive:
            names = archive.getnames()
        for stage in half:
            for part in gpu.parts_of(stage, True, Path("work")):
                assert f"ok     {stage:<18}{part.name}" in printed
                assert any(row["id"].split()[1] == part.name for row in found), part.name
                assert any(name.startswith(f"logs/{part.name}") for name in names), part.name
        if "loader" in half:
            timed = next(row for row in found if row["case"] == "step-fed-native")
            assert 0 < timed["p10_ms"] <= timed["median_ms"] <= timed["p90_ms"] and timed["quick"] is True
            assert timed["samples_per_s"] == pytest.approx(1e3 * timed["batch_size"] / timed["median_ms"])
        if "training" in half:
            assert "traces/fastskel-torch.json.gz" in names
            (profiled,) = (row for row in found if row["part"] == "profile" and row["provider"] == "fastskel-torch")
            assert 0 < profiled["busy_share"] <= 1 and profiled["launches"] > 100
            assert profiled["kernels"][0]["share"] >= profiled["kernels"][1]["share"] > 0


def test_what_fails_is_recorded_and_the_rest_runs(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(session: Session) -> Iterator[Result]:
        yield Result("first", {"part": "own", "case": "its case"})
        raise TimeoutError("no time was left for x")

    parts = [
        gpu_parts.Part("raises", 5, raises), gpu_parts.Part("silent", 5, lambda session: iter(())),
        gpu_parts.module("absent", "absent", 60), gpu_parts.kernels("kernels", 60, "not compiled"),
        gpu_parts.Part("good", 5, lambda session: iter([Result("last")])),
    ]  # fmt: skip
    monkeypatch.setattr(gpu, "parts_of", lambda *_: parts)
    report = gpu.Report({"device": "x", "versions": {}, "commit": "c", "date": "d"}, tmp_path / "x.jsonl")
    gpu.run_stage("check", session, report, tmp_path, "check")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["FAILED", "FAILED", "FAILED", "FAILED", "ok"]
    found = rows(tmp_path / "x.jsonl")
    assert [row["status"] for row in found] == ["ok", "failed", "failed", "failed", "ok"]
    assert (found[0]["part"], found[0]["case"]) == ("own", "its case")
    assert found[1]["error"] == "TimeoutError: no time was left for x"
    assert "exit status 1" in found[2]["error"] and "No module named" in found[2]["error"]
    assert "no benchmarks in" in found[3]["error"]
    assert "raises: raises: TimeoutError: no time was left for x" in (tmp_path / "summary-check.txt").read_text()
    with tarfile.open(tmp_path / "check.tar.gz") as archive:
        assert "logs/absent.txt" in archive.getnames()


FILES = {
    "test_good": "def test_one(): pass\n\n\ndef test_two(): pass\n",
    "test_bad": "def test_fails(): assert 1 == 2\n\n\ndef test_passes(): pass\n",
    "test_away": "@pytest.mark.skip(reason='no xformers')\ndef test_away(): pass\n",
    "test_crash": "def test_first(): pass\n\n\ndef test_crashes(): os._exit(134)\n\n\ndef test_never(): pass\n",
    "test_other": "",
}


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """A session over a repository with tests marked gpu that pass, fail, are skipped and crash."""
    repository = tmp_path / "repository"
    (repository / "tests" / "kernels").mkdir(parents=True)
    (repository / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs a GPU\n")
    for name, body in FILES.items():
        mark = "pytestmark = pytest.mark.gpu\n" if body else "def test_host(): assert False\n"
        (repository / "tests" / "kernels" / f"{name}.py").write_text(f"import os\nimport pytest\n{mark}\n\n{body}")
    return Session("cuda", False, tmp_path / "work", repository, time.monotonic() + 100, 100)


def test_each_file_of_tests_is_judged_alone(session: Session) -> None:
    found = {result.case: result for result in gpu_parts.tests(100).run(session)}
    cases = {case.removeprefix("tests tests/kernels/").removesuffix(".py"): result for case, result in found.items()}
    states = {name: result.status for name, result in cases.items()}
    assert states == {
        "test_good": "ok", "test_bad": "failed", "test_away": "skipped", "test_crash": "failed", "tests": "failed",
    }  # fmt: skip
    assert cases["test_bad"].figures["failed_tests"] == ["tests/kernels/test_bad.py::test_fails"]
    assert "assert 1 == 2" in cases["test_bad"].error
    # what had passed before the process died counts
    assert cases["test_crash"].figures["passed"] == 1 and "exit status 134" in cases["test_crash"].error
    assert cases["tests"].figures == {"passed": 4, "failed": 1, "skipped": 1}


def test_tests_that_all_skip_prove_nothing(session: Session) -> None:
    for name in ("test_good", "test_bad", "test_crash"):
        (session.repository / "tests" / "kernels" / f"{name}.py").unlink()
    *_, last = gpu_parts.tests(100).run(session)
    assert (last.status, last.error) == ("failed", "no test ran")


def test_a_stage_whose_time_is_over_says_so(session: Session) -> None:
    session.deadline = time.monotonic() - 1
    with pytest.raises(TimeoutError, match="no time was left for tests-x"):
        session.child("tests-x")


def test_a_printed_object_is_found_before_what_an_end_prints(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = iter([(0, 'warning\n{"median_ms": 2.5}\n[W1121 cuda.cpp] released late\n'), (0, "nothing\n")])
    monkeypatch.setattr(gpu_parts.Child, "run", lambda *_: next(outputs))
    part = gpu_parts.printed("step", "step", 5)
    (found,) = part.run(session)
    assert (found.status, found.figures) == ("ok", {"median_ms": 2.5})
    (found,) = part.run(session)
    assert (found.status, found.error) == ("failed", "exit status 0: nothing")


SANITIZER = """\
#!/bin/sh
echo "sanitizer $*"
while [ "${1#-}" != "$1" ]; do shift 2; done
test "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 || exit 7
"$@" || exit $?
exit STATUS
"""


@pytest.mark.parametrize("status, state", [(0, "ok"), (9, "failed")])
def test_sanitizer_wraps_a_few_tests(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, state: str
) -> None:
    for name in ("test_bad", "test_crash", "test_away"):
        (session.repository / "tests" / "kernels" / f"{name}.py").unlink()
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(SANITIZER.replace("STATUS", str(status)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    (result,) = gpu_parts.sanitizer("racecheck", 100).run(session)
    assert (result.case, result.status) == ("racecheck tests/kernels/test_good.py", state)
    assert result.figures["passed"] == gpu_parts.SANITIZED_TESTS
    log = next((session.work / "logs").glob("racecheck*")).read_text()
    assert log.startswith("sanitizer --tool racecheck --error-exitcode 9 --print-limit 20 ")
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ


def test_sanitizer_that_is_missing_is_said(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "_find_sanitizer", lambda: None)
    (result,) = gpu_parts.sanitizer("memcheck", 100).run(session)
    assert (result.status, result.error) == ("skipped", "compute-sanitizer is not installed")


def test_rows_say_what_failed_and_what_was_faster(tmp_path: Path) -> None:
    shared = {"device": "x", "versions": {}, "commit": "c", "date": "d"}
    report = gpu.Report(shared, tmp_path / "x.jsonl")
    row = {"part": "step", "case": "N=6", "provider": "own", "median_ms": 2.0, "speedup": 3.0, "date": "other", "status": "ok"}
    report.add("training", Result("step N=6 own", row), 1.0)
    report.add("training", Result("step N=6 xf", {"status": "unavailable"}, "skipped", "not installed"), 1.0)
    report.add("kernels", Result("a", {"group": "g", "provider": "triton", "median_s": 1e-3}), 1.0)
    report.add("kernels", Result("b", {"group": "g", "provider": "eager", "median_s": 3e-3}), 1.0)
    report.add("kernels", Result("c", {"group": "g", "provider": "sdpa", "median_s": 2e-3}), 1.0)
    report.add("tests", Result("f", {"failed_tests": ["t::x"]}, "failed", "exit status 1: E\nlast line"), 1.0)
    first, second, *_ = rows(tmp_path / "x.jsonl")
    assert first["date"] == "d" and (first["part"], first["case"], first["speedup"]) == ("step", "N=6", 3.0)
    assert (second["status"], second["error"]) == ("unavailable", "not installed")
    text = report.text()
    assert "3.00x" in text and "2.00x of sdpa, triton" in text
    assert "-- failed: 2\ntests: f: last line\n  t::x\n-- parts\n" in text


def test_archive_leaves_the_largest_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    for name, size in (("a.txt", 1000), ("b.json.gz", 400), ("c.json.gz", 900)):
        (work / name).write_bytes(b"x" * size)
    monkeypatch.setattr(gpu, "ARCHIVE_BYTES", 600)
    gpu._archive(work, tmp_path / "x.tar.gz")
    with tarfile.open(tmp_path / "x.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["a.txt", "b.json.gz"]
    assert "too large for the archive: c.json.gz" in capsys.readouterr().out


def work_of(name: str, start: float, length: float, cat: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": length}


def test_profile_finds_busy_time_and_gaps() -> None:
    events = [
        work_of("b", 30, 20), work_of("a", 0, 10), work_of("a", 5, 10), work_of("copy", 55, 5, "gpu_memcpy"),
        work_of("host", 0, 1000, "cpu_op"), {"ph": "i", "name": "mark"},
    ]  # fmt: skip
    found = profile_step.analyse(events, 2, True)
    # busy 0-15, 30-50, 55-60; gaps of 15 and 5
    assert found["span_ms"] == pytest.approx(0.030) and found["busy_ms"] == pytest.approx(0.020)
    assert found["busy_share"] == pytest.approx(40 / 60) and found["gap_ms"] == pytest.approx(0.010)
    assert (found["launches"], found["gaps"], found["gap_us_q50"], found["gap_us_q99"]) == (2, 1, 15, 15)
    assert [(k["name"], k["launches"]) for k in found["kernels"]] == [("a", 1), ("b", 0.5), ("copy", 0.5)]
    assert sum(k["share"] for k in found["kernels"]) == pytest.approx(1)
    text = profile_step.table("own", {**found, "plain_ms": 0.04}, top=1)
    assert "device busy 66.7 %" in text and "50 % 15.0 us" in text and "2 more kinds" in text


def test_profile_of_a_host_counts_outermost_operations() -> None:
    events = [work_of("outer", 0, 10, "cpu_op"), work_of("inner", 0, 4, "cpu_op"), work_of("next", 12, 4, "cpu_op")]
    found = profile_step.analyse(events, 1, False)
    assert [k["name"] for k in found["kernels"]] == ["outer", "next"]
    with pytest.raises(ValueError, match="events must hold work of kernel"):
        profile_step.analyse(events, 1, True)


def test_step_counts_the_products_of_the_model() -> None:
    figures = step.measure("usdrl-dste", "fp32", torch.device("cpu"), quick=True)
    # per layer and token 25 D^2 multiply-adds forward, twice that backward; two streams of two layers
    tokens, width = 16 + 50, step.QUICK["width"]
    layers = 3 * 2 * 25 * width**2 * 2 * tokens * figures["batch_size"] * figures["views"] / 1e12
    assert layers < figures["tflop_per_step"] < 2 * layers


def test_step_takes_the_published_sizes_unless_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "QUICK", {**step.QUICK, "batch_size": 4})
    _, about = step.setup("usdrl-sttr", "bf16", torch.device("cpu"), batch_size=6, quick=True)
    assert about["batch_size"] == 6
    assert RECIPES["usdrl-dste"]().batch_size == 356
    assert set(step.STEP_RECIPES) <= set(RECIPES)
