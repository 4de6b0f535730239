"""Cost per batch size and the largest batch: the search, what foretells a limit, the encoder's pass, and the rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastskel.bench import sweep as bench
from fastskel.bench.harness import peak_bytes
from fastskel.bench.providers import KINDS, Kind
from fastskel.bench.sweep import GIB, MIB, EncoderPass, History, Subject, search
from fastskel.bench.train_steps import Setting, make_step

CPU = torch.device("cpu")
SETTING = Setting(
    device=CPU, batch=3, width=16, frames=8, joints=3, rounds=1, limit_s=0.0, providers=("reference", "fastskel"),
)  # fmt: skip
BY_NAME = {kind.name: kind for kind in KINDS}
NO_LIMIT = {"step_s": float("inf"), "budget": float("inf")}


@pytest.mark.parametrize("true", [2, 3, 100, 127, 128, 1000])
def test_search_finds_the_largest_batch_to_a_64th(true: int) -> None:
    asked: list[int] = []

    def fits(batch: int) -> bool:
        # nothing larger than what did not fit is tried
        assert all(batch < other for other in asked if other > true)
        asked.append(batch)
        return batch <= true

    best, failed = search(fits, 2, 1 << 16)
    assert best <= true < failed
    assert failed - best <= max(1, best // 64)
    assert len(asked) == len(set(asked)) <= 20


def test_search_says_when_nothing_and_when_everything_fits() -> None:
    assert search(lambda batch: False, 2, 64) == (0, 2)
    assert search(lambda batch: True, 2, 64) == (64, None)
    assert search(lambda batch: True, 2, 64, limit_s=0.0) == (0, None)


@pytest.mark.parametrize(
    ("batch", "step_s", "budget", "reason"),
    [
        (16, 0.141, 1.5 * GIB, ""),
        # 80 and 100 ms, 3/4 and 1 GiB: 40 ms and half a GiB more for the next eight
        (16, 0.13, 9 * GIB, "a step of 16 would take 0.14 s, more than 0.13 s"),
        (16, 1.0, 1.4 * GIB, "a step of 16 would need 1.50 GiB, more than 1.40 GiB"),
    ],
)
def test_smaller_batches_foretell_larger_ones(batch: int, step_s: float, budget: float, reason: str) -> None:
    history = History([(4, 80.0, 3 * GIB // 4), (8, 100.0, GIB)])
    assert history.foresee(batch, step_s, budget) == reason
    # once it is left out, it stays out
    assert history.foresee(1, float("inf"), float("inf")) == reason


def test_one_batch_foretells_in_proportion_and_none_nothing() -> None:
    # a line that falls by noise stays level
    assert History([(4, 120.0, GIB), (8, 100.0, GIB)]).foresee(16, 0.11, GIB) == ""
    assert History().foresee(64, 0.0, 0.0) == ""
    assert "2.00 GiB" in History([(8, 1.0, GIB)]).foresee(16, 1.0, 1.9 * GIB)


def test_encoders_pass_alike() -> None:
    values, gradients = [], []
    for name in ("reference", "fastskel"):
        made = EncoderPass(make_step(SETTING, BY_NAME[name]))
        made.dtype = torch.float32
        values.append(made.step())
        named = dict(made.encoder.named_parameters())
        gradients.append({name: p.grad for name, p in named.items() if p.grad is not None})
    assert torch.allclose(*values, rtol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    scale = max(g.abs().max() for g in gradients[0].values())
    assert all((gradients[0][key] - gradients[1][key]).abs().max() < 1e-3 * scale for key in gradients[0])


@pytest.mark.parametrize("name", ["reference", "fastskel"])
def test_the_peak_of_a_batch_is_that_of_a_step_made_for_it(name: str) -> None:
    kind = BY_NAME[name]
    kept: list[Any] = []

    def alone() -> None:
        kept.append(make_step(replace(SETTING, batch=12), kind))
        kept[0].settle()
        kept[0].step()

    weights = sum(4 * p.numel() for p in make_step(SETTING, kind).model.parameters())
    subject = Subject("step", SETTING, kind)
    _, large = subject.ready(48)
    call, small = subject.ready(12)
    # weights, gradients and two moments
    assert small > 4 * weights
    # the views, and at least four values of each token of two streams and four views
    assert large - small > 36 * 4 * (8 * 18 + 4 * (8 + 6) * SETTING.width) * 4
    # buffers of a few bytes and what was freed late differ
    assert small == pytest.approx(peak_bytes(alone), rel=0.05)
    assert torch.isfinite(call())


def test_an_encoder_holds_one_view() -> None:
    subject = Subject("encoder", SETTING, BY_NAME["fastskel"])
    subject.ready(5)
    assert [view.clips.shape for view in subject.train.batch.views] == [(5, 8, 2, 3, 3)]
    subject = Subject("encoder", SETTING, BY_NAME["reference"])
    subject.ready(5)
    assert [view.shape for view in subject.train.views] == [(5, 3, 8, 3, 2)]


class Pretended:
    """Stands for a `Subject` and builds nothing: `peaks` gives the bytes of a provider's batch, or raises."""

    peaks: Callable[[str, int], int]

    def __init__(self, part: str, setting: Setting, kind: Kind) -> None:
        self.part, self.kind = part, kind

    def ready(self, batch: int) -> tuple[Callable[[], None], int]:
        return (lambda: None), type(self).peaks(self.kind.name, batch)


