"""Moving skeletons: compact frames in the page, drawn by its script; without scripts the middle pose stands still."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastskel.data.inspect import project
from fastskel.data.packed import PackedDataset
from fastskel.report.markup import Markup, element, escape, script_json
from fastskel.skeleton import Topology

__all__ = ["Motions", "bones", "placed"]

# side of the picture, in which coordinates are whole numbers, and its margin
SIDE, MARGIN = 200, 10
MAX_FRAMES = 40
# clips in a page: a clip of one body and 25 joints takes about 8 kB
MAX_CLIPS = 120
ABSENT = -1
SIDES = {"left_arm": 1, "left_leg": 1, "right_arm": 2, "right_leg": 2}
NUM_SIDES = 3


def bones(topology: Topology, bodies: int) -> list[tuple[int, int, int]]:
    """Bones of M bodies: side (middle, left, right), joint, its parent; joints counted through all bodies.

    Every joint is a bone to itself too, a dot: one whose neighbours the sensor lost stays visible.
    """
    side_of = {joint: SIDES.get(part, 0) for part, joints in topology.parts.items() for joint in joints}
    # a tree that follows the body where the layout has one beside the field's
    joints = topology.num_joints
    edges = (*topology.edges("plain" if "plain" in topology.bones else None), *((joint, joint) for joint in range(joints)))
    return [(side_of[c], m * joints + c, m * joints + p) for m in range(bodies) for c, p in edges]


def placed(dataset: PackedDataset, frames: NDArray[np.float32]) -> NDArray[np.int64]:
    """Place a clip, (T, M, V, C), in a picture of 200 x 200: (T, M*V, 2), second axis down, -1 where a joint is absent."""
    scene = project(dataset, frames)
    if not scene.present.any():
        return np.full((len(frames), frames.shape[1] * frames.shape[2], 2), ABSENT)
    shown = scene.points[scene.present]
    low, high = shown.min(0), shown.max(0)
    scale = (SIDE - 2 * MARGIN) / max(float((high - low).max()), 1e-9)
    # one scale for both axes, the clip in the middle
    points = (scene.points - (low + high) / 2) * scale * [1, -1] + SIDE / 2
    whole = np.where(scene.present[..., None], np.rint(points), ABSENT)
    return whole.reshape(len(frames), -1, 2).astype(np.int64)


def _paths(edges: list[tuple[int, int, int]], pose: NDArray[np.int64]) -> list[str]:
    drawn = [""] * NUM_SIDES
    for side, child, parent in edges:
        (a, b), (c, d) = pose[child].tolist(), pose[parent].tolist()
        if a != ABSENT and c != ABSENT:
            drawn[side] += f"M{a} {b}L{c} {d}"
    return drawn


class Motions:
    """The moving clips of a page; the frames of each are written once, however often it is shown."""

    def __init__(self) -> None:
        self._edges: list[list[tuple[int, int, int]]] = []
        self._clips: list[dict[str, Any]] = []
        self._known: dict[tuple[str, int], int] = {}

    def figure(self, dataset: PackedDataset, clip: int, caption: str, kind: str = "") -> Markup:
        """Make the figure of a clip, (T, M, V, C), with a caption that ends in its name.

        Raises:
            ValueError: If there is no such clip, or the page holds too many.
        """
        if not isinstance(clip, int) or not 0 <= clip < len(dataset):
            raise ValueError(f"clip must be in 0 .. {len(dataset) - 1} of {dataset.path}, got {clip!r}")
        name = str(dataset.names[clip])
        number = self._number(dataset, clip)
        told = self._clips[number]
        edges, frames = self._edges[told["edges"]], told["frames"]
        middle = np.array(frames[len(frames) // 2]).reshape(-1, 2)
        paths = [element("path", class_=f"bone b{side}", d=d) for side, d in enumerate(_paths(edges, middle))]
        picture = element(
            "svg", *paths, viewBox=f"0 0 {SIDE} {SIDE}", role="img", aria_label=f"moving skeleton of {name}", data_clip=number
        )
        return element("figure", picture, element("figcaption", f"{caption}, {name}"), class_=f"clip {kind}".strip())

    def _number(self, dataset: PackedDataset, clip: int) -> int:
        key = (str(dataset.path), clip)
        if key not in self._known:
            if len(self._clips) == MAX_CLIPS:
                raise ValueError(f"a page holds at most {MAX_CLIPS} moving clips")
            frames = dataset.clip(clip)
            chosen = np.unique(np.linspace(0, len(frames) - 1, MAX_FRAMES).round().astype(int))
            edges = bones(dataset.topology, frames.shape[1])
            if edges not in self._edges:
                self._edges.append(edges)
            poses = placed(dataset, np.asarray(frames)[chosen])
            told = {"edges": self._edges.index(edges), "frames": [pose.reshape(-1).tolist() for pose in poses]}
            self._known[key] = len(self._clips)
            self._clips.append(told)
        return self._known[key]

    def data(self) -> Markup | None:
        """The frames of all clips, for the script; None without clips."""
        if not self._clips:
            return None
        content = script_json({"edges": self._edges, "clips": self._clips})
        return element("script", escape(content), type="application/json", id="motion")
