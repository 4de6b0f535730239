"""Early prediction: prefixes frame by frame, curves whose shape is known, and causal classifiers that cannot know better."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastskel.data.identity import dataset_identity, original_identity
from fastskel.data.loader import Loader
from fastskel.data.views import eval_view
from fastskel.evaluate import (
    Evaluation,
    FinetuneConfig,
    LinearConfig,
    class_scores,
    evaluate_early,
    fine_tune,
    first_frames,
)
from fastskel.evaluate.causal import causal_features
from fastskel.evaluate.early import area, observed
from fastskel.models import DSTE, STTR, MultimodalDSTE

FRAMES = 12
SPLIT = SimpleNamespace(train=np.arange(20), test=np.arange(20, 30))
PROBE = LinearConfig(epochs=40, learning_rate=0.3, milestones=(30,))
TUNED = FinetuneConfig(epochs=12, batch_size=5, learning_rate=0.01, warmup_epochs=1, evaluate_every=12, drop_path=0.0)




def with_lengths(dataset, lengths):
    """The data set's frames under other offsets."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(offsets[-1])
    frames = np.random.default_rng(0).normal(size=(total, *dataset.frames.shape[1:])).astype(np.float32)
    n = len(lengths)
    return replace(
        dataset, frames=frames, offsets=offsets, names=np.array([f"clip{i}" for i in range(n)]), labels=np.arange(n) % 3,
        num_bodies=np.ones(n, np.int64), columns={"subject": np.arange(n), "time": np.arange(total)},
        meta=dataset.meta | {"columns": {"subject": "clip", "time": "frame"}},
    )  # fmt: skip


def late(dataset, begins: int):
    """Thirty clips of FRAMES frames whose class shows from frame `begins` on."""
    made = with_lengths(dataset, [FRAMES] * 30)
    # one pose in little noise: embeddings are normalised, and noise alone would tell clips apart
    frames = 0.001 * made.frames + np.random.default_rng(1).normal(0, 0.3, made.frames.shape[1:]).astype(np.float32)
    for number in range(30):
        start = number * FRAMES
        frames[start + begins : start + FRAMES, 0, 4 + 3 * (number % 3), 1] += 3
    return replace(made, frames=frames)


def evaluation_of(dataset, kind=DSTE, **options) -> Evaluation:
    torch.manual_seed(0)
    encoder = kind(num_joints=25, num_bodies=1, num_frames=FRAMES, width=16)
    return Evaluation(encoder, dataset, SPLIT, eval_view(frames=FRAMES), progress=False, **options)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.99, 1.0])
