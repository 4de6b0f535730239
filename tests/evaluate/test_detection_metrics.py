"""Average precision of detections against a plain second implementation, the recorded reference and cases done by hand."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from fastskel.evaluate import detection_metrics as module
from fastskel.evaluate.detection_metrics import THRESHOLDS, Segments, detection_metrics, temporal_nms

NAMES = ("precision", "recall", "f1", "ap", "map_action", "map_video", "interpolated_ap", "interpolated_map_action")


def iou(one, other) -> float:
    return (min(one[3], other[3]) - max(one[2], other[2])) / (max(one[3], other[3]) - min(one[2], other[2]))


def plain_ap(proposals: list, truth: list, threshold: float) -> tuple[float, float, int]:
    """Reference and interpolated average precision by removing one proposal after the other; segments found."""
    proposals = sorted(proposals, key=lambda row: row[4])
    match, count = [], [0] * len(truth)
    for row in proposals:
        best = -1
        for number, other in enumerate(truth):
            matches = tuple(row[:2]) == tuple(other[:2]) and iou(row, other) >= threshold
            if matches and (best < 0 or iou(row, other) >= iou(row, truth[best])):
                best = number
        match.append(best)
        if best >= 0:
            count[best] += 1
    found = sum(value > 0 for value in count)
    if not proposals or not truth:
        return 0.0, 0.0, found
    highest, old, total, curve = found / len(proposals), found / len(truth), 0.0, []
    positive = found
    for number, best in enumerate(match):
        curve.append((positive / len(truth), positive / (len(proposals) - number)))
        if best < 0:
            continue
        count[best] -= 1
        positive -= count[best] == 0
        left = len(proposals) - number - 1
        highest = max(highest, positive / left if left else 0.0)
        total += highest * (old - positive / len(truth))
        old = positive / len(truth)
    # integral of the highest precision at a recall of at least r, over the recalls that are reached
    levels = sorted({recall for recall, _ in curve if recall > 0})
    area = sum(
        (level - before) * max(precision for recall, precision in curve if recall >= level)
        for before, level in zip([0.0, *levels], levels)
    )
    return total, area, found


def plain_metrics(truth: np.ndarray, proposals: np.ndarray, num_classes: int, num_recordings: int, threshold: float) -> dict:
    rows, others = proposals.tolist(), truth.tolist()
    ap, area, found = plain_ap(rows, others, threshold)
    of = {
        name: [
            plain_ap([r for r in rows if r[axis] == group], [o for o in others if o[axis] == group], threshold)
            for group in range(count)
        ]
        for name, axis, count in (("map_action", 1, num_classes), ("map_video", 0, num_recordings))
    }
    precision, recall = found / max(len(rows), 1), found / max(len(others), 1)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if found else 0.0,
        "ap": ap,
        "interpolated_ap": area,
        "per_class": [value for value, _, _ in of["map_action"]],
        **{name: float(np.mean([value for value, _, _ in values])) for name, values in of.items()},
        **{f"interpolated_{name}": float(np.mean([value for _, value, _ in values])) for name, values in of.items()},
    }


def random_segments(draw: np.random.Generator, count: int, num_classes: int, num_recordings: int) -> np.ndarray:
    start = draw.integers(0, 60, count)
    # few scores and short integers: many ties in score and in overlap
    columns = [draw.integers(0, num_recordings, count), draw.integers(0, num_classes, count)]
    return np.column_stack([*columns, start, start + draw.integers(1, 30, count), draw.integers(0, 6, count) / 5])


@pytest.mark.parametrize("case", range(40))
def test_against_a_plain_implementation(case: int, monkeypatch) -> None:
    # pairs in blocks of a few: their borders must not matter
    monkeypatch.setattr(module, "MAX_PAIRS", 7 if case % 2 else 10**6)
    draw = np.random.default_rng(case)
    num_classes, num_recordings = int(draw.integers(1, 5)), int(draw.integers(1, 4))
    truth = random_segments(draw, int(draw.integers(0, 25)), num_classes, num_recordings)
    proposals = random_segments(draw, int(draw.integers(0, 50)), num_classes, num_recordings)
    # some proposals are the truth itself, so that strict thresholds are met too
    proposals = np.concatenate([proposals, truth[::2]])[draw.permutation(len(proposals) + len(truth[::2]))]
    results = detection_metrics(Segments.of(truth), Segments.of(proposals), num_classes, num_recordings, [*THRESHOLDS, 1.0])
    assert list(results) == ["0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "1"]
    for name, result in results.items():
        expected = plain_metrics(truth, proposals, num_classes, num_recordings, float(name))
        assert result.keys() == expected.keys()
        for key, value in expected.items():
            # sums of at most 100 terms below 1, in another order
            np.testing.assert_allclose(result[key], value, rtol=0, atol=1e-13, err_msg=f"{key} at {name}")


def test_recorded_reference(golden_dir: Path) -> None:
    recorded = json.loads((golden_dir / "map.json").read_text())
    videos = sorted({row[-1] for row in recorded["gt"]})

    def rows(listed: list, score: bool) -> Segments:
        # classes there count from 1, 0 is the background
        return Segments.of([[videos.index(v), c - 1, s, e, p if score else 1] for c, s, e, p, v in listed])

    truth, proposals = rows(recorded["gt"], False), rows(recorded["proposals"], True)
    assert set(recorded["result"]) == {"0.1", "0.3", "0.5", "0.7"}
    ious = [float(name) for name in recorded["result"]]
    whole = detection_metrics(truth, proposals, 51, len(videos), ious)
    five = detection_metrics(truth, proposals, 5, len(videos), ious)
    for name, expected in recorded["result"].items():
        result = whole[name]
        got = (result["f1"], result["ap"], result["map_action"], result["map_video"], five[name]["map_action"])
        wanted = [expected[key] for key in ("f1", "ap_all", "mAP_action", "mAP_video", "mAP_action_5cls")]
        np.testing.assert_allclose(got, wanted, rtol=1e-14, atol=0)
    # the recorded cases tell thresholds apart
    assert whole["0.5"]["ap"] != whole["0.7"]["ap"]


def test_by_hand() -> None:
    truth = Segments.of([[0, 0, 0, 10, 1]])
    # the better proposal finds it, the worse one is elsewhere
    proposals = Segments.of([[0, 0, 0, 10, 0.9], [0, 0, 50, 60, 0.1]])
    result = detection_metrics(truth, proposals, 1, 1, [0.5])["0.5"]
    assert (result["precision"], result["recall"], result["ap"], result["interpolated_ap"]) == (0.5, 1.0, 0.5, 1.0)
    # the other way round the false one is met first
    swapped = detection_metrics(truth, Segments.of([[0, 0, 0, 10, 0.1], [0, 0, 50, 60, 0.9]]), 1, 1, [0.5])["0.5"]
    assert (swapped["ap"], swapped["interpolated_ap"]) == (0.5, 0.5)
    # 5 of 15 frames are shared: found at 1/3, not above
    third = Segments.of([[0, 0, 5, 15, 0.9]])
    found = detection_metrics(truth, third, 1, 1, [1 / 3, 0.34])
    assert [row["recall"] for row in found.values()] == [1.0, 0.0]


def test_the_last_of_equal_segments_is_matched() -> None:
    truth = np.array([[0, 0, 0, 10, 1], [0, 0, 20, 30, 1]], dtype=float)
    both = [0, 0, 0, 30, 0.5]
    # overlaps both by a third; the second truth is found already, so its recall is one of two
    proposals = Segments.of([both, [0, 0, 20, 30, 0.9]])
    assert detection_metrics(Segments.of(truth), proposals, 1, 1, [0.3])["0.3"]["recall"] == 0.5
    assert detection_metrics(Segments.of(truth[::-1]), proposals, 1, 1, [0.3])["0.3"]["recall"] == 1.0


def test_perfect_and_empty() -> None:
    draw = np.random.default_rng(0)
    truth = random_segments(draw, 30, 3, 4)
    truth = np.unique(truth, axis=0)
    truth[:, 2:4] += 100 * np.arange(len(truth))[:, None]
    truth[:4, 0], truth[:3, 1] = range(4), range(3)
    for threshold, result in detection_metrics(Segments.of(truth), Segments.of(truth), 3, 4).items():
        assert all(result[name] == pytest.approx(1, abs=1e-12) for name in NAMES), threshold
        assert result["per_class"] == pytest.approx([1] * 3, abs=1e-12)
    for one, other in ((truth, np.zeros((0, 5))), (np.zeros((0, 5)), truth), (np.zeros((0, 5)), np.zeros((0, 5)))):
        empty = detection_metrics(Segments.of(one), Segments.of(other), 3, 4)
        assert all(value == 0 for result in empty.values() for name, value in result.items() if name in NAMES)
    # a class without truth counts 0
    assert detection_metrics(Segments.of(truth), Segments.of(truth), 6, 4)["0.5"]["map_action"] == pytest.approx(0.5)


def test_order_does_not_matter_without_ties() -> None:
    draw = np.random.default_rng(1)
    truth, proposals = random_segments(draw, 40, 3, 3), random_segments(draw, 90, 3, 3)
    # no two overlaps and no two scores alike
    truth[:, 2:4] += draw.uniform(0, 0.3, (40, 2)) * [-1, 1]
    proposals[:, 4] = draw.permutation(90) / 90
    first = detection_metrics(Segments.of(truth), Segments.of(proposals), 3, 3)
    for _ in range(3):
        again = detection_metrics(
            Segments.of(draw.permutation(truth)), Segments.of(draw.permutation(proposals)), 3, 3
        )
        for name in first:
            np.testing.assert_allclose([first[name][k] for k in NAMES], [again[name][k] for k in NAMES], atol=1e-13)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([[0, 0, 5, 5, 1]], r"truth must be of start < end, got segment 0 of recording 0, class 0, 5 to 5"),
        ([[0, 0, 0, 5, 1], [1, 1, 9, 4, 1]], r"truth must be of start < end, got segment 1 of recording 1, class 1, 9 to 4"),
        ([[0, 2, 0, 5, 1]], r"truth must be of classes 0\.\.1 and recordings 0\.\.1, got segment 0 of recording 0, class 2"),
        ([[2, 0, 0, 5, 1]], r"recordings 0\.\.1, got segment 0 of recording 2"),
        ([[0, 0, np.nan, 5, 1]], "truth must be finite, got segment 0"),
    ],
    ids=["empty", "reversed", "class", "recording", "nan"],
)
def test_refused_segments(rows: list, message: str) -> None:
    sound = Segments.of([[0, 0, 0, 5, 1]])
    with pytest.raises(ValueError, match=message):
        detection_metrics(Segments.of(rows), sound, 2, 2)
    with pytest.raises(ValueError, match=message.replace("truth", "proposals")):
        detection_metrics(sound, Segments.of(rows), 2, 2)


def test_refused_settings() -> None:
    none = Segments.of([])
    with pytest.raises(ValueError, match=r"thresholds must lie in \(0, 1\], got \[0\.0\]"):
        detection_metrics(none, none, 1, 1, [0.0])
    with pytest.raises(ValueError, match="num_classes and num_recordings must be at least 1, got 1 and 0"):
        detection_metrics(none, none, 1, 0)
    with pytest.raises(ValueError, match=r"temporal_nms: threshold must lie in \[0, 1\), got 1"):
        temporal_nms(none, 1)


def test_names_units_and_the_scale_of_scores_do_not_matter() -> None:
    draw = np.random.default_rng(4)
    truth, proposals = random_segments(draw, 40, 3, 4), random_segments(draw, 90, 3, 4)
    first = detection_metrics(Segments.of(truth), Segments.of(proposals), 3, 4)
    classes, recordings = np.array([2, 0, 1]), np.array([3, 1, 0, 2])

    def renamed(rows):
        # frames of half the length, counted from elsewhere: powers of two, so that no overlap is rounded otherwise
        moved = np.column_stack([recordings[rows[:, 0].astype(int)], classes[rows[:, 1].astype(int)], 2 * rows[:, 2:4] + 64])
        # of scores only their order counts
        return Segments.of(np.column_stack([moved, 0.5 + rows[:, 4] ** 3]))

    again = detection_metrics(renamed(truth), renamed(proposals), 3, 4)
    for name, row in first.items():
        np.testing.assert_allclose([row[k] for k in NAMES], [again[name][k] for k in NAMES], atol=1e-13)
        np.testing.assert_allclose(row["per_class"], np.array(again[name]["per_class"])[classes], atol=1e-13)


def test_suppression() -> None:
    rows = [[0, 0, 0, 10, 0.5], [0, 0, 1, 10, 0.9], [0, 0, 8, 30, 0.4], [0, 1, 0, 10, 0.1], [1, 0, 0, 10, 0.1]]
    rows.append(rows[1])
    kept = temporal_nms(Segments.of(rows), 0.5).rows().tolist()
    # the best stays, its twin and what overlaps it go; other classes and recordings are none of its business
    assert kept == [rows[1], rows[2], rows[3], rows[4]]
    assert len(temporal_nms(Segments.of(rows), 0)) == 3
    assert len(temporal_nms(Segments.of([]), 0.5)) == 0


def test_suppression_leaves_no_overlap() -> None:
    draw = np.random.default_rng(2)
    rows = random_segments(draw, 200, 2, 2)
    kept = temporal_nms(Segments.of(rows), 0.3).rows().tolist()
    near = [(a, b) for i, a in enumerate(kept) for b in kept[:i] if a[:2] == b[:2]]
    assert near and all(iou(a, b) <= 0.3 for a, b in near)
    # whoever went overlaps one that stayed and is no worse
    gone = [row for row in rows.tolist() if row not in kept]
    assert gone and all(any(a[:2] == b[:2] and iou(a, b) > 0.3 and b[4] >= a[4] for b in kept) for a in gone)


def test_pku_mmd_labels(data_dir: Path) -> None:
    with np.load(data_dir / "pku_mmd" / "pku_mmd_v1_labels.npz") as archive:
        rows = archive["segments"].astype(float)
        num_recordings = len(archive["videos"])
    rows[:, 1] -= rows[:, 1].min()
    assert rows.shape == (21545, 5) and rows[:, 1].max() == 50
    with pytest.raises(ValueError, match="truth must be of start < end, got segment"):
        detection_metrics(Segments.of(rows), Segments.of(rows), 51, num_recordings)
    truth = rows[rows[:, 3] > rows[:, 2]]
    draw = np.random.default_rng(0)
    proposals = truth.copy()
    proposals[:, 2:4] += np.sort(draw.normal(0, 20, (len(truth), 2)), axis=1)
    proposals[:, 4] = draw.uniform(size=len(truth))
    start = time.process_time()
    result = detection_metrics(Segments.of(truth), Segments.of(proposals), 51, num_recordings)
    # a promise of the library, in seconds of one core
    assert time.process_time() - start < 1
    found = [row["map_action"] for row in result.values()]
    assert found == sorted(found, reverse=True) and 0.05 < found[-1] < found[0] < 1
