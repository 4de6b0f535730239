r"""Philox4x32-10 words of addressed samples, drawn where they are used.

Word w of sample i is word w mod 4 of the block with counter (index_i, step, view_i | use << 16, w div 4) under the
64-bit seed as key. One round maps, with multipliers A = 0xD2511F53 and B = 0xCD9E8D57,
    (c0, c1, c2, c3) -> (hi(B c2) ^ c1 ^ k0, lo(B c2), hi(A c0) ^ c3 ^ k1, lo(A c0)),
and raises the key by (0x9E3779B9, 0xBB67AE85). Integer valued: there is no backward.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
Bytes moved: 16 N read, 8 N num written; eager torch passes over intermediates of that size some 20 times a round.
"""

from __future__ import annotations

import torch
from fastskel.kernels._backend import OPTIONS, CompileCase, cpu_kernel, device_of, jit, tl, triton
from fastskel.kernels.reference.philox import philox_words as philox_words_reference
from torch import Tensor

__all__ = ["philox_words"]

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# samples and blocks of one program; a sample needs few blocks, a batch has many samples
BLOCK_N = 64
BLOCK_Q = 4


def philox_words(
    index: Tensor, view: Tensor | int, seed: int | Tensor, step: int | Tensor, use: int, num: int
) -> Tensor:
    """Draw random words for samples, each a function of its address alone.

    Args:
        index: Global sample index, (N,), integers in [0, 2**32).
        view: View number, one for all or (N,), in [0, 2**16).
        seed: 64-bit key; as a tensor (), int64, its bits. A captured graph repeats numbers and reads tensors again.
        step: Optimiser step or epoch, below 2**32; or a tensor (), int64.
        use: What the draw is for, below 2**16.
        num: Words per sample.
    Returns:
        Words in [0, 2**32), (N, num), int64.
    Raises:
        ValueError: On shapes, types and numbers out of range. The values of tensors are checked on the CPU only: on a
            GPU that would wait for the device, and their low bits count.
    """
    if isinstance(view, int):
        if not 0 <= view < 1 << 16:
            raise ValueError(f"philox_words: view must be in [0, 2**16), got {view}. Number views from 0.")
        view = torch.full_like(index, view, dtype=torch.int64)
    if index.ndim != 1 or index.dtype not in INTEGERS:
        raise ValueError(
            f"philox_words: index must be integers (N,), got {index.dtype} {tuple(index.shape)}. Give one per sample."
        )
    if view.shape != index.shape or view.dtype not in INTEGERS or view.device != index.device:
        raise ValueError(
            f"philox_words: view must be integers {tuple(index.shape)} on {index.device}, got {view.dtype} "
            f"{tuple(view.shape)} on {view.device}. Give one per sample, beside index."
        )
    for argument, value, bits in (("seed", seed, 64), ("step", step, 32), ("use", use, 16), ("num", num, 31)):
        if isinstance(value, Tensor):
            if value.dtype != torch.int64 or value.dim():
                raise ValueError(
                    f"philox_words: {argument} must be an int or an int64 tensor (), got {value.dtype} "
                    f"{tuple(value.shape)}. Give one {argument} for all samples."
                )
        elif not 0 <= value < 1 << bits:
            raise ValueError(
                f"philox_words: {argument} must be in [0, 2**{bits}), got {value}. Choose another {argument}."
            )
    address = None
    # an operator's integers are signed 64 bits: the same bits, read as such
    if isinstance(seed, int) and seed >= 1 << 63:
        seed -= 1 << 64
    if isinstance(seed, Tensor) or isinstance(step, Tensor):
        parts = [
            value.to(index.device, non_blocking=True)
            if isinstance(value, Tensor)
            else torch.full((), value, dtype=torch.int64, device=index.device)
            for value in (seed, step)
        ]
        address, seed, step = torch.stack(parts), 0, 0
    words: Tensor = _operator(index, view, address, seed, step, use, num)
    return words


