"""Nothing half-written: files and folders appear under their name only when they are complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["atomic_folder", "atomic_write", "settle", "sync"]


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to its disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a scratch path beside `path`; rename it to `path` on success, remove it on any error."""
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        # mkstemp creates the file readable by its owner alone: give it the mode an ordinary open would
        mask = os.umask(0)
        os.umask(mask)
        scratch.chmod(0o666 & ~mask)
        sync(scratch)
        os.replace(scratch, target)
        sync(target.parent)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a scratch folder beside `path`; rename it to `path` on success, remove it on any error.

    Raises:
        ValueError: If `path` exists already.
    """
    target = Path(path)
    if target.exists():
        raise ValueError(
            f"atomic_folder: destination must be new, got the existing {target}. Remove it or choose another."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield scratch
        settle(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def settle(folder: Path, target: Path) -> None:
    """Give a complete folder its name: all of it is on disk first."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for entry in folder.rglob("*"):
        if entry.is_file():
            sync(entry)
    sync(folder)
    os.rename(folder, target)
    sync(target.parent)
