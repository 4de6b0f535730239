"""The blocked search against a plain float64 one, where rounding, ties and near-duplicates make it hard."""

from __future__ import annotations

import pytest
import torch
from fastskel.bench.harness import peak_bytes
from fastskel.kernels.nearest import nearest
from torch import Tensor

from fastskel.evaluate import first_pass as rounding
from fastskel.evaluate import kernel_pass
from fastskel.evaluate import search as searching
from fastskel.evaluate.first_pass import FirstPass, fastest_pass
from fastskel.evaluate.kernel_pass import KernelPass
from fastskel.evaluate.search import FIRST_PASSES, CosineSearch, rows_of, similarities_of
from fastskel.evaluate.unit_rows import UnitRows

STEP = 2.0**-30


def _plain(gallery: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarities and rows of the k nearest, (B, k), by a matrix of them all."""
    g, q = gallery.double(), queries.double()
    g, q = (x / torch.where(x.abs().amax(1, keepdim=True) > 0, x.abs().amax(1, keepdim=True), 1.0) for x in (g, q))
    g, q = (x / torch.where(x.norm(dim=1, keepdim=True) > 0, x.norm(dim=1, keepdim=True), 1.0) for x in (g, q))
    similarity = (q @ g.T / STEP).round() * STEP
    order = similarity.argsort(dim=1, descending=True, stable=True)[:, :k]
    return similarity.gather(1, order), order


def _gaussian(n: int, f: int, draw: torch.Generator) -> Tensor:
    return torch.randn(n, f, generator=draw)


def _crowded(n: int, f: int, draw: torch.Generator) -> Tensor:
    """A narrow cone, as after a ReLU."""
    return torch.relu(3.0 + torch.randn(n, f, generator=draw))


def _duplicates(n: int, f: int, draw: torch.Generator) -> Tensor:
    """Five directions, so that hundreds of rows tie."""
    return torch.randn(5, f, generator=draw)[torch.randint(5, (n,), generator=draw)]


def _near_duplicates(n: int, f: int, draw: torch.Generator) -> Tensor:
    """Closer together than bf16, and mostly than fp32, can tell."""
    scale = 10.0 ** torch.randint(-6, -2, (n, 1), generator=draw)
    return torch.randn(1, f, generator=torch.Generator().manual_seed(3)) + scale * torch.randn(n, f, generator=draw)


def _lengths(n: int, f: int, draw: torch.Generator) -> Tensor:
    """Lengths from 1e-30 to 1e30, and rows of zeros."""
    length = 10.0 ** torch.randint(-30, 31, (n, 1), generator=draw)
    return torch.randn(n, f, generator=draw) * length * (torch.rand(n, 1, generator=draw) > 0.1)


def _sparse(n: int, f: int, draw: torch.Generator) -> Tensor:
    """Few values, all alike: similarities are few fractions."""
    return (torch.rand(n, f, generator=draw) < 2 / f).float()


KINDS = [_gaussian, _crowded, _duplicates, _near_duplicates, _lengths, _sparse]
SIZES = [(700, 90, 33, 1), (700, 90, 33, 10), (300, 40, 1, 3), (1000, 3, 120, 5), (130, 70, 7, 130), (64, 1, 5, 2)]


@pytest.mark.parametrize("first_pass", FIRST_PASSES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__.strip("_"))
@pytest.mark.parametrize("num_rows, num_queries, width, k", SIZES, ids=str)
def test_neighbours_are_those_of_the_whole_matrix(first_pass, kind, num_rows, num_queries, width, k) -> None:
    draw = torch.Generator().manual_seed(num_rows + width)
    gallery, queries = kind(num_rows, width, draw), kind(num_queries, width, draw)
    # the queries' own rows are the nearest of all
    queries[::3] = gallery[: len(queries[::3])]
    similarity, rows = _plain(gallery, queries, k)
    keys = CosineSearch(gallery, first_pass=first_pass, block_rows=48).nearest(queries, k)
    assert rows_of(keys).tolist() == rows.tolist()
    torch.testing.assert_close(similarities_of(keys), similarity, atol=STEP, rtol=0)


@pytest.mark.parametrize("first_pass", FIRST_PASSES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__.strip("_"))
def test_blocks_and_threads_change_nothing(first_pass, kind) -> None:
    draw = torch.Generator().manual_seed(1)
    gallery, queries = kind(900, 65, draw), kind(50, 65, draw)
    expected = CosineSearch(gallery, first_pass="fp64").nearest(queries, 4)
    threads = torch.get_num_threads()
    try:
        for block_rows, num_threads in ((3, 1), (17, 2), (64, 1), (1024, 2)):
            torch.set_num_threads(num_threads)
            found = CosineSearch(gallery, first_pass=first_pass, block_rows=block_rows).nearest(queries, 4)
            assert torch.equal(found, expected), (block_rows, num_threads)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("first_pass", FIRST_PASSES)
def test_similarities_within_one_step_are_equal(first_pass: str) -> None:
    # every thirtieth row is near, the last of these by less than a step the nearest; others are away by hundreds of steps
    angle = torch.linspace(1e-3, 2e-3, 300) * torch.tensor([1.0, -1.0]).repeat(150)
    angle[::30] = torch.linspace(1e-5, 1e-6, 10)
    search = CosineSearch(torch.stack([angle.cos(), angle.sin()], 1), first_pass=first_pass)
    assert rows_of(search.nearest(torch.tensor([[1.0, 0.0]]), 3)).tolist() == [[0, 30, 60]]
    assert search.rungs[0] == first_pass


def _scores(gallery: Tensor, queries: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of a first pass, true ones, and the bound between them, (N, B) each."""
    rows, asked = (UnitRows("test", "rows", x, "cpu") for x in (gallery, queries))
    first = FirstPass(rows, name, 4096)
    units = asked[slice(None)]
    columns, scale = first.round_queries(units)
    score = (first.rows @ columns)[: len(rows)].double()
    truth = rows[slice(None)] @ units.T - units @ first.centre
    bound = (first.factors @ scale)[: len(rows)] + score.abs() * rounding.RESULT_ROUNDOFF[first.stored]
    return score, truth, bound


@pytest.mark.parametrize("name", ["bf16", "fp32"])
@pytest.mark.parametrize("width", [1, 3, 64, 2048], ids=lambda width: f"F{width}")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__.strip("_"))
def test_rounding_stays_within_its_bound(kind, width: int, name: str) -> None:
    draw = torch.Generator().manual_seed(width)
    score, truth, bound = _scores(kind(200, width, draw), kind(30, width, draw), name)
    # truth is a sum of float64 products of values up to 1
    assert ((score - truth).abs() <= bound + 1e-14).all()


