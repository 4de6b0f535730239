"""Energy that a device counts itself: a GPU board through NVIDIA's library, processors through the system's power capping."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["POWERCAP", "EnergyMeter"]

POWERCAP = Path("/sys/class/powercap")
# the library counts from when the driver was loaded, in 64 bits of millijoules
NEVER_WRAPS = 1 << 64

Read = Callable[[], int]


@dataclass(frozen=True)
class _Counter:
    """What counts energy: a number that only grows, until it begins again at `wraps_at`."""

    read: Read
    joules: float
    wraps_at: int


class EnergyMeter:
    """Reads how much energy a device has used.

    Attributes:
        source: What is counted: "GPU board", "processor packages", or None where nothing is readable.
    """

    def __init__(self, device: torch.device, powercap: Path = POWERCAP) -> None:
        cuda = device.type == "cuda"
        self._counters = _gpu_counters(device) if cuda else _package_counters(powercap)
        self.source = ("GPU board" if cuda else "processor packages") if self._counters else None

    def read(self) -> tuple[int, ...]:
        """Return what the counters show now, to be passed to `joules`."""
        return tuple(counter.read() for counter in self._counters)

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float | None:
        """Return the energy between two readings, None where nothing is readable."""
        if self.source is None:
            return None
        used = zip(self._counters, before, after, strict=True)
        return sum(counter.joules * ((end - begin) % counter.wraps_at) for counter, begin, end in used)


def _package_counters(powercap: Path) -> list[_Counter]:
    """One counter for each processor package; parts of a package are in its sum. Most systems let only root read them."""
    found = []
    for zone in sorted(powercap.glob("*:*")):
        try:
            if not (zone / "name").read_text().startswith("package"):
                continue
            path, wraps_at = zone / "energy_uj", int((zone / "max_energy_range_uj").read_text()) + 1
            int(path.read_text())
        except (OSError, ValueError):
            continue
        found.append(_Counter(lambda path=path: int(path.read_text()), 1e-6, wraps_at))  # type: ignore[misc]
    return found


def _gpu_counters(device: torch.device) -> list[_Counter]:
    """The board's counter, none where the library, the card or the counter (since Volta) is missing."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    card, total = ctypes.c_void_p(), ctypes.c_ulonglong()
    if uuid is None or library.nvmlInit_v2():
        return []
    if library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(card)):
        return []

    def read() -> int:
        if library.nvmlDeviceGetTotalEnergyConsumption(card, ctypes.byref(total)):
            raise OSError("energy: the counter of the GPU could not be read")
        return total.value

    try:
        read()
    except OSError:
        return []
    return [_Counter(read, 1e-3, NEVER_WRAPS)]
