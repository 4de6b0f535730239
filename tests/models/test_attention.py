"""The attention core against its formula, whoever computes it, and who is chosen to."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from torch import Tensor, nn

from fastskel.nn.attention import BACKENDS, attend, attend_backward, choose_backend
from fastskel.nn.precision import Precision
from fastskel.nn.projections import Attention, Projections, merge

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FP64 = Precision(torch.float64, torch.float64, torch.float64)


def fake_xformers(monkeypatch, *, failure: Exception | None = None) -> None:
    """Put a package in xformers' place that computes by an explicit softmax, or whose operators do not load."""

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # (N, S, H, D / H), as xformers has it
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2)

    names = ("xformers", "xformers.ops", "xformers._cpp_lib")
    package, ops, library = (types.ModuleType(name) for name in names)
    package.__path__ = []
    library._cpp_library_load_exception = failure
    ops.memory_efficient_attention = memory_efficient_attention
    for name, module in zip(names, (package, ops, library), strict=True):
        monkeypatch.setitem(sys.modules, name, module)


def choose(backend: str, heads: int, device: torch.device, compute: torch.dtype = torch.float32) -> Attention:
    return choose_backend(backend, 8, heads, device, compute)


def make_attention(width: int, heads: int) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    attn = nn.MultiheadAttention(width, heads, batch_first=True).double()
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attn


def parameters(attn: nn.MultiheadAttention) -> Projections:
    return Projections(attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.weight, attn.out_proj.bias)


def formula(z: Tensor, w: Projections, heads: int) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (z @ w.first.T + w.first_bias).chunk(3, -1))
    mixed = ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2)
    return mixed @ w.last.T + w.last_bias


def merged_formula(z: Tensor, w: Projections, heads: int) -> Tensor:
    assert heads == 1
    p = ((z @ w.first.T + w.first_bias) @ z.mT / math.sqrt(z.shape[-1])).softmax(-1)
    return p @ z @ w.last.T + w.last_bias


HOWS = {
    "merged": Attention(1, True, "own"), "own": Attention(1, False, "own"), "sdpa": Attention(1, False, "sdpa"),
    "xformers": Attention(1, False, "xformers"), "own3": Attention(3, False, "own"), "sdpa3": Attention(3, False, "sdpa"),
    "xformers3": Attention(3, False, "xformers"), "own6": Attention(6, False, "own"),
}  # fmt: skip


