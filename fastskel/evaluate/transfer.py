"""Transfer: an encoder tried on a data set of another skeleton, another number of bodies, other coordinates.

Joints are remapped by their names (`fastskel.data.convert`) into a packed copy of the data set that is kept beside the cached
features, under the identity of the data it was made of: everything that reads packed data, the native loader and caches
included, then works as ever, and the copy is made once, where a view that converts would do so for every batch and in each of
three engines. Bodies and coordinates are adapted in front of the encoder: `AdaptedEncoder`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastskel.data.convert import convert_dataset, correspondence
from fastskel.data.identity import dataset_identity, original_identity
from fastskel.data.packed import PackedDataset, open_dataset
from fastskel.evaluate.adapted import AdaptedEncoder, adapted_encoder
from fastskel.evaluate.evaluation import TASKS, Evaluation, Task
from fastskel.evaluate.finetune import FinetuneConfig, evaluate_finetune
from fastskel.evaluate.linear import LinearConfig
from fastskel.evaluate.report import write_results
from fastskel.evaluate.run import evaluate_knn, evaluate_linear
from fastskel.skeleton import TOPOLOGIES

__all__ = ["PLANES", "adapt", "converted_dataset", "evaluate_transfer", "torso_length"]

# axes of space that a picture of it keeps
PLANES = {"xy": (0, 1), "xz": (0, 2), "yz": (1, 2)}
# middle of the hips to middle of the shoulders, metres: medians of recordings in metres are 0.37 (UTD-MHAD) and 0.38 (NW-UCLA,
# UTKinect) with 20 joints and 0.48 with NTU's 25
TORSO_METRES = 0.4
# proper turns: none of them mirrors a person. The first two axes of an image that counts downwards are turned about the third
UPRIGHT = {
    "y": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "-y": ((-1, 0, 0), (0, -1, 0), (0, 0, 1)),
    "z": ((1, 0, 0), (0, 0, 1), (0, -1, 0)),
    "-z": ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
    "x": ((0, -1, 0), (1, 0, 0), (0, 0, 1)),
    "-x": ((0, 1, 0), (-1, 0, 0), (0, 0, 1)),
}
SAMPLED_CLIPS = 200


def converted_dataset(
    dataset: PackedDataset, target: str, cache: str | os.PathLike[str], *, progress: bool = False
) -> PackedDataset:
    """The data set's clips (T, M, V, C) with another skeleton: a packed copy in a cache folder, made if it is not there.

    Raises:
        ValueError: If the clips cannot be converted: see `convert_dataset`.
    """
    folder = Path(cache) / f"converted-{target}-{dataset_identity(dataset)[:16]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            convert_dataset(dataset, target, folder, progress=progress)
        except ValueError:
            # another process may have been sooner
            if not folder.exists():
                raise
    copy = open_dataset(folder)
    # copies of older versions do not say it
    return replace(copy, meta={**copy.meta, "original": original_identity(dataset)})


def torso_length(dataset: PackedDataset, indices: NDArray[np.int64]) -> float:
    """Median distance from hips to shoulders, of their middles, over at most 200 of the clips (N,), in the data's unit.

    Raises:
        ValueError: If the skeleton does not say where they are, or they are nowhere present.
    """
    axes = dataset.topology.axes
    named = {"left_hip", "right_hip", "left_shoulder", "right_shoulder"} <= set(axes)
    found = []
    for number in indices[:: max(1, -(-len(indices) // SAMPLED_CLIPS))].tolist():
        clip = np.asarray(dataset.clip(number), np.float64)
        if named:
            low, high = (clip[:, :, [*axes[f"left_{part}"], *axes[f"right_{part}"]]] for part in ("hip", "shoulder"))
            known = low.any(-1).all(-1) & high.any(-1).all(-1)
            found.append(np.linalg.norm(low.mean(2) - high.mean(2), axis=-1)[known])
    lengths = np.concatenate([*found, np.empty(0)])
    if not len(lengths) or float(np.median(lengths)) <= 0:
        raise ValueError(
            f"torso_length: {dataset.path} must show hips and shoulders, got none of them. Give the scale instead."
        )
    return float(np.median(lengths))


def _matrix(
    evaluation: Evaluation, source: Mapping[str, Any], plane: str | None, scale: float | None
) -> tuple[tuple[tuple[float, ...], ...] | None, dict[str, Any]]:
    """What turns the data's coordinates into those of the encoder, and what it does in words; None where nothing."""
    encoder, dataset = evaluation.encoder, evaluation.dataset
    assert encoder is not None and encoder.shape is not None
    wanted, names = encoder.shape[3], [str(name) for name in dataset.meta["channels"]]
    spatial = names[:3] == ["x", "y", "z"] and len(names) == 3
    if plane is not None and (plane not in PLANES or not spatial or wanted != len(PLANES[plane])):
        raise ValueError(
            f"transfer: plane must be one of {', '.join(PLANES)} for an encoder of 2 channels and data of x, y and z, got "
            f"{plane!r} for {wanted} channels and {', '.join(names)}. Leave it out."
        )
    if plane is None and wanted != len(names):
        advice = "Name the plane to project on" if spatial and wanted == 2 else "Choose an encoder of such clips"
        raise ValueError(
            f"transfer: the encoder must read the {len(names)} channels of {dataset.path} ({', '.join(names)}), got one of "
            f"{wanted}. {advice}."
        )
    if plane is None and source.get("channels") not in (None, names):
        raise ValueError(
            f"transfer: the encoder must read {', '.join(names)} as {dataset.path} has, got one trained on "
            f"{', '.join(source['channels'])}. Choose another."
        )
    own_units, own_up = dataset.meta["units"], dataset.meta["up_axis"]
    # a plane, such as a picture, has no usual unit
    units, up = source.get("units") or ("metres" if spatial else own_units), source.get("up_axis") or "y"
    told: dict[str, Any] = {"plane": plane, "scale": scale, "up_axis": f"{own_up} for {up}", "units": f"{own_units} for {units}"}
    if scale is None and own_units == units:
        scale = 1.0
    if scale is None:
        if not spatial or units != "metres":
            raise ValueError(
                f"transfer: scale must be given for {dataset.path} in {own_units} and an encoder of clips in {units}, got none. "
                f"Pass the factor from {own_units} to {units}."
            )
        scale = TORSO_METRES / torso_length(dataset, np.asarray(evaluation.split.train))
    told["scale"] = scale
    turn = np.eye(len(names))
    if spatial and own_up != up:
        if evaluation.view.normalise in ("align", "align-yaw"):
            raise ValueError(
                f"transfer: clips with {own_up} upwards must not be aligned, which takes y for upwards, got "
                f"{evaluation.view.normalise!r} for {dataset.path}. Normalise by center instead."
            )
        turn = np.array(UPRIGHT[up], float).T @ np.array(UPRIGHT[own_up], float)
    matrix = scale * turn
    if plane is not None:
        matrix = matrix[list(PLANES[plane])]
    if matrix.shape[0] == matrix.shape[1] and np.array_equal(matrix, np.eye(len(matrix))):
        return None, told
    return tuple(tuple(float(factor) + 0.0 for factor in row) for row in matrix), told


