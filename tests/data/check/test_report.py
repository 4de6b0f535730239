"""The report as table, JSON and picture; damaged data, memory and bad arguments."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc

import numpy as np
import pytest

from fastskel.data import CheckThresholds, check_dataset, open_dataset, pack_arrays
from fastskel.data.check_picture import draw_check
from fastskel.data.findings import KINDS, SEVERITIES
from fastskel.data.synthetic import synthetic_motion

# as in conftest.py
NUM, CLIP = 24, 5


def check(dataset, **options):
    return check_dataset(dataset, **{"crop": 40, **options})


def frozen(frames):
    frames[10:18] = frames[10]


def test_bad_arguments(pack):
    dataset = pack()
    for crop in (0, -3, 2.5, True, "64"):
        with pytest.raises(ValueError, match="check_dataset: crop must be a whole number of at least 1, got"):
            check_dataset(dataset, crop=crop)
    with pytest.raises(ValueError, match="protocol or split_file must be given, got both"):
        check_dataset(dataset, protocol="xsub", split_file="x.json")
    wrong = [("frozen_frames", 1), ("frozen_frames", 5.0), ("bone_spread", -1), ("imbalance", np.nan), ("swap_gain", "1")]
    for name, value in wrong:
        with pytest.raises(ValueError, match=f"CheckThresholds: {name} must be a"):
            CheckThresholds(**{name: value})
    report = check(dataset)
    with pytest.raises(ValueError, match="severity must be one of note, warning, error, got 'bad'"):
        report.at_least("bad")
    with pytest.raises(ValueError, match="kind must be one of non-finite"):
        report.of("bad")


@pytest.mark.parametrize("seed", range(6))
def test_garbage_is_reported_and_breaks_nothing(pack, tmp_path, seed):
    draw = np.random.default_rng(seed)
    shapes = [(1, 2, 25, 3), (2, 2, 25, 3), (9, 2, 25, 3), (40, 2, 25, 3)] * 5
    clips = [np.ones(shape, np.float32) for shape in shapes]
    dataset = pack(clips, names=None, labels=None, class_names=(), columns={"subject": [seed] * 20})
    frames = np.load(dataset.path / "frames.npy", mmap_mode="r+")
    wild = np.float32([0, 0, 0, 1, -1, 1e-40, 1e-20, 1e17, 1e30, -3e38, np.inf, -np.inf, np.nan])
    frames[:] = wild[draw.integers(0, [3, 5, 7, 8, 10, 13][seed], frames.shape)]
    # some clips of one kind of value only
    for clip in range(8):
        frames[dataset.offsets[clip] : dataset.offsets[clip + 1]] = wild[clip + 5]
    frames.flush()
    report = check(open_dataset(dataset.path))
    assert {f.clip for f in report.of("non-finite")} >= {3, 4, 5, 6, 7}
    report.write_json(tmp_path / "report.json")
    draw_check(report, dataset, tmp_path / "report.png")
    assert report.table()


def test_json(pack, tmp_path):
    dataset = pack(edit=frozen, splits={"xsub": {"train": [0, 1], "test": [2, 3]}})
    report = check(dataset)
    report.write_json(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert sorted(content) == [
        "findings", "format_version", "kinds", "num_clips", "num_frames", "path", "protocols", "settings",
    ]  # fmt: skip
    assert content["settings"]["crop"] == 40
    assert content["settings"]["thresholds"] == dataclasses.asdict(CheckThresholds())
    assert content["protocols"] == {"xsub": {"train": 2, "test": 2}}
    assert len(content["findings"]) == len(report.findings)
    types = {"kind": str, "severity": str, "clip": int, "name": str, "frames": list, "value": float, "detail": str}
    for finding in content["findings"]:
        assert {key: type(value) for key, value in finding.items() if value is not None} == {
            key: kind for key, kind in types.items() if finding[key] is not None
        }
        assert finding["kind"] in KINDS and finding["severity"] in SEVERITIES
    (frozen_finding,) = (finding for finding in content["findings"] if finding["kind"] == "frozen-frames")
    assert frozen_finding["frames"] == [[10, 18]] and frozen_finding["clip"] == CLIP
    assert sum(row["findings"] for row in content["kinds"]) == len(report.findings)
    # the same data gives the same report, whatever the time it took
    again = check(dataset)
    assert again == report
    again.write_json(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "report.json").read_bytes()
    with pytest.raises(ValueError, match="write_json: path must be writable, got .*nowhere"):
        report.write_json(tmp_path / "nowhere" / "report.json")


@pytest.mark.parametrize("case", ["clean", "findings", "no labels", "segments only"])
def test_picture(pack, tmp_path, case):
    from PIL import Image

    options = {
        "clean": {},
        "findings": {"edit": frozen, "splits": {"$x": {"train": [0, 1], "test": [2, 3]}}},
        "no labels": {"labels": None, "edit": frozen},
        "segments only": {"labels": None, "segments": [(0, 1, 0, 10), (1, 2, 5, 5)]},
    }[case]
    dataset = pack(**options)
    report = check(dataset)
    draw_check(report, dataset, tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) > 400
    # a warning is drawn in its colour
    orange = (pixels.reshape(-1, 3) == [245, 158, 11]).all(axis=1).sum()
    assert (orange > 200) == any(finding.severity == "warning" for finding in report.findings)
    with pytest.raises(ValueError, match="draw_check: path must be writable, got .*nowhere"):
        draw_check(report, dataset, tmp_path / "nowhere" / "report.png")


def test_memory_stays_a_fraction_of_the_data(tmp_path):
    motion = synthetic_motion(300, seed=1, bodies=4)
    dataset = pack_arrays(motion.clips, topology="ntu-25", out=tmp_path / "set", labels=motion.labels)
    check(dataset)
    tracemalloc.start()
    report = check(dataset)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.at_least("warning") == []
    # 8 bytes of hash per frame and a few of the kind for sorting, against 1200 bytes of coordinates
    assert peak < 0.2 * dataset.frames.nbytes