def pretend(monkeypatch: pytest.MonkeyPatch, peaks: Callable[[str, int], int]) -> None:
    monkeypatch.setattr(bench, "Subject", type("Given", (Pretended,), {"peaks": staticmethod(peaks)}))


def swept(monkeypatch: pytest.MonkeyPatch, peaks: Callable[[str, int], int], **limits: float) -> list[dict]:
    pretend(monkeypatch, peaks)
    monkeypatch.setattr(bench, "check", lambda *arguments: {"distance": 0.0})
    return list(bench.sweep("step", SETTING, most=16, **{**NO_LIMIT, **limits}))


def test_a_provider_out_of_memory_is_left_out_and_the_other_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def peaks(name: str, batch: int) -> int:
        if name == "reference" and batch >= 8:
            raise torch.cuda.OutOfMemoryError("no more")
        return batch * MIB

    rows = {(row["provider"], row["batch"]): row for row in swept(monkeypatch, peaks)}
    assert {batch for _, batch in rows} == {1, 2, 4, 8, 16}
    for name in ("reference", "fastskel"):
        assert rows[name, 1]["status"] == "skipped" and "2 samples at least" in rows[name, 1]["reason"]
    assert [rows["reference", batch]["reason"] for batch in (8, 16)] == ["out of memory at 8"] * 2
    assert rows["fastskel", 4]["speedup"] > 0 and rows["fastskel", 4]["peak_mib"] == 4
    # nothing to be faster than
    assert rows["fastskel", 16]["status"] == "ok" and rows["fastskel", 16]["speedup"] is None


@pytest.mark.parametrize("words", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling", "illegal access"])
def test_no_memory_is_told_from_other_errors(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def peaks(name: str, batch: int) -> int:
        if batch >= 8:
            raise RuntimeError(words)
        return 1

    pretend(monkeypatch, peaks)
    search = bench.largest_batch(replace(SETTING, device=torch.device("cuda")), most=64, budget=1.0, search_s=float("inf"))
    if words == "illegal access":
        with pytest.raises(RuntimeError, match="illegal access"):
            list(search)
        with pytest.raises(RuntimeError, match="illegal access"):
            swept(monkeypatch, peaks)
    else:
        assert [row["largest_batch"] for row in search] == [7, 7]
        assert {r["status"] for r in swept(monkeypatch, peaks) if r["batch"] == 8} == {"skipped"}


def test_what_has_no_room_beside_the_others_is_left_out_at_that_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = bench.compare

    def crowded(calls: dict[str, Any], baseline: str, **options: Any) -> Any:
        # the third timing is that of batch 8
        seen.append(len(calls))
        if len(seen) == 3:
            raise torch.cuda.OutOfMemoryError("no more")
        return genuine(calls, baseline, **options)

    seen: list[int] = []
    monkeypatch.setattr(bench, "compare", crowded)
    rows = {(row["provider"], row["batch"]): row for row in swept(monkeypatch, lambda name, batch: batch * MIB)}
    assert seen == [2, 2, 2, 1, 2]
    assert rows["fastskel", 8]["status"] == "skipped" and rows["fastskel", 8]["reason"] == "out of memory at 8 beside the others"
    assert [rows[name]["status"] for name in (("reference", 8), ("reference", 16), ("fastskel", 16))] == ["ok"] * 3


def test_a_provider_over_its_budget_is_left_out_before_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, int]] = []

    def peaks(name: str, batch: int) -> int:
        tried.append((name, batch))
        return batch * MIB * (3 if name == "reference" else 1)

    rows = {(row["provider"], row["batch"]): row for row in swept(monkeypatch, peaks, budget=20 * MIB)}
    assert ("reference", 8) not in tried and ("fastskel", 16) in tried
    assert "a step of 8 would need 0.02 GiB" in rows["reference", 16]["reason"]


