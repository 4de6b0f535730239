"""Whether training with the fused encoder goes where the plain reference goes: losses and 1-NN over seeds, on real data.

Run as `python -m fastskel.bench.convergence DATA --protocol xview --out FILE.jsonl`. For each seed both train from the same
weights on the same batches with the same DropPath draws: the reference view by view, with masks and D x D losses; fastskel with
all it does by default. Reported: how far each window of losses is from the reference's of the same seed; the same for a
control, the reference itself from weights that differ in the last bits; and what of a run, and of the mean over the seeds, lies
outside the band between the least and the greatest of the reference's seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fastskel.bench.harness import append_rows, origin
from fastskel.bench.reference import loss as reference_loss
from fastskel.bench.reference.usdrl import DSTE, USDRL
from torch import Tensor, nn

from fastskel.data.batch import Batch, View
from fastskel.data.loader import Loader
from fastskel.data.packed import PackedDataset, open_dataset
from fastskel.data.protocols import Split, split
from fastskel.evaluate import accuracy, dataset_features, knn_predict
from fastskel.models.encoder import Encoder
from fastskel.nn.drop_path import NUM_DROP_PATHS, drop_path_kept
from fastskel.objectives.mgfd import MGFD
from fastskel.recipes import RECIPES
from fastskel.train import Stage, start

__all__ = ["apart", "inside", "main", "train"]

# losses are compared as means over so many steps
WINDOW = 20
# mean loss of each window, and 1-NN accuracy
Result = tuple[list[float], float]
# of the control's weights: a rounding of fp32
PERTURBATION = 2.0**-23


def _stage(dataset: PackedDataset, recipe: str, seed: int) -> Stage:
    (stage,) = replace(RECIPES[recipe](), seed=seed).stages(dataset)
    return stage


def _reference(stage: Stage, encoder: Encoder, objective: MGFD) -> USDRL:
    """Build the reference of a stage with the weights of encoder and objective."""
    config = encoder.config
    joints = config["num_joints"] * config["num_bodies"] * config["num_channels"]
    frames = config["num_frames"] * config["num_channels"]
    model = USDRL(
        joints, frames, config["width"], config["num_heads"], config["num_layers"], config["alpha"], config["gap"],
        drop_path=config["drop_path"], num_channels=config["num_channels"],
    )  # fmt: skip
    state = {f"backbone.{name}": value for name, value in encoder.state_dict().items()} | objective.state_dict()
    model.load_state_dict(state, strict=True)
    return model


def _reference_loss(model: USDRL, rate: float) -> Callable[[Batch], Tensor]:
    layers = model.backbone.num_layer

    def embed(view: View) -> tuple[Tensor, Tensor, Tensor]:
        assert view.address is not None and isinstance(model.backbone, DSTE)
        address = view.address
        kept = drop_path_kept(
            rate, layers * 2 * NUM_DROP_PATHS, seed=address.seed, step=address.step, index=address.index, view=address.view
        ).reshape(-1, layers, 2, NUM_DROP_PATHS)
        model.backbone.drop_path_source = lambda layer, stream, slot: torch.from_numpy(kept[:, layer, stream, slot])
        z: tuple[Tensor, Tensor, Tensor] = model.sub_forward(view.clips.permute(0, 4, 1, 3, 2))
        return z

    def call(batch: Batch) -> Tensor:
        # one view after another, as its own forward does
        z_t, z_s, z_i = (list(z) for z in zip(*map(embed, batch.views), strict=True))
        total: Tensor = reference_loss.total(z_t, z_s, z_i, "aaai")
        return total

    return call


def _own_loss(encoder: Encoder, objective: MGFD) -> Callable[[Batch], Tensor]:
    def call(batch: Batch) -> Tensor:
        return objective.loss(objective.embed(encoder, batch), batch, 0.0).total

    return call


def train(
    dataset: PackedDataset, parts: Split, recipe: str, seed: int, steps: int, provider: str
) -> Result:
    """Train for some steps.

    Args:
        dataset: Packed clips (T, M, V, C).
        parts: Training and test clips.
        recipe: Name of a recipe with four views and AAAI weighting.
        seed: Of weights, batches and draws.
        steps: Optimiser steps.
        provider: "reference", "control" (the reference from perturbed weights) or "fastskel".
    Returns:
        Mean loss of each window of steps, and 1-NN accuracy on the test clips.
    """
    stage = _stage(dataset, recipe, seed)
    encoder, objective = start(stage)
    assert isinstance(objective, MGFD)
    trained = nn.ModuleList([encoder, objective])
    call = _own_loss(encoder, objective)
    if provider != "fastskel":
        reference = _reference(stage, encoder, objective)
        if provider == "control":
            with torch.no_grad():
                for parameter in reference.parameters():
                    parameter.mul_(1 + PERTURBATION * torch.randn_like(parameter))
        trained, call = nn.ModuleList([reference]), _reference_loss(reference, encoder.config["drop_path"])
    trained.train()
    optimizer = torch.optim.Adam(trained.parameters(), lr=stage.lr, weight_decay=stage.weight_decay)
    loader = Loader(
        dataset, views=stage.views, batch_size=stage.batch_size, seed=stage.seed, indices=parts.train
    )
    losses: list[float] = []
    while len(losses) < steps:
        for batch in loader:
            loss = call(batch.at(stage.seed, len(losses)))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))
            if len(losses) == steps:
                break
    if provider != "fastskel":
        encoder.load_state_dict(reference.backbone.state_dict(), strict=True)
    train_set, test_set = (
        dataset_features(encoder, dataset, stage.eval_view, clips, progress=False) for clips in (parts.train, parts.test)
    )
    predicted = knn_predict(train_set.features, train_set.labels, test_set.features)
    windows = [statistics.mean(losses[i : i + WINDOW]) for i in range(0, steps, WINDOW)]
    return windows, float(accuracy(predicted, test_set.labels))


def inside(windows: list[float], knn: float, references: list[Result]) -> list[str]:
    """List what of a run lies outside the reference's band: windows of losses by number, and 1-NN."""
    out = []
    for number, (value, band) in enumerate(zip(windows, zip(*(w for w, _ in references), strict=True), strict=True)):
        if not min(band) <= value <= max(band):
            out.append(f"window {number}: {value:.5g} not in [{min(band):.5g}, {max(band):.5g}]")
    band = tuple(k for _, k in references)
    if not min(band) <= knn <= max(band):
        out.append(f"1-NN: {knn:.4f} not in [{min(band):.4f}, {max(band):.4f}]")
    return out


