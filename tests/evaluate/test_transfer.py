"""Encoders on data of another skeleton, number of bodies and coordinates: what they read, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastskel.data import open_dataset, pack_arrays
from fastskel.data.batch import Batch, View
from fastskel.data.convert import convert_joints
from fastskel.data.views import eval_view
from fastskel.evaluate import (
    AdaptedEncoder,
    Evaluation,
    FinetuneConfig,
    LinearConfig,
    adapt,
    class_scores,
    evaluate_knn,
    evaluate_transfer,
    load_classifier,
)
from fastskel.evaluate import transfer as module
from fastskel.evaluate.adapted import adapted_encoder
from fastskel.evaluate.transfer import PLANES, UPRIGHT, torso_length
from fastskel.models import DSTE
from fastskel.skeleton import topology

FRAMES = 6
SPLIT = SimpleNamespace(train=np.arange(9), test=np.arange(9, 15))
PROBE = LinearConfig(epochs=40, learning_rate=0.3, milestones=(30,), standardise=True)
TOLD = ("head", "left_hand", "right_hand")


def pack(folder: Path, skeleton: str = "kinect-20-utd", bodies: int = 1, channels: int = 3, **options):
    """Fifteen clips whose class moves the head or a hand of the first body; every fifth shows no second one."""
    layout, draw, clips = topology(skeleton), np.random.default_rng(0), []
    for number in range(15):
        clip = draw.normal(0, 0.02, (8, bodies, layout.num_joints, channels)) + 0.5
        clip[:, 0, layout.joint(TOLD[number % 3]), :2] += 2
        if number % 5 == 0:
            clip[:, 1:] = 0
        clips.append(clip.astype(np.float32))
    labels = [number % 3 for number in range(15)]
    return pack_arrays(clips, out=folder, topology=skeleton, labels=labels, class_names=("nod", "left", "right"), **options)


def encoder_of(skeleton: str = "ntu-25", bodies: int = 1, channels: int = 3) -> DSTE:
    torch.manual_seed(0)
    joints = topology(skeleton).num_joints
    return DSTE(num_joints=joints, num_bodies=bodies, num_frames=FRAMES, num_channels=channels, width=16).eval()


def evaluation_of(dataset, skeleton: str = "ntu-25", bodies: int = 1, channels: int = 3, **options) -> Evaluation:
    view = replace(eval_view(FRAMES), topology=skeleton)
    return Evaluation(encoder_of(skeleton, bodies, channels), dataset, SPLIT, view, progress=False, **options)


def view_of(shape: tuple[int, ...], skeleton: str = "ntu-25") -> View:
    clips = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return View(clips, torch.ones(shape[:3], dtype=torch.bool), topology(skeleton))


def test_other_joints(tmp_path: Path, monkeypatch) -> None:
    dataset = pack(tmp_path / "data")
    evaluation = evaluation_of(dataset, cache=tmp_path / "cache", protocol="halves")
    with pytest.raises(ValueError, match=r"got skeleton ntu-25 for kinect-20-utd, joints 25 for 20. Use evaluate transfer"):
        evaluate_knn(evaluation)
    result = evaluate_transfer(evaluation, tmp_path / "out", config=PROBE, source={"source": "elsewhere"})
    assert result["top1"] == result["linear"]["top1"] == 1.0 and result["knn"]["top1"] > 0.5
    done = result["adaptation"]
    assert done["skeleton"] == "kinect-20-utd for ntu-25" and "left_thumb" in done["joints_absent"]
    assert result["source"] == {"source": "elsewhere"} and result["dataset"]["path"] == str(dataset.path)
    assert (result["task"], result["num_features"], result["num_test"]) == ("transfer", 32, 6)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(result))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "knn", "linear"}

    adapted, _ = adapt(evaluation)
    for number in range(15):
        expected = convert_joints(dataset.clip(number), dataset.topology, topology("ntu-25"))
        assert np.array_equal(adapted.dataset.clip(number), expected)
    assert adapted.encoder is evaluation.encoder
    # the copy is made once
    monkeypatch.setattr(module, "convert_dataset", None)
    again = evaluate_transfer(evaluation, config=PROBE)
    assert again["linear"] == result["linear"]
    with pytest.raises(ValueError, match="cache must be a folder where joints are remapped, got None"):
        adapt(replace(evaluation, cache=None))


def test_a_data_set_that_fits_is_left_alone(tmp_path: Path) -> None:
    dataset = pack(tmp_path / "data", "ntu-25")
    evaluation = evaluation_of(dataset)
    adapted, told = adapt(evaluation)
    assert adapted.dataset is dataset and adapted.encoder is evaluation.encoder
    assert (told["skeleton"], told["bodies"], told["scale"]) == ("ntu-25 for ntu-25", "1 for 1", 1.0)
    assert evaluate_transfer(evaluation, config=PROBE)["knn"]["top1"] == evaluate_knn(evaluation)["top1"]


@torch.no_grad()
def test_an_encoder_of_one_body_reads_two_apart() -> None:
    bare = encoder_of()
    encoder, view = AdaptedEncoder(bare, 2).eval(), view_of((4, FRAMES, 2, 25, 3))
    mask = view.mask.clone()
    # the second body comes late, never, and nobody ever
    mask[1, :3, 1], mask[2, :, 1], mask[3] = False, False, False
    pooled = encoder(replace(view, mask=mask)).pooled
    assert pooled.shape == (4, encoder.num_features) == (4, 64)
    first, second = (
        bare(replace(view, clips=view.clips[:, :, [body]], mask=mask[:, :, [body]])).pooled for body in range(2)
    )
    both = torch.cat([(first + second) / 2, torch.maximum(first, second)], -1)
    torch.testing.assert_close(pooled[:2], both[:2])
    torch.testing.assert_close(pooled[2:], torch.cat([first, first], -1)[2:])
    # who is called the first does not matter
    swapped = encoder(replace(view, clips=view.clips.flip(2), mask=mask.flip(2))).pooled
    torch.testing.assert_close(swapped[:3], pooled[:3])
    # frames and joints by themselves, in the same way
    features, apart = encoder(replace(view, mask=mask)), bare(replace(view, clips=view.clips[:, :, [1]], mask=mask[:, :, [1]]))
    first = bare(replace(view, clips=view.clips[:, :, [0]], mask=mask[:, :, [0]]))
    for name, tokens in (("temporal", FRAMES), ("spatial", 25)):
        rows, one, other = (getattr(each, name) for each in (features, first, apart))
        assert rows.shape == (4, tokens, encoder.num_token_features) == (4, tokens, 32)
        torch.testing.assert_close(rows[:2], torch.cat([(one + other) / 2, torch.maximum(one, other)], -1)[:2])
        torch.testing.assert_close(rows[2:], torch.cat([one, one], -1)[2:])
    with pytest.raises(ValueError, match="must be None where bodies are read one by one, got 'causal'"):
        encoder(view, mode="causal")


@torch.no_grad()
def test_an_encoder_of_two_bodies_reads_one_with_nobody() -> None:
    bare, view = encoder_of(bodies=2), view_of((3, FRAMES, 1, 25, 3))
    encoder = AdaptedEncoder(bare, 1).eval()
    nobody = torch.zeros_like(view.clips)
    filled = View(torch.cat([view.clips, nobody], 2), torch.ones(3, FRAMES, 2, dtype=torch.bool), view.topology)
    assert torch.equal(encoder(view).pooled, bare(filled).pooled)
    assert torch.equal(encoder(view, mode="causal").temporal, bare(filled, mode="causal").temporal)
    assert encoder.shape == (FRAMES, 1, 25, 3) and encoder.num_features == 32
    assert [len(group) for group in encoder.depth_groups()] == [len(group) for group in bare.depth_groups()]


def test_draws_of_bodies_are_apart() -> None:
    encoder, view = AdaptedEncoder(encoder_of(), 2).train(), view_of((16, FRAMES, 2, 25, 3))
    same = replace(view, clips=view.clips[:, :, :1].expand(-1, -1, 2, -1, -1))
    batch = Batch([same], torch.zeros(16, dtype=torch.int64), torch.arange(16)).at(3, 5)
    pooled = encoder(batch.views[0]).pooled
    assert torch.equal(pooled, encoder(batch.views[0]).pooled)
    mean, largest = pooled.chunk(2, -1)
    # equal bodies with equal draws would have equal features
    assert (mean != largest).any(-1).sum() > 4


def test_two_persons_end_to_end(tmp_path: Path) -> None:
    dataset = pack(tmp_path / "data", "sbu-15", bodies=2)
    evaluation = evaluation_of(dataset, cache=tmp_path / "cache")
    config = FinetuneConfig(epochs=40, batch_size=5, learning_rate=0.01, warmup_epochs=1, evaluate_every=40)
    result = evaluate_transfer(evaluation, tmp_path / "out", config=PROBE, finetune_config=config)
    assert result["finetune"]["top1"] == result["linear"]["top1"] == 1.0 and result["adaptation"]["bodies"] == "2 for 1"
    assert (result["num_features"], result["encoder"]) == (64, "DSTE")
    # what was fine-tuned comes back with its adaptation
    classifier, view, _ = load_classifier(tmp_path / "out" / "finetune")
    assert isinstance(classifier.encoder, AdaptedEncoder) and classifier.encoder.num_bodies == 2
    converted, _ = adapt(evaluation)
    predictions = class_scores(classifier, converted.dataset, view, SPLIT.test).argmax(1)
    assert torch.equal(predictions, torch.from_numpy(dataset.labels[SPLIT.test]))
    more = pack(tmp_path / "three", "ntu-25", bodies=3)
    with pytest.raises(ValueError, match="encoder must read 1 body or at least 3, got one of 2"):
        adapt(evaluation_of(more, bodies=2))


def test_a_fine_tuning_resumes_with_its_own_scale(tmp_path: Path) -> None:
    evaluation = evaluation_of(pack(tmp_path / "data", "ntu-25"))
    settings = {"config": PROBE, "finetune_config": FinetuneConfig(epochs=1, batch_size=8, warmup_epochs=0)}
    evaluate_transfer(evaluation, tmp_path / "out", scale=2.0, **settings)
    evaluate_transfer(evaluation, tmp_path / "out", scale=2.0, resume=True, **settings)
    with pytest.raises(ValueError, match="must keep its settings, got other encoder than"):
        evaluate_transfer(evaluation, tmp_path / "out", scale=3.0, resume=True, **settings)


def test_coordinates_are_turned_scaled_and_projected(tmp_path: Path) -> None:
    dataset = pack(tmp_path / "data", "ntu-25", up_axis="-y", units="normalised")
    evaluation = evaluation_of(dataset)
    adapted, told = adapt(evaluation, scale=2.0)
    assert (told["up_axis"], told["units"], told["scale"]) == ("-y for y", "normalised for metres", 2.0)
    view = view_of((2, FRAMES, 1, 25, 3))
    turned = view.clips * torch.tensor([-2.0, -2.0, 2.0])
    with torch.no_grad():
        assert torch.equal(adapted.encoder(view).pooled, evaluation.encoder(replace(view, clips=turned)).pooled)
    # without a scale: a torso of 0.4 m, measured on training clips
    _, told = adapt(evaluation)
    assert told["scale"] == pytest.approx(0.4 / torso_length(dataset, SPLIT.train))
    with pytest.raises(ValueError, match="clips with -y upwards must not be aligned"):
        adapt(replace(evaluation, view=replace(evaluation.view, normalise="align")))

    flat = evaluation_of(dataset, channels=2)
    with pytest.raises(ValueError, match=r"must read the 3 channels .* \(x, y, z\), got one of 2. Name the plane to project on"):
        adapt(flat)
    for plane, (a, b) in PLANES.items():
        adapted, told = adapt(flat, plane=plane, scale=1.0)
        picked = (view.clips * torch.tensor([-1.0, -1.0, 1.0]))[..., [a, b]]
        assert told["plane"] == plane
        with torch.no_grad():
            assert torch.equal(adapted.encoder(view).pooled, flat.encoder(replace(view, clips=picked)).pooled)
    assert evaluate_transfer(flat, config=PROBE, plane="xy")["num_features"] == 32


def test_turns_are_proper() -> None:
    axes = {"x": (1, 0, 0), "y": (0, 1, 0), "z": (0, 0, 1)}
    for up, rows in UPRIGHT.items():
        turn = np.array(rows)
        assert np.linalg.det(turn) == 1 and np.array_equal(turn @ turn.T, np.eye(3))
        direction = np.array(axes[up[-1]]) * (-1 if up[0] == "-" else 1)
        assert np.array_equal(turn @ direction, axes["y"])


@torch.no_grad()
def test_an_adapted_encoder_is_adapted_once(tmp_path: Path) -> None:
    bare, view = encoder_of(), view_of((3, FRAMES, 1, 25, 3))
    first = AdaptedEncoder(bare, 1, [[2, 0, 0], [0, 0, 2], [0, -2, 0]]).eval()
    turn, scale = [[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], [[0.5, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.5]]
    for matrix in (turn, scale, None):
        both = adapted_encoder(first, 1, matrix).eval()
        assert both.encoder is bare
        turned = view.clips if matrix is None else view.clips @ torch.tensor(matrix).mT
        torch.testing.assert_close(both(view).pooled, first(replace(view, clips=turned)).pooled)
    assert adapted_encoder(AdaptedEncoder(bare, 2), 1, turn).config == {"num_bodies": 1, "matrix": tuple(map(tuple, turn))}

    evaluation = replace(evaluation_of(pack(tmp_path / "data", "ntu-25", units="feet", up_axis="z")), encoder=first)
    same, told = adapt(evaluation, source={"units": "feet", "up_axis": "z"})
    assert same.encoder is first and (told["scale"], told["up_axis"]) == (1.0, "z for z")
    with pytest.raises(ValueError, match=r"source must say units and up_axis of the data that .* was adapted to, got \[\]"):
        adapt(evaluation)


def test_units_that_differ_are_not_guessed(tmp_path: Path) -> None:
    metres, pixels = pack(tmp_path / "metres", "ntu-25"), pack(tmp_path / "pixels", "ntu-25", units="pixels")
    for data, source in ((metres, {"units": "millimetres"}), (pixels, {"units": "metres", "channels": ["x", "y", "score"]})):
        with pytest.raises(ValueError, match="scale must be given for .* and an encoder of clips in .*metres, got none. Pass"):
            adapt(evaluation_of(data), source=source)
        assert adapt(evaluation_of(data), source=source, scale=1000.0)[1]["scale"] == 1000.0
    assert adapt(evaluation_of(metres), source={"units": "metres"})[1]["scale"] == 1.0
    # nothing is known of a file from elsewhere: of a picture its own unit is taken
    assert adapt(evaluation_of(pixels))[1]["units"] == "pixels for pixels"


def test_flat_data_and_unknown_coordinates(tmp_path: Path) -> None:
    flat = pack(tmp_path / "data", "ntu-25", units="pixels")
    assert flat.meta["channels"] == ["x", "y", "score"]
    with pytest.raises(ValueError, match="must read x, y, score as .* has, got one trained on x, y, z"):
        adapt(evaluation_of(flat), source={"channels": ["x", "y", "z"]})
    with pytest.raises(ValueError, match="plane must be one of xy, xz, yz for an encoder of 2 channels and data of x, y and z"):
        adapt(evaluation_of(flat, channels=2), plane="xy")
    with pytest.raises(ValueError, match="got one of 4. Choose an encoder of such clips"):
        adapt(evaluation_of(flat, channels=4))


def test_refusals(tmp_path: Path, encoder) -> None:
    dataset = pack(tmp_path / "data", normalisation="center")
    evaluation = evaluation_of(dataset, cache=tmp_path / "cache")
    with pytest.raises(ValueError, match="must be packed with normalisation 'none', got 'center'"):
        adapt(evaluation)
    assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(ValueError, match="must say what clips it takes, got raw coordinates"):
        adapt(replace(evaluation, encoder=None))
    with pytest.raises(ValueError, match="must say what clips it takes, got CountingEncoder"):
        adapt(replace(evaluation, encoder=encoder))
    with pytest.raises(ValueError, match="must name the skeleton of the encoder's 25 joints, got 'kinect-20-utd' of 20"):
        adapt(replace(evaluation, view=eval_view(FRAMES)))
    with pytest.raises(ValueError, match=r"matrix must be \(3, C\) for an encoder of 3 channels"):
        AdaptedEncoder(encoder_of(), 1, [[1.0, 0.0]])
    with pytest.raises(ValueError, match=r"clips must be \(N, T, 2, V, 3\), got \(1, 6, 1, 25, 3\)"):
        AdaptedEncoder(encoder_of(), 2)(view_of((1, FRAMES, 1, 25, 3)))
    assert open_dataset(dataset.path).topology.name == "kinect-20-utd"
