"""`import fastskel` costs nothing, and works without a GPU, a Triton driver or Triton itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# the product's promise, in seconds beyond `import torch`
LIMIT_S = 0.5


def run(code: str, tmp_path: Path) -> str:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    # another folder than the repository: only what is installed is found
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_fast(tmp_path: Path) -> None:
    code = "import time, torch; t = time.perf_counter(); import fastskel; print(time.perf_counter() - t)"
    # best of three: another process of the machine may disturb one
    assert min(float(run(code, tmp_path)) for _ in range(3)) < LIMIT_S


def test_import_is_light(tmp_path: Path) -> None:
    heavy = ("torch", "triton", "matplotlib", "scipy", "PIL", "tyro", "tqdm")
    code = f"import sys, fastskel; print([m for m in {heavy} if m in sys.modules])"
    assert run(code, tmp_path).strip() == "[]"


def test_foundations_stay_light(tmp_path: Path) -> None:
    code = (
        "import sys, fastskel.philox, fastskel.skeleton, fastskel.registry, fastskel.atomic\n"
        "print([m for m in ('torch', 'triton', 'matplotlib', 'scipy') if m in sys.modules])"
    )
    assert run(code, tmp_path).strip() == "[]"


def test_kernels_start_no_driver(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    code = (
        "import triton.runtime as r, fastskel.kernels.philox, torch\n"
        "print(r.driver._active, torch.cuda.is_initialized())"
    )
    assert run(code, tmp_path).strip() == "None False"


def test_cpu_operator_without_triton(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastskel.philox\n"
        "from fastskel.kernels import philox\n"
        "words = philox.philox_words(torch.arange(5), 1, 7, 3, 4, 6)\n"
        "print((words.numpy() == fastskel.philox.words(7, range(5), 3, 1, 4, 6)).all())\n"
        "try:\n    philox._philox_words_kernel[(1,)]()\nexcept RuntimeError as error:\n    print(error)"
    )
    first, second = run(code, tmp_path).splitlines()
    assert first == "True"
    assert "Triton must be installed" in second
