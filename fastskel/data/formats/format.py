"""The contract of a reader: one file of a public data set in, one clip out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastskel.registry import Registry

__all__ = ["FORMATS", "Format", "SkipFile", "SourceClip", "finite_frames", "unreadable"]


class SkipFile(Exception):
    """A sound file that holds no clip of the data set; its text is the reason, as the summary lists it."""


@dataclass(frozen=True)
class SourceClip:
    """One clip as its file holds it.

    Attributes:
        name: Unique name within the data set.
        frames: Joint positions, (T, M, V, C), float32, every frame valid.
        label: Class, -1 where unknown.
        columns: Integer columns of the clip, the format's `columns`.
    """

    name: str
    frames: NDArray[np.float32]
    label: int
    columns: Mapping[str, int]


@dataclass(frozen=True)
class Format:
    """How one public data set stores its clips, (T, M, V, C) each.

    Attributes:
        topology: Name of the skeleton layout.
        suffix: Ending of the files that hold clips, with its dot.
        channels: Names of the C channels.
        units: Unit of the coordinates.
        up_axis: Axis that points up, "y", or "-y" where it points down.
        class_names: Names of the K classes.
        columns: Names of the per-clip columns.
        read: Reads (contents, path for messages), and options after them if there are any; raises ValueError naming
            the path, or SkipFile.
        options: Frozen dataclass with the defaults of what a user may choose, None where there is no choice.
    """

    topology: str
    suffix: str
    channels: tuple[str, ...]
    units: str
    up_axis: str
    class_names: tuple[str, ...]
    columns: tuple[str, ...]
    read: Callable[..., SourceClip]
    options: Any = None

    def reader(self, chosen: Mapping[str, Any]) -> Callable[[bytes, str], SourceClip]:
        """Return `read` with the options that a user chose, by name, and defaults for the others.

        Raises:
            ValueError: If there is no such option, or it does not fit.
        """
        known = [] if self.options is None else [field.name for field in fields(self.options)]
        for name in chosen:
            if name not in known:
                raise ValueError(
                    f"pack_source: options must be among those of the format ({', '.join(known) or 'none'}), "
                    f"got {name!r}. Leave it out."
                )
        return self.read if self.options is None else partial(self.read, options=replace(self.options, **chosen))


FORMATS: Registry[Format] = Registry("format")


def unreadable(
    contract: str, actual: object, path: str, action: str = "Fetch the file again or remove it"
) -> ValueError:
    """Return the error for a file at `path` (a scalar string) that cannot be read."""
    return ValueError(f"pack_source: file must be {contract}, got {actual}, in {path}. {action}.")


def finite_frames(values: NDArray[np.generic], path: str) -> NDArray[np.float32]:
    """Return (T, V, C) numbers as float32, (T, V, C).

    Raises:
        ValueError: If there is no frame, or a value is no finite float32; names the first such frame.
    """
    if values.dtype.kind not in "fiu":
        raise unreadable("made of numbers", f"values of type {values.dtype}", path)
    if len(values) == 0:
        raise unreadable("at least one frame", "none", path)
    with np.errstate(over="ignore"):
        frames = np.ascontiguousarray(values, dtype=np.float32)
    finite = np.isfinite(frames).reshape(len(frames), -1).all(axis=1)
    if not finite.all():
        raise unreadable("finite numbers", f"NaN or infinity in frame {int(np.argmin(finite))}", path)
    return frames