def apart(run: Result, other: Result) -> float:
    """Return the greatest relative difference of two runs' windows of losses."""
    return max(abs(a / b - 1) for a, b in zip(run[0], other[0], strict=True))


def _mean(runs: list[Result]) -> Result:
    windows = [statistics.mean(values) for values in zip(*(w for w, _ in runs), strict=True)]
    return windows, statistics.mean(k for _, k in runs)


def main(arguments: list[str] | None = None) -> int:
    """Train all runs, print what lies outside, append one row."""
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.convergence", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="packed data set")
    parser.add_argument("--protocol", default="xview")
    parser.add_argument("--recipe", default="usdrl-small")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, help="JSON lines file to append to")
    given = parser.parse_args(arguments)
    dataset = open_dataset(given.data)
    parts = split(dataset, given.protocol)
    references: list[Result] = []
    own: list[Result] = []
    for seed in given.seeds:
        for provider, runs in (("reference", references), ("fastskel", own)):
            runs.append(train(dataset, parts, given.recipe, seed, given.steps, provider))
            print(f"{provider} {seed}: last window {runs[-1][0][-1]:.4f}, 1-NN {runs[-1][1]:.4f}", flush=True)
    control = train(dataset, parts, given.recipe, given.seeds[0], given.steps, "control")
    outside = {str(seed): inside(*run, references) for seed, run in zip(given.seeds, own, strict=True)}
    outside["mean"] = inside(*_mean(own), references)
    distances = {str(seed): apart(a, b) for seed, a, b in zip(given.seeds, own, references, strict=True)}
    distances["control"] = apart(control, references[0])
    for name, distance in distances.items():
        print(f"{name}: windows at most {distance:.2g} apart")
    for name, found in outside.items():
        print(f"{name}: outside the band: {'; '.join(found) or 'nothing'}")
    if given.out:
        row = {
            "case": "convergence", "data": dataset.source, "protocol": given.protocol, "recipe": given.recipe,
            "steps": given.steps, "window": WINDOW, "num_train": int(np.size(parts.train)),
            "reference": {str(s): {"loss": w, "knn_top1": k} for s, (w, k) in zip(given.seeds, references, strict=True)},
            "fastskel": {str(s): {"loss": w, "knn_top1": k} for s, (w, k) in zip(given.seeds, own, strict=True)},
            "control": {"loss": control[0], "knn_top1": control[1]}, "apart": distances, "outside": outside, **origin(),
        }  # fmt: skip
        append_rows(given.out, [row])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
