"""Merged projections: the same attention, gradients for the original parameters, and never a stale product."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from fastskel.models import DSTE, STTR
from fastskel.nn import projections
from fastskel.nn.dst_layer import DSTLayer
from fastskel.nn.post_norm import PostNormLayer

FAMILY = pytest.mark.parametrize("kind", ["dst", "post-norm"])


def make_layer(kind: str, width: int = 8, heads: int = 1, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    layer = DSTLayer(5, width, heads, 0.5, 4) if kind == "dst" else PostNormLayer(width, heads)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer.to(dtype)


def attention_of(layer: nn.Module) -> nn.MultiheadAttention:
    return next(module for module in layer.modules() if isinstance(module, nn.MultiheadAttention))


def tokens(layer: nn.Module, seed: int = 0) -> Tensor:
    weight = attention_of(layer).in_proj_weight
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 5, weight.shape[1], generator=generator, dtype=torch.float64).to(weight.dtype)


@pytest.fixture
def merges(monkeypatch):
    """List with one entry for each merge."""
    calls: list[torch.dtype] = []
    plain = projections.merge

    def counting(in_weight: Tensor, *rest: Tensor) -> projections.Projections:
        calls.append(in_weight.dtype)
        return plain(in_weight, *rest)

    monkeypatch.setattr(projections, "merge", counting)
    return calls


@FAMILY
@pytest.mark.parametrize("width", [1, 5, 8, 33])
def test_merged_equals_unmerged(kind, width):
    layer = make_layer(kind, width)
    x = tokens(layer).requires_grad_()
    names, inputs = zip(*[("x", x), *layer.named_parameters()], strict=True)
    outs, gradients = [], []
    for backend in ("fastskel", "math"):
        outs.append(layer(x, backend=backend))
        gradients.append(torch.autograd.grad((outs[-1] ** 3).sum(), inputs))
    # 1e-12 of the largest number of each tensor: fp64 products in another order
    assert (outs[0] - outs[1]).abs().max() <= 1e-12 * outs[1].abs().max()
    for name, merged, plain in zip(names, *gradients, strict=True):
        assert merged.shape == plain.shape
        assert (merged - plain).abs().max() <= 1e-12 * max(1.0, plain.abs().max().item()), name


@FAMILY
def test_the_key_bias_gets_a_zero_gradient_and_not_none(kind):
    layer = make_layer(kind)
    attn = attention_of(layer)
    (layer(tokens(layer), backend="fastskel") ** 3).sum().backward()
    query, key, value = attn.in_proj_bias.grad.chunk(3)
    assert not key.any() and query.any() and value.any()
    assert all(parameter.grad is not None for parameter in attn.parameters())


def test_merging_is_differentiated_correctly():
    attn = attention_of(make_layer("post-norm", 4))
    names = [name for name, _ in attn.named_parameters()]

    def call(*parameters: Tensor) -> tuple[Tensor, ...]:
        holder = copy.deepcopy(attn)
        for name, parameter in zip(names, parameters, strict=True):
            owner, _, leaf = name.rpartition(".")
            module = holder.get_submodule(owner)
            del module._parameters[leaf]
            setattr(module, leaf, parameter)
        return tuple(projections.merge_projections(holder, torch.float64))

    assert torch.autograd.gradcheck(call, tuple(attn.parameters()))


@pytest.mark.parametrize(
    "width, heads, expected", [(8, 1, True), (8, 2, False), (8, 8, False), (1, 1, True), (9, 3, False), (2, 2, False)]
)
def test_merging_pays_for_one_head(width, heads, expected, merges):
    assert projections.pays(width, heads) is expected
    for kind in ("dst", "post-norm"):
        layer = make_layer(kind, width, heads)
        layer(tokens(layer), backend="fastskel").sum().backward()
    assert len(merges) == (2 if expected else 0)


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_plain_backends_do_not_merge(backend, merges):
    layer = make_layer("dst")
    layer(tokens(layer), backend=backend).sum().backward()
    with torch.no_grad():
        layer(tokens(layer), backend=backend)
    assert merges == []


@FAMILY
def test_a_pass_with_gradient_merges_anew_and_one_without_keeps(kind, merges):
    layer = make_layer(kind)
    x = tokens(layer)
    for _ in range(2):
        layer(x)
    assert len(merges) == 2
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    assert len(merges) == 3
    # keeping does not depend on the mode, and what was kept serves a frozen attention too
    layer.eval().requires_grad_(False)
    layer(x)
    assert len(merges) == 3
    layer.requires_grad_(True)
    layer(x)
    assert len(merges) == 4


def _step(layer: nn.Module) -> None:
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    (layer(tokens(layer)) ** 3).sum().backward()
    optimiser.step()


def _load(layer: nn.Module) -> None:
    layer.load_state_dict({key: value + 0.5 for key, value in layer.state_dict().items()})


def _assign(layer: nn.Module) -> None:
    layer.load_state_dict({key: value + 0.5 for key, value in layer.state_dict().items()}, assign=True)


def _in_place(layer: nn.Module) -> None:
    with torch.no_grad():
        attention_of(layer).out_proj.weight.mul_(1.5)


def _replace(layer: nn.Module) -> None:
    attn = attention_of(layer)
    attn.in_proj_weight = nn.Parameter(attn.in_proj_weight.detach() * 1.5)


def _data_replaced(layer: nn.Module) -> None:
    attn = attention_of(layer)
    attn.in_proj_weight.data = attn.in_proj_weight.data * 1.5


def _data_bias(layer: nn.Module) -> None:
    attention_of(layer).in_proj_bias.data.add_(0.5)


def _data_negated(layer: nn.Module) -> None:
    attention_of(layer).in_proj_weight.data.neg_()


def _data_doubled(layer: nn.Module) -> None:
    attention_of(layer).out_proj.weight.data.mul_(2.0)


def _data_scaled(layer: nn.Module) -> None:
    attention_of(layer).in_proj_weight.data.mul_(1.1)


def _data_rows_exchanged(layer: nn.Module) -> None:
    weight = attention_of(layer).in_proj_weight
    weight.data.copy_(weight.data.roll(3, 0))


def _data_columns_exchanged(layer: nn.Module) -> None:
    weight = attention_of(layer).in_proj_weight
    weight.data.copy_(weight.data.roll(2, 1))


CHANGES = {
    "optimiser step": _step, "load_state_dict": _load, "load_state_dict(assign=True)": _assign,
    "in-place operation": _in_place, "new parameter": _replace, "new data": _data_replaced, "data of a bias": _data_bias,
    "negated data": _data_negated, "doubled data": _data_doubled, "scaled data": _data_scaled,
    "data with rows exchanged": _data_rows_exchanged, "data with columns exchanged": _data_columns_exchanged,
}  # fmt: skip


# one element in 16 KiB, where sums of exponents wrap around
@pytest.mark.parametrize("width", [8, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_kept_follows_the_parameters(change, dtype, width, merges):
    layer = make_layer("post-norm", width, dtype=dtype)
    x = tokens(layer)
    with torch.no_grad():
        before = layer(x)
    change(layer)
    merges.clear()
    with torch.no_grad():
        after, fresh = layer(x), copy.deepcopy(layer)(x)
    assert torch.equal(after, fresh)
    assert not torch.equal(after, before)
    # one for the change, one for the copy
    assert len(merges) == 2


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16], ids=str)
def test_what_is_kept_follows_the_type(to, merges):
    layer = make_layer("dst", dtype=torch.float32)
    with torch.no_grad():
        layer(tokens(layer))
        layer.to(to)
        assert torch.equal(layer(tokens(layer)), copy.deepcopy(layer)(tokens(layer)))
    assert merges == [torch.float32, to, to]


def test_what_is_kept_serves_every_autocast(merges):
    """Merged in float32 and rounded where it is used."""
    layer = make_layer("dst", dtype=torch.float32)
    x = tokens(layer)
    with torch.no_grad():
        plain = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = layer(x)
        assert torch.equal(layer(x), plain)
    assert len(merges) == 1 and not torch.equal(low, plain)


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
@FAMILY
def test_copies_start_without(kind, twin, merges):
    layer = make_layer(kind)
    x = tokens(layer)
    with torch.no_grad():
        expected = layer(x)
        size = len(pickle.dumps(make_layer(kind)))
        # a product of D x D numbers would show
        assert abs(len(pickle.dumps(layer)) - size) < 8 * 8 * 8
        other = twin(layer)
        merges.clear()
        assert torch.equal(other(x), expected)
        assert len(merges) == 1
        # apart from each other
        attention_of(other).in_proj_weight.mul_(2.0)
        assert torch.equal(layer(x), expected) and not torch.equal(other(x), expected)
    assert len(merges) == 2


@FAMILY
def test_what_was_kept_in_inference_mode_serves_training(kind):
    """A frozen attention is merged without gradient, and what is around it is trained."""
    layer = make_layer(kind)
    attention_of(layer).requires_grad_(False)
    x = tokens(layer)
    with torch.inference_mode():
        expected = layer(x)
    out = layer(x)
    assert torch.equal(out, expected)
    (out**3).sum().backward()
    assert all((p.grad is None) == ("attn" in name) for name, p in layer.named_parameters())


@pytest.mark.parametrize("kind", [DSTE, STTR])
def test_every_layer_of_an_encoder_is_merged_once(kind, merges, make_view):
    encoder = kind(num_joints=3, num_frames=4, width=8).double().eval()
    view = make_view((2, 4, 2, 3, 3))
    with torch.no_grad():
        encoder(view)
        encoder(view)
    assert len(merges) == 4


def test_merged_weights_are_neither_parameters_nor_state():
    layer = make_layer("dst")
    keys = list(layer.state_dict())
    with torch.no_grad():
        layer(tokens(layer))
    assert list(layer.state_dict()) == keys and not any("merged" in key for key in keys)
    assert not any("merged" in name for name, _ in [*layer.named_parameters(), *layer.named_buffers()])
