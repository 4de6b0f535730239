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
from fastskel.nn import drop_path
from fastskel.nn.drop_path import (
    NO_DROPS,
    NUM_DROP_PATHS,
    LayerDrops,
    drop_path_kept,
    drop_path_scales,
    masked_drops,
    skipped_drops,
)

RATE = 0.3


def encoder(rate: float = RATE, **options: int) -> DSTE:
    torch.manual_seed(0)
    sizes = dict(num_joints=5, num_bodies=1, num_frames=4, width=8, drop_path=rate)
    return DSTE(**(sizes | options)).double().train()


def names_of(model: DSTE) -> list[str]:
    return [f"{stream}{number or ''}" for number in range(model.num_layers) for stream in ("t_tr", "s_tr")]


def plans_of(model: DSTE, view: View) -> list[LayerDrops]:
    """Plans that reached the layers: temporal and spatial of the first layer, then of the next."""
    seen: dict[str, LayerDrops] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[1]}))
        for name in names_of(model)
    ]
    model(view)
    for hook in hooks:
        hook.remove()
    return [seen[name] for name in names_of(model)]


def factors_of(plan: LayerDrops, rows: int) -> Tensor:
    """What each branch is multiplied with, (N, 6), whichever way the plan says it."""
    found = torch.zeros(rows, NUM_DROP_PATHS, dtype=torch.float64)
    for branch, (kept, factor) in enumerate(zip(plan.rows, plan.factors, strict=True)):
        if isinstance(factor, Tensor):
            found[:, branch] = factor[:, 0, 0]
        else:
            found[slice(None) if kept is None else kept, branch] = factor
    return found


def scales_of(model: DSTE, view: View) -> Tensor:
    """Factors that reached the layers, (N, num_layers, 2, 6), computed and multiplied with."""
    model.configure(drop_path_mode="mask")
    rows = len(view.clips)
    found = torch.stack([factors_of(plan, rows) for plan in plans_of(model, view)], 1)
    model.configure(drop_path_mode="skip")
    return found.reshape(rows, model.num_layers, 2, NUM_DROP_PATHS)


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
                assert actual == pytest.approx(kept / (1 - RATE), rel=1e-15)
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
    kept = drop_path_kept(rate, calls, seed=0, step=0, index=torch.arange(rows), view=view)
    assert kept.shape == (rows, calls) and kept.dtype == np.bool_
    # five deviations of a mean of 5,000 draws, and of the correlation of any two calls
    dropped = torch.from_numpy(~kept).double()
    assert (dropped.mean(0) - rate).abs().max() <= 5 * (rate * (1 - rate) / rows) ** 0.5
    if rate:
        correlation = torch.corrcoef(dropped.T) - torch.eye(calls)
        assert correlation.abs().max() < 5 / rows**0.5


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_rates_out_of_range_are_refused(rate):
    zero = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"rate must be in \[0, 1\), got {rate}"):
        drop_path_kept(rate, 1, seed=0, step=0, index=zero, view=zero)


@pytest.mark.parametrize("rate", [0.1, 0.9])
def test_both_ways_plan_the_same(rate):
    """Skipped branches have the factors of masked ones, but where CA's output is dropped: its attention goes with it."""
    rows, layers = 50, 3
    kept = np.random.default_rng(0).random((rows, layers, NUM_DROP_PATHS)) >= rate
    kept[:, 2] = True
    skips = skipped_drops(kept, rate, torch.device("cpu"))
    masks = masked_drops(torch.from_numpy(kept / (1 - rate)))
    for layer, (skip, mask) in enumerate(zip(skips, masks, strict=True)):
        masked = factors_of(mask, rows)
        torch.testing.assert_close(masked, torch.from_numpy(kept[:, layer] / (1 - rate)), rtol=1e-15, atol=0)
        assert mask.rows == (None,) * NUM_DROP_PATHS and mask.inner is None
        masked[:, drop_path.CA_ATTENTION] *= torch.from_numpy(kept[:, layer, drop_path.CA_MLP])
        torch.testing.assert_close(factors_of(skip, rows), masked, rtol=1e-15, atol=0)
        bias = torch.as_tensor(skip.bias, dtype=torch.float64).expand(rows, 1, 1)
        torch.testing.assert_close(bias, mask.bias, rtol=1e-15, atol=0)
        # CA's attention is addressed within the rows of its MLP
        mlp = torch.arange(rows) if skip.rows[drop_path.CA_MLP] is None else skip.rows[drop_path.CA_MLP]
        attention = torch.arange(rows) if skip.rows[drop_path.CA_ATTENTION] is None else skip.rows[drop_path.CA_ATTENTION]
        assert torch.equal(mlp if skip.inner is None else mlp[skip.inner], attention)
        for chosen, slots in zip(skip.rows, skip.slots, strict=True):
            if chosen is None:
                assert slots is None
                continue
            assert slots.dtype == torch.int32 and slots.shape == (rows,)
            assert torch.equal(slots[chosen], torch.arange(len(chosen), dtype=torch.int32))
            assert int((slots < 0).sum()) == rows - len(chosen)
    assert skips[2].rows == skips[2].slots == (None,) * NUM_DROP_PATHS and skips[2].inner is None


