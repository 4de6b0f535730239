"""Random views of any shape, on a skeleton made for the occasion; small encoders, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastskel.data.batch import DrawAddress, View
from fastskel.models.backbone import USDRLBackbone
from fastskel.skeleton import PARTS, Topology


@pytest.fixture(scope="session")
def make_view():
    """Make a view of random clips of the given shape (N, T, M, V, C)."""

    def build(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> View:
        joints = tuple(f"joint{number}" for number in range(shape[3]))
        itself = tuple(range(shape[3]))
        parts = {part: itself if part == "torso" else () for part in PARTS}
        skeleton = Topology(f"chain-{shape[3]}", joints, 0, itself, parts, {"none": itself})
        clips = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        return View(clips, torch.ones(shape[:3], dtype=torch.bool), skeleton)

    return build


@pytest.fixture
def view(make_view) -> View:
    """A view of four clips of five frames, two bodies and three joints, whose draws are addressed."""
    plain = make_view((4, 5, 2, 3, 3))
    return replace(plain, address=DrawAddress(1, 2, torch.arange(4), torch.zeros(4, dtype=torch.int64)))


@pytest.fixture(scope="session")
def make_encoder() -> Callable[..., USDRLBackbone]:
    """Make a small encoder for `view`, none of whose weights is special."""

    def build(kind: type[USDRLBackbone], dtype: torch.dtype = torch.float64, **options: float) -> USDRLBackbone:
        torch.manual_seed(0)
        encoder = kind(**(dict(num_joints=3, num_frames=5, width=8) | options)).to(dtype)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return encoder

    return build


@pytest.fixture(scope="session")
def gradients_of() -> Callable[[nn.Module, View], dict[str, Tensor | None]]:
    """Differentiate a loss of an encoder's pooled features, by its parameters' names."""

    def differentiate(encoder: nn.Module, view: View) -> dict[str, Tensor | None]:
        encoder.zero_grad()
        # a power, because normalised features sum to a constant
        (encoder(view).pooled ** 3).sum().backward()
        return {name: parameter.grad for name, parameter in encoder.named_parameters()}

    return differentiate
