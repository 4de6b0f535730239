"""A packing that was stopped goes on, and ends with the bytes of one that was not."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import numpy as np
import pytest

from fastskel.cli import main
from fastskel.data import journal, pack_source, writer
from fastskel.data.gather import GatheredClips
from fastskel.data.packed import open_dataset

OPTIONS = {"topology": "sbu-15", "labels": "folder"}
NUM_FILES = 12
JUNK = b"not an array"


def save(path: Path, seed: int, frames: int = 5, bodies: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.random.default_rng(seed).normal(size=(frames, bodies, 15, 3)).astype(np.float32))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Files of one body, of two from the middle on."""
    for number in range(NUM_FILES):
        folder = ("jump", "walk")[number % 2]
        save(tmp_path / "src" / folder / f"c{number:02}.npy", number, 3 + number, 1 + (number >= NUM_FILES // 2))
    return tmp_path / "src"


def file(source: Path, number: int) -> Path:
    return source / ("jump", "walk")[number % 2] / f"c{number:02}.npy"


def pack(source: Path, out: Path, **given):
    return pack_source("npy", source, out, **{"options": OPTIONS, "progress": False, "threads": 2, **given})


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def undisturbed(source: Path, **given) -> dict[str, bytes]:
    out = source.with_name("undisturbed")
    pack(source, out, **given)
    found = contents(out)
    shutil.rmtree(out)
    return found


def stop_at(source: Path, out: Path, number: int, match: str = "must be a complete .npy array") -> bytes:
    """Pack until a file that was damaged; its sound contents."""
    sound = file(source, number).read_bytes()
    file(source, number).write_bytes(JUNK)
    with pytest.raises(ValueError, match=match):
        pack(source, out)
    return sound


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("options", [["--kills", "3"], ["--every-moment", "--files", "3"]], ids=["kills", "moments"])
def test_killed_at_any_moment(options: list[str], tmp_path: Path) -> None:
    # the record of many kills is in docs/proofs.md
    script = Path(__file__).with_name("pack_kill_proof.py")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(("3 kills", "ended before each of")) and done.stdout.endswith("byte for byte\n")


@pytest.mark.parametrize("number", [1, 6, 7, 11])
def test_mended_and_gone_on_with(tmp_path: Path, source: Path, number: int) -> None:
    expected = undisturbed(source)
    out = tmp_path / "out"
    advice = rf"--skip-bad \(skip_bad=True\)\. {number} packed clips stay in .*out\.packing: the same command goes on"
    sound = stop_at(source, out, number, advice)
    assert names(tmp_path) == ["out.packing", "src"]
    file(source, number).write_bytes(sound)
    summary = pack(source, out)
    assert summary.resumed == number and f"{number} files had been done before" in str(summary)
    assert contents(out) == expected and names(tmp_path) == ["out", "src"]
    sizes = [file(source, later).stat().st_size for later in range(number, NUM_FILES)]
    assert summary.read_bytes == sum(sizes)


def test_files_before_a_change_are_kept_and_others_read_again(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    sound = stop_at(source, out, 10)
    file(source, 10).write_bytes(sound)
    save(file(source, 8), seed=99, frames=4, bodies=3)
    assert pack(source, out).resumed == 8
    assert contents(out) == undisturbed(source)
    assert open_dataset(out, verify=True).num_frames[8] == 4


def test_stopped_again_after_a_change(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    mended = {10: stop_at(source, out, 10)}
    save(file(source, 7), seed=99, bodies=2)
    for number in (9, 8):
        mended[number] = stop_at(source, out, number, f" {number} packed clips stay")
        assert len(journal_lines(out)[1]) == 1 + number
    for number, sound in mended.items():
        file(source, number).write_bytes(sound)
    assert pack(source, out).resumed == 8
    assert contents(out) == undisturbed(source)


def test_files_that_come_and_go(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    stop_at(source, out, 10)
    file(source, 10).unlink()
    save(source / "walk" / "c07b.npy", seed=50, bodies=2)
    assert pack(source, out).resumed == 8
    assert contents(out) == undisturbed(source)


def test_the_only_wide_clip_gone_begins_again(tmp_path: Path, capsys, source: Path) -> None:
    out = tmp_path / "out"
    stop_at(source, out, 8)
    for number in range(6, NUM_FILES):
        file(source, number).unlink()
    assert pack(source, out).resumed == 0
    assert capsys.readouterr().err.count("was of a source that has changed: it begins again\n") == 1
    assert contents(out) == undisturbed(source) and open_dataset(out).num_bodies_max == 1


@pytest.mark.parametrize(
    "given",
    [{"options": {**OPTIONS, "labels": "none"}}, {"options": {**OPTIONS, "units": "pixels"}}, {"normalisation": "center"}],
    ids=["labels", "units", "normalisation"],
)
def test_another_job_begins_again(tmp_path: Path, capsys, source: Path, given) -> None:
    out = tmp_path / "out"
    file(source, 5).write_bytes(stop_at(source, out, 5))
    assert pack(source, out, **given).resumed == 0
    assert capsys.readouterr().err.count("was of other files, options or versions: it begins again\n") == 1
    assert contents(out) == undisturbed(source, **given)


def test_a_list_among_the_options_is_known_by_its_contents(tmp_path: Path, source: Path) -> None:
    out, labels = tmp_path / "out", tmp_path / "labels.csv"
    labels.write_text("".join(f"c{number:02},{'ab'[number % 2]}\n" for number in range(NUM_FILES)))
    options = {**OPTIONS, "labels": str(labels)}
    sound = file(source, 5).read_bytes()
    for text, resumed in ((None, 5), (labels.read_text().replace("a", "c"), 0)):
        file(source, 5).write_bytes(JUNK)
        with pytest.raises(ValueError, match="5 packed clips stay"):
            pack(source, out, options=options)
        file(source, 5).write_bytes(sound)
        if text is not None:
            labels.write_text(text)
        assert pack(source, out, options=options).resumed == resumed
        classes, recorded = open_dataset(out).class_names, open_dataset(out).meta["options"]["labels"]
        assert classes == (["a", "b"] if text is None else ["b", "c"])
        assert recorded == {"file": "labels.csv", "sha256": writer.checksum(labels)}
        shutil.rmtree(out)


def test_an_archive_that_changed_begins_again(tmp_path: Path, capsys, source: Path) -> None:
    out, archive = tmp_path / "out", tmp_path / "src.tar"

    def write() -> None:
        with tarfile.open(archive, "w") as opened:
            opened.add(source, "src")

    sound = file(source, 4).read_bytes()
    file(source, 4).write_bytes(JUNK)
    write()
    for _ in range(2):
        with pytest.raises(ValueError, match="4 packed clips stay"):
            pack(archive, out)
    assert capsys.readouterr().err == ""
    file(source, 4).write_bytes(sound)
    write()
    assert pack(archive, out).resumed == 0 and "begins again" in capsys.readouterr().err
    assert contents(out) == undisturbed(source)


def journal_lines(out: Path) -> tuple[Path, list[bytes]]:
    path = out.with_name("out.packing") / "journal.jsonl"
    return path, path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("tail", [b"", b"{", b'{"clip"', b"\0" * 100 + b"\n", b'{"clip": 1}'], ids=repr)
def test_what_is_torn_is_read_again(tmp_path: Path, source: Path, tail: bytes) -> None:
    expected, out = undisturbed(source), tmp_path / "out"
    file(source, 9).write_bytes(stop_at(source, out, 9))
    path, lines = journal_lines(out)
    assert len(lines) == 10
    path.write_bytes(b"".join(lines[:8]) + tail)
    # frames that no line speaks of
    with (out.with_name("out.packing") / "frames-2.npy").open("ab") as frames:
        frames.write(b"\1" * 1000)
    assert pack(source, out).resumed == 7
    assert contents(out) == expected


def test_the_first_line_torn_begins_again(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    file(source, 9).write_bytes(stop_at(source, out, 9))
    path, lines = journal_lines(out)
    path.write_bytes(lines[0][:-5])
    assert pack(source, out).resumed == 0
    assert contents(out) == undisturbed(source)


def test_frames_that_are_too_few_are_not_trusted(tmp_path: Path, capsys, source: Path) -> None:
    out = tmp_path / "out"
    file(source, 9).write_bytes(stop_at(source, out, 9))
    frames = out.with_name("out.packing") / "frames-2.npy"
    os.truncate(frames, frames.stat().st_size - 1)
    assert pack(source, out).resumed == 0 and "begins again" in capsys.readouterr().err
    assert contents(out) == undisturbed(source)


def test_columns_notes_and_segments_survive(tmp_path: Path, data_dir: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    expected = pack_source("utkinect", next((data_dir / "utkinect").glob("*.tar*")), whole, progress=False)
    folder = tmp_path / "src"
    with tarfile.open(next((data_dir / "utkinect").glob("*.tar*"))) as archive:
        # Python before 3.11.4 knows no filter
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        archive.extractall(folder)
    last = sorted(folder.rglob("joints_*.txt"))[-1]
    sound = last.read_bytes()
    last.write_bytes(b"junk\n")
    with pytest.raises(ValueError, match="19 packed clips stay"):
        pack_source("utkinect", folder, out, progress=False)
    last.write_bytes(sound)
    summary = pack_source("utkinect", folder, out, progress=False)
    assert summary.resumed == 19 and summary.notes == expected.notes and len(summary.notes) > 0
    assert contents(out) == contents(whole) and "segments.npy" in contents(out) and "frame_id.npy" in contents(out)


def test_one_packer_at_a_time(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    file(source, 5).write_bytes(stop_at(source, out, 5))
    before = contents(tmp_path / "out.packing")
    with (tmp_path / "out.packing" / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"packed by one process at a time, got another one at work in .*out\.packing"):
            pack(source, out)
        assert contents(tmp_path / "out.packing") == before
    assert pack(source, out).resumed == 5


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out.packing").mkdir()
    (tmp_path / "out.packing" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out\.packing must be what a packing left, got another folder"):
        pack(source, tmp_path / "out")
    assert contents(tmp_path / "out.packing") == {"notes.txt": b"mine"} and not (tmp_path / "out").exists()


def test_a_finished_destination_is_not_packed_again(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    stop_at(source, out, 5)
    shutil.copytree(tmp_path / "out.packing", tmp_path / "kept")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"destination must be new, got the existing .*out\. .* 5 packed clips stay"):
        pack(source, out)
    assert contents(tmp_path / "out.packing") == contents(tmp_path / "kept") and names(out) == []


def test_a_missing_source_costs_nothing(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    file(source, 5).write_bytes(stop_at(source, out, 5))
    source.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"source must be a folder or an archive, got nothing.* 5 packed clips stay"):
        pack(source, out)
    (tmp_path / "elsewhere").rename(source)
    assert pack(source, out).resumed == 5


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_interrupted(tmp_path: Path, monkeypatch, capsys, source: Path, error: type[BaseException]) -> None:
    out, take = tmp_path / "out", GatheredClips.take

    def interrupted(self, facts, path) -> None:
        if facts.name == "c08":
            raise error
        take(self, facts, path)

    with monkeypatch.context() as patch:
        patch.setattr(GatheredClips, "take", interrupted)
        if error is KeyboardInterrupt:
            command = ["pack", "npy", str(source), str(out), "--topology", "sbu-15", "--labels", "folder", "--quiet"]
            assert main(command) == 130
            expected = f"interrupted; 8 packed clips stay in {out}.packing: the same command goes on after them; "
            assert capsys.readouterr().err == expected + "to begin again, remove that folder.\n"
        else:
            with pytest.raises(error):
                pack(source, out)
    assert names(tmp_path) == ["out.packing", "src"]
    assert pack(source, out).resumed == 8 and contents(out) == undisturbed(source)


def test_work_is_committed_now_and_then(tmp_path: Path, monkeypatch, source: Path) -> None:
    # a process that is killed cannot commit: what stands in the journal while it works counts
    counts, take = [], GatheredClips.take

    def watched(self, facts, path) -> None:
        counts.append(len(journal_lines(tmp_path / "out")[1]) - 1)
        take(self, facts, path)

    monkeypatch.setattr(GatheredClips, "take", watched)
    monkeypatch.setattr(journal, "COMMIT_SECONDS", 0.0)
    pack(source, tmp_path / "out")
    assert counts == list(range(NUM_FILES))


def test_frames_are_on_disk_before_the_journal_speaks_of_them(tmp_path: Path, monkeypatch, source: Path) -> None:
    # a power failure takes what was not synchronised, in any order
    events, fsync, write = [], os.fsync, journal.Journal._write

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def watched_write(self, mode: str, lines: bytes, keep: int | None = None) -> None:
        events.append(mode)
        write(self, mode, lines, keep)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(journal.Journal, "_write", watched_write)
    monkeypatch.setattr(journal, "COMMIT_SECONDS", 0.0)
    pack(source, tmp_path / "out")
    commits = " ".join(events).split(" ab ")
    assert commits[0] == "wb journal.jsonl out.packing frames-1.npy out.packing" and len(commits) == 1 + NUM_FILES
    half = NUM_FILES // 2
    assert commits[1:half] == ["journal.jsonl frames-1.npy out.packing"] * (half - 1)
    assert commits[half:-1] == ["journal.jsonl frames-2.npy out.packing"] * (half)
    # everything, then the folder, then its new name
    assert events[-2:] == ["finished", tmp_path.name] and set(events[-14:-2]) >= {"frames.npy", "meta.json", "names.npy"}


class FullDisk:
    """A file on a disk with room for some bytes, which fails as the system does."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if data and not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name: str):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 200, 3000, 4500, 8000])
def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch, source: Path, room: int) -> None:
    # the last two while and after frames are written again with room for two bodies
    out, create = tmp_path / "out", writer.FramesWriter._create
    with monkeypatch.context() as patch:
        patch.setattr(writer.FramesWriter, "_create", lambda self: FullDisk(create(self), room))
        with pytest.raises(ValueError, match=r"destination must be writable, got No space left on device, in .*out\."):
            pack(source, out)
    assert not out.exists() and (tmp_path / "out.packing").exists() == (room > 1000)
    for path in tmp_path.glob("out.packing/frames-*.npy"):
        # nothing of the clip that had no room: on a full disk the journal needs it
        lengths = [json.loads(line)["clip"]["num_frames"] for line in journal_lines(out)[1][1:]]
        assert path.stat().st_size == writer.FramesWriter.size(sum(lengths), (int(path.stem[-1]), 15, 3))
    summary = pack(source, out)
    assert (summary.resumed > 0) == (room > 1000) and contents(out) == undisturbed(source)


def test_a_disk_that_is_really_full(tmp_path: Path, source: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if shutil.which("mount") is None or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(small)], capture_output=True
    ).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        with pytest.raises(ValueError, match=r"writable, got No space left on device, in .*small/out\. Make room .*clips stay"):
            pack(source, small / "out")
        assert names(small) == ["out.packing"]
        subprocess.run(["mount", "-o", "remount,size=1m", str(small)], check=True)
        assert pack(source, small / "out").resumed > 0
        assert contents(small / "out") == undisturbed(source) and names(small) == ["out"]
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        with pytest.raises(ValueError, match=r"destination must be writable, got Read-only file system, in .*small/other\."):
            pack(source, small / "other")
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the size of files through the system")
def test_a_limit_of_the_system_is_gone_on_from(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    program = f"""
        import resource
        from fastskel.data import pack_source
        resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))
        try:
            pack_source("npy", {str(source)!r}, {str(out)!r}, options={OPTIONS!r}, threads=2, progress=False)
        except ValueError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"pack_source: destination must be writable, got File too large, in {out}. Make room or ")
    assert "packed clips stay in" in done.stdout and names(tmp_path) == ["out.packing", "src"]
    summary = pack(source, out)
    assert 0 < summary.resumed < NUM_FILES and contents(out) == undisturbed(source)


def test_the_journal_is_plain(tmp_path: Path, source: Path) -> None:
    stop_at(source, tmp_path / "out", 3)
    _, (first, *lines) = journal_lines(tmp_path / "out")
    job = json.loads(first)
    assert job["format"] == "npy" and job["options"]["topology"] == "sbu-15" and job["versions"]["fastskel"]
    assert [json.loads(line)["clip"]["name"] for line in lines] == ["c00", "c01", "c02"]
