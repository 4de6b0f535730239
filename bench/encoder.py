"""fastskel's encoder beside the plain reference: operations, memory, and time of inference, training and one clip.

    python -m fastskel.bench.encoder --out FILE.jsonl [--encoder dste|sttr] [--parts flops memory forward train latency]
        [--providers NAME ...] [--compile] [--reference FOLDER]

All providers hold the same weights. Before anything is timed its outputs, for training its gradients, are compared with the
reference in fp32; what disagrees is a row "failed" without a time, and what cannot run here is a row "unavailable" with the
reason. Rows are added to FILE part by part. GFLOP/s are the reference's operations divided by a provider's time: what a
provider leaves out counts as speed. Figures of --quick prove that something runs and are never quoted.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastskel.bench.contest import Contest, unavailable_row
from fastskel.bench.devices import add_device
from fastskel.bench.external import EXTERNAL, add_arguments, source_of
from fastskel.bench.graphs import capture
from fastskel.bench.harness import append_rows, compare, flops, held_bytes, origin, peak_bytes, saved_bytes
from fastskel.bench.providers import (
    BODIES,
    DTYPES,
    Encode,
    Kind,
    Provider,
    Setting,
    autocast,
    build,
    gate,
    open_checkout,
    tf32,
)
from torch import Tensor

__all__ = ["PARTS", "main", "run"]

PRECISIONS = ("bf16", "fp32")
META = torch.device("meta")
# relative L2 from the reference in fp32: sums in another order; eight bits of mantissa through two layers, or eleven
OUTPUT_LIMIT = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3}
# of all gradients, which pass every layer twice
GRADIENT_LIMIT = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 2e-2}
# a batch that shares the cost of preparing weights
FLOPS_BATCH = 256
# none, so that gradients can be compared, then the published rate
DROP_PATHS = (0.0, 0.1)
# what is dropped need not be kept: bytes are a mean over draws
MEMORY_DRAWS = 3
# calls that choose the fastest way to encode one clip
TRIAL_ROUNDS, TRIAL_S = 5, 10.0
# sizes at which everything takes milliseconds: whether it runs, not how fast
QUICK = dict(batch=2, width=16, frames=8, joints=5, memory_batches=(1, 2), rounds=3)

# why fastskel's captured encoder is left out where something is dropped
ADDRESSES = "a captured encoder draws at addresses, which tokens alone lack: compared as a whole step, in training"

Row = dict[str, Any]
Call = Callable[[], Any]
Check = Callable[[Any], Row]
# with why they cannot run, None where they can
Kinds = Sequence[tuple[Kind, str | None]]
# what a checkout is asked for, and of which inputs
Request = tuple[str, Sequence[Tensor]]


def _count(setting: Setting, provider: Provider, rows: int, device: torch.device, backward: bool) -> int:
    provider.module.eval()
    tokens = setting.tokens(rows, device)

    # gradients stay on: torch's fused attention of inference has no formula to count with
    def call() -> None:
        outputs = provider.encode(*tokens)
        if backward:
            torch.autograd.backward([y.sum() for y in outputs])

    total: int = flops(call)
    return total


def _work(setting: Setting, rows: int, backward: bool) -> float:
    """Count the reference's GFLOP for a batch."""
    plain = build(replace(setting, providers=()), 0.0, META)[0]
    return _count(setting, plain, rows, META, backward) / 1e9


def _timed(setting: Setting, work: float, contest: Contest, kinds: Kinds) -> Iterator[Row]:
    """Time a contest over `work` GFLOP, after a row for each provider that cannot run in it."""
    for kind, reason in kinds:
        if reason is not None:
            yield unavailable_row(kind, reason)
    for row in contest.rows(rounds=setting.rounds, warmup=1, limit_s=setting.limit_s):
        timed = row["status"] == "ok"
        yield {**row, "gflop": work, "gflop_per_s": 1e3 * work / row["median_ms"]} if timed else row


