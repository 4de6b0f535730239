"""Gradients of one optimiser step: of a batch at once, or chunk by chunk in the memory of one chunk.

A loss that couples samples needs the embeddings of all of them, but not what led to them. `CachedGradients` embeds chunk after
chunk without a graph, differentiates the loss by the embeddings, and embeds every chunk a second time, now with a graph, to pull
its share of that gradient back to the parameters. Views and draws are functions of their address, so the second pass repeats
the first. What grows with the batch of N samples in W views is embeddings and their gradient, 2 W N F numbers with F the summed
width of the embeddings, and what the loss itself needs; everything else is that of one chunk. The price is the forward pass done
twice: about a third more operations.

Source of the two passes: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, RepL4NLP 2021.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastskel.data.batch import Batch
from fastskel.dist import rank_and_world
from fastskel.models.encoder import Encoder
from fastskel.nn.grouped_norm import uses_batch_statistics
from fastskel.objectives.objective import Objective, Terms
from fastskel.train.processes import Pair, Step, join

__all__ = ["AccumulatedGradients", "CachedGradients", "Gradients", "Outcome", "WholeGradients", "choose_gradients"]

Autocast = Callable[[], AbstractContextManager[Any]]


class Outcome(NamedTuple):
    """What a step found out beside gradients, all of it detached.

    Attributes:
        terms: The loss of the whole batch, and its parts.
        embeddings: Of this process's samples, (W, N, F) each.
        batch: Labels, index and extras of these; its views where it was whole, else none.
    """

    terms: Terms
    embeddings: dict[str, Tensor]
    batch: Batch


class Gradients(abc.ABC):
    """Adds the gradient of a step's loss to the parameters, in all processes.

    Attributes:
        passes: How often it reads the samples of a step.
    """

    passes = 1

    @abc.abstractmethod
    def __call__(self, passes: Sequence[Iterator[Batch]], progress: float) -> Outcome:
        """Differentiate the loss of one batch.

        Args:
            passes: One iterator a pass over the chunks of the batch, views (n, T, M, V, C) with their addresses.
            progress: From 0 to 1 over the training.
        """


class Embedding(Pair):
    """Embeds a chunk."""

    def forward(self, chunk: Batch) -> dict[str, Tensor]:
        """Embed views (n, T, M, V, C): tensors (W, n, ...)."""
        return self.objective.embed(self.encoder, chunk)


class WholeGradients(Gradients):
    """Those of a batch in one piece, as it always was."""

    def __init__(self, step: Callable[[Batch, float], tuple[Terms, dict[str, Tensor]]], autocast: Autocast) -> None:
        self.step, self.autocast = step, autocast

    def __call__(self, passes: Sequence[Iterator[Batch]], progress: float) -> Outcome:
        """Differentiate the loss of the only chunk, views (N, T, M, V, C)."""
        ((batch,),) = passes
        with self.autocast():
            terms, embeddings = self.step(batch, progress)
        terms.total.backward()  # type: ignore[no-untyped-call]
        return Outcome(terms, embeddings, batch)


class Rows:
    """The rows of a batch, chunk after chunk: embeddings (W, N, F), and what is known of each sample.

    Memory for all rows is taken once, with the first chunk.

    Args:
        number: N.
    """

    def __init__(self, number: int) -> None:
        self.number, self.filled = number, 0
        self.embeddings: dict[str, Tensor] = {}
        self._batch: Batch | None = None

    def add(self, chunk: Batch, embeddings: dict[str, Tensor]) -> None:
        """Copy a chunk's embeddings (W, n, F) to their place; its views are let go."""
        if self._batch is None:
            self.embeddings = {name: z.new_empty(z.shape[0], self.number, *z.shape[2:]) for name, z in embeddings.items()}
            extras = {name: self._empty(value) for name, value in chunk.extras.items()}
            self._batch = Batch([], self._empty(chunk.labels), self._empty(chunk.index), extras)
        here = slice(self.filled, self.filled + len(chunk))
        self.filled = here.stop
        for name, z in embeddings.items():
            self.embeddings[name][:, here] = z.detach()
        self._batch.labels[here], self._batch.index[here] = chunk.labels, chunk.index
        for name, value in chunk.extras.items():
            self._batch.extras[name][here] = value

    def _empty(self, rows: Tensor) -> Tensor:
        return rows.new_empty(self.number, *rows.shape[1:])

    def batch(self) -> Batch:
        """Return labels, index and extras, (N,) each; without views (n, T, M, V, C)."""
        assert self._batch is not None and self.filled == self.number
        return self._batch


