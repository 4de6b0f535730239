"""Published USDRL checkpoints: read them strictly, write ones that the reference's scripts load."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastskel.atomic import atomic_write
from fastskel.compat.usdrl import dste, sttr
from fastskel.compat.usdrl.wrappers import CHANNELS
from fastskel.data.views import ViewSpec, eval_view
from fastskel.models.encoder import ENCODERS, Encoder
from fastskel.train.checkpoint import Checkpoint, read_checkpoint

__all__ = ["DEFAULTS", "Published", "export", "load_downstream", "load_published_encoder", "read_published"]

PREFIX = "module."
# what a published file does not record, and the value every published recipe used
DEFAULTS: Mapping[str, Any] = {"num_head": 1, "gap": 4, "alpha": 0.5, "modality": "joint"}
MODULES: Mapping[str, Any] = {"dste": dste, "sttr": sttr}
# the reference hard-codes these: 25 or 17 joints of two bodies, and the clip length
REFERENCE_TOKENS, REFERENCE_FRAMES = (50, 34), 64


@dataclass(frozen=True)
class Published:
    """A published checkpoint as read.

    Attributes:
        path: Its file.
        backbone: Which of the two encoders it holds.
        state: Tensors of any shape by the reference's keys, without the DataParallel prefix.
        inferred: Sizes read off the tensors: the reference's constructor arguments.
        epoch: Epochs it was trained for.
    """

    path: Path
    backbone: Literal["dste", "sttr"]
    state: Mapping[str, Tensor]
    inferred: Mapping[str, int]
    epoch: int


def _refuse(path: Path, contract: str, actual: object, advice: str) -> ValueError:
    return ValueError(f"read_published: {path} must {contract}, got {actual}. {advice}.")


def read_published(path: str | os.PathLike[str]) -> Published:
    """Read a `.pth.tar` of the reference: `{"epoch", "state_dict", "optimizer"}`.

    Raises:
        ValueError: If the file is damaged, holds anything but tensors and plain values, is not a USDRL checkpoint, or its
            two copies of a shared attention differ; naming the file and the key.
    """
    path = Path(path)
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises unpickling, zip and I/O errors of many types; all mean that the file cannot be used
        reason = str(error).splitlines()[0]
        raise _refuse(
            path, "be a checkpoint of tensors and plain values", reason, "Use an intact published file"
        ) from error
    if not isinstance(stored, dict) or not isinstance(stored.get("state_dict"), dict):
        keys = sorted(map(str, stored))[:5] if isinstance(stored, dict) else type(stored).__name__
        raise _refuse(path, "hold a state_dict", keys, "Use a checkpoint written by the reference's pretraining")
    state: dict[str, Tensor] = {key.removeprefix(PREFIX): value for key, value in stored["state_dict"].items()}
    kind: Literal["dste", "sttr"]
    if any(key.startswith("backbone.t_tr.CA.") for key in state):
        kind = "dste"
    elif any(key.startswith("backbone.t_tr.layers.") for key in state):
        kind = "sttr"
    else:
        raise _refuse(path, "hold backbone.t_tr of DSTE or STTR", sorted(state)[:3], "Use a USDRL checkpoint")
    for key, value in state.items():
        twin = key.replace(".DSA.attn.", ".CA.attn.")
        if twin != key and not torch.equal(value, state.get(twin, torch.empty(0))):
            raise _refuse(path, f"hold equal copies of {key} and {twin}", "different ones", "The file is inconsistent")
    try:
        inferred = {
            "t_input_size": state["backbone.ske_emb.t_embedding.0.weight"].shape[1],
            "s_input_size": state["backbone.ske_emb.s_embedding.0.weight"].shape[1],
            "hidden_size": state["backbone.spe"].shape[2],
            "num_layer": len({k.split(".")[3] for k in state if k.startswith("backbone.t_tr.layers.")}) or 2,
        }
    except KeyError as error:
        raise _refuse(path, f"hold the key {error}", "none", "Use a USDRL checkpoint") from error
    if state["backbone.spe"].shape[1] * CHANNELS != inferred["t_input_size"]:
        tokens = state["backbone.spe"].shape[1]
        raise _refuse(
            path,
            "have t_input_size / 3 spatial tokens",
            f"{inferred['t_input_size']} and {tokens}",
            "It is inconsistent",
        )
    return Published(path, kind, state, inferred, int(stored.get("epoch", 0)))


def _settings(published: Published, given: Mapping[str, Any], announce: Callable[[str], None]) -> dict[str, Any]:
    unknown = sorted(given.keys() - DEFAULTS.keys())
    if unknown:
        raise ValueError(
            f"load: settings must be among {sorted(DEFAULTS)}, got {unknown}. Sizes are read off the file."
        )
    settings = {**DEFAULTS, **given}
    sizes = ", ".join(f"{k}={v}" for k, v in published.inferred.items())
    assumed = ", ".join(f"{k}={settings[k]}" + ("" if k in given else " (assumed)") for k in DEFAULTS)
    announce(f"{published.path.name}: {published.backbone.upper()}, {sizes}; not recorded in the file: {assumed}")
    return settings


def _load_strictly(model: nn.Module, published: Published, may_miss: str | None, may_stay: tuple[str, ...]) -> None:
    own = model.state_dict()
    missing = [k for k in own if k not in published.state and not (may_miss and k.startswith(may_miss))]
    extra = [k for k in published.state if k not in own and not k.startswith(may_stay)]
    wrong = [k for k in own if k in published.state and own[k].shape != published.state[k].shape]
    if missing or extra or wrong:
        raise ValueError(
            f"load: {published.path} must fit the model, got missing {missing[:3]}, unexpected {extra[:3]}, "
            f"of another shape {wrong[:3]}. Check the settings, or use an intact file."
        )
    # every disagreement was refused above: what is left out is the fresh head, and projectors that are not used
    model.load_state_dict({k: published.state.get(k, v) for k, v in own.items()})


def load_downstream(
    path: str | os.PathLike[str], num_class: int = 60, *, announce: Callable[[str], None] = print, **settings: Any
) -> dste.Downstream | sttr.Downstream:
    """Build the reference's `Downstream` from a published checkpoint; its head `fc` (K, 2H) starts anew unless stored.

    Args:
        path: File written by the reference or by `export`.
        num_class: Classes K.
        announce: Where the sizes read and the defaults assumed are reported.
        settings: What the file does not record: `num_head`, `gap`, `alpha`, `modality`.
    Raises:
        ValueError: If the file cannot be read or does not fit exactly.
    """
    published = read_published(path)
    chosen = _settings(published, settings, announce)
    build: Any = MODULES[published.backbone].Downstream
    model: dste.Downstream | sttr.Downstream = build(**published.inferred, **chosen, num_class=num_class)
    nn.init.normal_(model.fc.weight, std=0.01)
    nn.init.zeros_(model.fc.bias)
    _load_strictly(model, published, "fc.", ("t_proj.", "s_proj.", "i_proj."))
    return model


def load_published_encoder(
    path: str | os.PathLike[str], *, announce: Callable[[str], None] = print, **settings: Any
) -> tuple[Encoder, ViewSpec]:
    """Build a native encoder of views (N, T, M, V, C) from a published checkpoint, in eval mode, and its view.

    Args:
        path: File written by the reference or by `export`.
        announce: Where the sizes read and the defaults assumed are reported.
        settings: What the file does not record: `num_head`, `gap`, `alpha`, `modality`.
    Returns:
        The encoder, and the view it expects: whole clips, not normalised again.
    """
    model = load_downstream(path, 1, announce=announce, **settings)
    config = dict(model.backbone.config)
    encoder = ENCODERS[f"usdrl-{read_published(path).backbone}"](**config)
    encoder.load_state_dict(model.backbone.state_dict())
    return encoder.eval(), eval_view(config["num_frames"], model.modality, normalise="none")


def _pretraining_model(checkpoint: Checkpoint) -> dste.USDRL | sttr.USDRL:
    described, objective = checkpoint.state["encoder"], checkpoint.state["objective"]["name"]
    kind, config = described["name"].removeprefix("usdrl-"), described["config"]
    if kind not in MODULES or objective != "mgfd":
        raise ValueError(
            f"export: {checkpoint.path} must hold usdrl-dste or usdrl-sttr trained with mgfd, got {described['name']} with "
            f"{objective}. The reference has no other models."
        )
    if config["num_channels"] != CHANNELS or (kind == "dste" and config["num_layers"] != 2):
        raise ValueError(
            f"export: {checkpoint.path} must have {CHANNELS} channels and, for DSTE, two layers, got {config['num_channels']} "
            f"and {config['num_layers']}. The reference cannot express other encoders."
        )
    t_input = config["num_joints"] * config["num_bodies"] * CHANNELS
    arguments = (t_input, config["num_frames"] * CHANNELS, config["width"], config["num_heads"], config["num_layers"])
    extra = {k: config[k] for k in ("alpha", "gap") if k in config}
    model: dste.USDRL | sttr.USDRL = MODULES[kind].USDRL(*arguments, **extra)
    return model


def export(
    run: str | os.PathLike[str], out: str | os.PathLike[str], *, announce: Callable[[str], None] = print
) -> Path:
    """Write a run's newest checkpoint as the reference's `.pth.tar`: weights, epoch and Adam's state in its order.

    Args:
        run: Run or checkpoint folder.
        out: File to write; must be new.
        announce: Where a size that the published scripts hard-code differently is reported.
    Raises:
        ValueError: If the run holds anything the reference cannot express, or `out` exists.
    """
    target = Path(out)
    if target.exists():
        raise ValueError(f"export: out must be new, got the existing {target}. Remove it or choose another name.")
    checkpoint = read_checkpoint(run, optimizer=True)
    model = _pretraining_model(checkpoint)
    native = {k.removeprefix("objective.").replace("encoder.", "backbone.", 1): v for k, v in checkpoint.model.items()}
    # the shared attention is stored once, under its first name
    full = {k: native[k if k in native else k.replace(".DSA.attn.", ".CA.attn.")] for k in model.state_dict()}
    model.load_state_dict(full)
    tokens, frames = model.backbone.shape[1] * model.backbone.shape[2], model.backbone.shape[0]
    if tokens not in REFERENCE_TOKENS or frames != REFERENCE_FRAMES:
        announce(
            f"export: {tokens} spatial tokens and {frames} frames; the published scripts hard-code {REFERENCE_TOKENS} and "
            f"{REFERENCE_FRAMES}: change them there, or load the file with fastskel.compat.usdrl"
        )
    optimizer = torch.optim.Adam(model.parameters()).state_dict()
    for number, (name, _) in enumerate(model.named_parameters()):
        stored = f"encoder.{name.removeprefix('backbone.')}" if name.startswith("backbone.") else f"objective.{name}"
        kinds = ("step", "exp_avg", "exp_avg_sq")
        optimizer["state"][number] = {kind: checkpoint.optimizer[f"{stored}/{kind}"] for kind in kinds}
    state = {f"{PREFIX}{key}": value for key, value in model.state_dict().items()}
    with atomic_write(target) as scratch:
        torch.save({"epoch": checkpoint.state["epoch"], "state_dict": state, "optimizer": optimizer}, scratch)
    return target
