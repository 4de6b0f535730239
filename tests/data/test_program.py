"""What native code is told of a view: complete, plain, and refused where only Python knows a transform."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest

from fastskel.data.distort import BodyMask, FrameMask, GaussianBlur, GaussianNoise, Mirror
from fastskel.data.normalise import normalise
from fastskel.data.program import alignment, view_program, view_programs
from fastskel.data.transforms import (
    TRANSFORMS,
    ClipTransform,
    JointCorruption,
    JointMask,
    OneOf,
    Rotation,
    Scaling,
    Shear,
    SpatialTransform,
)
from fastskel.data.views import CenterCrop, RandomCrop, ViewSpec, make_view
from fastskel.skeleton import topology

TENTH, HALF, ONE = float(np.float32(0.1)), 0.5, 1.0

# every transform and its description for 25 joints and 10 frames
KNOWN = [
    (JointCorruption(0.6, 0.1), {"kind": "joint-corruption", "count": 15, "zero_probability": TENTH}),
    (Shear(0.1), {"kind": "shear", "amplitude": TENTH}),
    (Rotation(0.1, 1), {"kind": "rotation", "angles": (TENTH,) * 3, "probability": ONE}),
    (Rotation((1, 0.1, 0)), {"kind": "rotation", "angles": (ONE, TENTH, 0.0), "probability": ONE}),
    (Scaling(0.1, 1), {"kind": "scaling", "low": TENTH, "high": ONE, "per_axis": False, "probability": ONE}),
    (JointMask(0.1, 0.1), {"kind": "joint-mask", "count": 3, "probability": TENTH}),
    (
        OneOf((Shear(0.5), JointMask(1.0))),
        {
            "kind": "one-of",
            "options": [
                {"kind": "shear", "amplitude": HALF},
                {"kind": "joint-mask", "count": 25, "probability": ONE},
            ],
        },
    ),
    (Mirror(0.1), {"kind": "mirror", "joints": topology("ntu-25").mirror, "reflect": True, "probability": TENTH}),
    (GaussianNoise(0.1, 1), {"kind": "noise", "std": TENTH, "probability": ONE}),
    (
        GaussianBlur(0.1, 1, 7, 0.5, False, "zero"),
        {
            "kind": "blur", "low": TENTH, "high": ONE, "taps": 7, "probability": HALF, "normalise": False, "padding": "zero"
        },
    ),
    (FrameMask(0.25, 0.5), {"kind": "frame-mask", "count": 3, "probability": HALF}),
    (BodyMask(0.1), {"kind": "body-mask", "probability": TENTH}),
]


def plain(value):
    """Whether a value is made of plain Python types alone, so that native code need not know NumPy's scalars."""
    if type(value) in (dict, list, tuple):
        return all(plain(entry) for entry in (value.values() if type(value) is dict else value))
    return value is None or type(value) in (int, float, bool, str)


@pytest.mark.parametrize(("transform", "expected"), KNOWN, ids=lambda value: getattr(value, "__class__", value).__name__)
def test_transforms(transform, expected, memory_dataset):
    spec = ViewSpec(frames=np.int64(10), transforms=(transform, transform))
    found = view_program(spec, memory_dataset([9]))["transforms"]
    assert found == [expected, expected]
    assert plain(found)
    # 1 == 1.0 == True in a comparison, not in C++
    kinds = [{key: type(value) for key, value in entry.items()} for entry in (found[0], expected)]
    assert kinds[0] == kinds[1]


def test_every_registered_transform_is_known():
    assert {described["kind"] for _, described in KNOWN} == set(TRANSFORMS)
    assert all(type(transform) is TRANSFORMS[described["kind"]] for transform, described in KNOWN)


def test_a_whole_program(memory_dataset):
    dataset = memory_dataset([9, 20], "kinect-20-ucla", 2)
    spec = ViewSpec("bone", "hip", 10, RandomCrop(0.1, 0.5, 4), (Shear(),), "center-first")
    parents = dataset.topology.parents("hip")
    program = view_program(spec, dataset)
    assert program == {
        "frames": 10,
        "crop": ("random", 1677722, 8388608, 4),
        "normalise": "center-first",
        "centre_joint": 0,
        "alignment": None,
        "transforms": [{"kind": "shear", "amplitude": 1.0}],
        "stream": "bone",
        "parents": parents,
    }
    assert plain(program) and json.dumps(program)
    other = view_program(ViewSpec("motion", crop=CenterCrop(0.3)), dataset)
    assert other["crop"] == ("center", 5033165) and other["normalise"] == "none" and other["parents"] is None
    assert other["stream"] == "motion" and other["frames"] == 64 and other["transforms"] == []


