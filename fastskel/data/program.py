"""What native code is told of a view: plain dictionaries of numbers and arrays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastskel.data.distort import BodyMask, FrameMask, GaussianBlur, GaussianNoise, Mirror
from fastskel.data.normalise import body_frame
from fastskel.data.packed import PackedDataset
from fastskel.data.transforms import JointCorruption, JointMask, OneOf, Rotation, Scaling, Shear, Transform
from fastskel.data.views import ViewSpec, crop_shares
from fastskel.skeleton import Topology

__all__ = ["alignment", "view_program", "view_programs"]

_KINDS: dict[type[Transform], str] = {
    JointCorruption: "joint-corruption",
    Shear: "shear",
    Rotation: "rotation",
    Scaling: "scaling",
    JointMask: "joint-mask",
    OneOf: "one-of",
    Mirror: "mirror",
    GaussianNoise: "noise",
    GaussianBlur: "blur",
    FrameMask: "frame-mask",
    BodyMask: "body-mask",
}


def view_program(spec: ViewSpec, dataset: PackedDataset) -> dict[str, Any]:
    """Describe how a view is made for native code, complete: nothing is looked up later.

    Args:
        spec: Pipeline of the view.
        dataset: Packed clips (T, M, V, C).
    Returns:
        frames: T.
        crop: ("random", low, high, min_frames) or ("center", ratio), shares in units of 2^-24.
        normalise: none, center, center-first, or align, which says where `alignment` turns to.
        centre_joint: Joint that centring subtracts.
        alignment: `alignment` of the data set, (n, 4, 3), or None.
        transforms: One dictionary per transform, its "kind" the name in `TRANSFORMS`. Real numbers are those of float32;
            fractions have become counts.
        stream: joint, bone or motion.
        parents: Parent of each joint, (V,), for bones, else None.
    Raises:
        ValueError: If the view cannot be made of the data set, or holds a transform that only Python knows.
    """
    return view_programs([spec], dataset)[0]


def view_programs(specs: Iterable[ViewSpec], dataset: PackedDataset) -> list[dict[str, Any]]:
    """Describe several views, as `view_program` does; those that align share one array (n, 4, 3) per kind.

    Raises:
        ValueError: If a view cannot be made of the data set, or holds a transform that only Python knows.
    """
    tables: dict[str, NDArray[np.float64] | None] = {}
    programs = []
    for spec in specs:
        spec.check(dataset)
        aligned = spec.normalise in ("align", "align-yaw")
        if spec.normalise not in tables:
            tables[spec.normalise] = alignment(dataset, spec.normalise) if aligned else None
        programs.append(
            {
                "frames": int(spec.frames),
                "crop": crop_shares(spec.crop),
                "normalise": "align" if aligned else spec.normalise,
                "centre_joint": int(dataset.topology.centre),
                "alignment": tables[spec.normalise],
                "transforms": [_described(transform, int(spec.frames), dataset.topology) for transform in spec.transforms],
                "stream": spec.stream,
                "parents": dataset.topology.parents(spec.bone_variant) if spec.stream == "bone" else None,
            }
        )
    return programs


def alignment(dataset: PackedDataset, kind: str = "align") -> NDArray[np.float64]:
    """Where every clip is turned from: row 0 its origin, rows 1 to 3 the rotation R, turned = R (x - origin).

    Args:
        dataset: Packed clips (T, M, V, 3), y up.
        kind: "align" or "align-yaw".
    Returns:
        One frame of reference per clip, (n, 4, 3); NaN for a clip that is only moved, as by "center-first".
    Raises:
        ValueError: If the kind or the data set does not fit.
    """
    if kind not in ("align", "align-yaw"):
        raise ValueError(f"alignment: kind must be align or align-yaw, got {kind!r}. Choose one.")
    table = np.empty((len(dataset), 4, 3))
    for number in range(len(dataset)):
        clip = np.asarray(dataset.clip(number), np.float32)
        table[number] = body_frame(clip, dataset.topology, upright=kind == "align")
    return table


def _described(transform: Transform, frames: int, topology: Topology) -> dict[str, Any]:
    # by the exact type: a subclass may draw or compute something else
    if type(transform) not in _KINDS:
        raise ValueError(
            f"view_program: transforms must be those of fastskel, got {type(transform).__name__}, which native code does "
            'not know. Use Loader(engine="numpy").'
        )
    fields: dict[str, Any] = {"kind": _KINDS[type(transform)]}
    match transform:
        case OneOf():
            fields["options"] = [_described(option, frames, topology) for option in transform.options]
            return fields
        case Shear():
            return fields | {"amplitude": _rounded(transform.amplitude)}
        case JointCorruption():
            count = transform.num_joint_words(topology.num_joints)
            return fields | {"count": count, "zero_probability": _rounded(transform.zero_probability)}
        case Rotation():
            fields["angles"] = tuple(_rounded(angle) for angle in transform.angles)
        case Scaling():
            fields |= {"low": _rounded(transform.low), "high": _rounded(transform.high), "per_axis": transform.per_axis}
        case JointMask():
            fields["count"] = transform.num_joint_words(topology.num_joints)
        case Mirror():
            fields |= {"joints": tuple(topology.mirror), "reflect": transform.reflect}
        case GaussianNoise():
            fields["std"] = _rounded(transform.std)
        case GaussianBlur():
            fields |= {"low": _rounded(transform.low), "high": _rounded(transform.high), "taps": transform.taps}
            fields |= {"normalise": transform.normalise, "padding": transform.padding}
        case FrameMask():
            fields["count"] = transform.num_masked(frames)
        case BodyMask():
            pass
        case _:
            raise AssertionError(f"{type(transform).__name__} has no description")
    return fields | {"probability": _rounded(transform.probability)}


def _rounded(value: float) -> float:
    return float(np.float32(value))
