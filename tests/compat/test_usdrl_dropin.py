"""Existing USDRL code keeps working after changing its import lines."""

from __future__ import annotations

import copy
import importlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastskel.compat.usdrl import dste, sttr
from fastskel.compat.usdrl.loss import cal_xc, similarity, v_ac

MODULES = [dste, sttr]
# the second of each pair is what the reference's options hold, at a small width
ARGUMENTS = {"t_input_size": 150, "s_input_size": 192, "hidden_size": 16, "num_head": 1, "num_layer": 2,
             "alpha": 0.5, "kernel_size": 1, "gap": 4}  # fmt: skip

both = pytest.mark.parametrize("module", MODULES, ids=["dste", "sttr"])


def clips(rows: int = 4, joints: int = 25, frames: int = 64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 3, frames, joints, 2, generator=generator) for _ in range(4)]


def tokens(rows: int = 3, joints: int = 25, frames: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    pair = ((rows, frames, 2 * joints * 3), (rows, 2 * joints, frames * 3))
    return [torch.randn(shape, generator=generator) for _ in range(3) for shape in pair]


def train_step(model: nn.Module, views: list[Tensor], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler):
    """One step as the reference's `pretrain.py` takes it."""
    with torch.autocast("cpu", torch.float16):
        z_t, z_s, z_i = model(*views)
        criterion = nn.MSELoss()
        sim = similarity(z_i, criterion) + 0.5 * (similarity(z_t, criterion) + similarity(z_s, criterion))
        vac = sum(v_ac(z_i[k]) + 0.5 * (v_ac(z_t[k]) + v_ac(z_s[k])) for k in range(4))
        xcorr = cal_xc(z_i) + 0.5 * (cal_xc(z_t) + cal_xc(z_s))
        loss = 5 * sim + vac + 1e-3 * xcorr
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.item()


@both
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, copy.deepcopy], ids=["plain", "DataParallel", "deepcopy"])
def test_training_step_under_autocast_and_scaler(module, wrap):
    torch.manual_seed(0)
    model = wrap(module.USDRL(**ARGUMENTS)).train()
    optimizer = torch.optim.Adam(model.parameters(), 5e-4, weight_decay=1e-5)
    scaler = torch.amp.GradScaler("cpu")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    # the scaler starts at 65,536 and halves with each step that overflows, until one is taken
    for _ in range(12):
        scale = scaler.get_scale()
        assert math.isfinite(train_step(model, clips(), optimizer, scaler))
        if scaler.get_scale() == scale:
            break
    else:
        pytest.fail(f"every step overflowed, down to a scale of {scale}")
    same = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert same == []


@both
def test_replicas_of_data_parallel(module, monkeypatch):
    """DataParallel's replicas hold plain tensors instead of parameters: forward and gradients must not mind."""

    def copies(tensors, devices, detach=False):
        return [[t.detach().clone() if detach else t * 1 for t in tensors] for _ in devices]

    # the package's attribute of that name is its function
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)
    torch.manual_seed(0)
    model = module.USDRL(**ARGUMENTS).train()
    if module is dste:
        model.backbone.drop_path = 0.0
    replicas, views = replicate.replicate(model, [0, 1]), clips(8)
    halves = [replica(*(view.chunk(2)[number] for view in views)) for number, replica in enumerate(replicas)]
    assert not list(replicas[0].parameters())
    sum(z.sum() for half in halves for domain in half for z in domain).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected = [model(*(view.chunk(2)[number] for view in views)) for number in range(2)]
    sum(z.sum() for half in expected for domain in half for z in domain).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name, rtol=1e-4, atol=1e-4)
    for half, truth in zip(halves, expected, strict=True):
        for domain, others in zip(half, truth, strict=True):
            assert isinstance(domain, list) and len(domain) == 4
            for z, other in zip(domain, others, strict=True):
                torch.testing.assert_close(z, other)


@both
def test_constructors_take_their_arguments_in_the_published_order(module):
    order = (150, 192, 16, 2, 3)
    last = (0.3, 1, 2) if module is sttr else (0.3, 2, 1)
    pretraining = module.USDRL(*order, "motion", *last)
    downstream = module.Downstream(*order, 7, "bone", 0.3, 2, 1)
    backbone = dste.DSTE(*order, 0.3, 2, 1) if module is dste else sttr.STTR(*order)
    assert pretraining.modality == "motion" and downstream.modality == "bone"
    assert downstream.fc.weight.shape == (7, 32)
    assert pretraining.d_model == downstream.d_model == 32 and backbone.d_model == 16
    for config in (pretraining.backbone.config, downstream.backbone.config, backbone.config):
        expected = {"num_joints": 25, "num_bodies": 2, "num_frames": 64, "num_channels": 3, "width": 16, "num_heads": 2}
        expected |= {"alpha": 0.3, "gap": 2, "num_layers": 2} if module is dste else {"num_layers": 3}
        assert {key: config[key] for key in expected} == expected


