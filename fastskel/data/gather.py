"""Gathers what clips of a public data set bring beside frames: classes, segments, per-frame columns, notes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastskel.data.formats.format import Format, SourceClip

__all__ = ["GatheredExtras"]


class GatheredExtras:
    """What clips, (T, M, V, C) each, bring beside their frames, in the order in which they are packed."""

    def __init__(self, fmt: Format) -> None:
        self.fmt = fmt
        self.notes: list[tuple[str, str]] = []
        self._paths: dict[str, str] = {}
        self._class_names: list[str | None] = []
        self._segments: list[tuple[int, int, int, int, float]] = []
        self._frame_columns: dict[str, list[NDArray[Any]]] = {name: [] for name in fmt.frame_columns}

    def take(self, clip: SourceClip, path: str) -> None:
        """Take in the next clip, (T, M, V, C).

        Raises:
            ValueError: If an earlier clip has its name.
        """
        if clip.name in self._paths:
            raise ValueError(
                f"pack_source: clips must be of distinct names, got {clip.name!r} from {self._paths[clip.name]} and {path}. "
                "Remove one of them."
            )
        number = len(self._paths)
        self._paths[clip.name] = path
        self._class_names.append(clip.class_name)
        self._segments += [(number, *row) for row in clip.segments]
        for name, values in self._frame_columns.items():
            assert len(clip.frame_columns[name]) == len(clip.frames)
            values.append(clip.frame_columns[name])
        self.notes += [(clip.name, note) for note in clip.notes]

    def classes(self, labels: Sequence[int]) -> tuple[NDArray[np.int64], list[str]]:
        """Return the class of each clip, (n,), and the class names, (K,).

        Names that came without numbers are numbered in their order: that of the numbers if all are numbers.

        Raises:
            ValueError: If one class has two names.
        """
        numbers = np.array(labels, dtype=np.int64)
        if self.fmt.class_names or not any(self._class_names):
            return numbers, list(self.fmt.class_names)
        if (numbers >= 0).any():
            return numbers, self._names_of(numbers)
        named = {name for name in self._class_names if name is not None}
        order = sorted(named, key=int) if all(name.isdecimal() for name in named) else sorted(named)
        index = {name: number for number, name in enumerate(order)}
        return np.array([-1 if name is None else index[name] for name in self._class_names], dtype=np.int64), order

    def segments(self) -> dict[str, NDArray[np.float64]]:
        """Return the array of segments, (S, 5), under its name, or nothing if there are none."""
        return {"segments": np.array(self._segments, dtype=np.float64)} if self._segments else {}

    def frame_columns(self) -> dict[str, tuple[str, NDArray[Any]]]:
        """Return the columns with one value per frame, (sum T,)."""
        return {name: ("frame", np.concatenate(values)) for name, values in self._frame_columns.items()}

    def _names_of(self, numbers: NDArray[np.int64]) -> list[str]:
        names = [f"class {number}" for number in range(int(numbers.max()) + 1)]
        first: dict[int, str] = {}
        for number, name, path in zip(numbers.tolist(), self._class_names, self._paths.values(), strict=True):
            if number < 0 or name is None:
                continue
            if first.setdefault(number, name) != name:
                raise ValueError(
                    f"pack_source: class {number} must be of one name, got {first[number]!r} and, in {path}, {name!r}. "
                    "Correct the files."
                )
            names[number] = name
        return names
