"""Readers of untrimmed recordings, UTKinect and PKU-MMD: segments, per-frame columns, lists of parts, notes."""

import json
import tarfile
from itertools import pairwise

import numpy as np
import pytest

from fastskel.data import pack
from fastskel.data.check import check_dataset
from fastskel.data.formats import pku_mmd, utkinect
from fastskel.data.formats.untrimmed import frame_classes
from fastskel.data.packed import open_dataset
from fastskel.data.protocols import protocols, split


def rows(values, ids=None):
    values = np.asarray(values).reshape(len(values), -1)
    lead = [""] * len(values) if ids is None else [f"{number}   " for number in ids]
    return "".join(begin + "  ".join(f"{v:.6f}" for v in row) + "  \n" for begin, row in zip(lead, values, strict=True)).encode()


def poses(num_frames, bodies, joints, seed=0):
    return np.random.default_rng(seed).normal(size=(num_frames, bodies, joints, 3)).round(6)


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def test_classes_of_frames():
    segments = [(4, 5, 8, 1.0), (2, 1, 6, 1.0), (3, 8, 8, 1.0), (1, 9, 7, 1.0)]
    assert frame_classes(segments, 10).tolist() == [-1, 2, 2, 2, 2, 4, 4, 4, -1, -1]
    assert frame_classes([], 3).tolist() == [-1, -1, -1]


IDS = [10, 12, 12, 14, 18, 20]
LABELS = "s01_e02\nwalk: 12 14\nsitDown: 14  18 \nthrow: 15 17\ncarry:  NaN NaN\n"


def utkinect_files():
    return {
        "joints_s01_e02.txt": rows(poses(6, 1, 20), IDS),
        "joints_s10_e01.txt": rows(poses(3, 1, 20, 1), [1, 2, 3]),
        "actionLabel.txt": "s01_e02\nwalk: 10 20\n",
        "actionLabel_modified.txt": LABELS,
    }


def test_utkinect(tmp_path):
    summary = pack.pack_source("utkinect", write(tmp_path / "src", utkinect_files()), tmp_path / "out", progress=False)
    dataset = open_dataset(tmp_path / "out", verify=True)
    np.testing.assert_array_equal(dataset.clip(0), poses(6, 1, 20).astype(np.float32))
    assert dataset.names.tolist() == ["s01_e02", "s10_e01"] and dataset.labels.tolist() == [-1, -1]
    # ids are inclusive, rows of repeated ids belong to both ends
    expected = [[0, 0, 1, 4, 1], [0, 1, 3, 5, 1], [0, 5, 4, 4, 1]]
    assert dataset.segments.tolist() == expected
    assert dataset.column("action", 0).tolist() == [-1, 0, 0, 1, 1, -1]
    assert dataset.column("frame_id", 0).tolist() == IDS
    assert dataset.column("action", 1).tolist() == [-1] * 3
    assert dataset.column("subject").tolist() == [1, 10] and dataset.column("repetition").tolist() == [2, 1]
    assert summary.skipped == () and summary.notes == (
        ("s01_e02", "1 rows repeat the frame id of the row before (frame ids 12); all rows are kept"),
        ("s01_e02", "segment of class 'throw', frame ids 15 to 17, has no frames"),
        ("s01_e02", "no segment of class 'carry': the labels say NaN"),
        ("s10_e01", "no labels in the source"),
    )
    assert "note s10_e01: no labels in the source" in str(summary)
    assert split(dataset, "xsub").test.tolist() == [1] and split(dataset, "xsub:1").test.tolist() == [0]


