"""The comparison of whole training steps, at sizes that prove that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fastskel.bench import training
from fastskel.bench.training import OwnStep, ReferenceStep, Setting

SETTING = Setting(device=torch.device("cpu"), **{**training.QUICK, "rounds": 2})


def test_both_systems_start_with_the_same_loss() -> None:
    reference, own = ReferenceStep(SETTING, torch.float32), OwnStep(SETTING, "torch", captured=False)
    with torch.no_grad():
        expected = float(reference.loss())
    assert training._gate("fastskel", own, expected) < 1e-2
    # and from here on what training drops
    assert own.encoder.drop_path == training.DROP_PATH
    with pytest.raises(ValueError, match="training: loss of fastskel must be within 0.02"):
        training._gate("fastskel", own, 1.1 * expected)


@pytest.mark.parametrize("captured", [False, True], ids=["skip", "mask"])
def test_steps_learn_and_draw_anew(captured) -> None:
    own = OwnStep(SETTING, "torch", captured)
    own.encoder.drop_path = 0.5
    with torch.no_grad():
        first = float(own.loss())
        assert float(own.loss()) == first
        own.counter.add_(1)
        assert float(own.loss()) != first
    before = [p.detach().clone() for p in own.encoder.parameters()]
    losses = [float(own.counted()) for _ in range(3)]
    assert int(own.counter) == 4 and losses[-1] < losses[0]
    assert all(not torch.equal(a, b) for a, b in zip(before, own.encoder.parameters()) if a.dim() > 1)


def test_command_writes_a_row_for_each_provider(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    command = ["--out", str(out), "--device", "cpu", "--quick", "--rounds", "1", "--parts", "step", "extract"]
    assert training.main([*command, "--kernels", "torch", "triton"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    steps = {row["provider"]: row for row in rows if row["part"] == "step"}
    assert list(steps) == ["fastskel-triton", "reference", "reference-sdpa", "fastskel-torch"]
    # no GPU: what cannot run is a row with its reason, and the others go on
    assert steps["fastskel-triton"]["status"] == "failed" and "must run on a GPU" in steps["fastskel-triton"]["error"]
    assert all(steps[name]["status"] == "ok" and steps[name]["peak_bytes"] > 0 for name in list(steps)[1:])
    assert {row["provider"] for row in rows if row["part"] == "extract" and row["status"] == "ok"} == {
        "reference", "reference-fp32", "fastskel-torch",
    }  # fmt: skip
    assert "FAILED" in capsys.readouterr().out
