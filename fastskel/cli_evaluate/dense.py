"""Commands that classify every frame of untrimmed recordings: detection, segmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastskel.cli_evaluate.options import (
    Data,
    EvaluateOptions,
    Run,
    changed,
    prepare,
    refuse_of_fine_tuning,
    warn_if_seen,
)
from fastskel.cli_evaluate.trained import say_adapted, source_of
from fastskel.evaluate.dense import DenseConfig
from fastskel.evaluate.detection import ProposalConfig
from fastskel.evaluate.finetune import FinetuneConfig
from fastskel.evaluate.frame_tuning import TRAINING_SETTINGS

if TYPE_CHECKING:
    from fastskel.evaluate import Evaluation

__all__ = ["detect", "segment"]

@dataclass(frozen=True)
class TuningOptions:
    """With --fine-tune: settings beside epochs, learning rate, weight decay and seed, which are those of the head.

    Attributes:
        batch_size: Windows per step.
        optimizer: adamw, or sgd with momentum 0.9.
        layer_decay: Factor of the step size for each layer further from the output; 1 for equal steps.
        warmup_epochs: Epochs over which the step size rises.
        schedule: cosine falls to zero; step falls tenfold at the milestones.
        milestones: Epochs of the schedule step; none for a constant step size.
        label_smoothing: Share of the target that is spread over all classes.
        drop_path: DropPath rate in training; by default the encoder's own.
        start: First weights of the head: random, or those that the encoder's frozen features teach it (probe).
        frozen_epochs: First epochs that train the head alone.
    """

    batch_size: int = 64
    optimizer: Literal["adamw", "sgd"] = "adamw"
    layer_decay: float = 0.75
    warmup_epochs: float = 5.0
    schedule: Literal["cosine", "step"] = "cosine"
    milestones: tuple[int, ...] = ()
    label_smoothing: float = 0.1
    drop_path: float | None = None
    start: Literal["random", "probe"] = "probe"
    frozen_epochs: int = 0


@dataclass(frozen=True)
class EncoderOptions:
    """What is done to the encoder.

    Attributes:
        fine_tune: Train the encoder with the head, once for each fold, instead of the head alone.
        resume: Go on where a fine-tuning was stopped, bit for bit; all settings must be the same.
        adapt: Adapt an encoder of another skeleton, number of bodies, unit or upward axis.
        trained_on: With --adapt: skeleton that a published file was trained on, such as ntu-25; runs record theirs.
        scale: With --adapt: factor of all coordinates; by default data of another unit are scaled to a torso of 0.4 m.
    """

    fine_tune: bool = False
    resume: bool = False
    adapt: bool = False
    trained_on: str | None = None
    scale: float | None = None

    def adaptation(self, run: Path) -> list[str]:
        """Name the settings of the adaptation that are not as usual.

        Raises:
            ValueError: If they do not go together, or with what the encoder's file records.
        """
        given = changed({"trained_on": self.trained_on, "scale": self.scale}, {"trained_on": None, "scale": None})
        if given and not self.adapt:
            raise ValueError(f"evaluate: {', '.join(given)} must be left out without adapt, which they are of. Pass --adapt.")
        if self.trained_on is not None and not run.is_file():
            raise ValueError(f"evaluate: trained_on must be left out, {run} records its skeleton. It is for published files.")
        if self.adapt and self.trained_on is None and run.is_file():
            raise ValueError(
                f"evaluate: trained_on must be given with adapt, {run} is a published file and does not record its skeleton. "
                "Name it, such as --trained-on ntu-25."
            )
        return ["adapted", *given] if self.adapt else []


DENSE, PROPOSALS, TUNING, ENCODER = DenseConfig(), ProposalConfig(), TuningOptions(), EncoderOptions()


def _prepare(
    task: str, run: Path, data: Path, config: DenseConfig, encoder: EncoderOptions, tuning: TuningOptions,
    options: EvaluateOptions, shown: Sequence[str] = (),
) -> tuple[Evaluation, Path, dict[str, Any]]:  # fmt: skip
    """The evaluation of clips (N, T, M, V, C), its folder, and what is done to the encoder."""
    import numpy as np

    from fastskel.data.packed import open_dataset
    from fastskel.evaluate.dense import leave_one_out

    parts, column = None, config.leave_one_out
    if column is None and options.protocol is None and options.split_file is None:
        raise ValueError(
            f"evaluate: leave_one_out, protocol or split_file must be given for {task}, got none. Name a column whose values are "
            "tested in turn, such as --leave-one-out subject."
        )
    if column is not None:
        if options.protocol is not None or options.split_file is not None:
            raise ValueError(
                "evaluate: protocol and split_file must be left out with leave_one_out, which tests every value in turn. "
                "Leave one out."
            )
        dataset = open_dataset(data)
        # any of its folds: the task makes them all of the clips of both parts
        parts = f"leave-one-{column}-out", leave_one_out(dataset, column, np.arange(len(dataset)))[0][1]
    # the head is named whatever it is
    head = changed(config.head, replace(DENSE.head, head=config.head.head))
    settings = [config.head.head, *head, *changed(config.windows, DENSE.windows)]
    settings += ["drop_reversed"] if config.drop_reversed else []
    given = changed(tuning, TUNING)
    if not encoder.fine_tune:
        refuse_of_fine_tuning(given, encoder.resume)
    settings += ["fine-tuned", *given] if encoder.fine_tune else []
    settings += encoder.adaptation(run)
    evaluation, folder = prepare(task, run, data, options, [*settings, *shown], parts, encoder.trained_on)
    source = source_of(run) if encoder.adapt else None
    done: dict[str, Any] = {"resume": encoder.resume, "source": source, "scale": encoder.scale, "on_adapted": say_adapted}
    if encoder.fine_tune:
        shared = {name: getattr(config.head, name) for name in TRAINING_SETTINGS}
        # what the head is not told is as usual for a fine-tuning
        shared = {name: value for name, value in shared.items() if value is not None}
        done["finetune_config"] = FinetuneConfig(**shared, **vars(tuning))
    return evaluation, folder, done


def _say(result: Mapping[str, Any], folder: Path, names: Sequence[str]) -> None:
    """Print results of all test recordings, () each, in percent, and over folds where there are any."""
    print("  ".join(f"{name} {100 * result[name]:.1f} %" for name in names))
    if "over_folds" in result:
        spreads = {name: result["over_folds"][name] for name in names if name in result["over_folds"]}
        row = "  ".join(f"{name} {100 * s['mean']:.1f} ± {100 * s['deviation']:.1f} %" for name, s in spreads.items())
        print(f"mean and deviation over {len(result['folds'])} folds: {row}")
    print(f"({result['num_test']} test recordings, {result['num_test_frames']} frames; {folder})")


def detect(
    run: Run,
    data: Data,
    config: DenseConfig = DENSE,
    proposals: ProposalConfig = PROPOSALS,
    frame_rate: float | None = None,
    encoder: EncoderOptions = ENCODER,
    tuning: TuningOptions = TUNING,
    common: EvaluateOptions = EvaluateOptions(),
) -> None:
    """Find actions in untrimmed recordings: start, end and class of each.

    Args:
        run: Run folder, native checkpoint folder, or published .pth.tar.
        data: Packed data set with segments.
        config: Head, windows, folds.
        proposals: How frame probabilities become proposals.
        frame_rate: Valid frames a second, to write proposals in seconds too.
        encoder: What is done to the encoder.
        tuning: Settings of the fine-tuning.
        common: What every evaluation takes.
    """
    from fastskel.evaluate import evaluate_detection

    shown = [f"nms{proposals.nms:g}"] if proposals.nms is not None else []
    if proposals.thresholds != PROPOSALS.thresholds:
        shown.insert(0, "above" + "-".join(f"{value:g}" for value in proposals.thresholds))
    # seconds of proposals.json; how many timelines are kept changes no number, and does not show
    shown += changed({"frame_rate": frame_rate}, detect)
    evaluation, folder, done = _prepare("detect", run, data, config, encoder, tuning, common, shown)
    result = evaluate_detection(evaluation, folder, config=config, proposals=proposals, frame_rate=frame_rate, **done)
    warn_if_seen(result)
    print("IoU   " + "  ".join(f"{threshold:>5}" for threshold in result["thresholds"]))
    for title, name in (("action", "map_action"), ("video", "map_video")):
        print(f"{title:<6}" + "  ".join(f"{100 * row[name]:5.1f}" for row in result["thresholds"].values()) + "  mAP, %")
    print("at an IoU of 0.5:")
    _say(result, folder, ("map_action", "map_video", "f1"))


def segment(
    run: Run,
    data: Data,
    config: DenseConfig = DENSE,
    count_background: bool = False,
    encoder: EncoderOptions = ENCODER,
    tuning: TuningOptions = TUNING,
    common: EvaluateOptions = EvaluateOptions(),
) -> None:
    """Give every frame of untrimmed recordings its class.

    Args:
        run: Run folder, native checkpoint folder, or published .pth.tar.
        data: Packed data set with segments.
        config: Head, windows, folds.
        count_background: Count runs of frames without an action in edit score and F1 as those of any class.
        encoder: What is done to the encoder.
        tuning: Settings of the fine-tuning.
        common: What every evaluation takes.
    """
    from fastskel.evaluate import evaluate_segmentation

    shown = ["background"] if count_background else []
    evaluation, folder, done = _prepare("segment", run, data, config, encoder, tuning, common, shown)
    result = evaluate_segmentation(evaluation, folder, config=config, count_background=count_background, **done)
    warn_if_seen(result)
    _say(result, folder, ("accuracy", "majority_accuracy", "edit", "f1@10", "f1@25", "f1@50"))
