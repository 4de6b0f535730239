"""The operator `fastskel::mlp`: reference, interpreter and GPU against plain torch in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastskel.kernels import mlp_hidden, mlp_residual
from fastskel.kernels._backend import INTERPRETED
from fastskel.kernels.mlp import mlp, mlp_cost
from fastskel.kernels.reference.mlp import mlp as mlp_reference
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

NAMES = ("x", "up_weight", "up_bias", "down_weight", "down_bias", "residual")
# samples, tokens, width, hidden, width of the result
SHAPES = [(2, 17, 32, 64, 32), (1, 50, 64, 256, 48), (3, 1, 16, 16, 16), (1, 64, 256, 1000, 256)]
# relative L2 error against plain torch of the same type; the interpreter truncates to bfloat16 where a GPU rounds
TIMES_PLAIN = {torch.float32: 2, torch.float16: 2, torch.bfloat16: 4 if INTERPRETED else 2}


def make(shape: tuple[int, ...], dtype: torch.dtype, device: Any = "cpu", residual: Any = None) -> dict[str, Any]:
    """Arguments of the operator."""
    n, s, d, hidden, width = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def randn(*size: int, kind: torch.dtype = dtype) -> Tensor:
        scaled = torch.randn(size, generator=generator, dtype=torch.float64) / size[-1] ** (0.5 * (len(size) == 2))
        return scaled.to(device, kind).requires_grad_()

    given = dict(x=randn(n, s, d), up_weight=randn(hidden, d), up_bias=randn(hidden), down_weight=randn(width, hidden),
                 down_bias=randn(width))  # fmt: skip
    if residual is not None:
        given["residual"] = randn(n, s, width, kind=residual)
    factor = torch.rand(n, generator=generator).to(device)
    return {**given, "scale": 0.7, "factor": factor}


def results(function: Callable[..., Tensor], given: dict[str, Any], grad: Tensor) -> list[Tensor]:
    """Result and all gradients."""
    out = function(**given)
    leaves = [given[name] for name in NAMES if given.get(name) is not None]
    return [out.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(out, leaves, grad.to(out.dtype)))]


def moved(given: dict[str, Any], convert: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Leaves anew, in another type; the factor stays in float32."""
    return {
        name: (convert(v.detach().cpu()).requires_grad_() if name in NAMES else v.cpu()) if isinstance(v, Tensor) else v
        for name, v in given.items()
    }


def agree(given: dict[str, Any]) -> None:
    grad = torch.randn_like(given.get("residual", given["x"] @ given["up_weight"].mT @ given["down_weight"].mT))
    actual = results(mlp, given, grad)
    expected = results(mlp_reference, moved(given, lambda t: t.double()), grad.cpu())
    plain = results(mlp_reference, moved(given, lambda t: t), grad.cpu())
    for value, target, other in zip(actual, expected, plain, strict=True):
        assert value.dtype == other.dtype and value.shape == other.shape
        error, allowed = ((tensor.double() - target).norm() for tensor in (value, other))
        # a product in another order has the same error; a few roundings where it has none
        assert error <= TIMES_PLAIN[given["x"].dtype] * allowed + 1e-6 * target.norm()


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("residual", [None, torch.float32], ids=["alone", "residual"])
def test_equals_definition(residual, shape, activation, device, launches):
    seen = launches(
        mlp_hidden._mlp_hidden_fwd_kernel, mlp_hidden._mlp_hidden_bwd_kernel, mlp_residual._mlp_residual_fwd_kernel,
        mlp_residual._mlp_residual_bwd_kernel,
    )  # fmt: skip
    agree({**make(shape, torch.float32, device, residual), "activation": activation})
    order = ("mlp_hidden_fwd", "mlp_residual_fwd", "mlp_residual_bwd", "mlp_hidden_bwd")
    assert seen == [f"_{name}_kernel" for name in order]


@pytest.mark.parametrize("residual", [None, torch.float32], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype, residual, device):
    agree(make((3, 33, 48, 96, 48), dtype, device, residual))


@pytest.mark.parametrize("without", ["up_bias", "down_bias", "factor"])
def test_what_is_optional(without, device):
    agree({**make(SHAPES[0], torch.float32, device), without: None})


@pytest.mark.parametrize("wanted", NAMES)
def test_only_gradients_that_are_wanted(wanted, device):
    given = make(SHAPES[0], torch.float32, device, torch.float32)
    grads = dict(zip(NAMES, results(mlp, given, torch.ones(2, 17, 32, device=device))[1:]))
    for name in NAMES:
        given[name] = given[name].detach().requires_grad_(name == wanted)
    mlp(**given).sum().backward()
    assert torch.equal(given[wanted].grad.cpu(), grads[wanted])
    assert all(given[name].grad is None for name in NAMES if name != wanted)


def test_strides_and_empty_batches(device):
    given = make((4, 6, 16, 32, 16), torch.float32, device, torch.float32)
    x = given["x"].detach().mT.contiguous().mT[::2].requires_grad_()
    other = {**given, "x": x, "residual": given["residual"].detach()[::2].requires_grad_(), "factor": given["factor"][::2]}
    assert not other["x"].is_contiguous() and not other["factor"].is_contiguous()
    agree(other)
    # a gradient without strides
    mlp(**other).sum().backward()
    empty = {**given, "x": x.detach()[:0].requires_grad_(), "residual": None, "factor": given["factor"][:0]}
    out = mlp(**empty)
    out.sum().backward()
    assert out.shape == (0, 6, 16) and given["up_weight"].grad.abs().sum() > 0


