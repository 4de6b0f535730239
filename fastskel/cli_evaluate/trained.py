"""Commands that train an encoder further or try it where it was not made for: fine-tuning, transfer, early prediction."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fastskel.cli_evaluate.options import (
    Data,
    EvaluateOptions,
    Run,
    changed,
    prepare,
    refuse_of_fine_tuning,
    say,
    warn_if_seen,
)
from fastskel.evaluate.finetune import FinetuneConfig
from fastskel.evaluate.linear import LinearConfig

__all__ = ["early", "finetune", "say_adapted", "source_of", "transfer"]

FINETUNE = FinetuneConfig()


def _shown(settings: FinetuneConfig, fine_tune: bool = True, resume: bool = False) -> list[str]:
    """Name the settings of a fine-tuning that are not as usual; without one the seed alone may be, of what is trained instead.

    Raises:
        ValueError: If others are given without a fine-tuning, or it is to be resumed.
    """
    if not fine_tune:
        refuse_of_fine_tuning(changed(replace(settings, seed=FINETUNE.seed), FINETUNE), resume)
    # how often it is saved changes nothing
    return changed(replace(settings, save_every=FINETUNE.save_every), FINETUNE)


def _probe(seed: int) -> LinearConfig:
    # step size and standardisation are chosen on held-out training clips
    return LinearConfig(learning_rate=None, standardise=None, seed=seed)


def finetune(
    run: Run,
    data: Data,
    resume: bool = False,
    settings: FinetuneConfig = FINETUNE,
    common: EvaluateOptions = EvaluateOptions(),
) -> None:
    """Train the encoder further with a linear layer, on labels, and classify the test clips.

    Args:
        run: Run folder, native checkpoint folder, or published .pth.tar.
        data: Packed data set.
        resume: Go on where it was stopped, bit for bit; all settings must be the same.
        settings: Of the training.
        common: What every evaluation takes.
    """
    from fastskel.evaluate import evaluate_finetune

    evaluation, folder = prepare("finetune", run, data, common, _shown(settings))
    say(evaluate_finetune(evaluation, folder, config=settings, resume=resume), folder)


def source_of(run: Path) -> dict[str, Any]:
    """Say what is known of the clips (T, M, V, C) that a run was trained on last, from its record.

    Where nothing is known a warning says what is assumed; of published files nothing ever is.
    """
    if run.is_file():
        return {}
    from fastskel.train.checkpoint import read_state

    checkpoint, state = read_state(run)
    if "described" in state:
        return dict(state["described"])
    # what pretrained it has a record of its own; a fine-tuning of an older version has none
    record, found = checkpoint.resolve().parents[1] / "config.json", {}
    known = f"nothing is recorded of the data that {run} was trained on"
    if "class_names" not in state and record.is_file():
        config = json.loads(record.read_text())
        if "described" in config:
            return dict(config["described"])
        found = {"path": config["data"], "sha256": config["identity"]["data"]}
        meta = Path(config["data"]) / "meta.json"
        if meta.is_file():
            told = json.loads(meta.read_text())
            return found | {key: told.get(key) for key in ("source", "topology", "units", "up_axis", "channels")}
        known = f"the data that {run} was trained on are not at {config['data']} any more"
    print(f"warning: {known}; their units are taken for metres, y for upwards", file=sys.stderr)
    return found


def say_adapted(done: Mapping[str, Any]) -> None:
    """Print at once what was done to make an encoder and clips (T, M, V, C) fit."""
    row = f"skeleton {done['skeleton']}, bodies {done['bodies']}, scale {done['scale']:.3g}, upwards {done['up_axis']}"
    print(row, flush=True)
    if done.get("joints_absent"):
        print(f"joints that the data do not have: {', '.join(done['joints_absent'])}", flush=True)


def transfer(
    run: Run,
    data: Data,
    trained_on: str | None = None,
    plane: Literal["xy", "xz", "yz"] | None = None,
    scale: float | None = None,
    k: int = 1,
    fine_tune: bool = False,
    resume: bool = False,
    settings: FinetuneConfig = FINETUNE,
    common: EvaluateOptions = EvaluateOptions(),
) -> None:
    """Try an encoder on a data set of another skeleton, number of bodies or coordinates.

    Args:
        run: Run folder, native checkpoint folder, or published .pth.tar.
        data: Packed data set, not normalised when packed if its joints are to be remapped.
        trained_on: Skeleton that a published file was trained on, such as ntu-25; runs record theirs.
        plane: Plane that data in space are projected on, for an encoder of two channels.
        scale: Factor of all coordinates; by default data of another unit are scaled to a torso of 0.4 m.
        k: Neighbours that vote.
        fine_tune: Fine-tune too, beside neighbours and linear probe.
        resume: Go on where a fine-tuning was stopped.
        settings: Of the fine-tuning; of the linear probe the seed.
        common: What every evaluation takes.
    """
    from fastskel.evaluate import evaluate_transfer

    if trained_on is not None and not run.is_file():
        raise ValueError(f"evaluate: trained_on must be left out, {run} records its skeleton. It is for published files.")
    given = {"trained_on": trained_on, "plane": plane, "scale": scale, "k": k, "fine_tune": fine_tune}
    shown = [*changed(given, transfer), *_shown(settings, fine_tune, resume)]
    evaluation, folder = prepare("transfer", run, data, common, shown, skeleton=trained_on)
    result = evaluate_transfer(
        evaluation, folder, source=source_of(run), plane=plane, scale=scale, config=_probe(settings.seed),
        k=k, finetune_config=settings if fine_tune else None, resume=resume, on_adapted=say_adapted,
    )  # fmt: skip
    warn_if_seen(result)
    for name in ("knn", "linear", "finetune"):
        if name in result:
            row = "  ".join(f"{key} {100 * value:.1f} %" for key, value in result[name].items())
            print(f"{name:<9} {row}")
    print(f"({result['num_train']} train, {result['num_test']} test clips; {folder})")


def early(
    run: Run,
    data: Data,
    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    train_full: bool = False,
    causal: bool = False,
    fine_tune: bool = False,
    resume: bool = False,
    settings: FinetuneConfig = FINETUNE,
    common: EvaluateOptions = EvaluateOptions(),
) -> None:
    """Classify clips of which only the first frames were observed.

    Args:
        run: Run folder, native checkpoint folder, or published .pth.tar.
        data: Packed data set.
        ratios: Shares of a clip that are observed, ascending.
        train_full: Train once on whole clips, instead of on what is observed for each ratio.
        causal: Run the encoder over whole clips with its sight cut off behind each frame, instead of over each prefix; wants
            fine_tune.
        fine_tune: Train the encoder further instead of a linear layer on frozen features.
        resume: Go on where a fine-tuning was stopped.
        settings: Of the fine-tuning; of a linear layer the seed.
        common: What every evaluation takes.
    """
    from fastskel.evaluate import evaluate_early

    given = {"causal": causal, "train_full": train_full, "fine_tune": fine_tune, "ratios": ratios}
    shown = [*changed(given, early), *_shown(settings, fine_tune, resume)]
    evaluation, folder = prepare("early", run, data, common, shown)
    result = evaluate_early(
        evaluation, folder, ratios=ratios, config=_probe(settings.seed), finetune_config=settings if fine_tune else None,
        train_full=train_full, causal=causal, resume=resume,
    )  # fmt: skip
    for row in result["curve"]:
        print(f"observed {100 * row['ratio']:5.1f} %  top1 {100 * row['top1']:.1f} %  mean_class {100 * row['mean_class']:.1f} %")
    say(result, folder, ("area",))
