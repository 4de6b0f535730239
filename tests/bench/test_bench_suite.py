"""The suite's cases under pytest-benchmark: each runs once at a tiny size, after its results were compared."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_provider_runs() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable", "bench/bench_suite.py"]
    environment = {**os.environ, "FASTSKEL_BENCH_QUICK": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    # three ways to encode, twice; two losses; three feeders; two steps
    assert re.search(r"^13 passed", done.stdout, re.MULTILINE), done.stdout
