"""The whole job: what is visited, what is timed and what is not, the check before it, and the rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fastskel.bench import job as bench
from fastskel.bench import systems as parts
from fastskel.bench.energy import EnergyMeter
from fastskel.bench.job import _Stopwatch, _Turn
from fastskel.bench.loader import make_data
from fastskel.bench.providers import KINDS
from fastskel.bench.systems import Job, OwnSystem, ReferenceSystem
from fastskel.bench.train_steps import Setting

CPU = torch.device("cpu")
SETTING = Setting(device=CPU, batch=4, width=16, frames=8, rounds=1, limit_s=0.0, providers=("reference", "fastskel"))
JOB = Job(SETTING, steps=2, workers=1, threads=1, distinct=7, clips=30)
BY_NAME = {kind.name: kind for kind in KINDS}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("job"), JOB.distinct)


def test_an_epoch_visits_clips_alike_and_in_whole_batches() -> None:
    orders = [JOB.order(epoch) for epoch in (0, 1)]
    assert all(len(order) == 28 for order in orders)
    assert not np.array_equal(*orders)
    # 30 visits of 7 clips, without the two of the batch that is not whole
    counts = np.bincount(JOB.order(0), minlength=7)
    assert counts.sum() == 28 and counts.min() >= 2 and counts.max() <= 5


def test_batches_of_numbers_go_on_from_turn_to_turn() -> None:
    turns = parts._Turns(JOB)
    turns.count = 5
    first = list(turns)
    turns.count = 4
    found = np.array(first + list(turns))
    # seven batches in an epoch
    assert np.array_equal(found, np.concatenate([JOB.order(0), JOB.order(1)[:8]]).reshape(-1, 4))


class Clock:
    """Seconds that somebody else advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_watch_stands_still_while_it_is_stopped() -> None:
    clock = Clock()
    watch = _Stopwatch(clock)
    begin = watch()
    clock.now += 1
    with watch.stopped():
        clock.now += 10
    clock.now += 2
    assert watch() - begin == pytest.approx(3)

    def fail() -> None:
        with watch.stopped():
            clock.now += 10
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert watch() - begin == pytest.approx(3)


class Counted:
    """A system that only takes time: half a second for a batch, two for a step, and writes down what happens."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.events = clock, []

    def batches(self, count):
        for number in range(count):
            self.clock.now += 0.5
            self.events.append("made")
            yield number

    def step(self, batch):
        self.clock.now += 2.0
        self.events.append("step")
        return 0.0


class Meter:
    """A joule for each second."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def read(self):
        return (self.clock.now,)

    def joules(self, before, after):
        return after[0] - before[0]


def test_a_turn_times_neither_the_lead_nor_what_was_made_ahead() -> None:
    clock = Clock()
    system, watch = Counted(clock), _Stopwatch(clock)
    turn = _Turn(system, replace(JOB, steps=3, workers=2), watch, Meter(clock))
    begin = watch()
    turn()
    # four steps to bring the loader to its pace, three timed, and four batches that nobody trains on
    assert system.events == ["made", "step"] * 7 + ["made"] * 4
    assert watch() - begin == pytest.approx(3 * 2.5)
    assert turn.waits == pytest.approx([1.5]) and turn.joules == pytest.approx([7.5])
    turn()
    assert turn.waits == pytest.approx([1.5, 1.5])


def test_figures_are_of_steps_and_leave_the_warm_up_out() -> None:
    turn = _Turn(None, JOB, None, None, waits=[9.0, 0.2, 0.4, 0.2], joules=[99.0, 8.0, 16.0, 8.0])
    row = {"rounds": 3, "median_ms": 800.0, "q20_ms": 600.0, "q80_ms": 1000.0}
    found = bench._figures(replace(JOB, clips=3600, epochs=451), row, turn)
    assert found["median_ms"] == 400 and found["q20_ms"] == 300 and found["q80_ms"] == 500
    assert found["samples_per_s"] == pytest.approx(10)
    assert found["waited_ms"] == pytest.approx(100) and found["waited_share"] == pytest.approx(0.25)
    assert found["epoch_s"] == pytest.approx(360) and found["recipe_h"] == pytest.approx(45.1)
    assert found["extrapolated"] is True and found["from_steps"] == 6
    assert found["joules_per_sample"] == pytest.approx(1.0) and found["recipe_kwh"] == pytest.approx(3600 * 451 / 3.6e6)


