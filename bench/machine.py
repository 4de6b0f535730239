"""What a machine is and reaches: processor, memory, GPU, versions, and measured peaks that other figures are put beside.

Run as `python -m fastskel.bench.machine [--out FILE.jsonl]`; prints a few lines for people, or with `--json` one JSON object. A
fact that the machine does not tell is null, and printed as "not readable". Peaks are medians: products of square matrices, as
large as half a second each allows, and a copy larger than the caches, read and written.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from fastskel.bench.devices import add_device
from fastskel.bench.harness import append_rows, device_name, origin

from fastskel import _native
from fastskel.train.utilisation import DTYPES, product_of, product_speed, seconds_of

__all__ = ["cache_bytes", "describe", "main", "measure"]

Facts = dict[str, Any]

REPEATS = 7
# products grow from the first size while one takes less than the limit, up to what fills any card of today
FIRST_MATRIX, MATRIX, PRODUCT_S = 256, 8192, 0.5
# larger than any cache that is not told of; a copy leaves most of the memory free
COPY_BYTES, COPY_SHARE, CACHES = 1 << 30, 8, 8
QUICK_MATRIX, QUICK_COPY_BYTES = 256, 1 << 20
# the first GPU with products of 8-bit floats
FP8_CAPABILITY = (8, 9)
QUERY_S = 20
GIB = 1 << 30
UNKNOWN = "not readable"


@contextlib.contextmanager
def _products_in(precision: str) -> Iterator[None]:
    """Let products of fp32 be what they say, or TF32, as `precision` "highest" or "high" tells torch."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _matmul(name: str, device: torch.device, quick: bool) -> tuple[float, int]:
    """TFLOP/s of products of one type, and their size."""
    size, most = (QUICK_MATRIX, QUICK_MATRIX) if quick else (FIRST_MATRIX, MATRIX)
    with _products_in("high" if name == "tf32" else "highest"):
        make = functools.partial(product_of, name=name, device=device)
        speed, size = product_speed(make, device, first=size, most=most, limit_s=PRODUCT_S, repeats=REPEATS)
    return speed / 1e12, size


def _matmuls(device: torch.device, quick: bool) -> Facts:
    """Peaks by type; a type without products on this device is None."""
    cuda = device.type == "cuda"
    fp8 = cuda and torch.version.hip is None and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
    found: Facts = {}
    for name, there in {**dict.fromkeys(DTYPES, True), "tf32": cuda, "fp8": fp8}.items():
        speed, size = _matmul(name, device, quick) if there else (None, None)
        found |= {f"matmul_{name}_tflop_per_s": speed, f"matmul_{name}_size": size}
    return found


