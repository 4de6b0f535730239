"""The pretraining loop: one stage over one data set, resumable bit for bit."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastskel.data.batch import Batch
from fastskel.data.identity import described_data
from fastskel.data.loader import Loader, num_chunks
from fastskel.data.packed import PackedDataset
from fastskel.dist import exchange, rank_and_world
from fastskel.models.encoder import ENCODERS, Encoder
from fastskel.nn.fp8 import check_fp8
from fastskel.objectives.objective import OBJECTIVES, Objective
from fastskel.train.checkpoint import Checkpoint, newest, read_checkpoint
from fastskel.train.checkpoint_writer import CheckpointWriter
from fastskel.train.chunked import Gradients, Outcome, choose_gradients
from fastskel.train.device import mixed_precision
from fastskel.train.heartbeat import Heartbeat
from fastskel.train.optimiser import Average, build_optimizer
from fastskel.train.preemption import Preempted, StopRequest, stop_on_signals
from fastskel.train.processes import TrainingStopped, check_alike, on_first, processes
from fastskel.train.record import create_record, has_record, note_resumed, origin, resume_record, run_identity
from fastskel.train.run import Run
from fastskel.train.runlog import RunLog
from fastskel.train.stage import Stage, describe
from fastskel.train.utilisation import utilisation_of
from fastskel.train.watch import Watch, figures_of

__all__ = ["Monitor", "Preempted", "TrainingStopped", "pretrain", "start"]

# below this mean deviation over the batch all embeddings are one point: nothing is left to learn from
COLLAPSED_DEVIATION = 1e-5

# a terminal that has room for more than loss and speed beside the bar
WIDE_COLUMNS = 120

# called at the end of each epoch with (encoder in eval mode, epoch); returns named figures for the log
Monitor = Callable[[Encoder, int], Mapping[str, float]]


def start(stage: Stage) -> tuple[Encoder, Objective]:
    """Build a stage's encoder and objective as its training starts, on the host: what an untrained encoder is.

    Returns:
        Encoder of views (N, T, M, V, C), and objective; functions of the stage alone.
    """
    # initialisation is the only use of torch's generator, and leaves it as it was; modules move to a device afterwards
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stage.seed)
        encoder = ENCODERS[stage.encoder](**stage.encoder_options)
        build: Any = OBJECTIVES[stage.objective]
        objective: Objective = build(encoder, stage.views, **stage.objective_options)
    return encoder, objective


def _build(stage: Stage, dataset: PackedDataset, indices: NDArray[np.int64] | None, device: torch.device) -> Run:
    rank, world = rank_and_world()
    for name, value in {"batch_size": stage.batch_size, "chunk": stage.chunk or 0}.items():
        if value % world:
            raise ValueError(
                f"pretrain: {name} must be a multiple of the {world} processes, got {value}. It counts the samples "
                "of all of them; choose another."
            )
    encoder, objective = start(stage)
    encoder.to(device).train()
    objective.to(device).train()
    optimizer = build_optimizer(stage, objective.param_groups(encoder))
    average = Average(encoder, stage.average) if stage.average else None
    loader = Loader(
        dataset, views=objective.views, batch_size=stage.batch_size // world, seed=stage.seed, num_threads=stage.num_threads,
        indices=indices, rank=rank, world_size=world, device=device,
    )  # fmt: skip
    return Run(stage, encoder, objective, optimizer, loader, average=average)


def _choose_gradients(run: Run, device: torch.device) -> Gradients:
    rows = run.loader.batch_size
    if run.stage.precision == "fp8":
        check_fp8(run.encoder, device)
    autocast = functools.partial(mixed_precision, run.stage.precision, device)
    return choose_gradients(
        run.encoder, run.objective, num_rows=rows, num_chunks=num_chunks(rows, run.chunk), autocast=autocast,
        synchronise_norms=run.stage.synchronise_norms,
    )  # fmt: skip


def _train_step(run: Run, passes: Sequence[Iterator[Batch]], progress: float, watch: Watch) -> Outcome:
    """Take the gradient of a batch of (N, T, M, V, C) views; return what was found out."""
    for group in run.optimizer.param_groups:
        group["lr"] = run.lr
    run.optimizer.zero_grad(set_to_none=True)
    return run.gradients([(part.at(run.stage.seed, run.step) for part in watch.waits(each)) for each in passes], progress)


def _clip(run: Run) -> Tensor:
    """Shorten the gradient to the stage's norm, if it has one; return how long it was, ()."""
    parameters = run.parameters()
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if run.stage.clip_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, run.stage.clip_norm, norm)
    return norm


def _spoilt(run: Run, batch: Batch) -> Tensor:
    """Mark the samples, (N,), of which a view is not finite."""
    chunks = torch.split(batch.index, run.chunk or len(batch))
    # views of a batch in chunks are gone, and made again
    parts = [batch] if batch.views else (run.loader.batch(run.loader.epoch, index.numpy()) for index in chunks)
    whole = (torch.stack([view.clips.isfinite().flatten(1).all(1) for view in part.views]).all(0).cpu() for part in parts)
    return ~torch.cat(list(whole))


