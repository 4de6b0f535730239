"""Parameters of transforms: what is accepted, and shares as counts."""

from __future__ import annotations

import math

__all__ = ["LARGEST", "check_flag", "check_number", "check_share", "share_of"]

# bound of parameters: a product with a coordinate stays far from the end of float32
LARGEST = 1e30


def check_number(owner: str, name: str, value: object, least: float, most: float, contract: str) -> None:
    """Raise ValueError unless `value`, a scalar, is a plain number from `least` to `most`."""
    # a float of NumPy other than float64 would not survive the record of a run, which is JSON
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"{owner}: {name} must be {contract}, got {value!r}. Give a number in that range.")


def check_share(owner: str, name: str, value: object) -> None:
    """Raise ValueError unless `value`, a scalar, is a plain number from 0 to 1."""
    check_number(owner, name, value, 0.0, 1.0, "in [0, 1]")


def check_flag(owner: str, name: str, value: object) -> None:
    """Raise ValueError unless `value`, a scalar, is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{owner}: {name} must be True or False, got {value!r}. Give one of them.")


def share_of(fraction: float, count: int) -> int:
    """A share of `count` things as a whole number, a scalar: floor(fraction count + 1/2), in double."""
    return math.floor(fraction * count + 0.5)
