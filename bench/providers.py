"""The encoders that benchmarks compare: the plain reference in three ways and fastskel's, all with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fastskel.bench.harness import relative_l2
from fastskel.bench.reference import DSTE, STTR, init_weights
from torch import Tensor

from fastskel import models

__all__ = ["BASELINE", "BODIES", "Encode", "Provider", "Setting", "autocast", "build", "gate"]

BASELINE = "reference"
BODIES, CHANNELS = 2, 3
# spread of biases and norms around their start of 0 and 1, where an error in them would not show
SPREAD = 0.1

Encode = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Setting:
    """Sizes of a comparison, and what is compared.

    Attributes:
        encoder: "dste" or "sttr".
        batch: Clips of a call.
        width: D; heads are one.
        frames: T.
        joints: V of each of two bodies.
        memory_batches: Two batch sizes, whose difference gives bytes per view.
        rounds: Rounds of a comparison, fewer where `limit_s` seconds are over.
        limit_s: Seconds of a case.
        device: Where it runs.
        compiled: Compare with the compiled reference too.
        modes: Memory modes of fastskel to compare beside its default.
    """

    encoder: str = "dste"
    batch: int = 32
    width: int = 1024
    frames: int = 64
    joints: int = 25
    memory_batches: tuple[int, int] = (32, 40)
    rounds: int = 15
    limit_s: float = 120.0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    compiled: bool = False
    modes: tuple[str, ...] = ()

    def tokens(self, rows: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Return tokens (N, T, M*V*C) and (N, M*V, T*C), the same for each N."""
        spatial, where = BODIES * self.joints, device or self.device
        generator = torch.Generator().manual_seed(rows)
        shapes = (rows, self.frames, spatial * CHANNELS), (rows, spatial, self.frames * CHANNELS)
        xt, xs = (torch.randn(shape, generator=generator).to(where) for shape in shapes)
        return xt, xs


@dataclass(frozen=True)
class Provider:
    """One way to encode tokens.

    Attributes:
        name: What rows call it.
        module: Holder of its parameters.
        encode: From tokens (N, T, M*V*C) and (N, M*V, T*C) to features (N, T, D) and (N, M*V, D).
    """

    name: str
    module: Any
    encode: Encode


def _reference(setting: Setting, drop_path: float, attention: Any) -> DSTE | STTR:
    sizes = (BODIES * setting.joints * CHANNELS, setting.frames * CHANNELS, setting.width, 1)
    if setting.encoder == "dste":
        return DSTE(*sizes, drop_path=drop_path, attention=attention)
    return STTR(*sizes, attention=attention)


def _native(setting: Setting, drop_path: float, mode: str | None) -> Any:
    sizes: dict[str, Any] = dict(
        num_joints=setting.joints, num_bodies=BODIES, num_frames=setting.frames, num_channels=CHANNELS,
        width=setting.width, init="torch",
    )  # fmt: skip
    encoder = models.DSTE(**sizes, drop_path=drop_path) if setting.encoder == "dste" else models.STTR(**sizes)
    if mode is not None:
        encoder.configure(memory=mode)  # type: ignore[arg-type]
    return encoder


def build(setting: Setting, drop_path: float, device: torch.device | None = None) -> list[Provider]:
    """Build every provider, the baseline first, with the same weights; on the meta device they have no values."""
    where = device or setting.device
    compiled = setting.compiled and where.type != "meta"
    torch.manual_seed(0)
    with where:
        plain = _reference(setting, drop_path, "eager").apply(init_weights)
        with torch.no_grad():
            for parameter in plain.parameters():
                if parameter.dim() == 1:
                    parameter.add_(SPREAD * torch.randn_like(parameter))
        sdpa = _reference(setting, drop_path, "sdpa")
        providers = [Provider(BASELINE, plain, plain), Provider("reference-sdpa", sdpa, sdpa)]
        if compiled:
            # what was compiled for other modules only costs guards
            torch.compiler.reset()
            again = _reference(setting, drop_path, "eager")
            # one shape is timed: code for any shape would be slower
            providers.append(Provider("reference-compiled", again, torch.compile(again, dynamic=False)))
        for mode in (None, *setting.modes):
            own = _native(setting, drop_path, mode)
            providers.append(Provider(f"fastskel-{mode}" if mode else "fastskel", own, own.streams))
    for provider in providers[1:]:
        provider.module.load_state_dict(plain.state_dict(), strict=True)
    return providers


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return autocast to bfloat16 for "bf16", none for "fp32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def gate(name: str, what: str, actual: Sequence[Tensor], expected: Sequence[Tensor], limit: float) -> float:
    """Compare what a provider computes, tensors (..., D), with the reference.

    Returns:
        The relative L2 distance.
    Raises:
        ValueError: If it is above the limit, or not a number.
    """
    distance: float = relative_l2(actual, expected)
    if not distance <= limit:
        raise ValueError(
            f"encoder: {what} of {name} must be within {limit} of the reference, got {distance:.2e}. "
            "Mend it before it is timed."
        )
    return distance
