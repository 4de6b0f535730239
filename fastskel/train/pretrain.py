"""The pretraining loop: one stage over one data set, resumable bit for bit."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastskel.atomic import atomic_write
from fastskel.data.batch import Batch
from fastskel.data.loader import Loader
from fastskel.data.packed import PackedDataset
from fastskel.models.encoder import ENCODERS, Encoder
from fastskel.objectives.objective import OBJECTIVES, Objective, Terms
from fastskel.train.checkpoint import load_weights, newest, prune, read_checkpoint, save_checkpoint, weights
from fastskel.train.runlog import RunLog, provenance
from fastskel.train.stage import Stage, describe

__all__ = ["Monitor", "TrainingStopped", "pretrain"]

CONFIG_FILE = "config.json"
# checkpoints kept per run: the newest, and one before it in case the disk damages the newest
KEPT_CHECKPOINTS = 2
# below this mean deviation over the batch all embeddings are one point: nothing is left to learn from
COLLAPSED_DEVIATION = 1e-5

# called at the end of each epoch with (encoder, epoch); returns named figures for the log
Monitor = Callable[[Encoder, int], Mapping[str, float]]


class TrainingStopped(RuntimeError):
    """The training cannot go on: it diverged or collapsed."""


@dataclass
class _Run:
    """What moves during a training."""

    stage: Stage
    encoder: Encoder
    objective: Objective
    optimizer: torch.optim.Adam
    loader: Loader
    step: int = 0

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        return {"encoder": self.encoder, "objective": self.objective}

    def parameter_names(self) -> list[str]:
        names = {id(p): f"{m}.{n}" for m, module in self.modules.items() for n, p in module.named_parameters()}
        return [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]

    def optimizer_tensors(self) -> dict[str, Tensor]:
        state = self.optimizer.state_dict()["state"]
        return {
            f"{n}/{kind}": v for i, n in enumerate(self.parameter_names()) if i in state for kind, v in state[i].items()
        }

    def load_optimizer(self, tensors: Mapping[str, Tensor], source: Path) -> None:
        names = self.parameter_names()
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, kind = key.rsplit("/", 1)
            if name not in names:
                raise ValueError(
                    f"pretrain: {source} must hold the optimiser of this model, got {name!r}. Use its own config."
                )
            state.setdefault(names.index(name), {})[kind] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def _build(stage: Stage, dataset: PackedDataset, indices: NDArray[np.int64] | None, device: torch.device) -> _Run:
    # initialisation is the only use of torch's generator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stage.seed)
        encoder = ENCODERS[stage.encoder](**stage.encoder_options)
        build: Any = OBJECTIVES[stage.objective]
        objective: Objective = build(encoder, stage.views, **stage.objective_options)
    encoder.to(device).train()
    objective.to(device).train()
    optimizer = torch.optim.Adam(
        objective.param_groups(encoder), lr=stage.lr, weight_decay=stage.weight_decay, fused=True
    )
    loader = Loader(
        dataset, views=objective.views, batch_size=stage.batch_size, seed=stage.seed, num_threads=stage.num_threads,
        indices=indices,
    )  # fmt: skip
    return _Run(stage, encoder, objective, optimizer, loader)


def _train_step(run: _Run, batch: Batch, device: torch.device, progress: float) -> tuple[Terms, dict[str, Tensor]]:
    batch = batch.to(device, non_blocking=True).at(run.stage.seed, run.step)
    for group in run.optimizer.param_groups:
        group["lr"] = run.stage.lr_at(run.loader.epoch, run.step)
    with torch.autocast(device.type, torch.bfloat16, enabled=run.stage.precision == "bf16"):
        embeddings = run.objective.embed(run.encoder, batch)
        terms = run.objective.loss(embeddings, batch, progress)
    run.optimizer.zero_grad(set_to_none=True)
    terms.total.backward()  # type: ignore[no-untyped-call]
    return terms, embeddings


def _figures(terms: Terms, embeddings: Mapping[str, Tensor]) -> dict[str, float]:
    deviation = torch.stack([z.detach().float().std(1).mean() for z in embeddings.values()]).mean()
    named = {"loss": terms.total.detach(), "embedding_std": deviation, **terms.terms}
    return dict(zip(named, torch.stack([value.float() for value in named.values()]).tolist(), strict=True))


def _check(figures: Mapping[str, float], step: int, lr: float) -> None:
    if not math.isfinite(figures["loss"]):
        bad = [name for name, value in figures.items() if not math.isfinite(value)]
        raise TrainingStopped(
            f"pretrain: the loss must stay finite, got {figures['loss']} at step {step} (not finite: {', '.join(bad)}). "
            f"Lower lr (now {lr:g}), train in fp32, or enlarge the batch; the last checkpoint is from before."
        )
    if figures["embedding_std"] < COLLAPSED_DEVIATION:
        raise TrainingStopped(
            f"pretrain: embeddings must differ between samples, got mean deviation {figures['embedding_std']:.2g} at step "
            f"{step}: collapsed. Lower lr (now {lr:g}), enlarge the batch, or raise the variance and covariance terms."
        )


def _identity(stage: Stage, dataset: PackedDataset, indices: NDArray[np.int64] | None) -> dict[str, Any]:
    """Everything a resumed run must share with the killed one; the rest may change."""
    free = ("num_threads", "checkpoint_steps", "log_steps")
    chosen = None if indices is None else [int(i) for i in indices]
    kept = {k: v for k, v in describe(stage).items() if k not in free}
    return {"stage": kept, "data": dataset.meta["checksums"], "indices": chosen}


def _open_run(out: Path, identity: Mapping[str, Any], recipe: Mapping[str, Any], resume: bool) -> None:
    path = out / CONFIG_FILE
    identity = json.loads(json.dumps(identity))
    if path.exists() and not resume:
        raise ValueError(
            f"pretrain: {out} must be new, got the folder of another run. Resume it, or choose another folder."
        )
    if resume:
        if not path.exists():
            raise ValueError(
                f"pretrain: {out} must hold a run to resume, got no {CONFIG_FILE}. Start it without resuming."
            )
        before = json.loads(path.read_text())["identity"]
        changed = sorted(k for k in before["stage"] if before["stage"][k] != identity["stage"].get(k))
        changed += [k for k in ("data", "indices") if before[k] != identity[k]]
        if changed:
            raise ValueError(
                f"pretrain: a resumed run must keep its configuration and data, got other {', '.join(changed)} than in {path}. "
                "Give the run's own settings, or start a new run."
            )
        return
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as scratch:
        scratch.write_text(json.dumps({"recipe": recipe, "identity": identity, **provenance()}, indent=1))


def pretrain(
    stage: Stage,
    dataset: PackedDataset,
    out: str | os.PathLike[str],
    *,
    indices: NDArray[np.int64] | None = None,
    recipe: Mapping[str, Any] | None = None,
    resume: bool = False,
    monitors: Sequence[Monitor] = (),
    device: str = "auto",
    tensorboard: bool = False,
    progress: bool = True,
) -> Path:
    """Train one stage and leave a run folder behind.

    Args:
        stage: What to train.
        dataset: Packed clips (T, M, V, C).
        out: Run folder; new, or with `resume` the one of the stopped run.
        indices: Samples to train on, (n,); None is all of them.
        recipe: The recipe's own settings, for the run's record.
        resume: Go on from the newest checkpoint, bit for bit as if the run had not stopped.
        monitors: Called at the end of each epoch; what they return is logged.
        device: `"auto"` takes a GPU where there is one.
        tensorboard: Log to TensorBoard too.
        progress: Show a bar.
    Returns:
        The folder of the last checkpoint.
    Raises:
        ValueError: On settings, data or folders that cannot be used.
        TrainingStopped: If the loss is not finite, or the embeddings have collapsed.
    """
    from tqdm import tqdm

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "pretrain: WORLD_SIZE must be 1, got more. Training on several devices is not implemented yet."
        )
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    run, folder = _build(stage, dataset, indices, place), Path(out)
    total = stage.epochs * len(run.loader)
    _open_run(folder, _identity(stage, dataset, indices), describe(recipe or {}), resume)
    if resume and (last := newest(folder)) is not None:
        checkpoint = read_checkpoint(last, optimizer=True)
        load_weights(run.modules, checkpoint.model, checkpoint.path)
        run.load_optimizer(checkpoint.optimizer, checkpoint.path)
        run.loader.load_state_dict(checkpoint.state["loader"])
        run.step = checkpoint.state["step"]
    log = RunLog(folder, run.step, tensorboard)

    def save() -> Path:
        if not all(bool(value.isfinite().all()) for value in weights(run.modules).values()):
            raise TrainingStopped(
                f"pretrain: weights must stay finite, got others after step {run.step - 1}; nothing was saved. "
                f"Lower lr (now {stage.lr_at(run.loader.epoch, run.step):g}) and resume from the last checkpoint."
            )
        log.sync()
        state = {
            "encoder": {"name": stage.encoder, "config": run.encoder.config},
            "objective": {"name": stage.objective, "options": stage.objective_options},
            "eval_view": stage.eval_view,
            "topology": dataset.topology.name,
            "loader": run.loader.state_dict(),
            "epoch": run.loader.epoch,
            "total_steps": total,
        }
        path = save_checkpoint(folder / "checkpoints", run.step, run.modules, state, run.optimizer_tensors())
        prune(folder, KEPT_CHECKPOINTS)
        return path

    bar = tqdm(total=total, initial=run.step, desc=stage.name, unit="step", disable=not progress, dynamic_ncols=True)
    started, first = time.perf_counter(), run.step
    try:
        while run.step < total:
            epoch = run.loader.epoch
            run.objective.epoch_start(epoch)
            for batch in run.loader:
                terms, embeddings = _train_step(run, batch, place, run.step / total)
                if run.step % stage.log_steps == 0 or run.step + 1 == total:
                    figures = _figures(terms, embeddings)
                    lr = stage.lr_at(epoch, run.step)
                    _check(figures, run.step, lr)
                    now = time.perf_counter()
                    rate = stage.batch_size * (run.step - first + 1) / (now - started)
                    log.write({"step": run.step, "epoch": epoch, "lr": lr, "samples_per_s": round(rate, 2), **figures})
                    bar.set_postfix(loss=f"{figures['loss']:.3f}", samples_per_s=f"{rate:.0f}", refresh=False)
                run.optimizer.step()
                run.objective.after_step()
                run.step += 1
                bar.update()
                if stage.checkpoint_steps and run.step % stage.checkpoint_steps == 0 and run.step < total:
                    save()
            for monitor in monitors:
                run.encoder.eval()
                log.write(
                    {
                        "step": run.step - 1,
                        "epoch": epoch,
                        **monitor(run.objective.downstream_encoder(run.encoder), epoch),
                    }
                )
                run.encoder.train()
            if not stage.checkpoint_steps and run.step < total:
                save()
        return save()
    finally:
        bar.close()
        log.close()
