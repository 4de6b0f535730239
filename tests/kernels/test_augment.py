"""The operator `fastskel::augment`: reference, interpreter and GPU against the definition, `make_view`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastskel.kernels import augment as kernel_module
from fastskel.kernels.augment import augment, augment_cost, augment_views, view_tables
from fastskel.kernels.reference.augment import Address
from fastskel.kernels.reference.augment import crop_bounds as bounds_of

from fastskel.data.distort import BodyMask, FrameMask, GaussianBlur, GaussianNoise, Mirror
from fastskel.data.packed import PackedDataset
from fastskel.data.program import view_program
from fastskel.data.transforms import JointCorruption, JointMask, OneOf, Rotation, Scaling, Shear
from fastskel.data.views import CenterCrop, RandomCrop, ViewSpec, crop_bounds, make_view, usdrl_views
from fastskel.skeleton import topology

SEEDS = (7, 2**32 + 5, 2**63 + 11)
LENGTHS = (1, 30, 64, 100, 7)
# float32 operations between a coordinate of the clip and one of the view: a resize, a matrix, 15 taps, a stream
OPERATIONS = 32
CROP = RandomCrop(0.3, 1.0, 8)
ONE_OF = OneOf((JointCorruption(0.6, 0.5), Shear(1.0)))
# every transform, linear ones apart from each other and beside each other
EVERY = (
    Rotation((0.3, 0.2, 0.1), 0.7), OneOf((Shear(0.5), JointMask(0.3, 0.8), Scaling(0.5, 2.0))), Mirror(0.6),
    GaussianNoise(0.05, 0.6), Scaling(0.9, 1.1, True, 0.6), GaussianBlur(0.3, 2.0, 7, 0.7), JointCorruption(0.4, 0.5),
    FrameMask(0.3, 0.7), BodyMask(0.6),
)  # fmt: skip


def make_dataset(name: str = "ntu-25", bodies: int = 2, channels: int = 3, lengths: tuple[int, ...] = LENGTHS) -> PackedDataset:
    """Clips with absent bodies, joints and centres; the first shows no whole body."""
    skeleton, generator = topology(name), np.random.default_rng(3)
    frames = generator.standard_normal((sum(lengths), bodies, skeleton.num_joints, channels)).astype(np.float32)
    frames[generator.random(frames.shape[:3]) < 0.05] = 0
    frames[1::3, 0, skeleton.centre] = 0
    frames[0, 0, 0] = 0
    if bodies > 1:
        frames[len(frames) // 3 :: 2, bodies - 1] = 0
        frames[len(frames) // 2 : len(frames) * 3 // 4, 0] = 0
    meta: dict[str, Any] = {"source": "custom", "class_names": [], "columns": {}, "normalisation": "none"}
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    names = np.array([f"clip{i}" for i in range(len(lengths))])
    zeros = np.zeros(len(lengths), np.int64)
    return PackedDataset(Path("in-memory"), meta, skeleton, frames, offsets, names, zeros, zeros + bodies)


def on_device(dataset: PackedDataset, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(dataset.frames, device=device), torch.tensor(dataset.offsets, device=device)


def check(
    dataset: PackedDataset, spec: ViewSpec, device: torch.device | str, index: tuple[int, ...] = (3, 0, 1), seed: int = 7,
    epoch: int = 2**32 - 1, first: int = 3, num_views: int = 1, dtype: torch.dtype = torch.float32,
) -> torch.Tensor:  # fmt: skip
    frames, offsets = on_device(dataset, device)
    rows = torch.tensor(index, device=device, dtype=torch.int64)
    program = view_program(spec, dataset)
    clips, mask = augment_views(frames, offsets, rows, program, num_views, first, seed, epoch, dtype)
    assert clips.dtype == dtype and mask.dtype == torch.bool
    size = np.abs(dataset.frames[np.isfinite(dataset.frames)]).max()
    for number in range(num_views):
        view = make_view(dataset, spec, index, seed, epoch, first + number)
        assert clips[number].shape == view.clips.shape
        assert torch.equal(mask[number].cpu(), view.mask)
        torch.testing.assert_close(
            clips[number].float().cpu(), view.clips, atol=float(OPERATIONS * size * 2**-24), rtol=rounding(dtype, device),
            equal_nan=True,
        )  # fmt: skip
    return clips


def rounding(dtype: torch.dtype, device: torch.device | str) -> float:
    if dtype == torch.float32:
        return 4 * 2**-24
    # the interpreter truncates where a GPU rounds to bfloat16
    cut = 2 if dtype == torch.bfloat16 and torch.device(device).type == "cpu" else 1
    return cut * torch.finfo(dtype).eps / 2 + 4 * 2**-24


@pytest.fixture
def poisoned() -> Iterator[None]:
    """What is allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


