"""Whole training steps, and the extraction of features, beside the reference and what a user would try first to make it faster.

    python -m fastskel.bench.training --out FILE.jsonl [--device cuda|cpu] [--parts step extract]
        [--providers NAME ...] [--compile] [--reference FOLDER]

One cached batch of four views; the loss is the published one. The reference runs as published: a pass per view, losses over D x D
matrices under autocast, Adam with coupled decay, float16 with a gradient scaler on a GPU, and bfloat16 on a CPU, which multiplies
in float16 many times slower. Beside it run the other providers of `fastskel.bench.providers`, in bfloat16. What is not modelled
favours the reference: data parallelism and its gather, and the four scalars that the published loop reads in every step.

All start from the same weights. Before anything is timed loss and gradients must agree without DropPath: sharply in float32,
but for compiled code, and in the provider's own precision. They take turns. TFLOP/s are the reference's operations over a
provider's time. What cannot run is a row "unavailable" or "failed" with the reason. Figures of --quick prove that something
runs and are never quoted.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastskel.bench.contest import Contest, unavailable_row
from fastskel.bench.devices import add_device
from fastskel.bench.external import EXTERNAL, Checkout, add_arguments, source_of
from fastskel.bench.harness import append_rows, flops, origin, peak_bytes, relative_l2
from fastskel.bench.providers import BASELINE, DTYPES, Kind, gate, published_arguments, tf32
from fastskel.bench.train_steps import (
    DROP_PATH,
    MOST_SKIPPED,
    VIEWS,
    OwnStep,
    ReferenceStep,
    Setting,
    make_step,
    plain_model,
    set_drop_path,
)
from torch import Tensor

from fastskel.data.batch import View
from fastskel.models import DSTE
from fastskel.skeleton import Topology
from fastskel.train.capture import CapturedStep

__all__ = ["Exact", "OwnStep", "ReferenceStep", "Setting", "extract_part", "gate_step", "loss_and_gradients", "main", "step_part"]

# relative distance of a loss from the reference's in float32, in its own precision
LOSS_LIMITS: dict[str, float] = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
# relative L2 of all gradients in float32: the maximum over tokens picks another token where two are close, of a few
GRADIENT_LIMIT = 2e-2
# in half precision it does so often, and BatchNorm over few samples enlarges it: the plain reference itself is 0.25 off for 32
# samples and 0.9 for 4. No more than this times its own distance is allowed to others
GRADIENT_SLACK = 1.5
# of a caller that holds half precision to its loss, and gradients to float32
LARGEST = float("inf")
# draws of DropPath in a captured step may be others than those of the step that it is checked with
CAPTURED_LIMIT = 0.2
# keeps float16 gradients in range while they are compared
GATE_SCALE = 2.0**10
# of features, against float32
FEATURE_LIMITS: dict[str, float] = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3, "tf32": 5e-3}
# what two cores do in seconds
CPU_BATCH = 8
QUICK = dict(batch=6, width=32, frames=16, joints=5, rounds=3)

Row = dict[str, Any]


# loss () and gradients by name
Exact = tuple[float, dict[str, Tensor]]


def loss_and_gradients(model: Any, forward: Callable[[], Tensor], scale: float) -> Exact:
    """Return a loss (), and its gradients (D, ..) by name, taken of the loss times `scale`; leaves none behind."""
    model.zero_grad()
    loss = forward()
    (loss.float() * scale).backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.float() / scale for name, p in model.parameters().items() if p.grad is not None}
    model.zero_grad()
    return float(loss.detach()), found


def _compare(name: str, precision: str, found: Exact, exact: Exact, gradient_limit: float) -> Row:
    """Hold loss and gradients against the reference's in float32.

    Raises:
        ValueError: If one is too far off, or not a number, or a gradient is missing.
    """
    distance = abs(found[0] / exact[0] - 1.0)
    if found[1].keys() != exact[1].keys():
        differ = sorted(found[1].keys() ^ exact[1].keys())[:3]
        raise ValueError(f"training: gradients of {name} must be those of the reference, got others at {differ}. Mend it first.")
    gradients = relative_l2(found[1].values(), [exact[1][key] for key in found[1]])
    for what, value, limit in (
        ("loss", distance, LOSS_LIMITS[precision]), ("gradients", gradients, gradient_limit),
    ):  # fmt: skip
        if not value <= limit:
            raise ValueError(
                f"training: {what} of {name} in {precision} must be within {limit:.3g} of the reference's, got {value:.2e}. "
                "Mend it first."
            )
    return {"distance": distance, "gradient_distance": gradients}


def gate_step(name: str, model: Any, precision: str, exact: Exact, gradient_limit: float = LARGEST) -> Row:
    """Compare a step without DropPath with the reference, as it computes and, if it is not compiled, in float32.

    Args:
        name: Provider.
        model: Its step.
        precision: What it computes in.
        exact: The reference's loss () and gradients (D, ..) in float32.
        gradient_limit: Largest distance of gradients in `precision`.
    Returns:
        Distances, as fields of a row.
    Raises:
        ValueError: If one is too far off, or not a number, or a gradient is missing.
    """
    set_drop_path(model.model, 0.0)
    scale = GATE_SCALE if precision == "fp16" else 1.0
    found = _compare(name, precision, loss_and_gradients(model, model.loss, scale), exact, gradient_limit)
    if not model.compiled:
        own, model.dtype = model.dtype, torch.float32
        sharp = _compare(name, "fp32", loss_and_gradients(model, model.loss, 1.0), exact, GRADIENT_LIMIT)
        found |= {f"{key}_fp32": value for key, value in sharp.items()}
        model.dtype = own
    set_drop_path(model.model, DROP_PATH)
    return found


def _captured(name: str, model: Any, setting: Setting) -> CapturedStep:
    """Capture a step, and hold its loss against the same step's without the graph."""
    call = CapturedStep(model.step, model.counter, setting.device)
    with torch.no_grad():
        expected = float(model.loss())
    distance = abs(float(call()) / expected - 1.0)
    if not distance <= CAPTURED_LIMIT:
        raise ValueError(
            f"training: loss of {name} replayed must be within {CAPTURED_LIMIT} of the step's, got {distance:.2e}. Mend it first."
        )
    return call


