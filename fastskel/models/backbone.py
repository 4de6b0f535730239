"""What the USDRL backbones share: tokens, embedding, positions, pooling."""

from __future__ import annotations

import abc
import contextlib
import copy
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from typing_extensions import Self

from fastskel.data.batch import View
from fastskel.models.encoder import Encoder, Features
from fastskel.nn.attention import BACKENDS, AttentionBackend
from fastskel.nn.drop_path import DROP_PATH_MODES, DropPathMode
from fastskel.nn.embed import PositionalEncoding, SkeletonEmbedding, embed
from fastskel.nn.kernel_choice import KERNEL_CHOICES, KernelChoice
from fastskel.nn.memory import MEMORY_MODES, MemoryMode
from fastskel.nn.pool import prefix_pool, token_max
from fastskel.nn.precision import Precision
from fastskel.nn.projections import MergingLayer

__all__ = ["USDRLBackbone", "tokens"]

# frames that the fixed sine table covers; the reference's checkpoints hold all of it
MAX_POSITIONS = 200
INFERENCE_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def tokens(clips: Tensor) -> tuple[Tensor, Tensor]:
    """Lay clips (N, T, M, V, C) out as temporal tokens (N, T, M*V*C) and spatial tokens (N, M*V, T*C)."""
    n, t, m, v, c = clips.shape
    return clips.reshape(n, t, m * v * c), clips.permute(0, 2, 3, 1, 4).reshape(n, m * v, t * c)


@runtime_checkable
class _Freezable(Protocol):
    def freeze(self, dtype: torch.dtype, backend: AttentionBackend, /) -> nn.Module: ...


