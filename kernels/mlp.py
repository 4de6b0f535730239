r"""The MLP as one operator: cuBLAS's matrix products, through torch, and the kernels around them.

    y = r + c (act(x W1' + b1) W2' + b2)

with c a number times a factor of the sample. Kept for the backward pass: x and what is before the activation; the activations,
which the gradient of W2 needs, are computed again in the pass that differentiates them. See `mlp_hidden` and `mlp_residual`.
Bytes moved around the products, for N S F activations of b bytes and N S D numbers of the stream of r bytes: forward 2 b a hidden
number and 2 r + b of the stream, backward 4 b and r + b.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fastskel.kernels._backend import INTERPRETED, Cost, cpu_kernel
from fastskel.kernels.mlp_hidden import ACTIVATIONS, Hidden, mlp_hidden, mlp_hidden_backward
from fastskel.kernels.mlp_residual import TYPES, Branch, mlp_residual, mlp_residual_backward
from fastskel.kernels.reference.mlp import mlp_backward as mlp_backward_reference
from fastskel.kernels.reference.mlp import mlp_forward as mlp_forward_reference
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["mlp", "mlp_cost"]


def mlp(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    *,
    activation: str = "gelu",
    residual: Tensor | None = None,
    scale: float = 1.0,
    factor: Tensor | None = None,
) -> Tensor:
    """Return `residual + scale * factor * (act(x up_weight' + up_bias) down_weight' + down_bias)`.

    Results follow the types of the arguments, also under autocast. Kept for the gradient: x, and what is before the activation.

    Args:
        x: Tokens, (N, S, D); float32, bfloat16 or float16, on the CPU float64 too.
        up_weight: First weight, (F, D), in the type of x.
        up_bias: Its bias, (F,), or None.
        down_weight: Second weight, (E, F).
        down_bias: Its bias, (E,), or None.
        activation: "gelu" (exact) or "relu".
        residual: Residual stream, (N, S, E), of any of these types; None for none.
        scale: Factor of all samples.
        factor: Factor of each sample, (N,) float32, without gradient.
    Returns:
        (N, S, E) in the residual's type, without residual in that of x.
    Raises:
        ValueError: On shapes that do not fit, types, an unknown activation, or a factor that wants a gradient.
    """
    # a kernel computes in float32; the reference on the CPU in the type that it is given
    types = TYPES if x.is_cuda or INTERPRETED else (*TYPES, torch.float64)
    if x.dim() != 3:
        raise ValueError(f"mlp: x must be (N, S, D), got {tuple(x.shape)}. Put samples first, tokens second.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"mlp: activation must be one of {ACTIVATIONS}, got {activation!r}. Choose one of them.")
    n, s, d = x.shape
    hidden, width = up_weight.shape[0], down_weight.shape[0]
    for argument, tensor, shape, dtypes in (
        ("x", x, (n, s, d), types),
        ("up_weight", up_weight, (hidden, d), (x.dtype,)),
        ("up_bias", up_bias, (hidden,), (x.dtype,)),
        ("down_weight", down_weight, (width, hidden), (x.dtype,)),
        ("down_bias", down_bias, (width,), (x.dtype,)),
        ("residual", residual, (n, s, width), types),
        ("factor", factor, (n,), (torch.float32,)),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != x.device):
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(
                f"mlp: {argument} must be {names} {shape} on {x.device}, got {str(tensor.dtype).removeprefix('torch.')} "
                f"{tuple(tensor.shape)} on {tensor.device}. Give all in one type and for the same sizes."
            )
    if factor is not None and factor.requires_grad:
        raise ValueError("mlp: factor must be without gradient, got one that wants it. Detach it.")
    out: Tensor = _operator(x, up_weight, up_bias, down_weight, down_bias, residual, factor, activation, scale)[0]
    return out


def mlp_cost(
    num_rows: int, width: int, hidden: int, itemsize: int, residual_itemsize: int = 0, backward: bool = False
) -> Cost:
    """Cost of the operator on (rows, width), where input and output have one width; without residual its size is 0."""
    products, weights = 4 * num_rows * width * hidden, 2 * width * hidden
    if backward:
        # read: the gradient, x, what is before the activation; written: the gradient of x
        numbers = itemsize * (2 * weights + num_rows * (2 * width + hidden))
        return Cost(2 * products, numbers + num_rows * width * (residual_itemsize or itemsize))
    numbers = itemsize * (weights + num_rows * (width + hidden))
    return Cost(products, numbers + num_rows * width * (2 * residual_itemsize or itemsize))


def _forward(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    residual: Tensor | None,
    factor: Tensor | None,
    activation: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    # types were chosen by the caller
    with torch.autocast(x.device.type, enabled=False):
        up = F.linear(x, up_weight, up_bias)
        value = F.linear(mlp_hidden([Hidden(up)], activation, num_samples=len(up)), down_weight)
        branch = Branch(value, None, scale, factor, down_bias)
        return mlp_residual(residual, [branch], out=value if residual is None else None), up


def _backward(
    grad: Tensor,
    x: Tensor,
    up: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    factor: Tensor | None,
    activation: str,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_x, need_up, need_up_bias, need_down, need_down_bias = needs
    with torch.autocast(x.device.type, enabled=False):
        d_value = torch.empty_like(grad, dtype=x.dtype, memory_format=torch.contiguous_format)
        # a bias that stands for its type and shape only
        bias = down_weight[:, 0] if need_down_bias else None
        (d_down_bias,) = mlp_residual_backward(grad, [Branch(d_value, None, scale, factor, bias)])
        d_up = torch.matmul(d_value, down_weight)
        hidden, d_up_bias = mlp_hidden_backward(
            d_up, [Hidden(up)], activation, d_ups=[d_up], want_hidden=need_down, want_bias=need_up_bias
        )
        return (
            torch.matmul(d_up, up_weight) if need_x else x.new_empty(0),
            d_up.flatten(0, 1).mT @ x.flatten(0, 1) if need_up else x.new_empty(0),
            x.new_empty(0) if d_up_bias is None else d_up_bias.to(x.dtype),
            x.new_empty(0) if hidden is None else d_value.flatten(0, 1).mT @ hidden.flatten(0, 1),
            x.new_empty(0) if d_down_bias is None else d_down_bias.to(x.dtype),
        )


_operator = torch.library.custom_op(
    "fastskel::mlp",
    _forward,
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor x, Tensor up_weight, Tensor? up_bias, Tensor down_weight, Tensor? down_bias, Tensor? residual, "
    "Tensor? factor, str activation, float scale) -> (Tensor, Tensor)",
)
_operator.register_kernel("cpu")(cpu_kernel(mlp_forward_reference, _forward))

_backward_operator = torch.library.custom_op(
    "fastskel::mlp_backward",
    _backward,
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor grad, Tensor x, Tensor up, Tensor up_weight, Tensor down_weight, Tensor? factor, str activation, "
    "float scale, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_backward_operator.register_kernel("cpu")(cpu_kernel(mlp_backward_reference, _backward))


@_operator.register_fake
def _(x: Tensor, up_weight: Tensor, up_bias: Any, down_weight: Tensor, down_bias: Any, residual: Tensor | None,
      *_: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = x.new_empty(*x.shape[:2], down_weight.shape[0], dtype=x.dtype if residual is None else residual.dtype)
    return out, x.new_empty(*x.shape[:2], up_weight.shape[0])


@_backward_operator.register_fake
def _(grad: Tensor, x: Tensor, up: Tensor, up_weight: Tensor, down_weight: Tensor, factor: Any, activation: str,
      scale: float, needs: Sequence[bool]) -> tuple[Tensor, ...]:  # fmt: skip
    hidden, width = up_weight.shape[0], down_weight.shape[0]
    shapes = (x.shape, up_weight.shape, (hidden,), down_weight.shape, (width,))
    return tuple(x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, up_weight, _, down_weight, _, _, factor, ctx.activation, ctx.scale = inputs
    ctx.save_for_backward(x, output[1], up_weight, down_weight, factor)
    ctx.mark_non_differentiable(output[1])
    # the other output has no gradient, and none of its size need be filled with zeros
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    if grad is None:
        return (None,) * len(wanted)
    needs = list(wanted[:5])
    grads: list[Tensor | None] = [None] * 5
    if any(needs):
        found = _backward_operator(grad, *ctx.saved_tensors, ctx.activation, ctx.scale, needs)
        grads = [value if need else None for value, need in zip(found, needs)]
    return (*grads, grad if wanted[5] else None, None, None, None)


_operator.register_autograd(_differentiate, setup_context=_setup)


@register_flop_formula(torch.ops.fastskel.mlp)
def _flops(x: Sequence[int], up: Sequence[int], up_bias: Any, down: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * (up[0] * up[1] + down[0] * down[1])


@register_flop_formula(torch.ops.fastskel.mlp_backward)
def _flops_backward(
    grad: Any, x: Sequence[int], up: Any, up_weight: Sequence[int], down: Sequence[int], factor: Any, activation: str,
    scale: float, needs: Sequence[bool], **_: Any,
) -> int:  # fmt: skip
    need_x, need_up, _, need_down, _ = needs
    first, second = up_weight[0] * up_weight[1], down[0] * down[1]
    return 2 * x[0] * x[1] * ((need_x + need_up) * first + (1 + need_down) * second)
