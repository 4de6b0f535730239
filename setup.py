"""Builds the native extension with CMake, and maps `kernels/` and `bench/` into the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(name: str) -> str:
    """Find a build tool on the path, or beside the interpreter of an environment that was not activated."""
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if path is None:
        raise RuntimeError(
            f"setup.py: {name} must be installed, got none. Run `{sys.executable} -m pip install {name}`."
        )
    return path


class CMakeBuild(build_ext):
    """Hands every extension to CMake and ninja."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        # a cache left by an isolated build names tools that no longer exist; a full build takes seconds
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        cmake = find_tool("cmake")
        werror = os.environ.get("FASTSKEL_WERROR", "") not in ("", "0")
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTSKEL_OUTPUT_DIR={output.parent}",
            f"-DFASTSKEL_WERROR={'ON' if werror else 'OFF'}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)
        if not output.is_file():
            raise RuntimeError(f"setup.py: CMake must build {output}, got {os.listdir(output.parent)}. Report this.")


mapped = [f"fastskel.{name}" for name in find_packages(str(ROOT), include=["kernels", "kernels.*", "bench", "bench.*"])]

setup(
    packages=find_packages(str(ROOT), include=["fastskel", "fastskel.*"]) + mapped,
    package_dir={"fastskel": "fastskel", "fastskel.kernels": "kernels", "fastskel.bench": "bench"},
    package_data={"fastskel": ["py.typed", "*.pyi"]},
    include_package_data=False,
    ext_modules=[Extension("fastskel._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