TRANSFORMS = {
    "none": (), "usdrl": (ONE_OF,), "corruption": (JointCorruption(0.6, 0.5),), "rotation": (Rotation((0.3, 0.6, 3.1), 0.5),),
    "scaling": (Scaling(0.5, 1.5, False, 0.5),), "scaling-axes": (Scaling(0.5, 1.5, True),), "joint-mask": (JointMask(0.3, 0.5),),
    "mirror": (Mirror(0.5),), "mirror-only": (Mirror(1.0, False),), "noise": (GaussianNoise(0.1, 0.5),),
    "blur": (GaussianBlur(0.2, 2.0, 9, 0.5),), "blur-zero": (GaussianBlur(0.5, 3.0, 5, 1.0, False, "zero"),),
    "frame-mask": (FrameMask(0.4, 0.5),), "body-mask": (BodyMask(0.5),), "two": (Shear(0.3), Mirror(1.0), ONE_OF),
    # words of a transform by its number: all of these are applied
    "fourth": (Shear(0.1), Mirror(1.0), Shear(0.1), JointMask(0.3)), "second": (Shear(0.1), FrameMask(0.4)),
    "third-noise": (Shear(0.1), Mirror(1.0), GaussianNoise(0.1, 1.0)), "third-body": (Shear(0.1), Mirror(1.0), BodyMask(1.0)),
}  # fmt: skip


