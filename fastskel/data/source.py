"""Files of a data set, from a folder or straight from an archive, without extracting anything."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import lzma
import os
import re
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

__all__ = ["SourceFiles", "open_source"]

_DAMAGED = (
    OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, RuntimeError,
    # out of tarfile and zipfile, which look at the last letter of an empty name; a compressor may claim any memory
    IndexError, MemoryError,
)  # fmt: skip
# kinds of headers that tarfile reads whole whatever size they claim, and what no name needs
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
MAX_HEADER_BYTES = 1 << 20
# how tar archives begin that are compressed: told by themselves, not tried one after another
_COMPRESSED = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz"}
# a clip of an hour is some tens of megabytes as text: whatever is larger is no clip
MAX_FILE_BYTES = 256 << 20
# of the disk that the copy of an archive is written to; whatever else the system refuses is about the archive
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Member(tarfile.TarInfo):
    """A member of an archive whose damaged header is an error; tarfile would take it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        member: _Member = super().frombuf(buf, encoding, errors)
        if member.type in _EXTENDED and member.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header of {member.size:,} bytes")
        return member


@dataclass
class SourceFiles:
    """The clip files of a source.

    Attributes:
        paths: Path of each file inside the source, sorted by file name.
        skipped: Path and reason of what is no clip file.
        beside: Path of each file that says something about clips, sorted.
        stamps: Size in bytes and time of change in nanoseconds of every file of `paths` and `beside`; of members of an
            archive the time is the archive's.
    """

    root: Path
    paths: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    stamps: dict[str, tuple[int, int]] = field(default_factory=dict)
    _beside: re.Pattern[str] | None = None
    _spool: IO[bytes] | None = None
    _places: dict[str, tuple[int, int]] = field(default_factory=dict)

    def read(self, path: str) -> bytes:
        """Return the contents of one file, (bytes,). Threads may call this at the same time.

        Raises:
            ValueError: If the file cannot be read.
        """
        if self._spool is not None:
            start, size = self._places[path]
            # pread has a place of its own in each call, where seek and read would share one between threads
            parts = []
            while size and (part := os.pread(self._spool.fileno(), size, start)):
                parts.append(part)
                start, size = start + len(part), size - len(part)
            return b"".join(parts)
        try:
            return (self.root / path).read_bytes()
        except OSError as error:
            raise _unreadable("readable", str(error.strerror), self.root / path) from error

    def _offer(self, path: str, suffix: str, regular: bool, size: int, changed: int) -> bool:
        name = PurePosixPath(path).name
        beside = self._beside is not None and self._beside.search(path) is not None
        if name.startswith("."):
            reason = "hidden file"
        elif PurePosixPath(name).stem.lower() == "readme":
            reason = "a description"
        elif not beside and not name.endswith(suffix):
            reason = f"not a {suffix} file"
        elif not regular:
            reason = "not a regular file"
        elif size > MAX_FILE_BYTES:
            reason = f"larger than {MAX_FILE_BYTES >> 20} MiB"
        else:
            (self.beside if beside else self.paths).append(path)
            self.stamps[path] = (size, changed)
            return True
        self.skipped.append((path, reason))
        return False

    def _keep(self, path: str, stream: IO[bytes], size: int) -> None:
        assert self._spool is not None
        # read one byte more than promised: an archive can lie about sizes
        content = stream.read(size + 1)
        if len(content) != size:
            raise EOFError(f"{len(content)} of {size} bytes of {path}")
        self._places[path] = (self._spool.seek(0, io.SEEK_END), size)
        self._spool.write(content)


def _unreadable(contract: str, actual: str, path: Path, action: str = "Fetch it again") -> ValueError:
    return ValueError(f"pack_source: source must be {contract}, got {actual}, in {path}. {action}.")


