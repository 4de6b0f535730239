r"""Views of skeleton clips made where the clips lie: crop, resize, random transforms, stream and conversion in one launch.

A view's clip (T, M, V, C) is a function of clip number, seed, epoch and view number, by Philox words at the same addresses as on
the CPU. Its frame i is y_i = (1 - w) x[start + lower] + w x[start + upper] of the normalised clip x; then the transforms, each
linear one a matrix for every joint, p' = p A, neighbours multiplied first; then the stream.
Definition: `fastskel.data.views.make_view`; equal to it within rounding (crops, joints and frames that are drawn are equal).
Bytes moved: each clip's frames read once (its views are made by programs that run beside each other), each view written once with
a byte for each frame and body; eager torch passes over the batch some 15 times.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import torch
from fastskel.kernels._augment_draws import crop
from fastskel.kernels._augment_points import evaluate, load_resized, plan, present
from fastskel.kernels._augment_program import Structure, ViewTables, structure, view_tables
from fastskel.kernels._backend import (
    INTERPRETED,
    OPTIONS,
    CompileCase,
    Cost,
    cpu_kernel,
    device_of,
    jit,
    num_processors,
    tl,
)
from fastskel.kernels.reference.augment import augment as augment_reference
from torch import Tensor

__all__ = ["ViewTables", "augment", "augment_cost", "augment_views", "view_tables"]

TYPES = (torch.float32, torch.bfloat16, torch.float16)
WORD_LIMIT, VIEW_LIMIT = 1 << 32, 1 << 16
# frames that a program has in registers; a program is one warp: no warp draws what another has drawn, and none waits for another
BLOCK_FRAMES, NUM_WARPS = 2, 1
# interpreted, an operation takes as long whatever its block
HOST_BLOCK_FRAMES = 8
# programs that a multiprocessor holds at most: views are cut into parts where there are fewer
PROGRAMS = 32


def augment(
    frames: Tensor,
    offsets: Tensor,
    index: Tensor,
    program: Mapping[str, Any] | ViewTables,
    *,
    seed: int,
    epoch: int,
    view: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Make one view of some clips.

    Args:
        frames: All frames, (sum T, M, V, C), float32, C of 2 or 3.
        offsets: Clip i is frames[offsets[i]:offsets[i + 1]], (n + 1,), int64.
        index: Numbers of the clips, (N,), int64. They are not checked: on a GPU that would wait for the device.
        program: What `fastskel.data.program.view_program` returns, or better, once and for all, `view_tables` of it.
        seed: 64-bit key of the draws.
        epoch: Epoch of the draws, below 2^32.
        view: View number of the draws, below 2^16.
        dtype: Of the result: float32, bfloat16 or float16.
    Returns:
        Clips (N, T, M, V, C) of `dtype`, and mask (N, T, M), bool: frame and body present.
    Raises:
        ValueError: On shapes, types, numbers out of range, and programs that are not supported.
    """
    clips, mask = augment_views(frames, offsets, index, program, 1, view, seed, epoch, dtype)
    return clips[0], mask[0]


