"""The harness on cases whose answer is known."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastskel.bench import harness
from torch import nn

ROWS, WIDTH = 6, 16
# a float32 tensor of this many elements
KILO = 256


def test_quantiles_are_interpolated():
    assert harness.quantiles([4.0, 0.0, 1.0, 3.0, 2.0]) == pytest.approx((0.8, 2.0, 3.2))
    assert harness.quantiles([7.0]) == (7.0, 7.0, 7.0)
    assert harness.quantiles([1.0, 2.0]) == pytest.approx((1.2, 1.5, 1.8))


class Machine:
    """A clock that only the work moves: each call takes the next of its provider's times, milliseconds; the last repeats."""

    def __init__(self, **times: Sequence[float]) -> None:
        self.now, self.order = 0.0, []
        self.calls = {name: self._call(name, list(values)) for name, values in times.items()}

    def _call(self, name: str, left: list[float]) -> Callable[[], None]:
        def call() -> None:
            self.order.append(name)
            self.now += 1e-3 * (left.pop(0) if len(left) > 1 else left[0])

        return call

    def compare(self, baseline: str, **options: Any) -> list[harness.Timing]:
        return harness.compare(self.calls, baseline, clock=lambda: self.now, **options)


def test_a_call_ends_when_the_device_is_done(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append(str(device)))
    assert harness.waiting(lambda: 3, torch.device("cpu"))() == 3
    assert done == []
    assert harness.waiting(lambda: len(done), torch.device("cuda"))() == 0
    assert done == ["cuda"]


def test_providers_take_turns():
    machine = Machine(a=[2.0], b=[2.0], c=[2.0])
    timings = machine.compare("b", rounds=4, warmup=2)
    assert machine.order == list("abc") * 6
    assert [(timing.provider, timing.rounds, timing.warmup) for timing in timings] == [(name, 4, 2) for name in "abc"]


def test_ratios_are_of_the_same_round():
    # machine slows down round by round: b takes half of a's time in each of them
    machine = Machine(a=[9.0, 10.0, 20.0, 40.0], b=[9.0, 5.0, 10.0, 20.0])
    a, b = machine.compare("a", rounds=3, warmup=1, limit_s=0.02)
    assert (b.median_ms, b.speedup, b.speedup_q20, b.speedup_q80) == pytest.approx((10.0, 2.0, 2.0, 2.0))
    assert (a.median_ms, a.speedup) == pytest.approx((20.0, 1.0))
    assert (b.q20_ms, b.q80_ms) == pytest.approx((7.0, 16.0))
    # every round of the baseline took twice the time of the one before: no spread, but a drift that says enough
    assert a.noise == b.noise == pytest.approx(0.0)
    assert b.uncertainty == pytest.approx(0.5) and b.noisy
    assert json.loads(json.dumps(b.row()))["speedup"] == pytest.approx(2.0)


def test_noise_is_the_spread_of_the_baseline():
    (timing,) = Machine(a=[1.0, 2.0, 1.0, 2.0]).compare("a", rounds=4, warmup=0, limit_s=0.0055)
    # ratios 0.5, 2, 0.5
    assert timing.rounds == 4
    assert timing.noise == pytest.approx((1.4 - 0.5) / 0.5)
    assert timing.noisy


def test_warm_up_goes_on_until_the_baseline_settles():
    # 100, 50, 20 and 10 are far apart, 10 and 10.4 are close; the other provider does not count
    machine = Machine(a=[100.0, 50.0, 20.0, 10.0, 10.4, 10.0], b=[5.0, 1.0, 5.0, 1.0, 5.0])
    a, b = machine.compare("a", rounds=6, warmup=2)
    assert a.warmup == 5 and a.rounds == 6
    assert a.median_ms == pytest.approx(10.0) and b.median_ms == pytest.approx(5.0)
    # a machine that never settles is timed all the same, and found noisy
    restless = Machine(a=[1.0, 2.0] * 40)
    (timing,) = restless.compare("a", rounds=6, warmup=2)
    assert timing.warmup == 2 + harness.MOST_WARMUP and timing.noisy
    # nor does a case that takes its time wait for it: a quarter of its limit is over after the first round
    (timing,) = Machine(a=[50.0, 10.0]).compare("a", rounds=6, warmup=1, limit_s=0.2)
    assert timing.warmup == 1
    (timing,) = Machine(a=[100.0, 10.0]).compare("a", rounds=6, warmup=0)
    assert timing.warmup == 0 and timing.q80_ms == pytest.approx(10.0)


