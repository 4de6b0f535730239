"""The error rule: in half precision at most twice as far from the truth as plain torch is."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from fastskel.bench.reference import usdrl as reference
from torch import Tensor, nn

from fastskel.models import DSTE, STTR
from fastskel.models.backbone import tokens
from fastskel.nn.dst_layer import DSTLayer
from fastskel.nn.post_norm import PostNormLayer
from fastskel.nn.precision import Precision, precision_of

FRAMES, BODIES, JOINTS, ROWS = 64, 2, 25, 8
SEEDS = 3
ALLOWED = 2.0
# small gradients underflow float16; a power of two adds no rounding
LOSS_SCALE = {torch.float16: 256.0, torch.bfloat16: 1.0}


def make_pair(kind: str, width: int, perturbed: bool, seed: int) -> tuple[nn.Module, DSTE | STTR]:
    """Reference and encoder with the weights of the recipe's start, or with norms and biases moved off it."""
    torch.manual_seed(seed)
    inputs = (JOINTS * BODIES * 3, FRAMES * 3, width, 1)
    plain = reference.DSTE(*inputs, drop_path=0.0) if kind == "dste" else reference.STTR(*inputs)
    plain.apply(reference.init_weights)
    if perturbed:
        with torch.no_grad():
            for parameter in plain.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    own = DSTE(width=width, drop_path=0.0) if kind == "dste" else STTR(width=width)
    own.load_state_dict(plain.state_dict(), strict=True)
    return plain.train(), own.train()


class Rule:
    """Results of one step in any precision; the loss reads the tokens that the truth found to be largest.

    The maximum of tokens that are equal but for rounding would pass the whole gradient on to another token, in the plain
    model as often as in ours, and hide what is to be seen.
    """

    def __init__(self, clips: Tensor, weight: Tensor) -> None:
        self.tokens, self.weight = tokens(clips), weight
        self.largest: list[Tensor] = []

    def step(self, model: nn.Module, dtype: torch.dtype, autocast: torch.dtype | None) -> dict[str, Tensor]:
        encode = model.streams if isinstance(model, DSTE | STTR) else model
        model.zero_grad()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            streams = encode(*(part.to(dtype) for part in self.tokens))
        if not self.largest:
            self.largest = [stream.argmax(1, keepdim=True) for stream in streams]
        pooled = [stream.gather(1, at)[:, 0] for stream, at in zip(streams, self.largest, strict=True)]
        scale = LOSS_SCALE[autocast] if autocast else 1.0
        # in the streams' own type: a loss in a wider one would be kinder to the reference than training is
        ((torch.cat(pooled, -1) * self.weight.to(streams[0].dtype)).sum() * scale).backward()
        found = {name: parameter.grad.double() / scale for name, parameter in model.named_parameters()}
        return found | {f"output {number}": stream.detach().double() for number, stream in enumerate(streams)}


def place_of(name: str) -> str:
    """Where a tensor's errors are added up: with those of the other layers for what feeds a ReLU, else alone.

    A rounding that changes the sign of a feature next to zero switches a whole term on or off. In a small layer that happens
    a few times or not at all, to either side, and is seen as a rate over many layers only.
    """
    feeds = [part for part in ("wt1.", "linear1.", "conv1.") if part in name]
    return feeds[0] + name.rpartition(".")[2] if feeds else name


def error_ratios(
    kind: str, width: int, precision: str, perturbed: bool, memory: str = "lean"
) -> dict[str, tuple[float, float]]:
    """Errors relative to the truth, ours and the plain model's, each the root of the sum of squares over seeds."""
    squares: dict[str, list[float]] = {}
    low = torch.float16 if precision == "fp16 autocast" else torch.bfloat16
    for seed in range(SEEDS):
        plain, own = make_pair(kind, width, perturbed, seed)
        own.configure(memory=memory)
        rule = Rule(torch.randn(ROWS, FRAMES, BODIES, JOINTS, 3), torch.randn(ROWS, 2 * width))
        dtype, autocast = (low, None) if precision == "bf16 model" else (torch.float32, low)
        plain, own = plain.to(dtype), own.to(dtype)
        # the same numbers for all three: inputs and weights are rounded first
        rule.tokens, rule.weight = tuple(part.to(dtype) for part in rule.tokens), rule.weight.to(dtype)
        truth = rule.step(copy.deepcopy(plain).double(), torch.float64, None)
        for place, model in enumerate((own, plain)):
            for name, value in rule.step(model, dtype, autocast).items():
                error = float((value - truth[name]).norm() / truth[name].norm())
                squares.setdefault(place_of(name), [0.0, 0.0])[place] += error**2
    return {name: (math.sqrt(own), math.sqrt(plain)) for name, (own, plain) in squares.items()}


