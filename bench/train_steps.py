"""One pretraining step on a cached batch of four views, as published and as fastskel's, both from the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fastskel.bench.external import Source
from fastskel.bench.providers import BASELINE, DTYPES, Kind, Precision, select, unavailable
from fastskel.bench.reference import loss as reference_loss
from fastskel.bench.reference import usdrl as reference
from torch import Tensor

from fastskel.data.batch import Batch, View
from fastskel.data.views import usdrl_views
from fastskel.models import DSTE
from fastskel.nn.kernel_choice import KernelChoice
from fastskel.objectives import MGFD
from fastskel.skeleton import Topology

__all__ = [
    "DROP_PATH", "MOST_SKIPPED", "VIEWS", "OwnStep", "ReferenceStep", "Setting", "make_step", "plain_model", "set_drop_path",
]  # fmt: skip

BODIES, CHANNELS, VIEWS = 2, 3, 4
DROP_PATH, SEED = 0.1, 5
LEARNING_RATE, WEIGHT_DECAY = 5e-4, 1e-5
# a scaler begins high and halves; a step that it skips costs less than one that it does not
MOST_SKIPPED = 20


@dataclass(frozen=True)
class Setting:
    """Sizes of the comparison.

    Attributes:
        batch: Samples N, of four views.
        width: D; heads are one.
        frames: T.
        joints: V of each of two bodies.
        rounds: Rounds of a comparison.
        limit_s: Seconds after which no further round begins.
        device: Where it runs.
        providers: Names of those to compare; None takes all but what is compiled.
        compiled: Compare with what is compiled, too.
        source: Published code of the user's to compare with, too.
    """

    batch: int = 356
    width: int = 1024
    frames: int = 64
    joints: int = 25
    rounds: int = 15
    limit_s: float = 90.0
    device: torch.device = torch.device("cuda")  # noqa: RUF009 - a constant
    providers: tuple[str, ...] | None = None
    compiled: bool = False
    source: Source | None = None

    def clips(self) -> Tensor:
        """Return the views, (W, N, T, M, V, C), the same each time."""
        generator = torch.Generator().manual_seed(1)
        shape = (VIEWS, self.batch, self.frames, BODIES, self.joints, CHANNELS)
        return torch.randn(shape, generator=generator).to(self.device)

    def published_views(self) -> list[Tensor]:
        """Return the views as the reference's feeder lays them out, (N, C, T, V, M) each."""
        return [view.permute(0, 4, 1, 3, 2).contiguous() for view in self.clips()]

    @property
    def inputs(self) -> tuple[int, int]:
        """Sizes of the reference's temporal and spatial tokens."""
        return BODIES * self.joints * CHANNELS, self.frames * CHANNELS

    @property
    def published(self) -> Precision:
        """Precision of the baseline: the published one, or a CPU's counterpart."""
        return "fp16" if self.device.type == "cuda" else "bf16"

    def kinds(self) -> list[tuple[Kind, str | None]]:
        """List what is compared, with the reason why it cannot run, None where it can."""
        chosen = select(self.published, self.providers, compiled=self.compiled)
        return [(k, unavailable(k, self.device, named=k.name in (self.providers or ()))) for k in chosen]

    def precision(self, kind: Kind) -> Precision:
        """Return what a provider computes in."""
        return kind.precision or (self.published if kind.name == BASELINE else "bf16")


def plain_model(setting: Setting, attention: Any = "eager") -> reference.USDRL:
    """Make the reference with the weights that all providers start from, without DropPath."""
    torch.manual_seed(0)
    model = reference.USDRL(*setting.inputs, setting.width, 1, drop_path=0.0, attention=attention)
    return model.to(setting.device).train()


def set_drop_path(model: torch.nn.Module, rate: float) -> None:
    """Give the modules of either system a probability to drop a branch."""
    for module in model.modules():
        if isinstance(module, reference.DropPath):
            module.rate = rate
        elif isinstance(module, DSTE):
            module.drop_path = rate


