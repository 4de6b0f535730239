"""A layer in pieces of rows gives what the whole gives, and keeps its tensors small."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastskel.data.batch import Batch
from fastskel.data.views import usdrl_views
from fastskel.models import DSTE
from fastskel.nn import dst_function, dst_pieces
from fastskel.nn.attention import Attention
from fastskel.nn.drop_path import (
    CA_ATTENTION,
    CA_MLP,
    NO_DROPS,
    NUM_DROP_PATHS,
    LayerDrops,
    masked_drops,
    skipped_drops,
)
from fastskel.nn.dst_function import LayerSpec
from fastskel.nn.dst_layer import DSTLayer
from fastskel.nn.memory import MEMORY_MODES
from fastskel.nn.precision import Precision
from fastskel.objectives import MGFD

ROWS, TOKENS, WIDTH, RATE = 23, 9, 8, 0.4
MODES = ("none", "skip", "mask")
BYTES = 8 << 10
# gradients of weights are rounded once in each piece, instead of once
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2 * 2.0**-8}


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dst_pieces, "PIECE_BYTES", BYTES)
    monkeypatch.setattr(dst_pieces, "LEAST_TOKENS", 1)


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every forward pass of a layer."""
    found: list[int] = []
    forward = dst_function.forward

    def counted(x: Tensor, *rest: Any) -> Any:
        found.append(len(x))
        return forward(x, *rest)

    monkeypatch.setattr(dst_function, "forward", counted)
    return found


def kept_of(rows: int) -> np.ndarray:
    kept = np.random.default_rng(3).random((rows, 1, NUM_DROP_PATHS)) >= RATE
    # a piece without any row, and one with all
    kept[:4], kept[-4:] = False, True
    return kept


def drops_of(mode: str, rows: int = ROWS) -> LayerDrops:
    if mode == "none":
        return NO_DROPS
    if mode == "skip":
        return skipped_drops(kept_of(rows), RATE, torch.device("cpu"), slots=False)[0]
    return masked_drops(torch.from_numpy(kept_of(rows) / (1.0 - RATE)))[0]


