"""Packs clips: a user's own arrays with `pack_arrays`, the files of a public data set with `pack_source`."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastskel import _native
from fastskel.data.formats import FORMATS, PREPARED, SkipFile, SourceClip
from fastskel.data.gather import ClipFacts, GatheredClips
from fastskel.data.journal import FINISHED, Entry, Journal
from fastskel.data.normalise import NORMALISATIONS, check_axes, normalise
from fastskel.data.pack_clips import pack_arrays
from fastskel.data.pack_summary import PackSummary
from fastskel.data.packed import FORMAT_VERSION, checksum
from fastskel.data.read_ahead import read_ahead
from fastskel.data.source import SourceFiles, open_source
from fastskel.data.topology_file import topology_to_json
from fastskel.data.work_folder import work_folder
from fastskel.data.writer import plain_options, write_json, write_rest
from fastskel.provenance import versions
from fastskel.skeleton import Topology, topology

__all__ = ["PackSummary", "pack_arrays", "pack_source"]

# what reading a file gives: its clip, why it has none, or what is wrong with it
Outcome = SourceClip | SkipFile | ValueError


def pack_source(
    format_name: str,
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    options: Mapping[str, Any] | None = None,
    threads: int | None = None,
    skip_bad: bool = False,
    normalisation: str = "none",
    progress: bool = True,
) -> PackSummary:
    """Pack the files of a public data set, clips of (T, M, V, C).

    A call that is killed, interrupted, or stopped by an error leaves what it packed in `DST.packing`; the same call goes
    on there and ends with the same bytes. Files that were added, removed or changed in between are heeded: all before the
    first of them in the order of packing is kept, or nothing where only what comes later has the most bodies. Prepared
    formats begin again.

    Args:
        format_name: Name in `FORMATS`, such as "utd-mhad", or in `PREPARED`, such as "pyskl".
        src: Folder with the files, searched recursively, or the tar or zip archive they come in. Of a prepared format,
            see `fastskel.data.pack_prepared`.
        dst: Folder to create. The same files give the same bytes, whatever the number of threads.
        options: What the format lets one choose, by name; None: its defaults.
        threads: Threads that read and parse, at least 1; None: one for each CPU that the process may use.
        skip_bad: Leave out files that are damaged or cannot be read, and list them; by default the first of them is an error.
        normalisation: Applied to every clip: "none", "center", "center-first", "align" or "align-yaw".
        progress: Show a progress bar on standard error.
    Returns:
        Summary of what was packed and skipped.
    Raises:
        ValueError: If an argument does not fit, a file is damaged, naming it, every file is skipped, or another process
            packs the same destination; nothing is left at `dst`.
    """
    _check(normalisation in NORMALISATIONS, "normalisation", f"one of {', '.join(NORMALISATIONS)}", normalisation, "Choose one")
    whole = threads is None or (type(threads) is int and threads >= 1)
    _check(whole, "threads", "a whole number of at least 1", threads, "Leave it out for all cores")
    if format_name in PREPARED:
        from fastskel.data.pack_prepared import pack_prepared

        contract = f"left out for {format_name}, whose clips are all in one file"
        _check(threads is None, "threads", contract, threads, "Leave it out")
        _check(not skip_bad, "skip_bad", contract, skip_bad, "Leave it out")
        return pack_prepared(format_name, src, dst, options=options, normalisation=normalisation, progress=progress)
    begin = time.perf_counter()
    job = _Job(format_name, src, {} if options is None else options, normalisation)
    beside = None if job.format.annotations is None else job.format.annotations.pattern
    with (
        work_folder(Path(dst)) as folder,
        open_source(src, job.format.suffix, folder, beside=beside, unique_names=job.format.unique_names) as files,
    ):
        job.look_at(files, skip_bad)
        stamps = [(path, files.stamps[path]) for path in files.paths]
        joints = (job.layout.num_joints, len(job.format.channels))
        journal = Journal(folder, job.identity(files), stamps, joints, partial(job.still_bad, files) if skip_bad else None)
        gathered = GatheredClips(job.format)
        try:
            left_out = _pack_files(job, files, journal, gathered, threads or _native.available_cpus(), skip_bad, progress)
            if not gathered.names:
                raise ValueError(
                    f"pack_source: source must be with at least one clip, got none ({left_out[-1].path}: "
                    f"{left_out[-1].reason}), in {os.fspath(src)}. Correct the path or the options."
                )
            _finish(job, journal, gathered)
        finally:
            journal.writer.close()
    return PackSummary(
        path=Path(dst),
        clips=len(gathered.names),
        frames=sum(gathered.lengths),
        bodies=max(gathered.bodies),
        skipped=(*files.skipped, *((entry.path, entry.reason) for entry in left_out if not entry.damaged)),
        seconds=time.perf_counter() - begin,
        notes=tuple(gathered.notes),
        damaged=tuple((entry.path, entry.reason) for entry in left_out if entry.damaged),
        read_bytes=sum(size for _, (size, _) in stamps[len(journal.done) :]),
        resumed=len(journal.done),
    )


def _check(condition: bool, argument: str, contract: str, actual: object, action: str) -> None:
    if not condition:
        raise ValueError(f"pack_source: {argument} must be {contract}, got {actual!r}. {action}.")


class _Job:
    """One data set to pack: its format with the chosen options, and how a file of it is read."""

    def __init__(
        self, name: str, src: str | os.PathLike[str], chosen: Mapping[str, Any], normalisation: str
    ) -> None:
        self.name = name
        self.src = os.fspath(src)
        self.normalisation = normalisation
        fmt = FORMATS[name]
        self._read: Callable[..., SourceClip] = fmt.reader(chosen)
        options = None if fmt.options is None else replace(fmt.options, **chosen)
        self.options = plain_options({} if options is None else {f.name: getattr(options, f.name) for f in fields(options)})
        self.format = fmt.adapted(chosen)
        self.layout: Topology
        self.annotations: Any = None

    def look_at(self, files: SourceFiles, skip_bad: bool) -> None:
        """Take in what all clips share: the files beside them, and their skeleton."""
        if self.format.annotations is not None:
            self.annotations = self.format.annotations.parse({f"{self.src}/{path}": files.read(path) for path in files.beside})
            self._read = partial(self._read, annotations=self.annotations)
        if self.format.layout_of is not None:
            self._take_layout(files, skip_bad)
        self.layout = topology(self.format.topology) if self.format.layout is None else self.format.layout
        check_axes(self.normalisation, self.format.channels, self.format.up_axis)
        # a normalisation that is not for these joints and channels is an error of the call, not of a file
        one_frame = np.zeros((1, 1, self.layout.num_joints, len(self.format.channels)), dtype=np.float32)
        normalise(one_frame, self.normalisation, self.layout)

    def _take_layout(self, files: SourceFiles, skip_bad: bool) -> None:
        for path in files.paths:
            try:
                self.format, self._read = self.format.with_layout(self._read, files.read(path), f"{self.src}/{path}")
                return
            except ValueError as error:
                # left out later, with its reason
                if not skip_bad or path == files.paths[-1]:
                    raise _hinted(error) from error

    def identity(self, files: SourceFiles) -> dict[str, Any]:
        """Say what a packing that is gone on with must share with this one, but for the files of clips."""
        archive = files.root.stat() if files.root.is_file() else None
        return {
            "format": self.name,
            "format_version": FORMAT_VERSION,
            "versions": versions(),
            "options": self.options,
            # a list of labels may be called like a word
            "files": {name: checksum(Path(value)) for name, value in self.options.items() if _is_file(value)},
            "normalisation": self.normalisation,
            # as given: names of folders may be classes
            "source": [self.src, os.path.abspath(self.src)],
            "archive": None if archive is None else [archive.st_size, archive.st_mtime_ns],
            "beside": [[path, *files.stamps[path]] for path in files.beside],
        }

    def still_bad(self, files: SourceFiles, path: str, names: Container[str]) -> bool:
        """Say whether a file is to be left out again: mending, as of its permissions, need not show in size and time."""
        outcome = self.read(files, path)
        return isinstance(outcome, ValueError) or (isinstance(outcome, SourceClip) and outcome.name in names)

    def read(self, files: SourceFiles, path: str) -> Outcome:
        """Read and normalise one clip, (T, M, V, C), in whatever thread."""
        try:
            clip = self._read(files.read(path), f"{self.src}/{path}")
            return replace(clip, frames=normalise(clip.frames, self.normalisation, self.layout))
        except (SkipFile, ValueError) as outcome:
            return outcome


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and os.path.isfile(value)


def _pack_files(
    job: _Job, files: SourceFiles, journal: Journal, gathered: GatheredClips, threads: int, skip_bad: bool, progress: bool
) -> list[Entry]:
    """Append the frames of all files and gather what clips bring beside them; files without a clip."""
    from tqdm import tqdm

    for entry in journal.done:
        if entry.clip is not None:
            gathered.take(entry.clip, entry.path)
    left_out = [entry for entry in journal.done if entry.clip is None]
    num_done = len(journal.done)
    rest = files.paths[num_done:]
    sizes = [files.stamps[path][0] for path in rest]
    bar = tqdm(desc=f"packing {job.name}", total=len(files.paths), initial=num_done, unit="clip", disable=not progress)
    try:
        with bar, contextlib.closing(read_ahead(rest, sizes, partial(job.read, files), threads)) as outcomes:
            for path, outcome in outcomes:
                entry = _entry(path, files.stamps[path], outcome, gathered, skip_bad)
                if isinstance(outcome, SourceClip) and entry.clip is not None:
                    journal.writer.append(outcome.frames)
                    gathered.take(entry.clip, path)
                else:
                    left_out.append(entry)
                journal.note(entry)
                bar.update()
    except BaseException:
        # the error is what counts; what cannot be kept is packed again
        with contextlib.suppress(OSError):
            journal.commit()
        raise
    journal.commit()
    return left_out


def _entry(path: str, stamp: tuple[int, int], outcome: Outcome, gathered: GatheredClips, skip_bad: bool) -> Entry:
    if isinstance(outcome, SkipFile):
        return Entry(path, stamp, reason=str(outcome))
    try:
        if isinstance(outcome, ValueError):
            raise outcome
        gathered.check(outcome.name, path)
    except ValueError as error:
        if not skip_bad:
            raise _hinted(error) from error
        return Entry(path, stamp, reason=str(error).removeprefix("pack_source: "), damaged=True)
    return Entry(path, stamp, ClipFacts.of(outcome))


def _hinted(error: ValueError) -> ValueError:
    return ValueError(f"{error} To pack the others, leave out what is damaged: --skip-bad (skip_bad=True).")


def _finish(job: _Job, journal: Journal, gathered: GatheredClips) -> None:
    folder, fmt = journal.folder / FINISHED, job.format
    classes, class_names = gathered.classes()
    folder.mkdir()
    if fmt.annotations is not None and fmt.annotations.splits is not None:
        splits = fmt.annotations.splits(job.annotations, gathered.names)
        if splits:
            write_json(folder / "splits.json", splits)
    if fmt.layout is not None:
        write_json(folder / "topology.json", topology_to_json(fmt.layout))
    journal.writer.finish(folder / "frames.npy")
    meta = {
        "source": job.name,
        "topology": fmt.topology,
        "channels": list(fmt.channels),
        "units": fmt.units,
        "up_axis": fmt.up_axis,
        "class_names": class_names,
        "normalisation": job.normalisation,
        "valid_frames_rule": "counted",
        "options": job.options,
    }
    arrays = {"names": np.array(gathered.names), "labels": classes, **gathered.segments()}
    write_rest(folder, meta, arrays, gathered.lengths, gathered.bodies, gathered.columns())
