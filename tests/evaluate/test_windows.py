"""Frame features of recordings of any length: windows, their weights, their cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastskel.data.batch import View
from fastskel.data.packed import PackedDataset
from fastskel.data.protocols import Split
from fastskel.data.transforms import OneOf, Shear
from fastskel.data.views import CenterCrop, ViewSpec, eval_view, make_view
from fastskel.evaluate import Evaluation, Windows, frame_features
from fastskel.evaluate.windows import window_starts, window_view
from fastskel.models.encoder import ENCODERS, Encoder, Features
from fastskel.skeleton import topology

T = 6
LENGTHS = (1, T - 1, T, T + 1, 10 * T + 3)
VIEW = eval_view(T)


class FrameEncoder(Encoder):
    """Each frame for itself: knows neither positions nor neighbours; `spatial` is one token per joint."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.num_features = self.num_token_features = width
        self.frame, self.joint = nn.Linear(75, width), nn.Linear(3, width)
        self.dropout = nn.Dropout(0.5)
        self.calls: list[tuple[int, ...]] = []

    def forward(self, view: View, *, token_mask: Tensor | None = None, mode: str | None = None) -> Features:
        self.calls.append(tuple(view.clips.shape))
        temporal = self.dropout(self.frame(view.clips.flatten(2)))
        return Features(temporal.amax(1), temporal=temporal, spatial=self.joint(view.clips.mean(1).flatten(1, 2)))


class EdgeEncoder(FrameEncoder):
    """Says how far the ends of the window are, whatever it sees."""

    def forward(self, view: View, *, token_mask: Tensor | None = None, mode: str | None = None) -> Features:
        count = view.clips.shape[1]
        place = torch.arange(count, dtype=torch.float32).expand(len(view.clips), -1)[..., None]
        return Features(place.amax(1), temporal=place)


def recordings(lengths: tuple[int, ...] = LENGTHS, constant: bool = False) -> PackedDataset:
    draw = np.random.default_rng(0)
    skeleton = topology("ntu-25")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    frames = draw.normal(size=(1 if constant else offsets[-1], 1, 25, 3)).astype(np.float32)
    return PackedDataset(
        path=Path("in-memory"),
        meta={
            "source": "custom", "class_names": ["a", "b"], "columns": {}, "checksums": {"frames.npy": f"{lengths}{constant}"},
            "normalisation": "none",
        },
        topology=skeleton,
        frames=np.repeat(frames, offsets[-1], 0) if constant else frames,
        offsets=offsets,
        names=np.array([f"recording{number}" for number in range(len(lengths))]),
        labels=np.full(len(lengths), -1),
        num_bodies=np.ones(len(lengths), dtype=np.int64),
    )  # fmt: skip


def evaluation(encoder: Encoder | None, dataset: PackedDataset, view: ViewSpec = VIEW, **options) -> Evaluation:
    clips = np.arange(len(dataset))
    return Evaluation(encoder, dataset, Split(clips[:1], clips[1:]), view, progress=False, **options)