class ReferenceStep:
    """The published step; `dtype` is autocast's, a scaler comes with float16, `mode` is torch.compile's."""

    def __init__(
        self, setting: Setting, dtype: torch.dtype, attention: str = "eager", mode: str | None = None, captured: bool = False
    ) -> None:
        self.model, self.device, self.dtype = plain_model(setting, attention), setting.device, dtype
        self.views = setting.published_views()
        options: dict[str, Any] = dict(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, capturable=captured)
        self.optimizer = torch.optim.Adam(self.model.parameters(), **options)
        self.counter = torch.zeros((), dtype=torch.int64, device=setting.device)
        self.scaler = torch.amp.GradScaler(setting.device.type, enabled=dtype == torch.float16)
        self.compiled = mode is not None
        self._total: Callable[..., Tensor] = reference_loss.total
        # the graphs of such code reuse their memory, and ask where a step begins
        self._mark = mode == "max-autotune" and setting.device.type == "cuda"
        if self.compiled:
            # one pass serves the four views: all of them in one graph compile four times as long to the same code
            self.model.sub_forward = torch.compile(  # type: ignore[method-assign]
                self.model.sub_forward, dynamic=False, mode=mode
            )
            self._total = torch.compile(self._total, dynamic=False, mode=mode)

    def loss(self) -> Tensor:
        """Loss of the cached views, ()."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self._total(*self.model(*self.views), "aaai")

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return parameters by their published names."""
        return dict(self.model.named_parameters())

    def zero_grad(self) -> None:
        """Forget gradients, and let a compiled graph begin again."""
        self.optimizer.zero_grad(set_to_none=True)
        if self._mark:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

    def step(self) -> Tensor:
        """One optimiser step; returns its loss ()."""
        self.zero_grad()
        loss = self.loss()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def settle(self) -> None:
        """Step until the scaler skips none."""
        for _ in range(MOST_SKIPPED if self.scaler.is_enabled() else 1):
            before = self.scaler.get_scale()
            self.step()
            if self.scaler.get_scale() >= before:
                break


class OwnStep:
    """fastskel's step in bfloat16; captured, what is dropped is masked."""

    def __init__(self, setting: Setting, kernels: KernelChoice, captured: bool) -> None:
        plain, device = plain_model(setting), setting.device
        self.device, self.dtype = device, torch.bfloat16
        self.encoder = DSTE(
            num_joints=setting.joints, num_bodies=BODIES, num_frames=setting.frames, num_channels=CHANNELS,
            width=setting.width, drop_path=0.0,
        )  # fmt: skip
        self.encoder.load_state_dict(plain.backbone.state_dict(), strict=True)
        self.objective = MGFD(self.encoder, usdrl_views(frames=setting.frames, num_views=VIEWS), weighting="aaai")
        for name in ("i_proj", "s_proj", "t_proj"):
            getattr(self.objective, name).load_state_dict(getattr(plain, name).state_dict(), strict=True)
        self.encoder.to(device).train()
        self.objective.to(device).train()
        self.encoder.configure(kernels=kernels, drop_path_mode="mask" if captured else "skip")
        clips = setting.clips()
        mask, topology = torch.ones(clips.shape[1:4], dtype=torch.bool, device=device), Topology.unknown(setting.joints)
        index = torch.arange(setting.batch, device=device if captured else "cpu")
        self.counter = torch.zeros((), dtype=torch.int64, device=index.device)
        batch = Batch([View(view, mask, topology) for view in clips], torch.zeros(setting.batch), index)
        self.batch = batch.at(SEED, self.counter)
        parameters = [*self.encoder.parameters(), *self.objective.parameters()]
        options: dict[str, Any] = dict(weight_decay=WEIGHT_DECAY, capturable=captured and device.type == "cuda", fused=True)
        self.optimizer = torch.optim.Adam(parameters, LEARNING_RATE, **options)
        self.model = torch.nn.ModuleList([self.encoder, self.objective])
        self.compiled = False

    def loss(self) -> Tensor:
        """Loss of the cached views, ()."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            total: Tensor = self.objective.loss(self.objective.embed(self.encoder, self.batch), self.batch, 0.0).total
        return total

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return parameters by their published names."""
        backbone = {f"backbone.{name}": parameter for name, parameter in self.encoder.named_parameters()}
        return backbone | dict(self.objective.named_parameters())

    def zero_grad(self) -> None:
        """Forget gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> Tensor:
        """One optimiser step; returns its loss ()."""
        self.zero_grad()
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def counted(self) -> Tensor:
        """One step at the next address; returns its loss ()."""
        loss = self.step()
        self.counter.add_(1)
        return loss

    def settle(self) -> None:
        """Step once."""
        self.counted()


def make_step(setting: Setting, kind: Kind) -> ReferenceStep | OwnStep:
    """Make the step of a provider, with the weights that all have."""
    if kind.attention is None:
        return OwnStep(setting, kind.kernels, kind.captured)
    return ReferenceStep(setting, DTYPES[setting.precision(kind)], kind.attention, kind.mode, kind.captured)
