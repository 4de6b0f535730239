"""DSTE, STTR and the pretraining wrapper as published: the same operations in the same order, one view after another.

Source: specification of USDRL, section 1. Two things are more general: tokens and frames follow from the input sizes, and
DSTE has as many layers as asked for. Keys and their order are those of the published checkpoints.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DSTE", "STTR", "USDRL", "Attention", "DropPathSource", "init_weights", "xformers_attention"]

Attention = Literal["eager", "sdpa", "xformers"]
ATTENTIONS: tuple[Attention, ...] = ("eager", "sdpa", "xformers")
# (layer, stream, slot) -> (N,): 0 drops a sample's branch, anything else keeps it; stream 0 is temporal, 1 spatial;
# slots are CA attention, CA MLP, shifted attention, shifted MLP, plain attention, plain MLP
DropPathSource = Callable[[int, int, int], Tensor]

MAX_POSITIONS = 200


def xformers_attention() -> Callable[..., Tensor]:
    """Return xformers' operator over queries, keys and values (N, S, H, D/H).

    Raises:
        RuntimeError: If xformers is not installed or its operators do not load; the message says why.
    """
    try:
        operators = importlib.import_module("xformers.ops")
        # an import succeeds where the compiled part does not load
        failure = getattr(importlib.import_module("xformers._cpp_lib"), "_cpp_library_load_exception", None)
    except Exception as error:
        # whatever a foreign binary raises while it loads is the reason to show
        raise RuntimeError(f"xformers does not import: {type(error).__name__}: {error}") from error
    if failure is not None:
        reason = " ".join(str(failure).split())
        raise RuntimeError(f"xformers imports, but its operators do not load: {reason}")
    found: Callable[..., Tensor] = operators.memory_efficient_attention
    return found


def _xformers_attention(attn: nn.MultiheadAttention, x: Tensor) -> Tensor:
    heads = (*x.shape[:2], attn.num_heads, -1)
    q, k, v = (part.view(heads) for part in F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1))
    return attn.out_proj(xformers_attention()(q, k, v).flatten(2))  # type: ignore[no-any-return]


def _self_attention(attn: nn.MultiheadAttention, x: Tensor, attention: Attention) -> Tensor:
    if attention == "xformers":
        return _xformers_attention(attn, x)
    # the published code asks for the attention map and throws it away
    out: Tensor = attn(x, x, x, need_weights=attention == "eager")[0]
    return out


class DropPath(nn.Module):
    """Stochastic depth over (N, S, D): a sample's branch becomes 0 or is divided by the probability to keep it."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.source: Callable[[int], Tensor] | None = None

    def forward(self, x: Tensor, slot: int) -> Tensor:
        """Drop samples of (N, S, D); each call draws anew, in the type of its input."""
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        if self.source is None:
            kept = (keep + torch.rand((x.shape[0], 1, 1), dtype=x.dtype, device=x.device)).floor_()
        else:
            kept = (self.source(slot) != 0).to(x.device, x.dtype).reshape(-1, 1, 1)
        return x.div(keep) * kept


class MLP(nn.Module):
    """Linear, exact GELU, Linear over (N, S, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens (N, S, D)."""
        return self.fc2(self.act(self.fc1(x)))  # type: ignore[no-any-return]


