"""Bad input gives one clear error that names the file and the reason, and leaves nothing behind."""

import errno
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import textwrap
from dataclasses import replace

import numpy as np
import pytest

from fastskel.data import pack, writer
from fastskel.data.formats import FORMATS
from fastskel.data.packed import open_dataset
from fastskel.skeleton import topology

JOINTS = 15


def clip(frames=4, bodies=1, joints=JOINTS, channels=3):
    return np.random.default_rng(0).normal(size=(frames, bodies, joints, channels)).astype(np.float32)


def spoilt(value):
    array = clip()
    array[2, 0, 3, 1] = value
    return array


def mat(values, name="d_skel"):
    from scipy.io import savemat

    buffer = io.BytesIO()
    savemat(buffer, {name: values})
    return buffer.getvalue()


def js(skeletons, label=1):
    return json.dumps({"skeletons": skeletons, "label": label}).encode()


GOOD = np.random.default_rng(0).normal(size=(20, 3, 5))
GOOD_JSON = GOOD.transpose(2, 0, 1).tolist()
# a number that JSON can hold and a float cannot
INFINITE = json.dumps({"skeletons": [*GOOD_JSON[:1], [[12345, 0, 0]] * 20]}).replace("12345", "1e999").encode()


def with_nan(values):
    values = values.copy()
    values[4, 1, 3] = np.nan
    return values


