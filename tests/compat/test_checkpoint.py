"""Checkpoints of the reference: read strictly, written so that its own code continues from them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastskel.compat.usdrl import dste, sttr
from fastskel.compat.usdrl.checkpoint import export, load_downstream, load_published_encoder, read_published
from fastskel.compat.usdrl.loss import cal_xc, similarity, v_ac
from fastskel.data import Loader, make_synthetic
from fastskel.data.batch import View
from fastskel.data.views import eval_view, usdrl_views
from fastskel.models import DSTE, STTR
from fastskel.skeleton import stream, topology
from fastskel.train import pretrain
from fastskel.train.checkpoint import load_encoder, read_checkpoint
from fastskel.train.stage import Stage

MODULES = {"dste": dste, "sttr": sttr}
FRAMES, WIDTH = 16, 16
both = pytest.mark.parametrize("kind", MODULES)


def silent(_: str) -> None:
    pass


@pytest.fixture
def publish(tmp_path) -> Callable[..., Path]:
    """Write a checkpoint as the reference's `pretrain.py` does, after an optional change to its state_dict."""

    def write(kind: str = "dste", t_input: int = 150, change: Callable[[dict[str, Any]], Any] = silent, **options) -> Path:
        torch.manual_seed(0)
        build = options.pop("build", "USDRL")
        model = nn.DataParallel(getattr(MODULES[kind], build)(t_input, FRAMES * 3, WIDTH, 1, 2, **options))
        optimizer = torch.optim.Adam(model.parameters(), 5e-4, weight_decay=1e-5)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        state = dict(model.state_dict())
        change(state)
        path = tmp_path / "checkpoint_0450.pth.tar"
        torch.save({"epoch": 451, "state_dict": state, "optimizer": optimizer.state_dict()}, path)
        return path

    return write


def clips(joints: int = 25, bodies: int = 2) -> View:
    values = torch.randn(3, FRAMES, bodies, joints, 3, generator=torch.Generator().manual_seed(0))
    return View(values, torch.ones(values.shape[:3], dtype=torch.bool), topology("ntu-25" if joints == 25 else "coco-17"))


@both
@pytest.mark.parametrize("t_input", [150, 102])
def test_a_published_file_is_read(kind, t_input, publish):
    published = read_published(publish(kind, t_input))
    assert published.backbone == kind and published.epoch == 451
    assert published.inferred == {"t_input_size": t_input, "s_input_size": 48, "hidden_size": WIDTH, "num_layer": 2}
    assert not [key for key in published.state if key.startswith("module.")]


@both
@pytest.mark.parametrize("t_input", [150, 102])
def test_downstream_and_encoder_agree_with_the_file(kind, t_input, publish):
    path, joints, lines = publish(kind, t_input), t_input // 6, []
    source = MODULES[kind].USDRL(t_input, FRAMES * 3, WIDTH, 1, 2)
    stored = torch.load(path, weights_only=True)["state_dict"]
    # the reference's own way to load
    source.load_state_dict({key.split("module.")[-1]: value for key, value in stored.items()}, strict=True)
    source.eval()
    downstream = load_downstream(path, num_class=7, announce=silent).eval()
    encoder, view = load_published_encoder(path, announce=lines.append)
    assert isinstance(encoder, {"dste": DSTE, "sttr": STTR}[kind]) and not encoder.training
    assert view == eval_view(FRAMES, "joint", "none")
    batch = clips(joints)
    with torch.no_grad():
        t, s = source.modality_generation(batch.clips.permute(0, 4, 1, 3, 2))
        y_t, y_s = source.backbone(t, s)
        expected = torch.cat([y_t.amax(1), y_s.amax(1)], -1)
        torch.testing.assert_close(encoder(batch).pooled, expected)
        torch.testing.assert_close(downstream(t, s, None, None, None, None, knn_eval=True), expected)
    assert f"{joints} joints of 2 bodies (assumed)" in lines[-1]


