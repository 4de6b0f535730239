"""Views of skeleton clips in plain torch, drawn from Philox words: one clip and view at a time, one step after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from fastskel.kernels.reference.philox import philox_words
from torch import Tensor

__all__ = ["augment", "crop_bounds"]

CROP, SPATIAL, JOINTS, NOISE, FRAMES = 1, 2, 3, 8, 9
LINEAR = ("joint-corruption", "shear", "rotation", "scaling", "joint-mask", "one-of")
ONE = 1 << 24


class Address(NamedTuple):
    """Where the draws of a clip's view come from; `transform` is the number of a transform, p."""

    seed: int
    clip: int
    epoch: int
    view: int
    transform: int = 0

    def words(self, use: int, first: int, num: int) -> Tensor:
        """Words `first` .. `first` + `num` - 1 of a use, (num,), int64 in [0, 2^32)."""
        clip, view = torch.tensor([self.clip]), torch.tensor([self.view])
        return philox_words(clip, view, self.seed, self.epoch, use, num, first=first)[0]

    def spatial(self, word: int, num: int = 1) -> Tensor:
        """Words of the transform's SPATIAL block, (num,)."""
        return self.words(SPATIAL, 64 * self.transform + word, num)

    def coin(self, probability: float) -> bool:
        """Whether the transform is applied."""
        return bool(_uniform(self.spatial(1))[0] < torch.tensor(probability, dtype=torch.float32))


