"""Batches in an order and with a content that depend on nothing but their address."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastskel import _native
from fastskel.data.batch import Batch, View
from fastskel.data.engines import Engine, NativeEngine, NumpyEngine, TritonEngine
from fastskel.data.packed import PackedDataset
from fastskel.data.transfer import transferred
from fastskel.data.views import ViewSpec, crop_bounds
from fastskel.philox import integer_weights

__all__ = ["Loader", "num_chunks"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ENGINES = ("native", "numpy", "triton")
# every address has 32 bits of epoch
MAX_EPOCH = 1 << 32
# more threads than this never waited for anything but memory
MAX_DEFAULT_THREADS = 4


def _check(condition: bool, argument: str, contract: str, actual: object, advice: str) -> None:
    if not condition:
        raise ValueError(f"Loader: {argument} must be {contract}, got {actual}. {advice}.")


def _device(device: str | torch.device | None) -> torch.device:
    try:
        chosen = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError):
        chosen = torch.device("meta")
    _check(chosen.type in ("cpu", "cuda"), "device", "the CPU or a CUDA device", repr(device), "Move the batches with Batch.to")
    return chosen


def num_chunks(batch_size: int, chunk: int | None) -> int:
    """Fewest parts that a batch of N samples is cut into so that none has more than `chunk`; None does not cut it.

    The parts differ by at most one sample, the larger ones come first.
    """
    return 1 if chunk is None else -(-batch_size // chunk)


def _padded(parts: list[NDArray[np.int64]], size: int) -> NDArray[np.int64]:
    """Join lists of samples, each but the last filled up to `size` with its last one: engines make parts of one size."""
    filled = (part if len(part) == size else np.pad(part, (0, size - len(part)), mode="edge") for part in parts[:-1])
    return np.concatenate([*filled, parts[-1]])


def _first(views: list[View], rows: int) -> list[View]:
    if len(views[0].clips) == rows:
        return views
    return [replace(view, clips=view.clips[:rows], mask=view.mask[:rows]) for view in views]


class Loader:
    """Batches of views of a packed data set, in a new order every epoch.

    Iterating yields the batches of the current epoch from the current position on; after the last one the epoch
    advances. Order and content are functions of (seed, epoch, position, rank, world_size) alone: any engine on the host,
    any number of threads and any machine gives the same bits, and a loader that loads another's state goes on where that one
    stopped. A second iteration ends the first.

    Rank r takes every `world_size`-th sample of the common order, so all ranks have equally many. Where the number of
    samples does not divide, drop_last leaves the rest out for the epoch; without it the order wraps around, and some
    ranks see a few samples of the beginning a second time (`Batch.index` tells which).

    Columns of the data set come as `Batch.extras`: per clip (N,), per frame (N, T), the nearest frame of the first
    view's crop. Columns of text are left out, tensors cannot hold them.

    Attributes:
        epoch: Current epoch, from 0.
        position: Batches of this epoch that were handed out.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        *,
        views: Sequence[ViewSpec],
        batch_size: int,
        seed: int = 0,
        num_threads: int | None = None,
        dtype: str | torch.dtype = "float32",
        indices: ArrayLike | None = None,
        weights: ArrayLike | Literal["balanced"] | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        engine: Literal["native", "numpy", "triton"] = "native",
        device: str | torch.device | None = None,
    ) -> None:
        """Check the arguments; threads and memory come with the first batch.

        Args:
            dataset: Packed clips, (T, M, V, C) each.
            views: One spec per view of a batch.
            batch_size: N of one rank's batch.
            seed: 64-bit key of the order and of all draws.
            num_threads: Threads that prepare batches ahead; 0 prepares each when it is asked for; None is one for each
                processor that this process may use, at most 4.
            dtype: float32, float16 or bfloat16, for the clips.
            indices: Samples to use, (n,), distinct; None for all.
            weights: An epoch draws n samples with replacement, with odds in these proportions, (n,), one for each of
                `indices`; "balanced" gives every class the same odds. None takes every sample once.
            shuffle: Whether every epoch has an order of its own; else the order of `indices`.
            drop_last: Whether a last, shorter batch is left out.
            rank: This process's number.
            world_size: Number of processes that share an epoch.
            engine: Who makes the views: "native" C++ threads; "numpy", the definition, which takes any transform; or
                "triton", a kernel on `device`, which then holds the whole data set.
            device: Where batches go; None is the host. Copies to a GPU run ahead, from pinned memory.
        Raises:
            ValueError: If an argument is not as described.
        """
        opened = isinstance(dataset, PackedDataset)
        _check(opened, "dataset", "a PackedDataset", type(dataset).__name__, "Open its folder with open_dataset")
        chosen = np.arange(len(dataset)) if indices is None else np.asarray(indices)
        if num_threads is None:
            num_threads = min(_native.available_cpus(), MAX_DEFAULT_THREADS)
        counts = {
            "batch_size": batch_size, "seed": seed, "num_threads": num_threads, "rank": rank, "world_size": world_size,
        }  # fmt: skip
        for argument, value in counts.items():
            _check(isinstance(value, (int, np.integer)), argument, "a whole number", repr(value), "Pass an int")
        listed = isinstance(views, Sequence) and all(isinstance(spec, ViewSpec) for spec in views)
        _check(listed, "views", "a sequence of ViewSpec", repr(views), "Put a single one into a list")
        _check(len(views) > 0, "views", "at least one ViewSpec", "none", "Use eval_view or usdrl_views")
        _check(batch_size >= 1, "batch_size", "at least 1", batch_size, "Choose a size")
        _check(num_threads >= 0, "num_threads", "at least 0", num_threads, "Use 0 to prepare batches inline")
        _check(0 <= seed < 1 << 64, "seed", "in 0 .. 2^64 - 1", seed, "Choose another")
        _check(0 <= rank < world_size, "rank", f"in 0 .. world_size - 1 = {world_size - 1}", rank, "Check the launcher")
        _check(engine in ENGINES, "engine", f"one of {', '.join(ENGINES)}", repr(engine), "Choose one")
        name = str(dtype).removeprefix("torch.")
        _check(name in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", dtype, "Choose one")
        integral = chosen.ndim == 1 and len(chosen) > 0 and np.issubdtype(chosen.dtype, np.integer)
        _check(integral, "indices", "a non-empty list of integers", f"{chosen.dtype} {chosen.shape}", "Check the split")
        inside = bool(chosen.min() >= 0 and chosen.max() < len(dataset))
        bounds = f"{chosen.min()} .. {chosen.max()}"
        _check(inside, "indices", f"in 0 .. {len(dataset) - 1} for {dataset.path}", bounds, "Check the split")
        repeated = len(chosen) - len(np.unique(chosen))
        _check(repeated == 0, "indices", "distinct", f"{repeated} repeated", "Remove the repetitions")
        for spec in views:
            spec.check(dataset)
        self.dataset = dataset
        self.views = tuple(views)
        self.batch_size, self.seed, self.num_threads, self.dtype = batch_size, seed, num_threads, DTYPES[name]
        self.shuffle, self.drop_last, self.rank, self.world_size = shuffle, drop_last, rank, world_size
        self.indices: NDArray[np.int64] = chosen.astype(np.int64)
        self.weights = self._weights(weights)
        self.device = _device(device)
        self.epoch, self.position = 0, 0
        share = len(chosen) // world_size if drop_last else -(-len(chosen) // world_size)
        self.num_samples = share // batch_size * batch_size if drop_last else share
        few = f"{batch_size} for {share} samples" + (f" of rank {rank}" if world_size > 1 else "")
        _check(self.num_samples > 0, "batch_size", "at most the number of samples", few, "Lower it")
        self._columns = self._numeric_columns()
        self._engine = self._choose(engine)
        # number of the newest iteration
        self._iteration = 0

    def _weights(self, weights: ArrayLike | Literal["balanced"] | None) -> NDArray[np.uint64] | None:
        if weights is None:
            return None
        _check(self.shuffle, "shuffle", "True with weights", self.shuffle, "Leave one of them out")
        if isinstance(weights, str):
            _check(weights == "balanced", "weights", "numbers or 'balanced'", repr(weights), "Choose one")
            labels = np.asarray(self.dataset.labels)[self.indices]
            _check(bool(labels.min() >= 0), "labels", "known to balance classes", "some -1", "Choose labelled samples")
            _, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
            weights = 1.0 / counts[place]
        values = np.asarray(weights)
        numbers = values.ndim == 1 and values.dtype.kind in "iuf"
        _check(numbers, "weights", "numbers (n,)", f"{values.dtype} {values.shape}", "Give one for each sample")
        _check(len(values) == len(self.indices), "weights", f"{len(self.indices)}, one per sample", len(values), "Match them")
        return integer_weights(values)

    def _choose(self, engine: str) -> Engine:
        own = (self.dataset, self.views, self.seed, self.dtype)
        if engine == "numpy":
            return NumpyEngine(*own, self.num_threads)
        if engine == "triton":
            return TritonEngine(*own, self.device)
        return NativeEngine(*own, self.num_threads, pinned=self.device.type == "cuda")

    def _numeric_columns(self) -> dict[str, tuple[NDArray[Any], bool]]:
        """Columns by name with whether they are per frame, (sum T,) rather than (n,)."""
        columns = {}
        for name, values in self.dataset.columns.items():
            if values.dtype.kind in "biuf":
                columns[name] = (np.asarray(values), self.dataset.per_frame(name))
        return columns

    def __len__(self) -> int:
        """Batches of one epoch of this rank."""
        return -(-self.num_samples // self.batch_size)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Sample numbers of this rank in one epoch, (num_samples,)."""
        positions = _native.epoch_order(
            self.seed, epoch, len(self.indices), shuffle=self.shuffle, weights=self.weights,
            num_draws=0 if self.weights is None else len(self.indices), rank=self.rank, world_size=self.world_size,
            num_samples=self.num_samples,
        )  # fmt: skip
        return self.indices[positions]

    def batch(self, epoch: int, index: ArrayLike) -> Batch:
        """Make the batch of the given samples (N,) as in the given epoch, on the loader's device: views (N, T, M, V, C).

        Raises:
            ValueError: If the epoch or a number of a sample leaves its range.
        """
        chosen = np.asarray(index)
        integral = chosen.ndim == 1 and chosen.dtype.kind in "iu"
        _check(integral, "index", "integers (N,)", f"{chosen.dtype} {chosen.shape}", "Give numbers of clips")
        inside = not len(chosen) or bool(chosen.min() >= 0 and chosen.max() < len(self.dataset))
        _check(inside, "index", f"in 0 .. {len(self.dataset) - 1}", chosen.tolist(), "Give numbers of clips")
        _check(0 <= epoch < MAX_EPOCH, "epoch", "in 0 .. 2^32 - 1", epoch, "Count from 0")
        samples = np.ascontiguousarray(chosen, np.int64)
        return self._batch(epoch, samples, self._engine.make(epoch, samples)).to(self.device)

    def _batch(self, epoch: int, index: NDArray[np.int64], views: list[View]) -> Batch:
        labels = torch.from_numpy(np.asarray(self.dataset.labels[index], np.int64))
        return Batch(views, labels, torch.from_numpy(np.array(index)), self._extras(epoch, index))

    def _extras(self, epoch: int, index: NDArray[np.int64]) -> dict[str, Tensor]:
        extras = {}
        rows: NDArray[np.int64] | None = None
        for name, (values, per_frame) in self._columns.items():
            if per_frame and rows is None:
                spec, first = self.views[0], self.dataset.offsets[index]
                count = self.dataset.offsets[index + 1] - first
                start, length = crop_bounds(spec.crop, count, seed=self.seed, index=index, epoch=epoch, view=0)
                # the frame that holds the half-pixel centre of each output frame
                centres = (2 * np.arange(spec.frames) + 1) * length[:, None] // (2 * spec.frames)
                rows = (first + start)[:, None] + centres
            extras[name] = torch.from_numpy(np.array(values[rows if per_frame else index]))
        return extras

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the current epoch: batches of views (N, T, M, V, C)."""
        with contextlib.closing(self.steps()) as steps:
            for (whole,) in steps:
                yield from whole

    def steps(self, chunk: int | None = None, passes: int = 1) -> Generator[tuple[Iterator[Batch], ...], None, None]:
        """Yield the rest of the current epoch in pieces, so that no batch is ever whole in memory.

        A batch is cut into the `num_chunks` parts of its rows in order. They are made again for every pass: views are
        functions of their address. What of a batch was not asked for is passed over.

        Args:
            chunk: Most samples n of a part, at least 1; None leaves batches whole.
            passes: How often the parts of a batch come, at least 1.
        Returns:
            For each batch one iterator a pass, to be read one after the other, over its parts: views (n, T, M, V, C).
            The batch counts as handed out with its first part.
        """
        _check(chunk is None or chunk >= 1, "chunk", "at least 1", chunk, "Leave it out for whole batches")
        _check(passes >= 1, "passes", "at least 1", passes, "Ask for one")
        self._turn()
        epoch = self.epoch
        _check(epoch < MAX_EPOCH, "epoch", "below 2^32", epoch, "Start again with another seed")
        self._iteration += 1
        own = self._iteration
        rest = self.order(epoch)[self.position * self.batch_size :]
        size = -(-self.batch_size // num_chunks(self.batch_size, chunk))
        batches = (rest[begin : begin + self.batch_size] for begin in range(0, len(rest), self.batch_size))
        plan = [np.array_split(batch, num_chunks(len(batch), size)) for batch in batches]
        parts = [part for batch in plan for part in batch * passes]
        made = self._engine.stream(epoch, _padded(parts, size), size)
        pieces = (self._batch(epoch, part, _first(views, len(part))) for part, (_, views) in zip(parts, made, strict=False))
        on_device: Iterator[Batch] = pieces
        if isinstance(self._engine, TritonEngine):
            on_device = (piece.to(self.device, non_blocking=True) for piece in pieces)
        elif self.device.type != "cpu":
            on_device = transferred(pieces, self.device)
        try:
            for batch in plan:
                turns = tuple(self._turns(on_device, len(batch), own, counts=turn == 0) for turn in range(passes))
                yield turns
                for _ in itertools.chain(*turns):
                    pass
                self._check_iteration(own)
        finally:
            # in this order: each lets go of what the next one holds
            for part in (on_device, pieces, made):
                if isinstance(part, Generator):
                    part.close()
        self._turn()

    def _turns(self, pieces: Iterator[Batch], number: int, own: int, *, counts: bool) -> Iterator[Batch]:
        """Hand out the next parts, `number` of them, of views (n, T, M, V, C), and keep none."""
        for turn in range(number):
            yield self._next(pieces, own, counts=counts and turn == 0)

    def _next(self, pieces: Iterator[Batch], own: int, *, counts: bool) -> Batch:
        self._check_iteration(own)
        piece = next(pieces, None)
        if piece is None:
            raise RuntimeError("Loader: iterations must end before the loader is closed, got one that goes on. Begin again.")
        self.position += counts
        return piece

    def _check_iteration(self, own: int) -> None:
        if own != self._iteration:
            raise RuntimeError(
                "Loader: iterations must follow one another, got two at once, or a state that was loaded in between. "
                "Make a second loader, or iterate again."
            )

    def close(self) -> None:
        """Stop the threads and give back the memory; batches (N, T, M, V, C) that were handed out stay."""
        self._engine.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _turn(self) -> None:
        """Begin the next epoch once every batch of this one was handed out."""
        if self.position >= len(self):
            self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands: the next batch is the one after the last handed out, (N, T, M, V, C) per view."""
        done = self.position >= len(self)
        position = {"epoch": self.epoch + done, "position": 0 if done else self.position}
        return position | self._meaning()

    def _meaning(self) -> dict[str, int]:
        names = ("seed", "batch_size", "world_size")
        return {name: int(getattr(self, name)) for name in names} | {"num_indices": len(self.indices)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where another loader of the same data and arguments stood; an iteration that runs is over.

        Raises:
            ValueError: If the state belongs to another seed, batch size, world size or number of samples.
        """
        _check(isinstance(state, dict), "state_dict", "a dictionary", repr(state), "Use an intact checkpoint")
        for name, value in self._meaning().items():
            same = state.get(name) == value
            advice = "Resume with the same arguments"
            _check(same, f"state_dict[{name!r}]", f"the loader's {value}", state.get(name), advice)
        epoch, position = (state.get(name, -1) for name in ("epoch", "position"))
        whole = all(isinstance(value, (int, np.integer)) for value in (epoch, position))
        inside = whole and 0 <= epoch < MAX_EPOCH and 0 <= position < len(self)
        contract = f"an epoch and a position below {len(self)}"
        _check(inside, "state_dict", contract, (epoch, position), "Use an intact checkpoint")
        self.epoch, self.position = int(epoch), int(position)
        self._iteration += 1
