"""Maximum over tokens that keeps one byte per element for its gradient, and pooling of every prefix of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from fastskel.kernels.token_pool import token_pool
from fastskel.nn.kernel_choice import KernelChoice, choose_kernels

__all__ = ["prefix_pool", "token_max"]

# largest count that a byte holds
MAX_BYTE = 255


class _TokenMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, tokens: Tensor) -> Tensor:
        values = tokens.amax(1)
        # a byte per element instead of input and output; their types may be wide, and the input need not live on
        ctx.save_for_backward(tokens == values[:, None])
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (chosen,) = ctx.saved_tensors
        # summing bytes in their own type is an order faster than in int64
        count = chosen.view(torch.uint8).sum(1, dtype=torch.uint8 if chosen.shape[1] <= MAX_BYTE else torch.int32)
        share = (grad / count)[:, None]
        # 0 * share instead of 0: what is not finite reaches the whole column, as amax's own gradient does
        return torch.where(chosen, share, 0 * share)


def token_max(tokens: Tensor, kernels: KernelChoice = "auto") -> Tensor:
    """Maximum over tokens, equal to `tokens.amax(1)` with its gradient: ties share it evenly.

    Autograd keeps one byte per element, where `amax` keeps its input and output. There is no second derivative.

    Args:
        tokens: Floating-point tokens, (N, S, D), of any strides, S at least 1.
        kernels: Who computes; Triton's kernel keeps one bit per element.
    Returns:
        Maxima, (N, D), of the tokens' type. A column (N, :, D) that holds NaN has the maximum NaN and an all-NaN gradient,
        as under `amax`.
    Raises:
        ValueError: If tokens are not three-dimensional or there are none to choose from.
    """
    if tokens.dim() != 3 or tokens.shape[1] < 1:
        raise ValueError(
            f"token_max: tokens must be (N, S, D) with S at least 1, got {tuple(tokens.shape)}. Put the tokens second."
        )
    if choose_kernels(kernels, tokens.device, tokens.dtype) == "triton":
        return token_pool(tokens)  # type: ignore[no-any-return]
    if not (torch.is_grad_enabled() and tokens.requires_grad):
        return tokens.amax(1)
    return _TokenMax.apply(tokens)  # type: ignore[no-any-return, no-untyped-call]


def prefix_pool(tokens: Tensor) -> Tensor:
    """Pool every prefix of tokens (N, S, D): maximum and mean of tokens 0 .. t, (N, S, 2D) for all t at once."""
    count = torch.arange(1, tokens.shape[1] + 1, device=tokens.device, dtype=tokens.dtype)
    return torch.cat([tokens.cummax(1).values, tokens.cumsum(1) / count[:, None]], -1)
