"""What compiled kernels used when their figures were last recorded, and what counts as worse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastskel.bench.compile_usage import Target

from fastskel.atomic import atomic_write

__all__ = ["RECORDED", "complaints", "minor_version", "read_records", "write_records"]

# Triton's minor version -> kernel -> label of the case -> target -> figures
Records = dict[str, dict[str, dict[str, dict[str, dict[str, Any]]]]]

RECORDED = ("matrix", "registers", "shared", "spilled")
# of the instructions that one card has, the stronger ranks higher
RANK = {"none": 0, "mma": 1, "mfma": 1, "wgmma": 2, "tcgen05": 3}
# compilers move a few registers around between patches; beyond this share fewer warps may fit
REGISTER_GROWTH = 1.25


def minor_version(version: str) -> str:
    """Cut a version to its first two numbers: patches share their records."""
    return ".".join(version.split(".")[:2])


def complaints(usage: Mapping[str, Any], target: Target, *, hot: bool, record: Mapping[str, Any] | None) -> list[str]:
    """Say what is wrong with what a compiled case uses.

    Args:
        usage: Its figures, as `compile_case` returns them.
        target: What it was compiled for.
        hot: Whether it runs in every training step.
        record: Its figures when they were last recorded; None where they never were.
    Returns:
        One sentence for every rule that it breaks.
    """
    found = []
    spilled, shared, registers, matrix = (usage[key] for key in ("spilled", "shared", "registers", "matrix"))
    if hot and target.name == "sm_90" and spilled:
        found.append(f"spills {spilled} bytes, and a hot case may not spill on sm_90")
    if shared > target.shared:
        found.append(f"shared memory of {shared} bytes is above the limit of {target.shared}")
    if record is None:
        return found
    if spilled > record["spilled"]:
        found.append(f"spills {spilled} bytes, recorded {record['spilled']}")
    if registers > REGISTER_GROWTH * record["registers"]:
        found.append(f"registers grew to {registers}, recorded {record['registers']}")
    if RANK[matrix] < RANK[record["matrix"]]:
        found.append(f"matrix instruction is {matrix}, recorded {record['matrix']}")
    return found


def read_records(path: Path) -> Records:
    """Read the records, none where there is no file."""
    records: Records = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return records


def write_records(path: Path, records: Records) -> None:
    """Write the records sorted, with a line for each target, so that a change of one figure changes one line."""
    with atomic_write(path) as scratch:
        scratch.write_text(_lines(records, 0) + "\n", encoding="utf-8")


def _lines(value: Mapping[str, Any], depth: int) -> str:
    if not any(isinstance(entry, dict) for entry in value.values()):
        return json.dumps(value, sort_keys=True)
    indent = " " * (depth + 1)
    entries = (f"{indent}{json.dumps(key)}: {_lines(value[key], depth + 1)}" for key in sorted(value))
    return "{\n" + ",\n".join(entries) + "\n" + " " * depth + "}"
