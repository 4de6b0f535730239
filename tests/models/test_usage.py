"""What existing code does with an encoder, and what a pass costs."""

from __future__ import annotations

import copy
import io
import math
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.utils.checkpoint
from fastskel.bench.harness import saved_bytes
from fastskel.bench.reference import usdrl as reference
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastskel.data.batch import DrawAddress, View
from fastskel.models import DSTE, STTR
from fastskel.models.backbone import USDRLBackbone

SHAPE = (4, 5, 2, 3, 3)
both = pytest.mark.parametrize("kind", [DSTE, STTR])


def build(kind: type[USDRLBackbone], dtype: torch.dtype = torch.float64, **options: float) -> USDRLBackbone:
    torch.manual_seed(0)
    encoder = kind(**(dict(num_joints=3, num_frames=5, width=8) | options)).to(dtype)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


@pytest.fixture
def view(make_view) -> View:
    """A view whose draws are addressed."""
    plain = make_view(SHAPE)
    return replace(plain, address=DrawAddress(1, 2, torch.arange(4), torch.zeros(4, dtype=torch.int64)))


def loss_of(encoder: nn.Module, view: View) -> Tensor:
    # a power, because normalised features sum to a constant
    return (encoder(view).pooled ** 3).sum()


def gradients(encoder: nn.Module, view: View) -> dict[str, Tensor | None]:
    encoder.zero_grad()
    loss_of(encoder, view).backward()
    return {name: parameter.grad for name, parameter in encoder.named_parameters()}


def single(view: View) -> View:
    return replace(view, clips=view.clips.float())


# --- mixed precision as existing code has it


@both
def test_fp16_autocast_with_a_gradient_scaler(kind, view):
    view, encoder = single(view), build(kind, torch.float32)
    expected = gradients(encoder, view)
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
def test_overflow_is_seen_by_the_scaler(kind, view):
    view, encoder = single(view), build(kind, torch.float32)
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
def test_replicas_pass_gradients_on_to_the_module(kind, view):
    encoder = build(kind).train()
    expected, pooled = gradients(encoder, view), encoder(view).pooled
    encoder.zero_grad()
    together = run_replicas(encoder, view)
    # fp64 rounding of products in blocks of another size
    torch.testing.assert_close(together, pooled, rtol=1e-12, atol=1e-12)
    (together**3).sum().backward()
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-11)


@both
def test_replicas_without_gradient_follow_the_module(kind, view):
    encoder = build(kind).eval()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(run_replicas(encoder, view), encoder(view).pooled, rtol=1e-12, atol=1e-12)
            encoder.get_submodule("t_tr").get_parameter(
                "CA.attn.in_proj_weight" if kind is DSTE else "layers.0.self_attn.in_proj_weight"
            ).mul_(1.5)


@both
def test_functional_call_differentiates_what_it_is_given(kind, view):
    encoder = build(kind).train()
    expected = gradients(encoder, view)
    leaves = {name: parameter.detach().clone().requires_grad_() for name, parameter in encoder.named_parameters()}
    # results of an operation, as an outer optimisation has them
    halved = {name: 0.5 * (2.0 * leaf) for name, leaf in leaves.items()}
    features = torch.func.functional_call(copy.deepcopy(encoder), halved, (view,))
    (features.pooled**3).sum().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-10, atol=1e-13)


@both
def test_copies_train_apart(kind, view):
    encoder = build(kind).train()
    with torch.no_grad():
        encoder(view)
    twin = copy.deepcopy(encoder)
    expected = gradients(encoder, view)
    for name, gradient in gradients(twin, view).items():
        assert torch.equal(gradient, expected[name]), name
    pooled = encoder(view).pooled
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert torch.equal(encoder(view).pooled, pooled) and not torch.equal(twin(view).pooled, pooled)
    torch.optim.SGD(encoder.parameters(), lr=0.1).step()
    assert torch.equal(encoder(view).pooled, twin(view).pooled)


@both
def test_copies_keep_their_configuration(kind):
    encoder = build(kind)
    encoder.configure(memory="layer", drop_path_mode="mask", attention_backend="math")
    twin = copy.deepcopy(encoder)
    assert (twin.memory, twin.drop_path_mode, twin.attention_backend) == ("layer", "mask", "math")
    other = build(kind)
    assert (other.memory, other.drop_path_mode, other.attention_backend) == ("lean", "skip", "auto")


