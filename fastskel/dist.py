"""Processes that share a batch: who they are, their rows together, their sums; with gradients.

A gradient here is that of the sum, over all processes, of what each makes of its result: what every process does with a shared
value counts once per process. All processes of a group must make the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    # builds of torch without it train in one process
    from torch.distributed import ProcessGroup

__all__ = ["all_reduce_sum", "exchange", "gather_rows", "rank_and_world", "start_sum"]


def rank_and_world(group: ProcessGroup | None = None) -> tuple[int, int]:
    """Return this process's rank and the number of processes, (0, 1) where none were set up.

    Args:
        group: Processes that count; None are all of them.
    Raises:
        ValueError: If a group is given without torch.distributed, or without this process in it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if group is None:
            return 0, 1
        raise ValueError(
            f"rank_and_world: group must be None before torch.distributed is initialised, got {type(group).__name__}. "
            "Call torch.distributed.init_process_group first."
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(
            "rank_and_world: group must hold this process, got a group without it. Call it in the group's processes only."
        )
    return rank, dist.get_world_size(group)


def exchange(values: Sequence[int], device: torch.device, group: ProcessGroup | None = None) -> list[tuple[int, ...]]:
    """Return every process's few integers, by rank; the host waits for the device.

    Args:
        values: As many in every process.
        device: Where the group's tensors lie: the CPU for gloo, a GPU for nccl.
        group: Processes that take part; None are all of them.
    """
    _, world = rank_and_world(group)
    if world == 1:
        return [tuple(values)]
    gathered = _gather(torch.tensor(values, dtype=torch.int64, device=device), world, group)
    return [tuple(row) for row in gathered.tolist()]


def start_sum(x: Tensor, group: ProcessGroup | None = None) -> dist.Work | None:
    """Begin to replace x, contiguous, (..., D) or scalar, by its sum over the processes, outside of autograd.

    Returns:
        What to wait for before x is read; None where this process is alone.
    """
    if rank_and_world(group)[1] == 1:
        return None
    work: dist.Work | None = dist.all_reduce(x, group=group, async_op=True)
    return work


def _wide(x: Tensor) -> Tensor:
    """Convert 16-bit numbers, which lose digits in every addition, to float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _gather(x: Tensor, world: int, group: ProcessGroup | None) -> Tensor:
    """Stack equal shapes (...) of the processes to (R, ...)."""
    out = x.new_empty(world, *x.shape)
    # named all_gather_into_tensor before torch 2.13
    function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    function(out.view(-1), x.reshape(-1), group=group)
    return out


def _scatter_sum(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum (R, ...) over the processes and return this one's part, (...)."""
    out = torch.empty_like(x[0])
    # named reduce_scatter_tensor before torch 2.13
    function = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    function(out.view(-1), x.reshape(-1), group=group)
    return out


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = torch.empty_like(_wide(x), memory_format=torch.contiguous_format).copy_(x)
        if work := start_sum(total, group):
            work.wait()
        return total.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grad, ctx.group), None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: tuple[int, ...], group: ProcessGroup | None) -> Tensor:
        ctx.counts, ctx.group = counts, group
        # all send as many rows as the largest has
        padding = (0, 0, 0, max(counts) - x.shape[-2])
        gathered = _gather(torch.nn.functional.pad(x, padding), len(counts), group)
        return torch.cat([rows[..., :count, :] for rows, count in zip(gathered, counts, strict=True)], -2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _ScatterRows.apply(grad, ctx.counts, ctx.group), None, None  # type: ignore[no-untyped-call]


class _ScatterRows(torch.autograd.Function):
    """The transpose of _GatherRows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: tuple[int, ...], group: ProcessGroup | None) -> Tensor:
        ctx.counts, ctx.group = counts, group
        padded = _wide(x).new_zeros(len(counts), *x.shape[:-2], max(counts), x.shape[-1])
        for part, rows, count in zip(padded, torch.split(x, list(counts), -2), counts, strict=True):
            part[..., :count, :] = rows
        return _scatter_sum(padded, group)[..., : counts[dist.get_rank(group)], :].to(x.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _GatherRows.apply(grad, ctx.counts, ctx.group), None, None  # type: ignore[no-untyped-call]


def all_reduce_sum(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Sum a tensor (..., D) or scalar over the processes, 16-bit numbers in float32; its gradient is summed over them likewise.

    Args:
        x: Of one shape and type in every process.
        group: Processes that take part; None are all of them.
    Returns:
        The sum in every process, of x's shape and type.
    Raises:
        ValueError: If this process is not in the group.
    """
    rank_and_world(group)
    total: Tensor = _AllReduceSum.apply(x, group)  # type: ignore[no-untyped-call]
    return total


def gather_rows(x: Tensor, group: ProcessGroup | None = None, counts: Sequence[int] | None = None) -> Tensor:
    """Lay the processes' rows below each other, in the order of their ranks.

    The gradient of a process's rows is the sum, over all processes, of the gradients of what they gathered.

    Args:
        x: Rows of this process, (..., n, D); processes may differ in n, which may be 0.
        group: Processes that take part; None are all of them.
        counts: Rows of every process by rank, if known: then the host need not wait for the device.
    Returns:
        All rows, (..., N, D), in every process.
    Raises:
        ValueError: If x has no rows to speak of, other extents than elsewhere, or other rows than counts says.
    """
    if x.dim() < 2:
        raise ValueError(f"gather_rows: x must be (..., n, D), got {tuple(x.shape)}. Give it a dimension of rows.")
    rank, world = rank_and_world(group)
    if counts is None:
        width, batch = x.shape[-1], x.shape[:-2].numel()
        shapes = exchange((x.shape[-2], width, batch), x.device, group)
        if any(shape[1:] != shapes[0][1:] for shape in shapes):
            raise ValueError(
                f"gather_rows: x must agree in all but its rows with other processes, got {tuple(x.shape)} in process {rank} "
                f"and (rows, D, others) {shapes} by rank. Pass the same features everywhere."
            )
        counts = [shape[0] for shape in shapes]
    elif len(counts) != world or counts[rank] != x.shape[-2]:
        raise ValueError(
            f"gather_rows: counts must name {x.shape[-2]} rows for process {rank} of {world}, got {list(counts)}. "
            "Exchange them again."
        )
    if world == 1:
        return x.clone()
    gathered: Tensor = _GatherRows.apply(x, tuple(counts), group)  # type: ignore[no-untyped-call]
    return gathered
