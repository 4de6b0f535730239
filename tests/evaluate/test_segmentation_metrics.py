"""Frame accuracy, edit score and segmental F1 against plain second implementations and cases done by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fastskel.evaluate.segmentation_metrics import edit_score, label_runs, segmental_counts, segmentation_metrics


def plain_runs(labels: list[int], background: int | None) -> list[tuple[int, int, int]]:
    runs, start = [], 0
    for frame in range(1, len(labels) + 1):
        if frame == len(labels) or labels[frame] != labels[start]:
            if labels[start] != background:
                runs.append((labels[start], start, frame))
            start = frame
    return runs


def plain_distance(one: list[int], other: list[int]) -> int:
    table = [[max(i, j) if 0 in (i, j) else 0 for j in range(len(other) + 1)] for i in range(len(one) + 1)]
    for i in range(1, len(one) + 1):
        for j in range(1, len(other) + 1):
            replaced = table[i - 1][j - 1] + (one[i - 1] != other[j - 1])
            table[i][j] = min(replaced, table[i - 1][j] + 1, table[i][j - 1] + 1)
    return table[-1][-1]


def plain_counts(predicted: list, truth: list, overlap: float) -> tuple[int, int, int]:
    hits, hit, wrong = [False] * len(truth), 0, 0
    for label, start, end in predicted:
        frames = set(range(start, end))
        ious = []
        for other, begin, stop in truth:
            union = range(min(start, begin), max(end, stop))
            ious.append(len(frames & set(range(begin, stop))) / len(union) if label == other else 0.0)
        best = max(range(len(ious)), key=lambda i: (ious[i], -i)) if ious else -1
        if best >= 0 and ious[best] >= overlap and not hits[best]:
            hits[best], hit = True, hit + 1
        else:
            wrong += 1
    return hit, wrong, hits.count(False)


def sequence(draw: np.random.Generator, num_classes: int) -> np.ndarray:
    lengths = draw.integers(1, 9, int(draw.integers(1, 12)))
    return np.repeat(draw.integers(0, num_classes, len(lengths)), lengths)


@pytest.mark.parametrize("background", [0, None], ids=["background", "all"])
@pytest.mark.parametrize("case", range(20))
def test_against_plain_implementations(case: int, background: int | None) -> None:
    draw = np.random.default_rng(case)
    truth, predicted = [], []
    for _ in range(4):
        labels = sequence(draw, 4)
        guess = np.roll(labels, draw.integers(-3, 4))
        guess[draw.uniform(size=len(guess)) < 0.1] = draw.integers(0, 4)
        truth.append(labels)
        predicted.append(guess)
    counts = {overlap: np.zeros(3) for overlap in (0.1, 0.25, 0.5)}
    edits = []
    for one, other in zip(predicted, truth, strict=True):
        runs, true_runs = plain_runs(one.tolist(), background), plain_runs(other.tolist(), background)
        assert list(zip(*(values.tolist() for values in label_runs(one, background)))) == runs
        names, true_names = [run[0] for run in runs], [run[0] for run in true_runs]
        longer = max(len(names), len(true_names))
        edits.append(1 - plain_distance(names, true_names) / longer if longer else 1.0)
        for overlap, total in counts.items():
            total += plain_counts(runs, true_runs, overlap)
            got = segmental_counts(label_runs(one, background), label_runs(other, background), overlap)
            assert got == plain_counts(runs, true_runs, overlap)
    result = segmentation_metrics(predicted, truth, background=background)
    assert result["edit"] == pytest.approx(np.mean(edits), abs=1e-14)
    for overlap, (hit, wrong, missed) in counts.items():
        precision, recall = hit / max(hit + wrong, 1), hit / max(hit + missed, 1)
        f1 = 2 * precision * recall / (precision + recall) if hit else 0.0
        assert result[f"f1@{100 * overlap:g}"] == pytest.approx(f1, abs=1e-14)
    right = [a == b for one, other in zip(predicted, truth) for a, b in zip(one.tolist(), other.tolist())]
    assert result["accuracy"] == pytest.approx(np.mean(right), abs=1e-14)


def test_by_hand() -> None:
    truth = np.array([0] * 4 + [1] * 4 + [2] * 4 + [0] * 4)
    predicted = np.array([0] * 4 + [1] * 2 + [3] * 2 + [1] * 1 + [2] * 3 + [0] * 4)
    result = segmentation_metrics([predicted], [truth])
    # runs 1 3 1 2 against 1 2: two deletions of four
    assert result["edit"] == 0.5
    assert result["accuracy"] == 13 / 16
    assert result["action_accuracy"] == 5 / 8
    # the first 1 takes half of the true one, 3 is wrong, the second 1 does not touch it, 2 has three quarters
    assert segmental_counts(label_runs(predicted, 0), label_runs(truth, 0), 0.5) == (2, 2, 0)
    assert (result["f1@10"], result["f1@25"], result["f1@50"]) == (4 / 6, 4 / 6, 4 / 6)
    assert segmental_counts(label_runs(predicted, 0), label_runs(truth, 0), 0.51) == (1, 3, 1)


def test_a_run_is_taken_once() -> None:
    truth = np.array([1] * 10)
    predicted = np.array([1] * 6 + [2] + [1] * 3)
    # both runs of 1 reach 0.1; the second comes too late
    assert segmental_counts(label_runs(predicted), label_runs(truth), 0.1) == (1, 2, 0)


def test_the_first_of_equal_runs_is_taken() -> None:
    truth = np.array([1] * 6 + [0] + [1] * 6)
    predicted = np.array([0] * 4 + [1] * 5 + [0] + [1] * 3)
    # the first run shares 2 of 9 frames with either; it takes the earlier one and leaves the other to the second run
    assert segmental_counts(label_runs(predicted, 0), label_runs(truth, 0), 0.2) == (2, 0, 0)


def test_background_counts_if_asked() -> None:
    truth, predicted = np.array([0] * 5 + [1] * 5), np.array([0] * 10)
    assert segmentation_metrics([predicted], [truth])["edit"] == 0.0
    assert segmentation_metrics([predicted], [truth], background=None)["edit"] == 0.5
    assert segmentation_metrics([predicted], [truth])["f1@10"] == 0.0
    assert segmentation_metrics([predicted], [truth], background=None)["f1@10"] == 2 / 3


def test_perfect_empty_and_permuted() -> None:
    draw = np.random.default_rng(0)
    truth = [sequence(draw, 3) for _ in range(6)]
    assert set(segmentation_metrics(truth, truth).values()) == {1.0}
    silent = [np.zeros(5, dtype=np.int64)]
    nothing = segmentation_metrics(silent, silent)
    assert (nothing["accuracy"], nothing["edit"], nothing["f1@50"], nothing["action_accuracy"]) == (1.0, 1.0, 1.0, 0.0)
    predicted = [np.roll(labels, 2) for labels in truth]
    order = draw.permutation(6)
    first = segmentation_metrics(predicted, truth)
    again = segmentation_metrics([predicted[i] for i in order], [truth[i] for i in order])
    assert first == pytest.approx(again, abs=1e-14)
    # class numbers are names: another numbering changes nothing, the background stays
    names = np.array([0, 7, 3])
    assert segmentation_metrics([names[p] for p in predicted], [names[t] for t in truth]) == first


def test_edges() -> None:
    assert edit_score(np.array([], dtype=int), np.array([], dtype=int)) == 1.0
    assert edit_score(np.array([1]), np.array([], dtype=int)) == 0.0
    assert [values.tolist() for values in label_runs(np.array([4]))] == [[4], [0], [1]]
    assert [values.tolist() for values in label_runs(np.array([], dtype=int))] == [[], [], []]
    assert segmental_counts(label_runs(np.array([1])), label_runs(np.array([0]), 0), 0.1) == (0, 1, 0)


def test_refused() -> None:
    one = np.array([1, 2])
    with pytest.raises(ValueError, match="must be one array per recording, got 1 and 2"):
        segmentation_metrics([one], [one, one])
    with pytest.raises(ValueError, match="must be one array per recording, got 0 and 0"):
        segmentation_metrics([], [])
    with pytest.raises(ValueError, match=r"recording 0 must be integers \(T,\), got int64 \(2,\) predicted and int64 \(1,\)"):
        segmentation_metrics([one], [one[:1]])
    with pytest.raises(ValueError, match="must be integers"):
        segmentation_metrics([one.astype(float)], [one])
    with pytest.raises(ValueError, match=r"overlaps must lie in \(0, 1\], got \[0\]"):
        segmentation_metrics([one], [one], overlaps=[0])