def every(dataset: PackedDataset) -> np.ndarray:
    return np.arange(len(dataset))


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_frame_lies_in_a_window(length: int, overlap: float) -> None:
    starts = window_starts(length, T, overlap)
    assert starts[0] == 0 and starts[-1] == max(length - T, 0)
    assert len(np.unique(starts)) == len(starts) and (np.diff(starts) <= max(1, round(T * (1 - overlap)))).all()
    covered = np.zeros(length)
    for start in starts:
        covered[start : start + T] += 1
    assert covered.min() >= 1
    if overlap == 0.5 and length > 2 * T:
        assert (covered[T // 2 : -T] >= 2).all()


@pytest.mark.parametrize("weighting", ["triangular", "flat"])
@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_a_frame_encoder_sees_through_the_windows(overlap: float, weighting: str) -> None:
    torch.manual_seed(0)
    dataset, encoder = recordings(), FrameEncoder().train()
    found = frame_features(evaluation(encoder, dataset), every(dataset), Windows(overlap=overlap, weighting=weighting))
    assert encoder.training and encoder.calls == []
    for number, features in enumerate(found):
        assert features.shape == (LENGTHS[number], 4) and features.dtype == torch.float32
        # recordings of a window and more are not resized: a frame's features are what the encoder says of that frame
        if LENGTHS[number] >= T:
            with torch.no_grad():
                alone = encoder.frame(torch.from_numpy(dataset.clip(number).copy()).flatten(1))
            # the mean of at most 3 equal numbers
            torch.testing.assert_close(features, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, T, 4, 15])
def test_a_constant_recording_is_constant(window: int | None) -> None:
    torch.manual_seed(0)
    dataset = recordings(constant=True)
    found = torch.cat(frame_features(evaluation(FrameEncoder(), dataset), every(dataset), Windows(window=window)))
    torch.testing.assert_close(found, found[:1].expand_as(found), rtol=1e-5, atol=1e-6)


def test_weights_favour_the_middle() -> None:
    dataset = recordings((10 * T + 3,))
    flat, triangular = (
        frame_features(evaluation(EdgeEncoder(), dataset), every(dataset), Windows(weighting=kind))[0][:, 0]
        for kind in ("flat", "triangular")
    )
    assert Windows().weights(5).tolist() == [1, 2, 3, 2, 1] and Windows(weighting="flat").weights(3).tolist() == [1, 1, 1]
    # frame 3 is number 3 of the first window and number 0 of the second
    assert flat[3] == 1.5
    assert triangular[3] == pytest.approx((3 * 3 + 1 * 0) / 4)
    # the last window ends with the recording
    assert flat[-1] == triangular[-1] == T - 1


def test_windows_are_clips_of_their_own() -> None:
    dataset = recordings((20,))
    for spec in (
        VIEW, eval_view(T, normalise="center-first"), eval_view(T, "motion"), eval_view(T, "bone", "align"), eval_view(4),
    ):  # fmt: skip
        starts = np.array([0, 3, 20 - T])
        view = window_view(dataset, spec, 0, starts, T)
        for row, start in enumerate(starts):
            cut = replace(dataset, frames=dataset.frames[start : start + T], offsets=np.array([0, T]))
            alone = make_view(cut, spec, [0], 0, 0, 0)
            assert torch.equal(view.clips[row], alone.clips[0]) and torch.equal(view.mask[row], alone.mask[0])


def test_longer_windows_are_resized_there_and_back() -> None:
    # positions in the window, 0 .. T-1, stretched over 2 T frames with half-pixel centres
    dataset = recordings((2 * T,))
    found = frame_features(evaluation(EdgeEncoder(), dataset), every(dataset), Windows(window=2 * T, weighting="flat"))[0]
    expected = np.clip((np.arange(2 * T) + 0.5) / 2 - 0.5, 0, T - 1)
    np.testing.assert_allclose(found[:, 0].numpy(), expected, atol=1e-6)


def test_spatial_features_are_those_of_the_window() -> None:
    torch.manual_seed(0)
    dataset, encoder = recordings((T, 3 * T)), FrameEncoder()
    plain = frame_features(evaluation(encoder, dataset), every(dataset))
    both = frame_features(evaluation(encoder, dataset), every(dataset), Windows(spatial=True, overlap=0))
    assert [tuple(values.shape) for values in both] == [(T, 8), (3 * T, 8)]
    torch.testing.assert_close(both[0][:, :4], plain[0])
    with torch.no_grad():
        expected = encoder.joint(torch.from_numpy(dataset.clip(0).copy()).mean(0)[0]).amax(0)
    torch.testing.assert_close(both[0][:, 4:], expected.expand(T, -1))
    # no overlap: one vector a window, others for other windows
    assert len(torch.unique(both[1][:, 4:], dim=0)) == 3


def test_batches_do_not_matter() -> None:
    dataset = recordings()
    torch.manual_seed(0)
    encoder = ENCODERS["usdrl-dste"](num_joints=25, num_bodies=1, num_frames=T, num_channels=3, width=8)
    whole = frame_features(evaluation(encoder, dataset), every(dataset))
    parts = frame_features(evaluation(encoder, dataset, batch_size=2), every(dataset)[::-1])
    for one, other in zip(whole, parts[::-1], strict=True):
        # products of other batch sizes sum in another order
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["usdrl-dste", "usdrl-sttr"])
@pytest.mark.parametrize("frames", [1, 5, 8])
def test_real_encoders_of_any_length(name: str, frames: int) -> None:
    torch.manual_seed(0)
    dataset = recordings()
    encoder = ENCODERS[name](num_joints=25, num_bodies=1, num_frames=frames, num_channels=3, width=8)
    found = frame_features(evaluation(encoder, dataset, eval_view(frames)), every(dataset))
    assert [tuple(values.shape) for values in found] == [(length, 8) for length in LENGTHS]
    assert all(values.isfinite().all() for values in found)


def test_raw_coordinates() -> None:
    dataset = recordings()
    found = frame_features(evaluation(None, dataset), every(dataset))
    np.testing.assert_allclose(found[-1].numpy(), dataset.clip(4).reshape(-1, 75), rtol=1e-5, atol=1e-6)
    assert found[0].shape == (1, 75)
    # a single frame is resized to a window and back
    np.testing.assert_allclose(found[0].numpy(), dataset.clip(0).reshape(-1, 75), rtol=1e-6)