def test_rounding_that_goes_one_way_stays_within_its_bound() -> None:
    # 509 values of one size: in unit vectors bf16 rounds each up by nearly half of its step. their mean is zero
    row = torch.ones(1, 509)
    gallery = torch.cat([row * torch.where(torch.arange(509) < place, -1.0, 1.0) for place in range(0, 509, 3)])
    gallery = torch.cat([gallery, -gallery])
    score, truth, bound = _scores(gallery, gallery, "bf16")
    off = (score - truth).abs()
    assert (off <= bound).all()
    # a bound that nothing comes near would keep too many
    assert (off / bound).max() > 0.3


def test_a_narrow_cone_is_rounded_finely() -> None:
    draw = torch.Generator().manual_seed(0)
    wide = _scores(_gaussian(500, 256, draw), _gaussian(20, 256, draw), "bf16")[2]
    narrow = _scores(_crowded(500, 256, draw), _crowded(20, 256, draw), "bf16")[2]
    assert narrow.max() < 0.3 * wide.max()


@pytest.mark.parametrize("first_pass", ["bf16", "fp32"])
def test_what_rounding_cannot_tell_apart_goes_to_longer_types(first_pass: str) -> None:
    draw = torch.Generator().manual_seed(4)
    easy = CosineSearch(_gaussian(3000, 64, draw), first_pass=first_pass)
    easy.nearest(_gaussian(100, 64, draw), 5)
    assert easy.rungs[0] == first_pass
    row = _gaussian(1, 64, draw)
    # thousands of equal rows: the first of them are the neighbours
    hard = CosineSearch(torch.cat([-row, row.repeat(3000, 1)]), first_pass=first_pass)
    assert rows_of(hard.nearest(row, 5)).tolist() == [[1, 2, 3, 4, 5]]
    assert hard.rungs == ["fp64"]
    # two opposite cones, so that the centre does not help: bf16 cannot tell rows of one apart, fp32 can
    gallery = row + 3e-2 * _gaussian(3000, 64, draw)
    gallery[::2].neg_()
    between = CosineSearch(gallery, first_pass=first_pass)
    queries = row + 3e-2 * _gaussian(20, 64, draw)
    assert rows_of(between.nearest(queries, 3)).tolist() == _plain(gallery, queries, 3)[1].tolist()
    assert between.rungs[0] == "fp32"


