"""Protocols: the fields' rules on columns, split files, fractions and holdouts."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fastskel import data
from fastskel.data import pack
from fastskel.data.packed import open_dataset
from fastskel.data.protocols import NTU_TRAIN_SUBJECTS, holdout, protocols, semi, split

NUM = 24


def dataset_of(tmp_path, source="custom", **columns):
    rng = np.random.default_rng(0)
    return pack.pack_arrays(
        list(rng.normal(size=(NUM, 2, 1, 15, 3))),
        topology="sbu-15",
        out=tmp_path / "set",
        names=[f"c{number}" for number in range(NUM)],
        labels=[number % 3 for number in range(NUM)],
        columns=columns,
        source=source,
    )


NUMBERS = np.arange(NUM)
RULES = {
    ("utd-mhad", "xsub"): ({"subject": NUMBERS % 8 + 1}, NUMBERS % 2 == 0),
    ("nw-ucla", "xview"): ({"camera": NUMBERS % 3 + 1}, NUMBERS % 3 != 2),
    ("nw-ucla", "xsub"): ({"subject": NUMBERS % 12 + 1}, NUMBERS % 12 != 9),
    ("nw-ucla", "xsub:3"): ({"subject": NUMBERS % 12 + 1}, NUMBERS % 12 != 2),
    ("ntu-60", "xview"): ({"camera": NUMBERS % 3 + 1}, NUMBERS % 3 != 0),
    ("ntu-60", "xsub"): ({"subject": NUMBERS + 20}, np.isin(NUMBERS + 20, [25, 27, 28, 31, 34, 35, 38])),
    ("ntu-120", "xsub"): ({"subject": NUMBERS + 38}, np.isin(NUMBERS + 38, NTU_TRAIN_SUBJECTS)),
    ("ntu-120", "xset"): ({"setup": NUMBERS + 1}, NUMBERS % 2 == 1),
    # of classes 0, 1 and 2 only the first is novel
    ("ntu-120", "one-shot"): ({}, NUMBERS % 3 != 0),
    ("utd-mhad", "one-shot"): ({}, NUMBERS % 3 != 0),
    ("nw-ucla", "one-shot"): ({}, NUMBERS % 3 != 0),
    ("pku-mmd", "xview"): ({"camera": np.array(list("LMR") * 8)}, NUMBERS % 3 != 0),
}


@pytest.mark.parametrize(("source", "protocol"), list(RULES), ids=["/".join(rule) for rule in RULES])
def test_rules(tmp_path, source, protocol):
    columns, expected = RULES[source, protocol]
    parts = split(dataset_of(tmp_path, source, **columns), protocol)
    assert parts.train.tolist() == np.flatnonzero(expected).tolist()
    assert parts.test.tolist() == np.flatnonzero(~expected).tolist()
    assert parts.train.dtype == parts.test.dtype == np.int64


def test_ntu_subjects():
    assert len(set(NTU_TRAIN_SUBJECTS)) == 53 and sum(subject <= 40 for subject in NTU_TRAIN_SUBJECTS) == 20
    assert max(NTU_TRAIN_SUBJECTS) <= 106


def test_clean_leaves_repeated_clips_out(tmp_path):
    clips = np.random.default_rng(0).normal(size=(6, 2, 1, 15, 3))
    clips[4] = clips[1]
    camera = [1, 2, 1, 3, 3, 3]
    dataset = pack.pack_arrays(
        clips, topology="sbu-15", out=tmp_path / "set", columns={"camera": camera}, source="nw-ucla"
    )
    assert split(dataset, "xview").test.tolist() == [3, 4, 5]
    clean = split(dataset, "xview-clean")
    assert clean.train.tolist() == [0, 1, 2] and clean.test.tolist() == [3, 5]


def test_splits_json_comes_before_rules(tmp_path):
    dataset = dataset_of(tmp_path, "utd-mhad", subject=NUMBERS % 8 + 1)
    dataset = replace(dataset, splits={"xsub": {"train": np.array([3, 1]), "test": np.array([2])}})
    parts = split(dataset, "xsub")
    assert parts.train.tolist() == [1, 3] and parts.test.tolist() == [2]
    assert protocols(dataset) == ["one-shot", "xsub"]


def test_pku_subjects_come_from_a_list(tmp_path):
    dataset = dataset_of(tmp_path, "pku-mmd", camera=np.array(list("LMR") * 8))
    with pytest.raises(ValueError, match=r"as a list, not as a rule, in .*set.*split_file"):
        split(dataset, "xsub")
    (tmp_path / "s.json").write_text(json.dumps({"train": ["c0", "c2"], "test": [1]}))
    assert split(dataset, "xsub", tmp_path / "s.json").train.tolist() == [0, 2]


def test_split_files(tmp_path):
    dataset = dataset_of(tmp_path)
    (tmp_path / "train.txt").write_text("c3\nc1\n\n")
    (tmp_path / "test.txt").write_text("c2\r\n")
    parts = split(dataset, "mine", (tmp_path / "train.txt", tmp_path / "test.txt"))
    assert parts.train.tolist() == [1, 3] and parts.test.tolist() == [2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "unreadable JSON"),
        ("[]", "no lists under train and test"),
        ('{"train": [0]}', "no lists under train and test"),
        ('{"train": [0], "test": ["zebra"]}', "the clip 'zebra'"),
        ('{"train": [0], "test": [24]}', "the clip 24"),
        ('{"train": [0], "test": [true]}', "the clip True"),
        ('{"train": [0, "c0"], "test": [1]}', "'c0' twice"),
        ('{"train": [0], "test": [0]}', "'c0' in both parts"),
        ('{"train": [0], "test": []}', "an empty test part"),
    ],
)
def test_bad_split_files(tmp_path, content, message):
    dataset = dataset_of(tmp_path)
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(ValueError, match=rf"split: .*{message}.*, in .*(s\.json|set)"):
        split(dataset, "mine", tmp_path / "s.json")


def test_missing_split_file(tmp_path):
    with pytest.raises(ValueError, match=r"split: .*No such file.*s\.json"):
        split(dataset_of(tmp_path), "mine", tmp_path / "s.json")


def test_unknown_protocol_lists_the_known(tmp_path):
    dataset = dataset_of(tmp_path, "nw-ucla", camera=NUMBERS % 3 + 1, subject=NUMBERS % 10 + 1)
    for wrong in ("xveiw", "xview:3", "xsub:ten"):
        with pytest.raises(ValueError, match=r"\(one-shot, xsub, xview, xview-clean\), got"):
            split(dataset, wrong)


def test_missing_column_and_empty_part(tmp_path):
    dataset = dataset_of(tmp_path, "utd-mhad", repetition=NUMBERS)
    with pytest.raises(ValueError, match="must be of repetition, got 'subject'"):
        split(dataset, "xsub")
    meta = {**dataset.meta, "columns": {"subject": "clip"}}
    odd = replace(dataset, columns={"subject": NUMBERS * 2 + 1}, meta=meta)
    with pytest.raises(ValueError, match="an empty test part"):
        split(odd, "xsub")


def test_the_package_offers_the_subsets():
    assert {"holdout", "semi"} <= set(data.__all__)
    assert data.holdout is holdout and data.semi is semi


@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_semi(fraction):
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    train = np.arange(0, 100, 1)
    chosen = semi(train, labels, fraction, 3)
    np.testing.assert_array_equal(chosen, semi(train, labels, fraction, 3))
    assert len(np.unique(chosen)) == len(chosen) == int(100 * fraction) and np.isin(chosen, train).all()
    if fraction < 1:
        assert chosen.tolist() != semi(train, labels, fraction, 4).tolist()


def test_semi_refuses_fractions_that_leave_nothing():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    with pytest.raises(ValueError, match="at least one of 100 clips"):
        semi(np.arange(100), labels, 0.001, 0)
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\], got 0"):
        semi(np.arange(100), labels, 0, 0)


def test_semi_leaves_unknown_labels_out():
    labels = np.repeat([0, -1, 1], [40, 50, 10])
    chosen = semi(np.arange(100), labels, 0.5, 0)
    assert len(chosen) == 25 and not (labels[chosen] == -1).any()
    # as if the clips without a label were not there
    known = np.flatnonzero(labels != -1)
    np.testing.assert_array_equal(chosen, semi(known, labels, 0.5, 0))
    with pytest.raises(ValueError, match="at least one of 0 clips with a label"):
        semi(np.arange(40, 90), labels, 0.5, 0)


def test_holdout_takes_whole_subjects(tmp_path):
    subjects = NUMBERS % 6
    dataset = dataset_of(tmp_path, subject=subjects, phase=[np.arange(2)] * NUM)
    train = np.flatnonzero(subjects < 5)
    parts = holdout(dataset, train, fraction=0.4, seed=1)
    assert sorted([*parts.train, *parts.test]) == train.tolist()
    assert not set(subjects[parts.train]) & set(subjects[parts.test]) and len(set(subjects[parts.test])) == 2
    assert holdout(dataset, train, values=[0, 3]).test.tolist() == np.flatnonzero(np.isin(subjects, [0, 3])).tolist()
    with pytest.raises(ValueError, match=r"\[5\], not in \[0, 1, 2, 3, 4\]"):
        holdout(dataset, train, values=[5])
    with pytest.raises(ValueError, match="an empty train part"):
        holdout(dataset, train, values=[0, 1, 2, 3, 4])
    with pytest.raises(ValueError, match="one value per frame"):
        holdout(dataset, train, column="phase")
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\)"):
        holdout(dataset, train, fraction=1.0)


@pytest.mark.parametrize(
    ("source", "archive", "sizes"),
    [
        ("utd-mhad", "utd_mhad/utd_mhad_skeleton_mat.tar.xz", {"xsub": (431, 430), "one-shot": (573, 288)}),
        (
            "nw-ucla",
            "nw_ucla/nw_ucla_json.tar.xz",
            {"xview": (1020, 464), "xview-clean": (1020, 369), "xsub": (1336, 148), "one-shot": (877, 607)},
        ),
    ],
)
def test_real_sizes(tmp_path, data_dir, source, archive, sizes):
    pack.pack_source(source, data_dir / archive, tmp_path / "set", progress=False)
    dataset = open_dataset(tmp_path / "set")
    for protocol, expected in sizes.items():
        parts = split(dataset, protocol)
        assert (len(parts.train), len(parts.test)) == expected
