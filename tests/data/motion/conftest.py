"""Writes motion capture files of random hierarchies, and places their joints one frame and one joint at a time with SciPy."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

CHANNELS = [f"{axis}{kind}" for axis in "XYZ" for kind in ("position", "rotation")]


def random_tree(draws, count, deep=False):
    """Parents of `count` joints, the first a root."""
    return [-1] + [number - 1 if deep else int(draws.integers(number)) for number in range(1, count)]


def random_bvh(seed, count=9, frames=4, deep=False):
    """Joints of a random Biovision hierarchy, each with any channels in any order, and their numbers (T, n)."""
    draws = np.random.default_rng(seed)
    joints = []
    for number, parent in enumerate(random_tree(draws, count, deep)):
        channels = list(draws.permutation(CHANNELS)[: draws.integers(7)]) if number else ["Yposition", "Zrotation", "Xposition"]
        # an offset beside position channels is ambiguous
        offset = draws.normal(size=3) * [not any(c.startswith(axis) and "pos" in c for c in channels) for axis in "XYZ"]
        joints.append(SimpleNamespace(name=f"j{number}", parent=parent, offset=offset.tolist(), channels=channels))
    numbers = draws.uniform(-200, 200, (frames, sum(len(joint.channels) for joint in joints)))
    return joints, numbers


def depth_first(parents):
    order, waiting = [], [0]
    while waiting:
        order.append(waiting.pop())
        waiting += [n for n in reversed(range(len(parents))) if parents[n] == order[-1]]
    return order


def bvh_text(joints, numbers, frame_time="0.0083333", ends=True, newline="\n"):
    """Text of joints in depth-first order of the hierarchy, written without recursion; numbers are in the order of joints."""
    order = depth_first([joint.parent for joint in joints])
    lines, open_joints = ["HIERARCHY"], []
    for number in order:
        joint = joints[number]
        while open_joints and open_joints[-1] != joint.parent:
            lines.append("}")
            open_joints.pop()
        lines += [f"{'JOINT' if open_joints else 'ROOT'} {joint.name}", "{", f"\tOFFSET {' '.join(map(repr, joint.offset))}"]
        lines.append(f"\tCHANNELS {len(joint.channels)} {' '.join(joint.channels)}")
        if ends and number not in [other.parent for other in joints]:
            lines += ["\tEnd Site", "\t{", "\t\tOFFSET 1.0 2.0 -0.5", "\t}"]
        open_joints.append(number)
    lines += ["}"] * len(open_joints)
    starts = np.concatenate([[0], np.cumsum([len(joint.channels) for joint in joints])])
    columns = np.concatenate([np.arange(starts[n], starts[n + 1]) for n in order]).astype(int)
    lines += ["MOTION", f"Frames: {len(numbers)}", f"Frame Time: {frame_time}"]
    lines += [" ".join(map(repr, row)) for row in numbers[:, columns].tolist()]
    return newline.join([*lines, ""]).encode()


def bvh_positions(joints, numbers):
    """Positions (T, V, 3) in the order of joints: one frame after the other, from the root on by recursion."""
    starts = np.concatenate([[0], np.cumsum([len(joint.channels) for joint in joints])])

    def placed(number, row):
        joint = joints[number]
        position, rotation = (np.zeros(3), Rotation.identity()) if joint.parent < 0 else placed(joint.parent, row)
        local, turn = np.array(joint.offset), Rotation.identity()
        for channel, value in zip(joint.channels, row[starts[number] :]):
            if channel.endswith("position"):
                local["XYZ".index(channel[0])] += value
            else:
                turn = turn * Rotation.from_euler(channel[0].lower(), value, degrees=True)
        return position + rotation.apply(local), rotation * turn

    return np.array([[placed(number, row)[0] for number in range(len(joints))] for row in numbers])


def random_asf(seed, count=9, frames=4):
    """Root order, bones of a random Acclaim skeleton with any dof in any order, and the numbers of frames by name."""
    draws = np.random.default_rng(seed)
    root = list(draws.permutation(["TX", "TY", "TZ", "RX", "RY", "RZ"]))
    bones = []
    for number, parent in enumerate(random_tree(draws, count)[1:], 1):
        direction = draws.normal(size=3)
        bones.append(
            SimpleNamespace(
                name=f"b{number}",
                parent="root" if parent == 0 else f"b{parent}",
                direction=(direction / np.linalg.norm(direction)).tolist(),
                length=float(draws.uniform(0.5, 3)),
                axis=draws.uniform(-180, 180, 3).tolist(),
                order="".join(draws.permutation(list("XYZ"))),
                dof=list(draws.permutation(["rx", "ry", "rz"])[: draws.integers(4)]),
            )
        )
    rows = [
        {"root": draws.uniform(-90, 90, 6).tolist()}
        | {bone.name: draws.uniform(-90, 90, len(bone.dof)).tolist() for bone in bones if bone.dof}
        for _ in range(frames)
    ]
    return root, bones, rows


def asf_text(root, bones, *, angle="deg", length=0.45, orientation=(0, 0, 0), position=(0, 0, 0), newline="\n"):
    """Text of a skeleton as the CMU database has them, angles of axes in its unit."""
    factor = 1 if angle == "deg" else np.pi / 180
    lines = ["# AST/ASF file", ":version 1.10", ":name VICON", ":units", "  mass 1.0", f"  length {length}", f"  angle {angle}"]
    lines += [":documentation", "   .ast/.asf automatically generated", "   (begin) end", ":root", f"   order {' '.join(root)}"]
    lines += ["   axis XYZ", f"   position {' '.join(map(repr, position))}"]
    lines += [f"   orientation {' '.join(repr(value * factor) for value in orientation)}", ":bonedata"]
    for number, bone in enumerate(bones, 1):
        axis = " ".join(repr(value * factor) for value in bone.axis)
        direction = " ".join(map(repr, bone.direction))
        lines += ["  begin", f"     id {number}", f"     name {bone.name}", f"     direction {direction}"]
        lines += [f"     length {bone.length!r}", f"     axis {axis}  {bone.order}"]
        if bone.dof:
            lines += [f"    dof {' '.join(bone.dof)}", "    limits (-160.0 20.0)"]
            lines += ["           (-70.0, 70.0)"] * (len(bone.dof) - 1)
        lines.append("  end")
    children = {}
    for bone in bones:
        children.setdefault(bone.parent, []).append(bone.name)
    lines += [":hierarchy", "  begin", *(f"    {parent} {' '.join(names)}" for parent, names in children.items()), "  end"]
    return newline.join([*lines, ""]).encode()


def amc_text(rows, angle=":DEGREES", first=1, newline="\n"):
    lines = ["#!OML:ASF F:\\VICON\\USERDATA\\skeleton.ASF", ":FULLY-SPECIFIED", angle]
    for number, row in enumerate(rows, first):
        lines += [str(number), *(f"{name} {' '.join(map(repr, values))}" for name, values in row.items())]
    return newline.join([*lines, ""]).encode()


def asf_turns(bones, row):
    """Rotation of each bone against its parent, in the axes of the world at rest."""
    turns = {}
    for bone in bones:
        # lower case: about fixed axes
        axes = Rotation.from_euler(bone.order.lower(), [bone.axis["XYZ".index(axis)] for axis in bone.order], degrees=True)
        moved = Rotation.identity()
        for freedom, value in zip(bone.dof, row.get(bone.name, ())):
            moved = Rotation.from_euler(freedom[1], value, degrees=True) * moved
        turns[bone.name] = axes * moved * axes.inv()
    return turns


def asf_root(root, row):
    place, turn = np.zeros(3), Rotation.identity()
    for freedom, value in zip(root, row["root"]):
        if freedom[0] == "T":
            place["XYZ".index(freedom[1])] = value
        else:
            turn = Rotation.from_euler(freedom[1].lower(), value, degrees=True) * turn
    return place, turn


def asf_positions(root, bones, rows):
    """Position of the root and the end of each bone by name, (T, 3) each: one frame after the other by recursion."""
    by_name = {bone.name: bone for bone in bones}
    found = {name: [] for name in ("root", *by_name)}
    for row in rows:
        turns = asf_turns(bones, row)

        def placed(name, row=row, turns=turns):
            if name == "root":
                return asf_root(root, row)
            position, turn = placed(by_name[name].parent)
            turn = turn * turns[name]
            return position + turn.apply(np.array(by_name[name].direction) * by_name[name].length), turn

        for name, positions in found.items():
            positions.append(placed(name)[0])
    return {name: np.array(positions) for name, positions in found.items()}


def layout_file(folder, joints, name="picked"):
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"name": name, "joints": list(joints), "parents": [0] * len(joints)}))
    return str(path)


@pytest.fixture(scope="session")
def motion():
    """The functions of this file, for tests that importlib mode lets import nothing from here."""
    return SimpleNamespace(
        amc_text=amc_text,
        asf_positions=asf_positions,
        asf_root=asf_root,
        asf_text=asf_text,
        asf_turns=asf_turns,
        bvh_positions=bvh_positions,
        bvh_text=bvh_text,
        depth_first=depth_first,
        layout_file=layout_file,
        random_asf=random_asf,
        random_bvh=random_bvh,
    )
