"""The reader of NTU RGB+D: bodies over time, options, what is skipped, protocols."""

import itertools
import pickle

import numpy as np
import pytest

from fastskel import _native
from fastskel.cli import main
from fastskel.data import pack
from fastskel.data.formats import FORMATS, SkipFile
from fastskel.data.formats.ntu import CLASSES, NtuOptions, read
from fastskel.data.formats.ntu_bodies import Body, bodies_over_time, chosen_bodies, is_noise, placed
from fastskel.data.packed import open_dataset
from fastskel.data.protocols import protocols, split

NAME = "S001C002P003R002A050"
EXCERPT = "EXCERPT_1frame_noisybody_S001C002P005R002A008"
GENUINE = (EXCERPT, "S001C001P001R001A011", "S001C003P008R002A058", "S002C001P003R001A003")


def row(values):
    return " ".join(str(float(value)) for value in values)


def text(frames):
    """File of frames, each a list of (number of a body, its joints (V, 3))."""
    lines = [str(len(frames))]
    for bodies in frames:
        lines.append(str(len(bodies)))
        for number, joints in bodies:
            lines += [f"{number} 0 1 1 1 1 0 -0.25 0.5 2", str(len(joints))]
            lines += [f"{row(joint)} 276.1 190.25 1032.5 514 -0.17 0.04 0.97 -0.15 2" for joint in joints]
    return ("\n".join(lines) + "\n").encode()


def pose(seed, scale=1.0, joints=25):
    return (np.random.default_rng(seed).normal(size=(joints, 3)) * scale).astype(np.float32)


def moving(number, frames, scale=1.0):
    """One body: frame -> joints."""
    return {frame: pose(1000 * number + frame, scale) for frame in frames}


def recording(bodies, num_frames, slots=None):
    """Frames of bodies (number -> frame -> joints), in the order of slots(frame, present numbers)."""
    frames = []
    for frame in range(num_frames):
        present = [number for number, joints in bodies.items() if frame in joints]
        order = present if slots is None else slots(frame, present)
        frames.append([(number, bodies[number][frame]) for number in order])
    return frames


def filled(body, num_frames):
    joints = np.zeros((num_frames, 25, 3), np.float32)
    for frame, values in body.items():
        joints[frame] = values
    return joints


def pack_files(tmp_path, files, **options):
    source = tmp_path / "src"
    source.mkdir()
    for file, data in files.items():
        (source / f"{file}.skeleton").write_bytes(data)
    return pack.pack_source("ntu60", source, tmp_path / "out", options=options, progress=False)


SOUND = text([[(1, pose(0))]])


def test_genuine_files_are_packed(data_dir, tmp_path):
    files = {}
    for name in GENUINE:
        files[name.split("_")[-1]] = (data_dir / "ntu_raw" / f"{name}.skeleton").read_bytes()
    summary = pack_files(tmp_path, files)
    dataset = open_dataset(tmp_path / "out", verify=True)
    assert (summary.clips, summary.frames, summary.bodies) == (4, 253, 2) and summary.skipped == ()
    assert dataset.names.tolist() == sorted(files)
    assert dataset.labels.tolist() == [10, 7, 57, 2] and dataset.num_bodies.tolist() == [1, 2, 2, 1]
    assert {name: values.tolist() for name, values in dataset.columns.items()} == {
        "setup": [1, 1, 1, 2],
        "camera": [1, 2, 3, 1],
        "subject": [1, 5, 8, 3],
        "replication": [1, 2, 2, 1],
    }
    for index, name in enumerate(sorted(files)):
        counts, ids, _, joints = _native.parse_ntu(files[name], name, 25)
        rows = joints.reshape(len(counts), counts[0], 25, 3)
        assert len(set(ids.tolist())) == counts[0]
        order = np.argsort([-rows[:, m].astype(np.float64).std(axis=(0, 1)).sum() for m in range(counts[0])])
        np.testing.assert_array_equal(dataset.clip(index)[:, : counts[0]], rows[:, order])