@jit(do_not_specialize=["seed", "step", "use", "num", "size"])
def _philox_words_kernel(
    p_index, p_view, p_address, p_words, seed, step, use, num, size, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr
):
    if p_address is not None:
        seed = tl.load(p_address)
        step = tl.load(p_address + 1)
    # axis 0 alone takes more than 65,535 programs: samples and blocks share it
    num_programs_q = tl.cdiv(tl.cdiv(num, 4), BLOCK_Q)
    i_program = tl.program_id(0)
    i_n = (i_program // num_programs_q).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_q = (i_program % num_programs_q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_n = i_n < size
    index = tl.load(p_index + i_n, mask=m_n, other=0).to(tl.uint32)
    view = tl.load(p_view + i_n, mask=m_n, other=0).to(tl.uint32) & 0xFFFF
    # counters of 64 bits would silently select another generator: every one is made uint32
    zero = tl.zeros([BLOCK_N, BLOCK_Q], tl.uint32)
    c0 = zero + index[:, None]
    c1 = zero + step.to(tl.uint32)
    c2 = zero + (view | (use.to(tl.uint32) << 16))[:, None]
    c3 = zero + i_q.to(tl.uint32)[None, :]
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    o_words = i_n[:, None] * num + (4 * i_q)[None, :]
    m_words = m_n[:, None] & (4 * i_q < num)[None, :]
    tl.store(p_words + o_words, w0.to(tl.int64), mask=m_words)
    tl.store(p_words + o_words + 1, w1.to(tl.int64), mask=m_words & (4 * i_q + 1 < num)[None, :])
    tl.store(p_words + o_words + 2, w2.to(tl.int64), mask=m_words & (4 * i_q + 2 < num)[None, :])
    tl.store(p_words + o_words + 3, w3.to(tl.int64), mask=m_words & (4 * i_q + 3 < num)[None, :])


# sizes are arguments, so a case is a set of types: small and 64-bit seeds, and steps that leave int32
COMPILE_CASES = [
    CompileCase(
        label=f"index {index}, " + ("address on the device" if address else f"seed {seed}, step {step}"),
        kernel=_philox_words_kernel,
        signature={
            "p_index": f"*{index}",
            "p_view": "*i64",
            **({"p_address": "*i64"} if address else {}),
            "p_words": "*i64",
            "seed": seed,
            "step": step,
            "use": "i32",
            "num": "i32",
            "size": "i32",
        },
        constexprs={"BLOCK_N": BLOCK_N, "BLOCK_Q": BLOCK_Q, **({} if address else {"p_address": None})},
    )
    for index, address, seed, step in (
        ("i64", False, "i32", "i32"),
        ("i64", False, "i64", "i32"),
        ("i32", False, "i64", "i64"),
        ("i64", True, "i32", "i32"),
    )
]


def philox_words_triton(
    index: Tensor, view: Tensor, address: Tensor | None, seed: int, step: int, use: int, num: int
) -> Tensor:
    """Launch the kernel on addresses (N,); returns words (N, num)."""
    size = index.shape[0]
    words = torch.empty((size, num), device=index.device, dtype=torch.int64)
    if words.numel():
        grid = (triton.cdiv(size, BLOCK_N) * triton.cdiv(triton.cdiv(num, 4), BLOCK_Q),)
        with device_of(index):
            _philox_words_kernel[grid](
                index.contiguous(),
                view.contiguous(),
                address,
                words,
                seed,
                step,
                use,
                num,
                size,
                BLOCK_N=BLOCK_N,
                BLOCK_Q=BLOCK_Q,
                **OPTIONS,
            )
    return words


_operator = torch.library.custom_op(
    "fastskel::philox_words",
    philox_words_triton,
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor index, Tensor view, Tensor? address, SymInt seed, SymInt step, int use, int num) -> Tensor",
)


def _reference(
    index: Tensor, view: Tensor, address: Tensor | None, seed: int, step: int, use: int, num: int
) -> Tensor:
    if address is not None:
        seed, step = address.tolist()
    return philox_words_reference(index, view, seed, step, use, num)


_operator.register_kernel("cpu")(cpu_kernel(_reference, philox_words_triton))


@_operator.register_fake
def _(index: Tensor, view: Tensor, address: Tensor | None, seed: int, step: int, use: int, num: int) -> Tensor:
    return index.new_empty((index.shape[0], num), dtype=torch.int64)
