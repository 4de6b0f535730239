"""An encoder and a head that are trained together: a classifier of clips, and how such models are kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastskel.data.batch import View
from fastskel.data.packed import PackedDataset
from fastskel.data.views import ViewSpec
from fastskel.evaluate.adapted import AdaptedEncoder
from fastskel.evaluate.features import batches
from fastskel.evaluate.linear import INIT_STD
from fastskel.models.encoder import ENCODERS, Encoder
from fastskel.nn.pool import prefix_pool
from fastskel.train.checkpoint import (
    load_encoder,
    load_weights,
    newest,
    prune,
    read_checkpoint,
    save_checkpoint,
    weights,
)

__all__ = [
    "Classifier", "ClassifierStore", "TunedModel", "adapted_again", "bare_encoder", "class_scores", "described_encoder",
    "load_classifier", "parts_of",
]


class TunedModel(nn.Module):
    """An encoder and a head on what it says of views (N, T, M, V, C), trained together.

    Attributes:
        encoder: Encoder.
        head: Layers on its features.
    """

    encoder: Encoder
    head: nn.Module


class Classifier(TunedModel):
    """An encoder and a linear layer on its pooled features, views (N, T, M, V, C) to class scores (N, K).

    Given `frames`, the encoder is run causally, and the layer reads maximum and mean of the temporal tokens up to each of
    those frames: scores (N, R, K) of R observations in one pass.

    Args:
        encoder: Encoder; trained with the rest.
        num_classes: K.
        frames: Numbers of frames after which to classify, (R,), at least 1 each; None classifies whole clips.
        seed: Of the layer's first weights, N(0, 0.01); its bias starts as 0.
    Raises:
        ValueError: If a number of frames is below 1.
    """

    head: nn.Linear

    def __init__(self, encoder: Encoder, num_classes: int, *, frames: tuple[int, ...] | None = None, seed: int = 0) -> None:
        super().__init__()
        if frames is not None and (not frames or min(frames) < 1):
            raise ValueError(f"Classifier: frames must be at least 1 each, got {frames}. Count them from 1.")
        self.encoder, self.frames = encoder, frames
        # maximum and mean
        width = encoder.num_features if frames is None else 2 * encoder.num_token_features
        self.head = nn.Linear(width, num_classes)
        with torch.no_grad():
            self.head.weight.normal_(0, INIT_STD, generator=torch.Generator().manual_seed(seed))
            self.head.bias.zero_()

    def forward(self, view: View) -> Tensor:
        """Score the classes of a view: (N, K), or (N, R, K) given frames.

        Raises:
            ValueError: If the encoder has no causal mode, or the view has fewer frames.
        """
        if self.frames is None:
            out: Tensor = self.head(self.encoder(view).pooled)
            return out
        tokens = self.encoder(view, mode="causal").need("temporal", "early")
        if max(self.frames) > tokens.shape[1]:
            raise ValueError(
                f"Classifier: views must have {max(self.frames)} frames, got {tokens.shape[1]}. Use the view it was made for."
            )
        out = self.head(prefix_pool(tokens)[:, torch.tensor(self.frames, device=tokens.device) - 1])
        return out


def class_scores(
    classifier: Classifier,
    dataset: PackedDataset,
    view: ViewSpec,
    indices: NDArray[np.int64],
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    num_threads: int = 1,
    precision: str = "fp32",
    progress: bool = False,
) -> Tensor:
    """Score clips (N,) in evaluation mode and without gradients; the classifier stays on the device and in that mode.

    Returns:
        Scores on the host, (N, K) or (N, R, K), float32.
    Raises:
        ValueError: If a score is not finite, naming the clip.
    """
    classifier.to(device).eval()
    mixed = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
    parts = []
    with torch.no_grad(), mixed:
        for batch in batches(dataset, view, indices, batch_size, num_threads, progress, "classify"):
            parts.append(classifier(batch.views[0].to(device)).float().cpu())
    scores = torch.cat(parts)
    bad = (~scores.isfinite()).flatten(1).any(1).nonzero()
    if bad.numel():
        name = dataset.names[indices[int(bad[0])]]
        raise ValueError(
            f"class_scores: scores must be finite, got nan or inf for clip {name} of {dataset.path}. Check weights and clip."
        )
    return scores


def bare_encoder(encoder: Encoder) -> Encoder:
    """The encoder without what adapts it to clips (N, T, M, V, C)."""
    return encoder.encoder if isinstance(encoder, AdaptedEncoder) else encoder


def described_encoder(encoder: Encoder) -> dict[str, Any]:
    """Say which registered encoder of views (N, T, M, V, C) this is, and what it and its adaptation are built with.

    Raises:
        ValueError: If its class is not registered: it could not be built again.
    """
    bare = bare_encoder(encoder)
    name = next((name for name in ENCODERS if ENCODERS[name] is type(bare)), None)
    if name is None:
        raise ValueError(
            f"described_encoder: encoder must be registered to be saved, got {type(bare).__name__}. Add it to ENCODERS."
        )
    return {"name": name, "config": bare.config, "adapted": encoder.config if bare is not encoder else None}


def adapted_again(encoder: Encoder, described: Mapping[str, Any]) -> Encoder:
    """Put what adapted an encoder to its clips (N, T, M, V, C) back in front of it, as `described_encoder` says."""
    adapted = described.get("adapted")
    return encoder if adapted is None else AdaptedEncoder(encoder, **adapted).eval()


def parts_of(model: TunedModel) -> dict[str, nn.Module]:
    """What is trained, by name: the encoder itself, whatever adapts it to clips (N, T, M, V, C), and the head."""
    return {"encoder": bare_encoder(model.encoder), "head": model.head}


@dataclass
class ClassifierStore:
    """Where checkpoints of a training go; nothing is written without a folder.

    Attributes:
        folder: Folder of the results.
        told: What every checkpoint says beside the epochs done; its "identity" must stay the same when a training resumes.
    """

    folder: Path | None
    told: Mapping[str, Any] = field(default_factory=dict)

    def save(self, model: TunedModel, optimizer: torch.optim.Optimizer | None, history: list[dict[str, Any]]) -> Path | None:
        """Write a checkpoint of all weights (D, ..) after the epochs of `history`; return its folder."""
        if self.folder is None:
            return None
        moments = None
        if optimizer is not None:
            state = optimizer.state_dict()["state"]
            moments = {f"{i}/{kind}": v for i, kinds in state.items() for kind, v in kinds.items() if isinstance(v, Tensor)}
        done = len(history)
        told = {**self.told, "epoch": done, "history": history}
        path = save_checkpoint(self.folder / "checkpoints", done, weights(parts_of(model)), told, moments)
        prune(self.folder, keep=1)
        return path

    def load(self, model: TunedModel, optimizer: torch.optim.Optimizer, resume: bool) -> list[dict[str, Any]]:
        """Go on where the folder's training stands, with all its tensors (D, ..); return its history.

        Raises:
            ValueError: If it is not to resume, or has other settings.
        """
        last = None if self.folder is None else newest(self.folder)
        if last is None:
            return []
        if not resume:
            raise ValueError(
                f"finetune: out must be new, got {self.folder} with a fine-tuning. Resume it (--resume), or choose another."
            )
        checkpoint = read_checkpoint(last)
        before, now = checkpoint.state.get("identity", {}), self.told["identity"]
        changed = [name for name in now if name != "config" and before.get(name) != now[name]]
        own = before.get("config", {})
        changed += [name for name, value in now["config"].items() if own.get(name) != value]
        if changed:
            raise ValueError(
                f"finetune: a resumed fine-tuning must keep its settings, got other {', '.join(changed)} than in {last}. Give "
                "the same ones, or choose another folder."
            )
        load_weights(parts_of(model), checkpoint.model, last)
        history: list[dict[str, Any]] = checkpoint.state["history"]
        if len(history) < now["config"]["epochs"]:
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in read_checkpoint(last, optimizer=True).optimizer.items():
                number, kind = key.split("/")
                state.setdefault(int(number), {})[kind] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return history


def load_classifier(path: str | os.PathLike[str]) -> tuple[Classifier, ViewSpec, list[str]]:
    """Read a fine-tuned classifier, in evaluation mode.

    Args:
        path: Folder of a fine-tuning's results, or one of its checkpoints.
    Returns:
        The classifier of views (N, T, M, V, C), how its views are made, and the names of the K classes.
    Raises:
        ValueError: If there is no complete checkpoint of a classifier, or a file is damaged.
    """
    encoder, view, checkpoint = load_encoder(path)
    try:
        classes = [str(name) for name in checkpoint.state["class_names"]]
        frames, encoder = checkpoint.state["frames"], adapted_again(encoder, checkpoint.state["encoder"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"load_classifier: {checkpoint.path} must hold a classifier, got {error!r}. Give what `evaluate finetune` wrote."
        ) from error
    classifier = Classifier(encoder, len(classes), frames=None if frames is None else tuple(frames))
    load_weights(parts_of(classifier), checkpoint.model, checkpoint.path)
    return classifier.eval(), view, classes
