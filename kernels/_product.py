"""The product of two tiles, as kernels of several files compute it."""

from __future__ import annotations

from fastskel.kernels._backend import INTERPRETED, jit, tl

__all__ = ["product"]

# the interpreter multiplies the bits of bfloat16 as integers; products of widened operands are the same
WIDEN = INTERPRETED if tl is None else tl.constexpr(INTERPRETED)


@jit()
def product(b_left, b_right, b_sum):
    """Add the product of two tiles to a float32 tile, or to zeros where it is None."""
    if WIDEN:
        b_left = b_left.to(tl.float32)
        b_right = b_right.to(tl.float32)
    return tl.dot(b_left, b_right, b_sum, input_precision="ieee")
