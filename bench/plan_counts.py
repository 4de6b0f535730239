"""Counts one training step of a stage on tensors without values: operations, bytes moved, bytes alive, bytes sent to others.

The code that is counted is the code that trains: encoder, objective and, for several processes, the loss over all of them. Only
what sends is stood in for, by functions that make tensors of the right shape and note how large they are.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from fastskel.bench.counting import Counter, Entry
from fastskel.bench.guard import on_cpu
from fastskel.bench.predict import expected_drops
from fastskel.kernels.decorrelation import decorrelate_torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastskel.data.batch import Batch, View
from fastskel.data.loader import num_chunks
from fastskel.models import DSTE
from fastskel.skeleton import Topology
from fastskel.train import Stage, start

__all__ = ["OPTIMIZER_STATES", "Counts", "Live", "Traffic", "count_step"]

UNLIMITED = 1 << 62
# what DistributedDataParallel sends at once
BUCKET_BYTES = 25 << 20
# tensors as large as a weight that an optimiser keeps of it
OPTIMIZER_STATES = {"adam": 2, "adamw": 2, "lamb": 2, "lars": 1}


class Live(TorchDispatchMode):
    """Follows the storages that are made inside.

    Attributes:
        bytes: Alive now.
        peak: Most that were alive at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in given and storage not in self._seen:
                    self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        num_bytes = storage.nbytes()
        self._seen.add(storage)
        self.bytes += num_bytes
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._remove, num_bytes).atexit = False

    def _remove(self, num_bytes: int) -> None:
        self.bytes -= num_bytes


@dataclass
class Traffic:
    """What a process exchanges in one step.

    Attributes:
        world: Processes.
        summed: Bytes of tensors that are summed over the processes.
        gathered: Bytes of the results of gathering.
        messages: Exchanges.
    """

    world: int
    summed: float = 0
    gathered: float = 0
    messages: float = 0

    @property
    def sent(self) -> float:
        """Bytes that each process sends, as rings of processes do."""
        return (2 * self.summed + self.gathered) * (self.world - 1) / self.world

    def sum(self, x: Tensor) -> None:
        """Note a sum of x (..., D) over the processes."""
        self.summed += x.numel() * x.element_size()
        self.messages += 1

    def scaled(self, factor: float) -> Traffic:
        """Return the traffic of doing this `factor` times."""
        return Traffic(self.world, factor * self.summed, factor * self.gathered, factor * self.messages)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.world, self.summed + other.summed, self.gathered + other.gathered, self.messages + other.messages
        )


@dataclass
class Counts:
    """One step of one process.

    Attributes:
        rows: Samples of this process.
        chunks: Parts they are cut into, of at most `chunk_rows`.
        parameters: Numbers in encoder and objective; `encoder_parameters` in the encoder.
        embeddings: Bytes of the embeddings (W, N, F) of all rows.
        activations: Bytes that the forward pass of one chunk leaves alive, without its embeddings.
        loss_peak: Most bytes that the loss has alive, without the embeddings.
        chunk_peak: Most bytes alive while one chunk goes forward and back, gradients of parameters among them.
        peak: Most bytes alive in a step beside weights, optimiser and views; gradients count.
        traffic: Of the loss and of normalisation; `gradients` that of DistributedDataParallel.
        phases: Launches by phase, and how often each phase runs.
    """

    rows: int
    chunks: int
    chunk_rows: int
    parameters: int
    encoder_parameters: int
    embeddings: int = 0
    activations: int = 0
    loss_peak: int = 0
    chunk_peak: int = 0
    peak: int = 0
    traffic: Traffic = field(default_factory=lambda: Traffic(1))
    gradients: Traffic = field(default_factory=lambda: Traffic(1))
    phases: dict[str, tuple[float, list[Entry]]] = field(default_factory=dict)

    @property
    def flops(self) -> float:
        """Operations of matrix products of the whole step."""
        return sum(times * sum(e.flops for e in entries) for times, entries in self.phases.values())

    @property
    def bytes_moved(self) -> float:
        """Bytes read and written at least in the whole step."""
        return sum(times * sum(e.bytes for e in entries) for times, entries in self.phases.values())

    @property
    def launches(self) -> float:
        """Operations started in the whole step."""
        return sum(times * sum(e.launches for e in entries) for times, entries in self.phases.values())


