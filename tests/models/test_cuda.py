"""The fused encoders on a GPU: every way of computing them against the CPU's fp64, and that no step waits for the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastskel.data.batch import DrawAddress, View
from fastskel.models import DSTE, STTR
from fastskel.nn.attention import choose_backend
from fastskel.train.capture import WARMUP_STEPS, CapturedStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

ROWS, FRAMES = 6, 16


def build(kind: type, heads: int = 1):
    torch.manual_seed(0)
    options = {"drop_path": 0.3} if kind is DSTE else {}
    return kind(num_joints=25, num_bodies=2, num_frames=FRAMES, width=64, num_heads=heads, **options).train()


def addressed(make_view, dtype: torch.dtype) -> View:
    view = make_view((ROWS, FRAMES, 2, 25, 3), dtype=torch.float32)
    address = DrawAddress(3, 5, torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.int64))
    return View(view.clips.to(dtype), view.mask, view.topology, address)


def step(encoder, view: View, device: str, compute: torch.dtype | None = None) -> list[torch.Tensor]:
    encoder = encoder.to(device)
    encoder.zero_grad()
    with torch.autocast(device, compute, enabled=compute is not None):
        features = encoder(view.to(device))
    # random directions: sums of normalised rows would be constant, and their gradients nothing but rounding
    generator = torch.Generator().manual_seed(1)
    outputs = (features.temporal, features.spatial)
    sum((out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outputs).backward()
    gradients = [p.grad for p in encoder.parameters()]
    return [t.detach().double().cpu() for t in (features.temporal, features.spatial, *gradients)]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-9))


@pytest.mark.parametrize("mode", ["skip", "mask"])
@pytest.mark.parametrize("memory", ["saved", "lean", "layer"])
@pytest.mark.parametrize("backend", ["fastskel", "sdpa", "math"])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("kind", [DSTE, STTR])
def test_every_way_equals_the_host(kind, kernels, heads, backend, memory, mode, make_view):
    encoder = build(kind, heads)
    expected = step(encoder.double(), addressed(make_view, torch.float64), "cpu")
    encoder.configure(memory=memory, drop_path_mode=mode, attention_backend=backend, kernels=kernels)
    actual = step(encoder.float(), addressed(make_view, torch.float32), "cuda")
    for a, b in zip(actual, expected, strict=True):
        # fp32 sums of up to 6,000 terms; a gradient that is zero is rounding noise
        assert relative(a, b) < 1e-3 or b.norm() < 1e-9


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [DSTE, STTR])
def test_half_precision_is_close(kind, compute, kernels, make_view):
    encoder = build(kind)
    expected = step(encoder.double(), addressed(make_view, torch.float64), "cpu")
    encoder.configure(kernels=kernels)
    actual = step(encoder.float(), addressed(make_view, torch.float32), "cuda", compute)
    for a, b in zip(actual[:2], expected[:2], strict=True):
        assert relative(a, b) < 2e-2


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("kind", [DSTE, STTR])
def test_a_step_never_waits_for_the_device(kind, kernels, make_view):
    encoder, view = build(kind).cuda(), addressed(make_view, torch.float32).to("cuda")
    encoder.configure(kernels=kernels)
    for _ in range(2):
        features = encoder(view)
        features.pooled.sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        encoder(view).pooled.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_xformers_serves_or_says_why(make_view):
    encoder = build(STTR, heads=4)
    try:
        choose_backend("xformers", 64, 4, torch.device("cuda"), torch.float32)
    except ValueError as reason:
        pytest.skip(str(reason))
    expected = step(encoder.double(), addressed(make_view, torch.float64), "cpu")
    encoder.configure(attention_backend="xformers")
    for a, b in zip(step(encoder.float(), addressed(make_view, torch.float32), "cuda"), expected, strict=True):
        assert relative(a, b) < 1e-3 or b.norm() < 1e-9


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_training_is_captured_into_a_graph(kernels, make_view):
    """Draws included: replays advance the step that they are addressed with."""
    view = addressed(make_view, torch.float32).to("cuda")
    weight = torch.randn(ROWS, 128, device="cuda")
    found = []
    for captured in (False, True):
        encoder = build(DSTE).cuda()
        encoder.configure(drop_path_mode="mask", kernels=kernels)
        optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3, capturable=True)
        counter = torch.zeros((), dtype=torch.int64, device="cuda")
        address = DrawAddress(3, counter, torch.arange(ROWS).cuda(), torch.zeros(ROWS, dtype=torch.int64).cuda())
        at = replace(view, address=address)

        def update(encoder=encoder, optimizer=optimizer, at=at) -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = (encoder(at).pooled * weight).sum()
            loss.backward()
            optimizer.step()
            return loss.detach()

        losses = []
        call = CapturedStep(update, counter, torch.device("cuda")) if captured else update
        for _ in range(2 if captured else WARMUP_STEPS + 2):
            losses.append(float(call()))
            if not captured:
                counter.add_(1)
        found.append((losses[-2:], [p.detach().double().cpu() for p in encoder.parameters()]))
    (expected, parameters), (actual, replayed) = found
    assert actual == pytest.approx(expected, rel=1e-3)
    assert all(relative(a, b) < 1e-3 for a, b in zip(replayed, parameters, strict=True))


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.filterwarnings("ignore")
def test_training_is_compiled_into_one_graph(kernels, make_view):
    encoder, view = build(DSTE).cuda(), addressed(make_view, torch.float32).to("cuda")
    encoder.configure(drop_path_mode="mask", kernels=kernels)
    expected = encoder(view).pooled
    torch.compiler.reset()
    actual = torch.compile(encoder, fullgraph=True)(view).pooled
    actual.sum().backward()
    assert relative(actual.detach().double().cpu(), expected.detach().double().cpu()) < 1e-4


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_inference_is_captured_into_a_graph(kernels, make_view):
    encoder, view = build(DSTE).cuda().eval(), addressed(make_view, torch.float32).to("cuda")
    encoder.configure(kernels=kernels)
    expected = encoder(view).pooled.detach()
    prepared = encoder.optimize_for_inference()
    with torch.inference_mode():
        prepared(view)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = prepared(view).pooled
        graph.replay()
    assert relative(captured.double().cpu(), expected.double().cpu()) < 1e-4
