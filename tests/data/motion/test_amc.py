"""Acclaim motion capture: positions as SciPy has them, which skeleton belongs to which motion, and each malformed file."""

from __future__ import annotations

import shutil
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from fastskel.cli import main
from fastskel.data.formats.amc import AmcOptions, layout_of, read, read_skeletons
from fastskel.data.formats.asf import read_skeleton
from fastskel.data.formats.bvh import BvhOptions
from fastskel.data.formats.bvh import read as read_bvh
from fastskel.data.formats.motion_capture import MAX_JOINTS
from fastskel.data.pack import pack_source
from fastskel.data.packed import open_dataset

# float32 of positions, beside sums of products along a hierarchy in float64
RELATIVE = 1e-6
PLAIN = AmcOptions(scale=1.0)
LEG = """# a thigh and a shin
:version 1.10
:name VICON
:units
  mass 1.0
  length 0.45
  angle deg
:documentation
   begin with anything: at all
:root
   order TX TY TZ RX RY RZ
   axis XYZ
   position 0 0 0
   orientation 0 0 0
:bonedata
  begin
     id 1
     name thigh
     direction 0 -1 0
     length 4
     axis 0 0 0 XYZ
    dof rx ry rz
    limits (-160.0 20.0)
           (-70.0 70.0)
           (-60.0 70.0)
  end
  begin
     id 2
     name shin
     direction 0 -1 0
     length 5
     axis 0 90 0 XYZ
    dof rx
    limits (-10.0 170.0)
  end
:hierarchy
  begin
    root thigh
    thigh shin
  end
"""
WALK = """#!OML:ASF F:\\VICON\\leg.ASF
:FULLY-SPECIFIED
:DEGREES
1
root 1 9 0 0 0 0
thigh 0 0 0
shin 90
2
root 1 9 0 90 90 0
thigh 0 0 0
shin 0
"""


def clip(asf, amc, options=PLAIN, path="07/07_01.amc"):
    data = [text if isinstance(text, bytes) else text.encode() for text in (asf, amc)]
    return read(data[1], path, options, read_skeletons({"07/07.asf": data[0]}))


def close(found, expected):
    assert found.shape == expected.shape and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=RELATIVE * np.abs(expected).max())


def test_by_hand():
    found = clip(LEG, WALK)
    # the shin turns about -z, its x in the world; the root about x first, then y, both fixed: down becomes back, then -x
    expected = [[[1, 9, 0], [1, 5, 0], [-4, 5, 0]], [[1, 9, 0], [-3, 9, 0], [-8, 9, 0]]]
    np.testing.assert_allclose(found.frames[:, 0], expected, atol=1e-6)
    assert (found.name, found.label, dict(found.columns), found.notes) == ("07_01", -1, {}, ())
    # metres, as the CMU database's answers say: (1.0 / 0.45) * 2.54 / 100
    np.testing.assert_allclose(clip(LEG, WALK, AmcOptions()).frames, found.frames * 0.0564444444, rtol=1e-6)
    layout = layout_of(WALK.encode(), "07/07_01.amc", PLAIN, read_skeletons({"07/07.asf": LEG.encode()}))
    assert layout.joints == ("root", "thigh", "shin") and layout.parents() == (0, 0, 1)


@pytest.mark.parametrize("seed", range(10))
def test_random_skeletons(seed, motion):
    root, bones, rows = motion.random_asf(seed, count=2 + 3 * seed)
    newline = "\r\n" if seed % 2 else "\n"
    found = clip(motion.asf_text(root, bones, newline=newline), motion.amc_text(rows, newline=newline, first=seed))
    layout = read_skeleton(motion.asf_text(root, bones), "x").topology()
    expected = motion.asf_positions(root, bones, rows)
    assert sorted(layout.joints) == sorted(expected)
    parents = {bone.name: bone.parent for bone in bones} | {"root": "root"}
    assert [layout.joints[parent] for parent in layout.parents()] == [parents[joint] for joint in layout.joints]
    close(found.frames[:, 0], np.stack([expected[joint] for joint in layout.joints], axis=1))


