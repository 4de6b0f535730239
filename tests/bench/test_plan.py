"""Plans against what they foretell: operations, memory, what processes send; and how a plan is asked for."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastskel.bench import plan as planning
from fastskel.bench.counting import Entry
from fastskel.bench.harness import held_bytes, peak_bytes
from fastskel.bench.plan import MACHINES, Machine, Workload, read_machine, stage_of, step_times
from fastskel.bench.plan_check import main as check
from fastskel.bench.plan_check import make_step, operations
from fastskel.bench.plan_counts import OPTIMIZER_STATES, Counts, Live, Traffic, count_step

from fastskel.cli import main
from fastskel.recipes import RECIPES, USDRLRecipe
from fastskel.train import start
from fastskel.train.optimiser import build_optimizer

# what an operation takes and gives back inside, and what torch's libraries keep, is not in a count
MEMORY_TOLERANCE = 0.1
JOINTS, BODIES = 13, 2


def small(**settings) -> USDRLRecipe:
    kept = dict(width=32, frames=16, crop_min_frames=16, batch_size=24, drop_path=0.0, num_views=3)
    return replace(RECIPES["usdrl-demo"](), **(kept | settings))


CASES = {
    "whole": {}, "chunks": dict(chunk=6), "bf16": dict(precision="bf16", width=48), "sttr": dict(encoder="sttr", num_heads=2),
    "many": dict(batch_size=160, width=16, chunk=20),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_operations_are_those_that_torch_counts(case) -> None:
    stage = stage_of(small(**CASES[case]), JOINTS, BODIES)
    differentiate, _, _ = make_step(stage)
    # symmetric products of the loss are halved by one count and not by the other
    assert count_step(stage, gpu=False).flops == pytest.approx(operations(differentiate), rel=0.01)


@pytest.mark.parametrize("case", CASES)
def test_memory_is_what_a_step_takes(case) -> None:
    stage = stage_of(small(**CASES[case]), JOINTS, BODIES)
    differentiate, _, _ = make_step(stage)
    # libraries keep what they compiled
    differentiate()
    assert count_step(stage, gpu=False).peak == pytest.approx(peak_bytes(differentiate), rel=MEMORY_TOLERANCE)


@pytest.mark.parametrize("name", OPTIMIZER_STATES)
def test_optimisers_keep_what_is_planned(name) -> None:
    if name in ("lamb", "lars"):
        pytest.importorskip("pytorch_optimizer")
    stage = stage_of(small(optimizer=name, lr=1e-6), JOINTS, BODIES)
    encoder, objective = start(stage)
    optimizer = build_optimizer(stage, objective.param_groups(encoder))
    for parameter in (*encoder.parameters(), *objective.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    held = held_bytes(lambda: (optimizer.step(), optimizer.state)[1])
    planned = planning._state(stage, count_step(stage))[f"state of {name}"]
    # and a step number of each tensor
    assert held == pytest.approx(planned, rel=0.02)


def test_live_follows_storages_and_not_views() -> None:
    with Live() as live:
        x = torch.ones(10, 10)
        view = x[2:].flatten()
        y = x + 1
        del x
        assert live.bytes == 800
        del view, y
    assert (live.bytes, live.peak) == (0, 800)


def test_drop_path_saves_operations_on_average() -> None:
    plain, dropped = (count_step(stage_of(small(drop_path=rate), JOINTS, BODIES)).flops for rate in (0.0, 0.5))
    assert 0.5 * plain < dropped < 0.95 * plain


def test_chunks_cost_a_third_more_and_hold_the_memory() -> None:
    wholes = [count_step(stage_of(small(batch_size=n), JOINTS, BODIES)) for n in (64, 256)]
    chunked = [count_step(stage_of(small(batch_size=n, chunk=16), JOINTS, BODIES)) for n in (64, 256)]
    assert wholes[1].peak > 3 * wholes[0].peak
    grown = chunked[1].peak - chunked[0].peak
    assert grown <= 2 * (chunked[1].embeddings - chunked[0].embeddings) + chunked[1].loss_peak
    assert 1.2 < chunked[1].flops / wholes[1].flops < 1.4


@pytest.mark.parametrize("scale, part", [(1e3, "memory traffic"), (1e-3, "matrix products")])
def test_the_slowest_part_bounds(scale, part) -> None:
    stage = stage_of(small(), JOINTS, BODIES)
    entries = [Entry("embed", "mm", (8, 8, 8), 1, 4000, 100), Entry("embed", "add", (), 1, 0, 2000)]
    counts = Counts(24, 1, 24, 10, 5, phases={"embed": (2.0, entries)})
    machine = Machine("m", 1e6, scale, 1.0, 1.0, 1.0, 1.0, True, "measured", "measured", "measured", "")
    times = step_times(counts, stage, machine, Workload(fill=0.5))
    assert times.bound == part
    assert times.products == pytest.approx(2 * max(4000 / scale, 100) / 0.5)
    assert times.moving == pytest.approx(2 * 2000 / 0.5)
    assert times.step == times.products + times.moving


def test_gradients_hide_behind_the_last_backward_pass() -> None:
    stage = stage_of(small(), JOINTS, BODIES)
    phases = {"backward": (4.0, [Entry("backward", "add", (), 1, 0, 3000)])}
    traffic, gradients = Traffic(4, gathered=400.0), Traffic(4, summed=8000.0)
    counts = Counts(24, 4, 6, 10, 5, traffic=traffic, gradients=gradients, phases=phases)
    machine = Machine("m", 1e6, 1e6, 1.0, 1.0, 1.0, 0.5, True, "measured", "measured", "measured", "")
    near, far = (step_times(counts, stage, machine, Workload(4, nodes, fill=1.0)) for nodes in (4, 2))
    assert traffic.sent == 300 and gradients.sent == 2 * 8000 * 3 / 4
    assert near.step == pytest.approx(4 * 3000 + 300 + (12000 - 3000))
    assert far.step == pytest.approx(4 * 3000 + 600 + (24000 - 3000))


def plan_of(machine: str = "h200", **workload):
    return planning.plan("usdrl-demo", small(batch_size=32, epochs=3), read_machine(machine), Workload(clips=100, **workload))


def test_a_plan_adds_up() -> None:
    made = plan_of(gpus=4)
    seconds = made["step"] / 1e3
    assert made["steps"] == 3 * 3
    assert made["clips per second"] == pytest.approx(32 / seconds)
    assert made["time to finish"] == pytest.approx(9 * seconds / 3600)
    assert 0 < made["efficiency against one GPU"] < 100 and plan_of()["efficiency against one GPU"] == 100
    assert made["sent for gradients"] == pytest.approx(2 * 3 / 4 * 4 * made["parameters"] / 1e6)
    assert {figure.basis for figure in made.figures} >= {"counted", "assumed", "predicted", "data sheet"}
    assert made.as_json()["figures"][0]["name"] == "parameters" and "parameters" in made.table()
    assert all(math.isfinite(figure.value) for figure in made.figures)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    facts = dict(
        gpu="small", gpu_memory_gib=0.001, matmul_fp32_tflop_per_s=1.0, matmul_bf16_tflop_per_s=2.0, copy_gb_per_s=3.0,
        network_gb_per_s=4.0,
    )  # fmt: skip
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(facts))
    machine = read_machine(str(path))
    assert (machine.fp32, machine.bf16, machine.copy, machine.network) == (1e12, 2e12, 3e9, 4e9) and machine.gpu
    assert (machine.links, machine.link) == ("assumed", planning.LINK)
    made = planning.plan("usdrl-demo", small(), machine, Workload())
    assert made["largest chunk of a process"] == 0 and any(note.startswith("does not fit") for note in made.notes)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: read_machine("h300"), "plan: machine must be one of h200, h100, a100, this, or a file, got 'h300'"),
        (lambda: plan_of(gpus=5), "plan: batch_size must be a multiple of the 5 processes, got 32"),
        (lambda: plan_of(gpus=32), "plan: batch_size must leave 2 samples to each of 32 processes, got 1 in 1 parts"),
        (lambda: Workload(fill=0.0), "plan: fill must be in (0, 1], got 0.0"),
        (lambda: Workload(clips=0), "plan: clips must be at least 1, got 0"),
        (
            lambda: planning.plan("usdrl-demo", small(), MACHINES["h200"], Workload(clips=23)),
            "plan: batch_size must be at most the 23 clips, got 24",
        ),
    ],
    ids=["machine", "processes", "norms", "fill", "clips", "batch"],
)  # fmt: skip
def test_errors(call, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_a_file_that_is_no_machine_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="plan: machine must be what fastskel.bench.machine writes"):
        read_machine(str(path))


def test_command(tmp_path: Path, capsys) -> None:
    path = tmp_path / "plan.json"
    given = ["--gpus", "2", "--batch", "32", "--width", "16", "--num-layers", "1", "--frames", "16", "--crop-min-frames", "16"]
    assert main(["plan", "usdrl-demo", *given, "--machine", "a100", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usdrl-demo on 2 x a100: batch 32, 16 clips in each process in one piece, fp32, adam")
    named = {figure["name"]: figure["value"] for figure in json.loads(path.read_text())["figures"]}
    assert named["parameters"] > 0 and "bound by" in printed
    assert main(["plan", "usdrl-demo", "--gpus", "3"]) == 2
    assert "plan: batch_size must be a multiple of the 3 processes" in capsys.readouterr().err


def test_a_plan_is_put_beside_measured_steps(monkeypatch, capsys) -> None:
    monkeypatch.setattr("fastskel.bench.plan_check.BATCH", 8)
    monkeypatch.setattr("fastskel.bench.plan_check.CHUNK", 4)
    monkeypatch.setattr("fastskel.bench.plan_check.WIDTH", 16)
    facts = dict(memory_gib=1, matmul_fp32_tflop_per_s=0.1, matmul_bf16_tflop_per_s=0.1, copy_gb_per_s=10.0)
    monkeypatch.setattr("fastskel.bench.plan_check.measure_machine", lambda device: facts)
    assert check(["--steps", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 6 and all(row["planned"] > 0 and row["measured"] > 0 for row in found.values())
