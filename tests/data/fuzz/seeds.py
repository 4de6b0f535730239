"""Small genuine-looking inputs of every format, made from a fixed generator; see harness.py for how to add one."""

from __future__ import annotations

import csv
import io
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from checks import read_prepared, read_source
from harness import Case, Target, add
from mutators import pickled
from numpy.random import Generator

from fastskel.data.formats import FORMATS

Seeds = Callable[[Generator], list[Case]]
_LAYOUT = {"name": "own", "joints": ["hip", "left_knee", "right_knee"], "parents": [0, 0, 0]}


def seeds_of(name: str, *, file: str = "", variant: str = "", **options: Any) -> Callable[[Seeds], Seeds]:
    """Make a format a target.

    Args:
        name: Format in `FORMATS` or `PREPARED`.
        file: Of a prepared format, the file of a case that a user names; "" for the folder.
        variant: What tells targets of one format apart.
        options: What a user chooses.
    """

    def register(seeds: Seeds) -> Seeds:
        raw = name in FORMATS
        read = partial(read_source, name, options) if raw else partial(read_prepared, name, file, options)
        add(Target("-".join(word for word in (name, variant) if word), seeds, read, name, renames=raw))
        return seeds

    return register


def text_of(rows: np.ndarray, separator: str = " ", form: str = "{:.5g}") -> bytes:
    return "".join(separator.join(form.format(value) for value in row) + "\n" for row in rows).encode()


