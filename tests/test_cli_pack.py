"""The commands that bring data in and out: the list of formats, and what `unpack` writes packed again."""

from __future__ import annotations

from fastskel.cli import main
from fastskel.data import make_synthetic, open_dataset
from fastskel.data.formats import FORMATS, PREPARED


def refused(capsys, *arguments: str) -> str:
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
