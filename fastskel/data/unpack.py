"""Writes a packed data set as the files that other tools of the field load; `fastskel pack` reads them back."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fastskel.atomic import atomic_write
from fastskel.data.packed import PackedDataset
from fastskel.data.pickle_writer import Items, write_pickle
from fastskel.data.protocols import protocols as known_protocols
from fastskel.data.protocols import split
from fastskel.data.writer import destination
from fastskel.registry import Registry

__all__ = ["UNPACKERS", "FixedSize", "PysklContent", "Unpacker", "unpack_agcn", "unpack_ctr_gcn", "unpack_pyskl"]

Destination = str | os.PathLike[str]


@dataclass(frozen=True)
class FixedSize:
    """Size of the arrays, and whose parts they are.

    Attributes:
        protocol: Protocol whose training and test part are written; without one, all clips are the training part.
        frames: Frames T of every clip; behind its own it is zero.
        bodies: Bodies M of every clip; bodies that it lacks are zero.
    """

    protocol: str | None = None
    frames: int = 300
    bodies: int = 2


@dataclass(frozen=True)
class PysklContent:
    """What goes into the pickle.

    Attributes:
        protocols: Protocols whose parts are written; by default all that the data set has.
    """

    protocols: tuple[str, ...] = ()


def unpack_agcn(dataset: PackedDataset, dst: Destination, options: FixedSize = FixedSize()) -> None:
    """Write the files of 2s-AGCN and UmURL.

    Args:
        dataset: Packed data set.
        dst: Folder to create, with {train,val}_data_joint.npy, (N, C, T, V, M) float32, {train,val}_label.pkl, the pair of
            names and labels, and {train,val}_num_frame.npy, (N,) int64.
        options: Size of the arrays, and the protocol.
    Raises:
        ValueError: If a clip does not fit, the protocol is unknown, or `dst` exists or cannot be written.
    """
    parts = _sized_parts("unpack_agcn", dataset, options)
    with destination("unpack_agcn", dst) as scratch:
        for part, clips in parts.items():
            name = "val" if part == "test" else part
            shape = (len(clips), dataset.channels, options.frames, dataset.topology.num_joints, options.bodies)
            with (scratch / f"{name}_data_joint.npy").open("wb") as file:
                _write_header(file, "<f4", shape)
                for clip in clips.tolist():
                    file.write(_padded(dataset, clip, options).transpose(3, 0, 2, 1).tobytes())
            with (scratch / f"{name}_num_frame.npy").open("wb") as file:
                _write_header(file, "<i8", (len(clips),))
                file.write(dataset.num_frames[clips].astype("<i8").tobytes())
            with (scratch / f"{name}_label.pkl").open("wb") as file:
                write_pickle(file, (dataset.names[clips].tolist(), dataset.labels[clips].tolist()))


def unpack_ctr_gcn(dataset: PackedDataset, dst: Destination, options: FixedSize = FixedSize()) -> None:
    """Write the file of CTR-GCN and MAMP.

    Args:
        dataset: Packed data set of three channels in which every clip has a label.
        dst: `.npz` file to create, with x_train and x_test, (N, T, M*V*3) float32, and y_train and y_test, one-hot,
            (N, K) float64. It holds no names and no counts: a zero frame at the end of a clip is lost.
        options: Size of the arrays, and the protocol.
    Raises:
        ValueError: If a clip does not fit, the protocol is unknown, or `dst` exists or cannot be written.
    """
    function = "unpack_ctr_gcn"
    parts = _sized_parts(function, dataset, options)
    if dataset.channels != 3:
        raise _fault(function, "data set", "of three channels", dataset.channels, dataset, "Choose another format")
    if dataset.labels.min() < 0:
        clip = dataset.names[int(dataset.labels.argmin())]
        raise _fault(function, "data set", "labelled throughout", f"none for {clip}", dataset, "Choose another format")
    num_classes = len(dataset.class_names) or int(dataset.labels.max()) + 1
    one_hot = np.eye(num_classes, dtype="<f8")
    with _new_file(function, dst) as scratch, zipfile.ZipFile(scratch, "w") as archive:
        for part, clips in parts.items():
            shape = (len(clips), options.frames, options.bodies * dataset.topology.num_joints * 3)
            with _member(archive, f"x_{part}.npy") as file:
                _write_header(file, "<f4", shape)
                for clip in clips.tolist():
                    file.write(_padded(dataset, clip, options).tobytes())
            with _member(archive, f"y_{part}.npy") as file:
                _write_header(file, "<f8", (len(clips), num_classes))
                for label in dataset.labels[clips].tolist():
                    file.write(one_hot[label].tobytes())


def unpack_pyskl(dataset: PackedDataset, dst: Destination, options: PysklContent = PysklContent()) -> None:
    """Write the pickle of PYSKL.

    Args:
        dataset: Packed data set of channels x and y, with score or z or neither.
        dst: `.pkl` file to create: {"split": {"<protocol>_train": names, "<protocol>_val": names}, "annotations": [...]},
            with frame_dir, label, total_frames, keypoint, (M, T, V, 2 or 3) float32, for 2-D joints keypoint_score,
            (M, T, V) float32, and img_shape where the data set has the columns image_height and image_width.
        options: Which protocols.
    Raises:
        ValueError: If the channels are others, a protocol is unknown, or `dst` exists or cannot be written.
    """
    channels = tuple(dataset.meta["channels"])
    if channels not in (("x", "y"), ("x", "y", "score"), ("x", "y", "z")):
        contract = "of channels x y, x y score or x y z"
        raise _fault("unpack_pyskl", "data set", contract, " ".join(channels), dataset, "Choose another format")
    splits: dict[str, list[str]] = {}
    for protocol in options.protocols or known_protocols(dataset):
        parts = split(dataset, protocol)
        splits[f"{protocol}_train"] = dataset.names[parts.train].tolist()
        splits[f"{protocol}_val"] = dataset.names[parts.test].tolist()
    with _new_file("unpack_pyskl", dst) as scratch, scratch.open("wb") as file:
        write_pickle(file, {"split": splits, "annotations": Items(_annotations(dataset, "score" in channels))})


def _annotations(dataset: PackedDataset, scored: bool) -> Iterator[dict[str, Any]]:
    sized = {"image_height", "image_width"} <= set(dataset.columns)
    for number, name in enumerate(dataset.names.tolist()):
        frames = dataset.clip(number)
        seen = np.flatnonzero(frames.any(axis=(0, 2, 3)))
        # bodies behind the last that is seen are padding
        frames = frames[:, : seen[-1] + 1 if len(seen) else 1].transpose(1, 0, 2, 3)
        annotation: dict[str, Any] = {"frame_dir": name, "label": dataset.labels[number], "total_frames": frames.shape[1]}
        if sized:
            size = tuple(int(dataset.columns[f"image_{side}"][number]) for side in ("height", "width"))
            annotation |= {"img_shape": size, "original_shape": size}
        if scored:
            annotation |= {"keypoint": frames[..., :2], "keypoint_score": frames[..., 2]}
        else:
            annotation["keypoint"] = frames
        yield annotation


def _fault(function: str, argument: str, contract: str, actual: object, dataset: PackedDataset, action: str) -> ValueError:
    return ValueError(f"{function}: {argument} must be {contract}, got {actual}, in {dataset.path}. {action}.")


def _sized_parts(function: str, dataset: PackedDataset, options: FixedSize) -> dict[str, NDArray[np.int64]]:
    lengths = dataset.num_frames
    for argument, given, needed in (
        ("frames", options.frames, int(lengths.max())),
        ("bodies", options.bodies, dataset.num_bodies_max),
    ):
        if type(given) is not int or given < needed:
            contract = f"at least {needed}, as the data set has"
            raise _fault(function, argument, contract, given, dataset, "Raise it")
    if options.protocol is None:
        return {"train": np.arange(len(dataset), dtype=np.int64)}
    parts = split(dataset, options.protocol)
    return {"train": parts.train, "test": parts.test}


def _padded(dataset: PackedDataset, clip: int, options: FixedSize) -> NDArray[np.float32]:
    frames = dataset.clip(clip)
    room = np.zeros((options.frames, options.bodies, *frames.shape[2:]), dtype="<f4")
    room[: len(frames), : frames.shape[1]] = frames
    return room


def _write_header(file: IO[bytes], descr: str, shape: Sequence[int]) -> None:
    npy.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": tuple(shape)})


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    # the date of ZipInfo's default: the same data give the same bytes; sizes are known only at the end
    return archive.open(zipfile.ZipInfo(name), "w", force_zip64=True)


@contextlib.contextmanager
def _new_file(function: str, dst: Destination) -> Iterator[Path]:
    path = Path(dst)
    if path.exists() or path.is_symlink():
        raise ValueError(f"{function}: destination must be new, got the existing {path}. Remove it or choose another.")
    try:
        with atomic_write(path) as scratch:
            yield scratch
    except OSError as error:
        reason = error.strerror or error
        action = "Make room or choose another"
        raise ValueError(f"{function}: destination must be writable, got {reason}, in {path}. {action}.") from error


@dataclass(frozen=True)
class Unpacker:
    """How to write one kind of files from clips (T, M, V, C).

    Attributes:
        write: Writes (data set, destination, options).
        options: Frozen dataclass with the defaults of what a user may choose.
        about: What is written, in one line.
    """

    write: Callable[..., None]
    options: Any
    about: str


UNPACKERS: Registry[Unpacker] = Registry("format")
UNPACKERS.add("agcn", Unpacker(unpack_agcn, FixedSize(), "folder of .npy and .pkl files, as 2s-AGCN, UmURL and USDRL read it"))
UNPACKERS.add("ctr-gcn", Unpacker(unpack_ctr_gcn, FixedSize(), "one .npz file, as CTR-GCN, MAMP and STARS read it"))
UNPACKERS.add("pyskl", Unpacker(unpack_pyskl, PysklContent(), "one .pkl file, as PYSKL and ProtoGCN read it"))
