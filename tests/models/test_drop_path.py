"""DropPath: draws have addresses, so they depend on nothing but them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fastskel import philox
from fastskel.data.batch import Batch, View, concat_views
from fastskel.models import DSTE
from fastskel.nn.drop_path import drop_path_scale
from fastskel.nn.dst_layer import NUM_DROP_PATHS

RATE = 0.3


def encoder(rate: float = RATE) -> DSTE:
    torch.manual_seed(0)
    return DSTE(num_joints=5, num_bodies=1, num_frames=4, width=8, drop_path=rate).double().train()


def scales_of(model: DSTE, view: View) -> Tensor:
    """Factors that reached the layers, (N, num_layers, 2, 6)."""
    seen: dict[str, Tensor] = {}
    names = [f"{stream}{number or ''}" for number in range(model.num_layers) for stream in ("t_tr", "s_tr")]
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[1]}))
        for name in names
    ]
    model(view)
    for hook in hooks:
        hook.remove()
    return torch.stack([seen[name] for name in names], 1).reshape(len(view.clips), model.num_layers, 2, NUM_DROP_PATHS)


def batch_of(make_view, index: list[int], num_views: int = 3) -> Batch:
    views = [make_view((len(index), 4, 1, 5, 3), seed=number) for number in range(num_views)]
    return Batch(views, torch.zeros(len(index), dtype=torch.int64), torch.tensor(index))


def test_draws_are_those_of_the_documented_address(make_view):
    batch = batch_of(make_view, [7, 3, 2**32 - 1]).at(seed=2**63 + 5, step=11)
    for number, view in enumerate(batch.views):
        scales = scales_of(encoder(), view)
        for row, sample in enumerate([7, 3, 2**32 - 1]):
            for call in range(2 * 2 * NUM_DROP_PATHS):
                counter = np.array([sample, 11, number | philox.Use.DROP_PATH << 16, call // 4], np.uint32)
                word = philox.philox4x32(counter, np.array([5, 2**31], np.uint32))[call % 4]
                kept = philox.uniform(word) >= np.float32(RATE)
                layer, stream, branch = np.unravel_index(call, (2, 2, NUM_DROP_PATHS))
                actual = float(scales[row, layer, stream, branch])
                assert actual == pytest.approx(kept / (1 - RATE), rel=1e-7)
    assert (scales == 0).any() and (scales > 0).any()


def test_one_pass_over_all_views_draws_what_single_passes_draw(make_view):
    batch = batch_of(make_view, [4, 0, 9]).at(seed=1, step=2)
    model = encoder()
    together = scales_of(model, concat_views(batch.views))
    singly = [scales_of(model, view) for view in batch.views]
    assert torch.equal(together, torch.cat(singly))
    assert not torch.equal(singly[0], singly[1])


def test_draws_do_not_depend_on_the_rest_of_the_batch(make_view):
    model, view = encoder(), batch_of(make_view, [4, 0, 9, 5]).at(seed=1, step=2).views[1]
    rows = torch.tensor([2, 0])
    address = replace(view.address, index=view.address.index[rows], view=view.address.view[rows])
    part = replace(view, clips=view.clips[rows], mask=view.mask[rows], address=address)
    assert torch.equal(scales_of(model, part), scales_of(model, view)[rows])
    torch.testing.assert_close(model(part).pooled, model(view).pooled[rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("change", [{"seed": 2}, {"step": 3}], ids=str)
def test_draws_change_with_seed_and_step(change, make_view):
    batch, model = batch_of(make_view, list(range(8))), encoder()
    first = scales_of(model, batch.at(seed=1, step=2).views[0])
    assert torch.equal(first, scales_of(model, batch.at(seed=1, step=2).views[0]))
    assert not torch.equal(first, scales_of(model, batch.at(**({"seed": 1, "step": 2} | change)).views[0]))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_rate(rate):
    rows, calls = 5000, 24
    view = torch.zeros(rows, dtype=torch.int64)
    scale = drop_path_scale(rate, calls, seed=0, step=0, index=torch.arange(rows), view=view)
    assert scale.shape == (rows, calls) and scale.dtype == torch.float32
    assert set(scale.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - rate)).item()}
    # five deviations of a mean of 5,000 draws, and of the correlation of any two calls
    dropped = (scale == 0).double()
    assert (dropped.mean(0) - rate).abs().max() <= 5 * (rate * (1 - rate) / rows) ** 0.5
    if rate:
        correlation = torch.corrcoef(dropped.T) - torch.eye(calls)
        assert correlation.abs().max() < 5 / rows**0.5


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_rates_out_of_range_are_refused(rate):
    zero = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"rate must be in \[0, 1\), got {rate}"):
        drop_path_scale(rate, 1, seed=0, step=0, index=zero, view=zero)


def test_without_address_draws_follow_torchs_seed(make_view):
    model, view = encoder(), make_view((16, 4, 1, 5, 3))
    outs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outs.append(scales_of(model, view))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    assert not torch.equal(scales_of(model, view), outs[2])


def test_nothing_is_drawn_where_nothing_is_dropped(make_view):
    view, training, evaluating = make_view((4, 4, 1, 5, 3)), encoder(0.0), encoder().eval()
    before = torch.get_rng_state()
    # eval may take torch's fused attention: fp64 rounding
    torch.testing.assert_close(training(view).pooled, evaluating(view).pooled, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_address_for_other_rows_is_refused(make_view):
    view = batch_of(make_view, [1, 2, 3]).at(0, 0).views[0]
    with pytest.raises(ValueError, match=r"view.address must have one index for each of 2 clips, got 3"):
        encoder()(replace(view, clips=view.clips[:2]))


def test_views_that_cannot_be_joined_are_refused(make_view):
    first, second = make_view((2, 4, 1, 5, 3)), make_view((2, 3, 1, 5, 3))
    with pytest.raises(ValueError, match="views must agree in shape and topology, got .*2, 3, 1, 5, 3"):
        concat_views([first, second])
    with pytest.raises(ValueError, match=r"views must agree in shape and topology, got \[\]"):
        concat_views([])
    batch = Batch([first, first], torch.zeros(2), torch.arange(2))
    addressed, later = batch.at(0, 1).views[1], batch.at(0, 2).views[0]
    for views, given in (([first, addressed], "1 of 2"), ([addressed, first], "1 of 2"), ([addressed, later], "2 of 2")):
        with pytest.raises(ValueError, match=f"views must share seed and step, got .* for {given} views"):
            concat_views(views)
