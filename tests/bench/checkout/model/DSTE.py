"""The published model's names, arguments, keys and mathematics, written anew from their description, for tests of a checkout."""

import math

import torch
from torch import nn


class DropPath(nn.Module):
    def __init__(self, drop_prob=0.1):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training or not self.drop_prob:
            return x
        keep = 1 - self.drop_prob
        return x / keep * (torch.rand(len(x), 1, 1, device=x.device) < keep)


class MLP(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def attend(attn, x):
    q, k, v = (x @ attn.in_proj_weight.T + attn.in_proj_bias).split(x.shape[-1], -1)
    scores = (q @ k.transpose(1, 2) / math.sqrt(x.shape[-1])).softmax(-1)
    return attn.out_proj(scores @ v)


class CA(nn.Module):
    def __init__(self, d, attn, drop):
        super().__init__()
        self.attn, self.conv1 = attn, nn.Conv1d(d, d, 1)
        self.norm1, self.norm2, self.mlp, self.drop_path = nn.LayerNorm(d), nn.LayerNorm(d), MLP(d), drop

    def forward(self, x):
        mixed = x + torch.relu(x @ self.conv1.weight[:, :, 0].T + self.conv1.bias)
        u = x + self.drop_path(attend(self.attn, self.norm1(mixed)))
        return self.drop_path(self.mlp(self.norm2(u)))


class DSA(nn.Module):
    def __init__(self, length, d, gap, attn, drop):
        super().__init__()
        self.wt1, self.wt2, self.attn, self.gap = nn.Linear(length, length), nn.Linear(length, length), attn, gap
        self.norm1, self.norm2, self.mlp, self.drop_path = nn.LayerNorm(d), nn.LayerNorm(d), MLP(d), drop

    def branch(self, x):
        x = x + self.drop_path(attend(self.attn, self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def forward(self, x):
        f = x.transpose(1, 2)
        kept = torch.arange(f.shape[2], device=x.device) % self.gap == 0
        shifted = torch.where(kept, f, f + self.wt2(torch.relu(self.wt1(f))))
        return (self.branch(shifted.transpose(1, 2)) + self.branch(x)) / 2


class DST_Layer(nn.Module):
    def __init__(self, length, d, heads, alpha, gap):
        super().__init__()
        attn, drop, self.alpha = nn.MultiheadAttention(d, heads, batch_first=True), DropPath(), alpha
        self.CA, self.DSA = CA(d, attn, drop), DSA(length, d, gap, attn, drop)

    def forward(self, x):
        return self.alpha * self.CA(x) + (1 - self.alpha) * self.DSA(x)


class Skeleton_Emb(nn.Module):
    def __init__(self, t_size, s_size, d):
        super().__init__()
        self.t_embedding = nn.Sequential(nn.Linear(t_size, d), nn.LayerNorm(d), nn.ReLU(True), nn.Linear(d, d))
        self.s_embedding = nn.Sequential(nn.Linear(s_size, d), nn.LayerNorm(d), nn.ReLU(True), nn.Linear(d, d))


class PositionalEncoding(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.register_buffer("pe", torch.zeros(1, 200, d))


class DSTE(nn.Module):
    def __init__(self, t_input_size, s_input_size, hidden_size, num_head, num_layer, alpha, gap, kernel_size):
        super().__init__()
        frames, tokens = s_input_size // 3, t_input_size // 3
        self.spe = nn.Parameter(torch.zeros(1, tokens, hidden_size))
        self.ske_emb = Skeleton_Emb(t_input_size, s_input_size, hidden_size)
        self.tpe = PositionalEncoding(hidden_size)
        self.t_tr, self.s_tr, self.t_tr1, self.s_tr1 = (
            DST_Layer(length, hidden_size, num_head, alpha, gap) for length in (frames, tokens, frames, tokens)
        )

    def forward(self, jt, js):
        t, s = self.ske_emb.t_embedding(jt), self.ske_emb.s_embedding(js)
        pe = self.tpe.pe[:, : t.shape[1]]
        return self.t_tr1(self.t_tr(t + pe) + pe), self.s_tr1(self.s_tr(s + self.spe) + self.spe)


def projector(d_in, d, d_out):
    first = nn.Linear(d_in, d), nn.BatchNorm1d(d), nn.ReLU(True)
    return nn.Sequential(*first, nn.Linear(d, d), nn.BatchNorm1d(d), nn.ReLU(True), nn.Linear(d, d_out))


class USDRL(nn.Module):
    def __init__(
        self, t_input_size, s_input_size, hidden_size, num_head, num_layer, modality="joint", alpha=0.5, gap=4, kernel_size=1
    ):
        super().__init__()
        self.backbone = DSTE(t_input_size, s_input_size, hidden_size, num_head, num_layer, alpha, gap, kernel_size)
        d = 2 * hidden_size
        self.i_proj, self.s_proj, self.t_proj = projector(d, d, 2 * d), projector(hidden_size, d, d), projector(hidden_size, d, d)

    def sub_forward(self, x):
        jt, js = x.permute(0, 2, 4, 3, 1).flatten(2), x.permute(0, 4, 3, 2, 1).flatten(1, 2).flatten(2)
        y_t, y_s = (y.amax(dim=1) for y in self.backbone(jt, js))
        return self.t_proj(y_t), self.s_proj(y_s), self.i_proj(torch.cat([y_t, y_s], -1))

    def forward(self, v1, v2, v3, v4):
        return tuple(map(list, zip(*(self.sub_forward(v) for v in (v1, v2, v3, v4)))))
