"""Packing a user's own clips."""

import copy
import hashlib
import warnings

import numpy as np
import pytest

from fastskel.data import pack
from fastskel.data.normalise import normalise
from fastskel.data.packed import open_dataset
from fastskel.skeleton import topology

JOINTS = 15


def clip(frames=4, bodies=1, joints=JOINTS, channels=3, seed=0):
    return np.random.default_rng(seed).normal(size=(frames, bodies, joints, channels)).astype(np.float32)


def run(clips, tmp_path, **options):
    return pack.pack_arrays(clips, topology="sbu-15", out=tmp_path / "out", **options)


def test_bytes_do_not_depend_on_the_run(tmp_path):
    clips = [clip(seed=seed, bodies=1 + seed % 3, frames=2 + seed) for seed in range(6)]
    for folder in ("one", "two"):
        pack.pack_arrays(iter(clips), topology="sbu-15", out=tmp_path / folder, columns={"view": list("abcabc")})
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "meta.json" in files and len(files) == 7
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("bodies", [(1, 2, 1, 3), (3, 1), (2,)], ids=str)
@pytest.mark.parametrize("least", [1, 4])
def test_missing_bodies_are_zero(tmp_path, bodies, least):
    clips = [clip(bodies=count, seed=seed) for seed, count in enumerate(bodies)]
    dataset = run(clips, tmp_path, num_bodies=least)
    assert dataset.num_bodies_max == max(*bodies, least) and dataset.num_bodies.tolist() == list(bodies)
    for index, original in enumerate(clips):
        np.testing.assert_array_equal(dataset.clip(index)[:, : bodies[index]], original)
        assert not dataset.clip(index)[:, bodies[index] :].any()


