"""Reads clip files in several threads, in order, and never many ahead of the one that is asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["read_ahead"]

# what may wait for its turn: memory does not grow with the data set
MOST_BYTES = 64 << 20
FILES_PER_THREAD = 4

T = TypeVar("T")


def read_ahead(
    paths: Sequence[str], sizes: Sequence[int], read: Callable[[str], T], threads: int
) -> Generator[tuple[str, T], None, None]:
    """Yield (path, what `read` makes of it) in the order of the paths, (n,).

    Args:
        paths: Path of each file.
        sizes: Bytes of each, (n,).
        read: Called by several threads at once, in any order; parsers in C++ release the GIL.
        threads: Threads, at least 1.
    """
    waiting: deque[tuple[str, int, Future[T]]] = deque()
    held = 0
    pool = ThreadPoolExecutor(threads, thread_name_prefix="pack")
    try:
        for path, size in zip(paths, sizes, strict=True):
            while waiting and (len(waiting) >= FILES_PER_THREAD * threads or held + size > MOST_BYTES):
                first, freed, future = waiting.popleft()
                held -= freed
                yield first, future.result()
            waiting.append((path, size, pool.submit(read, path)))
            held += size
        for first, _, future in waiting:
            yield first, future.result()
    finally:
        # the reader of the results may stop at any time
        pool.shutdown(cancel_futures=True)
