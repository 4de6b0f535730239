"""Whole training steps, and the extraction of features, beside the reference and what a user would try first to make it faster.

    python -m fastskel.bench.training --out FILE.jsonl [--device cuda] [--parts step extract]

One cached batch of four views; the loss is the published one. The reference is run as published (float16 autocast with a
gradient scaler, a pass per view), and in bfloat16 with torch's fused attention, compiled, and with both; fastskel with torch's
operators, with its fused kernels, and captured into one CUDA graph. All start from the same weights, the losses of what is
compiled or captured must agree without DropPath before anything is timed, and they take turns. TFLOP/s are the reference's
operations over a provider's time. Figures of --quick prove that something runs and are never quoted.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastskel.bench.harness import append_rows, compare, flops, origin, peak_bytes
from fastskel.bench.reference import loss as reference_loss
from fastskel.bench.reference import usdrl as reference
from torch import Tensor

from fastskel.data.batch import Batch, View
from fastskel.data.views import usdrl_views
from fastskel.models import DSTE
from fastskel.nn.kernel_choice import KernelChoice
from fastskel.objectives import MGFD
from fastskel.skeleton import Topology
from fastskel.train.capture import CapturedStep

__all__ = ["Setting", "main"]

BODIES, CHANNELS, VIEWS = 2, 3, 4
DROP_PATH, SEED = 0.1, 5
LEARNING_RATE = 5e-4
BASELINE = "reference"
# relative difference of a loss in half precision from the reference's in float32
LOSS_LIMIT = 2e-2
QUICK = dict(batch=6, width=32, frames=16, joints=5, rounds=3)

Row = dict[str, Any]


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
    """

    batch: int = 356
    width: int = 1024
    frames: int = 64
    joints: int = 25
    rounds: int = 15
    limit_s: float = 90.0
    device: torch.device = torch.device("cuda")  # noqa: RUF009 - a constant

    def clips(self) -> Tensor:
        """Return the views, (W, N, T, M, V, C), the same each time."""
        generator = torch.Generator().manual_seed(1)
        shape = (VIEWS, self.batch, self.frames, BODIES, self.joints, CHANNELS)
        return torch.randn(shape, generator=generator).to(self.device)

    @property
    def inputs(self) -> tuple[int, int]:
        """Sizes of the reference's temporal and spatial tokens."""
        return BODIES * self.joints * CHANNELS, self.frames * CHANNELS


def _plain(setting: Setting, attention: Any = "eager") -> reference.USDRL:
    torch.manual_seed(0)
    model = reference.USDRL(*setting.inputs, setting.width, 1, drop_path=0.0, attention=attention)
    return model.to(setting.device).train()


def _set_rate(model: torch.nn.Module, rate: float) -> None:
    for module in model.modules():
        if isinstance(module, reference.DropPath):
            module.rate = rate
        elif isinstance(module, DSTE):
            module.drop_path = rate


class ReferenceStep:
    """The published step; `dtype` is autocast's, a scaler comes with float16."""

    def __init__(self, setting: Setting, dtype: torch.dtype, attention: str = "eager", mode: str | None = None) -> None:
        self.model, self.device, self.dtype = _plain(setting, attention), setting.device, dtype
        # N, C, T, V, M, as the reference's feeder lays clips out
        self.views = [view.permute(0, 4, 1, 3, 2).contiguous() for view in setting.clips()]
        # torch's default way, which may be captured too
        cuda = setting.device.type == "cuda"
        self.optimizer = torch.optim.Adam(self.model.parameters(), LEARNING_RATE, capturable=cuda)
        self.counter = torch.zeros((), dtype=torch.int64, device=setting.device)
        self.scaler = torch.amp.GradScaler(setting.device.type, enabled=dtype == torch.float16)
        self.forward: Callable[[], Tensor] = self.loss
        if mode is not None:
            self.forward = torch.compile(self.loss, dynamic=False, mode=mode)

    def loss(self) -> Tensor:
        """Loss of the cached views, ()."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            embeddings = self.model(*self.views)
        with torch.autocast(self.device.type, enabled=False):
            return reference_loss.total(*([z.float() for z in part] for part in embeddings), "aaai")

    def step(self) -> Tensor:
        """One optimiser step; returns its loss ()."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.forward()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()


