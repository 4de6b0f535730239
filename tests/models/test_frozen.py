"""Encoders of which parts are frozen: no gradient for these, the same for the others, and one for the clips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastskel.data.batch import View
from fastskel.models import DSTE, STTR

both = pytest.mark.parametrize("kind", [DSTE, STTR])


def loss_of(encoder: nn.Module, view: View) -> Tensor:
    # a power, because normalised features sum to a constant
    return (encoder(view).pooled ** 3).sum()


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


def freeze(encoder: nn.Module, frozen: Callable[[str], bool]) -> None:
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(not frozen(name))


def assert_frozen(found: dict[str, Tensor | None], frozen: Callable[[str], bool], expected: dict[str, Tensor]) -> None:
    for name, gradient in found.items():
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
def test_frozen_parts_get_no_gradient_and_the_others_the_same(make_encoder, gradients_of, kind, part, memory, view):
    encoder = make_encoder(kind).train()
    encoder.configure(memory=memory)
    expected = gradients_of(encoder, view)
    freeze(encoder, FROZEN[part])
    assert_frozen(gradients_of(encoder, view), FROZEN[part], expected)


@pytest.mark.parametrize("heads", [1, 2])
@both
def test_every_parameter_can_be_trained_alone(make_encoder, gradients_of, kind, heads, view):
    encoder = make_encoder(kind, num_heads=heads).train()
    expected = gradients_of(encoder, view)
    for alone in expected:
        def others(name: str, alone: str = alone) -> bool:
            return name != alone

        freeze(encoder, others)
        assert_frozen(gradients_of(encoder, view), others, expected)


@both
def test_a_frozen_encoder_passes_gradients_on_to_its_input(make_encoder, kind, view):
    encoder = make_encoder(kind).train()
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
def test_input_gradient_is_that_of_the_values(make_encoder, kind, make_view):
    encoder, view = make_encoder(kind, width=4).eval(), make_view((1, 5, 2, 3, 3))
    encoder.requires_grad_(False)

    def call(clips: Tensor) -> Tensor:
        return encoder(replace(view, clips=clips)).temporal

    assert torch.autograd.gradcheck(call, (view.clips.requires_grad_(),), fast_mode=True)
