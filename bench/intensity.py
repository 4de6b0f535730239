"""What encoders compute and move, operation by operation, beside the rows of their times: where they stand under the roofline.

Run as `python -m fastskel.bench.intensity ROWS --out FILE.jsonl`, in a process of its own: it counts on tensors without values,
and what the encoders keep for later calls would be without values too. Bytes are what every operation reads and writes, as if
nothing stayed in a cache between two of them: a machine with large caches can be faster than its memory allows for them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fastskel.bench.children import read_rows
from fastskel.bench.counting import Counter
from fastskel.bench.harness import append_rows
from fastskel.bench.providers import Provider, Setting, autocast, build
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["BACKWARD", "main", "measure"]

Row = Mapping[str, Any]
# parts of the encoder's benchmark -> whether they have a backward pass
BACKWARD = {"forward": False, "train": True}
# what of a row decides what is computed
SIZES = ("encoder", "batch", "width", "frames", "spatial_tokens", "precision")


def _count(setting: Setting, provider: Provider, precision: str, backward: bool) -> tuple[int, int]:
    """Count one call without DropPath: operations of matrix products, and bytes."""
    provider.module.train(backward)
    tokens, counter = setting.tokens(setting.batch), Counter()
    with counter:
        with torch.set_grad_enabled(backward), autocast(precision, setting.device):
            outputs = provider.encode(*tokens)
        if backward:
            torch.autograd.backward([y.sum() for y in outputs])
    entries = counter.entries()
    return sum(entry.flops for entry in entries), sum(entry.bytes for entry in entries)


def measure(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Count for every timed row of an encoder: `flops` and `bytes` of a call, and its time; autocast is a CPU's."""
    known: dict[tuple[Any, ...], tuple[int, int] | None] = {}
    timed = [row for row in rows if row.get("part") in BACKWARD and row.get("median_ms") and not row.get("drop_path")]
    # one mode for all, for tensors of two do not mix: the encoders keep some, and torch's copy their layers with their mode;
    # the normal distribution cut off at two deviations asks for values
    with (
        FakeTensorMode(),
        mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, create=True),
        mock.patch("torch.nn.init.trunc_normal_", lambda tensor, **_: tensor),
    ):
        for row in timed:
            sizes = (row["part"], *(row[key] for key in SIZES))
            if (*sizes, row["provider"]) not in known:
                known |= {(*sizes, name): found for name, found in _providers(row)}
            counted = known.setdefault((*sizes, row["provider"]), None)
            if counted is not None:
                names = {key: row[key] for key in ("part", "case", "provider", *SIZES, "median_ms")}
                yield {**names, "flops": counted[0], "bytes": counted[1]}


def _providers(row: Row) -> Iterator[tuple[str, tuple[int, int]]]:
    setting = Setting(
        encoder=row["encoder"], batch=row["batch"], width=row["width"], frames=row["frames"], joints=row["spatial_tokens"] // 2
    )
    for provider in build(setting, 0.0):
        yield provider.name, _count(setting, provider, row["precision"], BACKWARD[row["part"]])


def main(arguments: list[str] | None = None) -> int:
    """Count for a file of rows and write what was found; nothing where there are no rows of encoders."""
    parser = argparse.ArgumentParser(
        prog="python -m fastskel.bench.intensity", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("rows", type=Path, help="JSON lines file of results")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to add to")
    given = parser.parse_args(arguments)
    found = list(measure(read_rows(given.rows)))
    append_rows(given.out, found)
    print(f"{len(found)} results counted", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
