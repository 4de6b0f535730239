"""Readers written in Python under a short fuzzing: saved findings, seeds, and some hundred fixed mutations of each.

`tests/data/fuzz/run.py` does the same for as long as one likes. Parsers in C++: `test_native_core.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastskel.data.formats import FORMATS, PREPARED

FUZZ = Path(__file__).parent / "fuzz"
OTHERS = ("pickle", "topology-file", "missing-list", "labels-csv", "archive", "pack-arrays", "packed", "split-file")
MUTATIONS = 200
# of the interpreter, not of the library: figures must not depend on what else this process has imported
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of address space and /proc are Linux's")


@pytest.fixture(scope="module")
def tallies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Figures of every target by its name."""
    folder = tmp_path_factory.mktemp("fuzz")
    command = [sys.executable, str(FUZZ / "run.py"), "--executions", str(MUTATIONS), "--seconds", "60", "--out", str(folder)]
    done = subprocess.run(
        [*command, "--json", str(folder / "out.json")], capture_output=True, text=True, timeout=600, env=ENVIRONMENT
    )
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-4000:]
    return {tally["target"]: tally for tally in json.loads((folder / "out.json").read_text())}


@pytest.mark.parametrize("name", [*FORMATS, *PREPARED])
def test_every_format_stands_mutations(tallies, name) -> None:
    of_format = [tally for tally in tallies.values() if tally["format"] == name]
    assert of_format, f"{name} has no seeds: add them in tests/data/fuzz/seeds.py"
    for tally in of_format:
        sound(tally)


@pytest.mark.parametrize("name", OTHERS)
def test_everything_else_that_is_read_stands_mutations(tallies, name) -> None:
    assert tallies[name]["format"] == ""
    sound(tallies[name])


def test_every_target_was_looked_at(tallies) -> None:
    assert {name for name, tally in tallies.items() if not tally["format"]} == set(OTHERS)
    saved = {folder.name for folder in (FUZZ / "findings").iterdir()}
    assert saved <= set(tallies)


def sound(tally: dict[str, Any]) -> None:
    assert tally["findings"] == []
    # the limit of time is for the worst machine
    assert tally["executions"] == MUTATIONS
    # seeds are taken, and mutations neither all taken nor all refused
    assert tally["kinds"]["taken"] >= 3 and tally["kinds"]["refused"] >= 10 and tally["ways"] >= 2


# what a reader may do wrong, what it is called, and what the finding says of it
FAULTS = {
    "exception": ("raise KeyError(data)", "exception", "KeyError"),
    "bare-error": ("raise ValueError('wrong')", "exception", "ValueError: wrong"),
    "no-file": ("raise ValueError('pack_source: file must be good. Correct it.')", "message", "names no file"),
    "endless-text": ("raise ValueError('pack_source: a.txt ' + 'x' * 5000)", "message", "no printable line"),
    "two-lines": ("raise ValueError('pack_source: a.txt \\n is wrong')", "message", "no printable line"),
    "contract": ("raise BrokenContractError('frames of shape ()')", "contract", "frames of shape"),
    "warning": ("warnings.warn('overflow')", "exception", "UserWarning: overflow"),
    "memory": ("bytes(2 * MEMORY_BYTES)", "memory", "MemoryError"),
    "hidden-memory": ("hide(lambda: bytes(2 * MEMORY_BYTES))", "memory", "a.txt"),
    "endless-loop": ("while True: pass", "time", "more than"),
    "crash": ("os.abort()", "crash", "signal 6"),
}
SCRIPT = """
import os, sys, warnings
sys.path.insert(0, {fuzz!r})
import harness, run
from harness import MEMORY_BYTES, BrokenContractError

def hide(call):
    try:
        call()
    except MemoryError:
        raise ValueError("pack_source: a.txt is damaged")

def reader(fault):
    def read(case, folder, packing):
        data = case["a.txt"]
        if data != b"good":
            exec(fault, {{**globals(), "data": data}})
        return ("taken",)
    return read

harness.CPU_SECONDS = 0.1
harness.TARGETS.clear()
for name, fault in {faults!r}.items():
    harness.add(harness.Target(name, lambda draw: [{{"a.txt": b"good"}}], reader(fault)))
sys.argv = ["run.py", "--executions", "10", "--seconds", "30", "--out", {out!r}, "--corpus", {out!r}]
sys.exit(run.main())
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder with what was found about broken readers, and what was printed."""
    out = tmp_path_factory.mktemp("broken")
    script = SCRIPT.format(fuzz=str(FUZZ), faults={name: fault for name, (fault, _, _) in FAULTS.items()}, out=str(out))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 1, done.stdout + done.stderr
    return out, done.stdout


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_reader_is_found(found, name) -> None:
    out, printed = found
    _, kind, says = FAULTS[name]
    saved = list((out / name).glob(f"{kind}-*"))
    assert saved and says in (saved[0] / "finding.txt").read_text()
    assert (saved[0] / "a.txt").read_bytes() != b"good"
    assert f"{saved[0]}: {kind}: " in printed
