"""Processes that train together: set up as torchrun says, of one mind, and ended together."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from fastskel.data.batch import Batch
from fastskel.dist import all_reduce_sum, rank_and_world
from fastskel.models.encoder import Encoder
from fastskel.nn.grouped_norm import uses_batch_statistics
from fastskel.objectives.objective import Objective, Terms
from fastskel.train.device import choose_device
from fastskel.train.heartbeat import FAILED, Heartbeat
from fastskel.train.preemption import Preempted

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

__all__ = ["Pair", "Step", "TrainingStopped", "check_alike", "join", "mean_deviation", "on_first", "processes"]

# what torchrun tells each process
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# longest that a process waits for another, which may be evaluating or writing a checkpoint
TIMEOUT = timedelta(minutes=10)
# longest that one which failed waits until the others have read why
FAREWELL_SECONDS = 5.0
# what errors say that are but of a connection
SYMPTOMS = ("gloo", "NCCL", "onnection", "imed out")
READ = "fastskel-read"

T = TypeVar("T")
M = TypeVar("M", bound="Pair")


class TrainingStopped(RuntimeError):
    """The training cannot go on: it diverged or collapsed, or one of its processes failed."""


class Pair(nn.Module):
    """Encoder and objective as one module, so that DistributedDataParallel sees a whole forward pass."""

    def __init__(self, encoder: Encoder, objective: Objective) -> None:
        super().__init__()
        self.encoder, self.objective = encoder, objective


class Step(Pair):
    """Embeds a batch and takes its loss."""

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, dict[str, Tensor]]:
        """Return the terms of a batch of views (N, T, M, V, C), and its embeddings (W, N, D), detached."""
        embeddings = self.objective.embed(self.encoder, batch)
        terms = self.objective.loss(embeddings, batch, progress)
        return terms, {name: z.detach() for name, z in embeddings.items()}


def _launched() -> tuple[int, int] | None:
    """Rank on this machine, and number of processes; None where this process is alone."""
    if "RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    missing = [name for name in PLACE if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"pretrain: {', '.join(PLACE)} must be set together, got no {', '.join(missing)}. Start it with torchrun, or "
            "unset RANK and WORLD_SIZE to train in one process."
        )
    numbers = {name: os.environ[name] for name in PLACE if name != "MASTER_ADDR"}
    if not all(value.isdecimal() for value in numbers.values()) or int(numbers["RANK"]) >= int(numbers["WORLD_SIZE"]):
        raise ValueError(
            f"pretrain: RANK must be in 0 .. WORLD_SIZE - 1 and all be whole numbers, got {numbers}. Start it with torchrun."
        )
    world = int(numbers["WORLD_SIZE"])
    return (int(numbers["LOCAL_RANK"]), world) if world > 1 else None


def _own_device(name: str, local_rank: int) -> torch.device:
    """Give each process of a machine a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith("cuda"):
        return choose_device(name)
    if name != "cuda":
        raise ValueError(
            f"pretrain: device must be auto, cpu or cuda in several processes, got {name!r}. Each takes the GPU of its rank."
        )
    place = choose_device(f"cuda:{local_rank}")
    torch.cuda.set_device(place)
    return place


def _end(error: BaseException, store: Store, rank: int, world: int) -> NoReturn:
    """Leave word of why this process ends, end, and say whose failure it was."""
    word, lost = "", isinstance(error, RuntimeError) and any(symptom in str(error) for symptom in SYMPTOMS)
    # errors, where the store ended with the process that held it
    with contextlib.suppress(RuntimeError):
        if not lost:
            word = store.compare_set(FAILED, "", f"rank {rank} ({type(error).__name__}: {error})").decode()
        elif store.check([FAILED]):
            # who closed a connection had left word before
            word = store.get(FAILED).decode()
        store.add(READ, 1)
    # closing the connections is what wakes the others
    dist.destroy_process_group()
    end = time.monotonic() + FAREWELL_SECONDS
    with contextlib.suppress(RuntimeError):
        while word and store.add(READ, 0) < world and time.monotonic() < end:
            time.sleep(0.02)
    if lost:
        who = word or "a process that left no word; torchrun names it"
        raise TrainingStopped(
            f"pretrain: all processes must go on, got the end of {who}. Mend its cause, then resume."
        ) from error
    raise error


