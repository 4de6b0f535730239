r"""Temporal action detection: average precision of scored segments, over actions and over recordings.

A proposal and a true segment may match if recording and class agree. Their overlap is

    IoU = (min(ends) - max(starts)) / (max(ends) - min(starts)).

A proposal matches the true segment of highest IoU, if that reaches the threshold; among equals the one listed last. Several
proposals may match one segment. A segment with at least one match is found: precision is found / proposals, recall is
found / segments, so that a second match of a segment costs precision.

Average precision removes the proposals from the lowest score on; equal scores go in the order given. Each removal that takes
the last match of a segment lowers the recall by 1 / segments. In the reference ("ap") that step is weighted by the highest
precision so far, which is read before all removals and after each removal of a matched proposal, this one included: it may
lie at the lower end of the step, and what the removal of an unmatched proposal alone brings is read only later.
"interpolated_ap" is the integral of the interpolated precision that the PKU-MMD paper describes,

    AP = sum over steps of (r_k - r_(k-1)) max over r >= r_k of p(r).

Neither bounds the other. A segment found by the better of two proposals has 0.5 of the one and 1 of the other.

Source: specification of USDRL, section 5.6; Liu et al., "PKU-MMD: a large scale benchmark for continuous multi-modal human action
understanding", 2017, section on evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["THRESHOLDS", "Segments", "detection_metrics", "temporal_nms"]

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
# pairs of proposals and segments that are compared at a time: 40 bytes each
MAX_PAIRS = 4_000_000


@dataclass(frozen=True)
class Segments:
    """Segments of recordings: true ones, or proposals.

    Attributes:
        recording: Number of the recording, (S,), int64, from 0.
        label: Class, (S,), int64, from 0.
        start: First frame, (S,), float64.
        end: End, exclusive, (S,), float64, above start.
        score: Confidence, (S,), float64; not read of true segments.
    """

    recording: NDArray[np.int64]
    label: NDArray[np.int64]
    start: NDArray[np.float64]
    end: NDArray[np.float64]
    score: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.recording)

    @classmethod
    def of(cls, rows: ArrayLike) -> Segments:
        """Take rows (recording, class, start, end, score), (S, 5), or none, (0, 5)."""
        table = np.asarray(rows, dtype=np.float64).reshape(-1, 5)
        return cls(table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2], table[:, 3], table[:, 4])

    def rows(self) -> NDArray[np.float64]:
        """Rows (recording, class, start, end, score), (S, 5)."""
        return np.stack([self.recording, self.label, self.start, self.end, self.score], 1).astype(np.float64)

    def take(self, index: NDArray[Any]) -> Segments:
        """The segments at positions (N,), or where (S,) bool is true."""
        return Segments(self.recording[index], self.label[index], self.start[index], self.end[index], self.score[index])


def check_segments(function: str, name: str, segments: Segments, num_classes: int, num_recordings: int) -> None:
    """Refuse segments that are reversed, empty, not finite, or of no class or recording; `name` is what they are called."""
    sound = np.isfinite(segments.start) & np.isfinite(segments.end) & np.isfinite(segments.score)
    known = (segments.label >= 0) & (segments.label < num_classes)
    known &= (segments.recording >= 0) & (segments.recording < num_recordings)
    for fine, contract, advice in (
        (sound, "finite", "Check the model that made them"),
        (known, f"of classes 0..{num_classes - 1} and recordings 0..{num_recordings - 1}", "Number both from 0"),
        (segments.end > segments.start, "of start < end", "Remove or mend it"),
    ):
        if not fine.all():
            row = int(np.argmin(fine))
            raise ValueError(
                f"{function}: {name} must be {contract}, got segment {row} of recording {segments.recording[row]}, class "
                f"{segments.label[row]}, {segments.start[row]:g} to {segments.end[row]:g}, score {segments.score[row]:g}. "
                f"{advice}."
            )


def _best_matches(
    truth: Segments, proposals: Segments, num_classes: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Segment of highest IoU for each proposal, (P,), -1 where there is none, and that IoU, (P,)."""
    best, overlap = np.full(len(proposals), -1), np.zeros(len(proposals))
    truth_key = truth.recording * num_classes + truth.label
    key = proposals.recording * num_classes + proposals.label
    order = np.argsort(truth_key, kind="stable")
    first, last = (np.searchsorted(truth_key[order], key, side) for side in ("left", "right"))
    for rows in np.array_split(np.arange(len(proposals)), int((last - first).sum()) // MAX_PAIRS + 1):
        count = (last - first)[rows]
        row = np.repeat(rows, count)
        ends = np.cumsum(count)
        candidate = order[np.repeat(first[rows] - (ends - count), count) + np.arange(len(row))]
        shared = np.minimum(proposals.end[row], truth.end[candidate]) - np.maximum(proposals.start[row], truth.start[candidate])
        whole = np.maximum(proposals.end[row], truth.end[candidate]) - np.minimum(proposals.start[row], truth.start[candidate])
        iou = shared / whole
        # the last of each row: the highest overlap, and among equals the segment listed last
        chosen = np.lexsort((candidate, iou, row))[ends[count > 0] - 1]
        best[row[chosen]], overlap[row[chosen]] = candidate[chosen], iou[chosen]
    return best, overlap


def _average_precision(
    match: NDArray[np.int64],
    score: NDArray[np.float64],
    group: NDArray[np.int64],
    truth_group: NDArray[np.int64],
    num_groups: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Average precision as in the reference and interpolated, (G,) each, 0 for a group without segments.

    Matched segments of proposals (P,), their scores (P,) and groups (P,), and the groups of the segments (S,).
    """
    order = np.lexsort((score, group))
    match, group = match[order], group[order]
    size = np.bincount(group, minlength=num_groups)
    begin = np.cumsum(size) - size
    # proposals of the group that are left, this one included
    left = size[group] - (np.arange(len(order)) - begin[group])
    hit = np.flatnonzero(match >= 0)
    # where a segment loses its last match: of repeated indices the last assignment counts
    last = np.full(len(truth_group), -1)
    last[match[hit]] = hit
    lost = np.zeros(len(order), dtype=np.int64)
    lost[last[last >= 0]] = 1
    found = np.bincount(group, lost, num_groups).astype(np.int64)
    lost_before = np.cumsum(lost) - lost - (np.cumsum(found) - found)[group]
    before = (found[group] - lost_before) / left
    # without proposals there is no precision: nothing is found then either
    after = (found[group] - lost_before - lost) / np.maximum(left - 1, 1)
    after[match < 0] = 0.0
    # what counts before the first removal
    used = begin[size > 0]
    after[used] = np.maximum(after[used], before[used])
    weights = np.zeros((2, num_groups))
    for row, precision in enumerate((after, before)):
        highest = np.empty(len(order))
        for start, count in zip(begin[size > 0].tolist(), size[size > 0].tolist(), strict=True):
            np.maximum.accumulate(precision[start : start + count], out=highest[start : start + count])
        weights[row] = np.bincount(group, highest * lost, num_groups)
    num_truth = np.maximum(np.bincount(truth_group, minlength=num_groups), 1)
    return weights[0] / num_truth, weights[1] / num_truth


def detection_metrics(
    truth: Segments,
    proposals: Segments,
    num_classes: int,
    num_recordings: int,
    thresholds: Sequence[float] = THRESHOLDS,
) -> dict[str, dict[str, Any]]:
    """Measure proposals against true segments at several thresholds of the IoU.

    Args:
        truth: True segments, (S,).
        proposals: Scored segments, (P,); none at all is a result of 0.
        num_classes: K; a class without a true segment counts 0, as in the reference.
        num_recordings: R; all of them count.
        thresholds: Least IoU of a match, in (0, 1].
    Returns:
        For each threshold, such as "0.5": "precision", "recall" and "f1" of all proposals, "ap" of all, "map_action" over
        the K classes, "map_video" over the R recordings, the same three with "interpolated_" before them, and "per_class",
        the K values of "map_action"; fractions of one.
    Raises:
        ValueError: On a segment with end <= start, naming it, on unknown classes or recordings, on thresholds.
    Source: specification of USDRL, section 5.6; PKU-MMD.
    """
    if num_classes < 1 or num_recordings < 1:
        raise ValueError(
            f"detection_metrics: num_classes and num_recordings must be at least 1, got {num_classes} and {num_recordings}. "
            "Check the split."
        )
    if not thresholds or not all(0 < value <= 1 for value in thresholds):
        raise ValueError(f"detection_metrics: thresholds must lie in (0, 1], got {list(thresholds)}. Pass 0.5.")
    for name, segments in (("truth", truth), ("proposals", proposals)):
        check_segments("detection_metrics", name, segments, num_classes, num_recordings)
    best, overlap = _best_matches(truth, proposals, num_classes)
    results = {}
    for threshold in thresholds:
        match = np.where(overlap >= threshold, best, -1)
        found = len(np.unique(match[match >= 0]))
        precision, recall = found / max(len(proposals), 1), found / max(len(truth), 1)
        row: dict[str, Any] = {
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall) if found else 0.0,
        }
        for name, of_proposals, of_truth, count in (
            ("ap", np.zeros_like(proposals.label), np.zeros_like(truth.label), 1),
            ("map_action", proposals.label, truth.label, num_classes),
            ("map_video", proposals.recording, truth.recording, num_recordings),
        ):
            plain, interpolated = _average_precision(match, proposals.score, of_proposals, of_truth, count)
            row |= {name: float(plain.mean()), f"interpolated_{name}": float(interpolated.mean())}
            if name == "map_action":
                row["per_class"] = plain.tolist()
        results[f"{threshold:g}"] = row
    return results


def temporal_nms(proposals: Segments, threshold: float) -> Segments:
    """Drop every proposal that overlaps a better one of its recording and class, greedily from the best on.

    Args:
        proposals: Scored segments, (P,).
        threshold: IoU above which the worse one goes, in [0, 1).
    Returns:
        What is left, (P',), in its old order. Equal scores: the one listed first is better.
    Raises:
        ValueError: If the threshold is out of its range.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"temporal_nms: threshold must lie in [0, 1), got {threshold}. Pass 0.5.")
    kept = np.zeros(len(proposals), dtype=bool)
    order = np.lexsort((-proposals.score, proposals.label, proposals.recording))
    group = np.stack([proposals.recording, proposals.label], 1)[order]
    cuts = np.flatnonzero((group[1:] != group[:-1]).any(1)) + 1
    for rest in np.split(order, cuts):
        while len(rest):
            top, rest = rest[0], rest[1:]
            kept[top] = True
            start, end = proposals.start, proposals.end
            shared = np.minimum(end[rest], end[top]) - np.maximum(start[rest], start[top])
            whole = np.maximum(end[rest], end[top]) - np.minimum(start[rest], start[top])
            rest = rest[shared <= threshold * whole]
    return proposals.take(kept)
