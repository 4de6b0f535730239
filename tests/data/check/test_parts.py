"""Labels, segments and the parts of protocols."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastskel.data import CheckThresholds, check_dataset
from fastskel.data.synthetic import synthetic_motion

# as in conftest.py
NUM = 24
MOTION = synthetic_motion(NUM, num_classes=4, num_subjects=6, seed=3)
NAMES = [f"clip{number:02}" for number in range(NUM)]


def everything(train, test):
    return {"mine": {"train": train, "test": test}}


def check(dataset, **options):
    return check_dataset(dataset, **{"crop": 40, **options})


def worse_than_notes(report):
    return sorted({finding.kind for finding in report.at_least("warning")})


def test_labels(pack):
    labels = MOTION.labels.copy()
    labels[[3, 7]] = -1
    report = check(pack(labels=labels, class_names=[*MOTION.class_names, "sleep"]))
    assert worse_than_notes(report) == ["empty-class", "unknown-label"]
    assert report.of("unknown-label")[0].detail == f"2 of {NUM} clips: {NAMES[3]}, {NAMES[7]}"
    assert report.of("empty-class")[0].detail == "class 4 (sleep) has no clip and no segment"
    report = check(pack(labels=None))
    assert [(f.kind, f.severity) for f in report.findings] == [("unknown-label", "note")]


def test_class_imbalance(pack):
    labels = np.zeros(NUM, int)
    labels[-2:] = 1
    report = check(pack(labels=labels, class_names=["a", "b"]))
    assert worse_than_notes(report) == ["class-imbalance"]
    assert report.of("class-imbalance")[0].value == 11
    assert report.of("class-imbalance")[0].detail == "class 0 (a) has 22 clips, class 1 (b) has 2"
    assert check(pack(labels=labels, class_names=["a", "b"]), thresholds=CheckThresholds(imbalance=12)).findings == ()


def test_segments(pack):
    rows = [(4, 1, 0, 10), (4, 2, 9, 20), (4, 3, 12, 15), (4, 0, 20, 30), (5, 1, 25, 12), (5, 1, 30, 30), (6, 0, 0, 9)]
    # the third begins after the second, but in the first
    rows += [(7, 1, 0, 30), (7, 2, 5, 8), (7, 3, 10, 12)]
    report = check(pack(segments=rows))
    assert worse_than_notes(report) == ["empty-segment", "overlapping-segments"]
    assert [(f.clip, f.value) for f in report.of("empty-segment")] == [(5, 13), (5, 0)]
    assert [(f.clip, f.frames) for f in report.of("overlapping-segments")] == [
        (4, ((12, 15),)), (7, ((5, 8),)), (7, ((10, 12),)), (4, ((9, 10),)),
    ]  # fmt: skip
    assert check(pack(segments=[(4, 1, 0, 10), (4, 2, 10, 20), (5, 1, 3, 9)])).findings == ()


def test_parts_that_overlap(pack):
    split = {"xsub": {"train": [*range(12)], "test": [0, *range(12, 24)]}, "other": {"train": [1, 2], "test": [0, 3]}}
    dataset = pack(splits=split, columns={"subject": np.arange(NUM) % 20})
    report = check(dataset)
    assert [(f.clip, f.detail) for f in report.of("shared-clip")] == [(0, "in train and test (xsub)")]
    (subjects,) = report.of("shared-subject")
    # clips 20 to 23 are of the subjects of clips 0 to 3
    assert (subjects.severity, subjects.value) == ("error", 9)
    assert subjects.detail == "4 subjects (0, 1, 2, 3) in train and test (xsub)"
    assert check(dataset, protocol="other").of("shared-clip") == []
    assert dict(report.protocols) == {"xsub": {"train": 12, "test": 13}, "other": {"train": 2, "test": 2}}


def test_subjects_in_both_parts_are_a_note_elsewhere(pack):
    report = check(pack(splits={"xview": {"train": [0, 1], "test": [2, 3]}}, columns={"subject": [1] * NUM}))
    assert [f.severity for f in report.of("shared-subject")] == ["note"]


def test_classes_without_training_clips(pack):
    train = np.flatnonzero(MOTION.labels != 1)[:8].tolist()
    test = np.flatnonzero(MOTION.labels == 1).tolist()
    labels = MOTION.labels.copy()
    # an unknown class is no class
    unknown = int(np.flatnonzero(labels == 0)[-1])
    labels[unknown] = -1
    report = check(pack(labels=labels, splits=everything(train, [*test, unknown]), columns={}))
    assert worse_than_notes(report) == ["unknown-label", "untrained-class"]
    (missing,) = report.of("untrained-class")
    assert missing.detail == f"class 1 ({MOTION.class_names[1]}): {len(test)} test clips (mine)"


def test_novel_classes_are_a_note(pack):
    parts = {"train": np.flatnonzero(MOTION.labels > 0).tolist(), "test": np.flatnonzero(MOTION.labels == 0).tolist()}
    report = check(pack(splits={"one-shot": parts, "mine": parts}))
    found = {finding.detail.split("(")[-1]: finding.severity for finding in report.of("untrained-class")}
    assert found == {"one-shot)": "note", "mine)": "warning"}


def test_protocols_that_do_not_fit(pack, tmp_path):
    dataset = pack(source="pku-mmd", columns={"camera": ["L", "M"] * (NUM // 2)})
    report = check(dataset)
    assert list(report.protocols) == ["xview"]
    assert [f.severity for f in report.of("unusable-protocol")] == ["note"]
    with pytest.raises(ValueError, match="Pass the list"):
        check(dataset, protocol="xsub")
    with pytest.raises(ValueError, match="split: protocol must be one of"):
        check(dataset, protocol="xset")
    file = tmp_path / "split.json"
    file.write_text(json.dumps({"train": [0, 1], "test": [2, NAMES[3]]}))
    assert dict(check(dataset, split_file=file).protocols) == {str(file): {"train": 2, "test": 2}}
