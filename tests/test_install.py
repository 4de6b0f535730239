"""The wheel holds every package, the native extension and the typing marker; the sdist what a checkout needs to test."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = ("pip", "setuptools", "wheel", "pybind11")


def copy_sources(target: Path) -> Path:
    """Copy the checkout without build folders and the extension of an editable install, which must not leak."""
    # of what is hidden, .ci alone belongs to the sources
    ignored = shutil.ignore_patterns(".[!c]*", "build", "*.egg-info", "*.so", "__pycache__", "demo-run", "runs")
    return Path(shutil.copytree(ROOT, target, ignore=ignored))


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Build a wheel from a copy of the sources and return what it holds."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    # pip hands the build the path of this interpreter's scripts only if it is set here
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    missing += [name for name in ("cmake", "ninja", "c++") if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"a wheel cannot be built without {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("wheel")
    copy_sources(folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(folder), "./source"]
    environment = {**os.environ, "PATH": path, "FASTSKEL_WERROR": "1", "PIP_NO_INDEX": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("fastskel-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_every_module_is_in_the_wheel(wheel_names: list[str]) -> None:
    for folder, package in (("fastskel", "fastskel"), ("kernels", "fastskel/kernels"), ("bench", "fastskel/bench")):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{path.relative_to(ROOT / folder).as_posix()}" in wheel_names


def test_native_extension_and_types(wheel_names: list[str]) -> None:
    assert [name for name in wheel_names if name.startswith("fastskel/_native.") and name.endswith((".so", ".pyd"))]
    assert "fastskel/py.typed" in wheel_names
    assert "fastskel/_native.pyi" in wheel_names


def test_nothing_else_is_in_the_wheel(wheel_names: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastskel"}
    assert any(name.endswith("LICENSE") for name in wheel_names)


def test_the_sdist_can_be_tested(tmp_path: Path) -> None:
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("an sdist cannot be built without setuptools")
    source = copy_sources(tmp_path / "source")
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = tmp_path.glob("fastskel-*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"CMakeLists.txt", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "constraints.txt", "setup.py"}
    for pattern in (
        ".ci/*",
        "bench/**/*.py",
        "csrc/**/*.*",
        "docs/*.md",
        "fastskel/**/*.py",
        "kernels/**/*.py",
        "tests/**/*.py",
    ):
        needed |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)}
    assert needed - held == set()
    assert not [name for name in held if name.endswith((".pyc", ".so"))]
