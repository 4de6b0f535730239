"""The dense spatio-temporal layer against its formulae, written out plainly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastskel.nn.drop_path import NUM_DROP_PATHS, LayerDrops, masked_drops, skipped_drops
from fastskel.nn.dst_layer import DSTLayer

RATE = 0.3
MEMORY = ["saved", "lean", "layer"]
# (tokens configured, tokens given, width, heads, alpha, gap)
CASES = [
    (1, 1, 4, 1, 0.5, 4), (5, 5, 6, 1, 0.5, 4), (9, 9, 6, 3, 0.3, 2), (6, 6, 5, 1, 0.0, 1), (8, 3, 4, 2, 1.0, 4),
    (9, 6, 8, 2, 0.5, 4), (4, 4, 4, 1, 0.5, 9), (7, 5, 5, 5, 0.25, 3), (6, 1, 3, 1, 1.0, 2),
]  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))


def masks() -> dict[str, np.ndarray]:
    """Branches kept, (N, 6) each."""
    found = {"whole": np.ones((3, 6), bool), "nothing": np.zeros((3, 6), bool)}
    found |= {"one-whole": np.ones((1, 6), bool), "one-nothing": np.zeros((1, 6), bool)}
    found |= {f"random{seed}": np.random.default_rng(seed).random((4, 6)) < 0.6 for seed in range(3)}
    for branch in range(NUM_DROP_PATHS):
        alone = np.arange(6) == branch
        found[f"all-but-{branch}"] = np.broadcast_to(~alone, (2, 6)).copy()
        found[f"only-{branch}"] = np.broadcast_to(alone, (2, 6)).copy()
        # one sample loses the branch, the other one keeps it
        found[f"one-loses-{branch}"] = np.stack([~alone, np.ones(6, bool)])
    return found


MASKS = masks()


@pytest.fixture(autouse=True)
def _poison():
    """Uninitialised memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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


def shift(layer: DSTLayer, x: Tensor) -> Tensor:
    dsa, n, f = layer.DSA, x.shape[1], x.permute(0, 2, 1)
    g = torch.relu(f @ dsa.wt1.weight[:n, :n].T + dsa.wt1.bias[:n]) @ dsa.wt2.weight[:n, :n].T + dsa.wt2.bias[:n] + f
    g = g.clone()
    g[:, :, 0 :: layer.gap] = f[:, :, 0 :: layer.gap]
    return g.permute(0, 2, 1)


def naive_layer(layer: DSTLayer, x: Tensor, scale: Tensor) -> Tensor:
    """Sections 1.6 to 1.8 of the specification, step by step; scale (N, 6) in the order of the calls."""
    ca, dsa, factor = layer.CA, layer.DSA, [scale[:, i, None, None] for i in range(NUM_DROP_PATHS)]
    f = x.permute(0, 2, 1)
    xc = (f + torch.relu(torch.nn.functional.conv1d(f, ca.conv1.weight, ca.conv1.bias))).permute(0, 2, 1)
    u = factor[0] * attention(ca.attn, layer_norm(ca.norm1, xc)) + x
    ca_out = factor[1] * mlp(ca.mlp, layer_norm(ca.norm2, u))

    p1 = shift(layer, x)
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


def make_case(case: tuple, rows: int) -> tuple[DSTLayer, Tensor, Tensor]:
    """Return a layer, its input and a weight for its output."""
    configured, tokens, width, heads, alpha, gap = case
    layer = make_layer(configured, width, heads, alpha, gap)
    x, weight = torch.randn(2, rows, tokens, width, dtype=torch.float64)
    return layer, x.requires_grad_(), weight


def drops_of(kept: np.ndarray, mode: str = "skip") -> LayerDrops:
    if mode == "mask":
        (drops,) = masked_drops(torch.from_numpy(kept[:, None] / (1 - RATE)))
    else:
        (drops,) = skipped_drops(kept[:, None], RATE, torch.device("cpu"))
    return drops