def _check(figures: Mapping[str, float], run: Run, batch: Batch, lr: float) -> None:
    # first: cross-correlations of equal embeddings divide by their deviation, so a collapse may show as NaN
    if figures["embedding_std"] < COLLAPSED_DEVIATION:
        raise TrainingStopped(
            f"pretrain: embeddings must differ between samples, got mean deviation {figures['embedding_std']:.2g} at step "
            f"{run.step}: collapsed. Check that the clips differ; start a new run with a lower lr (now {lr:g}) or a larger "
            f"batch; {run.last_good()}."
        )
    bad = [name for name, value in figures.items() if not math.isfinite(value)]
    if bad:
        marked = torch.where(_spoilt(run, batch), batch.index, -1).tolist()
        # ranks took turns in the order of the batch
        turns = zip(*exchange(marked, batch.labels.device), strict=True)
        names = [str(run.loader.dataset.names[number]) for turn in turns for number in turn if number >= 0]
        raise TrainingStopped(
            f"pretrain: the loss and its gradient must stay finite, got {figures['loss']} at step {run.step} "
            f"(not finite: {', '.join(bad)}). "
            + (f"The clips {names[:3]} hold NaN or infinity: pack the data anew." if names else run.advice(lr))
        )


def _monitored(run: Run, monitors: Sequence[Monitor], epoch: int) -> dict[str, float]:
    encoder = run.objective.downstream_encoder(run.encoder)
    training = encoder.training
    encoder.eval()
    figures = {name: value for monitor in monitors for name, value in monitor(encoder, epoch).items()}
    encoder.train(training)
    return figures


def _saved(run: Run, writer: CheckpointWriter | None, log: RunLog | None, complete: bool) -> Path:
    assert log is not None and writer is not None
    log.sync()
    path = run.save(writer)
    if complete:
        writer.wait()
    return path


def _shown(figures: Mapping[str, float], times: Mapping[str, Any]) -> dict[str, str]:
    """What the progress bar tells; utilisation where there is room."""
    shown = {"loss": f"{figures['loss']:.3f}", "samples_per_s": f"{times['samples_per_s']:.0f}"}
    if "mfu" in times and shutil.get_terminal_size().columns >= WIDE_COLUMNS:
        shown["mfu"] = f"{times['mfu']:.0%}"
    return shown


def _train(
    run: Run,
    writer: CheckpointWriter | None,
    monitors: Sequence[Monitor],
    log: RunLog | None,
    request: StopRequest,
    bar: Any,
    watch: Watch,
) -> Path:
    stage, total = run.stage, run.total_steps
    every = stage.checkpoint_steps or len(run.loader)
    while True:
        epoch = run.loader.epoch
        # told again where a run resumes within an epoch: what it does depends on the epoch alone
        run.objective.epoch_start(epoch)
        for passes in run.loader.steps(run.chunk, run.gradients.passes):
            last = run.step + 1 == total
            logged = last or run.step % stage.log_steps == 0
            watch.begin(run.step, logged=logged)
            found = _train_step(run, passes, run.step / total, watch)
            # it reads every gradient: only where somebody wants to know
            if logged or stage.clip_norm:
                norm = _clip(run)
            if logged:
                figures, lr = figures_of(found.terms, found.embeddings, norm), run.lr
                _check(figures, run, found.batch, lr)
                # a function of the step alone, as every record of a resumed run must be: the first one of an epoch
                if last or run.step % len(run.loader) < stage.log_steps:
                    figures |= watch.rank_of(found.embeddings, run.step)
                times = watch.figures(run.step, stage.batch_size)
                if log is not None:
                    log.write({"step": run.step, "epoch": epoch, "lr": lr, **times, **figures})
                bar.set_postfix(_shown(figures, times), refresh=False)
            # before the next one's are made
            del found
            run.optimizer.step()
            if run.average is not None:
                run.average.update(run.encoder, run.step)
            run.objective.after_step()
            run.step += 1
            watch.heart.mark("ends its step", step=run.step)
            bar.update()
            due = last or run.step % every == 0
            # before the checkpoint: a run that resumes after it does not come back to read this epoch
            if monitors and run.step % len(run.loader) == 0:
                read = watch.on_first("evaluates", functools.partial(_monitored, run, monitors, epoch))
                if log is not None and read:
                    log.write({"step": run.step - 1, "epoch": epoch, **read})
                due |= bool(stage.keep_best) and run.is_best(read, run.step)
            asked = request.anywhere()
            if due or asked:
                saving = functools.partial(_saved, run, writer, log, asked or last)
                run.saved = checkpoint = watch.on_first("saves a checkpoint", saving)
            if last:
                return checkpoint
            if asked:
                raise Preempted(
                    f"pretrain: asked to stop by {request.signal or 'a signal to another process'}; saved {checkpoint}. "
                    "Resume the run to go on."
                )


