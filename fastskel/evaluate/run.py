"""Whole evaluations: features of a split, a classifier on them, results and pictures in a folder."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastskel.data.identity import dataset_identity
from fastskel.data.packed import PackedDataset
from fastskel.data.protocols import Split
from fastskel.data.views import ViewSpec
from fastskel.evaluate.features import FeatureSet, dataset_features, raw_features
from fastskel.evaluate.knn import knn_rank
from fastskel.evaluate.linear import LinearConfig, linear_probe
from fastskel.evaluate.metrics import accuracy, confusion_matrix, mean_class_accuracy
from fastskel.evaluate.report import confusion_csv, confusion_figure, write_results
from fastskel.models.encoder import Encoder
from fastskel.provenance import provenance

__all__ = ["evaluate_knn", "evaluate_linear", "split_features"]

NUM_RANKED = 5


def _known(function: str, part: str, dataset: PackedDataset, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of labelled clips, (N,); refuses to be left with none."""
    indices = np.asarray(indices, dtype=np.int64)
    known = indices[np.asarray(dataset.labels)[indices] >= 0]
    if known.size == 0:
        raise ValueError(
            f"{function}: the {part} split of {dataset.path} must have labelled clips, got {indices.size} clips, none "
            "labelled. Check the protocol and the labels."
        )
    return known


def _class_names(dataset: PackedDataset) -> list[str]:
    """Names of the K classes; their numbers where the data set does not name them."""
    count = int(np.max(dataset.labels, initial=-1)) + 1
    return dataset.class_names or [f"class {number}" for number in range(count)]


def split_features(
    encoder: Encoder | None,
    dataset: PackedDataset,
    split: Split,
    view_spec: ViewSpec,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    num_threads: int = 1,
    cache: str | os.PathLike[str] | None = None,
    precision: str = "fp32",
    progress: bool = True,
) -> tuple[FeatureSet, FeatureSet]:
    """Features of the labelled clips of both parts of a split.

    Args:
        encoder: Encoder, or None for the raw coordinates (N, T*M*V*C).
        dataset: Packed data set.
        split: Clips to train and to test on.
        view_spec: View to encode.
        batch_size: Clips per forward pass.
        device: Where the encoder runs.
        num_threads: Threads of the loader.
        cache: Folder for cached features; None: no cache. Raw coordinates are not cached.
        precision: "fp32" or "bf16".
        progress: Show a progress bar.
    Returns:
        Training and test features, (N, F) each.
    Raises:
        ValueError: If a part has no labelled clip.
    """
    parts = []
    for name, indices in (("train", split.train), ("test", split.test)):
        known = _known("split_features", name, dataset, indices)
        if encoder is None:
            parts.append(
                raw_features(
                    dataset, view_spec, known, batch_size=batch_size, num_threads=num_threads, progress=progress
                )
            )
        else:
            parts.append(
                dataset_features(
                    encoder,
                    dataset,
                    view_spec,
                    known,
                    batch_size=batch_size,
                    device=device,
                    num_threads=num_threads,
                    cache=cache,
                    precision=precision,
                    progress=progress,
                )
            )
    return parts[0], parts[1]


def _record(
    task: str,
    encoder: Encoder | None,
    dataset: PackedDataset,
    split: Split,
    view_spec: ViewSpec,
    parts: tuple[FeatureSet, FeatureSet],
    protocol: str | None,
    run: str | None,
    precision: str,
    trained_on: NDArray[np.int64] | None,
) -> dict[str, Any]:
    train, test = parts
    seen = None if trained_on is None else int(np.isin(test.index.numpy(), trained_on).sum())
    return {
        "task": task,
        "protocol": protocol,
        "run": run,
        "encoder": "raw coordinates" if encoder is None else type(encoder).__name__,
        "num_features": int(train.features.shape[1]),
        "num_train": len(train),
        "num_test": len(test),
        "dropped_train": len(split.train) - len(train),
        "dropped_test": len(split.test) - len(test),
        "test_clips_trained_on": seen,
        "num_classes": len(_class_names(dataset)),
        "precision": precision,
        "view": repr(view_spec),
        "dataset": {
            "path": str(dataset.path),
            "source": dataset.meta.get("source"),
            "num_clips": len(dataset),
            "sha256": dataset_identity(dataset),
        },
        **provenance(),
    }


def _write(
    out: str | os.PathLike[str], results: dict[str, Any], confusion: Tensor, class_names: list[str], title: str
) -> None:
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    confusion_csv(folder / "confusion.csv", confusion, class_names)
    confusion_figure(folder / "confusion.png", confusion, class_names, title)
    # last: a folder with results is complete
    write_results(folder / "results.json", results)


def _title(task: str, dataset: PackedDataset, protocol: str | None, encoder: str) -> str:
    where = " ".join(part for part in (str(dataset.meta.get("source") or dataset.path.name), protocol) if part)
    return f"{task}, {encoder}, {where}"