@both
def test_a_new_head_starts_as_published_scripts_start_it(kind, publish):
    torch.manual_seed(1)
    lines: list[str] = []
    model = load_downstream(publish(kind), num_class=200, announce=lines.append)
    assert model.fc.weight.shape == (200, 2 * WIDTH) and not model.fc.bias.any()
    assert float(model.fc.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    assert any("no head stored, fc of 200 classes starts anew" in line for line in lines)


@both
def test_a_stored_head_is_kept(kind, publish):
    path, lines = publish(kind, build="Downstream", num_class=7), []
    stored = torch.load(path, weights_only=True)["state_dict"]
    model = load_downstream(path, num_class=7, announce=lines.append)
    assert torch.equal(model.fc.weight, stored["module.fc.weight"])
    assert torch.equal(model.fc.bias, stored["module.fc.bias"])
    assert len(lines) == 1
    with pytest.raises(ValueError, match=r"of another shape \['fc.weight', 'fc.bias'\]"):
        load_downstream(path, num_class=8, announce=silent)
    # the encoder does not need the head, whatever its classes
    assert load_published_encoder(path, announce=silent)[0](clips()).pooled.shape == (3, 2 * WIDTH)


def test_what_the_file_does_not_record_is_announced(publish):
    path, lines = publish(), []
    load_published_encoder(path, announce=lines.append)
    sizes = "t_input_size=150, s_input_size=48, hidden_size=16, num_layer=2"
    assumed = "num_head=1 (assumed), gap=4 (assumed), alpha=0.5 (assumed), modality=joint (assumed)"
    assert lines[0] == f"checkpoint_0450.pth.tar: DSTE, {sizes}; not recorded in the file: {assumed}"
    load_downstream(publish("sttr"), announce=lines.append)
    assert lines[2] == f"checkpoint_0450.pth.tar: STTR, {sizes}; not recorded in the file: " + (
        "num_head=1 (assumed), modality=joint (assumed)"
    )


def test_announcements_are_printed(publish, capsys):
    load_downstream(publish())
    assert "not recorded in the file: num_head=1 (assumed)" in capsys.readouterr().out


def test_settings_replace_what_is_assumed(publish):
    path, lines = publish(), []
    encoder, view = load_published_encoder(path, announce=lines.append, num_head=4, gap=2, alpha=0.3, modality="bone")
    expected = {"num_heads": 4, "gap": 2, "alpha": 0.3, "num_layers": 2, "num_joints": 25, "num_bodies": 2}
    assert {key: encoder.config[key] for key in expected} == expected and view.stream == "bone"
    assert "num_head=4, gap=2, alpha=0.3, modality=bone" in lines[0] and "assumed" not in lines[0]
    model = load_downstream(path, announce=silent, num_head=4, gap=2, alpha=0.3, modality="bone")
    assert model.modality == "bone"
    assert {key: model.backbone.config[key] for key in expected} == expected


def test_bodies_can_be_given(publish):
    lines: list[str] = []
    encoder, _ = load_published_encoder(publish(t_input=60), num_bodies=1, announce=lines.append)
    assert (encoder.config["num_joints"], encoder.config["num_bodies"]) == (20, 1)
    assert "20 joints of 1 bodies (given)" in lines[-1]
    with pytest.raises(ValueError, match="num_bodies must divide the 20 spatial tokens of .*, got 3"):
        load_published_encoder(publish(t_input=60), num_bodies=3, announce=silent)


@pytest.mark.parametrize("load", [load_downstream, load_published_encoder])
@pytest.mark.parametrize("kind, name", [("dste", "width"), ("sttr", "gap"), ("sttr", "alpha")])
def test_unknown_settings_are_refused(load, kind, name, publish):
    with pytest.raises(ValueError, match=rf"settings of .*pth.tar must be among .*, got \['{name}'\]"):
        load(publish(kind), announce=silent, **{name: 1})


def remove(key: str) -> Callable[[dict], Any]:
    return lambda state: state.pop(key)


def put(key: str, value: Any) -> Callable[[dict], Any]:
    return lambda state: state.update({key: value})


DAMAGES = {
    "missing": (remove("module.backbone.t_tr1.CA.norm1.bias"), r"missing \['(backbone\.)?t_tr1.CA.norm1.bias'\]"),
    "missing copy": (remove("module.backbone.s_tr.DSA.attn.in_proj_bias"), r"missing \['.*s_tr.DSA.attn.in_proj_bias'\]"),
    "missing original": (remove("module.backbone.s_tr.CA.attn.in_proj_bias"), "equal copies of .*s_tr.DSA.attn.in_proj_bias"),
    "extra": (put("module.backbone.t_tr2.CA.norm1.bias", torch.zeros(1)), r"unexpected \['.*t_tr2.CA.norm1.bias'\]"),
    "extra head": (put("module.head.weight", torch.zeros(1)), r"unexpected \['head.weight'\]"),
    "shape": (put("module.backbone.t_tr.DSA.wt1.weight", torch.zeros(8, 8)), r"another shape \['.*t_tr.DSA.wt1.weight'\]"),
    "copies": (
        put("module.backbone.t_tr.DSA.attn.out_proj.weight", torch.zeros(WIDTH, WIDTH)),
        "equal copies of backbone.t_tr.DSA.attn.out_proj.weight and backbone.t_tr.CA.attn.out_proj.weight",
    ),
    "tokens": (put("module.backbone.spe", torch.zeros(1, 34, WIDTH)), "t_input_size / 3 spatial tokens, got 150 and 34"),
    "no spe": (remove("module.backbone.spe"), "hold backbone.spe of 3 dimensions, got none"),
    "flat spe": (put("module.backbone.spe", torch.zeros(50)), r"hold backbone.spe of 3 dimensions, got \(50,\)"),
    "another model": (lambda state: [state.pop(k) for k in list(state) if "t_tr" in k], "hold backbone.t_tr of DSTE or STTR"),
    "no tensor": (put("module.backbone.spe", 3), "hold a state_dict of named tensors, got .*'state_dict'"),
    "no name": (put(7, torch.zeros(1)), "hold a state_dict of named tensors"),
}  # fmt: skip


@pytest.mark.parametrize("load", [load_downstream, load_published_encoder])
@pytest.mark.parametrize("change, message", DAMAGES.values(), ids=DAMAGES)
def test_files_that_do_not_fit_are_refused(load, change, message, publish):
    path = publish(change=change)
    with pytest.raises(ValueError, match=message) as caught:
        load(path, announce=silent)
    assert str(path) in str(caught.value)


def test_half_a_head_is_refused(publish):
    path = publish(build="Downstream", change=remove("module.fc.bias"))
    with pytest.raises(ValueError, match=r"missing \['fc.bias'\]"):
        load_downstream(path, announce=silent)


class Malicious:
    """Creates a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def save(value: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


BROKEN = {
    "empty": (lambda path: path.write_bytes(b""), "got a damaged one"),
    "text": (lambda path: path.write_bytes(b"hello world" * 10), "got a damaged one"),
    "folder": (lambda path: path.mkdir(), "be a readable file, got Is a directory"),
    "absent": (lambda path: None, "be a readable file, got No such file or directory"),
    "no state_dict": (save({"epoch": 3, "model": {}}), r"hold a state_dict of named tensors, got \['epoch', 'model'\]"),
    "list": (save([torch.zeros(1)]), "hold a state_dict of named tensors, got list"),
    "epoch": (save({"state_dict": {}, "epoch": "last"}), "hold its epoch as a number, got 'last'"),
}


@pytest.mark.parametrize("write, message", BROKEN.values(), ids=BROKEN)
def test_broken_files_are_refused(write, message, tmp_path):
    path = tmp_path / "broken.pth.tar"
    write(path)
    with pytest.raises(ValueError, match=message) as caught:
        read_published(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_truncated_files_are_refused(share, publish):
    path = publish()
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="must be a checkpoint of tensors and plain values, got a damaged one"):
        read_published(path)


@pytest.mark.parametrize("place", ["state_dict", "optimizer"])
def test_a_malicious_pickle_is_not_run(place, publish, tmp_path):
    path, target = publish(), tmp_path / "harm"
    stored = torch.load(path, weights_only=True)
    torch.save(stored | {place: Malicious(target)}, path)
    with pytest.raises(ValueError, match="got a pickle that asks for .*mkdir. Nothing in it was run") as caught:
        read_published(path)
    assert not target.exists()
    # torch's own text advises to switch the protection off
    assert "weights_only" not in str(caught.value)


# export ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_synthetic(tmp_path_factory.mktemp("data") / "packed", num_clips=12, num_classes=3, num_subjects=4)


def make_run(dataset, out: Path, encoder: str = "usdrl-dste", epochs: int = 2, **options) -> Path:
    sizes = {"num_joints": 25, "num_bodies": 1, "num_frames": FRAMES, "width": WIDTH}
    views = usdrl_views(FRAMES, min_frames=FRAMES)
    stage = Stage(
        encoder=encoder, encoder_options=sizes | options, objective="mgfd", views=views, eval_view=eval_view(FRAMES),
        epochs=epochs, batch_size=12, lr=3e-3, weight_decay=1e-2, milestones=(2,),
    )  # fmt: skip
    pretrain(stage, dataset, out, device="cpu", progress=False)
    return out


@pytest.fixture(scope="module", params=MODULES)
def run(request, dataset, tmp_path_factory) -> tuple[str, Path]:
    """Three steps of one encoder, with checkpoints after the second and the third."""
    options = {"drop_path": 0.0} if request.param == "dste" else {}
    folder = tmp_path_factory.mktemp("runs") / request.param
    return request.param, make_run(dataset, folder, f"usdrl-{request.param}", epochs=3, **options)


def resumed(kind: str, path: Path) -> tuple[nn.Module, torch.optim.Adam, dict[str, Any]]:
    """Load an exported file as the reference's scripts would."""
    stored = torch.load(path, weights_only=True)
    model = MODULES[kind].USDRL(75, FRAMES * 3, WIDTH, 1, 2)
    model.load_state_dict({key.split("module.")[-1]: value for key, value in stored["state_dict"].items()}, strict=True)
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.load_state_dict(stored["optimizer"])
    return model.train(), optimizer, stored


def native_name(name: str) -> str:
    name = name.replace(".DSA.attn.", ".CA.attn.")
    return f"encoder.{name.removeprefix('backbone.')}" if name.startswith("backbone.") else f"objective.{name}"


def test_export_holds_the_weights_and_the_encoder_comes_back(run, tmp_path):
    kind, folder = run
    path = export(folder, tmp_path / "out.pth.tar", announce=silent)
    model, _, stored = resumed(kind, path)
    assert stored["epoch"] == 3 and all(key.startswith("module.") for key in stored["state_dict"])
    native = read_checkpoint(folder).model
    for name, value in model.state_dict().items():
        assert torch.equal(value, native[native_name(name)]), name
    encoder, view = load_published_encoder(path, announce=silent)
    original, original_view, _ = load_encoder(folder)
    batch = clips(25, 1)
    assert view.frames == original_view.frames == FRAMES
    assert torch.equal(encoder(batch).pooled, original(batch).pooled)


def test_training_goes_on_from_an_export_as_it_does_natively(run, dataset, tmp_path):
    kind, folder = run
    before, after = sorted((folder / "checkpoints").glob("step-*"))
    model, optimizer, _ = resumed(kind, export(before, tmp_path / "out.pth.tar", announce=silent))
    if kind == "dste":
        model.backbone.drop_path = 0.0
    group = optimizer.param_groups[0]
    # the milestone at epoch 2 has passed
    assert (group["lr"], group["weight_decay"]) == (pytest.approx(3e-4), 1e-2)
    loader = Loader(dataset, views=usdrl_views(FRAMES, min_frames=FRAMES), batch_size=12)
    loader.load_state_dict(read_checkpoint(before).state["loader"])
    (batch,) = loader
    z_t, z_s, z_i = model(*(view.clips.permute(0, 4, 1, 3, 2) for view in batch.views))
    loss = torch.zeros(())
    for z, share in ((z_t, 0.5), (z_s, 0.5), (z_i, 1.0)):
        terms = 5 * similarity(z, nn.MSELoss()) + sum(v_ac(view) for view in z) + 1e-3 * cal_xc(z)
        loss = loss + share * terms
    optimizer.zero_grad()
    loss.backward()
    before_step = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    expected = read_checkpoint(after).model
    compared = 0
    for name, parameter in model.named_parameters():
        truth = expected[native_name(name)]
        moved = (truth - before_step[name]).norm()
        error = (parameter.detach() - truth).norm() / moved
        # biases before a BatchNorm or softmax have gradients of rounding noise, which Adam makes large
        noise = name.endswith("bias") and error > 1e-2
        compared += not noise
        assert error < 1e-2 or noise, (name, float(error))
        assert (parameter.detach() - truth).abs().max() <= 2 * 3e-4 + 1e-6, name
    assert compared > 0.8 * len(before_step)
    for name, value in model.state_dict().items():
        if "running" in name or "tracked" in name:
            torch.testing.assert_close(value, expected[native_name(name)], rtol=1e-4, atol=1e-5)


def test_export_says_what_the_published_scripts_hard_code(run, tmp_path):
    kind, folder = run
    lines: list[str] = []
    export(folder, tmp_path / "out.pth.tar", announce=lines.append)
    assert "25 spatial tokens and 16 frames" in lines[0]
    assert len(lines) == (2 if kind == "dste" else 1)
    assert kind == "sttr" or "drop_path 0.0; the reference always trains with 0.1" in lines[1]


def test_export_refuses_what_would_be_overwritten(run, tmp_path):
    target = tmp_path / "out.pth.tar"
    target.write_text("precious")
    with pytest.raises(ValueError, match="out must be new, got the existing .*out.pth.tar"):
        export(run[1], target)
    assert target.read_text() == "precious"
    with pytest.raises(ValueError, match="out must be in an existing folder"):
        export(run[1], tmp_path / "absent" / "out.pth.tar")
    with pytest.raises(ValueError, match="path must be a run or checkpoint folder"):
        export(tmp_path, tmp_path / "other.pth.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["out.pth.tar"]


def test_export_refuses_what_the_reference_cannot_express(dataset, tmp_path):
    deep = make_run(dataset, tmp_path / "deep", epochs=1, num_layers=3)
    with pytest.raises(ValueError, match="3 channels and, for DSTE, two layers, got 3 and 3"):
        export(deep, tmp_path / "out.pth.tar")
    state = next((deep / "checkpoints").glob("*/state.json"))
    # as older versions wrote it, without a checksum of its own
    plain = json.loads(state.read_text())
    del plain["checksums"]
    state.write_text(json.dumps(plain).replace('"mgfd"', '"masked"'))
    with pytest.raises(ValueError, match="trained with mgfd, got usdrl-dste with masked"):
        export(deep, tmp_path / "out.pth.tar")
    state.write_text(state.read_text().replace('"masked"', '"mgfd"').replace('"usdrl-dste"', '"gru"'))
    with pytest.raises(ValueError, match="must hold usdrl-dste or usdrl-sttr trained with mgfd, got gru"):
        export(deep, tmp_path / "out.pth.tar")
    assert not (tmp_path / "out.pth.tar").exists()


@pytest.mark.parametrize("t_input, joints", [(150, 25), (102, 17)])
@pytest.mark.parametrize("modality", ["joint", "bone", "motion"])
def test_a_published_file_sees_its_own_modality(publish, t_input, joints, modality):
    """The view that comes with the encoder makes of a clip what the reference's model makes of it."""
    path = publish(t_input=t_input)
    encoder, view = load_published_encoder(path, announce=silent, modality=modality)
    raw = clips(joints)
    seen = stream(raw.clips, view.stream, raw.topology, view.bone_variant)
    reference = dste.USDRL(t_input, FRAMES * 3, WIDTH, 1, 2, modality=modality).eval()
    reference.load_state_dict({k.removeprefix("module."): v for k, v in torch.load(path)["state_dict"].items()})
    y_t, y_s = reference.backbone(*reference.modality_generation(raw.clips.permute(0, 4, 1, 3, 2), modality))
    torch.testing.assert_close(encoder(replace(raw, clips=seen)).pooled, torch.cat([y_t.amax(1), y_s.amax(1)], -1))


def test_bodies_follow_from_the_skeleton_of_the_data(publish):
    encoder, _ = load_published_encoder(publish(t_input=120), announce=silent, topology=topology("kinect-20-utd"))
    assert (encoder.config["num_joints"], encoder.config["num_bodies"]) == (20, 2)
    with pytest.raises(ValueError, match="the 40 spatial tokens of .* must be bodies of 25 joints, as ntu-25 has"):
        load_published_encoder(publish(t_input=120), announce=silent, topology=topology("ntu-25"))
