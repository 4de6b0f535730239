"""Temporal crop-resize: native against its definition, against torch, and what it refuses."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from fastskel import _native
from fastskel.data.resize import crop_resize, crop_resize_numpy

CASES = [
    # frames, start, length, out_frames
    (1, 0, 1, 1),
    (1, 0, 1, 64),
    (2, 1, 1, 5),
    (7, 0, 7, 7),
    (7, 2, 3, 13),
    (41, 5, 29, 64),
    (125, 0, 125, 64),
    (300, 17, 283, 1),
    (300, 299, 1, 64),
]


def clip(frames: int, bodies: int = 2, joints: int = 5, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(frames).standard_normal((frames, bodies, joints, channels)).astype(np.float32)


@pytest.mark.parametrize("frames, start, length, out_frames", CASES)
def test_native_equals_numpy(frames: int, start: int, length: int, out_frames: int) -> None:
    x = clip(frames)
    native = crop_resize(x, start, length, out_frames)
    expected = crop_resize_numpy(x, start, length, out_frames)
    assert native.shape == expected.shape == (out_frames, 2, 5, 3)
    assert native.dtype == expected.dtype == np.float32
    # same frames and weights, two products and a sum without fused multiply-add: one rounding of the largest term
    np.testing.assert_allclose(native, expected, rtol=0, atol=np.finfo(np.float32).eps * np.abs(x).max())


@pytest.mark.parametrize("frames, start, length, out_frames", CASES)
def test_equals_torch(frames: int, start: int, length: int, out_frames: int) -> None:
    x = clip(frames)
    crop = torch.from_numpy(x[start : start + length]).double().reshape(length, -1).T[None]
    expected = torch.nn.functional.interpolate(crop, size=out_frames, mode="linear", align_corners=False)[0].T
    native = crop_resize(x, start, length, out_frames).reshape(out_frames, -1)
    # weights are rounded to float32 once, each value twice more
    np.testing.assert_allclose(native, expected.numpy(), rtol=0, atol=6 * np.finfo(np.float32).eps * np.abs(x).max())


def test_equal_length_is_the_crop_itself() -> None:
    x = clip(50)
    assert np.array_equal(crop_resize(x, 10, 30, 30), x[10:40])


@pytest.mark.parametrize("shape", [(9, 1, 1, 1), (9, 3, 17, 2), (9, 0, 5, 3)], ids=str)
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    x = np.ones(shape, np.float32)
    assert np.array_equal(crop_resize(x, 1, 7, 4), np.ones((4, *shape[1:]), np.float32))


def test_strided_and_mapped_clips(tmp_path) -> None:
    x = clip(20)
    np.save(tmp_path / "frames.npy", x)
    mapped = np.load(tmp_path / "frames.npy", mmap_mode="r")
    assert np.array_equal(crop_resize(mapped[3:], 0, 9, 5), crop_resize(x, 3, 9, 5))
    assert np.array_equal(crop_resize(x[:, :, ::2], 0, 9, 5), crop_resize(x, 0, 9, 5)[:, :, ::2])


@pytest.mark.parametrize("resize", [crop_resize, crop_resize_numpy], ids=["native", "numpy"])
@pytest.mark.parametrize(
    "arguments, message",
    [
        ((-1, 3, 4), "crop_resize: crop must be inside the clip's 10 frames, got start -1 and length 3"),
        ((8, 3, 4), "crop must be inside the clip's 10 frames, got start 8 and length 3"),
        ((0, 0, 4), "crop_resize: length must be at least 1, got 0"),
        ((0, 3, 0), "crop_resize: out_frames must be at least 1, got 0"),
    ],
    ids=["before", "after", "empty", "no-result"],
)
def test_bad_crops(resize, arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resize(clip(10), *arguments)


@pytest.mark.parametrize("x", [np.zeros((3, 1, 2), np.float32), np.zeros((3, 1, 2, 3))], ids=["three-axes", "float64"])
def test_bad_clips(x: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"crop_resize: clip must be float32 \(T, M, V, C\), got float"):
        crop_resize(x, 0, 1, 1)


@pytest.mark.parametrize(
    "x, arguments, message",
    [
        (
            np.zeros((3, 1, 2, 3)),
            (0, 1, 1),
            r"clip must be contiguous float32 \(T, M, V, C\), got float64 \(3, 1, 2, 3\)",
        ),
        (np.zeros((3, 1, 2, 3), np.float32)[:, :, ::2], (0, 1, 1), "clip must be contiguous"),
        (np.zeros((3, 1, 2), np.float32), (0, 1, 1), "clip must be contiguous"),
        (np.zeros((3, 1, 2, 3), np.float32), (2, 2, 1), "crop must be inside the clip's 3 frames"),
        (np.zeros((3, 1, 2, 3), np.float32), (2**62, 1, 1), "crop must be inside"),
        (np.zeros((3, 1, 2, 3), np.float32), (0, 2**40, 1), "length must be at least 1 and at most"),
        (np.zeros((0, 1, 2, 3), np.float32), (0, 1, 1), "crop must be inside the clip's 0 frames"),
        (np.zeros((3, 1, 2, 3), np.float32), (0, 1, 0), "out_frames must be at least 1"),
    ],
    ids=["type", "strides", "axes", "bounds", "huge-start", "huge-length", "empty-clip", "no-result"],
)
def test_native_refuses(x: np.ndarray, arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _native.crop_resize(x, *arguments)


def test_threads_agree() -> None:
    x = clip(200)
    expected = crop_resize_numpy(x, 3, 150, 64)
    results: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: results.append(crop_resize(x, 3, 150, 64))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for result in results:
        np.testing.assert_allclose(result, expected, rtol=0, atol=np.finfo(np.float32).eps * np.abs(x).max())
