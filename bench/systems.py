"""The systems of whole jobs: a training step with what feeds it, and the check that all of them compute the same.

Clips have NTU-60's shape. Files hold some distinct ones, which an epoch visits until it has visited as many as NTU-60 has.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from fastskel.bench import training
from fastskel.bench.contest import unavailable_row
from fastskel.bench.loader import buffer_of
from fastskel.bench.providers import Kind
from fastskel.bench.reference.feeder import Feeder
from fastskel.bench.train_steps import SEED, VIEWS, ReferenceStep, Setting, make_step
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from fastskel import _native
from fastskel.data import Batch, Loader, PackedDataset, usdrl_views
from fastskel.train.capture import CapturedStep

__all__ = [
    "EPOCHS", "NTU_CLIPS", "PREFETCH", "THREADS", "WORKERS", "Job", "OwnSystem", "ReferenceSystem", "System", "check",
    "default_providers", "hold_one_batch", "make_systems", "prepared", "reference_result",
]  # fmt: skip

Row = dict[str, Any]

# clips of NTU RGB+D 60's cross-subject training part, and epochs of the published recipe
NTU_CLIPS, EPOCHS = 40_091, 451
# as published, where there are as many processors
WORKERS = 8
# more threads of the native loader than this never waited for anything but memory
THREADS = 4
# batches that each worker process makes ahead: torch's own number; the published 4 only takes memory
PREFETCH = 2


def default_providers(device: torch.device) -> tuple[str, ...]:
    """Name what is compared if nothing else is asked for: the reference, fastskel, and on a GPU its fused kernels."""
    fused = ("fastskel-triton", "fastskel-triton-graph") if device.type == "cuda" else ()
    return ("reference", "fastskel", *fused)


@dataclass(frozen=True)
class Job:
    """What is trained, and how long it is looked at.

    Attributes:
        setting: Sizes of model and batch, and who takes part.
        steps: Steps of a turn that are timed.
        workers: Worker processes of the reference.
        threads: Threads of the native loader.
        clips: Clips of an epoch.
        distinct: Clips that the files hold, at least a batch.
        epochs: Epochs of the recipe.
    """

    setting: Setting
    steps: int = 8
    workers: int = 2
    threads: int = 2
    clips: int = NTU_CLIPS
    distinct: int = 2_000
    epochs: int = EPOCHS

    @property
    def lead(self) -> int:
        """Steps at the beginning of a turn that are not timed: as many as the reference's workers make ahead."""
        return PREFETCH * self.workers

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Distinct clips in the order of an epoch, each as often as it is visited, whole batches, (n,)."""
        whole = self.clips // self.setting.batch * self.setting.batch
        return _native.epoch_order(SEED, epoch, self.clips, shuffle=True, num_samples=whole) % self.distinct


def prepared(kind: Kind, train: Any, device: torch.device) -> Callable[[], Tensor]:
    """Return a step that is past what happens once: compiled, its scaler settled, or captured; it gives its loss, ()."""
    if kind.captured:
        return CapturedStep(train.step, train.counter, device)
    train.settle()
    call: Callable[[], Tensor] = getattr(train, "counted", train.step)
    return call


class System(abc.ABC):
    """One way to do the job.

    Attributes:
        kind: The provider.
        train: Its training step.
    """

    def __init__(self, job: Job, kind: Kind) -> None:
        self.kind, self.device = kind, job.setting.device
        self.train: Any = make_step(job.setting, kind)
        self._call: Callable[[], Tensor] | None = None

    def prepare(self) -> None:
        """Compile or capture the step, on the batch that it holds."""
        self._call = prepared(self.kind, self.train, self.device)

    def step(self, batch: Any) -> float:
        """Train on a batch of views (N, ...); returns the loss, for which it waits."""
        assert self._call is not None, "prepare first"
        self.hold(batch)
        return float(self._call())

    @abc.abstractmethod
    def batches(self, count: int) -> Iterator[Any]:
        """Begin to make this many batches of views (N, ...), none of which was made before."""

    @abc.abstractmethod
    def hold(self, batch: Any) -> None:
        """Make views (N, ...) those of the next step; what was captured reads them where it always does."""

    @abc.abstractmethod
    def close(self) -> None:
        """End workers and threads."""


class _Turns:
    """Batches of clip numbers for DataLoader: in each iteration the next `count` of an endless order."""

    def __init__(self, job: Job) -> None:
        self.count = 0
        orders = (job.order(epoch).reshape(-1, job.setting.batch) for epoch in itertools.count())
        self._rows = itertools.chain.from_iterable(order.tolist() for order in orders)

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(self._rows, self.count)


class ReferenceSystem(System):
    """A step of the reference, fed by worker processes over the plain feeder."""

    def __init__(self, job: Job, kind: Kind, dataset: PackedDataset) -> None:
        super().__init__(job, kind)
        path, setting = dataset.path.parent / "buffer.npy", job.setting
        if not path.exists():
            np.save(path, buffer_of(dataset)[0])
        # copy on write: nothing is written, but torch warns of memory that could not be
        feeder = Feeder(np.load(path, mmap_mode="c"), np.asarray(dataset.num_frames), setting.frames, VIEWS)
        self._turns = _Turns(job)
        self._loader = DataLoader(
            feeder, batch_sampler=self._turns, num_workers=job.workers, prefetch_factor=PREFETCH, persistent_workers=True,
            pin_memory=setting.device.type == "cuda",
        )  # fmt: skip

    def batches(self, count: int) -> Iterator[list[Tensor]]:
        """Begin to make this many batches of views, (N, C, T, V, M) each."""
        self._turns.count = count
        for views in self._loader:
            yield [view.to(self.device, non_blocking=True) for view in views]

    def hold(self, batch: list[Tensor]) -> None:
        """Make views (N, C, T, V, M) those of the next step."""
        if self.kind.captured:
            for place, view in zip(self.train.views, batch, strict=True):
                place.copy_(view)
        else:
            self.train.views = batch

    def close(self) -> None:
        """End the worker processes."""
        iterator: Any = self._loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()


class _Visits(Loader):
    """The native loader, whose epochs visit each clip several times."""

    def __init__(self, job: Job, dataset: PackedDataset) -> None:
        setting = job.setting
        super().__init__(
            dataset, views=usdrl_views(setting.frames, num_views=VIEWS), batch_size=setting.batch, seed=SEED,
            num_threads=job.threads, device=setting.device,
        )  # fmt: skip
        self._job = job
        self.num_samples = job.clips // setting.batch * setting.batch

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Clip numbers of an epoch, (num_samples,)."""
        return self._job.order(epoch)