def _copies(device: torch.device, quick: bool, largest_cache: int, memory: float | None) -> Facts:
    """GB/s of a copy, read and written: by all of torch's threads, and on a CPU by one."""
    num_bytes = QUICK_COPY_BYTES
    if not quick:
        num_bytes = COPY_BYTES if device.type == "cuda" else max(COPY_BYTES // 4, CACHES * largest_cache)
        num_bytes = min(num_bytes, int((memory or 1.0) * GIB) // COPY_SHARE)
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    threads = torch.get_num_threads()

    def rate() -> float:
        return 2 * num_bytes / seconds_of(lambda: target.copy_(source), device, REPEATS) / 1e9

    found: Facts = {"copy_bytes": num_bytes, "copy_gb_per_s": rate(), "copy_one_thread_gb_per_s": None}
    if device.type == "cpu":
        torch.set_num_threads(1)
        found["copy_one_thread_gb_per_s"] = rate()
        torch.set_num_threads(threads)
    return found


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _size(text: str | None) -> int | None:
    """Bytes of "96K" or "32M"."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text and text[-1] in units else None


def cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int | None]:
    """Return the caches that the first processor uses: `l1d_bytes`, `l2_bytes` and `l3_bytes`, None where unknown."""
    found: dict[str, int | None] = {"l1d_bytes": None, "l2_bytes": None, "l3_bytes": None}
    for index in sorted(folder.glob("index*")):
        level, kind = _read(index / "level"), _read(index / "type")
        name = "l1d_bytes" if level == "1" else f"l{level}_bytes"
        if kind in ("Data", "Unified") and name in found:
            found[name] = _size(_read(index / "size"))
    return found


def _clocks(folder: Path = Path("/sys/devices/system/cpu/cpu0/cpufreq")) -> Facts:
    """MHz of the first processor: now, and at most."""
    now, most = (_read(folder / name) for name in ("scaling_cur_freq", "cpuinfo_max_freq"))
    shown = [line for line in (_read(Path("/proc/cpuinfo")) or "").splitlines() if line.startswith("cpu MHz")]
    current = int(now) / 1e3 if now else float(shown[0].split(":")[1]) if shown else None
    return {"clock_mhz": current, "clock_max_mhz": int(most) / 1e3 if most else None}


def _memory_gib() -> float | None:
    """Memory that this process may use: the machine's, or its control group's where that is less."""
    sizes = []
    for line in (_read(Path("/proc/meminfo")) or "").splitlines():
        if line.startswith("MemTotal:"):
            sizes.append(int(line.split()[1]) << 10)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(Path(path))
        sizes += [int(text)] if text and text.isdigit() else []
    return min(sizes) / GIB if sizes else None


def _command_output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=QUERY_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _gpu(device: torch.device) -> Facts:
    """Facts of one GPU."""
    found = torch.cuda.get_device_properties(device)
    # the driver counts cards as the machine does, torch those that it was given
    uuid = getattr(found, "uuid", None)
    fields = {
        "gpu_driver": "driver_version", "gpu_clock_mhz": "clocks.sm", "gpu_clock_max_mhz": "clocks.max.sm",
        "gpu_memory_clock_mhz": "clocks.mem", "gpu_power_limit_w": "power.limit",
    }  # fmt: skip
    card = f"GPU-{uuid}" if uuid else str(device.index or 0)
    query = f"--query-gpu={','.join(fields.values())}"
    answer = _command_output("nvidia-smi", f"--id={card}", query, "--format=csv,noheader,nounits")
    told = [text.strip() for text in (answer or "").split(",")]
    values: Facts = dict.fromkeys(fields)
    if len(told) == len(fields):
        values = {name: text if name == "gpu_driver" else _number(text) for name, text in zip(fields, told, strict=True)}
    return {
        "gpu": found.name, "gpu_capability": list(torch.cuda.get_device_capability(device)),
        "gpu_multiprocessors": found.multi_processor_count, "gpu_memory_gib": found.total_memory / GIB,
        "gpus": torch.cuda.device_count(), **values,
    }  # fmt: skip


def _xformers() -> Facts:
    """Version of xformers, None where it is not installed, and why it does not load, if it does not."""
    try:
        version = metadata.version("xformers")
    except metadata.PackageNotFoundError:
        return {"xformers": None, "xformers_error": "not installed"}
    try:
        importlib.import_module("xformers.ops")
    # whatever a package built for another torch raises is the fact to tell
    except Exception as error:
        return {"xformers": version, "xformers_error": f"{type(error).__name__}: {str(error)[:200]}"}
    return {"xformers": version, "xformers_error": None}


def measure(device: torch.device, quick: bool = False) -> Facts:
    """Read the machine's facts and measure its peaks, in less than 20 s.

    Args:
        device: Where peaks are measured, with torch's present number of threads.
        quick: Take tiny sizes: whether it runs, not how fast.
    Returns:
        Plain values, None where the machine does not tell. Processor: `cpu`, `cpus` that affinity and control groups leave,
        `cpus_online`, `instructions` of native code, `l1d_bytes` .. `l3_bytes`, `clock_mhz`, `clock_max_mhz`, `memory_gib`.
        GPU, where it is the device: `gpu` and `gpu_...`. Peaks: `matmul_<type>_tflop_per_s` of products of
        `matmul_<type>_size` for fp32, bf16, fp16, tf32 and fp8, `copy_gb_per_s`, and on a CPU `copy_one_thread_gb_per_s`, of
        `copy_bytes`. `xformers`, `cuda`, `hip`, `quick`, and everything of `origin`.
    """
    caches, memory = cache_bytes(), _memory_gib()
    facts: Facts = {
        "cpu": device_name(), "cpus": _native.available_cpus(), "cpus_online": os.cpu_count(),
        "instructions": _native.instructions(), **caches, **_clocks(), "memory_gib": memory,
        **(_gpu(device) if device.type == "cuda" else {"gpu": None}),
        "cuda": torch.version.cuda, "hip": torch.version.hip, **_xformers(),
        "interop_threads": torch.get_num_interop_threads(), "quick": quick,
    }  # fmt: skip
    largest = max(size or 0 for size in caches.values())
    return {**facts, **_matmuls(device, quick), **_copies(device, quick, largest, memory), **origin(device)}


def _shown(value: float | None, unit: str, digits: int = 0) -> str:
    return UNKNOWN if value is None else f"{value:,.{digits}f} {unit}"


def _cache(size: int | None) -> str:
    if size is None:
        return UNKNOWN
    return f"{size / (1 << 20):g} MiB" if size >= 1 << 20 else f"{size / (1 << 10):g} KiB"


def _gpu_lines(facts: Facts) -> dict[str, str]:
    capability = ".".join(map(str, facts["gpu_capability"]))
    return {
        "GPU": f"{facts['gpu']}, capability {capability}, {facts['gpu_multiprocessors']} multiprocessors, "
        f"{facts['gpu_memory_gib']:.0f} GiB, driver {facts['gpu_driver'] or UNKNOWN}",
        "GPU clocks": f"{_shown(facts['gpu_clock_mhz'], 'MHz')} now, {_shown(facts['gpu_clock_max_mhz'], 'MHz')} at most, "
        f"memory {_shown(facts['gpu_memory_clock_mhz'], 'MHz')}, power limit {_shown(facts['gpu_power_limit_w'], 'W')}",
    }


def _speed(facts: Facts, name: str) -> str:
    # a CPU's half precision may be a thousandth of a GPU's
    speed = facts[f"matmul_{name}_tflop_per_s"]
    shown = f"{1e3 * speed:,.1f} GFLOP/s" if speed < 1 else f"{speed:,.1f} TFLOP/s"
    return f"{name} {shown} ({facts[f'matmul_{name}_size']})"


def describe(facts: Facts) -> str:
    """Say the facts of `measure` in a few aligned lines."""
    peaks = [_speed(facts, name) for name in (*DTYPES, "tf32", "fp8") if facts[f"matmul_{name}_tflop_per_s"] is not None]
    one = facts["copy_one_thread_gb_per_s"]
    versions = "  ".join(f"{name} {version}" for name, version in facts["versions"].items())
    xformers = facts["xformers"] or ""
    if facts["xformers_error"]:
        xformers = f"{xformers} {facts['xformers_error']}".strip()
    lines = {
        "processor": f"{facts['cpu']}, {facts['cpus']} of {facts['cpus_online']} processors usable, {facts['instructions']}",
        "caches": f"L1d {_cache(facts['l1d_bytes'])}, L2 {_cache(facts['l2_bytes'])}, L3 {_cache(facts['l3_bytes'])}",
        "clock": f"{_shown(facts['clock_mhz'], 'MHz')} now, {_shown(facts['clock_max_mhz'], 'MHz')} at most",
        "memory": _shown(facts["memory_gib"], "GiB", 1),
        **(_gpu_lines(facts) if facts["gpu"] else {}),
        "threads": f"{facts['threads']} of torch, load {facts['load']:.2f}",
        "products": ", ".join(peaks),
        "copying": f"{facts['copy_gb_per_s']:,.1f} GB/s" + ("" if one is None else f", one thread {one:,.1f} GB/s"),
        "versions": f"{versions}  cuda {facts['cuda'] or 'none'}  xformers {xformers}",
        "commit": facts["commit"] or UNKNOWN,
    }
    if facts["quick"]:
        lines["note"] = "measured at tiny sizes: speeds mean nothing"
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and add a row where asked."""
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.machine", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON lines file to add the row to")
    add_device(parser)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    given = parser.parse_args(arguments)
    facts = measure(torch.device(given.device), given.quick)
    if given.out:
        append_rows(given.out, [{"part": "machine", "case": given.device, **facts}])
    print(json.dumps(facts) if given.json else describe(facts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