@pytest.mark.parametrize("angles", ["both", "motion", "skeleton"])
def test_radians(angles, motion):
    root, bones, rows = motion.random_asf(20)
    expected = clip(motion.asf_text(root, bones), motion.amc_text(rows)).frames
    factors = [1 if freedom[0] == "T" else np.pi / 180 for freedom in root]
    radians = [
        {name: [v * (f if name == "root" else np.pi / 180) for v, f in zip(values, factors)] for name, values in row.items()}
        for row in rows
    ]
    asf = motion.asf_text(root, bones, angle="deg" if angles == "motion" else "rad")
    if angles == "both":
        # a motion that does not say has the skeleton's unit
        amc = motion.amc_text(radians, angle="")
    else:
        amc = motion.amc_text(rows) if angles == "skeleton" else motion.amc_text(radians, angle=":RADIANS")
    close(clip(asf, amc).frames, expected)


def test_the_root_at_rest(motion):
    root, bones, rows = motion.random_asf(5)
    expected = motion.asf_positions(root, bones, rows)
    plain = clip(motion.asf_text(root, bones), motion.amc_text(rows))
    moved = clip(motion.asf_text(root, bones, position=(1.0, -2.0, 0.5)), motion.amc_text(rows))
    np.testing.assert_allclose(moved.frames, plain.frames + np.float32([1, -2, 0.5]), atol=1e-5)
    turned = clip(motion.asf_text(root, bones, orientation=(30, 40, -50)), motion.amc_text(rows))
    rest = Rotation.from_euler("xyz", [30, 40, -50], degrees=True)
    layout = read_skeleton(motion.asf_text(root, bones), "x").topology()
    for number, row in enumerate(rows):
        place, turn = motion.asf_root(root, row)
        shape = np.stack([expected[joint][number] for joint in layout.joints]) - place
        # at rest first, then as the frame says
        close(turned.frames[number, 0], place + (turn * rest * turn.inv()).apply(shape))
    assert "turned by the orientation in 07/07.asf" in turned.notes[0] and not plain.notes


def test_the_same_motion_as_a_biovision_hierarchy(tmp_path, motion):
    root, bones, rows = motion.random_asf(3, count=12, frames=6)
    # a joint that turns where each bone begins, and one that does not where it ends
    joints = [SimpleNamespace(name="root", parent=-1, offset=[0.0] * 3, channels=[])]
    places = {"root": 0}
    for bone in bones:
        places[bone.name] = len(joints) + 1
        turning = ["Yrotation", "Zrotation", "Xrotation"]
        joints.append(SimpleNamespace(name=f"{bone.name} begins", parent=places[bone.parent], offset=[0.0] * 3, channels=turning))
        offset = (np.array(bone.direction) * bone.length).tolist()
        joints.append(SimpleNamespace(name=bone.name, parent=len(joints) - 1, offset=offset, channels=[]))
    joints[0].channels = ["Xposition", "Yposition", "Zposition", "Xrotation", "Yrotation", "Zrotation"]
    numbers = []
    for row in rows:
        place, turn = motion.asf_root(root, row)
        numbers.append([*place, *turn.as_euler("XYZ", degrees=True)])
        for turn in motion.asf_turns(bones, row).values():
            numbers[-1] += turn.as_euler("YZX", degrees=True).tolist()
    layout = read_skeleton(motion.asf_text(root, bones), "x").topology()
    options = BvhOptions(topology=motion.layout_file(tmp_path, layout.joints))
    found = read_bvh(motion.bvh_text(joints, np.array(numbers)), "x.bvh", options)
    close(found.frames, clip(motion.asf_text(root, bones), motion.amc_text(rows)).frames)


def test_bones_in_another_order_and_frames_from_another_number():
    lines = WALK.replace("\n1\n", "\n8\n").replace("\n2\n", "\n9\n").splitlines()
    lines[4:7], lines[8:11] = lines[6:3:-1], [lines[9], lines[8], lines[10]]
    np.testing.assert_array_equal(clip(LEG, "\n".join(lines)).frames, clip(LEG, WALK).frames)


