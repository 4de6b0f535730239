"""Counts that do not depend on the machine: those of this source are the recorded ones, and every kind of change is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastskel.bench import guard

RECORDS = json.loads(guard.RECORDS.read_text(encoding="utf-8"))
MADE = {"torch": "2.13"}


def record(figures: dict[str, float], made: dict[str, str] = MADE) -> dict[str, Any]:
    return {"unit": "operations", "tolerance": 0.001, "made_with": made, "figures": figures}


def test_every_group_is_recorded_with_its_tolerance() -> None:
    assert list(RECORDS) == list(guard.GROUPS)
    for name, group in guard.GROUPS.items():
        assert RECORDS[name]["tolerance"] == group.tolerance <= 0.02
        assert RECORDS[name]["unit"] == group.unit
        assert len(RECORDS[name]["figures"]) >= 5 and all(value > 0 for value in RECORDS[name]["figures"].values())


def test_the_reference_costs_what_is_published() -> None:
    """Counted from the published code: 12.45 GFLOP and 23.6 MB saved per view; the rest follows from the shapes."""
    assert RECORDS["flops"]["figures"]["dste reference forward"] == pytest.approx(12.45e9, rel=0.001)
    assert RECORDS["saved-bytes"]["figures"]["dste reference"] == pytest.approx(23.6e6, rel=0.01)


@pytest.mark.parametrize("name", list(guard.GROUPS))
def test_counts_are_the_recorded_ones(name: str) -> None:
    try:
        # counting takes seconds: not for another release or compiler, whose counts are others
        if guard.GROUPS[name].made_with() != RECORDS[name]["made_with"]:
            pytest.skip(guard.compare(name, RECORDS[name], record({}, guard.GROUPS[name].made_with())).skipped)
        counted = guard.measure(name)
    except guard.CannotCountError as error:
        pytest.skip(f"{name} cannot be counted here: {error}")
    found = guard.compare(name, RECORDS[name], counted)
    assert found.complaints == []
    assert len(found.lines) == len(counted["figures"])


@pytest.mark.parametrize(
    "now, change",
    [
        (1_000_000.0, None), (1_000_999.0, None), (999_001.0, None), (1_001_100.0, "+0.11 %"), (998_900.0, "-0.11 %"),
        (2_000_000.0, "+100.00 %"),
    ],
)  # fmt: skip
def test_a_change_in_either_direction_is_seen(now: float, change: str | None) -> None:
    found = guard.compare("flops", record({"a": 1e6, "b": 5.0}), record({"a": now, "b": 5.0}))
    assert len(found.lines) == 2 and not found.skipped
    if change is None:
        assert found.complaints == []
    else:
        (complaint,) = found.complaints
        assert complaint.startswith("guard: flops of 'a' must be within 0.1 % of 1,000,000, got ")
        assert f"({change})" in complaint and "--record" in complaint and "say why in the commit" in complaint


def test_launches_may_not_change_at_all() -> None:
    figures = RECORDS["step-launches"]["figures"]
    key = "fastskel-triton forward kernels"
    more = guard.compare("step-launches", record(figures), record({**figures, key: figures[key] + 1}))
    assert len(more.complaints) == 1 and key in more.complaints[0]


def test_what_is_new_or_gone_must_be_recorded() -> None:
    found = guard.compare("flops", record({"a": 1.0, "b": 2.0}), record({"b": 2.0, "c": 3.0}))
    assert ["gone" in found.complaints[0], "new" in found.complaints[1], len(found.complaints)] == [True, True, 2]
    assert guard.compare("flops", None, record({})).complaints == [
        "guard: flops must be recorded, got no record. Write it with --record."
    ]


def test_another_release_is_skipped_and_said() -> None:
    found = guard.compare("flops", record({"a": 1.0}), record({"a": 2.0}, {"torch": "2.11"}))
    assert found.complaints == [] and found.lines == []
    assert found.skipped == "flops was recorded with torch 2.13; here is torch 2.11"


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Figures of the only two groups, of which the second cannot be counted."""

    def absent() -> dict[str, float]:
        raise guard.CannotCountError("valgrind is not installed")

    figures = {"a": 100.0}
    groups = {
        "flops": guard.Group(lambda: dict(figures), lambda: MADE, 0.01, "operations"),
        "instructions": guard.Group(absent, lambda: MADE, 0.01, "instructions"),
    }
    monkeypatch.setattr(guard, "GROUPS", groups)
    return figures


def test_command_records_compares_and_fails(
    counts: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "guard.json"
    kept = {"instructions": record({"x": 1.0})}
    path.write_text(json.dumps(kept))
    at = ["--file", str(path)]
    assert guard.main(at) == 1
    assert "flops must be recorded" in capsys.readouterr().err
    assert json.loads(path.read_text()) == kept
    assert guard.main([*at, "--record"]) == 0
    # what cannot be counted here keeps its record
    assert json.loads(path.read_text())["instructions"] == kept["instructions"]
    assert guard.main(at) == 0
    printed = capsys.readouterr().out
    assert "skipped: instructions cannot be counted here: valgrind is not installed" in printed
    assert "fastskel.bench.offline --strict" in printed
    assert guard.main([*at, "--strict"]) == 1
    assert guard.main([*at, "--strict", "--groups", "flops"]) == 0
    counts["a"] = 102.0
    assert guard.main(at) == 1
    printed, complaint = capsys.readouterr()
    assert "+2.00 %  <-" in printed and "got 102 (+2.00 %)" in complaint
    assert guard.main([*at, "--record"]) == 0 and guard.main(at) == 0
    assert json.loads(path.read_text())["flops"]["figures"] == {"a": 102.0}


def test_what_is_no_number_is_a_change() -> None:
    found = guard.compare("flops", record({"a": 1e6}), record({"a": float("nan")}))
    assert len(found.complaints) == 1 and "within 0.1 % of 1,000,000" in found.complaints[0]
