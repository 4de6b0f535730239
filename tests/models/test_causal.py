"""Encoders that see the past only, against what they must not see and against the ordinary encoders on every prefix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastskel.data.batch import Batch
from fastskel.models import DSTE, STTR
from fastskel.nn.pool import prefix_pool

FRAMES = 9
KINDS = [(DSTE, 1), (DSTE, 2), (STTR, 1), (STTR, 4)]
every_kind = pytest.mark.parametrize("kind, heads", KINDS, ids=[f"{kind.__name__}-{heads}" for kind, heads in KINDS])


def build(kind, heads: int, layers: int = 2, **options):
    torch.manual_seed(0)
    sizes = dict(num_joints=5, num_bodies=2, num_frames=FRAMES, width=8, num_heads=heads, num_layers=layers)
    encoder = kind(**sizes, **options).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            # far from the start, where biases are zero and mixtures small
            parameter.add_(0.3 * torch.randn_like(parameter))
    return encoder.eval()


@every_kind
@torch.no_grad()
def test_no_token_depends_on_later_frames(kind, heads, make_view) -> None:
    encoder, view = build(kind, heads), make_view((3, FRAMES, 2, 5, 3))
    tokens = encoder(view, mode="causal").temporal
    for t in range(FRAMES - 1):
        other = view.clips.clone()
        other[:, t + 1 :] += 10 * torch.randn_like(other[:, t + 1 :])
        changed = encoder(replace(view, clips=other), mode="causal").temporal
        # to the bit: what is masked is multiplied with zero
        assert torch.equal(changed[:, : t + 1], tokens[:, : t + 1])
        assert (changed[:, t + 1 :] != tokens[:, t + 1 :]).any(-1).all()
    # and the ordinary form is not causal, or this would prove nothing
    other = view.clips.clone()
    other[:, -1] += 1
    assert not torch.equal(encoder(replace(view, clips=other)).temporal[:, :-1], encoder(view).temporal[:, :-1])


@every_kind
@torch.no_grad()
def test_each_token_is_the_last_one_of_the_ordinary_layer_on_its_prefix(kind, heads, make_view) -> None:
    encoder, view = build(kind, heads, layers=1), make_view((3, FRAMES, 2, 5, 3))
    if kind is DSTE:
        # what earlier tokens mix in is of their past only if the matrices say so
        for mixture in (encoder.layers("t_tr")[0].DSA.wt1, encoder.layers("t_tr")[0].DSA.wt2):
            mixture.weight.copy_(mixture.weight.tril())
    causal = encoder(view, mode="causal").temporal
    for t in range(FRAMES):
        prefix = replace(view, clips=view.clips[:, : t + 1], mask=view.mask[:, : t + 1])
        # rounding of merged projections and folded normalisations in fp64
        torch.testing.assert_close(causal[:, t], encoder(prefix).temporal[:, -1], rtol=1e-9, atol=1e-9)


@every_kind
@torch.no_grad()
def test_shorter_clips_give_the_same_tokens(kind, heads, make_view) -> None:
    encoder, view = build(kind, heads, layers=3), make_view((2, FRAMES, 2, 5, 3))
    whole = encoder(view, mode="causal").temporal
    part = encoder(replace(view, clips=view.clips[:, :4], mask=view.mask[:, :4]), mode="causal").temporal
    torch.testing.assert_close(part, whole[:, :4], rtol=1e-12, atol=1e-12)


@every_kind
def test_pooled_features_and_gradients(kind, heads, make_view) -> None:
    encoder, view = build(kind, heads), make_view((2, FRAMES, 2, 5, 3))
    features = encoder(view, mode="causal")
    assert features.pooled.shape == (2, encoder.num_features) and features.spatial is None
    expected = torch.cat([features.temporal.amax(1), features.temporal.mean(1)], -1)
    torch.testing.assert_close(features.pooled, expected, rtol=1e-12, atol=1e-12)
    features.pooled.square().sum().backward()
    reached = {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    own = {name for name, _ in encoder.named_parameters() if name.startswith(("t_tr", "ske_emb.t_"))}
    assert reached == own


def test_drop_path_draws_what_the_ordinary_form_draws(make_view) -> None:
    encoder = build(DSTE, 1, drop_path=0.5).train()
    # one frame has no past: both forms are the same function, each branch with its factor
    view = make_view((40, 1, 2, 5, 3))
    batch = Batch([view], torch.zeros(40, dtype=torch.int64), torch.arange(40)).at(7, 3)
    causal, ordinary = encoder(batch.views[0], mode="causal").temporal, encoder(batch.views[0]).temporal
    torch.testing.assert_close(causal, ordinary, rtol=1e-9, atol=1e-9)
    assert not torch.equal(causal, encoder.eval()(view, mode="causal").temporal)


@every_kind
def test_low_precision(kind, heads, make_view) -> None:
    encoder, view = build(kind, heads).float(), make_view((2, FRAMES, 2, 5, 3), dtype=torch.float32)
    exact = encoder(view, mode="causal").temporal
    with torch.autocast("cpu", torch.bfloat16):
        rough = encoder(view, mode="causal").temporal
    assert rough.dtype == torch.float32
    # 8 bits of mantissa through two layers
    assert (rough - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("kind", [DSTE, STTR])
def test_copies_for_inference_refuse(kind, make_view) -> None:
    encoder = build(kind, 1).optimize_for_inference()
    with pytest.raises(ValueError, match="mode must be None for a copy made for inference, got 'causal'"):
        encoder(make_view((1, FRAMES, 2, 5, 3)), mode="causal")


def test_prefixes_are_pooled_one_by_one() -> None:
    tokens = torch.randn(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pooled = prefix_pool(tokens)
    for t in range(6):
        past = tokens[:, : t + 1]
        torch.testing.assert_close(pooled[:, t], torch.cat([past.amax(1), past.mean(1)], -1))


@pytest.mark.parametrize("kind", [DSTE, STTR])
def test_parameters_by_depth(kind) -> None:
    encoder = build(kind, 1, layers=3)
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    groups = [[names[id(parameter)] for parameter in group] for group in encoder.depth_groups()]
    assert len(groups) == 4
    assert sorted(name for group in groups for name in group) == sorted(names.values())
    assert all(name.startswith(("ske_emb", "spe")) for name in groups[0])
    for depth, group in enumerate(groups[1:]):
        part = {DSTE: str(depth or ""), STTR: f".layers.{depth}"}[kind]
        assert group and all(name.startswith((f"t_tr{part}.", f"s_tr{part}.")) for name in group)