class _Chunked(Gradients):
    """What both ways to take a batch in chunks share.

    Args:
        module: Encoder and objective, as `join` returned them.
        num_rows: Samples N of this process.
        num_chunks: Chunks of them.
        autocast: Makes the context of forward passes.
    """

    def __init__(self, module: Any, num_rows: int, num_chunks: int, autocast: Autocast) -> None:
        self.module, self.num_rows, self.num_chunks, self.autocast = module, num_rows, num_chunks, autocast
        self.pair: Pair = module.module if isinstance(module, DistributedDataParallel) else module

    @contextlib.contextmanager
    def _step(self) -> Iterator[None]:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "pretrain: a step in chunks must run outside of a CUDA graph, got a capture: a replay would repeat the views of "
                "its chunks. Capture steps of a whole batch."
            )
        with contextlib.ExitStack() as stack:
            # under DistributedDataParallel gradients must reach the parameters in the backward pass of the last chunk
            if self.module is self.pair and (merged_once := getattr(self.pair.encoder, "merged_once", None)):
                with self.autocast():
                    stack.enter_context(merged_once())
            yield

    def _reduced(self, number: int) -> AbstractContextManager[Any]:
        """Let processes exchange gradients once, after the last chunk."""
        if self.module is self.pair or number + 1 == self.num_chunks:
            return contextlib.nullcontext()
        return self.module.no_sync()  # type: ignore[no-any-return]


class AccumulatedGradients(_Chunked):
    """For a loss that is a mean over samples: each chunk's is differentiated by itself, weighted by its samples."""

    def __call__(self, passes: Sequence[Iterator[Batch]], progress: float) -> Outcome:
        """Differentiate the loss of all chunks of views (n, T, M, V, C)."""
        (only,) = passes
        rows = Rows(self.num_rows)
        sums: dict[str, Tensor] = {}
        with self._step():
            for number, chunk in enumerate(only):
                share = len(chunk) / self.num_rows
                with self._reduced(number):
                    with self.autocast():
                        terms, embeddings = self.module(chunk, progress)
                    (terms.total * share).backward()
                rows.add(chunk, embeddings)
                for name, value in {"": terms.total, **terms.terms}.items():
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach() * share
        return Outcome(Terms(sums.pop(""), sums), rows.embeddings, rows.batch())