@pytest.mark.parametrize("seed", [-1, 2**64])
@pytest.mark.parametrize("mode", ["skip", "mask"])
def test_seeds_out_of_range_are_refused(mode, seed, make_view):
    model = encoder()
    model.configure(drop_path_mode=mode)
    with pytest.raises(ValueError, match="seed must be in"):
        model(batch_of(make_view, [0, 1]).at(seed=seed, step=0).views[0])


@pytest.mark.parametrize("mode", ["skip", "mask"])
def test_tensors_address_as_numbers_do(mode, make_view):
    model, batch = encoder(), batch_of(make_view, [4, 0, 9])
    model.configure(drop_path_mode=mode)
    seed, step = 2**63 + 5, 7
    numbers = model(batch.at(seed, step).views[1]).pooled
    bits = torch.tensor(seed - 2**64)
    assert torch.equal(model(batch.at(bits, torch.tensor(step)).views[1]).pooled, numbers)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
def test_scales_are_the_draws_of_the_host(rate, tensors):
    """As a captured step draws them: seed and step may be tensors."""
    index, view = torch.tensor([0, 7, 2**32 - 1, 5]), torch.tensor([0, 1, 2, 65535])
    seed, step = 2**40 + 3, 11
    kept = drop_path_kept(rate, 24, seed=seed, step=step, index=index, view=view)
    keys = dict(seed=torch.tensor(seed), step=torch.tensor(step)) if tensors else dict(seed=seed, step=step)
    scales = drop_path_scales(rate, 24, index=index, view=view, **keys)
    assert torch.equal(scales, torch.from_numpy(kept / (1 - rate)))


