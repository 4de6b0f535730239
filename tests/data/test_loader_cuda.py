"""The loader on a GPU: copies from pinned memory and views made there, against the host's batches."""

from __future__ import annotations

import pytest
import torch

from fastskel.data import Loader, ViewSpec, make_synthetic, usdrl_views
from fastskel.data.transforms import Shear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

MOTION = ViewSpec(stream="motion", frames=16, transforms=(Shear(),))
VIEWS = (*usdrl_views(16, num_views=3, normalise="center", min_frames=8), MOTION)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_synthetic(tmp_path_factory.mktemp("gpu") / "data", num_clips=60, bodies=2)


def make(dataset, **changes):
    return Loader(dataset, **{"views": VIEWS, "batch_size": 8, "seed": 3} | changes)


@pytest.mark.parametrize("num_threads", [0, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copies_are_the_hosts_batches(dataset, num_threads, dtype):
    expected = list(make(dataset, dtype=dtype, num_threads=0))
    loader = make(dataset, dtype=dtype, num_threads=num_threads, device="cuda")
    for _ in range(3):
        loader.epoch = loader.position = 0
        for batch, twin in zip(loader, expected, strict=True):
            # busy: were a slot written again before it is copied, the values would be another batch's
            torch.cuda._sleep(2_000_000)
            assert batch.index.tolist() == twin.index.tolist()
            assert batch.labels.tolist() == twin.labels.tolist()
            for view, other in zip(batch.views, twin.views, strict=True):
                assert view.clips.is_cuda
                assert torch.equal(view.clips.cpu(), other.clips)
                assert torch.equal(view.mask.cpu(), other.mask)
    loader.close()


def test_breaking_off_and_closing_leaves_the_device_free(dataset):
    loader = make(dataset, num_threads=2, device="cuda")
    for _ in range(5):
        for _ in loader:
            break
    loader.close()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        with make(dataset, num_threads=2, device="cuda") as other:
            list(other)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


def test_a_loader_that_is_dropped_gives_back_its_pinned_memory(dataset):
    # memory that was freed while the driver knew it could not be pinned by the next loader
    for _ in range(5):
        loader = make(dataset, num_threads=2, device="cuda")
        for _ in loader:
            pass
        del loader
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_views_made_on_the_device_equal_the_hosts_within_rounding(dataset, dtype):
    loader = make(dataset, dtype=dtype, device="cuda", engine="triton")
    for batch, twin in zip(loader, make(dataset, dtype=dtype, num_threads=0), strict=True):
        assert batch.index.tolist() == twin.index.tolist()
        assert batch.labels.tolist() == twin.labels.tolist()
        for view, other in zip(batch.views, twin.views, strict=True):
            assert torch.equal(view.mask.cpu(), other.mask)
            torch.testing.assert_close(view.clips.cpu(), other.clips, rtol=1e-5 if dtype == "float32" else 1e-2, atol=1e-5)


def test_engines_resume_each_other(dataset):
    host, device = make(dataset, num_threads=0), make(dataset, device="cuda", engine="triton")
    taken = iter(host)
    next(taken)
    next(taken)
    device.load_state_dict(host.state_dict())
    assert next(iter(device)).index.tolist() == next(taken).index.tolist()
