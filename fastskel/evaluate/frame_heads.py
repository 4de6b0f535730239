"""Heads that classify every frame of a recording of any length from its frame features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fastskel import philox

__all__ = [
    "FrameHead", "FrameHeadConfig", "TrainedHead", "class_weights", "frame_probabilities", "new_head", "smoothing_loss",
    "train_frame_head",
]  # fmt: skip

# of log probabilities, as in MS-TCN: larger steps are true changes of the action and cost no more
SMOOTHING_LIMIT = 4.0
RATES = {"linear": 1e-2, "tcn": 1e-3}
EPOCHS = 50


@dataclass(frozen=True)
class FrameHeadConfig:
    """A head and how it is trained: Adam, a recording a step, the cross-entropy of its frames.

    Where the encoder is trained with it, epochs, step size and decay that are None are those of the fine-tuning.

    Attributes:
        head: linear, each frame for itself, or tcn, dilated convolutions over the frames of the whole recording.
        hidden: Channels of the tcn.
        layers: Dilated layers of the tcn, of dilations 1, 2, 4, ..; it sees 2^(layers + 1) - 1 frames.
        epochs: Passes over the training recordings. None is 50, or as many as a fine-tuning usually has.
        learning_rate: Step size; features are standardised first, so one suits most encoders. None is 0.01 for linear and 0.001
            for the tcn, best of 0.001 to 0.03 on training subjects of UTKinect held out, or that of a fine-tuning.
        weight_decay: Of the optimiser. None is 0, or that of a fine-tuning.
        class_weights: Weigh frames by the inverse frequency of their class among the training frames.
        smoothing: Weight of the truncated squared step of log probabilities between frames; MS-TCN has 0.15.
        seed: Of the initial weights and the order of recordings.
    """

    head: Literal["linear", "tcn"] = "linear"
    hidden: int = 64
    layers: int = 8
    epochs: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    class_weights: bool = False
    smoothing: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.head not in ("linear", "tcn"):
            raise ValueError(f"FrameHeadConfig: head must be linear or tcn, got {self.head!r}. Choose one.")
        for name in ("hidden", "layers", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"FrameHeadConfig: {name} must be at least 1, got {value}. Raise it.")
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise ValueError(f"FrameHeadConfig: learning_rate must be positive, got {self.learning_rate}. Pass 0.001.")
        for name in ("weight_decay", "smoothing"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"FrameHeadConfig: {name} must be at least 0, got {value}. Pass 0.")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"FrameHeadConfig: seed must lie in [0, 2^64), got {self.seed}. Pass 0.")

    @property
    def rate(self) -> float:
        """Step size of a head on frozen features."""
        return RATES[self.head] if self.learning_rate is None else self.learning_rate

    @property
    def passes(self) -> int:
        """Epochs of a head on frozen features."""
        return EPOCHS if self.epochs is None else self.epochs

    @property
    def decay(self) -> float:
        """Weight decay of a head on frozen features."""
        return 0.0 if self.weight_decay is None else self.weight_decay

    @property
    def receptive_field(self) -> int:
        """Frames around one frame, itself included, that its class scores (K,) depend on, given the frame features."""
        return 1 if self.head == "linear" else 2 ** (self.layers + 1) - 1


class DilatedLayer(nn.Module):
    """Residual layer over (1, H, T): a convolution of three taps `dilation` frames apart, ReLU, a mixing of channels."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.spread = nn.Conv1d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.mix = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (1, H, T) to (1, H, T)."""
        out: Tensor = x + self.mix(functional.relu(self.spread(x)))
        return out


class FrameHead(nn.Module):
    """Class scores of the frames of a recording.

    Args:
        config: Kind and sizes.
        num_features: Width D of the frame features.
        num_classes: Classes K, the background among them.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: FrameHeadConfig, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("deviation", torch.ones(num_features))
        layers = [DilatedLayer(config.hidden, 2**number) for number in range(config.layers)]
        self.net: nn.Module
        if config.head == "linear":
            self.net = nn.Conv1d(num_features, num_classes, 1)
        else:
            first, last = nn.Conv1d(num_features, config.hidden, 1), nn.Conv1d(config.hidden, num_classes, 1)
            self.net = nn.Sequential(first, *layers, last)

    def forward(self, features: Tensor) -> Tensor:
        """Class scores (T, K) of frame features (T, D); or of windows that know nothing of each other, (N, T, K) of (N, T, D)."""
        scores: Tensor = self.net(((features - self.mean) / self.deviation).mT).mT
        return scores

    def standardise(self, features: Sequence[Tensor]) -> None:
        """Take mean and deviation of the columns from frames (T, D) of recordings; constant columns keep their scale."""
        count = sum(len(values) for values in features)
        mean = sum((values.double().sum(0) for values in features), torch.zeros(1).double()) / count
        square = sum(((values.double() - mean).square().sum(0) for values in features), torch.zeros(1).double()) / count
        largest = torch.stack([values.abs().amax(0) for values in features]).amax(0).double()
        # below the rounding of float32 a column is constant, and dividing would blow up its noise
        deviation = square.sqrt()
        constant = deviation <= torch.finfo(torch.float32).eps * largest
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(constant, 1.0, deviation))


def new_head(config: FrameHeadConfig, num_features: int, num_classes: int) -> FrameHead:
    """Make the head of features (T, D) that the seed says, on the host; torch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return FrameHead(config, num_features, num_classes)


