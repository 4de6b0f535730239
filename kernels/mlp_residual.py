r"""The end of MLP branches: scaled, with their biases, added to the residual stream.

    y_i = r_i + sum_k c_ki (v_k,j + b_k)          d v_k,j = c_ki dy_i,          db_k = sum_i c_ki dy_i

for samples i, branches k, c_ki a number times a factor of the sample, and j = slot_k(i) the sample's row in a compact tensor that
holds only what is computed: c_ki = 0 where there is none. A bias may have factors of its own, also where its value is absent:
that of a linear map that runs once on the sum of two branches counts how many of them are there. The sums run over tokens too.
Bytes moved for N S D elements, a residual stream of r bytes and one branch of b bytes: forward 2 r + b, backward r + b. Eager
torch with DropPath moves 4 r + 2 b forward (scaling, conversion, addition) and 3 r + b backward (scaling, conversion, the sum).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from fastskel.kernels._backend import OPTIONS, CompileCase, Cost, device_of, jit, num_processors, tl
from fastskel.kernels.reference.mlp_residual import Branch
from torch import Tensor

__all__ = [
    "Branch", "blocks", "check_term", "contiguous", "mlp_residual", "mlp_residual_backward", "mlp_residual_cost", "places",
    "split_types",
]  # fmt: skip

TYPES = (torch.float32, torch.bfloat16, torch.float16)
# a warp reads 256 columns of bfloat16 in 16 bytes a thread; 4 warps hold 2 rows each
MAX_BLOCK_F, TILE, NUM_WARPS = 256, 2048, 4
# programs that a multiprocessor holds at a time: what their registers leave room for, forward and backward
FORWARD_OCCUPANCY, BACKWARD_OCCUPANCY = 8, 5


@jit()
def places(p_slots, p_factor, scale, i_row, m_row, num_tokens):
    """Return rows of a compact tensor, whether they are there, and what they are multiplied with, (BLOCK_R, 1) each."""
    i_compact = i_row.to(tl.int64)
    m_there = m_row
    factor = tl.zeros(i_row.shape, tl.float32) + scale
    if p_slots is not None:
        i_slot = tl.load(p_slots + i_row // num_tokens, mask=m_row, other=-1)
        m_there = i_slot >= 0
        i_compact = i_slot.to(tl.int64) * num_tokens + i_row % num_tokens
    if p_factor is not None:
        factor *= tl.load(p_factor + i_row // num_tokens, mask=m_there, other=0.0)
    return i_compact[:, None], m_there[:, None], factor[:, None]


@jit()
def _branch(
    p_value, p_slots, p_factor, p_bias, p_bias_factor, scale, bias_scale, i_row, i_d, m_row, m_d, num_tokens,
    D: tl.constexpr,
):  # fmt: skip
    i_compact, m_there, factor = places(p_slots, p_factor, scale, i_row, m_row, num_tokens)
    m_value = m_there & m_d[None, :]
    b_value = tl.load(p_value + i_compact * D + i_d[None, :], mask=m_value, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_bias = tl.load(p_bias + i_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        if p_bias_factor is None:
            b_value += b_bias
    b_out = tl.where(m_value, factor * b_value, 0.0)
    if p_bias_factor is not None:
        b_factor = bias_scale * tl.load(p_bias_factor + i_row // num_tokens, mask=m_row, other=0.0)
        b_out += b_factor[:, None] * b_bias
    return b_out


@jit(do_not_specialize=["scale0", "scale1", "bias_scale0", "bias_scale1", "num_rows", "num_tokens"])
def _mlp_residual_fwd_kernel(
    p_base, p_out, p_value0, p_slots0, p_factor0, p_bias0, p_bias_factor0, p_value1, p_slots1, p_factor1, p_bias1,
    p_bias_factor1, scale0, bias_scale0, scale1, bias_scale1, num_rows, num_tokens,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    num_blocks_d = tl.cdiv(D, BLOCK_F)
    for item in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_R) * num_blocks_d, tl.num_programs(0)):
        i_row = item // num_blocks_d * BLOCK_R + tl.arange(0, BLOCK_R)
        i_d = item % num_blocks_d * BLOCK_F + tl.arange(0, BLOCK_F)
        m_row, m_d = i_row < num_rows, i_d < D
        o_out = i_row.to(tl.int64)[:, None] * D + i_d[None, :]
        m_out = m_row[:, None] & m_d[None, :]
        b_out = _branch(
            p_value0, p_slots0, p_factor0, p_bias0, p_bias_factor0, scale0, bias_scale0, i_row, i_d, m_row, m_d,
            num_tokens, D,
        )  # fmt: skip
        if p_value1 is not None:
            b_out += _branch(
                p_value1, p_slots1, p_factor1, p_bias1, p_bias_factor1, scale1, bias_scale1, i_row, i_d, m_row, m_d,
                num_tokens, D,
            )  # fmt: skip
        if p_base is not None:
            b_out += tl.load(p_base + o_out, mask=m_out, other=0.0).to(tl.float32)
        tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)


@jit()
def _bias_grad(p_bias_factor, bias_scale, b_grad, factor, m_value, i_row, m_row, num_tokens):
    # what a branch's bias receives
    if p_bias_factor is None:
        b_d_bias = tl.where(m_value, factor * b_grad, 0.0)
    else:
        b_factor = bias_scale * tl.load(p_bias_factor + i_row // num_tokens, mask=m_row, other=0.0)
        b_d_bias = b_factor[:, None] * b_grad
    return b_d_bias


@jit(do_not_specialize=["scale0", "scale1", "bias_scale0", "bias_scale1", "num_rows", "num_tokens"])
def _mlp_residual_bwd_kernel(
    p_grad, p_d_value0, p_slots0, p_factor0, p_bias_factor0, p_sums0, p_d_value1, p_slots1, p_factor1, p_bias_factor1,
    p_sums1, scale0, bias_scale0, scale1, bias_scale1, num_rows, num_tokens,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    num_blocks_d = tl.cdiv(D, BLOCK_F)
    i_part, num_parts = tl.program_id(0) // num_blocks_d, tl.num_programs(0) // num_blocks_d
    i_d = tl.program_id(0) % num_blocks_d * BLOCK_F + tl.arange(0, BLOCK_F)
    m_d = i_d < D
    b_sums0 = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
    b_sums1 = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
    for i_block in range(i_part, tl.cdiv(num_rows, BLOCK_R), num_parts):
        i_row = i_block * BLOCK_R + tl.arange(0, BLOCK_R)
        m_row = i_row < num_rows
        o_grad = i_row.to(tl.int64)[:, None] * D + i_d[None, :]
        b_grad = tl.load(p_grad + o_grad, mask=m_row[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        i_compact0, m_value0, factor0 = places(p_slots0, p_factor0, scale0, i_row, m_row, num_tokens)
        m_value0 &= m_d[None, :]
        b_sums0 += _bias_grad(p_bias_factor0, bias_scale0, b_grad, factor0, m_value0, i_row, m_row, num_tokens)
        # loads before stores, which nothing can be moved across
        if p_d_value1 is not None:
            i_compact1, m_value1, factor1 = places(p_slots1, p_factor1, scale1, i_row, m_row, num_tokens)
            m_value1 &= m_d[None, :]
            b_sums1 += _bias_grad(p_bias_factor1, bias_scale1, b_grad, factor1, m_value1, i_row, m_row, num_tokens)
            b_d_value1 = (factor1 * b_grad).to(p_d_value1.dtype.element_ty)
            tl.store(p_d_value1 + i_compact1 * D + i_d[None, :], b_d_value1, mask=m_value1)
        b_d_value0 = (factor0 * b_grad).to(p_d_value0.dtype.element_ty)
        tl.store(p_d_value0 + i_compact0 * D + i_d[None, :], b_d_value0, mask=m_value0)
    if p_sums0 is not None:
        tl.store(p_sums0 + i_part * D + i_d, tl.sum(b_sums0, 0), mask=m_d)
    if p_sums1 is not None:
        tl.store(p_sums1 + i_part * D + i_d, tl.sum(b_sums1, 0), mask=m_d)


def blocks(columns: int) -> dict[str, int]:
    """Choose the tile of rows and columns (BLOCK_R, BLOCK_F), one piece of registers whatever its form."""
    block_f = min(MAX_BLOCK_F, 1 << (columns - 1).bit_length())
    # narrow tiles have more rows: with fewer numbers than threads, some would be held twice, and written while they are read
    return {"BLOCK_R": min(max(64, 512 // block_f), TILE // block_f), "BLOCK_F": block_f}


def check_term(function: str, number: int, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype,
               per_sample: Sequence[Tensor | None]) -> None:  # fmt: skip
    """Refuse a compact tensor that is not (n, *shape[1:]), and slots or factors that are not (N,) for shape (N, S, F)."""
    if tensor.shape[1:] != shape[1:] or tensor.dtype != dtype or dtype not in TYPES:
        raise ValueError(
            f"{function}: tensor {number} must be (n, {shape[1]}, {shape[2]}) in one of float32, bfloat16, float16 for all, "
            f"got {tuple(tensor.shape)} {tensor.dtype}. Convert it."
        )
    slots, *factors = per_sample
    if slots is None and len(tensor) != shape[0]:
        raise ValueError(
            f"{function}: tensor {number} must have {shape[0]} samples where there are no slots, got {len(tensor)}. Give slots."
        )
    for value, wanted in ((slots, torch.int32), *((factor, torch.float32) for factor in factors)):
        if value is not None and (value.shape != shape[:1] or value.dtype != wanted):
            raise ValueError(
                f"{function}: slots and factors of tensor {number} must be int32 and float32 ({shape[0]},), got {value.dtype} "
                f"{tuple(value.shape)}. Give one per sample."
            )


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Make what there is contiguous."""
    return None if tensor is None else tensor.contiguous()