@pytest.mark.parametrize("assign", [False, True])
@both
def test_state_survives_a_file(kind, assign, view):
    encoder, other = build(kind).eval(), kind(num_joints=3, num_frames=5, width=8).double().eval()
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
def test_state_is_the_references(kind, view):
    encoder = build(kind).eval()
    plain = (reference.DSTE if kind is DSTE else reference.STTR)(18, 15, 8, 1).double().eval()
    plain.load_state_dict(encoder.state_dict(), strict=True)
    assert list(plain.state_dict()) == list(encoder.state_dict())
    clips = view.clips
    temporal, spatial = plain(clips.flatten(2), clips.permute(0, 2, 3, 1, 4).reshape(4, 6, 15))
    features = encoder(view)
    torch.testing.assert_close(features.temporal, temporal, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(features.spatial, spatial, rtol=1e-11, atol=1e-12)


# --- parts that are frozen

FROZEN = {
    "attention": lambda name: "attn" in name,
    "in projections": lambda name: "in_proj" in name,
    "out projections": lambda name: "out_proj" in name,
    "all but attention": lambda name: "attn" not in name,
    "norms": lambda name: "norm" in name or "embedding.1" in name,
    "all but norms": lambda name: "norm" not in name,
    "weights": lambda name: name.endswith("weight"),
    "biases": lambda name: name.endswith("bias"),
    "embedding": lambda name: "ske_emb" in name or name == "spe",
    "first layers": lambda name: name.startswith(("t_tr.", "s_tr.", "ske_emb")) and "layers.1" not in name,
    "temporal stream": lambda name: "t_tr" in name or "t_emb" in name,
}


def assert_frozen(encoder: nn.Module, view: View, frozen: Callable[[str], bool], expected: dict[str, Tensor]) -> None:
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(not frozen(name))
    for name, gradient in gradients(encoder, view).items():
        if frozen(name):
            assert gradient is None, name
        else:
            # a graph of another shape may multiply in another order
            torch.testing.assert_close(
                gradient, expected[name], rtol=1e-10, atol=1e-13, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize("memory", ["saved", "lean", "layer"])
@pytest.mark.parametrize("part", FROZEN)
@both
def test_frozen_parts_get_no_gradient_and_the_others_the_same(kind, part, memory, view):
    encoder = build(kind).train()
    encoder.configure(memory=memory)
    expected = gradients(encoder, view)
    assert_frozen(encoder, view, FROZEN[part], expected)


@pytest.mark.parametrize("heads", [1, 2])
@both
def test_every_parameter_can_be_trained_alone(kind, heads, view):
    encoder = build(kind, num_heads=heads).train()
    expected = gradients(encoder, view)
    for alone in expected:
        assert_frozen(encoder, view, lambda name, alone=alone: name != alone, expected)


@both
def test_a_frozen_encoder_passes_gradients_on_to_its_input(kind, view):
    encoder = build(kind).train()
    clips = view.clips.clone().requires_grad_()
    loss_of(encoder, replace(view, clips=clips)).backward()
    expected = clips.grad
    encoder.zero_grad()
    encoder.requires_grad_(False)
    assert not encoder(view).pooled.requires_grad
    clips = view.clips.clone().requires_grad_()
    loss_of(encoder, replace(view, clips=clips)).backward()
    torch.testing.assert_close(clips.grad, expected, rtol=1e-10, atol=1e-13)
    assert expected.any() and all(parameter.grad is None for parameter in encoder.parameters())


@both
def test_input_gradient_is_that_of_the_values(kind, make_view):
    encoder, view = build(kind, width=4).eval(), make_view((1, 5, 2, 3, 3))
    encoder.requires_grad_(False)

    def call(clips: Tensor) -> Tensor:
        return encoder(replace(view, clips=clips)).temporal

    assert torch.autograd.gradcheck(call, (view.clips.requires_grad_(),), fast_mode=True)


# --- graphs


@both
def test_two_passes_in_one_graph_add_up(kind, view):
    encoder = build(kind).train()
    other = replace(view, clips=view.clips.flip(0) * 0.7)
    first, second = gradients(encoder, view), gradients(encoder, other)
    encoder.zero_grad()
    (loss_of(encoder, view) + loss_of(encoder, other)).backward()
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, first[name] + second[name], rtol=1e-12, atol=1e-14)


@both
def test_an_encoder_after_a_step_in_the_same_graph_is_refused(kind, view):
    """Weights kept for a backward pass have changed: torch says so, instead of a wrong gradient."""
    encoder = build(kind).train()
    loss = loss_of(encoder, view)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("memory", ["saved", "lean", "layer"])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "math"])
@both
def test_a_graph_that_is_kept_gives_the_same_twice(kind, backend, memory, view):
    encoder = build(kind).train()
    encoder.configure(memory=memory, attention_backend=backend)
    loss, parameters = loss_of(encoder, view), list(encoder.parameters())
    first = [gradient.clone() for gradient in torch.autograd.grad(loss, parameters, retain_graph=True)]
    second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, parameters)


