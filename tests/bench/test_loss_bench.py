"""The benchmark of the loss: that it runs, compares before it times, and says what it did."""

from __future__ import annotations

import json

import pytest
import torch
from fastskel.bench import loss as bench


@pytest.mark.parametrize("alone", [False, True])
def test_quick_run(tmp_path, alone):
    out = tmp_path / "rows.jsonl"
    arguments = ["--quick", "--rows", "6", "40", "--rounds", "1", "--out", str(out), *(["--alone"] if alone else [])]
    assert bench.main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    providers = ["fastskel"] if alone else ["reference", "fastskel"]
    assert [(row["rows"], row["provider"]) for row in rows] == [(n, name) for n in (6, 40) for name in providers]
    assert all(row["part"] == "loss" and row["quick"] and row["widths"] == [16, 16, 32] for row in rows)
    assert all(row["median_ms"] > 0 and row["peak_mib"] > 0 for row in rows)


def test_refuses_to_time_what_differs(monkeypatch):
    monkeypatch.setitem(bench.PROVIDERS, "fastskel", lambda *stacks: 1.01 * bench._fastskel(*stacks))
    with pytest.raises(ValueError, match="loss: providers must agree for N = 8"):
        list(bench.measure(8, torch.device("cpu"), list(bench.PROVIDERS), 1, (8, 8, 8)))


def test_a_gradient_that_is_no_number_is_not_timed(monkeypatch):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("nan")

    monkeypatch.setitem(
        bench.PROVIDERS, "fastskel", lambda temporal, *others: bench._fastskel(Broken.apply(temporal), *others)
    )
    with pytest.raises(ValueError, match="loss: providers must agree for N = 8, got distances .*nan"):
        list(bench.measure(8, torch.device("cpu"), list(bench.PROVIDERS), 1, (8, 8, 8)))
