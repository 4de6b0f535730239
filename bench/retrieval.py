"""Exact nearest neighbours against the matrix product alone and against scikit-learn's brute force.

    python -m fastskel.bench.retrieval [--out FILE.jsonl] [--queries B] [--rows N] [--width F] [--k k] [--data crowded|gaussian]
                                       [--device cuda] [--features bf16]

Features are made up: `crowded` ones lie in a narrow cone in 60 classes, as those after a ReLU do, `gaussian` ones have no
structure. Before anything is timed, neighbours of a sample of queries must be those of a plain float64 search. `product` is the
product of all queries with all rows, block by block into one buffer: it finds nothing. Providers take turns in one process;
memory is measured in a process for each, and is what the search adds to features and libraries. `same` is the share of the
sample's neighbours that are the exact ones: scikit-learn computes distances in float32. On a GPU, where features lie on it and
memory is what torch allocates there, `torch` is what one would write: unit rows in the features' type, products in blocks, topk.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastskel.bench.children import Child, failure
from fastskel.bench.devices import add_device
from fastskel.bench.harness import append_rows, compare, origin, peak_bytes, resident_bytes
from fastskel.bench.rows import verdict
from numpy.typing import NDArray
from torch import Tensor

from fastskel.evaluate.search import CosineSearch, rows_of
from fastskel.nn.kernel_choice import KernelChoice

__all__ = ["BASELINE", "PROVIDERS", "Case", "exact", "main", "make_features", "measure", "memory"]

BASELINE, SKLEARN = "product", "scikit-learn"
NUM_CLASSES, SEED = 60, 11
HOST = torch.device("cpu")
# rows made at a time: making features must not need more memory than searching them
FILL_ROWS, BLOCK_QUERIES, SAMPLE = 2048, 1024, 64
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# steps of a similarity: what the search promises
STEPS = 2.0**30

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A search.

    Attributes:
        queries: B.
        rows: N.
        width: F.
        k: Neighbours of each query.
        data: "crowded" or "gaussian".
        features: Their type, "fp32" or "bf16".
    """

    queries: int = 16_487
    rows: int = 40_091
    width: int = 2048
    k: int = 1
    data: str = "crowded"
    features: str = "fp32"

    @property
    def name(self) -> str:
        """What tells its rows from others."""
        kind = self.data if self.features == "fp32" else f"{self.data} {self.features}"
        return f"{self.queries} queries in {self.rows} {kind} rows of {self.width}, k {self.k}"


QUICK = Case(200, 3000, 64)


def make_features(case: Case) -> tuple[Tensor, Tensor]:
    """Make up a gallery, (N, F), and queries, (B, F)."""
    generator = torch.Generator().manual_seed(SEED)
    centres = torch.randn(NUM_CLASSES, case.width, generator=generator)

    def draw(number: int) -> Tensor:
        features = torch.empty(number, case.width, dtype=TYPES[case.features])
        for begin in range(0, number, FILL_ROWS):
            part = torch.randn(min(FILL_ROWS, number - begin), case.width, generator=generator)
            if case.data == "crowded":
                classes = torch.randint(NUM_CLASSES, (len(part),), generator=generator)
                part.add_(centres[classes], alpha=0.7).add_(1.0).relu_()
            features[begin : begin + FILL_ROWS] = part
        return features

    return draw(case.rows), draw(case.queries)


def _product(gallery: Tensor, queries: Tensor) -> None:
    buffer = gallery.new_empty(min(BLOCK_QUERIES, len(queries)), len(gallery))
    for begin in range(0, len(queries), BLOCK_QUERIES):
        part = queries[begin : begin + BLOCK_QUERIES]
        torch.mm(part, gallery.T, out=buffer[: len(part)])


def _own(first_pass: str, kernels: KernelChoice, gallery: Tensor, queries: Tensor, k: int) -> NDArray[np.int64]:
    search = CosineSearch(gallery, first_pass=first_pass, kernels=kernels, device=gallery.device)
    return rows_of(search.nearest(queries, k)).cpu().numpy()


def _torch(gallery: Tensor, queries: Tensor, k: int) -> NDArray[np.int64]:
    gallery, queries = (rows / rows.norm(dim=1, keepdim=True) for rows in (gallery, queries))
    found = [(part @ gallery.T).topk(k, dim=1).indices for part in torch.split(queries, BLOCK_QUERIES)]
    return torch.cat(found).cpu().numpy()


def _sklearn(metric: str, gallery: Tensor, queries: Tensor, k: int) -> NDArray[np.int64]:
    from sklearn.neighbors import NearestNeighbors

    if metric == "euclidean":
        # unit vectors order alike by both, and this one has a fused search
        gallery, queries = (rows / rows.norm(dim=1, keepdim=True) for rows in (gallery, queries))
    finder = NearestNeighbors(n_neighbors=k, algorithm="brute", metric=metric).fit(gallery.numpy())
    found: NDArray[np.int64] = finder.kneighbors(queries.numpy(), return_distance=False)
    return found


FINDERS: dict[str, Callable[[Tensor, Tensor, int], NDArray[np.int64]]] = {
    "fastskel fp32": partial(_own, "fp32", "torch"),
    "fastskel bf16": partial(_own, "bf16", "torch"),
    "fastskel triton": partial(_own, "fp32", "triton"),
    "torch": _torch,
    SKLEARN: partial(_sklearn, "cosine"),
    "scikit-learn, unit vectors": partial(_sklearn, "euclidean"),
}
PROVIDERS = (BASELINE, *FINDERS)
# who takes part, by device
TAKING_PART = {"cpu": ["fastskel fp32", "fastskel bf16", SKLEARN], "cuda": ["fastskel fp32", "fastskel triton", "torch"]}