def test_utkinect_without_corrections(tmp_path):
    files = {name: data for name, data in utkinect_files().items() if "modified" not in name}
    pack.pack_source("utkinect", write(tmp_path / "src", files), tmp_path / "out", progress=False)
    assert open_dataset(tmp_path / "out").segments.tolist() == [[0, 0, 0, 6, 1]]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("joints_s01_e02.txt", b"", "at least one frame, got none"),
        ("joints_s01_e02.txt", rows(poses(2, 1, 20), [1, 2])[:-40], r"61 numbers in every row, got \d\d in line 2"),
        ("joints_s01_e02.txt", rows(poses(2, 1, 25), [1, 2]), "61 numbers in every row, got 76 in line 1"),
        ("joints_s01_e02.txt", rows(poses(2, 1, 20) * [1, np.nan, 1], [1, 2]), "NaN or infinity in frame 0"),
        ("joints_s01_e02.txt", rows(poses(3, 1, 20), [4, 6, 5]), "never go back, got 5 after 6 in row 2"),
        ("joints_s01_e02.txt", rows(poses(1, 1, 20), ["1.5"]), "whole frame ids, got 1.5"),
        ("joints_s1_e2.txt", rows(poses(1, 1, 20), [1]), "named joints_s<subject>_e<episode>.txt"),
        ("actionLabel.txt", "walk: 1 2\n", "recordings and their segments, got 'walk: 1 2' in line 1"),
        ("actionLabel.txt", "s01_e02\nfly: 1 2\n", "got 'fly: 1 2' in line 2"),
        ("actionLabel.txt", "s01_e02\nwalk: 1\n", "got 'walk: 1' in line 2"),
        ("actionLabel.txt", "s01_e02\nwalk: NaN 4\n", "two frame ids or two NaN, got 'walk: NaN 4'"),
        ("actionLabel.txt", "s01_e02\nwalk: -3 4\n", "two frame ids or two NaN, got 'walk: -3 4'"),
    ],
)
def test_bad_utkinect(tmp_path, name, data, message):
    files = {"joints_s03_e01.txt": rows(poses(2, 1, 20), [1, 2]), name: data}
    with pytest.raises(ValueError, match=rf"pack_source: file must be .*{message}.*{name}"):
        pack.pack_source("utkinect", write(tmp_path / "src", files), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def real(data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("utkinect") / "out"
    source = data_dir / "utkinect" / "utkinect_joints_txt.tar.xz"
    return source, pack.pack_source("utkinect", source, out, progress=False), open_dataset(out, verify=True)


def test_real_utkinect_against_a_plain_parser(real):
    source, summary, dataset = real
    with tarfile.open(source) as archive:
        texts = {m.name.split("/")[-1]: archive.extractfile(m).read().decode() for m in archive if m.isfile()}
    labels, recording = {}, ""
    for line in filter(None, map(str.strip, texts["actionLabel_modified.txt"].split("\n"))):
        if ":" in line:
            labels[recording].append((line.split(":")[0], *line.split(":")[1].split()))
        else:
            recording = line
            labels[recording] = []
    assert len(dataset) == len(labels) == 20
    names = {key: number for number, key in enumerate(utkinect.CLASSES)}
    segments = []
    repeats = 0
    for index, name in enumerate(sorted(labels)):
        lines = [line.split() for line in texts[f"joints_{name}.txt"].split("\n") if line.strip()]
        ids = [int(line[0]) for line in lines]
        expected = np.array([[float(word) for word in line[1:]] for line in lines], np.float32).reshape(-1, 1, 20, 3)
        np.testing.assert_array_equal(dataset.clip(index), expected)
        assert dataset.column("frame_id", index).tolist() == ids
        repeats += sum(a == b for a, b in pairwise(ids))
        action = dataset.column("action", index)
        for label, first, last in labels[name]:
            if first != "NaN":
                inside = [t for t, number in enumerate(ids) if int(first) <= number <= int(last)]
                segments.append([index, names[label], inside[0], inside[-1] + 1, 1])
                assert (action[inside] >= 0).all()
    assert dataset.segments.tolist() == segments and len(segments) == 199
    assert repeats == 542 and len(summary.notes) == 21 and summary.skipped == ()
    assert (dataset.columns["action"] >= 0).mean() == pytest.approx(0.377, abs=5e-4)


def test_real_utkinect_joints_are_where_their_names_say(real):
    _, _, dataset = real
    height = dataset.frames[:, 0, :, 1].astype(np.float64).mean(axis=0)
    order = ["left_foot", "left_knee", "left_hip", "spine", "shoulder_center", "head"]
    assert sorted(order, key=lambda joint: height[dataset.topology.joint(joint)]) == order


def test_real_utkinect_is_checked(real):
    _, _, dataset = real
    report = check_dataset(dataset)
    repeated = report.of("repeated-frame-ids")
    assert len(repeated) == 20 and sum(finding.num_frames for finding in repeated) == 542
    overlaps = report.of("overlapping-segments")
    assert len({finding.clip for finding in overlaps}) == 5 and sum(f.num_frames for f in overlaps) == 7



def pku_files():
    return {
        "Skeleton/0002-L.txt": rows(np.stack([poses(6, 1, 25)[:, 0], np.zeros((6, 25, 3))], axis=1)),
        "Skeleton/0002-M.txt": rows(poses(5, 2, 25, 1)),
        "Skeleton/A01N12-R.txt": rows(poses(4, 2, 25, 2)),
        "Train_Label_PKU_final/0002-L.txt": "51,1,3,2\n1,2,5,1\n",
        "Train_Label_PKU_final/0002-M.txt": "4,3,3,2\r\n7,2,99,0\r\n",
        "cross-subject.txt": "Training videos: \n0002-L, 0002-M, 0009-L, \n\nValidataion videos: \nA01N12-R\n",
        "ReadMe.txt": "Skeleton.7z: one file for each sequence",
        "cross_view_v2.txt": "Training videos:\n0009-L\nTest videos:\n0002-M\n",
    }


def test_pku_mmd(tmp_path):
    summary = pack.pack_source("pku-mmd", write(tmp_path / "src", pku_files()), tmp_path / "out", progress=False)
    dataset = open_dataset(tmp_path / "out", verify=True)
    assert dataset.names.tolist() == ["0002-L", "0002-M", "A01N12-R"] and dataset.num_bodies.tolist() == [1, 2, 2]
    np.testing.assert_array_equal(dataset.clip(0)[:, :1], poses(6, 1, 25).astype(np.float32))
    np.testing.assert_array_equal(dataset.clip(1), poses(5, 2, 25, 1).astype(np.float32))
    assert dataset.segments.tolist() == [[0, 50, 1, 3, 2], [0, 0, 2, 5, 1], [1, 3, 3, 3, 2], [1, 6, 2, 5, 0]]
    assert dataset.column("action", 0).tolist() == [-1, 50, 0, 0, 0, -1]
    assert dataset.column("video").tolist() == [2, 2, 112] and dataset.column("camera").tolist() == ["L", "M", "R"]
    assert dataset.class_names[50] == "writing" and len(dataset.class_names) == 51
    assert summary.notes == (
        ("0002-M", "segment of class 'check time from watch' starts at 3 and ends at 3"),
        ("0002-M", "segment of class 'cross hands in front', 2 to 99, is cut at the end, 5"),
        ("A01N12-R", "no labels in the source"),
    )
    assert summary.skipped == (("ReadMe.txt", "a description"),)
    # the list of views has nobody who trains here: the rule stays
    assert sorted(dataset.splits) == ["xsub"] and protocols(dataset) == ["xsub", "xview"]
    assert split(dataset, "xsub").train.tolist() == [0, 1] and split(dataset, "xsub").test.tolist() == [2]
    assert split(dataset, "xview").train.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("Skeleton/0002-L.txt", b"", "at least one frame"),
        ("Skeleton/0002-L.txt", rows(poses(2, 1, 25)), "150 numbers in every row, got 75 in line 1"),
        ("Skeleton/0002-L.txt", rows(poses(2, 2, 25))[:-60], r"150 numbers in every row, got \d+ in line 2"),
        ("Skeleton/0002-L.txt", rows(poses(2, 2, 25) * np.inf), "NaN or infinity in frame 0"),
        ("Skeleton/2-L.txt", rows(poses(1, 2, 25)), "named 0002-L.txt or A01N01-L.txt, got 2-L.txt"),
        ("Label/0002-L.txt", "52,1,2,1\n", "actions 1 to 51, .*got 52,1,2,1.0 in line 1"),
        ("Label/0002-L.txt", "1,-1,2,1\n", "frames from 0"),
        ("Label/0002-L.txt", "1,1,2,nan\n", "finite confidence"),
        ("Label/0002-L.txt", "1,1.5,2,1\n", "whole labels and frames, got 1.5"),
        ("Label/0002-L.txt", "1,2\n", "action id, start, end and confidence, got 2 numbers"),
        ("Label/0002-L.txt", "1,2,3,1\n1,2,3\n", "4 numbers in every row, got 3 in line 2"),
        ("Label/notes.txt", "1,2,3,1\n", "named like a recording, got notes.txt"),
        ("cross-subject.txt", "0002-L\n", "Training videos.*got '0002-L' in line 1"),
        ("cross-view.txt", "Training videos:\nzebra\n", "got 'zebra' in line 2"),
    ],
)
def test_bad_pku_mmd(tmp_path, name, data, message):
    files = {"Skeleton/0003-L.txt": rows(poses(2, 2, 25)), name: data}
    with pytest.raises(ValueError, match=rf"pack_source: file must be .*{message}.*{name}"):
        pack.pack_source("pku-mmd", write(tmp_path / "src", files), tmp_path / "out", progress=False)


