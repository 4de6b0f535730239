"""How much a fused layer keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

__all__ = ["MEMORY_MODES", "MemoryMode", "check_memory", "keeps_converted", "memory_in_use"]

MemoryMode = Literal["saved", "lean", "layer"]
MEMORY_MODES: tuple[MemoryMode, ...] = ("saved", "lean", "layer")


def check_memory(memory: str) -> None:
    """Refuse a name that is no way to keep tensors (N, S, D).

    Raises:
        ValueError: Listing the ways there are.
    """
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory: must be one of {MEMORY_MODES}, got {memory!r}. Choose one.")


def memory_in_use(memory: MemoryMode) -> MemoryMode:
    """Say what is kept of tensors (N, S, D): where there will be no backward pass, as little as there is a way for."""
    return memory if torch.is_grad_enabled() else "layer"


def keeps_converted(memory: MemoryMode, prepared: Iterable[Tensor], kept: Iterable[Tensor | None]) -> bool:
    """Say whether converted weights are kept beside tensors (N, S, D).

    Converting again costs a few percent of a step, and more for a small batch; keeping outweighs what a small batch keeps.
    """
    sizes = [sum(t.numel() * t.element_size() for t in group if t is not None) for group in (prepared, kept)]
    return memory == "saved" or (memory == "lean" and sizes[0] <= sizes[1])
