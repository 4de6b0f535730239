"""The multi-modal objective: which view is encoded as what, and which one is the anchor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastskel.data.batch import Batch, View
from fastskel.data.views import usdrl_views
from fastskel.models import DSTE, Encoder, MultimodalDSTE, MultimodalSTTR
from fastskel.objectives import OBJECTIVES, MultimodalMGFD
from fastskel.skeleton import topology

FRAMES, WIDTH = 6, 4


def make_encoder(kind: type[Encoder] = MultimodalDSTE, **options) -> Encoder:
    torch.manual_seed(0)
    encoder = kind(num_joints=25, num_bodies=1, num_frames=FRAMES, width=WIDTH, **options).double().train()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return encoder


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


def embed_singly(objective: MultimodalMGFD, encoder: Encoder, batch: Batch) -> dict[str, torch.Tensor]:
    """Everything view by view, in the mode of its number, through torch's own modules and maxima."""
    parts = []
    for view, mode in zip(batch.views, ("joint", "bone", "motion", "fused"), strict=True):
        features = encoder(view, mode=mode)
        y_t, y_s = features.temporal.amax(1), features.spatial.amax(1)
        parts.append((objective.t_proj(y_t), objective.s_proj(y_s), objective.i_proj(torch.cat([y_t, y_s], -1))))
    return {name: torch.stack(z) for name, z in zip(("z_t", "z_s", "z_i"), zip(*parts, strict=True), strict=True)}


@pytest.mark.parametrize("frames", [(FRAMES,) * 4, (FRAMES, 3, FRAMES, 2)], ids=["one length", "lengths"])
@pytest.mark.parametrize("kind", [MultimodalDSTE, MultimodalSTTR])
def test_views_are_joints_bones_motion_and_all_fused(kind, frames) -> None:
    encoder, batch = make_encoder(kind, **({"drop_path": 0.3} if kind is MultimodalDSTE else {})), make_batch(frames)
    objective = OBJECTIVES["mgfd-multimodal"](encoder, usdrl_views()).double().train()
    both, gradients = torch.nn.ModuleList([encoder, objective]), []
    found, expected = objective.embed(encoder, batch), embed_singly(objective, encoder, batch)
    for name, z in expected.items():
        assert z.shape[:2] == (4, 5)
        torch.testing.assert_close(found[name], z, rtol=1e-9, atol=1e-10)
    for embedded in (found, expected):
        both.zero_grad()
        objective.loss(embedded, batch, 0.0).total.backward()
        gradients.append({name: parameter.grad for name, parameter in both.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-8, atol=1e-8)
    assert gradients[0]["0.bone_emb.t_embedding.0.weight"].abs().sum() > 0


def test_the_fused_view_is_the_anchor() -> None:
    encoder, batch = make_encoder(), make_batch()
    objective = MultimodalMGFD(encoder, usdrl_views()).double().train()
    embeddings = objective.embed(encoder, batch)
    terms = objective.loss(embeddings, batch, 0.0).terms
    for domain in "tsi":
        *own, fused = embeddings[f"z_{domain}"]
        centre = sum(own) / 3
        sim = sum(F.mse_loss(z, fused) + F.mse_loss(z, centre) for z in own)
        torch.testing.assert_close(terms[f"sim_{domain}"], sim.detach())


def test_one_pass_of_the_encoder() -> None:
    encoder, calls = make_encoder(), []
    objective = MultimodalMGFD(encoder, usdrl_views()).double().train()
    encoder.register_forward_pre_hook(lambda module, args, options: calls.append(options), with_kwargs=True)
    objective.embed(encoder, make_batch())
    assert calls == [{"mode": "joint+bone+motion+fused"}]


@pytest.mark.parametrize(
    "views, message",
    [
        (usdrl_views(num_views=3), "views must be 4, one each for joint, bone, motion, fused, got 3"),
        (usdrl_views(num_views=5), "views must be 4, .* got 5"),
        (usdrl_views(stream="bone"), "views must be of the stream joint, got bone"),
    ],
)
def test_other_views_are_refused(views, message) -> None:
    with pytest.raises(ValueError, match=f"MultimodalMGFD: {message}"):
        MultimodalMGFD(make_encoder(), views)


def test_an_encoder_without_modes_is_refused() -> None:
    encoder = make_encoder(DSTE)
    objective = MultimodalMGFD(encoder, usdrl_views()).double().train()
    with pytest.raises(ValueError, match=r"DSTE: token_mask and mode must be None, got NoneType and 'joint\+bone\+mo"):
        objective.embed(encoder, make_batch())