def exact(gallery: Tensor, queries: Tensor, k: int) -> NDArray[np.int64]:
    """Find neighbours the plain way: all similarities (B, N) in float64, in steps of 2^-30, lower row first among equals."""
    g, q = (rows.double().cpu().numpy() for rows in (gallery, queries))
    g, q = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (g, q))
    order: NDArray[np.int64] = np.argsort(-np.round(q @ g.T * STEPS), axis=1, kind="stable")[:, :k]
    return order


def _calls(case: Case, providers: Sequence[str], gallery: Tensor, queries: Tensor) -> dict[str, Callable[[], object]]:
    calls: dict[str, Callable[[], object]] = {}
    for name in providers:
        search = FINDERS.get(name)
        calls[name] = partial(_product, gallery, queries) if search is None else partial(search, gallery, queries, case.k)
    return calls


def measure(
    case: Case, providers: Sequence[str], rounds: int, limit_s: float, device: torch.device = HOST
) -> Iterator[Row]:
    """Search (B, F) in (N, F) by each provider in turns; one row for each, of a GPU with the memory that it adds.

    Raises:
        ValueError: If an own search does not find the exact neighbours of the sample.
    """
    gallery, queries = (features.to(device) for features in make_features(case))
    sample = queries[:: max(1, len(queries) // SAMPLE)][:SAMPLE]
    expected = exact(gallery, sample, case.k)
    same = {}
    for name in providers:
        if name in FINDERS:
            same[name] = float((FINDERS[name](gallery, sample, case.k) == expected).mean())
            if name.startswith("fastskel") and same[name] < 1.0:
                raise ValueError(
                    f"retrieval: {name} must find the exact neighbours, got {same[name]:.2%} of them. Mend the search."
                )
    work = 2 * case.queries * case.rows * case.width
    calls = _calls(case, providers, gallery, queries)
    for timing in compare(calls, BASELINE, device=device, rounds=rounds, warmup=1, limit_s=limit_s):
        added = {"added_bytes": peak_bytes(calls[timing.provider], device)} if device.type == "cuda" else {}
        about = {"tflop_per_s": work / timing.median_ms / 1e9, "same": same.get(timing.provider)}
        yield {**timing.row(), **about, **added}


def _one(case: Case, provider: str) -> Row:
    features = make_features(case)
    # libraries and threads are there before the count begins
    _calls(QUICK, [provider], *make_features(QUICK))[provider]()
    before = resident_bytes("VmRSS")
    _calls(case, [provider], *features)[provider]()
    return {"peak_bytes": resident_bytes("VmHWM"), "added_bytes": max(0, resident_bytes("VmHWM") - before)}


def memory(case: Case, provider: str, limit_s: float) -> Row:
    """Measure the memory of one search of (B, F) in (N, F), in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        child = Child(Path(folder) / "log", limit_s)
        status, output = child.run("-m", "fastskel.bench.retrieval", "--one", provider, "--case", json.dumps(asdict(case)))
    if status:
        return {"memory_error": failure(status, output)}
    row: Row = json.loads(output.splitlines()[-1])
    return row


def line(row: Row, rows: Mapping[str, Row]) -> str:
    """Say a row in one line, with its time beside those of scikit-learn and of the product."""
    parts = [f"{row['provider']:<26} {row['median_ms'] / 1e3:8.2f} s  {row['tflop_per_s']:6.3f} TFLOP/s"]
    if row["provider"] != BASELINE:
        parts.append(f"{row['median_ms'] / rows[BASELINE]['median_ms']:5.2f} x the product")
        if SKLEARN in rows:
            parts.append(f"{rows[SKLEARN]['median_ms'] / row['median_ms']:5.2f} x scikit-learn's speed")
        parts.append(f"same {row['same']:.1%}")
    if "added_bytes" in row:
        parts.append(f"+{row['added_bytes'] / 2**20:.0f} MiB")
    return "  ".join([*parts, verdict(row)])


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, append rows; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.retrieval", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON lines file to add rows to")
    for field in ("queries", "rows", "width", "k"):
        parser.add_argument(f"--{field}", type=int)
    parser.add_argument("--data", choices=("crowded", "gaussian"))
    parser.add_argument("--features", choices=TYPES)
    add_device(parser, "cpu")
    parser.add_argument("--providers", nargs="+", choices=FINDERS, help="by default those that suit the device")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit-s", type=float, default=1200.0, help="seconds after which no round begins, and of a process")
    parser.add_argument("--quick", action="store_true", help="a tiny search: whether it runs, not how fast")
    parser.add_argument("--one", choices=PROVIDERS, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        print(json.dumps(_one(Case(**given.case), given.one)))
        return 0
    sizes = {name: getattr(given, name) for name in asdict(QUICK) if getattr(given, name) is not None}
    case = Case(**{**asdict(QUICK if given.quick else Case()), **sizes})
    where = torch.device(given.device)
    shared = {"part": "retrieval", "case": case.name, "precision": case.features, "quick": given.quick, **origin(where)}
    rows: dict[str, Row] = {}
    providers = [BASELINE, *(given.providers or TAKING_PART[where.type])]
    for row in measure(case, providers, given.rounds, given.limit_s, where):
        apart = memory(case, row["provider"], given.limit_s) if where.type == "cpu" else {}
        rows[row["provider"]] = {**row, **apart, **shared}
    if given.out:
        append_rows(given.out, rows.values())
    print(case.name)
    for row in rows.values():
        print(line(row, rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
