"""Skeleton layouts as JSON: those of a user's own files, and the copy in a packed data set that uses one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastskel.skeleton import AXES, PARTS, TOPOLOGIES, Topology

__all__ = ["named_or_read_topology", "topology_from_json", "topology_to_json"]

# characters of what is wrong
_MOST_SHOWN = 300
_KEYS = ("name", "joints", "parents", "bones", "variants", "centre", "mirror", "parts", "axes")


def topology_to_json(layout: Topology) -> dict[str, Any]:
    """Return a layout of V joints as plain lists and mappings, from which `topology_from_json` makes it again."""
    content: dict[str, Any] = {key: getattr(layout, key) for key in ("name", "centre", "joints", "mirror")}
    for key in ("parts", "bones", "axes"):
        content[key] = {name: list(joints) for name, joints in getattr(layout, key).items()}
    # the first variant is the default one, and objects of JSON have no order
    return {**content, "joints": list(layout.joints), "mirror": list(layout.mirror), "variants": list(layout.bones)}


def named_or_read_topology(text: str, argument: str = "pack_source: option topology") -> tuple[Topology, bool]:
    """Return the layout of V joints of a registered name, or the one in a JSON file, and whether it is a file's.

    Raises:
        ValueError: If there is no such name or file, or the file's layout is none, or has a registered name; names the
            argument that `text` is.
    """
    if text in TOPOLOGIES:
        return TOPOLOGIES[text], False
    path = Path(text)
    if not text or not path.is_file():
        raise ValueError(
            f"{argument} must be one of {', '.join(TOPOLOGIES)} or a JSON file, got {text!r}. Choose one."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _wrong("file", "readable JSON", str(error), path) from error
    layout = topology_from_json(content, path)
    if layout.name in TOPOLOGIES:
        raise _wrong("name", "new", f"the registered {layout.name!r}", path)
    return layout, True


def topology_from_json(content: Any, path: str | os.PathLike[str]) -> Topology:
    """Make a layout of V joints.

    Args:
        content: Mapping with `name`, `joints` (V names, "left_" and "right_" before those of a side), `parents` (V names
            or indices, a joint's own for a root) or `bones` (variant -> parents) and `variants` (their order, the default
            one first), and, where the names do not tell, `centre` (default: the first root), `mirror`, `parts` and `axes`.
        path: Where it comes from, for messages.
    Raises:
        ValueError: If something is missing, unknown or does not fit.
    """
    if not isinstance(content, Mapping):
        raise _wrong("content", "a JSON object", type(content).__name__, path)
    if unknown := [key for key in content if key not in _KEYS]:
        raise _wrong("keys", f"among {', '.join(_KEYS)}", repr(unknown[0]), path)
    name, joints = content.get("name"), content.get("joints")
    if not isinstance(name, str) or not name:
        raise _wrong("name", "a string", repr(name), path)
    if not isinstance(joints, list) or not joints or not all(isinstance(joint, str) for joint in joints):
        raise _wrong("joints", "a list of names", repr(joints), path)
    bones = content.get("bones", {"plain": content.get("parents")})
    if not isinstance(bones, Mapping):
        raise _wrong("bones", "variants of parents", repr(bones), path)
    variants = content.get("variants", list(bones))
    if not isinstance(variants, list) or sorted(map(repr, variants)) != sorted(map(repr, bones)):
        raise _wrong("variants", f"an order of {', '.join(bones)}", repr(variants), path)
    trees = {variant: _joints(bones[variant], joints, f"parents of {variant!r}", path) for variant in variants}
    first = next(iter(trees.values()), ())
    roots = [number for number, parent in enumerate(first) if number == parent]
    centre = _joints([content.get("centre", roots[0] if roots else 0)], joints, "centre", path)[0]
    mirror = content.get("mirror", [_other_side(joint, joints) for joint in joints])
    axes, parts = content.get("axes", _axes(joints)), content.get("parts", _parts(joints))
    if not isinstance(axes, Mapping) or not isinstance(parts, Mapping):
        raise _wrong("axes and parts", "objects of joint lists", repr(axes), path)
    try:
        return Topology(
            name,
            tuple(joints),
            centre,
            _joints(mirror, joints, "mirror", path),
            {part: _joints(found, joints, f"part {part!r}", path) for part, found in parts.items()},
            trees,
            {axis: _joints(found, joints, f"axis {axis!r}", path) for axis, found in axes.items()},
        )
    except ValueError as error:
        raise ValueError(f"{error!s:.600} It is in {os.fspath(path)}.") from error


def _wrong(argument: str, contract: str, actual: str, path: str | os.PathLike[str]) -> ValueError:
    # a file may hold anything, and the message is one line
    shown = [text[:_MOST_SHOWN] if text[:_MOST_SHOWN].isprintable() else repr(text[:_MOST_SHOWN]) for text in (contract, actual)]
    return ValueError(f"topology_from_json: {argument} must be {shown[0]}, got {shown[1]}, in {os.fspath(path)}. Correct it.")


def _joints(members: Any, joints: list[str], what: str, path: str | os.PathLike[str]) -> tuple[int, ...]:
    if not isinstance(members, list):
        raise _wrong(what, "a list of joints", repr(members), path)
    found = []
    for member in members:
        number = joints.index(member) if member in joints else member
        if type(number) is not int or not 0 <= number < len(joints):
            raise _wrong(what, "made of joints, by name or index", repr(member), path)
        found.append(number)
    return tuple(found)


def _other_side(joint: str, joints: list[str]) -> str:
    for side, opposite in (("left_", "right_"), ("right_", "left_")):
        if joint.startswith(side) and opposite + joint[len(side) :] in joints:
            return opposite + joint[len(side) :]
    return joint


def _parts(joints: list[str]) -> dict[str, list[str]]:
    legs, heads = ("hip", "knee", "ankle", "foot", "leg", "toe"), ("head", "neck", "nose", "eye", "ear")
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for joint in joints:
        side, _, rest = joint.partition("_")
        if any(word in joint.lower().split("_") for word in heads):
            parts["head"].append(joint)
        elif side in ("left", "right"):
            parts[f"{side}_{'leg' if any(word in rest for word in legs) else 'arm'}"].append(joint)
        else:
            parts["torso"].append(joint)
    return parts


def _axes(joints: list[str]) -> dict[str, list[str]]:
    axes = {axis: [axis] for axis in AXES if axis in joints}
    for axis, pair in (("pelvis", ["left_hip", "right_hip"]), ("neck", ["left_shoulder", "right_shoulder"])):
        if axis not in axes and set(pair) <= set(joints):
            axes[axis] = pair
    return axes
