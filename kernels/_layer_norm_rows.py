"""What the forward and the backward pass of layer normalisation share: rows of compact tensors, tiles and launches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from fastskel.kernels._backend import OPTIONS, CompileCase, Cost, device_of, jit, tl
from torch import Tensor

__all__ = [
    "PROGRAMS",
    "block_offsets",
    "check_written",
    "coefficient",
    "compile_case",
    "launch",
    "load_block",
    "nbytes",
    "optional",
    "residual_block",
    "row_mask",
    "slot_of",
    "tile_of",
]

# numbers of one program's tile where rows are short
TILE = 1024
# programs of one multiprocessor: some times what it holds, so that none is waited for
PROGRAMS = 32
# nothing to pipeline without matrix products
STAGES = 1
TRITON_TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", float: "fp32", int: "i32",
}  # fmt: skip


@jit()
def load_block(p_values, o_values, m_values):
    return tl.load(p_values + o_values, mask=m_values, other=0.0).to(tl.float32)


@jit()
def slot_of(p_slots, i_n):
    slot = i_n
    if p_slots is not None:
        slot = tl.load(p_slots + i_n).to(tl.int64)
    return slot


@jit()
def row_mask(i_s, wanted, num_tokens):
    # a sample that is left out has no tokens
    return i_s < tl.where(wanted, num_tokens, 0)


@jit()
def block_offsets(i_n, i_s, i_d, num_tokens, D: tl.constexpr):
    return (i_n * num_tokens + i_s)[:, None] * D + i_d[None, :]


@jit()
def coefficient(p_factor, scale, slot, i_n):
    value = scale
    if p_factor is not None:
        value = scale * tl.load(p_factor + i_n).to(tl.float32)
    # a sample that the branch leaves out adds nothing, even where its factor is infinite
    return tl.where(slot >= 0, value, 0.0)


@jit()
def residual_block(
    p_base, p_branch, p_branch_slots, p_factor, scale, wanted, i_n, i_s, i_d, m_d, num_tokens, D: tl.constexpr
):
    m_base = row_mask(i_s, wanted, num_tokens)[:, None] & m_d[None, :]
    r = load_block(p_base, block_offsets(i_n, i_s, i_d, num_tokens, D), m_base)
    if p_branch is not None:
        slot = slot_of(p_branch_slots, i_n)
        m_branch = row_mask(i_s, wanted & (slot >= 0), num_tokens)[:, None] & m_d[None, :]
        branch = load_block(p_branch, block_offsets(slot, i_s, i_d, num_tokens, D), m_branch)
        r += coefficient(p_factor, scale, slot, i_n) * branch
    return r


def tile_of(num_tokens: int, width: int) -> dict[str, int]:
    """Choose the tile of one program for (N, S, D): tokens of a sample, in whole rows."""
    block_d = 1 << (width - 1).bit_length()
    block_s = max(1, min(TILE // block_d, 1 << (num_tokens - 1).bit_length()))
    return {"D": width, "BLOCK_S": block_s, "BLOCK_D": block_d}


def _num_warps(width: int) -> int:
    # four numbers a thread: 16 bytes of an fp32 residual stream, and the same layout for every type
    return 8 if width <= TILE else 16


def launch(kernel: Any, arguments: Mapping[str, Any], programs: int) -> None:
    """Launch one of the two kernels; nothing for no samples."""
    items = arguments["size"] * -(-arguments["num_tokens"] // arguments["BLOCK_S"])
    if items:
        with device_of(arguments["p_rstd1"]):
            kernel[(min(items, programs),)](**arguments, num_warps=_num_warps(arguments["D"]), num_stages=STAGES, **OPTIONS)


def optional(tensor: Tensor | None) -> Tensor | None:
    """Make what is read contiguous, if there is anything."""
    return None if tensor is None else tensor.contiguous()


def check_written(function: str, **written: Tensor | None) -> None:
    """Refuse to write to what is not contiguous.

    Raises:
        ValueError: If a tensor is not.
    """
    for argument, tensor in written.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{function}: {argument} must be contiguous, got strides {tensor.stride()}. Allocate it contiguously."
            )


def nbytes(*tensors: Tensor | None) -> int:
    """Add up the bytes of tensors, of which some may be None."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def compile_case(label: str, kernel: Any, arguments: Mapping[str, Any], cost: Cost, hot: bool) -> CompileCase:
    """Describe a launch with meta tensors as a case of offline compilation."""
    # what the kernels take as constexprs has a name in capitals
    constexprs = {name: value for name, value in arguments.items() if value is None or name.isupper()}
    signature = {
        name: TRITON_TYPES[value.dtype if isinstance(value, Tensor) else type(value)]
        for name, value in arguments.items()
        if name not in constexprs
    }
    warps = _num_warps(constexprs["D"])
    return CompileCase(label, kernel, signature, constexprs, num_warps=warps, num_stages=STAGES, cost=cost, hot=hot)
