"""Adam with coupled weight decay takes the reference's steps, on parameters without influence too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fastskel.bench.reference import usdrl as reference
from torch import Tensor

from fastskel import philox
from fastskel.data.batch import DrawAddress, View
from fastskel.models import DSTE, STTR
from fastskel.models.backbone import USDRLBackbone, tokens

STEPS, RATE, SEED = 20, 0.3, 7
JOINTS, BODIES, FRAMES, WIDTH, ROWS = 5, 2, 9, 8, 4


def make_pair(kind: str, heads: int) -> tuple[torch.nn.Module, USDRLBackbone]:
    """Reference and encoder with the same weights, off their start so that nothing is zero."""
    torch.manual_seed(0)
    sizes = dict(num_joints=JOINTS, num_bodies=BODIES, num_frames=FRAMES, width=WIDTH, num_heads=heads)
    inputs = (JOINTS * BODIES * 3, FRAMES * 3, WIDTH, heads)
    if kind == "dste":
        plain, own = reference.DSTE(*inputs, drop_path=RATE), DSTE(**sizes, drop_path=RATE)
    else:
        plain, own = reference.STTR(*inputs), STTR(**sizes)
    plain.double().train()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    own.double().train().load_state_dict(plain.state_dict(), strict=True)
    return plain, own


def share_draws(plain: torch.nn.Module, step: int) -> DrawAddress:
    """Address a step's draws, and give the reference what is drawn there."""
    index = torch.arange(ROWS) + ROWS * step
    view = torch.zeros(ROWS, dtype=torch.int64)
    words = philox.words(SEED, index.numpy(), step, view.numpy(), philox.Use.DROP_PATH, 24)
    kept = torch.from_numpy((philox.uniform(words) >= np.float32(RATE)).astype(np.float64)).reshape(ROWS, 2, 2, 6)
    if isinstance(plain, reference.DSTE):
        plain.drop_path_source = lambda layer, stream, slot: kept[:, layer, stream, slot]
    return DrawAddress(SEED, step, index, view)


@pytest.mark.parametrize(
    "kind, heads, mode",
    [("dste", 1, "skip"), ("dste", 1, "mask"), ("dste", 2, "skip"), ("sttr", 1, "skip"), ("sttr", 2, "skip")],
)
def test_twenty_steps_of_adam_give_the_references_parameters(kind, heads, mode, make_view):
    plain, own = make_pair(kind, heads)
    own.configure(drop_path_mode=mode)
    start = {name: parameter.detach().clone() for name, parameter in own.named_parameters()}
    optimisers = [torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-2) for model in (plain, own)]
    target = torch.randn(ROWS, 2 * WIDTH, dtype=torch.float64)
    for step in range(STEPS):
        view = make_view((ROWS, FRAMES, BODIES, JOINTS, 3), seed=step)
        address = share_draws(plain, step)
        temporal, spatial = plain(*tokens(view.clips))
        pooled = [torch.cat([temporal.amax(1), spatial.amax(1)], -1)]
        pooled.append(own(View(view.clips, view.mask, view.topology, address)).pooled)
        for optimiser, features in zip(optimisers, pooled, strict=True):
            optimiser.zero_grad()
            (features - target).square().mean().backward()
            optimiser.step()
    expected = dict(plain.named_parameters())
    for name, parameter in own.named_parameters():
        assert (parameter - expected[name]).abs().max() <= 1e-10, name
        # two sources of motion: gradients, and for what has none weight decay
        assert (parameter - start[name]).abs().min() > 0, name
    assert_idle_parameters_decayed(own, start)


def assert_idle_parameters_decayed(model: torch.nn.Module, start: dict[str, Tensor]) -> None:
    """Dead rows of wt2 and key biases, of which Adam sees the weight decay only, went towards zero."""
    idle = []
    for name, parameter in model.named_parameters():
        if ".wt2." in name:
            idle.append((start[name][0::4], parameter.detach()[0::4]))
        elif name.endswith("in_proj_bias"):
            idle.append((start[name][WIDTH : 2 * WIDTH], parameter.detach()[WIDTH : 2 * WIDTH]))
    assert len(idle) == (12 if any(".wt2." in name for name in start) else 4)
    for before, after in idle:
        # those nearer to zero than the way of 20 steps may cross it
        far = before.abs() > STEPS * 1e-3
        assert far.any() and (after.abs() < before.abs())[far].all()
