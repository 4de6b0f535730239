"""Encoders of joints, bones and motion: what they derive, and that each mode is the single encoder on that modality."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fastskel.data import Loader, make_synthetic
from fastskel.data.batch import Batch, View, concat_views
from fastskel.data.views import eval_view
from fastskel.models import DSTE, STTR, Encoder, Features, MultimodalDSTE, MultimodalSTTR
from fastskel.models.backbone import tokens
from fastskel.models.encoder import MODES
from fastskel.models.multimodal import modality
from fastskel.skeleton import stream, topology

PAIRS = [(MultimodalDSTE, DSTE), (MultimodalSTTR, STTR)]
FRAMES, WIDTH = 6, 8
EMBEDDINGS = {"joint": "ske_emb", "bone": "bone_emb", "motion": "motion_emb"}

both = pytest.mark.parametrize("kind, single", PAIRS, ids=["dste", "sttr"])


def build(kind: type[Encoder], **options) -> Encoder:
    """An encoder in float64 whose parts all differ."""
    torch.manual_seed(0)
    encoder = kind(num_joints=25, num_frames=FRAMES, width=WIDTH, **options).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder


def view_of(rows: int = 4, frames: int = FRAMES, seed: int = 0) -> View:
    """Two bodies of 25 joints, of which some are absent."""
    generator = torch.Generator().manual_seed(seed)
    clips = torch.randn(rows, frames, 2, 25, 3, generator=generator, dtype=torch.float64)
    clips[:, frames // 2 :, 1] = 0
    clips[:, :, 0, 7] = 0
    return View(clips, torch.ones(rows, frames, 2, dtype=torch.bool), topology("ntu-25"))


def single_of(encoder: Encoder, kind: type[Encoder], mode: str, **options) -> Encoder:
    """The single encoder with the same weights and one modality's embedding."""
    other = build(kind, **options)
    state = {name: value for name, value in encoder.state_dict().items() if name in other.state_dict()}
    own = encoder.get_submodule(EMBEDDINGS[mode]).state_dict()
    other.load_state_dict(state | {f"ske_emb.{name}": value for name, value in own.items()})
    return other.train(encoder.training)