def adapt(
    evaluation: Evaluation,
    *,
    source: Mapping[str, Any] | None = None,
    plane: str | None = None,
    scale: float | None = None,
) -> tuple[Evaluation, dict[str, Any]]:
    """Make an encoder and a data set of clips (T, M, V, C) fit.

    Args:
        evaluation: Encoder, data set and the view the encoder was trained with, whose topology names its skeleton; joints are
            remapped into a copy of the data in its cache folder.
        source: What is known of the data the encoder was trained on: "units", "up_axis", "channels"; where nothing is said,
            metres, y upwards, and the channels of the data.
        plane: "xy", "xz" or "yz": project data in space for an encoder of two channels.
        scale: Factor of all coordinates; None is 1 for equal units, and makes the median torso 0.4 m long for an encoder of
            metres. An encoder that was adapted before reads coordinates as the data it was adapted to have them.
    Returns:
        The evaluation to run, and what was done, in plain values.
    Raises:
        ValueError: If they cannot be made to fit.
    """
    encoder, dataset, view = evaluation.encoder, evaluation.dataset, evaluation.view
    if encoder is None or encoder.shape is None:
        kind = "raw coordinates" if encoder is None else type(encoder).__name__
        raise ValueError(f"transfer: encoder must say what clips it takes, got {kind}. Set its shape, or do not transfer.")
    target = view.topology or dataset.topology.name
    joints = TOPOLOGIES[target].num_joints if target in TOPOLOGIES else dataset.topology.num_joints
    if joints != encoder.shape[2]:
        raise ValueError(
            f"transfer: the view must name the skeleton of the encoder's {encoder.shape[2]} joints, got {target!r} of {joints}. "
            "Name the one it was trained on."
        )
    if isinstance(encoder, AdaptedEncoder) and encoder.matrix is not None and not {"units", "up_axis"} <= set(source or {}):
        raise ValueError(
            "transfer: source must say units and up_axis of the data that the encoder was adapted to, got "
            f"{sorted(source or {})}. Transfer the encoder that it was fine-tuned from."
        )
    matrix, told = _matrix(evaluation, source or {}, plane, scale)
    told = {"skeleton": f"{dataset.topology.name} for {target}", **told}
    if dataset.topology.name != target:
        if evaluation.cache is None:
            raise ValueError("transfer: cache must be a folder where joints are remapped, got None. Give one for the copy.")
        found = correspondence(dataset.topology, TOPOLOGIES[target])
        told |= {"joints_of_others": list(found.renamed), "joints_absent": list(found.missing)}
        dataset = converted_dataset(dataset, target, evaluation.cache, progress=evaluation.progress)
    bodies = dataset.num_bodies_max
    told["bodies"] = f"{bodies} for {encoder.shape[1]}"
    if matrix is not None or bodies != encoder.shape[1]:
        encoder = adapted_encoder(encoder, bodies, matrix)
    return replace(evaluation, encoder=encoder, dataset=dataset), told


