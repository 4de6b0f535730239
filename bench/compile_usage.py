"""Compile one kernel case for one GPU, without having the GPU, and read from the result what it uses."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from fastskel.kernels._backend import OPTIONS, CompileCase, triton

__all__ = ["TARGETS", "Job", "Target", "compile_case", "compile_jobs"]


class Target(NamedTuple):
    """A GPU to compile for.

    Attributes:
        backend: Triton's name of the compiler.
        architecture: Compute capability times ten, or AMD's name.
        warp_size: Lanes of a warp.
        name: What it is called here.
        shared: Bytes of shared memory that one block may use.
    """

    backend: str
    architecture: int | str
    warp_size: int
    name: str
    shared: int


class Job(NamedTuple):
    """A case to compile for a target: the one at `position` in a module's COMPILE_CASES."""

    module: str
    position: int
    target: Target


KIB = 1024
# A100; RTX 30 and A40; H100 and H200; B200; MI300
TARGETS = (
    Target("cuda", 80, 32, "sm_80", 163 * KIB),
    Target("cuda", 86, 32, "sm_86", 99 * KIB),
    Target("cuda", 90, 32, "sm_90", 227 * KIB),
    Target("cuda", 100, 32, "sm_100", 227 * KIB),
    Target("hip", "gfx942", 64, "gfx942", 64 * KIB),
)
# the JIT marks pointers that are multiples of 16 bytes; without the mark no asynchronous copies are generated
DIVISIBLE = [["tt.divisibility", 16]]
# how instructions begin, strongest first
MATRIX = {"tcgen05": r"tcgen05\.mma\b", "wgmma": r"wgmma\.mma_async\b", "mma": r"mma\.sync\b", "mfma": r"v_s?mfma"}
COPIES = {
    "cp.async.bulk": r"cp\.async\.bulk\.(?!commit_group|wait_group)",
    "cp.async": r"cp\.async\.c[ag]\b",
    "lds": r"global_load_lds|buffer_load\w*[^\n;]*\blds\b",
}


def compile_case(case: CompileCase, target: Sequence[Any]) -> dict[str, Any]:
    """Compile one case.

    Args:
        case: A kernel with the types and constants of real shapes.
        target: Backend, architecture, warp size; what follows them is ignored.
    Returns:
        `registers` of a thread, `spilled` bytes of a thread, `shared` bytes of a block, `matrix` instruction and
        asynchronous `copies`, both "none" where there are none.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    # as the JIT marks them: what it leaves out of the specialisation it knows nothing of
    loose = {p.name for p in case.kernel.params if p.do_not_specialize_on_alignment or p.do_not_specialize}
    attributes = {
        (i,): DIVISIBLE for i, name in enumerate(names) if signature[name].startswith("*") and name not in loose
    }
    source = ASTSource(case.kernel, signature, constexprs=dict(case.constexprs), attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **OPTIONS}
    compiled = triton.compile(source, target=GPUTarget(*target[:3]), options=options)
    if "cubin" in compiled.asm:
        assembly, usage = compiled.asm["ptx"], cubin_usage(compiled.asm["cubin"])
    else:
        assembly = compiled.asm["amdgcn"]
        usage = amdgcn_usage(assembly)
    found = {"matrix": strongest(MATRIX, assembly), "copies": strongest(COPIES, assembly)}
    return {**usage, "shared": compiled.metadata.shared, **found}


def cubin_usage(cubin: bytes) -> dict[str, int]:
    """Read registers and spilled bytes (stack and local memory of a thread) with cuobjdump."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(bundled) if bundled.is_file() else shutil.which("cuobjdump")
    if tool is None:
        raise RuntimeError("cubin_usage: cuobjdump must be in Triton's package or on PATH, got none. Install CUDA.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        found = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    return resource_usage(found)


def resource_usage(listing: str) -> dict[str, int]:
    """Read cuobjdump's list of resources: the largest figures, where a kernel comes with functions that it calls."""
    figures = {key: [int(x) for x in re.findall(rf"\b{key}:(\d+)", listing)] for key in ("REG", "STACK", "LOCAL")}
    if not all(figures.values()):
        raise RuntimeError(
            f"resource_usage: the list must give REG, STACK and LOCAL, got {listing!r}. Read cuobjdump's new format."
        )
    return {"registers": max(figures["REG"]), "spilled": max(figures["STACK"]) + max(figures["LOCAL"])}


def amdgcn_usage(assembly: str) -> dict[str, int]:
    """Read vector registers and scratch bytes of a thread from the metadata at the end of AMD assembly."""
    usage = {}
    for key, field in (("registers", "vgpr_count"), ("spilled", "private_segment_fixed_size")):
        found = re.search(rf"^\s*\.{field}:\s+(\d+)", assembly, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"amdgcn_usage: the assembly must give .{field}, got none. Read the new format.")
        usage[key] = int(found.group(1))
    return usage


def strongest(instructions: Mapping[str, str], assembly: str) -> str:
    """Name the first of some instructions that an assembly has, or none."""
    for name, pattern in instructions.items():
        if re.search(rf"(?<![\w.])(?:{pattern})", assembly):
            return name
    return "none"


def compile_jobs(jobs: Iterable[Job], num_processes: int) -> Iterator[tuple[Job, dict[str, Any] | str]]:
    """Compile jobs side by side in processes; one that a compiler aborts takes its job with it, and no other.

    Yields:
        Every job with its usage, or with what went wrong; in the order in which they end.
    """
    waiting = list(jobs)[::-1]
    context = multiprocessing.get_context("spawn")
    running: dict[Any, tuple[Job, Any]] = {}
    idle: list[tuple[Connection, Any]] = []
    while waiting or running:
        while waiting and len(running) < num_processes:
            if not idle:
                connection, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                idle.append((connection, process))
            connection, process = idle.pop()
            running[connection] = waiting.pop(), process
            # a process that is gone already is seen below
            with contextlib.suppress(BrokenPipeError):
                connection.send(running[connection][0])
        for connection in wait(list(running)):
            job, process = running.pop(connection)
            try:
                outcome = connection.recv()
                idle.append((connection, process))
            except (EOFError, ConnectionResetError):
                process.join()
                connection.close()
                outcome = f"the compiler ended its process, status {process.exitcode}"
            yield job, outcome
    for connection, process in idle:
        connection.close()
        process.join()


def _work(connection: Connection) -> None:
    with contextlib.suppress(EOFError):
        while True:
            job = connection.recv()
            try:
                case = importlib.import_module(job.module).COMPILE_CASES[job.position]
                outcome: dict[str, Any] | str = compile_case(case, job.target)
            except Exception as error:  # whatever a compiler raises is reported, and the other cases go on
                outcome = f"{type(error).__name__}: {error}"
            connection.send(outcome)
