"""Stochastic depth whose draws have addresses, and whose dropped work is left out."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastskel import philox
from fastskel.kernels.philox import philox_words

__all__ = [
    "DROP_PATH_MODES",
    "NO_DROPS",
    "NUM_DROP_PATHS",
    "DropPathMode",
    "LayerDrops",
    "drop_path_kept",
    "drop_path_scales",
    "masked_drops",
    "skipped_drops",
]

# residual branches of one dense spatio-temporal layer, in the order their draws are numbered:
# CA attention, CA MLP, then attention and MLP of the shifted branch, then of the plain branch
NUM_DROP_PATHS = 6
CA_ATTENTION, CA_MLP, SHIFTED_ATTENTION, SHIFTED_MLP, PLAIN_ATTENTION, PLAIN_MLP = range(NUM_DROP_PATHS)

DropPathMode = Literal["skip", "mask"]
DROP_PATH_MODES: tuple[DropPathMode, ...] = ("skip", "mask")


class LayerDrops(NamedTuple):
    """What one layer does to each of its residual branches, in their order.

    Attributes:
        rows: Samples that are computed, (n,) int64 on the device, or None for all.
        inner: Where the rows of CA's attention lie among those of its MLP, (n,); None if they are the same.
        factors: What each branch is multiplied with: one number, or with masks (N, 1, 1) float64.
        bias: Factor of the second linear's bias, summed over both dense shift branches: one number, or (N, 1, 1) float64.
        slots: The inverse of `rows`: where each sample lies among those that are computed, (N,) int32, -1 if it is not;
            for fused kernels.
        scales: `factors` and `bias` as fused kernels read them, (7, N) float32, where one of them is not one number.
    """

    rows: tuple[Tensor | None, ...]
    inner: Tensor | None
    factors: tuple[float | Tensor, ...]
    bias: float | Tensor
    slots: tuple[Tensor | None, ...] = (None,) * NUM_DROP_PATHS
    scales: Tensor | None = None

    def scale(self, call: int) -> tuple[float, Tensor | None]:
        """Return what a branch is multiplied with, as a number, and as a tensor (N,) to multiply it with where it is none."""
        factor = self.factors[call]
        if isinstance(factor, Tensor):
            assert self.scales is not None
            return 1.0, self.scales[call]
        return factor, None

    def bias_scale(self) -> tuple[float, Tensor | None]:
        """As `scale` (N,), for the bias of the second linear."""
        if isinstance(self.bias, Tensor):
            assert self.scales is not None
            return 1.0, self.scales[NUM_DROP_PATHS]
        return self.bias, None

    def part(self, begin: int, end: int) -> LayerDrops:
        """Plan for samples from `begin` to before `end` of these (N, S, D) alone, on the host; not for fused kernels."""

        def sliced(factor: float | Tensor) -> float | Tensor:
            return factor[begin:end] if isinstance(factor, Tensor) else factor

        # where each list has the samples; they are in order
        ends = torch.tensor([begin, end])
        places = [(begin, end) if rows is None else torch.searchsorted(rows, ends).tolist() for rows in self.rows]
        rows = tuple(
            None if rows is None else rows[first:last] - begin for rows, (first, last) in zip(self.rows, places, strict=True)
        )
        first, last = places[CA_ATTENTION]
        inner = None if self.inner is None else self.inner[first:last] - places[CA_MLP][0]
        return LayerDrops(rows, inner, tuple(map(sliced, self.factors)), sliced(self.bias))


# nothing of any sample is dropped
NO_DROPS = LayerDrops((None,) * NUM_DROP_PATHS, None, (1.0,) * NUM_DROP_PATHS, 2.0)


def drop_path_kept(
    rate: float, num_calls: int, *, seed: int, step: int, index: Tensor, view: Tensor
) -> NDArray[np.bool_]:
    """Draw which residual branches are kept for each sample.

    Args:
        rate: Probability that a branch is dropped, in [0, 1).
        num_calls: Branches drawn for, numbered in the order of the encoder's layers.
        seed: Philox key.
        step: Optimiser step.
        index: Global sample index of each row, (N,), on the host.
        view: View number of each row, (N,), on the host.
    Returns:
        Whether each branch is kept, (N, num_calls).
    Raises:
        ValueError: If rate is outside [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"drop_path_kept: rate must be in [0, 1), got {rate}. Choose a smaller rate.")
    drawn = philox.uniform(philox.words(seed, index.numpy(), step, view.numpy(), philox.Use.DROP_PATH, num_calls))
    # floor(keep + u) of the reference is 1 exactly where u >= rate
    kept: NDArray[np.bool_] = drawn >= np.float32(rate)
    return kept


