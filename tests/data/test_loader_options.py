"""What a loader is asked for: types, a user's transforms, weights, extras, and arguments that it refuses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fastskel.data import Loader, make_synthetic, usdrl_views
from fastskel.data.transforms import SpatialTransform
from fastskel.data.views import CenterCrop, ViewSpec
from fastskel.philox import integer_weights, weighted_order

VIEWS = usdrl_views(8, num_views=2, normalise="center", min_frames=4)


@pytest.fixture(scope="module")
def dataset(memory_dataset):
    return memory_dataset(np.arange(23) + 5)


def make(dataset, **changes):
    return Loader(dataset, **{"views": VIEWS, "batch_size": 4, "seed": 3} | changes)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float16", torch.float16),
        (torch.bfloat16, torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        (torch.float32, torch.float32),
    ],
)
def test_dtype(dataset, dtype, expected):
    plain, cast = next(iter(make(dataset))), next(iter(make(dataset, dtype=dtype)))
    assert cast.views[0].clips.dtype == expected
    assert torch.equal(cast.views[0].clips, plain.views[0].clips.to(expected))


@dataclass(frozen=True)
class Halved(SpatialTransform):
    """A user's own transform."""

    def matrices(self, spatial, joints, num_joints, num_channels):
        return np.broadcast_to(np.eye(num_channels, dtype=np.float32) / 2, (len(spatial), num_joints, num_channels, num_channels))


def test_own_transforms_need_numpy(dataset):
    views = [ViewSpec(frames=8, transforms=(Halved(),))]
    with pytest.raises(ValueError, match=r'got Halved, which native code does not know. Use Loader\(engine="numpy"\)'):
        make(dataset, views=views)
    plain, halved = make(dataset, views=[ViewSpec(frames=8)]), make(dataset, views=views, engine="numpy")
    for one, other in zip(plain, halved, strict=True):
        assert torch.equal(one.views[0].clips / 2, other.views[0].clips)


def test_weights(dataset):
    weights = np.arange(23) % 4
    loader = make(dataset, weights=weights, num_threads=0)
    drawn = np.concatenate([loader.order(epoch) for epoch in range(400)])
    assert not np.isin(drawn, np.flatnonzero(weights == 0)).any()
    expected = weights / weights.sum() * len(drawn)
    counts = np.bincount(drawn, minlength=23)
    used = weights > 0
    # 16 degrees of freedom: 45.9 is exceeded once in ten thousand times
    assert ((counts - expected)[used] ** 2 / expected[used]).sum() < 45.9
    integers = integer_weights(weights)
    positions = weighted_order(3, 7, integers, 23)
    assert loader.order(7).tolist() == positions[: loader.num_samples].tolist()


def test_balanced_classes(memory_dataset):
    data = memory_dataset(np.arange(30) + 5)
    data.labels[:] = np.repeat([0, 1, 5], [24, 4, 2])
    loader = make(data, weights="balanced", num_threads=0)
    drawn = data.labels[np.concatenate([loader.order(epoch) for epoch in range(200)])]
    counts = np.array([(drawn == label).sum() for label in (0, 1, 5)])
    expected = len(drawn) / 3
    # 2 degrees of freedom: 18.4 is exceeded once in ten thousand times
    assert ((counts - expected) ** 2 / expected).sum() < 18.4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": [1.0] * 22}, "weights must be 23, one per sample, got 22"),
        ({"weights": [0.0] * 23}, "weights must be finite, at least 0 and not all zero"),
        ({"weights": [-1.0] + [1.0] * 22}, "weights must be finite, at least 0"),
        ({"weights": [float("nan")] * 23}, "weights must be finite"),
        ({"weights": "even"}, "weights must be numbers or 'balanced', got 'even'"),
        ({"weights": ["a"] * 23}, r"weights must be numbers \(n,\)"),
        ({"weights": [1.0] * 23, "shuffle": False}, "shuffle must be True with weights"),
        ({"engine": "cuda"}, "engine must be one of native, numpy, triton, got 'cuda'"),
    ],
)
def test_bad_weights_and_engines(dataset, changes, message):
    with pytest.raises(ValueError, match=f"(Loader|integer_weights): {message}"):
        make(dataset, **changes)


def test_labels_must_be_known_to_balance_them(memory_dataset):
    data = memory_dataset([9, 9, 9, 9])
    data.labels[2] = -1
    with pytest.raises(ValueError, match="labels must be known to balance classes"):
        make(data, weights="balanced")


