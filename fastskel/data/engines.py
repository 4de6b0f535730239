"""Who makes the views of a batch: native code, NumPy (the definition), or a Triton kernel on the data set's own device."""

from __future__ import annotations

import abc
import itertools
import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from fastskel import _native
from fastskel.data.batch import View
from fastskel.data.packed import PackedDataset
from fastskel.data.program import view_program, view_programs
from fastskel.data.views import ViewSpec, make_view
from fastskel.kernels._backend import INTERPRETED
from fastskel.kernels.augment import augment_views, view_tables

__all__ = ["Engine", "NativeEngine", "NumpyEngine", "TritonEngine", "clips_of", "is_whole_file"]

Index = NDArray[np.int64]
# batches that native threads make ahead, beside the one in use
DEPTH = 2


class Engine(abc.ABC):
    """Makes views (N, T, M, V, C) of a data set; what it makes depends on nothing but its arguments."""

    @abc.abstractmethod
    def make(self, epoch: int, index: Index) -> list[View]:
        """Make the views of some clips (N,), one per spec, now."""

    @abc.abstractmethod
    def stream(self, epoch: int, order: Index, batch_size: int) -> Iterator[tuple[Index, list[View]]]:
        """Make the views of all clips of `order`, batch by batch of N clips, ahead of their use."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give back threads and memory; views that were handed out stay."""


def _plan(order: Index, batch_size: int) -> list[Index]:
    return [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]


class NumpyEngine(Engine):
    """`make_view` in Python threads: the definition, and the way to transforms that native code does not know."""

    def __init__(
        self, dataset: PackedDataset, views: Sequence[ViewSpec], seed: int, dtype: torch.dtype, num_threads: int
    ) -> None:
        # views of a plain array: slicing a memory map clip by clip costs more than the clip
        self.dataset = replace(dataset, frames=np.asarray(dataset.frames))
        self.views, self.seed, self.dtype, self.num_threads = tuple(views), seed, dtype, num_threads

    def make(self, epoch: int, index: Index) -> list[View]:
        """Make views (N, T, M, V, C) of clips (N,)."""
        made = (make_view(self.dataset, spec, index, self.seed, epoch, w) for w, spec in enumerate(self.views))
        return [replace(view, clips=view.clips.to(self.dtype)) for view in made]

    def close(self) -> None:
        """Do nothing: threads end with their iteration."""

    def stream(self, epoch: int, order: Index, batch_size: int) -> Iterator[tuple[Index, list[View]]]:
        """Make views (N, T, M, V, C) of clips (n,) in order."""
        plan = _plan(order, batch_size)
        if self.num_threads == 0:
            for index in plan:
                yield index, self.make(epoch, index)
            return
        pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="fastskel-loader")
        ahead: deque[tuple[Index, Future[list[View]]]] = deque()
        try:
            for index in plan:
                ahead.append((index, pool.submit(self.make, epoch, index)))
                # one batch more than threads waits, so that no thread idles while the caller computes
                if len(ahead) > self.num_threads + 1:
                    first, future = ahead.popleft()
                    yield first, future.result()
            while ahead:
                first, future = ahead.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def is_whole_file(dataset: PackedDataset) -> bool:
    """Say whether the clips (T, M, V, C) are those of the folder's files: a memory map may be a part of them, or a copy."""
    frames, folder = dataset.frames, dataset.path.resolve()
    path, offsets = folder / "frames.npy", folder / "offsets.npy"
    if not isinstance(frames, np.memmap) or frames.filename is None or Path(frames.filename) != path:
        return False
    if not path.is_file() or not offsets.is_file():
        return False
    try:
        same = npy.open_memmap(path, mode="r").shape == frames.shape and frames.flags.c_contiguous
        return same and np.array_equal(np.load(offsets), dataset.offsets)
    except (OSError, ValueError):
        # damaged since they were opened: native code says how
        return True


def clips_of(dataset: PackedDataset) -> _native.Clips:
    """Open the clips (T, M, V, C) for native code: their files where they are mapped, else the arrays themselves."""
    if is_whole_file(dataset):
        return _native.Clips.open(os.fspath(dataset.path / "frames.npy"), os.fspath(dataset.path / "offsets.npy"))
    frames = np.ascontiguousarray(dataset.frames, np.float32)
    return _native.Clips.borrow(frames, np.ascontiguousarray(dataset.offsets, np.int64))