ARRAYS = {
    "NaN": ([clip(), spoilt(np.nan)], {}, "clip 1 must be finite numbers, got NaN or infinity in frame 2"),
    "infinity": ([spoilt(np.inf)], {}, "clip 0 must be finite.* in frame 2"),
    "too large for float32": ([clip().astype(np.float64) * 1e300], {}, "clip 0 must be finite"),
    "wrong joints": ([clip(joints=17)], {}, r"clip 0 must be \(T, M, 15, C\) for 'sbu-15', got shape \(4, 1, 17, 3\)"),
    "wrong axes": ([clip()[0]], {}, r"clip 0 must be \(T, M, 15, C\)"),
    "no frames": ([clip()[:0]], {}, r"clip 0 must be at least one frame.* got shape \(0, 1, 15, 3\)"),
    "no bodies": ([clip()[:, :0]], {}, "clip 0 must be at least one frame, body"),
    "all zero": ([clip() * 0], {}, "clip 0 must be at least one frame with a non-zero joint"),
    "channels differ": ([clip(), clip(channels=2)], {}, "clip 1 must be of 3 channels"),
    "strings": ([np.array([["a"]])], {}, "clip 0 must be made of numbers"),
    "ragged": ([[[1, 2], [3]]], {}, "clip 0 must be an array"),
    "objects": ([np.array([[None]])], {}, "clip 0 must be made of numbers, got values of type object"),
    "named": ([clip()[:0]], {"names": ["jump"]}, r"clip 0 \('jump'\) must be at least one frame"),
    "no clips": ([], {}, "clips must be at least one, got none"),
    "labels short": ([clip()] * 2, {"labels": [0]}, r"labels must be one per clip \(2\), got 1"),
    "label too high": ([clip()], {"labels": [2], "class_names": ["a", "b"]}, "got 2 for clip 0"),
    "label too low": ([clip()], {"labels": [-2]}, "got -2 for clip 0"),
    "label a fraction": ([clip()], {"labels": [0.5]}, "labels must be whole numbers"),
    "names twice": ([clip()] * 2, {"names": ["a", "a"]}, "names must be unique, got 'a' twice"),
    "name empty": ([clip()], {"names": [" "]}, "names must be printable"),
    "name with a newline": ([clip()], {"names": ["a\nb"]}, "names must be printable"),
    "names short": ([clip()] * 2, {"names": ["a"]}, "names must be one per clip"),
    "column short": ([clip()] * 2, {"columns": {"subject": [1]}}, "column 'subject' must be one value per clip"),
    "column reserved": ([clip()], {"columns": {"labels": [1]}}, "column name must be letters"),
    "column a path": ([clip()], {"columns": {"../x": [1]}}, "column name must be letters"),
    "column of objects": ([clip()], {"columns": {"subject": [{}]}}, "column 'subject' must be numbers or strings"),
    "columns alike": ([clip()], {"columns": {"a": [1], "A": [1]}}, "named apart from upper and lower case"),
    "frames column short": ([clip()], {"columns": {"phase": [np.arange(3)]}}, "each of the 4 frames of clip 0, got 3"),
    "frames column of less": ([clip()] * 2, {"columns": {"phase": [np.arange(4)]}}, "'phase' must be given for"),
    "frames column of more": ([clip()], {"columns": {"phase": [np.arange(4)] * 2}}, "'phase' must be given for"),
    "counts short": ([clip()] * 2, {"num_frames": [4]}, "num_frames must be one per clip"),
    "counts long": ([clip()], {"num_frames": [4, 4]}, "num_frames must be one per clip"),
    "count zero": ([clip()], {"num_frames": [0]}, r"num_frames must be in \[1, 4\] for clip 0, got 0"),
    "count too high": ([clip()], {"num_frames": [5]}, r"num_frames must be in \[1, 4\] for clip 0, got 5"),
    "channels misnamed": ([clip()], {"channels": ["x", "y"]}, "channels must name the 3 channels"),
    "split unknown": ([clip()], {"splits": {"p": {"train": ["zebra"]}}}, "names or indices .* got 'zebra'"),
    "split overlaps": ([clip()], {"splits": {"p": {"train": [0], "test": [0]}}}, "in 'train' too"),
    "segment outside": ([clip()], {"segments": [(0, 0, 2, 5)]}, "segment 0 must be 0 <= start < end <= 4"),
    "segment reversed": ([clip()], {"segments": [(0, 0, 3, 3)]}, "segment 0 must be 0 <= start < end"),
    "segment of no clip": ([clip()], {"segments": [("b", 0, 0, 1)]}, "segment 0 must be in one of the 1 clips"),
    "segment of no class": (
        [clip()],
        {"segments": [(0, 9, 0, 1)], "class_names": ["a"]},
        "segment 0 must be of a class",
    ),
    "segment short": ([clip()], {"segments": [(0, 0, 0)]}, "segment 0 must be"),
    "segments a number": ([clip()], {"segments": 5}, "segments must be a list of rows, got 5"),
    "segment a number": ([clip()], {"segments": [5]}, r"segment 0 must be \(clip, class, start, end.* got 5"),
    "segment of class x": ([clip()], {"segments": [(0, "x", 0, 1)]}, "segment 0 must be of whole class, start and end"),
    "segment of class NaN": ([clip()], {"segments": [(0, np.nan, 0, 1)]}, "segment 0 must be of whole class"),
    "segment of class None": ([clip()], {"segments": [(0, None, 0, 1)]}, "segment 0 must be of whole class"),
    "segment of half a clip": ([clip()], {"segments": [(0.5, 0, 0, 1)]}, "segment 0 must be in one of the 1 clips"),
    "segment of clip None": ([clip()], {"segments": [(None, 0, 0, 1)]}, "segment 0 must be in one of the 1 clips"),
    "segment between frames": ([clip()], {"segments": [(0, 0, 0.2, 2.7)]}, r"whole .* got \(0, 0, 0.2, 2.7\)"),
    "segment of confidence None": ([clip()], {"segments": [(0, 0, 0, 1, None)]}, "of finite confidence, got None"),
    "segment of confidence NaN": ([clip()], {"segments": [(0, 0, 0, 1, np.nan)]}, "of finite confidence, got nan"),
    "splits a list": ([clip()], {"splits": [[0]]}, r"splits must be a mapping .* got \[\[0\]\]"),
    "split of no name": ([clip()], {"splits": {1: {"train": [0]}}}, "splits must be a mapping from string"),
    "split a list": ([clip()], {"splits": {"p": [0]}}, r"splits\['p'\] must be a mapping .* got \[0\]"),
    "part of no name": ([clip()], {"splits": {"p": {0: [0]}}}, r"splits\['p'\] must be a mapping from string"),
    "part None": ([clip()], {"splits": {"p": {"train": None}}}, r"\['train'\] must be a list of clips, got None"),
    "part a string": ([clip()], {"names": "a", "splits": {"p": {"train": "a"}}}, "names must be a list of strings"),
    "part one name": (
        [clip()],
        {"names": ["a"], "splits": {"p": {"train": "a"}}},
        r"\['train'\] must be a list of clips, got 'a'",
    ),
    "member a fraction": ([clip()], {"splits": {"p": {"train": [0.9]}}}, "names or indices .* got 0.9"),
    "member None": ([clip()], {"splits": {"p": {"train": [None]}}}, "names or indices .* got None"),
    "member of a mask": ([clip()], {"splits": {"p": {"train": [False]}}}, "names or indices .* got False"),
    "columns a list": ([clip()], {"columns": [1]}, r"columns must be a mapping from name to values, got \[1\]"),
    "column a number": ([clip()], {"columns": {"w": 3}}, "column 'w' must be a list with one value per clip.* got 3"),
    "column None": ([clip()], {"columns": {"w": None}}, "column 'w' must be a list .* got None"),
    "column ragged": ([clip()], {"columns": {"w": [[[1], [1, 2]]]}}, "column 'w' must be one plain value"),
    "units None": ([clip()], {"units": None}, "units must be a string, got None"),
    "source a number": ([clip()], {"source": 3}, "source must be a string, got 3"),
    "up axis None": ([clip()], {"up_axis": None}, "up_axis must be one of .* got None"),
    "class names one string": ([clip()], {"class_names": "ab"}, "class_names must be a list of strings, got 'ab'"),
    "class names None": ([clip()], {"class_names": None}, "class_names must be a list of strings, got None"),
    "class name a number": ([clip()], {"class_names": ["a", 1]}, "class_names must be a list of strings"),
    "class names twice": ([clip()], {"class_names": ["a", "a"]}, "class_names must be distinct"),
    "channels one string": ([clip()], {"channels": "xyz"}, "channels must be a list of strings, got 'xyz'"),
    "channel a number": ([clip()], {"channels": ["x", "y", 3]}, "channels must be a list of strings"),
    "channels twice": ([clip()], {"channels": ["x", "y", "x"]}, "channels must be distinct"),
    "bodies negative": ([clip()], {"num_bodies": -1}, "num_bodies must be a whole number of at least 1, got -1"),
    "bodies a string": ([clip()], {"num_bodies": "2"}, "num_bodies must be a whole number of at least 1, got '2'"),
    "bodies a fraction": ([clip()], {"num_bodies": 1.5}, "num_bodies must be a whole number"),
}


