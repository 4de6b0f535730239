"""Philox4x32-10 words of addressed samples, in torch int64 arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["philox_words"]

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD_MASK = 0xFFFFFFFF
NUM_ROUNDS = 10


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    # the 64-bit product leaves int64's range: form it in 16-bit halves of the word
    low = (word & 0xFFFF) * multiplier
    high = (word >> 16) * multiplier + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_words(
    index: Tensor, view: Tensor, seed: int, step: int, use: int, num: int, *, first: int = 0
) -> Tensor:
    """Draw words `first` .. `first` + `num` - 1, (N, num), int64 in [0, 2**32), for samples `index` and views `view`, (N,).

    Raises:
        ValueError: If an index, a view or the step leaves its range.
    """
    if not 0 <= step < 1 << 32:
        raise ValueError(f"philox_words: step must be in [0, 2**32), got {step}. Number steps from 0.")
    for argument, values, bits in (("index", index, 32), ("view", view, 16)):
        if values.numel() and (int(values.min()) < 0 or int(values.max()) >= 1 << bits):
            raise ValueError(
                f"philox_words: {argument} must be in [0, 2**{bits}), got {int(values.min())} to {int(values.max())}. "
                "Number samples and views from 0."
            )
    blocks = torch.arange(first // 4, -(-(first + num) // 4), device=index.device, dtype=torch.int64)
    shape = (index.shape[0], blocks.shape[0])
    c0 = index.to(torch.int64)[:, None].expand(shape)
    c1 = torch.full(shape, step, device=index.device, dtype=torch.int64)
    c2 = (view.to(torch.int64) | use << 16)[:, None].expand(shape)
    c3 = blocks.expand(shape)
    key0, key1 = seed & WORD_MASK, seed >> 32 & WORD_MASK
    for _ in range(NUM_ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + WEYL[0] & WORD_MASK, key1 + WEYL[1] & WORD_MASK
    return torch.stack([c0, c1, c2, c3], dim=-1).reshape(shape[0], 4 * shape[1])[:, first % 4 :][:, :num].contiguous()
