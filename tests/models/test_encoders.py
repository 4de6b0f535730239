"""The contract of every registered encoder, and what the USDRL family promises beside it."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch

from fastskel.models import DSTE, ENCODERS, STTR, Encoder
from fastskel.models.backbone import tokens

USDRL_FAMILY = [DSTE, STTR]
FRAMES = 6

every_encoder = pytest.mark.parametrize("name", list(ENCODERS))


def build(name: str, joints: int = 5, bodies: int = 2, **options) -> Encoder:
    torch.manual_seed(0)
    sizes = {"num_joints": joints, "num_bodies": bodies, "num_frames": FRAMES, "num_channels": 3, "width": 8}
    return ENCODERS[name](**(sizes | options)).double()


@every_encoder
@pytest.mark.parametrize("bodies", [1, 2])
@pytest.mark.parametrize("joints", [1, 5, 17, 20, 25])
def test_features_have_the_promised_shapes(name, joints, bodies, make_view):
    encoder = build(name, joints, bodies)
    for rows, frames in ((2, FRAMES), (1, 1)):
        features = encoder(make_view((rows, frames, bodies, joints, 3)))
        assert features.pooled.shape == (rows, encoder.num_features)
        assert features.pooled.dtype == torch.float64 and features.pooled.isfinite().all()
        for part, dims in ((features.temporal, 3), (features.spatial, 3), (features.tokens, 5)):
            if part is not None:
                assert part.dim() == dims and part.shape[0] == rows and part.shape[-1] == encoder.num_token_features


@every_encoder
@pytest.mark.parametrize(
    "options",
    [{"num_heads": 4}, {"width": 7}, {"width": 9, "num_heads": 3}, {"num_layers": 3}, {"num_layers": 1}, {"num_channels": 2}],
    ids=str,
)
def test_options_change_the_encoder_and_config_rebuilds_it(name, options, make_view):
    parameters = inspect.signature(ENCODERS[name]).parameters
    passed_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if not passed_on and (unknown := sorted(options.keys() - parameters.keys())):
        pytest.skip(f"{name} has no {', '.join(unknown)}")
    encoder = build(name, **options)
    assert {key: encoder.config[key] for key in options} == options
    view = make_view((2, FRAMES, 2, 5, options.get("num_channels", 3)))
    torch.manual_seed(1)
    twin = ENCODERS[name](**encoder.config).double()
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in encoder.state_dict().items()}
    twin.load_state_dict(encoder.state_dict())
    assert torch.equal(twin.eval()(view).pooled, encoder.eval()(view).pooled)


@every_encoder
def test_every_parameter_is_trained(name, make_view):
    encoder = build(name).train()
    encoder(make_view((4, FRAMES, 2, 5, 3))).pooled.square().sum().backward()
    assert [key for key, parameter in encoder.named_parameters() if parameter.grad is None] == []


@every_encoder
def test_eval_is_deterministic_and_rows_are_independent(name, make_view):
    encoder = build(name).eval()
    view = make_view((5, FRAMES, 2, 5, 3))
    with torch.no_grad():
        whole = encoder(view).pooled
        assert torch.equal(whole, encoder(view).pooled)
        single = torch.cat([encoder(replace(view, clips=view.clips[i : i + 1])).pooled for i in range(5)])
    # fp64 rounding of differently blocked products
    torch.testing.assert_close(single, whole, rtol=1e-12, atol=1e-12)


@every_encoder
@pytest.mark.parametrize(
    "shape",
    [(2, FRAMES + 1, 2, 5, 3), (2, 0, 2, 5, 3), (2, FRAMES, 1, 5, 3), (2, FRAMES, 2, 6, 3), (2, FRAMES, 2, 5, 2)],
    ids=str,
)
def test_wrong_shapes_are_refused(name, shape, make_view):
    with pytest.raises(ValueError, match=r"clips must be \(N, 1\.\.6, 2, 5, 3\), got \(2, "):
        build(name)(make_view(shape))


@every_encoder
def test_flat_clips_are_refused(name, make_view):
    view = make_view((2, FRAMES, 2, 5, 3))
    with pytest.raises(ValueError, match=r"clips must be .* got \(2, 6, 30\)"):
        build(name)(replace(view, clips=view.clips.flatten(2)))


@every_encoder
@pytest.mark.parametrize("argument", ["num_joints", "num_bodies", "num_frames", "num_channels", "width"])
def test_sizes_below_one_are_refused(name, argument):
    with pytest.raises(ValueError, match=f"{argument} must be .* got 0"):
        build(name, **{argument: 0})


@pytest.mark.parametrize("kind", USDRL_FAMILY)
@pytest.mark.parametrize("options", [{"token_mask": torch.ones(2, 6)}, {"mode": "fused"}], ids=["token_mask", "mode"])
def test_masks_and_modes_are_refused(kind, options, make_view):
    with pytest.raises(ValueError, match="token_mask and mode must be None, got "):
        kind(num_joints=5, num_frames=FRAMES, width=8)(make_view((2, FRAMES, 2, 5, 3)), **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_frames": 201}, r"num_frames must be in 1\.\.200, got 201"),
        ({"num_heads": 3}, "num_heads must divide width 8.* got 3"),
        ({"num_heads": 0}, "num_heads must divide width 8.* got 0"),
        ({"num_layers": 0}, "num_layers .*at least 1, got .*0"),
        ({"init": "usdlr"}, "init must be 'usdrl' or 'torch', got 'usdlr'"),
    ],
)
@pytest.mark.parametrize("kind", USDRL_FAMILY)
def test_options_out_of_range_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**({"num_joints": 5, "num_frames": FRAMES, "width": 8} | options))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gap": 0}, "gap must be at least 1, got 2 and 0"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\].* got 1.5"),
        ({"drop_path": 1.0}, r"drop_path in \[0, 1\), got 0.5 and 1.0"),
    ],
)
def test_dste_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DSTE(num_joints=5, num_frames=FRAMES, width=8, **options)


@pytest.mark.parametrize("kind", USDRL_FAMILY)
def test_pooled_is_the_maxima_of_both_streams(kind, make_view):
    features = kind(num_joints=5, num_frames=FRAMES, width=8).double().eval()(make_view((3, FRAMES, 2, 5, 3)))
    assert features.temporal.shape == (3, FRAMES, 8) and features.spatial.shape == (3, 10, 8)
    expected = torch.cat([features.temporal.max(1).values, features.spatial.max(1).values], -1)
    assert torch.equal(features.pooled, expected)


@pytest.mark.parametrize("kind", USDRL_FAMILY)
def test_ties_share_the_gradient(kind, make_view, monkeypatch):
    encoder = kind(num_joints=5, num_frames=3, width=8).double()
    temporal = torch.tensor([[1.0, 3.0, 3.0]]).double()[..., None].requires_grad_()
    spatial = torch.tensor([[2.0, 2.0, 2.0, 2.0]]).double()[..., None].requires_grad_()
    monkeypatch.setattr(encoder, "transform", lambda t, s, view: (temporal, spatial))
    encoder(make_view((1, 3, 2, 5, 3))).pooled.sum().backward()
    assert temporal.grad.flatten().tolist() == [0.0, 0.5, 0.5]
    assert spatial.grad.flatten().tolist() == [0.25] * 4


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("kind", USDRL_FAMILY)
def test_a_shorter_clip_uses_the_leading_weights(kind, frames, make_view):
    """Spatial tokens are those of the clip with zero frames behind; temporal layers act as if built for the length."""
    torch.manual_seed(0)
    options = {"num_joints": 5, "num_bodies": 2, "width": 8, "num_heads": 2}
    encoder = kind(num_frames=FRAMES, **options).double().eval()
    view = make_view((3, frames, 2, 5, 3))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        features = encoder(view)
        padded = torch.cat([view.clips, torch.zeros(3, FRAMES - frames, 2, 5, 3).double()], 1)
        torch.testing.assert_close(features.spatial, encoder(replace(view, clips=padded)).spatial, rtol=1e-12, atol=1e-12)
        small = kind(num_frames=frames, **options).double().eval()
        for key, target in small.state_dict().items():
            source = encoder.state_dict()[key]
            target.copy_(source[tuple(slice(size) for size in target.shape)])
        torch.testing.assert_close(features.temporal, small(view).temporal, rtol=1e-12, atol=1e-12)
        assert features.temporal.shape == (3, frames, 8)


def test_tokens_follow_the_published_layout(make_view):
    clips = make_view((2, 3, 2, 5, 3)).clips
    temporal, spatial = tokens(clips)
    assert temporal.shape == (2, 3, 30) and spatial.shape == (2, 10, 9)
    for m in range(2):
        for v in range(5):
            for c in range(3):
                assert torch.equal(temporal[:, :, m * 15 + v * 3 + c], clips[:, :, m, v, c])
                assert torch.equal(spatial[:, m * 5 + v, c::3], clips[:, :, m, v, c])


@pytest.mark.parametrize("kind", USDRL_FAMILY)
@pytest.mark.parametrize(
    "temporal, spatial",
    [((2, 6, 30), (2, 10, 15)), ((2, 6, 30), (2, 1, 18)), ((2, 6, 30), (3, 10, 18)), ((2, 7, 30), (2, 10, 21))],
    ids=["frames differ", "joints differ", "rows differ", "too long"],
)
def test_token_sets_that_do_not_fit_are_refused(kind, temporal, spatial):
    encoder = kind(num_joints=5, num_frames=FRAMES, width=8)
    with pytest.raises(ValueError, match=r"tokens must be \(N, T, 30\) and \(N, 10, T\*3\) with T in 1..6, got "):
        encoder.streams(torch.zeros(temporal), torch.zeros(spatial))


class Unchanged(torch.nn.Module):
    def forward(self, x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return x


@pytest.mark.parametrize("kind", USDRL_FAMILY)
def test_positions_are_added_as_published(kind, make_view):
    """Before every layer in DSTE, before the first one in STTR: with layers that return their input, they only add up."""
    encoder = kind(num_joints=5, num_frames=FRAMES, width=7).double().eval()
    for name in ("t_tr", "s_tr", "t_tr1", "s_tr1"):
        if hasattr(encoder, name):
            setattr(encoder, name, Unchanged())
    view = make_view((2, FRAMES, 2, 5, 3))
    t, s = encoder.ske_emb(*tokens(view.clips))
    times = 2 if kind is DSTE else 1
    position = torch.arange(FRAMES)[:, None].double()
    angle = position / 1e4 ** (torch.arange(7) // 2 * 2 / 7)
    pe = torch.where(torch.arange(7) % 2 == 0, angle.sin(), angle.cos())
    features = encoder(view)
    # the table is made in fp32
    torch.testing.assert_close(features.temporal, t + times * pe, rtol=0, atol=1e-5)
    torch.testing.assert_close(features.spatial, s + times * encoder.spe)
