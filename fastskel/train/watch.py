"""What a run says of itself beside its loss: how many directions its embeddings use, what it waits for, and who is slow."""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from fastskel.data.batch import Batch
from fastskel.dist import all_reduce_sum, exchange, gather_rows, rank_and_world
from fastskel.objectives.objective import Terms
from fastskel.train.heartbeat import Heartbeat
from fastskel.train.processes import mean_deviation, on_first
from fastskel.train.utilisation import Utilisation

if TYPE_CHECKING:
    # builds of torch without it train in one process
    from torch.distributed import ProcessGroup

__all__ = ["Watch", "effective_rank", "embedding_rank", "figures_of"]

# samples of a batch that its rank is taken of: enough for a rank of hundreds, and some tenths of a second of a CPU
RANK_ROWS = 1024
# below it all embeddings lie near one line through the origin
LOW_RANK = 2.0
# a process is named slow if over so many records it took so many times the median, and a difference that is not noise
SLOW_RECORDS, SLOW_FACTOR, SLOW_SECONDS = 10, 1.5, 0.1

T = TypeVar("T")


def figures_of(terms: Terms, embeddings: Mapping[str, Tensor], norm: Tensor) -> dict[str, float]:
    """Return what a record says of the loss: its terms, the deviation of embeddings (W, N, D), the gradient's norm, ()."""
    shared = {"embedding_std": mean_deviation(embeddings), "gradient_norm": norm}
    named = {"loss": terms.total.detach(), **shared, **terms.terms}
    values = torch.stack([value.double() for value in named.values()])
    _, world = rank_and_world()
    # the same bits in all processes: they decide together whether to go on
    values = all_reduce_sum(values) / world if world > 1 else values
    return dict(zip(named, values.tolist(), strict=True))


def effective_rank(rows: Tensor) -> float:
    """Effective rank of embeddings: the exponential of the entropy of their singular values, which are scaled to sum to 1.

    Args:
        rows: (N, D); not centred.
    Returns:
        From 1, where all rows are multiples of one, to min(N, D); 0 for rows of zeros, NaN if one is not finite.
    Source: Garrido et al., RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised Representations by Their
        Rank, ICML 2023; without its epsilon. Singular values are roots of the eigenvalues of the smaller Gram matrix, in
        float64: those below 1e-8 of the largest are lost, and count as 0.
    """
    wide = rows.to(torch.float64)
    gram = (wide @ wide.T if wide.shape[0] < wide.shape[1] else wide.T @ wide).cpu()
    if not bool(gram.isfinite().all()):
        return float("nan")
    squares: Tensor = torch.linalg.eigvalsh(gram)
    # what rounding makes of a 0
    noise = squares.max() * max(rows.shape) * torch.finfo(torch.float64).eps
    values = squares[squares > noise].sqrt()
    if not len(values):
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