def results(layer: DSTLayer, x: Tensor, weight: Tensor, drops: LayerDrops | None, **how: str) -> dict[str, Tensor]:
    """Output and the gradients of x and every parameter."""
    out = layer(x, drops, **how)
    inputs = {"x": x, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad((out * weight).sum(), list(inputs.values()))
    return {"out": out.detach(), **dict(zip(inputs, gradients, strict=True))}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, atol: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    "mask, mode",
    [("whole", "none"), ("one-whole", "none"), *((mask, "skip") for mask in MASKS),
     *((mask, "mask") for mask in ("whole", "nothing", "one-nothing", "random0", "random1", "random2"))],
)  # fmt: skip
@every_case
def test_layer_equals_its_formulae(case, mask, mode):
    kept = MASKS[mask]
    layer, x, weight = make_case(case, len(kept))
    drops, factor = (None, 1.0) if mode == "none" else (drops_of(kept, mode), 1 / (1 - RATE))
    expected = naive_layer(layer, x, torch.from_numpy(kept * factor))
    inputs = {"x": x, **dict(layer.named_parameters())}
    truth = torch.autograd.grad((expected * weight).sum(), list(inputs.values()))
    truth = {"out": expected.detach(), **dict(zip(inputs, truth, strict=True))}
    # fp64 rounding, amplified by normalisation over 3 to 8 features and by sums over rows and tokens
    assert_same(results(layer, x, weight, drops), truth, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(layer(x, drops), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "backend, mode, dtype",
    [("fastskel", "skip", torch.float64), ("sdpa", "skip", torch.float64), ("math", "mask", torch.float64),
     ("fastskel", "skip", torch.float32), ("auto", "mask", torch.bfloat16)],
    ids=str,
)  # fmt: skip
@every_case
def test_memory_modes_are_equal_to_the_bit(case, backend, mode, dtype):
    """What is computed again is computed as before, where the input is kept as it came."""
    layer, x, weight = make_case(case, 4)
    layer, x, weight = layer.to(dtype), x.detach().to(dtype).requires_grad_(), weight.to(dtype)
    drops = drops_of(MASKS["random1"], mode)
    saved, *others = (results(layer, x, weight, drops, memory=memory, backend=backend) for memory in MEMORY)
    assert all(value.isfinite().all() for value in saved.values())
    for other in others:
        assert [name for name in saved if not torch.equal(saved[name], other[name])] == []


@pytest.mark.parametrize("mask", ["whole", "random0", "nothing"])
@every_case
def test_backends_agree(case, mask):
    layer, x, weight = make_case(case, len(MASKS[mask]))
    drops = drops_of(MASKS[mask])
    expected = results(layer, x, weight, drops, backend="math")
    for backend in ("auto", "fastskel", "sdpa"):
        actual = results(layer, x, weight, drops, backend=backend)
        # 1e-12 of the largest number of each tensor: sums of fp64 in another order
        for name, value in expected.items():
            bound = 1e-12 * max(1.0, value.abs().max().item())
            assert (actual[name] - value).abs().max() <= bound, name


@pytest.mark.parametrize("mode", ["skip", "mask", "none"])
@pytest.mark.parametrize("heads", [1, 2])
def test_gradients_are_those_of_the_values(mode, heads):
    layer = make_layer(4, 4, heads, 0.3, 2)
    kept = np.array([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 1]], bool)
    drops = None if mode == "none" else drops_of(kept, mode)
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, drops))

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


def test_weights_of_absent_tokens_get_zero_gradients_and_not_none():
    layer = make_layer(9, 6, 1, 0.5, 4)
    layer(torch.randn(2, 6, 6).double()).square().sum().backward()
    for linear in (layer.DSA.wt1, layer.DSA.wt2):
        assert linear.weight.grad.shape == (9, 9) and linear.bias.grad.shape == (9,)
        assert (
            not linear.weight.grad[6:].any() and not linear.weight.grad[:, 6:].any() and not linear.bias.grad[6:].any()
        )
        assert linear.weight.grad[:6, :6].any() and linear.bias.grad[:6].any()


@pytest.mark.parametrize("mode", ["skip", "mask"])
def test_dropped_branches_vanish(mode):
    layer = make_layer(5, 6, 1, 0.5, 4)
    x = torch.randn(2, 5, 6).double()
    kept = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], bool)
    out = layer(x, drops_of(kept, mode))
    # each row by its own factor: fp64 rounding of products in blocks of another size
    torch.testing.assert_close(out[:1], layer(x[:1], drops_of(kept[:1], mode)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[1:], 0.25 * (shift(layer, x) + x)[1:], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "branches, modules",
    [((1,), ["CA.mlp", "CA.conv1", "CA.norm1", "CA.norm2"]), ((0,), ["CA.conv1", "CA.norm1"]),
     ((0, 2, 4), ["CA.attn", "DSA.norm1"]), ((3, 5), ["DSA.mlp.fc1", "DSA.norm2"])],
    ids=str,
)  # fmt: skip
def test_work_that_is_dropped_is_not_done(branches, modules):
    """Poisoned weights that only dropped branches use reach neither output nor gradient."""
    layer, x, weight = make_case((5, 5, 6, 1, 0.5, 4), 3)
    kept = np.ones((3, 6), bool)
    kept[:, list(branches)] = False
    clean = results(layer, x, weight, drops_of(kept))
    poisoned = [name for name, _ in layer.named_parameters() if name.startswith(tuple(modules))]
    with torch.no_grad():
        for name in poisoned:
            layer.get_parameter(name).fill_(math.nan)
    actual = results(layer, x, weight, drops_of(kept))
    for name, value in clean.items():
        if name in poisoned:
            # folded and merged weights have a gradient of their own: it may be anything
            assert not value.any()
        else:
            torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12)


