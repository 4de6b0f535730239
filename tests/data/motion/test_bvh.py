"""Biovision hierarchies: positions as SciPy has them, every text in the wild, and each malformed file by its message."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from fastskel.cli import main
from fastskel.data.formats.bvh import BvhOptions, layout_of, read
from fastskel.data.formats.motion_capture import MAX_JOINTS
from fastskel.data.pack import pack_source
from fastskel.data.packed import open_dataset

# float32 of positions, beside sums of products along a hierarchy in float64
RELATIVE = 1e-6
SMALL = """HIERARCHY
ROOT Hips
{
	OFFSET 0 0 0
	CHANNELS 6 Xposition Yposition Zposition Zrotation Xrotation Yrotation
	JOINT LeftUpLeg
	{
		OFFSET 0 1 0
		CHANNELS 3 Zrotation Yrotation Xrotation
		End Site
		{
			OFFSET 0 2 0
		}
	}
	JOINT RightUpLeg
	{
		OFFSET 1 0 0
		CHANNELS 0
	}
}
MOTION
Frames: 2
Frame Time: 0.0333333
1 2 3 0 0 0 0 0 0
1 2 3 90 90 0 0 0 90
"""
ENDS = BvhOptions(end_sites=True)


def close(found, expected):
    assert found.shape == expected.shape and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=RELATIVE * np.abs(expected).max())


def test_by_hand():
    clip = read(SMALL.encode(), "a/walk.bvh", ENDS)
    at_rest = [[1, 2, 3], [1, 3, 3], [1, 5, 3], [2, 2, 3]]
    # Zrotation Xrotation: x first, which lifts y to z, where the turn about z does not reach it; x stays x and becomes y
    turned = [[1, 2, 3], [1, 2, 4], [3, 2, 4], [1, 3, 3]]
    np.testing.assert_allclose(clip.frames[:, 0], [at_rest, turned], atol=1e-6)
    assert (clip.name, clip.label, clip.class_name, dict(clip.columns)) == ("walk", -1, None, {"frame_microseconds": 33333})
    layout = layout_of(SMALL.encode(), "a/walk.bvh", ENDS)
    assert layout.joints == ("Hips", "LeftUpLeg", "LeftUpLeg_end", "RightUpLeg") and layout.parents() == (0, 0, 1, 0)
    without = read(SMALL.encode(), "a/walk.bvh")
    np.testing.assert_array_equal(without.frames, clip.frames[:, :, [0, 1, 3]])


@pytest.mark.parametrize("seed", range(12))
def test_random_hierarchies(seed, motion):
    joints, numbers = motion.random_bvh(seed, count=2 + 3 * seed, deep=seed == 3)
    text = motion.bvh_text(joints, numbers, newline="\r\n" if seed % 2 else "\n")
    layout = layout_of(text, "x.bvh")
    order = motion.depth_first([joint.parent for joint in joints])
    assert layout.joints == tuple(joints[number].name for number in order)
    assert layout.parents() == tuple(order.index(max(joints[number].parent, 0)) for number in order)
    close(read(text, "x.bvh").frames[:, 0], motion.bvh_positions(joints, numbers)[:, order])


def test_a_long_chain_and_many_blocks(motion):
    # more joints than Python recurses, and more frames than one block has room for
    joints, numbers = motion.random_bvh(0, count=MAX_JOINTS - 1, deep=True, frames=600)
    for joint in joints:
        joint.offset = [0.0, 0.0, 0.0]
    joints[1].offset, joints[1].channels = [0.0, 1.0, 0.0], ["Zrotation"]
    numbers = np.zeros((600, sum(len(joint.channels) for joint in joints)))
    numbers[:, 1] = np.arange(600)
    frames = read(motion.bvh_text(joints, numbers), "x.bvh").frames[:, 0]
    angles = np.deg2rad(np.arange(600))
    expected = np.stack([-np.sin(angles), np.cos(angles), np.zeros(600)], axis=1)
    for joint in (1, 2, MAX_JOINTS - 2):
        close(frames[:, joint], expected)
    with pytest.raises(ValueError, match=r"of at most 1024 joints, got one more in line \d+, in x.bvh"):
        read(nested(100_000), "x.bvh")


def nested(depth):
    begin = "JOINT j{}\n{{\nOFFSET 0 0 0\nCHANNELS 0\n"
    return ("HIERARCHY\n" + "".join(begin.format(n) for n in range(depth)) + "}\n" * depth).replace("JOINT", "ROOT", 1).encode()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\n\n \t\n"),
        lambda text: text.replace("\t", "   ").replace(" ", "\t \t"),
        lambda text: text.lower().replace("hips", "Hips").replace("leftupleg", "LeftUpLeg").replace("rightupleg", "RightUpLeg"),
        lambda text: text.replace("position", "POSITION").replace("rotation", "Rotation").replace("End Site", "END SITE"),
        lambda text: text.replace("\n{\n", " {\n"),
        lambda text: text.replace("Hips\n{\n\t", "Hips{ ").replace("2 0\n\t\t}", "2 0}").replace("0\n\t\tCH", "0 CH"),
        lambda text: text.replace("Frames: 2", "Frames:2").replace("Time: ", "Time:"),
        lambda text: text.replace("Frames: 2", "FRAMES : 2").replace("Frame Time: ", "FRAME TIME :\t"),
        lambda text: text.replace("1 2 3", "+1.0e0 2. 03.000"),
        lambda text: "\ufeff" + text,
        lambda text: text.rstrip(),
        lambda text: text.replace("End Site", "End Site toes"),
    ],
    ids=["crlf", "blank", "tabs", "lower", "upper", "brace", "line", "colon", "spaced", "number", "bom", "no-newline", "site"],
)
def test_texts_in_the_wild(change):
    expected = read(SMALL.encode(), "x.bvh", ENDS)
    text = change(SMALL)
    assert text != SMALL
    np.testing.assert_array_equal(read(text.encode(), "x.bvh", ENDS).frames, expected.frames)
    assert layout_of(text.encode(), "x.bvh", ENDS) == layout_of(SMALL.encode(), "x.bvh", ENDS)


def without(line):
    return SMALL.replace(line, "", 1)


BAD = {
    "empty": ("", "begins with HIERARCHY, got b'' in line 1"),
    "other": ("BVH\n" + SMALL, "begins with HIERARCHY, got b'BVH' in line 1"),
    "binary": ("HIERARCHY\n\udcff\udcfe", r"text in UTF-8, got other bytes \(invalid start byte\) in line 2"),
    "only hierarchy": (SMALL[: SMALL.index("MOTION")], "with MOTION after the hierarchy, got its end"),
    "no root": (SMALL.replace("ROOT", "JOINT"), "one ROOT with all joints inside of it, got JOINT Hips in line 2"),
    "two roots": (SMALL.replace("MOTION", "ROOT b\n{\nOFFSET 0 0 0\n}\nMOTION"), "one ROOT .*got ROOT b in line 21"),
    "nothing": ("HIERARCHY\nMOTION\n", "with a ROOT whose braces are closed before MOTION, got 0 open in line 2"),
    "open": (SMALL.replace("}\nMOTION", "MOTION"), "braces are closed before MOTION, got 1 open in line 20"),
    "closed twice": (SMALL.replace("MOTION", "}\nMOTION"), "of ROOT and, inside of it, joints, got '}' in line 21"),
    "brace missing": (without("{\n"), "with { after the name of a joint and nowhere else, got 'OFFSET' in line 3"),
    "brace too many": (SMALL.replace("{\n", "{\n{\n", 1), "with { after the name .*got '{' in line 4"),
    "no name": (SMALL.replace("JOINT LeftUpLeg", "JOINT"), "with names of joints of at most 100 characters, got '' in line 6"),
    "long name": (SMALL.replace("LeftUpLeg", "L" * 9999), "names of joints of at most 100 characters, got 'L{159} in line 6"),
    "offset missing": (without("\t\tOFFSET 0 1 0\n"), "with an OFFSET of 'LeftUpLeg', got its end in line 13"),
    "offset twice": (SMALL.replace("\tOFFSET 0 0 0", "\tOFFSET 0 0 0\nOFFSET 0 0 0"), "OFFSET once.*got 'OFFSET' in line 5"),
    "offset short": (SMALL.replace("OFFSET 0 1 0", "OFFSET 0 1"), "three finite numbers as OFFSET, got 0 1 in line 8"),
    "offset text": (SMALL.replace("OFFSET 0 1 0", "OFFSET 0 y 0"), "made of numbers, got .*'y' in line 8"),
    "offset nan": (SMALL.replace("OFFSET 0 1 0", "OFFSET 0 nan 0"), "three finite numbers as OFFSET, got 0 nan 0 in line 8"),
    "channel unknown": (SMALL.replace("CHANNELS 3 Zrotation", "CHANNELS 3 Wrotation"), "CHANNELS, their.*Wrotation.*line 9"),
    "channel twice": (SMALL.replace("CHANNELS 3 Zrotation", "CHANNELS 3 Xrotation"), "Xposition to Zrotation, each once.*line 9"),
    "channel missing": (SMALL.replace("CHANNELS 3", "CHANNELS 4"), "CHANNELS, their number and that many.*line 9"),
    "channel count": (SMALL.replace("CHANNELS 3", "CHANNELS 999999999"), "CHANNELS, their number.*line 9"),
    "channel more": (SMALL.replace("CHANNELS 3", "CHANNELS 2"), "of ROOT, JOINT, End Site.*got 'Xrotation' in line 9"),
    "channels twice": (SMALL.replace("CHANNELS 0", "CHANNELS 0 CHANNELS 0"), "CHANNELS once.*got 'CHANNELS' in line 18"),
    "channels of end": (SMALL.replace("0 2 0", "0 2 0\nCHANNELS 0"), "not in an End Site.*got 'CHANNELS' in line 13"),
    "joint in end": (SMALL.replace("0 2 0", "0 2 0\nJOINT x"), "without joints in an End Site, got JOINT x in line 13"),
    "end without site": (SMALL.replace("End Site", "End"), "with Site after End, got End .*line 10"),
    "unknown word": (SMALL.replace("CHANNELS 0", "CHANEL 0"), "of ROOT, JOINT, .* and MOTION, got 'CHANEL' in line 18"),
    "names": (SMALL.replace("RightUpLeg", "Hips"), "of joints with distinct names, got 'Hips' twice"),
    "no frames": (without("Frames: 2\n"), "with Frames: and a number after MOTION, got b'Frame Time: 0.0333333' in line 22"),
    "frames": (SMALL.replace("Frames: 2", "Frames: two"), "with a whole number of Frames, got b'two' in line 22"),
    "negative": (SMALL.replace("Frames: 2", "Frames: -2"), "with a whole number of Frames, got b'-2' in line 22"),
    "no time": (without("Frame Time: 0.0333333\n"), "with Frame Time: and a number after MOTION, got b'1 2 3 0"),
    "time": (SMALL.replace("0.0333333", "0"), "with a Frame Time from a microsecond to an hour, got 0.0 in line 23"),
    "time inf": (SMALL.replace("0.0333333", "inf"), "Frame Time from a microsecond to an hour, got inf in line 23"),
    "time long": (SMALL.replace("0.0333333", "1e300"), "Frame Time from a microsecond to an hour, got 1e.300 in line 23"),
    "time text": (SMALL.replace("0.0333333", "30fps"), "made of numbers, got .*30fps.* in line 23"),
    "cut after motion": (SMALL[: SMALL.index("Frames")], "with Frames: and a number after MOTION, got its end"),
    "no rows": (SMALL[: SMALL.index("1 2 3")], "2 frames, at least one, as it says, got 0"),
    "zero frames": (SMALL[: SMALL.index("1 2 3")].replace("Frames: 2", "Frames: 0"), "0 frames, at least one, as it says, got 0"),
    "rows missing": (SMALL.replace("1 2 3 0 0 0 0 0 0\n", ""), "2 frames, at least one, as it says, got 1"),
    "billion": (SMALL.replace("Frames: 2", "Frames: 1000000000"), "1000000000 frames, at least one, as it says, got 2"),
    "many digits": (SMALL.replace("Frames: 2", "Frames: " + "9" * 5000), "with a whole number of Frames"),
    "rows more": (SMALL + "1 2 3 0 0 0 0 0 0\n", "2 rows of 9 numbers after Frame Time, got row 3 of 9 in line 26"),
    "row short": (SMALL.replace("90 90 0 0 0 90", "90 90 0 0 0"), "2 rows of 9 numbers .*got row 2 of 8 in line 25"),
    "row long": (SMALL.replace("90 90 0 0 0 90", "90 90 0 0 0 9 0"), "2 rows of 9 numbers .*got row 2 of 10 in line 25"),
    "row text": (SMALL.replace("90 90 0 0 0 90", "90 90 0 0 0 x"), "made of numbers, got .*'x' in line 25"),
    "row underscore": (SMALL.replace("90 90 0 0 0 90", "90 90 0 0 0 9_0"), "made of numbers, got an underscore in line 25"),
    "row nan": (SMALL.replace("90 90 0 0 0 90", "90 90 0 0 0 nan"), "finite numbers, got NaN or infinity in frame 1"),
    "far": (SMALL.replace("1 2 3 90", "1e39 2 3 90"), "finite numbers, got NaN or infinity in frame 1"),
    "farther": (SMALL.replace("0 1 0", "0 1e308 1e308"), "finite numbers, got NaN or infinity in frame 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case):
    text, message = BAD[case]
    with pytest.raises(ValueError, match=rf"(?s)^pack_source: file must be .*{message}.*, in a/x.bvh\. ") as caught:
        read(text.encode("utf-8", "surrogateescape"), "a/x.bvh", ENDS)
    assert "\n" not in str(caught.value)


def test_numbers_that_move_nothing():
    # the turn of a joint without children
    with pytest.raises(ValueError, match="finite numbers, got NaN or infinity in frame 1"):
        read(SMALL.replace("90 90 0 0 0 90", "90 90 0 0 0 nan").encode(), "x.bvh")


def test_no_channels():
    text = SMALL.replace("CHANNELS 3 Zrotation Yrotation Xrotation", "CHANNELS 0")
    text = text.replace("CHANNELS 6 Xposition Yposition Zposition Zrotation Xrotation Yrotation", "")
    with pytest.raises(ValueError, match="with at least one channel, got none"):
        read(text.encode(), "x.bvh")


def test_a_short_file_is_not_multiplied():
    joints = "".join(f"JOINT j{n}\n{{\nOFFSET 1 0 0\n}}\n" for n in range(1000))
    head = f"HIERARCHY\nROOT r\n{{\nOFFSET 0 0 0\nCHANNELS 1 Xrotation\n{joints}}}\nMOTION\nFrames: 30000\nFrame Time: 1\n"
    data = (head + "0\n" * 30000).encode()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="of at most 67108864 coordinates, got 30000 frames of 1001 joints"):
            read(data, "x.bvh")
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_memory_of_a_long_file():
    # two megabytes of text: what is held beside it is some bytes for each number
    row = " ".join(["-123.4567"] * 9) + "\n"
    count = (2 << 20) // len(row)
    data = (SMALL[: SMALL.index("1 2 3")].replace("Frames: 2", f"Frames: {count}") + row * count).encode()
    tracemalloc.start()
    try:
        assert read(data, "x.bvh").frames.shape == (count, 1, 3, 3)
        assert tracemalloc.get_traced_memory()[1] < 8 * len(data)
    finally:
        tracemalloc.stop()


def test_position_channels_beside_an_offset():
    text = SMALL.replace("OFFSET 0 0 0", "OFFSET 5 0 7").encode()
    message = "without position channels where a joint has an offset, got 'Hips' with OFFSET 5.0 0.0 7.0 .* option positions"
    with pytest.raises(ValueError, match=message):
        read(text, "x.bvh")
    root = {choice: read(text, "x.bvh", BvhOptions(positions=choice)).frames[0, 0, 0] for choice in ("add", "replace")}
    np.testing.assert_array_equal(root["add"], [6, 2, 10])
    np.testing.assert_array_equal(root["replace"], [1, 2, 3])
    # only the axes that have a channel are replaced
    text = SMALL.replace("0 1 0\n\t\tCHANNELS 3 Zrotation", "4 1 8\n\t\tCHANNELS 3 Xposition").encode()
    assert read(text, "x.bvh", BvhOptions(positions="replace")).frames[0, 0, 1].tolist() == [1, 3, 11]


def test_frame_rates(motion):
    joints, numbers = motion.random_bvh(1, frames=11)
    # 1 / 0.0083333 is 120.0005
    text = motion.bvh_text(joints, numbers)
    every = read(text, "x.bvh")
    for rate, step in ((120, 1), (60, 2), (30, 4), (120 / 7, 7)):
        clip = read(text, "x.bvh", BvhOptions(frames_per_second=rate))
        np.testing.assert_array_equal(clip.frames, every.frames[::step])
        assert clip.columns["frame_microseconds"] == pytest.approx(step * 8333.3, abs=0.5)
    for rate in (50, 240, 100, 119, 1e-300):
        with pytest.raises(ValueError, match=f"of a whole multiple of {rate} frames per second, got 120"):
            read(text, "x.bvh", BvhOptions(frames_per_second=rate))
    # damage is damage in a frame that is left out, and goes by its number in the file
    numbers[7, 0] = np.nan
    with pytest.raises(ValueError, match="finite numbers, got NaN or infinity in frame 7,"):
        read(motion.bvh_text(joints, numbers), "x.bvh", BvhOptions(frames_per_second=60))
    numbers[7, 0] = 0
    text = motion.bvh_text(joints, numbers, frame_time="0.0333")
    assert len(read(text, "x.bvh", BvhOptions(frames_per_second=30)).frames) == 11


def test_scale():
    every = read(SMALL.encode(), "x.bvh")
    np.testing.assert_allclose(read(SMALL.encode(), "x.bvh", BvhOptions(scale=0.01)).frames, every.frames * 0.01, rtol=1e-6)


def source(folder, **texts):
    for name, text in texts.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".bvh").write_text(text)
    return folder


def test_packed(tmp_path, capsys):
    folder = source(tmp_path / "src", walk__s01_t1=SMALL, walk__s02_t1=SMALL, run__s01_t2=SMALL.replace("1 2 3", "3 2 1"))
    options = ["--labels", "folder", "--columns", r"(?P<subject>s\d+)_t(?P<trial>\d)", "--units", "centimetres", "--up-axis", "z"]
    assert main(["pack", "bvh", str(folder), str(tmp_path / "out"), "--quiet", *options]) in (0, None)
    assert "packed 3 clips, 6 frames, 1 bodies" in capsys.readouterr().out
    dataset = open_dataset(tmp_path / "out", verify=True)
    assert dataset.names.tolist() == ["s01_t1", "s01_t2", "s02_t1"] and dataset.class_names == ["run", "walk"]
    assert dataset.labels.tolist() == [1, 0, 1] and dataset.columns["subject"].tolist() == ["s01", "s01", "s02"]
    assert dataset.columns["trial"].tolist() == ["1", "2", "1"] and dataset.columns["frame_microseconds"].tolist() == [33333] * 3
    assert (dataset.meta["units"], dataset.meta["up_axis"], dataset.meta["channels"]) == ("centimetres", "z", ["x", "y", "z"])
    assert dataset.topology == layout_of(SMALL.encode(), "x") and dataset.topology.joints == ("Hips", "LeftUpLeg", "RightUpLeg")
    np.testing.assert_array_equal(dataset.clip(1), read(SMALL.replace("1 2 3", "3 2 1").encode(), "x").frames)


def test_files_of_other_joints(tmp_path, motion):
    other = SMALL.replace("RightUpLeg", "Tail")
    folder = source(tmp_path / "src", a=SMALL, b=other)
    message = r"of the 3 joints of the first .*got joint 2 'Tail' on 'Hips', not 'RightUpLeg' on 'Hips', in .*b\.bvh"
    with pytest.raises(ValueError, match=message):
        pack_source("bvh", folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    # the same names, but hung up otherwise
    moved = SMALL.replace("\t\tEnd Site\n\t\t{\n\t\t\tOFFSET 0 2 0\n\t\t}\n\t}\n", "").replace("MOTION", "}\nMOTION")
    with pytest.raises(ValueError, match="joint 2 'RightUpLeg' on 'LeftUpLeg', not 'RightUpLeg' on 'Hips'"):
        pack_source("bvh", source(tmp_path / "moved", a=SMALL, b=moved), tmp_path / "out", progress=False)
    fewer = SMALL.replace("\tJOINT RightUpLeg\n\t{\n\t\tOFFSET 1 0 0\n\t\tCHANNELS 0\n\t}\n", "")
    with pytest.raises(ValueError, match="of the 3 joints of the first file .*got 2 joints, in .*b.bvh"):
        pack_source("bvh", source(tmp_path / "fewer", a=SMALL, b=fewer), tmp_path / "out", progress=False)
    # joints that all have, in an order of one's own
    options = {"topology": motion.layout_file(tmp_path, ["LeftUpLeg_end", "Hips"]), "end_sites": True}
    pack_source("bvh", folder, tmp_path / "out", options=options, progress=False)
    dataset = open_dataset(tmp_path / "out")
    assert dataset.topology.joints == ("LeftUpLeg_end", "Hips") and dataset.topology.name == "picked"
    np.testing.assert_array_equal(dataset.clip(1), read(SMALL.encode(), "x", ENDS).frames[:, :, [2, 0]])
    options["end_sites"] = False
    message = "with every joint of picked, got no 'LeftUpLeg_end' among Hips, LeftUpLeg, RightUpLeg, .*keep end_sites"
    with pytest.raises(ValueError, match=message):
        pack_source("bvh", folder, tmp_path / "other", options=options, progress=False)


def test_two_end_sites_of_one_joint():
    site = "\t\tEnd Site\n\t\t{\n\t\t\tOFFSET 0 2 0\n\t\t}\n"
    text = SMALL.replace(site, site + site.replace("0 2 0", "0 3 0")).encode()
    assert layout_of(text, "x", ENDS).joints == ("Hips", "LeftUpLeg", "LeftUpLeg_end", "LeftUpLeg_end2", "RightUpLeg")
    assert read(text, "x", ENDS).frames[0, 0, 3].tolist() == [1, 6, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0}, "option scale must be a finite number above 0, got 0"),
        ({"scale": float("nan")}, "option scale must be a finite number above 0, got nan"),
        ({"positions": "both"}, "option positions must be refuse, add, replace, got 'both'"),
        ({"frames_per_second": -1}, "option frames_per_second must be a finite number above 0, got -1"),
        ({"units": ""}, "option units must be a word"),
        ({"up_axis": "w"}, "option up_axis must be x, y, z"),
        ({"columns": "("}, "option columns must be a regular expression, got .*unterminated"),
        ({"columns": "(?P<label>.)", "labels": "folder"}, "option columns must be without a group label beside labels"),
        ({"columns": "(?P<_a>.)"}, "pack_source: .*_a"),
        ({"columns": "(?P<names>.)"}, "pack_source: .*names"),
        ({"labels": "/nowhere.csv"}, "option labels must be none, folder or a readable CSV file"),
        ({"topology": "no-such"}, "option topology must be one of .*got 'no-such'"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        BvhOptions(**changes)


def test_names_of_files():
    options = BvhOptions(columns=r"^(?P<subject>\d+)_(?P<label>[a-z]*)(?P<take>\d+)?")
    clip = read(SMALL.encode(), "5_x/01_walk.bvh", options)
    assert dict(clip.columns) == {"frame_microseconds": 33333, "subject": "01", "take": ""} and clip.class_name == "walk"
    with pytest.raises(ValueError, match=r"named as the option columns says .*got 'walk.bvh', in 5_x/walk.bvh"):
        read(SMALL.encode(), "5_x/walk.bvh", options)
    with pytest.raises(ValueError, match=r"named with a label .*got '01_.bvh'"):
        read(SMALL.encode(), "01_.bvh", options)
    options = replace(options, columns="(?P<frame_microseconds>.)")
    with pytest.raises(ValueError, match="option columns must be without the groups frame_microseconds"):
        pack_source("bvh", ".", "/nowhere/out", options={"columns": options.columns}, progress=False)
