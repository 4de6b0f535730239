"""Model FLOPs utilisation: operations against torch's count of the published model, the peak, and what a run logs."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from fastskel.bench import reference
from fastskel.bench.harness import flops

from fastskel.data import make_synthetic
from fastskel.data.views import ViewSpec
from fastskel.models import DSTE, STTR
from fastskel.models.encoder import ENCODERS
from fastskel.recipes import RECIPES
from fastskel.train import pretrain, utilisation
from fastskel.train.utilisation import matmul_peak, utilisation_of

CPU = torch.device("cpu")
MODULE = sys.modules["fastskel.train.pretrain"]
# frames, bodies, joints, channels, width, layers
SIZES = [(64, 2, 25, 3, 1024, 2), (64, 2, 17, 3, 1024, 2), (12, 1, 7, 2, 24, 3)]


def counted(name: str, size: tuple[int, ...], *, backward: bool) -> int:
    """What torch counts of the plain formulation, on tensors without values."""
    frames, bodies, joints, channels, width, layers = size
    with torch.device("meta"):
        model = getattr(reference, name)(bodies * joints * channels, frames * channels, width, 1, layers, num_channels=channels)
        temporal = torch.empty(1, frames, bodies * joints * channels)
        spatial = torch.empty(1, bodies * joints, frames * channels)
    model.eval()

    def call() -> None:
        outputs = model(temporal, spatial)
        if backward:
            torch.autograd.backward([y.sum() for y in outputs])

    return int(flops(call))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["DSTE", "STTR"])
def test_operations_are_those_of_the_published_model(name, size, backward) -> None:
    frames, bodies, joints, channels, width, layers = size
    with torch.device("meta"):
        encoder = {"DSTE": DSTE, "STTR": STTR}[name](
            num_joints=joints, num_bodies=bodies, num_frames=frames, num_channels=channels, width=width, num_layers=layers
        )
    assert encoder.model_flops(frames, backward=backward) == counted(name, size, backward=backward)


def test_the_published_size_is_that_of_the_documents() -> None:
    with torch.device("meta"):
        found = {name: ENCODERS[name]().model_flops(64) / 1e9 for name in ("usdrl-dste", "usdrl-sttr")}
    assert found == pytest.approx({"usdrl-dste": 12.45, "usdrl-sttr": 3.20}, rel=2e-3)


def test_a_shorter_view_costs_less() -> None:
    with torch.device("meta"):
        encoder = DSTE(num_frames=64, width=64)
        short = DSTE(num_frames=16, width=64)
    assert encoder.model_flops(16) == short.model_flops(16) < encoder.model_flops(64)


class Silent(DSTE):
    """Does not say how many operations it is."""

    def model_flops(self, frames, *, backward=False):
        return None


def test_a_sample_has_all_its_views_and_the_peak_is_that_of_all_processes(monkeypatch) -> None:
    monkeypatch.setattr(utilisation, "matmul_peak", lambda precision, device: 2.5e9)
    monkeypatch.setattr(utilisation, "exchange", lambda values, device, group: [tuple(values), (1_000_000_000,)])
    with torch.device("meta"):
        encoder, silent = (kind(num_frames=16, width=16) for kind in (DSTE, Silent))
    view = ViewSpec(frames=16)
    found = utilisation_of(encoder, [view, view, view], "bf16", CPU, None)
    assert found == (3 * encoder.model_flops(16, backward=True), 3_500_000_000)
    assert utilisation_of(silent, [view], "bf16", CPU, None) is None


def test_the_peak_is_measured_once_and_is_that_of_large_products() -> None:
    utilisation._measured.cache_clear()
    first = matmul_peak("fp32", CPU)
    assert matmul_peak("fp32", CPU) == first and utilisation._measured.cache_info().hits == 1
    # a tiny product, mostly overhead, cannot be faster
    small = utilisation._encoders_product(16, "fp32", CPU)
    assert first > 2 * 16**3 / utilisation.seconds_of(small, CPU, 50)
    assert first > 1e9


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_synthetic(tmp_path_factory.mktemp("data") / "packed", num_clips=24, num_classes=3, num_subjects=4)


def make_stage(dataset, **settings):
    small = dict(
        width=16, num_layers=1, frames=16, crop_min_frames=16, num_views=2, batch_size=8, epochs=2, milestones=(1,),
        num_threads=0, drop_path=0.1,
    )  # fmt: skip
    (stage,) = replace(RECIPES["usdrl-demo"](), **(small | settings)).stages(dataset)
    return stage


def records(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_every_record_has_it_also_of_a_resumed_run(dataset, tmp_path, monkeypatch) -> None:
    stage, run = make_stage(dataset), tmp_path / "run"
    shown = []
    monkeypatch.setattr(MODULE, "_shown", lambda figures, times: shown.append(times) or {})

    class Stopped(BaseException):
        pass

    def stop(self):
        if len(shown) == 4:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("fastskel.objectives.MGFD.after_step", stop)
        with pytest.raises(Stopped):
            pretrain(stage, dataset, run, device="cpu", progress=False)
    pretrain(stage, dataset, run, device="cpu", progress=False, resume=True)
    found = records(run)
    assert [record["step"] for record in found] == list(range(6))
    encoder = ENCODERS[stage.encoder](**stage.encoder_options)
    per_sample = 2 * encoder.model_flops(16, backward=True)
    peak = matmul_peak("fp32", CPU)
    for record in found:
        assert record["model_tflop_per_s"] * 1e12 == pytest.approx(record["samples_per_s"] * per_sample, rel=1e-2)
        assert record["mfu"] == pytest.approx(record["model_tflop_per_s"] * 1e12 / peak, abs=1e-4)


@pytest.mark.parametrize("columns", [80, 160])
def test_the_bar_shows_it_where_there_is_room(monkeypatch, columns) -> None:
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: type("Size", (), {"columns": columns}))
    shown = MODULE._shown({"loss": 1.25}, {"samples_per_s": 10.4, "mfu": 0.416})
    assert shown == {"loss": "1.250", "samples_per_s": "10"} | ({"mfu": "42%"} if columns == 160 else {})


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_measuring_leaves_torch_as_it_was(precision) -> None:
    utilisation._measured.cache_clear()
    before = torch.get_rng_state(), torch.get_num_threads()
    assert matmul_peak(precision, CPU) > 0
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.get_num_threads() == before[1]
