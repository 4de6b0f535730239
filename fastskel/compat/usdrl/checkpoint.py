"""Published USDRL checkpoints: read them strictly, write ones that the reference's scripts load."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastskel.atomic import atomic_write
from fastskel.compat.usdrl import dste, sttr
from fastskel.compat.usdrl.wrappers import CHANNELS, bones
from fastskel.data.views import ViewSpec, eval_view
from fastskel.models.encoder import ENCODERS, Encoder
from fastskel.skeleton import Topology
from fastskel.train.checkpoint import Checkpoint, read_checkpoint

__all__ = ["DEFAULTS", "Published", "export", "load_downstream", "load_published_encoder", "read_published"]

PREFIX = "module."
# what a published file does not record, and the value every published recipe used
DEFAULTS: Mapping[str, Any] = {"num_head": 1, "gap": 4, "alpha": 0.5, "modality": "joint"}
DSTE_ONLY = ("gap", "alpha")
PROJECTORS = ("t_proj.", "s_proj.", "i_proj.")
HEAD = ("fc.weight", "fc.bias")
MODULES: Mapping[str, Any] = {"dste": dste, "sttr": sttr}
# the reference hard-codes these: 25 or 17 joints of two bodies, the clip length, the rate of DSTE's DropPath
REFERENCE_TOKENS, REFERENCE_FRAMES, REFERENCE_DROP_PATH = (50, 34), 64, 0.1


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


def _load(path: Path) -> dict[str, Any]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise _refuse(path, "be a readable file", error.strerror, "Check the path") from error
    try:
        with file:
            stored: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises pickle and zip errors of many types, and its texts advise to load without protection: say it anew
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"a pickle that asks for {forbidden[1]}" if forbidden else f"a damaged one ({type(error).__name__})"
        advice = "Nothing in it was run; use an intact published file"
        raise _refuse(path, "be a checkpoint of tensors and plain values", reason, advice) from error
    state = stored.get("state_dict") if isinstance(stored, dict) else None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        keys = sorted(map(str, stored))[:5] if isinstance(stored, dict) else type(stored).__name__
        advice = "Use a checkpoint written by the reference's pretraining"
        raise _refuse(path, "hold a state_dict of named tensors", keys, advice)
    if not isinstance(stored.setdefault("epoch", 0), int):
        raise _refuse(path, "hold its epoch as a number", repr(stored["epoch"]), "Use an intact published file")
    return dict(stored)


def _sizes(path: Path, state: Mapping[str, Tensor]) -> dict[str, int]:
    wanted = {"backbone.spe": 3, "backbone.ske_emb.t_embedding.0.weight": 2, "backbone.ske_emb.s_embedding.0.weight": 2}
    for key, dims in wanted.items():
        if key not in state or state[key].dim() != dims:
            actual = tuple(state[key].shape) if key in state else "none"
            raise _refuse(path, f"hold {key} of {dims} dimensions", actual, "Use a USDRL checkpoint")
    spe, temporal, spatial = (state[key] for key in wanted)
    if spe.shape[1] * CHANNELS != temporal.shape[1]:
        raise _refuse(
            path, f"have t_input_size / {CHANNELS} spatial tokens", f"{temporal.shape[1]} and {spe.shape[1]}",
            "The file is inconsistent",
        )  # fmt: skip
    layers = {key.split(".")[3] for key in state if key.startswith("backbone.t_tr.layers.")}
    return {
        "t_input_size": temporal.shape[1],
        "s_input_size": spatial.shape[1],
        "hidden_size": spe.shape[2],
        # DSTE always has two
        "num_layer": len(layers) or 2,
    }


def read_published(path: str | os.PathLike[str]) -> Published:
    """Read a `.pth.tar` of the reference: `{"epoch", "state_dict", "optimizer"}`.

    Raises:
        ValueError: If the file is damaged, holds anything but tensors and plain values, is not a USDRL checkpoint, or its
            two copies of a shared attention differ; naming the file and the key.
    """
    path = Path(path)
    stored = _load(path)
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
    return Published(path, kind, state, _sizes(path, state), stored["epoch"])


def _settings(published: Published, given: Mapping[str, Any], announce: Callable[[str], None]) -> dict[str, Any]:
    known = {k: v for k, v in DEFAULTS.items() if published.backbone == "dste" or k not in DSTE_ONLY}
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise ValueError(
            f"load: settings of {published.path} must be among {sorted(known)}, got {unknown}. "
            "Sizes are read off the file."
        )
    settings = {**known, **given}
    read = ", ".join(f"{k}={v}" for k, v in published.inferred.items())
    assumed = ", ".join(f"{k}={v}" + ("" if k in given else " (assumed)") for k, v in settings.items())
    announce(f"{published.path.name}: {published.backbone.upper()}, {read}; not recorded in the file: {assumed}")
    return settings


def _load_strictly(model: nn.Module, published: Published, unused: tuple[str, ...], prefix: str = "") -> None:
    """Copy the file's tensors, all but those that start with `unused`; all of the head may be missing."""
    stored = {k.removeprefix(prefix): v for k, v in published.state.items() if not k.startswith(unused)}
    own = model.state_dict()
    if not any(key in stored for key in HEAD):
        stored |= {key: own[key] for key in HEAD if key in own}
    missing, extra = [k for k in own if k not in stored], [k for k in stored if k not in own]
    wrong = [k for k in own if k in stored and own[k].shape != stored[k].shape]
    if missing or extra or wrong:
        raise ValueError(
            f"load: {published.path} must fit the model, got missing {missing[:3]}, unexpected {extra[:3]}, "
            f"of another shape {wrong[:3]}. Check the settings, or use an intact file."
        )
    model.load_state_dict(stored)