class CA(nn.Module):
    """Convolutional attention over (N, S, D); there is no residual around its MLP."""

    def __init__(self, width: int, attn: nn.MultiheadAttention, drop: DropPath, attention: Attention) -> None:
        super().__init__()
        self.attn = attn
        self.conv1 = nn.Conv1d(width, width, 1)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.drop, self.attention = drop, attention

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens (N, S, D)."""
        xc = x + F.relu(self.conv1(x.transpose(1, 2))).transpose(1, 2)
        u = self.drop(_self_attention(self.attn, self.norm1(xc), self.attention), 0) + x
        return self.drop(self.mlp(self.norm2(u)), 1)  # type: ignore[no-any-return]


class DSA(nn.Module):
    """Dense shift attention over (N, S, D): one block over mixed and over plain tokens, one after the other."""

    def __init__(
        self, length: int, width: int, gap: int, attn: nn.MultiheadAttention, drop: DropPath, attention: Attention
    ) -> None:
        super().__init__()
        self.wt1 = nn.Linear(length, length)
        self.wt2 = nn.Linear(length, length)
        self.attn = attn
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.gap, self.drop, self.attention = gap, drop, attention

    def _block(self, x: Tensor, slot: int) -> Tensor:
        x = self.drop(_self_attention(self.attn, self.norm1(x), self.attention), slot) + x
        return x + self.drop(self.mlp(self.norm2(x)), slot + 1)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens (N, S, D)."""
        f = x.transpose(1, 2)
        g = self.wt2(F.relu(self.wt1(f))) + f
        g[:, :, 0 :: self.gap] = f[:, :, 0 :: self.gap]
        return 0.5 * (self._block(g.transpose(1, 2), 2) + self._block(x, 4))


class DSTLayer(nn.Module):
    """`alpha * CA(x) + (1 - alpha) * DSA(x)` over (N, S, D), with one attention for both."""

    def __init__(
        self, length: int, width: int, heads: int, alpha: float, gap: int, drop_path: float, attention: Attention
    ) -> None:
        super().__init__()
        attn = nn.MultiheadAttention(width, heads, batch_first=True)
        drop = DropPath(drop_path)
        self.alpha = alpha
        self.CA = CA(width, attn, drop, attention)
        self.DSA = DSA(length, width, gap, attn, drop, attention)

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens (N, S, D)."""
        return self.alpha * self.CA(x) + (1 - self.alpha) * self.DSA(x)  # type: ignore[no-any-return]


class EagerTransformerLayer(nn.TransformerEncoderLayer):
    """Post-norm ReLU layer over (N, S, D) without torch's fused inference path, which the published release lacks."""

    attention: Attention = "eager"

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Transform tokens (N, S, D); masks are not used."""
        x = self.norm1(src + _self_attention(self.self_attn, src, self.attention))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))  # type: ignore[no-any-return]


class SkeletonEmbedding(nn.Module):
    """Two small networks that embed (N, T, M*V*C) and (N, M*V, T*C) to width D."""

    def __init__(self, t_input_size: int, s_input_size: int, width: int) -> None:
        super().__init__()
        self.t_embedding, self.s_embedding = (
            nn.Sequential(nn.Linear(size, width), nn.LayerNorm(width), nn.ReLU(True), nn.Linear(width, width))
            for size in (t_input_size, s_input_size)
        )

    def forward(self, xt: Tensor, xs: Tensor) -> tuple[Tensor, Tensor]:
        """Embed (N, T, M*V*C) and (N, M*V, T*C) to (N, T, D) and (N, M*V, D)."""
        return self.t_embedding(xt), self.s_embedding(xs)


class PositionalEncoding(nn.Module):
    """Add sine and cosine positions to (N, S, D)."""

    pe: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        position = torch.arange(MAX_POSITIONS, dtype=torch.float32)[:, None]
        rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(1e4) / width))
        pe = torch.zeros(1, MAX_POSITIONS, width)
        pe[0, :, 0::2] = torch.sin(position * rate)
        pe[0, :, 1::2] = torch.cos(position * rate)[:, : width // 2]
        self.register_buffer("pe", pe)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, S, D) with the first S positions added."""
        return x + self.pe[:, : x.shape[1]]