def test_a_genuine_spurious_body(data_dir):
    data = (data_dir / "ntu_raw" / f"{EXCERPT}.skeleton").read_bytes()
    counts, ids, _, joints = _native.parse_ntu(data, "", 25)
    bodies = bodies_over_time(counts, ids, joints)
    # the second one lies flat, 0.4 m high
    assert [is_noise(body, "spread") for body in bodies] == [False, True]
    assert read(data, "S001C002P005R002A008.skeleton", NtuOptions(denoise=("spread",))).frames.shape[1] == 1
    assert read(data, "S001C002P005R002A008.skeleton").frames.shape[1] == 2


def test_bodies_that_swap_slots_keep_their_places():
    bodies = {number: moving(number, range(12), 1 / number) for number in (1, 2)}
    data = text(recording(bodies, 12, lambda frame, present: present[::-1] if frame % 3 else present))
    frames = read(data, f"{NAME}.skeleton").frames
    for place, number in enumerate((1, 2)):
        np.testing.assert_array_equal(frames[:, place], filled(bodies[number], 12))


def test_bodies_that_leave_and_return_keep_their_places():
    bodies = {1: moving(1, [2, 3, 4, 8, 9]), 2: moving(2, range(12), 0.5)}
    frames = read(text(recording(bodies, 13)), f"{NAME}.skeleton").frames
    assert frames.shape == (13, 2, 25, 3)
    for place, number in enumerate((1, 2)):
        np.testing.assert_array_equal(frames[:, place], filled(bodies[number], 13))
    assert not frames[12].any()


def test_bodies_are_ordered_by_motion_and_the_least_are_left_out():
    scales = {10: 0.5, 11: 2.0, 12: 0.1, 13: 1.0}
    bodies = {number: moving(number, range(6), scale) for number, scale in scales.items()}
    data = text(recording(bodies, 6, lambda frame, present: np.roll(present, frame).tolist()))
    for most, order in ((2, [11, 13]), (1, [11]), (3, [11, 13, 10]), (9, [11, 13, 10, 12])):
        frames = read(data, f"{NAME}.skeleton", NtuOptions(bodies=most)).frames
        np.testing.assert_array_equal(frames, np.stack([filled(bodies[number], 6) for number in order], axis=1))


def test_motion_is_the_field_s_sum_over_frames_with_the_body():
    joints = np.stack([pose(0), pose(1) * 3])
    body = Body(1, np.array([4, 9]), joints)
    points = joints.reshape(-1, 3).astype(np.float64)
    deviations = [np.sqrt(((points[:, c] - points[:, c].mean()) ** 2).mean()) for c in range(3)]
    assert body.motion() == pytest.approx(sum(deviations), rel=1e-12)
    assert body.variance() == pytest.approx(sum(value**2 for value in deviations), rel=1e-12)


def test_equal_bodies_stay_in_the_order_of_the_file():
    joints = pose(0)
    frames = read(text([[(9, joints), (3, joints)], [(9, joints)]]), f"{NAME}.skeleton").frames
    assert frames[1, 0].any() and not frames[1, 1].any()


def test_a_body_of_zeros_is_none():
    frames = read(text([[(1, np.zeros((25, 3))), (2, pose(0))]] * 2), f"{NAME}.skeleton").frames
    assert frames.shape[1] == 1
    with pytest.raises(SkipFile, match="no body in any frame"):
        read(text([[(1, np.zeros((25, 3)))]]), f"{NAME}.skeleton")


def test_a_number_twice_in_a_frame_is_refused():
    data = text([[(1, pose(0))], [(1, pose(1)), (2, pose(2)), (1, pose(3))]])
    with pytest.raises(ValueError, match=rf"with each body at most once .* body 1 twice in frame 1, in x/{NAME}"):
        read(data, f"x/{NAME}.skeleton")