def load_downstream(
    path: str | os.PathLike[str], num_class: int = 60, *, announce: Callable[[str], None] = print, **settings: Any
) -> dste.Downstream | sttr.Downstream:
    """Build the reference's `Downstream` from a published checkpoint; its head `fc` (K, 2H) starts anew unless stored.

    Args:
        path: File written by the reference or by `export`.
        num_class: Classes K.
        announce: Where the sizes read, the defaults assumed and a head that starts anew are reported.
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
    _load_strictly(model, published, unused=PROJECTORS)
    if HEAD[0] not in published.state:
        announce(f"{published.path.name}: no head stored, fc of {num_class} classes starts anew")
    return model


def load_published_encoder(
    path: str | os.PathLike[str],
    *,
    num_bodies: int | None = None,
    topology: Topology | None = None,
    announce: Callable[[str], None] = print,
    **settings: Any,
) -> tuple[Encoder, ViewSpec]:
    """Build a native encoder of views (N, T, M, V, C) from a published checkpoint, in eval mode, and its view.

    Args:
        path: File written by the reference or by `export`.
        num_bodies: Bodies M that the spatial tokens are shared among; None takes as many as the topology's joints fit in,
            or assumes two, or one of an odd number.
        topology: Skeleton V of the data it will see, which must be the one it was trained on.
        announce: Where the sizes read and the defaults assumed are reported.
        settings: What the file does not record: `num_head`, `gap`, `alpha`, `modality`.
    Returns:
        The encoder, and the view it expects: whole clips, not normalised again.
    Raises:
        ValueError: If the file cannot be read or does not fit exactly, or its tokens cannot be shared among the bodies.
    """
    published = read_published(path)
    chosen = _settings(published, settings, announce)
    # the constructor translates the reference's arguments: nothing of this model but its configuration is used
    with torch.device("meta"):
        config = MODULES[published.backbone].Downstream(**published.inferred, **chosen).backbone.config
    tokens = config["num_joints"] * config["num_bodies"]
    if num_bodies is None and topology is not None:
        if tokens % topology.num_joints:
            raise ValueError(
                f"load: the {tokens} spatial tokens of {published.path} must be bodies of {topology.num_joints} joints, as "
                f"{topology.name} has; they are not. Pack the data with the skeleton it was trained on."
            )
        num_bodies = tokens // topology.num_joints
    if num_bodies is not None:
        if num_bodies < 1 or tokens % num_bodies:
            raise ValueError(
                f"load: num_bodies must divide the {tokens} spatial tokens of {published.path}, got {num_bodies}. "
                "Give the bodies it was trained on."
            )
        config = {**config, "num_bodies": num_bodies, "num_joints": tokens // num_bodies}
    origin = "given" if num_bodies is not None else "assumed"
    announce(f"{published.path.name}: {config['num_joints']} joints of {config['num_bodies']} bodies ({origin})")
    encoder = ENCODERS[f"usdrl-{published.backbone}"](**config)
    _load_strictly(encoder, published, unused=(*PROJECTORS, "fc."), prefix="backbone.")
    # the reference's bones differ from the default ones for 17 joints
    variant = bones(config["num_joints"])[1] if chosen["modality"] == "bone" else None
    return encoder.eval(), eval_view(config["num_frames"], chosen["modality"], normalise="none", bone_variant=variant)


def _native_name(key: str) -> str:
    """Name of a parameter or buffer in a native checkpoint, which stores a shared attention once."""
    key = key.replace(".DSA.attn.", ".CA.attn.")
    return f"encoder.{key.removeprefix('backbone.')}" if key.startswith("backbone.") else f"objective.{key}"


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
        announce: Where a size or rate that the published scripts hard-code differently is reported.
    Raises:
        ValueError: If the run holds anything the reference cannot express, or `out` exists or has no folder.
    """
    checkpoint = read_checkpoint(run, optimizer=True)
    target = Path(out)
    if target.exists():
        raise ValueError(f"export: out must be new, got the existing {target}. Remove it or choose another name.")
    if not target.parent.is_dir():
        raise ValueError(f"export: out must be in an existing folder, got {target}. Create {target.parent} first.")
    model = _pretraining_model(checkpoint)
    model.load_state_dict({key: checkpoint.model[_native_name(key)] for key in model.state_dict()})
    config = checkpoint.state["encoder"]["config"]
    tokens, frames = config["num_joints"] * config["num_bodies"], config["num_frames"]
    if tokens not in REFERENCE_TOKENS or frames != REFERENCE_FRAMES:
        announce(
            f"export: {tokens} spatial tokens and {frames} frames; the published scripts hard-code {REFERENCE_TOKENS} and "
            f"{REFERENCE_FRAMES}: change them there, or load the file with fastskel.compat.usdrl"
        )
    if config.get("drop_path", REFERENCE_DROP_PATH) != REFERENCE_DROP_PATH:
        announce(f"export: drop_path {config['drop_path']}; the reference always trains with {REFERENCE_DROP_PATH}")
    view = checkpoint.state["eval_view"]
    if view["normalise"] != "none" or view["stream"] != "joint":
        announce(
            f"export: the file records neither normalise={view['normalise']} nor modality={view['stream']}: give the same to "
            "whatever reads it"
        )
    settings = dict(checkpoint.state["optimizer"])
    # checkpoints of older versions were all made with it and do not say so
    if (name := settings.pop("name", "adam")) != "adam":
        raise ValueError(f"export: {run} must be trained with adam, as the reference is, got {name}. Export another run.")
    optimizer = torch.optim.Adam(model.parameters(), **settings).state_dict()
    for number, (name, _) in enumerate(model.named_parameters()):
        kinds = ("step", "exp_avg", "exp_avg_sq")
        optimizer["state"][number] = {kind: checkpoint.optimizer[f"{_native_name(name)}/{kind}"] for kind in kinds}
    state = {f"{PREFIX}{key}": value for key, value in model.state_dict().items()}
    with atomic_write(target) as scratch:
        torch.save({"epoch": checkpoint.state["epoch"], "state_dict": state, "optimizer": optimizer}, scratch)
    return target
