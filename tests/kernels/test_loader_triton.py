"""`Loader(engine="triton")` beside the native engine: order, draws, masks, resuming, and what comes with the views."""

from __future__ import annotations

import itertools

import pytest
import torch
from fastskel.kernels.augment import _augment_kernel

from fastskel.data import Loader, make_synthetic, usdrl_views
from fastskel.data.transforms import Rotation
from fastskel.data.views import CenterCrop, ViewSpec

# two specs in three groups: the views' numbers go on from one to the next
OTHER = ViewSpec(frames=6, crop=CenterCrop(0.5), transforms=(Rotation(),), stream="bone", normalise="center")
VIEWS = (*usdrl_views(8, num_views=2, normalise="align"), OTHER, *usdrl_views(8, num_views=1))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_synthetic(tmp_path_factory.mktemp("triton") / "data", num_clips=11, bodies=2)


def make(dataset, device, **changes):
    own = {"engine": "triton", "device": device} if device is not None else {}
    return Loader(dataset, **{"views": VIEWS, "batch_size": 3, "seed": 2**63 + 5, "weights": "balanced"} | own | changes)


def compare(batches, expected, device, eps=2.0**-23):
    for batch, twin in itertools.zip_longest(batches, expected):
        assert batch.index.tolist() == twin.index.tolist()
        assert batch.labels.tolist() == twin.labels.tolist()
        assert {name: values.tolist() for name, values in batch.extras.items()} == {
            name: values.tolist() for name, values in twin.extras.items()
        }
        for view, other in zip(batch.views, twin.views, strict=True):
            assert view.clips.device.type == view.mask.device.type == batch.labels.device.type == device.type
            assert view.clips.dtype == other.clips.dtype
            assert view.topology is other.topology
            assert torch.equal(view.mask.cpu(), other.mask)
            # some 32 operations between a coordinate of the clip and one of the view
            distance = (view.clips.cpu().double() - other.clips.double()).abs().max()
            assert distance <= 32 * eps * other.clips.double().abs().max()


def test_batches_are_those_of_the_other_engines(dataset, device, launches):
    seen = launches(_augment_kernel)
    compare(make(dataset, device), make(dataset, None), device)
    # three batches, three groups of views that agree
    assert len(seen) == 9


def test_a_last_batch_that_is_shorter(dataset, device):
    changes = {"drop_last": False, "weights": None, "batch_size": 4, "indices": [9, 2, 5, 7, 1], "rank": 1, "world_size": 2}
    batches = list(make(dataset, device, **changes))
    assert [len(batch) for batch in batches] == [3]
    compare(batches, make(dataset, None, **changes), device)


def test_half_precision(dataset, device):
    # the interpreter truncates to bfloat16 where a GPU rounds
    compare(make(dataset, device, dtype="bfloat16"), make(dataset, None, dtype="bfloat16"), device, 2.0**-11)


def test_states_and_single_batches_serve_every_engine(dataset, device):
    whole = make(dataset, None)
    ours, theirs = make(dataset, device), make(dataset, None)
    next(iter(ours))
    theirs.load_state_dict(ours.state_dict())
    compare(ours, list(theirs), device)
    assert ours.state_dict() == theirs.state_dict()
    compare([ours.batch(3, [10, 0])], [whole.batch(3, [10, 0])], device)
    # the kernel does not check
    with pytest.raises(ValueError, match="Loader: index must be in 0 .. 10"):
        ours.batch(3, [11])
