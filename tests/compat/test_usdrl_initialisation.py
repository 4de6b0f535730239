"""Weights of the drop-in modules before training are drawn as the reference's are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastskel.compat.usdrl import dste, sttr

both = pytest.mark.parametrize("module", [dste, sttr], ids=["dste", "sttr"])


def uniform_with(bound: float, weight: Tensor) -> bool:
    deviation = bound / 3**0.5
    return bool(weight.abs().max() <= bound and abs(weight.std() / deviation - 1) < 0.05 and weight.mean() < 0.1 * bound)


def normal_with(deviation: float, weight: Tensor) -> bool:
    # a uniform distribution of this deviation ends at 1.73 of it, one cut at two deviations has 0.88 of it
    width = weight.std() / deviation
    return bool(abs(width - 1) < 0.05 and weight.abs().max() > 2.5 * deviation and abs(weight.mean()) < 0.1 * deviation)


@both
@torch.no_grad()
def test_initialisation_of_pretraining(module):
    torch.manual_seed(0)
    width = 64
    model = module.USDRL(150, 192, width, 1, 2)
    seen = set()
    for name, child in model.named_modules():
        if isinstance(child, nn.Linear):
            seen.add("linear")
            assert normal_with(0.02, child.weight), name
            assert not child.bias.any()
        elif isinstance(child, (nn.LayerNorm, nn.BatchNorm1d)):
            seen.add(type(child).__name__)
            assert (child.weight == 1).all() and not child.bias.any()
        elif isinstance(child, nn.Conv1d):
            seen.add("conv")
            assert uniform_with(width**-0.5, child.weight), name
            assert child.bias.abs().max() <= width**-0.5 and child.bias.any()
        elif isinstance(child, nn.MultiheadAttention):
            seen.add("attention")
            assert uniform_with((6 / (4 * width)) ** 0.5, child.in_proj_weight), name
            assert not child.in_proj_bias.any()
    assert seen == {"linear", "LayerNorm", "BatchNorm1d", "attention"} | ({"conv"} if module is dste else set())
    assert normal_with(0.02, model.backbone.spe)
    if module is sttr:
        for stream in (model.backbone.t_tr, model.backbone.s_tr):
            first, second = (layer.self_attn for layer in stream.layers)
            # torch copies the first layer, and the initialisation does not draw this one anew
            assert torch.equal(first.in_proj_weight, second.in_proj_weight)
            assert not torch.equal(first.out_proj.weight, second.out_proj.weight)


@both
@torch.no_grad()
def test_downstream_keeps_torchs_initialisation(module):
    torch.manual_seed(0)
    model = module.Downstream(150, 192, 64, 1, 2)
    assert normal_with(0.02, model.backbone.spe)
    for name, child in model.named_modules():
        # the out_proj of attention has zero biases in torch itself
        if isinstance(child, nn.Linear) and not name.endswith("out_proj"):
            assert uniform_with(child.in_features**-0.5, child.weight), name
            assert child.bias.any()
    if module is sttr:
        for stream in (model.backbone.t_tr, model.backbone.s_tr):
            first, second = (layer.state_dict() for layer in stream.layers)
            assert all(torch.equal(first[key], second[key]) for key in first)
