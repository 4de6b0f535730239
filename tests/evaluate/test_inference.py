"""Encoders prepared for inference, and `fastskel.extract` over arrays, one clip and data sets."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import torch

import fastskel
from fastskel.data.views import eval_view
from fastskel.evaluate import dataset_features, inference
from fastskel.models import DSTE, STTR
from fastskel.skeleton import topology

FRAMES = 6
VIEW = eval_view(frames=FRAMES, normalise="none")


def build(kind: type, heads: int = 1, bodies: int = 1, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    encoder = kind(num_joints=25, num_bodies=bodies, num_frames=FRAMES, width=24, num_heads=heads)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder.to(dtype)


def clips(count: int = 7, frames: int = FRAMES, bodies: int = 1) -> torch.Tensor:
    return torch.randn(count, frames, bodies, 25, 3, generator=torch.Generator().manual_seed(1))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((actual - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("frames", [1, 4, FRAMES])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("kind", [DSTE, STTR])
def test_a_prepared_encoder_is_the_same_function(kind, heads, frames):
    encoder = build(kind, heads).double()
    view = inference._view(clips(frames=frames).double(), None)
    prepared = encoder.optimize_for_inference()
    expected = encoder.eval()(view)
    actual = prepared(view)
    for name in ("pooled", "temporal", "spatial"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name).detach(), rtol=1e-12, atol=1e-12)
    assert not actual.pooled.requires_grad
    # half precision: products of rounded operands; the residual stream and so the features stay in fp32
    for dtype, limit in ((torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        low = encoder.float().optimize_for_inference(dtype)(replace(view, clips=view.clips.float()))
        assert low.pooled.dtype == torch.float32
        assert relative(low.pooled.double(), expected.pooled) < limit
        encoder.double()


@pytest.mark.parametrize("kind", [DSTE, STTR])
def test_a_prepared_encoder_stands_alone(kind):
    encoder = build(kind).train()
    view = inference._view(clips(), None)
    prepared = encoder.optimize_for_inference()
    assert encoder.training and not prepared.training
    before = prepared(view).pooled.clone()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(2.0)
    assert torch.equal(prepared(view).pooled, before)
    assert prepared.optimize_for_inference() is prepared
    assert torch.equal(copy.deepcopy(prepared)(view).pooled, before)
    stream = io.BytesIO()
    torch.save(prepared, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(view).pooled, before)
    assert torch.equal(torch.nn.Sequential(prepared).eval()[0](view).pooled, before)
    with pytest.raises(ValueError, match="mode must be evaluation for a copy made for inference, got training"):
        prepared.train()
    with pytest.raises(ValueError, match="dtype must be torch.float32 for this copy, got torch.bfloat16"):
        prepared.optimize_for_inference(torch.bfloat16)
    with pytest.raises(ValueError, match="dtype must be one of .*, got torch.int8"):
        encoder.optimize_for_inference(torch.int8)


@pytest.mark.parametrize("backend", ["math", "sdpa", "fastskel"])
@pytest.mark.parametrize("kind", [DSTE, STTR])
def test_the_backend_is_chosen_before(kind, backend):
    encoder = build(kind)
    view = inference._view(clips(), None)
    expected = encoder.eval()(view).pooled
    encoder.configure(attention_backend=backend)
    # fp32 rounding of another order of products
    torch.testing.assert_close(encoder.optimize_for_inference()(view).pooled, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [None, 1, 3, 100])
def test_extract_from_arrays(batch_size):
    encoder, data = build(DSTE).train(), clips()
    features = fastskel.extract(encoder, data.numpy(), batch_size=batch_size, device="cpu", progress=False)
    assert encoder.training and features.shape == (7, encoder.num_features)
    assert features.device.type == "cpu" and not features.is_inference()
    encoder.eval()
    expected = encoder(inference._view(data, None)).pooled.detach()
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    single = fastskel.extract(encoder, data[2], device="cpu")
    assert single.shape == (encoder.num_features,)
    torch.testing.assert_close(single, expected[2], rtol=1e-4, atol=1e-5)
    view = inference._view(data, topology("ntu-25"))
    torch.testing.assert_close(fastskel.extract(encoder, view, device="cpu", progress=False), features, rtol=1e-4, atol=1e-5)


def test_extract_from_a_data_set(dataset):
    encoder = build(DSTE)
    features = fastskel.extract(encoder, dataset, view=VIEW, device="cpu", progress=False)
    whole = np.arange(len(dataset))
    expected = dataset_features(encoder, dataset, VIEW, whole, progress=False).features
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    some = fastskel.extract(encoder, dataset, view=VIEW, indices=[5, 2], device="cpu", progress=False, dtype=torch.bfloat16)
    assert relative(some, expected[[5, 2]]) < 2e-2


def test_extract_serves_encoders_that_prepare_nothing(encoder, dataset):
    encoder.train()
    features = fastskel.extract(encoder, dataset, view=VIEW, device="cpu", progress=False)
    assert torch.equal(features, dataset_features(encoder, dataset, VIEW, np.arange(len(dataset)), progress=False).features)
    with pytest.raises(ValueError, match="dtype must be None or torch.float32 for .*, got torch.bfloat16"):
        fastskel.extract(encoder, dataset, view=VIEW, dtype=torch.bfloat16)


def test_a_full_memory_halves_the_batch(monkeypatch):
    encoder, sizes = build(STTR), []
    original = inference._encode

    def scarce(prepared, view, place):
        sizes.append(len(view.clips))
        if len(view.clips) > 2:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return original(prepared, view, place)

    monkeypatch.setattr(inference, "_encode", scarce)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    features = fastskel.extract(encoder, clips(), batch_size=5, device="cpu", progress=False)
    assert sizes == [5, 2, 2, 2, 1] and len(features) == 7


@pytest.mark.parametrize(
    "data, options, message",
    [
        (np.zeros((2, 3), np.float32), {}, r"data must be floating-point clips, .* got torch.float32 of shape \(2, 3\)"),
        (np.zeros((1, 6, 1, 25, 3), np.int64), {}, "data must be floating-point clips, .* got torch.int64"),
        (np.zeros((0, 6, 1, 25, 3), np.float32), {}, r"got torch.float32 of shape \(0, 6, 1, 25, 3\)"),
        (np.zeros((1, 6, 1, 25, 3), np.float32), {"view": VIEW}, "view and indices must be None for arrays"),
        (np.zeros((1, 6, 1, 25, 3), np.float32), {"indices": [0]}, "view and indices must be None for arrays"),
        (np.zeros((1, 6, 1, 25, 3), np.float32), {"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        (np.zeros((1, 6, 1, 25, 3), np.float32), {"topology": topology("coco-17")}, "topology must have the clips' 25 joints"),
        (np.zeros((1, 6, 1, 25, 3), np.float32), {"batch_size": 2.5}, "batch_size must be a positive integer, got 2.5"),
        ("somewhere", {}, "data must be a packed data set, a View or an array of clips, got str"),
        (np.full((2, 6, 1, 25, 3), np.nan, np.float32), {}, "features must be finite, got nan or inf for clip 0"),
        (np.zeros((1, 6, 2, 25, 3), np.float32), {}, r"clips must be \(N, 1..6, 1, 25, 3\), got \(1, 6, 2, 25, 3\)"),
    ],
    ids=["dims", "integers", "empty", "view", "indices", "batch", "topology", "half", "path", "nan", "bodies"],
)
def test_bad_input_is_refused_by_name(data, options, message):
    with pytest.raises(ValueError, match=message):
        fastskel.extract(build(DSTE), data, device="cpu", progress=False, **options)


@pytest.mark.parametrize("make", ["readonly", "reversed", "big-endian", "fortran", "float64"])
def test_arrays_of_any_layout(make):
    data, encoder = clips().numpy(), build(DSTE)
    expected = fastskel.extract(encoder, data, device="cpu", progress=False)
    if make == "readonly":
        data.flags.writeable = False
    layouts = {
        "reversed": data[:, ::-1], "big-endian": data.astype(">f4"), "fortran": np.asfortranarray(data),
        "float64": data.astype(np.float64),
    }  # fmt: skip
    same = layouts.get(make, data)
    if make == "reversed":
        expected = fastskel.extract(encoder, np.ascontiguousarray(same), device="cpu", progress=False)
    torch.testing.assert_close(fastskel.extract(encoder, same, device="cpu", progress=False), expected, rtol=1e-5, atol=1e-5)


def test_a_frozen_copy_has_no_state_and_is_not_configured():
    prepared = build(DSTE).optimize_for_inference()
    assert not prepared.state_dict() and not list(prepared.parameters())
    with pytest.raises(ValueError, match="a copy made for inference must stay as it is"):
        prepared.configure(attention_backend="math")
    with pytest.raises(ValueError, match="encoder must be an Encoder, got Linear"):
        fastskel.extract(torch.nn.Linear(2, 2), clips(), device="cpu")


def test_a_data_set_needs_its_view(dataset):
    with pytest.raises(ValueError, match="view must be given for the data set"):
        fastskel.extract(build(DSTE), dataset, device="cpu")


def test_the_package_names_what_it_lacks():
    with pytest.raises(AttributeError, match="module 'fastskel' has no attribute 'extrakt'"):
        fastskel.extrakt  # noqa: B018
