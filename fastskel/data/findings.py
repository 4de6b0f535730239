"""What a check of packed data found: kinds of findings, the findings, and their report as table and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastskel.atomic import atomic_write

__all__ = ["KINDS", "SEVERITIES", "CheckReport", "Finding", "Kind", "counted", "frame_ranges", "ordered"]

SEVERITIES = ("note", "warning", "error")
_EXAMPLES = 3
# ranges of frames shown per example; all of them are in the JSON
_RANGES = 3


@dataclass(frozen=True)
class Kind:
    """What findings of one kind have in common.

    Attributes:
        severity: "error", "warning" or "note".
        value: What `Finding.value` counts or measures; findings with the largest are shown first.
        advice: What to do about it.
    """

    severity: str
    value: str
    advice: str


KINDS: Mapping[str, Kind] = {
    "non-finite": Kind("error", "frames", "Set absent joints to zero; remove the clips if much is lost."),
    "empty-clip": Kind("error", "frames", "Remove the clips: no joint is known in any frame."),
    "unit-scale": Kind("error", "body size", "Convert the coordinates, or declare the units that they are in."),
    "up-axis": Kind("error", "share of the body size", "Declare the axis that points up, or turn the data."),
    "leaked-clip": Kind("error", "frames", "Take these clips out of the test part, or report results without them."),
    "leaked-frames": Kind("error", "shared frames", "Keep recordings whole: put both clips into the same part."),
    "shared-clip": Kind("error", "clips", "Remove the clip from one of the parts."),
    "shared-subject": Kind("error", "clips", "Move the subject to one part, or say that the protocol mixes subjects."),
    "conflicting-label": Kind("error", "frames", "Decide which label is right: the frames are the same."),
    "empty-segment": Kind("error", "frames too many", "Correct start and end, or remove the segment."),
    "zero-frames": Kind("warning", "frames", "Drop the frames (num_frames=None when packing), or fill them."),
    "frozen-frames": Kind("warning", "longest run", "Cut the frozen part: the sensor or the writer stood still."),
    "repeated-frames": Kind("warning", "frames", "Drop the copies, unless the source repeats frames on purpose."),
    "repeated-frame-ids": Kind("warning", "frames", "Drop rows whose frame number was there before, or sort them."),
    "duplicate-clip": Kind("warning", "frames", "Keep one of the clips."),
    "near-duplicate": Kind("warning", "shared frames", "Keep one of the clips, or cut the part they share."),
    "swapped-bodies": Kind("warning", "exchanges", "Track bodies over time: one person should keep one slot."),
    "left-right-swap": Kind("warning", "exchanges", "Swap the joints back where the tracker took left for right."),
    "bone-spread": Kind("warning", "relative spread", "Look at the clip (fastskel show): tracking failed or the scale changes."),
    "subject-size": Kind("warning", "ratio", "Check subject and units: the bones are not those of the subject's other clips."),
    "teleport": Kind("warning", "body sizes per frame", "Look at the frames; smooth or drop them."),
    "upside-down": Kind("warning", "share of the body size", "Turn the clip, unless the person hangs or stands on the hands."),
    "body-count": Kind("warning", "bodies", "Pack again with the bodies that the frames hold."),
    "unknown-label": Kind("warning", "clips", "Label the clips, or leave them out where labels are needed."),
    "empty-class": Kind("warning", "classes", "Remove the class name, or pack the missing clips."),
    "untrained-class": Kind("warning", "clips", "Put clips of the class into the training part (few-shot protocols excepted)."),
    "class-imbalance": Kind("warning", "ratio", "Report the mean over classes beside the accuracy, or sample by class."),
    "overlapping-segments": Kind("warning", "shared frames", "Decide which label the shared frames have."),
    "one-frame": Kind("warning", "frames", "Remove the clips: one frame has no motion."),
    "short-clip": Kind("note", "frames", "Nothing, if stretching a short clip to the crop is meant."),
    "body-gap": Kind("note", "frames", "Nothing, if the body left the picture; else fill its frames."),
    "unusable-protocol": Kind("note", "clips", "Nothing, unless the protocol is needed."),
}


def frame_ranges(mask: NDArray[np.bool_]) -> tuple[tuple[int, int], ...]:
    """Return the runs of a mask over frames, (T,), as (start, end) pairs, end exclusive."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth a look.

    Attributes:
        kind: Name in `KINDS`.
        severity: "error", "warning" or "note".
        clip: Index of the clip; None for the data set as a whole.
        name: Name of the clip; None for the data set as a whole.
        frames: Frames of the clip as (start, end) ranges, end exclusive; empty where the whole clip is meant.
        value: How much, in what `KINDS[kind].value` says.
        detail: The same in words.
    """

    kind: str
    severity: str
    clip: int | None
    name: str | None
    frames: tuple[tuple[int, int], ...]
    value: float
    detail: str

    @property
    def num_frames(self) -> int:
        """Frames in `frames`, a count."""
        return sum(end - start for start, end in self.frames)


@dataclass(frozen=True)
class CheckReport:
    """Everything that a check found.

    Attributes:
        path: Folder of the data set.
        num_clips: Clips that were checked.
        num_frames: Frames of all clips.
        settings: Arguments and thresholds of the check.
        protocols: Protocol or split file to the number of clips in each part.
        findings: By severity, then kind, largest value first.
        seconds: Time that the check took.
    """

    path: Path
    num_clips: int
    num_frames: int
    settings: Mapping[str, Any]
    protocols: Mapping[str, Mapping[str, int]]
    findings: tuple[Finding, ...]
    seconds: float = field(default=0.0, compare=False)

    def at_least(self, severity: str) -> list[Finding]:
        """Return the findings of a severity or a worse one.

        Raises:
            ValueError: If there is no such severity.
        """
        if severity not in SEVERITIES:
            known = ", ".join(SEVERITIES)
            raise ValueError(f"CheckReport.at_least: severity must be one of {known}, got {severity!r}. Choose one.")
        return [f for f in self.findings if SEVERITIES.index(f.severity) >= SEVERITIES.index(severity)]

    def of(self, kind: str) -> list[Finding]:
        """Return the findings of one kind.

        Raises:
            ValueError: If there is no such kind.
        """
        if kind not in KINDS:
            raise ValueError(f"CheckReport.of: kind must be one of {', '.join(KINDS)}, got {kind!r}. Choose one.")
        return [finding for finding in self.findings if finding.kind == kind]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per kind of finding and severity: kind, severity, findings, clips, frames, advice."""
        rows: dict[tuple[str, str], list[Finding]] = {}
        for finding in self.findings:
            rows.setdefault((finding.kind, finding.severity), []).append(finding)
        return [
            {
                "kind": kind,
                "severity": severity,
                "findings": len(found),
                "clips": len({finding.clip for finding in found if finding.clip is not None}),
                "frames": sum(finding.num_frames for finding in found),
                "value": KINDS[kind].value,
                "advice": KINDS[kind].advice,
            }
            for (kind, severity), found in rows.items()
        ]

    def table(self) -> str:
        """Return the report for a terminal, one row per kind of finding with its worst examples."""
        lines = [f"packed data set {self.path}: {self.num_clips:,} clips, {self.num_frames:,} frames, {self.seconds:.1f} s"]
        for protocol, parts in self.protocols.items():
            shown = [f"{count:,} {part}" for part, count in parts.items()]
            lines.append(f"protocol {protocol}: {', '.join(shown)}")
        rows = self.rows()
        if not rows:
            return "\n".join([*lines, "nothing found"])
        lines += ["", f"{'severity':<8}  {'kind':<20}  {'clips':>6}  {'frames':>8}  worst"]
        for row in rows:
            found = [f for f in self.findings if (f.kind, f.severity) == (row["kind"], row["severity"])]
            shown = [_example(finding) for finding in found[:_EXAMPLES]]
            if len(found) > _EXAMPLES:
                shown.append(f"and {len(found) - _EXAMPLES:,} more")
            sizes = f"{row['clips'] or '-':>6}  {row['frames'] or '-':>8}"
            lines.append(f"{row['severity']:<8}  {row['kind']:<20}  {sizes}  {shown[0]}")
            lines += [f"{'':<50}{text}" for text in [*shown[1:], f"-> {row['advice']}"]]
        counts = {severity: sum(f.severity == severity for f in self.findings) for severity in reversed(SEVERITIES)}
        total = ", ".join(counted(count, severity) for severity, count in counts.items())
        return "\n".join([*lines, "", total])

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything as JSON: settings, protocols, rows by kind, and all findings.

        Raises:
            ValueError: If the file cannot be written.
        """
        content = {
            "format_version": 1,
            "path": str(self.path),
            "num_clips": self.num_clips,
            "num_frames": self.num_frames,
            "settings": dict(self.settings),
            "protocols": {name: dict(parts) for name, parts in self.protocols.items()},
            "kinds": self.rows(),
            "findings": [vars(finding) for finding in self.findings],
        }
        try:
            with atomic_write(path) as scratch:
                scratch.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"write_json: path must be writable, got {error.strerror or error}, in {os.fspath(path)}. Choose another."
            ) from error


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, such as "1 frame" or "1,200 frames"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _example(finding: Finding) -> str:
    ranges = [f"{start}" if end == start + 1 else f"{start}:{end}" for start, end in finding.frames[:_RANGES]]
    if len(finding.frames) > _RANGES:
        ranges.append("...")
    place = [finding.name] if finding.name is not None else []
    place += [f"[{', '.join(ranges)}]"] if ranges else []
    return " ".join([*place, finding.detail])


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Sort findings by severity, kind, value and clip: worst first."""
    rank = {kind: number for number, kind in enumerate(KINDS)}

    def key(finding: Finding) -> tuple[int, int, float, int]:
        clip = -1 if finding.clip is None else finding.clip
        return -SEVERITIES.index(finding.severity), rank[finding.kind], -finding.value, clip

    return tuple(sorted(findings, key=key))
