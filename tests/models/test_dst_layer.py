"""The dense spatio-temporal layer against its formulae, written out plainly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastskel.nn.dst_layer import NUM_DROP_PATHS, DSTLayer


def layer_norm(norm: torch.nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def mlp(module: torch.nn.Module, x: Tensor) -> Tensor:
    hidden = x @ module.fc1.weight.T + module.fc1.bias
    return (0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))) @ module.fc2.weight.T + module.fc2.bias


def attention(module: torch.nn.MultiheadAttention, x: Tensor) -> Tensor:
    q, k, v = (x @ module.in_proj_weight.T + module.in_proj_bias).chunk(3, -1)
    size, heads = x.shape[-1] // module.num_heads, []
    for h in range(module.num_heads):
        part = slice(h * size, (h + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
        heads.append(torch.softmax(scores, -1) @ v[..., part])
    return torch.cat(heads, -1) @ module.out_proj.weight.T + module.out_proj.bias


def naive_layer(layer: DSTLayer, x: Tensor, scale: Tensor, gap: int) -> Tensor:
    """Sections 1.6 to 1.8 of the specification, step by step; scale (N, 6) in the order of the calls."""
    ca, dsa, factor = layer.CA, layer.DSA, [scale[:, i, None, None] for i in range(NUM_DROP_PATHS)]
    f = x.permute(0, 2, 1)
    xc = (f + torch.relu(torch.nn.functional.conv1d(f, ca.conv1.weight, ca.conv1.bias))).permute(0, 2, 1)
    u = factor[0] * attention(ca.attn, layer_norm(ca.norm1, xc)) + x
    ca_out = factor[1] * mlp(ca.mlp, layer_norm(ca.norm2, u))

    n = x.shape[1]
    g = torch.relu(f @ dsa.wt1.weight[:n, :n].T + dsa.wt1.bias[:n]) @ dsa.wt2.weight[:n, :n].T + dsa.wt2.bias[:n] + f
    g = g.clone()
    g[:, :, 0::gap] = f[:, :, 0::gap]
    p1 = g.permute(0, 2, 1)
    p1 = factor[2] * attention(dsa.attn, layer_norm(dsa.norm1, p1)) + p1
    p1 = factor[3] * mlp(dsa.mlp, layer_norm(dsa.norm2, p1)) + p1
    p2 = factor[4] * attention(dsa.attn, layer_norm(dsa.norm1, x)) + x
    p2 = factor[5] * mlp(dsa.mlp, layer_norm(dsa.norm2, p2)) + p2
    return layer.alpha * ca_out + (1 - layer.alpha) * 0.5 * (p1 + p2)


def make_layer(tokens: int, width: int, heads: int, alpha: float, gap: int) -> DSTLayer:
    torch.manual_seed(0)
    layer = DSTLayer(tokens, width, heads, alpha, gap).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("dropped", [False, True], ids=["whole", "dropped"])
@pytest.mark.parametrize(
    "configured, tokens, width, heads, alpha, gap",
    [(1, 1, 4, 1, 0.5, 4), (5, 5, 6, 1, 0.5, 4), (9, 9, 6, 3, 0.3, 2), (6, 6, 5, 1, 0.0, 1), (8, 3, 4, 2, 1.0, 4),
     (9, 6, 8, 2, 0.5, 4), (4, 4, 4, 1, 0.5, 9)],
)  # fmt: skip
def test_layer_equals_its_formulae(configured, tokens, width, heads, alpha, gap, dropped):
    layer = make_layer(configured, width, heads, alpha, gap)
    x = torch.randn(3, tokens, width).double().requires_grad_()
    scale = torch.randint(0, 2, (3, NUM_DROP_PATHS)).double() / 0.7 if dropped else None
    inputs, weight = [x, *layer.parameters()], torch.randn(3, tokens, width).double()
    out = layer(x, scale)
    expected = naive_layer(layer, x, torch.ones(3, 6).double() if scale is None else scale, gap)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    actual = torch.autograd.grad((out * weight).sum(), inputs)
    truth = torch.autograd.grad((expected * weight).sum(), inputs)
    for a, b in zip(actual, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dropped", [False, True], ids=["whole", "dropped"])
def test_gradients_are_those_of_the_values(dropped):
    layer = make_layer(3, 4, 2, 0.3, 2)
    scale = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]]).double() / 0.9
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        arguments = (x, scale if dropped else None)
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), arguments)

    x = torch.randn(2, 3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(call, (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("gap", [1, 2, 4])
def test_rows_behind_the_gap_get_zero_gradients_and_not_none(gap):
    layer = make_layer(9, 6, 1, 0.5, gap)
    layer(torch.randn(2, 9, 6).double()).square().sum().backward()
    for gradient in (layer.DSA.wt2.weight.grad, layer.DSA.wt2.bias.grad):
        dead = torch.arange(9) % gap == 0
        assert not gradient[dead].any()
        assert gap == 1 or gradient[~dead].flatten(1 if gradient.dim() > 1 else 0).any(-1).all()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_dropped_branches_vanish_exactly():
    layer = make_layer(5, 6, 1, 0.5, 4)
    x = torch.randn(2, 5, 6).double()
    one, nothing = torch.ones(2, 2).double(), torch.zeros(2, 4).double()
    assert not layer.CA(x, torch.stack([one[:, 0], nothing[:, 0]], 1)).any()
    assert torch.equal(layer.DSA(x, nothing), 0.5 * (layer.DSA.shift(x) + x))
    # each row by its own factor
    scale = torch.tensor([[1.0] * 6, [0.0] * 6]).double()
    whole, plain = layer(x, scale), layer(x)
    torch.testing.assert_close(whole[0], plain[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(whole[1], 0.25 * (layer.DSA.shift(x) + x)[1])


def test_both_attentions_are_one_module():
    layer = make_layer(5, 6, 1, 0.5, 4)
    assert layer.CA.attn is layer.DSA.attn
    assert sum("attn" in name for name, _ in layer.named_parameters()) == 4
    assert sum("attn" in name for name in layer.state_dict()) == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_keeps_the_residual_stream_in_fp32(dtype):
    layer = make_layer(5, 6, 1, 0.5, 4).float()
    x = torch.randn(2, 5, 6)
    with torch.autocast("cpu", dtype):
        out = layer(x, torch.ones(2, 6))
        assert layer.DSA.shift(x).dtype == torch.float32
    assert out.dtype == torch.float32
    # a handful of half-precision roundings of values of size 1
    assert (out - layer(x)).abs().max() < 20 * torch.finfo(dtype).eps
