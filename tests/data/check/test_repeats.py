"""Clips that repeat others, whole or in part, inside a part and across parts."""

from __future__ import annotations

import numpy as np
import pytest

from fastskel.data import check_dataset
from fastskel.data.synthetic import synthetic_motion

# as in conftest.py
NUM = 24
MOTION = synthetic_motion(NUM, num_classes=4, num_subjects=6, seed=3)
NAMES = [f"clip{number:02}" for number in range(NUM)]


def check(dataset, **options):
    return check_dataset(dataset, **{"crop": 40, **options})


def worse_than_notes(report):
    return sorted({finding.kind for finding in report.at_least("warning")})


def with_copy(source, target, change=lambda clip: clip):
    clips = list(MOTION.clips)
    clips[target] = np.ascontiguousarray(change(clips[source]))
    return clips


def everything(train, test):
    return {"mine": {"train": train, "test": test}}


def test_equal_clips_inside_a_part_and_across(pack):
    # 2 and 6 are of one class
    clips, labels = with_copy(2, 6), MOTION.labels
    assert labels[2] == labels[6]
    columns = {"subject": np.arange(NUM)}
    report = check(pack(clips, columns=columns))
    assert [(f.clip, f.frames) for f in report.of("duplicate-clip")] == [(6, ((0, len(clips[2])),))]
    assert worse_than_notes(report) == ["duplicate-clip"]
    rest = [number for number in range(NUM) if number not in (2, 6)]
    for train, test in (([2, *rest[:10]], [6, *rest[10:]]), ([6, *rest[:10]], [2, *rest[10:]])):
        report = check(pack(clips, splits=everything(train, test), columns=columns))
        assert [f.clip for f in report.of("leaked-clip")] == [test[0]]
        assert report.of("leaked-clip")[0].detail == f"repeats training clip {NAMES[train[0]]} (mine)"
        assert worse_than_notes(report) == ["leaked-clip"]
    report = check(pack(clips, splits=everything([2, 6, *rest[:10]], rest[10:]), columns=columns))
    assert worse_than_notes(report) == ["duplicate-clip"]


def test_equal_clips_with_other_labels(pack):
    report = check(pack(with_copy(2, 5), columns={}))
    assert worse_than_notes(report) == ["conflicting-label", "duplicate-clip"]
    assert [f.clip for f in report.of("conflicting-label")] == [5]


def test_one_changed_number_makes_another_clip(pack):
    def change(clip):
        clip = clip.copy()
        clip[0, 0, 0, 0] = np.nextafter(clip[0, 0, 0, 0], np.float32(9))
        return clip

    report = check(pack(with_copy(2, 6, change), columns={}))
    assert worse_than_notes(report) == ["near-duplicate"]


@pytest.mark.parametrize(
    "change, start, end, offset",
    [
        (lambda clip: clip + np.float32([0.7, -0.2, 1.1]), 0, 40, 0),
        (lambda clip: clip[6:30], 0, 24, 6),
        (lambda clip: np.concatenate([MOTION.clips[9][:15], clip[10:25] - np.float32([0, 0, 0.3])]), 15, 30, -5),
    ],
    ids=["moved", "cut", "inserted"],
)
def test_clips_that_share_frames(pack, change, start, end, offset):
    clips = with_copy(2, 6, change)
    end = min(end, len(clips[6]))
    end = len(clips[6]) if start == 0 and offset == 0 else end
    rest = [number for number in range(NUM) if number not in (2, 6)]
    # the clip with the inserted frames begins with those of clip 9
    rest.remove(9)
    columns = {"subject": np.arange(NUM)}
    report = check(pack(clips, columns=columns, splits=everything([2, *rest[:10]], [6, *rest[10:]])))
    leaked = [f for f in report.of("leaked-frames") if NAMES[2] in f.detail]
    assert [f.clip for f in leaked] == [6]
    # a frame whose rounding fell the other way may be missing at an end
    (found,) = leaked[0].frames
    assert abs(found[0] - start) <= 2 and abs(found[1] - end) <= 2
    assert leaked[0].value >= 0.8 * (end - start)
    report = check(pack(clips, columns=columns))
    (near,) = (f for f in report.of("near-duplicate") if NAMES[2] in f.detail)
    assert near.clip == 6
    assert f"of {NAMES[2]} from frame {near.frames[0][0] + offset} on" in near.detail


def test_a_training_copy_of_a_longer_test_clip_leaks(pack):
    clips = with_copy(2, 6, lambda clip: clip[6:30])
    rest = [number for number in range(NUM) if number not in (2, 6)]
    report = check(pack(clips, columns={}, splits=everything([6, *rest[:10]], [2, *rest[10:]])))
    (finding,) = report.of("leaked-frames")
    assert finding.clip == 2
    assert abs(finding.frames[0][0] - 6) <= 2 and abs(finding.frames[0][1] - 30) <= 2


def test_a_clip_shorter_than_a_shared_stretch(pack):
    report = check(pack(with_copy(2, 6, lambda clip: clip[6:11] + 1), columns={}))
    assert [(f.clip, f.value) for f in report.of("near-duplicate")] == [(6, 5)]
    # as many frames of a longer clip are too few
    report = check(pack(with_copy(2, 6, lambda clip: np.concatenate([clip[6:11], clip[:40] * 1.1])), columns={}))
    assert report.of("near-duplicate") == []


def test_frames_shared_at_two_offsets_count_at_the_better_one(pack):
    report = check(pack(with_copy(2, 6, lambda clip: np.concatenate([clip[20:30], clip[:20]])), columns={}))
    (finding,) = report.of("near-duplicate")
    assert (finding.value, finding.frames) == (20, ((10, 30),))


def test_many_copies(pack):
    # more than a pose is compared with: equal clips, and clips that share most frames
    base = MOTION.clips[2]
    equal = [base] * 40
    shifted = [base[number % 20 : number % 20 + 20] + np.float32(number / 8) for number in range(40)]
    clips = [*equal, *shifted]
    names = [f"copy{number}" for number in range(80)]
    report = check(pack(clips, names=names, labels=None, class_names=(), columns={}))
    assert [f.clip for f in report.of("duplicate-clip")] == list(range(1, 40))
    assert {f.clip for f in report.of("near-duplicate")} == set(range(40, 80))


def test_other_motions_of_one_subject_share_nothing(pack):
    still = [MOTION.clips[0][:12] * np.float32(1 + 0.01 * number) for number in range(6)]
    report = check(pack(still, names=NAMES[:6]))
    assert report.of("near-duplicate") == report.of("duplicate-clip") == []


def test_a_clip_in_both_parts_trains(pack):
    report = check(pack(with_copy(2, 6), splits={"mine": {"train": [2, 3], "test": [2, 6]}}, columns={}))
    assert [f.clip for f in report.of("leaked-clip")] == [6]
