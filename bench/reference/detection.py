"""Average precision of detections in plain Python, one segment after another, as specification of USDRL, section 5.6, tells it.

A proposal is matched with the true segment of its recording and class that it overlaps most, if that overlap reaches the
threshold. Then proposals are removed from the lowest score on, and recall that is lost is weighted by the highest precision
so far: that after the removal as published, that before it for the interpolated precision of PKU-MMD.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["Segment", "average_precision", "detection_metrics", "matches", "overlap"]

# recording, class, start, end, score
Segment = tuple[int, int, float, float, float]


def overlap(one: Segment, other: Segment) -> float:
    """Return the intersection over union of two segments; below 0 if they are apart."""
    return (min(one[3], other[3]) - max(one[2], other[2])) / (max(one[3], other[3]) - min(one[2], other[2]))


def matches(proposals: Sequence[Segment], truth: Sequence[Segment], threshold: float) -> list[int]:
    """Find the number of the true segment that each proposal is matched with, (P,), -1 where there is none."""
    candidates: dict[tuple[int, int], list[int]] = {}
    for number, segment in enumerate(truth):
        candidates.setdefault(segment[:2], []).append(number)
    found = []
    for proposal in proposals:
        best, most = -1, threshold
        for number in candidates.get(proposal[:2], ()):
            value = overlap(proposal, truth[number])
            # the last of equal ones
            if value >= most:
                best, most = number, value
        found.append(best)
    return found


def average_precision(matched: Iterable[int], num_truth: int) -> tuple[float, float]:
    """Return average precision as published and interpolated, of a group of proposals in the order of their scores.

    Args:
        matched: True segment of each proposal, (P,), -1 for none; lowest score first.
        num_truth: True segments S of the group.
    """
    rest = list(matched)
    if not rest or not num_truth:
        return 0.0, 0.0
    left, counts = len(rest), dict[int, int]()
    for number in rest:
        if number >= 0:
            counts[number] = counts.get(number, 0) + 1
    found = len(counts)
    published = interpolated = 0.0
    highest_after = highest_before = found / left
    for number in rest:
        highest_before = max(highest_before, found / left)
        left -= 1
        if number < 0:
            continue
        counts[number] -= 1
        lost = counts[number] == 0
        found -= lost
        highest_after = max(highest_after, found / left if left else 0.0)
        if lost:
            published += highest_after / num_truth
            interpolated += highest_before / num_truth
    return published, interpolated


def detection_metrics(
    truth: Sequence[Segment],
    proposals: Sequence[Segment],
    num_classes: int,
    num_recordings: int,
    thresholds: Sequence[float],
) -> dict[str, dict[str, Any]]:
    """Measure proposals (P,) against true segments (S,); returns what `fastskel.evaluate.detection_metrics` returns.

    Args:
        truth: Rows (recording, class, start, end, score).
        proposals: Rows of the same kind.
        num_classes: K.
        num_recordings: R.
        thresholds: Least overlap of a match.
    """
    order = sorted(range(len(proposals)), key=lambda number: proposals[number][4])
    # numbers of the proposals of each class and of each recording, lowest score first, and how many segments are true
    members: dict[str, list[list[int]]] = {}
    sizes: dict[str, list[int]] = {}
    for name, column, count in (("map_action", 1, num_classes), ("map_video", 0, num_recordings)):
        members[name], sizes[name] = [[] for _ in range(count)], [0] * count
        for number in order:
            members[name][int(proposals[number][column])].append(number)
        for segment in truth:
            sizes[name][int(segment[column])] += 1
    results = {}
    for threshold in thresholds:
        match = matches(proposals, truth, threshold)
        found = len({number for number in match if number >= 0})
        precision, recall = found / max(len(proposals), 1), found / max(len(truth), 1)
        row: dict[str, Any] = {"precision": precision, "recall": recall}
        row["f1"] = 2 * precision * recall / (precision + recall) if found else 0.0
        row["ap"], row["interpolated_ap"] = average_precision((match[number] for number in order), len(truth))
        for name, groups in members.items():
            pairs = [
                average_precision((match[number] for number in group), size) for group, size in zip(groups, sizes[name])
            ]
            plain, interpolated = zip(*pairs)
            row[name], row[f"interpolated_{name}"] = sum(plain) / len(pairs), sum(interpolated) / len(pairs)
            if name == "map_action":
                row["per_class"] = list(plain)
        results[f"{threshold:g}"] = row
    return results
