"""The comparison of ways to take a large batch, at sizes that prove that it runs."""

from __future__ import annotations

import json
from pathlib import Path

from fastskel.bench import chunked
from fastskel.bench.chunked import PROVIDERS, Case


def test_command_writes_a_row_for_each_case(tmp_path: Path, capsys, monkeypatch) -> None:
    def here(case: Case, data: Path) -> dict[str, object]:
        # what the process would be told, and what it prints
        assert chunked.main(["--one", json.dumps(vars(case)), "--data", str(data)]) == 0
        *before, row = capsys.readouterr().out.splitlines()
        print(*before, sep="\n")
        return {**json.loads(row), "status": "ok"}

    # a process each takes seconds
    monkeypatch.setattr(chunked, "_apart", here)
    out = tmp_path / "rows.jsonl"
    sizes = ["--batches", "12", "6", "--chunk", "6", "--width", "8", "--steps", "1"]
    assert chunked.main([*sizes, "--limit-gib", "4", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["batch"], row["provider"]) for row in rows] == [(batch, name) for batch in (6, 12) for name in PROVIDERS]
    assert all(row["status"] == "ok" and row["peak_bytes"] >= row["start_bytes"] > 2**26 for row in rows), rows
    by_case = {(row["batch"], row["provider"]): row for row in rows}
    # one chunk is the whole batch; two are embedded twice
    assert by_case[6, "chunked"]["flops"] == by_case[6, "whole"]["flops"]
    assert 1.2 < by_case[12, "chunked"]["flops"] / by_case[12, "whole"]["flops"] < 1.37
    assert by_case[12, "whole"]["embeddings_bytes"] == 2 * by_case[6, "whole"]["embeddings_bytes"] == 2 * (4 * 12 * 64) * 4
    assert "x the operations" in capsys.readouterr().out.splitlines()[-1]


def test_what_would_exceed_the_limit_is_not_run() -> None:
    def row(provider: str, status: str = "ok") -> dict[str, object]:
        return {"provider": provider, "batch": 100, "status": status, "start_bytes": 1000, "peak_bytes": 3000}

    assert chunked._expected(Case("whole", 400), [row("reference"), row("whole")]) == 1000 + 4 * 2000
    assert chunked._expected(Case("whole", 400), [row("reference")]) == 0
    # flat
    assert chunked._expected(Case("chunked", 400), [row("chunked")]) == 0
    skipped = {"provider": "whole", "batch": 400, "status": "not run", "expected_bytes": 5 * 2**30}
    assert chunked.line(skipped, None).endswith("not run: would take 5.0 GiB")


def test_a_process_that_fails_is_a_row(tmp_path: Path) -> None:
    data = chunked.make_clips(tmp_path / "data", 4).path
    row = chunked._apart(Case("chunked", 4, chunk=1), data)
    assert row["status"] == "failed" and "chunk must leave at least 2 samples" in row["error"]
