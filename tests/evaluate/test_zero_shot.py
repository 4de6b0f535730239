"""Zero-shot recognition: the ridge map, files of embeddings, classes that were never shown, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from fastskel.data.views import eval_view
from fastskel.evaluate import Evaluation, evaluate_zeroshot
from fastskel.evaluate.zero_shot import PENALTIES, RidgeMap, choose_ridge_penalty, read_embeddings
from fastskel.philox import Use, permutation

VIEW = eval_view(frames=6, normalise="none")
NAMES = ["sit", "wave", "kick"]
NUM_CLASSES, WIDTH = 10, 4


@pytest.fixture
def vectors() -> np.ndarray:
    return np.random.default_rng(3).normal(0, 1, (NUM_CLASSES, WIDTH))


@pytest.fixture
def evaluation(dataset, vectors) -> Evaluation:
    """Clips whose coordinates are a linear map of their class's embedding, and a little noise; classes take turns."""
    draw = np.random.default_rng(0)
    labels = np.arange(80) % NUM_CLASSES
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pose = (unit @ draw.normal(0, 1, (WIDTH, 75))).reshape(NUM_CLASSES, 1, 1, 25, 3)
    frames = np.repeat(pose[labels], 3, axis=1).reshape(240, 1, 25, 3) + draw.normal(0, 0.05, (240, 1, 25, 3))
    known = replace(
        dataset,
        meta={**dataset.meta, "class_names": [f"action {number}" for number in range(NUM_CLASSES)]},
        labels=labels,
        names=np.array([f"clip{number:03d}" for number in range(80)]),
        frames=frames.astype(np.float32),
        offsets=3 * np.arange(81),
        num_bodies=np.ones(80, dtype=np.int64),
    )
    return Evaluation(None, known, SimpleNamespace(train=np.arange(50), test=np.arange(50, 80)), VIEW, progress=False)


@pytest.fixture
def file(tmp_path: Path, vectors) -> Path:
    np.save(tmp_path / "words.npy", vectors)
    return tmp_path / "words.npy"


@pytest.mark.parametrize("num, width", [(40, 6), (8, 30), (5, 5)], ids=["tall", "wide", "square"])
def test_ridge_of_scikit_learn(num, width) -> None:
    draw = np.random.default_rng(0)
    rows, targets, asked = draw.normal(2, 3, (num, width)), draw.normal(1, 1, (num, 4)), draw.normal(2, 3, (7, width))
    ridge = RidgeMap(torch.from_numpy(rows), torch.from_numpy(targets))
    for penalty in (1.0, 1e-3):
        oracle = Ridge(alpha=penalty * num * rows.var(0).sum(), solver="cholesky", tol=1e-12).fit(rows, targets)
        np.testing.assert_allclose(ridge(torch.from_numpy(asked), penalty).numpy(), oracle.predict(asked), rtol=1e-8)


def test_classes_never_shown_are_told_by_their_names(evaluation, file, tmp_path: Path) -> None:
    result = evaluate_zeroshot(evaluation, tmp_path / "out", embeddings=file, unseen=["action 2", "7", "action 5"])
    assert (result["top1"], result["mean_class"]) == (1.0, 1.0)
    assert result["unseen"] == ["action 2", "action 5", "action 7"]
    assert (result["num_train"], result["num_test"], result["num_test_seen"]) == (35, 9, 21)
    # those of other classes are left out, but not for want of a label
    assert (result["dropped_train"], result["dropped_test"]) == (0, 0)
    assert result["train_clips_of_unseen_classes"] == 15 and result["num_seen_classes"] == 7
    seen, unseen, harmonic = (result["generalised"][name] for name in ("seen", "unseen", "harmonic"))
    assert seen > 0.9 and unseen > 0.6
    assert harmonic == pytest.approx(2 * seen * unseen / (seen + unseen))
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(result))
    assert (tmp_path / "out" / "confusion.csv").exists()


def test_training_clips_of_unseen_classes_are_not_used(evaluation, file) -> None:
    result = evaluate_zeroshot(evaluation, embeddings=file, unseen=[2, 7])
    frames = evaluation.dataset.frames.copy()
    for clip in range(50):
        if evaluation.dataset.labels[clip] in (2, 7):
            frames[3 * clip : 3 * clip + 3] += 100
    spoilt = replace(evaluation, dataset=replace(evaluation.dataset, frames=frames))
    again = evaluate_zeroshot(spoilt, embeddings=file, unseen=[2, 7])
    for name in ("top1", "generalised", "penalty", "confusion"):
        assert again[name] == result[name]


def test_embeddings_of_other_classes_are_at_fault(evaluation, vectors, tmp_path: Path) -> None:
    right, wrong = vectors.copy(), vectors.copy()
    wrong[[2, 7]] = vectors[[7, 2]]
    for name, rows in (("right", right), ("wrong", wrong)):
        np.save(tmp_path / f"{name}.npy", rows)
    for name, top1 in (("right", 1.0), ("wrong", 0.0)):
        assert evaluate_zeroshot(evaluation, embeddings=tmp_path / f"{name}.npy", unseen=[2, 7])["top1"] == top1


