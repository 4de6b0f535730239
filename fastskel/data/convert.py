"""From one skeleton layout to another: joints that correspond, means of joints that lie around one, and what is missing.

A joint of the target takes the first of these that the source has: the joint of its name; the joint that other
sensors put in its place (hip centre and spine base, spine and torso, the middle of both shoulders and the neck of
OpenPose, wrist and hand, ankle and foot, head and nose); the mean of left and right hips or shoulders. What remains
is absent, zero in all channels: eyes and ears of a depth camera's skeleton, finger tips and thumbs of any other.
Layouts that differ in a joint's place by some centimetres stay so.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastskel.data.identity import original_identity
from fastskel.data.packed import PackedDataset, open_dataset
from fastskel.data.topology_file import named_or_read_topology, topology_to_json
from fastskel.data.writer import FramesWriter, destination, write_array, write_json, write_meta
from fastskel.skeleton import TOPOLOGIES, Topology

__all__ = ["Correspondence", "convert_dataset", "convert_joints", "correspondence"]

_PELVIS = (("spine_base",), ("hip_center",), ("left_hip", "right_hip"))
_MIDDLE = (("spine_mid",), ("spine",), ("torso",))
_CHEST = (("spine_shoulder",), ("shoulder_center",), ("left_shoulder", "right_shoulder"))
# in their order; "*" stands for the side of the joint that is looked for
_PLACES: dict[str, tuple[tuple[str, ...], ...]] = {
    "spine_base": _PELVIS, "hip_center": _PELVIS, "spine_mid": _MIDDLE, "spine": _MIDDLE, "torso": _MIDDLE,
    "spine_shoulder": _CHEST, "shoulder_center": _CHEST, "neck": _CHEST, "head": (("nose",), ("left_ear", "right_ear")),
    "nose": (("head",),), "*_hand": (("*_wrist",),), "*_wrist": (("*_hand",),), "*_foot": (("*_ankle",),),
    "*_ankle": (("*_foot",),),
}  # fmt: skip


@dataclass(frozen=True)
class Correspondence:
    """Where the joints of a layout come from.

    Attributes:
        sources: For each joint of the target the joints of the source whose mean it takes, (V,); empty where there is none.
        renamed: Joints of the target that take a joint of another name or a mean, as "neck from spine_shoulder".
        missing: Joints of the target that are absent.
    """

    sources: tuple[tuple[int, ...], ...]
    renamed: tuple[str, ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        same = len(self.sources) - len(self.renamed) - len(self.missing)
        lines = [f"  {same} of {len(self.sources)} joints from those of their names"]
        lines += [f"  {text}{', their mean' if ' and ' in text else ''}" for text in self.renamed]
        return "\n".join([*lines, f"  absent, zero in all frames: {', '.join(self.missing)}"] if self.missing else lines)


def correspondence(source: Topology, target: Topology) -> Correspondence:
    """Find the joints of a layout of V joints in another."""
    sources: list[tuple[int, ...]] = []
    renamed, missing = [], []
    for joint in target.joints:
        side, _, rest = joint.partition("_")
        sided = side in ("left", "right")
        places = ((joint,), *_PLACES.get(f"*_{rest}" if sided else joint, ()))
        named = [tuple(name.replace("*", side) for name in place) for place in places]
        found = next((place for place in named if all(name in source.joints for name in place)), ())
        sources.append(tuple(source.joint(name) for name in found))
        if not found:
            missing.append(joint)
        elif found != (joint,):
            renamed.append(f"{joint} from {' and '.join(found)}")
    return Correspondence(tuple(sources), tuple(renamed), tuple(missing))


def convert_joints(clips: NDArray[np.float32], source: Topology, target: Topology) -> NDArray[np.float32]:
    """Convert joint positions between layouts.

    Args:
        clips: Positions, (..., V, C), of the source's joints; zero in all channels where absent.
        source: Their layout.
        target: Layout to convert to.
    Returns:
        Positions, (..., V', C), float32. A mean of joints is absent where one of them is.
    Raises:
        ValueError: If the clips do not have the source's joints.
    """
    if clips.ndim < 2 or clips.shape[-2] != source.num_joints:
        raise ValueError(
            f"convert_joints: clips must be (..., {source.num_joints}, C) for {source.name!r}, got {clips.shape}. "
            "Name the layout that they follow."
        )
    out = np.zeros((*clips.shape[:-2], target.num_joints, clips.shape[-1]), np.float32)
    for joint, parts in enumerate(correspondence(source, target).sources):
        if len(parts) == 1:
            out[..., joint, :] = clips[..., parts[0], :]
        elif parts:
            around = clips[..., list(parts), :]
            known = np.asarray(around.any(axis=-1).all(axis=-1))[..., None]
            out[..., joint, :] = np.where(known, around.mean(axis=-2, dtype=np.float64), 0)
    return out


def convert_dataset(
    dataset: PackedDataset, target: str | Topology, out: str | os.PathLike[str], *, progress: bool = False
) -> PackedDataset:
    """Pack a data set's clips (T, M, V, C) again with another skeleton; everything else stays as it is.

    Args:
        dataset: Packed clips, read and written one at a time.
        target: Layout, the name of a registered one, or a JSON file that holds one.
        out: Folder to create.
        progress: Show a progress bar on standard error.
    Returns:
        The packed data set, opened. Its frames are as many as before, also those that lost all their joints; labels,
        columns, segments and splits are those of `dataset`.
    Raises:
        ValueError: If the clips were normalised when packed, no joint corresponds, the layout has the name of another
            registered one, or the folder exists.
    """
    from tqdm import tqdm

    layout = named_or_read_topology(target, "convert_dataset: target")[0] if isinstance(target, str) else target
    if dataset.meta["normalisation"] != "none":
        # a centred joint is zero, which reads as absent
        raise ValueError(
            f"convert_dataset: dataset must be packed with normalisation 'none', got {dataset.meta['normalisation']!r} in "
            f"{dataset.path}. Convert first, normalise afterwards."
        )
    new = layout.name not in TOPOLOGIES
    if not new and TOPOLOGIES[layout.name] != layout:
        raise ValueError(
            f"convert_dataset: target must have a name of its own, got the registered {layout.name!r}. Rename it."
        )
    found = correspondence(dataset.topology, layout)
    if len(found.missing) == layout.num_joints:
        raise ValueError(
            f"convert_dataset: target must share joints with {dataset.topology.name!r} of {dataset.path}, got {layout.name!r}, "
            "which has none of them. Choose another."
        )
    with destination("convert_dataset", out) as scratch:
        writer = FramesWriter(scratch)
        try:
            for number in tqdm(range(len(dataset)), f"converting to {layout.name}", unit="clip", disable=not progress):
                writer.append(convert_joints(dataset.clip(number), dataset.topology, layout))
            writer.finish(scratch / "frames.npy")
        finally:
            writer.close()
        # as they are, also a segment that ends before it starts, where the source has one
        arrays = {name: getattr(dataset, name) for name in ("offsets", "names", "labels", "num_bodies")} | dataset.columns
        if dataset.segments is not None:
            arrays["segments"] = dataset.segments
        for name, array in arrays.items():
            write_array(scratch / f"{name}.npy", array)
        if dataset.splits:
            parts = {name: {part: index.tolist() for part, index in split.items()} for name, split in dataset.splits.items()}
            write_json(scratch / "splits.json", parts)
        if new:
            write_json(scratch / "topology.json", topology_to_json(layout))
        write_meta(scratch, {**dataset.meta, "topology": layout.name, "original": original_identity(dataset)})
        # what could not be opened again must not appear at the destination
        open_dataset(scratch)
    return open_dataset(out)