def mlp_residual(base: Tensor | None, branches: Sequence[Branch], *, out: Tensor | None = None) -> Tensor:
    """Add scaled branches to the residual stream, in one pass.

    Args:
        base: Residual stream, (N, S, D), float32, bfloat16 or float16; None for zeros, where the first branch has no slots.
        branches: One or two, their values (n, S, D) in one type.
        out: Where to write, (N, S, D), contiguous; may be `base`, or without base the value of a branch without slots.
    Returns:
        (N, S, D) in the type of `out`, of `base`, or of the values.
    Raises:
        ValueError: On shapes or types that do not fit, or an `out` with other strides.
    """
    if base is None and branches and branches[0].slots is not None:
        raise ValueError("mlp_residual: base must be given where the first branch has slots, got None. Give zeros.")
    like = branches[0].value if base is None else base
    _check("mlp_residual", like, branches)
    if out is None:
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
    elif out.shape != like.shape or not out.is_contiguous() or out.dtype not in TYPES:
        raise ValueError(
            f"mlp_residual: out must be contiguous {tuple(like.shape)} of a floating-point type up to float32, got "
            f"{tuple(out.shape)} {out.dtype} with strides {out.stride()}. Allocate it so."
        )
    n, s, d = like.shape
    if out.numel():
        config = blocks(d)
        num_items = -(-n * s // config["BLOCK_R"]) * -(-d // config["BLOCK_F"])
        grid = (min(num_items, num_processors(like.device) * FORWARD_OCCUPANCY),)
        tensors, scales = [], []
        for branch in branches:
            bias_factor = None if branch.bias is None else branch.bias_factor
            tensors += [branch.value, branch.slots, branch.factor, branch.bias, bias_factor]
            scales += [branch.scale, branch.bias_scale]
        tensors = [contiguous(tensor) for tensor in tensors] + [None] * (10 - len(tensors))
        scales += [0.0] * (4 - len(scales))
        with device_of(like):
            _mlp_residual_fwd_kernel[grid](
                contiguous(base), out, *tensors, *scales, n * s, s, D=d, **config, num_warps=NUM_WARPS, **OPTIONS
            )
    return out


def mlp_residual_backward(
    grad: Tensor, branches: Sequence[Branch], *, programs: int | None = None
) -> list[Tensor | None]:
    """Differentiate `mlp_residual` for its branches, in one pass; that for `base` is `grad` itself.

    Args:
        grad: Gradient of the result, (N, S, D).
        branches: As in the forward pass, but `value` is where the gradient of the value is written, (n, S, D), contiguous; it may
            be `grad` itself where there is one branch without slots.
        programs: Programs that share the work, each with a partial sum of its own.
    Returns:
        Gradient of each branch's bias, (D,) float32; None where a branch has none.
    Raises:
        ValueError: On shapes or types that do not fit, or values with other strides.
    """
    _check("mlp_residual_backward", grad, branches)
    for branch in branches:
        if not branch.value.is_contiguous():
            raise ValueError(
                f"mlp_residual_backward: value must be contiguous, got strides {branch.value.stride()}. Allocate it so."
            )
    n, s, d = grad.shape
    config = blocks(d)
    num_blocks = -(-d // config["BLOCK_F"])
    programs = num_processors(grad.device) * BACKWARD_OCCUPANCY if programs is None else programs
    num_parts = min(-(-n * s // config["BLOCK_R"]), max(1, programs // num_blocks))
    sums = [
        None if branch.bias is None else torch.empty((num_parts, d), device=grad.device, dtype=torch.float32)
        for branch in branches
    ]
    if grad.numel():
        tensors, scales = [], []
        for branch, partial in zip(branches, sums):
            bias_factor = None if partial is None else contiguous(branch.bias_factor)
            tensors += [branch.value, contiguous(branch.slots), contiguous(branch.factor), bias_factor, partial]
            scales += [branch.scale, branch.bias_scale]
        tensors += [None] * (10 - len(tensors))
        scales += [0.0] * (4 - len(scales))
        with device_of(grad):
            _mlp_residual_bwd_kernel[(num_parts * num_blocks,)](
                grad.contiguous(), *tensors, *scales, n * s, s, D=d, **config, num_warps=NUM_WARPS, **OPTIONS
            )
    return [None if partial is None else partial.sum(0) for partial in sums]


def _check(function: str, like: Tensor, branches: Sequence[Branch]) -> None:
    if not 1 <= len(branches) <= 2:
        raise ValueError(f"{function}: branches must be one or two, got {len(branches)}. Call it again for more.")
    if like.dim() != 3 or like.dtype not in TYPES:
        raise ValueError(
            f"{function}: the residual stream must be (N, S, D) float32, bfloat16 or float16, got {tuple(like.shape)} "
            f"{like.dtype}. Convert it."
        )
    shape = tuple(like.shape)
    for number, branch in enumerate(branches):
        per_sample = (branch.slots, branch.factor, branch.bias_factor)
        check_term(function, number, branch.value, shape, branches[0].value.dtype, per_sample)
        if branch.bias is not None and branch.bias.shape != shape[2:]:
            raise ValueError(
                f"{function}: bias {number} must be {shape[2:]}, got {tuple(branch.bias.shape)}. Give one number per column."
            )


def mlp_residual_cost(
    counts: Sequence[int], num_rows: int, width: int, itemsize: int, residual_itemsize: int, backward: bool = False
) -> Cost:
    """Cost of a pass over (rows, width) and the rows that each branch computed; backward writes values, and no base."""
    streams = 1 if backward else 2
    return Cost(0, width * (sum(counts) * itemsize + streams * num_rows * residual_itemsize))


def split_types(types: Mapping[str, str | None]) -> tuple[dict[str, str], dict[str, None]]:
    """Part the types of a kernel's arguments into a case's signature and what is None."""
    return {name: kind for name, kind in types.items() if kind is not None}, {
        name: None for name, kind in types.items() if kind is None
    }


def _compile_cases() -> list[CompileCase]:
    # 4 views of 356 clips, of which DropPath leaves 9 of 10; one tile serves 50 and 64 tokens, which are an argument
    width, rows = 1024, 4 * 356 * 64
    cases = []
    scales = dict.fromkeys(("scale0", "bias_scale0", "scale1", "bias_scale1"), "fp32")
    sizes = {**scales, "num_rows": "i32", "num_tokens": "i32"}
    for kind in ("bf16", "fp32", "fp16"):
        itemsize = 4 if kind == "fp32" else 2
        counts = [rows, rows * 9 // 10]
        # as the dense layer ends: one branch of all samples whose bias counts, one of some
        for kernel, backward, types in (
            (_mlp_residual_fwd_kernel, False, {
                "p_base": "*fp32", "p_out": "*fp32", "p_value0": f"*{kind}", "p_slots0": None, "p_factor0": None,
                "p_bias0": "*fp32", "p_bias_factor0": "*fp32", "p_value1": f"*{kind}", "p_slots1": "*i32",
                "p_factor1": None, "p_bias1": f"*{kind}", "p_bias_factor1": None,
            }),
            (_mlp_residual_bwd_kernel, True, {
                "p_grad": "*fp32", "p_d_value0": f"*{kind}", "p_slots0": None, "p_factor0": None,
                "p_bias_factor0": "*fp32", "p_sums0": "*fp32", "p_d_value1": f"*{kind}", "p_slots1": "*i32",
                "p_factor1": None, "p_bias_factor1": None, "p_sums1": "*fp32",
            }),
        ):  # fmt: skip
            signature, absent = split_types(types)
            cases.append(
                CompileCase(
                    f"S=50, 64 {kind}, stream fp32", kernel, {**signature, **sizes},
                    {**absent, "D": width, **blocks(width)}, NUM_WARPS,
                    cost=mlp_residual_cost(counts, rows, width, itemsize, 4, backward), hot=kind == "bf16",
                )
            )  # fmt: skip
    return cases


COMPILE_CASES = _compile_cases()
