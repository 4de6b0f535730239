"""Native checkpoints: a folder of safetensors and one JSON file, complete or absent."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastskel.atomic import atomic_folder
from fastskel.data.views import CenterCrop, ViewSpec
from fastskel.models.encoder import ENCODERS, Encoder
from fastskel.train.stage import describe

__all__ = [
    "Checkpoint",
    "load_encoder",
    "load_weights",
    "newest",
    "prune",
    "read_checkpoint",
    "read_state",
    "save_checkpoint",
    "weights",
]

FORMAT_VERSION = 1
MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read, tensors on the host.

    Attributes:
        path: Its folder.
        state: What is known of the run: encoder, objective, view, position, versions.
        model: Weights and buffers by name, shared ones once.
        optimizer: Optimiser tensors by parameter name and kind; empty when they were not asked for.
    """

    path: Path
    state: Mapping[str, Any]
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]


def weights(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Name the weights and persistent buffers of several modules, tensors of any shape, shared ones once."""
    seen: set[int] = set()
    named: dict[str, Tensor] = {}
    for prefix, module in modules.items():
        for name, value in module.state_dict(keep_vars=True).items():
            if id(value) not in seen:
                seen.add(id(value))
                named[f"{prefix}.{name}"] = value.detach()
    return named


def load_weights(modules: Mapping[str, nn.Module], stored: Mapping[str, Tensor], source: Path) -> None:
    """Copy stored tensors of any shape into modules; names and shapes must agree exactly.

    Raises:
        ValueError: Naming the file and the first disagreeing keys.
    """
    target = weights(modules)
    missing, extra = sorted(target.keys() - stored.keys()), sorted(stored.keys() - target.keys())
    wrong = [k for k in target.keys() & stored.keys() if target[k].shape != stored[k].shape]
    if missing or extra or wrong:
        raise ValueError(
            f"load_weights: {source} must hold exactly the model's tensors, got missing {missing[:3]}, unexpected "
            f"{extra[:3]}, of another shape {sorted(wrong)[:3]}. Build the model with the configuration it was saved with."
        )
    with torch.no_grad():
        for name, value in target.items():
            value.copy_(stored[name])


def save_checkpoint(
    folder: Path,
    step: int,
    model: Mapping[str, Tensor],
    state: Mapping[str, Any],
    optimizer: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write one checkpoint of named tensors (D, ..) under `folder`; it appears complete, under its step's name, or not at all."""
    target = folder / _name(step)
    if target.exists():
        _remove(target)
    with atomic_folder(target) as scratch:
        for name, tensors in ((MODEL_FILE, model), (OPTIMIZER_FILE, optimizer)):
            if tensors is not None:
                _save(tensors, scratch / name)
        sums = {path.name: _sha256(path) for path in sorted(scratch.iterdir())}
        told = {"format_version": FORMAT_VERSION, "step": step, "checksums": sums, **describe(state)}
        sums[STATE_FILE] = _state_sha256(told)
        (scratch / STATE_FILE).write_text(json.dumps(told, indent=1))
    return target


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, path)
    except SafetensorError as error:
        # its own type even where the disk is full
        raise OSError(f"{path} could not be written: {error}") from error


