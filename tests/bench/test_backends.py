"""The backend comparison and the convergence comparison, at tiny sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastskel.bench import backends, convergence

from fastskel.data import make_synthetic
from fastskel.data.protocols import Split
from fastskel.recipes import RECIPES


def test_all_backends_leave_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert backends.main(["--quick", "--out", str(out), "--heads", "1", "2", "--rounds", "3"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["precision"], row["heads"], row["provider"]) for row in rows] == [
        (precision, heads, backend)
        for precision in ("bf16", "fp32")
        for heads in (1, 2)
        for backend in ("sdpa", "math", "fastskel")
    ]
    assert all(row["median_ms"] > 0 and row["quick"] for row in rows)


def test_a_backend_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.LIMITS, "bf16", 0.0)
    with pytest.raises(ValueError, match="must agree with sdpa, got a distance of"):
        list(backends.measure((2, 8, 32), 2, "bf16", torch.device("cpu"), 3))


def test_both_providers_train_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "WINDOW", 2)
    small = RECIPES["usdrl-demo"]
    settings = dict(width=16, frames=8, crop_min_frames=8, batch_size=6)
    monkeypatch.setitem(convergence.RECIPES._entries, "tiny", lambda: replace(small(), **settings))
    dataset = make_synthetic(tmp_path / "data", num_clips=24, bodies=1)
    everything = torch.arange(24).numpy()
    parts = Split(everything[::2], everything[1::2])
    theirs, ours = (convergence.train(dataset, parts, "tiny", 0, 4, provider) for provider in ("reference", "fastskel"))
    assert len(theirs[0]) == 2
    # Adam's first steps are as large for a small gradient as for a large one: rounding shows in the fifth digit
    assert ours[0] == pytest.approx(theirs[0], rel=1e-3)
    assert convergence.apart(ours, theirs) < 1e-3 and convergence.apart(theirs, theirs) == 0.0
    assert convergence.inside(theirs[0], theirs[1], [theirs, theirs]) == []
    assert len(convergence.inside([w + 1 for w in theirs[0]], theirs[1], [theirs])) == 2
    assert convergence.inside(theirs[0], -1.0, [theirs]) == [f"1-NN: -1.0000 not in [{theirs[1]:.4f}, {theirs[1]:.4f}]"]
