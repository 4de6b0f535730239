"""The log of a run: append-only, cut back to the checkpoint that a run resumes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastskel.train.runlog import RunLog


def write(run: Path, upto: int, steps: range) -> None:
    log = RunLog(run, upto)
    for step in steps:
        log.write({"step": step, "loss": step / 2})
    log.sync()
    log.close()


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_records_of_repeated_steps_are_dropped(tmp_path) -> None:
    write(tmp_path, 0, range(5))
    write(tmp_path, 3, range(3, 6))
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_both_records_of_a_step_are_kept(tmp_path) -> None:
    write(tmp_path, 0, range(3))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "knn": 0.5}\n{"step": 3}\n')
    write(tmp_path, 3, range(3, 4))
    assert steps(tmp_path) == [0, 1, 2, 2, 3]


@pytest.mark.parametrize(
    "half", ['{"step": 3, "lo', '{"step": 3}', "{", "\0\0"], ids=["cut", "no end", "brace", "zeros"]
)
def test_a_half_written_last_line_is_dropped(tmp_path, half) -> None:
    write(tmp_path, 0, range(3))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(half)
    # even where the checkpoint is from after it
    write(tmp_path, 9, range(9, 11))
    assert steps(tmp_path) == [0, 1, 2, 9, 10]


@pytest.mark.parametrize("line", ["not JSON", "[1, 2]", '{"loss": 1.0}'], ids=["text", "list", "no step"])
def test_another_damaged_line_is_named(tmp_path, line) -> None:
    text = f'{{"step": 0}}\n{line}\n{{"step": 1}}\n'
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"RunLog: line 2 of .*log.jsonl must be a record with its step"):
        RunLog(tmp_path, 5)
    assert (tmp_path / "log.jsonl").read_text() == text
