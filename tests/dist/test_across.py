"""Decorrelation over processes against one process with the whole batch: energies, gradients, a model's parameters."""

from __future__ import annotations

import copy
import datetime
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fastskel.kernels.reference.decorrelation import Energies, Options, decorrelation, pairs_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from fastskel.data.batch import Batch, View
from fastskel.data.views import usdrl_views
from fastskel.models import DSTE
from fastskel.objectives import MGFD, across
from fastskel.objectives.across import choose_across, decorrelate_across, mgfd_across, similarity_across
from fastskel.objectives.functional import mgfd_loss, similarity
from fastskel.skeleton import topology

OPTIONS = {
    "usdrl": Options(),
    "covariance": Options(pairs=False),
    "pairs": Options(covariances=False),
    "hinge": Options(pairs=False, covariances=False),
    "barlow": Options(gamma=0.9, variance_eps=1e-2, std_eps=1e-3, correction=0),
}
COUNTS = {
    2: {"even": (4, 4), "uneven": (5, 3), "empty": (0, 6), "least": (1, 1)},
    4: {"even": (2, 2, 2, 2), "uneven": (3, 1, 4, 2), "empty": (3, 0, 2, 1), "least": (0, 1, 1, 0)},
}
# panels of 4 columns: whole ones, one of a single column, one panel only
WIDTHS = (8, 13, 3)
TYPES = (torch.float64, torch.float32, torch.bfloat16)
FORMS = ("gram", "direct")
CASES = [
    (world, name, width, option, dtype, form)
    for world, named in COUNTS.items()
    for name in named
    for width in WIDTHS
    for option in OPTIONS
    for dtype in TYPES
    for form in FORMS
    # all types where rows are uneven, and all distributions of rows and options where they are the usual
    if (option in ("usdrl", "covariance", "barlow") or dtype == torch.float64)
    and (name == "uneven" or (option == "usdrl" and dtype == torch.float64))
]
LOSS_COUNTS = {2: (5, 3), 4: (3, 1, 0, 6)}
XCORR_WEIGHTS = (1e-3, 0.0, 0.7)
MODEL_COUNTS = {2: (7, 5), 4: (4, 1, 5, 2)}
MODEL_TYPES = (torch.float64, torch.float32)
# biases that the next mean over the batch takes away: zero in exact arithmetic, and nothing to be relative to
WITHOUT_GRADIENT = ("proj.0.bias", "proj.3.bias", "proj.6.bias", "_tr1.CA.mlp.fc2.bias", "_tr1.DSA.mlp.fc2.bias")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def embeddings(rows: int, width: int, *, num_views: int = 3, seed: int = 0) -> Tensor:
    """Views that have something in common, features on both sides of the hinge and away from zero, (W, N, D)."""
    z = normal(num_views, rows, width, seed=seed) + normal(rows, width, seed=seed + 100)
    return z * torch.linspace(0.2, 1.5, width, dtype=torch.float64) + 2


def weights_of(num_views: int, options: Options) -> Energies:
    pairs = len(pairs_of(num_views)) if options.pairs else 0
    sizes = (num_views, num_views, pairs, pairs)
    return Energies(*(normal(size, seed=70 + number) for number, size in enumerate(sizes)))


def share(x: Tensor, counts: tuple[int, ...], rank: int, dim: int = 1) -> Tensor:
    return x.split(list(counts), dim)[rank]


def refusal(function: Callable[[], Any]) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


class Model(nn.Module):
    """Encoder, projectors and loss; with a group they share statistics, without one the batch is all there is."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.encoder = DSTE(num_joints=25, num_bodies=1, num_frames=4, width=16, drop_path=0.0)
        self.objective = MGFD(self.encoder, usdrl_views(num_views=3))
        self.objective.share(group, synchronise_norms=True)
        with torch.no_grad():
            # away from the small start: gradients of all parts, and features that differ
            for parameter in self.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))

    def forward(self, clips: Tensor) -> Tensor:
        present = clips.new_ones(clips.shape[1:4]).bool()
        views = [View(view, present, topology("ntu-25")) for view in clips]
        batch = Batch(views, torch.zeros(clips.shape[1]), torch.arange(clips.shape[1]))
        return self.objective.loss(self.objective.embed(self.encoder, batch), batch, 0.0).total


def clips(rows: int) -> Tensor:
    return normal(3, rows, 4, 1, 25, 3, seed=8)


def stacks(rows: int) -> list[Tensor]:
    return [embeddings(rows, width, num_views=4, seed=seed) for seed, width in enumerate((6, 6, 11))]


def autocast_loss(
    z: list[Tensor], loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of float32 stacks inside of autocast."""
    leaves = [part.float().requires_grad_() for part in z]
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = loss(*leaves)
    total.backward()
    return total.detach(), [leaf.grad for leaf in leaves]


def work(rank: int, world: int) -> dict[Any, Any]:
    """What each process computes."""
    across.PANEL = 4
    found: dict[Any, Any] = {}
    for case in CASES:
        _, name, width, option, dtype, form = case
        if case[0] == world:
            counts = COUNTS[world][name]
            z = share(embeddings(sum(counts), width), counts, rank).to(dtype)
            weights = Energies(*(part.to(dtype) for part in weights_of(3, OPTIONS[option])))
            energies, grad = decorrelate_across(z, OPTIONS[option], weights, form=form)
            found[str(case)] = [*energies, grad]
    counts = LOSS_COUNTS[world]
    z = embeddings(sum(counts), 7, num_views=4)
    mine = share(z, counts, rank)
    for form in FORMS:
        energies, grad = decorrelate_across(mine.transpose(0, 2).contiguous().transpose(0, 2), form=form, counts=counts)
        assert grad is None
        found[f"plain {form}"] = list(energies)
        constant = mine.clone()
        constant[1, :, 2] = 3.0
        energies, grad = decorrelate_across(constant, Options(), weights_of(4, Options()), dist.group.WORLD, form=form)
        found[f"constant {form}"] = [*energies, grad]
    for weight in XCORR_WEIGHTS:
        leaves = [share(part, counts, rank).requires_grad_() for part in stacks(sum(counts))]
        total, terms = mgfd_across(*leaves, dist.group.WORLD, xcorr_weight=weight)
        (1.7 * total).backward()
        assert not any(part.requires_grad for part in terms.values())
        found[f"loss {weight}"] = {"total": total.detach(), "terms": terms, "grads": [leaf.grad for leaf in leaves]}
    found["autocast"] = autocast_loss([share(part, counts, rank) for part in stacks(sum(counts))], mgfd_across)
    leaf = mine.clone().requires_grad_()
    value = similarity_across(leaf)
    value.backward()
    found["similarity"] = value.detach(), leaf.grad
    found["one row"] = refusal(lambda: decorrelate_across(torch.zeros(2, int(rank == 0), 4)))
    found["widths"] = refusal(
        lambda: mgfd_across(*(torch.zeros(2, 3, 4 + (rank if part == 2 else 0)) for part in range(3)))
    )
    found["types"] = refusal(
        lambda: decorrelate_across(torch.zeros(2, 3, 4, dtype=(torch.bfloat16, torch.float16)[rank % 2]))
    )
    found["gradients"] = refusal(
        lambda: mgfd_across(*(torch.zeros(2, 3, 4).requires_grad_(rank == 0 and part == 1) for part in range(3)))
    )
    found["correction"] = refusal(lambda: decorrelate_across(torch.zeros(2, 1, 4), Options(correction=world)))
    found["counts"] = refusal(lambda: decorrelate_across(mine, counts=[1] * (world + 1)))

    counts = MODEL_COUNTS[world]
    for dtype in MODEL_TYPES:
        model = Model(dist.group.WORLD).to(dtype).train()
        found["copy"] = copy.deepcopy(model).objective.group is dist.group.WORLD
        # buffers are sent before a forward pass: after it they are what every process computed
        parallel = DistributedDataParallel(model)
        loss = parallel(share(clips(sum(counts)), counts, rank).to(dtype))
        loss.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        found[f"model {dtype}"] = {"loss": loss.detach(), "grads": grads, "buffers": dict(model.named_buffers())}
    return found


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
    )
    torch.save(work(rank, world), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=sorted(COUNTS), ids="{} processes".format)