class OwnSystem(System):
    """fastskel's step, fed by its native loader."""

    def __init__(self, job: Job, kind: Kind, dataset: PackedDataset) -> None:
        super().__init__(job, kind)
        self.loader = _Visits(job, dataset)
        if kind.captured:
            # the cached views share one mask, those of a loader have their own
            views = [replace(view, mask=view.mask.clone()) for view in self.train.batch.views]
            self.train.batch = replace(self.train.batch, views=views)

    def batches(self, count: int) -> Iterator[Batch]:
        """Begin to make this many batches of views, (N, T, M, V, C) each."""
        endless = itertools.chain.from_iterable(iter(self.loader) for _ in itertools.count())
        yield from itertools.islice(endless, count)

    def hold(self, batch: Batch) -> None:
        """Make views (N, T, M, V, C) those of the next step."""
        if not self.kind.captured:
            self.train.batch = batch.at(SEED, self.train.counter)
            return
        for place, view in zip(self.train.batch.views, batch.views, strict=True):
            place.clips.copy_(view.clips)
            place.mask.copy_(view.mask)
        self.train.batch.index.copy_(batch.index)

    def close(self) -> None:
        """End the threads."""
        self.loader.close()


def make_systems(job: Job, dataset: PackedDataset) -> tuple[dict[str, System], list[Row]]:
    """Make what takes part on packed clips (T, M, V, C), the reference first; and rows of what cannot run here."""
    systems: dict[str, System] = {}
    rows = []
    for kind, reason in job.setting.kinds():
        if reason is not None:
            rows.append(unavailable_row(kind, reason))
        elif kind.attention is None:
            systems[kind.name] = OwnSystem(job, kind, dataset)
        else:
            systems[kind.name] = ReferenceSystem(job, kind, dataset)
    return systems, rows


def reference_result(setting: Setting, views: list[Tensor] | None = None) -> training.Exact:
    """Return loss and gradients of the reference in float32 on views (N, C, T, V, M), or on the cached ones, without DropPath."""
    exact = ReferenceStep(setting, torch.float32)
    exact.views = views or exact.views
    return training.loss_and_gradients(exact, exact.loss, 1.0)


def hold_one_batch(job: Job, dataset: PackedDataset, systems: Mapping[str, System]) -> training.Exact:
    """Give all systems the same batch of the native loader; return what the reference makes of its views (N, T, M, V, C)."""
    with _Visits(job, dataset) as loader:
        batch = next(iter(loader))
    views = [view.clips.permute(0, 4, 1, 3, 2).contiguous() for view in batch.views]
    for system in systems.values():
        system.hold(batch if isinstance(system, OwnSystem) else views)
    return reference_result(job.setting, views)


def check(setting: Setting, kind: Kind, train: Any, exact: training.Exact) -> Row:
    """Compare a step, without DropPath, with the reference in float32 on the batch that both had.

    Returns:
        Distances of loss and gradients, as fields of a row.
    Raises:
        ValueError: If a distance is larger than rounding explains.
    """
    return training.gate_step(kind.name, train, setting.precision(kind), exact)
