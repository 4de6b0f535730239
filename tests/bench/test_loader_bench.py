"""The loader's benchmark: that it runs on few clips, and that the feeder it compares with draws what the definition draws."""

from __future__ import annotations

import functools
import itertools
import json
import random

import numpy as np
import pytest
from fastskel.bench import loader as bench
from fastskel.bench.reference.feeder import Feeder

from fastskel.data import usdrl_views
from fastskel.data.resize import crop_resize
from fastskel.data.views import crop_bounds

# of two samples of n: exceeded once in a thousand times
KS = 1.95


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return bench.make_data(tmp_path_factory.mktemp("feeder"), 9)


@pytest.mark.parametrize("part", bench.PARTS)
def test_every_part_runs_on_few_clips(tmp_path, monkeypatch, part):
    monkeypatch.setattr(bench, "STEP_S", 0.001)
    monkeypatch.setattr(bench, "MIB", 1 << 12)
    if part == "speed":
        # every call takes as long as any other
        clock = itertools.count().__next__
        monkeypatch.setattr(bench, "compare", functools.partial(bench.compare, clock=clock))
    out = tmp_path / "rows.jsonl"
    assert bench.main(["--out", str(out), "--parts", part, "--rounds", "1", "--clips", "10"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["part"] for row in rows} == {f"loader-{part}"}
    cases = {row["provider" if part == "speed" else "case"] for row in rows}
    expected = {
        "speed": {"feeder", "numpy", "native-float32", "native-bfloat16"}, "scaling": {"copy-1", "float32-1", "bfloat16-1"},
        "consumer": {"10 per 1 ms"}, "memory": {"native", "dataloader"},
    }  # fmt: skip
    assert expected[part] <= cases
    numbers = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert np.isfinite(numbers).all()
    if part == "speed":
        assert min(row["samples_per_s"] for row in rows) > 0
        # a ratio of times of as many samples, whatever a call makes: 178, or 80 here
        feeder = next(row for row in rows if row["provider"] == "feeder")
        for row in rows:
            assert row["speedup"] == pytest.approx(row["samples_per_s"] / feeder["samples_per_s"])
            assert row["median_ms"] == pytest.approx(1e3 * 178 / row["samples_per_s"])


def test_batches_that_are_timed_are_made_in_that_time(dataset, monkeypatch):
    loader = bench.loader_of(dataset, num_threads=2, batch_size=2)
    draw = bench._drawing(loader, 3)
    for call in range(1, 4):
        draw()
        # nothing is made ahead for the next call, which goes on behind this one
        assert loader._engine._stream.next() is None
        assert loader.state_dict()["position"] == 3 * call % 4


def feed(dataset, seed):
    random.seed(seed)
    return Feeder(*bench.buffer_of(dataset))


def test_the_feeder_s_frames_are_those_of_the_definition(dataset):
    feeder = feed(dataset, 0)
    for item in range(len(dataset)):
        clip = dataset.clip(item)[:64]
        # clips of 64 frames are taken whole
        found = feeder._crop(feeder.buffer[item], len(clip))
        assert np.abs(found.transpose(1, 3, 2, 0) - crop_resize(clip, 0, len(clip), 64)).max() < 1e-5


def test_the_feeder_s_crops_are_drawn_as_the_definition_s(dataset):
    feeder, count, num = feed(dataset, 0), 300, 4000
    # the clip shows the frame's number: its first and last rows say where the crop begins and how long it is
    clip = np.broadcast_to(np.arange(count, dtype=np.float32)[None, :, None, None], (1, count, 1, 1)).copy()
    ends = np.array([feeder._crop(clip, count)[0, [16, 47], 0, 0] for _ in range(num)])
    lengths = (ends[:, 1] - ends[:, 0]) * 64 / 31
    starts = ends[:, 0] + 0.5 - 16.5 * lengths / 64
    options = {"seed": 1, "index": np.arange(num), "epoch": 0, "view": 0}
    for drawn, defined in zip((starts, lengths), crop_bounds(usdrl_views()[0].crop, np.full(num, count), **options), strict=True):
        every = np.arange(-1, count + 1) + 0.5
        steps = [np.searchsorted(np.sort(values), every) / num for values in (drawn, defined)]
        assert np.abs(steps[0] - steps[1]).max() < KS * np.sqrt(2 / num)


def test_the_feeder_s_changes_are_drawn_as_the_definition_s(dataset):
    feeder, num = feed(dataset, 0), 2000
    clip = np.random.default_rng(2).standard_normal((3, 4, 25, 2)).astype(np.float32)
    counts, mixed, sheared, joints = {"zero": 0, "mix": 0, "shear": 0}, [], [], np.zeros(25)
    for _ in range(num):
        out = feeder._augment(clip)
        changed = (out != clip).any((0, 1, 3))
        rows, target = (values[:, :, changed].reshape(3, -1).T for values in (clip, out))
        matrix = np.linalg.lstsq(rows, target, rcond=None)[0]
        assert np.abs(rows @ matrix - target).max() < 1e-4
        kind = "zero" if not target.any() else "shear" if changed.all() else "mix"
        counts[kind] += 1
        if kind == "shear":
            assert np.abs(np.diag(matrix) - 1).max() < 1e-4
            sheared.append(matrix[~np.eye(3, dtype=bool)])
        else:
            assert changed.sum() == 15
            joints += changed
            if kind == "mix":
                mixed.append(matrix.ravel())
    expected = {"zero": num / 4, "mix": num / 4, "shear": num / 2}
    # 2 degrees of freedom: 13.8 is exceeded once in a thousand times
    assert sum((counts[kind] - expected[kind]) ** 2 / expected[kind] for kind in counts) < 13.8
    share = joints / (counts["zero"] + counts["mix"])
    assert np.abs(share - 0.6).max() < 4 * np.sqrt(0.24 / (num / 2))
    for entries in (np.concatenate(mixed), np.concatenate(sheared)):
        # U(-1, 1): its distribution function beside that of what was drawn
        ordered = np.sort(entries)
        assert np.abs((ordered + 1) / 2 - np.linspace(0, 1, len(ordered))).max() < KS / np.sqrt(len(ordered)) + 1e-3