def test_uncertainty_is_that_of_the_median():
    # ratios 1.0, 1.1, .. 2.4; three values at each end lie outside of the interval: 1.3 to 2.1 around 1.7
    ratios = [1.0 + 0.1 * number for number in range(15)]
    a, b = Machine(a=[10.0], b=[10.0 / ratio for ratio in ratios]).compare("a", rounds=15, warmup=0, limit_s=0.24)
    assert b.rounds == 15 and b.speedup == pytest.approx(1.7)
    assert b.uncertainty == pytest.approx(0.4 / 1.7) and b.noisy
    # the baseline held still
    assert a.uncertainty == harness.PROCESS_NOISE and not a.noisy
    # two rounds say nothing, however alike, so there are three
    assert {timing.rounds for timing in Machine(a=[1.0], b=[1.0]).compare("a", rounds=1)} == {3}


def test_the_interval_holds_the_median_as_often_as_it_says():
    assert harness.median_interval([3.0]) == (3.0, 3.0)
    assert harness.median_interval([5.0, 1.0, 2.0, 4.0, 3.0]) == (1.0, 5.0)
    # ranks by tables of the sign test: 6 values none, 9 the second, 15 the fourth, 60 the 22nd
    for count, rank in ((6, 1), (8, 1), (9, 2), (15, 4), (60, 22)):
        assert harness.median_interval([float(value) for value in range(1, count + 1)]) == (rank, count + 1 - rank)
    draw = np.random.default_rng(0)
    samples = draw.lognormal(0.0, 1.0, (2000, 15))
    intervals = [harness.median_interval(sample.tolist()) for sample in samples]
    held = np.mean([low <= 1.0 <= high for low, high in intervals])
    # 96.5 % by the binomial distribution; three standard errors are 1.2 %
    assert 0.952 <= held <= 0.978


def test_two_runs_agree_within_their_uncertainty():
    """Runs of one machine, whose times jitter by 10 % and are disturbed now and then, differ by more than both say rarely."""
    draw = np.random.default_rng(1)

    def run() -> harness.Timing:
        times = {name: mean * draw.normal(1.0, 0.1, 80).clip(0.5) for name, mean in (("a", 10.0), ("b", 6.0))}
        for values in times.values():
            values[draw.random(80) < 0.1] *= 3.0
        return Machine(**{name: values.tolist() for name, values in times.items()}).compare("a", rounds=15, warmup=2)[1]

    apart = 0
    for _ in range(200):
        first, second = run(), run()
        apart += abs(first.speedup / second.speedup - 1.0) > first.uncertainty + second.uncertainty
        assert first.speedup == pytest.approx(10 / 6, rel=3 * first.uncertainty)
    assert apart <= 4


def test_few_rounds_claim_no_difference_more_often_than_they_say():
    """Of two providers of one speed, the ratio is further from 1 than its uncertainty in one run of twenty."""
    draw, wrong, runs = np.random.default_rng(2), 0, 600
    for _ in range(runs):
        times = {name: draw.normal(10.0, 1.0, 3).tolist() for name in "ab"}
        b = Machine(**times).compare("a", rounds=3, warmup=0, limit_s=0.0)[1]
        assert b.rounds == 3
        wrong += abs(np.log(b.speedup)) > np.log1p(b.uncertainty)
    # three standard errors above 5 %
    assert wrong / runs <= 0.077


def test_more_rounds_are_taken_while_a_ratio_is_uncertain():
    wild = [8.0, 10.0, 12.0, 9.0, 11.0]
    quiet = Machine(a=[10.0], b=[5.0]).compare("a", rounds=5, warmup=0)
    assert {timing.rounds for timing in quiet} == {5}
    # restless for five rounds, then still: the interval is wide until quiet rounds are twice as many
    calming = Machine(a=[10.0], b=[*wild, *(50 * [10.0])])
    assert {timing.rounds for timing in calming.compare("a", rounds=5, warmup=0)} == {15}
    endless = Machine(a=[10.0], b=wild * 20)
    timings = endless.compare("a", rounds=5, warmup=0)
    assert {timing.rounds for timing in timings} == {5 * harness.MOST_ROUNDS}
    # the limit ends it before
    timings = Machine(a=[10.0], b=wild * 20).compare("a", rounds=5, warmup=0, limit_s=0.15)
    assert {timing.rounds for timing in timings} == {8} and timings[1].noisy


