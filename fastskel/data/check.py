"""Finds what is wrong with packed data: damaged values, repeats and leaks, wrong units and axes, labels, segments."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastskel.data.clip_checks import CheckThresholds, ClipChecker, ClipMeasures, RawFinding
from fastskel.data.duplicates import equal_clips, fingerprint, shared_frames
from fastskel.data.findings import KINDS, CheckReport, Finding, counted, ordered
from fastskel.data.packed import PackedDataset
from fastskel.data.protocols import protocols, split

__all__ = ["CheckThresholds", "check_dataset"]

Indices = NDArray[np.int64]
# below this many clips one person who lies down could turn the data's common direction
_MIN_CLIPS_UP = 5
# the median of fewer clips is no reference for a subject
_MIN_CLIPS_SUBJECT = 4
# per-frame columns that number the frames of the source
FRAME_NUMBERS = ("frame", "frame_id", "frame_number", "time", "timestamp")


def check_dataset(
    dataset: PackedDataset,
    *,
    protocol: str | None = None,
    split_file: str | os.PathLike[str] | None = None,
    crop: int = 64,
    thresholds: CheckThresholds | None = None,
    progress: bool = False,
) -> CheckReport:
    """Look for everything that is known to go wrong in the n clips, (T, M, V, C) each, of a packed data set.

    The frames are read once, clip by clip; of each frame 8 bytes are kept. `KINDS` lists what can be found. Body,
    bone and speed checks of flat data work in the picture plane, where bone lengths may change.

    Args:
        dataset: Opened data set.
        protocol: Protocol whose parts are compared; None: all that the data set knows.
        split_file: The user's own split instead, as `split` reads it.
        crop: Frames of a training crop; shorter clips are noted.
        thresholds: From where on something is reported; None: the defaults.
        progress: Show a progress bar on standard error.
    Returns:
        The findings, worst first.
    Raises:
        ValueError: If an argument or the protocol does not fit the data set.
    """
    if isinstance(crop, bool) or not isinstance(crop, (int, np.integer)) or crop < 1:
        raise ValueError(f"check_dataset: crop must be a whole number of at least 1, got {crop!r}. Pass frames.")
    if protocol is not None and split_file is not None:
        raise ValueError("check_dataset: protocol or split_file must be given, got both. Leave one out.")
    begin = time.perf_counter()
    thresholds = thresholds or CheckThresholds()
    parts, unusable = _parts(dataset, protocol, split_file)
    check = _Check(dataset, parts, thresholds, int(crop))
    found = list(unusable)
    found += check.clips(progress)
    for step in (check.repeats, check.directions, check.subjects, check.labels, check.segments, check.splits):
        found += step()
    settings = {"protocol": protocol, "split_file": None if split_file is None else os.fspath(split_file), "crop": int(crop)}
    return CheckReport(
        path=dataset.path,
        num_clips=len(dataset),
        num_frames=len(dataset.frames),
        settings={**settings, "thresholds": vars(thresholds).copy()},
        protocols={name: {part: len(clips) for part, clips in members.items()} for name, members in parts.items()},
        findings=ordered(found),
        seconds=time.perf_counter() - begin,
    )


def _parts(
    dataset: PackedDataset, protocol: str | None, split_file: str | os.PathLike[str] | None
) -> tuple[dict[str, dict[str, Indices]], list[Finding]]:
    parts: dict[str, dict[str, Indices]] = {}
    unusable: list[Finding] = []
    if split_file is not None:
        chosen = split(dataset, "", split_file)
        return {os.fspath(split_file): {"train": chosen.train, "test": chosen.test}}, []
    for name in protocols(dataset) if protocol is None else [protocol]:
        if name in dataset.splits:
            # as stored: `split` would refuse the overlaps that are looked for
            stored = dataset.splits[name]
            parts[name] = {part: stored[part] for part in sorted(stored, key=lambda part: (part != "train", part))}
            continue
        try:
            chosen = split(dataset, name)
        except ValueError as error:
            if protocol is not None:
                raise
            unusable.append(_whole("unusable-protocol", 0, f"{name}: {error}"))
        else:
            parts[name] = {"train": chosen.train, "test": chosen.test}
    return parts, unusable


def _whole(kind: str, value: float, detail: str, severity: str | None = None) -> Finding:
    return Finding(kind, severity or KINDS[kind].severity, None, None, (), float(value), detail)


class _Check:
    """One check of one data set: the pass over the clips, then what only all of them together show."""

    def __init__(
        self, dataset: PackedDataset, parts: dict[str, dict[str, Indices]], thresholds: CheckThresholds, crop: int
    ) -> None:
        self.dataset, self.parts, self.thresholds, self.crop = dataset, parts, thresholds, crop
        self.checker = ClipChecker(dataset, thresholds)
        num = len(dataset)
        self.hashes = np.zeros(len(dataset.frames), np.uint64)
        self.fingerprints: list[bytes] = []
        self.upward = np.full((num, len(self.checker.space)), np.nan)
        self.bones = np.full((num, len(self.checker.bones[0])), np.nan, np.float32)

    def at(self, clip: int, found: RawFinding) -> Finding:
        name = str(self.dataset.names[clip])
        return Finding(found.kind, KINDS[found.kind].severity, clip, name, found.frames, float(found.value), found.detail)

    def _all(self, clip: int, kind: str, detail: str) -> RawFinding:
        length = int(self.dataset.num_frames[clip])
        return RawFinding(kind, ((0, length),), length, detail)

    def clips(self, progress: bool) -> Iterator[Finding]:
        from tqdm import tqdm

        numbers = [
            name
            for name in self.dataset.columns
            if name.lower() in FRAME_NUMBERS and self.dataset.per_frame(name) and self.dataset.columns[name].dtype.kind in "iuf"
        ]
        for clip in tqdm(range(len(self.dataset)), desc="checking", unit="clip", disable=not progress):
            frames = self.dataset.clip(clip)
            measures: ClipMeasures = self.checker.check(frames, int(self.dataset.num_bodies[clip]))
            self.fingerprints.append(fingerprint(frames))
            self.hashes[self.dataset.offsets[clip] : self.dataset.offsets[clip + 1]] = measures.hashes
            self.upward[clip], self.bones[clip] = measures.upward, measures.bones
            for found in measures.findings:
                yield self.at(clip, found)
            if 1 < len(frames) < self.crop:
                yield self.at(clip, RawFinding("short-clip", (), len(frames), f"{len(frames)} frames, a crop is {self.crop}"))
            for name in numbers:
                values = self.dataset.column(name, clip)
                # not above all that came before
                late = np.concatenate([[False], values[1:] <= np.maximum.accumulate(values)[:-1]])
                if late.any():
                    words = "{} whose " + name + " does not rise"
                    yield self.at(clip, RawFinding.counting("repeated-frame-ids", late, words))

    def repeats(self) -> Iterator[Finding]:
        """Equal clips, and clips that share frames: across parts as leaks, else as duplicates."""
        num, names, labels = len(self.dataset), self.dataset.names, self.dataset.labels
        groups = equal_clips(self.fingerprints)
        copies = np.zeros(num, bool)
        equals = {clip: group for group in groups for clip in group}
        roles = self._roles()
        for group in groups:
            copies[group[1:]] = True
            leaked = set()
            for protocol, role in roles.items():
                seen = [clip for clip in group if role[clip] == 0]
                for clip in [clip for clip in group if role[clip] == 1 and seen]:
                    leaked.add(clip)
                    detail = f"repeats training clip {names[seen[0]]} ({protocol})"
                    yield self.at(clip, self._all(clip, "leaked-clip", detail))
            rest = [clip for clip in group if clip not in leaked]
            for clip in rest[1:]:
                yield self.at(clip, self._all(clip, "duplicate-clip", f"repeats {names[rest[0]]}"))
            known = [clip for clip in group if labels[clip] >= 0]
            for clip in known[1:]:
                if labels[clip] != labels[known[0]]:
                    detail = f"class {labels[clip]}, but {names[known[0]]} with the same frames is class {labels[known[0]]}"
                    yield self.at(clip, self._all(clip, "conflicting-label", detail))
        for pair in shared_frames(self.hashes, self.dataset.offsets, copies, self.thresholds.shared_frames):
            first, second = equals.get(pair.first, [pair.first]), equals.get(pair.second, [pair.second])
            frames = ((pair.start, pair.end),)
            shifted = ((pair.start + pair.offset, pair.end + pair.offset),)
            other = ", which has another label" if labels[pair.first] != labels[pair.second] else ""
            leaked = set()
            for protocol, role in roles.items():
                for test, train, where in ((second, first, frames), (first, second, shifted)):
                    seen = [clip for clip in train if role[clip] == 0]
                    for clip in [clip for clip in test if role[clip] == 1 and seen]:
                        leaked.add(clip)
                        detail = f"{pair.count} frames of training clip {names[seen[0]]}{other} ({protocol})"
                        yield self.at(clip, RawFinding("leaked-frames", where, pair.count, detail))
            if not leaked:
                detail = f"{pair.count} frames of {names[pair.first]} from frame {shifted[0][0]} on{other}"
                yield self.at(pair.second, RawFinding("near-duplicate", frames, pair.count, detail))

    def _roles(self) -> dict[str, NDArray[np.int8]]:
        # 0 trains, 1 is in another part, -1 in none
        roles = {}
        for protocol, parts in self.parts.items():
            role = np.full(len(self.dataset), -1, np.int8)
            for part, clips in parts.items():
                role[clips] = int(part != "train")
            if "train" in parts:
                role[parts["train"]] = 0
            roles[protocol] = role
        return roles

    def directions(self) -> Iterator[Finding]:
        known = ~np.isnan(self.upward).any(axis=1)
        if known.sum() < _MIN_CLIPS_UP:
            return
        middle = np.median(self.upward[known], axis=0)
        main = int(np.argmax(np.abs(middle)))
        declared = float(middle @ self.checker.up)
        if abs(middle[main]) > self.thresholds.upside_down and declared < abs(middle[main]) / 2:
            axis = ("-" if middle[main] < 0 else "") + "xyz"[self.checker.space[main]]
            detail = f"heads are towards {axis} from the feet, {self.dataset.meta['up_axis']} is declared"
            yield _whole("up-axis", abs(middle[main]), detail)

    def subjects(self) -> Iterator[Finding]:
        """Clips of one body whose bones have other lengths than in the subject's other clips."""
        subject = self._clip_column("subject")
        if subject is None or not self.checker.bones_are_rigid:
            return
        alone = (self.dataset.num_bodies == 1) & ~np.isnan(self.bones).all(axis=1)
        limit = self.thresholds.subject_ratio
        for value in np.unique(subject[alone]):
            clips = np.flatnonzero(alone & (subject == value))
            if len(clips) < _MIN_CLIPS_SUBJECT:
                continue
            bones = self.bones[clips]
            usual = np.array([np.median(column[column > 0]) if (column > 0).any() else np.nan for column in bones.T])
            if np.isnan(usual).all():
                continue
            # short bones are mostly noise: those longer than the middle one speak for the body
            long = usual >= np.nanmedian(usual)
            for clip, lengths in zip(clips.tolist(), bones, strict=True):
                ratios = (lengths / usual)[long & (lengths > 0)]
                ratio = float(np.median(ratios)) if len(ratios) else 1.0
                if not 1 / limit <= ratio <= limit:
                    detail = f"bones are {ratio:.2f} times those of subject {value}'s other clips"
                    yield self.at(clip, RawFinding("subject-size", (), max(ratio, 1 / max(ratio, 1e-9)), detail))

    def _clip_column(self, name: str) -> NDArray[Any] | None:
        if name not in self.dataset.columns or self.dataset.per_frame(name):
            return None
        return self.dataset.columns[name]

    def labels(self) -> Iterator[Finding]:
        labels, names = self.dataset.labels, self.dataset.class_names
        segments = self.dataset.segments
        unknown = np.flatnonzero(labels < 0)
        if len(unknown) and (len(unknown) < len(labels) or segments is None):
            examples = ", ".join(str(self.dataset.names[clip]) for clip in unknown[:3])
            severity = "warning" if len(unknown) < len(labels) else "note"
            yield _whole("unknown-label", len(unknown), f"{len(unknown)} of {len(labels)} clips: {examples}", severity)
        known = labels[labels >= 0]
        classes = np.concatenate([known, segments[:, 1].astype(np.int64)]) if segments is not None else known
        counts = np.bincount(classes, minlength=len(names))
        # without names only gaps below the highest class are known to be gaps
        for label in np.flatnonzero(counts == 0).tolist() if len(classes) else []:
            yield _whole("empty-class", 1, f"{self._class(label)} has no clip and no segment")
        present = counts[counts > 0]
        if len(present) > 1 and present.max() >= self.thresholds.imbalance * present.min():
            most, least = int(counts.argmax()), int(np.where(counts > 0, counts, counts.max() + 1).argmin())
            detail = f"{self._class(most)} has {counts[most]:,} clips, {self._class(least)} has {counts[least]:,}"
            yield _whole("class-imbalance", float(present.max() / present.min()), detail)

    def _class(self, label: int) -> str:
        names = self.dataset.class_names
        return f"class {label}" + (f" ({names[label]})" if label < len(names) else "")

    def segments(self) -> Iterator[Finding]:
        if self.dataset.segments is None:
            return
        rows = self.dataset.segments[:, :4].astype(np.int64)
        for clip, label, start, end in rows[rows[:, 3] <= rows[:, 2]].tolist():
            detail = f"{self._class(label)} starts at {start} and ends at {end}"
            yield self.at(clip, RawFinding("empty-segment", (), start - end, detail))
        rows = rows[rows[:, 3] > rows[:, 2]]
        rows = rows[np.lexsort((rows[:, 3], rows[:, 2], rows[:, 0]))]
        # the segment so far that ends last in its clip: (clip, class, end)
        last = (-1, -1, 0)
        for clip, label, start, end in rows.tolist():
            if last[0] == clip and start < last[2]:
                shared = min(end, last[2])
                detail = f"{self._class(label)} begins in {self._class(last[1])}"
                yield self.at(clip, RawFinding("overlapping-segments", ((start, shared),), shared - start, detail))
            if last[0] != clip or end > last[2]:
                last = (clip, label, end)

    def splits(self) -> Iterator[Finding]:
        """Clips, subjects and classes of the parts of each protocol."""
        subject = self._clip_column("subject")
        for protocol, parts in self.parts.items():
            for (first, one), (second, other) in combinations(parts.items(), 2):
                for clip in np.intersect1d(one, other).tolist():
                    yield self.at(clip, RawFinding("shared-clip", (), 1, f"in {first} and {second} ({protocol})"))
                if subject is None:
                    continue
                both = np.intersect1d(subject[one], subject[other])
                if len(both):
                    shown = ", ".join(map(str, both[:5])) + (", ..." if len(both) > 5 else "")
                    detail = f"{len(both)} subjects ({shown}) in {first} and {second} ({protocol})"
                    # other protocols mix subjects on purpose
                    severity = "error" if protocol.startswith("xsub") else "note"
                    clips = int(np.isin(subject[one], both).sum() + np.isin(subject[other], both).sum())
                    yield _whole("shared-subject", clips, detail, severity)
            if "train" not in parts:
                continue
            labels = self.dataset.labels
            trained = np.unique(labels[parts["train"]])
            # there, classes that are not trained are what is asked for
            asked = "note" if protocol == "one-shot" else None
            for part, members in parts.items():
                for missing in np.setdiff1d(labels[members], [*trained, -1]).tolist():
                    count = int((labels[members] == missing).sum())
                    detail = f"{self._class(missing)}: {counted(count, f'{part} clip')} ({protocol})"
                    yield _whole("untrained-class", count, detail, asked)