@contextlib.contextmanager
def _alone_as(traffic: Traffic) -> Iterator[None]:
    """Let the code for several processes run in this one, and note what it would send."""
    world = traffic.world

    def start_sum(x: Tensor, group: Any = None) -> None:
        traffic.sum(x)

    def gather_rows(x: Tensor, group: Any = None, counts: Sequence[int] | None = None) -> Tensor:
        assert counts is not None
        traffic.gathered += world * max(counts) * x.numel() // x.shape[-2] * x.element_size()
        traffic.messages += 1
        return x.new_empty(*x.shape[:-2], sum(counts), x.shape[-1])

    def exchange(values: Sequence[int], device: torch.device, group: Any = None) -> list[tuple[int, ...]]:
        traffic.gathered += world * 8 * len(values)
        traffic.messages += 1
        return [tuple(values)] * world

    def all_reduce(x: Tensor, group: Any = None) -> None:
        traffic.sum(x)

    across = "fastskel.objectives.across"
    distributed = SimpleNamespace(get_world_size=lambda group: world, get_rank=lambda group: 0, all_reduce=all_reduce)
    with (
        mock.patch(f"{across}.rank_and_world", return_value=(0, world)),
        mock.patch(f"{across}.start_sum", start_sum),
        mock.patch(f"{across}.gather_rows", gather_rows),
        mock.patch(f"{across}.exchange", exchange),
        mock.patch("fastskel.nn.grouped_norm.dist", distributed),
    ):
        yield


@contextlib.contextmanager
def _without_values(stage: Stage, gpu: bool) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        # not through its operator, which hides what it launches
        stack.enter_context(mock.patch("fastskel.objectives.functional.decorrelate", decorrelate_torch))
        if stage.encoder_options.get("drop_path"):
            # draws need values: as many rows are kept as on average
            def drops(self: DSTE, rows: int, view: Any, tokens: Tensor) -> Any:
                return ([expected_drops(rows, self.drop_path)] * self.num_layers,) * 2

            stack.enter_context(mock.patch.object(DSTE, "_drops", drops))
        if gpu:
            # a GPU takes whole matrices; blocks are for the caches of a CPU
            blocks = ("kernels._decorrelation_pass.BLOCK_ELEMENTS", "kernels._decorrelation_pass.LEAF_ROWS")
            for size in (*blocks, "objectives.functional.BLOCK_ELEMENTS"):
                stack.enter_context(mock.patch(f"fastskel.{size}", UNLIMITED))
        yield


def _views(stage: Stage, rows: int) -> Batch:
    """Make the views of a chunk, (n, T, M, V, C) each."""
    options = stage.encoder_options
    shape = [options[f"num_{name}"] for name in ("frames", "bodies", "joints", "channels")]
    skeleton = Topology.unknown(shape[2])
    if variant := options.get("bone_variant"):
        skeleton = replace(skeleton, bones={variant: skeleton.parents()})
    views = [View(torch.empty(rows, *shape), torch.empty(rows, *shape[:2], dtype=torch.bool), skeleton) for _ in stage.views]
    return Batch(views, torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.int64))