def test_penalty_chosen_on_classes_kept_back() -> None:
    draw = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(12, 5, generator=draw, dtype=torch.float64), dim=1)
    labels = torch.arange(120) % 12
    rows = embeddings[labels] @ torch.randn(5, 40, generator=draw, dtype=torch.float64)
    # one wide direction that says nothing of the classes: a penalty that is too strong sees nothing else
    rows = rows + 60 * torch.randn(120, 1, generator=draw) @ torch.randn(1, 40, generator=draw)
    chosen = choose_ridge_penalty(rows, labels, embeddings)
    assert chosen in PENALTIES and chosen < 0.1
    # by hand, where noise makes a weak penalty fit the clips and not the classes
    rows = rows + 4 * torch.randn(120, 40, generator=draw, dtype=torch.float64)
    order, right = permutation(0, 0, 12, Use.SUBSET), []
    for penalty in PENALTIES:
        told = torch.zeros(120, dtype=torch.bool)
        for fold in range(5):
            kept = np.sort(order[fold::5])
            back = torch.isin(labels, torch.from_numpy(kept))
            fit = rows[~back].numpy()
            ridge = Ridge(alpha=penalty * len(fit) * fit.var(0).sum()).fit(fit, embeddings[labels[~back]].numpy())
            nearest = ridge.predict(rows[back].numpy()) @ embeddings[kept].T.numpy()
            told[back] = torch.from_numpy(kept[nearest.argmax(1)]) == labels[back]
        # the classes are equally frequent: the mean over clips is the mean over classes
        right.append(int(told.sum()))
    assert len(set(right)) > 1 and PENALTIES[right.index(max(right))] == choose_ridge_penalty(rows, labels, embeddings)
    with pytest.raises(ValueError, match="at least 4 classes, to keep two back, got 3"):
        choose_ridge_penalty(rows, labels % 3, embeddings)


def test_without_test_clips_of_seen_classes_nothing_is_generalised(evaluation, file) -> None:
    test = np.array([clip for clip in range(50, 80) if evaluation.dataset.labels[clip] in (2, 7)])
    only = replace(evaluation, split=SimpleNamespace(train=np.arange(50), test=test))
    result = evaluate_zeroshot(only, embeddings=file, unseen=[2, 7])
    assert result["generalised"]["seen"] is None and result["generalised"]["harmonic"] is None


def test_files_of_embeddings(tmp_path: Path) -> None:
    rows = np.array([[3.0, 4.0], [0.0, -2.0], [1.0, 0.0]])
    np.save(tmp_path / "a.npy", rows.astype(np.float32))
    np.savez(tmp_path / "a.npz", **dict(zip(["kick", "sit", "wave", "spare"], rows[[2, 0, 1, 0]])))
    (tmp_path / "a.json").write_text(json.dumps({"wave": [0, -2], "kick": [1, 0], "sit": [3, 4]}))
    for name in ("a.npy", "a.npz", "a.json"):
        np.testing.assert_allclose(read_embeddings(tmp_path / name, NAMES).numpy(), [[0.6, 0.8], [0, -1], [1, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.npy", np.ones((2, 4)), r"hold numbers \(3, E\), a row for each class, got float64 of shape \(2, 4\)"),
        ("a.npy", np.ones(3), r"of shape \(3,\)"),
        ("a.npy", np.array([["x"]] * 3), "got <U1"),
        ("a.npy", np.array([[1.0], [0.0], [2.0]]), "not zero, got class 'wave'"),
        ("a.npy", np.array([[1.0], [np.inf], [2.0]]), "finite vectors that are not zero, got class 'wave'"),
        ("a.npy", b"no array", "must be a"),
        ("a.npz", b"no archive", "must be a"),
        ("a.json", b"{", "be a readable file of embeddings"),
        ("a.json", b"[1]", "be an object of names and lists, got list"),
        ("a.json", b'{"sit": [1], "wave": [2], "kik": [3]}', r"none for 'kick' \(1 missing; names without a class: \['kik'\]\)"),
        ("a.json", b'{"sit": [1], "wave": [2, 3], "kick": [3]}', "hold vectors of one length"),
        ("a.json", b'{"sit": ["x"], "wave": ["y"], "kick": ["z"]}', "hold a list of numbers for each name"),
        ("a.txt", b"", r"end in .npy, .npz or .json, got '.txt'"),
    ],
)  # fmt: skip
def test_files_that_are_refused(name, content, message, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(ValueError, match=message) as caught:
        read_embeddings(path, NAMES)
    assert str(caught.value).startswith("read_embeddings: ") and str(path) in str(caught.value)


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"sit": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="be a file of plain arrays"):
        read_embeddings(tmp_path / "a.npy", NAMES)
    with pytest.raises(ValueError, match="be a readable file of embeddings"):
        read_embeddings(tmp_path / "missing.npy", NAMES)


def test_errors(evaluation, file) -> None:
    for change, message in [
        ({"unseen": [3]}, "two or more classes of the test part, got one"),
        ({"unseen": ["jump", 1]}, "got 'jump'"),
        ({"unseen": list(range(10))}, "leave classes to train on, got all of them"),
        ({"penalty": -1.0}, "penalty must be positive, got -1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate_zeroshot(evaluation, **{"embeddings": file, "unseen": [2, 7], **change})
    test = np.array([clip for clip in range(50, 80) if evaluation.dataset.labels[clip] != 2])
    without = replace(evaluation, split=SimpleNamespace(train=np.arange(50), test=test))
    with pytest.raises(ValueError, match="got 'action 2' without test clips"):
        evaluate_zeroshot(without, embeddings=file, unseen=[2, 7])