def assert_same(features: Features, expected: Features) -> None:
    for name in ("pooled", "temporal", "spatial", "temporal_pooled", "spatial_pooled"):
        # of rounding: products of more rows are blocked otherwise
        torch.testing.assert_close(getattr(features, name), getattr(expected, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", [None, "kinect"])
@pytest.mark.parametrize("kind", ["joint", "bone", "motion"])
def test_modalities_are_what_the_loader_derives(tmp_path, kind, variant) -> None:
    dataset = make_synthetic(tmp_path / "packed", num_clips=9, num_classes=3, num_subjects=3)
    specs = eval_view(16), eval_view(16, kind, bone_variant=variant)
    loader = Loader(dataset, views=specs, batch_size=9, num_threads=0, shuffle=False, drop_last=False)
    (batch,) = list(loader)
    joints, expected = (view.clips for view in batch.views)
    assert torch.equal(modality(joints, kind, dataset.topology, variant), expected)
    assert kind == "joint" or not torch.equal(joints, expected)


@pytest.mark.parametrize("frames", [1, 2, FRAMES])
@pytest.mark.parametrize("kind", ["joint", "bone", "motion"])
def test_modalities_of_absent_joints_and_short_clips(kind, frames) -> None:
    view = view_of(frames=frames)
    expected = stream(view.clips, kind, view.topology)
    assert torch.equal(modality(view.clips, kind, view.topology), expected)
    assert np.array_equal(expected.numpy(), stream(view.clips.numpy(), kind, view.topology))


@both
@pytest.mark.parametrize("mode", list(EMBEDDINGS))
def test_a_mode_is_the_single_encoder_on_that_modality(kind, single, mode) -> None:
    options = {"drop_path": 0.4} if single is DSTE else {}
    encoder = build(kind, **options).train()
    view = Batch([view_of()], torch.zeros(4), torch.arange(4) * 5).at(seed=3, step=2).views[0]
    expected = single_of(encoder, single, mode, **options)(replace(view, clips=stream(view.clips, mode, view.topology)))
    assert_same(encoder(view, mode=mode), expected)
    others = [encoder(view, mode=other).pooled for other in MODES if other != mode]
    assert not any(torch.allclose(expected.pooled, pooled, rtol=1e-3) for pooled in others)


@both
def test_fused_is_the_mean_of_embeddings_through_one_map(kind, single) -> None:
    encoder, view = build(kind).eval(), view_of()
    parts = []
    for mode, name in EMBEDDINGS.items():
        t, s = tokens(stream(view.clips, mode, view.topology))
        embedding = encoder.get_submodule(name)
        parts.append((embedding.t_embedding(t), embedding.s_embedding(s)))
    t, s = (sum(stream_parts) / 3 for stream_parts in zip(*parts, strict=True))
    t, s = encoder.transform(t @ encoder.fusion.t_fuse.weight.T, s @ encoder.fusion.s_fuse.weight.T, None)
    features = encoder(view)
    torch.testing.assert_close(features.temporal, t, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(features.spatial, s, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(features.pooled, torch.cat([t.amax(1), s.amax(1)], -1), rtol=1e-10, atol=1e-10)
    assert encoder.fusion.t_fuse.bias is None and encoder.fusion.s_fuse.bias is None


@both
def test_several_modes_in_one_pass_are_a_pass_each(kind, single) -> None:
    encoder = build(kind, **({"drop_path": 0.4} if single is DSTE else {})).train()
    batch = Batch([view_of(seed=number) for number in range(4)], torch.zeros(4), torch.arange(4) + 7).at(seed=1, step=5)
    together = encoder(concat_views(batch.views), mode="+".join(MODES)).pooled
    singly = torch.cat([encoder(view, mode=mode).pooled for view, mode in zip(batch.views, MODES, strict=True)])
    torch.testing.assert_close(together, singly, rtol=1e-12, atol=1e-12)
    # a part each, in order
    backwards = encoder(concat_views(batch.views), mode="+".join(MODES[::-1])).pooled
    assert not torch.allclose(backwards, together)


@both
def test_the_mode_of_the_constructor_is_the_default(kind, single) -> None:
    view = view_of()
    for mode in MODES:
        encoder = build(kind, mode=mode).eval()
        assert torch.equal(encoder(view).pooled, encoder(view, mode=mode).pooled)
        assert kind(**encoder.config).mode == mode
    assert build(kind).mode == "fused"


def test_bones_of_another_variant() -> None:
    view, encoders = view_of(), [build(MultimodalSTTR, bone_variant=name).eval() for name in (None, "agcn", "kinect")]
    default, first, other = (encoder(view, mode="bone").pooled for encoder in encoders)
    assert torch.equal(default, first) and not torch.allclose(first, other)
    with pytest.raises(ValueError, match="bone variant must be one of agcn, kinect, got 'coco'"):
        build(MultimodalSTTR, bone_variant="coco")(view)


@both
@pytest.mark.parametrize("mode", [*MODES, "motion+fused"])
def test_copies_for_inference(kind, single, mode) -> None:
    encoder, view = build(kind).float().eval(), view_of()
    view = replace(view, clips=view.clips.float())
    with torch.no_grad():
        expected = encoder(view, mode=mode).pooled
        frozen, low = encoder.optimize_for_inference(), encoder.optimize_for_inference(torch.bfloat16)
        assert list(frozen.parameters()) == [] and list(frozen.state_dict()) == []
        for parameter in encoder.parameters():
            parameter.zero_()
        # merged projections and folded weights round otherwise
        torch.testing.assert_close(frozen(view, mode=mode).pooled, expected, rtol=1e-4, atol=1e-4)
        error = (low(view, mode=mode).pooled - expected).norm() / expected.norm()
        assert 0 < error < 0.05


@both
def test_mixed_precision_is_as_good_as_of_the_single_encoder(kind, single) -> None:
    """Passes in bfloat16, forward and back: relative errors of gradients beside those of the single encoder's own."""

    def error(encoder: Encoder, view: View) -> Tensor:
        gradients = []
        for dtype in (torch.float64, torch.float32):
            encoder.to(dtype).zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                pooled = encoder(replace(view, clips=view.clips.to(dtype))).pooled
            pooled.float().square().sum().backward()
            gradients.append(torch.cat([p.grad.double().flatten() for p in encoder.parameters()]))
        return (gradients[1] - gradients[0]).norm() / gradients[0].norm()

    options = {"drop_path": 0.0} if single is DSTE else {}
    view = view_of(rows=8)
    assert error(build(kind, **options), view) < 2 * error(build(single, **options), view) + 0.01


@both
@pytest.mark.parametrize(
    "mode, message",
    [
        ("fuse", "mode must be made of joint, bone, motion, fused, got 'fuse' in 'fuse'"),
        ("joint+", r"mode must be made of .*, got '' in 'joint\+'"),
        ("causal", "mode must be made of .*, fused, got 'causal', which only encoders of one modality have. Leave out causal"),
        ("joint+bone+motion", r"clips must be a multiple of the 3 parts of 'joint\+bone\+motion', got 4"),
    ],
)
def test_unknown_modes_are_refused(kind, single, mode, message) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: {message}"):
        build(kind)(view_of(), mode=mode)


@both
def test_masks_and_unknown_settings_are_refused(kind, single) -> None:
    with pytest.raises(ValueError, match="token_mask must be None, got Tensor"):
        build(kind)(view_of(), token_mask=torch.ones(4, FRAMES))
    with pytest.raises(ValueError, match=f"{kind.__name__}: mode must be one of joint, bone, motion, fused, got 'both'"):
        kind(mode="both", num_joints=25, width=WIDTH)
    with pytest.raises(ValueError, match="init must be 'usdrl' or 'torch', got 'zero'"):
        kind(init="zero", num_joints=25, width=WIDTH)
