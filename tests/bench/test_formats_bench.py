"""The comparison of parsers, on a tiny file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fastskel.bench import formats

PROVIDERS = ["lines", "words", "fastskel", "fastskel, all values", "fastskel, to a clip"]


def test_all_parsers_leave_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert formats.main(["--quick", "--out", str(out), "--rounds", "3"]) == 0
    (tmp_path / "one.skeleton").write_bytes(formats.skeleton_text(2))
    assert formats.main(["--file", str(tmp_path / "one.skeleton"), "--out", str(out), "--rounds", "3"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["provider"] for row in rows] == PROVIDERS * 2
    assert [row["text"] for row in rows] == ["made up"] * 5 + ["genuine file"] * 5
    assert all(row["mb_per_s"] > 0 and row["part"] == "formats" for row in rows)


def test_a_parser_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "by_words", lambda data: np.zeros((4, 25, 3), np.float32))
    with pytest.raises(ValueError, match="formats: words must agree with fastskel"):
        list(formats.measure(formats.skeleton_text(2), 3))
