"""Gathers what clips of a public data set bring beside frames: names, classes, segments, columns, notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastskel.data.formats.format import Format, SourceClip

__all__ = ["ClipFacts", "GatheredClips"]


@dataclass(frozen=True)
class ClipFacts:
    """What a clip, (T, M, V, C), brings beside its frames, in plain values that JSON keeps as they are.

    Attributes:
        name: Unique name within the data set.
        num_frames: T.
        num_bodies: M.
        label: Class, -1 where unknown.
        columns: Integer or text columns of the clip.
        frame_columns: One value per frame, (T,) each.
        segments: Rows (class, start, end, confidence).
        class_name: Name of its class where the format does not know them beforehand.
        notes: What its user should know.
    """

    name: str
    num_frames: int
    num_bodies: int
    label: int
    columns: Mapping[str, int | str]
    frame_columns: Mapping[str, NDArray[Any]]
    segments: Sequence[Sequence[float]]
    class_name: str | None
    notes: Sequence[str]

    @classmethod
    def of(cls, clip: SourceClip) -> ClipFacts:
        """Return the facts of a clip, (T, M, V, C)."""
        for values in clip.frame_columns.values():
            assert len(values) == len(clip.frames)
        return cls(
            name=str(clip.name),
            num_frames=len(clip.frames),
            num_bodies=clip.frames.shape[1],
            label=int(clip.label),
            columns={name: _plain(value) for name, value in clip.columns.items()},
            frame_columns=dict(clip.frame_columns),
            segments=[[_plain(value) for value in row] for row in clip.segments],
            class_name=clip.class_name,
            notes=list(clip.notes),
        )

    def plain(self) -> dict[str, Any]:
        """Return the facts as plain values by name, (9,)."""
        columns = {name: [values.dtype.str, values.tolist()] for name, values in self.frame_columns.items()}
        return {**vars(self), "frame_columns": columns}

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> ClipFacts:
        """Return the facts that plain values by name, (9,), were made of."""
        columns = {name: np.array(values, dtype) for name, (dtype, values) in plain["frame_columns"].items()}
        return cls(**{**plain, "frame_columns": columns})


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


class GatheredClips:
    """What clips, (T, M, V, C) each, bring beside their frames, in the order in which they are packed.

    Attributes:
        names: Names of the clips, (n,).
        lengths: Frames T of each, (n,).
        bodies: Bodies M of each, (n,).
        notes: Clip name and remark.
    """

    def __init__(self, fmt: Format) -> None:
        self.fmt = fmt
        self.names: list[str] = []
        self.lengths: list[int] = []
        self.bodies: list[int] = []
        self.notes: list[tuple[str, str]] = []
        self._paths: dict[str, str] = {}
        self._labels: list[int] = []
        self._class_names: list[str | None] = []
        self._segments: list[tuple[float, ...]] = []
        self._columns: dict[str, list[int | str]] = {name: [] for name in fmt.columns}
        self._frame_columns: dict[str, list[NDArray[Any]]] = {name: [] for name in fmt.frame_columns}

    def check(self, name: str, path: str) -> None:
        """Refuse the name of a next clip, a scalar string, if it is taken.

        Raises:
            ValueError: If an earlier clip has it.
        """
        if name in self._paths:
            raise ValueError(
                f"pack_source: clips must be of distinct names, got {name!r} from {self._paths[name]} and {path}. "
                "Remove one of them."
            )

    def take(self, facts: ClipFacts, path: str) -> None:
        """Take in the next clip, (T, M, V, C), whose name was checked."""
        number = len(self.names)
        self._paths[facts.name] = path
        self.names.append(facts.name)
        self.lengths.append(facts.num_frames)
        self.bodies.append(facts.num_bodies)
        self._labels.append(facts.label)
        self._class_names.append(facts.class_name)
        self._segments += [(number, *row) for row in facts.segments]
        for name, values in self._columns.items():
            values.append(facts.columns[name])
        for name, arrays in self._frame_columns.items():
            arrays.append(facts.frame_columns[name])
        self.notes += [(facts.name, note) for note in facts.notes]

    def classes(self) -> tuple[NDArray[np.int64], list[str]]:
        """Return the class of each clip, (n,), and the class names, (K,).

        Names that came without numbers are numbered in their order: that of the numbers if all are numbers.

        Raises:
            ValueError: If one class has two names.
        """
        numbers = np.array(self._labels, dtype=np.int64)
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

    def columns(self) -> dict[str, tuple[str, NDArray[Any]]]:
        """Return the columns with one value per clip, (n,), and per frame, (sum T,)."""
        of_clips = {name: ("clip", np.array(values)) for name, values in self._columns.items()}
        of_frames = {name: ("frame", np.concatenate(values)) for name, values in self._frame_columns.items()}
        return of_clips | of_frames

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
