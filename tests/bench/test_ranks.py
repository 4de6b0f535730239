"""One process on all cores beside one process per core."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fastskel.bench import harness, ranks
from fastskel.bench.children import Child, read_rows

SMALL = ["--batch", "4", "--width", "16", "--steps", "2", "--rounds", "1"]


def test_both_ways_train_the_whole_batch(tmp_path: Path, capsys, monkeypatch) -> None:
    # one round, however noisy
    monkeypatch.setattr(harness, "MOST_ROUNDS", 1)
    assert ranks.main([*SMALL, "--precision", "fp32", "--out", str(tmp_path / "rows.jsonl")]) == 0
    one, two = read_rows(tmp_path / "rows.jsonl")
    assert [row["provider"] for row in (one, two)] == ["one process", "2 processes"]
    assert one["overhead"] == 0 and two["overhead"] == pytest.approx(1 / two["speedup"] - 1)
    assert two["samples_per_s"] == pytest.approx(1e3 * 4 / two["median_ms"])
    assert "2 processes" in capsys.readouterr().out


def test_the_figure_of_a_turn_is_that_of_its_steps_behind_the_warm_up(tmp_path: Path, monkeypatch) -> None:
    setting = ranks.Setting(batch=8, steps=3)

    def run(self: Child, *command: str) -> tuple[int, str]:
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir()
        speeds = [0.001] * ranks.WARMUP_STEPS + ([8.0, 16.0, 4.0] if "torch.distributed.run" in command else [2.0] * 3)
        (folder / "log.jsonl").write_text("".join(json.dumps({"samples_per_s": speed}) + "\n" for speed in speeds))
        return 0, ""

    monkeypatch.setattr(Child, "run", run)
    monkeypatch.setattr(ranks, "make_data", lambda folder, clips: None)
    one, two = ranks.measure(setting, tmp_path)
    assert (one["median_ms"], two["median_ms"], two["speedup"]) == pytest.approx((4000.0, 1000.0, 4.0))


def test_a_training_that_fails_is_an_error(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ranks, "make_data", lambda folder, clips: None)
    with pytest.raises(RuntimeError, match=r"ranks: training in 1 processes ended: exit status 2: error: .*data"):
        list(ranks.measure(ranks.Setting(batch=4, width=16, steps=1), tmp_path))


def test_more_processes_than_cores_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        ranks.main(["--processes", "4096"])
    assert "--processes must be at most" in capsys.readouterr().err
