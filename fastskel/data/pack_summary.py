"""What a packing did, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PackSummary"]

_LISTED, _LISTED_LONG = 10, 40


@dataclass(frozen=True)
class PackSummary:
    """What `pack_source` wrote.

    Attributes:
        path: The packed data set.
        clips: Number of clips.
        frames: Frames of all clips together.
        bodies: Most bodies in one clip.
        skipped: Path and reason of every file that holds no clip.
        seconds: Wall-clock time.
        notes: Clip name and remark, where the user should know something about a clip that was packed.
        damaged: Path and reason of every file that was left out because it could not be read (`skip_bad`).
        read_bytes: Bytes of the clip files that were read; 0 where the format has no file for each clip.
        resumed: Files that an earlier call had done, which was stopped.
    """

    path: Path
    clips: int
    frames: int
    bodies: int
    skipped: tuple[tuple[str, str], ...]
    seconds: float
    notes: tuple[tuple[str, str], ...] = ()
    damaged: tuple[tuple[str, str], ...] = ()
    read_bytes: int = 0
    resumed: int = 0

    def __str__(self) -> str:
        lines = [f"packed {self.clips:,} clips, {self.frames:,} frames, {self.bodies} bodies at most, into {self.path}"]
        lines[0] += f" in {self.seconds:.1f} s"
        if self.read_bytes:
            lines[0] += f" ({self.read_bytes / 1e6 / max(self.seconds, 1e-9):.1f} MB/s)"
        if self.resumed:
            lines.append(f"  {self.resumed:,} files had been done before, by a call that was stopped")
        if self.damaged:
            lines.append(f"  left out {len(self.damaged):,} damaged files:")
        lines += _listed("damaged", self.damaged, _LISTED_LONG, "files")
        lines += _grouped(self.skipped)
        lines += _listed("note", self.notes, _LISTED_LONG, "notes")
        return "\n".join(lines)


def _listed(word: str, rows: tuple[tuple[str, str], ...], most: int, what: str) -> Iterator[str]:
    yield from (f"  {word} {name}: {text}" for name, text in rows[:most])
    if len(rows) > most:
        yield f"  and {len(rows) - most:,} more {what}"


def _grouped(skipped: tuple[tuple[str, str], ...]) -> Iterable[str]:
    if len(skipped) <= _LISTED:
        return _listed("skipped", skipped, _LISTED, "files")
    first: dict[str, str] = {}
    for path, reason in skipped:
        first.setdefault(reason, path)
    counts = Counter(reason for _, reason in skipped).most_common()
    rows = [f"  skipped {count:,} files: {reason} ({first[reason]}, ...)" for reason, count in counts[:_LISTED]]
    if len(counts) > _LISTED:
        rows.append(f"  and {sum(count for _, count in counts[_LISTED:]):,} more files")
    return rows