def test_frame_rates():
    rows = "".join(f"{n}\nroot {n} 0 0 0 0 0\nthigh 0 0 0\nshin 0\n" for n in range(1, 11))
    kept = {rate: clip(LEG, rows, AmcOptions(scale=1.0, frames_per_second=rate)).frames[:, 0, 0, 0] for rate in (120, 40, 30)}
    assert {rate: x.tolist() for rate, x in kept.items()} == {120: list(range(1, 11)), 40: [1, 4, 7, 10], 30: [1, 5, 9]}
    options = AmcOptions(scale=1.0, frames_per_second=30, recorded_at=60)
    assert clip(LEG, rows, options).frames[:, 0, 0, 0].tolist() == [1, 3, 5, 7, 9]
    # what the file says counts
    assert len(clip(LEG, ":SAMPLES-PER-SECOND 30\n:ASF-FILE x.asf\n" + rows, options).frames) == 10
    with pytest.raises(ValueError, match="of a whole multiple of 50 frames per second, got 120, in 07/07_01.amc"):
        clip(LEG, rows, AmcOptions(frames_per_second=50))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\n\n \t "),
        lambda text: text.replace(" ", "\t"),
        lambda text: text.replace("begin\n", "BEGIN\n").replace("axis", "Axis").replace(":units", ":UNITS").replace("XYZ", "xyz"),
        lambda text: text.replace("0 -1 0", "(0, -1.0, 0)").replace("length 4", "length 4 # long"),
        lambda text: text.replace("     id 1\n", "").replace("  mass 1.0\n", "").replace("limits", "bodymass 3\n limits"),
        lambda text: text.replace("rx ry rz", "RX RY RZ").replace("deg", "DEGREES"),
        lambda text: text.replace(":hierarchy", ":skin shape.obj\n:hierarchy"),
        lambda text: "\ufeff" + text,
    ],
    ids=["blank", "tabs", "case", "punctuation", "optional", "upper", "skin", "bom"],
)
def test_skeletons_in_the_wild(change):
    text = change(LEG)
    assert text != LEG
    np.testing.assert_array_equal(clip(text, WALK).frames, clip(LEG, WALK).frames)


def cut(text):
    return LEG.replace(text, "", 1)


