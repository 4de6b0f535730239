"""Targets that are no format: pickles, skeletons, lists that a user names, archives, packed data sets, split files."""

from __future__ import annotations

import functools
import gzip
import io
import json
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from checks import need
from harness import Case, Target, add, write_case
from mutators import pickled
from numpy.random import Generator
from seeds import labels_text, layout_file, npy_of, nw_ucla, whole_folder

from fastskel.data import make_synthetic, open_dataset, pack_arrays, pack_source
from fastskel.data.formats.ntu import NtuOptions
from fastskel.data.formats.plain import PlainOptions
from fastskel.data.formats.plain_pickle import load_pickle
from fastskel.data.protocols import protocols, split
from fastskel.data.topology_file import named_or_read_topology, topology_from_json, topology_to_json
from fastskel.skeleton import topology

_PLAIN = (bool, int, float, str, bytes, memoryview, type(None), np.ndarray, np.generic)


def pickle_seeds(draw: Generator) -> list[Case]:
    trees: list[Any] = [
        [0, -1, 255, 70000, 2**62, 2.5, True, None, "é", "x" * 300, b"abc", (1,), (1, 2, 3, 4), {"a": [1]}, {3}, frozenset("f")],
        {"array": np.arange(6.0).reshape(2, 3), "order": np.asfortranarray(np.ones((2, 2), "f2")), "text": np.array(["a", "bc"])},
        [np.float32(1.5), np.int64(3), np.zeros((0, 2)), np.array([1, 2], ">i4"), np.array([None, "a"], object)],
    ]
    shared = [1, 2]
    return [{"some.pkl": pickled(tree, protocol)} for tree in (*trees, [shared, shared, (shared,)]) for protocol in range(6)]


def read_pickle(case: Case, folder: Path, packing: bool) -> tuple[object, ...]:
    write_case(case, folder)
    value = load_pickle(folder / "some.pkl")
    kinds: set[str] = set()
    seen: set[int] = set()
    left = [value]
    while left:
        item = left.pop()
        # opcodes can put a list into itself
        if isinstance(item, (list, tuple, dict, set, frozenset)):
            if id(item) not in seen:
                seen.add(id(item))
                left += [*item.keys(), *item.values()] if isinstance(item, dict) else item
        else:
            need(isinstance(item, _PLAIN) or type(item).__module__ != "builtins", f"a value of type {type(item)}")
            kinds.add(type(item).__name__)
            if isinstance(item, np.ndarray):
                # as the bytes of the file, or text of Latin-1 that it was in
                need(not item.dtype.hasobject and item.nbytes <= len(case["some.pkl"]), f"array {item.dtype} {item.shape}")
                item.tobytes()
    return ("pickle", *sorted(kinds))


def topology_seeds(draw: Generator) -> list[Case]:
    own = json.dumps({**topology_to_json(topology("ntu-25")), "name": "mine"}).encode()
    return [{"layout.json": layout_file()}, {"layout.json": own}]


def read_topology(case: Case, folder: Path, packing: bool) -> tuple[object, ...]:
    write_case(case, folder)
    layout, from_file = named_or_read_topology(str(folder / "layout.json"))
    need(from_file and layout.num_joints == len(layout.joints), "layout")
    for tree in layout.bones.values():
        need(len(tree) == layout.num_joints and all(0 <= parent < layout.num_joints for parent in tree), f"parents {tree}")
    again = topology_from_json(json.loads(json.dumps(topology_to_json(layout))), "again")
    need(again == layout, "a layout that is another when written and read again")
    return ("topology", layout.num_joints)


def missing_seeds(draw: Generator) -> list[Case]:
    return [{"missing.txt": b"These have no skeletons:\nS001C002P005R002A008\nS001C002P006R001A008\n"}]


def read_missing(case: Case, folder: Path, packing: bool) -> tuple[object, ...]:
    write_case(case, folder)
    names = NtuOptions(missing=folder / "missing.txt").missing_names
    need(len(names) >= 1 and all(len(name) == 20 for name in names), f"names {sorted(names)[:3]}")
    return ("missing", len(names))


def label_seeds(draw: Generator) -> list[Case]:
    return [{"labels.csv": labels_text([("one", "walk"), ('t"wo, too', "ru\nn"), ("three", "é")])}]


def read_labels(case: Case, folder: Path, packing: bool) -> tuple[object, ...]:
    write_case(case, folder)
    options = PlainOptions(topology="sbu-15", labels=str(folder / "labels.csv"))
    for name in options.classes:
        need(bool(options.classes[name]) and bool(name), "an empty class")
    return ("labels", len(options.classes))


