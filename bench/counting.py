"""Counts what a step launches and moves, operation by operation, on tensors without values.

Runs under fake CPU tensors: shapes and types are those of a real step, nothing is computed, and published sizes take seconds.
Autocast on a CPU chooses the types that it chooses on a GPU but for the softmax of scores, which is small here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from fastskel.bench.harness import CPU_ATTENTION
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

__all__ = ["COPY_BYTES_PER_S", "MATMUL_FLOPS_PER_S", "Counter", "Entry"]

# measured on an H200: a copy of a GiB, read and written; a product of 8192 x 8192 in bf16
COPY_BYTES_PER_S = 4.3e12
MATMUL_FLOPS_PER_S = 790e12

# give a name to memory that exists, or change nothing in it
FREE = {
    "detach", "alias", "view", "_unsafe_view", "_reshape_alias", "expand", "t", "transpose", "permute",
    "select", "slice", "split", "split_with_sizes", "unbind", "unsqueeze", "squeeze", "as_strided",
    "diagonal", "lift_fresh", "empty", "empty_like", "new_empty", "empty_strided", "is_same_size",
    "new_empty_strided",
}  # fmt: skip
PRODUCTS = {
    "mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "_linear_pointwise", "addmv", "mv", "convolution",
    "convolution_backward", "_addmm_activation",
}  # fmt: skip
# overwrite their first argument without reading it, or read its shape only
OVERWRITING = {"copy_", "fill_", "zero_", "new_zeros", "zeros_like", "ones_like", "full_like", "new_full"}


@dataclass
class Entry:
    """One kind of launch.

    Attributes:
        phase: Part of the step.
        name: Operation or kernel.
        shape: Sizes that tell products apart: rows, columns and summed length, and how many of them.
        launches: How often.
        flops: Operations of matrix products, over all launches.
        bytes: Bytes read and written at least, over all launches.
    """

    phase: str
    name: str
    shape: tuple[int, ...] = ()
    launches: int = 0
    flops: int = 0
    bytes: int = 0

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product, (M, N, K) or a batch of them."""
        return bool(self.shape)

    @property
    def milliseconds(self) -> float:
        """Time on an H200 at least: of its operations, or of its bytes."""
        return 1e3 * max(self.flops / MATMUL_FLOPS_PER_S, self.bytes / COPY_BYTES_PER_S)


def _num_bytes(tensor: Tensor) -> int:
    # an expanded tensor is as large as what it was expanded from
    numel = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= size if stride else 1
    return numel * tensor.element_size()


def _product_shape(name: str, args: tuple[Any, ...]) -> tuple[int, ...]:
    tensors = [a for a in args if isinstance(a, Tensor) and a.dim() >= 2]
    if name in ("convolution", "_linear_pointwise", "convolution_backward"):
        x, weight = tensors[-2:] if name == "convolution_backward" else tensors[:2]
        return x.numel() // weight.shape[1], weight.shape[0], weight.shape[1]
    if name.startswith(("addm", "baddbmm", "_addmm")):
        tensors = tensors[-2:]
    a, b = tensors[0], tensors[-1] if len(tensors) > 1 else tensors[0]
    return (*a.shape, b.shape[-1]) if a.dim() == 3 else (a.shape[0], b.shape[-1], a.shape[1])


class Counter(TorchDispatchMode):
    """Counts every operation that runs inside, forward and backward, in the phase it is in.

    Attributes:
        phase: Where what follows belongs.
        muted: Whether what follows is left out, as it is inside the stand-in of a kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.muted = False
        self._found: dict[tuple[str, str, tuple[int, ...]], Entry] = {}

    def add(self, name: str, flops: int, num_bytes: int, shape: tuple[int, ...] = ()) -> None:
        """Count one launch; `shape` (M, N, K) for a matrix product."""
        entry = self._found.setdefault((self.phase, name, shape), Entry(self.phase, name, shape))
        entry.launches += 1
        entry.flops += flops
        entry.bytes += num_bytes

    def entries(self) -> list[Entry]:
        """List what was found, the longest first within its phase."""
        order = {phase: number for number, phase in enumerate(dict.fromkeys(e.phase for e in self._found.values()))}
        return sorted(self._found.values(), key=lambda e: (order[e.phase], -e.milliseconds))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.muted:
            return out
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        if name in FREE or getattr(func, "namespace", "") == "prim":
            return out
        read = args[1:] if name in OVERWRITING else args
        named = {key: value for key, value in (kwargs or {}).items() if key not in ("out", "grad_input")}
        inputs = [t for t in tree_leaves((read, named)) if isinstance(t, Tensor)]
        # operations on lists of tensors write to the first and return nothing
        outputs = [t for t in tree_leaves(args[0] if out is None else out) if isinstance(t, Tensor)]
        if not outputs:
            return out
        num_bytes = sum(map(_num_bytes, inputs)) + sum(map(_num_bytes, outputs))
        if name == "index_select":
            # only the rows that are asked for are read
            num_bytes = 2 * _num_bytes(out)
        elif name in ("index_add_", "index_copy_"):
            # only the rows that are given are touched
            num_bytes = (3 if name == "index_add_" else 2) * _num_bytes(inputs[-1])
        packet = getattr(func, "overloadpacket", None)
        # torch has formulas for what returns a new tensor only
        formula = flop_registry.get(packet) or flop_registry.get(getattr(torch.ops.aten, name.rstrip("_"), None))
        formula = formula or CPU_ATTENTION.get(packet)
        if formula in CPU_ATTENTION.values():
            flops = formula(*tree_map(lambda t: t.shape if isinstance(t, Tensor) else t, args))
        else:
            flops = formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        shape = _product_shape(name, args) if name in PRODUCTS else ()
        self.add(name, flops, num_bytes, shape)
        return out