BAD_SKELETONS = {
    "empty": ("", "a skeleton with a section :units, got none"),
    "other": ("HIERARCHY\n" + LEG, "begins with a section such as :version, got 'HIERARCHY' in line 1"),
    "no root": (cut(LEG[LEG.index(":root") : LEG.index(":bone")]), "with a section :root, got none"),
    "no bones": (cut(LEG[LEG.index(":bonedata") : LEG.index(":hier")]), "with a section :bonedata, got none"),
    "no hierarchy": (LEG[: LEG.index(":hierarchy")], "with a section :hierarchy, got none"),
    "twice": (LEG + ":units\n", "with each section once, got :units in line 41"),
    "angle": (LEG.replace("angle deg", "angle grad"), "angle deg or rad, got 0.45 and grad in line 7"),
    "no angle": (cut("  angle deg\n"), "with an entry angle, got none in line 5"),
    "length": (LEG.replace("length 0.45", "length 0"), "units of length above 0 .*got 0 and deg"),
    "length text": (LEG.replace("length 0.45", "length inch"), "made of numbers, got .*inch.* in line 6"),
    "no order": (cut("   order TX TY TZ RX RY RZ\n"), "with an entry order, got none in line 11"),
    "order": (LEG.replace("TX TY TZ RX RY RZ", "TX TX TZ RX RY RZ"), "degrees of freedom .*each once, got TX TX .*line 11"),
    "order word": (LEG.replace("TX TY TZ RX RY RZ", "TX TY TZ R"), "degrees of freedom .*got TX TY TZ R in line 11"),
    "position": (LEG.replace("position 0 0 0", "position 0 0"), "with 3 finite numbers as position, got 0 0 in line 13"),
    "orientation": (LEG.replace("orientation 0 0 0", "orientation 0 nan 0"), "as orientation, got 0 nan 0 in line 14"),
    "root axis": (LEG.replace("axis XYZ", "axis XYX").replace("tion 0 0 0", "tion 9 0 0"), "order of axes.*XYX in line 12"),
    "outside": (LEG.replace(":bonedata\n", ":bonedata\nname x\n"), "bones between begin and end, got 'name' in line 16"),
    "begin twice": (LEG.replace("  begin\n", "  begin\nbegin\n", 1), "begin and end in turn, got 'begin' in line 17"),
    "end missing": (cut("  end\n"), "begin and end in turn, got 'begin' in line 26"),
    "last end missing": (LEG.replace("170.0)\n  end\n", "170.0)\n"), "with an end to each bone, got none to the last"),
    "no name": (cut("     name shin\n"), "with an entry name, got none in line 34"),
    "name twice": (LEG.replace("name shin", "name thigh"), "bones with a name of their own .*got thigh in line 29"),
    "name root": (LEG.replace("name shin", "name root"), "bones with a name of their own .*got root in line 29"),
    "no direction": (cut("     direction 0 -1 0\n"), "with an entry direction, got none in line 18"),
    "direction": (LEG.replace("direction 0 -1 0", "direction 0 -1"), "3 finite numbers as direction, got 0 -1 in line 19"),
    "direction text": (LEG.replace("direction 0 -1 0", "direction 0 x 0"), "made of numbers, got .*'x' in line 19"),
    "no length": (cut("     length 4\n"), "with an entry length, got none in line 18"),
    "length inf": (LEG.replace("length 4", "length inf"), "1 finite numbers as length, got inf in line 20"),
    "no axis": (cut("     axis 0 0 0 XYZ\n"), "with an entry axis, got none in line 18"),
    "axis order": (LEG.replace("0 0 0 XYZ", "0 0 0 XY"), "order of axes such as XYZ, got 0 0 0 XY in line 21"),
    "axis short": (LEG.replace("0 0 0 XYZ", "0 0 XYZ"), "made of numbers, got .*XYZ.* in line 21"),
    "entry twice": (LEG.replace("    dof rx\n", "    dof rx\n    dof rx\n"), "with each entry once, got dof in line 34"),
    "dof move": (LEG.replace("dof rx\n", "dof tx\n"), "degrees of freedom .*got tx in line 33"),
    "dof length": (LEG.replace("dof rx\n", "dof rx l\n"), "degrees of freedom .*got rx l in line 33"),
    "dof twice": (LEG.replace("dof rx\n", "dof rx rx\n"), "degrees of freedom .*got rx rx in line 33"),
    "lost": (cut("    thigh shin\n"), "hierarchy of all bones, from the root on, got 'shin' apart from it"),
    "two parents": (LEG.replace("root thigh", "root thigh shin"), "each under one parent, got 'shin' twice in line 39"),
    "unknown child": (LEG.replace("thigh shin", "thigh foot"), "each under one parent, got 'foot' without data in line 39"),
    "unknown parent": (LEG.replace("thigh shin", "foot shin"), "hierarchy of root and bones, got 'foot' in line 39"),
    "root below": (LEG.replace("thigh shin", "thigh shin root"), "each under one parent, got 'root' without data in line 39"),
    "cycle": (LEG.replace("root thigh", "shin thigh"), "hierarchy of all bones, from the root on, got 'thigh' apart from it"),
    "nothing moves": (
        cut("    dof rx\n").replace("    dof rx ry rz\n", "").replace("order TX TY TZ RX RY RZ", "order"),
        "with a degree of freedom, of the root or of a bone, got none",
    ),
    "no begin": (LEG.replace("hierarchy\n  begin\n", "hierarchy\n"), "between begin and end, got root thigh in line 37"),
}


@pytest.mark.parametrize("case", BAD_SKELETONS)
def test_bad_skeletons(case):
    text, message = BAD_SKELETONS[case]
    with pytest.raises(ValueError, match=rf"^pack_source: file must be .*{message}.*, in 07/07.asf\. ") as caught:
        read_skeletons({"07/07.asf": text.encode()})
    assert "\n" not in str(caught.value)


def test_skeletons_that_are_too_large(motion):
    with pytest.raises(ValueError, match="a skeleton of at most 4 MiB, got 4194305 bytes, in x.asf"):
        read_skeleton(b":" * ((4 << 20) + 1), "x.asf")
    bone = "begin\nname b{}\ndirection 0 1 0\nlength 1\naxis 0 0 0 XYZ\nend\n"
    head = LEG[: LEG.index("  begin\n")]

    def chain(count):
        bones = "".join(bone.format(number) for number in range(count))
        links = "".join(f"b{number} b{number + 1}\n" for number in range(count - 1))
        return (head + bones + ":hierarchy\nbegin\nroot b0\n" + links + "end\n").encode()

    # deeper than Python recurses
    motion_text = "1\nroot 0 0 0 0 0 0\n"
    assert clip(chain(MAX_JOINTS - 1), motion_text).frames[0, 0, -1].tolist() == [0, MAX_JOINTS - 1, 0]
    with pytest.raises(ValueError, match="of less than 1024 bones, got one more in line"):
        read_skeleton(chain(MAX_JOINTS), "x.asf")
    rows = "".join(f"{number}\nroot 0 0 0 0 0 0\n" for number in range(30_000))
    with pytest.raises(ValueError, match="of at most 67108864 coordinates, got 30000 frames of 1024 joints"):
        clip(chain(MAX_JOINTS - 1), rows)