@pytest.mark.parametrize("kept", ["queries kept", "queries computed again"])
@pytest.mark.parametrize("shape", [(2, 5, 6), (1, 1, 6), (3, 7, 12), (0, 4, 6)], ids=str)
@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_forward_and_backward_equal_the_formula(how, shape, kept, monkeypatch):
    fake_xformers(monkeypatch)
    attn = make_attention(shape[-1], how.num_heads)
    w = merge(*parameters(attn)) if how.merged else parameters(attn)
    w = Projections(*(tensor.detach().requires_grad_() for tensor in w))
    z, grad = torch.randn(2, *shape, dtype=torch.float64)
    z.requires_grad_()
    expected = (merged_formula if how.merged else formula)(z, w, how.num_heads)
    truth = torch.autograd.grad(expected, [z, *w], grad)
    with torch.no_grad():
        out, q, p = attend(z, w, how, FP64, keep=kept == "queries kept")
        dz, dw = attend_backward([grad], z.detach(), q, p, w, how, FP64, (True, True))
    assert (p is None) == (how.core != "own") and (q is not None) == (kept == "queries kept")
    for actual, value in zip((out, dz, *dw), (expected, *truth), strict=True):
        # fp64 rounding of sums over 12 features and 7 tokens
        torch.testing.assert_close(actual, value.detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("need", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_gradients_that_nobody_wants_are_not_computed(how, need, monkeypatch):
    fake_xformers(monkeypatch)
    attn = make_attention(6, how.num_heads)
    with torch.no_grad():
        w = merge(*parameters(attn)) if how.merged else parameters(attn)
        z, grad = torch.randn(2, 2, 5, 6, dtype=torch.float64)
        _, q, p = attend(z, w, how, FP64, keep=True)
        everything, whole = attend_backward([grad], z, q, p, w, how, FP64, (True, True))
        dz, part = attend_backward([grad], z, q, p, w, how, FP64, need)
    assert torch.equal(dz, everything)
    wanted = (need[0], need[0], need[1], need[1])
    assert all(torch.equal(a, b) if n else a is None for a, b, n in zip(part, whole, wanted, strict=True))


@pytest.mark.parametrize("how", [HOWS["merged"], HOWS["own"], HOWS["sdpa"]], ids=["merged", "own", "sdpa"])
def test_large_scores_stay_finite_in_float16(how):
    """Products of 1024 features overflow float16 unless they are scaled within the product."""
    z = torch.randn(1, 4, 1024).sign().half()
    eye, zero = torch.eye(1024).half(), torch.zeros(1024).half()
    # merged, queries are the tokens 100 times over; not merged, queries and keys are ten times the tokens
    w = Projections(100 * eye, zero, eye, zero) if how.merged else Projections(
        torch.cat([10 * eye, 10 * eye, eye]), torch.cat([zero] * 3), eye, zero
    )  # fmt: skip
    precision = Precision(torch.float16, torch.float32, torch.float32)
    with torch.no_grad():
        out, q, p = attend(z, w, how, precision, keep=True)
        dz, _ = attend_backward([torch.ones_like(z)], z, q, p, w, how, precision, (True, True))
    # scores of 100 * 1024 / 32 with itself leave every other token a weight of zero
    assert torch.equal(out, z)
    assert dz.isfinite().all()


@pytest.mark.parametrize(
    "backend, heads, expected",
    [("auto", 1, Attention(1, True, "own")), ("fastskel", 1, Attention(1, True, "own")),
     ("sdpa", 1, Attention(1, False, "sdpa")), ("math", 1, Attention(1, False, "own")),
     ("fastskel", 2, Attention(2, False, "own")), ("sdpa", 2, Attention(2, False, "sdpa")),
     ("math", 4, Attention(4, False, "own"))],
)  # fmt: skip
def test_choice(backend, heads, expected):
    assert choose(backend, heads, CPU) == expected


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("heads", [2, 4, 8])
def test_auto_does_not_merge_several_heads(heads, compute):
    chosen = choose("auto", heads, CPU, compute)
    assert chosen.num_heads == heads and not chosen.merged and chosen.core in ("own", "sdpa")


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match=r"attention_backend.* must be one of .*'xformers'.*, got 'flash'"):
        choose("flash", 1, CPU)


def test_xformers_is_refused_on_a_cpu(monkeypatch):
    fake_xformers(monkeypatch)
    with pytest.raises(ValueError, match=r"'xformers' must run on a GPU, got a CPU"):
        choose("xformers", 1, CPU)


def test_an_xformers_that_is_not_installed_is_refused_with_the_reason(monkeypatch):
    # None makes an import fail as if the package were absent
    monkeypatch.setitem(sys.modules, "xformers", None)
    for name in [name for name in sys.modules if name.startswith("xformers.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=r"'xformers' must be importable, got ModuleNotFoundError: .*xformers"):
        choose("xformers", 1, GPU)


def test_an_xformers_whose_operators_do_not_load_is_refused_with_the_reason(monkeypatch):
    fake_xformers(monkeypatch, failure=OSError("undefined symbol:\n  _ZN3c10"))
    with pytest.raises(ValueError, match=r"'xformers' must be importable, got .*undefined symbol: _ZN3c10"):
        choose("xformers", 1, GPU)


def test_an_xformers_that_breaks_while_loading_is_refused_with_the_reason(monkeypatch):
    def broken(name: str) -> types.ModuleType:
        raise OSError("libcudart.so.11.0: cannot open shared object file")

    monkeypatch.setattr("fastskel.nn.attention.importlib.import_module", broken)
    with pytest.raises(ValueError, match=r"'xformers' must be importable, got OSError: libcudart.so.11.0: cannot open"):
        choose("xformers", 1, GPU)


def test_xformers_that_loads_is_taken(monkeypatch):
    fake_xformers(monkeypatch)
    assert choose("xformers", 1, GPU) == Attention(1, False, "xformers")
    assert choose("xformers", 2, GPU) == Attention(2, False, "xformers")
    assert set(BACKENDS) == {"auto", "fastskel", "sdpa", "xformers", "math"}
