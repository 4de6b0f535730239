"""fastskel's encoder beside the plain reference: operations, memory, and time of inference, training and one clip.

    python -m fastskel.bench.encoder --out FILE.jsonl [--encoder dste|sttr] [--parts flops memory forward train latency]

All providers hold the same weights. Before anything is timed its outputs, for training its gradients, are compared with
the reference in fp32, and a disagreement ends the run. Rows are added to FILE part by part. GFLOP/s are the reference's
operations divided by a provider's time: what a provider leaves out counts as speed. Figures of --quick prove that
something runs and are never quoted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fastskel.bench.harness import append_rows, compare, flops, held_bytes, origin, peak_bytes, saved_bytes
from fastskel.bench.providers import BASELINE, BODIES, Encode, Provider, Setting, autocast, build, gate
from torch import Tensor

__all__ = ["PARTS", "main", "run"]

PRECISIONS = ("bf16", "fp32")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
META = torch.device("meta")
# relative L2 from the reference in fp32: sums in another order; eight bits of mantissa through two layers
OUTPUT_LIMIT = {"fp32": 1e-5, "bf16": 2e-2}
# of all gradients, which pass every layer twice
GRADIENT_LIMIT = {"fp32": 1e-4, "bf16": 5e-2}
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

Row = dict[str, Any]


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
    plain = build(replace(setting, modes=()), 0.0, META)[0]
    return _count(setting, plain, rows, META, backward) / 1e9


def _timed(
    setting: Setting, work: float, calls: Mapping[str, Callable[[], object]], about: dict[str, Row]
) -> Iterator[Row]:
    """Compare the calls, of `work` GFLOP each; `about` is what else to say of each provider."""
    limits: dict[str, Any] = dict(rounds=setting.rounds, warmup=1, limit_s=setting.limit_s)
    for timing in compare(calls, BASELINE, device=setting.device, **limits):
        speed = {"gflop": work, "gflop_per_s": 1e3 * work / timing.median_ms}
        yield {**timing.row(), **speed, **about[timing.provider]}


def _first(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Call once, with the seconds it took: for compiled code, most of them compile."""
    begin = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - begin


def flops_part(setting: Setting, precisions: Sequence[str]) -> Iterator[Row]:
    """Operations per view, forward and with backward, without DropPath."""
    for case, backward in (("forward", False), ("forward+backward", True)):
        for number, provider in enumerate(build(setting, 0.0, META)):
            counted = f"meta, N={FLOPS_BATCH}"
            try:
                per_view = _count(setting, provider, FLOPS_BATCH, META, backward) / FLOPS_BATCH
            except (NotImplementedError, RuntimeError):
                # not all of it runs without values: a line through two batches, whose constant is done once per call
                real = build(replace(setting, compiled=False), 0.0)[number]
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
        for provider in build(replace(setting, compiled=False), drop_path):
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


def forward_part(setting: Setting, precisions: Sequence[str]) -> Iterator[Row]:
    """Time of inference over a batch; bf16 is autocast for all."""
    device, tokens = setting.device, setting.tokens(setting.batch)
    work = _work(setting, setting.batch, False)
    for precision in precisions:
        providers = build(setting, 0.0)
        with torch.no_grad():
            exact = providers[0].module.eval()(*tokens)
        calls: dict[str, Callable[[], object]] = {}
        about: dict[str, Row] = {}
        for provider in providers:
            provider.module.eval()

            def call(encode: Encode = provider.encode, precision: str = precision) -> tuple[Tensor, Tensor]:
                with torch.no_grad(), autocast(precision, device):
                    outputs: tuple[Tensor, Tensor] = encode(*tokens)
                return outputs

            outputs, seconds = _first(call, device)
            distance = gate(provider.name, f"{precision} output", outputs, exact, OUTPUT_LIMIT[precision])
            calls[provider.name] = call
            about[provider.name] = {"distance": distance, "first_call_s": seconds}
        for row in _timed(setting, work, calls, about):
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


def train_part(setting: Setting, precisions: Sequence[str]) -> Iterator[Row]:
    """Time of forward and backward in the first precision; gradients are compared where nothing is dropped."""
    precision, device, tokens = precisions[0], setting.device, setting.tokens(setting.batch)
    work = _work(setting, setting.batch, True)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(setting.batch, setting.width, generator=generator).to(device) for _ in tokens]
    cotangents = [torch.randn(*x.shape[:2], setting.width, generator=generator).to(device) for x in tokens]
    for drop_path in DROP_PATHS:
        providers = build(setting, drop_path)
        for provider in providers:
            provider.module.train()
        exact = None if drop_path else _gradients(setting, providers[0], "fp32", tokens, cotangents)
        calls: dict[str, Callable[[], object]] = {}
        about: dict[str, Row] = {}
        for provider in providers:

            def compared(provider: Provider = provider) -> list[Tensor]:
                return _gradients(setting, provider, precision, tokens, cotangents)

            gradients, seconds = _first(compared, device)
            about[provider.name] = {"first_call_s": seconds}
            if exact is not None:
                limit = GRADIENT_LIMIT[precision]
                distance = gate(provider.name, f"{precision} gradient", gradients, exact, limit)
                about[provider.name]["distance"] = distance

            def step(provider: Provider = provider) -> None:
                provider.module.zero_grad(set_to_none=True)
                with autocast(precision, device):
                    outputs = provider.encode(*tokens)
                torch.autograd.backward([(y.amax(1) * w).sum() for y, w in zip(outputs, weights, strict=True)])

            calls[provider.name] = step
        for row in _timed(setting, work, calls, about):
            case = {"case": f"{precision} N={setting.batch} drop_path={drop_path}", "drop_path": drop_path}
            yield {**case, "precision": precision, "batch": setting.batch, **row}


