"""Where tests find recorded tensors and real data, and how they skip without them."""

from __future__ import annotations

import os
from pathlib import Path

# before torch reads it: the tests' tensors are small, and a busy machine punishes threads that wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]


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
def golden():
    """Read one archive of recorded tensors by name; the test is skipped where there is none."""
    folder = _folder("FASTSKEL_GOLDEN", "golden/usdrl")
    if folder is None:
        pytest.skip("recorded reference tensors not found: set FASTSKEL_GOLDEN to their folder")

    def load(name: str) -> dict[str, NDArray[np.generic]]:
        with np.load(folder / name, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    return load


@pytest.fixture(scope="session")
def specs_dir() -> Path:
    """Folder with the reference's key listings; the test is skipped where there is none."""
    folder = _folder("FASTSKEL_SPECS", "specs")
    if folder is None:
        pytest.skip("reference key listings not found: set FASTSKEL_SPECS to their folder")
    return folder
