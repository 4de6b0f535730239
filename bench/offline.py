"""Compile every Triton kernel at its real shapes for several GPUs, without a GPU.

Run as `python -m fastskel.bench.offline`. Prints a line per kernel, case and target: shared memory, registers, spills.
Ends with a nonzero status if a kernel does not compile or has no case. A process of its own: TRITON_INTERPRET is
read when a kernel is decorated, and compilation needs real JIT functions.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fastskel.kernels
from fastskel.kernels._backend import OPTIONS, CompileCase, triton

__all__ = ["TARGETS", "compile_case", "main"]

# Ampere, Hopper, Blackwell; MI300
TARGETS = (("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64))
# the JIT marks pointers that are multiples of 16 bytes; without the mark no asynchronous copies are generated
DIVISIBLE = [["tt.divisibility", 16]]


def kernel_modules() -> Iterator[ModuleType]:
    """Import every module of `fastskel.kernels`."""
    for entry in pkgutil.walk_packages(fastskel.kernels.__path__, "fastskel.kernels."):
        yield importlib.import_module(entry.name)


def uncovered(module: ModuleType, cases: list[CompileCase]) -> list[str]:
    """Name the kernels that a module launches but gives no case for: JIT functions whose names end in `_kernel`."""
    covered = {id(case.kernel) for case in cases}
    return [
        f"{module.__name__}.{name}"
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.JITFunction) and name.endswith("_kernel") and id(value) not in covered
    ]


def compile_case(case: CompileCase, target: tuple[str, int | str, int]) -> dict[str, Any]:
    """Compile one case for one target (backend, architecture, warp size); returns what it uses."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    attributes = {(i,): DIVISIBLE for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(case.kernel, signature, constexprs=dict(case.constexprs), attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **OPTIONS}
    compiled = triton.compile(source, target=GPUTarget(*target), options=options)
    usage: dict[str, Any] = {"shared": compiled.metadata.shared}
    if "cubin" in compiled.asm:
        usage.update(cubin_usage(compiled.asm["cubin"]))
    elif "amdgcn" in compiled.asm:
        usage.update(amdgcn_usage(compiled.asm["amdgcn"]))
    return usage


def cubin_usage(cubin: bytes) -> dict[str, int]:
    """Read registers and spilled bytes (stack and local memory of a thread) with cuobjdump, where there is one."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(bundled) if bundled.is_file() else shutil.which("cuobjdump")
    if tool is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        found = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", found)}
    return {"registers": numbers["REG"], "spilled": numbers["STACK"] + numbers["LOCAL"]} if numbers else {}


def amdgcn_usage(assembly: str) -> dict[str, int]:
    """Read vector registers and spilled registers from the metadata at the end of AMD assembly."""
    usage = {}
    for key, field in (("registers", "vgpr_count"), ("spilled", "vgpr_spill_count")):
        found = re.search(rf"\.{field}:\s+(\d+)", assembly)
        if found:
            usage[key] = int(found.group(1))
    return usage


def main(arguments: list[str] | None = None) -> int:
    """Compile everything, print a line for each, return the number of failures."""
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.offline", description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    wanted = parser.parse_args(arguments).kernel
    if triton is None:
        print(
            "offline: Triton must be installed to compile kernels, got none. Run `pip install triton`.", file=sys.stderr
        )
        return 1
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        print("offline: TRITON_INTERPRET must be unset, got 1: it replaces the compiler. Unset it.", file=sys.stderr)
        return 1
    failures = 0
    for module in kernel_modules():
        cases: list[CompileCase] = list(getattr(module, "COMPILE_CASES", []))
        for name in uncovered(module, cases):
            failures += 1
            print(f"FAILED {name}: no entry in COMPILE_CASES")
        for case in cases:
            for target in TARGETS:
                if wanted not in case.kernel.__name__:
                    continue
                title = f"{case.kernel.__name__} [{case.label}] {target[0]}:{target[1]}"
                try:
                    usage = compile_case(case, target)
                # every kind of compiler failure is reported, and the next case tried
                except Exception as error:
                    failures += 1
                    print(f"FAILED {title}: {type(error).__name__}: {error}")
                else:
                    shown = (f"{key} {usage.get(key, 'not measured')}" for key in ("shared", "registers", "spilled"))
                    print(f"ok {title}: {', '.join(shown)}")
    print(f"offline: {failures} failures")
    return failures


if __name__ == "__main__":
    sys.exit(min(main(), 1))