def augment_views(
    frames: Tensor,
    offsets: Tensor,
    index: Tensor,
    program: Mapping[str, Any] | ViewTables,
    num_views: int,
    first_view: int,
    seed: int,
    epoch: int,
    dtype: torch.dtype = torch.float32,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Make all views of a batch that share one program, in one launch.

    Args:
        frames, offsets, index, program, seed, epoch, dtype: As for `augment`.
        num_views: W.
        first_view: View w has the number first_view + w.
        out: Contiguous tensors to write, as they are returned.
    Returns:
        Clips (W, N, T, M, V, C) and mask (W, N, T, M).
    Raises:
        ValueError: As `augment`.
    """
    tables = program if isinstance(program, ViewTables) else view_tables(program, frames, offsets)
    name = "augment"
    expected_frames, expected_offsets = (tables.size[0], *tables.shape), (tables.size[1] + 1,)
    if frames.dtype != torch.float32 or tuple(frames.shape) != expected_frames or not frames.is_contiguous():
        raise ValueError(
            f"{name}: frames must be float32, contiguous, (sum T, M, V, C) = {expected_frames}, got {frames.dtype} "
            f"{tuple(frames.shape)}. Make the tables for these clips."
        )
    if tuple(offsets.shape) != expected_offsets:
        raise ValueError(
            f"{name}: offsets must be (n + 1,) = {expected_offsets}, got {tuple(offsets.shape)}. Make the tables for these clips."
        )
    for argument, tensor in (("offsets", offsets), ("index", index)):
        if tensor.dtype != torch.int64 or tensor.dim() != 1 or tensor.device != frames.device:
            raise ValueError(
                f"{name}: {argument} must be int64 (N,) on {frames.device}, got {tensor.dtype} {tuple(tensor.shape)} on "
                f"{tensor.device}. Put it beside the frames."
            )
    if dtype not in TYPES:
        raise ValueError(f"{name}: dtype must be float32, bfloat16 or float16, got {dtype}. Choose one.")
    for argument, value, bound in (
        ("seed", seed, 1 << 64),
        ("epoch", epoch, WORD_LIMIT),
        ("first_view", first_view, VIEW_LIMIT),
        ("num_views", num_views, VIEW_LIMIT - first_view + 1),
    ):
        if not 0 <= value < bound:
            raise ValueError(f"{name}: {argument} must be in [0, {bound}), got {value}. Choose another {argument}.")
    # an operator's integers are signed 64 bits: the same bits, read as such
    seed = seed - (1 << 64) if seed >= 1 << 63 else seed
    if out is None:
        clips, mask = _operator(
            frames, offsets, index, tables.table, tables.program, num_views, first_view, seed, epoch, dtype
        )
        return clips, mask
    parsed = structure(tables.program, tables.shape)
    shape = (num_views, len(index), parsed.frames, *tables.shape)
    for tensor, expected, kind in zip(out, (shape, shape[:4]), (dtype, torch.bool)):
        if tuple(tensor.shape) != expected or tensor.dtype != kind or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: out must be contiguous {kind} {expected}, got {tensor.dtype} {tuple(tensor.shape)}. Allocate it so."
            )
        if tensor.device != frames.device:
            raise ValueError(f"{name}: out must be on {frames.device}, got {tensor.device}. Put it beside the frames.")
    write = augment_triton if frames.is_cuda or INTERPRETED else _copy_reference
    write(frames, offsets, index, tables.table, tables.program, num_views, first_view, seed, epoch, *out)
    return out


@jit(do_not_specialize=["num_samples", "num_views", "first_view", "seed_low", "seed_high", "epoch", "num_parts"])
def _augment_kernel(
    p_frames, p_offsets, p_index, p_table, p_values, p_joints, p_clips, p_mask, num_samples, num_views, first_view, seed_low,
    seed_high, epoch, num_parts, T: tl.constexpr, M: tl.constexpr, V: tl.constexpr, C: tl.constexpr, RANDOM: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, LEAST: tl.constexpr, STAGES: tl.constexpr, RECORDS: tl.constexpr, BLUR: tl.constexpr,
    NORMALISE: tl.constexpr, STREAM: tl.constexpr, PARENTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    # views of one clip beside each other: they read the same frames
    i_program = tl.program_id(0)
    i_view = i_program % num_views
    i_part = i_program // num_views % num_parts
    i_n = i_program // num_views // num_parts
    clip = tl.load(p_index + i_n)
    begin = tl.load(p_offsets + clip)
    num_frames = (tl.load(p_offsets + clip + 1) - begin).to(tl.int32)
    seed = seed_low.to(tl.uint32, bitcast=True).to(tl.uint64) | (seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32)
    address = (seed, clip.to(tl.uint32), epoch.to(tl.uint32, bitcast=True), (first_view + i_view).to(tl.uint32))
    start, length = crop(address, num_frames, RANDOM, LOW, HIGH, LEAST)
    p_clip = p_frames + (begin + start) * (M * V * C)
    if NORMALISE == "center":
        p_table += (begin + start) * C
    elif NORMALISE == "center-first":
        p_table += clip * C
    elif NORMALISE == "align":
        p_table += clip * 12
    b_place = tl.minimum(tl.arange(0, BLOCK_P), M * V - 1)[None, :]
    b_source, draws = plan(address, p_values, p_joints, b_place, STAGES, RECORDS, M, V, C)
    if STREAM == "bone":
        b_parent = b_place // V * V + tl.load(p_joints + PARENTS + b_place % V)
        b_other, others = plan(address, p_values, p_joints, b_parent, STAGES, RECORDS, M, V, C)
    o_view = (i_view.to(tl.int64) * num_samples + i_n) * T
    p_view = p_clips + o_view * (M * V * C)
    for first in range(i_part * BLOCK_T, T, num_parts * BLOCK_T):
        i_frame = first + tl.arange(0, BLOCK_T)[:, None]
        i_t = tl.minimum(i_frame, T - 1)
        resized = load_resized(p_clip, p_table, length, i_t, b_source, NORMALISE, T, M, V, C)
        point = evaluate(address, p_clip, p_table, length, resized, i_t, b_source, draws, STAGES, BLUR, NORMALISE, T, M, V, C)
        for m in tl.static_range(M):
            b_present = tl.max((present(resized, C) & (b_place // V == m)).to(tl.int32), 1, keep_dims=True)
            tl.store(p_mask + (o_view + i_frame) * M + m, b_present.to(tl.uint8), mask=i_frame < T)
        if STREAM == "bone":
            base = load_resized(p_clip, p_table, length, i_t, b_other, NORMALISE, T, M, V, C)
            base = evaluate(address, p_clip, p_table, length, base, i_t, b_other, others, STAGES, BLUR, NORMALISE, T, M, V, C)
            point = _difference(point, base, C)
        if STREAM == "motion":
            i_next = tl.minimum(i_t + 1, T - 1)
            near = load_resized(p_clip, p_table, length, i_next, b_source, NORMALISE, T, M, V, C)
            near = evaluate(address, p_clip, p_table, length, near, i_next, b_source, draws, STAGES, BLUR, NORMALISE, T, M, V, C)
            point = _difference(near, point, C)
        _store(p_view + first * (M * V * C), point, T - first, M * V, C, BLOCK_T, BLOCK_P)


@jit()
def _difference(first, second, C: tl.constexpr):
    out = ()
    for c in tl.static_range(C):
        out += (first[c] - second[c],)
    return out


@jit()
def _store(p_rows, point, num_rows, PLACES: tl.constexpr, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr):
    kind = p_rows.dtype.element_ty
    # channels become neighbours in a warp, so that a store covers whole sectors
    if C == 2:
        b_row = tl.join(point[0].to(kind), point[1].to(kind))
        i_c = tl.arange(0, 2)[None, None, :]
    else:
        b_even = tl.join(point[0].to(kind), point[2].to(kind))
        b_odd = tl.join(point[1].to(kind), point[1].to(kind))
        b_row = tl.reshape(tl.join(b_even, b_odd), [BLOCK_T, BLOCK_P, 4])
        i_c = tl.arange(0, 4)[None, None, :]
    i_row = tl.arange(0, BLOCK_T)[:, None, None]
    i_place = tl.arange(0, BLOCK_P)[None, :, None]
    # 64 bits: what a thread adds to its first address is part of the instruction
    o_row = i_row.to(tl.int64) * (PLACES * C) + (i_place.to(tl.int64) * C + i_c)
    tl.store(p_rows + o_row, b_row, mask=(i_row < num_rows) & ((i_place < PLACES) & (i_c < C)))


def augment_cost(num_frames: int, num_views: int, num_samples: int, shape: tuple[int, int, int, int], itemsize: int) -> Cost:
    """Cost of W views (T, M, V, C) of N clips, of whose frames `num_frames` are read in all."""
    frames, bodies, joints, channels = shape
    row = bodies * joints * channels
    return Cost(0, 4 * num_frames * row + num_views * num_samples * frames * (row * itemsize + bodies))


def _constants(parsed: Structure, shape: tuple[int, int, int], block_frames: int = BLOCK_FRAMES) -> dict[str, Any]:
    random, low, high, least = parsed.crop
    return {
        "T": parsed.frames, "M": shape[0], "V": shape[1], "C": shape[2], "RANDOM": random, "LOW": low, "HIGH": high,
        "LEAST": least, "STAGES": parsed.stages, "RECORDS": parsed.records, "BLUR": parsed.blur, "NORMALISE": parsed.normalise,
        "STREAM": parsed.stream, "PARENTS": parsed.o_parents, "BLOCK_P": 1 << (shape[0] * shape[1] - 1).bit_length(),
        "BLOCK_T": block_frames,
    }  # fmt: skip


def _compile_cases() -> list[CompileCase]:
    # four views of 356 clips, about 80 frames of each clip read
    frames, shape, samples, views = 64, (2, 25, 3), 356, 4
    one_of: dict[str, Any] = {
        "kind": "one-of",
        "options": [
            {"kind": "joint-corruption", "count": 15, "zero_probability": 0.5},
            {"kind": "shear", "amplitude": 1.0},
        ],
    }
    every = [
        {"kind": "rotation", "angles": (0.3, 0.3, 0.3), "probability": 1.0},
        one_of,
        {"kind": "scaling", "low": 0.9, "high": 1.1, "per_axis": True, "probability": 0.5},
        {"kind": "mirror", "joints": tuple(range(25)), "reflect": True, "probability": 0.5},
        {"kind": "noise", "std": 0.01, "probability": 0.5},
        {"kind": "blur", "low": 0.1, "high": 2.0, "taps": 15, "probability": 0.5, "normalise": True, "padding": "edge"},
        {"kind": "joint-mask", "count": 3, "probability": 1.0},
        {"kind": "frame-mask", "count": 6, "probability": 1.0},
        {"kind": "body-mask", "probability": 0.5},
    ]
    numbers = ("num_samples", "num_views", "first_view", "seed_low", "seed_high", "epoch", "num_parts")
    cases = []
    for label, transforms, normalise, kind in (
        ("USDRL", [one_of], "none", "fp32"),
        ("USDRL", [one_of], "none", "bf16"),
        ("USDRL", [one_of], "none", "fp16"),
        ("everything", every, "align", "bf16"),
    ):
        program = {
            "frames": frames, "crop": ("random", 1677722, 16777216, 64), "normalise": normalise, "centre_joint": 1,
            "transforms": transforms, "stream": "joint", "parents": None,
        }  # fmt: skip
        pointers = {"p_frames": "*fp32", "p_offsets": "*i64", "p_index": "*i64", "p_table": "*fp32", "p_values": "*fp32"}
        pointers |= {"p_joints": "*i32", "p_clips": f"*{kind}", "p_mask": "*u8"}
        constants = _constants(structure(json.dumps(program), shape), shape)
        if normalise == "none":
            del pointers["p_table"]
            constants["p_table"] = None
        cost = augment_cost(80 * samples, views, samples, (frames, *shape), 4 if kind == "fp32" else 2)
        cases.append(
            CompileCase(
                f"{label} {kind}", _augment_kernel, {**pointers, **dict.fromkeys(numbers, "i32")}, constants,
                num_warps=NUM_WARPS, num_stages=1, cost=cost, hot=label == "USDRL",
            )
        )  # fmt: skip
    return cases


COMPILE_CASES = _compile_cases()


@functools.lru_cache(maxsize=256)
def _prepared(program: str, shape: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Numbers and joints of a program on a device, and the kernel's constants."""
    parsed = structure(program, shape)
    values = torch.tensor(parsed.values or (0.0,), dtype=torch.float32, device=device)
    joints = torch.tensor(parsed.joints or (0,), dtype=torch.int32, device=device)
    block_frames = BLOCK_FRAMES if device.type == "cuda" else HOST_BLOCK_FRAMES
    return values, joints, _constants(parsed, shape, block_frames)


def augment_triton(
    frames: Tensor,
    offsets: Tensor,
    index: Tensor,
    table: Tensor | None,
    program: str,
    num_views: int,
    first_view: int,
    seed: int,
    epoch: int,
    clips: Tensor,
    mask: Tensor,
) -> None:
    """Launch the kernel, which writes clips (W, N, T, M, V, C) and mask (W, N, T, M)."""
    num_samples = len(index)
    if not clips.numel():
        return
    shape = (frames.shape[1], frames.shape[2], frames.shape[3])
    values, joints, constants = _prepared(program, shape, frames.device)
    num_programs = num_samples * num_views
    wanted = num_processors(frames.device) * (PROGRAMS if frames.is_cuda else 1)
    num_parts = min(-(-clips.shape[2] // constants["BLOCK_T"]), max(1, wanted // num_programs))
    with device_of(frames):
        _augment_kernel[(num_programs * num_parts,)](
            frames, offsets.contiguous(), index.contiguous(), table, values, joints, clips, mask.view(torch.uint8), num_samples,
            num_views, first_view, _signed(seed), _signed(seed >> 32), _signed(epoch), num_parts, **constants,
            num_warps=NUM_WARPS, num_stages=1, **OPTIONS,
        )  # fmt: skip


def _signed(word: int) -> int:
    # always the same type of argument, whatever the number
    return (word + (1 << 31)) % (1 << 32) - (1 << 31)


@functools.lru_cache(maxsize=256)
def _num_frames(program: str) -> int:
    return int(json.loads(program)["frames"])


def _allocate(frames: Tensor, index: Tensor, program: str, num_views: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (num_views, index.shape[0], _num_frames(program), *frames.shape[1:])
    return frames.new_empty(shape, dtype=dtype), frames.new_empty(shape[:4], dtype=torch.bool)


def _forward(
    frames: Tensor,
    offsets: Tensor,
    index: Tensor,
    table: Tensor | None,
    program: str,
    num_views: int,
    first_view: int,
    seed: int,
    epoch: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    out = _allocate(frames, index, program, num_views, dtype)
    augment_triton(frames, offsets, index, table, program, num_views, first_view, seed, epoch, *out)
    return out


def _reference(
    frames: Tensor,
    offsets: Tensor,
    index: Tensor,
    table: Tensor | None,
    program: str,
    num_views: int,
    first_view: int,
    seed: int,
    epoch: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    content = json.loads(program)
    return augment_reference(frames, offsets, index, table, content, num_views, first_view, seed, epoch, dtype)


def _copy_reference(
    frames: Tensor,
    offsets: Tensor,
    index: Tensor,
    table: Tensor | None,
    program: str,
    num_views: int,
    first_view: int,
    seed: int,
    epoch: int,
    clips: Tensor,
    mask: Tensor,
) -> None:
    made = _reference(frames, offsets, index, table, program, num_views, first_view, seed, epoch, clips.dtype)
    clips.copy_(made[0])
    mask.copy_(made[1])


_operator = torch.library.custom_op(
    "fastskel::augment",
    _forward,
    mutates_args=(),
    device_types="cuda",
    schema=(
        "(Tensor frames, Tensor offsets, Tensor index, Tensor? table, str program, int num_views, int first_view, SymInt seed, "
        "SymInt epoch, ScalarType dtype) -> (Tensor, Tensor)"
    ),
)
_operator.register_kernel("cpu")(cpu_kernel(_reference, _forward))


@_operator.register_fake
def _(
    frames: Tensor,
    offsets: Tensor,
    index: Tensor,
    table: Tensor | None,
    program: str,
    num_views: int,
    first_view: int,
    seed: int,
    epoch: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return _allocate(frames, index, program, num_views, dtype)