def evaluate_knn(
    encoder: Encoder | None,
    dataset: PackedDataset,
    split: Split,
    view_spec: ViewSpec,
    out: str | os.PathLike[str] | None = None,
    *,
    k: int = 1,
    protocol: str | None = None,
    run: str | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    num_threads: int = 1,
    cache: str | os.PathLike[str] | None = None,
    precision: str = "fp32",
    progress: bool = True,
    trained_on: NDArray[np.int64] | None = None,
) -> dict[str, Any]:
    """Classify the test clips by their k nearest training clips in cosine distance.

    Args:
        encoder: Encoder, or None for the raw coordinates (N, T*M*V*C).
        dataset: Packed data set; clips labelled -1 are dropped and counted.
        split: Clips to train and to test on.
        view_spec: View to encode.
        out: Folder for results.json, confusion.csv and confusion.png; None: nothing is written.
        k: Neighbours that vote; 1 is the reference's retrieval.
        protocol: Name of the split, for the record.
        run: Where the encoder comes from, for the record.
        batch_size: Clips per forward pass.
        device: Where the encoder and the search run.
        num_threads: Threads of the loader.
        cache: Folder for cached features; None: no cache.
        precision: "fp32" or "bf16".
        progress: Show a progress bar.
        trained_on: Clips that the encoder was trained on, (n,), to count those of the test among them; None: not known.
    Returns:
        "top1", "top5" and "mean_class" as fractions of one, "confusion" (K, K) as nested lists, and the record. A
        class ranks by its votes, then by its nearest sample; "top5" counts test clips whose class is in the first five.
    Raises:
        ValueError: If a part of the split has no labelled clip, or k exceeds the training clips.
    """
    train, test = split_features(
        encoder,
        dataset,
        split,
        view_spec,
        batch_size=batch_size,
        device=device,
        num_threads=num_threads,
        cache=cache,
        precision=precision,
        progress=progress,
    )
    ranking = knn_rank(train.features, train.labels, test.features, k, num_ranked=NUM_RANKED, device=device)
    class_names = _class_names(dataset)
    confusion = confusion_matrix(test.labels, ranking[:, 0], len(class_names))
    results = {
        "top1": accuracy(ranking[:, 0], test.labels),
        "top5": int((ranking == test.labels[:, None]).any(1).sum()) / len(test),
        "mean_class": mean_class_accuracy(confusion),
        "k": k,
        **_record("knn", encoder, dataset, split, view_spec, (train, test), protocol, run, precision, trained_on),
        "confusion": confusion.tolist(),
    }
    if out is not None:
        title = _title(f"{k}-NN", dataset, protocol, results["encoder"])
        _write(out, results, confusion, class_names, title)
    return results


def evaluate_linear(
    encoder: Encoder | None,
    dataset: PackedDataset,
    split: Split,
    view_spec: ViewSpec,
    out: str | os.PathLike[str] | None = None,
    *,
    config: LinearConfig | None = None,
    group_column: str = "subject",
    protocol: str | None = None,
    run: str | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    num_threads: int = 1,
    cache: str | os.PathLike[str] | None = None,
    precision: str = "fp32",
    progress: bool = True,
    trained_on: NDArray[np.int64] | None = None,
) -> dict[str, Any]:
    """Train a linear layer on the training clips' features and classify the test clips.

    Args:
        encoder: Encoder, or None for the raw coordinates (N, T*M*V*C).
        dataset: Packed data set; clips labelled -1 are dropped and counted.
        split: Clips to train and to test on.
        view_spec: View to encode.
        out: Folder for results.json, confusion.csv and confusion.png; None: nothing is written.
        config: Optimiser and schedule of the probe; the reference's if None.
        group_column: Column whose values are held out whole to choose what the config leaves open, where it exists.
        protocol: Name of the split, for the record.
        run: Where the encoder comes from, for the record.
        batch_size: Clips per forward pass of the encoder.
        device: Where encoder and probe run.
        num_threads: Threads of the loader.
        cache: Folder for cached features; None: no cache.
        precision: "fp32" or "bf16", of the encoder.
        progress: Show a progress bar.
        trained_on: Clips that the encoder was trained on, (n,), to count those of the test among them; None: not known.
    Returns:
        "top1", "top5" and "mean_class" after the last epoch, as fractions of one; "best_top1" over all epochs read,
        which is what the reference reports and selects on the test set; "confusion" (K, K), "history", and the record.
    Raises:
        ValueError: If a part of the split has no labelled clip, or the probe diverges.
    """
    train, test = split_features(
        encoder,
        dataset,
        split,
        view_spec,
        batch_size=batch_size,
        device=device,
        num_threads=num_threads,
        cache=cache,
        precision=precision,
        progress=progress,
    )
    class_names = _class_names(dataset)
    groups = None
    if group_column in dataset.columns and not dataset.per_frame(group_column):
        values = np.asarray(dataset.columns[group_column])[train.index.numpy()]
        groups = torch.from_numpy(np.unique(values, return_inverse=True)[1].reshape(-1))
    probe = linear_probe(train, test, len(class_names), config, groups=groups, device=device)
    results = {
        "top1": probe.top1,
        "top5": probe.top5,
        "mean_class": probe.mean_class,
        "best_top1": probe.best_top1,
        "best_epoch": probe.best_epoch,
        "note": "top1 is that of the last epoch; best_top1 is chosen on the test set, as the reference reports it",
        "config": asdict(probe.config),
        **_record("linear", encoder, dataset, split, view_spec, (train, test), protocol, run, precision, trained_on),
        "history": [asdict(row) for row in probe.history],
        "confusion": probe.confusion.tolist(),
    }
    if out is not None:
        title = _title("linear probe", dataset, protocol, results["encoder"])
        _write(out, results, probe.confusion, class_names, title)
    return results