def pretrain(
    stage: Stage,
    dataset: PackedDataset,
    out: str | os.PathLike[str],
    *,
    indices: NDArray[np.int64] | None = None,
    recipe: Mapping[str, Any] | None = None,
    resume: bool | Literal["if-started"] = False,
    monitors: Sequence[Monitor] = (),
    device: str = "auto",
    tensorboard: bool = False,
    progress: bool = True,
) -> Path:
    """Train one stage and leave a run folder behind.

    Processes that torchrun started train together, by gloo on CPUs and nccl on GPUs; so do those of a group that is set up,
    which a script that trains several times needs. All call this with the same arguments. The folder is rank 0's.

    Args:
        stage: What to train.
        dataset: Packed clips (T, M, V, C).
        out: Run folder; new, or with `resume` the one of the stopped run.
        indices: Samples to train on, (n,); None is all of them.
        recipe: The recipe's own settings, for the run's record.
        resume: Go on from the newest checkpoint, bit for bit as if the run had not stopped; "if-started" begins where there is
            no run yet, for jobs that are started again whatever happened.
        monitors: Called at the end of each epoch; what they return is logged.
        device: `"auto"` takes a GPU where there is one.
        tensorboard: Log to TensorBoard too.
        progress: Show a bar.
    Returns:
        The folder of the last checkpoint.
    Raises:
        ValueError: On settings, data or folders that cannot be used.
        TrainingStopped: If the loss is not finite, the embeddings have collapsed, or another process failed.
        Preempted: If SIGTERM or SIGUSR1 asked for it; a checkpoint was saved.
    """
    folder = Path(out)
    with processes(device) as (place, heart), stop_on_signals() as request:
        begun = on_first(lambda: has_record(folder)) if resume == "if-started" else resume
        return _pretrain(stage, dataset, folder, place, heart, indices, recipe, begun, monitors, tensorboard, progress, request)


def _resumed(folder: Path, identity: Mapping[str, Any]) -> tuple[dict[str, Any], Checkpoint | None]:
    """What a run folder says of its run, and the newest checkpoint, tensors on the host."""
    config, last = resume_record(folder, identity), newest(folder)
    try:
        return config, None if last is None else read_checkpoint(last, optimizer=True)
    except ValueError as error:
        raise ValueError(f"{error} Remove {last} to go on from the checkpoint before it.") from error


def _pretrain(
    stage: Stage,
    dataset: PackedDataset,
    folder: Path,
    place: torch.device,
    heart: Heartbeat,
    indices: NDArray[np.int64] | None,
    recipe: Mapping[str, Any] | None,
    resume: bool,
    monitors: Sequence[Monitor],
    tensorboard: bool,
    progress: bool,
    request: StopRequest,
) -> Path:
    from tqdm import tqdm

    if stage.keep_best and not monitors:
        raise ValueError(f"pretrain: monitors must be given for keep_best {stage.keep_best!r}, got none. Pass what reads it.")
    first = rank_and_world()[0] == 0
    run = _build(stage, dataset, indices, place)
    identity = run_identity(stage, dataset, indices)
    check_alike({**identity, "resume": resume})
    if resume:
        config, last = on_first(lambda: _resumed(folder, identity))
        if last is not None:
            try:
                run.load(last)
            except ValueError as error:
                raise ValueError(f"{error} Remove {last.path} to go on from the checkpoint before it.") from error
            if run.step == run.total_steps:
                return last.path
        # its tensors would stay in memory to the end
        del last
        on_first(lambda: note_resumed(folder, config, run.step, origin(place)))
    else:
        about = {
            "recipe": describe(recipe or {}), "data": str(dataset.path), "described": described_data(dataset), **origin(place),
            "identity": identity,
        }  # fmt: skip
        on_first(lambda: create_record(folder, about, indices))
    try:
        run.gradients = _choose_gradients(run, place)
        used = utilisation_of(run.encoder, run.objective.views, stage.precision, place, request.group)
        with (
            contextlib.closing(RunLog(folder, run.step, tensorboard)) if first else contextlib.nullcontext() as log,
            CheckpointWriter(folder, stage.keep_checkpoints) if first else contextlib.nullcontext() as writer,
            tqdm(
                total=run.total_steps, initial=run.step, desc=stage.name, unit="step", disable=not (progress and first),
                dynamic_ncols=True,
            ) as bar,
            contextlib.closing(Watch(run.encoder, place, heart, request.group, used)) as watch,
        ):  # fmt: skip
            return _train(run, writer, monitors, log, request, bar, watch)
    except ValueError:
        # refused before it did anything: the corrected run may have the folder
        if run.step == 0 and not resume and first:
            shutil.rmtree(folder)
        raise
