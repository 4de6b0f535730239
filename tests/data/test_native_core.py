"""The C++ core under sanitizers, without Python: its tests, and its parsers on good, bad and mutated files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = {"memory": "address,undefined", "threads": "thread"}
# a fixed set: a failure is there the next time as well
MUTATIONS = 100_000
# the address sanitizer looks for leaks at the end too; the others stop at what they find
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1"}
# half optimised: sanitizers see what is written, and threads still meet
FLAGS = "-O1 -g1"


def find_tools() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = {name: shutil.which(name, path=path) for name in ("cmake", "ninja", "c++")}
    missing = [name for name, tool in found.items() if tool is None]
    if missing:
        pytest.skip(f"the core cannot be built without {', '.join(missing)}")
    return {name: tool for name, tool in found.items() if tool is not None}


def run(*command: object, limit: float = 300) -> str:
    environment = {**os.environ, **OPTIONS}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=limit, env=environment
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return done.stdout


def skip_unless_it_works(tools: dict[str, str], folder: Path, flags: str) -> None:
    """Skip where the compiler lacks the sanitizer, or the system does not let its programs run."""
    source, program = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() { return 0; }\n")
    for command in ([tools["c++"], f"-fsanitize={flags}", str(source), "-o", str(program)], [str(program)]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"-fsanitize={flags} does not work here: {(done.stderr or done.stdout).strip()[:200]}")


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the programs that a set of sanitizers is asked for, built with them."""
    tools, folder = find_tools(), tmp_path_factory.mktemp("native")
    skip_unless_it_works(tools, folder, request.param)
    options = {
        "CMAKE_MAKE_PROGRAM": tools["ninja"],
        "CMAKE_CXX_COMPILER": tools["c++"],
        "CMAKE_BUILD_TYPE": "None",
        "CMAKE_CXX_FLAGS": FLAGS,
        "FASTSKEL_NATIVE_TESTS": "ON",
        "FASTSKEL_SANITIZE": request.param,
        "FASTSKEL_WERROR": "ON",
    }
    settings = [f"-D{key}={value}" for key, value in options.items()]
    run(tools["cmake"], "-S", ROOT, "-B", folder, "-G", "Ninja", *settings)
    # a parser knows of no threads: what it does with damaged files says nothing more under their sanitizer
    targets = ["native_tests"] if request.param == SANITIZERS["threads"] else []
    run(tools["cmake"], "--build", folder, *(part for target in targets for part in ("--target", target)), limit=900)
    return folder


@pytest.mark.parametrize("built", list(SANITIZERS.values()), ids=list(SANITIZERS), indirect=True)
def test_core(built: Path) -> None:
    assert run(built / "native_tests").endswith(" checks, 0 failed\n")


@pytest.mark.parametrize("built", [SANITIZERS["memory"]], ids=["memory"], indirect=True)
@pytest.mark.parametrize(("target", "least"), [("clips", 12), ("ntu_text", 15)])
def test_parsers_on_mutated_files(built: Path, target: str, least: int) -> None:
    corpus = ROOT / "csrc" / "fuzz" / "corpus" / target
    num_inputs = len(list(corpus.iterdir()))
    assert num_inputs >= least
    assert run(built / f"corpus_{target}", corpus, MUTATIONS) == f"{num_inputs} inputs, {MUTATIONS} mutations\n"
