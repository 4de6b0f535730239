"""The plain reference system: recorded tensors, published keys, published cost, and DropPath fed from outside."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fastskel.bench.harness import saved_bytes
from fastskel.bench.reference import DSTE, STTR, USDRL, cal_xc, similarity, total, v_ac
from torch.utils.flop_counter import FlopCounterMode

from fastskel import philox
from fastskel.data.batch import DrawAddress, View
from fastskel.models import DSTE as NativeDSTE
from fastskel.skeleton import topology

ROOT = Path(__file__).resolve().parents[2]
MODELS = ["model_dste_h32.npz", "model_sttr_h32.npz"]
STEPS = ["step_dste_h32_aaai.npz", "step_sttr_h32_aaai.npz", "step_dste_h32_v17_aaai.npz"]
ATTENTIONS = ["eager", "sdpa"]
FORBIDDEN = ("fastskel.nn", "fastskel.models", "fastskel.objectives", "fastskel.compat")


def relative(actual: torch.Tensor, expected: np.ndarray | torch.Tensor) -> float:
    """Relative L2 distance, in fp64."""
    a, b = actual.detach().double(), torch.as_tensor(expected).detach().double()
    assert a.shape == b.shape
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def model_of(archive: dict, name: str, attention: str = "eager") -> USDRL:
    joints = archive["in/v0"].shape[3]
    backbone = "dste" if "dste" in name else "sttr"
    model = USDRL(joints * 2 * 3, 192, 32, 1, backbone=backbone, drop_path=0.0, attention=attention)
    state = {k[3:]: torch.from_numpy(v) for k, v in archive.items() if k.startswith("sd/")}
    model.load_state_dict(state, strict=True)
    assert list(model.state_dict()) == list(state)
    return model


def views(archive: dict) -> list[torch.Tensor]:
    return [torch.from_numpy(archive[f"in/v{i}"]) for i in range(4)]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_eval_features_are_the_recorded_ones(golden, name, attention):
    archive = golden(name)
    model = model_of(archive, name, attention).eval()
    with torch.no_grad():
        y_t, y_s = model.backbone(torch.from_numpy(archive["eval/in_t"]), torch.from_numpy(archive["eval/in_s"]))
        z_t, z_s, z_i = model.sub_forward(torch.from_numpy(archive["in/v0"]))
    # fp32 sums in another order over at most 64 terms
    for key, value in {"y_t": y_t, "y_s": y_s, "z_t": z_t, "z_s": z_s, "z_i": z_i}.items():
        assert relative(value, archive[f"eval/{key}"]) <= 1e-5, key


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", [*MODELS, *STEPS])
def test_training_step_is_the_recorded_one(golden, name, attention):
    archive = golden(name)
    weighting, key = ("aaai", "loss_aaai") if name in STEPS else ("journal", "loss_tpami")
    model = model_of(archive, name, attention).train()
    lists = model(*views(archive))
    for domain, z in zip("tsi", lists, strict=True):
        if name in STEPS:
            continue
        for number, view in enumerate(z):
            assert relative(view, archive[f"train/z_{domain}{number}"]) <= 1e-4
        terms = {"sim": similarity(z), "vac": sum(v_ac(view) for view in z), "xcorr": cal_xc(z)}
        for term, value in terms.items():
            assert relative(value, archive[f"train/{term}_{domain}"]) <= 1e-4, (term, domain)
    loss = total(*lists, weighting)
    assert relative(loss, archive[f"train/{key}"]) <= 1e-4
    loss.backward()
    for buffer, expected in ((k[6:], v) for k, v in archive.items() if k.startswith("after/")):
        assert relative(model.state_dict()[buffer], expected) <= 1e-4, buffer
    check_gradients(archive, model, name, weighting)


def check_gradients(archive: dict, model: USDRL, name: str, weighting: str) -> None:
    exact = model_of(archive, name).double().train()
    total(*exact(*(view.double() for view in views(archive))), weighting).backward()
    truth = {key: parameter.grad for key, parameter in exact.named_parameters()}
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    recorded = {key[5:]: value for key, value in archive.items() if key.startswith("grad/")}
    assert recorded.keys() == gradients.keys() == truth.keys()
    # biases in front of a BatchNorm or of a loss on centred embeddings are zero but for rounding
    noise = {key for key, gradient in truth.items() if gradient.norm() < 1e-10}
    assert len(noise) == (13 if "dste" in name else 11)
    assert all(key.endswith("bias") for key in noise)
    for key, expected in recorded.items():
        if key in noise:
            assert gradients[key].norm() < 1e-4, key
        else:
            assert relative(gradients[key], expected) <= 1e-4, key


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("backbone", ["dste", "sttr"])
def test_keys_are_the_published_ones(specs_dir, backbone, attention):
    listing = (specs_dir / f"usdrl_keys_{backbone}.txt").read_text().splitlines()
    with torch.device("meta"):
        model = USDRL(150, 192, 1024, 1, backbone=backbone, attention=attention)
    actual = [[k, str(tuple(v.shape)), str(v.dtype)] for k, v in model.state_dict().items()]
    assert actual == [line.split("\t") for line in listing if line]


def test_initial_weights():
    torch.manual_seed(0)
    model = USDRL(30, 24, 64, 1)
    layer = model.backbone.get_submodule("t_tr1")
    # of 8192 draws the sample deviation is within 4 / sqrt(2 * 8192) of the true one
    assert layer.CA.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.032)
    assert not layer.CA.attn.out_proj.bias.any() and not layer.DSA.wt1.bias.any()
    assert 0.9 / 8 < layer.CA.conv1.weight.abs().max() <= 1 / 8
    assert 0.9 * (6 / 256) ** 0.5 < layer.CA.attn.in_proj_weight.abs().max() <= (6 / 256) ** 0.5
    assert model.backbone.spe.std().item() == pytest.approx(0.02, rel=0.1)


def test_flops_of_a_view():
    with torch.device("meta"):
        model, xt, xs = DSTE(150, 192, 1024, 1), torch.empty(1, 64, 150), torch.empty(1, 50, 192)
        small, st, ss = STTR(150, 192, 1024, 1), xt, xs
    for backbone, tokens, expected in ((model, (xt, xs), 12.45e9), (small, (st, ss), 3.20e9)):
        with FlopCounterMode(display=False) as counter:
            backbone(*tokens)
        assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_bytes_saved_for_backward_of_a_view():
    with torch.device("meta"):
        model = DSTE(150, 192, 1024, 1).train()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()

    def encode(rows: int) -> Callable[[], object]:
        def call() -> object:
            with torch.autocast("cpu", torch.bfloat16):
                return model(torch.zeros(rows, 64, 150), torch.zeros(rows, 50, 192))

        return call

    # parameters and their casts do not grow with the batch
    small, large = (saved_bytes(encode(rows)) for rows in (2, 4))
    per_view = (large - small) / 2
    assert per_view == pytest.approx(23.6e6, rel=0.01)


@pytest.mark.parametrize(("joints", "bodies", "frames", "layers", "heads"), [(5, 1, 7, 3, 2), (3, 2, 8, 1, 1)])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_drop_path_from_outside_equals_the_native_encoder(joints, bodies, frames, layers, heads, attention):
    torch.manual_seed(1)
    rows, width, rate, seed, step = 6, 8, 0.4, 11, 3
    tokens = joints * bodies
    model = DSTE(tokens * 3, frames * 3, width, heads, layers, 0.3, 3, drop_path=rate, attention=attention).train()
    native = NativeDSTE(
        num_joints=joints, num_bodies=bodies, num_frames=frames, width=width, num_heads=heads, num_layers=layers,
        gap=3, alpha=0.3, drop_path=rate,
    ).train()  # fmt: skip
    native.load_state_dict(model.state_dict(), strict=True)
    index, number = torch.arange(rows) + 5, torch.arange(rows) % 4
    words = philox.words(seed, index.numpy(), step, number.numpy(), philox.Use.DROP_PATH, layers * 12)
    factors = torch.from_numpy((philox.uniform(words) >= np.float32(rate)).astype(np.float32)) / (1 - rate)
    asked = []

    def source(layer: int, stream: int, slot: int) -> torch.Tensor:
        asked.append((layer * 2 + stream) * 6 + slot)
        return factors[:, asked[-1]]

    model.drop_path_source = source
    clips = torch.randn(rows, frames, bodies, joints, 3)
    xt = clips.reshape(rows, frames, -1)
    xs = clips.permute(0, 2, 3, 1, 4).reshape(rows, tokens, -1)
    # the skeleton is not read: only where the draws come from is
    view = View(
        clips, torch.ones(rows, frames, bodies, dtype=torch.bool), topology("ntu-25"),
        DrawAddress(seed, step, index, number),
    )  # fmt: skip
    outputs, expected = model(xt, xs), native.streams(xt, xs, view)
    assert sorted(asked) == list(range(layers * 12))
    for value, other in zip(outputs, expected, strict=True):
        assert relative(value, other) <= 1e-5
    weights = [torch.randn_like(value) for value in outputs]
    for pair in (outputs, expected):
        sum((value * weight).sum() for value, weight in zip(pair, weights, strict=True)).backward()
    other = dict(native.named_parameters())
    for key, parameter in model.named_parameters():
        if parameter.grad.norm() > 1e-6:
            assert relative(parameter.grad, other[key].grad) <= 1e-4, key


def test_drop_path_draws_when_no_source_is_given():
    model = DSTE(15, 15, 8, 1, drop_path=0.5).train()
    tokens = torch.randn(4, 5, 15), torch.randn(4, 5, 15)
    torch.manual_seed(0)
    first = model(*tokens)[0]
    assert not torch.equal(first, model(*tokens)[0])
    model.drop_path_source = lambda layer, stream, slot: torch.ones(4)
    kept = model(*tokens)[0]
    assert torch.equal(kept, model(*tokens)[0])
    model.drop_path_source = None
    torch.manual_seed(0)
    assert torch.equal(first, model(*tokens)[0])
    # outside of training nothing is asked for
    assert torch.equal(model.eval()(*tokens)[0], model(*tokens)[0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DSTE(10, 24, 8, 1), "DSTE: t_input_size must be a positive multiple of 3 channels, got 10"),
        (lambda: STTR(15, 0, 8, 1), "STTR: s_input_size must be a positive multiple of 3 channels, got 0"),
        (
            lambda: DSTE(15, 24, 8, 3),
            "DSTE: num_head must divide hidden_size 8 and num_layer be at least 1, got 3 and 2",
        ),
        (lambda: STTR(15, 24, 8, 1, 0), "num_layer be at least 1, got 1 and 0"),
        (lambda: DSTE(15, 24, 8, 1, attention="flash"), "attention must be one of ['eager', 'sdpa', 'xformers'], got 'flash'"),
        (lambda: USDRL(15, 24, 8, 1, backbone="gcn"), "USDRL: backbone must be 'dste' or 'sttr', got 'gcn'"),
        (lambda: total([], [], [], "paper"), "total: weighting must be one of ['aaai', 'journal'], got 'paper'"),
    ],
    ids=["t_input", "s_input", "heads", "layers", "attention", "backbone", "weighting"],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_nothing_that_is_measured_is_imported():
    sources = sorted((ROOT / "bench" / "reference").glob("*.py"))
    assert len(sources) == 5
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in modules if name.startswith(FORBIDDEN)], source.name