def evaluate_transfer(
    evaluation: Evaluation,
    out: str | os.PathLike[str] | None = None,
    *,
    source: Mapping[str, Any] | None = None,
    plane: str | None = None,
    scale: float | None = None,
    config: LinearConfig | None = None,
    k: int = 1,
    finetune_config: FinetuneConfig | None = None,
    resume: bool = False,
    group_column: str = "subject",
    on_adapted: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Adapt an encoder to a data set, then classify by neighbours and a linear probe, and if asked by fine-tuning.

    Args:
        evaluation: Encoder, data set of clips (T, M, V, C), and the view the encoder was trained with.
        out: Folder for results.json, and one inside for each way of classifying; None: nothing is written.
        source: What is known of the data the encoder was trained on: see `adapt`; recorded as it is.
        plane: Plane that data in space are projected on, for an encoder of two channels.
        scale: Factor of all coordinates: see `adapt`.
        config: Of the linear probe; the reference's if None.
        k: Neighbours that vote.
        finetune_config: Fine-tune too, with these settings.
        resume: Go on where a fine-tuning in `out` was stopped.
        group_column: Column whose values are held out whole to choose what `config` leaves open, where it exists.
        on_adapted: Called with what was done to adapt the encoder, before anything is computed.
    Returns:
        "top1", "top5" and "mean_class" of the linear probe, as fractions of one; "knn", "linear" and "finetune" with those of
        each; "adaptation"; "source"; and the record.
    Raises:
        ValueError: If encoder and data cannot be made to fit, or what the classifiers refuse.
    """
    # before a copy is made
    evaluation.check_unseen(evaluation.split.test)
    adapted, told = adapt(evaluation, source=source, plane=plane, scale=scale)
    if on_adapted is not None:
        on_adapted(told)
    folder = None if out is None else Path(out)

    def place(name: str) -> Path | None:
        return None if folder is None else folder / name

    parts = {
        "knn": evaluate_knn(adapted, place("knn"), k=k),
        "linear": evaluate_linear(adapted, place("linear"), config=config, group_column=group_column),
    }
    if finetune_config is not None:
        parts["finetune"] = evaluate_finetune(adapted, place("finetune"), config=finetune_config, resume=resume)
    names = ("top1", "top5", "mean_class")
    original = {"path": str(evaluation.dataset.path), "sha256": dataset_identity(evaluation.dataset)}
    results = {
        **{name: parts["linear"][name] for name in names},
        **{part: {name: row[name] for name in names} for part, row in parts.items()},
        "adaptation": told,
        "source": dict(source or {}),
        **{key: value for key, value in parts["linear"].items() if key not in {*names, "history", "confusion"}},
        "task": "transfer",
        "encoder": evaluation.encoder_name,
    }
    results["dataset"] = {**results["dataset"], **original}
    if folder is not None:
        write_results(folder / "results.json", results)
    return results


TASKS.add("transfer", Task(evaluate_transfer))
