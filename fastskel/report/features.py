"""What the run's features look like, and what they rest on: a map of test clips, and occlusion of joints and frames."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastskel.data.packed import PackedDataset
from fastskel.data.protocols import split
from fastskel.data.views import ViewSpec
from fastskel.evaluate import dataset_features
from fastskel.evaluate.classifier import adapted_again
from fastskel.evaluate.report import project_2d
from fastskel.models.encoder import Encoder
from fastskel.report.found import Found
from fastskel.report.insight import Occlusion, evenly, occlusion
from fastskel.report.markup import Markup, element, join
from fastskel.report.motion import SIDE, bones, placed
from fastskel.report.pictures import data_table, scatter, strip
from fastskel.train import choose_device, load_encoder

__all__ = ["Shown", "embedding_map", "encoder_of", "occlusion_maps", "shown_clips"]

# points of a map: more lie upon each other
MAX_POINTS = 1200
# radius of the joint that matters most, in units of the picture
LARGEST = 9


@dataclass(frozen=True)
class Shown:
    """Clips that the map and the occlusion are of.

    Attributes:
        dataset: Packed data set.
        clips: Clips, (N,).
        part: What they are, in words.
    """

    dataset: PackedDataset
    clips: NDArray[np.int64]
    part: str


def shown_clips(found: Found, dataset: PackedDataset, identity: str) -> Shown:
    """Choose clips (N,) to show: the labelled test clips of the protocol that results on this data set, or the run, used."""
    recipe = found.config.get("recipe")
    used = [result.values.get("protocol") for result in found.results if result.identity == identity]
    used += [recipe.get("protocol")] if isinstance(recipe, dict) else []
    labels = np.asarray(dataset.labels)
    for protocol in dict.fromkeys(name for name in used if isinstance(name, str)):
        try:
            test = split(dataset, protocol).test
        except ValueError:
            # the name of a split file, whose clips are not known here
            continue
        if (labels[test] >= 0).any():
            return Shown(dataset, test[labels[test] >= 0], f"test clips of {protocol}")
    return Shown(dataset, np.arange(len(dataset)), "clips (all, as no protocol of the data set is known to be used)")


def embedding_map(encoder: Encoder, view: ViewSpec, shown: Shown, found: Found, *, device: str, progress: bool) -> Markup:
    """Draw features (N, F) of the clips on their two main axes; they come from the run's cache where they are."""
    dataset = shown.dataset
    rows = dataset_features(
        encoder, dataset, view, shown.clips, device=choose_device(device), cache=found.base / "features", progress=progress
    )
    points, shares = project_2d(rows.features)
    labels = rows.labels.numpy()
    drawn = np.unique(np.linspace(0, len(labels) - 1, min(MAX_POINTS, len(labels))).round().astype(int))
    names = dataset.class_names
    told = [
        f"{dataset.names[clip]}: {names[label] if 0 <= label < len(names) else f'class {label}'}"
        for clip, label in zip(shown.clips[drawn].tolist(), labels[drawn].tolist(), strict=True)
    ]
    some = f", {len(drawn)} of them drawn" if len(drawn) < len(labels) else ""
    spoken = (
        f"Features of {len(labels)} {shown.part}{some}, on their two main axes: {100 * shares[0]:.0f} % and "
        f"{100 * shares[1]:.0f} % of the variance; coloured by class"
    )
    return scatter(points.numpy()[drawn], labels[drawn], told, names, spoken)


def _body(dataset: PackedDataset, measured: Occlusion) -> Markup:
    """A pose of the clip that lacks fewest joints, a disc on each joint as large as what it changes."""
    clips = [np.asarray(dataset.clip(clip)) for clip in measured.clips.tolist()]
    clip = max(clips, key=lambda frames: int(frames.any(axis=(0, 3)).sum()))
    poses = placed(dataset, clip)
    # the frame that shows most joints, the first of them
    pose = poses[int((poses >= 0).all(-1).sum(1).argmax())]
    parts = [
        element("line", class_=f"bone b{side}", x1=a[0], y1=a[1], x2=b[0], y2=b[1])
        for side, child, parent in bones(dataset.topology, clip.shape[1])
        if (a := pose[child].tolist())[0] >= 0 and (b := pose[parent].tolist())[0] >= 0
    ]
    largest = max(float(np.nanmax(measured.joints, initial=0.0)), 1e-12)
    for place, (x, y) in enumerate(pose.tolist()):
        change = float(measured.joints[place % len(measured.joints)])
        if x >= 0 and math.isfinite(change):
            title = element("title", f"{dataset.topology.joints[place % len(measured.joints)]}: {change:.4f}")
            # the area tells the change
            radius = f"{1 + LARGEST * math.sqrt(max(change, 0) / largest):.1f}"
            parts.append(element("circle", title, class_="joint", cx=x, cy=y, r=radius, fill_opacity=0.75))
    spoken = "Change of the features when a joint is hidden: the area of its disc"
    picture = element("svg", *parts, viewBox=f"0 0 {SIDE} {SIDE}", role="img", aria_label=spoken, class_="body")
    return element("figure", picture, element("figcaption", spoken))


def occlusion_maps(encoder: Encoder, view: ViewSpec, shown: Shown, *, clips: int, device: str, progress: bool) -> Markup:
    """Measure and draw what features of clips (N, T, M, V, C) rest on: joints on a skeleton, stretches of time in a row."""
    dataset = shown.dataset
    chosen = evenly(shown.clips, np.asarray(dataset.labels)[shown.clips], clips)
    measured = occlusion(encoder, dataset, view, chosen, device=device, progress=progress)
    told = [
        f"frames {first} to {end - 1} of {view.frames}: {change:.4f}"
        for first, end, change in zip(measured.bounds, measured.bounds[1:], measured.stretches.tolist())
    ]
    names = dataset.topology.joints
    order = sorted(range(len(names)), key=lambda joint: -np.nan_to_num(measured.joints[joint], nan=-1.0))
    rows = [
        (names[joint], f"{measured.joints[joint]:.4f}" if np.isfinite(measured.joints[joint]) else "always zero in the view")
        for joint in order
    ]
    about = (
        f"How much the features change (1 - cosine, mean over {len(chosen)} {shown.part}) when one joint, or one stretch of "
        "frames, is set to zero, as if the sensor had lost it. Large: the features rest on it. It says nothing of why."
    )
    table = element("details", element("summary", "All joints"), data_table(("joint", "change"), rows, "Change by joint"))
    values = np.nan_to_num(measured.stretches).tolist()
    over_time = strip(values, told, "Change of the features when a stretch of frames is hidden, from the clip's start to its end")
    return join([element("p", about), element("div", _body(dataset, measured), over_time, class_="charts"), table])


def encoder_of(found: Found) -> tuple[Encoder, ViewSpec]:
    """Load the run's encoder, and how views (N, T, M, V, C) are made for it.

    Raises:
        ValueError: If the run is a published file, which does not say how it is built, or its checkpoint is damaged.
    """
    if found.run.is_file():
        raise ValueError("a published file does not record its encoder's settings, so that its features are not computed here.")
    encoder, view, checkpoint = load_encoder(found.run)
    # what a transfer fine-tuned reads clips of the data it was adapted to
    return adapted_again(encoder, checkpoint.state["encoder"]), view