def test_pku_labels_twice(tmp_path):
    files = {**pku_files(), "other labels/0002-L.txt": "1,2,3,1\n"}
    with pytest.raises(ValueError, match="only labels of its recording, got others of 0002-L"):
        pack.pack_source("pku-mmd", write(tmp_path / "src", files), tmp_path / "out", progress=False)


def test_an_empty_label_file_says_that_nothing_happens(tmp_path):
    files = {"Skeleton/0002-L.txt": rows(poses(2, 2, 25)), "Label/0002-L.txt": b""}
    summary = pack.pack_source("pku-mmd", write(tmp_path / "src", files), tmp_path / "out", progress=False)
    assert summary.notes == () and open_dataset(tmp_path / "out").segments is None


def test_genuine_pku_labels(data_dir, tmp_path):
    archive = np.load(data_dir / "pku_mmd" / "pku_mmd_v1_labels.npz", allow_pickle=False)
    videos, segments = archive["videos"].tolist(), archive["segments"]
    files = {}
    for number, video in enumerate(videos):
        chosen = segments[segments[:, 0] == number][:, 1:]
        lines = [",".join(map(str, row)) for row in chosen.tolist()]
        files[f"Label/{video}.txt"] = "\n".join(lines).encode()
    labels = pku_mmd.read_annotations(files).labels
    found = [[number, label + 1, *rest] for number, video in enumerate(videos) for label, *rest in labels[video]]
    assert np.array_equal(np.array(found), segments) and len(found) == 21_545
    # the one segment that ends before it starts is kept, and named
    backward = segments[segments[:, 3] <= segments[:, 2]]
    assert len(backward) == 1
    video = videos[int(backward[0, 0])]
    frames = (b"0 " * 149 + b"1\n") * int(segments[segments[:, 0] == backward[0, 0], 2:4].max())
    label = f"Label/{video}.txt"
    source = write(tmp_path / "src", {f"Skeleton/{video}.txt": frames, label: files[label]})
    summary = pack.pack_source("pku-mmd", source, tmp_path / "out", progress=False)
    assert [note for note in summary.notes if "starts at" in note[1]]
    assert len(check_dataset(open_dataset(tmp_path / "out")).of("empty-segment")) == 1


def test_splits_are_plain_json(tmp_path):
    pack.pack_source("pku-mmd", write(tmp_path / "src", pku_files()), tmp_path / "out", progress=False)
    assert json.loads((tmp_path / "out" / "splits.json").read_text()) == {"xsub": {"train": [0, 1], "test": [2]}}
