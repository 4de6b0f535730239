"""The post-norm layer against its formulae, written out plainly, and against torch's own layer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastskel.models import STTR
from fastskel.nn import post_norm
from fastskel.nn.post_norm import PostNormLayer, PostNormStack

MEMORY = ["saved", "lean", "layer"]
# (rows, tokens, width, heads)
CASES = [(1, 1, 4, 1), (3, 5, 6, 1), (2, 9, 6, 3), (4, 3, 5, 1), (2, 7, 5, 5), (1, 6, 8, 2)]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))


@pytest.fixture(autouse=True)
def _poison():
    """Uninitialised memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def layer_norm(norm: torch.nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def attention(module: torch.nn.MultiheadAttention, x: Tensor) -> Tensor:
    q, k, v = (x @ module.in_proj_weight.T + module.in_proj_bias).chunk(3, -1)
    size, heads = x.shape[-1] // module.num_heads, []
    for h in range(module.num_heads):
        part = slice(h * size, (h + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
        heads.append(torch.softmax(scores, -1) @ v[..., part])
    return torch.cat(heads, -1) @ module.out_proj.weight.T + module.out_proj.bias


def naive_layer(layer: PostNormLayer, x: Tensor) -> Tensor:
    """Section 1.10 of the specification, step by step."""
    x = layer_norm(layer.norm1, x + attention(layer.self_attn, x))
    hidden = torch.relu(x @ layer.linear1.weight.T + layer.linear1.bias)
    return layer_norm(layer.norm2, x + hidden @ layer.linear2.weight.T + layer.linear2.bias)


def make_case(case: tuple, dtype: torch.dtype = torch.float64) -> tuple[PostNormLayer, Tensor, Tensor]:
    """Return a layer, its input and a weight for its output."""
    rows, tokens, width, heads = case
    torch.manual_seed(0)
    layer = PostNormLayer(width, heads).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x, weight = torch.randn(2, rows, tokens, width).to(dtype)
    return layer, x.requires_grad_(), weight


def results(layer: PostNormLayer, x: Tensor, weight: Tensor, **how: str) -> dict[str, Tensor]:
    """Output and the gradients of x and every parameter."""
    return gradients(layer, x, weight, layer(x, **how))


def gradients(layer: PostNormLayer, x: Tensor, weight: Tensor, out: Tensor) -> dict[str, Tensor]:
    inputs = {"x": x, **dict(layer.named_parameters())}
    found = torch.autograd.grad((out * weight).sum(), list(inputs.values()))
    return {"out": out.detach(), **dict(zip(inputs, found, strict=True))}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("backend", ["auto", "fastskel", "sdpa", "math"])
@every_case
def test_layer_equals_its_formulae(case, backend, memory):
    layer, x, weight = make_case(case)
    expected = gradients(layer, x, weight, naive_layer(layer, x))
    actual = results(layer, x, weight, backend=backend, memory=memory)
    torch.testing.assert_close(actual["out"], expected["out"], rtol=1e-11, atol=1e-11)
    for name, value in expected.items():
        # fp64 rounding, amplified by two normalisations over 4 to 8 features
        torch.testing.assert_close(
            actual[name], value, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["fastskel", "sdpa", "math"])
@every_case
def test_memory_modes_are_equal_to_the_bit(case, backend, dtype):
    """What is computed again is computed as before, where the input is kept as it came."""
    layer, x, weight = make_case(case, dtype)
    saved, *others = (results(layer, x, weight, memory=memory, backend=backend) for memory in MEMORY)
    assert all(value.isfinite().all() for value in saved.values())
    for other in others:
        assert [name for name in saved if not torch.equal(saved[name], other[name])] == []


@every_case
def test_backends_agree(case):
    layer, x, weight = make_case(case)
    expected = results(layer, x, weight, backend="math")
    for backend in ("auto", "fastskel", "sdpa"):
        actual = results(layer, x, weight, backend=backend)
        # 1e-12 of the largest number of each tensor: sums of fp64 in another order
        for name, value in expected.items():
            assert (actual[name] - value).abs().max() <= 1e-12 * max(1.0, value.abs().max().item()), name


@pytest.mark.parametrize("heads", [1, 2])
def test_gradients_are_those_of_the_values(heads):
    layer, x, _ = make_case((2, 3, 4, heads))
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("heads", [1, 2])
def test_stack_equals_torchs_encoder(heads):
    torch.manual_seed(0)
    stack = PostNormStack(PostNormLayer(8, heads) for _ in range(3)).double()
    single = torch.nn.TransformerEncoderLayer(8, heads, 8, dropout=0.0, batch_first=True)
    whole = torch.nn.TransformerEncoder(single, 3, enable_nested_tensor=False).double()
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    whole.load_state_dict(stack.state_dict(), strict=True)
    x = torch.randn(2, 5, 8).double()
    out, expected = stack(x), whole(x)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    # normalised features sum to a constant: squares have a gradient
    (out**3).sum().backward()
    (expected**3).sum().backward()
    truth = dict(whole.named_parameters())
    for name, parameter in stack.named_parameters():
        torch.testing.assert_close(parameter.grad, truth[name].grad, rtol=1e-9, atol=1e-10)


def test_layers_start_equal_and_apart():
    first, second = STTR(num_joints=2, num_frames=3, width=8, init="torch").get_submodule("t_tr").layers
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    assert list(first.state_dict()) == list(torch.nn.TransformerEncoderLayer(8, 1, 8).state_dict())
    # nor do they share what they keep of their merged projections
    assert first.merged is not second.merged


def test_rectified_features_pass_no_gradient():
    """With hidden features all negative the layer is two normalisations around attention."""
    layer, x, weight = make_case((2, 4, 6, 1))
    with torch.no_grad():
        layer.linear1.bias.fill_(-1e3)
    found = results(layer, x, weight)
    assert not found["linear1.weight"].any() and not found["linear1.bias"].any() and not found["linear2.weight"].any()
    assert found["linear2.bias"].any()
    bare = layer_norm(layer.norm1, x + attention(layer.self_attn, x)) + layer.linear2.bias
    torch.testing.assert_close(found["out"], layer_norm(layer.norm2, bare).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_keeps_the_residual_stream_in_fp32(dtype):
    layer, x, weight = make_case((2, 5, 6, 1), torch.float32)
    with torch.autocast("cpu", dtype):
        found = results(layer, x, weight)
    plain = results(layer, x, weight)
    assert {value.dtype for value in found.values()} == {torch.float32}
    for name, value in plain.items():
        # a handful of half-precision roundings of normalised values, summed over 10 tokens
        assert (found[name] - value).abs().max() < 60 * torch.finfo(dtype).eps * max(1.0, value.abs().max().item()), (
            name
        )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 5, 7)), r"x must be \(N, S, 6\), got \(2, 5, 7\)"),
        (dict(x=torch.zeros(2, 0, 6)), r"x must be \(N, S, 6\), got \(2, 0, 6\)"),
        (dict(x=torch.zeros(5, 6)), r"x must be \(N, S, 6\), got \(5, 6\)"),
        (dict(x=torch.zeros(2, 5, 6, dtype=torch.int64)), "input must be floating point, got torch.int64"),
        (dict(x=torch.zeros(2, 5, 6).double()), "input must have the weights' type torch.float32, got torch.float64"),
        (dict(backend="flash"), "must be one of .*'auto'.*, got 'flash'"),
        (dict(memory="none"), "memory.* must be one of .*'lean'.*, got 'none'"),
    ],
    ids=["width", "no tokens", "dims", "integers", "type", "backend", "memory"],
)
def test_refusals(change, message):
    layer = PostNormLayer(6, 1)
    with pytest.raises(ValueError, match=message):
        layer(**({"x": torch.zeros(2, 5, 6)} | change))


@every_case
@pytest.mark.parametrize("memory", MEMORY)
def test_without_gradients_nothing_is_kept(case, memory, monkeypatch) -> None:
    asked, attend = [], post_norm.attend

    def watched(*arguments, keep):
        asked.append(keep)
        return attend(*arguments, keep=keep)

    monkeypatch.setattr(post_norm, "attend", watched)
    layer, x, _ = make_case(case)
    with torch.no_grad():
        y = layer(x, memory=memory)
        # as it would be if it were kept
        monkeypatch.setattr(post_norm, "memory_in_use", lambda memory: memory)
        assert torch.equal(y, layer(x, memory=memory))
    assert asked == [False, memory != "layer"]