@pytest.mark.parametrize("gone", [0.0, 1.0], ids=["none dropped", "all dropped"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("memory", ["saved", "lean", "layer"])
def test_both_ways_compute_the_same_at_the_ends(gone, rows, memory, make_view, monkeypatch):
    """With every sample kept, and with every sample dropped."""
    model, view = encoder(), batch_of(make_view, list(range(rows))).at(seed=1, step=2).views[0]
    monkeypatch.setattr(
        "fastskel.models.dste.drop_path_kept",
        lambda rate, calls, *, seed, step, index, view: np.full((len(index), calls), gone == 0.0),
    )
    monkeypatch.setattr(
        "fastskel.models.dste.drop_path_scales",
        lambda rate, calls, *, seed, step, index, view: torch.full(
            (len(index), calls), (1 - gone) / (1 - rate), dtype=torch.float64
        ),
    )
    found = []
    for mode in ("skip", "mask"):
        model.configure(drop_path_mode=mode, memory=memory)
        model.zero_grad()
        pooled = model(view).pooled
        (pooled**3).sum().backward()
        assert pooled.isfinite().all()
        found.append([pooled.detach(), *(p.grad for p in model.parameters())])
    for skip, mask in zip(*found, strict=True):
        torch.testing.assert_close(skip, mask, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("memory", ["saved", "lean", "layer"])
@pytest.mark.parametrize("heads", [1, 2])
def test_skipping_computes_what_masking_computes(heads, memory, make_view):
    view = concat_views(batch_of(make_view, [4, 0, 9, 5]).at(seed=1, step=2).views)
    model, found = encoder(num_heads=heads, num_layers=3), []
    for mode in ("skip", "mask"):
        model.configure(drop_path_mode=mode, memory=memory)
        model.zero_grad()
        features = model(view)
        (features.pooled**3).sum().backward()
        found.append([features.temporal.detach(), features.spatial.detach(), *(p.grad for p in model.parameters())])
    for skip, mask in zip(*found, strict=True):
        # fp64 rounding through three layers
        torch.testing.assert_close(skip, mask, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mode", ["skip", "mask"])
def test_features_do_not_depend_on_chunks(mode, make_view):
    """Rows of a batch of all views, in one pass and in passes over any part of it."""
    view = concat_views(batch_of(make_view, [4, 0, 9, 5, 2**31]).at(seed=1, step=2).views)
    model = encoder(0.5)
    model.configure(drop_path_mode=mode)
    whole = model(view)
    parts: dict[str, list[Tensor]] = {"pooled": [], "temporal": [], "spatial": []}
    sizes = [1, 4, 7, 2, 1]
    for rows in torch.arange(15).split(sizes):
        address = replace(view.address, index=view.address.index[rows], view=view.address.view[rows])
        features = model(replace(view, clips=view.clips[rows], mask=view.mask[rows], address=address))
        for name, found in parts.items():
            found.append(getattr(features, name))
    for name, found in parts.items():
        # fp64 rounding of products in blocks of another size
        torch.testing.assert_close(torch.cat(found), getattr(whole, name), rtol=1e-12, atol=1e-12)
    # the masks did something, and not the same to all rows
    unlike = (whole.temporal - model.eval()(view).temporal).abs().amax((1, 2))
    assert (unlike > 1e-3).sum() > 10 and unlike.unique().numel() > 10


def test_gradients_do_not_depend_on_chunks(make_view):
    view = concat_views(batch_of(make_view, [4, 0, 9, 5]).at(seed=3, step=2).views)
    model, weight = encoder(0.5), torch.randn(12, 16).double()
    (model(view).pooled * weight).sum().backward()
    whole = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    for rows in torch.arange(12).split(5):
        address = replace(view.address, index=view.address.index[rows], view=view.address.view[rows])
        part = replace(view, clips=view.clips[rows], mask=view.mask[rows], address=address)
        (model(part).pooled * weight[rows]).sum().backward()
    for parameter, expected in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-11)


def test_skipping_has_the_mean_and_variance_of_masking():
    """Of a layer's output and input gradient; both ways draw anew: two samples of what should be one distribution."""
    torch.manual_seed(0)
    draws, rate = 8000, 0.3
    layer = encoder(num_frames=3).get_submodule("t_tr")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(1, 3, 8).double().expand(draws, -1, -1)
    weight = torch.randn(1, 3, 8).double()
    samples = {}
    for seed, mode in enumerate(("skip", "mask")):
        drawn = drop_path_kept(
            rate, NUM_DROP_PATHS, seed=seed, step=0, index=torch.arange(draws), view=torch.zeros(draws, dtype=torch.int64)
        )
        if mode == "skip":
            (plan,) = skipped_drops(drawn[:, None], rate, torch.device("cpu"))
        else:
            (plan,) = masked_drops(torch.from_numpy(drawn[:, None] / (1 - rate)))
        rows = x.clone().requires_grad_()
        out = layer(rows, plan)
        (gradient,) = torch.autograd.grad((out * weight).sum(), rows)
        samples[mode] = torch.cat([out.detach().flatten(1), gradient.flatten(1)], 1)
    skip, mask = samples["skip"], samples["mask"]
    assert not torch.equal(skip, mask)
    # five standard errors of the difference of two means; 48 numbers are compared, so one in 36,000 runs would exceed it
    error = ((skip.var(0) + mask.var(0)) / draws).sqrt()
    assert ((skip.mean(0) - mask.mean(0)).abs() / error).max() < 5
    # and of two variances: that of a sample variance is (fourth moment - variance^2) / draws
    fourth = [((sample - sample.mean(0)) ** 4).mean(0) - sample.var(0) ** 2 for sample in (skip, mask)]
    error = (sum(fourth) / draws).sqrt()
    assert ((skip.var(0) - mask.var(0)).abs() / error).max() < 5
    assert skip.var(0).min() > 1e-4


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
    assert torch.equal(training(view).pooled, evaluating(view).pooled)
    assert plans_of(training, view) == plans_of(evaluating, view) == [NO_DROPS] * 4
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