@both
def test_inputs_and_gradients_are_left_as_they_are(kind, view):
    encoder = build(kind).train()
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
def test_modes_without_gradient_give_the_same_values(kind, view):
    encoder = build(kind).train()
    expected = encoder(view)
    for mode in (torch.no_grad, torch.inference_mode, torch.inference_mode, torch.no_grad):
        with mode():
            features = encoder(view)
        assert not features.pooled.requires_grad
        assert torch.equal(features.pooled, expected.pooled) and torch.equal(features.temporal, expected.temporal)
    # and training goes on
    assert all(gradient is not None for gradient in gradients(encoder, view).values())


@both
def test_second_derivatives_are_refused(kind, view):
    encoder = build(kind).train()
    parameter = encoder.get_parameter("spe")
    (gradient,) = torch.autograd.grad(loss_of(encoder, view), parameter, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("addressed", [True, False], ids=["addressed", "torch's seed"])
@pytest.mark.parametrize("reentrant", [True, False])
@both
def test_checkpointing_around_the_encoder(kind, reentrant, addressed, view):
    encoder = build(kind).train()
    view = view if addressed else replace(view, address=None)
    torch.manual_seed(5)
    expected = gradients(encoder, view)

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
def test_hooks_on_layers_and_parameters_fire(kind, view):
    encoder = build(kind).train()
    layers = encoder.layers("t_tr") if kind is DSTE else list(encoder.get_submodule("t_tr").layers)
    seen: list[str] = []
    for layer in layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(f"forward {tuple(out.shape)}"))
        layer.register_full_backward_hook(lambda module, grads, out: seen.append(f"backward {tuple(out[0].shape)}"))
    accumulated = []
    for name, parameter in encoder.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda tensor, name=name: accumulated.append(name))
    gradients(encoder, view)
    assert seen == ["forward (4, 5, 8)"] * 2 + ["backward (4, 5, 8)"] * 2
    assert sorted(accumulated) == sorted(name for name, _ in encoder.named_parameters())


def test_a_forward_hook_may_change_activations(view):
    encoder = build(DSTE).eval()
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
def test_unknown_choices_are_refused_and_change_nothing(kind, options, message):
    encoder = build(kind)
    valid = dict(memory="layer", drop_path_mode="mask", attention_backend="math")
    with pytest.raises(ValueError, match=f"{kind.__name__}: {message}"):
        encoder.configure(**(valid | options))
    assert (encoder.memory, encoder.drop_path_mode, encoder.attention_backend) == ("lean", "skip", "auto")


@both
def test_xformers_is_refused_with_its_reason(kind, view):
    encoder = build(kind)
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
def test_clips_that_do_not_fit_are_refused(kind, clips, message, view):
    with pytest.raises(ValueError, match=message):
        build(kind)(replace(view, clips=clips(view.clips)))


@both
def test_no_samples_give_no_features(kind, make_view):
    encoder = build(kind).train()
    features = encoder(make_view((0, 5, 2, 3, 3)))
    assert features.pooled.shape == (0, 16) and features.spatial.shape == (0, 6, 8)
    features.pooled.sum().backward()
    assert not any(parameter.grad.any() for parameter in encoder.parameters())


# --- compiled, or without values


@both
def test_shapes_need_no_memory(kind):
    """On the meta device, as one counts operations or plans memory."""
    with torch.device("meta"):
        encoder = kind(num_joints=3, num_frames=5, width=8)
        inputs = torch.empty(4, 5, 18), torch.empty(4, 6, 15)
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            streams = encoder.eval().streams(*inputs)
        assert [tuple(stream.shape) for stream in streams] == [(4, 5, 8), (4, 6, 8)]
    sum(stream.sum() for stream in streams).backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in encoder.parameters())


# tracing warns about what it steps over
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["skip", "mask"])
@both
def test_compiled_encoders_give_the_same(kind, mode, view):
    """In training, in one graph where shapes do not depend on what is dropped, and without gradient."""
    encoder = build(kind, num_layers=1).train()
    encoder.configure(drop_path_mode=mode)
    expected, pooled = gradients(encoder, view), encoder(view).pooled
    torch.compiler.reset()
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=kind is STTR or mode == "mask")
    encoder.zero_grad()
    out = compiled(view).pooled
    # fp64 rounding of operations that were taken apart
    torch.testing.assert_close(out, pooled, rtol=1e-11, atol=1e-12)
    (out**3).sum().backward()
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-11)
    compiled = torch.compile(encoder.eval(), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(view).pooled, encoder(view).pooled, rtol=1e-11, atol=1e-12)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")