BAD_MOTIONS = {
    "empty": ("", "at least one frame, got none"),
    "head only": (":FULLY-SPECIFIED\n:DEGREES\n", "at least one frame, got none"),
    "head": (WALK.replace(":DEGREES", ":GRADS"), "with :FULLY-SPECIFIED, :DEGREES or :RADIANS before .*:GRADS.* in line 3"),
    "head inside": (WALK.replace("2\n", ":DEGREES\n2\n"), "before its first frame.*:DEGREES.* in line 8"),
    "rate": (":SAMPLES-PER-SECOND 0\n" + WALK, "of samples per second above 0, got 0.0 in line 1"),
    "no number": (WALK.replace("\n1\n", "\n"), "of frames, each after its number, got 'root' in line 4"),
    "numbers": (WALK.replace("\n2\n", "\n3\n"), "of frames in a row, got frame 3 after 1 in line 8"),
    "number long": (WALK.replace("\n1\n", "\n" + "9" * 5000 + "\n"), "of frames in a row, got frame 9{20} after None in line 4"),
    "bone missing": (WALK.replace("shin 90\n", ""), "every bone in every frame, got none of 'shin' in frame 1 in line 7"),
    "cut": (WALK[: WALK.rindex("thigh")], "every bone in every frame, got none of 'shin' in frame 2 in line 9"),
    "frame empty": (WALK + "3\n", "every bone in every frame, got none of 'root' in frame 3 in line 12"),
    "bone twice": (WALK.replace("shin 90", "shin 90\nshin 90"), "each bone once in a frame, .*got 'shin' .* in line 8"),
    "bone unknown": (WALK.replace("shin 90", "foot 90"), "root and the bones with dof in 07/07.asf, got 'foot' in line 7"),
    "short": (WALK.replace("thigh 0 0 0", "thigh 0 0"), "as it has dof, got 'thigh' with 2 of 3 in frame 1 in line 6"),
    "long": (WALK.replace("shin 90", "shin 90 0"), "as many numbers as it has dof, got 'shin' with 2 of 1 in frame 1 in line 7"),
    "shifted": (WALK.replace("thigh 0 0 0\nshin 90", "thigh 0 0\nshin 90 0"), "got 'thigh' with 2 of 3 in frame 1 in line 6"),
    "text": (WALK.replace("shin 90", "shin x"), "made of numbers, got .*'x' in line 7"),
    "underscore": (WALK.replace("shin 90", "shin 9_0"), "made of numbers, got an underscore in line 7"),
    "nan": (WALK.replace("shin 90", "shin nan"), "finite numbers, got NaN or infinity in frame 0"),
    "far": (WALK.replace("root 1 9", "root 1e39 9"), "finite numbers, got NaN or infinity in frame 0"),
    "binary": (WALK + "\udcff\udcfe 1\n", "root and the bones with dof in 07/07.asf, got .* in line 12"),
}


