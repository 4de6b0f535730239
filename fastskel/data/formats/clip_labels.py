"""Classes of a user's own files: none, the folder that a file lies in, or a CSV file of clip name and class."""

from __future__ import annotations

import csv
import io
import os
import reprlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from fastskel.data.formats.format import unreadable

__all__ = ["LabelOptions", "wrong_option"]


@dataclass(frozen=True)
class LabelOptions:
    """Where classes come from.

    Attributes:
        labels: Where classes come from: none, folder (the folder that a file lies in) or a CSV file of clip name and class.
    """

    labels: str = "none"

    def __post_init__(self) -> None:
        # read now: a wrong path is an error of the call, not of a file
        if self.labels not in ("none", "folder"):
            _ = self.classes

    @cached_property
    def classes(self) -> dict[str, str]:
        """Class of each clip by its name, from the CSV file."""
        path = Path(self.labels)
        try:
            rows = [row for row in csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"))) if row]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise wrong_option("labels", "none, folder or a readable CSV file", f"{error}, in {path}", "Correct it") from error
        classes: dict[str, str] = {}
        for row in rows:
            name, label = (cell.strip() for cell in row) if len(row) == 2 else ("", "")
            if not name or not label or name in classes:
                actual = f"{reprlib.repr(row)}, in {path}"
                raise wrong_option("labels", "rows of distinct clip name and class", actual, "Correct the file")
            classes[name] = label
        return classes

    def class_of(self, path: str) -> str | None:
        """Return the class of the clip at a path (a scalar string), None where there are none.

        Raises:
            ValueError: If the CSV file has no row for it.
        """
        if self.labels == "none":
            return None
        if self.labels == "folder":
            # that of ./walk.npy has a name as well
            return PurePosixPath(os.path.abspath(path)).parent.name
        name = PurePosixPath(path).stem
        if name not in self.classes:
            raise unreadable("in the list of labels", f"no row for {name!r} in {self.labels}", path, "Add it")
        return self.classes[name]


def wrong_option(option: str, contract: str, actual: str, action: str) -> ValueError:
    """Return the error for an option (a scalar) that does not fit."""
    return ValueError(f"pack_source: option {option} must be {contract}, got {actual}. {action}.")
