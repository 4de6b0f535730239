"""Looks at packed data: a summary in words, a strip of poses and a moving picture of one clip."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastskel.atomic import atomic_write
from fastskel.data.packed import PackedDataset, open_dataset
from fastskel.data.protocols import protocols, split

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Scene", "info", "project", "show"]

_COLOURS = {
    "head": "#475569",
    "torso": "#475569",
    "left_arm": "#0284c7",
    "left_leg": "#0369a1",
    "right_arm": "#ea580c",
    "right_leg": "#c2410c",
}
_BACKGROUND, _SHADOW, _GREY, _INK = "#ffffff", "#e2e8f0", "#64748b", "#1e293b"
# seen a little from the side and from above, so that depth shows
_YAW, _PITCH = np.deg2rad(25.0), np.deg2rad(10.0)
_POSES = 8
_GIF_FRAMES = 150
_GIF_MILLISECONDS = 50
_MARGIN = 0.08


def info(path: str | os.PathLike[str] | PackedDataset, *, verify: bool = False) -> str:
    """Describe a packed data set of n clips, (T, M, V, C) each, in a few lines.

    Args:
        path: Its folder, or the opened data set.
        verify: Also compare every file with its checksum.
    Raises:
        ValueError: If the data set is damaged.
    """
    dataset = path if isinstance(path, PackedDataset) and not verify else open_dataset(_path(path), verify=verify)
    meta, lengths = dataset.meta, dataset.num_frames
    known = dataset.labels[dataset.labels >= 0]
    size = sum(file.stat().st_size for file in dataset.path.iterdir() if file.is_file())
    rows = [
        ("source", f"{dataset.source}, {size / 2**20:.1f} MiB{', checksums match' if verify else ''}"),
        ("clips", f"{len(dataset):,}, {len(dataset.frames):,} frames"),
        ("length", f"{lengths.min()} to {lengths.max()} frames, median {np.median(lengths):g}"),
        ("skeleton", f"{dataset.topology.name}, {dataset.topology.num_joints} joints"),
        ("channels", f"{', '.join(meta['channels'])} in {meta['units']}, {meta['up_axis']} up"),
        ("bodies", f"room for {dataset.num_bodies_max}; {_counts(dataset.num_bodies)}"),
        ("normalised", str(meta["normalisation"])),
        ("frames kept", {"counted": "those the source counts", "nonzero": "those with any non-zero joint"}),
        ("labels", f"{len(known):,} clips of {len(np.unique(known))} classes, {len(dataset) - len(known):,} unknown"),
    ]
    for name in sorted(dataset.columns):
        values = np.unique(dataset.columns[name])
        shown = ", ".join(str(value) for value in values[:12]) + (", ..." if len(values) > 12 else "")
        rows.append((name, f"{len(values)} values per {meta['columns'][name]}: {shown}"))
    if dataset.segments is not None:
        rows.append(("segments", f"{len(dataset.segments):,} of {len(np.unique(dataset.segments[:, 1]))} classes"))
    rows += [(f"protocol {name}", _sizes(dataset, name)) for name in protocols(dataset)]
    rows += [
        (f"class {number}", f"{name}: {np.sum(known == number)} clips")
        for number, name in enumerate(dataset.class_names)
    ]
    rules = [text.get(meta["valid_frames_rule"], "unknown") if isinstance(text, dict) else text for _, text in rows]
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {text}" for (name, _), text in zip(rows, rules, strict=True)]
    return "\n".join([f"packed data set {dataset.path}", *lines])


def _path(path: str | os.PathLike[str] | PackedDataset) -> str | os.PathLike[str]:
    return path.path if isinstance(path, PackedDataset) else path


def _counts(bodies: NDArray[np.int64]) -> str:
    values, counts = np.unique(bodies, return_counts=True)
    return ", ".join(f"{count:,} clips with {value}" for value, count in zip(values, counts, strict=True))


def _sizes(dataset: PackedDataset, protocol: str) -> str:
    try:
        parts = split(dataset, protocol)
    except ValueError as error:
        # a summary must not fail because one protocol does not fit: say why instead
        return str(error)
    return f"{len(parts.train):,} train, {len(parts.test):,} test"


def show(
    path: str | os.PathLike[str] | PackedDataset, clip: int | str, out: str | os.PathLike[str] = "."
) -> tuple[Path, Path]:
    """Draw one clip, (T, M, V, C): a strip of poses as PNG and the moving skeleton as GIF.

    Left limbs are blue, right limbs orange. Data in space is seen from where the camera stood, turned a little.

    Args:
        path: Folder of the packed data set, or the opened data set.
        clip: Index or name of the clip.
        out: Folder for the pictures, created if it is not there.
    Returns:
        Paths of the PNG and of the GIF, named after the clip.
    Raises:
        ValueError: If there is no such clip, or `out` cannot be written.
    """
    dataset = path if isinstance(path, PackedDataset) else open_dataset(path)
    index = dataset.index_of(clip) if isinstance(clip, str) else clip
    frames = dataset.clip(index)
    name = str(dataset.names[index])
    label = int(dataset.labels[index])
    about = [name]
    if label >= 0:
        about.append(dataset.class_names[label] if dataset.class_names else f"class {label}")
    scene = project(dataset, frames)
    folder = Path(out)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".") or f"clip-{index}"
    png, gif = folder / f"{stem}.png", folder / f"{stem}.gif"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(png) as scratch:
            _strip(dataset, scene, " · ".join([*about, f"{len(frames)} frames"]), scratch)
        with atomic_write(gif) as scratch:
            _movie(dataset, scene, " · ".join(about), scratch)
    except OSError as error:
        raise ValueError(
            f"show: out must be writable, got {error.strerror or error}, in {folder}. Make room or choose another."
        ) from error
    return png, gif


@dataclass(frozen=True)
class Scene:
    """A clip as it is drawn.

    Attributes:
        points: Joints in the picture plane, (T, M, V, 2), second axis up.
        shadows: Their shadows on the ground, (T, M, V, 2), for data in space.
        present: Joints that are there, (T, M, V).
    """

    points: NDArray[np.float64]
    shadows: NDArray[np.float64] | None
    present: NDArray[np.bool_]

    def bounds(self, frames: slice) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Least and largest coordinates, (2,) each, of what is drawn in some frames."""
        shown = self.present[frames]
        points = self.points[frames][shown]
        if self.shadows is not None:
            points = np.concatenate([points, self.shadows[frames][shown]])
        if len(points) == 0:
            return np.zeros(2), np.ones(2)
        return points.min(axis=0), points.max(axis=0)