class CachedGradients(_Chunked):
    """For a loss that couples samples: two passes over the chunks, with the loss between them.

    BatchNorm takes the statistics of one chunk, in both passes. Buffers, such as its running statistics, change in the first
    pass alone, chunk after chunk in order, as in the forward passes of plain accumulation; the second leaves them as it found
    them.
    """

    passes = 2

    def __init__(self, module: Any, num_rows: int, num_chunks: int, autocast: Autocast) -> None:
        super().__init__(module, num_rows, num_chunks, autocast)
        self._compared = False

    def __call__(self, passes: Sequence[Iterator[Batch]], progress: float) -> Outcome:
        """Differentiate the loss of all chunks of views (n, T, M, V, C).

        Raises:
            ValueError: If the second pass over the first batch finds other embeddings than the first pass.
        """
        first, second = passes
        rows = Rows(self.num_rows)
        with self._step():
            for chunk in first:
                with torch.no_grad(), self.autocast():
                    rows.add(chunk, self.pair(chunk))
            batch = rows.batch()
            leaves = {name: z.requires_grad_(z.is_floating_point()) for name, z in rows.embeddings.items()}
            with self.autocast():
                terms = self.pair.objective.loss(leaves, batch, progress)
            # of the loss's own parameters too: processes exchange what has accumulated
            terms.total.backward()  # type: ignore[no-untyped-call]
            with _kept_buffers(self.pair):
                self._pull_back(second, leaves)
        self._compared = True
        embeddings = {name: z.detach() for name, z in leaves.items()}
        return Outcome(Terms(terms.total.detach(), terms.terms), embeddings, batch)

    def _pull_back(self, chunks: Iterator[Batch], leaves: dict[str, Tensor]) -> None:
        """Embed the chunks again and differentiate by the parameters, given the gradient by embeddings (W, N, F)."""
        begin = 0
        for number, chunk in enumerate(chunks):
            here = slice(begin, begin + len(chunk))
            begin = here.stop
            with self._reduced(number):
                with self.autocast():
                    embeddings = self.module(chunk)
                if not self._compared:
                    _check_same(embeddings, {name: z[:, here] for name, z in leaves.items()})
                pairs = [
                    (z, grad[:, here].contiguous())
                    for name, z in embeddings.items()
                    if z.requires_grad and (grad := leaves[name].grad) is not None
                ]
                torch.autograd.backward([z for z, _ in pairs], [grad for _, grad in pairs])


@contextlib.contextmanager
def _kept_buffers(module: nn.Module) -> Iterator[None]:
    """Leave a module's buffers as they were; to be put back after all backward passes, which may look at them."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _check_same(again: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    for name, z in again.items():
        first = before[name].detach().double()
        distance = float(torch.linalg.vector_norm(z.detach().double() - first))
        # half of the digits: passes with and without a graph may round differently
        limit = torch.finfo(z.dtype).eps ** 0.5 if z.is_floating_point() else 0.0
        if distance > limit * float(torch.linalg.vector_norm(first)):
            raise ValueError(
                f"pretrain: embed must give the same embeddings in both passes over a chunk, got {name!r} that differ by "
                f"{distance:.2g}. Draw at view.address alone and read no buffer that embed changes, or leave chunk out."
            )


def choose_gradients(
    encoder: Encoder, objective: Objective, *, num_rows: int, num_chunks: int, synchronise_norms: bool, autocast: Autocast
) -> Gradients:
    """Choose how a step makes its gradients: at once, or in chunks as the objective allows.

    Args:
        encoder: On its device, with the weights to start from; rank 0's count.
        objective: Likewise.
        num_rows: Samples N of this process in a step.
        num_chunks: Chunks of them; 1 leaves the batch whole.
        synchronise_norms: Whether the objective's BatchNorm sees the samples of all processes.
        autocast: Makes the context of forward passes over views (N, T, M, V, C).
    Raises:
        ValueError: If a chunk would have a single sample where statistics need two, or if processes cannot share the loss.
    """
    shared = synchronise_norms and rank_and_world()[1] > 1
    normed = uses_batch_statistics(encoder) or uses_batch_statistics(objective)
    if num_chunks > 1 and num_rows // num_chunks < 2 and normed and not shared:
        raise ValueError(
            f"pretrain: chunk must leave at least 2 samples to each part of a process's batch, got {num_rows} samples in "
            f"{num_chunks} parts. Statistics need two of them; choose a larger chunk."
        )
    if num_chunks > 1 and objective.needs_whole_batch:
        module = join(Embedding(encoder, objective), synchronise_norms=synchronise_norms)
        return CachedGradients(module, num_rows, num_chunks, autocast)
    step = join(Step(encoder, objective), synchronise_norms=synchronise_norms)
    if num_chunks > 1:
        return AccumulatedGradients(step, num_rows, num_chunks, autocast)
    return WholeGradients(step, autocast)