@pytest.mark.parametrize("start", ["recipe", "perturbed"])
@pytest.mark.parametrize(
    "kind, width, precision, memory",
    [
        ("dste", 128, "bf16 autocast", "lean"),
        ("dste", 64, "fp16 autocast", "lean"),
        ("dste", 128, "bf16 model", "lean"),
        ("dste", 64, "bf16 autocast", "layer"),
        ("sttr", 128, "bf16 autocast", "lean"),
        ("sttr", 128, "fp16 autocast", "lean"),
        ("sttr", 128, "bf16 model", "lean"),
        ("sttr", 64, "bf16 autocast", "lean"),
        ("sttr", 128, "bf16 autocast", "layer"),
    ],
)
def test_errors_are_at_most_twice_those_of_plain_torch(kind, width, precision, memory, start):
    found = error_ratios(kind, width, precision, start == "perturbed", memory)
    # outputs, spatial positions, embedding, layers
    assert len(found) == 2 + 1 + 12 + (4 * 22 + 4 if kind == "dste" else 4 * 10 + 2)
    assert all(math.isfinite(own) and plain > 0 for own, plain in found.values())
    above = {name: f"{own / plain:.2f}" for name, (own, plain) in found.items() if own > ALLOWED * plain}
    assert above == {}


@pytest.mark.parametrize("kind", ["dste", "sttr"])
def test_the_backward_pass_needs_no_autocast(kind, make_view):
    """Types are decided in the forward pass: a backward pass outside of it, as usual, equals one inside."""
    sizes = dict(num_joints=5, num_frames=6, width=8)
    model = DSTE(**sizes, drop_path=0.0) if kind == "dste" else STTR(**sizes)
    view, found = make_view((3, 6, 2, 5, 3), dtype=torch.float32), []
    for inside in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(view).pooled ** 3).sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert {gradient.dtype for gradient in found[0]} == {torch.float32}


@pytest.mark.parametrize("kind", ["dst", "post-norm"])
def test_float64_is_left_alone_by_autocast(kind):
    torch.manual_seed(0)
    layer = (DSTLayer(5, 8, 1, 0.5, 4) if kind == "dst" else PostNormLayer(8, 1)).double()
    x = torch.randn(2, 5, 8).double()
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer(x)
    assert inside.dtype == torch.float64 and torch.equal(inside, layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["dst", "post-norm"])
def test_models_of_one_type_stay_in_it(kind, dtype):
    torch.manual_seed(0)
    layer = (DSTLayer(5, 8, 1, 0.5, 4) if kind == "dst" else PostNormLayer(8, 1)).to(dtype)
    x = torch.randn(2, 5, 8).to(dtype).requires_grad_()
    out = layer(x)
    (out**3).sum().backward()
    assert out.dtype == x.grad.dtype == dtype
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {dtype}
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize(
    "given, weight, autocast, expected",
    [
        (torch.float32, torch.float32, None, (torch.float32, torch.float32, torch.float32)),
        (torch.float64, torch.float64, None, (torch.float64, torch.float64, torch.float64)),
        (torch.bfloat16, torch.bfloat16, None, (torch.bfloat16, torch.bfloat16, torch.float32)),
        (torch.float16, torch.float16, None, (torch.float16, torch.float16, torch.float32)),
        (torch.float32, torch.float32, torch.bfloat16, (torch.bfloat16, torch.float32, torch.float32)),
        (torch.float32, torch.float32, torch.float16, (torch.float16, torch.float32, torch.float32)),
        (torch.bfloat16, torch.float32, torch.bfloat16, (torch.bfloat16, torch.float32, torch.float32)),
        (torch.float64, torch.float64, torch.bfloat16, (torch.float64, torch.float64, torch.float64)),
    ],
    ids=str,
)
def test_types(given, weight, autocast, expected):
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        assert precision_of(torch.zeros(1, dtype=given), torch.zeros(1, dtype=weight), "block") == Precision(*expected)


@pytest.mark.parametrize(
    "given, weight, message",
    [(torch.int64, torch.float32, "block: input must be floating point, got torch.int64"),
     (torch.float32, torch.bfloat16, "block: input must have the weights' type torch.bfloat16, got torch.float32"),
     (torch.float64, torch.float32, "block: input must have the weights' type torch.float32, got torch.float64")],
    ids=str,
)  # fmt: skip
def test_types_that_do_not_fit_are_refused(given, weight, message):
    with pytest.raises(ValueError, match=message):
        precision_of(torch.zeros(1, dtype=given), torch.zeros(1, dtype=weight), "block")
