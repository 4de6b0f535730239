"""Matrix products of the fused blocks, for use inside autograd nodes: no gradient flows through these functions.

On a CPU torch sends float32 products to the BLAS it was built with, which on AMD's CPUs uses half of the vector width; oneDNN,
which it sends bfloat16 to anyway, uses all of it (2.1 times as fast, measured in bench/results). The operator that torch's own
compiler calls for that is called here; where a build of torch lacks it, or on a device, torch's own products are used.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from fastskel.nn.fp8 import fp8_active, fp8_product

__all__ = ["linear", "linear_grads", "matmul", "onednn_available", "relu_grad", "weight_grad"]

Activation = Literal["none", "relu"]


def onednn_available() -> bool:
    """Say whether this torch has the operator and its CPU the library behind it."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_ONEDNN = onednn_available()
# oneDNN has no bfloat16 products for processors without AVX-512; torch's own fall back there
_TYPES = (torch.float32, torch.bfloat16) if _ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)

if _ONEDNN and torch.ops.mkldnn._linear_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _linear_flops(x: tuple[int, ...], weight: tuple[int, ...], *_: Any, **__: Any) -> int:
        rows = 1
        for size in x[:-1]:
            rows *= size
        return 2 * rows * weight[0] * weight[1]


if torch.ops.aten._addmm_activation not in flop_registry:

    @register_flop_formula([torch.ops.aten._addmm_activation, torch.ops.aten.addmm_])
    def _addmm_flops(bias: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
        return 2 * a[0] * a[1] * b[1]


def _through_onednn(x: Tensor) -> bool:
    usable = _ONEDNN and bool(torch.backends.mkldnn.enabled)
    return usable and x.device.type == "cpu" and x.dtype in _TYPES and x.numel() > 0


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation = "none") -> Tensor:
    """Return `activation(x weight' + bias)` for x (.., I), weight (O, I) of any strides, bias (O,), all of one type."""
    if fp8_active():
        out: Tensor = fp8_product(x, weight, bias, "forward")
        return out.relu_() if activation == "relu" else out
    if _through_onednn(x):
        out = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")
        return out
    if activation == "relu" and bias is not None and x.is_cuda:
        # cuBLAS rectifies what it has just summed: no pass of its own
        rows: Tensor = torch._addmm_activation(bias, x.flatten(0, -2), weight.mT)
        return rows.view(*x.shape[:-1], weight.shape[0])
    out = F.linear(x, weight, bias)
    return out.relu_() if activation == "relu" else out


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return `a b` for a (.., K) and b (K, O); in layers a is a gradient."""
    if fp8_active():
        return fp8_product(a, b.mT, None, "backward")
    return linear(a, b.mT)


def linear_grads(grad: Tensor, x: Tensor, wide: torch.dtype, need: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of weight (O, I) and bias (O,) of a linear map from its output's (.., O) and its input (.., I)."""
    return (weight_grad(grad, x, wide), grad.flatten(0, -2).sum(0).to(wide)) if need else (None, None)


def weight_grad(grad: Tensor, x: Tensor, wide: torch.dtype) -> Tensor:
    """Return the gradient of a linear map's weight (O, I) from its output's (.., O) and its input (.., I), in type `wide`."""
    grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    # transposed operands: the operator would copy them, and in bfloat16 torch's own product loses nothing else
    weight = grad.mT @ x if x.dtype == torch.bfloat16 else matmul(grad.mT, x)
    return weight.to(wide)


def relu_grad(grad: Tensor, out: Tensor) -> Tensor:
    """Return the gradient of what was rectified to `out` (N, S, D): `grad` where that is above zero."""
    result: Tensor = torch.ops.aten.threshold_backward(grad, out, 0)
    return result
