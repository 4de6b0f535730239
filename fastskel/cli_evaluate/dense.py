"""Commands that classify every frame of untrimmed recordings: detection, segmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastskel.cli_evaluate.options import Data, EvaluateOptions, Run, changed, prepare, warn_if_seen
from fastskel.evaluate.dense import DenseConfig
from fastskel.evaluate.detection import ProposalConfig

if TYPE_CHECKING:
    from fastskel.evaluate import Evaluation

__all__ = ["detect", "segment"]

DENSE, PROPOSALS = DenseConfig(), ProposalConfig()


def _prepare(
    task: str, run: Path, data: Path, config: DenseConfig, options: EvaluateOptions, shown: Sequence[str] = ()
) -> tuple[Evaluation, Path]:
    import numpy as np

    from fastskel.data.packed import open_dataset
    from fastskel.evaluate.dense import leave_one_out

    parts, column = None, config.leave_one_out
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
    return prepare(task, run, data, options, [*settings, *shown], parts)


def _say(result: Mapping[str, Any], folder: Path, names: Sequence[str]) -> None:
    """Print results of all test recordings, () each, in percent, and over folds where there are any."""
    warn_if_seen(result)
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
    common: EvaluateOptions = EvaluateOptions(),
) -> None:
    """Find actions in untrimmed recordings: start, end and class of each.

    Args:
        run: Run folder, native checkpoint folder, or published .pth.tar.
        data: Packed data set with segments.
        config: Head, windows, folds.
        proposals: How frame probabilities become proposals.
        frame_rate: Valid frames a second, to write proposals in seconds too.
        common: What every evaluation takes.
    """
    from fastskel.evaluate import evaluate_detection

    shown = [f"nms{proposals.nms:g}"] if proposals.nms is not None else []
    if proposals.thresholds != PROPOSALS.thresholds:
        shown.insert(0, "above" + "-".join(f"{value:g}" for value in proposals.thresholds))
    evaluation, folder = _prepare("detect", run, data, config, common, shown)
    result = evaluate_detection(evaluation, folder, config=config, proposals=proposals, frame_rate=frame_rate)
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
    common: EvaluateOptions = EvaluateOptions(),
) -> None:
    """Give every frame of untrimmed recordings its class.

    Args:
        run: Run folder, native checkpoint folder, or published .pth.tar.
        data: Packed data set with segments.
        config: Head, windows, folds.
        count_background: Count runs of frames without an action in edit score and F1 as those of any class.
        common: What every evaluation takes.
    """
    from fastskel.evaluate import evaluate_segmentation

    evaluation, folder = _prepare("segment", run, data, config, common, ["background"] if count_background else [])
    result = evaluate_segmentation(evaluation, folder, config=config, count_background=count_background)
    _say(result, folder, ("accuracy", "majority_accuracy", "edit", "f1@10", "f1@25", "f1@50"))