def person(frames, width=0.5, height=1.7, travel=1.0, seed=0):
    """A body of a given width and height that walks towards the sensor."""
    rng = np.random.default_rng(seed)
    joints = np.zeros((frames, 25, 3), np.float32)
    joints[..., 0] = rng.uniform(0, width, (frames, 25))
    joints[..., 1] = rng.uniform(0, height, (frames, 25))
    joints[:, 0, :2], joints[:, 1, :2] = 0, (width, height)
    joints[..., 2] = np.linspace(3, 3 + travel, frames)[:, None]
    return Body(seed, np.arange(frames), joints)


@pytest.mark.parametrize(
    "rule, sound, noise",
    [
        ("length", person(12), person(11)),
        ("spread", person(20, width=1.3), person(20, width=1.4)),
        ("motion", person(20), person(20, width=0.1, height=0.3, travel=0)),
        ("motion", person(20, travel=4), person(20, travel=6)),
    ],
    ids=["length", "spread", "still", "jumping"],
)
def test_rules_of_noise(rule, sound, noise):
    assert not is_noise(sound, rule) and is_noise(noise, rule)
    loud = person(30, travel=3, seed=5)
    assert chosen_bodies([noise, loud], ()) in ([noise, loud], [loud, noise])
    if rule != "motion" or noise.motion() < loud.motion():
        assert chosen_bodies([noise, loud], (rule,)) == [loud]
    # the last body stays
    assert chosen_bodies([noise], ("length", "spread", "motion")) == [noise]


def test_spread_counts_frames():
    # 13 of 20 frames are below the share of 0.69754, 14 above
    for wide, expected in ((13, False), (14, True)):
        joints = np.concatenate([person(wide, width=1.5).joints, person(20 - wide).joints])
        assert is_noise(Body(1, np.arange(20), joints), "spread") is expected


def test_motion_never_drops_the_body_that_moves_most():
    jumping, walking, still = person(20, travel=9), person(20, travel=1, seed=1), person(20, 0.1, 0.3, 0.0, seed=2)
    assert chosen_bodies([still, walking, jumping], ("motion",)) == [jumping, walking]


def test_a_spurious_third_body():
    bodies = {1: moving(1, range(20), 0.3), 2: moving(2, range(20), 0.2), 3: moving(3, range(5, 9), 5.0)}
    data = text(recording(bodies, 20))
    assert read(data, f"{NAME}.skeleton").frames[0, 0].any() == np.False_
    frames = read(data, f"{NAME}.skeleton", NtuOptions(denoise=("length",))).frames
    np.testing.assert_array_equal(frames, np.stack([filled(bodies[number], 20) for number in (1, 2)], axis=1))


def test_join_gives_a_body_its_place_back():
    bodies = {1: moving(1, range(8), 1.0), 2: moving(2, range(20), 0.5), 3: moving(3, range(10, 20), 0.2)}
    data = text(recording(bodies, 20))
    apart = read(data, f"{NAME}.skeleton", NtuOptions(bodies=3)).frames
    assert apart.shape[1] == 3
    frames = read(data, f"{NAME}.skeleton", NtuOptions(join=True)).frames
    expected = np.stack([filled({**bodies[1], **bodies[3]}, 20), filled(bodies[2], 20)], axis=1)
    np.testing.assert_array_equal(frames, expected)
    # two that follow each other, and then a third in the frames of the second
    three = [Body(number, np.array(frames), np.ones((len(frames), 1, 3), np.float32) * number) for number, frames in
             ((1, [0]), (2, [1]), (3, [1]))]  # fmt: skip
    assert placed(three, 2, 2, join=True)[:, :, 0, 0].tolist() == [[1, 0], [2, 3]]


@pytest.mark.parametrize("data", [text([]), text([[], [], []])], ids=["no frames", "no bodies"])
def test_a_file_without_bodies_is_skipped(tmp_path, data):
    summary = pack_files(tmp_path, {NAME: data, "S002C001P001R001A001": text([[(1, pose(0))]])})
    assert summary.clips == 1 and summary.skipped == ((f"{NAME}.skeleton", "no body in any frame"),)
    assert "no body in any frame" in str(summary)