def _state_sha256(state: Mapping[str, Any]) -> str:
    """Checksum of what a state says, but for this checksum."""
    sums = {name: value for name, value in state["checksums"].items() if name != STATE_FILE}
    return hashlib.sha256(json.dumps({**state, "checksums": sums}, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _name(step: int) -> str:
    return f"step-{step:09d}"


def newest(run: Path) -> Path | None:
    """Return the last complete checkpoint of a run folder."""
    found = sorted(path.parent for path in (run / "checkpoints").glob(f"step-*/{STATE_FILE}"))
    return found[-1] if found else None


def _remove(checkpoint: Path) -> None:
    # renamed first: a kill in the middle of the removal must not leave a checkpoint with files missing
    doomed = checkpoint.with_name(f".doomed-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def prune(run: Path, keep: int, best: int | None = None) -> None:
    """Remove all but the last `keep` checkpoints of a run and that of step `best`, and what killed writers left."""
    folder = run / "checkpoints"
    for stale in sorted(folder.glob("step-*"))[:-keep]:
        if best is None or stale.name != _name(best):
            _remove(stale)
    for scratch in folder.glob(".*"):
        shutil.rmtree(scratch, ignore_errors=True)


def read_state(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """Read what a native checkpoint says beside its tensors (D, ..), and find its folder: the newest one of a run folder.

    Raises:
        ValueError: If there is no complete checkpoint, or what it says is damaged or of another version, naming the file.
    """
    given = Path(path)
    folder = given if (given / STATE_FILE).exists() else newest(given)
    if folder is None:
        raise ValueError(
            f"read_checkpoint: path must be a run or checkpoint folder, got {given} without {STATE_FILE}. "
            "Give the folder that `fastskel pretrain` wrote."
        )
    return folder, _read_state(folder)


def read_checkpoint(path: str | os.PathLike[str], *, optimizer: bool = False, best: bool = False) -> Checkpoint:
    """Read a native checkpoint from its folder, or the newest one of a run folder.

    Args:
        path: Checkpoint or run folder.
        optimizer: Whether to read the optimiser's tensors too.
        best: Of a run that kept its best checkpoint, that one.
    Raises:
        ValueError: If there is no complete checkpoint, or a file is damaged or of another version, naming the file.
    """
    folder, state = read_state(path)
    if best:
        if not (kept := state.get("best")):
            raise ValueError(
                f"read_checkpoint: {folder / STATE_FILE} must name the run's best checkpoint, got none. Train with keep_best."
            )
        folder = folder.with_name(_name(kept["step"]))
        state = _read_state(folder)
    tensors: dict[str, dict[str, Tensor]] = {MODEL_FILE: {}, OPTIMIZER_FILE: {}}
    for name in (MODEL_FILE, OPTIMIZER_FILE) if optimizer else (MODEL_FILE,):
        try:
            # checkpoints of older versions have none
            if (expected := state.get("checksums", {}).get(name)) and (found := _sha256(folder / name)) != expected:
                raise ValueError(f"sha256 {found[:12]}.. instead of {expected[:12]}..")
            tensors[name] = load_file(folder / name)
        except Exception as error:
            # safetensors raises its own type for damaged files and OSError for missing ones: both say the same here
            raise ValueError(
                f"read_checkpoint: {folder / name} must be the safetensors that were saved, got {error}. Use another one."
            ) from error
    return Checkpoint(folder, state, tensors[MODEL_FILE], tensors[OPTIMIZER_FILE])


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state: Any = json.loads((folder / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"read_checkpoint: {folder / STATE_FILE} must be JSON, got {error}. Use another checkpoint."
        ) from error
    version = state.get("format_version") if isinstance(state, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"read_checkpoint: {folder / STATE_FILE} must have format_version {FORMAT_VERSION}, got {version}. "
            "Use the fastskel version that wrote it."
        )
    assert isinstance(state, dict)
    # checkpoints of older versions have none
    expected = state.get("checksums", {}).get(STATE_FILE)
    if expected and (found := _state_sha256(state)) != expected:
        raise ValueError(
            f"read_checkpoint: {folder / STATE_FILE} must be as it was saved, got sha256 {found[:12]}.. instead of "
            f"{expected[:12]}... Use another checkpoint."
        )
    return state


def _eval_view(described: Mapping[str, Any], topology: str) -> ViewSpec:
    fields = {f.name for f in dataclasses.fields(ViewSpec)}
    plain = {k: v for k, v in described.items() if k in fields - {"crop", "transforms"}}
    # an encoder knows the joints by their order: data of another skeleton is refused
    return ViewSpec(**{**plain, "topology": topology}, crop=CenterCrop(described["crop"]["ratio"]))


def load_encoder(path: str | os.PathLike[str], *, average: bool = False) -> tuple[Encoder, ViewSpec, Checkpoint]:
    """Rebuild the downstream encoder of a run or checkpoint, in eval mode.

    Args:
        path: Run or checkpoint folder.
        average: With the running average of the weights instead of the last ones.
    Returns:
        The encoder of views (N, T, M, V, C), how its views are made, and the checkpoint.
    Raises:
        ValueError: If the checkpoint is damaged, incomplete, or without the average, naming the file.
    """
    checkpoint, part = read_checkpoint(path), "average" if average else "encoder"
    try:
        described = checkpoint.state["encoder"]
        encoder = ENCODERS[described["name"]](**described["config"])
        view = _eval_view(checkpoint.state["eval_view"], checkpoint.state["topology"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"load_encoder: {checkpoint.path / STATE_FILE} must describe the encoder and its view, got {error!r}. "
            "Use another checkpoint."
        ) from error
    own = {name: value for name, value in checkpoint.model.items() if name.startswith(f"{part}.")}
    if average and not own:
        raise ValueError(
            f"load_encoder: {checkpoint.path / MODEL_FILE} must hold a running average, got none. Train with the setting "
            "average, or take the last weights."
        )
    load_weights({part: encoder}, own, checkpoint.path / MODEL_FILE)
    return encoder.eval(), view, checkpoint