def test_steps_that_are_numbers_do_not_compile_again(make_view):
    encoder = build(DSTE, num_layers=1, drop_path=0.3).train()
    encoder.configure(drop_path_mode="mask")
    clips = make_view((3, 5, 2, 3, 3))
    graphs = []

    def backend(module, example_inputs):
        graphs.append(module)
        return module

    torch.compiler.reset()
    compiled = torch.compile(encoder, backend=backend, fullgraph=True)
    for step in range(12):
        address = DrawAddress(5, step, torch.arange(3), torch.zeros(3, dtype=torch.int64))
        view = replace(clips, address=address)
        torch.testing.assert_close(compiled(view).pooled, encoder(view).pooled, rtol=1e-11, atol=1e-12)
    # one for a number, one for any number
    assert len(graphs) <= 3
    torch.compiler.reset()


# --- what a pass costs, at the recipe's sizes: D = 1024, one head, T = 64, S = 50

D, T, S = 1024, 64, 50


def large(kind: type[USDRLBackbone]) -> USDRLBackbone:
    """An encoder of the recipe's size, all zero: nobody looks at its values."""
    with torch.device("meta"):
        encoder = kind()
    encoder = encoder.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in encoder.state_dict().values():
            tensor.zero_()
    return encoder.train()


@pytest.mark.parametrize(
    "kind, memory, limit",
    [(DSTE, "lean", 8e6), (DSTE, "layer", 2e6), (STTR, "lean", 4e6), (STTR, "layer", 2e6)],
    ids=["dste-lean", "dste-layer", "sttr-lean", "sttr-layer"],
)
def test_bytes_kept_for_the_backward_pass_of_a_view(kind, memory, limit, make_view):
    encoder = large(kind)
    encoder.configure(memory=memory)
    if kind is DSTE:
        encoder.drop_path = 0.0

    def kept(rows: int) -> int:
        view = make_view((rows, T, 2, 25, 3), dtype=torch.float32)

        def call() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return encoder(view).pooled

        return saved_bytes(call, exclude=encoder.parameters())

    # what does not grow with the batch, as merged projections and converted weights, cancels out; fewer clips are not merged
    per_view = (kept(30) - kept(26)) / 4
    assert per_view <= limit
    # in bf16 vectors of D per token and layer, with those of embedding and maxima: 14 or 6, or each layer's input
    vectors = per_view / (2 * D * (T + S) * 2)
    bounds = {(DSTE, "lean"): (14, 16), (STTR, "lean"): (6, 9)}.get((kind, memory), (1, 5))
    assert bounds[0] <= vectors <= bounds[1]


def flops_by_hand(kind: type[USDRLBackbone]) -> tuple[float, float]:
    """FLOPs of one view's forward pass, and of what is merged once per pass; a multiplication and an addition each."""
    view = 0.0
    for tokens, features in ((T, 2 * 25 * 3), (S, T * 3)):
        # embedding: two linears
        view += tokens * (features * D + D * D)
        for _ in range(2):
            if kind is DSTE:
                live = tokens - math.ceil(tokens / 4)
                # convolution 1, merged query and output of three attentions 6, CA's MLP 2 + 2, DSA's first linears 2 + 2,
                # their shared second one 2
                view += 17 * D * D * tokens
                # scores and mixed values of three attentions, token mixture
                view += 3 * 2 * tokens * tokens * D + D * (tokens * tokens + live * tokens)
            else:
                # merged query and output, two linears
                view += 4 * D * D * tokens + 2 * tokens * tokens * D
    return 2 * view, 2 * 4 * 2 * D**3


@pytest.mark.parametrize("kind, published", [(DSTE, 8.65e9), (STTR, None)], ids=["dste", "sttr"])
def test_flops_of_a_view(kind, published, make_view):
    encoder = large(kind).eval()

    def count(rows: int, grad: bool) -> int:
        view = make_view((rows, T, 2, 25, 3), dtype=torch.float32)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
            encoder(view)
        return counter.get_total_flops()

    per_view, merging = flops_by_hand(kind)
    one = count(1, False)
    # merged by the first pass without gradient, and kept for the second one
    two = count(2, False)
    assert two == pytest.approx(2 * per_view, rel=0.02)
    assert one - two / 2 == pytest.approx(merging, rel=0.02)
    if published is not None:
        assert two / 2 == pytest.approx(published, rel=0.02)
    # with gradient they are merged in every pass over enough tokens to repay it
    assert count(26, True) - 13 * two == pytest.approx(merging, rel=0.02)
