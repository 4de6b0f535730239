"""What a loader promises beside its batches: one batch by itself, states, closing, and data sets that somebody changed."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import torch

from fastskel.data import ClipDataset, Loader, make_synthetic, usdrl_views
from fastskel.data.views import CenterCrop, RandomCrop, ViewSpec

VIEWS = usdrl_views(8, num_views=2, min_frames=4)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_synthetic(tmp_path_factory.mktemp("contracts") / "data", num_clips=22, bodies=2)


def make(dataset, **changes):
    return Loader(dataset, **{"views": VIEWS, "batch_size": 4, "seed": 3, "num_threads": 2} | changes)


def clips(loader):
    return torch.cat([batch.stack() for batch in loader], 1)


@pytest.mark.parametrize("index", [[5, 2], np.array([5, 2], np.int32), np.arange(6)[5::-3], torch.tensor([5, 2])])
@pytest.mark.parametrize("engine", ["native", "numpy"])
def test_a_batch_of_any_list_of_samples(dataset, engine, index):
    batch = make(dataset, engine=engine).batch(2, index)
    assert batch.index.tolist() == [5, 2]
    assert torch.equal(batch.stack(), make(dataset).batch(2, np.array([5, 2])).stack())


@pytest.mark.parametrize(
    ("epoch", "index", "message"),
    [
        (0, [22], r"index must be in 0 .. 21, got \[22\]"),
        (0, [-1], r"index must be in 0 .. 21, got \[-1\]"),
        (0, [0.5], r"index must be integers \(N,\), got float64 \(1,\)"),
        (0, 3, r"index must be integers \(N,\), got int64 \(\)"),
        (1 << 32, [0], r"epoch must be in 0 .. 2\^32 - 1, got 4294967296"),
    ],
)
def test_refuses_samples_that_are_not_there(dataset, epoch, index, message):
    with pytest.raises(ValueError, match=f"Loader: {message}"):
        make(dataset).batch(epoch, index)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "nowhere"}, "device must be the CPU or a CUDA device, got 'nowhere'"),
        ({"device": "meta"}, "device must be the CPU or a CUDA device, got 'meta'"),
        ({"engine": "triton"}, 'device must be a GPU with engine="triton", got cpu'),
    ],
)
def test_bad_devices(dataset, changes, message):
    with pytest.raises(ValueError, match=f"Loader: {message}"):
        make(dataset, **changes)


@pytest.mark.parametrize("kind", [Loader, ClipDataset])
def test_a_folder_is_no_data_set(dataset, kind):
    options = {"batch_size": 4} if kind is Loader else {}
    with pytest.raises(ValueError, match=f"{kind.__name__}: dataset must be a PackedDataset, got PosixPath. Open its folder"):
        kind(dataset.path, views=VIEWS, **options)


def test_closing_while_batches_are_taken_is_no_end_of_the_epoch(dataset):
    loader = make(dataset)
    batches = iter(loader)
    next(batches)
    loader.close()
    with pytest.raises(RuntimeError, match="iterations must end before the loader is closed"):
        next(batches)
    assert loader.state_dict()["position"] == 1
    assert torch.equal(clips(loader), clips(make(dataset))[:, 4:])


def test_a_state_that_is_loaded_ends_the_iteration(dataset):
    loader = make(dataset)
    batches = iter(loader)
    next(batches)
    loader.load_state_dict(make(dataset).state_dict() | {"epoch": 2, "position": 3})
    with pytest.raises(RuntimeError, match="or a state that was loaded in between"):
        next(batches)
    assert (loader.epoch, loader.position) == (2, 3)
    assert torch.cat([batch.index for batch in loader]).tolist() == loader.order(2)[12:].tolist()


@pytest.mark.parametrize("changes", [{"position": 1.5}, {"position": "1"}, {"epoch": None}, {"position": -1}])
def test_refuses_damaged_states(dataset, changes):
    loader = make(dataset)
    with pytest.raises(ValueError, match="state_dict must be an epoch and a position below 5"):
        loader.load_state_dict(loader.state_dict() | changes)
    for name in ("epoch", "position"):
        state = loader.state_dict()
        del state[name]
        with pytest.raises(ValueError, match="state_dict must be an epoch and a position below 5"):
            loader.load_state_dict(state)
    with pytest.raises(ValueError, match="state_dict must be a dictionary, got None"):
        loader.load_state_dict(None)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("weights", [None, "balanced", np.arange(22) + 1.0], ids=["none", "balanced", "numbers"])
def test_ranks_make_the_batches_of_one_process(dataset, weights, world_size):
    whole = make(dataset, batch_size=1, weights=weights)
    expected = {}
    for place, batch in enumerate(whole):
        expected[place] = batch
    for rank in range(world_size):
        part = make(dataset, batch_size=2, weights=weights, rank=rank, world_size=world_size)
        place = rank
        for batch in part:
            for row in range(2):
                assert batch.index[row] == expected[place].index[0]
                assert torch.equal(batch.stack()[:, row], expected[place].stack()[:, 0])
                place += world_size


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ViewSpec(crop=None), "ViewSpec: crop must be a RandomCrop or a CenterCrop, got None"),
        (lambda: ViewSpec(crop=0.5), "ViewSpec: crop must be a RandomCrop or a CenterCrop, got 0.5"),
        (lambda: RandomCrop("all"), "RandomCrop: low and high must be 0 <= low <= high <= 1, got 'all', 1.0"),
        (lambda: RandomCrop(float("nan")), "RandomCrop: low and high must be 0 <= low <= high <= 1, got nan, 1.0"),
        (lambda: CenterCrop("all"), r"CenterCrop: ratio must be in \(0, 1\], got 'all'"),
    ],
)
def test_bad_crops(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def copied(dataset):
    # still of the type of a memory map, but nobody's file
    frames = dataset.frames.copy()
    frames *= 2
    return dataclasses.replace(dataset, frames=frames)


def first_body(dataset):
    return dataclasses.replace(dataset, frames=dataset.frames[:, :1], num_bodies=np.ones_like(dataset.num_bodies))


def tail(dataset):
    first = dataset.offsets[10]
    fields = {name: getattr(dataset, name)[10:] for name in ("labels", "names", "num_bodies")}
    offsets = dataset.offsets[10:] - first
    return dataclasses.replace(dataset, frames=dataset.frames[first:], offsets=offsets, columns={}, **fields)


@pytest.mark.parametrize("change", [copied, first_body, tail])
def test_the_clips_are_the_data_set_s_not_the_file_s(dataset, change):
    changed = change(dataset)
    expected = make(changed, engine="numpy").batch(0, [0, 1]).stack()
    assert torch.equal(make(changed).batch(0, [0, 1]).stack(), expected)
    assert not torch.equal(make(dataset).batch(0, [0, 1]).stack(), expected)


@pytest.mark.parametrize("name", ["frames", "offsets"])
def test_a_file_that_was_damaged_since_is_named(tmp_path, name):
    dataset = make_synthetic(tmp_path / "data", num_clips=22)
    path = tmp_path / "data" / f"{name}.npy"
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises((ValueError, RuntimeError), match=rf"{name}\.npy"):
        make(dataset)


@pytest.mark.parametrize("engine", ["native", "numpy"])
def test_torch_s_defaults_change_nothing(dataset, engine):
    expected = clips(make(dataset))
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        views = [batch.views for batch in make(dataset, engine=engine)]
        items = ClipDataset(dataset, views=VIEWS, seed=3, labels=True, layout="TMVC")[4]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert all(view.mask.device.type == "cpu" for made in views for view in made)
    assert torch.equal(torch.cat([torch.stack([view.clips for view in made]) for made in views], 1), expected)
    assert [item.device.type for item in items] == ["cpu"] * 3
    assert torch.equal(torch.stack(items[:2]), make(dataset).batch(0, [4]).stack()[:, 0])
