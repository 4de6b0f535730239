"""Zero-shot recognition: features are mapped to text embeddings of class names, and classes never shown are told by them."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fastskel import philox
from fastskel.data.packed import checksum
from fastskel.evaluate.evaluation import TASKS, Evaluation, Task
from fastskel.evaluate.few_shot import class_numbers
from fastskel.evaluate.metrics import accuracy, confusion_matrix, mean_class_accuracy

__all__ = ["PENALTIES", "RidgeMap", "choose_ridge_penalty", "evaluate_zeroshot", "read_embeddings"]

# of the squared weights, in units of the total variance of the features, strongest first
PENALTIES = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
# a fifth of the classes that are shown stands in for those that are not, to choose the penalty, and each class once
FOLDS = 5


def _unreadable(contract: str, actual: str, path: Path, action: str) -> ValueError:
    return ValueError(f"read_embeddings: {path} must {contract}, got {actual}. {action}.")


def _stacked(vectors: dict[str, Any], class_names: Sequence[str], path: Path) -> NDArray[np.float64]:
    missing = [name for name in class_names if name not in vectors]
    if missing:
        spare = [name for name in vectors if name not in class_names]
        raise _unreadable(
            "have a vector for every class",
            f"none for {missing[0]!r} ({len(missing)} missing; names without a class: {spare[:3]})",
            path,
            "Use the data set's class names, see fastskel info",
        )
    try:
        rows = [np.asarray(vectors[name], dtype=np.float64) for name in class_names]
    except (TypeError, ValueError) as error:
        raise _unreadable("hold a list of numbers for each name", f"other values ({error})", path, "Correct it") from error
    shapes = sorted({row.shape for row in rows})
    if len(shapes) != 1 or len(shapes[0]) != 1:
        raise _unreadable("hold vectors of one length", f"shapes {shapes[:3]}", path, "Embed all names by one model")
    return np.stack(rows)


def read_embeddings(path: str | os.PathLike[str], class_names: Sequence[str]) -> Tensor:
    """Read text embeddings of the K classes.

    Args:
        path: A .npy file of an array (K, E), row k for class k; a .npz file of an array (E,) for each class name; or a
            .json file of a list of E numbers for each class name. Names beyond the K classes are passed over.
        class_names: K names.
    Returns:
        Unit vectors, (K, E), float64.
    Raises:
        ValueError: If the file cannot be read, a class has no vector, or a vector is zero, not finite, or of another length.
    """
    source = Path(path)
    try:
        if source.suffix == ".npy":
            rows = np.load(source, allow_pickle=False)
        elif source.suffix == ".npz":
            with np.load(source, allow_pickle=False) as archive:
                rows = _stacked({name: archive[name] for name in archive.files}, class_names, source)
        elif source.suffix == ".json":
            content = json.loads(source.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise _unreadable("be an object of names and lists", type(content).__name__, source, "Correct the file")
            rows = _stacked(content, class_names, source)
        else:
            raise _unreadable("end in .npy, .npz or .json", f"{source.suffix!r}", source, "Convert it")
    except (OSError, EOFError, RecursionError, UnicodeDecodeError, json.JSONDecodeError, zipfile.BadZipFile) as error:
        raise _unreadable("be a readable file of embeddings", f"{error}", source, "Correct the path or the file") from error
    except ValueError as error:
        if "read_embeddings" in str(error):
            raise
        raise _unreadable("be a file of plain arrays", f"{error}", source, "Save it anew") from error
    if rows.ndim != 2 or len(rows) != len(class_names) or rows.shape[1] < 1 or rows.dtype.kind not in "iuf":
        raise _unreadable(
            f"hold numbers ({len(class_names)}, E), a row for each class",
            f"{rows.dtype} of shape {rows.shape}",
            source,
            "Embed every class name, in the order of fastskel info",
        )
    rows = rows.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)))
    if len(bad):
        raise _unreadable("hold finite vectors that are not zero", f"class {class_names[bad[0]]!r}", source, "Embed it anew")
    return torch.from_numpy(rows / norms)


class RidgeMap:
    """Ridge regression of targets (N, E) on features (N, F), both centred, for any penalty, from one decomposition."""

    def __init__(self, features: Tensor, targets: Tensor) -> None:
        rows = features.to(torch.float64)
        targets = targets.to(torch.float64)
        self._mean, self._offset = rows.mean(0), targets.mean(0)
        rows, targets = rows - self._mean, targets - self._offset
        wide = rows.shape[1] > rows.shape[0]
        # the smaller of the two Gram matrices; with s the singular values, W = V (s^2 + a)^-1 s U' Y either way
        value, vector = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
        self._value = value.clamp_min(0)
        self._left = rows.T @ vector if wide else vector
        self._right = vector.T @ (targets if wide else rows.T @ targets)
        self._unit = float(self._value.sum()) or 1.0

    def __call__(self, features: Tensor, penalty: float) -> Tensor:
        """Map features (N, F) to targets (N, E), with a penalty in units of the total variance of the fitted features."""
        weight = self._left @ (self._right / (self._value + penalty * self._unit)[:, None])
        mapped: Tensor = (features.to(torch.float64) - self._mean) @ weight + self._offset
        return mapped


def _most_similar(mapped: Tensor, embeddings: Tensor, classes: Tensor) -> Tensor:
    """Class of the most similar embedding of the candidates (R,), (N,)."""
    return classes[(functional.normalize(mapped, dim=1) @ embeddings[classes].T).argmax(1)]


def _mean_class(predictions: Tensor, labels: Tensor, num_classes: int) -> float:
    return mean_class_accuracy(confusion_matrix(labels, predictions, num_classes))


def choose_ridge_penalty(features: Tensor, labels: Tensor, embeddings: Tensor, seed: int = 0) -> float:
    """Choose the penalty by which classes that are kept back are told apart best.

    The K' classes that occur are dealt out to five parts, fewer if a part would have one class, in the order of
    `philox.permutation(seed, 0, K', Use.SUBSET)`. Each part is kept back once and told apart by what the others teach; the
    strongest penalty wins among equals.

    Args:
        features: Of training clips, (N, F).
        labels: Their classes, (N,).
        embeddings: Of all classes, unit vectors (K, E).
        seed: Of the parts.
    Returns:
        The penalty, in units of the total variance.
    Raises:
        ValueError: If there are fewer than four classes.
    """
    classes = torch.unique(labels)
    if len(classes) < 4:
        raise ValueError(
            f"choose_ridge_penalty: labels must have at least 4 classes, to keep two back, got {len(classes)}. "
            "Pass a penalty."
        )
    order = torch.from_numpy(philox.permutation(seed, 0, len(classes), philox.Use.SUBSET))
    num_folds = min(FOLDS, len(classes) // 2)
    predictions = labels.new_empty(len(PENALTIES), len(labels))
    for fold in range(num_folds):
        kept = classes[order[fold::num_folds]].sort().values
        back = torch.isin(labels, kept)
        ridge = RidgeMap(features[~back], embeddings[labels[~back]])
        for row, penalty in enumerate(PENALTIES):
            predictions[row, back] = _most_similar(ridge(features[back], penalty), embeddings, kept)
    reached = [_mean_class(row, labels, len(embeddings)) for row in predictions]
    return PENALTIES[reached.index(max(reached))]


def evaluate_zeroshot(
    evaluation: Evaluation,
    out: str | os.PathLike[str] | None = None,
    *,
    embeddings: str | os.PathLike[str],
    unseen: Sequence[str | int],
    penalty: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Recognise test clips of classes that no training clip showed, by text embeddings of the class names.

    A ridge regression maps features to embeddings, fitted to the training clips of the other classes. A clip is given to the
    class whose embedding is most similar: among the unseen classes, and, in the generalised setting, among all.

    Args:
        evaluation: Encoder, clips, and how features (N, F) are computed.
        out: Folder for results.json, confusion.csv and confusion.png; None: nothing is written.
        embeddings: File of text embeddings of the class names, see `read_embeddings`.
        unseen: Names or numbers of the classes that are not shown.
        penalty: Of the ridge regression, in units of the total variance of the features; chosen on classes kept back from
            the training part if None.
        seed: Of the classes kept back.
    Returns:
        "top1" and "mean_class" of the clips of unseen classes among these; "generalised": mean class accuracy of "seen" and
        "unseen" among all classes, and their "harmonic" mean, None without test clips of classes that were shown;
        "confusion" (K, K) of the unseen classes; the record.
    Raises:
        ValueError: If the embeddings do not fit the classes, no class or no clip is left on either side, or the penalty is
            not positive.
    """
    if penalty is not None and not (penalty > 0 and math.isfinite(penalty)):
        raise ValueError(f"evaluate_zeroshot: penalty must be positive, got {penalty}. Leave it out.")
    names = evaluation.class_names
    hidden = torch.tensor(sorted(class_numbers(evaluation.dataset, unseen, "evaluate_zeroshot")))
    vectors = read_embeddings(embeddings, names)
    evaluation.check_unseen(
        np.flatnonzero(np.isin(evaluation.dataset.labels, hidden.numpy())), "the unseen classes", "Fine-tune on the others"
    )
    train, test = evaluation.features()
    shown = ~torch.isin(train.labels, hidden)
    absent = [names[number] for number in hidden.tolist() if not bool((test.labels == number).any())]
    if absent or len(hidden) < 2:
        raise ValueError(
            "evaluate_zeroshot: unseen must be two or more classes of the test part, got "
            f"{f'{absent[0]!r} without test clips' if absent else 'one'}. Choose others."
        )
    if not bool(shown.any()):
        raise ValueError("evaluate_zeroshot: unseen must leave classes to train on, got all of them. Name fewer.")
    features, labels = train.features[shown], train.labels[shown]
    chosen = penalty if penalty is not None else choose_ridge_penalty(features, labels, vectors, seed)
    mapped = RidgeMap(features, vectors[labels])(test.features, chosen)
    novel = torch.isin(test.labels, hidden)
    own = test.labels[novel]
    predictions = _most_similar(mapped[novel], vectors, hidden)
    among_all = _most_similar(mapped, vectors, torch.unique(torch.cat([labels, hidden])))
    # seen classes of the test part that the training part shows: the others could not be told at all
    told = ~novel & torch.isin(test.labels, labels)
    on_unseen = _mean_class(among_all[novel], own, len(names))
    on_seen = _mean_class(among_all[told], test.labels[told], len(names)) if bool(told.any()) else None
    harmonic = None if on_seen is None else 2 * on_seen * on_unseen / ((on_seen + on_unseen) or 1.0)
    confusion = confusion_matrix(
        torch.searchsorted(hidden, own), torch.searchsorted(hidden, predictions), len(hidden)
    )
    results = {
        "top1": accuracy(predictions, own),
        "mean_class": mean_class_accuracy(confusion),
        "generalised": {"seen": on_seen, "unseen": on_unseen, "harmonic": harmonic},
        "unseen": [names[number] for number in hidden.tolist()],
        "num_seen_classes": len(torch.unique(labels)),
        "num_test_seen": int(told.sum()),
        "penalty": chosen,
        "embeddings": str(embeddings),
        "embeddings_sha256": checksum(Path(embeddings)),
        "embedding_width": vectors.shape[1],
        **evaluation.record("zeroshot", train.index[shown], test.index[novel]),
        # clips of the other classes are not dropped
        "dropped_train": len(evaluation.split.train) - len(train),
        "dropped_test": len(evaluation.split.test) - len(test),
        "train_clips_of_unseen_classes": int((~shown).sum()),
    }
    return evaluation.finish(out, results, confusion, "zero-shot", results["unseen"])


TASKS.add("zeroshot", Task(evaluate_zeroshot))