class OwnStep:
    """fastskel's step in bfloat16; captured, what is dropped is masked."""

    def __init__(self, setting: Setting, kernels: KernelChoice, captured: bool) -> None:
        plain, device = _plain(setting), setting.device
        self.device = device
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
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.Adam(parameters, LEARNING_RATE, capturable=cuda, fused=cuda)
        self.model = torch.nn.ModuleList([self.encoder, self.objective])

    def loss(self) -> Tensor:
        """Loss of the cached views, ()."""
        with torch.autocast(self.device.type, torch.bfloat16):
            total: Tensor = self.objective.loss(self.objective.embed(self.encoder, self.batch), self.batch, 0.0).total
        return total

    def step(self) -> Tensor:
        """One optimiser step; returns its loss ()."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def counted(self) -> Tensor:
        """One step at the next address; returns its loss ()."""
        loss = self.step()
        self.counter.add_(1)
        return loss


def _peak_of_capture(name: str, model: Any, setting: Setting) -> tuple[int, Callable[[], Any]]:
    made: list[Callable[[], Any]] = []
    peak = peak_bytes(lambda: made.append(_call(name, model, setting)), setting.device)
    return peak, made[0]


def _gate(name: str, model: Any, expected: float) -> float:
    _set_rate(model.model, 0.0)
    with torch.no_grad():
        distance = abs(float(model.loss()) / expected - 1.0)
    if not distance <= LOSS_LIMIT:
        raise ValueError(
            f"training: loss of {name} must be within {LOSS_LIMIT} of the reference's, got {distance:.2e}. Mend it first."
        )
    _set_rate(model.model, DROP_PATH)
    return distance


def _models(setting: Setting, kernels: Sequence[str], compiled: bool) -> dict[str, Callable[[], Any]]:
    """Name every provider, with what makes its model; of names that end in "graph" the step is captured."""
    cuda, bf16 = setting.device.type == "cuda", torch.bfloat16
    found: dict[str, Callable[[], Any]] = {
        BASELINE: lambda: ReferenceStep(setting, torch.float16),
        "reference-sdpa": lambda: ReferenceStep(setting, bf16, "sdpa"),
    }
    if compiled:
        found["reference-compiled"] = lambda: ReferenceStep(setting, bf16, "eager", "max-autotune-no-cudagraphs")
        found["reference-all"] = lambda: ReferenceStep(setting, bf16, "sdpa", "max-autotune")
    if cuda:
        found["reference-graph"] = lambda: ReferenceStep(setting, bf16)
    for choice in kernels:
        found[f"fastskel-{choice}"] = lambda choice=choice: OwnStep(setting, choice, False)
        if cuda:
            found[f"fastskel-{choice}-graph"] = lambda choice=choice: OwnStep(setting, choice, True)
    return found


def _call(name: str, model: Any, setting: Setting) -> Callable[[], Any]:
    """Make a provider's step ready: captured, or after its first call, which compiles."""
    if name.endswith("graph"):
        return CapturedStep(model.step, model.counter, setting.device)
    call: Callable[[], Any] = getattr(model, "counted", model.step)
    call()
    return call


def step_part(setting: Setting, kernels: Sequence[str], compiled: bool) -> Iterator[Row]:
    """Time training steps; a provider that fails is a row with its error, and the others go on."""
    exact = ReferenceStep(setting, torch.float32)
    with torch.no_grad():
        expected = float(exact.loss())
    work = flops(exact.step) / 1e12
    del exact
    calls: dict[str, Callable[[], Any]] = {}
    about: dict[str, Row] = {}
    torch.compiler.reset()
    for name, make in _models(setting, kernels, compiled).items():
        gc.collect()
        try:
            model = make()
            distance = _gate(name, model, expected)
            if name.endswith("graph"):
                # replays allocate nothing: the warm-up and the capture do
                peak, call = _peak_of_capture(name, model, setting)
            else:
                call = _call(name, model, setting)
                peak = peak_bytes(call, setting.device)
            about[name] = {"distance": distance, "peak_bytes": peak}
            calls[name] = call
        except (RuntimeError, ValueError, torch.cuda.OutOfMemoryError) as error:
            if name == BASELINE:
                raise
            yield {"provider": name, "status": "failed", "error": f"{type(error).__name__}: {str(error)[:500]}"}
    limits: dict[str, Any] = dict(rounds=setting.rounds, warmup=2, limit_s=setting.limit_s)
    for timing in compare(calls, BASELINE, device=setting.device, **limits):
        speed = {"reference_tflop": work, "reference_tflop_per_s": 1e3 * work / timing.median_ms}
        rate = {"samples_per_s": 1e3 * setting.batch / timing.median_ms}
        yield {**timing.row(), **speed, **rate, **about[timing.provider], "status": "ok"}


