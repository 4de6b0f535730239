"""Transforms: the distributions of their draws, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fastskel.data.distort import BodyMask, FrameMask, GaussianBlur, GaussianNoise, Mirror
from fastskel.data.transforms import (
    ClipAddress,
    JointMask,
    OneOf,
    Rotation,
    Scaling,
    Shear,
    apply_transforms,
    draw_matrices,
)
from fastskel.data.views import ViewSpec, make_view
from fastskel.philox import Use, uniform, words
from fastskel.skeleton import topology

# of a test with a fixed seed: small enough never to be met by chance, large enough to notice a bias
P_VALUE = 1e-3


def run(transforms, values, **change):
    address = {"seed": 1, "index": np.arange(len(values)), "epoch": 0, "view": 0} | change
    return apply_transforms(values, transforms, ClipAddress(**address), topology("sbu-15"))


class TestDistributions:
    NUMBER = 5000

    def matrices(self, transform, channels=3):
        return draw_matrices((transform,), 2, channels, seed=1, index=np.arange(self.NUMBER), epoch=0, view=0)

    def coins(self, transform):
        """Whether each of many small clips was changed; a frame and a joint of each are 1, 2, 3."""
        values = np.broadcast_to(np.float32([1, 2, 3]), (self.NUMBER, 4, 2, 15, 3))
        return (run((transform,), values) != values).any(axis=(1, 2, 3, 4))

    @pytest.mark.parametrize(
        "make",
        [
            lambda p: Rotation(1.0, p),
            lambda p: Scaling(2.0, 3.0, False, p),
            lambda p: JointMask(0.5, p),
            Mirror,
            lambda p: GaussianNoise(1.0, p),
            lambda p: GaussianBlur(1.0, 2.0, 3, p, normalise=False),
            lambda p: FrameMask(0.5, p),
            BodyMask,
        ],
        ids=["rotation", "scaling", "joint-mask", "mirror", "noise", "blur", "frame-mask", "body-mask"],
    )
    def test_probability(self, make):
        assert not self.coins(make(0.0)).any() and not self.coins(make(0)).any()
        assert self.coins(make(1.0)).all() and self.coins(make(1)).all()
        assert stats.binomtest(int(self.coins(make(0.3)).sum()), self.NUMBER, 0.3).pvalue > P_VALUE

    def test_rotation_angles(self):
        matrices = self.matrices(Rotation((0.3, 0.2, 1.5)))
        assert (matrices[:, 0] == matrices[:, 1]).all()
        # float32 sines and cosines and sums of three products
        np.testing.assert_allclose(matrices @ matrices.swapaxes(2, 3), np.broadcast_to(np.eye(3), matrices.shape), atol=1e-6)
        np.testing.assert_allclose(np.linalg.det(matrices), 1, atol=1e-6)
        (r00, r01, r02), (_, _, r12), (_, _, r22) = matrices[:, 0].astype(np.float64).transpose(1, 2, 0)
        angles = np.stack([np.arctan2(-r12, r22), np.arcsin(r02), np.arctan2(-r01, r00)])
        for drawn, bound in zip(angles, (0.3, 0.2, 1.5), strict=True):
            assert stats.kstest(drawn, stats.uniform(-bound, 2 * bound).cdf).pvalue > P_VALUE
        assert np.abs(np.corrcoef(angles) - np.eye(3)).max() < 5 / np.sqrt(self.NUMBER)
        flat = self.matrices(Rotation((0.3, 0.2, 1.5)), 2)[:, 0]
        np.testing.assert_allclose(np.arctan2(flat[:, 1, 0], flat[:, 0, 0]), angles[2], atol=1e-6)

    def test_the_sense_of_each_turn(self):
        """As in the field's code for column vectors, R = Rz Ry Rx with Rx = [[1, 0, 0], [0, cos, sin], [0, -sin, cos]]."""
        for axis, (source, target, sign) in enumerate(((1, 2, -1), (0, 2, 1), (0, 1, -1))):
            angles = [0.0, 0.0, 0.0]
            angles[axis] = 1.0
            matrices = self.matrices(Rotation(tuple(angles)))[:, 0]
            index = np.arange(self.NUMBER)
            unit = uniform(words(1, index, 0, 0, Use.SPATIAL, 8))[:, 4 + axis].astype(np.float64) * 2 - 1
            np.testing.assert_allclose(matrices[:, source, target], sign * np.sin(unit), atol=1e-6)

    @pytest.mark.parametrize("per_axis", [False, True])
    def test_scaling_factors(self, per_axis):
        matrices = self.matrices(Scaling(0.5, 2.0, per_axis))[:, 0]
        assert (matrices[:, ~np.eye(3, dtype=bool)] == 0).all()
        factors = matrices[:, range(3), range(3)]
        assert (factors[:, 0] == factors[:, 1]).all() != per_axis
        for column in factors.T:
            assert stats.kstest(column, stats.uniform(0.5, 1.5).cdf).pvalue > P_VALUE
        if per_axis:
            assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 5 / np.sqrt(self.NUMBER)

    def equally_often(self, chosen, count):
        """Chi-square of subsets of `count` of all, (N, things): without replacement the counts vary by less."""
        things = chosen.shape[1]
        assert (chosen.sum(1) == count).all()
        expected = self.NUMBER * count / things
        statistic = ((chosen.sum(0) - expected) ** 2).sum() / expected * (things - 1) / (things - count)
        assert stats.chi2.sf(statistic, things - 1) > P_VALUE

    def test_masks_choose_equally_often(self):
        values = np.ones((self.NUMBER, 9, 4, 15, 1), np.float32)
        frames = run((FrameMask(0.5),), values) == 0
        assert (frames == frames[:, :, :1, :1]).all()
        self.equally_often(frames[:, :, 0, 0, 0], 5)
        bodies = run((BodyMask(1.0),), values) == 0
        assert (bodies == bodies[:, :1, :, :1]).all() and not bodies[:, :, 0].any()
        self.equally_often(bodies[:, 0, 1:, 0, 0], 1)
        values = np.ones((self.NUMBER, 1, 2, 15, 2), np.float32)
        joints = run((JointMask(0.3),), values) == 0
        assert (joints == joints[:, :, :1, :, :1]).all()
        self.equally_often(joints[:, 0, 0, :, 0], 5)

    def test_noise_is_standard_normal(self):
        values = np.ones((400, 3, 1, 15, 3), np.float32)
        found = run((GaussianNoise(0.5, 1.0),), values).reshape(400, -1).astype(np.float64)
        noise = (found - 1) / 0.5
        assert abs(noise.mean()) < 5 / np.sqrt(noise.size)
        assert abs(noise.var() - 1) < 5 * np.sqrt(2 / noise.size)
        # what is added has 24 bits of 1 + noise
        assert stats.kstest(noise[:, ::2].reshape(-1), "norm").pvalue > P_VALUE
        assert stats.kstest(noise[:, 1::2].reshape(-1), "norm").pvalue > P_VALUE
        # elements of a pair, their squares, and the same element of the next sample
        even, odd = noise[:, :-1:2], noise[:, 1::2]
        for first, second in ((even, odd), (even**2, odd**2), (noise[1:], noise[:-1])):
            assert abs(np.corrcoef(first.reshape(-1), second.reshape(-1))[0, 1]) < 5 / np.sqrt(first.size)

    def test_blur_widths(self):
        values = np.zeros((self.NUMBER, 9, 1, 15, 1), np.float32)
        values[:, 4] = 1
        found = run((GaussianBlur(0.5, 2.0, 9, 1.0),), values)[:, :, 0, 0, 0].astype(np.float64)
        sigma = np.sqrt(0.5 / np.log(found[:, 4] / found[:, 5]))
        assert stats.kstest(sigma, stats.uniform(0.5, 1.5).cdf).pvalue > P_VALUE
        np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
        np.testing.assert_array_equal(found, found[:, ::-1])
        raw = run((GaussianBlur(0.5, 2.0, 9, 1.0, normalise=False),), values)[:, 4, 0, 0, 0]
        assert (raw == 1).all()

    @pytest.mark.parametrize("change", [{"view": 1}, {"epoch": 1}, {"seed": 2}, {"index": np.arange(1, 401)}])
    def test_addresses_are_independent(self, change):
        values = np.ones((400, 1, 1, 15, 3), np.float32)
        noise = [run((GaussianNoise(1.0, 1.0),), values, **other) - 1 for other in ({}, change)]
        assert abs(np.corrcoef(*(found.reshape(-1) for found in noise))[0, 1]) < 5 / np.sqrt(values.size)

    def test_numbers_of_the_pipeline_are_independent(self):
        values = np.ones((400, 1, 1, 15, 3), np.float32)
        first, second = (run((Mirror(0.0),) * p + (GaussianNoise(1.0, 1.0),), values) - 1 for p in (0, 1))
        assert abs(np.corrcoef(first.reshape(-1), second.reshape(-1))[0, 1]) < 5 / np.sqrt(values.size)
        both = run((FrameMask(0.5), FrameMask(0.5)), np.ones((400, 8, 1, 15, 1), np.float32))
        assert len(set((both[:, :, 0, 0, 0] == 0).sum(1).tolist())) > 1