def count_step(stage: Stage, world: int = 1, *, gpu: bool = True) -> Counts:
    """Count a step of one of `world` processes over its share of the stage's batch; views are (n, T, M, V, C).

    Args:
        stage: What trains; the objective must take the loss over the whole batch.
        world: Processes; batch and chunk must be multiples of it.
        gpu: Whether sums over blocks are left out that a CPU makes for its caches.
    Raises:
        ValueError: If batch or chunk cannot be shared out.
    """
    for name, value in {"batch_size": stage.batch_size, "chunk": stage.chunk or world}.items():
        if world < 1 or value % world:
            raise ValueError(
                f"plan: {name} must be a multiple of the {world} processes, got {value}. It counts the samples of all of them; "
                "choose another."
            )
    rows = stage.batch_size // world
    chunks = num_chunks(rows, stage.chunk // world if stage.chunk else None)
    chunk_rows = -(-rows // chunks)
    if chunk_rows < 2 and not stage.synchronise_norms:
        raise ValueError(
            f"plan: batch_size must leave 2 samples to each of {world} processes, got {rows} in {chunks} parts. BatchNorm needs "
            "two of them; take fewer GPUs, a larger batch or chunk, or synchronise_norms."
        )
    # copies that a constructor makes would leave the mode of tensors without values
    with torch.device("meta"):
        encoder, objective = start(stage)
    with _without_values(stage, gpu):
        model = on_cpu(torch.nn.ModuleList([encoder, objective])).train()
        if not objective.needs_whole_batch:
            raise ValueError(
                f"plan: objective must couple the samples of a batch, got {stage.objective}. Only such losses are counted."
            )
        sizes = [sum(p.numel() for p in module.parameters()) for module in (model, encoder)]
        found = Counts(rows, chunks, chunk_rows, parameters=sizes[0], encoder_parameters=sizes[1])
        if world > 1:
            objective.share(object(), synchronise_norms=stage.synchronise_norms)  # type: ignore[operator]
            found.gradients = Traffic(world, summed=4 * sizes[0], messages=1 + 4 * sizes[0] // BUCKET_BYTES)
        _count(stage, encoder, objective, found, world)
    return found


def _count(stage: Stage, encoder: Any, objective: Any, found: Counts, world: int) -> None:
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=stage.precision != "fp32")
    repeats = found.rows / found.chunk_rows
    batch = _views(stage, found.chunk_rows)
    counter, live = Counter(), Live()
    outside, inside = Traffic(world), Traffic(world)
    cached = found.chunks > 1

    def run(phase: str, call: Callable[[], Any], traffic: Traffic) -> Any:
        counter.phase = phase
        with _alone_as(traffic), counter, live:
            return call()

    def embed() -> Any:
        with autocast:
            return objective.embed(encoder, batch)

    def loss(embeddings: Any, rows: Batch) -> Any:
        with autocast:
            return objective.loss(embeddings, rows, 0.0).total

    whole = batch
    if cached:
        with torch.no_grad():
            z = run("first pass", embed, inside)
        whole = Batch([], torch.empty(found.rows, dtype=torch.int64), torch.empty(found.rows, dtype=torch.int64))
        leaves = {
            name: torch.empty(x.shape[0], found.rows, *x.shape[2:], dtype=x.dtype, requires_grad=True) for name, x in z.items()
        }
        del z
        live.peak = live.bytes
        before = live.bytes
        total = run("loss", lambda: loss(leaves, whole), outside)
        run("loss", total.backward, outside)
        del total
        found.embeddings = sum(_size(x) for x in leaves.values())
        found.loss_peak = live.peak - before
        for leaf in leaves.values():
            leaf.grad = None
        live.peak = live.bytes
        z = run("embed", embed, inside)
        own = sum(map(_size, z.values()))
        found.activations = live.bytes - own
        gradients = [torch.empty_like(x) for x in z.values()]
        outputs = list(z.values())
        del z
        run("backward", lambda: torch.autograd.backward(outputs, gradients), inside)
        # the first pass of the next step and the loss find no gradients of parameters, the second pass those of the embeddings
        found.chunk_peak = live.peak + own
        found.peak = found.embeddings + max(found.loss_peak, found.embeddings + found.chunk_peak)
    else:
        z = run("embed", embed, inside)
        found.embeddings = sum(map(_size, z.values()))
        found.activations = live.bytes - found.embeddings
        before, live.peak = live.bytes, live.bytes
        total = run("loss", lambda: loss(z, whole), outside)
        found.loss_peak = live.peak - before
        del z
        run("backward", total.backward, inside)
        found.peak = found.chunk_peak = live.peak
    entries = counter.entries()
    for phase in dict.fromkeys(e.phase for e in entries):
        times = 1.0 if phase == "loss" else repeats
        found.phases[phase] = (times, [e for e in entries if e.phase == phase])
    # one pass: weights and gradients are read, states read and written
    states = OPTIMIZER_STATES[stage.optimizer]
    moved = 4 * found.parameters * (3 + 2 * states) + (12 * found.encoder_parameters if stage.average else 0)
    found.phases["optimiser"] = (1.0, [Entry("optimiser", stage.optimizer, launches=1, bytes=moved)])
    found.traffic = outside + inside.scaled(repeats)


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()
