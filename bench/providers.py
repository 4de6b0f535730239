"""What benchmarks compare: one list of providers, for the encoder and for whole steps, and its encoders with the same weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from fastskel.bench.external import Checkout, Source
from fastskel.bench.harness import relative_l2
from fastskel.bench.reference import DSTE, STTR, USDRL, init_weights, xformers_attention
from torch import Tensor

from fastskel import models

__all__ = [
    "BASELINE", "BODIES", "DTYPES", "KINDS", "Encode", "Kind", "Precision", "Provider", "Setting", "autocast", "build", "gate",
    "open_checkout", "published_arguments", "select", "tf32", "unavailable",
]  # fmt: skip

BASELINE = "reference"
BODIES, CHANNELS = 2, 3
# spread of biases and norms around their start of 0 and 1, where an error in them would not show
SPREAD = 0.1

Encode = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Kind:
    """One way to run the system.

    Attributes:
        name: What rows call it.
        about: What it is.
        precision: Autocast's, where it has one of its own; None takes the comparison's.
        attention: The reference's attention; None for fastskel.
        mode: Mode of torch.compile; None does not compile.
        captured: Whether it is replayed as a CUDA graph.
        kernels: Who computes fastskel's operators.
    """

    name: str
    about: str
    precision: Precision | None = None
    attention: Literal["eager", "sdpa", "xformers"] | None = "eager"
    mode: str | None = None
    captured: bool = False
    kernels: Literal["torch", "triton"] = "torch"

    @property
    def is_plain(self) -> bool:
        """Whether it runs everywhere, without a compiler, and differs in its operations from all others."""
        return not (self.precision or self.mode or self.captured or self.kernels == "triton" or self.attention == "xformers")


KINDS = (
    Kind(BASELINE, "the published system: plain, eager, a pass per view"),
    Kind("reference-fp16", "the same in float16, with a gradient scaler", precision="fp16"),
    Kind("reference-bf16", "the same in bfloat16", precision="bf16"),
    Kind("reference-sdpa", "with torch's fused attention", attention="sdpa"),
    Kind("reference-xformers", "with xformers' attention", attention="xformers"),
    Kind("reference-compiled", "under torch.compile", mode="default"),
    Kind("reference-compiled-max", "under torch.compile max-autotune", mode="max-autotune"),
    Kind("reference-sdpa-compiled-max", "fused attention and max-autotune", attention="sdpa", mode="max-autotune"),
    Kind("reference-graph", "captured as a CUDA graph", captured=True),
    Kind("fastskel", "fastskel with torch's operators", attention=None),
    Kind("fastskel-triton", "fastskel with its fused kernels", attention=None, kernels="triton"),
    Kind("fastskel-graph", "torch's operators, captured as a CUDA graph", attention=None, captured=True),
    Kind("fastskel-triton-graph", "fused kernels, captured", attention=None, kernels="triton", captured=True),
)


def select(precision: str, names: Sequence[str] | None = None, *, compiled: bool = False) -> list[Kind]:
    """List the providers of a comparison, the baseline first.

    Args:
        precision: The baseline's. What has the same by its name is left out, and of "fp32" what has less.
        names: Providers that were asked for; None takes all but what is compiled.
        compiled: Take what is compiled, too: minutes.
    Raises:
        ValueError: On an unknown name.
    """
    known = [kind.name for kind in KINDS]
    for name in names or ():
        if name not in known:
            raise ValueError(f"select: names must be of {known}, got {name!r}. Choose among them.")

    def wanted(kind: Kind) -> bool:
        if kind.name == BASELINE:
            return True
        if kind.precision is not None and precision in ("fp32", kind.precision):
            return False
        if names is not None and kind.name in names:
            return True
        return compiled if kind.mode else names is None

    return [kind for kind in KINDS if wanted(kind)]


def unavailable(kind: Kind, device: torch.device, *, named: bool = False) -> str | None:
    """Say why a provider cannot run on a device, None where it can.

    Args:
        kind: The provider.
        device: Where it would run.
        named: Whether it was asked for by its name, so that slow is no reason.
    """
    on_gpu = device.type == "cuda"
    if kind.attention == "xformers":
        try:
            xformers_attention()
        except RuntimeError as error:
            return str(error)
    needs = {"CUDA graphs run": kind.captured, "fused kernels run": kind.kernels == "triton",
             "the operators of xformers run": kind.attention == "xformers"}  # fmt: skip
    for what, needed in needs.items():
        if needed and not on_gpu:
            return f"{what} on a GPU only"
    if kind.precision == "fp16" and not (on_gpu or named):
        return "a CPU multiplies in float16 many times slower than in bfloat16, its counterpart there: ask for it by name"
    return None


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
        providers: Names of those to compare; None takes all but what is compiled.
        source: Published code of the user's to compare with, too.
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
    providers: tuple[str, ...] | None = None
    source: Source | None = None

    def tokens(self, rows: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Return tokens (N, T, M*V*C) and (N, M*V, T*C), the same for each N."""
        spatial, where = BODIES * self.joints, device or self.device
        generator = torch.Generator().manual_seed(rows)
        shapes = (rows, self.frames, spatial * CHANNELS), (rows, spatial, self.frames * CHANNELS)
        xt, xs = (torch.randn(shape, generator=generator).to(where) for shape in shapes)
        return xt, xs

    def kinds(self, precision: str) -> list[tuple[Kind, str | None]]:
        """List what is compared in a precision, with the reason why it cannot run, None where it can."""
        chosen = select(precision, self.providers, compiled=self.compiled)
        return [(k, unavailable(k, self.device, named=k.name in (self.providers or ()))) for k in chosen]