@pytest.mark.parametrize("case", ARRAYS)
@pytest.mark.parametrize("lazy", [False, True], ids=["list", "generator"])
def test_pack_arrays_refuses(tmp_path, case, lazy):
    clips, options, message = ARRAYS[case]
    with pytest.raises(ValueError, match=f"pack_arrays: .*{message}"):
        pack.pack_arrays(iter(clips) if lazy else clips, topology="sbu-15", out=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "clips", [None, 5, "walk.npy", {"walk": clip()}, np.array(1.0)], ids=lambda v: type(v).__name__
)
def test_clips_of_another_form_are_refused(tmp_path, clips):
    with pytest.raises(ValueError, match=f"clips must be a list or generator, got {type(clips).__name__}. Put"):
        pack.pack_arrays(clips, topology="sbu-15", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="long doubles are doubles on this machine")
@pytest.mark.parametrize("values", [np.ones(1, np.longdouble), [np.ones(4, np.longdouble)]], ids=["clip", "frame"])
def test_long_doubles_are_refused(tmp_path, values):
    with pytest.raises(ValueError, match="column 'w' must be .* a number of at most 8 bytes, got float"):
        pack.pack_arrays([clip()], topology="sbu-15", out=tmp_path / "out", columns={"w": values})
    assert list(tmp_path.iterdir()) == []


