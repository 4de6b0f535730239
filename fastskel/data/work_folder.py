"""The folder beside a destination in which a packing lies until it is complete; one process at a time may have it."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastskel.atomic import settle
from fastskel.data.journal import FINISHED, num_clips
from fastskel.data.writer import check_new, unwritable

__all__ = ["work_folder"]

_LOCK = "lock"
# to make a folder that others make and remove
_ATTEMPTS = 100


@contextlib.contextmanager
def work_folder(dst: Path) -> Iterator[Path]:
    """Lock and yield `DST.packing`; what lies in its folder `finished` becomes `dst` on success.

    What was packed stays where it is if the body fails or is interrupted, and the error says so; without a packed clip,
    (T, M, V, C), nothing stays.

    Raises:
        ValueError: If `dst` exists or cannot be written, or another process packs it.
    """
    folder = dst.parent / f"{dst.name}.packing"
    try:
        # "." and "/" have no name to put a folder beside
        if not dst.name or not folder.exists():
            check_new("pack_source", dst)
        with _locked(folder):
            try:
                check_new("pack_source", dst)
                yield folder
                settle(folder / FINISHED, dst)
            except OSError as error:
                raise ValueError(f"{unwritable('pack_source', dst, error)}{_advice(folder)}") from error
            except ValueError as error:
                raise ValueError(f"{error}{_advice(folder)}") from error
            except KeyboardInterrupt as stop:
                raise KeyboardInterrupt(_advice(folder).strip()) from stop
            finally:
                if not _num_kept(folder):
                    _remove(folder)
    except OSError as error:
        raise unwritable("pack_source", dst, error) from error


def _num_kept(folder: Path) -> int:
    # a packing that was killed between its last two steps has left a journal, but its frames are at the destination
    frames = [*folder.glob("frames-*.npy"), *(folder / FINISHED).glob("frames.npy")]
    return num_clips(folder) if frames else 0


def _advice(folder: Path) -> str:
    kept = _num_kept(folder)
    if not kept:
        return ""
    return (
        f" {kept:,} packed clips stay in {folder}: the same command goes on after them; to begin again, remove that folder."
    )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    names = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        names = os.listdir(folder)
    # one look at all names: another process makes its lock first and removes it last
    if names and _LOCK not in names:
        raise ValueError(f"pack_source: {folder} must be what a packing left, got another folder. Move it away.")
    for attempt in itertools.count(1):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except (FileNotFoundError, FileExistsError):
            # the process that had the folder may have removed it just now
            if attempt == _ATTEMPTS:
                raise
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_lock(folder, descriptor):
                yield
                return
        except BlockingIOError as error:
            raise ValueError(
                f"pack_source: destination must be packed by one process at a time, got another one at work in {folder}. "
                "Wait for it or choose another."
            ) from error
        finally:
            os.close(descriptor)


def _is_lock(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), (folder / _LOCK).stat())
    except FileNotFoundError:
        return False


def _remove(folder: Path) -> None:
    # what cannot be removed is no reason to fail: the next packing of the destination tries again
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()
        # last: who comes next may make a lock of its own from here on
        (folder / _LOCK).unlink()
        folder.rmdir()
