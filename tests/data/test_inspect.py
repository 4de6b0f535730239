"""Summaries and pictures of packed data."""

import numpy as np
import pytest

from fastskel.data import pack
from fastskel.data.inspect import info, project, show
from fastskel.skeleton import TOPOLOGIES, topology


def standing(name):
    """A clip (T, 1, V, 3) whose left joints are at x = -1 and whose joints are as high as the Kinect sees them, y up."""
    layout = topology(name)
    heights = {"head": 3, "nose": 3, "neck": 2.5, "hip": 1, "knee": 0.5, "ankle": 0.1, "foot": 0.05}
    clip = np.zeros((4, 1, layout.num_joints, 3), dtype=np.float32)
    for number, joint in enumerate(layout.joints):
        clip[:, 0, number, 0] = -1 if joint.startswith("left") else 1 if joint.startswith("right") else 0.1
        clip[:, 0, number, 1] = next((height for key, height in heights.items() if key in joint), 2)
        clip[:, 0, number, 2] = 3 + 0.1 * np.arange(4)
    return clip


def dataset_of(tmp_path, clip, name="ntu-25", **options):
    return pack.pack_arrays([clip, clip[:1]], topology=name, out=tmp_path / "set", names=["walk/1", "stand"], **options)


@pytest.mark.parametrize("name", list(TOPOLOGIES))
def test_show_every_skeleton(tmp_path, name):
    from PIL import Image

    dataset = dataset_of(tmp_path, standing(name), name, labels=[1, -1], class_names=["run", "walk"])
    png, gif = show(dataset.path, 0, tmp_path / "pictures")
    assert (png.name, gif.name) == ("walk_1.png", "walk_1.gif")
    with Image.open(png) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    # left limbs are blue, right ones orange
    assert (pixels == [2, 132, 199]).all(axis=1).any() and (pixels == [234, 88, 12]).all(axis=1).any()
    with Image.open(gif) as movie:
        assert movie.n_frames == 4
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["walk_1.gif", "walk_1.png"]


def test_show_a_single_frame_by_name(tmp_path):
    png, gif = show(dataset_of(tmp_path, standing("ntu-25")), "stand", tmp_path)
    assert png.stat().st_size > 1000 and gif.stat().st_size > 500


@pytest.mark.parametrize("up_axis", ["y", "-y", "z", "pixels"])
def test_heads_are_up_and_the_left_hand_is_at_the_viewers_right(tmp_path, up_axis):
    clip, layout = standing("ntu-25"), topology("ntu-25")
    options = {"up_axis": up_axis}
    if up_axis == "-y":
        # camera coordinates with x to the right and y down
        clip = clip * np.array([-1, -1, 1], dtype=np.float32)
    elif up_axis == "z":
        clip = np.stack([-clip[..., 0], clip[..., 2], clip[..., 1]], axis=-1)
    elif up_axis == "pixels":
        clip = clip * np.array([-1, -1, 0], dtype=np.float32)
        options = {"up_axis": "-y", "units": "pixels"}
    dataset = dataset_of(tmp_path, clip, **options)
    points = project(dataset, dataset.clip(0)).points[0, 0]
    assert points[layout.joint("head"), 1] > points[layout.joint("left_foot"), 1]
    assert points[layout.joint("left_hand"), 0] > points[layout.joint("right_hand"), 0]


def test_absent_bodies_are_not_drawn(tmp_path):
    clip = np.concatenate([standing("ntu-25"), np.zeros((4, 1, 25, 3), dtype=np.float32)], axis=1)
    dataset = dataset_of(tmp_path, clip)
    scene = project(dataset, dataset.clip(0))
    assert scene.present[:, 0].all() and not scene.present[:, 1].any()


def test_a_centred_body_keeps_its_centre(tmp_path):
    dataset = dataset_of(tmp_path, standing("ntu-25"), normalisation="center")
    centre = dataset.topology.centre
    assert not dataset.clip(0)[:, :, centre].any() and project(dataset, dataset.clip(0)).present[:, :, centre].all()


def test_show_refuses(tmp_path):
    dataset = dataset_of(tmp_path, standing("ntu-25"))
    with pytest.raises(ValueError, match="got 'sit'"):
        show(dataset, "sit", tmp_path)
    with pytest.raises(ValueError, match=r"range\(2\), got 2"):
        show(dataset, 2, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"show: out must be writable, got .*, in .*file"):
        show(dataset, 0, tmp_path / "file")


def test_info_says_what_there_is(tmp_path):
    dataset = dataset_of(
        tmp_path,
        standing("ntu-25"),
        labels=[1, -1],
        class_names=["run", "walk"],
        columns={"subject": [3, 4]},
        splits={"mine": {"train": [0], "test": [1]}, "half": {"train": [0]}},
        segments=[(0, 1, 0, 2)],
        source="utd-mhad",
    )
    text = info(dataset.path, verify=True)
    for part in (
        "utd-mhad",
        "checksums match",
        "2, 5 frames",
        "1 to 4 frames",
        "ntu-25, 25 joints",
        "x, y, z in metres, y up",
        "room for 1; 2 clips with 1",
        "any non-zero joint",
        "1 clips of 1 classes, 1 unknown",
        "2 values per clip: 3, 4",
        "segments",
        "1 train, 1 test",
        "only ['train']",
        "walk: 1 clips",
    ):
        assert part in text, part
    assert info(dataset) == info(dataset.path)
