"""What rows of benchmarks say in words, the tables of them, and two runs side by side."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from fastskel.bench import rows, table

FACTS = {
    "matmul_fp32_tflop_per_s": 0.2, "matmul_bf16_tflop_per_s": 1.0, "matmul_fp8_tflop_per_s": None,
    "matmul_bf16_size": 4096, "copy_gb_per_s": 40.0, "copy_one_thread_gb_per_s": 25.0, "copy_bytes": 1 << 30,
}  # fmt: skip


def row(provider: str, speedup: float = 1.0, *, ms: float = 100.0, **more: Any) -> dict[str, Any]:
    spread = {"speedup_q20": 0.95 * speedup, "speedup_q80": 1.05 * speedup, "uncertainty": 0.03}
    return {
        "part": "forward", "case": "bf16 N=8", "encoder": "dste", "precision": "bf16", "provider": provider, "median_ms": ms,
        "speedup": speedup, **spread, "device": "a machine", "quick": False, **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (row("fastskel", 3.14), "3.1x faster"),
        (row("fastskel", 1.06), "1.06x faster"),
        (row("fastskel", 43.97), "44x faster"),
        (row("fastskel", 0.5), "2.0x slower"),
        (row("fastskel", 1.029), "no difference (below noise)"),
        (row("fastskel", 1 / 1.029), "no difference (below noise)"),
        (row("fastskel", 1.031), "1.03x faster"),
        (row("fastskel", 1 / 1.031), "1.03x slower"),
        (row("fastskel", 1.1, uncertainty=0.12), "too noisy to say: noise 12%"),
        (row("fastskel", 3.14, uncertainty=0.12), "3.1x faster, but noisy: 12%"),
        (row("fastskel", 3.14, quick=True), "runs; a tiny size shows no speed"),
        # of before there was an uncertainty: the spread of the rounds
        ({**row("fastskel", 1.08), "uncertainty": None}, "too noisy to say: noise 10%"),
        ({"provider": "kernel", "median_ms": 1.0}, "measured alone"),
        ({"status": "failed", "error": "Traceback\n  line\nValueError: far off\n"}, "failed: ValueError: far off"),
        ({"status": "unavailable", "reason": "no GPU"}, "unavailable: no GPU"),
        ({"status": "skipped", "why": "too slow"}, "skipped: too slow"),
    ],
)
def test_verdicts(given: dict[str, Any], words: str) -> None:
    assert rows.verdict(given) == words


@pytest.mark.parametrize(
    ("given", "share"),
    [
        ({"precision": "bf16", "gflop_per_s": 500.0}, 0.5),
        ({"precision": "fp32", "gflop_per_s": 500.0}, 2.5),
        ({"precision": "bf16", "tflop_per_s": 0.25}, 0.25),
        ({"precision": "bf16", "reference_tflop_per_s": 0.1}, 0.1),
        # half of what a copy moves is written
        ({"bytes_per_s": 10e9}, 0.5),
        ({"gigabytes_per_second": 10.0}, 0.25),
        # what limits is the larger
        ({"precision": "bf16", "tflop_per_s": 0.1, "gigabytes_per_second": 30.0}, 0.75),
        ({"precision": "fp8", "gflop_per_s": 500.0}, None),
        ({"precision": "bf16", "median_ms": 3.0}, None),
    ],
)
def test_share_of_the_peak(given: dict[str, Any], share: float | None) -> None:
    assert rows.peak_share(given, FACTS) == (None if share is None else pytest.approx(share))
    assert rows.peak_share(given, {}) is None


def test_the_baseline_is_found() -> None:
    plain, own = row("reference"), row("fastskel", 2.0)
    assert rows.baseline_of([own, plain]) is plain
    # as fast as the reference is not the reference
    assert rows.baseline_of([row("fastskel"), plain]) is plain
    assert rows.baseline_of([{**plain, "status": "failed"}]) is None
    feeder = row("feeder", part="loader-speed")
    assert rows.baseline_of([feeder, row("numpy", 1.8)]) is feeder
    assert rows.baseline_of([own]) is None


def test_memory_is_mebibytes() -> None:
    assert rows.memory_mib({"peak_mib": 3}) == 3.0
    assert rows.memory_mib({"peak_bytes": 3 << 20}) == 3.0
    assert rows.memory_mib({}) is None


def test_table_has_a_line_for_each_provider() -> None:
    given = [
        row("reference", ms=1234.5, peak_mib=1331.1, peak_share=0.45), row("fastskel", 2.0, ms=617.2, peak_mib=4.2),
        {"part": "forward", "case": "bf16 N=8", "encoder": "dste", "provider": "reference-xformers", "status": "unavailable",
         "reason": "not installed"},
        {"part": "step", "case": "step", "status": "failed", "error": "not done within 60 s"},
        {"part": "flops", "case": "forward", "encoder": "dste", "provider": "reference", "gflop_per_view": 12.448},
        row("fastskel", 2.0, part="job", case="N=8", epoch_s=3600.0, recipe_h=451.0, extrapolated=True),
    ]  # fmt: skip
    text = table.rows_table(given)
    found = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    assert ["encode a batch, dste, bf16 N=8"] in found
    assert ["reference", "1.23 s", "1,331 MiB", "45%", "what the others are compared with"] in found
    assert ["fastskel", "617 ms", "2.00", "1.90..2.10", "3%", "4.2 MiB", "2.0x faster"] in found
    assert ["reference-xformers", "unavailable: not installed"] in found
    assert ["training step, step", "failed: not done within 60 s"] in found
    assert ["flops, dste, forward", "reference", "12.4 GFLOP per view"] in found
    assert ["whole job, dste, N=8", "fastskel", "3,600 s per epoch, 451 h per recipe, extrapolated"] in found
    # tiny sizes have a time, which shows that they ran, and nothing that looks like a result
    tiny = [{**one, "quick": True} for one in (row("reference"), row("fastskel", 2.0, epoch_s=3600.0, extrapolated=True))]
    text = table.rows_table(tiny)
    assert re.search(r"^  fastskel +100 ms +runs; a tiny size shows no speed$", text, re.MULTILINE) and "epoch" not in text
    largest = {"part": "largest-batch", "case": "D=128", "provider": "fastskel", "largest_batch": 4096, "at_least": True}
    assert "4,096 samples fit, or more" in table.rows_table([largest])
    # every column is explained
    assert [word for word in table.HEADINGS if not re.search(rf"^  {re.escape(word)}  ", table.legend(), re.MULTILINE)] == []
    assert table.rows_table([]) == ""


@pytest.mark.parametrize(
    ("milliseconds", "words"),
    [(0.4119, "0.412 ms"), (2.0, "2.00 ms"), (99.96, "100 ms"), (999.4, "999 ms"), (999.6, "1.00 s"), (123456.0, "123 s")],
)
def test_durations(milliseconds: float, words: str) -> None:
    assert table.duration(milliseconds) == words


def test_two_runs_agree_within_both_noises() -> None:
    earlier = [row("reference", ms=100.0), row("fastskel", 2.0, ms=50.0)]
    # a machine of half the speed: times differ, ratios do not
    later = [row("reference", ms=200.0), row("fastskel", 2.11, ms=95.0)]
    base, own = rows.agreement(earlier, later)
    assert base.ratio == 0.5 and base.agrees is None
    assert own.change == pytest.approx(1.055) and own.allowed == pytest.approx(0.06) and own.agrees
    for speedup in (2.0 * 1.061, 2.0 / 1.061):
        _, own = rows.agreement(earlier, [later[0], row("fastskel", speedup)])
        assert own.agrees is False
        text = table.differences_table([base, own])
        assert "DIFFER by more than both noises" in text and "1 of 1 speed-ups differ" in text
    assert "0 of 1 speed-ups differ" in table.differences_table(rows.agreement(earlier, later))
    # of rows of the same name the last was measured last; what failed has no time
    _, own = rows.agreement([*earlier, row("fastskel", 3.0)], [*later, {**row("fastskel", 9.0), "status": "failed"}])
    assert own.change == pytest.approx(2.11 / 3.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(device="another"), "must have one device, got 'a machine' and 'another'"),
        (dict(quick=True), "must have one quick, got False and True"),
        (dict(threads=2), "must have one threads, got 1 and 2"),
        (dict(case="bf16 N=16"), "runs must share a timed case and provider, got 1 and 1 that do not meet"),
        (dict(width=512), "runs must share a timed case and provider"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_runs_that_cannot_be_compared(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        rows.agreement([row("fastskel", 2.0, threads=1)], [row("fastskel", 2.0, **{"threads": 1, **changes})])


def test_names_tell_cases_apart() -> None:
    same = [row("reference"), row("fastskel", 2.0), row("fastskel", 2.0, encoder="sttr")]
    assert [len(group) for group in rows.cases(same).values()] == [2, 1]
    assert math.isclose(rows.noise(row("fastskel", 2.0)) or 0.0, 0.03)
    assert rows.noise({"median_ms": 1.0}) is None


def test_what_one_run_lacks_is_told() -> None:
    earlier = [row("reference"), row("fastskel", 2.0)]
    later = [row("reference"), {**row("fastskel"), "status": "failed", "error": "far off"}, row("reference-sdpa", 1.1)]
    lines = table.unmatched_lines(*rows.unmatched(earlier, later))
    assert lines == [
        "Only the earlier run timed: encode a batch, dste, bf16 N=8, fastskel",
        "Only the later run timed: encode a batch, dste, bf16 N=8, reference-sdpa",
    ]
    assert table.unmatched_lines(*rows.unmatched(earlier, earlier)) == []
    # rows of before threads were told
    assert len(rows.agreement(earlier, [row("fastskel", 2.0, threads=2)])) == 1
