"""What the check finds in single clips: every defect put into clean data, in the right frames, and nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fastskel.data import CheckThresholds, check_dataset
from fastskel.data.clip_checks import ClipChecker
from fastskel.data.findings import KINDS, frame_ranges
from fastskel.data.synthetic import synthetic_motion
from fastskel.skeleton import topology

# as in conftest.py
NUM, CLIP = 24, 5
MOTION = synthetic_motion(NUM, num_classes=4, num_subjects=6, seed=3)
NAMES = [f"clip{number:02}" for number in range(NUM)]


def two_bodies(clip, other):
    """A second person two metres beside the first, (T, 2, V, 3)."""
    # forth and back: the motion goes on without a jump
    frames = np.arange(len(clip)) % (2 * len(other) - 2)
    second = other[np.minimum(frames, 2 * len(other) - 2 - frames)] + np.float32([2, 0, 0])
    # no stretch of the second body is there twice
    second = second * (1 + 1e-4 * np.arange(len(clip), dtype=np.float32))[:, None, None, None]
    return np.concatenate([clip, second], axis=1)


PAIRS = [two_bodies(clip, MOTION.clips[(number + 3) % NUM]) for number, clip in enumerate(MOTION.clips)]


def check(dataset, **options):
    return check_dataset(dataset, **{"crop": 40, **options})


def worse_than_notes(report):
    return sorted({finding.kind for finding in report.at_least("warning")})


@pytest.mark.parametrize("normalisation", ["none", "center", "center-first", "align", "align-yaw"])
@pytest.mark.parametrize("bodies", [1, 2])
def test_clean_data_has_no_findings(pack, bodies, normalisation):
    report = check(pack(MOTION.clips if bodies == 1 else PAIRS, normalisation=normalisation))
    assert report.findings == ()
    assert report.table().endswith("nothing found")


def test_lost_joints_and_absent_bodies_are_no_findings(pack):
    lost = synthetic_motion(NUM, num_classes=4, num_subjects=6, seed=3, bodies=2, max_lost=8)
    assert check(pack(lost.clips)).findings == ()


def nan_and_infinity(frames):
    frames[7, 0, 3, 1] = np.nan
    frames[9:11, 0, 0] = np.inf


def zeros(frames):
    frames[3:6] = 0


def nothing(frames):
    frames[:] = 0


def frozen(frames):
    frames[10:18] = frames[10]


def just_frozen(frames):
    frames[10:15] = frames[10]


def nearly_frozen(frames):
    # one less than the threshold: repeated, not frozen
    frames[10:14] = frames[10]


def repeated(frames):
    frames[[7, 9]] = frames[5]


def mirrored(frames):
    frames[12:20] = frames[12:20][:, :, list(topology("ntu-25").mirror)]


def thrown(frames):
    frames[15, 0, 7] += 3
    # no more than a fast hand may move
    frames[30, 0, 11] += 0.3


def nudged(frames):
    # far for this clip, but no more than a fast hand may move
    frames[15, 0, 7] += 0.3


def growing(frames):
    pelvis = frames[:, :, :1].copy()
    frames[:] = pelvis + (frames - pelvis) * np.linspace(0.6, 1.7, len(frames), dtype=np.float32)[:, None, None, None]


def flipped(frames):
    frames[..., 1] = -frames[..., 1]


def millimetres(frames):
    frames *= 1000


def grown_up(frames):
    frames *= 1.6


@pytest.mark.parametrize(
    "edit, kind, frames, value",
    [
        (nan_and_infinity, "non-finite", ((7, 8), (9, 11)), 3),
        (zeros, "zero-frames", ((3, 6),), 3),
        (frozen, "frozen-frames", ((10, 18),), 8),
        (just_frozen, "frozen-frames", ((10, 15),), 5),
        (nearly_frozen, "repeated-frames", ((11, 14),), 3),
        (repeated, "repeated-frames", ((7, 8), (9, 10)), 2),
        (mirrored, "left-right-swap", ((12, 13), (20, 21)), 2),
        (thrown, "teleport", ((15, 17),), None),
        (growing, "bone-spread", (), None),
        (flipped, "upside-down", (), None),
        (grown_up, "subject-size", (), 1.6),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_defect_in_one_clip(pack, edit, kind, frames, value):
    report = check(pack(edit=edit))
    assert worse_than_notes(report) == [kind]
    (finding,) = report.of(kind)
    assert (finding.clip, finding.name, finding.frames) == (CLIP, NAMES[CLIP], frames)
    assert finding.severity == KINDS[kind].severity
    if value is not None:
        # bones are noisy: their median is right to a few per cent
        assert finding.value == pytest.approx(value, rel=0.05 if kind == "subject-size" else 0)
    assert kind in report.table() and NAMES[CLIP] in report.table()


def test_fast_is_not_a_teleport(pack):
    assert check(pack(edit=nudged)).findings == ()


def test_what_an_exchange_explains_is_no_teleport(pack):
    limits = CheckThresholds(teleport_speed=0.2)
    # mirroring moves hands farther than this; where the hands are close nothing jumps
    dataset = pack([clip * np.float32([2, 1, 1]) for clip in MOTION.clips], edit=mirrored)
    swapped = check(dataset, thresholds=limits)
    assert [f.frames for f in swapped.of("left-right-swap")] == [((12, 13), (20, 21))]
    assert [f for f in swapped.of("teleport") if f.clip == CLIP] == []
    unexplained = check(dataset, thresholds=dataclasses.replace(limits, swap_gain=0))
    assert (12, 13) in next(f for f in unexplained.of("teleport") if f.clip == CLIP).frames


def test_a_body_seen_in_turns_by_halves_is_no_exchange(pack):
    def halve(frames):
        frames[::2, 0, 13:] = 0
        frames[1::2, 0, :12] = 0

    assert check(pack(PAIRS, edit=halve)).of("swapped-bodies") == []


def test_what_is_measured_of_a_clip(pack):
    dataset = pack(normalisation="center", edit=zeros)
    measures = ClipChecker(dataset, CheckThresholds()).check(dataset.clip(CLIP), 1)
    # bones at the centre joint, which lies at the origin, are known too
    assert np.isfinite(measures.bones).all() and np.isfinite(measures.upward).all()
    assert 1 < measures.size < 2.5
    assert np.flatnonzero(measures.hashes == 0).tolist() == [3, 4, 5]
    assert len(np.unique(measures.hashes)) == len(dataset.clip(CLIP)) - 2


def test_an_empty_clip(pack):
    report = check(pack(edit=nothing))
    assert worse_than_notes(report) == ["body-count", "empty-clip"]
    assert [(f.clip, f.frames) for f in report.of("empty-clip")] == [(CLIP, ((0, len(MOTION.clips[CLIP])),))]


def test_other_units_than_declared(pack):
    report = check(pack(edit=millimetres))
    assert worse_than_notes(report) == ["subject-size", "unit-scale"]
    assert [f.clip for f in report.of("unit-scale")] == [f.clip for f in report.of("subject-size")] == [CLIP]
    assert "metres: millimetres?" in report.of("unit-scale")[0].detail


@pytest.mark.parametrize(
    "factor, units, words",
    [
        (100, "metres", "centimetres?"),
        (1, "Millimetres", ": metres?"),
        (1000, "mm", None),
        (100, "cm", None),
        (0.2, "pixels", "are these parts of the picture?"),
        (200, "pixels", None),
        (7, "floors", None),
    ],
)
def test_units(pack, factor, units, words):
    clips = [clip * np.float32(factor) for clip in MOTION.clips]
    found = check(pack(clips, units=units, channels=["x", "y", "z"])).of("unit-scale")
    assert len(found) == (0 if words is None else NUM)
    assert all(words in finding.detail for finding in found)


def test_a_unit_nobody_knows_is_compared_with_the_other_clips(pack):
    report = check(pack(edit=millimetres, units="floors"))
    assert [f.clip for f in report.of("unit-scale")] == [CLIP]
    assert "in other clips" in report.of("unit-scale")[0].detail


def test_two_bodies_that_exchange_slots(pack):
    def exchange(frames):
        frames[15:25] = frames[15:25, ::-1].copy()

    report = check(pack(PAIRS, edit=exchange))
    assert worse_than_notes(report) == ["swapped-bodies"]
    (finding,) = report.of("swapped-bodies")
    assert (finding.clip, finding.frames, finding.value) == (CLIP, ((15, 16), (25, 26)), 2)


def test_one_body_that_goes_on_in_the_other_slot(pack):
    def move(frames):
        frames[:, 1] = 0
        frames[20:] = frames[20:, ::-1].copy()

    dataset = pack(PAIRS, edit=move)
    report = check(dataset)
    assert [(f.clip, f.frames) for f in report.of("swapped-bodies")] == [(CLIP, ((20, 21),))]
    # each slot is empty for a part of the clip
    assert [f.frames for f in report.of("body-gap")] == [((0, len(dataset.clip(CLIP))),)]
    assert worse_than_notes(report) == ["swapped-bodies"]


def test_a_body_that_freezes_or_leaves(pack):
    def freeze(frames):
        frames[10:17, 1] = frames[10, 1]
        frames[30:33, 1] = 0

    report = check(pack(PAIRS, edit=freeze))
    assert worse_than_notes(report) == ["frozen-frames"]
    assert [(f.clip, f.frames) for f in report.of("frozen-frames")] == [(CLIP, ((10, 17),))]
    assert [(f.clip, f.frames, f.severity) for f in report.of("body-gap")] == [(CLIP, ((30, 33),), "note")]


def test_num_bodies_disagrees(pack):
    def remove(frames):
        frames[:, 1] = 0

    report = check(pack(PAIRS, edit=remove))
    assert worse_than_notes(report) == ["body-count"]
    assert report.of("body-count")[0].detail == "num_bodies says 2, the frames hold 1"


@pytest.mark.parametrize("up_axis, turned, found", [("z", "y", True), ("y", "-y", True), ("-y", "-y", False), ("x", "y", True)])
def test_the_axis_that_points_up(pack, up_axis, turned, found):
    sign = np.float32([1, -1 if turned == "-y" else 1, 1])
    report = check(pack([clip * sign for clip in MOTION.clips], up_axis=up_axis))
    assert [f.kind for f in report.findings if f.kind == "up-axis"] == ["up-axis"] * found
    if found:
        detail = f"heads are towards {turned} from the feet, {up_axis} is declared"
        assert (report.of("up-axis")[0].clip, report.of("up-axis")[0].detail) == (None, detail)


def test_short_clips(pack):
    clips = list(MOTION.clips)
    clips[3], clips[4] = clips[3][:1], clips[4][:39]
    report = check(pack(clips, columns={}))
    assert [(f.kind, f.clip, f.severity) for f in report.findings] == [("one-frame", 3, "warning"), ("short-clip", 4, "note")]
    assert check(pack(clips, columns={}), crop=39).of("short-clip") == []


def test_a_few_frames_say_nothing_of_bones(pack):
    clips = list(MOTION.clips)
    clips[CLIP] = clips[CLIP][::12].copy()
    growing(clips[CLIP])
    assert check(pack([*clips[:CLIP], clips[CLIP][:7], *clips[CLIP + 1 :]])).of("bone-spread") == []


def test_frame_numbers_that_repeat(pack):
    numbers = [np.arange(len(clip)) * 2 for clip in MOTION.clips]
    columns = {"frame_id": numbers, "other": [values * 0 for values in numbers]}
    assert check(pack(columns=columns)).findings == ()
    # both of the last two lie before what was there, though the second follows the first
    numbers[CLIP][[8, 9, 30, 31]] = [14, 14, 4, 6]
    report = check(pack(columns=columns))
    assert worse_than_notes(report) == ["repeated-frame-ids"]
    assert [(f.clip, f.frames) for f in report.of("repeated-frame-ids")] == [(CLIP, ((8, 10), (30, 32)))]


def test_thresholds_move_what_is_found(pack):
    dataset = pack(edit=frozen)
    assert worse_than_notes(check(dataset, thresholds=CheckThresholds(frozen_frames=9))) == ["repeated-frames"]
    assert worse_than_notes(check(pack(edit=thrown), thresholds=CheckThresholds(teleport_speed=50))) == []


def test_flat_data(pack):
    clips = [200 * clip[..., :2] + 400 for clip in MOTION.clips]
    score = [np.concatenate([clip, np.ones_like(clip[..., :1])], axis=-1) for clip in clips]
    assert check(pack(clips, units="pixels")).findings == ()
    dataset = pack(score, units="pixels", edit=thrown_in_pixels)
    assert dataset.meta["channels"] == ["x", "y", "score"]
    assert worse_than_notes(check(dataset)) == ["teleport"]


def thrown_in_pixels(frames):
    frames[15, 0, 7, :2] += 600
    # a score is no place
    frames[20:, 0, :, 2] = 1000


def test_frame_ranges():
    assert frame_ranges(np.array([1, 0, 1, 1, 0, 1], bool)) == ((0, 1), (2, 4), (5, 6))
    assert frame_ranges(np.zeros(3, bool)) == ()
