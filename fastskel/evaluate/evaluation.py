"""What every evaluation is given, and what every result records; the tasks are registered here by name."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastskel.data.identity import dataset_identity, split_identity
from fastskel.data.packed import PackedDataset
from fastskel.data.protocols import Split
from fastskel.data.views import ViewSpec
from fastskel.evaluate.features import FeatureSet, dataset_features, labels_of, raw_features
from fastskel.evaluate.report import confusion_csv, confusion_figure, write_results
from fastskel.evaluate.seen import SeenClips, labels_seen
from fastskel.models.encoder import Encoder
from fastskel.provenance import provenance
from fastskel.registry import Registry

__all__ = ["TASKS", "Evaluation", "Task"]


def names_of(dataset: PackedDataset, labels: NDArray[Any]) -> list[str]:
    """Names of the K classes that labels (N,) are of; their numbers where the data set does not name them."""
    return dataset.class_names or [f"class {number}" for number in range(int(np.max(labels, initial=-1)) + 1)]


@dataclass(frozen=True)
class Evaluation:
    """An encoder, the clips it is tried on, and how its features are computed.

    Attributes:
        encoder: Encoder, or None for the raw coordinates (N, T*M*V*C).
        dataset: Packed data set; clips labelled -1 are left out and counted.
        split: Clips to train and to test on.
        view: View to encode.
        protocol: Name of the split, for the record.
        run: Where the encoder comes from, for the record.
        batch_size: Clips per forward pass.
        device: Where encoder and classifiers run.
        num_threads: Threads of the loader.
        cache: Folder for cached features; None: no cache. Raw coordinates are not cached.
        precision: "fp32" or "bf16", of the encoder.
        progress: Show progress bars.
        trained_on: Clips that the encoder was trained on, (n,), to count those of the test among them; None: not known.
        seen: What it was trained on, by data set: clips whose labels it saw are not tested. None: not known. See `seen_by`.
    """

    encoder: Encoder | None
    dataset: PackedDataset
    split: Split
    view: ViewSpec
    protocol: str | None = None
    run: str | None = None
    batch_size: int = 256
    device: torch.device | str = "cpu"
    num_threads: int = 1
    cache: str | os.PathLike[str] | None = None
    precision: str = "fp32"
    progress: bool = True
    trained_on: NDArray[np.int64] | None = None
    seen: tuple[SeenClips, ...] | None = None

    @property
    def class_names(self) -> list[str]:
        """Names of the K classes; their numbers where the data set does not name them."""
        return names_of(self.dataset, self.dataset.labels)

    @property
    def encoder_name(self) -> str:
        """What the features come from."""
        return "raw coordinates" if self.encoder is None else type(self.encoder).__name__

    def known(self, part: Literal["train", "test"]) -> NDArray[np.int64]:
        """Labelled clips of a part of the split, (N,).

        Raises:
            ValueError: If there are none, a clip is in both parts, the encoder was made for another skeleton, number of
                bodies or channels, or it saw labels of the test part.
        """
        self.check_fit()
        shared = np.intersect1d(self.split.train, self.split.test)
        if shared.size:
            raise ValueError(
                f"evaluate: the parts of the split must be apart, got {shared.size} clips in both, such as "
                f"{self.dataset.names[shared[0]]!s}. Correct the split."
            )
        indices = np.asarray(getattr(self.split, part), dtype=np.int64)
        known = indices[np.asarray(self.dataset.labels)[indices] >= 0]
        if known.size == 0:
            raise ValueError(
                f"evaluate: the {part} split of {self.dataset.path} must have labelled clips, got {indices.size} clips, none "
                "labelled. Check the protocol and the labels."
            )
        if part == "test":
            self.check_unseen(known)
        return known

    def check_unseen(
        self, clips: NDArray[np.int64], of: str = "the test part", advice: str = "Use the protocol of the fine-tuning"
    ) -> None:
        """Look for clips (N,) among those that the encoder was trained on with labels.

        Raises:
            ValueError: If it saw labels of some, naming one; it ends with the advice.
        """
        clips = np.asarray(clips, np.int64)
        shared, _ = labels_seen(self.seen, self.dataset, clips)
        if shared.size:
            raise ValueError(
                f"evaluate: {self.run or 'the encoder'} must not have seen labels of {of}, got {shared.size} of {len(clips)} "
                f"clips that it was fine-tuned on, such as {self.dataset.names[shared[0]]!s}. {advice}."
            )

    def check_fit(
        self, advice: str = "Use evaluate transfer, which adapts them, or convert the data (fastskel convert)"
    ) -> None:
        """Compare the encoder with the clips (T, M, V, C).

        Raises:
            ValueError: If it was made for another skeleton, number of bodies or channels; it ends with the advice.
        """
        wanted, dataset = self.encoder.shape if self.encoder is not None else None, self.dataset
        pairs: list[tuple[str, object, object]] = [("skeleton", self.view.topology, dataset.topology.name)]
        if wanted is not None:
            pairs += list(zip(("bodies", "joints", "channels"), wanted[1:], dataset.frames.shape[1:], strict=True))
        misfits = [f"{name} {own} for {there}" for name, own, there in pairs if own not in (None, there)]
        if misfits:
            raise ValueError(
                f"evaluate: the encoder must be made for clips like those of {dataset.path}, got {', '.join(misfits)}. "
                f"{advice}."
            )

    def features_of(self, indices: NDArray[np.int64]) -> FeatureSet:
        """Features (N, F) of clips (N,), labelled or not, from the cache where they are."""
        if self.encoder is None:
            return raw_features(
                self.dataset, self.view, indices,
                batch_size=self.batch_size, num_threads=self.num_threads, progress=self.progress,
            )  # fmt: skip
        return dataset_features(
            self.encoder, self.dataset, self.view, indices, batch_size=self.batch_size, device=self.device,
            num_threads=self.num_threads, cache=self.cache, precision=self.precision, progress=self.progress,
        )  # fmt: skip

    def features(self) -> tuple[FeatureSet, FeatureSet]:
        """Features of the labelled clips of training and test part, (N, F) each.

        Raises:
            ValueError: If a part has no labelled clip.
        """
        train, test = self.known("train"), self.known("test")
        return self.features_of(train), self.features_of(test)

    def labels_of(self, clips: NDArray[np.int64]) -> Tensor:
        """Labels of clips (N,), -1 where unknown."""
        return labels_of(self.dataset, clips)

    def groups(self, index: Tensor, column: str = "subject") -> Tensor | None:
        """Number the values that a per-clip column has for clips (N,); None where the data set has no such column."""
        if column not in self.dataset.columns or self.dataset.per_frame(column):
            return None
        values = np.asarray(self.dataset.columns[column])[index.numpy()]
        return torch.from_numpy(np.unique(values, return_inverse=True)[1].reshape(-1))

    def record(self, task: str, train: Tensor, test: Tensor) -> dict[str, Any]:
        """Say what was evaluated, on which training and test clips, (N,) each, and by which versions."""
        seen = None if self.trained_on is None else int(np.isin(test.numpy(), self.trained_on).sum())
        raw = self.view.frames * math.prod(self.dataset.frames.shape[1:])
        return {
            "task": task,
            "protocol": self.protocol,
            "split_sha256": split_identity(self.split),
            "run": self.run,
            "encoder": self.encoder_name,
            "num_features": raw if self.encoder is None else self.encoder.num_features,
            "num_train": len(train),
            "num_test": len(test),
            "dropped_train": len(self.split.train) - len(train),
            "dropped_test": len(self.split.test) - len(test),
            "test_clips_trained_on": seen,
            "test_labels_not_known": "; ".join(labels_seen(self.seen, self.dataset, test.numpy())[1]) or None,
            "num_classes": len(self.class_names),
            "precision": self.precision,
            "view": repr(self.view),
            "dataset": {
                "path": str(self.dataset.path),
                "source": self.dataset.meta.get("source"),
                "num_clips": len(self.dataset),
                "sha256": dataset_identity(self.dataset),
            },
            **provenance(),
        }

    def title(self, task: str) -> str:
        """Head of a picture: task, encoder, data set and protocol."""
        source = str(self.dataset.meta.get("source") or self.dataset.path.name)
        return f"{task}, {self.encoder_name}, {' '.join(part for part in (source, self.protocol) if part)}"

    def finish(
        self,
        out: str | os.PathLike[str] | None,
        results: dict[str, Any],
        confusion: Tensor,
        title: str,
        class_names: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Add the confusion matrix to the results of a classification, and write both.

        Args:
            out: Folder for results.json, confusion.csv and confusion.png; None: nothing is written.
            results: All but the matrix.
            confusion: Counts, (K, K).
            title: What classified, for the picture.
            class_names: Names of the K classes; those of the data set if None.
        """
        results = {**results, "confusion": confusion.tolist()}
        if out is not None:
            folder, names = Path(out), self.class_names if class_names is None else class_names
            folder.mkdir(parents=True, exist_ok=True)
            confusion_csv(folder / "confusion.csv", confusion, names)
            confusion_figure(folder / "confusion.png", confusion, names, self.title(title))
            # last: a folder with results is complete
            write_results(folder / "results.json", results)
        return results


@dataclass(frozen=True)
class Task:
    """A downstream task.

    Attributes:
        run: Called with an `Evaluation`, a folder for results or None, and settings; returns the results.
        needs: The `Features` that it reads, besides those that every encoder has.
    """

    run: Callable[..., dict[str, Any]]
    needs: tuple[str, ...] = ("pooled",)


TASKS: Registry[Task] = Registry("task")