def _by_kernel(gallery: Tensor, **options: object) -> CosineSearch:
    """A search whose first pass is the kernel's operator, which without a GPU is its reference."""
    search = CosineSearch(gallery, **options)
    search.kernels = "triton"
    return search


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__.strip("_"))
@pytest.mark.parametrize("num_rows, num_queries, width, k", [*SIZES, (16, 3, 9, 1), (2500, 300, 61, 25)], ids=str)
def test_neighbours_by_the_kernel_are_those_of_the_whole_matrix(kind, num_rows, num_queries, width, k) -> None:
    draw = torch.Generator().manual_seed(num_rows + width)
    gallery, queries = kind(num_rows, width, draw), kind(num_queries, width, draw)
    queries[::3] = gallery[: len(queries[::3])]
    similarity, rows = _plain(gallery, queries, k)
    keys = _by_kernel(gallery, block_rows=13).nearest(queries, k)
    assert rows_of(keys).tolist() == rows.tolist()
    torch.testing.assert_close(similarities_of(keys), similarity, atol=STEP, rtol=0)


@pytest.mark.parametrize("width", [1, 3, 58, 64, 2048], ids=lambda width: f"F{width}")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__.strip("_"))
def test_bounds_in_columns(kind, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, products = torch.Generator().manual_seed(width), []
    rows, asked = (UnitRows("test", "rows", kind(number, width, draw), "cpu") for number in (200, 30))
    monkeypatch.setattr(
        kernel_pass, "nearest", lambda *args: products.append(args[0].float() @ args[1].float().T) or nearest(*args)
    )
    first, units = KernelPass(rows), asked[slice(None)]
    query, row, ceiling = first.near(units, 1)
    truth, moved = units @ rows[slice(None)].T, (units @ first.centre)[:, None]
    upper = products[0].double() + moved
    # truth is a sum of float64 products of values up to 1
    assert (upper >= truth + first.slack - 1e-14).all()
    margin = (first.factors @ first.round_queries(units)[1]).T
    assert (upper <= truth + first.spread * margin + 1e-14).all()
    # who is in no pair is either below the ceiling, or below some pair's query's nearest for sure
    paired = torch.zeros_like(truth, dtype=torch.bool)
    paired[query, row] = True
    assert (paired.sum(1) >= 1).all() and (paired.sum(1) <= 16).all()
    nearest_paired = truth.masked_fill(~paired, -2.0).amax(1)
    others = truth.masked_fill(paired, -2.0).amax(1)
    assert (others <= torch.maximum(ceiling, nearest_paired) + 1e-14).all()


def test_what_the_kernel_does_not_prove_is_searched_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, left = torch.Generator().manual_seed(12), []
    # forty rows so alike that bf16 cannot tell them apart, among others; six queries look for them
    gallery = _gaussian(3000, 48, draw)
    gallery[100:140] = gallery[100] + 1e-6 * _gaussian(40, 48, draw)
    queries = _gaussian(200, 48, draw)
    queries[:6] = gallery[100:106]
    search = _by_kernel(gallery)
    plain = search._in_float64
    monkeypatch.setattr(search, "_in_float64", lambda units, k: left.append(len(units)) or plain(units, k))
    assert rows_of(search.nearest(queries, 2)).tolist() == _plain(gallery, queries, 2)[1].tolist()
    assert left == [6] and search.kernels == "triton"
    # where most are left, the other passes take over, for good
    queries[:20] = gallery[100:120]
    assert rows_of(search.nearest(queries, 2)).tolist() == _plain(gallery, queries, 2)[1].tolist()
    assert search.kernels == "torch" and search._kernel_pass is None and left == [6]


def test_few_pairs_of_the_kernel_are_multiplied_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(13)
    search, pairs = _by_kernel(_crowded(5000, 512, draw)), []
    select = search._select
    monkeypatch.setattr(search, "_select", lambda units, query, *rest: pairs.append(len(query)) or select(units, query, *rest))
    search.nearest(_crowded(500, 512, draw), 5)
    # of 32 that the kernel keeps
    assert 5 * 500 <= sum(pairs) < 20 * 500


def test_when_the_kernel_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = torch.randn(searching.LEAST_ROWS, 2)
    assert CosineSearch(gallery).kernels == CosineSearch(gallery, kernels="torch").kernels == "torch"
    with pytest.raises(ValueError, match="kernels: 'triton' must run on a GPU, got cpu"):
        CosineSearch(gallery, kernels="triton")
    with pytest.raises(ValueError, match="kernels: must be one of"):
        CosineSearch(gallery, kernels="cuda")
    # on the device of a row of results it is chosen, for large galleries
    seen = []
    monkeypatch.setattr(searching, "choose_kernels", lambda *args: seen.append(args) or "torch")
    for options in ({}, {"first_pass": "fp32"}, {"kernels": "triton", "first_pass": "fp32"}):
        CosineSearch(gallery, **options)
    CosineSearch(gallery[1:])
    assert [args[0] for args in seen] == ["auto", "torch", "triton", "torch"]
    assert seen[0][2:] == (torch.bfloat16, kernel_pass.MEASURED)
    # up to a list of 64 rows, if there are so many
    assert KernelPass.serves(25, 64) and not KernelPass.serves(26, 1000) and not KernelPass.serves(25, 63)
    assert KernelPass.serves(1, 16) and not KernelPass.serves(1, 15)
    assert KernelPass.serves(1, 2**30) and not KernelPass.serves(1, 2**30 + 1)


def test_few_pairs_are_multiplied_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(5)
    search, pairs = CosineSearch(_crowded(5000, 256, draw), first_pass="fp32"), []
    select = search._select
    monkeypatch.setattr(search, "_select", lambda units, query, *rest: pairs.append(len(query)) or select(units, query, *rest))
    search.nearest(_crowded(500, 256, draw), 5)
    assert 5 * 500 <= sum(pairs) < 6 * 500


@pytest.mark.parametrize(
    "first_pass, num_rows, num_queries", [("bf16", 8192, 1024), ("fp32", 1024, 8192), ("fp64", 8192, 1024)], ids=str
)
def test_memory_stays_far_below_the_matrix(first_pass: str, num_rows: int, num_queries: int) -> None:
    draw = torch.Generator().manual_seed(6)
    gallery, queries = _gaussian(num_rows, 16, draw), _gaussian(num_queries, 16, draw)
    peak = peak_bytes(lambda: CosineSearch(gallery, first_pass=first_pass, block_rows=64).nearest(queries, 3))
    assert peak < num_rows * num_queries * 4 / 8


@pytest.mark.parametrize("scale", [1e-300, 1e300], ids=str)
@pytest.mark.parametrize("first_pass", FIRST_PASSES)
def test_float64_features_of_any_size(first_pass: str, scale: float) -> None:
    draw = torch.Generator().manual_seed(7)
    gallery, queries = _gaussian(500, 20, draw).double() * scale, _gaussian(9, 20, draw).double() / scale
    found = CosineSearch(gallery, first_pass=first_pass).nearest(queries, 3)
    assert rows_of(found).tolist() == _plain(gallery, queries, 3)[1].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_short_features(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(8)
    gallery, queries = _gaussian(500, 20, draw).to(dtype), _gaussian(9, 20, draw).to(dtype)
    found = CosineSearch(gallery, first_pass="fp32").nearest(queries, 3)
    assert rows_of(found).tolist() == _plain(gallery, queries, 3)[1].tolist()


def test_no_queries() -> None:
    search = CosineSearch(torch.randn(5, 4))
    assert search.nearest(torch.empty(0, 4), 3).shape == (0, 3)
    assert list(search.ranked(torch.empty(0, 4))) == []


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__.strip("_"))
def test_ranking_of_the_whole_gallery(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(9)
    gallery, queries = kind(200, 12, draw), kind(31, 12, draw)
    monkeypatch.setattr(searching, "RANKED_VALUES", 1500)
    parts, keys = zip(*CosineSearch(gallery, block_rows=16).ranked(queries))
    assert [part.start for part in parts] == list(range(0, 31, 7)) and parts[-1].stop == 31
    assert rows_of(torch.cat(keys)).tolist() == _plain(gallery, queries, 200)[1].tolist()


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_shortened_fp32_products(precision: str) -> None:
    draw = torch.Generator().manual_seed(10)
    gallery, queries = _crowded(3000, 96, draw), _crowded(40, 96, draw)
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = precision
        search = CosineSearch(gallery, first_pass="fp32")
        found = search.nearest(queries, 4)
        assert search._pass is not None
        values = search._pass.rows
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    # values that every type in use can hold
    assert values.dtype == torch.float32 and torch.equal(values, values.bfloat16().float())
    assert rows_of(found).tolist() == _plain(gallery, queries, 4)[1].tolist()


def test_other_settings_are_seen() -> None:
    before = torch.get_float32_matmul_precision()
    assert rounding._products_are_fp32()
    try:
        torch.set_float32_matmul_precision("medium")
        assert not rounding._products_are_fp32()
    finally:
        torch.set_float32_matmul_precision(before)
    assert rounding._products_are_fp32()
    # a setting of all backends holds where a backend has none of its own
    own, everywhere = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "none"
        torch.backends.fp32_precision = "tf32"
        assert not rounding._products_are_fp32()
    finally:
        torch.backends.fp32_precision = everywhere
        torch.backends.mkldnn.matmul.fp32_precision = own
    assert rounding._products_are_fp32()


@pytest.mark.parametrize("able, expected", [("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx2", "fp32")])
def test_bf16_where_the_processor_has_it(able: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True})
    assert fastest_pass(torch.device("cpu")) == expected
    assert CosineSearch(torch.randn(searching.LEAST_ROWS, 2)).rungs[0] == expected
    assert CosineSearch(torch.randn(searching.LEAST_ROWS - 1, 2)).rungs == ["fp64"]
    assert fastest_pass(torch.device("cuda")) == "fp32"


def test_errors() -> None:
    gallery = torch.randn(5, 4)
    with pytest.raises(ValueError, match="CosineSearch: gallery must have rows, got none"):
        CosineSearch(gallery[:0])
    with pytest.raises(ValueError, match="gallery must be floating-point .N, F., got torch.int64"):
        CosineSearch(gallery.long())
    with pytest.raises(ValueError, match="gallery must be floating-point .N, F., got torch.float32 of shape .5, 0."):
        CosineSearch(gallery[:, :0])
    with pytest.raises(ValueError, match="first_pass must be one of .*, got 'fp8'"):
        CosineSearch(gallery, first_pass="fp8")
    with pytest.raises(ValueError, match="first_pass must be 'fp32' or 'fp64' on cuda, got 'bf16'"):
        CosineSearch(gallery, first_pass="bf16", device="cuda")
    with pytest.raises(ValueError, match="block_rows must be at least 1, got 0"):
        CosineSearch(gallery, block_rows=0)
    search = CosineSearch(gallery)
    with pytest.raises(ValueError, match="k must lie in 1..5 .rows to search., got 6"):
        search.nearest(gallery, 6)
    with pytest.raises(ValueError, match="k must lie in"):
        search.nearest(gallery, 0)
    with pytest.raises(ValueError, match="queries must have the width of gallery, got 3 and 4"):
        search.nearest(gallery[:, :3], 1)
    for value, dtype in ((float("nan"), torch.float32), (float("inf"), torch.float32), (float("-inf"), torch.float64)):
        bad = gallery.to(dtype)
        bad[3, 1] = value
        with pytest.raises(ValueError, match=f"gallery must be finite, got {value} in row 3"):
            CosineSearch(bad)
        with pytest.raises(ValueError, match=f"queries must be finite, got {value} in row 3"):
            search.nearest(bad, 1)
