"""Views for code that is written around `torch.utils.data.DataLoader`: one sample at a time, in the field's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastskel.data.engines import NativeEngine, is_whole_file
from fastskel.data.packed import PackedDataset
from fastskel.data.views import ViewSpec

__all__ = ["ClipDataset"]

# axes of (T, M, V, C) in the order of each layout
LAYOUTS = {"CTVM": (3, 0, 2, 1), "TMVC": (0, 1, 2, 3)}


class ClipDataset(torch.utils.data.Dataset[tuple[Tensor, ...]]):
    """Samples of a packed data set, made by native code in the process that asks.

    An item is a tuple of its W views, (C, T, V, M) each, as the published pretraining code feeds them; with `labels` the class
    comes last. What is drawn is a function of (seed, clip, epoch, view), as in `Loader`: an item has the same bits there, and
    in any worker process. Call `set_epoch` before every epoch, or each gets the same views; worker processes that persist
    follow it too.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        *,
        views: Sequence[ViewSpec],
        seed: int = 0,
        indices: ArrayLike | None = None,
        layout: Literal["CTVM", "TMVC"] = "CTVM",
        labels: bool = False,
    ) -> None:
        """Check the views against the clips (T, M, V, C).

        Args:
            dataset: Packed clips; worker processes that are spawned map its frames again.
            views: One spec per view of an item.
            seed: 64-bit key of all draws.
            indices: Clips to use, (n,); None for all.
            layout: Order of a view's axes, "CTVM" or "TMVC".
            labels: Whether an item ends with its class, (), int64, -1 where unknown.
        Raises:
            ValueError: If an argument does not fit the data set.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"ClipDataset: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}. Choose one.")
        given: object = dataset
        if not isinstance(given, PackedDataset):
            kind = type(given).__name__
            raise ValueError(f"ClipDataset: dataset must be a PackedDataset, got {kind}. Open its folder with open_dataset.")
        if not isinstance(views, Sequence) or not views or not all(isinstance(spec, ViewSpec) for spec in views):
            raise ValueError(f"ClipDataset: views must be at least one ViewSpec, got {views!r}. Use usdrl_views or eval_view.")
        if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 1 << 64:
            raise ValueError(f"ClipDataset: seed must be in 0 .. 2^64 - 1, got {seed!r}. Give a whole number.")
        chosen = np.arange(len(dataset)) if indices is None else np.asarray(indices)
        if chosen.ndim != 1 or chosen.dtype.kind not in "iu" or (chosen.size and not _inside(chosen, len(dataset))):
            raise ValueError(
                f"ClipDataset: indices must be integers (n,) in 0 .. {len(dataset) - 1} for {dataset.path}, got {chosen.dtype} "
                f"{chosen.shape}. Check the split."
            )
        for spec in views:
            spec.check(dataset)
        self.dataset, self.views, self.seed = dataset, tuple(views), seed
        self.indices: NDArray[np.int64] = chosen.astype(np.int64)
        self.layout, self.labels = layout, labels
        # in shared memory: worker processes that persist see what is written to it later
        with torch.inference_mode(False):
            self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()  # type: ignore[no-untyped-call]
        self._engine = self._open()

    def _open(self) -> NativeEngine:
        return NativeEngine(self.dataset, self.views, self.seed, torch.float32, 0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the views (C, T, V, M) of another epoch from now on, below 2^32."""
        if not isinstance(epoch, (int, np.integer)) or not 0 <= epoch < 1 << 32:
            raise ValueError(f"ClipDataset.set_epoch: epoch must be in 0 .. 2^32 - 1, got {epoch!r}. Count from 0.")
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Tensor, ...]:
        clip = int(self.indices[item])
        views = self._engine.make(int(self._epoch), np.array([clip], np.int64))
        order = LAYOUTS[self.layout]
        made = tuple(view.clips[0].permute(order).contiguous() for view in views)
        return (*made, torch.tensor(int(self.dataset.labels[clip]), device="cpu")) if self.labels else made

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "_engine"}
        state["mapped"] = is_whole_file(self.dataset)
        # a memory map would travel with all it maps; the rest may be the user's own, not that of the files
        if state["mapped"]:
            state["dataset"] = replace(self.dataset, frames=np.empty((0, *self.dataset.frames.shape[1:]), np.float32))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        mapped = state.pop("mapped")
        self.__dict__.update(state)
        if mapped:
            frames = npy.open_memmap(self.dataset.path / "frames.npy", mode="r")
            self.dataset = replace(self.dataset, frames=frames)
        self._engine = self._open()


def _inside(indices: NDArray[Any], num: int) -> bool:
    return bool(indices.min() >= 0 and indices.max() < num)
