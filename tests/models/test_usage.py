"""What existing code does with an encoder."""

from __future__ import annotations

import copy
import io
import threading
from dataclasses import replace

import pytest
import torch
import torch.utils.checkpoint
from fastskel.bench.reference import usdrl as reference
from torch import Tensor, nn

from fastskel.data.batch import View
from fastskel.models import DSTE, STTR

both = pytest.mark.parametrize("kind", [DSTE, STTR])


def loss_of(encoder: nn.Module, view: View) -> Tensor:
    # a power, because normalised features sum to a constant
    return (encoder(view).pooled ** 3).sum()


def single(view: View) -> View:
    return replace(view, clips=view.clips.float())


# --- mixed precision as existing code has it


@both
def test_fp16_autocast_with_a_gradient_scaler(make_encoder, gradients_of, kind, view):
    view, encoder = single(view), make_encoder(kind, torch.float32)
    expected = gradients_of(encoder, view)
    optimiser = torch.optim.SGD(encoder.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    optimiser.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(encoder, view)
    scaler.scale(loss).backward()
    scaler.unscale_(optimiser)
    for name, parameter in encoder.named_parameters():
        # some dozen float16 roundings of terms of the gradient's own size
        error = (parameter.grad - expected[name]).norm()
        assert error <= 50 * torch.finfo(torch.float16).eps * max(expected[name].norm(), 0.1), name
    before = [parameter.detach().clone() for parameter in encoder.parameters()]
    scaler.step(optimiser)
    scaler.update()
    assert scaler.get_scale() == 16.0
    changed = [not torch.equal(a, b) for a, b in zip(before, encoder.parameters(), strict=True)]
    assert all(changed)


@both
def test_overflow_is_seen_by_the_scaler(make_encoder, kind, view):
    view, encoder = single(view), make_encoder(kind, torch.float32)
    before = copy.deepcopy(encoder.state_dict())
    optimiser = torch.optim.SGD(encoder.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(encoder, view)
    scaler.scale(loss).backward()
    scaler.step(optimiser)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


# --- replicas, copies, states


def replicate(network: nn.Module) -> nn.Module:
    """Do what torch.nn.parallel.replicate does for one device: parameters become results of an operation."""
    modules = list(network.modules())
    replicas = {id(module): module._replicate_for_data_parallel() for module in modules}
    for replica in replicas.values():
        replica._former_parameters = {}
    copies = {id(parameter): parameter * 1.0 for parameter in network.parameters()}
    for module in modules:
        replica = replicas[id(module)]
        for name, child in module._modules.items():
            setattr(replica, name, replicas[id(child)])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
                continue
            setattr(replica, name, copies[id(parameter)])
            replica._former_parameters[name] = copies[id(parameter)]
        for name, buffer in module._buffers.items():
            replica._buffers[name] = buffer.clone()
    return replicas[id(network)]


def run_replicas(encoder: nn.Module, view: View) -> Tensor:
    """Run two replicas in two threads, on half of the samples each, as torch.nn.DataParallel does."""
    results: dict[int, Tensor] = {}
    enabled = torch.is_grad_enabled()

    def work(number: int, replica: nn.Module, part: View) -> None:
        with torch.set_grad_enabled(enabled):
            results[number] = replica(part).pooled

    threads = []
    for number, rows in enumerate(torch.arange(4).split(2)):
        address = replace(view.address, index=view.address.index[rows], view=view.address.view[rows])
        part = replace(view, clips=view.clips[rows], mask=view.mask[rows], address=address)
        threads.append(threading.Thread(target=work, args=(number, replicate(encoder), part)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat([results[number] for number in range(2)])


@both
def test_replicas_pass_gradients_on_to_the_module(make_encoder, gradients_of, kind, view):
    encoder = make_encoder(kind).train()
    expected, pooled = gradients_of(encoder, view), encoder(view).pooled
    encoder.zero_grad()
    together = run_replicas(encoder, view)
    # fp64 rounding of products in blocks of another size
    torch.testing.assert_close(together, pooled, rtol=1e-12, atol=1e-12)
    (together**3).sum().backward()
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-11)


@both
def test_replicas_without_gradient_follow_the_module(make_encoder, kind, view):
    encoder = make_encoder(kind).eval()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(run_replicas(encoder, view), encoder(view).pooled, rtol=1e-12, atol=1e-12)
            encoder.get_submodule("t_tr").get_parameter(
                "CA.attn.in_proj_weight" if kind is DSTE else "layers.0.self_attn.in_proj_weight"
            ).mul_(1.5)


@both
def test_functional_call_differentiates_what_it_is_given(make_encoder, gradients_of, kind, view):
    encoder = make_encoder(kind).train()
    expected = gradients_of(encoder, view)
    leaves = {name: parameter.detach().clone().requires_grad_() for name, parameter in encoder.named_parameters()}
    # results of an operation, as an outer optimisation has them
    halved = {name: 0.5 * (2.0 * leaf) for name, leaf in leaves.items()}
    features = torch.func.functional_call(copy.deepcopy(encoder), halved, (view,))
    (features.pooled**3).sum().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-10, atol=1e-13)


@both
def test_copies_train_apart(make_encoder, gradients_of, kind, view):
    encoder = make_encoder(kind).train()
    with torch.no_grad():
        encoder(view)
    twin = copy.deepcopy(encoder)
    expected = gradients_of(encoder, view)
    for name, gradient in gradients_of(twin, view).items():
        assert torch.equal(gradient, expected[name]), name
    pooled = encoder(view).pooled
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert torch.equal(encoder(view).pooled, pooled) and not torch.equal(twin(view).pooled, pooled)
    torch.optim.SGD(encoder.parameters(), lr=0.1).step()
    assert torch.equal(encoder(view).pooled, twin(view).pooled)


@both
def test_copies_keep_their_configuration(make_encoder, kind):
    encoder = make_encoder(kind)
    encoder.configure(memory="layer", drop_path_mode="mask", attention_backend="math")
    twin = copy.deepcopy(encoder)
    assert (twin.memory, twin.drop_path_mode, twin.attention_backend) == ("layer", "mask", "math")
    other = make_encoder(kind)
    assert (other.memory, other.drop_path_mode, other.attention_backend) == ("lean", "skip", "auto")


@pytest.mark.parametrize("assign", [False, True])
@both
def test_state_survives_a_file(make_encoder, kind, assign, view):
    encoder, other = make_encoder(kind).eval(), kind(num_joints=3, num_frames=5, width=8).double().eval()
    with torch.no_grad():
        # what was merged before must not outlive the load
        other(view)
        buffer = io.BytesIO()
        torch.save(encoder.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer), strict=True, assign=assign)
        assert torch.equal(other(view).pooled, encoder(view).pooled)
    assert list(other.state_dict()) == list(encoder.state_dict())


@both
def test_state_is_the_references(make_encoder, kind, view):
    encoder = make_encoder(kind).eval()
    plain = (reference.DSTE if kind is DSTE else reference.STTR)(18, 15, 8, 1).double().eval()
    plain.load_state_dict(encoder.state_dict(), strict=True)
    assert list(plain.state_dict()) == list(encoder.state_dict())
    clips = view.clips
    temporal, spatial = plain(clips.flatten(2), clips.permute(0, 2, 3, 1, 4).reshape(4, 6, 15))
    features = encoder(view)
    torch.testing.assert_close(features.temporal, temporal, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(features.spatial, spatial, rtol=1e-11, atol=1e-12)


# --- graphs


@both
def test_two_passes_in_one_graph_add_up(make_encoder, gradients_of, kind, view):
    encoder = make_encoder(kind).train()
    other = replace(view, clips=view.clips.flip(0) * 0.7)
    first, second = gradients_of(encoder, view), gradients_of(encoder, other)
    encoder.zero_grad()
    (loss_of(encoder, view) + loss_of(encoder, other)).backward()
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, first[name] + second[name], rtol=1e-12, atol=1e-14)


@both
def test_an_encoder_after_a_step_in_the_same_graph_is_refused(make_encoder, kind, view):
    """Weights kept for a backward pass have changed: torch says so, instead of a wrong gradient."""
    encoder = make_encoder(kind).train()
    loss = loss_of(encoder, view)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("memory", ["saved", "lean", "layer"])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "math"])
