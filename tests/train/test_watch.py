"""What a run measures of itself: ranks against their definition, times against a clock that the test moves."""

from __future__ import annotations

import math
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastskel.train import watch as module
from fastskel.train.heartbeat import Heartbeat
from fastskel.train.runlog import TIMINGS
from fastskel.train.utilisation import Utilisation
from fastskel.train.watch import Watch, effective_rank, embedding_rank

CPU = torch.device("cpu")


def seeded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def by_definition(rows: torch.Tensor) -> float:
    values = torch.linalg.svdvals(rows.double())
    shares = values / values.sum()
    return math.exp(-sum(p * math.log(p) for p in shares.tolist() if p > 0))


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16), (2, 300), (1, 5)], ids=str)
def test_rank_is_that_of_its_definition(shape) -> None:
    rows = seeded(*shape)
    # roots of eigenvalues keep half the digits of the smallest singular value
    assert effective_rank(rows) == pytest.approx(by_definition(rows), rel=1e-6)
    # neither scale nor rotation counts
    turned = rows.double() @ torch.linalg.qr(seeded(shape[1], shape[1]).double())[0] * 1e-3
    assert effective_rank(turned) == pytest.approx(effective_rank(rows), rel=1e-6)


def test_rank_counts_directions() -> None:
    assert effective_rank(torch.eye(7).repeat(3, 1)) == pytest.approx(7)
    assert effective_rank(torch.ones(9, 4)) == pytest.approx(1, abs=1e-6)
    assert effective_rank(seeded(64, 3) @ seeded(3, 32)) < 3.001
    assert effective_rank(torch.zeros(5, 4)) == 0
    assert math.isnan(effective_rank(torch.tensor([[1.0, math.inf], [0.0, 1.0]])))


def test_rank_is_of_the_last_stack_and_its_first_view() -> None:
    stacks = {"first": torch.ones(2, 6, 8), "last": torch.stack([torch.eye(6, 8), torch.ones(6, 8)])}
    assert embedding_rank(stacks) == pytest.approx(6)


def test_rank_takes_some_rows_of_many(monkeypatch) -> None:
    monkeypatch.setattr(module, "RANK_ROWS", 4)
    assert embedding_rank({"z": torch.eye(6)[None]}) == pytest.approx(4)


