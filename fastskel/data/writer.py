"""Writes the packed format: frames are appended as they come, everything else is written at the end."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fastskel.atomic import atomic_folder
from fastskel.data.packed import FORMAT_VERSION, checksum

__all__ = ["FramesWriter", "destination", "write_array", "write_meta"]

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
    if Path(out).exists() or Path(out).is_symlink():
        raise ValueError(
            f"{function}: destination must be new, got the existing {os.fspath(out)}. Remove it or choose another."
        )
    try:
        with atomic_folder(out) as scratch:
            yield scratch
    except OSError as error:
        raise ValueError(
            f"{function}: destination must be writable, got {error.strerror or error}, in {os.fspath(out)}. "
            "Make room or choose another."
        ) from error


def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    description = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    text = repr(description).encode("ascii")
    length = max(_HEADER_BYTES, -(-(len(_MAGIC) + 2 + len(text) + 1) // 64) * 64)
    text = text.ljust(length - len(_MAGIC) - 3) + b"\n"
    return _MAGIC + len(text).to_bytes(2, "little") + text


class FramesWriter:
    """Appends frames (T, M, V, C) to an `.npy` file whose number of frames and bodies is known only at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_frames = 0
        self._shape: tuple[int, int, int] = (0, 0, 0)
        self._file: IO[bytes] = path.open("wb")
        self._file.write(bytes(_HEADER_BYTES))

    def append(self, frames: NDArray[np.float32]) -> None:
        """Append frames, (T, M, V, C); bodies that they lack are zero, bodies that the file lacks are added to it."""
        bodies, joints, channels = frames.shape[1:]
        if self.num_frames == 0:
            self._shape = (bodies, joints, channels)
        assert (joints, channels) == self._shape[1:]
        if bodies > self._shape[0]:
            self._widen(bodies)
        self._file.write(_padded(frames, self._shape[0]).tobytes())
        self.num_frames += len(frames)

    def _widen(self, bodies: int) -> None:
        # happens at most once per body: every frame so far is rewritten with room for the new ones
        self._file.close()
        narrow = self.path.with_name("narrow.npy")
        self.path.rename(narrow)
        frame_values = int(np.prod(self._shape))
        with narrow.open("rb") as source:
            source.seek(_HEADER_BYTES)
            self._file = self.path.open("wb")
            self._file.write(bytes(_HEADER_BYTES))
            while block := source.read(_BLOCK_FRAMES * frame_values * 4):
                frames = np.frombuffer(block, dtype="<f4").reshape(-1, *self._shape)
                self._file.write(_padded(frames, bodies).tobytes())
        narrow.unlink()
        self._shape = (bodies, *self._shape[1:])

    def finish(self, num_bodies: int = 1) -> None:
        """Write the header for (sum T, M, V, C) with M at least `num_bodies`, and close the file."""
        if num_bodies > self._shape[0]:
            self._widen(num_bodies)
        self._file.seek(0)
        header = _header(np.dtype("<f4"), (self.num_frames, *self._shape))
        assert len(header) == _HEADER_BYTES
        self._file.write(header)
        self._file.close()

    def close(self) -> None:
        """Close the file of (sum T, M, V, C) frames as it is; the folder around it is about to be removed."""
        # closing flushes, which fails once more on a full disk; the first error is the one to report
        with contextlib.suppress(OSError):
            self._file.close()


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


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write `meta.json` with the version and the checksum of every other file of the folder, (64,) digits each."""
    checksums = {path.name: checksum(path) for path in sorted(folder.iterdir())}
    write_json(folder / "meta.json", {"format_version": FORMAT_VERSION, **meta, "checksums": checksums})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping (a tree of plain values) as JSON, the same bytes every time."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        json.dump(content, file, indent=1, sort_keys=True)
        file.write("\n")