@pytest.mark.parametrize("case", BAD_MOTIONS)
def test_bad_motions(case):
    text, message = BAD_MOTIONS[case]
    with pytest.raises(ValueError, match=rf"^pack_source: file must be .*{message}.*, in 07/07_01.amc\. ") as caught:
        clip(LEG, text.encode("utf-8", "surrogateescape"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("motion_path", "skeletons", "found"),
    [
        ("07/07_01.amc", ["07/07.asf", "08/08.asf"], "07/07.asf"),
        ("07_01.amc", ["07.asf", "08.asf"], "07.asf"),
        ("s/walk.amc", ["s/any.asf", "t/walk.asf"], "s/any.asf"),
        ("s/walk.amc", ["s/any.asf", "s/walk.asf"], "s/walk.asf"),
        ("HDM_bd_01-01_01_120.amc", ["HDM_bd.asf", "HDM.asf", "HDM_bk.asf"], "HDM_bd.asf"),
        ("amc/07_01.amc", ["asf/07.asf", "asf/08.asf"], "asf/07.asf"),
        ("07/07_01.amc", ["07/07.ASF", "07/0.asf"], "07/07.ASF"),
        ("07/071_01.amc", ["07/07.asf", "07/08.asf"], None),
        ("07/07_01.amc", ["a/07.asf", "b/07.asf"], None),
        ("07/07_01.amc", ["08/08.asf"], None),
        ("07/07_01.amc", [], None),
    ],
)
def test_which_skeleton(motion_path, skeletons, found):
    lengths = {path: LEG.replace("length 4", f"length {4 + number}") for number, path in enumerate(skeletons)}
    read_them = read_skeletons({path: text.encode() for path, text in lengths.items()})
    if found is None:
        with pytest.raises(ValueError, match=rf"beside one .asf skeleton .*, in {motion_path}\. Put the skeleton beside it"):
            read(WALK.encode(), motion_path, PLAIN, read_them)
        return
    assert read(WALK.encode(), motion_path, PLAIN, read_them).frames[0, 0, 1, 1] == 9 - 4 - skeletons.index(found)


def write(folder, texts):
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_packed(tmp_path, capsys, motion):
    longer = LEG.replace("length 4", "length 6")
    texts = {"07/07.asf": LEG, "07/07_01.amc": WALK, "08/08.asf": longer, "08/08_02.amc": WALK}
    source = write(tmp_path / "src", {f"subjects/{name}": text for name, text in texts.items()})
    (tmp_path / "labels.csv").write_text("07_01,walk\n08_02,run\n")
    options = ["--labels", str(tmp_path / "labels.csv"), "--columns", r"(?P<subject>\d+)_(?P<trial>\d+)"]
    assert main(["pack", "amc", str(source), str(tmp_path / "out"), "--quiet", *options]) in (0, None)
    assert "packed 2 clips, 4 frames, 1 bodies" in capsys.readouterr().out
    dataset = open_dataset(tmp_path / "out", verify=True)
    assert dataset.names.tolist() == ["07_01", "08_02"] and dataset.class_names == ["run", "walk"]
    assert dataset.labels.tolist() == [1, 0] and dataset.columns["subject"].tolist() == ["07", "08"]
    assert (dataset.meta["units"], dataset.meta["up_axis"], dataset.meta["channels"]) == ("metres", "y", ["x", "y", "z"])
    assert dataset.topology.joints == ("root", "thigh", "shin")
    thighs = [dataset.clip(number)[0, 0, 0, 1] - dataset.clip(number)[0, 0, 1, 1] for number in range(2)]
    np.testing.assert_allclose(thighs, np.array([4, 6]) * 0.0254 / 0.45, rtol=1e-6)
    archive = shutil.make_archive(str(tmp_path / "all"), "gztar", source)
    pack_source("amc", archive, tmp_path / "archived", progress=False)
    np.testing.assert_array_equal(open_dataset(tmp_path / "archived").frames, dataset.frames)
    # a skeleton of other bones
    write(source, {"subjects/08/08.asf": LEG.replace("shin", "calf"), "subjects/08/08_02.amc": WALK.replace("shin", "calf")})
    with pytest.raises(ValueError, match=r"3 joints of the first file .*got joint 2 'calf' on 'thigh', not 'shin' .*08_02\.amc"):
        pack_source("amc", source, tmp_path / "other", progress=False)
    options = {"topology": motion.layout_file(tmp_path, ["thigh", "root"])}
    pack_source("amc", source, tmp_path / "picked", options=options, progress=False)
    assert open_dataset(tmp_path / "picked").topology.joints == ("thigh", "root")


def test_a_long_file_takes_little_memory():
    frame = "root -1.23456 17.1234 -30.1234 1.12345 -2.12345 3.12345\nthigh 12.1234 -3.12345 1.12345\nshin 22.1234\n"
    data = "".join(f"{number}\n{frame}" for number in range(5_000)).encode()
    skeletons = read_skeletons({"07.asf": LEG.encode()})
    tracemalloc.start()
    try:
        assert read(data, "07_01.amc", PLAIN, skeletons).frames.shape == (5_000, 1, 3, 3)
        assert tracemalloc.get_traced_memory()[1] < 8 * len(data)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": -1}, "option scale must be a finite number above 0, got -1"),
        ({"recorded_at": 0}, "option recorded_at must be a finite number above 0, got 0"),
        ({"up_axis": "up"}, "option up_axis must be"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        AmcOptions(**changes)
