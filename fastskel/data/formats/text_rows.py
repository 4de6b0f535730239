"""Rows of numbers as text, one per frame: what several data sets and the generic reader store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastskel.data.formats.format import unreadable

__all__ = ["number_rows", "text_lines", "whole_column"]


def text_lines(data: bytes, path: str) -> list[tuple[int, str]]:
    """Return the lines of a text, (L,), that are not blank, each with its number counted from 1.

    Raises:
        ValueError: If it is no text, or empty.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise unreadable("text in UTF-8", f"other bytes ({error.reason} at byte {error.start})", path) from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line]
    if not lines:
        raise unreadable("at least one frame", "none", path)
    return lines


def number_rows(
    lines: Sequence[tuple[int, str]], path: str, num_values: int | None, separator: str | None = None
) -> NDArray[np.float64]:
    """Read rows of numbers.

    Args:
        lines: Numbered lines, (T,), at least one.
        path: Their file, for messages.
        num_values: Numbers of every row, n; None: as many as the first row has.
        separator: What is between two numbers; None: blanks.
    Returns:
        The numbers, (T, n), NaN and infinity among them where the file says so.
    Raises:
        ValueError: If a row has another number of values, or a value is no number; names the line.
    """
    try:
        # what numpy may warn of shows in the shape: catching warnings would change them for all threads
        rows = np.loadtxt([line for _, line in lines], delimiter=separator, comments=None, ndmin=2)
        if rows.shape == (len(lines), rows.shape[1] if num_values is None else num_values):
            return rows
    except (ValueError, UserWarning, DeprecationWarning):
        pass
    # something is wrong: the slow way says what and where
    values: list[list[float]] = []
    for number, line in lines:
        row = line.split(separator)
        num_values = len(row) if num_values is None else num_values
        if len(row) != num_values:
            raise unreadable(f"{num_values} numbers in every row", f"{len(row)} in line {number}", path)
        values.append([_number(value, number, path) for value in row])
    return np.array(values)


def _number(text: str, line: int, path: str) -> float:
    try:
        # Python takes 1_000 and digits of any script, files do not mean them
        if "_" not in text and text.isascii():
            return float(text)
    except ValueError:
        pass
    raise unreadable("made of numbers", f"{text[:80]!r} in line {line}", path)


def whole_column(rows: NDArray[np.float64], column: int, what: str, path: str) -> NDArray[np.int64]:
    """Return a column of rows, (T, n), that holds whole numbers, (T,), int64.

    Raises:
        ValueError: If one is not whole; names its row.
    """
    values = rows[:, column]
    # beyond this not every whole number is a double
    whole = (np.abs(values) < 2**53) & (np.floor(values) == values)
    if not whole.all():
        row = int(np.argmin(whole))
        raise unreadable(f"of whole {what}", f"{values[row]} in row {row}", path)
    return values.astype(np.int64)
