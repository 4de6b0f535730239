"""`.npy` files from anywhere: the array that they hold, or a ValueError, whatever they claim."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

__all__ = ["map_npy", "read_npy_header"]

# what NumPy takes as safe; a header of plain numbers has some hundred
_MOST_HEADER = 10_000


def read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of an `.npy` file, version 1 or 2; the stream stands at the numbers afterwards.

    Args:
        stream: The file, read from its place on.
    Returns:
        Shape of the array, (axes,), none of its extents negative; whether it is in Fortran order; type of its numbers.
        Nothing is allocated: whether the file is as long as they say is for the caller to compare.
    Raises:
        ValueError: If it is damaged.
        OSError: If the file cannot be read.
    """
    try:
        version = npy.read_magic(stream)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"version {version[0]}.{version[1]} of the .npy format")
        prefix = stream.read(2 if version == (1, 0) else 4)
        length = int.from_bytes(prefix, "little")
        # NumPy would make room for as many first
        if length > _MOST_HEADER:
            raise ValueError(f"a header of {length} bytes")
        shape, fortran, dtype = read(io.BytesIO(prefix + stream.read(length)))
    except (OSError, ValueError):
        raise
    # NumPy evaluates the header as an expression, and raises many kinds of error on damaged ones
    except Exception as error:
        raise ValueError(f"a damaged header, {type(error).__name__}") from error
    if any(type(extent) is not int or extent < 0 for extent in shape):
        raise ValueError(f"a header of shape {shape!r:.200}")
    return shape, fortran, dtype


def map_npy(path: Path) -> NDArray[Any]:
    """Map an `.npy` file into memory, read-only, (...,) as its header says.

    Raises:
        ValueError: If it is damaged, holds Python objects, or is not exactly as long as its header says.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        shape, fortran, dtype = read_npy_header(file)
        begin, size = file.tell(), os.fstat(file.fileno()).st_size
    expected, found = math.prod(shape) * dtype.itemsize, size - begin
    # a type of no bytes lets a header claim any number of them
    if dtype.hasobject or dtype.itemsize == 0:
        raise ValueError(f"values of type {dtype}")
    if found != expected:
        raise ValueError(f"{found} bytes for shape {shape}, not {expected}")
    # nothing cannot be mapped
    return np.memmap(path, dtype, "r", begin, shape, "F" if fortran else "C") if expected else np.zeros(shape, dtype)
