"""The record of a packing that may be stopped at any moment: which files are done, and which frames they left on disk.

Its first line is the job, then comes a line for each file, in their order. A line is written only after the frames of its
file are on disk, so what it says holds after a kill or a power failure; what is behind the last whole line is cut off. The
next call takes over the files that are still the first ones of the source, with the same size and time of change.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastskel.atomic import sync
from fastskel.data.gather import ClipFacts
from fastskel.data.writer import FramesWriter

__all__ = ["FINISHED", "JOURNAL", "Entry", "Journal", "num_clips"]

JOURNAL = "journal.jsonl"
# folder that becomes the destination
FINISHED = "finished"
# the work that a kill may cost: every commit waits for the disk
COMMIT_SECONDS = 1.0

Stamp = tuple[int, int]
# whether the file at a path still has no clip, or one of a name that is taken
StillBad = Callable[[str, Container[str]], bool]


@dataclass(frozen=True)
class Entry:
    """What became of one file.

    Attributes:
        path: Its path inside the source.
        stamp: Its size and time of change.
        clip: Facts of its clip, (T, M, V, C), if it has one.
        reason: Why it has none.
        damaged: Whether it could not be read.
    """

    path: str
    stamp: Stamp
    clip: ClipFacts | None = None
    reason: str = ""
    damaged: bool = False

    def plain(self) -> dict[str, Any]:
        """Return the entry as plain values by name, (5,)."""
        return {**vars(self), "clip": None if self.clip is None else self.clip.plain()}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Entry:
        """Return the entry that plain values by name, (5,), were made of."""
        clip = None if plain["clip"] is None else ClipFacts.of_plain(plain["clip"])
        return cls(plain["path"], tuple(plain["stamp"]), clip, plain["reason"], plain["damaged"])


class Journal:
    """The journal of one job, whose frames are (sum T, M, V, C).

    Attributes:
        done: Entries of an earlier call that count.
        writer: Where frames go, behind those of `done`.
    """

    def __init__(
        self,
        folder: Path,
        job: Mapping[str, Any],
        files: Sequence[tuple[str, Stamp]],
        joints: tuple[int, int],
        still_bad: StillBad | None,
    ) -> None:
        self.folder = folder
        self.done: list[Entry] = []
        self._path = folder / JOURNAL
        self._pending: list[Entry] = []
        self._committed = time.monotonic()
        header = _line(job)
        first, *lines = _whole_lines(self._path) or [b""]
        if first == header:
            entries = [Entry.of(json.loads(line)) for line in lines]
            self._take_frames_back(entries)
            self.done = self._still_there(entries, files, joints, still_bad)
        elif first:
            self._say_unused("other files, options or versions")
        shutil.rmtree(folder / FINISHED, ignore_errors=True)
        # the journal first: at no time does it speak of frames that are gone
        if self.done:
            self._write("r+b", b"", keep=sum(map(len, [header, *lines[: len(self.done)]])))
        else:
            self._write("wb", header)
        sync(folder)
        clips = _clips(self.done)
        self.writer = FramesWriter(folder, *_extent(clips, joints)) if clips else FramesWriter(folder)
        self.writer.drop_narrower()

    def note(self, entry: Entry) -> None:
        """Take in what became of the next file, whose frames, (T, M, V, C), were appended; commit now and then."""
        self._pending.append(entry)
        if time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Have frames, (sum T, M, V, C), and then the entries that vouch for them on disk before this returns."""
        if self._pending:
            self.writer.sync()
            self._write("ab", b"".join(_line(entry.plain()) for entry in self._pending))
            self._pending = []
            self.writer.drop_narrower()
        self._committed = time.monotonic()

    def _still_there(
        self,
        entries: Sequence[Entry],
        files: Sequence[tuple[str, Stamp]],
        joints: tuple[int, int],
        still_bad: StillBad | None,
    ) -> list[Entry]:
        done: list[Entry] = []
        names: set[str] = set()
        for entry, file in zip(entries, files, strict=False):
            if (entry.path, entry.stamp) != file:
                break
            # a damaged file was left out on request; without the request it is an error
            if entry.damaged and not (still_bad and still_bad(entry.path, names)):
                break
            done.append(entry)
            if entry.clip is not None:
                names.add(entry.clip.name)
        clips = _clips(done)
        if clips:
            num_frames, shape = _extent(clips, joints)
            path = FramesWriter(self.folder, 0, shape).path
            # a clip of more bodies, now gone from the source, may have had the frames before it written again
            if not path.exists() or path.stat().st_size < FramesWriter.size(num_frames, shape):
                self._say_unused("a source that has changed")
                return []
        return done

    def _take_frames_back(self, entries: Sequence[Entry]) -> None:
        # stopped while it finished
        frames, clips = self.folder / FINISHED / "frames.npy", _clips(entries)
        if frames.exists() and clips:
            _, shape = _extent(clips, (0, 0))
            os.rename(frames, FramesWriter(self.folder, 0, shape).path)
            sync(self.folder)

    def _say_unused(self, what: str) -> None:
        print(f"pack_source: the packing that was stopped in {self.folder} was of {what}: it begins again", file=sys.stderr)

    def _write(self, mode: str, lines: bytes, keep: int | None = None) -> None:
        with open(self._path, mode) as file:
            if keep is not None:
                file.truncate(keep)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())


def num_clips(folder: Path) -> int:
    """Count the clips, a scalar, that the journal of a folder vouches for."""
    return sum(json.loads(line)["clip"] is not None for line in _whole_lines(folder / JOURNAL)[1:])


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode() + b"\n"


def _clips(entries: Sequence[Entry]) -> list[ClipFacts]:
    return [entry.clip for entry in entries if entry.clip is not None]


def _extent(clips: Sequence[ClipFacts], joints: tuple[int, int]) -> tuple[int, tuple[int, int, int]]:
    """Return sum T and (M, V, C) of the frames of clips."""
    return sum(clip.num_frames for clip in clips), (max(clip.num_bodies for clip in clips), *joints)


def _whole_lines(path: Path) -> list[bytes]:
    """Return the lines of a journal up to the first that is torn: cut short, or of zeros that never reached the disk."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    lines = []
    for line in content.splitlines(keepends=True):
        try:
            json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        lines.append(line)
    return lines
