"""Layers that multiply 8-bit floats: products against their definition, the scope, gradients, chunks, and loss curves."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastskel.data import make_synthetic
from fastskel.nn import gemm
from fastskel.nn.dst_layer import DSTLayer
from fastskel.nn.fp8 import check_fp8, fp8_active, fp8_asked, fp8_product, fp8_products, fp8_within
from fastskel.nn.post_norm import PostNormLayer
from fastskel.nn.precision import precision_of
from fastskel.recipes import RECIPES
from fastskel.train import device as module
from fastskel.train import pretrain, start

CPU = torch.device("cpu")
LARGEST = {"forward": 448.0, "backward": 57344.0}
TYPES = {"forward": torch.float8_e4m3fn, "backward": torch.float8_e5m2}
HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="no GPU from capability 9.0 on"
)
# half of a step of the type: 3 and 2 bits after the point
STEP = {"forward": 2.0**-4, "backward": 2.0**-3}


def seeded(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).bfloat16()


def by_definition(x: Tensor, weight: Tensor, direction: str) -> Tensor:
    def rounded(rows: Tensor, kind: str) -> Tensor:
        factors = rows.float().abs().amax(-1, keepdim=True) / LARGEST[kind]
        return (rows.float() / factors).to(TYPES[kind]).double() * factors.double()

    return rounded(x, direction) @ rounded(weight, "forward").T


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("sizes", [(1, 16, 16), (7, 32, 48), (65, 64, 16)], ids=str)
def test_products_are_those_of_rounded_rows(sizes, direction) -> None:
    rows, inner, outer = sizes
    # rows of very different sizes: each has its own factor
    x = seeded(rows, inner) * torch.logspace(-6, 4, rows)[:, None].bfloat16()
    weight, bias = seeded(outer, inner, seed=1), seeded(outer, seed=2)
    found = fp8_product(x, weight, None, direction)
    assert found.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits of each result; sums are float32
    expected = by_definition(x, weight, direction)
    bound = 2.0**-8 * expected.abs() + 1e-5 * (x.double().abs() @ weight.double().abs().T)
    assert ((found.double() - expected).abs() <= bound).all()
    biased = fp8_product(x, weight, bias, direction).double()
    assert ((biased - expected - bias.double()).abs() <= bound + 2.0**-8 * (bias.double().abs() + expected.abs())).all()
    # and near the exact product: two operands, each within half of a step
    exact = x.double() @ weight.double().T
    size = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1)
    assert ((expected - exact).abs() <= (STEP[direction] + STEP["forward"]) * size).all()
    assert not torch.equal(expected, exact)


def test_a_row_does_not_depend_on_the_others() -> None:
    x, weight = seeded(6, 32), seeded(16, 32, seed=1)
    x[3] *= 1e4
    together = fp8_product(x, weight, None, "forward")
    for row in range(6):
        assert torch.equal(fp8_product(x[row : row + 1], weight, None, "forward")[0], together[row])


def test_zeros_no_rows_and_strides() -> None:
    weight = seeded(32, 16)
    assert torch.equal(fp8_product(torch.zeros(2, 3, 16).bfloat16(), weight, None, "forward"), torch.zeros(2, 3, 32).bfloat16())
    assert fp8_product(torch.zeros(0, 3, 16).bfloat16(), weight, None, "backward").shape == (0, 3, 32)
    x = seeded(5, 32)
    assert torch.equal(fp8_product(x, weight.mT, None, "backward"), fp8_product(x, weight.mT.contiguous(), None, "backward"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_stays_so_in_its_row(value) -> None:
    x = seeded(3, 16)
    x[1, 4] = value
    found = fp8_product(x, seeded(16, 16, seed=1), None, "forward")
    assert found.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("sizes", [(24, 16), (16, 40)], ids=str)
def test_widths_that_gpus_cannot_multiply_are_refused(sizes) -> None:
    with pytest.raises(ValueError, match=r"fp8: widths must be multiples of 16, got a product of"):
        fp8_product(seeded(2, sizes[0]), seeded(sizes[1], sizes[0]), None, "forward")


def test_it_holds_where_it_was_asked_for_and_in_this_thread() -> None:
    weight = torch.zeros(16, 16)

    def chosen(dtype: torch.dtype = torch.bfloat16) -> bool:
        with torch.autocast("cpu", dtype):
            return precision_of(torch.zeros(1, 1, 16), weight, "block").fp8

    assert not chosen() and not fp8_asked()
    with fp8_products():
        assert chosen() and not chosen(torch.float16) and not fp8_active()
        # without autocast everything is as it was
        assert not precision_of(torch.zeros(1, 1, 16), weight, "block").fp8
        seen = []
        other = threading.Thread(target=lambda: seen.append(fp8_asked()))
        other.start()
        other.join()
        assert seen == [False]
    assert not chosen()
    x, w = seeded(4, 16), seeded(16, 16, seed=1)
    with fp8_within():
        inside = gemm.linear(x, w, None, "relu"), gemm.matmul(x, w)
    assert torch.equal(inside[0], fp8_product(x, w, None, "forward").relu())
    assert torch.equal(inside[1], fp8_product(x, w.T, None, "backward"))
    assert not torch.equal(inside[0], gemm.linear(x, w, None, "relu"))


def make_layer(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layer = DSTLayer(8, 32, 1, 0.5, 4) if kind == "dst" else PostNormLayer(32, 2)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.15)
    return layer


def passes(layer: nn.Module, precision: str, memory: str = "lean") -> list[Tensor]:
    """Output and all gradients."""
    x = torch.randn(6, 8, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    layer.zero_grad()
    with module.mixed_precision(precision, CPU):
        y = layer(x, memory=memory)
    # outside of the scope, as a training's backward pass is
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    a, b = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (ours, theirs))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", ["dst", "post-norm"])
def test_layers_are_as_near_as_their_types_allow(kind) -> None:
    layer = make_layer(kind)
    exact = passes(layer, "fp32")
    apart = {name: [distance([a], [b]) for a, b in zip(passes(layer, name), exact, strict=True) if b.norm() > 0]
             for name in ("bf16", "fp8")}  # fmt: skip
    # output and input's gradient: some products in a row, each operand within 1/16 or 1/8 at most, a third of that on average
    assert apart["fp8"][0] < 0.08 and apart["fp8"][1] < 0.15
    assert max(apart["fp8"]) < 0.5
    # coarser than bfloat16, forward and backward: it was in fp8
    assert apart["fp8"][0] > 3 * apart["bf16"][0] and apart["fp8"][1] > 3 * apart["bf16"][1]


@pytest.mark.parametrize("kind", ["dst", "post-norm"])
@pytest.mark.parametrize("memory", ["saved", "layer"])
def test_what_is_computed_again_is_the_same(kind, memory) -> None:
    layer = make_layer(kind)
    for ours, theirs in zip(passes(layer, "fp8", memory), passes(layer, "fp8"), strict=True):
        assert torch.equal(ours, theirs)


def test_the_backward_pass_is_in_fp8_in_any_thread(monkeypatch) -> None:
    directions, genuine = [], gemm.fp8_product

    def product(x: Tensor, weight: Tensor, bias: Tensor | None, direction: str) -> Tensor:
        directions.append(direction)
        return genuine(x, weight, bias, direction)

    monkeypatch.setattr(gemm, "fp8_product", product)
    layer = make_layer("dst")
    x = torch.randn(6, 8, 32).requires_grad_()
    with module.mixed_precision("fp8", CPU):
        y = layer(x)
    # convolution, both projections, and two linears of either MLP
    assert directions == ["forward"] * 7
    other = threading.Thread(target=y.sum().backward)
    other.start()
    other.join()
    assert directions[7:] == ["backward"] * 7 and x.grad is not None


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_synthetic(tmp_path_factory.mktemp("data") / "packed", num_clips=40, num_classes=4, num_subjects=4)


def make_stage(dataset, **settings):
    small = dict(
        width=32, num_layers=1, frames=16, crop_min_frames=16, num_views=2, batch_size=16, epochs=25, milestones=(20,),
        lr=1e-3, drop_path=0.1, num_threads=0,
    )  # fmt: skip
    (stage,) = replace(RECIPES["usdrl-demo"](), **(small | settings)).stages(dataset)
    return stage


def losses(run) -> Tensor:
    return torch.tensor([json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()])


@pytest.mark.parametrize("encoder", ["dste", "sttr"])
def test_the_loss_curve_is_that_of_bf16(dataset, tmp_path, encoder) -> None:
    curves = {}
    for precision in ("bf16", "fp8"):
        stage = make_stage(dataset, precision=precision, encoder=encoder)
        pretrain(stage, dataset, tmp_path / precision, device="cpu", progress=False)
        curves[precision] = losses(tmp_path / precision)
    assert len(curves["fp8"]) == 50 and not torch.equal(curves["fp8"], curves["bf16"])
    # it falls, and the other curves beside it; single steps of a batch of 16 scatter
    assert curves["bf16"][-5:].mean() < 0.9 * curves["bf16"][:5].mean()
    apart = (curves["fp8"] - curves["bf16"]).abs() / curves["bf16"].abs()
    assert apart.mean() < 0.02 and apart.max() < 0.1, apart


def test_chunks_and_resuming_keep_their_promises(dataset, tmp_path, monkeypatch) -> None:
    stage = make_stage(dataset, precision="fp8", epochs=2, chunk=8)
    pretrain(stage, dataset, tmp_path / "whole", device="cpu", progress=False)

    class Stopped(BaseException):
        pass

    left = [3]

    def stop(self) -> None:
        left[0] -= 1
        if not left[0]:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("fastskel.objectives.MGFD.after_step", stop)
        with pytest.raises(Stopped):
            pretrain(replace(stage, checkpoint_steps=1), dataset, tmp_path / "pieces", device="cpu", progress=False)
    pretrain(stage, dataset, tmp_path / "pieces", device="cpu", progress=False, resume=True)
    assert torch.equal(losses(tmp_path / "pieces"), losses(tmp_path / "whole"))


def test_where_nothing_would_be_in_fp8_it_is_refused(dataset, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"fp8: encoder must have layers that multiply in fp8, got Linear without. Choose bf16."):
        check_fp8(nn.Linear(16, 16), CPU)
    encoder, _ = start(make_stage(dataset))
    check_fp8(encoder, CPU)

    def refuses(*given, **named):
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0\nand more")

    monkeypatch.setattr(torch, "_scaled_mm", refuses)
    with pytest.raises(ValueError, match=r"fp8: device must multiply .*, got cpu: torch._scaled_mm is only .* >= 9.0."):
        check_fp8(encoder, CPU)


def test_a_refused_run_leaves_no_folder(dataset, tmp_path) -> None:
    # 24 features cannot be multiplied: said by the first step
    with pytest.raises(ValueError, match="fp8: widths must be multiples of 16, got a product of 24 with 24 features"):
        pretrain(make_stage(dataset, precision="fp8", width=24), dataset, tmp_path / "run", device="cpu", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@HOPPER
def test_a_gpu_multiplies_what_a_cpu_does() -> None:
    for direction in ("forward", "backward"):
        x, weight, bias = seeded(200, 256), seeded(512, 256, seed=1), seeded(512, seed=2)
        expected = fp8_product(x, weight, bias, direction)
        found = fp8_product(x.cuda(), weight.cuda(), bias.cuda(), direction).cpu()
        # sums of fewer digits than float32 in the direction forward
        assert distance([found], [expected]) < 1e-2


@pytest.mark.gpu
@HOPPER
def test_the_loss_curve_on_a_gpu_is_that_of_bf16(dataset, tmp_path) -> None:
    curves = {}
    for precision in ("bf16", "fp8"):
        stage = make_stage(dataset, precision=precision)
        pretrain(stage, dataset, tmp_path / precision, device="cuda", progress=False)
        curves[precision] = losses(tmp_path / precision)
    apart = (curves["fp8"] - curves["bf16"]).abs() / curves["bf16"].abs()
    assert apart.mean() < 0.02 and apart.max() < 0.1, apart
