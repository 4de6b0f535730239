"""The collected GPU run, rehearsed on a CPU: its refusal, its rows, and that a failing part stops no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastskel.bench import gpu, step

from fastskel.recipes import RECIPES

ORIGIN = {"id", "part", "case", "status", "device", "versions", "commit", "date", "seconds"}
STEP = {"median_ms", "p10_ms", "p90_ms", "samples_per_s", "tflop_per_s", "peak_memory_gib", "batch_size", "precision"}


def run(out: Path, *arguments: str, hide_gpus: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if hide_gpus else {})
    command = [sys.executable, "-m", "fastskel.bench.gpu", "--out", str(out), *arguments]
    return subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True, check=False)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_refuses_without_a_gpu(tmp_path: Path) -> None:
    done = run(tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith("gpu: device must be a GPU that torch ")
    assert "got none" in done.stderr and "--device cpu --quick" in done.stderr
    assert not (tmp_path / "out").exists()


def test_rehearsal_times_a_step_and_records_what_fails(tmp_path: Path) -> None:
    # a folder without tests makes that part fail; the step after it must run all the same
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    arguments = ["--device", "cpu", "--quick", "--parts", "environment", "tests", "step", "--commit", "abc"]
    arguments += ["--recipes", "usdrl-sttr", "--precisions", "fp32", "--repository", str(tmp_path / "empty")]
    done = run(out, *arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    found = {row["part"]: row for row in rows(out / "cpu.jsonl")}
    assert {part: row["status"] for part, row in found.items()} == {
        "environment": "ok",
        "tests": "failed",
        "step": "ok",
    }
    for row in found.values():
        assert row.keys() >= ORIGIN
        assert row["device"] == "cpu" and row["commit"] == "abc"
        assert row["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
        assert row["id"] == f"{row['date']} {row['part']} {row['case']}"
    assert "exit status" in found["tests"]["error"]
    timed = found["step"]
    assert timed.keys() >= STEP and timed["quick"] is True
    assert timed["case"] == "usdrl-sttr fp32"
    assert 0 < timed["p10_ms"] <= timed["median_ms"] <= timed["p90_ms"]
    assert timed["samples_per_s"] == pytest.approx(1e3 * timed["batch_size"] / timed["median_ms"])
    assert timed["peak_memory_gib"] is None
    assert (out / "logs" / "tests-pytest--m-gpu.txt").is_file()

    again = run(out, "--device", "cpu", "--quick", "--parts", "environment")
    assert again.returncode == 0
    # appended: an earlier run's rows stay
    assert [row["part"] for row in rows(out / "cpu.jsonl")] == ["environment", "tests", "step", "environment"]


def test_a_part_that_hangs_is_killed_and_named(tmp_path: Path) -> None:
    child = gpu.Child(tmp_path / "log.txt", 0.5, tmp_path)
    status, output = child.run("-c", "import time; print('begun', flush=True); time.sleep(60)")
    assert status == 124
    assert output.startswith("begun") and "killed after" in output


def test_all_limits_stay_under_ten_minutes() -> None:
    assert gpu.TOTAL_S < 600
    assert set(gpu.LIMITS_S) == set(gpu.PARTS)
    assert set(step.STEP_RECIPES) <= set(RECIPES)


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
