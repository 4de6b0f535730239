r"""Products of rounded unit vectors, which rank a gallery like the true products up to an error that is bounded here.

Let u be the unit vector of a query and v that of a gallery row, both in float64, and m any vector: the mean of some gallery
rows. With x = u - m, y = v - m and c = m v - m m,

    u v = x y + c + m u,

where m u is the same for all rows of a query: scores x y + c rank the gallery as u v does. Features often crowd into a narrow
cone, as after a ReLU; then x and y are short, and so is what rounding loses of them.

x and y are rounded to x' and y'. c becomes one or more columns c' of the same type, which meet ones in the query, so that one
matrix product gives the score. Beside its true value, the computed score s is off by at most

    |x - x'| |y| + |x'| |y - y'| + |c - sum c'|     what rounding loses, by Cauchy-Schwarz; norms measured in float64
    + a (|x'| |y'| + sum |c'|)                      a = n e / (1 - n e): n terms summed with roundoff e in any order, fused or not
    + r |s|                                         the result's own rounding: r = 2^-8 if it is bf16, else nothing
    + 2^-30 + F 2^-51                               half a step of the exact similarity on both sides, and the roundoff of float64

The first two lines are a product of three numbers of the query with three of the gallery row. Roundoff e is 2^-24 for fp32.
Where products of bf16 values are summed it is 2^-22, since matrix units may truncate; the products themselves are exact in fp32.
If torch may compute fp32 products in a shorter type, fp32 copies hold values that bf16 can hold: no type in use shortens these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastskel.evaluate.unit_rows import UnitRows

__all__ = ["FirstPass", "fastest_pass"]

STORED = {"bf16": torch.bfloat16, "fp32": torch.float32}
# the type that values are rounded to: columns that hold a float64 to 24 bits, roundoff of sums
COLUMNS = {torch.bfloat16: 3, torch.float32: 1}
SUM_ROUNDOFF = {torch.bfloat16: 2.0**-22, torch.float32: 2.0**-24}
RESULT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float32: 0.0}
# a step of the exact similarities, see `search`, and what float64 sums are off by for each of their terms
STEP, FP64_ROUNDOFF = 2.0**-30, 2.0**-51
# the centre needs to be near the mean only
CENTRE_ROWS = 1024
# scores of a tile are looked at one by one only where their maximum is large enough
MOST_TILE, LEAST_TILE = 64, 4
# a block has so many tiles for each neighbour at least: k of their maxima are then nearly the k largest scores
TILES_PER_NEIGHBOUR = 4
# widths in multiples of a vector register
ALIGN = 16
# the score of rows that only fill the last tile
NOWHERE = -(2.0**100)


def fastest_pass(device: torch.device) -> str:
    """Name the first pass that suits a device: bf16 where a CPU multiplies it in hardware, else fp32."""
    if device.type != "cpu":
        return "fp32"
    able = torch.cpu.get_capabilities()
    return "bf16" if any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16")) else "fp32"


def _products_are_fp32() -> bool:
    """Whether products of fp32 matrices are computed as such."""
    on_cpu = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    settings = (torch.backends.cuda.matmul.fp32_precision, on_cpu)
    return all(setting in ("none", "ieee") for setting in settings)


class FirstPass:
    """A gallery rounded to a short type, in which rows that may be near are found.

    Args:
        gallery: Unit vectors, (N, F).
        name: "bf16" or "fp32".
        block_rows: Gallery rows multiplied at a time.
    """

    # widths are multiples of it, and leave room for so many columns more
    align, num_spare = ALIGN, 0

    def __init__(self, gallery: UnitRows, name: str, block_rows: int) -> None:
        self.num_rows, self.width = gallery.shape
        self.block_rows = -(-block_rows // MOST_TILE) * MOST_TILE
        self.stored = STORED[name]
        self.rounded = self.stored if _products_are_fp32() else torch.bfloat16
        self.num_columns = COLUMNS[self.rounded]
        device = gallery.device
        every = max(1, self.num_rows // CENTRE_ROWS)
        self.centre = gallery[torch.arange(0, self.num_rows, every)[:CENTRE_ROWS]].mean(0)
        num_terms = -(-(self.width + self.num_columns + self.num_spare) // self.align) * self.align
        off = num_terms * SUM_ROUNDOFF[self.rounded]
        self.summing = off / (1 - off)
        self.slack = STEP + self.width * FP64_ROUNDOFF
        padded = -(-self.num_rows // MOST_TILE) * MOST_TILE
        self.rows = torch.zeros(padded, num_terms, dtype=self.stored, device=device)
        self.rows[self.num_rows :, self.width] = NOWHERE
        # what multiplies a query's |x - x'|, |x'| and 1 in the bound
        self.factors = torch.zeros(padded, 3, dtype=torch.float64, device=device)
        for part in gallery.parts():
            self._fill(part, gallery[part])

    @staticmethod
    def reach(num_rows: int, block_rows: int) -> int:
        """Most neighbours that tiles of a block of a gallery (N, F) can tell from the others."""
        return min(num_rows, block_rows) // (TILES_PER_NEIGHBOUR * LEAST_TILE)

    def _round(self, values: Tensor) -> Tensor:
        return values.to(self.rounded).to(self.stored)

    def _fill(self, part: slice, units: Tensor) -> None:
        constant = (units - self.centre) @ self.centre
        units -= self.centre
        rounded = self._round(units)
        self.rows[part, : self.width] = rounded
        left, absolute = constant, torch.zeros_like(constant)
        for column in range(self.width, self.width + self.num_columns):
            self.rows[part, column] = self._round(left)
            piece = self.rows[part, column].double()
            left, absolute = left - piece, absolute + piece.abs()
        exact = rounded.double()
        length = torch.linalg.vector_norm(exact, dim=1)
        self.factors[part, 0] = torch.linalg.vector_norm(units, dim=1)
        self.factors[part, 1] = torch.linalg.vector_norm(exact.sub_(units), dim=1) + self.summing * length
        self.factors[part, 2] = left.abs() + self.summing * absolute

    def round_queries(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """Round unit vectors of queries, (B, F), to (K, B); their part of the bound, (3, B)."""
        shifted = units - self.centre
        rounded = self._round(shifted)
        rows = torch.zeros(units.shape[0], self.rows.shape[1], dtype=self.stored, device=units.device)
        rows[:, : self.width] = rounded
        rows[:, self.width : self.width + self.num_columns] = 1.0
        exact = rounded.double()
        lost, length = torch.linalg.vector_norm(exact - shifted, dim=1), torch.linalg.vector_norm(exact, dim=1)
        return rows.T, torch.stack([lost, length, torch.ones_like(lost)])

    def candidates(self, units: Tensor, k: int, limit: int) -> tuple[Tensor, Tensor] | None:
        """Find every pair that may be among the k nearest of its query.

        Args:
            units: Unit vectors of queries, (B, F), float64.
            k: Neighbours, at most `reach`.
            limit: Most pairs.
        Returns:
            Query number and gallery row of each pair, (P,) each; None if the bound leaves more than the limit.
        """
        tile = MOST_TILE
        while tile * TILES_PER_NEIGHBOUR * k > min(self.num_rows, self.block_rows):
            tile //= 2
        columns, scale = self.round_queries(units)
        num_queries, result_roundoff = units.shape[0], RESULT_ROUNDOFF[self.stored]
        factors = self.factors.view(-1, tile, 3).amax(1)
        buffer = self.rows.new_empty(min(self.block_rows, len(self.rows)), num_queries)
        # the k largest lower bounds of tiles: the k-th is a lower bound of the k-th nearest
        best = torch.full((num_queries, k), -torch.inf, dtype=torch.float64, device=units.device)
        queries, rows, uppers = [], [], []
        for begin in range(0, len(self.rows), self.block_rows):
            block = self.rows[begin : begin + self.block_rows]
            score = torch.mm(block, columns, out=buffer[: len(block)]).view(-1, tile, num_queries)
            first = begin // tile
            # one part in 2^30 is more than what computing the bound in float64 loses
            margin = (factors[first : first + len(score)] @ scale + self.slack) * (1 + 2.0**-30)
            most = score.amax(1).double()
            spread = margin + result_roundoff * most.abs()
            best = torch.cat([best, (most - spread).T], 1).topk(k, dim=1).values
            floor = best[:, -1]
            number, query = (most + spread >= floor).nonzero().T
            if len(number) > limit:
                return None
            near = score[number, :, query].double()
            upper = near + margin[number, query][:, None] + result_roundoff * near.abs()
            hit, inside = (upper >= floor[query][:, None]).nonzero().T
            queries.append(query[hit])
            rows.append(begin + number[hit] * tile + inside)
            uppers.append(upper[hit, inside])
            if sum(map(len, rows)) > limit:
                queries, rows, uppers = _keep(queries, rows, uppers, floor)
                if len(rows[0]) > limit:
                    return None
        queries, rows, uppers = _keep(queries, rows, uppers, floor)
        real = rows[0] < self.num_rows
        return queries[0][real], rows[0][real]


def _keep(
    queries: list[Tensor], rows: list[Tensor], uppers: list[Tensor], floor: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Join pairs (P,) and drop those that have fallen below their query's floor, (B,)."""
    query, row, upper = torch.cat(queries), torch.cat(rows), torch.cat(uppers)
    keep = upper >= floor[query]
    return [query[keep]], [row[keep]], [upper[keep]]
