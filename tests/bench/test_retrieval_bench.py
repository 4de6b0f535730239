"""The comparison of searches, at sizes that prove that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fastskel.bench import retrieval
from fastskel.bench.retrieval import BASELINE, Case


def test_command_leaves_a_row_for_each_provider(tmp_path: Path, capsys, monkeypatch) -> None:
    # a process for each takes seconds: one is enough to see that it works
    apart, asked = retrieval.memory, []

    def memory(case: Case, provider: str, limit_s: float) -> dict[str, object]:
        asked.append(provider)
        return apart(case, provider, limit_s) if provider == "fastskel fp32" else {}

    monkeypatch.setattr(retrieval, "memory", memory)
    out, providers = tmp_path / "rows.jsonl", [BASELINE, *retrieval.FINDERS]
    # that wants a GPU
    providers.remove("fastskel triton")
    assert retrieval.main(["--quick", "--out", str(out), "--rounds", "1", "--providers", *providers[1:], "--k", "3"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["provider"] for row in rows] == providers == asked
    assert {row["case"] for row in rows} == {"200 queries in 3000 crowded rows of 64, k 3"}
    assert all(row["quick"] and row["median_ms"] > 0 and row["threads"] >= 1 for row in rows)
    assert [row["same"] for row in rows[:3]] == [None, 1.0, 1.0] and all(row["same"] > 0.9 for row in rows[3:])
    assert 0 <= rows[1]["added_bytes"] < 2**28 < rows[1]["peak_bytes"] + 2**28
    assert "a tiny size shows no speed" in capsys.readouterr().out


def test_a_search_that_finds_others_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(retrieval.FINDERS, "fastskel bf16", lambda gallery, queries, k: np.zeros((len(queries), k), int))
    with pytest.raises(ValueError, match="fastskel bf16 must find the exact neighbours"):
        list(retrieval.measure(retrieval.QUICK, [BASELINE, "fastskel bf16"], 1, 1.0))


@pytest.mark.parametrize("data, least", [("crowded", 0.4), ("gaussian", -0.2)])
def test_made_up_features(data: str, least: float) -> None:
    gallery, queries = retrieval.make_features(Case(30, 70, 400, 1, data))
    assert gallery.shape == (70, 400) and queries.shape == (30, 400)
    normal = torch.nn.functional.normalize
    similarity = normal(queries) @ normal(gallery).T
    assert similarity.min() > least and similarity.max() < 0.99
    assert torch.equal(retrieval.make_features(Case(30, 70, 400, 1, data))[0], gallery)
    short = Case(30, 70, 400, 1, data, "bf16")
    assert torch.equal(retrieval.make_features(short)[0], gallery.bfloat16())
    assert short.name == f"30 queries in 70 {data} bf16 rows of 400, k 1"