def _gradient_limits(plain: ReferenceStep, exact: Exact) -> dict[str, float]:
    """Say how far off gradients may be in each half precision, from the plain reference's own distance in bfloat16."""
    plain.dtype = torch.bfloat16
    _, found = loss_and_gradients(plain, plain.loss, 1.0)
    plain.dtype = torch.float32
    limit = GRADIENT_SLACK * relative_l2(found.values(), exact[1].values())
    # float16 has three bits more, and is no further off
    return {"bf16": limit, "fp16": limit}


def _ready(setting: Setting, kind: Kind, exact: Exact, limits: Mapping[str, float]) -> tuple[Callable[[], Any], Row]:
    """Make a provider's step ready: checked, and captured or past its first calls, which compile."""
    gc.collect()
    if setting.device.type == "cuda":
        # a capture cannot use what the allocator keeps of others
        torch.cuda.empty_cache()
    model, precision = make_step(setting, kind), setting.precision(kind)
    about: Row = {"about": kind.about, "precision": precision}
    about |= gate_step(kind.name, model, precision, exact, limits[precision])
    if kind.captured:
        made: list[CapturedStep] = []
        # replays allocate nothing: the warm-up and the capture do
        about["peak_bytes"] = peak_bytes(lambda: made.append(_captured(kind.name, model, setting)), setting.device)
        return made[0], about
    model.settle()
    call: Callable[[], Any] = getattr(model, "counted", model.step)
    about["peak_bytes"] = peak_bytes(call, setting.device)
    return call, about


def _ready_checkout(stack: contextlib.ExitStack, setting: Setting, exact: Exact) -> tuple[Callable[[], Any], Row]:
    """Make the published step of the code in the user's folder ready, checked in float32."""
    assert setting.source is not None
    state = plain_model(setting).state_dict()
    arguments = published_arguments(*setting.inputs, setting.width)
    checkout = stack.enter_context(Checkout(setting.source, arguments, state, setting.device))
    views = setting.published_views()
    checkout.prepare("loss", views, precision="fp32")
    loss, *gradients = checkout.results()
    assert loss is not None
    named = {n: g.to(setting.device) for n, g in zip(checkout.names, gradients, strict=True) if g is not None}
    about: Row = {"about": f"the published code in a folder, {checkout.name}", "pipe_ms": checkout.pipe_ms}
    found = _compare(EXTERNAL, "fp32", (float(loss), named), exact, GRADIENT_LIMIT)
    about |= {f"{key}_fp32": value for key, value in found.items()}
    checkout.prepare("step", views, precision=setting.published, drop_path=DROP_PATH)
    scale = float("inf")
    for _ in range(MOST_SKIPPED):
        before, scale = scale, checkout.run()["scale"]
        if scale >= before:
            break
    return checkout.run, {**about, "precision": setting.published}


def step_part(setting: Setting) -> Iterator[Row]:
    """Time training steps; a provider that fails is a row with its error, and the others go on."""
    plain = ReferenceStep(setting, torch.float32)
    exact = loss_and_gradients(plain, plain.loss, 1.0)
    limits = _gradient_limits(plain, exact)
    work = flops(plain.step) / 1e12
    del plain
    torch.compiler.reset()
    contest = Contest(setting.device)
    with contextlib.ExitStack() as stack:
        for kind, reason in setting.kinds():
            if reason is not None:
                yield unavailable_row(kind, reason)
            else:
                contest.enter(kind.name, partial(_ready, setting, kind, exact, limits))
        if setting.source is not None:
            contest.enter(EXTERNAL, partial(_ready_checkout, stack, setting, exact))
        for row in contest.rows(rounds=setting.rounds, warmup=2, limit_s=setting.limit_s):
            if row["status"] == "ok":
                speed = {"reference_tflop": work, "reference_tflop_per_s": 1e3 * work / row["median_ms"]}
                row |= {**speed, "samples_per_s": 1e3 * setting.batch / row["median_ms"]}
            yield row


