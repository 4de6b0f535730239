"""One training step as a CUDA graph: launched by a single call, so that small kernels do not wait for Python."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["CapturedStep"]

# what is initialised lazily, as cuBLAS' workspaces and an optimizer's state, must be there before the capture
WARMUP_STEPS = 3


class CapturedStep:
    """A training step that was recorded once and is replayed.

    The step must be the same work each time: inputs of one shape that are copied into the same tensors, DropPath masked
    (`configure(drop_path_mode="mask")`) with everything of their address on the device (`Batch.index` moved there, `Batch.at`
    with a tensor for the step), an optimizer with `capturable=True`, and nothing that waits for the device. Numbers of Python
    are repeated as they were at the capture. Warm-up steps are real steps. Steps in chunks refuse: their views are made anew.

    Args:
        step: Forward and backward pass and update; returns what is to be read afterwards, e.g. the loss ().
        counter: Optimiser step that the draws are addressed with, (), int64 on the device; each call adds 1 to it after its work.
        device: Where the step runs; it is also the counter's.
    Raises:
        ValueError: If the device is no GPU, or the counter is not such a tensor on it.
    """

    def __init__(self, step: Callable[[], Tensor], counter: Tensor, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(f"CapturedStep: device must be a GPU, got {device.type}. Call the step itself.")
        there = counter.device.type == "cuda" and device.index in (None, counter.device.index)
        if not there or counter.dtype != torch.int64 or counter.dim():
            raise ValueError(
                f"CapturedStep: counter must be an int64 tensor () on the GPU, got {counter.dtype} {tuple(counter.shape)} on "
                f"{counter.device}. Address draws with torch.zeros((), dtype=torch.int64, device='cuda')."
            )
        self.counter = counter
        # the capture's own stream would be the current device's
        with torch.cuda.device(counter.device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUP_STEPS):
                    step()
                    counter.add_(1)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream):
                self.result = step()
                counter.add_(1)

    def __call__(self) -> Tensor:
        """Run the step once more; returns its result, a tensor that the next call overwrites, e.g. ()."""
        self.graph.replay()
        return self.result