def world(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def processes(run_processes, world) -> list[dict[str, Any]]:
    """What the processes computed, by rank."""
    return run_processes(__file__, world)


forms = pytest.mark.parametrize("form", FORMS)


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


def reference(z: Tensor, options: Options, weights: Energies) -> list[Tensor]:
    """Energies of all rows, and their weighted sum's gradient."""
    z = z.double().requires_grad_()
    energies = decorrelation(z, options)
    sum((part * weight.double()).sum() for part, weight in zip(energies, weights, strict=True)).backward()
    return [*(part.detach() for part in energies), z.grad]


@pytest.mark.parametrize("name", COUNTS[2])
@forms
def test_energies_and_gradients_equal_one_process(processes, world, name, form):
    cases = [case for case in CASES if (case[0], case[1], case[5]) == (world, name, form)]
    assert cases
    for case in cases:
        _, _, width, option, dtype, _ = case
        weights = Energies(*(part.to(dtype) for part in weights_of(3, OPTIONS[option])))
        *energies, grad = reference(embeddings(sum(COUNTS[world][name]), width).to(dtype), OPTIONS[option], weights)
        results = [part[str(case)] for part in processes]
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        # inputs are the same numbers in all types: 16-bit ones are added in float32
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        for number, truth in enumerate(energies):
            actual = results[0][number]
            assert actual.dtype == accumulator and actual.shape == truth.shape
            # the same bits in all processes
            assert all(torch.equal(result[number], actual) for result in results), case
            # where two rows are all there is, some energies are differences of equal numbers
            torch.testing.assert_close(
                actual.double(), truth, rtol=tolerance, atol=tolerance, msg=lambda text, case=case: f"{case}: {text}"
            )
        actual = torch.cat([result[-1] for result in results], 1)
        assert actual.dtype == accumulator and actual.shape == grad.shape
        assert distance(actual, grad) <= tolerance, case


@forms
def test_without_weights_and_with_other_strides(processes, world, form):
    truth = decorrelation(embeddings(sum(LOSS_COUNTS[world]), 7, num_views=4))
    for found in processes:
        for actual, expected in zip(found[f"plain {form}"], truth, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@forms
def test_a_constant_feature_gives_nan_as_in_one_process(processes, world, form):
    z = embeddings(sum(LOSS_COUNTS[world]), 7, num_views=4)
    z[1, :, 2] = 3.0
    *energies, grad = reference(z, Options(), weights_of(4, Options()))
    for part in processes:
        for actual, expected in zip(part[f"constant {form}"], energies, strict=False):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    actual = torch.cat([part[f"constant {form}"][-1] for part in processes], 1)
    assert torch.equal(actual.isnan(), grad.isnan()) and grad.isnan().any()


@pytest.mark.parametrize("weight", XCORR_WEIGHTS)
def test_loss_equals_one_process(processes, world, weight):
    found, counts = [part[f"loss {weight}"] for part in processes], LOSS_COUNTS[world]
    leaves = [part.requires_grad_() for part in stacks(sum(counts))]
    total, terms = mgfd_loss(*leaves, xcorr_weight=weight)
    (1.7 * total).backward()
    for part in found:
        assert float(part["total"]) == pytest.approx(float(total.detach()), rel=1e-12)
        assert list(part["terms"]) == list(terms)
        for name, value in terms.items():
            assert float(part["terms"][name]) == pytest.approx(float(value), rel=1e-12)
    for number, leaf in enumerate(leaves):
        # what averaging over the processes takes away again
        actual = torch.cat([part["grads"][number] for part in found], 1) / world
        assert distance(actual, leaf.grad) <= 1e-12


def test_loss_inside_of_autocast(processes, world):
    total, grads = autocast_loss(stacks(sum(LOSS_COUNTS[world])), mgfd_loss)
    found = [part["autocast"] for part in processes]
    for value, _ in found:
        assert value.dtype == torch.float32 and float(value) == pytest.approx(float(total), rel=1e-5)
    for number, grad in enumerate(grads):
        actual = torch.cat([part[number] for _, part in found], 1) / world
        assert actual.dtype == torch.float32 and distance(actual, grad) <= 1e-5


def test_similarity_equals_one_process(processes, world):
    z = embeddings(sum(LOSS_COUNTS[world]), 7, num_views=4).requires_grad_()
    similarity(z).backward()
    found = [part["similarity"] for part in processes]
    for value, _ in found:
        assert float(value) == pytest.approx(float(similarity(z.detach())), rel=1e-12)
    assert distance(torch.cat([grad for _, grad in found], 1) / world, z.grad) <= 1e-12


@pytest.mark.parametrize("dtype", MODEL_TYPES, ids=str)
def test_parameters_of_a_model_get_the_gradients_of_one_process(processes, world, dtype):
    found = [part[f"model {dtype}"] for part in processes]
    model = Model(None).to(dtype).train()
    loss = model(clips(sum(MODEL_COUNTS[world])).to(dtype))
    loss.backward()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    largest = max(float(parameter.grad.norm()) for parameter in model.parameters())
    for part in found:
        assert float(part["loss"]) == pytest.approx(float(loss.detach()), rel=tolerance)
        for name, parameter in model.named_parameters():
            if name.endswith(WITHOUT_GRADIENT):
                assert float(parameter.grad.norm()) <= tolerance * largest, name
                assert float(part["grads"][name].norm()) <= tolerance * largest, name
            else:
                assert distance(part["grads"][name], parameter.grad) <= tolerance, name
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(part["buffers"][name], buffer, rtol=tolerance, atol=tolerance, msg=name)


def test_all_processes_refuse_what_does_not_fit(processes, world):
    for rank, found in enumerate(processes):
        assert found["one row"] == (
            "decorrelate_across: z must have 2 rows in all processes together, got 1. "
            "Statistics over the batch need two samples."
        )
        assert found["widths"].startswith("mgfd_across: z must agree in all but its rows with other processes")
        assert found["types"].startswith("decorrelate_across: z must agree in all but its rows with other processes")
        assert found["gradients"].startswith("mgfd_across: z must agree in all but its rows with other processes")
        assert found["correction"].startswith(f"decorrelate_across: options.correction must be below {world}, the rows of all")
        rows = LOSS_COUNTS[world][rank]
        assert found["counts"].startswith(
            f"decorrelate_across: counts must name {rows} rows for process {rank} of {world}, got {[1] * (world + 1)}"
        )


def test_a_copy_of_the_objective_has_the_same_processes(processes):
    assert all(found["copy"] for found in processes)


@pytest.mark.parametrize("covariances", [True, False])
@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("num_views", [1, 2, 4])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("width", [256, 2048])
def test_choice_by_bytes(width, num_views, itemsize, pairs, covariances):
    world, options = 8, Options(pairs=pairs, covariances=covariances)
    num_pairs = math.comb(num_views, 2) if pairs else 0
    panels = math.ceil(width / across.PANEL)
    # rows of the lower half, panel by panel
    lower = sum((width - panel * across.PANEL) * min(across.PANEL, width) for panel in range(panels))
    summed = 2 * (num_views * lower * covariances + num_pairs * width**2) * max(itemsize, 4)
    largest = summed // (num_views * width * itemsize)
    assert choose_across(largest, width, num_views, world, itemsize, options) == "gram"
    assert choose_across(largest + 1, width, num_views, world, itemsize, options) == "direct"


def test_choice_of_a_process_alone():
    # 16 N against 24 D multiplications
    assert choose_across(1536, 1024, 4, 1, 4, Options()) == "gram"
    assert choose_across(1537, 1024, 4, 1, 4, Options()) == "direct"
    # 8 N against 6 D without pairs
    assert choose_across(768, 1024, 4, 1, 4, Options(pairs=False)) == "gram"
    assert choose_across(769, 1024, 4, 1, 4, Options(pairs=False)) == "direct"
    # 8 N against 18 D without covariances
    assert choose_across(2304, 1024, 4, 1, 4, Options(covariances=False)) == "gram"
    assert choose_across(2305, 1024, 4, 1, 4, Options(covariances=False)) == "direct"


class Largest(TorchDispatchMode):
    """Records the largest extents of what operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.shapes.add(tuple(out.shape[-2:]))
        return out


@pytest.mark.parametrize("form, rows, width", [("gram", 6, 40), ("direct", 90, 40), ("auto", 6, 40), ("auto", 90, 40)])
def test_no_large_matrix_is_made(monkeypatch, form, rows, width):
    monkeypatch.setattr(across, "PANEL", 8)
    z, options = embeddings(rows, width), Options()
    with Largest() as seen:
        _, grad = decorrelate_across(z, options, weights_of(3, options), form=form)
    *_, expected = reference(z, options, weights_of(3, options))
    assert distance(grad, expected) < 1e-12
    assert (width, width) not in seen.shapes
    assert ((rows, rows) in seen.shapes) == (rows < width)


@forms
def test_cancellation_is_not_in_the_mean(form):
    """Rows far from zero, for their deviation, keep the digits that float32 leaves them."""
    z = (embeddings(10, 6) + 1e4).float()
    weights = weights_of(3, Options())
    *energies, grad = reference(z, Options(), weights)
    values, actual = decorrelate_across(z, Options(), Energies(*(part.float() for part in weights)), form=form)
    # the mean is rounded in units of 2^-10, twice: what is left of that is nothing
    assert distance(actual, grad) <= 1e-5
    for value, energy in zip(values, energies, strict=True):
        torch.testing.assert_close(value.double(), energy, rtol=1e-5, atol=1e-6)


def test_errors():
    with pytest.raises(
        ValueError, match=r"decorrelate_across: z must be \(W, n, D\) of floating-point numbers .* got \(3, 4\)"
    ):
        decorrelate_across(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"floating-point numbers .* got \(2, 3, 4\) of torch.int64"):
        decorrelate_across(torch.zeros(2, 3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="form must be 'auto', 'gram' or 'direct', got 'fast'. Choose one."):
        decorrelate_across(torch.zeros(2, 3, 4), form="fast")
    with pytest.raises(ValueError, match=r"weights must have \[2, 2, 0, 0\] entries, got \[2, 2, 1, 1\]"):
        decorrelate_across(torch.zeros(2, 3, 4), Options(pairs=False), weights_of(2, Options()))
    with pytest.raises(ValueError, match=r"similarity_across: z must have W at least 2, got \(1, 3, 4\)"):
        similarity_across(torch.zeros(1, 3, 4))
    with pytest.raises(
        ValueError, match=r"mgfd_across: z_t, z_s and z_i must be \(W, n, D\) with equal W >= 2 and equal n"
    ):
        mgfd_across(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match="mgfd_across: z must have 2 rows in all processes together, got 1"):
        mgfd_across(*(torch.zeros(2, 1, 4) for _ in range(3)))


def test_values_without_gradient():
    z = [part.requires_grad_() for part in stacks(6)]
    with torch.no_grad():
        total, _ = mgfd_across(*z)
        assert not total.requires_grad and not similarity_across(z[0]).requires_grad
    # gradients of some inputs only
    total, _ = mgfd_across(z[0].detach(), z[1], z[2].detach())
    (grad,) = torch.autograd.grad(total, z[1])
    (expected,) = torch.autograd.grad(mgfd_loss(*z)[0], z[1])
    assert distance(grad, expected) <= 1e-12