def extract_part(setting: Setting) -> Iterator[Row]:
    """Time the extraction of features of one view, clips/s."""
    plain, view = plain_model(setting).eval(), setting.clips()[0]
    clips = view.permute(0, 4, 1, 3, 2).contiguous()
    own = OwnStep(setting, "torch", False).encoder.eval()
    mask = torch.ones(view.shape[:3], dtype=torch.bool, device=setting.device)
    whole = View(view, mask, Topology.unknown(setting.joints))

    def published(precision: str) -> Tensor:
        dtype = DTYPES[precision]
        with torch.no_grad(), torch.autocast(setting.device.type, dtype, enabled=dtype != torch.float32):
            n, c, t, v, m = clips.shape
            temporal = clips.permute(0, 2, 4, 3, 1).reshape(n, t, m * v * c)
            streams = plain.backbone(temporal, clips.permute(0, 4, 3, 2, 1).reshape(n, m * v, t * c))
            return torch.cat([y.amax(1) for y in streams], -1)

    def in_tf32() -> Tensor:
        with tf32(True):
            return published("fp32")

    def frozen(kernels: Any) -> Callable[[], Tensor]:
        own.configure(kernels=kernels)
        encoder: DSTE = own.optimize_for_inference(torch.bfloat16)

        def encode() -> Tensor:
            with torch.no_grad():
                pooled: Tensor = encoder(whole).pooled
            return pooled

        return encode

    exact, contest = published("fp32"), Contest(setting.device)

    def ready(name: str, about: str, precision: str, make: Callable[[], Callable[[], Tensor]]) -> None:
        def made() -> tuple[Callable[[], Tensor], Row]:
            call = make()
            distance = gate(name, f"{precision} features", [call()], [exact], FEATURE_LIMITS[precision])
            return call, {"about": about, "precision": precision, "distance": distance}

        contest.enter(name, made)

    ready(BASELINE, "the published encoder under autocast", setting.published, lambda: partial(published, setting.published))
    ready("reference-fp32", "the published encoder in float32", "fp32", lambda: partial(published, "fp32"))
    if setting.device.type == "cuda":
        # what the torch of the publication did on such a GPU without being asked
        ready("reference-tf32", "the published encoder as published", "tf32", lambda: in_tf32)
    for kind, reason in setting.kinds():
        if kind.attention is not None or kind.captured:
            continue
        if reason is not None:
            yield unavailable_row(kind, reason)
        else:
            ready(kind.name, f"{kind.about}, prepared for inference", "bf16", partial(frozen, kind.kernels))
    for row in contest.rows(rounds=setting.rounds, limit_s=setting.limit_s):
        timed = row["status"] == "ok"
        yield {**row, "clips_per_s": 1e3 * setting.batch / row["median_ms"]} if timed else row


PARTS = {"step": step_part, "extract": extract_part}


def line(row: Row) -> str:
    """Say a row in one line."""
    start = f"{row['part']:<8} {row['provider']:<27}"
    if row["status"] != "ok":
        return f"{start} {row['status'].upper()} {row.get('reason') or row['error']}"
    peak = f"  peak {row['peak_bytes'] / 2**30:6.2f} GiB" if "peak_bytes" in row else ""
    spread = f"[{row['speedup_q20']:.2f}, {row['speedup_q80']:.2f}]"
    return f"{start} {row['precision']} {row['median_ms']:9.2f} ms  {row['speedup']:5.2f}x {spread}{peak}"


@tf32(False)
def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run; returns 1 if a provider of fastskel failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to add rows to")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="what to compare; all by default but what compiles")
    parser.add_argument("--compile", action="store_true", help="compare with the compiled reference too: minutes")
    parser.add_argument("--batch", type=int, help="samples N, 356 by default, 8 on a CPU")
    parser.add_argument("--width", type=int, help="width D, 1024 by default")
    parser.add_argument("--rounds", type=int, help="rounds of a comparison, 15 by default")
    parser.add_argument("--limit", type=float, default=Setting.limit_s, help="seconds of a comparison")
    add_device(parser)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    add_arguments(parser)
    given = parser.parse_args(arguments)
    sizes: dict[str, Any] = dict(QUICK) if given.quick else {"batch": CPU_BATCH} if given.device == "cpu" else {}
    sizes |= {name: value for name in ("batch", "width", "rounds") if (value := getattr(given, name)) is not None}
    setting = Setting(
        device=torch.device(given.device), limit_s=given.limit, compiled=given.compile, source=source_of(given),
        providers=None if given.providers is None else tuple(given.providers), **sizes,
    )  # fmt: skip
    about = {"case": f"N={setting.batch} D={setting.width}", "batch": setting.batch, "views": VIEWS, "width": setting.width,
             "frames": setting.frames, "quick": given.quick, **origin(setting.device)}  # fmt: skip
    failed = False
    for part in given.parts:
        rows = []
        for figures in PARTS[part](setting):
            rows.append({"part": part, **figures, **about})
            print(line(rows[-1]), flush=True)
        append_rows(given.out, rows)
        failed |= any(row["status"] == "failed" and row["provider"].startswith("fastskel") for row in rows)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
