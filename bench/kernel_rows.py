"""Rows of the kernels' benchmarks, from the file that pytest-benchmark writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from fastskel.bench.harness import origin

__all__ = ["kernel_rows"]


def kernel_rows(path: str | os.PathLike[str], device: torch.device, *, quick: bool) -> list[dict[str, Any]]:
    """Read one row for each benchmark: its times, and what it says of bytes and operations.

    pytest-benchmark runs one after another, not in turns, so there is no ratio: what the machine did meanwhile would be in it.
    """
    text = Path(path).read_text()
    rows = []
    # a run that was stopped leaves an empty file
    for entry in json.loads(text)["benchmarks"] if text.strip() else []:
        stats, params = entry["stats"], entry.get("params") or {}
        extra = dict(entry["extra_info"])
        if "teraflops_per_second" in extra:
            extra["tflop_per_s"] = extra.pop("teraflops_per_second")
        rows.append({
            "part": "kernels", "case": entry["group"] or entry["name"], "provider": params.get("provider", entry["name"]),
            "median_ms": 1e3 * stats["median"], "q25_ms": 1e3 * stats["q1"], "q75_ms": 1e3 * stats["q3"],
            "rounds": stats["rounds"], "quick": quick, **extra, **origin(device),
        })  # fmt: skip
    return rows
