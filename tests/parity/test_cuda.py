"""What the CPU tests prove, once more on a GPU: the recorded step, one step against the CPU's, and resuming bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fastskel.compat.usdrl import dste, loss, sttr
from fastskel.data import Loader, make_synthetic, usdrl_views
from fastskel.models import ENCODERS
from fastskel.objectives import MGFD
from fastskel.recipes import USDRLRecipe
from fastskel.train import pretrain, read_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

DEVICE = "cuda"
# as the parity tests of the CPU; gradients below NOISE are zero in exact arithmetic
TOLERANCE, NOISE = 1e-4, 1e-4
STEPS = ["step_dste_h32_aaai.npz", "step_sttr_h32_aaai.npz", "step_dste_h32_v17_aaai.npz"]


def close(actual: torch.Tensor, expected: torch.Tensor, key: str) -> None:
    a, b = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert a.shape == b.shape, key
    if b.norm() < NOISE:
        assert a.norm() < NOISE, key
    else:
        assert (a - b).norm() / b.norm() <= TOLERANCE, key


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    # TF32 has 10 bits of mantissa: it is not what is compared here
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", STEPS)
def test_recorded_step(golden, name: str) -> None:
    archive = golden(name)
    build = dste.USDRL if "dste" in name else sttr.USDRL
    model = build(archive["in/v0"].shape[3] * 2 * 3, 192, 32, 1, 2)
    model.load_state_dict({k[3:]: torch.from_numpy(v) for k, v in archive.items() if k.startswith("sd/")})
    if "dste" in name:
        model.backbone.drop_path = 0.0
    model.to(DEVICE).train()
    z_t, z_s, z_i = model(*(torch.from_numpy(archive[f"in/v{i}"]).to(DEVICE) for i in range(4)))

    def domain(z: list[torch.Tensor]) -> torch.Tensor:
        return 5 * loss.similarity(z, torch.nn.MSELoss()) + sum(map(loss.v_ac, z)) + 1e-3 * loss.cal_xc(z)

    total = domain(z_i) + 0.5 * (domain(z_t) + domain(z_s))
    close(total, torch.from_numpy(np.asarray(archive["train/loss_aaai"])), "loss")
    total.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        close(parameter.grad, torch.from_numpy(archive[f"grad/{key}"]), key)


@pytest.mark.parametrize("backbone", ["usdrl-dste", "usdrl-sttr"])
def test_step_equals_the_cpu(backbone: str, tmp_path: Path) -> None:
    """With DropPath: its draws are addressed, so both devices drop the same branches."""
    views = usdrl_views(frames=16, min_frames=16)
    batch = next(iter(Loader(make_synthetic(tmp_path / "data", num_clips=12), views=views, batch_size=12)))
    results = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        encoder = ENCODERS[backbone](num_bodies=1, num_frames=16, width=32)
        objective = MGFD(encoder, views)
        both = torch.nn.ModuleDict({"encoder": encoder, "objective": objective}).to(device).train()
        moved = batch.to(device).at(7, 3)
        terms = objective.loss(objective.embed(encoder, moved), moved, 0.0)
        terms.total.backward()
        gradients = {key: parameter.grad for key, parameter in both.named_parameters()}
        results.append({"loss": terms.total, **terms.terms, **gradients})
    for key, expected in results[0].items():
        close(results[1][key], expected, key)


def test_resume_is_bit_for_bit(tmp_path: Path) -> None:
    dataset = make_synthetic(tmp_path / "data", num_clips=24)
    recipe = USDRLRecipe(
        width=32, frames=16, crop_min_frames=16, epochs=2, batch_size=8, milestones=(), checkpoint_steps=1
    )
    (stage,) = recipe.stages(dataset)

    def stop(*_: object) -> dict[str, float]:
        raise KeyboardInterrupt

    whole = read_checkpoint(pretrain(stage, dataset, tmp_path / "whole", device=DEVICE, progress=False))
    with pytest.raises(KeyboardInterrupt):
        pretrain(stage, dataset, tmp_path / "parts", device=DEVICE, progress=False, monitors=[stop])
    parts = read_checkpoint(pretrain(stage, dataset, tmp_path / "parts", device=DEVICE, progress=False, resume=True))
    assert whole.model.keys() == parts.model.keys()
    for key, value in whole.model.items():
        assert torch.equal(value, parts.model[key]), key