UNREGISTERED = {
    "of another name": replace(topology("sbu-15"), name="mine-15"),
    "of a registered name": replace(topology("sbu-15"), centre=5),
}


@pytest.mark.parametrize("case", UNREGISTERED)
def test_an_unregistered_topology_is_refused(tmp_path, case):
    layout = UNREGISTERED[case]
    with pytest.raises(ValueError, match=rf"topology must be registered .* got '{layout.name}'. .*TOPOLOGIES\.add"):
        pack.pack_arrays([clip()], topology=layout, out=tmp_path / "out")
    with pytest.raises(ValueError, match="topology must be a name or a Topology, got None"):
        pack.pack_arrays([clip()], topology=None, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", ["pack_arrays", "pack_source"])
def test_what_cannot_be_opened_does_not_appear(tmp_path, function, monkeypatch):
    real = writer.write_meta
    monkeypatch.setattr(writer, "write_meta", lambda folder, meta: real(folder, {**meta, "units": None}))
    source = store(tmp_path / "src", {UCLA: js(GOOD_JSON)}, "folder")
    run = {
        "pack_arrays": lambda: pack.pack_arrays([clip()], topology="sbu-15", out=tmp_path / "out"),
        "pack_source": lambda: pack.pack_source("nw-ucla", source, tmp_path / "out", progress=False),
    }[function]
    with pytest.raises(ValueError, match="units must be a str, got None"):
        run()
    # the clips that were read are not read again
    left = {"pack_arrays": ["src"], "pack_source": ["out.packing", "src"]}[function]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_a_clip_of_one_frame_is_fine(tmp_path):
    assert pack.pack_arrays([clip(frames=1)], topology="sbu-15", out=tmp_path / "out").num_frames.tolist() == [1]


class Payload:
    """Unpickling it would create the marker file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("form", ["object array", "bare pickle", "truncated", "empty", "missing", "folder"])
def test_bad_npy_clips_are_refused_unread(tmp_path, form):
    path, marker = tmp_path / "jump.npy", tmp_path / "executed"
    if form == "object array":
        np.save(path, np.array([Payload(marker)], dtype=object), allow_pickle=True)
    elif form == "bare pickle":
        path.write_bytes(pickle.dumps(Payload(marker)))
    elif form == "truncated":
        np.save(path, clip())
        path.write_bytes(path.read_bytes()[:-8])
    elif form == "empty":
        path.touch()
    elif form == "folder":
        path.mkdir()
    with pytest.raises(ValueError, match=r"pack_arrays: clip 0 in .*jump\.npy must be"):
        pack.pack_arrays([path], topology="sbu-15", out=tmp_path / "out")
    assert not marker.exists() and not (tmp_path / "out").exists()
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


UTD, UCLA = "a1_s1_t1_skeleton.mat", "a01_s01_e00_v01.json"
FILES = {
    "mat truncated": ("utd-mhad", UTD, mat(GOOD)[:-40], "complete MATLAB 5 file"),
    "mat cut in its header": ("utd-mhad", UTD, mat(GOOD)[:60], "complete MATLAB 5 file"),
    "mat empty": ("utd-mhad", UTD, b"", "complete MATLAB 5 file"),
    "mat no matlab": ("utd-mhad", UTD, b"hello" * 100, "complete MATLAB 5 file"),
    "mat of another variable": ("utd-mhad", UTD, mat(GOOD, "skeleton"), "variable d_skel"),
    "mat of objects": ("utd-mhad", UTD, mat(np.array([[1], ["a"]], dtype=object)), "made of numbers"),
    "mat of text": ("utd-mhad", UTD, mat("hello"), "made of numbers"),
    "mat with NaN": ("utd-mhad", UTD, mat(with_nan(GOOD)), "finite numbers, got NaN or infinity in frame 3"),
    "mat of 25 joints": ("utd-mhad", UTD, mat(np.ones((25, 3, 4))), r"20 joints, 3, T\), got shape \(25, 3, 4\)"),
    "mat without frames": ("utd-mhad", UTD, mat(np.ones((20, 3, 0))), "at least one frame|20 joints"),
    "mat misnamed": ("utd-mhad", "walk.mat", mat(GOOD), r"named a<1..27>.*got walk\.mat"),
    "mat of class 28": ("utd-mhad", "a28_s1_t1_skeleton.mat", mat(GOOD), "named a<1..27>"),
    "json truncated": ("nw-ucla", UCLA, js(GOOD_JSON)[:-40], "complete JSON"),
    "json empty": ("nw-ucla", UCLA, b"", "complete JSON"),
    "json not text": ("nw-ucla", UCLA, b"\xff\xfe\x00\x81", "complete JSON"),
    "json too deep": ("nw-ucla", UCLA, b"[" * 200_000, "complete JSON"),
    "json of a list": ("nw-ucla", UCLA, b"[]", "list `skeletons`"),
    "json of nothing": ("nw-ucla", UCLA, b"{}", "list `skeletons`"),
    "json with NaN": ("nw-ucla", UCLA, js(with_nan(GOOD).transpose(2, 0, 1).tolist()), "finite numbers.* in frame 3"),
    "json with infinity": ("nw-ucla", UCLA, INFINITE, "finite numbers, got NaN or infinity in frame 1"),
    "json of 25 joints": ("nw-ucla", UCLA, js(np.ones((2, 25, 3)).tolist()), r"20 joints x 3, got shape \(2, 25, 3\)"),
    "json ragged": ("nw-ucla", UCLA, js([np.ones((20, 3)).tolist(), np.ones((19, 3)).tolist()]), "different lengths"),
    "json of text": ("nw-ucla", UCLA, js(np.full((2, 20, 3), "1").tolist()), "made of numbers"),
    "json without frames": ("nw-ucla", UCLA, js([]), "at least one frame"),
    "json of another label": ("nw-ucla", UCLA, js(GOOD_JSON, 2), "of label 1 as its name says, got label 2"),
    "json misnamed": ("nw-ucla", "a07_s01_e00_v01.json", js(GOOD_JSON), "named a<class>"),
}


def store(source, files, kind):
    if kind == "folder":
        source.mkdir()
        for name, data in files.items():
            (source / name).write_bytes(data)
        return source
    path = source.with_suffix(".tar.xz")
    with tarfile.open(path, "w:xz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", ["folder", "archive"])
@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_stops_packing(tmp_path, case, kind):
    name, file, data, message = FILES[case]
    good = ("a2_s1_t1_skeleton.mat", mat(GOOD)) if name == "utd-mhad" else ("a02_s01_e00_v01.json", js(GOOD_JSON, 2))
    source = store(tmp_path / "src", dict([good, (file, data)]), kind)
    with pytest.raises(ValueError, match=f"(?s)pack_source: file must be .*{message}.*, in .*src.*/{file}"):
        pack.pack_source(name, source, tmp_path / "out", progress=False)
    # what was packed before it stays, to be gone on with
    kept = ["out.packing"] if good[0] < file else []
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [*kept, source.name]


def test_a_mat_file_carries_no_code(tmp_path):
    marker = tmp_path / "executed"
    with pytest.raises(ValueError, match="complete MATLAB 5 file"):
        FORMATS["utd-mhad"].read(pickle.dumps(Payload(marker)), UTD)
    assert not marker.exists()


SOURCES = {
    "missing": "source must be a folder or an archive, got nothing",
    "no files": r"source must be with \.json files, got none",
    "no archive": "complete tar or zip archive",
    "truncated archive": "complete tar or zip archive",
    "truncated zip": "complete tar or zip archive",
    "twice": "source must be without duplicate names",
}


@pytest.mark.parametrize("case", SOURCES)
def test_bad_sources(tmp_path, case):
    source = tmp_path / "src"
    if case == "no files":
        source.mkdir()
    elif case == "no archive":
        source.write_bytes(b"hello" * 1000)
    elif case == "truncated archive":
        source = store(
            source,
            {f"a01_s01_e0{n}_v01.json": js(np.random.default_rng(n).random((9, 20, 3)).tolist()) for n in range(9)},
            "tar",
        )
        source.write_bytes(source.read_bytes()[:-3000])
    elif case == "truncated zip":
        source.write_bytes(b"PK\x03\x04" + bytes(200))
    elif case == "twice":
        for folder in ("one", "two"):
            (source / folder).mkdir(parents=True)
            (source / folder / UCLA).write_bytes(js(GOOD_JSON))
    with pytest.raises(ValueError, match=f"pack_source: .*{SOURCES[case]}.*, in .*src"):
        pack.pack_source("nw-ucla", source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_an_archive_writes_nowhere_else(tmp_path):
    path = tmp_path / "src.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("../../" + UCLA, "/a01_s01_e01_v01.json"):
            member = tarfile.TarInfo(name)
            member.size = len(js(GOOD_JSON))
            archive.addfile(member, io.BytesIO(js(GOOD_JSON)))
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)):
            member = tarfile.TarInfo(f"a02_s01_e0{number}_v01.json")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    summary = pack.pack_source("nw-ucla", path, tmp_path / "deep" / "out", progress=False)
    assert summary.clips == 2 and [reason for _, reason in summary.skipped] == ["not a regular file"] * 4
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["deep", "src.tar"]


def test_existing_destination(tmp_path):
    source = store(tmp_path / "src", {UCLA: js(GOOD_JSON)}, "folder")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="pack_source: destination must be new, got the existing .*out"):
        pack.pack_source("nw-ucla", source, tmp_path / "out", progress=False)
    assert list((tmp_path / "out").iterdir()) == []


class FullDisk:
    """A file on a disk with room for some bytes, which fails as the system does."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 500])
def test_a_full_disk_names_the_destination(tmp_path, monkeypatch, room):
    create = writer.FramesWriter._create
    monkeypatch.setattr(writer.FramesWriter, "_create", lambda self: FullDisk(create(self), room))
    with pytest.raises(ValueError, match=r"destination must be writable, got No space left on device, in .*out"):
        pack.pack_arrays([clip()], topology="sbu-15", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the size of files through the system")
@pytest.mark.parametrize("what", ["pack_arrays", "pack_source"])
def test_a_limit_of_the_system_names_the_destination(tmp_path, what):
    source = store(tmp_path / "src", {UCLA: js(np.random.default_rng(0).random((400, 20, 3)).tolist())}, "folder")
    program = f"""
        import resource
        import numpy as np
        from fastskel.data import pack, writer
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            if {what!r} == "pack_arrays":
                pack.pack_arrays([np.ones((400, 1, 15, 3))], topology="sbu-15", out={str(tmp_path / "out")!r})
            else:
                pack.pack_source("nw-ucla", {str(source)!r}, {str(tmp_path / "out")!r}, progress=False)
        except ValueError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{what}: destination must be writable, got File too large, in {tmp_path / 'out'}")
    assert [entry.name for entry in tmp_path.iterdir()] == ["src"]


def test_an_error_while_reading_is_not_blamed_on_the_destination(tmp_path):
    def clips():
        yield clip()
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(ValueError, match="pack_arrays: clip 1 must be readable, got .*Input/output error"):
        pack.pack_arrays(clips(), topology="sbu-15", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interruption_leaves_nothing(tmp_path, error):
    def clips():
        yield clip()
        raise error

    with pytest.raises(error):
        pack.pack_arrays(clips(), topology="sbu-15", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_survives_is_whole(tmp_path):
    source = store(tmp_path / "src", {UCLA: js(GOOD_JSON), "a02_s01_e00_v01.json": js(GOOD_JSON[:1], 2)}, "archive")
    pack.pack_source("nw-ucla", source, tmp_path / "out", progress=False)
    assert open_dataset(tmp_path / "out", verify=True).num_frames.tolist() == [5, 1]
