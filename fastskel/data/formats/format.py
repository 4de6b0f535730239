"""The contract of a reader: one file of a public data set in, one clip out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastskel.registry import Registry
from fastskel.skeleton import TOPOLOGIES, Topology

__all__ = ["FORMATS", "Annotations", "Format", "SkipFile", "SourceClip", "clip_name", "finite_frames", "unreadable"]

# characters of what is wrong with a file
_MOST_SHOWN = 300


class SkipFile(Exception):
    """A sound file that holds no clip of the data set; its text is the reason, as the summary lists it."""


@dataclass(frozen=True)
class SourceClip:
    """One clip as its file holds it.

    Attributes:
        name: Unique name within the data set.
        frames: Joint positions, (T, M, V, C), float32, every frame valid.
        label: Class, -1 where unknown.
        columns: Integer or text columns of the clip, the format's `columns`.
        frame_columns: One value per frame, (T,) each, the format's `frame_columns`.
        segments: Rows (class, start, end, confidence), end exclusive, within the clip; they may overlap and be empty.
        class_name: Name of the clip's class where the format's `class_names` are not known beforehand.
        notes: What its user should know, for the summary.
    """

    name: str
    frames: NDArray[np.float32]
    label: int
    columns: Mapping[str, int | str]
    frame_columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    segments: Sequence[tuple[int, int, int, float]] = ()
    class_name: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Annotations:
    """Files of a data set that say something about its clips: labels, lists of parts.

    Attributes:
        pattern: Finds them by their path inside the source, with slashes; they are no clips then.
        parse: Turns their contents, by path for messages, into what `read` takes as `annotations`.
        splits: From what was parsed and the clip names, (n,), to protocol -> part -> clip indices; None: no lists.
    """

    pattern: re.Pattern[str]
    parse: Callable[[Mapping[str, bytes]], Any]
    splits: Callable[[Any, Sequence[str]], dict[str, dict[str, list[int]]]] | None = None


@dataclass(frozen=True)
class Format:
    """How one public data set stores its clips, (T, M, V, C) each.

    Attributes:
        topology: Name of the skeleton layout.
        suffix: Ending of the files that hold clips, with its dot.
        channels: Names of the C channels.
        units: Unit of the coordinates.
        up_axis: Axis that points up, "y", or "-y" where it points down.
        class_names: Names of the K classes; empty where the clips bring theirs.
        columns: Names of the per-clip columns.
        read: Reads (contents, path for messages), and options after them if there are any; raises ValueError naming
            the path, or SkipFile. Several threads call it at once, in any order of the files.
        options: Frozen dataclass with the defaults of what a user may choose, None where there is no choice.
        frame_columns: Names of the per-frame columns.
        annotations: Files beside the clips that `read` needs, as its keyword `annotations`.
        unique_names: Whether file names tell clips apart; otherwise their folders do.
        layout: Skeleton layout that `topology` names, where it is not a registered one.
        adapt: Returns the format for chosen options, where skeleton, channels or units depend on them.
        layout_of: Reads the skeleton layout off a file, with the arguments of `read`, where it is that of the first file;
            `read` takes it as its keyword `layout` and refuses files of another.
        about: What the files are and where they come from, for `fastskel pack --list-formats`.
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
    frame_columns: tuple[str, ...] = ()
    annotations: Annotations | None = None
    unique_names: bool = True
    layout: Topology | None = None
    adapt: Callable[[Format, Any], Format] | None = None
    layout_of: Callable[..., Topology] | None = None
    about: str = ""

    def adapted(self, chosen: Mapping[str, Any]) -> Format:
        """Return the format as it is with the options that a user chose, by name.

        Raises:
            ValueError: If an option does not fit.
        """
        return self if self.adapt is None else self.adapt(self, replace(self.options, **chosen))

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

    def with_layout(self, reader: Callable[..., SourceClip], data: bytes, path: str) -> tuple[Format, Callable[..., SourceClip]]:
        """Return the format and its reader with the skeleton of the first file, (V,) joints, where they depend on it.

        Args:
            reader: What `reader` returned, with `annotations` bound if there are any.
            data: Contents of the first file.
            path: Its path, for messages.
        Raises:
            ValueError: If the file has no such skeleton.
        """
        if self.layout_of is None:
            return self, reader
        layout = self.layout_of(data, path, **getattr(reader, "keywords", {}))
        own = None if layout.name in TOPOLOGIES else layout
        return replace(self, topology=layout.name, layout=own), partial(reader, layout=layout)


FORMATS: Registry[Format] = Registry("format")


def unreadable(
    contract: str, actual: object, path: str, action: str = "Fetch the file again or remove it"
) -> ValueError:
    """Return the error for a file at `path` (a scalar string) that cannot be read."""
    # a file may hold anything, and the message is one line
    shown = str(actual)
    if len(shown) > _MOST_SHOWN:
        shown = f"{shown[:_MOST_SHOWN]}..."
    if not shown.isprintable():
        shown = repr(shown)
    return ValueError(f"pack_source: file must be {contract}, got {shown}, in {path}. {action}.")


def clip_name(path: str) -> str:
    """Return the name that a file gives its clip (a scalar string): that of the file without its suffix.

    Raises:
        ValueError: If it is empty or not printable.
    """
    name = PurePosixPath(path).stem
    if not name.strip() or not name.isprintable():
        raise unreadable("named in printable characters", repr(name), path, "Rename it")
    return name


def finite_frames(values: NDArray[np.generic], path: str) -> NDArray[np.float32]:
    """Return (T, V, C) numbers as float32, (T, V, C).

    Raises:
        ValueError: If there is no frame, or a value is no finite float32; names the first such frame.
    """
    if values.dtype.kind not in "fiu":
        raise unreadable("made of numbers", f"values of type {values.dtype}", path)
    if len(values) == 0:
        raise unreadable("at least one frame", "none", path)
    with np.errstate(over="ignore", invalid="ignore"):
        frames = np.ascontiguousarray(values, dtype=np.float32)
    finite = np.isfinite(frames).reshape(len(frames), -1).all(axis=1)
    if not finite.all():
        raise unreadable("finite numbers", f"NaN or infinity in frame {int(np.argmin(finite))}", path)
    return frames
