"""Starts the processes in which Triton's interpreter runs the kernels' tests, each for some of the files that have such tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
# the fixture of conftest.py that stands for the interpreter and the GPU, or the marker itself
INTERPRETED = re.compile(r"\bdevice: torch\.device\b|mark\.interpreted")
FILES = sorted(
    path.name
    for path in FOLDER.glob("test_*.py")
    if path != Path(__file__) and INTERPRETED.search(path.read_text(encoding="utf-8"))
)
# a process takes seconds to import what it needs, and a file of tests little more
NUM_PROCESSES = 4


@pytest.mark.parametrize("number", range(NUM_PROCESSES))
def test_interpreted(number: int) -> None:
    pytest.importorskip("triton")
    names = FILES[number::NUM_PROCESSES]
    command = [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", *(str(FOLDER / name) for name in names)]
    # a process that finds a GPU would compile for it: there is none to see
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = set(re.findall(r"(test_\w+\.py)::.* PASSED", done.stdout))
    assert passed == set(names), f"no test of {set(names) - passed} ran"
    assert "SKIPPED" not in done.stdout, done.stdout
