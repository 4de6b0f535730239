"""What a device reaches: matrix products in bf16 and fp32, and copying memory; the measure that other figures are put beside.

Run as `python -m fastskel.bench.peak`; the last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["main", "measure"]

REPEATS = 10
# large enough to fill any card of today, small enough to fit into 8 GiB
MATRIX, COPY_BYTES = 8192, 1 << 30
QUICK_MATRIX, QUICK_COPY_BYTES = 256, 1 << 20


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call, after one that is not counted."""
    durations = []
    for _ in range(REPEATS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        durations.append(time.perf_counter() - begin)
    return statistics.median(durations[1:])


def measure(device: torch.device, *, quick: bool = False) -> dict[str, Any]:
    """Measure TFLOP/s of square matrix products, as torch's defaults run them, and GB/s of a copy, read and written."""
    size, num_bytes = (QUICK_MATRIX, QUICK_COPY_BYTES) if quick else (MATRIX, COPY_BYTES)
    figures: dict[str, Any] = {"matrix": size, "copy_bytes": num_bytes, "quick": quick}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty_like(a)
        seconds = _seconds(lambda a=a, out=out: torch.mm(a, a, out=out), device)  # type: ignore[misc]
        figures[f"matmul_{name}_tflop_per_s"] = 2 * size**3 / seconds / 1e12
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    figures["copy_gb_per_s"] = 2 * num_bytes / _seconds(lambda: target.copy_(source), device) / 1e9
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Measure and print as JSON."""
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.peak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    given = parser.parse_args(arguments)
    print(json.dumps(measure(torch.device(given.device), quick=given.quick)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
