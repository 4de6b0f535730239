"""What a pass costs at the recipe's sizes: bytes kept for the backward pass, and operations."""

from __future__ import annotations

import math

import pytest
import torch
from fastskel.bench.harness import saved_bytes
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastskel.models import DSTE, STTR
from fastskel.models.backbone import USDRLBackbone

# width, frames, spatial tokens
D, T, S = 1024, 64, 50


def large(kind: type[USDRLBackbone]) -> USDRLBackbone:
    """An encoder of the recipe's size, all zero: nobody looks at its values."""
    with torch.device("meta"):
        encoder = kind()
    encoder = encoder.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in encoder.state_dict().values():
            tensor.zero_()
    return encoder.train()


@pytest.mark.parametrize(
    "kind, memory, limit",
    [(DSTE, "lean", 8e6), (DSTE, "layer", 2e6), (STTR, "lean", 4e6), (STTR, "layer", 2e6)],
    ids=["dste-lean", "dste-layer", "sttr-lean", "sttr-layer"],
)
def test_bytes_kept_for_the_backward_pass_of_a_view(kind, memory, limit, make_view):
    encoder = large(kind)
    encoder.configure(memory=memory)
    if kind is DSTE:
        encoder.drop_path = 0.0

    def kept(rows: int) -> int:
        view = make_view((rows, T, 2, 25, 3), dtype=torch.float32)

        def call() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return encoder(view).pooled

        return saved_bytes(call, exclude=encoder.parameters())

    # what does not grow with the batch, as merged projections and converted weights, cancels out; fewer clips are not merged
    per_view = (kept(30) - kept(26)) / 4
    assert per_view <= limit
    # in bf16 vectors of D per token and layer, with those of embedding and maxima: 14 or 6, or each layer's input
    vectors = per_view / (2 * D * (T + S) * 2)
    bounds = {(DSTE, "lean"): (14, 16), (STTR, "lean"): (6, 9)}.get((kind, memory), (1, 5))
    assert bounds[0] <= vectors <= bounds[1]


def flops_by_hand(kind: type[USDRLBackbone]) -> tuple[float, float]:
    """FLOPs of one view's forward pass, and of what is merged once per pass; a multiplication and an addition each."""
    view = 0.0
    for tokens, features in ((T, 2 * 25 * 3), (S, T * 3)):
        # embedding: two linears
        view += tokens * (features * D + D * D)
        for _ in range(2):
            if kind is DSTE:
                live = tokens - math.ceil(tokens / 4)
                # convolution 1, merged query and output of three attentions 6, CA's MLP 2 + 2, DSA's first linears 2 + 2,
                # their shared second one 2
                view += 17 * D * D * tokens
                # scores and mixed values of three attentions, token mixture
                view += 3 * 2 * tokens * tokens * D + D * (tokens * tokens + live * tokens)
            else:
                # merged query and output, two linears
                view += 4 * D * D * tokens + 2 * tokens * tokens * D
    return 2 * view, 2 * 4 * 2 * D**3


@pytest.mark.parametrize("kind, published", [(DSTE, 8.65e9), (STTR, None)], ids=["dste", "sttr"])
def test_flops_of_a_view(kind, published, make_view):
    encoder = large(kind).eval()

    def count(rows: int, grad: bool) -> int:
        view = make_view((rows, T, 2, 25, 3), dtype=torch.float32)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
            encoder(view)
        return counter.get_total_flops()

    per_view, merging = flops_by_hand(kind)
    one = count(1, False)
    # merged by the first pass without gradient, and kept for the second one
    two = count(2, False)
    assert two == pytest.approx(2 * per_view, rel=0.02)
    assert one - two / 2 == pytest.approx(merging, rel=0.02)
    if published is not None:
        assert two / 2 == pytest.approx(published, rel=0.02)
    # with gradient they are merged in every pass over enough tokens to repay it
    assert count(26, True) - 13 * two == pytest.approx(merging, rel=0.02)
