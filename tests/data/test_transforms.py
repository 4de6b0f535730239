"""Transforms: each against a second statement of its words and formula; purity, absence, composition."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fastskel.data import transforms as pipeline
from fastskel.data.distort import BodyMask, FrameMask, GaussianBlur, GaussianNoise, Mirror
from fastskel.data.matrices import apply_matrices
from fastskel.data.transforms import (
    TRANSFORMS,
    ClipAddress,
    ClipTransform,
    JointCorruption,
    JointMask,
    OneOf,
    Rotation,
    Scaling,
    Shear,
    SpatialTransform,
    apply_transforms,
    draw_matrices,
)
from fastskel.data.views import RandomCrop, ViewSpec, make_view
from fastskel.philox import philox4x32, words, words_numpy
from fastskel.skeleton import Topology, topology
from fastskel.train.stage import describe

SPATIAL, JOINTS, NOISE, FRAMES = 2, 3, 8, 9
# logarithms and exponentials of float64 may differ in their last place, and sums in what they add it to
CLOSE = {"rtol": 1e-6, "atol": 1e-6}

EVERY = (
    Rotation((0.3, 0.2, 0.1), 0.6),
    Scaling(0.9, 1.1, True, 0.7),
    JointMask(0.2, 0.6),
    Mirror(0.6),
    GaussianNoise(0.05, 0.6),
    GaussianBlur(0.5, 2.0, 5, 0.6),
    FrameMask(0.3, 0.6),
    BodyMask(0.6),
)
ids = [type(transform).__name__ for transform in EVERY]


def address(number=12, **change):
    return ClipAddress(**({"seed": 2**40 + 5, "index": np.arange(number) + 3, "epoch": 6, "view": 2} | change))


def clips(number=12, frames=5, bodies=2, name="ntu-25", channels=3):
    shape = (number, frames, bodies, topology(name).num_joints, channels)
    return np.random.default_rng(frames).standard_normal(shape).astype(np.float32)


def run(transforms, values, name="ntu-25", **change):
    return apply_transforms(values, transforms, address(len(values), **change), topology(name))


class Statement:
    """One sample of one transform in plain loops: shares nothing with the transforms but the Philox rounds."""

    def __init__(self, where: ClipAddress, row: int, number: int, skeleton: Topology) -> None:
        self.where, self.row, self.number, self.skeleton = where, row, number, skeleton

    def words(self, use: int, first: int, num: int) -> list[int]:
        begin, end = first // 4, (first + num + 3) // 4
        counter = np.empty((end - begin, 4), np.uint32)
        counter[:, 0] = self.where.index[self.row]
        counter[:, 1], counter[:, 2] = self.where.epoch, self.where.view + (use << 16)
        counter[:, 3] = np.arange(begin, end)
        key = np.array([self.where.seed & 0xFFFFFFFF, self.where.seed >> 32], np.uint32)
        return philox4x32(counter, key).reshape(-1).tolist()[first - 4 * begin : first - 4 * begin + num]

    def unit(self, word: int) -> np.float32:
        return np.float32((self.words(SPATIAL, 64 * self.number + word, 1)[0] >> 8) / 2**24)

    def picks(self, use: int, block: int, count: int, among: int) -> list[int]:
        pool = list(range(among))
        for step, word in enumerate(self.words(use, block * self.number, count)):
            other = step + (word * (among - step) >> 32)
            pool[step], pool[other] = pool[other], pool[step]
        return pool[:count]

    def applied(self, transform) -> bool:
        return bool(self.unit(1) < np.float32(transform.probability))

    def linear(self, clip, matrix):
        """x A with products and sums of float32, first channel first."""
        out = np.empty_like(clip)
        for column in range(clip.shape[-1]):
            total = clip[..., 0] * matrix[0][column]
            for channel in range(1, clip.shape[-1]):
                total = total + clip[..., channel] * matrix[channel][column]
            out[..., column] = total
        return out

    def rotation(self, transform, clip):
        channels = clip.shape[-1]
        bounds = transform.angle if isinstance(transform.angle, tuple) else (transform.angle,) * 3
        drawn = [np.float32(bounds[i]) * (np.float32(2) * self.unit(4 + i) - np.float32(1)) for i in range(3)]
        (a, b, c), (d, e, f) = ([np.float32(g(float(x))) for x in drawn] for g in (math.cos, math.sin))
        one, nil = np.float32(1), np.float32(0)
        x = [[one, nil, nil], [nil, a, -d], [nil, d, a]]
        y = [[b, nil, e], [nil, one, nil], [-e, nil, b]]
        z = [[c, -f, nil], [f, c, nil], [nil, nil, one]]
        if channels == 2:
            return self.linear(clip, [row[:2] for row in z[:2]])
        first = self.linear(np.array(x, np.float32), y)
        return self.linear(clip, self.linear(first, z))

    def scaling(self, transform, clip):
        low, high = np.float32(transform.low), np.float32(transform.high)
        matrix = np.zeros((clip.shape[-1],) * 2, np.float32)
        for channel in range(clip.shape[-1]):
            matrix[channel, channel] = low + (high - low) * self.unit(4 + (channel if transform.per_axis else 0))
        return self.linear(clip, matrix)

    def jointmask(self, transform, clip):
        joints = clip.shape[-2]
        out = self.linear(clip, np.eye(clip.shape[-1], dtype=np.float32))
        for joint in self.picks(JOINTS, 64, int(transform.fraction * joints + 0.5), joints):
            out[..., joint, :] = 0
        return out

    def mirror(self, transform, clip):
        out = np.empty_like(clip)
        for joint, other in enumerate(self.skeleton.mirror):
            out[..., joint, :] = clip[..., other, :]
            if transform.reflect:
                out[..., joint, 0] = -clip[..., other, 0]
        return out

    def gaussiannoise(self, transform, clip):
        flat, out = clip.reshape(-1), clip.copy()
        drawn = self.words(NOISE, 2**24 * self.number, len(flat) + 1)
        for element, value in enumerate(flat):
            even = element - element % 2
            first, second = 1 - (drawn[even] >> 8) / 2**24, (drawn[even + 1] >> 8) / 2**24
            wave = math.cos if element == even else math.sin
            normal = np.float32(math.sqrt(-2 * math.log(first)) * wave(2 * math.pi * second))
            joint = element - element % clip.shape[-1]
            if any(flat[joint : joint + clip.shape[-1]] != 0):
                out.reshape(-1)[element] = value + np.float32(transform.std) * normal
        return out

    def gaussianblur(self, transform, clip):
        low, high = np.float32(transform.low), np.float32(transform.high)
        sigma, half, frames = float(low + (high - low) * self.unit(4)), transform.taps // 2, len(clip)
        weights = [math.exp(-((tap - half) ** 2) / (2 * sigma * sigma)) for tap in range(transform.taps)]
        if transform.normalise:
            weights = [weight / sum(weights) for weight in weights]
        out = np.zeros_like(clip)
        for frame in range(frames):
            for tap, weight in enumerate(weights):
                source = frame + tap - half
                if transform.padding == "edge":
                    source = min(max(source, 0), frames - 1)
                if 0 <= source < frames:
                    out[frame] += np.float32(weight) * clip[source]
        return out

    def framemask(self, transform, clip):
        out = clip.copy()
        for frame in self.picks(FRAMES, 2**16, int(transform.fraction * len(clip) + 0.5), len(clip)):
            out[frame] = 0
        return out

    def bodymask(self, transform, clip):
        out, others = clip.copy(), clip.shape[1] - 1
        if others:
            out[:, 1 + (self.words(SPATIAL, 64 * self.number + 4, 1)[0] * others >> 32)] = 0
        return out


class TestStatement:
    @pytest.mark.parametrize(
        ("frames", "bodies", "name", "channels"),
        [(5, 2, "ntu-25", 3), (1, 1, "coco-17", 2), (16, 4, "kinect-20-ucla", 3), (3, 1, "sbu-15", 3)],
        ids=["ntu", "coco", "ucla", "sbu"],
    )
    @pytest.mark.parametrize("number", [0, 3])
    @pytest.mark.parametrize(
        "transform",
        [
            *EVERY,
            Rotation(3.0),
            Scaling(-1, 2, False, 0.5),
            JointMask(1.0),
            Mirror(0.7, reflect=False),
            GaussianNoise(1.0, 1),
            GaussianBlur(0.1, 0.3, 15, 0.9, normalise=False, padding="zero"),
            GaussianBlur(1.0, 5.0, 7, 0.9, padding="zero"),
            GaussianBlur(2.0, 2.0, 1, 1.0, normalise=False),
            FrameMask(0.5),
            FrameMask(1.0, 0.5),
        ],
        ids=lambda transform: f"{type(transform).__name__}-{'-'.join(str(v) for v in vars(transform).values())}",
    )
    def test_words_and_formula(self, transform, number, frames, bodies, name, channels):
        values, skeleton = clips(12, frames, bodies, name, channels), topology(name)
        values[:, :, -1, 2] = 0
        before = values.copy()
        # leaves every bit alone, and is not linear, so that what is tested is a matrix of its own
        found = run((Mirror(0.0),) * number + (transform,), values, name)
        np.testing.assert_array_equal(values, before)
        kind, applied = type(transform).__name__.lower(), 0
        for row in range(12):
            statement = Statement(address(), row, number, skeleton)
            expected = values[row]
            if statement.applied(transform):
                expected, applied = getattr(statement, kind)(transform, values[row]), applied + 1
            if kind in ("gaussiannoise", "gaussianblur"):
                np.testing.assert_allclose(found[row], expected, **CLOSE)
            else:
                np.testing.assert_array_equal(found[row], expected)
        assert found.dtype == np.float32 and found.shape == values.shape
        assert applied == 12 if transform.probability == 1 else 0 < applied < 12

    def test_zero_padding_sums_zeros(self):
        values = np.full((1, 2, 1, 25, 3), -0.0, np.float32)
        found = run((GaussianBlur(1.0, 1.0, 3, 1.0, padding="zero"),), values)
        # the frame beyond the end is +0, and -0 + 0 = 0; repeated end frames are all -0
        assert not np.signbit(found).any()
        assert np.signbit(run((GaussianBlur(1.0, 1.0, 3, 1.0),), values)).all()

    def test_options_share_one_block(self):
        options = (Rotation(0.5, 0.5), Scaling(0.5, 2.0), JointMask(0.5))
        values, where = clips(60), address(60)
        found = run((Mirror(0.0), OneOf(options)), values)
        chosen = [int(Statement(where, row, 1, topology("ntu-25")).words(SPATIAL, 64, 1)[0] * 3 >> 32) for row in range(60)]
        assert set(chosen) == {0, 1, 2}
        for number, option in enumerate(options):
            alone, rows = run((Mirror(0.0), option), values), np.flatnonzero(np.array(chosen) == number)
            np.testing.assert_array_equal(found[rows], alone[rows])

    def test_words_from_a_first_one(self):
        index = np.array([5, 2**32 - 1])
        whole = words_numpy(7, index, 3, [1, 2], NOISE, 4100)
        for first, num in ((0, 3), (4, 1), (4096, 4), (8, 4092)):
            np.testing.assert_array_equal(words(7, index, 3, [1, 2], NOISE, num, first=first), whole[:, first : first + num])
        last = 2**32 - 4
        assert words(7, index, 3, 0, NOISE, 4, first=last).shape == (2, 4)
        for first, message in ((6, "first must be a multiple of 4, got 6"), (2**32, r"first must be in \[0, 4294967296\)")):
            with pytest.raises(ValueError, match=message):
                words(7, index, 3, 0, NOISE, 4, first=first)


class TestProperties:
    @pytest.mark.parametrize(("name", "channels"), [("ntu-25", 3), ("coco-17", 2)])
    def test_pure(self, name, channels, memory_dataset):
        dataset = memory_dataset(range(1, 40), name, 2, channels)
        spec = ViewSpec(frames=6, crop=RandomCrop(0.1, 1.0, 4), transforms=(*EVERY, OneOf((Shear(), JointCorruption()))))
        everything = make_view(dataset, spec, np.arange(39), 7, 3, 1)
        assert torch.isfinite(everything.clips).all()
        for batch in ([5], [38, 0, 5], [5, 5, 17, 2]):
            view = make_view(dataset, spec, batch, 7, 3, 1)
            assert torch.equal(view.clips, everything.clips[batch]) and torch.equal(view.mask, everything.mask[batch])
        assert make_view(dataset, spec, [], 7, 3, 1).clips.shape[0] == 0

    @pytest.mark.parametrize("transform", EVERY, ids=ids)
    def test_what_is_absent_stays_absent(self, transform):
        values = clips(60, 6, 3)
        # a joint in the middle, and both of a pair that a mirror exchanges
        absent = [3, 4, topology("ntu-25").mirror[4]]
        values[:, :, 0, absent], values[:, :, 1] = 0, 0
        found = run((transform,), values)
        assert not found[values == 0].any()
        assert (found != values).any()

    def test_blur_spreads_a_joint_over_time_alone(self):
        values = clips(60, 6)
        values[:, ::2, 0, 3], values[:, :, 1] = 0, 0
        found = run((GaussianBlur(1.0, 1.0, 3, 1.0),), values)
        assert found[:, ::2, 0, 3].all() and not found[:, :, 1].any()

    def test_absence_is_seen_by_all_channels(self):
        values = np.zeros((1, 1, 1, 25, 3), np.float32)
        values[..., 0, 1], values[..., 1, 0] = 1, np.nan
        noise = run((GaussianNoise(0.1, 1.0),), values) - values
        assert np.flatnonzero(noise[0, 0, 0].any(axis=-1)).tolist() == [0, 1] and noise[0, 0, 0, 0].all()

    @pytest.mark.parametrize("transform", [Mirror(0.0), GaussianNoise(1.0, 0.0), GaussianBlur(probability=0.0)], ids=repr)
    def test_an_unlucky_coin_changes_no_bit(self, transform):
        values = np.random.default_rng(0).integers(0, 2**32, (8, 4, 2, 25, 3), dtype=np.uint32).view(np.float32)
        found = run((transform,), values)
        np.testing.assert_array_equal(found.view(np.uint32), values.view(np.uint32))

    def test_one_body_is_never_masked(self):
        values = clips(30, bodies=1)
        assert (run((BodyMask(1.0),), values) == values).all()

    def test_mirror_twice_is_nothing(self):
        values = clips(30)
        np.testing.assert_array_equal(run((Mirror(1.0), Mirror(1.0)), values), values)
        once = run((Mirror(1.0),), values)
        right, left = (topology("ntu-25").joint(f"{side}_wrist") for side in ("right", "left"))
        np.testing.assert_array_equal(once[..., right, :], values[..., left, :] * np.float32([-1, 1, 1]))


class TestPipeline:
    def test_neighbours_compose_and_others_part_them(self, monkeypatch):
        calls = []
        monkeypatch.setattr(pipeline, "apply_matrices", lambda *args: (calls.append(1), apply_matrices(*args))[1])
        first, second = (Shear(), Rotation(1.0)), (Scaling(0.5, 1.5), JointMask(0.2), Shear(0.3))
        middle, values, where = (Mirror(0.5), GaussianNoise(0.1, 0.5)), clips(20), address(20)
        found = run((*first, *middle, *second), values)
        assert len(calls) == 2
        draws = {"seed": where.seed, "index": where.index, "epoch": where.epoch, "view": where.view}
        expected = apply_matrices(values, draw_matrices(first, 25, 3, **draws))
        for number, transform in enumerate(middle, 2):
            expected = transform.apply(expected, where, number, topology("ntu-25"))
        expected = apply_matrices(expected, draw_matrices(second, 25, 3, **draws, first=4))
        np.testing.assert_array_equal(found, expected)

    def test_order_counts(self):
        values = clips(20)
        one, other = run((Shear(), Mirror(0.0), Mirror(1.0)), values), run((Shear(), Mirror(1.0)), values)
        np.testing.assert_array_equal(one, other)
        assert (run((Mirror(0.0), Shear()), values) != run((Shear(), Mirror(0.0)), values)).any()

    def test_no_transforms_are_no_copy(self):
        values = clips(3)
        assert run((), values) is values

    def test_transforms_see_the_mask_no_more(self, memory_dataset):
        dataset = memory_dataset([8, 9], bodies=2)
        view = make_view(dataset, ViewSpec(frames=8, transforms=(FrameMask(1.0),)), [0, 1], 0, 0, 0)
        assert view.mask.all() and not view.clips.any()

    def test_streams_follow_the_transforms(self, memory_dataset):
        dataset = memory_dataset([8, 9])
        plain, motion = (
            make_view(dataset, ViewSpec(kind, frames=8, transforms=(FrameMask(0.5), Scaling(2.0, 2.0))), [0, 1], 0, 0, 0)
            for kind in ("joint", "motion")
        )
        assert torch.equal(motion.clips[:, :-1], plain.clips[:, 1:] - plain.clips[:, :-1])

    def test_ones_own(self, memory_dataset):
        @dataclass(frozen=True)
        class Flatten(SpatialTransform):
            def matrices(self, spatial, joints, num_joints, num_channels):
                matrix = np.diag([1.0, 1.0, 0.0][:num_channels]).astype(np.float32)
                return np.broadcast_to(matrix, (len(spatial), num_joints, num_channels, num_channels))

        @dataclass(frozen=True)
        class Reverse(ClipTransform):
            def apply(self, clips, address, number, topology):
                assert address.spatial(number).shape == (len(clips), 16) and topology.name == "ntu-25"
                return np.ascontiguousarray(clips[:, ::-1])

        dataset = memory_dataset([8, 9])
        view = make_view(dataset, ViewSpec(frames=8, transforms=(Reverse(), Flatten())), [0, 1], 0, 0, 0)
        plain = make_view(dataset, ViewSpec(frames=8), [0, 1], 0, 0, 0)
        assert torch.equal(view.clips, plain.clips.flip(1) * torch.tensor([1.0, 1.0, 0.0]))

    def test_names(self):
        names = "blur body-mask frame-mask joint-corruption joint-mask mirror noise one-of rotation scaling shear"
        assert list(TRANSFORMS) == names.split()

    def test_a_run_can_record_them(self):
        spec = ViewSpec(transforms=(*EVERY, OneOf((Shear(), JointMask()))))
        recorded = json.loads(json.dumps(describe(spec)))["transforms"]
        assert recorded[0] == {"type": "Rotation", "angle": [0.3, 0.2, 0.1], "probability": 0.6}
        assert [entry["type"] for entry in recorded] == [*ids, "OneOf"]
        assert len({hash(transform) for transform in EVERY}) == len(EVERY)