@dataclass(frozen=True)
class Provider:
    """One way to encode tokens.

    Attributes:
        name: What rows call it.
        module: Holder of its parameters.
        encode: From tokens (N, T, M*V*C) and (N, M*V, T*C) to features (N, T, D) and (N, M*V, D).
        kind: How it runs.
    """

    name: str
    module: Any
    encode: Encode
    kind: Kind = KINDS[0]


def _reference(setting: Setting, drop_path: float, attention: Any) -> DSTE | STTR:
    sizes = (BODIES * setting.joints * CHANNELS, setting.frames * CHANNELS, setting.width, 1)
    if setting.encoder == "dste":
        return DSTE(*sizes, drop_path=drop_path, attention=attention)
    return STTR(*sizes, attention=attention)


def _native(setting: Setting, drop_path: float, kind: Kind, mode: str | None) -> Any:
    sizes: dict[str, Any] = dict(
        num_joints=setting.joints, num_bodies=BODIES, num_frames=setting.frames, num_channels=CHANNELS,
        width=setting.width, init="torch",
    )  # fmt: skip
    encoder = models.DSTE(**sizes, drop_path=drop_path) if setting.encoder == "dste" else models.STTR(**sizes)
    encoder.configure(kernels=kind.kernels)
    if mode is not None:
        encoder.configure(memory=mode)  # type: ignore[arg-type]
    return encoder


def build(
    setting: Setting, drop_path: float, device: torch.device | None = None, *, precision: str = "fp32"
) -> list[Provider]:
    """Build every provider that can run, the baseline first, with the same weights; on the meta device they have no values.

    Args:
        setting: Sizes, and what is compared.
        drop_path: Probability that a branch is dropped in training.
        device: Where they are; None is the setting's.
        precision: Of the comparison; chooses among the providers only.
    """
    where = device or setting.device
    kinds = [kind for kind, reason in setting.kinds(precision) if reason is None]
    if where.type == "meta":
        kinds = [kind for kind in kinds if kind.is_plain]
    torch.manual_seed(0)
    if any(kind.mode for kind in kinds):
        # what was compiled for other modules only costs guards
        torch.compiler.reset()
    providers = []
    with where:
        plain = _reference(setting, drop_path, "eager").apply(init_weights)
        with torch.no_grad():
            for parameter in plain.parameters():
                if parameter.dim() == 1:
                    parameter.add_(SPREAD * torch.randn_like(parameter))
        for kind in kinds:
            if kind.attention is None:
                modes = (None, *setting.modes) if kind.name == "fastskel" else (None,)
                for mode in modes:
                    own = _native(setting, drop_path, kind, mode)
                    providers.append(Provider(f"{kind.name}-{mode}" if mode else kind.name, own, own.streams, kind))
                continue
            module = plain if kind.name == BASELINE or kind.precision else _reference(setting, drop_path, kind.attention)
            # one shape is timed: code for any shape would be slower
            call: Any = torch.compile(module, dynamic=False, mode=kind.mode) if kind.mode else module
            providers.append(Provider(kind.name, module, call, kind))
    for provider in providers[1:]:
        provider.module.load_state_dict(plain.state_dict(), strict=True)
    return providers


def published_arguments(temporal: int, spatial: int, width: int) -> dict[str, Any]:
    """Return the arguments of the published constructors, by their names, for token sizes M*V*C and T*C."""
    return dict(
        t_input_size=temporal, s_input_size=spatial, hidden_size=width, num_head=1, num_layer=2, alpha=0.5, kernel_size=1,
        gap=4,
    )  # fmt: skip


def open_checkout(setting: Setting, plain: Provider) -> Checkout:
    """Start the published code of the setting's source with the weights of the plain reference.

    Raises:
        ValueError: If its folder is none.
        CheckoutError: If its model cannot be built, or takes other weights.
    """
    assert setting.source is not None
    sizes = BODIES * setting.joints * CHANNELS, setting.frames * CHANNELS
    # the published class has projectors, too, which nothing here runs
    whole = USDRL(*sizes, setting.width, 1, backbone="dste" if setting.encoder == "dste" else "sttr")
    state = whole.state_dict() | {f"backbone.{name}": value for name, value in plain.module.state_dict().items()}
    return Checkout(setting.source, published_arguments(*sizes, setting.width), state, setting.device)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return autocast to bfloat16 for "bf16", to float16 for "fp16", none for "fp32"."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let a GPU multiply float32 in TF32, or not: torch by itself lets convolutions, which the reference has, but not products.

    Args:
        allowed: Whether it may.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


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
