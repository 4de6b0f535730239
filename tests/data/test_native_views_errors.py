"""What native views refuse: clips that are not there, descriptions that are none, and what does not fit the clips."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import numpy as np
import pytest

from fastskel import _native
from fastskel.data.distort import FrameMask, GaussianBlur, GaussianNoise, Mirror
from fastskel.data.program import view_program
from fastskel.data.transforms import JointCorruption, JointMask, OneOf, Rotation, Scaling, Shear
from fastskel.data.views import ViewSpec


@pytest.fixture(scope="module")
def dataset(memory_dataset):
    return memory_dataset((4, 4), bodies=2)


def program_of(dataset, **changes):
    return view_program(ViewSpec(), dataset) | changes


def make(dataset, program, index=(0,), dtype="float32"):
    clips = _native.Clips.borrow(dataset.frames, dataset.offsets)
    return _native.ViewMakers(clips, [program], seed=0, dtype=dtype).make(0, np.asarray(index, np.int64))


@pytest.mark.parametrize("number", [-1, 2, 2**40])
def test_clips_that_are_not_there(dataset, number):
    program = program_of(dataset)
    with pytest.raises(RuntimeError, match="clip") as caught:
        make(dataset, program, [0, number])
    assert getattr(caught.value, "clip", number) in (number, -1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 0}, "frames must be"),
        ({"frames": 2**31}, "frames must be"),
        ({"frames": 10**30}, "frames must be a whole number"),
        ({"frames": 64.0}, "frames must be a whole number"),
        ({"frames": True}, "frames must be a whole number"),
        ({"crop": ("random", 5, 4, 1)}, "crop must be shares"),
        ({"crop": ("random", 0, 2**24 + 1, 1)}, "crop must be shares"),
        ({"crop": ("random", 0, 1, 0)}, "min_frames must be at least 1"),
        ({"crop": ("random", 0, 1)}, "crop must be"),
        ({"crop": ("center", 0)}, "crop must be a share"),
        ({"crop": ()}, "crop must be"),
        ({"normalise": "align-yaw"}, "normalise must be one of none, center, center-first, align"),
        ({"normalise": 3}, "normalise must be a string"),
        ({"centre_joint": -1}, "centre_joint must be at least 0"),
        ({"stream": "bones"}, "stream must be one of"),
        ({"alignment": np.zeros((2, 4, 3), np.float32)}, "alignment must be"),
        ({"alignment": np.zeros((2, 3, 4))}, "alignment must be"),
        ({"transforms": None}, "transforms must be a list"),
        ({"transforms": [3]}, "transforms must be a list of dicts"),
        ({"transforms": [{}]}, "kind must be there"),
        ({"transforms": [{"kind": "warp"}]}, "kind must be one of"),
        ({"transforms": [{"kind": "shear", "amplitude": 1.0}] * 257}, "transforms must be at most 256"),
        ({"transforms": [{"kind": "shear", "amplitude": float("nan")}]}, "amplitude must be a finite"),
        ({"transforms": [{"kind": "shear", "amplitude": 1e39}]}, "amplitude must be a finite"),
        ({"transforms": [{"kind": "shear", "amplitude": "1"}]}, "amplitude must be a finite"),
        ({"transforms": [{"kind": "noise", "std": 1.0, "probability": 1.5}]}, "probability must be in"),
        ({"transforms": [{"kind": "joint-mask", "count": 65, "probability": 1.0}]}, "count must be at most 64"),
        ({"transforms": [{"kind": "joint-mask", "count": -1, "probability": 1.0}]}, "count must be at least 0"),
        ({"transforms": [{"kind": "rotation", "angles": (1.0,), "probability": 1.0}]}, "angles must be three"),
        ({"transforms": [{"kind": "one-of", "options": []}]}, "options must be 1 to 256"),
        ({"transforms": [{"kind": "one-of", "options": [{"kind": "one-of"}]}]}, "options must be transforms other"),
        ({"transforms": [{"kind": "one-of", "options": [{"kind": "body-mask", "probability": 1}]}]}, "linear"),
        ({"transforms": [{"kind": "mirror", "joints": [-1], "reflect": True, "probability": 1}]}, "joints must be"),
    ],
)
def test_descriptions(dataset, changes, message):
    with pytest.raises(ValueError, match=message):
        make(dataset, program_of(dataset, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalise": "center", "centre_joint": 25}, "centre_joint must be below 25"),
        ({"normalise": "align"}, "alignment must be"),
        ({"normalise": "align", "alignment": np.zeros((3, 4, 3))}, "alignment must be"),
        ({"stream": "bone"}, "parents must be one joint for each of 25"),
        ({"stream": "bone", "parents": (25,) * 25}, "parents must be joints below 25"),
        ({"transforms": [{"kind": "joint-mask", "count": 26, "probability": 1.0}]}, "count must be at most the 25"),
        ({"transforms": [{"kind": "frame-mask", "count": 65, "probability": 1.0}]}, "count must be at most the 64"),
        (
            {"transforms": [{"kind": "mirror", "joints": [0] * 24, "reflect": True, "probability": 1.0}]},
            "joints of the mirror must be",
        ),
        (
            {"frames": 2**24 // 150 + 1, "transforms": [{"kind": "noise", "std": 1.0, "probability": 1.0}]},
            r"T M V C must be below 2\*\*24",
        ),
        (
            {"frames": 65537, "transforms": [{"kind": "frame-mask", "count": 1, "probability": 1.0}]},
            "frames must be at most 65536",
        ),
    ],
)
def test_what_does_not_fit_the_clips(dataset, changes, message):
    with pytest.raises(RuntimeError, match=message):
        make(dataset, program_of(dataset, **changes))


def test_size_of_a_view(dataset):
    program = program_of(dataset, frames=2**30)
    with pytest.raises(RuntimeError, match=r"T M V C must be at most 2\*\*40"):
        make(replace(dataset, frames=np.zeros((8, 8, 25, 6), np.float32)), program)


@pytest.mark.parametrize("channels", [1, 4])
def test_linear_transforms_need_two_or_three_channels(memory_dataset, channels):
    dataset = memory_dataset((4,), bodies=2, channels=channels)
    program = program_of(dataset, transforms=[{"kind": "shear", "amplitude": 1.0}])
    with pytest.raises(RuntimeError, match="channels must be 2 or 3"):
        make(dataset, program)


@pytest.mark.parametrize("taps", [0, 2, 2**40 + 1, -3])
def test_taps(dataset, taps):
    blur = {"kind": "blur", "low": 0.1, "high": 2.0, "taps": taps, "probability": 1.0}
    with pytest.raises(ValueError, match="taps must be odd|count must be at least 0"):
        make(dataset, program_of(dataset, transforms=[blur | {"normalise": True, "padding": "edge"}]))


def test_arguments(dataset):
    program = program_of(dataset)
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16"):
        make(dataset, program, dtype="float64")
    clips = _native.Clips.borrow(dataset.frames, dataset.offsets)
    with pytest.raises(ValueError, match="index must be contiguous int64"):
        _native.ViewMakers(clips, [program], seed=0, dtype="float32").make(0, np.arange(2, dtype=np.int32))
    with pytest.raises(ValueError, match="views must be one number per program"):
        _native.ViewMakers(clips, [program], seed=0, dtype="float32", views=[0, 1])
    with pytest.raises(RuntimeError, match="view must be below"):
        _native.ViewMakers(clips, [program], seed=0, dtype="float32", views=[2**16])
    with pytest.raises(ValueError, match="name must be avx512, avx2 or baseline"):
        _native.set_instructions("sse")


def test_any_description_is_refused_or_made(memory_dataset):
    dataset = memory_dataset((4, 9), bodies=2)
    usdrl = OneOf((JointCorruption(0.6), Shear(1.0)))
    transforms = (usdrl, Rotation(), Scaling(), JointMask(), Mirror(), GaussianNoise(), GaussianBlur(), FrameMask())
    whole = view_program(ViewSpec(frames=8, stream="bone", normalise="align", transforms=transforms), dataset)
    strange = [
        None, True, -1, 0, 1, 63, 64, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e39, float("nan"), float("inf"), "",
        "edge", "joint", (), [], {}, (0,) * 25, [25] * 25, np.zeros((2, 4, 3)), np.float32(2), np.int8(-3), object(),
    ]  # fmt: skip
    generator = random.Random(0)
    made, refusals = 0, []
    for _ in range(1500):
        program = copy.deepcopy(whole)
        place = generator.choice([program, *program["transforms"], *program["transforms"][0]["options"]])
        key = generator.choice(sorted(place))
        if generator.random() < 0.1:
            del place[key]
        else:
            place[key] = generator.choice(strange)
        # what is allowed but would fill the memory
        if isinstance(program.get("frames"), int) and program["frames"] > 2**16:
            continue
        try:
            make(dataset, program, [0, 1])
            made += 1
        except (ValueError, RuntimeError) as error:
            refusals.append(str(error))
    assert all(" must be " in message for message in refusals), refusals
    assert made > 100
    assert len(refusals) > 100
