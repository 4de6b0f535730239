"""Episodes and one-shot exemplars: what is drawn, hand-computed cases, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastskel.data.protocols import NTU_NOVEL_CLASSES, split
from fastskel.data.views import eval_view
from fastskel.evaluate import Evaluation, evaluate_fewshot, evaluate_oneshot
from fastskel.evaluate.few_shot import NTU_EXEMPLARS, _nearest_mean, class_numbers, draw_episode

VIEW = eval_view(frames=6, normalise="none")


@pytest.fixture
def evaluation(encoder, dataset) -> Evaluation:
    return Evaluation(
        encoder, dataset, SimpleNamespace(train=np.arange(5), test=np.arange(5, 17)), VIEW, progress=False
    )


def _ntu(dataset, num: int = 40):
    """A data set with the names of NTU RGB+D 120: exemplars, their classes and others."""
    labels = np.array([*NTU_NOVEL_CLASSES, *range(1, 120, 6)][:num])
    names = [*NTU_EXEMPLARS, *(f"S001C001P001R001A{label + 1:03d}" for label in labels[20:])]
    few = replace(
        dataset,
        meta={**dataset.meta, "source": "ntu-120", "class_names": [f"A{number + 1}" for number in range(120)]},
        labels=labels,
        names=np.array(names[:num]),
    )
    lengths = np.full(num, 3)
    frames = np.random.default_rng(0).normal(0, 1, (lengths.sum(), 1, 25, 3)).astype(np.float32)
    return replace(
        few, frames=frames, offsets=np.concatenate([[0], np.cumsum(lengths)]), num_bodies=np.ones(num, dtype=np.int64)
    )


def test_episodes_are_drawn_by_their_address() -> None:
    sizes = [3, 9, 20, 4, 7, 30]
    classes = np.zeros(6)
    for episode in range(300):
        drawn = draw_episode(sizes, 4, 2, 3, 11, episode)
        numbers = [number for number, _, _ in drawn]
        assert len(set(numbers)) == 4
        classes[numbers] += 1
        for number, shown, asked in drawn:
            assert len(shown) == 2 and len(asked) == min(3, sizes[number] - 2)
            both = [*shown.tolist(), *asked.tolist()]
            assert len(set(both)) == len(both) and min(both) >= 0 and max(both) < sizes[number]
    # each class is in two of three episodes: 300 draws deviate by 8; four of them
    assert np.abs(classes - 200).max() < 33
    repeated = [draw_episode(sizes, 4, 2, 3, 11, 5), draw_episode(sizes, 4, 2, 3, 11, 5)]
    assert str(repeated[0]) == str(repeated[1])
    assert str(repeated[0]) != str(draw_episode(sizes, 4, 2, 3, 12, 5))


def test_every_clip_of_a_class_is_drawn_equally_often() -> None:
    count = np.zeros(8)
    for episode in range(800):
        ((_, shown, _),) = draw_episode([8], 1, 1, 2, 0, episode)
        count[shown] += 1
    # 100 each, with a deviation of 9.4; four of them
    assert np.abs(count - 100).max() < 38


def test_nearest_mean_by_hand() -> None:
    support = torch.tensor([[1.0, 0.0], [0.0, 10.0], [1.0, 1.0], [-1.0, 0.0]])
    own = torch.tensor([0, 1, 1, 2])
    # the mean of way 1 is that of unit vectors: 67.5 degrees; of plain ones it would be 84.8
    degrees = torch.tensor([30.0, 35.0, 80.0, 120.0, 130.0]).deg2rad()
    query = torch.stack([degrees.cos(), degrees.sin()], 1)
    assert _nearest_mean(support, own, query, 3).tolist() == [0, 1, 1, 1, 2]


@pytest.mark.parametrize("classifier", ["mean", "logistic"])
@pytest.mark.parametrize("centre", [False, True])
def test_separable_classes(evaluation, classifier, centre, tmp_path: Path) -> None:
    result = evaluate_fewshot(
        evaluation, tmp_path / "out", ways=3, shots=2, queries=2, episodes=10, classifier=classifier, centre=centre
    )
    top1 = result["top1"]
    assert top1["mean"] > 0.95 and len(top1["values"]) == 10
    assert top1["interval"] == pytest.approx(1.96 * np.std(top1["values"], ddof=1) / np.sqrt(10))
    assert (result["classes"], result["classes_left_out"], result["task"]) == (["sit", "wave", "kick"], [], "fewshot")
    assert result["num_test"] == 12 and result["dropped_train"] == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(result))


def test_features_without_classes_are_at_chance(evaluation) -> None:
    # clip numbers take turns; labels in runs have nothing to do with them
    draw = np.random.default_rng(0)
    noise = draw.normal(0, 1, evaluation.dataset.frames.shape).astype(np.float32)
    blind = replace(evaluation, encoder=None, dataset=replace(evaluation.dataset, frames=noise))
    top1 = evaluate_fewshot(blind, ways=3, shots=1, queries=3, episodes=300)["top1"]
    # 12 clips are shared by all episodes, so the deviation is that of few clips
    assert 0.2 < top1["mean"] < 0.47


def test_classes_that_are_asked_for(evaluation) -> None:
    result = evaluate_fewshot(evaluation, ways=2, shots=1, episodes=3, classes=["kick", "0"])
    assert (result["classes"], result["classes_left_out"]) == (["kick", "sit"], ["wave"])
    labels = evaluation.dataset.labels.copy()
    labels[labels == 1] = 2
    labels[6] = 1
    lonely = replace(evaluation, dataset=replace(evaluation.dataset, labels=labels))
    result = evaluate_fewshot(lonely, ways=2, episodes=3)
    assert (result["classes"], result["classes_left_out"]) == (["sit", "kick"], ["wave"])
    with pytest.raises(ValueError, match="must have more than 1 test clips, got 1 of 'wave'"):
        evaluate_fewshot(lonely, ways=2, classes=[0, 1, 2])


def test_a_single_episode_has_no_interval(evaluation) -> None:
    top1 = evaluate_fewshot(evaluation, ways=2, episodes=1)["top1"]
    assert top1["interval"] is None and top1["deviation"] is None


def test_fewshot_refuses(evaluation) -> None:
    for change, message in [
        ({"ways": 4}, "ways must be at most 3, the classes with more than 1 test clips, got 4"),
        ({"ways": 1}, "ways must be at least 2, got 1"),
        ({"shots": 0}, "shots must be at least 1, got 0"),
        ({"classifier": "svm"}, "classifier must be mean or logistic, got 'svm'"),
        ({"classes": ["jump", "sit"]}, "got 'jump'"),
        ({"classes": [0, "sit"]}, "each once"),
        ({"classes": [0, 3]}, "numbers below 3 of in-memory, got 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate_fewshot(evaluation, **{"ways": 2, "episodes": 1, **change})
    assert class_numbers(evaluation.dataset, ["kick", "0", np.int64(1)], "f") == [2, 0, 1]


def test_one_shot_by_the_first_clip_of_each_class(evaluation, tmp_path: Path) -> None:
    result = evaluate_oneshot(evaluation, tmp_path / "out")
    assert result["top1"] == result["mean_class"] == 1.0
    assert result["exemplars"] == ["clip000", "clip001", "clip002"]
    assert (result["num_test"], result["train_clips_of_novel_classes"], result["published_protocol"]) == (12, 5, False)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(result))
    assert (tmp_path / "out" / "confusion.csv").exists()


def test_one_shot_with_exemplars_of_the_test_part(evaluation) -> None:
    result = evaluate_oneshot(evaluation, novel=["kick", "sit"], exemplars=["clip009", "clip008"])
    # in the order of the novel classes; they are not tested on
    assert (result["classes"], result["exemplars"]) == (["sit", "kick"], ["clip008", "clip009"])
    assert result["num_test"] == 6 and np.sum(result["confusion"]) == 6 and result["dropped_test"] == 0
    assert result["top1"] == 1.0


def test_one_shot_is_the_nearest_by_angle(evaluation) -> None:
    result = evaluate_oneshot(replace(evaluation, encoder=None), exemplars=["clip003", "clip010", "clip005"])
    features = evaluation.dataset
    raw = replace(evaluation, encoder=None)
    shown, asked = (
        torch.nn.functional.normalize(raw.features_of(np.array(clips)).features.double(), dim=1)
        for clips in ([3, 10, 5], [6, 7, 8, 9, 11, 12, 13, 14, 15, 16])
    )
    predicted = (asked @ shown.T).argmax(1).numpy()
    truth = features.labels[[6, 7, 8, 9, 11, 12, 13, 14, 15, 16]]
    assert result["top1"] == pytest.approx((predicted == truth).mean())


def test_one_shot_refuses(evaluation) -> None:
    for change, message in [
        ({"exemplars": ["clip000", "clip001"]}, r"one clip of each of the classes \[0, 1, 2\], got clips of \[0, 1\]"),
        ({"exemplars": ["clip000", "clip001", "clip004"]}, r"got clips of \[0, 1, 1\]"),
        ({"exemplars": ["clip000", "nobody", "clip004"]}, r"got 'nobody' \(1 unknown\)"),
        ({"novel": ["jump"]}, "got 'jump'"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate_oneshot(evaluation, **change)
    empty = replace(evaluation, split=SimpleNamespace(train=np.arange(3, 17), test=np.arange(3)))
    with pytest.raises(ValueError, match="the test part must have clips of the novel classes, got none"):
        evaluate_oneshot(empty)


def test_the_protocol_of_ntu_120(dataset) -> None:
    ntu = _ntu(dataset)
    parts = split(ntu, "one-shot")
    assert parts.train.tolist() == list(range(20, 40)) and parts.test.tolist() == list(range(20))
    assert len(NTU_EXEMPLARS) == 20 and [int(name[-3:]) - 1 for name in NTU_EXEMPLARS] == list(NTU_NOVEL_CLASSES)
    assert (NTU_EXEMPLARS[0], NTU_EXEMPLARS[9], NTU_EXEMPLARS[10], NTU_EXEMPLARS[19]) == (
        "S001C003P008R001A001", "S001C003P008R001A055", "S018C003P008R001A061", "S018C003P008R001A115",
    )  # fmt: skip
    evaluation = Evaluation(None, ntu, parts, VIEW, progress=False)
    with pytest.raises(ValueError, match="clips of the novel classes, got none"):
        evaluate_oneshot(evaluation)
    # ten more clips, copies of exemplars: each is nearest to its original
    copies = replace(
        ntu,
        labels=np.concatenate([ntu.labels, ntu.labels[:10]]),
        names=np.concatenate([ntu.names, [f"S002C001P003R001A{label + 1:03d}" for label in ntu.labels[:10]]]),
        frames=np.concatenate([ntu.frames, ntu.frames[:30]]),
        offsets=np.concatenate([ntu.offsets, ntu.offsets[-1] + 3 * np.arange(1, 11)]),
        num_bodies=np.ones(50, dtype=np.int64),
    )
    result = evaluate_oneshot(replace(evaluation, dataset=copies, split=split(copies, "one-shot")))
    assert (result["top1"], result["num_test"], result["published_protocol"]) == (1.0, 10, True)
    # another split of it is not that protocol
    fewer = SimpleNamespace(train=np.arange(5), test=np.arange(5, 50))
    assert evaluate_oneshot(replace(evaluation, dataset=copies, split=fewer))["published_protocol"] is False
    assert result["train_clips_of_novel_classes"] == 0
    missing = replace(copies, names=np.array([f"clip{number}" for number in range(50)]))
    with pytest.raises(ValueError, match=r"got 'S001C003P008R001A001' \(20 unknown\)"):
        evaluate_oneshot(replace(evaluation, dataset=missing, split=split(missing, "one-shot")))