class NativeEngine(Engine):
    """C++ threads that write into a ring of batches, allocated once.

    A batch that its consumer keeps stays his; the ring then takes new memory for the next one.
    """

    def __init__(
        self, dataset: PackedDataset, views: Sequence[ViewSpec], seed: int, dtype: torch.dtype, num_threads: int,
        *, pinned: bool = False,
    ) -> None:  # fmt: skip
        self.dataset, self.dtype, self.num_threads = dataset, dtype, num_threads
        name: Any = str(dtype).removeprefix("torch.")
        self.makers = _native.ViewMakers(clips_of(dataset), view_programs(views, dataset), seed=seed, dtype=name)
        self._stream: _native.BatchStream | None = None
        self._pins = Pins() if pinned else None
        if self._pins is not None:
            # memory that is freed while the driver knows it cannot be pinned again
            weakref.finalize(self, self._pins.release)
        self._process = os.getpid()
        self._turns = 0
        # of a batch in the ring
        self._rows = 0

    def make(self, epoch: int, index: Index) -> list[View]:
        """Make views (N, T, M, V, C) of clips (N,)."""
        try:
            return self._views(self.makers.make(epoch, index))
        except _native.NativeError as error:
            raise self._named(error) from None

    def stream(self, epoch: int, order: Index, batch_size: int) -> Iterator[tuple[Index, list[View]]]:
        """Make views (N, T, M, V, C) of clips (n,) in order."""
        stream = self._open(batch_size)
        self._turns += 1
        turn = self._turns
        try:
            stream.start(epoch, np.ascontiguousarray(order), 0)
            for expected in _plan(order, batch_size):
                made = stream.next()
                # stopped by somebody else, which the loader sees by the batches that are missing
                if made is None:
                    return
                views, index, _ = made
                # another thread began an iteration: one of the two has a batch of the other
                if turn != self._turns or not np.array_equal(index, expected):
                    raise RuntimeError("Loader: iterations must follow one another, got two at once. Make a second loader.")
                if self._pins is not None:
                    self._pins.add(views[0][0].ctypes.data, stream.slot_bytes)
                yield index, self._views(views)
        except _native.NativeError as error:
            raise self._named(error) from None
        finally:
            # a later iteration may have taken the ring over, and a process that was forked off has no part in it
            if turn == self._turns and self._process == os.getpid():
                stream.stop()

    def _open(self, batch_size: int) -> _native.BatchStream:
        """Return the ring for batches of N clips; a process that was forked off makes its own."""
        if self._rows != batch_size:
            self.close()
        if self._stream is None or self._process != os.getpid():
            self._stream = _native.BatchStream(
                self.makers, batch_size=batch_size, num_threads=self.num_threads, depth=DEPTH, keep=self._pins is not None
            )
            self._process, self._rows = os.getpid(), batch_size
        return self._stream

    def close(self) -> None:
        """Stop the threads."""
        if self._stream is not None and self._process == os.getpid():
            if self._pins is not None:
                self._pins.release()
            self._stream.close()
        self._stream = None

    def _views(self, made: list[tuple[NDArray[np.generic], NDArray[np.bool_]]]) -> list[View]:
        return [View(self._tensor(clips), torch.from_numpy(mask), self.dataset.topology) for clips, mask in made]

    def _tensor(self, clips: NDArray[np.generic]) -> Tensor:
        # NumPy has no bfloat16: its bits come as whole numbers
        values = torch.from_numpy(clips)
        return values.view(self.dtype) if self.dtype == torch.bfloat16 else values

    def _named(self, error: _native.NativeError) -> ValueError:
        where = f"clip {error.clip} ({self.dataset.names[error.clip]}) of " if error.clip >= 0 else ""
        return ValueError(f"{error} At {where}{self.dataset.path}.")


class Pins:
    """Memory that a GPU's driver knows, so that copies from it run beside other work."""

    def __init__(self) -> None:
        self._known: set[int] = set()
        self._process = os.getpid()

    def add(self, address: int, size: int) -> None:
        """Pin `size` bytes at an address; nothing is done where they are."""
        if address not in self._known:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, size, 0))  # type: ignore[no-untyped-call]
            self._known.add(address)

    def release(self) -> None:
        """Undo it, before the memory is freed, when no copy reads it any more."""
        # a process that was forked off has no part in it
        if not self._known or self._process != os.getpid():
            return
        torch.cuda.synchronize()
        while self._known:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._known.pop()))  # type: ignore[no-untyped-call]


class TritonEngine(Engine):
    """A kernel that makes the views where the data set lies: on the device, whole."""

    def __init__(
        self, dataset: PackedDataset, views: Sequence[ViewSpec], seed: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if device.type != "cuda" and not INTERPRETED:
            raise ValueError(f'Loader: device must be a GPU with engine="triton", got {device}. Use engine="native".')
        self.topology, self.seed, self.dtype, self.device = dataset.topology, seed, dtype, device
        self.frames = torch.from_numpy(np.array(dataset.frames)).to(device)
        self.offsets = torch.from_numpy(np.array(dataset.offsets)).to(device)
        # neighbours that agree are made in one launch
        self.groups = [
            (view_tables(view_program(spec, dataset), self.frames, self.offsets), len(list(same)))
            for spec, same in itertools.groupby(views)
        ]

    def make(self, epoch: int, index: Index) -> list[View]:
        """Make views (N, T, M, V, C) of clips (N,)."""
        return self._made(epoch, torch.from_numpy(index).to(self.device))

    def _made(self, epoch: int, index: Tensor) -> list[View]:
        views: list[View] = []
        for tables, count in self.groups:
            clips, mask = augment_views(
                self.frames, self.offsets, index, tables, count, len(views), self.seed, epoch, self.dtype
            )
            views += [View(*made, self.topology) for made in zip(clips, mask, strict=True)]
        return views

    def stream(self, epoch: int, order: Index, batch_size: int) -> Iterator[tuple[Index, list[View]]]:
        """Make views (N, T, M, V, C) of clips (n,) in order."""
        # one copy for the epoch, not one for each batch
        moved = torch.from_numpy(order).to(self.device)
        for index, here in zip(_plan(order, batch_size), torch.split(moved, batch_size), strict=True):
            yield index, self._made(epoch, here)

    def close(self) -> None:
        """Do nothing: the data set leaves the device with the engine."""
