"""Matrix products of 8-bit floats, for layers whose products would be in bfloat16.

Both operands are rounded row by row: a row is divided by a factor that makes its largest number the largest of the type, and
the product multiplies the factors back, in float32. A row's factor depends on that row alone, so that a sample's result
depends neither on the batch nor on how it is cut into chunks. Activations and weights become E4M3, with 3 bits after the
point; the gradients that go back become E5M2, with 2 bits and a wider range. Sums are float32, results bfloat16. Gradients of
weights, scores and sums of attention, the token mixture and everything outside of layers stay in bfloat16; parameters and
optimiser are untouched.
Source: Micikevicius et al., FP8 Formats for Deep Learning, 2022; the factors by rows are those that `torch._scaled_mm` takes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["Direction", "check_fp8", "fp8_active", "fp8_asked", "fp8_product", "fp8_products", "fp8_within"]

Direction = Literal["forward", "backward"]
_TYPES = {"forward": torch.float8_e4m3fn, "backward": torch.float8_e5m2}
# GPUs multiply 8-bit floats in blocks of so many
MULTIPLE = 16
# least factor's numerator: a row of zeros stays one
_LEAST = 1e-30


class _State(threading.local):
    # a caller wishes for it, as autocast is wished for
    asked = False
    # a layer that was asked to computes one of its passes; autograd's threads have their own
    active = False


_STATE = _State()


@contextlib.contextmanager
def fp8_products() -> Iterator[None]:
    """Let layers over (N, S, D) that are called inside, under autocast to bfloat16, multiply in fp8; their backward passes too.

    Code that torch compiles does not see it.
    """
    before, _STATE.asked = _STATE.asked, True
    try:
        yield
    finally:
        _STATE.asked = before


@contextlib.contextmanager
def fp8_within() -> Iterator[None]:
    """Multiply in fp8 what (N, S, D) is multiplied with inside, in this thread: one pass of a layer."""
    before, _STATE.active = _STATE.active, True
    try:
        yield
    finally:
        _STATE.active = before


def fp8_asked() -> bool:
    """Say whether layers over (N, S, D) that are called now shall multiply in fp8."""
    return not torch.compiler.is_compiling() and _STATE.asked


def fp8_active() -> bool:
    """Say whether products of (N, S, D) are in fp8 now."""
    return not torch.compiler.is_compiling() and _STATE.active


def _rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round rows (M, K); return them, contiguous, and their factors (M, 1), float32."""
    largest = torch.finfo(dtype).max
    factors = x.abs().amax(-1, keepdim=True).float().clamp_min_(_LEAST) / largest
    # types of 8 bits make NaN or infinity of what lies beyond; NaN passes
    return (x / factors).clamp_(-largest, largest).to(dtype).contiguous(), factors


def fp8_product(x: Tensor, weight: Tensor, bias: Tensor | None, direction: Direction) -> Tensor:
    """Return `x weight' + bias`.

    Args:
        x: Rows (.., I); a gradient in the direction "backward".
        weight: (O, I), of any strides.
        bias: (O,), or None.
        direction: Which type x is rounded to.
    Returns:
        (.., O), of x's type.
    Raises:
        ValueError: If I or O is no multiple of 16.
    """
    if x.shape[-1] % MULTIPLE or weight.shape[0] % MULTIPLE:
        raise ValueError(
            f"fp8: widths must be multiples of {MULTIPLE}, got a product of {x.shape[-1]} with {weight.shape[0]} features. "
            "Choose another width, or bf16."
        )
    rows = x.flatten(0, -2)
    shape = (*x.shape[:-1], weight.shape[0])
    if not len(rows):
        return x.new_empty(shape)
    a, a_factors = _rounded(rows, _TYPES[direction])
    b, b_factors = _rounded(weight, _TYPES["forward"])
    # sums of few digits are faster on a GPU, and serve activations only
    out: Tensor = torch._scaled_mm(
        a, b.t(), a_factors, b_factors.t(), bias=bias, out_dtype=x.dtype, use_fast_accum=direction == "forward"
    )
    return out.view(shape)


def check_fp8(encoder: nn.Module, device: torch.device) -> None:
    """Refuse to train an encoder of (N, T, M, V, C) in fp8 where nothing would be in fp8, or a device cannot.

    A CPU can: torch multiplies there in float32 what was rounded to fp8, slowly and with the same meaning.

    Raises:
        ValueError: Naming encoder or device.
    """
    if not any(getattr(module, "multiplies_in_fp8", False) for module in encoder.modules()):
        raise ValueError(
            f"fp8: encoder must have layers that multiply in fp8, got {type(encoder).__name__} without. Choose bf16."
        )
    ones = torch.ones(MULTIPLE, MULTIPLE, dtype=torch.bfloat16, device=device)
    try:
        for direction in ("forward", "backward"):
            fp8_product(ones, ones, None, direction)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"fp8: device must multiply 8-bit floats with factors by rows, as GPUs from capability 9.0 on do, got {device}: "
            f"{str(error).splitlines()[0]}. Choose bf16."
        ) from error
