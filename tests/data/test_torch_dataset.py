"""Samples one by one for DataLoader: the loader's bits, in any process, layout and epoch."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastskel.data import ClipDataset, Loader, make_synthetic, usdrl_views
from fastskel.skeleton import Topology

VIEWS = usdrl_views(8, num_views=4)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_synthetic(tmp_path_factory.mktemp("clips") / "data", num_clips=24, bodies=2)


def expected(dataset, epoch, clip, seed=5):
    batch = Loader(dataset, views=VIEWS, batch_size=1, seed=seed, num_threads=0).batch(epoch, np.array([clip]))
    return [view.clips[0].permute(3, 0, 2, 1) for view in batch.views]


def test_items_are_the_four_arrays_of_the_reference(dataset):
    clips = ClipDataset(dataset, views=VIEWS, seed=5)
    assert len(clips) == 24
    for clip in (0, 7, 23):
        item = clips[clip]
        assert len(item) == 4
        for view, twin in zip(item, expected(dataset, 0, clip), strict=True):
            assert view.shape == (3, 8, 25, 2)
            assert view.is_contiguous()
            assert torch.equal(view, twin)


def test_layout_labels_and_indices(dataset):
    clips = ClipDataset(dataset, views=VIEWS, seed=5, layout="TMVC", labels=True, indices=[4, 9])
    *views, label = clips[1]
    assert label.item() == dataset.labels[9]
    for view, twin in zip(views, expected(dataset, 0, 9), strict=True):
        assert torch.equal(view.permute(3, 0, 2, 1), twin)
    with pytest.raises(IndexError):
        clips[2]


@pytest.mark.parametrize("context", [None, "fork", "spawn"])
def test_worker_processes_follow_the_epoch(dataset, context):
    clips = ClipDataset(dataset, views=VIEWS, seed=5, indices=np.arange(8))
    workers = {} if context is None else {
        "num_workers": 2, "multiprocessing_context": context, "persistent_workers": True,
    }  # fmt: skip
    loaded = DataLoader(clips, batch_size=4, **workers)
    for epoch in range(3):
        clips.set_epoch(epoch)
        batches = list(loaded)
        for number in range(8):
            twins = expected(dataset, epoch, number)
            for view, twin in zip(batches[number // 4], twins, strict=True):
                assert torch.equal(view[number % 4], twin)


def test_copies_do_not_carry_the_data(dataset):
    clips = ClipDataset(dataset, views=VIEWS, seed=5)
    content = pickle.dumps(clips)
    assert len(content) < 20_000
    for view, twin in zip(pickle.loads(content)[3], clips[3], strict=True):
        assert torch.equal(view, twin)


def test_copies_keep_what_is_not_of_the_files(dataset):
    known = dataset.topology
    # of a name that only this process would know
    own = Topology("own-25", known.joints, known.centre, known.mirror, known.parts, known.bones, known.axes)
    changed = dataclasses.replace(dataset, labels=dataset.labels + 1, topology=own)
    clips = ClipDataset(changed, views=VIEWS, seed=5, labels=True)
    copy = pickle.loads(pickle.dumps(clips))
    assert copy.dataset.topology.name == "own-25"
    assert copy[3][-1] == dataset.labels[3] + 1
    assert len(pickle.dumps(copy)) < 20_000
    [*_, labels] = next(iter(DataLoader(clips, batch_size=4, num_workers=1, multiprocessing_context="spawn")))
    assert labels.tolist() == (dataset.labels[:4] + 1).tolist()


def test_copies_of_frames_that_are_no_file(dataset):
    frames = dataset.frames.copy()
    frames *= 2
    clips = ClipDataset(dataclasses.replace(dataset, frames=frames), views=VIEWS, seed=5)
    view, twin = pickle.loads(pickle.dumps(clips))[3][0], clips[3][0]
    assert torch.equal(view, twin)
    assert not torch.equal(view, ClipDataset(dataset, views=VIEWS, seed=5)[3][0])


def test_inference_mode(dataset):
    with torch.inference_mode():
        clips = ClipDataset(dataset, views=VIEWS, seed=5)
    clips.set_epoch(2)
    assert torch.equal(clips[3][0], expected(dataset, 2, 3)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "NCHW"}, "layout must be one of CTVM, TMVC, got 'NCHW'"),
        ({"views": []}, "views must be at least one ViewSpec"),
        ({"views": ["joint"]}, "views must be at least one ViewSpec"),
        ({"views": VIEWS[0]}, "views must be at least one ViewSpec"),
        ({"seed": -1}, "seed must be in 0"),
        ({"seed": None}, "seed must be in 0 .. 2^64 - 1, got None".replace("^", r"\^")),
        ({"indices": [24]}, r"indices must be integers \(n,\) in 0 .. 23"),
        ({"indices": [0.5]}, r"indices must be integers \(n,\) in 0 .. 23"),
    ],
)
def test_bad_arguments(dataset, changes, message):
    with pytest.raises(ValueError, match=f"ClipDataset: {message}"):
        ClipDataset(dataset, **{"views": VIEWS} | changes)


def test_bad_epochs(dataset):
    clips = ClipDataset(dataset, views=VIEWS)
    for epoch in (-1, 1 << 32, 1.5, "1"):
        with pytest.raises(ValueError, match=r"ClipDataset.set_epoch: epoch must be in 0 .. 2\^32 - 1"):
            clips.set_epoch(epoch)
