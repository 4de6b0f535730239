"""The command that fuses several runs: one each of joints, bones and motion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from fastskel.cli_evaluate.options import EvaluateOptions, changed, prepare, warn_if_seen

__all__ = ["fusion"]


def fusion(
    paths: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN RUN .. DATA")],
    weights: Literal["auto"] | tuple[float, ...] = (),
    k: int = 1,
    epochs: int = 160,
    seed: int = 0,
    modalities: tuple[Literal["joint", "bone", "motion"], ...] = (),
    common: EvaluateOptions = EvaluateOptions(),
) -> None:
    """Fuse the scores of several runs, such as one each of joints, bones and motion.

    Args:
        paths: Run folders, checkpoint folders or published files, two at least, and then the packed data set.
        weights: Weight of each run's scores; by default equal ones; auto chooses them on training clips held out.
        k: Neighbours that vote.
        epochs: Passes of each probe over the training features.
        seed: Key of the probes' start, of their order, and of what is held out.
        modalities: Stream of each published file, which does not record it; joint is assumed.
        common: What every evaluation takes.
    """
    from fastskel.evaluate import LinearConfig
    from fastskel.evaluate.fusion import evaluate_fusion

    if len(paths) < 3:
        raise ValueError(f"evaluate: fusion must have two runs at least and then the data, got {len(paths)} paths. Name them.")
    *runs, data = paths
    if modalities and len(modalities) != len(runs):
        raise ValueError(f"evaluate: modalities must be one for each of {len(runs)} runs, got {len(modalities)}. Give as many.")
    options = [replace(common, modality=modality) for modality in modalities] or [common] * len(runs)
    # the first run's modality is in its own options
    shown = ["with", *(run.resolve().name for run in runs[1:]), *modalities[1:]]
    shown += changed({"weights": weights, "k": k, "epochs": epochs, "seed": seed}, fusion)
    first, folder = prepare("fusion", runs[0], data, options[0], shown, reads={"run": [str(run) for run in runs]})
    # results are in the first run's folder alone
    others = [prepare("fusion", run, data, replace(each, out=folder))[0] for run, each in zip(runs[1:], options[1:], strict=True)]
    config = LinearConfig(learning_rate=None, standardise=None, epochs=epochs, seed=seed)
    result = evaluate_fusion([first, *others], folder, weights=weights or None, k=k, config=config)
    warn_if_seen(result)
    rows = [*result["alone"], {**result, "run": "fused", "stream": " ".join(f"{share:.2f}" for share in result["weights"])}]
    names = ("top1", "top5", "mean_class", "knn_top1")
    width = max(len(str(row["run"])) for row in rows)
    print("  ".join([f"{'run':<{width}}", f"{'stream':<14}", *(f"{name:>10}" for name in names)]))
    for row in rows:
        print("  ".join([f"{row['run']:<{width}}", f"{row['stream']:<14}", *(f"{100 * row[name]:>8.1f} %" for name in names)]))
    print(f"({result['num_train']} train, {result['num_test']} test clips; {folder})")
