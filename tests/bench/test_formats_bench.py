"""The comparison of parsers, on a tiny file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fastskel.bench import formats

from fastskel.data.formats.ntu import read

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


def test_packing_leaves_rows_and_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, folder = tmp_path / "rows.jsonl", tmp_path / "room"
    folder.mkdir()
    assert formats.main(["--pack", "7", "--quick", "--out", str(out), "--folder", str(folder)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["provider"] == "fastskel pack --threads 1" and list(folder.iterdir()) == []
    assert all(row["clips"] == 7 and row["part"] == "packing" and row["quick"] for row in rows)
    # an interpreter with torch in it, and no more than that and some files
    assert all(10 < row["peak_mb"] < 1000 and row["seconds"] > 0 for row in rows)
    assert capsys.readouterr().out.count("7 clips\n") == len(rows)


def test_recordings_are_of_the_stated_sizes(tmp_path: Path) -> None:
    num_bytes = formats.write_recordings(tmp_path, 130)
    paths = sorted(tmp_path.iterdir())
    assert sum(path.stat().st_size for path in paths) == num_bytes and len({path.read_bytes() for path in paths}) == 130
    shapes = [read(path.read_bytes(), path.name).frames.shape for path in paths]
    assert {shape[1] for shape in shapes} == {1, 2}
    assert min(shape[0] for shape in shapes) >= 60 and max(shape[0] for shape in shapes) <= 120
