"""Processes of the benchmarks: what they print is kept, and one that hangs ends with everything it started."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fastskel.bench.children import TIMED_OUT, Child, failure, read_rows


def test_status_and_output_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "part.txt"
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    status, output = Child(log, 20).run("-c", code)
    assert status == 3
    assert sorted(output.split()) == ["err", "out"] and log.read_text() == output
    assert failure(status, output).startswith("exit status 3: ")
    assert failure(1, "a" + 3000 * "b") == "exit status 1: " + 2000 * "b"
    # the same log again: what an earlier process printed is gone
    status, output = Child(log, 20, tmp_path).run("-c", "import os; print(os.getcwd())")
    assert (status, output.strip()) == (0, str(tmp_path.resolve()))


def test_a_process_that_dies_has_its_signal_as_status(tmp_path: Path) -> None:
    status, _ = Child(tmp_path / "log", 20).run("-c", "import os; os.kill(os.getpid(), 9)")
    assert status == -9


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody waited for yet has."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


# a part that starts another process and then hangs
HANGS = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(worker.pid, flush=True)
time.sleep(60)
"""


def test_what_hangs_is_killed_with_all_it_started(tmp_path: Path) -> None:
    status, output = Child(tmp_path / "log", 1.0).run("-c", HANGS)
    assert status == TIMED_OUT
    assert output.endswith("killed after 1 s\n")
    worker = int(output.split()[0])
    deadline = time.monotonic() + 10
    while not gone(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(worker)


def test_an_interrupt_ends_the_process(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = f"""
import signal
from pathlib import Path
from fastskel.bench.children import Child
# what a shell does not take away from programs in the background
signal.signal(signal.SIGINT, signal.default_int_handler)
Child(Path({str(log)!r}), 60).run("-c", {HANGS!r})
"""
    suite = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while not (log.is_file() and log.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = int(log.read_text())
    suite.send_signal(2)
    _, error = suite.communicate(timeout=20)
    assert "KeyboardInterrupt" in error
    while not gone(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(worker)


def test_rows_are_read_and_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"case": 1}\n{"case": 2}\n')
    assert read_rows(path) == [{"case": 1}, {"case": 2}]
    with pytest.raises(ValueError, match=re.escape(f"path must be a file of JSON lines, got {tmp_path / 'none'}")):
        read_rows(os.fspath(tmp_path / "none"))
    for wrong in ("case,provider", "[1]"):
        path.write_text('{"case": 1}\n' + wrong)
        with pytest.raises(ValueError, match=re.escape(f"line 2 of {path} must be a JSON object, got {wrong!r}")):
            read_rows(path)