def extract_part(setting: Setting, kernels: Sequence[str], compiled: bool) -> Iterator[Row]:
    """Time the extraction of features of one view, clips/s."""
    plain = _plain(setting).eval()
    view = setting.clips()[0]
    clips = view.permute(0, 4, 1, 3, 2).contiguous()
    own = OwnStep(setting, "torch", False).encoder.eval()
    topology = Topology.unknown(setting.joints)
    whole = View(view, torch.ones(view.shape[:3], dtype=torch.bool, device=setting.device), topology)

    def published(dtype: torch.dtype) -> Tensor:
        with torch.no_grad(), torch.autocast(setting.device.type, dtype, enabled=dtype != torch.float32):
            n, c, t, v, m = clips.shape
            temporal = clips.permute(0, 2, 4, 3, 1).reshape(n, t, m * v * c)
            streams = plain.backbone(temporal, clips.permute(0, 4, 3, 2, 1).reshape(n, m * v, t * c))
            return torch.cat([y.amax(1) for y in streams], -1)

    calls: dict[str, Callable[[], Any]] = {
        BASELINE: lambda: published(torch.float16), "reference-fp32": lambda: published(torch.float32),
    }  # fmt: skip
    exact = published(torch.float32)
    about: dict[str, Row] = {name: {} for name in calls}
    for choice in kernels:
        name = f"fastskel-{choice}"
        own.configure(kernels=choice)  # type: ignore[arg-type]
        frozen = own.optimize_for_inference(torch.bfloat16)

        def encode(frozen: DSTE = frozen) -> Tensor:
            with torch.no_grad():
                return frozen(whole).pooled

        try:
            out = encode()
        except (RuntimeError, ValueError) as error:
            yield {"provider": name, "status": "failed", "error": f"{type(error).__name__}: {str(error)[:500]}"}
            continue
        about[name] = {"distance": float((out - exact).norm() / exact.norm())}
        calls[name] = encode
    for timing in compare(calls, BASELINE, device=setting.device, rounds=setting.rounds, limit_s=setting.limit_s):
        rate = {"clips_per_s": 1e3 * setting.batch / timing.median_ms}
        yield {**timing.row(), **rate, **about[timing.provider], "status": "ok"}


PARTS = {"step": step_part, "extract": extract_part}


def line(row: Row) -> str:
    """Say a row in one line."""
    start = f"{row['part']:<8} {row['provider']:<24}"
    if row["status"] == "failed":
        return f"{start} FAILED {row['error'][:80]}"
    peak = f"  peak {row['peak_bytes'] / 2**30:6.2f} GiB" if "peak_bytes" in row else ""
    spread = f"[{row['speedup_q20']:.2f}, {row['speedup_q80']:.2f}]"
    return f"{start} {row['median_ms']:9.2f} ms  {row['speedup']:5.2f}x {spread}{peak}"


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run; returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m fastskel.bench.training", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to add rows to")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--kernels", nargs="+", choices=("torch", "triton"), help="of fastskel; on a GPU both")
    parser.add_argument("--compile", action="store_true", help="compare with the compiled reference too: minutes")
    parser.add_argument("--batch", type=int, help="samples N, 356 by default")
    parser.add_argument("--rounds", type=int, help="rounds of a comparison, 15 by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    given = parser.parse_args(arguments)
    sizes: dict[str, Any] = dict(QUICK) if given.quick else {}
    sizes |= {name: value for name in ("batch", "rounds") if (value := getattr(given, name)) is not None}
    setting = Setting(device=torch.device(given.device), **sizes)
    kernels = given.kernels or (["torch", "triton"] if given.device == "cuda" else ["torch"])
    about = {"batch": setting.batch, "width": setting.width, "frames": setting.frames, "quick": given.quick}
    about |= origin(setting.device)
    for part in given.parts:
        rows = []
        for figures in PARTS[part](setting, kernels, given.compile):
            rows.append({"part": part, **figures, **about})
            print(line(rows[-1]), flush=True)
        append_rows(given.out, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
