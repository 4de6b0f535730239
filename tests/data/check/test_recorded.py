"""What the check finds in recorded data whose defects are known."""

from __future__ import annotations

import re
import tarfile

import numpy as np

from fastskel.data import check_dataset, open_dataset, pack_arrays, pack_source, split
from fastskel.data.synthetic import synthetic_motion


def test_nw_ucla(data_dir, tmp_path):
    pack_source("nw-ucla", data_dir / "nw_ucla" / "nw_ucla_json.tar.xz", tmp_path / "ucla", progress=False)
    dataset = open_dataset(tmp_path / "ucla")
    report = check_dataset(dataset, protocol="xview")
    leaked = report.of("leaked-clip")
    # found another way: the protocol that leaves them out
    expected = np.setdiff1d(split(dataset, "xview").test, split(dataset, "xview-clean").test)
    assert len(leaked) == 95
    assert sorted(finding.clip for finding in leaked) == expected.tolist()
    for finding in leaked:
        assert finding.name.endswith("_v03")
        assert finding.detail == f"repeats training clip {finding.name[:-4]}_v02 (xview)"
    assert report.at_least("error") == leaked
    assert sorted(finding.name for finding in report.of("one-frame")) == ["a02_s09_e04_v02", "a02_s09_e04_v03"]
    # shared stretches are bit for bit the same
    for finding in report.of("near-duplicate"):
        ((start, end),) = finding.frames
        name, first = re.search(r"frames of (\S+) from frame (\d+)", finding.detail).groups()
        other = dataset.clip(dataset.index_of(name))[int(first) :][: end - start]
        np.testing.assert_array_equal(dataset.clip(finding.clip)[start:end], other)
    # recorded data of a difficult sensor: few clips are worth a look
    assert len({finding.clip for finding in report.at_least("warning")} - set(expected.tolist())) < 0.05 * len(dataset)
    assert check_dataset(dataset, protocol="xview-clean").of("leaked-clip") == []


def test_utd_mhad(data_dir, tmp_path):
    source = data_dir / "utd_mhad" / "utd_mhad_skeleton_mat.tar.xz"
    pack_source("utd-mhad", source, tmp_path / "utd", progress=False)
    report = check_dataset(open_dataset(tmp_path / "utd"))
    assert report.at_least("error") == []
    # in five clips a wrist jumps by a metre within a thirtieth of a second
    assert {finding.kind for finding in report.at_least("warning")} == {"teleport"}
    assert len(report.of("teleport")) == 5


def utkinect_files(data_dir):
    with tarfile.open(data_dir / "utkinect" / "utkinect_joints_txt.tar.xz") as archive:
        return {
            member.name.split("/")[-1]: archive.extractfile(member).read().decode()
            for member in archive.getmembers()
            if member.isfile()
        }


def test_utkinect(data_dir, tmp_path):
    files = utkinect_files(data_dir)
    names = sorted(re.findall(r"joints_(s\d+_e\d+)\.txt", " ".join(files)))
    rows = [np.loadtxt(files[f"joints_{name}.txt"].splitlines()) for name in names]
    segments, current, classes = [], "", {}
    for line in files["actionLabel_modified.txt"].splitlines():
        if re.fullmatch(r"s\d+_e\d+", line.strip()):
            current = line.strip()
        elif ":" in line and "NaN" not in line:
            action, span = line.split(":")
            label = classes.setdefault(action.strip(), len(classes))
            # frame numbers, the last one included, to rows
            first, last = (float(number) for number in span.split())
            numbers = np.maximum.accumulate(rows[names.index(current)][:, 0])
            start, end = int(np.searchsorted(numbers, first)), int(np.searchsorted(numbers, last, side="right"))
            segments.append((names.index(current), label, start, end))
    dataset = pack_arrays(
        [values[:, 1:].reshape(-1, 1, 20, 3) for values in rows],
        topology="kinect-20-ucla",
        out=tmp_path / "utkinect",
        names=names,
        columns={"frame_id": [values[:, 0] for values in rows]},
        segments=segments,
        class_names=list(classes),
        num_frames=[len(values) for values in rows],
    )
    report = check_dataset(dataset)
    overlaps = {
        (one[0], max(one[2], other[2]))
        for number, one in enumerate(segments)
        for other in segments[:number]
        if one[0] == other[0] and one[2] < other[3] and other[2] < one[3]
    }
    assert len(overlaps) == 7
    assert {(f.clip, f.frames[0][0]) for f in report.of("overlapping-segments")} == overlaps
    # rows of a frame that is there already
    repeats = {name: int((np.diff(values[:, 0]) <= 0).sum()) for name, values in zip(names, rows)}
    assert sum(repeats.values()) == 542
    assert {f.name: f.num_frames for f in report.of("repeated-frame-ids")} == repeats
    assert report.at_least("error") == []


def test_pku_mmd(data_dir, tmp_path):
    with np.load(data_dir / "pku_mmd" / "pku_mmd_v1_labels.npz") as archive:
        videos, segments = archive["videos"], archive["segments"].astype(np.int64)
    # starts and ends by rank within their video: order and overlap stay, and a few frames are enough
    lengths = np.ones(len(videos), int)
    for video in range(len(videos)):
        own = segments[:, 0] == video
        values, ranks = np.unique(segments[own, 2:4], return_inverse=True)
        segments[own, 2:4] = ranks.reshape(-1, 2)
        lengths[video] = max(len(values), 2)
    pose = synthetic_motion(1).clips[0][:1]
    draw = np.random.default_rng(0)
    folder = tmp_path / "pku"
    clips = [(pose + 0.01 * draw.normal(size=(length, 1, 25, 3))).astype("f4") for length in lengths]
    pack_arrays(clips, topology="ntu-25", out=folder, names=videos.tolist())
    np.save(folder / "segments.npy", segments.astype(np.float64))
    report = check_dataset(open_dataset(folder))
    (found,) = report.of("empty-segment")
    assert (found.name, found.severity) == (str(videos[123]), "error")
    assert report.of("overlapping-segments") == []