@both
def test_a_graph_that_is_kept_gives_the_same_twice(make_encoder, kind, backend, memory, view):
    encoder = make_encoder(kind).train()
    encoder.configure(memory=memory, attention_backend=backend)
    loss, parameters = loss_of(encoder, view), list(encoder.parameters())
    first = [gradient.clone() for gradient in torch.autograd.grad(loss, parameters, retain_graph=True)]
    second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, parameters)


@both
def test_inputs_and_gradients_are_left_as_they_are(make_encoder, kind, view):
    encoder = make_encoder(kind).train()
    clips = view.clips.clone()
    features = encoder(view)
    values = [features.pooled, features.temporal, features.spatial]
    incoming = [torch.randn_like(value) for value in values]
    kept = [[t.detach().clone() for t in group] for group in (values, incoming)]
    torch.autograd.backward(values, incoming)
    assert torch.equal(view.clips, clips)
    for group, before in zip((values, incoming), kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(group, before, strict=True))


@both
def test_modes_without_gradient_give_the_same_values(make_encoder, gradients_of, kind, view):
    encoder = make_encoder(kind).train()
    expected = encoder(view)
    for mode in (torch.no_grad, torch.inference_mode, torch.inference_mode, torch.no_grad):
        with mode():
            features = encoder(view)
        assert not features.pooled.requires_grad
        assert torch.equal(features.pooled, expected.pooled) and torch.equal(features.temporal, expected.temporal)
    # and training goes on
    assert all(gradient is not None for gradient in gradients_of(encoder, view).values())