def archive_seeds(draw: Generator) -> list[Case]:
    files = {f"data/{name}": content for case in nw_ucla(draw)[:1] for name, content in case.items()}
    files |= {"README.md": b"about", "data/notes.txt": b"x"}
    archive, zipped = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("data/a02_s01_e01_v01.json")
        link.type, link.linkname = tarfile.SYMTYPE, "../../etc/passwd"
        tar.addfile(link)
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in files.items():
            out.writestr(name, content)
    return [{"all.tar": archive.getvalue()}, {"all.tar.gz": gzip.compress(archive.getvalue(), 1)}, {"all.zip": zipped.getvalue()}]


def read_archive(case: Case, folder: Path, packing: bool) -> tuple[object, ...]:
    write_case(case, folder)
    path = folder / min(case)
    summary = pack_source("nw-ucla", path, folder / "packed", progress=False)
    open_dataset(folder / "packed")
    return ("archive", path.suffix, summary.clips, len(summary.skipped))


def packed_seeds(draw: Generator) -> list[Case]:
    cases = []
    with tempfile.TemporaryDirectory() as scratch:
        make_synthetic(Path(scratch) / "a", num_clips=3, num_classes=2, num_subjects=2)
        names = np.array(["x", "yy"])
        pack_arrays(
            list(draw.normal(size=(2, 3, 2, 15, 3))), out=Path(scratch) / "b", topology="sbu-15", names=names, labels=[0, 1],
            columns={"subject": [1, 2], "id": [np.arange(3), np.arange(3)], "who": names}, segments=[(0, 0, 0, 2), (1, 1, 1, 3)],
            class_names=["p", "q"], splits={"xsub": {"train": [0], "test": [1]}},
        )  # fmt: skip
        cases += [whole_folder(Path(scratch) / name) for name in "ab"]
        own = topology_to_json(topology("sbu-15")) | {"name": "own"}
        meta = cases[1]["meta.json"].replace(b'"sbu-15"', b'"own"')
        cases.append({**cases[1], "topology.json": json.dumps(own).encode(), "meta.json": meta})
    return cases


def read_packed(case: Case, folder: Path, packing: bool) -> tuple[object, ...]:
    write_case(case, folder)
    dataset = open_dataset(folder, verify=packing)
    for number in range(len(dataset)):
        clip = dataset.clip(number)
        need(clip.dtype == np.float32 and clip.ndim == 4 and len(clip) == dataset.num_frames[number], f"clip {number}")
        clip.tobytes()
        for name in dataset.columns:
            values = dataset.column(name, number)
            need(values.shape == ((len(clip),) if dataset.per_frame(name) else ()), f"column {name} of {values.shape}")
    known = protocols(dataset)
    for protocol in known:
        parts = split(dataset, protocol)
        need(len(parts.train) > 0 and len(parts.test) > 0, f"an empty part of {protocol}")
    return ("packed", len(dataset), len(dataset.columns), dataset.segments is None, len(known))


def array_seeds(draw: Generator) -> list[Case]:
    clips = (draw.normal(size=(3, 2, 15, 3)).astype(np.float32), np.asfortranarray(draw.integers(0, 9, (2, 1, 15, 2))))
    return [{"a.npy": npy_of(clip)} for clip in clips]


def read_arrays(case: Case, folder: Path, packing: bool) -> tuple[object, ...]:
    write_case(case, folder)
    dataset = pack_arrays([folder / "a.npy"], out=folder / "packed", topology="sbu-15")
    need(bool(np.isfinite(dataset.frames).all()), "frames that are not finite")
    return ("arrays", dataset.channels)


def split_seeds(draw: Generator) -> list[Case]:
    files = ({"train": ["x"], "test": ["yy"]}, {"train": [0], "test": [1]})
    return [{"split.json": json.dumps(file).encode()} for file in files]


@functools.cache
def sound_data() -> Case:
    """A packed data set of two clips."""
    return packed_seeds(np.random.default_rng(0))[1]


def read_split(case: Case, folder: Path, packing: bool) -> tuple[object, ...]:
    write_case({**sound_data(), **case}, folder)
    parts = split(open_dataset(folder), "", folder / "split.json")
    need(sorted([*parts.train, *parts.test]) == [0, 1], f"parts {parts}")
    return ("split", len(parts.train))


add(Target("pickle", pickle_seeds, read_pickle))
add(Target("topology-file", topology_seeds, read_topology))
add(Target("missing-list", missing_seeds, read_missing))
add(Target("labels-csv", label_seeds, read_labels))
add(Target("archive", archive_seeds, read_archive))
add(Target("pack-arrays", array_seeds, read_arrays))
add(Target("packed", packed_seeds, read_packed))
add(Target("split-file", split_seeds, read_split))
