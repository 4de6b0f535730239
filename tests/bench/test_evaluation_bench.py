"""The comparison of downstream tasks with plain ways, at sizes that prove that it runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fastskel.bench import evaluation, solvers
from fastskel.bench.evaluation import DETECTION, LINEAR, DetectionCase, Probe
from fastskel.bench.reference import detection as plain
from fastskel.bench.solvers import ProbeCase

from fastskel.evaluate.detection_metrics import Segments, detection_metrics

TINY = ProbeCase(120, 12, 4)


@pytest.fixture
def rows_of(tmp_path: Path):
    def run(*arguments: str) -> list[dict]:
        out = tmp_path / "rows.jsonl"
        assert evaluation.main(["--quick", "--out", str(out), "--rounds", "1", *arguments]) == 0
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert all(row["quick"] and row["threads"] >= 1 and row["commit"] and row["date"] for row in rows)
        return rows

    return run


def test_linear_leaves_rows_of_the_whole_schedule(rows_of, capsys) -> None:
    again, cached, warm = rows_of("--part", "linear", "--limit-s", "0")
    assert [row["provider"] for row in (again, cached, warm)] == ["re-encoding", "cached", "cached, warm"]
    assert {row["case"] for row in (again, cached, warm)} == {"usdrl-demo, 24 and 8 clips, 6 epochs"}
    # two of six epochs were timed: their time counts three times, in the row and in the ratios of the others
    assert again["extrapolated"] and again["epochs_timed"] == 2 and again["speedup"] == 1
    assert again["epoch_ms"] * 6 == pytest.approx(again["median_ms"])
    assert not cached["extrapolated"] and cached["epochs_timed"] == 6
    ratios = [row["speedup"] * row["median_ms"] / again["median_ms"] for row in (cached, warm)]
    # medians of ratios and ratios of medians: of the same three rounds, whatever else the machine does
    assert all(1 / 3 < ratio < 3 for ratio in ratios)
    assert 0 <= cached["distance"] < evaluation.SAME_WEIGHTS
    assert "scaled from 2 epochs" in capsys.readouterr().out


def test_scaled_figures_are_those_of_two_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    compared = evaluation.compare

    def compare(calls, baseline, **options):
        # every call takes a second, so that nothing is noisy and every ratio is 1
        return compared(calls, baseline, **options, clock=lambda: float(next(clock)))

    monkeypatch.setattr(evaluation, "compare", compare)
    again, cached, _ = evaluation.linear_part(LINEAR["quick"], 3, 0.0)
    assert (again["median_ms"], again["epoch_ms"], again["speedup"]) == (3000, 500, 1)
    assert (cached["median_ms"], cached["speedup"], cached["speedup_q20"]) == (1000, 3, 3)


def test_both_ways_train_the_same_layer(tmp_path: Path) -> None:
    probe = Probe(LINEAR["quick"], tmp_path)
    begin, one, six = probe.start().weight.detach(), probe.reencoding(1), probe.reencoding(6)
    assert float((six[0] - begin).norm()) > float((one[0] - begin).norm()) > 1e-3
    # to rounding: features of a clip may depend on the clips beside it
    for warm in (False, True):
        for own, other in zip(probe.cached(6, warm=warm), six, strict=True):
            assert torch.allclose(own, other, rtol=1e-4, atol=1e-6)
    assert probe.check() < evaluation.SAME_WEIGHTS
    # one folder for the cache that stays, one for each that is cold
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4


@pytest.mark.parametrize("change", [dict(seed=1), dict(momentum=0.0), dict(batch_size=9)], ids=str)
def test_ways_that_differ_are_not_timed(change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe(LINEAR["quick"], tmp_path)
    cached = probe.cached

    def other(epochs: int, *, warm: bool) -> list[torch.Tensor]:
        usual, probe.config = probe.config, replace(probe.config, **change)
        found = cached(epochs, warm=warm)
        probe.config = usual
        return found

    monkeypatch.setattr(probe, "cached", other)
    with pytest.raises(ValueError, match="cached must change the weights as re-encoding does"):
        probe.check()


def test_solvers_leave_rows(rows_of, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    # a process for each takes seconds: one is enough to see that it works
    apart, asked = solvers.solve_apart, []

    def solve(case: ProbeCase, provider: str, warm: ProbeCase, limit_s: float) -> dict:
        asked.append(provider)
        found = apart if provider == "fastskel" else lambda *_: solvers.solve_here(case, provider, TINY) | {"status": "ok"}
        return found(case, provider, warm, limit_s)

    monkeypatch.setattr(solvers, "solve_apart", solve)
    rows = rows_of("--part", "probe")
    assert asked == [row["provider"] for row in rows] == list(solvers.PROVIDERS)
    assert {row["case"] for row in rows} == {"300 rows of 24, 5 classes"}
    assert all(row["median_ms"] == pytest.approx(1e3 * row["seconds"]) and row["uncertainty"] == 1 for row in rows)
    base, optimum, own = (row["excess"] for row in rows)
    assert 0 <= own < 1e-6 and 0 <= optimum < 1e-5 and 0 <= base < 1e-3
    # libraries are not counted
    assert 0 <= rows[2]["added_bytes"] < 2**28 < rows[2]["peak_bytes"] + 2**28
    assert "above the lowest objective" in capsys.readouterr().out


def test_a_solver_that_fails_has_a_row_and_no_further_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def solve(case: ProbeCase, provider: str, warm: ProbeCase, limit_s: float) -> dict:
        asked.append(provider)
        if provider != "fastskel":
            return {"status": "failed", "error": f"killed after {limit_s:.0f} s", "limit_s": limit_s}
        return {"seconds": 2.0, "objective": 1.0, "iterations": 3, "peak_bytes": 5, "added_bytes": 1, "status": "ok"}

    monkeypatch.setattr(solvers, "solve_apart", solve)
    *others, own = evaluation.probe_part(TINY, 3, 7.0)
    assert asked == [*solvers.PROVIDERS, "fastskel", "fastskel"]
    assert [row["status"] for row in others] == ["failed", "failed"] and own["seconds"] == 2 and "speedup" not in own
    lines = [evaluation.line({"part": "probe", "quick": False, **row}) for row in (*others, own)]
    assert all("killed after 7 s" in line for line in lines[:2]) and "2.000 s" in lines[2] and "measured alone" in lines[2]


def test_a_process_is_ended_at_the_limit() -> None:
    row = solvers.solve_apart(TINY, "fastskel", TINY, 0.2)
    assert row["status"] == "failed" and "killed after 0 s" in row["error"]


def test_solvers_that_disagree_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    solvers.check(TINY)
    sound = solvers.SOLVERS["fastskel"]

    def biased(problem: solvers.Problem) -> solvers.Fit:
        found = sound(problem)
        return replace(found, bias=found.bias + 0.1 * torch.arange(problem.classes))

    monkeypatch.setitem(solvers.SOLVERS, "fastskel", biased)
    with pytest.raises(ValueError, match="probe: fastskel must reach the objective"):
        list(evaluation.probe_part(TINY, 1, 1.0))
    other = {"converged": True, "own_penalty": 1.0}
    monkeypatch.setitem(solvers.SOLVERS, "fastskel", lambda problem: replace(sound(problem), about=other))
    with pytest.raises(ValueError, match="probe: fastskel must have the penalty"):
        solvers.check(TINY)


def test_an_exact_solver_that_is_not_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"seconds": 2.0, "iterations": 3, "peak_bytes": 5, "added_bytes": 1, "status": "ok"}
    reached = {"fastskel": 1.001, "scikit-learn": 1.0, "scikit-learn to the optimum": 1.0}
    monkeypatch.setattr(solvers, "solve_apart", lambda case, name, warm, limit: {**found, "objective": reached[name]})
    with pytest.raises(ValueError, match="fastskel must reach the objective 1, got 1.001"):
        list(evaluation.probe_part(TINY, 1, 1.0))


def test_made_up_features() -> None:
    problem = solvers.make_problem(ProbeCase(3000, 100, 6))
    rows = problem.train.features.double()
    assert rows.shape == (3000, 100) and problem.train.labels.unique().tolist() == list(range(6))
    variance = rows.var(0, correction=0).sum()
    assert problem.penalty == pytest.approx(solvers.PENALTY * float(variance), rel=1e-6)
    # as those of trained encoders: a large mean, some zeros, variances of very different sizes
    assert float(rows.mean(0).square().sum() / variance) > 1 and 0.01 < float((rows == 0).double().mean()) < 0.5
    values = torch.linalg.eigvalsh((rows - rows.mean(0)).T @ (rows - rows.mean(0)))
    assert float(values[-1] / values.median()) > 100
    weight, bias = torch.zeros(6, 100, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    assert problem.objective(weight, bias) == pytest.approx(np.log(6))
    assert problem.objective(weight + 1, bias) == pytest.approx(np.log(6) + problem.penalty * 300)


def test_detection_leaves_rows(rows_of, tmp_path: Path) -> None:
    rows = rows_of("--part", "detection", "--limit-s", "0")
    assert [row["provider"] for row in rows] == ["plain", "fastskel"]
    assert {row["case"] for row in rows} == {"200 segments, 1000 proposals, 10 recordings"}
    assert all(row["median_ms"] > 0 and row["distance"] < 1e-9 and 0 < row["map_action"] < 1 for row in rows)
    # one segment that ends before it starts
    segments = np.array([[0, 1, 5, 30, 2], [0, 7, 40, 30, 2], [1, 7, 0, 9, 2], [1, 3, 20, 90, 1]], np.int32)
    np.savez(tmp_path / "labels.npz", segments=segments)
    rows = rows_of("--part", "detection", "--limit-s", "0", "--labels", str(tmp_path / "labels.npz"))
    assert {row["case"] for row in rows[2:]} == {"3 segments, 15 proposals, 2 recordings"}
    assert {row["segments"] for row in rows} == {"made up", "a file"}
    assert np.array_equal(evaluation.read_labels(tmp_path / "labels.npz")[:, 1], [0, 6, 2])


def test_metrics_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = evaluation.make_truth(DETECTION["quick"])
    monkeypatch.setattr(plain, "overlap", lambda one, other: min(one[3], other[3]) - max(one[2], other[2]))
    with pytest.raises(ValueError, match="detection_metrics must be those of plain Python"):
        list(evaluation.detection_part(DETECTION["quick"], truth, "made up", 1, 0.0))


def test_made_up_segments() -> None:
    case = DetectionCase(2000, 100, 51, 4)
    truth = evaluation.make_truth(case)
    assert truth.shape == (2000, 5) and set(np.bincount(truth[:, 0].astype(int))) == {20}
    for number in range(100):
        rows = truth[truth[:, 0] == number]
        # one after another, from a first gap on
        assert rows[0, 2] > 0 and (rows[1:, 2] >= rows[:-1, 3]).all()
    # PKU-MMD I has 114 frames at the mean, and 22 segments in 5,400 frames at the median
    assert 100 < (truth[:, 3] - truth[:, 2]).mean() < 130 and 4000 < np.median(truth[19::20, 3]) < 6000
    proposals = evaluation.make_proposals(case, truth)
    assert proposals.shape == (8000, 5) and (proposals[:, 3] > proposals[:, 2]).all()
    assert len(np.unique(proposals[:, 4])) < 8000 and set(proposals[:, 1]) == set(range(51))


@pytest.mark.parametrize("seed", range(4))
def test_plain_metrics_are_those_of_the_library(seed: int) -> None:
    # crowded, so that segments overlap, are matched by several proposals, and scores and overlaps are equal; a class without any
    draw = np.random.default_rng(seed)

    def crowd(number: int) -> np.ndarray:
        start = draw.integers(0, 20, number)
        columns = [draw.integers(3, size=number), draw.integers(4, size=number), start, start + draw.integers(1, 12, number)]
        return np.stack([*columns, draw.integers(5, size=number) / 4], 1).astype(float)

    truth, proposals = crowd(30), crowd(90)
    own = detection_metrics(Segments.of(truth), Segments.of(proposals), 5, 3)
    rows = [evaluation._listed(part) for part in (truth, proposals)]
    found = plain.detection_metrics(*rows, 5, 3, [float(name) for name in own])
    assert evaluation._differences(own, found) < 1e-12 and own["0.5"]["per_class"][4] == 0


def test_plain_precision_by_hand() -> None:
    # lowest score first: a match, one of nothing, a match; of three true segments. precision is 2/3, 1/2, 1, and none in the
    # end: that of 1 is read before the removal of a match, and never after one
    assert plain.average_precision([0, -1, 1], 3) == (pytest.approx((2 / 3 + 2 / 3) / 3), pytest.approx((2 / 3 + 1) / 3))
    # one segment found by both: only the last removal loses it, after precision was 1
    assert plain.average_precision([0, 0], 1) == (1.0, 1.0)
    assert plain.average_precision([], 3) == plain.average_precision([-1], 0) == (0.0, 0.0)
