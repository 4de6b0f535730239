"""The dense spatio-temporal layer through the fused kernels, against its plain passes in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from fastskel.kernels import _dense_shift_backward as shift_backward
from fastskel.kernels import _layer_norm_backward as norm_backward
from fastskel.kernels import (
    attention,
    attention_backward,
    dense_shift,
    layer_norm,
    mlp_hidden,
    mlp_residual,
    token_pool,
)
from torch import Tensor, nn

from fastskel.data.batch import View
from fastskel.models import DSTE
from fastskel.nn import dst_function, dst_fused
from fastskel.nn.drop_path import NUM_DROP_PATHS, LayerDrops, masked_drops, skipped_drops
from fastskel.nn.dst_layer import DSTLayer
from fastskel.nn.dst_operator import dst_layer
from fastskel.skeleton import Topology

RATE = 0.25
HALF = (torch.bfloat16, torch.float16)
# kernels that a layer launches, forward and backward, by their modules
MODULES = (
    attention, attention_backward, dense_shift, shift_backward, layer_norm, norm_backward, mlp_hidden,
    mlp_residual, token_pool,
)  # fmt: skip


def kernels_of(*modules: object) -> list[object]:
    found = {}
    for module in modules:
        for name, value in vars(module).items():
            if name.endswith("_kernel") and hasattr(value, "run"):
                found[name] = value
    return list(found.values())


def build(tokens: int, width: int, heads: int = 1, alpha: float = 0.5, gap: int = 4) -> DSTLayer:
    torch.manual_seed(0)
    layer = DSTLayer(tokens, width, heads, alpha, gap).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def drops_of(kept: np.ndarray, mode: str, device: torch.device) -> LayerDrops:
    if mode == "mask":
        return masked_drops(torch.from_numpy(kept[:, None] / (1 - RATE)).to(device))[0]
    return skipped_drops(kept[:, None], RATE, device)[0]


def step(
    layer: nn.Module, x: Tensor, weight: Tensor, drops: LayerDrops | None, autocast: torch.dtype | None = None, **how: str
) -> dict[str, Tensor]:
    """Output and the gradients of x and every parameter, in fp64."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        out = layer(x, drops, **how)
    inputs = {"x": x, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad((out * weight.to(out.dtype)).sum(), list(inputs.values()))
    found = {"out": out.detach(), **dict(zip(inputs, gradients, strict=True))}
    return {name: value.double().cpu() for name, value in found.items()}


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    for name, value in expected.items():
        # a gradient that is zero in exact arithmetic is rounding noise
        distance = float((actual[name] - value).norm() / value.norm().clamp_min(1e-6))
        assert distance < limit, f"{name}: {distance:.2e}"


def fused_and_plain(
    layer: DSTLayer, rows: int, tokens: int, drops: Callable[[torch.device], LayerDrops | None], device: torch.device, **how: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(1)
    x, weight = torch.randn(2, rows, tokens, layer.CA.attn.embed_dim, dtype=torch.float64)
    plain = step(layer, x, weight, drops(torch.device("cpu")), kernels="torch", backend="fastskel")
    fused = copy.deepcopy(layer).float().to(device)
    how = {"backend": "fastskel", **how}
    return step(fused, x.float().to(device), weight.float().to(device), drops(device), kernels="triton", **how), plain


@pytest.mark.parametrize("mode", ["none", "skip", "mask"])
@pytest.mark.parametrize(
    "tokens, width, heads, alpha, gap",
    [(17, 32, 1, 0.5, 4), (50, 64, 1, 0.3, 4), (64, 48, 1, 0.5, 3), (9, 40, 4, 0.5, 1), (1, 16, 1, 0.5, 4), (70, 32, 2, 0.5, 5)],
)  # fmt: skip
def test_layer_equals_plain(tokens, width, heads, alpha, gap, mode, device: torch.device, launches) -> None:
    layer, rows = build(tokens + 2, width, heads, alpha, gap), 4
    kept = np.random.default_rng(tokens).random((rows, NUM_DROP_PATHS)) >= RATE

    def drops(where: torch.device) -> LayerDrops | None:
        return None if mode == "none" else drops_of(kept, mode, where)

    seen = launches(*kernels_of(*MODULES))
    fused, plain = fused_and_plain(layer, rows, tokens, drops, device)
    # fp32 sums of up to 16,000 terms
    compare(fused, plain, 2e-5)
    # eight forward; eight backward, and the two that are made again; for many tokens a second one of attention
    assert len(seen) == 18 + (tokens > 64), seen


@pytest.mark.parametrize("gone", [0.0, 1.0], ids=["none dropped", "all dropped"])
@pytest.mark.parametrize("mode", ["skip", "mask"])
def test_ends(gone, mode, device: torch.device) -> None:
    layer = build(6, 32)
    kept = np.full((3, NUM_DROP_PATHS), gone == 0.0)
    fused, plain = fused_and_plain(layer, 3, 6, lambda where: drops_of(kept, mode, where), device)
    compare(fused, plain, 2e-5)


@pytest.mark.parametrize("backend", ["sdpa", "math", "auto"])
@pytest.mark.parametrize("memory", ["saved", "lean", "layer"])
def test_memory_and_backends(memory, backend, device: torch.device) -> None:
    kept = np.random.default_rng(0).random((3, NUM_DROP_PATHS)) >= RATE
    fused, plain = fused_and_plain(
        build(6, 32), 3, 6, lambda where: drops_of(kept, "skip", where), device, memory=memory, backend=backend
    )
    compare(fused, plain, 2e-5)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision(dtype, device: torch.device) -> None:
    """At most twice as far from the truth as the plain passes in the same precision, all gradients taken as one vector."""
    layer, errors = build(17, 64), {"torch": 0.0, "triton": 0.0}
    torch.manual_seed(1)
    x, weight = torch.randn(2, 6, 17, 64, dtype=torch.float64)
    kept = np.random.default_rng(0).random((6, NUM_DROP_PATHS)) >= RATE
    exact = step(layer, x, weight, drops_of(kept, "skip", torch.device("cpu")))
    single = copy.deepcopy(layer).float().to(device)
    for kernels in errors:
        found = step(
            single, x.float().to(device), weight.float().to(device), drops_of(kept, "skip", device), dtype,
            kernels=kernels, backend="fastskel",
        )  # fmt: skip
        compare(found, exact, 0.1)
        for name, value in exact.items():
            errors[kernels] += float((found[name] - value).norm() / value.norm().clamp_min(1e-6)) ** 2
    assert errors["triton"] <= 4 * errors["torch"]


def test_two_calls_give_the_same_bits(device: torch.device) -> None:
    kept = np.random.default_rng(0).random((3, NUM_DROP_PATHS)) >= RATE
    layer = build(17, 32)
    first, second = (
        fused_and_plain(layer, 3, 17, lambda where: drops_of(kept, "skip", where), device)[0] for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_empty_batch(device: torch.device) -> None:
    fused, _ = fused_and_plain(build(6, 32), 0, 6, lambda _: None, device)
    assert fused["out"].shape == (0, 6, 32)
    assert not any(value.any() for value in fused.values())


def encoders(device: torch.device, **options: object) -> tuple[DSTE, DSTE]:
    torch.manual_seed(0)
    plain = DSTE(num_joints=5, num_bodies=1, num_frames=9, width=32, **options)
    fused = copy.deepcopy(plain).to(device)
    fused.configure(kernels="triton", attention_backend="fastskel", drop_path_mode="mask")
    return plain.double(), fused


@pytest.mark.parametrize("frames", [9, 4])
def test_encoder_equals_plain(frames, device: torch.device, launches) -> None:
    """Embedding and pooling included, of whole and of short clips."""
    plain, fused = encoders(device, drop_path=0.3)
    plain.configure(drop_path_mode="mask")
    clips, weight = torch.randn(3, frames, 1, 5, 3), torch.randn(3, 64).double()
    seen = launches(*kernels_of(*MODULES))
    found = []
    for encoder, dtype in ((plain, torch.float64), (fused, torch.float32)):
        where = next(encoder.parameters()).device
        view = View(clips.to(where, dtype), torch.ones(3, frames, 1, dtype=torch.bool), Topology.unknown(5))
        torch.manual_seed(2)
        features = encoder.train()(view)
        (features.pooled * weight.to(features.pooled)).sum().backward()
        named = {name: parameter.grad.double().cpu() for name, parameter in encoder.named_parameters()}
        found.append({"pooled": features.pooled.detach().double().cpu(), **named})
    # fp32 through two layers
    compare(found[1], found[0], 1e-4)
    # of each stream two layers; the embedding's normalisation forward, again and backward; the maximum and its gradient
    assert len(seen) == 2 * (2 * 18 + 3 + 2), len(seen)


def test_inference(device: torch.device) -> None:
    plain, fused = encoders(device)
    tokens = torch.randn(3, 9, 15), torch.randn(3, 5, 27)
    expected = plain.eval().streams(*(t.double() for t in tokens))
    with torch.no_grad():
        for encoder in (fused.eval(), fused.eval().optimize_for_inference()):
            for actual, value in zip(encoder.streams(*(t.to(device) for t in tokens)), expected, strict=True):
                torch.testing.assert_close(actual.double().cpu(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "drop_path, memory, backend, dtype",
    [(0.3, "lean", "fastskel", torch.float32), (0.0, "layer", "sdpa", torch.float32), (0.3, "lean", "fastskel", torch.bfloat16)],
)
def test_compiled_into_one_graph(drop_path, memory, backend, dtype, device: torch.device) -> None:
    _, fused = encoders(device, drop_path=drop_path)
    fused.to(dtype).configure(memory=memory, attention_backend=backend)
    tokens = torch.randn(3, 9, 15, device=device, dtype=dtype), torch.randn(3, 5, 27, device=device, dtype=dtype)
    fused.train()

    def gradients(call: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        torch.manual_seed(3)
        fused.zero_grad()
        t, s = call(*tokens)
        ((t**3).sum() + (s**3).sum()).backward()
        return [t.detach(), s.detach(), *(p.grad.clone() for p in fused.parameters())]

    expected = gradients(fused.streams)
    torch.compiler.reset()
    found = gradients(torch.compile(fused.streams, backend="aot_eager", fullgraph=True))
    for actual, value in zip(found, expected, strict=True):
        assert actual.dtype == value.dtype
        # in bfloat16 the same operations, but for the embedding's and the core's
        limit = 1e-4 if dtype == torch.float32 else 0.1
        assert float((actual - value).norm() / value.norm().clamp_min(1e-3)) < limit
    frozen = fused.eval().optimize_for_inference()
    compiled = torch.compile(frozen.streams, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for actual, value in zip(compiled(*tokens), frozen.streams(*tokens), strict=True):
            assert float((actual - value).norm() / value.norm()) < limit
    torch.compiler.reset()


# --- without kernels: the operator that a compiler sees, and refusals


def operands(memory: str, masked: bool, core: str = "own") -> tuple[object, ...]:
    layer, attention = build(6, 16), dst_function.Attention(1, core == "own", core)
    merged = layer._weights(layer.merged.get(layer.CA.attn, attention, torch.float64))
    weights = [weight.detach().requires_grad_() for weight in merged]
    scales = torch.tensor([[[0.0, 1, 2, 1, 0, 1]], [[2.0, 1, 1, 0, 1, 1]]], dtype=torch.float64) if masked else None
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    return x, weights, scales, False, *attention, *(torch.float64,) * 3, 0.5, 4, 1e-5, memory, "torch"


@pytest.mark.parametrize("memory", ["lean", "layer"])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked, memory) -> None:
    torch.library.opcheck(torch.ops.fastskel.dst_layer.default, operands(memory, masked))


def test_opcheck_of_a_borrowed_core() -> None:
    # its gradient is autograd's, which is off inside an operator
    torch.library.opcheck(
        torch.ops.fastskel.dst_layer.default, operands("lean", False, "sdpa"), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("kept", [False, True], ids=["all dropped", "none dropped"])
def test_a_compiled_layer_masks(kept) -> None:
    drops = drops_of(np.full((2, NUM_DROP_PATHS), kept), "skip", torch.device("cpu"))
    with pytest.raises(ValueError, match="drops must be masked in a compiled layer, got skipped"):
        dst_layer(torch.zeros(2, 5, 16), None, drops, None)


def test_refused_without_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"kernels: 'triton' must run on a GPU, got cpu"):
        build(6, 16).float()(torch.zeros(1, 6, 16), kernels="triton")
    with pytest.raises(ValueError, match=r"kernels: must be one of .* got 'fast'"):
        build(6, 16)(torch.zeros(1, 6, 16).double(), kernels="fast")


def test_fp64_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"'triton' must compute in one of .* got torch.float64"):
        build(6, 16).to(device)(torch.zeros(1, 6, 16, device=device).double(), kernels="triton")


def test_passes_agree_on_what_they_keep() -> None:
    assert dst_fused.Kept is dst_function.Kept
