"""The largest products: the kernel against a matrix of them all, where they are exact, tied, few, and in the worst order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastskel.kernels import nearest as module
from fastskel.kernels.nearest import nearest, nearest_cost
from fastskel.kernels.reference.nearest import nearest as reference
from torch import Tensor

# queries, rows, terms, kept
SHAPES = [
    (1, 1, 64, 1), (1, 33, 64, 4), (17, 32, 64, 8), (16, 31, 192, 16), (40, 100, 128, 2), (5, 7, 64, 16), (33, 200, 64, 1),
    (2, 70, 64, 64),
]  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of which small galleries have several."""
    monkeypatch.setattr(module, "BLOCK_B", 16)
    monkeypatch.setattr(module, "BLOCK_N", 32)
    monkeypatch.setattr(module, "NUM_WARPS", 4)


def whole(shape: tuple[int, ...], most: int, device: Any = "cpu") -> Tensor:
    """Whole numbers: sums of their products are exact in any order."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-most, most + 1, shape, generator=generator).to(device, torch.bfloat16)


def same(queries: Tensor, gallery: Tensor, keep: int) -> None:
    """The products of the reference, and different rows that have them."""
    scores, rows = nearest(queries, gallery, keep)
    assert scores.dtype == torch.float32 and rows.dtype == torch.int32
    assert torch.equal(scores, reference(queries, gallery, keep)[0])
    real = min(keep, len(gallery))
    assert (rows[:, real:] == -1).all() and (rows[:, :real] >= 0).all()
    matrix = queries.float() @ gallery.float().T
    assert torch.equal(matrix.gather(1, rows[:, :real].long()), scores[:, :real])
    assert all(len(set(row)) == real for row in rows[:, :real].tolist())


@pytest.mark.parametrize("most", [1, 64], ids=["ties", "apart"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("small")
def test_equals_reference(shape, most, device, launches):
    num_queries, num_rows, width, keep = shape
    seen = launches(module._nearest_kernel)
    same(whole((num_queries, width), most, device), whole((num_rows, width), most, device), keep)
    assert seen == ["_nearest_kernel"]


def test_tiles_as_they_are(device):
    same(whole((130, 64), 64, device), whole((300, 64), 64, device), 4)


@pytest.mark.parametrize("processors, splits", [(1, 1), (6, 2), (100, 4)])
@pytest.mark.usefixtures("small")
def test_any_number_of_splits(processors, splits, device, monkeypatch):
    monkeypatch.setattr(module, "num_processors", lambda device: processors)
    monkeypatch.setattr(module, "SPLITS", 1)
    sizes, kernel = [], module._nearest_kernel
    run = kernel.run
    monkeypatch.setattr(kernel, "run", lambda *args, **options: sizes.append(args[6]) or run(*args, **options))
    same(whole((40, 64), 3, device), whole((120, 64), 3, device), 8)
    assert sizes == [splits]


@pytest.mark.usefixtures("small")
def test_rows_that_come_nearer_and_nearer(device):
    # every row is the nearest up to it: all that a tile can move is moved
    gallery = torch.zeros(128, 64, device=device, dtype=torch.bfloat16)
    gallery[:, 0] = torch.arange(128)
    scores, rows = nearest(torch.ones(1, 64, device=device, dtype=torch.bfloat16), gallery, 16)
    assert rows.tolist() == [list(range(127, 111, -1))] and scores[0, -1] == 112


@pytest.mark.usefixtures("small")
def test_products_are_summed_in_float32(device):
    # in bfloat16 the second term would be lost
    queries = torch.ones(1, 64, device=device, dtype=torch.bfloat16)
    gallery = torch.zeros(3, 64, device=device, dtype=torch.bfloat16)
    gallery[:, 0], gallery[1, 1], gallery[2, 63] = 1.0, 2.0**-16, 2.0**-20
    scores, rows = nearest(queries, gallery, 4)
    assert rows.tolist() == [[1, 2, 0, -1]]
    assert scores.tolist() == [[1 + 2.0**-16, 1 + 2.0**-20, 1.0, float("-inf")]]


def test_no_queries(device):
    scores, rows = nearest(whole((0, 64), 1, device), whole((5, 64), 1, device), 2)
    assert scores.shape == rows.shape == (0, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_addresses_above_32_bits() -> None:
    width = 2112
    gallery = torch.zeros(2**31 // width + 1000, width, device="cuda", dtype=torch.bfloat16)
    gallery[-1, 0], gallery[-900, 0] = 2.0, 1.0
    scores, rows = nearest(torch.ones(200, width, device="cuda", dtype=torch.bfloat16), gallery, 2)
    assert (scores == torch.tensor([2.0, 1.0], device="cuda")).all()
    assert (rows == torch.tensor([len(gallery) - 1, len(gallery) - 900], device="cuda")).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("keep", [16, 32, 64])
def test_published_width(keep: int) -> None:
    same(whole((1000, 2112), 3, "cuda"), whole((9000, 2112), 3, "cuda"), keep)


def check_operator() -> None:
    torch.library.opcheck(torch.ops.fastskel.nearest.default, (whole((3, 64), 3), whole((40, 64), 3), 2))


@pytest.mark.interpreted
def test_opcheck_interpreted() -> None:
    check_operator()


def test_opcheck() -> None:
    check_operator()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operator_without_a_gpu(shape: tuple[int, int, int, int]) -> None:
    num_queries, num_rows, width, keep = shape
    same(whole((num_queries, width), 3), whole((num_rows, width), 3), keep)


def test_errors() -> None:
    rows = whole((4, 64), 3)
    for wrong in (rows.float(), rows[0], rows[:, :32], whole((4, 128), 3)[:, :64]):
        with pytest.raises(ValueError, match="nearest: queries must be contiguous bfloat16 rows of one width, a multiple of 64"):
            nearest(wrong, rows, 1)
    for wrong in (rows.half(), rows[None], whole((4, 128), 3), whole((64, 64), 3).T):
        with pytest.raises(ValueError, match="nearest: gallery must be contiguous bfloat16 rows of one width, a multiple of 64"):
            nearest(rows, wrong, 1)
    with pytest.raises(ValueError, match="nearest: gallery must have 1 to 1073741824 rows, got 0"):
        nearest(rows, rows[:0], 1)
    for keep in (0, 3, 128):
        with pytest.raises(ValueError, match=f"nearest: keep must be a power of two from 1 to 64, got {keep}"):
            nearest(rows, rows, keep)


def test_cost() -> None:
    assert nearest_cost(3, 5, 64, 2) == (2 * 15 * 64, 2 * 8 * 64 + 8 * 6)
