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


@pytest.mark.parametrize(
    "line", ["not JSON", "[1, 2]", '{"loss": 1.0}', '{"step": "1"}', '{"step": null}'],
    ids=["text", "list", "no step", "text as step", "null"],
)  # fmt: skip
def test_another_damaged_line_is_named(tmp_path, line) -> None:
    text = f'{{"step": 0}}\n{line}\n{{"step": 1}}\n'
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"RunLog: line 2 of .*log.jsonl must be a record with its step"):
        RunLog(tmp_path, 5)
    assert (tmp_path / "log.jsonl").read_text() == text


@pytest.mark.parametrize("kind", ["removed", "replaced"])
def test_a_log_that_is_not_where_it_was_is_said_before_the_checkpoint(tmp_path, kind) -> None:
    run = tmp_path / "run"
    run.mkdir()
    log = RunLog(run, 0)
    log.write({"step": 0})
    log.sync()
    run.rename(tmp_path / "elsewhere")
    if kind == "replaced":
        run.mkdir()
        (run / "log.jsonl").touch()
    log.write({"step": 1})
    with pytest.raises(OSError, match=r"RunLog: .*run/log.jsonl must take the records of the run to its end, got: .*resume"):
        log.sync()
    log.close()


class Disk:
    """A file on a disk that is full after some bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        taken = min(self.room, len(data))
        if not taken:
            raise OSError(28, "No space left on device")
        self.room -= taken
        return self.file.write(data[:taken])

    def close(self) -> None:
        self.file.close()


def test_a_full_disk_is_said_at_once_and_leaves_what_can_be_resumed(tmp_path) -> None:
    log = RunLog(tmp_path, 0)
    log.write({"step": 0})
    log._file = Disk(log._file, 20)
    log.write({"step": 1})
    with pytest.raises(OSError, match=r"log.jsonl must take the records .*, got: \d+ of 12 bytes were taken. Free space"):
        log.write({"step": 2})
    with pytest.raises(OSError, match=r"got: \[Errno 28\] No space left on device. Free space"):
        log.write({"step": 3})
    # nothing is tried again
    log.close()
    write(tmp_path, 2, range(2, 4))
    assert steps(tmp_path) == [0, 1, 2, 3]
