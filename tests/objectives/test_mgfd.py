"""The MG-FD objective: one pass over all views equals one pass per view."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastskel.data.batch import Batch, View
from fastskel.data.views import usdrl_views
from fastskel.models import DSTE, STTR, Encoder
from fastskel.objectives import MGFD, OBJECTIVES
from fastskel.skeleton import topology

FRAMES, WIDTH = 6, 4


def make_encoder(kind: type[Encoder] = DSTE, **options) -> Encoder:
    torch.manual_seed(0)
    return kind(num_joints=25, num_bodies=1, num_frames=FRAMES, width=WIDTH, **options).double().train()


def make_batch(frames: tuple[int, ...] = (FRAMES,) * 4, rows: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(1)
    views = [
        View(
            torch.randn(rows, length, 1, 25, 3, generator=generator, dtype=torch.float64),
            torch.ones(rows, length, 1, dtype=torch.bool),
            topology("ntu-25"),
        )
        for length in frames
    ]
    return Batch(views, torch.full((rows,), -1), torch.arange(rows) * 3).at(seed=4, step=9)


def embed_singly(objective: MGFD, encoder: Encoder, views: list[View]) -> dict[str, Tensor]:
    """Everything view by view, through torch's own modules and maxima."""
    parts = []
    for view in views:
        features = encoder(view)
        y_t, y_s = features.temporal.amax(1), features.spatial.amax(1)
        parts.append((objective.t_proj(y_t), objective.s_proj(y_s), objective.i_proj(torch.cat([y_t, y_s], -1))))
    return {name: torch.stack(z) for name, z in zip(("z_t", "z_s", "z_i"), zip(*parts, strict=True), strict=True)}


@pytest.mark.parametrize("frames", [(FRAMES,) * 4, (FRAMES, 3, FRAMES), (FRAMES, FRAMES)], ids=str)
@pytest.mark.parametrize("kind", [DSTE, STTR])
def test_one_pass_equals_a_pass_per_view(kind, frames):
    encoder, batch = make_encoder(kind, **({"drop_path": 0.3} if kind is DSTE else {})), make_batch(frames)
    together = MGFD(encoder, usdrl_views(num_views=len(frames))).double().train()
    with torch.no_grad():
        # weights so large that views differ in their statistics
        for parameter in (*encoder.parameters(), *together.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    singly, reversed_order = copy.deepcopy(together), copy.deepcopy(together)
    actual, expected = together.embed(encoder, batch), embed_singly(singly, encoder, batch.views)
    for name, width in (("z_t", 2 * WIDTH), ("z_s", 2 * WIDTH), ("z_i", 4 * WIDTH)):
        assert actual[name].shape == (len(frames), 5, width)
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-12)
    embed_singly(reversed_order, encoder, batch.views[::-1])
    buffers, others = dict(singly.named_buffers()), dict(reversed_order.named_buffers())
    for name, value in together.named_buffers():
        torch.testing.assert_close(value, buffers[name], rtol=1e-10, atol=1e-12)
        if name.endswith("num_batches_tracked"):
            assert int(value) == len(frames)
        else:
            # the running statistics remember the order of the views
            assert not torch.allclose(value, others[name], rtol=1e-6, atol=1e-9)


def test_every_projector_runs_once():
    """Views of several lengths need a pass of the encoder each, but no more of the projectors."""
    encoder, calls = make_encoder(), []
    objective = MGFD(encoder, usdrl_views(num_views=3)).double().train()
    for module in (encoder, objective.t_proj[0], objective.s_proj[3], objective.i_proj[6]):
        module.register_forward_hook(lambda module, *_: calls.append(module))
    for frames, passes in (((FRAMES,) * 3, 1), ((FRAMES, 3, FRAMES), 3)):
        calls.clear()
        objective.embed(encoder, make_batch(frames))
        assert calls.count(encoder) == passes and len(calls) == passes + 3


def test_hooks_of_a_norm_see_one_view_at_a_time():
    encoder, seen = make_encoder(), []
    objective = MGFD(encoder, usdrl_views()).double().train()
    objective.i_proj[1].register_forward_hook(lambda *args: seen.append(args[2].shape))
    objective.embed(encoder, make_batch())
    assert seen == [(5, 2 * WIDTH)] * 4


