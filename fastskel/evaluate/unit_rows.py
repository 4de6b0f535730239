"""Feature rows as float64 unit vectors, made where they are asked for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["UnitRows", "values_at_once"]

# float64 values in memory at a time: on a CPU they fit into a cache, on a GPU they take longer than a launch
CPU_VALUES, GPU_VALUES = 2**19, 2**23


def values_at_once(device: torch.device) -> int:
    """Say how many float64 values of rows (n, F) are worked on at a time."""
    return CPU_VALUES if device.type == "cpu" else GPU_VALUES


class UnitRows:
    """Rows (N, F) divided by their length, in float64; a row of zeros stays one.

    Args:
        function: Who asks, for errors.
        name: What the rows are called there.
        rows: Floating-point, (N, F), finite.
        device: Where unit vectors are made; the rows stay where they are.
    Raises:
        ValueError: On type, shape, and rows that are not finite.
    """

    def __init__(self, function: str, name: str, rows: Tensor, device: torch.device | str) -> None:
        if rows.dim() != 2 or not rows.is_floating_point() or rows.shape[1] == 0:
            raise ValueError(
                f"{function}: {name} must be floating-point (N, F), got {rows.dtype} of shape {tuple(rows.shape)}. "
                "Pass one feature row per sample."
            )
        self.rows, self.device = rows, torch.device(device)
        self.shape = (rows.shape[0], rows.shape[1])
        # squares of float64 values may leave its range: the largest value of a row then scales it; others never do
        self.largest = torch.ones(len(rows), 1, dtype=torch.float64, device=device) if rows.dtype == torch.float64 else None
        self.inverse = torch.ones(len(rows), 1, dtype=torch.float64, device=device)
        for part in self.parts():
            values = rows[part].to(device, torch.float64)
            if self.largest is not None:
                largest = values.abs().amax(1, keepdim=True)
                self.largest[part] = torch.where(largest == 0, 1.0, largest)
                values = values / self.largest[part]
            length = values.square().sum(1, keepdim=True).sqrt()
            if not bool(torch.isfinite(length).all()):
                raise ValueError(f"{function}: {name} must be finite, got {_not_finite(rows, part)}.")
            self.inverse[part] = torch.where(length == 0, 1.0, 1.0 / length)

    def __len__(self) -> int:
        return self.shape[0]

    def parts(self) -> Iterator[slice]:
        """Yield slices that cover the rows (N, F), small enough to work on."""
        step = max(1, values_at_once(self.device) // self.shape[1])
        for begin in range(0, self.shape[0], step):
            yield slice(begin, min(begin + step, self.shape[0]))

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """Return the unit vectors of some rows, (n, F), float64: a new tensor."""
        home = index.to(self.rows.device) if isinstance(index, Tensor) else index
        near = index.to(self.device) if isinstance(index, Tensor) else index
        values = self.rows[home].to(self.device, torch.float64)
        if self.largest is not None:
            values = values / self.largest[near]
        # what was converted or divided is a copy
        return values.mul_(self.inverse[near])


def _not_finite(rows: Tensor, part: slice) -> str:
    bad = (~torch.isfinite(rows[part])).nonzero()[0]
    row = part.start + int(bad[0])
    return f"{rows[row, int(bad[1])].item()} in row {row}. Check the encoder's weights and its input"
