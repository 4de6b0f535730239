"""Packing the files of a data set: in several threads, without damaged files, normalised, with the options on record."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastskel.cli import main
from fastskel.data import make_synthetic, pack_source
from fastskel.data.formats import FORMATS
from fastskel.data.gather import GatheredClips
from fastskel.data.normalise import NORMALISATIONS, normalise
from fastskel.data.packed import open_dataset
from fastskel.data.read_ahead import FILES_PER_THREAD, MOST_BYTES, read_ahead
from fastskel.data.source import SourceFiles
from fastskel.data.unpack import unpack_pyskl
from fastskel.skeleton import topology

OPTIONS = {"topology": "sbu-15"}
JUNK = b"not an array"


def joints(seed: int, frames: int = 4, bodies: int = 1):
    return np.random.default_rng(seed).normal(size=(frames, bodies, 15, 3)).astype(np.float32)


def make(folder: Path, num_files: int, bad=()) -> Path:
    folder.mkdir()
    for number in range(num_files):
        np.save(folder / f"c{number:03}.npy", joints(number, 3 + number % 5, 1 + (number > num_files // 2)))
    for number in bad:
        (folder / f"c{number:03}.npy").write_bytes(JUNK)
    return folder


def pack(source: Path, out: Path, **given):
    return pack_source("npy", source, out, **{"options": OPTIONS, "progress": False, **given})


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_threads_change_no_byte(tmp_path: Path) -> None:
    source = make(tmp_path / "src", 40)
    found = []
    for threads in (1, 2, 7, None):
        assert pack(source, tmp_path / f"out-{threads}", threads=threads).clips == 40
        found.append(contents(tmp_path / f"out-{threads}"))
    assert found[1:] == found[:1] * 3
    for number in range(40):
        np.testing.assert_array_equal(
            open_dataset(tmp_path / "out-7").clip(number)[:, : 1 + (number > 20)], np.load(source / f"c{number:03}.npy")
        )


def test_results_come_in_order_whatever_takes_longest() -> None:
    names = [str(number) for number in range(30)]

    def read(path: str) -> str:
        time.sleep(0.02 if int(path) % 4 == 0 else 0)
        return path * 2

    assert list(read_ahead(names, [1] * 30, read, 5)) == [(name, name * 2) for name in names]


@pytest.mark.parametrize(("size", "most"), [(1, 2 * FILES_PER_THREAD), (MOST_BYTES // 3, 3), (2 * MOST_BYTES, 1)])
def test_only_so_much_waits(size: int, most: int) -> None:
    begun: list[str] = []
    names = [str(number) for number in range(40)]
    results = read_ahead(names, [size] * 40, lambda path: begun.append(path), 2)
    for number, _ in enumerate(results):
        time.sleep(0.001)
        # the one that is yielded waits no more, its place has not been taken yet
        assert len(begun) <= number + most
    assert len(begun) == 40


def test_a_reader_that_stops_ends_the_threads() -> None:
    before = threading.active_count()
    begun: list[str] = []
    results = read_ahead([str(number) for number in range(100)], [1] * 100, lambda path: begun.append(path), 2)
    assert next(results) == ("0", None)
    results.close()
    assert threading.active_count() == before and len(begun) <= 2 * FILES_PER_THREAD + 1


def test_an_unexpected_error_of_a_thread_is_raised() -> None:
    def read(path: str) -> str:
        raise MemoryError(path)

    with pytest.raises(MemoryError, match="a"):
        list(read_ahead(["a", "b"], [1, 1], read, 2))


@pytest.mark.parametrize("kind", ["damaged", "unreadable", "gone"])
def test_the_first_bad_file_in_order_is_named(tmp_path: Path, monkeypatch, kind: str) -> None:
    source = make(tmp_path / "src", 12, bad=(5, 9) if kind == "damaged" else ())
    read = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if kind != "damaged" and path.name in ("c005.npy", "c009.npy"):
            number = errno.ENOENT if kind == "gone" else errno.EIO
            raise OSError(number, os.strerror(number), str(path))
        if path.name == "c004.npy":
            # the later bad file is read before the earlier one
            time.sleep(0.05)
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_bytes)
        reason = {"damaged": "complete .npy array", "unreadable": "Input/output error", "gone": "No such file"}[kind]
        with pytest.raises(ValueError, match=rf"pack_source: .*{reason}.*c005\.npy.*--skip-bad") as caught:
            pack(source, tmp_path / "out", threads=3)
        assert str(caught.value).count("c00") == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.packing", "src"]
        summary = pack(source, tmp_path / "out", threads=3, skip_bad=True)
    assert summary.clips == 10 and summary.skipped == () and summary.resumed == 5
    assert [path for path, _ in summary.damaged] == ["c005.npy", "c009.npy"]
    assert all(reason in text for _, text in summary.damaged)
    assert "left out 2 damaged files:\n  damaged c005.npy: " in str(summary)
    assert open_dataset(tmp_path / "out", verify=True).names.tolist() == [f"c{n:03}" for n in range(12) if n not in (5, 9)]


def test_what_is_left_out_changes_nothing_else(tmp_path: Path) -> None:
    pack(make(tmp_path / "bad", 9, bad=(0, 4, 8)), tmp_path / "out", skip_bad=True)
    sound = make(tmp_path / "sound", 9)
    for number in (0, 4, 8):
        (sound / f"c{number:03}.npy").unlink()
    pack(sound, tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_nothing_but_bad_files(tmp_path: Path) -> None:
    source = make(tmp_path / "src", 3, bad=(0, 1, 2))
    with pytest.raises(ValueError, match=r"source must be with at least one clip, got none \(c002\.npy: file must be"):
        pack(source, tmp_path / "out", skip_bad=True)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_of_two_clips_of_one_name_the_second_is_bad(tmp_path: Path) -> None:
    for number, folder in enumerate(("a/s01s02/01/001", "b/s01s02/01/001", "b/s01s02/01/002")):
        path = tmp_path / "src" / folder / "skeleton_pos.txt"
        path.parent.mkdir(parents=True)
        path.write_text(",".join(["1", *(f"{value:.3f}" for value in joints(number, 1, 2).flat)]) + "\n")
    with pytest.raises(ValueError, match=r"distinct names, got 's01s02_01_001' from a/s01s02/.* and b/.*--skip-bad"):
        pack_source("sbu", tmp_path / "src", tmp_path / "out", progress=False)
    summary = pack_source("sbu", tmp_path / "src", tmp_path / "out", progress=False, skip_bad=True)
    assert summary.resumed == 1 and [path for path, _ in summary.damaged] == ["b/s01s02/01/001/skeleton_pos.txt"]
    assert open_dataset(tmp_path / "out").names.tolist() == ["s01s02_01_001", "s01s02_01_002"]


BVH = """HIERARCHY
ROOT Hips
{
  OFFSET 0 0 0
  CHANNELS 6 Xposition Yposition Zposition Zrotation Xrotation Yrotation
  JOINT Head
  {
    OFFSET 0 1 0
    CHANNELS 3 Zrotation Xrotation Yrotation
    End Site
    {
      OFFSET 0 1 0
    }
  }
}
MOTION
Frames: 1
Frame Time: 0.04
1 2 3 0 0 0 0 0 0
"""


def test_the_first_file_that_can_be_read_gives_the_skeleton(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    for name, text in (("a", "HIERARCHY"), ("b", BVH), ("c", BVH.replace("Head", "Tail")), ("d", BVH)):
        (source / f"{name}.bvh").write_text(text)
    with pytest.raises(ValueError, match=r"a\.bvh.*--skip-bad"):
        pack_source("bvh", source, tmp_path / "out", progress=False)
    summary = pack_source("bvh", source, tmp_path / "out", skip_bad=True, progress=False)
    assert [path for path, _ in summary.damaged] == ["a.bvh", "c.bvh"]
    assert open_dataset(tmp_path / "out", verify=True).names.tolist() == ["b", "d"]
    for name in "bcd":
        (source / f"{name}.bvh").unlink()
    with pytest.raises(ValueError, match=r"a\.bvh"):
        pack_source("bvh", source, tmp_path / "other", skip_bad=True, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src"]


def test_a_destination_inside_the_source(tmp_path: Path) -> None:
    source = make(tmp_path / "src", 6, bad=(3,))
    sound = make(tmp_path / "sound", 6)
    (source / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="3 packed clips stay"):
        pack(source, source / "deep" / "out")
    (source / "c003.npy").write_bytes((sound / "c003.npy").read_bytes())
    summary = pack(source, source / "deep" / "out")
    assert summary.resumed == 3 and summary.skipped == (("link", "not a .npy file"),)
    pack(sound, tmp_path / "expected")
    assert contents(source / "deep" / "out") == contents(tmp_path / "expected")


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch) -> None:
    source = make(tmp_path / "src", 3)
    (source / "more").mkdir()
    scan = os.scandir

    def scandir(path):
        if Path(path).name == "more":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"source must be readable, got Permission denied, in .*src/more\. Mend it"):
        pack(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sbu", r"source must be with .* files, got none, in .*src\. Correct the path or the format"),
        ("ntu60", r"source must be with \.skeleton files, got none"),
        ("csv", r"source must be with \.csv files, got none"),
    ],
)
def test_the_wrong_format(tmp_path: Path, name: str, message: str) -> None:
    source = make(tmp_path / "src", 2)
    with pytest.raises(ValueError, match=message):
        pack_source(name, source, tmp_path / "out", options=OPTIONS if name == "csv" else None, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("kind", NORMALISATIONS)
def test_normalisation(tmp_path: Path, kind: str) -> None:
    source = make(tmp_path / "src", 5)
    pack(source, tmp_path / "out", normalisation=kind, threads=2)
    dataset = open_dataset(tmp_path / "out", verify=True)
    assert dataset.meta["normalisation"] == kind
    for number in range(5):
        clip = np.load(source / f"c{number:03}.npy")
        found = dataset.clip(number)[:, : clip.shape[1]]
        np.testing.assert_array_equal(found, normalise(clip, kind, topology("sbu-15")))
        assert (kind == "none") == np.array_equal(found, clip)


def test_a_normalisation_that_does_not_fit_reads_nothing(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    np.save(source / "a.npy", np.ones((3, 15, 2), np.float32))
    options = {**OPTIONS, "channels": ("x", "y")}
    stick = tmp_path / "src" / "stick.json"
    stick.write_text('{"name": "stick", "joints": ["a", "b"], "parents": ["a", "a"]}')
    for skip_bad in (False, True):
        with pytest.raises(ValueError, match="unless channels are x, y, z with y up, got 'align' for x, y with y up"):
            pack(source, tmp_path / "out", options=options, normalisation="align", skip_bad=skip_bad)
        with pytest.raises(ValueError, match="topology must name all body axes, 'stick' has"):
            pack(source, tmp_path / "out", options={"topology": str(stick)}, normalisation="align", skip_bad=skip_bad)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    assert pack(source, tmp_path / "out", options=options, normalisation="center").clips == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"threads": 0}, "threads must be a whole number of at least 1, got 0"),
        ({"threads": True}, "threads must be a whole number of at least 1, got True"),
        ({"normalisation": "centre"}, "normalisation must be one of none, center,"),
    ],
    ids=str,
)
def test_arguments(tmp_path: Path, given, message: str) -> None:
    with pytest.raises(ValueError, match=f"pack_source: {message}"):
        pack(make(tmp_path / "src", 1), tmp_path / "out", **given)


@pytest.mark.parametrize(
    ("channels", "up_axis"), [(("x", "y", "score"), "y"), (("x", "y", "z"), "z"), (("x", "y", "z"), "-y")], ids=str
)
def test_aligning_what_has_no_third_axis_or_another_up(tmp_path: Path, channels, up_axis: str) -> None:
    source, options = make(tmp_path / "src", 2), {**OPTIONS, "channels": channels, "up_axis": up_axis}
    for kind in ("align", "align-yaw"):
        message = f"unless channels are x, y, z with y up, got '{kind}' for {', '.join(channels)} with {up_axis} up"
        with pytest.raises(ValueError, match=message):
            pack(source, tmp_path / "out", options=options, normalisation=kind)
    assert pack(source, tmp_path / "out", options=options, normalisation="center").clips == 2


def test_destinations_without_a_name_of_their_own(tmp_path: Path, monkeypatch) -> None:
    source = make(tmp_path / "src", 2)
    monkeypatch.chdir(source)
    for out in (Path("."), Path(".."), Path("/"), Path("")):
        with pytest.raises(ValueError, match=r"^pack_source: destination must be new, got the existing "):
            pack(source, out)
    for out in (tmp_path / ("x" * 250), tmp_path / ("x" * 300)):
        with pytest.raises(ValueError, match=r"^pack_source: destination must be writable, got File name too long"):
            pack(source, out)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def interrupted(source: Path, out: Path, monkeypatch, **given) -> None:
    """Leave out what is damaged, until a clip c005 comes."""

    def take(self, facts, path) -> None:
        if facts.name == "c005":
            raise KeyboardInterrupt
        whole(self, facts, path)

    whole = GatheredClips.take
    with monkeypatch.context() as patch:
        patch.setattr(GatheredClips, "take", take)
        with pytest.raises(KeyboardInterrupt):
            pack(source, out, skip_bad=True, **given)


def test_a_damaged_file_that_was_mended_in_between(tmp_path: Path, monkeypatch) -> None:
    source, out = make(tmp_path / "src", 12, bad=(1,)), tmp_path / "out"
    read = SourceFiles.read

    def unreadable(self, path: str) -> bytes:
        if path == "c003.npy":
            raise ValueError("pack_source: source must be readable, got Permission denied")
        return read(self, path)

    # permissions do not show in size and time of change
    with monkeypatch.context() as patch:
        patch.setattr(SourceFiles, "read", unreadable)
        interrupted(source, out, monkeypatch)
    summary = pack(source, out, skip_bad=True)
    assert summary.resumed == 3 and [path for path, _ in summary.damaged] == ["c001.npy"]
    assert open_dataset(out).names.tolist() == [f"c{number:03}" for number in range(12) if number != 1]


def test_a_second_clip_of_a_name_stays_left_out(tmp_path: Path, monkeypatch) -> None:
    # files of their own names, but one recording may be in two of them
    read = FORMATS["npy"].read

    def renamed(data: bytes, path: str, options):
        clip = read(data, path, options)
        return replace(clip, name="c000") if path.endswith("c002.npy") else clip

    source, out = make(tmp_path / "src", 7), tmp_path / "out"
    monkeypatch.setitem(FORMATS._entries, "npy", replace(FORMATS["npy"], read=renamed))
    interrupted(source, out, monkeypatch)
    summary = pack(source, out, skip_bad=True)
    assert summary.resumed == 5 and [path for path, _ in summary.damaged] == ["c002.npy"]


def test_a_list_without_an_ending_is_known_by_its_contents(tmp_path: Path, monkeypatch) -> None:
    source, out = make(tmp_path / "src", 7), tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    for classes in ("ab", "ba"):
        Path("classes").write_text("".join(f"c{number:03},{classes[number % 2]}\n" for number in range(7)))
        if not out.with_name("out.packing").exists():
            interrupted(source, out, monkeypatch, options={**OPTIONS, "labels": "classes"})
    assert pack(source, out, options={**OPTIONS, "labels": "classes"}).resumed == 0
    assert open_dataset(out).labels.tolist() == [1, 0, 1, 0, 1, 0, 1]


def test_options_are_on_record(tmp_path: Path) -> None:
    source = make(tmp_path / "src", 2)
    pack(source, tmp_path / "out")
    defaults = {"channels": ["x", "y", "z"], "labels": "none", "topology": "sbu-15", "units": "metres", "up_axis": "y"}
    assert open_dataset(tmp_path / "out").meta["options"] == defaults
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    # as written before options were recorded
    del meta["options"]
    (tmp_path / "out" / "meta.json").write_text(json.dumps(meta))
    assert "options" not in open_dataset(tmp_path / "out").meta
    (tmp_path / "out" / "meta.json").write_text(json.dumps({**meta, "options": 3}))
    with pytest.raises(ValueError, match="options must be a dict, got 3"):
        open_dataset(tmp_path / "out")


def test_the_command(tmp_path: Path, capsys) -> None:
    source, out = make(tmp_path / "src", 6, bad=(2,)), tmp_path / "out"
    (source / "list.txt").touch()
    command = ["pack", "npy", str(source), str(out), "--topology", "sbu-15", "--quiet"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "c002.npy" in error and "--skip-bad" in error and f"2 packed clips stay in {out}" in error
    assert main([*command, "--skip-bad", "--threads", "2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("packed 5 clips, ") and "MB/s)" in text and "  skipped list.txt: not a .npy file" in text
    assert "  2 files had been done before, by a call that was stopped\n  left out 1 damaged files:\n  damaged c002.npy" in text
    assert main(["pack", "npy", str(source), str(tmp_path / "two"), *command[4:], "--skip-bad", "--normalisation", "center"]) == 0
    assert open_dataset(tmp_path / "two").meta["normalisation"] == "center"
    capsys.readouterr()
    assert main(["pack", "npy", "--help"]) == 0
    assert all(name in capsys.readouterr().out for name in ("{none,center,center-first,align,align-yaw}",))


def test_prepared_files_have_neither_threads_nor_damaged_ones(tmp_path: Path, capsys) -> None:
    for given in ({"threads": 2}, {"skip_bad": True}):
        with pytest.raises(ValueError, match=f"{next(iter(given))} must be left out for pyskl, whose clips are all in one file"):
            pack_source("pyskl", tmp_path / "a.pkl", tmp_path / "out", **given)
    assert main(["pack", "pyskl", "a.pkl", "out", "--skip-bad"]) == 2
    assert "--skip-bad" in capsys.readouterr().err


def test_prepared_files_are_normalised_and_their_options_are_on_record(tmp_path: Path) -> None:
    data = make_synthetic(tmp_path / "data", num_clips=4, num_classes=2, num_subjects=2)
    unpack_pyskl(data, tmp_path / "a.pkl")
    for kind in ("none", "center"):
        options = {"dataset": "ntu60", "topology": "ntu-25"}
        summary = pack_source(
            "pyskl", tmp_path / "a.pkl", tmp_path / kind, options=options, normalisation=kind, progress=False
        )
        packed = open_dataset(tmp_path / kind, verify=True)
        assert summary.clips == 4 and packed.meta["normalisation"] == kind
        assert packed.meta["options"].items() >= {**options, "units": "auto", "third": "score"}.items()
        for number in range(4):
            np.testing.assert_array_equal(packed.clip(number), normalise(data.clip(number), kind, data.topology))


def test_many_left_out_are_counted(tmp_path: Path) -> None:
    source = make(tmp_path / "src", 60, bad=range(1, 51))
    for number in range(30):
        (source / f"n{number}.txt").touch()
        (source / f".n{number}").touch()
    text = str(pack(source, tmp_path / "out", skip_bad=True))
    assert text.endswith(
        "  skipped 30 files: hidden file (.n0, ...)\n  skipped 30 files: not a .npy file (n0.txt, ...)"
    )
    assert text.count("  damaged ") == 40 and "  and 10 more files\n" in text and len(text.splitlines()) == 45


def test_a_prepared_destination_is_checked_first(tmp_path: Path) -> None:
    junk = tmp_path / "junk.pkl"
    junk.write_bytes(JUNK)
    with pytest.raises(ValueError, match=rf"^pack_source: destination must be new, got the existing {tmp_path}\..*another\.$"):
        pack_source("pyskl", junk, tmp_path, progress=False)
