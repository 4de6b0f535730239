"""Packs what other tools of the field have prepared: many clips in a few files, with their parts."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastskel.data.formats.prepared import PREPARED
from fastskel.data.normalise import check_axes
from fastskel.data.pack_clips import pack_arrays
from fastskel.data.pack_summary import PackSummary
from fastskel.data.writer import check_new

__all__ = ["pack_prepared"]


def pack_prepared(
    format_name: str,
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    options: Mapping[str, Any] | None = None,
    normalisation: str = "none",
    progress: bool = True,
) -> PackSummary:
    """Pack the prepared files of another tool, clips of (T, M, V, C).

    Args:
        format_name: Name in `PREPARED`, such as "pyskl".
        src: File, or folder with the files; not an archive of them.
        dst: Folder to create. The same files give the same bytes. A packing that was stopped begins again.
        options: What the files do not say about themselves, by name; None: the format's defaults.
        normalisation: Applied to every clip: "none", "center", "center-first", "align" or "align-yaw".
        progress: Show a progress bar on standard error.
    Returns:
        Summary of what was packed and skipped.
    Raises:
        ValueError: If the format or an option is unknown, or a file is damaged, naming it; nothing is left at `dst`.
    """
    from tqdm import tqdm

    fmt = PREPARED[format_name]
    chosen = fmt.chosen({} if options is None else options)
    begin = time.perf_counter()
    path = Path(src)
    if not path.exists():
        raise ValueError(f"pack_source: source must be a folder or a file, got nothing, in {path}. Correct the path.")
    # before the files are read, which can take minutes
    check_new("pack_source", dst)
    source = fmt.open(path, chosen)
    check_axes(normalisation, source.channels, source.up_axis)
    bar = tqdm(source.clips, f"packing {format_name}", len(source.names), unit="clip", disable=not progress)
    try:
        dataset = pack_arrays(
            bar,
            out=dst,
            topology=source.topology,
            labels=source.labels,
            names=source.names,
            columns=source.columns,
            splits=source.splits,
            segments=source.segments,
            class_names=chosen.class_names,
            num_frames="all",
            channels=source.channels,
            units=source.units,
            up_axis=source.up_axis,
            normalisation=normalisation,
            source=chosen.dataset,
            options={option.name: getattr(chosen, option.name) for option in fields(chosen)},
        )
    except ValueError as error:
        if not str(error).startswith("pack_arrays:"):
            raise
        text = str(error).removeprefix("pack_arrays:")
        about = "" if text.startswith(" destination") else f" It is of {path}."
        raise ValueError(f"pack_source:{text}{about}") from error
    finally:
        bar.close()
    bodies, seconds = int(dataset.num_bodies.max()), time.perf_counter() - begin
    return PackSummary(Path(dst), len(dataset), len(dataset.frames), bodies, tuple(source.skipped), seconds)
