"""The skeleton layout of a hierarchy that brings nothing but names, and rotations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from fastskel.data.formats.format import FORMATS
from fastskel.data.formats.kinematics import rotation_product
from fastskel.data.formats.motion_capture import hierarchy_topology, word_lines
from fastskel.data.pack import pack_source

# the bones of the CMU database, and the joints of its conversions to Biovision files
CMU = {
    "root": "root", "lhipjoint": "root", "lfemur": "lhipjoint", "ltibia": "lfemur", "lfoot": "ltibia", "ltoes": "lfoot",
    "rhipjoint": "root", "rfemur": "rhipjoint", "rtibia": "rfemur", "rfoot": "rtibia", "rtoes": "rfoot", "lowerback": "root",
    "upperback": "lowerback", "thorax": "upperback", "lowerneck": "thorax", "upperneck": "lowerneck", "head": "upperneck",
    "lclavicle": "thorax", "lhumerus": "lclavicle", "lradius": "lhumerus", "lwrist": "lradius", "lhand": "lwrist",
    "lfingers": "lhand", "lthumb": "lwrist", "rclavicle": "thorax", "rhumerus": "rclavicle", "rradius": "rhumerus",
    "rwrist": "rradius", "rhand": "rwrist", "rfingers": "rhand", "rthumb": "rwrist",
}  # fmt: skip
EXPORT = {
    "Hips": "Hips", "RightUpLeg": "Hips", "RightLeg": "RightUpLeg", "RightFoot": "RightLeg", "RightFoot_end": "RightFoot",
    "LeftUpLeg": "Hips", "LeftLeg": "LeftUpLeg", "LeftFoot": "LeftLeg", "LeftFoot_end": "LeftFoot", "Spine": "Hips",
    "Neck": "Spine", "Head": "Neck", "LeftEye": "Head", "RightEye": "Head", "LeftArm": "Spine", "LeftForeArm": "LeftArm",
    "Finger": "LeftForeArm", "RightArm": "Spine", "RightForeArm": "RightArm",
}  # fmt: skip


def layout(names):
    joints = list(names)
    return hierarchy_topology("x", joints, [-1 if names[j] == j else joints.index(names[j]) for j in joints])


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (
            CMU,
            {
                "head": "lowerneck upperneck head",
                "torso": "root lowerback upperback thorax",
                "left_leg": "lhipjoint lfemur ltibia lfoot ltoes",
                "left_arm": "lclavicle lhumerus lradius lwrist lhand lfingers lthumb",
            },
        ),
        (
            EXPORT,
            {
                "head": "Neck Head LeftEye RightEye",
                "torso": "Hips Spine",
                "left_leg": "LeftUpLeg LeftLeg LeftFoot LeftFoot_end",
                "left_arm": "LeftArm LeftForeArm Finger",
            },
        ),
    ],
    ids=["cmu", "export"],
)
def test_what_names_tell(names, parts):
    found = layout(names)
    assert [found.joints[parent] for parent in found.parents()] == list(names.values()) and found.centre == 0
    for part, members in parts.items():
        assert [found.joints[joint] for joint in found.parts[part]] == members.split(), part
    for joint, twin in zip(found.joints, found.mirror):
        expected = joint
        for left, right in (("Left", "Right"), ("l", "r")) if names is EXPORT else (("l", "r"),):
            for here, there in ((left, right), (right, left)):
                if joint.startswith(here) and there + joint[len(here) :] in names:
                    expected = there + joint[len(here) :]
        assert found.joints[twin] == expected


@pytest.mark.parametrize("left, right", [("hand_l", "hand_r"), ("L_Hand", "R_Hand"), ("x:LeftArm", "x:RightArm"), ("HL", "HR")])
def test_sides(left, right):
    found = layout({"root": "root", right: "root", left: "root"})
    assert found.mirror == (0, 2, 1) and found.parts["left_arm"] == (2,) and found.parts["right_arm"] == (1,)


def test_twins_hang_on_twins():
    # names of a pair, but the one hangs on the root and the other on a joint of the middle
    assert layout({"root": "root", "back": "root", "lamp": "root", "ramp": "back"}).mirror == (0, 1, 2, 3)


def test_names_of_layouts():
    assert layout(CMU).name == layout(dict(CMU)).name != layout({**CMU, "lthumb": "lhand"}).name
    assert layout(CMU).name.startswith("x-31-")


def test_rotations():
    draws = np.random.default_rng(0)
    angles = draws.uniform(-7, 7, (5, 4))
    expected = Rotation.identity(5)
    for axis, angle in zip((2, 0, 1, 2), angles.T):
        expected = expected * Rotation.from_rotvec(np.eye(3)[axis] * angle[:, None])
    np.testing.assert_allclose(rotation_product((2, 0, 1, 2), angles), expected.as_matrix(), atol=1e-14)
    assert rotation_product((), np.zeros((3, 0))).tolist() == [np.eye(3).tolist()] * 3


def test_lines():
    assert list(word_lines(b"\xef\xbb\xbf a\r\n\n\t\n b c \n\n")) == [(1, b"a"), (4, b"b c")]
    assert list(word_lines(b"")) == list(word_lines(b"\n")) == []
    assert list(word_lines(b"\n\nx")) == [(3, b"x")]


@pytest.mark.parametrize("name", ["bvh", "amc"])
def test_a_first_file_without_skeleton(tmp_path, name):
    (tmp_path / f"a.{name}").write_text("x")
    with pytest.raises(ValueError, match=rf"^pack_source: file must be .*, in .*a\.{name}"):
        pack_source(name, tmp_path, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists() and FORMATS[name].layout_of is not None
