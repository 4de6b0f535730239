"""Fine-tuning for frames: encoder and head trained on the windows of untrimmed recordings, resumable bit for bit.

Training windows are cut as those of the test are, alike in every epoch: with half overlap a frame is seen in two places, and an
epoch has the same number of steps. The published detection tests on windows that do not overlap. The order of windows is drawn
at (seed, epoch), DropPath at (seed, step), the head's first weights at seed. The loss is the cross-entropy of all frames of a
batch of windows.

At test time the class scores of overlapping windows are averaged, before the softmax. For the linear head this is the mean of
the features, as heads on frozen features have it: what differs is the training alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from fastskel import philox
from fastskel.data.batch import DrawAddress, View, concat_views
from fastskel.data.identity import described_data
from fastskel.evaluate.classifier import ClassifierStore, TunedModel, described_encoder
from fastskel.evaluate.evaluation import Evaluation
from fastskel.evaluate.finetune import FinetuneConfig
from fastskel.evaluate.frame_heads import (
    FrameHead,
    FrameHeadConfig,
    class_weights,
    new_head,
    smoothing_loss,
    train_frame_head,
)
from fastskel.evaluate.seen import handed_on
from fastskel.evaluate.training import set_drop_path, train_epoch, train_epochs, trainable_copy, training_identity
from fastskel.evaluate.windows import (
    Windows,
    check_window_view,
    frame_features,
    frames_of,
    mean_over_windows,
    window_cuts,
    window_view,
)
from fastskel.models.encoder import Encoder
from fastskel.train.stage import describe

__all__ = ["FrameClassifier", "TunedFrames", "fine_tune_frames", "tuned_probabilities"]

# what torch's cross-entropy leaves out: frames behind the end of a window that is shorter than others of its batch
NO_LABEL = -100
# of a head: the settings of its training, in whose place those of the fine-tuning are
TRAINING_SETTINGS = ("epochs", "learning_rate", "weight_decay", "seed")


class FrameClassifier(TunedModel):
    """An encoder and a head of frames, views of windows (N, T, M, V, C) to class scores of the windows' frames.

    Args:
        encoder: Encoder; trained with the head.
        head: Scores frames (N, L, K) from their features (N, L, D).
        spatial: Whether the windows' spatial features are added to those of each frame.
        task: Named in the error of an encoder without frame features.
    """

    head: FrameHead

    def __init__(self, encoder: Encoder, head: FrameHead, *, spatial: bool = False, task: str = "frame classifier") -> None:
        super().__init__()
        self.encoder, self.head, self.spatial, self.task = encoder, head, spatial, task

    def forward(self, view: View, lengths: Sequence[int]) -> Tensor:
        """Score the frames of windows.

        Args:
            view: Views of windows, (N, T, M, V, C).
            lengths: Frames of the recording in each window, (N,).
        Returns:
            Class scores, (N, L, K), L the greatest length; zero behind the end of shorter windows.
        """
        features, longest = self.encoder(view), max(lengths)
        order = sorted(range(len(lengths)), key=lambda row: lengths[row])
        parts = []
        for length in sorted(set(lengths)):
            rows = [row for row in order if lengths[row] == length]
            frames = frames_of(features, length, spatial=self.spatial, task=self.task, rows=rows)
            parts.append(functional.pad(self.head(frames), (0, 0, 0, longest - length)))
        return torch.cat(parts)[np.argsort(order).tolist()]


@dataclass(frozen=True)
class TunedFrames:
    """What a fine-tuning for frames made.

    Attributes:
        model: Of windows (N, T, M, V, C), in evaluation mode, on the device it was trained on.
        history: One row per epoch: step size, loss, training accuracy of frames.
        num_features: Width D of the frame features.
        checkpoint: Its folder; None where nothing was written.
    """

    model: FrameClassifier
    history: list[dict[str, Any]]
    num_features: int
    checkpoint: Path | None


@dataclass(frozen=True)
class _TrainingWindows:
    """Windows of the training recordings: which recording, from which frame, how many frames, (W,) each, and the labels."""

    evaluation: Evaluation
    cuts: list[tuple[int, int, int]]
    labels: Mapping[int, Tensor]

    def view(self, rows: Sequence[int]) -> View:
        """Views of windows, (N, T, M, V, C), on the host."""
        dataset, spec = self.evaluation.dataset, self.evaluation.view
        chosen = [self.cuts[row] for row in rows]
        return concat_views([window_view(dataset, spec, clip, np.array([start]), length) for clip, start, length in chosen])

    def batches(self, config: FinetuneConfig, epoch: int) -> Iterator[tuple[tuple[View, list[int]], Tensor]]:
        """Views and lengths of N windows, in the order of the epoch, and the labels of their frames, (N, L)."""
        order = philox.permutation(config.seed, epoch, len(self.cuts))
        for number in range(self.num_batches(config)):
            rows = order[number * config.batch_size : (number + 1) * config.batch_size]
            chosen = [self.cuts[row] for row in rows.tolist()]
            index, step = torch.from_numpy(rows), epoch * self.num_batches(config) + number
            address = DrawAddress(config.seed, step, index, torch.zeros_like(index))
            view = replace(self.view(rows.tolist()).to(self.evaluation.device), address=address)
            own = [self.labels[clip][start : start + length] for clip, start, length in chosen]
            labels = pad_sequence(own, batch_first=True, padding_value=NO_LABEL).to(self.evaluation.device)
            yield (view, [length for _, _, length in chosen]), labels

    def num_batches(self, config: FinetuneConfig) -> int:
        """Steps of an epoch, ()."""
        return -(-len(self.cuts) // config.batch_size)


def _width(encoder: Encoder, windows: _TrainingWindows, spatial: bool, task: str) -> int:
    """Width D of the frame features (T, D), read off those of one window."""
    encoder.to(windows.evaluation.device).eval()
    with torch.no_grad():
        features = encoder(windows.view([0]).to(windows.evaluation.device))
    return frames_of(features, 1, spatial=spatial, task=task).shape[2]


def _told(
    evaluation: Evaluation, model: FrameClassifier, config: FinetuneConfig, recordings: NDArray[np.int64],
    data: _TrainingWindows, head: FrameHeadConfig, windows: Windows, class_names: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """What a checkpoint says of a training on recordings (N,)."""
    digest = hashlib.sha256(b"".join(data.labels[clip].numpy().astype("<i8").tobytes() for clip in recordings.tolist()))
    shape = {name: value for name, value in asdict(head).items() if name not in TRAINING_SETTINGS}
    identity = training_identity(
        evaluation, model, config, evaluation.view, recordings,
        head=shape, windows=asdict(windows), labels=digest.hexdigest(),
    )  # fmt: skip
    return {
        "task": model.task, "encoder": described_encoder(model.encoder), "eval_view": evaluation.view,
        "topology": evaluation.dataset.topology.name, "class_names": list(class_names), "run": evaluation.run,
        "config": describe(config), "head": shape, "windows": asdict(windows), "identity": identity,
        "described": described_data(evaluation.dataset),
        "seen": handed_on(evaluation.seen, evaluation.dataset, recordings, evaluation.trained_on),
    }  # fmt: skip


def fine_tune_frames(
    evaluation: Evaluation,
    recordings: NDArray[np.int64],
    labels: Mapping[int, Tensor],
    class_names: Sequence[str],
    config: FinetuneConfig | None = None,
    *,
    head: FrameHeadConfig | None = None,
    windows: Windows | None = None,
    task: str = "fine_tune_frames",
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    title: str = "fine-tuning",
) -> TunedFrames:
    """Train a copy of an encoder with a head of frames on the windows of recordings.

    Args:
        evaluation: Encoder, recordings (T, M, V, C) each, and how their windows are seen; its own encoder stays as it is.
        recordings: Those to train on, (N,).
        labels: Class of each frame of each of them, (T,), int64.
        class_names: K names, that of the background first.
        config: Optimiser and schedule; it takes the place of the head's own epochs, step size, decay and seed.
        head: Kind and sizes of the head, class weights, smoothing. A tcn sees the frames of a window, not of the recording.
        windows: How recordings are cut.
        task: Named in errors and in the checkpoint.
        out: Folder for checkpoints; None: nothing is written.
        resume: Go on from the folder's checkpoint, bit for bit, or begin where there is none.
        title: Of the progress bar.
    Returns:
        The model after the last epoch.
    Raises:
        ValueError: On raw coordinates, an encoder without frame features, settings that cannot be used, a folder of another
            training, or if the loss is not finite.
    """
    config, windows = config or FinetuneConfig(), windows or Windows()
    head = replace(head or FrameHeadConfig(), seed=config.seed)
    if config.crop is not None:
        raise ValueError(f"{task}: crop must be None, windows are trained on whole, got {config.crop}. Leave it out.")
    encoder, device = trainable_copy(evaluation.encoder), torch.device(evaluation.device)
    check_window_view(evaluation.view, evaluation.dataset)
    set_drop_path(encoder, config.drop_path)
    cuts = []
    for clip in recordings.tolist():
        starts, length = window_cuts(evaluation.dataset, clip, windows, evaluation.view.frames)
        cuts += [(clip, start, length) for start in starts.tolist()]
    data = _TrainingWindows(evaluation, cuts, labels)
    width = _width(encoder, data, windows.spatial, task)
    model = FrameClassifier(encoder, new_head(head, width, len(class_names)), spatial=windows.spatial, task=task)
    store = ClassifierStore(None if out is None else Path(out))
    if out is not None:
        store.told = _told(evaluation, model, config, recordings, data, head, windows, class_names)
    model.to(device)
    weights = None
    if head.class_weights:
        weights = class_weights([labels[clip] for clip in recordings.tolist()], len(class_names)).to(device)

    def loss_of(scores: Tensor, truth: Tensor) -> Tensor:
        loss = functional.cross_entropy(
            scores.flatten(0, 1), truth.flatten(), weights, ignore_index=NO_LABEL, label_smoothing=config.label_smoothing
        )
        if head.smoothing:
            ends = (truth != NO_LABEL).sum(1).tolist()
            steps = [smoothing_loss(rows[:end]) for rows, end in zip(scores, ends, strict=True)]
            loss = loss + head.smoothing * torch.stack(steps).mean()
        return loss

    def one_epoch(optimizer: torch.optim.Optimizer, epoch: int) -> dict[str, Any]:
        return train_epoch(
            model, optimizer, data.batches(config, epoch), config, epoch, num_batches=data.num_batches(config), loss_of=loss_of,
            device=device, precision=evaluation.precision,
        )  # fmt: skip

    def start_from_frozen() -> None:
        own = replace(head, epochs=None, learning_rate=None, weight_decay=None)
        features = frame_features(evaluation, recordings, windows, task=task)
        truth = [labels[clip] for clip in recordings.tolist()]
        taught = train_frame_head(features, truth, len(class_names), own, device=device)
        model.head.load_state_dict(taught.head.state_dict())

    history, path = train_epochs(
        model, config, store, one_epoch, begin=start_from_frozen, resume=resume, progress=evaluation.progress, title=title
    )
    return TunedFrames(model, history, width, path)


def tuned_probabilities(
    model: FrameClassifier, evaluation: Evaluation, recording: int, windows: Windows
) -> NDArray[np.float64]:
    """Class probabilities of the frames of a recording, (T, K): softmax of the mean scores of the windows that hold them.

    Raises:
        ValueError: If a score is not finite, naming the recording.
    """
    model.eval()
    scores = mean_over_windows(evaluation, recording, windows, lambda view, length: model(view, [length] * len(view.clips)))
    if not bool(scores.isfinite().all()):
        raise ValueError(
            f"{model.task}: scores must be finite, got nan or inf for recording {evaluation.dataset.names[recording]} of "
            f"{evaluation.dataset.path}. Check weights and recording."
        )
    probabilities: NDArray[np.float64] = functional.softmax(scores.double(), 1).numpy()
    return probabilities
