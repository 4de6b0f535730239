"""What a run folder says of its run: configuration, data, origin, and the clips it was trained on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastskel.atomic import atomic_folder, atomic_write
from fastskel.data.identity import dataset_identity
from fastskel.data.packed import PackedDataset
from fastskel.dist import rank_and_world
from fastskel.provenance import provenance
from fastskel.train.stage import Stage, describe

__all__ = ["create_record", "has_record", "note_resumed", "origin", "resume_record", "run_identity", "trained_clips"]

CONFIG_FILE, INDICES_FILE = "config.json", "indices.npy"
# settings that change neither weights nor log records of a step: a resumed run may have others
FREE_SETTINGS = ("num_threads", "checkpoint_steps", "keep_checkpoints", "keep_best", "log_steps", "name")
_DEFAULTS = {f.name: describe(f.default) for f in dataclasses.fields(Stage) if f.default is not dataclasses.MISSING}
# what the bits of a training depend on beside its configuration
MACHINE = ("device", "processes", "threads", "versions")


def origin(device: torch.device) -> dict[str, Any]:
    """Say where a run computes: device, processes, compute threads of each, command, versions, commit; plain values."""
    _, world = rank_and_world()
    # by kind in several processes: each has another one
    name = device.type if world > 1 else str(device)
    return {"device": name, "processes": world, "threads": torch.get_num_threads(), **provenance()}


def run_identity(stage: Stage, dataset: PackedDataset, indices: NDArray[np.int64] | None) -> dict[str, Any]:
    """Everything a resumed run must share with the killed one, its clips (n,) in their order; the rest may change."""
    chosen = None
    if indices is not None:
        # their order counts: it is what an epoch's permutation permutes
        ordered = np.ascontiguousarray(indices, dtype="<i8")
        chosen = {"num": len(ordered), "sha256": hashlib.sha256(ordered.tobytes()).hexdigest()}
    kept = {k: v for k, v in describe(stage).items() if k not in FREE_SETTINGS}
    # through JSON, as what it is compared with
    identity: dict[str, Any] = json.loads(
        json.dumps({"stage": kept, "data": dataset_identity(dataset), "indices": chosen})
    )
    return identity


def has_record(folder: Path) -> bool:
    """Whether a run has begun in a folder."""
    return (folder / CONFIG_FILE).exists()


def create_record(folder: Path, config: Mapping[str, Any], indices: NDArray[np.int64] | None) -> None:
    """Create a run folder with its record and the clips it trains on, (n,); None is all of them.

    Raises:
        ValueError: If the folder exists.
    """
    if folder.exists():
        resumable = (folder / CONFIG_FILE).exists()
        actual = "the folder of another run" if resumable else "something that is there"
        advice = "Resume it, or choose another folder" if resumable else "Choose another folder"
        raise ValueError(f"pretrain: {folder} must be new, got {actual}. {advice}.")
    # with its config or not at all: a run killed at any time can be resumed or begun again
    with atomic_folder(folder) as scratch:
        (scratch / "checkpoints").mkdir()
        (scratch / CONFIG_FILE).write_text(json.dumps(config, indent=1))
        if indices is not None:
            np.save(scratch / INDICES_FILE, np.ascontiguousarray(indices, dtype=np.int64))


def resume_record(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Read the record of a run that is to go on.

    Raises:
        ValueError: If there is none, or configuration, data or clips are other ones.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        raise ValueError(
            f"pretrain: {folder} must hold a run to resume, got no {CONFIG_FILE}. Start it without resuming."
        )
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        before, stage = config["identity"], identity["stage"]
        # a record from before a setting existed was made with its default
        settings = {**_DEFAULTS, **before["stage"]}
        changed = sorted(k for k, v in settings.items() if k not in FREE_SETTINGS and v != stage.get(k))
        changed += [k for k in ("data", "indices") if before[k] != identity[k]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"pretrain: {path} must be the record of a run, got one that cannot be read ({error!r}). Start a new run."
        ) from error
    if changed:
        raise ValueError(
            f"pretrain: a resumed run must keep its configuration and data, got other {', '.join(changed)} than in {path}. "
            "Give the run's own settings, or start a new run."
        )
    return config


def note_resumed(folder: Path, config: dict[str, Any], step: int, here: Mapping[str, Any]) -> None:
    """Add to the record that a run goes on, and warn where equal bits are not to be expected."""
    # records of older versions are of one process
    before = {"processes": 1, **config}
    changed = [key for key in MACHINE if before.get(key) != here[key]]
    if "processes" in changed and not config["identity"]["stage"].get("synchronise_norms"):
        warnings.warn(
            f"pretrain: {folder} goes on in {here['processes']} processes, not {before['processes']}; its BatchNorm takes "
            "statistics of each process's samples, which are other ones now. Train with synchronise_norms to prevent it.",
            stacklevel=6,
        )
    if changed:
        warnings.warn(
            f"pretrain: {folder} goes on with other {', '.join(changed)} than it began with; "
            "its weights may differ in their last bits from those of an uninterrupted run.",
            stacklevel=6,
        )
    config.setdefault("resumed", []).append({"step": step, **here})
    with atomic_write(folder / CONFIG_FILE) as scratch:
        scratch.write_text(json.dumps(config, indent=1))


def trained_clips(run: Path, dataset: PackedDataset) -> NDArray[np.int64] | None:
    """Clips of a data set that a run was trained on.

    Args:
        run: Run folder.
        dataset: Packed data set of n clips.
    Returns:
        Clip numbers, (k,), none of them if the run was trained on other data; None where the folder has no record.
    Raises:
        ValueError: If the record is damaged.
    """
    if not (run / CONFIG_FILE).is_file():
        return None
    try:
        identity = json.loads((run / CONFIG_FILE).read_text())["identity"]
        if identity["data"] != dataset_identity(dataset):
            return np.empty(0, np.int64)
        if identity["indices"] is None:
            return np.arange(len(dataset))
        return np.asarray(np.load(run / INDICES_FILE, allow_pickle=False), np.int64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"trained_clips: {run / CONFIG_FILE} and {INDICES_FILE} must be the record of a run, got {error!r}. "
            "Evaluate a copy of the checkpoint alone."
        ) from error