def mapped_file(features: Tensor) -> str | None:
    """File that the numbers of features lie in, as the system says."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= features.data_ptr() < end:
            return line.split(maxsplit=5)[5] if line.count("/") else None
    return None


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not list what is mapped")
def test_what_was_just_cached_is_mapped_and_not_held(tmp_path: Path) -> None:
    found = frame_features(evaluation(FrameEncoder(), recordings(), cache=tmp_path), np.array([1, 4]))
    assert {mapped_file(features) for features in found} == {str(path) for path in tmp_path.iterdir()}


def test_the_cache_serves_recordings_one_by_one(tmp_path: Path, monkeypatch) -> None:
    torch.manual_seed(0)
    dataset, encoder, runs = recordings(), FrameEncoder(), []
    forward = FrameEncoder.forward
    monkeypatch.setattr(FrameEncoder, "forward", lambda self, view: runs.append(len(view.clips)) or forward(self, view))
    cached = evaluation(encoder, dataset, cache=tmp_path)
    first = frame_features(cached, np.array([1, 4]))
    assert len(runs) == 2 and len(list(tmp_path.iterdir())) == 2
    # any other choice of recordings takes what is there
    again = frame_features(cached, np.array([4, 2, 1]))
    assert len(runs) == 3 and torch.equal(again[0], first[1]) and torch.equal(again[2], first[0])
    # other windows, weights or views are others
    for change, windows in ((cached, Windows(overlap=0.25)), (replace(cached, view=eval_view(T, "bone")), Windows())):
        frame_features(change, np.array([4]), windows)
    with torch.no_grad():
        encoder.frame.bias += 1
    moved = frame_features(cached, np.array([4]))
    assert len(runs) == 6 and not torch.equal(moved[0], first[1])
    # raw coordinates are computed faster than read
    frame_features(replace(cached, encoder=None), every(dataset))
    assert len(list(tmp_path.iterdir())) == 6


def test_a_damaged_cache_is_computed_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dataset = recordings((T + 1,))
    cached = evaluation(FrameEncoder(), dataset, cache=tmp_path)
    # mapped: it would change with the file
    first = [features.clone() for features in frame_features(cached, every(dataset))]
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged, reason in ((whole[:-5], "could not be read"), (whole[:-1] + bytes([whole[-1] ^ 1]), "not match its checksum")):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match=reason):
            again = frame_features(cached, every(dataset))
        assert torch.equal(again[0], first[0])
        # without a warning: the file is whole again
        assert torch.equal(frame_features(cached, every(dataset))[0], first[0])


def test_refused(encoder) -> None:
    dataset = recordings()
    with pytest.raises(ValueError, match="detect: the encoder must provide 'temporal' features, got none"):
        frame_features(evaluation(encoder, dataset), every(dataset), task="detect")
    with pytest.raises(ValueError, match="windows.spatial must be false for raw coordinates"):
        frame_features(evaluation(None, dataset), every(dataset), Windows(spatial=True))
    for view in (replace(VIEW, crop=CenterCrop(0.5)), replace(VIEW, transforms=(OneOf((Shear(1.0),)),))):
        with pytest.raises(ValueError, match="view must have neither crop nor transforms"):
            frame_features(evaluation(None, dataset, view), every(dataset))
    with pytest.raises(ValueError, match="clips like those of in-memory, got skeleton coco-17 for ntu-25"):
        frame_features(evaluation(None, dataset, replace(VIEW, topology="coco-17")), every(dataset))
    with pytest.raises(ValueError, match=r"indices must lie in 0\.\.4 for in-memory"):
        frame_features(evaluation(None, dataset), np.array([5]))
    other = ENCODERS["usdrl-dste"](num_joints=20, num_bodies=1, num_frames=T, num_channels=3, width=8)
    with pytest.raises(ValueError, match="clips like those of in-memory, got joints 20 for 25"):
        frame_features(evaluation(other, dataset), every(dataset))
    dataset.frames[dataset.offsets[2] + 1] = np.inf
    with pytest.raises(ValueError, match=r"got nan or inf in frame 0 of recording 2 \(recording2\) of in-memory"):
        frame_features(evaluation(EdgeOfInfinity(), dataset), every(dataset))
    for windows, message in (
        ({"window": 0}, "window must be"), ({"overlap": 1.0}, "overlap must lie"), ({"weighting": "x"}, "weighting must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"Windows: {message}"):
            Windows(**windows)


class EdgeOfInfinity(FrameEncoder):
    """Passes on what is not finite to the whole window."""

    def forward(self, view: View, *, token_mask: Tensor | None = None, mode: str | None = None) -> Features:
        temporal = view.clips.flatten(2).sum((1, 2))[:, None, None].expand(-1, view.clips.shape[1], 2)
        return Features(temporal.amax(1), temporal=temporal)
