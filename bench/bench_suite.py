"""Encoder, loss, loader and training step under pytest-benchmark, at the sizes of `fastskel bench quick`.

Run as `pytest bench/bench_suite.py --benchmark-only`; FASTSKEL_BENCH_QUICK=1 takes tiny sizes. Results are compared with the
reference before they are timed. Providers run one after another here, not in turns: for a ratio to quote use the suite.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fastskel.bench import encoder, loader, loss, training
from fastskel.bench.harness import Timed, relative_l2
from fastskel.bench.providers import Provider, Setting, autocast, build, gate
from fastskel.bench.reference.feeder import Feeder
from torch import Tensor

QUICK = os.environ.get("FASTSKEL_BENCH_QUICK") == "1"
ENCODER: dict[str, Any] = dict(batch=2, width=16, frames=8, joints=5) if QUICK else dict(batch=8)
STEP: dict[str, Any] = dict(batch=6, width=32, frames=16, joints=5) if QUICK else dict(batch=16, width=256)
LOSS_ROWS, LOSS_WIDTHS = (6, (16, 16, 32)) if QUICK else (64, loss.WIDTHS)
CLIPS = 10 if QUICK else 800
PRECISION = "bf16"


def _encoder(name: str, device: torch.device) -> tuple[Provider, Provider, tuple[Tensor, Tensor], str]:
    """Build the reference and another provider, with tokens, and name the case."""
    setting = Setting(device=device, **ENCODER)
    built = {provider.name: provider for provider in build(setting, 0.0)}
    return built["reference"], built[name], setting.tokens(setting.batch), f"{PRECISION} N={setting.batch} D={setting.width}"


@pytest.mark.parametrize("provider", ["reference", "reference-sdpa", "fastskel"])
def bench_encoder_inference(timed: Timed, device: torch.device, provider: str) -> None:
    """Encode a batch without gradients."""
    plain, own, tokens, case = _encoder(provider, device)
    plain.module.eval()
    own.module.eval()

    def call() -> Any:
        with torch.no_grad(), autocast(PRECISION, device):
            return own.encode(*tokens)

    with torch.no_grad():
        exact = plain.encode(*tokens)
    gate(provider, "output", call(), exact, encoder.OUTPUT_LIMIT[PRECISION])
    timed(f"encoder inference {case}", call)


@pytest.mark.parametrize("provider", ["reference", "reference-sdpa", "fastskel"])
def bench_encoder_training(timed: Timed, device: torch.device, provider: str) -> None:
    """Forward and backward pass of an encoder, without DropPath."""
    plain, own, tokens, case = _encoder(provider, device)

    def gradients(which: Provider, precision: str) -> list[Tensor]:
        which.module.train().zero_grad(set_to_none=True)
        with autocast(precision, device):
            outputs = which.encode(*tokens)
        # smooth in the outputs, and different for each of them
        torch.autograd.backward([y.float().square().sum() for y in outputs])
        return [parameter.grad for parameter in which.module.parameters()]

    exact = [gradient.clone() for gradient in gradients(plain, "fp32")]
    gate(provider, "gradient", gradients(own, PRECISION), exact, encoder.GRADIENT_LIMIT[PRECISION])
    timed(f"encoder training {case}", lambda: gradients(own, PRECISION))


@pytest.mark.parametrize("provider", list(loss.PROVIDERS))
def bench_loss(timed: Timed, device: torch.device, provider: str) -> None:
    """Loss and gradient of four views."""
    torch.manual_seed(0)
    stacks = [torch.randn(loss.VIEWS, LOSS_ROWS, width, device=device).requires_grad_() for width in LOSS_WIDTHS]

    def gradients(name: str) -> list[Tensor]:
        total = loss.PROVIDERS[name](*stacks)
        return [total.detach(), *torch.autograd.grad(total, stacks)]

    assert relative_l2(gradients(provider), gradients("reference")) <= loss.LIMIT
    timed(f"loss N={LOSS_ROWS}", lambda: gradients(provider))


@pytest.mark.parametrize("provider", ["feeder", "numpy", "native"])
def bench_loader(timed: Timed, tmp_path: Path, provider: str) -> None:
    """Make one batch of four views on one core; what the providers draw is compared by the tests of the loader."""
    dataset = loader.make_data(tmp_path, CLIPS)
    batch = min(loader.BATCH, len(dataset))
    if provider == "feeder":
        feeder = Feeder(*loader.buffer_of(dataset))

        def call() -> object:
            return [feeder[item] for item in range(batch)]
    else:
        made = loader.loader_of(dataset, num_threads=0, engine=provider)

        def call() -> object:
            return next(iter(made))

    timed(f"loader N={batch}", call, samples=batch)


@pytest.mark.parametrize("provider", ["reference", "fastskel"])
def bench_step(timed: Timed, device: torch.device, provider: str) -> None:
    """A whole training step on a cached batch, in bfloat16."""
    setting = training.Setting(device=device, **STEP)
    plain = training.ReferenceStep(setting, torch.float32)
    model: Any = training.ReferenceStep(setting, torch.bfloat16)
    if provider == "fastskel":
        model = training.OwnStep(setting, "torch", False)
    with torch.no_grad():
        # two percent: bfloat16 has eight bits
        assert float(model.loss()) == pytest.approx(float(plain.loss()), rel=2e-2)
    timed(f"training step N={setting.batch} D={setting.width}", model.step, samples=setting.batch)
