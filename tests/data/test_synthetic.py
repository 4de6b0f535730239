"""Synthetic motion: deterministic, plausible, neither trivial nor impossible."""

from __future__ import annotations

import numpy as np
import pytest

from fastskel.data.figure import ACTIONS
from fastskel.data.resize import crop_resize
from fastskel.data.synthetic import make_synthetic, synthetic_motion
from fastskel.skeleton import topology


@pytest.fixture(scope="module")
def motion():
    return synthetic_motion(400, seed=1)


def test_shapes(motion):
    assert len(motion.clips) == len(motion.labels) == 400
    lengths = np.array([len(clip) for clip in motion.clips])
    assert lengths.min() >= 40
    assert lengths.max() <= 120
    assert all(clip.shape[1:] == (1, 25, 3) and clip.dtype == np.float32 for clip in motion.clips)
    assert np.isfinite(np.concatenate(motion.clips)).all()
    assert set(np.bincount(motion.labels).tolist()) == {50}
    assert motion.class_names == tuple(ACTIONS)[:8]


def test_splits_partition(motion):
    for parts in motion.splits.values():
        assert sorted(np.concatenate([parts["train"], parts["test"]]).tolist()) == list(range(400))
    subject = motion.columns["subject"]
    train, test = (set(subject[motion.splits["xsub"][part]].tolist()) for part in ("train", "test"))
    assert not train & test
    assert set(motion.columns["camera"].tolist()) == {0, 1, 2}


def test_deterministic(motion):
    again = synthetic_motion(400, seed=1)
    for first, second in zip(motion.clips, again.clips, strict=True):
        np.testing.assert_array_equal(first, second)
    # a clip's draws are addressed by its number: a smaller set is a prefix
    few = synthetic_motion(16, seed=1)
    np.testing.assert_allclose(few.clips[7], motion.clips[7], atol=1e-6)
    other = synthetic_motion(16, seed=2)
    assert any(len(a) != len(b) for a, b in zip(few.clips, other.clips, strict=True))


@pytest.mark.parametrize("num_classes", [len(ACTIONS)])
def test_plausible(num_classes):
    motion = synthetic_motion(240, num_classes=num_classes, seed=3, noise=0)
    parents = np.array(topology("ntu-25").bones[next(iter(topology("ntu-25").bones))])
    for clip in motion.clips:
        lengths = np.linalg.norm(clip[:, 0] - clip[:, 0][:, parents], axis=-1)
        # positions are within 6 m of the camera: a few roundings of 6 * 2^-24 along the chain
        assert np.ptp(lengths, axis=0).max() < 1e-5
        assert 1.0 < np.ptp(clip[0, 0], axis=0).max() < 2.4
        steps = np.linalg.norm(np.diff(clip[:, 0], axis=0), axis=-1)
        # no joint jumps: 30 frames a second, hands below 12 m/s
        assert steps.max() < 0.4
        assert (clip[..., 2] > 0.5).all()


def test_noise(motion):
    clean = synthetic_motion(400, seed=1, noise=0)
    difference = np.concatenate(motion.clips) - np.concatenate(clean.clips)
    assert abs(difference.std() - 0.012) < 1e-4
    assert abs(difference.mean()) < 1e-4
    assert abs((difference**4).mean() / difference.var() ** 2 - 3) < 0.02


def test_second_body_is_absent():
    assert all((clip[:, 1] == 0).all() and clip.shape[1] == 2 for clip in synthetic_motion(8, bodies=2).clips)


def test_difficulty():
    motion = synthetic_motion(1000)
    features = np.stack([crop_resize(clip - clip[:, :, :1], 0, len(clip), 64).ravel() for clip in motion.clips])
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    train, test = (motion.splits["xsub"][part] for part in ("train", "test"))
    nearest = train[(features[test] @ features[train].T).argmax(1)]
    accuracy = (motion.labels[nearest] == motion.labels[test]).mean()
    # raw coordinates must leave something to learn, and chance is 1/8
    assert 0.55 < accuracy < 0.78


def test_packs(tmp_path):
    dataset = make_synthetic(tmp_path / "synthetic", num_clips=24, seed=5)
    motion = synthetic_motion(24, seed=5)
    assert len(dataset) == 24
    assert dataset.topology.name == "ntu-25"
    assert dataset.class_names == list(motion.class_names)
    assert dataset.labels.tolist() == motion.labels.tolist()
    for number, clip in enumerate(motion.clips):
        np.testing.assert_array_equal(dataset.clip(number), clip)
    for name, column in motion.columns.items():
        np.testing.assert_array_equal(dataset.columns[name], column)
    assert dataset.splits["xsub"]["test"].tolist() == motion.splits["xsub"]["test"].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clips": 0}, "num_clips must be in 1"),
        ({"num_clips": 8, "num_classes": 99}, "num_classes must be in 2"),
        ({"num_clips": 8, "num_subjects": 1}, "num_subjects must be in 2"),
        ({"num_clips": 8, "bodies": 0}, "bodies must be in 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthetic_motion(**arguments)


def test_other_topology(tmp_path):
    with pytest.raises(ValueError, match="topology must be 'ntu-25', got 'coco-17'"):
        make_synthetic(tmp_path / "synthetic", topology="coco-17")


def test_lost_joints_are_zero_in_a_whole_clip_and_the_rest_is_unchanged():
    whole = synthetic_motion(60, seed=3)
    partial = synthetic_motion(60, seed=3, max_lost=8)
    counts = []
    for full, clip in zip(whole.clips, partial.clips):
        lost = ~clip.any((0, 1, 3))
        counts.append(int(lost.sum()))
        assert not lost[topology("ntu-25").centre]
        np.testing.assert_array_equal(clip[:, :, ~lost], full[:, :, ~lost])
        assert not clip[:, :, lost].any()
    # uniform over 0 .. 8: both ends and the middle occur among sixty clips
    assert min(counts) == 0 and max(counts) == 8 and 2.5 < np.mean(counts) < 5.5
    with pytest.raises(ValueError, match=r"max_lost must be in 0 .. 24, got 25"):
        synthetic_motion(4, max_lost=25)
