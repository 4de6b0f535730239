"""The encoder benchmark on tiny sizes: every part runs and says what it measured; a wrong result is not timed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastskel.bench import encoder, providers
from fastskel.bench.reference import STTR

PLAIN = ["reference", "reference-sdpa", "fastskel"]
ORIGIN = {"device", "threads", "versions", "commit", "date", "command", "encoder", "width", "quick"}
TIMES = {
    "median_ms", "q20_ms", "q80_ms", "speedup", "speedup_q20", "speedup_q80", "noise", "rounds", "gflop_per_s", "precision",
}  # fmt: skip
# cases of each part, in both precisions where it has them
CASES = {"flops": 2, "memory": 2, "forward": 2, "train": 2, "latency": 2}
# what a CPU lacks, with the reason, in each case that is timed; in bf16 of a batch float16 too
MISSING = ["reference-xformers", "reference-graph", "fastskel-triton", "fastskel-graph", "fastskel-triton-graph"]
QUICK = providers.Setting(**encoder.QUICK)


@pytest.mark.parametrize("kind", ["dste", "sttr"])
def test_all_parts_run_and_leave_rows(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    assert encoder.main(["--quick", "--out", str(out), "--encoder", kind, "--rounds", "3"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(rows)
    for part, cases in CASES.items():
        own = [row for row in rows if row["part"] == part]
        ran = [row for row in own if row.get("status", "ok") == "ok"]
        assert [row["provider"] for row in ran] == PLAIN * cases
        assert len({row["case"] for row in own}) == cases
        absent = [row for row in own if row not in ran]
        assert all(row["status"] == "unavailable" and row["reason"] and "median_ms" not in row for row in absent)
        half = {"forward": 1, "train": cases}.get(part, 0)
        timed = 0 if part in ("flops", "memory") else cases
        assert sorted(row["provider"] for row in absent) == sorted(MISSING * timed + ["reference-fp16"] * half)
    for row, line in zip(rows, printed, strict=True):
        assert row.keys() >= ORIGIN and row["quick"] and row["encoder"] == kind
        assert line.startswith(row["part"]) and row["provider"] in line
        if row["part"] == "flops":
            assert row["gflop_per_view"] > 0
        elif row["part"] == "memory":
            assert row["held_bytes_per_view"] >= row["saved_bytes_per_view"] > 0
            assert row["peak_bytes_per_view"] > 0
        elif row["status"] == "ok":
            assert row.keys() >= TIMES and row["rounds"] >= 3
            assert 0 < row["q20_ms"] <= row["median_ms"] <= row["q80_ms"]
            assert row["speedup_q20"] <= row["speedup"] <= row["speedup_q80"]
            assert row["provider"] != "reference" or row["speedup"] == 1.0
            assert row["gflop_per_s"] == pytest.approx(1e3 * row["gflop"] / row["median_ms"])
            # distances from the reference in fp32, below the gate
            assert row.get("distance", 0.0) < 5e-2


def test_reference_operations_are_those_of_the_full_model():
    per_view = encoder._work(replace(QUICK, batch=1), 1, backward=False) * 1e9
    tokens, width = (QUICK.frames, 2 * QUICK.joints), QUICK.width
    layers = sum(2 * (25 * n * width**2 + 8 * n**2 * width) for n in tokens)
    embedding = sum(n * width * (other * 3 + width) for n, other in (tokens, tokens[::-1]))
    assert per_view == 2 * (layers + embedding)
    # gradients of all products but the first of each embedding, whose inputs have none
    first = sum(n * width * other * 3 for n, other in (tokens, tokens[::-1]))
    assert encoder._work(QUICK, 1, backward=True) * 1e9 == 3 * per_view - 2 * first


@pytest.mark.parametrize("part", ["forward", "train", "latency"])
def test_what_disagrees_is_not_timed(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = providers.build

    def spoilt(*arguments: object, **options: object) -> list[providers.Provider]:
        found = genuine(*arguments, **options)
        with torch.no_grad():
            for parameter in found[-1].module.parameters():
                parameter.mul_(1.1)
        return found

    monkeypatch.setattr(encoder, "build", spoilt)
    monkeypatch.setattr(encoder, "DROP_PATHS", (0.0,))
    out, command = tmp_path / "rows.jsonl", ["--quick", "--parts", part, "--precision", "fp32", "--providers", "fastskel"]
    assert encoder.main([*command, "--out", str(out)]) == 1
    failed, baseline = (json.loads(line) for line in out.read_text().splitlines())
    assert (failed["provider"], failed["status"], baseline["status"]) == ("fastskel", "failed", "ok")
    what = r"ValueError: encoder: fp32 (output|gradient).* of fastskel must be within .* Mend it"
    assert re.match(what, failed["error"]) and "median_ms" not in failed


def test_a_wrong_baseline_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encoder.OUTPUT_LIMIT, "bf16", 0.0)
    out = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match="encoder: bf16 output of reference must be within 0.0"):
        encoder.run(QUICK, ["forward"], ["bf16"], out)
    assert not out.exists()


def test_operations_of_the_published_size_are_the_published_ones() -> None:
    published = replace(providers.Setting(), providers=())
    per_view = encoder._work(published, encoder.FLOPS_BATCH, backward=False) / encoder.FLOPS_BATCH
    # counted from the published code: 12.45 GFLOP, and 3.20 of STTR
    assert per_view == pytest.approx(12.45, rel=1e-3)
    assert encoder._work(replace(published, encoder="sttr"), 1, backward=False) == pytest.approx(3.20, rel=2e-3)


def test_gate_refuses_what_is_not_a_number():
    with pytest.raises(ValueError, match="must be within 0.1 of the reference, got nan"):
        providers.gate("x", "output", [torch.tensor([float("nan")])], [torch.ones(1)], 0.1)


def test_providers_hold_the_same_weights():
    for kind in ("dste", "sttr"):
        first, *others = providers.build(replace(QUICK, encoder=kind), 0.1)
        assert [provider.name for provider in (first, *others)] == PLAIN
        expected = first.module.state_dict()
        assert all(tensor.std() > 0.005 for key, tensor in expected.items() if tensor.dim() == 1), (
            "biases would not show"
        )
        for provider in others:
            actual = provider.module.state_dict()
            assert list(actual) == list(expected)
            assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert isinstance(first.module, STTR)
    xt, xs = QUICK.tokens(3)
    assert (xt.shape, xs.shape) == ((3, 8, 30), (3, 10, 24))
    assert torch.equal(xt, QUICK.tokens(3)[0])


class Prepared:
    """What `optimize_for_inference` may return: anything with `streams`."""

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        self.module, self.dtype = module, dtype

    def streams(self, xt: torch.Tensor, xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.module(xt, xs)


def test_latency_takes_what_an_encoder_prepares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.nn.Module, "optimize_for_inference", lambda self, dtype: Prepared(self, dtype), raising=False
    )
    ways = encoder._ways(QUICK, providers.build(QUICK, 0.0)[0], "bf16")
    assert list(ways) == ["prepared"]
    y_t, y_s = ways["prepared"]()
    assert (y_t.shape, y_s.shape) == ((1, 8, 16), (1, 10, 16))
    monkeypatch.undo()
    assert list(encoder._ways(QUICK, providers.build(QUICK, 0.0)[0], "bf16")) == ["autocast", "converted"]
    assert list(encoder._ways(QUICK, providers.build(QUICK, 0.0)[0], "fp32")) == ["plain"]
