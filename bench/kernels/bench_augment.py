"""The views of a pretraining batch: NumPy, torch's operators on the device, compiled, Triton; a copy of as many bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastskel.bench.harness import Timed
from fastskel.bench.kernels import NO_GPU
from fastskel.kernels.augment import augment_cost, augment_views, view_tables
from fastskel.kernels.philox import philox_words
from torch import Tensor

from fastskel.data.distort import BodyMask, FrameMask, GaussianBlur, GaussianNoise, Mirror
from fastskel.data.packed import PackedDataset
from fastskel.data.program import view_program
from fastskel.data.transforms import Rotation, Scaling
from fastskel.data.views import ViewSpec, make_view, usdrl_views
from fastskel.philox import Use
from fastskel.skeleton import topology

# of the compiler, about itself
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

QUICK = os.environ.get("FASTSKEL_BENCH_QUICK") == "1"
# clips of the data set, clips of a batch, views, frames
SIZES = (6, 3, 2, 8) if QUICK else (4000, 356, 4, 64)
SEED, EPOCH = 2**40 + 1, 12
JOINTS = 15
# a longer pipeline, whose blur and noise cost arithmetic
DISTORTIONS = (Rotation(0.3), Scaling(), Mirror(), GaussianNoise(), GaussianBlur(), FrameMask(), BodyMask())
CASES = [("usdrl", torch.float32), ("usdrl", torch.bfloat16), ("distortions", torch.bfloat16)]
PROVIDERS = ["numpy", "eager", "compiled", "copy", "triton"]


def make_dataset() -> PackedDataset:
    """Random clips of the lengths of NTU-60, about 80 frames."""
    generator = np.random.default_rng(0)
    skeleton, lengths = topology("ntu-25"), generator.integers(40, 130, SIZES[0])
    frames = generator.standard_normal((int(lengths.sum()), 2, skeleton.num_joints, 3), dtype=np.float32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    names, zeros = np.array([str(i) for i in range(len(lengths))]), np.zeros(len(lengths), np.int64)
    meta: dict[str, Any] = {"source": "custom", "class_names": [], "columns": {}, "normalisation": "none"}
    return PackedDataset(Path("in-memory"), meta, skeleton, frames, offsets, names, zeros, zeros)


def make_spec(case: str) -> ViewSpec:
    """The pipeline of a case."""
    usdrl = usdrl_views(SIZES[3])[0]
    return usdrl if case == "usdrl" else ViewSpec(frames=SIZES[3], crop=usdrl.crop, transforms=DISTORTIONS)


def eager(frames: Tensor, offsets: Tensor, rows: Tensor, views: Tensor, program: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """USDRL's views by torch's operators: clip numbers and view numbers (W N,) to clips (W N, T, M, V, C)."""
    _, low, high, least = program["crop"]
    num_frames, size, num_joints = offsets[rows + 1] - offsets[rows], program["frames"], frames.shape[2]
    words = philox_words(rows, views, SEED, EPOCH, Use.CROP, 2)
    scale = low + ((high - low) * (words[:, 0] >> 8) >> 24)
    length = torch.minimum((num_frames * scale >> 24).clamp_min(least), num_frames)
    begin = offsets[rows] + (words[:, 1] * (num_frames - length + 1) >> 32)
    place = ((2 * torch.arange(size, device=rows.device) + 1) * length[:, None] - size).clamp_min(0)
    lower = place // (2 * size)
    upper = torch.minimum(lower + 1, length[:, None] - 1)
    weight = (place % (2 * size) / (2 * size)).float()[..., None, None, None]
    clips = (1 - weight) * frames[begin[:, None] + lower] + weight * frames[begin[:, None] + upper]
    uniform = (philox_words(rows, views, SEED, EPOCH, Use.SPATIAL, 16) >> 8).float() * 2**-24
    drawn, order = 2 * uniform - 1, torch.arange(num_joints, device=rows.device).expand(len(rows), -1)
    for j, word in enumerate(philox_words(rows, views, SEED, EPOCH, Use.JOINTS, JOINTS).unbind(1)):
        other = (j + (word * (num_joints - j) >> 32))[:, None]
        order = torch.where(order == other, j, torch.where(order == j, other, order))
    eye = torch.eye(3, device=rows.device)
    mix = torch.where(uniform[:, 1, None, None] < 0.5, 0.0, drawn[:, 4:13].view(-1, 3, 3))
    corrupted = torch.where((order < JOINTS)[..., None, None], mix[:, None], eye)
    a, b, c, d, e, f = drawn[:, 4:10].unbind(1)
    one = torch.ones_like(a)
    sheared = torch.stack([one, c, e, a, one, f, b, d, one], 1).view(-1, 1, 3, 3)
    matrix = torch.where((uniform[:, 0] < 0.5)[:, None, None, None], corrupted, sheared)
    return torch.einsum("ntmvc,nvcd->ntmvd", clips, matrix).to(dtype)


def setup(dataset: PackedDataset, case: str, dtype: torch.dtype, provider: str) -> Callable[[], Tensor]:
    """Prepare the views of one batch by one provider: clips (W, N, T, M, V, C)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, num_samples, num_views, size = SIZES
    chosen = np.random.default_rng(1).permutation(len(dataset))[:num_samples]
    spec = make_spec(case)
    if provider == "numpy":
        return lambda: torch.stack([make_view(dataset, spec, chosen, SEED, EPOCH, w).clips for w in range(num_views)]).to(dtype)
    frames, offsets = torch.tensor(dataset.frames, device=device), torch.tensor(dataset.offsets, device=device)
    index, program = torch.tensor(chosen, device=device), view_program(spec, dataset)
    shape = (num_views, num_samples, size, *frames.shape[1:])
    if provider == "copy":
        source = torch.zeros(cost_of(dataset, chosen, dtype) // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)
    if provider == "triton":
        tables = view_tables(program, frames, offsets)
        return lambda: augment_views(frames, offsets, index, tables, num_views, 0, SEED, EPOCH, dtype)[0]
    rows, views = index.repeat(num_views), torch.arange(num_views, device=device).repeat_interleave(num_samples)
    function = torch.compile(eager, dynamic=False) if provider == "compiled" else eager
    return lambda: function(frames, offsets, rows, views, program, dtype).view(shape)


def cost_of(dataset: PackedDataset, chosen: np.ndarray[Any, Any], dtype: torch.dtype) -> int:
    """Bytes of a batch: its clips read, its views written."""
    shape = (SIZES[3], *dataset.frames.shape[1:])
    return augment_cost(int(dataset.num_frames[chosen].sum()), SIZES[2], SIZES[1], shape, dtype.itemsize).bytes


@pytest.fixture(scope="module")
def dataset() -> PackedDataset:
    """Clips of the benchmark."""
    return make_dataset()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case, dtype", CASES, ids=lambda value: str(value).removeprefix("torch."))
def bench_augment(
    benchmark: Any, timed: Timed, dataset: PackedDataset, case: str, dtype: torch.dtype, provider: str
) -> None:
    """Time the views of a batch after checking them; reports GB/s of clips read once and views written."""
    if provider == "triton" and not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    if provider in ("eager", "compiled") and case != "usdrl":
        pytest.skip(f"{provider} is written for the views of usdrl alone, got {case}. Compare numpy and triton.")
    call = setup(dataset, case, dtype, provider)
    if provider != "copy":
        # a view's matrices and its resize round a few times; then the type
        expected = setup(dataset, case, dtype, "numpy")().float()
        torch.testing.assert_close(call().float().cpu(), expected, atol=1e-4, rtol=torch.finfo(dtype).eps)

    seconds = timed(f"augment {case} N={SIZES[1]} W={SIZES[2]} {str(dtype).removeprefix('torch.')}", call)
    if seconds is not None:
        chosen = np.random.default_rng(1).permutation(len(dataset))[: SIZES[1]]
        benchmark.extra_info["gigabytes_per_second"] = cost_of(dataset, chosen, dtype) / seconds / 1e9