def test_dropping_saves_multiplications():
    """By a counter: half of the samples cost half, but for the token mixture, which is never dropped."""
    layer, rows, tokens, width = make_layer(8, 64, 1, 0.5, 4).float(), 8, 8, 64
    x = torch.randn(rows, tokens, width)

    def flops(share: float) -> int:
        kept = np.broadcast_to((np.arange(rows) < share * rows)[:, None], (rows, 6)).copy()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(x, drops_of(kept))
        return counter.get_total_flops()

    with torch.no_grad():
        # the merged projections are kept from here on
        layer(x)
    # never dropped: the token mixture, to six live rows of eight, 0 and 4 being dead; the shared second linear of 2 D^2
    nothing = 2 * rows * (width * (tokens * tokens + tokens * 6) + tokens * 2 * width**2)
    # D^2 per token: merged query and merged output of 3 attentions, convolution 1, CA's MLP 4, first linears of DSA's 2 and 2
    branches = 2 * rows * (tokens * (3 * 2 + 1 + 4 + 2 * 2) * width**2 + 3 * 2 * tokens * tokens * width)
    assert [flops(share) for share in (0.0, 0.5, 1.0)] == [nothing, nothing + branches // 2, nothing + branches]


def test_both_attentions_are_one_module():
    layer = make_layer(5, 6, 1, 0.5, 4)
    assert layer.CA.attn is layer.DSA.attn
    assert sum("attn" in name for name, _ in layer.named_parameters()) == 4
    assert sum("attn" in name for name in layer.state_dict()) == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_keeps_the_residual_stream_in_fp32(dtype):
    layer = make_layer(5, 6, 1, 0.5, 4).float()
    x = torch.randn(2, 5, 6)
    with torch.autocast("cpu", dtype):
        out = layer(x)
        # with all branches dropped, what is left is the residual stream and the token mixture
        rest = layer(x, drops_of(np.zeros((2, 6), bool)))
    assert out.dtype == torch.float32
    # a handful of half-precision roundings of values of size 1
    assert (out - layer(x)).abs().max() < 20 * torch.finfo(dtype).eps
    # tokens behind the gap have not been rounded at all
    assert torch.equal(rest[:, 0::4], 0.5 * x[:, 0::4])


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_strides_do_not_matter(layout):
    layer = make_layer(5, 6, 1, 0.5, 4)
    x = {
        "transposed": lambda: torch.randn(3, 6, 5).double().mT,
        "expanded": lambda: torch.randn(1, 5, 6).double().expand(3, 5, 6),
        "sliced": lambda: torch.randn(3, 7, 9).double()[:, 1:6, 2:8],
    }[layout]()
    weight = torch.randn(6, 5, 3).double().permute(2, 1, 0)
    actual = results(layer, x.requires_grad_(), weight, None)
    expected = results(layer, x.detach().contiguous().requires_grad_(), weight.contiguous(), None)
    assert_same(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 6, 6)), r"x must be \(N, 1\.\.5, 6\), got \(2, 6, 6\)"),
        (dict(x=torch.zeros(2, 0, 6)), r"x must be \(N, 1\.\.5, 6\), got \(2, 0, 6\)"),
        (dict(x=torch.zeros(2, 5, 7)), r"x must be \(N, 1\.\.5, 6\), got \(2, 5, 7\)"),
        (dict(x=torch.zeros(5, 6)), r"x must be \(N, 1\.\.5, 6\), got \(5, 6\)"),
        (dict(x=torch.zeros(2, 5, 6, dtype=torch.int64)), "input must be floating point, got torch.int64"),
        (dict(x=torch.zeros(2, 5, 6).double()), "input must have the weights' type torch.float32, got torch.float64"),
        (dict(backend="flash"), "must be one of .*'auto'.*, got 'flash'"),
        (dict(memory="none"), "memory.* must be one of .*'lean'.*, got 'none'"),
    ],
    ids=["too many tokens", "no tokens", "width", "dims", "integers", "type", "backend", "memory"],
)
def test_refusals(change, message):
    layer = make_layer(5, 6, 1, 0.5, 4).float()
    with pytest.raises(ValueError, match=message):
        layer(**({"x": torch.zeros(2, 5, 6)} | change))