class _Backbone(nn.Module):
    """What both backbones begin with; tokens and frames are read off the input sizes."""

    def __init__(
        self, t_input_size: int, s_input_size: int, hidden_size: int, num_head: int, num_layer: int,
        num_channels: int, attention: Attention,
    ) -> None:  # fmt: skip
        super().__init__()
        name = type(self).__name__
        for argument, size in (("t_input_size", t_input_size), ("s_input_size", s_input_size)):
            if size < num_channels or size % num_channels:
                raise ValueError(
                    f"{name}: {argument} must be a positive multiple of {num_channels} channels, got {size}. "
                    "Give M*V*C or T*C."
                )
        if attention not in ATTENTIONS:
            raise ValueError(f"{name}: attention must be one of {list(ATTENTIONS)}, got {attention!r}. Choose one.")
        if num_head < 1 or hidden_size % num_head or num_layer < 1:
            raise ValueError(
                f"{name}: num_head must divide hidden_size {hidden_size} and num_layer be at least 1, got {num_head} and "
                f"{num_layer}. Choose others."
            )
        self.num_layer, self.num_tokens, self.num_frames = (
            num_layer, t_input_size // num_channels, s_input_size // num_channels
        )  # fmt: skip
        self.spe = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, self.num_tokens, hidden_size), std=0.02))
        self.ske_emb = SkeletonEmbedding(t_input_size, s_input_size, hidden_size)
        self.tpe = PositionalEncoding(hidden_size)


class DSTE(_Backbone):
    """Dense spatio-temporal encoder over prepared tokens, (N, T, M*V*C) and (N, M*V, T*C).

    Args:
        t_input_size: M*V*C.
        s_input_size: T*C.
        hidden_size: Width D.
        num_head: Attention heads.
        num_layer: Layers of each stream; the published code always has two.
        alpha: Weight of the convolutional attention.
        gap: Every gap-th token passes the shift unchanged.
        drop_path: Probability that a branch is dropped for a sample in training.
        attention: "eager" computes attention maps as published, "sdpa" goes through scaled_dot_product_attention, "xformers"
            through memory_efficient_attention of xformers, which must be installed.
        num_channels: Channels C.
    """

    def __init__(
        self, t_input_size: int, s_input_size: int, hidden_size: int, num_head: int, num_layer: int = 2,
        alpha: float = 0.5, gap: int = 4, *, drop_path: float = 0.1, attention: Attention = "eager",
        num_channels: int = 3,
    ) -> None:  # fmt: skip
        super().__init__(t_input_size, s_input_size, hidden_size, num_head, num_layer, num_channels, attention)
        for layer in range(num_layer):
            for name, length in (("t_tr", self.num_frames), ("s_tr", self.num_tokens)):
                block = DSTLayer(length, hidden_size, num_head, alpha, gap, drop_path, attention)
                self.add_module(f"{name}{layer or ''}", block)
        self._source: DropPathSource | None = None

    @property
    def drop_path_source(self) -> DropPathSource | None:
        """Where the (N,) factors of each branch come from, by (layer, stream, slot); None is `torch.rand`."""
        return self._source

    @drop_path_source.setter
    def drop_path_source(self, source: DropPathSource | None) -> None:
        self._source = source
        for layer in range(self.num_layer):
            for stream, name in enumerate(("t_tr", "s_tr")):
                drop = self.get_submodule(f"{name}{layer or ''}.CA.drop")
                assert isinstance(drop, DropPath)
                drop.source = None if source is None else functools.partial(source, layer, stream)

    def forward(self, xt: Tensor, xs: Tensor) -> tuple[Tensor, Tensor]:
        """Encode (N, T, M*V*C) and (N, M*V, T*C) to (N, T, D) and (N, M*V, D)."""
        y_t, y_s = self.ske_emb(xt, xs)
        for layer in range(self.num_layer):
            y_t = self.get_submodule(f"t_tr{layer or ''}")(self.tpe(y_t))
        for layer in range(self.num_layer):
            y_s = self.get_submodule(f"s_tr{layer or ''}")(y_s + self.spe)
        return y_t, y_s


