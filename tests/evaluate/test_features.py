"""Extraction: order, modes, precision, and a cache that is never silently wrong."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastskel.data.views import eval_view
from fastskel.evaluate import dataset_features, feature_cache, features, raw_features

VIEW = eval_view(frames=6, normalise="none")
INDICES = np.array([3, 0, 16, 7, 9])


def _extract(encoder, dataset, indices=INDICES, **options):
    return dataset_features(encoder, dataset, VIEW, indices, progress=False, **options)


def _only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize("batch_size", [1, 2, 5, 256], ids=str)
@pytest.mark.parametrize("num_threads", [0, 2], ids=lambda n: f"threads{n}")
def test_rows_follow_the_indices(encoder, dataset, batch_size: int, num_threads: int) -> None:
    result = _extract(encoder, dataset, batch_size=batch_size, num_threads=num_threads)
    assert result.index.tolist() == INDICES.tolist()
    assert result.labels.tolist() == dataset.labels[INDICES].tolist()
    assert (result.features.dtype, tuple(result.features.shape)) == (torch.float32, (5, 8))
    encoder.eval()
    raw = raw_features(dataset, VIEW, INDICES)
    expected = encoder.linear(raw.features.reshape(5, 6, 75).mean(1)).detach()
    # a mean over 6 frames and a product over 75 coordinates in fp32, summed in batches of another size
    torch.testing.assert_close(result.features, expected, rtol=1e-5, atol=1e-5)


def test_modes_and_gradients_are_left_alone(encoder, dataset) -> None:
    encoder.train()
    encoder.linear.eval()
    first, second = _extract(encoder, dataset), _extract(encoder, dataset)
    assert torch.equal(first.features, second.features), "dropout was active"
    assert not first.features.requires_grad
    assert (encoder.training, encoder.linear.training, encoder.dropout.training) == (True, False, True)
    assert torch.is_grad_enabled()


def test_modes_are_restored_after_an_error(encoder, dataset) -> None:
    dataset.frames[dataset.offsets[7]] = np.nan
    encoder.train()
    with pytest.raises(
        ValueError, match=r"features must be finite, got nan or inf for clip 7 \(clip007\) of in-memory"
    ):
        _extract(encoder, dataset)
    assert encoder.training
    with pytest.raises(ValueError, match="raw_features: features must be finite"):
        raw_features(dataset, VIEW, INDICES)


def test_bf16_is_close_and_distinct(encoder, dataset) -> None:
    exact, rough = _extract(encoder, dataset), _extract(encoder, dataset, precision="bf16")
    assert rough.features.dtype == torch.float32
    assert not torch.equal(exact.features, rough.features)
    # bf16 keeps 8 bits; inputs and weights are rounded before products over 75 coordinates
    error = (exact.features - rough.features).norm() / exact.features.norm()
    assert error < 2 * 2**-8


def test_cached_features_need_no_encoder(encoder, dataset, tmp_path: Path) -> None:
    first = _extract(encoder, dataset, cache=tmp_path / "features")
    calls = encoder.calls[0]
    second = _extract(encoder, dataset, cache=tmp_path / "features", batch_size=2)
    assert encoder.calls[0] == calls == 1
    assert torch.equal(first.features, second.features)
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.index, second.index)
    assert _only(tmp_path / "features").suffix == ".safetensors"


def _change_weight(encoder, dataset, options):
    with torch.no_grad():
        encoder.linear.bias[0] += 1e-3
    return dataset, VIEW, INDICES, options


def _change_setting(encoder, dataset, options):
    encoder.scale = 2.0
    return dataset, VIEW, INDICES, options


def _change_data(encoder, dataset, options):
    return replace(dataset, meta=dataset.meta | {"checksums": {"frames.npy": "other"}}), VIEW, INDICES, options


def _change_view(encoder, dataset, options):
    return dataset, eval_view(frames=6, stream="motion", normalise="none"), INDICES, options


def _change_indices(encoder, dataset, options):
    return dataset, VIEW, INDICES[::-1].copy(), options


def _change_precision(encoder, dataset, options):
    return dataset, VIEW, INDICES, options | {"precision": "bf16"}


CHANGES = [_change_weight, _change_setting, _change_data, _change_view, _change_indices, _change_precision]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
@pytest.mark.parametrize("cache_key", [None, "train"], ids=["by-digest", "named"])
def test_a_change_computes_again(encoder, dataset, tmp_path: Path, change, cache_key) -> None:
    options = {"cache": tmp_path, "cache_key": cache_key, "progress": False}
    dataset_features(encoder, dataset, VIEW, INDICES, **options)
    calls = encoder.calls[0]
    data, view, indices, options = change(encoder, dataset, options)
    if cache_key is None:
        changed = dataset_features(encoder, data, view, indices, **options)
        assert len(list(tmp_path.iterdir())) == 2
    else:
        with pytest.warns(UserWarning, match="computed again: it was made with other weights, data or settings"):
            changed = dataset_features(encoder, data, view, indices, **options)
        assert _only(tmp_path).name == "train.safetensors"
    assert encoder.calls[0] == calls + 1
    fresh = dataset_features(encoder, data, view, indices, **(options | {"cache": None}))
    assert torch.equal(changed.features, fresh.features)


def test_labels_are_read_afresh(encoder, dataset, tmp_path: Path) -> None:
    _extract(encoder, dataset, cache=tmp_path)
    relabelled = replace(dataset, labels=dataset.labels + 1)
    assert _extract(encoder, relabelled, cache=tmp_path).labels.tolist() == (dataset.labels[INDICES] + 1).tolist()
    assert encoder.calls[0] == 1


def test_frames_are_the_identity_without_checksums(encoder, dataset, tmp_path: Path) -> None:
    plain = replace(dataset, meta=dataset.meta | {"checksums": {}})
    _extract(encoder, plain, cache=tmp_path)
    plain.frames[0, 0, 0, 0] += 1
    _extract(encoder, plain, cache=tmp_path)
    assert encoder.calls[0] == 2


@pytest.fixture
def interrupted(encoder, dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Encode two clips at a time into a cache up to a batch, and return how many batches the next call encodes."""
    monkeypatch.setattr(feature_cache, "SECONDS", 0.0)

    def stop_after(count: int) -> int:
        whole = features.batches

        def part(*given):
            yield from itertools.islice(whole(*given), count)
            raise KeyboardInterrupt

        monkeypatch.setattr(features, "batches", part)
        with pytest.raises(KeyboardInterrupt):
            _extract(encoder, dataset, cache=tmp_path, batch_size=2)
        monkeypatch.setattr(features, "batches", whole)
        before = encoder.calls[0]
        again = _extract(encoder, dataset, cache=tmp_path, batch_size=2)
        made = encoder.calls[0] - before
        assert torch.equal(again.features, _extract(encoder, dataset, batch_size=2).features)
        assert again.index.tolist() == INDICES.tolist()
        # the pieces have gone
        assert _only(tmp_path).stem.startswith("features-") and "from" not in _only(tmp_path).stem
        return made

    return stop_after