def test_extras(memory_dataset):
    lengths = np.array([4, 9, 16])
    per_frame = np.concatenate([np.arange(length) + 100 * clip for clip, length in enumerate(lengths)])
    columns = [
        ("subject", [7, 8, 9], "clip"),
        ("place", ["a", "b", "c"], "clip"),
        ("frame", per_frame, "frame"),
        ("score", per_frame / 10, "frame"),
    ]
    dataset = memory_dataset(lengths, columns=columns)
    views = [ViewSpec(frames=8, crop=CenterCrop()), *VIEWS]
    batch = next(iter(Loader(dataset, views=views, batch_size=3, shuffle=False)))
    assert set(batch.extras) == {"subject", "frame", "score"}
    assert batch.extras["subject"].tolist() == [7, 8, 9]
    assert batch.extras["frame"].dtype == torch.int64
    assert batch.extras["frame"].tolist() == [
        [0, 0, 1, 1, 2, 2, 3, 3],
        [100, 101, 102, 103, 105, 106, 107, 108],
        [201, 203, 205, 207, 209, 211, 213, 215],
    ]


def test_extras_follow_the_random_crop(memory_dataset):
    # joint 0 holds the frame number: linear in time, so the resized value is within half a source frame of the nearest
    lengths = np.arange(30) + 20
    numbers = np.concatenate([np.arange(length) for length in lengths])
    dataset = memory_dataset(lengths, columns=[("frame", numbers, "frame")])
    dataset.frames[:] = numbers[:, None, None, None]
    loader = Loader(dataset, views=[ViewSpec(frames=12, crop=usdrl_views(min_frames=5)[0].crop)], batch_size=30)
    batch = next(iter(loader))
    difference = batch.views[0].clips[:, :, 0, 0, 0] - batch.extras["frame"]
    assert difference.abs().max() <= 0.5


def test_packed_data(tmp_path):
    packed = make_synthetic(tmp_path / "synthetic", num_clips=40, bodies=2)
    loader = Loader(packed, views=usdrl_views(16), batch_size=8, indices=packed.splits["xsub"]["train"])
    for batch in loader:
        assert batch.stack().shape == (4, 8, 16, 2, 25, 3)
        assert torch.isfinite(batch.stack()).all()
        assert batch.views[0].mask[:, :, 0].all()
        assert not batch.views[0].mask[:, :, 1].any()
        assert set(batch.extras) == {"subject", "camera", "setup"}
        assert (batch.extras["subject"] % 2 == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 24}, "batch_size must be at most the number of samples, got 24 for 23"),
        ({"batch_size": 12, "world_size": 2}, "got 12 for 11"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"views": []}, "views must be at least one ViewSpec"),
        ({"views": [ViewSpec(topology="coco-17")]}, "topology must be that of the data set in-memory"),
        ({"indices": [0, 23]}, "indices must be in 0 .. 22 for in-memory, got 0 .. 23"),
        ({"indices": [-1]}, "indices must be in 0 .. 22"),
        ({"indices": []}, "indices must be a non-empty list of integers"),
        ({"indices": [True] * 23}, "indices must be a non-empty list of integers"),
        ({"indices": [1, 1]}, "indices must be distinct, got 1 repeated"),
        ({"num_threads": -1}, "num_threads must be at least 0"),
        ({"dtype": "float64"}, "dtype must be one of float32, float16, bfloat16, got float64"),
        ({"rank": 2, "world_size": 2}, "rank must be in 0 .. world_size - 1 = 1, got 2"),
        ({"seed": -1}, "seed must be in 0"),
        ({"seed": 1 << 64}, "seed must be in 0"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"batch_size": 2.5}, "batch_size must be a whole number, got 2.5"),
        ({"batch_size": "2"}, "batch_size must be a whole number, got '2'"),
        ({"num_threads": 1.5}, "num_threads must be a whole number, got 1.5"),
        ({"rank": None}, "rank must be a whole number, got None"),
        ({"world_size": "2"}, "world_size must be a whole number, got '2'"),
        ({"views": VIEWS[0]}, r"views must be a sequence of ViewSpec, got ViewSpec\("),
        ({"views": ["joint"]}, r"views must be a sequence of ViewSpec, got \['joint'\]"),
    ],
)
def test_bad_arguments(dataset, changes, message):
    with pytest.raises(ValueError, match=f"Loader: .*{message}|ViewSpec: {message}"):
        make(dataset, **changes)
