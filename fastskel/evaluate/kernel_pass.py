r"""The first pass by a Triton kernel on a GPU: of each query the rows of largest upper bounds, and what bounds all others.

`first_pass` bounds what a computed score is off by: three numbers of the query times three of the gallery row. Here these are
columns of the rounded rows as well, rounded up, so that one product of bf16 rows, summed in fp32, is an upper bound of score
and slack. With a the summing's share of the bound, the columns are enlarged by 1 + 2a, more than what summing them loses.

The kernel keeps the rows of the largest upper bounds, and no other row is more similar than the least of these, the ceiling,
less the slack. Of the kept ones those that may be among the k nearest are multiplied in float64. If the k-th of their
similarities reaches the ceiling, all others are farther away by half a step or more. Else the query must be searched otherwise.
"""

from __future__ import annotations

from torch import Tensor

from fastskel.evaluate.first_pass import FirstPass
from fastskel.evaluate.unit_rows import UnitRows
from fastskel.kernels.nearest import BLOCK_K, MOST_KEPT, MOST_ROWS, nearest
from fastskel.nn.kernel_choice import Measured

__all__ = ["MEASURED", "KernelPass"]

# devices, by compute capability and type, on which a row of bench/results shows the kernel to win; none is measured yet
MEASURED: Measured = frozenset()
# rows kept for a query beside two for each neighbour: of 40,091 random rows of 2,048 values so many are hardly ever too few
SPARE_KEPT = 14
# more than rounding a number to bf16 can take off it
ROUNDED_UP = 1 + 2.0**-7


class KernelPass(FirstPass):
    """A gallery rounded to bf16, with columns for the bound.

    Args:
        gallery: Unit vectors, (N, F).
    """

    align, num_spare = BLOCK_K, 3

    def __init__(self, gallery: UnitRows) -> None:
        super().__init__(gallery, "bf16", len(gallery))
        self.factors = self.factors[: self.num_rows]
        self.factors[:, 2] += self.slack
        self.rows = self.rows[: self.num_rows]
        self.bounds = slice(self.width + self.num_columns, self.width + self.num_columns + self.num_spare)
        self.rows[:, self.bounds] = (self.factors * ((1 + 2 * self.summing) * ROUNDED_UP)).to(self.stored)
        # a computed score is at most the bound above the true one, and the columns above that: four numbers rounded up
        self.spread = 1 + (1 + 2 * self.summing) * (1 + self.summing) * (1 + 2.0**-4)

    @staticmethod
    def kept(k: int) -> int:
        """Rows to keep for k neighbours, a power of two."""
        return 1 << (2 * k + SPARE_KEPT - 1).bit_length()

    @classmethod
    def serves(cls, k: int, num_rows: int) -> bool:
        """Whether the kernel can find k neighbours in a gallery (N, F)."""
        return bool(cls.kept(k) <= min(MOST_KEPT, num_rows) and num_rows <= MOST_ROWS)

    def near(self, units: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Find pairs that may be among the k nearest of their query, at least k of each.

        Args:
            units: Unit vectors of queries, (B, F), float64.
            k: Neighbours, which `serves` allows.
        Returns:
            Query number and gallery row of each pair, (P,) each, and the ceiling of what the other rows' similarities
            can be, (B,) float64.
        """
        columns, scale = self.round_queries(units)
        queries = columns.T
        queries[:, self.bounds] = (scale.T * ROUNDED_UP).to(self.stored)
        found, row = nearest(queries, self.rows, self.kept(k))
        upper, row = found.double(), row.long()
        least = upper - (self.factors[row] * scale.T[:, None]).sum(2) * self.spread
        query, place = (upper >= least.topk(k, dim=1).values[:, -1:]).nonzero().T
        return query, row[query, place], upper[:, -1] + units @ self.centre
