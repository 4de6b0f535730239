"""What produced a result: the command, the versions, the commit of the sources."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["commit", "provenance", "versions"]

PACKAGES = ("fastskel", "torch", "numpy", "triton")
GIT_SECONDS = 10


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command, None where it fails or there is no git."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit(source: Path | None = None) -> str | None:
    """Name the commit that a source file belongs to, ending in `-dirty` where the checkout differs from it.

    Args:
        source: A file; None is this package.
    Returns:
        The full hash; None where git does not track the file, as when the package is installed.
    """
    source = (source or Path(__file__)).resolve()
    # an installed package may lie inside another project's checkout, whose commit says nothing about it
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None
    # tags are excluded: the hash alone is the name
    return _git(source.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def versions() -> dict[str, str]:
    """Name the versions of Python and of the packages that results depend on; "absent" where one is not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def provenance() -> dict[str, Any]:
    """Say what produced a result: `command`, `versions` and `commit`, as plain values."""
    return {"command": list(sys.argv), "versions": versions(), "commit": commit()}
