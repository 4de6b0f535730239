"""What a run folder holds: record, log, results, and the data sets that they name."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastskel.data.identity import dataset_identity
from fastskel.data.packed import PackedDataset, open_dataset
from fastskel.evaluate.report import Curve, read_log

__all__ = ["Found", "Problem", "Result", "class_names", "open_datasets", "read_confusion", "read_run", "trained_identity"]

Made = TypeVar("Made")
CONFIG_FILE, LOG_FILE, RESULTS_FILE, CONFUSION_FILE = "config.json", "log.jsonl", "results.json", "confusion.csv"


@dataclass(frozen=True)
class Problem:
    """Something that the page cannot show: where, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class Result:
    """What one evaluation left behind.

    Attributes:
        path: Its results.json.
        values: What that holds.
    """

    path: Path
    values: Mapping[str, Any]

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.values.get("task") or "unknown task")

    @property
    def dataset(self) -> Mapping[str, Any]:
        """What the result says of its data set."""
        told = self.values.get("dataset")
        return told if isinstance(told, dict) else {}

    @property
    def encoder(self) -> str:
        """What the features come from; of a fusion, of each run."""
        told = self.values.get("encoder") or ""
        return " + ".join(map(str, told)) if isinstance(told, list) else str(told)

    @property
    def data(self) -> str:
        """Data set and protocol, in words."""
        source = self.dataset.get("source") or self.dataset.get("path") or "unknown data"
        return f"{source}, {self.values.get('protocol') or 'no protocol'}"

    @property
    def identity(self) -> str | None:
        """Digest of its data set."""
        told = self.dataset.get("sha256")
        return told if isinstance(told, str) else None


@dataclass
class Found:
    """A run as it was found.

    Attributes:
        run: Run folder, or published file.
        config: Record of the training, {} without one.
        curves: Logged numbers, steps and values (S,) each.
        results: Of every evaluation, by task, then by path.
        problems: What could not be read.
    """

    run: Path
    config: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def note(self, where: str | os.PathLike[str], reason: str) -> None:
        """Remember what cannot be shown."""
        self.problems.append(Problem(str(where), reason))

    def attempt(self, where: str | os.PathLike[str], what: str, make: Callable[[], Made]) -> Made | None:
        """Make a part of the page; one that cannot be made becomes a problem, and the page goes on without it."""
        try:
            return make()
        # results are files that anyone may have written: they can be of any shape
        except Exception as error:
            reason = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
            self.note(where, f"{what} cannot be shown: {reason}")
            return None

    @property
    def base(self) -> Path:
        """Folder that holds the results."""
        return self.run.with_name(f"{self.run.name}-results") if self.run.is_file() else self.run


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _read_object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    return content


def read_run(run: str | os.PathLike[str], more: Sequence[str | os.PathLike[str]] = ()) -> Found:
    """Read a run folder, or the results beside a published file; what is damaged becomes a problem.

    Args:
        run: Run folder, or published .pth.tar.
        more: Further folders to search for results, at any depth.
    Raises:
        ValueError: If there is no run and no result, or a further folder is missing.
    """
    given = Path(run)
    found = Found(given)
    base = found.base
    # a fine-tuned classifier is a run that lies beside its own results
    own = [base / RESULTS_FILE] if (base / RESULTS_FILE).is_file() else []
    paths = own + sorted({*base.glob(f"*/{RESULTS_FILE}"), *base.glob(f"*-results/*/{RESULTS_FILE}")})
    for folder in map(Path, more):
        if not folder.is_dir():
            raise ValueError(f"report: results must be folders, got {folder}. Correct the path.")
        known = {path.resolve() for path in paths}
        paths += [path for path in sorted(folder.rglob(RESULTS_FILE)) if path.resolve() not in known]
    if not (base / CONFIG_FILE).is_file() and not paths:
        raise ValueError(
            f"report: run must be a run folder with {CONFIG_FILE}, or have results, got {given} without either. "
            "Give the folder that `fastskel pretrain` wrote."
        )
    if not given.is_file():
        _read_training(base, found)
    for path in paths:
        try:
            content = _read_object(path)
        except (OSError, ValueError, RecursionError) as error:
            found.note(path, f"the result cannot be read: {error}")
            continue
        # the summary of a demonstration has no task
        if "task" in content:
            found.results.append(Result(path, content))
        else:
            found.note(path, 'it is not the result of a task: it has no "task"')
    found.results.sort(key=lambda result: (result.task, str(result.path)))
    return found


def _read_training(run: Path, found: Found) -> None:
    try:
        found.config = _read_object(run / CONFIG_FILE)
    except (OSError, ValueError, RecursionError) as error:
        found.note(run / CONFIG_FILE, f"the record of the training cannot be read: {error}")
    try:
        found.curves = read_log(run / LOG_FILE)
    except (OSError, ValueError, RecursionError) as error:
        found.note(run / LOG_FILE, f"the log of the training cannot be read: {error}")


def trained_identity(config: Mapping[str, Any]) -> str | None:
    """Digest of the data set that a run was trained on."""
    identity = config.get("identity")
    told = identity.get("data") if isinstance(identity, dict) else None
    return told if isinstance(told, str) else None


def open_datasets(found: Found, data: str | os.PathLike[str] | None) -> dict[str, PackedDataset]:
    """Open the data sets of n clips, (T, M, V, C) each, that a run names, by their digest; the given one comes first.

    A recorded path counts only if what lies there is what was recorded. What cannot be opened becomes a problem.

    Raises:
        ValueError: If the given data set is damaged or missing.
    """
    opened: dict[str, PackedDataset] = {}
    if data is not None:
        dataset = open_dataset(data)
        opened[dataset_identity(dataset)] = dataset
    recorded = [(trained_identity(found.config), found.config.get("data"))]
    recorded += [(result.identity, result.dataset.get("path")) for result in found.results]
    for identity, path in dict.fromkeys((i, p) for i, p in recorded if isinstance(i, str) and isinstance(p, str)):
        if identity in opened:
            continue
        try:
            dataset = open_dataset(path)
            if (actual := dataset_identity(dataset)) != identity:
                raise ValueError(f"it is another data set than the run recorded, {actual[:12]}.. instead of {identity[:12]}..")
        except (OSError, ValueError) as error:
            found.note(path, f"pictures of these data are left out: {error} Give the data set with --data.")
            continue
        opened[identity] = dataset
    return opened


def class_names(result: Result, datasets: Mapping[str, PackedDataset]) -> list[str]:
    """Names of the classes of a result: its own, or those of its data set; [] without any."""
    own = result.values.get("class_names")
    if isinstance(own, list):
        return [str(name) for name in own]
    dataset = datasets.get(result.identity or "")
    return [] if dataset is None else list(dataset.class_names)


def read_confusion(path: Path) -> tuple[list[str], list[list[int]]]:
    """Read class names and counts, (K, K), from a confusion.csv.

    Raises:
        ValueError: If it is no square table of counts.
    """
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = list(csv.reader(file)) or [[]]
    counts = [[int(cell) for cell in row[1:]] for row in rows]
    if not counts or {len(row) for row in counts} != {len(head) - 1} or len(counts) != len(head) - 1:
        raise ValueError(f"{path} is no square table of counts")
    return head[1:], counts
