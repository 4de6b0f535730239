"""A call as a CUDA graph: recorded once, replayed with the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["capture"]

# what is initialised lazily, as cuBLAS' workspaces, must be there before the capture
WARMUP_CALLS = 3


def capture(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Record a call; it may draw from torch's generator, and must not wait for the device.

    Returns:
        What replays it, and returns the result of the recording, overwritten by each replay.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_CALLS):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay
