"""Skeletons converted between layouts: what corresponds, what is a mean, what is missing."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest

from fastskel.data import convert_dataset, convert_joints, correspondence, make_synthetic, open_dataset, pack_arrays
from fastskel.data.identity import dataset_identity, original_identity
from fastskel.skeleton import TOPOLOGIES, topology

NAMES = ["ntu-25", "kinect-20-ucla", "kinect-20-utd", "coco-17", "openpose-18", "sbu-15"]


def clip_of(layout, seed=0, bodies=2):
    return np.random.default_rng(seed).standard_normal((3, bodies, layout.num_joints, 3)).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_a_layout_is_itself(name):
    layout = topology(name)
    found = correspondence(layout, layout)
    assert found.renamed == found.missing == ()
    clip = clip_of(layout)
    assert convert_joints(clip, layout, layout).tobytes() == clip.tobytes()


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
def test_names_and_sides_agree(source, target):
    first, second = TOPOLOGIES[source], TOPOLOGIES[target]
    clip, found = clip_of(first), correspondence(first, second)
    out = convert_joints(clip, first, second)
    assert out.shape == (3, 2, second.num_joints, 3)
    assert out.dtype == np.float32
    for number, joint in enumerate(second.joints):
        parts = found.sources[number]
        assert (joint in found.missing) == (not parts)
        if joint in first.joints:
            assert parts == (first.joint(joint),)
        if len(parts) == 1 and joint.startswith(("left_", "right_")):
            assert first.joints[parts[0]].split("_")[0] == joint.split("_")[0]
        expected = clip[:, :, list(parts)].astype(np.float64).mean(axis=2) if parts else np.zeros((3, 2, 3))
        np.testing.assert_allclose(out[:, :, number], expected, rtol=0, atol=1e-7)


def test_mirrored_skeletons_convert_to_mirrored_ones():
    for source in map(topology, NAMES):
        for target in map(topology, NAMES):
            clip = clip_of(source)
            mirrored = convert_joints(clip[:, :, list(source.mirror)], source, target)
            np.testing.assert_allclose(
                mirrored, convert_joints(clip, source, target)[:, :, list(target.mirror)], rtol=0, atol=1e-7
            )


@pytest.mark.parametrize(
    ("source", "target", "renamed", "missing"),
    [
        ("ntu-25", "kinect-20-ucla", {
            "hip_center from spine_base", "spine from spine_mid", "shoulder_center from spine_shoulder",
        }, set()),
        ("ntu-25", "sbu-15", {"torso from spine_mid"}, set()),
        ("ntu-25", "coco-17", {"nose from head"}, {"left_eye", "right_eye", "left_ear", "right_ear"}),
        ("coco-17", "sbu-15", {
            "head from nose", "neck from left_shoulder and right_shoulder", "left_hand from left_wrist",
            "right_hand from right_wrist", "left_foot from left_ankle", "right_foot from right_ankle",
        }, {"torso"}),
    ],
)  # fmt: skip
def test_what_is_renamed_and_missing(source, target, renamed, missing):
    found = correspondence(topology(source), topology(target))
    assert set(found.renamed) == renamed
    assert set(found.missing) == missing


def test_a_mean_with_an_absent_joint_is_absent():
    source, target = topology("coco-17"), topology("openpose-18")
    clip = clip_of(source, bodies=1)
    clip[1, :, source.joint("left_shoulder")] = 0
    neck = convert_joints(clip, source, target)[:, 0, target.joint("neck")]
    assert neck[0].any()
    assert not neck[1].any()


def test_data_sets_keep_all_but_the_skeleton(tmp_path):
    data = make_synthetic(tmp_path / "data", num_clips=6, bodies=2)
    convert_dataset(data, "coco-17", tmp_path / "coco")
    coco = open_dataset(tmp_path / "coco", verify=True)
    assert coco.topology.name == "coco-17"
    for name in ("offsets", "names", "labels", "num_bodies"):
        assert np.array_equal(getattr(coco, name), getattr(data, name))
    assert coco.class_names == data.class_names
    assert set(coco.columns) == set(data.columns)
    for name, values in data.columns.items():
        assert np.array_equal(coco.columns[name], values)
    for protocol, parts in data.splits.items():
        for part, index in parts.items():
            assert np.array_equal(coco.splits[protocol][part], index)
    for number in range(6):
        expected = convert_joints(data.clip(number), data.topology, coco.topology)
        assert np.array_equal(coco.clip(number), expected)


def test_a_copy_knows_its_original(tmp_path):
    data = make_synthetic(tmp_path / "data", num_clips=3)
    assert original_identity(data) == dataset_identity(data)
    twice = convert_dataset(convert_dataset(data, "coco-17", tmp_path / "coco"), "openpose-18", tmp_path / "again")
    assert original_identity(open_dataset(twice.path)) == dataset_identity(data) != dataset_identity(twice)
    path = twice.path / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "original": 3}))
    with pytest.raises(ValueError, match="original must be a str, got 3"):
        open_dataset(twice.path)


def test_frames_segments_and_columns_survive(tmp_path):
    layout = topology("kinect-20-ucla")
    clip = clip_of(layout, bodies=1)
    clip[1] = 0
    data = pack_arrays(
        [clip], out=tmp_path / "data", topology=layout, num_frames=[3], segments=[(0, 2, 0, 2)],
        columns={"frame_id": [np.array([4, 5, 9])]},
    )  # fmt: skip
    out = convert_dataset(data, "ntu-25", tmp_path / "out")
    assert len(out.clip(0)) == 3
    assert out.column("frame_id", 0).tolist() == [4, 5, 9]
    assert np.array_equal(out.segments, data.segments)


def test_one_clip_at_a_time_in_memory(tmp_path):
    layout = topology("ntu-25")
    clip = clip_of(layout, bodies=1).repeat(60, axis=0)
    data = pack_arrays([clip] * 100, out=tmp_path / "data", topology=layout)
    tracemalloc.start()
    try:
        convert_dataset(data, "sbu-15", tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # a checksum reads 1 MiB at a time; the frames have 5.4 MB, those that are written 3.2 MB
    assert peak < 2_500_000 < 18_000 * 15 * 3 * 4


def test_refusals(tmp_path):
    data = make_synthetic(tmp_path / "data", num_clips=3)
    with pytest.raises(ValueError, match=r"clips must be \(..., 17, C\) for 'coco-17'"):
        convert_joints(data.clip(0), topology("coco-17"), data.topology)
    centred = pack_arrays([data.clip(0)], out=tmp_path / "centred", topology="ntu-25", normalisation="center")
    with pytest.raises(ValueError, match="must be packed with normalisation 'none', got 'center'"):
        convert_dataset(centred, "coco-17", tmp_path / "out")
    with pytest.raises(ValueError, match="destination must be new"):
        convert_dataset(data, "coco-17", tmp_path / "data")