@both
def test_children_and_keys_are_in_the_published_order(module):
    assert [name for name, _ in module.USDRL(**ARGUMENTS).named_children()] == ["backbone", "i_proj", "s_proj", "t_proj"]
    state = list(module.Downstream(**ARGUMENTS).state_dict())
    assert state[0] == "backbone.spe" and state[-2:] == ["fc.weight", "fc.bias"]


def test_dste_ignores_its_number_of_layers():
    shapes = [
        [(k, v.shape) for k, v in dste.USDRL(150, 192, 16, 1, layers).state_dict().items()] for layers in (1, 2, 5)
    ]
    assert shapes[0] == shapes[1] == shapes[2] and len(shapes[0]) == 182


@pytest.mark.parametrize("t_input, tokens", [(150, 50), (102, 34), (75, 25), (120, 40)])
@both
def test_spatial_tokens_follow_from_the_input_size(module, t_input, tokens):
    model = module.USDRL(t_input, 192, 16, 1, 2)
    assert model.backbone.spe.shape == (1, tokens, 16)
    bodies = 1 if tokens % 2 else 2
    views = [torch.randn(2, 3, 64, tokens // bodies, bodies) for _ in range(4)]
    z_t, z_s, z_i = model(*views)
    assert [z.shape for z in z_t] == [z.shape for z in z_s] == [(2, 32)] * 4
    assert [z.shape for z in z_i] == [(2, 64)] * 4


@pytest.mark.parametrize("build", [dste.DSTE, dste.USDRL, dste.Downstream])
def test_kernels_that_never_worked_are_refused(build):
    with pytest.raises(ValueError, match="kernel_size must be 1, got 3"):
        build(150, 192, 16, 1, 2, alpha=0.5, gap=4, kernel_size=3)


@both
@pytest.mark.parametrize(
    "change, message",
    [
        ({"t_input_size": 151}, "t_input_size must be a positive multiple of 3, got 151"),
        ({"s_input_size": 0}, "s_input_size must be a positive multiple of 3, got 0"),
        ({"modality": "bones"}, "modality must be one of .*, got 'bones'"),
        ({"num_head": 3}, "num_heads must divide width 16.* got 3"),
    ],
)
def test_arguments_out_of_range_are_refused(module, change, message):
    for build in (module.USDRL, module.Downstream):
        with pytest.raises(ValueError, match=message):
            build(**(ARGUMENTS | change))


@both
@pytest.mark.parametrize("modality", ["joint", "bone", "motion"])
def test_downstream_reads_the_pair_of_its_modality(module, modality):
    torch.manual_seed(0)
    model = module.Downstream(**ARGUMENTS, num_class=7, modality=modality).eval()
    inputs = tokens()
    first = 2 * ["joint", "bone", "motion"].index(modality)
    with torch.no_grad():
        scores, features = model(*inputs), model(*inputs, knn_eval=True)
        y_t, y_s = model.backbone(inputs[first], inputs[first + 1])
        others = [None] * 6
        others[first : first + 2] = inputs[first : first + 2]
        assert torch.equal(model(*others), scores)
        torch.testing.assert_close(features, torch.cat([y_t.amax(1), y_s.amax(1)], -1))
        torch.testing.assert_close(scores, model.fc(features))
        with pytest.raises(ValueError, match=f"Downstream: {modality} tokens must be given, got None"):
            model(*[None] * 6)
    assert scores.shape == (3, 7) and features.shape == (3, 32)


@both
@pytest.mark.parametrize("joints, frames", [(25, 64), (17, 64), (32, 64), (25, 20)], ids=str)
def test_detection_scores_every_frame(module, joints, frames):
    """Bin i averages spatial tokens floor(i S / T) to ceil((i + 1) S / T) - 1; with as many tokens as frames, one each."""
    torch.manual_seed(0)
    model = module.Downstream(2 * joints * 3, frames * 3, 16, 1, 2, num_class=5).eval()
    inputs = tokens(joints=joints, frames=frames)
    with torch.no_grad():
        scores = model(*inputs, detect=True)
        y_t, y_s = model.backbone(*inputs[:2])
        bins = [(i * 2 * joints // frames, -(-(i + 1) * 2 * joints // frames)) for i in range(frames)]
        pooled = torch.stack([y_s[:, begin:end].mean(1) for begin, end in bins], 1)
        torch.testing.assert_close(scores, model.fc(torch.cat([y_t, pooled], -1)))
    assert scores.shape == (3, frames, 5)
    assert joints != 32 or bins == [(i, i + 1) for i in range(64)]


@both
def test_tokens_of_different_clips_are_refused(module):
    model = module.Downstream(**ARGUMENTS)
    jt, js = tokens()[:2]
    for pair in ((jt[:, :32], js), (js, jt), (jt, js[:, :1])):
        with pytest.raises(ValueError, match=r"tokens must be \(N, T, 150\) and \(N, 50, T\*3\)"):
            model(*pair, None, None, None, None)


@both
@pytest.mark.parametrize(
    "joints, pairs",
    [
        (25, "1 2,2 21,3 21,4 3,5 21,6 5,7 6,8 7,9 21,10 9,11 10,12 11,13 1,14 13,15 14,16 15,17 1,18 17,19 18,20 19,21 21,"
             "22 23,23 8,24 25,25 12"),
        (17, "1 2,2 4,3 5,4 6,5 7,7 9,8 10,9 11,10 8,11 9,12 14,13 15,14 16,15 17,16 14,17 15"),
    ],
    ids=["25", "17"],
)  # fmt: skip
def test_modalities(module, joints, pairs):
    model = module.USDRL(2 * joints * 3, 192, 16, 1, 2)
    x = clips(2, joints)[0]
    bone, motion = torch.zeros_like(x), torch.zeros_like(x)
    for pair in pairs.split(","):
        child, parent = (int(number) - 1 for number in pair.split())
        bone[..., child, :] = x[..., child, :] - x[..., parent, :]
    motion[:, :, :-1] = x[:, :, 1:] - x[:, :, :-1]
    for modality, values in (("joint", x), ("bone", bone), ("motion", motion)):
        t, s = model.modality_generation(x, modality)
        assert torch.equal(t, values.permute(0, 2, 4, 3, 1).reshape(2, 64, -1))
        assert torch.equal(s, values.permute(0, 4, 3, 2, 1).reshape(2, 2 * joints, -1))
        model.modality = modality
        assert all(z.isfinite().all() for z in model.sub_forward(x))


@both
def test_bones_of_an_unknown_skeleton_are_refused(module):
    model = module.USDRL(120, 192, 16, 1, 2, "bone")
    with pytest.raises(ValueError, match=r"bone modality: joints must be one of \[17, 25\], got 20"):
        model(*clips(2, 20))


@both
def test_the_backbone_is_called_as_a_module(module):
    """Hooks and replacements of `model.backbone` in existing code take effect; four views that agree are one call."""
    model, calls = module.USDRL(**ARGUMENTS), []
    model.backbone.register_forward_hook(lambda _, args, __: calls.append(args[0].shape[0]))
    model(*clips(2))
    assert calls == [8]
    model.backbone = nn.DataParallel(model.backbone)
    model(*clips(2))
    assert calls == [8, 8]
    model(*clips(2)[:3], clips(3)[3])
    assert calls == [8, 8, 2, 2, 2, 3]


def view_by_view(model: nn.Module, views: list[Tensor]) -> tuple[list[Tensor], ...]:
    """What the reference does, through torch's own modules and maxima."""
    embedded = []
    for view in views:
        y_t, y_s = (y.amax(1) for y in model.backbone(*model.modality_generation(view, model.modality)))
        embedded.append((model.t_proj(y_t), model.s_proj(y_s), model.i_proj(torch.cat([y_t, y_s], -1))))
    return tuple(list(z) for z in zip(*embedded, strict=True))


def exact(module, modality: str = "joint") -> nn.Module:
    """In fp64, without DropPath, with weights so large that views differ in their statistics."""
    torch.manual_seed(0)
    model = module.USDRL(**ARGUMENTS, modality=modality).double()
    if module is dste:
        model.backbone.drop_path = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def compare(model: nn.Module, views: list[Tensor], other: nn.Module | None = None) -> None:
    """Embeddings, gradients of weights and clips, and running statistics, against view by view."""
    other = copy.deepcopy(model) if other is None else other
    leaves = [[view.clone().requires_grad_() for view in views] for _ in range(2)]
    actual, expected = model(*leaves[0]), view_by_view(other, leaves[1])
    factors = [torch.randn(z[0].shape[1], dtype=torch.float64) for z in expected]
    for lists in (actual, expected):
        assert all(isinstance(z, list) and len(z) == 4 for z in lists)
        # squares, because sums over a batch lose what a norm centred
        sum(((z + number) ** 2 @ factor).sum() for domain, factor in zip(lists, factors, strict=True)
            for number, z in enumerate(domain)).backward()  # fmt: skip
    for domain, truth in zip(actual, expected, strict=True):
        for z, other_z in zip(domain, truth, strict=True):
            torch.testing.assert_close(z, other_z, rtol=1e-8, atol=1e-9)
            assert z.is_contiguous()
    for one, two in zip(leaves[0], leaves[1], strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-6, atol=1e-7)
    for (name, parameter), truth in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, truth[1].grad, rtol=1e-6, atol=1e-6, msg=name)
    for (name, buffer), truth in zip(model.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(buffer, truth[1], rtol=1e-9, atol=1e-10, msg=name)


@both
@pytest.mark.parametrize("modality", ["joint", "bone", "motion"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_views_together_equal_views_singly(module, modality, training):
    views = [(1 + number) * view.double() for number, view in enumerate(clips(5, seed=3))]
    compare(exact(module, modality).train(training), views)


@both
def test_views_that_differ_pass_singly(module):
    """Of other lengths, batch sizes or types."""
    model, views = exact(module).train(), [view.double() for view in clips(5)]
    calls = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    compare(model, [views[0], views[1][:, :, :20], views[2], views[3][:4]], other=exact(module).train())
    assert len(calls) == 4
    with pytest.raises((RuntimeError, ValueError), match="type"):
        model(*views[:3], views[3].float())


@both
def test_another_sub_forward_is_honoured(module):
    class Halved(module.USDRL):
        def sub_forward(self, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            z_t, z_s, z_i = super().sub_forward(data)
            return z_t / 2, z_s / 2, z_i / 2

    model = exact(module).eval()
    views = [view.double() for view in clips(3)]
    subclass = Halved(**ARGUMENTS).double().eval()
    subclass.load_state_dict(model.state_dict())
    patched = copy.deepcopy(model)
    patched.sub_forward = lambda data: tuple(z / 2 for z in type(patched).sub_forward(patched, data))
    for changed in (subclass, patched):
        for domain, halves in zip(model(*views), changed(*views), strict=True):
            for z, half in zip(domain, halves, strict=True):
                torch.testing.assert_close(z / 2, half, rtol=1e-10, atol=1e-12)


class Normalised(nn.Module):
    """A backbone of somebody's own, whose output depends on the whole batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm = inner, nn.BatchNorm1d(16).double()

    def forward(self, jt: Tensor, js: Tensor) -> tuple[Tensor, Tensor]:
        y_t, y_s = self.inner(jt, js)
        return self.norm(y_t.transpose(1, 2)).transpose(1, 2), y_s


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_backbone_with_batch_statistics_stays_exact(training):
    model, calls = exact(sttr), []
    model.backbone = Normalised(model.backbone)
    model.train(training)
    other = copy.deepcopy(model)
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    compare(model, [(1 + number) * view.double() for number, view in enumerate(clips(5))], other=other)
    assert len(calls) == (4 if training else 1)


def test_a_projector_of_ones_own_is_called_view_by_view():
    model = exact(sttr).train()
    model.i_proj = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 8)).double()
    other, calls = copy.deepcopy(model), []
    model.i_proj.register_forward_hook(lambda *_: calls.append(1))
    compare(model, [view.double() for view in clips(5)], other=other)
    assert len(calls) == 4


def test_embeddings_may_be_changed_in_place():
    model = exact(sttr).train()
    z_t, _, _ = model(*(view.double() for view in clips(3)))
    for number, z in enumerate(z_t):
        z -= number
    assert z_t[0]._base is None
    sum(z.sum() for z in z_t).backward()


def test_views_of_one_pass_are_dropped_independently():
    """Four equal views: one draw of torch's generator keys the pass, and rows number the draws."""
    model = dste.USDRL(**ARGUMENTS).train()
    model.backbone.drop_path = 0.5
    before, streams = torch.get_rng_state(), []
    model.backbone.register_forward_hook(lambda *args: streams.append(args[2][0].detach()))
    view = clips(16)[0]
    model(*[view] * 4)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.randint(2**62, ())
    assert torch.equal(torch.get_rng_state(), after)
    quarters = streams[0].chunk(4)
    # two samples of two views agree only if 12 coins do
    for a in range(4):
        for b in range(a):
            assert int((quarters[a] == quarters[b]).all(-1).all(-1).sum()) <= 2


def test_seeds_make_dste_repeatable():
    model, views, outs = dste.USDRL(**ARGUMENTS).train(), clips(), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(model(*views)[2][0].detach().numpy())
    assert np.array_equal(outs[0], outs[1]) and not np.array_equal(outs[0], outs[2])