@pytest.mark.parametrize("transforms", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transform(device: torch.device, poisoned: None, transforms: tuple[Any, ...]) -> None:
    # six draws: each coin falls on both sides
    check(make_dataset("coco-17"), ViewSpec(frames=16, crop=CROP, transforms=transforms), device, seed=SEEDS[1], num_views=2)


COMBINATIONS = {
    "joint": (dict(), dict()),
    "one-frame": (dict(), dict(frames=1)),
    "flat": (dict(name="coco-17", channels=2), dict(frames=5)),
    "one-body": (dict(bodies=1), dict(frames=13, crop=CenterCrop(0.7))),
    "bone": (dict(name="kinect-20-ucla"), dict(stream="bone", frames=6)),
    "motion": (dict(), dict(stream="motion", frames=6)),
    "motion-one-frame": (dict(bodies=1), dict(stream="motion", frames=1)),
    "center": (dict(bodies=3, channels=2, name="coco-17"), dict(normalise="center", frames=6)),
    "center-first-bone": (dict(bodies=1), dict(normalise="center-first", stream="bone", frames=6)),
    "align": (dict(), dict(normalise="align", frames=6)),
    "align-yaw-motion": (dict(bodies=1), dict(normalise="align-yaw", stream="motion", frames=6)),
}


@pytest.mark.parametrize("data, view", COMBINATIONS.values(), ids=COMBINATIONS)
def test_every_transform(device: torch.device, poisoned: None, data: dict[str, Any], view: dict[str, Any]) -> None:
    spec = ViewSpec(**{"frames": 16, "crop": CROP, "transforms": EVERY, **view})
    check(make_dataset(**data), spec, device, index=(3, 0), seed=SEEDS[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_usdrl(device: torch.device, launches: Any, dtype: torch.dtype) -> None:
    seen = launches(kernel_module._augment_kernel)
    dataset, spec = make_dataset(), usdrl_views()[0]
    check(dataset, spec, device, index=(4, 2), seed=SEEDS[0], epoch=12, first=0, num_views=2, dtype=dtype)
    assert len(seen) == 1


def test_views_of_one_launch_equal_single_ones_and_repeat(device: torch.device) -> None:
    dataset = make_dataset(bodies=1)
    frames, offsets = on_device(dataset, device)
    spec = ViewSpec(frames=9, crop=CROP, transforms=(ONE_OF, GaussianNoise(0.1)))
    tables = view_tables(view_program(spec, dataset), frames, offsets)
    index = torch.tensor([3, 1], device=device)
    clips, mask = augment_views(frames, offsets, index, tables, 3, 65533, 5, 2)
    again = augment_views(frames, offsets, index, tables, 3, 65533, 5, 2)
    assert torch.equal(clips, again[0]) and torch.equal(mask, again[1])
    for number in range(3):
        single = augment(frames, offsets, index[1:], tables, seed=5, epoch=2, view=65533 + number)
        assert torch.equal(clips[number, 1:], single[0]) and torch.equal(mask[number, 1:], single[1])
    assert not torch.equal(clips[0], clips[1])


def test_crops_and_joints_are_equal(device: torch.device) -> None:
    # coordinates are frame numbers: two frames of a view tell its crop
    lengths = tuple(range(3, 300, 5))
    dataset = make_dataset("coco-17", 1, 2, lengths)
    dataset.frames[:] = np.concatenate([np.arange(1, size + 1) for size in lengths])[:, None, None, None]
    spec = ViewSpec(frames=2, crop=RandomCrop(0.1, 1.0, 4), transforms=(JointMask(0.5),))
    clips = check(dataset, spec, device, index=tuple(range(len(lengths))), seed=SEEDS[2], epoch=3).cpu()
    view = make_view(dataset, spec, range(len(lengths)), SEEDS[2], 3, 3)
    assert torch.equal(clips[0] == 0, view.clips == 0)
    # a crop beside it would be half a frame away
    assert (clips[0] - view.clips).abs().max() < 0.01


def test_all_parts_of_a_long_view(device: torch.device, poisoned: None) -> None:
    # more blocks of frames than programs, of which the last is not full
    check(make_dataset(bodies=1), ViewSpec(frames=61, crop=CROP), device, index=(2,))
    check(make_dataset(bodies=1), ViewSpec(frames=64, transforms=(FrameMask(0.5),), stream="motion"), device, index=(2,))


def test_not_finite(device: torch.device) -> None:
    dataset = make_dataset("coco-17", lengths=(12, 9))
    dataset.frames[3, 0, 4, 1] = np.nan
    dataset.frames[14, 1, 2, 0] = np.inf
    with np.errstate(invalid="ignore"):
        check(dataset, ViewSpec(frames=12, transforms=(Shear(0.5), Mirror(1.0))), device, index=(1, 0))
        check(dataset, ViewSpec(frames=12, normalise="center", transforms=(JointMask(0.5),)), device, index=(1, 0))


def test_out(device: torch.device) -> None:
    dataset = make_dataset("coco-17")
    frames, offsets = on_device(dataset, device)
    tables = view_tables(view_program(ViewSpec(frames=5), dataset), frames, offsets)
    index = torch.tensor([1, 1, 4], device=device)
    expected = augment_views(frames, offsets, index, tables, 2, 0, 1, 2, torch.float16)
    out = (torch.full_like(expected[0], torch.nan), torch.zeros_like(expected[1]))
    given = augment_views(frames, offsets, index, tables, 2, 0, 1, 2, torch.float16, out)
    assert given[0] is out[0] and given[1] is out[1]
    assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])


def test_empty_batch(device: torch.device) -> None:
    dataset = make_dataset("coco-17")
    frames, offsets = on_device(dataset, device)
    index = torch.zeros(0, dtype=torch.int64, device=device)
    clips, mask = augment_views(frames, offsets, index, view_program(ViewSpec(frames=5), dataset), 4, 0, 1, 2)
    assert clips.shape == (4, 0, 5, 2, 17, 3) and mask.shape == (4, 0, 5, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_more_programs_than_one_axis_holds() -> None:
    index = tuple(i % len(LENGTHS) for i in range(70_000))
    check(make_dataset("coco-17", 1, 2), ViewSpec(frames=2, transforms=(ONE_OF,)), "cuda", index=index)


@pytest.mark.interpreted
def test_opcheck_of_the_interpreted() -> None:
    run_opcheck()


def test_opcheck() -> None:
    run_opcheck()


def run_opcheck() -> None:
    dataset = make_dataset("coco-17")
    frames, offsets = on_device(dataset, "cpu")
    spec = ViewSpec(frames=4, normalise="center", transforms=(Shear(0.5),))
    tables = view_tables(view_program(spec, dataset), frames, offsets)
    arguments = (frames, offsets, torch.tensor([2, 0]), tables.table, tables.program, 2, 1, -5, 3, torch.bfloat16)
    torch.library.opcheck(torch.ops.fastskel.augment.default, arguments)


@pytest.mark.parametrize("transforms", TRANSFORMS.values(), ids=TRANSFORMS)
def test_reference_of_a_transform(transforms: tuple[Any, ...]) -> None:
    for seed in SEEDS:
        check(make_dataset("coco-17"), ViewSpec(frames=16, crop=CROP, transforms=transforms), "cpu", seed=seed, num_views=2)


@pytest.mark.parametrize("data, view", COMBINATIONS.values(), ids=COMBINATIONS)
def test_reference_of_every_transform(data: dict[str, Any], view: dict[str, Any]) -> None:
    spec = ViewSpec(**{"frames": 16, "crop": CROP, "transforms": EVERY, **view})
    for seed in SEEDS:
        check(make_dataset(**data), spec, "cpu", index=(4, 0, 2, 3, 1), seed=seed, num_views=2)


@pytest.mark.parametrize("crop", [RandomCrop(0.1, 1.0, 64), RandomCrop(0.5, 0.5, 1), CenterCrop(0.3)], ids=str)
def test_crops_of_the_reference_are_equal(crop: RandomCrop | CenterCrop) -> None:
    program = view_program(ViewSpec(crop=crop), make_dataset())
    num_frames = np.array([1, 2, 63, 64, 65, 1000, 10**6])
    index = np.arange(len(num_frames))
    for seed in SEEDS:
        start, length = crop_bounds(crop, num_frames, seed=seed, index=index, epoch=9, view=2)
        found = [bounds_of(Address(seed, i, 9, 2), program["crop"], int(num_frames[i])) for i in index.tolist()]
        assert found == list(zip(start.tolist(), length.tolist()))


def test_reference_in_float64_is_near() -> None:
    dataset = make_dataset("coco-17")
    frames, offsets = on_device(dataset, "cpu")
    program = view_program(ViewSpec(frames=16, crop=CROP, transforms=(ONE_OF, GaussianBlur(0.2, 2.0, 9, 1.0))), dataset)
    index = torch.arange(5)
    fine = kernel_module.augment_reference(frames.double(), offsets, index, None, program, 1, 0, 7, 1, torch.float64)[0]
    clips = augment_views(frames, offsets, index, program, 1, 0, 7, 1)[0]
    assert fine.dtype == torch.float64
    torch.testing.assert_close(clips.double(), fine, atol=OPERATIONS * 5 * 2**-24, rtol=0)


def test_compiles_as_one_graph() -> None:
    dataset = make_dataset("coco-17")
    frames, offsets = on_device(dataset, "cpu")
    tables = view_tables(view_program(ViewSpec(frames=4, transforms=(Shear(0.5),)), dataset), frames, offsets)
    index = torch.tensor([2, 0])

    def twice(rows: torch.Tensor) -> torch.Tensor:
        return 2 * augment(frames, offsets, rows, tables, seed=2**63 + 5, epoch=1, view=0)[0]

    assert torch.equal(torch.compile(twice, backend="aot_eager", fullgraph=True)(index), twice(index))


def test_cost() -> None:
    assert augment_cost(10, 4, 3, (64, 2, 25, 3), 2).bytes == 10 * 600 + 12 * 64 * (150 * 2 + 2)


BASE: dict[str, Any] = dict(
    frames=torch.zeros(9, 1, 17, 3), offsets=torch.tensor([0, 4, 9]), index=torch.tensor([0]), num_views=1, first_view=0,
    seed=0, epoch=0,
)  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(frames=torch.zeros(9, 1, 17, 4)), r"frames must be float32 \(sum T, M, V, C\) with 2 or 3 channels, got"),
        (dict(frames=torch.zeros(9, 1, 17, 3, dtype=torch.float64)), "frames must be float32"),
        (dict(frames=torch.zeros(9, 3, 17, 1).permute(0, 3, 2, 1)), "frames must be float32, contiguous"),
        (dict(offsets=torch.tensor([0, 4, 8])), "offsets must rise from 0 to 9, got 0 to 8"),
        (dict(offsets=torch.tensor([0, 0, 9])), "offsets must rise from 0 to 9, got 0 to 9 with least step 0"),
        (dict(offsets=torch.tensor([0, 9], dtype=torch.int32)), r"offsets must be int64 \(n \+ 1,\) on cpu, got torch.int32"),
        (dict(index=torch.tensor([0], dtype=torch.int32)), r"index must be int64 \(N,\) on cpu, got torch.int32"),
        (dict(index=torch.tensor([[0]])), r"index must be int64 \(N,\) on cpu"),
        (dict(dtype=torch.float64), "dtype must be float32, bfloat16 or float16, got torch.float64"),
        (dict(seed=2**64), r"seed must be in \[0, 18446744073709551616\)"),
        (dict(epoch=2**32), r"epoch must be in \[0, 4294967296\), got 4294967296"),
        (dict(first_view=-1), "first_view must be in"),
        (dict(first_view=65535, num_views=2), r"num_views must be in \[0, 2\), got 2"),
        (dict(out=(torch.zeros(2), torch.zeros(2))), r"out must be contiguous torch.float32 \(1, 1, 4, 1, 17, 3\)"),
        (dict(frames=torch.zeros(9, 1, 65, 3), transforms=[dict(kind="joint-mask", count=65, probability=1.0)]),
         "count of joint-mask must be at most 64 joints, got 65"),
        (dict(transforms=[dict(kind="sway", probability=1.0)]), "transforms must be of one-of, shear, .*, got 'sway'"),
        (dict(transforms=[dict(kind="mirror", probability=1.0, reflect=True, joints=(0,))]),
         "joints of mirror must be 17 joints"),
        (dict(transforms=[dict(kind="frame-mask", probability=1.0, count=5)]), "count of frame-mask must be at most 4 frames"),
        (dict(transforms=[dict(kind="blur", probability=1.0, low=1.0, high=1.0, taps=3, normalise=True, padding="edge")] * 2),
         "transforms must be with at most one blur, got 2"),
        (dict(transforms=[dict(kind="blur", probability=1.0, low=1.0, high=1.0, taps=4, normalise=True, padding="edge")]),
         "taps of blur must be odd"),
        (dict(program=dict(stream="angle")), "stream must be one of joint, bone, motion, got angle"),
        (dict(program=dict(stream="bone")), "parents must be 17 joints of as many, got None"),
        (dict(program=dict(crop=("middle", 3))), "crop must be random or center"),
        (dict(frames=torch.zeros(9, 1, 17, 2), program=dict(normalise="align")),
         "normalise must be another kind for flat clips"),
        (dict(program=dict(normalise="align", alignment=np.zeros((3, 4, 3)))), r"alignment must be \(2, 4, 3\), got \(3, 4, 3\)"),
        (dict(program=dict(normalise="align")), r"alignment must be \(2, 4, 3\), got \(0,\)"),
        (dict(program=dict(frames=2**29)), r"fewer numbers than 2\^31"),
        (dict(program=dict(frames=2**19), transforms=[dict(kind="noise", probability=1.0, std=1.0)]),
         "noise must be for views of fewer"),
    ],
)  # fmt: skip
def test_errors(change: dict[str, Any], message: str) -> None:
    program: dict[str, Any] = dict(
        frames=4, crop=("center", 2**24), normalise="none", centre_joint=0, alignment=None, stream="joint", parents=None
    )
    change = dict(change)
    program |= change.pop("program", {}) | {"transforms": change.pop("transforms", [])}
    with pytest.raises(ValueError, match=message):
        augment_views(**{**BASE, "program": program, **change})


@pytest.mark.parametrize("lengths, argument", [((3, 4), "frames"), ((1, 1, 4), "offsets")])
def test_tables_of_other_clips_are_refused(lengths: tuple[int, ...], argument: str) -> None:
    dataset = make_dataset("coco-17", lengths=(2, 4))
    tables = view_tables(view_program(ViewSpec(), dataset), *on_device(dataset, "cpu"))
    frames, offsets = on_device(make_dataset("coco-17", lengths=lengths), "cpu")
    with pytest.raises(ValueError, match=f"augment: {argument} must be .* Make the tables for these clips"):
        augment(frames, offsets, torch.tensor([0]), tables, seed=0, epoch=0, view=0)
