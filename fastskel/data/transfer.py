"""Host batches to a GPU, ahead of their use and beside its other work."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch

from fastskel.data.batch import Batch

__all__ = ["transferred"]

# batches on their way: more would only hold memory, a copy takes less time than a step
AHEAD = 2


def transferred(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy batches of views (N, T, M, V, C) to a device on a stream of its own, `AHEAD` of their use.

    A batch belongs to the stream that is current when it is asked for. What goes wrong in making one is raised when those
    before it were delivered.

    Args:
        batches: Batches on the host, from pinned memory if copies are to run beside other work.
        device: A CUDA device.
    """
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    moving: deque[tuple[Batch, torch.cuda.Event]] = deque()
    # the host's memory may be written again only when its copy is done
    held: deque[tuple[Batch, torch.cuda.Event]] = deque()
    failures: list[Exception] = []

    def made() -> Iterator[Batch]:
        try:
            yield from batches
        except Exception as error:
            failures.append(error)

    def ready() -> Batch:
        moved, copied = moving.popleft()
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        for tensor in (*(t for view in moved.views for t in (view.clips, view.mask)), moved.labels, *moved.extras.values()):
            # allocated on the side stream, used on this one
            tensor.record_stream(current)
        return moved

    try:
        for batch in made():
            with torch.cuda.stream(side):
                moved = batch.to(device, non_blocking=True)
                copied = side.record_event()
            moving.append((moved, copied))
            held.append((batch, copied))
            # copies that do not keep up are waited for, or the host's memory would grow
            while held and (len(held) > AHEAD + 1 or held[0][1].query()):  # type: ignore[no-untyped-call]
                held.popleft()[1].synchronize()
            if len(moving) > AHEAD:
                yield ready()
        while moving:
            yield ready()
        if failures:
            raise failures.pop()
    finally:
        side.synchronize()
