"""A view's program as the kernel reads it, checked against the clips, and the tables that its normalisation needs."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fastskel.kernels._backend import tl
from torch import Tensor

__all__ = ["CROP", "FRAMES", "JOINTS", "NOISE", "SPATIAL", "Structure", "ViewTables", "constant", "structure", "view_tables"]

# uses of words: part of their addresses
CROP, SPATIAL, JOINTS, NOISE, FRAMES = 1, 2, 3, 8, 9
# kinds of stages, and of the records of a linear stage: their places are the numbers that the kernel knows
STAGES = ("linear", "mirror", "noise", "blur", "frame-mask", "body-mask")
LINEAR = ("one-of", "shear", "rotation", "scaling", "joint-mask", "joint-corruption")
STREAMS = ("joint", "bone", "motion")
NORMALISATIONS = ("none", "center", "center-first", "align")
# words of a transform: JOINTS leads to as many joints, FRAMES to as many frames, NOISE to as many coordinates
MAX_JOINTS, MAX_FRAMES, MAX_NOISE = 64, 1 << 16, 1 << 24
MAX_TAPS = 255

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class ViewTables:
    """A view's program, made ready for the clips of one device.

    Attributes:
        program: The program without its alignment, as JSON.
        table: What normalisation subtracts, float32: of each frame, (sum T, C), or each clip, (n, C), or with a rotation
            behind it, (n, 12); None without normalisation.
        shape: M, V and C of the clips that they are for.
        size: Frames of all clips and number of clips.
    """

    program: str
    table: Tensor | None
    shape: Shape
    size: tuple[int, int]


@dataclass(frozen=True)
class Structure:
    """A program as the kernel reads it.

    Attributes:
        frames: T.
        crop: Whether it is random, its lower and upper share (the ratio of a centre crop) in units of 2^-24, its least length.
        stages: Tuples (kind, number, count, flag, o_values, extra, begin, end). Adjacent linear transforms are one stage, of kind
            0, with the records from begin to end. `extra` is where the mirror's joints begin, or a power of two that holds
            the blur's taps.
        records: Linear transforms, options of one-of on their own: tuples (kind, number, option, options, count, flag, o_values).
        blur: Place of the blur among the stages, or their number.
        normalise, stream: As in the program.
        values: Probabilities and amplitudes of all transforms, one after the other.
        joints: Mirrored joints, then parents.
        o_parents: Where the parents begin.
    """

    frames: int
    crop: tuple[bool, int, int, int]
    stages: tuple[tuple[int, ...], ...]
    records: tuple[tuple[int, ...], ...]
    blur: int
    normalise: str
    stream: str
    values: tuple[float, ...]
    joints: tuple[int, ...]
    o_parents: int


def constant(value: int) -> Any:
    """A number that Triton code may read from its module."""
    return value if tl is None else tl.constexpr(value)


def view_tables(program: Mapping[str, Any], frames: Tensor, offsets: Tensor) -> ViewTables:
    """Check a view's program against clips, and make on their device, once, what its normalisation needs.

    Args:
        program: What `fastskel.data.program.view_program` returns.
        frames: All frames, (sum T, M, V, C), float32.
        offsets: Where each clip begins and ends among them, (n + 1,), int64.
    Returns:
        The tables; they serve every view that is made of these clips with this program.
    Raises:
        ValueError: If the program or the clips are not as they must be. Waits for the device.
    """
    name = "view_tables"
    if frames.dim() != 4 or frames.dtype != torch.float32 or frames.shape[3] not in (2, 3):
        raise ValueError(
            f"{name}: frames must be float32 (sum T, M, V, C) with 2 or 3 channels, got {frames.dtype} {tuple(frames.shape)}. "
            "Use the loader's other engines for such clips."
        )
    if offsets.dim() != 1 or offsets.dtype != torch.int64 or offsets.device != frames.device or len(offsets) < 2:
        raise ValueError(
            f"{name}: offsets must be int64 (n + 1,) on {frames.device}, got {offsets.dtype} {tuple(offsets.shape)} on "
            f"{offsets.device}. Put them beside the frames."
        )
    shape = (frames.shape[1], frames.shape[2], frames.shape[3])
    counts = offsets.diff()
    bounds = int(offsets[0]), int(offsets[-1]), int(counts.min())
    if bounds[0] != 0 or bounds[1] != len(frames) or bounds[2] < 1:
        raise ValueError(
            f"{name}: offsets must rise from 0 to {len(frames)}, got {bounds[0]} to {bounds[1]} with least step {bounds[2]}. "
            "Open the data set again."
        )
    text = json.dumps({key: value for key, value in program.items() if key != "alignment"}, sort_keys=True)
    parsed = structure(text, shape)
    # places within a clip are 32 bits wide
    longest, row = int(counts.max()), shape[0] * shape[1] * shape[2]
    if max(longest * row, parsed.frames * row, 2 * parsed.frames * longest) >= 1 << 31:
        raise ValueError(
            f"{name}: a clip must have fewer numbers than 2^31, got {longest} frames of {row}, for views of {parsed.frames}. "
            "Cut the clip."
        )
    return ViewTables(text, _table(program, frames, offsets), shape, (len(frames), len(counts)))


@functools.lru_cache(maxsize=256)
def structure(program: str, shape: Shape) -> Structure:
    """Read the program of `ViewTables` for clips of M bodies, V joints and C channels; ValueError where it is not supported."""
    content = json.loads(program)
    _, num_joints, num_channels = shape
    frames = content["frames"]
    _check("frames", isinstance(frames, int) and frames >= 1, "at least 1", frames)
    kind, *shares = content["crop"]
    _check("crop", (kind, len(shares)) in (("random", 3), ("center", 1)), "random or center", content["crop"])
    crop = (True, *shares) if kind == "random" else (False, 0, shares[0], 1)
    for key, known in (("normalise", NORMALISATIONS), ("stream", STREAMS)):
        _check(key, content[key] in known, f"one of {', '.join(known)}", content[key])
    _check("normalise", content["normalise"] != "align" or num_channels == 3, "another kind for flat clips", "align")
    centre = content["centre_joint"]
    _check("centre_joint", content["normalise"] == "none" or 0 <= centre < num_joints, f"in 0 .. {num_joints - 1}", centre)
    values: list[float] = []
    joints: list[int] = []
    stages: list[tuple[int, ...]] = []
    records: list[tuple[int, ...]] = []
    for number, transform in enumerate(content["transforms"]):
        options = transform["options"] if transform["kind"] == "one-of" else [transform]
        if all(option["kind"] in LINEAR[1:] for option in options):
            begin = stages.pop()[6] if stages and stages[-1][0] == 0 else len(records)
            for i, option in enumerate(options):
                records.append(_linear(option, number, i, len(options), shape, values))
            stages.append((0, number, 0, 0, 0, 0, begin, len(records)))
        else:
            # options of one-of are linear
            stages.append(_other(options[0] if len(options) == 1 else transform, number, frames, shape, values, joints))
    blurs = [place for place, stage in enumerate(stages) if stage[0] == STAGES.index("blur")]
    _check("transforms", len(blurs) <= 1, "with at most one blur", f"{len(blurs)}")
    o_parents = len(joints)
    if content["stream"] == "bone":
        joints += _joints("parents", content["parents"], num_joints)
    return Structure(
        frames, crop, tuple(stages), tuple(records), blurs[0] if blurs else len(stages), content["normalise"], content["stream"],
        tuple(values), tuple(joints), o_parents,
    )  # fmt: skip


def _linear(
    transform: Mapping[str, Any], number: int, option: int, options: int, shape: Shape, values: list[float]
) -> tuple[int, ...]:
    kind, place = transform["kind"], len(values)
    count = transform.get("count", 0)
    limit = min(MAX_JOINTS, shape[1])
    _check(f"count of {kind}", 0 <= count <= limit, f"at most {limit} joints", count)
    if kind == "joint-corruption":
        values.append(transform["zero_probability"])
    elif kind == "shear":
        values.append(transform["amplitude"])
    else:
        values.append(transform["probability"])
    if kind == "rotation":
        values.extend(transform["angles"])
    if kind == "scaling":
        values.extend((transform["low"], transform["high"]))
    return (LINEAR.index(kind), number, option, options, count, int(transform.get("per_axis", False)), place)


def _other(
    transform: Mapping[str, Any], number: int, frames: int, shape: Shape, values: list[float], joints: list[int]
) -> tuple[int, ...]:
    kind, place, extra = transform["kind"], len(values), 0
    count = transform.get("count", 0)
    flag = 0
    _check("transforms", kind in STAGES[1:], f"of {', '.join((*LINEAR, *STAGES[1:]))}", repr(kind))
    values.append(transform["probability"])
    if kind == "mirror":
        extra, flag = len(joints), int(transform["reflect"])
        joints += _joints("joints of mirror", transform["joints"], shape[1])
    elif kind == "noise":
        size = frames * shape[0] * shape[1] * shape[2]
        _check("noise", size < MAX_NOISE, f"for views of fewer than {MAX_NOISE} coordinates", size)
        values.append(transform["std"])
    elif kind == "blur":
        count = transform["taps"]
        _check("taps of blur", count % 2 == 1 and 1 <= count <= MAX_TAPS, f"odd and at most {MAX_TAPS}", count)
        padding = transform["padding"]
        _check("padding of blur", padding in ("edge", "zero"), "edge or zero", repr(padding))
        extra, flag = 1 << (count - 1).bit_length(), int(transform["normalise"]) + 2 * (padding == "zero")
        values.extend((transform["low"], transform["high"]))
    elif kind == "frame-mask":
        limit = min(frames, MAX_FRAMES)
        _check("count of frame-mask", 0 <= count <= limit, f"at most {limit} frames", count)
    return (STAGES.index(kind), number, count, flag, place, extra, 0, 0)


def _joints(argument: str, joints: Sequence[int], num_joints: int) -> list[int]:
    fits = joints is not None and len(joints) == num_joints and all(0 <= joint < num_joints for joint in joints)
    _check(argument, fits, f"{num_joints} joints of as many", joints)
    return list(joints)


def _check(argument: str, fits: bool, contract: str, actual: object) -> None:
    if not fits:
        raise ValueError(
            f"augment: {argument} must be {contract}, got {actual}. Use the loader's other engines for such a view."
        )


def _table(program: Mapping[str, Any], frames: Tensor, offsets: Tensor) -> Tensor | None:
    kind = program["normalise"]
    if kind == "none":
        return None
    held = _held_centres(frames[:, 0, program["centre_joint"]], offsets)
    if kind == "center":
        return held
    first = held[offsets[:-1]]
    if kind == "center-first":
        return first.contiguous()
    given = program["alignment"]
    alignment = torch.empty(0) if given is None else torch.as_tensor(given, dtype=torch.float64).to(frames.device)
    if alignment.shape != (len(first), 4, 3):
        expected, actual = (len(first), 4, 3), tuple(alignment.shape)
        raise ValueError(f"view_tables: alignment must be {expected}, got {actual}. Make it for these clips.")
    # a clip that shows no whole body is moved, not turned
    still = alignment[:, 0].isnan().any(dim=1)
    origin = torch.where(still[:, None], first.double(), alignment[:, 0])
    rotation = torch.where(still[:, None, None], torch.eye(3, dtype=torch.float64, device=frames.device), alignment[:, 1:])
    return torch.cat([origin, rotation.flatten(1)], dim=1).float().contiguous()


def _held_centres(track: Tensor, offsets: Tensor) -> Tensor:
    """Find the centre of each frame (sum T, C): the last one known in its clip, else the first known, else that of frame 0."""
    size = len(track)
    place = torch.arange(size, device=track.device)
    known = (track != 0).any(dim=1)
    clip = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=track.device), offsets.diff())
    begin, end = offsets[clip], offsets[clip + 1]
    last = torch.where(known, place, -1).cummax(0).values
    later = torch.where(known, place, size).flip(0).cummin(0).values.flip(0)
    return track[torch.where(last >= begin, last, torch.where(later < end, later, begin))]