@both
def test_second_derivatives_are_refused(make_encoder, kind, view):
    encoder = make_encoder(kind).train()
    parameter = encoder.get_parameter("spe")
    (gradient,) = torch.autograd.grad(loss_of(encoder, view), parameter, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("addressed", [True, False], ids=["addressed", "torch's seed"])
@pytest.mark.parametrize("reentrant", [True, False])
@both
def test_checkpointing_around_the_encoder(make_encoder, gradients_of, kind, reentrant, addressed, view):
    encoder = make_encoder(kind).train()
    view = view if addressed else replace(view, address=None)
    torch.manual_seed(5)
    expected = gradients_of(encoder, view)

    def encode(clips: Tensor) -> Tensor:
        return encoder(replace(view, clips=clips)).pooled

    encoder.zero_grad()
    torch.manual_seed(5)
    clips = view.clips.clone().requires_grad_()
    pooled = torch.utils.checkpoint.checkpoint(encode, clips, use_reentrant=reentrant)
    (pooled**3).sum().backward()
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-12, atol=1e-14)


@both
def test_hooks_on_layers_and_parameters_fire(make_encoder, gradients_of, kind, view):
    encoder = make_encoder(kind).train()
    layers = encoder.layers("t_tr") if kind is DSTE else list(encoder.get_submodule("t_tr").layers)
    seen: list[str] = []
    for layer in layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(f"forward {tuple(out.shape)}"))
        layer.register_full_backward_hook(lambda module, grads, out: seen.append(f"backward {tuple(out[0].shape)}"))
    accumulated = []
    for name, parameter in encoder.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda tensor, name=name: accumulated.append(name))
    gradients_of(encoder, view)
    assert seen == ["forward (4, 5, 8)"] * 2 + ["backward (4, 5, 8)"] * 2
    assert sorted(accumulated) == sorted(name for name, _ in encoder.named_parameters())


def test_a_forward_hook_may_change_activations(make_encoder, view):
    encoder = make_encoder(DSTE).eval()
    handle = encoder.get_submodule("t_tr1").register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    assert not encoder(view).temporal.any()
    handle.remove()
    assert encoder(view).temporal.any()


# --- refusals


@both
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(memory="full"), r"memory must be one of \('saved', 'lean', 'layer'\), got 'full'"),
        (dict(drop_path_mode="drop"), r"drop_path_mode must be one of \('skip', 'mask'\), got 'drop'"),
        (dict(attention_backend="flash"), r"attention_backend must be one of .*'xformers', 'math'\), got 'flash'"),
    ],
    ids=["memory", "drop_path_mode", "attention_backend"],
)
def test_unknown_choices_are_refused_and_change_nothing(make_encoder, kind, options, message):
    encoder = make_encoder(kind)
    valid = dict(memory="layer", drop_path_mode="mask", attention_backend="math")
    with pytest.raises(ValueError, match=f"{kind.__name__}: {message}"):
        encoder.configure(**(valid | options))
    assert (encoder.memory, encoder.drop_path_mode, encoder.attention_backend) == ("lean", "skip", "auto")


@both
def test_xformers_is_refused_with_its_reason(make_encoder, kind, view):
    encoder = make_encoder(kind)
    encoder.configure(attention_backend="xformers")
    with pytest.raises(ValueError, match="attention_backend: 'xformers' must (run on a GPU, got a CPU|be importable)"):
        encoder(view)


@pytest.mark.parametrize(
    "clips, message",
    [
        (lambda clips: clips.float(), "input must have the weights' type torch.float64, got torch.float32"),
        (lambda clips: clips.half(), "input must have the weights' type torch.float64, got torch.float16"),
        (lambda clips: clips.long(), "input must be floating point, got torch.int64"),
        (lambda clips: clips[..., :2], r"clips must be \(N, 1..5, 2, 3, 3\), got \(4, 5, 2, 3, 2\)"),
        (lambda clips: clips[0], r"clips must be \(N, 1..5, 2, 3, 3\), got \(5, 2, 3, 3\)"),
    ],
    ids=["float32", "float16", "integers", "channels", "dims"],
)
@both
def test_clips_that_do_not_fit_are_refused(make_encoder, kind, clips, message, view):
    with pytest.raises(ValueError, match=message):
        make_encoder(kind)(replace(view, clips=clips(view.clips)))


@both
def test_no_samples_give_no_features(make_encoder, kind, make_view):
    encoder = make_encoder(kind).train()
    features = encoder(make_view((0, 5, 2, 3, 3)))
    assert features.pooled.shape == (0, 16) and features.spatial.shape == (0, 6, 8)
    features.pooled.sum().backward()
    assert not any(parameter.grad.any() for parameter in encoder.parameters())
