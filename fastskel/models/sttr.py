"""STTR, the plain spatio-temporal transformer of USDRL."""

from __future__ import annotations

import copy
from typing import Literal, cast

from torch import Tensor, nn

from fastskel.data.batch import View
from fastskel.models.backbone import USDRLBackbone
from fastskel.models.encoder import ENCODERS
from fastskel.nn.causal import causal_post_norm_layer
from fastskel.nn.init import Init, initialise
from fastskel.nn.post_norm import PostNormLayer, PostNormStack

__all__ = ["STTR"]


class STTR(USDRLBackbone):
    """Spatio-temporal transformer: a post-norm ReLU transformer over the tokens of each stream.

    Args:
        num_joints: Joints V.
        num_bodies: Bodies M.
        num_frames: Longest clip in frames T.
        num_channels: Channels C.
        width: Width D of both streams.
        num_heads: Attention heads.
        num_layers: Layers per stream; they start equal wherever `init` does not draw, as torch copies the first.
        init: `"usdrl"` initialises Linear layers from N(0, 0.02) as the AAAI code does, `"torch"` keeps torch's own start
            as the journal code does.
    Raises:
        ValueError: On sizes or heads outside their range.
    Source: specification of USDRL, section 1.10.
    """

    def __init__(
        self,
        *,
        num_joints: int = 25,
        num_bodies: int = 2,
        num_frames: int = 64,
        num_channels: int = 3,
        width: int = 1024,
        num_heads: int = 1,
        num_layers: int = 2,
        init: Init = "usdrl",
    ) -> None:
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__(num_joints, num_bodies, num_frames, num_channels, width)
        self.config = config
        self.num_layers = num_layers
        if num_heads < 1 or width % num_heads or num_layers < 1:
            raise ValueError(
                f"STTR: num_heads must divide width {width} and num_layers be at least 1, got {num_heads} and "
                f"{num_layers}. Choose others."
            )
        for name in ("t_tr", "s_tr"):
            first = PostNormLayer(width, num_heads)
            self.add_module(name, PostNormStack(copy.deepcopy(first) for _ in range(num_layers)))
        initialise(self, init)

    def layers_flops(self, num_tokens: int) -> int:
        """Operations of the matrix products of one stream's layers, as published, over tokens (1, S, D).

        Of a token 6 D^2 multiplications: four projections and the MLP; then scores and sums.
        """
        width = self.num_token_features
        return self.num_layers * 2 * (6 * num_tokens * width**2 + 2 * num_tokens**2 * width)

    def transform(self, temporal: Tensor, spatial: Tensor, view: View | None) -> tuple[Tensor, Tensor]:
        """Transform embedded tokens (N, T, D) and (N, M*V, D) to features of the same shapes."""
        how = dict(memory=self.memory, backend=self.attention_backend, kernels=self.kernels)
        t_tr, s_tr = self.get_submodule("t_tr"), self.get_submodule("s_tr")
        return t_tr(self.tpe(temporal), **how), s_tr(spatial + self.spe, **how)

    def _layers(self, stream: Literal["t_tr", "s_tr"]) -> list[PostNormLayer]:
        stack = cast(PostNormStack, self.get_submodule(stream))
        return cast("list[PostNormLayer]", list(stack.layers))

    def layer_modules(self) -> list[list[nn.Module]]:
        """List the layers of both streams, (N, S, D) each, by depth."""
        return [list(pair) for pair in zip(self._layers("t_tr"), self._layers("s_tr"), strict=True)]

    def causal_transform(self, temporal: Tensor, view: View | None) -> Tensor:
        """Transform embedded temporal tokens (N, T, D) so that none depends on later ones."""
        temporal = self.tpe(temporal)
        for layer in self._layers("t_tr"):
            temporal = causal_post_norm_layer(layer, temporal)
        return temporal


ENCODERS.add("usdrl-sttr", STTR)
