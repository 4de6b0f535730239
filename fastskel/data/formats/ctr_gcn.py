"""Prepared files of CTR-GCN and MAMP: one `.npz` with x_train, y_train, x_test and y_test, read as a stream."""

from __future__ import annotations

import lzma
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fastskel.data.formats.format import unreadable
from fastskel.data.formats.prepared import (
    PREPARED,
    PreparedClips,
    PreparedFormat,
    PreparedOptions,
    layout,
    trimmed,
    whole_labels,
)
from fastskel.data.npy_file import read_npy_header
from fastskel.skeleton import topology

__all__ = ["CtrGcnOptions", "open_ctr_gcn"]

# 300 frames of two bodies are 180 kB; whatever is larger is no clip
MAX_ROW_BYTES = 64 << 20
# deflate makes a byte of at most so many
MAX_RATIO = 1032
_DAMAGED = (ValueError, OSError, EOFError, TypeError, SyntaxError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
_PARTS = ("train", "test")


@dataclass(frozen=True)
class CtrGcnOptions(PreparedOptions):
    """What the file does not say about itself.

    Attributes:
        dataset: Data set that the clips are from. ntu60 and ntu120 bring class names.
        topology: Skeleton; auto is ntu-25.
        units: Unit of the coordinates; auto is metres.
        up_axis: Axis that points up; auto is y.
        protocol: Protocol that the two parts belong to; auto is the name of the file behind its first underscore:
            cs of NTU60_CS.npz.
    """

    protocol: str = "auto"


def open_ctr_gcn(path: Path, options: CtrGcnOptions) -> PreparedClips:
    """Open an archive of clips as rows of numbers, (N, T, M*V*3) each part; clips are read as a stream.

    Args:
        path: `.npz` file; `y_train` and `y_test` are one-hot, (N, K), or whole numbers, (N,).
        options: What the file does not say.
    Returns:
        The clips, (T, M, V, 3) each, up to their last frame that is not zero, named by part and number.
    Raises:
        ValueError: If the file is damaged or has no such arrays.
    """
    skeleton = topology("ntu-25" if options.topology == "auto" else options.topology)
    size = skeleton.num_joints * 3
    labels: list[NDArray[np.int64]] = []
    splits: dict[str, list[str]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            present = [part for part in _PARTS if f"x_{part}.npy" in archive.namelist()]
            for part in present:
                shape = _shape(archive, f"x_{part}", path)
                if len(shape) != 3 or shape[2] % size or 0 in shape:
                    contract = f"x_{part} of shape (N, T, bodies * {size})"
                    raise unreadable(contract, shape, str(path), "Name another topology")
                labels.append(_labels(archive, part, shape[0], path))
                splits[part] = [f"{part}-{number:06d}" for number in range(shape[0])]
    except _DAMAGED as error:
        raise _damaged(error, path) from error
    if not present:
        raise unreadable("an .npz file with x_train or x_test", "none", str(path), "Correct the path")
    protocol = path.stem.partition("_")[2].lower() or path.stem if options.protocol == "auto" else options.protocol
    return PreparedClips(
        clips=_clips(path, present, skeleton.num_joints),
        names=[name for part in present for name in splits[part]],
        labels=np.concatenate(labels),
        topology=layout(options, skeleton.num_joints, path),
        channels=("x", "y", "z"),
        units="metres" if options.units == "auto" else options.units,
        up_axis="y" if options.up_axis == "auto" else options.up_axis,
        splits={protocol: splits},
    )


def _damaged(error: BaseException, path: Path) -> ValueError:
    if str(error).startswith("pack_source:"):
        return ValueError(str(error))
    if isinstance(error, OSError) and error.errno is not None:
        return unreadable("a readable file", error.strerror, str(path), "Correct the path")
    return unreadable("a complete .npz file without Python objects", f"a damaged one ({error})", str(path))


def _header(stream: IO[bytes], path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    shape, fortran, dtype = read_npy_header(stream)
    if fortran or dtype.kind not in "fiub":
        actual = f"{dtype}{' in Fortran order' if fortran else ''}"
        raise unreadable("made of arrays of numbers in C order", actual, str(path))
    return shape, dtype


def _shape(archive: zipfile.ZipFile, name: str, path: Path) -> tuple[int, ...]:
    """Shape of an array that its member has the bytes for: a header, and a directory of the archive, can claim any number."""
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as stream:
        shape, dtype = _header(stream, path)
        size = stream.tell() + math.prod(shape) * dtype.itemsize
    if size != member.file_size:
        raise ValueError(f"{name} of {member.file_size} bytes for shape {shape}, not {size}")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} compressed in another way than NumPy does")
    if size > MAX_RATIO * min(member.compress_size + 1, path.stat().st_size):
        raise ValueError(f"{name} of {size} bytes, in {member.compress_size} of the file")
    return shape


def _rows(archive: zipfile.ZipFile, name: str, path: Path) -> Iterator[NDArray[Any]]:
    with archive.open(f"{name}.npy") as stream:
        shape, dtype = _header(stream, path)
        size = dtype.itemsize * math.prod(shape[1:])
        if size > MAX_ROW_BYTES:
            raise unreadable(f"of clips of at most {MAX_ROW_BYTES >> 20} MiB", f"{size} bytes", str(path))
        for number in range(shape[0]):
            row = stream.read(size)
            if len(row) != size:
                raise ValueError(f"{name} ends in row {number} of {shape[0]}")
            yield np.frombuffer(row, dtype).reshape(shape[1:])
        # the end is read, too: that is where zipfile compares the checksum
        if stream.read(1):
            raise ValueError(f"{name} goes on behind its {shape[0]} rows")


def _labels(archive: zipfile.ZipFile, part: str, num_clips: int, path: Path) -> NDArray[np.int64]:
    if f"y_{part}.npy" not in archive.namelist():
        raise unreadable(f"with y_{part} beside x_{part}", "none", str(path))
    shape = _shape(archive, f"y_{part}", path)
    if len(shape) not in (1, 2):
        raise unreadable(f"y_{part} one-hot, (N, K)", f"shape {shape}", str(path))
    if shape[0] != num_clips:
        raise unreadable(f"y_{part} of {num_clips} rows as x_{part}", shape[0], str(path))
    labels = []
    for number, row in enumerate(_rows(archive, f"y_{part}", path)):
        if row.ndim == 1 and (np.count_nonzero(row) != 1 or row.max() != 1):
            raise unreadable(f"y_{part} one-hot, (N, K)", f"something else in row {number}", str(path))
        labels.append(int(row.argmax()) if row.ndim else row.item())
    return whole_labels(labels, path)


def _clips(path: Path, parts: list[str], num_joints: int) -> Iterator[NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            for part in parts:
                for row in _rows(archive, f"x_{part}", path):
                    yield trimmed(row.reshape(len(row), -1, num_joints, 3), None)
    except _DAMAGED as error:
        raise _damaged(error, path) from error


PREPARED.add(
    "ctr-gcn",
    PreparedFormat(
        open=open_ctr_gcn,
        options=CtrGcnOptions(),
        about="one .npz file with x_train, y_train, x_test, y_test, as the scripts of CTR-GCN write them for NTU RGB+D; MAMP, "
        "STARS and many others read it",
    ),
)
