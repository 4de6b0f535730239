"""What a source can hide: archives that end too early or cannot be read, links to folders, the folder one is in."""

from __future__ import annotations

import errno
import os
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest

from fastskel.data import pack_source
from fastskel.data.packed import open_dataset

OPTIONS = {"topology": "sbu-15", "labels": "folder"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "walk").mkdir()
    for number in range(6):
        np.save(tmp_path / "walk" / f"c{number}.npy", np.full((3, 15, 3), number + 1, np.float32))
    return tmp_path / "walk"


def pack(source: Path | str, out: Path):
    return pack_source("npy", source, out, options=OPTIONS, progress=False)


@pytest.fixture
def archive(source: Path) -> tuple[Path, bytes, int]:
    """A tar archive, its bytes, and where the header of its fourth file is."""
    path = source.with_name("walk.tar")
    with tarfile.open(path, "w") as written:
        written.add(source, "walk")
    with tarfile.open(path) as opened:
        place = opened.getmembers()[4].offset
    assert place > 0 and pack(path, source.with_name("sound")).clips == 6
    return path, path.read_bytes(), place


@pytest.mark.parametrize("kind", ["flipped", "cut in a header", "cut before a header", "cut in a file"])
def test_a_tar_archive_that_ends_too_early(tmp_path: Path, archive, kind: str) -> None:
    path, content, place = archive
    damaged = bytearray(content)
    if kind == "flipped":
        damaged[place + 150] ^= 1
    else:
        del damaged[place + {"cut in a header": 100, "cut before a header": 0, "cut in a file": 700}[kind] :]
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"a complete tar or zip archive, got a damaged one \(.*\), in .*walk\.tar\. Fetch"):
        pack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.packing").exists()


def test_an_archive_that_cannot_be_read(tmp_path: Path, monkeypatch, archive) -> None:
    def refuse(*arguments, **given):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tarfile, "open", refuse)
    with pytest.raises(ValueError, match=r"source must be readable, got Permission denied, in .*walk\.tar\. Mend it"):
        pack(archive[0], tmp_path / "out")


def test_an_archive_without_room_for_its_copy(tmp_path: Path, monkeypatch, archive) -> None:
    class Full:
        def __init__(self, file) -> None:
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error) -> None:
            self.file.close()

        def seek(self, *place: int) -> int:
            return 0

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    create = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **given: Full(create(**given)))
    with pytest.raises(ValueError, match=r"destination must be writable, got No space left on device, in .*out\. Make room"):
        pack(archive[0], tmp_path / "out")


def test_links_to_folders_are_listed(tmp_path: Path, source: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    np.save(tmp_path / "elsewhere" / "d0.npy", np.ones((3, 15, 3), np.float32))
    (source / "more").symlink_to(tmp_path / "elsewhere")
    (source / "round").symlink_to(source)
    summary = pack(source, tmp_path / "out")
    assert summary.clips == 6
    assert summary.skipped == tuple((name, "a link to a folder, not followed") for name in ("more", "round"))
    # the source itself may be one
    (tmp_path / "link").symlink_to(source)
    assert pack(tmp_path / "link", tmp_path / "other").clips == 6


def test_the_folder_one_is_in_has_a_name(tmp_path: Path, monkeypatch, source: Path) -> None:
    monkeypatch.chdir(source)
    pack(".", tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    assert dataset.class_names == ["walk"] and dataset.labels.tolist() == [0] * 6
