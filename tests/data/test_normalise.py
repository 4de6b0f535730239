"""Normalisations: the recorded AGCN results, and the properties the simple ones promise."""

import numpy as np
import pytest

from fastskel import data
from fastskel.data.normalise import NORMALISATIONS, align_body, body_frame, center, normalise, prenorm
from fastskel.skeleton import TOPOLOGIES, topology

# coordinates of a few metres in float32, a handful of operations each
TOLERANCE = 5e-6


@pytest.mark.parametrize(
    ("key", "zaxis", "xaxis"),
    [("uav_default_z11_5", (11, 5), ()), ("ntu_z0_1_x8_4", (0, 1), (8, 4))],
    ids=["uav", "ntu"],
)
def test_prenorm_equals_the_reference(golden, key, zaxis, xaxis):
    archive = golden("prenorm.npz")
    clips = archive["x"].transpose(0, 2, 4, 3, 1)
    expected = archive[key].transpose(0, 2, 4, 3, 1)
    before = clips.copy()
    np.testing.assert_allclose(prenorm(clips, zaxis=zaxis, xaxis=xaxis), expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(clips, before)


def test_prenorm_fills_empty_frames():
    clips = np.zeros((1, 8, 2, 25, 3), dtype=np.float32)
    clips[0, 2:5, 0] = np.random.default_rng(0).normal(size=(3, 25, 3))
    result = prenorm(clips, zaxis=(), xaxis=())
    shown = clips[0, 2:5, 0] - clips[0, 2:5, 0, 1:2]
    np.testing.assert_allclose(result[0, :, 0], shown[np.arange(8) % 3], rtol=0, atol=1e-6)
    assert not result[0, :, 1].any()


def test_prenorm_refuses():
    with pytest.raises(ValueError, match=r"\(N, T, M, V, 3\)"):
        prenorm(np.zeros((2, 3, 4, 5), dtype=np.float32))
    with pytest.raises(ValueError, match=r"joints of range\(17\)"):
        prenorm(np.zeros((1, 3, 1, 17, 3), dtype=np.float32), center_joint=20)
    with pytest.raises(ValueError, match="two or none per axis"):
        prenorm(np.zeros((1, 3, 1, 17, 3), dtype=np.float32), zaxis=(0,))


def person(frames=6, bodies=2, name="ntu-25", seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(frames, bodies, topology(name).num_joints, 3)).astype(np.float32) + 3


def test_center_moves_the_centre_joint_to_the_origin():
    clip, layout = person(), topology("ntu-25")
    per_frame = center(clip, layout)
    np.testing.assert_array_equal(per_frame[:, 0, layout.centre], 0)
    np.testing.assert_allclose(per_frame[:, 1] - per_frame[:, 0], clip[:, 1] - clip[:, 0], atol=TOLERANCE)
    first = center(clip, layout, per_frame=False)
    np.testing.assert_array_equal(first[0, 0, layout.centre], 0)
    np.testing.assert_allclose(np.diff(first, axis=0), np.diff(clip, axis=0), atol=TOLERANCE)


def test_a_missing_centre_is_held():
    clip, layout = person(), topology("ntu-25")
    clip[[0, 3], 0, layout.centre] = 0
    centred = center(clip, layout)
    # frame 0 takes frame 1's centre, frame 3 that of frame 2
    np.testing.assert_array_equal(centred[0, 0, 0], clip[0, 0, 0] - clip[1, 0, layout.centre])
    np.testing.assert_array_equal(centred[3, 1, 5], clip[3, 1, 5] - clip[2, 0, layout.centre])


@pytest.mark.parametrize("name", list(TOPOLOGIES))
@pytest.mark.parametrize("upright", [True, False])
def test_align_drops_the_camera(name, upright):
    clip, layout = person(name=name), topology(name)
    angle, tilt = 0.7, 0.4 if upright else 0.0
    yaw = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    pitch = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    other = (clip @ (pitch @ yaw).T + [1, -2, 4]).astype(np.float32)
    aligned = align_body(clip, layout, upright=upright)
    np.testing.assert_allclose(align_body(other, layout, upright=upright), aligned, atol=1e-4)
    body = aligned[0, 0].astype(np.float64)
    point = {axis: body[list(joints)].mean(axis=0) for axis, joints in layout.axes.items()}
    side = point["right_hip"] - point["left_hip"] + point["right_shoulder"] - point["left_shoulder"]
    np.testing.assert_allclose(point["pelvis"], 0, atol=1e-5)
    assert side[0] > 0 and abs(side[2]) < 1e-4
    if upright:
        np.testing.assert_allclose(point["neck"][[0, 2]], 0, atol=1e-5)
        assert point["neck"][1] > 0
    distances = np.linalg.norm(aligned[1:, 1] - aligned[:-1, 0], axis=-1)
    np.testing.assert_allclose(distances, np.linalg.norm(clip[1:, 1] - clip[:-1, 0], axis=-1), rtol=1e-4)


@pytest.mark.parametrize("kind", NORMALISATIONS)
def test_absent_joints_stay_zero(kind):
    clip, layout = person(), topology("ntu-25")
    clip[2, 0, 7] = 0
    clip[3:, 1] = 0
    clip[0, 0] = 0
    absent = ~clip.any(axis=-1)
    result = normalise(clip, kind, layout)
    assert result.shape == clip.shape and result.dtype == np.float32
    assert not result[absent].any() and np.isfinite(result).all()


@pytest.mark.parametrize("kind", NORMALISATIONS)
def test_odd_clips_survive(kind):
    layout = topology("ntu-25")
    one_frame = normalise(person(frames=1, bodies=1), kind, layout)
    assert np.isfinite(one_frame).all()
    collapsed = normalise(np.ones((2, 1, 25, 3), dtype=np.float32), kind, layout)
    assert np.isfinite(collapsed).all()
    assert not normalise(np.zeros((2, 1, 25, 3), dtype=np.float32), kind, layout).any()


@pytest.mark.parametrize("upright", [True, False])
def test_a_clip_that_never_shows_its_axes_is_moved_alone(upright):
    clip, layout = person(), topology("ntu-25")
    clip[::2, 0, layout.axes["left_hip"][0]] = 0
    clip[1::2, 0, layout.axes["neck"][0]] = 0
    moved = center(clip, layout, per_frame=False)
    np.testing.assert_array_equal(align_body(clip, layout, upright=upright), moved)


def test_a_frame_with_numbers_that_are_none_says_nothing_about_the_axes():
    clip, layout = person(), topology("ntu-25")
    clip[0, 0, layout.axes["neck"][0], 1] = np.nan
    expected = body_frame(clip[1:], layout)
    np.testing.assert_array_equal(body_frame(clip, layout), expected)
    assert np.isfinite(expected).all()
    assert np.isfinite(align_body(clip, layout)[1:]).all()
    clip[:, 0, layout.axes["neck"][0], 1] = np.nan
    assert np.isnan(body_frame(clip, layout)).all() and body_frame(clip, layout).shape == (4, 3)
    np.testing.assert_array_equal(align_body(clip, layout), center(clip, layout, per_frame=False))


@pytest.mark.parametrize("upright", [True, False])
def test_align_is_the_turn_of_its_frame(upright):
    clip, layout = person(), topology("ntu-25")
    clip[0, 0, layout.axes["left_hip"][0]] = 0
    clip[2, 1, 5] = 0
    origin, *rotation = body_frame(clip, layout, upright=upright)
    np.testing.assert_array_equal(origin, clip[1, 0, layout.axes["pelvis"][0]])
    np.testing.assert_allclose(np.array(rotation) @ np.array(rotation).T, np.eye(3), atol=1e-12)
    moved = clip.astype(np.float64) - origin
    turned = [(moved[..., 0] * row[0] + moved[..., 1] * row[1]) + moved[..., 2] * row[2] for row in rotation]
    expected = (np.stack(turned, axis=-1) * clip.any(axis=-1, keepdims=True)).astype(np.float32)
    assert align_body(clip, layout, upright=upright).tobytes() == expected.tobytes()


def test_the_package_offers_them():
    assert "prenorm" in data.__all__
    assert data.prenorm is prenorm


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="kind must be one of none, center"):
        normalise(person(), "centre", topology("ntu-25"))
    with pytest.raises(ValueError, match=r"clip must be \(T, M, 20, C\)"):
        normalise(person(), "center", topology("kinect-20-utd"))
    with pytest.raises(ValueError, match=r"\(T, M, V, 3\)"):
        align_body(person()[..., :2], topology("ntu-25"))