def project(dataset: PackedDataset, frames: NDArray[np.float32]) -> Scene:
    """Project a clip of a data set, (T, M, V, C), onto a picture; data in space are seen a little from the side."""
    present = np.asarray(frames.any(axis=-1))
    if dataset.meta["normalisation"] != "none":
        # a centred body has its centre joint at the origin
        present[:, :, dataset.topology.centre] |= present.any(axis=2)
    channels, up_axis = dataset.meta["channels"], str(dataset.meta["up_axis"])
    spatial = len(channels) >= 3 and channels[2] not in ("score", "confidence")
    sign = -1.0 if up_axis.startswith("-") else 1.0
    values = np.zeros((*frames.shape[:3], 3))
    values[..., : 3 if spatial else 2] = frames[..., : 3 if spatial else 2]
    up = np.zeros(3)
    up["xyz".index(up_axis[-1])] = sign
    # the camera looks along z, or along y where z points up
    depth = np.array([0.0, 1.0, 0.0]) if up_axis.endswith("z") else np.array([0.0, 0.0, 1.0])
    right = np.cross(depth, up) if spatial else np.abs(np.cross(depth, up))
    scene = values @ np.stack([right, up, depth]).T
    if not spatial:
        return Scene(scene[..., :2], None, present)
    middle = scene[present].mean(axis=0) if present.any() else np.zeros(3)
    scene = scene - middle
    floor = scene.copy()
    floor[..., 1] = scene[present][:, 1].min() if present.any() else 0.0
    return Scene(_seen(scene), _seen(floor), present)


def _seen(scene: NDArray[np.float64]) -> NDArray[np.float64]:
    # turn about the vertical, then look down: (..., 3) to picture coordinates (..., 2)
    across = scene[..., 0] * np.cos(_YAW) + scene[..., 2] * np.sin(_YAW)
    away = scene[..., 2] * np.cos(_YAW) - scene[..., 0] * np.sin(_YAW)
    return np.stack([across, scene[..., 1] * np.cos(_PITCH) + away * np.sin(_PITCH)], axis=-1)