@pytest.mark.parametrize("count, left", [(0, 3), (1, 2), (2, 1), (3, 0)], ids=str)
def test_an_interrupted_encoding_goes_on(interrupted, count: int, left: int) -> None:
    assert interrupted(count) == left


def test_a_damaged_piece_is_encoded_again(interrupted, monkeypatch: pytest.MonkeyPatch) -> None:
    write = feature_cache.write_features

    def damaged(path: Path, key: str, values: torch.Tensor) -> None:
        write(path, key, values)
        if path.stem.endswith(".from-2"):
            path.write_bytes(_flip(path.read_bytes()))

    monkeypatch.setattr(feature_cache, "write_features", damaged)
    with pytest.warns(UserWarning, match="from-2.safetensors are computed again: its content does not match"):
        assert interrupted(3) == 2


def test_an_encoding_of_other_weights_is_not_gone_on_with(encoder, dataset, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(feature_cache, "SECONDS", 0.0)
    monkeypatch.setattr(feature_cache.FeaturePieces, "finish", lambda self, features: None)
    _extract(encoder, dataset, cache=tmp_path, cache_key="train")
    assert _only(tmp_path).name == "train.from-0.safetensors"
    with torch.no_grad():
        encoder.linear.bias[0] += 1e-3
    with pytest.warns(UserWarning, match="train.from-0.safetensors are computed again: it was made with other weights"):
        found = _extract(encoder, dataset, cache=tmp_path, cache_key="train")
    assert torch.equal(found.features, _extract(encoder, dataset).features)


def _truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _empty(content: bytes) -> bytes:
    return b""


def _flip(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


def _other_format(content: bytes) -> bytes:
    return b"not a tensor file" * 9


@pytest.mark.parametrize("damage", [_truncate, _empty, _flip, _other_format], ids=lambda damage: damage.__name__[1:])
def test_a_damaged_cache_is_computed_again(encoder, dataset, tmp_path: Path, damage) -> None:
    first = _extract(encoder, dataset, cache=tmp_path)
    path = _only(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=rf"features cached in .*{path.name} are computed again"):
        second = _extract(encoder, dataset, cache=tmp_path)
    assert torch.equal(first.features, second.features)
    assert encoder.calls[0] == 2
    # mended: no warning now, and nothing else lies about
    _extract(encoder, dataset, cache=tmp_path)
    assert encoder.calls[0] == 2
    assert _only(tmp_path) == path


def test_raw_features_are_the_flattened_view(dataset) -> None:
    result = raw_features(dataset, VIEW, INDICES, batch_size=2)
    assert tuple(result.features.shape) == (5, 6 * 1 * 25 * 3)
    one = raw_features(dataset, VIEW, [7])
    assert torch.equal(one.features[0], result.features[3])
    # clip 0 has 5 frames: its first resized frame is its first frame
    assert np.array_equal(result.features[1, :75].numpy(), dataset.clip(0)[0].ravel())


def test_errors(encoder, dataset, tmp_path: Path) -> None:
    for indices, message in [
        ([], "indices must be a non-empty list"),
        ([[1]], "indices must be a non-empty list"),
        ([0.5], "indices must be a non-empty list"),
        ([17], r"indices must lie in 0\.\.16 for in-memory, got 17\.\.17"),
        ([-1], r"indices must lie in 0\.\.16"),
    ]:
        with pytest.raises(ValueError, match=message):
            _extract(encoder, dataset, indices=indices)
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, got 'fp8'"):
        _extract(encoder, dataset, precision="fp8")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        _extract(encoder, dataset, batch_size=0)
    with pytest.raises(ValueError, match="cache_key must be a plain file name"):
        _extract(encoder, dataset, cache=tmp_path, cache_key="../out")
    encoder.linear = torch.nn.Unflatten(1, (25, 3))
    with pytest.raises(ValueError, match=r"pooled features must be \(5, F\), got \(5, 25, 3\) from CountingEncoder"):
        _extract(encoder, dataset)
