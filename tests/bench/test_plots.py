"""Pictures of rows: what they show, and that a picture is drawn only where there is something to see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastskel.bench import plots
from PIL import Image

FACTS = {"device": "a machine", "copy_gb_per_s": 40.0, "matmul_bf16_tflop_per_s": 1.0, "matmul_fp8_tflop_per_s": None}
SWEEP = [
    {"part": "sweep", "case": f"step N={n}", "batch": n, "provider": who, "median_ms": ms * n, "peak_mib": 2.0 * n}
    for n in (4, 1, 2) for who, ms in (("reference", 8.0), ("fastskel", 3.0))
]  # fmt: skip
SKIPPED = {"part": "sweep", "case": "step N=8", "batch": 8, "provider": "reference", "status": "skipped", "why": "too slow"}
SCALING = [
    {"part": "loader-scaling", "case": "copy-1", "provider": "copy", "workers": 1, "bytes_per_s": 1e9},
    *({"part": "loader-scaling", "provider": "float32", "workers": n, "samples_per_s": 900.0 * n} for n in (2, 1)),
]
COUNTED = [{
    "part": "forward", "encoder": "dste", "precision": "bf16", "provider": "fastskel", "flops": 3e11, "bytes": 4e9,
    "median_ms": 500.0,
}]  # fmt: skip
KERNEL = {"part": "kernels", "provider": "triton", "tflop_per_s": 0.5, "gigabytes_per_second": 20.0, "median_ms": 1.0}


def test_series_are_sorted_by_batch() -> None:
    times = plots.batch_series([*SWEEP, SKIPPED], lambda row: row.get("median_ms"))
    assert times == {
        "sweep step: reference": [(1.0, 8.0), (2.0, 16.0), (4.0, 32.0)],
        "sweep step: fastskel": [(1.0, 3.0), (2.0, 6.0), (4.0, 12.0)],
    }
    # one batch is no curve; other parts have no batch to show
    assert plots.batch_series(SWEEP[:2], lambda row: row.get("median_ms")) == {}
    assert plots.batch_series([{"part": "forward", "batch": n, "median_ms": 1.0} for n in (1, 2)], lambda row: 1.0) == {}
    loss = [{"part": "loss", "case": f"mgfd N={n}", "rows": n, "provider": "fastskel", "median_ms": n} for n in (64, 356)]
    assert plots.batch_series(loss, lambda row: row["median_ms"]) == {"loss mgfd: fastskel": [(64.0, 64), (356.0, 356)]}


def test_threads_and_roofline() -> None:
    assert plots.thread_series(SCALING) == {"float32": [(1.0, 900.0), (2.0, 1800.0)]}
    points = plots.roofline_points(COUNTED, [KERNEL, *SWEEP])
    # 3e11 operations in half a second
    assert points["dste forward bf16: fastskel"] == [(75.0, pytest.approx(600.0))]
    assert points["kernels: triton"] == [(25.0, 500.0)]


def test_every_picture_is_drawn(tmp_path: Path) -> None:
    made = plots.draw([*SWEEP, SKIPPED, *SCALING, KERNEL], FACTS, COUNTED, tmp_path / "plots")
    names = {path.stem for path in made}
    assert names == {"roofline", "time-by-batch", "memory-by-batch", "loader-by-threads"}
    for path in made:
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.size == (plots.WIDE * plots.DPI, plots.HIGH * plots.DPI)
            # more than a white page
            assert np.unique(np.asarray(picture.convert("L"))).size > 10


@pytest.mark.parametrize("facts", [FACTS, {}], ids=["facts", "no facts"])
def test_nothing_is_drawn_of_nothing(tmp_path: Path, facts: dict[str, Any]) -> None:
    assert plots.draw([SKIPPED], facts, [], tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()
    # no roof, no roofline
    assert [path.stem for path in plots.draw([KERNEL], facts, COUNTED, tmp_path / "plots")] == (["roofline"] if facts else [])