def _draw(axes: Axes, dataset: PackedDataset, scene: Scene, frame: int, size: float) -> None:
    from matplotlib.collections import LineCollection

    topology = dataset.topology
    part_of = {joint: part for part, joints in topology.parts.items() for joint in joints}
    # a tree that follows the body where the layout has one beside the field's
    edges = topology.edges("plain" if "plain" in topology.bones else None)
    for body in range(scene.points.shape[1]):
        present = scene.present[frame, body]
        drawn = [(child, parent) for child, parent in edges if present[child] and present[parent]]
        colours = [_COLOURS[part_of[child]] for child, _ in drawn]
        if scene.shadows is not None:
            shadow = [scene.shadows[frame, body, list(edge)] for edge in drawn]
            axes.add_collection(
                LineCollection(shadow, colors=_SHADOW, linewidths=1.6 * size, capstyle="round", zorder=1)
            )
        bones = [scene.points[frame, body, list(edge)] for edge in drawn]
        axes.add_collection(LineCollection(bones, colors=colours, linewidths=1.6 * size, capstyle="round", zorder=2))
        joints = np.flatnonzero(present)
        points = scene.points[frame, body, joints]
        face = [_COLOURS[part_of[int(joint)]] for joint in joints]
        axes.scatter(
            points[:, 0], points[:, 1], s=5.0 * size**2, c=face, edgecolors=_BACKGROUND, linewidths=0.5, zorder=3
        )


def _frame_axes(axes: Axes, low: NDArray[np.float64], high: NDArray[np.float64]) -> None:
    margin = _MARGIN * max(*(high - low), 1e-6)
    axes.set_xlim(low[0] - margin, high[0] + margin)
    axes.set_ylim(low[1] - margin, high[1] + margin)
    axes.set_aspect("equal")
    axes.set_axis_off()


def _strip(dataset: PackedDataset, scene: Scene, title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    total = len(scene.points)
    chosen = np.unique(np.linspace(0, total - 1, _POSES).round().astype(int))
    bounds = [scene.bounds(slice(frame, frame + 1)) for frame in chosen]
    # windows share their scale and height, and follow the bodies sideways: nobody walks out of the picture
    low, high = np.min([low for low, _ in bounds], axis=0), np.max([high for _, high in bounds], axis=0)
    bounds = [(np.array([left[0], low[1]]), np.array([right[0], high[1]])) for left, right in bounds]
    span = np.max([high - low for low, high in bounds], axis=0)
    span = np.maximum(span, 0.25 * span.max())
    height = 3.2
    width = max(1.1, height * (span[0] + 2 * _MARGIN * span.max()) / (span[1] + 2 * _MARGIN * span.max()))
    figure = Figure(figsize=(max(len(chosen) * width, 4.0), height + 0.9), dpi=110, facecolor=_BACKGROUND)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, color=_INK, y=0.97)
    for place, (frame, (low, high)) in enumerate(zip(chosen, bounds, strict=True)):
        axes = figure.add_axes((place / len(chosen), 0.09, 1 / len(chosen), 0.78))
        middle = (low + high) / 2
        _frame_axes(axes, middle - span / 2, middle + span / 2)
        _draw(axes, dataset, scene, int(frame), size=1.6)
        figure.text((place + 0.5) / len(chosen), 0.035, f"frame {frame}", ha="center", fontsize=9, color=_GREY)
    figure.savefig(path, format="png", facecolor=_BACKGROUND, metadata={"Software": None})


def _movie(dataset: PackedDataset, scene: Scene, title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    total = len(scene.points)
    stride = -(-total // _GIF_FRAMES)
    low, high = scene.bounds(slice(None))
    figure = Figure(figsize=(4.2, 4.6), dpi=90, facecolor=_BACKGROUND)
    canvas: Any = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.06, 1.0, 0.86))
    _frame_axes(axes, low, high)
    figure.text(0.5, 0.945, title, ha="center", fontsize=11, color=_INK)
    counter = figure.text(0.5, 0.025, "", ha="center", fontsize=9, color=_GREY)
    pictures: list[Any] = []
    for frame in range(0, total, stride):
        for drawn in list(axes.collections):
            drawn.remove()
        _draw(axes, dataset, scene, frame, size=2.0)
        counter.set_text(f"frame {frame} of {total}")
        canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
        pictures.append(picture.quantize(colors=64, dither=Image.Dither.NONE))
    duration = _GIF_MILLISECONDS * stride
    pictures[0].save(path, format="GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0)
