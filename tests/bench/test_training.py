"""The comparison of whole training steps, at sizes that prove that it runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastskel.bench import training
from fastskel.bench.providers import KINDS, Kind
from fastskel.bench.train_steps import DROP_PATH, OwnStep, ReferenceStep, Setting, make_step, plain_model

SETTING = Setting(device=torch.device("cpu"), **{**training.QUICK, "rounds": 2})


def kind(name: str) -> Kind:
    return next(k for k in KINDS if k.name == name)


@pytest.fixture(scope="module")
def exact() -> training.Exact:
    """Loss and gradients of the reference in float32."""
    plain = ReferenceStep(SETTING, torch.float32)
    return training.loss_and_gradients(plain, plain.loss, 1.0)


@pytest.mark.parametrize("name", ["reference", "reference-fp16", "reference-sdpa", "fastskel"])
def test_all_systems_start_with_the_same_loss_and_gradients(name, exact) -> None:
    model = make_step(SETTING, kind(name))
    precision = SETTING.precision(kind(name))
    found = training.gate_step(name, model, precision, exact)
    # sums in another order; and what the type's mantissa allows
    assert found["distance_fp32"] < 1e-5 and found["gradient_distance_fp32"] < 1e-3
    assert 0 < found["distance"] < 5e-3
    assert 0.01 < found["gradient_distance"] < 0.5 and found["gradient_distance"] > 10 * found["gradient_distance_fp32"]
    # the type is its own again, and from here on training drops
    assert model.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    rates = {m.rate for m in model.model.modules() if hasattr(m, "rate")} or {model.encoder.drop_path}
    assert rates == {DROP_PATH}


def test_a_red_gate_says_what_is_off(exact) -> None:
    own = OwnStep(SETTING, "torch", captured=False)
    loss, gradients = exact
    with pytest.raises(ValueError, match="training: loss of x in bf16 must be within 0.02 of the reference's, got .* Mend it"):
        training.gate_step("x", own, "bf16", (1.1 * loss, gradients))
    turned = {name: -gradient for name, gradient in gradients.items()}
    with pytest.raises(ValueError, match="training: gradients of x in bf16 must be within 0.9"):
        training.gate_step("x", own, "bf16", (loss, turned), 0.9)
    # held to float32 where no limit is given
    with pytest.raises(ValueError, match="training: gradients of x in fp32 must be within 0.02"):
        training.gate_step("x", own, "bf16", (loss, turned))
    fewer = dict(list(gradients.items())[1:])
    with pytest.raises(ValueError, match=r"gradients of x must be those of the reference, got others at \['backbone.spe'\]"):
        training.gate_step("x", own, "bf16", (loss, fewer))
    with pytest.raises(ValueError, match="got nan"):
        training._compare("x", "bf16", (float("nan"), gradients), exact, 1.0)
    spoilt = {name: gradient * float("nan") for name, gradient in gradients.items()}
    with pytest.raises(ValueError, match="gradients of x in bf16 must be within inf of the reference's, got nan"):
        training._compare("x", "bf16", (loss, spoilt), exact, training.LARGEST)


def test_half_precision_is_held_to_what_the_plain_reference_is_off(exact) -> None:
    plain = ReferenceStep(SETTING, torch.float32)
    limits = training._gradient_limits(plain, exact)
    assert plain.dtype == torch.float32 and limits["fp16"] == limits["bf16"]
    found = training.gate_step("reference", make_step(SETTING, kind("reference")), "bf16", exact, limits["bf16"])
    # the one that it was measured on
    assert found["gradient_distance"] == pytest.approx(limits["bf16"] / 1.5, rel=1e-3)


@pytest.mark.parametrize(
    ("owner", "parameter"),
    [("encoder", "t_tr1.DSA.wt1.weight"), ("encoder", "s_tr.CA.attn.in_proj_bias"), ("objective", "t_proj.1.bias")],
)
def test_one_wrong_parameter_is_found(owner, parameter, exact) -> None:
    own = OwnStep(SETTING, "torch", captured=False)
    with torch.no_grad():
        getattr(own, owner).get_parameter(parameter).add_(0.1)
    with pytest.raises(ValueError, match="of fastskel in .* must be within"):
        training.gate_step("fastskel", own, "bf16", exact)


def test_what_is_compiled_is_what_is_checked(monkeypatch, exact) -> None:
    asked = []

    def spoilt(function, **options):
        asked.append((function.__name__, options))
        return function if function.__name__ == "sub_forward" else lambda *embeddings: 2 * function(*embeddings)

    monkeypatch.setattr(torch, "compile", spoilt)
    model = make_step(SETTING, kind("reference-compiled-max"))
    assert asked == [(name, {"dynamic": False, "mode": "max-autotune"}) for name in ("sub_forward", "total")]
    with pytest.raises(ValueError, match="loss of reference-compiled-max in bf16 must be within"):
        training.gate_step("reference-compiled-max", model, "bf16", exact)


def test_the_reference_s_step_is_the_published_one() -> None:
    step = ReferenceStep(SETTING, torch.float16)
    options = step.optimizer.param_groups[0]
    assert type(step.optimizer) is torch.optim.Adam
    assert (options["lr"], options["weight_decay"], options["betas"], options["eps"]) == (5e-4, 1e-5, (0.9, 0.999), 1e-8)
    assert len(options["params"]) == 147 and step.scaler.is_enabled()
    assert not ReferenceStep(SETTING, torch.bfloat16).scaler.is_enabled()
    views = []
    step.model.backbone.register_forward_hook(lambda module, given, out: views.append((len(given[0]), out[0].dtype)))
    products = []
    step.model.t_proj.register_forward_hook(lambda module, given, out: products.append(out.dtype))
    before = step.scaler.get_scale()
    step.settle()
    # a pass per view, embeddings in half precision, and no step that the scaler skipped at the end
    assert views[:4] == [(SETTING.batch, torch.float32)] * 4 and set(products) == {torch.float16}
    assert step.scaler.get_scale() <= before and len(views) % 4 == 0
    state = step.optimizer.state[options["params"][0]]
    assert int(state["step"]) >= 1


def test_precisions_of_a_gpu_and_of_a_cpu() -> None:
    gpu = replace(SETTING, device=torch.device("cuda"))
    assert [s.precision(kind("reference")) for s in (gpu, SETTING)] == ["fp16", "bf16"]
    assert {s.precision(kind(n)) for s in (gpu, SETTING) for n in ("reference-sdpa", "fastskel", "reference-graph")} == {"bf16"}
    assert "reference-bf16" in [k.name for k, _ in gpu.kinds()] and "reference-fp16" not in [k.name for k, _ in gpu.kinds()]


@pytest.mark.parametrize("captured", [False, True], ids=["skip", "mask"])
def test_steps_learn_and_draw_anew(captured) -> None:
    own = OwnStep(SETTING, "torch", captured)
    own.encoder.drop_path = 0.5
    with torch.no_grad():
        first = float(own.loss())
        assert float(own.loss()) == first
        own.counter.add_(1)
        assert float(own.loss()) != first
    before = [p.detach().clone() for p in own.encoder.parameters()]
    losses = [float(own.counted()) for _ in range(3)]
    assert int(own.counter) == 4 and losses[-1] < losses[0]
    assert all(not torch.equal(a, b) for a, b in zip(before, own.encoder.parameters()) if a.dim() > 1)


def test_a_captured_step_is_held_against_the_step(monkeypatch) -> None:
    own = OwnStep(SETTING, "torch", captured=True)
    monkeypatch.setattr(training, "CapturedStep", lambda step, counter, device: lambda: own.counted())
    assert float(training._captured("fastskel-graph", own, SETTING)()) > 0
    monkeypatch.setattr(training, "CapturedStep", lambda step, counter, device: lambda: torch.zeros(()))
    with pytest.raises(ValueError, match="loss of fastskel-graph replayed must be within 0.2 of the step's, got 1.00e"):
        training._captured("fastskel-graph", own, SETTING)


STEPS = ["step_dste_h32_aaai.npz", "step_dste_h32_v17_aaai.npz"]


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("system", ["reference", "fastskel"])
def test_steps_compute_what_was_recorded_from_the_published_system(golden, name, system) -> None:
    archive = golden(name)
    views = [torch.from_numpy(archive[f"in/v{i}"]) for i in range(4)]
    batch, _, frames, joints, _ = views[0].shape
    setting = replace(SETTING, batch=batch, width=32, frames=frames, joints=joints)
    model = make_step(setting, kind(system))
    model.dtype = torch.float32
    state = {key[3:]: torch.from_numpy(value) for key, value in archive.items() if key.startswith("sd/")}
    if system == "reference":
        model.model.load_state_dict(state, strict=True)
        model.views = views
    else:
        backbone = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
        model.encoder.load_state_dict(backbone, strict=True)
        heads = {k: v for k, v in state.items() if not k.startswith("backbone.")}
        assert not any(model.objective.load_state_dict(heads, strict=True))
        for view, clips in zip(model.batch.views, views):
            view.clips.copy_(clips.permute(0, 2, 4, 3, 1))
    loss, gradients = training.loss_and_gradients(model, model.loss, 1.0)
    assert loss == pytest.approx(float(archive["train/loss_aaai"]), rel=1e-4)
    recorded = {key[5:]: torch.from_numpy(value) for key, value in archive.items() if key.startswith("grad/")}
    assert gradients.keys() == recorded.keys()
    for key, expected in recorded.items():
        # zero but for rounding: biases in front of a BatchNorm or of a loss on centred embeddings
        if expected.norm() > 1e-4:
            assert float((gradients[key] - expected).norm() / expected.norm()) < 1e-4, key


def test_command_writes_a_row_for_each_provider(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    command = ["--out", str(out), "--device", "cpu", "--quick", "--rounds", "1", "--parts", "step", "extract"]
    assert training.main(command) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    steps = {row["provider"]: row for row in rows if row["part"] == "step"}
    missing = ["reference-fp16", "reference-xformers", "reference-graph"]
    missing += ["fastskel-triton", "fastskel-graph", "fastskel-triton-graph"]
    # no GPU: what cannot run is a row with its reason, and the others go on
    assert list(steps) == [*missing, "reference", "reference-sdpa", "fastskel"]
    assert all(steps[name]["status"] == "unavailable" and steps[name]["reason"] for name in missing)
    for name in ("reference", "reference-sdpa", "fastskel"):
        row = steps[name]
        assert row["status"] == "ok" and row["peak_bytes"] > 0 and row["precision"] == "bf16" and row["case"] == "N=6 D=32"
        assert row["samples_per_s"] == pytest.approx(6e3 / row["median_ms"]) and row["baseline"] == "reference"
        assert row["distance"] < 2e-2 and row["gradient_distance_fp32"] < 2e-2
    assert {row["provider"] for row in rows if row["part"] == "extract" and row["status"] == "ok"} == {
        "reference", "reference-fp32", "fastskel",
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "UNAVAILABLE CUDA graphs run on a GPU only" in printed and len(printed.splitlines()) == len(rows)


def test_a_failure_of_fastskel_is_the_command_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.jsonl"
    shared = ["--device", "cpu", "--quick", "--rounds", "1", "--parts", "step", "--out", str(out), "--providers", "fastskel"]
    genuine = training.make_step

    def spoilt(setting, chosen):
        made = genuine(setting, chosen)
        if chosen.name == "fastskel":
            with torch.no_grad():
                made.encoder.spe.add_(1.0)
        return made

    monkeypatch.setattr(training, "make_step", spoilt)
    assert training.main(shared) == 1
    failed, baseline = (json.loads(line) for line in out.read_text().splitlines())
    assert failed["status"] == "failed" and "of fastskel in bf16 must be within" in failed["error"] and "median_ms" not in failed
    assert baseline["status"] == "ok"


def test_weights_are_the_same_for_all() -> None:
    a, b = plain_model(SETTING).state_dict(), plain_model(SETTING, "sdpa").state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