def _ways(setting: Setting, provider: Provider, precision: str) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Ways to encode one clip: as fastskel prepares it, else as it stands, and in bf16 also with converted weights."""
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
    alone = replace(setting, compiled=provider.name == "reference-compiled")
    other = next(p for p in build(alone, 0.0) if p.name == provider.name)
    other.module.eval().to(dtype)
    narrow = tokens[0].to(dtype), tokens[1].to(dtype)
    return {
        "autocast": lambda: call(provider.encode, tokens, precision),
        "converted": lambda: call(other.encode, narrow),
    }


def latency_part(setting: Setting, precisions: Sequence[str]) -> Iterator[Row]:
    """Time of one clip, each provider in its fastest way of the precision."""
    work, device = _work(setting, 1, False), setting.device
    setting = replace(setting, modes=())
    for precision in precisions:
        providers = build(setting, 0.0)
        with torch.no_grad():
            exact = providers[0].module.eval()(*setting.tokens(1))
        calls: dict[str, Callable[[], object]] = {}
        about: dict[str, Row] = {}
        for provider in providers:
            best = float("inf")
            for way, call in _ways(setting, provider, precision).items():
                outputs, seconds = _first(call, device)
                distance = gate(provider.name, f"{precision} output ({way})", outputs, exact, OUTPUT_LIMIT[precision])
                (trial,) = compare({way: call}, way, device=device, rounds=TRIAL_ROUNDS, limit_s=TRIAL_S)
                if trial.median_ms < best:
                    best, calls[provider.name] = trial.median_ms, call
                    about[provider.name] = {"way": way, "distance": distance, "first_call_s": seconds}
        for row in _timed(setting, work, calls, about):
            yield {"case": f"{precision} N=1", "precision": precision, "batch": 1, **row}


PARTS = {
    "flops": flops_part, "memory": memory_part, "forward": forward_part, "train": train_part, "latency": latency_part,
}  # fmt: skip


def line(row: Row) -> str:
    """Say a row in one line."""
    start = f"{row['part']:<8} {row['case']:<24} {row['provider']:<19}"
    if row["part"] == "flops":
        return f"{start} {row['gflop_per_view']:9.5f} GFLOP/view ({row['counted']})"
    if row["part"] == "memory":
        kinds = ("saved", "held", "peak")
        return f"{start} " + "  ".join(f"{kind} {row[f'{kind}_bytes_per_view'] / 1e6:7.2f} MB/view" for kind in kinds)
    spread = f"{row['median_ms']:9.2f} ms [{row['q20_ms']:.2f}, {row['q80_ms']:.2f}]"
    speed = f"{row['speedup']:5.2f}x [{row['speedup_q20']:.2f}, {row['speedup_q80']:.2f}] noise {row['noise']:.2f}"
    return f"{start} {spread}  {speed}  {row['gflop_per_s']:7.1f} GFLOP/s  {row.get('way', '')}".rstrip()


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
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="memory and train take the first"
    )
    parser.add_argument("--batch", type=int, help="clips of forward and train, 32 by default")
    parser.add_argument("--rounds", type=int, help="rounds of a comparison, 15 by default")
    parser.add_argument("--limit", type=float, default=Setting.limit_s, help="seconds of a comparison")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="compute threads")
    parser.add_argument("--compile", action="store_true", help="compare with the compiled reference too")
    parser.add_argument("--modes", nargs="+", default=[], help="memory modes of fastskel beside its default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    given = parser.parse_args(arguments)
    if len(given.parts) > 1 and not given.quick:
        # a process for each part: what one leaves in the allocator would meet the next one's gigabytes
        shared = list(sys.argv[1:] if arguments is None else arguments)
        command = [sys.executable, "-m", "fastskel.bench.encoder", *shared, "--parts"]
        return max(subprocess.run([*command, part], check=False).returncode for part in given.parts)
    if given.threads:
        torch.set_num_threads(given.threads)
    sizes: dict[str, Any] = dict(QUICK) if given.quick else {}
    sizes |= {name: value for name in ("batch", "rounds") if (value := getattr(given, name)) is not None}
    setting = Setting(
        encoder=given.encoder, limit_s=given.limit, device=torch.device(given.device), compiled=given.compile,
        modes=tuple(given.modes), **sizes,
    )  # fmt: skip
    run(setting, given.parts, given.precision, given.out, quick=given.quick)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