def embedding_rank(embeddings: Mapping[str, Tensor]) -> float:
    """Effective rank of the first view in the last stack (W, N, D), over rows of all processes, at most 1024 of them.

    The rows are the first of the whole batch, so that it does not depend on the number of processes.
    """
    _, world = rank_and_world()
    stack = list(embeddings.values())[-1][0]
    rows = stack[: max(RANK_ROWS // world, 1)].flatten(1)
    return effective_rank(rows if world == 1 else gather_rows(rows.contiguous(), counts=(len(rows),) * world))


def _resident_kib() -> int:
    """Most memory that this process ever had; of one that another process started, at least what that one had then."""
    # not there on Windows
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


class Watch:
    """Measures the steps of one process; nothing waits for a device but `figures`, at steps that are logged anyhow.

    What a process takes before it needs another one is the time from the start of a step to the end of its encoder's first
    forward pass: reading data and embedding the first views. All other times are those of the slowest. It is taken by
    the clock on a CPU and by events on a GPU, at logged steps.

    Args:
        encoder: Of views (N, T, M, V, C); its calls are noticed.
        device: Where it computes.
        heart: Told of every place of a step that was passed.
        group: Exchanges times on the host; None are all processes.
        utilisation: Operations of a sample and of the peak, from which the share of the peak is told.
    """

    def __init__(
        self,
        encoder: nn.Module,
        device: torch.device,
        heart: Heartbeat,
        group: ProcessGroup | None,
        utilisation: Utilisation | None = None,
    ) -> None:
        self.device, self.heart, self.group, self.utilisation = device, heart, group, utilisation
        self._rank, self._world = rank_and_world()
        self._armed = self._logged = False
        self._first_step: int | None = None
        self._began: Any = None
        self._embedded: Any = None
        self._waited, self._paused, self._records_step, self._records_time = 0.0, 0.0, 0, time.perf_counter()
        self._seconds: deque[tuple[float, ...]] = deque(maxlen=SLOW_RECORDS)
        self._warned: set[str] = set()
        self._hook = encoder.register_forward_hook(self._passed)

    def close(self) -> None:
        """Leave the encoder, of views (N, T, M, V, C), as it was."""
        self._hook.remove()

    def begin(self, step: int, *, logged: bool) -> None:
        """Note that a step begins, and whether its `figures` will be asked for."""
        if self._first_step is None:
            self._first_step = self._records_step = step
        self._armed, self._logged = True, logged
        self._long = step == self._first_step
        self._began, self._embedded = self._now(), None
        self.heart.mark("begins", step=step, long=self._long)

    def waits(self, parts: Iterator[Batch]) -> Iterator[Batch]:
        """Pass the parts of a batch on, views (n, T, M, V, C), and count the time that they are waited for."""
        while True:
            self.heart.mark("reads data", long=self._long)
            began = time.perf_counter()
            part = next(parts, None)
            self._waited += time.perf_counter() - began
            if part is None:
                return
            self.heart.mark("embeds", long=self._long)
            yield part

    def on_first(self, doing: str, function: Callable[[], T]) -> T:
        """Call a function in rank 0 while the others wait, which takes long; its result is everybody's.

        It is no part of a step: neither its calls of the encoder nor its time count.
        """
        self._armed = False
        began = time.perf_counter()
        self.heart.mark(doing, long=True)

        def passed() -> T:
            try:
                return function()
            finally:
                self.heart.mark("tells the others", long=True)

        if self._rank:
            self.heart.mark("waits for rank 0", long=True)
        result = on_first(passed)
        self._paused += time.perf_counter() - began
        return result

    def figures(self, step: int, samples: int) -> dict[str, Any]:
        """Say how the steps since the last record went; the same in all processes.

        Args:
            step: Step that is logged.
            samples: Samples of a step, of all processes together.
        Returns:
            `samples_per_s`, evaluation and writing left out; where they are known `model_tflop_per_s`, the encoder's operations
            as published, and `mfu`, their share of the peak; `data_stall`, share of the time that the host waited for data,
            and `memory_gib`, most memory that was allocated on the GPU or resident, of the process where it is largest; of
            several processes also `slowest_rank` and `rank_seconds`: least, median and most seconds before a process needs
            another one.
        """
        now = time.perf_counter()
        elapsed, steps = now - self._records_time - self._paused, step + 1 - self._records_step
        stall = round(1e6 * self._waited / elapsed)
        self._waited, self._paused, self._records_step, self._records_time = 0.0, 0.0, step + 1, now
        gpu = self.device.type == "cuda"
        kib = torch.cuda.max_memory_allocated(self.device) // 1024 if gpu else _resident_kib()
        own = round(1e6 * self._own_seconds())
        # the host's tensors, so that no rank reads another device
        told = exchange([own, stall, kib], torch.device("cpu"), self.group)
        seconds, stalls, memory = zip(*told, strict=True)
        found = {
            "samples_per_s": round(samples * steps / elapsed, 2),
            **self._used(samples * steps / elapsed),
            "data_stall": max(stalls) / 1e6,
            "memory_gib": round(max(memory) / 2**20, 3),
        }
        return found | (self._ranks(tuple(value / 1e6 for value in seconds)) if self._world > 1 else {})

    def _used(self, samples_per_s: float) -> dict[str, float]:
        if self.utilisation is None:
            return {}
        rate = samples_per_s * self.utilisation.flops
        # small models on a CPU do thousandths of a TFLOP
        return {"model_tflop_per_s": float(f"{rate / 1e12:.4g}"), "mfu": round(rate / self.utilisation.peak, 4)}

    def rank_of(self, embeddings: Mapping[str, Tensor], step: int) -> dict[str, float]:
        """Return `embedding_rank` of stacks (W, N, D), and warn once of one that says little is left to tell samples by."""
        rank = embedding_rank(embeddings)
        if rank < LOW_RANK:
            self._warn(
                "rank",
                f"pretrain: the embeddings' effective rank should be far above {LOW_RANK:g}, got {rank:.2f} at step {step}: they "
                "lie near one line. Watch embedding_rank; if it stays there, start a new run with a lower lr or a larger batch.",
            )
        return {"embedding_rank": rank}

    def _ranks(self, seconds: tuple[float, ...]) -> dict[str, Any]:
        # the first step of a process compiles and warms up, each in its own time
        if not self._long:
            self._seconds.append(seconds)
        means = [statistics.fmean(times) for times in zip(*(self._seconds or [seconds]), strict=True)]
        slowest, median = max(range(len(means)), key=means.__getitem__), statistics.median_low(means)
        behind = means[slowest] - median
        if len(self._seconds) == SLOW_RECORDS and means[slowest] > SLOW_FACTOR * median and behind > SLOW_SECONDS:
            self._warn(
                "slow",
                f"pretrain: all processes should be as fast, got {means[slowest]:.3f} s of rank {slowest} before it needs the "
                f"others, and a median of {median:.3f} s, over {SLOW_RECORDS} records. All wait for it; look at its machine.",
            )
        spread = [min(seconds), statistics.median_low(seconds), max(seconds)]
        return {"slowest_rank": seconds.index(max(seconds)), "rank_seconds": spread}

    def _warn(self, about: str, text: str) -> None:
        if self._rank == 0 and about not in self._warned:
            warnings.warn(text, stacklevel=4)
        self._warned.add(about)

    def _now(self) -> Any:
        if self.device.type != "cuda" or not self._logged:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _own_seconds(self) -> float:
        if self._embedded is None:
            # whoever embeds without calling the encoder as a module is timed up to here
            self._embedded = self._now()
        if isinstance(self._began, float):
            return float(self._embedded - self._began)
        self._embedded.synchronize()
        return float(self._began.elapsed_time(self._embedded)) / 1e3

    def _passed(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._armed:
            self._armed = False
            self._embedded = self._now()
            self.heart.mark("shares its embeddings", long=self._long)