def _own_round(store: Store, rank: int, world: int) -> Store:
    """Agree on a part of the store that no earlier process wrote to.

    torchrun keeps one store over its restarts: who starts first would find the addresses of processes that are gone. Restarts
    are counted by each machine for itself, so the count cannot tell rounds apart. Rank 0 names the round, and answers
    every greeting until all have heard of it; a greeting that was left behind is answered in vain.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"fastskel-greeting/{rank}", own)
        name = store.get(f"fastskel-answer/{own}").decode()
        store.set(f"{name}/heard/{rank}", "")
        return PrefixStore(name, store)
    name, end = f"fastskel-round/{own}", time.monotonic() + TIMEOUT.total_seconds()
    waiting = set(range(1, world))
    while waiting:
        for other in list(waiting):
            if store.check([f"{name}/heard/{other}"]):
                waiting.discard(other)
            elif store.check([f"fastskel-greeting/{other}"]):
                store.set(f"fastskel-answer/{store.get(f'fastskel-greeting/{other}').decode()}", name)
        if time.monotonic() > end:
            raise TrainingStopped(
                f"pretrain: all {world} processes must start, got none of ranks {sorted(waiting)} within {TIMEOUT}. "
                "Look at what they printed."
            )
        time.sleep(0.02)
    return PrefixStore(name, store)


@contextlib.contextmanager
def processes(device: str) -> Iterator[tuple[torch.device, Heartbeat]]:
    """Set up the processes that torchrun started, and take them down again: gloo on CPUs, nccl on GPUs, one for each process.

    A group that was set up already is used and left alone. A failure in one process ends the others at once, which name it.
    One that hangs is named by the others once they have waited for it for too long; they end with status 3.

    Args:
        device: `"auto"` takes a GPU where there is one; several processes take the one of their rank on the machine.
    Returns:
        The device, and what to tell of progress.
    Raises:
        ValueError: If the environment names processes without saying how to reach them, or there is no such device.
        TrainingStopped: If another process failed.
    """
    ours = None if dist.is_available() and dist.is_initialized() else _launched()
    if ours is None:
        yield choose_device(device), Heartbeat()
        return
    if not dist.is_available():
        raise ValueError(
            "pretrain: torch must have torch.distributed for several processes, got one without. Install another build."
        )
    local_rank, world = ours
    place = _own_device(device, local_rank)
    backend = "nccl" if place.type == "cuda" else "gloo"
    try:
        store, rank, world = next(rendezvous("env://", timeout=TIMEOUT))
        store = _own_round(store, rank, world)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    except TrainingStopped:
        raise
    except RuntimeError as error:
        # one of them may have ended before it came
        raise TrainingStopped(
            f"pretrain: all {world} processes must meet, got {str(error).splitlines()[0]}. Look at what the others printed, "
            "and at MASTER_ADDR and MASTER_PORT."
        ) from error
    heart = Heartbeat(store, rank, world)
    try:
        # its threads end before the connections that they use
        with contextlib.closing(heart):
            yield place, heart
        # none may close a connection that another still reads
        dist.barrier()
    except Preempted:
        # all stop after the same step
        dist.barrier()
        dist.destroy_process_group()
        raise
    except BaseException as error:
        _end(error, store, rank, world)
    dist.destroy_process_group()


def on_first(function: Callable[[], T]) -> T:
    """Call a function in rank 0 while the others wait; its result, or its error, is everybody's."""
    rank, world = rank_and_world()
    if world == 1:
        return function()
    said: list[Any] = [None, None]
    if rank == 0:
        try:
            said[0] = function()
        except Exception as error:
            # told before it is raised
            said[1] = error
    own = said[1]
    dist.broadcast_object_list(said, src=0)
    if said[1] is not None:
        raise own or said[1]
    result: T = said[0]
    return result


def check_alike(described: Mapping[str, Any]) -> None:
    """Refuse processes that would train something else than rank 0; plain values.

    Raises:
        ValueError: In all processes, naming ranks and keys that differ.
    """
    _, world = rank_and_world()
    if world == 1:
        return
    everybody: list[Any] = [None] * world
    dist.all_gather_object(everybody, dict(described))
    first = everybody[0]
    others = {rank: sorted(k for k in first if first[k] != own[k]) for rank, own in enumerate(everybody) if own != first}
    if others:
        raise ValueError(
            f"pretrain: all processes must train the same, got other settings than rank 0's by rank: {others}. "
            "Start all of them with the same command on the same data."
        )


def join(step: M, *, synchronise_norms: bool) -> M | DistributedDataParallel:
    """Make the module that does what `step` does on this process's share of a batch, (N, T, M, V, C) a view.

    Gradients of parameters become those of the whole batch, in all processes, once the loss is differentiated. The objective
    takes the loss over all processes if it couples samples.

    Args:
        step: Holds encoder and objective, on their device, with the weights to start from; rank 0's count.
        synchronise_norms: Whether the objective's BatchNorm sees the samples of all processes.
    Returns:
        The step itself where this process is alone, else under DistributedDataParallel.
    Raises:
        ValueError: If the objective, or BatchNorm in the encoder, cannot do so.
    """
    _, world = rank_and_world()
    encoder, objective = step.encoder, step.objective
    if world == 1:
        return step
    share = getattr(objective, "share", None)
    if share is None and (objective.needs_whole_batch or synchronise_norms):
        raise ValueError(
            f"pretrain: objective must have share(group, synchronise_norms=) for several processes, got "
            f"{type(objective).__name__}. Train it in one process."
        )
    if synchronise_norms and uses_batch_statistics(encoder):
        raise ValueError(
            f"pretrain: encoder must be without BatchNorm for synchronise_norms, got {type(encoder).__name__}. "
            "Leave the option out."
        )
    if share is not None:
        share(dist.group.WORLD, synchronise_norms=synchronise_norms)
    # the search for parameters that no process used leaves these without gradient, as in one process, and keeps the buckets as
    # they are: a resumed run adds in the same order. torch warns once where it finds none
    parallel = DistributedDataParallel(step, find_unused_parameters=True, gradient_as_bucket_view=True)
    # training reads no running statistics, and rank 0's are kept. as an attribute: the argument is renamed in torch 2.13
    parallel.broadcast_buffers = False
    return parallel


def mean_deviation(embeddings: Mapping[str, Tensor]) -> Tensor:
    """Mean deviation, (), of embeddings (W, N, D) over the samples of all processes, each stack counting as much."""
    stacks = [z.to(torch.promote_types(z.dtype, torch.float32)) for z in embeddings.values()]
    _, world = rank_and_world()
    if world == 1:
        return torch.stack([z.std(1).mean() for z in stacks]).mean()
    widths, num_rows = [z.shape[-1] for z in stacks], stacks[0].shape[1] * world
    means = torch.split(all_reduce_sum(torch.cat([z.mean(1) for z in stacks], -1)) / world, widths, -1)
    squares = torch.cat([(z - mean[:, None]).square().sum(1) for z, mean in zip(stacks, means, strict=True)], -1)
    deviations = torch.split((all_reduce_sum(squares) / (num_rows - 1)).sqrt(), widths, -1)
    return torch.stack([deviation.mean() for deviation in deviations]).mean()
