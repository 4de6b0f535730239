"""The commands that bring data in and out, show it and check it."""

from __future__ import annotations

import errno
import json
import os
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np

from fastskel.cli import main
from fastskel.data import convert_joints, make_synthetic, open_dataset, pack_arrays, pack_source
from fastskel.data.formats import FORMATS, PREPARED
from fastskel.data.identity import original_identity
from fastskel.data.writer import FramesWriter


def refused(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.endswith("\n") and error.count("\n") == 1 and "Traceback" not in error
    return error


def test_list_of_formats(capsys) -> None:
    assert main(["pack", "--list-formats"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in FORMATS:
        assert f"{name} {FORMATS[name].about}." in text
    for name in PREPARED:
        assert f"{name} {PREPARED[name].about}. Options: --dataset," in text


def ucla_archive(path: Path, frames: int = 6) -> Path:
    draw = np.random.default_rng(0)
    with tarfile.open(path, "w:xz") as archive:
        for action, label, view in ((1, 1, 1), (8, 7, 2), (12, 10, 3)):
            skeletons = draw.normal(size=(frames, 20, 3)).tolist()
            content = json.dumps({"file_name": "x", "skeletons": skeletons, "label": label}).encode()
            member = tarfile.TarInfo(f"all/a{action:02}_s01_e00_v0{view}.json")
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    return path


def test_pack_info_show(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    archive = str(ucla_archive(tmp_path / "ucla.tar.xz"))
    assert main(["pack", "nw-ucla", archive, "packed", "--quiet"]) == 0
    output = capsys.readouterr()
    assert "packed 3 clips, 18 frames" in output.out and output.err == ""
    assert len(open_dataset("packed", verify=True)) == 3
    assert "must be new" in refused(capsys, "pack", "nw-ucla", archive, "packed", "--quiet")
    assert main(["info", "packed", "--verify"]) == 0
    text = capsys.readouterr().out
    assert "nw-ucla" in text and "3, 18 frames" in text and "checksums match" in text
    name = str(open_dataset("packed").names[0])
    for clip in (name, "0"):
        assert main(["show", "packed", clip, "--out", f"pictures-{clip}"]) == 0
        paths = [Path(line) for line in capsys.readouterr().out.split()]
        assert [path.suffix for path in paths] == [".png", ".gif"]
        assert all(path.parent == Path(f"pictures-{clip}") and path.stat().st_size > 0 for path in paths)
    assert "index must be in range(3), got 99" in refused(capsys, "show", "packed", "99")
    assert "name must be a clip, got 'nobody'" in refused(capsys, "show", "packed", "nobody")


def test_damage_is_one_line(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no such folder, in nowhere" in refused(capsys, "info", "nowhere")
    assert "nowhere" in refused(capsys, "pack", "utd-mhad", "nowhere", "packed", "--quiet")
    whole = ucla_archive(tmp_path / "whole.tar.xz").read_bytes()
    (tmp_path / "cut.tar.xz").write_bytes(whole[: len(whole) // 2])
    assert "cut.tar.xz" in refused(capsys, "pack", "nw-ucla", "cut.tar.xz", "packed", "--quiet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.tar.xz", "whole.tar.xz"]
    main(["pack", "nw-ucla", "whole.tar.xz", "packed", "--quiet"])
    frames = (tmp_path / "packed" / "frames.npy").read_bytes()
    (tmp_path / "packed" / "frames.npy").write_bytes(frames[:-4] + b"\1\2\3\4")
    assert main(["info", "packed"]) == 0
    assert "frames.npy" in refused(capsys, "info", "packed", "--verify")
    (tmp_path / "packed" / "frames.npy").write_bytes(frames[:-40])
    for command in (["info", "packed"], ["pretrain", "usdrl-demo", "packed"], ["show", "packed", "0"]):
        assert "frames.npy" in refused(capsys, *command)
    assert not (tmp_path / "runs").exists()


def test_unpack_and_pack_again(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_synthetic("data", num_clips=6, num_classes=3, num_subjects=2)
    for name, target in (("pyskl", "all.pkl"), ("agcn", "folder"), ("ctr-gcn", "a_xsub.npz")):
        options = [] if name == "pyskl" else ["--protocol", "xsub", "--bodies", "3"]
        assert main(["unpack", name, "data", target, *options]) == 0
        assert capsys.readouterr().out == f"{target}\n"
        assert main(["pack", name, target, f"{name}-again", "--topology", "ntu-25", "--quiet"]) == 0
        assert "packed 6 clips" in capsys.readouterr().out
        again = open_dataset(f"{name}-again")
        assert sorted(again.num_frames) == sorted(open_dataset("data").num_frames) and len(again.splits) >= 1
        assert "must be new" in refused(capsys, "unpack", name, "data", target)
    assert "FORMAT must be one of agcn, ctr-gcn, pyskl, got 'npz'" in refused(capsys, "unpack", "npz", "data", "out")
    (tmp_path / "bad.pkl").write_bytes(b"cos\nsystem\nX\x02\0\0\0ls\x85R.")
    assert "the name os.system, not looked up" in refused(capsys, "pack", "pyskl", "bad.pkl", "out", "--quiet")
    assert not (tmp_path / "out").exists()


def same_but_the_skeleton(first, second) -> None:
    for name in ("offsets", "names", "labels", "num_bodies", "segments"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert first.columns.keys() == second.columns.keys() and first.splits.keys() == second.splits.keys()
    for name, values in first.columns.items():
        np.testing.assert_array_equal(values, second.columns[name])
    for protocol, parts in first.splits.items():
        assert {part: index.tolist() for part, index in parts.items()} == {
            part: index.tolist() for part, index in second.splits[protocol].items()
        }
    told = {"topology": "", "checksums": {}, "original": original_identity(first)}
    assert {**first.meta, **told} == {**second.meta, "topology": "", "checksums": {}}


def full_after_one():
    append, calls = FramesWriter.append, iter([True])

    def until_full(writer: FramesWriter, frames: np.ndarray) -> None:
        if not next(calls, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(writer, frames)

    return until_full


def test_convert(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = make_synthetic("data", num_clips=6, num_classes=3, num_subjects=2, bodies=2)
    assert main(["convert", "data", "coco", "--to", "coco-17"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        f"converted 6 clips, {len(data.frames):,} frames, from ntu-25 to coco-17, into coco",
        "  12 of 17 joints from those of their names",
        "  nose from head",
        "  absent, zero in all frames: left_eye, right_eye, left_ear, right_ear",
    ]
    assert "converting to coco-17: 100%" in said.err
    coco = open_dataset("coco", verify=True)
    same_but_the_skeleton(data, coco)
    assert coco.splits and coco.columns
    for number in range(6):
        np.testing.assert_array_equal(coco.clip(number), convert_joints(data.clip(number), data.topology, coco.topology))
    assert main(["convert", "coco", "sbu", "--to", "sbu-15", "--quiet"]) == 0
    said = capsys.readouterr()
    assert "  neck from left_shoulder and right_shoulder, their mean\n" in said.out and said.err == ""
    assert main(["convert", "coco", "again", "--to", "sbu-15", "--quiet"]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "sbu").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()
    }


def test_convert_keeps_untrimmed_labels(tmp_path, capsys) -> None:
    # a published list has a segment that ends before it starts, and one may be empty
    source = tmp_path / "pku"
    for name, text in {"label/0002-L.txt": "1,3,2,1\n2,1,1,0\n", "0002-L.txt": (" 1" * 150 + "\n") * 3 + " 0" * 150}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    pack_source("pku-mmd", source, tmp_path / "data", progress=False)
    assert main(["convert", str(tmp_path / "data"), str(tmp_path / "out"), "--to", "kinect-20-ucla", "--quiet"]) == 0
    out = open_dataset(tmp_path / "out", verify=True)
    same_but_the_skeleton(open_dataset(tmp_path / "data"), out)
    # a frame without anyone stays
    assert out.segments is not None and out.segments[:, 2:4].tolist() == [[3, 2], [1, 1]] and len(out.clip(0)) == 4


def test_convert_to_a_skeleton_from_a_file(tmp_path, capsys) -> None:
    make_synthetic(tmp_path / "data", num_clips=2)
    content = {"name": "arm", "joints": ["left_shoulder", "left_elbow", "left_tip"], "parents": [0, 0, 1]}
    (tmp_path / "arm.json").write_text(json.dumps(content))
    assert main(["convert", str(tmp_path / "data"), str(tmp_path / "arm"), "--to", str(tmp_path / "arm.json"), "--quiet"]) == 0
    assert "absent, zero in all frames: left_tip" in capsys.readouterr().out
    arm = open_dataset(tmp_path / "arm", verify=True)
    assert arm.topology.joints == ("left_shoulder", "left_elbow", "left_tip") and arm.frames[:, :, :2].any()


def test_convert_refuses(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = make_synthetic("data", num_clips=2)
    pack_arrays([data.clip(0)], out="centred", topology="ntu-25", normalisation="center")
    assert "normalisation 'none', got 'center' in centred" in refused(capsys, "convert", "centred", "out", "--to", "coco-17")
    error = refused(capsys, "convert", "data", "out", "--to", "coco-18")
    assert "convert_dataset: target must be one of coco-17," in error and "or a JSON file, got 'coco-18'" in error
    assert "destination must be new" in refused(capsys, "convert", "data", "centred", "--to", "coco-17")
    (tmp_path / "tail.json").write_text(json.dumps({"name": "tail", "joints": ["tip"], "parents": [0]}))
    assert "must share joints with 'ntu-25' of data, got 'tail'" in refused(capsys, "convert", "data", "out", "--to", "tail.json")
    error = refused(capsys, "convert", "nothing", "out", "--to", "coco-17")
    assert "open_dataset: path must be a packed data set" in error
    # a disk that is full in the middle of the second clip leaves nothing half-written
    monkeypatch.setattr("fastskel.data.writer.FramesWriter.append", full_after_one())
    assert "No space left on device, in out" in refused(capsys, "convert", "data", "out", "--to", "coco-17", "--quiet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["centred", "data", "tail.json"]


def test_check(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_synthetic("clean", num_clips=12, num_classes=3, num_subjects=4)
    assert main(["check", "clean", "--quiet", "--fail-on", "warning"]) == 0
    output = capsys.readouterr()
    assert "12 clips" in output.out and "protocol xsub" in output.out and output.err == ""
    assert "0 errors, 0 warnings" in output.out and "short-clip" in output.out
    motion = [np.array(open_dataset("clean").clip(number)) for number in range(4)]
    motion[2][10:20] = motion[2][10]
    motion[3] = motion[0]
    pack_arrays(motion, out="bad", topology="ntu-25", labels=[0, 1, 0, 1], names=["a", "b", "c", "d"])
    Path("split.json").write_text('{"train": ["a", "b"], "test": ["c", "d"]}')
    # a frozen clip is a warning, a leak an error
    pack_arrays(motion[:3], out="frozen", topology="ntu-25", labels=[0, 1, 0], names=["a", "b", "c"])
    for data, fail_on, code in [
        ("frozen", "error", 0), ("frozen", "warning", 1), ("frozen", "never", 0),
        ("bad", "error", 1), ("bad", "never", 0),
    ]:  # fmt: skip
        assert main(["check", data, "--quiet", "--fail-on", fail_on]) == code
        assert "frozen-frames" in capsys.readouterr().out
    options = ["--split-file", "split.json", "--json", "found.json", "--picture", "found.png", "--crop", "30"]
    assert main(["check", "bad", "--quiet", *options]) == 1
    assert "d [0:" in capsys.readouterr().out
    found = {(finding["kind"], finding["name"]) for finding in json.loads(Path("found.json").read_text())["findings"]}
    assert {("leaked-clip", "d"), ("frozen-frames", "c")} <= found
    assert Path("found.png").read_bytes().startswith(b"\x89PNG")
    # the bar is on standard error, apart from what may be piped
    assert main(["check", "clean"]) == 0
    assert "12/12" in capsys.readouterr().err


def test_check_refuses(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_synthetic("data", num_clips=4, num_classes=2, num_subjects=2)
    assert "no such folder, in nowhere" in refused(capsys, "check", "nowhere")
    assert "protocol must be one of those for 'synthetic'" in refused(capsys, "check", "data", "--protocol", "xset", "--quiet")
    assert "crop must be a whole number" in refused(capsys, "check", "data", "--crop", "0", "--quiet")
    both = ["--protocol", "xsub", "--split-file", "x.json", "--quiet"]
    assert "protocol or split_file must be given, got both" in refused(capsys, "check", "data", *both)
    assert "path must be writable" in refused(capsys, "check", "data", "--json", "no/where.json", "--quiet")
    assert "path must be writable" in refused(capsys, "check", "data", "--picture", "no/where.png", "--quiet")
    assert main(["check", "data", "--fail-on", "sometimes"]) == 2
