"""What a fused layer would silently ignore is refused by name; what it must follow, it follows."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from fastskel.models import DSTE, STTR
from fastskel.nn.dst_layer import DSTLayer
from fastskel.nn.post_norm import PostNormLayer

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Adapter(nn.Module):
    """Wraps a linear as adapters do, with its parameters in sight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, x):
        return self.base(x) + 1


class Louder(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def layer() -> DSTLayer:
    torch.manual_seed(0)
    return DSTLayer(5, 8, 1, 0.5, 4)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: setattr(m.CA.mlp, "fc1", Adapter(m.CA.mlp.fc1)), "got Adapter of another forward"),
        (lambda m: setattr(m.DSA.mlp, "fc2", Louder(16, 8)), "got Louder of another forward"),
        (lambda m: setattr(m.DSA, "wt1", nn.Linear(5, 5, bias=False)), "got Linear"),
        (lambda m: setattr(m.CA, "norm1", nn.Identity()), "every LayerNorm .* got Identity of another forward"),
        (lambda m: m.CA.conv1.register_forward_hook(print), "every Conv1d .* got Conv1d with hooks"),
        (lambda m: prune.l1_unstructured(m.CA.mlp.fc1, "weight", 0.5), "got Linear with hooks"),
        (lambda m: setattr(m.DSA, "attn", nn.MultiheadAttention(8, 1)), "must share one attention"),
        (lambda m: setattr(m.DSA.norm2, "eps", 1.0), "all norms one eps"),
    ],
    ids=["adapter", "subclass", "no bias", "identity", "hook", "pruned", "untied", "eps"],
)
def test_parts_that_would_be_ignored_are_refused(change, message):
    module = layer()
    change(module)
    with pytest.raises(ValueError, match=message):
        module(X)


def test_post_norm_and_embedding_refuse_them_too():
    module = PostNormLayer(8, 1)
    module.linear1.register_forward_pre_hook(print)
    with pytest.raises(ValueError, match="PostNormLayer: every Linear .* with hooks"):
        module(X)
    encoder = STTR(num_joints=5, num_frames=4, width=8)
    encoder.ske_emb.t_embedding[3] = Louder(8, 8)
    with pytest.raises(ValueError, match="SkeletonEmbedding: every Linear .* Louder"):
        encoder.streams(torch.zeros(1, 4, 30), torch.zeros(1, 10, 12))


def test_parametrisations_are_followed():
    module, plain = layer(), layer()
    parametrizations.weight_norm(module.CA.mlp.fc1)
    torch.testing.assert_close(module(X), plain(X))
    with torch.no_grad():
        module.CA.mlp.fc1.parametrizations.weight.original0.mul_(2)
        plain.CA.mlp.fc1.weight.mul_(2)
    torch.testing.assert_close(module(X), plain(X))


@pytest.mark.parametrize("late", ["backward", "change"])
def test_merged_once_is_guarded(late):
    encoder = DSTE(num_joints=5, num_frames=4, width=8, drop_path=0.0)
    tokens = torch.randn(2, 4, 30), torch.randn(2, 10, 12)
    with encoder.merged_once():
        loss = sum(y.sum() for y in encoder.streams(*tokens))
        if late == "change":
            with torch.no_grad():
                encoder.layers("t_tr")[0].CA.attn.in_proj_weight.mul_(2)
            with pytest.raises(ValueError, match="merged_once: parameters must not change inside the block"):
                encoder.streams(*tokens)
            return
    with pytest.raises(ValueError, match="merged_once: backward passes must run inside the block"):
        loss.backward()


def test_merged_once_entered_without_gradients_still_trains():
    encoder = DSTE(num_joints=5, num_frames=4, width=8, drop_path=0.0)
    tokens = torch.randn(2, 4, 30), torch.randn(2, 10, 12)
    with torch.no_grad(), encoder.merged_once(), torch.enable_grad():
        sum(y.square().sum() for y in encoder.streams(*tokens)).backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_bf16_works_on_processors_without_avx512():
    code = (
        "import torch; from fastskel.models import DSTE; m = DSTE(num_joints=5, num_frames=4, width=8).bfloat16()\n"
        "out = m.streams(torch.randn(2, 4, 30).bfloat16(), torch.randn(2, 10, 12).bfloat16())\n"
        "sum(y.float().sum() for y in out).backward(); print('done')"
    )
    narrow = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=narrow, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "done", done.stderr
