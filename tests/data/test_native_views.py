"""Native views against their definition in NumPy: the same bits on every instruction set, close ones behind log and sin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastskel import _native
from fastskel.data.distort import BodyMask, FrameMask, GaussianBlur, GaussianNoise, Mirror
from fastskel.data.packed import PackedDataset
from fastskel.data.program import view_program
from fastskel.data.transforms import JointCorruption, JointMask, OneOf, Rotation, Scaling, Shear
from fastskel.data.views import CenterCrop, RandomCrop, ViewSpec, make_view, usdrl_views
from fastskel.philox import normal, words
from fastskel.skeleton import Topology, topology

LENGTHS = (1, 2, 5, 16, 33, 90)
SEED, EPOCH = 2**40 + 7, 3
USDRL = (OneOf((JointCorruption(0.6), Shear(1.0))),)
# what is made of + - * / and comparisons alone
EXACT = {
    "none": (),
    "usdrl": USDRL,
    "linear": (Scaling(0.5, 2.0, per_axis=True, probability=0.5), Shear(0.3), JointMask(0.4), JointCorruption(0.2)),
    "frames": (FrameMask(0.3, 0.7), BodyMask(0.7), Mirror(0.7)),
    "apart": (Shear(0.5), Mirror(0.5, reflect=False), Scaling(), BodyMask(0.5), JointMask(0.5, 0.5)),
}
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def available():
    before, found = _native.instructions(), []
    for name in ("avx512", "avx2", "baseline"):
        try:
            _native.set_instructions(name)
        except ValueError:
            continue
        found.append(name)
    _native.set_instructions(before)
    return found


@pytest.fixture(params=available())
def level(request):
    before = _native.instructions()
    _native.set_instructions(request.param)
    yield request.param
    _native.set_instructions(before)


def skeleton(num_joints):
    """A layout whose centre, mirror and parents are not the first joints."""
    joints = tuple(range(num_joints))
    pairs = [joint ^ 1 if joint ^ 1 < num_joints else joint for joint in joints]
    parents = tuple((7 * joint + 3) % num_joints for joint in joints)
    parts = {part: joints if part == "torso" else () for part in topology("ntu-25").parts}
    names = tuple(f"joint{joint}" for joint in joints)
    return Topology(f"test-{num_joints}", names, num_joints // 2, tuple(pairs), parts, {"only": parents})


def dataset_of(layout, bodies=2, channels=3, lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    frames = rng.standard_normal((sum(lengths), bodies, layout.num_joints, channels)).astype(np.float32)
    frames[rng.random(frames.shape[:3]) < 0.1] = 0
    frames[rng.random(frames.shape[:2]) < 0.2] = 0
    frames[rng.random(frames.shape) < 0.05] = -0.0
    return PackedDataset(
        path=Path("in-memory"),
        meta={"source": "custom", "class_names": [], "columns": {}, "normalisation": "none"},
        topology=layout,
        frames=frames,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        names=np.array([f"clip{i}" for i in range(len(lengths))]),
        labels=np.zeros(len(lengths), np.int64),
        num_bodies=np.ones(len(lengths), np.int64),
        columns={},
    )


def native(dataset, specs, index, dtype="float32", views=None, seed=SEED, epoch=EPOCH):
    programs = [view_program(spec, dataset) for spec in specs]
    clips = _native.Clips.borrow(dataset.frames, dataset.offsets)
    makers = _native.ViewMakers(clips, programs, seed=seed, dtype=dtype, views=views)
    return makers.make(epoch, np.asarray(index, np.int64))


def defined(dataset, spec, index, view=0, dtype="float32"):
    with np.errstate(all="ignore"):
        made = make_view(dataset, spec, index, SEED, EPOCH, view)
    return made.clips.to(TYPES[dtype]), made.mask.numpy()


def bits_of(clips):
    """Bit patterns with every NaN as one: which NaN it is depends on the processor."""
    tensor = clips if isinstance(clips, torch.Tensor) else torch.from_numpy(clips)
    kind = {4: torch.int32, 2: torch.int16}[tensor.element_size()]
    return torch.where(torch.isnan(tensor), torch.full((), -1, dtype=kind), tensor.view(kind)).numpy()


def assert_bits(dataset, specs, index=None, dtype="float32"):
    index = np.arange(len(dataset)) if index is None else index
    for number, (clips, mask) in enumerate(native(dataset, specs, index, dtype)):
        expected, present = defined(dataset, specs[number], index, number, dtype)
        found = torch.from_numpy(clips)
        found = found.view(torch.bfloat16) if dtype == "bfloat16" else found
        np.testing.assert_array_equal(bits_of(found), bits_of(expected), err_msg=str(specs[number]))
        np.testing.assert_array_equal(mask, present, err_msg=str(specs[number]))


class TestBits:
    @pytest.mark.parametrize("name", EXACT)
    @pytest.mark.parametrize("stream", ["joint", "bone", "motion"])
    def test_pipelines_and_streams(self, level, stream, name):
        spec = ViewSpec(stream=stream, frames=40, crop=RandomCrop(0.1, 1.0, 8), transforms=EXACT[name])
        assert_bits(dataset_of(topology("ntu-25")), [spec] * 3)

    @pytest.mark.parametrize("bodies", [1, 2, 3, 4])
    @pytest.mark.parametrize("joints", [1, 2, 3, 5, 7, 15, 16, 17, 18, 20, 25])
    def test_shapes(self, level, joints, bodies):
        for channels in (1, 2, 3, 4, 5):
            dataset = dataset_of(skeleton(joints), bodies, channels, (1, 3, 20))
            pipelines = list(EXACT.values()) if channels in (2, 3) else [(), EXACT["frames"]]
            kinds = zip(pipelines, ("joint", "bone", "motion") * 2, ("center", "none") * 3, strict=False)
            assert_bits(dataset, [ViewSpec(s, frames=18, transforms=p, normalise=n) for p, s, n in kinds])

    @pytest.mark.parametrize("frames", [1, 2, 15, 16, 17, 31, 32, 33, 64, 100])
    def test_lengths_of_views(self, level, frames):
        crops = (CenterCrop(), CenterCrop(0.5), CenterCrop(2**-24), RandomCrop(0.0, 0.4, 1), RandomCrop(1.0, 1.0, 500))
        views = [(crop, stream) for crop in crops for stream in ("joint", "motion")]
        specs = [ViewSpec(stream, frames=frames, crop=crop, transforms=EXACT["apart"]) for crop, stream in views]
        assert_bits(dataset_of(topology("coco-17"), channels=2), specs)

    @pytest.mark.parametrize("kind", ["none", "center", "center-first", "align", "align-yaw"])
    def test_normalisations(self, level, kind):
        dataset = dataset_of(topology("ntu-25"))
        # one clip that never shows its centre, and one that has nothing to align by
        dataset.frames[3:8, 0, topology("ntu-25").centre] = 0
        dataset.frames[8:24, :, 12] = 0
        assert_bits(dataset, [ViewSpec(frames=24, normalise=kind, transforms=pipeline) for pipeline in ((), USDRL)])

    @pytest.mark.parametrize("kind", ["none", "center", "align"])
    @pytest.mark.parametrize("stream", ["joint", "bone", "motion"])
    def test_values_that_are_no_numbers(self, level, stream, kind):
        dataset = dataset_of(topology("ntu-25"))
        rng = np.random.default_rng(1)
        for value in (np.nan, np.inf, -np.inf, 3e38, -1e-40, -0.0):
            dataset.frames[rng.random(dataset.frames.shape) < 0.01] = value
        specs = [ViewSpec(stream=stream, normalise=kind, transforms=pipeline) for pipeline in EXACT.values()]
        assert_bits(dataset, specs)

    @pytest.mark.parametrize("dtype", TYPES)
    def test_types(self, level, dtype):
        dataset = dataset_of(topology("ntu-25"))
        rng = np.random.default_rng(2)
        scale = np.exp2(rng.uniform(-40, 20, dataset.frames.shape)).astype(np.float32)
        special = np.float32([65504, 65519.996, 65520, 65536, 6e-8, 2.9e-8, 2**-25, 2**-14, 1e-45, np.nan, np.inf, 3.4e38])
        frames = (dataset.frames * scale).astype(np.float32)
        frames.reshape(-1)[: 4 * len(special)] = np.concatenate([special, -special, special * 0.999, special])
        # halves between two neighbours go to the even one
        frames.reshape(-1)[100:164] = 1 + np.arange(64, dtype=np.float32) * 2.0**-12
        frames.reshape(-1)[164:228] = 1 + np.arange(64, dtype=np.float32) * 2.0**-9
        dataset = replace(dataset, frames=frames)
        specs = [ViewSpec(frames=64, crop=CenterCrop(), transforms=pipeline) for pipeline in ((), USDRL)]
        assert_bits(dataset, specs, dtype=dtype)
        assert_bits(dataset_of(skeleton(7), 1), [ViewSpec(frames=5)], dtype=dtype)

    def test_conversion_of_every_half(self, level):
        # T = 1 of clips of one frame is the frame itself
        every = np.arange(2**16, dtype=np.uint32)
        near = np.concatenate([(every << 16) + offset for offset in (0, 0x7FFF, 0x8000, 0x8001)]).astype(np.uint32)
        halves = every.astype(np.uint16).view(np.float16).astype(np.float32)
        finite = halves[np.isfinite(halves)]
        between = (finite + np.float32(2.0**-25)) * np.float32(1 + 2.0**-11)
        values = np.concatenate([near.view(np.float32), halves, between])
        values = values[: len(values) // 15 * 15].reshape(-1, 1, 5, 3)
        dataset = replace(
            dataset_of(skeleton(5), 1), frames=values, offsets=np.array([0, len(values)]), names=np.array(["all"])
        )
        spec = ViewSpec(frames=len(values))
        for dtype in TYPES:
            assert_bits(dataset, [spec], [0], dtype)

    def test_many_addresses(self, level):
        dataset = dataset_of(topology("kinect-20-ucla"), 1, lengths=(70,) * 60)
        assert_bits(dataset, usdrl_views(min_frames=16), np.random.default_rng(0).permutation(60))


class TestRounding:
    def close(self, spec, tolerance, dataset=None):
        dataset = dataset_of(topology("ntu-25"), lengths=(1, 20, 64)) if dataset is None else dataset
        index = np.arange(len(dataset))
        for number, (clips, mask) in enumerate(native(dataset, [spec] * 8, index)):
            expected, present = defined(dataset, spec, index, number)
            np.testing.assert_allclose(clips, expected.numpy(), rtol=0, atol=tolerance)
            np.testing.assert_array_equal(mask, present)

    @pytest.mark.parametrize("channels", [2, 3])
    def test_rotation(self, level, channels):
        dataset = dataset_of(topology("ntu-25"), channels=channels, lengths=(1, 20, 64))
        spec = ViewSpec(transforms=(Rotation((3.0, 0.5, 1.0), 0.8), Scaling(), Rotation(0.3)))
        # sines and cosines are rounded to float32: one of them may differ by its last bit, coordinates are below 5
        self.close(spec, 4 * 5 * 2.0**-23, dataset)
        dataset = dataset_of(topology("ntu-25"), channels=channels, lengths=(1, 20, 64))
        expected, _ = defined(dataset, ViewSpec(transforms=(Rotation(0.3),)), np.arange(3))
        still, _ = defined(dataset, ViewSpec(), np.arange(3))
        assert np.abs(expected.numpy() - still.numpy()).max() > 0.05

    @pytest.mark.parametrize("channels", [1, 2, 3, 4])
    def test_noise(self, level, channels):
        for frames, joints, bodies in ((64, 25, 2), (7, 5, 1), (33, 7, 3)):
            dataset = dataset_of(skeleton(joints), bodies, channels, (1, 20, 64))
            # |n| is at most sqrt(2 ln 2^24) = 5.8, and coordinates are below 5
            self.close(ViewSpec(frames=frames, transforms=(GaussianNoise(0.5, 0.7),)), 5 * 5.8 * 2.0**-24, dataset)

    def test_noise_of_every_size(self, level):
        # clips of ones: the noise is what is added, whatever the word
        dataset = dataset_of(skeleton(25), 4, 3, (2,))
        dataset.frames[:] = 2.0**-20
        spec = ViewSpec(frames=512, transforms=(Shear(0.0), GaussianNoise(1.0, 1.0)))
        ((found, _),) = native(dataset, [spec], [0])
        expected = normal(words(SEED, [0], EPOCH, 0, 8, found.size, first=1 << 24)).reshape(found.shape)
        error = np.abs(found.astype(np.float64) - 2.0**-20 - expected)
        assert error.max() < 3 * 2.0**-22
        # and small numbers are small to their own precision, until what is added to them counts
        assert (error / np.maximum(np.abs(expected), 2.0**-6)).max() < 1e-6

    def test_noise_leaves_absent_joints(self, level):
        dataset = dataset_of(topology("ntu-25"), lengths=(1, 1, 1, 1))
        spec = ViewSpec(frames=1, transforms=(GaussianNoise(1.0, 1.0),))
        ((found, _),) = native(dataset, [spec], np.arange(4))
        absent = ~dataset.frames.any(axis=-1)
        assert absent.any()
        np.testing.assert_array_equal(found[:, 0][absent], dataset.frames[absent])

    @pytest.mark.parametrize("padding", ["edge", "zero"])
    @pytest.mark.parametrize("normalise", [True, False])
    def test_blur(self, level, padding, normalise):
        for taps in (1, 3, 15, 41):
            blur = GaussianBlur(0.1, 2.0, taps, 0.7, normalise, padding)
            spec = ViewSpec(frames=20, transforms=(Mirror(), blur, FrameMask()), stream="motion")
            # the sum of unnormalised weights is at most 2 sqrt(2 pi) = 5, twice for motion
            self.close(spec, 2 * 5 * 5 * 2.0**-22)

    def test_levels_agree(self):
        everything = (
            Rotation(),
            GaussianNoise(0.1, 0.7),
            Mirror(),
            GaussianBlur(probability=0.7),
            OneOf((JointCorruption(), Shear(), Scaling(), JointMask())),
            BodyMask(),
            FrameMask(),
            GaussianNoise(),
        )
        dataset = dataset_of(topology("ntu-25"))
        specs = [ViewSpec(stream=stream, transforms=everything) for stream in ("joint", "bone", "motion")]
        made, before = [], _native.instructions()
        for name in available():
            _native.set_instructions(name)
            for dtype in TYPES:
                views = native(dataset, specs, np.arange(6), dtype)
                made.append(np.concatenate([clips.ravel() for clips, _ in views]))
        _native.set_instructions(before)
        for number in range(3):
            for other in made[number::3]:
                np.testing.assert_array_equal(other.view(np.uint8), made[number].view(np.uint8))


class TestPurity:
    def test_a_sample_is_the_same_in_any_batch(self, level):
        dataset = dataset_of(topology("ntu-25"))
        specs = [ViewSpec(normalise=kind, transforms=USDRL) for kind in ("center", "align", "none", "center-first")]
        whole = native(dataset, specs, np.arange(6))
        for number in (5, 0, 3):
            for (one, present), (all_clips, all_present) in zip(native(dataset, specs, [number]), whole, strict=True):
                np.testing.assert_array_equal(one[0], all_clips[number])
                np.testing.assert_array_equal(present[0], all_present[number])
        repeated = native(dataset, specs, [2, 2, 4, 2])
        for (again, _), (all_clips, _) in zip(repeated, whole, strict=True):
            np.testing.assert_array_equal(again, all_clips[[2, 2, 4, 2]])

    def test_view_numbers_seeds_and_epochs_are_of_the_address(self):
        dataset = dataset_of(topology("ntu-25"))
        spec = usdrl_views()[0]
        numbered = native(dataset, [spec] * 3, np.arange(6), views=[5, 0, 65535])
        for (clips, _), view in zip(numbered, (5, 0, 65535), strict=True):
            np.testing.assert_array_equal(clips, defined(dataset, spec, np.arange(6), view)[0].numpy())
        for address in ({"seed": 0, "epoch": 0}, {"seed": 2**64 - 1, "epoch": 2**32 - 1}):
            ((clips, _),) = native(dataset, [spec], np.arange(6), **address)
            expected = make_view(dataset, spec, np.arange(6), address["seed"], address["epoch"], 0)
            np.testing.assert_array_equal(clips, expected.clips.numpy())

    def test_no_samples(self):
        ((clips, mask),) = native(dataset_of(topology("ntu-25")), [ViewSpec()], [])
        assert clips.shape == (0, 64, 2, 25, 3)
        assert mask.shape == (0, 64, 2)