def test_frames_without_bodies_are_zero(tmp_path):
    summary = pack_files(tmp_path, {NAME: text([[], [(1, pose(0))], []])})
    dataset = open_dataset(tmp_path / "out", verify=True)
    assert summary.frames == 3 and dataset.clip(0).any(axis=(1, 2, 3)).tolist() == [False, True, False]


def test_missing_skeletons(tmp_path):
    listed = tmp_path / "missing.txt"
    listed.write_text(f"These 2 samples lack skeletons:\r\n\nS001C001P001R001A001.skeleton\r\n\n {NAME} \n")
    # the text of a missing skeleton may be anything
    files = {NAME: b"incomplete", "S002C001P001R001A001": text([[(1, pose(0))]])}
    summary = pack_files(tmp_path, files, missing=listed)
    assert summary.clips == 1 and summary.skipped == ((f"{NAME}.skeleton", "in the list of missing skeletons"),)


def test_published_lists_of_missing_skeletons(data_dir):
    counts = [len(NtuOptions(data_dir / "ntu_raw" / f"ntu{size}_missing_skeletons.txt").missing_names) for size in (60, 120)]
    assert counts == [302, 535]


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"source must be with at least one clip, got none \(S001.*: no body in any frame\)"):
        pack_files(tmp_path, {NAME: text([[]])})
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_classes_and_actions(tmp_path):
    assert len(CLASSES) == len(set(CLASSES)) == 120 and all(name == name.lower() for name in CLASSES)
    named = {1: "drink water", 50: "punch or slap", 60: "walking apart", 61: "put on headphone", 120: "rock-paper-scissors"}
    assert {number: CLASSES[number - 1] for number in named} == named
    assert FORMATS["ntu60"].class_names == CLASSES[:60] and FORMATS["ntu120"].class_names == CLASSES
    files = {"S001C001P001R001A060": text([[(1, pose(0))]]), "S018C001P041R001A061": text([[(1, pose(1))]])}
    summary = pack_files(tmp_path, files)
    assert summary.skipped == (("S018C001P041R001A061.skeleton", "action 61 is not among the 60 of the data set"),)
    pack.pack_source("ntu120", tmp_path / "src", tmp_path / "all", progress=False)
    assert open_dataset(tmp_path / "all").labels.tolist() == [59, 60]


@pytest.mark.parametrize("file", ["a", "S001C001P001R001A000", "S001C001P001R001A121", "S1C1P1R1A1", f"{NAME}_rgb", f"x{NAME}"])
def test_other_names_are_refused(file):
    with pytest.raises(ValueError, match=rf"file must be named S<setup>C<camera>.*, got {file}.skeleton, in x/{file}.skeleton"):
        read(SOUND, f"x/{file}.skeleton")


@pytest.mark.parametrize("word", ["nan", "-inf", "1e39"])
def test_coordinates_are_finite(word):
    values = text([[(1, pose(0))], [(1, pose(1)), (2, pose(2))]]).decode().split("\n")
    values[-3] = " ".join([word, *values[-3].split()[1:]])
    with pytest.raises(ValueError, match=rf"file must be finite coordinates, got NaN or infinity in frame 1, in {NAME}"):
        read("\n".join(values).encode(), f"{NAME}.skeleton")
    # pixels may be anywhere: the sensor maps joints that it does not see to infinity
    values[-3] = " ".join(["0 0 0", word, *values[-3].split()[4:]])
    read("\n".join(values).encode(), f"{NAME}.skeleton")


