"""Writes the packed format: frames are appended as they come, everything else is written at the end."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fastskel.atomic import atomic_folder, sync
from fastskel.data.packed import FORMAT_VERSION, checksum, open_dataset

__all__ = [
    "FramesWriter",
    "check_new",
    "destination",
    "plain_options",
    "unwritable",
    "write_array",
    "write_json",
    "write_meta",
    "write_rest",
]

_MAGIC = b"\x93NUMPY\x01\x00"
# a multiple of 64, as the format asks, with room for any shape: the header is written after the frames
_HEADER_BYTES = 128
_BLOCK_FRAMES = 4096


@contextlib.contextmanager
def destination(function: str, out: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a scratch folder that becomes `out` (a path) on success; errors of the disk become ValueErrors naming it.

    Raises:
        ValueError: If `out` exists or cannot be written.
    """
    check_new(function, out)
    try:
        with atomic_folder(out) as scratch:
            yield scratch
    except OSError as error:
        raise unwritable(function, out, error) from error


def check_new(function: str, out: str | os.PathLike[str]) -> None:
    """Refuse a destination (a path) that exists.

    Raises:
        ValueError: If it does.
    """
    if Path(out).exists() or Path(out).is_symlink():
        raise ValueError(
            f"{function}: destination must be new, got the existing {os.fspath(out)}. Remove it or choose another."
        )


def unwritable(function: str, out: str | os.PathLike[str], error: OSError) -> ValueError:
    """Return the error for a disk that takes no more of a destination (a path)."""
    return ValueError(
        f"{function}: destination must be writable, got {error.strerror or error}, in {os.fspath(out)}. "
        "Make room or choose another."
    )