def test_the_largest_batch_is_searched_against_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    share = {"reference": 3, "fastskel": 1}
    pretend(monkeypatch, lambda name, batch: batch * share[name] * MIB)
    limits = dict(budget=100 * MIB, search_s=float("inf"))
    rows = {row["provider"]: row for row in bench.largest_batch(SETTING, most=1024, **limits)}
    assert (rows["reference"]["largest_batch"], rows["reference"]["failed_batch"]) == (33, 34)
    assert rows["fastskel"]["largest_batch"] == 100 and rows["fastskel"]["at_least"] is False
    assert rows["fastskel"]["ratio"] == pytest.approx(100 / 33) and rows["fastskel"]["budget_gib"] == pytest.approx(100 / 1024)
    rows = list(bench.largest_batch(SETTING, most=32, **limits))
    assert [row["largest_batch"] for row in rows] == [32, 32] and all(row["at_least"] for row in rows)


def test_a_gpu_s_largest_batch_is_where_torch_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def peaks(name: str, batch: int) -> int:
        if batch > 21:
            raise torch.cuda.OutOfMemoryError("no more")
        return 1 << 60

    pretend(monkeypatch, peaks)
    setting = replace(SETTING, device=torch.device("cuda"), providers=("fastskel-triton", "fastskel-graph", "reference-compiled"))
    found = {row["provider"]: row for row in bench.largest_batch(setting, most=1024, budget=1.0, search_s=float("inf"))}
    assert found["reference"]["largest_batch"] == found["fastskel-triton"]["largest_batch"] == 21
    assert found["reference"]["how"] == "torch out of memory" and found["reference"]["budget_gib"] is None
    assert found["fastskel-graph"]["status"] == found["reference-compiled"]["status"] == "skipped"


def test_command_adds_rows_that_are_plotted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    command = ["--out", str(out), "--device", "cpu", "--quick", "--width", "16", "--most", "2"]
    assert bench.main([*command, "--providers", "fastskel-graph", "--parts", "largest", "--budget-gib", "0.0005"]) == 0
    rows = {row["provider"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert rows["fastskel-graph"]["status"] == "unavailable"
    row = rows["reference"]
    assert row["part"] == "largest-batch" and row["case"] == "usdrl-dste D=16"
    assert (row["largest_batch"], row["failed_batch"], row["at_least"]) == (0, 2, False)

    out.unlink()
    assert bench.main([*command, "--providers", "fastskel", "--parts", "step", "encoder"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    timed = [(row["part"], row["provider"], row["batch"]) for row in rows if row["status"] == "ok"]
    assert timed == [
        ("sweep", "reference", 2), ("sweep", "fastskel", 2), *[
            ("sweep-encoder", name, batch) for batch in (1, 2) for name in ("reference", "fastskel")
        ],
    ]  # fmt: skip
    row = rows[-1]
    assert row["case"] == "usdrl-dste D=16 N=2" and row["median_ms"] > 0 and row["peak_mib"] > 0 and row["quick"] is True
    assert row["samples_per_s"] == pytest.approx(2e3 / row["median_ms"]) and row["distance_fp32"] < 1e-4
    assert "samples/s" in capsys.readouterr().out
