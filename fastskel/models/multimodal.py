"""USDRL encoders of joints, bones and motion: each alone or all fused, through one transformer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastskel.data.batch import View
from fastskel.models.backbone import USDRLBackbone, tokens
from fastskel.models.dste import DSTE
from fastskel.models.encoder import ENCODERS, MODES, Features
from fastskel.models.sttr import STTR
from fastskel.nn.attention import AttentionBackend
from fastskel.nn.embed import SkeletonEmbedding
from fastskel.nn.init import initialise
from fastskel.nn.precision import without_autocast
from fastskel.skeleton import STREAMS, Topology

__all__ = ["FrozenFusion", "Fusion", "MultimodalBackbone", "MultimodalDSTE", "MultimodalSTTR", "modality"]

Mode = Literal["joint", "bone", "motion", "fused"]


@functools.lru_cache(maxsize=64)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    # indexing with numbers of the host would wait for the device in every pass, and cannot be captured
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


def modality(clips: Tensor, kind: str, topology: Topology, variant: str | None = None) -> Tensor:
    """Derive joints, bones or motion from joint positions on their device, as `fastskel.skeleton.stream` does, bit for bit.

    Args:
        clips: Joint positions, (N, T, M, V, C).
        kind: "joint", "bone" or "motion".
        topology: Skeleton of the V joints.
        variant: Bone variant; None takes the topology's default.
    Returns:
        The modality, (N, T, M, V, C). Absent joints are zero positions like any other, as in the loader.
    Raises:
        ValueError: If the topology has no such variant.
    """
    if kind == "bone":
        parents = topology.parents(variant)
        on_host = clips.device.type == "cpu"
        index = torch.tensor(parents) if on_host else _on_device(parents, clips.device)
        return clips - clips.index_select(3, index)
    if kind == "motion":
        return torch.cat([clips[:, 1:], clips[:, -1:]], 1) - clips
    return clips


class Fusion(nn.Module):
    """Average the embeddings of the modalities, (N, S, D) each, then mix features by a linear map for each stream.

    Args:
        width: Width D.
    Source: early fusion of UmURL; the maps have no bias.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.t_fuse = nn.Linear(width, width, bias=False)
        self.s_fuse = nn.Linear(width, width, bias=False)

    def freeze(self, dtype: torch.dtype, _: AttentionBackend) -> FrozenFusion:
        """Prepare both maps, of tokens (N, S, D), for inference in a type, apart from their parameters."""
        return FrozenFusion(self, dtype)

    def forward(self, temporal: Sequence[Tensor], spatial: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Fuse embedded tokens of every modality, (N, T, D) and (N, M*V, D), to one of each."""
        t: Tensor = self.t_fuse(torch.stack([*temporal]).mean(0))
        s: Tensor = self.s_fuse(torch.stack([*spatial]).mean(0))
        return t, s


class FrozenFusion(nn.Module):
    """The same with weights converted once; without gradient, over tokens (N, S, D).

    Args:
        fusion: The fusion; what happens to it afterwards has no influence.
        dtype: Type of matrix products.
    """

    t_weight: Tensor
    s_weight: Tensor

    @torch.no_grad()
    def __init__(self, fusion: Fusion, dtype: torch.dtype) -> None:
        super().__init__()
        for name, linear in (("t_weight", fusion.t_fuse), ("s_weight", fusion.s_fuse)):
            self.register_buffer(name, linear.weight.detach().to(dtype, copy=True), persistent=False)

    @torch.no_grad()
    def forward(self, temporal: Sequence[Tensor], spatial: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Fuse embedded tokens of every modality, (N, T, D) and (N, M*V, D), to one of each."""
        with without_autocast(temporal[0].device):
            t, s = (torch.stack([*parts]).mean(0) for parts in (temporal, spatial))
            return F.linear(t.to(self.t_weight.dtype), self.t_weight), F.linear(s.to(self.s_weight.dtype), self.s_weight)


class MultimodalBackbone(USDRLBackbone):
    """A USDRL backbone with an embedding for each modality of a clip of joint positions (N, T, M, V, C), and their fusion.

    Joints have the embedding of the single backbone, bones and motion one like it each; what follows the embedding is shared.
    Bones and motion are derived inside, so that every view comes as joint positions and is augmented before. Modes:

        joint, bone, motion   that modality's embedding
        fused                 the mean of all three embeddings of the clip, and a linear map without bias for each stream
        A+B+..                as many equal parts of the rows, in this order, one pass for all; e.g. joint+bone+motion+fused

    Args:
        mode: What `forward` does where it is not told: one of the first four.
        bone_variant: Named bone list of the topology; None for its default.
        options: Those of the single backbone.
    Raises:
        ValueError: On an unknown mode, and as the single backbone.
    Source: specification of USDRL, section 3.2, inferred from UmURL: not verified against the paper.
    """

    def __init__(self, *, mode: Mode = "fused", bone_variant: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        if mode not in MODES:
            raise ValueError(f"{type(self).__name__}: mode must be one of {', '.join(MODES)}, got {mode!r}. Choose one.")
        self.config |= {"mode": mode, "bone_variant": bone_variant}
        self.mode, self.bone_variant = mode, bone_variant
        frames, bodies, joints, channels = self.shape
        width = self.num_token_features
        sizes = (bodies * joints * channels, frames * channels, width)
        self.bone_emb, self.motion_emb = SkeletonEmbedding(*sizes), SkeletonEmbedding(*sizes)
        self.fusion = Fusion(width)
        for module in (self.bone_emb, self.motion_emb, self.fusion):
            initialise(module, self.config["init"])

    def embedding(self, mode: str) -> nn.Module:
        """Return the embedding of tokens (N, T, M*V*C) and (N, M*V, T*C) of one modality."""
        # by their names: a copy for inference has replaced them
        return self.get_submodule({"joint": "ske_emb", "bone": "bone_emb", "motion": "motion_emb"}[mode])

    def embed(self, clips: Tensor, mode: str, topology: Topology) -> tuple[Tensor, Tensor]:
        """Embed joint positions (N, T, M, V, C) in one mode: tokens (N, T, D) and (N, M*V, D)."""
        kinds = STREAMS if mode == "fused" else (mode,)
        parts = [
            self.embedding(kind)(*tokens(modality(clips, kind, topology, self.bone_variant)), kernels=self.kernels)
            for kind in kinds
        ]
        temporal, spatial = zip(*parts, strict=True)
        fused: tuple[Tensor, Tensor] = self.fusion(temporal, spatial) if mode == "fused" else (temporal[0], spatial[0])
        return fused

    def forward(self, view: View, *, token_mask: Tensor | None = None, mode: str | None = None) -> Features:
        """Encode one view of joint positions (N, T, M, V, C); `token_mask` is refused.

        Args:
            view: Clips.
            token_mask: Not supported.
            mode: As the class says; None for that of the constructor.
        Returns:
            `pooled` (N, 2*D): maxima over temporal, then spatial tokens; `temporal` (N, T, D); `spatial` (N, M*V, D).
        Raises:
            ValueError: On a mask, on an unknown mode, on "causal", and if the rows cannot be parted equally.
        """
        name = type(self).__name__
        if token_mask is not None:
            raise ValueError(f"{name}: token_mask must be None, got {type(token_mask).__name__}. This encoder masks no tokens.")
        if mode == "causal":
            raise ValueError(
                f"{name}: mode must be made of {', '.join(MODES)}, got 'causal', which only encoders of one modality have. "
                "Leave out causal, or take a DSTE or STTR of one modality."
            )
        modes = (self.mode if mode is None else mode).split("+")
        if unknown := [part for part in modes if part not in MODES]:
            raise ValueError(
                f"{name}: mode must be made of {', '.join(MODES)}, got {unknown[0]!r} in {mode!r}. Join them by a plus."
            )
        self.check(view.clips)
        if len(view.clips) % len(modes):
            raise ValueError(
                f"{name}: clips must be a multiple of the {len(modes)} parts of {mode!r}, got {len(view.clips)}. "
                "Join as many views of one batch."
            )
        clips = view.clips.chunk(len(modes))
        parts = [self.embed(part, kind, view.topology) for part, kind in zip(clips, modes, strict=True)]
        temporal, spatial = (torch.cat(stream) if len(parts) > 1 else stream[0] for stream in zip(*parts, strict=True))
        return self.pool(*self.transform(temporal, spatial, view))


class MultimodalDSTE(MultimodalBackbone, DSTE):
    """`DSTE` over clips (N, T, M, V, C) of which joints, bones and motion are embedded apart."""


class MultimodalSTTR(MultimodalBackbone, STTR):
    """`STTR` over clips (N, T, M, V, C) of which joints, bones and motion are embedded apart."""


ENCODERS.add("usdrl-dste-multimodal", MultimodalDSTE)
ENCODERS.add("usdrl-sttr-multimodal", MultimodalSTTR)