def npy_of(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def skeleton_text(draw: Generator, num_frames: int, num_joints: int, ids: tuple[int, ...]) -> bytes:
    """Text of the kind of NTU RGB+D: frames, bodies, ten numbers of a body, twelve of a joint."""
    lines = [str(num_frames)]
    for frame in range(num_frames):
        here = ids[: 1 + (frame + len(ids)) % (len(ids) + 1)]
        lines.append(str(len(here)))
        for identity in here:
            lines += [f"{identity} 0 1 1 1 1 0 0.2 -0.1 2", str(num_joints)]
            lines += [" ".join(f"{value:.4f}" for value in draw.normal(size=11)) + " 2" for _ in range(num_joints)]
    return ("\r\n".join(lines) + "\r\n").encode()


def ntu(draw: Generator) -> list[Case]:
    name = "S001C002P003R002A{:03}.skeleton"
    return [
        {name.format(8): skeleton_text(draw, 3, 25, (72057594037931691,))},
        {name.format(60): skeleton_text(draw, 4, 25, (7, 72057594037931691, 5))},
        {name.format(13): b"0\r\n"},
        {name.format(50): skeleton_text(draw, 14, 25, (1, 2)).replace(b"\r", b"")},
    ]


seeds_of("ntu60")(ntu)
seeds_of("ntu120", variant="denoised", bodies=1, denoise=("length", "spread", "motion"), join=True)(ntu)


@seeds_of("uav-human")
def uav_human(draw: Generator) -> list[Case]:
    name = "P000S00G10B10H10UC022000LC021000A000R0_08241716.txt"
    return [{name: skeleton_text(draw, 3, 17, ids)} for ids in ((0,), (1, 2), (0, 0))]


@seeds_of("sbu")
def sbu(draw: Generator) -> list[Case]:
    rows = [np.column_stack([np.arange(1, frames + 1), draw.uniform(size=(frames, 90))]) for frames in (1, 4)]
    return [{f"s01s02/0{1 + number}/001/skeleton_pos.txt": text_of(row, ",") for number, row in enumerate(rows)}]


@seeds_of("utkinect")
def utkinect(draw: Generator) -> list[Case]:
    rows = np.column_stack([[252, 254, 254, 258, 260, 262], draw.normal(size=(6, 60))])
    labels = b"s01_e01\nwalk: 252 254\nsitDown: 258 262 \ncarry: NaN NaN\ns01_e02\nthrow: 1 2\n"
    joints = {"joints/joints_s01_e01.txt": text_of(rows, "  ")}
    return [joints, {**joints, "actionLabel.txt": labels}, {**joints, "actionLabel.txt": b"", "actionLabel_modified.txt": labels}]


@seeds_of("pku-mmd")
def pku_mmd(draw: Generator) -> list[Case]:
    rows = draw.normal(size=(5, 150))
    rows[2:, 75:] = 0
    skeleton = {"PKU_Skeleton/0002-L.txt": text_of(rows), "PKU_Skeleton/A01N01-R.txt": text_of(rows[:2])}
    lists = b"Training videos:\n0002-L, 0003-M\n\nValidataion videos:\nA01N01-R, 0009-R\n"
    return [
        skeleton,
        {**skeleton, "Label_PKU/0002-L.txt": b"3,0,2,1\n51,2,5,2\n7,4,3,1\n", "Label_PKU/A01N01-R.txt": b""},
        {**skeleton, "Label_PKU/0002-L.txt": b"3,0,2\n", "Split/cross-subject.txt": lists, "Split/cross-view_v2.txt": lists},
    ]


@seeds_of("kinetics-skeleton")
def kinetics(draw: Generator) -> list[Case]:
    def person() -> dict[str, list[float]]:
        return {"pose": draw.uniform(size=36).round(3).tolist(), "score": draw.uniform(size=18).round(3).tolist()}

    cases = []
    for persons in ((1, 0, 2), (1,), (0, 0)):
        frames = [
            {"frame_index": 1 + 2 * number, "skeleton": [person() for _ in range(here)]} for number, here in enumerate(persons)
        ]
        content = {"data": frames, "label": "arm wrestling", "label_index": 6}
        cases.append({"kinetics_val/-2OF9BHqLyk.json": json.dumps(content).encode()})
    return [*cases, {**cases[0], "kinetics_val_label.json": b"{}"}]


@seeds_of("nw-ucla")
def nw_ucla(draw: Generator) -> list[Case]:
    skeletons = [draw.normal(size=(frames, 20, 3)).round(3).tolist() for frames in (1, 3)]
    return [{"a01_s02_e03_v01.json": json.dumps({"skeletons": clip, "label": 1}).encode()} for clip in skeletons]


def matlab_element(kind: int, data: bytes) -> bytes:
    if 0 < len(data) <= 4:
        return struct.pack("<HH", kind, len(data)) + data.ljust(4, b"\0")
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def matlab_of(variables: Mapping[str, np.ndarray | str], compress: bool) -> bytes:
    """A MATLAB 5 file of doubles, bytes and rows of text."""
    elements = [b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"]
    for name, value in variables.items():
        if isinstance(value, str):
            kind, shape, content = 4, (1, len(value)), matlab_element(4, value.encode("utf-16-le"))
        else:
            kind, code = (6, 9) if value.dtype == np.float64 else (9, 2)
            shape, content = value.shape, matlab_element(code, value.tobytes(order="F"))
        parts = [struct.pack("<II", kind, 0), np.array(shape, "<i4").tobytes(), name.encode()]
        matrix = b"".join(matlab_element(code, part) for code, part in zip((6, 5, 1), parts)) + content
        matrix = matlab_element(14, matrix)
        packed = zlib.compress(matrix)
        elements.append(struct.pack("<II", 15, len(packed)) + packed if compress else matrix)
    return b"".join(elements)


@seeds_of("utd-mhad")
def utd_mhad(draw: Generator) -> list[Case]:
    clips = [draw.normal(size=(20, 3, 4)), draw.normal(size=(20, 3)), draw.integers(0, 9, (20, 3, 2)).astype(np.uint8)]
    return [{"a7_s2_t1_skeleton.mat": matlab_of({"d_skel": clip}, number != 1)} for number, clip in enumerate(clips)]


@seeds_of("penn-action")
def penn_action(draw: Generator) -> list[Case]:
    variables = {
        "action": "bowl", "x": draw.uniform(0, 480, (3, 13)), "y": draw.uniform(0, 270, (3, 13)),
        "visibility": draw.integers(0, 2, (3, 13)).astype(np.uint8), "train": np.ones((1, 1)), "pose": "left",
    }  # fmt: skip
    return [{"0001.mat": matlab_of(variables, compress)} for compress in (False, True)]


@seeds_of("npy", topology="sbu-15", labels="folder")
def plain_npy(draw: Generator) -> list[Case]:
    clips = [
        draw.normal(size=(3, 15, 3)).astype(np.float32), np.asfortranarray(draw.normal(size=(2, 2, 15, 3))),
        draw.integers(0, 99, (2, 15, 3)).astype(">i2"), draw.normal(size=(2, 1, 15, 3)).astype(np.float16),
    ]  # fmt: skip
    return [{"walk/one.npy": npy_of(clip), "run/two.npy": npy_of(clips[0])} for clip in clips]


@seeds_of("json", topology="sbu-15", labels="folder")
def plain_json(draw: Generator) -> list[Case]:
    single, double = draw.normal(size=(2, 15, 3)).round(2).tolist(), draw.integers(0, 9, (2, 2, 15, 3)).tolist()
    return [{"walk/one.json": json.dumps(single).encode()}, {"run/two.json": json.dumps({"frames": double, "fps": 30}).encode()}]


@seeds_of("csv", topology="sbu-15", channels=("x", "y"))
def plain_csv(draw: Generator) -> list[Case]:
    rows = draw.normal(size=(3, 30)).round(3)
    title = ";".join(f"x{joint};y{joint}" for joint in range(15)) + "\n"
    return [
        {"one.csv": text_of(rows, ",")},
        {"two.csv": title.encode() + text_of(np.hstack([rows, rows]), ";").replace(b";x", b"")},
        {"three.csv": text_of(rows, "\t").replace(b"\n", b"\r\n"), "four.csv": text_of(rows)},
    ]


def prepared_clips(draw: Generator, joints: int = 25) -> np.ndarray:
    """Three clips, (N, C, T, V, M), float32, zero behind their ends."""
    clips = draw.normal(size=(3, 3, 6, joints, 2)).astype(np.float32)
    for number in range(3):
        clips[number, :, 2 * number + 1 :] = 0
    return clips


@seeds_of("agcn", dataset="ntu60")
def agcn(draw: Generator) -> list[Case]:
    names = [f"S001C00{1 + number}P001R001A00{1 + number}.skeleton" for number in range(3)]
    clips = npy_of(prepared_clips(draw))
    labels = [pickled((names, [0, 1, 59]), 2), pickled(([f"val-{name}" for name in names], np.array([0, 1, 2])), 5)]
    counts = npy_of(np.array([1, 3, 5]))
    return [
        {"train_data_joint.npy": clips, "train_label.pkl": labels[0], "train_num_frame.npy": counts},
        {"train_data.npy": clips, "train_label.pkl": labels[0], "val_data.npy": clips, "val_label.pkl": labels[1]},
        {"test_data_joint.npy": clips, "test_label.npy": counts, "test_num_of_frames.npy": counts},
        {"val_data.npy": npy_of(prepared_clips(draw, 18)), "val_label.npy": counts},
    ]


@seeds_of("ctr-gcn", file="NTU60_CS.npz")
def ctr_gcn(draw: Generator) -> list[Case]:
    rows = prepared_clips(draw).transpose(0, 2, 4, 3, 1).reshape(3, 6, -1)
    cases = []
    for save, labels in ((np.savez, np.eye(60)[[3, 0, 59]]), (np.savez_compressed, np.array([1, 2, 3]))):
        stream = io.BytesIO()
        save(stream, x_train=rows, y_train=labels, x_test=rows[:1], y_test=labels[:1])
        cases.append({"NTU60_CS.npz": stream.getvalue()})
    return cases


def pyskl_annotation(draw: Generator, name: str, label: int, shape: tuple[int, ...], flat: bool) -> dict[str, Any]:
    annotation: dict[str, Any] = {"frame_dir": name, "label": label, "total_frames": shape[1]}
    annotation["keypoint"] = draw.uniform(0, 300, shape).astype(np.float16 if flat else np.float32)
    if flat:
        annotation |= {"keypoint_score": draw.uniform(size=shape[:3]).astype(np.float16), "img_shape": (1080, 1920)}
        annotation["original_shape"] = (1080, 1920)
    return annotation


@seeds_of("pyskl", file="all.pkl", dataset="ntu120")
def pyskl(draw: Generator) -> list[Case]:
    names = [f"S001C001P00{number}R001A001" for number in range(3)]
    trees: list[Any] = []
    for flat in (False, True):
        shape = (1, 3, 17, 2) if flat else (2, 3, 25, 3)
        found = [pyskl_annotation(draw, name, number, shape, flat) for number, name in enumerate(names)]
        trees += [{"split": {"xsub_train": names[:2], "xsub_val": names[2:], "test1": []}, "annotations": found}, found[:1]]
    empty = {"filename": "a", "keypoint": np.zeros((0, 3, 17, 2), "f4"), "label": 0}
    trees.append({"split": {"train": ["a", "b"]}, "annotations": [empty, trees[3][0]]})
    return [{"all.pkl": pickled(tree, protocol)} for protocol, tree in zip((4, 2, 5, 0, 3), trees)]


@seeds_of("pyskl", file="all.pkl", variant="usdrl", third="zero", usdrl_scaling=True)
def pyskl_flat(draw: Generator) -> list[Case]:
    found = [pyskl_annotation(draw, f"clip{number}", number, (1 + number, 2, 17, 2), True) for number in range(2)]
    return [{"all.pkl": pickled({"split": {}, "annotations": found}, protocol)} for protocol in (2, 4)]


@seeds_of("pku-mmd-pkl")
def pku_pickle(draw: Generator) -> list[Case]:
    clips = list(prepared_clips(draw))
    trimmed = {"data": clips, "label": [1, 51, 7], "num_frames": [1, 3, 5]}
    stacked = {"data": np.stack(clips), "label": np.array([3, 4, 5])}
    frames = np.array([0, 0, 3, 3, 51, 0])
    windows = [{"name": f"000{number // 2}-L.txt", "data": clip, "label": frames} for number, clip in enumerate(clips)]
    other = {0: {**windows[0], "name": "0009-M"}}
    return [
        {"PKUv2_xsub_train.pkl": pickled(trimmed), "PKUv2_xsub_val.pkl": pickled(stacked, 5)},
        {"PKUv1_xview_train.pkl": pickled(windows, 2), "PKUv1_xview_test.pkl": pickled(other, 3)},
    ]


@seeds_of("bvh")
def bvh(draw: Generator) -> list[Case]:
    six = "6 Xposition Yposition Zposition Zrotation Yrotation Xrotation"
    head = (
        f"HIERARCHY\nROOT Hips\n{{\n OFFSET 0 0 0\n CHANNELS {six}\n JOINT LeftUpLeg\n {{\n  OFFSET 0.1 -0.2 0\n"
        "  CHANNELS 3 Zrotation Xrotation Yrotation\n  End Site\n  {\n   OFFSET 0 -1 0\n  }\n }\n"
        " JOINT Neck {\n  OFFSET 0 0.5 0\n  CHANNELS 1 Yrotation\n }\n}\nMOTION\n"
    )
    rows = [draw.uniform(-90, 90, (frames, 10)) for frames in (1, 3)]
    motion = [f"Frames: {len(row)}\nFrame Time: 0.0333333\n".encode() + text_of(row) for row in rows]
    return [{"walk.bvh": head.encode() + motion[0]}, {"run.bvh": head.replace("\n", "\r\n").encode() + motion[1]}]


@seeds_of("amc")
def amc(draw: Generator) -> list[Case]:
    skeleton = (
        "# AST/ASF file\n:version 1.10\n:name VICON\n:units\n  mass 1.0\n  length 0.45\n  angle deg\n:documentation\n  made\n"
        ":root\n"
        "  order TX TY TZ RX RY RZ\n  axis XYZ\n  position 0 0 0\n  orientation 0 0 0\n:bonedata\n"
        "  begin\n    id 1\n    name lfemur\n    direction 0.34 -0.94 0\n    length 7.2\n    axis 0 0 20 XYZ\n    dof rx ry rz\n"
        "    limits (-160.0 20.0)\n      (-70.0 70.0)\n      (-60.0 70.0)\n  end\n"
        "  begin\n    id 2\n    name head\n    direction 0 1 0\n    length 1.5\n    axis 0 0 0 XYZ\n  end\n"
        ":hierarchy\n  begin\n    root lfemur head\n  end\n"
    )
    rows = draw.uniform(-90, 90, (2, 9)).round(3).tolist()
    frames = [f"{number}\nroot {row[:6]}\nlfemur {row[6:]}\n" for number, row in enumerate(rows, 1)]
    motion = "#!OML:ASF F:\\skeleton.ASF\n:FULLY-SPECIFIED\n:DEGREES\n" + "".join(frames).translate(str.maketrans("", "", "[],"))
    turned = skeleton.replace("orientation 0 0 0", "orientation 0 90 0").replace("angle deg", "angle rad")
    return [{"07/07.asf": text.encode(), "07/07_01.amc": motion.encode()} for text in (skeleton, turned)]


@seeds_of("pyskl-kinetics")
def pyskl_kinetics(draw: Generator) -> list[Case]:
    listed, joints = [], {}
    for number, frames in enumerate(([0, 0, 1, 4], [2], [])):
        name = f"video{number}"
        listed.append({
            "frame_dir": name, "label": number, "img_shape": (340, 256), "total_frames": 6, "raw_file": "data/k400/kpfiles/1.pkl",
            "frame_inds": np.array(frames, np.int64), "box_score": draw.uniform(0.5, 1, len(frames)).astype(np.float16),
        })  # fmt: skip
        joints[name] = {"keypoint": draw.uniform(0, 300, (len(frames), 17, 3)).astype(np.float16)}
    splits = {"train": ["video0", "video2"], "val": ["video1"]}
    tree = {"split": splits, "annotations": listed}
    return [{"k400_hrnet.pkl": pickled(tree, protocol), "kpfiles/1.pkl": pickled(joints, protocol)} for protocol in (2, 4)]


def labels_text(rows: list[tuple[str, str]]) -> bytes:
    stream = io.StringIO()
    csv.writer(stream).writerows(rows)
    return stream.getvalue().encode()


def layout_file() -> bytes:
    return json.dumps(_LAYOUT).encode()


def whole_folder(folder: Path) -> Case:
    """The files of a folder made by the library itself, as a case."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