def test_same_bits_again(device):
    given, grad = make(SHAPES[1], torch.bfloat16, device), torch.randn(1, 50, 48, device=device)
    first, second = results(mlp, given, grad), results(mlp, given, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_results_follow_the_arguments_under_autocast(device):
    given, grad = make(SHAPES[0], torch.float32, device), torch.randn(2, 17, 32, device=device)
    expected = results(mlp, given, grad)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = results(mlp, given, grad)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.interpreted
def test_opcheck_interpreted() -> None:
    check_operators(torch.float32)


@pytest.mark.interpreted
def test_refuses_float64_where_kernels_run() -> None:
    with pytest.raises(ValueError, match="mlp: x must be float32 or bfloat16 or float16 .*got float64"):
        mlp(**make(SHAPES[0], torch.float64))


def test_opcheck() -> None:
    check_operators(torch.float64)


def check_operators(dtype: torch.dtype) -> None:
    given = make((2, 3, 4, 5, 6), dtype, residual=dtype)
    arguments = tuple(given[name] for name in NAMES)
    torch.library.opcheck(torch.ops.fastskel.mlp.default, (*arguments, given["factor"], "gelu", 0.7))
    plain = (given["x"], given["up_weight"], None, given["down_weight"], None, None, None, "relu", 1.0)
    torch.library.opcheck(torch.ops.fastskel.mlp.default, plain)
    x, up_weight, down_weight = (given[name].detach() for name in ("x", "up_weight", "down_weight"))
    grad, up = given["residual"].detach(), torch.randn(2, 3, 5, dtype=dtype)
    for needs in ([True] * 5, [False, True, False, False, True]):
        backward = (grad, x, up, up_weight, down_weight, given["factor"], "gelu", 0.7, needs)
        torch.library.opcheck(torch.ops.fastskel.mlp_backward.default, backward)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("residual", [None, torch.float64], ids=["alone", "residual"])
def test_gradients_are_those_of_the_result(residual: Any, activation: str) -> None:
    given = make((2, 3, 4, 5, 6), torch.float64, residual=residual)
    leaves = [name for name in NAMES if name in given]

    def function(*values: Tensor) -> Tensor:
        return mlp(**{**given, **dict(zip(leaves, values, strict=True))}, activation=activation)

    assert torch.autograd.gradcheck(function, [given[name] for name in leaves])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_operator_equals_reference(dtype: torch.dtype) -> None:
    given = make(SHAPES[0], dtype, residual=dtype)
    grad = torch.randn(2, 17, 32, dtype=dtype)
    found, expected = results(mlp, given, grad), results(mlp_reference, given, grad)
    for value, target in zip(found, expected, strict=True):
        # where a bias gradient is rounded differs
        torch.testing.assert_close(value, target, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


def test_compiles_as_one_graph() -> None:
    given = make(SHAPES[0], torch.float32, residual=torch.float32)
    grad = torch.randn(2, 17, 32)

    def function(**arguments: Any) -> Tensor:
        return 2 * mlp(**arguments)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    found, expected = results(compiled, given, grad), results(function, given, grad)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_there_is_no_second_derivative() -> None:
    given = make((2, 3, 4, 5, 6), torch.float32)
    (grad,) = torch.autograd.grad(mlp(**given).sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="mlp_backward"):
        grad.sum().backward()


def test_flops_are_those_of_the_products() -> None:
    n, s, d, hidden, width = shape = (2, 3, 4, 5, 6)
    given = make(shape, torch.float32)
    with FlopCounterMode(display=False) as counter:
        out = mlp(**given)
    forward = 2 * n * s * hidden * (d + width)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * forward
    given["x"] = given["x"].detach()
    with FlopCounterMode(display=False) as counter:
        mlp(**given).sum().backward()
    assert counter.get_total_flops() == 3 * forward - 2 * n * s * hidden * d
    assert mlp_cost(n * s, 4, 5, 2).flops == 2 * n * s * 5 * 8 and mlp_cost(1, 4, 5, 2, backward=True).flops == 4 * 5 * 8


def test_what_is_kept() -> None:
    kept: list[Tensor] = []
    given = make((2, 3, 4, 5, 6), torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mlp(**given)
    assert sorted(tuple(t.shape) for t in kept) == [(2,), (2, 3, 4), (2, 3, 5), (5, 4), (6, 5)]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(6, 4)), r"x must be \(N, S, D\), got \(6, 4\)"),
        (dict(x=torch.zeros(2, 3, 4, dtype=torch.int32)), r"x must be float32 .*got int32 \(2, 3, 4\)"),
        (dict(activation="tanh"), r"activation must be one of \('gelu', 'relu'\), got 'tanh'"),
        (dict(up_weight=torch.zeros(5, 3)), r"up_weight must be float32 \(5, 4\) on cpu, got float32 \(5, 3\)"),
        (dict(up_weight=torch.zeros(5, 4).half()), "up_weight must be float32 .*got float16"),
        (dict(up_bias=torch.zeros(4)), r"up_bias must be float32 \(5,\)"),
        (dict(down_weight=torch.zeros(6, 4)), r"down_weight must be float32 \(6, 5\)"),
        (dict(down_bias=torch.zeros(5)), r"down_bias must be float32 \(6,\)"),
        (dict(residual=torch.zeros(2, 3, 4)), r"residual must be float32 or bfloat16 or float16.* \(2, 3, 6\)"),
        (dict(factor=torch.zeros(3)), r"factor must be float32 \(2,\)"),
        (dict(factor=torch.zeros(2).double()), "factor must be float32 .*got float64"),
        (dict(factor=torch.zeros(2, requires_grad=True)), "factor must be without gradient"),
        (dict(down_bias=torch.zeros(6, device="meta")), "down_bias must be .* on cpu, got .* on meta"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"mlp: {message}"):
        mlp(**{**make((2, 3, 4, 5, 6), torch.float32), **change})
