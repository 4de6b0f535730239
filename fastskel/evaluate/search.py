r"""Exact search of the most similar rows, in blocks: the matrix of all similarities is never formed.

Similarities are products of unit vectors in float64, rounded to multiples of 2^-30: finer than what float32 features
resolve, coarser than what the summation order changes, so that equal vectors are equal wherever they stand in a block.
A similarity s of gallery row i becomes the integer round(s 2^30) 2^32 + (2^32 - 1 - i). These keys are unique and in
the order of neighbours: larger similarity first, lower gallery row first among equals. Block sizes, threads and the
first pass therefore cannot change a result. A zero vector has similarity 0 with everything.

Most of the work is a first pass in a short type (see `first_pass`), whose error is bounded: every row that may be among the
k nearest is kept, and only those are multiplied in float64. Where the bound keeps too many, as among near-duplicates, the
block is searched in the next longer type, and at last in float64, which needs no bound; so are the blocks after it.
On a GPU a Triton kernel may go first (see `kernel_pass`): queries for which it proves nothing are searched in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastskel.evaluate.first_pass import FirstPass, fastest_pass
from fastskel.evaluate.kernel_pass import MEASURED, KernelPass
from fastskel.evaluate.unit_rows import UnitRows, values_at_once
from fastskel.nn.kernel_choice import KernelChoice, choose_kernels

__all__ = ["FIRST_PASSES", "LOWEST", "CosineSearch", "rows_of", "similarities_of", "steps_of"]

FIRST_PASSES = ("bf16", "fp32", "fp64")
# what float32 unit vectors resolve is 2^-24; float64 products of them are good to about 2^-50
SCALE = 2**30
LOW = 2**32
LOWEST = torch.iinfo(torch.int64).min
# gallery rows per block for each query of a block: normalising a block must cost little beside multiplying it
GALLERY_BLOCK = 4
# a smaller gallery is multiplied in float64 before a first pass has been made ready
LEAST_ROWS = 2048
# pairs per query that are multiplied in float64 one by one: beyond it a longer first pass costs less
LEAST_PAIRS, PAIRS_PER_NEIGHBOUR, ROWS_PER_PAIR = 32, 4, 256
# queries of a block, and their share, that the kernel may prove nothing for: beyond both another first pass costs less
MOST_UNPROVEN, UNPROVEN_SHARE = 8, 1 / 16
# values of a block of full rankings
RANKED_VALUES = 2**23


def _keys(similarity: Tensor, rows: Tensor) -> Tensor:
    """Keys of similarities, which are overwritten, with gallery rows; any shape."""
    return similarity.mul_(SCALE).round_().to(torch.int64).mul_(LOW).add_(LOW - 1 - rows)


def rows_of(keys: Tensor) -> Tensor:
    """Gallery rows of keys, (...,) each."""
    return LOW - 1 - (keys & (LOW - 1))


def steps_of(keys: Tensor) -> Tensor:
    """Similarities of keys in steps of 2^-30, (...,) int64 each."""
    return keys >> 32


def similarities_of(keys: Tensor) -> Tensor:
    """Similarities of keys, (...,) float64 each."""
    return steps_of(keys).to(torch.float64) / SCALE


class CosineSearch:
    """A gallery made ready to be searched, several times if need be.

    Beside the features it holds their rounded copy, of half their size in bf16, and blocks.

    Args:
        gallery: Features, (N, F).
        block_rows: Queries multiplied at a time, with four times as many gallery rows; bounds memory, not results.
        device: Where the products run.
        first_pass: "bf16", "fp32" or "fp64", which rounds nothing. By default bf16 on a CPU that multiplies it in hardware,
            else fp32; fp64 for a small gallery.
        kernels: "triton" lets the kernel go first, on a GPU and for up to 25 neighbours; "torch" does not; "auto" does where it
            was measured to win, if the gallery is not small and no first pass is named.
        function: Who searches, for errors.
        name: What the gallery is called there.
    Raises:
        ValueError: On type, shape, rows that are not finite, and settings.
    """

    def __init__(
        self,
        gallery: Tensor,
        *,
        block_rows: int = 1024,
        device: torch.device | str = "cpu",
        first_pass: str | None = None,
        kernels: KernelChoice = "auto",
        function: str = "CosineSearch",
        name: str = "gallery",
    ) -> None:
        where = torch.device(device)
        if block_rows < 1:
            raise ValueError(f"{function}: block_rows must be at least 1, got {block_rows}. Leave it at its default.")
        if first_pass is not None and first_pass not in FIRST_PASSES:
            raise ValueError(f"{function}: first_pass must be one of {FIRST_PASSES}, got {first_pass!r}. Leave it out.")
        if first_pass == "bf16" and where.type != "cpu":
            # the libraries of GPUs may add parts of a bf16 product in bf16, which no bound here covers
            raise ValueError(f"{function}: first_pass must be 'fp32' or 'fp64' on {where}, got 'bf16'. Leave it out.")
        if len(gallery) == 0:
            raise ValueError(f"{function}: {name} must have rows, got none. Check the split.")
        if len(gallery) >= LOW:
            raise ValueError(f"{function}: {name} must have fewer than 2**32 rows, got {len(gallery)}. Use a subset.")
        self.function, self.name, self.block_rows, self.device = function, name, block_rows, where
        self.gallery = UnitRows(function, name, gallery, where)
        chosen = first_pass or ("fp64" if len(gallery) < LEAST_ROWS else fastest_pass(where))
        self.rungs = list(FIRST_PASSES[FIRST_PASSES.index(chosen) :])
        self._pass: FirstPass | None = None
        if kernels == "auto" and (first_pass is not None or chosen == "fp64"):
            kernels = "torch"
        self.kernels = choose_kernels(kernels, where, torch.bfloat16, MEASURED)
        self._kernel_pass: KernelPass | None = None

    def __len__(self) -> int:
        return len(self.gallery)

    def _queries(self, queries: Tensor, name: str) -> UnitRows:
        rows = UnitRows(self.function, name, queries, self.device)
        if rows.shape[1] != self.gallery.shape[1]:
            raise ValueError(
                f"{self.function}: {name} must have the width of {self.name}, got {rows.shape[1]} and {self.gallery.shape[1]}. "
                "Extract both with the same encoder."
            )
        return rows

    def nearest(self, queries: Tensor, k: int, *, name: str = "queries") -> Tensor:
        """Find the k gallery rows of largest cosine similarity to each query.

        Args:
            queries: Features, (B, F); B may be 0.
            k: Neighbours of each, 1..N.
            name: What the queries are called in errors.
        Returns:
            Keys, (B, k), int64, falling, on the device: see `similarities_of` and `rows_of`.
        Raises:
            ValueError: On type, shape, rows that are not finite, and k.
        """
        if not 1 <= k <= len(self):
            raise ValueError(f"{self.function}: k must lie in 1..{len(self)} (rows to search), got {k}. Lower k.")
        rows = self._queries(queries, name)
        top = torch.empty(len(rows), k, dtype=torch.int64, device=self.device)
        # the kernel leaves no block of similarities, and wants many queries
        step = self.block_rows * (GALLERY_BLOCK if self._kernel_serves(k) else 1)
        for begin in range(0, len(rows), step):
            part = slice(begin, begin + step)
            top[part] = self._block(rows[part], k)
        return top

    def ranked(self, queries: Tensor, *, name: str = "queries") -> Iterator[tuple[slice, Tensor]]:
        """Rank the whole gallery for each query, block after block.

        Args:
            queries: Features, (B, F).
            name: What the queries are called in errors.
        Yields:
            A slice of b queries, and their keys, (b, N), int64, falling, on the device.
        Raises:
            ValueError: On type, shape, and rows that are not finite.
        """
        rows = self._queries(queries, name)
        step = max(1, min(self.block_rows, RANKED_VALUES // len(self)))
        for begin in range(0, len(rows), step):
            part = slice(begin, min(begin + step, len(rows)))
            units = rows[part]
            keys = torch.empty(len(units), len(self), dtype=torch.int64, device=self.device)
            for block, found in self._products(units):
                keys[:, block] = found
            yield part, _falling(keys)

    def _block(self, units: Tensor, k: int) -> Tensor:
        """Keys of the k nearest of unit vectors (b, F): (b, k)."""
        if self._kernel_serves(k):
            keys = self._by_kernel(units, k)
            if keys is not None:
                return keys
            # the next block would leave as many
            self.kernels, self._kernel_pass = "torch", None
            return torch.cat([self._block(part, k) for part in torch.split(units, self.block_rows)])
        while self.rungs[0] != "fp64" and k <= FirstPass.reach(len(self), GALLERY_BLOCK * self.block_rows):
            if self._pass is None:
                self._pass = FirstPass(self.gallery, self.rungs[0], GALLERY_BLOCK * self.block_rows)
            limit = len(units) * max(LEAST_PAIRS, PAIRS_PER_NEIGHBOUR * k, len(self) // ROWS_PER_PAIR)
            pairs = self._pass.candidates(units, k, limit)
            if pairs is not None:
                return self._select(units, *pairs, k)
            # the next block would keep too many as well
            self._pass = None
            self.rungs.pop(0)
        return self._in_float64(units, k)

    def _kernel_serves(self, k: int) -> bool:
        return self.kernels == "triton" and KernelPass.serves(k, len(self))

    def _by_kernel(self, units: Tensor, k: int) -> Tensor | None:
        """Keys (b, k) of the k nearest of unit vectors (b, F); None if the kernel proves too few of them."""
        if self._kernel_pass is None:
            self._kernel_pass = KernelPass(self.gallery)
        query, row, ceiling = self._kernel_pass.near(units, k)
        keys = self._select(units, query, row, k)
        (left,) = torch.where(similarities_of(keys[:, -1]) < ceiling)
        if len(left) > max(MOST_UNPROVEN, UNPROVEN_SHARE * len(units)):
            return None
        if len(left):
            keys[left] = self._in_float64(units[left], k)
        return keys

    def _in_float64(self, units: Tensor, k: int) -> Tensor:
        """Keys (b, k) of the k nearest of unit vectors (b, F) by products of all of them."""
        top = torch.full((len(units), k), LOWEST, dtype=torch.int64, device=self.device)
        for _, keys in self._products(units):
            nearest = keys.topk(min(k, keys.shape[1]), dim=1).values
            top = torch.cat([top, nearest], 1).topk(k, dim=1).values
        return top

    def _products(self, units: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield keys of unit vectors (b, F) with blocks of the gallery, (b, n)."""
        step = GALLERY_BLOCK * self.block_rows
        for begin in range(0, len(self), step):
            block = slice(begin, min(begin + step, len(self)))
            yield block, _keys(units @ self.gallery[block].T, torch.arange(block.start, block.stop, device=self.device))

    def _select(self, units: Tensor, query: Tensor, row: Tensor, k: int) -> Tensor:
        """Keys (b, k) of the k nearest among pairs (P,), at least k for each of the unit vectors (b, F)."""
        similarity = torch.empty(len(row), dtype=torch.float64, device=self.device)
        step = max(1, values_at_once(self.device) // units.shape[1])
        for begin in range(0, len(row), step):
            part = slice(begin, begin + step)
            similarity[part] = self.gallery[row[part]].mul_(units[query[part]]).sum(1)
        keys = _keys(similarity, row)
        order = keys.argsort(descending=True)
        order = order[query[order].argsort(stable=True)]
        first = torch.searchsorted(query[order], torch.arange(len(units) + 1, device=self.device))
        assert int(first.diff().min()) >= k, "the bound of the first pass left out neighbours"
        first = first[:-1]
        return keys[order][first[:, None] + torch.arange(k, device=self.device)]


def _falling(keys: Tensor) -> Tensor:
    if keys.device.type != "cpu":
        return keys.sort(dim=1, descending=True).values
    # numpy sorts integers with vector instructions, in place; ~ reverses the order
    inverted = keys.bitwise_not_().numpy()
    inverted.sort(axis=1)
    return torch.from_numpy(np.invert(inverted, out=inverted))