def test_a_large_file_is_widened_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("fastskel.data.writer._BLOCK_FRAMES", 3)
    clips = [clip(frames=10), clip(bodies=2)]
    dataset = run(clips, tmp_path)
    np.testing.assert_array_equal(dataset.clip(0)[:, :1], clips[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("kind", [np.float64, np.float16, np.int32, list, "torch"], ids=str)
def test_clips_may_be_anything_numeric(tmp_path, kind):
    import torch

    values = np.round(clip() * 8)
    given = values.tolist() if kind is list else torch.from_numpy(values) if kind == "torch" else values.astype(kind)
    np.testing.assert_array_equal(run([given], tmp_path).clip(0), values)


def test_one_padded_array_and_counts(tmp_path):
    clips = np.zeros((3, 8, 1, JOINTS, 3), dtype=np.float32)
    for number, frames in enumerate((8, 1, 5)):
        clips[number, :frames] = 1 + number
    by_zero = pack.pack_arrays(clips, topology="sbu-15", out=tmp_path / "zero")
    counted = pack.pack_arrays(clips, topology="sbu-15", out=tmp_path / "count", num_frames=[8, 2, 5])
    assert by_zero.num_frames.tolist() == [8, 1, 5] and by_zero.meta["valid_frames_rule"] == "nonzero"
    assert counted.num_frames.tolist() == [8, 2, 5] and counted.meta["valid_frames_rule"] == "counted"
    whole = pack.pack_arrays(clips, topology="sbu-15", out=tmp_path / "all", num_frames="all")
    assert whole.num_frames.tolist() == [len(clip) for clip in clips] and whole.meta["valid_frames_rule"] == "counted"
    with pytest.raises(ValueError, match="num_frames must be whole numbers along one axis"):
        pack.pack_arrays(clips, topology="sbu-15", out=tmp_path / "some", num_frames="some")


def test_dropped_frames_take_their_columns_and_segments_along(tmp_path):
    gap = clip(frames=6)
    gap[[0, 3]] = 0
    dataset = run([gap], tmp_path, columns={"phase": [np.arange(6)]}, segments=[(0, 0, 0, 6), (0, 0, 2, 5)])
    assert dataset.columns["phase"].tolist() == [1, 2, 4, 5]
    assert dataset.segments[:, 2:4].tolist() == [[0, 4], [1, 3]]


def test_files_of_arrays(tmp_path):
    np.save(tmp_path / "walk.npy", clip())
    np.testing.assert_array_equal(run([tmp_path / "walk.npy"], tmp_path).clip(0), clip())


def test_defaults(tmp_path):
    dataset = run([clip(), clip(frames=1)], tmp_path)
    assert dataset.labels.tolist() == [-1, -1] and dataset.names.tolist() == ["clip-000000", "clip-000001"]
    assert dataset.meta["units"] == "metres" and dataset.meta["channels"] == ["x", "y", "z"]
    assert dataset.segments is None and dataset.splits == {} and dataset.class_names == []


def test_whole_numbers_of_any_type(tmp_path):
    import torch

    dataset = run(
        [clip(), clip()],
        tmp_path,
        segments=np.array([[1.0, 2.0, 0.0, 3.0, 0.5]]),
        splits={"numpy": {"train": np.array([0]), "test": range(1, 2)}, "torch": {"train": torch.tensor([1])}},
        num_bodies=np.int64(2),
    )
    assert dataset.segments.tolist() == [[1, 2, 0, 3, 0.5]] and dataset.num_bodies_max == 2
    found = {name: {part: rows.tolist() for part, rows in parts.items()} for name, parts in dataset.splits.items()}
    assert found == {"numpy": {"train": [0], "test": [1]}, "torch": {"train": [1]}}


def test_a_topology_may_be_an_object(tmp_path):
    layout = topology("sbu-15")
    assert pack.pack_arrays([clip()], topology=layout, out=tmp_path / "out").topology is layout
    # equal, not the same: what another process sends
    pack.pack_arrays([clip()], topology=copy.deepcopy(layout), out=tmp_path / "copy")


def test_pixels_with_score(tmp_path):
    dataset = run([clip()], tmp_path, units="pixels", up_axis="-y")
    assert dataset.meta["channels"] == ["x", "y", "score"]


@pytest.mark.parametrize("kind", ["none", "center", "center-first", "align", "align-yaw"])
def test_normalisation_is_recorded(tmp_path, kind):
    dataset = run([clip()], tmp_path, normalisation=kind)
    assert dataset.meta["normalisation"] == kind
    np.testing.assert_array_equal(dataset.clip(0), normalise(clip(), kind, topology("sbu-15")))


def test_options_are_recorded_as_plain_values(tmp_path):
    (tmp_path / "list.csv").write_text("a,b\n")
    options = {"rate": 30, "joints": ("a", "b"), "labels": tmp_path / "list.csv", "none": None, "odd": 1j}
    recorded = run([clip()], tmp_path, options=options).meta["options"]
    digest = hashlib.sha256(b"a,b\n").hexdigest()
    labels = {"file": "list.csv", "sha256": digest}
    assert recorded == {"rate": 30, "joints": ["a", "b"], "labels": labels, "none": None, "odd": "1j"}
    with pytest.raises(ValueError, match="pack_arrays: options must be a mapping from name to value, got 3"):
        pack.pack_arrays([clip()], topology="sbu-15", out=tmp_path / "other", options=3)


def test_existing_destination_is_untouched(tmp_path):
    run([clip()], tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match=r"destination must be new, got the existing .*out"):
        run([clip(seed=1)], tmp_path)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_unknown_topology_and_choices(tmp_path):
    with pytest.raises(ValueError, match="sbu-15"):
        pack.pack_arrays([clip()], topology="sbu15", out=tmp_path / "out")
    with pytest.raises(ValueError, match="normalisation must be one of"):
        run([clip()], tmp_path, normalisation="centre")
    with pytest.raises(ValueError, match="up_axis must be one of"):
        run([clip()], tmp_path, up_axis="up")
    assert list(tmp_path.iterdir()) == []


def test_open_dataset_is_what_pack_returns(tmp_path):
    assert run([clip()], tmp_path).meta == open_dataset(tmp_path / "out", verify=True).meta


def test_reading_in_threads_leaves_warnings_as_they_are(tmp_path, monkeypatch):
    # filters of warnings are those of all threads: of two that change them one would bring back the other's
    for number in range(3):
        np.savetxt(tmp_path / f"c{number}.csv", np.ones((4, 45)), delimiter=",")
    loadtxt, before, during = np.loadtxt, warnings.filters, []

    def watched(*arguments, **given):
        during.append(warnings.filters is before)
        return loadtxt(*arguments, **given)

    monkeypatch.setattr(np, "loadtxt", watched)
    pack.pack_source("csv", tmp_path, tmp_path / "out", options={"topology": "sbu-15"}, threads=2, progress=False)
    assert during == [True] * 3 and warnings.filters is before