def test_times_are_milliseconds_and_end_at_the_limit():
    begin = time.perf_counter()
    (timing,) = harness.compare({"a": lambda: time.sleep(0.01)}, "a", rounds=10_000, warmup=1, limit_s=0.1)
    assert time.perf_counter() - begin < 5
    assert 3 <= timing.rounds <= 10
    assert timing.q20_ms >= 10
    (timing,) = harness.compare({"a": lambda: time.sleep(0.01)}, "a", rounds=10_000, warmup=1, limit_s=0.0)
    assert timing.rounds == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [(dict(baseline="b"), "compare: baseline must be one of ['a'], got 'b'"),
     (dict(baseline="a", rounds=0), "compare: rounds must be at least 1, got 0")],
    ids=["baseline", "rounds"],
)  # fmt: skip
def test_compare_refuses(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        harness.compare({"a": list}, **given)


def test_saved_bytes_of_a_linear():
    linear, x = nn.Linear(WIDTH, WIDTH), torch.randn(ROWS, WIDTH, requires_grad=True)
    everything = harness.saved_bytes(lambda: linear(x))
    assert everything == 4 * (ROWS * WIDTH + WIDTH * WIDTH)
    assert harness.saved_bytes(lambda: linear(x), exclude=[*linear.parameters(), x]) == 0
    # two functions save one activation: it is there once
    weight = linear.weight
    assert harness.saved_bytes(lambda: linear(x.relu()) + x.relu().T.sum(), [weight]) == 4 * 2 * ROWS * WIDTH
    assert harness.saved_bytes(lambda: [linear(h := x.relu()), linear(h)], [weight]) == 4 * ROWS * WIDTH
    with torch.no_grad():
        assert harness.saved_bytes(lambda: linear(x)) == 0


def test_peak_and_held_bytes():
    def call() -> torch.Tensor:
        first = torch.empty(KILO)
        second = torch.empty(2 * KILO)
        del first
        kept = torch.empty(KILO)
        del second
        return kept

    assert harness.peak_bytes(call) == 3 * 1024
    assert harness.held_bytes(call) == 1024
    earlier = torch.empty(8 * KILO)
    # what was there before does not count
    assert harness.peak_bytes(lambda: earlier.neg()) == 8 * 1024
    assert harness.peak_bytes(lambda: None) == 0


def test_a_training_step_holds_activations_until_its_backward():
    layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)))
    x = torch.randn(1024, WIDTH)
    layers(x).sum().backward()
    activation = 4 * x.numel()
    held = harness.held_bytes(lambda: layers(x))
    # the inputs of layers 2 to 4, and the output
    assert held == 4 * activation
    assert harness.saved_bytes(lambda: layers(x), [x, *layers.parameters()]) == 3 * activation
    peak = harness.peak_bytes(lambda: layers(x).sum().backward())
    assert 4 * activation <= peak <= 6 * activation


def test_flops_of_a_linear_forward_and_backward():
    linear, x = nn.Linear(WIDTH, 3 * WIDTH), torch.randn(ROWS, WIDTH, requires_grad=True)
    product = 2 * ROWS * WIDTH * 3 * WIDTH
    assert harness.flops(lambda: linear(x)) == product
    assert harness.flops(lambda: linear(x).sum().backward()) == 3 * product
    with torch.device("meta"):
        linear, x = nn.Linear(WIDTH, 3 * WIDTH), torch.empty(ROWS, WIDTH)
    assert harness.flops(lambda: linear(x)) == product


def test_flops_of_attention_on_a_cpu():
    heads, length, depth = 2, 8, 16
    tokens = torch.randn(ROWS, heads, length, depth, requires_grad=True)
    products = 2 * ROWS * heads * length * length * depth

    def call() -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)

    assert harness.flops(call) == 2 * products
    # backward computes the scores again
    assert harness.flops(lambda: call().sum().backward()) == (2 + 5) * products


def test_relative_l2():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0])
    assert harness.relative_l2([a, b], [a, b]) == 0.0
    assert harness.relative_l2([a, b + 3], [a, b]) == 1.0
    assert harness.relative_l2([b + 1], [b]) == 1.0
    assert harness.relative_l2([b], [b]) == 0.0
    # one that is not a number must never pass for small
    assert not harness.relative_l2([a * float("nan")], [a]) <= 1e-2


def test_rows_do_not_say_where_files_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = [str(tmp_path / "encoder.py"), "--out", str(tmp_path / "rows.jsonl"), "here/data", "--rounds", "3"]
    monkeypatch.setattr("sys.argv", words)
    assert harness.origin()["command"] == ["encoder.py", "--out", "rows.jsonl", "here/data", "--rounds", "3"]


def test_rows_are_appended_and_say_where_they_come_from(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    made = harness.origin()
    assert made.keys() == {"device", "threads", "load", "versions", "commit", "date", "command"}
    assert made["device"] and made["threads"] == torch.get_num_threads()
    harness.append_rows(path, [{"case": 1, **made}])
    harness.append_rows(path, [{"case": 2}, {"case": 3}])
    assert [json.loads(line)["case"] for line in path.read_text().splitlines()] == [1, 2, 3]
    # half-written rows never appear
    with pytest.raises(TypeError):
        harness.append_rows(path, [{"case": 4}, {"case": object()}])
    assert len(path.read_text().splitlines()) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]
