"""Energy counters: packages only, through a wrap, of a GPU in millijoules, and none where nothing is readable."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch
from fastskel.bench import energy
from fastskel.bench.energy import EnergyMeter

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def zone(folder: Path, name: str, count: int) -> Path:
    folder.mkdir(parents=True)
    for file, text in (("name", name), ("energy_uj", str(count)), ("max_energy_range_uj", "9999999")):
        (folder / file).write_text(f"{text}\n")
    return folder / "energy_uj"


def test_packages_are_summed_and_may_begin_again(tmp_path: Path) -> None:
    first = zone(tmp_path / "intel-rapl:0", "package-0", 9_000_000)
    second = zone(tmp_path / "intel-rapl:1", "package-1", 100)
    # a part of the first package, and something else
    core = zone(tmp_path / "intel-rapl:0:0", "core", 0)
    zone(tmp_path / "intel-rapl:2", "psys", 0)
    meter = EnergyMeter(CPU, tmp_path)
    before = meter.read()
    first.write_text("500000\n")
    second.write_text("250100\n")
    core.write_text("123456\n")
    assert meter.source == "processor packages"
    assert meter.joules(before, meter.read()) == pytest.approx(1.5 + 0.25)


@pytest.mark.parametrize("name", ["energy_uj", "max_energy_range_uj", "name"])
def test_a_counter_that_cannot_be_read_is_none(tmp_path: Path, name: str) -> None:
    zone(tmp_path / "intel-rapl:0", "package-0", 1)
    (tmp_path / "intel-rapl:0" / name).unlink()
    meter = EnergyMeter(CPU, tmp_path)
    assert meter.source is None
    assert meter.joules(meter.read(), meter.read()) is None


class Library:
    """Stands for NVIDIA's: a call that fails returns its number."""

    def __init__(self, failing: str = "") -> None:
        self.failing, self.millijoules, self.card = failing, 5000, b""

    def __getattr__(self, name: str):
        def call(*arguments):
            if name == self.failing:
                return 3
            if name == "nvmlDeviceGetHandleByUUID":
                self.card = arguments[0]
            if name == "nvmlDeviceGetTotalEnergyConsumption":
                arguments[1]._obj.value = self.millijoules
            return 0

        return call


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch):
    def give(found: Library) -> Library:
        monkeypatch.setattr(energy.ctypes, "CDLL", lambda name: found)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="12-34"))
        return found

    return give


def test_a_gpu_counts_its_board(library) -> None:
    found = library(Library())
    meter = EnergyMeter(GPU)
    before = meter.read()
    found.millijoules += 2500
    assert meter.source == "GPU board" and found.card == b"GPU-12-34"
    assert meter.joules(before, meter.read()) == pytest.approx(2.5)


@pytest.mark.parametrize("call", ["nvmlInit_v2", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"])
def test_a_gpu_without_a_counter_is_none(library, call: str) -> None:
    library(Library(call))
    meter = EnergyMeter(GPU)
    assert meter.source is None and meter.joules(meter.read(), meter.read()) is None


def test_no_library_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(energy.ctypes, "CDLL", fail)
    assert EnergyMeter(GPU).source is None
