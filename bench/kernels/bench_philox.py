"""Philox words: NumPy, native C++, torch reference, Triton where there is a GPU; all of the same addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fastskel.bench.harness import Timed
from fastskel.bench.kernels import NO_GPU
from fastskel.kernels.philox import philox_words
from fastskel.kernels.reference.philox import philox_words as philox_words_reference

from fastskel import philox

SEED, STEP = 2**40 + 1, 12
# (samples, words): the joints of a batch's four views; DropPath of a large batch
CASES = [(4 * 256, 16), (4 * 8192, 32)]
PROVIDERS = ["numpy", "native", "reference", "triton"]


def setup(case: tuple[int, int], provider: str) -> Callable[[], Any]:
    """Prepare one draw of words (N, num) by one provider."""
    size, num = case
    index, view = np.arange(size), np.arange(size) % 4
    if provider in ("numpy", "native"):
        draw = philox.words_numpy if provider == "numpy" else philox.words
        return lambda: draw(SEED, index, STEP, view, philox.Use.DROP_PATH, num)
    device = "cuda" if provider == "triton" else "cpu"
    tensors = torch.tensor(index, device=device), torch.tensor(view, device=device)
    if provider == "reference":
        return lambda: philox_words_reference(*tensors, SEED, STEP, philox.Use.DROP_PATH, num)

    return lambda: philox_words(*tensors, SEED, STEP, philox.Use.DROP_PATH, num)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"N{case[0]}-num{case[1]}")
def bench_philox(benchmark: Any, timed: Timed, case: tuple[int, int], provider: str) -> None:
    """Time one provider, after checking it against NumPy; reports written GB/s of 32-bit words."""
    if provider == "triton" and not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    draw = setup(case, provider)
    result = draw()
    words = result.cpu().numpy() if isinstance(result, torch.Tensor) else result
    assert np.array_equal(words, setup(case, "numpy")())
    seconds = timed(f"philox N={case[0]} num={case[1]}", draw)
    if seconds is not None:
        benchmark.extra_info["gigabytes_per_second"] = 4 * case[0] * case[1] / seconds / 1e9
