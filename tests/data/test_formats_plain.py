"""A user's own files: .npy, .json and .csv with a skeleton by name or file, and what a layout file may hold."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from numpy.lib import format as npy

from fastskel.cli import main
from fastskel.data import pack
from fastskel.data.formats.plain import PlainOptions, read_csv, read_json, read_npy
from fastskel.data.packed import open_dataset
from fastskel.data.topology_file import topology_from_json, topology_to_json
from fastskel.skeleton import TOPOLOGIES, topology

SBU = PlainOptions(topology="sbu-15")
LAYOUT = {
    "name": "stick-5",
    "joints": ["hips", "neck", "left_hand", "right_hand", "left_foot"],
    "parents": ["hips", "hips", "neck", "neck", "hips"],
}


def values(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def npy_bytes(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def csv_bytes(array, mark=",", header=""):
    rows = [mark.join(map(repr, row)) for row in array.reshape(len(array), -1).astype(float).tolist()]
    return (header + "\n".join(rows) + "\n").encode()


@pytest.mark.parametrize("shape", [(4, 15, 3), (1, 15, 3), (3, 2, 15, 3)])
def test_shapes(shape):
    array = values(*shape)
    expected = array if array.ndim == 4 else array[:, None]
    marks = [csv_bytes(array, mark) for mark in (",", ";", "\t", " ")]
    marks.append(csv_bytes(array, ",", header="\ufeffhead_x,head_y,head_z\n"))
    for data in (npy_bytes(array), npy_bytes(np.asfortranarray(array))):
        np.testing.assert_array_equal(read_npy(data, "a/b.npy", SBU).frames, expected)
    for data in (json.dumps(array.tolist()), json.dumps({"frames": array.tolist(), "more": 1})):
        np.testing.assert_array_equal(read_json(data.encode(), "a/b.json", SBU).frames, expected)
    for data in marks:
        np.testing.assert_array_equal(read_csv(data, "a/b.csv", SBU).frames, expected)


def test_channels():
    options = replace(SBU, channels=("x", "y"))
    assert read_npy(npy_bytes(values(2, 15, 2)), "b.npy", options).frames.shape == (2, 1, 15, 2)
    assert read_csv(csv_bytes(values(2, 2, 15, 2)), "b.csv", options).frames.shape == (2, 2, 15, 2)


def claiming(num_frames):
    buffer = io.BytesIO()
    npy.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (num_frames, 15, 3)})
    return buffer.getvalue() + bytes(180)


@pytest.mark.parametrize(
    ("read", "data", "message"),
    [
        (read_npy, b"", "a complete .npy array"),
        (read_npy, npy_bytes(values(2, 15, 3))[:-1], r"a complete .npy array.* got 359 bytes for shape \(2, 15, 3\), not 360"),
        (read_npy, npy_bytes(values(2, 15, 3)) + b"1", "got 361 bytes for shape"),
        (read_npy, claiming(10**9), r"got 180 bytes for shape \(1000000000, 15, 3\), not 180000000000"),
        (read_npy, npy_bytes(np.array([{}]), allow_pickle=True), "made of numbers, got values of type object"),
        (read_npy, npy_bytes(np.array(["a"])), "made of numbers"),
        (read_npy, npy_bytes(values(2, 14, 3)), r"of shape \(T, 15, 3\) or \(T, M, 15, 3\), got shape \(2, 1, 14, 3\)"),
        (read_npy, npy_bytes(values(2, 15, 2)), "of shape"),
        (read_npy, npy_bytes(values(15, 3)), "of shape"),
        (read_npy, npy_bytes(values(0, 15, 3)), r"at least one frame, got shape \(0, 15, 3\)"),
        (read_npy, npy_bytes(values(2, 15, 3) * [1, np.nan, 1]), "NaN or infinity in frame 0"),
        (read_json, b"", "complete JSON"),
        (read_json, b"[[1,2", "complete JSON"),
        (read_json, b"{}", "an object with the list `frames`, got NoneType"),
        (read_json, b"[]", "at least one frame"),
        (read_json, b"[[[1,2,3]],[[1,2]]]", "as many joints and channels"),
        (read_json, json.dumps(values(1, 14, 3).tolist()).encode(), "of shape"),
        (read_json, json.dumps([[["1"] * 3] * 15]).encode(), "made of numbers"),
        (read_json, json.dumps([[[10**400] * 3] * 15]).encode(), "made of numbers"),
        (read_csv, b"", "at least one frame"),
        (read_csv, b"a,b,c\n", "at least one frame"),
        (read_csv, csv_bytes(values(2, 15, 3))[:-20], "45 numbers in every row, got 44 in line 2|made of numbers"),
        (read_csv, csv_bytes(values(2, 14, 3)), "rows of M x 15 joints x 3 numbers, got 42 numbers a row"),
        (read_csv, csv_bytes(values(2, 15, 3)) + b"\n1" + b",1" * 43 + b",x\n", "'x' in line 4"),
        (read_csv, b"1_0" + b",1" * 44 + b"\n", "made of numbers, got '1_0' in line 1"),
        (read_csv, "\u0663".encode() + b",1" * 44 + b"\n", "made of numbers, got '\u0663' in line 1"),
        (read_csv, b"x" * 5000 + b",1" * 44 + b"\n", "made of numbers, got 'x{80}' in line 1"),
        (read_json, b"[[[" + b"9" * 5000 + b"]]]", "complete JSON, got an unreadable one .Exceeds the limit"),
    ],
)
def test_bad_files(read, data, message):
    with pytest.raises(ValueError, match=rf"pack_source: file must be .*({message}).*in a/b"):
        read(data, "a/b", SBU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": ()}, "option channels must be distinct names"),
        ({"channels": ("x", "x")}, "option channels must be distinct names"),
        ({"channels": "xyz"}, "option channels must be distinct names"),
        ({"units": ""}, "option units must be a word"),
        ({"up_axis": "w"}, "option up_axis must be x, y"),
        ({"labels": "/nowhere/labels.csv"}, "option labels must be none, folder or a readable CSV file"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        PlainOptions(**changes)


def write(folder, suffix="npy"):
    for number, (part, name) in enumerate((("walk", "c1"), ("run", "c2"), ("walk", "c3"))):
        (folder / part).mkdir(parents=True, exist_ok=True)
        array = values(3 + number, 1 + number % 2, 5, 3)
        data = {"npy": npy_bytes(array), "csv": csv_bytes(array), "json": json.dumps(array.tolist()).encode()}[suffix]
        (folder / part / f"{name}.{suffix}").write_bytes(data)
    return folder


@pytest.mark.parametrize("suffix", ["npy", "json", "csv"])
def test_a_folder_with_a_layout_from_a_file(tmp_path, suffix, capsys):
    source = write(tmp_path / "src", suffix)
    (tmp_path / "stick.json").write_text(json.dumps(LAYOUT))
    options = ["--topology", str(tmp_path / "stick.json"), "--labels", "folder", "--units", "yards", "--up-axis", "-z"]
    assert main(["pack", suffix, str(source), str(tmp_path / "out"), "--quiet", *options]) in (0, None)
    assert "packed 3 clips, 12 frames" in capsys.readouterr().out
    # nothing is registered: the packed data set brings its layout
    assert "stick-5" not in TOPOLOGIES
    dataset = open_dataset(tmp_path / "out", verify=True)
    assert dataset.topology == topology_from_json(LAYOUT, "x") and dataset.topology.parents() == (0, 0, 1, 1, 0)
    assert dataset.labels.tolist() == [1, 0, 1] and dataset.class_names == ["run", "walk"]
    assert (dataset.meta["units"], dataset.meta["up_axis"], dataset.source) == ("yards", "-z", suffix)
    np.testing.assert_array_equal(dataset.clip(1), values(4, 2, 5, 3))
    assert dataset.num_bodies.tolist() == [1, 2, 1]


def test_labels_from_a_list(tmp_path):
    source = write(tmp_path / "src")
    (tmp_path / "stick.json").write_text(json.dumps(LAYOUT))
    options = {"topology": str(tmp_path / "stick.json"), "labels": str(tmp_path / "labels.csv")}
    # numbers are in the order of numbers
    (tmp_path / "labels.csv").write_text("c1,10\nc2,2\nc3,10\nunused,7\n")
    pack.pack_source("npy", source, tmp_path / "out", options=options, progress=False)
    dataset = open_dataset(tmp_path / "out")
    assert dataset.labels.tolist() == [1, 0, 1] and dataset.class_names == ["2", "10"]
    (tmp_path / "labels.csv").write_text("c1,10\n")
    with pytest.raises(ValueError, match="in the list of labels, got no row for 'c2' in .*labels.csv"):
        pack.pack_source("npy", source, tmp_path / "other", options=options, progress=False)
    for text in ("c1\n", "c1,a\nc1,b\n", "c1,\n", ",a\n", "a,b,c\n"):
        (tmp_path / "labels.csv").write_text(text)
        with pytest.raises(ValueError, match="rows of distinct clip name and class"):
            pack.pack_source("npy", source, tmp_path / "other", options=options, progress=False)
    del options["labels"]
    pack.pack_source("npy", source, tmp_path / "none", options=options, progress=False)
    assert open_dataset(tmp_path / "none").labels.tolist() == [-1] * 3 and open_dataset(tmp_path / "none").class_names == []


def test_a_layout_has_to_be_named(tmp_path):
    source = write(tmp_path / "src")
    for name in ("", "sbu-16"):
        with pytest.raises(ValueError, match=rf"option topology must be one of .*sbu-15.* or a JSON file, got '{name}'"):
            pack.pack_source("npy", source, tmp_path / "out", options={"topology": name}, progress=False)
    with pytest.raises(ValueError, match=r"of shape \(T, 15, 3\)"):
        pack.pack_source("npy", source, tmp_path / "out", options={"topology": "sbu-15"}, progress=False)


@pytest.mark.parametrize("name", sorted(TOPOLOGIES))
def test_layouts_survive_json(name):
    layout = topology(name)
    # the other way round, as sorting the keys could leave them
    layout = replace(layout, bones=dict(reversed(layout.bones.items())))
    content = json.loads(json.dumps(topology_to_json(layout), sort_keys=True))
    again = topology_from_json(content, "x")
    assert again == layout and list(again.bones) == list(layout.bones) and dict(again.axes) == dict(layout.axes)


def test_what_names_tell():
    layout = topology_from_json(LAYOUT, "x")
    assert layout.mirror == (0, 1, 3, 2, 4) and layout.centre == 0
    assert dict(layout.parts) == {
        "head": (1,),
        "torso": (0,),
        "left_arm": (2,),
        "right_arm": (3,),
        "left_leg": (4,),
        "right_leg": (),
    }
    assert dict(layout.axes) == {"neck": (1,)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name must be a string"),
        ({"name": None}, "name must be a string"),
        ({"joints": []}, "joints must be a list of names"),
        ({"joints": [1, 2]}, "joints must be a list of names"),
        ({"joints": ["hips", "hips", "neck", "left_hand", "right_hand"]}, "joints must be at least one distinct name"),
        ({"parents": None}, "parents of 'plain' must be a list of joints"),
        ({"parents": ["hips"] * 4}, "5 parents"),
        ({"parents": ["hips"] * 4 + ["wing"]}, "made of joints, by name or index, got 'wing'"),
        ({"parents": [0, 0, 0, 0, 5]}, "made of joints, by name or index, got 5"),
        ({"parents": [0, 0, 0, 0, True]}, "made of joints, by name or index, got True"),
        ({"bones": []}, "bones must be variants of parents"),
        ({"bones": {}}, "bones must be at least one variant"),
        ({"variants": ["other"]}, "variants must be an order of plain, got"),
        ({"centre": "wing"}, "centre must be made of joints"),
        ({"mirror": [0, 0, 2, 3, 4]}, "mirror must be a permutation"),
        ({"axes": []}, "axes and parts must be objects"),
        ({"parts": {"head": [0]}}, "parts must be head, torso"),
        ({"wings": 2}, "keys must be among .*got 'wings'"),
    ],
)
def test_bad_layouts(tmp_path, changes, message):
    path = tmp_path / "stick.json"
    path.write_text(json.dumps({**LAYOUT, **changes}))
    with pytest.raises(ValueError, match=rf"(?s){message}.*stick.json"):
        pack.pack_source("npy", write(tmp_path / "src"), tmp_path / "out", options={"topology": str(path)}, progress=False)
    assert not (tmp_path / "out").exists()


def test_layout_files_that_are_none(tmp_path):
    path = tmp_path / "stick.json"
    for text, message in (("{", "readable JSON"), ("[]", "a JSON object"), ('{"name": "sbu-15"}', "joints must be")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"{message}.*stick.json"):
            pack.pack_source("npy", write(tmp_path / "src"), tmp_path / "out", options={"topology": str(path)}, progress=False)
    path.write_text(json.dumps({**LAYOUT, "name": "sbu-15"}))
    with pytest.raises(ValueError, match="name must be new, got the registered 'sbu-15'"):
        pack.pack_source("npy", write(tmp_path / "src"), tmp_path / "out", options={"topology": str(path)}, progress=False)


def test_a_packed_layout_belongs_to_its_data(tmp_path):
    (tmp_path / "stick.json").write_text(json.dumps(LAYOUT))
    options = {"topology": str(tmp_path / "stick.json")}
    pack.pack_source("npy", write(tmp_path / "src"), tmp_path / "out", options=options, progress=False)
    layout = tmp_path / "out" / "topology.json"
    sound = layout.read_text()
    layout.write_text(sound.replace("stick-5", "stick-6"))
    with pytest.raises(ValueError, match="topology must be 'stick-5' as meta.json says, got 'stick-6'"):
        open_dataset(tmp_path / "out")
    layout.unlink()
    with pytest.raises(ValueError, match="topology must be one of .*got stick-5"):
        open_dataset(tmp_path / "out")
