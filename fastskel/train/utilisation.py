"""How much of a device a training uses: the model's operations against the fastest matrix products that it does there.

Model FLOPs utilisation (MFU) is the operations that the encoder as published needs for the samples of a second, divided by
the operations that the processors would do in a second of large matrix products. It counts neither what is computed twice to
save memory nor what is left out because DropPath dropped it or algebra saves it: who needs fewer operations for the same
result has a higher one, which may exceed 1. The objective's own work counts as time, and not as operations.
Source: Chowdhery et al., PaLM: Scaling Language Modeling with Pathways, JMLR 2023, appendix B.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastskel.data.views import ViewSpec
from fastskel.dist import exchange
from fastskel.models.encoder import Encoder
from fastskel.nn.gemm import linear

if TYPE_CHECKING:
    # builds of torch without it train in one process
    from torch.distributed import ProcessGroup

__all__ = ["DTYPES", "Utilisation", "matmul_peak", "product_of", "product_speed", "seconds_of", "utilisation_of"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# products grow from the first size as long as one takes less than the limit; large ones would only add memory on a CPU
FIRST_MATRIX, LIMIT_S, REPEATS = 256, 0.05, 5
LARGEST_MATRIX = {"cpu": 1024, "cuda": 8192}


class Utilisation(NamedTuple):
    """What utilisation is made of.

    Attributes:
        flops: Operations of the model for one sample, all of its views forward and backward.
        peak: Operations per second in large products, of all processes together.
    """

    flops: int
    peak: int


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(
    call: Callable[[], Any],
    device: torch.device,
    repeats: int,
    choose: Callable[[Sequence[float]], float] = statistics.median,
) -> float:
    """Time a call after one that does not count; the median of its repeats, or another choice among them, in seconds."""
    durations = []
    for _ in range(repeats + 1):
        _wait(device)
        begin = time.perf_counter()
        call()
        _wait(device)
        durations.append(time.perf_counter() - begin)
    return choose(durations[1:])


def _random(size: int, device: torch.device) -> Tensor:
    # drawn apart from torch's own generator, which stays as it was; equal numbers would draw less power, and be faster
    return torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(0))


def product_of(size: int, name: str, device: torch.device) -> Callable[[], Any]:
    """Make a product of two square matrices, (size, size), by torch.

    Args:
        size: Rows and columns.
        name: Type, as in "bf16"; "tf32" multiplies fp32, and "fp8" e4m3 with one scale for each matrix.
        device: Where they lie.
    """
    a = _random(size, device)
    if name == "fp8":
        left, one = a.to(torch.float8_e4m3fn), torch.ones((), device=device)
        # the second matrix lies by columns
        return lambda: torch._scaled_mm(left, left.t(), one, one, out_dtype=torch.bfloat16)
    a = a.to(DTYPES.get(name, torch.float32))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, a, out=out)


def _encoders_product(size: int, name: str, device: torch.device) -> Callable[[], Any]:
    """As `product_of`, by what the encoders' products go through: on a CPU not always torch's."""
    a = _random(size, device)
    if name == "fp8":
        left, factors = a.to(torch.float8_e4m3fn), torch.ones(size, 1, device=device)
        return lambda: torch._scaled_mm(left, left.t(), factors, factors.t(), out_dtype=torch.bfloat16)
    a = a.to(DTYPES[name])
    return lambda: linear(a, a)


def product_speed(
    make: Callable[[int], Callable[[], Any]],
    device: torch.device,
    *,
    first: int,
    most: int,
    limit_s: float,
    repeats: int,
    choose: Callable[[Sequence[float]], float] = statistics.median,
) -> tuple[float, int]:
    """Measure products of square matrices, as large as a time limit allows.

    Args:
        make: Makes a product of two matrices (size, size).
        device: Where they lie.
        first: Least size.
        most: Largest size; sizes double.
        limit_s: Seconds that one product may take.
        repeats: Products that are timed.
        choose: Which of their times counts.
    Returns:
        Operations per second, and the size.
    """
    size = first
    # eight times the work for twice the size
    while size < most and 8 * seconds_of(make(size), device, 1) < limit_s:
        size *= 2
    return 2 * size**3 / seconds_of(make(size), device, repeats, choose), size


# the number of threads is part of what was measured
@functools.lru_cache(maxsize=8)
def _measured(precision: str, device: torch.device, threads: int) -> float:
    make = functools.partial(_encoders_product, name=precision, device=device)
    most = LARGEST_MATRIX[device.type]
    # the least: what else runs on the machine makes products slower, and never faster
    speed, _ = product_speed(
        make, device, first=FIRST_MATRIX, most=most, limit_s=LIMIT_S, repeats=REPEATS, choose=min
    )
    if device.type == "cuda":
        # the matrices would count as the training's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return speed


def matmul_peak(precision: str, device: torch.device) -> float:
    """Measure once, in some tenths of a second, the operations per second of large matrix products.

    Args:
        precision: "fp32", as torch is told to multiply it, "bf16" or "fp8".
        device: Where; on a CPU with torch's present number of threads.
    """
    return _measured(precision, device, torch.get_num_threads())


def utilisation_of(
    encoder: Encoder, views: Iterable[ViewSpec], precision: str, device: torch.device, group: ProcessGroup | None
) -> Utilisation | None:
    """Count and measure what the utilisation of a training is made of; the same in all processes, which all call it.

    Args:
        encoder: Of views (N, T, M, V, C).
        views: What it embeds of each sample.
        precision: Compute type.
        device: Where this process computes.
        group: Exchanges integers on the host; None are all processes.
    Returns:
        None where the encoder does not say how many operations it is.
    """
    counts = [encoder.model_flops(view.frames, backward=True) for view in views]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return None
    peaks = exchange([round(matmul_peak(precision, device))], torch.device("cpu"), group)
    return Utilisation(sum(known), sum(peak for (peak,) in peaks))
