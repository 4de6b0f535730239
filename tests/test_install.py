"""The wheel holds every package, the native extension and the typing marker."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = ("pip", "setuptools", "wheel", "pybind11")


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
    # build folders and the extension of an editable install must not leak into the wheel
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so", "__pycache__", "demo-run", "runs")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
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
