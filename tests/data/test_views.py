"""Views: fixed-parameter operators against recorded tensors, distributions of the draws, purity, errors."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from scipy import stats

from fastskel.data.matrices import apply_matrices, compose_matrices, corrupt_matrices, shear_matrices
from fastskel.data.normalise import normalise
from fastskel.data.resize import crop_resize, crop_resize_numpy
from fastskel.data.transforms import JointCorruption, OneOf, Shear, draw_matrices
from fastskel.data.views import (
    CenterCrop,
    RandomCrop,
    ViewSpec,
    crop_bounds,
    eval_view,
    make_view,
    usdrl_views,
)
from fastskel.philox import words
from fastskel.skeleton import stream

# recorded coordinates are of order 1; a convex mix or a sum of three products rounds to a few units of 2^-24
ATOL = 1e-6
# of a chi-square test with a fixed seed: small enough never to be met by chance, large enough to notice a bias
P_VALUE = 1e-3


def tmvc(array):
    """Recorded (C, T, V, M) to (T, M, V, C)."""
    return np.ascontiguousarray(array.transpose(1, 3, 2, 0), dtype=np.float32)


def draws(kind, number, num_joints=25, **address):
    index = np.arange(number)
    return draw_matrices((kind,), num_joints, 3, **{"seed": 1, "index": index, "epoch": 0, "view": 0} | address)


class TestRecorded:
    @pytest.mark.parametrize("resize", [crop_resize, crop_resize_numpy])
    def test_random_crop(self, golden, resize):
        record = golden("augment.npz")
        num_frames = int(record["num_frames"])
        # the stream of the global generator that the reference seeds
        generator = np.random.RandomState(0)
        scale = generator.rand() * 0.9 + 0.1
        length = min(max(int(num_frames * scale), 64), num_frames)
        start = generator.randint(0, num_frames - length + 1)
        found = resize(tmvc(record["x"]), int(start), length, 64)
        np.testing.assert_allclose(found, tmvc(record["crop_seed0"]), atol=ATOL)

    @pytest.mark.parametrize(("key", "ratio", "count"), [("1.0", 1.0, 100), ("0.5", 0.5, 100), ("1.0_n40", 1.0, 40)])
    def test_centre_crop(self, golden, key, ratio, count):
        record = golden("augment.npz")
        start, length = crop_bounds(CenterCrop(ratio), np.array([count]), seed=0, index=np.array([0]), epoch=0, view=0)
        found = crop_resize(tmvc(record["x"]), int(start[0]), int(length[0]), 64)
        np.testing.assert_allclose(found, tmvc(record[f"center_{key}"]), atol=ATOL)

    @pytest.mark.parametrize("seed", [0, 1])
    def test_corruption(self, golden, seed):
        record = golden("augment.npz")
        random.seed(seed)
        joints = np.random.RandomState(seed).choice(25, 15, replace=False)
        zero = random.random() < 0.5
        mix = [[random.uniform(-1, 1) for _ in range(3)] for _ in range(3)]
        assert zero == (seed == 1)
        matrices = corrupt_matrices(joints[None], np.array([zero]), np.array([mix], np.float32), 25, 3)
        found = apply_matrices(tmvc(record["crop_seed0"])[None], matrices)[0]
        np.testing.assert_allclose(found, tmvc(record[f"corrupt_seed{seed}"]), atol=ATOL)

    def test_shear(self, golden):
        record = golden("augment.npz")
        random.seed(0)
        parameters = np.array([[random.uniform(-1, 1) for _ in range(6)]], np.float32)
        found = apply_matrices(tmvc(record["crop_seed0"])[None], shear_matrices(parameters, 25, 3))[0]
        np.testing.assert_allclose(found, tmvc(record["shear_seed0"]), atol=2 * ATOL)


class TestMatrices:
    @pytest.mark.parametrize("channels", [2, 3])
    def test_apply_is_matrix_product(self, channels):
        rng = np.random.default_rng(0)
        clips = rng.standard_normal((3, 5, 2, 7, channels)).astype(np.float32)
        first, second = rng.standard_normal((2, 3, 7, channels, channels)).astype(np.float32)
        expected = np.einsum("ntmvc,nvcd,nvde->ntmve", *(x.astype(np.float64) for x in (clips, first, second)))
        found = apply_matrices(clips, compose_matrices(first, second))
        assert found.dtype == np.float32
        # two sums of C products of entries below 5 in magnitude
        np.testing.assert_allclose(found, expected, atol=2 * channels * 125 * 2**-24)

    def test_two_channels_use_the_leading_block(self):
        three, two = (draw_matrices((Shear(),), 5, c, seed=1, index=np.arange(9), epoch=0, view=0) for c in (3, 2))
        np.testing.assert_array_equal(three[..., :2, :2], two)

    def test_pipeline_draws_each_transform_from_its_own_block(self):
        address = {"seed": 3, "index": np.arange(50), "epoch": 2, "view": 1}
        shears = draw_matrices((Shear(), Shear()), 4, 3, **address)
        first = draw_matrices((Shear(),), 4, 3, **address)
        second = draw_matrices((Shear(0.0), Shear()), 4, 3, **address)
        np.testing.assert_array_equal(shears, compose_matrices(first, second))
        assert np.abs(first - second).max(axis=(1, 2, 3)).min() > 0.01

    def test_words_are_where_the_document_says(self):
        # a second reading of the layout, sample by sample: nothing here is shared with the transforms but the words
        address = {"seed": 2**40 + 5, "index": np.arange(40), "epoch": 6, "view": 3}
        pipeline = (Shear(0.25), OneOf((JointCorruption(), Shear())))
        found = draw_matrices(pipeline, 20, 3, **address)
        spatial = words(address["seed"], address["index"], 6, 3, 2, 128).astype(np.int64)
        joints = words(address["seed"], address["index"], 6, 3, 3, 128).astype(np.int64)
        shear = [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
        for row in range(40):
            unit = (spatial[row] >> 8) / 2**23 - 1
            first, second = np.eye(3), np.eye(3)
            for number, place in enumerate(shear):
                first[place] = 0.25 * unit[4 + number]
                second[place] = unit[68 + number]
            chosen = list(range(20))
            if spatial[row, 64] < 2**31:
                for step in range(12):
                    other = step + (joints[row, 64 + step] * (20 - step) >> 32)
                    chosen[step], chosen[other] = chosen[other], chosen[step]
                chosen = chosen[:12]
                second = np.zeros((3, 3)) if spatial[row, 65] < 2**31 else unit[68:77].reshape(3, 3).T
            expected = np.stack([first.T] * 20)
            expected[chosen] = first.T @ second.T
            np.testing.assert_allclose(found[row], expected, atol=1e-6)

    def test_rejects_matrices_of_other_shape(self):
        with pytest.raises(ValueError, match=r"apply_matrices: matrices must be .*\(1, 5, 3, 3\)"):
            apply_matrices(np.zeros((1, 2, 1, 5, 3), np.float32), np.zeros((1, 4, 3, 3), np.float32))

    def test_rejects_empty_pipeline_and_channels(self):
        address = {"seed": 0, "index": np.arange(1), "epoch": 0, "view": 0}
        with pytest.raises(ValueError, match="at least one transform"):
            draw_matrices((), 5, 3, **address)
        with pytest.raises(ValueError, match="num_channels must be 2 or 3, got 4"):
            draw_matrices((Shear(),), 5, 4, **address)
        with pytest.raises(ValueError, match="at most 64 joint words, got 70"):
            draw_matrices((JointCorruption(0.7),), 100, 3, **address)


class TestDistributions:
    NUMBER = 20000

    @pytest.mark.parametrize(
        ("count", "low", "high", "least"), [(100, 0.1, 1.0, 64), (40, 0.1, 1.0, 8), (30, 0.5, 0.9, 1)]
    )
    def test_crop(self, count, low, high, least):
        index = np.arange(self.NUMBER)
        crop = RandomCrop(low, high, least)
        start, length = crop_bounds(crop, np.full(self.NUMBER, count), seed=5, index=index, epoch=3, view=2)
        assert start.min() >= 0
        assert (start + length).max() <= count
        assert length.min() >= min(least, count)
        # exact: the length is l where n (low + (high - low) u) is in [l, l + 1), clamped below
        edges = (np.arange(count + 2) / count - low) / (high - low)
        share = np.diff(np.clip(edges, 0, 1))
        share[least] += share[:least].sum()
        share[:least] = 0
        kept = share > 0
        observed = np.bincount(length, minlength=count + 1)
        # at most one 2^-24 of rounding moves a draw across an edge
        assert observed[~kept].sum() <= 2
        weight = share[kept] * observed[kept].sum() / share[kept].sum()
        assert stats.chisquare(observed[kept], weight).pvalue > P_VALUE
        common = np.bincount(length).argmax()
        places = np.bincount(start[length == common], minlength=count - common + 1)
        assert stats.chisquare(places).pvalue > P_VALUE

    def test_short_clips_are_kept_whole(self):
        start, length = crop_bounds(RandomCrop(), np.array([1, 40, 64]), seed=0, index=np.arange(3), epoch=0, view=0)
        assert start.tolist() == [0, 0, 0]
        assert length.tolist() == [1, 40, 64]

    def test_equal_bounds_crop_a_fixed_share(self):
        _, length = crop_bounds(
            RandomCrop(0.5, 0.5, 1), np.full(100, 50), seed=0, index=np.arange(100), epoch=0, view=0
        )
        assert set(length.tolist()) == {25}

    def test_split_of_kinds(self):
        spec = usdrl_views()[0]
        matrices = draws(spec.transforms[0], self.NUMBER)
        whole = (matrices[:, :1] == matrices).all(axis=(1, 2, 3))
        zero = (matrices == 0).all(axis=(2, 3)).any(1)
        counts = [whole.sum(), zero.sum(), (~whole & ~zero).sum()]
        assert stats.chisquare(counts, [self.NUMBER / 2, self.NUMBER / 4, self.NUMBER / 4]).pvalue > P_VALUE

    @pytest.mark.parametrize(("num_joints", "chosen"), [(25, 15), (20, 12), (17, 10), (15, 9)])
    def test_joints(self, num_joints, chosen):
        matrices = draws(JointCorruption(0.6, 1.0), self.NUMBER, num_joints)
        zero = (matrices == 0).all(axis=(2, 3))
        assert (zero.sum(1) == chosen).all()
        # without replacement the counts vary by (V - k) / (V - 1) of a multinomial's variance
        statistic = ((zero.sum(0) - self.NUMBER * chosen / num_joints) ** 2).sum() / (self.NUMBER * chosen / num_joints)
        assert stats.chi2.sf(statistic * (num_joints - 1) / (num_joints - chosen), num_joints - 1) > P_VALUE
        pairs = zero[:, :1] & zero[:, 1:]
        expected = self.NUMBER * chosen * (chosen - 1) / (num_joints * (num_joints - 1))
        assert np.abs(pairs.sum(0) - expected).max() < 5 * np.sqrt(expected)

    def test_untouched_joints_keep_their_bits(self):
        matrices = draws(JointCorruption(), 200)
        kept = (matrices == np.eye(3)).all(axis=(2, 3))
        assert (kept.sum(1) == 10).all()

    def test_mix_is_one_uniform_matrix(self):
        matrices = draws(JointCorruption(0.6, 0.0), self.NUMBER)
        chosen = ~(matrices == np.eye(3)).all(axis=(2, 3))
        mix = np.stack([sample[rows] for sample, rows in zip(matrices, chosen, strict=True)])
        assert (mix == mix[:, :1]).all()
        entries = mix[:, 0].reshape(-1, 9)
        for column in entries.T:
            assert stats.kstest(column, stats.uniform(-1, 2).cdf).pvalue > P_VALUE
        correlation = np.corrcoef(entries.T) - np.eye(9)
        assert np.abs(correlation).max() < 5 / np.sqrt(self.NUMBER)

    def test_shear_is_uniform_with_unit_diagonal(self):
        matrices = draws(Shear(0.5), self.NUMBER)
        assert (matrices == matrices[:, :1]).all()
        assert (matrices[:, 0, [0, 1, 2], [0, 1, 2]] == 1).all()
        entries = matrices[:, 0][:, ~np.eye(3, dtype=bool)]
        for column in entries.T:
            assert stats.kstest(column, stats.uniform(-0.5, 1).cdf).pvalue > P_VALUE
        correlation = np.corrcoef(entries.T) - np.eye(6)
        assert np.abs(correlation).max() < 5 / np.sqrt(self.NUMBER)

    @pytest.mark.parametrize("change", [{"view": 1}, {"epoch": 1}, {"seed": 2}, {"index": np.arange(1, 20001)}])
    def test_addresses_are_independent(self, change):
        first, second = (draws(Shear(), self.NUMBER, 1, **address)[:, 0, 0, 1] for address in ({}, change))
        assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(self.NUMBER)

    def test_coin_and_parameters_are_independent(self):
        both = draws(OneOf((Shear(1.0), Shear(0.5))), self.NUMBER, 1)[:, 0, 0, 1]
        # Shear(1) draws beyond 0.5 half of the time, Shear(0.5) never
        assert abs((np.abs(both) > 0.5).mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / self.NUMBER)


class TestMakeView:
    SPEC = ViewSpec(
        frames=16, crop=RandomCrop(0.1, 1.0, 4), transforms=(OneOf((JointCorruption(), Shear())),), normalise="center"
    )

    def test_pure(self, memory_dataset):
        dataset = memory_dataset(range(1, 40), bodies=2)
        all_of_them = make_view(dataset, self.SPEC, np.arange(39), 7, 3, 1)
        assert all_of_them.clips.shape == (39, 16, 2, 25, 3)
        assert all_of_them.clips.dtype == torch.float32
        for batch in ([5], [38, 0, 5], [5, 5, 17, 2]):
            view = make_view(dataset, self.SPEC, batch, 7, 3, 1)
            assert torch.equal(view.clips, all_of_them.clips[batch])
            assert torch.equal(view.mask, all_of_them.mask[batch])

    @pytest.mark.parametrize("change", [(8, 3, 1), (7, 4, 1), (7, 3, 2)])
    def test_another_address_is_another_view(self, change, memory_dataset):
        dataset = memory_dataset([30] * 8)
        first, second = (make_view(dataset, self.SPEC, np.arange(8), *address).clips for address in ((7, 3, 1), change))
        assert ((first != second).flatten(1).any(1)).all()

    def test_equals_its_steps(self, memory_dataset):
        dataset = memory_dataset([30, 50], bodies=2, absent_body=True)
        spec = ViewSpec("motion", None, 16, RandomCrop(0.2, 0.8, 5), (Shear(),), "center")
        view = make_view(dataset, spec, [1], 2, 0, 3)
        index = np.array([1])
        start, length = crop_bounds(spec.crop, np.array([50]), seed=2, index=index, epoch=0, view=3)
        clip = normalise(dataset.clip(1), "center", dataset.topology)
        crop = crop_resize(clip, int(start[0]), int(length[0]), 16)
        matrices = draw_matrices(spec.transforms, 25, 3, seed=2, index=index, epoch=0, view=3)
        expected = stream(apply_matrices(crop[None], matrices), "motion", dataset.topology)
        np.testing.assert_array_equal(view.clips.numpy(), expected)
        assert view.mask[:, :, 0].all()
        assert not view.mask[:, :, 1].any()
        assert (view.clips[:, :, 1] == 0).all()

    def test_mask_follows_frames(self, memory_dataset):
        dataset = memory_dataset([8], bodies=2)
        dataset.frames[4:, 1] = 0
        view = make_view(dataset, eval_view(8, normalise="center"), [0], 0, 0, 0)
        assert view.mask[0, :, 0].all()
        assert view.mask[0, :, 1].tolist() == [True] * 4 + [False] * 4
        assert (view.clips[0, 4:, 1] == 0).all()

    def test_mask_ignores_corruption(self, memory_dataset):
        dataset = memory_dataset([8])
        view = make_view(dataset, ViewSpec(frames=8, transforms=(JointCorruption(1.0, 1.0),)), [0], 0, 0, 0)
        assert (view.clips == 0).all()
        assert view.mask.all()

    def test_evaluation_draws_nothing(self, memory_dataset):
        dataset = memory_dataset([9, 70])
        views = [make_view(dataset, eval_view(12, "bone"), [0, 1], seed, seed, seed).clips for seed in (0, 9)]
        assert torch.equal(*views)

    @pytest.mark.parametrize(("name", "channels"), [("kinect-20-ucla", 3), ("coco-17", 2)])
    def test_other_skeletons(self, name, channels, memory_dataset):
        dataset = memory_dataset([9, 70], name, channels=channels)
        for spec in usdrl_views(5, "bone", 2, "none", 4):
            assert torch.isfinite(make_view(dataset, spec, [0, 1], 0, 0, 0).clips).all()

    def test_empty_selection(self, memory_dataset):
        assert make_view(memory_dataset([9]), self.SPEC, [], 0, 0, 0).clips.shape == (0, 16, 1, 25, 3)

    def test_usdrl_defaults(self):
        views = usdrl_views()
        assert len(views) == 4
        assert views[0].crop == RandomCrop(0.1, 1.0, 64)
        assert views[0].transforms == (OneOf((JointCorruption(0.6, 0.5), Shear(1.0))),)


class TestErrors:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: ViewSpec(frames=0), "ViewSpec: frames must be at least 1, got 0"),
            (lambda: ViewSpec(frames=8.5), "ViewSpec: frames must be a whole number, got 8.5"),
            (lambda: ViewSpec(frames="8"), "ViewSpec: frames must be a whole number, got '8'"),
            (lambda: RandomCrop(min_frames=8.5), "RandomCrop: min_frames must be a whole number, got 8.5"),
            (lambda: ViewSpec(stream="joints"), "stream must be one of joint, bone, motion, got 'joints'"),
            (lambda: ViewSpec(normalise="centre"), "normalise must be one of none, center"),
            (lambda: RandomCrop(0.5, 0.4), "low <= high <= 1, got 0.5, 0.4"),
            (lambda: RandomCrop(min_frames=0), "min_frames must be at least 1, got 0"),
            (lambda: CenterCrop(0.0), r"ratio must be in \(0, 1\], got 0.0"),
            (lambda: JointCorruption(1.5), r"fraction must be in \[0, 1\], got 1.5"),
            (lambda: Shear(float("nan")), "amplitude must be finite and at least 0, got nan"),
            (lambda: OneOf(()), "options must be a non-empty tuple"),
            (lambda: OneOf((OneOf((Shear(),)),)), "other than OneOf"),
        ],
    )
    def test_spec(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    def test_topology(self, memory_dataset):
        with pytest.raises(ValueError, match=r"in-memory, 'ntu-25', got 'coco-17'"):
            make_view(memory_dataset([9]), ViewSpec(topology="coco-17"), [0], 0, 0, 0)

    @pytest.mark.parametrize("index", [-1, 2])
    def test_index(self, index, memory_dataset):
        with pytest.raises(ValueError, match=rf"index must be in 0 .. 1, got {index} .. {index} for in-memory"):
            make_view(memory_dataset([9, 9]), ViewSpec(), [index], 0, 0, 0)

    @pytest.mark.parametrize("packed", ["center", "center-first", "align", "align-yaw"])
    @pytest.mark.parametrize("kind", ["align", "align-yaw"])
    def test_aligning_normalised_data(self, packed, kind, memory_dataset):
        dataset = memory_dataset([9])
        dataset.meta["normalisation"] = packed
        message = f"data packed as '{packed}', got '{kind}' for in-memory"
        with pytest.raises(ValueError, match=message):
            make_view(dataset, ViewSpec(normalise=kind), [0], 0, 0, 0)
        assert make_view(dataset, ViewSpec(normalise="center"), [0], 0, 0, 0).mask.all()

    def test_channels(self, memory_dataset):
        with pytest.raises(ValueError, match="must have 2 or 3 channels, got 4"):
            make_view(memory_dataset([9], channels=4), ViewSpec(transforms=(Shear(),)), [0], 0, 0, 0)

    def test_empty_clip(self, memory_dataset):
        with pytest.raises(ValueError, match=r"at least one frame, got none at clip 1 \(clip1\) of in-memory"):
            make_view(memory_dataset([9, 0, 3]), ViewSpec(), [0, 1], 0, 0, 0)