def augment(
    frames: Tensor,
    offsets: Tensor,
    index: Tensor,
    table: Tensor | None,
    program: Mapping[str, Any],
    num_views: int,
    first_view: int,
    seed: int,
    epoch: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Make W views of some clips.

    Args:
        frames: All frames, (sum T, M, V, C), float32 or, for a finer result, float64.
        offsets: Where clips begin and end among them, (n + 1,).
        index: Clip numbers, (N,).
        table: What normalisation subtracts: (sum T, C), (n, C) or (n, 12), by its kind.
        program: The view's program.
        num_views: W.
        first_view: View w draws as number first_view + w.
        seed: 64-bit key, as its bits.
        epoch: Epoch of the draws.
        dtype: Of the clips.
    Returns:
        Clips (W, N, T, M, V, C) and mask (W, N, T, M), bool.
    """
    shape = (num_views, len(index), program["frames"], *frames.shape[1:])
    clips = torch.empty(shape, dtype=dtype, device=frames.device)
    mask = torch.empty(shape[:4], dtype=torch.bool, device=frames.device)
    for row, clip in enumerate(index.tolist()):
        begin, end = offsets[clip : clip + 2].tolist()
        normalised = _normalise(frames[begin:end], table, program["normalise"], clip, begin)
        for view in range(num_views):
            address = Address(seed, clip, epoch, first_view + view)
            values = _resize(normalised, *crop_bounds(address, program["crop"], end - begin), program["frames"])
            mask[view, row] = (values != 0).flatten(2).any(-1)
            clips[view, row] = _stream(_transform(values, address, program["transforms"]), program).to(dtype)
    return clips, mask


def crop_bounds(address: Address, crop: tuple[Any, ...], num_frames: int) -> tuple[int, int]:
    """First frame and length of a crop of a clip."""
    if crop[0] == "center":
        start = num_frames * (ONE - crop[1]) // (2 * ONE)
        return start, num_frames - 2 * start
    _, low, high, least = crop
    word0, word1 = address.words(CROP, 0, 2).tolist()
    scale = low + ((high - low) * (word0 >> 8) >> 24)
    length = min(max(num_frames * scale >> 24, least), num_frames)
    return word1 * (num_frames - length + 1) >> 32, length


def _normalise(clip: Tensor, table: Tensor | None, kind: str, number: int, begin: int) -> Tensor:
    if table is None:
        return clip
    present = (clip != 0).any(-1, keepdim=True).to(clip.dtype)
    if kind == "center":
        return (clip - table[begin : begin + len(clip), None, None]) * present
    moved = clip - table[number, : clip.shape[-1]]
    if kind == "align":
        rotation = table[number, 3:].view(3, 3).to(clip.dtype)
        moved = _product(moved[..., None, :], rotation.T)[..., 0, :]
    return moved * present


def _resize(clip: Tensor, start: int, length: int, frames: int) -> Tensor:
    numerator = ((2 * torch.arange(frames, device=clip.device) + 1) * length - frames).clamp_min(0)
    lower = numerator // (2 * frames)
    upper = (lower + 1).clamp_max(length - 1)
    weight = ((numerator % (2 * frames)).double() / (2 * frames)).to(clip.dtype)[:, None, None, None]
    return (1 - weight) * clip[start + lower] + weight * clip[start + upper]


def _transform(values: Tensor, address: Address, transforms: list[dict[str, Any]]) -> Tensor:
    matrix: Tensor | None = None
    for number, transform in enumerate(transforms):
        own = address._replace(transform=number)
        if transform["kind"] in LINEAR:
            drawn = _matrices(transform, own, values.shape[-2], values.shape[-1], values)
            matrix = drawn if matrix is None else _product(matrix, drawn)
            continue
        if matrix is not None:
            values, matrix = _product(values[..., None, :], matrix)[..., 0, :], None
        if own.coin(transform["probability"]):
            values = DISTORTIONS[transform["kind"]](values, transform, own)
    return values if matrix is None else _product(values[..., None, :], matrix)[..., 0, :]


def _product(first: Tensor, second: Tensor) -> Tensor:
    total = first[..., :, 0, None] * second[..., None, 0, :]
    for k in range(1, first.shape[-1]):
        total = total + first[..., :, k, None] * second[..., None, k, :]
    return total


def _matrices(transform: Mapping[str, Any], address: Address, joints: int, channels: int, like: Tensor) -> Tensor:
    """One matrix for each joint, (V, C, C), for row vectors."""
    kind = transform["kind"]
    if kind == "one-of":
        options = transform["options"]
        return _matrices(options[_below(address.spatial(0), len(options))], address, joints, channels, like)
    result = torch.eye(3).repeat(joints, 1, 1)
    drawn = 2 * _uniform(address.spatial(4, 9)) - 1
    if kind == "shear":
        sheared = torch.eye(3)
        sheared[[0, 0, 1, 1, 2, 2], [1, 2, 0, 2, 0, 1]] = drawn[:6] * torch.tensor(transform["amplitude"])
        result[:] = sheared.T
    elif kind == "joint-corruption":
        zero = address.coin(transform["zero_probability"])
        result[_distinct(address.words(JOINTS, 64 * address.transform, transform["count"]), joints)] = (
            torch.zeros(3, 3) if zero else drawn.view(3, 3)
        )
    elif not address.coin(transform["probability"]):
        pass
    elif kind == "joint-mask":
        result[_distinct(address.words(JOINTS, 64 * address.transform, transform["count"]), joints)] = 0
    elif kind == "scaling":
        low, high = torch.tensor(transform["low"]), torch.tensor(transform["high"])
        factors = low + (high - low) * _uniform(address.spatial(4, 3))
        result[:] = torch.diag(factors if transform["per_axis"] else factors[:1].expand(3))
    else:
        result[:] = _rotation(drawn[:3] * torch.tensor(transform["angles"]), channels)
    return result[:, :channels, :channels].to(like)


def _rotation(angles: Tensor, channels: int) -> Tensor:
    (sx, sy, sz), (cx, cy, cz) = angles.double().sin().float().tolist(), angles.double().cos().float().tolist()
    about_x = torch.tensor([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = torch.tensor([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = torch.tensor([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z if channels == 2 else _product(_product(about_x, about_y), about_z)


def _mirror(values: Tensor, transform: Mapping[str, Any], address: Address) -> Tensor:
    values = values[..., list(transform["joints"]), :].clone()
    if transform["reflect"]:
        values[..., 0] *= -1
    return values


def _noise(values: Tensor, transform: Mapping[str, Any], address: Address) -> Tensor:
    size = values.numel()
    words = _uniform(address.words(NOISE, ONE * address.transform, size + size % 2)).double().view(-1, 2)
    radius, angle = torch.sqrt(-2 * torch.log(1 - words[:, 0])), 2 * math.pi * words[:, 1]
    normal = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1).flatten()[:size].view(values.shape)
    present = (values != 0).any(-1, keepdim=True)
    std = torch.tensor(transform["std"]).to(values)
    return torch.where(present, values + std * normal.float().to(values), values)


def _blur(values: Tensor, transform: Mapping[str, Any], address: Address) -> Tensor:
    low, high = torch.tensor(transform["low"]), torch.tensor(transform["high"])
    sigma = (low + (high - low) * _uniform(address.spatial(4))[0]).double()
    half, frames = transform["taps"] // 2, len(values)
    weights = torch.exp(-(torch.arange(-half, half + 1).double() ** 2) / (2 * sigma * sigma))
    if transform["normalise"]:
        weights = weights / weights.sum()
    result = torch.zeros_like(values)
    for tap, weight in zip(range(-half, half + 1), weights.float().tolist()):
        place = torch.arange(frames) + tap
        near = values[place.clamp(0, frames - 1)]
        if transform["padding"] == "zero":
            near = torch.where(((place >= 0) & (place < frames))[:, None, None, None], near, 0.0)
        result = result + weight * near
    return result


def _frame_mask(values: Tensor, transform: Mapping[str, Any], address: Address) -> Tensor:
    values = values.clone()
    values[_distinct(address.words(FRAMES, (1 << 16) * address.transform, transform["count"]), len(values))] = 0
    return values


def _body_mask(values: Tensor, transform: Mapping[str, Any], address: Address) -> Tensor:
    values = values.clone()
    if values.shape[1] > 1:
        values[:, 1 + _below(address.spatial(4), values.shape[1] - 1)] = 0
    return values


DISTORTIONS = {"mirror": _mirror, "noise": _noise, "blur": _blur, "frame-mask": _frame_mask, "body-mask": _body_mask}


def _stream(values: Tensor, program: Mapping[str, Any]) -> Tensor:
    if program["stream"] == "bone":
        return values - values[..., list(program["parents"]), :]
    if program["stream"] == "motion":
        return torch.cat([values[1:], values[-1:]]) - values
    return values


def _uniform(words: Tensor) -> Tensor:
    return (words >> 8).float() * 2.0**-24


def _below(words: Tensor, bound: int) -> int:
    return int(words[0]) * bound >> 32


def _distinct(words: Tensor, bound: int) -> list[int]:
    pool = list(range(bound))
    for j, word in enumerate(words.tolist()):
        other = j + (word * (bound - j) >> 32)
        pool[j], pool[other] = pool[other], pool[j]
    return pool[: len(words)]
