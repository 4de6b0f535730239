"""Predict a training step's time on an H200 from what it launches and moves, for the reference and for fastskel.

    python -m fastskel.bench.predict [--batch 356] [--out FILE.json]

Every launch takes at least its bytes over the rate of a copy, or its operations over the rate of a large matrix product,
whichever is longer; both rates were measured on such a card. Sums of that are floors: real kernels reach 60 to 95 % of them, and
the gaps between launches are not in them. The steps run on tensors without values, so nothing is computed and no GPU is needed;
the fused kernels are stood in for by functions that allocate what they would, and add what their cost formulas say.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fastskel.bench.counting import COPY_BYTES_PER_S, MATMUL_FLOPS_PER_S, Counter, Entry
from fastskel.bench.reference import loss as reference_loss
from fastskel.bench.reference import usdrl as reference
from fastskel.bench.stand_ins import kernels_stood_in
from fastskel.kernels.decorrelation import decorrelate_torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastskel.atomic import atomic_write
from fastskel.data.batch import Batch, View
from fastskel.data.views import usdrl_views
from fastskel.models import DSTE
from fastskel.nn.drop_path import CA_ATTENTION, NUM_DROP_PATHS, LayerDrops
from fastskel.nn.dst_layer import DSTLayer
from fastskel.objectives import MGFD
from fastskel.provenance import provenance
from fastskel.skeleton import Topology

__all__ = ["main", "predict", "systems"]

WIDTH, FRAMES, JOINTS, BODIES, CHANNELS, VIEWS = 1024, 64, 25, 2, 3, 4
DROP_PATH = 0.1
PHASES = ("forward", "loss", "backward", "optimizer")


@contextlib.contextmanager
def _without_values() -> Iterator[None]:
    """Make everything inside on tensors that have shapes and no values."""
    # the normal distribution cut off at two deviations asks for values
    with FakeTensorMode(), mock.patch("torch.nn.init.trunc_normal_", lambda tensor, **_: tensor):
        yield


def _reference_step(counter: Counter, batch: int, attention: Any) -> None:
    model = reference.USDRL(
        BODIES * JOINTS * CHANNELS, FRAMES * CHANNELS, WIDTH, 1, drop_path=DROP_PATH, attention=attention
    )
    views = [torch.empty(batch, CHANNELS, FRAMES, JOINTS, BODIES) for _ in range(VIEWS)]

    def loss(embeddings: Any) -> Tensor:
        return reference_loss.total(*([z.float() for z in part] for part in embeddings), "aaai")

    _count_step(counter, model, lambda: model(*views), loss, fused=False)


def expected_drops(num_rows: int, rate: float) -> LayerDrops:
    """Plan a layer over (N, S, D) as DropPath leaves it on average: lists of the expected length, without values."""
    kept = round((1.0 - rate) * num_rows)
    counts = [kept] * NUM_DROP_PATHS
    counts[CA_ATTENTION] = round((1.0 - rate) * kept)
    rows = tuple(torch.empty(count, dtype=torch.int64) for count in counts)
    slots = tuple(torch.empty(num_rows, dtype=torch.int32) for _ in counts)
    factor = 1.0 / (1.0 - rate)
    inner = torch.empty(counts[CA_ATTENTION], dtype=torch.int64)
    bias = torch.empty(num_rows, 1, 1, dtype=torch.float64)
    scales = torch.empty(NUM_DROP_PATHS + 1, num_rows)
    return LayerDrops(rows, inner, (factor,) * NUM_DROP_PATHS, bias, slots, scales)


def _own_step(counter: Counter, batch: int, kernels: str) -> None:
    encoder = DSTE(drop_path=DROP_PATH)
    objective = MGFD(encoder, usdrl_views(frames=FRAMES, num_views=VIEWS))
    views = [
        View(torch.empty(batch, FRAMES, BODIES, JOINTS, CHANNELS), torch.empty(batch, FRAMES, BODIES, dtype=torch.bool),
             Topology.unknown(JOINTS)) for _ in range(VIEWS)
    ]  # fmt: skip
    whole = Batch(views, torch.empty(batch), torch.empty(batch))
    drops = [expected_drops(VIEWS * batch, DROP_PATH)] * encoder.num_layers
    model = torch.nn.ModuleList([encoder, objective])
    with contextlib.ExitStack() as stack:
        # not through its operator, which hides what it launches
        stack.enter_context(mock.patch("fastskel.objectives.functional.decorrelate", decorrelate_torch))
        # a GPU takes whole matrices; blocks are for the caches of the CPU that counts here
        for size in ("kernels._decorrelation_pass.BLOCK_ELEMENTS", "kernels._decorrelation_pass.LEAF_ROWS"):
            stack.enter_context(mock.patch(f"fastskel.{size}", 1 << 62))
        stack.enter_context(mock.patch("fastskel.objectives.functional.BLOCK_ELEMENTS", 1 << 62))
        stack.enter_context(mock.patch.object(DSTE, "_drops", return_value=(drops, drops)))
        if kernels == "triton":
            stack.enter_context(kernels_stood_in(counter))
        _count_step(
            counter, model, lambda: objective.embed(encoder, whole), lambda z: objective.loss(z, whole, 0.0).total, fused=True
        )


def _count_step(
    counter: Counter, model: torch.nn.Module, forward: Callable[[], Any], loss: Callable[[Any], Tensor], *, fused: bool
) -> None:
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), foreach=True)
    with counter:
        counter.phase = PHASES[0]
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = forward()
        counter.phase = PHASES[1]
        with torch.autocast("cpu", enabled=False):
            total = loss(embeddings)
        counter.phase = PHASES[2]
        total.backward()  # type: ignore[no-untyped-call]
        counter.phase = PHASES[3]
        if fused:
            # one pass: parameter, gradient and two moments are read, all but the gradient written
            parameters = sum(p.numel() for p in model.parameters())
            counter.add("adam, fused", 0, 7 * 4 * parameters)
        else:
            # the first step makes the state
            counter.muted = True
            optimizer.step()
            counter.muted = False
            optimizer.step()


def _count_layer(counter: Counter, batch: int, tokens: int, name: str) -> None:
    """Count one layer over (W * N, S, D), forward and backward, as autocast to bfloat16 runs it, with DropPath."""
    if name.startswith("reference"):
        attention: Any = "sdpa" if name.endswith("sdpa") else "eager"
        plain = reference.DSTE(BODIES * JOINTS * CHANNELS, FRAMES * CHANNELS, WIDTH, 1, drop_path=DROP_PATH, attention=attention)
        layer: torch.nn.Module = plain.t_tr if tokens == FRAMES else plain.s_tr
        chunks, call = VIEWS, lambda x: layer(x)
    else:
        layer = DSTLayer(tokens, WIDTH, 1, 0.5, 4)
        drops = expected_drops(VIEWS * batch, DROP_PATH)
        chunks, call = 1, lambda x: layer(x, drops)
    layer.train()
    with contextlib.ExitStack() as stack:
        if name.endswith("triton"):
            stack.enter_context(kernels_stood_in(counter))
        inputs = [torch.empty(VIEWS * batch // chunks, tokens, WIDTH, requires_grad=True) for _ in range(chunks)]
        with counter:
            counter.phase = "forward"
            with torch.autocast("cpu", torch.bfloat16):
                outputs = [call(x) for x in inputs]
            counter.phase = "backward"
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])


def predict_layer(name: str, batch: int, tokens: int) -> list[Entry]:
    """Count one layer of a system over S tokens of four views of N samples."""
    counter = Counter()
    with _without_values():
        _count_layer(counter, batch, tokens, name)
    return counter.entries()


def systems() -> dict[str, Callable[[Counter, int], None]]:
    """Name the steps that are predicted, by what counts one of N samples."""
    return {
        "reference": lambda counter, batch: _reference_step(counter, batch, "eager"),
        "reference-sdpa": lambda counter, batch: _reference_step(counter, batch, "sdpa"),
        "fastskel-torch": lambda counter, batch: _own_step(counter, batch, "torch"),
        "fastskel-triton": lambda counter, batch: _own_step(counter, batch, "triton"),
    }


def predict(name: str, batch: int) -> list[Entry]:
    """Count one step of a system for N samples of four views; every kind of launch, longest first in its phase."""
    counter = Counter()
    with _without_values():
        systems()[name](counter, batch)
    return counter.entries()


def summary(entries: Sequence[Entry]) -> dict[str, dict[str, float]]:
    """Add up products and the rest, by phase and together: launches, TFLOP, GB and milliseconds."""
    found: dict[str, dict[str, float]] = {}
    for phase in (*PHASES, "step"):
        inside = [e for e in entries if phase in (e.phase, "step")]
        for kind in ("products", "others"):
            part = [e for e in inside if e.is_product == (kind == "products")]
            found[f"{phase} {kind}"] = {
                "launches": sum(e.launches for e in part), "tflop": sum(e.flops for e in part) / 1e12,
                "gb": sum(e.bytes for e in part) / 1e9, "ms": sum(e.milliseconds for e in part),
            }  # fmt: skip
    return found


def table(entries: Sequence[Entry], least_ms: float) -> str:
    """Lay entries out as a Markdown table; what takes less than `least_ms` is one row per phase."""
    lines = ["| phase | what | launches | TFLOP | GB | ms |", "|---|---|---|---|---|---|"]
    for phase in PHASES:
        inside = [e for e in entries if e.phase == phase]
        small = [e for e in inside if e.milliseconds < least_ms]
        for e in inside:
            if e.milliseconds >= least_ms:
                shape = " x ".join(map(str, e.shape))
                name = f"{e.name} {shape}".strip()
                lines.append(_row(phase, name, [e]))
        if small:
            lines.append(_row(phase, f"{len(small)} smaller kinds", small))
    lines.append(_row("step", "everything", entries))
    return "\n".join(lines)


def _row(phase: str, name: str, part: Sequence[Entry]) -> str:
    sums = [sum(getattr(e, key) for e in part) for key in ("launches", "flops", "bytes", "milliseconds")]
    return f"| {phase} | {name} | {sums[0]} | {sums[1] / 1e12:.2f} | {sums[2] / 1e9:.1f} | {sums[3]:.2f} |"


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.predict", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=356, help="samples of a step, of four views each")
    parser.add_argument("--systems", nargs="+", choices=list(systems()), default=list(systems()))
    parser.add_argument("--least-ms", type=float, default=0.3, help="what takes less shares a row of the table")
    parser.add_argument("--out", type=Path, help="JSON file for every entry")
    given = parser.parse_args(arguments)
    found = {name: predict(name, given.batch) for name in given.systems}
    for name, entries in found.items():
        print(f"\n### {name}\n\n{table(entries, given.least_ms)}")
    print(f"\n### One layer, {FRAMES} tokens\n\n| system | pass | products | launches | TFLOP | GB | ms |")
    print("|---|---|---|---|---|---|---|")
    for name in given.systems:
        layer = predict_layer(name, given.batch, FRAMES)
        for phase in ("forward", "backward"):
            part = [e for e in layer if e.phase == phase]
            products = sum(e.launches for e in part if e.is_product)
            print(_row(f"{name} | {phase}", str(products), part))
    print("\n### Sums\n\n| system | phase | launches | TFLOP | GB | ms |\n|---|---|---|---|---|---|")
    for name, entries in found.items():
        for key, sums in summary(entries).items():
            print(f"| {name} | {key} | {sums['launches']:.0f} | {sums['tflop']:.2f} | {sums['gb']:.1f} | {sums['ms']:.2f} |")
    if given.out:
        made = provenance()
        content = {
            "batch": given.batch, "copy_bytes_per_s": COPY_BYTES_PER_S, "matmul_flops_per_s": MATMUL_FLOPS_PER_S,
            "versions": made["versions"], "commit": made["commit"],
            "systems": {name: [asdict(e) | {"ms": e.milliseconds} for e in entries] for name, entries in found.items()},
        }  # fmt: skip
        with atomic_write(given.out) as scratch:
            scratch.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
