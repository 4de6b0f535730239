"""Which clips train and which test: the fields' protocols as rules over columns, split files, fractions, holdouts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastskel.data.packed import PackedDataset
from fastskel.registry import Registry

__all__ = ["NTU_NOVEL_CLASSES", "PROTOCOLS", "Split", "holdout", "protocols", "semi", "split"]

# training subjects of NTU RGB+D 120; those up to 40 are the training subjects of NTU RGB+D 60
# fmt: off
NTU_TRAIN_SUBJECTS = (
    1, 2, 4, 5, 8, 9, 13, 14, 15, 16, 17, 18, 19, 25, 27, 28, 31, 34, 35, 38, 45, 46, 47, 49, 50, 52, 53, 54, 55,
    56, 57, 58, 59, 70, 74, 78, 80, 81, 82, 83, 84, 85, 86, 89, 91, 92, 93, 94, 95, 97, 98, 100, 103,
)
# fmt: on
_NTU_60_SUBJECTS = 40
# A001, A007, .., A115: the classes that one-shot recognition of NTU RGB+D 120 keeps out of the training
NTU_NOVEL_CLASSES = tuple(range(0, 120, 6))
# of the small data sets, which have no such protocol: every third class, where NTU RGB+D 120 has every sixth
_NOVEL_EVERY = 3
_NTU_TRAIN_CAMERAS = (2, 3)
_UCLA_TRAIN_CAMERAS = (1, 2)
_UCLA_TEST_SUBJECT = 10
_UTKINECT_TEST_SUBJECT = 10
_PKU_TRAIN_CAMERAS = ("M", "R")
# pairs (actor, partner) that test in each fold, after the notes of SBU
_SBU_FOLDS = (
    ((1, 2), (3, 4), (5, 2), (6, 4)),
    ((2, 3), (2, 7), (3, 5), (5, 3)),
    ((1, 3), (1, 7), (7, 1), (7, 3)),
    ((2, 1), (2, 6), (3, 2), (3, 6)),
    ((4, 2), (4, 3), (4, 6), (6, 2), (6, 3)),
)
# subjects of UAV-Human that test, of 0 to 118
# fmt: off
_UAV_TEST_SUBJECTS = {
    "xsub-v1": (
        1, 3, 4, 9, 22, 23, 24, 31, 41, 54, 58, 60, 66, 72, 74, 75, 91, 92, 93, 94, 95, 96, 97, 99, 101, 104, 107, 108, 109, 113,
    ),
    "xsub-v2": (
        1, 2, 7, 9, 13, 15, 17, 23, 25, 27, 28, 33, 34, 41, 42, 48, 50, 51, 53, 55, 58, 65, 68, 76, 82, 85, 90, 98, 105, 116,
    ),
}
# fmt: on
# rules that let one subject test, which a user may choose: "xsub:3"
_ONE_SUBJECT = ("nw-ucla/xsub", "utkinect/xsub")


@dataclass(frozen=True)
class Split:
    """Clip indices of the two parts, ascending, apart from each other.

    Attributes:
        train: (k,), int64.
        test: (l,), int64.
    """

    train: NDArray[np.int64]
    test: NDArray[np.int64]


# a rule says for each clip whether it trains, (n,) bool
PROTOCOLS: Registry[Callable[[PackedDataset], NDArray[np.bool_]]] = Registry("protocol")


@PROTOCOLS.register("utd-mhad/xsub")
def _utd_xsub(dataset: PackedDataset) -> NDArray[np.bool_]:
    return np.asarray(_clip_column(dataset, "subject") % 2 == 1)


@PROTOCOLS.register("nw-ucla/xview")
@PROTOCOLS.register("nw-ucla/xview-clean")
def _ucla_xview(dataset: PackedDataset) -> NDArray[np.bool_]:
    return np.isin(_clip_column(dataset, "camera"), _UCLA_TRAIN_CAMERAS)


@PROTOCOLS.register("nw-ucla/xsub")
def _ucla_xsub(dataset: PackedDataset) -> NDArray[np.bool_]:
    # the data set's paper leaves one of its ten subjects out without a fixed choice: the last one is our convention
    return np.asarray(_clip_column(dataset, "subject") != _UCLA_TEST_SUBJECT)


@PROTOCOLS.register("ntu-60/xsub")
@PROTOCOLS.register("ntu60/xsub")
def _ntu_60_xsub(dataset: PackedDataset) -> NDArray[np.bool_]:
    train = [subject for subject in NTU_TRAIN_SUBJECTS if subject <= _NTU_60_SUBJECTS]
    return np.isin(_clip_column(dataset, "subject"), train)


@PROTOCOLS.register("ntu-60/xview")
@PROTOCOLS.register("ntu60/xview")
def _ntu_60_xview(dataset: PackedDataset) -> NDArray[np.bool_]:
    return np.isin(_clip_column(dataset, "camera"), _NTU_TRAIN_CAMERAS)


@PROTOCOLS.register("ntu-120/xsub")
@PROTOCOLS.register("ntu120/xsub")
def _ntu_120_xsub(dataset: PackedDataset) -> NDArray[np.bool_]:
    return np.isin(_clip_column(dataset, "subject"), NTU_TRAIN_SUBJECTS)


@PROTOCOLS.register("ntu-120/xset")
@PROTOCOLS.register("ntu120/xset")
def _ntu_120_xset(dataset: PackedDataset) -> NDArray[np.bool_]:
    return np.asarray(_clip_column(dataset, "setup") % 2 == 0)


@PROTOCOLS.register("ntu-120/one-shot")
@PROTOCOLS.register("ntu120/one-shot")
def _ntu_120_one_shot(dataset: PackedDataset) -> NDArray[np.bool_]:
    return ~np.isin(dataset.labels, NTU_NOVEL_CLASSES)


@PROTOCOLS.register("utd-mhad/one-shot")
@PROTOCOLS.register("nw-ucla/one-shot")
def _every_third_class(dataset: PackedDataset) -> NDArray[np.bool_]:
    return np.asarray(dataset.labels % _NOVEL_EVERY != 0)


@PROTOCOLS.register("utkinect/xsub")
def _utkinect_xsub(dataset: PackedDataset) -> NDArray[np.bool_]:
    # the field leaves each of the ten subjects out in turn: the last one is our convention
    return np.asarray(_clip_column(dataset, "subject") != _UTKINECT_TEST_SUBJECT)


def _sbu_fold(dataset: PackedDataset, pairs: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    actor, partner = _clip_column(dataset, "actor"), _clip_column(dataset, "partner")
    tests = np.any([(actor == first) & (partner == second) for first, second in pairs], axis=0)
    return np.asarray(~tests)


for _number, _pairs in enumerate(_SBU_FOLDS, 1):
    PROTOCOLS.add(f"sbu/fold{_number}", partial(_sbu_fold, pairs=_pairs))


def _uav_xsub(dataset: PackedDataset, subjects: Sequence[int]) -> NDArray[np.bool_]:
    return ~np.isin(_clip_column(dataset, "subject"), subjects)


for _version, _subjects in _UAV_TEST_SUBJECTS.items():
    PROTOCOLS.add(f"uav-human/{_version}", partial(_uav_xsub, subjects=_subjects))


@PROTOCOLS.register("penn-action/official")
@PROTOCOLS.register("kinetics-skeleton/official")
def _official(dataset: PackedDataset) -> NDArray[np.bool_]:
    train = _clip_column(dataset, "train")
    if (train < 0).any():
        actual = f"clip {str(dataset.names[int(np.argmax(train < 0))])!r} in neither part"
        raise _fault("column 'train'", actual, dataset, "Pack the folders kinetics_train and kinetics_val")
    return np.asarray(train == 1)


@PROTOCOLS.register("pku-mmd/xview")
def _pku_xview(dataset: PackedDataset) -> NDArray[np.bool_]:
    return np.isin(_clip_column(dataset, "camera"), _PKU_TRAIN_CAMERAS)


@PROTOCOLS.register("pku-mmd/xsub")
def _pku_xsub(dataset: PackedDataset) -> NDArray[np.bool_]:
    raise _fault(
        "the protocol's list of videos",
        "none: PKU-MMD gives its cross-subject parts as a list, not as a rule",
        dataset,
        "Pass the list that comes with the data set as split_file, or pack it into splits.json",
    )


def protocols(dataset: PackedDataset) -> list[str]:
    """Return the names of the protocols that `split` knows for the n clips of a data set, sorted."""
    rules = {name.split("/")[1] for name in PROTOCOLS if name.split("/")[0] == dataset.source}
    return sorted(rules | set(dataset.splits))


def split(
    dataset: PackedDataset,
    protocol: str,
    split_file: str | os.PathLike[str] | tuple[str | os.PathLike[str], str | os.PathLike[str]] | None = None,
) -> Split:
    """Split the n clips of a data set into training and test part.

    Args:
        dataset: Packed data set.
        protocol: A protocol of its `splits.json`, else a rule for its source: utd-mhad xsub (odd subjects train);
            nw-ucla xview (cameras 1 and 2 train), xview-clean (the same without the test clips that repeat a training
            clip), xsub (subject 10 tests; "xsub:3" lets subject 3 test); ntu60 xsub, xview (cameras 2 and 3 train);
            ntu120 xsub, xset (even setups train), one-shot (classes A1, A7, .., A115 test); ntu-60 and ntu-120 are other
            names of the two; utd-mhad and nw-ucla one-shot (every third class tests: our own, after that of ntu120);
            pku-mmd xview, xsub (from a list); sbu fold1 to fold5 (pairs of actors); utkinect xsub (subject 10 tests;
            "xsub:3" lets subject 3 test); uav-human xsub-v1, xsub-v2; penn-action and kinetics-skeleton official.
        split_file: The user's own split instead: a JSON file {"train": [...], "test": [...]} of clip names or indices,
            or two text files, train and test, of one clip name per line.
    Returns:
        Indices of the training clips, (k,), and of the test clips, (l,).
    Raises:
        ValueError: If the protocol, a column or a clip is unknown, a clip is in both parts, or a part is empty.
    """
    if split_file is not None:
        return _from_file(dataset, split_file)
    if protocol in dataset.splits:
        parts = dataset.splits[protocol]
        if not {"train", "test"} <= set(parts):
            raise _fault(f"splits.json {protocol!r}", f"only {sorted(parts)}", dataset, "Name its parts train and test")
        return _checked(dataset, protocol, parts["train"], parts["test"])
    name, _, subject = protocol.partition(":")
    rule = f"{dataset.source}/{name}"
    if rule not in PROTOCOLS or (subject and (rule not in _ONE_SUBJECT or not subject.isdecimal())):
        known = ", ".join(protocols(dataset)) or "none"
        raise ValueError(
            f"split: protocol must be one of those for {dataset.source!r} ({known}), got {protocol!r}, "
            f"in {dataset.path}. Choose one or pass split_file."
        )
    train = _clip_column(dataset, "subject") != int(subject) if subject else PROTOCOLS[rule](dataset)
    parts = {"train": np.flatnonzero(train), "test": np.flatnonzero(~train)}
    if name == "xview-clean":
        parts["test"] = _unseen(dataset, parts["train"], parts["test"])
    return _checked(dataset, protocol, parts["train"], parts["test"])


def semi(
    train: NDArray[np.int64],
    labels: NDArray[np.int64],
    fraction: float,
    seed: int,
) -> NDArray[np.int64]:
    """Choose the labelled part of the training clips for semi-supervised evaluation, as the reference does.

    Args:
        train: Training clips, (k,); those labelled -1 are left out first.
        labels: Class of every clip of the data set, (n,), -1 where unknown.
        fraction: Part to keep, in (0, 1].
        seed: Seed of the permutation.
    Returns:
        The first int(k * fraction) clips of a permutation of the k labelled ones, whatever their classes, ascending, (l,).
    Raises:
        ValueError: If the fraction is out of range or leaves nothing.
    """
    from fastskel.philox import Use, permutation

    if not 0 < fraction <= 1:
        raise ValueError(f"semi: fraction must be in (0, 1], got {fraction}. Choose another.")
    train = train[labels[train] != -1]
    count = int(len(train) * fraction)
    if count == 0:
        raise ValueError(
            f"semi: fraction must leave at least one of {len(train)} clips with a label, got {fraction}. Raise it."
        )
    return np.sort(train[permutation(seed, 0, len(train), Use.SUBSET)[:count]])


def holdout(
    dataset: PackedDataset,
    train: NDArray[np.int64],
    *,
    column: str = "subject",
    values: Sequence[Any] | None = None,
    fraction: float = 0.2,
    seed: int = 0,
) -> Split:
    """Cut a validation part from the training clips by whole values of a column, such as whole subjects.

    Args:
        dataset: Packed data set of n clips.
        train: Training clips, (k,).
        column: Per-clip column.
        values: Its values to validate on; None: a random `fraction` of those in the training part, at least one.
        fraction: Part of the values, in (0, 1).
        seed: Seed of the choice.
    Returns:
        The remaining training clips as `train`, (l,), the validation clips as `test`, (k - l,).
    Raises:
        ValueError: If the column or a value is unknown, or a part would be empty.
    """
    from fastskel.philox import Use, permutation

    column_values = _clip_column(dataset, column)[train]
    known = np.unique(column_values)
    if values is None:
        if not 0 < fraction < 1:
            raise ValueError(f"holdout: fraction must be in (0, 1), got {fraction}. Choose another.")
        count = max(1, round(len(known) * fraction))
        values = known[permutation(seed, 0, len(known), Use.SUBSET)[:count]].tolist()
    absent = [value for value in values if value not in known.tolist()]
    if absent:
        raise _fault(f"values of {column!r}", f"{absent}, not in {known.tolist()}", dataset, "Choose among these")
    held = np.isin(column_values, values)
    return _checked(dataset, f"holdout of {column} {list(values)}", train[~held], train[held])


def _fault(argument: str, actual: str, where: PackedDataset | Path, action: str) -> ValueError:
    path = where.path if isinstance(where, PackedDataset) else where
    return ValueError(f"split: {argument} must fit the data set, got {actual}, in {path}. {action}.")


def _clip_column(dataset: PackedDataset, name: str) -> NDArray[Any]:
    column = dataset.column(name)
    if dataset.per_frame(name):
        raise _fault(f"column {name!r}", "one value per frame", dataset, "Pass one value per clip when packing")
    return column


def _unseen(dataset: PackedDataset, train: NDArray[np.int64], test: NDArray[np.int64]) -> NDArray[np.int64]:
    def content(index: int) -> bytes:
        return hashlib.sha256(dataset.clip(index).tobytes()).digest()

    seen = {content(int(index)) for index in train}
    return np.array([index for index in test if content(int(index)) not in seen], dtype=np.int64)


def _checked(dataset: PackedDataset, protocol: str, train: NDArray[np.int64], test: NDArray[np.int64]) -> Split:
    shared = np.intersect1d(train, test)
    if len(shared):
        actual = f"clip {str(dataset.names[shared[0]])!r} in both parts"
        raise _fault(f"protocol {protocol!r}", actual, dataset, "Remove it from one")
    for part, indices in (("train", train), ("test", test)):
        if len(indices) == 0:
            raise _fault(f"protocol {protocol!r}", f"an empty {part} part", dataset, "Pack the missing clips")
    return Split(np.sort(train).astype(np.int64), np.sort(test).astype(np.int64))


def _from_file(dataset: PackedDataset, split_file: Any) -> Split:
    if isinstance(split_file, (tuple, list)):
        paths = [Path(path) for path in split_file]
        if len(paths) != 2:
            raise ValueError(
                f"split: split_file must be one JSON or two text files, got {len(paths)}. Pass train and test."
            )
        members = [_text(path).split("\n") for path in paths]
        parts = [[line.strip() for line in lines if line.strip()] for lines in members]
    else:
        paths = [Path(split_file)] * 2
        text = _text(paths[0])
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _fault("split_file", f"unreadable JSON ({error})", paths[0], "Correct the file") from error
        if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in ("train", "test")):
            raise _fault("split_file", "no lists under train and test", paths[0], "Add them")
        parts = [content["train"], content["test"]]
    train, test = (_indices(dataset, part, path) for part, path in zip(parts, paths, strict=True))
    return _checked(dataset, str(split_file), train, test)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _fault("split_file", f"an unreadable one ({error})", path, "Correct the path or the file") from error


def _indices(dataset: PackedDataset, members: Sequence[Any], path: Path) -> NDArray[np.int64]:
    index = {str(name): number for number, name in enumerate(dataset.names)}
    found: list[int] = []
    for member in members:
        number = index.get(member, -1) if isinstance(member, str) else member if type(member) is int else -1
        if not 0 <= number < len(dataset):
            raise _fault("split_file", f"the clip {member!r}", path, f"Use names or indices of {dataset.path}")
        found.append(number)
    if len(set(found)) != len(found):
        twice = next(number for number in found if found.count(number) > 1)
        raise _fault("split_file", f"clip {str(dataset.names[twice])!r} twice", path, "Remove one")
    return np.array(found, dtype=np.int64)