class Clock:
    """Stands for the time module; every sleep of the test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def watched(monkeypatch, *, gathered: list[tuple[int, int, int]] | None = None) -> tuple[Watch, nn.Module, Clock, list]:
    clock, sent = Clock(), []
    monkeypatch.setattr(module, "time", clock)

    def exchange(values, device, group):
        sent.append(tuple(values))
        return [*(gathered or []), tuple(values)]

    monkeypatch.setattr(module, "exchange", exchange)
    encoder = nn.Identity()
    found = Watch(encoder, CPU, Heartbeat(), None)
    if gathered:
        monkeypatch.setattr(found, "_world", len(gathered) + 1)
    return found, encoder, clock, sent


def step(watch: Watch, encoder: nn.Module, clock: Clock, number: int, *, wait: float, embed: float, rest: float) -> None:
    """One step of two parts that takes 2 (wait + embed) + rest seconds."""

    def parts():
        for _ in range(2):
            clock.now += wait
            yield SimpleNamespace()

    watch.begin(number, logged=True)
    for _ in watch.waits(parts()):
        clock.now += embed
        encoder(torch.zeros(1))
    clock.now += rest


def test_times_are_those_since_the_last_record(monkeypatch) -> None:
    watch, encoder, clock, sent = watched(monkeypatch)
    # a run that was resumed in step 7
    step(watch, encoder, clock, 7, wait=1.0, embed=0.5, rest=1.0)
    found = watch.figures(7, 8)
    assert (found["samples_per_s"], found["data_stall"]) == (2.0, 0.5)
    # from the begin to the end of the first embedding
    assert sent[-1][0] == 1_500_000
    assert "slowest_rank" not in found
    # faster now: at once, and of both steps since
    for number in (8, 9):
        step(watch, encoder, clock, number, wait=0.0, embed=0.25, rest=0.5)
    found = watch.figures(9, 8)
    assert (found["samples_per_s"], found["data_stall"]) == (8.0, 0.0)


def test_the_slowest_process_speaks_for_all(monkeypatch) -> None:
    watch, encoder, clock, _ = watched(monkeypatch, gathered=[(100_000, 900_000, 1 << 20), (400_000, 0, 3 << 20)])
    monkeypatch.setattr(module, "_resident_kib", lambda: 2 << 20)
    step(watch, encoder, clock, 0, wait=0.1, embed=0.1, rest=1.6)
    found = watch.figures(0, 8)
    assert found["slowest_rank"] == 1 and found["rank_seconds"] == pytest.approx([0.1, 0.2, 0.4])
    assert (found["data_stall"], found["memory_gib"]) == (0.9, 3.0)


@pytest.mark.parametrize(
    ("others", "warned"), [([(100_000, 0, 1), (310_000, 0, 1)], True), ([(100_000, 0, 1), (290_000, 0, 1)], False)]
)
def test_a_process_that_stays_slow_is_named_once(monkeypatch, others, warned) -> None:
    watch, encoder, clock, _ = watched(monkeypatch, gathered=others)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(3 * module.SLOW_RECORDS):
            before = len(caught)
            step(watch, encoder, clock, number, wait=0.1, embed=0.1, rest=0.1)
            watch.figures(number, 8)
            # the first step does not count
            assert len(caught) == before or number == module.SLOW_RECORDS
    assert [str(w.message).startswith("pretrain: all processes should be as fast, got 0.310 s of rank 1") for w in caught] == (
        [True] * warned
    )


def test_a_first_step_that_compiles_is_not_slow(monkeypatch) -> None:
    # a minute of rank 1, once: a mean of 6 s over ten records
    others = [(60_000_000, 0, 1)]
    watch, encoder, clock, _ = watched(monkeypatch, gathered=others)
    for number in range(2 * module.SLOW_RECORDS):
        step(watch, encoder, clock, number, wait=0.1, embed=0.1, rest=0.1)
        found = watch.figures(number, 8)
        assert number or found["rank_seconds"][-1] == 60
        others[:] = [(200_000, 0, 1)]
        monkeypatch.setattr(module, "exchange", lambda values, device, group: [*others, tuple(values)])


def test_evaluating_and_writing_are_no_part_of_a_step(monkeypatch) -> None:
    watch, encoder, clock, _ = watched(monkeypatch)
    step(watch, encoder, clock, 0, wait=0.5, embed=0.5, rest=0.0)

    def evaluate() -> str:
        clock.now += 98.0
        encoder(torch.zeros(1))
        return "read"

    assert watch.on_first("evaluates", evaluate) == "read"
    found = watch.figures(0, 8)
    assert (found["samples_per_s"], found["data_stall"]) == (4.0, 0.5)
    # and what follows counts in full
    step(watch, encoder, clock, 1, wait=0.0, embed=1.0, rest=2.0)
    assert watch.figures(1, 8)["samples_per_s"] == 2.0


def test_who_embeds_without_calling_the_encoder_is_timed_to_the_end_of_the_step(monkeypatch) -> None:
    watch, encoder, clock, sent = watched(monkeypatch)
    for number in (0, 1):
        watch.begin(number, logged=True)
        clock.now += 2.0
        watch.figures(number, 8)
    assert [own for own, *_ in sent] == [2_000_000, 2_000_000]
    # in an evaluation it is no place of the step that all processes pass
    marks = watch.heart._marks
    watch.on_first("evaluates", lambda: encoder(torch.zeros(1)))
    assert watch.heart._marks == marks + 2


def test_utilisation_is_the_share_of_the_peak(monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "exchange", lambda values, device, group: [tuple(values)])
    encoder = nn.Identity()
    # 12.5 MFLOP a sample, of 1 GFLOP/s
    watch = Watch(encoder, CPU, Heartbeat(), None, Utilisation(12_500_000, 1_000_000_000))
    step(watch, encoder, clock, 0, wait=0.1, embed=0.2, rest=0.4)
    found = watch.figures(0, 16)
    assert (found["samples_per_s"], found["model_tflop_per_s"], found["mfu"]) == (16.0, 0.0002, 0.2)
    assert found.keys() <= TIMINGS
    watch.close()
    without = Watch(encoder, CPU, Heartbeat(), None)
    step(without, encoder, clock, 0, wait=0.1, embed=0.2, rest=0.4)
    assert "mfu" not in without.figures(0, 16)
    without.close()


def test_differences_of_small_steps_are_noise(monkeypatch) -> None:
    watch, encoder, clock, _ = watched(monkeypatch, gathered=[(1_000, 0, 1), (40_000, 0, 1)])
    for number in range(20):
        step(watch, encoder, clock, number, wait=0.0, embed=0.001, rest=0.001)
        watch.figures(number, 8)


def test_embeddings_on_a_line_are_warned_of_once(monkeypatch) -> None:
    watch, *_ = watched(monkeypatch)
    line = {"z": seeded(1, 16, 1) * seeded(8)}
    with pytest.warns(UserWarning, match=r"effective rank should be far above 2, got 1\.\d\d at step 5") as caught:
        found = [watch.rank_of(line, step)["embedding_rank"] for step in (5, 6)]
    assert len(caught) == 1 and max(found) < 1.01
    assert watch.rank_of({"z": seeded(1, 16, 8)}, 7)["embedding_rank"] > 5


def test_the_encoder_is_left_as_it_was(monkeypatch) -> None:
    watch, encoder, *_ = watched(monkeypatch)
    assert len(encoder._forward_hooks) == 1
    watch.close()
    assert len(encoder._forward_hooks) == 0


def test_memory_is_that_of_this_process() -> None:
    before = module._resident_kib()
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert 32 << 10 < module._resident_kib() - before < 256 << 10 or before > 2 << 20
    del held


def test_watching_costs_next_to_nothing() -> None:
    watch = Watch(nn.Identity(), CPU, Heartbeat(), None)
    began = time.perf_counter()
    for number in range(1000):
        watch.begin(number, logged=True)
        for _ in watch.waits(iter([SimpleNamespace()])):
            watch._passed(nn.Identity(), None, None)
        watch.figures(number, 8)
    # some 20 microseconds a step; a published step takes tenths of a second
    assert (time.perf_counter() - began) / 1000 < 1e-3
    watch.close()