def test_other_joints_are_refused():
    with pytest.raises(ValueError, match=rf"pack_source: line 4 must be the number of joints \(25\), got '20', in {NAME}"):
        read(text([[(1, pose(0, joints=20))]]), f"{NAME}.skeleton")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bodies": 0}, "option bodies must be a whole number of at least 1, got 0"),
        ({"bodies": 1.5}, "option bodies must be a whole number"),
        ({"bodies": True}, "option bodies must be a whole number"),
        ({"denoise": ("size",)}, r"option denoise must be a tuple of length, spread, motion, got \('size',\)"),
        ({"denoise": "spread"}, "option denoise must be a tuple of length, spread, motion, got 'spread'"),
        ({"missing": "nowhere.txt"}, "option missing must be a readable list, got .*nowhere.txt"),
        ({"body": 2}, r"options must be among those of the format \(missing, bodies, denoise, join\), got 'body'"),
    ],
    ids=str,
)
def test_wrong_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        pack_files(tmp_path, {NAME: SOUND}, **options)
    assert not (tmp_path / "out").exists()


def test_a_list_of_something_else_is_refused(tmp_path):
    (tmp_path / "list.txt").write_text("a01_s01_e00_v01\n")
    with pytest.raises(ValueError, match="option missing must be a list of clip names .*, got none in .*list.txt"):
        NtuOptions(missing=tmp_path / "list.txt")


def test_formats_without_options_refuse_them(tmp_path):
    with pytest.raises(ValueError, match=r"options must be among those of the format \(none\), got 'bodies'"):
        pack.pack_source("utd-mhad", tmp_path, tmp_path / "out", options={"bodies": 2}, progress=False)


def test_readers_can_be_sent_to_other_processes(tmp_path):
    (tmp_path / "list.txt").write_text(f"{NAME}\n")
    reader = pickle.loads(pickle.dumps(FORMATS["ntu60"].reader({"missing": tmp_path / "list.txt"})))
    (tmp_path / "list.txt").unlink()
    with pytest.raises(SkipFile):
        reader(SOUND, f"{NAME}.skeleton")


def test_command_line(tmp_path, capsys):
    bodies = {number: moving(number, range(20), number) for number in (1, 2, 3)}
    bodies[4] = moving(4, range(5), 9)
    listed = tmp_path / "missing.txt"
    listed.write_text("S001C001P001R001A001\n")
    pack_files(tmp_path, {NAME: text(recording(bodies, 20)), "S001C001P001R001A001": b""}, missing=listed)
    words = ["pack", "ntu120", str(tmp_path / "src"), str(tmp_path / "cli"), "--quiet", "--missing", str(listed)]
    assert main([*words, "--bodies", "3", "--denoise", "length", "--join"]) == 0
    assert "skipped S001C001P001R001A001.skeleton: in the list of missing skeletons" in capsys.readouterr().out
    expected = np.stack([filled(bodies[number], 20) for number in (3, 2, 1)], axis=1)
    np.testing.assert_array_equal(open_dataset(tmp_path / "cli").clip(0), expected)
    assert main([*words[:3], str(tmp_path / "other"), "--bodies", "0"]) == 2
    assert "option bodies must be" in " ".join(capsys.readouterr().err.split())
    assert main(["pack", "utd-mhad", "--help"]) == 0
    assert "--reader" not in capsys.readouterr().out


def test_protocols(tmp_path):
    names = [f"S{s:03}C{c:03}P{p:03}R001A001" for s, c, p in itertools.product((1, 2), (1, 2, 3), (1, 3))]
    pack_files(tmp_path, {name: text([[(1, pose(seed))]]) for seed, name in enumerate(names)})
    pack.pack_source("ntu120", tmp_path / "src", tmp_path / "all", progress=False)
    for folder, rules in (
        ("out", {"xsub": lambda name: "P001" in name, "xview": lambda name: "C001" not in name}),
        ("all", {"xsub": lambda name: "P001" in name, "xset": lambda name: "S002" in name}),
    ):
        dataset = open_dataset(tmp_path / folder)
        # of NTU RGB+D 120, where every class but one of each six is trained on
        one_shot = {"one-shot"} if dataset.source == "ntu120" else set()
        assert protocols(dataset) == sorted(rules.keys() | one_shot)
        for protocol, trains in rules.items():
            parts = split(dataset, protocol)
            assert dataset.names[parts.train].tolist() == [name for name in names if trains(name)]
            assert len(parts.train) + len(parts.test) == 12