class USDRLBackbone(Encoder):
    """Two streams over temporal and spatial tokens; subclasses say what a stream is made of.

    Args:
        num_joints: Joints V.
        num_bodies: Bodies M.
        num_frames: Longest clip in frames; shorter clips use the leading weights, as if absent frames were zero.
        num_channels: Channels C.
        width: Width D of both streams.
    Raises:
        ValueError: On sizes below 1, or more frames than the positional table has.
    """

    def __init__(self, num_joints: int, num_bodies: int, num_frames: int, num_channels: int, width: int) -> None:
        super().__init__()
        sizes = dict(num_joints=num_joints, num_bodies=num_bodies, num_channels=num_channels, width=width)
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 1, got {size}. Give a positive size.")
        if not 1 <= num_frames <= MAX_POSITIONS:
            raise ValueError(
                f"{type(self).__name__}: num_frames must be in 1..{MAX_POSITIONS}, got {num_frames}. Resize the clips."
            )
        self.shape = (num_frames, num_bodies, num_joints, num_channels)
        self.num_features = 2 * width
        self.num_token_features = width
        num_spatial = num_bodies * num_joints
        self.spe = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_spatial, width), std=0.02))
        self.ske_emb = SkeletonEmbedding(num_spatial * num_channels, num_frames * num_channels, width)
        self.tpe = PositionalEncoding(width, MAX_POSITIONS)

    shape: tuple[int, int, int, int]
    memory: MemoryMode = "lean"
    drop_path_mode: DropPathMode = "skip"
    attention_backend: AttentionBackend = "auto"
    kernels: KernelChoice = "auto"
    # type of a copy made for inference
    frozen: torch.dtype | None = None

    def configure(
        self,
        *,
        memory: MemoryMode | None = None,
        drop_path_mode: DropPathMode | None = None,
        attention_backend: AttentionBackend | None = None,
        kernels: KernelChoice | None = None,
    ) -> None:
        """Choose how the same function of (N, T, M, V, C) is computed; None leaves a choice as it is.

        Args:
            memory: What layers keep for the backward pass: `"saved"` all that saves work, `"lean"` what is dear to compute
                again, `"layer"` their inputs only.
            drop_path_mode: `"skip"` does not compute what DropPath drops; `"mask"` computes and multiplies, with shapes that do
                not depend on the draws, for compiled and captured steps.
            attention_backend: `"auto"` what was measured to be fastest, `"fastskel"` merged projections where they pay, or the
                plain projections with torch's `"sdpa"`, `"xformers"` or an explicit softmax (`"math"`).
            kernels: Who computes what lies between the matrix products: `"torch"`, `"triton"` on a GPU, or `"auto"`, which takes
                Triton's fused kernels where they were measured to win.
        Raises:
            ValueError: On an unknown name.
        """
        choices = {
            "memory": (memory, MEMORY_MODES),
            "drop_path_mode": (drop_path_mode, DROP_PATH_MODES),
            "attention_backend": (attention_backend, BACKENDS),
            "kernels": (kernels, KERNEL_CHOICES),
        }
        if self.frozen and any(value is not None for value, _ in choices.values()):
            raise ValueError(f"{type(self).__name__}: a copy made for inference must stay as it is. Configure the original.")
        for name, (value, known) in choices.items():
            if value is not None and value not in known:
                raise ValueError(f"{type(self).__name__}: {name} must be one of {known}, got {value!r}. Choose one.")
        for name, (value, _) in choices.items():
            if value is not None:
                setattr(self, name, value)

    def optimize_for_inference(self, dtype: torch.dtype | None = None) -> Self:
        """Copy the encoder of (N, T, M, V, C) for inference: weights merged, folded and converted once.

        Args:
            dtype: Type of matrix products, e.g. torch.bfloat16; None keeps the encoder's. Residual stream, normalisation and
                features are float32 at least.
        Returns:
            An encoder without gradients, also of its input, that stays in evaluation mode; later changes of this one do not reach
            it. It can move to another device, and be copied and pickled; it has no parameters, and its state is empty.
        Raises:
            ValueError: If `dtype` is none of the four floating-point types that products are computed in, or a part is not plain.
        """
        if self.frozen:
            if dtype not in (None, self.frozen):
                raise ValueError(
                    f"optimize_for_inference: dtype must be {self.frozen} for this copy, got {dtype}. Copy the original."
                )
            return self
        dtype = self.spe.dtype if dtype is None else dtype
        if dtype not in INFERENCE_TYPES:
            raise ValueError(f"optimize_for_inference: dtype must be one of {INFERENCE_TYPES}, got {dtype}. Use torch.bfloat16.")
        parts = {name: child for name, child in self.named_children() if isinstance(child, _Freezable)}
        # what is prepared anew need not be copied first
        frozen = copy.deepcopy(self, {id(part): None for part in parts.values()})
        for name, part in parts.items():
            frozen.add_module(name, part.freeze(dtype, self.attention_backend))
        wide = Precision.of(dtype).residual
        positions, table = frozen.spe.detach().to(wide), frozen.tpe.pe.to(wide)
        del frozen.spe
        frozen.register_buffer("spe", positions, persistent=False)
        frozen.tpe.register_buffer("pe", table, persistent=False)
        frozen.eval()
        frozen.frozen = dtype
        return frozen

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a copy made for inference of (N, T, M, V, C) refuses to train.

        Raises:
            ValueError: If this is such a copy.
        """
        if mode and self.frozen:
            raise ValueError(f"{type(self).__name__}: mode must be evaluation for a copy made for inference, got training.")
        return super().train(mode)

    @contextlib.contextmanager
    def merged_once(self) -> Iterator[None]:
        """Merge projections once for all passes inside, as for the chunks of one optimiser step over (N, T, M, V, C).

        Passes and their backward passes belong inside; gradients reach the projections when the block ends. Under
        DistributedDataParallel it needs `find_unused_parameters=False`.

        Raises:
            ValueError: If parameters change inside, or a backward pass comes after the block.
        """
        with contextlib.ExitStack() as stack:
            for module in self.modules():
                if isinstance(module, MergingLayer):
                    stack.enter_context(module.merged_once())
            yield

    def streams(self, temporal: Tensor, spatial: Tensor, view: View | None = None) -> tuple[Tensor, Tensor]:
        """Encode raw tokens.

        Args:
            temporal: (N, T, M*V*C).
            spatial: (N, M*V, T*C).
            view: Where random draws are addressed; None draws a fresh key from torch's generator.
        Returns:
            Temporal and spatial features, (N, T, D) and (N, M*V, D).
        Raises:
            ValueError: If the two token sets do not fit the encoder and each other.
        """
        frames, bodies, joints, channels = self.shape
        n, t = temporal.shape[:2]
        expected = ((n, t, bodies * joints * channels), (n, bodies * joints, t * channels))
        if (temporal.shape, spatial.shape) != expected or not 1 <= t <= frames:
            raise ValueError(
                f"{type(self).__name__}: tokens must be (N, T, {expected[0][2]}) and (N, {expected[1][1]}, T*{channels}) "
                f"with T in 1..{frames}, got {tuple(temporal.shape)} and {tuple(spatial.shape)}. Cut both from the same clips."
            )
        temporal, spatial = self.ske_emb(temporal, spatial, kernels=self.kernels)
        return self.transform(temporal, spatial, view)

    @abc.abstractmethod
    def transform(self, temporal: Tensor, spatial: Tensor, view: View | None) -> tuple[Tensor, Tensor]:
        """Transform embedded tokens (N, T, D) and (N, M*V, D) to features of the same shapes."""

    def causal_transform(self, temporal: Tensor, view: View | None) -> Tensor:
        """Transform embedded temporal tokens (N, T, D) so that none depends on later ones; subclasses say how.

        Raises:
            ValueError: If the encoder has no such form.
        """
        raise ValueError(f"{type(self).__name__}: mode must be None, got 'causal', which it does not have. Choose DSTE or STTR.")

    def layer_modules(self) -> list[list[nn.Module]]:
        """List the layers of both streams, (N, S, D) each, by depth; subclasses with layers override this."""
        return []

    def depth_groups(self) -> list[list[nn.Parameter]]:
        """List the parameters by depth: embedding and positions of (N, T, M, V, C), then layer by layer of both streams."""
        layers = [[p for module in modules for p in module.parameters()] for modules in self.layer_modules()]
        deep = {id(p) for group in layers for p in group}
        return [[p for p in self.parameters() if id(p) not in deep], *layers]

    def check(self, clips: Tensor) -> None:
        """Refuse clips that are not (N, T, M, V, C) of the configured sizes.

        Raises:
            ValueError: Naming the configured and the actual shape.
        """
        frames, *rest = self.shape
        if clips.dim() != 5 or list(clips.shape[2:]) != rest or not 1 <= clips.shape[1] <= frames:
            raise ValueError(
                f"{type(self).__name__}: clips must be (N, 1..{frames}, {', '.join(map(str, rest))}), "
                f"got {tuple(clips.shape)}. Build the encoder for this topology, bodies and length."
            )

    @abc.abstractmethod
    def layers_flops(self, num_tokens: int) -> int:
        """Operations of the matrix products of one stream's layers, as published, over tokens (1, S, D)."""

    def model_flops(self, frames: int, *, backward: bool = False) -> int:
        """Count the operations of the published model for one view (1, T, M, V, C).

        Gradients are twice the forward pass, but for the first linear of each embedding, whose input has none.
        """
        _, bodies, joints, channels = self.shape
        width = self.num_token_features
        total = first = 0
        for num_tokens, features in ((frames, bodies * joints * channels), (bodies * joints, frames * channels)):
            first += 2 * num_tokens * features * width
            total += 2 * num_tokens * width**2 + self.layers_flops(num_tokens)
        return 3 * total + 2 * first if backward else total + first

    def forward(self, view: View, *, token_mask: Tensor | None = None, mode: str | None = None) -> Features:
        """Encode one view of clips (N, T, M, V, C).

        Args:
            view: The clips.
            token_mask: Refused.
            mode: None; or "causal": temporal tokens that depend on frames up to their own, by plain torch whatever `kernels`
                and `attention_backend` say. Tokens of the spatial stream are of whole clips, so there are none.
        Returns:
            `pooled` (N, 2*D): maxima over temporal, then spatial tokens; `temporal` (N, T, D); `spatial` (N, M*V, D). Of
            "causal" `temporal`, and `pooled` by the maximum and the mean over it.
        """
        if token_mask is not None or mode not in (None, "causal"):
            raise ValueError(
                f"{type(self).__name__}: token_mask and mode must be None, got {type(token_mask).__name__} and {mode!r}. "
                "This encoder masks no tokens, and its only other mode is 'causal'."
            )
        self.check(view.clips)
        if mode == "causal":
            return self._causal(view)
        return self.pool(*self.streams(*tokens(view.clips), view))

    def pool(self, temporal: Tensor, spatial: Tensor) -> Features:
        """Make features of transformed tokens (N, T, D) and (N, M*V, D)."""
        # ties share the gradient evenly, as under the reference's amax
        y_t, y_s = (token_max(stream, self.kernels) for stream in (temporal, spatial))
        return Features(
            torch.cat([y_t, y_s], -1), temporal=temporal, spatial=spatial, temporal_pooled=y_t, spatial_pooled=y_s
        )

    def _causal(self, view: View) -> Features:
        if self.frozen:
            raise ValueError(
                f"{type(self).__name__}: mode must be None for a copy made for inference, got 'causal'. Use the original."
            )
        embedded = embed(view.clips.flatten(2), self.ske_emb.t_embedding, self.kernels)
        temporal = self.causal_transform(embedded, view)
        return Features(prefix_pool(temporal)[:, -1], temporal=temporal)
