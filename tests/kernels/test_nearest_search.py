"""The search of neighbours through the kernel against that without a first pass, keys and all: interpreted, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from fastskel.kernels import nearest as module
from torch import Tensor

from fastskel.evaluate.knn import knn_neighbours
from fastskel.evaluate.search import CosineSearch, rows_of, similarities_of


def features(number: int, width: int, seed: int) -> Tensor:
    """A narrow cone, a direction that returns, rows of zeros, lengths of all sizes."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.relu(2.0 + torch.randn(number, width, generator=draw))
    rows[::7] = torch.arange(1.0, width + 1)
    rows[3::11] = 0.0
    return rows * 10.0 ** torch.randint(-20, 21, (number, 1), generator=draw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows, num_queries, width, k", [(150, 1, 33, 1), (401, 37, 60, 5)], ids=str)
def test_equals_the_search_in_float64(
    num_rows, num_queries, width, k, dtype, device: torch.device, launches, monkeypatch
) -> None:
    # zeros and what returns ties with more rows than are kept: all of it may be left unproven
    monkeypatch.setattr("fastskel.evaluate.search.UNPROVEN_SHARE", 1.0)
    seen = launches(module._nearest_kernel)
    gallery, queries = features(num_rows, width, 1).to(dtype), features(num_queries, width, 2).to(dtype)
    search = CosineSearch(gallery, kernels="triton", device=device)
    found = search.nearest(queries, k)
    assert seen == ["_nearest_kernel"] and search.kernels == "triton"
    assert torch.equal(found.cpu(), CosineSearch(gallery, first_pass="fp64").nearest(queries, k))


def test_more_neighbours_than_are_kept(device: torch.device, launches) -> None:
    seen = launches(module._nearest_kernel)
    gallery, queries = features(90, 20, 1), features(4, 20, 2)
    search = CosineSearch(gallery, kernels="triton", device=device)
    assert torch.equal(search.nearest(queries, 26).cpu(), CosineSearch(gallery, first_pass="fp64").nearest(queries, 26))
    assert seen == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("width", [100, 2048])
def test_equals_the_search_on_the_host(width: int, k: int) -> None:
    draw = torch.Generator().manual_seed(width)
    gallery, queries = (torch.relu(1.0 + torch.randn(number, width, generator=draw)) for number in (12_000, 3000))
    search = CosineSearch(gallery.cuda(), kernels="triton", device="cuda")
    found = search.nearest(queries.cuda(), k).cpu()
    # neither was given up
    assert search.kernels == "triton"
    similarity, rows = knn_neighbours(gallery, queries, k)
    assert torch.equal(rows_of(found), rows) and torch.equal(similarities_of(found), similarity)
