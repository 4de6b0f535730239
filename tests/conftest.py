"""Where tests find recorded tensors and real data, how they skip without them, and when two trainings are one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

# before torch reads it: the tests' tensors are small, and a busy machine punishes threads that wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
# a pytest that a test starts is no part of this run: pytest-benchmark would measure nothing in it
for _name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
    os.environ.pop(_name, None)


def _folder(variable: str, sibling: str) -> Path | None:
    path = Path(os.environ.get(variable, ROOT.parent / "shared" / sibling))
    return path if path.is_dir() else None


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with the real archives; the test is skipped where there is none."""
    folder = _folder("FASTSKEL_DATA", "data")
    if folder is None:
        pytest.skip("real skeleton data not found: set FASTSKEL_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder with the recorded tensors; the test is skipped where there is none."""
    folder = _folder("FASTSKEL_GOLDEN", "golden/usdrl")
    if folder is None:
        pytest.skip("recorded reference tensors not found: set FASTSKEL_GOLDEN to their folder")
    return folder


@pytest.fixture(scope="session")
def golden(golden_dir: Path):
    """Read one archive of recorded tensors by name; the test is skipped where there is none."""

    def load(name: str) -> dict[str, NDArray[np.generic]]:
        with np.load(golden_dir / name, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    return load


@pytest.fixture(scope="session")
def specs_dir() -> Path:
    """Folder with the reference's key listings; the test is skipped where there is none."""
    folder = _folder("FASTSKEL_SPECS", "specs")
    if folder is None:
        pytest.skip("reference key listings not found: set FASTSKEL_SPECS to their folder")
    return folder


@pytest.fixture(scope="session")
def assert_equal_runs() -> Callable[..., None]:
    """Compare the logs and last checkpoints of two trainings in float64, up to the rounding of other orders of addition."""
    import torch
    from safetensors.torch import load_file

    from fastskel.train import checkpoint
    from fastskel.train.runlog import TIMINGS

    def log_of(run: Path) -> list[dict[str, float]]:
        return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]

    def compare(run: Path, expected: Path, *, gradient_norm: float = 1e-9) -> None:
        assert len(log_of(run)) == len(log_of(expected)) > 0
        for record, other in zip(log_of(run), log_of(expected), strict=True):
            assert record.keys() - TIMINGS == other.keys() - TIMINGS
            for name in record.keys() - TIMINGS:
                # single terms are small differences of large numbers
                within = {"loss": 1e-10, "gradient_norm": gradient_norm}.get(name, 1e-9)
                assert record[name] == pytest.approx(other[name], rel=within), (name, record["step"])
        ours, theirs = (load_file(checkpoint.newest(path) / "model.safetensors") for path in (run, expected))
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert value.dtype == torch.float64 or not value.is_floating_point()
            # of rounding alone: BatchNorm takes away the bias before it, and Adam divides what is left of its gradient,
            # some 1e-14, by 1e-8; running means follow the bias
            cancelled = name.endswith((".0.bias", ".3.bias", ".running_mean")) and "_proj." in name
            torch.testing.assert_close(
                ours[name], value, rtol=1e-10, atol=1e-8 if cancelled else 1e-10, msg=lambda text, name=name: f"{name}: {text}"
            )

    return compare