@dataclass(frozen=True)
class TrainedHead:
    """A trained head.

    Attributes:
        head: It maps features (T, D) to class scores (T, K).
        losses: Mean loss over the recordings of each epoch.
    """

    head: FrameHead
    losses: tuple[float, ...]


def smoothing_loss(scores: Tensor) -> Tensor:
    """Truncated squared step of log probabilities from frame to frame, mean over frames and classes, a scalar.

    Args:
        scores: Class scores of consecutive frames, (T, K); 0 for a single frame.
    Source: Abu Farha and Gall, "MS-TCN", CVPR 2019: steps are cut at 4, gradients reach the later frame only.
    """
    if len(scores) < 2:
        return scores.sum() * 0
    log = functional.log_softmax(scores, 1)
    return (log[1:] - log[:-1].detach()).square().clamp(max=SMOOTHING_LIMIT**2).mean()


def class_weights(labels: Sequence[Tensor], num_classes: int) -> Tensor:
    """Weights (K,) that make every class that occurs count alike, mean 1 over frames."""
    count = torch.bincount(torch.cat(list(labels)), minlength=num_classes).double()
    occurs = count > 0
    return torch.where(occurs, count.sum() / (occurs.sum() * count.clamp(min=1)), 1.0).float()


def _check(features: Sequence[Tensor], labels: Sequence[Tensor], num_classes: int) -> None:
    if not features or len(features) != len(labels):
        raise ValueError(
            f"train_frame_head: features and labels must be one tensor per recording, got {len(features)} and {len(labels)}. "
            "Check the split."
        )
    for number, (rows, classes) in enumerate(zip(features, labels, strict=True)):
        if rows.dim() != 2 or classes.shape != rows.shape[:1] or not len(rows) or rows.shape[1] != features[0].shape[1]:
            raise ValueError(
                f"train_frame_head: recording {number} must have features (T, {features[0].shape[-1]}) and labels (T,), got "
                f"{tuple(rows.shape)} and {tuple(classes.shape)}. Encode all recordings with one encoder."
            )
        low, high = int(classes.min()), int(classes.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"train_frame_head: labels of recording {number} must lie in 0..{num_classes - 1}, got {low}..{high}. "
                "Give frames without an action the background class."
            )


def train_frame_head(
    features: Sequence[Tensor],
    labels: Sequence[Tensor],
    num_classes: int,
    config: FrameHeadConfig | None = None,
    *,
    device: torch.device | str = "cpu",
) -> TrainedHead:
    """Train a head on recordings; what it reaches depends on the arguments alone.

    Args:
        features: Frame features of each recording, (T, D).
        labels: Class of each frame, (T,), int64.
        num_classes: K.
        config: Head and training; `FrameHeadConfig()` if None.
        device: Where the head is trained.
    Returns:
        The head after the last epoch, on that device, in evaluation mode.
    Raises:
        ValueError: On shapes and labels, or if the loss is not finite.
    """
    config = config or FrameHeadConfig()
    _check(features, labels, num_classes)
    head = new_head(config, features[0].shape[1], num_classes)
    head.standardise(features)
    head.to(device).train()
    weights = class_weights(labels, num_classes).to(device) if config.class_weights else None
    optimizer = torch.optim.Adam(head.parameters(), lr=config.rate, weight_decay=config.decay)
    losses = []
    for epoch in range(config.passes):
        total = torch.zeros((), device=device)
        for number in philox.permutation(config.seed, epoch, len(features)).tolist():
            scores = head(features[number].to(device))
            loss = functional.cross_entropy(scores, labels[number].to(device), weights)
            if config.smoothing:
                loss = loss + config.smoothing * smoothing_loss(scores)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.detach()
        losses.append(float(total) / len(features))
        if not math.isfinite(losses[-1]):
            raise ValueError(
                f"train_frame_head: the loss must stay finite, got {losses[-1]} in epoch {epoch}. Lower "
                f"config.learning_rate (now {config.rate})."
            )
    return TrainedHead(head.eval(), tuple(losses))


def frame_probabilities(head: FrameHead, features: Tensor) -> NDArray[np.float64]:
    """Class probabilities of the frames of a recording, (T, K), from its frame features, (T, D)."""
    with torch.no_grad():
        scores = head(features.to(head.mean.device)).double().cpu()
    probabilities: NDArray[np.float64] = functional.softmax(scores, 1).numpy()
    return probabilities
