"""What the reference's two model files share: tokens, projectors, the downstream head, and the sizes they imply."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastskel.models.backbone import tokens
from fastskel.nn.grouped_norm import can_group, grouped_projector, uses_batch_statistics
from fastskel.nn.init import init_usdrl
from fastskel.nn.pool import token_max
from fastskel.objectives.mgfd import projector
from fastskel.skeleton import Topology, stream, topology

__all__ = ["DownstreamModel", "PretrainingModel", "bones", "sizes"]

# coordinates per joint in everything the reference trains on
CHANNELS = 3
BODIES = 2
MODALITIES = ("joint", "bone", "motion")


def sizes(t_input_size: int, s_input_size: int) -> dict[str, int]:
    """Read joints, bodies and frames off the reference's two input sizes, of tokens (N, T, M*V*C) and (N, M*V, T*C).

    Raises:
        ValueError: If a size is not a multiple of 3 channels.
    """
    for name, size in (("t_input_size", t_input_size), ("s_input_size", s_input_size)):
        if size < CHANNELS or size % CHANNELS:
            raise ValueError(f"sizes: {name} must be a positive multiple of {CHANNELS}, got {size}. Give M*V*3 or T*3.")
    spatial = t_input_size // CHANNELS
    bodies = BODIES if spatial % BODIES == 0 else 1
    return dict(
        num_joints=spatial // bodies, num_bodies=bodies, num_frames=s_input_size // CHANNELS, num_channels=CHANNELS
    )


def check_modality(modality: str) -> str:
    """Return a known modality of clips (N, C, T, V, M).

    Raises:
        ValueError: If it is not joint, bone or motion.
    """
    if modality not in MODALITIES:
        raise ValueError(f"modality must be one of {MODALITIES}, got {modality!r}. Correct its spelling.")
    return modality


def bones(joints: int) -> tuple[Topology, str]:
    """Return the skeleton and bone variant that the reference uses for clips (N, C, T, V, M) of V joints.

    Raises:
        ValueError: If the reference has no bones for so many joints.
    """
    known = {25: ("ntu-25", "agcn"), 17: ("coco-17", "usdrl")}
    if joints not in known:
        raise ValueError(f"bone modality: joints must be one of {sorted(known)}, got {joints}. Use joint or motion.")
    name, variant = known[joints]
    return topology(name), variant


def _project(projector: nn.Module, pooled: Tensor) -> list[Tensor]:
    """Project views (W, N, D), in order; a projector that was replaced is called view by view."""
    if can_group(projector):
        assert isinstance(projector, nn.Sequential)
        # clones, because existing code may change its embeddings in place, which views of one tensor do not allow
        return [view.clone() for view in grouped_projector(projector, pooled)]
    return [projector(view) for view in pooled]


class PretrainingModel(nn.Module):
    """The reference's `USDRL`: backbone and three projectors over four views of clips (N, C, T, V, M)."""

    def __init__(self, hidden_size: int, backbone: nn.Module, modality: str) -> None:
        super().__init__()
        self.modality = check_modality(modality)
        self.d_model = 2 * hidden_size
        self.backbone = backbone
        self.i_proj = projector(self.d_model, self.d_model, 2 * self.d_model)
        self.s_proj = projector(hidden_size, self.d_model, self.d_model)
        self.t_proj = projector(hidden_size, self.d_model, self.d_model)
        self.apply(init_usdrl)

    def modality_generation(self, data_input: Tensor, modality: str = "joint") -> tuple[Tensor, Tensor]:
        """Turn clips (N, C, T, V, M) into tokens (N, T, M*V*C) and (N, M*V, T*C) of one modality."""
        clips = data_input.permute(0, 2, 4, 3, 1)
        kind = check_modality(modality)
        if kind == "bone":
            clips = stream(clips, kind, *bones(clips.shape[3]))
        elif kind == "motion":
            clips = torch.cat([clips[:, 1:] - clips[:, :-1], torch.zeros_like(clips[:, :1])], 1)
        return tokens(clips)

    def sub_forward(self, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embed one view, (N, C, T, V, M), to z_t and z_s (N, 2H) and z_i (N, 4H)."""
        y_t, y_s = self.backbone(*self.modality_generation(data, self.modality))
        y_t, y_s = token_max(y_t), token_max(y_s)
        return self.t_proj(y_t), self.s_proj(y_s), self.i_proj(torch.cat([y_t, y_s], dim=-1))

    def forward(
        self, data_v1: Tensor, data_v2: Tensor, data_v3: Tensor, data_v4: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Embed four views, (N, C, T, V, M) each, to lists of z_t (N, 2H), z_s (N, 2H) and z_i (N, 4H).

        Views that agree pass the backbone together. BatchNorm sees one view at a time, in order, either way.
        """
        views = (data_v1, data_v2, data_v3, data_v4)
        if not self._joins(views):
            z_t, z_s, z_i = (list(z) for z in zip(*map(self.sub_forward, views), strict=True))
            return z_t, z_s, z_i
        streams = self.backbone(*self.modality_generation(torch.cat(views), self.modality))
        y_t, y_s = (token_max(y).view(len(views), len(data_v1), y.shape[-1]) for y in streams)
        y_i = torch.cat([y_t, y_s], dim=-1)
        return _project(self.t_proj, y_t), _project(self.s_proj, y_s), _project(self.i_proj, y_i)

    def _joins(self, views: tuple[Tensor, ...]) -> bool:
        """Whether one pass of the backbone over all views, (N, C, T, V, M) each, equals one pass per view."""
        if getattr(self.sub_forward, "__func__", None) is not PretrainingModel.sub_forward:
            return False
        if len({(view.shape, view.dtype, view.device) for view in views}) != 1:
            return False
        # a backbone of somebody's own may look at the whole batch
        return not uses_batch_statistics(self.backbone)


class DownstreamModel(nn.Module):
    """The reference's `Downstream`: backbone and a linear head over prepared tokens of all three modalities."""

    def __init__(self, hidden_size: int, backbone: nn.Module, num_class: int, modality: str) -> None:
        super().__init__()
        self.modality = check_modality(modality)
        self.d_model = 2 * hidden_size
        self.backbone = backbone
        self.fc = nn.Linear(self.d_model, num_class)

    def forward(
        self,
        jt: Tensor,
        js: Tensor,
        bt: Tensor | None,
        bs: Tensor | None,
        mt: Tensor | None,
        ms: Tensor | None,
        knn_eval: bool = False,
        detect: bool = False,
    ) -> Tensor:
        """Classify clips, or frames.

        Args:
            jt: Joint tokens, (N, T, M*V*C).
            js: Joint tokens, (N, M*V, T*C).
            bt: Bone tokens, (N, T, M*V*C); only the pair of the model's modality is read.
            bs: Bone tokens, (N, M*V, T*C).
            mt: Motion tokens, (N, T, M*V*C).
            ms: Motion tokens, (N, M*V, T*C).
            knn_eval: Return the pooled feature instead of scores.
            detect: Return scores for each frame.
        Returns:
            Scores (N, K); features (N, 2H) with `knn_eval`; scores (N, T, K) with `detect`.
        """
        pair = {"joint": (jt, js), "bone": (bt, bs), "motion": (mt, ms)}[self.modality]
        if pair[0] is None or pair[1] is None:
            raise ValueError(f"Downstream: {self.modality} tokens must be given, got None. Pass both token sets.")
        y_t, y_s = self.backbone(*pair)
        if detect:
            # the reference writes 64 here: the frames of all its clips
            y_s = F.adaptive_avg_pool1d(y_s.transpose(1, 2), y_t.shape[1]).transpose(1, 2)
            return self.fc(torch.cat([y_t, y_s], dim=-1))  # type: ignore[no-any-return]
        y_i = torch.cat([token_max(y_t), token_max(y_s)], dim=-1)
        return y_i if knn_eval else self.fc(y_i)
