"""Kinetics-400 as PYSKL publishes it: one pickle that lists the clips, and pickles with the joints of everybody in them.

After tools/data/README.md of PYSKL: an annotation of `k400_hrnet.pkl` has `frame_dir`, `label`, `img_shape`, `total_frames`,
`raw_file` (the pickle with its joints), `frame_inds` (N,), the frame of each detected person, and `box_score` (N,). A pickle of
joints maps `frame_dir` to `keypoint`, (N, V, 3): x, y and score.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from fastskel.data.formats.clip_labels import wrong_option
from fastskel.data.formats.format import unreadable
from fastskel.data.formats.plain_pickle import load_pickle
from fastskel.data.formats.prepared import (
    PREPARED,
    PreparedClips,
    PreparedFormat,
    PreparedOptions,
    existing,
    layout,
    plain_list,
    whole_labels,
)
from fastskel.data.formats.pyskl import image_size, named_splits

__all__ = ["PysklKineticsOptions", "open_pyskl_kinetics"]

_LIST = "k400_hrnet.pkl"


@dataclass(frozen=True)
class PysklKineticsOptions(PreparedOptions):
    """Where the joints are, and which persons become bodies of a clip.

    Attributes:
        dataset: Data set that the clips are from.
        topology: Skeleton; auto goes by the number of joints.
        units: Unit of the coordinates; auto is pixels.
        up_axis: Axis that points up; auto is -y.
        keypoint_files: Folder of the pickles with joints; none: where `raw_file` says, from the folder of the list on.
        num_bodies: Most bodies of a clip. Where a frame of it shows more persons, they are put in order by the sum of their
            joints' scores, frame by frame, as PYSKL's DecompressPose does (with 10): a body is no identity over time.
        box_score: Least score of a person's box, as `box_thr` of PYSKL; persons below are left out. The published list has
            none below 0.5.
    """

    dataset: str = "kinetics-400"
    keypoint_files: Path | None = None
    num_bodies: int = 2
    box_score: float = 0.0

    def __post_init__(self) -> None:
        if type(self.num_bodies) is not int or self.num_bodies < 1:
            raise wrong_option("num_bodies", "a whole number of at least 1", repr(self.num_bodies), "Pass a count")
        if type(self.box_score) not in (int, float) or not 0 <= self.box_score <= 1:
            raise wrong_option("box_score", "a number from 0 to 1", repr(self.box_score), "Pass one")


class _FrameNumbers(Sequence[NDArray[Any]]):
    """Frame of the video of each frame of a clip, (T,) each, made when it is asked for."""

    def __init__(self, annotations: Sequence[Mapping[str, Any]], least: float) -> None:
        self.annotations = annotations
        self.least = least

    def __len__(self) -> int:
        return len(self.annotations)

    @overload
    def __getitem__(self, index: int) -> NDArray[Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[NDArray[Any]]: ...
    def __getitem__(self, index: int | slice) -> NDArray[Any] | list[NDArray[Any]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        annotation = self.annotations[index]
        numbers = np.unique(annotation["frame_inds"][_kept(annotation, self.least)])
        # hundreds of thousands of clips: two bytes a frame
        return numbers.astype(np.uint16 if numbers[-1] < 1 << 16 else np.uint32)


def open_pyskl_kinetics(path: Path, options: PysklKineticsOptions) -> PreparedClips:
    """Open the list of clips, and their joints file by file.

    Args:
        path: `k400_hrnet.pkl`, or the folder that it lies in. It is held in memory but for its arrays, which are mapped.
        options: Where the joints are and which persons are kept.
    Returns:
        The clips, (T, M, V, 3) each, x and y in pixels and the score of each joint, sorted by the file of their joints. T are
        the frames that show somebody; the column `frame` has their numbers in the video. Clips without anybody are skipped.
    Raises:
        ValueError: If a file is damaged or missing, or an annotation is incomplete, naming it.
    """
    path = existing(path, _LIST) if path.is_dir() else path
    content = load_pickle(path)
    lists = content if isinstance(content, dict) else {"annotations": content}
    annotations = plain_list(lists.get("annotations"), "with a list of annotations", path)
    places = _Places(path.parent if options.keypoint_files is None else Path(options.keypoint_files), path)
    found: list[tuple[Path, Mapping[str, Any]]] = []
    skipped: list[tuple[str, str]] = []
    for number, annotation in enumerate(annotations):
        _check(number, annotation, options.box_score, path)
        if len(_kept(annotation, options.box_score)) == 0:
            skipped.append((annotation["frame_dir"], "no person"))
        else:
            found.append((places.file(annotation["raw_file"]), annotation))
    if not found:
        raise unreadable("with at least one clip", "none", str(path))
    found.sort(key=lambda pair: pair[0])
    files, kept = [file for file, _ in found], [annotation for _, annotation in found]
    names = [annotation["frame_dir"] for annotation in kept]
    columns: dict[str, Any] = {"frame": _FrameNumbers(kept, options.box_score)}
    if all("img_shape" in annotation for annotation in kept):
        sizes = [image_size(annotation, name, path) for annotation, name in zip(kept, names)]
        columns |= {"image_height": [size[0] for size in sizes], "image_width": [size[1] for size in sizes]}
    first = _keypoint(load_pickle(files[0]), kept[0], files[0])
    return PreparedClips(
        clips=_clips(files, kept, options),
        names=names,
        labels=whole_labels([annotation.get("label", -1) for annotation in kept], path),
        topology=layout(options, first.shape[1], files[0]),
        channels=("x", "y", "score"),
        units="pixels" if options.units == "auto" else options.units,
        up_axis="-y" if options.up_axis == "auto" else options.up_axis,
        columns=columns,
        splits=named_splits(lists.get("split", {}), names, skipped, path),
        skipped=skipped,
    )


def _check(number: int, annotation: Any, least: float, path: Path) -> None:
    if not isinstance(annotation, dict):
        raise unreadable("with annotations that are dicts", f"{type(annotation).__name__} {number}", str(path))
    name = annotation.get("frame_dir")
    for key in ("frame_dir", "raw_file"):
        if not isinstance(annotation.get(key), str):
            actual = f"{reprlib.repr(annotation.get(key))} in annotation {number}"
            raise unreadable(f"with annotations that have a {key}", actual, str(path))
    numbers, total = annotation.get("frame_inds"), annotation.get("total_frames")
    if not isinstance(total, (int, np.integer)) or isinstance(total, bool) or total < 0:
        raise unreadable("with whole total_frames", f"{reprlib.repr(total)} in {name!r:.80}", str(path))
    if not isinstance(numbers, np.ndarray) or numbers.dtype.kind not in "iu" or numbers.ndim != 1:
        actual = f"{getattr(numbers, 'dtype', type(numbers).__name__)} in {name!r:.80}"
        raise unreadable("with frame_inds that are an array of whole numbers, (N,)", actual, str(path))
    if len(numbers) and (numbers[0] < 0 or numbers[-1] >= total or (numbers[1:] < numbers[:-1]).any()):
        contract = "with frame_inds from 0 to total_frames that never fall"
        raise unreadable(contract, f"{reprlib.repr(numbers.tolist())} of {total} in {name!r:.80}", str(path))
    scores = annotation.get("box_score")
    if scores is None and least == 0:
        return
    if not isinstance(scores, np.ndarray) or scores.dtype.kind != "f" or scores.shape != numbers.shape:
        actual = f"{getattr(scores, 'shape', type(scores).__name__)} in {name!r:.80}"
        raise unreadable(f"with box_score of shape {numbers.shape}", actual, str(path))


def _kept(annotation: Mapping[str, Any], least: float) -> NDArray[np.intp]:
    """Persons of a clip whose box is sure enough, (K,)."""
    if least == 0:
        return np.arange(len(annotation["frame_inds"]))
    return np.flatnonzero(annotation["box_score"] >= least)


class _Places:
    """Finds the files of joints below a folder; what a list says about them is never taken as a path as it is."""

    def __init__(self, folder: Path, path: Path) -> None:
        self.folder = folder
        self.path = path
        self.files: dict[str, Path] = {}

    def file(self, raw: str) -> Path:
        if raw not in self.files:
            # data/k400/kpfiles/1.pkl lies beside data/k400/k400_hrnet.pkl as kpfiles/1.pkl
            parts = [part for part in PurePosixPath(raw).parts if part not in ("/", "..")]
            ends = (self.folder.joinpath(*parts[start:]) for start in range(len(parts)))
            file = next((end for end in ends if end.is_file()), None)
            if file is None:
                action = "Put the files of joints beside the list, or name their folder with keypoint_files"
                raise unreadable("with its files of joints", f"no {raw!r:.120} from {self.folder} on", str(self.path), action)
            self.files[raw] = file
        return self.files[raw]


def _keypoint(content: Any, annotation: Mapping[str, Any], file: Path) -> NDArray[Any]:
    name, count = annotation["frame_dir"], len(annotation["frame_inds"])
    entry = content.get(name) if isinstance(content, dict) else None
    keypoint = entry.get("keypoint") if isinstance(entry, dict) else None
    if keypoint is None:
        raise unreadable("with the keypoint of its clips", f"none of {name!r:.80}", str(file))
    if not isinstance(keypoint, np.ndarray) or keypoint.dtype.kind != "f" or keypoint.ndim != 3:
        actual = f"{getattr(keypoint, 'shape', type(keypoint).__name__)} in {name!r:.80}"
        raise unreadable("with keypoint arrays of floats, (N, V, 3)", actual, str(file))
    if len(keypoint) != count or keypoint.shape[2] != 3:
        raise unreadable(f"with keypoint of shape ({count}, V, 3)", f"{keypoint.shape} in {name!r:.80}", str(file))
    return keypoint


def _clips(
    files: Sequence[Path], annotations: Sequence[Mapping[str, Any]], options: PysklKineticsOptions
) -> Iterator[NDArray[np.float32]]:
    opened, content = None, None
    for file, annotation in zip(files, annotations):
        if file != opened:
            opened, content = file, load_pickle(file)
        kept = _kept(annotation, options.box_score)
        keypoint = _keypoint(content, annotation, file)[kept].astype(np.float32)
        yield _bodies(keypoint, annotation["frame_inds"][kept], options.num_bodies)


def _bodies(keypoint: NDArray[np.float32], numbers: NDArray[Any], num_bodies: int) -> NDArray[np.float32]:
    """Put persons (K, V, 3) in frames, whose numbers (K,) never fall, as bodies: (T, M, V, 3) with M at most num_bodies."""
    _, starts, frames, counts = np.unique(numbers, return_index=True, return_inverse=True, return_counts=True)
    order = np.arange(len(keypoint))
    if counts.max() > num_bodies:
        # stable: equal scores stay in the order of the file
        order = np.lexsort((-keypoint[:, :, 2].sum(axis=1, dtype=np.float64), frames))
    rank = np.arange(len(keypoint)) - starts[frames]
    kept = rank < num_bodies
    clip = np.zeros((len(counts), min(int(counts.max()), num_bodies), *keypoint.shape[1:]), np.float32)
    clip[frames[kept], rank[kept]] = keypoint[order[kept]]
    return clip


PREPARED.add(
    "pyskl-kinetics",
    PreparedFormat(
        open=open_pyskl_kinetics,
        options=PysklKineticsOptions(),
        about="k400_hrnet.pkl and its folder kpfiles with the joints of everybody in Kinetics-400 (17 joints in 2-D), as PYSKL "
        "publishes them",
    ),
)
