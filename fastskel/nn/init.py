"""Initialisation of the USDRL family."""

from __future__ import annotations

from typing import Literal

from torch import nn

__all__ = ["Init", "init_usdrl", "initialise"]

Init = Literal["usdrl", "torch"]


def initialise(module: nn.Module, init: Init) -> None:
    """Initialise a module and all its children: `"usdrl"` by `init_usdrl`, `"torch"` leaves torch's own start.

    Raises:
        ValueError: On any other name.
    """
    if init not in ("usdrl", "torch"):
        raise ValueError(f"{type(module).__name__}: init must be 'usdrl' or 'torch', got {init!r}. Choose one.")
    if init == "usdrl":
        module.apply(init_usdrl)


def init_usdrl(module: nn.Module) -> None:
    """Initialise one module as USDRL's AAAI code does: Linear weights (D_out, D_in) from N(0, 0.02), LayerNorm 1 and 0.

    Use with `nn.Module.apply`. Convolutions, the attention's input projection and BatchNorm keep torch's own start.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