def layer_of(dtype: torch.dtype, heads: int = 1) -> DSTLayer:
    torch.manual_seed(0)
    layer = DSTLayer(TOKENS, WIDTH, heads, 0.3, 4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer.to(torch.float32 if dtype == torch.bfloat16 else dtype)


def run(layer: DSTLayer, mode: str, memory: Any, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(ROWS, TOKENS, WIDTH, generator=generator).to(layer.CA.conv1.weight.dtype) for _ in range(2))
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = layer(x.requires_grad_(), drops_of(mode), memory=memory)
    y.backward(g)
    return y.detach(), {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}  # type: ignore[dict-item]


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("memory", MEMORY_MODES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_pieces_give_what_the_whole_gives(dtype, mode, memory, heads, monkeypatch, lengths):
    layer = layer_of(dtype, heads)
    y, grads = run(layer, mode, memory, dtype)
    assert set(lengths) == {ROWS}
    lengths.clear()
    monkeypatch.setattr(dst_pieces, "PIECE_BYTES", BYTES)
    monkeypatch.setattr(dst_pieces, "LEAST_TOKENS", 1)
    again, found = run(layer, mode, memory, dtype)
    assert sum(lengths) == (2 if memory == "layer" else 1) * ROWS and max(lengths) < ROWS / 2
    limit = ROUNDING[dtype]
    torch.testing.assert_close(again, y, rtol=limit, atol=limit)
    assert found.keys() == grads.keys()
    for name, grad in grads.items():
        distance = torch.linalg.vector_norm((found[name] - grad).double())
        # gradients of key biases are zero
        assert distance <= limit * torch.linalg.vector_norm(grad.double()) + 1e-30, name


@pytest.mark.parametrize("memory", MEMORY_MODES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.usefixtures("in_pieces")
def test_without_gradients_nothing_is_kept(dtype, mode, memory, monkeypatch):
    layer, forward, kept = layer_of(dtype), dst_pieces.forward, []

    def watched(*arguments: Any) -> Any:
        y, saved = forward(*arguments)
        kept.append(len(saved))
        return y, saved

    monkeypatch.setattr(dst_pieces, "forward", watched)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        x = torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).to(layer.CA.conv1.weight.dtype)
        y = layer(x, drops_of(mode), memory=memory)
    assert kept == [0]
    # the bits are those of a pass that is differentiated
    assert torch.equal(y, run(layer, mode, memory, dtype)[0]) and (kept[1] > 0) == (memory != "layer")


@pytest.mark.parametrize("mode", MODES)
def test_plans_of_parts_say_what_the_plan_says(mode):
    whole, rows = drops_of(mode), torch.arange(ROWS)
    attention = rows if whole.rows[CA_ATTENTION] is None else whole.rows[CA_ATTENTION]
    joined: list[list[Tensor]] = [[] for _ in range(NUM_DROP_PATHS)]
    for begin, end in ((0, 4), (4, 13), (13, ROWS)):
        part = whole.part(begin, end)
        for branch, kept in enumerate(part.rows):
            joined[branch].append(rows[begin:end] if kept is None else begin + kept)
        # the same samples, whichever way they are counted
        mlp = rows[: end - begin] if part.rows[CA_MLP] is None else part.rows[CA_MLP]
        assert part.inner is None or (part.inner >= 0).all()
        inner = mlp if part.inner is None else mlp[part.inner]
        inside = attention[(attention >= begin) & (attention < end)] - begin
        assert inner.tolist() == inside.tolist()
        for factor, of_all in zip((*part.factors, part.bias), (*whole.factors, whole.bias), strict=True):
            assert torch.equal(torch.as_tensor(factor), of_all[begin:end] if isinstance(of_all, Tensor) else torch.tensor(of_all))
    for parts, kept in zip(joined, whole.rows, strict=True):
        assert torch.cat(parts).tolist() == (rows if kept is None else kept).tolist()


class Largest(TorchDispatchMode):
    """Bytes of the largest memory behind a result."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.found = max(self.found, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("backend", ["fastskel", "math", "sdpa"])
@pytest.mark.parametrize("tokens", [4, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_of_a_piece_is_larger_than_said(dtype, tokens, backend, monkeypatch):
    # input, output and their gradients are whole: as many rows as make them that large
    size, row = 1 << 18, 4 * tokens * WIDTH
    monkeypatch.setattr(dst_pieces, "PIECE_BYTES", size)
    monkeypatch.setattr(dst_pieces, "LEAST_TOKENS", 1)
    layer, x = DSTLayer(tokens, WIDTH, 1, 0.5, 4), torch.randn(size // row, tokens, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), Largest() as largest:
        layer(x, backend=backend).square().sum().backward()
    assert largest.found <= size


def spec_of(compute: torch.dtype, heads: int = 1, **changes: Any) -> LayerSpec:
    attention = Attention(heads, heads == 1, "own")
    return LayerSpec(attention, Precision.of(compute), 0.5, 4, 1e-5, "lean")._replace(**changes)


@pytest.mark.parametrize(("rows", "width", "dtype", "expected"), [
    (341, 16, torch.bfloat16, ()),
    (342, 16, torch.bfloat16, (171,)),
    (1024, 16, torch.bfloat16, (256, 512, 768)),
    (256, 512, torch.bfloat16, (64, 128, 192)),
    (256, 512, torch.float32, ()),
    (4096, 1024, torch.bfloat16, ()),
])  # fmt: skip
def test_only_many_rows_of_a_narrow_layer_are_cut(rows, width, dtype, expected):
    x = torch.empty(rows, 64, width, device="meta")
    # nothing but a CPU's rows are cut
    assert dst_pieces.cut(x, spec_of(dtype)) == ()
    x = torch.empty(1, 64, width).expand(rows, -1, -1)
    assert dst_pieces.cut(x, spec_of(dtype)) == expected
    assert dst_pieces.cut(x, spec_of(dtype, kernels="triton")) == ()


@pytest.mark.parametrize("drop_path_mode", ["skip", "mask"])
def test_a_training_step_in_pieces_has_the_same_loss_and_gradients(drop_path_mode, make_view, monkeypatch, lengths):
    views = [make_view((12, 5, 2, 3, 3), seed=number) for number in range(3)]
    batch = Batch(views, torch.zeros(12, dtype=torch.int64), torch.arange(12)).at(seed=4, step=2)
    found = []
    for size in (1 << 30, BYTES):
        monkeypatch.setattr(dst_pieces, "PIECE_BYTES", size)
        monkeypatch.setattr(dst_pieces, "LEAST_TOKENS", 1)
        torch.manual_seed(0)
        encoder = DSTE(num_joints=3, num_frames=5, width=8, drop_path=RATE).double().train()
        objective = MGFD(encoder, usdrl_views(frames=5, num_views=3)).double().train()
        encoder.configure(drop_path_mode=drop_path_mode)
        lengths.clear()
        terms = objective.loss(objective.embed(encoder, batch), batch, 0.0)
        terms.total.backward()
        # the three views are one pass
        assert (set(lengths) == {36}) == (size > BYTES)
        found.append([terms.total.detach(), *(p.grad for m in (encoder, objective) for p in m.parameters())])
    for part, whole in zip(*found, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("in_pieces")
def test_a_layer_prepared_for_inference_runs_in_pieces(lengths):
    layer = layer_of(torch.float64)
    x = torch.randn(ROWS, TOKENS, WIDTH, dtype=torch.float64)
    y = layer.freeze(torch.float64, "auto")(x)
    assert sum(lengths) == ROWS and len(lengths) > 2
    torch.testing.assert_close(y, torch.cat([layer(row) for row in x.split(1)]), rtol=1e-12, atol=1e-12)