class TestErrors:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Rotation(-0.1), "Rotation: angle must be finite and at least 0 radians, got -0.1"),
            (lambda: Rotation((0.1, float("inf"), 0.1)), "angle must be finite and at least 0 radians, got inf"),
            (lambda: Rotation((0.1, 0.2)), r"angle must be one number or three, got \(0.1, 0.2\)"),
            (lambda: Rotation("1"), "angle must be finite and at least 0 radians, got '1'"),
            (lambda: Rotation(0.1, 1.1), r"Rotation: probability must be in \[0, 1\], got 1.1"),
            (lambda: Scaling(float("nan")), "Scaling: low must be finite, got nan"),
            (lambda: Scaling(1.0, 1e39), r"Scaling: high must be finite, got 1e\+39"),
            (lambda: Scaling(1.2, 1.1), "Scaling: low must be at most high, got 1.2 and 1.1"),
            (lambda: Scaling(per_axis=1), "Scaling: per_axis must be True or False, got 1"),
            (lambda: Scaling(probability=float("nan")), r"Scaling: probability must be in \[0, 1\], got nan"),
            (lambda: JointMask(1.5), r"JointMask: fraction must be in \[0, 1\], got 1.5"),
            (lambda: JointMask(0.1, True), r"JointMask: probability must be in \[0, 1\], got True"),
            (lambda: JointMask(np.float32(0.5)), r"JointMask: fraction must be in \[0, 1\], got .*0.5"),
            (lambda: Mirror(-0.5), r"Mirror: probability must be in \[0, 1\], got -0.5"),
            (lambda: Mirror(reflect=None), "Mirror: reflect must be True or False, got None"),
            (lambda: GaussianNoise(-1.0), "GaussianNoise: std must be finite and at least 0, got -1.0"),
            (lambda: GaussianNoise(1.0, 2.0), r"GaussianNoise: probability must be in \[0, 1\], got 2.0"),
            (lambda: GaussianBlur(0.0), "GaussianBlur: low must be finite and at least 1e-06 frames, got 0.0"),
            (lambda: GaussianBlur(2.0, 1.0), "GaussianBlur: low must be at most high, got 2.0 and 1.0"),
            (lambda: GaussianBlur(taps=4), "GaussianBlur: taps must be an odd number from 1, got 4"),
            (lambda: GaussianBlur(taps=-3), "taps must be an odd number from 1, got -3"),
            (lambda: GaussianBlur(taps=5.0), "taps must be an odd number from 1, got 5.0"),
            (lambda: GaussianBlur(probability=-1.0), r"GaussianBlur: probability must be in \[0, 1\], got -1.0"),
            (lambda: GaussianBlur(normalise="yes"), "GaussianBlur: normalise must be True or False, got 'yes'"),
            (lambda: GaussianBlur(padding="same"), "GaussianBlur: padding must be one of edge, zero, got 'same'"),
            (lambda: FrameMask(-0.1), r"FrameMask: fraction must be in \[0, 1\], got -0.1"),
            (lambda: FrameMask(0.1, "1"), r"FrameMask: probability must be in \[0, 1\], got '1'"),
            (lambda: BodyMask(1.01), r"BodyMask: probability must be in \[0, 1\], got 1.01"),
            (lambda: OneOf([Shear()]), "OneOf: options must be a non-empty tuple of transforms"),
            (lambda: OneOf((Mirror(),)), "OneOf: options must be a non-empty tuple of transforms"),
            (lambda: ViewSpec(transforms=[Shear()]), "ViewSpec: transforms must be a tuple of transforms"),
            (lambda: ViewSpec(transforms=Shear()), "ViewSpec: transforms must be a tuple of transforms"),
            (lambda: ViewSpec(transforms=(Shear,)), "ViewSpec: transforms must be a tuple of transforms"),
            (lambda: ViewSpec(transforms=(Shear(),) * 257), "ViewSpec: transforms must be at most 256, got 257"),
        ],
    )
    def test_parameters(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            (ViewSpec(frames=65537, transforms=(FrameMask(),)), "FrameMask: clips must have at most 65536 frames, got 65537"),
            (ViewSpec(frames=2**18, transforms=(GaussianNoise(),)), r"T M V C < 2\^24, got .*\(262144, 1, 25, 3\)"),
        ],
    )
    def test_views_too_long(self, spec, message, memory_dataset):
        with pytest.raises(ValueError, match=message):
            make_view(memory_dataset([9]), spec, [0], 0, 0, 0)
        spec.transforms[0].check((65535, 1, 25, 3))

    def test_too_many_joints(self):
        with pytest.raises(ValueError, match="JointMask: a transform must read at most 64 joint words, got 80"):
            draw_matrices((JointMask(0.8),), 100, 3, seed=0, index=np.arange(1), epoch=0, view=0)

    def test_channels(self, memory_dataset):
        dataset = memory_dataset([9], channels=4)
        with pytest.raises(ValueError, match="ViewSpec: Rotation must have 2 or 3 channels, got 4 in in-memory"):
            make_view(dataset, ViewSpec(transforms=(Mirror(), Rotation())), [0], 0, 0, 0)
        everything = (Mirror(1.0), GaussianNoise(1.0, 1.0), GaussianBlur(), FrameMask(), BodyMask())
        assert make_view(dataset, ViewSpec(transforms=everything), [0], 0, 0, 0).clips.shape == (1, 64, 1, 25, 4)
