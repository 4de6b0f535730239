"""The harness on cases whose answer is known."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

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


def test_providers_take_turns():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = harness.compare(calls, "b", rounds=4, warmup=2)
    assert order == list("abc") * 6
    assert [(timing.provider, timing.rounds) for timing in timings] == [("a", 4), ("b", 4), ("c", 4)]


def test_ratios_are_of_the_same_round(monkeypatch):
    # machine slows down round by round: b takes half of a's time in each of them
    durations = iter([9.0, 9.0, 10.0, 5.0, 20.0, 10.0, 40.0, 20.0])
    monkeypatch.setattr(harness, "_milliseconds", lambda call, device: next(durations))
    a, b = harness.compare({"a": list, "b": list}, "a", rounds=3, warmup=1)
    assert (b.median_ms, b.speedup, b.speedup_q20, b.speedup_q80) == (10.0, 2.0, 2.0, 2.0)
    assert (a.median_ms, a.speedup) == (20.0, 1.0)
    assert (b.q20_ms, b.q80_ms) == pytest.approx((7.0, 16.0))
    # every round of the baseline took twice the time of the one before
    assert a.noise == b.noise == 0.0
    assert json.loads(json.dumps(b.row()))["speedup"] == 2.0


def test_noise_is_the_spread_of_the_baseline(monkeypatch):
    durations = iter([1.0, 2.0, 1.0, 2.0])
    monkeypatch.setattr(harness, "_milliseconds", lambda call, device: next(durations))
    (timing,) = harness.compare({"a": list}, "a", rounds=4, warmup=0)
    # ratios 0.5, 2, 0.5
    assert timing.noise == pytest.approx((1.4 - 0.5) / 0.5)


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