def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    description = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    text = repr(description).encode("ascii")
    length = max(_HEADER_BYTES, -(-(len(_MAGIC) + 2 + len(text) + 1) // 64) * 64)
    text = text.ljust(length - len(_MAGIC) - 3) + b"\n"
    return _MAGIC + len(text).to_bytes(2, "little") + text


class FramesWriter:
    """Appends frames (T, M, V, C) to a file whose number of frames and bodies is known only at the end.

    The name of the file says its M. A clip of more bodies begins a wider file with all frames so far; the narrower one stays
    until `drop_narrower`, so that whatever was on disk at the last `sync` can be gone on from after a crash.

    Attributes:
        num_frames: Frames so far.
        shape: Their (M, V, C), zeros before the first.
    """

    def __init__(self, folder: Path, num_frames: int = 0, shape: tuple[int, int, int] = (0, 0, 0)) -> None:
        self.folder = folder
        self.num_frames = num_frames
        self.shape = shape
        self._file: IO[bytes] | None = None
        if num_frames:
            # goes on behind frames of an earlier writer; what follows them was not vouched for
            self._file = self.path.open("r+b", buffering=0)
            self._file.truncate(self.size(num_frames, shape))
            self._file.seek(0, os.SEEK_END)

    @staticmethod
    def size(num_frames: int, shape: tuple[int, int, int]) -> int:
        """Return the bytes, a scalar, of a file of T frames of (M, V, C) each."""
        return _HEADER_BYTES + num_frames * math.prod(shape) * 4

    @property
    def path(self) -> Path:
        """The file of frames, (sum T, M, V, C), as it is called until it is finished."""
        return self.folder / f"frames-{self.shape[0]}.npy"

    def append(self, frames: NDArray[np.float32]) -> None:
        """Append frames, (T, M, V, C); bodies that they lack are zero, bodies that the file lacks are added to it."""
        bodies, joints, channels = frames.shape[1:]
        if self._file is None:
            self.shape = (bodies, joints, channels)
            self._file = self._create()
        assert (joints, channels) == self.shape[1:]
        if bodies > self.shape[0]:
            self._widen(bodies)
        try:
            _write_all(self._file, _padded(frames, self.shape[0]).tobytes())
        except OSError:
            # part of a clip is of no use, and on a full disk the record of the others needs its room
            self._file.truncate(self.size(self.num_frames, self.shape))
            raise
        self.num_frames += len(frames)

    def _create(self) -> IO[bytes]:
        # no buffer: what was appended is with the system, whatever becomes of the next clip
        file = self.path.open("wb", buffering=0)
        _write_all(file, bytes(_HEADER_BYTES))
        return file

    def _widen(self, bodies: int) -> None:
        # happens at most once per body: every frame so far is written again with room for the new ones
        assert self._file is not None
        narrow_path, narrow_shape = self.path, self.shape
        self.shape = (bodies, *narrow_shape[1:])
        try:
            with contextlib.ExitStack() as undo:
                wide = self._create()
                undo.callback(_close, wide)
                with narrow_path.open("rb") as source:
                    source.seek(_HEADER_BYTES)
                    while block := source.read(_BLOCK_FRAMES * math.prod(narrow_shape) * 4):
                        frames = np.frombuffer(block, dtype="<f4").reshape(-1, *narrow_shape)
                        _write_all(wide, _padded(frames, bodies).tobytes())
                undo.pop_all()
        except BaseException:
            # what was appended is still in the narrow file
            self.path.unlink(missing_ok=True)
            self.shape = narrow_shape
            raise
        self._file.close()
        self._file = wide

    def sync(self) -> None:
        """Have all frames, (sum T, M, V, C), on disk before this returns."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            sync(self.folder)

    def drop_narrower(self) -> None:
        """Remove files of frames of another M than the present (M, V, C)."""
        for path in self.folder.glob("frames-*.npy"):
            if path != self.path:
                path.unlink()

    def finish(self, path: Path, num_bodies: int = 1) -> None:
        """Write the header for (sum T, M, V, C) with M at least `num_bodies`, close the file and call it `path`."""
        if num_bodies > self.shape[0]:
            self._widen(num_bodies)
        assert self._file is not None
        self._file.seek(0)
        header = _header(np.dtype("<f4"), (self.num_frames, *self.shape))
        assert len(header) == _HEADER_BYTES
        _write_all(self._file, header)
        self._file.close()
        self.drop_narrower()
        os.rename(self.path, path)

    def close(self) -> None:
        """Close the file of (sum T, M, V, C) frames as it is."""
        if self._file is not None:
            _close(self._file)


def _write_all(file: IO[bytes], data: bytes) -> None:
    # without a buffer a write may take less than it is given
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _close(file: IO[bytes]) -> None:
    # closing can fail once more on a full disk; the first error is the one to report
    with contextlib.suppress(OSError):
        file.close()

def _padded(frames: NDArray[np.float32], bodies: int) -> NDArray[np.float32]:
    if frames.shape[1] == bodies:
        return frames.astype("<f4", copy=False)
    wide = np.zeros((len(frames), bodies, *frames.shape[2:]), dtype="<f4")
    wide[:, : frames.shape[1]] = frames
    return wide


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write numbers or fixed-width strings, (n,) or (n, k), as a little-endian `.npy` file.

    numpy.save is not used: it hides the system's reason when the disk is full, and could pickle.
    """
    array = np.ascontiguousarray(array)
    assert array.dtype.kind in "biufU"
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    with path.open("wb") as file:
        file.write(_header(array.dtype, array.shape))
        file.write(array.tobytes())


def write_rest(
    folder: Path,
    meta: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
    lengths: Sequence[int],
    bodies: Sequence[int],
    columns: Mapping[str, tuple[str, NDArray[Any]]],
) -> None:
    """Write what belongs to the frames of a folder, and open it.

    Args:
        folder: Folder with `frames.npy`, (sum T, M, V, C), and JSON files.
        meta: Contents of `meta.json` but for version, columns and checksums.
        arrays: Other arrays, by name.
        lengths: Frames T of each clip, (n,).
        bodies: Bodies M of each, (n,).
        columns: Name to ("clip", (n,)) or ("frame", (sum T,)).
    Raises:
        ValueError: If it cannot be opened: it must not appear at the destination.
    """
    write_array(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    write_array(folder / "num_bodies.npy", np.array(bodies, dtype=np.int64))
    for name, array in arrays.items():
        write_array(folder / f"{name}.npy", array)
    for name, (_, array) in columns.items():
        write_array(folder / f"{name}.npy", array)
    write_meta(folder, {**meta, "columns": {name: kind for name, (kind, _) in columns.items()}})
    open_dataset(folder)


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write `meta.json` with the version and the checksum of every other file of the folder, (64,) digits each."""
    checksums = {path.name: checksum(path) for path in sorted(folder.iterdir())}
    write_json(folder / "meta.json", {"format_version": FORMAT_VERSION, **meta, "checksums": checksums})


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as plain values for JSON, (k,) names to values; files are told by their name and SHA-256.

    Raises:
        ValueError: If such a file cannot be read.
    """
    return {name: _plain(name, value) for name, value in options.items()}


def _plain(name: str, value: Any) -> Any:
    # text without a dot is a word, such as the name of a skeleton, even where a file is called so
    is_path = isinstance(value, os.PathLike) or (isinstance(value, str) and "." in value)
    if is_path and os.path.isfile(value):
        try:
            return {"file": os.path.basename(value), "sha256": checksum(Path(value))}
        except OSError as error:
            raise ValueError(
                f"pack_source: option {name} must be a readable file, got {error.strerror}, in {os.fspath(value)}. "
                "Correct the path or the file."
            ) from error
    if isinstance(value, (tuple, list)):
        return [_plain(name, entry) for entry in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping (a tree of plain values) as JSON, the same bytes every time."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        json.dump(content, file, indent=1, sort_keys=True)
        file.write("\n")