def test_prefixes(dataset, ratio: float) -> None:
    whole = with_lengths(dataset, [1, 2, 3, 4, 7, 10, 30, 31])
    cut, place = first_frames(whole, ratio)
    assert np.shares_memory(cut.frames, whole.frames) and (np.diff(cut.offsets) > 0).all()
    for number in range(len(whole)):
        n = whole.num_frames[number]
        # the reference: n = max(3, (n * ratio) // 1)
        expected = whole.clip(number)[: int(max(3, (n * ratio) // 1))]
        assert np.array_equal(cut.clip(place[number]), expected)
        assert cut.labels[place[number]] == whole.labels[number] and cut.names[place[number]] == whole.names[number]
        assert cut.column("subject", place[number]) == number
        assert np.array_equal(cut.column("time", place[number]), whole.column("time", number)[: len(expected)])
    rest = np.setdiff1d(np.arange(len(cut)), place)
    assert (cut.labels[rest] == -1).all() and len(np.unique(cut.names)) == len(cut)
    assert dataset_identity(cut) != dataset_identity(whole)
    assert dataset_identity(cut) != dataset_identity(first_frames(whole, ratio / 2)[0])


def test_the_loader_sees_prefixes(dataset) -> None:
    whole = with_lengths(dataset, [9, 14, 20])
    cut, place = first_frames(whole, 0.5)
    by_hand = with_lengths(dataset, [4, 7, 10])
    for number in range(3):
        start, end = by_hand.offsets[number : number + 2]
        by_hand.frames[start:end] = whole.clip(number)[: end - start]
    views = [
        Loader(data, views=(eval_view(frames=6),), batch_size=3, shuffle=False, indices=index).batch(0, index).views[0]
        for data, index in ((cut, place), (by_hand, np.arange(3)))
    ]
    assert torch.equal(views[0].clips, views[1].clips)


def test_bad_ratios(dataset) -> None:
    for ratio in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\]"):
            first_frames(dataset, ratio)
    for ratios in ([], [0.5, 0.2], [0.5, 0.5], [0.5, 1.2]):
        with pytest.raises(ValueError, match=r"ratios must be ascending in \(0, 1\]"):
            evaluate_early(evaluation_of(late(dataset, 0)), ratios=ratios)


def test_the_observed_clips_are_the_same(dataset) -> None:
    evaluation = evaluation_of(late(dataset, 0), trained_on=np.array([0, 25]))
    part = observed(evaluation, 0.5)
    assert np.array_equal(part.dataset.names[part.known("test")], evaluation.dataset.names[evaluation.known("test")])
    assert part.record("early", torch.from_numpy(part.known("train")), torch.from_numpy(part.known("test")))[
        "test_clips_trained_on"
    ] == 1
    assert original_identity(part.dataset) == dataset_identity(evaluation.dataset) != dataset_identity(part.dataset)
    assert observed(evaluation, 1.0) is evaluation


@pytest.mark.parametrize("train_full", [False, True], ids=["per-ratio", "full"])
@pytest.mark.parametrize("raw", [False, True], ids=["encoder", "raw"])
def test_what_shows_late_is_recognised_late(dataset, raw, train_full, tmp_path: Path) -> None:
    evaluation = evaluation_of(late(dataset, FRAMES // 2))
    if raw:
        evaluation = replace(evaluation, encoder=None)
    config = replace(PROBE, standardise=not raw)
    result = evaluate_early(evaluation, tmp_path / "out", ratios=(0.25, 0.5, 1.0), config=config, train_full=train_full)
    low, half, full = (row["top1"] for row in result["curve"])
    # nothing of the class is in the first half: ten test clips of three classes, noise besides
    assert max(low, half) <= 0.7 and full == result["top1"] == 1.0
    assert result["area"] == pytest.approx((0.25 * (low + half) / 2 + 0.5 * (half + full) / 2) / 0.75)
    assert (result["task"], result["scheme"], result["num_train"], result["num_test"]) == ("early", "prefix", 20, 10)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(result))
    rows = list(csv.DictReader((tmp_path / "out" / "curve.csv").read_text().splitlines()))
    assert [float(row["top1"]) for row in rows] == [low, half, full]
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    if not train_full:
        early = evaluate_early(replace(evaluation, dataset=late(dataset, 0)), ratios=(0.25, 1.0), config=config)
        assert [row["top1"] for row in early["curve"]] == [1.0, 1.0]


def test_prefixes_do_not_share_cached_features(dataset, tmp_path: Path) -> None:
    evaluation = evaluation_of(late(dataset, FRAMES // 2))
    plain = evaluate_early(evaluation, ratios=(0.25, 1.0), config=PROBE)
    cached = replace(evaluation, cache=tmp_path)
    for _ in range(2):
        assert evaluate_early(cached, ratios=(0.25, 1.0), config=PROBE)["curve"] == plain["curve"]
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("kind", [DSTE, STTR])
def test_a_causal_classifier_cannot_know_better(dataset, kind, tmp_path: Path) -> None:
    data = late(dataset, FRAMES // 2)
    evaluation = evaluation_of(data, kind)
    config = replace(TUNED, epochs=40, evaluate_every=40, layer_decay=1.0, drop_path=0.0 if kind is DSTE else None)
    result = evaluate_early(evaluation, tmp_path, ratios=(0.5, 1.0), causal=True, finetune_config=config)
    assert (result["scheme"], result["classifier"], result["trained_on_whole_clips"]) == ("causal", "fine-tuning", True)
    half, full = (row["top1"] for row in result["curve"])
    assert half <= 0.7 and full == 1.0
    # the same classifier, on clips whose second halves are others
    made = fine_tune(evaluation, config, frames=(6, 12), out=tmp_path / "causal", resume=True)
    swapped = data.frames.copy()
    for number in range(30):
        swapped[number * FRAMES + 6 : (number + 1) * FRAMES] = 0.5
    other = class_scores(made.classifier, replace(data, frames=swapped), evaluation.view, SPLIT.test)
    assert torch.equal(other[:, 0], made.scores[:, 0]) and not torch.equal(other[:, 1], made.scores[:, 1])


def test_causal_features_of_a_frozen_encoder(dataset) -> None:
    evaluation = evaluation_of(late(dataset, 0))
    evaluation.encoder.train()
    evaluation.encoder.ske_emb.eval()
    sets = causal_features(evaluation, SPLIT.test, [3, FRAMES])
    assert not evaluation.encoder.ske_emb.training
    assert evaluation.encoder.training and [tuple(part.features.shape) for part in sets] == [(10, 32)] * 2
    assert torch.equal(sets[0].labels, torch.from_numpy(evaluation.dataset.labels[SPLIT.test]))
    result = evaluate_early(evaluation, ratios=(0.3, 1.0), causal=True, config=replace(PROBE, standardise=True))
    assert result["classifier"] == "linear probe" and result["top1"] == 1.0


@pytest.mark.parametrize("train_full", [False, True], ids=["per-ratio", "full"])
def test_fine_tuned_by_prefix(dataset, train_full, tmp_path: Path) -> None:
    evaluation = evaluation_of(late(dataset, 0))
    options = dict(ratios=(0.5, 1.0), finetune_config=TUNED, train_full=train_full)
    result = evaluate_early(evaluation, tmp_path, **options)
    assert result["top1"] == 1.0 and result["classifier"] == "fine-tuning"
    folders = {"full"} if train_full else {"ratio-50", "ratio-100"}
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == folders
    assert evaluate_early(evaluation, tmp_path, resume=True, **options)["curve"] == result["curve"]


def test_refusals(dataset) -> None:
    evaluation = evaluation_of(late(dataset, 0))
    with pytest.raises(ValueError, match="train_full must be False with causal"):
        evaluate_early(evaluation, causal=True, train_full=True)
    with pytest.raises(ValueError, match="view must be of joints or bones with causal, got motion"):
        evaluate_early(replace(evaluation, view=eval_view(FRAMES, "motion")), causal=True)
    with pytest.raises(ValueError, match="encoder must be one with a causal mode, got raw coordinates"):
        evaluate_early(replace(evaluation, encoder=None), causal=True)
    several = MultimodalDSTE(num_joints=25, num_bodies=1, num_frames=FRAMES, width=16)
    for tuned in (None, TUNED):
        with pytest.raises(ValueError, match="MultimodalDSTE: mode .* got 'causal', which only encoders of one modality have"):
            evaluate_early(replace(evaluation, encoder=several), causal=True, finetune_config=tuned)


def test_area() -> None:
    assert area([0.5], [0.25]) == 0.25
    assert area([0.0, 0.5, 1.0], [0.0, 1.0, 1.0]) == pytest.approx(0.75)
    assert area([0.1, 0.4], [0.3, 0.3]) == pytest.approx(0.3)