class STTR(_Backbone):
    """Spatio-temporal transformer over prepared tokens, (N, T, M*V*C) and (N, M*V, T*C); arguments as for `DSTE`.

    "eager" is what the release of torch that the paper used computes, "xformers" the same with its attention; "sdpa" is torch's
    own layer of today.
    """

    def __init__(
        self, t_input_size: int, s_input_size: int, hidden_size: int, num_head: int, num_layer: int = 2,
        *, attention: Attention = "eager", num_channels: int = 3,
    ) -> None:  # fmt: skip
        super().__init__(t_input_size, s_input_size, hidden_size, num_head, num_layer, num_channels, attention)
        kind = nn.TransformerEncoderLayer if attention == "sdpa" else EagerTransformerLayer
        for name in ("t_tr", "s_tr"):
            block = kind(hidden_size, num_head, hidden_size, dropout=0.0, batch_first=True)
            if isinstance(block, EagerTransformerLayer):
                block.attention = attention
            self.add_module(name, nn.TransformerEncoder(block, num_layer, enable_nested_tensor=False))

    def forward(self, xt: Tensor, xs: Tensor) -> tuple[Tensor, Tensor]:
        """Encode (N, T, M*V*C) and (N, M*V, T*C) to (N, T, D) and (N, M*V, D)."""
        t, s = self.ske_emb(xt, xs)
        return self.get_submodule("t_tr")(self.tpe(t)), self.get_submodule("s_tr")(s + self.spe)


def init_weights(module: nn.Module) -> None:
    """Initialise one module for `apply`: Linear (D_out, D_in) from N(0, 0.02) with zero bias, LayerNorm 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def _projector(features: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(True),
        nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(True),
        nn.Linear(hidden, out),
    )  # fmt: skip


class USDRL(nn.Module):
    """Backbone and projectors over four views of joint clips (N, C, T, V, M); arguments as for the backbones.

    `backbone` chooses "dste" or "sttr", which takes no `alpha`, `gap` and `drop_path`. Weights start as in the AAAI code.
    """

    def __init__(
        self, t_input_size: int, s_input_size: int, hidden_size: int, num_head: int, num_layer: int = 2,
        alpha: float = 0.5, gap: int = 4, *, backbone: Literal["dste", "sttr"] = "dste", drop_path: float = 0.1,
        attention: Attention = "eager", num_channels: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        if backbone not in ("dste", "sttr"):
            raise ValueError(f"USDRL: backbone must be 'dste' or 'sttr', got {backbone!r}. Choose one.")
        width = 2 * hidden_size
        self.backbone: DSTE | STTR
        if backbone == "dste":
            self.backbone = DSTE(
                t_input_size, s_input_size, hidden_size, num_head, num_layer, alpha, gap,
                drop_path=drop_path, attention=attention, num_channels=num_channels,
            )  # fmt: skip
        else:
            self.backbone = STTR(
                t_input_size, s_input_size, hidden_size, num_head, num_layer,
                attention=attention, num_channels=num_channels,
            )  # fmt: skip
        self.i_proj = _projector(width, width, 2 * width)
        self.s_proj = _projector(hidden_size, width, width)
        self.t_proj = _projector(hidden_size, width, width)
        self.apply(init_weights)

    def sub_forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embed one view, (N, C, T, V, M), to z_t and z_s (N, 2D) and z_i (N, 4D)."""
        n, c, t, v, m = x.shape
        xt = x.permute(0, 2, 4, 3, 1).reshape(n, t, m * v * c)
        xs = x.permute(0, 4, 3, 2, 1).reshape(n, m * v, t * c)
        y_t, y_s = self.backbone(xt, xs)
        y_t, y_s = y_t.amax(dim=1), y_s.amax(dim=1)
        y_i = torch.cat([y_t, y_s], dim=-1)
        return self.t_proj(y_t), self.s_proj(y_s), self.i_proj(y_i)

    def forward(
        self, v1: Tensor, v2: Tensor, v3: Tensor, v4: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Embed four views, (N, C, T, V, M) each, one after another, to lists of z_t (N, 2D), z_s (N, 2D), z_i (N, 4D)."""
        z_t, z_s, z_i = [], [], []
        for view in (v1, v2, v3, v4):
            t, s, i = self.sub_forward(view)
            z_t.append(t)
            z_s.append(s)
            z_i.append(i)
        return z_t, z_s, z_i