@contextlib.contextmanager
def open_source(
    src: str | os.PathLike[str],
    suffix: str,
    scratch: Path,
    *,
    beside: re.Pattern[str] | None = None,
    unique_names: bool = True,
) -> Iterator[SourceFiles]:
    """List the clip files of a folder (recursively), a tar or a zip archive; each reads as (bytes,).

    Args:
        src: Folder or archive.
        suffix: Ending of clip files.
        scratch: Folder for a temporary copy of an archive's clip files, which are stored in no useful order.
        beside: Finds files about the clips, such as labels, by their path; they are listed apart.
        unique_names: Whether file names tell clips apart; otherwise their folders do.
    Raises:
        ValueError: If the source is missing, damaged or without clip files, or two files share a name and must not.
    """
    root = Path(src)
    with contextlib.ExitStack() as stack:
        if root.is_dir():
            files = SourceFiles(root, _beside=beside)
            _list_folder(files, suffix, scratch)
        elif root.is_file():
            files = SourceFiles(root, _beside=beside, _spool=stack.enter_context(tempfile.TemporaryFile(dir=scratch)))
            try:
                _spool_archive(files, suffix)
            except _DAMAGED as error:
                # decompressors raise OSError without a number; with one it is the system's
                if isinstance(error, OSError) and error.errno in _NO_ROOM:
                    raise
                if isinstance(error, OSError) and error.errno is not None:
                    raise _unreadable("readable", str(error.strerror), root, "Mend it") from error
                contract = "a folder or a complete tar or zip archive"
                # one line, of a length to read: zipfile says what it found
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                reason = reason if reason.isprintable() else repr(reason)
                raise _unreadable(contract, f"a damaged one ({reason})", root) from error
        else:
            raise _unreadable("a folder or an archive", "nothing", root, "Correct the path")
        files.paths.sort(key=lambda path: (PurePosixPath(path).name, path))
        files.beside.sort()
        for one, other in itertools.pairwise(files.paths):
            if unique_names and PurePosixPath(one).name == PurePosixPath(other).name:
                raise _unreadable("without duplicate names", f"{one} and {other}", root, "Remove one of them")
        if not files.paths:
            raise _unreadable(f"with {suffix} files", "none", root, "Correct the path or the format")
        yield files


def _list_folder(files: SourceFiles, suffix: str, scratch: Path) -> None:
    def unlistable(error: OSError) -> None:
        # left out in silence, its clips would be missing in silence
        raise _unreadable("readable", str(error.strerror), Path(error.filename), "Mend it") from error

    found = []
    for folder, folders, names in os.walk(files.root, onerror=unlistable):
        # the destination may lie inside the source
        folders[:] = [name for name in folders if not os.path.samefile(os.path.join(folder, name), scratch)]
        links = [Path(folder) / name for name in folders if os.path.islink(os.path.join(folder, name))]
        # they may lead in circles, or twice to the same files
        files.skipped += [(link.relative_to(files.root).as_posix(), "a link to a folder, not followed") for link in sorted(links)]
        found += [(Path(folder) / name).relative_to(files.root) for name in names]
    for path in sorted(found):
        try:
            status = (files.root / path).stat()
        except OSError:
            # a link to nothing
            files._offer(path.as_posix(), suffix, False, 0, 0)
            continue
        files._offer(path.as_posix(), suffix, stat.S_ISREG(status.st_mode), status.st_size, status.st_mtime_ns)


def _spool_archive(files: SourceFiles, suffix: str) -> None:
    changed = files.root.stat().st_mtime_ns
    if zipfile.is_zipfile(files.root):
        with zipfile.ZipFile(files.root) as zipped:
            for entry in zipped.infolist():
                if not entry.is_dir() and files._offer(entry.filename, suffix, True, entry.file_size, changed):
                    with zipped.open(entry) as stream:
                        files._keep(entry.filename, stream, entry.file_size)
    else:
        with files.root.open("rb") as file:
            start = file.read(max(map(len, _COMPRESSED)))
        compression = next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), "")
        with tarfile.open(files.root, f"r:{compression}", tarinfo=_Member) as archive:  # type: ignore[call-overload]
            for member in archive:
                if not member.isdir() and files._offer(member.name, suffix, member.isfile(), member.size, changed):
                    content = archive.extractfile(member)
                    assert content is not None
                    files._keep(member.name, content, member.size)
    assert files._spool is not None
    # what pread reads is what the system has
    files._spool.flush()