def drop_path_scales(
    rate: float, num_calls: int, *, seed: int | Tensor, step: int | Tensor, index: Tensor, view: Tensor
) -> Tensor:
    """Draw what each residual branch is multiplied with, where the addresses are; the draws are those of `drop_path_kept`.

    Args:
        rate: Probability that a branch is dropped, in [0, 1).
        num_calls: Branches drawn for.
        seed: Philox key, or a tensor ().
        step: Optimiser step, or a tensor ().
        index: Global sample index of each row, (N,).
        view: View number of each row, (N,).
    Returns:
        0 or 1 / (1 - rate), (N, num_calls), float64.
    """
    words = philox_words(index, view, seed, step, int(philox.Use.DROP_PATH), num_calls)
    drawn = (words >> 8).to(torch.float32) * 2.0**-24
    # compared as the host compares: with the rate in float32
    scales: Tensor = (drawn >= float(np.float32(rate))).to(torch.float64) / (1.0 - rate)
    return scales


def masked_drops(scales: Tensor) -> list[LayerDrops]:
    """Plan layers that compute every sample and multiply: one plan for each of `scales` (N, layers, 6)."""
    bias = scales[..., SHIFTED_MLP] + scales[..., PLAIN_MLP]
    rows = torch.cat([scales, bias[..., None]], -1).permute(1, 2, 0).to(torch.float32).contiguous()
    plans = []
    for layer in range(scales.shape[1]):
        factors = tuple(scales[:, layer, call, None, None] for call in range(NUM_DROP_PATHS))
        plan = LayerDrops((None,) * NUM_DROP_PATHS, None, factors, bias[:, layer, None, None], scales=rows[layer])
        plans.append(plan)
    return plans


def skipped_drops(
    kept: NDArray[np.bool_], rate: float, device: torch.device, *, slots: bool = True
) -> list[LayerDrops]:
    """Plan layers that compute the kept samples only, so that shapes depend on the draws.

    Args:
        kept: Whether each branch of each layer is kept, (N, layers, 6), on the host.
        rate: The rate it was drawn with.
        device: Where the tokens are.
        slots: Whether the plans are for fused kernels too.
    Returns:
        One plan for each layer; every branch adds up to what it does under `masked_drops`.
    """
    factor = 1.0 / (1.0 - rate)
    lists = [_indices(kept[:, layer]) for layer in range(kept.shape[1])]
    # one copy to the device for all layers
    flat = [rows for plan in lists for rows in plan if rows is not None]
    packed = torch.from_numpy(np.concatenate([*flat, np.zeros(0, np.int64)])).to(device, non_blocking=True)
    parts = iter(torch.split(packed, [len(rows) for rows in flat]))
    places = None
    if slots:
        places = torch.from_numpy(np.stack([_places(plan, len(kept)) for plan in lists])).to(device, non_blocking=True)
    plans = []
    for layer, plan in enumerate(lists):
        *rows, inner = [None if rows is None else next(parts) for rows in plan]
        inverse = tuple(
            None if chosen is None or places is None else places[layer, call] for call, chosen in enumerate(rows)
        )
        bias: float | Tensor = 2.0 * factor
        scales = None
        if any(rows[call] is not None for call in (SHIFTED_MLP, PLAIN_MLP)):
            live = kept[:, layer, [SHIFTED_MLP, PLAIN_MLP]].sum(1) * factor
            bias = torch.from_numpy(live).to(device, non_blocking=True)[:, None, None]
            scales = bias.view(1, -1).to(torch.float32).expand(NUM_DROP_PATHS + 1, -1)
        plans.append(LayerDrops(tuple(rows), inner, (factor,) * NUM_DROP_PATHS, bias, inverse, scales))
    return plans


def _places(plan: list[NDArray[np.int64] | None], num_rows: int) -> NDArray[np.int32]:
    """Invert the lists of the branches, (6, N): the place of each sample, -1 where it is absent."""
    places = np.full((NUM_DROP_PATHS, num_rows), -1, np.int32)
    for call, rows in enumerate(plan[:NUM_DROP_PATHS]):
        if rows is not None:
            places[call, rows] = np.arange(len(rows), dtype=np.int32)
    return places


def _indices(kept: NDArray[np.bool_]) -> list[NDArray[np.int64] | None]:
    """List the rows of each branch of a layer, (N, 6), and where CA's attention lies within its MLP; None for all."""
    kept = kept.copy()
    # CA's output passes its last DropPath: where that drops, nothing before it is needed
    kept[:, CA_ATTENTION] &= kept[:, CA_MLP]
    rows = [None if column.all() else np.flatnonzero(column) for column in kept.T]
    attention = kept[kept[:, CA_MLP], CA_ATTENTION]
    return [*rows, None if attention.all() else np.flatnonzero(attention)]
