"""Attention backends of one dense spatio-temporal layer by number of heads: the table behind `attention_backend="auto"`.

Run as `python -m fastskel.bench.backends --out FILE.jsonl`. Forward and backward of one layer over (N, S, D), every backend
against `"sdpa"`, in turns; outputs must agree before they are timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fastskel.bench.devices import add_device
from fastskel.bench.harness import append_rows, compare, origin, relative_l2

from fastskel.nn.attention import AttentionBackend
from fastskel.nn.dst_layer import DSTLayer

__all__ = ["main", "measure"]

BASELINE: AttentionBackend = "sdpa"
BACKENDS: tuple[AttentionBackend, ...] = ("sdpa", "math", "fastskel")
HEADS = (1, 2, 4, 8, 16)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# bf16 rounds products of about a thousand terms, fp32 sums them in another order
LIMITS = {"bf16": 2e-2, "fp32": 1e-4}
# bytes of tokens that a GPU or two cores are busy with for long enough
SIZES = ((16, 64, 1024), (64, 64, 256))
QUICK_SIZES = ((2, 8, 32),)


def measure(
    size: tuple[int, int, int], heads: int, precision: str, device: torch.device, rounds: int
) -> Iterator[dict[str, Any]]:
    """Compare the backends for tokens (N, S, D); one row for each."""
    torch.manual_seed(0)
    layer = DSTLayer(size[1], size[2], heads, 0.5, 4).to(device)
    x = torch.randn(size).to(device).requires_grad_()

    def call(backend: AttentionBackend) -> Callable[[], torch.Tensor]:
        def step() -> torch.Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                out: torch.Tensor = layer(x, backend=backend)
            out.sum().backward()  # type: ignore[no-untyped-call]
            layer.zero_grad(set_to_none=True)
            x.grad = None
            return out.detach()

        return step

    calls = {backend: call(backend) for backend in BACKENDS}
    expected = calls[BASELINE]()
    for backend, step in calls.items():
        distance = relative_l2([step()], [expected])
        if not distance <= LIMITS[precision]:
            raise ValueError(f"backends: {backend} must agree with {BASELINE}, got a distance of {distance:.2e}. Mend it.")
    for timing in compare(calls, BASELINE, device=device, rounds=rounds):
        yield {"case": f"{precision} heads={heads} {size}", "precision": precision, "heads": heads, "size": size, **timing.row()}


def main(arguments: list[str] | None = None) -> int:
    """Measure all cases, print them, append their rows."""
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.backends", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to add rows to")
    parser.add_argument("--heads", type=int, nargs="+", default=HEADS)
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    add_device(parser, "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    shared = {"part": "backends", "quick": given.quick, **origin(device)}
    for size in QUICK_SIZES if given.quick else SIZES:
        for precision in given.precision:
            for heads in given.heads:
                rows = [{**row, **shared} for row in measure(size, heads, precision, device, given.rounds)]
                append_rows(given.out, rows)
                cells = [f"{row['provider']} {row['median_ms']:.1f} ms ({row['speedup']:.2f}x)" for row in rows]
                print(f"{rows[0]['case']:<32} {'   '.join(cells)}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
