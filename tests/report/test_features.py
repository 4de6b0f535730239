"""What the encoder looks at, and moving skeletons: against an encoder whose answer is known, and against the data."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastskel.data import open_dataset
from fastskel.data.batch import View
from fastskel.data.views import eval_view
from fastskel.models.encoder import Encoder, Features
from fastskel.report.assets import SCRIPT
from fastskel.report.insight import evenly, occlusion
from fastskel.report.motion import ABSENT, MAX_CLIPS, MAX_FRAMES, SIDE, Motions, bones, placed


class OneJoint(Encoder):
    """Sees one joint in the first half of the frames, and a constant."""

    def __init__(self, joint: int) -> None:
        super().__init__()
        self.joint, self.num_features = joint, 5
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, view: View, *, token_mask: Tensor | None = None, mode: str | None = None) -> Features:
        half = view.clips[:, : view.clips.shape[1] // 2, 0, self.joint] * self.weight
        rows = torch.cat([half.mean(1), half.square().mean(1)[:, :1], torch.ones(len(half), 1)], 1)
        return Features(rows)


def test_occlusion_finds_what_is_looked_at(finished: Path) -> None:
    dataset = open_dataset(finished / "data")
    clips = np.array([1, 3, 8])
    measured = occlusion(OneJoint(6), dataset, eval_view(frames=16), clips, device="cpu", progress=False)
    assert measured.joints.shape == (25,) and measured.bounds == list(range(0, 17, 2))
    assert measured.joints[6] > 0.01 and np.abs(np.delete(measured.joints, 6)).max() < 1e-7
    assert (measured.stretches[:4] > 1e-6).all() and np.abs(measured.stretches[4:]).max() < 1e-7
    # by hand, for one clip
    from fastskel.data.views import make_view

    view = make_view(dataset, eval_view(frames=16), clips, seed=0, epoch=0, view=0)
    rows = OneJoint(6)(view).pooled.detach().double()
    hidden = torch.zeros_like(rows)
    hidden[:, -1] = 1
    expected = (1 - (rows * hidden).sum(1) / rows.norm(dim=1)).mean()
    assert measured.joints[6] == pytest.approx(float(expected), rel=1e-5)


def test_occlusion_of_an_absent_joint_says_nothing(finished: Path) -> None:
    dataset = open_dataset(finished / "data")
    view = eval_view(frames=3, normalise="center")
    measured = occlusion(OneJoint(6), dataset, view, np.array([0]), device="cpu", progress=False)
    # centring leaves zeros at the centre: there is nothing to hide
    assert np.flatnonzero(np.isnan(measured.joints)).tolist() == [dataset.topology.centre]
    assert len(measured.stretches) == 3


def test_clips_are_spread_over_classes() -> None:
    clips, labels = np.arange(100, 130), np.repeat([2, 0, 1], 10)
    chosen = evenly(clips, labels, 6)
    assert len(chosen) == 6 and (np.diff(chosen) > 0).all()
    assert np.bincount(labels[chosen - 100]).tolist() == [2, 2, 2]
    assert evenly(clips, labels, 1000).tolist() == clips.tolist()


def test_clips_lie_in_their_picture(finished: Path) -> None:
    dataset = open_dataset(finished / "data")
    frames = np.array(dataset.clip(0))
    frames[:, 0, 7] = 0
    pose = placed(dataset, frames)
    assert pose.shape == (len(frames), 25, 2)
    assert (pose[:, 7] == ABSENT).all() and (np.delete(pose, 7, 1) >= 0).all() and pose.max() <= SIDE
    # y is up in the data and down in the picture
    head, foot = dataset.topology.joint("head"), dataset.topology.joint("left_foot")
    assert (pose[:, head, 1] < pose[:, foot, 1]).all()
    assert (placed(dataset, np.zeros_like(frames)) == ABSENT).all()


def test_bones_of_two_bodies(finished: Path) -> None:
    topology = open_dataset(finished / "data").topology
    one, two = bones(topology, 1), bones(topology, 2)
    assert two == one + [(side, child + 25, parent + 25) for side, child, parent in one]
    side = {child: side for side, child, _ in one}
    # 24 bones of a tree, 25 dots
    assert len(one) == 49 and sum(child == parent for _, child, parent in one) == 25
    assert (side[topology.joint("left_knee")], side[topology.joint("right_hand")], side[topology.joint("head")]) == (1, 2, 0)


def test_a_clip_is_written_once(finished: Path, read) -> None:
    dataset, motions = open_dataset(finished / "data"), Motions()
    assert motions.data() is None
    shown = [motions.figure(dataset, clip, "<caption>") for clip in (2, 5, 2)]
    assert [read(figure).all("svg")[0].attributes["data-clip"] for figure in shown] == ["0", "1", "0"]
    told = json.loads(read(motions.data()).by_id("motion").text)
    assert len(told["clips"]) == 2 and len(told["edges"]) == 1
    frames = np.array(told["clips"][0]["frames"])
    assert frames.shape == (min(MAX_FRAMES, len(dataset.clip(2))), 50)
    assert frames[0].tolist() == placed(dataset, np.asarray(dataset.clip(2)))[0].reshape(-1).tolist() or len(frames) == MAX_FRAMES
    for clip in (-1, 24, 1.5, "2"):
        with pytest.raises(ValueError, match=r"clip must be in 0 \.\. 23"):
            motions.figure(dataset, clip, "")


def test_a_page_holds_so_many_clips(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, motions = open_dataset(finished / "data"), Motions()
    monkeypatch.setattr("fastskel.report.motion.MAX_CLIPS", 2)
    assert MAX_CLIPS > 2
    for clip in (0, 1, 0):
        motions.figure(dataset, clip, "")
    with pytest.raises(ValueError, match="at most 2 moving clips"):
        motions.figure(dataset, 2, "")


# as much of a page as the script touches
PAGE = """
const path = () => ({ d: "", setAttribute(name, value) { this[name] = value; } });
const svg = { dataset: { clip: "0" }, children: [path(), path(), path()] };
const button = { hidden: true, listeners: [], addEventListener(_, run) { this.listeners.push(run); } };
let step;
globalThis.document = {
  getElementById: () => ({ textContent: process.argv[2] }),
  querySelectorAll: name => name.startsWith("svg") ? [svg] : [button],
};
globalThis.matchMedia = () => ({ matches: process.argv[3] === "still" });
globalThis.setInterval = run => { step = run; };
SCRIPT
step();
const first = svg.children.map(p => p.d), label = button.textContent;
button.listeners[0]();
step();
console.log(JSON.stringify([first, label, svg.children.map(p => p.d), button.hidden]));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node, which runs the page's script, is not installed")
def test_script_moves_the_skeleton(tmp_path: Path) -> None:
    frames = [[0, 0, 1, 1, -1, -1], [2, 2, 3, 3, 9, 9]]
    data = json.dumps({"edges": [[[1, 1, 0], [2, 2, 0]]], "clips": [{"edges": 0, "frames": frames}]})
    (tmp_path / "page.js").write_text(PAGE.replace("SCRIPT", SCRIPT))

    def run(wish: str):
        done = subprocess.run(["node", str(tmp_path / "page.js"), data, wish], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    second = ["", "M3 3L2 2", "M9 9L2 2"]
    # it moves, and stands still once the button was pressed
    assert run("moving") == [second, "Stop", second, False]
    assert run("still") == [["", "", ""], "Play", second, False]
