"""Gathering, summing and normalising over processes, against one process with all rows: values and gradients."""

from __future__ import annotations

import datetime
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastskel.dist import all_reduce_sum, exchange, gather_rows, rank_and_world, start_sum
from fastskel.nn.grouped_norm import grouped_batch_norm, grouped_projector

COUNTS = {
    2: {"even": (3, 3), "uneven": (5, 3), "empty": (4, 0)},
    4: {"even": (2, 2, 2, 2), "uneven": (3, 1, 4, 2), "empty": (2, 0, 3, 1)},
}
NORMS = {
    "plain": {},
    "cumulative": {"momentum": None},
    "last": {"momentum": 1.0},
    "no affine": {"affine": False},
    "untracked": {"track_running_stats": False},
}
NORM_COUNTS = {2: (5, 1), 4: (3, 1, 4, 2)}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shares(x: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Rows of every process, cut from (..., N, D)."""
    return x.split(list(counts), -2)


def twice(rows: Tensor, gather: Callable[[Tensor], Tensor], factors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """First gradient of sum(factors * gathered^3) by rows, and that of the sum of its squares."""
    rows = rows.detach().requires_grad_()
    value = sum((factor * gather(rows) ** 3).sum() for factor in factors)
    (first,) = torch.autograd.grad(value, rows, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), rows)
    return first.detach(), second


def refusal(function: Callable[[], Any]) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def build_norm(options: dict[str, Any]) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(5, **options).double()
    with torch.no_grad():
        for seed, tensor in enumerate((*norm.parameters(), *norm.buffers())):
            if tensor.is_floating_point():
                tensor.add_(normal(*tensor.shape, seed=20 + seed).abs())
    return norm


def build_projector() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)
    ).double()  # fmt: skip


def views(rows: int) -> Tensor:
    """Three views that differ in mean and deviation, (W, N, F)."""
    number = torch.arange(3, dtype=torch.float64)[:, None, None]
    return normal(3, rows, 5, seed=9) * (1 + number) + 3 * number


def normalised(
    module: nn.Module, function: Callable[[Tensor], Tensor], parts: list[Tensor], factors: list[Tensor]
) -> dict[str, Any]:
    """Two turns through a module: outputs, gradients of rows and parameters, buffers."""
    outs, grads = [], []
    for x, factor in zip(parts, factors, strict=True):
        x = x.detach().requires_grad_()
        out = function(x)
        (out * factor).sum().backward()
        outs.append(out.detach())
        grads.append(x.grad)
    parameters = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"outs": outs, "grads": grads, "parameters": parameters, "buffers": dict(module.named_buffers())}


def turns(rows: int, width: int) -> tuple[list[Tensor], list[Tensor]]:
    x = views(rows)
    return [x, 2 * x.flip(-1) + 1], [normal(3, rows, width, seed=seed) for seed in (5, 6)]


def work(rank: int, world: int) -> dict[str, Any]:
    """What each process computes."""
    group = dist.group.WORLD
    found: dict[str, Any] = {"rank_and_world": rank_and_world()}
    for name, counts in COUNTS[world].items():
        rows = shares(normal(2, sum(counts), 3), counts)[rank]
        factor = normal(2, sum(counts), 3, seed=1 + rank)
        found[f"gathered {name}"] = gather_rows(rows, None, counts)
        found[f"gradients {name}"] = twice(rows, gather_rows, [factor])
        half = rows.bfloat16().requires_grad_()
        (gather_rows(half, group, counts) * factor.bfloat16()).sum().backward()
        found[f"half {name}"] = half.grad
    found["sums"] = twice(normal(4, seed=rank), all_reduce_sum, [normal(4, seed=40 + rank)])
    found["scalar"] = all_reduce_sum(torch.tensor(1.0 + rank, dtype=torch.float16))
    columns = normal(3, 2, seed=rank).T
    found["strided"] = all_reduce_sum(columns)
    found["exchange"] = torch.tensor(exchange((rank, 7), torch.device("cpu")))
    started = torch.full((2,), 1.0 + rank)
    work = start_sum(started)
    assert work is not None
    work.wait()
    found["started"] = started
    part = dist.new_group([0, world - 1])
    found["part"] = refusal(lambda: rank_and_world(part))
    if rank in (0, world - 1):
        found["part of two"] = gather_rows(torch.full((1 + rank, 1), float(rank)), part)
    found["widths"] = refusal(lambda: gather_rows(torch.zeros(2, 3 + rank)))
    found["counts"] = refusal(lambda: gather_rows(torch.zeros(2, 3), counts=[1] * world))

    counts = NORM_COUNTS[world]
    parts, factors = ([shares(x, counts)[rank] for x in both] for both in turns(sum(counts), 5))
    for name, options in NORMS.items():
        norm = build_norm(options)
        found[f"norm {name}"] = normalised(
            norm, lambda x, norm=norm: grouped_batch_norm(x, norm, group), parts, factors
        )
    # a mean that drowns the deviation
    norm = nn.BatchNorm1d(5, momentum=1.0)
    found["far"] = grouped_batch_norm(parts[0].float() + 1000, norm, group).detach()
    found["far variance"] = norm.running_var
    norm = build_norm({}).bfloat16()
    found["bfloat16"] = grouped_batch_norm(parts[0].bfloat16(), norm, group).detach()
    evaluated = build_norm({}).eval()
    evaluated.register_forward_hook(lambda *_: None)
    found["evaluation"] = grouped_batch_norm(parts[0], evaluated, group).detach()
    projector = build_projector()
    found["projector"] = normalised(
        projector, lambda x: grouped_projector(projector, x, group), parts, [factor[..., :4] for factor in factors]
    )

    hooked, shouting = nn.BatchNorm1d(5), build_projector()
    hooked.register_forward_hook(lambda *_: None)
    shouting.register_forward_hook(lambda *_: None)
    x = parts[0]
    found["refusals"] = [
        refusal(lambda: grouped_batch_norm(x, hooked, group)),
        refusal(lambda: grouped_batch_norm(x, nn.SyncBatchNorm(5), group)),
        refusal(lambda: grouped_projector(shouting, x, group)),
        refusal(lambda: grouped_batch_norm(x[:, :0], nn.BatchNorm1d(5).double(), group)),
    ]
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


close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", COUNTS[2])
def test_rows_come_in_order_and_gradients_are_summed(processes, world, name):
    counts = COUNTS[world][name]
    everything = normal(2, sum(counts), 3)
    factors = [normal(2, sum(counts), 3, seed=1 + rank) for rank in range(world)]
    first, second = twice(everything, lambda x: x, factors)
    for rank, found in enumerate(processes):
        assert torch.equal(found[f"gathered {name}"], everything)
        close(found[f"gradients {name}"][0], shares(first, counts)[rank])
        close(found[f"gradients {name}"][1], shares(second, counts)[rank])
        # rounded once: the sum itself is in float32
        half = shares(sum(factor.bfloat16().float() for factor in factors).bfloat16(), counts)[rank]
        assert torch.equal(found[f"half {name}"], half)


def test_sums_and_their_gradients(processes, world):
    rows = torch.stack([normal(4, seed=rank) for rank in range(world)])
    factors = [normal(4, seed=40 + rank) for rank in range(world)]
    first, second = twice(rows, lambda x: x.sum(0), factors)
    for rank, found in enumerate(processes):
        close(found["sums"][0], first[rank])
        close(found["sums"][1], second[rank])
        assert float(found["scalar"]) == world * (world + 1) / 2
        assert found["started"].tolist() == [world * (world + 1) / 2] * 2
        close(found["strided"], sum(normal(3, 2, seed=other).T for other in range(world)))


def test_who_is_who(processes, world):
    for rank, found in enumerate(processes):
        assert found["rank_and_world"] == (rank, world)
        assert found["exchange"].tolist() == [[other, 7] for other in range(world)]
        if rank in (0, world - 1):
            assert found["part"] == "nothing was refused"
            assert found["part of two"].flatten().tolist() == [0.0] + [world - 1.0] * world
        else:
            assert found["part"].startswith("rank_and_world: group must hold this process")


def test_all_processes_refuse_what_does_not_fit(processes, world):
    for rank, found in enumerate(processes):
        start = (
            f"gather_rows: x must agree in all but its rows with other processes, got (2, {3 + rank}) in process {rank}"
        )
        assert found["widths"].startswith(start)
        assert found["counts"] == (
            f"gather_rows: counts must name 2 rows for process {rank} of {world}, got {[1] * world}. Exchange them again."
        )


def check_normalised(
    found: list[dict[str, Any]], expected: dict[str, Any], counts: tuple[int, ...], **tolerance
) -> None:
    for kind in ("outs", "grads"):
        for turn, truth in enumerate(expected[kind]):
            close(torch.cat([part[kind][turn] for part in found], 1), truth, **tolerance)
    for name, truth in expected["parameters"].items():
        close(sum(part["parameters"][name] for part in found), truth, **tolerance)
    for name, truth in expected["buffers"].items():
        for part in found:
            close(part["buffers"][name], truth, **tolerance)


@pytest.mark.parametrize("name", NORMS)
def test_norm_equals_one_process(processes, world, name):
    counts = NORM_COUNTS[world]
    norm = build_norm(NORMS[name])
    expected = normalised(norm, lambda x: grouped_batch_norm(x, norm), *turns(sum(counts), 5))
    check_normalised([part[f"norm {name}"] for part in processes], expected, counts, rtol=1e-10, atol=1e-11)


def test_projector_equals_one_process(processes, world):
    counts = NORM_COUNTS[world]
    projector, (x, factors) = build_projector(), turns(sum(counts), 5)
    expected = normalised(
        projector, lambda x: grouped_projector(projector, x), x, [factor[..., :4] for factor in factors]
    )
    check_normalised([part["projector"] for part in processes], expected, counts, rtol=1e-9, atol=1e-10)


def test_norm_in_other_types_and_modes(processes, world):
    x = turns(sum(NORM_COUNTS[world]), 5)[0][0]

    def together(name: str) -> Tensor:
        return torch.cat([part[name] for part in processes], 1)

    norm = nn.BatchNorm1d(5, momentum=1.0)
    wide = grouped_batch_norm((x.float() + 1000).double(), norm.double()).detach()
    # the rounded mean of about 1000 in units of the deviation, which is about 1
    torch.testing.assert_close(together("far").double(), wide, rtol=0, atol=1000 * 2**-22)
    torch.testing.assert_close(processes[0]["far variance"].double(), norm.running_var, rtol=1e-5, atol=0)
    half = grouped_batch_norm(x.bfloat16().double(), build_norm({}).bfloat16().double()).detach()
    assert together("bfloat16").dtype == torch.bfloat16
    torch.testing.assert_close(together("bfloat16").double(), half, rtol=2**-8, atol=1e-6)
    assert torch.equal(together("evaluation"), grouped_batch_norm(x, build_norm({}).eval()).detach())


def test_statistics_that_would_not_be_shared_are_refused(processes, world):
    for found in processes:
        hooked, synchronised, projector, empty = found["refusals"]
        start = "grouped_batch_norm: norm must be nn.BatchNorm1d without hooks to share statistics in a group, got "
        assert hooked.startswith(start + "BatchNorm1d.")
        assert synchronised.startswith(start + "SyncBatchNorm.")
        assert projector.startswith("grouped_projector: projector must have no hooks to share statistics in a group")
        assert empty.startswith("grouped_batch_norm: x must be (W, N, F) with N at least 1 in training, got (3, 0, 5)")


def test_a_process_alone():
    x = normal(2, 3, 4).requires_grad_()
    assert rank_and_world() == (0, 1)
    assert exchange((3, 4), torch.device("cpu")) == [(3, 4)]
    assert start_sum(x.detach()) is None
    for alone in (gather_rows, all_reduce_sum):
        out = alone(x)
        assert torch.equal(out, x) and out.data_ptr() != x.data_ptr()
        (grad,) = torch.autograd.grad((out * 3).sum(), x)
        assert torch.equal(grad, torch.full_like(x, 3))


def test_errors_of_a_process_alone():
    with pytest.raises(
        ValueError, match=r"gather_rows: x must be \(..., n, D\), got \(3,\). Give it a dimension of rows."
    ):
        gather_rows(torch.zeros(3))
    with pytest.raises(ValueError, match=r"counts must name 2 rows for process 0 of 1, got \[2, 2\]"):
        gather_rows(torch.zeros(2, 3), counts=(2, 2))
    with pytest.raises(ValueError, match="group must be None before torch.distributed is initialised, got str"):
        rank_and_world("everyone")
