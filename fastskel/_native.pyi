"""Native routines (csrc/bindings*.cpp). Arguments are checked and never converted; the GIL is released."""

import os
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

def philox_words(
    seed: int, index: NDArray[np.uint32], step: int, view: NDArray[np.uint32], use: int, num: int
) -> NDArray[np.uint32]:
    """Draw words (N, num) for samples `index` (N,) and their view numbers `view` (N,), both contiguous."""

def crop_resize(clip: NDArray[np.float32], start: int, length: int, out_frames: int) -> NDArray[np.float32]:
    """Crop a contiguous clip (T, M, V, C) in time and resize it to (out_frames, M, V, C)."""

class NativeError(RuntimeError):
    """What went wrong in native code; `clip` is the number of the clip at fault, a scalar, or -1."""

    clip: int

class Clips:
    """The n clips (T, M, V, C) of a packed data set, as native code reads them."""

    @staticmethod
    def open(frames: str | os.PathLike[str], offsets: str | os.PathLike[str]) -> Clips:
        """Map a file of frames, (sum T, M, V, C) float32, and read one of offsets, (n + 1,); NativeError names a bad one."""

    @staticmethod
    def borrow(frames: NDArray[np.float32], offsets: NDArray[np.int64]) -> Clips:
        """Use contiguous arrays (sum T, M, V, C) and (n + 1,); the frames are kept alive, not copied."""

    def __len__(self) -> int: ...
    def check_unchanged(self) -> None:
        """Raise NativeError if the mapped file, (sum T, M, V, C), has become shorter than it was."""

class ViewMakers:
    """Views of clips (T, M, V, C), one for each of some programs (`fastskel.data.program.view_program`)."""

    def __init__(
        self,
        clips: Clips,
        programs: list[dict[str, Any]],
        *,
        seed: int,
        dtype: Literal["float32", "float16", "bfloat16"],
        views: list[int] | None = None,
    ) -> None:
        """Prepare views (N, T, M, V, C); `views` numbers them for their draws, else they count from 0."""

    def make(self, epoch: int, index: NDArray[np.int64]) -> list[tuple[NDArray[Any], NDArray[np.bool_]]]:
        """Make the views of clips `index` (N,) in this thread.

        Each is clips (N, T, M, V, C) in float32, float16 or, as its bits in uint16, bfloat16, and a mask (N, T, M).
        """

class BatchStream:
    """Batches of views (N, T, M, V, C) in a given order, made ahead by threads; their bits do not depend on the threads."""

    def __init__(
        self, views: ViewMakers, *, batch_size: int, num_threads: int, depth: int, keep: bool = False
    ) -> None:
        """Make views (N, T, M, V, C) at most `depth` batches ahead; with 0 threads each when asked for.

        With `keep`, memory is never freed before `close`.
        """

    def start(self, epoch: int, order: NDArray[np.int64], position: int) -> None:
        """Begin an epoch: batches of the clips `order` (n,), from batch `position` on. What was in the making is dropped."""

    def next(self) -> tuple[list[tuple[NDArray[Any], NDArray[np.bool_]]], NDArray[np.int64], int] | None:
        """Wait for the next batch; None after the last.

        Returns views, each clips (N, T, M, V, C) in float32, float16 or, as its bits in uint16, bfloat16, and mask (N, T, M),
        the clips' numbers (N,), and the number of the slot that holds the arrays. They are the caller's: the slot is used
        again when the last of them is gone. What goes wrong in making a batch is raised in its turn and ends the epoch.
        """

    def stop(self) -> None:
        """Drop what is in the making; `next` then returns None instead of batches (N, T, M, V, C)."""

    def close(self) -> None:
        """Stop, end the threads and free what nobody holds; batches (N, T, M, V, C) that were handed out stay."""

    @property
    def slots_allocated(self) -> int: ...
    @property
    def slots_held(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...
    @property
    def seconds_waited(self) -> float: ...

def available_cpus() -> int:
    """Count the CPUs, a scalar of at least 1, that affinity and control groups leave to this process."""

def epoch_order(
    seed: int,
    epoch: int,
    n: int,
    *,
    shuffle: bool,
    weights: NDArray[np.uint64] | None = None,
    num_draws: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_samples: int | None = None,
) -> NDArray[np.int64]:
    """Order positions of range(n) for an epoch: shuffled, as they are, or drawn with `weights` (n,), `num_draws` or n of them.

    The result (num_samples,) is the share of one rank: entries rank, rank + world_size, .. of the order repeated from its
    beginning, by default as many as make all ranks equal.
    """

def instructions() -> str:
    """Name the instruction set that views are made with: avx512, avx2 or baseline."""

def set_instructions(name: str) -> None:
    """Choose the instruction set for every view from now on, for tests: all give the same bits."""

def parse_ntu(
    data: bytes, path: str, num_joints: int, all_values: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """Parse NTU RGB+D skeleton text of bodies with V joints.

    Returns the bodies in each frame (T,), and frame after frame the body numbers (B,), the tracker's values (B, 9): clipped
    edges, left hand's confidence and state, right hand's, restricted, lean x, y, tracking state; and the joints (B, V, 3), or
    with `all_values` (B, V, 12): x, y, z, depth x, y, colour x, y, orientation w, x, y, z, tracking state. A ValueError
    names line and path.
    """
