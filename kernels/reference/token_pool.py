"""Maximum over tokens and its gradient, with one bit kept per element, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["token_pool", "token_pool_backward", "token_pool_forward"]

# tokens that share a word of the winners
WORD_BITS = 32


def token_pool(x: Tensor) -> Tensor:
    """Return the maxima (N, D) over the tokens of x (N, S, D); autograd shares the gradient evenly among ties."""
    return x.amax(1)


def token_pool_forward(x: Tensor, want_winners: bool) -> tuple[Tensor, Tensor]:
    """Return maxima (N, D), and which elements of x (N, S, D) equal them: bit s % 32 of word (N, s // 32, D), int32.

    Without `want_winners` there are no words: (0,).
    """
    values = x.amax(1)
    if not want_winners:
        return values, x.new_empty(0, dtype=torch.int32)
    n, s, d = x.shape
    num_words = -(-s // WORD_BITS)
    chosen = torch.zeros(n, num_words * WORD_BITS, d, dtype=torch.int32, device=x.device)
    chosen[:, :s] = x == values[:, None]
    bits = torch.arange(WORD_BITS, dtype=torch.int32, device=x.device)[:, None]
    # bits are disjoint: their sum is the word; int64, because bit 31 is the sign of int32
    words = (chosen.view(n, num_words, WORD_BITS, d) << bits).sum(2)
    return values, words.to(torch.int32)


def token_pool_backward(grad: Tensor, winners: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
    """Share the gradient (N, D) among the winners (N, words, D): (N, S, D) in `dtype`.

    A column without winners, whose maximum is NaN, gets NaN; what is not finite reaches the whole column.
    """
    bits = torch.arange(WORD_BITS, dtype=torch.int32, device=grad.device)[:, None]
    chosen = (winners[:, :, None] >> bits & 1).flatten(1, 2)[:, :num_tokens]
    share = (grad / chosen.sum(1))[:, None]
    return torch.where(chosen != 0, share, 0 * share).to(dtype)
