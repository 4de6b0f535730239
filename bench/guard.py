"""Counts that do not depend on the machine, held to what was recorded: what costs more, or less, is seen before it is timed.

    python -m fastskel.bench.guard [--groups flops ...] [--strict]      compares, and fails on a change
    python -m fastskel.bench.guard --record                             accepts what is counted now

flops          operations per view of the encoders at published size, forward and with backward, on tensors without values
saved-bytes    bytes per view that autograd keeps for the backward pass, bf16, the same way
step-launches  launches of a training step of published size, by system, phase and kind; see `fastskel.bench.predict`
step-bytes     and what they read and write at least
instructions   of the native loader per sample, clip, position or byte, counted by valgrind in `csrc/bench/counted.cpp` on one
               thread with the instructions that every processor has

Each group says what it was made with. Where that is another release of torch, or another compiler, the counts are others for
reasons that are not ours, and the group is skipped, said so; `--strict` makes that a failure. Registers, spills and shared
memory of compiled kernels are recorded and held by `python -m fastskel.bench.offline --strict`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fastskel.bench.compile_records import minor_version
from fastskel.bench.counting import Entry
from fastskel.bench.harness import flops, saved_bytes
from fastskel.bench.predict import PHASES, predict, systems
from fastskel.bench.reference import DSTE, STTR
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastskel import models
from fastskel.atomic import atomic_write

__all__ = ["GROUPS", "RECORDS", "CannotCountError", "Group", "compare", "main", "measure", "on_cpu"]

RECORDS = Path(__file__).resolve().parent / "results" / "guard.json"
REPOSITORY = Path(__file__).resolve().parents[1]
WIDTH, FRAMES, TOKENS, CHANNELS, BATCH = 1024, 64, 50, 3, 356
# a batch that shares the cost of preparing weights, and two whose difference leaves it out
FLOPS_BATCH, MEMORY_BATCHES = 256, (32, 40)
# memory modes of fastskel's DSTE: its default, and the leanest
MODES = ("", "layer")
CASES = {
    "views": "sample", "views-bfloat16": "sample", "pipeline": "sample", "open": "clip", "shuffle": "position",
    "ntu-text": "byte",
}  # fmt: skip
BUILD_LIMIT_S, COUNT_LIMIT_S = 300, 60

Figures = dict[str, float]


class CannotCountError(Exception):
    """What is missing here to count a group."""


@dataclass(frozen=True)
class Group:
    """Counts of one kind.

    Attributes:
        measure: Returns them by name.
        made_with: Returns what else they depend on.
        tolerance: Share by which a count may differ from its record.
        unit: Of every count.
    """

    measure: Callable[[], Figures]
    made_with: Callable[[], dict[str, str]]
    tolerance: float
    unit: str


@dataclass
class Comparison:
    """What became of a group.

    Attributes:
        lines: Rows of the table.
        complaints: A sentence for every change beyond the tolerance.
        skipped: Why nothing was compared, or nothing.
    """

    lines: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    skipped: str = ""


def _encoders() -> dict[str, Callable[[], Any]]:
    inputs = (TOKENS * CHANNELS, FRAMES * CHANNELS, WIDTH, 1)
    found: dict[str, Callable[[], Any]] = {
        "dste reference": lambda: DSTE(*inputs, drop_path=0.0),
        "sttr reference": lambda: STTR(*inputs),
        "sttr fastskel": lambda: models.STTR(width=WIDTH),
    }
    for mode in MODES:

        def make(mode: str = mode) -> models.DSTE:
            encoder = models.DSTE(width=WIDTH, drop_path=0.0)
            if mode:
                encoder.configure(memory=mode)  # type: ignore[arg-type]
            return encoder

        found[f"dste fastskel {mode}".strip()] = make
    return found


def on_cpu(module: torch.nn.Module) -> torch.nn.Module:
    """Give a module of the meta device parameters (D, ..) on the CPU, in the present fake mode, which copies would leave."""
    made: dict[Tensor, Tensor] = {}
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, old in tensors.items():
                if old is not None and old not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[old] = torch.nn.Parameter(new) if isinstance(old, torch.nn.Parameter) else new
                if old is not None:
                    tensors[name] = made[old]  # type: ignore[assignment]
    return module


def _encoder_figures(count: Callable[[torch.nn.Module, Callable[..., Any]], Figures]) -> Figures:
    found: Figures = {}
    for name, make in _encoders().items():
        with torch.device("meta"):
            module = make()
        with FakeTensorMode():
            module = on_cpu(module)
            encode = getattr(module, "streams", module)

            def call(rows: int, encode: Any = encode) -> list[Tensor]:
                outputs: list[Tensor] = list(
                    encode(torch.empty(rows, FRAMES, TOKENS * CHANNELS), torch.empty(rows, TOKENS, FRAMES * CHANNELS))
                )
                return outputs

            found |= {f"{name} {case}".strip(): value for case, value in count(module, call).items()}
    return found


def _flops() -> Figures:
    def count(module: torch.nn.Module, call: Callable[..., Any]) -> Figures:
        module.eval()
        forward = flops(lambda: call(FLOPS_BATCH))
        both = flops(lambda: torch.autograd.backward([y.sum() for y in call(FLOPS_BATCH)]))
        return {"forward": forward / FLOPS_BATCH, "forward+backward": both / FLOPS_BATCH}

    return _encoder_figures(count)


def _saved_bytes() -> Figures:
    def count(module: torch.nn.Module, call: Callable[..., Any]) -> Figures:
        module.train()

        def forward(rows: int) -> list[Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                outputs: list[Tensor] = call(rows)
            return outputs

        small, large = (saved_bytes(lambda rows=rows: forward(rows), module.parameters()) for rows in MEMORY_BATCHES)  # type: ignore[misc]
        return {"": (large - small) / (MEMORY_BATCHES[1] - MEMORY_BATCHES[0])}

    return _encoder_figures(count)


@functools.cache
def _predicted() -> dict[str, list[Entry]]:
    return {system: predict(system, BATCH) for system in systems()}


def _steps(of: str) -> Figures:
    found: Figures = {}
    for system, entries in _predicted().items():
        for phase in PHASES:
            inside = [entry for entry in entries if entry.phase == phase]
            kinds = {
                "products": [e for e in inside if e.is_product],
                "kernels": [e for e in inside if e.name.startswith("kernel ")],
                "others": [e for e in inside if not e.is_product and not e.name.startswith("kernel ")],
            }
            for kind, part in kinds.items():
                if part:
                    found[f"{system} {phase} {kind}"] = sum(getattr(e, of) for e in part)
    return found


def _tool(name: str) -> str:
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if path is None:
        raise CannotCountError(f"{name} is not installed")
    return path


def _run(*command: str, limit_s: float) -> str:
    # messages in English, and no settings of a caller's library
    kept = {key: value for key, value in os.environ.items() if key not in ("GLIBC_TUNABLES", "LD_PRELOAD", "VALGRIND_OPTS")}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=limit_s, env={**kept, "LC_ALL": "C"}
    )
    if done.returncode:
        output = (done.stdout + done.stderr)[-2000:]
        raise RuntimeError(f"guard: {Path(command[0]).name} must end with status 0, got {done.returncode}: {output}")
    return done.stdout


def build_counted(folder: Path) -> Path:
    """Build the counted program in a folder, as the extension is built; returns its path.

    Raises:
        CannotCountError: If the sources or a tool are not here.
    """
    if not (REPOSITORY / "csrc" / "bench" / "counted.cpp").is_file():
        raise CannotCountError("the sources of the native part are not here")
    options = {
        "CMAKE_BUILD_TYPE": "Release", "CMAKE_CXX_COMPILER": _tool("c++"), "CMAKE_CXX_FLAGS": "",
        "CMAKE_MAKE_PROGRAM": _tool("ninja"), "FASTSKEL_NATIVE_TESTS": "ON",
    }  # fmt: skip
    settings = [f"-D{key}={value}" for key, value in options.items()]
    _run(_tool("cmake"), "-S", str(REPOSITORY), "-B", str(folder), "-G", "Ninja", *settings, limit_s=BUILD_LIMIT_S)
    _run(_tool("cmake"), "--build", str(folder), "--target", "counted", limit_s=BUILD_LIMIT_S)
    return folder / "counted"


def count_instructions(program: Path, case: str, folder: Path) -> tuple[int, int]:
    """Count the instructions of a case of the counted program; `folder` takes its files.

    Returns:
        Instructions, and units of work.
    """
    report = folder / "callgrind"
    options = ["--tool=callgrind", "--toggle-collect=fastskel_counted", f"--callgrind-out-file={report}", "--quiet"]
    printed = _run(_tool("valgrind"), *options, str(program), case, str(folder), limit_s=COUNT_LIMIT_S)
    (summary,) = (line for line in report.read_text().splitlines() if line.startswith("summary:"))
    instructions, units = int(summary.split()[1]), int(printed)
    # the counter sees nothing where the function has another name
    if not instructions:
        raise RuntimeError(f"guard: instructions of {case} must be above 0, got 0. Look at fastskel_counted in counted.cpp.")
    return instructions, units


def _instructions() -> Figures:
    # before the build: without it there is nothing to build for
    _tool("valgrind")
    found: Figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = build_counted(folder / "build")
        for case, unit in CASES.items():
            instructions, units = count_instructions(program, case, folder)
            found[f"{case}, per {unit}"] = instructions / units
    return found


def _torch() -> dict[str, str]:
    return {"torch": minor_version(torch.__version__)}


def _compiler() -> dict[str, str]:
    version = _run(_tool("c++"), "--version", limit_s=COUNT_LIMIT_S).splitlines()[0]
    return {"compiler": version, "libc": " ".join(platform.libc_ver()), "machine": platform.machine()}


# operations follow from shapes; what is kept and moved has a few small tensors that releases of torch move around; instructions
# differ by a few in a thousand between processors, for the C library copies memory in the way of each
GROUPS = {
    "flops": Group(_flops, _torch, 0.001, "operations"),
    "saved-bytes": Group(_saved_bytes, _torch, 0.005, "bytes"),
    "step-launches": Group(lambda: _steps("launches"), _torch, 0.0, "launches"),
    "step-bytes": Group(lambda: _steps("bytes"), _torch, 0.005, "bytes"),
    "instructions": Group(_instructions, _compiler, 0.015, "instructions"),
}


def measure(name: str) -> dict[str, Any]:
    """Count a group now: what it was made with, and its figures by name.

    Raises:
        CannotCountError: If a tool is missing here.
    """
    group = GROUPS[name]
    made = group.made_with()
    figures = {key: round(value, 3) for key, value in group.measure().items()}
    return {"unit": group.unit, "tolerance": group.tolerance, "made_with": made, "figures": figures}


def compare(name: str, recorded: Mapping[str, Any] | None, counted: Mapping[str, Any]) -> Comparison:
    """Hold what is counted to what was recorded; a change in either direction beyond the tolerance is a complaint."""
    found = Comparison()
    if recorded is None:
        found.complaints.append(f"guard: {name} must be recorded, got no record. Write it with --record.")
        return found
    if recorded["made_with"] != counted["made_with"]:
        found.skipped = f"{name} was recorded with {_said(recorded['made_with'])}; here is {_said(counted['made_with'])}"
        return found
    old, new = recorded["figures"], counted["figures"]
    for key in (*old, *(k for k in new if k not in old)):
        before, now = old.get(key), new.get(key)
        if before is None or now is None:
            change, bad = "new" if before is None else "gone", True
        else:
            share = (now - before) / before if before else float(now != before)
            change, bad = f"{100 * share:+.2f} %", not abs(share) <= GROUPS[name].tolerance
        found.lines.append(f"{name:<14} {key:<44} {_number(before):>16} {_number(now):>16} {change:>9}{'  <-' if bad else ''}")
        if bad:
            found.complaints.append(
                f"guard: {name} of '{key}' must be within {100 * GROUPS[name].tolerance:g} % of {_number(before)}, "
                f"got {_number(now)} ({change}). Mend it, or accept it with `python -m fastskel.bench.guard --record` "
                "and say why in the commit."
            )
    return found


def _said(made: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in made.items())


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:,.0f}" if value >= 1e4 else f"{value:,.2f}".rstrip("0").rstrip(".")


def _write(path: Path, records: Mapping[str, Any]) -> None:
    ordered = {name: records[name] for name in GROUPS if name in records}
    with atomic_write(path) as scratch:
        scratch.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Compare or record; returns 1 on a change, and with --strict where a group could not be compared."""
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.guard", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--record", action="store_true", help="write what is counted now; other groups stay as they are")
    parser.add_argument("--strict", action="store_true", help="fail where a group cannot be compared here")
    parser.add_argument("--file", type=Path, default=RECORDS, help="the records")
    given = parser.parse_args(arguments)
    records = json.loads(given.file.read_text(encoding="utf-8")) if given.file.is_file() else {}
    before, complaints, skipped = dict(records), [], []
    print(f"{'group':<14} {'count':<44} {'recorded':>16} {'now':>16} {'change':>9}")
    for name in given.groups:
        try:
            counted = measure(name)
        except CannotCountError as error:
            skipped.append(f"{name} cannot be counted here: {error}")
            continue
        found = compare(name, before.get(name), counted)
        records[name] = counted
        print("\n".join(found.lines), end="\n" if found.lines else "", flush=True)
        complaints += found.complaints
        skipped += [found.skipped] if found.skipped else []
    if given.record:
        _write(given.file, records)
        print(f"recorded in {given.file}")
    for reason in skipped:
        print(f"skipped: {reason}")
    if given.record:
        return int(given.strict and any("cannot be counted" in reason for reason in skipped))
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    print("compiled kernels (registers, spills, shared memory): python -m fastskel.bench.offline --strict")
    return int(bool(complaints) or (given.strict and bool(skipped)))


if __name__ == "__main__":
    raise SystemExit(main())
