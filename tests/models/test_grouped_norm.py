"""Grouped normalisation against separate forward passes: outputs, gradients, running statistics, types."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastskel.nn.grouped_norm import can_group, grouped_batch_norm, grouped_projector

OPTIONS = {
    "plain": {},
    "cumulative": {"momentum": None},
    "fast": {"momentum": 0.7},
    "last": {"momentum": 1.0},
    "frozen": {"momentum": 0.0},
    "no affine": {"affine": False},
    "untracked": {"track_running_stats": False},
    "bare": {"affine": False, "track_running_stats": False, "eps": 0.1},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def views(w: int, n: int, f: int) -> Tensor:
    """Views that differ in mean and deviation, so that mixing them up shows."""
    number = torch.arange(w, dtype=torch.float64)[:, None, None]
    return normal(w, n, f) * (1 + number) + 3 * number


def randomise(module: nn.Module) -> None:
    """Weights, and running statistics, away from their start."""
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.add_(0.5 * normal(*parameter.shape, seed=seed + 50))
        for name, buffer in module.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.fill_(5)
            else:
                buffer.add_(normal(*buffer.shape, seed=7).abs())


def separately(module: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([module(view) for view in x])


def compare(module: nn.Module, function, x: Tensor, *, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    """Twice through both: outputs, gradients of input and parameters, buffers."""
    other = copy.deepcopy(module)
    for turn in range(2):
        leaves = [(x + turn).detach().requires_grad_() for _ in range(2)]
        actual, expected = function(module, leaves[0]), separately(other, leaves[1])
        assert actual.dtype == expected.dtype and actual.is_contiguous()
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
        factors = normal(*actual.shape, seed=3).to(actual.dtype)
        for out in (actual, expected):
            (out * factors).sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=rtol, atol=atol)
    for (name, parameter), truth in zip(module.named_parameters(), other.parameters(), strict=True):
        assert parameter.grad.dtype == truth.grad.dtype
        torch.testing.assert_close(parameter.grad, truth.grad, rtol=rtol, atol=atol, msg=name)
    for (name, buffer), truth in zip(module.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(buffer, truth, rtol=rtol, atol=atol, msg=name)


def norm_of(module: nn.BatchNorm1d, x: Tensor) -> Tensor:
    return grouped_batch_norm(x, module)


@options
@pytest.mark.parametrize("shape", [(4, 6, 5), (1, 3, 2), (3, 2, 1), (2, 9, 4)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_norm_equals_separate_passes(options, shape, training):
    norm = nn.BatchNorm1d(shape[2], **options).double().train(training)
    randomise(norm)
    compare(norm, norm_of, views(*shape))


def test_the_order_of_the_views_counts():
    norms = [nn.BatchNorm1d(5).double() for _ in range(2)]
    x = views(3, 6, 5)
    for norm, part in zip(norms, (x, x.flip(0)), strict=True):
        grouped_batch_norm(part, norm)
    assert (norms[0].running_mean - norms[1].running_mean).abs().min() > 0.05
    assert int(norms[0].num_batches_tracked) == 3


def test_input_may_have_any_strides():
    x = views(5, 4, 3).transpose(0, 2)
    assert not x.is_contiguous()
    compare(nn.BatchNorm1d(5).double(), norm_of, x)


def test_gradients_are_those_of_the_values():
    norm = nn.BatchNorm1d(3, track_running_stats=False).double()
    assert torch.autograd.gradcheck(lambda x: grouped_batch_norm(x, norm), (views(2, 4, 3).requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("half_weights", [False, True])
def test_norm_in_other_types(dtype, half_weights):
    norm = nn.BatchNorm1d(5).double()
    randomise(norm)
    norm = norm.to(dtype if half_weights else torch.float32)
    # the same kernel on the same numbers; running statistics and summed weight gradients round once more
    epsilon = torch.finfo(dtype).eps
    compare(norm, norm_of, views(4, 6, 5).to(dtype), rtol=8 * epsilon, atol=32 * epsilon)


def build(width_in: int = 5, width: int = 6, width_out: int = 7) -> nn.Sequential:
    projector = nn.Sequential(
        nn.Linear(width_in, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True), nn.Identity(),
        nn.Linear(width, width, bias=False), nn.BatchNorm1d(width, momentum=None), nn.ReLU(),
        nn.Linear(width, width_out),
    ).double()  # fmt: skip
    randomise(projector)
    return projector


@pytest.mark.parametrize("w, n", [(4, 6), (1, 4), (3, 2)])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_projector_equals_separate_passes(w, n, training):
    compare(build().train(training), grouped_projector, views(w, n, 5), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("n", [0, 1])
def test_evaluation_takes_any_number_of_samples(n):
    projector = build().eval()
    x = views(3, n, 5)
    torch.testing.assert_close(grouped_projector(projector, x), separately(projector, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_projector_under_autocast(dtype, training):
    projector = build().float().train(training)
    other, x = copy.deepcopy(projector), views(4, 8, 5).float()
    seen: list[list[Tensor]] = [[], []]
    for module, outs in zip((projector, other), seen, strict=True):
        for child in module:
            if isinstance(child, nn.ReLU):
                child.register_forward_pre_hook(lambda _, args, outs=outs: outs.append(args[0].detach().clone()))
    with torch.autocast("cpu", dtype):
        actual, expected = grouped_projector(projector, x), separately(other, x)
    assert actual.dtype == expected.dtype == dtype
    # what the first norm returns: rows of the four views lie side by side, and nothing but the layout differs
    first = seen[0][0].view(8, 4, -1).transpose(0, 1)
    assert first.dtype == dtype
    torch.testing.assert_close(first, torch.stack(seen[1][::2]), rtol=0, atol=0)
    torch.testing.assert_close(actual, expected, rtol=4 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)
    for buffer, truth in zip(projector.buffers(), other.buffers(), strict=True):
        assert buffer.dtype == truth.dtype
        torch.testing.assert_close(buffer, truth, rtol=1e-5, atol=1e-6)


def test_few_calls(monkeypatch):
    """One multiplication and one normalisation per layer, however many views there are."""
    calls = {"linear": 0, "batch_norm": 0}
    for name in calls:
        original = getattr(F, name)

        def counted(*args, name=name, original=original, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(F, name, counted)
    grouped_projector(build(), views(4, 6, 5))
    assert calls == {"linear": 3, "batch_norm": 2}


class Recorder(nn.BatchNorm1d):
    """A norm of a class of its own, as SyncBatchNorm is."""

    def forward(self, input: Tensor) -> Tensor:
        self.seen = [*getattr(self, "seen", []), input.detach()]
        return super().forward(input)


def test_norms_of_other_classes_are_called_view_by_view():
    norm = Recorder(5).double()
    randomise(norm)
    x = views(3, 4, 5)
    compare(norm, norm_of, x)
    assert len(norm.seen) == 6 and all(torch.equal(a, b) for a, b in zip(norm.seen, x, strict=False))
    projector = nn.Sequential(nn.Linear(5, 5), Recorder(5), nn.ReLU()).double()
    compare(projector, grouped_projector, x, rtol=1e-9, atol=1e-9)
    assert len(projector[1].seen) == 6


def test_synchronised_norms_are_called_view_by_view():
    projector = build().eval()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(projector))
    calls = []
    converted[1].register_forward_hook(lambda *_: calls.append(1))
    x = views(3, 4, 5)
    torch.testing.assert_close(grouped_projector(converted, x), grouped_projector(projector, x), rtol=1e-12, atol=1e-12)
    assert type(converted[1]) is nn.SyncBatchNorm and len(calls) == 3


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_fire(kind, training):
    """Hooks of a norm, and of the projector, once for each view; of other children once for all."""
    projector = build().train(training)
    calls = {name: [] for name in ("0", "1", "2", "5")}
    # a backward hook does not allow changing what it looks at in place
    projector[2].inplace = False
    compare_to = copy.deepcopy(projector)
    for name, seen in calls.items():
        getattr(projector[int(name)], kind)(lambda *_, seen=seen: seen.append(1))
    x = views(4, 6, 5)
    out = grouped_projector(projector, x.requires_grad_())
    out.sum().backward()
    torch.testing.assert_close(out, separately(compare_to, x), rtol=1e-10, atol=1e-12)
    assert {name: len(seen) for name, seen in calls.items()} == {"0": 1, "1": 4, "2": 1, "5": 4}


def test_hooks_of_the_projector_fire_view_by_view():
    projector, calls = build(), []
    projector.register_forward_hook(lambda *args: calls.append(args[2].shape))
    compare(projector, grouped_projector, views(4, 6, 5), rtol=1e-8, atol=1e-9)
    assert calls[:4] == [(6, 7)] * 4


class Shouting(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


STRANGE = {
    "Dropout": nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5)),
    "LayerNorm": nn.Sequential(nn.LayerNorm(5)),
    "Sequential": nn.Sequential(nn.Sequential(nn.Linear(5, 5))),
    "BatchNorm2d": nn.Sequential(nn.BatchNorm2d(5)),
    "Shouting": Shouting(nn.Linear(5, 5)),
    "Linear": nn.Linear(5, 5),
}


@pytest.mark.parametrize("name", STRANGE)
def test_other_projectors_are_refused_by_name(name):
    assert not can_group(STRANGE[name])
    with pytest.raises(ValueError, match=f"grouped_projector: projector must be .*, got {name}"):
        grouped_projector(STRANGE[name], torch.zeros(2, 3, 5))
    assert can_group(build()) and can_group(nn.Sequential())


@pytest.mark.parametrize("track, training", [(True, True), (True, False), (False, True), (False, False)])
def test_one_sample_is_refused_where_statistics_are_needed(track, training):
    norm = nn.BatchNorm1d(5, track_running_stats=track).train(training)
    x = torch.zeros(4, 1, 5)
    if track and not training:
        assert grouped_batch_norm(x, norm).shape == x.shape
        return
    for call in (lambda: grouped_batch_norm(x, norm), lambda: grouped_projector(nn.Sequential(norm), x)):
        with pytest.raises(ValueError, match=r"x must be \(W, N, F\) with N at least 2 in training, got \(4, 1, 5\)"):
            call()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        norm(x[0])


@pytest.mark.parametrize("shape", [(5,), (4, 5), (0, 4, 5), (2, 3, 4, 5)], ids=str)
def test_shapes_that_are_no_views_are_refused(shape):
    for call in (lambda x: grouped_batch_norm(x, nn.BatchNorm1d(5)), lambda x: grouped_projector(build(), x)):
        with pytest.raises(ValueError, match=r"x must be \(W, N, F\) with W at least 1, got \("):
            call(torch.zeros(shape))


def test_other_features_are_refused():
    with pytest.raises(ValueError, match=r"x must have 5 features, got \(2, 3, 10\)"):
        grouped_batch_norm(torch.zeros(2, 3, 10), nn.BatchNorm1d(5))
