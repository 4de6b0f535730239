"""Skeleton layouts: consistent, as published, and their streams."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastskel.skeleton import AXES, PARTS, TOPOLOGIES, stream, topology

# 1-based (joint, parent) pairs of the USDRL feeders
USDRL_NTU = [(1, 2), (2, 21), (3, 21), (4, 3), (5, 21), (6, 5), (7, 6), (8, 7), (9, 21), (10, 9), (11, 10), (12, 11)]
USDRL_NTU += [(13, 1), (14, 13), (15, 14), (16, 15), (17, 1), (18, 17), (19, 18), (20, 19), (21, 21), (22, 23), (23, 8)]
USDRL_NTU += [(24, 25), (25, 12)]
USDRL_COCO = [(1, 2), (2, 4), (3, 5), (4, 6), (5, 7), (7, 9), (8, 10), (9, 11), (10, 8), (11, 9), (12, 14), (13, 15)]
USDRL_COCO += [(14, 16), (15, 17), (16, 14), (17, 15)]
SIZES = {"ntu-25": 25, "kinect-20-ucla": 20, "kinect-20-utd": 20, "coco-17": 17, "openpose-18": 18, "sbu-15": 15, "penn-13": 13}


@pytest.mark.parametrize("name", sorted(SIZES))
def test_layout_is_consistent(name):
    layout = topology(name)
    assert layout.num_joints == SIZES[name]
    assert sorted(joint for part in layout.parts.values() for joint in part) == list(range(layout.num_joints))
    assert set(layout.parts) == set(PARTS) and set(layout.axes) == set(AXES)
    for number, joint in enumerate(layout.joints):
        other = layout.joints[layout.mirror[number]]
        swapped = joint.replace("left_", "?").replace("right_", "left_").replace("?", "right_")
        assert other == swapped
    for part in ("left_arm", "left_leg"):
        mirrored = {layout.mirror[joint] for joint in layout.parts[part]}
        assert mirrored == set(layout.parts[part.replace("left", "right")])


@pytest.mark.parametrize(
    ("name", "variant"), [(n, v) for n in sorted(SIZES) for v in topology(n).bones if v != "usdrl"]
)
def test_bones_are_a_tree(name, variant):
    layout = topology(name)
    parents = layout.parents(variant)
    roots = [joint for joint, parent in enumerate(parents) if joint == parent]
    assert len(roots) == 1 and len(layout.edges(variant)) == layout.num_joints - 1
    for joint in range(layout.num_joints):
        for _ in range(layout.num_joints):
            joint = parents[joint]
        assert joint == roots[0]


@pytest.mark.parametrize(("name", "variant", "pairs"), [("ntu-25", None, USDRL_NTU), ("coco-17", "usdrl", USDRL_COCO)])
def test_bones_are_those_of_usdrl(name, variant, pairs):
    layout = topology(name)
    expected = list(range(layout.num_joints))
    for child, parent in pairs:
        expected[child - 1] = parent - 1
    assert layout.parents(variant) == tuple(expected)


def test_the_two_kinect_orders_hold_the_same_joints():
    ucla, utd = topology("kinect-20-ucla"), topology("kinect-20-utd")
    order = [utd.joints.index(joint) for joint in ucla.joints]
    clips = np.random.default_rng(0).normal(size=(5, 1, 20, 3))
    for variant in ucla.bones:
        bones = stream(clips, "bone", utd, variant)[..., order, :]
        np.testing.assert_array_equal(bones, stream(clips[..., order, :], "bone", ucla, variant))


@pytest.mark.parametrize("kind", ["joint", "bone", "motion"])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_stream_is_its_formula(kind, lead, frames):
    layout = topology("ntu-25")
    clips = np.random.default_rng(0).normal(size=(*lead, frames, 2, 25, 3)).astype(np.float32)
    expected = np.zeros_like(clips)
    if kind == "joint":
        expected = clips
    elif kind == "bone":
        for child, parent in USDRL_NTU:
            expected[..., child - 1, :] = clips[..., child - 1, :] - clips[..., parent - 1, :]
    else:
        expected[..., :-1, :, :, :] = clips[..., 1:, :, :, :] - clips[..., :-1, :, :, :]
    np.testing.assert_array_equal(stream(clips, kind, layout), expected)
    tensor = stream(torch.from_numpy(clips), kind, layout)
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.numpy(), expected)


def test_streams_differentiate():
    clips = torch.randn(4, 1, 15, 2, dtype=torch.float64, requires_grad=True)
    for kind in ("bone", "motion"):
        assert torch.autograd.gradcheck(lambda x, kind=kind: stream(x, kind, topology("sbu-15")), clips)


def test_layouts_pickle_and_copy():
    layout = topology("openpose-18")
    assert pickle.loads(pickle.dumps(layout)) == layout == copy.deepcopy(layout)
    with pytest.raises(TypeError):
        layout.bones["mine"] = ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"centre": 15}, "centre must be a joint"),
        ({"mirror": (1, 2, 0, *range(3, 15))}, "mirror must be a permutation"),
        ({"joints": ("head",) * 15}, "joints must be at least one distinct"),
        ({"parts": {"head": (0,)}}, "parts must be"),
        ({"bones": {}}, "bones must be at least one"),
        ({"bones": {"mine": (0, 1)}}, "15 parents"),
        ({"axes": {"nose": (0,)}}, "must be joints of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_layout_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(topology("sbu-15"), **change)


def test_misspelt_names_are_answered():
    layout = topology("ntu-25")
    with pytest.raises(ValueError, match="ntu-25"):
        topology("ntu25")
    with pytest.raises(ValueError, match="bone variant must be one of agcn, kinect"):
        layout.parents("plain")
    with pytest.raises(ValueError, match="kind must be one of joint, bone, motion"):
        stream(np.zeros((1, 1, 25, 3)), "velocity", layout)
    with pytest.raises(ValueError, match=r"clips must be \(..., T, M, 25, C\)"):
        stream(np.zeros((1, 1, 17, 3)), "bone", layout)
    with pytest.raises(ValueError, match="joint must be one of"):
        layout.joint("nose")
    assert layout.joint("head") == 3 and "ntu-25" in TOPOLOGIES
