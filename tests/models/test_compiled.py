"""Encoders compiled, and without values on the meta device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastskel.data.batch import DrawAddress
from fastskel.models import DSTE, STTR

both = pytest.mark.parametrize("kind", [DSTE, STTR])


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
def test_compiled_encoders_give_the_same(make_encoder, gradients_of, kind, mode, view):
    """In training, in one graph where shapes do not depend on what is dropped, and without gradient."""
    encoder = make_encoder(kind, num_layers=1).train()
    encoder.configure(drop_path_mode=mode)
    expected, pooled = gradients_of(encoder, view), encoder(view).pooled
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
def test_steps_that_are_numbers_do_not_compile_again(make_encoder, make_view):
    encoder = make_encoder(DSTE, num_layers=1, drop_path=0.3).train()
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
