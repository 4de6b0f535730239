"""Skeleton layouts, each written once: joints, bones, parts, mirror, body axes, and the streams that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from numpy.typing import NDArray

from fastskel.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AXES", "PARTS", "STREAMS", "TOPOLOGIES", "Topology", "stream", "topology"]

PARTS = ("head", "torso", "left_arm", "right_arm", "left_leg", "right_leg")
AXES = ("pelvis", "neck", "left_hip", "right_hip", "left_shoulder", "right_shoulder")
STREAMS = ("joint", "bone", "motion")

Clips = TypeVar("Clips", NDArray[Any], "Tensor")


@dataclass(frozen=True)
class Topology:
    """One skeleton layout of V joints.

    Attributes:
        name: Name in `TOPOLOGIES`.
        joints: Joint names, (V,), left and right as the person has them.
        centre: Joint that centring subtracts.
        mirror: Joint that takes each joint's place when left and right are swapped, (V,).
        parts: Joints of head, torso, arms and legs; every joint in exactly one of them.
        bones: Variant name to the parent of each joint, (V,); a joint that is its own parent has a zero bone.
            The first variant is the default.
        axes: Joints whose mean is the pelvis, the neck, and each hip and shoulder.
    """

    name: str
    joints: tuple[str, ...]
    centre: int
    mirror: tuple[int, ...]
    parts: Mapping[str, tuple[int, ...]]
    bones: Mapping[str, tuple[int, ...]]
    axes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def unknown(cls, num_joints: int) -> Topology:
        """Name nothing but the number of joints, for arrays (N, T, M, V, C) that come without a skeleton."""
        joints = tuple(range(num_joints))
        parts = {part: joints if part == "torso" else () for part in PARTS}
        names = tuple(f"joint{number}" for number in joints)
        return cls(f"unknown-{num_joints}", names, 0, joints, parts, {"none": joints})

    def __post_init__(self) -> None:
        num = len(self.joints)
        for mapping in ("parts", "bones", "axes"):
            frozen = MappingProxyType({key: tuple(value) for key, value in getattr(self, mapping).items()})
            object.__setattr__(self, mapping, frozen)
        if num == 0 or len(set(self.joints)) != num:
            self._refuse("joints", "at least one distinct name", self.joints)
        if not 0 <= self.centre < num:
            self._refuse("centre", f"a joint of range({num})", self.centre)
        if sorted(self.mirror) != list(range(num)) or any(self.mirror[self.mirror[j]] != j for j in range(num)):
            self._refuse("mirror", f"a permutation of range({num}) that undoes itself", self.mirror)
        if sorted(self.parts) != sorted(PARTS) or sorted(j for p in self.parts.values() for j in p) != list(range(num)):
            self._refuse("parts", f"{', '.join(PARTS)} with every joint in exactly one", dict(self.parts))
        if not self.bones:
            self._refuse("bones", "at least one variant", {})
        for variant, parents in self.bones.items():
            if len(parents) != num or any(not 0 <= parent < num for parent in parents):
                self._refuse(f"bones[{variant!r}]", f"{num} parents of range({num})", parents)
        for axis, joints in self.axes.items():
            if axis not in AXES or not joints or any(not 0 <= j < num for j in joints):
                self._refuse(f"axes[{axis!r}]", f"joints of range({num}) under one of {', '.join(AXES)}", joints)

    def _refuse(self, argument: str, contract: str, actual: object, action: str = "Correct the layout.") -> None:
        raise ValueError(f"Topology {self.name!r}: {argument} must be {contract}, got {actual}. {action}")

    def __reduce__(self) -> tuple[Any, ...]:
        # read-only mappings do not pickle: hand plain ones to the constructor, for worker processes and deep copies
        plain = dict(self.parts), dict(self.bones), dict(self.axes)
        return (Topology, (self.name, self.joints, self.centre, self.mirror, *plain))

    def __hash__(self) -> int:
        return hash((self.name, self.joints))

    @property
    def num_joints(self) -> int:
        """Number of joints V."""
        return len(self.joints)

    def joint(self, name: str) -> int:
        """Return the index of a joint by its name, a scalar in range(V).

        Raises:
            ValueError: If there is no such joint.
        """
        if name not in self.joints:
            self._refuse("joint", f"one of {', '.join(self.joints)}", repr(name), "Choose one.")
        return self.joints.index(name)

    def parents(self, variant: str | None = None) -> tuple[int, ...]:
        """Return the parent of each joint, (V,), in the named variant or the default one.

        Raises:
            ValueError: If there is no such variant.
        """
        if variant is None:
            variant = next(iter(self.bones))
        if variant not in self.bones:
            self._refuse("bone variant", f"one of {', '.join(self.bones)}", repr(variant), "Choose one.")
        return self.bones[variant]

    def edges(self, variant: str | None = None) -> tuple[tuple[int, int], ...]:
        """Return the bones as (child, parent) pairs, (E, 2) with E <= V; a joint that is its own parent has none."""
        return tuple((child, parent) for child, parent in enumerate(self.parents(variant)) if child != parent)


def stream(clips: Clips, kind: str, topology: Topology, variant: str | None = None) -> Clips:
    """Derive a stream from joint positions.

    Args:
        clips: Joint positions, (..., T, M, V, C), NumPy or torch.
        kind: "joint" (as is), "bone" (joint minus its parent) or "motion" (next frame minus this one, last frame zero).
        topology: Skeleton of the V joints.
        variant: Bone variant; None takes the topology's default.
    Returns:
        The stream, (..., T, M, V, C), in the type, dtype and device of `clips`.
    Raises:
        ValueError: If the kind or the variant is unknown, or the joints do not match the topology.
    """
    if clips.ndim < 4 or clips.shape[-2] != topology.num_joints:
        raise ValueError(
            f"stream: clips must be (..., T, M, {topology.num_joints}, C) for {topology.name!r}, "
            f"got shape {tuple(clips.shape)}. Name the topology that the clips follow."
        )
    if kind == "joint":
        return clips
    # one gather and one subtraction: the same expression for arrays and tensors, gradients included
    if kind == "bone":
        parents = list(topology.parents(variant))
        bones: Clips = clips - clips[..., parents, :]
        return bones
    if kind == "motion":
        later = [*range(1, clips.shape[-4]), clips.shape[-4] - 1][-clips.shape[-4] :]
        motion: Clips = clips[..., later, :, :, :] - clips
        return motion
    raise ValueError(f"stream: kind must be one of {', '.join(STREAMS)}, got {kind!r}. Choose one.")


TOPOLOGIES: Registry[Topology] = Registry("topology")


def topology(name: str) -> Topology:
    """Return a registered skeleton layout of V joints by name.

    Raises:
        ValueError: If there is none of that name.
    """
    return TOPOLOGIES[name]


def _swapped(joints: Sequence[str]) -> tuple[int, ...]:
    def other(name: str) -> str:
        if name.startswith("left_"):
            return "right_" + name[5:]
        return "left_" + name[6:] if name.startswith("right_") else name

    return tuple(joints.index(other(name)) for name in joints)


def _parents(joints: Sequence[str], tree: Mapping[str, str]) -> tuple[int, ...]:
    both = dict(tree)
    for child, parent in tree.items():
        # "*" stands for left and right
        if "*" in child:
            del both[child]
            for side in ("left", "right"):
                both[child.replace("*", side)] = parent.replace("*", side)
    return tuple(joints.index(both.get(name, name)) for name in joints)


def _parts(joints: Sequence[str], head: Sequence[str]) -> dict[str, tuple[int, ...]]:
    found: dict[str, list[int]] = {part: [] for part in PARTS}
    for number, name in enumerate(joints):
        side, _, rest = name.partition("_")
        if name in head:
            found["head"].append(number)
        elif side in ("left", "right"):
            found[f"{side}_{'leg' if rest in ('hip', 'knee', 'ankle', 'foot') else 'arm'}"].append(number)
        else:
            found["torso"].append(number)
    return {part: tuple(numbers) for part, numbers in found.items()}


def _add(
    name: str,
    joints: str,
    *,
    centre: str,
    head: str,
    bones: Mapping[str, tuple[int, ...] | Mapping[str, str]],
    pelvis: str = "",
    neck: str = "",
) -> None:
    names = tuple(joints.split())
    axes: dict[str, tuple[int, ...]] = {axis: (names.index(axis),) for axis in AXES if axis in names}
    axes["pelvis"] = tuple(names.index(joint) for joint in (pelvis or "left_hip right_hip").split())
    axes["neck"] = tuple(names.index(joint) for joint in (neck or "left_shoulder right_shoulder").split())
    trees = {k: tree if isinstance(tree, tuple) else _parents(names, tree) for k, tree in bones.items()}
    parts = _parts(names, head.split())
    TOPOLOGIES.add(name, Topology(name, names, names.index(centre), _swapped(names), parts, trees, axes))


_LIMBS = {
    "*_elbow": "*_shoulder",
    "*_wrist": "*_elbow",
    "*_hand": "*_wrist",
    "*_knee": "*_hip",
    "*_ankle": "*_knee",
    "*_foot": "*_ankle",
}

# NTU RGB+D order (Kinect v2). "agcn" is the list of 2s-AGCN that USDRL and most of the field use: finger tips hang on
# the thumbs; "kinect" hangs tips and thumbs on the hand, as the sensor's own hierarchy does with the tips.
_NTU = {"spine_base": "spine_mid", "spine_mid": "spine_shoulder", "neck": "spine_shoulder", "head": "neck"}
_NTU |= {"*_shoulder": "spine_shoulder", "*_hip": "spine_base", **_LIMBS}
_add(
    "ntu-25",
    "spine_base spine_mid neck head left_shoulder left_elbow left_wrist left_hand right_shoulder right_elbow "
    "right_wrist right_hand left_hip left_knee left_ankle left_foot right_hip right_knee right_ankle right_foot "
    "spine_shoulder left_hand_tip left_thumb right_hand_tip right_thumb",
    centre="spine_mid",
    head="neck head",
    pelvis="spine_base",
    neck="spine_shoulder",
    bones={
        "agcn": {**_NTU, "*_hand_tip": "*_thumb", "*_thumb": "*_hand"},
        "kinect": {**_NTU, "*_hand_tip": "*_hand", "*_thumb": "*_hand"},
    },
)

# Kinect v1 joints in the two orders found in files. "ctrgcn" is rooted at the shoulder centre, as the NW-UCLA feeders
# of the field are; "hip" is rooted at the hip centre, as the sensor's own hierarchy is.
_KINECT_20 = {
    "ctrgcn": {
        "hip_center": "spine",
        "spine": "shoulder_center",
        "head": "shoulder_center",
        "*_shoulder": "shoulder_center",
        "*_hip": "hip_center",
        **_LIMBS,
    },
    "hip": {
        "spine": "hip_center",
        "shoulder_center": "spine",
        "head": "shoulder_center",
        "*_shoulder": "shoulder_center",
        "*_hip": "hip_center",
        **_LIMBS,
    },
}
_ARMS_LEGS_20 = (
    "left_shoulder left_elbow left_wrist left_hand right_shoulder right_elbow right_wrist right_hand "
    "left_hip left_knee left_ankle left_foot right_hip right_knee right_ankle right_foot"
)
for _name, _trunk in (
    ("kinect-20-ucla", "hip_center spine shoulder_center head "),
    ("kinect-20-utd", "head shoulder_center spine hip_center "),
):
    _add(
        _name,
        _trunk + _ARMS_LEGS_20,
        centre="hip_center",
        head="head",
        pelvis="hip_center",
        neck="shoulder_center",
        bones=_KINECT_20,
    )

# COCO order. "plain" is a tree rooted at the nose; "usdrl" is the list of the USDRL feeders, reproduced as published:
# it points from each joint outwards, has no bone for the right shoulder and is no tree.
_add(
    "coco-17",
    "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow right_elbow left_wrist "
    "right_wrist left_hip right_hip left_knee right_knee left_ankle right_ankle",
    centre="nose",
    head="nose left_eye right_eye left_ear right_ear",
    bones={
        "plain": {
            "*_eye": "nose",
            "*_ear": "*_eye",
            "*_shoulder": "nose",
            "*_elbow": "*_shoulder",
            "*_wrist": "*_elbow",
            "*_hip": "*_shoulder",
            "*_knee": "*_hip",
            "*_ankle": "*_knee",
        },
        "usdrl": (1, 3, 4, 5, 6, 5, 8, 9, 10, 7, 8, 13, 14, 15, 16, 13, 14),
    },
)

# OpenPose order with 18 joints, as in Kinetics-Skeleton. "agcn" is rooted at the nose and hangs hips on shoulders.
_add(
    "openpose-18",
    "nose neck right_shoulder right_elbow right_wrist left_shoulder left_elbow left_wrist right_hip right_knee "
    "right_ankle left_hip left_knee left_ankle right_eye left_eye right_ear left_ear",
    centre="neck",
    head="nose right_eye left_eye right_ear left_ear",
    neck="neck",
    bones={
        "agcn": (0, 0, 1, 2, 3, 1, 5, 6, 2, 8, 9, 5, 11, 12, 0, 0, 14, 15),
        "plain": {
            "nose": "neck",
            "*_eye": "nose",
            "*_ear": "*_eye",
            "*_shoulder": "neck",
            "*_elbow": "*_shoulder",
            "*_wrist": "*_elbow",
            "*_hip": "neck",
            "*_knee": "*_hip",
            "*_ankle": "*_knee",
        },
    },
)

# order of the SBU Kinect interaction files (OpenNI tracker)
_add(
    "sbu-15",
    "head neck torso left_shoulder left_elbow left_hand right_shoulder right_elbow right_hand left_hip left_knee "
    "left_foot right_hip right_knee right_foot",
    centre="torso",
    head="head",
    neck="neck",
    bones={
        "plain": {
            "head": "neck",
            "neck": "torso",
            "*_shoulder": "neck",
            "*_elbow": "*_shoulder",
            "*_hand": "*_elbow",
            "*_hip": "torso",
            "*_knee": "*_hip",
            "*_foot": "*_knee",
        },
    },
)

# Penn Action: 13 joints marked in pictures, the head instead of nose, eyes and ears
_add(
    "penn-13",
    "head left_shoulder right_shoulder left_elbow right_elbow left_wrist right_wrist left_hip right_hip left_knee right_knee "
    "left_ankle right_ankle",
    centre="head",
    head="head",
    bones={
        "plain": {
            "*_shoulder": "head",
            "*_elbow": "*_shoulder",
            "*_wrist": "*_elbow",
            "*_hip": "*_shoulder",
            "*_knee": "*_hip",
            "*_ankle": "*_knee",
        },
    },
)