def _first(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Call once, with the seconds it took: for compiled code, most of them compile."""
    begin = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - begin


def _eager(setting: Setting, drop_path: float) -> list[Provider]:
    """Build what keeps bytes of its own: code that is compiled, captured or a library's keeps them where nobody counts."""
    chosen = [p for p in build(replace(setting, compiled=False), drop_path) if p.kind.attention != "xformers"]
    return [p for p in chosen if not (p.kind.precision or p.kind.mode or p.kind.captured)]


def flops_part(setting: Setting, precisions: Sequence[str]) -> Iterator[Row]:
    """Operations per view, forward and with backward, without DropPath."""
    for case, backward in (("forward", False), ("forward+backward", True)):
        for provider in build(setting, 0.0, META):
            counted = f"meta, N={FLOPS_BATCH}"
            try:
                per_view = _count(setting, provider, FLOPS_BATCH, META, backward) / FLOPS_BATCH
            except (NotImplementedError, RuntimeError):
                # not all of it runs without values: a line through two batches, whose constant is done once per call
                real = next(p for p in _eager(setting, 0.0) if p.name == provider.name)
                two, four = (_count(setting, real, rows, setting.device, backward) for rows in (2, 4))
                slope = (four - two) / 2
                per_view, counted = slope + (two - 2 * slope) / FLOPS_BATCH, f"{setting.device.type}, slope"
            yield {"case": case, "provider": provider.name, "gflop_per_view": per_view / 1e9, "counted": counted}


def _step_bytes(setting: Setting, provider: Provider, precision: str, rows: int) -> tuple[int, int, int]:
    """Return bytes saved, bytes held after forward with the outputs, and the peak of forward and backward."""
    tokens = setting.tokens(rows)
    cotangents = [torch.ones(*x.shape[:2], setting.width, device=setting.device) for x in tokens]

    def forward() -> tuple[Tensor, Tensor]:
        with autocast(precision, setting.device):
            outputs: tuple[Tensor, Tensor] = provider.encode(*tokens)
        return outputs

    def step() -> None:
        outputs = forward()
        torch.autograd.backward(outputs, [c.to(y.dtype) for c, y in zip(cotangents, outputs, strict=True)])

    # gradients exist before, or they would count as growth
    if all(parameter.grad is None for parameter in provider.module.parameters()):
        step()
    constants = [*provider.module.parameters(), *provider.module.buffers(), *tokens]
    return saved_bytes(forward, constants), held_bytes(forward, setting.device), peak_bytes(step, setting.device)


def memory_part(setting: Setting, precisions: Sequence[str]) -> Iterator[Row]:
    """Bytes per view of a training step in the first precision, from the difference of two batch sizes."""
    small, large = setting.memory_batches
    for drop_path in DROP_PATHS:
        for provider in _eager(setting, drop_path):
            provider.module.train()
            draws, sums = (MEMORY_DRAWS if drop_path else 1), [0.0, 0.0, 0.0]
            for draw in range(draws):
                torch.manual_seed(draw)
                less, more = (_step_bytes(setting, provider, precisions[0], rows) for rows in (small, large))
                sums = [total + (b - a) / (large - small) for total, a, b in zip(sums, less, more, strict=True)]
            saved, held, peak = (total / draws for total in sums)
            yield {
                "case": f"{precisions[0]} drop_path={drop_path}", "precision": precisions[0], "provider": provider.name,
                "saved_bytes_per_view": saved, "held_bytes_per_view": held, "peak_bytes_per_view": peak,
                "batches": setting.memory_batches, "draws": draws,
            }  # fmt: skip


def _distance(name: str, what: str, expected: Sequence[Tensor], limit: float, actual: Sequence[Tensor]) -> Row:
    return {"distance": gate(name, what, actual, expected, limit)}


def _ready(kind: Kind, call: Call, checked: Call | None, check: Check | None, device: torch.device) -> tuple[Call, Row]:
    """Return a call, captured where the provider is; `checked` computes what is compared, `call` itself if it is None."""
    if kind.captured:
        call, checked = capture(call, device), None if checked is None else capture(checked, device)
    result, seconds = _first(checked or call, device)
    return call, {"about": kind.about, "first_call_s": seconds, **(check(result) if check else {})}


def _ready_checkout(
    stack: contextlib.ExitStack, setting: Setting, plain: Provider, call: Request, checked: Request, check: Check | None,
    options: Row,
) -> tuple[Call, Row]:  # fmt: skip
    """The same of the code in the user's folder, whose requests are a name and its inputs."""
    checkout = stack.enter_context(open_checkout(setting, plain))
    about: Row = {"about": f"the published code in a folder, {checkout.name}", "pipe_ms": checkout.pipe_ms}
    if check is not None:
        checkout.prepare(*checked, **options)
        about |= check([each.to(setting.device) for each in checkout.results() if each is not None])
    checkout.prepare(*call, **options)
    return checkout.run, about


def _encode(provider: Provider, tokens: tuple[Tensor, Tensor], precision: str, device: torch.device) -> Any:
    with torch.no_grad(), autocast(precision, device):
        return provider.encode(*tokens)


def forward_part(setting: Setting, precisions: Sequence[str]) -> Iterator[Row]:
    """Time of inference over a batch; half precision is autocast for all."""
    device, tokens = setting.device, setting.tokens(setting.batch)
    work = _work(setting, setting.batch, False)
    for precision in precisions:
        providers, contest = build(setting, 0.0, precision=precision), Contest(device)
        with torch.no_grad():
            exact = providers[0].module.eval()(*tokens)
        with contextlib.ExitStack() as stack:
            for provider in providers:
                provider.module.eval()
                own = provider.kind.precision or precision
                check = partial(_distance, provider.name, f"{own} output", exact, OUTPUT_LIMIT[own])
                call = partial(_encode, provider, tokens, own, device)
                contest.enter(provider.name, partial(_ready, provider.kind, call, None, check, device))
            if setting.source is not None:
                check = partial(_distance, EXTERNAL, f"{precision} output", exact, OUTPUT_LIMIT[precision])
                asked, options = ("encode", tokens), {"precision": precision}
                ready = partial(_ready_checkout, stack, setting, providers[0], asked, asked, check, options)
                contest.enter(EXTERNAL, ready)
            for row in _timed(setting, work, contest, setting.kinds(precision)):
                yield {"case": f"{precision} N={setting.batch}", "precision": precision, "batch": setting.batch, **row}


def _gradients(
    setting: Setting, provider: Provider, precision: str, tokens: tuple[Tensor, Tensor], cotangents: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of all parameters for a loss that is smooth in the outputs: a maximum would jump with the rounding."""
    with autocast(precision, setting.device):
        outputs = provider.encode(*tokens)
    torch.autograd.backward(outputs, [c.to(y.dtype) for c, y in zip(cotangents, outputs, strict=True)])
    gradients = [p.grad for p in provider.module.parameters()]
    provider.module.zero_grad(set_to_none=True)
    return gradients


def _step(setting: Setting, provider: Provider, precision: str, tokens: Any, weights: Sequence[Tensor]) -> None:
    provider.module.zero_grad(set_to_none=True)
    with autocast(precision, setting.device):
        outputs = provider.encode(*tokens)
    torch.autograd.backward([(y.amax(1) * w).sum() for y, w in zip(outputs, weights, strict=True)])


def train_part(setting: Setting, precisions: Sequence[str]) -> Iterator[Row]:
    """Time of forward and backward in the first precision; gradients are compared where nothing is dropped."""
    precision, device, tokens = precisions[0], setting.device, setting.tokens(setting.batch)
    work = _work(setting, setting.batch, True)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(setting.batch, setting.width, generator=generator).to(device) for _ in tokens]
    cotangents = [torch.randn(*x.shape[:2], setting.width, generator=generator).to(device) for x in tokens]
    for drop_path in DROP_PATHS:
        case = {"case": f"{precision} N={setting.batch} drop_path={drop_path}", "drop_path": drop_path}
        case |= {"precision": precision, "batch": setting.batch}
        providers, contest = build(setting, drop_path, precision=precision), Contest(device)
        for provider in providers:
            provider.module.train()
        exact = [] if drop_path else _gradients(setting, providers[0], "fp32", tokens, cotangents)
        with contextlib.ExitStack() as stack:
            for provider in providers:
                own, kind = provider.kind.precision or precision, provider.kind
                if drop_path and kind.captured and kind.attention is None:
                    yield {**case, **unavailable_row(kind, ADDRESSES)}
                    continue
                call = partial(_step, setting, provider, own, tokens, weights)
                checked = partial(_gradients, setting, provider, own, tokens, cotangents)
                check = partial(_distance, provider.name, f"{own} gradient", exact, GRADIENT_LIMIT[own])
                ready = partial(_ready, kind, call, checked, None if drop_path else check, device)
                contest.enter(provider.name, ready)
            if setting.source is not None:
                check = partial(_distance, EXTERNAL, f"{precision} gradient", exact, GRADIENT_LIMIT[precision])
                asked, controlled = ("train", (*tokens, *weights)), ("gradients", (*tokens, *cotangents))
                options = {"precision": precision, "drop_path": drop_path}
                control = None if drop_path else check
                ready = partial(_ready_checkout, stack, setting, providers[0], asked, controlled, control, options)
                contest.enter(EXTERNAL, ready)
            for row in _timed(setting, work, contest, setting.kinds(precision)):
                yield {**case, **row}


def _ways(setting: Setting, provider: Provider, precision: str) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Ways to encode one clip: as fastskel prepares it, else as it stands, and in half precision also with converted weights."""
    module, tokens, dtype = provider.module.eval(), setting.tokens(1), DTYPES[precision]

    def call(encode: Encode, inputs: tuple[Tensor, Tensor], kind: str = "fp32") -> tuple[Tensor, Tensor]:
        with torch.no_grad(), autocast(kind, setting.device):
            outputs: tuple[Tensor, Tensor] = encode(*inputs)
        return outputs

    if hasattr(module, "optimize_for_inference"):
        prepared = module.optimize_for_inference(dtype=dtype)
        return {"prepared": lambda: call(prepared.streams, tokens)}
    if precision == "fp32":
        return {"plain": lambda: call(provider.encode, tokens)}
    # a build of its own, for the types of `module` stay; it forgets compiled code, so it compiles only if it must
    alone = replace(setting, compiled=False, providers=(provider.name,))
    other = next(p for p in build(alone, 0.0) if p.name == provider.name)
    other.module.eval().to(dtype)
    narrow = tokens[0].to(dtype), tokens[1].to(dtype)
    return {
        "autocast": lambda: call(provider.encode, tokens, precision),
        "converted": lambda: call(other.encode, narrow),
    }


def _fastest(setting: Setting, provider: Provider, precision: str, exact: Sequence[Tensor]) -> tuple[Call, Row]:
    best, found = float("inf"), None
    for way, call in _ways(setting, provider, precision).items():
        check = partial(_distance, provider.name, f"{precision} output ({way})", exact, OUTPUT_LIMIT[precision])
        ready, about = _ready(provider.kind, call, None, check, setting.device)
        (trial,) = compare({way: ready}, way, device=setting.device, rounds=TRIAL_ROUNDS, limit_s=TRIAL_S)
        if trial.median_ms < best:
            best, found = trial.median_ms, (ready, {"way": way, **about})
    assert found is not None
    return found


def latency_part(setting: Setting, precisions: Sequence[str]) -> Iterator[Row]:
    """Time of one clip, each provider in its fastest way of the precision."""
    work, device = _work(setting, 1, False), setting.device
    setting = replace(setting, modes=())
    for precision in precisions:
        # what differs in its precision only is one of the ways
        kinds = [(kind, reason) for kind, reason in setting.kinds(precision) if kind.precision is None]
        providers = [p for p in build(setting, 0.0, precision=precision) if p.kind.precision is None]
        with torch.no_grad():
            exact = providers[0].module.eval()(*setting.tokens(1))
        contest = Contest(device)
        for provider in providers:
            contest.enter(provider.name, partial(_fastest, setting, provider, precision, exact))
        for row in _timed(setting, work, contest, kinds):
            yield {"case": f"{precision} N=1", "precision": precision, "batch": 1, **row}


PARTS = {
    "flops": flops_part, "memory": memory_part, "forward": forward_part, "train": train_part, "latency": latency_part,
}  # fmt: skip


def line(row: Row) -> str:
    """Say a row in one line."""
    start = f"{row['part']:<8} {row['case']:<24} {row['provider']:<27}"
    if row["part"] == "flops":
        return f"{start} {row['gflop_per_view']:9.5f} GFLOP/view ({row['counted']})"
    if row["part"] == "memory":
        kinds = ("saved", "held", "peak")
        return f"{start} " + "  ".join(f"{kind} {row[f'{kind}_bytes_per_view'] / 1e6:7.2f} MB/view" for kind in kinds)
    if row["status"] != "ok":
        return f"{start} {row['status'].upper()} {row.get('reason') or row['error']}"
    spread = f"{row['median_ms']:9.2f} ms [{row['q20_ms']:.2f}, {row['q80_ms']:.2f}]"
    speed = f"{row['speedup']:5.2f}x [{row['speedup_q20']:.2f}, {row['speedup_q80']:.2f}] noise {row['noise']:.2f}"
    return f"{start} {spread}  {speed}  {row['gflop_per_s']:7.1f} GFLOP/s  {row.get('way', '')}".rstrip()


@tf32(False)
def run(
    setting: Setting, parts: Sequence[str], precisions: Sequence[str], out: Path, *, quick: bool = False
) -> list[Row]:
    """Run parts one after another, print their rows, and add those of a complete part to a file of JSON lines."""
    shared = {
        "encoder": setting.encoder, "width": setting.width, "frames": setting.frames,
        "spatial_tokens": BODIES * setting.joints, "quick": quick, **origin(setting.device),
    }  # fmt: skip
    rows: list[Row] = []
    for part in parts:
        found = []
        for figures in PARTS[part](setting, precisions):
            found.append({"part": part, **figures, **shared})
            print(line(found[-1]), flush=True)
        append_rows(out, found)
        rows += found
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        prog="python -m fastskel.bench.encoder", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to add rows to")
    parser.add_argument("--encoder", choices=("dste", "sttr"), default="dste")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="what to compare; all by default but what compiles")
    parser.add_argument(
        "--precision", nargs="+", choices=list(DTYPES), default=list(PRECISIONS), help="memory and train take the first"
    )
    parser.add_argument("--batch", type=int, help="clips of forward and train, 32 by default")
    parser.add_argument("--width", type=int, help="width D, 1024 by default")
    parser.add_argument("--rounds", type=int, help="rounds of a comparison, 15 by default")
    parser.add_argument("--limit", type=float, default=Setting.limit_s, help="seconds of a comparison")
    add_device(parser, "cpu")
    parser.add_argument("--threads", type=int, help="compute threads")
    parser.add_argument("--compile", action="store_true", help="compare with the compiled reference too: minutes")
    parser.add_argument("--modes", nargs="+", default=[], help="memory modes of fastskel beside its default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    add_arguments(parser)
    given = parser.parse_args(arguments)
    if len(given.parts) > 1 and not given.quick:
        # a process for each part: what one leaves in the allocator would meet the next one's gigabytes
        shared = list(sys.argv[1:] if arguments is None else arguments)
        command = [sys.executable, "-m", "fastskel.bench.encoder", *shared, "--parts"]
        return max(subprocess.run([*command, part], check=False).returncode for part in given.parts)
    if given.threads:
        torch.set_num_threads(given.threads)
    sizes: dict[str, Any] = dict(QUICK) if given.quick else {}
    sizes |= {name: value for name in ("batch", "width", "rounds") if (value := getattr(given, name)) is not None}
    setting = Setting(
        encoder=given.encoder, limit_s=given.limit, device=torch.device(given.device), compiled=given.compile,
        modes=tuple(given.modes), providers=None if given.providers is None else tuple(given.providers),
        source=source_of(given), **sizes,
    )  # fmt: skip
    rows = run(setting, given.parts, given.precision, given.out, quick=given.quick)
    return int(any(row.get("status") == "failed" for row in rows if row["provider"].startswith("fastskel")))


if __name__ == "__main__":
    raise SystemExit(main())
