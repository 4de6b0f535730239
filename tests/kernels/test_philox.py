"""The operator `fastskel::philox_words`: reference, interpreter and GPU against the NumPy definition."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fastskel.kernels import philox as kernel_module
from fastskel.kernels.philox import philox_words
from fastskel.kernels.reference.philox import philox_words as philox_words_reference

from fastskel import philox

SEEDS = [0, 1, 7, 2**31, 2**32 - 1, 2**63 - 1, 2**63 + 5, 2**64 - 1]
INDEX = np.array([0, 1, 2**31, 2**32 - 1, *range(2, 70)])
VIEW = np.arange(len(INDEX)) % 5 * 16383


def both(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(INDEX, device=device), torch.tensor(VIEW, device=device)


def check(device: str, seed: int, step: int, num: int, on_device: bool = False) -> None:
    address = seed, step
    if on_device:
        bits = (seed + 2**63) % 2**64 - 2**63
        address = tuple(torch.tensor(value, device=device) for value in (bits, step))
    words = philox_words(*both(device), *address, 0xFFFF, num)
    assert words.dtype == torch.int64
    assert words.shape == (len(INDEX), num)
    assert np.array_equal(words.cpu().numpy(), philox.words_numpy(seed, INDEX, step, VIEW, 0xFFFF, num))


@pytest.mark.parametrize("num", [0, 1, 4, 17])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("on_device", [False, True], ids=["numbers", "tensors"])
def test_operator_equals_numpy(seed: int, num: int, on_device: bool) -> None:
    check("cpu", seed, 2**32 - 1, num, on_device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("seed", SEEDS)
def test_gpu_equals_numpy(seed: int) -> None:
    for step in (0, 1, 2**31, 2**32 - 1):
        for num in (0, 1, 4, 17):
            check("cuda", seed, step, num)
            check("cuda", seed, step, num, on_device=True)


def test_known_answer() -> None:
    words = philox_words(torch.zeros(1, dtype=torch.int64), 0, 0, 0, 0, 4)
    assert [f"{word:08x}" for word in words[0].tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_reference_equals_native() -> None:
    words = philox_words_reference(*both("cpu"), 2**63 + 5, 3, 4, 9)
    assert np.array_equal(words.numpy(), philox.words(2**63 + 5, INDEX, 3, VIEW, 4, 9))


@pytest.mark.parametrize("size", [0, 1])
def test_unit_sizes(size: int) -> None:
    assert philox_words(torch.arange(size), 0, 1, 2, 3, 5).shape == (size, 5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index_types_and_strides(dtype: torch.dtype) -> None:
    index = torch.arange(20, dtype=dtype)[::2]
    assert np.array_equal(philox_words(index, 2, 1, 2, 3, 5).numpy(), philox.words(1, range(0, 20, 2), 2, 2, 3, 5))


def test_opcheck() -> None:
    operator = torch.ops.fastskel.philox_words.default
    torch.library.opcheck(operator, (*both("cpu"), None, -1, 3, 4, 9))
    torch.library.opcheck(operator, (*both("cpu"), torch.tensor([-1, 3]), 0, 0, 4, 9))


def test_compiles_as_one_graph() -> None:
    compiled = torch.compile(lambda i, v: philox_words(i, v, 5, 3, 4, 9) + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*both("cpu")), philox_words(*both("cpu"), 5, 3, 4, 9) + 1)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(index=torch.zeros(2, 2, dtype=torch.int64)), r"index must be integers \(N,\), got torch.int64 \(2, 2\)"),
        (dict(index=torch.zeros(3)), r"index must be integers \(N,\), got torch.float32 \(3,\)"),
        (dict(view=torch.zeros(4, dtype=torch.int64)), r"view must be integers \(3,\) on cpu, got torch.int64 \(4,\)"),
        (dict(view=2**16), r"view must be in \[0, 2\*\*16\), got 65536"),
        (dict(view=torch.tensor([0, 1, 2**16])), r"view must be in \[0, 2\*\*16\), got 0 to 65536"),
        (dict(index=torch.tensor([0, 1, -1])), r"index must be in \[0, 2\*\*32\), got -1 to 1"),
        (dict(seed=2**64), r"seed must be in \[0, 2\*\*64\)"),
        (dict(seed=-1), "seed must be in"),
        (dict(step=2**32), "step must be in"),
        (dict(step=torch.tensor(2**32)), "step must be in"),
        (dict(step=torch.tensor([1])), r"step must be an int or an int64 tensor \(\), got torch.int64 \(1,\)"),
        (dict(seed=torch.tensor(1.0)), r"seed must be an int or an int64 tensor"),
        (dict(use=-1), "use must be in"),
        (dict(num=-1), "num must be in"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"philox_words: {message}"):
        philox_words(**{**dict(index=torch.arange(3), view=0, seed=0, step=0, use=0, num=1), **change})


@pytest.mark.interpreted
def test_interpreter_equals_numpy(launches) -> None:
    seen = launches(kernel_module._philox_words_kernel)
    for seed, step, num in [(0, 0, 4), (1, 1, 1), (2**32 - 1, 2**31, 17), (2**63 + 5, 2**32 - 1, 5), (7, 3, 0)]:
        check("cpu", seed, step, num)
        check("cpu", seed, step, num, on_device=True)
    # two ways to give the address of each draw that is not empty
    assert len(seen) == 8


@pytest.mark.interpreted
def test_opcheck_of_the_interpreted() -> None:
    torch.library.opcheck(torch.ops.fastskel.philox_words.default, (*both("cpu"), None, -1, 3, 4, 9))


def test_compiles_offline(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "fastskel.bench.offline", "--kernel", "_philox_words_kernel"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for target in ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942"):
        assert target in done.stdout
    # registers, then spilled bytes
    assert re.search(r"index i64, seed i64, step i32 +\d+ +0 ", done.stdout)
