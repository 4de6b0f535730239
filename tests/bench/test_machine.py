"""Facts of the machine: what is read where it can be, None and said so where it cannot, and peaks at tiny sizes."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest
import torch
from fastskel.bench import machine

from fastskel.train import utilisation

CPU = torch.device("cpu")
GPU_FACTS = {
    "gpu": "a card", "gpu_capability": [9, 0], "gpu_multiprocessors": 132, "gpu_memory_gib": 139.8, "gpus": 1,
    "gpu_driver": None, "gpu_clock_mhz": 345.0, "gpu_clock_max_mhz": None, "gpu_memory_clock_mhz": None,
    "gpu_power_limit_w": 700.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def facts():
    return machine.measure(CPU, quick=True)


def test_facts_are_plain_values_with_peaks_of_every_type_that_the_device_has(facts) -> None:
    assert json.loads(json.dumps(facts)) == facts
    for name in ("fp32", "bf16", "fp16"):
        assert facts[f"matmul_{name}_tflop_per_s"] > 0
        assert facts[f"matmul_{name}_size"] == machine.QUICK_MATRIX
    assert facts["matmul_tf32_tflop_per_s"] is None and facts["matmul_fp8_tflop_per_s"] is None
    assert facts["copy_gb_per_s"] > 0 and facts["copy_one_thread_gb_per_s"] > 0
    assert 1 <= facts["cpus"] <= facts["cpus_online"]
    assert facts["instructions"] in ("avx512", "avx2", "baseline")
    assert facts["memory_gib"] > 0.1
    assert facts["gpu"] is None and facts["quick"] is True
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_measuring_leaves_torch_as_it_was() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.set_float32_matmul_precision("high")
    try:
        assert machine.measure(CPU, quick=True)["threads"] == 3
        assert torch.get_num_threads() == 3 and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")


def test_products_grow_until_one_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    # 0.1 s at 1024, so that 2048 would take 0.8 s
    seconds = {256: 0.1 / 64, 512: 0.1 / 8, 1024: 0.1}
    monkeypatch.setattr(machine, "product_of", lambda size, name, device: size)
    monkeypatch.setattr(utilisation, "seconds_of", lambda size, device, repeats, choose=None: seconds[size])
    speed, size = machine._matmul("fp32", CPU, quick=False)
    assert size == 1024
    assert speed == pytest.approx(2 * 1024**3 / 0.1 / 1e12)


def test_products_never_exceed_the_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "product_of", lambda size, name, device: size)
    monkeypatch.setattr(utilisation, "seconds_of", lambda size, device, repeats, choose=None: 1e-6)
    assert machine._matmul("fp32", CPU, quick=False)[1] == machine.MATRIX


def test_copies_are_larger_than_the_caches_and_leave_memory_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "seconds_of", lambda call, device, repeats: 1.0)
    assert machine._copies(CPU, False, 1 << 25, 64.0)["copy_bytes"] == 1 << 28
    assert machine._copies(CPU, False, 1 << 26, 64.0)["copy_bytes"] == machine.CACHES << 26
    assert machine._copies(CPU, False, 1 << 26, 1.0)["copy_bytes"] == (1 << 30) // machine.COPY_SHARE


def test_caches_are_read_from_the_system(tmp_path: Path) -> None:
    caches = (("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "1024K"), ("3", "Unified", "32M"))
    for number, (level, kind, size) in enumerate(caches):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{text}\n")
    assert machine.cache_bytes(tmp_path) == {"l1d_bytes": 48 << 10, "l2_bytes": 1 << 20, "l3_bytes": 32 << 20}
    assert set(machine.cache_bytes(tmp_path / "absent").values()) == {None}


def test_clocks_are_read_from_the_system(tmp_path: Path) -> None:
    (tmp_path / "scaling_cur_freq").write_text("2500000\n")
    assert machine._clocks(tmp_path) == {"clock_mhz": 2500.0, "clock_max_mhz": None}


def test_gpu_facts_come_from_torch_and_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\necho '580.1, 345, 1980, [N/A], 700.00'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = types.SimpleNamespace(name="a card", multi_processor_count=132, total_memory=139 << 30, uuid="12-34")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    facts = machine._gpu(torch.device("cuda"))
    assert "--id=GPU-12-34" in (tmp_path / "asked").read_text()
    assert facts == {
        "gpu": "a card", "gpu_capability": [9, 0], "gpu_multiprocessors": 132, "gpu_memory_gib": 139.0, "gpus": 1,
        "gpu_driver": "580.1", "gpu_clock_mhz": 345.0, "gpu_clock_max_mhz": 1980.0, "gpu_memory_clock_mhz": None,
        "gpu_power_limit_w": 700.0,
    }  # fmt: skip
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert machine._gpu(torch.device("cuda"))["gpu_driver"] is None


def test_xformers_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"{name} wants another torch")

    monkeypatch.setattr(machine.metadata, "version", lambda name: "0.0.1")
    monkeypatch.setattr(machine.importlib, "import_module", fail)
    assert machine._xformers() == {"xformers": "0.0.1", "xformers_error": "ImportError: xformers.ops wants another torch"}


def test_people_read_aligned_lines_and_what_is_not_readable(facts) -> None:
    unknown = {"clock_max_mhz": None, "l3_bytes": None, "commit": None, "memory_gib": None}
    lines = dict(line.split("  ", 1) for line in machine.describe({**facts, **unknown}).splitlines())
    assert "at most" in lines["clock"] and "not readable at most" in lines["clock"]
    assert lines["caches"].endswith("L3 not readable")
    assert lines["memory"].strip() == lines["commit"].strip() == "not readable"
    assert "fp32" in lines["products"] and "tf32" not in lines["products"]
    assert "mean nothing" in lines["note"]
    assert "GPU" not in lines
    starts = {len(line) - len(line[9:].lstrip()) for line in machine.describe(facts).splitlines()}
    assert starts == {11}

    text = machine.describe({**facts, **GPU_FACTS, "quick": False, "copy_one_thread_gb_per_s": None})
    assert "a card, capability 9.0, 132 multiprocessors, 140 GiB, driver not readable" in text
    assert "power limit 700 W" in text and "not readable at most" in text
    assert "one thread" not in text and "note" not in text


def test_command_prints_lines_or_json_and_adds_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    assert machine.main(["--out", str(out), "--device", "cpu", "--quick"]) == 0
    assert capsys.readouterr().out.startswith("processor  ")
    (row,) = (json.loads(line) for line in out.read_text().splitlines())
    assert row["part"] == "machine" and row["case"] == "cpu" and row["matmul_bf16_tflop_per_s"] > 0
    assert machine.main(["--device", "cpu", "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["copy_bytes"] == machine.QUICK_COPY_BYTES