def test_one_sample_is_refused_in_training():
    encoder = make_encoder()
    objective = MGFD(encoder, usdrl_views()).double()
    with pytest.raises(ValueError, match="MGFD.embed: batch must have at least 2 samples in training, got 1"):
        objective.embed(encoder, make_batch(rows=1))
    assert objective.eval().embed(encoder, make_batch(rows=1))["z_i"].shape == (4, 1, 4 * WIDTH)


def test_gradients_of_one_pass_equal_those_of_a_pass_per_view():
    encoder, batch = make_encoder(drop_path=0.3), make_batch()
    objective = MGFD(encoder, usdrl_views()).double().train()
    both = torch.nn.ModuleList([encoder, objective])
    gradients = []
    for embedded in (objective.embed(encoder, batch), embed_singly(objective, encoder, batch.views)):
        both.zero_grad()
        objective.loss(embedded, batch, 0.0).total.backward()
        gradients.append({name: parameter.grad for name, parameter in both.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("weighting, terms", [("aaai", 9), ("journal", 6)])
def test_weightings(weighting, terms):
    encoder, batch = make_encoder(), make_batch()
    objective = OBJECTIVES["mgfd"](encoder, usdrl_views(), weighting=weighting).double()
    result = objective.loss(objective.embed(encoder, batch), batch, 0.0)
    assert len(result.terms) == terms
    assert any("xcorr" in name for name in result.terms) == (weighting == "aaai")
    sim, vac, xcorr = (
        result.terms[f"{t}_i"] + (result.terms[f"{t}_t"] + result.terms[f"{t}_s"]) / 2 if f"{t}_i" in result.terms else 0
        for t in ("sim", "vac", "xcorr")
    )
    torch.testing.assert_close(result.total.detach(), 5 * sim + vac + 1e-3 * xcorr)


def test_parameters_are_grouped_encoder_first_and_once():
    encoder = make_encoder()
    objective = MGFD(encoder, usdrl_views())
    encoder.spe.requires_grad_(False)
    (group,) = objective.param_groups(encoder)
    expected = [p for p in (*encoder.parameters(), *objective.parameters()) if p.requires_grad]
    assert [id(p) for p in group["params"]] == [id(p) for p in expected]
    assert objective.downstream_encoder(encoder) is encoder and objective.needs_whole_batch


@pytest.mark.parametrize(
    "options, message",
    [
        ({"views": usdrl_views(num_views=1)}, "views must be at least 2, got 1"),
        ({"weighting": "tpami"}, r"weighting must be one of \['aaai', 'journal'\], got 'tpami'"),
        ({"init": "none"}, "init must be 'usdrl' or 'torch', got 'none'"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MGFD(make_encoder(), **({"views": usdrl_views()} | options))


class WithoutSpatial(torch.nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, view):
        return replace(self.encoder(view), spatial=None)


def test_an_encoder_with_batch_statistics_sees_one_view_at_a_time():
    encoder, batch, sizes = make_encoder(), make_batch(), []
    objective = MGFD(encoder, usdrl_views()).double()
    encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0].clips)))
    objective.embed(encoder, batch)
    encoder.norm = torch.nn.BatchNorm1d(8)
    objective.embed(encoder, batch)
    encoder.norm.eval()
    objective.embed(encoder, batch)
    rows = len(batch)
    assert sizes == [4 * rows, *[rows] * 4, 4 * rows]


def test_an_encoder_without_streams_is_refused():
    encoder, batch = make_encoder(), make_batch()
    objective = MGFD(encoder, usdrl_views()).double()
    with pytest.raises(ValueError, match="MGFD: the encoder must provide 'spatial' features"):
        objective.embed(WithoutSpatial(encoder), batch)


def test_initialisation_is_a_choice():
    encoder = make_encoder()
    for init, expected in (("usdrl", 0.02), ("torch", (1 / (3 * 8)) ** 0.5)):
        torch.manual_seed(0)
        weight = MGFD(encoder, usdrl_views(), init=init).i_proj[6].weight.detach()
        # 128 draws: the deviation's own deviation is 6 %
        assert float(weight.std()) == pytest.approx(expected, rel=0.25)