@pytest.mark.parametrize("kind", ["align", "align-yaw"])
def test_alignment_turns_as_the_view_does(kind, memory_dataset):
    dataset = memory_dataset([4, 5, 3, 6], bodies=2)
    dataset.frames[0, 0, 4] = 0
    dataset.frames[4:9:2, 0, 0] = 0
    dataset.frames[5:9:2, 0, 20] = 0
    dataset.frames[10, 1, 7] = 0
    dataset.frames[12, 0, 0, 1] = np.nan
    program = view_program(ViewSpec(normalise=kind), dataset)
    table = program["alignment"]
    assert program["normalise"] == "align" and table.shape == (4, 4, 3) and table.dtype == np.float64
    assert np.isnan(table).all(axis=(1, 2)).tolist() == [False, True, False, False]
    np.testing.assert_array_equal(table, alignment(dataset, kind))
    for number in (0, 2, 3):
        clip, (origin, *rotation) = dataset.clip(number), table[number]
        found = normalise(clip, kind, dataset.topology)
        # the first frame is not complete: a joint is absent in one clip, not a number in the other
        np.testing.assert_array_equal(origin, clip[{0: 1, 2: 0, 3: 1}[number], 0, 0].astype(np.float64))
        for place in np.ndindex(clip.shape[:3]):
            d = [float(clip[place][channel]) - float(origin[channel]) for channel in range(3)]
            if not np.isfinite(d).all():
                continue
            for channel, row in enumerate(rotation):
                turned = (d[0] * row[0] + d[1] * row[1]) + d[2] * row[2]
                expected = np.float32(turned * (1.0 if clip[place].any() else 0.0))
                assert found[(*place, channel)].tobytes() == expected.tobytes()


def test_views_that_align_share_a_table(memory_dataset):
    dataset = memory_dataset([9, 8])
    specs = [ViewSpec(normalise=kind) for kind in ("align", "none", "align-yaw", "align")]
    first, none, yaw, last = (program["alignment"] for program in view_programs(specs, dataset))
    assert first is last and none is None
    np.testing.assert_array_equal(first, view_program(specs[0], dataset)["alignment"])
    assert not np.array_equal(first, yaw)


@dataclass(frozen=True)
class Flatten(SpatialTransform):
    def matrices(self, spatial, joints, num_joints, num_channels):
        return np.zeros((len(spatial), num_joints, num_channels, num_channels), np.float32)


@dataclass(frozen=True)
class HalfShear(Shear):
    def matrices(self, spatial, joints, num_joints, num_channels):
        return super().matrices(spatial, joints, num_joints, num_channels) / np.float32(2)


@dataclass(frozen=True)
class Reverse(ClipTransform):
    def apply(self, clips, address, number, topology):
        return clips[:, ::-1].copy()


@pytest.mark.parametrize("transform", [Flatten(), HalfShear(), OneOf((Shear(), Flatten())), Reverse()], ids=repr)
def test_ones_own_are_refused_by_name_and_made_in_python(transform, memory_dataset):
    dataset, name = memory_dataset([9]), "Flatten" if isinstance(transform, OneOf) else type(transform).__name__
    spec = ViewSpec(transforms=(Shear(), transform))
    with pytest.raises(ValueError, match=rf'those of fastskel, got {name}, .* Use Loader\(engine="numpy"\)'):
        view_program(spec, dataset)
    assert make_view(dataset, spec, [0], 0, 0, 0).clips.shape == (1, 64, 1, 25, 3)


def test_what_cannot_be_made_is_refused(memory_dataset):
    dataset = memory_dataset([9])
    with pytest.raises(ValueError, match="'ntu-25', got 'coco-17'"):
        view_program(ViewSpec(topology="coco-17"), dataset)
    with pytest.raises(ValueError, match="bone variant must be one of agcn, kinect, got 'other'"):
        view_program(ViewSpec("bone", "other"), dataset)
    with pytest.raises(ValueError, match="kind must be align or align-yaw, got 'center'"):
        alignment(dataset, "center")
    with pytest.raises(ValueError, match=r"align_body: clip must be \(T, M, V, 3\)"):
        view_program(ViewSpec(normalise="align"), memory_dataset([9], channels=2))
    bare = replace(dataset.topology, axes={})
    with pytest.raises(ValueError, match="must name all body axes"):
        view_program(ViewSpec(normalise="align"), replace(dataset, topology=bare))