def test_native_batches_are_made_within_their_turn(dataset) -> None:
    own = OwnSystem(JOB, BY_NAME["fastskel"], dataset)
    try:
        # across the end of an epoch of seven batches
        batches = [*own.batches(5), *own.batches(4)]
        found = np.concatenate([batch.index.numpy() for batch in batches])
        assert np.array_equal(found, np.concatenate([JOB.order(0), JOB.order(1)[:8]]))
        assert batches[0].views[0].clips.shape == (4, 8, 2, 25, 3)
        # nothing was made ahead
        assert own.loader._engine._stream.next() is None
    finally:
        own.close()


def test_worker_processes_live_on_and_rest_between_turns(dataset) -> None:
    reference = ReferenceSystem(JOB, BY_NAME["reference"], dataset)
    try:
        first = list(reference.batches(3))
        iterator = reference._loader._iterator
        assert iterator._tasks_outstanding == 0
        assert len(first) == 3 and [view.shape for view in first[0]] == [(4, 3, 8, 25, 2)] * 4
        assert len(list(reference.batches(2))) == 2
        assert reference._loader._iterator is iterator and iterator._workers[0].is_alive()
    finally:
        reference.close()
    assert not iterator._workers[0].is_alive()


@pytest.mark.parametrize("name", ["fastskel", "fastskel-graph"])
def test_own_steps_take_the_batch_that_they_are_given(dataset, name: str) -> None:
    own = OwnSystem(JOB, BY_NAME[name], dataset)
    place = own.train.batch.views[0].clips
    with own.loader as loader:
        batch = next(iter(loader))
    for number, view in enumerate(batch.views):
        view.mask[:, number] = False
    own.hold(batch)
    held = own.train.batch
    assert all(torch.equal(a.clips, b.clips) and torch.equal(a.mask, b.mask) for a, b in zip(held.views, batch.views))
    assert torch.equal(held.index, batch.index) and torch.equal(held.views[1].address.index, batch.index)
    # a graph reads where it was captured
    assert (held.views[0].clips is place) is own.kind.captured


@pytest.mark.parametrize("name", ["reference", "reference-graph"])
def test_reference_steps_take_the_batch_that_they_are_given(dataset, name: str) -> None:
    reference = ReferenceSystem(JOB, BY_NAME[name], dataset)
    place, views = reference.train.views[0], [torch.full((4, 3, 8, 25, 2), float(number)) for number in range(4)]
    reference.hold(views)
    assert all(torch.equal(a, b) for a, b in zip(reference.train.views, views))
    assert (reference.train.views[0] is place) is reference.kind.captured


def test_a_system_that_computes_something_else_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(job, dataset):
        systems, rows = parts.make_systems(job, dataset)
        with torch.no_grad():
            next(systems["fastskel"].train.encoder.parameters()).add_(0.5)
        return systems, rows

    monkeypatch.setattr(bench, "make_systems", spoilt)
    rows = {row["provider"]: row for row in bench.measure(JOB, tmp_path)}
    assert rows["reference"]["status"] == "ok"
    assert rows["fastskel"]["status"] == "failed" and "must be within" in rows["fastskel"]["error"]
    assert "median_ms" not in rows["fastskel"]


def test_command_adds_a_row_for_each_provider(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "EnergyMeter", lambda device: EnergyMeter(device, tmp_path / "no counters"))
    out = tmp_path / "rows.jsonl"
    command = ["--out", str(out), "--device", "cpu", "--quick", "--workers", "1", "--width", "16"]
    assert bench.main([*command, "--providers", "fastskel", "fastskel-triton"]) == 0
    rows = {row["provider"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert rows["fastskel-triton"]["status"] == "unavailable" and "GPU" in rows["fastskel-triton"]["reason"]
    for name in ("reference", "fastskel"):
        row = rows[name]
        assert row["part"] == "job" and row["case"] == "usdrl-dste D=16 N=8" and row["status"] == "ok" and row["quick"] is True
        assert row["clips"] == 40_091 and row["distinct_clips"] == 16 and row["epochs"] == 451
        assert row["samples_per_s"] == pytest.approx(8e3 / row["median_ms"])
        assert row["epoch_s"] == pytest.approx(40_091 / row["samples_per_s"]) and row["extrapolated"] is True
        assert 0 <= row["waited_share"] < 1 and row["from_steps"] == row["rounds"] >= 3
        assert row["joules_per_sample"] is None and row["energy_of"] == "not readable"
        assert row["gradient_distance_fp32"] < 1e-2 and row["precision"] == "bf16"
    assert rows["reference"]["speedup"] == 1.0
    printed = capsys.readouterr().out
    assert "extrapolated: epoch" in printed and "energy not readable" in printed and "UNAVAILABLE" in printed
