"""Starts the processes in which Triton's interpreter runs the kernels' tests, one for each file that has such tests."""

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
FILES = sorted(path.name for path in FOLDER.glob("test_*.py") if INTERPRETED.search(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", [name for name in FILES if name != Path(__file__).name])
def test_interpreted(name: str) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(FOLDER / name)]
    # a process that finds a GPU would compile for it: there is none to see
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found and int(found.group(1)) > 0, done.stdout
    assert "skipped" not in done.stdout, done.stdout
