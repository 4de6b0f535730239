"""Starts several processes of one test file, and collects what they saved."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# far above what the processes need, so that a test that hangs ends
SECONDS = 240


@pytest.fixture(scope="session")
def run_processes(tmp_path_factory) -> Callable[[str, int], list[Any]]:
    """Run a file as a script, `script rank world folder`, in each of `world` processes; return what they saved, by rank."""

    def run(script: str, world: int) -> list[Any]:
        folder = tmp_path_factory.mktemp("processes")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
        processes = []
        for rank in range(world):
            command = [sys.executable, "-W", "error", script, str(rank), str(world), str(folder)]
            with (folder / f"{rank}.log").open("w") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        end = time.monotonic() + SECONDS
        try:
            # one that fails leaves the others waiting for it
            while None in (codes := [process.poll() for process in processes]):
                if any(codes) or time.monotonic() > end:
                    break
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        logs = "\n".join(f"process {rank}: {Path(folder, f'{rank}.log').read_text()[-3000:]}" for rank in range(world))
        assert codes == [0] * world, logs
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]

    return run
