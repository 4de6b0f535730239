"""DSTE, the dense spatio-temporal encoder of USDRL."""

from __future__ import annotations

from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastskel.data.batch import DrawAddress, View
from fastskel.models.backbone import USDRLBackbone
from fastskel.models.encoder import ENCODERS
from fastskel.nn.causal import causal_dst_layer
from fastskel.nn.drop_path import (
    NO_DROPS,
    NUM_DROP_PATHS,
    DropPathMode,
    LayerDrops,
    drop_path_kept,
    drop_path_scales,
    masked_drops,
    skipped_drops,
)
from fastskel.nn.dst_layer import DSTLayer
from fastskel.nn.init import Init, initialise

__all__ = ["DSTE"]


class DSTE(USDRLBackbone):
    """Dense spatio-temporal encoder: dense spatio-temporal layers over the tokens of both streams.

    Args:
        num_joints: Joints V.
        num_bodies: Bodies M.
        num_frames: Longest clip in frames T.
        num_channels: Channels C.
        width: Width D of both streams.
        num_heads: Attention heads.
        num_layers: Layers per stream.
        gap: Every gap-th token passes the dense shift unchanged.
        alpha: Weight of the convolutional attention branch, the dense shift branch has the rest.
        drop_path: Probability that a residual branch is dropped for a sample in training.
        init: `"usdrl"` initialises Linear layers from N(0, 0.02), `"torch"` keeps torch's own start.
    Raises:
        ValueError: On sizes, gap, alpha, heads or rates outside their range.
    Source: specification of USDRL, section 1; positions are added again before every layer, as published.
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
        gap: int = 4,
        alpha: float = 0.5,
        drop_path: float = 0.1,
        init: Init = "usdrl",
    ) -> None:
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__(num_joints, num_bodies, num_frames, num_channels, width)
        self.config = config
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"DSTE: num_heads must divide width {width}, got {num_heads}. Choose a divisor.")
        if num_layers < 1 or gap < 1:
            raise ValueError(
                f"DSTE: num_layers and gap must be at least 1, got {num_layers} and {gap}. Give positive ones."
            )
        if not 0.0 <= alpha <= 1.0 or not 0.0 <= drop_path < 1.0:
            raise ValueError(
                f"DSTE: alpha must be in [0, 1] and drop_path in [0, 1), got {alpha} and {drop_path}. Fix them."
            )
        self.num_layers, self.drop_path = num_layers, drop_path
        for number in range(num_layers):
            for name, length in (("t_tr", num_frames), ("s_tr", num_bodies * num_joints)):
                layer = DSTLayer(length, width, num_heads, alpha, gap)
                self.add_module(f"{name}{number or ''}", layer)
        initialise(self, init)

    def layers(self, stream: Literal["t_tr", "s_tr"]) -> list[DSTLayer]:
        """Layers of one stream over tokens (N, S, D), first to last."""
        found = [self.get_submodule(f"{stream}{number or ''}") for number in range(self.num_layers)]
        return cast("list[DSTLayer]", found)

    def layers_flops(self, num_tokens: int) -> int:
        """Operations of the matrix products of one stream's layers, as published, over tokens (1, S, D).

        Of a token 25 D^2 multiplications: four projections of three attentions, the convolution, and three MLPs; then scores and
        sums of three attentions, and two linears over the tokens.
        """
        width = self.num_token_features
        return self.num_layers * 2 * (25 * num_tokens * width**2 + 8 * num_tokens**2 * width)

    def layer_modules(self) -> list[list[nn.Module]]:
        """List the layers of both streams, (N, S, D) each, by depth."""
        return [list(pair) for pair in zip(self.layers("t_tr"), self.layers("s_tr"), strict=True)]

    def _drops(
        self, rows: int, view: View | None, tokens: Tensor, mode: DropPathMode | None = None
    ) -> tuple[list[LayerDrops], list[LayerDrops]]:
        if not self.training or self.drop_path == 0.0:
            return ([NO_DROPS] * self.num_layers,) * 2
        mode = mode or self.drop_path_mode
        address = None if view is None else view.address
        if address is None:
            # existing code seeds torch's generator and knows no addresses: one draw from it keys this forward pass
            key = torch.randint(2**62, ())
            address = DrawAddress(key, 0, torch.arange(rows), torch.zeros(rows, dtype=torch.int64))
        if len(address.index) != rows:
            raise ValueError(
                f"DSTE: view.address must have one index for each of {rows} clips, got {len(address.index)}. "
                "Address the views with Batch.at."
            )
        shape = (rows, self.num_layers, 2, NUM_DROP_PATHS)
        on_host = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
        if mode == "mask" and on_host:
            # the same draws, sooner
            scales = torch.from_numpy(self._kept(address).reshape(shape) / (1.0 - self.drop_path))
            return masked_drops(scales[:, :, 0]), masked_drops(scales[:, :, 1])
        if mode == "mask":
            index, number = (part.to(tokens.device, non_blocking=True) for part in (address.index, address.view))
            scales = drop_path_scales(
                self.drop_path, self.num_layers * 2 * NUM_DROP_PATHS,
                seed=address.seed, step=address.step, index=index, view=number,
            ).view(shape)  # fmt: skip
            return masked_drops(scales[:, :, 0]), masked_drops(scales[:, :, 1])
        kept = self._kept(address).reshape(shape)
        temporal, spatial = (
            skipped_drops(kept[:, :, stream], self.drop_path, tokens.device, slots=self.kernels != "torch") for stream in range(2)
        )
        return temporal, spatial

    # the draws are NumPy's: a compiler would trace into them
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _kept(self, address: DrawAddress) -> NDArray[np.bool_]:
        if any(value.device.type != "cpu" for value in vars(address).values() if isinstance(value, Tensor)):
            raise ValueError(
                "DSTE: view.address must be on the host to skip what is dropped, got tensors on a device. "
                "Configure drop_path_mode='mask'."
            )
        # a tensor holds the bits of a seed
        seed = int(address.seed) % 2**64 if isinstance(address.seed, Tensor) else address.seed
        return drop_path_kept(
            self.drop_path, self.num_layers * 2 * NUM_DROP_PATHS,
            seed=seed, step=int(address.step), index=address.index, view=address.view,
        )  # fmt: skip

    def transform(self, temporal: Tensor, spatial: Tensor, view: View | None) -> tuple[Tensor, Tensor]:
        """Transform embedded tokens (N, T, D) and (N, M*V, D) to features of the same shapes."""
        t, s = temporal, spatial
        how = dict(memory=self.memory, backend=self.attention_backend, kernels=self.kernels)
        t_drops, s_drops = self._drops(t.shape[0], view, t)
        for t_layer, s_layer, t_drop, s_drop in zip(
            self.layers("t_tr"), self.layers("s_tr"), t_drops, s_drops, strict=True
        ):
            t = t_layer(self.tpe(t), t_drop, **how)
            s = s_layer(s + self.spe, s_drop, **how)
        return t, s

    def causal_transform(self, temporal: Tensor, view: View | None) -> Tensor:
        """Transform embedded temporal tokens (N, T, D) so that none depends on later ones; drops are those of `transform`."""
        drops, _ = self._drops(temporal.shape[0], view, temporal, "mask")
        for layer, drop in zip(self.layers("t_tr"), drops, strict=True):
            temporal = causal_dst_layer(layer, self.tpe(temporal), drop)
        return temporal


ENCODERS.add("usdrl-dste", DSTE)
